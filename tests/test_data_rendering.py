"""What a row says is what the template shows, or the row is refused: forms of messages, tools, reasoning, templates."""

import copy
import json
import random
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers.processors import TemplateProcessing

from apportion.data.errors import DataError
from apportion.data.find import Place, find_message
from apportion.data.messages import clean_messages, clean_tools
from apportion.data.pair_tokens import ExampleEncoder, encode_sources
from apportion.data.pairs import PairColumns, read_demonstration, read_pair, row_check
from apportion.data.prompts import PromptEncoder, PromptStream, load_tokenizer
from apportion.data.rows import Row, prompt_problem
from apportion.data.sources import Source, load_sources
from apportion.data.spans import Ends, learned_tokens
from apportion.data.turns import TurnEncoder

ASK = "{% if add_generation_prompt %}<|spare_0|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|spare_0|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}" + ASK
# Reasoning of earlier turns goes; the last turn always has a reasoning block.
QWEN3_LIKE = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|spare_0|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > last.user and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ said }}{% for c in m.tool_calls or [] %}{% if said or not loop.first %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": '
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}"
    "{% endif %}}\n</tool_call>{% endfor %}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}" + ASK
)
R1_LIKE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|spare_1|>{{ m.content.split('</think>')[-1] }}<|end|>"
    "{% else %}<|spare_0|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|spare_1|><think>\n{% endif %}"
)
LLAMA_LIKE = (
    "<|spare_0|>system\nCutting Knowledge Date: December 2023\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}<|end|>{% for m in messages %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '<|spare_0|>assistant\n{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|end|>{% elif m.role == 'tool' %}<|spare_0|>ipython\n"
    "{{ m.content | tojson }}<|end|>{% else %}<|spare_0|>{{ m.role }}\n{% if tools and loop.first %}"
    "{% for t in tools %}{{ t | tojson(indent=4) }}\n{% endfor %}{% endif %}{{ m.content | trim }}<|end|>{% endif %}"
    "{% endfor %}" + ASK
)
MISTRAL_LIKE = (  # the system message is shown in the last one of the user
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|spare_0|>{% if loop.last and system %}{{ system }}\n\n{% endif %}"
    "{{ m.content }}<|spare_1|>{% elif m.tool_calls %}[CALLS]{% for c in m.tool_calls %}"
    "{% if not c.id or c.id | length != 9 %}{{ raise_exception('ids of 9 characters') }}{% endif %}"
    "{{ c.function | tojson }}#{{ c.id }}{% endfor %}<|end|>{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
GEMMA_LIKE = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content | trim + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|spare_0|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content | trim }}<|spare_1|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|spare_0|>model\n{% endif %}"
)
PHI_LIKE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|spare_1|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|end|>{% endif %}"
)
OPENAI_LIKE = (  # arguments are joined to text
    "{% for m in messages %}<|spare_0|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}{% endfor %}<|end|>\n{% endfor %}" + ASK
)
REPR = OPENAI_LIKE.replace("{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}",
                           "<call>{{ c.function.name }} {{ c.function.arguments }}</call>")  # fmt: skip
TEMPLATES = {
    "chatml": CHATML, "qwen3": QWEN3_LIKE, "r1": R1_LIKE, "llama": LLAMA_LIKE, "mistral": MISTRAL_LIKE,
    "gemma": GEMMA_LIKE, "phi": PHI_LIKE, "openai": OPENAI_LIKE, "repr": REPR,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("builtin:tiny")


@pytest.fixture
def encoder(tiny):
    def make(template=None, **options):
        tokenizer = copy.deepcopy(tiny)
        tokenizer.chat_template = template or tokenizer.chat_template
        return PromptEncoder(tokenizer, max_prompt_tokens=4000, **options)

    return make


@pytest.fixture
def learn(encoder):
    """(prompt, what carries a loss, prompt and answer) of a row as text."""

    def make(row, template=None, read=read_demonstration, place=0, **options):
        prompts = encoder(template, **options)
        example = ExampleEncoder(prompts, 8000).encode(read(row, PairColumns()), "x")
        answer, decode = example.answers[place], prompts.tokenizer.decode
        said = decode(answer.token_ids[answer.turn_ids >= 0])
        return decode(example.prompt_ids), said, decode([*example.prompt_ids, *answer.token_ids])

    return make


@pytest.fixture
def ask(encoder):
    def make(messages, template=None, tools=None, **options):
        prompts = encoder(template, **options)
        return prompts.tokenizer.decode(prompts.token_ids(messages, tools))

    return make


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def call(name="weather", arguments=None, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments or {"city": "Oslo"}}, **more}


