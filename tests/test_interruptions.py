"""A run that is interrupted, killed or out of disk says so in a line, and nothing is lost."""

import errno
import json
import multiprocessing
import os
import pkgutil
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_and_resume import FLAGS, outcome

import train_pvs
from conftest import TINY, image_path, label_path, make_subject, save_nifti

WORKERS = ("--num-workers", 2)
GO_ON = {"--resume": "and --resume.", "--overwrite": "with --overwrite.", "": "command again."}

# ------------------------------------------------------------- Runs in processes of their own


def live(argv, folder, hooks):
    """Run as a process group of its own, with stdout and stderr in files, changed by `hooks`."""
    os.setpgid(0, 0)
    for number, name in {1: "stdout", 2: "stderr"}.items():
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    multiprocessing.set_start_method("fork", force=True)  # of the run's workers
    for hook, *details in hooks:
        hook(*details)
    sys.exit(train_pvs.main(argv))


def replace_function(name, function):
    """Put `function`, which is called with the real one first, in the place of `name`."""
    real = pkgutil.resolve_name(name)
    pytest.MonkeyPatch().setattr(name, lambda *args, **kw: function(real, *args, **kw))


def wait(seconds):
    """Sleep in short naps: a signal that comes just before a nap does not end it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def pause(name, call, flag, seconds=60):
    """Let the call-th call of a function make the file `flag` and sleep before its work."""
    calls = []

    def function(real, *args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            flag.touch()
            wait(seconds)
        return real(*args, **kwargs)

    replace_function(name, function)


def pause_in_destructor(name, flag):
    """Let each call of a function make the file `flag` and sleep in a destructor, then again."""

    class Garbage:
        def __del__(self):
            flag.touch()
            wait(60)

    def function(real, *args, **kwargs):
        Garbage()
        wait(60)
        return real(*args, **kwargs)

    replace_function(name, function)


def kill_worker(name, call):
    """Let a worker be killed in its call-th call of a function."""
    calls = []

    def function(real, *args):
        calls.append(name)
        if len(calls) == call and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    replace_function(name, function)


def leaves_no_process(run):
    """Return whether all processes of a run that has ended are gone within some seconds."""
    end = time.monotonic() + 3
    while members(run.pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not members(run.pid)


def limit_files(size):
    """Let no file become larger than `size` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def scribble(figure, file, **_):
    """Write a figure at once, each time another one."""
    file.write(os.urandom(1000))


