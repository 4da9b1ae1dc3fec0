"""The actors' own programs in one process: the credit worker, the policy and the critic of a run, on plain torch.

Only what starts processes and moves data is left out (Ray, vLLM, DeepSpeed). Selection, credit, denominators, losses
and influences are made by the very methods that the actors call, with the shipped recipes of `conf/algorithm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

import apportion.conf
from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.actors.critic import CriticSpec, CriticWorker
from apportion.actors.distillation import Distillation
from apportion.actors.engine import OptimizerStep
from apportion.actors.engine_settings import EngineSettings
from apportion.actors.influence import InfluencePass
from apportion.actors.modules import CausalLMLogprobs, ValueModel
from apportion.actors.policy import LossSpec, PolicySpec, PolicyWorker
from apportion.algorithms import registry
from apportion.algorithms.correction import ImportanceCorrection
from apportion.batch import Batch, Marks, Signals, Trajectory
from apportion.conf.parts import kl_level
from benchmarks.credit.model import Ending, TinyLM, generate

RECIPES = Path(apportion.conf.__file__ or "").parent / "algorithm"


def recipe(name: str, **changes: Any) -> dict[str, Any]:
    """A shipped recipe; a mapping in `changes` is merged into its part, anything else replaces it."""
    parts: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(parts.get(key), dict)
        parts[key] = {**parts[key], **value} if both else value
    return parts


@dataclass
class Settings(EngineSettings):
    """An engine's settings for models this small: everything in one micro-batch."""

    learning_rate: float = 1e-3
    min_lr_ratio: float = 1.0
    micro_batch_tokens: int = 2**16
    logits_chunk_tokens: int = 2**16


class PlainEngine:
    """AdamW on one module: `apportion.actors.engine.TrainingEngine` without DeepSpeed."""

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self.device, self.optimizer_steps = torch.device("cpu"), 0
        self._module, self._settings = module, settings
        self._optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            foreach=True,
        )

    def module(self) -> nn.Module:
        return self._module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def extra_passes(self, own: int) -> int:
        return 0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def summed(self, tensor: Tensor) -> Tensor:
        return tensor

    def train_step(self, micro_batches: Sequence[Any], empty: Any, loss: Callable[[Any], Tensor]) -> OptimizerStep:
        self._module.train()
        self._optimizer.zero_grad()
        for micro in micro_batches:
            loss(micro).backward()
        norm = nn.utils.clip_grad_norm_(self._module.parameters(), self._settings.max_grad_norm)
        if micro_batches:
            self._optimizer.step()
        self.optimizer_steps += 1
        return OptimizerStep(float(norm), self._settings.learning_rate)


class Policy(PolicyWorker):
    """A policy rank on a model that is in memory."""

    def __init__(
        self, model: TinyLM, algorithm: dict[str, Any], settings: Settings, teachers: Sequence[TinyLM]
    ) -> None:
        kl = algorithm.get("kl", {"place": "none", "estimator": "k3"})
        loss = LossSpec(
            surrogate=algorithm["surrogate"],
            temperature=1.0,
            kl_in_loss=kl["place"] == "loss",
            kl_estimator=kl["estimator"],
            entropy_coefficient=algorithm.get("entropy_coefficient", 0.0),
            correction=ImportanceCorrection("none"),
            mismatch_bound=0.5,
            epochs=algorithm.get("epochs", 1),
        )
        super().__init__(PolicySpec("", "float32", "sdpa", False, None, settings, loss, 1))
        self.engine: Any = PlainEngine(CausalLMLogprobs(model, settings.logits_chunk_tokens), settings)
        self._surrogate = registry.build("surrogate", loss.surrogate) if loss.surrogate is not None else None
        method = registry.build("credit", algorithm["credit"])
        influences = "influences" in method.needs
        self._influences = InfluencePass(method, 1.0, 2 * settings.micro_batch_tokens) if influences else None
        part = algorithm.get("distillation")
        self._distillation = None if part is None else Teachers(part, teachers, settings.logits_chunk_tokens)


class Teachers(Distillation):
    """Frozen models that are in memory."""

    def __init__(self, part: dict[str, Any], teachers: Sequence[TinyLM], chunk: int) -> None:
        self.part = registry.build("distillation", part)
        self._teachers = [CausalLMLogprobs(model, chunk).eval().requires_grad_(False) for model in teachers]


class Critic(CriticWorker):
    """A critic rank on a copy of a model that is in memory, with a value head of zeros."""

    def __init__(self, model: TinyLM, settings: Settings, value_clip: float | None, epochs: int) -> None:
        super().__init__(CriticSpec("", "float32", "sdpa", False, settings, value_clip, epochs, 1))
        copy = deepcopy(model)
        copy.lm_head.weight.requires_grad_(False)
        self.engine: Any = PlainEngine(ValueModel(copy), settings)


