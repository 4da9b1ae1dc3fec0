"""A batch of given texts, a reward for each text's length, and one call of a scorer."""

import math

import numpy as np

from apportion.actors.scoring import Scorer, ScoreReport
from apportion.batch import Batch, Prompt, Trajectory

NAN = math.nan


def trajectory(prompt_id: str, text: str, turn_ids: list[int] | None = None) -> Trajectory:
    """One token a character unless `turn_ids` says otherwise; -1 marks an environment's token."""
    turns = np.array([0] * len(text) if turn_ids is None else turn_ids, np.int32)
    actions = turns >= 0
    return Trajectory(
        prompt_id,
        group_id=0,
        sample_index=0,
        token_ids=np.array([7, 8, *range(20, 20 + len(turns))], np.int32),
        prompt_length=2,
        action_mask=actions,
        turn_ids=turns,
        behavior_logprobs=np.where(actions, -1.0, np.nan).astype(np.float32),
        policy_version=0,
        finish_reason="stop",
        text=text,
    )


def batch_of(*texts: str) -> tuple[Batch, list[Prompt]]:
    prompts = [
        Prompt(f"rows:{i}:0", np.array([7, 8], np.int32), f"q{i}", {"answer": str(i)}, "rows")
        for i in range(len(texts))
    ]
    return Batch.from_trajectories([trajectory(f"rows:{i}:0", text) for i, text in enumerate(texts)]), prompts


def score(entries, batch, prompts, **options) -> tuple[Batch, ScoreReport]:
    scorer = Scorer(entries, **options)
    try:
        return scorer.score(batch, prompts)
    finally:
        scorer.close()


def lengths(completions, **columns):
    return [float(len(c)) for c in completions]
