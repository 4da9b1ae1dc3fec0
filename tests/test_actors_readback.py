"""Repacked layers are read back a part at a time: what is stale is found at once, one wrong number within a round."""

from __future__ import annotations

import torch

from apportion.actors.engines import vllm_compare
from apportion.actors.engines.vllm_compare import TURNS, compare_live


class Packing:
    """As vLLM's method of unquantised layers on CPU: the layer computes from a copy made after loading."""

    def apply(self, layer, x, bias):
        return layer.cpu_linear(x)


class Layer(torch.nn.Module):
    def __init__(self, packed):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0))
        self.output_size_per_partition, self.input_size_per_partition = packed.shape
        self.quant_method = Packing()
        self.cpu_linear = lambda x: x @ packed.T


def model(packed):
    made = torch.nn.Module()
    made.layer = Layer(packed)
    return made


WANT = torch.arange(3 * 21.0).view(3, 21)
SENT = {"layer.weight": WANT}


def test_a_layer_that_kept_earlier_weights_is_found_whatever_the_turn():
    for turn in range(TURNS):
        assert compare_live(model(WANT - 1), SENT, turn=turn)[:2] == (1, ["layer.weight"])


def test_a_right_layer_is_right_in_every_turn(monkeypatch):
    monkeypatch.setattr(vllm_compare, "COLUMNS_AT_A_TIME", 2)
    for turn in [None, *range(TURNS)]:
        assert compare_live(model(WANT), SENT, turn=turn)[:2] == (1, [])


def test_one_wrong_number_is_found_in_its_columns_turn_and_without_turns():
    packed = WANT.clone()
    packed[2, 13] += 1
    found = [turn for turn in range(TURNS) if compare_live(model(packed), SENT, turn=turn).wrong]
    assert found == [13 % TURNS]
    assert compare_live(model(packed), SENT)[:2] == (1, ["layer.weight"])