def members(group):
    """Return the processes of a group, without those that have ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rsplit(") ", 1)[1].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(its_group) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


class Run:
    """A run in a process of its own."""

    def __init__(self, process, folder):
        self.process, self.folder, self.pid = process, folder, process.pid

    def wait_for(self, path):
        """Wait until a file is there."""
        end = time.monotonic() + 60
        while not path.exists():
            assert self.process.is_alive(), self.stderr
            assert time.monotonic() < end, f"{path} has not come; {self.stderr}"
            time.sleep(0.005)

    def end(self, seconds):
        """Wait for the end of the run; return its exit status."""
        self.process.join(seconds)
        assert not self.process.is_alive(), f"not ended within {seconds} s; {self.stderr}"
        return self.process.exitcode

    @property
    def stderr(self):
        return (self.folder / "stderr").read_text()


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """The four subjects of `data`, for all tests here."""
    folder = tmp_path_factory.mktemp("heads") / "data"
    for number in range(1, 5):
        make_subject(folder, f"sub-{number:03d}", seed=number)
    return folder


@pytest.fixture(scope="module")
def whole(heads):
    """The folder of a run that nothing disturbed."""
    out = heads.parent / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pvs.plt.Figure, "savefig", scribble)
        flags = ["--data-dir", str(heads), "--output-dir", str(out), *TINY, *map(str, FLAGS)]
        assert train_pvs.main(flags) in (0, 1)
    return out


@pytest.fixture(scope="module")
def expected(whole):
    return outcome(whole)


@pytest.fixture
def plain(monkeypatch):
    """Leave out the drawing of the figures, which takes most of so short a run."""
    monkeypatch.setattr(train_pvs.plt.Figure, "savefig", scribble)


@pytest.fixture
def again(run, heads):
    """Run in this process; returns (status, stdout, stderr)."""
    return lambda *flags, **places: run(*FLAGS, *flags, **{"data": heads} | places)


@pytest.fixture
def begin(nursery, heads, tmp_path):
    """Start a run in a process of its own, changed by hooks; what is left of it is killed."""
    begun = []

    def start(*flags, hooks=(), argv=None, out=tmp_path / "out", data=heads):
        folder = tmp_path / f"run-{len(begun)}"
        folder.mkdir()
        places = ["--data-dir", str(data), "--output-dir", str(out)]
        argv = argv or [*places, *TINY, *map(str, FLAGS), *map(str, flags)]
        process = nursery.Process(target=live, args=(argv, folder, hooks))
        process.start()
        begun.append(Run(process, folder))
        return begun[-1]

    yield start
    for run in begun:
        for process in members(run.pid):
            os.kill(process, signal.SIGKILL)
        run.process.join()


def half_files(folder):
    return list(folder.rglob(".writing-*"))


def snapshot(folder):
    """Return the content of every file but logs, cache and figures."""
    results = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {
        str(path.relative_to(folder)): data
        for path, data in results.items()
        if path.suffix not in (".log", ".pt", ".png", ".jpg")
    }


# ------------------------------------------------------------------------------------ Signals


def interrupt(run, number, group=False, seconds=20):
    """Send a signal to a run, or to all its processes as a terminal does; return its last line."""
    os.killpg(run.pid, number) if group else os.kill(run.pid, number)
    assert run.end(seconds) == 128 + number, run.stderr
    return last_line(run, f"Interrupted ({signal.Signals(number).name}). ")


def last_line(run, start):
    """Return the line with which a run ended, leaving no process; before are but progress bars."""
    *progress, told = run.stderr.splitlines()
    assert told.startswith(start), run.stderr
    assert all("%|" in line for line in progress), run.stderr
    assert leaves_no_process(run)
    return told


STAGES = {  # function, its call, flags, what the message advises
    "caching": ("train_pvs.build_cache_entry", 2, (), ""),
    "training": ("train_pvs.update_weights", 1, (), "--overwrite"),
    "training from workers": ("train_pvs.update_weights", 2, WORKERS, "--resume"),
    "validation": ("train_pvs.predict_logits", 1, (), "--overwrite"),
    "writing a checkpoint": ("os.replace", 9, (), "--resume"),
    "testing": ("train_pvs.score_case", 1, (), "--resume"),
    "drawing": ("train_pvs.plt.Figure.savefig", 1, (), "--resume"),
}


@pytest.mark.parametrize(
    ("stage", "number", "group"),
    [
        ("caching", signal.SIGINT, True),
        ("caching", signal.SIGTERM, False),
        ("training", signal.SIGINT, False),
        ("training", signal.SIGTERM, True),
        ("training from workers", signal.SIGINT, True),
        ("training from workers", signal.SIGTERM, False),
        ("validation", signal.SIGTERM, True),
        ("writing a checkpoint", signal.SIGINT, False),
        ("testing", signal.SIGTERM, False),
        ("drawing", signal.SIGINT, True),
    ],
)
def test_signal_ends_the_run_in_a_line_that_says_how_to_go_on(
    stage, number, group, begin, tmp_path
):
    name, call, flags, way_on = STAGES[stage]
    run = begin(*flags, hooks=[(pause, name, call, tmp_path / "reached")])
    run.wait_for(tmp_path / "reached")
    assert interrupt(run, number, group).endswith(GO_ON[way_on])
    assert half_files(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "stage", "number"),
    [
        ("--demo", "train_pvs.simulate_head", signal.SIGINT),
        ("--demo", "train_pvs.sync_folder", signal.SIGTERM),
        ("--predict", "train_pvs.predict_case", signal.SIGINT),
        ("--predict", "train_pvs.draw_case", signal.SIGTERM),
        ("--evaluate", "train_pvs.predict_case", signal.SIGTERM),
    ],
)
def test_signal_ends_the_other_commands_too(command, stage, number, begin, whole, heads, tmp_path):
    places = ["--output-dir", str(tmp_path / "out"), "--device", "cpu", "--num-workers", "0"]
    if command != "--demo":
        places += ["--checkpoint", str(whole / "checkpoints" / "best_model.pth")]
        places += ["--data-dir", str(heads)]
    scan = [str(image_path(heads, "sub-001"))] if command == "--predict" else []
    run = begin(argv=[command, *scan, *places], hooks=[(pause, stage, 1, tmp_path / "reached")])
    run.wait_for(tmp_path / "reached")
    told = interrupt(run, number)
    with_results = "add --overwrite if the folder holds results."
    assert told.endswith(GO_ON[""] if command == "--demo" else with_results)
    assert half_files(tmp_path) == []


def test_terminated_run_becomes_the_same_when_resumed(begin, again, plain, expected, tmp_path):
    stage = (pause, "train_pvs.update_weights", 3, tmp_path / "reached")
    run = begin(*WORKERS, hooks=[stage])
    run.wait_for(tmp_path / "reached")
    assert interrupt(run, signal.SIGTERM).endswith(GO_ON["--resume"])
    assert again("--resume")[0] in (0, 1)
    assert outcome(tmp_path / "out") == expected


def test_script_in_the_middle_of_its_training_ends_as_a_terminal_asks(heads, tmp_path):
    places = ["--data-dir", str(heads), "--output-dir", str(tmp_path / "out"), *TINY]
    command = [sys.executable, train_pvs.__file__, *places, "--epochs", "999", "--num-workers", "2"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as run:
        end = time.monotonic() + 100
        while not (tmp_path / "out" / "checkpoints" / "last.pth").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGINT)
        err = run.communicate(timeout=30)[1]
    assert run.returncode == 130
    *progress, told = err.splitlines()
    assert told.startswith("Interrupted (SIGINT)")
    assert told.endswith(GO_ON["--resume"])
    assert all("%|" in line for line in progress), err
    assert leaves_no_process(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_busy_workers_do_not_hold_the_run_up(number, begin, tmp_path):
    reached = tmp_path / "reached"
    run = begin(*WORKERS, hooks=[(pause, "train_pvs.build_cache_entry", 1, reached)])
    run.wait_for(reached)
    assert interrupt(run, number, seconds=20).endswith(GO_ON[""])


def test_signal_that_reaches_the_workers_after_the_run_ends_it_in_one_line(begin, tmp_path):
    reached = tmp_path / "reached"
    run = begin(*WORKERS, hooks=[(pause, "train_pvs.build_cache_entry", 1, reached)])
    run.wait_for(reached)
    os.kill(run.pid, signal.SIGTERM)
    end = time.monotonic() + 5
    while "Interrupted" not in run.stderr and time.monotonic() < end:
        time.sleep(0.01)
    for worker in set(members(run.pid)) - {run.pid}:
        os.kill(worker, signal.SIGTERM)
    assert run.end(9) == 128 + signal.SIGTERM  # below CLEAN_UP_SECONDS, when all are killed
    last_line(run, "Interrupted (SIGTERM). ")


def test_worker_ends_although_python_loses_its_exit_in_a_destructor(begin, tmp_path):
    reached = tmp_path / "reached"
    run = begin(*WORKERS, hooks=[(pause_in_destructor, "train_pvs.build_cache_entry", reached)])
    run.wait_for(reached)
    interrupt(run, signal.SIGTERM, seconds=9)  # below CLEAN_UP_SECONDS, when all are killed


@pytest.mark.parametrize(
    "name", ["train_pvs.leave_signals_to_the_run", "multiprocessing.util._run_after_forkers"]
)
def test_ctrl_c_while_a_worker_starts_ends_in_one_line(name, begin, tmp_path):
    reached = tmp_path / "reached"
    run = begin(*WORKERS, hooks=[(pause, name, 1, reached)])
    run.wait_for(reached)
    time.sleep(0.3)  # both have begun
    interrupt(run, signal.SIGINT, group=True)


def hold_lock(flag):
    """Let a worker be ended while it holds the lock that the end of the loader takes."""

    def function(real, event):
        event._cond.acquire()
        flag.touch()
        wait(60)

    replace_function("multiprocessing.synchronize.Event.is_set", function)
    pytest.MonkeyPatch().setattr(train_pvs, "CLEAN_UP_SECONDS", 1, raising=False)


def test_worker_that_ended_with_a_lock_does_not_hold_the_run_up(begin, tmp_path):
    reached = tmp_path / "reached"
    run = begin(*WORKERS, hooks=[(hold_lock, reached)])
    run.wait_for(reached)
    interrupt(run, signal.SIGTERM, seconds=20)


def lose_signal_in_long_step(seconds):
    """Let a function end with a signal in a destructor, and take longer than cleaning up may."""

    def function(real, *args):
        Destructor()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return real(*args)

    replace_function("train_pvs.update_weights", function)
    pytest.MonkeyPatch().setattr(train_pvs, "CLEAN_UP_SECONDS", 1, raising=False)


def test_signal_that_python_lost_in_a_long_step_is_told(begin):
    run = begin(hooks=[(lose_signal_in_long_step, 3)])
    assert run.end(60) == 143
    last_line(run, "Interrupted (SIGTERM). ")


def clean_up_for_ever(name, flag):
    """Let a function go on sleeping after the first signal."""

    def function(real, *args):
        try:
            flag.touch()
            wait(60)
        finally:
            flag.with_suffix(".signal").touch()
            wait(60)

    replace_function(name, function)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_a_run_that_is_stuck_in_cleaning_up(number, begin, tmp_path):
    reached = tmp_path / "reached"
    run = begin(*WORKERS, hooks=[(clean_up_for_ever, "train_pvs.update_weights", reached)])
    run.wait_for(reached)
    os.kill(run.pid, number)
    run.wait_for(reached.with_suffix(".signal"))
    os.kill(run.pid, number)
    assert run.end(5) == 128 + number
    assert "Traceback" not in run.stderr
    assert leaves_no_process(run)


class Destructor:
    """What asks for the end of the run while Python passes over exceptions."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def test_signal_that_python_lost_in_a_destructor_ends_the_run_at_the_next_step(
    again, plain, monkeypatch, tmp_path
):
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: None)
    calls, real = [], train_pvs.update_weights

    def update_weights(*args):
        calls.append(args)
        if len(calls) == 2:
            Destructor()
        return real(*args)

    monkeypatch.setattr(train_pvs, "update_weights", update_weights)
    status, _, err = again("--epochs", 9, "--test-fraction", 0.25)
    assert status == 143
    assert "Interrupted (SIGTERM). No epoch was finished" in err
    assert len(calls) == 2


