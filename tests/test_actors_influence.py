"""`influences` on a policy rank against the double loop over a small real model, whatever the shard looks like."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.actors.influence import InfluencePass, whole_groups
from apportion.actors.modules import CausalLMLogprobs
from apportion.algorithms.registry import build
from apportion.batch import Batch, Trajectory
from apportion.cli import compose_config, to_config
from apportion.plan import make_plan
from apportion.platform.errors import ConfigError

VOCABULARY = 997
THR = {"name": "hidden_reward", "p": 0.2}


class Engine:
    """The policy's engine without DeepSpeed."""

    def __init__(self, module):
        self._module, self.device, self.passes = module, torch.device("cpu"), 0

    def module(self):
        return self._module

    def extra_passes(self, own):
        return 0

    def gather(self, value):
        return [value]

    def forward(self, *args, **kwargs):
        self.passes += 1
        return self._module(*args, **kwargs)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(6 if parameter.dim() > 1 else 1)  # distributions far from uniform
    return model


def trajectory(rng, group, index, response, environment=()):
    prompt = 3 + group
    mask = np.ones(response, bool)
    mask[list(environment)] = False
    return Trajectory(
        prompt_id=f"p{group}", group_id=group, sample_index=index,
        token_ids=rng.integers(0, VOCABULARY, prompt + response).astype(np.int32), prompt_length=prompt,
        action_mask=mask, turn_ids=np.where(mask, 0, -1).astype(np.int32),
        behavior_logprobs=np.zeros(response, np.float32), policy_version=0, finish_reason="stop", text="",
    )  # fmt: skip


@pytest.fixture
def shard():
    """Two groups, interleaved; a response with an environment's tokens inside, one of a single token, one of none."""
    rng = np.random.default_rng(1)
    rows = [
        trajectory(rng, 0, 0, 5), trajectory(rng, 1, 0, 4), trajectory(rng, 0, 1, 7, environment=(2, 3)),
        trajectory(rng, 1, 1, 1), trajectory(rng, 0, 2, 3), trajectory(rng, 1, 2, 0), trajectory(rng, 0, 3, 6),
    ]  # fmt: skip
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    return replace(Batch.from_trajectories(rows), rewards=rewards, sample_mask=np.ones(len(rows), bool))


def influences(model, shard, spec=None, temperature=1.0, tokens=64, chunk=4, share_prompts=False):
    engine = Engine(CausalLMLogprobs(model, chunk))
    signals = InfluencePass(build("credit", spec or THR), temperature, tokens, share_prompts).signals(engine, shard)
    return signals, engine


def action_states(model, shard, row, temperature):
    """(places on the R axis, token ids, hidden [n, D], probabilities [n, V]) of one trajectory's action tokens."""
    span = shard.response_slice(row)
    steps = np.flatnonzero(shard.action_mask[span])
    ids = torch.from_numpy(shard.sequence(row).astype(np.int64))
    columns = steps + int(shard.prompt_lengths[row]) - 1
    hidden = model.base_model(input_ids=ids[None]).last_hidden_state[0, columns].double()
    logits = hidden @ model.lm_head.weight.double().T / temperature
    return span.start + steps, ids[columns + 1], hidden, logits.softmax(-1)


def double_loop(model, shard, normalised, temperature=1.0):
    """sum over right responses i of w_i sum_k <g_ik, g_jk'> <h_ik, h_jk'>, vectors over V* of the group."""
    out = np.zeros(int(shard.response_lengths.sum()))
    for group in set(shard.group_ids.tolist()):
        rows = [row for row in range(len(shard)) if shard.group_ids[row] == group]
        states = {row: action_states(model, shard, row, temperature) for row in rows}
        own = torch.cat([states[row][1] for row in rows]).unique()
        for j in rows:
            places, ids, hidden, probabilities = states[j]
            for place, token, h, p in zip(places, ids, hidden, probabilities, strict=True):
                g = ((own == token).double() - p[own]).numpy()
                for i in rows:
                    if shard.rewards[i] == 1:
                        _, ids_i, hidden_i, probabilities_i = states[i]
                        weight = 1 / len(ids_i) if normalised else 1.0
                        for token_i, h_i, p_i in zip(ids_i, hidden_i, probabilities_i, strict=True):
                            g_i = ((own == token_i).double() - p_i[own]).numpy()
                            out[place] += weight * float(g_i @ g) * float(h_i @ h)
    return out


@pytest.mark.parametrize(("variant", "temperature"), [("thr", 1.0), ("nthr", 1.0), ("thr", 0.7)])
def test_the_signal_is_the_double_loop_over_right_responses(model, shard, variant, temperature):
    spec = {"name": "hidden_reward", "variant": variant}
    got = influences(model, shard, spec, temperature)[0].influences
    expected = double_loop(model, shard, variant == "thr", temperature)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-4)
    assert not got[~shard.action_mask].any()


