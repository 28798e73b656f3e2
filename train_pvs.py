"""Train a 3D network that segments perivascular spaces (PVS) in T2-weighted brain MRI.

    python train_pvs.py --data-dir DIR   train, test and draw on a BIDS folder such as ds005595
    python train_pvs.py --check          look the data over, print what a run would use, stop
    python train_pvs.py --demo           the whole pipeline on simulated heads: CPU, minutes
    python train_pvs.py --resume         go on after an interruption
    python train_pvs.py --evaluate       test and draw again from the best weights
    python train_pvs.py --predict SCAN   segment new scans, files or folders
    torchrun --nproc_per_node=4 train_pvs.py   the same on several GPUs

The method: build_transforms (scan to network), build_train_transforms (patches), build_model,
loss_function, train_one_epoch, predict_logits (windows), decide (mask), score_case.
Two grids: a scan's own *native grid*, the network's *working grid* (RAS, `PIX_DIM`, head only).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, which take seconds

import argparse
import base64
import csv
import difflib
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import shlex
import shutil
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from string import Template

import numpy as np

VERSION = "2.0"
SCRIPT_HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # another if edited

# ------------------------------------------------------------------------------------------ Config
# Edit any value here, or give it as a flag: `BATCH_SIZE` is `--batch-size`. Comments are its help.
# A group says who may change its settings later; a setting of your own is one more line in one.


class Settings:
    """A group of settings, made a frozen dataclass; a list, which that refuses, becomes a tuple."""

    def __init_subclass__(cls):
        for name in filter(str.isupper, list(vars(cls))):
            cls.__annotations__.setdefault(name, object)  # one that was added without a type
            if isinstance(value := getattr(cls, name), list | set | dict | np.ndarray):
                setattr(cls, name, (value,) if isinstance(value, set | dict) else tuple(value))
        dataclass(frozen=True)(cls)


class Data(Settings):
    """Where the data are; they may be elsewhere when a run goes on or a network is used."""

    DATA_DIR: str = "/home/ubuntu/FMRI_Perivascular_Space_Dataset/ds005595-1.0.0"  # BIDS folder
    IMAGE_GLOB: str = "sub-*/**/anat/*_T2w.nii*"  # scans, names with sub-; ** finds ses-* too
    LABEL_GLOB: str = "derivatives/mask/sub-*/**/sub-*_desc-mask_PVS.nii*"  # masks, PVS where > 0


class Output(Settings):
    """Where files go; those of this command, or with --resume of the run."""

    OUTPUT_DIR: str = "outputs_3d"  # everything a run writes goes below it
    CACHE_DIR: str = ""  # prepared volumes; empty: OUTPUT_DIR/cache
    SAVE_PROBABILITIES: bool = False  # as float32 NIfTI files beside the predicted masks


class Split(Settings):
    """Which subjects train, validate and test."""

    TEST_FRACTION: float = 0.05  # of all subjects, rounded up
    VAL_FRACTION: float = 0.0526  # of the other subjects, rounded up
    SPLIT: str = ""  # JSON file with the subjects of train, val and test; empty: drawn with SEED
    FOLDS: int = 0  # of a cross-validation, in which each subject is tested once; 0: none
    FOLD: int = 0  # the one of FOLDS to test, from 1 on, in OUTPUT_DIR/fold-N; --fold all: each
    SEED: int = 123  # of split, first weights, crops, augmentation and demo data


class Grid(Settings):
    """What the network sees; checkpoints that are used together have it in common."""

    PIX_DIM: tuple = (1.5, 1.5, 1.5)  # spacing, mm; 0 0 0: the training scans' own, their median
    SPACING_TOLERANCE: float = 0.0  # fraction; spacings that differ less from PIX_DIM are kept
    HEAD_DEPTH: float = 0.0  # mm below the head's top, as its header has it, that are kept; 0: all
    INTENSITY_PERCENTILES: tuple = (0.5, 99.5)  # of the voxels in the head, taken to 0 and 1
    IMG_PATCH_SIZE: tuple = (96, 96, 96)  # voxels; multiples of 2**ENCODER_DEPTH, twice it at least
    SW_OVERLAP: float = 0.5  # of neighbouring windows, fraction of the patch


class Network(Settings):
    """The network; weights fit only into the same one."""

    ARCHITECTURE: str = "unetplusplus"  # unetplusplus or dynunet, which has no ENCODER_NAME
    ENCODER_NAME: str = "efficientnet-b7"  # efficientnet-b0 to efficientnet-b7
    ENCODER_DEPTH: int = 5  # halvings of the patch
    DECODER_WIDTH: int = 16  # channels at full resolution, doubled at halvings; dynunet: up to 320
    DEEP_SUPERVISION: bool = False  # dynunet: a loss at each level but the deepest, 1, 1/2, 1/4 ..


class Training(Settings):
    """What decides what the network becomes; only another training can change it."""

    ENCODER_WEIGHTS: str = "imagenet"  # imagenet, none, or a 2D EfficientNet's state dict file
    INIT_FROM: str = ""  # a checkpoint whose weights training starts from; empty: none
    HEAD_BIAS_LOG_ODDS: bool = False  # start at the training masks' log-odds of foreground
    BATCHNORM_MOMENTUM: float = 0.0  # of all BatchNorm layers; 0: the library's (encoder 0.01)
    CROPS_PER_VOLUME: int = 4  # patches from a volume each time it is drawn
    POS_NEG_RATIO: float = 2.0  # patches centred on a PVS voxel for each one centred elsewhere
    BATCH_SIZE: int = 2  # volumes a step, each giving CROPS_PER_VOLUME patches
    ACCUMULATE_STEPS: int = 1  # batches averaged into one optimizer step, for smaller GPUs
    AUGMENTATION: str = "published"  # published, or native: whole patches, with blur and bias
    FLIP_AXES: str = "none"  # mirrored at random: none, or of x (left-right), y, z: xyz is all
    LR: float = 1e-3  # the optimizer's learning rate
    LR_SCHEDULE: str = "plateau"  # plateau, or poly: 30 steps up, then to 0 over the Length
    WEIGHT_DECAY: float = 1e-5  # AdamW's
    GRAD_CLIP: float = 1.0  # largest norm of the gradient
    LR_FACTOR: float = 0.5  # plateau: ReduceLROnPlateau on the validation loss
    LR_PATIENCE: int = 5  # validations in a row without a lower loss that leave LR as it is
    LR_MIN: float = 1e-6  # plateau: LR is not reduced below it
    VAL_EVERY: int = 1  # epochs between validations; the first and last have one always
    VAL_OVERLAP: float = 0.5  # SW_OVERLAP in validations; less takes less time
    EARLY_STOPPING: int = 100  # validations without a better Dice, once above 0, that end it


class Length(Settings):
    """How long to train; --resume may raise it, under poly with --stretch."""

    EPOCHS: int = 1000  # at most
    MAX_MINUTES: float = 0.0  # validations count; the epoch that ends nearest is the last; 0: none


class Decision(Settings):
    """How a scan becomes a mask; as in the training, unless a flag says otherwise."""

    TTA_FLIPS: str = "none"  # views mirrored along FLIP_AXES: none, windows (every other), or full
    THRESHOLD: float = 0.5  # a probability above it is PVS
    SMALLEST_PVS: float = 0.0  # mm3; smaller components are left out
    AMP: bool = True  # bfloat16 or float16 autocast where the hardware gains from it


class Machine(Settings):
    """The computer at hand."""

    DEVICE: str = "auto"  # auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ...
    ENGINE: str = "torch"  # openvino (pip install openvino): a CPU predicts 1.5 times as fast
    NUM_WORKERS: int = 8  # processes that prepare volumes and cut patches
    SW_BATCH_SIZE: int = 4  # windows at once; on a CPU at most what 96 x 96 x 96 voxels hold


class Config(Machine, Decision, Length, Training, Network, Grid, Split, Output, Data, Settings):
    """All settings; the fields of the last base come first."""


# The published values, by which a run tells what was edited above. Leave them as they are.
PUBLISHED = {
    **{"DATA_DIR": "/home/ubuntu/FMRI_Perivascular_Space_Dataset/ds005595-1.0.0", "SPLIT": ""},
    **{"IMAGE_GLOB": "sub-*/**/anat/*_T2w.nii*", "OUTPUT_DIR": "outputs_3d", "CACHE_DIR": ""},
    **{"LABEL_GLOB": "derivatives/mask/sub-*/**/sub-*_desc-mask_PVS.nii*", "NUM_WORKERS": 8},
    **{"TEST_FRACTION": 0.05, "VAL_FRACTION": 0.0526, "FOLDS": 0, "FOLD": 0, "SEED": 123},
    **{"PIX_DIM": (1.5, 1.5, 1.5), "SPACING_TOLERANCE": 0.0, "IMG_PATCH_SIZE": (96, 96, 96)},
    **{"HEAD_DEPTH": 0.0, "INTENSITY_PERCENTILES": (0.5, 99.5), "SW_OVERLAP": 0.5},
    **{"ARCHITECTURE": "unetplusplus", "DECODER_WIDTH": 16, "DEEP_SUPERVISION": False},
    **{"ENCODER_NAME": "efficientnet-b7", "ENCODER_DEPTH": 5, "ENCODER_WEIGHTS": "imagenet"},
    **{"INIT_FROM": "", "HEAD_BIAS_LOG_ODDS": False, "BATCHNORM_MOMENTUM": 0.0, "BATCH_SIZE": 2},
    **{"CROPS_PER_VOLUME": 4, "POS_NEG_RATIO": 2.0, "ACCUMULATE_STEPS": 1, "GRAD_CLIP": 1.0},
    **{"LR": 1e-3, "WEIGHT_DECAY": 1e-5, "LR_FACTOR": 0.5, "LR_PATIENCE": 5, "LR_MIN": 1e-6},
    **{"VAL_EVERY": 1, "VAL_OVERLAP": 0.5, "EARLY_STOPPING": 100, "LR_SCHEDULE": "plateau"},
    **{"AUGMENTATION": "published", "FLIP_AXES": "none", "EPOCHS": 1000, "MAX_MINUTES": 0.0},
    **{"TTA_FLIPS": "none", "THRESHOLD": 0.5, "SMALLEST_PVS": 0.0, "SAVE_PROBABILITIES": False},
    **{"DEVICE": "auto", "ENGINE": "torch", "AMP": True, "SW_BATCH_SIZE": 4},
}

RECIPES = {  # named sets of flags, chosen with --recipe; yours may begin with the one it changes
    "published": "",
    # Thin PVS: the scans' own grid, and a network that sees it.
    "native": "--pix-dim 0 --spacing-tolerance 0.3 --head-depth 170 --architecture dynunet "
    "--encoder-depth 4 --decoder-width 32 --encoder-weights none --head-bias-log-odds "
    "--augmentation native --flip-axes x --tta-flips windows --lr 3e-3 --lr-schedule poly "
    "--val-every 5 --val-overlap 0.25 --deep-supervision",
    # Minutes on a laptop's CPU. With EfficientNet's BatchNorm momentum of 0.01 the statistics of so
    # short a run are those of its start; without the bias its Dice stays at 0 for long.
    "demo": "--test-fraction 0.25 --val-fraction 0.16 --pix-dim 1 --img-patch-size 32 --epochs 18 "
    "--encoder-name efficientnet-b0 --encoder-weights none --encoder-depth 3 --decoder-width 8 "
    "--batchnorm-momentum 0.1 --head-bias-log-odds --batch-size 1 --lr 5e-3 --lr-patience 0 "
    "--val-every 2 --sw-overlap 0.25 --val-overlap 0.25 --num-workers 0",
}
LIMITS = (  # smallest and largest value of settings
    (1, 10**6, "BATCH_SIZE ACCUMULATE_STEPS SW_BATCH_SIZE DECODER_WIDTH CROPS_PER_VOLUME"),
    (1, 10**6, "EPOCHS VAL_EVERY EARLY_STOPPING"),
    (0, 10**6, "NUM_WORKERS LR_PATIENCE LR_MIN WEIGHT_DECAY POS_NEG_RATIO SMALLEST_PVS HEAD_DEPTH"),
    (1e-12, 10**6, "LR GRAD_CLIP"),
    (1e-6, 0.999999, "TEST_FRACTION VAL_FRACTION LR_FACTOR THRESHOLD"),
    (0, 0.999999, "BATCHNORM_MOMENTUM"),
    (0, 0.9, "SW_OVERLAP VAL_OVERLAP"),
    (0, 0.5, "SPACING_TOLERANCE"),
    (0, 2**32 - 1, "SEED MAX_MINUTES"),
    (3, 5, "ENCODER_DEPTH"),
    (8, 1024, "IMG_PATCH_SIZE"),
)
NEVER_EMPTY = ("DATA_DIR", "IMAGE_GLOB", "LABEL_GLOB", "OUTPUT_DIR")
SMALLEST_SIDE, LARGEST_SIDE = 0.1, 20  # mm, of the working grid's voxels
# FLIP_AXES: axes of the working grid, (H, W, D) or right, anterior, superior.
FLIPS = {"none": (), "x": (0,), "y": (1,), "z": (2,)}
FLIPS |= {"xy": (0, 1), "xz": (0, 2), "yz": (1, 2), "xyz": (0, 1, 2)}

NETWORKS = {  # made by build_..: pattern of its outputs' biases, its name in BIDS' `desc`, in text
    "unetplusplus": (r"segmentation_head\.0\.bias", "unetpp", "UNet++"),
    "dynunet": (r"(output_block|deep_\w+_heads\.\d)\.conv\.conv\.bias", "dynunet", "DynUNet"),
}

HOW_TO_GET_DATA = """\
To get OpenNeuro ds005595 (200 subjects, 4 GB, CC0), one of:
  aws s3 sync --no-sign-request s3://openneuro.org/ds005595 ds005595-1.0.0
  openneuro-py download --dataset ds005595 --target-dir ds005595-1.0.0
  datalad install --get-data -s https://github.com/OpenNeuroDatasets/ds005595 ds005595-1.0.0
then: python train_pvs.py --data-dir ds005595-1.0.0; without any data: python train_pvs.py --demo"""


def names(*groups):
    """Return the names of the settings of some groups."""
    return {field.name for group in groups for field in fields(group)}


def words(value):
    """Return a setting as log, help and messages show it."""
    return " ".join(map(str, value if isinstance(value, tuple | list) else [value])) or "nothing"


def require(good, message, kind=ValueError):
    """Raise an error with the message unless all is good."""
    if not good:
        raise kind(message)


def raise_problems(problems, remedy="", title=""):
    """Raise one ValueError that lists all problems and ends with what to do; none, no error."""
    title = title or f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the data:"
    end = f"\n{remedy} Nothing was done." if remedy else ""
    require(not problems, "\n  ".join([title, *problems]) + end)


def build_parser():
    """Return the command line: a flag for each command, and one for each field of `Config`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)

    def fail(message):
        for wrong in re.findall(r"arguments: (--[\w-]+)", message):
            (near,) = difflib.get_close_matches(wrong, parser._option_string_actions, 1, 0)
            message += f" (did you mean {near}?)"
        raise ValueError(f"{message}; see --help")

    parser.error = fail
    told = f"train_pvs.py {VERSION}, SHA-256 {SCRIPT_HASH}"
    parser.add_argument("--version", action="version", version=told, help="print it and stop")
    command, recipe = (parser.add_mutually_exclusive_group() for _ in range(2))
    switch, files = {"action": "store_true"}, {"nargs": "+", "metavar": "FILE"}
    for group, flag, kind, text in (
        (command, "--check", switch, "look the data over, print what a run would use, stop"),
        (command, "--resume", switch, "go on after an interruption, as if there had been none"),
        (command, "--evaluate", switch, "test and draw again, or other scans with --data-dir"),
        (command, "--predict", files, "segment new scans, files or folders; goes on where it was"),
        (recipe, "--demo", switch, "recipe demo, on simulated heads that it makes itself"),
        (recipe, "--recipe", {"choices": RECIPES}, "set of settings, default: published"),
        (parser, "--checkpoint", files, "weights, not the run's best; of several the mean is used"),
        (parser, "--overwrite", switch, "replace the results in the output folder"),
        (parser, "--stretch", switch, "with --resume: under poly a new length, so another run"),
    ):
        group.add_argument(flag, help=text, **kind)
    comments = dict(re.findall(r"^    ([A-Z]\w+)\b.*?  # (.*)$", Path(__file__).read_text(), re.M))
    kinds = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"nargs": "+"}}
    for field in fields(Config):
        text = f"{comments.get(field.name, '')}; default: {words(field.default)}".replace("%", "%%")
        kind = kinds.get(type(PUBLISHED.get(field.name, field.default)), {})
        kind = kind | {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        parser.add_argument("--" + field.name.lower().replace("_", "-"), **kind)
    return parser


def convert(value, kind):
    """Return a value as text, True or False, whole or other number; an error if it is not one."""
    if kind not in (bool, int, float):
        return os.path.expanduser("" if value is None else value)
    number = kind(float(value))  # equal, but for NaN, or 2.5 as a whole number
    require(number == float(value) and (kind is bool) == isinstance(value, bool), "another kind")
    return number


def convert_all(settings, problems):
    """Return settings in their published types; `problems`, {field: sentence}, gets the others."""
    converted, told = {}, {bool: "True or False", int: "a whole number", float: "a number"}
    numbers = {f.name for f in fields(Config) if f.type is float}  # 3 is one, too
    for name in filter(str.isupper, settings):  # the others are commands
        model = PUBLISHED.get(name, getattr(Config, name, None))
        several = isinstance(model, tuple)
        models = model if several else (model,)
        kind = type(models[0]) if models else str
        kind = float if kind is int and name in numbers else kind
        values = np.array(settings[name], object)
        try:  # one number for a triple is meant for all three
            values = tuple(convert(value, kind) for value in np.broadcast_to(values, len(models)))
            converted[name] = values if several else values[0]
        except (TypeError, ValueError, OverflowError):
            expected = told.get(kind, "a text") + (f", {len(models)} times" if several else "")
            problems[name] = f"{name}: expected {expected}, got {words(settings[name])}"
    return converted


def choices(device):
    """Return {field: the words it may be} on this computer; `device`: the one asked for."""
    devices, openvino = ["auto", "cpu"], importlib.util.find_spec("openvino")
    if device not in devices:
        import torch

        numbers = range(torch.cuda.device_count())
        devices += ["cuda"] * bool(numbers) + [f"cuda:{i}" for i in numbers]
    found = {"ENCODER_NAME": [f"efficientnet-b{i}" for i in range(8)], "DEVICE": devices}
    found |= {"LR_SCHEDULE": ("plateau", "poly"), "AUGMENTATION": ("published", "native")}
    found |= {"TTA_FLIPS": ("none", "windows", "full"), "ARCHITECTURE": NETWORKS}
    return found | {"FLIP_AXES": FLIPS, "ENGINE": ["torch", "openvino"][: 2 if openvino else 1]}


def check_config(cfg, problems, starts=True):
    """Add a sentence to `problems`, {field: sentence}, for each wrong setting that has none yet."""
    divisor, known = 2 ** np.clip(cfg.ENCODER_DEPTH, 3, 5), choices(cfg.DEVICE)
    (dark, bright), plain = cfg.INTENSITY_PERCENTILES, cfg.ARCHITECTURE == "unetplusplus"
    patch = [side >= 2 * divisor and side % divisor == 0 for side in cfg.IMG_PATCH_SIZE]
    sides = tuple(np.clip(cfg.PIX_DIM, SMALLEST_SIDE, LARGEST_SIDE))
    output, data = map(os.path.realpath, (cfg.OUTPUT_DIR, cfg.DATA_DIR))
    fold = f"--fold 1 to {cfg.FOLDS} as well, or all" if cfg.FOLDS else "--folds as well, or 0"
    paths, mirrored = (cfg.SPLIT, cfg.INIT_FROM, cfg.ENCODER_WEIGHTS), cfg.TTA_FLIPS != "none"
    # Only a training that starts needs them.
    split, start, weights = (not starts or os.path.isfile(path) for path in paths)
    weights |= cfg.ENCODER_WEIGHTS in ("imagenet", "none")
    rules = [
        *((name, getattr(cfg, name).strip(), "a value") for name in NEVER_EMPTY),
        ("OUTPUT_DIR", output != data, "another folder than DATA_DIR"),
        ("CACHE_DIR", not os.path.isfile(cfg.CACHE_DIR), "a folder"),
        ("SPLIT", not (cfg.SPLIT and cfg.FOLDS), "none together with FOLDS"),
        ("SPLIT", split or not cfg.SPLIT, "a JSON file that exists"),
        ("INIT_FROM", start or not cfg.INIT_FROM, "a checkpoint that exists"),
        ("ENCODER_WEIGHTS", weights, "imagenet, none, or a file"),
        *((name, getattr(cfg, name) in c, " or ".join(c)) for name, c in known.items()),
        ("DEEP_SUPERVISION", not (plain and cfg.DEEP_SUPERVISION), "False with unetplusplus"),
        ("TTA_FLIPS", FLIPS.get(cfg.FLIP_AXES) or not mirrored, "none without FLIP_AXES"),
        ("FOLDS", cfg.FOLDS == 0 or 2 <= cfg.FOLDS <= 1000, "2 to 1000, or 0"),
        ("FOLD", min(cfg.FOLDS, 1) <= cfg.FOLD <= cfg.FOLDS, fold),
        ("PIX_DIM", not any(cfg.PIX_DIM) or sides == cfg.PIX_DIM, "0.1 to 20, or 0 0 0"),
        ("INTENSITY_PERCENTILES", 0 <= dark < bright <= 100, "two rising numbers to 100"),
        # At the deepest level a side of 1 is wrong in bfloat16 on CPUs with AMX (pytorch 169688).
        ("IMG_PATCH_SIZE", all(patch), f"multiples of {divisor} from {2 * divisor} on"),
    ]
    for low, high, limited in LIMITS:
        for name in limited.split():
            within = np.array_equal(np.clip(getattr(cfg, name), low, high), getattr(cfg, name))
            rules.append((name, within, f"a number from {low} to {high}"))
    for name, good, expected in rules:
        if not good:
            told = f"{name}: expected {expected}, got {words(getattr(cfg, name))}"
            problems.setdefault(name, told)


def process_number(name):
    """Return RANK, WORLD_SIZE or their LOCAL_ ones, as torchrun gives them; without it 0 and 1."""
    alone = 1 if name.endswith("WORLD_SIZE") else 0
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


def read_recipe(name, parser, changed=()):
    """Return the settings of a recipe and of the --recipe that it changes, if it names one."""
    try:
        own = vars(parser.parse_args(shlex.split(RECIPES[name])))
        base = own.pop("recipe")
        others = [flag for flag, value in own.items() if value and flag.islower()]
        others += [f"--recipe {name}"] * (name in changed)
        require(not others, f"expected settings, got {', '.join(others)}")
    except ValueError as error:
        raise ValueError(f"RECIPES: {name}: {error}") from None
    return (read_recipe(base, parser, (*changed, name)) if base else {}) | own


def resumes(output, options):
    """Return whether --resume counts: with --overwrite only where there is something to keep."""
    files = ("checkpoints/last.pth", "logs/comprehensive_test_metrics.json")
    begun = options.every_fold or any(Path(output, file).exists() for file in files)
    return options.resume and (begun or not options.overwrite)


def parse_command_line(argv):
    """Return (Config, options); a flag wins over the recipe, the recipe over Config in this file.

    options.given, .of_recipe, .edited: settings of each. A ValueError lists all that are wrong.
    """
    parser, problems = build_parser(), {}
    options = parser.parse_args(argv)
    options.recipe = "demo" if options.demo else options.recipe or "published"
    options.every_fold = vars(options).get("FOLD") == "all"
    if options.every_fold:
        options.FOLD = "1"
    sources = (vars(Config()), read_recipe(options.recipe, parser), vars(options))
    in_file, of_recipe, given = (convert_all(source, problems) for source in sources)
    edited = {name: value for name, value in in_file.items() if value != PUBLISHED.get(name, value)}
    options.given, options.of_recipe, options.edited = given, of_recipe, edited
    trained, alone = options.evaluate or options.predict, process_number("WORLD_SIZE") == 1
    require(trained or not options.checkpoint, "--checkpoint: expected --evaluate or --predict")
    require(alone or not options.predict, "--predict: works in one process, not with torchrun")
    if options.demo:
        if "DATA_DIR" in given:
            problems["demo"] = "DATA_DIR: --demo makes its data; for your own use --recipe demo"
        given.setdefault("OUTPUT_DIR", "outputs_3d_demo")
        given["DATA_DIR"] = str(Path(given["OUTPUT_DIR"], "data"))
    for source in (in_file, edited, of_recipe, given):
        for name in ("DATA_DIR", "CACHE_DIR"):
            if source.get(name, "").strip():  # the same from any folder
                source[name] = os.path.abspath(source[name])
    cfg = replace(Config(**PUBLISHED), **in_file | of_recipe | given)
    if options.every_fold and (trained or cfg.FOLDS < 2):
        problems["FOLD"] = "--fold all: expected --folds as well, and a training"
    fold, output = Path(cfg.OUTPUT_DIR, f"fold-{cfg.FOLD}"), cfg.OUTPUT_DIR
    there = not trained or (not options.checkpoint and (fold / "checkpoints").is_dir())
    if cfg.FOLD and there and Path(output).name != fold.name:
        output = str(fold)
    options.resume = resumes(output, options)
    if not (options.resume or trained):  # else the checkpoint's settings are checked
        check_config(cfg, problems)
    raise_problems(problems.values(), title="wrong settings:")
    return replace(cfg, OUTPUT_DIR=output), options


def require_data_folder(cfg, options):
    """Raise an error where DATA_DIR is missing, unless a checkpoint says another or it is made."""
    elsewhere = options.demo or options.resume or options.evaluate or options.predict
    there = elsewhere or os.path.isdir(cfg.DATA_DIR)
    require(there, f"{cfg.DATA_DIR}: no such folder (DATA_DIR)\n{HOW_TO_GET_DATA}")


if __name__ == "__main__" and process_number("WORLD_SIZE") == 1:
    try:  # --help and what is wrong are told before the imports, which take seconds
        require_data_folder(*parse_command_line(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)

with warnings.catch_warnings():  # timm 0.9.7 imports what is deprecated
    warnings.simplefilter("ignore")
    import matplotlib.style
    import nibabel as nib
    import segmentation_models_pytorch_3d as smp
    import torch
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from monai import transforms as mt
    from monai.data import MetaTensor
    from monai.inferers import sliding_window_inference
    from monai.losses import DiceCELoss
    from monai.losses.cldice import soft_skel
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
    from monai.networks.nets import DynUNet
    from PIL import Image
    from scipy import ndimage, stats
    from scipy.spatial.transform import Rotation
    from sklearn.metrics import cohen_kappa_score
    from sklearn.model_selection import KFold, train_test_split
    from torch import distributed as dist
    from torch import nn
    from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
    from tqdm import tqdm

nib.imageglobals.logger.setLevel(logging.CRITICAL)  # its remarks name no file
# Letters that the font lacks; headers, which are checked here; MONAI's own call; one copy.
told = "Glyph .* missing|Extension size|.*always_return_as_numpy|Grad strides do not match"
warnings.filterwarnings("ignore", told)
log = logging.getLogger("train_pvs")

# --------------------------------------------------------------------------------------- Processes


def first_process():
    """Return whether this is process 0, which writes the run's files and shows progress."""
    return process_number("RANK") == 0


@contextmanager
def joined_processes(cfg):
    """Let the processes that torchrun has started work together, each on a GPU of its own."""
    if process_number("WORLD_SIZE") == 1:
        yield
        return
    on_gpus, count = choose_device(cfg).type == "cuda", torch.cuda.device_count()
    if on_gpus:
        good = process_number("LOCAL_WORLD_SIZE") <= count and cfg.DEVICE in ("auto", "cuda")
        told = f"DEVICE: expected auto or cuda, and at most {count} processes, one a GPU"
        require(good, f"{told}, with torchrun")
        torch.cuda.set_device(process_number("LOCAL_RANK"))
    # Long, since a process may prepare its scans for hours; one that ends is noticed at once.
    backends = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(hours=12)))
    # torchrun's store keeps the addresses of a former fold's processes.
    how = {"store": dist.PrefixStore(cfg.OUTPUT_DIR, store), "timeout": timedelta(hours=12)}
    dist.init_process_group(backends, rank=rank, world_size=count, **how)
    yield
    dist.destroy_process_group()  # not after an error: other processes may hang


