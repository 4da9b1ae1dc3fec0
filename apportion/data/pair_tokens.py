"""From examples to tokens, made once: the prompt exactly as reinforcement learning renders it, then the answer.

The answer is tokenised apart from the prompt, so that the boundary between them lies where it lies in sampling. Its
tokens go up to and including the one that ends it. Turns of others inside an answer carry no loss, nor do turns that
the row keeps from being learned (`weight: 0`, `train: false`).
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
from apportion.data.errors import BadRows, DataError, UnusableError, reason_of
from apportion.data.find import find_message
from apportion.data.messages import Message, as_messages, check_characters
from apportion.data.pairs import Example, PairColumns, Reader
from apportion.data.prompts import PromptEncoder
from apportion.data.rendering import NOT_RENDERED, faithful, left_out
from apportion.data.sources import Source
from apportion.data.spans import Ends, find_answer, learned_characters, learned_tokens
from apportion.data.turns import shared_start

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
        """UnusableError where the example is too long, its answers are the same tokens, or the rendering does not say
        what the row says; DataError where it cannot be rendered."""
        if self.prompts.chat:
            check_characters(example.prompt)
            asked = self.prompts.text(example.prompt, example.tools)
            prompt_ids = self.prompts.known_ids(self.prompts.plain_ids(asked))
        else:
            asked, prompt_ids = "", self.prompts.token_ids(example.prompt, example.tools)
        answers = [self._answer(example, answer, asked) for answer in example.answers]
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

    @cached_property
    def _ends(self) -> Ends:
        return Ends(self.prompts.tokenizer)

    def _answer(self, example: Example, answer: str | list[Message], asked: str) -> Answer:
        """The tokens of an answer after a prompt that is rendered as `asked`."""
        check_characters(answer)
        tokenizer = self.prompts.tokenizer
        if not self.prompts.chat:
            if not isinstance(answer, str):
                raise UnusableError("broken", "got messages with data.chat=false, expected text or data.chat=true")
            ids = self.prompts.plain_ids(answer)
            ids += [] if ids[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
            return Answer(self.prompts.known_ids(ids), np.zeros(len(ids), np.int32), answer)
        before = self.prompts.with_system(as_messages(example.prompt))
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else as_messages(answer)
        learned = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("train", True)]
        if not learned:
            raise UnusableError("not_learned", "every turn of the assistant has weight 0, expected one to learn from")
        turns = turns[: learned[-1] + 1]
        numbers = [len(before) + index for index in learned]
        ids, turn_ids = faithful([*before, *turns], lambda form: self._turns(form, asked, numbers, example.tools))
        return Answer(self.prompts.known_ids(ids), np.array(turn_ids, np.int32), turns[-1]["content"])

    def _turns(
        self, messages: list[Message], asked: str, learned: list[int], tools: list[dict[str, Any]] | None
    ) -> tuple[list[int], list[int]]:
        """Ids and turn ids of what follows `asked`, up to the end of the last answer."""
        renderer = self.prompts.renderer
        whole = renderer.text(messages, tools, asks=False)
        place = len(asked)
        ids: list[int] = []
        turn_ids: list[int] = []
        for turn, index in enumerate(learned):
            question = self._question(whole, messages[: index + 1], tools)
            if not question.startswith(asked):
                raise UnusableError(NOT_RENDERED, "the chat template renders the prompt otherwise before an answer")
            gap = self.prompts.plain_ids(whole[place : len(question)])
            span = self._span(whole, question, messages[: index + 1], tools)
            found = find_answer(span, question, messages[index])
            if found is None:
                bare = find_message(span, messages[index], 0)
                raise left_out(messages[index], index, "the reasoning" if bare else None)
            characters = learned_characters(span, found, messages[index], self._ends)
            own, mask = learned_tokens(self.prompts.tokenizer, span, characters)
            ids += gap + own
            turn_ids += [-1] * len(gap) + [turn if said else -1 for said in mask]
            place = len(question) + len(span)
        renderer.check(whole, messages, tools, asks=False)
        end = max(i for i, t in enumerate(turn_ids) if t >= 0) + 1
        return ids[:end], turn_ids[:end]

    def _span(self, whole: str, question: str, messages: list[Message], tools: Any) -> str:
        """The last message as the whole conversation shows it, from the end of `question` to the end of its turn."""
        answered = self.prompts.renderer.text(messages, tools, asks=False)
        shared = self._ends.shared(answered, whole, len(question))
        if shared is not None:
            return shared[len(question) :]
        # The template shows the message otherwise once the conversation goes on: its turn ends with the next eos.
        found = find_message(whole, messages[-1], len(question))
        if found is None:
            raise left_out(messages[-1], len(messages) - 1)
        at, length = self._ends.find(whole[found.end :])
        return whole[len(question) : found.end + at + length]

    def _question(self, whole: str, messages: list[Message], tools: Any) -> str:
        """What the conversation is up to where its last message begins, an answer; it has to begin `whole` as well."""
        renderer = self.prompts.renderer
        question = renderer.text(messages[:-1], tools, asks=True)
        if whole.startswith(question):
            return question
        answered = renderer.text(messages, tools, asks=False)
        if not answered.startswith(question):
            same = len(shared_start(answered, question))
            found = find_message(answered, messages[-1], same)
            if found is not None and found.reasoning_left_out:
                raise left_out(messages[-1], len(messages) - 1, "the reasoning")
            raise UnusableError(
                NOT_RENDERED,
                f"the chat template asks for the answer with {question[same:][:40]!r}, where the answer itself begins "
                f"with {answered[same:][:20]!r}: it has to go on from there; set data.chat_template_kwargs or "
                "model.chat_template so that it does, or give the answer the reasoning that it lacks",
            )
        same = len(shared_start(whole, question))
        raise UnusableError(
            NOT_RENDERED,
            f"the chat template renders a longer conversation otherwise than its beginning (from "
            f"{question[max(0, same - 20) : same + 20]!r} on), expected one that only appends; set model.chat_template to "
            "one that does, or learn the last answer alone (columns prompt and completion)",
        )


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
                reason = reason_of(error)
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
