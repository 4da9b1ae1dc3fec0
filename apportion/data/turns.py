"""Token ids of what stands before and between the policy's turns.

The policy's own ids are kept as they were sampled, so a conversation is never rendered as a whole. What the chat
template puts after an assistant's turn, around an observation and before the next turn is found by rendering a
conversation with a marker in the assistant's place and taking what follows the marker.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import numpy as np

from apportion.data.errors import DataError
from apportion.data.find import find_message
from apportion.data.messages import as_messages
from apportion.data.prompts import PromptEncoder
from apportion.data.response_text import ResponseText

MARKER = "apportionturn"  # a word that no template changes


@dataclass
class TurnEncoder:
    """The first prompt with the first observation, and observations between turns.

    `role` is whom the template shows as saying an observation. Without a chat template (`encoder.chat` False) an
    observation is a line of its own.
    """

    encoder: PromptEncoder
    role: str = "user"
    _TURN: ClassVar = ({"role": "user", "content": "x"}, {"role": "assistant", "content": MARKER})

    def __post_init__(self) -> None:
        self._tokenizer = self.encoder.tokenizer
        self._spell = ResponseText(self._tokenizer)
        added = self._tokenizer.added_tokens_decoder.items()
        self._special = {*self._tokenizer.all_special_ids, *(index for index, token in added if token.special)}
        if not self.encoder.chat:
            return
        self._closing = self._apply(list(self._TURN), generation=False).partition(MARKER)[2]
        if "observation" not in self._after_turn("observation"):  # said now rather than in the middle of an episode
            raise DataError(
                f"chat template: shows no message of role {self.role!r} after an assistant's turn; "
                "set environment.observation_role, or model.chat_template to one that shows turns"
            )

    def first(self, prompt: str | list[dict[str, Any]], observation: str, tools: Any = None) -> np.ndarray:
        """[L] int32. An observation joins the prompt's last message where that is of `role`, else it is a message of
        its own; an empty one adds nothing."""
        if not observation:
            return self.encoder.token_ids(prompt, tools)
        if not self.encoder.chat:
            return self.encoder.token_ids(f"{prompt}\n{observation}\n", tools)
        messages = as_messages(prompt)
        if messages[-1]["role"] == self.role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{observation}"
        else:
            messages.append({"role": self.role, "content": observation})
        return self.encoder.token_ids(messages, tools)

    def between(self, last_id: int | None, observation: str) -> np.ndarray:
        """[n] int32: the end of the policy's turn, the observation, and the beginning of the next turn.

        DataError where the template does not show the observation. `last_id` is the last id that was sampled: where it already is what ends a turn in the template, the end is not
        repeated; where the turn was cut by a limit, it is added.
        """
        if not self.encoder.chat:
            return self._ids(f"\n{observation}\n")
        after = self._after_turn(observation)
        if find_message(after, {"role": self.role, "content": observation}, 0) is None:
            raise DataError(
                f"the chat template leaves out or changes the observation {observation[:40]!r} as a message of role "
                f"{self.role!r}; set environment.observation_role, or model.chat_template to one that shows it"
            )
        ids = self._ids(after)
        if last_id in self._special:
            # The end may be several tokens (a line break before the end-of-turn token): all up to the sampled one goes.
            end = len(self._ids(shared_start(self._closing, after)))
            places = np.flatnonzero(ids[:end] == last_id)
            ids = ids[places[0] + 1 :] if len(places) else ids
        return ids

    def _after_turn(self, observation: str) -> str:
        """What the template writes after an assistant's words when an observation follows, up to the next turn."""
        rendered = self._apply([*self._TURN, {"role": self.role, "content": observation}], generation=True)
        return rendered.partition(MARKER)[2]

    def _apply(self, messages: list[dict[str, str]], generation: bool) -> str:
        roles = ", ".join(message["role"] for message in messages)
        refuses = f"the chat template refuses a conversation of roles {roles}"
        cure = "; set environment.observation_role"
        return self.encoder.renderer.text(messages, None, generation, refuses, cure)

    def _ids(self, text: str) -> np.ndarray:
        return self.encoder.known_ids(self.encoder.plain_ids(text))

    def text(self, token_ids: np.ndarray) -> str:
        """A response as people and verifiers read it, without special tokens."""
        return self._spell(token_ids)


def shared_start(one: str, other: str) -> str:
    """The longest text that both begin with."""
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
