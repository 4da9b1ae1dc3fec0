"""A batch on which every credit method can be tried: groups of all shapes, and every signal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from apportion.batch import Batch, Trajectory

# Response tokens of each row of a group; False is an environment's token. Single-token, all-masked and empty ones too.
GROUPS = [
    [[True] * 6, [True], [True, True, False, True]],
    [[False, False], [True] * 3, []],
    [[True] * 5, [True] * 5],
    [[True, False, True]],  # what is left of a group
]


def batch_of(seed: int) -> Batch:
    """Every signal that a method may read, NaN where nothing may be read."""
    rng = np.random.default_rng(seed)
    rows = [
        Trajectory(
            prompt_id=f"p{group}",
            group_id=group,
            sample_index=index,
            token_ids=rng.integers(5, 200, 2 + len(mask)).astype(np.int32),
            prompt_length=2,
            action_mask=np.array(mask, bool),
            turn_ids=np.where(mask, np.cumsum(~np.array(mask, bool)), -1).astype(np.int32),
            behavior_logprobs=np.where(mask, -1.0, np.nan).astype(np.float32),
            policy_version=0,
            finish_reason="stop",
            text="",
            terminated=bool(rng.random() < 0.7),
        )
        for group, masks in enumerate(GROUPS)
        for index, mask in enumerate(masks)
    ]
    batch = Batch.from_trajectories(rows)
    mask, count = batch.action_mask, len(batch)

    def signal(values: np.ndarray) -> np.ndarray:
        return np.where(mask, values, np.nan).astype(np.float32)

    return replace(
        batch,
        rewards=rng.integers(0, 2, count).astype(np.float64),
        sample_mask=np.ones(count, bool),
        old_logprobs=signal(-rng.random(len(mask))),
        reference_logprobs=signal(-rng.random(len(mask))),
        values=signal(rng.normal(size=len(mask))),
        bootstrap_values=rng.normal(size=count).astype(np.float32),
        entropies=signal(rng.random(len(mask))),
        influences=signal(rng.normal(size=len(mask))),
        step_ids=np.concatenate([np.arange(n) // 2 for n in batch.response_lengths]).astype(np.int32),
        wrong_steps=[[0] if rng.random() < 0.4 else [] for _ in range(count)],
    )
