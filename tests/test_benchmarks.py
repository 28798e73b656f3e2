"""The benchmarks measure, and their tables hold what was measured."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import accuracy
import nnunet
import speed
import train_pvs


def rows_of(path, first):
    """Return the cells of a file's table rows, but for the head that begins with `first`."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] not in (first, "---")]


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory):
    """Run the smallest case of two rows, of which the second tests the first's weights anew."""
    work = tmp_path_factory.mktemp("accuracy")
    flags = "--seeds 1 --minutes 0.001 --shape 32 40 32 --heads 2 1 2".split()
    flags += ["--work", str(work), "--output", str(work / "table.md"), "--rows", "plain, mirrored"]
    assert accuracy.main(flags) == 0
    return flags, next(work.glob("32x40x32*")), work / "table.md"


def test_accuracy_measures_rows_and_does_nothing_twice(accuracies):
    flags, folder, table = accuracies
    text, rows = table.read_text(), rows_of(table, "recipe")
    assert [row[0].split(":")[0] for row in rows] == ["**plain**", "**plain, mirrored**"]
    files = [train_pvs.Run(folder / f"{row}-1").scores for row in ("plain", "plain-mirrored")]
    for row, file, mirrored in zip(rows, files, (False, True), strict=True):
        scores = json.loads(file.read_text())
        assert f"{scores['native']['dice']['mean']:.3f} (" in row[2]
        assert scores["config"]["TTA_FLIPS"] == mirrored
        assert [head["participant_id"] for head in scores["subjects"]] == ["sub-004", "sub-005"]
        assert row[-1] == "1"  # epoch
    times = [file.stat().st_mtime_ns for file in files]
    assert accuracy.main(flags) == 0
    assert table.read_text() == text
    assert [file.stat().st_mtime_ns for file in files] == times


def test_speed_measures_each_kind_of_row(accuracies, tmp_path):
    output, checkpoint = tmp_path / "docs" / "b.md", train_pvs.Run(accuracies[1] / "plain-1").best
    flags = ["--pairs", "1", "--device", "cpu", "--output", str(output), "--work", str(tmp_path)]
    sizes = ["--shape", "40", "48", "40", "--patches", "32", "32"]
    assert speed.main(["--only", "epoch", "preparation", *flags, *sizes]) == 0
    data = ["--data-dir", str(accuracies[1] / "data"), "--checkpoint", str(checkpoint)]
    trained = tmp_path / "trained.md"
    assert speed.main(["--only", "inference", *flags, *data, "--output", str(trained)]) == 0
    rows = rows_of(output, "measured") + rows_of(trained, "measured")
    assert [row[1] for row in rows] == ["pipeline, cached", "first run, empty cache", "pipeline"]
    for *_, a, b, ratio, spread in rows:
        assert float(ratio.strip("*")) == pytest.approx(float(b) / float(a), rel=0.02)
        assert spread.endswith(", 1 pair")
    assert re.search(r"waits for batches in \d+\.\d %", output.read_text())
    assert len(re.findall(r"Dice of sub-004, \w+: [01]\.\d{4}", trained.read_text())) == 2


def test_speeds_table_has_medians_of_ratios_and_keeps_other_rows(tmp_path):
    output = tmp_path / "benchmark.md"
    sizes = {"shape": (4, 5, 6), "patches": (32, 64), "data_dir": None}
    options = Namespace(output=output, device="cpu", **sizes)
    others = "## Another machine\n\n- Facts\n\n### step: a step\n\n| a | b |"
    output.write_text(f"{speed.INTRODUCTION}\n{others}\n")
    for name in ("preparation", "epoch", "preparation"):
        bench = speed.Bench(options, "the command")
        bench.name, bench.rows, bench.facts = name, [], []
        # 3 / 2 = 1.5, 10 / 4 = 2.5, 8 / 1 = 8: the medians of the sides, 8 / 2, would give 4
        bench.add("seconds", ("one", "other"), [(2, 3), (4, 10), (1, 8)])
    text = output.read_text()
    assert text.count("| seconds | one | other | 2 | 8 | **2.5** | 1.5 to 8, 3 pairs |") == 2
    assert re.findall("^### (.*?):", text, re.M) == ["epoch", "preparation", "step"]
    assert text.startswith(speed.INTRODUCTION)
    assert text.endswith(f"{others}\n")


