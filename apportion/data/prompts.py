"""From rows to prompts: chat templates, token limits, and the endless, resumable order in which prompts are drawn.

Tokens are made when a prompt is drawn, so a large source costs nothing at the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from apportion.batch import Prompt
from apportion.data.digest import digest_arrays
from apportion.data.errors import BadRows, DataError, UnusableError, reason_of
from apportion.data.messages import Message, as_messages, check_characters, clean_messages, clean_tools, know_template
from apportion.data.model_errors import of_model_files, reason
from apportion.data.rendering import NOT_RENDERED, Renderer
from apportion.data.rows import Row
from apportion.data.sources import Source


def load_tokenizer(path: str, chat_template: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model's folder, hub name or `builtin:` name.

    `chat_template` is a jinja file that replaces the tokenizer's own. Where there is no pad token, eos takes its place.
    """
    from transformers import AutoTokenizer

    from apportion.data.builtin import resolve_model

    folder = resolve_model(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a")  # some settings are looked at here for the first time
    except Exception as error:
        if not of_model_files(error):
            raise
        raise DataError(
            f"{path}: its tokenizer cannot be loaded ({reason(error)}); expected a model's folder with a tokenizer, "
            "builtin:NAME, or a hub name and a way to the hub"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no eos token, expected one that ends an answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if (text := template_text(chat_template)) is not None:
        tokenizer.chat_template = text
    know_template(tokenizer.chat_template)
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
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"model.chat_template: got {file}, not readable as text in UTF-8 ({error})") from None


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
    tools_column: str | None = "tools"  # of a row: what the template is given as tools; None: nothing
    vocabulary: int | None = None  # tokens that the model has an embedding for; None: not known
    reasoning_left_out: int = 0  # prompts so far of which the template left out reasoning of earlier turns

    def __post_init__(self) -> None:
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "data.chat: got true, but the tokenizer has no chat template; "
                "set model.chat_template or data.chat=false"
            )
        if not self.chat and self.system_prompt is not None:
            raise DataError("data.system_prompt: got a value with data.chat=false, expected data.chat=true")
        self._renderer = Renderer(self.tokenizer, self.chat_template_kwargs)

    @property
    def renderer(self) -> Renderer:
        if self._renderer.tokenizer is not self.tokenizer:
            self._renderer = Renderer(self.tokenizer, self.chat_template_kwargs)
        return self._renderer

    def token_ids(self, prompt: str | list[Message], tools: Any = None) -> np.ndarray:
        """[L] int32, the rendered prompt up to where the answer begins.

        DataError where it cannot be rendered, or where the rendering does not say what the messages say.
        """
        check_characters(prompt)
        known = clean_tools(tools)
        if not self.chat:
            if not isinstance(prompt, str):
                raise DataError("got messages with data.chat=false, expected text or data.chat=true")
            if known is not None:
                raise DataError("got tools with data.chat=false, expected data.chat=true or data.tools_column=null")
            return self.known_ids(self._raw_ids(prompt))
        return self.known_ids(self.plain_ids(self.text(prompt, known)))

    def known_ids(self, ids: Sequence[int]) -> np.ndarray:
        """[L] int32; UnusableError for a token that the model has no embedding for."""
        array = np.asarray(ids, np.int32)
        if self.vocabulary is not None and len(array) and (largest := int(array.max())) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise UnusableError(
                "unknown_token",
                f"got the token {token!r}, id {largest}, which the model has no embedding for ({self.vocabulary} tokens); "
                "take it out of the row or the chat template, or resize the model's embeddings",
            )
        return array

    def text(self, prompt: str | list[Message], tools: list[dict[str, Any]] | None) -> str:
        """What the chat template makes of a prompt, checked."""
        rendered = self.renderer.checked(self.with_system(as_messages(prompt)), tools, asks=True)
        ends = (text := rendered.text).rstrip().endswith(str(self.tokenizer.eos_token))
        # Templates without a beginning for answers may end every turn so; after such a beginning it ends the answer.
        if ends and text != self.renderer.text(rendered.messages, tools, asks=False):
            raise UnusableError(
                NOT_RENDERED,
                f"the chat template asks for an answer and then ends it ({text[-40:]!r}): the end-of-sequence token "
                "belongs behind the answer; set model.chat_template to one without it",
            )
        self.reasoning_left_out += rendered.reasoning_left_out > 0
        return text

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages after the run's system prompt, unless they begin with one of their own."""
        if self.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def plain_ids(self, text: str) -> list[int]:
        """The ids of a text, without what the tokenizer adds at a beginning or an end."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _raw_ids(self, text: str) -> list[int]:
        """What the tokenizer adds before a text stays, unless the text begins with it; what it adds behind would end the
        text before the answer."""
        ids, plain = list(self.tokenizer(text)["input_ids"]), self.plain_ids(text)
        if plain and plain[0] == self.tokenizer.bos_token_id and ids[:2] == [plain[0], plain[0]] != plain[:2]:
            ids = ids[1:]  # rendered before, by a chat template that writes the beginning-of-sequence token
        for before in range(len(ids) - len(plain) + 1):
            if ids[before : before + len(plain)] == plain:
                return ids[: before + len(plain)]
        eos = self.tokenizer.eos_token_id  # the addition changed other tokens: the end is all that may go
        while ids and ids[-1] == eos and plain[-1:] != [eos]:
            ids.pop()
        return ids

    def prompt(self, source: Source, row: Row, epoch: int) -> Prompt:
        """The prompt of a row, every other column kept; messages in the one form that `clean_messages` gives.

        UnusableError with the row's place where it is too long or cannot be rendered.
        """
        value = row.values[source.prompt_column]
        try:
            token_ids = self.token_ids(value, row.values.get(self.tools_column) if self.tools_column else None)
        except DataError as error:
            raise UnusableError(reason_of(error), f"{row.place}: {error}") from None
        if len(token_ids) > self.max_prompt_tokens:
            raise UnusableError(
                "too_long",
                f"{row.place}: got a prompt of {len(token_ids)} tokens, expected at most {self.max_prompt_tokens}; "
                "raise data.max_prompt_tokens or set data.on_bad_row=skip",
            )
        if not len(token_ids):
            raise UnusableError("empty", f"{row.place}: the prompt has no tokens")
        columns = {name: value for name, value in row.values.items() if name != source.prompt_column}
        prompt_id = f"{source.name}:{row.number}:{epoch}"
        shown = value if isinstance(value, str) else clean_messages(value)
        return Prompt(prompt_id, token_ids, shown, columns, source.name)


def _encode(encoder: PromptEncoder, source: Source, row: Row, epoch: int, bad: BadRows) -> Prompt | None:
    try:
        return encoder.prompt(source, row, epoch)
    except DataError as error:
        bad.reject(reason_of(error), str(error))
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
    reasoning_left_out: int = 0  # prompts of the first epoch


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

    @property
    def reasoning_left_out(self) -> int:
        """Rows so far of which the chat template leaves out the reasoning of earlier turns; each counts once."""
        return sum(position.reasoning_left_out for position in self._positions)

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
            before = self._encoder.reasoning_left_out
            prompt = _encode(self._encoder, source, row, position.epoch, bad)
            if prompt is not None and position.epoch == 0:
                position.reasoning_left_out += self._encoder.reasoning_left_out - before
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
        whole = sum(source.weight for source in self._sources)
        for i, (source, position) in enumerate(zip(self._sources, self._positions, strict=True)):
            state[f"{i}.millionths"] = round(1e6 * source.weight / whole)  # its share of the prompts
            state |= {f"{i}.rows": len(source.rows), f"{i}.digest": source.digest, f"{i}.drawn": position.drawn}
            state |= {f"{i}.epoch": position.epoch, f"{i}.place": position.place}
            state[f"{i}.reasoning_left_out"] = position.reasoning_left_out
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
        """Continue where `state` was taken. DataError if rows, weights, seed or shuffling differ."""
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
            share = state.get(f"{i}.millionths", mine[f"{i}.millionths"])
            _check_count(f"{i}.millionths", share)
            if share != mine[f"{i}.millionths"]:  # the prompts until now were drawn by the other weights
                raise DataError(
                    f"data position: source {source.name!r} gives {mine[f'{i}.millionths'] / 1e4:.4g}% of the prompts "
                    f"here and {share / 1e4:.4g}% in the checkpoint; resume with the same weights, or start a new run"
                )
        for name, value in state.items():
            if name.endswith((".drawn", ".epoch", ".place", ".reasoning_left_out")) or ".skipped." in name:
                _check_count(name, value)
        for i in range(len(self._sources)):
            for part in ("drawn", "epoch", "place"):
                _check_count(f"{i}.{part}", state.get(f"{i}.{part}"))
            if state[f"{i}.place"] > len(self._sources[i].rows):
                rows = len(self._sources[i].rows)
                raise DataError(f"data position: {i}.place: got {state[f'{i}.place']}, expected at most {rows} rows")
        self._positions = [
            _Position(
                int(state[f"{i}.drawn"]),
                int(state[f"{i}.epoch"]),
                int(state[f"{i}.place"]),
                Counter({k.split(".", 2)[2]: int(v) for k, v in state.items() if k.startswith(f"{i}.skipped.")}),
                int(state.get(f"{i}.reasoning_left_out", 0)),
            )
            for i in range(len(self._sources))
        ]


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"data position: {name}: got {value!r:.100} in the checkpoint, expected a whole number from 0")
