"""Sent tensors under the names and shapes of the model's checkpoint, which are those that vLLM loads.

The trainer sends its parameters under transformers' module names. For most families these are the checkpoint's names. For
others transformers converts: it joins the experts of a mixture into one tensor, or renames layers. This module reverts
that for a few tensors at a time, so no second model is ever held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apportion.actors.loading import model_refused


class CheckpointWeights(Mapping[str, Tensor]):
    """The checkpoint's tensors by name, made of the sent ones when they are read.

    `sent_names`: for each of the checkpoint's names, the sent tensors that it is made of.
    """

    def __init__(self, sent: Mapping[str, Tensor], converter: Any | None) -> None:
        self._sent, self._converter = sent, converter
        self.sent_names: dict[str, list[str]] = {}
        self._group: tuple[list[str], dict[str, Tensor]] = ([], {})  # converted last
        for names in _groups(converter, sent):
            shapes = {name: torch.empty_like(sent[name], device="meta") for name in names}
            for name in _reverted(converter, shapes):
                self.sent_names[name] = names

    def __getitem__(self, name: str) -> Tensor:
        names = self.sent_names[name]
        if names == [name]:
            return self._sent[name]
        if self._group[0] != names:
            self._group = (names, _reverted(self._converter, {n: self._sent[n] for n in names}))
        return self._group[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sent_names)

    def __len__(self) -> int:
        return len(self.sent_names)


@cache
def converter_of(path: str, trust_remote_code: bool) -> Any | None:
    """A model without weights that knows its family's conversions; None where module names are the checkpoint's."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    with model_refused(path, trust_remote_code), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    return model if model._weight_conversions else None


def _groups(converter: Any | None, names: Iterable[str]) -> list[list[str]]:
    """Sent tensors that are converted together."""
    if converter is None:
        return [[name] for name in names]
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    reverse = [conversion.reverse_transform() for conversion in reversed(converter._weight_conversions)]
    renamings = [r for r in reverse if isinstance(r, WeightRenaming)]
    converters = [r for r in reverse if isinstance(r, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(rename_source_key(name, renamings, converters, reverse=True)[0], []).append(name)
    return list(groups.values())


def _reverted(converter: Any | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if converter is None:
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(converter, tensors)
