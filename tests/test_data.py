"""Finding, checking, caching and dividing the scans of a BIDS folder."""

import gzip
import json
import os
import re
import struct

import nibabel as nib
import numpy as np
import pytest
import torch

import train_pvs
from conftest import image_path, label_path, make_subject, save_nifti
from train_pvs import Config

CUT_OFF = "cannot be read to its last byte", "copy it again"
ONE_MASK = "expected one mask for this scan", "Remove or rename"
ONE_SCAN = "expected one scan for this mask", "Remove or rename"


def array_of(path):
    return np.asarray(nib.load(path).dataobj)


def expect_refused(run, *words, flags=()):
    """Look the data over, want every word in the one error, and return it."""
    status, _, err = run("--check", *flags)
    assert status == 2
    assert [word for word in map(str, words) if word not in err] == []
    assert "Traceback" not in err
    assert f"\n{err}".count("\nError: ") == 1
    return err


def split_flags(data, train, val, test):
    """Return the flags of a split by numbers of subjects, such as "1 3"."""
    numbers = {"train": train, "val": val, "test": test}
    split = {part: [f"sub-00{n}" for n in words.split()] for part, words in numbers.items()}
    path = data.parent / "split.json"
    path.write_text(json.dumps(split))
    return "--split", path


def cache_of(folder, name):
    """Return the only cache entry of a case in an output folder."""
    (path,) = (folder / "cache").glob(f"{name}-*.pt")
    return torch.load(path, weights_only=True)


# ------------------------------------------------------------------------------------------ pairing


def test_mask_without_scan_is_named(data, run):
    image_path(data, "sub-002").unlink()
    expect_refused(run, label_path(data, "sub-002"), *ONE_SCAN, "found none")


@pytest.mark.parametrize("name", ["sub-001_acq-a_T2w.nii.gz", "sub-001_T2w.nii"])
def test_two_scans_for_a_mask_are_named(data, run, name):
    path = image_path(data, "sub-001")
    second = save_nifti(path.with_name(name), array_of(path))
    expect_refused(run, label_path(data, "sub-001"), *ONE_SCAN, path, second)


def test_two_masks_for_a_scan_are_named(data, run):
    path = label_path(data, "sub-001")
    second = save_nifti(path.with_name("sub-001_label-b_desc-mask_PVS.nii"), array_of(path))
    expect_refused(run, image_path(data, "sub-001"), *ONE_MASK, path, second)


def test_mask_of_no_particular_session_is_named(data, run):
    anat = image_path(data, "sub-001").parent
    for session in ("1", "2"):
        path = data / "sub-001" / f"ses-{session}" / "anat" / f"sub-001_ses-{session}_T2w.nii.gz"
        save_nifti(path, array_of(image_path(data, "sub-002")))
    image_path(data, "sub-001").unlink()
    anat.rmdir()
    expect_refused(run, label_path(data, "sub-001"), *ONE_SCAN, "ses-1", "ses-2")


def test_scan_without_mask_is_named_and_left_out(data, run):
    label_path(data, "sub-002").unlink()
    status, out, _ = run("--check")
    assert status == 0
    assert f"left out, no mask: {image_path(data, 'sub-002')}\n" in out
    assert "1 train, 1 val, 1 test" in out  # of the other three


def test_no_masks_at_all_is_refused(data, run):
    for number in range(1, 5):
        label_path(data, f"sub-00{number}").unlink()
    expect_refused(run, data, "4 scans", "0 masks", "--demo")


def test_scan_whose_name_holds_no_subject_is_named(data, run):
    scan = image_path(data, "sub-001").rename(data / "scan_T2w.nii.gz")
    mask = label_path(data, "sub-001").rename(data / "mask.nii.gz")
    flags = "--image-glob", scan.name, "--label-glob", mask.name
    expect_refused(run, scan, "sub-", flags=flags)


def test_pattern_that_is_not_below_the_data_folder_is_refused(data, run):
    expect_refused(run, "IMAGE_GLOB", flags=("--image-glob", f"{data}/sub-*/anat/*_T2w.nii.gz"))


