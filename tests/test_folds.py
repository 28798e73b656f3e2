"""Cross-validation, and several checkpoints that segment together."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import LEARNING, MACHINE, image_path, make_subjects, save_nifti, scores
from running import array_of, call, done, draw_nothing, refused, trained

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """Three folds over seven subjects: data, out, best (checkpoints), printed, tables."""
    folder = tmp_path_factory.mktemp("folds")
    data, out, printed, tables = make_subjects(folder / "data", 7), folder / "out", [], []
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        for fold in (1, 2, 3):
            flags = (*LEARNING, "--folds", 3, "--fold", fold)
            printed.append(trained(call("--data-dir", data, "--output-dir", out, *flags)))
            tables.append(json.loads((out / "cross_validation.json").read_text()))
    best = [out / f"fold-{fold}" / "checkpoints" / "best_model.pth" for fold in (1, 2, 3)]
    return SimpleNamespace(data=data, out=out, best=best, printed=printed, tables=tables)


def test_every_finished_fold_adds_its_subjects_to_one_table(folds):
    found = sorted(path.name for path in folds.out.iterdir())
    tables = ["cross_validation.csv", "cross_validation.json"]
    assert found == ["cache", *tables, "fold-1", "fold-2", "fold-3"]
    assert len(list((folds.out / "cache").iterdir())) == 7  # one a scan, for all folds
    finished = [(table["finished"], table["n"]) for table in folds.tables]
    assert finished == [([1], 3), ([1, 2], 5), ([1, 2, 3], 7)]
    assert folds.tables[-1]["config"]["FOLDS"] == 3
    last = folds.tables[-1]
    subjects = sorted(row["participant_id"] for row in last["subjects"])
    assert subjects == [f"sub-00{n}" for n in range(1, 8)]
    for row in last["subjects"]:
        own = scores(folds.out / f"fold-{row['fold']}")["subjects"]
        assert row in [{"fold": row["fold"]} | one for one in own]
    dices = [row["native_dice"] for row in last["subjects"]]
    assert last["native"]["dice"]["mean"] == pytest.approx(np.mean(dices))
    low, high = last["native"]["dice"]["ci95"]
    table = folds.printed[-1].split("Cross-validation, 3 of 3 folds finished")[1]
    assert [n for n in (np.mean(dices), low, high) if f"{n:.4f}" not in table] == []


def test_folds_of_other_settings_or_data_are_named_and_not_in_the_table(folds, tmp_path):
    place = shutil.copytree(folds.out, tmp_path / "out")
    path = place / "fold-2" / "logs" / "comprehensive_test_metrics.json"
    content = json.loads(path.read_text())
    for block, name, value, finished in (
        ("config", "DECODER_WIDTH", 9, [1, 3]),
        ("config", "THRESHOLD", 0.3, [1, 3]),
        (None, "data_set", "other", [1, 3]),
        (None, "subjects", [row | {"x": 1} for row in content["subjects"]], [1, 3]),
        ("config", "EPOCHS", 9, [1, 2, 3]),  # folds may be of different lengths
        ("config", "INIT_FROM", "first.pth", [1, 3]),  # only one begins with other weights
    ):
        changed = json.loads(json.dumps(content))
        (changed[block] if block else changed)[name] = value
        path.write_text(json.dumps(changed))
        out = done(call("--evaluate", "--folds", 3, "--fold", 1, "--output-dir", place, *MACHINE))
        table = json.loads((place / "cross_validation.json").read_text())
        assert table["finished"] == finished, name
        assert bool(re.search(f"Warning: .*{path}", out)) == (finished == [1, 3]), name


def test_folds_share_a_working_grid_where_scans_differ(tmp_path, run):
    for path in make_subjects(tmp_path / "data", 6).rglob("*.nii.gz"):
        side = 1 + 0.1 * int(path.name[4:7])
        save_nifti(path, array_of(path), np.diag([side, side, side, 1]))
    flags = ["--check", "--pix-dim", 0, 0, 0, "--folds", 3, "--val-fraction", 0.3]
    printed = [run(*flags, "--fold", fold)[1] for fold in (1, 2, 3)]
    grids = [line for out in printed for line in out.splitlines() if line.startswith("Grid ")]
    # The median of 1.1, 1.2, 1.3, 1.4, 1.5 and 1.6 mm.
    assert grids == 3 * ["Grid            working grid, RAS, 1.35 x 1.35 x 1.35 mm"]


def test_several_checkpoints_give_the_mean_of_their_probabilities(folds, tmp_path):
    one, two = folds.best[:2]
    probs, changed = {}, []
    for number, (path, threshold) in enumerate(((one, 0.2), (two, 0.6))):
        content = torch.load(path, weights_only=True)
        content["config"] |= {"THRESHOLD": threshold, "SMALLEST_PVS": 2.0 + 4 * number}
        changed.append(tmp_path / f"{number}.pth")
        torch.save(content, changed[-1])
    # In two pairs: what decides comes from the files, or from the flag.
    for name, files in {"1": [one], "11": [one, one], "2": [two], "12": changed}.items():
        flags = ("--output-dir", tmp_path / name, *MACHINE, "--save-probabilities")
        scan = image_path(folds.data, "sub-001")
        out = done(call("--predict", scan, "--checkpoint", *files, *flags))
        assert out.count("Weights         epoch ") == len(files)
        probs[name] = array_of(next((tmp_path / name).rglob("*_probseg.nii.gz")))
    assert abs(probs["1"] - probs["2"]).max() > 0.01
    np.testing.assert_array_equal(probs["11"], probs["1"])
    np.testing.assert_allclose(probs["12"], (probs["1"] + probs["2"]) / 2, atol=1e-6)
    described = (tmp_path / "12" / "predictions" / "dataset_description.json").read_text()
    assert re.search("above 0.4, without .* 4 mm3", described)  # their means


def test_checkpoints_of_different_networks_are_told_by_what_differs(folds, tmp_path):
    content = torch.load(folds.best[1], weights_only=True)
    content["config"] |= {"DECODER_WIDTH": 3, "PIX_DIM": (1, 1, 2)}
    content["config"] |= {"TTA_FLIPS": True, "FLIP_AXES": "x"}  # as checkpoints once had it
    one, other = folds.best[0], tmp_path / "other.pth"
    torch.save(content, other)
    flags = ["--output-dir", tmp_path / "out", *MACHINE]
    scan = image_path(folds.data, "sub-001")
    err = refused(call("--predict", scan, "--checkpoint", one, other, *flags), one, other)
    assert set(re.findall("[A-Z]+_[A-Z]+", err)) == {"DECODER_WIDTH", "PIX_DIM", "TTA_FLIPS"}
    content["config"] |= {"DECODER_WIDTH": 2, "PIX_DIM": (1, 1, 1), "FLIP_AXES": "y"}
    for path, axes in ((other, "y"), (tmp_path / "another.pth", "x")):  # one was not mirrored so
        torch.save(content | {"config": content["config"] | {"FLIP_AXES": axes}}, path)
    err = refused(call("--predict", scan, "--checkpoint", other, path, *flags), other, path)
    assert set(re.findall("[A-Z]+_[A-Z]+", err)) == {"FLIP_AXES"}
    assert not (tmp_path / "out").exists()


def test_ensemble_is_tested_on_scans_that_none_of_its_parts_knows(folds, tmp_path):
    flags = ["--output-dir", tmp_path / "fold-1", *MACHINE, "--checkpoint", *folds.best]
    refused(call("--evaluate", "--data-dir", folds.data, *flags), "none is left")
    other = make_subjects(tmp_path / "other", 2, seed=20)
    done(call("--evaluate", "--data-dir", other, *flags))
    content = scores(tmp_path / "fold-1")
    assert [row["file"] for row in content["checkpoint"]] == list(map(str, folds.best))
    assert content["n"] == 2
    assert not (tmp_path / "cross_validation.json").exists()  # an external test is none
    scans = ("--predict", image_path(folds.data, "sub-001"))
    refused(call(*scans, *flags), "fold-1: has the results of a test", "--overwrite")
