"""One rank of the critic: a value model on the same kind of engine as the policy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apportion.actors.engine import DeepSpeedEngine, World
from apportion.actors.engine_settings import EngineSettings
from apportion.actors.loading import load_causal_lm
from apportion.actors.microbatch import MicroBatch, cut, make, nothing
from apportion.actors.modules import ValueModel
from apportion.actors.policy import UpdateReport
from apportion.algorithms.surrogates import value_losses
from apportion.batch import Batch, Signals, Totals
from apportion.platform import progress
from apportion.platform.process import ActorBase
from apportion.platform.random_states import load_random_states, save_random_states


@dataclass
class CriticSpec:
    model: str
    dtype: str
    attention: str
    trust_remote_code: bool
    settings: EngineSettings
    value_clip: float | None
    epochs: int
    total_optimizer_steps: int
    share_prompts: bool = False  # in the update, as the policy


class CriticWorker(ActorBase):
    def __init__(self, spec: CriticSpec) -> None:
        self.spec = spec

    def setup(self, world: World) -> None:
        """Load the model and join the other ranks."""
        spec, self.world = self.spec, world
        model = load_causal_lm(
            spec.model, spec.dtype, spec.attention, spec.trust_remote_code, spec.settings.gradient_checkpointing
        )
        module = ValueModel(model)
        freeze_unused_head(module)
        self.engine = DeepSpeedEngine(module, spec.settings, world, spec.total_optimizer_steps)

    def signals(self, shard: Batch) -> tuple[float, Signals]:
        """Seconds, and `values` [R] of the state before each action token, and `bootstrap_values` [B] of the state after the last."""
        start = time.perf_counter()
        progress.begin("forward passes")
        values = np.zeros(int(shard.response_lengths.sum()), np.float32)
        bootstrap = np.zeros(len(shard), np.float32)
        totals = shard.prompt_lengths + shard.response_lengths
        planned = list(_with_rows(shard, np.arange(len(shard)), 2 * self.spec.settings.micro_batch_tokens))
        extra = self.engine.extra_passes(len(planned))
        self.engine.module().eval()
        with torch.no_grad():
            for micro, rows in planned:
                m = micro.to(self.engine.device)
                last = torch.from_numpy(totals[rows].astype(np.int64) - 1).to(m.rows.device)
                each = torch.arange(len(rows), device=m.rows.device)
                out = self.engine.forward(m.input_ids, torch.cat([m.rows, each]), torch.cat([m.columns, last])).cpu()
                values[micro.packed_index] = out[: len(micro.packed_index)].numpy()
                bootstrap[rows] = out[len(micro.packed_index) :].numpy()
            for _ in range(extra):
                idle = nothing().to(self.engine.device)
                self.engine.forward(idle.input_ids, idle.rows, idle.columns)
        return time.perf_counter() - start, Signals(values=values, bootstrap_values=bootstrap)

    def update(self, shard: Batch, minibatches: int) -> UpdateReport:
        report, start = UpdateReport(Totals()), time.perf_counter()
        progress.begin("micro-batches")
        for _ in range(self.spec.epochs):
            for step in range(minibatches):
                chosen = np.flatnonzero(shard.minibatch_ids == step)
                micros = cut(shard, chosen, self.spec.settings.micro_batch_tokens, self.spec.share_prompts)
                report.tokens += sum(m.real_tokens for m in micros)
                outcome = self.engine.train_step(micros, nothing(), lambda m: self._loss(m, shard, report.totals))
                report.steps.append(outcome)
        report.seconds = time.perf_counter() - start
        return report

    def _loss(self, micro: MicroBatch, shard: Batch, totals: Totals) -> Tensor:
        """`value_losses`, the mean over all action tokens of the optimiser step."""
        assert shard.returns is not None and shard.values is not None and shard.value_weights is not None
        device = self.engine.device
        m = micro.to(device)
        values = self.engine.forward(m.input_ids, m.rows, m.columns, m.layout)
        index = micro.packed_index
        if not len(index):
            return values.sum() * 0.0
        returns, old, weights = (
            torch.from_numpy(packed[index]).to(device) for packed in (shard.returns, shard.values, shard.value_weights)
        )
        out = value_losses(values, old, returns, torch.ones_like(values, dtype=torch.bool), self.spec.value_clip)
        loss = (out.losses_BT * weights).sum()
        totals.add("critic/loss", float(loss.detach()), 0.0)
        for name, shares in out.indicators.items():
            totals.add(f"critic/{name}", float(shares.sum()), len(index))
        return loss

    def save(self, folder: str) -> None:
        target = Path(folder) / "critic"
        self.engine.save(target)
        save_random_states(target, f"rank-{self.world.rank}")

    def load(self, folder: str) -> None:
        source = Path(folder) / "critic"
        self.engine.load(source)
        load_random_states(source, f"rank-{self.world.rank}")


def freeze_unused_head(module: ValueModel) -> None:
    """A value model never makes logits; an untied output head would otherwise be trained by nothing."""
    head = module.model.get_output_embeddings()
    if head is not None and head.weight is not module.model.get_input_embeddings().weight:
        head.weight.requires_grad_(False)


def _with_rows(shard: Batch, order: np.ndarray, micro_batch_tokens: int):
    from apportion.actors.microbatch import plan_rows

    for rows in plan_rows((shard.prompt_lengths + shard.response_lengths)[order], micro_batch_tokens):
        chosen = order[rows]
        yield make(shard, chosen), chosen
