"""What sampled tokens say as text: to people, to verifiers, and before the first of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ENDING_TOKENS = 48  # of a prompt: more than a template writes of a response

_TAG = re.compile(r"<(/?)([A-Za-z][\w:-]*)>|◁(/?)(think)▷|\[(/?)(THINK)\]")


class ResponseText:
    """Spells a response without its special tokens, except for tags that a response is made of.

    Some models have <think> and </think> (or <answer>, <tool_call>...) as special tokens. A reward has to see them. A
    special token is such a tag where its partner is a special token too, and it does not end or pad texts (</s>).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token)
        tags = {i: text for i, text in special.items() if text not in names and _TAG.fullmatch(text)}
        self._tags = {i for i, text in tags.items() if _partner(text) in tags.values()}
        self._dropped = {*tokenizer.all_special_ids, *special} - self._tags

    @property
    def keeps_tags(self) -> bool:
        """Whether decoding without special tokens would lose a tag."""
        return bool(self._tags)

    def __call__(self, token_ids: Sequence[int] | np.ndarray) -> str:
        if not self._tags:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
        kept = [int(i) for i in token_ids if int(i) not in self._dropped]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))


def _partner(tag: str) -> str:
    """The closing tag of an opening one, and the opening tag of a closing one."""
    slash = tag[1] == "/"
    return tag[0] + tag[2:] if slash else f"{tag[0]}/{tag[1:]}"


def prompt_ending(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text that a rendered prompt ends with, its special tokens included: where it opens the response with <think>,
    a response need not."""
    return str(tokenizer.decode([int(i) for i in token_ids[-ENDING_TOKENS:]], skip_special_tokens=False))


def lost_tags(tokenizer: Any, pattern: str) -> list[str]:
    """The tags written out in a regular expression that no response can hold: the tokenizer cannot spell them."""
    spell = ResponseText(tokenizer)
    tags = dict.fromkeys(found[0] for found in _TAG.finditer(pattern))
    return [tag for tag in tags if tag not in spell(tokenizer(tag, add_special_tokens=False)["input_ids"])]