def share(items):
    """Return the part of a list that this process works on: every n-th item."""
    return items[process_number("RANK") :: process_number("WORLD_SIZE")]


def gather(part):
    """Return the whole list, in its order, of which every process has its `share`."""
    parts = [part] * process_number("WORLD_SIZE")
    if len(parts) > 1:
        dist.all_gather_object(parts, part)
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def wait_for_all():
    """Return when all processes have come here."""
    if process_number("WORLD_SIZE") > 1:
        dist.barrier()


@contextmanager
def first_process_first():
    """Let the first process do a block before the others."""
    if not first_process():
        wait_for_all()
    yield
    if first_process():
        wait_for_all()


def choose_device(cfg):
    """Return the torch device of this process."""
    if cfg.DEVICE in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", process_number("LOCAL_RANK"))
    return torch.device("cpu" if cfg.DEVICE == "auto" else cfg.DEVICE)


def workers(cfg):
    """Return a loader's settings: NUM_WORKERS, but at most the processors of each process."""
    processors = len(os.sched_getaffinity(0)) // process_number("LOCAL_WORLD_SIZE")
    count = min(cfg.NUM_WORKERS, processors or 1)
    return {"num_workers": count, "worker_init_fn": leave_signals_to_the_run}


def has_level_of_side_2(cfg):
    """Return whether a dense 3 x 3 x 3 convolution of the network meets a first side of 2."""
    # torch 2.14.1 then gives noise as bfloat16 weight gradients on CPUs with AVX512_BF16.
    deepest = cfg.IMG_PATCH_SIZE[0] // 2**cfg.ENCODER_DEPTH
    return deepest == 2 and cfg.ARCHITECTURE != "unetplusplus"  # whose deepest is depthwise


def autocast_dtype(device, cfg):
    """Return the number format of the network's arithmetic; float32 means no autocast."""
    if device.type == "cuda" and cfg.AMP:
        native = torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if native else torch.float16
    # A CPU without such instructions emulates bfloat16, over ten times slower than float32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    trusted = cfg.AMP and native and device.type == "cpu" and not has_level_of_side_2(cfg)
    return torch.bfloat16 if trusted else torch.float32


stop_signals = []  # that were received; the loops of `Progress` look here


@contextmanager
def stopping_on_signals():
    """Let SIGINT and SIGTERM raise KeyboardInterrupt, a second one end the process at once."""

    def stop(number, _, run=os.getpid()):  # noqa: B008
        if stop_signals or os.getpid() != run:  # or a worker that has just begun
            os._exit(128 + number)
        stop_signals.append(number)
        # The workers may get it, too, and torch would raise an error of its own about their end.
        torchs = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        former.callback(signal.signal, signal.SIGCHLD, torchs)
        sys.unraisablehook = lambda _: None  # of destructors that meet half of what they expect
        raise KeyboardInterrupt

    stop_signals.clear()
    with ExitStack() as former:
        former.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        with suppress(ValueError):  # in a thread, where signals are the caller's
            for number in (signal.SIGINT, signal.SIGTERM):
                former.callback(signal.signal, number, signal.signal(number, stop))
        yield


@contextmanager
def naming(path):
    """Let an unexpected error in a worker process become one line that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError | OSError) or not get_worker_info():
            raise
        while error.__cause__:  # MONAI's own says only in which transform
            error = error.__cause__
        told = f"{path}: {type(error).__name__}: {explain(error)}"
        raise RuntimeError(f"{told} (--num-workers 0 tells where)") from None


def leave_signals_to_the_run(_):
    """Let a worker pass over Ctrl-C, which all processes get; it ends with the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which Python ends it after an error
    sys.excepthook = lambda *_: None  # of the thread whose batch a run that ends leaves there


SHARED_MEMORY = "shared memory ran out: give /dev/shm more (docker run --shm-size 8g, or "
SHARED_MEMORY += "--ipc=host), or use --num-workers 0"
OUT_OF_MEMORY = "To need less: --sw-batch-size 1; a training begun anew also --batch-size 1 "
OUT_OF_MEMORY += "--accumulate-steps 2, or smaller --crops-per-volume or --img-patch-size."


def lacks_memory(error):
    """Return whether an error is that memory ran out, of the device or of this computer."""
    told = "out of memory|not enough memory|allocate memory|MemoryError|"  # in RuntimeErrors
    told += "ALLOC_FAILED|unable to find an engine|Seems to be OOM"  # cuDNN's words, and MONAI's
    return isinstance(error, MemoryError) or bool(re.search(told, str(error)))


# ----------------------------------------------------------------------------------- Files and log


def write_file(path, data):
    """Write bytes or text so that the whole file appears or the former stays, as at a power cut."""
    path = Path(path)
    data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else memoryview(data)
    # In containers other runs may have this process number.
    temporary = path.with_name(f".writing-{os.getpid()}-{os.urandom(4).hex()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        sizes = f"it takes {len(data) / 1e6:.1f} MB, {free_disk(path) / 1e6:.1f} MB are free"
        raise OSError(f"{path}: cannot be written ({error.strerror}); {sizes}") from None
    finally:
        with suppress(OSError):  # it is there only after a failure
            temporary.unlink()


def free_disk(path):
    """Return the bytes that are free where `path` lies or will lie."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def write_json(path, content):
    """Write a JSON file; a NaN, for which JSON has no word, is an error here."""
    write_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path):
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def write_csv(path, rows):
    """Write dicts of the same keys as a table; fractions of 6 digits, an empty cell for None."""
    buffer = io.StringIO(newline="")
    table = ([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in rows)
    csv.writer(buffer).writerows([rows[0], *table])
    write_file(path, buffer.getvalue())


def write_tsv(path, columns, rows):
    """Write a table as BIDS wants it: tabs, n/a for None."""
    lines = [["n/a" if row[name] is None else str(row[name]) for name in columns] for row in rows]
    write_file(path, "".join("\t".join(line) + "\n" for line in [columns, *lines]))


def read_participants(folder):
    """Return {(subject, session or ""): row} of a participants.tsv; of several rows of one none."""
    known, how = {}, {"newline": "", "encoding": "utf-8-sig", "errors": "replace"}
    path = Path(folder) / "participants.tsv"
    with suppress(OSError, csv.Error), open(path, **how) as file:  # it stops no run
        lines = (line.replace('"', "") for line in file)  # which R writes
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            ids = (row.get(name) or "" for name in ("participant_id", "session_id"))
            key = tuple(re.sub("^sub-|^ses-|^n/a$|[^a-zA-Z0-9]", "", t.strip()) for t in ids)
            known[key] = {} if key in known else row
    return known


def join_participants(rows, folders):
    """Return rows with what the participants.tsv of their data set tells of their subjects."""
    known = {folder: read_participants(folder) for folder in dict.fromkeys(folders)}
    names = dict.fromkeys(n for table in known.values() for own in table.values() for n in own)
    joined = []
    for folder, row in zip(folders, rows, strict=True):
        subject = row["participant_id"].removeprefix("sub-")
        session = bids_entities(row["name"]).get("ses", "")
        own = known[folder].get((subject, session)) or known[folder].get((subject, "")) or {}
        new = {n: f"participants_{n}" if n in {*row, "grade"} else n for n in names if n}
        joined.append(row | {new[n]: own.get(n) for n in new if n != "participant_id"})
    return joined


def write_torch(path, content):
    """Write tensors and plain values so that `torch.load(path, weights_only=True)` reads them."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


FILES = {  # of a run, in the order in which --overwrite gives them up
    **{"last": "checkpoints/last.pth", "best": "checkpoints/best_model.pth"},
    **{"history": "logs/training_history.json", "split": "logs/split.json"},
    **{"scores": "logs/comprehensive_test_metrics.json", "table": "logs/test_metrics.csv"},
    **{"burden": "logs/participants_pvs.csv", "curves": "training_curves.jpg"},
    **{"overview": "test_set_visualization_grid_300dpi.jpg", "agreement": "agreement.jpg"},
    "report": "report.html",
}


class Run:
    """The output folder of a run: where its files lie, its lock and its log."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.logs, self.predictions = self.folder / "logs", self.folder / "predictions"
        self.log, self.former = None, 0  # the log, and the bytes in it of a run to be replaced
        self.board = self.logs / "tensorboard"
        self.stale = self.logs / ".stale"  # of a fold: all have been begun anew since
        self.description = self.predictions / "dataset_description.json"
        for name, path in FILES.items():
            setattr(self, name, self.folder / path)

    def results(self):
        """Return the files of a former run that are there."""
        masks = ("label-PVS_desc-*.nii.gz", "seg-PVS_desc-*.nii.gz", "seg-PVS_desc-*.tsv")
        patterns = ["multi_plane/sub-*.png", "logs/tensorboard/events.*"]
        patterns += [f"predictions/sub-*/**/*_{kind}" for kind in masks]
        return [f for p in (*FILES.values(), *patterns) for f in self.folder.glob(p)]

    def figure(self, case):
        """Return where the figure of a case lies."""
        return self.folder / "multi_plane" / f"{case.name}.png"

    def open(self, name, replaceable, anew=False):
        """Lock the folder, keep messages in logs/NAME.log; `anew`: `clear` drops former ones."""
        text = {"encoding": "utf-8", "errors": "replace"}
        if not first_process():  # its errors alone, see `logging_to_screen`
            log.addHandler(logging.FileHandler(self.logs / f"{name}.log", "a", delay=True, **text))
            return
        told = f"{self.folder}: there are results in the output folder already.\nTake another with "
        told += "--output-dir, " + "with --checkpoint, " * (name in ("evaluate", "predict"))
        told += "or replace them all with --overwrite"
        told += "; a training goes on with --resume." if self.last.exists() else "."
        require(replaceable or not self.results(), told)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.logs / ".lock", "a")  # noqa: SIM115, held as long as the run
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                log.warning("Warning: %s cannot be locked; start no second run", self.lock.name)
            self.log = self.logs / f"{name}.log"
            self.former = self.log.stat().st_size if anew and self.log.exists() else 0
            log.addHandler(logging.FileHandler(self.log, "a", **text))
        except BlockingIOError:
            raise ValueError(f"{self.folder}: another run is using this folder; wait") from None
        except OSError as error:
            raise ValueError(f"OUTPUT_DIR: expected a folder to write to ({error})") from None
        for left in self.folder.rglob(".writing-*"):  # by killed runs
            number = left.name.split("-")[1]  # of the process; in containers often this one's
            ended = number == str(os.getpid()) or not Path("/proc", number).exists()
            top, *below = left.relative_to(self.folder).parts
            # Elsewhere another run may be writing, of another computer, whose processes we miss.
            own = not below or top in ("checkpoints", "logs", "multi_plane", "predictions")
            with suppress(FileNotFoundError):
                if ended and (own or left.stat().st_mtime < time.time() - 3600):
                    left.unlink()

    def clear(self):
        """Remove the results, last weights first, the folders that this empties, the old log."""
        if self.former:
            self.log.write_bytes(self.log.read_bytes()[self.former :])
        for path in [*self.results(), self.stale] if first_process() else []:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                os.removedirs(path.parent)


class Screen(logging.Handler):
    """Show messages on stdout, errors on stderr, above a progress bar where there is one."""

    def emit(self, record):
        """Print a message; a screen that is gone ends no run."""
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        with suppress(OSError, ValueError):
            clear = "\r\x1b[K" * stream.isatty()  # what a signal has left of a bar
            told = clear + self.format(record)
            (tqdm.write if sys.stderr.isatty() else print)(told, file=stream)
            stream.flush()


@contextmanager
def logging_to_screen():
    """Show messages of the first process, and all errors; `Run.open` adds a file."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # of a notebook, which prints all letters
            stream.reconfigure(errors="backslashreplace")  # of letters that it lacks
    log.setLevel(logging.INFO if first_process() else logging.ERROR)
    log.propagate = logging.raiseExceptions = False  # of a full disk the next file tells
    log.addHandler(Screen())
    try:
        yield
    finally:
        while log.handlers:
            log.handlers.pop().close()


class Progress(tqdm):
    """A progress bar with the time left; where stderr is no terminal, a plain line now and then."""

    def __init__(self, items, title):
        every = 0.1 if sys.stderr.isatty() else 30  # seconds
        bar = {"leave": False, "disable": not first_process(), "dynamic_ncols": True}
        super().__init__(items, title, mininterval=every, maxinterval=every, **bar)

    def display(self, msg=None, pos=None):
        """Show the bar, or write it as a line while the work is under way."""
        if self.fp.isatty():
            return super().display(msg, pos)  # by which `close` knows that the line is to be left
        if 0 < self.n < self.total:
            self.fp.write(f"{self}\n")
        return False

    def __iter__(self):
        """Yield the items; end the run where Python lost a signal's exception in a destructor."""
        for item in super().__iter__():
            yield item
            if stop_signals:
                raise KeyboardInterrupt


# -------------------------------------------------------------------------------------------- Data

BOTH = ("image", "label")  # the volumes of a case
NIFTI = (".nii", ".nii.gz")
RENAME = "Remove or rename files, or narrow IMAGE_GLOB and LABEL_GLOB. Between - and _ a name "
RENAME += "has letters and digits only."
READ_ERRORS = (  # of nibabel, gzip and torch.load on damaged files
    *(OSError, EOFError, ValueError, TypeError, OverflowError, LookupError, AttributeError),
    *(RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, nib.wrapstruct.WrapStructError),
    *(nib.spatialimages.HeaderDataError, nib.filebasedimages.ImageFileError, zlib.error),
)
# Some programs round a qform's quaternion to 6 digits. ITK takes it, nibabel by itself does not.
nib.Nifti1Header.quaternion_threshold = nib.Nifti2Header.quaternion_threshold = -1e-5


@dataclass
class Case:
    """A scan with its mask; `prepare` adds what is below `label`."""

    subject: str  # sub-001
    name: str  # sub-001_ses-1: all entities but desc and label
    image: str  # path of the scan
    label: str = ""  # path of the mask
    cache: str = ""  # path of the prepared volume, see `fill_cache`
    sha256: str = ""  # of the scan's voxels, by which it is known again
    label_sha256: str = ""
    native_voxels: int = 0  # labelled, on the native grid
    working_voxels: int = 0  # labelled, on the working grid
    native_spacing: tuple = ()  # mm, of the axes next to right, front and top
    stripped: bool = False  # of the skull
    roundtrip_dice: float | None = None  # native, of the mask taken to the working grid and back
    warnings: tuple = ()


def find_files(folder, pattern):
    """Return the paths of the NIfTI files below `folder` that fit the glob, sorted."""
    # It follows links to folders, and passes over hidden files, such as macOS' own notes ._sub-001.
    found = {Path(folder, path) for path in glob.glob(pattern, root_dir=folder, recursive=True)}
    return [str(path) for path in sorted(found) if path.name.endswith(NIFTI)]


def bids_entities(path):
    """Return a name's entities but what a mask is of: sub-01_ses-2_T2w gives sub: 01, ses: 2."""
    parts = Path(path).name.split(".nii")[0].split("_")
    of_masks = r"(?!desc-|label-|seg-)\w+-"
    return dict(part.split("-", 1) for part in parts if re.match(of_masks, part))


def make_cases(pairs, problems, remedy):
    """Return the Cases of (scan, mask or "") pairs; raise the problems and those of their names."""
    cases = {}
    for image, label in pairs:
        found, stem = {"sub": "", "ses": ""} | bids_entities(image), Path(image).name  # these first
        # T1 may be a visit.
        stem = re.sub(r"(?i)[_-](T2|T[12]-?(w|wi|tse)|PD|FLAIR)$", "", stem.split(".nii")[0])
        found = found if found["sub"] else {"sub": stem}
        texts = {key: re.sub("[^0-9A-Za-z]", "", text) for key, text in found.items()}
        name = "_".join(f"{key}-{text}" for key, text in texts.items() if text)
        other = cases.setdefault(name, case := Case(f"sub-{texts['sub']}", name, image, label))
        if not texts["sub"]:
            problems.append(f"{image}: expected letters or digits in the name")
        elif other is not case:
            told = f"{image}: expected names that differ, both would give {name}"
            problems.append(f"{other.image} and {told}")
    raise_problems(problems, remedy)
    return [*cases.values()]


def find_cases(cfg):
    """Pair scans and masks, or list all names that do not pair; leave out scans without a mask."""
    told = f"{cfg.DATA_DIR}: no such folder, or it cannot be read (DATA_DIR)"
    require(os.access(cfg.DATA_DIR, os.R_OK | os.X_OK), told, FileNotFoundError)
    scans, masks = (find_files(cfg.DATA_DIR, p) for p in (cfg.IMAGE_GLOB, cfg.LABEL_GLOB))
    both = {*scans} & {*masks}  # found by a wide IMAGE_GLOB
    told = f"{cfg.DATA_DIR}: LABEL_GLOB finds every scan, too; narrow it: {cfg.LABEL_GLOB}"
    require(not both or {*scans} - both, told)
    scans = [path for path in scans if path not in both]
    found = f"{len(scans)} scans {cfg.IMAGE_GLOB}, {len(masks)} masks {cfg.LABEL_GLOB}"
    told = f"{cfg.DATA_DIR}: expected scans and masks, found {found}; other names: --image-glob, "
    require(scans and masks, f"{told}--label-glob\n{HOW_TO_GET_DATA}", FileNotFoundError)
    entities = {path: bids_entities(path).items() for path in scans + masks}
    bare = [path for path, found in entities.items() if "sub" not in dict(found)]
    raise_problems([f"{path}: expected a name with sub-" for path in bare], RENAME)
    for mask in masks:  # without them where none fits; that it is on the scan's grid is looked at
        if not any(entities[mask] <= entities[scan] for scan in scans):
            entities[mask] = {pair for pair in entities[mask] if pair[0] not in ("space", "res")}
    # A mask fits the scan of the same entities, else one whose name holds all of the mask's.
    pairs = [(s, m) for s in scans for m in masks if entities[m] <= entities[s]]
    exact = {m for s, m in pairs if entities[m] == entities[s]}
    pairs = [(s, m) for s, m in pairs if m not in exact or entities[m] == entities[s]]
    groups = [("scan for this mask", m, [s for s, mask in pairs if mask == m]) for m in masks]
    groups += [("mask for this scan", s, [m for scan, m in pairs if scan == s]) for s in scans]
    paired, problems = {scan for scan, _ in pairs}, []
    by_name = {Path(scan).name: scan for scan in scans if scan not in paired or paired == {*scans}}
    for wanted, path, found in groups:
        if len(found) > 1:
            problems.append(f"{path}: expected one {wanted}, found {' and '.join(found)}")
        elif not found and path in masks:
            near = by_name[difflib.get_close_matches(Path(path).name, by_name, 1, 0)[0]]
            own = "_".join(map("-".join, entities[path] - entities[near]))
            told = f"none; the nearest is {near}" + f", which has no {own}" * bool(own)
            problems.append(f"{path}: expected one {wanted}, found {told}")
        elif not found and not problems:
            log.warning("Warning: left out, no mask: %s", path)
    return make_cases([] if problems else pairs, problems, RENAME)


def find_scans(places, cfg):
    """Return the cases, without a label, of the files and folders to be segmented."""
    pairs, problems = [], []
    for place in map(os.path.abspath, places):
        is_scan = place.endswith(NIFTI) and os.path.isfile(place)
        found = [place] if is_scan else find_files(place, cfg.IMAGE_GLOB)
        folder, name = Path(cfg.IMAGE_GLOB).parent.name, Path(cfg.IMAGE_GLOB).name
        anat = [name] * (os.path.basename(place) == folder)
        # A folder anat, one without an order, that of a subject or session.
        for pattern in (*anat, "*", os.path.join("**", folder, name), f"**/{name}"):
            found = found or find_files(place, pattern)
        told = f"a NIfTI file, a folder of them, or one with scans {cfg.IMAGE_GLOB} (--image-glob)"
        for path in [] if is_scan else found[:]:
            if re.search(r"_(T1w|FLAIR|PDw)\.nii", path) and not Path(path).match(name):
                log.warning("Warning: left out, another contrast by its name: %s", path)
                found.remove(path)
        if os.path.realpath(place) == os.path.realpath(cfg.OUTPUT_DIR):
            found, told = [], "another folder than OUTPUT_DIR"
        if not os.path.exists(place):
            problems.append(f"{place}: no such file or folder (with DataLad: datalad get)")
        elif not found:
            problems.append(f"{place}: expected {told}")
        pairs += [(path, "") for path in found]
    remedy = "Give NIfTI files or folders; scans that would bear one name in separate runs, each "
    remedy += "with its own --output-dir."
    return make_cases([*dict.fromkeys(pairs)], problems, remedy)


def explain(error):
    """Return why a file cannot be read, in a line."""
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    lost = isinstance(error, FileNotFoundError) and ".nii" in str(error)
    way = " (a link to a missing one?); with DataLad: datalad get" if lost else ""
    return " ".join(told.split())[:200] + way


def look_inside(path):
    """Return what a file that is no NIfTI file holds instead, where its first bytes tell."""
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        return ""
    with open(path, "rb") as file:
        start, zipped = file.read(400), str(path).endswith(".gz")
    cases = (
        (b"annex/objects" in start, "git-annex has not fetched it: datalad get"),
        (b"git-lfs" in start, "git has not fetched it: git lfs pull"),
        (zipped and re.search(rb"n\+[12]\0", start), "it is not gzipped: name it .nii"),
        (not zipped and start[:2] == b"\x1f\x8b", "it is gzipped: name it .nii.gz"),
    )
    return next((told for found, told in cases if found), "")


@np.errstate(all="ignore")  # of an affine with inf or NaN
def read_header(path):
    """Return (nibabel's image of a NIfTI file, not yet read, its 3D shape); or a ValueError."""
    try:
        volume = nib.load(path)
        kind, affine = volume.get_data_dtype(), volume.affine
        sides = nib.affines.voxel_sizes(affine)
        upright = abs(np.linalg.det(affine[:3, :3] / np.maximum(sides, 1e-9)))  # 1: right angles
    except READ_ERRORS as error:
        told = f"{path}: expected a NIfTI file, cannot be read"
        raise ValueError(f"{told} ({look_inside(path) or explain(error)})") from None
    shape = volume.shape[:3] + tuple(n for n in volume.shape[3:] if n > 1)
    near = min(sides) >= 0.05 and max(sides) <= 20 and abs(affine[:3, 3]).max() <= 10_000
    limits = "voxel sides of 0.05 to 20 mm, within 10 m of the origin (another unit?)"
    for good, expected, got in (
        (len(shape) == 3 and min(shape) > 1, "a 3D volume", f"shape {volume.shape}"),
        (math.prod(shape) <= 2**29, f"at most {2**29} voxels", f"shape {shape}"),  # 800 an axis
        (kind.kind in "iuf", "voxels that are real numbers", kind),
        (upright > 0.1, "an affine that can be inverted", affine.tolist()),
        (near, limits, affine.tolist()),
    ):
        require(good, f"{path}: expected {expected}, got {got}")
    return volume, shape


def read_volume(path):
    """Return the MetaTensor (1, X, Y, Z) float32 of a NIfTI file, native grid; or a ValueError."""
    header, shape = read_header(path)
    stored = header.dataobj
    spec = (stored.dtype, stored.offset, stored.slope, stored.inter)
    try:  # nibabel alone stops before the checksum
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if str(path).endswith(".gz") else content
        with np.errstate(all="ignore"):  # what becomes infinite is told below
            whole = nib.arrayproxy.ArrayProxy(io.BytesIO(content), (shape, *spec))
            data = np.asarray(whole, dtype=np.float32)
    except READ_ERRORS as error:
        told = f"cannot be read to its last byte ({explain(error)})"
        raise ValueError(f"{path}: {told}; expected a whole file, copy it again") from None
    bad = data.size - int(np.isfinite(data).sum())
    require(not bad, f"{path}: expected finite voxels, {bad} are NaN or infinite")
    return MetaTensor(torch.from_numpy(data.reshape(1, *shape)), torch.from_numpy(header.affine))


def readings(header):
    """Return {name: affine} of the places that programs give the voxels; the first is used here."""
    found = {"sform": header.get_sform(coded=True)[0], "qform": None}
    with suppress(ValueError):  # a quaternion that is none
        found["qform"] = header.get_qform(coded=True)[0]
    # ITK's programs (ITK-SNAP, ANTs, 3D Slicer, nnU-Net), seen with SimpleITK 2.5: docs/data.md.
    itk = found["sform" if header["sform_code"] == 1 or found["qform"] is None else "qform"]
    itk = np.diag([-1.0, -1, 1, 1]) if itk is None else itk.copy()  # its axes: left, back, up
    itk[:3, :3] *= np.divide(header.get_zooms()[:3], nib.affines.voxel_sizes(itk))
    found = {name: affine for name, affine in found.items() if affine is not None}
    return (found or {"centred grid": header.get_base_affine()}) | {"ITK's reading": itk}


NO_SIDES = "left and right are unknown"


def read_scan(path):
    """Return the volume of `read_volume`, and what to warn of; a ValueError if it shows no head."""
    image, header = read_volume(path), read_header(path)[0].header
    volume = np.asarray(image)[0]
    low, high = volume.min(), volume.max()
    require(low < high, f"{path}: expected a scan, all voxels are {low:g}")
    # In noise, neighbouring voxels do not correlate. A few very bright ones hide a head from the
    # correlation of values, much air a small head from that of ranks: one is enough.
    pair = [volume[start : len(volume) // 2 * 2 : 2, ::2, ::2].ravel() for start in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of half a volume that is constant
        alike = np.corrcoef(pair)[0, 1] >= 0.2 or stats.spearmanr(*pair).statistic >= 0.2
    require(alike, f"{path}: expected a head, got nothing but noise")
    sides, pixdim = nib.affines.voxel_sizes(image.affine.numpy()), header.get_zooms()[:3]
    told = f"its pixdim says {spacing_words(pixdim)} a voxel, its affine {spacing_words(sides)}"
    cautions = [] if np.allclose(sides, pixdim, rtol=0.01) else [f"{told}, which is used"]
    places = readings(header)
    used, *_, itk = ("".join(nib.aff2axcodes(affine)) for affine in places.values())
    if used != itk and "centred grid" not in places:
        told = f"ITK's programs (ITK-SNAP, 3D Slicer) see axes {itk}, this script {used}: "
        cautions.append(told + "its qform and sform differ; look which sides are right")
    dark, bright = np.percentile(volume[::2, ::2, ::2], (1, 99))
    if low >= 0 and dark > 0.2 * bright and (volume <= dark).mean() < 0.1:
        told = "it holds no air, or air far above 0; without air dark tissue is lost: "
        cautions.append(told + "give the whole scan")
    if "centred grid" in places:
        cautions.append(f"its qform and sform code are 0: {NO_SIDES}")
    return image, [f"{path}: {caution}" for caution in cautions]


def read_label(path):
    """Return (the volume of `read_volume` as whole numbers, sentences to warn with)."""
    label, stored = read_volume(path), read_header(path)[0].dataobj
    # Labels 1 to 7 in steps of a header's slope come back in uint8 as 0.988, 2.004 and so on.
    whole, step = label.round(), abs(stored.slope) if stored.dtype.kind in "iu" else 0
    good = (label - whole).abs() <= max(step / 2, 1e-3)
    require(good.all(), f"{path}: expected whole numbers in a mask, got fractions")
    values, counts = np.unique(np.asarray(whole[whole < 0]), return_counts=True)
    told = ", ".join(f"{v:g} ({n} voxels)" for v, n in zip(values[:5], counts, strict=False))
    require(not told, f"{path}: expected labels of 0 and more in a mask, got {told}")
    values = np.unique(np.asarray(whole[whole > 0]))  # many are numbered PVS
    told = f"{path}: has the labels {', '.join(f'{v:g}' for v in values[:5])}; all count as PVS"
    return whole, [told] * (1 < len(values) <= 5)


def read_pair(case):
    """Return {"image", "label"} of a case, each (1, X, Y, Z), and sentences to warn with."""
    volumes, problems, cautions = {}, [], []
    for key, read in (("image", read_scan), ("label", read_label)):
        try:
            volumes[key], told = read(getattr(case, key))
            cautions += told
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(*problems)
    shape, got = (tuple(volume.shape[1:]) for volume in volumes.values())
    require(shape == got, f"{case.label}: expected the scan's shape {shape}, got {got}")
    scan, other = readings(read_header(case.image)[0].header), volumes["label"].affine.numpy()
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1])).reshape(4, -1)
    # In voxels; other readings of the mask would let shifted and mirrored ones in.
    moved = {name: (np.linalg.solve(a, other @ corners) - corners)[:3] for name, a in scan.items()}
    shifts = {name: np.linalg.norm(away, axis=0).max() for name, away in moved.items()}
    used, best = next(iter(shifts)), min(shifts, key=shifts.get)
    told = f"{case.label}: its affine puts corners {shifts[used]:.2f} voxels from the scan's"
    axes, own = ("".join(nib.aff2axcodes(a)) for a in (other, scan[used]))
    tried = f"axes {axes}, the scan's are {own}; tried: {', '.join(scan)}"
    require(shifts[best] <= 0.5, f"{told}, expected at most 0.5 ({tried})")
    if shifts[used] > 0.5:
        told += f" {used}, but it fits the scan's {best}"
        cautions.append(f"{told}; paired voxel by voxel, placed by the {used}")
    elif shifts[used] > 0.1:
        cautions.append(f"{told}; the scan's is used for both")
    volumes["label"].affine = volumes["image"].affine  # its own is half a voxel off at most
    return volumes, cautions