def tool(text):
    return {"role": "tool", "content": text}


def refused(reason, line):
    return pytest.raises(DataError, match=line, check=lambda error: getattr(error, "reason", "broken") == reason)


# one form


@pytest.mark.parametrize(
    ("written", "clean"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]}, user("a\nb\nc")),
        ({"from": "human", "value": "a", "role": None, "content": None}, user("a")),
        ({"from": "gpt", "value": "a", "weight": 0}, assistant("a", train=False)),
        ({"from": "observation", "value": "a"}, tool("a")),
        ({"role": "user", "content": "a", "name": None, "tool_calls": None}, user("a")),
        (assistant(None, tool_calls=[call(arguments={"city": "Oslo", "unit": None}, id=None)]), assistant("", tool_calls=[call()])),
        (assistant("a", tool_calls=[]), assistant("a")),
        (assistant(None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}), assistant("", tool_calls=[call(arguments='{"city": "Oslo"}')])),
        ({"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'}, assistant("", tool_calls=[call()])),
        ({"role": "function", "content": "a"}, tool("a")),
        ({"role": "human", "content": "a"}, user("a")),
        ({"role": "gpt", "content": [{"type": "text", "text": "a"}]}, assistant("a")),
        ({"role": "model", "content": "a"}, assistant("a")),
        ({"role": "observation", "content": "a"}, {"role": "observation", "content": "a"}),
        ({"role": "function_call", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'}, assistant("", tool_calls=[call()])),
        (assistant([{"type": "thinking", "thinking": "so", "text": None}, {"type": "text", "text": "a"}]), assistant("a", reasoning_content="so")),
        (assistant("a", reasoning="so", reasoning_content="so"), assistant("a", reasoning_content="so")),
        (assistant("a", weight=1), assistant("a")),
    ],
)  # fmt: skip
def test_every_form_of_a_message_becomes_one(written, clean):
    assert clean_messages([written]) == [clean]
    assert clean_messages(clean_messages([written])) == [clean]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "message 1 .user.: got a part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "got a part of type 'text'"),
        ({"role": "user", "content": 7}, "got content '7', expected text or a list of text parts"),
        ({"role": "user", "content": None}, "content is null, expected text"),
        ({"role": "user"}, "expected role and content"),
        ({"role": "wizard", "content": "a"}, "got role 'wizard', expected one of system, developer, user, assistant"),
        ({"role": "User", "content": "a"}, r"got role 'User', .* \(did you mean 'user'\?\)"),
        ({"role": "a\nb", "content": "a"}, r"^message 1 \('a\\nb'\): got role"),
        ({"role": "user", "content": [{"type": ["x"], "text": "a"}]}, "got a part of type"),
        ({"from": "alien", "value": "a"}, "got from 'alien', expected one of human, user, gpt"),
        ({"from": "function_call", "value": "no JSON"}, "expected JSON with name and arguments"),
        (assistant("", tool_calls=["weather"]), "got tool call 'weather', expected a function with a name"),
        (assistant("", tool_calls=[{"function": {"name": "f", "arguments": [1]}}]), r"got arguments '\[1\]', expected a mapping"),
        (assistant("a", weight=0.5), "got weight 0.5, expected 0 or 1"),
    ],
)  # fmt: skip
def test_what_is_no_message_of_text_is_refused_by_its_number_and_role(message, line):
    with pytest.raises(DataError, match=line):
        clean_messages([message])
    assert prompt_problem({"prompt": [message, user("?")]}, "prompt")[0] == "broken"


def test_tools_are_a_list_or_its_json_text():
    tools = [{"type": "function", "function": {"name": "f", "description": None}}]
    clean = [{"type": "function", "function": {"name": "f"}}]
    assert clean_tools(tools) == clean_tools(json.dumps(tools)) == clean_tools([json.dumps(tools[0])]) == clean
    assert clean_tools(None) is clean_tools([]) is clean_tools("") is None
    for wrong in ("hammer, saw", ["hammer"], 3, [{"type": "function"}]):
        with pytest.raises(DataError, match=r"tools: got .* expected a list of tools"):
            clean_tools(wrong)


# prompts


def test_a_list_of_parts_is_its_text_whatever_the_template_makes_of_lists(ask):
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "2+2?"}]}]
    strict = CHATML.replace("{{ m.content }}", "{{ m.content if m.content is string else '' }}")
    for template in (None, strict):
        shown = ask(parts, template)
        assert "What is\n2+2?" in shown and "type" not in shown


