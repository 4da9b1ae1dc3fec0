"""What a start finds wrong with answers and tags, what functions are given, and what verifiers see of a template."""

from __future__ import annotations

import copy
import json
import time

import numpy as np
import pytest
from scoring_parts import batch_of, score

from apportion.actors.environment import EpisodeStart, reset_arguments
from apportion.actors.reward_answers import check_answers, check_source_columns, check_tags
from apportion.actors.reward_check import check_functions
from apportion.actors.scoring import Scorer
from apportion.assembly.inputs import load_prompts
from apportion.batch import Batch, Prompt, Trajectory
from apportion.cli import compose_config, to_config
from apportion.data.errors import DataError
from apportion.data.prompts import PromptEncoder, load_tokenizer
from apportion.data.response_text import ResponseText, lost_tags, prompt_ending
from apportion.data.sources import load_sources
from apportion.plan import make_plan
from apportion.platform.errors import ConfigError


def file_of(tmp_path, *answers, name="rows.jsonl", key="answer"):
    file = tmp_path / name
    file.write_text("".join(json.dumps({"prompt": "1 + 1?", key: answer}) + "\n" for answer in answers))
    return str(file)


def configured(*words):
    common = ["experiment=tiny_grpo", "data.eval=null", "evaluation.before=false", "evaluation.after=false"]
    return to_config(compose_config([*common, *words]))[0]


# --- answers ---


@pytest.mark.parametrize(
    ("verifier", "answer", "said"),
    [
        ("numeric_match", "5-7", "answer: got '5-7', expected a number alone"),
        ("numeric_match", None, "answer: got None, expected a number alone"),
        ("numeric_match", [2], "answer: got [2], expected a number alone"),
        ("gsm8k", "#### 10:30", "answer: got ' 10:30', expected a number alone"),
        ("exact_match", " ", "answer: got ' ', expected text"),
        ("gym", "2", "task: got None, expected a task's name"),
    ],
)
def test_an_answer_that_cannot_be_read_is_a_bad_row_with_its_line(tmp_path, verifier, answer, said):
    functions = check_functions([verifier], 60.0)
    [source] = load_sources(file_of(tmp_path, "2", answer, "4"))
    with pytest.raises(DataError) as caught:
        check_answers(functions, [source], "error")
    place = "rows.jsonl:1" if verifier == "gym" else "rows.jsonl:2"
    assert place in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"{verifier} cannot check this row")


def test_rows_whose_answer_cannot_be_read_are_skipped_and_counted_where_bad_rows_are(tmp_path):
    functions = check_functions(["numeric_match", "exact_match"], 60.0)
    [source] = load_sources(file_of(tmp_path, "2", "many", "3/4", "", "5 apples"), on_bad_row="skip")
    check_answers(functions, [source], "skip")
    assert [row.values["answer"] for row in source.rows] == ["2", "3/4", "5 apples"]
    assert [row.number for row in source.rows] == [0, 2, 4]
    assert source.skipped == {"unreadable_answer": 2}
    [source] = load_sources(file_of(tmp_path, "many", "few"), on_bad_row="skip")
    with pytest.raises(DataError, match=r"rows: no row can be used; left out: .'unreadable_answer': 2"):
        check_answers(functions, [source], "skip")


@pytest.mark.slow
def test_mathematical_answers_are_read_in_a_process_that_an_endless_one_cannot_hold(tmp_path):
    functions = check_functions([{"function": "math_verify", "timeout_seconds": 8}], 60.0)
    answers = ["2", r"\frac{x}{2}", "3 apples and 4 pears", "9^{9^{9}}", r"\sqrt{2}", r"\sqrt{2}"]
    [source] = load_sources(file_of(tmp_path, *answers), on_bad_row="skip")
    start = time.monotonic()
    check_answers(functions, [source], "skip")
    assert [row.number for row in source.rows] == [0, 1, 4, 5]
    assert source.skipped == {"unreadable_answer": 2}
    assert time.monotonic() - start < 120
    [source] = load_sources(file_of(tmp_path, "3 apples and 4 pears"))
    with pytest.raises(DataError, match=r"rows.jsonl:1: answer: got '3 apples and 4 pears', expected a mathematical"):
        check_answers(functions, [source], "error")


