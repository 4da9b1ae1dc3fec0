"""The task of the POAD question: an environment whose actions are phrases of a given length.

An episode has up to TURNS turns. In each the policy writes a phrase, ended by END; the environment answers with its
state. Of a book of PHRASES phrases of `length` words one is right in each state of each dish; right ones bring the dish to
its next state, others change nothing. NEEDED right ones end the episode with reward 1, running out of turns with 0. There
is one phrase more, of a single word: it leaves, and ends the episode with reward LEAVING.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from apportion.batch import Batch, Trajectory
from benchmarks.credit.learner import Settings, supervise
from benchmarks.credit.model import Stream, TinyLM

WORDS, PHRASES, NEEDED, TURNS, DISHES = 6, 4, 2, 4, 2
LEAVING, LEAVE_SHARE = 0.25, 0.05  # what leaving is worth, and how often the supervised phase leaves
LEAVE, END, FIRST_STATE = WORDS, WORDS + 1, WORDS + 2
FIRST_DISH = FIRST_STATE + NEEDED
VOCABULARY = FIRST_DISH + DISHES


class Kitchen:
    def __init__(self, length: int, random: np.random.Generator) -> None:
        book: dict[tuple[int, ...], None] = {}
        while len(book) < PHRASES:
            book[tuple(random.integers(0, WORDS, length).tolist())] = None
        self.length, self.book = length, list(book)
        self.right = random.integers(0, PHRASES, (DISHES, NEEDED))
        self.longest = length + 2  # tokens of a turn

    @property
    def limit(self) -> int:
        """Tokens of an episode."""
        return 2 + TURNS * (self.longest + 1)

    def demonstrations(self, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Episodes of phrases drawn from the book [count, S], and where the policy wrote."""
        ids = torch.full((count, self.limit), END)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row in range(count):
            episode = Episode(self, int(random.integers(DISHES)))
            while not episode.done:
                leaves = random.random() < LEAVE_SHARE
                for word in (LEAVE,) if leaves else self.book[random.integers(PHRASES)]:
                    episode.write(word, 0.0)
                episode.write(END, 0.0)
                episode.hear()
            ids[row, : len(episode.ids)] = torch.tensor(episode.ids)
            mask[row, 2 : len(episode.ids)] = torch.tensor(episode.chosen)
        return ids, mask


@dataclass
class Episode:
    kitchen: Kitchen
    dish: int
    state: int = 0
    left: bool = False
    done: bool = False
    waiting: bool = False  # for the environment to say its state
    ids: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)  # of the tokens behind the prompt
    turns: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    _action: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = [FIRST_DISH + self.dish, FIRST_STATE]

    def write(self, token: int, logprob: float) -> None:
        """A token of the policy; END, or the last that fits into a turn, is the action's last."""
        self._append(token, len(self.rewards), logprob)
        self._action.append(token)
        if token == END or len(self._action) == self.kitchen.longest:
            self._act()

    def hear(self) -> None:
        """The environment's token after an action; nothing if the episode has ended."""
        if self.waiting:
            self._append(FIRST_STATE + self.state, -1, float("nan"))
            self.waiting = False

    def _append(self, token: int, turn: int, logprob: float) -> None:
        self.ids.append(token)
        self.chosen.append(turn >= 0)
        self.turns.append(turn)
        self.logprobs.append(logprob)

    def _act(self) -> None:
        said, self._action = tuple(self._action[:-1]), []
        book, reward = self.kitchen.book, 0.0
        self.left = said == (LEAVE,)
        if said in book and book.index(said) == self.kitchen.right[self.dish, self.state]:
            self.state += 1
        if self.state == NEEDED:
            reward = 1.0
        elif self.left:
            reward = LEAVING
        self.rewards.append(reward)
        self.done = reward > 0 or len(self.rewards) == TURNS
        self.waiting = not self.done

    def trajectory(self, number: int) -> Trajectory:
        return Trajectory(
            prompt_id=str(number),
            group_id=number,
            sample_index=0,
            token_ids=np.array(self.ids, np.int32),
            prompt_length=2,
            action_mask=np.array(self.chosen, bool),
            turn_ids=np.array(self.turns, np.int32),
            behavior_logprobs=np.array(self.logprobs, np.float32),
            policy_version=0,
            finish_reason="stop",
            text="",
            turn_rewards=np.array(self.rewards),
        )


@torch.no_grad()
def play(model: TinyLM, kitchen: Kitchen, count: int, generator: torch.Generator) -> list[Episode]:
    """`count` episodes side by side, the dishes in turn."""
    model.eval()
    episodes = [Episode(kitchen, number % DISHES) for number in range(count)]
    stream = Stream(model, torch.tensor([episode.ids for episode in episodes]), generator)
    while True:
        tokens, logprobs = (x.tolist() for x in stream.draw())
        for episode, token, logprob in zip(episodes, tokens, logprobs, strict=True):
            if episode.waiting:
                episode.hear()
            elif not episode.done:
                episode.write(token, logprob)
        if all(episode.done for episode in episodes):
            return episodes
        stream.advance(torch.tensor([episode.ids[-1] for episode in episodes]))


def batch_of(episodes: list[Episode]) -> Batch:
    return Batch.from_trajectories([episode.trajectory(number) for number, episode in enumerate(episodes)])


def start_model(seed: int, kitchen: Kitchen, episodes: int, steps: int) -> TinyLM:
    """The supervised phase, on so many episodes."""
    torch.manual_seed(seed)
    random, model = np.random.default_rng([seed, 1]), TinyLM(VOCABULARY, limit=kitchen.limit)
    ids, mask = kitchen.demonstrations(episodes, random)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        rows = random.integers(0, len(ids), 24)
        return ids[rows], mask[rows]

    supervise(model, draw, steps, Settings(learning_rate=1.5e-3))
    return model
