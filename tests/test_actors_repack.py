"""A head tied to the embedding keeps a packed copy of its matrix: it is found stale, and packed anew."""

import torch

from apportion.actors.engines.vllm_compare import compare_live
from apportion.actors.engines.vllm_worker import repack_shared


class Packing:
    """As vLLM's method of unquantised layers on CPU: the layer computes from a copy made after loading."""

    def process_weights_after_loading(self, layer):
        packed = layer.weight.detach().clone()
        layer.cpu_linear = lambda x: x @ packed.T

    def apply(self, layer, x, bias):
        return layer.cpu_linear(x)


class Layer(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.quant_method = Packing()
        self.quant_method.process_weights_after_loading(self)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = Layer(torch.nn.Parameter(torch.arange(6.0).view(3, 2)))
        self.lm_head = Layer(self.embed.weight)


def reloaded():
    """What a reload leaves: new values for both, packed anew for the owner alone."""
    model, sent = Tied(), {"embed.weight": torch.arange(6.0).view(3, 2) + 1}
    with torch.no_grad():
        model.embed.weight.copy_(sent["embed.weight"])
    model.embed.quant_method.process_weights_after_loading(model.embed)
    return model, sent


def test_a_tied_head_that_was_not_packed_anew_is_named():
    model, sent = reloaded()
    assert compare_live(model, sent)[:2] == (2, ["embed.weight"])


def test_packing_shared_weights_anew_makes_the_head_the_trainers():
    model, sent = reloaded()
    repack_shared(model)
    assert compare_live(model, sent)[:2] == (2, [])
    assert torch.equal(model.lm_head.quant_method.apply(model.lm_head, torch.eye(2), None), sent["embed.weight"].T)
