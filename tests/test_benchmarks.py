"""The benchmarks measure, and their tables hold what was measured."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import accuracy
import nnunet
import speed
import train_pvs


def table_rows(path):
    """Return the cells of the file's rows of numbers: what, A, B, number, number, ratio, range."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "measured"]


def test_ratio_is_the_median_of_the_pairs_ratios():
    # 3 / 2 = 1.5, 10 / 4 = 2.5, 8 / 1 = 8: the medians of the sides, 8 / 2, would give 4
    assert speed.median_ratio([(2, 3), (4, 10), (1, 8)]) == (2.5, 1.5, 8)


def test_rows_hold_positive_ratios_and_names_of_both_sides(tmp_path):
    output = tmp_path / "docs" / "benchmark.md"
    flags = ["--shape", "64", "72", "64", "--pairs", "1", "--output", str(output)]
    status = speed.main(["--only", "augmentation", "preparation", *flags])
    text, rows = output.read_text(), table_rows(output)
    assert status == 0
    assert re.findall("^## (.*?):", text, re.M) == ["preparation", "augmentation"]
    assert [row[1:3] for row in rows[:2]] == [
        ["first run, empty cache", "second run"],
        ["working grid 1.5 x 1.5 x 1.5 mm", "working grid 0.8 x 0.8 x 0.8 mm"],
    ]
    assert len(rows) == 4
    for *_, a, b, ratio, spread in rows:
        assert min(float(a), float(b), float(ratio.strip("*"))) > 0
        assert math.isfinite(float(ratio.strip("*")))
        assert spread.endswith("1 pair")


def test_sections_of_an_earlier_run_stay(tmp_path):
    command, path = "python benchmarks/speed.py", tmp_path / "benchmark.md"
    for name in ("step", "epoch", "step"):
        report = speed.Report(path, "# Head\n", command)
        report.begin(name)
        report.add("seconds", ("one", "other"), [(1, 2)])
    assert re.findall("^## (.*?):", path.read_text(), re.M) == ["epoch", "step"]
    assert len(table_rows(path)) == 2


def test_failed_section_loses_no_other(tmp_path, monkeypatch):
    def fail(bench):
        """Measure nothing"""
        bench.report.add("seconds", ("one", "other"), [(1, 2)])
        raise RuntimeError("no room")

    def work(bench):
        """Measure something"""
        bench.report.add("seconds", ("this", "that"), [(1, 4)])

    monkeypatch.setattr(speed, "SECTIONS", {"first": fail, "second": work})
    report = speed.Report(tmp_path / "benchmark.md", "# Head\n", "command")
    bench = speed.Bench(tmp_path, tmp_path, 1, speed.torch.device("cpu"), report)
    assert speed.run_sections(bench, ["first", "second"]) == 1
    assert [float(row[5].strip("*")) for row in table_rows(report.path)] == pytest.approx([2, 4])
    assert "Ended early: no room" in report.path.read_text()


def test_head_lies_in_front_and_above_in_air_without_pvs():
    shape = (64, 80, 60)
    scan, mask = speed.simulate_scan(np.random.default_rng(0), shape, (1, 0.9, 0.8))
    assert scan.shape == mask.shape == shape
    head = train_pvs.head_mask(torch.from_numpy(scan[None].astype(np.float32)))[0]
    assert head.any()
    assert mask.any()
    assert not head[:, :8].any()
    assert not head[:, :, :12].any()
    assert 0 < scan[:, :8].mean() < 0.1 * scan[32, 44, 36]


def test_resting_loader_begins_the_next_epoch_anew(data, tiny_config, tmp_path):
    places = {"DATA_DIR": str(data), "CACHE_DIR": str(tmp_path / "cache")}
    cfg = tiny_config(**places, NUM_WORKERS=1, BATCH_SIZE=2)
    cases = train_pvs.prepare_cases(train_pvs.find_cases(cfg), cfg)
    cpu = torch.device("cpu")
    loaders = [train_pvs.build_train_loader(cases, cfg, cpu) for _ in range(2)]
    watched, other = map(speed.WatchedLoader, loaders)
    for watched.epoch in (1, 2):
        names = [batch["name"] for batch in watched]
        workers = watched.loader.batches._workers
        watched.rest()
        assert not any(worker.is_alive() for worker in workers)
    other.epoch = 2
    assert [batch["name"] for batch in other] == names
    assert watched.waited > 0


