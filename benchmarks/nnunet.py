"""Train nnU-Net v2 on the heads of accuracy.py, for as many minutes: the row nnU-Net of its tables.

    pip install nnunetv2==2.8.1                        into the environment of requirements.txt
    python benchmarks/accuracy.py --rows nnU-Net       3 seeds, 8 minutes each

nnU-Net (Isensee et al. 2021, 10.1038/s41592-020-01008-z) plans and preprocesses by itself
(3d_fullres), once; time for that does not count. Network, loss, deep supervision, optimizer,
sampling, augmentation, mirroring and sliding window are its own. What differs, for minutes on a
CPU:

- Patches are PATCH, BATCH a step. The planner's own rules give this patch its stages (the first
  ones of the plan, in its proportions, of CHANNELS) and the Dice loss over the whole batch.
- The learning rate falls over the minutes, as it otherwise does over 1000 epochs, and the clock
  ends the training. Data loading counts. There is no validation.
"""

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

PATCH, BATCH = (64, 64, 64), 2  # voxels; patches a step
CHANNELS = 16  # at full resolution, as accuracy.py gives the recipe native
EPOCH = 12  # steps that share a line and a row of the history, as heads in accuracy.py
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


def cut_plan(plan, strides, kernel_sizes):
    """Return a configuration of nnU-Net's plans for BATCH patches of PATCH, with these stages."""
    stages, network = len(strides), plan["architecture"]
    kept = {"features_per_stage": stages, "n_conv_per_stage": stages}
    kept["n_conv_per_stage_decoder"] = stages - 1
    sizes = {key: network["arch_kwargs"][key][:count] for key, count in kept.items()}
    sizes |= {"n_stages": stages, "strides": strides, "kernel_sizes": kernel_sizes}
    features = sizes["features_per_stage"]
    sizes["features_per_stage"] = [CHANNELS * count // features[0] for count in features]
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
    """What is put before nnUNetTrainer: training for `seconds`, seeded."""

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


def build_trainer(plans, data_set, seed, minutes):
    """Return nnU-Net's trainer, on the CPU, for so many minutes."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    timed = type("TimedTrainer", (TimedTraining, nnUNetTrainer), {})
    plans = plans | {"continue_training": False}
    trainer = timed(plans, CONFIGURATION, 0, data_set, torch.device("cpu"))
    trainer.seed, trainer.seconds = seed, 60 * minutes
    return trainer


# ------------------------------------------------------------------------------------- Testing


def build_predictor(trainer):
    """Return nnU-Net's predictor with the trained network; windows overlap by half."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    settings = {"tile_step_size": 0.5, "use_mirroring": True, "allow_tqdm": False}
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


def test_case(predictor, case):
    """Segment a scan; return its row of scores, and its Dice at accuracy.THRESHOLDS."""
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images([case.image])  # (1, Z, Y, X)
    probs = predictor.predict_single_npy_array(image, properties, None, None, True)[1]
    prob = probs[1].transpose(2, 1, 0)
    label = np.asarray(nib.load(case.label).dataobj) > 0
    affine = torch.from_numpy(nib.load(case.image).affine)
    entry = dict.fromkeys(("native_affine", "affine"), affine)
    entry |= dict.fromkeys(("label", "image"), torch.from_numpy(label)[None])  # one grid
    pred, case = prob > 0.5, dataclasses.replace(case, roundtrip_dice=1.0)  # not in the tables
    row = train_pvs.score_case(case, entry, pred, prob, pred, label)
    preds = (prob > threshold for threshold in accuracy.THRESHOLDS)
    return row, [train_pvs.calculate_metrics(pred, label)["dice"] for pred in preds]


def test_cases(predictor, folder, split):
    """Return what accuracy.py keeps of a test set."""
    rows, dices = [], []
    for case in train_pvs.find_cases(train_pvs.Config(DATA_DIR=str(folder))):
        if case.subject in split["test"]:
            row, at_thresholds = test_case(predictor, case)
            tell(f"{case.name}   native Dice {row['native_dice']:.4f}")
            rows.append(row)
            dices.append(at_thresholds)
    return {"subjects": rows} | accuracy.choose_threshold(dices)


def run(seed, options):
    """Train and test with a seed; the result and nnU-Net's own words go to the row's folder."""
    out = accuracy.run_folder(accuracy.NNUNET, seed, options)
    data, other, split = accuracy.prepare_data(options)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    log = out / "logs" / "nnunet.log"
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        raw, preprocessed = set_folders(options.work, out / "nnunet")
        cases = train_pvs.find_cases(train_pvs.Config(DATA_DIR=str(data)))
        tell(f"nnU-Net, seed {seed}: {out}")
        plans, data_set = prepare(cases, split, raw, preprocessed)
        planned = plans["configurations"][CONFIGURATION]
        plan = cut_plan(planned, *find_stages(planned))
        plans["configurations"][CONFIGURATION] = plan
        trainer = build_trainer(plans, data_set, seed, options.minutes)
        trainer.run_training()
        predictor, history = build_predictor(trainer), list_epochs(trainer.steps)
        accuracy.write_json(train_pvs.Run(out).history, history)
        result = {"epochs": len(history), "plan": describe_plan(plan)}
        result["planned"] = describe_plan(planned)
        for name, folder in {"same": data, "other": other}.items():
            result[name] = test_cases(predictor, folder, split)
        result["nnunetv2"] = importlib.metadata.version("nnunetv2")
        accuracy.write_json(out / "result.json", result)


def tell(words):
    """Show a line on the screen while nnU-Net's own words go to a file."""
    print(words, file=sys.__stdout__, flush=True)
