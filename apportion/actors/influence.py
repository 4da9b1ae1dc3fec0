"""Policy side of the signal `influences`: old log-probs and a credit method's own score of each token from one pass.

The credit method's `influence` hook is given, group by group, the final hidden states that predict the group's action
tokens and their probabilities on V*, the tokens that occur in the group. Those come from the output head's rows of V*
and each token's logsumexp, so beyond a chunk nothing has a vocabulary's width, and only one number a token leaves here.

A group that several ranks hold is scored by all ranks together: they tell each other its tokens, and the hook adds up
over them whatever is a sum over the group.

The hook's rewards are outcomes as scored, before shaping; credit finds the same in `CreditInput.scored_rewards_B`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from apportion.actors.microbatch import MicroBatch, cut, nothing
from apportion.actors.modules import CausalLMLogprobs, base_causal_lm
from apportion.algorithms.influence import GroupStates, group_vocabulary
from apportion.batch import Batch, Signals
from apportion.platform.errors import ConfigError

KEPT_PROBABILITIES = 2**23  # numbers; a group with fewer has its probabilities made once, not in each sum


class InfluenceMethod(Protocol):
    """A credit method that needs `influences`."""

    def influence(
        self,
        states: GroupStates,
        lengths_G: Tensor,
        rewards_G: Tensor,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """[N]: scores of the tokens of a group's responses. Where other ranks hold the rest of it, `sum_over_ranks` adds
        up a tensor over all ranks, each of which must call it as often; some may have no response of the group."""
        ...


class ForwardEngine(Protocol):
    device: torch.device

    def module(self) -> Any: ...
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...
    def extra_passes(self, own: int) -> int: ...
    def gather(self, value: Any) -> list[Any]: ...
    def summed(self, tensor: Tensor) -> Tensor: ...


@dataclass
class TokenStates:
    """What one pass says of n action tokens."""

    logprobs: Tensor  # [n] float32
    entropies: Tensor  # [n] float32
    normalizers: Tensor  # [n] float32, logsumexp of the logits
    hidden: Tensor  # [n, D], predicts the token


class OutputHead:
    """Logits on some tokens of the vocabulary. The rows of `token_ids` (increasing) are taken once; under ZeRO-3 every
    rank must make one at the same time. A head that is more than a matrix (adapted, quantised) is run whole instead.
    """

    def __init__(self, module: CausalLMLogprobs, token_ids: Tensor) -> None:
        self._module, self._token_ids = module, token_ids
        head = base_causal_lm(module.model).get_output_embeddings()
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        if not module.calls_head_by_chunk:
            with _gathered(head):
                self._weight = head.weight.detach()[token_ids]
                self._bias = None if head.bias is None else head.bias.detach()[token_ids]

    def logits(self, hidden: Tensor, vocabulary: Tensor, temperature: float) -> Tensor:
        """[n, D] and ids [v] (some of `token_ids`) to float32 [n, v]."""
        if self._weight is None:
            chunks = hidden.split(self._module.chunk)
            return torch.cat([self._module.logits(h, temperature)[:, vocabulary] for h in chunks])
        rows = torch.searchsorted(self._token_ids, vocabulary)
        bias = None if self._bias is None else self._bias[rows]
        return self._module.finished(nn.functional.linear(hidden, self._weight[rows], bias), temperature)


def _gathered(head: nn.Module) -> Any:
    sharded = [p for p in head.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


@dataclass
class InfluencePass:
    """Signals of a shard, with `influences` from `method`. All ranks must ask for them at once."""

    method: InfluenceMethod
    temperature: float
    micro_batch_tokens: int  # padded tokens of one forward pass
    share_prompts: bool = False

    @torch.no_grad()
    def signals(self, engine: ForwardEngine, shard: Batch) -> Signals:
        """`old_logprobs`, `entropies` and `influences` [R], 0 where the policy did not choose."""
        size = int(shard.response_lengths.sum())
        made = {name: np.zeros(size, np.float32) for name in ("old_logprobs", "entropies", "influences")}
        out = Signals(**made)
        shared = shared_groups(engine.gather(group_tokens(shard)))
        head = OutputHead(engine.module(), torch.cat([_action_ids(shard), *shared.values()]).unique().to(engine.device))
        passes = [(g, self._cut(shard, g)) for g in whole_groups(shard, self.micro_batch_tokens, set(shared))]
        # Asked before the first pass: in the middle of them, ranks with fewer would ask while others still gather.
        extra = engine.extra_passes(sum(len(micros) for _, micros in passes))
        for groups, micros in passes:
            self._score(engine, shard, groups, self._states(engine, micros), head, out)
        for _ in range(extra):
            self._states(engine, [nothing()])
        for group, vocabulary in shared.items():  # one after the other, in the same order on every rank
            rows = np.flatnonzero(shard.group_ids == group)
            micros = self._cut(shard, [rows]) or [nothing()]
            extra = engine.extra_passes(len(micros))
            states = self._states(engine, micros)
            for _ in range(extra):
                self._states(engine, [nothing()])
            self._score(engine, shard, [rows], states, head, out, vocabulary)
        return out

    def _cut(self, shard: Batch, groups: list[np.ndarray]) -> list[MicroBatch]:
        return cut(shard, np.concatenate(groups), self.micro_batch_tokens, self.share_prompts)

    def _score(
        self,
        engine: ForwardEngine,
        shard: Batch,
        groups: list[np.ndarray],
        given: tuple[TokenStates, np.ndarray],
        head: OutputHead,
        out: Signals,
        shared: Tensor | None = None,
    ) -> None:
        """Puts the signals of some groups' tokens in their places; `shared` is the V* of one that other ranks hold too."""
        assert out.old_logprobs is not None and out.entropies is not None and out.influences is not None
        states, packed = given
        out.old_logprobs[packed] = states.logprobs.cpu().numpy()
        out.entropies[packed] = states.entropies.cpu().numpy()
        place = np.full(len(out.influences), -1, np.int64)
        place[packed] = np.arange(len(packed))
        for rows in groups:
            tokens = np.concatenate([np.empty(0, np.int64), *(_action_places(shard, row) for row in rows)])
            if len(tokens) or shared is not None:
                chosen = torch.from_numpy(place[tokens]).to(engine.device)
                out.influences[tokens] = self._influence(engine, shard, rows, states, chosen, head, shared)

    def _states(self, engine: ForwardEngine, micros: list[MicroBatch]) -> tuple[TokenStates, np.ndarray]:
        """States of the action tokens of some micro-batches, and the place of each on the shard's R axis."""
        parts, packed = [], []
        for micro in micros:
            m = micro.to(engine.device)
            tree = (m.tree.positions, m.tree.visible) if m.tree else None
            parts.append(engine.forward(m.input_ids, m.rows, m.columns, m.targets, work=self._work(m), tree=tree))
            packed.append(micro.packed_index)
        return TokenStates(*(torch.cat(column) for column in zip(*parts, strict=True))), np.concatenate(packed)

    def _work(self, micro: MicroBatch) -> Callable[[CausalLMLogprobs, Tensor], tuple[Tensor, ...]]:
        return lambda module, picked: (*module.chosen(picked, micro.targets, self.temperature), picked)

    def _influence(
        self,
        engine: ForwardEngine,
        shard: Batch,
        rows: np.ndarray,
        states: TokenStates,
        chosen: Tensor,
        head: OutputHead,
        shared: Tensor | None,
    ) -> np.ndarray:
        """Scores of a group's action tokens, response after response; `chosen` are their places in `states`."""
        assert shard.rewards is not None
        ids = torch.cat([torch.empty(0, dtype=torch.int64), *(_action_ids(shard, row) for row in rows)])
        vocabulary, columns = group_vocabulary(
            ids.to(chosen.device), () if shared is None else [shared.to(chosen.device)]
        )
        hidden, normalizers = states.hidden[chosen], states.normalizers[chosen]

        def probabilities(tokens: slice) -> Tensor:
            logits = head.logits(hidden[tokens], vocabulary, self.temperature)
            return (logits - normalizers[tokens, None]).exp()

        small = len(ids) * len(vocabulary) <= KEPT_PROBABILITIES
        group = GroupStates(hidden, probabilities(slice(None)) if small else probabilities, columns, len(vocabulary))
        lengths = torch.tensor([len(_action_places(shard, row)) for row in rows], dtype=torch.int64)
        rewards = torch.from_numpy(shard.rewards[rows]).double()
        try:
            scores = self.method.influence(group, lengths, rewards, *(() if shared is None else (engine.summed,)))
        except ValueError as error:
            raise ConfigError(f"algorithm.credit: {error}") from error
        return scores.float().cpu().numpy()


