"""Which sent tensors a worker can prove: experts, modules without a matrix, layers sharded unevenly, and what it misses."""

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from apportion.actors.engines.checkpoint_names import CheckpointWeights, converter_of
from apportion.actors.engines.vllm_compare import compare_live
from apportion.actors.engines.vllm_layout import Block, expected_blocks
from apportion.actors.engines.vllm_log import collected_log, load_errors
from apportion.actors.engines.vllm_worker import WeightReceiver, by_sent_name, repack_shared
from apportion.platform.errors import WeightSyncError
from apportion.platform.weights import SyncReceipt, WeightBundle, prove

# mixtures of experts


class RoutedExperts(nn.Module):
    """As vLLM's layer of experts: gate and up projections in one parameter, down projections in another."""

    def __init__(self, count: int, hidden: int, inner: int, backend: str = "TRITON") -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.w2_weight = nn.Parameter(torch.empty(count, hidden, inner))
        self.quant_method = SimpleNamespace(unquantized_backend=SimpleNamespace(name=backend))

    def get_expert_mapping(self):
        parts = (
            ("experts.w13_", "gate_proj", "w1"),
            ("experts.w13_", "up_proj", "w3"),
            ("experts.w2_", "down_proj", "w2"),
        )
        count = len(self.w13_weight)
        return [(live, f"experts.{e}.{name}.", e, shard) for e in range(count) for live, name, shard in parts]


@pytest.fixture
def mixture(tmp_path):
    """A tiny mixture: what its trainer sends, as its checkpoint has it, and a live model that holds exactly that."""
    torch.manual_seed(5)
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, moe_intermediate_size=6, num_hidden_layers=1, num_experts=3,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4, decoder_sparse_step=1,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    named = {n: p.detach() for n, p in model.named_parameters()}
    sent = CheckpointWeights(named, converter_of(str(tmp_path), False))
    live = nn.Module()
    live.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    for name in sent:
        if ".experts." not in name:
            *path, last = name.split(".")
            module = live
            for step in path:
                if not hasattr(module, step):
                    module.add_module(step, nn.Module())
                module = getattr(module, step)
            module.register_parameter(last, nn.Parameter(sent[name].clone()))
    live.model.layers = nn.ModuleList([live.model.layers.get_submodule("0")])
    block = live.model.layers[0].mlp
    block.experts = nn.Module()
    block.experts.routed_experts = RoutedExperts(3, 8, 6)
    hold_experts(block.experts.routed_experts, sent)
    return named, sent, live


def hold_experts(layer, sent):
    root = "model.layers.0.mlp.experts"
    with torch.no_grad():
        for e in range(3):
            layer.w13_weight[e] = torch.cat([sent[f"{root}.{e}.{name}.weight"] for name in ("gate_proj", "up_proj")])
            layer.w2_weight[e] = sent[f"{root}.{e}.down_proj.weight"]


def proof(named, sent, live):
    """The receipt that an engine with this live model gives, held against the bundle."""
    bundle = WeightBundle.pack(named.items(), 4)
    compared = by_sent_name(compare_live(live, sent), sent)
    sums = {e.name: e.checksum for e in bundle.entries}
    receipt = SyncReceipt("rollout-0", 4, sums, compared.checked, compared.wrong, compared.proved, compared.read_bytes)
    prove([receipt], bundle.entries, 4)
    return receipt


def test_names_and_values_are_those_of_the_files(mixture, tmp_path):
    from safetensors.torch import load_file

    _, sent, _ = mixture
    saved = load_file(tmp_path / "model.safetensors")
    assert set(sent) == set(saved)
    for name in sent:
        assert torch.equal(sent[name], saved[name]), name
    experts = [f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in range(3) for part in ("gate", "up")]
    assert all(sent.sent_names[name] == ["model.layers.0.mlp.experts.gate_up_proj"] for name in experts)


def test_every_byte_of_a_mixture_is_proved(mixture):
    named, _, _ = mixture
    receipt = proof(*mixture)
    assert set(receipt.proved) == set(named)
    assert receipt.read_bytes == sum(t.nbytes for t in named.values())


@pytest.mark.parametrize(
    ("parameter", "name"), [("w13_weight", "gate_up_proj"), ("w2_weight", "down_proj")], ids=["gate and up", "down"]
)
def test_one_expert_that_kept_its_earlier_weights_fails_the_sync_by_name(mixture, parameter, name):
    _, _, live = mixture
    with torch.no_grad():
        getattr(live.model.layers[0].mlp.experts.routed_experts, parameter)[2, 1, 3] += 0.5
    with pytest.raises(
        WeightSyncError, match=rf"1 of 14 tensors are not .* sync 4: model\.layers\.0\.mlp\.experts\.{name};"
    ):
        proof(*mixture)


