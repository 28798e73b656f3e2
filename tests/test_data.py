"""Finding, pairing, reading, checking, caching and dividing the scans of a BIDS folder."""

import gzip
import json
import os
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

import train_pvs
from conftest import edited_copy, image_path, label_path, make_subjects, save_nifti, split_flags
from running import array_of, done, refused

NAN, INF = float("nan"), float("inf")
SHAPE = (24, 28, 20)  # of conftest's subjects


def scan(folder, number=2):
    return image_path(folder, f"sub-00{number}")


def mask(folder, number=2):
    return label_path(folder, f"sub-00{number}")


def resave(path, change=lambda array: array, affine=None):
    """Write the changed array of a file in its place."""
    save_nifti(path, change(array_of(path)), affine)


def put(array, places, value):
    array = array.astype(np.float64)
    array.flat[places] = value
    return array


def flip(whole, place):
    return whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place:][1:]


def voxels(path_of, change=lambda array: array, affine=None):
    return lambda folder: resave(path_of(folder), change, affine)


def content(path_of, change, suffix=".gz"):
    """Change the bytes of a file, or give it others; another suffix makes it a plain file."""

    def write(folder):
        path = path_of(folder)
        whole = path.read_bytes() if suffix else gzip.decompress(path.read_bytes())
        path.unlink()
        path = path if suffix else path.with_suffix("")
        path.write_bytes(change if isinstance(change, bytes) else change(whole))

    return write


def both(*changes):
    return lambda folder: tuple(change(folder) for change in changes)


def header(**values):
    """Set fields of the NIfTI-1 header of the scan."""

    def change(whole):
        whole = bytearray(gzip.decompress(whole))
        fields = np.frombuffer(whole, nib.nifti1.header_dtype, 1)
        for name, value in values.items():
            fields[name] = value
        return gzip.compress(whole, 1)

    return content(scan, change)


def instead(path_of, make):
    return lambda folder: (path_of(folder).unlink(), make(path_of(folder)))


def twin(path_of, name):
    return lambda folder: shutil.copy(path_of(folder), path_of(folder).with_name(name))


def rename_with_a_dot(folder):
    for path in (scan(folder), mask(folder)):
        path.rename(path.with_name(path.name.replace("sub-002", "sub-0.01")))


def make_sessions(folder):
    """Let sub-002 have two sessions, and a mask that names none."""
    for session in ("ses-1", "ses-2"):
        path = folder / "sub-002" / session / "anat" / f"sub-002_{session}_T2w.nii.gz"
        save_nifti(path, array_of(scan(folder, 3)))
    scan(folder).unlink()


def rename_outside_bids(folder):
    path = scan(folder, 1).rename(folder / "scan_T2w.nii.gz")
    label = mask(folder, 1).rename(folder / "mask.nii.gz")
    return ["--image-glob", path.name, "--label-glob", label.name]


def copy_voxels(folder):
    """Give sub-002 the voxels of sub-001 in a file of other bytes."""
    scan(folder).write_bytes(gzip.compress(gzip.decompress(scan(folder, 1).read_bytes()), 1))


@pytest.fixture
def check(data, run, tmp_path):
    """Look the data over with flags, or after a change, which may return flags, and undo it."""
    shutil.copytree(data, tmp_path / "whole")

    def call(change):
        words = change(data) if callable(change) else change
        try:
            return run("--check", *(words if isinstance(words, list) else []))
        finally:
            shutil.rmtree(data)
            shutil.copytree(tmp_path / "whole", data)  # with the times, by which caches go on

    return call


def expect_refusals(check, table):
    """Want status 2 and one error with all words, for each change of (words, *changes)."""
    for words, *changes in table:
        for change in changes:
            refused(check(change), *words.split("|"))


SCAN, MASK = "sub-002_T2w.nii.gz: ", "sub-002_desc-mask_PVS.nii.gz: "
ONE_SCAN, ONE_MASK = f"{MASK}expected one scan for this mask", f"{SCAN}expected one mask for"
TO_GET = "aws s3|openneuro-py|datalad|--demo"

