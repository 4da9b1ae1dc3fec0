"""One rank of the policy: log-probs before the update, the update, and the weights for the rollout engines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.actors.distillation import Distillation, DistillationSpec
from apportion.actors.engine import DeepSpeedEngine, OptimizerStep, World, on_rank_0
from apportion.actors.engine_settings import EngineSettings
from apportion.actors.influence import InfluencePass
from apportion.actors.loading import load_causal_lm, save_huggingface
from apportion.actors.lora import merged_forward, merged_weights
from apportion.actors.microbatch import MicroBatch, cut, nothing
from apportion.actors.modules import CausalLMLogprobs
from apportion.algorithms import registry
from apportion.algorithms.correction import ImportanceCorrection, mean_weight, mismatch_metrics
from apportion.algorithms.interface import Surrogate, SurrogateInput
from apportion.algorithms.kl import kl_estimates, kl_losses
from apportion.batch import Batch, Signals, Totals
from apportion.platform import progress
from apportion.platform.channel import ChannelAddress, WeightChannel
from apportion.platform.process import ActorBase
from apportion.platform.random_states import load_random_states, save_random_states
from apportion.platform.weights import WeightBundle, send


@dataclass
class LossSpec:
    """The policy's loss, as far as a rank must know it."""

    surrogate: dict[str, Any] | None  # None: distillation takes its place
    temperature: float
    kl_in_loss: bool
    kl_estimator: str
    entropy_coefficient: float
    correction: ImportanceCorrection
    mismatch_bound: float
    epochs: int
    kl_straight_through: bool = False


@dataclass
class PolicySpec:
    model: str
    dtype: str
    attention: str
    trust_remote_code: bool
    lora: Any | None
    settings: EngineSettings
    loss: LossSpec
    total_optimizer_steps: int
    share_prompts: bool = False  # responses of a group behind one copy of their prompt
    credit: dict[str, Any] | None = None  # a credit method whose `influence` is to be called
    distillation: DistillationSpec | None = None
    chat_template: str | None = None  # the text of one in place of the tokenizer's own


@dataclass
class UpdateReport:
    totals: Totals
    steps: list[OptimizerStep] = field(default_factory=list)
    tokens: int = 0  # unpadded tokens that went forward and backward
    seconds: float = 0.0  # in forward and backward passes and optimiser steps


