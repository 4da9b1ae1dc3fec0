"""Reading a final answer: one exact number or none, whatever dresses it."""

import json
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

from apportion.data.answers import answer_text, first_number, last_box, last_number, number_of
from apportion.data.columns import own_copy, value_at
from apportion.data.errors import DataError
from apportion.data.expressions import read_answer
from apportion.data.verifiers import VERIFIERS, opening_of

GSM8K = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "gsm8k"

ONE_NUMBER = {
    "1080": [
        "1,080",
        "$1,080",
        "1,080.00",
        r"1{,}080",
        r"1\,080",
        r"1,\!080",
        "1\u202f080",
        "$1,080$",
        "1080.",
        "**1,080**",
    ],
    "42": [
        "42",
        "+42",
        "042",
        r"\text{42}",
        r"\boxed{42}",
        r"\textbf{42}",
        "`42`",
        "$$42$$",
        r"\(42\)",
        "The answer is 42.",
    ],
    "-3": ["-3", "\u22123", "- 3", r"-\$3", "-$3", "$-3", "minus 3", "negative 3", "\uff0d\uff13"],
    "3/4": ["3/4", "3 / 4", "0.75", ".75", r"\frac{3}{4}", r"\dfrac34", r"\frac{-3}{-4}", "¾", "3\u20444"],
    "-3/4": ["-3/4", r"-\frac{3}{4}", r"\frac{-3}{4}", r"\frac{3}{-4}", "-0.75"],
    "3/2": ["1 1/2", r"1\frac{1}{2}", "1½", "1.5", "1 and 1/2"],
    "50": ["50%", r"50\%", "50 percent", r"50\,\%"],
    "12": [
        "12 cm",
        "12cm",
        r"12\text{ cm}^2",
        "12 cm²",
        r"12 \mathrm{cm}^{3}",
        "12 km/h",
        "12 miles per hour",
        "12°",
        r"12^\circ",
    ],
    "2500": ["2.5e3", "2.5E+3", r"2.5 \times 10^{3}", "2.5×10³", "2.5 x 10^3", "2.5 thousand", "25e2"],
    "1/400": ["2.5e-3", "2.5×10⁻³", r"2.5 \cdot 10^{-3}"],
    "5": ["x = 5", "x=5", "= 5", "USD 5", "5 €", "Rs. 5", "5 driver's licenses", "٥"],
    "1/3": [r"0.\overline{3}", "1/3", r"0.\overline{33}"],
}


@pytest.mark.parametrize(("number", "text"), [(n, t) for n, texts in ONE_NUMBER.items() for t in texts])
def test_a_text_that_is_one_number_is_that_number(number, text):
    assert number_of(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    ["", " ", "many", "v2", "A5", "5A", "2x", "3i", "2k", "5M", "3bn", "2 x", "x>5", "~", ">5", "±5", "5 ± 1", "5+", "#5",
     "5-7", "5\u20137", "5 to 7", "10:30", "3:4", "2024-01-05", "3/4/2024", "1.2.3", "(5)", "(1, 2)", "[5]", "{1, 2}",
     "2^10", "2**10", "10**10**10", r"10^{10^{10}}", "5²", "x²", r"\sqrt{2}", r"2\sqrt{3}", r"2\pi", "2π", "2 pi", "5!",
     "1/0", "0/0", "1e99999", "9" * 600, "inf", "-inf", "nan", "Infinity", "None", "1,5", "1,23,456", "1234,567",
     "1 080", "1.234.567", "1.234,56", "3 dozen", "3 and a half", "5 and two thirds", "5 or more", "2+3", "2*3", "x = 2 or x = 5",
     "3 apples and 4 pears", r"\frac{x}{2}", r"\frac{\pi}{2}", "half of 5", "at least 5", r"\text{(A)}", "5 squared"],
)  # fmt: skip
def test_a_text_that_is_not_one_number_is_none(text):
    assert number_of(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("items:\n- 5", "5"),
        ("it is - 5", "5"),
        ("x = - 5", "-5"),
        ("10 minus 5", "5"),
        ("it is minus 5", "-5"),
        ("12 -7", "-7"),
        ("costs $5-$7", "7"),
        ("42, by model v2", "42"),
        ("step 1: 42", "42"),
        ("42!", "42"),
        ("the 5th", "5"),
        ("答案是42元", "42"),
        ("10/2 = 5", "5"),
        ("5/hour", "5"),
        ("11:30", None),
        ("5^2", None),
        ("so f(2)", None),
        ("x/2", None),
        ("2 ± 1", None),
        ("10k", None),
        ("5/0", None),
        ("version 3.2.1", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_the_last_number_is_never_a_part_of_something_else(text, number):
    assert last_number(text) == (None if number is None else Fraction(number))


def test_the_last_number_of_a_long_text_is_found_wherever_it_is():
    for words in (0, 100, 390, 400, 410, 5000):
        assert last_number(f"It is $1,234.50 and {'more ' * words}") == Fraction("1234.5")
        assert last_number(f"It is 7, by {'v2 ' * words}") == 7


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 42 is it, 7 no", "42"),
        ("\n42\n7", "42"),
        ("42, 43", None),
        ("5 to 7", None),
        ("= 42", "42"),
        ("48 + 24 = 72", "72"),
    ],
)
def test_the_first_number_is_what_a_text_begins_with(text, number):
    assert first_number(text) == (None if number is None else Fraction(number))


