"""The benchmark measures, and its table holds what it measured."""

import math
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import speed


def table_rows(path):
    """Return the cells of the file's rows of numbers: what, A, B, number, number, ratio, range."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "measured"]


def test_ratio_is_the_median_of_the_pairs_ratios():
    # 3 / 2 = 1.5, 10 / 4 = 2.5, 8 / 1 = 8: the medians of the sides, 8 / 2, would give 4
    assert speed.median_ratio([(2, 3), (4, 10), (1, 8)]) == (2.5, 1.5, 8)


def test_rows_hold_positive_ratios_and_names_of_both_sides(tmp_path):
    output = tmp_path / "docs" / "benchmark.md"
    flags = ["--shape", "64", "72", "64", "--pairs", "1", "--output", str(output)]
    status = speed.main(["--only", "augmentation", "preparation", *flags])
    text, rows = output.read_text(), table_rows(output)
    assert status == 0
    assert re.findall("^## (.*?):", text, re.M) == ["preparation", "augmentation"]
    assert [row[1:3] for row in rows[:2]] == [
        ["first run, empty cache", "second run"],
        ["working grid 1.5 x 1.5 x 1.5 mm", "working grid 0.8 x 0.8 x 0.8 mm"],
    ]
    assert len(rows) == 4
    for *_, a, b, ratio, spread in rows:
        assert min(float(a), float(b), float(ratio.strip("*"))) > 0
        assert math.isfinite(float(ratio.strip("*")))
        assert spread.endswith("1 pair")


def test_sections_of_an_earlier_run_stay(tmp_path):
    command, path = "python benchmarks/speed.py", tmp_path / "benchmark.md"
    for name in ("step", "epoch", "step"):
        report = speed.Report(path, "# Head\n", command)
        report.begin(name)
        report.add("seconds", ("one", "other"), [(1, 2)])
    assert re.findall("^## (.*?):", path.read_text(), re.M) == ["epoch", "step"]
    assert len(table_rows(path)) == 2


def test_failed_section_loses_no_other(tmp_path, monkeypatch):
    def fail(bench):
        """Measure nothing"""
        bench.report.add("seconds", ("one", "other"), [(1, 2)])
        raise RuntimeError("no room")

    def work(bench):
        """Measure something"""
        bench.report.add("seconds", ("this", "that"), [(1, 4)])

    monkeypatch.setattr(speed, "SECTIONS", {"first": fail, "second": work})
    report = speed.Report(tmp_path / "benchmark.md", "# Head\n", "command")
    bench = speed.Bench(tmp_path, tmp_path, 1, speed.torch.device("cpu"), report)
    assert speed.run_sections(bench, ["first", "second"]) == 1
    assert [float(row[5].strip("*")) for row in table_rows(report.path)] == pytest.approx([2, 4])
    assert "Ended early: no room" in report.path.read_text()
