"""Environments: the microwave's rules, finding one by name, and the adapters on fakes with the libraries' own interfaces."""

import random
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from apportion.data.builtin import TINY_CHAT_TEMPLATE, resolve_model
from apportion.data.environment_adapters import GymnasiumText, TextArenaGame, plain_render, without_own_move
from apportion.data.environments import FOODS, Microwave, load_environment, microwave_rows, numbered_rows
from apportion.data.errors import DataError
from apportion.data.prompts import PromptEncoder, load_tokenizer
from apportion.data.turns import TurnEncoder

CHATML = (
    "{% for m in messages %}{{ '<|spare_0|>' + m['role'] + '\n' + m['content'] + '<|spare_1|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|spare_0|>assistant\n' }}{% endif %}"
)


# the microwave


def played(*actions, **parameters):
    kitchen = Microwave(**parameters)
    kitchen.reset(food="pie", seed=1)
    return [kitchen.step(action) for action in actions]


def test_three_right_actions_earn_one_at_the_last():
    steps = played("open the microwave", "put it in the microwave", "close the microwave")
    assert [step[1:3] for step in steps] == [(0.0, False), (0.0, False), (1.0, True)]
    assert [step[0] for step in steps] == [
        "The microwave is open. The pie is on the table.",
        "The microwave is open. The pie is in it.",
        "The pie is heated.",
    ]


def test_five_steps_without_the_goal_cost_one():
    steps = played(*["put it in the microwave"] * 5)
    assert [step[1:3] for step in steps] == [(0.0, False)] * 4 + [(-1.0, True)]
    assert steps[0][0] == "Nothing happens. The microwave is closed. The pie is on the table."


def test_closing_the_empty_microwave_undoes_opening_it_and_five_steps_still_suffice():
    steps = played(
        "open the microwave",
        "close the microwave",
        "open the microwave",
        "put it in the microwave",
        "close the microwave",
    )
    assert [step[1] for step in steps] == [0, 0, 0, 0, 1]


def test_an_action_may_be_written_with_capitals_and_a_full_stop_but_must_be_one_of_the_list():
    assert played("  Open the Microwave.\n")[0][0] == "The microwave is open. The pie is on the table."
    assert played("open it", wrong_action=-0.25)[0] == (
        "Nothing happens. The microwave is closed. The pie is on the table.", -0.25, False, {}
    )  # fmt: skip


def test_the_last_step_pays_for_a_wrong_action_too():
    assert played("dance", steps=1, wrong_action=-0.5)[0][1:3] == (-1.5, True)


def test_shuffling_lists_the_actions_in_an_order_of_the_seed():
    orders = {Microwave(shuffle=True).reset(food="pie", seed=seed).partition("Actions: ")[2] for seed in range(20)}
    assert len(orders) == 6
    assert Microwave(shuffle=True).reset("pie", 3) == Microwave(shuffle=True).reset("pie", 3)


def test_foods_of_training_and_evaluation_differ():
    train, held_out = [{row["food"] for row in microwave_rows(side)} for side in (False, True)]
    assert (len(train), len(held_out), train & held_out) == (16, 8, set())
    assert train | held_out == set(FOODS)
    assert list(numbered_rows("go", 2, first_seed=5)) == [{"prompt": "go", "seed": 5}, {"prompt": "go", "seed": 6}]


def test_a_microwave_without_steps_is_refused():
    with pytest.raises(DataError, match="microwave: got steps=0, expected at least 1"):
        Microwave(steps=0)


# by name


