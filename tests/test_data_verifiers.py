"""Ready-made reward functions and accuracies, by value."""

import math
import threading
from fractions import Fraction

import pytest

from apportion.data.answers import last_number
from apportion.data.errors import DataError
from apportion.data.metrics import accuracy, average_at_k, mean_pass_at_k, pass_at_k
from apportion.data.verifiers import VERIFIERS


def rewards(name: str, *pairs, **columns):
    completions, answers = zip(*pairs, strict=True)
    return VERIFIERS[name](prompts=["?"] * len(pairs), completions=list(completions), answer=list(answers), **columns)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The sum is 19.", "19"),
        ("12 + 7 = 19", "19"),
        ("12-7", "7"),
        ("x = -3.50", "-3.50"),
        ("(-4)", "-4"),
        ("1,234,567.5 dollars", "1234567.5"),
        ("1,2", "2"),
        ("6e2", "6E+2"),
        ("half is .5", "0.5"),
        ("\u22128", "-8"),
    ],
)
def test_the_last_number_of_a_text_is_found(text, number):
    assert last_number(text) == Fraction(number)


def test_a_text_without_numbers_has_no_last_number():
    assert last_number("nineteen") is None


def test_numeric_match_compares_values_not_spelling():
    pairs = [("It is 19", 19), ("19.0", "19"), ("I think 18", 19), ("no idea", 19), ("1,000", 1000.0)]
    assert rewards("numeric_match", *pairs) == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_numeric_match_takes_messages_and_a_tolerance():
    answer = [{"role": "assistant", "content": "about 3.14"}]
    assert rewards("numeric_match", (answer, math.pi)) == [0.0]
    assert rewards("numeric_match", (answer, math.pi), tolerance=0.01) == [1.0]


def test_large_whole_numbers_are_compared_exactly():
    assert rewards("numeric_match", ("9007199254740993", "9007199254740992")) == [0.0]


@pytest.mark.parametrize("answer", [None, "", "many", True])
def test_an_answer_that_is_no_number_is_an_error_and_not_a_wrong_completion(answer):
    with pytest.raises(DataError, match="expected a number"):
        rewards("numeric_match", ("19", answer))


def test_exact_match_ignores_only_white_space_unless_told():
    pairs = [(" New  York\n", "New York"), ("new york", "New York"), ("York", "New York")]
    assert rewards("exact_match", *pairs) == [1.0, 0.0, 0.0]
    assert rewards("exact_match", *pairs, ignore_case=True) == [1.0, 1.0, 0.0]
    with pytest.raises(DataError, match="answer: got None"):
        rewards("exact_match", ("x", None))


def test_gsm8k_reads_the_number_after_the_mark():
    answer = "48/2 = <<48/2=24>>24 in May.\n#### 1,072"
    assert rewards("gsm8k", ("so 1072", answer), ("24", answer), ("#### 1072\nthat is 2 more", answer)) == [
        1.0,
        0.0,
        1.0,
    ]
    assert rewards("gsm8k", ("7 and then #### 1072", answer)) == [1.0]


def test_patterns_may_cross_lines_and_describe_the_whole():
    assert rewards("regex_match", ("a\nb", 0), ("b", 0), pattern="a.b") == [1.0, 0.0]
    assert rewards("regex_match", ("xab", 0), ("ab", 0), pattern="ab", full=True) == [0.0, 1.0]
    good, bad = "<think>\nhm\n</think>\n<answer>4</answer>", "<answer>4</answer>"
    assert rewards("format", (good, 0), (bad, 0)) == [1.0, 0.0]


def test_math_verify_sees_equal_expressions_in_any_thread():
    pairs = [("The answer is $\\frac{1}{2}$", "0.5"), ("\\boxed{2x+2}", "2(x+1)"), ("I get 41", "#### 42"), ("42.", 42)]
    out = []
    thread = threading.Thread(target=lambda: out.extend(rewards("math_verify", *pairs)))
    thread.start()
    thread.join(60)
    assert out == [1.0, 1.0, 0.0, 1.0]
    assert rewards("math_verify", *pairs) == out