def lose_signal(name):
    """Let a function end with a signal in a destructor."""

    def function(real, *args):
        Destructor()
        return real(*args)

    replace_function(name, function)


def test_signal_that_python_lost_in_a_destructor_is_told_in_one_line(begin):
    run = begin(hooks=[(lose_signal, "train_pvs.update_weights")])
    assert run.end(60) == 143
    last_line(run, "Interrupted (SIGTERM). ")


@pytest.mark.parametrize("flags", [("--check",), ("--epochs", 0), ("--no-such-flag",)])
def test_handlers_of_the_caller_are_his_again(flags, again, plain):
    mine = {number: lambda *_: None for number in (signal.SIGINT, signal.SIGTERM)}
    former = {number: signal.signal(number, handler) for number, handler in mine.items()}
    hook = sys.unraisablehook
    try:
        again(*flags)
        assert {number: signal.getsignal(number) for number in mine} == mine
        assert sys.unraisablehook is hook
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------ Killed workers


@pytest.mark.parametrize(
    ("name", "call", "way_on"),
    [
        ("train_pvs.build_cache_entry", 2, ""),
        ("train_pvs.TrainingPatches.__getitem__", 4, "--resume"),  # of the fourth epoch
    ],
)
def test_killed_worker_is_told_with_what_to_lower_and_the_run_goes_on(
    name, call, way_on, begin, again, plain, expected, tmp_path
):
    flags = ("--test-fraction", 0.5, "--num-workers", 1)
    run = begin(*flags, hooks=[(kill_worker, name, call)])
    assert run.end(60) == 1
    assert "a worker process was killed, most likely since memory, or /dev/shm" in run.stderr
    assert "First lower --num-workers." in run.stderr
    assert "--batch-size 1" in run.stderr
    assert run.stderr.strip().endswith(GO_ON[way_on])
    assert "Traceback" not in run.stderr
    assert leaves_no_process(run)
    assert again(*way_on.split())[0] in (0, 1)
    assert outcome(tmp_path / "out") == expected