@dataclass
class Learner:
    """One run: a policy that starts from a copy of `start`, and whatever else its algorithm needs."""

    start: TinyLM
    algorithm: dict[str, Any]
    policy_settings: Settings
    critic_settings: Settings = field(default_factory=Settings)
    teachers: Sequence[TinyLM] = ()
    value_clip: float | None = 0.2

    def __post_init__(self) -> None:
        parts, kl = self.algorithm, self.algorithm.get("kl", {"place": "none", "coefficient": 0.0, "estimator": "k3"})
        self.model = deepcopy(self.start)
        self.policy = Policy(self.model, parts, self.policy_settings, self.teachers)
        self.credit = CreditWorker(
            CreditSpec(
                credit=parts["credit"],
                reduction=parts["reduction"],
                shaping=parts.get("shaping", []),
                selection=parts.get("selection", []),
                kl_in_reward=kl["place"] == "reward",
                kl_estimator=kl["estimator"],
                tokenizer="",
                kl_level=kl_level(parts["credit"], parts["surrogate"]),
            )
        )
        self.kl_coefficient = kl["coefficient"]
        self.minibatches = parts.get("updates_per_batch", 1)
        needs = set(self.credit.credit_method.needs)
        self._reference = kl["place"] != "none" or "reference_logprobs" in needs
        several = self.minibatches * parts.get("epochs", 1) > 1
        self._old = several or self._reference or bool(needs & {"old_logprobs", "influences"})
        if "values" in needs:
            self.critic = Critic(self.start, self.critic_settings, self.value_clip, parts.get("epochs", 1))
        self._values = "values" in needs

    def step(self, scored: Batch, *marks: Marks) -> dict[str, float]:
        """One step of training on sampled trajectories with rewards, as the trainer takes it."""
        assert scored.rewards is not None
        scored = replace(scored, sample_mask=np.isfinite(scored.rewards))
        _, kept = self.credit.admit(scored, *marks)
        if not len(kept):
            return {}
        _, shard = self.credit.cut(len(set(kept.group_ids.tolist())), 1, self.minibatches, kept)
        minibatches = int(shard.minibatch_ids.max()) + 1
        signals = [self.policy.signals(shard)[1]] if self._old else []
        if self._reference:
            signals.append(Signals(reference_logprobs=response_logprobs(self.start, shard)))
        if self._values:
            signals.append(self.critic.signals(shard)[1])
        report, shard = self.credit.credit(1, self.kl_coefficient, 0, shard, *signals)
        if self._values:
            self.critic.update(shard, minibatches)
        update = self.policy.update(shard, minibatches, self.kl_coefficient)
        return report.metrics | update.totals.means()


@torch.no_grad()
def response_logprobs(model: TinyLM, batch: Batch) -> np.ndarray:
    """[R] log-probs of a frozen model, 0 where the policy did not choose."""
    from apportion.actors.microbatch import cut

    out = np.zeros(int(batch.response_lengths.sum()), np.float32)
    module = CausalLMLogprobs(model, 2**16).eval()
    for micro in cut(batch, np.arange(len(batch)), 2**17):
        out[micro.packed_index] = module(micro.input_ids, micro.rows, micro.columns, micro.targets)[0].numpy()
    return out


def rollout(
    model: TinyLM,
    prompts: Tensor,
    group: int,
    ending: Ending,
    generator: torch.Generator,
    spell: Callable[[Sequence[int]], str] = lambda ids: "",
) -> Batch:
    """`group` responses to each of the prompts [b, P]; a response without the stop token was cut by the limit."""
    repeated = prompts.repeat_interleave(group, 0)
    ids, logprobs, lengths = (x.numpy() for x in generate(model, repeated, ending, generator))
    start = repeated.numpy()
    trajectories = []
    for row, length in enumerate(lengths.tolist()):
        ended = bool(ids[row, length - 1] == ending.stop)
        trajectories.append(
            Trajectory(
                prompt_id=str(row // group),
                group_id=row // group,
                sample_index=row % group,
                token_ids=np.concatenate([start[row], ids[row, :length]]).astype(np.int32),
                prompt_length=start.shape[1],
                action_mask=np.ones(length, bool),
                turn_ids=np.zeros(length, np.int32),
                behavior_logprobs=logprobs[row, :length],
                policy_version=0,
                finish_reason="stop" if ended else "length",
                text=spell(ids[row, :length].tolist()),
                terminated=ended,
            )
        )
    return Batch.from_trajectories(trajectories)


def responses(batch: Batch) -> list[list[int]]:
    """The ids of each response."""
    return [batch.sequence(i)[batch.prompt_lengths[i] :].tolist() for i in range(len(batch))]


def supervise(
    model: TinyLM, draw: Callable[[int], tuple[Tensor, Tensor]], steps: int, settings: Settings
) -> list[float]:
    """The supervised phase: next-token losses on `draw(step)`'s ids [b, S] where its mask [b, S] is True.

    The rate falls to a tenth by a cosine. Returns the losses.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps), settings.learning_rate / 10)
    losses = []
    for step in range(steps):
        ids, mask = draw(step)
        logits = model.logits(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits[mask[:, 1:]], ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses
