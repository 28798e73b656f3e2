"""The script as a whole: what a run writes, what it refuses, the demo, the documents."""

import contextlib
import errno
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import torch
from scipy import ndimage

import train_pvs
from conftest import MACHINE, TINY, edited_copy, image_path, label_path, scores, snapshot
from running import call, done, refused, trained

SCRIPT = Path(train_pvs.__file__)
DOCUMENTS = [SCRIPT.with_name("README.md"), *sorted(SCRIPT.with_name("docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)


def test_run_writes_its_files_and_no_others_and_logs_what_the_screen_showed(finished):
    mask = "predictions/{0}/anat/{0}_label-PVS_desc-unetpp_mask.nii.gz"
    tables = [f"predictions/{{0}}/anat/{{0}}_seg-PVS_desc-{name}_dseg.{kind}"
              for name in ("unetpp", "manual") for kind in ("nii.gz", "tsv")]  # fmt: skip
    tested = finished.split["test"]
    assert tested == [row["participant_id"] for row in finished.scores["subjects"]]
    found = snapshot(finished.out)
    found = [name for name in found if not name.startswith(("cache/", "logs/tensorboard/"))]
    assert set(found) - {"logs/participants_pvs.csv"} == {
        *(file.format(subject) for subject in tested for file in (mask, *tables)),
        *(f"multi_plane/{subject}.png" for subject in tested),
        *("checkpoints/best_model.pth", "checkpoints/last.pth", "training_curves.jpg"),
        *("logs/.lock", "logs/train.log", "logs/training_history.json", "logs/split.json"),
        *("logs/comprehensive_test_metrics.json", "logs/test_metrics.csv", "agreement.jpg"),
        *("predictions/dataset_description.json", "predictions/seg-PVS_dseg.json"),
        *("test_set_visualization_grid_300dpi.jpg", "report.html"),
    }
    assert len(list((finished.out / "cache").iterdir())) == 6  # one a scan
    text = (finished.out / "logs" / "train.log").read_text()
    assert text == finished.screen
    assert not re.findall(r"\r|%\|", text)
    assert re.findall(r"^ +([1-4]) +\d\.\d{4} .*$", text, re.MULTILINE) == ["1", "2", "3", "4"]
    assert text.splitlines()[-1] == f"Scores and figures are in {finished.out}"


def test_files_hold_the_documented_keys(finished):
    got, history = finished.scores, json.loads(train_pvs.Run(finished.out).history.read_text())
    four = ("dice", "iou", "precision", "recall")
    assert set(got) == {
        *(f"{name}_{kind}" for name in four for kind in ("mean", "std")),
        *("data_set", "grid", "n", "empty_masks", "subjects", "config", "versions"),
        *("working", "native", "roundtrip", "lesions", "burden", "boundary", "rating"),
        *("checkpoint", "device", "date"),
    }
    told = {"n": 2, "grid": "working grid, RAS, 1 x 1 x 1 mm", "device": "cpu"}
    assert (told | {"data_set": "Simulated heads of a test"}).items() <= got.items()
    assert got["config"]["EPOCHS"] == 4
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    wanted = {"epoch", "train_loss", "train_dice", "val_loss", "val_dice", "lr"}
    assert all(set(row) == wanted | {"seconds", "val_seconds"} for row in history)
    best = torch.load(finished.best, weights_only=True)
    assert best["history_row"]["val_dice"] == max(row["val_dice"] for row in history) > 0
    assert best["working_grid"] == {"orientation": "RAS", "spacing_mm": (1, 1, 1)}
    assert best["versions"]["train_pvs"].endswith(f"SHA-256 {train_pvs.SCRIPT_HASH}")
    assert {part: [*names] for part, names in best["sha256"].items()} == finished.split


def test_results_are_replaced_with_overwrite_only_and_files_of_others_never(copied, no_figures):
    flags = "--data-dir", copied.data, "--output-dir", copied.out, *TINY
    before = snapshot(copied.out, ["check.log"])
    refused(call(*flags), f"Error: {copied.out}", "--output-dir", "--overwrite", "--resume")
    done(call(*flags, "--check"))
    after = snapshot(copied.out, ["check.log"])
    assert {name: after[name] for name in before} == before
    assert {Path(name).parent.name for name in set(after) - set(before)} <= {"cache"}
    mask = "predictions/sub-999/anat/sub-999_label-PVS_desc-other_mask.nii.gz"
    mine = ("checkpoints/mine.pth", "multi_plane/mine.png", "logs/mine.txt", "notes.md")
    for name in (mask, "multi_plane/sub-999.png", *mine):
        train_pvs.write_file(copied.out / name, "old")
    out = trained(call(*flags, "--overwrite"))
    assert len(json.loads((copied.out / "logs" / "training_history.json").read_text())) == 1
    assert not [*copied.out.rglob("*sub-999*")]
    assert [(copied.out / name).read_text() for name in mine] == ["old"] * len(mine)
    assert (copied.out / "logs" / "train.log").read_text().startswith(out)
    assert (str(copied.out) in out, "Simulated heads of a test" in out) == (True, True)


def test_check_needs_no_network_and_tells_what_a_run_would_use(data, run, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("offline")))
    out = done(run("--check", "--encoder-weights", "imagenet", "--pix-dim", 2, 2, 4))
    for line in (
        r"Scans +2 train, 1 val, 1 test$",
        r"Grid +working grid, RAS, 2 x 2 x 4 mm$",
        r"Network +UNet\+\+ with efficientnet-b0, 4\.8 M parameters$",
        r"Device +cpu, arithmetic in \w+",
        r" +BATCH_SIZE +1$",  # every setting
        r" +GRAD_CLIP +1\.0$",
        r".*coarser than the scans, 16\.0 times in voxel volume.*--pix-dim 1 1 1 ",
        r"Warning: AUGMENTATION published turns 2 x 2 x 4 mm as if",
    ):
        assert re.search(rf"^{line}", out, re.MULTILINE), line
    made = [name for name in snapshot(tmp_path / "out", [".lock"]) if "cache/" not in name]
    assert made == ["logs/check.log"]
    left = [tmp_path / "out" / name for name in ("logs/check.log", "cache")]
    assert f"Nothing was trained (--check). Left: {left[0]}, {left[1]}" in out
    # A file system without locks, and a screen that the caller has closed, are no hindrance.
    missing = Mock(side_effect=OSError(errno.ENOSYS, "no locks"))
    monkeypatch.setattr(train_pvs.fcntl, "lockf", missing)
    flags = ("--data-dir", data, "--output-dir", tmp_path / "closed", *TINY)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        assert train_pvs.main([*map(str, flags), "--check"]) == 0
    log = (tmp_path / "closed" / "logs" / "check.log").read_text()
    assert "Nothing was trained (--check)" in log
    assert "cannot be locked" in done(call(*flags, "--check"))


def test_mistakes_end_with_status_2_and_one_error_before_any_work(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    weights = finished.best
    for line, told in {
        "--batch": "unrecognized arguments: --batch",  # no abbreviations
        f"--checkpoint {weights}": "--checkpoint: expected ",
        "--demo --data-dir empty": "DATA_DIR: ",
        "--epoch 3": "did you mean --epochs?",
        "--folds 3": "--fold 1 to 3 as well, or all, got 0",
        "--fold all": "--fold all: expected --folds as well",
        "--fold all --folds 3 --evaluate": "--fold all: expected --folds as well",
        "--data-dir out --output-dir ./out": "OUTPUT_DIR: expected another folder",
        "--resume --output-dir out": "out/checkpoints/last.pth: expected ",
        "--evaluate": "checkpoints/best_model.pth: expected ",
        f"--evaluate --data-dir gone --checkpoint {weights}": "gone: no such folder, or it ",
    }.items():
        result = call(*line.split(), *MACHINE)
        assert refused(result, told).startswith("Error: ")
        assert result[1] == "", line
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    refused(call("--data-dir", "empty", "--output-dir", "out", *TINY), "aws s3 sync")


def test_run_that_learns_nothing_ends_with_status_1_and_says_what_to_try(copied, run, no_figures):
    content = torch.load(copied.best, weights_only=True)
    content["model"]["segmentation_head.0.bias"] -= 100  # no voxel is PVS
    torch.save(content | {"sha256": {}}, copied.best)
    flags = "--no-head-bias-log-odds --batchnorm-momentum 0 --lr 1e-9 --init-from".split()
    status, out, err = run(*flags, copied.best, data=copied.data)
    assert "Best validation Dice 0.0000 on the working grid, in epoch 1" in out
    assert (status, err[:19]) == (1, "No PVS were learned")
    assert "try --batchnorm-momentum 0.1, a lower --lr" in err  # the bias is the other weights'


def test_edited_script_runs_as_users_start_it(data, tmp_path):
    values = {
        **{"DATA_DIR": f"Path({str(data)!r})", "OUTPUT_DIR": '"out"', "CACHE_DIR": "None"},
        **{"PIX_DIM": "1", "IMG_PATCH_SIZE": "[16, 16, 16]", "ENCODER_WEIGHTS": '"none"'},
        **{"ENCODER_NAME": '"efficientnet-b0"', "ENCODER_DEPTH": "3.0", "DECODER_WIDTH": "2"},
        **{"EPOCHS": "1", "NUM_WORKERS": "2", "HEAD_BIAS_LOG_ODDS": "True", "DEVICE": '"cpu"'},
    }
    command = [sys.executable, edited_copy(tmp_path, **values).__file__, "--batch-size", "1"]
    (tmp_path / "matplotlibrc").write_text("text.usetex: True")  # found in the folder of the start
    how = {"cwd": tmp_path, "env": os.environ | {"MPLBACKEND": "module://of_a_notebook"}}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **how)
    assert (result.returncode in (0, 1), "Traceback" in result.stderr) == (True, False)
    assert ("No PVS were learned" in result.stderr) == (result.returncode == 1)
    assert result.stdout.splitlines()[-1] == f"Scores and figures are in {tmp_path / 'out'}"
    shown = re.findall(r"^  ([A-Z_]+) +.+$", result.stdout, re.MULTILINE)  # but what is published
    assert {*shown} == {*values, "BATCH_SIZE"} - {"CACHE_DIR"}
    config = scores(tmp_path / "out")["config"]
    assert (config["PIX_DIM"], config["ENCODER_DEPTH"], config["CACHE_DIR"]) == ([1, 1, 1], 3, "")


def test_demo_makes_its_data_and_tells_it_also_in_a_thread(no_figures, monkeypatch, tmp_path):
    monkeypatch.setattr(train_pvs, "DEMO_SUBJECTS", 3)
    flags = ["--demo", "--output-dir", str(tmp_path), *TINY, *"--pix-dim 4 4 4".split()]
    with ThreadPoolExecutor() as threads:
        result = threads.submit(call, *flags).result()
    assert "Test scores of 1 scans, Simulated heads" in trained(result)
    assert scores(tmp_path)["data_set"].startswith("Simulated heads")
    cases = train_pvs.find_cases(train_pvs.parse_command_line(flags)[0])
    for case, name in zip(cases, ("sub-001", "sub-002", "sub-003"), strict=True):
        paths = [str(at(tmp_path / "data", name)) for at in (image_path, label_path)]
        assert [case.subject, case.image, case.label] == [name, *paths]
    assert len({Path(case.image).read_bytes() for case in cases}) == 3  # each is another


def test_demo_data_follow_the_seed_are_made_once_and_replace_no_others(monkeypatch, tmp_path):
    monkeypatch.setattr(train_pvs, "DEMO_SUBJECTS", 1)
    folder, made = tmp_path / "data", []
    for seed in (1, 2):
        train_pvs.make_demo_data(folder, seed)
        made.append(snapshot(folder))
    assert all(made[0][name] != made[1][name] for name in made[0])
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train_pvs.make_demo_data(folder, 2)  # they are there
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    marker = folder / "dataset_description.json"  # as a run leaves it that was killed
    marker.write_text(json.dumps({"Name": json.loads(marker.read_text())["Name"]}))
    image_path(folder, "sub-001").unlink()
    train_pvs.make_demo_data(folder, 2)
    assert snapshot(folder) == made[1]
    # Data of others are left alone.
    for name in ("dataset_description.json", "scan.nii.gz"):
        theirs = tmp_path / name / "data" / name
        train_pvs.write_file(theirs, '{"Name": "Theirs", "BIDSVersion": "1.9.0"}')
        refused(call("--demo", "--output-dir", tmp_path / name, *TINY), f"{theirs.parent}: ")
        assert "Theirs" in theirs.read_text()


def test_simulated_head_has_bright_labelled_tubes_in_white_matter():
    image, mask = train_pvs.simulate_head(np.random.default_rng(5))
    assert image.shape == mask.shape == train_pvs.DEMO_SHAPE
    assert (image.dtype, mask.dtype, {*np.unique(mask)}) == (np.int16, np.uint8, {0, 1})
    assert 0.0005 < mask.mean() < 0.01
    wide, near = (ndimage.binary_dilation(mask > 0, iterations=count) for count in (3, 1))
    # Fluid is at 1.8 to 2.1 of white matter; thin tubes fill their voxels in part.
    assert np.median(image[mask > 0]) > 1.3 * np.median(image[wide & ~near])


def test_native_recipe_runs_with_its_own_network_and_grid(data, run, no_figures, tmp_path):
    small = "--recipe native --architecture dynunet --decoder-width 4 --pix-dim 0 0 0".split()
    out = trained(run(*small))
    assert "Network         DynUNet, 4 levels, 4 channels at full resolution" in out
    assert "Grid            working grid, RAS, 1 x 1 x 1 mm" in out
    predictions = tmp_path / "out" / "predictions"
    (mask,) = predictions.rglob("*_mask.nii.gz")
    assert mask.name.endswith("_label-PVS_desc-dynunet_mask.nii.gz")
    assert "DynUNet" in (predictions / "dataset_description.json").read_text()


def commands():
    """Return the arguments of every command line of the script in the documents."""
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python3?|torchrun) [^`]*)`", TEXT)
    pattern = r"(?:python3?|torchrun (?:-\S+ )+)\s*train_pvs\.py\b(.*)"
    found = [match[1] for line in lines for match in re.finditer(pattern, line)]
    return [shlex.split(re.split(r" (?:&&|;|\|) ", words)[0], comments=True) for words in found]


def test_command_lines_of_the_documents_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [argv for argv in commands() if "--help" not in argv]
    assert len(found) >= 5
    for argv in found:
        for word in argv:  # files that the reader has
            if word.endswith((".pth", ".json")):
                train_pvs.write_file(word, "")
        train_pvs.parse_command_line(argv)  # else it raises an error


def test_documents_name_every_file_and_setting_and_show_pictures_that_are_there(finished):
    names = map(Path, snapshot(finished.out, [".lock"]))
    names = [path for path in names if path.parent.name not in ("cache", "tensorboard")]
    words = {re.sub(r"^sub-\d+", "", path.name) for path in names}
    missing = [word for word in words if word not in TEXT]
    settings = SCRIPT.with_name("docs") / "settings.md"
    make = runpy.run_path(str(settings.with_name("make_settings.py")))
    assert settings.read_text(encoding="utf-8") == make["settings_page"]()
    missing += [f.name for f in fields(train_pvs.Config) if f"| `{f.name}` |" not in TEXT]
    for document in DOCUMENTS:
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", document.read_text(encoding="utf-8"))
        missing += [p for p in pictures if not (document.parent / p).is_file()]
    assert missing == []