def check_mask(case, label, entry):
    """Return what to warn of in a mask (X, Y, Z), native grid; no voxel in the head is an error."""
    voxels = np.argwhere(label.numpy() > 0)
    to_working = np.linalg.solve(entry["affine"], entry["native_affine"])
    places = nib.affines.apply_affine(to_working, voxels).round().astype(int)
    head = head_mask(entry["image"].float())[0]
    inside = np.all((places >= 0) & (places < head.shape), axis=1)
    hits, lost = tuple(places[inside].T), int((~inside).sum())
    good = head[hits].any() or ndimage.binary_fill_holes(head)[hits].any() or not len(voxels)
    told = f"all {len(voxels)} voxels lie outside; told by brightness, it fills {head.mean():.0%}"
    require(good, f"{case.label}: expected PVS in the head, {told} of its box")
    percent = 100 * int(entry["label"].sum()) / head.sum()
    outside = f"{lost} of {len(voxels)} voxels lie outside the head and are left out"
    large = f"{percent:.1f} % of the head is PVS, expected less than 5"
    return [f"{case.label}: {t}" for wrong, t in ((lost, outside), (percent > 5, large)) if wrong]


def ras_spacing(affine):
    """Return the voxel's sides (mm) along the axes that lie next to right, front and top."""
    order = np.argsort(nib.io_orientation(affine)[:, 0])
    return nib.affines.voxel_sizes(affine)[order].round(4).tolist()


def working_spacing(spacing, cfg):
    """Return the sides (mm) on the working grid of a scan with these, both in RAS order, (3,)."""
    near = np.abs(np.divide(spacing, cfg.PIX_DIM) - 1) <= cfg.SPACING_TOLERANCE
    return np.where(near, spacing, cfg.PIX_DIM)


def spacing_words(spacing):
    """Return a voxel's sides as text, 0.8 x 0.8 x 0.8 mm."""
    return f"{' x '.join(f'{mm:g}' for mm in spacing)} mm"


def volume_ml(mask, affine):
    """Return the volume of a mask's voxels."""
    return float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


def own_spacing(cases):
    """Return the scans' median spacing (mm), within the bounds of a working grid."""
    spacings = []
    for case in cases:
        with suppress(ValueError):  # `prepare` tells what is unreadable
            spacings.append(case.native_spacing or ras_spacing(read_header(case.image)[0].affine))
    median = np.median(spacings or [[1.0, 1.0, 1.0]], axis=0)
    return tuple(np.clip(median, SMALLEST_SIDE, LARGEST_SIDE).round(4).tolist())


def split_cases(cases, cfg):
    """Divide the cases by subject into {"train": cases, ..}; ds005595 as published by default."""
    subjects, seed = sorted({case.subject for case in cases}), {"random_state": cfg.SEED}
    if cfg.SPLIT:
        split = read_split(cfg.SPLIT, subjects)
    else:
        try:
            if cfg.FOLDS:
                parts = [*KFold(cfg.FOLDS, shuffle=True, **seed).split(subjects)][cfg.FOLD - 1]
                rest, test = ([subjects[number] for number in part] for part in parts)
            else:
                rest, test = train_test_split(subjects, test_size=cfg.TEST_FRACTION, **seed)
            train, val = train_test_split(rest, test_size=cfg.VAL_FRACTION, **seed)
        except ValueError:
            told = "expected at least 3 subjects with a mask, no fewer than FOLDS, and fractions "
            told += "(TEST_FRACTION, VAL_FRACTION) that leave some to train; got "
            raise ValueError(f"{cfg.DATA_DIR}: {told}{', '.join(subjects)}") from None
        split = {"train": train, "val": val, "test": test}
    return {part: [c for c in cases if c.subject in chosen] for part, chosen in split.items()}


def read_split(path, subjects):
    """Return {"train": subjects, "val": .., "test": ..} of a JSON file; log who is not in it."""
    try:
        content = read_json(path)
        split = {part: content[part] for part in ("train", "val", "test")}
        require(all(isinstance(part, list) for part in split.values()), "no lists")
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        told = f"expected lists train, val and test ({explain(error)})"
        raise ValueError(f"{path}: {told}") from None
    for part, some in split.items():  # 001 and sub-0-01 are sub-001, as in `make_cases`
        short = ["sub-" + re.sub("^sub-|[^0-9A-Za-z]", "", str(name)) for name in some]
        split[part] = [s if s in subjects else str(n) for s, n in zip(short, some, strict=True)]
    named = [*itertools.chain(*split.values())]
    problems = [f"{part}: expected at least one subject" for part in split if not split[part]]
    problems += [f"{s}: named more than once" for s in sorted(set(named)) if named.count(s) > 1]
    problems += [f"{s}: no subject with a mask" for s in sorted(set(named) - set(subjects))]
    raise_problems(problems, title=f"{path}: not a usable split:")
    for subject in sorted(set(subjects) - set(named)):
        log.warning("Warning: left out, not in %s: %s", path, subject)
    return split


# -------------------------------------------------------------------------------------- Transforms

INTERPOLATION = ("bilinear", "nearest")  # of image, label
LARGEST_BRAIN = 2500  # ml; a head is larger


def head_mask(image):
    """Return where the head is in a volume (1, H, W, D), bool: what is bright, beside air."""
    volume = np.asarray(image)[0]
    dark, bright = np.percentile(volume[::2, ::2, ::2], (1, 99))
    # Air is Rician noise above zero; opening removes its specks.
    tissue = ndimage.binary_opening(volume > dark + 0.15 * (bright - dark))
    components, count = ndimage.label(tissue)
    sizes = np.bincount(components.ravel())[1:]
    large = sizes >= sizes.max(initial=0) / 10  # a lost slice parts a head
    return np.append(not count, large)[components][None]  # all where nothing stands out


def keep_head(image, depth):
    """Return `head_mask`, without what is over `depth` mm below the head's top; 0: all of it."""
    head = head_mask(image)
    areas = head[0].sum((0, 1))
    end = 1 + np.flatnonzero(areas >= areas.max() / 10)[-1]  # an ear or a coil is no top
    if depth and not head.all():  # where something stands out
        head[..., : max(end - math.ceil(depth / ras_spacing(image.affine.numpy())[2]), 0)] = False
    return head


def darken_background(image):
    """Return (a scan (1, X, Y, Z), whether the skull is stripped from it).

    A value that fills half of the volume's faces is background, even where it is not the lowest. In
    a stripped scan it is set below all tissue; in a head, if as bright as tissue, to the darkest.
    """
    volume = np.asarray(image)[0]
    faces = np.concatenate([np.take(volume, [0, -1], axis).ravel() for axis in range(3)])
    values, counts = np.unique(faces, return_counts=True)
    value = values[counts.argmax()]
    if 2 * counts.max() < counts.sum():
        return image, False
    parts, _ = ndimage.label(np.abs(volume - value) <= 1e-6 * np.ptp(volume))
    outside = (np.bincount(parts.ravel()) > 26)[parts] & (parts > 0)  # brain may have a few
    low, high = np.percentile(volume[~outside], (0.5, 99.5))
    rest = ~outside
    box = rest[ndimage.find_objects(rest.astype(np.int8))[0]]
    flat = max(np.take(box, side, axis).mean() for axis in range(3) for side in (0, -1))
    small = volume_ml(rest, image.affine.numpy()) < LARGEST_BRAIN
    stripped = bool(small and flat < 0.3)  # wide necks and slabs end flat, brains at 0.1
    if high > low and (stripped or value > low + 0.15 * (high - low)):
        image = image.clone()
        image[:, outside] = low - (0.2 * (high - low) if stripped else 0)
    return image, stripped


def scale_intensity(image, percentiles):
    """Return the volume with these percentiles of the head's voxels taken to 0 and 1, clipped."""
    low, high = np.percentile(np.asarray(image)[head_mask(image)], percentiles)
    return torch.clamp((image - low) / ((high - low) or 1), 0, 1)


def build_transforms(cfg):
    """Return the deterministic transforms, native grid (1, X, Y, Z) to working grid (1, H, W, D).

    The image ends in [0, 1], the label as 0 or 1. A function of your own here belongs in MAKERS.
    """
    scale = functools.partial(scale_intensity, percentiles=cfg.INTENSITY_PERCENTILES)
    head = functools.partial(keep_head, depth=cfg.HEAD_DEPTH)
    spacing = {"pixdim": cfg.PIX_DIM, "mode": INTERPOLATION, "dtype": torch.float32}
    # Interpolation there and back costs thin PVS. What lies between the two keeps its spacing.
    for bound, sign in (("min_pixdim", -1), ("max_pixdim", 1)):
        spacing[bound] = [side * (1 + sign * cfg.SPACING_TOLERANCE) for side in cfg.PIX_DIM]
    crop = {"source_key": "image", "select_fn": head, "margin": 2, "allow_smaller": True}
    steps = [
        mt.AsDiscreted("label", threshold=1e-6, allow_missing_keys=True),
        mt.Orientationd(BOTH, axcodes="RAS", labels=None, allow_missing_keys=True),
        mt.Spacingd(BOTH, **spacing, allow_missing_keys=True),
        mt.CropForegroundd(BOTH, **crop, allow_missing_keys=True),
        mt.Lambdad("image", scale),
    ]
    return mt.Compose(steps)


def to_working_grid(volumes, cfg):
    """Transform the MetaTensors (1, X, Y, Z) of an image and, where there is one, its label.

    Returns image (1, H, W, D) float16 in [0, 1], label (1, H, W, D) uint8, stripped (bool), and
    affine, native_affine (4, 4) and native_shape, with which `to_native_grid` goes back.
    """
    image, stripped = darken_background(volumes["image"])
    entry = {"native_affine": image.affine.clone(), "native_shape": tuple(image.shape[1:])}
    volumes, entry["stripped"] = build_transforms(cfg)(volumes | {"image": image}), stripped
    entry |= {"affine": volumes["image"].affine, "image": volumes["image"].as_tensor().half()}
    if "label" in volumes:
        entry["label"] = volumes["label"].as_tensor().to(torch.uint8)
    return entry


def to_native_grid(volume, entry):
    """Return a working-grid volume (1, H, W, D) on the scan's (1, X, Y, Z): linear, 0 outside."""
    resample = mt.SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)
    volume, affine = MetaTensor(volume, affine=entry["affine"]), entry["native_affine"].clone()
    native = torch.empty(1, *entry["native_shape"])
    for slab in native.split(32, dim=1):  # MONAI holds the places of all voxels that it fills
        slab.copy_(resample(volume, affine, slab.shape[1:]).as_tensor())
        affine[:3, 3] += slab.shape[1] * affine[:3, 0]
    return native


def build_train_transforms(cfg):
    """Return the random transforms: a cached volume to CROPS_PER_VOLUME patches, plain float32."""
    flips = [mt.RandFlipd(BOTH, 0.5, axis) for axis in FLIPS[cfg.FLIP_AXES]]
    plain = mt.EnsureTyped(BOTH, dtype=torch.float32, track_meta=False)
    if cfg.AUGMENTATION == "native":
        return mt.Compose([CutPatches(cfg), *flips, *NATIVE_AUGMENTATION.values(), plain])
    crop = {"spatial_size": cfg.IMG_PATCH_SIZE, "num_samples": cfg.CROPS_PER_VOLUME}
    crop |= {"pos": cfg.POS_NEG_RATIO, "neg": 1, "label_key": "label"}
    crop |= {"fg_indices_key": "foreground", "bg_indices_key": "background"}
    affine = {"rotate_range": (math.radians(15),) * 3, "scale_range": (0.1,) * 3}
    affine |= {"mode": INTERPOLATION, "padding_mode": "border"}
    # Elastic: shifts of up to 2 % of the patch at 6^3 knots. Its defaults are blocky.
    elastic = {"spatial_size": cfg.IMG_PATCH_SIZE, "rand_size": (6, 6, 6), "def_range": 0.04}
    elastic |= {"field_mode": "trilinear", "align_corners": True, "grid_align_corners": True}
    elastic["grid_mode"] = INTERPOLATION
    steps = [
        mt.RandCropByPosNegLabeld(BOTH, **crop),
        mt.EnsureTyped(BOTH, dtype=torch.float32),
        mt.RandAffined(BOTH, prob=0.3, **affine),
        mt.RandSmoothDeformd(BOTH, prob=0.2, **elastic),
        mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        mt.RandGaussianNoised("image", prob=0.2, std=0.05),
    ]
    return mt.Compose([*steps, *flips, plain])


