"""The benchmarks measure, and their tables hold what was measured."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from conftest import make_subject
from running import draw_nothing

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import heads

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
    for number in range(1, 6):
        make_subject(work / "data", f"sub-{number:03d}", seed=number)
    flags = "--seeds 1 --minutes 0.001 --heads 2 1 2".split()
    flags += ["--data-dir", work / "data", "--work", work / "runs", "--output", work / "table.md"]
    flags = [*map(str, flags), "--rows", "native", "one view"]
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        patch.setattr(accuracy, "COMMON", f"{accuracy.COMMON} --img-patch-size 16")
        assert accuracy.main(flags) == 0
        yield flags, work / "runs" / "data-2-1-2-0.001-minutes", work


def test_accuracy_measures_rows_on_two_scanners_and_does_nothing_twice(accuracies):
    flags, folder, work = accuracies
    text, rows = (work / "table.md").read_text(), rows_of(work / "table.md", "recipe")
    titles = re.findall("^## (.*)", text, re.M)
    assert titles[:2] == [f"Data, 0.001 minutes, {name}" for name in accuracy.SETS.values()]
    assert [row[0].split(":")[0] for row in rows] == 2 * ["**native**", "**one view**"]
    files = [folder / f"{row}-1" / "result.json" for row in ("native", "one-view")]
    for number, file in enumerate(files):
        result = json.loads(file.read_text())
        for name, row in zip(("same", "other"), (rows[number], rows[2 + number]), strict=True):
            tested = result[name]["subjects"]
            assert [head["participant_id"] for head in tested] == ["sub-004", "sub-005"]
            mean = np.mean([head["native_dice"] for head in tested])
            assert row[1].startswith(f"{mean:.3f} (")
            assert row[-2:] == [accuracy.describe_threshold(result[name]), "1"]  # epoch
    places = (folder / "native-1", folder / "one-view-1" / "same")
    views = [json.loads(train_pvs.Run(place).scores.read_text())["config"] for place in places]
    assert [config["TTA_FLIPS"] for config in views] == ["windows", "none"]
    times = [file.stat().st_mtime_ns for file in files]
    assert accuracy.main(flags) == 0
    assert (work / "table.md").read_text() == text
    assert [file.stat().st_mtime_ns for file in files] == times


def test_other_scanner_has_other_voxels_and_intensities_and_as_much_pvs(tmp_path):
    image, label = heads.simulate_head(np.random.default_rng(0), (48, 56, 48))
    other, mask = heads.rescan(image, label, (0.8, 0.8, 0.8), np.random.default_rng(1))
    assert other.shape == mask.shape == (42, 49, 38)  # 48 * 0.8 / 0.9 = 42.7, 38.4 mm
    volumes = [label.sum() * 0.8**3, mask.sum() * 0.9 * 0.9]  # mm3
    assert volumes[1] == pytest.approx(volumes[0], rel=0.1)
    back = ndimage.zoom(other.astype(float), np.divide(image.shape, other.shape), order=1)
    assert 0.6 < np.corrcoef(image.ravel(), back.ravel())[0, 1] < 0.99


def test_speed_measures_each_kind_of_row_and_keeps_those_of_others(tmp_path):
    output = tmp_path / "docs" / "b.md"
    others = "## Another machine\n\n- Facts\n\n### step: a step\n\n| a | b |\n"
    train_pvs.write_file(output, f"{speed.INTRODUCTION}\n{others}")
    flags = ["--pairs", "1", "--device", "cpu", "--output", str(output), "--work", str(tmp_path)]
    flags += ["--shape", "40", "48", "40", "--patches", "32", "32"]
    assert speed.main(["--only", "epoch", "preparation", "inference", *flags]) == 0
    rows, sides = rows_of(output, "measured")[:-1], ["pipeline, cached", "pipeline", "pipeline"]
    sides += [*2 * ["every other window mirrored"], "openvino", "first run, empty cache"]
    assert [row[1].split(", 170")[0] for row in rows] == sides
    for *_, a, b, ratio, spread in rows:
        assert float(ratio.strip("*")) == pytest.approx(float(b) / float(a), rel=0.02)
        assert spread.endswith(", 1 pair")
    text = output.read_text()
    assert re.search(r"waits for batches in \d+\.\d %", text)
    assert (text.startswith(speed.INTRODUCTION), text.endswith(others)) == (True, True)


def test_accuracys_table_has_means_and_paired_differences_over_heads_and_seeds(tmp_path):
    def keep(row, *dices):  # of two heads for each of two seeds
        for seed in (1, 2):
            rows = [{"native_dice": d, "volume_ml_error_percent": -100 * d, "lesion_f1_any": 0.5}
                    for d in dices[2 * seed - 2 : 2 * seed]]  # fmt: skip
            best = accuracy.choose_threshold(2 * [[0.1, 0.2, 0.3, 0.42, 0.4, 0.4, 0.3, 0.2, 0.1]])
            result = {"same": {"subjects": rows} | best, "epochs": 7}
            path = tmp_path / "heads" / f"{row}-{seed}" / "result.json"
            accuracy.write_json(path, result | {"other": result["same"]})

    keep("published", 0.1, 0.2, 0.3, 0.2)
    keep("native", 0.5, 0.6, 0.8, 0.7)
    told = {"data": "heads", "length": "3 minutes", "heads": (7, 8, 9), "scans": "x"}
    accuracy.write_json(tmp_path / "heads" / "settings.json", told)
    accuracy.write_tables(tmp_path, tmp_path / "table.md")
    published, native = rows_of(tmp_path / "table.md", "recipe")[:2]
    # Differences -0.4, -0.4, -0.5, -0.5: the interval spans all means of drawn seeds and heads.
    assert published[1:4] == ["0.200 (0.100 to 0.300)", "0.500 (0.500 to 0.500)", "20 (10 to 30)"]
    end = ["0.100", "0.4 (+0.020), 0.4 (+0.020)", "7, 7"]
    assert published[4:] == ["-0.450 (-0.500 to -0.400)", "+0.000 (+0.000 to +0.000)", *end]
    assert [native[1][:7], *native[4:7]] == ["0.650 (", "", "", "0.200"]


def test_nnunet_learns_from_no_test_head_and_is_scored_on_the_scans_grid(accuracies, tmp_path):
    split = json.loads((accuracies[1] / "split.json").read_text())
    cases = train_pvs.find_cases(train_pvs.Config(DATA_DIR=str(accuracies[2] / "data")))
    nnunet.lay_out(cases, split, tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*/*"))
    assert names == [f"sub-00{n}{end}.nii.gz" for n in (1, 2, 3) for end in ("", "_0000")]
    label = np.asarray(nib.load(cases[-1].label).dataobj)

    def predict(image, properties, *_):  # it finds every voxel of the upper half
        prob = 0.6 * (label * (np.arange(label.shape[2]) >= 10)).transpose(2, 1, 0)
        assert image.shape == (1, *prob.shape)
        return prob > 0.5, np.stack([1 - prob, prob])

    reader = SimpleNamespace(read_images=lambda paths: (nib.load(paths[0]).get_fdata().T[None], {}))
    manager = SimpleNamespace(image_reader_writer_class=lambda: reader)
    predictor = SimpleNamespace(plans_manager=manager, predict_single_npy_array=predict)
    row, dices = nnunet.test_case(predictor, cases[-1])
    share = label[..., 10:].sum() / label.sum()
    assert row["native_dice"] == pytest.approx(2 * share / (1 + share))
    assert dices == pytest.approx(5 * [row["native_dice"]] + 4 * [0])  # above 0.1 to 0.9; 0.6
    assert row["volume_ml_error_percent"] == pytest.approx(100 * (share - 1))