# ------------------------------------------------------------------------------------ Full disk


@pytest.fixture
def fill_disk(monkeypatch):
    """Let the disk be full when the call-th file of a pattern is flushed."""
    real, failed = os.fsync, []

    def arrange(pattern, call=1):
        calls = []

        def fsync(descriptor):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            target = path.with_name(path.name.removeprefix(f".writing-{os.getpid()}-"))
            if path != target and target.match(pattern):
                calls.append(target)
                if len(calls) == call:
                    failed.append((target, target.read_bytes() if target.exists() else None))
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        failed.clear()
        monkeypatch.setattr(os, "fsync", fsync)
        return failed

    yield arrange
    monkeypatch.setattr(os, "fsync", real)


def assert_full_disk(failed, status, err, reason="No space left on device"):
    """See that a run told of the file that found no room, and left it as it was."""
    ((path, former),) = failed
    assert status == 1, err
    told = re.search(rf"Error: {re.escape(str(path))}: cannot be written \({reason}\); (.*)", err)
    assert re.match(r"it takes [\d.]+ k?M?B, [\d.]+ GB are free\. A former file", told[1]), err
    assert "Traceback" not in err
    assert (path.read_bytes() if path.exists() else None) == former
    assert half_files(path.parent) == []


def way_on(err):
    """Return the flags that a message advises."""
    (flag,) = (flag for flag, words in GO_ON.items() if err.strip().endswith(words))
    return flag.split()


