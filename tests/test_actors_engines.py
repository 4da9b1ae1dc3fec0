"""What engines make of a sampling setting, without any vLLM: cutting, end tokens, seeds. Real ones: test_system_engines."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from apportion.actors.engines import EngineSpec, Request, Sampling, make_engine
from apportion.actors.engines.vllm_engine import _sample
from apportion.platform.weights import WeightBundle, prove


@pytest.fixture(scope="module")
def engine(tiny):
    spec = EngineSpec(
        model=tiny, dtype="float32", seed=0, max_model_len=64, max_sequences=4, tensor_parallel_size=1,
        gpu_memory_utilization=0.5, kv_cache_gib=1.0, compile=False, prefix_caching=True, trust_remote_code=False,
        threads=1, first_thread=0,
    )  # fmt: skip
    threads = torch.get_num_threads()
    yield make_engine("transformers", spec)
    torch.set_num_threads(threads)


def asked(count: int) -> list[Request]:
    return [Request(np.arange(20 + i, 24 + 2 * i, dtype=np.int32), seed=i) for i in range(count)]


def test_answers_come_in_the_order_of_the_requests_whatever_the_batches(engine):
    requests = asked(6)
    together = engine.generate(requests, Sampling(0.0, max_tokens=6))
    alone = [engine.generate([request], Sampling(0.0, max_tokens=6))[0] for request in requests]
    assert [s.token_ids.tolist() for s in together] == [s.token_ids.tolist() for s in alone]


def test_a_requests_own_limit_goes_before_the_settings(engine):
    requests = [Request(r.token_ids, r.seed, limit) for r, limit in zip(asked(3), (2, None, 5), strict=True)]
    samples = engine.generate(requests, Sampling(1.0, max_tokens=7))
    for sample, limit in zip(samples, (2, 7, 5), strict=True):
        assert len(sample.token_ids) <= limit
        assert sample.finish_reason == ("stop" if 1 in sample.token_ids else "length")


def test_settings_that_a_model_brings_do_not_change_what_is_sampled(engine):
    kept = engine._model.generation_config
    assert kept.eos_token_id == [1]
    assert (kept.top_k, kept.repetition_penalty) in ((0, None), (0, 1.0))


def test_a_score_is_that_of_a_plain_forward_pass_at_temperature_1_and_draws_no_random_number(engine):
    ids = np.array([20, 5, 7, 90, 33, 90, 12, 200, 41], np.int32)
    model = AutoModelForCausalLM.from_pretrained(engine._spec.model, dtype=torch.float32).eval()
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        right = model(tokens[None]).logits[0].double().log_softmax(-1)[torch.arange(8), tokens[1:]]
    before = torch.get_rng_state()
    scores = engine.score(ids)
    assert scores.dtype == np.float32 and torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(scores, right.numpy(), atol=1e-5, rtol=0)
    engine.generate(asked(3), Sampling(0.3, top_k=2, max_tokens=4))
    np.testing.assert_array_equal(engine.score(ids), scores)


def test_a_tensor_that_the_model_does_not_know_shows_in_the_receipt(engine):
    named = [(n, p.detach().clone()) for n, p in engine._model.named_parameters()]
    good = WeightBundle.pack(named, 1)
    prove([engine.load(good, "rollout-0", True)], good.entries, 1)
    odd = WeightBundle.pack([*named, ("model.extra.weight", torch.zeros(2))], 2)
    with pytest.raises(Exception, match=r"sync 2: model\.extra\.weight;"):
        prove([engine.load(odd, "rollout-0", True)], odd.entries, 2)


@pytest.mark.parametrize(
    ("said", "reason"), [("stop", "stop"), ("length", "length"), ("abort", "abort"), (None, "abort")]
)
def test_a_vllm_output_becomes_a_sample_with_the_chosen_tokens_log_probs(said, reason):
    logprobs = SimpleNamespace(start_indices=[0, 1], token_ids=[7, 9, 3], logprobs=[-0.5, -2.0, -1.0])
    sample = _sample(SimpleNamespace(token_ids=[7, 9], logprobs=logprobs, finish_reason=said), "ab")
    assert sample.token_ids.tolist() == [7, 9]
    assert sample.token_ids.dtype == np.int32
    np.testing.assert_array_equal(sample.logprobs, np.array([-0.5, -2.0], np.float32))
    assert (sample.finish_reason, sample.text) == (reason, "ab")


@pytest.mark.parametrize("sampled", [[7, 3], [7], [7, 9, 9]])
def test_log_probs_of_other_tokens_than_the_sampled_ones_are_refused(sampled):
    logprobs = SimpleNamespace(start_indices=[0, 1], token_ids=[7, 9], logprobs=[-0.5, -2.0])
    with pytest.raises(RuntimeError, match=f"^vLLM: got log-probs of other tokens than the {len(sampled)} that it"):
        _sample(SimpleNamespace(token_ids=sampled, logprobs=logprobs, finish_reason="stop"), "ab")


def test_a_response_without_tokens_is_a_sample():
    empty = SimpleNamespace(start_indices=[], token_ids=[], logprobs=[])
    sample = _sample(SimpleNamespace(token_ids=[], logprobs=empty, finish_reason="stop"), "")
    assert (sample.token_ids.tolist(), sample.logprobs.tolist()) == ([], [])