def test_accuracys_table_has_means_over_heads_and_seeds_and_paired_differences(tmp_path):
    def runs(*dices):  # of two heads for each seed
        same = {"roundtrip_dice": 1, "lesion_f1_any": 0.5}
        rows = [{"native_dice": d, "volume_ml_error_percent": -100 * d} | same for d in dices]
        return {seed: (rows[2 * seed :][:2], "grid, RAS, 0.8 x 0.8 x 0.8 mm", 7) for seed in (0, 1)}

    results = {"published": runs(0.1, 0.2, 0.3, 0.2), "native": runs(0.5, 0.6, 0.8, 0.7)}
    sizes = {"minutes": 3, "shape": (4, 5, 6), "heads": (7, 8, 9)}
    accuracy.write_table(results, Namespace(output=tmp_path / "table.md", **sizes))
    published, native = rows_of(tmp_path / "table.md", "recipe")
    # Means 0.2 and 0.65; differences -0.4, -0.4, -0.5, -0.5; the error of volume without its sign
    assert published[1:4:2] == ["0.8 x 0.8 x 0.8 mm", "1.000 (1.000 to 1.000)"]
    assert [published[2][:7], published[5][:4], native[2][:7]] == ["0.200 (", "20 (", "0.650 ("]
    assert published[6:8] == ["native", "-0.450 (-0.500 to -0.400)"]
    assert native[6:] == ["plain", "", "", "7, 7"]


def test_one_line_says_what_to_install_for_nnunet(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nnunetv2", None)  # as if it were not installed
    assert accuracy.main(["--rows", "native", accuracy.NNUNET]) == nnunet.main([]) == 2
    assert capsys.readouterr() == ("", 2 * f"{accuracy.NO_NNUNET}\n")
    assert "pip install nnunetv2" in accuracy.NO_NNUNET


def test_nnunet_learns_from_no_test_head_and_is_scored_on_the_scans_grid(accuracies, tmp_path):
    data = accuracies[1] / "data"
    cases = train_pvs.find_cases(train_pvs.Config(DATA_DIR=str(data)))
    nnunet.lay_out(cases, json.loads((data / "split.json").read_text()), tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*/*"))
    assert names == [f"sub-00{n}{end}.nii.gz" for n in (1, 2, 3) for end in ("", "_0000")]
    label = np.asarray(nib.load(cases[-1].label).dataobj)

    def predict(image, properties):  # it finds every voxel of the upper half
        assert image.shape == (1, 32, 40, 32)
        return (label * (np.arange(32) >= 16)).transpose(2, 1, 0)

    reader = SimpleNamespace(read_images=lambda paths: (nib.load(paths[0]).get_fdata().T[None], {}))
    manager = SimpleNamespace(image_reader_writer_class=lambda: reader)
    predictor = SimpleNamespace(plans_manager=manager, predict_single_npy_array=predict)
    row = nnunet.test_case(predictor, cases[-1], tmp_path)
    share = label[..., 16:].sum() / label.sum()
    assert 0 < share < 1
    assert row["native_dice"] == pytest.approx(2 * share / (1 + share))
    assert row["volume_ml_error_percent"] == pytest.approx(100 * (share - 1))
    steps = [(3, 0.3, 10), (2, 0.2, 20), (1, 0.1, 26), (0, 0.1, 30), (4, 0.1, 31), (5, 0.05, 33)]
    rows = [list(row.values()) for row in nnunet.list_epochs(steps)]
    assert rows == [[1, 5, 2, 0.3, 31], [2, 1, 5, 0.05, 2]]  # epoch, steps, loss, lr, seconds