def test_a_name_a_path_and_a_file_are_found(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    def reset(self): ...\n    def step(self, action): ...\n")
    assert load_environment("microwave") is Microwave
    assert load_environment("apportion.data.environments:Microwave") is Microwave
    assert load_environment(f"{tmp_path}/mine.py:Mine").__name__ == "Mine"


def test_a_misspelt_name_and_a_class_that_cannot_step_are_refused():
    with pytest.raises(DataError, match=r"got 'microwav', expected one of .*did you mean 'microwave'"):
        load_environment("microwav")
    with pytest.raises(DataError, match=r"collections:OrderedDict has no reset\(\), expected reset"):
        load_environment("collections:OrderedDict")


# Gymnasium


class Corridor:
    """Gymnasium's API: five places, +1 at the right end, cut after eight steps."""

    closed = 0

    def __init__(self, text=False):
        self.text = text

    def reset(self, *, seed=None, options=None):
        self.place, self.taken = seed % 3, 0
        return self._see(), {}

    def step(self, action):
        self.taken += 1
        self.place = max(0, self.place + (1 if action in (1, "right") else -1))
        return self._see(), np.float64(self.place == 4), self.place == 4, self.taken == 8, {"taken": self.taken}

    def render(self):
        return "." * self.place + "\x1b[41mX\x1b[0m"

    def close(self):
        Corridor.closed += 1

    def _see(self):
        return f"place {self.place}" if self.text else self.place


def describe(observation):
    return f"at {observation}"


def test_named_actions_become_numbers_and_rendering_becomes_text():
    corridor = GymnasiumText(f"{__name__}:Corridor", actions=["left", "right"], observe="render")
    assert corridor.reset(seed=2) == "..[X]"
    assert corridor.step("Right!") == ("...[X]", 0.0, False, {"taken": 1, "truncated": False})
    assert corridor.step("right") == ("....[X]", 1.0, True, {"taken": 2, "truncated": False})
    corridor.close()
    assert Corridor.closed == 1


def test_text_goes_through_as_it_is_and_a_time_limit_is_a_truncation():
    corridor = GymnasiumText(f"{__name__}:Corridor", make={"text": True})
    assert corridor.reset(seed=0) == "place 0"
    last = [corridor.step("left") for _ in range(8)][-1]
    assert last == ("place 0", 0.0, True, {"taken": 8, "truncated": True})
    assert GymnasiumText(f"{__name__}:Corridor", observe=f"{__name__}:describe").reset(seed=1) == "at 1"


def test_text_that_names_no_action_is_answered_and_ends_the_episode_only_when_repeated():
    corridor = GymnasiumText(f"{__name__}:Corridor", actions=["left", "right"], observe="render", wrong_action=-0.1,
                             max_wrong=2)  # fmt: skip
    corridor.reset(seed=0)
    assert corridor.step("jump") == ("Expected one of: left, right", -0.1, False, {"truncated": False})
    corridor.step("right")
    assert [corridor.step("jump")[2:] for _ in range(2)] == [(False, {"truncated": False}), (True, {"truncated": True})]


def test_an_observation_that_is_no_text_needs_a_description():
    with pytest.raises(DataError, match=r"observation of type int, expected text; set environment.params.observe"):
        GymnasiumText(f"{__name__}:Corridor").reset(seed=0)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(DataError, match="gymnasium is not installed; pip install gymnasium"):
        GymnasiumText("FrozenLake-v1")
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(DataError, match="pip install textarena"):
        TextArenaGame("Wordle-v0")


class Grid:
    """Gymnasium's API with four actions: shows which one was taken."""

    action_space = types.SimpleNamespace(n=4)

    def reset(self, *, seed=None, options=None):
        return "start", {}

    def step(self, action):
        return f"action {action}", 0.0, False, False, {}


def taken(actions, *texts):
    grid = GymnasiumText(f"{__name__}:Grid", actions=actions)
    grid.reset()
    return [grid.step(text)[0] for text in texts]


def test_actions_that_are_no_words_are_known_as_they_are_written():
    unknown = "Expected one of: <, v, >, ^"
    assert taken(["<", "v", ">", "^"], "<", " v\n", ">", "^", "V", "!", "") == [
        "action 0", "action 1", "action 2", "action 3", "action 1", unknown, unknown
    ]  # fmt: skip


def test_words_that_two_actions_share_name_neither():
    names = ["go", "go!", "Stop", "wait"]
    unknown = f"Expected one of: {', '.join(names)}"
    assert taken(names, "go", "go!", "Go.", "stop!") == ["action 0", "action 1", unknown, "action 2"]


@pytest.mark.parametrize(
    "names", [["left", "left ", "up", "down"], ["left", " ", "up", "down"], [True, False, "a", "b"]]
)
def test_actions_that_nothing_tells_apart_are_refused(names):
    expected = f"gymnasium: got actions {names!r}, expected texts that are neither empty nor the same"
    with pytest.raises(DataError) as error:
        GymnasiumText(f"{__name__}:Grid", actions=names)
    assert str(error.value) == expected


def test_as_many_actions_as_the_environment_has_are_expected():
    with pytest.raises(DataError, match=r"got actions \['left', 'right'\], expected one for each of the 4 of "):
        GymnasiumText(f"{__name__}:Grid", actions=["left", "right"])


def test_gymnasium_s_own_frozen_lake_is_walked_to_its_goal():
    lake = GymnasiumText("FrozenLake-v1", make={"render_mode": "ansi", "is_slippery": False}, observe="render",
                         actions=["<", "v", ">", "^"])  # fmt: skip
    assert lake.reset(seed=1).splitlines()[-4:] == ["[S]FFF", "FHFH", "FFFH", "HFFG"]
    steps = [lake.step(action) for action in ["v", "v", ">", ">", "v", ">"]]
    assert [step[1:3] for step in steps] == [(0.0, False)] * 5 + [(1.0, True)]
    assert steps[-1][0].splitlines()[-4:] == ["SFFF", "FHFH", "FFFH", "HFF[G]"]
    with pytest.raises(DataError, match="expected one for each of the 4 of FrozenLake-v1"):
        GymnasiumText("FrozenLake-v1", actions=["left", "right"])


def test_only_what_a_terminal_highlights_is_put_in_brackets():
    assert plain_render("\x1b[41mS\x1b[0mFF\x1b[1m") == "[S]FF"


# TextArena


class Nim:
    """TextArena's API: two players take one to three of seven; who takes the last wins."""

    def __init__(self, whole_history=False):
        self.whole_history = whole_history

    def reset(self, num_players, seed=None):
        self.left, self.turn, self.log, self.read = 7, 0, [(-1, "seven lie here", "PROMPT")], [0, 0]

    def get_observation(self):
        if self.whole_history:
            return self.turn, "".join(f"\n[Player {s}] {text}" for s, text, _ in self.log)
        seen, self.read[self.turn] = self.read[self.turn], len(self.log)
        return self.turn, self.log[seen:]

    def step(self, action):
        self.left -= int(action.strip("[]"))
        self.log += [(self.turn, action, "PLAYER_ACTION"), (-1, f"{self.left} left", "GAME_MESSAGE")]
        self.winner = self.turn
        self.turn = 1 - self.turn
        return self.left <= 0, {}

    def close(self):
        return {self.winner: 1, 1 - self.winner: -1}, {}


def takes_one(observation, seed):
    return "[1]"


@pytest.fixture
def arena(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", types.SimpleNamespace(make=lambda id, **options: Nim(**options)))


def test_the_opponent_moves_between_turns_and_the_reward_comes_last(arena):
    game = TextArenaGame("Nim-v0", players=2, opponent=f"{__name__}:takes_one")
    assert game.reset(seed=3) == "seven lie here"
    assert game.step("[3]") == ("4 left\n[1]\n3 left", 0.0, False, {})
    assert game.step("[3]") == ("", 1.0, True, {})


def test_the_second_player_sees_the_first_ones_move_and_loses_when_it_ends_there(arena):
    game = TextArenaGame("Nim-v0", players=2, player=1, opponent=f"{__name__}:takes_one")
    assert game.reset() == "seven lie here\n[1]\n6 left"
    assert game.step("[3]")[1:3] == (0.0, False)
    assert game.step("[1]") == ("", -1.0, True, {})


def test_a_wrapper_that_repeats_the_history_gives_only_what_is_new_without_the_own_move(arena):
    game = TextArenaGame("Nim-v0", players=2, opponent=f"{__name__}:takes_one", make={"whole_history": True})
    assert game.reset() == "[Player -1] seven lie here"
    assert game.step("[2]")[0] == "[Player -1] 5 left\n[Player 1] [1]\n[Player -1] 4 left"


class Lottery:
    """A game that draws from the process's generators as TextArena's do: seeded in its reset, then step by step."""

    def reset(self, num_players, seed=None):
        random.seed(seed)
        self.shown = [self._draw()]

    def _draw(self):
        time.sleep(0.001)  # another thread's turn
        return f"{random.randrange(10**6)} {np.random.randint(10**6)}"

    def get_observation(self):
        shown, self.shown = self.shown, []
        return 0, [(-1, text, "GAME_MESSAGE") for text in shown]

    def step(self, action):
        self.shown.append(self._draw())
        return False, {}


def test_games_of_one_seed_draw_the_same_side_by_side_and_leave_the_process_s_own_draws_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", types.SimpleNamespace(make=lambda id: Lottery()))

    def played(seed):
        game = TextArenaGame("Lottery")
        return (game.reset(seed=seed), *(game.step("on")[0] for _ in range(5)))

    random.seed(7)
    outside = random.getstate()
    with ThreadPoolExecutor(16) as pool:
        games = list(pool.map(played, [3, 4] * 16))
    assert random.getstate() == outside
    assert set(games) == {games[0], games[1]} and games[0] != games[1]
    assert games[::2] == [games[0]] * 16
    assert len({text for game in games[:2] for text in game}) == 12


def test_a_move_of_several_lines_or_in_a_wrapper_s_brackets_is_left_out_too():
    text = "\n[Player 0] {}\n[GAME] a wall\n"
    for said, shown in [
        ("I think\nso: [3]", "I think\nso: [3]"),
        ("go up\n", "[go up\n]"),
        (" go\nup", "[ go\nup]"),
        ("[3]", "[3]"),
        ("a.b (c", "[a.b (c]"),
    ]:
        assert without_own_move(text.format(shown), said) == "\n[GAME] a wall\n", said
    assert without_own_move("[Player 0] [go]", "go") == ""
    for said, shown in [("go", "going home"), ("go", "they go"), ("", "[]")]:
        assert without_own_move(text.format(shown), said) == text.format(shown), said


def test_a_move_that_a_game_repeats_as_its_own_message_is_left_out_of_messages(monkeypatch):
    class Echo(Lottery):
        def step(self, action):
            self.shown += [f"[{action}]", "higher"]
            return False, {}

    monkeypatch.setitem(sys.modules, "textarena", types.SimpleNamespace(make=lambda id: Echo()))
    game = TextArenaGame("Echo")
    game.reset(seed=1)
    assert game.step("7")[0] == "higher"


def test_textarena_s_own_game_gives_one_seed_one_number_and_no_move_twice():
    def answers(seed):
        game = TextArenaGame("GuessTheNumber-v0")
        assert "between 1 and 20" in game.reset(seed=seed)
        return tuple(game.step(f"I say\n[{guess}]")[:3] for guess in (10, 4, 15))

    with ThreadPoolExecutor(8) as pool:
        games = list(pool.map(answers, [5, 6] * 8))
    assert set(games[::2]) == {games[0]} and set(games[1::2]) == {games[1]}
    assert games[0] == answers(5)
    assert all("I say" not in text for game in games for text, _, _ in game)
    assert games[0][0][0] in ("[GAME] The target number is higher.", "[GAME] The target number is lower.", "")


def test_a_game_of_two_needs_an_opponent(arena):
    with pytest.raises(DataError, match="got players=2 without opponent"):
        TextArenaGame("Nim-v0", players=2)
    with pytest.raises(DataError, match=r"got player=2 of players=2, expected 0 to 1"):
        TextArenaGame("Nim-v0", players=2, player=2, opponent=f"{__name__}:takes_one")


# tokens between turns


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model("builtin:tiny"))


def encoder(tokenizer, template=TINY_CHAT_TEMPLATE, role="user", **settings):
    tokenizer.chat_template = template
    return TurnEncoder(PromptEncoder(tokenizer, **settings), role)


def whole(tokenizer, *messages, **settings):
    """The ids of a conversation rendered in one piece, for canonical words the same as those put together."""
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True, **settings)
    return ids["input_ids"]


