"""Pairs and demonstrations: every format, what is left out and why, and which tokens carry a loss."""

import copy
import gzip
import json

import numpy as np
import pytest

from apportion.conf.preference_schema import TOO_LONG as CONFIGURED_TOO_LONG
from apportion.data.errors import DataError
from apportion.data.pair_tokens import TOO_LONG, ExampleEncoder, encode_sources, hold_out, pack
from apportion.data.pairs import PairColumns, hh_messages, prompts_of, read_demonstration, read_pair, row_check
from apportion.data.prompts import PromptEncoder, load_tokenizer
from apportion.data.sources import load_sources

COLUMNS = PairColumns()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def hh(*turns):
    return "".join(f"\n\n{who}: {said}" for who, said in zip(("Human", "Assistant") * 9, turns, strict=False))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:tiny")


def encoder(tokenizer, max_prompt=64, max_tokens=96, too_long="skip", **options):
    return ExampleEncoder(PromptEncoder(tokenizer, max_prompt_tokens=max_prompt, **options), max_tokens, too_long)


def spelled(tokenizer, answer):
    """The tokens that carry a loss, as text, and all of them."""
    ids = answer.token_ids
    return tokenizer.decode(ids[answer.turn_ids >= 0]), tokenizer.decode(ids)


# formats


def test_text_columns_are_a_pair():
    pair = read_pair({"prompt": "q", "chosen": "a", "rejected": "b", "score": 3}, COLUMNS)
    assert (pair.prompt, pair.answers, pair.margin) == ("q", ["a", "b"], None)


def test_hh_transcripts_are_conversations_whatever_stands_beside_them():
    row = {"prompt": "q", "chosen": hh("1 + 1?", "2"), "rejected": hh("1 + 1?", "3")}
    pair = read_pair(row, COLUMNS)
    assert (pair.prompt, pair.answers) == ([user("1 + 1?")], [[assistant("2")], [assistant("3")]])
    shown = read_demonstration(row, COLUMNS)
    assert (shown.prompt, shown.answers) == ([user("1 + 1?")], [[assistant("2")]])


def test_a_prompt_that_is_text_stays_as_it_is_written():
    for prompt in ("Assistant:", "Human: q\nAssistant:", hh("hi", "yes?", "1 + 1?", "")):
        assert read_pair({"prompt": prompt, "chosen": "2", "rejected": "3"}, COLUMNS).prompt == prompt


def test_columns_may_be_called_otherwise_and_carry_a_margin():
    columns = PairColumns("q", "good", "bad", margin="gap")
    pair = read_pair({"q": "1", "good": "2", "bad": "3", "gap": 1}, columns)
    assert (pair.prompt, pair.answers, pair.margin) == ("1", ["2", "3"], 1.0)


def test_answers_may_be_messages_after_a_prompt_of_messages():
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    pair = read_pair(row, COLUMNS)
    assert pair.prompt == [user("q")]
    assert pair.answers == [[assistant("a")], [assistant("b")]]


def test_conversations_share_what_they_begin_with_and_a_prompt_column_beside_them_is_not_read():
    start = [user("q"), assistant("r"), user("s")]
    row = {"prompt": "q", "chosen": [*start, assistant("a")], "rejected": [*start, assistant("b")]}
    pair = read_pair(row, COLUMNS)
    assert pair.prompt == start
    assert pair.answers == [[assistant("a")], [assistant("b")]]


def test_hh_transcripts_become_messages_with_their_shared_beginning_as_the_prompt():
    row = {"chosen": hh("q", "r", "s ", " yes"), "rejected": hh("q", "r", "s ", " no\n\nreally")}
    pair = read_pair(row, COLUMNS)
    assert pair.prompt == [user("q"), assistant("r"), user("s")]
    assert pair.answers == [[assistant("yes")], [assistant("no\n\nreally")]]


def test_hh_transcripts_that_part_earlier_keep_every_turn_after():
    row = {"chosen": hh("q", "r", "s", "t"), "rejected": hh("q", "x", "y", "z")}
    pair = read_pair(row, COLUMNS)
    assert pair.prompt == [user("q")]
    assert pair.answers[1] == [assistant("x"), user("y"), assistant("z")]


