"""Episodes on real Ray, DeepSpeed and rollout actors, with an environment of the user's own that fails for one row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ENVIRONMENT = '''
class Fragile:
    """Two turns, reward 1 and then 2; the level called "broken" breaks in its second turn."""

    def reset(self, level):
        self.level, self.turn = level, 0
        return f"You are on level {level}."

    def step(self, action):
        self.turn += 1
        if self.level == "broken" and self.turn == 2:
            raise OSError("the bridge is gone")
        return "Go on.", float(self.turn), self.turn == 2, {}


def rows():
    for level in ("one", "two", "three", "broken"):
        yield {"prompt": "Walk.", "level": level}
'''


def test_a_run_credits_turns_and_masks_the_episodes_whose_environment_failed(tmp_path):
    (tmp_path / "fragile.py").write_text(ENVIRONMENT)
    words = [
        "train", "experiment=tiny_ppo", "algorithm=poad", "algorithm.updates_per_batch=1", "run_name=walk",
        "environment.cls=fragile.py:Fragile", "environment.max_turn_tokens=4", "environment.workers=2",
        "data.train=function:fragile.py:rows", "data.eval=null", "data.max_prompt_tokens=128",
        "reward.functions=null", "reward.max_failed_share=0.3", "rollout.engine=transformers",
        "rollout.responses_per_prompt=2", "rollout.max_response_tokens=64", "train.prompts_per_step=4",
        "train.steps=1", "tracking.plots=false", "checkpoint.final=false",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [str(Path(sys.executable).parent / "apportion"), *words]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    [line] = (tmp_path / "runs" / "walk" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["rollout/environment_failures"] == 2
    assert metrics["reward/failed_share"] == 0.25
    assert (metrics["reward/mean"], metrics["rollout/turns_mean"]) == (3.0, 2.0)
    assert metrics["credit/actions_per_response"] == 2.0
    assert "OSError: the bridge is gone" in run.stdout + run.stderr
    samples = [json.loads(row) for row in (tmp_path / "runs" / "walk" / "samples.jsonl").read_text().splitlines()]
    spoken = [
        advantage
        for sample in samples
        for advantage, token in zip(sample["advantages"], sample["tokens"], strict=True)
        if token == "<|user|>"
    ]
    assert len(spoken) >= len(samples) and not any(spoken)