class PolicyWorker(ActorBase):
    """A DeepSpeed rank. Methods that communicate must be called on every rank at once."""

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = spec
        self._room: np.ndarray | None = None  # what the last weights were packed into
        self._channel: WeightChannel | None = None

    def setup(self, world: World) -> None:
        """Load the model and join the other ranks."""
        spec, self.world = self.spec, world
        torch.manual_seed(world.seed)  # new adapters are drawn
        model = load_causal_lm(
            spec.model,
            dtype=spec.dtype,
            attention=spec.attention,
            trust_remote_code=spec.trust_remote_code,
            gradient_checkpointing=spec.settings.gradient_checkpointing,
            lora=spec.lora,
        )
        module = CausalLMLogprobs(model, spec.settings.logits_chunk_tokens)
        self.engine = DeepSpeedEngine(module, spec.settings, world, spec.total_optimizer_steps)
        loss = spec.loss
        self._surrogate: Surrogate | None = None
        if loss.surrogate is not None:
            self._surrogate = registry.build("surrogate", loss.surrogate)
        self._influences: InfluencePass | None = None
        if spec.credit is not None:
            method = registry.build("credit", spec.credit)
            tokens = 2 * spec.settings.micro_batch_tokens
            self._influences = InfluencePass(method, loss.temperature, tokens, spec.share_prompts)
        self._distillation: Distillation | None = None
        if spec.distillation is not None:
            chunk = spec.settings.logits_chunk_tokens
            self._distillation = Distillation(spec.distillation, chunk, self.engine.device)

    # signals

    def signals(self, shard: Batch) -> tuple[float, Signals]:
        """Seconds, and log-probs and entropies of the weights as they are now, on the shard's response axis."""
        start = time.perf_counter()
        progress.begin("forward passes")
        logprobs = np.zeros(int(shard.response_lengths.sum()), np.float32)
        entropies = np.zeros_like(logprobs)
        self.engine.module().eval()
        if self._influences is not None:
            signals = self._influences.signals(self.engine, shard)
            return time.perf_counter() - start, signals
        rows, tokens = np.arange(len(shard)), 2 * self.spec.settings.micro_batch_tokens
        micros = cut(shard, rows, tokens, self.spec.share_prompts)
        extra = self.engine.extra_passes(len(micros))
        with torch.no_grad():
            for micro in micros:
                lp, entropy = self._forward(micro.to(self.engine.device))
                logprobs[micro.packed_index] = lp.cpu().numpy()
                entropies[micro.packed_index] = entropy.cpu().numpy()
            for _ in range(extra):
                self._forward(nothing().to(self.engine.device))
        return time.perf_counter() - start, Signals(old_logprobs=logprobs, entropies=entropies)

    def score(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probs [L - 1] of each of the L tokens given those before it, at temperature 1, as a rollout engine's
        `score`: with adapters merged. Every rank must call it, with the same tokens: under ZeRO-3 they gather the weights
        together."""
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(self.engine.device)
        columns = torch.arange(len(ids) - 1, device=ids.device)
        module = self.engine.module().eval()
        with torch.no_grad(), merged_forward(module, self.spec.lora):
            logprobs, _ = self.engine.forward(ids[None], torch.zeros_like(columns), columns, ids[1:], 1.0)
        return logprobs.cpu().numpy()

    def _forward(self, micro: MicroBatch, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        return self.engine.forward(
            micro.input_ids,
            micro.rows,
            micro.columns,
            micro.targets,
            self.spec.loss.temperature,
            entropy_grad,
            tree=micro.layout,
        )

    # update

    def update(self, shard: Batch, minibatches: int, kl_coefficient: float) -> UpdateReport:
        """`minibatches` optimiser steps an epoch over this rank's part of the batch."""
        report = UpdateReport(Totals())
        assert shard.minibatch_ids is not None
        progress.begin("micro-batches")
        start, teaching = time.perf_counter(), self._teaching(shard)
        self._watch(shard, teaching, report.totals)
        for _ in range(self.spec.loss.epochs):
            for step in range(minibatches):
                chosen = np.flatnonzero((shard.minibatch_ids == step) & teaching)
                micros = cut(shard, chosen, self.spec.settings.micro_batch_tokens, self.spec.share_prompts)
                report.tokens += sum(m.real_tokens for m in micros)
                scale = self._correction_scale(shard, step)
                loss = partial(
                    self._loss, shard=shard, kl_coefficient=kl_coefficient, totals=report.totals, scale=scale
                )
                report.steps.append(self.engine.train_step(micros, nothing(), loss))
        report.seconds = time.perf_counter() - start
        return report

    def _correction_scale(self, shard: Batch, step: int) -> float:
        """What the importance weights of an optimizer step are multiplied by: 1 over their mean on all ranks, or 1."""
        correction = self.spec.loss.correction
        if not correction.normalize:
            return 1.0
        rows = shard.select(np.flatnonzero(shard.minibatch_ids == step))
        _packed(rows, "old_logprobs")
        mask = rows.pad("action_mask", False)
        weights = correction.weights(rows.pad("old_logprobs"), rows.pad("behavior_logprobs"), mask)
        totals = correction.totals(weights, mask).to(self.engine.device)
        return 1 / mean_weight(self.engine.summed(totals))

    def _teaching(self, shard: Batch) -> np.ndarray:
        """bool [B]: rows that can have a gradient. Where credit is 0 on every token and nothing else is in the loss, a
        row adds exactly 0 (denominators are in the weights already), so its passes are not made."""
        loss = self.spec.loss
        if loss.kl_in_loss or loss.entropy_coefficient > 0 or self._distillation is not None:
            return np.ones(len(shard), bool)
        advantages = _packed(shard, "advantages")
        return np.array([bool(advantages[shard.response_slice(i)].any()) for i in range(len(shard))], bool)

    def _watch(self, shard: Batch, teaching: np.ndarray, totals: Totals) -> None:
        """How far the rollout engine is from these weights, where no row of this rank teaches and so none is passed
        over: from the log-probs that are there, or else of one micro-batch."""
        idle = not teaching.any()
        if shard.old_logprobs is not None:
            if idle:
                old, behavior = (torch.from_numpy(x.copy()) for x in (shard.old_logprobs, shard.behavior_logprobs))
                self._count_mismatch(totals, old, behavior, torch.from_numpy(shard.action_mask.copy()))
            return
        rows = np.arange(len(shard) if idle else 0)
        micros = cut(shard, rows, self.spec.settings.micro_batch_tokens, self.spec.share_prompts)[:1]
        extra = self.engine.extra_passes(len(micros))
        self.engine.module().eval()
        with torch.no_grad():
            for micro in micros:
                moved = micro.to(self.engine.device)
                old = moved.spread(self._forward(moved)[0])
                behavior = moved.gather(shard.behavior_logprobs, self.engine.device)
                self._count_mismatch(totals, old, behavior, moved.mask)
            for _ in range(extra):
                self._forward(nothing().to(self.engine.device))

    def _count_mismatch(self, totals: Totals, old: Tensor, behavior: Tensor, mask: Tensor) -> None:
        count = float(mask.sum())
        for name, mean in mismatch_metrics(old, behavior, mask, self.spec.loss.mismatch_bound).items():
            if name == "mismatch/max":
                totals.maximum(name, mean)
            else:
                totals.add(name, mean * count, count)

    def _loss(
        self, micro: MicroBatch, shard: Batch, kl_coefficient: float, totals: Totals, scale: float = 1.0
    ) -> Tensor:
        if self._distillation is not None:
            return self._distillation.loss(self.engine, micro, shard, totals)
        loss, device = self.spec.loss, self.engine.device
        moved = micro.to(device)
        logprobs, entropies = self._forward(moved, loss.entropy_coefficient > 0)
        if not len(micro.packed_index):
            # Both outputs, as a real loss uses both: ZeRO-3 expects the same backward pass of all ranks.
            return (logprobs.sum() + entropies.sum()) * 0.0
        policy = moved.spread(logprobs)
        behavior = moved.gather(_packed(shard, "behavior_logprobs"), device)
        # With one optimiser step a batch nothing has changed yet: the old log-probs are these.
        old = policy.detach() if shard.old_logprobs is None else moved.gather(shard.old_logprobs, device)
        weights = moved.gather(_packed(shard, "loss_weights"), device)
        advantages = moved.gather(_packed(shard, "advantages"), device)
        segments = None if shard.segment_ids is None else moved.gather(shard.segment_ids, device)
        assert self._surrogate is not None
        out = self._surrogate(
            SurrogateInput(policy, old, advantages, moved.mask, moved.gather(shard.turn_ids, device), segments)
        )
        losses = out.losses_BT
        correction = None
        if loss.correction.method != "none":
            correction = loss.correction.weights(old, behavior, moved.mask)
            losses = losses * (correction * scale)
        if loss.kl_in_loss:
            reference = moved.gather(_packed(shard, "reference_logprobs"), device)
            kl = kl_losses(policy, reference, moved.mask, loss.kl_estimator, loss.kl_straight_through)
            shown = kl_estimates(policy.detach(), reference, "k3")[moved.mask]  # whatever the loss is made of
            totals.add("policy/kl_reference", float(shown.sum()), float(len(shown)))
            losses = losses + kl_coefficient * kl
        if loss.entropy_coefficient > 0:
            losses = losses - loss.entropy_coefficient * moved.spread(entropies)
        total = (losses * weights).sum()
        self._count(totals, moved, total, out.indicators, correction, (policy, old, behavior, entropies))
        return total

    def _count(
        self,
        totals: Totals,
        micro: MicroBatch,
        loss: Tensor,
        indicators: dict[str, Tensor],
        correction: Tensor | None,
        logprobs: tuple[Tensor, ...],
    ) -> None:
        _policy, old, behavior, entropies = (t.detach() for t in logprobs)
        mask, count = micro.mask, float(micro.mask.sum())
        totals.add("policy/loss", float(loss.detach()), 0.0)
        totals.add("policy/entropy", float(entropies.sum()), count)
        for name, values in indicators.items():
            shown = "ratio_mean" if name == "ratio" else name
            totals.add(f"policy/{shown}", float(values.detach()[mask].sum()), count)
            if name == "ratio":
                totals.maximum("policy/ratio_max", float(values.detach()[mask].max()))
        self._count_mismatch(totals, old, behavior, mask)
        if correction is not None:
            for name, mean in self.spec.loss.correction.metrics(correction, mask).items():
                totals.add(name, mean * count, count)

    # weights and checkpoints

    def weights(self, version: int) -> tuple[list, Any] | None:
        """Rank 0: the bundle's index, and a reference to its bytes in the object store unless a channel takes them. Other
        ranks only take part."""
        import ray

        named = merged_weights(self.engine.named_weights(), self.spec.lora)
        if self.world.rank:
            for _ in named:
                pass
            return None
        bundle = WeightBundle.pack(named, version, self._room)
        self._room = bundle.data  # the object store has its own copy
        return bundle.entries, None if self._channel else ray.put(bundle)

    def join_channel(self, address: ChannelAddress) -> None:
        """Rank 0: become the member that `send_weights` broadcasts from."""
        self._channel = WeightChannel(address, 0, self.engine.device if address.backend == "nccl" else "cpu")

    def send_weights(self) -> None:
        """Broadcast what `weights` packed last; every engine must be receiving."""
        assert self._channel is not None and self._room is not None
        send(self._channel, self._room)

    def save(self, folder: str) -> None:
        """Training state of this rank, and from rank 0 a model that `transformers.from_pretrained` loads."""
        target = Path(folder)
        self.engine.save(target / "policy")
        save_random_states(target / "policy", f"rank-{self.world.rank}")
        named = on_rank_0(merged_weights(self.engine.named_weights(), self.spec.lora), self.world)
        if self.world.rank == 0:
            spec = self.spec
            save_huggingface(spec.model, named, target / "model", spec.trust_remote_code, spec.chat_template)

    def load(self, folder: str) -> None:
        source = Path(folder) / "policy"
        self.engine.load(source)
        load_random_states(source, f"rank-{self.world.rank}")


def _packed(shard: Batch, name: str) -> np.ndarray:
    value = getattr(shard, name)
    if value is None:
        raise ValueError(f"{name}: missing in the shard, expected it to be made before the update")
    return value
