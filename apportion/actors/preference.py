"""One rank of a preference stage: supervised fine-tuning, a reward model, or DPO, on the policy's training engine.

Every rank maps the same packed examples from the object store and is told, step by step, which of them are its own and
what each weighs in the loss of the whole step. What an objective reads (token log-probs or a sequence's score), whether
it compares pairs and whether it needs a reference is what the objective itself declares.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apportion.actors.engine import DeepSpeedEngine, OptimizerStep, World, on_rank_0
from apportion.actors.engine_settings import EngineSettings
from apportion.actors.loading import load_causal_lm, save_huggingface
from apportion.actors.lora import merged_weights
from apportion.actors.microbatch import MicroBatch, make, plan_rows
from apportion.actors.modules import CausalLMLogprobs
from apportion.actors.packing import make_packed, plan_bins
from apportion.actors.score_model import load_score_model, save_score_model
from apportion.algorithms.preference import (
    SEQUENCE_SCORES,
    Objective,
    PairInput,
    PairOutput,
    Sft,
    share_correct,
)
from apportion.batch import Batch, Totals
from apportion.data.pair_tokens import PreferenceData
from apportion.platform import progress
from apportion.platform.process import ActorBase
from apportion.platform.random_states import load_random_states, save_random_states


@dataclass
class PreferenceSpec:
    model: str
    dtype: str
    attention: str
    trust_remote_code: bool
    lora: Any | None
    settings: EngineSettings
    objective: Objective
    reference_model: str | None  # None: the starting weights
    total_optimizer_steps: int
    seed: int
    chat_template: str | None = None  # the text of one in place of the tokenizer's own
    packing: bool = False  # a micro-batch is one row of sequences, not a row for each


@dataclass
class StepShare:
    """One rank's part of one optimiser step."""

    examples: np.ndarray  # [k] int64, places in the training data
    weights: (
        np.ndarray
    )  # float32, [k] a pair or [R of these examples' rows] a token; over all ranks they sum to the loss


@dataclass
class StepReport:
    totals: Totals
    step: OptimizerStep | None  # None: an evaluation
    tokens: int = 0  # unpadded
    seconds: float = 0.0


@dataclass
class ReferenceLogprobs:
    """What a frozen model makes of both answers: sums over their tokens, NaN where not asked for. [rows] float32."""

    train: np.ndarray
    held_out: np.ndarray

    @staticmethod
    def merged(parts: Sequence[ReferenceLogprobs]) -> ReferenceLogprobs:
        """Each rank's part in one; a row is known to one rank alone."""
        train, held_out = (np.stack([getattr(p, name) for p in parts]) for name in ("train", "held_out"))
        return ReferenceLogprobs(_known(train), _known(held_out))


@dataclass
class _Part:
    """Examples of one micro-batch: rows of the data side by side, and their weights."""

    micro: MicroBatch
    rows: np.ndarray  # [b] int64 in the data's batch
    last_rows: np.ndarray  # [b] int64, where each sequence's last token stands
    last_columns: np.ndarray
    weights: np.ndarray | None = None  # [pairs] or [r], as in StepShare
    margins: np.ndarray | None = None  # [pairs]
    reference: np.ndarray | None = None  # [b]
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [b] answer tokens with a loss


