"""The one place that sees a whole batch: selects, cuts it into shards, and credits every token.

It reads packed batches from the object store and leaves packed shards there; the driver sees references and reports only.
Every denominator of the step is made here, so that ranks only add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.algorithms import registry
from apportion.algorithms.credit.gae import explained_variance
from apportion.algorithms.interface import Credit, CreditInput, judged_method
from apportion.algorithms.kl import kl_estimates, kl_rewards, with_kl_rewards
from apportion.algorithms.reductions import TokenMean
from apportion.algorithms.statistics import at_last_token
from apportion.algorithms.steps import token_starts
from apportion.batch import Batch, Marks, Signals, Totals
from apportion.data.metrics import accuracy, average_at_k, mean_pass_at_k
from apportion.data.prompts import load_tokenizer
from apportion.platform.process import ActorBase


@dataclass
class CreditSpec:
    credit: dict[str, Any]
    reduction: dict[str, Any]
    shaping: list[dict[str, Any]]
    selection: list[dict[str, Any]]
    kl_in_reward: bool
    kl_estimator: str
    tokenizer: str
    keep_groups_together: bool = False
    trust_remote_code: bool = False  # of the tokenizer
    # Whether an episode that a limit cut would have gone on, as one in an environment does. A response without one is
    # rewarded as it stands: what the critic expects of the next token would come on top of a reward already given.
    continues: bool = False
    # Where the KL in the reward is credited: `token`, or `response` where one ratio covers more than the advantage may
    # differ over (`apportion.conf.parts.kl_level`).
    kl_level: str = "token"


@dataclass
class AdmitReport:
    totals: Totals
    groups_kept: int
    groups_dropped: int


@dataclass
class CutReport:
    trajectories: int
    tokens: int
    minibatches: int  # optimiser steps an epoch that the batch is cut into
    groups_surplus: int = 0  # admitted beyond what a step takes, and left out


@dataclass
class CreditReport:
    metrics: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class EvaluationReport:
    metrics: dict[str, float]
    answers: list[dict[str, Any]]  # prompt_id, text, reward of the first greedy answers


class CreditWorker(ActorBase):
    def __init__(self, spec: CreditSpec) -> None:
        self.spec = spec
        self.credit_method = registry.build("credit", spec.credit)
        self.reduction = registry.build("reduction", spec.reduction)
        self.shaping = [registry.build("shaping", s) for s in spec.shaping]
        self.selection = [registry.build("selection", s) for s in spec.selection]
        self._tokenizer: Any = None

    def admit(self, scored: Batch, *marks: Marks) -> tuple[AdmitReport, Batch]:
        """Add what judges marked, leave out trajectories without a reward, then those that selection does.

        Selection compares what tokens earn by the vote, where the credit method has one.
        """
        scored = Marks.apply(scored, marks)
        assert scored.rewards is not None and scored.sample_mask is not None
        totals = rollout_totals(scored)
        valid = np.flatnonzero(scored.sample_mask)
        kept = scored.select(valid)
        before = len(set(kept.group_ids.tolist()))
        for part in self.selection:  # one after the other: a group is judged by what is left of it
            if len(kept):
                kept = kept.select(np.flatnonzero(part(self._selection_input(kept)).numpy()))
        after = len(set(kept.group_ids.tolist()))
        return AdmitReport(totals, after, before - after), kept

    def _selection_input(self, batch: Batch) -> CreditInput:
        inputs = credit_input(batch)
        if "critiques" not in self.credit_method.needs:
            return inputs
        return replace(inputs, token_rewards_BT=judged_method(self.credit_method).token_rewards(inputs))

    def cut(self, groups: int, shards: int, minibatches: int, *admitted: Batch) -> tuple:
        """(CutReport, shard, ...): at most `groups` groups, assigned to optimiser steps, dealt to ranks by tokens."""
        batch = joined([b for b in admitted if len(b)])
        admitted_groups = sorted(set(batch.group_ids.tolist()))
        chosen = admitted_groups[:groups]
        batch = batch.select(np.flatnonzero(np.isin(batch.group_ids, chosen)))
        steps = min(minibatches, len(chosen))
        of_group = {g: step for step, part in enumerate(np.array_split(chosen, steps)) for g in part.tolist()}
        ids = np.array([of_group[g] for g in batch.group_ids.tolist()], np.int32)
        batch = replace(batch, minibatch_ids=ids)
        parts = deal(batch, shards, self.spec.keep_groups_together)
        report = CutReport(len(batch), batch.tokens, steps, len(admitted_groups) - len(chosen))
        return (report, *(batch.select(part) for part in parts))

    def credit(self, shards: int, kl_coefficient: float, show: int, *parts: Any) -> tuple:
        """(CreditReport, shard, ...): `parts` are the shards, then the signals of each pass, shard by shard."""
        given: Sequence[Batch] = parts[:shards]
        signalled = list(given)
        for index, signal in enumerate(parts[shards:]):
            assert isinstance(signal, Signals)
            signalled[index % shards] = signal.apply(signalled[index % shards])
        batch = Batch.concat([s for s in signalled if len(s)])
        credited, metrics = self.assign(batch, kl_coefficient)
        samples = self._shown(credited, show)
        credited = replace(credited, critiques=None)  # for people; the ranks have no use for it
        out, start = [], 0
        for shard in signalled:
            out.append(credited.select(np.arange(start, start + len(shard))))  # none at all has every field too
            start += len(shard)
        return (CreditReport(metrics, samples), *out)

    def assign(self, batch: Batch, kl_coefficient: float) -> tuple[Batch, dict[str, float]]:
        """Advantages, returns and loss weights of a whole batch."""
        inputs = credit_input(batch)
        if inputs.bootstrap_values_B is not None and not self.spec.continues:
            inputs = replace(inputs, bootstrap_values_B=torch.zeros_like(inputs.bootstrap_values_B))
        scored = inputs.rewards_B
        for part in self.shaping:
            rewards, token_rewards = part(inputs, torch.from_numpy(batch.response_lengths.copy()))
            inputs = replace(inputs, rewards_B=rewards, token_rewards_BT=token_rewards)
        if self.shaping:
            inputs = replace(inputs, scored_rewards_B=scored)
        metrics: dict[str, float] = {}
        if inputs.old_logprobs_BT is not None and inputs.reference_logprobs_BT is not None:
            kl = kl_estimates(inputs.old_logprobs_BT, inputs.reference_logprobs_BT, "k3")[inputs.mask_BT]
            metrics["policy/kl_reference"] = float(kl.mean()) if kl.numel() else 0.0
        if self.spec.kl_in_reward:
            inputs = with_kl_rewards(inputs, self._kl_reward(inputs, kl_coefficient), self.spec.kl_level)
        if "token_ends" in self.credit_method.needs:
            inputs = self._with_token_ends(inputs, batch)
        result: Credit = self.credit_method(inputs)
        metrics |= {n if "/" in n else f"credit/{n}": v for n, v in result.metrics.items()}
        if result.returns_BT is not None and inputs.values_BT is not None:
            explained = explained_variance(inputs.values_BT, result.returns_BT, inputs.mask_BT)
            metrics["critic/explained_variance"] = explained
        return self._with_credit(batch, result, inputs.mask_BT), metrics

    def _with_token_ends(self, inputs: CreditInput, batch: Batch) -> CreditInput:
        """Texts as the sampled ids spell them, and where in them each token ends."""
        ends, texts = torch.zeros(inputs.mask_BT.shape, dtype=torch.int64), []
        for row in range(len(batch)):
            response = batch.sequence(row)[batch.prompt_lengths[row] :].tolist()
            text, starts = token_starts(response, self._decode)
            ends[row, : len(starts)] = torch.tensor([*starts[1:], len(text)][: len(starts)], dtype=torch.int64)
            texts.append(text)
        return replace(inputs, texts=texts, token_ends_BT=ends)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _kl_reward(self, inputs: CreditInput, coefficient: float) -> Tensor:
        if inputs.old_logprobs_BT is None or inputs.reference_logprobs_BT is None:
            raise ValueError("kl.place=reward: got no old or reference log-probs, expected both signals")
        return kl_rewards(
            inputs.old_logprobs_BT, inputs.reference_logprobs_BT, inputs.mask_BT, coefficient, self.spec.kl_estimator
        )

    def _with_credit(self, batch: Batch, result: Credit, mask: Tensor) -> Batch:
        assert batch.minibatch_ids is not None
        weights, value_weights = torch.zeros(mask.shape), torch.zeros(mask.shape)
        steps = torch.from_numpy(batch.minibatch_ids.copy())
        for step in steps.unique():
            rows = steps == step
            weights[rows] = self.reduction(mask[rows]).float()
            value_weights[rows] = TokenMean()(mask[rows]).float()
        packed = {"advantages": result.advantages_BT, "loss_weights": weights, "value_weights": value_weights}
        if result.returns_BT is not None:
            packed["returns"] = result.returns_BT
        fields: dict[str, Any] = {name: batch.unpad(value.float()) for name, value in packed.items()}
        segments = None if result.segment_ids_BT is None else batch.unpad(result.segment_ids_BT.int())
        return replace(batch, **fields, segment_ids=segments)

    def _shown(self, batch: Batch, count: int) -> list[dict[str, Any]]:
        """Whole trajectories with the credit of each token, to be read by a person."""
        return [self._sample(batch, index) for index in range(min(count, len(batch)))]

    def _sample(self, batch: Batch, index: int) -> dict[str, Any]:
        assert batch.rewards is not None and batch.advantages is not None
        span = batch.response_slice(index)
        prompt = batch.sequence(index)[: batch.prompt_lengths[index]]
        response = batch.sequence(index)[batch.prompt_lengths[index] :]
        return {
            "prompt_id": batch.prompt_ids[index],
            "sample": int(batch.sample_indices[index]),
            "policy_version": int(batch.policy_versions[index]),
            "prompt": self.tokenizer.decode(prompt),
            "response": batch.texts[index],
            "reward": float(batch.rewards[index]),
            "finish_reason": batch.finish_reasons[index],
            "tokens": [self.tokenizer.decode([t]) for t in response.tolist()],
            "advantages": [round(float(a), 6) for a in batch.advantages[span]],
            **self._judgement(batch, index),
        }

    def _judgement(self, batch: Batch, index: int) -> dict[str, Any]:
        """Why a token was penalised: the steps as the judge saw them, each critique, and the vote. Steps from 0."""
        if batch.critiques is None or batch.step_ids is None or batch.wrong_steps is None:
            return {}
        response = batch.sequence(index)[batch.prompt_lengths[index] :]
        step_ids = batch.step_ids[batch.response_slice(index)]
        steps = range(int(step_ids.max(initial=-1)) + 1)
        return {
            "steps": [self.tokenizer.decode(response[step_ids == step]) for step in steps],
            "step_ids": step_ids.tolist(),
            "wrong_steps": list(batch.wrong_steps[index]),
            "critiques": [vars(critique) for critique in batch.critiques[index]],
        }

    def prepare(self) -> None:
        """Read the tokenizer while other actors load, rather than in the first step."""
        _ = self.tokenizer

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.spec.tokenizer, None, self.spec.trust_remote_code)
        return self._tokenizer

    def evaluate(self, correct_at: float, ks: list[int], show: int, greedy: list[Batch], sampled: list[Batch]) -> Any:
        """Accuracy over held-out prompts. Lists of references must be passed resolved; see `evaluate_refs`."""
        metrics: dict[str, float] = {}
        answers: list[dict[str, Any]] = []
        if greedy:
            batch = joined(greedy)
            assert batch.rewards is not None
            metrics["eval/greedy_accuracy"] = accuracy(batch.rewards, correct_at)
            metrics["eval/mean_reward"] = float(np.nanmean(batch.rewards))
            metrics["eval/response_tokens_mean"] = float(action_lengths(batch).mean())
            answers = [
                {"prompt_id": batch.prompt_ids[i], "answer": batch.texts[i], "reward": float(batch.rewards[i])}
                for i in range(min(show, len(batch)))
            ]
        if sampled:
            batch = joined(sampled)
            assert batch.rewards is not None
            rows: dict[str, list[float]] = {}
            for prompt_id, reward in zip(batch.prompt_ids, batch.rewards.tolist(), strict=True):
                rows.setdefault(prompt_id, []).append(reward)
            metrics["eval/avg_at_k"] = average_at_k(list(rows.values()), correct_at)
            for k in ks:
                metrics[f"eval/pass_at_{k}"] = mean_pass_at_k(list(rows.values()), k, correct_at)
        return EvaluationReport(metrics, answers)

    def evaluate_refs(self, correct_at: float, ks: list[int], show: int, greedy_count: int, *scored: Batch) -> Any:
        return self.evaluate(correct_at, ks, show, list(scored[:greedy_count]), list(scored[greedy_count:]))


def credit_input(batch: Batch) -> CreditInput:
    """A packed batch as padded tensors; an outcome stands at the last action token.

    Numbers are float64, so that a small KL is not lost beside a large reward.
    """
    assert batch.rewards is not None

    def padded(name: str) -> Tensor | None:
        return None if getattr(batch, name) is None else batch.pad(name).double()

    mask = batch.pad("action_mask", False)
    rewards = torch.from_numpy(batch.rewards).double()
    dense = padded("token_rewards")
    starts, width = batch.token_offsets[:-1] + batch.prompt_lengths, mask.shape[1]
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, (start, length) in enumerate(zip(starts, batch.response_lengths, strict=True)):
        tokens[row, :length] = torch.from_numpy(batch.token_ids[start : start + length].astype(np.int64))
    bootstrap = None if batch.bootstrap_values is None else torch.from_numpy(batch.bootstrap_values.copy()).double()
    return CreditInput(
        mask_BT=mask,
        group_ids_B=torch.from_numpy(batch.group_ids.copy()),
        rewards_B=rewards,
        token_rewards_BT=at_last_token(rewards, mask) if dense is None else dense,
        turn_ids_BT=batch.pad("turn_ids", -1),
        terminated_B=torch.from_numpy(batch.terminated.copy()),
        token_ids_BT=tokens,
        old_logprobs_BT=padded("old_logprobs"),
        reference_logprobs_BT=padded("reference_logprobs"),
        values_BT=padded("values"),
        bootstrap_values_B=bootstrap,
        entropies_BT=padded("entropies"),
        influences_BT=padded("influences"),
        step_ids_BT=None if batch.step_ids is None else batch.pad("step_ids", -1),
        wrong_steps=batch.wrong_steps,
        texts=batch.texts,
    )


def joined(scored: Sequence[Batch]) -> Batch:
    """One batch of several that were scored apart. Lists as rewards make only the batch dense that they came in, so
    where any is, plain rewards of the others stand at the last action token; NaN on every token where there is none.
    """
    if all(batch.token_rewards is None for batch in scored):
        return Batch.concat(scored)
    return Batch.concat([b if b.token_rewards is not None else _with_plain_on_tokens(b) for b in scored])


def _with_plain_on_tokens(batch: Batch) -> Batch:
    """`rewards` stay as they are: one of a response without action tokens has no token to stand at."""
    assert batch.rewards is not None
    rewards = torch.from_numpy(batch.rewards)
    placed = at_last_token(rewards, batch.pad("action_mask", False))
    placed = torch.where(rewards.isnan()[:, None], torch.nan, placed)
    return replace(batch, token_rewards=batch.unpad(placed.float()))


def action_lengths(batch: Batch) -> np.ndarray:
    """[B] int64, tokens of each response that the policy wrote: none of an environment's."""
    rows = range(len(batch))
    return np.array([batch.action_mask[batch.response_slice(i)].sum() for i in rows], np.int64)


