"""The training engine: one optimiser over one module on a group of ranks. DeepSpeed behind a small interface.

Losses are sums with global weights already in them, so gradients of ranks and micro-batches are added, never averaged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from apportion.actors.engine_settings import EngineSettings
from apportion.actors.extensions import compile_extensions
from apportion.actors.loading import tensors_only
from apportion.platform import progress
from apportion.platform.errors import ConfigError, TrainingError
from apportion.platform.rendezvous import open_store
from apportion.platform.schedule import learning_rate_at

M = TypeVar("M")
T = TypeVar("T")


@dataclass
class World:
    """Where this rank stands among those that train together."""

    rank: int = 0
    size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = 0
    threads: int | None = None
    seed: int = 0
    deterministic: bool = False
    timeout_seconds: float = 1800.0  # of joining, and of waiting for a rank that writes a checkpoint


@dataclass
class OptimizerStep:
    grad_norm: float | None  # None: float16's loss scale was too high, the step was left out
    learning_rate: float


class TrainingEngine(Protocol):
    """What the policy and the critic ask of an engine; another engine joins by implementing this."""

    device: torch.device
    optimizer_steps: int

    def module(self) -> nn.Module: ...
    def train_step(self, micro_batches: Sequence[M], empty: M, loss: Callable[[M], Tensor]) -> OptimizerStep: ...
    def extra_passes(self, own: int) -> int: ...
    def gather(self, value: T) -> list[T]: ...
    def summed(self, tensor: Tensor) -> Tensor: ...
    def named_weights(self) -> Iterator[tuple[str, Tensor]]: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


class DeepSpeedEngine:
    """DeepSpeed, ZeRO 0 to 3, bf16 with float32 masters, on CPU (gloo) or GPU (nccl)."""

    def __init__(self, module: nn.Module, settings: EngineSettings, world: World, total_steps: int) -> None:
        if settings.zero_stage == 3 and world.size > 1 and getattr(module, "calls_head_by_chunk", False):
            raise ConfigError(
                f"policy.zero_stage: got 3 on {world.size} ranks with an output head that is more than a matrix (adapted, "
                "quantised), expected 0, 1 or 2, or policy.lora.targets without the head: ZeRO-3 gathers at each call of "
                "it, and ranks have different numbers of chunks"
            )
        import deepspeed

        self.settings = settings
        self.world = world
        self.total_steps = total_steps
        self.optimizer_steps = 0
        self.device = join_world(world, settings.offload_optimizer)
        trainable = [p for p in module.parameters() if p.requires_grad]
        dtype = next(p.dtype for p in trainable)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=trainable,
            optimizer=None if settings.offload_optimizer else self._adam(trainable),
            config=self._config(dtype, sum(p.numel() for p in trainable)),
        )
        self._engine.checkpoint_engine = _safe_checkpoint_engine()

    def _adam(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        s = self.settings
        return torch.optim.AdamW(
            parameters,
            lr=s.learning_rate,
            betas=(s.adam_beta1, s.adam_beta2),
            eps=s.adam_eps,
            weight_decay=s.weight_decay,
            fused=s.fused_adam,
            foreach=not s.fused_adam,
        )

    def _config(self, dtype: torch.dtype, trained: int) -> dict[str, Any]:
        s = self.settings
        zero: dict[str, Any] = {"stage": s.zero_stage, "stage3_param_persistence_threshold": 0}
        if s.zero_stage > 0 and s.overlap_comm and self.world.size > 1:  # takes a second bucket; one rank sends nothing
            zero["overlap_comm"] = True
        if s.zero_stage > 0:  # never more than there is to send: DeepSpeed allocates a bucket whole, whatever the model
            zero["reduce_bucket_size"] = min(s.bucket_elements, trained)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": s.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "wall_clock_breakdown": False,
        }
        if s.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
            config["optimizer"] = {
                "type": "AdamW",
                "params": {
                    "lr": s.learning_rate,
                    "betas": [s.adam_beta1, s.adam_beta2],
                    "eps": s.adam_eps,
                    "weight_decay": s.weight_decay,
                },
            }
        if dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True}
            if s.zero_stage > 0:  # DeepSpeed accumulates in bf16 at stage 0, whatever is asked
                config["data_types"] = {"grad_accum_dtype": "fp32"}
        elif dtype == torch.float16:
            config["fp16"] = {"enabled": True}
            if s.zero_stage > 0 and self.device.type == "cuda":  # on CPUs as ever: in float16
                config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config

    def module(self) -> nn.Module:
        return self._engine.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self._engine(*args, **kwargs)
        progress.advance()
        return out

    def train_step(self, micro_batches: Sequence[M], empty: M, loss: Callable[[M], Tensor]) -> OptimizerStep:
        """One optimiser step over this rank's micro-batches.

        Every rank must make the same number of passes, since ZeRO communicates in each: ranks with fewer add `empty`,
        a micro-batch whose loss is multiplied by 0 (and should count for nothing in metrics). TrainingError where the
        gradient's norm is not finite.
        """
        engine, rate = self._engine, learning_rate_at(self.optimizer_steps, self.total_steps, self.settings)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        passes = max(1, self._most_passes(len(micro_batches)))
        engine.train()
        for index in range(passes):
            real = index < len(micro_batches)
            engine.set_gradient_accumulation_boundary(index == passes - 1)
            value = loss(micro_batches[index] if real else empty)
            # DeepSpeed averages gradients over ranks; the weights in the loss are global, so they must be summed.
            engine.backward(value * (self.world.size if real else 0.0), scale_wrt_gas=False)
            norm = self._plain_grad_norm() if index == passes - 1 else None
            engine.step()
        self.optimizer_steps += 1
        # float16: a gradient too large at this loss scale, which DeepSpeed lowers.
        if engine.fp16_enabled() and not engine.was_step_applied():
            return OptimizerStep(None, rate)
        size = float(engine.get_global_grad_norm() if norm is None else norm)
        # DeepSpeed says -1 for NaN and infinity. All ranks have the same norm, so none is left waiting in a collective.
        if not math.isfinite(size) or size < 0:
            raise TrainingError(
                f"optimiser step {self.optimizer_steps}: got a gradient that is not finite, expected numbers; the "
                "weights in memory are spoilt and are not saved: lower the learning rate or bound the rewards "
                "(reward.clip), and resume from the last checkpoint"
            )
        return OptimizerStep(size, rate)

    def _plain_grad_norm(self) -> Tensor | None:
        """Before clipping; None where DeepSpeed's own optimiser wrapper keeps it."""
        if isinstance(self._engine.optimizer, torch.optim.Optimizer):
            return nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])
        return None

    def extra_passes(self, own: int) -> int:
        """Forward passes this rank must make beyond its `own`, so that all ranks make as many; every rank must ask.

        Only ZeRO-3 communicates in a forward pass; 0 otherwise.
        """
        return self._most_passes(own) - own if self.settings.zero_stage == 3 else 0

    def _most_passes(self, own: int) -> int:
        if self.world.size == 1:
            return own
        count = torch.tensor([own], device=self.device)
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
        return int(count.item())

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of ranks; every rank must call it."""
        found = [value] * self.world.size
        if self.world.size > 1:
            torch.distributed.all_gather_object(found, value)
        return found

    def summed(self, tensor: Tensor) -> Tensor:
        """`tensor` added up over the ranks, in place; every rank must call it with the same shape."""
        if self.world.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors in the forward pass's dtype, under ZeRO-3 gathered one by one. Every rank must iterate."""
        import deepspeed

        for name, parameter in self._engine.module.named_parameters():
            sharded = self.settings.zero_stage == 3
            with deepspeed.zero.GatheredParameters([parameter]) if sharded else nullcontext():
                yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        """This rank's part of weights, masters and optimiser; every rank must call it."""
        self._engine.save_checkpoint(str(folder), tag="engine", client_state={"optimizer_steps": self.optimizer_steps})

    def load(self, folder: Path) -> None:
        if not (folder / "engine").is_dir():
            raise FileNotFoundError(f"no training state under {folder}, expected a folder 'engine' written by save()")
        path, state = self._engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise FileNotFoundError(f"{folder}/engine: nothing in it that this ZeRO stage and number of ranks can read")
        self.optimizer_steps = int(state["optimizer_steps"])
        self._keep_kernel()

    def _keep_kernel(self) -> None:
        """Step with this engine's kernel. A checkpoint brings the one that it was written with: on a GPU an older one, or
        one from CPUs, would bring `foreach` and its float32 copy of the weights."""
        if self.settings.offload_optimizer:
            return
        fused, optimizer = self.settings.fused_adam, self._engine.basic_optimizer
        for group in optimizer.param_groups:
            group.update(fused=fused, foreach=not fused)
        for parameter, state in optimizer.state.items():
            state["step"] = state["step"].to(parameter.device if fused else "cpu", torch.float32)