@pytest.mark.parametrize(
    "messages", [[user("s"), assistant("a"), user("?")], [system("be"), user("us"), assistant("t"), user("e")]]
)
def test_a_short_text_that_the_template_leaves_out_is_not_found_in_what_it_writes_itself(messages, ask):
    for silent in {message["role"] for message in messages[:-1]} - {"user"}:
        template = CHATML.replace("{{ m.content }}", f"{{{{ m.content if m.role != '{silent}' }}}}")
        with refused("not_rendered", f"leaves out or changes the text of message . .{silent}"):
            ask(messages, template)
    assert ask(messages, CHATML).count("<|end|>") == len(messages)


def test_equal_messages_need_a_place_each_and_messages_keep_their_order(ask):
    twice = [user("Go on with the story."), assistant("Well, it was late."), user("Go on with the story.")]
    once = "{% for m in messages[:-1] %}{{ m.content }}\n{% endfor %}"
    with refused("not_rendered", "leaves out or changes the text of message 3"):
        ask(twice, once)
    back = "{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}"
    with refused("not_rendered", "leaves out or changes the text"):
        ask(twice[1:], back)


def test_a_system_message_may_be_shown_in_a_later_one(ask):
    messages = [
        system("Be brief, always."),
        user("Who was here before me?"),
        assistant("Nobody at all."),
        user("Be brief, always."),
    ]
    assert ask(messages, MISTRAL_LIKE).endswith("<|spare_0|>Be brief, always.\n\nBe brief, always.<|spare_1|>")
    with refused("not_rendered", "message 1 .system"):
        ask(
            [system("Be brief, always."), *messages[1:3], user("And now, who is here?")],
            MISTRAL_LIKE.replace("{{ system }}", ""),
        )


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{{ messages }}", "as a dump of a container|leaves out or changes"),
        ("{% for m in messages %}{{ m }}{% endfor %}", "as a dump of a container .\"{'role': 'user'"),
        ("{% for m in messages %}{{ m | tojson }}{% endfor %}", "as a dump of a container"),
        ("{% for m in messages %}{{ m.get('name') }}: {{ m.content }}{% endfor %}", "writes None, which the row does not say"),
        ("{% for m in messages %}{{ tools }}{{ m.content }}{% endfor %}", "writes None"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "leaves out or changes the text of message 1"),
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", "leaves out or changes the text of message 1"),
    ],
)  # fmt: skip
def test_dumps_none_and_changed_text_are_refused(template, line, ask):
    with refused("not_rendered", line):
        ask([user("What is two and two?")], template)


def test_none_and_dumps_that_the_row_says_itself_are_text(ask):
    said = "Does f(None) give {'role': 'user'} or None?"
    assert said in ask([user(said)])
    assert "return None" in ask(
        [user("go on")], "Tools return None.{% for m in messages %}{{ m.content }}{% endfor %} return None"
    )


def test_reasoning_of_earlier_turns_may_go_from_a_prompt_and_is_counted_once(encoder):
    thought = assistant("<think>\n17 and 5 are 22\n</think>\n\nIt is 22.")
    rows = [Row(i, f"x:{i}", {"prompt": [user("17+5?"), thought, user("sure?")]}) for i in range(2)]
    rows += [Row(2, "x:2", {"prompt": [user("17+5?"), assistant("It is 22."), user("sure?")]})]
    for template in (QWEN3_LIKE, R1_LIKE):
        stream = PromptStream([Source("x", rows)], encoder(template), 9)
        assert [("17 and 5" in stream._encoder.tokenizer.decode(p.token_ids)) for p in stream.next_batch()] == [
            False
        ] * 9
        assert stream.reasoning_left_out == 2
        again = PromptStream([Source("x", rows)], encoder(template), 9)
        again.load_state(stream.state())
        assert again.reasoning_left_out == 2
    kept = PromptStream([Source("x", rows)], encoder(CHATML), 9)
    kept.next_batch()
    assert kept.reasoning_left_out == 0
    old = {key: value for key, value in kept.state().items() if not key.endswith("reasoning_left_out")}
    kept.load_state(old)  # of a checkpoint from before it was counted


def test_a_users_words_about_thinking_are_no_reasoning(ask):
    drops = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    with refused("not_rendered", "message 1 .user"):
        ask([user("What does <think>so</think> mean here?")], drops)