class CutPatches(mt.Randomizable, mt.Transform):
    """Cut patches round PVS or elsewhere in the head out of a volume, some turned and scaled."""

    def __init__(self, cfg):
        self.cfg, self.size = cfg, np.array(cfg.IMG_PATCH_SIZE)

    def __call__(self, item):
        """Return CROPS_PER_VOLUME dicts of image and label (1, *IMG_PATCH_SIZE)."""
        volumes, patches = [item[key] for key in BOTH], []
        for _ in range(self.cfg.CROPS_PER_VOLUME):
            ratio = self.cfg.POS_NEG_RATIO
            places = item["foreground" if self.R.random() * (ratio + 1) < ratio else "background"]
            place = int(places[self.R.randint(len(places))])
            shape = np.array(volumes[0].shape[1:])  # of which patches reach beyond if smaller
            inside = np.clip(np.unravel_index(place, shape), self.size // 2, shape - self.size // 2)
            centre = np.where(shape < self.size, shape // 2, inside)
            image, label = self.cut(volumes, centre, self.draw_matrix(item["spacing"]))
            patches.append({"image": image, "label": label, "name": item["name"]})
        return patches

    def draw_matrix(self, spacing):
        """Return a random rotation and scaling of voxels, (3, 3); None: neither was drawn."""
        turned, scaled = self.R.random(2) < 0.2
        angles = self.R.uniform(-15, 15, 3) * turned
        scale = self.R.uniform(0.8, 1.25) if scaled else 1
        turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() / scale
        return turn * spacing / spacing[:, None] if turned or scaled else None

    def cut(self, volumes, centre, matrix):
        """Return the patches (1, h, w, d) float32 of image and label round a voxel; 0 outside."""
        half, end, shape = self.size // 2, self.size - self.size // 2, volumes[0].shape[1:]
        if matrix is not None:  # MONAI's crop and then affine would smear the border
            grid = (np.stack(np.indices(self.size), -1) - half) @ matrix.T
            half = np.ceil(np.abs(matrix) @ self.size / 2).astype(int) + 1
            end = half + 1
        low, high = centre - half, centre + end
        inner = [slice(max(a, 0), min(b, n)) for a, b, n in zip(low, high, shape, strict=True)]
        beyond = np.maximum([-low, high - shape], 0).T[::-1].ravel().tolist()  # last axis first
        parts = [volume[(slice(None), *inner)].float() for volume in volumes]
        parts = [nn.functional.pad(part, beyond) for part in parts]
        if matrix is None:
            return parts
        places = torch.from_numpy((grid / half)[..., ::-1].astype(np.float32))[None]
        sample = functools.partial(nn.functional.grid_sample, grid=places, align_corners=True)
        # Linear labels above a half lose a third of the voxels of thin PVS.
        return [sample(v[None], mode=m)[0] for v, m in zip(parts, INTERPOLATION, strict=True)]


# Of images in [0, 1]; nnU-Net's own list is too much for short trainings. What moves voxels takes
# BOTH, mode=INTERPOLATION: labels stay 0 or 1.
NATIVE_AUGMENTATION = {
    "noise": mt.RandGaussianNoised("image", prob=0.3, std=0.12, sample_std=True),
    "blur": mt.RandGaussianSmoothd("image", *3 * [(0.25, 0.75)], prob=0.1),
    "bias": mt.RandBiasFieldd("image", coeff_range=(-0.15, 0.15), prob=0.15),
    "gamma": mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
}

# ------------------------------------------------------------------------------- Cache and loaders

BACKGROUND_SAMPLE = 100_000  # voxels kept as centres of negative patches; all would take 4 B each


def cache_folder(cfg):
    """Return where prepared volumes lie: CACHE_DIR, else a folder of the run or of its folds."""
    out = Path(cfg.OUTPUT_DIR)
    top = out.parent if cfg.FOLD and out.name == f"fold-{cfg.FOLD}" else out
    return Path(cfg.CACHE_DIR or top / "cache")


def load_cached(case):
    """Return the cache entry (see `fill_cache`) of a prepared case, memory-mapped."""
    try:
        return torch.load(case.cache, mmap=True, weights_only=True)
    except READ_ERRORS as error:
        told = f"{case.cache}: the prepared volume is missing or damaged ({explain(error)})"
        raise OSError(f"{told}; the next run rebuilds it (CACHE_DIR: one for all nodes)") from None


def hash_file(path):
    """Return the hash of a file, by which it is known again."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def hash_voxels(volume):
    """Return the hash of a native volume (1, X, Y, Z) by which it is known again."""
    return hashlib.sha256(np.ascontiguousarray(volume)).hexdigest()


def fill_cache(case, cfg):
    """Return the facts of a case from its cache entry; else read, check, transform and write it.

    The entry: `to_working_grid`'s; int32 flat indices of all labelled voxels (foreground), a sample
    of the others (background) and of those of them in the head; "facts" of the Case.
    """
    with suppress(OSError):
        return load_cached(case)["facts"]
    volumes, cautions = read_pair(case)
    image, label = volumes.values()
    entry, true = to_working_grid(volumes, cfg), label.as_tensor() > 0
    cautions += check_mask(case, label[0].as_tensor(), entry)
    back = to_native_grid(entry["label"].float(), entry) > 0.5  # as a probability
    dice = compute_dice(back[None], true[None], ignore_empty=False)
    flat = entry["label"].flatten()
    background, foreground = (torch.where(flat == n)[0].to(torch.int32) for n in (0, 1))
    order = torch.randperm(len(background), generator=torch.Generator().manual_seed(123))
    background = background[order]
    head = background[entry["image"].flatten()[background] > 0]  # air is scaled to 0
    entry |= {"foreground": foreground, "background": background[:BACKGROUND_SAMPLE].clone()}
    entry["head"] = (head if len(head) else background)[:BACKGROUND_SAMPLE].clone()
    facts = {"sha256": hash_voxels(image), "label_sha256": hash_voxels(label)}
    facts |= {"native_voxels": int(true.sum()), "working_voxels": len(foreground)}
    facts["native_spacing"] = tuple(ras_spacing(image.affine.numpy()))
    facts["roundtrip_dice"] = float(dice) if true.any() else None
    facts |= {"stripped": entry["stripped"], "warnings": tuple(cautions)}
    with suppress(OSError):  # another run was faster, and may be reading it
        return load_cached(case)["facts"]
    write_torch(case.cache, entry | {"facts": facts})
    return facts


MAKERS = (read_pair, read_header, read_volume, read_label, readings, check_mask, ras_spacing)
MAKERS += (read_scan, head_mask, keep_head, darken_background, scale_intensity, build_transforms)
MAKERS += (to_working_grid, to_native_grid, fill_cache, volume_ml, hash_voxels)
LIBRARIES = [importlib.metadata.version(name) for name in ("monai", "torch", "scipy", "numpy")]
CACHED_CODE = [inspect.getsource(maker) for maker in MAKERS]
CACHED_SETTINGS = sorted(set(re.findall(r"cfg\.([A-Z]\w+)", "".join(CACHED_CODE))))


def cache_path(case, cfg):
    """Return where a case's prepared volume lies; other files, settings or code, another name."""
    stats = {path: os.stat(path) for path in (case.image, case.label)}
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()]
    settings = [getattr(cfg, name) for name in CACHED_SETTINGS]
    constants = (INTERPOLATION, LARGEST_BRAIN, BACKGROUND_SAMPLE)
    key = (files, settings, CACHED_CODE, LIBRARIES, constants)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return cache_folder(cfg) / f"{case.name}-{digest}.pt"


def prepare(case, cfg):
    """Return (the case with its facts, None), or (the case, its error); runs in workers."""
    try:
        case = replace(case, cache=str(cache_path(case, cfg)))
        with naming(case.image):
            return replace(case, **fill_cache(case, cfg)), None
    except (ValueError, OSError) as error:
        path = getattr(error, "filename", None)  # of a file that is not there
        return case, ValueError(f"{path}: {explain(error)}") if path else error


def check_free_disk(cases, cfg):
    """Raise a ValueError where the disk will not hold what the cache still lacks."""
    needed, folder = 0, cache_folder(cfg)
    there = {path.name for path in folder.glob("*.pt")}  # NFS remembers of single ones what lacked
    for case in cases:
        with suppress(ValueError, OSError):  # told by `prepare`
            if cache_path(case, cfg).name not in there:
                volume, shape = read_header(case.image)
                mm3 = math.prod(shape) * abs(np.linalg.det(volume.affine[:3, :3]))
                spacing = working_spacing(ras_spacing(volume.affine), cfg)
                # Bytes: 3 a voxel of the head's box, some 70 % of the volume, and two samples.
                needed += 2.1 * mm3 / math.prod(spacing) + 8 * BACKGROUND_SAMPLE
    free = free_disk(folder)
    told = f"the cache takes some {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; free some, "
    require(needed <= free, f"{folder}: {told}or choose another folder with --cache-dir")


def prepare_cases(cases, cfg):
    """Check and cache all cases; return them with their facts, or list all that is wrong."""
    check_free_disk(cases, cfg)
    in_worker = functools.partial(prepare, cfg=cfg)
    loader = DataLoader(share(cases), batch_size=None, collate_fn=in_worker, **workers(cfg))
    done = gather([*Progress(loader, "checking and caching")])
    for error in [error for _, error in done if isinstance(error, OSError)]:
        raise OSError(f"{error}\nFree space, or choose another folder with --cache-dir.")
    problems = [told for _, error in done if error for told in error.args]
    remedy = "Repair these files (a mask must be on its scan's grid) or move them elsewhere."
    raise_problems(problems, remedy)
    cases, first = [case for case, _ in done], {}
    for case in cases:
        for warning in case.warnings:
            log.warning("Warning: %s", warning)
        other = first.setdefault(case.sha256, case)
        if other.subject != case.subject:
            problems.append(f"{case.image}: expected other voxels than {other.image} has")
    raise_problems(problems, "Remove copies: one could be trained on and the other tested.")
    log_grids(cases, cfg)
    return cases


def log_grids(cases, cfg):
    """Print the scans' spacing and what the working grid alone costs the masks."""
    usual = own_spacing(cases)
    native = sorted({spacing_words(case.native_spacing) for case in cases})
    log.info("Native grid     %s", ", ".join(native))
    dices = [case.roundtrip_dice for case in cases if case.native_voxels] or [math.nan]
    told = "Round trip      %.3f (%.3f to %.3f): native Dice of masks to the working grid and back"
    log.info(told, np.mean(dices), min(dices), max(dices))
    for case in cases:
        warn_if_far(case.image, case.native_spacing, usual, "")
    sides = working_spacing(usual, cfg)
    if cfg.AUGMENTATION == "published" and max(sides) > 1.2 * min(sides):
        told = (
            "Warning: AUGMENTATION published turns %s as if it were a cube; --augmentation native "
        )
        log.warning(told + "turns in mm", spacing_words(sides))
    # Finer elsewhere gains nothing.
    coarser = np.maximum(sides / usual, 1).prod()
    if coarser > 1.01:
        told = "Warning: the working grid is coarser than the scans, %.1f times in voxel volume. "
        told += "What that costs thin PVS is told by Round trip; --pix-dim %s avoids it."
        log.warning(told, coarser, " ".join(f"{mm:g}" for mm in usual))


def warn_if_far(image, spacing, usual, whose):
    """Warn where a side of a scan's voxels (mm) is 1.5 times more or less than usual."""
    if max(np.abs(np.log(np.divide(spacing, usual)))) > math.log(1.5):
        told = f"{spacing_words(spacing)}, far from {whose}{spacing_words(usual)}"
        log.warning("Warning: %s has voxels of %s", image, told)


class TrainingPatches(Dataset):
    """Training cases by (epoch, number); the patches are a function of SEED, epoch and number."""

    def __init__(self, cases, cfg):
        self.cases, self.cfg, self.transforms = cases, cfg, build_train_transforms(cfg)

    def __getitem__(self, key):
        (epoch, number), size = key, self.cfg.IMG_PATCH_SIZE
        entry = load_cached(self.cases[number])
        item = {name: entry[name] for name in (*BOTH, "foreground", "background")}
        shape = item["image"].shape[1:]
        if self.cfg.AUGMENTATION == "native":
            item["background"] = entry["head"]
            item["spacing"] = nib.affines.voxel_sizes(entry["affine"].numpy())
        elif np.less(shape, size).any():  # pad to the patch, and move the centres
            item |= {key: mt.SpatialPad(size)(item[key]) for key in BOTH}
            padded = item["image"].shape[1:]
            before = np.subtract(padded, shape)[:, None] // 2
            for key in ("foreground", "background"):
                places = np.unravel_index(item[key].numpy(), shape) + before
                item[key] = torch.from_numpy(np.ravel_multi_index(tuple(places), padded))
        seed = np.random.SeedSequence([self.cfg.SEED, epoch, number]).generate_state(1)[0]
        self.transforms.set_random_state(seed=int(seed))
        np.random.seed(seed)  # for functions of your own
        with naming(self.cases[number].image):
            return self.transforms(item | {"name": self.cases[number].name})


class EpochSampler(Sampler):
    """Yield batches of (epoch, number), from `epoch` on without end: all cases in a new order."""

    def __init__(self, count, cfg):
        self.count, self.seed, self.batch_size, self.epoch = count, cfg.SEED, cfg.BATCH_SIZE, 1
        self.shared = math.ceil(count / process_number("WORLD_SIZE"))  # cases of this process

    def __len__(self):
        return math.ceil(self.shared / self.batch_size)

    def __iter__(self):
        for epoch in itertools.count(self.epoch):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            # A few cases come twice where the processes would not have equally many.
            order = share(np.resize(order, self.shared * process_number("WORLD_SIZE")).tolist())
            for start in range(0, self.shared, self.batch_size):
                yield [(epoch, number) for number in order[start : start + self.batch_size]]


class TrainLoader(DataLoader):
    """A loader of the sampler's `epoch`, whose workers go on with the next one's batches."""

    batches, following = None, None  # waiting for the first took half of short epochs (H100)

    def __iter__(self):
        epoch = self.batch_sampler.epoch
        if epoch != self.following:
            self.batches = super().__iter__()
        self.following = None  # what is broken off here is begun anew
        yield from itertools.islice(self.batches, len(self))
        self.following = epoch + 1


def collate(cases):
    """Return the patches of some cases as one batch."""
    return default_collate([*itertools.chain(*cases)])


def build_train_loader(cases, cfg, device):
    """Return the loader of batches: BATCH_SIZE volumes' patches, (B, 1, *IMG_PATCH_SIZE)."""
    how = {"batch_sampler": EpochSampler(len(cases), cfg), "pin_memory": device.type == "cuda"}
    how["generator"] = torch.Generator()  # so that it draws nothing from the model's random numbers
    return TrainLoader(TrainingPatches(cases, cfg), collate_fn=collate, **how, **workers(cfg))


# ------------------------------------------------------------------------------------------- Model


def build_unetplusplus(cfg):
    """Return UNet++ (Zhou et al. 2018, 10.1007/978-3-030-00889-5_1), of half resolution inside."""
    widths = [cfg.DECODER_WIDTH * 2**i for i in reversed(range(cfg.ENCODER_DEPTH))]
    settings = {"encoder_weights": None, "decoder_channels": widths, "in_channels": 1}
    return smp.UnetPlusPlus(cfg.ENCODER_NAME, cfg.ENCODER_DEPTH, classes=1, **settings)


class SupervisedDynUNet(DynUNet):
    """MONAI's, but in training its smaller outputs are given as they are, not enlarged."""

    def forward(self, image):
        """Return logits (B, 1, H, W, D); in training a list of them and (.., H/2, W/2, D/2), .."""
        outputs = [self.output_block(self.skip_layers(image)), *self.heads]
        self.heads[:] = len(self.heads) * [None]  # else a trained network cannot be copied
        return outputs if self.training else outputs[0]


def build_dynunet(cfg):
    """Return MONAI's U-Net after nnU-Net (Isensee et al. 2021, 10.1038/s41592-020-01008-z)."""
    depth = cfg.ENCODER_DEPTH
    smaller = depth - 1 if cfg.DEEP_SUPERVISION else 0  # outputs
    filters = [min(cfg.DECODER_WIDTH * 2**i, 320) for i in range(depth + 1)]
    settings = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "filters": filters}
    settings |= {"strides": [1] + depth * [2], "upsample_kernel_size": depth * [2]}
    settings |= {"deep_supervision": cfg.DEEP_SUPERVISION, "deep_supr_num": smaller}
    return SupervisedDynUNet(kernel_size=(depth + 1) * [3], **settings)


def build_model(cfg, pretrained=True):
    """Return the network, images (B, 1, H, W, D) in [0, 1] to logits of that shape, on the CPU.

    In training it may return a list, of which each has half the sides of the one before.
    """
    torch.manual_seed(cfg.SEED)  # of all weights but those of ENCODER_WEIGHTS
    model = globals()["build_" + cfg.ARCHITECTURE](cfg)
    if cfg.ARCHITECTURE == "unetplusplus" and cfg.ENCODER_WEIGHTS != "none" and pretrained:
        load_encoder_weights(model.encoder, cfg)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d) and cfg.BATCHNORM_MOMENTUM > 0:
            module.momentum = cfg.BATCHNORM_MOMENTUM
    told = f"NETWORKS: {cfg.ARCHITECTURE}: expected a pattern of the output's bias in "
    told += "named_parameters(); or use --no-head-bias-log-odds"
    require(output_biases(model, cfg) or not cfg.HEAD_BIAS_LOG_ODDS, told)
    return model


def describe_network(cfg):
    """Return the network in the words that log and files show."""
    name, levels = NETWORKS[cfg.ARCHITECTURE][2], cfg.ENCODER_DEPTH + 1
    if cfg.ARCHITECTURE == "unetplusplus":
        return f"{name} with {cfg.ENCODER_NAME}"
    return f"{name}, {levels} levels, {cfg.DECODER_WIDTH} channels at full resolution"


def load_encoder_weights(encoder, cfg):
    """Load a 2D EfficientNet's state dict into the 3D encoder; ImageNet's is downloaded once."""
    path, remedy = cfg.ENCODER_WEIGHTS, "Remove or replace the file"
    how = {"map_location": "cpu", "weights_only": True}
    try:
        if path == "imagenet":
            known = smp.encoders.encoders[cfg.ENCODER_NAME]["pretrained_settings"]
            url = known["imagenet"]["url"]
            path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
            remedy = f"Fetch {url} and put it there"
            how |= {"progress": sys.stderr.isatty(), "check_hash": True}
            state = torch.hub.load_state_dict_from_url(url, **how)
        else:
            state = torch.load(path, **how)
        # RGB to one channel; the encoder itself spreads 2D kernels along the third axis.
        state["_conv_stem.weight"] = state["_conv_stem.weight"].sum(1, keepdim=True)
        encoder.load_state_dict(state)
    except READ_ERRORS as error:
        told = f"{path}: expected the state dict of a 2D EfficientNet as ENCODER_NAME says"
        told += f" ({explain(error)}).\n{remedy}, or use --encoder-weights none."
        raise ValueError(told) from None


def output_biases(model, cfg):
    """Return the biases of the outputs, one or, with deep supervision, several."""
    output = re.compile(NETWORKS[cfg.ARCHITECTURE][0])
    return [weights for name, weights in model.named_parameters() if output.fullmatch(name)]


def start_at_log_odds(model, cases, cfg):
    """Set the bias of every output to the log-odds of the training masks' mean."""
    total = sum(load_cached(case)["label"].numel() for case in cases)
    labelled = min(max(sum(case.working_voxels for case in cases), 1), total - 1)
    for bias in output_biases(model, cfg):
        nn.init.constant_(bias, math.log(labelled / (total - labelled)))


# -------------------------------------------------------------------------------- Loss and metrics

# 0.5 BCE + 0.5 Dice loss of float32 logits and labels (B, 1, H, W, D). One Dice over the batch,
# smoothed by 1, since a patch may hold no PVS (Milletari et al. 2016, 10.1109/3DV.2016.79).
loss_function = DiceCELoss(
    sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1, lambda_dice=0.5, lambda_ce=0.5
)


def supervise(outputs, label):
    """Return the loss of logits (B, 1, H, W, D), (B, 1, H/2, W/2, D/2), .. for the first's label.

    A larger voxel is PVS if a voxel in it is. With the nearest voxel's label, as in nnU-Net and
    MONAI's DeepSupervisionLoss, half of the simulated PVS vanish at half resolution, 86 % at a
    quarter. The weights 1, 1/2, 1/4, .. are scaled to the sum 1.
    """
    total = loss_function(outputs[0].float(), label)
    for i, logits in enumerate(outputs[1:], 1):
        label = nn.functional.max_pool3d(label, 2)
        total = total + loss_function(logits.float(), label) / 2**i
    return total / sum(1 / 2**i for i in range(len(outputs)))


METRICS = {"dice": "Dice", "iou": "IoU", "precision": "precision", "recall": "recall"}
EMPTY_MASKS = (  # so that neither a missed nor an invented finding drops out of a mean
    "Ground truth and prediction both empty: dice, iou, precision, recall, average_precision, "
    "cldice, sensitivity, f1 and nsd are 1, hd95 is 0. One of them empty: these are 0 (but the "
    "average_precision of an empty prediction, which is of probabilities), hd95 is the diagonal of "
    "the scan. A ground truth that is empty on the working grid only counts as missed there: 0. "
    "Round trip and error in percent of an empty ground truth are undefined (null)."
)


def calculate_metrics(pred, label):
    """Return {"dice", "iou", "precision", "recall"} of two binary masks; see EMPTY_MASKS."""
    pred, label = torch.as_tensor(pred).bool(), torch.as_tensor(label).bool()
    hits, found, true = (int(mask.sum()) for mask in (pred & label, pred, label))
    if found == 0 or true == 0:
        return dict.fromkeys(METRICS, float(found == true))
    scores = 2 * hits / (found + true), hits / (found + true - hits), hits / found, hits / true
    return dict(zip(METRICS, scores, strict=True))


TOUCHING = np.ones((3, 3, 3))  # voxels of one PVS share a face, an edge or a corner
LESION_RULES = {"any": "any overlap", "iou": "IoU above 0.1"}  # what makes a PVS found


def calculate_lesion_metrics(pred, label):
    """Return counts, matches, sensitivity, precision and F1 of the PVS of two masks (X, Y, Z).

    PVS are 26-connected components, matched as LESION_RULES says. Each side is counted on its own:
    no ratio exceeds 1, however PVS are split or merged. See EMPTY_MASKS.
    """
    (true, true_count), (found, found_count) = (ndimage.label(m, TOUCHING) for m in (label, pred))
    overlap = (true > 0) & (found > 0)
    pairs = np.stack([true[overlap], found[overlap]])
    (true_ids, found_ids), hits = np.unique(pairs, axis=1, return_counts=True)
    unions = np.bincount(true.ravel())[true_ids] + np.bincount(found.ravel())[found_ids] - hits
    iou = hits / unions
    row = {"count_label": true_count, "count_pred": found_count}
    both_empty = float(true_count == found_count == 0)
    for rule, matches in {"any": iou > 0, "iou": iou > 0.1}.items():
        matched_label, matched_pred = (len(np.unique(i[matches])) for i in (true_ids, found_ids))
        sensitivity = matched_label / true_count if true_count else both_empty
        precision = matched_pred / found_count if found_count else both_empty
        total = sensitivity + precision
        row |= {f"matched_label_{rule}": matched_label, f"matched_pred_{rule}": matched_pred}
        row |= {f"lesion_sensitivity_{rule}": sensitivity, f"lesion_precision_{rule}": precision}
        row[f"lesion_f1_{rule}"] = 2 * sensitivity * precision / total if total else 0.0
    return row


def calculate_boundary_metrics(pred, label, spacing):
    """Return {"nsd_voxel", "nsd_1mm", "hd95_mm", "one_mask_empty"} of two masks (X, Y, Z).

    Normalised surface Dice at a tolerance of the largest side of voxels, `spacing` (mm), and 1 mm
    (Nikolov et al. 2021, 10.2196/26151), and the Hausdorff distance's 95th percentile (mm).
    """
    if not pred.any() or not label.any():  # see EMPTY_MASKS; MONAI's NaN would drop out
        same = bool(pred.any() == label.any())
        worst = 0.0 if same else float(np.linalg.norm(np.multiply(spacing, pred.shape)))
        row = dict.fromkeys(("nsd_voxel", "nsd_1mm"), float(same))
        return row | {"hd95_mm": worst, "one_mask_empty": not same}
    masks = [torch.from_numpy(mask)[None, None] for mask in (pred, label)]
    settings, row = {"include_background": True, "spacing": [float(mm) for mm in spacing]}, {}
    for name, tolerance in {"nsd_voxel": max(spacing), "nsd_1mm": 1}.items():
        # A hair more, since a shift of one voxel comes out as one voxel only up to rounding.
        threshold = {"class_thresholds": [float(tolerance) * 1.0001], "use_subvoxels": True}
        row[name] = float(compute_surface_dice(*masks, **settings, **threshold))
    row["hd95_mm"] = float(compute_hausdorff_distance(*masks, percentile=95, **settings))
    return row | {"one_mask_empty": False}


def calculate_cldice(pred, label):
    """Return the centreline Dice of two masks (Shit et al. 2021, 10.1109/CVPR46437.2021.01629).

    Of the skeleton of each mask the share within the other one, in harmonic mean. The skeletons are
    MONAI's, soft ones of tubes up to 16 voxels wide; scikit-image's loses those of even width.
    """
    equal = (pred == label).all()
    if equal or not (pred.any() and label.any()):
        return float(equal)
    box = ndimage.find_objects((pred | label).view(np.uint8))[0]
    masks = [np.pad(mask[box], 2) for mask in (pred, label)]
    depth = max(ndimage.distance_transform_cdt(mask, "taxicab").max() for mask in masks)
    masks = [torch.from_numpy(mask)[None, None].float() for mask in masks]
    skeletons = [soft_skel(mask, min(int(depth), 8)) for mask in masks]  # more find nothing
    pairs = zip(skeletons, masks[::-1], strict=True)  # what is wide all over has no skeleton
    shares = [float((s * m).sum() / s.sum().clamp(min=1e-6)) for s, m in pairs]
    return 2 * shares[0] * shares[1] / max(sum(shares), 1e-9)


def calculate_average_precision(prob, label):
    """Return the area under precision against recall of the voxels; None: no PVS in the label."""
    # As scikit-learn's average_precision_score, which takes 65 bytes a voxel.
    values, counts = np.unique(prob[label], return_counts=True)
    if not len(values):
        return None
    above = prob.size - np.searchsorted(np.sort(prob, None), values)
    hits = np.cumsum(counts[::-1])[::-1]
    return float((counts * hits / above).sum() / counts.sum())


# -------------------------------------------------------------------------------------- Single PVS

PVS_COLUMNS = {  # of the tables `.._dseg.tsv`: what they hold, as their sidecar says
    "index": "number of the PVS in the image of the same name, from the largest on",
    "name": "PVS and the number",
    "volume_mm3": "volume of its voxels",
    "x_mm": "centroid, placed by the header (sform, else qform), towards the right",
    "y_mm": "centroid, towards anterior",
    "z_mm": "centroid, towards superior",
    "length_mm": "length of the rod whose variance is that along the first principal axis",
    "width_mm": "diameter of the cylinder of this length and volume",
    "linearity": "(first - second) / first principal variance: 1 a line, 0 a disc, ball or cube",
    "orientation_x": "first principal axis, pointing up; n/a of a voxel, or below linearity 0.001",
    "orientation_y": "its anterior part",
    "orientation_z": "its superior part",
    "mean_probability": "mean of the predicted probability; n/a in the ground truth",
    "matched": "whether a voxel lies in a PVS of the other mask; n/a if there is none",
    "iou": "the largest IoU with a single PVS of the other mask; n/a if there is none",
}


def number_components(mask):
    """Return the 26-connected components of a mask (X, Y, Z), numbered from the largest on."""
    components, count = ndimage.label(mask, TOUCHING)
    order = np.argsort(-np.bincount(components.ravel())[1:], kind="stable")
    numbers = np.zeros(count + 1, np.uint16 if count < 2**16 else np.int32)
    numbers[1 + order] = np.arange(1, count + 1)
    return numbers[components]


def measure_components(components, affine, prob=None, other=None):
    """Return a row of PVS_COLUMNS for each of `components`, matched with the PVS of `other`."""
    voxels = np.nonzero(components)
    own, count = components[voxels].astype(int) - 1, int(components.max())
    places, sides = nib.affines.apply_affine(affine, np.stack(voxels, 1)), affine[:3, :3]
    sizes = np.bincount(own, minlength=count)

    def mean(values):
        return np.bincount(own, values, count) / sizes

    centroids = np.stack([mean(axis) for axis in places.T], 1)
    away = places - centroids[own]
    spread = np.array([[mean(a * b) for b in away.T] for a in away.T]).transpose(2, 0, 1)
    # A rod or a side of length L has the variance L^2 / 12; voxels are boxes, not points.
    variances, axes = np.linalg.eigh(spread + sides @ sides.T / 12)
    volumes = sizes * abs(np.linalg.det(sides))
    lengths = np.sqrt(12 * variances[:, 2])
    linearity = 1 - variances[:, 1] / variances[:, 2]  # Westin 2002, 10.1016/S1361-8415(02)00053-1
    axis = axes[:, :, 2] * np.where(axes[:, 2:, 2] < 0, -1, 1)
    axis[(linearity < 1e-3) | (sizes == 1)] = np.nan  # a voxel's own sides are no direction
    widths = np.sqrt(4 * volumes / (np.pi * lengths))
    shape = [volumes, centroids, lengths, widths, linearity.round(6), axis]
    means = np.full(count, np.nan) if prob is None else mean(prob[voxels])
    iou = np.full(count, np.nan if other is None else 0.0)
    if other is not None:
        pairs = np.stack([own, other[voxels]])[:, other[voxels] > 0]
        (ids, theirs), hits = np.unique(pairs, axis=1, return_counts=True)
        unions = sizes[ids] + np.bincount(other.ravel())[theirs] - hits
        np.maximum.at(iou, ids, hits / unions)
    rows = []
    for number, numbers in enumerate(np.column_stack([*shape, means, iou]), 1):
        *known, share = [None if np.isnan(n) else float(f"{n:.5g}") for n in numbers]
        values = number, f"PVS {number}", *known, None if share is None else share > 0, share
        rows.append(dict(zip(PVS_COLUMNS, values, strict=True)))
    return rows


RATING = ("section_count", "grade", "section_side", "section_z_mm")
GRADES = (0, 10, 20, 40)  # the most PVS of the grades 0 to 3; 4 is above (Potter et al. 2015)


def middle_of_head(entry):
    """Return the middle of the head's box, (3,) in mm."""
    ends = (np.array(entry["image"].shape[1:]) - 1) / 2
    return nib.affines.apply_affine(entry["affine"].numpy(), ends)


def rate_busiest_section(mask, affine, middle):
    """Return (most PVS on an axial section of one hemisphere, its grade 0 to 4, side, its z in mm).

    The sagittal plane through `middle`, (3,) in mm, parts the hemispheres. Sections are whole: the
    grades are meant for basal ganglia or centrum semiovale (Potter et al. 2015, 10.1159/000375153).
    """
    turn = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, mask.shape)
    mask = nib.apply_orientation(mask, turn)
    cut = np.clip(math.floor(np.linalg.solve(affine, [*middle, 1])[0] + 1e-6) + 1, 0, len(mask))
    most = (0, 0, "n/a", None)
    for side, half in {"left": mask[:cut], "right": mask[cut:]}.items():
        for section in np.flatnonzero(half.any((0, 1))):
            count = ndimage.label(half[:, :, section], np.ones((3, 3)))[1]
            if count > most[0]:
                z = (affine @ [*(np.array(mask.shape[:2]) - 1) / 2, section, 1])[2]
                most = count, int(np.searchsorted(GRADES, count)), side, round(float(z), 2)
    return most


# --------------------------------------------------------------------------------------- Inference


