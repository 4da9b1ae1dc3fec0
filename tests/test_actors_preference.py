"""One rank's work, on a plain engine in place of DeepSpeed: what a step's loss, gradient and metrics are, however the
step is cut; and how the loop orders, shares and weighs examples."""

import os
import socket

import numpy as np
import pytest
import torch

from apportion.actors.engine import DeepSpeedEngine, OptimizerStep, World
from apportion.actors.engine_settings import EngineSettings
from apportion.actors.loading import load_causal_lm
from apportion.actors.lora import merged_weights
from apportion.actors.modules import CausalLMLogprobs
from apportion.actors.preference import PreferenceSpec, PreferenceWorker, ReferenceLogprobs, StepShare
from apportion.actors.score_model import load_score_model, save_score_model
from apportion.algorithms.preference import Dpo, RewardModel, Sft
from apportion.algorithms.reductions import SequenceMean, TokenMean
from apportion.conf.schema import LoraConfig
from apportion.data.builtin import resolve_model
from apportion.data.pair_tokens import Answer, EncodedExample, pack
from apportion.data.prompts import TokenizerPath
from apportion.preference_trainer import BatchOrder, PreferenceTrainer, StageSettings, make_order

RNG = np.random.default_rng(0)


def answer(length, turns=None):
    turn_ids = np.zeros(length, np.int32) if turns is None else np.array(turns, np.int32)
    return Answer(RNG.integers(8, 264, len(turn_ids)).astype(np.int32), turn_ids, "")


def prompt(length):
    return RNG.integers(8, 264, length).astype(np.int32)


PAIRS = pack(
    [
        EncodedExample(f"p:{i}", prompt(p), [answer(c), answer(r)], margin=0.25 * i)
        for i, (p, c, r) in enumerate([(3, 5, 2), (7, 1, 4), (2, 9, 9), (5, 3, 6)])
    ]
)
DEMONSTRATIONS = pack(
    [EncodedExample(f"d:{i}", prompt(4), [answer(n)]) for i, n in enumerate([3, 6, 1])]
    + [EncodedExample("d:3", prompt(2), [answer(0, [0, 0, -1, -1, 1])])]
)


class PlainEngine:
    """Gradients add up over micro-batches; no optimiser, so that they can be looked at."""

    device = torch.device("cpu")

    def __init__(self, module):
        self._module = module
        self.passes = 0

    def module(self):
        return self._module

    def forward(self, *arguments, **named):
        return self._module(*arguments, **named)

    def train_step(self, micro_batches, empty, loss):
        self._module.zero_grad()
        self.passes = len(micro_batches)
        for part in micro_batches:
            loss(part).backward()
        if not micro_batches:
            (loss(empty) * 0.0).backward()
        return OptimizerStep(0.0, 0.0)

    def named_weights(self):
        return ((name, parameter.detach()) for name, parameter in self._module.named_parameters())

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self._module.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def tiny():
    return resolve_model("builtin:tiny")


def worker_for(objective, tiny, data, micro_batch_tokens=1000, lora=None, packing=False, reference_model=None):
    settings = EngineSettings(micro_batch_tokens=micro_batch_tokens, learning_rate=1e-2)
    spec = PreferenceSpec(
        tiny, "float32", "sdpa", False, lora, settings, objective, reference_model, 10, 0, packing=packing
    )
    worker = PreferenceWorker(spec)
    worker.world = World()
    if isinstance(objective, RewardModel):
        module = load_score_model(spec)
    else:
        module = CausalLMLogprobs(load_causal_lm(tiny, "float32", lora=lora), settings.logits_chunk_tokens)
    worker.engine = PlainEngine(module)
    worker.load_data(data, data)
    return worker


def with_reference(worker):
    every = np.arange(len(worker.train))
    _, reference = worker.reference_logprobs(every, every)
    worker.set_reference(reference)
    return reference


def equal_weights(examples, total):
    return StepShare(np.array(examples), np.full(len(examples), 1 / total, np.float32))