def test_a_row_that_is_not_shown_is_a_bad_row_with_its_place_or_counted(encoder):
    template = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}")
    rows = [
        Row(0, "x.jsonl:1", {"prompt": "hi"}),
        Row(1, "x.jsonl:2", {"prompt": [system("Answer in French."), user("hi")]}),
    ]
    with pytest.raises(DataError, match=r"^x\.jsonl:2: the chat template leaves out or changes the text of message 1 "):
        PromptStream([Source("x", rows)], encoder(template), 2, shuffle=False).next_batch()
    stream = PromptStream([Source("x", rows)], encoder(template), 2, shuffle=False, on_bad_row="skip")
    assert [prompt.prompt_id for prompt in stream.next_batch()] == ["x:0:0", "x:0:1"]
    assert stream.skipped == {"not_rendered": 1}


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_the_tools_of_a_row_reach_the_template_or_the_row_is_refused(encoder, ask):
    source = Source("x", [Row(0, "x:1", {"prompt": "How warm is it?", "tools": json.dumps(TOOLS)})])
    prompts = encoder(LLAMA_LIKE)
    shown = prompts.tokenizer.decode(prompts.prompt(source, source.rows[0], 0).token_ids)
    assert '"name": "weather"' in shown and '"parameters"' in shown
    with refused("not_rendered", r"x:1: the chat template does not show the tool 'weather'.*data\.tools_column=null"):
        encoder(CHATML).prompt(source, source.rows[0], 0)
    left = encoder(CHATML, tools_column=None)
    assert left.prompt(source, source.rows[0], 0).columns == {"tools": json.dumps(TOOLS)}
    with pytest.raises(DataError, match=r"got tools with data\.chat=false"):
        encoder(chat=False).token_ids("hi", TOOLS)


def test_a_prompt_of_parts_reaches_reward_functions_as_text(encoder):
    source = Source("x", [Row(0, "x:1", {"prompt": [{"from": "human", "value": "hi"}]})])
    assert prompt_problem(source.rows[0].values, "prompt") is None
    assert encoder().prompt(source, source.rows[0], 0).prompt == [user("hi")]


def test_a_prompt_without_any_text_is_empty():
    assert prompt_problem({"prompt": [user(" ")]}, "prompt")[0] == "empty"
    assert prompt_problem({"prompt": [{"role": "user", "content": []}]}, "prompt")[0] == "empty"


# the end of a prompt


def test_what_a_tokenizer_adds_behind_a_raw_prompt_is_taken_away_and_the_beginning_stays(tiny):
    appends = copy.deepcopy(tiny)
    ids = [(token, tiny.convert_tokens_to_ids(token)) for token in ("<|spare_0|>", "<|end|>")]
    appends._tokenizer.post_processor = TemplateProcessing(
        single="<|spare_0|> $A <|end|>", pair="$A $B", special_tokens=ids
    )
    raw = PromptEncoder(appends, chat=False)
    assert appends.decode(raw.token_ids("Once upon a")) == "<|spare_0|>Once upon a"
    assert appends.decode(raw.token_ids("its own<|end|>")) == "<|spare_0|>its own<|end|>"
    turns = TurnEncoder(raw)
    assert appends.decode(turns.first("go", "a door")) == "<|spare_0|>go\na door\n"
    assert appends.decode(turns.between(None, "a wall")) == "\na wall\n"
    example = ExampleEncoder(raw, 99).encode(read_demonstration({"prompt": "q", "completion": "a"}, PairColumns()), "x")
    assert appends.decode(example.answers[0].token_ids) == "a<|end|>"
    ended = ExampleEncoder(raw, 99).encode(
        read_demonstration({"prompt": "q", "completion": "a<|end|>"}, PairColumns()), "x"
    )
    assert appends.decode(ended.answers[0].token_ids) == "a<|end|>"
    assert appends.decode(PromptEncoder(appends).token_ids("hi")) == "<|user|>hi<|end|><|assistant|>"


def test_a_raw_prompt_that_a_template_rendered_before_keeps_one_beginning_of_sequence(tiny):
    adds = copy.deepcopy(tiny)
    adds.bos_token = "<|spare_0|>"
    bos = [("<|spare_0|>", adds.bos_token_id)]
    adds._tokenizer.post_processor = TemplateProcessing(single="<|spare_0|> $A", pair="$A $B", special_tokens=bos)
    raw = PromptEncoder(adds, chat=False)
    assert adds.decode(raw.token_ids("<|spare_0|><|user|>hi<|end|>")) == "<|spare_0|><|user|>hi<|end|>"
    assert adds.decode(raw.token_ids("<|user|>hi<|spare_0|>")) == "<|spare_0|><|user|>hi<|spare_0|>"
    assert adds.decode(raw.token_ids("<|spare_0|><|spare_0|>hi")).count("<|spare_0|>") == 3  # as the row has it


