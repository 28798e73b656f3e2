"""The commands --predict and --evaluate, with the weights of the finished run."""

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from kill_and_resume import comparable
from scipy import ndimage

import train_pvs
from conftest import MACHINE, image_path, make_head, save_nifti, save_subject, scores, snapshot
from running import array_of, call, done, refused

MASK = "_label-PVS_desc-unetpp_mask.nii.gz"
PROBABILITY = "_label-PVS_desc-unetpp_probseg.nii.gz"

HEAD = make_head()[0]

pytestmark = pytest.mark.usefixtures("no_figures")


def rows_of(out):
    with open(out / "logs" / "participants_pvs.csv", newline="") as file:
        return list(csv.DictReader(file))


def masks_below(folder):
    return sorted(str(p.relative_to(folder / "predictions")) for p in folder.rglob(f"*{MASK}"))


def validate(folder):
    """Return what the BIDS validator says: {file's place: code of an error}."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    validator = shutil.which("bids-validator-deno", path=places)
    assert validator, "bids-validator-deno is among the requirements"
    command = [validator, str(folder), "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, timeout=120).stdout)
    assert report["summary"]["totalFiles"] > 1
    errors = [issue for issue in report["issues"]["issues"] if issue["severity"] == "error"]
    return {error.get("location"): error["code"] for error in errors}


def test_files_and_folders_become_a_valid_bids_derivative_and_a_table(predict, tmp_path):
    # The odd grid has voxels of 0.5 x 0.8 x 1.5 mm: 0.6 mm3 or 0.0006 ml.
    odd = np.array([[0, -0.8, 0, 9], [0.5, 0, 0, -3], [0, 0, 1.5, 1], [0, 0, 0, 1.0]])
    bids = tmp_path / "my bids"
    a = save_nifti(bids / "sub-01/anat/sub-01_T2w.nii.gz", make_head((40, 30, 16))[0], odd)
    b = save_nifti(bids / "sub-02/ses-a/anat/sub-02_ses-a_acq-hi_run-1_T2w.nii", HEAD)
    save_nifti(bids / "sub-01/anat/sub-01_T1w.nii.gz", HEAD)  # another contrast
    train_pvs.write_file(bids / "dataset_description.json", '{"Name": "Mine"}')
    table = '"participant_id"\t"age"\t"grade"\n" sub-01"\t61\t2\n'  # as R writes it
    train_pvs.write_file(bids / "participants.tsv", table)
    # Of names that are not BIDS the letters A to Z and digits stay, in one entity.
    c = save_nifti(tmp_path / "für Prüfung" / "Köpfchen [T2] (2) ü.nii.gz", HEAD)
    d = save_nifti(tmp_path / "2024-05-01 head.nii", HEAD[..., None])  # a trailing axis
    before = snapshot(bids)
    out = done(predict(bids, c, d, "--save-probabilities"))
    assert f"4 of 4 scans are segmented in {tmp_path / 'out'}" in out
    assert snapshot(bids) == before  # data are never written to
    expected = {
        "sub-01": ("sub-01", a, 0.0006),
        "sub-02_ses-a_acq-hi_run-1": ("sub-02", b, 0.001),
        **{n: (n, scan, 0.001) for n, scan in (("sub-KpfchenT22", c), ("sub-20240501head", d))},
    }
    rows = rows_of(tmp_path / "out")
    assert [row["name"] for row in rows] == list(expected)
    assert [row["age"] + row["participants_grade"] for row in rows] == ["612", "", "", ""]
    for row, (name, (subject, scan, voxel_ml)) in zip(rows, expected.items(), strict=True):
        session = "ses-a/" if "ses-a" in name else ""
        place = f"predictions/{subject}/{session}anat/{name}"
        assert (row["participant_id"], row["scan"]) == (subject, str(scan))
        assert row["mask"] == f"../{place}{MASK}"
        prob, mask = (nib.load(tmp_path / "out" / (place + s)) for s in (PROBABILITY, MASK))
        assert (prob.get_data_dtype(), mask.get_data_dtype()) == (np.float32, np.uint8)
        for volume in (prob, mask):
            assert np.array_equal(volume.affine, nib.load(scan).affine)
            assert volume.shape == nib.load(scan).shape
        prob, mask = np.asarray(prob.dataobj), np.asarray(mask.dataobj)
        assert 0 <= prob.min() < 0.1 < 0.5 < prob.max() <= 1
        assert np.array_equal(mask, prob > 0.5)
        count = ndimage.label(mask.reshape(mask.shape[:3]), np.ones((3, 3, 3)))[1]
        assert int(row["count"]) == count > 0
        assert float(row["volume_ml"]) == pytest.approx(mask.sum() * voxel_ml)
        assert f"{name}: {count} PVS, {mask.sum() * voxel_ml:.3f} ml" in out
        assert (tmp_path / "out" / "multi_plane" / f"{name}.png").exists()
    folder = tmp_path / "out" / "predictions"
    assert validate(folder) == {}
    description = json.loads((folder / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert {"URL": bids.as_uri()} in description["SourceDatasets"]
    made = description["GeneratedBy"][0]["Description"]
    assert ("efficientnet-b0" in made, "1 x 1 x 1 mm" in made) == (True, True)
    mask = next(folder.rglob(f"sub-01{MASK}"))  # and the validator is not content with everything
    shutil.copy(mask, mask.with_name("sub-01_PVS_mask.nii.gz"))
    assert set(validate(folder)) == {"/sub-01/anat/sub-01_PVS_mask.nii.gz"}


def test_prediction_of_a_test_scan_is_the_tests_own_mask_byte_for_byte(predict, finished, tmp_path):
    assert validate(finished.out / "predictions") == {}
    subject = finished.split["test"][0]
    done(predict(image_path(finished.data, subject)))
    name = Path("predictions") / subject / "anat" / f"{subject}{MASK}"
    assert (tmp_path / "out" / name).read_bytes() == (finished.out / name).read_bytes()
    assert 0 < array_of(finished.out / name).mean() < 0.5  # else equal for any weights
    row = next(row for row in finished.scores["subjects"] if row["name"] == subject)
    for desc, side in (("unetpp", "pred"), ("manual", "label")):  # the numbered PVS, their table
        path = (finished.out / name).with_name(f"{subject}_seg-PVS_desc-{desc}_dseg.nii.gz")
        lines = path.with_name(path.name.replace("nii.gz", "tsv")).read_text().splitlines()[1:]
        assert array_of(path).max() == len(lines) == row[f"count_{side}"]
        assert (array_of(path) > 0).sum() == pytest.approx(1000 * row[f"volume_ml_{side}"])
        assert sum("\tTrue\t" in line for line in lines) == row[f"matched_{side}_any"]


def test_image_glob_threshold_and_smallest_pvs_may_be_chosen(predict, tmp_path):
    for suffix in ("T2w", "FLAIR"):
        save_nifti(tmp_path / "bids" / f"sub-1/anat/sub-1_{suffix}.nii.gz", HEAD)
    flags = ("--image-glob", "sub-*/anat/*_FLAIR.nii.gz", "--save-probabilities")
    done(predict(tmp_path / "bids", *flags, "--threshold", 0.3))
    assert [Path(row["scan"]).name for row in rows_of(tmp_path / "out")] == ["sub-1_FLAIR.nii.gz"]
    prob, mask = (array_of(next((tmp_path / "out").rglob(f"*{s}"))) for s in (PROBABILITY, MASK))
    assert np.array_equal(mask, prob > 0.3)
    assert (mask > (prob > 0.5)).any()
    done(predict(tmp_path / "bids", *flags, "--smallest-pvs", 10**6, "--overwrite"))
    assert rows_of(tmp_path / "out")[0]["count"] == "0"
    done(predict(tmp_path / "bids" / "sub-1" / "anat", "--overwrite"))
    assert [Path(row["scan"]).name for row in rows_of(tmp_path / "out")] == ["sub-1_T2w.nii.gz"]


def test_bad_scans_among_good_ones_are_named_and_the_good_ones_done(predict, tmp_path):
    bad = {name: tmp_path / f"{name}.nii.gz" for name in ("film", "short", "text", "hole")}
    save_nifti(bad["film"], np.stack([HEAD] * 2, -1))
    whole = save_nifti(bad["short"], HEAD).read_bytes()
    bad["short"].write_bytes(whole[: len(whole) // 2])
    bad["text"].write_text("this is no scan\n")
    save_nifti(bad["hole"], np.where(np.indices(HEAD.shape).sum(0), HEAD, np.float32("nan")))
    good = [save_nifti(tmp_path / f"{name}.nii.gz", HEAD) for name in ("first", "last")]
    status, out, err = predict(good[0], *bad.values(), good[1])
    assert (status, "2 of 6 scans are segmented" in out) == (1, True)
    for path, line in zip(bad.values(), err.splitlines(), strict=True):
        assert line.startswith(f"Not segmented: {path}: ")
    assert [row["scan"] for row in rows_of(tmp_path / "out")] == [str(path) for path in good]
    status, out, _ = predict(*bad.values(), "--overwrite")
    assert (status, "0 of 4 scans are segmented" in out) == (1, True)
    assert masks_below(tmp_path / "out") == []


def test_words_that_are_no_scans_or_would_share_a_name_are_told_before_any_work(predict, tmp_path):
    good, text = save_nifti(tmp_path / "good.nii.gz", HEAD), tmp_path / "notes.txt"
    text.write_text("notes")
    (tmp_path / "empty").mkdir()
    nameless = save_nifti(tmp_path / "äöü.nii.gz", HEAD)
    bids = save_nifti(tmp_path / "bids/sub-1/anat/sub-1_T2w.nii.gz", HEAD)
    same = [save_nifti(tmp_path / name, HEAD) for name in ("a/my scan.nii", "b/my_scan.nii.gz")]
    ses = [save_nifti(tmp_path / f"sub-1_ses-2_{name}.nii", HEAD) for name in ("T2w", "FLAIR")]
    for words, told in {
        (text, tmp_path / "missing.nii.gz", tmp_path / "empty", nameless): "4 problems",
        tuple(same): "both would give sub-myscan\n",
        tuple(ses): "both would give sub-1_ses-2\n",
    }.items():
        assert str(good) not in refused(predict(good, good, *words), *words, told)
    assert not (tmp_path / "out").exists()
    result = predict(tmp_path / "bids", "--output-dir", tmp_path / "bids")
    refused(result, f"{tmp_path / 'bids'}: expected another folder than OUTPUT_DIR")
    assert [path for path in (tmp_path / "bids").rglob("*") if path.is_file()] == [bids]


def test_weights_come_from_the_output_folder_else_the_default_folder(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scan, before = save_nifti(tmp_path / "scan.nii.gz", HEAD), snapshot(copied.out)
    done(call("--predict", scan, "--output-dir", copied.out, *MACHINE))
    assert masks_below(copied.out / "predict") == [f"sub-scan/anat/sub-scan{MASK}"]
    after = snapshot(copied.out)  # the training run is left alone
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"predict"}
    for command in (["--predict", scan], ["--evaluate", "--data-dir", tmp_path]):
        result = call(*command, "--output-dir", "none", *MACHINE)
        refused(result, "none/checkpoints/best_model.pth: expected a checkpoint", "--checkpoint")
    assert not Path("none").exists()
    shutil.copytree(copied.out / "checkpoints", Path(train_pvs.Config.OUTPUT_DIR, "checkpoints"))
    out = done(call("--predict", scan, "--output-dir", "new", *MACHINE))
    assert f"checkpoint {train_pvs.Config.OUTPUT_DIR}/checkpoints/best_model.pth" in out
    assert masks_below(tmp_path / "new") == [f"sub-scan/anat/sub-scan{MASK}"]


def test_evaluation_gives_the_scores_and_files_of_the_test_again(copied, finished, tmp_path):
    shutil.rmtree(copied.data)  # the run's own data are those that it was trained on
    before = snapshot(copied.out)
    kept = ("best_model.pth", "last.pth", "training_history.json", "split.json", "train.log")
    for path in [path for path in copied.out.rglob("*") if path.is_file()]:
        if path.name not in kept and path.parent.name not in ("cache", "tensorboard"):
            path.unlink()
    assert "2 to test" in done(call("--evaluate", "--output-dir", copied.out, *MACHINE))
    assert comparable(copied.out) == comparable(finished.out)
    after = snapshot(copied.out)
    assert sorted(after) == sorted([*before, "logs/evaluate.log"])
    drawn = (".png", ".jpg", ".html", "comprehensive_test_metrics.json", ".lock")
    differ = [name for name in before if after[name] != before[name] and not name.endswith(drawn)]
    assert differ == []  # weights, history, masks and tables
    # Scores of another decision go elsewhere; --overwrite is not needed.
    done(call("--evaluate", "--output-dir", copied.out, "--threshold", 0.2, *MACHINE))
    assert comparable(copied.out) == comparable(finished.out)
    got = scores(next(copied.out.glob("evaluate-*")))
    assert got["config"]["THRESHOLD"] == 0.2
    assert got["subjects"] != finished.scores["subjects"]
    for flags in (["--threshold", 0.2], ["--save-probabilities"]):  # the run's, from now on
        done(call("--resume", "--output-dir", copied.out, *flags))
    again = (*MACHINE, "--evaluate", "--output-dir", copied.out, "--cache-dir", tmp_path / "cache")
    done(call(*again))
    assert scores(copied.out)["subjects"] == got["subjects"]
    assert len([*copied.out.glob(f"predictions/**/*{PROBABILITY}")]) == 2
    assert len([*(tmp_path / "cache").iterdir()]) == 2  # of its test scans alone
    content = train_pvs.read_checkpoint(best := copied.out / "checkpoints" / "best_model.pth")
    content["sha256"]["test"]["sub-999"] = "a scan that is not there any more"
    content["label_sha256"]["test"][finished.split["test"][0]] = "another mask"
    train_pvs.write_torch(best, content)
    refused(call(*again), f"{finished.split['test'][0]}, sub-999: gone or changed")


def test_scans_are_known_by_voxels_and_unseen_ones_tested(copied, predict, finished, tmp_path):
    def evaluate(*flags):
        return predict("--data-dir", copied.data, *flags, command="--evaluate")

    for path in copied.data.rglob("*_T2w.nii.gz"):  # other bytes, the same voxels
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1))
    out, seen = done(evaluate()), sorted(finished.split["train"] + finished.split["val"])
    assert scores(tmp_path / "out")["subjects"] == finished.scores["subjects"]
    assert re.search(f"Not tested .*{' '.join(seen)}", out)
    save_subject(copied.data, "sub-777", *make_head(seed=7))
    save_subject(copied.data, seen[0], *make_head(seed=8))  # scanned again
    told = f"other scans of these subjects were trained or chosen with: {seen[0]}\n"
    assert told in done(evaluate("--overwrite"))
    tested = [row["participant_id"] for row in scores(tmp_path / "out")["subjects"]]
    assert tested == [*sorted([*finished.split["test"], seen[0]]), "sub-777"]
    for path in [path for subject in tested for path in copied.data.rglob(f"{subject}_*")]:
        path.unlink()
    refused(evaluate("--overwrite"), "none is left")
    assert len(scores(tmp_path / "out")["subjects"]) == len(tested)  # what was there is kept


def test_external_data_with_empty_and_vanishing_masks_are_scored_apart(copied, tmp_path):
    clinic = tmp_path / "clinic"
    save_subject(clinic, "sub-001", *make_head(seed=31))  # a name that the run has, other voxels
    save_subject(clinic, "sub-none", HEAD, 0 * HEAD)
    # Working voxels of 1 mm are 2.5 of these apart: in between one can be missed.
    fine, label = make_head((60, 70, 50))[0], np.zeros((60, 70, 50), np.int16)
    label[31, 36, 26] = 1
    save_subject(clinic, "sub-tiny", fine, label, np.diag([0.4, 0.4, 0.4, 1]))
    save_nifti(image_path(clinic, "sub-unlabelled"), HEAD)
    before = snapshot(copied.out)
    flags = ("--evaluate", "--data-dir", clinic, "--output-dir", copied.out, *MACHINE)
    out = done(call(*flags))
    assert f"left out, no mask: {image_path(clinic, 'sub-unlabelled')}" in out
    after = snapshot(copied.out)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"evaluate-clinic"}
    got = scores(copied.out / "evaluate-clinic")
    assert got["n"] == got["native"]["dice"]["n"] == 3
    rows = {row["participant_id"]: row for row in got["subjects"]}
    assert set(rows) == {"sub-001", "sub-none", "sub-tiny"}
    tiny = rows["sub-tiny"]
    assert (tiny["working_label_voxels"], tiny["count_label"]) == (0, 1)  # vanished there
    assert tiny["volume_ml_label"] == pytest.approx(0.4**3 / 1000)
    assert tiny["roundtrip_dice"] == tiny["dice"] == 0
    refused(call(*flags), "--overwrite")
    done(call(*flags, "--overwrite"))


def test_python_of_the_docs_segments_a_scan_as_the_run_did(finished):
    name = finished.split["test"][0]
    scan, docs = nib.load(image_path(finished.data, name)), Path(train_pvs.__file__).parent / "docs"
    code = re.search("```python\n(.*?)```", (docs / "running.md").read_text(), re.DOTALL)[1]
    found = {"array": np.asarray(scan.dataobj), "affine": scan.affine}
    exec(code.replace("outputs_3d", str(finished.out)), found)
    np.testing.assert_array_equal(found["mask"], array_of(*finished.out.rglob(f"{name}{MASK}")))