def test_inference_of_a_checkpoint_tells_both_dices_of_a_head_unknown_to_it(data, run, tmp_path):
    assert run()[0] in (0, 1)
    best = tmp_path / "out" / "checkpoints" / "best_model.pth"
    (unknown,) = json.loads((tmp_path / "out" / "logs" / "split.json").read_text())["test"]
    output = tmp_path / "benchmark.md"
    flags = ["--only", "inference", "--pairs", "1", "--device", "cpu", "--data-dir", str(data)]
    assert speed.main([*flags, "--checkpoint", str(best), "--output", str(output)]) == 0
    text = output.read_text()
    assert "Network: UNet++ with efficientnet-b0 for `inference`, trained" in text
    dices = rf"native Dice of {unknown} [01]\.\d+, plain [01]\.\d+\."
    assert re.search(f"patches of 16 x 16 x 16, .*: {dices}", text)
    assert table_rows(output)[0][0] == "whole head, 1 x 1 x 1 mm, s"
    with pytest.raises(SystemExit):
        speed.main([*flags, "--checkpoint", str(tmp_path / "none.pth"), "--output", str(output)])


# --------------------------------------------------------------------------------------- Accuracy


@pytest.mark.parametrize(
    "row", [row for row, (_, flags, _) in accuracy.ROWS.items() if isinstance(flags, str)]
)
def test_flags_of_every_row_are_settings_that_differ_only_in_what_the_row_names(row):
    flags = [*accuracy.COMMON.split(), *accuracy.ROWS[row][1].split()]
    cfg, _ = train_pvs.parse_command_line([*flags, "--data-dir", "data"])
    assert cfg.IMG_PATCH_SIZE == (48, 48, 48)
    published = row.startswith("published")
    assert ((1.5,) * 3 if published or "1.5 mm" in row else (0, 0, 0)) == cfg.PIX_DIM
    assert cfg.DECODER_WIDTH == 16
    assert (cfg.ARCHITECTURE == "unetplusplus") == (published or "UNet++" in row)


