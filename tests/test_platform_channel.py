"""Weights broadcast over gloo between processes of their own, as they travel to the engines' workers."""

import multiprocessing

import numpy as np
import pytest
import torch

from apportion.platform import weights
from apportion.platform.channel import ChannelAddress, WeightChannel
from apportion.platform.errors import WeightSyncError
from apportion.platform.rendezvous import hold_port
from apportion.platform.weights import WeightBundle, receive, send


def tensors() -> list[tuple[str, torch.Tensor]]:
    """The second begins at a byte at which no float32 may begin."""
    return [
        ("a", torch.arange(3, dtype=torch.bfloat16)),
        ("b", torch.tensor([[0.1, 0.2], [0.3, -4.0]])),
        ("c", torch.ones(5, dtype=torch.bfloat16)),
    ]


def member(address: ChannelAddress, number: int, answers) -> None:
    weights.PIECE_BYTES = 7  # four pieces, which cut through tensors and through numbers
    channel = WeightChannel(address, number, "cpu")
    for version in (1, 2):
        entries = WeightBundle.pack(tensors(), version).entries
        bundle = WeightBundle(version, entries, receive(channel, entries))
        answers.put((number, version, {n: t.float().tolist() for n, t in bundle.tensors()}, bundle.verify()))


@pytest.mark.slow
def test_every_member_receives_the_trainers_bytes_each_time(monkeypatch):
    monkeypatch.setattr(weights, "PIECE_BYTES", 7)
    address = ChannelAddress("127.0.0.1", hold_port("127.0.0.1"), 3, "gloo", 60)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    others = [context.Process(target=member, args=(address, number, answers)) for number in (1, 2)]
    for process in others:
        process.start()
    try:
        channel = WeightChannel(address, 0, "cpu")
        for version in (1, 2):
            bundle = WeightBundle.pack(((n, t * version) for n, t in tensors()), version)
            send(channel, bundle.data)
        told = sorted((answers.get(timeout=60) for _ in range(4)), key=lambda answer: answer[:2])
    finally:
        for process in others:
            process.join(30)
    assert [answer[:2] for answer in told] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for _, version, values, wrong in told:
        for name, tensor in tensors():
            np.testing.assert_array_equal(values[name], (tensor * version).float())
        assert wrong == ([] if version == 1 else ["a", "b", "c"])  # the second time the trainer's weights are others


@pytest.mark.slow
def test_joining_is_not_waited_for_without_end():
    address = ChannelAddress("127.0.0.1", hold_port("127.0.0.1"), 2, "gloo", 1)
    with pytest.raises(WeightSyncError, match=r"got no broadcast among 2 members at 127.0.0.1:\d+ within 1 s"):
        WeightChannel(address, 0, "cpu")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend: got 'mpi', expected one of gloo, nccl"):
        ChannelAddress("127.0.0.1", 1, 2, "mpi", 1)
