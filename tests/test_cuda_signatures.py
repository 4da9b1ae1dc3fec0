"""What only a run on GPUs calls, held against the installed sources of torch, DeepSpeed and vLLM. No GPU is needed: these
tests show that the calls are accepted, not what they do on a device."""

import ast
import inspect
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from apportion.actors.engine import DeepSpeedEngine, World
from apportion.actors.engines import EngineSpec, Request, Sampling
from apportion.conf.defaults import BUCKET_ELEMENTS, engine_settings, rollout_settings
from apportion.conf.schema import PolicyConfig
from apportion.conf.schema_experience import RolloutConfig

pytestmark = pytest.mark.slow


def deepspeed_config(device: str = "cuda", dtype=torch.bfloat16, ranks: int = 2, trained: int = 10**9, **given):
    """What DeepSpeed is given for a policy rank on a GPU with all defaults but `given`."""
    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.settings, engine.world = engine_settings(PolicyConfig(**given), 1, None), World(size=ranks)
    engine.device = torch.device(device)
    return engine._config(dtype, trained)


@pytest.mark.parametrize(("ranks", "overlap"), [(1, False), (2, True)])
@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_deepspeed_takes_the_settings_of_a_gpu_and_knows_every_key(stage, ranks, overlap):
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = deepspeed_config(ranks=ranks, zero_stage=stage)
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):  # so a key that it knows not is refused
        DeepSpeedZeroConfig(**given["zero_optimization"], overlapping=True)
    read = DeepSpeedConfig(given)
    zero = read.zero_config
    assert (int(zero.stage), zero.reduce_bucket_size) == (2 if stage is None else stage, BUCKET_ELEMENTS)
    small = deepspeed_config(ranks=ranks, zero_stage=stage, trained=30_000)
    assert small["zero_optimization"]["reduce_bucket_size"] == 30_000  # what there is to send
    assert zero.overlap_comm is (overlap or stage == 3)  # at stage 3 DeepSpeed overlaps by itself
    assert zero.param_persistence_threshold == 0
    assert (read.grad_accum_dtype, read.bfloat16_config.enabled, read.gradient_clipping) == ("fp32", True, 1.0)
    assert read.zero_allow_untested_optimizer is True
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (1, 1)


def test_deepspeed_takes_an_optimizer_in_main_memory(monkeypatch):
    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = deepspeed_config(offload_optimizer=True, learning_rate=3e-6)
    zero = DeepSpeedConfig(given).zero_config
    assert (str(zero.offload_optimizer.device), zero.offload_optimizer.pin_memory) == ("cpu", True)
    assert given["optimizer"]["type"] == "AdamW" and given["optimizer"]["params"]["lr"] == 3e-6


@pytest.mark.parametrize(("device", "stage", "found"), [("cuda", 2, "fp32"), ("cuda", 0, None), ("cpu", 2, None)])
def test_float16_accumulates_in_float32_on_a_gpu_where_deepspeed_can(device, stage, found):
    given = deepspeed_config(device, torch.float16, zero_stage=stage)
    assert given["fp16"] == {"enabled": True}
    assert given.get("data_types", {}).get("grad_accum_dtype") == found


def test_fused_adam_knows_gpus_and_takes_the_step_of_foreach():
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    assert {"cuda", "cpu"} <= set(_get_fused_kernels_supported_devices())
    start = torch.linspace(-1, 1, 1001)
    steps = {}
    for fused in (True, False):
        engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
        engine.settings = engine_settings(PolicyConfig(learning_rate=1e-2, weight_decay=0.1), int(fused), None)
        assert engine.settings.fused_adam is fused
        flat = torch.nn.Parameter(start.clone())  # DeepSpeed swaps the parameters for one flat float32 partition
        optimizer = engine._adam([flat])
        for index in range(3):
            flat.grad = torch.sin(start * (index + 1) * 40)
            optimizer.step()
        steps[fused] = flat.detach()
    assert (steps[True] - start).abs().max() > 1e-2
    torch.testing.assert_close(steps[True], steps[False], rtol=1e-6, atol=1e-7)


def stub(name: str) -> ast.ClassDef:
    tree = ast.parse((Path(torch.__file__).parent / "_C" / "_distributed_c10d.pyi").read_text())
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def members(cls: ast.ClassDef) -> dict[str, list[str]]:
    """Names in a class of a stub, with the arguments of those that are functions."""
    found = {
        n.name: [a.arg for a in n.args.args if a.arg != "self"] for n in cls.body if isinstance(n, ast.FunctionDef)
    }
    return found | {n.target.id: [] for n in cls.body if isinstance(n, ast.AnnAssign)}