def test_rows_of_a_saved_dataset_are_read_by_their_column_and_leave_it(tmp_path):
    import datasets

    rows = [{"prompt": "q", "reward_model": {"ground_truth": text}, "extra": [1]} for text in ("2", "many", "4")]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    functions = check_functions([{"function": "gsm8k", "columns": {"answer": "reward_model.ground_truth"}}], 60.0)
    [source] = load_sources(str(tmp_path / "saved"), on_bad_row="skip")
    check_answers(functions, [source], "skip")
    assert [row.values["reward_model"]["ground_truth"] for row in source.rows] == ["2", "4"]
    assert source.rows[0].values["extra"] == [1]
    [source] = load_sources(str(tmp_path / "saved"))
    with pytest.raises(
        DataError, match=r"row 2: answer: got 'many'.* \(column reward_model.ground_truth\); gsm8k cannot"
    ):
        check_answers(functions, [source], "error")


def test_a_start_reads_every_answer_and_a_plan_the_first(tmp_path, tiny):
    late = file_of(tmp_path, *["2"] * 70, "5-7")
    with pytest.raises(DataError, match=r"rows.jsonl:71: answer: got '5-7'"):
        load_prompts(configured(f"data.train={late}"), load_tokenizer(tiny))
    stream, _ = load_prompts(configured(f"data.train={late}", "data.on_bad_row=skip"), load_tokenizer(tiny))
    assert len(stream) == 70 and stream.skipped == {"unreadable_answer": 1}
    make_plan(configured(f"data.train={late}"))
    first = file_of(tmp_path, "5-7", "2", name="first.jsonl")
    with pytest.raises(Exception, match=r"first.jsonl:1: answer: got '5-7', expected a number alone"):
        make_plan(configured(f"data.train={first}"))
    make_plan(configured(f"data.train={first}", "data.on_bad_row=skip"))


def test_an_answer_that_cannot_be_read_fails_its_sample_and_never_pays():
    batch, prompts = batch_of("4", "5")
    prompts[0].columns["answer"] = "3/x"
    prompts[1].columns["answer"] = "5"
    scored, report = score("numeric_match", batch, prompts)
    np.testing.assert_array_equal(scored.rewards, [np.nan, 1.0])
    assert report.failed == {"raised": 1} and "DataError: answer: got '3/x'" in report.first_traceback


# --- settings and columns ---


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"function": "gsm8k", "params": {"answer": "reward_model.ground_truth"}},
            "reward.functions gsm8k: got params 'answer', which every row has its own of and params are the same for all; name the "
            "data's column, or a path inside one, with columns: {answer: reward_model.ground_truth}",
        ),
        ({"function": "exact_match", "params": {"answer": ["2", "3"]}}, "with columns: {answer: NAME}"),
        ({"function": "gym", "params": {"task": "gcd"}}, "with columns: {task: gcd}"),
        (
            {"function": "numeric_match", "params": {"tolerance": "0.1"}},
            "got tolerance '0.1', expected a number of at least 0",
        ),
        ({"function": "gsm8k", "params": {"tolerance": -1}}, "got tolerance -1, expected a number of at least 0"),
        (
            {"function": "numeric_match", "params": {"tolerence": 1}},
            "got params 'tolerence', expected tolerance (did you",
        ),
        ({"function": "math_verify", "params": {"tolerance": 1}}, "math_verify: got params 'tolerance', expected none"),
        ({"function": "exact_match", "params": {"ignore_case": "no"}}, "got ignore_case 'no', expected true or false"),
        ({"function": "regex_match"}, "got no pattern, expected params: {pattern: REGULAR_EXPRESSION}"),
        (
            {"function": "regex_match", "params": {"pattern": "(a"}},
            "got pattern '(a', not a regular expression (missing )",
        ),
        ({"function": "format", "params": {"pattern": 5}}, "got pattern 5, expected a regular expression"),
        (
            {"function": "gsm8k", "columns": {"anwser": "label"}},
            "got columns key 'anwser', expected an argument that the function",
        ),
        ({"function": "gsm8k", "columns": {"tolerance": "label"}}, "reads from the data: answer"),
        ({"function": "format", "columns": {"answer": "label"}}, "reads from the data: it reads none"),
        ({"function": "gsm8k", "columns": "label"}, "got columns 'label', expected a mapping of arguments to columns"),
        ({"function": "gsm8k", "columns": {"prompts": "label"}}, "expected a mapping of arguments to columns"),
    ],
)
def test_settings_that_no_verifier_can_use_are_refused_before_anything_starts(entry, said):
    with pytest.raises(ConfigError) as caught:
        check_functions([entry], 60.0)
    assert said in str(caught.value) and "\n" not in str(caught.value)