def network_input(image, device, cfg):
    """Return images (B, 1, H, W, D) on `device`, in the memory layout that is right and fast."""
    # Channels-last is faster on CPUs, but gives wrong bfloat16 gradients of depthwise convolutions
    # (torch 2.14.1). On an H100 it is slower, with efficientnet-b7 4 (training) and 11 times.
    wrong = torch.is_grad_enabled() and autocast_dtype(device, cfg) != torch.float32
    layout = torch.contiguous_format if device.type != "cpu" or wrong else torch.channels_last_3d
    # Not `contiguous`, which leaves images of one channel as they are.
    return image.to(device, non_blocking=True, memory_format=layout)


class OpenVINO(nn.Module):
    """A network as OpenVINO runs it on the CPU, in its arithmetic, for inference only."""

    def __init__(self, model, cfg):
        sys.modules.setdefault("openvino_telemetry", None)  # it would tell Intel of the import
        import openvino

        super().__init__()
        self.network, shape = model.eval(), (1, 1, *cfg.IMG_PATCH_SIZE)
        with warnings.catch_warnings():  # of branches that the shape decides
            warnings.simplefilter("ignore")
            converted = openvino.convert_model(model, example_input=torch.zeros(shape), input=shape)
        kind = {torch.bfloat16: "bf16"}.get(autocast_dtype(torch.device("cpu"), cfg), "f32")
        how = {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled = openvino.Core().compile_model(converted, "CPU", how)

    def forward(self, image):
        """Return the logits (B, 1, H, W, D) of windows, one after another."""
        windows = image.contiguous().numpy()
        return torch.from_numpy(np.concatenate([self.compiled(w[None])[0] for w in windows]))


def for_inference(model, cfg):
    """Return the network, on its device, as ENGINE runs it."""
    device = choose_device(cfg)
    compiled = device.type == "cpu" and cfg.ENGINE == "openvino"
    return OpenVINO(model.to(device), cfg) if compiled else model.to(device)


@torch.inference_mode()
def predict_logits(model, image, cfg, overlap, mirrored=()):
    """Return the logits (1, 1, H, W, D) float32 of a volume (1, H, W, D), both on the working grid.

    Windows overlap and are blended with Gaussian weights; a smaller volume is padded. Every other
    one is mirrored along the axes `mirrored`, as on a chessboard, at even distances and with
    flatter weights: at an overlap of 0.5 all but the outer voxels are seen both ways.
    """
    model.eval()
    device = place = next(model.parameters()).device
    dtype = autocast_dtype(device, cfg)
    if device.type == "cuda":  # the volume, sum and weights take 12 bytes a voxel, of some 48
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        large = 48 * image.numel() > torch.cuda.mem_get_info(device)[0] + idle
        place = torch.device("cpu") if large else device

    sides = np.array(cfg.IMG_PATCH_SIZE)
    beyond = np.maximum(np.subtract(image.shape[1:], sides), 0)
    steps = np.ceil(beyond / np.ceil(beyond / ((1 - overlap) * sides)).clip(1)).clip(1)  # even

    def mirror(windows, places):
        numbers = np.ceil([[p[a + 2].start / steps[a] for a in range(3)] for p in places])
        # Each voxel is then seen about equally both ways; rows by one axis' number lost 0.002 Dice.
        axes = ([a + 1 for a in mirrored if own[a:].sum() % 2] for own in numbers)
        return torch.stack([w.flip(own) for w, own in zip(windows, axes, strict=True)])

    def predict_windows(windows, places):
        windows = mirror(windows, places) if mirrored else windows
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(network_input(windows, device, cfg)).float()
        return mirror(logits, places) if mirrored else logits

    few = max(1, 96**3 // math.prod(cfg.IMG_PATCH_SIZE))  # on a CPU more take much memory
    at_once = cfg.SW_BATCH_SIZE if device.type == "cuda" else min(few, cfg.SW_BATCH_SIZE)
    settings = {"roi_size": cfg.IMG_PATCH_SIZE, "sw_batch_size": at_once}
    settings |= {"overlap": overlap, "mode": "gaussian", "with_coord": True}
    if mirrored:  # MONAI rounds a step down
        settings |= {"overlap": (1 - (steps + 0.5) / sides).clip(0).tolist(), "sigma_scale": 0.25}
    settings |= {"predictor": predict_windows, "sw_device": device, "device": place}
    return sliding_window_inference(image[None].float().to(place), **settings)


def predict_prob(model, image, cfg):
    """Return the probability of PVS in a volume (1, H, W, D), the mean over models and views."""
    models = model if isinstance(model, nn.ModuleList) else [model]
    known = FLIPS[cfg.FLIP_AXES] if cfg.TTA_FLIPS != "none" else ()  # to the network
    # An axis of a single window has no other one to mirror: the whole view is.
    several = [axis for axis in known if image.shape[1 + axis] > cfg.IMG_PATCH_SIZE[axis]]
    mirrored = several if cfg.TTA_FLIPS == "windows" else ()
    whole = {*known} - {*mirrored}
    views = [[axis + 1 for axis in axes] for axes in FLIPS.values() if whole.issuperset(axes)]
    total = torch.zeros(())
    for part, axes in itertools.product(models, views):
        logits = predict_logits(part, image.flip(axes), cfg, cfg.SW_OVERLAP, mirrored)[0]
        prob = torch.sigmoid(logits).flip(axes)
        total = prob + total.to(prob.device)
    return total / (len(models) * len(views))


def predict_case(model, entry, cfg):
    """Return the float32 probabilities of PVS on working (H, W, D) and native grid (X, Y, Z)."""
    prob = predict_prob(model, entry["image"], cfg)
    # Not the mask goes to the native grid: what probabilities say between voxels is kept.
    return prob[0].cpu().numpy(), to_native_grid(prob, entry)[0].cpu().numpy()


def decide(prob, affine, cfg):
    """Return the mask of a probability (X, Y, Z): above THRESHOLD, without what is too small."""
    pred = prob > cfg.THRESHOLD
    if cfg.SMALLEST_PVS:
        components, _ = ndimage.label(pred, TOUCHING)
        mm3 = np.bincount(components.ravel()) * abs(np.linalg.det(affine[:3, :3]))
        pred &= (mm3 >= cfg.SMALLEST_PVS * (1 - 1e-4))[components]  # which may be rounded
    return pred


# ------------------------------------------------------------------------------------- Checkpoints

CHECKPOINT_KEYS = ("model", "config", "sha256", "history_row")  # what using a checkpoint takes
LAST_KEYS = ("optimizer", "scaler", "progress", "label_sha256")  # what going on takes


def package_versions(cfg=None):
    """Return what makes the numbers: versions of Python and packages, number format if `cfg`."""
    packages = ("torch", "monai", "segmentation_models_pytorch_3d", "numpy", "scipy", "nibabel")
    own = {"train_pvs": f"{VERSION}, SHA-256 {SCRIPT_HASH}", "python": sys.version.split()[0]}
    own |= {"arithmetic": str(autocast_dtype(choose_device(cfg), cfg))} if cfg else {}
    return own | {name: importlib.metadata.version(name) for name in (*packages, "scikit-learn")}


def read_checkpoint(path, keys=CHECKPOINT_KEYS):
    """Return the content of a checkpoint; a ValueError names a missing, damaged or foreign file."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch compares no checksums
            require(not archive.testzip(), "wrong checksum")
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
        require(all(isinstance(content[key], dict) for key in keys), "other content")
        return content
    except READ_ERRORS as error:
        way = "train first, or name one with --checkpoint"
        way = way if keys == CHECKPOINT_KEYS else "a run has one after its first epoch"
        told = f"{path}: expected a checkpoint of this script ({explain(error)})"
        raise ValueError(f"{told}; {way}") from None


def load_weights(model, content, path):
    """Load a checkpoint's weights; a ValueError names the file where they do not fit or are NaN."""
    try:
        model.load_state_dict(content["model"])
        finite = all(weights.isfinite().all() for weights in model.state_dict().values())
        require(finite, "some are NaN or infinite")
    except READ_ERRORS as error:
        told = f"its weights do not fit the network it names ({explain(error)})"
        raise ValueError(f"{path}: {told}") from None


def list_differences(one, two, compared):
    """Return the names of the settings in which two dicts of them differ, sorted."""
    # dynunet has no ENCODER_NAME.
    unused = {"ENCODER_NAME"} if one["ARCHITECTURE"] == two["ARCHITECTURE"] == "dynunet" else set()
    return sorted(name for name in {*compared} - unused if one[name] != two[name])


def settings_of(saved, problems):
    """Return the settings that a file holds; those that it lacks are as published."""
    settings = asdict(Config(**PUBLISHED))
    settings["VAL_OVERLAP"] = saved.get("SW_OVERLAP", Config.VAL_OVERLAP)
    if isinstance(saved.get("TTA_FLIPS"), bool):
        saved = saved | {"TTA_FLIPS": "full" if saved["TTA_FLIPS"] else "none"}
    return convert_all({n: saved.get(n, settings[n]) for n in settings}, problems)


def restore_config(content, path, cfg, options):
    """Return the Config of a checkpoint, with what this command may say otherwise."""
    saved, problems = content["config"], {}
    for name in saved.keys() - names(Config):
        log.warning("Warning: %s: passed over, no setting any more: %s", path, name)
    saved = settings_of(saved, problems)
    raise_problems([f"{path}: {p}" for p in problems.values()], title="wrong settings:")
    # A trained network is used on this machine and into this folder; a run goes on where it was.
    here, free, asked = names(Output, Machine), names(Data, Output, Decision, Machine), {}
    if options.resume:
        here, asked = {"OUTPUT_DIR"}, options.of_recipe
        free |= names(Length) if options.stretch or saved["LR_SCHEDULE"] == "plateau" else set()
    asked = asked | options.given | {name: getattr(cfg, name) for name in here}
    if not any(asked.get("PIX_DIM", ())):  # 0 0 0: what the run made of it is known
        asked.pop("PIX_DIM", None)
    told = "{0}: {1} has {2}, not {3}; only another training can change it"
    for n in list_differences(saved, saved | asked, asked.keys() - free):
        problems[n] = told.format(n, path, words(saved[n]), words(asked[n]))
        if n in names(Length):
            problems[n] += "; add --stretch if that is meant: the learning rate falls over it"
    restored = replace(cfg, **saved | {name: asked[name] for name in asked.keys() & free})
    check_config(restored, problems, starts=False)
    raise_problems(problems.values(), title="wrong settings:")
    return restored


def read_last(run, cfg, options):
    """Return (content of `last.pth`, the Config of the run that goes on)."""
    content = read_checkpoint(run.last, CHECKPOINT_KEYS + LAST_KEYS)
    cfg = restore_config(content, run.last, cfg, options)
    then, now = content["processes"], process_number("WORLD_SIZE")
    told = f"processes (torchrun --nproc_per_node): the run has {then:d}, now there are {now:d}"
    require(then == now, told)
    then, now = content.get("optimizer_kind", OPTIMIZER.__name__), OPTIMIZER.__name__
    told = f"cannot resume: the run began with {then}, now OPTIMIZER is {now}; set it back, or "
    require(then == now, told + "train anew with --overwrite or another --output-dir")
    return content, cfg


def warn_of_other_versions(content, cfg):
    """Tell which packages, or which number format, are not those that a run began with."""
    now = package_versions(cfg)
    told = "Warning: the run began with %s %s, now it is %s: the numbers may differ"
    for name, then in sorted(content["versions"].items() - now.items()):
        log.warning(told, name, then, now.get(name))


def split_as_before(cases, content):
    """Return the split of the run that goes on; missing scans are named, new ones left out."""
    parts, known = content["sha256"], {case.name for case in cases}
    missing = sorted(set().union(*parts.values()) - known)
    require(not missing, f"cannot resume, scans of the run are missing: {', '.join(missing)}")
    for name in sorted(known.difference(*parts.values())):
        log.info("Left out, not in the run that goes on: %s", name)
    return {part: [case for case in cases if case.name in chosen] for part, chosen in parts.items()}


def check_unchanged(run, split, content):
    """Raise a ValueError that names missing files, scans and masks that were others before."""
    lost = [path for path in (run.best, run.history) if not path.exists()]
    problems = ["cannot resume:", *(f"{path}: missing, a run needs it to go on" for path in lost)]
    for key, kind in (("sha256", "scan"), ("label_sha256", "mask")):
        for part, cases in split.items():
            changed = [c.name for c in cases if getattr(c, key) != content[key][part][c.name]]
            problems += [f"{name}: another {kind} than the run began with" for name in changed]
    require(len(problems) == 1, "\n  ".join(problems))


def load_initial_weights(model, split, cfg):
    """Load the weights of INIT_FROM, if they never saw the scans to validate and test on."""
    content, now = read_checkpoint(cfg.INIT_FROM), asdict(cfg)
    differ = list_differences(settings_of(content["config"], {}), now, names(Network))
    told = f"{cfg.INIT_FROM}: expected a checkpoint of this run's network, it has another"
    require(not differ, f"{told} {', '.join(differ)}")
    load_weights(model, content, cfg.INIT_FROM)
    used = seen_hashes([content], "train", "val")
    new = split["val"] + split["test"]
    told = f"for validation or test, but {cfg.INIT_FROM} was trained or chosen with it"
    remedy = "Choose other subjects with --split, or draw them with another --seed."
    raise_problems([f"{c.image}: {told}" for c in new if c.sha256 in used], remedy)
    warn_of_subjects(new, [content], cfg)


def warn_of_subjects(cases, contents, cfg):
    """Warn of scans to test on whose subject was trained or chosen with, by other scans."""
    alike = [c for c in contents if c.get("trained_on", {}).get("data_set") == data_set_name(cfg)]
    scans = [c["sha256"].get(part, {}) for c in alike for part in ("train", "val")]
    seen = {name.split("_")[0] for name in itertools.chain(*scans)}
    again = " ".join(case.name for case in cases if case.subject in seen)
    if again:
        told = "Warning: no independent test, it seems, since other scans of these subjects were "
        log.warning(told + "trained or chosen with: %s", again)


def seen_hashes(contents, *parts):
    """Return the hashes of the scans that are in these parts of the split of checkpoints."""
    scans = [content["sha256"].get(part, {}) for content in contents for part in parts]
    return set().union(*(part.values() for part in scans))


# ---------------------------------------------------------------------------------------- Training


WARM_UP = 30  # steps in which the poly schedule is ramped up
OPTIMIZER = torch.optim.AdamW


class TrainState:
    """What training changes, from `last.pth` on; all randomness is a function of SEED and epoch."""

    def __init__(self, model, cfg, last=None):
        self.cfg, self.model = cfg, model
        rates = {"lr": cfg.LR, "weight_decay": cfg.WEIGHT_DECAY, "fused": True}
        self.optimizer = OPTIMIZER(model.parameters(), **rates)
        falls = {"factor": cfg.LR_FACTOR, "patience": cfg.LR_PATIENCE, "min_lr": cfg.LR_MIN}
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, **falls)
        device = next(model.parameters()).device
        fp16 = torch.float16 in gather([autocast_dtype(device, cfg)])  # one scale for all
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.parts = {"model": model, "optimizer": self.optimizer, "plateau": self.plateau}
        self.parts["scaler"], self.copies = self.scaler, None  # of them, see `save_epoch`
        last = last or {"progress": {"best_dice": -1.0, "waited": 0, "history": []}}
        self.progress = {"steps": 0} | last["progress"]
        for name, part in self.parts.items():
            if last.get(name):  # not at the start; a scaler that is in use now only has none
                part.load_state_dict(last[name])

    def set_rate(self, share):
        """Set the learning rate of a step under poly; `share`: which part of the epoch is done."""
        history, cfg = self.progress["history"], self.cfg
        if cfg.LR_SCHEDULE == "plateau":
            return
        # A clock would tell processes apart, and a run that goes on; the history does not.
        begin, end = (planned_progress(history, cfg, more) for more in (0, 1))
        rate = cfg.LR * (1 - begin - share * (end - begin)) ** 0.9
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1, (1 + self.progress["steps"]) / WARM_UP)

    def step(self):
        """Make a step with the gradients, clipped, and clear them; return their norm."""
        self.progress["steps"] += 1
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.GRAD_CLIP))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # What float16's scaler passes over as too large is no error, unless that is too often.
        passed_over = self.scaler.is_enabled() and self.scaler.get_scale() > 1e-4
        return 0.0 if passed_over and not math.isfinite(norm) else norm

    def judge(self, row, in_turn):
        """Return whether an epoch is the best so far; one validated in its turn also counts."""
        progress, dice = self.progress, row["val_dice"]
        improved = dice is not None and dice > progress["best_dice"]
        if in_turn:
            if self.cfg.LR_SCHEDULE == "plateau":
                self.plateau.step(row["val_loss"])
            progress["waited"] = 0 if improved else progress["waited"] + 1
            progress["best_dice"] = max(dice, progress["best_dice"])
        return improved


def check_finite(value, what, epoch, cases):
    """Raise a FloatingPointError, which names the cases, where a number is not finite."""
    told = f"the {what} became {value} in epoch {epoch} with {', '.join(dict.fromkeys(cases))}. "
    told += "Nothing was saved from this epoch. Look at these scans, or start anew (--overwrite) "
    require(math.isfinite(value), told + "with a lower --lr or --no-amp.", FloatingPointError)


def train_one_epoch(model, state, loader, epoch):
    """Train once on patches of all cases; return (mean loss, Dice of all patches as one volume)."""
    model.train()  # the state's, or what shares its gradients
    cfg, device = state.cfg, next(model.parameters()).device
    dtype, loader.batch_sampler.epoch = autocast_dtype(device, cfg), epoch
    losses, seen, counts = [], [], np.zeros(2, dtype=np.int64)  # voxels: hits, found + true
    others = [] if model is state.model else ["or scans of another process"]  # gradients are shared
    seeds = [cfg.SEED, epoch, process_number("RANK")]
    torch.manual_seed(np.random.SeedSequence(seeds).generate_state(1)[0].item())
    progress = Progress(loader, f"epoch {epoch}, training")
    for step, batch in enumerate(progress):
        state.set_rate(step / len(loader))
        label = batch["label"].to(device, non_blocking=True)
        place = step % cfg.ACCUMULATE_STEPS
        group = min(cfg.ACCUMULATE_STEPS, len(loader) - step + place)  # batches of this step
        seen = batch["name"] + (seen if place else others)
        with nullcontext() if place + 1 == group or model is state.model else model.no_sync():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                outputs = model(network_input(batch["image"], device, cfg))
            outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
            loss = supervise(outputs, label)
            state.scaler.scale(loss / group).backward()
        losses.append(float(loss.detach()))
        progress.set_postfix(loss=f"{np.mean(losses):.4f}", refresh=False)
        check_finite(losses[-1], "loss", epoch, batch["name"])
        if place + 1 == group:
            check_finite(state.step(), "gradient", epoch, seen)
        pred, true = outputs[0].detach() > 0, label > 0.5
        counts += torch.stack([(pred & true).sum(), pred.sum() + true.sum()]).tolist()
    hits, both = sum(gather([counts])).tolist()
    return float(np.mean(gather(losses))), 2 * hits / max(both, 1)


def validate(model, cases, cfg, epoch):
    """Return (mean loss, mean Dice) of the blended logits of whole volumes, working grid."""
    losses, dices = [], []
    for case in Progress(share(cases), f"epoch {epoch}, validation"):
        entry = load_cached(case)
        logits = predict_logits(model, entry["image"], cfg, cfg.VAL_OVERLAP)
        label = entry["label"][None].to(logits.device)
        losses.append(float(loss_function(logits, label.float())))
        check_finite(losses[-1], "validation loss", epoch, [case.name])
        dice = calculate_metrics(logits > 0, label)["dice"]
        lost = case.native_voxels and not case.working_voxels  # see EMPTY_MASKS
        dices.append(0.0 if lost else dice)
    return float(np.mean(gather(losses))), float(np.mean(gather(dices)))


def fit(run, model, cfg, split, last=None):
    """Train for EPOCHS or MAX_MINUTES, or until EARLY_STOPPING validations bring no better Dice.

    `last`: the content of last.pth. A thread writes checkpoints while the next epoch trains. The
    validation of a last epoch out of its turn may choose the weights, but changes nothing else: a
    run that goes on to more epochs takes it back and is the one that had them from the start.
    """
    device, parallel = next(model.parameters()).device, model
    loader, state = build_train_loader(split["train"], cfg, device), TrainState(model, cfg, last)
    if process_number("WORLD_SIZE") > 1:  # the backward pass averages the processes' gradients
        own = [device.index] if device.type == "cuda" else None
        # Some layers of the encoder have no part in the output and get no gradient.
        unused = {"find_unused_parameters": cfg.ARCHITECTURE != "dynunet"}
        parallel = nn.parallel.DistributedDataParallel(model, own, **unused)
    progress, former_best, writing = state.progress, last and last["former_best"], None
    history, ended = progress["history"], is_over(progress, cfg)
    if former_best and first_process():  # its validation was out of turn
        write_torch(run.best, {key: last[key] for key in former_best} if ended else former_best)
    board = nullcontext() if ended else open_tensorboard(run, history)
    with board as board, ThreadPoolExecutor(1) as writer:  # an error leaves when all is written
        if not ended:
            log.info("epoch  train loss   Dice    val loss   Dice         LR  seconds  time left")
        while not ended:
            in_turn = not history or (len(history) + 1) % cfg.VAL_EVERY == 0
            row = train_and_validate(parallel, state, loader, split["val"], in_turn)
            history.append(row)
            if board:
                write_scalars(board, row)
            improved = state.judge(row, in_turn)
            if writing:
                writing.result()  # raises its errors
            if first_process():
                writing = writer.submit(save_epoch(run, state, split, improved, in_turn))
            log_epoch(history, improved, split, cfg)
            ended = is_over(progress, cfg)
            if row["epoch"] == 50 and progress["best_dice"] == 0 and not improved:
                log.warning("Warning: validation Dice is still 0; going on. %s", advice(cfg))
        if writing:
            writing.result()


def planned_progress(history, cfg, more=0):
    """Return the fraction of EPOCHS or MAX_MINUTES done after these epochs and `more` others."""
    seconds = float(np.mean([row["seconds"] for row in history] or [0]))
    share = max(1 / cfg.EPOCHS, seconds / (60 * cfg.MAX_MINUTES or math.inf))  # of an epoch
    done = share * (len(history) + more)
    return done if done + share / 2 < 1 else 1.0  # by the clock the nearest epoch is the last


def is_over(progress, cfg):
    """Return whether EPOCHS, EARLY_STOPPING or MAX_MINUTES ends it; print which of the last two."""
    waited, late = progress["waited"], planned_progress(progress["history"], cfg) == 1
    # With 0.1 % foreground the Dice can stay at 0 for long.
    early = waited >= cfg.EARLY_STOPPING and progress["best_dice"] > 0
    if early:
        log.info("Stopped early: no better validation Dice in %d validations", waited)
    elif late and len(progress["history"]) < cfg.EPOCHS:
        log.info("Stopped after %g minutes of training", cfg.MAX_MINUTES)
    return early or late


def open_tensorboard(run, history):
    """Return a context that gives a writer of TensorBoard's files, or None if it is not installed.

    What was written of later epochs, and a last validation that was taken back, is left out.
    """
    if not first_process() or not importlib.util.find_spec("tensorboard"):
        log.info("TensorBoard     off; to watch the training: pip install tensorboard")
        return nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    log.info("TensorBoard     tensorboard --logdir %s", run.board)
    # A signal within `put` may cost the thread that writes its next wake-up: it sleeps flush_secs.
    board = SummaryWriter(run.board, purge_step=len(history), flush_secs=1)
    for row in history[-1:]:
        write_scalars(board, row)
    return board


def write_scalars(board, row):
    """Write a row of the history for TensorBoard: loss/train, loss/val, dice/train, .., lr."""
    for key, value in row.items():
        if value is not None and key != "epoch":
            board.add_scalar("/".join(reversed(key.split("_"))), value, row["epoch"])
    board.flush()


def train_and_validate(parallel, state, loader, val_cases, in_turn):
    """Train an epoch and, `in_turn` or as the last, validate; return its row of the history."""
    cfg, history, start = state.cfg, state.progress["history"], time.perf_counter()
    state.set_rate(0)
    epoch, lr = len(history) + 1, state.optimizer.param_groups[0]["lr"]
    row = {"epoch": epoch, "val_loss": None, "val_dice": None, "lr": lr, "val_seconds": 0.0}
    row["train_loss"], row["train_dice"] = train_one_epoch(parallel, state, loader, epoch)
    if parallel is not state.model:  # BatchNorm's statistics on CPUs are the first process's
        for buffer in state.model.buffers():
            dist.broadcast(buffer, 0)
    row["seconds"] = round(gather([time.perf_counter() - start])[0], 2)  # the first process's
    if in_turn or planned_progress([*history, row], cfg) == 1:
        row["val_loss"], row["val_dice"] = validate(state.model, val_cases, cfg, epoch)
        trained, whole = row["seconds"], round(gather([time.perf_counter() - start])[0], 2)
        row |= {"seconds": whole, "val_seconds": round(whole - trained, 2)}
    return row


def copy_of(part, old=None, copies=None):
    """Return a copy of what `state_dict` gives, in the computer's memory, or in an old copy's."""
    copies = {} if copies is None else copies
    if isinstance(part, torch.Tensor):  # new memory for a gigabyte takes half a second
        fits = isinstance(old, torch.Tensor) and (old.shape, old.dtype) == (part.shape, part.dtype)
        place = part.data_ptr(), part.shape, part.stride(), part.dtype
        if place not in copies:  # DynUNet's layers have two names each
            new = old if fits else torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
            copies[place] = new.copy_(part.detach())
        return copies[place]
    if isinstance(part, dict):
        return {key: copy_of(val, (old or {}).get(key), copies) for key, val in part.items()}
    return [copy_of(value) for value in part] if isinstance(part, list) else part


