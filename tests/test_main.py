"""The script as a whole: a run's files, what it refuses, the demo, the README."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

import train_pvs
from conftest import TINY, image_path, label_path, make_subject

SCRIPT = Path(train_pvs.__file__)
README = SCRIPT.with_name("README.md")


def snapshot(folder):
    """Return the content of every file below a folder, the log's, lock's and cache's apart."""
    files = (p for p in Path(folder).rglob("*") if p.is_file() and p.parent.name != "cache")
    return {p: p.read_bytes() for p in files if p.name not in ("train.log", ".lock")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run over four subjects, two of them for the test, that call themselves simulated."""
    folder = tmp_path_factory.mktemp("finished")
    for number in range(1, 5):
        make_subject(folder / "data", f"sub-{number:03d}", seed=number)
    description = folder / "data" / "dataset_description.json"
    description.write_text('{"Name": "Simulated heads of a test"}')
    flags = ["--data-dir", str(folder / "data"), "--output-dir", str(folder / "out")]
    screen, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
        status = train_pvs.main([*flags, *TINY, "--epochs", "2", "--test-fraction", "0.5"])
    return SimpleNamespace(
        data=folder / "data",
        out=folder / "out",
        status=status,
        screen=screen.getvalue(),
        errors=errors.getvalue(),
        metrics=json.loads((folder / "out/logs/comprehensive_test_metrics.json").read_text()),
        split=json.loads((folder / "out/logs/split.json").read_text()),
    )


def test_run_writes_all_its_files(finished):
    assert finished.status in (0, 1)
    test = finished.split["test"]
    assert len(test) == 2
    cases = {f"multi_plane/{subject}.png" for subject in test}
    mask = "predictions/{0}/anat/{0}_label-PVS_desc-unetpp_mask.nii.gz"
    cases |= {mask.format(subject) for subject in test}
    assert {str(path.relative_to(finished.out)) for path in snapshot(finished.out)} == cases | {
        "checkpoints/best_model.pth",
        "checkpoints/last.pth",
        "logs/training_history.json",
        "logs/split.json",
        "logs/comprehensive_test_metrics.json",
        "logs/test_metrics.csv",
        "predictions/dataset_description.json",
        "test_set_visualization_grid_300dpi.jpg",
        "agreement.jpg",
        "training_curves.jpg",
    }
    assert (finished.out / "logs" / "train.log").exists()


def test_log_file_holds_what_the_screen_showed_and_no_progress_bars(finished):
    text = (finished.out / "logs" / "train.log").read_text()
    assert text.startswith(finished.screen)
    assert "Test scores" in text
    assert "\r" not in text
    assert "%|" not in text
    assert ("No PVS were learned" in text) == (finished.status == 1)


def test_metrics_file_holds_the_documented_keys(finished):
    assert set(finished.metrics) == {
        "data_set",
        "grid",
        "n",
        "dice_mean",
        "dice_std",
        "iou_mean",
        "iou_std",
        "precision_mean",
        "precision_std",
        "recall_mean",
        "recall_std",
        "empty_masks",
        "working",
        "native",
        "roundtrip",
        "lesions",
        "burden",
        "boundary",
        "subjects",
        "config",
        "versions",
        "checkpoint",
        "device",
        "date",
    }
    assert finished.metrics["n"] == 2
    assert finished.metrics["grid"] == "working grid, RAS, 1 x 1 x 1 mm"
    assert finished.metrics["device"] == "cpu"
    assert finished.metrics["config"]["EPOCHS"] == 2
    assert datetime.fromisoformat(finished.metrics["date"]).tzinfo is not None
    assert [row["subject"] for row in finished.metrics["subjects"]] == finished.split["test"]
    for row in finished.metrics["subjects"]:
        assert {*row} == {
            *("name", "subject", "dice", "iou", "precision", "recall"),
            *("working_label_voxels", "working_pred_voxels"),
            *("native_dice", "native_iou", "native_precision", "native_recall", "roundtrip_dice"),
            *("count_label", "count_pred", "count_error", "count_error_percent"),
            *(f"matched_{side}_{rule}" for side in ("label", "pred") for rule in ("any", "iou")),
            *("lesion_sensitivity_any", "lesion_precision_any", "lesion_f1_any"),
            *("lesion_sensitivity_iou", "lesion_precision_iou", "lesion_f1_iou"),
            *("volume_ml_label", "volume_ml_pred", "volume_ml_error", "volume_ml_error_percent"),
            *("nsd_voxel", "nsd_1mm", "hd95_mm", "one_mask_empty"),
        }


def test_published_standard_deviations_are_those_of_the_cases_themselves(
    finished, tmp_path, tiny_config
):
    # Dice 0.2 and 0.6: mean 0.4, each 0.2 off it; an estimate for all people would say 0.283.
    scores = [dict.fromkeys(("dice", "iou", "precision", "recall"), dice) for dice in (0.2, 0.6)]
    rows = [row | new for row, new in zip(finished.metrics["subjects"], scores, strict=True)]
    train_pvs.write_test_metrics(tmp_path, rows, {}, nn.Conv3d(1, 1, 1), tiny_config())
    metrics = json.loads((tmp_path / "comprehensive_test_metrics.json").read_text())
    for name in ("dice", "iou", "precision", "recall"):
        assert metrics[f"{name}_mean"] == pytest.approx(0.4)
        assert metrics[f"{name}_std"] == pytest.approx(0.2)


def test_output_list_of_the_readme_is_what_a_run_writes(finished):
    block = README.read_text(encoding="utf-8").split("outputs_3d/\n", 1)[1].split("```", 1)[0]
    listed = [line.split()[0] for line in block.splitlines() if line.strip()]
    covered = set()
    for name in listed:
        found = list(finished.out.glob(name.replace("sub-XXX", "sub-*").rstrip("/")))
        assert found, name
        covered |= {p for path in found for p in (path, *path.rglob("*"))}
    assert set(snapshot(finished.out)) <= covered


def test_history_has_a_row_an_epoch_with_the_documented_keys(finished):
    history = json.loads((finished.out / "logs" / "training_history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2]
    for row in history:
        assert {*row} == {
            *("epoch", "train_loss", "train_dice", "val_loss", "val_dice", "lr", "seconds")
        }


def test_no_subject_is_in_two_parts_of_the_split(finished):
    subjects = [subject for part in finished.split.values() for subject in part]
    assert set(finished.split) == {"train", "val", "test"}
    assert sorted(subjects) == ["sub-001", "sub-002", "sub-003", "sub-004"]


def test_simulated_data_is_called_so_in_table_and_file(finished):
    table = finished.screen[finished.screen.index("Test scores") :]
    assert "Simulated heads of a test" in table
    assert finished.metrics["data_set"] == "Simulated heads of a test"


def test_results_are_not_overwritten(finished, run):
    before = snapshot(finished.out)
    status, _, err = run(data=finished.data, out=finished.out)
    assert status == 2
    assert str(finished.out / "checkpoints" / "last.pth") in err
    assert "--overwrite" in err
    assert snapshot(finished.out) == before


def test_check_leaves_results_alone(finished, run):
    before = snapshot(finished.out)
    assert run("--check", data=finished.data, out=finished.out)[0] == 0
    assert snapshot(finished.out) == before


def test_results_are_replaced_with_overwrite(data, run, tmp_path):
    old = tmp_path / "out" / "checkpoints" / "best_model.pth"
    train_pvs.write_file(old, "old")
    train_pvs.write_file(tmp_path / "out" / "multi_plane" / "sub-999.png", "old")
    assert run("--overwrite")[0] in (0, 1)
    assert torch.load(old, weights_only=True)["history_row"]["epoch"] == 1
    assert not (tmp_path / "out" / "multi_plane" / "sub-999.png").exists()


def test_results_do_not_outlive_the_weights_that_overwrite_gives_up(
    data, run, monkeypatch, tmp_path
):
    names = (
        "checkpoints/best_model.pth",
        "logs/comprehensive_test_metrics.json",
        "logs/training_history.json",
        "test_set_visualization_grid_300dpi.jpg",
        "training_curves.jpg",
    )
    for name in names:
        train_pvs.write_file(tmp_path / "out" / name, "old")
    monkeypatch.setattr(train_pvs, "loss_function", lambda logits, label: logits.mean() / 0)
    assert run("--overwrite")[0] == 1
    assert [name for name in names if (tmp_path / "out" / name).exists()] == []


@pytest.mark.parametrize("name", ["checkpoints/mine.pth", "multi_plane/mine.png"])
def test_files_of_others_in_the_output_folder_survive(name, data, run, monkeypatch, tmp_path):
    monkeypatch.setattr(train_pvs, "evaluate", lambda *_: None)
    train_pvs.write_file(tmp_path / "out" / name, "mine")
    run()
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_check_trains_nothing_and_says_what_a_run_would_use(data, run, monkeypatch, tmp_path):
    monkeypatch.setattr(train_pvs, "train_and_test", lambda *_: pytest.fail("trained"))
    status, out, _ = run("--check")
    assert status == 0
    assert not (tmp_path / "out" / "checkpoints").exists()
    for line in (
        r"Scans +2 train, 1 val, 1 test",
        r"Grid +working grid, RAS, 1 x 1 x 1 mm",
        r"Network +UNet\+\+ with efficientnet-b0, 4\.8 M parameters",
        r"Device +cpu, arithmetic in \w+",
    ):
        assert re.search(line, out)


@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt(), 130), (OSError("no space left"), 1)]
)
def test_failures_end_in_a_line_and_a_status(error, expected, data, run, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(train_pvs, "train_and_test", fail)
    status, _, err = run()
    assert status == expected
    way_on = "No epoch was finished: run the same command again, with --overwrite."
    told = f"Interrupted (SIGINT). {way_on}\n" if expected == 130 else f"no space left\n{way_on}\n"
    assert err.removeprefix("Error: ") == told


def run_script(*flags, folder):
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_script_runs_as_users_start_it(data, tmp_path):
    result = run_script("--data-dir", data, "--output-dir", "out", *TINY, folder=tmp_path)
    assert result.returncode in (0, 1), result.stderr
    assert "Traceback" not in result.stderr
    last = result.stdout.splitlines()[-1]
    assert last == f"Scores and figures are in {tmp_path / 'out'}"
    assert ("No PVS were learned" in result.stderr) == (result.returncode == 1)
    assert (tmp_path / "out" / "checkpoints" / "best_model.pth").exists()


def test_script_with_wrong_settings_exits_with_2_and_no_traceback(tmp_path):
    result = run_script("--batch-size", "0", "--lr", "fast", folder=tmp_path)
    assert result.returncode == 2
    assert "BATCH_SIZE" in result.stderr
    assert "LR" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def small_head(rng):
    """Stand in for `simulate_head`: noise with one bright tube."""
    image, mask = rng.normal(400, 10, (20, 20, 20)), np.zeros((20, 20, 20), np.int16)
    image[:3] = image[-3:] = 0
    mask[9:11, 9:11, 5:15] = 1
    return (image + 400 * mask).astype(np.int16), mask.astype(np.uint8)


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(train_pvs, "simulate_head", small_head)
    monkeypatch.setattr(train_pvs, "DEMO_SUBJECTS", 4)


@pytest.fixture
def demo(small_demo, tmp_path, capsys):
    """Run --demo with the tiny settings and small heads."""

    def call(*flags):
        argv = ["--demo", "--output-dir", str(tmp_path / "demo"), *TINY, *flags]
        status = train_pvs.main(argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_demo_runs_on_data_of_its_own_and_says_that_it_is_simulated(demo, tmp_path):
    status, out, _ = demo()
    assert status in (0, 1)
    assert "Simulated heads" in out[out.index("Test scores") :]
    metrics = tmp_path / "demo" / "logs" / "comprehensive_test_metrics.json"
    assert json.loads(metrics.read_text())["data_set"].startswith("Simulated")
    assert (tmp_path / "demo" / "data" / "sub-001" / "anat" / "sub-001_T2w.nii.gz").exists()


def test_demo_data_is_a_bids_tree_whose_scans_and_masks_pair(small_demo, tmp_path, tiny_config):
    train_pvs.make_demo_data(tmp_path, 1)
    cases = train_pvs.find_cases(tiny_config(DATA_DIR=str(tmp_path)))
    assert all(train_pvs.check_headers(case) == ([], []) for case in cases)
    assert [case["subject"] for case in cases] == ["sub-001", "sub-002", "sub-003", "sub-004"]
    assert cases[0]["image"] == str(image_path(tmp_path, "sub-001"))
    assert cases[0]["label"] == str(label_path(tmp_path, "sub-001"))
    description = json.loads((tmp_path / "dataset_description.json").read_text())
    assert description["Name"].startswith("Simulated")
    assert description["BIDSVersion"]


def test_demo_data_is_left_alone_the_second_time(small_demo, tmp_path, monkeypatch):
    train_pvs.make_demo_data(tmp_path / "data", 1)
    monkeypatch.setattr(train_pvs, "simulate_head", lambda rng: pytest.fail("made again"))
    train_pvs.make_demo_data(tmp_path / "data", 1)


def test_demo_data_is_a_function_of_the_seed_and_remade_for_another(small_demo, tmp_path):
    scans = []
    for seed in (1, 2, 1):
        train_pvs.make_demo_data(tmp_path / "data", seed)
        paths = [image_path(tmp_path / "data", f"sub-{number:03d}") for number in range(1, 5)]
        scans.append(np.stack([nib.load(path).get_fdata() for path in paths]))
    assert np.array_equal(scans[0], scans[2])
    assert not np.array_equal(scans[0], scans[1])
    assert not np.array_equal(scans[0][0], scans[0][1])  # each subject is another


def test_interrupted_demo_data_is_remade(small_demo, tmp_path, monkeypatch):
    heads = []

    def interrupted(rng):
        heads.append(small_head(rng))
        if len(heads) == 3:
            raise KeyboardInterrupt
        return heads[-1]

    monkeypatch.setattr(train_pvs, "simulate_head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_pvs.make_demo_data(tmp_path / "data", 1)
    monkeypatch.setattr(train_pvs, "simulate_head", small_head)
    assert not image_path(tmp_path / "data", "sub-003").exists()
    train_pvs.make_demo_data(tmp_path / "data", 1)
    assert image_path(tmp_path / "data", "sub-003").exists()


@pytest.mark.parametrize("name", ["dataset_description.json", "scan.nii.gz"])
def test_demo_does_not_delete_data_of_others(name, demo, tmp_path):
    theirs = tmp_path / "demo" / "data" / name
    train_pvs.write_file(theirs, '{"Name": "Theirs", "BIDSVersion": "1.9.0"}')
    status, _, err = demo()
    assert theirs.exists()
    assert "Theirs" in theirs.read_text()
    assert status == 2
    assert str(theirs.parent) in err


def test_simulated_head_has_bright_labelled_tubes_in_white_matter():
    image, mask = train_pvs.simulate_head(np.random.default_rng(5))
    assert image.shape == mask.shape == train_pvs.DEMO_SHAPE
    assert (image.dtype, mask.dtype) == (np.int16, np.uint8)
    assert set(np.unique(mask)) == {0, 1}
    assert 0.0005 < mask.mean() < 0.01
    tubes = mask > 0
    around = ndimage.binary_dilation(tubes, iterations=3)
    around &= ~ndimage.binary_dilation(tubes, iterations=1)
    # Fluid is at 1.8 to 2.1 of white matter; thin tubes fill their voxels in part.
    assert np.median(image[tubes]) > 1.3 * np.median(image[around])

    again, mask_again = train_pvs.simulate_head(np.random.default_rng(5))
    assert np.array_equal(image, again)
    assert np.array_equal(mask, mask_again)


def readme_commands():
    """Return the flags of every command line of the script in a code block of the README."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    blocks = "".join(re.findall(r"^ *```.*?\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE))
    lines = blocks.replace("\\\n", " ").splitlines()
    found = (re.search(r"(?:python3?|torchrun .*) train_pvs\.py(.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.skipif(not README.exists(), reason="no README")
def test_command_lines_of_the_readme_are_valid():
    commands = readme_commands()
    assert commands
    for argv in commands:
        train_pvs.build_parser().parse_args(argv)  # argparse exits at a flag it does not know


def test_native_recipe_runs_with_its_own_network(data, run, tmp_path):
    small = "--recipe native --encoder-depth 3 --decoder-width 4 --img-patch-size 16 16 16"
    flags = [*small.split(), "--architecture", "dynunet", "--pix-dim", 0, 0, 0, "--no-amp"]
    status, out, err = run(*flags)
    assert status in (0, 1), err
    assert "Network         DynUNet, 4 levels, 4 channels at full resolution" in out
    assert "Grid            working grid, RAS, 1 x 1 x 1 mm" in out
    masks = list((tmp_path / "out" / "predictions").rglob("*_label-PVS_desc-dynunet_mask.nii.gz"))
    assert len(masks) == 1
    description = (tmp_path / "out" / "predictions" / "dataset_description.json").read_text()
    assert "DynUNet" in description
    machine = ["--device", "cpu", "--num-workers", "0", "--output-dir", str(tmp_path / "out")]
    assert train_pvs.main(["--evaluate", *machine]) == 0
    assert run(*flags, "--overwrite")[0] in (0, 1)  # the former masks are given up


# --------------------------------------------------------------------- starting from other weights


@pytest.fixture
def others(tmp_path, run):
    """A data set of other heads, and the checkpoint of a network that was trained on it."""
    for number in range(1, 5):
        make_subject(tmp_path / "others", f"sub-{number:03d}", seed=10 + number)
    assert run(data=tmp_path / "others", out=tmp_path / "first")[0] in (0, 1)
    return tmp_path / "first" / "checkpoints" / "best_model.pth"


def test_training_starts_from_the_weights_of_a_checkpoint(others, data, run, monkeypatch):
    seen, real = [], train_pvs.fit

    def fit(model, *args):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return real(model, *args)

    monkeypatch.setattr(train_pvs, "fit", fit)
    status, out, err = run("--init-from", others, "--seed", 5)
    assert status in (0, 1), err
    assert f"INIT_FROM             {others}" in out
    wanted = torch.load(others, weights_only=True)["model"]
    assert all(torch.equal(seen[0][name], value) for name, value in wanted.items())
    assert run("--init-from", others, "--seed", 5, "--resume", "--epochs", 2)[0] in (0, 1)


def test_checkpoint_of_another_network_to_start_from_is_told_by_what_differs(others, data, run):
    status, _, err = run("--init-from", others, "--decoder-width", 3, "--encoder-depth", 4)
    assert status == 2
    assert f"{others}: of another network than this run's:\n" in err
    assert "  ENCODER_DEPTH: the checkpoint has 3, now it is 4\n" in err
    assert "  DECODER_WIDTH: the checkpoint has 2, now it is 3\n" in err
    status, _, err = run("--init-from", others, "--architecture", "dynunet", "--overwrite")
    assert status == 2
    assert "  ARCHITECTURE: the checkpoint has unetplusplus, now it is dynunet\n" in err


def test_scans_that_the_first_weights_know_are_not_tested_on(others, data, run, tmp_path):
    known = json.loads((others.parents[1] / "logs" / "split.json").read_text())["train"]
    for path in (image_path, label_path):  # under another name: it is known by its voxels
        target = path(data, "sub-004")
        target.write_bytes(path(tmp_path / "others", known[0]).read_bytes())
    split = {"train": ["sub-001", "sub-002"], "val": ["sub-003"], "test": ["sub-004"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    flags = "--split", tmp_path / "split.json", "--init-from", others
    status, _, err = run(*flags)
    assert status == 2
    told = f"for validation or test, but {others} was trained or chosen with it"
    assert f"  {image_path(data, 'sub-004')}: {told}\nChoose other subjects with --split," in err
    assert run(*flags[:2])[0] in (0, 1)


def test_scans_of_the_first_training_are_known_to_all_that_start_from_it(
    others, data, run, tmp_path
):
    assert run("--init-from", others, out=tmp_path / "second")[0] in (0, 1)
    second = tmp_path / "second" / "checkpoints"
    machine = ["--device", "cpu", "--num-workers", "0", "--output-dir", str(tmp_path / "third")]
    flags = ["--data-dir", str(tmp_path / "others"), "--checkpoint", str(second / "best_model.pth")]
    assert train_pvs.main(["--evaluate", *flags, *machine]) == 2
    names = json.loads((others.parents[1] / "logs" / "split.json").read_text())["train"]
    split = {"train": ["sub-001", "sub-002"], "val": ["sub-003"], "test": ["sub-004"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    for path in (image_path, label_path):
        path(data, "sub-004").write_bytes(path(tmp_path / "others", names[0]).read_bytes())
    for file in ("best_model.pth", "last.pth"):
        status, _, err = run("--init-from", second / file, "--split", tmp_path / "split.json")
        assert status == 2
        assert "was trained or chosen with it" in err


def test_checkpoint_to_start_from_is_not_replaced_by_the_run(others, data, run):
    out = others.parents[1]
    content = others.read_bytes()
    status, _, err = run("--init-from", others, "--overwrite", out=out)
    assert status == 2
    assert f"{others}: INIT_FROM, which this run would replace; choose another --output-dir" in err
    assert others.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_damaged_checkpoint_to_start_from_is_named(content, data, run, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    status, _, err = run("--init-from", path)
    assert status == 2
    assert err.startswith(f"Error: {path}: expected a checkpoint of this script")
