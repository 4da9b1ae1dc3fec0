"""Whether the ready-made verifiers can read the answers of the data, found before anything starts.

An answer that a verifier reads as something else pays for wrong responses, and one that it cannot read fails every
sample of its row. So such a row is a bad row, with file and line, and `data.on_bad_row` says what happens to it. Rows
that are made when they are drawn (reasoning-gym) are checked as far as `FIRST_ROWS`; of the rest, a sample fails.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apportion.actors.reward_call import Failure, RewardCall
from apportion.actors.reward_check import check_columns
from apportion.actors.reward_sources import FunctionSource, RewardEntry
from apportion.data.answers import number_of
from apportion.data.columns import nested_paths, value_at
from apportion.data.errors import BadRows, DataError
from apportion.data.hub import TableRows
from apportion.data.response_text import lost_tags
from apportion.data.rows import Row
from apportion.data.sources import Source
from apportion.data.tasks import GymRows
from apportion.data.verifiers import COLUMNS, THINK_THEN_ANSWER, check_answer
from apportion.platform.errors import ConfigError

FIRST_ROWS = 64
COLUMN_ROWS = 8  # of each source: the columns of the data are theirs
RESPONSE = r"\boxed{7919/7907}"  # compared with each mathematical answer, to see that this comes to an end
AT_ONCE = 64  # answers of one call of a verifier in a process, which has the time limit of a call


def check_source_columns(functions: Sequence[FunctionSource], sources: Sequence[Source], where: str) -> None:
    """ConfigError where a function needs a column that no source has, as their first rows tell."""
    rows = [
        {name: value for name, value in row.values.items() if name != source.prompt_column}
        for source in sources
        for row in source.rows[:COLUMN_ROWS]
    ]
    check_columns(functions, {name for row in rows for name in row}, where, nested_paths(rows))


def check_answers(functions: Sequence[FunctionSource], sources: Sequence[Source], on_bad_row: str) -> None:
    """DataError with its place for a row whose answer a verifier cannot read; or, where bad rows are skipped, the row
    leaves its source and is counted in `skipped`."""
    verifiers = [function for function in functions if function.verifier and COLUMNS[function.verifier]]
    for source in sources if verifiers else ():
        rejected = _rejected(verifiers, source, BadRows(on_bad_row))
        if len(rejected) == len(source.rows):
            raise DataError(f"{source.name}: no row can be used; left out: {dict(source.skipped)}")
        if rejected:
            source.rows = _without(source.rows, rejected)


def check_tags(functions: Sequence[FunctionSource], tokenizer: Any) -> None:
    """ConfigError where a pattern has a tag that the policy's tokenizer cannot spell: no response could earn the reward."""
    for function in functions:
        if function.verifier not in ("format", "regex_match"):
            continue
        pattern = function.params.get("pattern", THINK_THEN_ANSWER)
        if lost := lost_tags(tokenizer, pattern):
            raise ConfigError(
                f"reward.functions {function.name}: no response can earn this reward, as the text of a response never has "
                f"{', '.join(lost)} (a special token without its partner, or not in the vocabulary); change the pattern, or "
                "the tokenizer's special tokens"
            )


@dataclass
class _Asked:
    """A verifier's columns of one row. Equal ones are asked once."""

    row: Row
    values: dict[str, Any]

    @property
    def key(self) -> str:
        return repr(self.values)


def _rejected(verifiers: Sequence[FunctionSource], source: Source, bad: BadRows) -> set[int]:
    """Places of the rows whose answers cannot be read, after `bad` has counted them."""
    rejected: set[int] = set()
    for verifier in verifiers:
        assert verifier.verifier is not None
        paths = {name: verifier.paths.get(name, name) for name in COLUMNS[verifier.verifier]}
        rows = _read_rows(source.rows, {path.partition(".")[0] for path in paths.values()} | set(paths.values()))
        asked = [_Asked(row, {name: value_at(row.values, path) for name, path in paths.items()}) for row in rows]
        problems = _problems(verifier, asked)
        for place, one in enumerate(asked):
            problem = problems.get(one.key)
            if problem is None or place in rejected:
                continue
            if (said := list(paths.values())) != list(paths):
                problem = f"{problem} (column {', '.join(said)})"
            bad.reject("unreadable_answer", f"{one.row.place}: {problem}; {verifier.name} cannot check this row")
            rejected.add(place)
    source.skipped.update(bad.counts)
    return rejected


def _read_rows(rows: Sequence[Row], names: Collection[str]) -> Sequence[Row]:
    if isinstance(rows, GymRows):
        return rows[:FIRST_ROWS]
    return rows.only(names) if isinstance(rows, TableRows) else rows


def _without(rows: Sequence[Row], rejected: set[int]) -> Sequence[Row]:
    places = [place for place in range(len(rows)) if place not in rejected]
    return rows.at(places) if isinstance(rows, TableRows) else [rows[place] for place in places]


def _problems(verifier: FunctionSource, asked: Sequence[_Asked]) -> dict[str, str]:
    """What is wrong with an answer, by its key; the good ones are not in it."""
    different = {one.key: one.values for one in asked}
    if verifier.verifier == "math_verify":
        return _problems_in_a_process(verifier, different)
    found: dict[str, str] = {}
    for key, values in different.items():
        try:
            check_answer(str(verifier.verifier), values)
        except DataError as error:
            found[key] = str(error)
    return found


def _problems_in_a_process(verifier: FunctionSource, different: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """As `_problems`, for a verifier that an odd answer can keep busy without end; plain numbers need none."""
    from apportion.actors.reward_process import VerifierSource

    name = str(verifier.verifier)
    waiting = {key: v["answer"] for key, v in different.items() if not _is_number(v["answer"])}
    if not waiting:
        return {}
    source = VerifierSource(verifier.name, name, RewardEntry(name, timeout_seconds=verifier.limit_seconds))
    found: dict[str, str] = {}
    keys = list(waiting)
    try:
        for start in range(0, len(keys), AT_ONCE):
            chunk = keys[start : start + AT_ONCE]
            texts = [""] * len(chunk)
            ids: list[list[int]] = [[]] * len(chunk)
            given = {"answer": [waiting[key] for key in chunk]}
            said = source.score(RewardCall(texts, [RESPONSE] * len(chunk), given, ids, ids))
            found |= {key: told for key, s in zip(chunk, said, strict=True) if (told := _told(s, waiting[key]))}
    finally:
        source.close()
    return found


def _is_number(answer: Any) -> bool:
    return not isinstance(answer, bool) and answer is not None and number_of(str(answer)) is not None


def _told(said: Any, answer: Any) -> str | None:
    """What is wrong with an answer, by what its verifier said of `RESPONSE`; None where it could compare the two, or
    refused to compare them, as a set with a number."""
    if not isinstance(said, Failure):
        return None
    line = said.text.strip().splitlines()[-1]
    if said.reason == "raised":
        return line.partition("DataError: ")[2] or None
    return f"answer: got {str(answer)[:60]!r}, which cannot be compared in time ({line})"
