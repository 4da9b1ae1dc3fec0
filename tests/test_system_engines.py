"""vLLM and transformers as rollout engines on one tiny model in float32: the trainer's weights, proved; the same answers.

Behaviour log-probs are held to a distribution made by hand from the trainer's logits: temperature, then top-k, then
top-p.
"""

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apportion.actors.engines import EngineSpec, Request, Sampling, make_engine
from apportion.batch import Prompt
from apportion.loop.state import Actors, Progress
from apportion.loop.sync_check import SyncCheck, text_tokens
from apportion.platform.cluster import ActorRequest, Call, Cluster, gather
from apportion.platform.errors import WeightSyncError
from apportion.platform.process import ActorBase
from apportion.platform.weights import WeightBundle, prove

pytestmark = pytest.mark.system
BOTH = ["vllm", "transformers"]
ASKED = ["What is 2 + 3?", "Hi", "Name a city in a long sentence."]


class Engine(ActorBase):
    """An engine, and what a test does to it behind its back."""

    def __init__(self, name: str, spec: EngineSpec) -> None:
        self.name, self.engine = name, make_engine(name, spec)

    def generate(self, requests: list[Request], sampling: Sampling) -> list:
        return self.engine.generate(requests, sampling)

    def score(self, token_ids: np.ndarray) -> np.ndarray:
        return self.engine.score(token_ids)

    def sampled(self, requests: list[Request], sampling: Sampling, scored: np.ndarray | None) -> list:
        """From one random state each time, after scoring a text or not."""
        torch.manual_seed(5)
        if scored is not None:
            self.engine.score(scored)
        return self.engine.generate(requests, sampling)

    def load(self, bundle: WeightBundle, check: bool):
        return self.engine.load(bundle, f"{self.name}-0", check)

    def as_vllm_says(self, requests: list[Request], sampling: Sampling) -> list[tuple[list[int], list[float], str]]:
        """Ids, log-probs and text of vLLM's own bookkeeping: a dict a token, and text while it samples."""
        engine = self.engine
        params = [engine._params(sampling, r) for r in requests]
        for param in params:
            param.flat_logprobs, param.detokenize = False, True
        prompts = [{"prompt_token_ids": r.token_ids.tolist()} for r in requests]
        outputs = [o.outputs[0] for o in engine._llm.generate(prompts, params, use_tqdm=False)]
        return [
            (list(o.token_ids), [at[t].logprob for at, t in zip(o.logprobs, o.token_ids, strict=True)], o.text)
            for o in outputs
        ]

    def addresses(self) -> dict[str, int]:
        [found] = self.engine._llm.apply_model(lambda model: {n: p.data_ptr() for n, p in model.named_parameters()})
        return found

    def compare(self, bundle: WeightBundle) -> list:
        """The live model against a bundle that is not loaded."""
        return self.engine._llm.collective_rpc("apportion_compare", args=(bundle,))


class Engines:
    def __init__(self, cluster: Cluster, actors: dict) -> None:
        self.cluster, self.actors = cluster, actors

    def call(self, name: str, method: str, *arguments):
        return gather([self.actors[name].call(method, *arguments)], 120, "a test")[0]

    def answers(self, name: str, asked: list[Request], sampling: Sampling) -> list:
        return self.call(name, "generate", asked, sampling)


