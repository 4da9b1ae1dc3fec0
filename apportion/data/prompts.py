"""From rows to prompts: chat templates, token limits, and the endless, resumable order in which prompts are drawn.

Tokens are made when a prompt is drawn, so a large source costs nothing at the start.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from apportion.batch import Prompt
from apportion.data.digest import digest_arrays
from apportion.data.errors import BadRows, DataError
from apportion.data.rows import Row
from apportion.data.sources import Source

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # of a pair that JSON writes for one character: no tokenizer takes it


def load_tokenizer(path: str, chat_template: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model's folder, hub name or `builtin:` name.

    `chat_template` is a jinja file that replaces the tokenizer's own. Where there is no pad token, eos takes its place.
    """
    from transformers import AutoTokenizer

    from apportion.data.builtin import resolve_model

    folder = resolve_model(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"{path}: its tokenizer cannot be loaded ({reason.strip()}); expected a model's folder with a tokenizer, "
            "builtin:NAME, or a hub name and a way to the hub"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no eos token, expected one that ends an answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    text = template_text(chat_template)
    if text is not None:
        tokenizer.chat_template = text
    return tokenizer


@dataclass(frozen=True)
class TokenizerPath:
    """A model's tokenizer that is loaded where it is first needed."""

    path: str
    trust_remote_code: bool = False

    def load(self) -> Any:
        return load_tokenizer(self.path, None, self.trust_remote_code)


def template_text(chat_template: str | None) -> str | None:
    """What the jinja file of `model.chat_template` holds; None where the tokenizer's own is used."""
    if chat_template is None:
        return None
    file = Path(chat_template).expanduser()
    if not file.is_file():
        raise DataError(f"model.chat_template: got {chat_template!r}, no such file; expected a jinja file")
    return file.read_text(encoding="utf-8")


@dataclass
class PromptEncoder:
    """What the policy sees of a prompt.

    Text becomes one user message through the chat template, or stays raw with `chat=False`. `system_prompt` goes before
    messages that do not begin with a system message of their own.
    """

    tokenizer: Any
    system_prompt: str | None = None
    chat: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int = 512

    def __post_init__(self) -> None:
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "data.chat: got true, but the tokenizer has no chat template; "
                "set model.chat_template or data.chat=false"
            )
        if not self.chat and self.system_prompt is not None:
            raise DataError("data.system_prompt: got a value with data.chat=false, expected data.chat=true")

    def token_ids(self, prompt: str | list[dict[str, Any]]) -> np.ndarray:
        """[L] int32, the rendered prompt up to where the answer begins. DataError where it cannot be rendered."""
        check_characters(prompt)
        if not self.chat:
            if not isinstance(prompt, str):
                raise DataError("got messages with data.chat=false, expected text or data.chat=true")
            return np.asarray(self.tokenizer(prompt)["input_ids"], np.int32)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        with template_refusals():
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
            )
        return np.asarray(rendered["input_ids"], np.int32)

    def prompt(self, source: Source, row: Row, epoch: int) -> Prompt:
        """The prompt of a row, every other column kept. DataError with the row's place where it is too long."""
        try:
            token_ids = self.token_ids(row.values[source.prompt_column])
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from None
        if len(token_ids) > self.max_prompt_tokens:
            raise TooLongError(
                f"{row.place}: got a prompt of {len(token_ids)} tokens, expected at most {self.max_prompt_tokens}; "
                "raise data.max_prompt_tokens or set data.on_bad_row=skip"
            )
        if not len(token_ids):
            raise DataError(f"{row.place}: the prompt has no tokens")
        columns = {name: value for name, value in row.values.items() if name != source.prompt_column}
        prompt_id = f"{source.name}:{row.number}:{epoch}"
        return Prompt(prompt_id, token_ids, row.values[source.prompt_column], columns, source.name)


def check_characters(text: Any) -> None:
    """DataError where a text, or one in messages, holds half a character (a lone surrogate)."""
    whole = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
    found = _HALF_CHARACTER.search(whole)
    if found:
        raise DataError(f"got half a character ({found[0]!r}) in the text, expected whole ones")