def test_sessions_have_names_and_stay_with_their_subject(tmp_path, tiny_config):
    for subject in ("sub-001", "sub-002", "sub-003", "sub-004"):
        for session in ("ses-1", "ses-2"):
            name = f"{subject}_{session}"
            mask = tmp_path / "derivatives" / "mask" / subject / session
            for path in (
                tmp_path / subject / session / "anat" / f"{name}_T2w.nii.gz",
                mask / f"{name}_desc-mask_PVS.nii.gz",
            ):
                path.parent.mkdir(parents=True)
                path.touch()
    cfg = tiny_config(DATA_DIR=str(tmp_path))
    cases = train_pvs.find_cases(cfg)
    assert [case["name"] for case in cases[:3]] == [
        "sub-001_ses-1",
        "sub-001_ses-2",
        "sub-002_ses-1",
    ]
    assert all(f"{case['name']}_desc" in case["label"] for case in cases)
    for seed in range(5):
        split = train_pvs.split_cases(cases, train_pvs.replace(cfg, SEED=seed))
        assert [len(split[part]) for part in ("train", "val", "test")] == [4, 2, 2]
        assert all(
            len({case["subject"] for case in part}) * 2 == len(part) for part in split.values()
        )


# ------------------------------------------------------------------------------------------ headers


def test_mask_of_another_shape_is_named(data, run):
    path = label_path(data, "sub-001")
    save_nifti(path, array_of(path)[:-1])
    expect_refused(run, path, "expected the scan's shape (24, 28, 20), got (23, 28, 20)", "Repair")


def test_mask_more_than_half_a_voxel_off_is_named(data, run):
    path, affine = label_path(data, "sub-001"), np.eye(4)
    affine[2, 3] = 0.51
    save_nifti(path, array_of(path), affine)
    expect_refused(run, path, "0.51 voxels from the scan's, expected at most 0.5", "Repair")


def test_mask_a_fifth_of_a_voxel_off_gives_a_warning(data, run, tmp_path):
    # Stretched by 0.2 over its 23 mm. On a grid of 0.485 mm this alone would make it a voxel longer
    # than the scan: 23 / 0.485 is 47.4, and 23.2 / 0.485 is 47.8.
    path, affine, flags = label_path(data, "sub-001"), np.eye(4), ("--pix-dim", 0.485, 1, 1)
    affine[0, 0] += 0.2 / 23
    before = run("--check", *flags, out=tmp_path / "before")
    save_nifti(path, array_of(path), affine)
    status, out, _ = run("--check", *flags)
    assert (before[0], status) == (0, 0)
    assert "Warning" not in before[1]
    assert f"{path}: its affine puts corners 0.20 voxels" in out
    a, b = (cache_of(tmp_path / folder, "sub-001")["label"] for folder in ("before", "out"))
    assert torch.equal(a, b)  # it lies on the scan's grid


def test_scan_with_two_volumes_is_named(data, run):
    path = image_path(data, "sub-001")
    save_nifti(path, np.stack([array_of(path)] * 2, -1))
    expect_refused(run, path, "expected a 3D volume, got shape (24, 28, 20, 2)", "Repair")


def test_affine_without_inverse_is_named(data, run):
    path = image_path(data, "sub-001")
    image = nib.load(path)
    volume = nib.Nifti1Image(array_of(path), None, image.header)
    volume.header.set_sform(np.diag([1, 1, 0, 1]), code=1)
    volume.header.set_qform(None, code=0)
    nib.save(volume, path)
    expect_refused(run, path, "expected an affine that can be inverted", "Repair")


@pytest.mark.parametrize("content", [b"", b"not an image\n", b"/annex/objects/MD5E-s3--a.nii.gz\n"])
def test_file_that_is_no_image_is_named(data, run, content):
    image_path(data, "sub-001").write_bytes(content)
    expect_refused(run, image_path(data, "sub-001"), "expected a NIfTI file", "Repair")


def test_file_of_another_format_is_named(data, run):
    path = image_path(data, "sub-001")
    other = nib.MGHImage(array_of(path).astype(np.float32), np.eye(4))
    path.write_bytes(gzip.compress(other.to_bytes()))
    expect_refused(run, path, "expected a NIfTI file", "Repair")


