"""Whatever files, names and settings hold, a run ends soon, with a line for each problem."""

import functools
import gzip
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_pvs
from conftest import TINY, image_path, label_path, make_subject, save_nifti

MEND = (
    r"Repair these files \(a mask must be on its scan's grid\) or move them elsewhere. "
    r"Nothing was done."
)
PAIRS = r"Remove or rename files, or narrow IMAGE_GLOB and LABEL_GLOB. Nothing was done."
UNREAD = "expected a NIfTI file, cannot be read"
NO_NIFTI = UNREAD + r" \(.+\)"
NOT_WHOLE = r"cannot be read to its last byte \(.+\); expected a whole file, copy it again"
NAN, INF = float("nan"), float("inf")


def cases(table):
    """Return the parameters of a table {id: values}."""
    return [
        pytest.param(*(values if isinstance(values, tuple) else (values,)), id=name)
        for name, values in table.items()
    ]


@contextmanager
def time_limit(seconds=10):
    """Fail where something waits for ever or is read without end."""

    def stop(*_):
        pytest.fail(f"not done after {seconds} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@pytest.fixture
def start(capsys):
    """Call main with these words within a time limit; returns (status, stdout, stderr)."""

    def call(*words, seconds=10):
        with time_limit(seconds):
            status = train_pvs.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return call


build_model = functools.cache(train_pvs.build_model)


@functools.cache
def step_memory(cfg, measure=train_pvs.step_memory):
    return measure(build_model(cfg), cfg)


def bare(cfg):
    """Return the settings without the folders, which do not change the network."""
    return train_pvs.replace(cfg, DATA_DIR="", OUTPUT_DIR="", CACHE_DIR="")


@pytest.fixture
def run(start, tmp_path, monkeypatch):
    """Call main with the tiny settings as conftest's fixture does, but within a time limit.

    Equal networks that are only looked at are built once: that takes half of the time.
    """

    def call(*flags, data=tmp_path / "data", out=tmp_path / "out", seconds=10):
        if "--check" in flags:
            monkeypatch.setattr(train_pvs, "build_model", lambda cfg: build_model(bare(cfg)))
            monkeypatch.setattr(train_pvs, "step_memory", lambda _, cfg: step_memory(bare(cfg)))
        folders = "--data-dir", data, "--output-dir", out
        return start(*folders, *TINY, *flags, seconds=seconds)

    return call


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Return a data set of four subjects that no test changes."""
    folder = tmp_path_factory.mktemp("clean") / "data"
    for number in range(1, 5):
        make_subject(folder, f"sub-{number:03d}", seed=number)
    return folder


@pytest.fixture
def data(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "data")


@pytest.fixture
def scan(data):
    return image_path(data, "sub-002")


@pytest.fixture
def mask(data):
    return label_path(data, "sub-002")


def array_of(path):
    return np.asarray(nib.load(path).dataobj)


def expect_lines(result, *patterns, status=2):
    """Want a status, and that stderr has these lines and no other."""
    got, _, err = result
    lines = err.removesuffix("\n").split("\n")
    assert got == status, err
    assert len(lines) == len(patterns), err
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}"


def expect_problem(result, path, told, remedy=MEND):
    """Want the one problem of a data set to be told in a line that starts with the file's name."""
    line = f"  {re.escape(train_pvs.one_line(path))}: {told}"
    expect_lines(result, "Error: 1 problem in the data:", line, remedy)


def expect_warning(result, folder, told):
    """Want a run to go on with a warning on the screen and in its log file."""
    status, out, err = result
    assert (status, err) == (0, "")
    for text in (out, (folder / "logs" / "train.log").read_text(encoding="utf-8")):
        assert re.search(f"^Warning: {told}$", text, re.MULTILINE), text


# ----------------------------------------------------------------------------------------- headers


def edit_header(path, suffix=".nii.gz", order="<", **values):
    """Set fields of a NIfTI-1 header by name, write the file with this suffix, return its path."""
    whole = bytearray(gzip.decompress(path.read_bytes()))
    header = np.frombuffer(whole, nib.nifti1.header_dtype.newbyteorder(order), 1)
    for name, value in values.items():
        header[name] = value
    path.unlink()
    path = path.with_name(path.name.removesuffix(".nii.gz") + suffix)
    path.write_bytes(gzip.compress(whole) if suffix.endswith(".gz") else whole)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("datatype", "bitpix"), [(4, 16), (64, 64)], ids=["int16", "float64"])
def test_header_that_claims_a_gigantic_volume_is_refused(scan, run, suffix, datatype, bitpix):
    size = {"dim": (3, 32767, 32767, 32767, 1, 1, 1, 1), "datatype": datatype, "bitpix": bitpix}
    path = edit_header(scan, suffix, **size)
    told = f"expected at most {train_pvs.LARGEST_VOLUME} voxels, got shape .32767, 32767, 32767."
    expect_problem(run("--check"), path, told)


QFORM = {"sform_code": 0, "qform_code": 1}  # the affine is that of the quaternion
NO_AFFINE = {"sform_code": 0, "qform_code": 0}  # it is made of the voxel sides alone
NO_3D = r"expected a 3D volume, got shape \(.*\)"
NO_INVERSE = r"expected an affine that can be inverted, got \[.*\]"
SIDES = r"expected voxel sides of 0.05 to 20 mm, got \[.*\] \(another unit\?\)"
PIXDIM = r"expected .*\(pixdim\), got \[.*"
OFFSET = rf"({NO_NIFTI}|expected .*vox_offset.*)"
AXES = rf"({NO_NIFTI}|expected .*axes.*)"

