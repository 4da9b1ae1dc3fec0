"""The judge's verdicts: steps by token offsets, the vote, and the marks that reach a batch."""

from collections import Counter

import numpy as np
import pytest
from judge_parts import END, Scripted, batch_of, decode, encode, judge_with, prompt

from apportion.actors.judge import JudgeReport, question_text, steps_of_response
from apportion.batch import Batch, Critique, Marks
from apportion.platform.metric_names import unknown_metrics

# steps


def test_every_token_has_its_step_and_the_end_token_is_of_the_last():
    steps, ids = steps_of_response([*encode("a\n\nbc"), END], np.zeros(6), decode, "\n\n")
    assert steps == ["a\n\n", "bc"]
    assert ids == [0, 0, 0, 1, 1, 1]


def test_what_an_environment_wrote_is_a_step_of_its_own_and_each_turns_end_stays_with_its_turn():
    tokens = [*encode("go"), END, *encode("seen"), *encode("up"), END]
    turns = np.array([0, 0, 0, -1, -1, -1, -1, 1, 1, 1])
    steps, ids = steps_of_response(tokens, turns, decode, "\n\n")
    assert steps == ["go", "seen", "up"]
    assert ids == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_a_response_of_special_tokens_or_white_space_has_no_step_but_its_tokens_have_a_number():
    assert steps_of_response([END], np.zeros(1), decode, "\n\n") == ([], [0])
    assert steps_of_response(encode(" \n"), np.zeros(2), decode, "\n\n") == ([], [0, 0])
    assert steps_of_response([], np.zeros(0), decode, "\n\n") == ([], [])


def test_the_question_of_several_messages_names_their_roles():
    assert question_text("q") == "q"
    assert question_text([{"role": "user", "content": "q"}]) == "q"
    assert (
        question_text([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]) == "system: s\n\nuser: q"
    )


# the vote and the marks


@pytest.mark.parametrize(
    ("voting", "wrong"), [("intersection", []), ("majority", [1]), ("union", [0, 1])]
)  # of [1], [0, 1], [] and one that failed
def test_the_credit_methods_own_vote_decides(voting, wrong):
    source = Scripted(Critique([1]), Critique([0, 1]), Critique([]), Critique(None, "unparseable", "?"))
    report, marks = judge_with(source, credit={"name": "capo", "voting": voting}).judge(
        batch_of("a\n\nb"), [prompt()], [0]
    )
    assert marks.wrong_steps == [wrong]
    assert report.failed == Counter(unparseable=1) and report.critiques == 4 and report.unjudged == 0


def test_no_critique_left_means_no_penalty_and_is_counted():
    report, marks = judge_with(Scripted(Critique(None, "down", detail="gone"))).judge(
        batch_of("a\n\nb", "c"), [prompt()], [0, 1]
    )
    assert marks.wrong_steps == [[], []]
    assert report.unjudged == 2 and report.failed == Counter(down=8)
    assert report.first_failure == "a critique is down, has no vote and is counted: gone"


def test_two_judges_share_a_batch_by_rows_and_the_marks_meet_on_it():
    batch = batch_of("a\n\nb", "c", "d\n\ne\n\nf")
    judge = judge_with(Scripted(Critique([0])), critiques=1)
    parts = [judge.judge(batch, [prompt()], range(part, 3, 2))[1] for part in (1, 0)]
    marked = Marks.apply(batch, parts)
    assert marked.wrong_steps == [[0], [0], [0]]
    assert marked.step_ids.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert [len(c) for c in marked.critiques] == [1, 1, 1]
    assert Batch.concat([marked, marked]).select([5]).wrong_steps == [[0]]


def test_marks_that_leave_out_a_row_are_refused():
    batch = batch_of("a", "b")
    _, marks = judge_with(Scripted(Critique([])), critiques=1).judge(batch, [prompt()], [1])
    with pytest.raises(ValueError, match="got 1 rows of 2 trajectories"):
        Marks.apply(batch, [marks])
    assert Marks.apply(batch, []) is batch


def test_a_response_without_steps_is_not_asked_about():
    source = Scripted(Critique([0]))
    report, marks = judge_with(source).judge(batch_of(""), [prompt()], [0])
    assert source.asked == [] and marks.wrong_steps == [[]] and marks.critiques == [[]]
    assert (report.without_steps, report.critiques, report.unjudged) == (1, 0, 0)


def test_the_judge_sees_the_reference_answer_only_from_its_column():
    source = Scripted(Critique([]))
    judge_with(source).judge(batch_of("a"), [prompt({"answer": 2, "level": 3})], [0])
    judge_with(source, answer_column=None).judge(batch_of("a"), [prompt({"answer": 2})], [0])
    assert [(case.answer, case.columns) for case in source.asked] == [("2", {"level": 3}), (None, {"answer": 2})]


def test_what_a_report_logs_has_a_line_in_the_table_of_metrics():
    report = JudgeReport(4, 1, 9, 2, 12, 4, Counter(down=3), 1, 0.5)
    means = report.totals().means()
    assert unknown_metrics(means) == []
    assert means["judge/failed_share"] == 0.25 and means["judge/unjudged_share"] == pytest.approx(1 / 3)
    assert means["judge/failed/down"] == 3 and means["judge/steps_mean"] == 2.25
    assert means["judge/cached_share"] == pytest.approx(4 / 12)