@contextmanager
def template_refusals() -> Iterator[None]:
    """What a chat template raises over messages, as a DataError. A template is a program: one that meets `content: null`
    or a missing key fails as a program does, not with an error of its own."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"the chat template refuses these messages ({line})") from error


class TooLongError(DataError):
    """A prompt with more tokens than `max_prompt_tokens`."""


def _encode(encoder: PromptEncoder, source: Source, row: Row, epoch: int, bad: BadRows) -> Prompt | None:
    try:
        return encoder.prompt(source, row, epoch)
    except DataError as error:
        bad.reject("too_long" if isinstance(error, TooLongError) else "broken", str(error))
        return None


def every_prompt(
    sources: Sequence[Source], encoder: PromptEncoder, on_bad_row: str = "error"
) -> tuple[list[Prompt], Counter[str]]:
    """Every row once, in the order it was written, for evaluation; and what was skipped, by reason."""
    bad = BadRows(on_bad_row)
    prompts = [_encode(encoder, source, row, 0, bad) for source in sources for row in source.rows]
    kept = [prompt for prompt in prompts if prompt is not None]
    if not kept:
        raise DataError(f"{', '.join(s.name for s in sources)}: no row gives a prompt; left out: {dict(bad.counts)}")
    return kept, sum((source.skipped for source in sources), bad.counts)


@dataclass
class _Position:
    """Where the drawing from one source stands."""

    drawn: int = 0  # prompts given, which the mixing by weight counts
    epoch: int = 0
    place: int = 0  # rows of this epoch already passed, bad ones included
    skipped: Counter[str] = field(default_factory=Counter)  # of the first epoch, so each row once


class PromptStream:
    """Prompts without end, in an order that follows from (seed, epoch) alone.

    Several sources are mixed so that after any number of prompts each has given its share by weight, to within one
    prompt (two sources) or a few (many): the next prompt comes from the source that is furthest behind. Each source has
    its own epochs.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: PromptEncoder,
        prompts_per_step: int,
        seed: int = 0,
        shuffle: bool = True,
        on_bad_row: str = "error",
    ) -> None:
        if not sources:
            raise DataError("sources: got none, expected at least one")
        BadRows(on_bad_row)  # refuses an unknown policy now rather than at the first bad row
        self._sources, self._encoder, self._on_bad_row = list(sources), encoder, on_bad_row
        self._prompts_per_step, self._seed, self._shuffle = prompts_per_step, seed, shuffle
        self._positions = [_Position() for _ in sources]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source -> (epoch, order of its rows)

    def __len__(self) -> int:
        """Rows of all sources."""
        return sum(len(source.rows) for source in self._sources)

    @property
    def skipped(self) -> dict[str, int]:
        """Rows left out so far, by reason; each row counts once however often its source is passed."""
        counts: Counter[str] = Counter()
        for source, position in zip(self._sources, self._positions, strict=True):
            counts += source.skipped + position.skipped
        return dict(counts)

    def next_batch(self, prompts: int | None = None) -> list[Prompt]:
        """The next `prompts` prompts, or those of one step."""
        count = self._prompts_per_step if prompts is None else prompts
        return [self._draw(self._furthest_behind()) for _ in range(count)]

    def _furthest_behind(self) -> int:
        weights = np.array([source.weight for source in self._sources])
        drawn = np.array([position.drawn for position in self._positions])
        due = weights / weights.sum() * (drawn.sum() + 1)
        return int(np.argmax(due - drawn))

    def _draw(self, index: int) -> Prompt:
        source, position = self._sources[index], self._positions[index]
        for _ in range(2 * len(source.rows)):
            if position.place == len(source.rows):
                position.epoch, position.place = position.epoch + 1, 0
            row = source.rows[int(self._order(index)[position.place])]
            position.place += 1
            bad = BadRows(self._on_bad_row)
            prompt = _encode(self._encoder, source, row, position.epoch, bad)
            if prompt is not None:
                position.drawn += 1
                return prompt
            if position.epoch == 0:
                position.skipped += bad.counts
        raise DataError(f"{source.name}: none of its {len(source.rows)} rows gives a prompt; left out: {self.skipped}")

    def _order(self, index: int) -> np.ndarray:
        epoch, rows = self._positions[index].epoch, len(self._sources[index].rows)
        if index not in self._orders or self._orders[index][0] != epoch:
            rng = np.random.default_rng([self._seed, index, epoch])
            self._orders[index] = (epoch, rng.permutation(rows) if self._shuffle else np.arange(rows))
        return self._orders[index][1]

    @cached_property
    def _rendering(self) -> int:
        """Digest of the tokens that each source's first row becomes: of tokenizer, chat template and system prompt."""
        first = [_encode(self._encoder, source, source.rows[0], 0, BadRows("skip")) for source in self._sources]
        return digest_arrays(np.zeros(0, np.int32) if prompt is None else prompt.token_ids for prompt in first)

    def state(self) -> dict[str, int]:
        """Where the stream stands; `load_state` of a like stream continues exactly there."""
        state = {
            "rendering": self._rendering,
            "seed": self._seed,
            "shuffle": int(self._shuffle),
            "sources": len(self._sources),
        }
        for i, (source, position) in enumerate(zip(self._sources, self._positions, strict=True)):
            state |= {f"{i}.rows": len(source.rows), f"{i}.digest": source.digest, f"{i}.drawn": position.drawn}
            state |= {f"{i}.epoch": position.epoch, f"{i}.place": position.place}
            state |= {f"{i}.skipped.{reason}": count for reason, count in position.skipped.items()}
        return state

    def cautions(self, state: Mapping[str, int]) -> list[str]:
        """What a resumed run should say of `state`, a line each: what cannot be compared, and what may be meant."""
        lines = []
        if any(f"{i}.digest" not in state for i in range(len(self._sources))):
            lines.append(
                "the checkpoint is of an earlier version and has no digest of the training rows: only their number is "
                "compared; make sure that they are the same"
            )
        if state.get("rendering", self._rendering) != self._rendering:
            lines.append(
                "the first training rows become other tokens than when the checkpoint was written: tokenizer, chat template, "
                "data.system_prompt, data.chat or data.max_prompt_tokens has changed"
            )
        return lines

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken. DataError if the sources, their rows, the seed or the shuffling differ."""
        mine = self.state()
        fixed = ["seed", "shuffle", "sources", *(f"{i}.rows" for i in range(len(self._sources)))]
        for name in fixed:
            if name not in state or state[name] != mine[name]:
                got = state.get(name, "nothing")
                raise DataError(
                    f"data position: {name} is {mine[name]} here and {got} in the checkpoint; "
                    "resume with the same seed and data, or start a new run"
                )
        for i, source in enumerate(self._sources):
            kept = state.get(f"{i}.digest")  # older checkpoints have none
            if kept is not None and kept != source.digest:
                raise DataError(
                    f"data position: the {len(source.rows)} rows of source {source.name!r} are not those that the "
                    "checkpoint was written with: as many, but their order, prompts or other columns differ; resume with "
                    "the same data, or start a new run"
                )
        self._positions = [
            _Position(
                int(state[f"{i}.drawn"]),
                int(state[f"{i}.epoch"]),
                int(state[f"{i}.place"]),
                Counter({k.split(".", 2)[2]: int(v) for k, v in state.items() if k.startswith(f"{i}.skipped.")}),
            )
            for i in range(len(self._sources))
        ]