HEADERS = {  # id: what is told, fields
    "side 0": (PIXDIM, {"pixdim": (1, 0, 1, 1, 1, 1, 1, 1)}),
    "side 0 without affine": (PIXDIM, {"pixdim": (1, 0, 1, 1, 1, 1, 1, 1)} | NO_AFFINE),
    "side below 0": (PIXDIM, {"pixdim": (1, -1, -1, -1, 1, 1, 1, 1)}),
    "side NaN": (PIXDIM, {"pixdim": (1, NAN, 1, 1, 1, 1, 1, 1)}),
    "side NaN without affine": (
        rf"({PIXDIM}|{NO_INVERSE})",
        {"pixdim": (1, NAN, 1, 1, 1, 1, 1, 1)} | NO_AFFINE,
    ),
    "side infinite": (PIXDIM, {"pixdim": (1, INF, 1, 1, 1, 1, 1, 1)}),
    "side infinite without affine": (
        rf"({PIXDIM}|{NO_INVERSE})",
        {"pixdim": (1, INF, 1, 1, 1, 1, 1, 1)} | NO_AFFINE,
    ),
    "axis of length 0": (NO_3D, {"dim": (3, 0, 28, 20, 1, 1, 1, 1)}),
    "axis of length below 0": (NO_3D, {"dim": (3, -24, 28, 20, 1, 1, 1, 1)}),
    "axis of length 1": (NO_3D, {"dim": (3, 1, 28, 20, 1, 1, 1, 1)}),
    "fourth axis of length 0": (NO_3D, {"dim": (4, 24, 28, 20, 0, 1, 1, 1)}),
    "no axes": (NO_3D, {"dim": (0, 24, 28, 20, 1, 1, 1, 1)}),
    "two axes": (NO_3D, {"dim": (2, 24, 28, 20, 1, 1, 1, 1)}),
    "seven axes": (NO_3D, {"dim": (7, 24, 28, 20, 2, 2, 2, 2)}),
    "eight axes": (AXES, {"dim": (8, 24, 28, 20, 1, 1, 1, 1)}),
    "-1 axes": (AXES, {"dim": (-1, 24, 28, 20, 1, 1, 1, 1)}),
    "axes in the other byte order": (AXES, {"dim": (3, 24, 28, 20, 1, 1, 1, 1), "order": ">"}),
    "singular affine": (NO_INVERSE, {"srow_x": (0, 0, 0, 0)}),
    "affine with NaN": (NO_INVERSE, {"srow_x": (NAN, 0, 0, 0)}),
    "affine with an infinite offset": (
        r"expected an affine that can be inverted, got .*inf.*",
        {"srow_x": (1, 0, 0, INF)},
    ),
    "axes that nearly coincide": (NO_INVERSE, {"srow_x": (1, 1, 0, 0), "srow_y": (0, 1e-7, 0, 0)}),
    "quaternion of no rotation": (NO_NIFTI, {"quatern_b": 5, "quatern_c": 5} | QFORM),
    "quaternion with NaN": (NO_INVERSE, {"quatern_b": NAN} | QFORM),
    "micrometres": (SIDES, {"srow_x": (1e3, 0, 0, 0), "srow_y": (0, 1e3, 0, 0)}),
    "metres": (SIDES, {"srow_x": (1e-3, 0, 0, 0), "srow_y": (0, 1e-3, 0, 0)}),
    "field of half a metre": (
        r"expected a field of view of at most 500 mm, got \[24.0, 560.0, 20.0\]",
        {"srow_y": (0, 20, 0, 0)},
    ),
    "immense voxels": (SIDES, {"srow_x": (3e38, 0, 0, 0)}),
    "unknown data type": (NO_NIFTI, {"datatype": 9999}),
    "data type below 0": (NO_NIFTI, {"datatype": -4}),
    "one bit a voxel": (NO_NIFTI, {"datatype": 1, "bitpix": 1}),
    "RGB": (r"expected voxels that are real numbers, got .*", {"datatype": 128, "bitpix": 24}),
    "complex": (r"expected voxels that are real numbers, got .*", {"datatype": 32, "bitpix": 64}),
    "wider data type than its voxels": (NOT_WHOLE, {"datatype": 64, "bitpix": 64}),
    "offset 0": (OFFSET, {"vox_offset": 0}),
    "offset in the header": (OFFSET, {"vox_offset": 348}),
    "offset below 0": (OFFSET, {"vox_offset": -352}),
    "offset huge": (rf"({NOT_WHOLE}|{OFFSET})", {"vox_offset": 1e30}),
    "offset hugely below 0": (OFFSET, {"vox_offset": -1e30}),
    "offset NaN": (OFFSET, {"vox_offset": NAN}),
    "offset infinite": (OFFSET, {"vox_offset": INF}),
    "wrong size of the header": (NO_NIFTI, {"sizeof_hdr": 347}),
    "size of a NIfTI-2 header": ("expected .*", {"sizeof_hdr": 540}),
    "no magic": (NO_NIFTI, {"magic": b""}),
    "magic of NIfTI-2": (NO_NIFTI, {"magic": b"n+2"}),
    "magic of a pair of files": ("expected .*(NIfTI|magic).*", {"magic": b"ni1", "vox_offset": 0}),
    "intercept NaN": (NO_NIFTI, {"scl_slope": 1, "scl_inter": NAN}),
    "intercept infinite": (NO_NIFTI, {"scl_slope": 1, "scl_inter": INF}),
    "slope huge": (r"expected finite voxels, \d+ are NaN or infinite", {"scl_slope": 1e38}),
    "intercept huge": (r"expected a scan, all voxels are 1e\+30", {"scl_inter": 1e30}),
}


@pytest.mark.parametrize(("told", "fields"), cases(HEADERS))
def test_nonsense_in_a_header_is_told_by_the_files_name(scan, run, told, fields):
    path = edit_header(scan, **fields)
    expect_problem(run("--check"), path, told)


@pytest.mark.parametrize("slope", [NAN, INF, 0])
def test_slope_that_is_no_number_scales_nothing(scan, run, tmp_path, slope):
    edit_header(scan, scl_slope=slope)
    assert run("--check")[::2] == (0, "")
    (entry,) = (tmp_path / "out" / "cache").glob("sub-002-*.pt")
    assert torch.load(entry, weights_only=True)["image"].unique().numel() > 2


def extend_header(path, size, content):
    """Put an extension of this content behind the header, which says that it has this size."""
    whole = bytearray(gzip.decompress(path.read_bytes()))
    header = np.frombuffer(whole, nib.nifti1.header_dtype, 1)
    header["vox_offset"] = 352 + 8 + len(content)
    header = whole[:348] + b"\1\0\0\0" + size.to_bytes(4, "little", signed=True) + b"\6\0\0\0"
    path.write_bytes(gzip.compress(header + content + whole[352:]))


@pytest.mark.parametrize("size", [2**31 - 16, -16, 0], ids=["huge", "below 0", "none"])
def test_header_extension_of_absurd_size_is_refused(scan, run, size):
    extend_header(scan, size, bytes(8))
    expect_problem(run("--check"), scan, NO_NIFTI)


@pytest.mark.parametrize("size", cases({"16 bytes": 16, "2 MiB": (2**21)}))
def test_header_extension_is_passed_over(scan, run, size):
    extend_header(scan, size, bytes(size - 8))
    assert run("--check")[::2] == (0, "")


# ------------------------------------------------------------------------------------------- files


def tar_of(content):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("scan.nii")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def flip(content, place):
    content = bytearray(content)
    content[place] ^= 0x55
    return bytes(content)


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(400)
NOISE = np.random.default_rng(1).bytes(5000)