@pytest.mark.parametrize(("tokens", "chunk", "passes"), [(8, 1, 7), (40, 3, 2), (10_000, 512, 1)])
def test_how_a_shard_is_cut_into_passes_does_not_matter(model, shard, tokens, chunk, passes):
    got, engine = influences(model, shard, tokens=tokens, chunk=chunk)
    whole, _ = influences(model, shard)
    np.testing.assert_allclose(got.influences, whole.influences, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.old_logprobs, whole.old_logprobs, rtol=1e-5, atol=1e-6)
    assert engine.passes == passes


def test_responses_behind_one_copy_of_their_prompt_have_the_same_influences(model):
    rng = np.random.default_rng(2)
    rows = [trajectory(rng, 0, index, 4 + index) for index in range(3)]
    for row in rows[1:]:
        row.token_ids[:3] = rows[0].token_ids[:3]
    shard = replace(Batch.from_trajectories(rows), rewards=np.array([1.0, 0.0, 1.0]))
    plain, _ = influences(model, shard)
    shared, engine = influences(model, shard, share_prompts=True)
    assert engine.passes == 1
    np.testing.assert_allclose(shared.influences, plain.influences, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shared.old_logprobs, plain.old_logprobs, rtol=1e-5, atol=1e-6)


def test_order_within_a_shard_does_not_matter(model, shard):
    order = [6, 1, 3, 0, 5, 4, 2]
    moved, _ = influences(model, shard.select(order))
    whole, _ = influences(model, shard)
    back = replace(shard, influences=whole.influences).select(order)
    np.testing.assert_allclose(moved.influences, back.influences, rtol=1e-4, atol=1e-5)


def test_old_logprobs_and_entropies_come_from_the_same_passes(model, shard):
    got, engine = influences(model, shard, tokens=10_000)
    assert engine.passes == 1
    for row in range(len(shard)):
        places, ids, _, probabilities = action_states(model, shard, row, 1.0)
        logprobs = probabilities.log()
        np.testing.assert_allclose(got.old_logprobs[places], logprobs[torch.arange(len(ids)), ids], atol=1e-4)
        np.testing.assert_allclose(got.entropies[places], -(probabilities * logprobs).sum(-1), atol=1e-4)


def test_a_head_that_is_more_than_a_matrix_gives_the_same(model, shard):
    class Adapted(torch.nn.Linear):
        pass

    plain, _ = influences(model, shard)
    head = model.lm_head
    adapted = Adapted(16, VOCABULARY, bias=False)
    adapted.weight = head.weight
    model.lm_head = adapted
    try:
        got, _ = influences(model, shard)
    finally:
        model.lm_head = head
    np.testing.assert_allclose(got.influences, plain.influences, rtol=1e-5, atol=1e-6)


class WidestWithVocabulary(TorchDispatchMode):
    """The most rows that a tensor with the vocabulary as an axis ever has, views of the head's matrix aside."""

    def __init__(self, head):
        super().__init__()
        self.rows, self.head = 0, head.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[-1] == VOCABULARY:
            own = out.untyped_storage().data_ptr() != self.head
            self.rows = max(self.rows, out.shape[0] if own else 0)
        return out


def test_no_tensor_has_the_vocabulary_and_more_than_a_chunk_of_tokens(model, shard):
    with WidestWithVocabulary(model.lm_head.weight) as seen:
        influences(model, shard, tokens=10_000, chunk=4)
    assert seen.rows == 4


def test_a_group_of_one_is_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path))
    config, _ = to_config(compose_config(["experiment=tiny_grpo", "algorithm=thr", "rollout.responses_per_prompt=1"]))
    with pytest.raises(ConfigError, match="responses_per_prompt: got 1 with credit hidden_reward, which compares"):
        make_plan(config)


def test_groups_come_whole_and_fill_a_pass(shard):
    def taken(tokens):
        return [[rows.tolist() for rows in groups] for groups in whole_groups(shard, tokens)]

    assert taken(1) == [[[0, 2, 4, 6]], [[1, 3, 5]]]
    assert taken(1000) == [[[0, 2, 4, 6], [1, 3, 5]]]


def test_a_reward_that_is_neither_right_nor_wrong_is_refused_with_what_to_set(model, shard):
    graded = replace(shard, rewards=shard.rewards * 0.5)
    with pytest.raises(ConfigError, match=r"^algorithm.credit: rewards: got 0.5, expected 0 or 1; set correct_at"):
        influences(model, graded)
    got, _ = influences(model, graded, {**THR, "correct_at": 0.5})
    np.testing.assert_array_equal(got.influences, influences(model, shard)[0].influences)


def test_an_empty_shard_has_empty_signals(model, shard):
    got, engine = influences(model, shard.select([]))
    assert (len(got.influences), len(got.old_logprobs), engine.passes) == (0, 0, 0)