@pytest.mark.parametrize(
    "silent", [{"content": ""}, {"content": " \n"}, {"content": []}, {"content": "", "tool_calls": []}]
)
def test_a_turn_that_says_nothing_is_not_learned(silent):
    question, answer = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
    turns = [question, {"role": "assistant", **silent}, question, answer]
    with pytest.raises(DataError, match="a turn of the assistant is empty, expected an answer; train: false keeps it"):
        read_demonstration({"messages": turns}, PairColumns())
    with pytest.raises(DataError, match="a turn of the assistant is empty"):
        read_pair({"prompt": [question], "chosen": turns[1:], "rejected": [answer]}, PairColumns())
    turns[1]["train"] = False
    assert len(read_demonstration({"messages": turns}, PairColumns()).answers[0]) == 3
    pair = read_pair({"chosen": turns, "rejected": [*turns[:3], {**answer, "content": "3"}]}, PairColumns())
    assert pair.answers == [[answer], [{**answer, "content": "3"}]]


def test_an_unanswered_last_turn_is_dropped():
    assert hh_messages(hh("q", "r", "s"))[-1] == user("s")
    row = {"chosen": hh("q", "r", "s"), "rejected": hh("q", "x")}
    assert read_pair(row, COLUMNS).answers == [[assistant("r")], [assistant("x")]]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"prompt": "q", "response": "a"}, "q", "a"),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, [user("q")], [assistant("a")]),
        (
            {"messages": [user("q"), assistant("a"), user("r"), assistant("b"), user("?")]},
            [user("q")],
            [assistant("a"), user("r"), assistant("b")],
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a"),
        ({"chosen": hh("q", "r", "s", "a"), "rejected": "x"}, [user("q"), assistant("r"), user("s")], [assistant("a")]),
    ],
)
def test_a_demonstration_is_read_from_what_the_row_has(row, prompt, answer):
    example = read_demonstration(row, COLUMNS)
    assert (example.prompt, example.answers) == (prompt, [answer])


@pytest.mark.parametrize(
    ("row", "reason", "line"),
    [
        (
            {"prompt": "q", "chosen": "a"},
            "missing_column",
            "no column 'rejected', got prompt, chosen; name the right one",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            "missing_column",
            "no column 'prompt', got chosen, rejected; expected one, or",
        ),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty", "column 'chosen' is empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty", "column 'prompt' is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal", "the chosen answer equals the rejected one"),
        ({"chosen": hh("q", "a"), "rejected": hh("q", "a")}, "equal", "the chosen conversation equals the rejected"),
        ({"chosen": hh("q", "a"), "rejected": hh("p", "b")}, "broken", "the conversations part at message 1"),
        ({"chosen": hh("q", "a"), "rejected": hh("q", "")}, "empty", "the assistant's last turn is empty"),
        ({"chosen": hh("q", "a"), "rejected": hh("q", "a", "r", "b")}, "broken", "one conversation is the beginning"),
        (
            {"prompt": "q", "chosen": [user("a")], "rejected": "b"},
            "empty",
            "the assistant's last turn is empty or missing",
        ),
        (
            {"prompt": "q", "chosen": ["a"], "rejected": "b"},
            "broken",
            "column 'chosen': got message 'a', expected role",
        ),
        (
            {"prompt": [assistant("a")], "chosen": "a", "rejected": "b"},
            "broken",
            "column 'prompt': the last message is",
        ),
    ],
)
def test_a_row_without_a_pair_says_why(row, reason, line):
    got = row_check(read_pair, COLUMNS)(row, "prompt")
    assert got is not None
    assert got[0] == reason
    assert got[1].startswith(line)


@pytest.mark.parametrize("value", [None, "much", -1, float("nan"), True])
def test_a_margin_is_a_number_of_at_least_0(value):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "gap": value}
    with pytest.raises(DataError, match=r"column 'gap': got .*, expected a number of at least 0"):
        read_pair(row, PairColumns(margin="gap"))


# tokens


def test_the_prompt_is_that_of_reinforcement_learning_and_the_answer_ends_with_eos(tokenizer):
    example = encoder(tokenizer).encode(read_pair({"prompt": "q", "chosen": "a", "rejected": "bc"}, COLUMNS), "x")
    assert example.prompt_ids.tolist() == PromptEncoder(tokenizer).token_ids("q").tolist()
    assert tokenizer.decode(example.prompt_ids) == "<|user|>q<|end|><|assistant|>"
    assert [spelled(tokenizer, answer)[0] for answer in example.answers] == ["a<|end|>", "bc<|end|>"]