def test_reasoning_and_unfinished_answers_are_no_answer():
    assert answer_text("<think>1</think>2<think>3</think> 4") == " 4"
    assert answer_text("<think>1</think> 2 <think> 3") is None
    assert answer_text("1 </think> 2") == " 2"
    assert answer_text("[THINK]1[/THINK]2") == "2"
    assert answer_text("1", opening="<think>\n") is None
    assert answer_text("1</think>2", opening="<think>\n") == "2"
    assert answer_text("<answer>1</answer> <answer>2</answer> 3") == "2"
    assert answer_text("<answer>1</answer> <answer>2") is None
    assert answer_text("4</answer>", opening="<answer>") == "4"


def test_the_last_finished_box_counts_and_an_unfinished_one_is_no_answer():
    assert last_box(r"\boxed{1} \boxed{\frac{1}{\sqrt{2}}}!") == (True, r"\frac{1}{\sqrt{2}}")
    assert last_box(r"\boxed{\{1, 2\}}") == (True, r"\{1, 2\}")
    assert last_box(r"\boxed{\boxed{12}") == (True, None)
    assert last_box(r"{ \boxed{12}") == (True, "12")
    assert last_box(r"\boxed{1} \fbox{ }") == (True, None)


def test_a_prompts_ending_is_the_tags_that_it_ends_with():
    assert opening_of("<|im_start|>assistant\n<think>\n").strip() == "<think>"
    assert opening_of("<|Assistant|><think>\n\n</think>\n\n") == "<think>\n\n</think>\n\n"
    assert opening_of("Use <think> and <answer>.") == ""
    for tag in ("◁think▷", "<seed:think>", "[THINK]", "<|begin_of_thought|>"):
        assert opening_of(f"<|im_start|>assistant\n{tag}\n").strip() == tag
        assert VERIFIERS["numeric_match"]([f"assistant\n{tag}"], ["maybe 12"], answer=["12"]) == [0.0]
        closed = {"◁think▷": "◁/think▷", "<|begin_of_thought|>": "<|end_of_thought|>"}.get(tag, f"{tag[0]}/{tag[1:]}")
        assert VERIFIERS["numeric_match"]([f"assistant\n{tag}"], [f"1{closed}12"], answer=["12"]) == [1.0]
        form = {"pattern": re.escape(tag) + ".*" + re.escape(closed)}
        assert VERIFIERS["format"]([f"assistant\n{tag}\n"], [f"1{closed}12"], **form) == [1.0]
    assert opening_of([{"role": "user", "content": "<think>"}]) == ""


