"""From rows to prompts: templates, limits, and an order that can be left and taken up again."""

import copy
from collections import Counter

import pytest

from apportion.data.errors import DataError
from apportion.data.pair_tokens import ExampleEncoder
from apportion.data.pairs import PairColumns, read_demonstration
from apportion.data.prompts import PromptEncoder, PromptStream, every_prompt, load_tokenizer
from apportion.data.rows import Row
from apportion.data.sources import Source
from apportion.data.turns import TurnEncoder
from apportion.edges import row_errors
from apportion.platform.errors import DataError as ShownError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPORTION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield load_tokenizer("builtin:tiny")


def source_of(count: int, name: str = "rows", weight: float = 1.0, prompts: dict[int, object] | None = None) -> Source:
    special = prompts or {}
    rows = [
        Row(i, f"{name}.jsonl:{i + 1}", {"prompt": special.get(i, f"{i}?"), "answer": i, "tag": "x"})
        for i in range(count)
    ]
    return Source(name, rows, weight)


def ids(prompts) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


def test_a_token_without_an_embedding_makes_a_bad_row(tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<|extra|>"])  # id 264 of a model with ids 0 to 263
    known = {"vocabulary": len(tokenizer)}
    source = source_of(3, prompts={1: "a<|extra|>b"})
    said = r"the token '<\|extra\|>', id 264, which the model has no embedding for \(264 tokens\)"
    for chat in (True, False):
        encoder = PromptEncoder(larger, chat=chat, **known)
        with pytest.raises(DataError, match=rf"^rows.jsonl:2: got {said}"):
            every_prompt([source], encoder)
        prompts, skipped = every_prompt([source], encoder, "skip")
        assert ids(prompts) == ["rows:0:0", "rows:2:0"] and skipped == Counter(unknown_token=1)
        assert 264 in PromptEncoder(larger, chat=chat).token_ids("a<|extra|>b")  # not known how many the model has
        for row in ({"prompt": "a<|extra|>", "completion": "b"}, {"prompt": "a", "completion": "b<|extra|>"}):
            with pytest.raises(DataError, match=said):
                ExampleEncoder(encoder, 64).encode(read_demonstration(row, PairColumns()), "x")
        with pytest.raises(DataError, match=said):
            TurnEncoder(encoder).between(None, "seen: <|extra|>")
    pieces = copy.deepcopy(larger)  # the template writes the token from two texts
    pieces.chat_template = "{% for m in messages %}{{ '<|ex' + 'tra|>' }}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=said):
        PromptEncoder(pieces, **known).token_ids("hi")


def test_text_becomes_one_user_message_that_asks_for_an_answer(tokenizer):
    tokens = PromptEncoder(tokenizer).token_ids("hi")
    assert tokenizer.decode(tokens) == "<|user|>hi<|end|><|assistant|>"
    assert tokens.dtype == "int32"


def test_raw_text_is_tokenised_as_it_is(tokenizer):
    assert tokenizer.decode(PromptEncoder(tokenizer, chat=False).token_ids("hi")) == "hi"


def test_a_system_prompt_goes_before_messages_without_one_of_their_own(tokenizer):
    encoder = PromptEncoder(tokenizer, system_prompt="Be brief.")
    assert tokenizer.decode(encoder.token_ids("hi")) == "<|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|>"
    messages = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "hi"}]
    assert tokenizer.decode(encoder.token_ids(messages)) == "<|system|>Be long.<|end|><|user|>hi<|end|><|assistant|>"
    assert len(messages) == 2


def test_template_arguments_reach_the_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages[0]['content'] }}{% if loud %}!{% endif %}"
    assert other.decode(PromptEncoder(other, chat_template_kwargs={"loud": True}).token_ids("hi")) == "hi!"


def test_combinations_that_make_no_sense_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"data.system_prompt: got a value with data.chat=false"):
        PromptEncoder(tokenizer, system_prompt="x", chat=False)
    with pytest.raises(DataError, match=r"got messages with data.chat=false"):
        PromptEncoder(tokenizer, chat=False).token_ids([{"role": "user", "content": "hi"}])

    class Plain:
        chat_template = None

    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        PromptEncoder(Plain())