def group_tokens(shard: Batch) -> dict[int, np.ndarray]:
    """The different action tokens of each group, int64."""
    rows = {group: np.flatnonzero(shard.group_ids == group) for group in set(shard.group_ids.tolist())}
    return {group: torch.cat([_action_ids(shard, row) for row in of]).unique().numpy() for group, of in rows.items()}


def shared_groups(held: list[dict[int, np.ndarray]]) -> dict[int, Tensor]:
    """V* of each group that several ranks hold, by its number, from the `group_tokens` of every rank."""
    counts = Counter(group for rank in held for group in rank)
    shared = sorted(group for group, ranks in counts.items() if ranks > 1)
    return {g: torch.from_numpy(np.unique(np.concatenate([r[g] for r in held if g in r]))) for g in shared}


def whole_groups(shard: Batch, tokens: int, without: Collection[int] = ()) -> Iterator[list[np.ndarray]]:
    """Groups, each as the rows of its trajectories, so many at a time that they have about `tokens` tokens.

    Their hidden states exist together, so a pass is filled and memory does not grow with the batch.
    """
    lengths = shard.prompt_lengths + shard.response_lengths
    taken: list[np.ndarray] = []
    total = 0
    for group in dict.fromkeys(g for g in shard.group_ids.tolist() if g not in without):
        rows = np.flatnonzero(shard.group_ids == group)
        size = int(lengths[rows].sum())
        if taken and total + size > tokens:
            yield taken
            taken, total = [], 0
        taken.append(rows)
        total += size
    if taken:
        yield taken


def _action_places(shard: Batch, row: int) -> np.ndarray:
    """Places of a trajectory's action tokens on the R axis."""
    span = shard.response_slice(row)
    return span.start + np.flatnonzero(shard.action_mask[span])


def _action_ids(shard: Batch, row: int | None = None) -> Tensor:
    """Action-token ids, int64: of one trajectory, or of all."""
    rows = range(len(shard)) if row is None else [row]
    parts = []
    for index in rows:
        response = shard.sequence(index)[shard.prompt_lengths[index] :]
        parts.append(response[shard.action_mask[shard.response_slice(index)]])
    return torch.from_numpy(np.concatenate([*parts, np.empty(0, np.int32)]).astype(np.int64))
