"""Cross-validation, and several checkpoints that segment together."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

import train_pvs
from conftest import image_path, label_path, make_subject, save_nifti
from test_predict import LEARNING, MACHINE, TINY, call, write_title

FOLDS = 3


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(train_pvs, "write_figure", write_title)


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """Three folds over seven subjects; returns their folder and what the last one printed."""
    folder = tmp_path_factory.mktemp("folds")
    for number in range(1, 8):
        make_subject(folder / "data", f"sub-{number:03d}", seed=number)
    printed, tables = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pvs, "write_figure", write_title)
        for fold in range(1, FOLDS + 1):
            flags = ["--data-dir", folder / "data", "--output-dir", folder / "out", *TINY]
            flags += [*LEARNING, "--folds", FOLDS, "--fold", fold]
            status, out, err = call(*flags)
            assert status in (0, 1), err
            printed.append(out)
            tables.append(json.loads((folder / "out" / "cross_validation.json").read_text()))
    return folder, printed, tables


def checkpoint(folder, fold):
    return folder / "out" / f"fold-{fold}" / "checkpoints" / "best_model.pth"


@pytest.mark.parametrize("count", [5, 7, 12])
@pytest.mark.parametrize("number", [2, 5])
def test_folds_test_every_subject_once_and_share_none(count, number, tiny_config):
    cases = [{"subject": f"sub-{n:03d}"} for n in range(count)]
    tested = []
    for fold in range(1, number + 1):
        split = train_pvs.split_cases(cases, tiny_config(FOLDS=number, FOLD=fold))
        parts = [[case["subject"] for case in part] for part in split.values()]
        assert min(map(len, parts)) > 0
        assert sorted(s for part in parts for s in part) == [case["subject"] for case in cases]
        tested += parts[2]
    assert sorted(tested) == [case["subject"] for case in cases]


def test_folds_are_of_subjects_and_not_of_scans(tiny_config):
    cases = [{"subject": f"sub-{n // 2}", "name": f"sub-{n // 2}_ses-{n % 2}"} for n in range(12)]
    split = train_pvs.split_cases(cases, tiny_config(FOLDS=3, FOLD=1))
    assert sorted(len(part) % 2 for part in split.values()) == [0, 0, 0]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--folds 1 --fold 1", "FOLDS: expected 2 or more, or 0, got 1"),
        ("--folds 5", "FOLD: expected a number from 1 to FOLDS"),
        ("--folds 5 --fold 6", "FOLD: expected a number from 1 to FOLDS"),
        ("--fold 1", "FOLD: expected a number from 1 to FOLDS"),
        ("--folds five --fold 1", "FOLDS: expected whole numbers from 0 to 1000, got five"),
        ("--folds 5 --fold one", "FOLD: expected whole numbers from 0 to 1000, got one"),
        (f"--folds 5 --fold 1 --split {__file__}", "SPLIT: expected none together with FOLDS"),
    ],
)
def test_impossible_folds_are_named(flags, problem, run):
    status, _, err = run("--check", *flags.split())
    assert status == 2
    assert f"  {problem}" in err


def test_more_folds_than_subjects_are_refused(data, run):
    status, _, err = run("--check", "--folds", 5, "--fold", 1)
    assert status == 2
    assert "expected at least 3 subjects with a mask, no fewer than FOLDS" in err


def test_folds_have_folders_of_their_own_and_one_cache(folds):
    folder, *_ = folds
    found = {path.name for path in (folder / "out").iterdir()}
    names = {f"fold-{fold}" for fold in range(1, FOLDS + 1)}
    assert found == {*names, ".lock", "cache", "cross_validation.json", "cross_validation.csv"}
    assert len(list((folder / "out" / "cache").iterdir())) == 7


def test_every_finished_fold_adds_its_subjects_to_one_table(folds):
    folder, printed, tables = folds
    assert [table["finished"] for table in tables] == [[1], [1, 2], [1, 2, 3]]
    assert [table["n"] for table in tables] == [3, 5, 7]
    last = tables[-1]
    assert sorted(row["subject"] for row in last["subjects"]) == [f"sub-00{n}" for n in range(1, 8)]
    for row in last["subjects"]:
        path = folder / "out" / f"fold-{row['fold']}" / "logs" / "comprehensive_test_metrics.json"
        own = {s["subject"]: s for s in json.loads(path.read_text())["subjects"]}
        assert row == {"fold": row["fold"]} | own[row["subject"]]
    dices = [row["native_dice"] for row in last["subjects"]]
    assert last["native"]["dice"]["mean"] == pytest.approx(np.mean(dices))
    low, high = last["native"]["dice"]["ci95"]
    assert low <= np.mean(dices) <= high
    with open(folder / "out" / "cross_validation.csv", newline="") as file:
        assert [float(row["native_dice"]) for row in csv.DictReader(file)] == dices
    assert "Cross-validation, 3 of 3 folds finished" in printed[-1]
    assert f" native Dice {np.mean(dices):8.4f} (95 % from {low:.4f} to {high:.4f})" in printed[-1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("SEED", 9), ("DECODER_WIDTH", 9), ("THRESHOLD", 0.3), ("TTA_FLIPS", True), (None, "other")],
)
def test_folds_of_other_settings_or_data_are_named_and_not_in_the_table(
    name, value, folds, tmp_path, messages
):
    folder, *_ = folds
    shutil.copytree(folder / "out", tmp_path / "out")
    path = tmp_path / "out" / "fold-2" / "logs" / "comprehensive_test_metrics.json"
    content = json.loads(path.read_text())
    (content["config"] if name else content)[name or "data_set"] = value
    path.write_text(json.dumps(content))
    flags = ["--data-dir", folder / "data", "--output-dir", tmp_path / "out", *TINY, *LEARNING]
    flags += ["--folds", FOLDS, "--fold", 1]
    cfg, _ = train_pvs.parse_command_line(list(map(str, flags)))
    assert list(train_pvs.write_cross_validation(cfg)[1]) == [1, 3]
    assert f"not in the cross-validation, of other settings or data: {path}" in messages.text


def test_folds_of_the_time_before_a_setting_are_those_of_its_default(folds, tmp_path):
    folder, *_ = folds
    shutil.copytree(folder / "out", tmp_path / "out")
    path = tmp_path / "out" / "fold-2" / "logs" / "comprehensive_test_metrics.json"
    content = json.loads(path.read_text())
    del content["config"]["EMA_DECAY"], content["config"]["INTENSITY_PERCENTILES"]
    path.write_text(json.dumps(content))
    flags = ["--data-dir", folder / "data", "--output-dir", tmp_path / "out", *TINY, *LEARNING]
    cfg, _ = train_pvs.parse_command_line([*map(str, flags), "--folds", str(FOLDS), "--fold", "1"])
    assert list(train_pvs.write_cross_validation(cfg)[1]) == [1, 2, 3]


def test_fold_that_is_given_up_leaves_the_table(folds, tmp_path, monkeypatch):
    folder, *_ = folds
    shutil.copytree(folder / "out", tmp_path / "out")

    def fit(*_):
        raise FloatingPointError("the loss became nan")

    monkeypatch.setattr(train_pvs, "fit", fit)
    notes = tmp_path / "out" / "cross_validation.xlsx"
    notes.touch()
    flags = ["--data-dir", folder / "data", "--output-dir", tmp_path / "out", *TINY, *LEARNING]
    assert call(*flags, "--folds", FOLDS, "--fold", 2, "--overwrite")[0] == 1
    assert list((tmp_path / "out").glob("cross_validation.*")) == [notes]  # not the script's


def test_external_test_of_a_fold_is_no_cross_validation(folds, tmp_path):
    folder, *_ = folds
    for number in range(1, 3):
        make_subject(tmp_path / "other", f"sub-{number:03d}", seed=20 + number)
    flags = ["--data-dir", tmp_path / "other", "--output-dir", tmp_path / "fold-1", *MACHINE]
    status, _, err = call("--evaluate", *flags, "--checkpoint", checkpoint(folder, 1))
    assert status == 0, err
    assert not (tmp_path / "cross_validation.json").exists()


def test_folds_share_a_working_grid_where_scans_differ(tmp_path, run):
    for number in range(1, 7):
        make_subject(tmp_path / "data", f"sub-{number:03d}", seed=number)
        for path in (image_path, label_path):
            file, side = path(tmp_path / "data", f"sub-{number:03d}"), 1 + 0.1 * number
            data = np.asarray(nib.load(file).dataobj)
            save_nifti(file, data, np.diag([side, side, side, 1]))
    flags = ["--check", "--pix-dim", 0, 0, 0, "--folds", 3, "--val-fraction", 0.3]
    printed = [run(*flags, "--fold", fold)[1] for fold in (1, 2, 3)]
    grids = [line for out in printed for line in out.splitlines() if line.startswith("Grid ")]
    assert grids == 3 * ["Grid            working grid, RAS, 1.35 x 1.35 x 1.35 mm"]


# --------------------------------------------------------------------------------------- ensembles


@pytest.fixture
def predict(folds, tmp_path):
    """Segment a scan with some checkpoints; returns the probability that was written."""
    folder, *_ = folds

    def start(*checkpoints):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        flags = ["--output-dir", out, *MACHINE, "--save-probabilities"]
        scan = image_path(folder / "data", "sub-001")
        status, _, err = call("--predict", scan, "--checkpoint", *checkpoints, *flags)
        assert status == 0, err
        (path,) = out.rglob("*_probseg.nii.gz")
        return np.asarray(nib.load(path).dataobj)

    return start


def test_two_equal_checkpoints_equal_one_and_two_others_their_mean(folds, predict):
    one, two = checkpoint(folds[0], 1), checkpoint(folds[0], 2)
    first, second = predict(one), predict(two)
    np.testing.assert_array_equal(predict(one, one), first)
    assert abs(first - second).max() > 0.01
    np.testing.assert_allclose(predict(one, two), (first + second) / 2, atol=1e-6)


def test_ensemble_decides_by_the_mean_of_its_thresholds(folds, tmp_path):
    folder, *_ = folds
    paths = [tmp_path / f"{number}.pth" for number in (1, 2)]
    for path, threshold, smallest in zip(paths, (0.2, 0.6), (1.0, 4.0), strict=True):
        content = torch.load(checkpoint(folder, 1), weights_only=True)
        content["config"] |= {"THRESHOLD": threshold, "SMALLEST_PVS": smallest}
        torch.save(content, path)
    contents = [train_pvs.read_checkpoint(path) for path in paths]
    cfg = train_pvs.restore_configs(paths, contents, train_pvs.Config(), {})
    assert round(cfg.THRESHOLD, 9) == 0.4
    assert cfg.SMALLEST_PVS == 2.5
    here = train_pvs.replace(train_pvs.Config(), THRESHOLD=0.3)
    given = train_pvs.restore_configs(paths, contents, here, {"THRESHOLD": 0.3})
    assert given.THRESHOLD == 0.3
    assert given.SMALLEST_PVS == 2.5


def test_ensemble_of_one_is_the_network_itself(tiny_config):
    cfg = tiny_config()
    image = torch.rand(1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    entry = {"image": image, "affine": torch.eye(4), "native_affine": torch.eye(4)}
    entry["native_shape"] = (24, 24, 24)
    model = train_pvs.build_model(cfg)
    alone = train_pvs.predict_case(model, entry, cfg)
    listed = train_pvs.predict_case(torch.nn.ModuleList([model]), entry, cfg)
    for one, two in zip(alone, listed, strict=True):
        np.testing.assert_array_equal(one, two)


def test_folds_that_know_the_scans_are_not_tested_on_them(folds, tmp_path):
    folder, *_ = folds
    flags = ["--data-dir", folder / "data", "--output-dir", tmp_path / "out", *MACHINE]
    both = [checkpoint(folder, fold) for fold in (1, 2)]
    status, _, err = call("--evaluate", *flags, "--checkpoint", *both)
    assert status == 2
    assert "holds scans that some of the checkpoints were trained with, and none that all" in err


def test_ensemble_is_scored_on_other_scans_and_all_its_files_are_named(folds, tmp_path):
    folder, *_ = folds
    for number in range(1, 3):
        make_subject(tmp_path / "other", f"sub-{number:03d}", seed=20 + number)
    flags = ["--data-dir", tmp_path / "other", "--output-dir", tmp_path / "out", *MACHINE]
    both = [checkpoint(folder, fold) for fold in (1, 2)]
    status, out, err = call("--evaluate", *flags, "--checkpoint", *both)
    assert status == 0, err
    assert out.count("Weights         epoch ") == 2
    metrics = tmp_path / "out" / "logs" / "comprehensive_test_metrics.json"
    content = json.loads(metrics.read_text())
    assert [row["file"] for row in content["checkpoint"]] == list(map(str, both))
    assert content["n"] == 2


def test_checkpoints_of_different_networks_are_told_by_what_differs(folds, tmp_path):
    folder, *_ = folds
    content = torch.load(checkpoint(folder, 2), weights_only=True)
    content["config"] |= {"DECODER_WIDTH": 3, "PIX_DIM": (1, 1, 2), "TTA_FLIPS": True}
    other = tmp_path / "other.pth"
    torch.save(content, other)
    scan = image_path(folder / "data", "sub-001")
    flags = ["--output-dir", tmp_path / "out", *MACHINE]
    one = checkpoint(folder, 1)
    status, _, err = call("--predict", scan, "--checkpoint", one, other, *flags)
    assert status == 2
    assert "Error: checkpoints that do not go together:\n" in err
    assert f"  DECODER_WIDTH: {one} has 2, {other} has 3\n" in err
    assert f"  PIX_DIM: {one} has (1, 1, 1), {other} has (1, 1, 2)\n" in err
    assert f"  TTA_FLIPS: {one} has False, {other} has True\n" in err