def test_table_has_means_over_heads_and_seeds_and_paired_differences(tmp_path):
    def runs(*dices):  # of two heads for each seed
        rows = [
            {
                "native_dice": d,
                "roundtrip_dice": 1,
                "lesion_f1_any": 0.5,
                "volume_ml_error_percent": -100 * d,
            }
            for d in dices
        ]
        grid = "working grid, RAS, 0.8 x 0.8 x 0.8 mm"
        return {seed: (rows[2 * seed : 2 * seed + 2], grid, 7) for seed in range(len(rows) // 2)}

    results = {"published": runs(0.1, 0.2, 0.3, 0.2), "native": runs(0.5, 0.6, 0.8, 0.7)}
    options = SimpleNamespace(minutes=3)
    accuracy.write_table(tmp_path / "table.md", results, options)
    published, native = (tmp_path / "table.md").read_text().splitlines()[-2:]
    # Means 0.2 and 0.65; differences -0.4, -0.4, -0.5, -0.5; the error of volume without its sign
    assert "| 0.200 (0." in published
    assert "| -0.450 (-0.500 to -0.400) |" in published
    assert "| 20 (" in published
    assert "| 0.650 (0." in native
    assert native.endswith(" |  | 7, 7 |")


def write_run(out, dice):
    """Write what a run leaves of two heads, as far as the table reads it."""
    row = {"native_dice": dice, "roundtrip_dice": 1, "lesion_f1_any": 0.5}
    content = {
        "subjects": 2 * [row | {"volume_ml_error_percent": 3}],
        "grid": "grid, 0.8 x 0.8 x 0.8 mm",
    }
    train_pvs.write_json(out / "logs" / "training_history.json", [{}, {}])
    train_pvs.write_json(out / "logs" / "comprehensive_test_metrics.json", content)


def run_accuracy(folder, monkeypatch, *flags):
    """Run the benchmark with runs of no time; return its status, what was run, and the table."""
    done = []

    def run(row, seed, options):
        done.append((row, seed))
        write_run(accuracy.run_folder(row, seed, options), 0.5)

    monkeypatch.setattr(accuracy, "make_heads", lambda folder: None)
    monkeypatch.setattr(accuracy, "run", run)
    table = folder / "table.md"
    flags = ["--work", str(folder), "--output", str(table), "--minutes", "2", *flags]
    return accuracy.main(flags), done, table


def test_table_keeps_rows_that_were_not_asked_for_once_all_their_seeds_are_done(
    tmp_path, monkeypatch
):
    options = SimpleNamespace(work=tmp_path, minutes=2)
    for row, seeds in {"nnU-Net": (1, 2), "published": (1, 2), "plain, UNet++": (1,)}.items():
        for seed in seeds:
            write_run(accuracy.run_folder(row, seed, options), 0.25)
    flags = ("--rows", "native", "--seeds", "2")
    status, done, table = run_accuracy(tmp_path, monkeypatch, *flags)
    rows = re.findall(r"^\| \*\*(.*?)\*\*", table.read_text(), re.M)
    assert (status, done) == (0, [("native", 1), ("native", 2)])
    assert rows == ["published", "native", "nnU-Net"]  # as in ROWS; of UNet++ one seed is missing
    assert table.read_text().count("| -0.250 (-0.250 to -0.250) |") == 2
    _, done, _ = run_accuracy(tmp_path, monkeypatch, *flags)
    assert done == []


def test_run_without_scores_ends_the_benchmark_with_its_folder_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "make_heads", lambda folder: None)
    monkeypatch.setattr(accuracy, "run", lambda row, seed, options: None)
    output = tmp_path / "table.md"
    assert (
        accuracy.main(["--work", str(tmp_path), "--output", str(output), "--rows", "native"]) == 1
    )
    assert str(tmp_path / "native-1-4-minutes") in capsys.readouterr().err
    assert not output.exists()


def test_row_that_resumes_goes_on_from_a_copy_without_the_scores(tmp_path, monkeypatch):
    """With its scores an interrupted copy would pass for a run that is done."""
    trained, options = [], SimpleNamespace(work=tmp_path, minutes=2)

    def train(command, **_):
        out = Path(command[command.index("--output-dir") + 1])
        trained.append(out.name)
        if "--resume" in command:
            assert (out / "logs" / "training_history.json").exists()
            assert accuracy.read_run(out) is None
        write_run(out, 0.5)

    monkeypatch.setattr(accuracy.subprocess, "run", train)
    accuracy.run("plain, tuned", 1, options)
    accuracy.run("plain, mirrored", 1, options)
    names = [f"plain{row}-1-2-minutes" for row in ("", "-tuned", "-mirrored")]
    assert trained == names
    monkeypatch.setattr(accuracy.subprocess, "run", lambda command, **_: None)  # it fails
    accuracy.run("plain, tuned", 2, options)
    assert accuracy.read_run(tmp_path / "plain-tuned-2-2-minutes") is None


# ---------------------------------------------------------------------------------------- nnU-Net


@pytest.mark.parametrize(
    "command", [lambda: accuracy.main(["--rows", "native", "nnU-Net"]), lambda: nnunet.main([])]
)
def test_one_line_says_what_to_install_for_nnunet(command, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "has_nnunet", lambda: False)
    assert command() == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "pip install nnunetv2" in told.err
    assert told.out == ""


@pytest.mark.parametrize("installed", [True, False])
def test_nnunet_is_among_the_rows_where_it_is_installed(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "has_nnunet", lambda: installed)
    status, done, _ = run_accuracy(tmp_path, monkeypatch, "--seeds", "1")
    assert status == 0
    others = [row for row in accuracy.ROWS if not row.startswith("nnU-Net")]
    assert [row for row, _ in done] == (list(accuracy.ROWS) if installed else others)
    assert "nnU-Net" in accuracy.ROWS


def nnunet_plan(shape=(64, 160, 128)):
    """Return the part of a configuration of nnU-Net's plans that the cut may change."""
    sizes = {
        "n_stages": 6,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "strides": [[1, 1, 1]] + 4 * [[2, 2, 2]] + [[1, 2, 2]],
        "kernel_sizes": 6 * [[3, 3, 3]],
        "n_conv_per_stage": 6 * [2],
        "n_conv_per_stage_decoder": 5 * [2],
        "conv_bias": True,
    }
    network = {"network_class_name": "PlainConvUNet", "arch_kwargs": sizes}
    rest = {"median_image_size_in_voxels": list(shape), "spacing": [0.8, 0.8, 0.8]}
    plan = {"patch_size": [64, 160, 128], "batch_size": 2, "batch_dice": False}
    return plan | rest | {"architecture": network}


def test_plan_is_cut_to_the_first_stages_and_the_rest_stays():
    plan, strides, kernels = nnunet_plan(), [[1] * 3] + 3 * [[2] * 3], 4 * [[3] * 3]
    cut = nnunet.cut_plan(plan, strides, kernels)
    sizes = cut["architecture"]["arch_kwargs"]
    assert (cut["patch_size"], cut["batch_size"]) == ([48, 48, 48], 2)
    assert (sizes["n_stages"], sizes["strides"], sizes["kernel_sizes"]) == (4, strides, kernels)
    assert sizes["features_per_stage"] == [32, 64, 128, 256]
    assert (sizes["n_conv_per_stage"], sizes["n_conv_per_stage_decoder"]) == (4 * [2], 3 * [2])
    assert sizes["conv_bias"] is True
    assert cut["spacing"] == [0.8, 0.8, 0.8]
    assert cut["architecture"]["network_class_name"] == "PlainConvUNet"
    assert plan == nnunet_plan()  # is not changed itself
    narrow = nnunet.cut_plan(plan, strides, kernels, channels=16)
    assert nnunet.describe_plan(narrow)["features"] == [16, 32, 64, 128]


@pytest.mark.parametrize(("side", "whole_batch"), [(76, False), (77, True)])
def test_dice_is_of_the_whole_batch_where_a_patch_is_below_a_quarter_of_a_scan(side, whole_batch):
    # A quarter of 76^3 = 438976 is 109744, of 77^3 = 456533 it is 114133; a patch has 110592 voxels
    cut = nnunet.cut_plan(nnunet_plan((side, side, side)), [[1] * 3], [[3] * 3])
    assert cut["batch_dice"] == whole_batch


class Loader:
    """Batches that are their own loss: 3, 2, 1."""

    def __init__(self):
        self.seeds, self.finished, self.batches = [None], False, iter([3, 2, 1])

    def __next__(self):
        return next(self.batches)

    def _finish(self):
        self.finished = True


class Trainer:
    """The part of nnUNetTrainer that TimedTraining changes; a step takes 10 seconds."""

    initial_lr, ended = 0.01, False

    def __init__(self, clock):
        self.clock, self.rates = clock, []
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0}])
        self.network = torch.nn.Conv3d(1, 2, 1)  # 2 weights and 2 biases

    def on_train_start(self):
        self.dataloader_train, self.dataloader_val = Loader(), Loader()

    def on_train_end(self):
        self.ended = True

    def train_step(self, batch):
        self.clock[0] += 10
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return {"loss": np.float32(batch)}

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        self.inference_allowed_mirroring_axes = (0, 1, 2)
        return "rotation", False, [60, 60, 60], (0, 1, 2)


