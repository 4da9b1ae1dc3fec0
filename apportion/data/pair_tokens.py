"""From examples to tokens, made once: the prompt exactly as reinforcement learning renders it, then the answer.

The answer is tokenised apart from the prompt, so that the boundary between them lies where it lies in sampling. Its
tokens go up to and including the one that ends it. Turns of others inside an answer carry no loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from apportion.batch import Batch, Trajectory
from apportion.data.digest import digest_arrays
from apportion.data.errors import BadRows, DataError
from apportion.data.pairs import Example, Message, PairColumns, Reader, UnusableError
from apportion.data.prompts import PromptEncoder, check_characters, template_refusals
from apportion.data.sources import Source

TOO_LONG = ("skip", "error", "truncate_prompt")


@dataclass
class Answer:
    """One answer's tokens; `turn_ids` counts the assistant's turns from 0 and is -1 where others speak."""

    token_ids: np.ndarray  # [R] int32
    turn_ids: np.ndarray  # [R] int32
    text: str


@dataclass
class EncodedExample:
    example_id: str
    prompt_ids: np.ndarray  # [L] int32
    answers: list[Answer]
    margin: float | None = None


@dataclass
class PreferenceData:
    """Examples in packed form: rows 2i and 2i + 1 of `batch` are the chosen and rejected answer of pair i, or row i is
    demonstration i."""

    batch: Batch
    pairs: bool
    margins: np.ndarray | None = None  # [pairs] float32

    def __len__(self) -> int:
        return len(self.batch) // (2 if self.pairs else 1)

    @cached_property
    def digest(self) -> int:
        """Of the examples as they are trained on: their tokens, whose they are, margins, and their order."""
        b = self.batch
        arrays = [b.prompt_lengths, b.response_lengths, b.token_ids, b.action_mask, b.turn_ids]
        return digest_arrays(arrays if self.margins is None else [*arrays, self.margins])

    def rows(self, examples: np.ndarray) -> np.ndarray:
        """Rows of `batch` for `examples`, both of a pair side by side."""
        return np.stack([2 * examples, 2 * examples + 1], axis=1).reshape(-1) if self.pairs else examples

    def example_tokens(self) -> np.ndarray:
        """[examples] tokens that go forward, of both answers."""
        lengths = self.batch.prompt_lengths.astype(np.int64) + self.batch.response_lengths
        return lengths.reshape(-1, 2).sum(1) if self.pairs else lengths


@dataclass
class ExampleEncoder:
    """Examples to tokens, within limits. `too_long` says what happens past them: the example is skipped and counted,
    an error, or its prompt loses tokens at its beginning (an answer is never cut)."""

    prompts: PromptEncoder
    max_tokens: int  # of prompt and answer together
    too_long: str = "skip"

    def __post_init__(self) -> None:
        if self.too_long not in TOO_LONG:
            raise DataError(f"data.too_long: got {self.too_long!r}, expected one of {', '.join(TOO_LONG)}")

    def encode(self, example: Example, example_id: str) -> EncodedExample:
        """UnusableError where the example is too long or its answers are the same tokens, DataError where it cannot be
        rendered."""
        prompt_ids = self.prompts.token_ids(example.prompt)
        answers = [self._answer(example.prompt, answer) for answer in example.answers]
        longest = max(len(answer.token_ids) for answer in answers)
        room = min(self.prompts.max_prompt_tokens, self.max_tokens - longest)
        if len(prompt_ids) > room:
            if self.too_long != "truncate_prompt" or room < 1:
                raise UnusableError(
                    "too_long",
                    f"got a prompt of {len(prompt_ids)} and an answer of {longest} tokens, expected at most "
                    f"{self.prompts.max_prompt_tokens} and {self.max_tokens} together (data.max_prompt_tokens, "
                    "data.max_tokens); data.too_long says what to do with such rows",
                )
            prompt_ids = prompt_ids[-room:]
        if len(answers) == 2 and np.array_equal(answers[0].token_ids, answers[1].token_ids):
            raise UnusableError("equal", "both answers have the same tokens, expected two that differ")
        return EncodedExample(example_id, prompt_ids, answers, example.margin)

    def _answer(self, prompt: str | list[Message], answer: str | list[Message]) -> Answer:
        if not self.prompts.chat:
            if not isinstance(answer, str):
                raise UnusableError("broken", "got messages with data.chat=false, expected text or data.chat=true")
            ids = [*self._tokens(answer), self.prompts.tokenizer.eos_token_id]
            return Answer(np.array(ids, np.int32), np.zeros(len(ids), np.int32), answer)
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        ids, turn_ids = self._turns(before, turns)
        return Answer(np.array(ids, np.int32), np.array(turn_ids, np.int32), str(turns[-1]["content"]))

    def _turns(self, before: list[Message], turns: list[Message]) -> tuple[list[int], list[int]]:
        """Ids and turn ids of messages after a prompt, up to the end of the last answer."""
        messages, ids, turn_ids = list(before), [], []
        asked, turn, end = self._render(messages, asks=True), 0, 0
        for message in turns:
            if message["role"] == "assistant":
                question = self._render(messages, asks=True)
                gap = self._tokens(_after(asked, question)) if turn else []
                answered = self._render([*messages, message], asks=False)
                span = self._tokens(_after(question, answered))
                own = self._own(span)
                ids += gap + span
                turn_ids += [-1] * len(gap) + [turn] * own + [-1] * (len(span) - own)
                end = len(ids) - (len(span) - own)
                asked, turn = answered, turn + 1
            messages.append(message)
        return ids[:end], turn_ids[:end]

    def _own(self, span: list[int]) -> int:
        """How many tokens of a rendered answer the model has to write: those up to eos; a template that writes none
        ends its answers otherwise, with tokens that all belong to the answer."""
        eos = self.prompts.tokenizer.eos_token_id
        return len(span) - span[::-1].index(eos) if eos in span else len(span)

    def _tokens(self, text: str) -> list[int]:
        check_characters(text)
        return list(self.prompts.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[Message], asks: bool) -> str:
        p = self.prompts
        if p.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": p.system_prompt}, *messages]
        with template_refusals():
            return p.tokenizer.apply_chat_template(
                messages, add_generation_prompt=asks, tokenize=False, **p.chat_template_kwargs
            )


def _after(beginning: str, whole: str) -> str:
    if not whole.startswith(beginning):
        raise UnusableError(
            "broken",
            "the chat template renders a longer conversation otherwise than its beginning, expected one that only "
            "appends (templates that drop earlier reasoning cannot learn from several turns at once)",
        )
    return whole[len(beginning) :]


def encode_sources(
    sources: Sequence[Source], read: Reader, columns: PairColumns, encoder: ExampleEncoder, on_bad_row: str
) -> tuple[list[EncodedExample], Counter[str]]:
    """Every row of every source once, in the order it was written; and what was left out, by reason."""
    bad = BadRows(on_bad_row)
    skips = BadRows("skip")
    encoded: list[EncodedExample] = []
    for source in sources:
        if source.weight != 1.0:
            raise DataError(
                f"{source.name}: got weight {source.weight}, expected none: every example is seen once an epoch; "
                "use `limit` to take fewer"
            )
        for row in source.rows:
            try:
                encoded.append(encoder.encode(read(row.values, columns), f"{source.name}:{row.number}"))
            except DataError as error:
                reason = error.reason if isinstance(error, UnusableError) else "broken"
                counted = reason == "too_long" and encoder.too_long == "skip"
                (skips if counted else bad).reject(reason, f"{row.place}: {error}")
    counts = sum((source.skipped for source in sources), Counter()) + bad.counts + skips.counts
    if not encoded:
        raise DataError(f"data: no row gives an example, expected at least one; left out: {dict(counts)}")
    return encoded, counts


def hold_out(
    examples: list[EncodedExample], share: float, seed: int
) -> tuple[list[EncodedExample], list[EncodedExample]]:
    """(training, held-out) examples; those with the same prompt stay on one side, so that nothing leaks.

    DataError where one side would be empty.
    """
    keys = [example.prompt_ids.tobytes() for example in examples]
    prompts = list(dict.fromkeys(keys))
    order = np.random.default_rng([seed, len(prompts)]).permutation(len(prompts))
    chosen = {prompts[i] for i in order[: max(1, round(share * len(prompts)))]}
    train = [example for example, key in zip(examples, keys, strict=True) if key not in chosen]
    if not train:
        raise DataError(f"data.eval_share: got {share} of {len(prompts)} prompts, expected some left to train on")
    return train, [example for example, key in zip(examples, keys, strict=True) if key in chosen]


def pack(examples: Sequence[EncodedExample]) -> PreferenceData:
    """Examples, all pairs or all demonstrations, as one batch."""
    pairs = len(examples[0].answers) == 2
    rows = [_row(e, i, place) for i, e in enumerate(examples) for place in range(len(e.answers))]
    margins: Any = [e.margin for e in examples]
    known = margins[0] is not None
    return PreferenceData(Batch.from_trajectories(rows), pairs, np.array(margins, np.float32) if known else None)


def _row(example: EncodedExample, number: int, place: int) -> Trajectory:
    answer = example.answers[place]
    return Trajectory(
        prompt_id=example.example_id,
        group_id=number,
        sample_index=place,
        token_ids=np.concatenate([example.prompt_ids, answer.token_ids]),
        prompt_length=len(example.prompt_ids),
        action_mask=answer.turn_ids >= 0,
        turn_ids=answer.turn_ids,
        behavior_logprobs=np.full(len(answer.token_ids), np.nan, np.float32),
        policy_version=0,
        finish_reason="stop",
        text=answer.text,
    )