class PreferenceWorker(ActorBase):
    """A DeepSpeed rank. Methods that communicate must be called on every rank at once."""

    def __init__(self, spec: PreferenceSpec) -> None:
        self.spec = spec
        self.objective = spec.objective
        self.reference: ReferenceLogprobs | None = None

    def setup(self, world: World) -> None:
        """Load the model and join the other ranks."""
        spec, self.world = self.spec, world
        module: nn.Module
        if self.objective.reads == SEQUENCE_SCORES:
            module = load_score_model(spec, spec.settings.gradient_checkpointing)
        else:
            module = self._causal_lm(spec.model, spec.settings.gradient_checkpointing, spec.lora)
        self.engine = DeepSpeedEngine(module, spec.settings, world, spec.total_optimizer_steps)

    def _causal_lm(self, path: str, checkpointing: bool, lora: Any | None) -> CausalLMLogprobs:
        spec = self.spec
        model = load_causal_lm(path, spec.dtype, spec.attention, spec.trust_remote_code, checkpointing, lora)
        return CausalLMLogprobs(model, spec.settings.logits_chunk_tokens)

    def load_data(self, train: PreferenceData, held_out: PreferenceData | None) -> None:
        """Keep the examples; references are resolved by Ray without a copy."""
        self.train, self.held_out = train, held_out

    # the reference

    def reference_logprobs(self, train: np.ndarray, held_out: np.ndarray) -> tuple[float, ReferenceLogprobs]:
        """Seconds, and the frozen model's log-probs of these examples; called before the first optimiser step, when
        this rank's own weights are the starting ones (fresh adapters change nothing)."""
        start = time.perf_counter()
        progress.begin("forward passes")
        own = self.spec.reference_model is None
        module = self.engine.module() if own else self._causal_lm(self.spec.reference_model or "", False, None)
        if not own:
            module = module.to(self.engine.device)
        forward = self.engine.forward if own else module
        module.eval()
        out = ReferenceLogprobs(
            self._answer_sums(forward, self.train, train), self._answer_sums(forward, self.held_out, held_out)
        )
        return time.perf_counter() - start, out

    def set_reference(self, *parts: ReferenceLogprobs) -> None:
        self.reference = ReferenceLogprobs.merged(parts)

    @torch.no_grad()
    def _answer_sums(self, forward: Callable, data: PreferenceData | None, examples: np.ndarray) -> np.ndarray:
        """[rows] float32, NaN for rows of other examples."""
        if data is None:
            return np.zeros(0, np.float32)
        sums = np.full(len(data.batch), np.nan, np.float32)
        for part in self._keeping_pace(self._parts(data, examples, 2)):
            outs = self._row_outputs(forward, part).cpu().numpy()
            progress.advance()
            if part is not self._idle:
                sums[part.rows] = outs
        return sums

    # training

    def update(self, share: StepShare) -> StepReport:
        """One optimiser step over this rank's part of it."""
        report, start = StepReport(Totals(), None), time.perf_counter()
        progress.begin("micro-batches")
        report.totals.add(f"{self.objective.name}/loss", 0.0, 0.0)  # known also of a rank without examples
        parts = self._parts(self.train, share.examples, 1, share.weights)
        report.tokens = sum(part.micro.real_tokens for part in parts)
        report.step = self.engine.train_step(
            parts, self._idle_part(), lambda part: self._loss(part, self._counted(part, report), self.objective.name)
        )
        report.seconds = time.perf_counter() - start
        return report

    @torch.no_grad()
    def evaluate(self, examples: np.ndarray) -> StepReport:
        """Sums over these held-out examples, under `eval/...`."""
        report, start = StepReport(Totals(), None), time.perf_counter()
        progress.begin("micro-batches")
        assert self.held_out is not None
        self.engine.module().eval()
        for part in self._keeping_pace(self._parts(self.held_out, examples, 2)):
            self._loss(part, self._counted(part, report), "eval")
        report.seconds = time.perf_counter() - start
        return report

    def _counted(self, part: _Part, report: StepReport) -> Totals:
        """Where a part is counted: one that only keeps pace nowhere."""
        return Totals() if part is self._idle else report.totals

    def _loss(self, part: _Part, totals: Totals, prefix: str) -> Tensor:
        """Weighted loss of one micro-batch; without weights (evaluation) only `totals` matter."""
        objective = self.objective
        if isinstance(objective, Sft):
            return self._token_loss(objective, part, totals, prefix)
        outputs = self._row_outputs(self.engine.forward, part)
        pairs = self._pair_input(part, outputs)
        out = objective(pairs)
        _count_pairs(totals, prefix, objective, pairs, out)
        loss = (out.losses_P * self._tensor(part.weights)).sum() if part.weights is not None else out.losses_P.sum()
        if part.weights is not None:
            totals.add(f"{prefix}/loss", float(loss.detach()), 0.0)
        else:
            totals.add(f"{prefix}/pair_loss", float(loss), len(out.losses_P))
        return loss

    def _token_loss(self, objective: Sft, part: _Part, totals: Totals, prefix: str) -> Tensor:
        losses = objective(self._logprobs(self.engine.forward, part.micro))
        if part.weights is None:
            totals.add(f"{prefix}/nll", float(losses.sum()), len(losses))
            return losses.sum()
        loss = (losses * self._tensor(part.weights)).sum()
        totals.add(f"{prefix}/loss", float(loss.detach()), 0.0)
        totals.add(f"{prefix}/nll", float(losses.detach().sum()), len(losses))
        return loss

    def _pair_input(self, part: _Part, outputs: Tensor) -> PairInput:
        chosen, rejected = outputs[0::2], outputs[1::2]
        lengths = self._tensor(part.lengths.astype(np.float32))
        pairs = PairInput(chosen, rejected, lengths[0::2], lengths[1::2])
        if part.reference is not None:
            reference = self._tensor(part.reference)
            pairs.reference_chosen_P, pairs.reference_rejected_P = reference[0::2], reference[1::2]
        if part.margins is not None:
            pairs.wanted_margins_P = self._tensor(part.margins)
        return pairs

    # forward passes

    def _row_outputs(self, forward: Callable, part: _Part) -> Tensor:
        """[b] sums of the answers' log-probs, or scores. float32"""
        if self.objective.reads == SEQUENCE_SCORES:
            m = part.micro.to(self.engine.device)
            return forward(m.input_ids, self._tensor(part.last_rows), self._tensor(part.last_columns), tree=m.layout)
        logprobs = self._logprobs(forward, part.micro)
        return logprobs.new_zeros(len(part.rows)).index_add(0, part.micro.members.to(logprobs.device), logprobs)

    def _logprobs(self, forward: Callable, micro: MicroBatch) -> Tensor:
        """[r] at temperature 1."""
        m = micro.to(self.engine.device)
        return forward(m.input_ids, m.rows, m.columns, m.targets, tree=m.layout)[0]

    def _parts(
        self, data: PreferenceData, examples: np.ndarray, scale: int, weights: np.ndarray | None = None
    ) -> list[_Part]:
        """Micro-batches of whole examples, of similar length or packed; `scale` times the tokens where there is no backward."""
        if not len(examples):
            return []
        batch, answers = data.batch, 2 if data.pairs else 1
        totals = (batch.prompt_lengths.astype(np.int64) + batch.response_lengths)[data.rows(examples)]
        tokens = scale * self.spec.settings.micro_batch_tokens
        if self.spec.packing:
            plans = plan_bins(totals.reshape(-1, answers).sum(1), tokens)
        else:
            plans = plan_rows(totals.reshape(-1, answers).max(1), tokens // answers)
        per_example = None if weights is None else _split_weights(data, examples, weights)
        return [
            self._part(data, examples[plan], None if per_example is None else [per_example[i] for i in plan])
            for plan in plans
        ]

    def _part(self, data: PreferenceData, examples: np.ndarray, weights: list[np.ndarray] | None) -> _Part:
        batch, rows = data.batch, data.rows(examples)
        lengths = (batch.prompt_lengths + batch.response_lengths)[rows].astype(np.int64)
        if self.spec.packing:
            part = _Part(make_packed(batch, rows), rows, np.zeros_like(rows), np.cumsum(lengths) - 1)
        else:
            part = _Part(make(batch, rows), rows, np.arange(len(rows)), lengths - 1)
        part.lengths = np.bincount(part.micro.members.numpy(), minlength=len(rows))
        if weights is not None:
            part.weights = np.concatenate(weights)
        if data.margins is not None:
            part.margins = data.margins[examples]
        if self.reference is not None and self.objective.needs_reference:
            known = self.reference.train if data is self.train else self.reference.held_out
            part.reference = known[rows]
        return part

    def _idle_part(self) -> _Part:
        """A pass that a rank makes only to keep pace with the others; its loss is multiplied by 0."""
        shortest = np.array([int(np.argmin(self.train.example_tokens()))])
        part = self._part(self.train, shortest, None)
        part.weights = np.zeros(1 if self.train.pairs else len(part.micro.targets), np.float32)
        if part.reference is not None:
            part.reference = np.zeros(len(part.rows), np.float32)  # it may not have been asked for: NaN times 0 is NaN
        self._idle = part
        return part

    def _keeping_pace(self, parts: list[_Part]) -> list[_Part]:
        """Under ZeRO-3 every forward pass communicates, so each rank makes as many as the busiest one."""
        idle = self._idle_part()
        if self.spec.settings.zero_stage != 3 or self.world.size == 1:
            return parts
        count = torch.tensor([len(parts)], device=self.engine.device)
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
        return parts + [idle] * (int(count.item()) - len(parts))

    def _tensor(self, values: np.ndarray | None) -> Tensor:
        assert values is not None
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.engine.device)

    # checkpoints

    def save(self, folder: str) -> None:
        """Training state of this rank, and from rank 0 a model that transformers loads."""
        target, spec = Path(folder), self.spec
        self.engine.save(target / "policy")
        save_random_states(target / "policy", f"rank-{self.world.rank}")
        named = on_rank_0(merged_weights(self.engine.named_weights(), self.spec.lora), self.world)
        if self.world.rank:
            return
        write = save_score_model if self.objective.reads == SEQUENCE_SCORES else save_huggingface
        write(spec.model, named, target / "model", spec.trust_remote_code, spec.chat_template)

    def load(self, folder: str) -> None:
        source = Path(folder) / "policy"
        self.engine.load(source)
        load_random_states(source, f"rank-{self.world.rank}")