@pytest.mark.parametrize(("offset", "value"), [(70, 9999), (40, 99)], ids=["data type", "axes"])
def test_damaged_header_is_named(data, run, offset, value):
    path = image_path(data, "sub-001")
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + 2] = struct.pack("<h", value)
    path.write_bytes(gzip.compress(raw))
    expect_refused(run, path, "expected", "Repair")


def test_broken_link_is_named_with_the_way_to_mend_it(data, run):
    path = image_path(data, "sub-001")
    path.unlink()
    path.symlink_to("../../.git/annex/objects/gone.nii.gz")
    expect_refused(run, path, "datalad get", "Repair")


def test_all_bad_headers_are_named_at_once(data, run):
    shape, text, volumes = (label_path(data, f"sub-00{n}") for n in (1, 2, 3))
    save_nifti(shape, array_of(shape)[1:])
    text.write_text("text")
    save_nifti(volumes, np.stack([array_of(volumes)] * 2, -1))
    expect_refused(run, "3 problems", shape, text, volumes)


def test_scan_and_mask_of_one_subject_are_both_named(data, run):
    for path in (image_path(data, "sub-001"), label_path(data, "sub-001")):
        path.write_text("text")
    paths = image_path(data, "sub-001"), label_path(data, "sub-001")
    expect_refused(run, "2 problems", *paths)


def test_axes_of_length_one_at_the_end_are_accepted(data, run, tmp_path):
    assert run("--check", out=tmp_path / "before")[0] == 0
    for path in (image_path(data, "sub-001"), label_path(data, "sub-001")):
        save_nifti(path, array_of(path)[..., None])
    assert run("--check")[0] == 0
    for key in ("image", "label"):
        a, b = (cache_of(tmp_path / folder, "sub-001")[key] for folder in ("before", "out"))
        assert torch.equal(a, b)


def test_uncompressed_files_are_read(data, run, tmp_path):
    assert run("--check", out=tmp_path / "before")[0] == 0
    for path in (image_path(data, "sub-001"), label_path(data, "sub-001")):
        save_nifti(path.with_suffix(""), array_of(path))
        path.unlink()
    status, out, _ = run("--check")
    assert status == 0
    assert "2 train, 1 val, 1 test" in out
    for key in ("image", "label"):
        a, b = (cache_of(tmp_path / folder, "sub-001")[key] for folder in ("before", "out"))
        assert torch.equal(a, b)


def test_displacement_of_a_shift_is_in_voxels():
    # (3, 4, 0) mm is 5 mm long: 5 voxels of 1 mm, 2.5 voxels of 2 mm.
    shift = nib.affines.from_matvec(np.eye(3), (3, 4, 0))
    assert train_pvs.affine_displacement(np.eye(4), shift, (5, 6, 7)) == pytest.approx(5)
    coarse = np.diag([2, 2, 2, 1])
    moved = shift @ coarse
    assert train_pvs.affine_displacement(coarse, moved, (5, 6, 7)) == pytest.approx(2.5)


def test_displacement_of_a_rotation_is_that_of_the_worst_corner():
    # A quarter turn about the third axis takes (x, y) to (-y, x). Of the corners (0, 0), (10, 0),
    # (0, 10) and (10, 10) the last one moves most: to (-10, 10), by 20.
    turn = np.eye(4)
    turn[:2, :2] = [[0, -1], [1, 0]]
    assert train_pvs.affine_displacement(np.eye(4), turn, (11, 11, 3)) == pytest.approx(20)


# ------------------------------------------------------------------------------------------- voxels


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxel_that_is_not_finite_is_named(data, run, value):
    path = image_path(data, "sub-001")
    volume = array_of(path).astype(np.float32)
    volume[3, 4, 5] = volume[6, 7, 8] = value
    save_nifti(path, volume)
    expect_refused(run, path, "expected finite voxels, 2 are NaN or infinite", "Repair")


@pytest.mark.parametrize("kept", [0.9, 0.5])
def test_cut_off_compressed_file_is_named(data, run, kept):
    path = image_path(data, "sub-001")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * kept)])
    expect_refused(run, path, *CUT_OFF)