def test_only_the_assistants_tokens_carry_a_loss(tokenizer):
    row = {"messages": [user("q"), assistant("a"), user("r"), assistant("b")]}
    answer = encoder(tokenizer).encode(read_demonstration(row, COLUMNS), "x").answers[0]
    assert spelled(tokenizer, answer) == ("a<|end|>b<|end|>", "a<|end|><|user|>r<|end|><|assistant|>b<|end|>")
    assert answer.turn_ids.tolist() == [0, 0, -1, -1, -1, -1, 1, 1]


def test_a_template_with_text_after_eos_and_a_system_prompt_gives_the_whole_templates_tokens():
    smol = load_tokenizer("builtin:smollm2-135m-instruct")
    messages = [user("q"), assistant("a b"), user("r"), assistant("c")]
    example = encoder(smol, system_prompt="Be brief.").encode(read_demonstration({"messages": messages}, COLUMNS), "x")
    whole = smol.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *messages], tokenize=True, return_dict=True
    )["input_ids"]
    assert [*example.prompt_ids, *example.answers[0].token_ids] == whole[:-1]  # without the newline after the last eos
    assert spelled(smol, example.answers[0])[0] == "a b<|im_end|>c<|im_end|>"


def test_without_a_chat_template_text_is_text_and_eos_is_added(tokenizer):
    example = encoder(tokenizer, chat=False).encode(read_demonstration({"prompt": "q ", "response": "a"}, COLUMNS), "x")
    assert tokenizer.decode(example.prompt_ids) == "q "
    assert spelled(tokenizer, example.answers[0])[0] == "a<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    changed = load_tokenizer("builtin:tiny")
    changed.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|{{ m.role }}|>{{ m.content }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    row = {"messages": [user("q"), assistant("a"), user("r"), assistant("b")]}
    with pytest.raises(DataError, match="renders a longer conversation otherwise than its beginning"):
        encoder(changed).encode(read_demonstration(row, COLUMNS), "x")


LONG = {"prompt": "0123456789", "chosen": "abcd", "rejected": "ab"}  # 3 special tokens; answers of 5 and 3


@pytest.mark.parametrize("limits", [(12, 96), (64, 17)])
def test_too_long_is_refused_with_numbers(tokenizer, limits):
    with pytest.raises(DataError, match="got a prompt of 13 and an answer of 5 tokens, expected at most"):
        encoder(tokenizer, *limits, too_long="error").encode(read_pair(LONG, COLUMNS), "x")


def test_a_prompt_may_lose_its_beginning_and_both_answers_keep_the_same_one(tokenizer):
    example = encoder(tokenizer, 64, 12, too_long="truncate_prompt").encode(read_pair(LONG, COLUMNS), "x")
    assert tokenizer.decode(example.prompt_ids) == "56789<|end|><|assistant|>"
    assert [len(answer.token_ids) for answer in example.answers] == [5, 3]
    with pytest.raises(DataError, match="an answer of 5 tokens"):
        encoder(tokenizer, 64, 5, too_long="truncate_prompt").encode(read_pair(LONG, COLUMNS), "x")


def write(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def encoded(path, tokenizer, on_bad_row, **options):
    sources = load_sources(path, on_bad_row=on_bad_row, check=row_check(read_pair, COLUMNS))
    return encode_sources(sources, read_pair, COLUMNS, encoder(tokenizer, **options), on_bad_row)


ROWS = [
    {"chosen": hh("q", "a"), "rejected": hh("q", "b")},
    {"chosen": hh("q", "a"), "rejected": hh("q", "a")},
    {"chosen": hh("q", "a" * 99), "rejected": hh("q", "b")},
    {"chosen": hh("r", "c"), "rejected": hh("r", "d e")},
    {"chosen": hh("q", "a"), "rejected": hh("q", "")},
]


def test_what_is_left_out_is_counted_by_reason(tokenizer, tmp_path):
    examples, counts = encoded(write(tmp_path / "p.jsonl.gz", ROWS), tokenizer, "skip")
    assert [e.example_id for e in examples] == ["p:0", "p:3"]
    assert dict(counts) == {"equal": 1, "too_long": 1, "empty": 1}


def test_equal_answers_are_an_error_with_file_and_line_unless_bad_rows_are_skipped(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl.gz", ROWS[:2])
    with pytest.raises(DataError, match=r"p\.jsonl\.gz:2: the chosen conversation equals the rejected one"):
        encoded(path, tokenizer, "error")


def test_answers_written_differently_with_the_same_tokens_are_equal(tokenizer):
    pair = read_pair({"prompt": [user("q")], "chosen": "a", "rejected": [assistant("a")]}, COLUMNS)
    with pytest.raises(DataError, match="both answers have the same tokens"):
        encoder(tokenizer).encode(pair, "x")


def test_a_file_without_any_pair_is_an_error_that_counts(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"no row gives an example.*'too_long': 1"):
        encoded(write(tmp_path / "p.jsonl.gz", ROWS[2:3]), tokenizer, "skip")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"chosen": hh("q", "a \ud83d"), "rejected": hh("q", "b")}, "got half a character"),
        ({"prompt": "q \ud83d", "chosen": "a", "rejected": "b"}, "got half a character"),
        (
            {
                "prompt": [{"role": "tool", "content": "t"}, user("q")],
                "chosen": [assistant("a")],
                "rejected": [assistant("b")],
            },
            "the chat template refuses these messages",
        ),
    ],
)
def test_text_that_cannot_become_tokens_is_named_by_its_line_or_skipped_and_counted(row, told, tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl.gz", [ROWS[0], row])
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{{ m['name'] + '' if m['role'] == 'tool' }}{{ m['content'] + eos_token }}{% endfor %}"
    )
    with pytest.raises(DataError, match=rf"p\.jsonl\.gz:2: {told}"):
        encoded(path, strict, "error")
    examples, counts = encoded(path, strict, "skip")
    assert ([e.example_id for e in examples], dict(counts)) == (["p:0"], {"broken": 1})