def by_transformers(tiny, batch, row):
    """Sum of the log-probs of the answer's own tokens, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = torch.from_numpy(batch.sequence(row).astype(np.int64))[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0].float(), -1)
    start = int(batch.prompt_lengths[row])
    own = np.flatnonzero(batch.action_mask[batch.response_slice(row)]) + start
    return [float(logprobs[place - 1, ids[0, place]]) for place in own]


def test_reference_log_probs_are_sums_over_the_answers_own_tokens(tiny):
    reference = with_reference(worker_for(Dpo(), tiny, PAIRS, micro_batch_tokens=20))
    expected = [sum(by_transformers(tiny, PAIRS.batch, row)) for row in range(8)]
    assert reference.train.tolist() == pytest.approx(expected, rel=1e-4)
    assert reference.held_out.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_reference_model_of_its_own_gives_the_log_probs_and_the_policy_keeps_its_weights(tiny, tmp_path):
    other = load_causal_lm(tiny, "float32")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    other.save_pretrained(tmp_path)
    worker = worker_for(Dpo(), tiny, PAIRS, micro_batch_tokens=20, reference_model=str(tmp_path))
    reference = with_reference(worker)
    expected, own = (
        np.array([sum(by_transformers(model, PAIRS.batch, row)) for row in range(8)]) for model in (tmp_path, tiny)
    )
    assert np.abs(expected - own).min() > 0.01
    assert reference.train.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert reference.held_out.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    gaps = own - expected
    means = worker.update(equal_weights([0, 1, 2, 3], 4)).totals.means()
    assert means["dpo/margin"] == pytest.approx(Dpo().beta * (gaps[0::2] - gaps[1::2]).mean(), abs=1e-4)


def test_reference_log_probs_of_several_ranks_make_a_whole_and_the_rest_stays_unknown(tiny):
    worker = worker_for(Dpo(), tiny, PAIRS)
    nobody = np.zeros(0, np.int64)
    parts = [worker.reference_logprobs(np.array(own), nobody)[1] for own in ([0, 3], [2])]
    merged = ReferenceLogprobs.merged(parts).train
    assert np.isnan(merged).tolist() == [False, False, True, True, False, False, False, False]
    whole = worker.reference_logprobs(np.arange(4), nobody)[1].train
    assert merged[[0, 1, 4, 5, 6, 7]].tolist() == pytest.approx(whole[[0, 1, 4, 5, 6, 7]].tolist(), rel=1e-5)


def test_before_training_dpo_has_no_margin_a_loss_of_log_two_and_a_gradient(tiny):
    worker = worker_for(Dpo(), tiny, PAIRS)
    with_reference(worker)
    means = worker.update(equal_weights([0, 1, 2, 3], 4)).totals
    assert means.sums["dpo/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert means.means()["dpo/margin"] == pytest.approx(0, abs=1e-4)
    chosen = np.mean([sum(by_transformers(tiny, PAIRS.batch, row)) for row in (0, 2, 4, 6)])
    assert means.means()["dpo/chosen_logprob"] == pytest.approx(chosen, rel=1e-4)
    assert worker.engine.gradient().norm() > 0.01


def test_reverse_turns_the_first_gradient_round(tiny):
    gradients = []
    for reverse in (False, True):
        worker = worker_for(Dpo(reverse=reverse), tiny, PAIRS)
        with_reference(worker)
        worker.update(equal_weights([0, 1, 2, 3], 4))
        gradients.append(worker.engine.gradient())
    assert torch.allclose(gradients[0], -gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", [Dpo(), Dpo(kind="ipo"), Dpo(length_normalized=True), RewardModel(center=0.1)])
def test_a_steps_gradient_is_the_same_however_it_is_cut(objective, tiny):
    gradients, losses = [], []
    whole, split = [[0, 1, 2, 3]], [[2], [0, 3, 1]]
    for micro_batch_tokens, packing, shares in (
        (1000, False, whole), (24, False, whole), (1000, False, split), (1000, True, whole), (40, True, split),
    ):  # fmt: skip
        worker = worker_for(objective, tiny, PAIRS, micro_batch_tokens, packing=packing)
        if objective.needs_reference:
            every = np.full(8, -3.0, np.float32)
            worker.set_reference(ReferenceLogprobs(every, every))
        reports, gradient = [], torch.zeros(1)
        for share in shares:
            reports.append(worker.update(equal_weights(share, 4)))
            gradient = gradient + worker.engine.gradient()
        gradients.append(gradient)
        losses.append(sum(r.totals.sums[f"{objective.name}/loss"] for r in reports))
        assert sum(r.tokens for r in reports) == PAIRS.batch.tokens
    assert losses[1:] == pytest.approx([losses[0]] * 4, rel=1e-4)
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, rtol=1e-3, atol=1e-5 * max(1.0, float(gradients[0].abs().max())))


def shares_of(data, reduction, ranks, examples):
    settings = StageSettings(
        "sft", 1.0, None, len(examples), 0, False, False, reduction, 0, False, False, 60, None, 0, None, False, {}
    )  # fmt: skip
    trainer = PreferenceTrainer([None] * ranks, data, None, settings, None, None)
    return trainer._shares(np.array(examples))


@pytest.mark.parametrize("reduction", [TokenMean(), SequenceMean()])
def test_fine_tuning_weighs_own_tokens_by_the_reduction_of_the_whole_step_on_any_number_of_ranks(reduction, tiny):
    rows = [by_transformers(tiny, DEMONSTRATIONS.batch, row) for row in range(4)]
    assert [len(row) for row in rows] == [3, 6, 1, 3]  # the environment's two tokens are not learned
    if isinstance(reduction, TokenMean):
        expected = -sum(map(sum, rows)) / 13
    else:
        expected = -np.mean([np.mean(row) for row in rows])
    for ranks in (1, 2, 5):
        worker = worker_for(Sft(), tiny, DEMONSTRATIONS, micro_batch_tokens=24)
        reports = [worker.update(share) for share in shares_of(DEMONSTRATIONS, reduction, ranks, [2, 0, 3, 1])]
        assert sum(r.totals.sums["sft/loss"] for r in reports) == pytest.approx(expected, rel=1e-4)
    worker = worker_for(Sft(), tiny, DEMONSTRATIONS, micro_batch_tokens=24, packing=True)
    [share] = shares_of(DEMONSTRATIONS, reduction, 1, [2, 0, 3, 1])
    assert worker.update(share).totals.sums["sft/loss"] == pytest.approx(expected, rel=1e-4)


def test_packed_examples_fill_rows_and_leave_no_padding(tiny):
    """Tokens of the four pairs: 13, 19, 22 and 19. Rows of 40 hold 22, 19 + 19 and 13, first fit and longest first."""
    worker = worker_for(Sft(), tiny, PAIRS, micro_batch_tokens=40, packing=True)
    parts = worker._parts(PAIRS, np.arange(4), 1)
    assert [part.micro.input_ids.shape for part in parts] == [(1, 35), (1, 38)]
    assert [part.rows.tolist() for part in parts] == [[4, 5, 0, 1], [2, 3, 6, 7]]


def test_held_out_likelihood_is_the_mean_over_the_answers_tokens(tiny):
    rows = [by_transformers(tiny, DEMONSTRATIONS.batch, row) for row in range(4)]
    report = worker_for(Sft(), tiny, DEMONSTRATIONS).evaluate(np.arange(4))
    assert report.totals.means() == {"eval/nll": pytest.approx(-sum(map(sum, rows)) / 13, rel=1e-4)}


def test_held_out_pairs_give_accuracy_margin_and_loss(tiny):
    worker = worker_for(Dpo(beta=0.5), tiny, PAIRS)
    reference = with_reference(worker).held_out
    moved = reference.copy()
    moved[[0, 2, 5, 7]] -= 2.0  # the policy likes chosen 0 and 1 and rejected 2 and 3 better than this reference does
    worker.set_reference(ReferenceLogprobs(reference, moved))
    worker.train = pack([EncodedExample("other", prompt(2), [answer(2), answer(3)])])
    means = worker.evaluate(np.arange(4)).totals.means()
    assert means["eval/pair_accuracy"] == 0.5
    assert means["eval/pair_margin"] == pytest.approx((1 + 1 - 1 - 1) / 4, abs=1e-3)
    loss = (2 * np.log1p(np.exp(-1)) + 2 * np.log1p(np.exp(1))) / 4
    assert means["eval/pair_loss"] == pytest.approx(loss, rel=1e-3)


def test_a_rank_without_examples_makes_one_pass_that_counts_for_nothing(tiny):
    worker = worker_for(Dpo(), tiny, PAIRS)
    unknown = np.full(8, np.nan, np.float32)
    worker.set_reference(ReferenceLogprobs(unknown, unknown))
    worker.update(StepShare(np.zeros(0, np.int64), np.zeros(0, np.float32)))
    assert worker.engine.gradient().abs().max() == 0


def test_margins_of_the_data_reach_the_reward_models_loss(tiny):
    worker = worker_for(RewardModel(), tiny, PAIRS)
    with torch.no_grad():
        for parameter in worker.engine.module().model.score.parameters():
            parameter.zero_()
    loss = worker.update(equal_weights([0, 1, 2, 3], 4)).totals.sums["reward_model/loss"]
    assert loss == pytest.approx(np.mean([np.log1p(np.exp(0.25 * i)) for i in range(4)]), rel=1e-5)


def test_reported_scores_are_means_over_the_chosen_and_over_the_rejected_answers(tiny):
    worker = worker_for(RewardModel(), tiny, PAIRS, micro_batch_tokens=24)
    module, sequences = worker.engine.module(), [torch.from_numpy(PAIRS.batch.sequence(row)) for row in range(8)]
    with torch.no_grad():
        scores = [module(ids[None].long(), torch.tensor([0]), torch.tensor([len(ids) - 1])).item() for ids in sequences]
    means = worker.update(equal_weights([0, 1, 2, 3], 4)).totals.means()
    assert means["reward_model/chosen_score"] == pytest.approx(np.mean(scores[0::2]), rel=1e-3)
    assert means["reward_model/rejected_score"] == pytest.approx(np.mean(scores[1::2]), rel=1e-3)
    assert abs(np.mean(scores[0::2]) - np.mean(scores[1::2])) > 0.01


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_saved_reward_model_scores_in_transformers_and_as_a_reward_what_it_scored_in_training(lora, tiny, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from apportion.actors.reward_model import ModelSource
    from apportion.actors.reward_sources import RewardEntry

    worker = worker_for(RewardModel(), tiny, PAIRS, lora=lora)
    module = worker.engine.module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    batch = PAIRS.batch
    sequences = [[*batch.sequence(row).tolist(), 1] for row in range(8)]  # eos ends an answer
    with torch.no_grad():
        expected = [
            module(torch.tensor([ids]), torch.tensor([0]), torch.tensor([len(ids) - 1])).item() for ids in sequences
        ]
    save_score_model(tiny, dict(merged_weights(worker.engine.named_weights(), worker.spec.lora)), tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert loaded.config.num_labels == 1
    with torch.no_grad():
        assert [loaded(torch.tensor([ids])).logits.item() for ids in sequences] == pytest.approx(
            expected, rel=1e-3, abs=1e-5
        )
    source = ModelSource(RewardEntry(f"model:{tmp_path / 'model'}"), TokenizerPath(tiny))
    try:
        assert source.reads_ids
        assert source._forward(sequences) == pytest.approx(expected, rel=1e-3)
    finally:
        source.close()


def test_where_padding_is_eos_a_reward_model_pads_with_something_else(tmp_path):
    from transformers import AutoConfig

    from apportion.data.prompts import load_tokenizer

    smol = resolve_model("builtin:smollm2-135m-instruct")
    tokenizer = load_tokenizer(smol)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    from apportion.actors.score_model import _padding

    assert _padding(tokenizer) == tokenizer.unk_token_id != tokenizer.eos_token_id
    assert AutoConfig.from_pretrained(smol).pad_token_id == tokenizer.eos_token_id


def test_every_rank_draws_the_same_fresh_head(tiny):
    settings = EngineSettings()
    specs = [
        PreferenceSpec(tiny, "float32", "sdpa", False, None, settings, RewardModel(), None, 1, s) for s in (3, 3, 4)
    ]
    first, second, other = (load_score_model(spec) for spec in specs)
    assert torch.equal(first.model.score.weight, second.model.score.weight)
    assert not torch.equal(first.model.score.weight, other.model.score.weight)
    assert first.model.score.weight.std().item() == pytest.approx(65**-0.5, rel=0.3)


def test_epochs_visit_every_example_once_and_differ_in_order():
    order = BatchOrder(examples=10, batch_size=4, total=20, seed=1, shuffle=True)
    drawn = np.concatenate([order.step(i) for i in range(order.steps)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert order.step(2).tolist() == BatchOrder(10, 4, 20, 1, True).step(2).tolist()  # what a resumed run draws


def test_epochs_end_exactly_and_steps_win_over_epochs():
    def settings(epochs, steps):
        return StageSettings("x", epochs, steps, 4, 0, True, False, None, 0, False, False, 60, None, 0, None, False, {})

    by_epochs = make_order(settings(1.5, None), 10)
    assert (by_epochs.steps, len(by_epochs.step(3))) == (4, 3)
    by_steps = make_order(settings(1.5, 7), 10)
    assert (by_steps.steps, len(by_steps.step(6))) == (7, 4)


def test_pairs_weigh_the_same_each_and_ranks_share_tokens_evenly():
    shares = shares_of(PAIRS, None, 2, [0, 1, 2, 3])
    assert sorted(np.concatenate([s.examples for s in shares])) == [0, 1, 2, 3]
    assert all(s.weights.tolist() == [0.25] * len(s.examples) for s in shares)
    tokens = PAIRS.example_tokens()
    assert [int(tokens[s.examples].sum()) for s in shares] == [35, 38]


@pytest.fixture
def world():
    """A process group of one, at a port that is free; what joining sets in the environment is taken back."""
    kept = dict(os.environ)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    yield World(master_port=port)
    os.environ.clear()
    os.environ.update(kept)


@pytest.mark.system
def test_a_resumed_rank_takes_the_same_next_step(tiny, tmp_path, world):
    weights = []
    for resumed in (False, True):
        worker = worker_for(Dpo(), tiny, PAIRS)
        worker.engine = DeepSpeedEngine(worker.engine.module(), worker.spec.settings, world, 10)
        with_reference(worker)
        if resumed:
            worker.load(str(tmp_path))
        else:
            worker.update(equal_weights([0, 1], 2))
            worker.save(str(tmp_path))
        worker.update(equal_weights([2, 3], 2))
        weights.append(torch.cat([w.flatten() for _, w in worker.engine.named_weights()]))
    assert torch.equal(weights[0], weights[1])