def on_rank_0(named: Iterator[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    """Copies in main memory on rank 0, nothing on the others, which take part in the gathering and keep none of it: no
    GPU has room for a second model."""
    copies = {}
    for name, tensor in named:
        if world.rank == 0:
            copies[name] = tensor.to("cpu", copy=True)
    return copies


def own_device() -> torch.device:
    """The GPU that Ray shows this process, by its index (NCCL wants one), or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def join_world(world: World, offloads: bool = False) -> torch.device:
    """Set this process up as one rank: threads, seeds, compiled parts, process group. Returns its device."""
    device = own_device()
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK="0",
        MASTER_ADDR=world.master_address,
        MASTER_PORT=str(world.master_port),
    )
    if world.threads:
        torch.set_num_threads(world.threads)
    torch.manual_seed(world.seed)
    if world.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    import deepspeed

    compile_extensions(offloads)
    if not torch.distributed.is_initialized():
        limit = timedelta(seconds=world.timeout_seconds)
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = open_store(world.master_address, world.master_port, world.size, world.rank == 0, limit, wait=False)
        bound = device if backend == "nccl" and world.size > 1 else None
        torch.distributed.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=limit, device_id=bound
        )
        deepspeed.init_distributed(backend, verbose=False, timeout=limit)
    return device


def _safe_checkpoint_engine() -> Any:
    """DeepSpeed's torch format, read with weights_only=True: a checkpoint is data, never code."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class SafeCheckpointEngine(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
            from deepspeed.runtime.zero.config import ZeroStageEnum
            from deepspeed.utils.tensor_fragment import fragment_address

            allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
            with tensors_only(path), torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)

    return SafeCheckpointEngine()