def rollout_totals(scored: Batch) -> Totals:
    """What the sampled trajectories look like, before anything is left out."""
    assert scored.rewards is not None and scored.sample_mask is not None
    totals, count = Totals(), len(scored)
    known = scored.rewards[scored.sample_mask]
    totals.add("reward/mean", known.sum(), len(known))
    totals.add("reward/square", (known**2).sum(), len(known))
    lengths = action_lengths(scored)
    totals.add("rollout/response_tokens_mean", lengths.sum(), count)
    totals.add("rollout/truncated_share", scored.finish_reasons.count("length"), count)
    turns = [int(scored.turn_ids[scored.response_slice(i)].max(initial=-1)) + 1 for i in range(count)]
    totals.add("rollout/turns_mean", sum(turns), count)
    totals.maximum("rollout/response_tokens_max", lengths.max(initial=0))
    return totals


def deal(batch: Batch, shards: int, together: bool) -> list[np.ndarray]:
    """Indices of each rank's trajectories: each optimiser step's are dealt so that ranks have about equal tokens.

    The longest goes first, to the rank with the fewest tokens so far. With `together` groups stay whole, except those
    with more than one rank's even share of the tokens.
    """
    assert batch.minibatch_ids is not None
    lengths = (batch.prompt_lengths + batch.response_lengths).astype(np.int64)
    parts: list[list[int]] = [[] for _ in range(shards)]
    for step in np.unique(batch.minibatch_ids):
        rows = np.flatnonzero(batch.minibatch_ids == step)
        keys = batch.group_ids[rows] if together else rows
        units = [rows[keys == key] for key in dict.fromkeys(keys.tolist())]
        share = lengths[rows].sum() / shards
        units = [u for unit in units for u in ([unit] if lengths[unit].sum() <= share else np.split(unit, len(unit)))]
        units.sort(key=lambda unit: -int(lengths[unit].sum()))
        load = np.zeros(shards, np.int64)
        for unit in units:
            rank = int(np.argmin(load))
            parts[rank] += unit.tolist()
            load[rank] += lengths[unit].sum()
    return [np.array(sorted(part), np.int64) for part in parts]
