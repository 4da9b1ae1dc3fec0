"""Multi-turn rollouts: the policy acts, its environment answers, until every episode of a batch is over.

Turns are batched: one round samples an action for every live episode, then steps all of their environments. The ids
that were sampled are kept as they were; observation tokens stand between them with `action_mask` False, turn -1 and
no behaviour log-prob. An episode ends when its environment is done, when a limit (turns or tokens) cuts it, or when
its environment fails: then it has no reward and takes no part in the update.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from apportion.actors.engines import Request, RolloutEngine, Sample, Sampling
from apportion.actors.environment import Action, EpisodeStart, EpisodeState
from apportion.actors.failure_kinds import first_of_each_kind
from apportion.batch import Prompt, Trajectory
from apportion.data.errors import DataError
from apportion.data.prompts import PromptEncoder, load_tokenizer
from apportion.data.turns import TurnEncoder
from apportion.platform import progress

NO_TOKENS = "rollout: the engine gave no token for the first turn"


class Environments(Protocol):
    """Environment instances of one rollout worker, wherever they are."""

    def start(self, starts: list[EpisodeStart]) -> list[EpisodeState]: ...
    def step(self, actions: list[Action]) -> list[EpisodeState]: ...
    def finish(self, episodes: list[int]) -> None: ...


@dataclass
class EpisodeLimits:
    max_turns: int
    max_turn_tokens: int | None  # None: what is left of the response


@dataclass
class EpisodeSpec:
    """What a rollout worker needs to play episodes, beside its engine and the environment actors."""

    limits: EpisodeLimits
    step_timeout_seconds: float
    threads: int  # of one environment actor
    role: str  # of observations in the chat template
    tokenizer: str
    chat_template: str | None
    trust_remote_code: bool
    system_prompt: str | None
    chat: bool
    chat_template_kwargs: dict[str, Any]
    max_prompt_tokens: int
    tools_column: str | None = "tools"
    vocabulary: int | None = None  # tokens of the model; None: not known

    def encoder(self) -> TurnEncoder:
        tokenizer = load_tokenizer(self.tokenizer, self.chat_template, self.trust_remote_code)
        return TurnEncoder(
            PromptEncoder(
                tokenizer, self.system_prompt, self.chat, self.chat_template_kwargs, self.max_prompt_tokens,
                self.tools_column, self.vocabulary,
            ),
            self.role,
        )  # fmt: skip


@dataclass
class EpisodeReport:
    """What playing a batch of episodes was."""

    sampling_seconds: float = 0.0
    environment_seconds: float = 0.0
    sampled_tokens: int = 0
    failures: int = 0  # episodes without a reward
    first_failure: str | None = None
    kinds: dict[str, str] = field(default_factory=dict)  # the first text of each kind of failure


@dataclass
class Episode:
    """One episode under way. Lists hold one array a turn or observation, in order."""

    prompt: Prompt
    group: int
    index: int
    prompt_ids: np.ndarray  # [L] int32, first observation included
    response: list[np.ndarray] = field(default_factory=list)
    turns: list[np.ndarray] = field(default_factory=list)  # turn of each token, -1 for observations
    logprobs: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)  # one a turn
    tokens: int = 0  # of the response so far
    last_sample: Sample | None = None
    finish_reason: str = ""  # empty while it lives
    terminated: bool = False
    failure: str | None = None

    @property
    def live(self) -> bool:
        return not self.finish_reason

    def act(self, sample: Sample) -> None:
        self._append(sample.token_ids, len(self.rewards), sample.logprobs)
        self.last_sample = sample

    def observe(self, token_ids: np.ndarray) -> None:
        self._append(token_ids, -1, np.full(len(token_ids), np.nan, np.float32))

    def _append(self, token_ids: np.ndarray, turn: int, logprobs: np.ndarray) -> None:
        self.response.append(np.asarray(token_ids, np.int32))
        self.turns.append(np.full(len(token_ids), turn, np.int32))
        self.logprobs.append(np.asarray(logprobs, np.float32))
        self.tokens += len(token_ids)

    def end(self, reason: str, terminated: bool = False) -> None:
        self.finish_reason, self.terminated = reason, terminated

    def fail(self, text: str) -> None:
        self.failure = text
        self.end("abort")


class EpisodeRunner:
    """Plays groups of episodes with one engine."""

    def __init__(
        self, engine: RolloutEngine, environments: Environments, turns: TurnEncoder, limits: EpisodeLimits
    ) -> None:
        self._engine, self._environments = engine, environments
        self._encoder, self._limits = turns, limits

    def run(
        self,
        prompts: list[Prompt],
        first_group: int,
        responses: int,
        sampling: Sampling,
        seeds: Seeds,
    ) -> tuple[list[Trajectory], EpisodeReport]:
        """A group of `responses` episodes for each prompt. `sampling.max_tokens` bounds a whole response, observation
        tokens included."""
        report = EpisodeReport()
        episodes = self._start(prompts, first_group, responses, seeds, report)
        for turn in range(self._limits.max_turns):
            live = [number for number, episode in enumerate(episodes) if episode.live]
            if not live:
                break
            self._act(episodes, live, sampling, (seeds, turn), report)
            self._step(episodes, [n for n in live if episodes[n].live], turn, sampling.max_tokens, report)
            progress.advance()
        cut = [number for number, episode in enumerate(episodes) if episode.finish_reason == "length"]
        self._environments.finish(cut)
        failed = [episode.failure for episode in episodes if episode.failure is not None]
        report.failures, report.first_failure = len(failed), failed[0] if failed else None
        report.kinds = first_of_each_kind(failed)
        report.sampled_tokens = sum(int((turns >= 0).sum()) for e in episodes for turns in e.turns)
        return [self._trajectory(episode, seeds.version) for episode in episodes], report

    def _start(
        self, prompts: list[Prompt], first_group: int, responses: int, seeds: Seeds, report: EpisodeReport
    ) -> list[Episode]:
        owners = [(place, index) for place in range(len(prompts)) for index in range(responses)]
        starts = [
            EpisodeStart(
                number, {"prompt": prompts[place].prompt, **prompts[place].columns}, seeds.task(prompts[place])
            )
            for number, (place, _) in enumerate(owners)
        ]
        begun = time.perf_counter()
        states = self._environments.start(starts)
        report.environment_seconds += time.perf_counter() - begun
        episodes, unplayed = [], []
        for number, ((place, index), state) in enumerate(zip(owners, states, strict=True)):
            prompt = prompts[place]
            episode = Episode(prompt, first_group + place, index, prompt.token_ids)
            episodes.append(episode)
            if state.failure is not None:
                episode.fail(state.failure)
                continue
            try:
                episode.prompt_ids = self._first_ids(prompt, state.observation)
            except DataError as error:
                episode.fail(f"reset: {error}")
                unplayed.append(number)
        self._environments.finish(unplayed)
        return episodes

    def _first_ids(self, prompt: Prompt, observation: str) -> np.ndarray:
        encoder = self._encoder.encoder
        tools = prompt.columns.get(encoder.tools_column) if encoder.tools_column else None
        token_ids, limit = self._encoder.first(prompt.prompt, observation, tools), encoder.max_prompt_tokens
        if len(token_ids) > limit:
            raise DataError(
                f"prompt and first observation are {len(token_ids)} tokens, expected at most {limit}; "
                "raise data.max_prompt_tokens"
            )
        return token_ids

    def _act(
        self,
        episodes: list[Episode],
        live: list[int],
        sampling: Sampling,
        seeded: tuple[Seeds, int],
        report: EpisodeReport,
    ) -> None:
        """Sample one action for each live episode."""
        seeds, turn = seeded
        requests = []
        for number in live:
            episode = episodes[number]
            left = sampling.max_tokens - episode.tokens
            room = left if self._limits.max_turn_tokens is None else min(left, self._limits.max_turn_tokens)
            ids = np.concatenate([episode.prompt_ids, *episode.response])
            requests.append(Request(ids, seeds.sample(episode.prompt, episode.index, turn), room))
        begun = time.perf_counter()
        samples = self._engine.generate(requests, sampling)
        report.sampling_seconds += time.perf_counter() - begun
        empty = []
        for number, sample in zip(live, samples, strict=True):
            if len(sample.token_ids):
                episodes[number].act(sample)
                continue
            # Without a token there is no action, so the environment is not asked; what was earned before stays.
            empty.append(number)
            if turn == 0:
                episodes[number].fail(NO_TOKENS)
            else:
                episodes[number].end("abort")
        self._environments.finish(empty)

    def _step(
        self, episodes: list[Episode], live: list[int], turn: int, max_tokens: int, report: EpisodeReport
    ) -> None:
        """Give every action to its environment, and its answer to the episode."""
        actions = []
        for number in live:
            sample = episodes[number].last_sample
            assert sample is not None
            actions.append(Action(number, sample.text))
        begun = time.perf_counter()
        states = self._environments.step(actions) if actions else []
        report.environment_seconds += time.perf_counter() - begun
        last = turn + 1 == self._limits.max_turns
        for number, state in zip(live, states, strict=True):
            self._answer(episodes[number], state, last, max_tokens)
        # Where the template does not show an observation, the environment waits for an action that never comes.
        unseen = [n for n, s in zip(live, states, strict=True) if episodes[n].failure and not (s.failure or s.done)]
        self._environments.finish(unseen)

    def _answer(self, episode: Episode, state: EpisodeState, last: bool, max_tokens: int) -> None:
        if state.failure is not None:
            episode.fail(state.failure)
            return
        episode.rewards.append(state.reward)
        if state.done:
            episode.end("length" if state.truncated else "stop", terminated=not state.truncated)
            if not state.truncated:
                return
        try:
            observation = self._between(episode, state.observation)
        except DataError as error:
            episode.fail(f"step: {error}")
            return
        # One token must be left to act with. An episode that a limit cuts keeps the observation where it fits: the
        # critic's value of what would follow is that of the state after it.
        fits = episode.tokens + len(observation) + (0 if last or state.done else 1) <= max_tokens
        if fits:
            episode.observe(observation)
        if episode.live and (last or not fits):
            episode.end("length")

    def _between(self, episode: Episode, observation: str) -> np.ndarray:
        assert episode.last_sample is not None
        return self._encoder.between(int(episode.last_sample.token_ids[-1]), observation)

    def _trajectory(self, episode: Episode, version: int) -> Trajectory:
        response, turns, logprobs = (
            np.concatenate([np.empty(0, kind), *parts]).astype(kind)
            for parts, kind in (
                (episode.response, np.int32),
                (episode.turns, np.int32),
                (episode.logprobs, np.float32),
            )
        )
        return Trajectory(
            prompt_id=episode.prompt.prompt_id,
            group_id=episode.group,
            sample_index=episode.index,
            token_ids=np.concatenate([episode.prompt_ids, response]),
            prompt_length=len(episode.prompt_ids),
            action_mask=turns >= 0,
            turn_ids=turns,
            behavior_logprobs=logprobs,
            policy_version=version,
            finish_reason=episode.finish_reason,
            text=self._encoder.text(response),
            terminated=episode.terminated,
            turn_rewards=np.array(episode.rewards, np.float64),
            failure=episode.failure,
        )


@dataclass
class Seeds:
    """Seeds that follow from names alone, so that an episode that is played again is the same."""

    version: int  # of the weights
    task: Callable[[Prompt], int]  # of an environment; shared by the episodes of a prompt
    sample: Callable[[Prompt, int, int], int | None]  # of a turn's sampling: prompt, place in the group, turn