def _count_pairs(totals: Totals, prefix: str, objective: Objective, pairs: PairInput, out: PairOutput) -> None:
    count, margins = len(out.margins_P), out.margins_P
    names = ("pair_accuracy", "pair_margin") if prefix == "eval" else ("accuracy", "margin")
    totals.add(f"{prefix}/{names[0]}", float(share_correct(margins).sum()), count)
    totals.add(f"{prefix}/{names[1]}", float(margins.sum()), count)
    if prefix == "eval":
        return
    kind = "score" if objective.reads == SEQUENCE_SCORES else "logprob"
    totals.add(f"{prefix}/chosen_{kind}", float(pairs.chosen_P.detach().sum()), count)
    totals.add(f"{prefix}/rejected_{kind}", float(pairs.rejected_P.detach().sum()), count)


def _split_weights(data: PreferenceData, examples: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """Weights of each example: one a pair, or one for each of its tokens that carry a loss."""
    if data.pairs:
        return list(weights.reshape(-1, 1))
    batch: Batch = data.batch
    actions = [int(batch.action_mask[batch.response_slice(int(row))].sum()) for row in data.rows(examples)]
    return np.split(weights, np.cumsum(actions)[:-1])


def _known(parts: np.ndarray) -> np.ndarray:
    """[ranks, rows] to [rows]: the one value that is not NaN, NaN where no rank has one."""
    return np.where(np.isnan(parts).all(0), np.nan, np.nan_to_num(parts).sum(0)).astype(np.float32)