NAMES = [  # words of the message, and what gives it
    (f"1 problem |{ONE_SCAN}, found none|Remove or rename", lambda folder: scan(folder).unlink()),
    (f"{ONE_MASK}|_label-b_desc|Remove", twin(mask, "sub-002_label-b_desc-mask_PVS.nii")),
    (f"{ONE_SCAN}|ses-1_T2w|ses-2_T2w", make_sessions),
    (f"4 scans sub-|0 masks deri|{TO_GET}", lambda folder: shutil.rmtree(folder / "derivatives")),
    (f"no-folder: no such folder|{TO_GET}", ["--data-dir", "no-folder"]),
    ("scan_T2w.nii.gz: expected a name with sub-|mask.nii.gz: expected a na", rename_outside_bids),
    ("sub-001_T2w|sub-0.01_T2w|names that differ, both would give sub-001", rename_with_a_dot),
    *((f"found 0 scans {p},", ["--image-glob", p]) for p in ("***", ".", "/scans/*")),
    ("expected other voxels than |sub-001_T2w|sub-002_T2w|Remove copies", copy_voxels),
]

UNREAD = "expected a NIfTI file, cannot be read ("
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(400)
OTHERS = (b"", b"no image\n" * 50, PNG, bytes(999))
MGH = gzip.compress(nib.MGHImage(np.ones(SHAPE, np.float32), np.eye(4)).to_bytes(), 1)
AIR = np.hypot(*np.random.default_rng(2).normal(0, 10, (2, *SHAPE))).astype(np.float32)
NO_3D, NOT_FINITE, HALF = "expected a 3D volume, got shape", "expected finite voxels", "at most 0.5"
LABELS = f"{MASK}expected labels of 0 and more in a mask"
SHIFT = nib.affines.from_matvec
TWO = np.diag([2, 2, 2, 1])
moved = voxels(mask, affine=SHIFT(2 * np.eye(3), (3, 4, 0)))
FLIP = SHIFT(np.diag([-1, 1, 1]), (23, 0, 0))

VOLUMES = [
    (f"1 problem |{SCAN}{UNREAD}|Repair", *(content(scan, other) for other in (*OTHERS, MGH))),
    (f"{MASK}{UNREAD}", content(mask, b"text"), instead(mask, os.mkfifo), instead(mask, os.mkdir)),
    (f"{SCAN}|datalad get|Repair", instead(scan, lambda path: path.symlink_to(".git/annex/gone"))),
    (f"1 problem |{SCAN}{UNREAD}|datalad get|Repair", content(scan, b"/annex/objects/a.nii.gz\n")),
    (f"{SCAN}expected a scan, all voxels are 7", voxels(scan, lambda a: 0 * a + 7)),
    (f"{SCAN}expected a head, got nothing but noise", voxels(scan, lambda a: AIR)),
    (f"{SCAN}{NOT_FINITE}, 2 are NaN or inf", voxels(scan, lambda a: put(a, [5, 99], NAN))),
    (f"{SCAN}{NOT_FINITE}", voxels(scan, lambda a: a * 1e300)),  # beyond float32
    (f"{MASK}expected whole numbers in a mask", voxels(mask, lambda a: a * np.float32(0.5))),
    (f"{LABELS}, got -1 (2 voxels)", voxels(mask, lambda a: put(a, [0, 1], -1))),
    (f"{LABELS}, got -1 (96 voxels)", voxels(mask, lambda a: -a)),  # three tubes of 2 x 2 x 8
    (f"{MASK}{NOT_FINITE}", voxels(mask, lambda a: put(a, [0, 1], -INF))),
    (f"{MASK}expected PVS in the head, all 3 ", voxels(mask, lambda a: put(0 * a, [0, 1, 2], 1))),
    (f"{SCAN}{NO_3D} (24, 28, 20, 2)", voxels(scan, lambda a: np.stack([a, a], -1))),
    (f"{MASK}expected the scan's shape {SHAPE}, got (23, 28", voxels(mask, lambda a: a[:-1])),
    (f"corners 23.00 voxels from|{HALF} (axes LAS, the scan's are RAS;", voxels(mask, affine=FLIP)),
    (f"{MASK}|corners 0.51 voxels|{HALF}", voxels(mask, affine=SHIFT(np.eye(3), (0, 0, 0.51)))),
    # (3, 4, 0) mm is 5 mm long: 2.5 voxels of 2 mm.
    (f"{MASK}|corners 2.50 voxels|{HALF}", both(voxels(scan, affine=TWO), moved)),
    (f"{SCAN}expected voxel sides of 0.05 to 20 mm", voxels(scan, affine=np.eye(4) / 1000)),
]

