"""The loss of a policy rank that learns from teachers, against the formula on whole logits; what is refused before."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apportion.actors import distillation as module
from apportion.actors.distillation import Distillation, DistillationSpec
from apportion.actors.engines import Sampling
from apportion.actors.engines.given_responses import GivenResponses
from apportion.actors.microbatch import cut, make, nothing
from apportion.actors.modules import CausalLMLogprobs
from apportion.actors.policy import LossSpec, PolicySpec, PolicyWorker
from apportion.algorithms.correction import ImportanceCorrection
from apportion.algorithms.distillation import AlignDistil
from apportion.algorithms.registry import build
from apportion.batch import Batch, Prompt, Totals, Trajectory
from apportion.cli import compose_config, to_config
from apportion.conf.schema import AlgorithmConfig
from apportion.conf.teachers import check_same_tokenizer
from apportion.data.builtin import resolve_model
from apportion.plan import make_plan
from apportion.platform.errors import ConfigError, DataError

VOCABULARY = 61


def llama(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


class Engine:
    def __init__(self, model):
        self.wrapped, self.device = CausalLMLogprobs(model, 4), torch.device("cpu")

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)


@pytest.fixture
def student():
    return llama(0)


@pytest.fixture
def teachers(monkeypatch):
    models = {"a": llama(1), "b": llama(2)}
    monkeypatch.setattr(module, "load_causal_lm", lambda path, *rest: models[path])
    return models


def distillation(**parameters):
    part = {"name": "aligndistil", "chunk_tokens": 3, **parameters}
    return Distillation(DistillationSpec(part, "a", "b", "float32", "sdpa", False), 4, torch.device("cpu"))


@pytest.fixture
def shard():
    rng = np.random.default_rng(0)
    rows = []
    for index, (prompt, response, environment) in enumerate([(3, 4, []), (2, 6, [2, 3]), (5, 1, [])]):
        mask = np.ones(response, bool)
        mask[environment] = False
        rows.append(
            Trajectory(
                f"p{index}", index, 0, rng.integers(0, VOCABULARY, prompt + response).astype(np.int32), prompt, mask,
                np.where(mask, 0, -1).astype(np.int32), np.zeros(response, np.float32), 0, "stop", "",
            )
        )  # fmt: skip
    batch = Batch.from_trajectories(rows)
    weights = np.concatenate([np.where(r.action_mask, 1 / (3 * r.action_mask.sum()), 0) for r in rows])
    zeros = np.zeros(len(weights), np.float32)
    return replace(
        batch, loss_weights=weights.astype(np.float32), advantages=zeros, minibatch_ids=np.zeros(3, np.int32)
    )


def expected_loss(student, teachers, shard, method):
    """Mean over responses of the mean over the positions that predict their action tokens, on whole logits."""
    means = []
    for row in range(len(shard)):
        span, prompt = shard.response_slice(row), int(shard.prompt_lengths[row])
        columns = np.flatnonzero(shard.action_mask[span]) + prompt - 1
        ids = torch.from_numpy(shard.sequence(row).astype(np.int64))[None]
        logits = [m(input_ids=ids).logits[0, columns] for m in (student, teachers["a"], teachers["b"])]
        means.append(method.losses(*logits).losses.mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize(
    ("parameters", "share_prompts"),
    [({}, False), ({}, True), ({"variant": "theorem1"}, False), ({"temperature": 2.0, "weight_cap": 0.5}, False)],
)
def test_loss_and_gradient_are_the_formula_at_the_positions_that_predict_the_response(
    student, teachers, shard, parameters, share_prompts
):
    expected = expected_loss(student, teachers, shard, AlignDistil(**parameters))
    expected_gradients = torch.autograd.grad(expected, list(student.parameters()))
    totals, part = Totals(), distillation(**parameters)
    for micro in cut(shard, np.arange(3), 16, share_prompts):
        part.loss(Engine(student), micro, shard, totals).backward()
    assert totals.sums["policy/loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(expected.detach()) > 1e-3
    for parameter, gradient in zip(student.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for m in teachers.values() for p in m.parameters())


def test_responses_behind_one_copy_of_their_prompt_have_the_loss_and_gradient_of_rows_of_their_own(
    student, teachers, shard
):
    """Rows 0 and 2 become responses to one prompt, whose three tokens are then read once by all three models."""
    ids = shard.token_ids.copy()
    offsets = shard.token_offsets
    together = replace(shard, prompt_lengths=np.array([3, 2, 3], np.int32), group_ids=np.array([0, 1, 0]))
    ids[offsets[2] : offsets[2] + 3] = ids[:3]
    keep = np.r_[0 : offsets[2] + 3, offsets[2] + 5 : offsets[3]]
    together = replace(together, token_ids=ids[keep], prompt_ids=["p0", "p1", "p0"])
    outcomes = []
    for share in (False, True):
        micros = cut(together, np.arange(3), 32, share)
        student.zero_grad()
        loss = sum(distillation().loss(Engine(student), m, together, Totals()) for m in micros)
        loss.backward()
        outcomes.append((float(loss.detach()), [p.grad.clone() for p in student.parameters()]))
        assert sum(m.input_ids.shape[0] for m in micros) == (2 if share else 3)
    assert outcomes[1][0] == pytest.approx(outcomes[0][0], rel=1e-5) and outcomes[0][0] > 1e-3
    for shared, alone in zip(outcomes[1][1], outcomes[0][1], strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-6)


def test_sharing_prompts_is_not_refused_with_a_distillation(cache):
    assert planned(*TINY, "policy.share_prompts=true").value("trajectories a step") > 0


def test_what_it_reports_are_means_over_action_tokens(student, teachers, shard):
    totals = Totals()
    for micro in cut(shard, np.arange(3), 16):
        distillation().loss(Engine(student), micro, shard, totals)
    means = totals.means()
    assert totals.weights["policy/distillation_kl"] == shard.action_tokens == 9
    assert 0 < means["policy/distillation_total_variation"] < 1
    assert means["policy/distillation_alpha"] == pytest.approx(
        30 * means["policy/distillation_total_variation"] + 1e-3, rel=1e-5
    )
    assert means["policy/distillation_kl"] > 0 < means["policy/distillation_weight"]


def test_a_student_that_is_its_teachers_has_nothing_to_learn(teachers, shard):
    teachers["b"] = teachers["a"]
    totals = Totals()
    loss = distillation().loss(Engine(llama(1)), make(shard, np.arange(3)), shard, totals)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert totals.means()["policy/distillation_alpha"] == pytest.approx(1e-3)


def test_a_pass_that_only_keeps_pace_counts_for_nothing(student, teachers, shard):
    totals = Totals()
    loss = distillation().loss(Engine(student), nothing(), shard, totals)
    assert loss.item() == 0.0
    assert loss.requires_grad
    assert totals.sums == {}


def policy_worker(teachers):
    loss = LossSpec(None, 1.0, False, "k3", 0.0, ImportanceCorrection("none"), 0.5, 1)
    spec = PolicySpec("", "float32", "sdpa", False, None, SimpleNamespace(micro_batch_tokens=16), loss, 1)
    worker = PolicyWorker(spec)
    worker._distillation = distillation()
    return worker


def test_rows_without_any_advantage_teach_where_the_loss_is_distilled(student, teachers, shard):
    worker = policy_worker(teachers)
    assert worker._teaching(shard).tolist() == [True, True, True]
    worker._distillation = None
    assert worker._teaching(shard).tolist() == [False, False, False]


def test_no_credit_is_zero_everywhere():
    credit = build("credit", {"name": "none"})
    mask = torch.tensor([[True, False], [True, True]])
    out = credit(SimpleNamespace(mask_BT=mask, token_rewards_BT=torch.ones(2, 2)))
    assert out.advantages_BT.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert credit.needs == frozenset()


# before anything starts


def planned(*overrides):
    words = ["experiment=tiny_grpo", "algorithm=aligndistil", *overrides]
    return make_plan(to_config(compose_config(words))[0])


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path))


TINY = ["teachers.dpo=builtin:tiny", "teachers.other=builtin:tiny"]


def test_teachers_are_in_the_plans_memory_and_nothing_else_is_started(cache):
    plan = planned(*TINY)
    assert plan.actor("policy").memory["teachers"] == 2 * 164_672 * 2
    assert [actor.role for actor in plan.actors] == ["policy", "rollout", "credit", "reward"]
    assert plan.needs == frozenset()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teachers.dpo=builtin:tiny"], "teachers.other: got null with algorithm.distillation, expected a model"),
        (
            ["teachers.dpo=builtin:smollm2-135m-instruct", "teachers.other=builtin:tiny"],
            "teachers.dpo: got a model with 49152 tokens, expected 264 as builtin:tiny has",
        ),
        (
            ["teachers.dpo=no-such-run", "teachers.other=builtin:tiny"],
            "teachers.dpo: got 'no-such-run', expected a run",
        ),
        (
            ["teachers.dpo=builtin:tiny", "teachers.other=other"],
            "teachers.other: got a model with 99 tokens, expected 264 as builtin:tiny has",
        ),
        (
            ["teachers.dpo=short", "teachers.other=builtin:tiny"],
            "teachers.dpo: got short with a context of 16 tokens, expected at least",
        ),
        ([*TINY, "policy.zero_stage=3"], "policy.zero_stage: got 3 with algorithm.distillation, expected 0, 1 or 2"),
        ([*TINY, "algorithm.kl.place=loss"], "algorithm.kl.place: got loss with algorithm.distillation"),
        ([*TINY, "algorithm.entropy_coefficient=0.1"], "algorithm.entropy_coefficient: got 0.1 with"),
        ([*TINY, "algorithm.correction.method=truncate"], "algorithm.correction.method: got truncate with"),
        ([*TINY, "algorithm.distillation=null"], "algorithm.surrogate: got null, expected a mapping with a name"),
        ([*TINY, "algorithm.distillation.scale=-1"], "algorithm.distillation aligndistil: scale: got -1, expected"),
        (["algorithm=grpo", "teachers.dpo=builtin:tiny"], "teachers.dpo: got 'builtin:tiny' without algorithm.distil"),
    ],
)
def test_what_distillation_cannot_do_is_refused_with_what_to_change(cache, overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, sizes in (
        ("other", '{"vocab_size": 99, "n_embd": 8}'),
        ("short", '{"vocab_size": 264, "n_positions": 16}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(sizes)
    with pytest.raises(ConfigError, match=message):
        if overrides[0] == "algorithm=grpo":
            make_plan(to_config(compose_config(["experiment=tiny_grpo", *overrides]))[0])
        else:
            planned(*overrides)


def test_a_surrogate_beside_a_distillation_is_refused():
    part = {"name": "reinforce"}
    with pytest.raises(ConfigError, match=r"got one beside algorithm.distillation, expected null"):
        AlgorithmConfig(name="mine", credit={"name": "none"}, surrogate=part, distillation={"name": "aligndistil"})


def tokenizer(**vocabulary):
    return SimpleNamespace(get_vocab=lambda: vocabulary)


def test_a_teacher_with_another_tokenizer_is_refused():
    check_same_tokenizer(tokenizer(a=0, b=1), tokenizer(b=1, a=0), "teachers.dpo")
    with pytest.raises(ConfigError, match=r"^teachers.other: .* in 2 of 2 tokens \(first 'a': id 1, expected 0\)"):
        check_same_tokenizer(tokenizer(a=0, b=1), tokenizer(a=1, b=0), "teachers.other")
    with pytest.raises(ConfigError, match=r"in 1 of 2 tokens \(first 'c': id 2, expected None\)"):
        check_same_tokenizer(tokenizer(a=0, b=1), tokenizer(a=0, b=1, c=2), "teachers.dpo")


# off-policy: the data's responses


def given(column, columns, max_tokens=100):
    worker = GivenResponses(resolve_model("builtin:tiny"), False)
    prompt = Prompt("p", np.array([1], np.int32), "question", columns)
    return worker.samples([prompt], Sampling(max_tokens=max_tokens, response_column=column))[0], worker.tokenizer


@pytest.mark.parametrize("value", ["good answer", [{"role": "user"}, {"role": "assistant", "content": "good answer"}]])
def test_a_response_of_the_data_is_tokens_of_the_policys_tokenizer_and_its_eos(value):
    sample, tokenizer = given("chosen", {"chosen": value})
    assert sample.text == "good answer"
    assert tokenizer.decode(sample.token_ids[:-1]) == "good answer"
    assert (sample.token_ids[-1], sample.finish_reason) == (tokenizer.eos_token_id, "stop")
    assert np.isnan(sample.logprobs).all()


def test_a_response_in_parts_or_in_sharegpts_form_is_its_text_and_one_with_calls_is_refused():
    for last in (
        {"role": "assistant", "content": [{"type": "text", "text": "good"}]},
        {"from": "gpt", "value": "good"},
    ):
        assert given("chosen", {"chosen": [last]})[0].text == "good"
    call = {"function": {"name": "f", "arguments": {}}}
    with pytest.raises(DataError, match="prompt p has tool_calls in 'chosen', expected text alone"):
        given("chosen", {"chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}]})


def test_a_response_of_the_data_is_cut_at_the_limit():
    sample, _ = given("chosen", {"chosen": "good answer"}, max_tokens=4)
    assert (sample.text, sample.finish_reason, len(sample.token_ids)) == ("good", "length", 4)


def test_a_row_without_a_response_is_refused_with_the_columns_it_has():
    with pytest.raises(DataError, match=r"prompt p has NoneType in 'chosen', expected text or messages; .* are answer"):
        given("chosen", {"answer": "4"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=aligndistil", *TINY, "rollout.response_column=chosen"], "responses_per_prompt: got 4 with"),
        (["rollout.response_column=chosen"], "rollout.response_column: got 'chosen' without algorithm.distillation"),
    ],
)
def test_the_datas_responses_are_for_distillation_alone(cache, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(to_config(compose_config(["experiment=tiny_grpo", *overrides]))[0])