@pytest.fixture
def trainer(monkeypatch):
    """A trainer with 25 seconds."""
    clock = [1000]
    monkeypatch.setattr(nnunet.time, "monotonic", lambda: clock[0])
    trainer = type("Timed", (nnunet.TimedTraining, Trainer), {})(clock)
    trainer.seconds, trainer.seed, trainer.mirroring = 25, 4, False
    return trainer


def test_nnunet_trains_until_its_time_is_over_and_the_learning_rate_falls_with_it(trainer):
    trainer.run_training()
    rates = [0.01, 0.01 * 0.6**0.9, 0.01 * 0.2**0.9]  # 0, 10 and 20 of 25 s have gone
    assert trainer.rates == pytest.approx(rates)
    assert [(loss, seconds) for loss, _, seconds in trainer.steps] == [(3, 10), (2, 20), (1, 30)]
    assert trainer.dataloader_train.seeds == [4]
    assert trainer.dataloader_val.finished
    assert trainer.ended


@pytest.mark.parametrize(("mirroring", "axes"), [(False, None), (True, (0, 1, 2))])
def test_nnunet_mirrors_only_if_asked_to_in_training_and_tests(mirroring, axes, trainer):
    trainer.mirroring = mirroring
    settings = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert settings == ("rotation", False, [60, 60, 60], axes)
    assert trainer.inference_allowed_mirroring_axes == axes