def test_file_cut_off_within_its_header_is_named(data, run):
    path = image_path(data, "sub-001")
    path.write_bytes(path.read_bytes()[:40])
    expect_refused(run, path, "expected a NIfTI file", "Repair")


def test_cut_off_uncompressed_file_is_named(data, run):
    path = image_path(data, "sub-001")
    raw = gzip.decompress(path.read_bytes())
    path.unlink()
    path.with_suffix("").write_bytes(raw[:-1])
    expect_refused(run, path.with_suffix(""), *CUT_OFF)


@pytest.mark.parametrize("place", [-8, -1], ids=["checksum", "length"])
def test_damaged_end_of_a_compressed_file_is_named(data, run, place):
    # All voxels come before the last 8 bytes: a reader that stops there does not see the damage.
    path = label_path(data, "sub-001")
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    expect_refused(run, path, *CUT_OFF)


def test_mask_with_fractions_is_named(data, run):
    path = label_path(data, "sub-001")
    save_nifti(path, array_of(path).astype(np.float32) / 2)
    expect_refused(run, path, "expected whole numbers in a mask", "Repair")


@pytest.mark.parametrize("workers", [0, 2])
def test_all_bad_voxels_are_named_at_once(data, run, workers):
    finite, whole = image_path(data, "sub-001"), label_path(data, "sub-001")
    cut, also = image_path(data, "sub-003"), label_path(data, "sub-003")
    save_nifti(finite, np.full((24, 28, 20), np.nan, np.float32))
    save_nifti(whole, array_of(whole) * np.float32(0.5))
    for path in (cut, also):
        path.write_bytes(path.read_bytes()[:-20])
    flags = "--num-workers", workers
    expect_refused(run, "4 problems", finite, whole, cut, also, flags=flags)


def test_empty_mask_is_named_and_left_out(data, run):
    path = label_path(data, "sub-003")
    save_nifti(path, 0 * array_of(path))
    status, out, _ = run("--check", *split_flags(data, "1 3", "2", "4"))
    assert status == 0
    assert f"left out, empty mask: {path}\n" in out
    assert "1 train, 1 val, 1 test" in out


def test_part_whose_only_mask_is_empty_is_named(data, run):
    path = label_path(data, "sub-004")
    save_nifti(path, 0 * array_of(path))
    status, out, err = run("--check", *split_flags(data, "1 3", "2", "4"))
    assert status == 2
    assert f"left out, empty mask: {path}\n" in out
    assert "with PVS on the working grid (LABEL_GLOB, PIX_DIM), none is left in test. " in err
    assert "Choose other subjects with --split, or draw them with another --seed." in err


def test_split_does_not_depend_on_what_the_masks_hold(data, run):
    def parts(*flags):
        out = run("--check", "--test-fraction", 0.25, "--val-fraction", 0.3, *flags)[1]
        return re.findall(r"^  (?:val|test) +(.*)$", out, re.MULTILINE)

    before = parts()
    train = min({f"sub-00{n}" for n in range(1, 5)} - set(" ".join(before).split()))
    save_nifti(label_path(data, train), 0 * array_of(label_path(data, train)))
    assert parts() == before