def spec_of(model: str) -> EngineSpec:
    return EngineSpec(
        model=model, dtype="float32", seed=0, max_model_len=128, max_sequences=16, tensor_parallel_size=1,
        gpu_memory_utilization=0.5, kv_cache_gib=1.0, compile=False, prefix_caching=True, trust_remote_code=False,
        threads=2, first_thread=0, seeded=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engines(tiny, tmp_path_factory):
    spec = spec_of(tiny)
    cluster = Cluster(None, "engines", 2, tmp_path_factory.mktemp("logs"), 0.2)
    try:
        actors = cluster.start([ActorRequest(name, Engine, (name, spec), 1) for name in BOTH], 240)
        yield Engines(cluster, dict(zip(BOTH, actors, strict=True)))
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def trained(tiny):
    """The trainer's model after an update that moved everything."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def bundle(trained):
    return WeightBundle.pack(((n, p.detach()) for n, p in trained.named_parameters()), 1)


@pytest.fixture
def synced(engines, bundle):
    """Both engines with the trainer's weights, proved."""
    for name in BOTH:
        prove([engines.call(name, "load", bundle, True)], bundle.entries, 1)
    return engines


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [np.array(tokenizer(text)["input_ids"], np.int32) for text in ASKED]


@torch.no_grad()
def distribution(model, ids: np.ndarray, prompt: int, sampling: Sampling) -> torch.Tensor:
    """Log-probs [R, V] that each response token was sampled from: -inf where it could not be."""
    logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, prompt - 1 : -1] / sampling.temperature
    if sampling.top_k:
        weakest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    if sampling.top_p < 1:
        ranked, order = logits.softmax(-1).sort(descending=True)
        outside = ranked.cumsum(-1) - ranked >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7),
        Sampling(1.3, top_k=5),
        Sampling(0.9, top_p=0.6),
        Sampling(0.8, top_p=0.8, top_k=20),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "both"],
)
def test_behavior_logprobs_are_those_of_the_distribution_that_was_sampled_from(
    synced, trained, prompts, name, sampling
):
    asked = [Request(p, seed=i) for i, p in enumerate(prompts * 3)]
    samples = synced.answers(name, asked, replace(sampling, max_tokens=12))
    for request, sample in zip(asked, samples, strict=True):
        ids = np.concatenate([request.token_ids, sample.token_ids])
        right = distribution(trained, ids, len(request.token_ids), sampling)
        expected = right.gather(1, torch.from_numpy(sample.token_ids.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(sample.logprobs, expected.numpy(), atol=2e-3)


def scored_by(model, ids: np.ndarray) -> np.ndarray:
    """Log-probs [L - 1] of each token given those before it."""
    right = distribution(model, ids, 1, Sampling(1.0))
    return right.gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0].numpy()


@pytest.mark.parametrize("name", BOTH)
def test_an_engine_scores_a_text_as_the_trainers_model_does(synced, trained, prompts, name):
    """At temperature 1 whatever was sampled before, and though the text's beginning is in the prefix cache."""
    text = np.concatenate([*prompts, prompts[0]])
    synced.answers(name, [Request(text, 1), Request(text[:30], 2)], Sampling(0.4, top_k=3, max_tokens=4))
    for ids in (text, text[:40], text[:2], text):
        scores = synced.call(name, "score", ids)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, scored_by(trained, ids), atol=2e-3)
    longest = np.resize(text, 127)  # of 128 tokens; vLLM needs one for what it samples
    np.testing.assert_allclose(synced.call(name, "score", longest), scored_by(trained, longest), atol=2e-3)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("name", BOTH)
def test_scoring_changes_nothing_of_what_is_sampled_next(synced, prompts, name, seeded):
    asked = [Request(p, seed=i if seeded else None) for i, p in enumerate(prompts * 2)]
    plain, scored = (
        synced.call(name, "sampled", asked, Sampling(1.0, max_tokens=10), text) for text in (None, prompts[2])
    )
    assert [s.token_ids.tolist() for s in plain] == [s.token_ids.tolist() for s in scored]


