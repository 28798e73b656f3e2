"""Train nnU-Net v2 on the simulated heads of accuracy.py, for as many minutes: a row of its table.

    pip install nnunetv2                               into the environment of requirements.txt
    python benchmarks/nnunet.py                        3 seeds, 4 minutes each
    python benchmarks/accuracy.py --rows "nnU-Net, 16 channels"   the same, and writes the table

nnU-Net (Isensee et al. 2021, 10.1038/s41592-020-01008-z) plans and preprocesses by itself
(3d_fullres), once; time for that does not count. Network, loss, deep supervision, optimizer,
sampling, augmentation and sliding window are its own. What differs, for minutes on a CPU:

- Patches are PATCH, BATCH a step. The planner's own rules give this patch its stages (the first
  ones of the plan, as wide as planned) and the Dice loss over the whole batch.
- The learning rate falls over the minutes, as it otherwise does over 1000 epochs, and the clock
  ends the training. Data loading counts. There is no validation.
- No mirroring, in training and in tests: --mirroring changes that.
- --channels 16, the default, halves the network, as accuracy.py halves the recipe native.

What is done is kept in the folder --work and not done again.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import random
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import accuracy  # noqa: E402
import train_pvs  # noqa: E402

PATCH, BATCH = (48, 48, 48), 2  # voxels; patches a step
EPOCH = 5  # steps that share a line and a row of the history
DATA_SET, CONFIGURATION = "Dataset001_PVS", "3d_fullres"  # in nnU-Net's words


# -------------------------------------------------------------------------------- Data and plan


def set_folders(work, results):
    """Tell nnU-Net, before it is imported, its folders and that it has one worker to augment."""
    folders = {"raw": work / "nnunet" / "raw", "preprocessed": work / "nnunet" / "preprocessed"}
    for name, folder in {**folders, "results": results}.items():
        os.environ[f"nnUNet_{name}"] = str(folder.resolve())
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "false", "nnUNet_wandb_enabled": "0"}
    return folders["raw"] / DATA_SET, folders["preprocessed"] / DATA_SET


def lay_out(cases, split, raw):
    """Copy the heads that are not for the test to where nnU-Net expects them, with its split."""
    parts = {part: split[part] for part in ("train", "val")}
    known = [case for case in cases if case.subject in (*parts["train"], *parts["val"])]
    for case in known:
        copies = {"image": f"imagesTr/{case.name}_0000", "label": f"labelsTr/{case.name}"}
        for key, copy in copies.items():
            (raw / copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(getattr(case, key), raw / f"{copy}.nii.gz")
    accuracy.write_json(raw / "splits_final.json", [parts])
    content = {"channel_names": {"0": "T2w"}, "labels": {"background": 0, "PVS": 1}}
    content |= {"numTraining": len(known), "file_ending": ".nii.gz"}
    accuracy.write_json(raw / "dataset.json", content)


def prepare(cases, split, raw, preprocessed):
    """Let nnU-Net plan and preprocess, unless that is done; return its plans and data set."""
    kept = preprocessed / "done.json"  # written last
    if not kept.exists():
        from nnunetv2.experiment_planning import plan_and_preprocess_api as api

        tell("nnU-Net plans and preprocesses the heads that are not for the test")
        lay_out(cases, split, raw)
        quiet = {"show_progress_bar": False}
        api.extract_fingerprint_dataset(1, num_processes=1, verbose=False, **quiet)
        plans, name = api.plan_experiment_dataset(1)
        api.preprocess_dataset(1, name, (CONFIGURATION,), (1,), **quiet)
        accuracy.write_json(kept, plans)
    return json.loads(kept.read_text()), json.loads((raw / "dataset.json").read_text())


def find_stages(plan):
    """Return strides and kernel sizes of the stages that nnU-Net's planner gives to PATCH."""
    from nnunetv2.experiment_planning.experiment_planners import network_topology

    smallest, most = 4, 999999  # voxels of the last stage, halvings: the planner's own limits
    found = network_topology.get_pool_and_conv_props(plan["spacing"], PATCH, smallest, most)
    return found[1:3]