@pytest.mark.parametrize(("own", "expected"), [(True, "0.9 x 1.1 x 1.3 mm"), (False, "1 x 1 x 1")])
def test_working_grid_may_be_the_median_of_the_training_scans(own, expected, data, run, tmp_path):
    sides = {1: (0.9, 1.1, 1.3), 2: (2, 2, 2), 3: (0.9, 1.2, 1.3), 4: (3, 3, 3), 5: (0.8, 1, 1.2)}
    make_subject(data, "sub-005", seed=5)
    for number, spacing in sides.items():
        for path in (image_path(data, f"sub-00{number}"), label_path(data, f"sub-00{number}")):
            save_nifti(path, array_of(path), np.diag([*spacing, 1]))
    flags = ["--pix-dim", 0, 0, 0] if own else []
    status, out, _ = run("--epochs", 1, *split_flags(data, "1 3 5", "2", "4"), *flags)
    assert status in (0, 1)
    assert f"Grid            working grid, RAS, {expected}" in out
    checkpoint = tmp_path / "out" / "checkpoints" / "best_model.pth"
    recorded = train_pvs.read_checkpoint(checkpoint)["config"]["PIX_DIM"]
    assert recorded == ((0.9, 1.1, 1.3) if own else (1, 1, 1))
    if own:  # a scan of another spacing is predicted on the recorded grid and returned on its own
        machine = ["--output-dir", str(tmp_path / "out"), "--device", "cpu"]
        assert train_pvs.main(["--predict", str(image_path(data, "sub-004")), *machine]) == 0
        log = (tmp_path / "out" / "predict" / "logs" / "predict.log").read_text()
        assert f"Grid            working grid, RAS, {expected}" in log
        (mask,) = (tmp_path / "out" / "predict").rglob("*_mask.nii.gz")
        assert nib.affines.voxel_sizes(nib.load(mask).affine).tolist() == [3, 3, 3]
        assert run("--resume", "--epochs", 2, *split_flags(data, "1 3 5", "2", "4"), *flags)[0] < 2


def test_masks_that_are_all_empty_are_refused(data, run):
    for number in range(1, 5):
        path = label_path(data, f"sub-00{number}")
        save_nifti(path, 0 * array_of(path))
    expect_refused(run, data, "none is left in train, val, test")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_any_value_above_zero_is_foreground(data, run, tmp_path, dtype):
    assert run("--check", out=tmp_path / "before")[0] == 0
    path = label_path(data, "sub-001")
    mask = array_of(path)
    save_nifti(path, (mask * np.where(np.arange(20) % 2, 255, 2)).astype(dtype))
    assert run("--check")[0] == 0
    before, after = (cache_of(tmp_path / folder, "sub-001") for folder in ("before", "out"))
    assert torch.equal(before["label"], after["label"])
    assert after["label"].unique().tolist() == [0, 1]
    assert after["native_voxels"] == (mask > 0).sum()


def test_scaled_mask_is_read_by_its_slope(data, run, tmp_path):
    # nibabel stores 0.0 and 1.0 as 0 and 255 with a slope of 1/255.
    path = label_path(data, "sub-001")
    scaled = nib.Nifti1Image(array_of(path).astype(float), np.eye(4))
    scaled.set_data_dtype(np.uint8)
    nib.save(scaled, path)
    assert nib.load(path).dataobj.slope == pytest.approx(1 / 255)
    assert run("--check")[0] == 0
    assert cache_of(tmp_path / "out", "sub-001")["label"].unique().tolist() == [0, 1]


# -------------------------------------------------------------------------------------------- split


def cases_of(*subjects):
    return [{"subject": subject} for subject in subjects]


def subjects_of(cases):
    return {case["subject"] for case in cases}


def test_200_subjects_give_the_published_split():
    names = [f"sub-{number:03d}" for number in range(1, 201)]
    split = train_pvs.split_cases(cases_of(*reversed(names)), Config())
    test = "051 128 038 150 020 105 180 054 163 159"
    val = "189 185 111 109 174 139 062 081 146 004"
    assert subjects_of(split["test"]) == {f"sub-{number}" for number in test.split()}
    assert subjects_of(split["val"]) == {f"sub-{number}" for number in val.split()}
    rest = set(names) - subjects_of(split["test"]) - subjects_of(split["val"])
    assert subjects_of(split["train"]) == rest
    assert [len(split[part]) for part in ("train", "val", "test")] == [180, 10, 10]


@pytest.mark.parametrize("count", [3, 4, 17])
@pytest.mark.parametrize("seed", [0, 123])
def test_drawn_split_shares_no_subject_and_loses_none(count, seed):
    names = [f"sub-{number}" for number in range(count)]
    split = train_pvs.split_cases(cases_of(*names), Config(SEED=seed))
    assert all(split.values())
    assert sorted(case["subject"] for part in split.values() for case in part) == sorted(names)