def test_full_disk_while_training_is_told_for_each_file_and_the_run_goes_on(
    again, plain, fill_disk, expected, tmp_path
):
    flags = []
    for pattern, call in (
        ("cache/*.pt", 2),
        ("logs/split.json", 1),
        ("checkpoints/best_model.pth", 1),
        ("checkpoints/last.pth", 1),
        ("checkpoints/last.pth", 2),
        ("logs/training_history.json", 1),
        ("logs/split.json", 1),
    ):
        failed = fill_disk(pattern, call)
        status, _, err = again(*flags)
        assert_full_disk(failed, status, err)
        flags = way_on(err)
    fill_disk("no file")
    assert again(*flags)[0] in (0, 1)
    assert outcome(tmp_path / "out") == expected


def test_full_disk_while_testing_is_told_for_each_file_and_the_run_goes_on(
    again, plain, fill_disk, whole, expected, tmp_path
):
    shutil.copytree(whole, tmp_path / "out")
    for pattern in (
        "predictions/dataset_description.json",
        "anat/*_mask.nii.gz",
        "multi_plane/*.png",
        "logs/comprehensive_test_metrics.json",
        "logs/test_metrics.csv",
        "test_set_visualization_grid_300dpi.jpg",
        "agreement.jpg",
        "training_curves.jpg",
    ):
        failed = fill_disk(pattern)
        status, _, err = again("--resume")
        assert_full_disk(failed, status, err)
        assert way_on(err) == ["--resume"]
        assert failed[0][1] is not None
    fill_disk("no file")
    assert again("--resume")[0] in (0, 1)
    assert outcome(tmp_path / "out") == expected


@pytest.mark.parametrize("pattern", ["logs/participants_pvs.csv", "anat/*_probseg.nii.gz"])
def test_full_disk_while_predicting_is_told_and_overwriting_makes_the_same(
    pattern, again, plain, fill_disk, whole, heads, tmp_path
):
    scans = [image_path(heads, f"sub-00{number}") for number in (1, 2)]
    best = ("--checkpoint", whole / "checkpoints" / "best_model.pth", "--save-probabilities")
    assert again("--predict", *scans, *best, out=tmp_path / "calm")[0] == 0
    failed = fill_disk(pattern, 2)
    status, _, err = again("--predict", *scans, *best)
    assert_full_disk(failed, status, err)
    fill_disk("no file")
    assert again("--predict", *scans, *best, "--overwrite")[0] == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "calm")


