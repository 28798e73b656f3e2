"""A run that is interrupted, killed or short of disk says so in a line and goes on to its end."""

import errno
import functools
import itertools
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_and_resume import FLAGS, outcome
from kill_and_resume import main as kill_and_resume

import train_pvs
from conftest import MACHINE, TINY, image_path, label_path, make_subject, make_subjects, snapshot
from running import call, done, draw_nothing, members, refused, trained, wait_until

GO_ON = {"--resume": "and --resume.", "--overwrite": "with --overwrite.", "": "command again."}
FOR_EVER = ("--epochs", 999, "--num-workers", 2)


class Live:
    """A run in a process of its own; its results are in `out`."""

    def __init__(self, process, folder, out):
        self.process, self.folder, self.out, self.pid = process, folder, out, process.pid

    @property
    def stderr(self):
        return (self.folder / "stderr").read_text()

    def wait_for(self, pattern):
        wait_until(lambda: self.process.exitcode or [*self.out.glob(pattern)], lambda: self.stderr)
        assert self.process.is_alive(), f"{pattern} has not come; {self.stderr}"

    def end(self, status, start, way_on, seconds=20):
        """See that the run ends with a status and a message, which `start` begins, and no more."""
        self.process.join(seconds)
        assert self.process.exitcode == status, f"after {seconds} s; {self.stderr}"
        lines = [line for line in self.stderr.splitlines() if "%|" not in line]  # progress
        assert lines[0].startswith(start), self.stderr
        assert lines[-1].endswith(GO_ON[way_on]), self.stderr
        assert (len(lines) <= 4, "Traceback" in self.stderr) == (True, False)
        wait_until(lambda: not members(self.pid), lambda: "processes are left", 10)