def test_three_subjects_give_one_each(data, run):
    image_path(data, "sub-004").unlink()
    label_path(data, "sub-004").unlink()
    status, out, _ = run("--check")
    assert status == 0
    assert "1 train, 1 val, 1 test" in out


def test_fewer_than_three_subjects_are_refused(data, run):
    for subject in ("sub-003", "sub-004"):
        image_path(data, subject).unlink()
        label_path(data, subject).unlink()
    expect_refused(run, data, "expected at least 3 subjects", "sub-001, sub-002")


def test_fractions_that_leave_nothing_to_train_are_refused(data, run):
    # 0.6 of 4 subjects, rounded up, is 3; 0.6 of the other 1 is 1.
    flags = "--test-fraction", 0.6, "--val-fraction", 0.6
    expect_refused(run, "TEST_FRACTION", "VAL_FRACTION", flags=flags)


def test_split_file_is_obeyed(data, run, tmp_path, tiny_config):
    path = tmp_path / "split.json"
    content = {"train": ["sub-004"], "val": ["sub-001"], "test": ["sub-003"]}
    path.write_text(json.dumps(content))
    status, out, _ = run("--check", "--split", path)
    assert status == 0
    assert "1 train, 1 val, 1 test" in out
    assert f"left out, not in {path}: sub-002\n" in out
    cfg = tiny_config(DATA_DIR=str(data), SPLIT=str(path))
    split = train_pvs.split_cases(train_pvs.find_cases(cfg), cfg)
    assert {part: sorted(subjects_of(cases)) for part, cases in split.items()} == content


GOOD = {"train": ["sub-001", "sub-002"], "val": ["sub-003"], "test": ["sub-004"]}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"test": ["sub-999"]}, "sub-999: no subject with a mask"),
        ({"test": ["sub-001"]}, "sub-001: named more than once"),
        ({"train": ["sub-002", "sub-002"]}, "sub-002: named more than once"),
        ({"val": []}, "val: expected at least one subject"),
        ({"val": None}, "expected lists"),
    ],
)
def test_wrong_split_file_is_named(data, run, tmp_path, change, word):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(GOOD | change))
    expect_refused(run, path, word, flags=("--split", path))


@pytest.mark.parametrize(
    "content", [b"no JSON", b"[1, 2]", b'{"train": ["sub-001"]}', b"", b"\xff" * 2000]
)
def test_file_that_is_no_split_is_named_in_a_few_words(data, run, tmp_path, content):
    path = tmp_path / "split.json"
    path.write_bytes(content)
    err = expect_refused(run, path, "expected lists train, val and test", flags=("--split", path))
    assert len(err) < 1000


# -------------------------------------------------------------------------------------------- cache


def record_reads(monkeypatch):
    """Return a list that fills with the files whose voxels are read."""
    reads, read_volume = [], train_pvs.read_volume

    def record(path):
        reads.append(str(path))
        return read_volume(path)

    monkeypatch.setattr(train_pvs, "read_volume", record)
    return reads


def test_data_folder_is_not_written_to(data, run):
    def look():
        return {
            path: (os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in data.rglob("*")
        }

    before = look()
    assert run("--check")[0] == 0
    assert look() == before


def test_only_changed_files_are_read_again(data, run, monkeypatch):
    reads, path = record_reads(monkeypatch), image_path(data, "sub-002")
    assert run("--check")[0] == 0
    assert len(reads) == 8
    reads.clear()
    assert run("--check")[0] == 0
    assert reads == []
    save_nifti(path, np.flip(array_of(path), 0))
    assert run("--check")[0] == 0
    assert reads == [str(path), str(label_path(data, "sub-002"))]


def test_file_of_the_same_size_with_another_time_is_read_again(data, run, monkeypatch):
    reads, path = record_reads(monkeypatch), label_path(data, "sub-002")
    assert run("--check")[0] == 0
    reads.clear()
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert run("--check")[0] == 0
    assert str(path) in reads


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (["--pix-dim", 1, 1, 2], 8),
        (["--intensity-percentiles", 1, 99], 8),
        (["--img-patch-size", 16, 16, 32], 8),
        (["--seed", 5], 8),
        (["--epochs", 7, "--lr", 0.1, "--batch-size", 2], 0),
    ],
)
def test_cache_is_made_anew_for_the_settings_that_matter(data, run, monkeypatch, flags, count):
    reads = record_reads(monkeypatch)
    assert run("--check")[0] == 0
    reads.clear()
    assert run("--check", *flags)[0] == 0
    assert len(reads) == count


