"""What a checkpoint holds, what is refused in its place, and whose settings count."""

import hashlib
import json
import os
import pickle
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

import train_pvs
from conftest import TINY, image_path, make_subject


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a run, out, with its data: five subjects, of which it has four."""
    folder = tmp_path_factory.mktemp("trained")
    for number in range(1, 6):
        make_subject(folder / "data", f"sub-{number:03d}", seed=number)
    split = map(str, split_file(folder, train="1 2", val="3", test="4"))
    argv = f"--data-dir {folder}/data --output-dir {folder}/out".split()
    assert train_pvs.main([*argv, *split, *TINY]) in (0, 1)
    return folder


@pytest.fixture
def start(trained, tmp_path, capsys):
    """Call main with a command and a checkpoint, FILE in stderr; returns (status, out, err)."""

    def call(command, path, *flags):
        if command == "resume":
            last = tmp_path / "out" / "checkpoints" / "last.pth"
            last.parent.mkdir(parents=True, exist_ok=True)
            path = os.replace(path, last) or last
        scan, data = image_path(trained / "data", "sub-005"), trained / "data"
        words = {
            "evaluate": ["--evaluate", "--checkpoint", path],
            "predict": ["--predict", scan, "--checkpoint", path],
            "resume": ["--resume"],
            "init-from": ["--init-from", path, "--data-dir", data, *TINY],
        }[command]
        folders = "--output-dir", tmp_path / "out", "--cache-dir", trained / "out" / "cache"
        status = train_pvs.main([*map(str, (*words, *folders, *flags))])
        shown = capsys.readouterr()
        return status, shown.out, shown.err.replace(str(path), "FILE")

    return call


def content_of(trained, command):
    name = "last.pth" if command == "resume" else "best_model.pth"
    return torch.load(trained / "out" / "checkpoints" / name, weights_only=True)


def split_file(folder, **numbers):
    """Write a split by numbers of subjects, such as "1 3"; return its flags."""
    split = {part: [f"sub-00{n}" for n in words.split()] for part, words in numbers.items()}
    (folder / "split.json").write_text(json.dumps(split))
    return "--split", folder / "split.json"


def is_plain(value):
    """Return whether a value is plain, a tensor or a container of such."""
    if isinstance(value, dict):
        return all(is_plain(v) for pair in value.items() for v in pair)
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return isinstance(value, torch.Tensor | str | int | float | bool | None)


def test_checkpoints_hold_plain_values_that_tell_their_origin(trained):
    for name in ("best_model.pth", "last.pth"):
        content = torch.load(trained / "out" / "checkpoints" / name, weights_only=True)
        assert is_plain(content)
        cfg = train_pvs.Config(**content["config"])
        assert (cfg.DECODER_WIDTH, cfg.PIX_DIM) == (2, (1, 1, 1))
        train_pvs.build_model(cfg).load_state_dict(content["model"])
        assert content["working_grid"] == {"orientation": "RAS", "spacing_mm": (1, 1, 1)}
        assert content["versions"]["torch"] == torch.__version__.split("+")[0]
        assert content["versions"]["arithmetic"] in ("torch.float32", "torch.bfloat16")
        history = json.loads((trained / "out/logs/training_history.json").read_text())
        assert content["history_row"] == history[0]
        parts = {"train": ["sub-001", "sub-002"], "val": ["sub-003"], "test": ["sub-004"]}
        assert {part: [*cases] for part, cases in content["sha256"].items()} == parts
        voxels = nib.load(image_path(trained / "data", "sub-003")).get_fdata(dtype=np.float32)
        sha256 = hashlib.sha256(np.ascontiguousarray(voxels)).hexdigest()
        assert content["sha256"]["val"]["sub-003"] == sha256


# ---------------------------------------------------------------------------- What is no checkpoint


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("code was run",)


def other_bytes(change):
    """Write a checkpoint and change the bytes of its file."""

    def write(path, content):
        torch.save(content, path)
        path.write_bytes(change(path.read_bytes()))

    return write


def other(**parts):
    return lambda path, content: torch.save(content | parts, path)


def with_settings(**values):
    return lambda path, content: other(config=content["config"] | values)(path, content)


def with_weights(change):
    def write(path, content):
        model = {name: change(tensor) for name, tensor in content["model"].items()}
        torch.save(content | {"model": model}, path)

    return write


def flip(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


NONE = "FILE: expected a checkpoint of this script"
MISFIT = "FILE: its weights do not fit"
NAN = float("nan")
USELESS = [  # words of the message, and what writes the file
    (NONE, *(other_bytes(lambda c, new=new: new) for new in (b"", b"weights\n", bytes(5000)))),
    (NONE, other_bytes(lambda c: c[:5000]), other_bytes(lambda c: c[:-1]), other_bytes(flip)),
    (NONE, lambda path, _: path.write_bytes(pickle.dumps({"model": Malicious()}, 2))),
    (NONE, other(model=Malicious()), other(versions=Malicious())),
    (NONE, lambda path, content: torch.save(content["model"], path)),
    (NONE, lambda path, _: torch.save([1, 2], path)),
    (NONE, other(config=[1]), other(sha256=None), other(model=3), other(history_row=None)),
    (MISFIT, other(model={"weight": torch.ones(3)}), other(model={"weight": 3})),
    (MISFIT, with_weights(lambda tensor: tensor[None])),
    ("FILE: |NaN", with_weights(lambda tensor: tensor * NAN)),
]
UNUSABLE = [  # where its settings count
    ("FILE: PIX_DIM: expected |got 1.0 1.0", with_settings(PIX_DIM=(1.0, 1.0))),
    ("FILE: PIX_DIM: expected ", with_settings(PIX_DIM=(NAN, 1, 1))),
    ("FILE: PIX_DIM: expected |FILE: SPLIT: expected", with_settings(PIX_DIM="1 1 1", SPLIT=5)),
]


@pytest.mark.parametrize("command", ["evaluate", "resume", "init-from"])
def test_useless_checkpoint_is_told_by_its_name_and_runs_no_code(
    command, trained, start, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    content, failures, path = content_of(trained, command), [], tmp_path / "weights.pth"
    for words, *writers in USELESS + (UNUSABLE if command != "init-from" else []):
        for number, write in enumerate(writers):
            write(path, dict(content))
            try:
                status, _, err = start(command, path)
            except Exception as error:  # a traceback for the user
                status, err = None, repr(error)
            missing = [word for word in words.split("|") if word not in err]
            if status != 2 or missing or len(err) > 1000:
                failures.append(f"{words!r} {number}: {status}, lacks {missing}: {err[:300]}")
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not failures, "\n".join(failures)
    assert not (tmp_path / "code was run").exists()
    other(model=Malicious())(path, {})
    torch.load(path, weights_only=False)
    assert (tmp_path / "code was run").exists()  # so that the line above can fail


def test_checkpoint_that_is_not_there_is_told_with_what_to_do(trained, start, tmp_path, run):
    for command in ("evaluate", "predict"):
        status, _, err = start(command, tmp_path / "none.pth")
        assert status == 2
        assert re.match("Error: FILE: .*expected a checkpoint.* train first.* --checkpoint", err)
    status, _, err = run("--resume", data=trained / "data")
    assert status == 2
    assert re.match(r"Error: .*last\.pth: .* without --resume", err)
    copy = shutil.copy(trained / "out/checkpoints/best_model.pth", tmp_path)
    status, _, err = start("resume", copy)  # weights are no state of a run
    assert (status, NONE in err) == (2, True)


def test_any_damaged_checkpoint_is_read_or_refused_by_name(tmp_path):
    path, rng = tmp_path / "small.pth", np.random.default_rng(1)
    row = {"epoch": 1, "val_dice": 0.5}
    content = {"model": torch.nn.Conv3d(1, 2, 3).state_dict(), "history_row": row}
    torch.save(content | {"config": {"LR": 0.1}, "sha256": {"test": {}}}, path)
    whole = path.read_bytes()
    for number in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged[: None if number % 3 else rng.integers(len(whole))])
        try:
            told = "".join(train_pvs.read_checkpoint(path)) and NONE
        except ValueError as error:
            told = str(error).replace(str(path), "FILE")
        assert told.startswith(NONE)


# ----------------------------------------------------------------------------- Whose settings count

FIXED = """--test-fraction 0.3 --val-fraction 0.3 --seed 9 --pix-dim 1 1 0.9 --sw-overlap 0.7
--intensity-percentiles 1 99 --img-patch-size 32 32 32 --architecture dynunet --encoder-depth 4
--encoder-name efficientnet-b1 --decoder-width 3 --encoder-weights imagenet --crops-per-volume 3
--pos-neg-ratio 1 --batch-size 3 --accumulate-steps 2 --batchnorm-momentum 0.2 --lr 0.5
--weight-decay 0.1 --grad-clip 3 --lr-factor 0.6 --lr-patience 4 --lr-min 1e-7 --val-every 2
--early-stopping 5 --ema-decay 0.9 --split other.json --init-from other.pth
--no-head-bias-log-odds"""  # what only another training can change, other than in TINY
LENGTH = "--epochs 9 --max-minutes 7"  # which --resume may change
FOLDS = "--folds 5 --fold 1"  # of which a run that goes on is told by its folder
FREE = "--tta-flips --threshold 0.4 --smallest-pvs 2 --no-amp --sw-batch-size 2 --num-workers 0"


def names_of(flags):
    """Return the names of the settings that flags set."""
    found = re.findall(r"--(?:no-)?([a-z-]+)", flags)
    return {name.upper().replace("-", "_") for name in found}


def test_settings_of_training_are_refused_by_name_and_others_taken(trained, start, tmp_path):
    groups = train_pvs.Split, train_pvs.Grid, train_pvs.Network, train_pvs.Training
    groups = train_pvs.names(*groups, train_pvs.Length)
    assert names_of(f"{FIXED} {LENGTH} {FOLDS}") == groups
    for command in ("evaluate", "predict", "resume"):
        flags = FIXED if command == "resume" else f"{FIXED} {LENGTH} {FOLDS}"
        name = "last.pth" if command == "resume" else "best_model.pth"
        copy = shutil.copy(trained / "out" / "checkpoints" / name, tmp_path)
        # The settings are told before data are looked at.
        status, _, err = start(command, copy, *flags.split(), "--data-dir", "none")
        told = re.findall(r"^  ([A-Z_]+): FILE has .+, not .+; only another", err, re.MULTILINE)
        assert (status, sorted(told)) == (2, sorted(names_of(flags))), (command, err)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    copy = shutil.copy(trained / "out/checkpoints/best_model.pth", tmp_path / "copy.pth")
    # What the run was started with may be given.
    status, _, err = start("evaluate", copy, *FREE.split(), *TINY)
    assert (status, err) == (0, "")
    scores = json.loads((tmp_path / "out/logs/comprehensive_test_metrics.json").read_text())
    assert [row["subject"] for row in scores["subjects"]] == ["sub-004", "sub-005"]  # unseen
    used = scores["config"]
    assert (used["TTA_FLIPS"], used["THRESHOLD"], used["AMP"]) == (True, 0.4, False)


def test_checkpoint_of_an_earlier_version_is_used_with_published_values(trained, start, tmp_path):
    gone = {"CROP_SHIFT": 0.0, "LABEL_RESAMPLING": "nearest"}
    for command in ("predict", "resume"):
        content = content_of(trained, command)
        content["config"] |= gone | {"SPLIT": "gone.json", "ENCODER_WEIGHTS": "gone.pth"}
        del content["config"]["SAVE_PROBABILITIES"], content["config"]["WEIGHT_DECAY"]
        del content["versions"]["arithmetic"]
        torch.save(content, tmp_path / "earlier.pth")
        if command == "resume":
            shutil.copytree(trained / "out", tmp_path / "out", dirs_exist_ok=True)
        status, out, err = start(command, tmp_path / "earlier.pth")
        assert status in (0, 1), (command, err)
        for name in gone:
            assert re.search(rf"^Warning: .*\.pth: .*\b{name}\b", out, re.MULTILINE)
        shutil.rmtree(tmp_path / "out")


# ---------------------------------------------------------------------------------------- INIT_FROM


def test_training_starts_from_the_weights_of_a_checkpoint(trained, start, tmp_path):
    path = shutil.copy(trained / "out/checkpoints/best_model.pth", tmp_path / "first.pth")
    split = split_file(tmp_path, train="1 3", val="5", test="4")
    status, _, err = start("init-from", path, "--lr", 1e-9, "--lr-min", 0, *split)
    assert status in (0, 1), err
    first, second = (
        torch.load(p, weights_only=True)["model"]
        for p in (path, tmp_path / "out/checkpoints/best_model.pth")
    )
    for name, weights in first.items():
        if name.endswith(("weight", "bias")):  # and no statistics of the new data
            assert torch.allclose(weights, second[name], atol=1e-7), name


def test_weights_to_start_from_are_refused_where_they_know_the_test_or_do_not_fit(
    trained, start, tmp_path
):
    first = trained / "out" / "checkpoints" / "best_model.pth"
    for parts, known in (
        ({"train": "2 3", "val": "5", "test": "1"}, ["sub-001"]),  # trained with it
        ({"train": "1 2", "val": "5", "test": "3"}, ["sub-003"]),  # chosen with it
        ({"train": "1", "val": "2", "test": "3 4"}, ["sub-002", "sub-003"]),
    ):
        path = shutil.copy(first, tmp_path / "first.pth")
        status, _, err = start("init-from", path, "--check", *split_file(tmp_path, **parts))
        told = re.findall(r"  .*(sub-00\d)_T2w.nii.gz: for validation or test, but ", err)
        assert (status, told) == (2, known), err
    split = split_file(tmp_path, train="1", val="5", test="4")
    network = "--decoder-width", 3, "--encoder-name", "efficientnet-b1"
    status, _, err = start("init-from", first, *network, "--check", *split)
    assert status == 2
    assert re.search("FILE: .*network.* DECODER_WIDTH, ENCODER_NAME$", err, re.MULTILINE), err
    best = tmp_path / "out" / "checkpoints" / "best_model.pth"
    best.parent.mkdir()
    shutil.copy(first, best)
    status, _, err = start("init-from", best, "--overwrite", *split)
    assert status == 2
    assert "FILE: INIT_FROM, which this run would replace" in err
    assert best.read_bytes() == first.read_bytes()
