"""The benchmark's page says what was measured, what it is held to, and why something falls short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_credit
import bench_report
import bench_work
from bench_report import Part, Row, Table


def test_a_row_is_met_from_the_side_its_target_says() -> None:
    assert Row("speed", 0.9, "", 0.9).met is True
    assert Row("speed", 0.89, "", 0.9).met is False
    assert Row("share", 0.11, "", 0.1, at_least=False).met is False
    assert Row("share", 0.1, "", 0.1, at_least=False).met is True
    assert Row("only shown", 1.0, "s").met is None


def test_a_ratio_is_the_median_of_neighbouring_measurements() -> None:
    assert bench_report.median_ratio([1.0, 8.0, 3.0], [2.0, 10.0, 1.0]) == pytest.approx(0.8)


def test_the_page_keeps_other_parts_and_names_what_falls_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_report, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(bench_report, "PAGE", tmp_path / "page.md")
    rollout = Part("rollout", "Rollout", "How.", [Row("ours / bare", 0.95, "", 0.9)], machine="two cores")
    slow = Row("ours / peer", 2.0, "", 2.5, reason="Because.")
    peer = Part("peer", "Peer", "How.", [slow], [Table("Steps", ["side", "s"], [["ours", "1"]])], machine="two cores")
    bench_report.store([rollout])
    everything = bench_report.store([peer])
    assert [part.name for part in everything] == ["rollout", "peer"]
    bench_report.write_page(everything)
    page = (tmp_path / "page.md").read_text()
    assert page.count("Machine: two cores.") == 1
    assert "| ours / bare | 0.95 | at least 0.9 | met |" in page
    assert "- **ours / peer**: 2.00, target at least 2.5. Because." in page
    assert "| ours | 1 |" in page


def test_every_row_of_the_made_up_batch_teaches() -> None:
    batch = bench_work.made_up_batch(5, 2, 4, responses=16)
    assert len(batch) == 16
    assert batch.group_ids.tolist() == [0] * 8 + [1] * 8
    assert (batch.advantages != 0).all()
    assert batch.loss_weights.sum() == pytest.approx(1.0)
    first, second = batch.sequence(0)[:5].tolist(), batch.sequence(7)[:5].tolist()
    assert first == second  # a group has one prompt


def test_linear_and_quadratic_growth_are_told_apart() -> None:
    linear = [float(length) for length in bench_credit.CURVE]
    quadratic = [value**2 for value in linear]
    assert bench_credit.exponent(linear) == pytest.approx(1.0)
    assert bench_credit.exponent(quadratic) == pytest.approx(2.0)