NOT_WHOLE = "cannot be read to its last byte (|expected a whole file, copy it again"
NO_INVERSE = "expected an affine that can be inverted"
DIM = (3, 24, 28, 20, 1, 1, 1, 1)
HEADERS = [
    (f"{SCAN}expected at most 536870912 voxels", header(dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))),
    (f"{SCAN}{NO_3D}", *(header(dim=(3, n, *DIM[2:])) for n in (0, 1)), header(dim=(0, *DIM[1:]))),
    (f"{SCAN}expected", header(dim=(99, *DIM[1:])), header(magic=b"abc"), header(scl_inter=NAN)),
    (SCAN + NOT_WHOLE, header(dim=(3, 24, 28, 30, 1, 1, 1, 1))),
    (f"{SCAN}{NO_INVERSE}", *(header(srow_x=(n, 0, 0, 0)) for n in (0, NAN, INF))),
    (f"{SCAN}{NO_INVERSE}", header(srow_x=(1, 1, 0, 0), srow_y=(0, 1e-7, 0, 0))),  # no angle
    (f"{SCAN}{UNREAD}", header(sform_code=0, qform_code=1, quatern_b=5), header(datatype=9999)),
    (f"{SCAN}expected voxels that are real numbers", header(datatype=32, bitpix=64)),  # complex
]

CUTS = [  # All voxels come before the last 8 bytes: a reader that stops there sees no damage.
    (SCAN + NOT_WHOLE, *(content(scan, lambda c, n=n: c[:n]) for n in (9000, -9, -8, -1))),
    (SCAN + NOT_WHOLE, *(content(scan, lambda c, n=n: flip(c, n)) for n in (-8, -1, 9000))),
    (SCAN + NOT_WHOLE, content(scan, lambda c: c + c[:100])),  # a second stream that is not whole
    (f"{SCAN}{UNREAD}", *(content(scan, lambda c, n=n: c[:n]) for n in (5, 10, 60))),
    (f"{SCAN}{UNREAD}|it is not gzipped: name it .nii)", content(scan, gzip.decompress)),
    (f"_T2w.nii: {UNREAD}|it is gzipped: name", lambda f: scan(f).rename(scan(f).with_suffix(""))),
    (f"{SCAN}{UNREAD}", content(scan, gzip.compress)),
    ("_T2w.nii: " + NOT_WHOLE, *(content(scan, lambda c, n=n: c[:n], "") for n in (352, 9000, -1))),
    ("_T2w.nii: " + UNREAD, *(content(scan, lambda c, n=n: c[:n], "") for n in (10, 347))),
]

TABLES = {"names": NAMES, "volumes": VOLUMES, "headers": HEADERS, "cuts": CUTS}


@pytest.mark.parametrize("table", TABLES)
def test_bad_data_are_refused_by_the_name_of_the_file(table, check, caplog, recwarn):
    expect_refusals(check, TABLES[table])
    remarks = [record.getMessage() for record in caplog.records if record.name != "train_pvs"]
    remarks += [str(w.message) for w in recwarn if w.category is not ResourceWarning]
    assert remarks == []  # of libraries


def test_all_problems_of_a_data_set_are_told_at_once(data, run):
    scan(data, 1).write_text("text")
    mask(data, 1).write_text("text")
    header(dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))(data)  # of sub-002
    resave(scan(data, 3), lambda a: 0 * a)
    resave(mask(data, 3), lambda a: a * np.float32(0.5))
    scan(data, 4).write_bytes(scan(data, 4).read_bytes()[:-20])
    lines = refused(run("--check", "--num-workers", 2)).splitlines()
    assert lines[0] == "Error: 6 problems in the data:"
    bad = [scan(data, 1), mask(data, 1), scan(data, 2), scan(data, 3), mask(data, 3), scan(data, 4)]
    assert sorted(line.split(": ")[0].strip() for line in lines[1:-1]) == sorted(map(str, bad))
    assert lines[-1].startswith("Repair these files")


def stored(image_type, label_type="u1", kind=nib.Nifti1Image, **fields):
    """Store sub-002 with these types of voxels, and its scan with these fields of the header."""

    def change(folder):
        for path, code in ((scan(folder), image_type), (mask(folder), label_type)):
            head = kind.header_class(endianness=">" if code.startswith(">") else "<")
            array = array_of(path).astype(code)
            nib.save(kind(array, np.eye(4), head, dtype=array.dtype), path)
        if fields:
            header(**fields)(folder)

    return change