def said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(("template", "end"), [(TINY_CHAT_TEMPLATE, "<|end|>"), (CHATML, "<|spare_1|>")])
@pytest.mark.parametrize("role", ["user", "tool"])
def test_turns_put_together_are_the_template_s_own_conversation(tokenizer, template, end, role):
    turns = encoder(tokenizer, template, role)
    action = tokenizer("go left" + end, add_special_tokens=False)["input_ids"]
    ids = [*turns.first("start", ""), *action, *turns.between(action[-1], "a wall"), *action]
    ids += turns.between(action[-1], "a door").tolist()
    rendered = whole(
        tokenizer, said("user", "start"), said("assistant", "go left"), said(role, "a wall"),
        said("assistant", "go left"), said(role, "a door"),
    )  # fmt: skip
    assert ids == rendered


def test_a_turn_that_was_cut_gets_its_end_and_one_that_ended_keeps_its_own(tokenizer):
    turns = encoder(tokenizer, CHATML)
    end, line = tokenizer("<|spare_1|>\n", add_special_tokens=False)["input_ids"]
    ended, cut, cut_at_line = (turns.between(last, "wall") for last in (end, 70, line))
    assert cut.tolist() == cut_at_line.tolist() == [end, *ended]
    assert tokenizer.decode(ended) == "\n<|spare_0|>user\nwall<|spare_1|>\n<|spare_0|>assistant\n"