def test_content_that_is_null_is_a_bad_row_when_it_is_read():
    row = {"prompt": [assistant(None), user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert row_check(read_pair, COLUMNS)(row, "prompt") == (
        "broken",
        "column 'prompt': message 1 (assistant): content is null, expected text (null is for the assistant beside "
        "tool_calls)",
    )


def test_packed_pairs_lie_side_by_side(tokenizer, tmp_path):
    examples, _ = encoded(write(tmp_path / "p.jsonl.gz", ROWS), tokenizer, "skip")
    data = pack(examples)
    assert len(data) == 2 and len(data.batch) == 4
    assert data.rows(np.array([1])).tolist() == [2, 3]
    assert tokenizer.decode(data.batch.sequence(3)) == "<|user|>r<|end|><|assistant|>d e<|end|>"
    assert data.example_tokens().tolist() == [2 * (4 + 2), (4 + 2) + (4 + 4)]
    assert data.batch.action_mask.all() and np.isnan(data.batch.behavior_logprobs).all()


def test_held_out_prompts_never_appear_in_training(tokenizer, tmp_path):
    rows = [{"prompt": f"q{i % 10}", "chosen": f"a{i}", "rejected": "b"} for i in range(40)]
    examples, _ = encoded(write(tmp_path / "p.jsonl.gz", rows), tokenizer, "skip")
    train, held_out = hold_out(examples, 0.2, seed=0)
    assert (len(train), len(held_out)) == (32, 8)
    assert not {e.prompt_ids.tobytes() for e in train} & {e.prompt_ids.tobytes() for e in held_out}
    again = hold_out(examples, 0.2, seed=0)[1]
    assert [e.example_id for e in again] == [e.example_id for e in held_out]
    with pytest.raises(DataError, match=r"data\.eval_share: got 0\.9 of 1 prompts"):
        hold_out(examples[:1], 0.9, seed=0)


def test_a_files_prompts_are_a_source_for_reinforcement_learning(tmp_path):
    path = write(tmp_path / "p.jsonl.gz", ROWS)
    [source] = load_sources([{"source": "function:apportion.data.pairs:prompts_of", "path": path}])
    assert [row.values for row in source.rows] == [{"prompt": [user("q")]}, {"prompt": [user("r")]}]
    assert len(list(prompts_of(path))) == 2


def test_weights_of_sources_are_refused(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl.gz", ROWS[:1])
    sources = load_sources([{"source": path, "weight": 2}], check=row_check(read_pair, COLUMNS))
    with pytest.raises(DataError, match=r"p: got weight 2\.0, expected none: every example is seen once an epoch"):
        encode_sources(sources, read_pair, COLUMNS, encoder(tokenizer), "error")


def test_the_configuration_names_every_way_with_long_rows():
    assert CONFIGURED_TOO_LONG == TOO_LONG