def save_epoch(run, state, split, improved, in_turn):
    """Return the work, for a thread, of writing checkpoints and history as they are now."""
    cfg, progress = state.cfg, copy_of(state.progress)
    parts = {name: part.state_dict() for name, part in state.parts.items()}
    parts = state.copies = copy_of(parts, state.copies)
    history, grid = progress["history"], {"orientation": "RAS", "spacing_mm": cfg.PIX_DIM}
    content = {"config": asdict(cfg), "working_grid": grid, "versions": package_versions(cfg)}
    content |= {"history_row": history[-1], "processes": process_number("WORLD_SIZE")}
    content["optimizer_kind"] = OPTIMIZER.__name__
    stripped = bool(np.median([case.stripped for case in split["train"]]) > 0.5)
    own = {"data_set": data_set_name(cfg), "spacing": own_spacing(split["train"])}
    content["trained_on"] = own | {"stripped": stripped}  # what scans to predict are compared with
    for key in ("sha256", "label_sha256"):  # of the voxels, by which scans are known again
        content[key] = {part: {c.name: getattr(c, key) for c in split[part]} for part in split}
    if not in_turn:  # for a run that goes on
        progress["history"] = [*history[:-1], history[-1] | {"val_loss": None, "val_dice": None}]

    def write():
        best, late = content | {"model": parts["model"]}, improved and not in_turn
        last = content | parts | {"progress": progress, "former_best": None}
        if late:
            last["former_best"] = read_checkpoint(run.best)
        elif improved:
            write_torch(run.best, best)
        write_json(run.history, history)
        # A run that is killed before this goes through the epoch again, and writes it all again.
        write_torch(run.last, last)
        if late:  # the former best lies in last.pth now
            write_torch(run.best, best)

    return write


def seconds_of_test(history, split, cfg):
    """Return how long the windows of the test will take, reckoned from the last validation's."""
    views = 2 ** len(FLIPS[cfg.FLIP_AXES]) if cfg.TTA_FLIPS == "full" else 1
    windows = views * ((1 - cfg.VAL_OVERLAP) / (1 - cfg.SW_OVERLAP)) ** 3
    validated = (row for row in reversed(history) if row["val_loss"] is not None)
    last = next(validated).get("val_seconds", 0)  # earlier versions did not write it
    return last * windows * len(split["test"]) / len(split["val"])


def log_epoch(history, improved, split, cfg):
    """Print the last epoch's row, `*` for the best validation Dice, the time left with the test."""
    row = history[-1]
    loss, dice = ("-" if row[k] is None else f"{row[k]:.4f}" for k in ("val_loss", "val_dice"))
    seconds = [r["seconds"] for r in history]
    left = (cfg.EPOCHS - row["epoch"]) * np.mean(seconds[-20:])
    left = min(left, (60 * cfg.MAX_MINUTES or math.inf) - sum(seconds))
    left = max(left, 0) + seconds_of_test(history, split, cfg)
    cells = [row["epoch"], row["train_loss"], row["train_dice"], loss, dice, " *"[improved]]
    cells += [row["lr"], row["seconds"], timedelta(seconds=round(left))]
    log.info("%5d %11.4f %6.4f %11s %6s%s %9.1e %8.1f %10s", *cells)


def advice(cfg):
    """Return what to try where nothing is learned."""
    tries = "" if cfg.HEAD_BIAS_LOG_ODDS or cfg.INIT_FROM else "--head-bias-log-odds, "
    if cfg.ARCHITECTURE == "unetplusplus" and cfg.BATCHNORM_MOMENTUM < 0.1:
        tries += "--batchnorm-momentum 0.1, "
    return f"See whether the masks fit the scans, then try {tries}a lower --lr, more --epochs."


# -------------------------------------------------------------------------------------- Evaluation


def describe_grid(cfg):
    """Return the working grid in the words that every table, file and figure shows."""
    near = f", or within {cfg.SPACING_TOLERANCE:.0%} of it" if cfg.SPACING_TOLERANCE else ""
    return f"working grid, RAS, {spacing_words(cfg.PIX_DIM)}{near}"


def data_set_name(cfg):
    """Return the name that the data set gives itself; simulated data is called so by it."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        name = read_json(Path(cfg.DATA_DIR) / "dataset_description.json")["Name"]
        return " ".join(str(name).split())[:200]
    return Path(cfg.DATA_DIR).resolve().name


def score_case(case, entry, working_pred, prob, pred, label):
    """Return a case's scores as one flat row; what is summarised of them stands in SCORES.

    `working_pred` (H, W, D) on the working grid; `prob`, `pred` and `label` (X, Y, Z) on the native
    grid, the label as its file has it; bool but for the probability.
    """
    affine, working_label = entry["native_affine"].numpy(), entry["label"][0].numpy() > 0
    row = {"participant_id": case.subject, "name": case.name}
    row |= calculate_metrics(working_pred, working_label)
    if label.any() and not working_label.any():
        row |= dict.fromkeys(METRICS, 0.0)
    row["working_label_voxels"] = int(working_label.sum())
    row["working_pred_voxels"] = int(working_pred.sum())
    row |= {f"native_{name}": score for name, score in calculate_metrics(pred, label).items()}
    precision = calculate_average_precision(prob, label)
    row["average_precision"] = float(not pred.any()) if precision is None else precision
    row["cldice"] = calculate_cldice(pred, label)
    row |= {"roundtrip_dice": case.roundtrip_dice} | calculate_lesion_metrics(pred, label)
    for side, mask in {"label": label, "pred": pred}.items():
        rating = rate_busiest_section(mask, affine, middle_of_head(entry))
        row |= {f"{name}_{side}": value for name, value in zip(RATING, rating, strict=True)}
    row |= {"volume_ml_label": volume_ml(label, affine), "volume_ml_pred": volume_ml(pred, affine)}
    for burden in ("count", "volume_ml"):
        true, error = row[f"{burden}_label"], row[f"{burden}_pred"] - row[f"{burden}_label"]
        row[f"{burden}_error"] = error
        row[f"{burden}_error_percent"] = 100 * error / true if true else None
    row |= calculate_boundary_metrics(pred, label, nib.affines.voxel_sizes(affine))
    for key, value in row.items():  # a score of your own may be numpy's or torch's, or NaN
        value = value.item() if hasattr(value, "item") else value
        row[key] = value if value == value else None
    return row


FOUND = [*itertools.product(LESION_RULES, ("sensitivity", "precision", "f1"))]
BURDEN = [*itertools.product(("count", "volume_ml"), ("label", "pred", "error", "error_percent"))]
# A score of `score_case`, where its summary lies in the JSON, its title in the printed table ("":
# not printed). A line more here is summarised, written and printed, of a run and over folds.
SCORES = (
    *((name, f"working {name}", title) for name, title in METRICS.items()),
    ("native_dice", "native dice", "native Dice"),
    *((f"native_{name}", f"native {name}", "") for name in ("iou", "precision", "recall")),
    ("average_precision", "native average_precision", ""),
    ("cldice", "native cldice", ""),
    ("roundtrip_dice", "roundtrip dice", "round trip"),
    *((f"lesion_{name}_{rule}", f"lesions {rule} {name}", "") for rule, name in FOUND),
    *((f"{name}_{kind}", f"burden {name} {kind}", "") for name, kind in BURDEN),
    ("nsd_voxel", "boundary nsd_voxel", ""),
    ("nsd_1mm", "boundary nsd_1mm", "NSD 1 mm"),
    ("hd95_mm", "boundary hd95_mm", "HD95, mm"),
)
require(len({place for _, place, _ in SCORES}) == len(SCORES), "SCORES: give each its own place")


def look_up(blocks, place):
    """Return the dict at a place of SCORES in nested dicts, which are made where missing."""
    for name in place.split():
        blocks = blocks.setdefault(name, {})
    return blocks


def summarise_all(rows, cfg):
    """Return the blocks of summaries over the rows of all test cases, nested as SCORES says."""
    blocks = {place.split()[0]: {"grid": "native grid of each scan"} for _, place, _ in SCORES}
    blocks["working"]["grid"] = describe_grid(cfg)
    for key, place, _ in SCORES:
        look_up(blocks, place).update(summarise(rows, key, cfg.SEED))
    for name in ("count", "volume_ml"):
        sides = ([row[f"{name}_{side}"] for row in rows] for side in ("label", "pred"))
        blocks["burden"][name] |= agreement(*sides)
    grades, kappa = [[row[f"grade_{side}"] for row in rows] for side in ("label", "pred")], None
    if len({*itertools.chain(*grades)}) > 1 and len(rows) >= 3:
        every = range(len(GRADES) + 1)  # also those between that no scan has
        kappa = float(cohen_kappa_score(*grades, labels=every, weights="quadratic"))
    blocks["rating"] = {"grid": "axial sections of each scan", "n": len(rows)}
    blocks["rating"]["weighted_kappa"] = kappa
    blocks["boundary"]["one_mask_empty"] = sum(row["one_mask_empty"] for row in rows)
    lesions = blocks["lesions"]
    lesions["connectivity"] = 26
    for side, rule in itertools.product(("label", "pred"), LESION_RULES):
        lesions[f"count_{side}"] = sum(row[f"count_{side}"] for row in rows)
        lesions[rule][f"matched_{side}"] = sum(row[f"matched_{side}_{rule}"] for row in rows)
        lesions[rule]["matched_where"] = LESION_RULES[rule]
    return blocks


def summarise(rows, key, seed):
    """Return the distribution of a score over cases, without those where it is None.

    {"mean", "sd" (ddof 0, as published), "median", "q1", "q3", "ci95": [low, high], "n",
    "undefined": how many None}. The interval is the bootstrap's for the mean, 95 %, seeded, from
    subjects that are resampled with all their scans; None below two subjects.
    """
    scans_of, interval, numbers = {}, None, [None] * 5
    for row in (row for row in rows if row[key] is not None):
        scans_of.setdefault(row["participant_id"], []).append(row[key])
    known = [*itertools.chain(*scans_of.values())]
    if len(scans_of) > 1:
        pair = [np.array([*map(f, scans_of.values())], dtype=float) for f in (sum, len)]
        settings = {"n_resamples": 10_000, "paired": True, "rng": np.random.default_rng(seed)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of subjects whose means are all equal
            drawn = stats.bootstrap(pair, lambda s, n, axis: s.sum(axis) / n.sum(axis), **settings)
        interval = list(map(float, drawn.confidence_interval))
        if not np.isfinite(interval).all():
            interval = np.percentile(drawn.bootstrap_distribution, (2.5, 97.5)).tolist()
    if known:
        numbers = map(float, (np.mean(known), np.std(known), *np.percentile(known, (50, 25, 75))))
    summary = dict(zip(("mean", "sd", "median", "q1", "q3"), numbers, strict=True))
    return summary | {"ci95": interval, "n": len(known), "undefined": len(rows) - len(known)}


def agreement(label, pred):
    """Return how two measurements of the same cases agree; all None below 3 cases.

    Pearson's r (None where one side is constant) and Lin's concordance (Lin 1989, 10.2307/2532051);
    the Bland-Altman bias (prediction minus ground truth) and its limits of agreement, 1.96 SD (ddof
    1) around it (Bland and Altman 1986, 10.1016/S0140-6736(86)90837-8).
    """
    result = dict.fromkeys(("pearson_r", "lin_ccc", "bias", "limits_of_agreement"))
    if len(label) < 3:
        return result
    label, pred = np.array([label, pred], dtype=float)
    bias, reach = float((pred - label).mean()), float(1.96 * (pred - label).std(ddof=1))
    result |= {"bias": bias, "limits_of_agreement": [bias - reach, bias + reach]}
    if np.ptp(label) and np.ptp(pred):
        result["pearson_r"] = float(stats.pearsonr(label, pred).statistic)
    spread = label.var() + pred.var() + (label.mean() - pred.mean()) ** 2
    if spread > 1e-12 * ((label**2).mean() + (pred**2).mean()):  # rounding alone gives some
        covariance = ((label - label.mean()) * (pred - pred.mean())).mean()
        result["lin_ccc"] = float(2 * covariance / spread)
    return result


def write_test_metrics(paths, rows, origin, cfg):
    """Write test rows as CSV, and with summaries and `origin` as JSON; return the summaries."""
    blocks = summarise_all(rows, cfg)
    content = {"data_set": data_set_name(cfg), "grid": describe_grid(cfg), "n": len(rows)}
    for name in METRICS:  # as published
        summary = blocks["working"][name]
        content |= {f"{name}_mean": summary["mean"], f"{name}_std": summary["sd"]}
    content |= {"empty_masks": EMPTY_MASKS, **blocks, "subjects": rows} | origin
    write_json(paths[0], content)
    write_csv(paths[1], join_participants(rows, len(rows) * [cfg.DATA_DIR]))
    return blocks


def pool_folds(run, cfg):
    """Write and print the test metrics over the subjects of all finished folds, beside them."""
    top, rows, now, own = run.folder.parent, [], asdict(cfg), read_json(run.scores)["subjects"][0]
    made = set()
    alike = names(Split, Grid, Network, Training, Decision) - {"FOLD", "INIT_FROM"}
    for fold in range(1, cfg.FOLDS + 1):
        one, known = Run(top / f"fold-{fold}"), {row["name"] for row in rows}
        scores = one.scores
        if one.stale.exists() or not scores.exists():
            continue
        content = read_json(scores)
        again = known & {row["name"] for row in content["subjects"]}
        differ = list_differences(settings_of(content["config"], {}), now, alike)
        differ += content["subjects"][0].keys() ^ own.keys()
        differ += ["INIT_FROM"] * (bool(content["config"].get("INIT_FROM")) != bool(cfg.INIT_FROM))
        if again or differ or content["data_set"] != data_set_name(cfg):
            log.warning("Warning: left out, of other settings, data or scores: %s", scores)
        else:
            rows += [{"fold": fold} | row for row in content["subjects"]]
            made.add(content.get("versions", {}).get("train_pvs"))
    if len(made) > 1:
        log.warning("Warning: these folds were made by %d versions of the script", len(made))
    finished = sorted({row["fold"] for row in rows})
    paths = [top / f"cross_validation.{kind}" for kind in ("json", "csv")]
    origin = {"folds": cfg.FOLDS, "finished": finished, "config": now}
    origin |= {"versions": package_versions()}
    blocks = write_test_metrics(paths, rows, origin, cfg)
    log_scores(f"Cross-validation, {len(finished)} of {cfg.FOLDS} folds finished", [], blocks, cfg)


def log_scores(title, rows, blocks, cfg):
    """Print a row a case, mean, SD and the mean's interval of the scores; below them the burden."""
    log.info("\n%s", title)
    log.info("Dice to recall: %s; the others: native grid of each scan", describe_grid(cfg))
    columns = [(key, look_up(blocks, place), head) for key, place, head in SCORES if head]
    table = {row["name"]: [row[key] for key, *_ in columns] for row in rows}
    known = [(s["mean"], s["sd"], *(s["ci95"] or (None, None))) for _, s, _ in columns]
    lines = ("mean", "SD", "95 % from", "95 % to")
    table |= zip(lines, zip(*known, strict=True), strict=True)
    width = max(map(len, table))
    heads = [f"  {head:>7}" for *_, head in columns]
    log.info(" " * width + "".join(heads))
    for name, values in table.items():
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        log.info(f"{name:{width}}" + "".join(map(str.rjust, cells, map(len, heads))))
    lesions, volume = blocks["lesions"], blocks["burden"]["volume_ml"]
    f1 = [f"{lesions[rule]['f1']['mean']:.4f} ({LESION_RULES[rule]})" for rule in LESION_RULES]
    told = "PVS: %d in the ground truth, %d predicted; mean F1 %s"
    log.info(told, lesions["count_label"], lesions["count_pred"], ", ".join(f1))
    means = (volume["label"]["mean"], volume["pred"]["mean"])
    log.info("Mean volume: %.3f ml in the ground truth, %.3f ml predicted", *means)
    log.info("Scans where one mask is empty: %d", blocks["boundary"]["one_mask_empty"])


def write_nifti(path, volume, scan_path):
    """Write an array (X, Y, Z) on the grid of a scan file: its affine, shape, q and sform codes."""
    scan, _ = read_header(scan_path)
    header = type(scan.header)()  # an empty one: the scan's display range would hide a mask
    geometry = re.compile("pixdim|xyzt_units|.form_code|quatern|qoffset|srow")
    for name in filter(geometry.match, scan.header):
        header[name] = scan.header[name]
    header.set_data_dtype(volume.dtype)
    shape = scan.shape if math.prod(scan.shape) else volume.shape
    nifti = type(scan)(volume.reshape(shape), None, header)
    write_file(path, gzip.compress(nifti.to_bytes(), 4, mtime=0))


def write_prediction(run, case, affine, pvs, prob, cfg):
    """Write a mask, its numbered PVS and their table as a BIDS derivative; return the mask's path.

    `pvs`: {"prediction": by `number_components`, if known "ground truth": likewise}, native grid.
    """
    numbered, true = pvs["prediction"], pvs.get("ground truth")
    sessions, network = re.findall(r"_(ses-[^_]+)", case.name), NETWORKS[cfg.ARCHITECTURE][1]
    start = Path(run.predictions, case.subject, *sessions[:1], "anat", case.name)
    label = f"{start}_label-PVS_desc-{network}"
    Path(f"{label}_probseg.nii.gz").unlink(missing_ok=True)  # of other weights
    if cfg.SAVE_PROBABILITIES:
        write_nifti(f"{label}_probseg.nii.gz", prob, case.image)
    write_nifti(f"{label}_mask.nii.gz", (numbered > 0).astype(np.uint8), case.image)
    tables = {network: (numbered, prob, true)}
    tables |= {"manual": (true, None, numbered)} if true is not None else {}
    for desc, (own, probs, other) in tables.items():
        numbers = f"{start}_seg-PVS_desc-{desc}_dseg"
        write_nifti(f"{numbers}.nii.gz", own, case.image)
        rows = measure_components(own, affine, probs, other)
        write_tsv(f"{numbers}.tsv", PVS_COLUMNS, rows)
    return f"{label}_mask.nii.gz"


def describe_prediction(contents, cfg):
    """Return in words what makes a mask of a scan, the weights by a hash."""
    digests = []
    for _, content in contents:
        parts = [part.contiguous().flatten() for part in content["model"].values()]
        weights = torch.cat([part.view(torch.uint8) for part in parts])
        digests.append(hashlib.sha256(weights.numpy()).hexdigest()[:16])
    made = f"{describe_network(cfg)}, weights {' '.join(sorted(digests))}, {describe_grid(cfg)}, "
    made += f"TTA_FLIPS {cfg.TTA_FLIPS}, AMP {cfg.AMP}, ENGINE {cfg.ENGINE}; mask where above "
    return made + f"{cfg.THRESHOLD:g}, without components below {cfg.SMALLEST_PVS:g} mm3"


def folder_with(name, path):
    """Return the nearest folder above a path with a file of this name, else the path's own."""
    above = Path(path).parents
    return next((folder for folder in above if (folder / name).exists()), above[0])


def write_description(run, scans, made):
    """Write `predictions/dataset_description.json`, which names the data sets of the scans."""
    folders = {folder_with(run.description.name, Path(scan).resolve()) for scan in scans}
    content = {"Name": "Perivascular spaces (PVS), predicted", "BIDSVersion": "1.10.0"}
    content |= {"GeneratedBy": [{"Name": "train_pvs.py", "Description": made}]}
    content["SourceDatasets"] = [{"URL": uri} for uri in sorted(f.as_uri() for f in folders)]
    content["DatasetType"] = "derivative"
    write_json(run.description, content)
    own = [*PVS_COLUMNS.items()][2:]  # BIDS describes index and name itself
    columns = {name: {"Description": text} for name, text in own}
    write_json(run.predictions / "seg-PVS_dseg.json", columns)


# ----------------------------------------------------------------------------------------- Figures

# The axis that a plane cuts; what lies at its picture's left, right, bottom and top.
PLANES = {"axial": (2, "RLPA"), "coronal": (1, "RLIS"), "sagittal": (0, "APIS")}
EDGES = (("left", 0.02, 0.5), ("right", 0.98, 0.5), ("bottom", 0.5, 0.02), ("top", 0.5, 0.98))
# The colour-blind tell these colours apart, in grey they differ in brightness (Okabe, Ito 2008).
OUTLINES = {"ground truth": "#D55E00", "prediction": "#F0E442"}
KINDS = {"found": "#56B4E9", "missed": "#D55E00", "invented": "#F0E442"}
MAGNIFIED = 40  # mm, the side of the magnified part
DARK = {"layout": "constrained", "facecolor": "black"}
MARK = {"color": "white", "path_effects": [withStroke(linewidth=2, foreground="black")]}
# Not the user's own style, such as text.usetex, which stays as it is; a name may hold a $.
PLAIN = matplotlib.style.context(["default", {"text.parse_math": False}])


@dataclass
class Section:
    """A section through a scan, cropped to the head; rows go up, columns to the right."""

    title: str
    sides: str  # as in PLANES
    spacing: np.ndarray  # mm, across and up
    image: np.ndarray  # (rows, columns), in [0, 1]
    pvs: dict  # {name in OUTLINES: numbered PVS (rows, columns)}
    kind: np.ndarray  # (rows, columns): 1, 2, 3 where a PVS is of the first, .. of KINDS

    def size(self):
        """Return its width and height in mm."""
        return self.image.shape[::-1] * self.spacing


def sort_pvs(true, found):
    """Return which voxels (X, Y, Z) are of PVS found (1), missed (2) or invented (3), uint8.

    `true`, `found`: PVS of ground truth and prediction by `number_components`. Those that share a
    voxel are found, as by the rule "any overlap".
    """
    both, touched = (true > 0) & (found > 0), np.zeros(true.shape, bool)
    for components in (true, found):
        touched |= np.isin(components, components[both])
    return np.select([touched, true > 0, found > 0], [1, 2, 3], 0).astype(np.uint8)


def cut_sections(image, affine, pvs, entry):
    """Cut a scan (X, Y, Z) and its numbered PVS in three planes; return a list of Sections.

    A section has the most voxels of the ground truth, else of the prediction. Where there are none,
    the axial one lies 55 mm below the head's top, in the centrum semiovale, the sagittal one 25 mm
    beside the middle. `entry`: the scan on the working grid, whose box holds the head.
    """
    low, high = np.percentile(image[::3, ::3, ::3], (1, 99.8))
    kind = sort_pvs(*pvs.values()) if len(pvs) == 2 else (pvs["prediction"] > 0).astype(np.uint8)
    volumes = {"image": np.clip((image - low) / max(high - low, 1e-6), 0, 1), "kind": kind} | pvs
    turn, spacing, whole = nib.io_orientation(affine), ras_spacing(affine), np.array(image.shape)
    whole = whole[np.argsort(turn[:, 0])]
    affine = affine @ nib.orientations.inv_ornt_aff(turn, image.shape)
    ends = [*itertools.product(*((0, n - 1) for n in entry["image"].shape[1:]))]
    ends = nib.affines.apply_affine(np.linalg.inv(affine) @ entry["affine"].numpy(), ends)
    first = np.floor(ends.min(0)).clip(0, whole - 1).astype(int)
    box = tuple(map(slice, first, np.ceil(ends.max(0)).astype(int) + 1))
    volumes = {name: nib.apply_orientation(v, turn)[box] for name, v in volumes.items()}
    shape, sections = np.array(volumes["image"].shape), []
    usual = [shape[0] / 2 + 25 / spacing[0], shape[1] / 2, shape[2] - 55 / spacing[2]]
    for plane, (axis, sides) in PLANES.items():
        across = tuple(other for other in range(3) if other != axis)
        counts = [np.count_nonzero(volumes[name], across) for name in pvs]
        most = [count.argmax() for count in counts if count.any()]
        index = most[0] if most else int(np.clip(usual[axis], 0, shape[axis] - 1))
        place = first + shape // 2
        place[axis] = first[axis] + index
        mm = nib.affines.apply_affine(affine, place)[axis]
        title = f"{plane} {place[axis] + 1} of {whole[axis]}, {'xyz'[axis]} = {round(mm)} mm"
        cut = {n: np.flip(np.take(v, index, axis), 0).T.copy() for n, v in volumes.items()}
        shown = cut.pop("image"), {name: cut[name] for name in pvs}, cut["kind"]
        sections.append(Section(title, sides, np.delete(spacing, axis), *shown))
    return sections


