"""What a run takes of memory and disk is told before it is taken."""

import contextlib
import functools
import multiprocessing
import os
import re
import shutil
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import train_pvs
from conftest import TINY, make_subject, save_nifti

GB = 10**9


# ------------------------------------------------------------------------------ What is free


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that makes up a machine: what is available, and files of control groups."""
    monkeypatch.setattr(train_pvs, "PROC", tmp_path / "proc")
    monkeypatch.setattr(train_pvs, "CONTROL_GROUPS", tmp_path / "groups")

    def make(groups_of_process, files):
        files = {"proc/meminfo": "MemTotal: 9\nMemAvailable: 8000000 kB\n"} | {
            f"groups/{name}": content for name, content in files.items()
        }
        for name, content in (files | {"proc/self/cgroup": groups_of_process}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return make


def group(name, limit, used, cached, version=2):
    """Return the files of a control group of that version."""
    names = ("memory.max", "memory.current", "memory.stat", "inactive_file")
    if version == 1:
        names = ("limit_in_bytes", "usage_in_bytes", "stat", "total_inactive_file")
        names = (*(f"memory.{n}" for n in names[:3]), names[3])
    contents = (f"{limit}\n", f"{used}\n", f"anon 5\n{names[3]} {cached}\nfile 7\n")
    return {f"{name}/{n}": c for n, c in zip(names, contents, strict=False)}


def test_free_is_what_the_host_has_where_no_group_limits_it(machine):
    machine("0::/user.slice\n", group("user.slice", "max", 3 * GB, 0))
    assert train_pvs.free_memory() == 8000000 * 1024


def test_free_is_what_the_tightest_of_the_nested_groups_leaves(machine):
    outer, inner = group("job", 5 * GB, 4 * GB, GB), group("job/task", 6 * GB, 3 * GB, 0)
    machine("0::/job/task\n", outer | inner)
    assert train_pvs.free_memory() == 2 * GB  # 5 - 4 and 1 of page cache, against 6 - 3
    machine("0::/job/task\n", outer | group("job/task", 4 * GB, 3 * GB, 0))
    assert train_pvs.free_memory() == GB


def test_limit_of_a_container_stands_at_its_root(machine):
    machine("0::/\n", group(".", 3 * GB, GB, GB // 2))
    assert train_pvs.free_memory() == 3 * GB - GB // 2


def test_groups_of_version_1_limit_too(machine):
    files = group("memory/docker/7", 3 * GB, 2 * GB, GB // 4, version=1)
    machine("12:cpu,cpuacct:/docker/7\n4:memory:/docker/7\n", files)
    assert train_pvs.free_memory() == GB + GB // 4


def test_nothing_limits_where_there_is_no_linux(tmp_path, monkeypatch):
    monkeypatch.setattr(train_pvs, "PROC", tmp_path / "none")
    assert train_pvs.free_memory() == float("inf")


# ------------------------------------------------------------------------------ What is needed


@pytest.mark.parametrize(
    ("axes", "spacing", "pix_dim", "expected"),
    [
        # 40 x 50 x 60 voxels; the working grid is at most a voxel longer along each axis.
        ("RAS", (1, 1, 1), (1, 1, 1), 41 * 51 * 61),
        ("LPS", (1, 1, 1), (2, 2, 2), 21 * 26 * 31),
        # Voxel axes run up, to the right and to the back: 60 x 50 mm of 1.5 and 2 mm lie along
        # right and front, 40 of 0.5 mm along top.
        ("SRP", (0.5, 1.5, 2), (1, 1, 0.5), 76 * 121 * 41),
        ("RAS", (0.1, 0.1, 0.1), (1, 1, 1), 16 * 16 * 16),  # padded to the patch
    ],
)
def test_working_grid_is_counted_from_the_header(
    axes, spacing, pix_dim, expected, tiny_config, tmp_path
):
    directions = dict(zip("RASLPI", [*np.eye(3), *-np.eye(3)], strict=True))
    linear = np.transpose([directions[axis] for axis in axes]) * spacing
    affine = nib.affines.from_matvec(linear, (5, 5, 5))
    path = save_nifti(tmp_path / "scan.nii", np.zeros((40, 50, 60), np.int16), affine)
    counts = train_pvs.count_voxels({"image": path}, tiny_config(PIX_DIM=pix_dim))
    assert counts == (40 * 50 * 60, expected)


def test_scan_without_a_header_counts_nothing(tiny_config, tmp_path):
    (tmp_path / "scan.nii").write_text("no header")
    assert train_pvs.count_voxels({"image": tmp_path / "scan.nii"}, tiny_config()) == (0, 0)


def test_cache_is_bounded_by_the_headers_and_refined_by_the_first_cases(data, tiny_config):
    for number, side in {5: 40, 6: 48, 7: 40, 8: 24}.items():
        make_subject(data, f"sub-{number:03d}", (side, side, side), seed=number)
    cfg = tiny_config(DATA_DIR=str(data), OUTPUT_DIR=str(data.parent / "out"))
    cases = train_pvs.find_cases(cfg)
    voxels = [train_pvs.count_voxels(case, cfg) for case in cases]
    reports = [train_pvs.prepare_case(case, cfg) for case in cases]
    taken = sum(path.stat().st_size for path in (data.parent / "out" / "cache").iterdir())
    assert taken == sum(report["cache_bytes"] for report in reports)
    assert train_pvs.estimate_cache(voxels, [], cfg) > taken
    assert train_pvs.estimate_cache(voxels, reports[:3], cfg) == pytest.approx(taken, rel=0.25)
    assert train_pvs.estimate_cache(voxels, reports, cfg) == pytest.approx(taken)


def test_step_memory_counts_weights_four_times_and_what_backward_keeps(tiny_config):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)

        def forward(self, image):
            return torch.sigmoid(self.norm(self.conv(image)))

    model, state = Network(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = []
    for batch_size in (1, 3):
        cfg = tiny_config(BATCH_SIZE=batch_size, CROPS_PER_VOLUME=2)
        sizes.append(train_pvs.step_memory(model, cfg))
    # A patch: the input, and the two channels that go into the norm and come out of the sigmoid.
    patch = 4 * 16**3 * (1 + 2 + 2)
    assert sizes[1] - sizes[0] == 4 * patch
    # 2 weights and 2 biases of the convolution, as many of the norm, four times; the norm also
    # keeps its mean, deviation and running statistics.
    assert sizes[0] - 2 * patch == pytest.approx(4 * 4 * 8, abs=100)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def report_memory(pipe, function, *args):
    """Send (result of a call, most memory that its process had, memory before), bytes."""
    before = train_pvs.resident_memory()
    quiet = contextlib.redirect_stdout, contextlib.redirect_stderr
    with open(os.devnull, "w") as nothing, quiet[0](nothing), quiet[1](nothing):
        result = function(*args)
    pipe.send((result, train_pvs.peak_memory(), before))


@pytest.fixture
def measured(nursery):
    """Call a function of this module in a process that has computed nothing before.

    What other tests freed would hide what is taken. Returns what `report_memory` sends.
    """

    def call(function, *args):
        ours, theirs = nursery.Pipe(duplex=False)
        process = nursery.Process(target=report_memory, args=(theirs, function, *args))
        process.start()
        theirs.close()
        try:
            return ours.recv()
        finally:
            process.join()

    return call


def make_step(cfg):
    """Make a training step with a fresh network."""
    model = train_pvs.build_model(cfg)
    training = train_pvs.build_training(model, cfg)
    patches = torch.rand(2, 1, 64, 64, 64)
    train_pvs.loss_function(model.train()(patches), (patches > 0.9).float()).backward()
    train_pvs.update_weights(model, training["optimizer"], training["scaler"], cfg)


def test_step_takes_what_was_told(measured):
    flags = "--encoder-name efficientnet-b0 --encoder-weights none --device cpu --no-amp".split()
    sizes = "--img-patch-size 64 64 64 --batch-size 1 --crops-per-volume 2".split()
    cfg, _ = train_pvs.parse_command_line([*flags, *sizes, "--data-dir", "data"])
    _, peak, base = measured(make_step, cfg)
    model = train_pvs.build_model(cfg)
    assert train_pvs.step_memory(model, cfg) == pytest.approx(peak - base, rel=0.25)


@pytest.mark.parametrize("shape", [(96, 112, 96), (144, 160, 144)])
def test_memory_of_a_run_is_what_its_refined_estimate_says(shape, measured, tmp_path):
    for number in range(1, 6):
        make_subject(tmp_path / "data", f"sub-{number:03d}", shape, seed=number)
    out = tmp_path / "out"
    argv = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(out), *TINY]
    argv += ["--img-patch-size", "32", "32", "32", "--sw-overlap", "0", "--no-amp"]
    _, peak, base = measured(train_pvs.main, argv)
    told = re.search(
        r"After 3 scans .* cache, ([\d.]+) GB of memory", (out / "logs/train.log").read_text()
    )
    estimate = float(told[1]) * GB
    print(f"base {base / GB:.2f}, peak {peak / GB:.2f}, estimate {estimate / GB:.2f} GB")
    assert estimate == pytest.approx(peak, rel=0.25)
    assert (
        peak - base < 1.1 * (estimate - base) + 0.05 * GB
    )  # a bound, of heads with more PVS than these


def prepare_in_a_worker(cases, cfg):
    """Return the reports of a worker that prepares the cases."""
    prepare = functools.partial(train_pvs.prepare_case, cfg=cfg)
    context = multiprocessing.get_context("fork")  # a nursery's children would not
    return list(
        DataLoader(
            cases,
            batch_size=None,
            collate_fn=prepare,
            num_workers=1,
            multiprocessing_context=context,
        )
    )


def test_what_workers_take_is_counted_from_their_own_beginning(
    measured, tmp_path, tiny_config, monkeypatch
):
    for number in range(1, 4):
        make_subject(tmp_path / "data", f"sub-{number:03d}", (96, 112, 96), seed=number)
    cfg = tiny_config(DATA_DIR=str(tmp_path / "data"), OUTPUT_DIR=str(tmp_path / "out"))
    cases = train_pvs.find_cases(cfg)
    voxels = [train_pvs.count_voxels(case, cfg) for case in cases]
    reports, _, base = measured(prepare_in_a_worker, cases, cfg)
    # So many workers that nothing but the preparation counts.
    monkeypatch.setattr(train_pvs, "worker_count", lambda cfg: 100)
    told, refined = (
        train_pvs.estimate_memory(voxels, some, base, 0, cfg) - base for some in ([], reports)
    )
    assert told == pytest.approx(100 * 107e6, rel=0.1)
    assert 0.3 * told < refined < 1.5 * told  # what is told is a bound


def test_memory_of_the_program_that_starts_the_run_does_not_count(machine, tmp_path):
    machine("0::/\n", {})
    status = "Name: python\nVmPeak: 9000 kB\nVmHWM:    5000 kB\nVmRSS: 4000 kB\n"
    (tmp_path / "proc" / "self" / "status").write_text(status)
    assert train_pvs.peak_memory() == 5000 * 1024


# ---------------------------------------------------------------------------------- Too little


def test_too_small_a_disk_is_told_after_the_first_scans(data, run, monkeypatch, tmp_path):
    make_subject(data, "sub-005", seed=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    status, out, err = run("--check")
    assert status == 2
    assert "(1.0 kB free) for the cache" in out
    expected = rf"Error: {tmp_path}/out/cache: expected [\d.]+ kB of disk, [\d.]+ kB are free; "
    assert re.search(expected + "free some, or choose another folder with --cache-dir", err)
    assert len(list((tmp_path / "out" / "cache").iterdir())) == 3


def test_too_little_memory_is_a_warning_with_what_to_lower(data, run, monkeypatch):
    monkeypatch.setattr(train_pvs, "free_memory", lambda: 1000)
    status, out, _ = run("--check")
    assert status == 0
    assert "Warning: memory may run out. First lower --num-workers. To need less: --sw-" in out
    monkeypatch.setattr(train_pvs, "free_memory", lambda: 10**12)
    assert "may run out" not in run("--check")[1]