def cut_plan(plan, strides, kernel_sizes, channels=0):
    """Return a configuration of nnU-Net's plans for BATCH patches of PATCH, with these stages.

    `channels`: at full resolution, the other stages in proportion; 0: as planned.
    """
    stages, network = len(strides), plan["architecture"]
    kept = {"features_per_stage": stages, "n_conv_per_stage": stages}
    kept["n_conv_per_stage_decoder"] = stages - 1
    sizes = {key: network["arch_kwargs"][key][:count] for key, count in kept.items()}
    sizes |= {"n_stages": stages, "strides": strides, "kernel_sizes": kernel_sizes}
    if channels:
        features = sizes["features_per_stage"]
        sizes["features_per_stage"] = [channels * count // features[0] for count in features]
    # The planner's rule: the loss is of the whole batch where a patch is below a quarter of a scan.
    share = math.prod(PATCH) / math.prod(plan["median_image_size_in_voxels"])
    cut = {"patch_size": list(PATCH), "batch_size": BATCH, "batch_dice": share < 0.25}
    return plan | cut | {"architecture": network | {"arch_kwargs": network["arch_kwargs"] | sizes}}


def describe_plan(plan):
    """Return what tells one configuration from another."""
    sizes = plan["architecture"]["arch_kwargs"]
    return {
        "patch": plan["patch_size"],
        "batch": plan["batch_size"],
        "stages": sizes["n_stages"],
        "features": sizes["features_per_stage"],
        "batch_dice": plan["batch_dice"],
    }


# ------------------------------------------------------------------------------------- Training


class TimedTraining:
    """What is put before nnUNetTrainer: training for `seconds`, seeded, mirroring as asked for."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """Return nnU-Net's settings of the augmentation; with `mirroring` False, without it."""
        *settings, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if not self.mirroring:
            axes = self.inference_allowed_mirroring_axes = None
        return *settings, axes

    def on_train_start(self):
        """Start as nnU-Net does, then seed the augmentation, and end that of validation."""
        super().on_train_start()
        self.dataloader_val._finish()
        self.dataloader_train._finish()  # the next batch starts it anew
        self.dataloader_train.seeds = [self.seed]

    def run_training(self):
        """Train; keep a (loss, learning rate, seconds since the start) of each step in `steps`."""
        self.on_train_start()
        self.network.train()
        self.steps, begin, now = [], time.monotonic(), 0
        while now < self.seconds:
            rate = self.initial_lr * (1 - now / self.seconds) ** 0.9
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = float(self.train_step(next(self.dataloader_train))["loss"])
            now = time.monotonic() - begin
            self.steps.append((loss, rate, now))
            if len(self.steps) % EPOCH == 0:
                row = list_epochs(self.steps)[-1]
                told = f"epoch {row['epoch']:4}   loss {row['train_loss']:7.4f}   lr {rate:.5f}"
                tell(f"{told}   {now:.0f} of {self.seconds:.0f} s")
        self.on_train_end()


def list_epochs(steps):
    """Return the history, a row for every EPOCH steps (loss, learning rate, seconds)."""
    rows, before = [], 0
    for start in range(0, len(steps), EPOCH):
        losses, rates, times = zip(*steps[start : start + EPOCH], strict=True)
        row = {"epoch": len(rows) + 1, "steps": len(losses), "train_loss": float(np.mean(losses))}
        rows.append(row | {"lr": rates[0], "seconds": times[-1] - before})
        before = times[-1]
    return rows


def build_trainer(plans, data_set, seed, minutes, mirroring):
    """Return nnU-Net's trainer, on the CPU, for so many minutes."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    timed = type("TimedTrainer", (TimedTraining, nnUNetTrainer), {})
    plans = plans | {"continue_training": False}
    trainer = timed(plans, CONFIGURATION, 0, data_set, torch.device("cpu"))
    trainer.seed, trainer.seconds, trainer.mirroring = seed, 60 * minutes, mirroring
    return trainer


# ------------------------------------------------------------------------------------- Testing


def build_predictor(trainer):
    """Return nnU-Net's predictor with the trained network; windows overlap by half."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    settings = {"tile_step_size": 0.5, "use_mirroring": trainer.mirroring, "allow_tqdm": False}
    predictor = nnUNetPredictor(device=trainer.device, **settings)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    return predictor


def test_case(predictor, case, out):
    """Segment a scan, write its mask, return its row of scores."""
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images([case.image])  # (1, Z, Y, X)
    pred = predictor.predict_single_npy_array(image, properties).transpose(2, 1, 0) > 0
    label = np.asarray(nib.load(case.label).dataobj) > 0
    name = f"{case.name}_label-PVS_desc-nnUNet_mask.nii.gz"
    train_pvs.write_nifti(out / "predictions" / name, pred.astype(np.uint8), case.image)
    affine = torch.from_numpy(nib.load(case.image).affine)
    # All scans have the grid that nnU-Net plans for, so that a perfect mask loses nothing.
    entry = {"native_affine": affine, "label": torch.from_numpy(label)[None]}
    return train_pvs.score_case(
        dataclasses.replace(case, roundtrip_dice=1.0), entry, pred, pred, label
    )


def write_results(out, rows, trainer, plan, planned):
    """Write history and scores where accuracy.py reads them; the scores, last, mean: done."""
    told = describe_plan(plan) | {
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "iterations": len(trainer.steps),
        "minutes": trainer.steps[-1][-1] / 60,
        "mirroring": trainer.mirroring,
        "nnunetv2": importlib.metadata.version("nnunetv2"),
        "planned": describe_plan(planned),
    }
    grid = " x ".join(f"{mm:g}" for mm in plan["spacing"])
    content = {"grid": f"grid of nnU-Net's plan, {grid} mm", "plan": told, "subjects": rows}
    done = train_pvs.Run(out)
    accuracy.write_json(done.history, list_epochs(trainer.steps))
    accuracy.write_json(done.scores, content)


def run(out, seed, options, mirroring=False, channels=16):
    """Train and test with a seed; scores, masks and nnU-Net's own words go to the folder `out`."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    log = out / "logs" / "nnunet.log"
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        raw, preprocessed = set_folders(options.work, out / "nnunet")
        data = options.work / "data"
        cases = train_pvs.find_cases(train_pvs.Config(DATA_DIR=str(data)))
        split = json.loads((data / "split.json").read_text())
        tell(f"nnU-Net, seed {seed}: {out}")
        plans, data_set = prepare(cases, split, raw, preprocessed)
        planned = plans["configurations"][CONFIGURATION]
        plan = cut_plan(planned, *find_stages(planned), channels)
        plans["configurations"][CONFIGURATION] = plan
        trainer = build_trainer(plans, data_set, seed, options.minutes, mirroring)
        trainer.run_training()
        predictor, rows = build_predictor(trainer), []
        for case in cases:
            if case.subject in split["test"]:
                rows.append(test_case(predictor, case, out))
                tell(f"{case.name}   native Dice {rows[-1]['native_dice']:.4f}")
        write_results(out, rows, trainer, plan, planned)


def tell(words):
    """Show a line on the screen while nnU-Net's own words go to a file."""
    print(words, file=sys.__stdout__, flush=True)


def main(argv=None):
    """Make the data, train and test with each seed unless that is done; return the status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    told = "in training and tests, as nnU-Net does; such runs have no row in the table"
    parser.add_argument("--mirroring", action="store_true", help=told)
    told = "of the first stage, the others in proportion; 0: as planned, 32"
    parser.add_argument("--channels", type=int, default=16, help=told)
    options = accuracy.parse(parser, argv)
    if not accuracy.has_nnunet():
        print(accuracy.NO_NNUNET, file=sys.stderr)
        return 2
    accuracy.make_heads(options)
    row = "nnU-Net" + options.mirroring * ", mirroring"
    row += f", {options.channels} channels" if options.channels else ""
    for seed in range(1, 1 + options.seeds):
        out = accuracy.run_folder(row, seed, options)
        if not accuracy.read_run(row, seed, options):
            run(out, seed, options, options.mirroring, options.channels)
        dices = [subject["native_dice"] for subject in accuracy.read_run(row, seed, options)[0]]
        print(f"{row}, seed {seed}: mean native Dice {np.mean(dices):.4f}; {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
