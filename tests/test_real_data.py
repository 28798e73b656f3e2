"""What scans, masks and files of real groups have: readings, intensities, labels, names."""

import gzip
import json
import re
import shutil
import struct
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor

import train_pvs
from conftest import MACHINE, image_path, label_path, save_nifti
from running import array_of, call, done, refused, trained
from test_predict import rows_of

pytestmark = pytest.mark.usefixtures("no_figures")

SCANNER = nib.affines.from_matvec(np.diag([0.8, 0.9, 1.0]), (-80, -100, -60))
TURN = nib.eulerangles.euler2mat(0.15, 0.05, 0.1)
ALIGNED = nib.affines.from_matvec(TURN, (3, -2, 4)) @ SCANNER  # as after a registration
CODES = ((0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (4, 4))


def coded(path, data, qform, sform, codes):
    """Write a volume with both affines and the codes (qform, sform)."""
    volume = nib.Nifti1Image(data, None)
    volume.header.set_qform(qform, codes[0])
    volume.header.set_sform(sform, codes[1])
    nib.save(volume, path)
    return path


def as_itk_has_it(path):
    """Return the voxels (X, Y, Z) and the affine, in nibabel's axes, that SimpleITK reads."""
    image = SimpleITK.ReadImage(str(path))
    turn = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine = np.diag([-1, -1, 1, 1]) @ nib.affines.from_matvec(turn, image.GetOrigin())
    return SimpleITK.GetArrayFromImage(image).T, affine


def redrawn(path, scan, label, writer):
    """Write a mask drawn on a scan's voxels, as a program with nibabel or with ITK saves it."""
    if writer == "ITK":
        image = SimpleITK.GetImageFromArray(label.T)
        image.CopyInformation(SimpleITK.ReadImage(str(scan)))
        SimpleITK.WriteImage(image, str(path))
    else:
        save_nifti(path, label, nib.load(scan).affine)
    return path


def volumes_of(data, number=1):
    paths = (at(data, f"sub-00{number}") for at in (image_path, label_path))
    return [array_of(path).astype(np.uint16) for path in paths]


def test_mask_drawn_on_a_scans_voxels_is_paired_whatever_reads_its_place(data, tmp_path):
    image, label = volumes_of(data)
    label = label.astype(np.uint8)
    for writer, codes, other in product(("nibabel", "ITK"), CODES, (SCANNER, ALIGNED)):
        scan = coded(tmp_path / "scan.nii.gz", image, SCANNER, other, codes)
        mask = redrawn(tmp_path / "mask.nii.gz", scan, label, writer)
        case = train_pvs.Case("sub-1", "sub-1", str(scan), str(mask))
        volumes, told = train_pvs.read_pair(case)
        assert np.array_equal(volumes["label"][0], label), (writer, codes)
        assert torch.equal(volumes["label"].affine, volumes["image"].affine)
        # The two readers have another place for the scan, so the mask of one for the other.
        apart = not np.allclose(as_itk_has_it(scan)[1], nib.load(scan).affine, atol=1e-3)
        sentences = [t for t in told if "paired voxel by voxel" in t]
        assert len(sentences) == (apart and writer == "ITK"), (codes, told)
        assert all("ITK's reading" in t or "qform" in t for t in sentences)
        assert sum("left and right are unknown" in t for t in told) == (codes == (0, 0))
        # What is predicted lies on the scan's voxels for both.
        train_pvs.write_nifti(tmp_path / "pred.nii.gz", label, scan)
        assert np.array_equal(nib.load(tmp_path / "pred.nii.gz").affine, nib.load(scan).affine)
        voxels, affine = as_itk_has_it(tmp_path / "pred.nii.gz")
        assert np.array_equal(voxels, label)
        assert np.allclose(affine, as_itk_has_it(scan)[1], atol=1e-6), codes


def test_mask_that_fits_no_reading_is_refused_with_those_that_were_tried(data, run):
    scan, mask = image_path(data, "sub-002"), label_path(data, "sub-002")
    image, label = volumes_of(data, 2)
    coded(scan, image, SCANNER, ALIGNED, (1, 2))
    flipped = SCANNER @ nib.affines.from_matvec(np.diag([-1.0, 1, 1]), (23, 0, 0))
    save_nifti(mask, label, flipped)
    tried = "tried: sform, qform, ITK's reading"
    refused(run("--check"), mask, "axes LAS, the scan's are RAS", tried)
    # Nor are those taken whose own qform alone fits: shifted or mirrored since it was written.
    coded(scan, image, SCANNER, SCANNER, (1, 1))
    shifted = nib.affines.from_matvec(np.eye(3), (0, 4.5, 0)) @ SCANNER
    for voxels, affine in ((np.roll(label, -5, 1), shifted), (label[::-1], flipped)):
        coded(mask, voxels, SCANNER, affine, (1, 2))
        refused(run("--check"), mask)


def test_readings_without_codes_or_with_another_pixdim_are_told(data, run, predict, monkeypatch):
    monkeypatch.setattr(train_pvs, "draw_sections", drawn := Mock())
    image, label = volumes_of(data, 2)
    scan = coded(image_path(data, "sub-002"), image, SCANNER, SCANNER, (0, 0))
    redrawn(label_path(data, "sub-002"), scan, label.astype(np.uint8), "ITK")
    other = image_path(data, "sub-003")
    whole = bytearray(gzip.decompress(other.read_bytes()))
    struct.pack_into("<3f", whole, 80, 0.8, 0.8, 0.8)  # pixdim
    other.write_bytes(gzip.compress(whole))
    unknown = f"Warning: {scan}: its qform and sform code are 0: left and right are unknown"
    pixdim = f"Warning: {other}: its pixdim says 0.8 x 0.8 x 0.8 mm a voxel, its affine 1 x 1 x 1"
    third = image_path(data, "sub-001")
    coded(third, volumes_of(data)[0], np.diag([-1, 1, 1, 1]), np.eye(4), (1, 2))
    axes = f"Warning: {third}: ITK's programs (ITK-SNAP, 3D Slicer) see axes "
    for out in (done(run("--check")), done(predict(scan, other, third))):
        assert (out.count(unknown), out.count(pixdim), out.count(axes)) == (1, 1, 1)
    unknown = ["; left and right are unknown" in call.args[2] for call in drawn.call_args_list]
    assert unknown == [True, False, False]


def test_odd_numbers_beside_a_whole_sform_change_nothing(data):
    scan = image_path(data, "sub-001")
    whole, plain = gzip.decompress(scan.read_bytes()), train_pvs.read_volume(scan)
    for place, form, *numbers in (
        (80, "<3f", -1.0, 1.0, 1.0),  # pixdim
        (80, "<3f", 0.0, 0.0, 0.0),
        (40, "<5h", 4, 24, 28, 20, 0),  # dim: four axes, the last of length 0
        (256, "<3f", 0.707107, 0.707107, 0.0),  # a quaternion that was rounded
    ):
        odd = bytearray(whole)
        struct.pack_into(form, odd, place, *numbers)
        scan.write_bytes(gzip.compress(odd))
        volume, _ = train_pvs.read_scan(scan)
        assert torch.equal(volume.as_tensor(), plain.as_tensor())
        assert torch.equal(volume.affine, plain.affine)
        assert train_pvs.readings(nib.load(scan).header)
        train_pvs.write_nifti(data / "mask.nii.gz", np.ones((24, 28, 20), np.uint8), scan)
        assert nib.load(data / "mask.nii.gz").shape == (24, 28, 20)
    lone = bytearray(whole)  # qform alone, of the same quaternion: half a turn about x = y
    struct.pack_into("<2h6f", lone, 252, 1, 0, 0.707107, 0.707107, 0.0, 0.0, 0.0, 0.0)
    scan.write_bytes(gzip.compress(lone))
    turned = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]]
    assert np.allclose(train_pvs.read_volume(scan).affine, turned, atol=1e-5)