def test_cache_folder_can_be_chosen(data, run, tmp_path):
    assert run("--check", "--cache-dir", tmp_path / "elsewhere")[0] == 0
    assert len(list((tmp_path / "elsewhere").glob("sub-00?-*.pt"))) == 4
    assert not (tmp_path / "out" / "cache").exists()


def test_cache_is_the_same_with_and_without_workers(data, run, tmp_path):
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        assert run("--check", "--num-workers", workers, out=out)[0] == 0
    for number in range(1, 5):
        one, two = (cache_of(tmp_path / f"out{workers}", f"sub-00{number}") for workers in (0, 2))
        assert one.keys() == two.keys()
        for key in ("sha256", "label_sha256"):
            assert one.pop(key) == two.pop(key)
        for key, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[key]))


def test_scan_that_is_touched_after_the_check_does_not_end_the_run(data, run, monkeypatch):
    fit = train_pvs.fit

    def touch_and_fit(*args):
        for path in data.rglob("*.nii.gz"):
            os.utime(path, ns=(1, 1))
        return fit(*args)

    monkeypatch.setattr(train_pvs, "fit", touch_and_fit)
    status, _, err = run()
    assert status in (0, 1)
    assert err == "" or "No PVS were learned" in err


def test_one_scan_under_two_subjects_is_refused(data, run):
    copy = image_path(data, "sub-004")
    whole = gzip.decompress(image_path(data, "sub-002").read_bytes())
    copy.write_bytes(gzip.compress(whole, 1))  # other bytes, the same voxels
    status, _, err = run("--check")
    assert status == 2
    assert f"{copy}: expected other voxels than {image_path(data, 'sub-002')} has" in err


@pytest.mark.parametrize("scale", [1000, 0.001])
def test_voxels_of_impossible_size_are_refused_by_name(scale, data, run):
    path, affine = image_path(data, "sub-002"), np.diag([scale, scale, scale, 1])
    save_nifti(path, np.asarray(nib.load(path).dataobj), affine)
    status, _, err = run("--check")
    assert status == 2
    assert f"{path}: expected voxel sides of 0.05 to 20 mm" in err


def test_output_folder_that_is_the_data_folder_is_refused(data, run):
    before = sorted(data.rglob("*"))
    status, _, err = run("--check", out=data)
    assert status == 2
    assert "OUTPUT_DIR: expected another folder than DATA_DIR" in err
    assert sorted(data.rglob("*")) == before


def test_cache_entry_indexes_its_label(data, tiny_config, tmp_path):
    make_subject(data, "sub-005", shape=(30, 26, 24), seed=5)
    cfg = tiny_config(DATA_DIR=str(data), OUTPUT_DIR=str(tmp_path / "out"))
    entry = train_pvs.build_cache_entry(train_pvs.find_cases(cfg)[-1], cfg)
    flat = entry["label"].flatten()
    assert entry["foreground"].tolist() == flat.nonzero().flatten().tolist()
    assert len(entry["foreground"]) > 0
    assert sorted(entry["background"].tolist()) == (flat == 0).nonzero().flatten().tolist()
    assert entry["native_spacing"] == [1, 1, 1]
    assert (entry["image"].dtype, entry["label"].dtype) == (torch.float16, torch.uint8)


def test_background_sample_is_a_function_of_the_seed(data, tiny_config, monkeypatch):
    monkeypatch.setattr(train_pvs, "BACKGROUND_SAMPLE", 50)
    cfg = tiny_config(DATA_DIR=str(data))
    case = train_pvs.find_cases(cfg)[0]
    samples = [
        train_pvs.build_cache_entry(case, train_pvs.replace(cfg, SEED=seed))["background"]
        for seed in (1, 1, 2)
    ]
    assert [len(sample.unique()) for sample in samples] == [50] * 3
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