def test_a_template_that_ends_the_answer_before_it_begins_is_refused(ask):
    with refused("not_rendered", "asks for an answer and then ends it"):
        ask([user("hi")], CHATML + "{{ eos_token }}")
    turns_end_so = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert ask([user("hi")], turns_end_so) == "hi<|end|>"


# answers


THOUGHT = "<think>\n17 and 5 are 22\n</think>\n\nIt is 22."


def test_reasoning_is_learned_or_the_row_is_refused(learn):
    row = {"prompt": "17+5?", "completion": THOUGHT}
    assert learn(row, CHATML)[1] == f"{THOUGHT}<|end|>"
    assert learn(row, QWEN3_LIKE)[1] == f"{THOUGHT}<|end|>"
    assert (
        learn({"prompt": "17+5?", "completion": "<think>17 and 5 are 22</think>It is 22."}, QWEN3_LIKE)[1]
        == f"{THOUGHT}<|end|>"
    )
    drops = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') }}")
    for read in (row, {"messages": [user("17+5?"), assistant(THOUGHT)] * 2}):
        with refused("not_rendered", "leaves out or changes the reasoning of message 2 .assistant"):
            learn(read, drops)
    pair = {"prompt": "17+5?", "chosen": THOUGHT, "rejected": "<think>17 and 5 are 23</think>It is 23."}
    with refused("not_rendered", "the reasoning of message 2"):
        learn(pair, drops, read_pair)
    with refused("not_rendered", "the reasoning of message 2"):
        learn({"messages": [user("q"), assistant("It is 22.", reasoning_content="17 and 5")]}, CHATML)
    assert learn({"messages": [user("q"), assistant("22", thinking="17 and 5")]}, QWEN3_LIKE)[1] == (
        "<think>\n17 and 5\n</think>\n\n22<|end|>"
    )


def test_reasoning_that_goes_once_the_conversation_goes_on_is_refused_and_in_the_prompt_it_may_go(learn):
    turns = [user("17+5?"), assistant(THOUGHT), user("sure?"), assistant("<think>\nI am\n</think>\n\nYes.")]
    with refused("not_rendered", "the reasoning of message 2 .assistant"):
        learn({"messages": turns}, QWEN3_LIKE)
    prompt, said, _ = learn({"prompt": turns[:3], "completion": turns[3:]}, QWEN3_LIKE)
    assert "17 and 5" not in prompt and said == "<think>\nI am\n</think>\n\nYes.<|end|>"
    turns[1]["weight"] = 0
    _, said, whole = learn({"messages": turns}, QWEN3_LIKE)
    assert said == "<think>\nI am\n</think>\n\nYes.<|end|>" and "It is 22.<|end|>" in whole and "17 and 5" not in whole


def test_an_empty_reasoning_block_that_the_template_adds_is_not_learned(learn):
    turns = [user("q"), assistant("one"), user("r"), assistant("two")]
    _, said, whole = learn({"messages": turns}, QWEN3_LIKE)
    assert said == "one<|end|>two<|end|>"
    assert whole.endswith("assistant\n<think>\n\n</think>\n\ntwo<|end|>")
    assert learn({"messages": [user("q"), assistant("", tool_calls=[call()])]}, QWEN3_LIKE)[1].startswith("<tool_call>")


def test_a_generation_prompt_that_opens_a_thought_is_gone_on_from_or_refused(learn):
    opens = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    prompt, said, _ = learn({"prompt": "17+5?", "completion": THOUGHT}, opens)
    assert prompt.endswith("<think>\n") and said == THOUGHT.removeprefix("<think>\n") + "<|end|>"
    with refused("not_rendered", "the reasoning of message 2"):
        learn({"prompt": "17+5?", "completion": THOUGHT}, R1_LIKE)
    with refused("not_rendered", r"asks for the answer with '<think>\\n', where the answer itself begins with 'It is"):
        learn({"prompt": "17+5?", "completion": "It is 22."}, opens)


def test_text_of_the_templates_own_in_an_answer_carries_no_loss(learn):
    row = {"prompt": "q", "completion": "Four it is."}
    dated = CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}On 2026-11-28: {% endif %}{{ m.content }}")
    _, said, whole = learn(row, dated)
    assert said == "Four it is.<|end|>" and whole.endswith("On 2026-11-28: Four it is.<|end|>")
    behind = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %} (end of answer){% endif %}"
    )
    _, said, whole = learn(row, behind)
    assert said == "Four it is.<|end|>" and whole.endswith("Four it is. (end of answer)<|end|>")
    channel = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<|spare_1|>final<|spare_0|>{% endif %}{{ m.content }}"
    )
    assert learn(row, channel)[1] == "<|spare_1|>final<|spare_0|>Four it is.<|end|>"


