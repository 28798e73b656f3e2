"""What a checkpoint holds, what is refused in its place, and whose settings count."""

import os
import pickle
import re
import shutil

import pytest
import torch

import train_pvs
from conftest import TINY, Malicious, image_path, make_subjects, scores, split_flags
from running import call, done, refused, trained


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return the folder of a run, out, with its data: five subjects, of which it has four."""
    folder = tmp_path_factory.mktemp("trained")
    places = "--data-dir", make_subjects(folder / "data", 5), "--output-dir", folder / "out"
    split = split_flags(folder, train="1 2", val="3", test="4")
    trained(call(*places, *split, *TINY))
    return folder


@pytest.fixture
def start(source, tmp_path, no_figures):
    """Call main with a command and a checkpoint, FILE in stderr; returns (status, out, err)."""

    def start(command, path, *flags):
        if command == "resume":
            last = tmp_path / "out" / "checkpoints" / "last.pth"
            last.parent.mkdir(parents=True, exist_ok=True)
            path = os.replace(path, last) or last
        scan, data = image_path(source / "data", "sub-005"), source / "data"
        words = {
            "evaluate": ["--evaluate", "--checkpoint", path],
            "predict": ["--predict", scan, "--checkpoint", path],
            "resume": ["--resume"],
            "init-from": ["--init-from", path, "--data-dir", data, *TINY],
        }[command]
        folders = "--output-dir", tmp_path / "out", "--cache-dir", source / "out" / "cache"
        status, out, err = call(*words, *folders, *flags)
        return status, out, err.replace(str(path), "FILE")

    return start


def content_of(source, command):
    name = "last.pth" if command == "resume" else "best_model.pth"
    return torch.load(source / "out" / "checkpoints" / name, weights_only=True)


def other_bytes(change):
    """Write a checkpoint and change the bytes of its file."""
    return lambda path, content: (
        torch.save(content, path) or path.write_bytes(change(path.read_bytes()))
    )


def other(**parts):
    """Write a checkpoint with other parts; a function gets the part that is there."""
    return lambda path, content: torch.save(
        content | {n: p(content[n]) if callable(p) else p for n, p in parts.items()}, path
    )


NONE = "FILE: expected a checkpoint of this script"
MISFIT = "FILE: its weights do not fit"
NAN = float("nan")
USELESS = [  # words of the message, and what writes the file
    (NONE, *(other_bytes(lambda c, new=new: new) for new in (b"", b"weights\n", bytes(5000)))),
    (NONE, other_bytes(lambda c: c[:5000]), other_bytes(lambda c: c[:-1])),
    (NONE, other_bytes(lambda c: c.replace(c[len(c) // 2 :][:8], b"damaged!"))),  # a weight
    (NONE, lambda path, _: path.write_bytes(pickle.dumps({"model": Malicious()}, 2))),
    (NONE, other(model=Malicious()), other(versions=Malicious())),
    (NONE, lambda path, content: torch.save(content["model"], path)),
    (NONE, other(config=[1]), other(sha256=None), other(model=3), other(history_row=None)),
    (MISFIT, other(model={"weight": torch.ones(3)}), other(model={"weight": 3})),
    (MISFIT, other(model=lambda model: {name: w[None] for name, w in model.items()})),
    ("FILE: |NaN", other(model=lambda model: {name: w * NAN for name, w in model.items()})),
]
UNUSABLE = (  # where its settings count
    "FILE: PIX_DIM: expected |FILE: SPLIT: expected",
    *(other(config=lambda c, n=n: c | {"PIX_DIM": n, "SPLIT": 5}) for n in ((1, 1), (NAN, 1, 1))),
)
# A run needs more than weights to go on.
NO_STATE = [(NONE, lambda path, c: torch.save({n: c[n] for n in train_pvs.CHECKPOINT_KEYS}, path))]
NO_STATE += [("began with SGD", other(optimizer_kind="SGD"))]


@pytest.mark.parametrize("command", ["evaluate", "resume", "init-from"])
def test_useless_checkpoint_is_told_and_runs_no_code(command, source, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, path = content_of(source, command), tmp_path / "weights.pth"
    more = {"evaluate": [UNUSABLE], "resume": [UNUSABLE, *NO_STATE], "init-from": []}[command]
    for words, *writers in USELESS + more:
        for write in writers:
            write(path, dict(content))
            assert len(refused(start(command, path), *words.split("|"))) <= 1000
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not (tmp_path / "code was run").exists()
    other(model=Malicious())(path, {})
    torch.load(path, weights_only=False)
    assert (tmp_path / "code was run").exists()  # so that the line above can fail


FIXED = """--test-fraction 0.3 --val-fraction 0.3 --seed 9 --pix-dim 1 1 0.9 --sw-overlap 0.7
--spacing-tolerance 0.1 --head-depth 99 --intensity-percentiles 1 99 --img-patch-size 32 32 32
--architecture dynunet --encoder-depth 4 --encoder-name efficientnet-b1 --decoder-width 3
--encoder-weights imagenet --crops-per-volume 3 --pos-neg-ratio 1 --batch-size 3
--accumulate-steps 2 --batchnorm-momentum 0.2 --lr 0.5 --weight-decay 0.1 --grad-clip 3
--lr-factor 0.6 --lr-patience 4 --lr-min 1e-7 --val-every 2 --val-overlap 0.3 --early-stopping 5
--split other.json --init-from other.pth --augmentation native --flip-axes x --lr-schedule poly
--no-head-bias-log-odds --deep-supervision"""  # only another training can change them
MORE = "--epochs 9 --max-minutes 7 --folds 5 --fold 1"  # other than with --resume
FREE = "--tta-flips none --threshold 0.4 --smallest-pvs 2 --no-amp --sw-batch-size 2"


def names_of(flags):
    return {name.upper().replace("-", "_") for name in re.findall(r"--(?:no-)?([a-z-]+)", flags)}


def test_settings_of_training_are_refused_by_name_and_others_taken(source, start, tmp_path):
    groups = train_pvs.Split, train_pvs.Grid, train_pvs.Network, train_pvs.Training
    assert names_of(f"{FIXED} {MORE}") == train_pvs.names(*groups, train_pvs.Length)
    for command in ("evaluate", "predict", "resume"):
        flags, copy = FIXED if command == "resume" else f"{FIXED} {MORE}", tmp_path / "copy.pth"
        torch.save(content_of(source, command), copy)
        # The settings are told before data are looked at.
        err = refused(start(command, copy, *flags.split(), "--data-dir", "none"))
        told = re.findall(r"^  ([A-Z_]+): FILE has .+, not .+; only another", err, re.MULTILINE)
        assert sorted(told) == sorted(names_of(flags)), (command, err)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    torch.save(content_of(source, "evaluate"), copy)
    # Along axes that were not trained nothing is mirrored. What the run began with may be given.
    refused(start("evaluate", copy, "--tta-flips", "full"), "TTA_FLIPS: ", "FLIP_AX")
    done(start("evaluate", copy, *FREE.split(), *TINY))
    content = scores(tmp_path / "out")
    tested = [row["participant_id"] for row in content["subjects"]]
    assert tested == ["sub-004", "sub-005"]  # unseen
    assert [content["config"][name] for name in ("THRESHOLD", "AMP")] == [0.4, False]


def test_other_length_under_poly_is_another_run_and_has_to_be_called_so(source, start, tmp_path):
    for more, told in ((("--epochs", 2), "EPOCHS: "), (("--max-minutes", 9), "MAX_MINUTES: ")):
        content = content_of(source, "resume")
        content["config"]["LR_SCHEDULE"] = "poly"
        torch.save(content, tmp_path / "copy.pth")
        err = refused(start("resume", tmp_path / "copy.pth", *more), told, "--stretch")
        assert err.count("only another training") == 1
    shutil.copytree(source / "out", tmp_path / "out", dirs_exist_ok=True)
    torch.save(content, tmp_path / "copy.pth")
    out = trained(start("resume", tmp_path / "copy.pth", "--epochs", 2, "--stretch"))
    assert re.search("^ +2 ", out, re.MULTILINE)


def test_checkpoint_of_an_earlier_version_is_used_with_published_values(source, start, tmp_path):
    gone = {"CROP_SHIFT": 0.0, "LABEL_RESAMPLING": "nearest"}
    for command in ("predict", "resume"):
        content = content_of(source, command)
        content["config"] |= gone | dict.fromkeys(("SPLIT", "ENCODER_WEIGHTS", "INIT_FROM"), "gone")
        del content["config"]["SAVE_PROBABILITIES"], content["config"]["WEIGHT_DECAY"]
        del content["versions"]["arithmetic"]
        content.pop("plateau", None)  # of a schedule that the script has no more
        torch.save(content, tmp_path / "earlier.pth")
        if command == "resume":
            shutil.copytree(source / "out", tmp_path / "out", dirs_exist_ok=True)
        out = (done if command == "predict" else trained)(start(command, tmp_path / "earlier.pth"))
        for name in gone:
            assert re.search(rf"^Warning: .*\.pth: .*\b{name}\b", out, re.MULTILINE)
        shutil.rmtree(tmp_path / "out")


def test_first_weights_fit_and_know_no_scan_of_validation_and_test(source, start, tmp_path):
    first, best = (folder / "out/checkpoints/best_model.pth" for folder in (source, tmp_path))
    for parts, known in (
        ({"train": "2 3", "val": "5", "test": "1"}, ["sub-001"]),  # trained with it
        ({"train": "1 2", "val": "5", "test": "3"}, ["sub-003"]),  # chosen with it
        ({"train": "1", "val": "2", "test": "3 4"}, ["sub-002", "sub-003"]),
    ):
        err = refused(start("init-from", first, "--check", *split_flags(tmp_path, **parts)))
        told = re.findall(r"  .*(sub-00\d)_T2w.nii.gz: for validation or test, but ", err)
        assert told == known, err
    split = split_flags(tmp_path, train="1 3", val="5", test="4")
    network = "--decoder-width", 3, "--encoder-name", "efficientnet-b1"
    err = refused(start("init-from", first, *network, "--check", *split))
    assert re.search("FILE: .*network.* DECODER_WIDTH, ENCODER_NAME$", err, re.MULTILINE), err
    trained(start("init-from", first, "--lr", 1e-9, "--lr-min", 0, *split))
    old, new = (torch.load(path, weights_only=True)["model"] for path in (first, best))
    for name in old.keys() | new.keys():
        if name.endswith(("weight", "bias")):  # and no statistics of the new data
            assert torch.allclose(old[name], new[name], atol=1e-7), name
    before = best.read_bytes()
    result = start("init-from", best, "--overwrite", *split)
    refused(result, "FILE: INIT_FROM, which this run would replace")
    assert best.read_bytes() == before