def turned(codes):
    """Store sub-002 with its axes in this order."""
    axes = (nib.orientations.axcodes2ornt(letters) for letters in ("RAS", codes))
    turn = nib.orientations.ornt_transform(*axes)

    def change(folder):
        for path in (scan(folder), mask(folder)):
            nib.save(nib.load(path).as_reoriented(turn), path)

    return change


def reshaped(*ones):
    return both(*(voxels(at, lambda a: a.reshape(*a.shape, *ones)) for at in (scan, mask)))


def move_elsewhere(folder):
    """Put links in place of sub-002's files, as DataLad does."""
    for number, path in enumerate((scan(folder), mask(folder))):
        shutil.move(path, folder.parent / f"object{number}")
        path.symlink_to(folder.parent / f"object{number}")


COLUMNS = np.arange(24, dtype=np.int16)[:, None, None]
STRETCH = np.diag([1 + 0.2 / 23, 1, 1, 1])  # by 0.2 voxels over the 23 between the end's centres
OFF = "its affine puts corners 0.20 voxels from the scan's; the scan's is used for both"
plain = both(*(content(at, lambda c: c, "") for at in (scan, mask)))
GOOD = [  # words of the warning, and the ways to store sub-002 that give it
    ("", *(stored(*types.split()) for types in "u2 u1,i4 i1,i8 u8,f4 f4,f8 f8,>i2 >f4".split(","))),
    ("", stored("i2", "u1", nib.Nifti2Image), stored(">f4", ">i2", nib.Nifti2Image)),
    ("", *(stored("i2", scl_slope=n, scl_inter=-10) for n in (2, 0.001))),
    ("", *(stored("i2", scl_slope=n) for n in (0, NAN, INF))),  # which scale nothing
    ("", reshaped(1), reshaped(1, 1, 1, 1), plain, move_elsewhere),
    ("", turned("LAS"), turned("LPI"), turned("PIR")),
    ("", voxels(mask, lambda a: a * (1 + np.arange(20, dtype=np.int16) % 8))),
    (OFF, voxels(mask, affine=STRETCH)),
    ("has the labels 1, 3; all count", voxels(mask, lambda a: a * (1 + 2 * (COLUMNS % 2)))),
]


def test_volume_is_the_same_however_it_is_stored(data, tmp_path, tiny_config):
    # 0.485 mm: on the mask's own grid it would be a voxel longer, 23 / 0.485 is 47.4, 23.2 47.8.
    cfg = tiny_config(DATA_DIR=str(data), OUTPUT_DIR=str(tmp_path), PIX_DIM=(0.485, 1, 1))
    shutil.copytree(data, tmp_path / "whole")

    def prepared():
        (case,) = train_pvs.prepare_cases(train_pvs.find_cases(cfg)[1:2], cfg)
        entry = train_pvs.load_cached(case)
        shutil.rmtree(tmp_path / "cache")
        return entry["image"], entry["label"], case

    image, label, expected = prepared()
    for words, *changes in GOOD:
        for number, change in enumerate(changes):
            change(data)
            other_image, other_label, case = prepared()
            assert torch.allclose(image, other_image, atol=2e-3), (words, number)
            assert torch.equal(label, other_label), (words, number)
            assert case.native_voxels == expected.native_voxels, (words, number)
            assert [words in told for told in case.warnings] == [True] * bool(words), number
            shutil.rmtree(data)
            shutil.copytree(tmp_path / "whole", data)


def test_drawn_split_loses_no_scan_and_keeps_those_of_a_subject_together(tmp_path, tiny_config):
    for number in range(8):
        subject, session = f"sub-00{number // 2}", f"ses-{number % 2}"
        name, masks = f"{subject}_{session}", tmp_path / "derivatives" / "mask"
        train_pvs.write_file(tmp_path / subject / session / "anat" / f"{name}_T2w.nii.gz", "")
        train_pvs.write_file(masks / subject / session / f"{name}_desc-mask_PVS.nii.gz", "")
    cfg, drawn = tiny_config(DATA_DIR=str(tmp_path)), []
    cases = train_pvs.find_cases(cfg)
    assert [c.name for c in cases] == [f"sub-00{n // 2}_ses-{n % 2}" for n in range(8)]
    assert all(f"{case.name}_desc" in case.label for case in cases)
    for seed in range(5):
        split = train_pvs.split_cases(cases, train_pvs.replace(cfg, SEED=seed))
        drawn.append({part: sorted(case.name for case in split[part]) for part in split})
        assert [len(part) for part in split.values()] == [4, 2, 2]
        assert len({(part, case.subject) for part in split for case in split[part]}) == 4
    assert any(split != drawn[0] for split in drawn)
    # 200 subjects have the published split.
    names = [f"sub-{number:03d}" for number in range(1, 201)]
    cases = [train_pvs.Case(name, name, f"{name}.nii") for name in reversed(names)]
    split = train_pvs.split_cases(cases, train_pvs.Config())
    numbers = {part: sorted(case.subject[4:] for case in cases) for part, cases in split.items()}
    assert numbers["test"] == "020 038 051 054 105 128 150 159 163 180".split()
    assert numbers["val"] == "004 062 081 109 111 139 146 174 185 189".split()
    assert sorted(f"sub-{number}" for part in numbers.values() for number in part) == names