VERL = {
    "data_source": "gsm8k",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"answer": "#### 3"},
}


def test_the_nested_answer_of_data_made_for_another_project_is_named_and_then_read(tmp_path):
    file = tmp_path / "verl.jsonl"
    file.write_text(json.dumps({"prompt": "1+1?", **VERL}) + "\n")
    sources = load_sources(str(file))
    with pytest.raises(ConfigError) as caught:
        check_source_columns(check_functions(["gsm8k"], 60.0), sources, "data.train")
    assert str(caught.value) == (
        "reward.functions gsm8k: needs 'answer', data.train has columns data_source, extra_info, reward_model; "
        "set columns: {answer: reward_model.ground_truth} in its entry"
    )
    wrong = {"function": "gsm8k", "columns": {"answer": "reward_model.ground_trut"}}
    with pytest.raises(ConfigError, match=r"correct its `columns` .did you mean 'reward_model.ground_truth'"):
        check_source_columns(check_functions([wrong], 60.0), sources, "data.train")
    right = {"function": "gsm8k", "columns": {"answer": "reward_model.ground_truth"}}
    functions = check_functions([right], 60.0)
    check_source_columns(functions, sources, "data.train")
    check_answers(functions, sources, "error")
    batch, prompts = batch_of("#### 2", "#### 3")
    for prompt in prompts:
        prompt.columns = dict(VERL)
    assert score(right, batch, prompts)[0].rewards.tolist() == [1.0, 0.0]


def test_named_columns_reach_a_function_of_ones_own_and_go_before_the_datas():
    batch, prompts = batch_of("a", "b")
    for number, prompt in enumerate(prompts):
        prompt.columns |= {"info": {"level": number}}

    def level_of(answer, completions, level, **columns):
        assert answer == ["0", "1"] or answer == [{"level": 0}, {"level": 1}]
        return level

    paths = {"level": "info.level"}
    assert score({"function": level_of, "columns": paths}, batch, prompts)[0].rewards.tolist() == [0.0, 1.0]
    paths["answer"] = "info"
    assert score({"function": level_of, "columns": paths}, batch, prompts)[0].rewards.tolist() == [0.0, 1.0]


def test_a_column_with_the_name_of_a_setting_does_not_change_a_verifier():
    batch, prompts = batch_of("0.4", "1")
    for prompt in prompts:
        prompt.columns["tolerance"] = 1.0
    assert score("numeric_match", batch, prompts)[0].rewards.tolist() == [0.0, 1.0]


# --- own lists ---


def with_messages(*texts):
    batch, prompts = batch_of(*texts)
    shared = [{"role": "user", "content": "q"}]
    prompts = [Prompt(p.prompt_id, p.token_ids, shared, {**p.columns, "tags": ["a"]}, p.source) for p in prompts]
    return batch, prompts


def test_what_a_function_changes_reaches_no_other_function_sample_or_call():
    def changes(prompts, completions, answer, tags, prompt_ids, completion_ids, words=(), **columns):
        prompts[0][0]["content"] = "changed"
        assert prompts[1][0]["content"] == "q"
        completions[0][0]["content"] = "changed"
        tags[0].append("changed")
        answer.clear()
        prompt_ids[0].clear()
        completion_ids[0].clear()
        words.append("changed")
        return [float(len(words))] * len(completions)

    def reads(prompts, completions, answer, tags, prompt_ids, completion_ids, **columns):
        time.sleep(0.2)  # after the other one is done
        clean = prompts[0][0]["content"] == "q" and completions[0][0]["content"] == "one" and answer == ["0", "1"]
        clean = clean and tags == [["a"], ["a"]] and prompt_ids == [[7, 8], [7, 8]] and len(completion_ids[0]) == 3
        return [10.0 * clean] * len(completions)

    batch, prompts = with_messages("one", "two")
    scorer = Scorer([{"function": changes, "params": {"words": ["x"]}}, reads])
    for _ in range(2):
        scored, report = scorer.score(batch, prompts)
        assert report.first_traceback is None and scored.rewards.tolist() == [12.0, 12.0]
    scorer.close()
    assert prompts[0].prompt == [{"role": "user", "content": "q"}] and prompts[0].columns["tags"] == ["a"]


