"""The commands --predict and --evaluate with the weights of one small run."""

import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import train_pvs
from conftest import TINY, image_path, label_path, make_subject, save_nifti

# BatchNorm that keeps up with the last batch and a fast start: four epochs find some of the PVS.
LEARNING = "--epochs 4 --lr 3e-3 --batchnorm-momentum 1 --test-fraction 0.5 --no-amp".split()
MACHINE = "--device cpu --no-amp --num-workers 0".split()
MASK = "_label-PVS_desc-unetpp_mask.nii.gz"
PROBABILITY = "_label-PVS_desc-unetpp_probseg.nii.gz"


def write_title(path, figure, title):
    """Stand in for `write_figure`, which takes most of the time: tested on its own."""
    train_pvs.plt.close(figure)
    train_pvs.write_file(path, title)


def call(*argv):
    """Call main; return (status, stdout, stderr)."""
    screen, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
        try:
            status = train_pvs.main([str(word) for word in argv])
        except SystemExit as error:  # argparse's own
            status = error.code
    return status, screen.getvalue(), errors.getvalue()


def snapshot(folder):
    """Return the content of every file below a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run over four subjects, two of them for the test; nothing may change it."""
    folder = tmp_path_factory.mktemp("finished")
    for number in range(1, 5):
        make_subject(folder / "data", f"sub-{number:03d}", seed=number)
    flags = ["--data-dir", folder / "data", "--output-dir", folder / "out", *TINY, *LEARNING]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pvs, "write_figure", write_title)
        status, _, errors = call(*flags)
    assert status == 0, errors
    metrics = folder / "out" / "logs" / "comprehensive_test_metrics.json"
    return SimpleNamespace(
        data=folder / "data",
        out=folder / "out",
        checkpoint=folder / "out" / "checkpoints" / "best_model.pth",
        metrics=json.loads(metrics.read_text()),
        split=json.loads((folder / "out" / "logs" / "split.json").read_text()),
    )


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(train_pvs, "write_figure", write_title)


@pytest.fixture
def copy(finished, tmp_path):
    """The run and its data in folders that a test may change."""
    shutil.copytree(finished.out, tmp_path / "run")
    shutil.copytree(finished.data, tmp_path / "data")
    return SimpleNamespace(out=tmp_path / "run", data=tmp_path / "data")


@pytest.fixture
def predict(finished, tmp_path):
    """Call --predict with the run's weights, results in `out`; returns (status, stdout, stderr)."""
    flags = ("--checkpoint", finished.checkpoint, "--output-dir", tmp_path / "out", *MACHINE)
    return lambda *words: call("--predict", *words, *flags)


@pytest.fixture
def evaluate(finished, tmp_path):
    """Call --evaluate with the run's weights, results in `out`."""
    flags = ("--checkpoint", finished.checkpoint, "--output-dir", tmp_path / "out", *MACHINE)
    return lambda *words: call("--evaluate", *words, *flags)