class Trained:
    """A policy rank that scores with a model of this process."""

    name, info, progress = "policy-0", None, ""

    def __init__(self, model) -> None:
        self.model = model

    def call(self, method: str, token_ids: np.ndarray) -> Call:
        assert method == "score"
        return Call(self, method, [ray.put(scored_by(self.model, token_ids))])


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.v_proj.weight"])
@pytest.mark.parametrize("name", BOTH)
def test_an_engine_without_one_of_the_trained_tensors_is_found_by_what_it_computes(
    engines, tiny, trained, tokenizer, name, lost
):
    """Checksums of what was sent hold: the engine was sent the tensor's original values."""
    original = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    old, new = ({n: p.detach() for n, p in model.named_parameters()} for model in (original, trained))
    ids = text_tokens(tokenizer, 127, None)
    actors, progress = Actors([engines.actors[name]], [], None, [Trained(original)]), Progress()
    check = SyncCheck(actors, ids, None, 120, pytest.fail)
    engines.call(name, "load", WeightBundle.pack(old.items(), 0), True)
    check.measure_baseline(progress)
    assert progress.sync_baseline < 1e-3
    actors.policy = [Trained(trained)]
    engines.call(name, "load", WeightBundle.pack(new.items(), 1), True)
    check.after_sync(progress)
    assert check.taken()["sync/gap"] < 1e-3
    engines.call(name, "load", WeightBundle.pack((new | {lost: old[lost]}).items(), 2), True)
    progress.policy_version = 2
    line = rf"^{name}: after the sync of weights version 2, .* expected at most 0\.0200 \(the smallest bound; 0\.0000 before"
    with pytest.raises(WeightSyncError, match=line):
        check.after_sync(progress)


def test_before_a_sync_the_log_probs_are_visibly_other_ones(engines, tiny, trained, prompts):
    start = WeightBundle.pack(
        (
            (n, p.detach())
            for n, p in AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).named_parameters()
        ),
        0,
    )
    for name in BOTH:
        prove([engines.call(name, "load", start, True)], start.entries, 0)
        [sample] = engines.answers(name, [Request(prompts[0], 1)], Sampling(1.0, max_tokens=12))
        ids = np.concatenate([prompts[0], sample.token_ids])
        right = distribution(trained, ids, len(prompts[0]), Sampling(1.0))
        expected = right.gather(1, torch.from_numpy(sample.token_ids.astype(np.int64))[:, None])[:, 0].numpy()
        assert np.abs(sample.logprobs - expected).max() > 0.1


def test_both_engines_decode_greedily_what_the_trainers_model_does(synced, trained, prompts):
    asked, greedy = [Request(p) for p in prompts], Sampling(0.0, max_tokens=16)
    vllm, transformers = (synced.answers(name, asked, greedy) for name in BOTH)
    for request, one, other in zip(asked, vllm, transformers, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason
        # vLLM holds back the last bytes of a text that are no whole character.
        assert one.text.rstrip("\ufffd") == other.text.rstrip("\ufffd")
        ids = torch.from_numpy(np.concatenate([request.token_ids, one.token_ids]).astype(np.int64))
        with torch.no_grad():
            best = trained(ids[None]).logits[0, len(request.token_ids) - 1 : -1].argmax(-1)
        assert best.tolist() == one.token_ids.tolist()


@pytest.mark.parametrize(("temperature", "stop"), [(1.0, []), (2.0, []), (2.0, ["e", "Q"])])
def test_texts_and_log_probs_are_those_of_vllms_own_bookkeeping(synced, prompts, temperature, stop):
    """The tiny model's tokens are bytes: most texts hold bytes that are no character, some end within one."""
    half = np.append(prompts[0], np.int32(8 + 0xE2))  # and a prompt ends within one
    asked = [Request(p, seed) for seed, p in enumerate([*prompts, half] * 8)]
    sampling = Sampling(temperature, max_tokens=24, stop=stop)
    right = synced.call("vllm", "as_vllm_says", asked, sampling)
    samples = synced.answers("vllm", asked, sampling)
    assert any("\ufffd" in text for _, _, text in right) and len({text for _, _, text in right}) > 16
    for sample, (ids, logprobs, text) in zip(samples, right, strict=True):
        assert (sample.token_ids.tolist(), sample.text) == (ids, text)
        np.testing.assert_array_equal(sample.logprobs, np.array(logprobs, np.float32))


def test_a_sync_leaves_the_weights_of_vllm_where_they_are(synced, bundle):
    """CUDA graphs hold these addresses."""
    before = synced.call("vllm", "addresses")
    synced.call("vllm", "load", bundle, True)
    assert synced.call("vllm", "addresses") == before and len(before) > 10


@pytest.mark.parametrize("name", BOTH)
def test_a_stop_string_ends_a_response_and_is_part_of_it(synced, prompts, name):
    for seed in range(50):
        asked = [Request(prompts[0], seed)]
        [whole] = synced.answers(name, asked, Sampling(1.0, max_tokens=16))
        letters = [c for c in whole.text[2:-2] if c.isascii() and c.isalpha()]
        if letters:
            break
    stop = letters[0]
    [stopped] = synced.answers(name, asked, Sampling(1.0, max_tokens=16, stop=[stop]))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop) + 1]
    assert stopped.token_ids.tolist() == whole.token_ids[: len(stopped.token_ids)].tolist()
    assert len(stopped.logprobs) == len(stopped.token_ids) < 16