def test_a_template_of_ones_own_replaces_the_tokenizers(tokenizer, tmp_path):
    (tmp_path / "mine.jinja").write_text("Q: {{ messages[-1]['content'] }} A:")
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    mine = load_tokenizer(str(folder), str(tmp_path / "mine.jinja"))
    assert mine.decode(PromptEncoder(mine).token_ids("hi")) == "Q: hi A:"
    with pytest.raises(DataError, match="no such file; expected a jinja file"):
        load_tokenizer(str(folder), str(tmp_path / "other.jinja"))
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"got .*bytes\.jinja, not readable as text in UTF-8"):
        load_tokenizer(str(folder), str(tmp_path / "bytes.jinja"))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": 5}'),
        ("tokenizer_config.json", "null"),
        ("tokenizer_config.json", '{"tokenizer_class": "Nothing", "eos_token": 5}'),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
        ("config.json", '{"model_type": "llama", "attention_bias": 5}'),
        ("special_tokens_map.json", "[" * 5000),
        ("tokenizer_config.json", '{"model_max_length": [null], "eos_token": "<|end|>"}'),  # found where a text is read
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line_with_its_folder(tokenizer, tmp_path, file, text):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: its tokenizer cannot be loaded (")
    assert "\n" not in str(caught.value)


def test_a_prompt_keeps_what_was_written_and_every_other_column(tokenizer):
    [prompt] = PromptStream([source_of(1)], PromptEncoder(tokenizer), 1).next_batch()
    assert (prompt.prompt_id, prompt.prompt, prompt.source) == ("rows:0:0", "0?", "rows")
    assert prompt.columns == {"answer": 0, "tag": "x"}
    assert tokenizer.decode(prompt.token_ids) == "<|user|>0?<|end|><|assistant|>"


def test_a_prompt_that_is_too_long_is_named_with_its_line_and_both_lengths(tokenizer):
    source = source_of(2, prompts={1: "x" * 20})
    with pytest.raises(DataError) as caught:
        every_prompt([source], PromptEncoder(tokenizer, max_prompt_tokens=10))
    assert str(caught.value) == (
        "rows.jsonl:2: got a prompt of 23 tokens, expected at most 10; "
        "raise data.max_prompt_tokens or set data.on_bad_row=skip"
    )


def test_evaluation_takes_every_row_in_order_and_counts_what_it_skips(tokenizer):
    source = source_of(4, prompts={1: "x" * 20})
    source.skipped["broken"] = 2
    prompts, skipped = every_prompt([source], PromptEncoder(tokenizer, max_prompt_tokens=10), "skip")
    assert ids(prompts) == ["rows:0:0", "rows:2:0", "rows:3:0"]
    assert skipped == {"broken": 2, "too_long": 1}
    assert source.skipped == {"broken": 2}


def test_every_epoch_gives_each_row_once_in_an_order_of_its_own(tokenizer):
    stream = PromptStream([source_of(20)], PromptEncoder(tokenizer), 20, seed=3)
    first, second = ids(stream.next_batch()), ids(stream.next_batch())
    assert sorted(first) == sorted(f"rows:{i}:0" for i in range(20))
    assert sorted(second) == sorted(f"rows:{i}:1" for i in range(20))
    assert [i.split(":")[1] for i in first] != [i.split(":")[1] for i in second]
    assert [i.split(":")[1] for i in first] != [str(i) for i in range(20)]


def test_the_order_follows_from_the_seed_alone(tokenizer):
    def drawn(seed, shuffle=True):
        return ids(PromptStream([source_of(12)], PromptEncoder(tokenizer), 4, seed, shuffle).next_batch(30))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1, shuffle=False) == [f"rows:{i % 12}:{i // 12}" for i in range(30)]


def test_a_weighted_mix_keeps_its_proportions_at_every_point(tokenizer):
    sources = [source_of(7, "a", 3.0), source_of(5, "b", 1.0), source_of(4, "c", 2.0)]
    stream = PromptStream(sources, PromptEncoder(tokenizer), 6)
    seen: Counter[str] = Counter()
    for drawn, prompt in enumerate(stream.next_batch(600), start=1):
        seen[prompt.source] += 1
        for source in sources:
            assert abs(seen[source.name] - drawn * source.weight / 6) <= 1
    assert seen == {"a": 300, "b": 100, "c": 200}


def test_prompt_ids_never_repeat(tokenizer):
    stream = PromptStream([source_of(3, "a"), source_of(4, "b")], PromptEncoder(tokenizer), 50)
    drawn = ids(stream.next_batch())
    assert len(set(drawn)) == 50


def test_a_resumed_stream_continues_exactly_where_it_was(tokenizer):
    def stream():
        sources = [source_of(5, "a", 2.0, {3: "x" * 30}), source_of(3, "b")]
        return PromptStream(sources, PromptEncoder(tokenizer, max_prompt_tokens=12), 4, seed=7, on_bad_row="skip")

    whole = stream()
    expected = [ids(whole.next_batch()) for _ in range(8)]
    first = stream()
    assert [ids(first.next_batch()) for _ in range(3)] == expected[:3]
    state = first.state()
    assert all(isinstance(value, int) for value in state.values())
    second = stream()
    second.load_state(state)
    assert [ids(second.next_batch()) for _ in range(5)] == expected[3:]
    assert second.skipped == whole.skipped == {"too_long": 1}


