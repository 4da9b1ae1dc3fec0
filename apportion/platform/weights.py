"""Weights on their way from the trainer to the rollout engines: packed, checksummed, versioned.

A `WeightBundle` is plain bytes and an index, so Ray's object store maps it into every reader of a node without a copy.
Checksums are xxh3 of each tensor's bytes, made by the sender from its own tensors and by the receiver from what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from apportion.platform.errors import WeightSyncError

PIECE_BYTES = 2**28  # of a broadcast, so that a device never holds a second model


@dataclass
class TensorEntry:
    name: str
    dtype: str  # torch name, "bfloat16"
    shape: tuple[int, ...]
    offset: int  # in bytes
    size: int
    checksum: str

    def view(self, raw: Tensor) -> Tensor:
        """Its bytes [size] uint8 as the tensor they are."""
        return raw.view(getattr(torch, self.dtype)).view(self.shape)


@dataclass
class WeightBundle:
    version: int
    entries: list[TensorEntry]
    data: np.ndarray  # [bytes] uint8

    @staticmethod
    def pack(named_tensors: Iterable[tuple[str, Tensor]], version: int, room: np.ndarray | None = None) -> WeightBundle:
        """Copy tensors side by side into one buffer. They are consumed one at a time.

        `room`: an earlier bundle's `data` that nobody reads any more, used again if it is as large. Memory that is new
        to a process costs many times the copy.
        """
        entries: list[TensorEntry] = []
        parts: list[np.ndarray] = []
        offset = 0
        for name, tensor in named_tensors:
            raw = as_bytes(tensor)
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, raw.nbytes, checksum(raw)))
            parts.append(raw)
            offset += raw.nbytes
        if not parts:
            raise WeightSyncError("weights: got no tensor to send, expected the model's parameters")
        fits = room is not None and room.nbytes == offset
        return WeightBundle(version, entries, np.concatenate(parts, out=room if fits else None))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views into the buffer; read only, whatever torch says of them."""
        for entry in self.entries:
            yield entry.name, self.tensor(entry)

    def tensor(self, entry: TensorEntry) -> Tensor:
        raw = self.data[entry.offset : entry.offset + entry.size]
        return entry.view(torch.frombuffer(raw, dtype=torch.uint8))

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def verify(self) -> list[str]:
        """Names of tensors whose bytes are not those that were packed."""
        return [e.name for e in self.entries if checksum(self.data[e.offset : e.offset + e.size]) != e.checksum]


class Channel(Protocol):
    device: torch.device

    def broadcast(self, tensor: Tensor) -> None: ...


def send(channel: Channel, data: np.ndarray) -> None:
    """A bundle's bytes [n] uint8 to all who `receive` them now."""
    for piece in torch.from_numpy(data).split(PIECE_BYTES):
        channel.broadcast(piece.to(channel.device))


def receive(channel: Channel, entries: list[TensorEntry]) -> np.ndarray:
    """The bytes [n] uint8 of a bundle with these entries, in main memory: beside an engine's caches a GPU has room for a
    piece of them, not for a second model."""
    flat = torch.empty(sum(e.size for e in entries), dtype=torch.uint8)
    for piece in flat.split(PIECE_BYTES):
        room = torch.empty_like(piece, device=channel.device) if channel.device.type != "cpu" else piece
        channel.broadcast(room)
        if room is not piece:
            piece.copy_(room)
    return flat.numpy()


@dataclass
class SyncReceipt:
    """What one engine answers: the version it now holds, its own checksums of what it loaded, and what it compared."""

    engine: str
    version: int
    checksums: dict[str, str]
    checked_live: int  # parameters of the live model compared with the received ones
    wrong: list[str]  # sent tensors that a live parameter differs from
    # Sent tensors that every worker compared with its live parameters; None: it was not asked to.
    proved: list[str] | None
    read_bytes: int = 0  # of live parameters read back, in all workers

    def unproved(self, entries: Iterable[TensorEntry], accepted: Iterable[str] = ()) -> list[str]:
        """Sent tensors that were not compared and match none of the `accepted` names and glob patterns."""
        if self.proved is None:
            return []
        proved, patterns = set(self.proved), list(accepted)
        return [e.name for e in entries if e.name not in proved and not any(fnmatchcase(e.name, p) for p in patterns)]


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes [n] uint8; a view where it is contiguous and on CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def checksum(raw: np.ndarray) -> str:
    import xxhash  # here, so that engines import on a machine that has torch and transformers alone

    return xxhash.xxh3_64_hexdigest(raw.data)


def prove(
    receipts: Iterable[SyncReceipt], entries: Sequence[TensorEntry], version: int, accepted: Iterable[str] = ()
) -> None:
    """Check that every engine holds exactly the sent tensors; WeightSyncError names those that it does not, or may not.

    `accepted`: names or glob patterns of sent tensors that need not be compared with a live parameter.
    """
    sent, accepted = {e.name: e.checksum for e in entries}, list(accepted)
    for receipt in receipts:
        if receipt.version != version:
            raise WeightSyncError(f"{receipt.engine}: holds weights version {receipt.version}, expected {version}")
        differing = {n for n in sent.keys() | receipt.checksums.keys() if sent.get(n) != receipt.checksums.get(n)}
        wrong = sorted(differing | set(receipt.wrong))
        if wrong:
            raise WeightSyncError(
                f"{receipt.engine}: {len(wrong)} of {len(sent)} tensors are not the trainer's after sync {version}: "
                f"{_shown(wrong)}; the engine's samples would come from another policy"
            )
        unproved = receipt.unproved(entries, accepted)
        if unproved:
            raise WeightSyncError(
                f"{receipt.engine}: {len(unproved)} of {len(sent)} sent tensors were not compared with a live parameter in "
                f"sync {version}: {_shown(unproved)}; the engine may still hold earlier weights. If you accept that, list "
                "their names or patterns in train.sync_unproved"
            )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def proof_metrics(receipts: Sequence[SyncReceipt], entries: Sequence[TensorEntry]) -> dict[str, float]:
    """Bytes sent to one engine, and how many of them the engine that proved the fewest compared. Without a check only the
    first is known."""
    metrics = {"sync/sent_bytes": float(sum(e.size for e in entries))}
    proved = [set(r.proved) for r in receipts if r.proved is not None]
    if proved and len(proved) == len(receipts):
        metrics["sync/proved_bytes"] = float(min(sum(e.size for e in entries if e.name in names) for names in proved))
        metrics["sync/read_bytes"] = float(min(r.read_bytes for r in receipts))
    return metrics