@pytest.mark.parametrize(
    "loop", ["9", " ", "\n", "1/", "ab / ", "$5 ", "{", r"\boxed{", r"\frac{", "**", "1,", "-", "^", "<think>"]
)
def test_a_response_that_repeats_itself_costs_no_more_than_its_length(loop):
    text = "5" + loop * (20_000 // len(loop)) + "x"
    start = time.perf_counter()
    for read in (number_of, first_number, last_number, answer_text, last_box):
        read(text)
    assert time.perf_counter() - start < 5.0  # a reading that looks back for each character takes minutes


def test_a_response_that_the_prompts_template_opened_is_reasoning_until_it_ends():
    prompts = ["<|im_start|>assistant\n<think>\n"] * 3
    completions = ["12, or 13? 12", "13</think>12", "12</think>13"]
    for name in ("numeric_match", "gsm8k", "math_verify"):
        assert VERIFIERS[name](prompts, completions, answer=["12"] * 3) == [0.0, 1.0, 0.0], name


@pytest.mark.parametrize(
    "answer",
    [
        "3 apples and 4 pears",
        "x = 2 or x = 5",
        "10:30",
        "5-7",
        "2024-01-05",
        "1:2:3",
        "1 080",
        "none",
        "NaN",
        "-",
        ",",
        r"\boxed{}",
        r"\frac{1}{",
        "Natalia sold 72 clips. She is 5.",
    ],
)
def test_an_answer_that_is_not_one_expression_is_refused(answer):
    with pytest.raises(DataError, match="expected a mathematical expression"):
        read_answer(answer)


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (r"\frac{\sqrt{3}}{2}", r"\boxed{\dfrac{\sqrt{3}}{2}}", r"\boxed{\sqrt{3}}"),
        (r"\left(2, \frac{\pi}{3}\right)", r"\boxed{(2, \frac{\pi}{3})}", r"\boxed{(\frac{\pi}{3}, 2)}"),
        (r"42\text{ cm}^2", r"\boxed{42 \text{ cm}^2}", r"\boxed{42^2}"),
        (r"(-\infty, 2]", r"\boxed{(-\infty, 2]}", r"\boxed{(-\infty, 2)}"),
        ("x^2 + 1", r"\boxed{1 + x^2}", r"\boxed{x^2}"),
        ("even", r"\boxed{\text{even}}", r"\boxed{\text{odd}}"),
        ("$3/4$", "The answer is 3/4.", "The answer is 4."),
        (r"30^\circ", r"\boxed{30}", r"\boxed{30^2}"),
    ],
)
def test_math_verify_pays_for_the_right_form_and_not_for_a_near_one(answer, right, wrong):
    assert VERIFIERS["math_verify"](["", ""], [right, wrong], answer=[answer] * 2) == [1.0, 0.0]


def test_values_are_found_by_path_and_a_column_with_dots_goes_first():
    row = {"reward_model": {"ground_truth": "2"}, "a.b": 1, "a": {"b": 2}, "text": "x"}
    assert [value_at(row, p) for p in ("reward_model.ground_truth", "a.b", "text.x", "reward_model.none")] == [
        "2",
        1,
        None,
        None,
    ]


def test_a_copy_of_ones_own_shares_no_list_and_no_mapping():
    message = {"role": "user", "content": ["q"]}
    copied = own_copy([[message], [message]])
    assert copied == [[message], [message]]
    copied[0][0]["content"].append("changed")
    assert message["content"] == ["q"] and copied[1][0]["content"] == ["q"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_answer_of_gsm8k_is_read_and_pays_for_itself(split):
    file = GSM8K / f"{split}.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there: real data lie beside the project, not in it")
    answers = [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(answers) > 1000
    assert VERIFIERS["gsm8k"]([""] * len(answers), answers, answer=answers) == [1.0] * len(answers)
    marked = [answer.rpartition("####")[2].strip().replace(",", "") for answer in answers]
    assert [number_of(text) for text in marked] == [Fraction(text) for text in marked]
    assert VERIFIERS["gsm8k"]([""] * len(answers), [f"{text}1" for text in answers], answer=answers) == [0.0] * len(
        answers
    )
