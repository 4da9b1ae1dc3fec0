"""Distillation on a policy rank: frozen teachers beside the student, and a loss from their whole distributions.

Teachers have no optimiser and are never sent: at the positions that predict action tokens they give final hidden
states, and from there logits of the three models exist for a chunk of positions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from apportion.actors.loading import load_causal_lm
from apportion.actors.microbatch import MicroBatch
from apportion.actors.modules import CausalLMLogprobs
from apportion.algorithms import registry
from apportion.algorithms.distillation import DistillationOutput
from apportion.batch import Batch, Totals


@dataclass
class DistillationSpec:
    part: dict[str, Any]  # a mapping of the kind `distillation`
    dpo: str  # folders of the two frozen models
    other: str
    dtype: str
    attention: str
    trust_remote_code: bool


class ForwardEngine(Protocol):
    device: torch.device

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


class Distillation:
    """The policy's loss where it learns from teachers instead of advantages."""

    def __init__(self, spec: DistillationSpec, logits_chunk_tokens: int, device: torch.device) -> None:
        self.part = registry.build("distillation", spec.part)
        self._teachers = [_frozen(spec, path, logits_chunk_tokens).to(device) for path in (spec.dpo, spec.other)]

    def loss(self, engine: ForwardEngine, micro: MicroBatch, shard: Batch, totals: Totals) -> Tensor:
        """sum(loss_weights * token losses) of a micro-batch; 0, with a gradient, for one that only keeps pace."""
        m = micro.to(engine.device)
        out = self._forward(engine, m)
        if not len(micro.packed_index) or shard.loss_weights is None:
            return out.losses.sum() * 0.0
        weights = torch.from_numpy(np.ascontiguousarray(shard.loss_weights[micro.packed_index])).to(engine.device)
        loss = (out.losses * weights).sum()
        totals.add("policy/loss", float(loss.detach()), 0.0)
        for name, values in out.indicators.items():
            totals.add(f"policy/distillation_{name}", float(values.detach().sum()), len(values))
        return loss

    def _forward(self, engine: ForwardEngine, m: MicroBatch) -> DistillationOutput:
        """One value of each kind for each of the r action tokens."""
        with torch.no_grad():
            hidden = [teacher.hidden(m.input_ids, *(m.layout or ()))[m.rows, m.columns] for teacher in self._teachers]

        def work(module: CausalLMLogprobs, picked: Tensor) -> tuple[Tensor, ...]:
            heads = tuple(_head(model) for model in (module, *self._teachers))
            out = self.part.losses_in_chunks(picked, *hidden, heads)
            return tuple(getattr(out, f.name) for f in fields(DistillationOutput))

        return DistillationOutput(*engine.forward(m.input_ids, m.rows, m.columns, m.targets, work=work, tree=m.layout))


def _head(model: CausalLMLogprobs) -> Any:
    return lambda hidden: model.logits(hidden, 1.0)


def _frozen(spec: DistillationSpec, path: str, logits_chunk_tokens: int) -> nn.Module:
    model = load_causal_lm(path, spec.dtype, spec.attention, spec.trust_remote_code)
    return CausalLMLogprobs(model, logits_chunk_tokens).eval().requires_grad_(False)