def find_busiest(section):
    """Return the window (left, right, bottom, top), mm, with the most voxels of PVS."""
    sides = np.minimum(np.ceil(MAGNIFIED / section.spacing).astype(int), section.kind.shape[::-1])
    near = ndimage.uniform_filter((section.kind > 0).astype(float), sides[::-1], mode="constant")
    near += 1e-3 * ndimage.uniform_filter(near, sides[::-1], mode="constant")  # of ties the middle
    most = np.unravel_index(near.argmax(), near.shape) if near.any() else np.divide(near.shape, 2)
    low = (most[::-1] - sides // 2).clip(0, near.shape[::-1] - sides) * section.spacing
    return low[0], low[0] + MAGNIFIED, low[1], low[1] + MAGNIFIED


def find_edges(mask):
    """Return the edges of the voxels of a 2D mask, (E, 2 ends, 2), in columns and rows."""
    padded, edges = np.pad(mask, 1).astype(np.int8), []
    for axis, inner in enumerate((padded[:, 1:-1], padded[1:-1])):
        rows, columns = np.nonzero(np.diff(inner, axis=axis))
        edges.append(np.stack([columns, rows, columns + 1 - axis, rows + axis], 1))
    return np.concatenate(edges).reshape(-1, 2, 2)


def paint(section):
    """Return a section's picture (rows, columns, RGB) with its PVS in the colours of KINDS."""
    picture = np.repeat(section.image[..., None], 3, 2)
    for number, colour in enumerate(KINDS.values(), 1):
        picture[section.kind == number] = to_rgb(colour)
    return picture


def draw_panel(ax, section, picture, title, widths=None, window=None):
    """Draw a section's picture in mm, all or a window of it, with its sides and a scale bar.

    `widths`: in points, of the outlines of ground truth and prediction; None: there are none.
    """
    extent = (0, section.size()[0], 0, section.size()[1])
    options = {"origin": "lower", "extent": extent, "interpolation": "nearest"}
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, **options)
    for name, width in zip(OUTLINES, widths or (), strict=False):
        if name in section.pvs:
            edges = find_edges(section.pvs[name] > 0) * section.spacing
            ax.add_collection(LineCollection(edges, colors=OUTLINES[name], lw=width))
    left, right, bottom, top = window or extent
    ax.set(xlim=(left, right), ylim=(bottom, top))
    bar, x, y = 10 if window else 30, left + 0.04 * (right - left), bottom + 0.04 * (top - bottom)
    ax.plot([x, x + bar], [y, y], lw=2, solid_capstyle="butt", **MARK)
    ax.annotate(f"{bar} mm", (x, y), (0, 3), textcoords="offset points", size=7, **MARK)
    for letter, (side, across, up) in zip("" if window else section.sides, EDGES, strict=False):
        align = {"ha": side if up == 0.5 else "center", "va": side if across == 0.5 else "center"}
        ax.text(across, up, letter, size=8, transform=ax.transAxes, **align, **MARK)
    ax.set_title(title, color="white", size=9)
    ax.set_axis_off()


def draw_row(axes, section):
    """Draw a section: as it is; outlined; of a tested scan its PVS by KINDS; magnified."""
    counts = {name: len(np.unique(pvs[pvs > 0])) for name, pvs in section.pvs.items()}
    outlined = ", ".join(f"{name}: {count or 'no'} PVS" for name, count in counts.items())
    left, right, bottom, top = window = find_busiest(section)
    frame = {"fill": False, "color": "white", "lw": 0.7}
    axes[0].add_patch(Rectangle((left, bottom), right - left, top - bottom, **frame))
    draw_panel(axes[0], section, section.image, section.title)
    draw_panel(axes[1], section, section.image, outlined, (1.2, 0.5))
    if len(section.pvs) == 2:
        true, pred = section.pvs.values()
        tails = not (true[section.kind == 1]).any()  # found in another section
        own = pred if tails else true, true, pred
        counts = [len(np.unique(p[(section.kind == n) & (p > 0)])) for n, p in enumerate(own, 1)]
        told = ", ".join(map("{} {}".format, counts, KINDS))
        draw_panel(axes[2], section, paint(section), told)
    draw_panel(axes[-1], section, section.image, "magnified", (3, 1.5), window)


@PLAIN
def draw_sections(path, sections, title):
    """Draw sections, a row each, all to one scale, with a legend; title of two lines."""
    shown = {name: Line2D([], [], color=OUTLINES[name]) for name in sections[0].pvs}
    if len(shown) == 2:
        told = {"found": "found, in any section"}
        shown |= {told.get(n, n): Rectangle((0, 0), 1, 1, color=c) for n, c in KINDS.items()}
    columns = 4 if len(shown) > 2 else 3
    width, height = np.max([section.size() for section in sections], 0)
    scale = min(3.2 / width, 4.8 / height)  # inches a mm
    heights = [scale * section.size()[1] + 0.3 for section in sections]
    figure = Figure(figsize=(3.2 * columns, sum(heights) + 0.9), **DARK)
    axes = figure.subplots(len(sections), columns, squeeze=False, height_ratios=heights)
    for line, section in zip(axes, sections, strict=True):
        draw_row(line, section)
    legend = {"loc": "outside lower center", "ncols": len(shown), "labelcolor": "white"}
    figure.legend(shown.values(), shown, frameon=False, **legend)
    write_figure(path, figure, title)


def write_figure(path, figure, title):
    """Give the figure its title and write it as a 300-DPI picture."""
    colour = "black" if figure.get_facecolor()[0] else "white"
    # Wrapped text is parsed as TeX between two $, whatever text.parse_math says.
    figure.suptitle(title, color=colour, size=10, wrap="$" not in title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:], dpi=300)
    write_file(path, buffer.getbuffer())


def describe_scores(row, affine, cfg):
    """Return the title of a test case's figure: its scores, each with its grid."""
    scores = ", ".join(f"{name} {row[f'native_{key}']:.3f}" for key, name in METRICS.items())
    burden = [f"{row[f'count_{s}']} PVS, {row[f'volume_ml_{s}']:.3f} ml" for s in ("label", "pred")]
    grid = spacing_words(ras_spacing(affine))
    title = f"{row['name']}, {data_set_name(cfg)}: {burden[0]} in the ground truth; {burden[1]} "
    title += f"predicted\n{scores} on the native grid, {grid}"
    return title + f"; Dice {row['dice']:.3f} on the {describe_grid(cfg)}"


def doubt_of_sides(cautions):
    """Return what the title of a figure adds, where the cautions of a scan doubt its sides."""
    return f"; {NO_SIDES}" * any(NO_SIDES in caution for caution in cautions)


def draw_test_grid(run, rows, sections, cfg, most=10):
    """Draw the axial section with the most voxels of PVS of every test case, a row each.

    Of more than `most` cases those evenly spread from worst to best Dice.
    """
    ranked = sorted(zip(rows, sections, strict=True), key=lambda pair: pair[0]["native_dice"])
    spread = np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)
    shown = []
    for row, section in (ranked[place] for place in spread):
        title = f"{row['name']}, Dice {row['native_dice']:.3f}\n{section.title}"
        shown.append(replace(section, title=title))
    told = f"{len(spread)} of {len(rows)} test cases, worst to best Dice of the native grid"
    draw_sections(run.overview, shown, f"{data_set_name(cfg)}\n{told}")


@PLAIN
def draw_agreement(run, rows, burden, cfg):
    """Draw predicted against true burden, and the Bland-Altman plot, of PVS count and volume."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    kinds = (("count", "Number of PVS", "PVS"), ("volume_ml", "Volume of PVS", "ml"))
    for (scatter, bland), (name, title, unit) in zip(figure.subplots(2, 2), kinds, strict=True):
        label, pred = (np.array([row[f"{name}_{s}"] for row in rows]) for s in ("label", "pred"))
        result, end = burden[name], 1.05 * max(label.max(), pred.max(), 1e-9)
        for key, text in {"pearson_r": "r", "lin_ccc": "concordance"}.items():
            title += "" if result[key] is None else f", {text} {result[key]:.3f}"
        scatter.plot([0, end], [0, end], color="0.6", lw=1, label="identity")
        scatter.plot(label, pred, "o", alpha=0.7)
        scatter.set(xlim=(-0.03 * end, end), ylim=(-0.03 * end, end), aspect="equal")
        scatter.set_title(title, color="0.6" if len(rows) < 10 else "black")
        scatter.set(xlabel=f"ground truth, {unit}", ylabel=f"prediction, {unit}")
        bland.axhline(0, color="0.6", lw=1, label="no error")
        bland.plot((label + pred) / 2, pred - label, "o", alpha=0.7)
        if result["bias"] is not None:
            low, high = result["limits_of_agreement"]
            bias, *ends = (f"{n:.{3 if unit == 'ml' else 1}f}" for n in (result["bias"], low, high))
            told = f"bias {bias}, limits of agreement {' to '.join(ends)}"
            for height, text in ((result["bias"], told), (low, None), (high, None)):
                bland.axhline(height, color="C1", ls="-" if text else "--", label=text)
        bland.set(xlabel=f"mean of both, {unit}", ylabel=f"prediction - ground truth, {unit}")
        bland.set(title="Bland-Altman", ymargin=0.3)  # room for the legend
    for ax in figure.axes:
        ax.grid(alpha=0.3)
        ax.legend()
    few = "; too few for a correlation" if len(rows) < 10 else ""
    title = f"{data_set_name(cfg)}\n{len(rows)} test cases, native grid{few}"
    write_figure(run.agreement, figure, title)


@PLAIN
def draw_training_curves(run, cfg):
    """Draw losses, Dice and learning rate over the epochs, where there is a history."""
    if not run.history.exists():
        return
    history = read_json(run.history)
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = {"loss": ("train_loss", "val_loss"), "Dice": ("train_dice", "val_dice")}
    panels["learning rate"] = ("lr",)
    told = {"train": "training patches", "val": "validation volumes", "lr": "learning rate"}
    best = max(history, key=lambda row: row["val_dice"] or 0)["epoch"]
    for ax, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in history if row[key] is not None]
            ax.plot(*np.transpose(points), ".-", label=told[key.split("_")[0]])
        ax.axvline(best, color="0.4", ls=":", label=f"best validation Dice, epoch {best}")
        ax.set(title=title, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend()
        ax.grid(alpha=0.3)
    axes[1].set_ylim(0, 1)
    write_figure(run.curves, figure, f"{data_set_name(cfg)}; {describe_grid(cfg)}")


# ------------------------------------------------------------------------------------------ Report

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 80rem; padding: 1rem }
div { overflow-x: auto }
img { max-width: 100% }
td img { display: block; height: 8rem; max-width: none }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .6rem; text-align: right }
th { position: sticky; top: 0; background: #fff }
th:first-child, td:first-child, .words * { text-align: left }
.words td { overflow-wrap: anywhere }
button { background: none; border: 0; cursor: pointer; font: inherit; text-decoration: underline }
[aria-sort=ascending] button::after { content: " \\2191" }
[aria-sort=descending] button::after { content: " \\2193" }
</style>
<h1>$title</h1>
$parts
<script>
const table = document.querySelector(".scans"), body = table.tBodies[0];
[...table.rows[0].cells].forEach((head, column) => head.firstChild.onclick = () => {
  const up = head.ariaSort != "ascending", known = row => row.cells[column].dataset.value;
  for (const other of table.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const order = (a, b) => a - b || String(a).localeCompare(b), rows = [...body.rows];
  rows.sort((a, b) => order(known(a), known(b)) * (up ? 1 : -1));
  body.append(...rows.filter(known), ...rows.filter(row => !known(row)));
});
</script>
</html>
""")
# Columns of the page's scans: key of a row: title. The first one orders the rows.
TESTED = {"native_dice": "native Dice", "lesion_f1_any": "F1 of PVS", "hd95_mm": "HD95, mm"}
TESTED |= {"count_label": "true PVS", "count_pred": "predicted PVS", "volume_ml_label": "true ml"}
TESTED |= {"volume_ml_pred": "predicted ml", "grade_label": "true grade"}
TESTED["grade_pred"] = "predicted grade"
COUNTED = {"count": "PVS", "volume_ml": "ml", "section_count": "on the busiest section"}
COUNTED |= {"grade": "its grade, 0 to 4", "seen_in": "seen in"}


def thumbnail(section):
    """Return a section, its PVS painted, as a small picture in a data URL."""
    picture = Image.fromarray((255 * np.flipud(paint(section))).astype(np.uint8))
    width, height = section.size()
    picture = picture.resize((round(256 * width / height), 256), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", subsampling=0)  # keeps PVS of one voxel
    return embed(buffer.getvalue())


def embed(picture):
    """Return the bytes of a JPEG as a data URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def read_thumbnails(run):
    """Return {name of a scan: its thumbnail} of a page that was written before."""
    page = run.report.read_text(encoding="utf-8") if run.report.exists() else ""
    return dict(re.findall(r'href="multi_plane/([^"]+)\.png"><img alt="" src="([^"]+)"', page))


def to_html(titles, rows, kind=""):
    """Return an HTML table; its cells are words, numbers, None or (value to sort by, HTML)."""
    lines = ""
    for row in rows:
        lines += "\n<tr>"
        for value, shown in (cell if isinstance(cell, tuple) else (cell, None) for cell in row):
            text = "" if value is None else html.escape(str(value))
            number = f"{value:.3f}" if isinstance(value, float) else text
            lines += f'<td data-value="{text}">{shown or number}</td>'
        lines += "</tr>"
    heads = "".join(f"<th>{title}</th>" for title in titles)
    table = f'<table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{lines}\n</tbody></table>'
    return f"<div>{table}</div>"


def describe_run(run, cfg, blocks):
    """Return the parts of the page above its scans: scores, figures; and below: split, settings."""
    scores, parts, below = [], [], []
    for _, place, _ in SCORES if blocks else ():
        known = look_up(blocks, place)
        ends = known["ci95"] or (None, None)
        numbers = known["mean"], *ends, known["sd"], known["median"], known["n"]
        scores.append([place.replace("_", " "), *numbers])
    if scores:
        titles = ("score", "mean", "95 % from", "to", "SD", "median", "scans")
        parts += ["<h2>Scores</h2>", to_html(titles, scores)]
    for name, picture in {"Training": run.curves, "Agreement": run.agreement}.items():
        if picture.exists():
            image = f'<img alt="{name}" src="{embed(picture.read_bytes())}">'
            parts += [f"<h2>{name}</h2>", image]
    if run.split.exists():
        split = [(part, len(s), " ".join(s)) for part, s in read_json(run.split).items()]
        below += ["<h2>Split</h2>", to_html(("part", "subjects", ""), split, "words")]
    edited = [(n, words(value), words(known)) for n, (value, known) in find_edited(cfg).items()]
    table = to_html(("setting", "value", "published"), edited, "words")
    return parts, [*below, "<h2>Settings that differ from the published ones</h2>", table]


def write_report(run, cfg, title, columns, rows, thumbnails, blocks=None):
    """Write `report.html`, one page to look at; figures of scans lie beside it.

    `columns`: TESTED or COUNTED, keys of `rows`, which have a `name` too; `thumbnails`: {name: data
    URL}; `blocks`: of `summarise_all`, of tested scans.
    """
    first, lines = next(iter(columns)), []
    for row in sorted(rows, key=lambda row: float(row[first]), reverse=columns is COUNTED):
        name, picture = row["name"], thumbnails.get(row["name"], "")
        shown = f'<a href="multi_plane/{name}.png"><img alt="" src="{picture}">{name}</a>'
        lines.append([(name, shown), *(row[key] for key in columns)])
    kinds = KINDS if blocks else {"predicted": KINDS["found"]}
    told = "".join(f'<b style="background: {c}">&emsp;</b> {kind}, ' for kind, c in kinds.items())
    told = f"<p>{told}a section of each. A heading sorts, a picture opens its figure.</p>"
    made = f"train_pvs.py {VERSION} {SCRIPT_HASH[:8]}, {datetime.now():%F %H:%M}"
    heads = [f"<button>{head}</button>" for head in ("scan", *columns.values())]
    above, below = describe_run(run, cfg, blocks)
    parts = [f"<p>{made}. For research only.</p>", *above, f"<h2>{len(rows)} scans</h2>", told]
    parts += [to_html(heads, lines, "scans"), *below]
    page = PAGE.substitute(title=html.escape(title), parts="\n".join(parts))
    write_file(run.report, page)


# --------------------------------------------------------------------------------------- Demo data

DEMO_SHAPE = (96, 112, 96)  # voxels of 1 mm
DEMO_SUBJECTS = 16
# Diameters of PVS in voxels: median, sigma of the logarithm, smallest, largest. These are wider
# than most PVS, so that a small network learns them in voxels of 1 mm within minutes.
DEMO_DIAMETERS = (3.4, 0.1, 2.8, 4)
DEMO_NAME = "Simulated heads with perivascular spaces"


def smooth_noise(rng, shape, sigma):
    """Return Gaussian noise smoothed over `sigma` voxels, float32, mean 0 and SD 1."""
    step = max(1, int(sigma / 2))  # a coarser grid loses nothing
    coarse = rng.standard_normal([n // step + 2 for n in shape]).astype(np.float32)
    fine = ndimage.zoom(ndimage.gaussian_filter(coarse, sigma / step), step, order=1)
    noise = fine[tuple(map(slice, shape))]
    return (noise - noise.mean()) / noise.std()


def simulate_tissue(rng, shape):
    """Return a head's T2w intensity relative to WM = 1, and masks of WM and basal ganglia."""
    grid = zip(np.indices(shape, np.float32), shape, strict=True)
    x, y, z = (ticks - (n - 1) / 2 + 1.5 * smooth_noise(rng, shape, 14) for ticks, n in grid)
    radii = np.array(shape) / 2 * rng.uniform(0.9, 0.96, 3)
    radius = np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2)
    depth = (1 - radius) * radii.mean()  # mm below the skin
    sulci = smooth_noise(rng, shape, 3.5) ** 2  # thin sheets where the noise crosses zero
    csf = 7 + 8 * np.exp(-sulci / 0.02)
    cortex = 9.5 + 8 * np.exp(-sulci / 0.3)
    layers = [depth < 0, depth < 3, depth < 6, depth < csf, depth < cortex]
    image = np.select(layers, [0.02, 1.1, 0.2, 2.5, 1.3], 1.0).astype(np.float32)
    side = np.abs(x)
    basal = ((side - 15) / 6) ** 2 + (y / 12) ** 2 + ((z + 4) / 8) ** 2 < 1
    ventricles = ((side - 6 - y**2 / 250) / 4) ** 2 + (y / 22) ** 2 + ((z - 6) / 6) ** 2 < 1
    image[basal], image[ventricles] = 1.25, 2.5
    white = (depth > cortex + 1) & ~ndimage.binary_dilation(basal | ventricles, iterations=2)
    return ndimage.gaussian_filter(image, 0.5), white, basal


def draw_tubes(rng, where, count, diameters):
    """Return the part of each voxel that tubes like PVS fill, centred and kept in the mask `where`.

    They are 6-18 voxels long, point to the head's centre within some 25 degrees, and bend.
    """
    median, sigma, *limits = diameters
    occupancy, middle = np.zeros(where.shape, np.float32), (np.array(where.shape) - 1) / 2
    candidates = np.argwhere(where)
    for centre in candidates[rng.integers(len(candidates), size=count)]:
        inward = (middle - centre) / (np.linalg.norm(middle - centre) + 1e-6)
        axis = inward + 0.3 * rng.standard_normal(3)
        axis /= np.linalg.norm(axis)
        length, bend = rng.uniform(6, 18), np.cross(axis, rng.standard_normal(3))
        radius = np.clip(rng.lognormal(np.log(median), sigma), *limits) / 2
        bend = 0.08 * length * bend  # of both ends
        reach = length / 2 * np.abs(axis) + np.abs(bend) + radius
        low = np.maximum(np.floor(centre - reach), 0).astype(int)
        high = np.minimum(np.ceil(centre + reach) + 1, where.shape).astype(int)
        samples = np.mgrid[tuple(map(slice, 3 * low, 3 * high))]  # three a voxel and axis
        offset = (np.stack(samples, -1) + 0.5) / 3 - 0.5 - centre
        along = np.clip(offset @ axis, -length / 2, length / 2)[..., None]
        off_line = offset - along * axis - (2 * along / length) ** 2 * bend
        (a, b, c), box = high - low, occupancy[tuple(map(slice, low, high))]
        inside = ((off_line**2).sum(-1) < radius**2).reshape(a, 3, b, 3, c, 3)
        np.maximum(box, inside.mean((1, 3, 5)), out=box)
    return occupancy * ndimage.binary_dilation(where, iterations=1)


def simulate_head(rng, shape=DEMO_SHAPE, diameters=DEMO_DIAMETERS, tissue=simulate_tissue):
    """Return a simulated T2w head (X, Y, Z) int16 and the mask of its white-matter PVS.

    It is drawn for voxels of about 1 mm. Lesions of the white matter and PVS of the basal ganglia
    look alike and bear no label. Contrasts after Bernal et al. 2022 (10.1016/j.mri.2022.07.016).
    """
    image, white, basal = tissue(rng, shape)
    pvs = draw_tubes(rng, white, rng.integers(50, 90), diameters)
    unlabelled = draw_tubes(rng, basal, rng.integers(2, 6), diameters)
    spots, candidates = np.zeros(shape, np.float32), np.argwhere(white)
    for centre in candidates[rng.integers(len(candidates), size=rng.integers(3, 9))]:
        spots[tuple(centre)] = rng.uniform(30, 80)  # a peak of 0.25 to 0.65 after smoothing
    image += ndimage.gaussian_filter(spots, 2)
    for occupancy in (pvs, unlabelled):
        contrast = rng.uniform(1.95, 2.1) * (1 + 0.04 * smooth_noise(rng, shape, 10))
        image += (contrast - image) * occupancy
    image *= 1 + 0.05 * np.clip(smooth_noise(rng, shape, 30), -2, 2)  # the coil's bias field
    noise = rng.standard_normal((2, *shape)) / rng.uniform(25, 40)  # Rician
    image = np.hypot(image + noise[0], noise[1]) * rng.uniform(300, 500)
    return image.astype(np.int16), (pvs > 0.5).astype(np.uint8)


def write_head(folder, subject, volumes, spacing=1):
    """Write a scan and its mask (X, Y, Z), voxels of `spacing` mm, to where ds005595 has them."""
    middle = (np.array(volumes[0].shape) - 1) / 2  # is where the world begins
    affine = nib.affines.from_matvec(spacing * np.eye(3), -spacing * middle)
    label_name = f"derivatives/mask/{subject}/{subject}_desc-mask_PVS.nii.gz"
    paths = (f"{subject}/anat/{subject}_T2w.nii.gz", label_name)
    for name, volume in zip(paths, volumes, strict=True):
        nifti = nib.Nifti1Image(volume, affine)
        nifti.header.set_xyzt_units("mm")
        write_file(Path(folder) / name, gzip.compress(nifti.to_bytes(), 3, mtime=0))


def make_demo_data(folder, seed):
    """Make the demo's BIDS data set, laid out as ds005595, unless it is there.

    The description with the seed is written last: another or an unfinished set is made anew. A
    folder that holds data which the demo has not made is a ValueError.
    """
    marker = Path(folder, "dataset_description.json")
    maker = {"Name": "train_pvs.py --demo", "Version": f"1, seed {seed}"}
    description = {"Name": DEMO_NAME, "BIDSVersion": "1.9.0", "GeneratedBy": [maker]}
    found = read_json(marker) if marker.exists() else {}
    if found == description:
        return
    free = found.get("Name") == DEMO_NAME or not any(Path(folder).glob("*"))
    require(free, f"{folder}: holds other data than the demo's; choose another --output-dir")
    shutil.rmtree(folder, ignore_errors=True)
    write_json(marker, {"Name": DEMO_NAME})
    for number in Progress(range(DEMO_SUBJECTS), "simulating heads"):
        volumes = simulate_head(np.random.default_rng([seed, number]))
        write_head(folder, f"sub-{number + 1:03d}", volumes)
    write_json(marker, description)


# -------------------------------------------------------------------------------------- Prediction


def warn_of_doubts(case, entry, contents):
    """Warn of what sets a scan apart from the training scans."""
    own = {"spacing": ras_spacing(entry["native_affine"].numpy()), "stripped": entry["stripped"]}
    known = contents[0][1].get("trained_on", own)  # earlier checkpoints do not tell
    warn_if_far(case.image, own["spacing"], known["spacing"], "the training scans' ")
    if own["stripped"] != known["stripped"]:
        which = "the scan is" if own["stripped"] else "only the training scans are"
        log.warning("Warning: %s: %s stripped of the skull, it seems", case.image, which)


def segment_scan(run, model, case, contents, cfg):
    """Segment a scan, write and draw its mask; return its row of PREDICTED and its thumbnail."""
    image, cautions = read_scan(case.image)
    for caution in cautions:
        log.warning("Warning: %s", caution)
    entry = to_working_grid({"image": image}, cfg)
    warn_of_doubts(case, entry, contents)
    prob, affine = predict_case(model, entry, cfg)[1], entry["native_affine"].numpy()
    pred = decide(prob, affine, cfg)
    pvs = {"prediction": number_components(pred)}
    mask = write_prediction(run, case, affine, pvs, prob, cfg)
    rating = rate_busiest_section(pred, affine, middle_of_head(entry))
    count, volume = int(pvs["prediction"].max()), volume_ml(pred, affine)
    title = f"{case.name}: {count or 'no'} PVS predicted, {volume:.3f} ml, "
    title += f"{spacing_words(ras_spacing(affine))}\nnetwork trained on: {training_set(contents)}"
    title += f"; {describe_grid(cfg)}{doubt_of_sides(cautions)}"
    sections = cut_sections(np.asarray(image[0]), affine, pvs, entry)
    draw_sections(run.figure(case), sections, title)
    found, every = hash_voxels(image), [content for _, content in contents]
    seen = [part for part in ("train", "val", "test") if found in seen_hashes(every, part)]
    dices = [content["history_row"]["val_dice"] or 0 for content in every]
    row = {"participant_id": case.subject, "name": case.name, "count": count, "volume_ml": volume}
    row |= dict(zip(RATING, rating, strict=True)) | {"seen_in": "".join(seen[:1])}
    row |= {"trained_on": training_set(contents), "validation_dice": float(np.mean(dices))}
    row |= {"scan": case.image, "scan_sha256": hash_file(case.image)}
    return row | {"mask": os.path.relpath(mask, run.logs)}, thumbnail(sections[0])