def test_epochs_of_nnunet_share_the_steps(monkeypatch):
    monkeypatch.setattr(nnunet, "EPOCH", 2)
    rows = nnunet.list_epochs([(3, 0.3, 10), (2, 0.2, 20), (1, 0.1, 26)])
    first = {"epoch": 1, "steps": 2, "train_loss": 2.5, "lr": 0.3, "seconds": 20}
    assert rows == [first, {"epoch": 2, "steps": 1, "train_loss": 1, "lr": 0.1, "seconds": 6}]


def test_nnunet_learns_from_the_heads_that_are_not_for_the_test(tmp_path):
    cases = []
    for name in ("sub-a", "sub-b", "sub-c"):
        files = {key: tmp_path / f"{name}_{key}" for key in ("image", "label")}
        for key, path in files.items():
            path.write_text(f"{key} {name}")
        cases.append({"subject": name, "name": name} | files)
    split = {"train": ["sub-c"], "val": ["sub-a"], "test": ["sub-b"]}
    nnunet.lay_out(cases, split, tmp_path / "raw")
    files = {str(p.relative_to(tmp_path / "raw")): p.read_text() for p in tmp_path.rglob("raw/*/*")}
    assert files == {
        "imagesTr/sub-a_0000.nii.gz": "image sub-a",
        "imagesTr/sub-c_0000.nii.gz": "image sub-c",
        "labelsTr/sub-a.nii.gz": "label sub-a",
        "labelsTr/sub-c.nii.gz": "label sub-c",
    }
    splits = json.loads((tmp_path / "raw" / "splits_final.json").read_text())
    assert splits == [{"train": ["sub-c"], "val": ["sub-a"]}]
    assert json.loads((tmp_path / "raw" / "dataset.json").read_text())["numTraining"] == 2


def test_nnunet_is_scored_on_the_scans_grid_and_the_table_reads_it(trainer, tmp_path, monkeypatch):
    label = np.zeros((12, 14, 16), np.uint8)
    label[2:4, 3:9, 5:7] = 1
    affine = nib.affines.from_matvec(np.diag([-0.8, 0.8, 0.8]), [5, 6, 7])
    case = {"subject": "sub-1", "name": "sub-1"}
    for key in ("image", "label"):
        case[key] = str(tmp_path / f"{key}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), case[key])

    def read_images(paths):
        return nib.load(paths[0]).get_fdata().transpose(2, 1, 0)[None], {}

    reader = SimpleNamespace(read_images=read_images)
    manager = SimpleNamespace(image_reader_writer_class=lambda: reader)

    def predict(image, properties):  # finds the labelled layer 5 of z, and misses 6
        pred = image[0].copy()
        pred[6:] = 0
        return pred

    predictor = SimpleNamespace(plans_manager=manager, predict_single_npy_array=predict)
    row = nnunet.test_case(predictor, case, tmp_path)
    assert row["native_dice"] == pytest.approx(2 / 3)  # 12 voxels of 24, and no others
    assert (row["roundtrip_dice"], row["lesion_f1_any"]) == (1, 1)
    assert row["volume_ml_error_percent"] == pytest.approx(-50)
    mask = nib.load(tmp_path / "predictions" / "sub-1_label-PVS_desc-nnUNet_mask.nii.gz")
    assert np.array_equal(mask.affine, nib.load(case["image"]).affine)
    assert np.array_equal(mask.dataobj, label * (np.arange(16) < 6))

    trainer.run_training()
    monkeypatch.setattr(nnunet.importlib.metadata, "version", lambda name: "2.8.1")
    cut = nnunet.cut_plan(nnunet_plan(), [[1] * 3], [[3] * 3])
    nnunet.write_results(tmp_path, [row], trainer, cut, nnunet_plan())
    assert accuracy.read_run(tmp_path) == ([row], "grid of nnU-Net's plan, 0.8 x 0.8 x 0.8 mm", 1)
    plan = json.loads((tmp_path / "logs" / "comprehensive_test_metrics.json").read_text())["plan"]
    assert plan["planned"]["stages"] == 6
    assert {key: plan[key] for key in ("patch", "batch", "stages", "features", "parameters")} == {
        "patch": [48, 48, 48],
        "batch": 2,
        "stages": 1,
        "features": [32],
        "parameters": 4,
    }
    assert (plan["iterations"], plan["minutes"], plan["mirroring"]) == (3, 0.5, False)
    assert plan["nnunetv2"] == "2.8.1"