@pytest.mark.parametrize("name", BOTH)
def test_responses_of_a_batch_that_stopped_before_others_have_no_padding(synced, prompts, tokenizer, name):
    asked = [Request(p, seed) for seed, p in enumerate(prompts * 2)]
    whole = synced.answers(name, asked, Sampling(1.0, max_tokens=16))
    letters = sorted({c for sample in whole for c in sample.text if c.isascii() and c.isalpha()})
    samples = synced.answers(name, asked, Sampling(1.0, max_tokens=16, stop=letters))
    stopped = [s for s in samples if s.text[-1:] in letters]
    assert len({len(s.token_ids) for s in stopped}) > 1  # unlike lengths: within a batch, padding stood behind some
    for sample in stopped:
        assert sample.finish_reason == "stop"
        assert len(sample.logprobs) == len(sample.token_ids)
        text, last = (tokenizer.decode(part, skip_special_tokens=True) for part in np.split(sample.token_ids, [-1]))
        assert last == sample.text[-1] and not set(text) & set(letters)


@pytest.mark.parametrize("name", BOTH)
def test_the_end_token_stops_and_the_limit_cuts(synced, prompts, trained, name):
    end = trained.generation_config.eos_token_id
    samples = synced.answers(
        name, [Request(p, seed=i) for i, p in enumerate(prompts * 16)], Sampling(2.0, max_tokens=40)
    )
    reasons = {sample.finish_reason for sample in samples}
    assert reasons == {"stop", "length"}
    for sample in samples:
        ends = sample.token_ids == end
        assert len(sample.token_ids) == len(sample.logprobs) <= 40
        if sample.finish_reason == "stop":
            assert ends.tolist() == [False] * (len(ends) - 1) + [True]
        else:
            assert len(ends) == 40 and not ends.any()


@pytest.mark.parametrize("name", BOTH)
def test_the_same_seeds_give_the_same_tokens_and_others_do_not(synced, prompts, name):
    def drawn(first: int) -> list[list[int]]:
        asked = [Request(p, seed=first + i) for i, p in enumerate(prompts * 2)]
        return [s.token_ids.tolist() for s in synced.answers(name, asked, Sampling(1.0, max_tokens=10))]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(100)


@pytest.mark.parametrize("name", BOTH)
def test_a_tensor_corrupted_on_its_way_stops_the_run_and_is_named(synced, bundle, name):
    broken = WeightBundle(2, bundle.entries, bundle.data.copy())
    entry = next(e for e in bundle.entries if e.name == "model.layers.1.mlp.up_proj.weight")
    broken.data[entry.offset + 101] ^= 1
    receipt = synced.call(name, "load", broken, True)
    with pytest.raises(
        WeightSyncError, match=r"1 of 20 tensors are not .* sync 2: model\.layers\.1\.mlp\.up_proj\.weight;"
    ):
        prove([receipt], bundle.entries, 2)


@pytest.mark.parametrize("name", BOTH)
def test_a_tensor_lost_on_its_way_stops_the_run_and_is_named(synced, bundle, trained, name):
    lost = "model.layers.0.self_attn.k_proj.weight"
    kept = WeightBundle.pack(((n, p.detach() + 0.5) for n, p in trained.named_parameters() if n != lost), 3)
    right = WeightBundle.pack(((n, p.detach() + 0.5) for n, p in trained.named_parameters()), 3)
    receipt = synced.call(name, "load", kept, True)
    with pytest.raises(WeightSyncError, match=r"model\.layers\.0\.self_attn\.k_proj\.weight"):
        prove([receipt], right.entries, 3)


