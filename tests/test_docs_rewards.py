"""The tables of accepted and rejected answers in docs/rewards.md, each row run."""

import re
from pathlib import Path

import pytest
import yaml

from apportion.data.errors import DataError
from apportion.data.verifiers import COLUMNS, VERIFIERS, check_answer, check_settings

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")


def rows():
    """(verifier, a row's cells by the name of their column), of every verifier's own table."""
    found = []
    for verifier, section in re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL):
        table = [line.strip().strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
        header = [cell.strip() for cell in table[0]]
        found += [(verifier, dict(zip(header, map(written, cells), strict=True))) for cells in table[2:]]
    return found


def written(cell):
    cell = cell[1:] if cell.startswith(" `") else cell
    cell = cell[:-1] if cell.endswith("` ") else cell
    return cell[1:-1].replace("⏎", "\n") if cell.startswith("`") else cell.strip()


def outcome(verifier, cells):
    """The reward of a row as the page writes it, or `refused` where a start refuses it."""
    params = yaml.safe_load(cells.get("params", "{}"))
    columns = {"answer": cells.get("answer")}
    if verifier == "gym":
        columns = {"task": "gcd", "entry": {"answer": cells["answer"]}, "task_parameters": {}}
    columns = {name: columns[name] for name in COLUMNS[verifier]}
    try:
        check_settings(verifier, params)
        check_answer(verifier, columns)
    except DataError:
        return "refused"
    given = {name: [value] for name, value in columns.items()}
    [reward] = VERIFIERS[verifier]([cells.get("prompt ends with", "")], [cells["response"]], **given, **params)
    return f"{reward:g}"


ROWS = rows()


@pytest.mark.parametrize(("verifier", "cells"), ROWS, ids=[f"{v}: {' / '.join(c.values())}" for v, c in ROWS])
def test_a_row_of_the_page_is_what_the_verifier_does(verifier, cells):
    assert outcome(verifier, cells) == cells["reward"]


def test_every_verifier_has_a_table_with_accepted_and_rejected_forms():
    said = {(verifier, cells["reward"]) for verifier, cells in ROWS}
    assert {verifier for verifier, _ in said} == set(VERIFIERS)
    assert {(verifier, "1") for verifier in VERIFIERS} | {(verifier, "0") for verifier in VERIFIERS} <= said
    assert {(verifier, "refused") for verifier, columns in COLUMNS.items() if "answer" in columns} <= said