FILES = {  # id: what is told, how the file ends, its content from the compressed and the plain one
    "empty.gz": (NO_NIFTI, ".nii.gz", lambda gz, plain: b""),
    "empty": (NO_NIFTI, ".nii", lambda gz, plain: b""),
    "10 bytes.gz": (NO_NIFTI, ".nii.gz", lambda gz, plain: gz[:10]),
    "10 bytes": (NO_NIFTI, ".nii", lambda gz, plain: plain[:10]),
    "text.gz": (NO_NIFTI, ".nii.gz", lambda gz, plain: b"no image\n" * 100),
    "text": (NO_NIFTI, ".nii", lambda gz, plain: b"no image\n" * 100),
    "PNG.gz": (NO_NIFTI, ".nii.gz", lambda gz, plain: PNG),
    "PNG": (NO_NIFTI, ".nii", lambda gz, plain: PNG),
    "tar": (NO_NIFTI, ".nii", lambda gz, plain: tar_of(plain)),
    "tar.gz": (NO_NIFTI, ".nii.gz", lambda gz, plain: gzip.compress(tar_of(plain))),
    "noise.gz": (NO_NIFTI, ".nii.gz", lambda gz, plain: NOISE),
    "noise": (NO_NIFTI, ".nii", lambda gz, plain: NOISE),
    "zeros": (NO_NIFTI, ".nii", lambda gz, plain: bytes(5000)),
    "plain named gz": (NO_NIFTI, ".nii.gz", lambda gz, plain: plain),
    "gz named plain": (NO_NIFTI, ".nii", lambda gz, plain: gz),
    "gz in gz": (NO_NIFTI, ".nii.gz", lambda gz, plain: gzip.compress(gz)),
    "cut in the gzip header": (NO_NIFTI, ".nii.gz", lambda gz, plain: gz[:5]),
    "cut in the NIfTI header.gz": (NO_NIFTI, ".nii.gz", lambda gz, plain: gz[:60]),
    "cut in the NIfTI header": (NO_NIFTI, ".nii", lambda gz, plain: plain[:347]),
    "cut after the NIfTI header": (NOT_WHOLE, ".nii", lambda gz, plain: plain[:352]),
    "cut in the voxels.gz": (NOT_WHOLE, ".nii.gz", lambda gz, plain: gz[: len(gz) // 2]),
    "cut in the voxels": (NOT_WHOLE, ".nii", lambda gz, plain: plain[: len(plain) // 2]),
    "cut by a byte.gz": (NOT_WHOLE, ".nii.gz", lambda gz, plain: gz[:-1]),
    "cut by a byte": (NOT_WHOLE, ".nii", lambda gz, plain: plain[:-1]),
    "cut before the checksum": (NOT_WHOLE, ".nii.gz", lambda gz, plain: gz[:-8]),
    "wrong checksum": (NOT_WHOLE, ".nii.gz", lambda gz, plain: flip(gz, -8)),
    "wrong length": (NOT_WHOLE, ".nii.gz", lambda gz, plain: flip(gz, -1)),
    "wrong compression": (NO_NIFTI, ".nii.gz", lambda gz, plain: flip(gz, 2)),
    "garbage at the start of the stream": (NO_NIFTI, ".nii.gz", lambda gz, plain: flip(gz, 12)),
    "garbage in the middle of the stream": (
        NOT_WHOLE,
        ".nii.gz",
        lambda gz, plain: gz[: len(gz) // 2] + NOISE[:50] + gz[len(gz) // 2 + 50 :],
    ),
    "2 MB too many": (NOT_WHOLE, ".nii", lambda gz, plain: plain + bytes(2_000_000)),
    "begun second stream": (NOT_WHOLE, ".nii.gz", lambda gz, plain: gz + gz[:100]),
}


@pytest.mark.parametrize(("told", "suffix", "make"), cases(FILES))
def test_file_that_is_no_whole_nifti_is_told_by_its_name(scan, run, told, suffix, make):
    content = scan.read_bytes()
    scan.unlink()
    path = scan.with_name(scan.name.removesuffix(".nii.gz") + suffix)
    path.write_bytes(make(content, gzip.decompress(content)))
    expect_problem(run("--check"), path, told)


def bomb_of(content):
    """Return a gzip stream of the content and 200 MB of zeros."""
    packer = zlib.compressobj(1, wbits=31)
    zeros = bytes(10_000_000)
    return b"".join(
        [packer.compress(content), *(packer.compress(zeros) for _ in range(20)), packer.flush()]
    )


@pytest.fixture(scope="module")
def bomb(clean):
    return bomb_of(gzip.decompress(image_path(clean, "sub-002").read_bytes()))


@pytest.mark.parametrize("path_of", [image_path, label_path], ids=["scan", "mask"])
def test_gzip_bomb_is_refused(data, run, bomb, path_of):
    path = path_of(data, "sub-002")
    path.write_bytes(bomb)
    expect_problem(run("--check", seconds=10), path, NOT_WHOLE)


@pytest.mark.parametrize(
    "make",
    cases(
        {
            "some bytes.gz": lambda gz, plain: gz + b"junk",
            "5 MB.gz": lambda gz, plain: gz + NOISE * 1000,
            "another stream": lambda gz, plain: gz + gzip.compress(b"junk"),
            "some bytes": lambda gz, plain: plain + b"junk",
        }
    ),
)
def test_bytes_after_the_end_give_a_warning(scan, run, tmp_path, make):
    content = scan.read_bytes()
    content = make(content, gzip.decompress(content))
    scan.unlink()
    path = scan if content[:2] == b"\x1f\x8b" else scan.with_suffix("")
    path.write_bytes(content)
    told = f"{re.escape(str(path))}: bytes after the last voxel are passed over"
    expect_warning(run("--check"), tmp_path / "out", told)


# --------------------------------------------------------------------------------- links and pipes


def link_to_itself(path):
    path.symlink_to(path.name)


THINGS = {
    "link to itself": (link_to_itself, "symbolic links"),
    "dangling link": (lambda path: path.symlink_to("gone"), "datalad get"),
    "pipe": (os.mkfifo, "a folder, pipe or device in place of a file"),
    "folder": (Path.mkdir, "a folder, pipe or device in place of a file"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "a folder, pipe or device"),
}


@pytest.mark.parametrize("path_of", [image_path, label_path], ids=["scan", "mask"])
@pytest.mark.parametrize(("make", "reason"), cases(THINGS))
def test_what_is_no_regular_file_is_told_by_its_name(data, run, path_of, make, reason):
    path = path_of(data, "sub-002")
    path.unlink()
    make(path)
    expect_problem(run("--check", seconds=10), path, rf"{UNREAD} \(.*{reason}.*\)")


def test_folder_that_is_a_link_to_itself_holds_no_scan(data, run, scan, mask):
    shutil.rmtree(scan.parent)
    link_to_itself(scan.parent)
    expect_problem(run("--check"), mask, "expected one scan for this mask, found none", PAIRS)


def test_link_to_a_folder_above_is_not_followed_for_ever(data, run):
    (data / "sub-002" / "round").symlink_to(data)
    assert run("--check")[::2] == (0, "")


@pytest.mark.parametrize("make", cases({name: make for name, (make, _) in THINGS.items()}))
def test_description_that_is_no_file_names_no_data_set(data, run, make):
    make(data / "dataset_description.json")
    status, out, err = run("--check", seconds=10)
    assert (status, err) == (0, "")
    assert re.search(r"^Data +data$", out, re.MULTILINE)


# ------------------------------------------------------------------------------------- permissions


@pytest.fixture
def public(clean):
    """Return a folder with a data set that all may read and an output folder that all may use."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    shutil.copytree(clean, folder / "data")
    (folder / "out").mkdir()
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o644 if path.is_file() else 0o755)
    (folder / "out").chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def binding_permissions():
    """Let permissions bind, which they do not for root: another user's rights for a while."""
    if os.geteuid():
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:
        pytest.skip("root here may not take another user's rights, and permissions bind none")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def run_without_rights(public, run):
    """Call main on the public folder with this path closed to all, as a user who is not root."""
    run("--check", data=public / "data", out=public / "first")  # so that all modules are loaded

    def call(closed, mode, *flags):
        closed.chmod(mode)
        try:
            with binding_permissions():
                return run(*flags, data=public / "data", out=public / "out")
        finally:
            closed.chmod(0o755)

    return call


@pytest.mark.parametrize("path_of", [image_path, label_path], ids=["scan", "mask"])
def test_file_that_may_not_be_read_is_told_by_its_name(public, run_without_rights, path_of):
    path = path_of(public / "data", "sub-002")
    result = run_without_rights(path, 0, "--check")
    expect_problem(result, path, rf"{UNREAD} \(Permission denied\)")


def test_folder_that_may_not_be_listed_holds_no_scan(public, run_without_rights):
    folder = image_path(public / "data", "sub-002").parent
    result = run_without_rights(folder, 0, "--check")
    told = "expected one scan for this mask, found none"
    expect_problem(result, label_path(public / "data", "sub-002"), told, PAIRS)


def test_description_that_may_not_be_read_names_no_data_set(public, run_without_rights):
    path = public / "data" / "dataset_description.json"
    path.write_text('{"Name": "secret"}')
    status, out, err = run_without_rights(path, 0, "--check")
    assert (status, err) == (0, "")
    assert "secret" not in out


def test_output_folder_that_may_not_be_written_to_is_refused(public, run_without_rights):
    result = run_without_rights(public / "out", 0o555, "--check")
    told = rf"Error: OUTPUT_DIR: expected a folder to write to \(.*{public / 'out'}.*\)"
    expect_lines(result, told)


def test_cache_folder_that_may_not_be_written_to_ends_the_run(public, run_without_rights):
    (public / "cache").mkdir()
    result = run_without_rights(public / "cache", 0o555, "--check", "--cache-dir", public / "cache")
    told = rf"Error: {public}/cache/sub-001-\w+.pt: cannot be written \(Permission denied\); .*"
    expect_lines(result, told, ".*--cache-dir.*", "Nothing had begun: .*", status=1)


@pytest.mark.parametrize(
    ("flags", "told"),
    cases(
        {
            "split": (["--split"], "expected lists train, val and test .*"),
            "encoder weights": (
                ["--encoder-weights"],
                "expected the state dict of a 2D EfficientNet .*Permission denied.*",
            ),
            "checkpoint": (
                ["--evaluate", "--checkpoint"],
                "expected a checkpoint of this script, .*Permission denied.*",
            ),
        }
    ),
)
def test_file_of_a_setting_that_may_not_be_read_is_told(public, run_without_rights, flags, told):
    path = public / "closed"
    path.write_text("content")
    status, _, err = run_without_rights(path, 0, *flags, path)
    assert status == 2, err
    assert re.match(f"Error: {path}: {told}\n", err)


# ------------------------------------------------------------------------------------------ voxels

SHAPE = (24, 28, 20)


def label_corner(mask):
    mask = mask.copy()
    mask[0, 0, :3] = 1
    return mask


def noise_of_air(image):
    real, imaginary = np.random.default_rng(2).normal(0, 10, (2, *image.shape))
    return np.hypot(real, imaginary).astype(np.float32)


FLIPPED = nib.affines.from_matvec(np.diag([-1, 1, 1]), (23, 0, 0))
SHIFTED = nib.affines.from_matvec(np.eye(3), (3, 0, 0))
NOT_FINITE = r"expected finite voxels, \d+ are NaN or infinite"

VOXELS = {  # id: what is told, of scan or mask, new array, affine
    "constant": ("expected a scan, all voxels are 7", image_path, lambda a: 0 * a + 7),
    "all zero": ("expected a scan, all voxels are 0", image_path, lambda a: 0 * a),
    "air": ("expected a head, got nothing but noise", image_path, noise_of_air),
    "one bright voxel": (
        "expected a head, got nothing but noise",
        image_path,
        lambda a: np.where(np.arange(a.size).reshape(a.shape) == 5000, 30000, 0).astype(np.int16),
    ),
    "NaN in a scan": (NOT_FINITE, image_path, lambda a: np.where(a > 500, NAN, a)),
    "NaN in a mask": (NOT_FINITE, label_path, lambda a: np.where(a > 0, NAN, a)),
    "beyond float32": (NOT_FINITE, image_path, lambda a: a * 1e300),
    "fractions": ("expected whole numbers in a mask, got fractions", label_path, lambda a: a * 0.3),
    "mask in the air": (
        "expected PVS in the head, all 3 voxels lie outside",
        label_path,
        lambda a: label_corner(0 * a),
    ),
    "4D": (NO_3D, image_path, lambda a: np.stack([a, a], -1)),
    "2D": (NO_3D, label_path, lambda a: a[..., 0]),
    "other shape": ("expected the scan's shape .*, got .*", label_path, lambda a: a[:-1]),
    "left-right flipped mask": (
        r"its affine puts corners 23.00 voxels .* \(axes LAS, the scan's are RAS\)",
        label_path,
        lambda a: a,
        FLIPPED,
    ),
    "shifted mask": (
        "its affine puts corners 3.00 voxels from the scan's, expected at most 0.5",
        label_path,
        lambda a: a,
        SHIFTED,
    ),
}


@pytest.mark.parametrize(
    ("told", "path_of", "change", "affine"),
    cases({k: v if len(v) == 4 else (*v, None) for k, v in VOXELS.items()}),
)
def test_voxels_that_cannot_be_are_told_by_the_files_name(data, run, told, path_of, change, affine):
    path = path_of(data, "sub-002")
    save_nifti(path, change(array_of(path)), affine)
    expect_problem(run("--check"), path, told)


def test_one_scan_under_two_subjects_is_refused(data, run, scan):
    shutil.copy(image_path(data, "sub-001"), scan)
    told = f"expected other voxels than {image_path(data, 'sub-001')} has"
    remedy = "Remove copies: one could be trained on and the other tested. Nothing was done."
    expect_problem(run("--check"), scan, told, remedy)


def test_all_problems_of_a_data_set_are_told_at_once(data, run):
    text, claim, const, short = (image_path(data, f"sub-00{n}") for n in (1, 2, 3, 4))
    text.write_text("text")
    edit_header(claim, dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))
    save_nifti(const, np.ones(SHAPE, np.int16))
    short.write_bytes(short.read_bytes()[:-20])
    half = label_path(data, "sub-003")
    save_nifti(half, array_of(half) * np.float32(0.5))
    names = (text, claim, const, half, short)
    lines = (rf"  {re.escape(str(path))}: .*expected .*" for path in names)
    expect_lines(run("--check"), "Error: 5 problems in the data:", *lines, MEND)


def test_mask_partly_cut_off_with_the_air_gives_a_warning(run, scan, mask, tmp_path):
    for path in (scan, mask):  # more air than the margin around the head
        save_nifti(path, np.pad(array_of(path), 8))
    save_nifti(mask, label_corner(array_of(mask)))
    told = rf"{re.escape(str(mask))}: 3 of \d+ voxels lie outside the head and are left out"
    expect_warning(run("--check"), tmp_path / "out", told)


def test_mask_of_several_values_gives_a_warning(run, mask, tmp_path):
    save_nifti(mask, array_of(mask) * np.arange(1, 21, dtype=np.int16))
    told = rf"{re.escape(str(mask))}: \d+ values \(.*\), all count as PVS"
    expect_warning(run("--check"), tmp_path / "out", told)


def test_spacing_far_from_the_others_gives_a_warning(run, scan, mask, tmp_path):
    for path in (scan, mask):
        save_nifti(path, array_of(path), np.diag([2, 2, 2, 1]))
    told = rf"{re.escape(str(scan))} has voxels of 2 x 2 x 2 mm, far from 1 x 1 x 1 mm"
    expect_warning(run("--check"), tmp_path / "out", told)


def test_mask_of_much_of_the_head_gives_a_warning_also_from_the_cache(
    run, mask, tmp_path, monkeypatch
):
    save_nifti(mask, 0 * array_of(mask) + 1)
    told = rf"{re.escape(str(mask))}: .* % of the head is PVS, expected less than 5"
    expect_warning(run("--check"), tmp_path / "out", told)
    (tmp_path / "out" / "logs" / "train.log").unlink()
    monkeypatch.setattr(train_pvs, "read_volume", lambda path: pytest.fail("read again"))
    expect_warning(run("--check"), tmp_path / "out", told)


@pytest.mark.parametrize(
    "damage",
    cases(
        {
            "cut off": lambda entry: entry[: len(entry) // 2],
            "empty": lambda entry: b"",
            "text": lambda entry: b"text",
            "a byte flipped": lambda entry: flip(entry, len(entry) // 2),
            "unknown compression": (lambda entry: flip(entry, entry.index(b"PK\1\2") + 10),),
        }
    ),
)
def test_damaged_cache_entry_is_made_anew(data, run, tmp_path, damage):
    assert run("--check")[0] == 0
    (entry,) = (tmp_path / "out" / "cache").glob("sub-002-*.pt")
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert run("--check")[::2] == (0, "")
    assert entry.read_bytes() == whole


# ------------------------------------------------------------------------------------------- names

ACCENT, BRAIN = "\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{CJK UNIFIED IDEOGRAPH-8111}"
ODD = f"a \"b\" 'c' $x_{{\\frac{{\n\t{ACCENT} {BRAIN}"
UNDECODABLE = os.fsdecode(b"\xff\xfe")  # in file names only


def test_data_set_with_odd_names_is_trained_on_tested_and_drawn(data, run, tmp_path):
    odd = data.rename(tmp_path / (ODD + UNDECODABLE))
    for subject, words in {"sub-001": ODD, "sub-002": UNDECODABLE}.items():
        for path in (image_path(odd, subject), label_path(odd, subject)):
            path.rename(path.with_name(path.name.replace(subject, f"{subject}_acq-{words}")))
    out = tmp_path / f"out {ODD}"
    status, _, err = run(data=odd, out=out, seconds=60)
    assert status in (0, 1)
    assert err == "" or err.startswith("No PVS were learned")
    for name in (
        "checkpoints/best_model.pth",
        "logs/train.log",
        "logs/comprehensive_test_metrics.json",
        "test_set_visualization_grid_300dpi.jpg",
        "training_curves.jpg",
        "agreement.jpg",
    ):
        assert (out / name).stat().st_size > 100
    assert len(list(out.glob("predictions/**/*_mask.nii.gz"))) == 1
    assert len(list(out.glob("multi_plane/*.png"))) == 1


@pytest.mark.parametrize("name", ["OUTPUT_DIR", "CACHE_DIR"])
def test_folder_to_write_to_of_an_undecodable_name_is_refused(data, run, tmp_path, name):
    flag = "--" + name.lower().replace("_", "-")
    told = f"  {name}: expected a name in UTF-8, got .*"
    result = run("--check", flag, tmp_path / UNDECODABLE)
    expect_lines(result, "Error: wrong settings:", told)


@pytest.mark.parametrize(
    ("flags", "told"),
    cases(
        {
            "data folder": (["--check", "--data-dir"], "no such folder"),
            "checkpoint": (["--evaluate", "--checkpoint"], "no such file"),
            "split": (["--check", "--split"], "SPLIT: expected a JSON file"),
            "device": (["--check", "--device"], "DEVICE: expected"),
        }
    ),
)
def test_setting_with_a_line_end_is_told_in_one_line(data, run, flags, told):
    status, _, err = run(*flags, "a\nb")
    assert status == 2
    (line,) = (line for line in err.split("\n") if told in line)
    assert "a\\nb" in line


@pytest.mark.parametrize("words", [ODD, UNDECODABLE], ids=["odd", "undecodable"])
def test_bad_file_with_an_odd_name_is_told_in_one_line(scan, run, mask, words):
    mask.rename(mask.with_name(mask.name.replace("sub-002", f"sub-002_acq-{words}")))
    scan = scan.rename(scan.with_name(scan.name.replace("sub-002", f"sub-002_acq-{words}")))
    scan.write_text("text")
    result = run("--check")
    expect_problem(result, scan, NO_NIFTI)
    assert "\\n" in result[2] or words != ODD


def test_scan_that_is_left_out_is_told_in_one_line(scan, run, mask, tmp_path):
    save_nifti(mask, 0 * array_of(mask))
    for path in (scan, mask):
        path.rename(path.with_name(path.name.replace("sub-002", "sub-002_acq-a\nb")))
    told = r"left out, empty mask: .*sub-002_acq-a\\nb_desc-mask_PVS.nii.gz"
    expect_warning(run("--check"), tmp_path / "out", told)


def test_name_too_long_for_what_is_made_of_it_is_refused(scan, run, mask):
    for path in (scan, mask):
        path.rename(path.with_name(path.name.replace("sub-002", "sub-" + 225 * "x")))
    result = run("--check")
    assert result[0] == 2
    assert re.search(r"x_T2w.nii.gz: expected .*name", result[2])


@pytest.mark.parametrize(
    "name", cases({"letters and digits the same": "sub-0.01", "no letters": f"sub-{ACCENT}"})
)
def test_subject_whose_results_would_have_no_name_of_their_own_is_refused(scan, run, mask, name):
    for path in (scan, mask):
        path.rename(path.with_name(path.name.replace("sub-002", name)))
    result = run("--check")
    assert result[0] == 2
    assert re.search(f"{name}_T2w.nii.gz.* expected .*name", result[2])


# ---------------------------------------------------------------------------------------- settings

IMPOSSIBLE = {
    "LR": ["nan", "inf", "-1", "0", "1e400", "1e-400", "fast", "", "9" * 5000],
    "PIX_DIM": ["inf 1 1", "1 nan 1", "1 1 -1", "0 0 1", "0.05 1 1"],
    "IMG_PATCH_SIZE": ["-16 16 16", "16 16 1000000000", "17 16 16"],
    "EPOCHS": ["-5", "1.5", "nan", "1" + "0" * 30],
    "SEED": ["-1", "4294967296"],
    "NUM_WORKERS": ["-1"],
    "DEVICE": ["cuda:99999999999999999999", "cpu:-1", "meta", UNDECODABLE],
    "TEST_FRACTION": ["nan", "-0.5", "1"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name} {value[:20]!a}")
        for name, values in IMPOSSIBLE.items()
        for value in values
    ],
)
def test_impossible_setting_is_told_by_its_name(data, run, name, value):
    flag = "--" + name.lower().replace("_", "-")
    result = run("--check", flag, *(value.split() or [""]))
    expect_lines(result, "Error: wrong settings:", f"  {name}: expected .*, got .+")


def test_all_impossible_settings_are_told_at_once(data, run):
    flags = "--lr nan --pix-dim inf 1 1 --epochs -1 --sw-overlap 2 --device moon"
    names = ("PIX_DIM", "EPOCHS", "LR", "SW_OVERLAP", "DEVICE")
    lines = (f"  {name}: expected .*, got .+" for name in names)
    expect_lines(run("--check", *flags.split()), "Error: wrong settings:", *lines)


GLOBS = {
    "empty": ("", "IMAGE_GLOB: expected a value, got nothing"),
    "absolute": ("/**/*.nii.gz", "IMAGE_GLOB: expected a pattern below DATA_DIR, got /.*"),
    "the folder itself": (".", r"(IMAGE_GLOB|\.): expected .*"),
    "the folder itself with a slash": ("./", r"(IMAGE_GLOB|\./): expected .*"),
    "three stars": ("***", r"\*\*\*: expected a pattern for files .*"),
    "folders only": ("**", r".*: expected scans and masks, found 0 scans \*\*, 4 masks .*"),
    "unclosed bracket": ("sub-[", ".*: expected scans and masks, found 0 scans .*, 4 masks .*"),
    "undecodable": (UNDECODABLE, ".*: expected scans and masks, found 0 scans .*, 4 masks .*"),
    "longer than a name": (300 * "x", ".*: expected .*"),
}


@pytest.mark.parametrize(("pattern", "told"), cases(GLOBS))
def test_absurd_pattern_is_told(data, run, pattern, told):
    status, _, err = run("--check", "--image-glob", pattern)
    assert status == 2, err
    assert re.match(f"Error: (wrong settings:\n  )?{told}\n", err), err


def test_pattern_that_takes_masks_for_scans_is_told_by_every_mask(data, run):
    result = run("--check", "--image-glob", "**/*")
    told = "  .*_desc-mask_PVS.nii.gz: expected one scan for this mask, found .* and .*"
    expect_lines(result, "Error: 4 problems in the data:", *4 * [told], PAIRS)


PLACES = {  # id: what it is made of, status, the first line; {} is the path
    "output folder is a file": ("--output-dir", Path.touch, "", 2, "OUTPUT_DIR: expected .*{}.*"),
    "output folder below a file": (
        "--output-dir",
        Path.touch,
        "below",
        2,
        "OUTPUT_DIR: expected .*{}.*",
    ),
    "output folder is a pipe": ("--output-dir", os.mkfifo, "", 2, "OUTPUT_DIR: expected .*{}.*"),
    "output folder is a link to itself": (
        "--output-dir",
        link_to_itself,
        "",
        2,
        "(?s:.*)OUTPUT_DIR: expected .*",
    ),
    "data folder is a file": ("--data-dir", Path.touch, "", 2, r"{}: no such folder \(DATA_DIR\)"),
    "data folder is a pipe": ("--data-dir", os.mkfifo, "", 2, r"{}: no such folder \(DATA_DIR\)"),
    "data folder is a link to itself": (
        "--data-dir",
        link_to_itself,
        "",
        2,
        r"{}: no such folder \(DATA_DIR\)",
    ),
    "name of the data folder is too long": (
        "--data-dir",
        Path.mkdir,
        300 * "x",
        2,
        r"{}: no such folder \(DATA_DIR\)",
    ),
    "cache folder is a file": ("--cache-dir", Path.touch, "", 1, "{}.*: cannot be written .*"),
    "cache folder below a file": (
        "--cache-dir",
        Path.touch,
        "below",
        1,
        "{}.*: cannot be written .*",
    ),
}


@pytest.mark.parametrize(("flag", "make", "below", "expected", "told"), cases(PLACES))
def test_folder_that_cannot_be_used_is_told(data, run, tmp_path, flag, make, below, expected, told):
    make(tmp_path / "place")
    path = tmp_path / "place" / below
    status, _, err = run("--check", flag, path, seconds=10)
    assert status == expected, err
    assert re.match("Error: " + told.replace("{}", re.escape(str(path))), err), err


def write_split(content):
    return lambda path: path.write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )


GOOD_SPLIT = {"train": ["sub-001", "sub-002"], "val": ["sub-003"], "test": ["sub-004"]}
NO_LISTS = [r"Error: .*/split: expected lists train, val and test \(.+\)"]
UNUSABLE = r"Error: .*/split: not a usable split:"
UNKNOWN = "no subject with a mask"

SPLITS = {  # id: what is made, the lines
    "text": (write_split(b"sub-001"), NO_LISTS),
    "empty": (write_split(b""), NO_LISTS),
    "undecodable": (write_split(b"\xff" * 2000), NO_LISTS),
    "list": (write_split([1, 2]), NO_LISTS),
    "number": (write_split(7), NO_LISTS),
    "texts": (write_split(dict.fromkeys(GOOD_SPLIT, "sub-001")), NO_LISTS),
    "nested lists": (
        write_split(GOOD_SPLIT | {"test": [[["sub-004"]]]}),
        [UNUSABLE, rf"  \[\['sub-004'\]\]: {UNKNOWN}"],
    ),
    "deeply nested": (write_split(b'{"train":' * 100_000), NO_LISTS),
    "huge numbers": (
        write_split(b'{"train": [1e999], "val": [-0.0], "test": [NaN]}'),
        [UNUSABLE, *(f"  {word}: {UNKNOWN}" for word in ("-0.0", "inf", "nan"))],
    ),
    "5000 digits": (write_split(b'{"train": [' + b"9" * 5000 + b"]}"), NO_LISTS),
    "unknown subject": (
        write_split(GOOD_SPLIT | {"test": ["sub-999"]}),
        [UNUSABLE, f"  sub-999: {UNKNOWN}"],
    ),
    "subject of two lines": (
        write_split(GOOD_SPLIT | {"test": ["sub\n999"]}),
        [UNUSABLE, rf"  sub\\n999: {UNKNOWN}"],
    ),
    "pipe": (os.mkfifo, ["Error: wrong settings:", "  SPLIT: expected a JSON file .*, got .*"]),
    "folder": (Path.mkdir, ["Error: wrong settings:", "  SPLIT: expected a JSON file .*, got .*"]),
    "link to itself": (
        link_to_itself,
        ["Error: wrong settings:", "  SPLIT: expected a JSON file .*, got .*"],
    ),
}


@pytest.mark.parametrize(("make", "lines"), cases(SPLITS))
def test_useless_split_file_is_told_by_its_name(data, run, tmp_path, make, lines):
    make(tmp_path / "split")
    expect_lines(run("--check", "--split", tmp_path / "split", seconds=10), *lines)


NO_FILE = ["Error: wrong settings:", "  ENCODER_WEIGHTS: expected .* a file that exists, got .*"]
NO_STATE = [
    r"Error: .*/weights: expected the state dict of a 2D EfficientNet .*\(.*\).",
    "Remove or replace the file, or use --encoder-weights none.",
]


@pytest.mark.parametrize(
    ("make", "lines"),
    cases(
        {
            "pipe": (os.mkfifo, NO_FILE),
            "folder": (Path.mkdir, NO_FILE),
            "text": (lambda path: path.write_text("weights"), NO_STATE),
            "list": (lambda path: torch.save([1, 2], path), NO_STATE),
            "other network": (lambda path: torch.save({"weight": torch.ones(3)}, path), NO_STATE),
        }
    ),
)
def test_useless_encoder_weights_are_told_by_their_name(data, run, tmp_path, make, lines):
    make(tmp_path / "weights")
    expect_lines(run("--check", "--encoder-weights", tmp_path / "weights", seconds=10), *lines)


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a checkpoint of an untrained network with the tiny settings, and its content."""
    path = tmp_path_factory.mktemp("weights") / "best_model.pth"
    argv = ["--data-dir", "data", "--output-dir", "out", *TINY]
    cfg, _ = train_pvs.parse_command_line(argv)
    split = {"test": [{"name": "sub-001", "sha256": "1f2e"}]}
    row = {"epoch": 1, "val_dice": 0.5}
    train_pvs.save_checkpoint(path, train_pvs.build_model(cfg), cfg, split, row)
    return path, torch.load(path, weights_only=True)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("code was run",)


def settings_of(**values):
    """Return what writes a checkpoint in which settings have other values."""

    def write(path, content):
        torch.save(content | {"config": content["config"] | values}, path)

    return write


def parts_of(**parts):
    """Return what writes a checkpoint that has other parts."""
    return lambda path, content: torch.save(content | parts, path)


def weights_of(change):
    """Return what writes a checkpoint with changed weights."""

    def write(path, content):
        model = {name: change(tensor) for name, tensor in content["model"].items()}
        torch.save(content | {"model": model}, path)

    return write


def write_flipped(path, content):
    torch.save(content, path)
    path.write_bytes(flip(path.read_bytes(), path.stat().st_size // 2))


NO_CHECKPOINT = [r"Error: {}: expected a checkpoint of this script, damaged or of another \(.*\)"]
MISFIT = [r"Error: {}: its weights do not fit the network it names \(.*\)"]

CHECKPOINTS = {  # id: what is written, the lines
    "empty": (lambda path, _: path.write_bytes(b""), NO_CHECKPOINT),
    "text": (lambda path, _: path.write_text("weights"), NO_CHECKPOINT),
    "zeros": (lambda path, _: path.write_bytes(bytes(5000)), NO_CHECKPOINT),
    "truncated": (
        lambda path, content: (torch.save(content, path), os.truncate(path, 5000)),
        NO_CHECKPOINT,
    ),
    "bytes flipped": (write_flipped, NO_CHECKPOINT),
    "pickle with code": (
        lambda path, _: path.write_bytes(pickle.dumps({"model": Malicious()}, 2)),
        NO_CHECKPOINT,
    ),
    "checkpoint with code": (parts_of(model=Malicious()), NO_CHECKPOINT),
    "state dict only": (lambda path, content: torch.save(content["model"], path), NO_CHECKPOINT),
    "list": (lambda path, _: torch.save([1, 2], path), NO_CHECKPOINT),
    "folder": (lambda path, _: path.mkdir(), NO_CHECKPOINT),
    "pipe": (lambda path, _: os.mkfifo(path), NO_CHECKPOINT),
    "link to itself": (lambda path, _: link_to_itself(path), NO_CHECKPOINT),
    "dangling link": (
        lambda path, _: path.symlink_to("gone"),
        ["Error: {}: no such file, expected a checkpoint; train first, or name one .*"],
    ),
    "other encoder": (settings_of(ENCODER_NAME="efficientnet-b1"), MISFIT),
    "other weights": (parts_of(model={"weight": torch.ones(3)}), MISFIT),
    "weights that are numbers": (parts_of(model={"weight": 3}), MISFIT),
    "weights of other shapes": (weights_of(lambda tensor: tensor[None]), MISFIT),
    "weights that are NaN": (weights_of(lambda tensor: tensor * NAN), [r"Error: {}: .*NaN.*"]),
    "spacing is text": (
        settings_of(PIX_DIM="1 1 1"),
        ["Error: wrong settings:", "  PIX_DIM: expected .*, got 1 1 1"],
    ),
    "spacing of two axes": (
        settings_of(PIX_DIM=(1.0, 1.0)),
        ["Error: wrong settings:", "  PIX_DIM: expected .*"],
    ),
    "spacing is NaN": (
        settings_of(PIX_DIM=(NAN, 1, 1)),
        ["Error: wrong settings:", "  PIX_DIM: expected .*, got nan 1 1"],
    ),
    "folder is a number": (
        settings_of(DATA_DIR=5, IMAGE_GLOB=5),
        ["Error: wrong settings:", "  DATA_DIR: expected .*", "  IMAGE_GLOB: expected .*"],
    ),
    "encoder is a number": (
        settings_of(ENCODER_NAME=5),
        ["Error: wrong settings:", "  ENCODER_NAME: expected .*, got 5"],
    ),
    "seed is a tuple": (settings_of(SEED=(1,)), ["Error: wrong settings:", "  SEED: expected .*"]),
    "folds are text": (
        settings_of(FOLDS="5", FOLD=1),
        ["Error: wrong settings:", "  FOLDS: expected .*, got 5"],
    ),
    "fold is a tuple": (
        settings_of(FOLDS=(5,), FOLD=(1,)),
        ["Error: wrong settings:", "  FOLDS: expected .*", "  FOLD: expected .*"],
    ),
    "no such network": (
        settings_of(ARCHITECTURE="unet"),
        ["Error: wrong settings:", "  ARCHITECTURE: expected .*, got unet"],
    ),
    "network is a list": (
        settings_of(ARCHITECTURE=["dynunet"]),
        ["Error: wrong settings:", "  ARCHITECTURE: expected .*"],
    ),
    "spacing that was not found": (
        settings_of(PIX_DIM=(0.0, 0.0, 0.0)),
        ["Error: wrong settings:", "  PIX_DIM: expected .*, got 0 0 0"],
    ),
    "hash is a list": (
        parts_of(sha256={"train": {"sub-1": [1]}, "val": {}, "test": {}}),
        NO_CHECKPOINT,
    ),
    "unknown setting": (
        settings_of(WIDTH=1),
        ["Error: wrong settings:", "  WIDTH: in the checkpoint, unknown here"],
    ),
    "setting is no word": (
        parts_of(config={1: 2}),
        ["Error: wrong settings:", "  1: in the checkpoint, unknown here"],
    ),
    "no epoch": (parts_of(history_row={}), NO_CHECKPOINT),
    "epoch is text": (parts_of(history_row={"epoch": "last", "val_dice": None}), NO_CHECKPOINT),
    "hashes are numbers": (parts_of(sha256={"train": 1, "val": 2, "test": 3}), NO_CHECKPOINT),
}


@pytest.mark.parametrize(("write", "lines"), cases(CHECKPOINTS))
def test_useless_checkpoint_is_told_by_its_name_and_runs_no_code(
    weights, clean, start, tmp_path, monkeypatch, write, lines
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    write(path, weights[1])
    scan, out = image_path(clean, "sub-001"), tmp_path / "out"
    result = start("--predict", scan, "--checkpoint", path, "--output-dir", out, seconds=10)
    expect_lines(result, *(line.replace("{}", re.escape(str(path))) for line in lines))
    assert not (tmp_path / "code was run").exists()


OTHER_FILES = cases(  # in place of a state to go on from
    {
        "text": lambda path, _: path.write_text("weights"),
        "weights only": (lambda path, content: torch.save(content, path),),
    }
)


@pytest.mark.parametrize("write", OTHER_FILES)
def test_starting_from_what_is_no_checkpoint_is_refused(weights, data, run, tmp_path, write):
    path = tmp_path / "weights.pth"
    write(path, weights[1] | {"model": {}})
    status, _, err = run("--init-from", path)
    assert status == 2
    assert err.startswith(f"Error: {path}: ")


@pytest.mark.parametrize("part", ["test", "val"])
def test_evaluating_with_a_checkpoint_that_lacks_a_part_of_the_split(part, weights, data, tmp_path):
    content = weights[1] | {"sha256": dict(weights[1]["sha256"])}
    content["sha256"].pop(part, None)
    content["config"] = {k: v for k, v in content["config"].items() if k != "DATA_DIR"}
    torch.save(content, tmp_path / "weights.pth")
    flags = "--device cpu --num-workers 0 --no-amp".split()
    flags += ["--data-dir", str(data), "--output-dir", str(tmp_path / "out")]
    assert (
        train_pvs.main(["--evaluate", "--checkpoint", str(tmp_path / "weights.pth"), *flags]) == 0
    )


@pytest.mark.parametrize("write", OTHER_FILES)
def test_resuming_from_what_is_no_state_of_a_run_is_refused(weights, data, run, tmp_path, write):
    path = tmp_path / "out" / "checkpoints" / "last.pth"
    path.parent.mkdir(parents=True)
    write(path, weights[1])
    expect_lines(run("--resume"), NO_CHECKPOINT[0].replace("{}", re.escape(str(path))))


# -------------------------------------------------------------------------------------- prediction


@pytest.fixture
def predict(weights, start, tmp_path):
    """Segment scans with the untrained network; returns (status, stdout, stderr)."""

    def call(*scans, seconds=10):
        flags = "--checkpoint", weights[0], "--output-dir", tmp_path / "out"
        return start("--predict", *scans, *flags, seconds=seconds)

    return call


GIVE = "Give NIfTI files and BIDS folders; scans that would bear one name in separate runs. .*"
NO_SCAN = "expected a .nii or .nii.gz file, or a BIDS folder"


@pytest.mark.parametrize(
    ("name", "make", "told"),
    cases(
        {
            "missing": ("scan.nii", lambda path: None, NO_SCAN),
            "pipe": ("scan.nii", os.mkfifo, NO_SCAN),
            "link to itself": ("scan.nii", link_to_itself, NO_SCAN),
            "dangling link": ("scan.nii", lambda path: path.symlink_to("gone"), NO_SCAN),
            "other file": ("scan.txt", Path.touch, NO_SCAN),
            "odd name": (ODD, Path.touch, NO_SCAN),
            "no scans": ("scans", Path.mkdir, r"expected scans .* in the folder .*"),
            "no letters": ("--.nii", Path.touch, "expected letters or digits in the name"),
            "no room for its name": (246 * "x" + ".nii", Path.touch, "expected .*name.*"),
            "name of 300 letters": (300 * "x" + ".nii", lambda path: None, NO_SCAN),
        }
    ),
)
def test_what_is_no_scan_to_segment_is_told_by_its_name(predict, tmp_path, name, make, told):
    make(tmp_path / name)
    expect_problem(predict(tmp_path / name, seconds=10), tmp_path / name, told, GIVE)


@pytest.mark.parametrize("folder", ["", "other"], ids=["one file", "two files"])
def test_scans_of_one_name_to_segment_are_refused(predict, data, scan, folder):
    other = scan.parent / folder / scan.name
    if folder:
        other.parent.mkdir()
        shutil.copy(scan, other)
    told = f"  {scan} and {other}: expected names that differ, both would give sub-002"
    expect_lines(predict(scan, other), "Error: 1 problem in the data:", told, GIVE)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    cases(
        {
            "text": ("scan.nii", b"text", NO_NIFTI),
            "noise": ("scan.nii.gz", NOISE, NO_NIFTI),
            "odd name": (ODD + ".nii", b"text", NO_NIFTI),
        }
    ),
)
def test_scan_that_cannot_be_segmented_is_told_and_the_next_one_done(
    predict, clean, tmp_path, name, content, told
):
    (tmp_path / name).write_bytes(content)
    result = predict(tmp_path / name, image_path(clean, "sub-001"))
    path = re.escape(train_pvs.one_line(tmp_path / name))
    expect_lines(result, f"Not segmented: {path}: {told}", status=1)
    assert "1 of 2 scans are segmented" in result[1]
    assert len(list((tmp_path / "out").glob("predictions/**/*_mask.nii.gz"))) == 1


@pytest.mark.parametrize("offset", cases({"1 km": 1e6, "1e30": 1e30}))
def test_scan_at_a_place_where_no_scanner_is_is_refused(predict, clean, tmp_path, offset):
    affine = nib.affines.from_matvec(np.eye(3), (offset, 0, 0))
    path = save_nifti(tmp_path / "far.nii", array_of(image_path(clean, "sub-001")), affine)
    told = "expected an affine .*"
    expect_lines(predict(path), f"Not segmented: {path}: {told}", status=1)


def test_scan_with_an_odd_name_is_segmented(predict, clean, tmp_path):
    path = shutil.copy(image_path(clean, "sub-001"), tmp_path / f"{ODD}{UNDECODABLE}.nii.gz")
    assert predict(path)[::2] == (0, "")
    assert len(list((tmp_path / "out").glob("predictions/**/*_mask.nii.gz"))) == 1
    assert len(list((tmp_path / "out").glob("multi_plane/*.png"))) == 1


@pytest.mark.parametrize("name", [ODD + "$x^{$", 500 * "x"], ids=["odd", "500 letters"])
def test_figures_are_drawn_whatever_a_data_set_calls_itself(weights, clean, start, tmp_path, name):
    data, out = tmp_path / "data", tmp_path / "out"
    for path_of in (image_path, label_path):
        path_of(data, "sub-001").parent.mkdir(parents=True)
        shutil.copy(path_of(clean, "sub-001"), path_of(data, "sub-001"))
    (data / "dataset_description.json").write_text(json.dumps({"Name": name}))
    flags = "--checkpoint", weights[0], "--data-dir", data, "--output-dir", out
    status, screen, err = start("--evaluate", *flags, seconds=60)
    assert (status, err) == (0, "")
    told = name.split("\n")[0][:200]
    assert re.search(f"^Data +{re.escape(told)}", screen, re.MULTILINE)
    for figure in ("test_set_visualization_grid_300dpi.jpg", "agreement.jpg"):
        assert (out / figure).stat().st_size > 10_000


# ------------------------------------------------------------------------------------- the script


def spoil(data):
    """Damage three files of a data set."""
    image_path(data, "sub-001").write_bytes(NOISE)
    edit_header(image_path(data, "sub-002"), dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))
    save_nifti(label_path(data, "sub-003"), np.ones((3, 3, 3), np.int16))


@pytest.fixture(scope="module", autouse=True)
def scripts(clean, tmp_path_factory):
    """Start the script on bad input of three kinds; returns {kind: (words, process)}.

    Before all other tests of the module: meanwhile it imports its libraries, for seconds.
    """
    folder = tmp_path_factory.mktemp("scripts")
    spoil(shutil.copytree(clean, folder / "data"))
    (folder / "code.pth").write_bytes(pickle.dumps(Malicious(), 2))
    folders = "--data-dir", folder / "data", "--output-dir", folder / "out"
    scan = image_path(clean, "sub-001")
    started = {
        "data": [*folders, *TINY, "--check"],
        "checkpoint": ["--predict", scan, "--checkpoint", folder / "code.pth"],
        "settings": ["--lr", "nan", "--pix-dim", "inf", "1", "1", "--device", UNDECODABLE],
    }
    script, pipes = Path(train_pvs.__file__), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for kind, words in started.items():
        command = [sys.executable, script, *words]
        started[kind] = words, subprocess.Popen(command, cwd=folder, **pipes)
    yield started
    for _, process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["data", "checkpoint", "settings"])
def test_script_tells_bad_input_in_the_same_lines_as_main(scripts, start, kind):
    words, process = scripts[kind]
    _, err = process.communicate(timeout=120)
    assert b"Traceback" not in err
    status, _, expected = start(*words)
    assert (process.returncode, err.decode()) == (status, expected)
    assert status == 2


def test_libraries_have_no_remarks_of_their_own_on_bad_files(data, run, caplog, recwarn):
    edit_header(image_path(data, "sub-001"), datatype=9999)
    edit_header(image_path(data, "sub-002"), scl_slope=1e38)
    edit_header(image_path(data, "sub-003"), magic=b"n+2")
    edit_header(label_path(data, "sub-003"), pixdim=(1, -1, 1, 1, 1, 1, 1, 1), sform_code=99)
    edit_header(label_path(data, "sub-004"), srow_x=(NAN, 0, 0, 0))
    assert run("--check")[0] == 2
    assert [record.getMessage() for record in caplog.records if record.name != "train_pvs"] == []
    assert [str(warning.message) for warning in recwarn] == []


# ---------------------------------------------------------------------------------- random damage

SEEDED = settings(max_examples=150, deadline=None, derandomize=True, database=None)
FEW = settings(SEEDED, max_examples=15)

header_damage = st.lists(
    st.tuples(st.integers(0, 351), st.binary(min_size=1, max_size=16)), max_size=3
)
cut = st.none() | st.integers(0, 1000) | st.integers(0, 30_000)


def damage(content, changes, length=None):
    """Return the content with bytes written over its places, and cut to a length."""
    content = bytearray(content)
    for place, new in changes:
        content[place : place + len(new)] = new
    return bytes(content[:length])


def damage_nifti(path, changes, length):
    """Write over the header of a NIfTI file, cut the file; under a .gz name, of the stream."""
    whole = path.read_bytes()
    if path.name.endswith(".gz"):
        whole = gzip.compress(damage(gzip.decompress(whole), changes), 1)
        path.write_bytes(damage(whole, [], length))
    else:
        path.write_bytes(damage(whole, changes, length))


def refusal_of(function, path):
    """Return the text of the ValueError that a function ends with, or "", and what it returns."""
    try:
        return "", function(path)
    except ValueError as error:
        return str(error), None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return an empty folder that all examples of this module share."""
    return tmp_path_factory.mktemp("random")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@SEEDED
@given(changes=header_damage, length=cut)
def test_any_damaged_nifti_is_read_or_refused_by_name(clean, folder, suffix, changes, length):
    path = folder / f"scan{suffix}"
    whole = image_path(clean, "sub-002").read_bytes()
    path.write_bytes(whole if suffix == ".nii.gz" else gzip.decompress(whole))
    damage_nifti(path, changes, length)
    told, result = refusal_of(train_pvs.read_volume, path)
    named = re.fullmatch(f"{re.escape(str(path))}: (expected .+|{NOT_WHOLE})", told)
    assert named or torch.isfinite(result[0]).all()


@FEW
@given(changes=header_damage, length=cut, sort=st.sampled_from([image_path, label_path]))
def test_any_damaged_nifti_of_a_data_set_leaves_a_status_of_0_or_2(
    clean, folder, changes, length, sort
):
    shutil.rmtree(folder / "data", ignore_errors=True)
    data = shutil.copytree(clean, folder / "data")
    damage_nifti(sort(data, "sub-002"), changes, length)
    words = ["--data-dir", str(data), "--output-dir", str(folder / "out"), *TINY, "--check"]
    with time_limit():
        assert train_pvs.main(words) in (0, 2)


@pytest.fixture(scope="module")
def small_checkpoint(folder):
    """Return the content of a file with all that `read_checkpoint` asks for, and few weights."""
    path = folder / "small.pth"
    model = torch.nn.Conv3d(1, 2, 3).state_dict()
    row = {"epoch": 1, "val_dice": 0.5}
    content = {"model": model, "config": {"LR": 0.1}, "sha256": {"test": {}}, "history_row": row}
    train_pvs.write_torch(path, content)
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore")  # torch's, of odd pickles
@SEEDED
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 2300), st.binary(min_size=1, max_size=16)), max_size=3
    ),
    length=st.none() | st.integers(0, 2300),
)
def test_any_damaged_checkpoint_is_read_or_refused_by_name(
    small_checkpoint, folder, changes, length
):
    path = folder / "damaged.pth"
    path.write_bytes(damage(small_checkpoint, changes, length))
    told, result = refusal_of(train_pvs.read_checkpoint, path)
    named = re.fullmatch(f"{re.escape(str(path))}: expected a checkpoint .+", told)
    assert named or "model" in result