def test_the_first_observation_joins_the_prompt_or_is_a_message_of_its_own(tokenizer):
    joined = encoder(tokenizer).first("find the door", "a wall")
    assert tokenizer.decode(joined) == "<|user|>find the door\n\na wall<|end|><|assistant|>"
    own = encoder(tokenizer, role="tool", system_prompt="be brief").first("find the door", "a wall")
    assert (
        tokenizer.decode(own)
        == "<|system|>be brief<|end|><|user|>find the door<|end|><|tool|>a wall<|end|><|assistant|>"
    )


def test_without_a_chat_template_observations_are_lines(tokenizer):
    turns = encoder(tokenizer, chat=False)
    assert tokenizer.decode(turns.first("find it", "a wall")) == "find it\na wall\n"
    assert tokenizer.decode(turns.between(5, "a door")) == "\na door\n"


def test_a_template_that_shows_no_such_role_is_refused_at_once(tokenizer):
    silent = "{% for m in messages if m['role'] != 'tool' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"shows no message of role 'tool' .* set environment.observation_role"):
        encoder(tokenizer, silent, "tool")
    angry = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"roles user, assistant, tool \(no tools\)"):
        encoder(tokenizer, angry, "tool")


# the apprentice


def test_the_apprentice_learns_actions_drawn_at_random_and_nothing_of_what_is_said_to_it():
    from collections import Counter
    from itertools import islice

    from apportion.data.apprentice import IGNORED, encoded, random_episodes
    from apportion.data.apprentice import _tokenizer as tokenizer_of_its_own

    episodes = list(islice(random_episodes(5), 300))
    actions = Counter(m["content"] for episode in episodes for m in episode if m["role"] == "assistant")
    assert set(actions) == set(Microwave.actions.values())
    assert max(actions.values()) / min(actions.values()) < 1.2
    own = tokenizer_of_its_own()
    ids, labels = encoded(own, episodes[0])
    assert ids == own.apply_chat_template(episodes[0], return_dict=True)["input_ids"]
    learnt = own.decode([label for label in labels if label != IGNORED])
    assert learnt == "".join(m["content"] + "<|end|>" for m in episodes[0] if m["role"] == "assistant")
