"""The critic's loss is the one that is held to released code, and its clip fraction is logged."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from apportion.actors.critic import CriticSpec, CriticWorker
from apportion.actors.engine import OptimizerStep
from apportion.batch import Batch
from apportion.loop.metrics import update_metrics
from apportion.platform.metric_names import unknown_metrics

SETTINGS = SimpleNamespace(micro_batch_tokens=40, logits_chunk_tokens=16, zero_stage=0)


class Engine:
    """Says a value for each token of the batch, whatever the micro-batch; takes no step."""

    def __init__(self) -> None:
        self.device, self.scale, self.losses = torch.device("cpu"), nn.Parameter(torch.ones(())), []

    def forward(self, input_ids, rows, columns, *more) -> torch.Tensor:
        return self.scale * value_after(input_ids[rows, columns + 1])

    def train_step(self, micros, empty, loss) -> OptimizerStep:
        self.losses.append(sum(loss(micro) for micro in micros))
        return OptimizerStep(1.0, 0.1)


def value_after(token: torch.Tensor) -> torch.Tensor:
    return (token % 7).float() / 3 - 1


def by_hand(batch: Batch, step: int, clip: float | None) -> tuple[float, int]:
    """The loss of an optimizer step, token by token, and how many tokens the clip held."""
    loss, held, count = 0.0, 0, 0
    for row in np.flatnonzero(batch.minibatch_ids == step):
        span = batch.response_slice(row)
        tokens = batch.sequence(row)[batch.prompt_lengths[row] :]
        for place, token in zip(range(span.start, span.stop), tokens.tolist(), strict=True):
            if not batch.action_mask[place]:
                continue
            value, old, target = float(value_after(torch.tensor(token))), batch.values[place], batch.returns[place]
            plain = (value - target) ** 2
            kept = value if clip is None else min(max(value, old - clip), old + clip)
            loss += 0.5 * max(plain, (kept - target) ** 2)
            held += (kept - target) ** 2 > plain
            count += 1
    return loss / count, held


@pytest.mark.parametrize("clip", [0.3, None])
def test_the_loss_is_that_of_clipped_values_and_the_share_of_clipped_ones_is_logged(credited, clip):
    worker = CriticWorker(CriticSpec("", "float32", "sdpa", False, SETTINGS, clip, 1, 2))
    worker.engine = Engine()
    report = worker.update(replace(credited, minibatch_ids=credited.minibatch_ids), 2)
    right = [by_hand(credited, step, clip) for step in (0, 1)]
    assert [float(loss) for loss in worker.engine.losses] == pytest.approx([loss for loss, _ in right], rel=1e-5)
    metrics = update_metrics([report], "critic")
    assert unknown_metrics(metrics) == []
    held = sum(count for _, count in right) / credited.action_mask.sum()
    if clip is None:
        assert "critic/clip_fraction" not in metrics
    else:
        assert 0.1 < held == pytest.approx(metrics["critic/clip_fraction"])


def test_a_token_that_the_clip_holds_has_no_gradient(credited):
    far = replace(credited, values=credited.returns + 100.0)  # each value is clipped to far above its return
    worker = CriticWorker(CriticSpec("", "float32", "sdpa", False, SETTINGS, 0.2, 1, 2))
    worker.engine = Engine()
    report = worker.update(far.select([0, 1]), 1)
    worker.engine.losses[0].backward()
    assert worker.engine.scale.grad.item() == 0.0
    assert report.totals.means()["critic/clip_fraction"] == 1.0