def test_both_turns_are_learned_where_the_template_ends_a_whole_conversation_with_eos(learn):
    turns = [user("a?"), assistant("x"), user("b?"), assistant("y")]
    _, said, whole = learn({"messages": turns}, PHI_LIKE)
    assert said == "x<|spare_1|>y<|spare_1|>\n<|end|>"
    assert whole == (
        "<|user|>\na?<|spare_1|>\n<|assistant|>\nx<|spare_1|>\n<|user|>\nb?<|spare_1|>\n<|assistant|>\ny<|spare_1|>\n<|end|>"
    )


def test_turns_that_the_row_keeps_from_being_learned_are_context_alone(learn):
    for mark in ({"weight": 0}, {"train": False}, {"loss": False}):
        turns = [
            user("a?"),
            assistant("wrong", **mark),
            user("b?"),
            assistant("right"),
            user("c?"),
            assistant("x", **mark),
        ]
        _, said, whole = learn({"messages": turns}, CHATML)
        assert said == "right<|end|>" and "wrong<|end|>" in whole and whole.endswith("right<|end|>")
    with refused("not_learned", "every turn of the assistant has weight 0"):
        learn({"messages": [user("a?"), assistant("x", weight=0)]}, CHATML)


CALLED = [
    user("Weather in Oslo?"),
    assistant(None, tool_calls=[call(id="abcdefghi")]),
    tool('sunny, "mild"'),
    assistant("It is sunny."),
]


@pytest.mark.parametrize("template", ["qwen3", "llama", "mistral", "openai", "repr"])
@pytest.mark.parametrize("as_text", [False, True])
def test_calls_are_learned_with_arguments_as_mapping_or_as_text_whatever_the_template_takes(template, as_text, learn):
    row = copy.deepcopy({"messages": CALLED})
    if as_text:
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo"}'
    _, said, whole = learn(row, TEMPLATES[template])
    assert '{"city": "Oslo"}' in said and "weather" in said and said.endswith("It is sunny.<|end|>")
    assert "{'city'" not in whole and "sunny, " in whole and "sunny, " not in said


@pytest.mark.parametrize("template", ["chatml", "gemma", "phi"])
def test_calls_that_vanish_are_refused(template, learn):
    with refused(
        "not_rendered" if template != "gemma" else "broken", "the tool calls of message 2|roles must alternate"
    ):
        learn({"messages": CALLED}, TEMPLATES[template])


def test_a_call_that_loses_an_argument_is_refused_and_escapes_are_none_lost(learn):
    some = QWEN3_LIKE.replace("{{ c.function.arguments | tojson }}", "{}").replace("{{ c.function.arguments }}", "{}")
    with refused("not_rendered", "the tool calls of message 2"):
        learn({"messages": [user("q"), assistant("", tool_calls=[call()])]}, some)
    arguments = {"q": 'say "<Tromsø>"\n', "deep": {"n": [1, 2.5, True], "m": None}, "e": ""}
    row = {"messages": [user("q"), assistant("So:", tool_calls=[call(arguments=arguments), call("other")])]}
    for written in ("tojson", "tojson(ensure_ascii=true)", "tojson | replace('<', '\\\\u003c')"):
        said = learn(row, QWEN3_LIKE.replace("arguments | tojson", f"arguments | {written}"))[1]
        assert said.startswith("So:<tool_call>") and '"other"' in said and "None" not in said


def test_a_row_that_ends_with_a_call_is_a_demonstration_and_tools_reach_it(learn):
    row = {"messages": CALLED[:2], "tools": TOOLS}
    prompt, said, _ = learn(row, LLAMA_LIKE)
    assert '"name": "weather"' in prompt and said == '{"name": "weather", "parameters": {"city": "Oslo"}}<|end|>'
    with refused("not_rendered", "does not show the tool 'weather'"):
        learn(row, QWEN3_LIKE)