def test_a_channel_between_gpus_is_made_as_torch_declares_it(monkeypatch):
    from torch import distributed

    from apportion.platform import channel

    calls = []

    class Nccl:
        class Options:
            pass

        def __init__(self, *arguments):
            calls.append(arguments)

    monkeypatch.setattr(distributed, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(channel, "open_store", lambda *_: "store")
    channel.WeightChannel(channel.ChannelAddress("localhost", 1, 3, "nccl", 7.0), 2, "cuda:0")
    [chosen, (store, member, count, options)] = calls
    assert chosen == ("set_device", torch.device("cuda", 0))
    assert (store, member, count, options._timeout) == ("store", 2, 3, timedelta(seconds=7))
    assert members(stub("ProcessGroupNCCL"))["__init__"] == ["store", "rank", "size", "options"]
    backend = stub("Backend")
    [base] = [node for node in backend.body if isinstance(node, ast.ClassDef) and node.name == "Options"]
    assert "_timeout" in members(base)
    assert {"rootRank", "rootTensor"} <= members(stub("BroadcastOptions")).keys()
    assert {"wait"} <= members(stub("Work")).keys()


def test_the_functions_of_torch_cuda_that_are_called_exist():
    device = torch.device("cuda", 0)
    for function, arguments in (
        (torch.cuda.is_available, ()),
        (torch.cuda.device_count, ()),
        (torch.cuda.set_device, (device,)),
        (torch.cuda.synchronize, (device,)),
        (torch.cuda.get_rng_state_all, ()),
        (torch.cuda.set_rng_state_all, ([],)),
    ):
        inspect.signature(function).bind(*arguments)
    # Both variables that assembly.hosts sets are those that this torch reads.
    assert b"PYTORCH_CUDA_ALLOC_CONF" in (Path(torch.__file__).parent / "lib" / "libc10.so").read_bytes()


@pytest.fixture
def started(monkeypatch):
    """Starts our engine on a described platform, and returns it with what vLLM would be started with."""
    import vllm

    def start(on_gpu: bool, seeded: bool):
        seen = {}

        class Llm:
            def __init__(self, **arguments):
                seen.update(arguments)
                self.llm_engine = SimpleNamespace(step=list)

            def get_tokenizer(self):
                plain = dict.fromkeys(("eos_token", "bos_token", "pad_token", "unk_token"))
                return SimpleNamespace(added_tokens_decoder={}, all_special_ids=[], **plain)

        from apportion.actors.engines.vllm_engine import VllmEngine

        monkeypatch.setattr(vllm, "LLM", Llm)
        monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: not on_gpu))
        settings = rollout_settings(RolloutConfig(), 0.5 if on_gpu else 0)
        spec = EngineSpec(
            "m", "bfloat16", 0, 512, settings.max_sequences, 1, settings.gpu_memory_utilization, 1.0, settings.compile,
            True, False, 2, 0, seeded,
        )  # fmt: skip
        return VllmEngine(spec), seen

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "all")  # the engine sets these for its process: they are put back
    for name in (
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_LOGGING_LEVEL",
        "VLLM_NO_USAGE_STATS",
    ):
        monkeypatch.setenv(name, "0")
    return start


@pytest.mark.parametrize(
    ("on_gpu", "seeded", "right"),
    [(True, True, None), (True, False, None), (False, True, False), (False, False, None)],
)
def test_vllm_takes_what_an_engine_on_a_gpu_is_started_with(started, on_gpu, seeded, right):
    from vllm import LLM, EngineArgs

    _, seen = started(on_gpu, seeded)
    inspect.signature(LLM.__init__).bind(None, **seen)
    arguments = EngineArgs(**seen)
    assert arguments.enforce_eager is (not on_gpu)
    assert (arguments.max_num_seqs, arguments.gpu_memory_utilization) == ((256, 0.4) if on_gpu else (64, 0.9))
    assert arguments.enable_chunked_prefill is right  # None: vLLM's own choice
    assert arguments.logprobs_mode == "processed_logprobs"


@pytest.mark.parametrize(("stop", "detokenize"), [([], False), (["END"], True)])
def test_vllm_takes_flat_log_probs_and_makes_text_while_sampling_for_stop_texts_alone(started, stop, detokenize):
    engine, _ = started(True, False)
    params = engine._params(Sampling(0.7, 0.9, 5, 16, stop), Request(torch.arange(3).numpy(), seed=4, max_tokens=9))
    assert (params.flat_logprobs, params.logprobs, params.detokenize) == (True, 0, detokenize)
    assert (params.stop, params.stop_token_ids, params.ignore_eos, params.max_tokens) == (stop, [], False, 9)