def test_odd_but_usable_data_give_a_warning_on_screen_and_in_the_log(data, run, tmp_path):
    make_subjects(data, 5)
    mask(data, 4).unlink()
    for at in (scan, mask):
        resave(at(data, 1), affine=TWO)
        resave(at(data, 2), lambda a: np.pad(a, 8))  # more air than the margin around the head
    resave(mask(data, 2), lambda a: put(a, [0, 1, 2], 1))
    resave(mask(data, 3), lambda a: 0 * a + 1)
    log = tmp_path / "out" / "logs" / "check.log"
    for begun in ("files", "cache"):
        log.unlink(missing_ok=True)
        out = done(run("--check"))
        assert "2 train, 1 val, 1 test" in out
        for told in (
            f"left out, no mask: {scan(data, 4)}",
            f"{scan(data, 1)} has voxels of 2 x 2 x 2 mm, far from 1 x 1 x 1 mm",
            rf"{mask(data, 2)}: 3 of \d+ voxels lie outside the head and are left out",
            rf"{mask(data, 3)}: [\d.]+ % of the head is PVS, expected less than 5",
        ):
            for text in (out, log.read_text()):
                assert re.search(f"^Warning: {told}$", text, re.MULTILINE), (begun, told)


def test_scans_without_pvs_are_only_tested(data, run, tmp_path):
    make_subjects(data, 7)
    place = np.ravel_multi_index((11, 13, 9), SHAPE)
    for number, value in ((2, 0), (3, 0), (4, 1), (5, 1)):
        resave(mask(data, number), lambda a, value=value: put(0 * a, place, value))
    split = split_flags(tmp_path, train="1 2 4", val="3 6", test="5")
    for pix_dim, left_out in ((1, [2]), (2.1, [2, 4])):  # whose voxel centres miss the only one
        _, out, _ = run("--check", *split, "--pix-dim", pix_dim)
        assert f"left out, not in {tmp_path / 'split.json'}: sub-007\n" in out
        parts = re.findall(r"^  (?:val|test) +(.*)$", out, re.MULTILINE)
        assert parts == ["sub-006", "sub-005"]
        told = re.findall("^Warning: left out of (?:train|val), .*: (.*)$", out, re.MULTILINE)
        assert told == [str(mask(data, number)) for number in (*left_out, 3)]
        assert f"{3 - len(left_out)} train, 1 val, 1 test" in out
    split = split_flags(tmp_path, train="2 4", val="3", test="5")
    err = refused(run("--check", *split, "--pix-dim", 2.1))
    assert re.search(r"none is left in train, val\. Choose other .*--split .* --seed", err), err


def test_wrong_split_is_refused_in_a_few_words(check):
    good = {"train": ["sub-001", "sub-002"], "val": ["sub-003"], "test": ["sub-004"]}

    def split(content=b"", **parts):
        def write(folder):
            path = folder.parent / "split.json"
            path.write_bytes(json.dumps(good | parts).encode() if parts else content)
            return ["--split", path]

        return write

    def without(*numbers):
        return both(*(lambda folder, n=n: mask(folder, n).unlink() for n in numbers))

    lists, content = "split.json: expected lists train, val and test (", b'{"train":' * 100_000
    table = [
        ("not a usable split:|sub-999: no subject with a mask", split(test=["sub-999"])),
        ("sub-001: named more than once", split(test=["sub-001"]), split(train=2 * ["sub-001"])),
        ("val: expected at least one subject", split(val=[])),
        ("[['sub-004']]: no subject with a mask", split(test=[[["sub-004"]]])),
        (lists, split(val=None), split(val="sub-003")),
        (lists, *(split(c) for c in (b"[1, 2]", b"sub-001", b"", b"\xff" * 2000, content))),
        ("SPLIT: expected a JSON file that exists", lambda folder: ["--split", folder]),
        ("expected at least 3 subjects|sub-001, sub-002", without(3, 4)),
        # 0.6 of 4 subjects, rounded up, is 3; 0.6 of the other 1 is 1.
        ("expected at least 3 sub", "--test-fraction 0.6 --val-fraction 0.6".split()),
    ]
    expect_refusals(check, table)
    assert "1 train, 1 val, 1 test" in done(check(without(4)))
    assert "2 train, 1 val, 1 test" in done(check(split(train=["001", "sub-0-02"])))
    marked = split(b"\xef\xbb\xbf" + json.dumps(good).encode())  # with a byte order mark
    assert "2 train, 1 val, 1 test" in done(check(marked))


