"""A run that was interrupted and resumed is the run that was never interrupted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kill_and_resume import FLAGS, outcome

import train_pvs
from conftest import image_path, label_path, make_subject, save_nifti


@pytest.fixture
def plain(monkeypatch):
    """Leave out the pictures, which take most of so short a run."""
    monkeypatch.setattr(train_pvs, "write_figure", lambda path, figure, title: figure.clear())


@pytest.fixture
def expected(data, run, plain, tmp_path):
    assert run(*FLAGS, out=tmp_path / "whole")[0] in (0, 1)
    return outcome(tmp_path / "whole")


def interrupt(monkeypatch, name, call, when):
    """Let the call-th call of a function end as Ctrl-C does, before or after its work."""
    real, calls = getattr(train_pvs, name), []

    def stop(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and when == "before":
            raise KeyboardInterrupt
        result = real(*args, **kwargs)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(train_pvs, name, stop)


@pytest.mark.parametrize(
    ("name", "call", "when"),
    [
        ("update_weights", 2, "after"),  # in the second epoch
        ("validate", 2, "before"),
        ("validate", 3, "after"),
        ("save_checkpoint", 1, "after"),  # best_model.pth is of epoch 1, last.pth not there yet
        ("save_last", 2, "before"),
        ("save_last", 3, "after"),
        ("log_epoch", 4, "after"),
        ("write_prediction", 1, "after"),
        ("write_test_metrics", 1, "before"),
    ],
)
def test_interrupted_run_becomes_the_same(name, call, when, expected, data, run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, name, call, when)
        status, _, err = run(*FLAGS)
    assert status == 130
    begun = (tmp_path / "out" / "checkpoints" / "last.pth").exists()
    assert ("and --resume" if begun else "with --overwrite") in err
    status, out, err = run(*FLAGS, *(["--resume"] if begun else ["--overwrite"]))
    assert status in (0, 1), err
    assert ("Resumed         after epoch" in out) == begun
    assert outcome(tmp_path / "out") == expected


def test_interrupted_run_with_average_and_chosen_threshold_becomes_the_same(
    data, run, plain, tmp_path
):
    flags = (*FLAGS, "--ema-decay", 0.7, "--tune-decision", "--crop-shift", 0.3)
    assert run(*flags, out=tmp_path / "whole")[0] in (0, 1)
    for name, call in (("update_weights", 2), ("save_last", 3), ("choose_decision", 1)):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, name, call, "before")
            assert run(*flags, *(["--resume"] if name != "update_weights" else []))[0] == 130
    assert run(*flags, "--resume")[0] in (0, 1)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_workers_and_folders_may_differ_on_resuming(expected, data, run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "save_last", 2, "after")
        run(*FLAGS, "--num-workers", 2)
    (tmp_path / "moved").mkdir()
    data.rename(tmp_path / "moved" / "data")
    flags = (*FLAGS, "--resume", "--num-workers", 1, "--cache-dir", tmp_path / "cache")
    assert run(*flags, data=tmp_path / "moved" / "data")[0] in (0, 1)
    assert outcome(tmp_path / "out") == expected


def test_files_that_only_the_start_reads_may_be_gone_on_resuming(data, run, plain, tmp_path):
    run(out=tmp_path / "first")
    start = tmp_path / "first" / "checkpoints" / "best_model.pth"
    assert run("--init-from", start)[0] in (0, 1)
    start.unlink()
    assert run("--init-from", start, "--epochs", 2)[0] == 2
    status, _, err = run("--init-from", start, "--epochs", 2, "--resume")
    assert status in (0, 1), err


def test_more_epochs_go_on_from_the_end(data, run, plain, tmp_path):
    # Validated are the first and all even epochs, and so is each end: both runs have the same.
    flags = ("--val-every", 2, "--no-amp")
    run("--epochs", 4, *flags, out=tmp_path / "whole")
    run("--epochs", 2, *flags)
    run("--epochs", 4, *flags, "--resume")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_run_that_stopped_early_trains_no_further(data, run, plain, monkeypatch, tmp_path):
    monkeypatch.setattr(train_pvs, "validate", lambda *_: (1.0, 0.5))
    flags = ("--epochs", 9, "--early-stopping", 2)
    assert run(*flags)[0] == 0
    before = outcome(tmp_path / "out")
    assert [row["epoch"] for row in before[0]] == [1, 2, 3]
    status, out, _ = run(*flags, "--resume")
    assert status == 0
    assert "Stopped early" in out
    assert outcome(tmp_path / "out") == before


def test_resuming_nothing_is_an_error(data, run, tmp_path):
    status, _, err = run("--resume")
    assert status == 2
    assert f"{tmp_path / 'out' / 'checkpoints' / 'last.pth'}: no such file" in err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def begun(data, run, plain, tmp_path):
    """A finished run of one epoch, and a function that tells how --resume is refused."""
    run()
    before = (tmp_path / "out" / "checkpoints" / "last.pth").read_bytes()

    def refuse(*flags):
        status, _, err = run("--resume", *flags)
        assert status == 2
        assert (tmp_path / "out" / "checkpoints" / "last.pth").read_bytes() == before
        return err

    return refuse


def test_other_settings_are_refused_each_by_name(begun):
    err = begun("--lr", 1e-4, "--batch-size", 2, "--seed", 5)
    assert "LR: the run has 0.001, now it is 0.0001" in err
    assert "BATCH_SIZE: the run has 1, now it is 2" in err
    assert "SEED: the run has 123, now it is 5" in err
    assert "EPOCHS" not in err


def test_other_scans_masks_and_splits_are_refused_each_by_name(begun, data, tmp_path):
    split = json.loads((tmp_path / "out" / "logs" / "split.json").read_text())
    scan, mask = split["train"]
    make_subject(tmp_path / "other", "sub-001", seed=9)
    image_path(data, scan).write_bytes(image_path(tmp_path / "other", "sub-001").read_bytes())
    label = np.zeros((24, 28, 20), np.int16)
    label[10:12, 10:12, 5:15] = 1
    save_nifti(label_path(data, mask), label)
    err = begun()
    assert f"{scan}: another scan than the run began with" in err
    assert f"{mask}: another mask than the run began with" in err
    assert split["test"][0] not in err
    for subject in split["train"]:
        make_subject(data, subject, seed=int(subject[-1]))
    split["train"], split["val"] = split["val"], split["train"][:1]
    (tmp_path / "split.json").write_text(json.dumps(split))
    err = begun("--split", tmp_path / "split.json")
    assert f"{scan}: now missing in train" in err
    assert f"{scan}: new in val" in err


def test_damaged_last_checkpoint_is_told_by_name(begun, data, run, tmp_path):
    path = tmp_path / "out" / "checkpoints" / "last.pth"
    path.write_bytes(path.read_bytes()[:5000])
    status, _, err = run("--resume")
    assert status == 2
    assert f"{path}: expected a checkpoint of this script" in err


def test_second_run_in_one_folder_is_refused_while_the_first_lives(data, run, plain, tmp_path):
    out = tmp_path / "out"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX)"
    (out / "logs").mkdir(parents=True)
    command = [sys.executable, "-c", f"{hold}; print('held', flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        [*command, str(out / "logs" / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline() == b"held\n"
        status, _, err = run()
        assert status == 2
        assert f"{out}: another run is using this folder" in err
        assert not (out / "logs" / "train.log").exists()
        first.kill()
    (out / "predictions" / ".writing-1-mask.nii.gz").parent.mkdir()
    (out / "predictions" / ".writing-1-mask.nii.gz").write_text("half a file")
    assert run()[0] in (0, 1)
    assert list(out.rglob(".writing-*")) == []


def test_runs_killed_at_random_moments_become_the_same():
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, str(script), "--kills", "12"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "12 kills survived" in result.stdout
