"""Chat templates run in bounds, and what a person reads where one goes past them."""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from apportion.data import templates
from apportion.data.errors import DataError, UnusableError
from apportion.data.messages import clean_messages
from apportion.data.pair_tokens import ExampleEncoder, encode_sources
from apportion.data.pairs import PairColumns, read_demonstration
from apportion.data.prompts import PromptEncoder, PromptStream, every_prompt, load_tokenizer
from apportion.data.rendering import FAULTY_AFTER
from apportion.data.rows import Row
from apportion.data.sources import Source
from apportion.data.turns import TurnEncoder

USUAL = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# Only for rows that ask for it, so that the process which renders lives through the others.
ENDLESS = "{% if 'slow' in messages[0].content %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"


@pytest.fixture
def tokenizer():
    return load_tokenizer("builtin:tiny")


def encoder(tokenizer, template, **settings):
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer, max_prompt_tokens=10**6, **settings)


def source(*prompts):
    return Source("rows", [Row(i, f"rows.jsonl:{i + 1}", {"prompt": prompt}) for i, prompt in enumerate(prompts)])


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(templates, "LIMIT_SECONDS", 0.4)


def test_a_rendering_is_what_transformers_writes(tokenizer):
    conversations = [
        [{"role": "user", "content": "é \ud83d\ude00 {x}"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi", "name": 5}],
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for template in (tokenizer.chat_template, USUAL + "{{ tools|tojson }} {{ loud }} {{ eos_token }}"):
        tokenizer.chat_template = template
        for messages in conversations:
            for asks in (True, False):
                own = tokenizer.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=asks, tokenize=False, loud=3
                )
                assert templates.apply(tokenizer, messages, tools, asks, {"loud": 3, "padding": True}) == own
    tokenizer.chat_template = {"default": "a {{ messages[0].content }}", "tool_use": "b", "other": "c"}
    assert templates.apply(tokenizer, conversations[1][1:], None, True, {}) == "a hi"
    assert templates.apply(tokenizer, conversations[1], tools, True, {}) == "b"
    assert templates.apply(tokenizer, conversations[1], tools, True, {"chat_template": "other"}) == "c"
    with pytest.raises(templates.Refused, match="got continue_final_message, expected only names that the template"):
        templates.apply(tokenizer, conversations[1], None, True, {"continue_final_message": True})


def test_a_class_with_a_rendering_of_its_own_keeps_it(tokenizer):
    class Other(type(tokenizer)):
        def apply_chat_template(self, messages, **settings):
            return f"{messages[0]['content']} {settings['loud']} {os.getpid()}"

    tokenizer.__class__ = Other
    assert (
        templates.apply(tokenizer, [{"role": "user", "content": "hi"}], None, True, {"loud": 1})
        == f"hi 1 {os.getpid()}"
    )


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{% if 'slow' in messages[0].content %}{{ 10**(10**(7 + messages|length)) > 3 }}{% endif %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
        "{% if 'slow' in messages[0].content %}{{ m(60) }}{% endif %}",
    ],
)
def test_a_template_that_takes_too_long_is_ended(template, tokenizer, short):
    encode = encoder(tokenizer, template + USUAL)
    encode.token_ids("quick")
    start = time.monotonic()
    with pytest.raises(UnusableError) as caught:
        encode.token_ids("slow")
    assert time.monotonic() - start < 5.0
    assert str(caught.value) == (
        "the chat template took more than 0.4 s; set model.chat_template to one that does not, or leave such rows out with "
        "data.on_bad_row=skip"
    )
    assert caught.value.reason == "template_limit"
    assert tokenizer.decode(encode.token_ids("quick")) == "user: quick\n"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'a' * 3000000000 }}", "took more than 2 GiB of memory"),
        ("{{ '%9999999999d' % 3 }}", "took more than 2 GiB of memory"),
        ("{{ 'a'|center(3000000000) }}", "took more than 2 GiB of memory"),
        ("{% set x = [messages] * 1000000000 %}", "took more than 2 GiB of memory"),
        ("{{ 'a' * 3000000 }}", "wrote 3,000,000 characters for this row, more than 1,05"),
        (
            "{% for i in range(40000) %}{{ messages[0].content * 10 }}{% endfor %}",
            "characters for this row, more than 1,05",
        ),
    ],
)
def test_a_template_that_takes_too_much_memory_is_refused(template, said, tokenizer):
    with pytest.raises(UnusableError) as caught:
        encoder(tokenizer, template).token_ids("hi, who are you?")
    line = str(caught.value)
    assert said in line and line.startswith("the chat template ") and "\n" not in line
    assert line.endswith(
        "; set model.chat_template to one that does not, or leave such rows out with data.on_bad_row=skip"
    )
    assert tokenizer.decode(encoder(tokenizer, USUAL).token_ids("hi")) == "user: hi\n"


def test_the_second_row_past_a_limit_stops_everything_even_where_rows_are_skipped(tokenizer, short):
    rows = source("one", "slow", "two", *["slow"] * 50)
    with pytest.raises(DataError, match=r"^rows.jsonl:2: the chat template took more than 0.4 s; set model"):
        every_prompt([rows], encoder(tokenizer, ENDLESS + USUAL))
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        every_prompt([rows], encoder(tokenizer, ENDLESS + USUAL), "skip")
    assert time.monotonic() - start < 5.0
    assert str(caught.value) == (
        "rows.jsonl:4: the chat template took more than 0.4 s, for 2 conversations by now, so data.on_bad_row=skip does "
        "not help; set model.chat_template to one that does not"
    )
    kept, counts = every_prompt([source("one", "slow", "two")], encoder(tokenizer, ENDLESS + USUAL), "skip")
    assert [prompt.prompt for prompt in kept] == ["one", "two"] and counts == Counter(template_limit=1)