def kinds_of_scan(head, brain):
    """Yield a head as programs leave it: {name: (scan, whether it is stripped)}."""
    z = (head - head[brain].mean()) / head[brain].std()
    low, high = head[brain].min(), head[brain].max()
    yield "whole head", head, False
    yield "whole head, z-scored", z, False
    yield "whole head, z-scored, 0 around it", np.pad(z[4:-4, 4:-4, 4:-4], 4), False
    slab = np.where(head > 99, head, 0)[:, :, 30:60]
    yield "slab of a head without noise", slab, False
    yield "slab of a head in zeros", np.pad(slab, 4), False
    yield "stripped", np.where(brain, head, 0), True
    yield "stripped, z-scored, background 0", np.where(brain, z, 0), True
    yield "stripped, z-scored, background lowest", np.where(brain, z, z[brain].min()), True
    yield "stripped, scaled to [0, 1]", np.where(brain, (head - low) / (high - low), 0), True
    yield "stripped, negative", np.where(brain, head, 0) - 2000, True
    yield "stripped, whole numbers around 0", np.where(brain, np.round(100 * z), 0), True
    yield "stripped, background highest", np.where(brain, head, head.max() + 1), True


def test_brain_keeps_its_contrast_in_every_kind_of_scan(tiny_config):
    rng, shape = np.random.default_rng(5), train_pvs.DEMO_SHAPE
    head = train_pvs.simulate_head(rng)[0].astype(np.float32)
    _, white, basal = train_pvs.simulate_tissue(np.random.default_rng(5), shape)
    brain = train_pvs.ndimage.binary_closing(white | basal, iterations=6)
    plain, affine = {}, torch.diag(torch.tensor([2, 2, 2, 1.0])).double()
    for name, volume, stripped in kinds_of_scan(head, brain):
        volume = torch.from_numpy(volume.astype(np.float32))[None]
        slab = np.pad(brain[:, :, 30:60], max(volume.shape[3] - 30, 0) // 2)
        part = brain if volume.shape[1:] == brain.shape else slab
        scan = {"image": MetaTensor(volume, affine), "label": MetaTensor(part[None], affine)}
        entry = train_pvs.to_working_grid(scan, tiny_config(PIX_DIM=(2.0, 2.0, 2.0)))
        values = entry["image"][entry["label"] > 0]
        clipped = [float((values <= 0).float().mean()), float((values >= 1).float().mean())]
        assert max(clipped) <= 0.01, (name, clipped)
        assert entry["stripped"] == stripped, name
        # The same brain, however it is stored; the background is as dark as air.
        first = plain.setdefault(stripped, entry["image"])
        if first.shape == entry["image"].shape:
            assert float((first - entry["image"]).abs().mean()) < 0.01, name
        assert entry["label"].sum() == part.sum()
    lost = head * (np.arange(head.shape[2]) != 50)  # a slice of zeros parts the head
    assert train_pvs.head_mask(lost[None]).sum() > 0.95 * train_pvs.head_mask(head[None]).sum()
    corners = entry["image"][0][[0, 0, -1, -1], [0, -1, 0, -1], 0]
    assert corners.tolist() == [0, 0, 0, 0]


def test_a_few_hot_voxels_are_no_noise(data, run):
    for number, count in ((1, 1), (2, 30)):
        scan, (image, _) = image_path(data, f"sub-00{number}"), volumes_of(data, number)
        hot = image.astype(np.float32)
        hot.flat[np.random.default_rng(0).integers(hot.size, size=count)] = 1e6
        save_nifti(scan, hot)
    done(run("--check"))
    small = np.hypot(*np.random.default_rng(0).normal(0, 10, (2, 72, 84, 60)))  # much noisy air
    small[24:48, 28:56, 20:40] += image
    assert train_pvs.read_scan(save_nifti(data / "small.nii", small.astype(np.int16)))


def test_labels_are_whole_within_half_of_their_headers_slope(data, run):
    mask, (_, label) = label_path(data, "sub-002"), volumes_of(data, 2)
    seven = label * (1.0 + np.arange(label.shape[0])[:, None, None] % 7)
    nib.save(nib.Nifti1Image(seven, np.eye(4), dtype=np.uint8), mask)
    assert not np.array_equal(nib.load(mask).get_fdata(), seven)  # nibabel chose a slope
    assert np.array_equal(train_pvs.read_label(mask)[0][0], seven)
    done(run("--check"))
    nib.save(nib.Nifti1Image(label * 0.5, np.eye(4), dtype=np.uint8), mask)
    refused(run("--check"), mask, "got fractions")


def test_hidden_files_are_no_scans_and_no_masks(data, run, predict):
    for at in (image_path, label_path):
        path = at(data, "sub-001")
        path.with_name("._" + path.name).write_bytes(b"\0\5\x16\7" + bytes(4000))  # of macOS
    shutil.copytree(data / "sub-002", data / ".trash" / "sub-002")
    assert "2 train, 1 val, 1 test" in done(run("--check"))
    assert "4 of 4 scans" in done(predict(data))
    (data / "bids").mkdir()
    flags = ("--image-glob", "../sub-*/anat/*_T2w.nii.gz", "--label-glob")  # no hidden places
    done(call("--check", *flags, "../derivatives/*/*/*.nii.gz", "--data-dir", data / "bids"))


def test_names_are_told_with_the_nearest_scan(data, run):
    moved = label_path(data, "sub-002")
    moved = moved.rename(moved.with_name("sub-002_space-T2w_res-1_seg-PVS_desc-mask_PVS.nii.gz"))
    done(run("--check"))  # on its scan's grid, however that is called
    moved.rename(moved.with_name("sub-002_acq-2_desc-mask_PVS.nii.gz"))
    third = image_path(data, "sub-003")
    shutil.copy(third, third.with_name("sub-003_run-2_T2w.nii.gz"))
    third.rename(third.with_name("sub-003_run-1_T2w.nii.gz"))
    near = f"found none; the nearest is {image_path(data, 'sub-002')}, which has no acq-2"
    err = refused(run("--check"), "2 problems", "letters and digits only", near)
    assert err.count("sub-003_run-2") == 1  # and not as a scan without a mask


def test_all_folds_run_one_after_another_and_go_on(data, run, tmp_path, monkeypatch):
    for flags in (["--folds", 3], ["--folds", 3, "--resume"]):
        trained(run(*flags, "--fold", "all"))
        pooled = json.loads((tmp_path / "out" / "cross_validation.json").read_text())
        assert (pooled["finished"], pooled["n"]) == ([1, 2, 3], 4)
        shutil.rmtree(tmp_path / "out" / "fold-3" / "checkpoints")  # as if it had just begun
        (tmp_path / "out/fold-3/logs/comprehensive_test_metrics.json").unlink()
        (tmp_path / "out/fold-1/checkpoints/last.pth").unlink(missing_ok=True)  # it is finished
    refused(run("--folds", 3, "--fold", "all"), "fold-1", "--overwrite")
    places = ("--data-dir", data, "--output-dir", tmp_path / "out")
    other = call(*places, "--folds", 3, "--fold", "all", "--resume")  # other flags are forgotten
    refused(other, "fold-1 has", "BATCH_SIZE 1, not 2", "all flags of the first command")
    best = tmp_path / "out/fold-2/checkpoints/best_model.pth"
    former = best.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(train_pvs, "fit", Mock(side_effect=KeyboardInterrupt))
        assert run("--folds", 3, "--fold", "all", "--overwrite")[0] == 130
    table = tmp_path / "out" / "cross_validation.json"
    done(call("--evaluate", "--output-dir", best.parents[1], *MACHINE))  # a fold to be replaced
    assert not table.exists()
    trained(run("--folds", 3, "--fold", 1, "--overwrite"))
    assert json.loads(table.read_text())["finished"] == [1]
    trained(run("--folds", 3, "--fold", "all", "--resume"))
    assert best.stat().st_mtime_ns > former  # not only tested again


@pytest.mark.parametrize("where", ["build_train_transforms", "scale_intensity", "default_collate"])
def test_error_in_a_worker_is_one_line_with_the_case_and_the_cause(data, run, monkeypatch, where):
    error, told = KeyError("no such key"), "KeyError: 'no such key' (--num-workers 0 tells where)"
    if where == "default_collate":
        error = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")
        told = "--shm-size 8g, or --ipc=host), or use --num-workers 0"
    fails = Mock(side_effect=error)
    fails = Mock(return_value=fails) if where == "build_train_transforms" else fails
    monkeypatch.setattr(train_pvs, where, fails)
    status, _, err = run("--num-workers", 2)
    assert (status, told in err, "Traceback" in err) == (1, True, False), err
    assert ("sub-00" in err) == (where != "default_collate")
    assert err.count("\n") <= 3


def test_killed_prediction_goes_on_and_new_scans_add_rows(finished, predict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, out = Path("plain folder"), tmp_path / "out"
    names = ("M2208_T2w.nii.gz", "patient_12_T2.nii.gz", "case_7.nii.gz")
    for number, name in enumerate(names, 1):
        save_nifti(folder / name, volumes_of(finished.data, number)[0])
    (folder / "readme.txt").write_text("scans")
    save_nifti(folder / "M2208_T1w.nii.gz", np.ones((9, 9, 9)))  # another contrast
    assert "3 of 3 scans" in done(predict(folder))
    rows = rows_of(out)
    assert [r["participant_id"] for r in rows] == ["sub-M2208", "sub-case7", "sub-patient12"]
    for row in rows:  # from where the table lies
        assert nib.load(out / "logs" / row["mask"]).shape == (24, 28, 20)
        assert Path(row["scan"]).parent == tmp_path / folder
    table = out / "logs" / "participants_pvs.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:2]))  # as if it had been killed in the second scan
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*_mask.nii.gz")}
    masks = {path: path.read_bytes() for path in before}
    assert "Done before     1 of 3 scans" in done(predict(folder))
    assert table.read_text() == "".join(lines)
    assert masks == {path: path.read_bytes() for path in before}
    assert sum(path.stat().st_mtime_ns == before[path] for path in before) == 1
    done(predict(folder, image_path(finished.data, "sub-004").parents[1]))
    assert [*table.read_text().splitlines(keepends=True)][:4] == lines
    assert rows_of(out)[3]["participant_id"] == "sub-004"
    # A scan that has become another one, and other settings, are told; nothing is lost.
    whole = table.read_text()
    save_nifti(folder / names[0], volumes_of(finished.data, 5)[0])
    refused(predict(folder, "--save-probabilities"), folder / names[0], "scan that sub-M2208 was")
    refused(predict(folder, "--threshold", 0.4), "by other weights or settings", "--overwrite")
    assert table.read_text() == whole
    others = [folder / name for name in names[1:]]
    table.write_text(whole.replace(",", ";"))  # as some programs save it
    refused(predict(*others), table, "expected the table as it was written")
    lines, ages = whole.splitlines(), ("age", 5, 6, 7, 8)  # with a column of its own
    table.write_text("\n".join(f"{a},{line}" for a, line in zip(ages, lines, strict=True)))
    with monkeypatch.context() as patch:
        calls = [train_pvs.segment_scan, Mock(side_effect=ValueError("lost"))]
        patch.setattr(train_pvs, "segment_scan", lambda *words: calls.pop(0)(*words))
        assert (predict(*others, "--save-probabilities")[0], len(rows_of(out))) == (1, 4)
    assert "Done before     1 of 2" in done(predict(*others, "--save-probabilities"))
    assert len(list(out.rglob("*_probseg.nii.gz"))) == 2
    assert [list(row) for row in rows_of(out)] == 4 * [list(train_pvs.PREDICTED)]
    assert "3 of 3" in done(predict(folder, "--overwrite"))
    assert len(rows_of(out)) == 3


def test_prediction_tells_what_its_reader_must_know(finished, predict, tmp_path):
    parts = {part: image_path(finished.data, finished.split[part][0]) for part in finished.split}
    image, _ = volumes_of(finished.data)
    new = save_nifti(tmp_path / "new_T2w.nii.gz", image[::-1], np.diag([0.69, 0.69, 3, 1]))
    bare = save_nifti(tmp_path / "bare_T2w.nii.gz", np.where(image > 200, image, 0))
    full = image + np.random.default_rng(0).integers(300, 340, image.shape)
    full = save_nifti(tmp_path / "full_T2w.nii.gz", full.astype(np.int16))
    out = done(predict(*parts.values(), new, bare, full))
    rows = rows_of(tmp_path / "out")
    assert [row["seen_in"] for row in rows] == [*parts, "", "", ""]
    assert {row["trained_on"] for row in rows} == {"Simulated heads of a test"}
    assert 0 < float(rows[0]["validation_dice"]) < 1
    refused(predict("nosuch.nii.gz"), "nosuch.nii.gz: no such file")
    assert "Trained on      Simulated heads of a test" in out
    far = "voxels of 0.69 x 0.69 x 3 mm, far from the training scans' 1 x 1 x 1 mm"
    assert f"Warning: {new} has {far}" in out
    assert f"Warning: {bare}: the scan is stripped of the skull" in out
    assert f"Warning: {full}: it holds no air" in out
    assert out.count("Warning:") == 3
    for row in rows:
        assert re.fullmatch(r"[\d.e-]+", row["volume_ml"])
        assert len(row["volume_ml"].replace(".", "").strip("0")) <= 6
    content = torch.load(finished.best, weights_only=True)
    content["history_row"]["val_dice"] = 0.0
    torch.save(content, tmp_path / "none.pth")
    flags = ("--checkpoint", tmp_path / "none.pth", "--output-dir", tmp_path / "none")
    assert "found no PVS in validation" in done(predict(new, *flags))
