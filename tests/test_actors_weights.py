"""The live model of an engine against what it was sent: any difference is found, whatever form the layer keeps it in."""

import pytest
import torch
from torch import nn

from apportion.actors.engines.vllm_compare import compare_live
from apportion.actors.engines.vllm_engine import merge_receipts, thread_binding
from apportion.actors.engines.vllm_worker import Answer
from apportion.platform.weights import WeightBundle


class Method:
    def apply(self, module, x, bias=None):
        return module.cpu_linear(x, None, bias)


class Packed(nn.Module):
    """A linear layer that has thrown its matrix away, as vLLM on CPU does."""

    def __init__(self, weight: torch.Tensor, keep: bool = False) -> None:
        super().__init__()
        self.output_size_per_partition, self.input_size_per_partition = weight.shape
        self.hidden = weight.clone()
        self.weight = nn.Parameter(weight.clone() if keep else torch.empty(0, dtype=weight.dtype), requires_grad=False)
        self.quant_method = Method()
        self.cpu_linear = lambda x, weight, bias: x @ self.hidden.T


class Live(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, sent: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.layer.qkv_proj = Packed(torch.cat([sent[f"layer.{p}.weight"] for p in ("q_proj", "k_proj", "v_proj")]))
        self.layer.norm = nn.Module()
        self.layer.norm.weight = nn.Parameter(sent["layer.norm.weight"].clone())
        padded = torch.cat([sent["embed.weight"], torch.zeros(3, sent["embed.weight"].shape[1]).to(torch.bfloat16)])
        self.embed = Packed(padded, keep=True)
        self.lm_head = Packed(padded, keep=True)
        self.lm_head.weight = self.embed.weight


@pytest.fixture
def sent():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(torch.bfloat16)  # noqa: E731
    heights = {"q_proj": 520, "k_proj": 130, "v_proj": 130}
    weights = {f"layer.{name}.weight": draw(height, 576) for name, height in heights.items()}
    return weights | {"layer.norm.weight": draw(576), "embed.weight": draw(61, 576)}


def test_a_model_that_holds_what_was_sent_passes_in_all_its_parts(sent):
    # qkv, norm, embedding, and the tied head as one more form of the embedding
    assert compare_live(Live(sent), sent)[:2] == (4, [])


def last_bit(tensor: torch.Tensor, row: int, column: int) -> None:
    """The smallest change there is."""
    tensor.view(torch.int16)[row, column] ^= 1


def test_one_bit_of_one_repacked_weight_is_found_and_its_part_named(sent):
    live = Live(sent)
    last_bit(live.layer.qkv_proj.hidden, 520 + 7, 300)
    assert compare_live(live, sent)[:2] == (4, ["layer.k_proj.weight"])


def test_a_stale_packed_copy_of_tied_embeddings_is_found(sent):
    live = Live(sent)
    last_bit(live.lm_head.hidden, 60, 575)
    assert compare_live(live, sent)[:2] == (4, ["embed.weight"])


def test_one_bit_of_a_stored_parameter_is_found(sent):
    live = Live(sent)
    with torch.no_grad():
        live.layer.norm.weight[5] += 0.25
    assert compare_live(live, sent)[:2] == (4, ["layer.norm.weight"])


def test_what_an_engine_pads_the_vocabulary_with_does_not_matter(sent):
    live = Live(sent)
    with torch.no_grad():
        live.embed.weight[61:] = 9.0
    assert compare_live(live, sent)[:2] == (4, [])


def worker_of(sent: dict[str, torch.Tensor], place: int) -> nn.Module:
    """One of two tensor-parallel workers: half the rows of each part of qkv, half the columns of the next layer."""
    halves = {n: w.chunk(2)[place] for n, w in sent.items() if "_proj" in n}
    model = nn.Module()
    model.packed_modules_mapping = Live.packed_modules_mapping
    model.layer = nn.Module()
    model.layer.qkv_proj = Packed(torch.cat([halves[f"layer.{p}.weight"] for p in ("q_proj", "k_proj", "v_proj")]))
    model.layer.out = Packed(sent["layer.out.weight"].chunk(2, dim=1)[place])
    model.embed = Packed(
        torch.cat([sent["embed.weight"], torch.zeros(3, 576).to(torch.bfloat16)]).chunk(2)[place], keep=True
    )
    return model


@pytest.mark.parametrize("place", [0, 1])
def test_a_workers_share_is_compared_where_layers_are_cut_evenly_and_left_to_the_checksums_elsewhere(sent, place):
    sent["layer.out.weight"] = torch.randn(96, 576).to(torch.bfloat16)
    model = worker_of(sent, place)
    assert compare_live(model, sent, (place, 2))[:2] == (2, [])
    last_bit(model.layer.qkv_proj.hidden, 260 + 64, 3)  # the last row of this worker's k_proj
    last_bit(model.layer.out.hidden, 95, 287)
    assert compare_live(model, sent, (place, 2))[:2] == (2, ["layer.k_proj.weight", "layer.out.weight"])


def test_receipts_of_workers_join_so_that_one_wrong_worker_shows():
    bundle = WeightBundle.pack([("a", torch.zeros(2)), ("b", torch.ones(2))], 4)
    right = {e.name: e.checksum for e in bundle.entries}
    wrong = right | {"b": "0" * 16}
    one, other = Answer(right, 2, [], ["a", "b"], 8, []), Answer(wrong, 2, ["a"], ["b"], 4, [])
    for answers in ([one, other], [other, one]):
        receipt = merge_receipts(answers, bundle.entries, bundle.version, "rollout-1", True)
        assert (receipt.engine, receipt.version, receipt.checked_live, receipt.wrong) == ("rollout-1", 4, 4, ["a"])
        assert receipt.checksums == wrong
        assert (receipt.proved, receipt.read_bytes) == (["b"], 12)  # proved in one worker alone is not proved


@pytest.mark.parametrize(
    ("first", "threads", "workers", "allowed", "expected"),
    [
        (0, 2, 1, [0, 1], "0,1"),
        (0, 4, 1, [4, 5], "4,5"),
        (2, 2, 1, [0, 1, 2, 3], "2,3"),
        (0, 4, 2, [0, 1, 2, 3], "0,1|2,3"),
        (0, 1, 2, [6], "6|6"),
        (8, 2, 1, [0, 1], "0,1"),
    ],
)
def test_workers_get_cores_that_this_process_may_use(first, threads, workers, allowed, expected):
    from types import SimpleNamespace

    spec = SimpleNamespace(first_thread=first, threads=threads, tensor_parallel_size=workers)
    assert thread_binding(spec, allowed) == expected