def test_a_state_of_other_data_or_another_seed_is_refused(tokenizer):
    state = PromptStream([source_of(5)], PromptEncoder(tokenizer), 1, seed=1).state()
    with pytest.raises(DataError, match=r"0.rows is 6 here and 5 in the checkpoint"):
        PromptStream([source_of(6)], PromptEncoder(tokenizer), 1, seed=1).load_state(state)
    with pytest.raises(DataError, match="seed is 2 here and 1 in the checkpoint"):
        PromptStream([source_of(5)], PromptEncoder(tokenizer), 1, seed=2).load_state(state)
    with pytest.raises(DataError, match="sources is 2 here and 1 in the checkpoint"):
        PromptStream([source_of(5), source_of(5, "b")], PromptEncoder(tokenizer), 1, seed=1).load_state(state)


def test_skipped_prompts_are_counted_once_however_often_they_are_passed(tokenizer):
    source = source_of(4, prompts={0: "x" * 30, 2: "y" * 30})
    stream = PromptStream([source], PromptEncoder(tokenizer, max_prompt_tokens=12), 2, on_bad_row="skip")
    assert sorted(ids(stream.next_batch(6))) == sorted(f"rows:{i}:{e}" for i in (1, 3) for e in range(3))
    assert stream.skipped == {"too_long": 2}


def test_a_source_of_which_every_prompt_is_too_long_ends_with_an_error_rather_than_forever(tokenizer):
    source = source_of(3, prompts=dict.fromkeys(range(3), "x" * 30))
    stream = PromptStream([source], PromptEncoder(tokenizer, max_prompt_tokens=12), 1, on_bad_row="skip")
    with pytest.raises(DataError, match=r"rows: none of its 3 rows gives a prompt; left out: \{'too_long': 3\}"):
        stream.next_batch()


def test_a_too_long_prompt_stops_the_stream_when_bad_rows_are_errors(tokenizer):
    stream = PromptStream([source_of(1, prompts={0: "x" * 30})], PromptEncoder(tokenizer, max_prompt_tokens=12), 1)
    with pytest.raises(DataError, match=r"rows.jsonl:1: got a prompt of 33 tokens"):
        stream.next_batch()


NULL = [{"role": "user", "content": None}]
NAMELESS = [{"role": "tool", "content": "sunny"}]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (NULL, "message 1 (user): content is null, expected text"),
        (NAMELESS, "the chat template refuses these messages ('dict object' has no attribute 'name'"),
        ("half \ud83d", "got half a character ('\\ud83d') in the text, expected whole ones"),
        ([{"role": "user", "content": "half \ud83d"}], "got half a character ('\\ud83d') in the text"),
    ],
)
def test_text_that_template_or_tokenizer_cannot_take_is_named_by_its_line_or_skipped_and_counted(
    prompt, told, tokenizer
):
    encoder = PromptEncoder(tokenizer)
    encoder.tokenizer = copy.deepcopy(tokenizer)
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['name'] + ': ' if m['role'] == 'tool' }}{{ m['content'] + '.' }}{% endfor %}"
    )
    source = source_of(3, prompts={1: prompt})
    with pytest.raises(DataError) as caught:
        PromptStream([source], encoder, 3, shuffle=False).next_batch()
    assert str(caught.value).startswith(f"rows.jsonl:2: {told}")
    stream = PromptStream([source], encoder, 2, shuffle=False, on_bad_row="skip")
    assert ids(stream.next_batch()) == ["rows:0:0", "rows:2:0"]
    assert stream.skipped == {"broken": 1}
    kept, skipped = every_prompt([source], encoder, "skip")
    assert (ids(kept), skipped) == (["rows:0:0", "rows:2:0"], {"broken": 1})


def test_raw_text_with_half_a_character_is_refused_too(tokenizer):
    with pytest.raises(DataError, match="got half a character"):
        PromptEncoder(tokenizer, chat=False).token_ids("\udc00")


def test_a_row_found_unusable_during_a_run_is_one_line_and_a_mistake_of_our_own_keeps_its_traceback():
    with pytest.raises(ShownError, match=r"^rows.jsonl:2: bad$"), row_errors():
        raise DataError("rows.jsonl:2: bad")
    with pytest.raises(ValueError, match="ours"), row_errors():
        raise ValueError("ours")