def training_set(contents):
    """Return the names of the data sets that checkpoints were trained on."""
    known = [(content.get("trained_on", {}), content["config"]) for _, content in contents]
    sets = {facts.get("data_set") or Path(saved["DATA_DIR"]).name for facts, saved in known}
    return ", ".join(sorted(sets))


PREDICTED = ("participant_id", "name", "count", "volume_ml", *RATING, "seen_in", "trained_on")
PREDICTED += ("validation_dice", "scan", "scan_sha256", "mask")  # columns of participants_pvs.csv
NUMBERS = ("count", "volume_ml", "section_count", "grade")


def read_done(run, cases, made, cfg):
    """Return the rows, {name: row}, of the scans that a former --predict into this folder has done.

    Also the names of those that lack probabilities. A ValueError where the folder holds a test,
    masks by another network, or of other scans with the same names.
    """
    remedy = "Choose another --output-dir and name the weights with --checkpoint, or give up all "
    remedy += "results in it with --overwrite."
    require(not run.scores.exists(), f"{run.folder}: has the results of a test. {remedy}")
    former = run.description.read_bytes() if run.description.exists() else b""
    same = json.dumps(made).encode() in former
    require(same, f"{run.folder}: has masks by other weights or settings. {remedy}")
    rows, lacking, problems, scans = {}, set(), [], {case.name: case.image for case in cases}
    table = run.burden.read_bytes() if run.burden.exists() else b""
    for row in csv.DictReader(io.StringIO(table.decode("utf-8-sig", "replace"), newline="")):
        whole = all(row.get(key) is not None for key in PREDICTED)
        whole = whole and all(re.fullmatch(r"[\d.e+-]+", row[key]) for key in NUMBERS)
        told = f"expected the table as it was written, with {', '.join(PREDICTED)}"
        require(whole, f"{run.burden}: {told}. {remedy}")
        scan, mask = scans.get(row["name"]), run.logs / row["mask"]
        prob = mask.with_name(mask.name.replace("_mask.nii", "_probseg.nii"))
        if scan and hash_file(scan) != row["scan_sha256"]:
            problems.append(f"{scan}: expected the scan that {row['name']} was, {row['scan']}")
        elif scan and not mask.exists():
            continue
        elif scan and cfg.SAVE_PROBABILITIES and not prob.exists():
            lacking.add(row["name"])
        rows[row["name"]] = {key: row[key] for key in PREDICTED}
        rows[row["name"]] |= {key: json.loads(row[key]) for key in NUMBERS}
    raise_problems(problems, remedy)
    return rows, lacking


def predict_scans(run, model, cases, contents, done, cfg):
    """Segment the scans that are not `done`, see `read_done`; return 1 if one could not be."""
    (rows, lacking), problems = done, []
    waiting = [case for case in cases if case.name in lacking or case.name not in rows]
    if len(waiting) < len(cases):
        log.info("Done before     %d of %d scans", len(cases) - len(waiting), len(cases))
    small, scans = read_thumbnails(run), [case.image for case in cases]
    scans += [row["scan"] for row in rows.values()]
    write_description(run, scans, describe_prediction(contents, cfg))
    title = f"PVS predicted by a network trained on {training_set(contents)}"
    for case in Progress(waiting, "predicting"):
        try:
            rows[case.name], small[case.name] = segment_scan(run, model, case, contents, cfg)
            write_report(run, cfg, title, COUNTED, rows.values(), small)
            folders = [folder_with("participants.tsv", row["scan"]) for row in rows.values()]
            write_csv(run.burden, join_participants([*rows.values()], folders))
            log.info("%(name)s: %(count)d PVS, %(volume_ml).3f ml", rows[case.name])
        except (ValueError, MemoryError, RuntimeError) as error:
            if not isinstance(error, ValueError) and not lacks_memory(error):
                raise
            told = f"memory ran out; {OUT_OF_MEMORY}" if lacks_memory(error) else str(error)
            problems.append(told if case.image in told else f"{case.image}: {told}")
    segmented = len(cases) - len(problems)
    log.info("%d of %d scans are segmented in %s", segmented, len(cases), run.folder.resolve())
    for problem in problems:
        log.error("Not segmented: %s", problem)
    return int(bool(problems))


# -------------------------------------------------------------------------------------------- Main

FAILURES = (ValueError, OSError, EOFError, ArithmeticError, RuntimeError, MemoryError)


def find_edited(cfg):
    """Return {name: (value, published value)} of the settings that differ from the published."""
    published = asdict(Config(**PUBLISHED))
    return {n: (v, published[n]) for n, v in asdict(cfg).items() if v != published[n]}


def log_settings(cfg, options, title):
    """Print the title, every setting that differs from the published one, and overridden edits."""
    log.info(f"{datetime.now():%F %T}, train_pvs.py {VERSION} {SCRIPT_HASH[:8]}, {title}")
    edited_ones = find_edited(cfg)
    for name, value in asdict(cfg).items():
        if options.check or name in edited_ones:
            log.info("  %-21s %s", name, words(value))
        edited = options.edited.get(name, value)
        source = f"recipe {options.recipe}" if name in options.of_recipe else "checkpoint"
        known = name == "PIX_DIM" and source == "checkpoint" and not any(edited)  # 0 0 0
        if edited != value and name not in {"OUTPUT_DIR", *options.given} and not known:
            told = f"edited to {words(edited)} in the file, but the {source} has {words(value)}"
            log.warning("Warning: %s: %s, which is used", name, told)


def log_plan(run, cfg, model, scans, contents=()):
    """Print from what weights, on what and into which folder the run works; `scans`: how many."""
    for row in (content["history_row"] for _, content in contents):
        dice = row["val_dice"] and f"{row['val_dice']:.4f} on the working grid"
        log.info("Weights         epoch %d, validation Dice %s", row["epoch"], dice)
        if row["val_dice"] == 0:
            log.warning("Warning: these weights found no PVS in validation; expect empty masks")
    if contents:
        log.info("Trained on      %s", training_set(contents))
    device = choose_device(cfg)
    arithmetic = str(autocast_dtype(device, cfg)).removeprefix("torch.")
    if cfg.AMP and device.type == "cpu" and has_level_of_side_2(cfg):
        arithmetic += ", since bfloat16 fails on CPUs with such small patches"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    log.info("Device          %s, arithmetic in %s", device, arithmetic)
    count = workers(cfg)["num_workers"]
    if count < cfg.NUM_WORKERS and not contents:
        told = "Workers         %d for patches, not %d: a process has no more processors"
        log.info(told, count, cfg.NUM_WORKERS)
    log.info("Scans           %s", scans)
    log.info("Grid            %s", describe_grid(cfg))
    log.info("Network         %s, %.1f M parameters", describe_network(cfg), parameters)
    log.info("Output folder   %s", run.folder.resolve())


def keep_prepared(split, prepared, cfg):
    """Return the split with prepared cases; those without PVS are only tested."""
    ready = {case.name: case for case in prepared}
    split = {part: [ready[case.name] for case in cases] for part, cases in split.items()}
    # In validation an empty network would find such a scan right; one that lost its PVS counts 0.
    for part, count in (("train", "working_voxels"), ("val", "native_voxels")):
        for case in [case for case in split[part] if not getattr(case, count)]:
            split[part].remove(case)
            told = "Warning: left out of %s, no PVS on the working grid (%d on its own): %s"
            log.warning(told, part, case.native_voxels, case.label)
    bare = [part for part in ("train", "val") if not any(c.working_voxels for c in split[part])]
    told = "expected masks with PVS on the working grid, none is left in " + ", ".join(bare)
    require(not bare, f"{cfg.DATA_DIR}: {told}. Choose other subjects with --split or --seed.")
    return split


def set_up_training(cfg, options):
    """Do all that comes before training; return the work that is left, a function."""
    run = Run(cfg.OUTPUT_DIR)
    last, cfg = read_last(run, cfg, options) if options.resume else (None, cfg)
    replaced = [] if last else map(os.path.realpath, run.results())
    told = f"{cfg.INIT_FROM}: INIT_FROM, which this run would replace; choose another --output-dir"
    require(os.path.realpath(cfg.INIT_FROM) not in replaced, told)
    require_data_folder(cfg, options)
    again = options.demo and Path(cfg.DATA_DIR, "dataset_description.json").exists()
    replaceable = options.overwrite or options.check or options.resume or again
    run.open("check" if options.check else "train", replaceable, options.overwrite and not last)
    log_settings(cfg, options, "going on with last.pth" if last else f"recipe {options.recipe}")
    with first_process_first():
        if options.demo:
            make_demo_data(cfg.DATA_DIR, cfg.SEED)
    cases = find_cases(cfg)
    split = split_as_before(cases, last) if last else split_cases(cases, cfg)
    with first_process_first():  # it downloads weights for all
        model = build_model(cfg, pretrained=not (last or cfg.INIT_FROM or options.check))
    if last:
        warn_of_other_versions(last, cfg)
        load_weights(model, last, run.last)
    cases = [*itertools.chain(*split.values())]
    if not any(cfg.PIX_DIM):  # folds share a grid
        cfg = replace(cfg, PIX_DIM=own_spacing(cases if cfg.FOLDS else split["train"]))
    split = keep_prepared(split, prepare_cases(cases, cfg), cfg)
    if last:
        check_unchanged(run, split, last)
        log.info("Resumed         after epoch %d", len(last["progress"]["history"]))
    elif cfg.INIT_FROM:
        load_initial_weights(model, split, cfg)
    log.info("Data            %s", data_set_name(cfg))
    log_plan(run, cfg, model, ", ".join(f"{len(part)} {name}" for name, part in split.items()))
    for part in ("val", "test"):
        log.info("  %-14s%s", part, " ".join(case.name for case in split[part][:10]))
    if options.check:
        left = f"{run.logs}/check.log, {cache_folder(cfg)}"
        log.info(f"Ready to train. Nothing was trained (--check). Left: {left}")
        return lambda: 0
    return functools.partial(train, run, model, split, cfg, last)


def train(run, model, split, cfg, last):
    """Fit, from `last.pth` on if there is its content, test the best weights; return the status."""
    device, shared = choose_device(cfg), process_number("WORLD_SIZE") > 1
    if not last:
        for kind in ("json", "csv") if cfg.FOLDS and run.results() else ():  # has its scores
            (run.folder.parent / f"cross_validation.{kind}").unlink(missing_ok=True)
        run.clear()  # --overwrite
    if first_process():
        write_json(run.split, {part: sorted({c.subject for c in split[part]}) for part in split})
    model.to(device)
    if cfg.HEAD_BIAS_LOG_ODDS and not (cfg.INIT_FROM or last):
        start_at_log_odds(model, split["train"], cfg)
    if shared and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    fit(run, model, cfg, split, last)
    wait_for_all()  # the first has written the weights
    content = read_checkpoint(run.best)
    load_weights(model, content, run.best)
    if first_process() and content["config"] != asdict(cfg):  # --resume with another decision
        write_torch(run.best, content | {"config": asdict(cfg)})
    decided = {name: getattr(cfg, name) for name in names(Decision)}
    if first_process() and last and last["config"] != last["config"] | decided:  # which stays
        known = read_checkpoint(run.last)
        write_torch(run.last, known | {"config": known["config"] | decided})
    told = "Best validation Dice %(val_dice).4f on the working grid, in epoch %(epoch)d"
    log.info(told, content["history_row"])
    known = [row for row in read_json(run.history) if "val_seconds" in row]
    whole, part = (sum(row[key] for row in known) for key in ("seconds", "val_seconds"))
    log.info("Validation took %.0f %% of the time of training", 100 * part / max(whole, 0.01))
    evaluate(run, for_inference(model, cfg), split["test"], [(run.best, content)], cfg)
    learned = content["history_row"]["val_dice"] > 0
    if not learned and first_process():
        log.error("No PVS were learned: the validation Dice never left 0. %s", advice(cfg))
    return int(not learned)


def read_again(case):
    """Return the scan and the bool mask (X, Y, Z) of a case; an OSError if they have changed."""
    try:
        image, label = read_volume(case.image), read_label(case.label)[0]
    except ValueError as error:
        raise OSError(str(error)) from None
    for path, volume, known in ((case.image, image, "sha256"), (case.label, label, "label_sha256")):
        same = hash_voxels(volume) == getattr(case, known)
        require(same, f"{path}: has other voxels than when the run began", OSError)
    return np.asarray(image[0]), np.asarray(label[0]) > 0


def evaluate(run, model, cases, contents, cfg):
    """Test prepared cases on both grids, write predictions, scores, figures; return status 0."""
    rows, cuts, weights = [], [], []
    for case in Progress(share(cases), "testing"):
        entry, (image, label) = load_cached(case), read_again(case)
        working_prob, prob = predict_case(model, entry, cfg)
        affine = entry["native_affine"].numpy()
        pred = decide(prob, affine, cfg)
        working_pred = decide(working_prob, entry["affine"].numpy(), cfg)
        pvs = {"ground truth": number_components(label), "prediction": number_components(pred)}
        write_prediction(run, case, affine, pvs, prob, cfg)
        rows.append(score_case(case, entry, working_pred, prob, pred, label))
        sections = cut_sections(image, affine, pvs, entry)
        told = describe_scores(rows[-1], affine, cfg) + doubt_of_sides(case.warnings)
        draw_sections(run.figure(case), sections, told)
        cuts.append(sections[0])
    rows, cuts = gather(rows), gather(cuts)
    if first_process():
        write_description(run, [case.image for case in cases], describe_prediction(contents, cfg))
        for path, content in contents:
            row = content["history_row"]
            weights.append({"file": str(path), "epoch": row["epoch"], "val_dice": row["val_dice"]})
        origin = {"checkpoint": weights if len(weights) > 1 else weights[0], "config": asdict(cfg)}
        origin |= {"device": str(choose_device(cfg)), "versions": package_versions()}
        origin["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        blocks = write_test_metrics((run.scores, run.table), rows, origin, cfg)
        draw_test_grid(run, rows, cuts, cfg)
        draw_agreement(run, rows, blocks["burden"], cfg)
        draw_training_curves(run, cfg)
        small = {row["name"]: thumbnail(cut) for row, cut in zip(rows, cuts, strict=True)}
        title = f"Test on {len(rows)} scans, {data_set_name(cfg)}"
        write_report(run, cfg, title, TESTED, rows, small, blocks)
        log_scores(f"Test scores of {len(rows)} scans, {data_set_name(cfg)}", rows, blocks, cfg)
        own = cfg.FOLD and run.folder.name == f"fold-{cfg.FOLD}" and run.best.exists()
        if own and not run.stale.exists():  # no external test
            pool_folds(run, cfg)
        log.info("\nScores and figures are in %s", run.folder.resolve())
    return 0


def restore_configs(contents, cfg, options):
    """Return the Config of [(path, checkpoint)] together; of thresholds and sizes the mean."""
    configs = [asdict(restore_config(content, path, cfg, options)) for path, content in contents]
    one, first, alike = contents[0][0], configs[0], names(Network, Grid) | {"TTA_FLIPS"}
    alike |= {"FLIP_AXES"} if first["TTA_FLIPS"] != "none" else set()
    problems = [
        f"{name}: {one} has {first[name]}, {path} has {other[name]}"
        for (path, _), other in zip(contents, configs, strict=True)
        for name in list_differences(first, other, alike)
    ]
    require(not problems, "\n  ".join(["checkpoints that do not go together:", *problems]))
    means = {n: float(np.mean([c[n] for c in configs])) for n in ("THRESHOLD", "SMALLEST_PVS")}
    return Config(**first | means)


def choose_test_cases(cases, contents, own, cfg):
    """Return the cases, prepared, that no checkpoint was trained or chosen with; log the others.

    Scans are known by their voxels. `own`: those that the run has tested, no others; a ValueError
    names what is gone or changed.
    """
    content, hashes = contents[0][1], contents[0][1]["sha256"]
    if own:
        tested, masks = hashes["test"], content.get("label_sha256", {}).get("test", {})
        used = {*hashes["train"], *hashes["val"]}
        seen = [case.name for case in cases if case.name in used]
        new = [case.name for case in cases if case.name not in {*used, *tested}]
        cases = [case for case in cases if case.name in tested]
        cases = prepare_cases(cases, cfg) if cases else []
        same = {c.name for c in cases if c.sha256 == tested[c.name]}
        same -= {c.name for c in cases if c.label_sha256 != masks.get(c.name, c.label_sha256)}
        lost = sorted(tested.keys() - same)
        told = f"{', '.join(lost)}: gone or changed since the run tested them; name the "
        require(not lost, told + "weights with --checkpoint and choose another --output-dir")
    else:
        used, new = seen_hashes([content for _, content in contents], "train", "val"), []
        prepared = prepare_cases(cases, cfg)
        seen = [case.name for case in prepared if case.sha256 in used]
        cases = [case for case in prepared if case.sha256 not in used]
        told = "the checkpoint was trained or chosen with every scan, none is left to test on"
        require(cases, f"DATA_DIR: {told}; expected others")
    for why, gone in (("trained or chosen with", seen), ("not among the run's test scans", new)):
        if gone:
            log.info("Not tested on   %s: %s", " ".join(gone), why)
    return cases


def set_up_trained(cfg, options):
    """Do all that comes before --evaluate and --predict; return the work left, a function."""
    run, models = Run(cfg.OUTPUT_DIR), nn.ModuleList()
    former = Run(os.path.expanduser(Config.OUTPUT_DIR or ""))
    there = [best for best in (run.best, former.best) if best.parent.is_dir()]
    paths = [Path(path) for path in options.checkpoint or [*there, run.best][:1]]
    contents = [(path, read_checkpoint(path)) for path in paths]
    cfg, saved = restore_configs(contents, cfg, options), settings_of(contents[0][1]["config"], {})
    command = "predict" if options.predict else f"evaluate-{Path(cfg.DATA_DIR).resolve().name}"
    cases = find_scans(options.predict, cfg) if options.predict else find_cases(cfg)
    # Whether --evaluate makes the test of a run again: its weights, data and decision.
    same = all(saved[name] == getattr(cfg, name) for name in names(Data, Decision))
    own = options.evaluate and same and [p.resolve() for p in paths] == [run.best.resolve()]
    if own and saved["SAVE_PROBABILITIES"]:  # they are replaced, not only removed
        cfg = replace(cfg, SAVE_PROBABILITIES=options.given.get("SAVE_PROBABILITIES", True))
    if not own and run.best.parent.exists():
        run = Run(run.folder / command)  # its own, in the run's
        cfg = replace(cfg, OUTPUT_DIR=str(run.folder))
    for path, content in contents:
        models.append(build_model(cfg, pretrained=False))
        load_weights(models[-1], content, path)
    anew = options.overwrite and not own
    goes_on = options.predict and not anew and run.results()
    run.open(command.split("-")[0], anew or own or goes_on, anew)
    wait_for_all()
    done = read_done(run, cases, describe_prediction(contents, cfg), cfg) if goes_on else ({}, ())
    log_settings(cfg, options, f"{command}, checkpoint {', '.join(map(str, paths))}")
    models = nn.ModuleList(for_inference(model, cfg) for model in models)
    if not options.predict:
        log.info("Data            %s", data_set_name(cfg))
        cases = choose_test_cases(cases, contents, own, cfg)
        warn_of_subjects(cases, [content for _, content in contents], cfg)
    if anew:  # when all is checked
        run.clear()
        wait_for_all()
    scans = f"{len(cases)} to {'segment' if options.predict else 'test'}"
    log_plan(run, cfg, models, scans, contents)
    if options.predict:
        return functools.partial(predict_scans, run, models, cases, contents, done, cfg)
    return functools.partial(evaluate, run, models, cases, contents, cfg)


def choose_way_on(cfg, options, begun):
    """Return what to do after a run that ended early."""
    if options and options.every_fold and (begun or cfg.FOLD > 1):
        return "Go on with the same command and --resume; folds not begun are run anew."
    if not begun:
        return "Nothing had begun: run the same command again."
    if options.predict:
        return "Run the same command again, without --overwrite: it goes on."
    if options.evaluate:
        return "Run the same command again; add --overwrite if the folder holds results."
    if Run(cfg.OUTPUT_DIR).last.exists():
        return "Go on with the same command and --resume."
    return "No epoch was finished: run the same command again, with --overwrite."


def tell_failure(error, cfg, options, begun):
    """Print in a line or two why the run ended and what to do; return the exit status.

    What all processes meet, the first one of each computer tells. An error that is no user's
    mistake, machine's failure or signal, but the script's, is raised again.
    """
    text, status = str(error).strip(), 1
    caught = re.match(r"Caught (\w+) in DataLoader worker", text)
    if caught:  # its own line stands below a worker's traceback
        text = re.findall(rf"^{caught[1]}: (.*)$", text, re.M)[-1]
    way_on = choose_way_on(cfg, options, begun)
    ended = process_number("WORLD_SIZE") > 1 and re.search("Connection (closed|reset)", text)
    killed = "DataLoader worker (pid" in text or isinstance(error, ConnectionError | EOFError)
    (first_line, *_), lost = text.split("\n"), "a worker process was killed, most likely since "
    lost += "memory, or /dev/shm, ran out.\nFirst lower --num-workers."
    causes = (  # the first that is true is told
        (ended, "another process of the run has ended."),
        ("shared memory" in text or "Bus error" in text, f"{SHARED_MEMORY}."),
        (killed, f"{lost} {OUT_OF_MEMORY}"),
        (lacks_memory(error), f"memory ran out ({first_line}).\n{OUT_OF_MEMORY}"),
        (caught or isinstance(error, OSError), text),
    )
    cause = next((told for true, told in causes if true), None)
    if stop_signals or isinstance(error, KeyboardInterrupt):
        number = signal.Signals((stop_signals or [signal.SIGINT])[0])
        told, status = f"Interrupted ({number.name}). {way_on}", 128 + number
    elif isinstance(error, ValueError | FileNotFoundError) and not begun:
        told, status = f"Error: {text}", 2
    elif isinstance(error, FloatingPointError):  # says itself what to do
        told = f"Error: {text}"
    elif cause is not None:
        told = f"Error: {cause}\n{way_on}"
    else:
        raise error
    if process_number("LOCAL_RANK") == 0 or (status == 1 and not ended):
        log.error("%s", told)
    elif status == 2:  # torchrun ends all processes with the first one, which has to tell
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    return status


def folds(cfg):
    """Return the runs of all folds, and those of them that have begun."""
    top = Path(cfg.OUTPUT_DIR).parent
    runs = [Run(top / f"fold-{fold}") for fold in range(1, cfg.FOLDS + 1)]
    begun = [r for r in runs if not r.stale.exists() and (r.last.exists() or r.scores.exists())]
    return runs, begun


def require_same_folds(cfg, options):
    """Raise a ValueError where folds not begun would have other settings than those that go on."""
    runs, begun = folds(cfg)
    options.given.pop("FOLD")  # each has its own
    for run in begun if len(begun) < len(runs) else ():
        now, goes_on = asdict(cfg), run.last.exists()  # else it is finished, and left alone
        if goes_on:
            content = read_checkpoint(run.last, CHECKPOINT_KEYS + LAST_KEYS)
            then = asdict(restore_config(content, run.last, cfg, options))
        else:
            then = settings_of(read_json(run.scores)["config"], {})
        now |= {} if any(now["PIX_DIM"]) else {"PIX_DIM": then["PIX_DIM"]}
        compared = names(Split, Grid, Network, Training) - {"FOLD"}
        compared |= names(Data, Length, Decision) if goes_on else set()
        differ = list_differences(then, now, compared)
        told = f"{run.folder} has other settings than folds not begun would have: "
        told += ", ".join(f"{name} {words(then[name])}, not {words(now[name])}" for name in differ)
        way = "Give --resume with all flags of the first command, and these as they are to be."
        require(not differ, f"{told}\n{way}")


def run_folds(argv, cfg):
    """Run all folds one after another; return the highest exit status, at once above 1."""
    status, goes_on, (runs, begun) = 0, "--resume" in argv, folds(cfg)
    anew = not goes_on and "--check" not in argv and {"--overwrite", "--demo"} & {*argv}
    for fold, run in enumerate(runs, 1):
        own = [*argv, "--fold", str(fold)]
        if goes_on and run not in begun:
            own = [word for word in own if word != "--resume"] + ["--overwrite"]
        elif goes_on and not run.last.exists():
            if first_process():
                print(f"{run.folder}: finished, left alone (without {run.last.name})")
            continue
        status = max(status, main(own, every_fold=True, stale=runs[fold:] if anew else ()))
        if status > 1 or dist.is_initialized():  # after an error of this process
            break
    return status


def main(argv=None, every_fold=False, stale=()):
    """Run what the command line asks for; return the exit status.

    `every_fold`: as one of all; `stale`: the runs that it will replace after this one.
    """
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    with logging_to_screen(), stopping_on_signals():
        cfg = options = work = None
        try:
            cfg, options = parse_command_line(argv)
            trained, all_folds = options.evaluate or options.predict, options.every_fold
            options.every_fold |= every_fold  # this is one of them
            if all_folds and options.resume:
                require_same_folds(cfg, options)
            if not all_folds:
                with joined_processes(cfg):
                    told = "the processes do not agree on whether there is a run to go on with"
                    require(len({*gather([options.resume])}) == 1, told)
                    work = (set_up_trained if trained else set_up_training)(cfg, options)
                    for run in stale if first_process() else ():
                        if run.results():
                            write_file(run.stale, "")
                    status = work()
                    wait_for_all()  # torchrun ends all when one has ended with another status
                    return status
        except (*FAILURES, KeyboardInterrupt) as error:
            status = tell_failure(error, cfg, options, begun=work)
            traceback.clear_frames(error.__traceback__)  # they hold loaders: ends the workers
            return status
    return run_folds(argv, cfg)


if __name__ == "__main__":
    sys.exit(main())
