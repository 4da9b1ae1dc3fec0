"""Where transformers' engine ends a response: at a stop string, at an end token, never in its padding."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apportion.actors.engines import EngineSpec, Request, Sampling, make_engine
from apportion.actors.engines.transformers_engine import TransformersEngine
from apportion.data.response_text import ResponseText

END, PAD = 2, 0


class Letters:
    """A tokenizer of which 0, 1 and 2 are special and every other id is a character."""

    def __init__(self, pad):
        self.pad_token_id, self.eos_token_id = pad, END
        self.eos_token = self.bos_token = self.pad_token = self.unk_token = None
        self.added_tokens_decoder, self.all_special_ids = {}, [0, 1, 2]

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i) if i > 2 else f"<{i}>" for i in ids if i > 2 or not skip_special_tokens)


def cut(pad, ids, stop=()):
    engine = object.__new__(TransformersEngine)
    engine._tokenizer = Letters(pad)
    engine._spell = ResponseText(engine._tokenizer)
    engine._model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[END]))
    logprobs = -torch.arange(1.0, len(ids) + 1)
    sample = engine._cut(torch.tensor(ids), logprobs, Sampling(stop=list(stop)))
    assert sample.logprobs.tolist() == logprobs[: len(sample.token_ids)].tolist()
    assert (sample.token_ids.dtype, sample.logprobs.dtype) == (np.int32, np.float32)
    return sample.token_ids.tolist(), sample.finish_reason, sample.text


@pytest.mark.parametrize("pad", [END, PAD], ids=["padded_with_the_end_token", "padded_with_another"])
def test_a_row_ends_at_its_stop_string_or_at_its_first_end_token_and_its_padding_is_left_out(pad):
    assert cut(pad, [97, 46, pad, pad, pad], ".") == ([97, 46], "stop", "a.")
    assert cut(pad, [97, 46, 98, 46], ".") == ([97, 46], "stop", "a.")
    assert cut(pad, [97, END, pad, pad], ".") == ([97, END], "stop", "a")
    assert cut(pad, [97, END, pad, pad]) == ([97, END], "stop", "a")
    assert cut(pad, [97, END, 46, pad], ".") == ([97, END], "stop", "a")  # nothing after the end token counts
    assert cut(pad, [97, 98, 99], ".") == ([97, 98, 99], "length", "abc")
    assert cut(pad, [97, 1, pad, pad], "<1>") == ([97, 1], "stop", "a")  # the name of a special token


def test_padding_that_was_sampled_stays():
    assert cut(PAD, [97, PAD, 98, PAD], ".") == ([97, PAD, 98, PAD], "length", "ab")
    assert cut(PAD, [97, PAD, 46, PAD], ".") == ([97, PAD, 46], "stop", "a.")


def test_a_stop_string_of_several_tokens_ends_with_the_one_that_completes_the_first_of_them():
    ids = [97, 98, 99, 100, END]
    assert cut(END, ids, ["bcd", "bc"]) == ([97, 98, 99], "stop", "abc")


@pytest.fixture(scope="module")
def engine(tiny):
    spec = EngineSpec(
        model=tiny, dtype="float32", seed=0, max_model_len=64, max_sequences=8, tensor_parallel_size=1,
        gpu_memory_utilization=0.5, kv_cache_gib=1.0, compile=False, prefix_caching=True, trust_remote_code=False,
        threads=1, first_thread=0,
    )  # fmt: skip
    threads = torch.get_num_threads()
    yield make_engine("transformers", spec)
    torch.set_num_threads(threads)


def test_rows_of_a_batch_that_stopped_before_others_have_no_padding(engine):
    requests = [Request(np.arange(20 + i, 24 + 2 * i, dtype=np.int32), seed=i) for i in range(6)]
    decode = engine._tokenizer.decode
    whole = engine.generate(requests, Sampling(1.0, max_tokens=16))
    letters = "".join(sorted({c for sample in whole for c in sample.text if c.isascii() and c.isalpha()}))
    assert len(letters) > 3
    samples = engine.generate(requests, Sampling(1.0, max_tokens=16, stop=list(letters)))
    stopped = [s for s in samples if s.text[-1:] and s.text[-1:] in letters]
    assert len({len(s.token_ids) for s in stopped}) > 1 and min(len(s.token_ids) for s in stopped) < 15
    for sample in stopped:
        ids = sample.token_ids
        assert sample.finish_reason == "stop" and len(sample.logprobs) == len(ids)
        assert decode(ids[-1:], skip_special_tokens=True) == sample.text[-1]
        assert not set(decode(ids[:-1], skip_special_tokens=True)) & set(letters)
        assert engine._pad_id() not in ids