@pytest.fixture
def begin(launch, tmp_path):
    """Start a run in a process of its own."""

    def start(*flags, data=None, **settings):
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        folder.mkdir()
        if data:
            flags = ("--data-dir", data, "--output-dir", folder / "out", *TINY, *FLAGS, *flags)
        process = launch(flags, [folder / "stdout", folder / "stderr"], **settings)
        return Live(process, folder, folder / "out")

    return start


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Four subjects, for all tests here."""
    return make_subjects(tmp_path_factory.mktemp("heads") / "data", 4)


@pytest.fixture
def again(run, heads, no_figures):
    """Run in this process; returns (status, stdout, stderr)."""
    return lambda *flags, **places: run(*FLAGS, *flags, **{"data": heads} | places)


def test_signals_end_caching_and_training_with_all_workers_in_a_line(begin, heads, tmp_path):
    runs, many = [], make_subjects(tmp_path / "many", 60)  # preparing so many takes seconds
    for data, reached, advised, way_on in (
        (many, "cache/*.pt", "Nothing had begun", ""),
        (heads, "checkpoints/last.pth", "Go on with the same command", "--resume"),
    ):
        # A terminal sends its signal to all processes, a scheduler to the first.
        for number, send in ((signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)):
            run = begin(*FOR_EVER, data=data)
            run.wait_for(reached)
            send(run.pid, number)
            told = f"Interrupted ({number.name}). {advised}"
            runs.append((run, 128 + number, told, way_on))
    for run, *expected in runs:
        run.end(*expected)
        assert list(run.out.rglob(".writing-*")) == []


def stick(flag):
    """Let the first file that is put in its place take for ever, and go on so after a signal."""

    def replace(*_):
        try:
            flag.touch()
            time.sleep(60)
        finally:
            flag.with_suffix(".signal").touch()
            time.sleep(60)

    os.replace = replace


def test_second_signal_ends_a_run_that_is_stuck_at_once(begin, heads, tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        flag = tmp_path / f"{number}.reached"
        run = begin(data=heads, hook=(stick, flag))
        wait_until(flag.exists, lambda run=run: run.stderr)
        os.kill(run.pid, number)
        wait_until(flag.with_suffix(".signal").exists, lambda run=run: run.stderr)
        os.kill(run.pid, number)
        run.process.join(5)
        assert (run.process.exitcode, "Traceback" in run.stderr) == (128 + number, False)


def kill_worker(call):
    """Let a worker be killed in its call-th reading of a prepared volume."""
    calls, real = itertools.count(1), torch.load

    def load(*args, **settings):
        if torch.utils.data.get_worker_info() and next(calls) == call:
            time.sleep(1)  # until the run has received what is done
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **settings)

    torch.load = load


def test_killed_worker_is_told_with_what_to_lower(begin, heads):
    told = "Error: a worker process was killed, most likely since memory, or /dev/shm, ran out."
    # Caching looks for each of four volumes and reads it: 8 calls; an epoch reads one.
    for call_, way_on in ((3, ""), (9, "--resume")):
        run = begin("--epochs", 99, "--num-workers", 1, data=heads, hook=(kill_worker, call_))
        run.end(1, told, way_on, 60)
        assert f"{told}\nFirst lower --num-workers. To need less: --sw-batch-size 1" in run.stderr
    assert train_pvs.lacks_memory(RuntimeError("GET was unable to find an engine to execute"))


def test_folder_of_a_running_training_is_refused_until_it_is_killed(begin, again, heads):
    run = begin(*FOR_EVER, data=heads)
    run.wait_for("checkpoints/last.pth")
    growing = [path.name for path in run.out.glob("logs/tensorboard/*")]
    growing += ["train.log", "training_history.json"]
    kept = snapshot(run.out / "logs", growing)
    for command in ("--overwrite", "--resume", "--evaluate", "--check"):
        flags = ("--data-dir", heads, "--output-dir", run.out, *MACHINE)
        result = call(command, *flags, *(TINY if command != "--evaluate" else ()))
        refused(result, f"Error: {run.out}: another run is using this folder")
    assert snapshot(run.out / "logs", growing) == kept
    workers = min(2, len(os.sched_getaffinity(0)))  # which live for some seconds more
    assert len(members(run.pid)) == 1 + workers
    os.kill(run.pid, signal.SIGKILL)
    run.process.join(5)
    # What was left here, and what other commands write, here and (another computer's) in a fold.
    places = ("predictions", run.pid), ("predictions", os.getppid()), ("fold-1", run.pid)
    files = [run.out / f"{place}/.writing-{pid}-x" for place, pid in places]
    for file in files:
        train_pvs.write_file(file, "half a file")
    # Some epochs more, without workers: the run that was never killed has them too.
    last = torch.load(run.out / "checkpoints" / "last.pth", weights_only=True)["history_row"]
    flags, calm = ("--epochs", last["epoch"] // 2 * 2 + 2), run.folder / "calm"
    out = trained(again("--resume", *flags, out=run.out))
    assert f"Resumed         after epoch {last['epoch']}" in out
    assert [file.exists() for file in files] == [False, True, True]
    trained(again(*flags, out=calm))
    assert outcome(run.out) == outcome(calm)


def test_runs_killed_at_random_moments_become_the_same(begin):
    run = begin("--kills", 6, function=kill_and_resume)
    run.process.join(600)
    told = (run.folder / "stdout").read_text() + run.stderr
    assert (run.process.exitcode, "6 kills survived" in told) == (0, True), told


def fill_disk(monkeypatch, start):
    """Run as advised till it works, while the first file of a kind finds no room; return kinds."""
    seen, failed, flags, real = set(), [], [], os.replace

    def replace(source, target):
        path = Path(target)
        place, end = path.parent.name, path.name.split("_")[-1]
        kinds = {"cache": place, "multi_plane": place, "anat": end}  # the same for all cases
        kind = kinds.get(place, path.name)
        if kind not in seen:
            seen.add(kind)
            failed.append((path, path.read_bytes() if path.exists() else None))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    while True:
        failed.clear()
        status, out, err = start(*flags)
        if not failed:
            trained((status, out, err))
            return seen
        ((path, former),) = failed
        assert (status, "Traceback" in err) == (1, False), err
        told = rf"Error: {re.escape(str(path))}: cannot be written \(No space left on device\); "
        assert re.search(told + r"it takes [\d.]+ MB, [\d.]+ MB are free", err), err
        assert (path.read_bytes() if path.exists() else None) == former
        assert list(path.parent.glob(".writing-*")) == []
        flags = [flag for flag, words in GO_ON.items() if err.strip().endswith(words) and flag]
        flags = ["--overwrite"] if "add --overwrite" in err else flags


def test_full_disk_is_told_for_each_file_and_survived(again, heads, monkeypatch, tmp_path):
    whole = tmp_path / "whole"
    trained(again(out=whole))
    kinds = "cache split.json best_model.pth last.pth training_history.json mask.nii.gz "
    kinds += "multi_plane dataset_description.json comprehensive_test_metrics.json agreement.jpg "
    kinds += "test_metrics.csv test_set_visualization_grid_300dpi.jpg training_curves.jpg "
    kinds += "report.html " + (single := "dseg.nii.gz dseg.tsv seg-PVS_dseg.json ")
    assert fill_disk(monkeypatch, again) == set(kinds.split())
    assert outcome(tmp_path / "out") == outcome(whole)
    monkeypatch.undo()
    draw_nothing(monkeypatch)
    scans, predicted = [image_path(heads, f"sub-00{n}") for n in (1, 2)], tmp_path / "predicted"
    best = ("--checkpoint", whole / "checkpoints" / "best_model.pth", "--save-probabilities")
    log, flags = ["predict.log", "report.html"], ("--predict", *scans, *best, *MACHINE)
    found = fill_disk(monkeypatch, lambda *m: call(*flags, *m, "--output-dir", predicted))
    kinds = single + "dataset_description.json mask.nii.gz probseg.nii.gz multi_plane "
    kinds += "participants_pvs.csv report.html"
    assert found == set(kinds.split())
    done(call(*flags, "--output-dir", tmp_path / "calm"))
    assert snapshot(predicted, log) == snapshot(tmp_path / "calm", log)


def test_loss_or_gradient_that_is_not_finite_ends_the_run_unsaved(copied, no_figures):
    # Logits of 1e30 and more have a finite loss; the squares of their gradients overflow.
    last, cases = copied.out / "checkpoints" / "last.pth", "|".join(copied.split["train"])
    content = torch.load(last, weights_only=True)
    for weight, told in {3e38: "loss", 1e30: "gradient"}.items():
        content["model"]["segmentation_head.0.weight"].fill_(weight)
        torch.save(content, last)
        before = snapshot(copied.out / "checkpoints")
        status, _, err = call("--resume", "--output-dir", copied.out, "--epochs", 6)
        told = rf"Error: the {told} became (inf|nan) in epoch 5 with ({cases})\. Nothing was saved"
        assert (status, bool(re.match(told, err)), "--no-amp" in err) == (1, True, True), err
        assert snapshot(copied.out / "checkpoints") == before


def test_float16_passes_over_steps_that_overflow_but_not_for_ever(tiny_config):
    model = torch.nn.Conv3d(1, 1, 1)
    state = train_pvs.TrainState(model, tiny_config())
    state.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=65536.0)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(1, 31):
        state.scaler.scale((model(torch.ones(1, 1, 2, 2, 2)) * np.inf).sum()).backward()
        norm = state.step()
        assert state.scaler.get_scale() == 65536 / 2**step
        assert all(map(torch.equal, model.parameters(), weights))
        # 65536 halved 29 times is 1.2e-4, 30 times 6e-5: below 1e-4 it is told.
        assert np.isfinite(norm) == (step < 30)


def test_more_epochs_on_resuming_give_the_run_that_had_them_from_the_start(heads, again, tmp_path):
    # With these numbers the validation of epoch 6 is the best of all, but out of its turn.
    flags = ("--val-every", 4, "--lr-patience", 0, "--lr", 0.02, "--batchnorm-momentum", 0.9)
    rows = []
    for epochs, out in ((8, "whole"), (6, "out")):
        begin = ("--resume", "--overwrite", "--epochs", epochs)  # there is nothing to go on with
        trained(again(*flags, "--seed", 1, *begin, out=tmp_path / out))
        rows.append(json.loads((tmp_path / out / "logs" / "training_history.json").read_text()))
    turns = [[row["epoch"] for row in part if row["val_dice"] is not None] for part in rows]
    assert turns == [[1, 4, 8], [1, 4, 6]]
    trained(call("--resume", "--overwrite", "--output-dir", tmp_path / "out", "--epochs", 8))
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_resume_needs_no_other_flags_and_warns_of_other_versions(copied, no_figures):
    resume = functools.partial(call, "--resume", "--output-dir", copied.out)
    expected = outcome(copied.out)
    assert "Resumed         after epoch 4" in done(resume())
    assert outcome(copied.out) == expected
    # Other versions and arithmetic are only warned of.
    last = copied.out / "checkpoints" / "last.pth"
    content = torch.load(last, weights_only=True)
    content["versions"] |= {"monai": "0.1", "arithmetic": "torch.float16"}
    torch.save(content, last)
    status, out, _ = resume("--epochs", 5)
    assert (status, out.count("Warning: the run began with")) == (0, 2)
    for name in ("monai 0.1", "arithmetic torch.float16"):
        told = rf"Warning: the run began with {name}, now it is \S+: the numbers may differ"
        assert len(re.findall(told, out)) == 1
        assert re.search(told, (copied.out / "logs" / "train.log").read_text())


def test_data_that_are_not_those_of_the_run_are_named_on_resuming(copied, no_figures):
    resume = functools.partial(call, "--resume", "--output-dir", copied.out)
    scan, mask, gone = copied.split["train"]
    make_subject(copied.data, "sub-999", seed=99)
    flags = ("--data-dir", copied.data)
    assert re.search("[Ll]eft out, .* sub-999", done(resume(*flags)))  # data may lie elsewhere
    for place, subject in ((image_path, scan), (label_path, mask)):
        place(copied.data, subject).write_bytes(place(copied.data, "sub-999").read_bytes())
    was, err = "than the run began with\n", refused(resume(*flags))
    assert err == f"Error: cannot resume:\n  {scan}: another scan {was}  {mask}: another mask {was}"
    image_path(copied.data, gone).unlink()
    label_path(copied.data, gone).unlink()
    refused(resume(*flags), f"scans of the run are missing: {gone}\n")