@pytest.mark.parametrize(
    "base", [{"name": "grpo"}, {"name": "macro_actions", "n_gram": 2, "estimator": {"name": "rloo"}}]
)
def test_the_signal_reaches_credit_and_leans_each_token_by_its_sign(model, shard, base):
    signals, _ = influences(model, shard, {**THR, "base": base})
    batch = replace(signals.apply(shard), minibatch_ids=np.zeros(len(shard), np.int32))
    whole = np.flatnonzero(shard.group_ids == 0)

    def advantages(credit):
        spec = CreditSpec(credit, {"name": "token_mean"}, [], [], False, "k1", "")
        return CreditWorker(spec).assign(batch.select(whole), 0.0)[0].advantages

    plain, leaned = advantages(base), advantages({**THR, "base": base, "beta": float("-inf")})
    group = batch.select(whole)
    right = np.repeat(group.rewards, group.response_lengths) == 1
    toward = np.where(right, group.influences, -group.influences)
    np.testing.assert_allclose(leaned, plain * (1 + 0.2 * np.sign(toward)) * group.action_mask, rtol=1e-5)
    assert 0 < (leaned[group.action_mask] > plain[group.action_mask]).sum() < group.action_mask.sum()


def test_shaping_moves_what_an_answer_earns_and_not_whether_it_is_right(model, shard):
    """The passes agree on right and wrong though credit sees rewards that are neither 0 nor 1."""
    signals, _ = influences(model, shard)
    batch = replace(signals.apply(shard), minibatch_ids=np.zeros(len(shard), np.int32))
    group = batch.select(np.flatnonzero(shard.group_ids == 0))
    base = {"name": "grpo", "normalize": "none"}

    def advantages(credit, shaping):
        spec = CreditSpec(credit, {"name": "token_mean"}, shaping, [], False, "k1", "")
        return CreditWorker(spec).assign(group, 0.0)[0].advantages

    penalty = [{"name": "length", "per_token": 0.05}]
    lean = {**THR, "base": base, "beta": float("-inf")}
    seen = group.action_mask
    shaped, factors = advantages(base, penalty), advantages(lean, [])[seen] / advantages(base, [])[seen]
    assert not np.allclose(shaped, advantages(base, []))
    np.testing.assert_allclose(advantages(lean, penalty)[seen], shaped[seen] * factors, rtol=1e-5)


def test_a_kl_in_the_reward_is_neither_leaned_nor_masked(model, shard):
    signals, _ = influences(model, shard)
    batch = replace(signals.apply(shard), minibatch_ids=np.zeros(len(shard), np.int32))
    group = batch.select(np.flatnonzero(shard.group_ids == 0))
    rng = np.random.default_rng(3)
    reference = (group.old_logprobs - rng.random(len(group.old_logprobs))).astype(np.float32)
    group = replace(group, reference_logprobs=reference)
    base = {"name": "grpo", "normalize": "none"}

    def advantages(credit, coefficient):
        spec = CreditSpec(credit, {"name": "token_mean"}, [], [], coefficient > 0, "k1", "")
        return CreditWorker(spec).assign(group, coefficient)[0].advantages

    for masking in ({}, {"tau": 1e9}):  # the second drops every token of the task's credit
        thr = {**THR, "base": base, **masking}
        added = advantages(base, 0.1) - advantages(base, 0.0)
        assert np.abs(added[group.action_mask]).min() > 0
        np.testing.assert_allclose(advantages(thr, 0.1), advantages(thr, 0.0) + added, atol=1e-6)


def test_an_estimator_of_macro_actions_keeps_its_hook(model, shard):
    nested = {"name": "macro_actions", "n_gram": 2, "estimator": THR}
    np.testing.assert_array_equal(
        influences(model, shard, nested)[0].influences, influences(model, shard)[0].influences
    )


def test_a_method_that_needs_influences_without_the_hook_is_refused(monkeypatch):
    import apportion.algorithms.credit.grpo as module

    monkeypatch.setattr(module.Grpo, "needs", frozenset({"influences"}))
    with pytest.raises(ValueError, match="credit grpo: got 'influences' in needs and no method `influence`"):
        build("credit", {"name": "grpo"})


def test_a_hook_that_cannot_add_up_over_ranks_is_refused(monkeypatch):
    import apportion.algorithms.credit.grpo as module

    monkeypatch.setattr(module.Grpo, "needs", frozenset({"influences"}))
    monkeypatch.setattr(module.Grpo, "influence", lambda self, states, lengths, rewards: None, raising=False)
    with pytest.raises(ValueError, match=r"got influence\(states, lengths, rewards\), expected .*sum_over_ranks=None"):
        build("credit", {"name": "grpo"})


def test_scale_softcap_and_bias_of_the_head_are_those_of_the_policy(model, shard):
    module = CausalLMLogprobs(model, 4)
    module.logit_scale, module.softcap = 0.5, 3.0
    got = InfluencePass(SimpleNamespace(influence=first_probabilities), 1.0, 1000).signals(Engine(module), shard)
    row = 0
    places, ids, hidden, _ = action_states(model, shard, row, 1.0)
    logits = torch.tanh(hidden @ model.lm_head.weight.double().T * 0.5 / 3.0) * 3.0
    expected = logits.softmax(-1)[torch.arange(len(ids)), ids]
    np.testing.assert_allclose(got.influences[places], expected, rtol=1e-3)


def first_probabilities(states, lengths, rewards):
    """A hook that gives each token's own probability."""
    return 1 - states.errors(slice(None)).gather(1, states.columns_N[:, None]).squeeze(1)