# ------------------------------------------------------------------------------------------ memory


def growth_of_peak(call):
    """Return by how many bytes a call raises the peak memory of a fork of this process."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            call()
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(write, str(1024 * growth).encode())
        finally:
            os._exit(0)  # without pytest's own end
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    assert told, "the call did not come to its end"
    return int(told)


def claim(**values):
    """Return what writes a scan whose header has these values."""

    def write(path, clean, bomb):
        shutil.copy(image_path(clean, "sub-002"), path)
        edit_header(path, **values)

    return write


def explode(**values):
    """Return what writes a gzip bomb whose header has these values."""

    def write(path, clean, bomb):
        claim(**values)(path, clean, bomb)
        path.write_bytes(bomb_of(gzip.decompress(path.read_bytes())) if values else bomb)

    return write


def write_sparse(path, clean, bomb):
    """Write a plain file of 4 GB, nearly all of it a hole that takes no disk."""
    path.write_bytes(gzip.decompress(image_path(clean, "sub-002").read_bytes()))
    os.truncate(path, 4_000_000_000)


GIGANTIC = {"dim": (3, 32767, 32767, 32767, 1, 1, 1, 1), "datatype": 64, "bitpix": 64}
LARGE = {"dim": (3, 800, 800, 800, 1, 1, 1, 1), "datatype": 64, "bitpix": 64}


@pytest.mark.parametrize(
    ("name", "write"),
    cases(
        {
            "gigantic claim": ("scan.nii.gz", claim(**GIGANTIC)),
            "large claim": ("scan.nii.gz", claim(**LARGE)),
            "huge offset": ("scan.nii.gz", claim(vox_offset=1e9)),
            "bomb": ("scan.nii.gz", explode()),
            "bomb of a gigantic claim": ("scan.nii.gz", explode(**GIGANTIC)),
            "bomb with an offset below 0": ("scan.nii.gz", explode(vox_offset=-1)),
            "bomb with a huge offset": ("scan.nii.gz", explode(vox_offset=1e9)),
            "sparse file of 4 GB": ("scan.nii", write_sparse),
        }
    ),
)
def test_memory_is_that_of_what_a_scan_holds_not_of_what_it_claims(
    clean, bomb, tmp_path, name, write
):
    path = tmp_path / name
    write(path, clean, bomb)

    def read():
        with pytest.raises(ValueError, match=re.escape(str(path))):
            train_pvs.read_volume(path)

    assert growth_of_peak(read) < 200e6