def test_sharegpt_conversations_are_read_in_every_stage(learn):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"}]
    row = {"conversations": [*talk, {"from": "gpt", "value": "b"}], "system": "Be brief."}
    prompt, said, _ = learn(row, CHATML)
    assert "system\nBe brief.<|end|>" in prompt and said == "a<|end|>b<|end|>"
    pair = {"chosen": [*talk, {"from": "gpt", "value": "b"}], "rejected": [*talk, {"from": "gpt", "value": "c"}]}
    assert [learn(pair, CHATML, read_pair, place)[1] for place in (0, 1)] == ["b<|end|>", "c<|end|>"]
    assert prompt_problem({"conversations": talk}, "conversations") is None
    spoken = [talk[0], {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'}]
    assert '"Oslo"' in learn({"conversations": spoken}, QWEN3_LIKE)[1]


@pytest.mark.parametrize("label", [False, 0, "False", "undesirable", -1])
def test_a_bad_answer_by_its_label_is_no_demonstration(label, learn):
    with refused("label", f"column 'label': got {label!r}, so this is a bad answer"):
        learn({"prompt": "q", "completion": "bad", "label": label})


def test_a_good_label_or_none_is_a_demonstration_and_an_unknown_one_is_asked_about(learn):
    for label in (True, 1, "true", None):
        assert learn({"prompt": "q", "completion": "a", "label": label})[1] == "a<|end|>"
    row = {"prompt": "q", "completion": "a", "label": "math"}
    with refused("label", "expected true or false .*data.label_column=null"):
        learn(row)
    assert read_demonstration(row, PairColumns(label=None)).answers == ["a"]


def test_rows_of_a_table_lose_the_nulls_that_arrow_adds(tmp_path, encoder):
    parts = [{"type": "text", "text": "How warm?", "url": None}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [call(arguments={"city": "Oslo"})]}]},
        {"messages": [{"role": "user", "content": parts, "name": "me"}, {"role": "assistant", "tool_calls": [call("clock", {"zone": 1})]}]},
    ]  # fmt: skip
    file = tmp_path / "calls.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    columns = PairColumns()
    sources = load_sources(str(file), check=row_check(read_demonstration, columns))
    assert None in sources[0].rows[0].values["messages"][1]["tool_calls"][0]["function"]["arguments"].values()
    prompts = encoder(QWEN3_LIKE)
    examples, _ = encode_sources(sources, read_demonstration, columns, ExampleEncoder(prompts, 999), "error")
    said = [prompts.tokenizer.decode(e.answers[0].token_ids[e.answers[0].turn_ids >= 0]) for e in examples]
    assert ['"arguments": {"city": "Oslo"}' in said[0], '"arguments": {"zone": 1}' in said[1]] == [True, True]