@pytest.mark.parametrize("pattern", ["anat/*.nii.gz", "data/dataset_description.json"])
def test_full_disk_while_simulating_is_told_and_the_data_are_made_anew(
    pattern, fill_disk, monkeypatch, capsys, tmp_path
):
    def simulate_head(rng):
        return rng.integers(0, 9, (3, 4, 5), np.int16), rng.integers(0, 2, (3, 4, 5), np.uint8)

    monkeypatch.setattr(train_pvs, "simulate_head", simulate_head)
    monkeypatch.setattr(train_pvs, "find_cases", lambda cfg: sys.exit(77))  # the data are made
    argv = ["--demo", "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    failed = fill_disk(pattern, 2)
    status = train_pvs.main(argv)
    err = capsys.readouterr().err
    assert_full_disk(failed, status, err)
    assert way_on(err) == []
    fill_disk("no file")
    for out in ("out", "calm"):
        with pytest.raises(SystemExit):
            train_pvs.main([*argv, "--output-dir", str(tmp_path / out)])
    now = snapshot(tmp_path / "out")
    assert now == snapshot(tmp_path / "calm")
    assert len(now) == 2 + 2 * train_pvs.DEMO_SUBJECTS  # and .lock


@pytest.mark.parametrize(
    ("size", "pattern"),
    [
        (10_000, "cache/sub-001-*.pt"),
        (1_000_000, "checkpoints/best_model.pth"),
        (20_300_000, "checkpoints/last.pth"),
    ],
)
def test_limited_file_size_is_told_and_the_run_goes_on(
    size, pattern, begin, again, plain, expected, tmp_path
):
    run = begin(hooks=[(limit_files, size)])
    status = run.end(60)
    path = re.search(r"Error: (.*): cannot be written", run.stderr)[1]
    assert Path(path).match(pattern)
    assert_full_disk([(Path(path), None)], status, run.stderr, "File too large")
    assert again(*way_on(run.stderr))[0] in (0, 1)
    assert outcome(tmp_path / "out") == expected


def test_log_that_finds_no_room_ends_the_run(begin, tmp_path):
    run = begin(hooks=[(limit_files, 500)])
    assert run.end(60) == 1
    log = tmp_path / "out" / "logs" / "train.log"
    assert run.stderr.startswith(f"Error: {log}: cannot be written (File too large)")
    assert way_on(run.stderr) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 30 MB, which has no room for last.pth; and a function that makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", disk])
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_small_disk_is_told_and_the_run_goes_on_when_there_is_room(
    small_disk, again, plain, expected
):
    disk, resize = small_disk
    status, _, err = again(out=disk / "out")
    assert status == 1
    last = re.escape(str(disk / "out" / "checkpoints" / "last.pth"))
    sizes = r"it takes \d\d\.\d MB, \d+\.\d MB are free\."
    assert re.search(rf"Error: {last}: cannot be written \(No space left on device\); {sizes}", err)
    assert half_files(disk) == []
    resize("400m")
    assert again(*way_on(err), out=disk / "out")[0] in (0, 1)
    assert outcome(disk / "out") == expected


def limit_files_to_log(log):
    """Let no file become larger than the log is when the first checkpoint is written."""

    def function(real, *args):
        limit_files(log.stat().st_size)
        return real(*args)

    replace_function("train_pvs.save_checkpoint", function)


def test_disk_without_room_for_file_and_log_is_told_without_a_traceback(begin, tmp_path):
    run = begin(hooks=[(limit_files_to_log, tmp_path / "out" / "logs" / "train.log")])
    assert run.end(60) == 1
    best = tmp_path / "out" / "checkpoints" / "best_model.pth"
    assert f"Error: {best}: cannot be written (File too large)" in run.stderr
    assert "Traceback" not in run.stderr
    assert way_on(run.stderr) == ["--overwrite"]


# ------------------------------------------------------------------------------------- The lock


@pytest.fixture
def training(begin, tmp_path):
    """A run with two workers in its second epoch."""
    run = begin(*WORKERS, hooks=[(pause, "train_pvs.update_weights", 2, tmp_path / "reached")])
    run.wait_for(tmp_path / "reached")
    return run


def test_folder_of_a_running_training_is_refused_and_not_touched(
    training, again, plain, heads, tmp_path
):
    out = tmp_path / "out"
    for folder in ("checkpoints", "predictions/sub-001/anat", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / ".writing-1-half").write_text("half a file")
    before = snapshot(out)
    assert len(before) >= 6
    for command in (("--overwrite",), ("--resume",), ("--evaluate",), ("--check",)):
        status, _, err = again(*command)
        assert status == 2, err
        assert f"Error: {out}: another run is using this folder" in err
    status, _, err = again("--predict", image_path(heads, "sub-001"))
    assert status == 0, err
    assert (out / "predict" / "logs" / "participants_pvs.csv").exists()
    assert {path: out.joinpath(path).read_bytes() for path in before} == before


def test_folder_of_a_killed_run_is_free_at_once_though_its_workers_live(
    training, again, plain, tmp_path
):
    workers = set(members(training.pid)) - {training.pid}
    os.kill(training.pid, signal.SIGKILL)
    assert training.end(5) == -signal.SIGKILL
    assert len(workers) == 2
    assert set(members(training.pid)) == workers
    assert again("--resume")[0] in (0, 1)


def test_half_written_files_are_removed_but_not_those_of_runs_elsewhere(again, plain, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    left = ("checkpoints", "logs", "multi_plane", "predictions/sub-001/anat")
    elsewhere = ("predict/predictions/sub-001/anat", "predict/logs", "predict/checkpoints")
    for folder in (*left, *elsewhere, cache):
        (out / folder).mkdir(parents=True)
        (out / folder / ".writing-1-half").write_text("half a file")
    (cache / ".writing-2-half").write_text("half a file")
    os.utime(cache / ".writing-2-half", (time.time() - 3700,) * 2)
    assert again("--check", "--cache-dir", cache)[0] == 0
    kept = [out / folder / ".writing-1-half" for folder in elsewhere]
    assert sorted(half_files(tmp_path)) == sorted([*kept, cache / ".writing-1-half"])


# -------------------------------------------------------------------------------------- Numbers


def overflow_in(monkeypatch, broken):
    """Make the gradient of some steps, counted from 1, infinite under a finite loss."""
    calls, real = [], train_pvs.loss_function

    def loss_function(logits, label):
        if logits.requires_grad:
            calls.append(label)
            if broken(len(calls)):
                # The root's slope at 0 is infinite.
                return real(logits, label) + (logits * 0).sum().abs().sqrt()
        return real(logits, label)

    monkeypatch.setattr(train_pvs, "loss_function", loss_function)
    return calls


@pytest.fixture
def looking_at_every_step(monkeypatch):
    monkeypatch.setattr(train_pvs, "CHECK_SECONDS", -1)


@pytest.mark.usefixtures("looking_at_every_step")
@pytest.mark.parametrize("val_every", [1, 2])
def test_gradient_that_is_not_finite_ends_the_run_at_that_step(
    val_every, again, plain, monkeypatch, tmp_path
):
    # An epoch has two steps; the fifth is the first of the third epoch.
    calls, saved = overflow_in(monkeypatch, lambda step: step == 5), {}
    real = train_pvs.train_one_epoch

    def train_one_epoch(model, loader, *args):
        saved.update(snapshot(tmp_path / "out" / "checkpoints"))
        return real(model, loader, *args)

    monkeypatch.setattr(train_pvs, "train_one_epoch", train_one_epoch)
    status, _, err = again("--test-fraction", 0.25, "--val-every", val_every)
    assert status == 1
    assert len(calls) == 5
    split = json.loads((tmp_path / "out" / "logs" / "split.json").read_text())
    sampler = train_pvs.EpochSampler(2, train_pvs.Config(BATCH_SIZE=1))
    sampler.epoch = 3
    first = split["train"][next(iter(sampler))[0][1]]
    assert (
        f"the gradient became nan in epoch 3 with {first}. Nothing was saved from this epoch" in err
    )
    assert len(saved) == 2
    assert snapshot(tmp_path / "out" / "checkpoints") == saved
    last = torch.load(tmp_path / "out" / "checkpoints" / "last.pth", weights_only=True)
    assert last["history_row"]["epoch"] == 2


def test_numbers_are_read_once_in_a_while_and_name_the_step_that_was_wrong(
    again, plain, monkeypatch, tmp_path
):
    monkeypatch.setattr(train_pvs, "CHECK_SECONDS", 1000)
    calls, reads, real = (
        overflow_in(monkeypatch, lambda step: step == 3),
        [],
        train_pvs.check_finite,
    )

    def check_finite(numbers, epoch):
        reads.append([what for what, *_ in numbers])
        return real(numbers, epoch)

    monkeypatch.setattr(train_pvs, "check_finite", check_finite)
    status, _, err = again("--test-fraction", 0.25, "--val-every", 99, "--overwrite")
    assert status == 1
    assert len(calls) == 4  # the second epoch's two steps were made, and were not saved
    training = [names for names in reads if "loss" in names]
    assert training == 2 * [["loss", "gradient", "loss", "gradient"]]
    split = json.loads((tmp_path / "out" / "logs" / "split.json").read_text())
    sampler = train_pvs.EpochSampler(2, train_pvs.Config(BATCH_SIZE=1))
    sampler.epoch = 2
    first = split["train"][next(iter(sampler))[0][1]]
    assert f"the gradient became nan in epoch 2 with {first}. Nothing was saved" in err
    history = json.loads((tmp_path / "out" / "logs" / "training_history.json").read_text())
    assert [row["epoch"] for row in history] == [1]


def test_gradient_of_accumulated_batches_that_is_not_finite_names_all_their_cases(
    again, plain, monkeypatch, tmp_path
):
    overflow_in(monkeypatch, lambda step: step == 1)
    flags = ("--test-fraction", 0.25, "--accumulate-steps", 2)
    status, _, err = again(*flags)
    assert status == 1
    split = json.loads((tmp_path / "out" / "logs" / "split.json").read_text())
    assert f"the gradient became nan in epoch 1 with {', '.join(split['train'])}." in err


@pytest.fixture
def scaled(monkeypatch):
    """Train with the scaler that float16 takes, started at 65536."""
    real = train_pvs.build_training

    def build_training(*args):
        return real(*args) | {"scaler": torch.amp.GradScaler("cpu", enabled=True)}

    monkeypatch.setattr(train_pvs, "build_training", build_training)


def test_float16_whose_gradients_overflow_now_and_then_goes_on(
    scaled, again, plain, monkeypatch, tmp_path
):
    calls = overflow_in(monkeypatch, lambda step: step % 3 == 1)
    assert again("--test-fraction", 0.25)[0] in (0, 1)
    assert len(calls) == 8
    last = torch.load(tmp_path / "out" / "checkpoints" / "last.pth", weights_only=True)
    assert last["scaler"]["scale"] == 65536 / 2**3  # after steps 1, 4 and 7
    weights = last["model"].values()
    assert all(value.isfinite().all() for value in weights)


@pytest.mark.usefixtures("looking_at_every_step")
def test_float16_whose_gradients_always_overflow_ends_instead_of_training_nothing(
    scaled, again, plain, monkeypatch
):
    # 65536 halved 30 times is 6e-5, less than LEAST_SCALE.
    calls = overflow_in(monkeypatch, lambda step: True)
    status, _, err = again("--test-fraction", 0.25, "--epochs", 99, "--val-every", 99)
    assert status == 1
    assert len(calls) == 30
    assert "the gradient became nan in epoch 15 with sub-00" in err
    assert "--no-amp" in err


# ------------------------------------------------------- Files that change while a run is going


@pytest.fixture
def change_before_testing(data, again, plain, monkeypatch, tmp_path):
    """Return a function that runs and lets `change(subject)` happen between training and test."""

    def call(change):
        real = train_pvs.evaluate

        def evaluate(model, cases, *args):
            change(cases[0]["subject"])
            return real(model, cases, *args)

        monkeypatch.setattr(train_pvs, "evaluate", evaluate)
        return again("--epochs", 1, data=data)

    return call


@pytest.mark.parametrize("place", [image_path, label_path])
def test_file_that_changes_before_it_is_tested_is_told_by_name(place, change_before_testing, data):
    subjects = []

    def change(subject):
        volume = np.zeros((24, 28, 20), np.int16)
        volume[10:12, 10:12, 5:15] = 1
        save_nifti(place(data, subject), volume)
        subjects.append(subject)

    status, _, err = change_before_testing(change)
    assert status == 1
    path = place(data, subjects[0])
    assert f"Error: {path}: has other voxels than when the run began" in err
    assert err.strip().endswith(GO_ON["--resume"])


@pytest.mark.parametrize("place", [image_path, label_path])
def test_file_that_vanishes_before_it_is_tested_is_told_by_name(place, change_before_testing, data):
    subjects = []

    def change(subject):
        place(data, subject).unlink()
        subjects.append(subject)

    status, _, err = change_before_testing(change)
    assert status == 1
    assert f"Error: {place(data, subjects[0])}: " in err
    assert err.strip().endswith(GO_ON["--resume"])


def test_scan_that_vanishes_while_it_is_segmented_is_told_by_name(
    change_before_testing, data, monkeypatch
):
    scans, real = [], train_pvs.write_prediction

    def write_prediction(case, *args):
        Path(case["image"]).unlink()
        scans.append(case["image"])
        return real(case, *args)

    monkeypatch.setattr(train_pvs, "write_prediction", write_prediction)
    status, _, err = change_before_testing(lambda subject: None)
    assert status == 1
    assert f"Error: {scans[0]}: " in err
