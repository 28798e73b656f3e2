"""Several processes, as torchrun starts them, do the work of one."""

import json
import os
import re
import signal

import pytest
from kill_and_resume import comparable, outcome
from torch.distributed import TCPStore

import train_pvs
from conftest import LEARNING, MACHINE, TINY, make_subjects
from running import call, wait_until

SETTINGS = (*LEARNING, "--test-fraction", 0.4, "--val-fraction", 0.2)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Seven subjects: 3 to train, 1 to validate, 3 to test, which two processes share unevenly."""
    return make_subjects(tmp_path_factory.mktemp("heads") / "data", 7)


@pytest.fixture
def begin(launch, heads, tmp_path):
    """Start the processes of a run; returns them and the files of what they print."""
    stores = []  # each in the hands of this process, as torchrun's agent has it

    def start(*flags, count=2, out=tmp_path / "out", data=heads):
        stores.append(store := TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
        argv = ["--data-dir", data, "--output-dir", out, *flags]
        screens = [tmp_path / f"screen-{store.port}-{rank}" for rank in range(count)]
        processes = []
        for rank, screen in enumerate(screens):
            environment = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost"}
            environment |= {"MASTER_PORT": str(store.port), "RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_RANK": str(rank)}
            processes.append(launch(argv, 2 * [screen], environment=environment))
        return processes, screens

    return start


def end(processes, seconds=60):
    """Return the exit statuses."""
    for process in processes:
        process.join(seconds)
        assert not process.is_alive()
    return [process.exitcode for process in processes]


def wait_for_epochs(out, count):
    history = out / "logs" / "training_history.json"
    wait_until(history.exists, lambda: "no epoch has ended", 120)
    wait_until(lambda: len(json.loads(history.read_text())) >= count, lambda: "too few epochs", 120)


def test_two_processes_score_as_one_does(begin, heads, no_figures, tmp_path):
    out = tmp_path / "out"
    processes, screens = begin(*SETTINGS, "--epochs", 6, "--flip-axes", "x", "--tta-flips", "full")
    assert end(processes) == [0, 0]
    assert screens[1].read_text() == ""  # one writes, one shows progress
    assert "Traceback" not in screens[0].read_text()
    two = comparable(out)
    assert len(two["subjects"]) == 3
    assert two["dice_mean"] > 0.1
    assert call("--evaluate", "--output-dir", out, *MACHINE)[0] == 0
    assert comparable(out) == two
    assert end(begin("--evaluate", *MACHINE)[0]) == [0, 0]
    assert comparable(out) == two
    # The validation of the best epoch, by one process on the weights that were saved.
    content = train_pvs.read_checkpoint(out / "checkpoints" / "best_model.pth")
    cfg = train_pvs.Config(**content["config"])
    model = train_pvs.build_model(cfg, pretrained=False)
    model.load_state_dict(content["model"])
    cases = train_pvs.prepare_cases(train_pvs.find_cases(cfg), cfg)
    val = [case for case in cases if case.name in content["sha256"]["val"]]
    expected = [content["history_row"][name] for name in ("val_loss", "val_dice")]
    assert train_pvs.validate(model, val, cfg, 1) == pytest.approx(expected, rel=1e-6)
    # Folds follow one another in one store.
    assert end(begin(*TINY, "--folds", 4, "--fold", "all", "--check", count=3)[0], 200) == 3 * [0]


def test_run_whose_processes_are_killed_or_stopped_goes_on_exactly_with_as_many(begin, tmp_path):
    out = tmp_path / "out"
    processes, screens = begin(*SETTINGS, "--epochs", 500)
    wait_for_epochs(out, 1)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert end(processes) == [1, -signal.SIGKILL]
    last, advice = screens[0].read_text().splitlines()[-2:]
    assert last == "Error: another process of the run has ended."
    assert advice == "Go on with the same command and --resume."
    processes, screens = begin("--resume", count=1)
    assert end(processes) == [2]
    assert re.search("torchrun.*: the run has 2, now there are 1", screens[0].read_text())
    processes, screens = begin("--resume")
    wait_for_epochs(out, 3)
    for process in processes:  # as torchrun does when it is stopped
        os.kill(process.pid, signal.SIGTERM)
    assert end(processes) == [143, 143]
    told = "".join(screen.read_text() for screen in screens)
    assert told.count("Interrupted (SIGTERM). Go on with the same command and --resume.") == 1
    assert "Traceback" not in told
    epochs = len(json.loads((out / "logs" / "training_history.json").read_text())) + 1
    for flags, place in ((("--resume",), out), (SETTINGS, tmp_path / "whole")):
        processes, screens = begin(*flags, "--epochs", epochs, out=place)
        assert set(end(processes)) in ({0}, {1}), screens[0].read_text()
    assert outcome(out) == outcome(tmp_path / "whole")


def test_errors_of_settings_and_data_are_told_once_by_the_first_process(begin, tmp_path):
    for scan in make_subjects(tmp_path / "data", 4).glob("sub-00[23]/anat/*"):
        scan.write_bytes(scan.read_bytes()[:-50])
    begun = {
        "EPOCHS: expected ": begin(*TINY, "--epochs", 0),
        "unrecognized arguments: --no-such-flag": begin("--no-such-flag"),
        "gone: no such folder": begin(*TINY, data="gone"),
        "2 problems in the data": begin(*TINY, data=tmp_path / "data"),
        "--predict: works in one process": begin("--predict", "scan.nii"),
    }
    for told, (processes, screens) in begun.items():
        assert end(processes[:1]) == [2]  # the others wait, so that torchrun lets it tell
        first, second = (screen.read_text() for screen in screens)
        assert (first.count(told), second.count(told)) == (1, 0), (first, second)
        assert "Traceback" not in first + second
    assert begun["2 problems in the data"][1][0].read_text().count("to its last byte") == 2


def test_log_has_the_error_of_each_process(begin, tmp_path):
    processes, screens = begin(*SETTINGS, *"--val-fraction 0.4 --lr 1e6 --weight-decay 1".split())
    assert end(processes) == [1, 1]
    log = (tmp_path / "out" / "logs" / "train.log").read_text()
    told = [re.search("Error: .* became .*", screen.read_text())[0] for screen in screens]
    assert len({line for line in told if line in log}) == 2