@pytest.mark.parametrize("answer", [None, True, False, "", " \n", "#### ", math.nan, math.inf])
def test_math_verify_refuses_an_answer_it_cannot_read(answer):
    with pytest.raises(DataError) as caught:
        rewards("math_verify", ("42", answer))
    assert str(caught.value) == f"answer: got {answer!r}, expected a mathematical expression"


def test_gym_answers_are_scored_by_the_task_itself():
    from apportion.data.sources import load_sources

    [source] = load_sources({"source": "gym:chain_sum", "size": 1, "max_terms": 3})
    values = source.rows[0].values
    right, wrong = values["answer"], str(int(values["answer"]) + 1)
    completions = [f"<think>{wrong}</think><answer> {right} </answer>", right, f"<answer>{wrong}</answer>"]
    columns = {name: [values[name]] * 3 for name in ("task", "entry", "task_parameters", "answer")}
    assert VERIFIERS["gym"](prompts=["?"] * 3, completions=completions, **columns) == [1.0, 1.0, 0.0]


def test_pass_at_k_is_the_chance_of_a_right_one_among_k_drawn():
    assert pass_at_k(4, 0, 2) == 0.0
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(4, 3, 2) == 1.0
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="k: got 5, expected 1 to 4 samples"):
        pass_at_k(4, 1, 5)


def test_unknown_rewards_are_left_out_of_accuracies():
    nan = math.nan
    assert accuracy([1.0, 0.5, nan, 0.0]) == pytest.approx(1 / 3)
    assert accuracy([1.0, 0.5, nan, 0.0], correct_at=0.5) == pytest.approx(2 / 3)
    assert math.isnan(accuracy([nan]))
    assert average_at_k([[1, 0, nan, 0], [1, 1, 1, 0]]) == pytest.approx((1 / 3 + 3 / 4) / 2)
    assert mean_pass_at_k([[1, 0, nan], [0, nan, nan], [0, 0, 0]], k=2) == pytest.approx(0.5)
    assert math.isnan(mean_pass_at_k([[1, nan]], k=2))


@pytest.mark.parametrize(
    ("verifier", "answer", "completion", "reward"),
    [
        ("gsm8k", "#### 42", "#### 42 ####", 1.0),  # the closing mark of a heading
        ("gsm8k", "#### 42", "#### 43 ####", 0.0),
        ("gsm8k", "#### 42", "#### Final answer:\n42", 1.0),
        ("gsm8k", "#### 42", '**#### "42"**', 1.0),
        ("gsm8k", "#### 70,000", "#### $70k", 1.0),
        ("gsm8k", "#### 70", "#### $70k", 0.0),
        ("numeric_match", "70000", "It costs $70k.", 1.0),
        ("numeric_match", "3", "3 squared", 0.0),
        ("numeric_match", "5", "\u25c1think\u25b76\u25c1/think\u25b7 5", 1.0),
        ("numeric_match", "6", "\u25c1think\u25b76", 0.0),  # reasoning that does not end
        ("math_verify", "5", r"so \boxed5", 1.0),
        ("math_verify", "B", "The answer is (B).", 1.0),
        ("math_verify", "B", "The answer is (C).", 0.0),
        ("math_verify", "x\u00b2+1", r"\boxed{x^2+1}", 1.0),
        ("math_verify", r"\frac{1\pm\sqrt{5}}{2}", r"\boxed{\frac{1\pm\sqrt{5}}{2}}", 1.0),
        ("math_verify", r"\frac{1\pm\sqrt{5}}{2}", r"\boxed{\frac{1\pm\sqrt{7}}{2}}", 0.0),
    ],
)
def test_other_ways_to_write_an_answer_are_read_and_near_misses_earn_nothing(verifier, answer, completion, reward):
    assert rewards(verifier, (completion, answer)) == [reward]