def head(shape=(24, 28, 20)):
    """Return the scan of a subject with its bright tubes, int16."""
    rng = np.random.default_rng(7)
    ticks = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    image = np.where(sum(axis**2 for axis in ticks) < 0.8, 400, 5) + rng.normal(0, 10, shape)
    x, y, z = (n // 2 for n in shape)
    image[x : x + 2, y : y + 2, z - 4 : z + 4] += 400
    return np.clip(image, 0, None).astype(np.int16)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def masks_below(folder):
    return sorted(str(p.relative_to(folder / "predictions")) for p in folder.rglob(f"*{MASK}"))


# ----------------------------------------------------------------------------------------- predict


def test_file_outside_of_any_bids_folder_with_an_odd_name_is_segmented(predict, tmp_path):
    # Of the name the letters A to Z and digits stay.
    scan = save_nifti(tmp_path / "für Prüfung" / "Köpfchen [T2] (2) ü.nii.gz", head())
    status, out, err = predict(scan)
    assert (status, err) == (0, "")
    assert "1 of 1 scans are segmented" in out
    assert masks_below(tmp_path / "out") == [f"sub-KpfchenT22/anat/sub-KpfchenT22{MASK}"]
    mask = nib.load(next((tmp_path / "out").rglob(f"*{MASK}")))
    assert mask.shape == (24, 28, 20)
    assert set(np.unique(mask.dataobj)) == {0, 1}
    assert (tmp_path / "out" / "multi_plane" / "sub-KpfchenT22.png").exists()
    assert rows_of(tmp_path / "out" / "logs" / "participants_pvs.csv")[0]["scan"] == str(scan)


def test_bids_folder_without_derivatives_is_segmented_with_and_without_sessions(predict, tmp_path):
    names = (
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_T2w.nii",
        "sub-02/ses-b/anat/sub-02_ses-b_run-1_T2w.nii.gz",
    )
    for name in names:
        save_nifti(tmp_path / "bids" / name, head())
    save_nifti(tmp_path / "bids" / "sub-01/anat/sub-01_T1w.nii.gz", head())  # another contrast
    before = snapshot(tmp_path / "bids")
    status, out, err = predict(tmp_path / "bids")
    assert (status, err) == (0, "")
    assert "3 to segment" in out
    assert masks_below(tmp_path / "out") == [
        f"sub-01/anat/sub-01{MASK}",
        f"sub-02/ses-a/anat/sub-02_ses-a{MASK}",
        f"sub-02/ses-b/anat/sub-02_ses-b_run-1{MASK}",
    ]
    rows = rows_of(tmp_path / "out" / "logs" / "participants_pvs.csv")
    assert [row["participant_id"] for row in rows] == ["sub-01", "sub-02", "sub-02"]
    assert [row["name"] for row in rows] == ["sub-01", "sub-02_ses-a", "sub-02_ses-b_run-1"]
    assert snapshot(tmp_path / "bids") == before


def test_image_glob_chooses_the_scans_of_a_folder(predict, tmp_path):
    for suffix in ("T2w", "FLAIR"):
        save_nifti(tmp_path / "bids" / f"sub-1/anat/sub-1_{suffix}.nii.gz", head())
    status, _, err = predict(tmp_path / "bids", "--image-glob", "sub-*/anat/*_FLAIR.nii.gz")
    assert (status, err) == (0, "")
    rows = rows_of(tmp_path / "out" / "logs" / "participants_pvs.csv")
    assert [Path(row["scan"]).name for row in rows] == ["sub-1_FLAIR.nii.gz"]


def write_bad_scans(folder):
    """Write a 4D, a truncated, a text and a non-finite scan; return their paths."""
    bad = {name: folder / f"{name}.nii.gz" for name in ("film", "short", "text", "hole")}
    save_nifti(bad["film"], np.stack([head()] * 2, -1))
    whole = save_nifti(bad["short"], head()).read_bytes()
    bad["short"].write_bytes(whole[: len(whole) // 2])
    bad["text"].write_text("this is no scan\n")
    hole = head().astype(np.float32)
    hole[3, 4, 5] = np.nan
    save_nifti(bad["hole"], hole)
    return [*bad.values()]


def test_bad_scans_among_good_ones_are_named_and_the_good_ones_done(predict, tmp_path):
    bad = write_bad_scans(tmp_path)
    good = [save_nifti(tmp_path / f"{name}.nii.gz", head()) for name in ("first", "last")]
    status, out, err = predict(good[0], *bad, good[1])
    assert status == 1
    assert "Traceback" not in out + err
    assert len(err.splitlines()) == 4
    for path, line in zip(bad, err.splitlines(), strict=True):
        assert str(path) in line
    for path in good:
        assert str(path) not in err
    assert masks_below(tmp_path / "out") == [
        f"sub-{name}/anat/sub-{name}{MASK}" for name in ("first", "last")
    ]
    assert "2 of 6 scans are segmented" in out
    rows = rows_of(tmp_path / "out" / "logs" / "participants_pvs.csv")
    assert [row["scan"] for row in rows] == [str(path) for path in good]


def test_only_bad_scans_end_with_status_1_and_no_masks(predict, tmp_path):
    bad = write_bad_scans(tmp_path)
    status, out, err = predict(*bad)
    assert status == 1
    assert "Traceback" not in out + err
    assert all(str(path) in err for path in bad)
    assert "0 of 4 scans are segmented" in out
    assert masks_below(tmp_path / "out") == []


def test_trailing_axis_of_length_1_is_kept(predict, tmp_path):
    plain, trailing = (tmp_path / name / "s.nii.gz" for name in ("plain", "trailing"))
    save_nifti(plain, head())
    save_nifti(trailing, head()[..., None])
    masks = []
    for scan in (plain, trailing):
        status, _, err = predict(scan, "--overwrite")
        assert (status, err) == (0, "")
        masks.append(np.asarray(nib.load(next((tmp_path / "out").rglob(f"*{MASK}"))).dataobj))
    assert masks[0].shape == (24, 28, 20)
    assert masks[1].shape == (24, 28, 20, 1)
    assert np.array_equal(masks[0], masks[1][..., 0])
    assert masks[0].any()


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("a/my scan.nii", "b/my_scan.nii.gz", "sub-myscan"),
        ("a/sub-1_ses-2_T2w.nii.gz", "b/sub-1_ses-2_FLAIR.nii.gz", "sub-1_ses-2"),
    ],
)
def test_scans_of_one_output_name_are_refused_before_any_work(
    first, second, name, predict, tmp_path
):
    good = save_nifti(tmp_path / "other.nii.gz", head())
    paths = [save_nifti(tmp_path / path, head()) for path in (first, second)]
    status, _, err = predict(good, *paths)
    assert status == 2
    assert all(str(path) in err for path in paths)
    assert f"both would give {name}\n" in err
    assert str(good) not in err
    assert not (tmp_path / "out").exists()


def test_scan_named_twice_is_refused(predict, tmp_path):
    save_nifti(tmp_path / "bids/sub-1/anat/sub-1_T2w.nii.gz", head())
    scan = tmp_path / "bids/sub-1/anat/sub-1_T2w.nii.gz"
    status, _, err = predict(tmp_path / "bids", scan)
    assert status == 2
    assert err.count(str(scan)) == 2
    assert not (tmp_path / "out").exists()


def test_all_words_that_are_no_scans_are_told_in_one_message(predict, tmp_path):
    good, text = save_nifti(tmp_path / "good.nii.gz", head()), tmp_path / "notes.txt"
    text.write_text("notes")
    (tmp_path / "empty").mkdir()
    nameless = save_nifti(tmp_path / "äöü.nii.gz", head())
    bad = [text, tmp_path / "missing.nii.gz", tmp_path / "empty", nameless]
    status, _, err = predict(good, *bad)
    assert status == 2
    assert "4 problems" in err
    for path in bad:
        assert str(path) in err
    assert str(good) not in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_prediction_of_a_test_scan_is_the_tests_own_mask_byte_for_byte(predict, finished, tmp_path):
    subject = finished.split["test"][0]
    status, _, err = predict(image_path(finished.data, subject))
    assert (status, err) == (0, "")
    name = Path("predictions") / subject / "anat" / f"{subject}{MASK}"
    assert (tmp_path / "out" / name).read_bytes() == (finished.out / name).read_bytes()
    mask = np.asarray(nib.load(finished.out / name).dataobj)
    assert 0 < mask.mean() < 0.5  # nothing and everything would be equal for any weights


def test_participants_table_counts_what_is_in_the_masks(predict, tmp_path):
    # 0.5 x 0.8 x 1.5 mm are 0.6 mm3 or 0.0006 ml a voxel.
    affine = np.array([[0, -0.8, 0, 9], [0.5, 0, 0, -3], [0, 0, 1.5, 1], [0, 0, 0, 1.0]])
    scans = [
        save_nifti(tmp_path / "sub-1_ses-2_T2w.nii.gz", head((40, 30, 16)), affine),
        save_nifti(tmp_path / "plain.nii", head()),
    ]
    status, out, err = predict(*scans)
    assert (status, err) == (0, "")
    rows = rows_of(tmp_path / "out" / "logs" / "participants_pvs.csv")
    assert [row["participant_id"] for row in rows] == ["sub-1", "sub-plain"]
    assert [row["name"] for row in rows] == ["sub-1_ses-2", "sub-plain"]
    for row, scan, voxel_ml in zip(rows, scans, (0.0006, 0.001), strict=True):
        assert row["scan"] == str(scan)
        mask = np.asarray(nib.load(tmp_path / "out" / row["mask"]).dataobj)
        count = ndimage.label(mask, np.ones((3, 3, 3)))[1]
        assert count > 0
        assert int(row["count"]) == count
        assert float(row["volume_ml"]) == pytest.approx(mask.sum() * voxel_ml)
        assert f"{row['name']}: {count} PVS, {mask.sum() * voxel_ml:.3f} ml" in out


def test_results_are_refused_a_second_time_and_replaced_with_overwrite(predict, tmp_path):
    first, second = (
        save_nifti(tmp_path / name, head()) for name in ("first.nii.gz", "second.nii.gz")
    )
    assert predict(first)[0] == 0
    before = snapshot(tmp_path / "out")
    status, _, err = predict(second)
    assert status == 2
    assert str(tmp_path / "out") in err
    assert "--overwrite" in err
    assert snapshot(tmp_path / "out") == before
    (tmp_path / "out" / "multi_plane" / "notes.txt").write_text("mine")
    assert predict(second, "--overwrite")[0] == 0
    assert masks_below(tmp_path / "out") == [f"sub-second/anat/sub-second{MASK}"]
    rows = rows_of(tmp_path / "out" / "logs" / "participants_pvs.csv")
    assert [row["name"] for row in rows] == ["sub-second"]
    pictures = [path.name for path in (tmp_path / "out" / "multi_plane").iterdir()]
    assert sorted(pictures) == ["notes.txt", "sub-second.png"]


def test_prediction_leaves_the_training_run_alone(copy, tmp_path):
    scan, before = save_nifti(tmp_path / "scan.nii.gz", head()), snapshot(copy.out)
    status, out, err = call("--predict", scan, "--output-dir", copy.out, "--overwrite", *MACHINE)
    assert (status, err) == (0, "")
    assert str(copy.out / "predict") in out
    assert masks_below(copy.out / "predict") == [f"sub-scan/anat/sub-scan{MASK}"]
    after = snapshot(copy.out)
    assert {name: after[name] for name in before} == before
    assert {name.parts[0] for name in set(after) - set(before)} == {"predict"}


def test_without_a_checkpoint_the_user_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no default output folder here
    scan = save_nifti(tmp_path / "scan.nii.gz", head())
    for command in (["--predict", scan], ["--evaluate", "--data-dir", tmp_path]):
        status, _, err = call(*command, "--output-dir", tmp_path / "none", *MACHINE)
        assert status == 2
        assert str(Path(tmp_path, "none", "checkpoints", "best_model.pth")) in err
        assert "train first" in err
        assert "--checkpoint" in err
        assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_checkpoint_of_the_default_folder_is_taken_where_the_output_folder_has_none(
    finished, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    default = tmp_path / train_pvs.Config.OUTPUT_DIR / "checkpoints" / "best_model.pth"
    default.parent.mkdir(parents=True)
    shutil.copy(finished.checkpoint, default)
    scan = save_nifti(tmp_path / "scan.nii.gz", head())
    status, out, err = call("--predict", scan, "--output-dir", "new", *MACHINE)
    assert (status, err) == (0, "")
    assert f"checkpoint {default.relative_to(tmp_path)}" in out
    assert masks_below(tmp_path / "new") == [f"sub-scan/anat/sub-scan{MASK}"]


def test_damaged_checkpoint_is_named_before_any_work(tmp_path):
    scan, weights = save_nifti(tmp_path / "scan.nii.gz", head()), tmp_path / "weights.pth"
    weights.write_bytes(b"no weights")
    flags = ("--checkpoint", weights, "--output-dir", tmp_path / "out")
    status, _, err = call("--predict", scan, *flags, *MACHINE)
    assert status == 2
    assert str(weights) in err
    assert not (tmp_path / "out").exists()


def test_probabilities_are_saved_beside_the_masks_that_they_give(predict, tmp_path):
    affine = np.diag([-1, 1, 1, 1.0])
    scan = save_nifti(tmp_path / "sub-1_T2w.nii.gz", head(), affine)
    status, _, err = predict(scan, "--save-probabilities")
    assert (status, err) == (0, "")
    folder = tmp_path / "out" / "predictions" / "sub-1" / "anat"
    prob, mask = (nib.load(folder / f"sub-1{suffix}") for suffix in (PROBABILITY, MASK))
    assert (prob.get_data_dtype(), mask.get_data_dtype()) == (np.float32, np.uint8)
    assert np.array_equal(prob.affine, affine)
    values = np.asarray(prob.dataobj)
    assert values.shape == (24, 28, 20)
    assert 0 <= values.min() < 0.1 < 0.9 < values.max() <= 1
    assert np.array_equal(values > 0.5, np.asarray(mask.dataobj) > 0)


def test_settings_of_the_training_are_refused_where_they_differ(predict, tmp_path):
    scan = save_nifti(tmp_path / "scan.nii.gz", head())
    status, _, err = predict(scan, "--pix-dim", 1, 1, 2, "--decoder-width", 8, "--lr", "3e-3")
    assert status == 2
    assert "PIX_DIM: the checkpoint has" in err
    assert "DECODER_WIDTH: the checkpoint has 2" in err
    assert "LR:" not in err
    assert not (tmp_path / "out").exists()


def test_evaluate_and_predict_exclude_each_other():
    status, _, err = call("--evaluate", "--predict", "scan.nii.gz")
    assert status == 2
    assert "not allowed with" in err


def test_checkpoint_without_evaluate_or_predict_is_refused(finished, tmp_path):
    status, _, err = call("--checkpoint", finished.checkpoint, "--output-dir", tmp_path / "out")
    assert status == 2
    assert "--checkpoint: expected together with" in err
    assert not (tmp_path / "out").exists()


def test_prediction_draws_a_real_picture(predict, tmp_path, monkeypatch):
    monkeypatch.undo()
    assert predict(save_nifti(tmp_path / "scan.nii.gz", head()))[0] == 0
    picture = (tmp_path / "out" / "multi_plane" / "sub-scan.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------- evaluate


def scores(out):
    """Return the content of a run's metrics file without its date."""
    content = json.loads((out / "logs" / "comprehensive_test_metrics.json").read_text())
    del content["date"]
    return content


def test_evaluation_gives_the_scores_and_files_of_the_test_again(copy, finished):
    expected, before = scores(copy.out), snapshot(copy.out)
    kept = ("checkpoints", "training_history.json", "split.json", "train.log")
    for path in (p for p in copy.out.rglob("*") if p.is_file()):
        if path.name not in kept and path.parent.name not in kept:
            path.unlink()
    status, out, err = call("--evaluate", "--output-dir", copy.out, *MACHINE)
    assert (status, err) == (0, "")
    assert "2 of the test split" in out
    got = scores(copy.out)
    # The one setting that is not the checkpoint's and is other here: this copy's folder.
    assert got["config"].pop("OUTPUT_DIR") == str(copy.out)
    assert expected["config"].pop("OUTPUT_DIR") == str(finished.out)
    weights = [content["checkpoint"].pop("file") for content in (got, expected)]
    assert weights == [str(o / "checkpoints" / "best_model.pth") for o in (copy.out, finished.out)]
    assert got == expected
    after = snapshot(copy.out)
    assert set(before) <= set(after)
    for name in before:
        if name.parts[0] in ("predictions", "multi_plane", "checkpoints") or name.suffix == ".csv":
            assert after[name] == before[name], name


def test_evaluation_needs_no_overwrite_in_its_own_run_and_keeps_the_weights(copy):
    weights = (copy.out / "checkpoints" / "best_model.pth").read_bytes()
    history = (copy.out / "logs" / "training_history.json").read_bytes()
    assert call("--evaluate", "--output-dir", copy.out, *MACHINE)[0] == 0
    assert (copy.out / "checkpoints" / "best_model.pth").read_bytes() == weights
    assert (copy.out / "logs" / "training_history.json").read_bytes() == history


def test_moved_data_set_is_known_again_and_only_its_test_part_scored(copy, evaluate, finished):
    status, out, err = evaluate("--data-dir", copy.data)
    assert (status, err) == (0, "")
    assert "2 of the test split" in out
    got = scores(copy.data.parent / "out")
    assert [row["subject"] for row in got["subjects"]] == finished.split["test"]
    assert got["subjects"] == finished.metrics["subjects"]


def test_new_scans_beside_the_runs_own_are_left_out_and_named(copy, evaluate, finished):
    make_subject(copy.data, "sub-777", seed=7)
    status, out, err = evaluate("--data-dir", copy.data)
    assert (status, err) == (0, "")
    got = scores(copy.data.parent / "out")
    assert [row["subject"] for row in got["subjects"]] == finished.split["test"]
    assert "sub-777" in out


def test_training_scans_without_the_test_scans_are_refused(copy, evaluate, finished):
    lost, kept = finished.split["test"]
    image_path(copy.data, lost).unlink()
    label_path(copy.data, lost).unlink()
    status, _, err = evaluate("--data-dir", copy.data)
    assert status == 2
    assert "DATA_DIR" in err
    assert lost in err
    assert kept not in err
    assert not (copy.data.parent / "out" / "predictions").exists()


def test_changed_test_scan_among_training_scans_is_refused(copy, evaluate, finished):
    changed = finished.split["test"][1]
    save_nifti(image_path(copy.data, changed), head())
    status, _, err = evaluate("--data-dir", copy.data)
    assert status == 2
    assert changed in err
    assert not (copy.data.parent / "out" / "predictions").exists()


@pytest.fixture
def external(tmp_path):
    """A BIDS folder of other subjects: one as usual, one without PVS, one of tiny ones."""
    folder = tmp_path / "clinic"
    make_subject(folder, "sub-usual", seed=11)
    make_subject(folder, "sub-none", seed=12)
    save_nifti(label_path(folder, "sub-none"), np.zeros((24, 28, 20), np.int16))
    # Working voxels of 1 mm are 2.5 of these apart: in between one can be missed.
    fine, label = head((60, 70, 50)), np.zeros((60, 70, 50), np.int16)
    label[31, 36, 26] = 1
    save_nifti(image_path(folder, "sub-tiny"), fine, np.diag([0.4, 0.4, 0.4, 1]))
    save_nifti(label_path(folder, "sub-tiny"), label, np.diag([0.4, 0.4, 0.4, 1]))
    save_nifti(image_path(folder, "sub-unlabelled"), head())
    return folder


def test_external_data_set_is_scored_with_all_its_labelled_subjects(external, evaluate):
    status, out, err = evaluate("--data-dir", external)
    assert (status, err) == (0, "")
    assert "3 of an external test" in out
    assert str(image_path(external, "sub-unlabelled")) in out  # left out, said
    got = scores(external.parent / "out")
    assert got["n"] == 3
    assert "both empty" in got["empty_masks"]
    rows = {row["subject"]: row for row in got["subjects"]}
    assert set(rows) == {"sub-usual", "sub-none", "sub-tiny"}
    none, tiny = rows["sub-none"], rows["sub-tiny"]
    assert none["count_label"] == none["volume_ml_label"] == none["working_label_voxels"] == 0
    assert none["roundtrip_dice"] is None
    assert none["count_error_percent"] is None
    assert none["dice"] == none["native_dice"] == float(none["working_pred_voxels"] == 0)
    assert none["one_mask_empty"] == (none["count_pred"] > 0)
    assert tiny["working_label_voxels"] == 0  # vanished on the working grid
    assert tiny["count_label"] == 1
    assert tiny["volume_ml_label"] == pytest.approx(0.4**3 / 1000)
    assert tiny["roundtrip_dice"] == 0
    assert got["native"]["dice"]["n"] == 3
    assert got["dice_mean"] == pytest.approx(np.mean([row["dice"] for row in rows.values()]))


def test_predicting_into_the_folder_of_the_scans_is_refused(finished, tmp_path):
    scan = tmp_path / "bids" / "sub-01" / "anat" / "sub-01_T2w.nii.gz"
    scan.parent.mkdir(parents=True)
    scan.write_bytes(image_path(finished.data, "sub-001").read_bytes())
    bids = tmp_path / "bids"
    flags = ("--checkpoint", finished.checkpoint, "--output-dir", bids, *MACHINE)
    status, _, err = call("--predict", bids, *flags)
    assert status == 2
    assert f"{bids}: expected another folder than OUTPUT_DIR" in err
    assert [p for p in bids.rglob("*") if p.is_file()] == [scan]


def test_external_evaluation_has_a_folder_of_its_own_in_the_run(copy, external):
    before = snapshot(copy.out)
    flags = ("--data-dir", external, "--output-dir", copy.out, *MACHINE)
    status, _, err = call("--evaluate", *flags)
    assert (status, err) == (0, "")
    after = snapshot(copy.out)
    assert {name: after[name] for name in before} == before
    assert {name.parts[0] for name in set(after) - set(before)} == {"evaluate-clinic"}
    assert scores(copy.out / "evaluate-clinic")["n"] == 3
    status, _, err = call("--evaluate", *flags)
    assert status == 2
    assert "--overwrite" in err
    assert call("--evaluate", *flags, "--overwrite")[0] == 0
    assert scores(copy.out / "evaluate-clinic")["n"] == 3


def test_other_scans_of_the_same_names_are_all_scored(evaluate, tmp_path):
    for number in range(1, 5):
        make_subject(tmp_path / "other", f"sub-{number:03d}", seed=30 + number)
    status, out, err = evaluate("--data-dir", tmp_path / "other")
    assert (status, err) == (0, "")
    assert "4 of an external test" in out
    assert scores(tmp_path / "out")["n"] == 4


def test_scans_are_known_again_by_their_voxels_whatever_becomes_of_their_files(
    copy, evaluate, finished
):
    for path in image_path(copy.data, "sub-*").parent.parent.parent.glob("sub-*/anat/*.nii.gz"):
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1))
    status, out, err = evaluate("--data-dir", copy.data)
    assert (status, err) == (0, "")
    assert "2 of the test split" in out
    assert scores(copy.data.parent / "out")["subjects"] == finished.metrics["subjects"]


def test_evaluation_without_its_data_says_how_to_get_them(evaluate, tmp_path):
    status, _, err = evaluate("--data-dir", tmp_path / "gone")
    assert status == 2
    assert str(tmp_path / "gone") in err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- BIDS


def validate(folder):
    """Return what the BIDS validator says: {file's place: codes of its errors}."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    validator = shutil.which("bids-validator-deno", path=places)
    assert validator, "bids-validator-deno is among the requirements"
    command = [validator, str(folder), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = json.loads(result.stdout)
    assert report["summary"]["totalFiles"] > 1
    errors = {}
    for issue in report["issues"]["issues"]:
        if issue["severity"] == "error":
            errors.setdefault(issue.get("location"), []).append(issue["code"])
    return errors


def test_predictions_are_a_valid_bids_derivative(predict, tmp_path):
    scans = [
        save_nifti(tmp_path / name, head())
        for name in (
            "bids/sub-02/ses-a/anat/sub-02_ses-a_acq-hires_run-1_T2w.nii",
            "bids/sub-03/anat/sub-03_T2w.nii.gz",
            "Köpfchen [T2] (2).nii.gz",
        )
    ]
    assert predict(tmp_path / "bids", scans[2], "--save-probabilities")[0] == 0
    folder = tmp_path / "out" / "predictions"
    assert len(list(folder.rglob("*.nii.gz"))) == 6
    assert validate(folder) == {}
    mask = next(folder.rglob(f"sub-03{MASK}"))
    shutil.copy(mask, mask.with_name("sub-03_PVS_mask.nii.gz"))
    assert set(validate(folder)) == {"/sub-03/anat/sub-03_PVS_mask.nii.gz"}


def test_description_names_the_data_set_of_the_scans_and_the_network(predict, tmp_path):
    save_nifti(tmp_path / "my bids/sub-1/anat/sub-1_T2w.nii.gz", head())
    (tmp_path / "my bids" / "dataset_description.json").write_text('{"Name": "Mine"}')
    assert predict(tmp_path / "my bids")[0] == 0
    path = tmp_path / "out" / "predictions" / "dataset_description.json"
    description = json.loads(path.read_text())
    assert description["DatasetType"] == "derivative"
    assert description["SourceDatasets"] == [{"URL": (tmp_path / "my bids").as_uri()}]
    assert "efficientnet-b0" in description["GeneratedBy"][0]["Description"]
    assert "1 x 1 x 1 mm" in description["GeneratedBy"][0]["Description"]


@pytest.mark.parametrize("name", ["patient-07_T2.nii.gz", "2024-05-01 head.nii"])
def test_hyphens_in_names_that_are_not_bids_make_no_entities_of_their_own(name, predict, tmp_path):
    assert predict(save_nifti(tmp_path / name, head()))[0] == 0
    assert validate(tmp_path / "out" / "predictions") == {}


def test_test_predictions_of_a_run_are_a_valid_bids_derivative(finished):
    assert validate(finished.out / "predictions") == {}


# ---------------------------------------------------------------------------------- start message


def start_message(tmp_path, tiny_config, messages, pix_dim):
    """Prepare a permuted anisotropic scan; return what is said about the grids."""
    # The axes run up, to the right and to the front, 2, 0.8 and 0.9 mm: RAS 0.8 x 0.9 x 2.
    affine = np.array([[0, 0.8, 0, 0], [0, 0, 0.9, 0], [2, 0, 0, 0], [0, 0, 0, 1.0]])
    image, label = head((14, 30, 32)), np.zeros((14, 30, 32), np.int16)
    label[6:8, 14:16, 13:19] = 1
    save_nifti(image_path(tmp_path, "sub-1"), image, affine)
    save_nifti(label_path(tmp_path, "sub-1"), label, affine)
    cfg = tiny_config(DATA_DIR=str(tmp_path), OUTPUT_DIR=str(tmp_path / "out"), PIX_DIM=pix_dim)
    train_pvs.prepare_cases(train_pvs.find_cases(cfg), cfg)
    assert "0.8 x 0.9 x 2 mm" in messages.text
    return messages.text


def test_coarser_working_grid_is_told_with_its_factor_and_the_flag_that_avoids_it(
    tmp_path, tiny_config, messages
):
    # 1.6 * 1.8 * 2 = 5.76 mm3 are 4.0 times 0.8 * 0.9 * 2 = 1.44 mm3.
    text = start_message(tmp_path, tiny_config, messages, (1.6, 1.8, 2))
    assert "coarser than the scans, 4.0 times in voxel volume" in text
    assert "--pix-dim 0.8 0.9 2 " in text


@pytest.mark.parametrize("pix_dim", [(0.8, 0.9, 2), (0.5, 0.5, 0.5)])
def test_working_grid_as_fine_as_the_scans_is_not_complained_of(
    pix_dim, tmp_path, tiny_config, messages
):
    assert "coarser" not in start_message(tmp_path, tiny_config, messages, pix_dim)