def test_mask_is_of_the_scan_of_its_own_name_and_no_scan_itself(data, run):
    twin(scan, "sub-002_acq-a_T2w.nii.gz")(data)
    for path in [*data.rglob("*_PVS.nii.gz")]:
        shutil.move(path, image_path(data, path.name[:7]).with_name(path.name))
    flags = ("--image-glob", "sub-*/anat/*.nii.gz", "--label-glob", "sub-*/anat/*_PVS.nii.gz")
    out = done(run("--check", *flags))
    assert re.search("left out, no mask: .*sub-002_acq-a_T2w(.|\n)*2 train, 1 val, 1 test", out)
    refused(run("--check", *flags[:3], flags[1]), "LABEL_GLOB finds every scan, too; narrow it")


def test_disk_that_cannot_hold_the_cache_is_told(data, run, monkeypatch):
    done(run("--check"))
    monkeypatch.setattr(train_pvs, "free_disk", lambda _: 3e6)
    done(run("--check"))  # all is there
    refused(run("--check", "--pix-dim", 2), "the cache takes some", "--cache-dir")


def test_only_what_matters_prepares_anew_and_data_stay_as_they_are(data, run, tmp_path):
    def times_of(folder):
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    cache, before = {}, times_of(data)

    def new(*flags):
        """Return the subjects whose prepared volumes a run has written."""
        done(run("--check", "--cache-dir", tmp_path / "cache", *flags))
        found = times_of(tmp_path / "cache")
        made = sorted(path.name[:7] for path in found if found[path] != cache.get(path))
        cache.update(found)
        return made

    everyone = [f"sub-00{n}" for n in range(1, 5)]
    assert (new(), new()) == (everyone, [])
    other = "--seed 5 --img-patch-size 32 --epochs 7 --lr 0.1 --num-workers 2"
    assert new(*other.split(), "--architecture", "dynunet") == []
    assert times_of(data) == before
    assert not (tmp_path / "out" / "cache").exists()
    (path,) = (tmp_path / "cache").glob("sub-002-*")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        new("--num-workers", 2)
        assert path.read_bytes() == whole  # as made without workers
    assert new("--pix-dim", 1, 1, 2) == everyone
    assert new("--intensity-percentiles", 1, 99) == everyone
    stat = scan(data, 3).stat()
    os.utime(scan(data, 3), ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert new() == ["sub-003"]
    resave(mask(data), lambda a: np.flip(a, 0))
    assert new() == ["sub-002"]


def test_edited_transforms_make_a_new_cache(data, tmp_path, tiny_config):
    cfg = tiny_config(DATA_DIR=str(data), OUTPUT_DIR=str(tmp_path))
    case = train_pvs.find_cases(cfg)[0]
    kept = edited_copy(tmp_path, ("import argparse\n", "import argparse  # the same\n"))
    assert kept.cache_path(case, cfg) == train_pvs.cache_path(case, cfg)
    paths = {train_pvs.cache_path(case, cfg)}
    lines = ["def read_volume(path):", "def head_mask(image):", "def build_transforms(cfg):"]
    lines += ["def scale_intensity(image, percentiles):", "def to_working_grid(volumes, cfg):"]
    edits = [(line, line.replace("):", ", more=0):")) for line in lines]
    for edit in (*edits, ('INTERPOLATION = ("bilinear",', 'INTERPOLATION = ("nearest",')):
        paths.add(edited_copy(tmp_path, edit).cache_path(case, cfg))
    assert len(paths) == 7