def test_a_sample_that_is_asked_again_is_what_was_sampled():
    async def changes(completions, **columns):
        completions[0][0]["content"] += "!"
        if len(completions) > 1:
            raise ValueError("one at a time")
        return [float(len(completions[0][0]["content"]))]

    assert score([changes], *with_messages("one", "four"))[0].rewards.tolist() == [4.0, 5.0]


def test_an_environment_gets_a_row_of_its_own():
    columns = {"items": ["egg"]}
    given = reset_arguments(lambda items: "", EpisodeStart(0, columns, seed=1))
    given["items"].append("changed")
    assert columns == {"items": ["egg"]}


# --- templates and tags ---


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture
def thinking(tiny):
    tokenizer = copy.deepcopy(load_tokenizer(tiny))
    tokenizer.chat_template = THINKING
    return tokenizer


def rendered(tokenizer, texts, prompt):
    encoder = PromptEncoder(tokenizer)
    ids = encoder.token_ids(prompt)
    prompts = [Prompt(f"p{i}", ids, prompt, {"answer": "5"}, "s") for i in range(len(texts))]
    trajectories = []
    for index, text in enumerate(texts):
        response = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        n = len(response)
        trajectories.append(
            Trajectory(
                f"p{index}",
                0,
                index,
                np.concatenate([ids, response]),
                len(ids),
                np.ones(n, bool),
                np.zeros(n, np.int32),
                np.zeros(n, np.float32),
                0,
                "stop",
                text,
            )
        )
    return Batch.from_trajectories(trajectories), prompts


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["2 + 3?", [{"role": "user", "content": "2 + 3?"}]])
def test_a_response_to_a_template_that_opens_the_reasoning_has_the_form_in_a_run(thinking, prompt):
    texts = ["2 and 3</think>\n<answer>5</answer>", "<think>a</think><answer>5</answer>", "<answer>5</answer>", "5"]
    batch, prompts = rendered(thinking, texts, prompt)
    assert prompt_ending(thinking, prompts[0].token_ids).endswith("assistant\n<think>\n")
    scored, _ = score("format", batch, prompts, tokenizer=thinking)
    assert scored.rewards.tolist() == [1.0, 1.0, 0.0, 0.0]
    scored, _ = score("numeric_match", batch, prompts, tokenizer=thinking)
    assert scored.rewards.tolist() == [1.0, 1.0, 0.0, 0.0]  # the last two never end the reasoning
    thinking.chat_template = THINKING.replace("<think>\n", "")
    batch, prompts = rendered(thinking, texts, prompt)
    scored, _ = score(["format", "numeric_match"], batch, prompts, tokenizer=thinking)
    assert scored.rewards.tolist() == [1.0, 2.0, 1.0, 1.0]


def test_tags_that_are_special_tokens_stay_in_the_text_and_ends_do_not(tiny):
    tokenizer = copy.deepcopy(load_tokenizer(tiny))
    text = "<think>a</think><answer>5</answer>"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert not ResponseText(tokenizer).keeps_tags and ResponseText(tokenizer)(plain) == text
    marks = "◁think▷a◁/think▷<seed:think>b</seed:think>"
    tags = [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<alone>",
        "◁think▷",
        "◁/think▷",
        "<seed:think>",
        "</seed:think>",
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    ids = tokenizer(f"{text}<alone>", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a5"
    spell = ResponseText(tokenizer)
    assert spell.keeps_tags and spell(np.asarray(ids, np.int32)) == text
    assert spell(tokenizer(marks, add_special_tokens=False)["input_ids"]) == marks
    assert lost_tags(tokenizer, "<think>.*</think>") == []
    assert lost_tags(tokenizer, "<alone>.*</think>") == ["<alone>"]
    check_tags(check_functions(["format", "numeric_match"], 60.0), tokenizer)
    with pytest.raises(
        ConfigError, match=r"reward.functions regex_match: no response can earn this reward, .* <alone> "
    ):
        check_tags(check_functions([{"function": "regex_match", "params": {"pattern": "^<alone>"}}], 60.0), tokenizer)