def test_a_row_that_fails_is_named_by_file_and_line_or_counted(tmp_path, encoder):
    file = tmp_path / "d.jsonl"
    rows = [
        {"messages": [user("q"), assistant("a")]},
        {"messages": CALLED},
        {"prompt": "q", "completion": "b", "label": False},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def encoded(policy):
        sources = load_sources(str(file), on_bad_row=policy, check=row_check(read_demonstration, PairColumns()))
        return encode_sources(sources, read_demonstration, PairColumns(), ExampleEncoder(encoder(CHATML), 999), policy)

    with pytest.raises(DataError, match=r"d\.jsonl:3: column 'label': got False"):
        encoded("error")
    examples, counts = encoded("skip")
    assert ([e.example_id for e in examples], dict(counts)) == (["d:0"], {"label": 1, "not_rendered": 1})


# environments


def test_an_observation_that_the_template_changes_is_an_error_and_tools_reach_the_first_prompt(encoder):
    cuts = CHATML.replace("{{ m.content }}", "{{ m.content[:30] }}")
    turns = TurnEncoder(encoder(cuts))
    assert turns.encoder.tokenizer.decode(turns.between(None, "a wall")).startswith("<|end|>\n<|spare_0|>user\na wall")
    with pytest.raises(DataError, match="leaves out or changes the observation 'a wall a wall"):
        turns.between(None, "a wall " * 9)
    parts = [{"role": "user", "content": [{"type": "text", "text": "go"}]}]
    first = TurnEncoder(encoder(LLAMA_LIKE)).first(parts, "a door", TOOLS)
    shown = turns.encoder.tokenizer.decode(first)
    assert "go\n\na door<|end|>" in shown and '"name": "weather"' in shown


# properties


WORDS = [
    "a",
    "us",
    "er",
    "system",
    "tool",
    "Oslo",
    '"q"',
    "<b>",
    "née",
    "\n",
    "{'x': 1}",
    "None",
    "1",
    "assistant",
    "end",
]


def random_conversation(rng):
    def said(least=1):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, 5))) or "a"

    messages = [system(said())] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 3)):
        messages.append(user("x" + said()))
        if rng.random() < 0.4:
            arguments = {rng.choice("kq"): rng.choice([said(), rng.randint(0, 99), True, [said()]]) for _ in range(2)}
            written = json.dumps(arguments) if rng.random() < 0.5 else arguments
            messages += [assistant(rng.choice([None, "y" + said()]), tool_calls=[call(rng.choice(["f", "weather"]), written, id="abcdefghi")]),
                         tool("z" + said())]  # fmt: skip
        thought = f"<think>\nt{said()}\n</think>\n\n" if rng.random() < 0.3 else ""
        messages.append(assistant(thought + "w" + said()))
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_accepted_row_shows_what_it_says_and_learns_what_the_assistant_said(name, encoder, learn):
    rng = random.Random(7)
    accepted = 0
    for _ in range(60):
        messages = random_conversation(rng)
        try:
            _, learned, whole = learn({"messages": messages}, TEMPLATES[name])
        except DataError:
            continue
        accepted += 1
        place = 0
        for message in messages:
            text = (message["content"] or "").strip()
            if message["role"] == "assistant":
                text = text.rpartition("</think>")[2].strip()
                assert text in learned
            found = [
                whole.find(way, 0 if message["role"] == "system" else place)
                for way in (text, json.dumps(text, ensure_ascii=False)[1:-1])
            ]
            assert max(found) >= 0, (message, whole)
            place = max(place, min(at for at in found if at >= 0)) if message["role"] != "system" else place
            for one in message.get("tool_calls", []):
                arguments = one["function"]["arguments"]
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                assert all(json.dumps(key) in learned or key in learned for key in arguments)
                assert all(
                    json.dumps(v, ensure_ascii=False).strip('"') in learned or json.dumps(v) in learned
                    for v in arguments.values()
                )
        for message in messages:
            if message["role"] in ("user", "tool"):
                assert message["content"] not in learned or any(
                    message["content"] in str(m) for m in messages if m["role"] == "assistant"
                )
    assert (accepted == 0) == (name == "r1")  # which drops the thought that its own generation prompt opens


def test_tokens_are_found_without_offsets_too(tiny):
    class Slow:
        is_fast = False

        def __call__(self, text, add_special_tokens):
            return {"input_ids": tiny(text, add_special_tokens=add_special_tokens)["input_ids"]}

    span = "On 2026: four<|end|>\n"
    for tokenizer in (tiny, Slow()):
        ids, mask = learned_tokens(tokenizer, span, [(9, 20)])
        assert tiny.decode(np.array(ids)[np.array(mask)]) == "four<|end|>" and tiny.decode(ids) == span


def test_an_end_is_eos_or_else_the_first_special_token_or_else_everything(tiny):
    ends = Ends(tiny)
    assert ends.find("<|spare_1|>\n<|end|>") == (12, 7)
    assert ends.find("\n<|spare_1|>\n") == (1, 11)
    assert ends.find("\nHuman:") == (0, 7)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1/0 }}", "division by zero, line 1 of the template"),
        (
            "\n{% for i in range(200000) %}x{% endfor %}",
            "Range too big. The sandbox blocks ranges larger than MAX_RANGE",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ cycler() }}", "at least one item has to be provided, line 1 of the template"),
        ("{% break %}", "('break' outside loop)"),
        ("a\n{{ ", "unexpected 'end of template', line 2 of the template"),
        ("{{ raise_exception('no system role') }}", "the chat template refuses these messages (no system role)"),
    ],
)
def test_whatever_a_template_raises_makes_a_bad_row_with_the_line_of_the_template(template, said, ask):
    with pytest.raises(DataError) as caught:
        ask([user("What is 1 + 1?")], template)
    line = str(caught.value)
    assert line.startswith("the chat template refuses these messages (") and said in line and "\n" not in line


@pytest.mark.parametrize(
    ("content", "text", "found"),
    [
        ("a <think>x</think> b <think>y</think> c", "a  b  c", Place(6, 7, True)),
        ("a </think> b <think> c", "a </think> b c", None),
        ("<think>x</think> b " + "<think>" * 40000, "b " + "<think>" * 40000, Place(0, 280002, True)),
        ("</think>" + "<think>" * 40000 + " b", "c", None),
    ],
)
def test_thoughts_that_are_left_out_are_found_in_a_time_that_grows_with_the_text(content, text, found):
    start = time.monotonic()
    assert find_message(text, {"role": "assistant", "content": content}, 0) == found
    assert time.monotonic() - start < 5.0
