"""Several processes, as torchrun starts them, do the work of one."""

import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_and_resume import outcome

import train_pvs
from conftest import TINY, make_subject

FLAGS = ("--test-fraction", 0.4, "--val-fraction", 0.4, "--no-amp")
LEARNING = ("--lr", 3e-3, "--batchnorm-momentum", 1)  # finds PVS within a few epochs


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Seven subjects: 2 to train, 2 to validate, 3 to test, which two processes share unevenly."""
    folder = tmp_path_factory.mktemp("heads") / "data"
    for number in range(1, 8):
        make_subject(folder, f"sub-{number:03d}", seed=number)
    return folder


def live(argv, environment, screen):
    """Run as one of several processes, with stdout and stderr in a file."""
    file = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of the run's workers
    train_pvs.write_figure = lambda path, figure, title: figure.clear()
    sys.exit(train_pvs.main(argv))


@pytest.fixture
def begin(nursery, heads, tmp_path):
    """Start the processes of a run; returns them and the files of what they print."""
    begun = []

    def start(*flags, count=2, out=tmp_path / "out", data=heads):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        argv = ["--data-dir", str(data), "--output-dir", str(out), *map(str, flags)]
        screens = [tmp_path / f"screen-{len(begun)}-{rank}" for rank in range(count)]
        processes = []
        for rank in range(count):
            environment = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost"}
            environment |= {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            work = nursery.Process(target=live, args=(argv, environment, screens[rank]))
            work.start()
            processes.append(work)
        begun.extend(processes)
        return processes, screens

    yield start
    for process in begun:
        process.kill()
        process.join()


def end(processes, seconds=60):
    """Return the exit statuses."""
    for process in processes:
        process.join(seconds)
        assert not process.is_alive()
    return [process.exitcode for process in processes]


def wait_for_epochs(out, count):
    history = out / "logs" / "training_history.json"
    for _ in range(6000):
        if history.exists() and len(json.loads(history.read_text())) >= count:
            return
        time.sleep(0.01)
    pytest.fail(f"no {count} epochs in a minute")


def settings(epochs):
    return [*TINY, *map(str, (*FLAGS, *LEARNING)), "--epochs", str(epochs)]


@pytest.fixture(scope="module")
def scores():
    """Return what the tests came to, but for dates."""

    def read(out):
        content = json.loads((out / "logs" / "comprehensive_test_metrics.json").read_text())
        del content["date"]
        return content

    return read


@pytest.mark.parametrize("extra", [(), ("--ema-decay", 0.3, "--tune-decision")])
def test_two_processes_score_as_one_does(extra, begin, scores, heads, tmp_path, monkeypatch):
    out = tmp_path / "out"
    processes, screens = begin(*settings(6), *extra)
    assert end(processes) == [0, 0]
    assert screens[1].read_text() == ""  # one writes, one shows progress
    assert "Traceback" not in screens[0].read_text()
    two = scores(out)
    assert len(two["subjects"]) == 3
    assert two["dice_mean"] > 0.1
    monkeypatch.setattr(train_pvs, "write_figure", lambda path, figure, title: figure.clear())
    machine = ["--evaluate", "--num-workers", "0", "--device", "cpu"]
    evaluate = [*machine, "--data-dir", str(heads), "--output-dir", str(out)]
    assert train_pvs.main(evaluate) == 0
    assert scores(out) == two
    processes, _ = begin(*machine)
    assert end(processes) == [0, 0]
    assert scores(out) == two
    # The validation of the best epoch, by one process on the weights that were saved.
    content = train_pvs.read_checkpoint(out / "checkpoints" / "best_model.pth")
    cfg = train_pvs.restore_config(content, train_pvs.Config(OUTPUT_DIR=str(out)), {})
    model = train_pvs.build_model(cfg)
    train_pvs.load_weights(model, content, out)
    cases = train_pvs.prepare_cases(train_pvs.find_cases(cfg), cfg)
    split = json.loads((out / "logs" / "split.json").read_text())
    val = [case for case in cases if case["subject"] in split["val"]]
    row = content["history_row"]
    expected = row["val_loss"], row["val_dice"]
    assert train_pvs.validate(model, val, cfg, 1) == pytest.approx(expected, rel=1e-6)


def test_each_case_is_trained_on_once_an_epoch_by_one_of_the_processes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for count, length in {7: 3, 6: 2, 2: 1}.items():
        drawn = []
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            sampler = train_pvs.EpochSampler(count, train_pvs.Config(BATCH_SIZE=2))
            sampler.epoch = 5
            assert len(sampler) == math.ceil(length / 2)
            keys = list(itertools.chain(*itertools.islice(sampler, len(sampler))))
            assert len(keys) == length
            drawn += keys
        assert {epoch for epoch, _ in drawn} == {5}
        assert {number for _, number in drawn} == set(range(count))


def test_killed_process_ends_the_run_which_goes_on_exactly(begin, tmp_path):
    out = tmp_path / "out"
    processes, screens = begin(*settings(500))
    wait_for_epochs(out, 2)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert end(processes) == [1, -signal.SIGKILL]
    told = screens[0].read_text().splitlines()
    assert told[-2:] == [
        "Error: another process of the run has ended.",
        "Go on with the same command and --resume.",
    ]
    epochs = len(json.loads((out / "logs" / "training_history.json").read_text())) + 2
    processes, screens = begin(*settings(epochs), "--resume", count=1)
    assert end(processes) == [2]
    assert "torchrun --nproc_per_node): the run has 2, now there are 1" in screens[0].read_text()
    processes, _ = begin(*settings(epochs), "--resume")
    assert set(end(processes)) in ({0}, {1})
    processes, _ = begin(*settings(epochs), out=tmp_path / "whole")
    assert set(end(processes)) in ({0}, {1})
    assert outcome(out) == outcome(tmp_path / "whole")


def test_wrong_data_are_told_and_end_all_processes(begin, heads, tmp_path):
    for number in range(1, 5):
        make_subject(tmp_path / "data", f"sub-{number:03d}", seed=number)
    for scan in (tmp_path / "data").glob("sub-00[23]/anat/*"):
        scan.write_bytes(scan.read_bytes()[:-50])
    processes, screens = begin(*settings(1), data=tmp_path / "data")
    assert end(processes)[0] == 2
    told = screens[0].read_text()
    assert "2 problems in the data" in told
    assert len(re.findall("cannot be read to its last byte", told)) == 2
    assert "Traceback" not in screens[1].read_text()


def test_predict_is_refused_to_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert train_pvs.main(["--predict", "scan.nii"]) == 2
    assert "--predict: works in one process; start it without torchrun" in capsys.readouterr().err


def test_sigterm_to_torchrun_leaves_no_process_and_a_run_to_resume(heads, tmp_path):
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [train_pvs.__file__, "--data-dir", str(heads), "--output-dir", str(out), *settings(500)]
    with (tmp_path / "screen").open("w") as screen:
        launcher = subprocess.Popen([*torchrun, *argv], stdout=screen, stderr=screen)
    try:
        wait_for_epochs(out, 2)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) != 0
    finally:
        launcher.kill()
    words = [path for path in Path("/proc").glob("[0-9]*/cmdline") if argv[0] in read(path)]
    assert [path for path in words if str(out) in read(path)] == []
    told = (tmp_path / "screen").read_text()
    assert told.count("Interrupted (SIGTERM). Go on with the same command and --resume.") == 1
    assert (out / "checkpoints" / "last.pth").exists()


def read(path):
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended meanwhile
        return ""
