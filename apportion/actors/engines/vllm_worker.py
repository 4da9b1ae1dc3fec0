"""What runs inside vLLM's worker: takes weights, and compares the live model with what it was sent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from apportion.actors.engines.checkpoint_names import CheckpointWeights, converter_of
from apportion.actors.engines.vllm_compare import TURNS, Compared, compare_live, cpu_packing
from apportion.actors.engines.vllm_layout import is_experts
from apportion.actors.engines.vllm_log import collected_log, is_machine_failure, load_errors
from apportion.platform.channel import ChannelAddress, WeightChannel
from apportion.platform.device_memory import device_memory
from apportion.platform.weights import TensorEntry, WeightBundle, checksum, receive


class Answer(NamedTuple):
    """One worker's part of a receipt. Names are those of sent tensors."""

    checksums: dict[str, str]  # of what it received
    checked: int  # live parameters compared
    wrong: list[str]
    proved: list[str]
    read_bytes: int
    errors: list[str]  # why weights were not loaded


class WeightReceiver:
    """Mixed into vLLM's worker class (`worker_extension_cls`)."""

    def apportion_load(self, bundle: WeightBundle, check: bool) -> Answer:
        """Load, and with `check` prove it."""
        sums = {e.name: e.checksum for e in bundle.entries}
        sent = self._checkpoint(bundle)
        errors = self._load(sent)
        if errors or not check:
            return Answer(sums, 0, [], [], 0, errors)
        sums = {e.name: checksum(bundle.data[e.offset : e.offset + e.size]) for e in bundle.entries}
        return Answer(sums, *self._compare(sent, bundle.version % TURNS), errors)

    def apportion_load_file(self, path: str, index: list[tuple], version: int, check: bool) -> Answer:
        """As `apportion_load`, where the worker is a process of its own: the bytes lie in a file in shared memory."""
        entries = entries_of(index)
        data = np.memmap(path, np.uint8, mode="r")
        return self.apportion_load(WeightBundle(version, entries, data), check)

    def apportion_join(self, address: tuple, first_member: int) -> None:
        """Become a member of the channel that `apportion_receive` takes weights from."""
        from vllm.distributed import get_tensor_model_parallel_rank

        member = first_member + get_tensor_model_parallel_rank()
        self.apportion_channel = WeightChannel(ChannelAddress(*address), member, self.device)  # type: ignore[attr-defined]

    def apportion_receive(self, index: list[tuple], version: int, check: bool) -> Answer:
        """As `apportion_load`, with the bytes from the channel."""
        entries = entries_of(index)
        return self.apportion_load(WeightBundle(version, entries, receive(self.apportion_channel, entries)), check)

    def apportion_compare(self, bundle: WeightBundle, turn: int | None = None) -> Compared:
        """The live model against a bundle, without loading it. `turn`: see `compare_live`."""
        return self._compare(self._checkpoint(bundle), turn)

    def apportion_device_memory(self) -> tuple[int, int] | None:
        """Peak and use of this worker's GPU, in bytes."""
        memory = device_memory()
        return None if memory is None else (memory.peak, memory.used)

    def _checkpoint(self, bundle: WeightBundle) -> CheckpointWeights:
        model = self.model_config  # type: ignore[attr-defined]
        return CheckpointWeights(dict(bundle.tensors()), converter_of(model.model, model.trust_remote_code))

    def _load(self, sent: CheckpointWeights) -> list[str]:
        """Load into the live model. Returns why weights were not loaded."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        with collected_log() as records:
            try:
                self.reload_weights(weights_iterator=((name, sent[name]) for name in sent))  # type: ignore[attr-defined]
            except (ValueError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
                if is_machine_failure(error):
                    raise
                return [" ".join(f"{type(error).__name__}: {error}".split())[:500]]
        errors = load_errors(records, model)
        if not errors:
            repack_shared(model)
            repack_experts(model)
        return errors

    def _compare(self, sent: CheckpointWeights, turn: int | None) -> Compared:
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        share = (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        return by_sent_name(compare_live(self.model_runner.get_model(), sent, share, turn), sent)  # type: ignore[attr-defined]


def by_sent_name(compared: Compared, sent: CheckpointWeights) -> Compared:
    """From the checkpoint's names to the sent tensors': one is proved if all that is made of it is."""
    unproved = {name for checkpoint in sent.keys() - set(compared.proved) for name in sent.sent_names[checkpoint]}
    every = dict.fromkeys(name for names in sent.sent_names.values() for name in names)
    wrong = dict.fromkeys(name for checkpoint in compared.wrong for name in sent.sent_names[checkpoint])
    return compared._replace(wrong=list(wrong), proved=[name for name in every if name not in unproved])


def entries_of(index: list[tuple]) -> list[TensorEntry]:
    """What `index_of` was made from, on the other side of a process boundary."""
    return [TensorEntry(n, d, tuple(s), o, z, c) for n, d, s, o, z, c in index]


def index_of(entries: Iterable[TensorEntry]) -> list[tuple[str, str, list[int], int, int, str]]:
    return [(e.name, e.dtype, list(e.shape), e.offset, e.size, e.checksum) for e in entries]


@torch.no_grad()
def repack_shared(model: torch.nn.Module) -> None:
    """Pack anew what a module borrows from another (a tied lm_head). vLLM on CPU packs a matrix when it is loaded for the
    module itself, so a borrower would keep the packed copy of the earlier weights."""
    users: dict[int, list[Any]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(module)
    for modules in users.values():
        for module in modules if len(modules) > 1 else []:
            if hasattr(module, "cpu_linear") and hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)


@torch.no_grad()
def repack_experts(model: torch.nn.Module) -> None:
    """Pack loaded experts for vLLM's kernel on CPU. vLLM does so when the engine starts, and not in a reload."""
    for module in model.modules():
        packing = cpu_packing(module) if is_experts(module) else None
        if packing is not None:
            for weight in (module.w13_weight, module.w2_weight):
                for matrix in weight.data:
                    matrix.copy_(packing(matrix))
