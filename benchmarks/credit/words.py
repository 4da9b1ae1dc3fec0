"""The task of two questions: a language whose words are several letters long, and readers with tastes.

A prompt names a topic; a response is words of a lexicon, each ended by a space. Each topic likes and dislikes words
of its own; the supervised phase teaches to spell, and leans a little towards what the topic likes. The reward of a response is
known at its end alone: the value of its first WORDS words to the topic, a word said again 0, an unknown one
as much as a typical disliked one, as a share of what the best words would give (so 1 is the best there is, 0 about what
chance gives).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.credit.learner import Settings, supervise
from benchmarks.credit.model import Ending, TinyLM

LETTERS, TOPICS, LEXICON, WORDS, LIMIT = 12, 6, 24, 5, 28
LEAN = 0.6  # of the supervised phase towards words that a topic likes
SPACE, STOP, FIRST_TOPIC = LETTERS, LETTERS + 1, LETTERS + 2
VOCABULARY = FIRST_TOPIC + TOPICS
ENDING = Ending(LIMIT, STOP)


class Language:
    def __init__(self, random: np.random.Generator, topics: int = TOPICS) -> None:
        self.random, self.topics = random, topics
        words: dict[tuple[int, ...], None] = {}
        while len(words) < LEXICON:
            words[tuple(random.integers(0, LETTERS, random.integers(2, 7)).tolist())] = None
        self.words = list(words)
        self.number = {word: index for index, word in enumerate(self.words)}
        self.values = random.normal(0, 1, (topics, LEXICON))

    def draw_prompts(self, count: int, random: np.random.Generator) -> Tensor:
        """[count, 1]"""
        return torch.from_numpy(random.integers(0, self.topics, (count, 1)) + FIRST_TOPIC)

    def all_prompts(self, times: int) -> Tensor:
        """[topics * times, 1]"""
        return torch.arange(self.topics).repeat(times)[:, None] + FIRST_TOPIC

    def spoken(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts with responses as the supervised phase teaches them [b, S], and where those stand."""
        rows = []
        for prompt in prompts.tolist():
            wanted = self.values[prompt[0] - FIRST_TOPIC] * LEAN + self.random.gumbel(size=LEXICON)
            chosen = np.argsort(-wanted)[:WORDS]  # drawn without putting back
            self.random.shuffle(chosen)
            letters = [letter for index in chosen for letter in (*self.words[index], SPACE)]
            rows.append([*prompt, *letters, STOP][: 1 + LIMIT])
        ids = torch.full((len(rows), 1 + LIMIT), STOP)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, 1 : len(row)] = True
        return ids, mask

    def reward(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        liked = self.values[prompt[0] - FIRST_TOPIC]
        best = np.sort(liked)[-WORDS:].sum()
        said: set[int] = set()
        total, word = 0.0, []
        spoken = 0
        for letter in response:
            if letter == STOP or spoken == WORDS:
                break
            if letter != SPACE:
                word.append(letter)
                continue
            index = self.number.get(tuple(word))
            if index is None:
                total -= float(np.abs(liked).mean())
            elif index not in said:
                total += float(liked[index])
                said.add(index)
            word, spoken = [], spoken + 1
        return total / float(best)

    def rewards(self, prompts: Tensor, answers: list[list[int]]) -> np.ndarray:
        """[b]; as many answers to each prompt as there are times more of them."""
        each = len(answers) // len(prompts)
        rows = prompts.repeat_interleave(each, 0).tolist()
        return np.array([self.reward(prompt, answer) for prompt, answer in zip(rows, answers, strict=True)])


def start_model(seed: int, language: Language, steps: int) -> TinyLM:
    """The supervised phase."""
    torch.manual_seed(seed)
    random, model = np.random.default_rng([seed, 1]), TinyLM(VOCABULARY, limit=1 + LIMIT)
    supervise(
        model, lambda step: language.spoken(language.draw_prompts(64, random)), steps, Settings(learning_rate=1.5e-3)
    )
    return model