def test_vllms_live_model_differs_in_exactly_the_tensors_whose_smallest_bit_was_changed(synced, bundle):
    [right] = synced.call("vllm", "compare", bundle)
    assert (right.checked, right.wrong) == (15, [])
    assert set(right.proved) == {e.name for e in bundle.entries}
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
    ]
    names.append("model.norm.weight")
    other = WeightBundle(1, bundle.entries, bundle.data.copy())
    for entry in other.entries:
        if entry.name in names:
            other.data[entry.offset + 4 * 63] ^= 1  # the last bit of element 63
    [found] = synced.call("vllm", "compare", other)
    assert found.checked == 15
    assert sorted(found.wrong) == sorted(names)


def test_a_prompt_keeps_its_ids_and_its_responses_their_version(synced, prompts, monkeypatch):
    from types import SimpleNamespace

    from apportion.actors import rollout

    remote = SimpleNamespace(generate=lambda requests, sampling: synced.answers("vllm", requests, sampling))
    monkeypatch.setattr(rollout, "make_engine", lambda name, spec: remote)
    engine_spec = SimpleNamespace(model="", trust_remote_code=False)
    worker = rollout.RolloutWorker(rollout.RolloutSpec("vllm", engine_spec, 0, True), "rollout-0")
    worker.set_version(7)
    asked = [Prompt(f"p{i}", ids, text) for i, (ids, text) in enumerate(zip(prompts, ASKED, strict=True))]
    report, batch = worker.generate(asked, 4, 2, Sampling(1.0, max_tokens=5))
    assert batch.group_ids.tolist() == [4, 4, 5, 5, 6, 6]
    assert batch.sample_indices.tolist() == [0, 1] * 3
    assert set(batch.policy_versions.tolist()) == {7}
    assert (report.trajectories, report.sampled_tokens) == (6, int(batch.response_lengths.sum()))
    for index in range(6):
        assert batch.sequence(index)[: batch.prompt_lengths[index]].tolist() == prompts[index // 2].tolist()
    assert batch.sequence(0).tolist() != batch.sequence(1).tolist()


def test_seeds_decide_the_samples_also_where_prompts_exceed_what_one_pass_takes_in(synced):
    """96 prompts of 96 tokens: vLLM takes in 4,096 to 8,192 tokens at a time, and must not cut a prompt there."""
    rng = np.random.default_rng(3)
    asked = [Request(rng.integers(5, 250, 96).astype(np.int32), seed=i) for i in range(96)]
    sampling = Sampling(1.0, max_tokens=4)
    together = synced.answers("vllm", asked, sampling)
    alone = synced.answers("vllm", asked[60:62], sampling)
    for one, other in zip(alone, together[60:62], strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)


def test_an_engine_cut_over_two_workers_holds_its_shares_of_the_weights_and_samples_from_them(
    engines, tiny, trained, bundle, prompts
):
    spec = replace(spec_of(tiny), tensor_parallel_size=2)
    [actor] = engines.cluster.start([ActorRequest("parallel", Engine, ("vllm", spec), 0)], 240)
    engines.actors["parallel"] = actor
    receipt = engines.call("parallel", "load", bundle, True)
    prove([receipt], bundle.entries, 1)
    assert receipt.checked_live >= len(bundle.entries)  # both workers' parts; fused layers count once in each
    assert receipt.wrong == []
    assert set(receipt.proved) == {e.name for e in bundle.entries}
    plain = Sampling(1.0, max_tokens=8)
    samples = engines.answers("parallel", [Request(p, seed=0) for p in prompts], plain)
    for sample, prompt in zip(samples, prompts, strict=True):
        right = distribution(trained, np.concatenate([prompt, sample.token_ids]), len(prompt), plain)
        expected = right.gather(1, torch.from_numpy(sample.token_ids.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(sample.logprobs, expected.numpy(), atol=2e-3)
    text = np.concatenate(prompts)
    np.testing.assert_allclose(engines.call("parallel", "score", text), scored_by(trained, text), atol=2e-3)
