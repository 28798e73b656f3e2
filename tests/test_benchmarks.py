"""The benchmarks measure, and their tables hold what was measured."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import accuracy
import speed
import train_pvs


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


# --------------------------------------------------------------------------------------- Accuracy


@pytest.mark.parametrize("row", accuracy.ROWS)
def test_flags_of_every_row_are_settings_that_differ_only_in_what_the_row_names(row):
    flags = [*accuracy.COMMON.split(), *accuracy.ROWS[row][1].split()]
    cfg, _ = train_pvs.parse_command_line([*flags, "--data-dir", "data"])
    assert cfg.IMG_PATCH_SIZE == (48, 48, 48)
    assert ((1.5,) * 3 if "1.5" in accuracy.ROWS[row][0] else (0, 0, 0)) == cfg.PIX_DIM
    assert cfg.DECODER_WIDTH == 16
    assert (cfg.ARCHITECTURE == "dynunet") == ("DynUNet" in accuracy.ROWS[row][0])


def test_table_has_means_over_heads_and_seeds_and_paired_differences(tmp_path):
    def runs(*dices):  # of two heads for each seed
        rows = [
            {
                "native_dice": d,
                "roundtrip_dice": 1,
                "lesion_f1_any": 0.5,
                "volume_ml_error_percent": -100 * d,
            }
            for d in dices
        ]
        grid = "working grid, RAS, 0.8 x 0.8 x 0.8 mm"
        return {seed: (rows[2 * seed : 2 * seed + 2], grid, 7) for seed in range(len(rows) // 2)}

    results = {"published": runs(0.1, 0.2, 0.3, 0.2), "native": runs(0.5, 0.6, 0.8, 0.7)}
    options = SimpleNamespace(minutes=3)
    accuracy.write_table(tmp_path / "table.md", results, options)
    published, native = (tmp_path / "table.md").read_text().splitlines()[-2:]
    # Means 0.2 and 0.65; differences -0.4, -0.4, -0.5, -0.5; the error of volume without its sign
    assert "| 0.200 (0." in published
    assert "| -0.450 (-0.500 to -0.400) |" in published
    assert "| 20 (" in published
    assert "| 0.650 (0." in native
    assert native.endswith(" |  | 7, 7 |")