def test_experts_in_a_layout_that_is_not_known_fail_the_sync_by_name(mixture):
    _, _, live = mixture
    live.model.layers[0].mlp.experts.routed_experts.quant_method.unquantized_backend.name = "NEWEST"
    with pytest.raises(
        WeightSyncError, match=r"2 of 14 sent tensors were not compared .*experts\.gate_up_proj, .*experts\.down_proj;"
    ):
        proof(*mixture)


def test_experts_of_a_layer_that_is_not_found_fail_the_sync_by_name(mixture):
    """As with a kernel that keeps experts under other names."""
    _, _, live = mixture
    del live.model.layers[0].mlp.experts.routed_experts
    with pytest.raises(
        WeightSyncError, match=r"2 of 14 sent tensors were not compared .*experts\.gate_up_proj, .*experts\.down_proj;"
    ):
        proof(*mixture)


# modules that are not linear layers


class Odd(nn.Module):
    """Parameters beside a weight that is absent, None or a list, as in recurrent layers."""

    def __init__(self, weight) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.arange(3.0))
        self.quant_method, self.cpu_linear = None, None
        if weight == "none":
            self.weight = None
        elif weight == "list":
            self.weight = nn.ParameterList([nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize("weight", ["absent", "none", "list"])
def test_a_module_without_one_weight_is_compared_like_any_other(weight):
    model = nn.Module()
    model.mixer = Odd(weight)
    sent = {n: p.detach().clone() for n, p in model.named_parameters()}
    repack_shared(model)
    compared = compare_live(model, sent)
    assert (compared.wrong, compared.proved) == ([], list(sent))
    with torch.no_grad():
        model.mixer.A_log[1] = 9
    assert compare_live(model, sent).wrong == ["mixer.A_log"]


def test_a_matrix_that_is_gone_and_cannot_be_read_back_is_not_proved():
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.weight = nn.Parameter(torch.empty(0))
    assert compare_live(model, {"layer.weight": torch.ones(2, 2)}) == (0, [], [], 0)


def test_a_number_without_axes_is_compared():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    assert compare_live(model, {"scale": torch.tensor(2.0)}) == (1, [], ["scale"], 4)
    assert compare_live(model, {"scale": torch.tensor(3.0)}).wrong == ["scale"]


# several workers


def rows(height: int, first: int = 0) -> torch.Tensor:
    return (first + torch.arange(2.0 * height)).view(height, 2)


def qkv(workers: int):
    """As vLLM's QKVParallelLinear of 4 query heads and 2 key-value heads of 3 rows each."""
    shared = max(1, workers // 2)
    return SimpleNamespace(
        tp_size=workers, num_kv_head_replicas=shared, total_num_heads=4, total_num_kv_heads=2, num_heads=4 // workers,
        num_kv_heads=max(1, 2 // workers), head_size=3, output_sizes=[12, 6, 6],
    )  # fmt: skip


@pytest.mark.parametrize("on_disk", ["apart", "fused"])
@pytest.mark.parametrize("place", range(4))
def test_more_workers_than_key_value_heads_hold_copies_of_them(on_disk, place):
    q, k, v = rows(12), rows(6, 100), rows(6, 200)
    parts = (
        [Block("q", q), Block("k", k), Block("v", v)] if on_disk == "apart" else [Block("qkv", torch.cat([q, k, v]))]
    )
    found = expected_blocks(qkv(4), (9, 2), parts, (place, 4))
    head = place // 2  # two workers share one
    right = [q[3 * place : 3 * place + 3], k[3 * head : 3 * head + 3], v[3 * head : 3 * head + 3]]
    assert [torch.equal(block.rows, want) for block, want in zip(found, right, strict=True)] == [True] * 3


def test_a_layer_that_is_fused_on_disk_is_sharded_component_by_component():
    gate, up = rows(4), rows(4, 50)
    module = SimpleNamespace(tp_size=2, output_sizes=[4, 4])
    found = expected_blocks(module, (4, 2), [Block("gate_up", torch.cat([gate, up]))], (1, 2))
    assert torch.equal(torch.cat([b.rows for b in found]), torch.cat([gate[2:], up[2:]]))


@pytest.mark.parametrize(("place", "start", "end"), [(0, 0, 4), (1, 4, 6)])
def test_a_padded_vocabulary_is_compared_where_it_has_tokens(place, start, end):
    indices = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=end)
    module = SimpleNamespace(tp_size=2, shard_indices=indices)
    [block] = expected_blocks(module, (4, 2), [Block("embed", rows(6))], (place, 2))
    assert torch.equal(block.rows, rows(6)[start:end])


def test_a_layer_that_every_worker_holds_whole_is_not_sharded():
    found = expected_blocks(SimpleNamespace(tp_size=1), (6, 2), [Block("gate", rows(6))], (1, 2))
    assert torch.equal(found[0].rows, rows(6))


# what vLLM says


class RotaryEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", torch.zeros(2))


class OAIAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sinks, self.rotary = nn.Parameter(torch.zeros(2)), RotaryEmbedding()


@pytest.fixture
def vllm_logger():
    """Loggers as vLLM sets them up, under a name of their own; the level is the user's."""
    root, child = logging.getLogger("madeup"), logging.getLogger("madeup.reload.layerwise")
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    root.addHandler(handler)
    root.propagate = False
    yield root, child, shown
    root.removeHandler(handler)
    root.setLevel(logging.NOTSET)


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL])
def test_warnings_are_collected_whatever_level_the_user_chose_and_shown_only_from_there(vllm_logger, level):
    root, child, shown = vllm_logger
    root.setLevel(level)
    handlers = list(root.handlers)
    with collected_log("madeup") as records:
        child.warning("%s: Failed to load weights", "OAIAttention")
    assert [r.getMessage() for r in records] == ["OAIAttention: Failed to load weights"]
    assert bool(shown) == (level <= logging.WARNING)
    child.warning("after it")
    assert len(records) == 1 and root.level == level and root.handlers == handlers


def test_logging_that_the_user_switched_off_is_collected_too(vllm_logger):
    _, child, shown = vllm_logger
    logging.disable(logging.CRITICAL)
    try:
        with collected_log("madeup") as records:
            child.warning("x")
        assert (len(records), shown, logging.root.manager.disable) == (1, [], logging.CRITICAL)
    finally:
        logging.disable(logging.NOTSET)


def said(*texts: str, level: int = logging.WARNING) -> list[logging.LogRecord]:
    return [logging.LogRecord("vllm", level, "", 0, text, None, None) for text in texts]


@pytest.mark.parametrize(
    "text",
    [
        "Following weights were not loaded from checkpoint: {'model.norm.weight'}",
        "Parameter model.x not found in params_dict, skip loading",
        "Skipping loading of weight model.y",
        "Could not load the tensor z",
    ],
)
def test_what_vllm_says_about_weights_that_it_left_out_is_an_error(text):
    assert load_errors(said(text), nn.Module()) == [text]


def test_a_layer_that_kept_parameters_is_an_error_and_a_table_or_a_borrowed_matrix_is_not():
    model = nn.Module()
    model.attention, model.embed, model.head = OAIAttention(), nn.Embedding(2, 2), nn.Linear(2, 2, bias=False)
    model.head.weight = model.embed.weight
    failed = [f"{name}: Failed to load weights" for name in ("RotaryEmbedding", "Linear", "OAIAttention")]
    assert load_errors(said(*failed), model) == ["OAIAttention: failed to load weights (attention.sinks)"]


def test_other_warnings_are_no_errors_and_every_error_is():
    harmless = "Allocating 3.0 MB of device memory to buffers to load ['A', 'B'] layers."
    assert load_errors(said(harmless), nn.Module()) == []
    assert load_errors(said("anything", level=logging.ERROR), nn.Module()) == ["anything"]


class Failing(WeightReceiver):
    """A worker whose reload fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.model_runner = SimpleNamespace(get_model=nn.Module)

    def reload_weights(self, weights_iterator) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_lack_of_memory_in_a_reload_is_not_called_a_weight_that_was_not_loaded(error):
    with pytest.raises(RuntimeError) as raised:
        Failing(error)._load(CheckpointWeights({}, None))
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (4)\nmust match the size of tensor b (8)"),
        ValueError("There is no module named 'x'"),
        KeyError("layers.0.mlp.experts.w13_bias"),
    ],
)
def test_a_reload_that_refuses_a_tensor_says_why_in_one_line(error):
    [line] = Failing(error)._load(CheckpointWeights({}, None))
    assert line == f"{type(error).__name__}: {' '.join(str(error).split())}"