def test_a_template_at_fault_runs_no_more(tokenizer, monkeypatch):
    calls = []

    def late(*arguments):
        calls.append(arguments)
        raise templates.Overrun("took more than 10 s")

    monkeypatch.setattr(templates, "apply", late)
    encode = encoder(tokenizer, USUAL)
    for _ in range(5):
        with pytest.raises(UnusableError, match=r"^the chat template took more than 10 s[,;]"):
            encode.token_ids([{"role": "user", "content": "hi"}, {"role": "user", "content": "you"}])
    assert len(calls) == FAULTY_AFTER == 2


def test_demonstrations_and_turns_have_the_same_limits(tokenizer, short):
    rows = [Row(i, f"rows.jsonl:{i + 1}", {"prompt": "slow", "response": "a"}) for i in range(9)]
    examples = ExampleEncoder(encoder(tokenizer, ENDLESS + USUAL), 10**6)
    with pytest.raises(DataError, match=r"^rows.jsonl:2: the chat template took more than 0.4 s, for 2 conversations"):
        encode_sources([Source("rows", rows)], read_demonstration, PairColumns(), examples, "skip")
    stream = PromptStream([source(*["slow"] * 9)], encoder(tokenizer, ENDLESS + USUAL), 1, on_bad_row="skip")
    with pytest.raises(DataError, match=r"^rows.jsonl:\d: the chat template took more than 0.4 s, for 2 conversations"):
        stream.next_batch()
    with pytest.raises(DataError, match=r"^the chat template took more than 0.4 s; set model.chat_template"):
        TurnEncoder(encoder(tokenizer, ENDLESS.replace("slow", "x") + USUAL))


def test_what_became_of_the_process_that_renders_is_said_and_another_one_goes_on(tokenizer, monkeypatch):
    encode = encoder(tokenizer, USUAL)
    encode.token_ids("hi")
    child = templates._child
    variables = (
        entry.partition("=")[0] for entry in Path(f"/proc/{child._process.pid}/environ").read_text().split("\0")
    )
    assert set(variables) - {""} <= {*templates._VARIABLES, "PYTHONPATH", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}
    [worker] = Path(f"/proc/{child._process.pid}/task/{child._process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (int(worker), signal.SIGKILL)).start()
    with pytest.raises(UnusableError, match=r"^the chat template ended its process \(signal 9\); set"):
        encode.token_ids("hi")
    assert tokenizer.decode(encode.token_ids("hi")) == "user: hi\n" and templates._child is not child


def test_the_process_that_renders_imports_nothing_of_the_working_folder(tmp_path, monkeypatch, tokenizer):
    for name in ("json", "jinja2", "transformers", "pickle"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    templates._end()
    assert tokenizer.decode(encoder(tokenizer, USUAL).token_ids("hi")) == "user: hi\n"


def test_a_process_that_is_forked_while_another_thread_renders_can_render():
    with templates._lock:
        child = os.fork()
        if not child:
            os._exit(0 if templates._lock.acquire(timeout=5) and templates._child is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_role_that_only_the_users_template_knows(tokenizer, tmp_path):
    folder, file = tmp_path / "model", tmp_path / "mine.jinja"
    tokenizer.save_pretrained(folder)
    talk = [{"role": "narrator", "content": "It rains."}, {"role": "user", "content": "hi"}]
    expected = "got role 'narrator', expected one of system, .*, or one that model.chat_template compares roles with$"
    file.write_text("{% for m in messages %}'narrator' {{ m.role }}{{ m.content }}{{ 'narrator' }}{% endfor %}")
    load_tokenizer(str(folder), str(file))
    with pytest.raises(DataError, match=expected):  # it is in the template, but not beside a role
        clean_messages(talk)
    with pytest.raises(
        DataError, match=r"got from 'narrator', expected one of human, .*, or one that model\.chat_template"
    ):
        clean_messages([{"from": "narrator", "value": "It rains."}])
    file.write_text(
        "{% for m in messages %}{% if m['role'] == \"narrator\" %}[{{ m.content }}]{% elif m.role in ['user', 'x y'] %}"
        "Q: {{ m.content }}{% endif %}{% endfor %}"
    )
    mine = load_tokenizer(str(folder), str(file))
    assert clean_messages(talk) == talk
    assert clean_messages([{"from": "narrator", "value": "It rains."}]) == talk[:1]
    assert mine.decode(PromptEncoder(mine).token_ids(talk)) == "[It rains.]Q: hi"
    for role in ("wizard", "narrato", "x y", "m['role']"):
        with pytest.raises(DataError, match="got role"):
            clean_messages([{"role": role, "content": "a"}])


def test_a_system_text_that_a_template_repeats_without_end_is_not_searched_without_end(tokenizer):
    template = "{% for i in range(20000) %}{{ messages[0].content }}{% endfor %}"
    start = time.monotonic()
    with pytest.raises(UnusableError, match="the chat template leaves out or changes the text of message"):
        encoder(tokenizer, template).token_ids(
            [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "What is this?"},
            ]
        )
    assert time.monotonic() - start < 5.0


@pytest.fixture(autouse=True)
def templates_of_this_test(monkeypatch):
    monkeypatch.setattr("apportion.data.messages._templates", {})
