"""Train a 3D network that segments perivascular spaces (PVS) in T2-weighted brain MRI.

    python train_pvs.py --data-dir DIR   train, test and draw on a BIDS folder such as ds005595
    python train_pvs.py --check          look the data over, print what a run would use, stop
    python train_pvs.py --demo           the whole pipeline on simulated heads: CPU, minutes
    python train_pvs.py --resume         go on after an interruption
    python train_pvs.py --evaluate       test and draw again from the best weights
    python train_pvs.py --predict SCAN   segment new scans, files or BIDS folders
    torchrun --nproc_per_node=4 train_pvs.py   the same on several GPUs

The file reads in the order of a run: Config > Machine > Screen and files > Data > Transforms >
Cache and loaders > Model > Loss and metrics > Inference > Checkpoints > Training > Evaluation >
Figures > Demo data > Main. Two grids occur: the *native grid* of a scan file, and the *working
grid* (RAS, `PIX_DIM`, cropped to the head) on which the network lives. Every score names its grid.
"""

import argparse
import copy
import csv
import errno
import fcntl
import functools
import gzip
import hashlib
import http.client
import importlib.metadata
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import platform
import re
import shutil
import signal
import stat
import struct
import sys
import textwrap
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
import torch
from monai import transforms as mt
from monai.data import MetaTensor, list_data_collate
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from monai.networks.nets import DynUNet
from scipy import ndimage, stats
from sklearn.model_selection import KFold, train_test_split
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

with warnings.catch_warnings():  # its timm 0.9.7 imports what is deprecated
    warnings.simplefilter("ignore")
    import segmentation_models_pytorch_3d as smp

matplotlib.use("Agg")  # figures go to files; no screen is needed
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

nib.imageglobals.logger.setLevel(logging.CRITICAL)  # its remarks name no file
matplotlib.rcParams["text.parse_math"] = False  # a name may hold a $
# Of letters that the font lacks, and of headers that are checked here; MONAI's of its own call.
warnings.filterwarnings("ignore", "Glyph .* missing|Extension size")
warnings.filterwarnings("ignore", ".*always_return_as_numpy.*", FutureWarning)
warnings.filterwarnings("ignore", "Grad strides do not match")  # channels-last costs one copy
log = logging.getLogger("train_pvs")

# ------------------------------------------------------------------------------------------ Config


@dataclass(frozen=True)
class Config:
    """All settings with the published values; each is a flag too (`BATCH_SIZE`: `--batch-size`)."""

    # Data
    DATA_DIR: str = "/home/ubuntu/FMRI_Perivascular_Space_Dataset/ds005595-1.0.0"  # BIDS folder
    OUTPUT_DIR: str = "outputs_3d"  # everything a run writes goes below it
    CACHE_DIR: str = ""  # prepared volumes; empty: OUTPUT_DIR/cache
    IMAGE_GLOB: str = "sub-*/**/anat/*_T2w.nii*"  # scans in DATA_DIR; ** also finds ses-* folders
    LABEL_GLOB: str = "derivatives/mask/sub-*/**/sub-*_desc-mask_PVS.nii*"  # masks, PVS where > 0
    TEST_FRACTION: float = 0.05  # of all subjects, rounded up
    VAL_FRACTION: float = 0.0526  # of the other subjects, rounded up
    SPLIT: str = ""  # JSON file with the subjects of train, val and test; empty: drawn with SEED
    FOLDS: int = 0  # of a cross-validation, in which each subject is tested once; 0: none
    FOLD: int = 0  # the one of FOLDS that this run tests, from 1 on; results in OUTPUT_DIR/fold-N
    SEED: int = 123  # of split, first weights, crops, augmentation and demo data
    # Working grid
    PIX_DIM: tuple = (1.5, 1.5, 1.5)  # spacing, mm; 0 0 0: the training scans' own, their median
    INTENSITY_PERCENTILES: tuple = (0.5, 99.5)  # of the voxels in the head, taken to 0 and 1
    LABEL_RESAMPLING: str = "nearest"  # or soft: train on the part of each voxel that is PVS
    # Patches
    IMG_PATCH_SIZE: tuple = (96, 96, 96)  # voxels; sides are multiples of 2**ENCODER_DEPTH
    CROPS_PER_VOLUME: int = 4  # patches from a volume each time it is drawn
    POS_NEG_RATIO: float = 2.0  # patches centred on a PVS voxel for each one centred elsewhere
    CROP_SHIFT: float = 0.0  # patches centred on PVS move by up to this part of their size
    # Network
    ARCHITECTURE: str = "unetplusplus"  # unetplusplus or dynunet, which has no ENCODER_NAME
    ENCODER_NAME: str = "efficientnet-b7"  # efficientnet-b0 to efficientnet-b7
    ENCODER_WEIGHTS: str = "imagenet"  # imagenet, none, or a 2D EfficientNet's state dict file
    ENCODER_DEPTH: int = 5  # halvings of the patch
    DECODER_WIDTH: int = 16  # channels at full resolution, doubled at every halving
    BATCHNORM_MOMENTUM: float = 0.0  # of all BatchNorm layers; 0: the library's (encoder 0.01)
    HEAD_BIAS_LOG_ODDS: bool = False  # start at the training masks' log-odds of foreground
    INIT_FROM: str = ""  # a checkpoint whose weights training starts from; empty: none
    # Training
    EPOCHS: int = 1000  # at most
    BATCH_SIZE: int = 2  # volumes a step, each giving CROPS_PER_VOLUME patches
    ACCUMULATE_STEPS: int = 1  # batches averaged into one optimizer step, for smaller GPUs
    LR: float = 1e-3  # AdamW
    WEIGHT_DECAY: float = 1e-5  # AdamW
    GRAD_CLIP: float = 1.0  # largest norm of the gradient
    LR_FACTOR: float = 0.5  # ReduceLROnPlateau on the validation loss
    LR_PATIENCE: int = 5  # validations without a better loss before LR is reduced
    LR_MIN: float = 1e-6  # LR is not reduced below it
    VAL_EVERY: int = 1  # epochs between validations; the first and last have one always
    EARLY_STOPPING: int = 100  # validations without a better Dice before the run stops
    MAX_MINUTES: float = 0.0  # of training; the epoch in hand is finished; 0: no limit
    EMA_DECAY: float = 0.0  # moving average of the weights: the part kept in a step; 0: none
    TUNE_DECISION: bool = False  # choose THRESHOLD, SMALLEST_PVS on the validation scans
    # Inference
    SW_OVERLAP: float = 0.5  # of neighbouring windows, fraction of the patch
    SW_BATCH_SIZE: int = 4  # windows at once
    TTA_FLIPS: bool = False  # mean probability of the scan and its seven mirrored views
    THRESHOLD: float = 0.5  # a probability above it is PVS
    SMALLEST_PVS: float = 0.0  # mm3; smaller components are left out
    SAVE_PROBABILITIES: bool = False  # as float32 NIfTI files beside the predicted masks
    # Machine
    DEVICE: str = "auto"  # auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ...
    AMP: bool = True  # bfloat16 or float16 autocast where the hardware gains from it
    NUM_WORKERS: int = 8  # processes that prepare volumes and cut patches


LIMITS = {  # the smallest and the largest value that a number may have
    name: limits
    for limits, names in {
        (0, 2**32 - 1): "SEED",
        (0.001, 0.9): "TEST_FRACTION VAL_FRACTION",
        (0, 20): "PIX_DIM",
        (0, 100): "INTENSITY_PERCENTILES",
        (8, 1024): "IMG_PATCH_SIZE",
        (3, 5): "ENCODER_DEPTH",
        (1, 1000): "CROPS_PER_VOLUME BATCH_SIZE ACCUMULATE_STEPS SW_BATCH_SIZE DECODER_WIDTH",
        (1, 10**6): "EPOCHS VAL_EVERY EARLY_STOPPING",
        (0, 1): "BATCHNORM_MOMENTUM LR_MIN",
        (1e-9, 10): "LR",
        (0, 10): "WEIGHT_DECAY",
        (1e-6, 1e6): "GRAD_CLIP",
        (0.01, 0.99): "LR_FACTOR",
        (0, 0.9): "SW_OVERLAP",
        (0, 10**6): "MAX_MINUTES SMALLEST_PVS",
        (0, 0.5): "CROP_SHIFT",
        (0, 0.99999): "EMA_DECAY",
        (0.001, 0.999): "THRESHOLD",
        (0, 1000): "POS_NEG_RATIO LR_PATIENCE NUM_WORKERS FOLDS FOLD",
    }.items()
    for name in names.split()
}

SMALLEST_SIDE = 0.1  # mm, of the working grid's voxels

RECIPES = {  # named overrides of Config, chosen with --recipe
    "published": {},
    "native": {  # thin PVS: the scans' own grid, and a network that sees it; measured, see README
        "PIX_DIM": (0.0, 0.0, 0.0),
        "ARCHITECTURE": "dynunet",
        "ENCODER_DEPTH": 4,
        "DECODER_WIDTH": 32,
        "ENCODER_WEIGHTS": "none",
        "HEAD_BIAS_LOG_ODDS": True,
        "VAL_EVERY": 5,
        "EMA_DECAY": 0.95,
        "TUNE_DECISION": True,
        "TTA_FLIPS": True,
    },
    "demo": {  # minutes on a laptop's CPU; why these: see the README
        "TEST_FRACTION": 0.25,
        "VAL_FRACTION": 0.16,
        "PIX_DIM": (1.0, 1.0, 1.0),
        "IMG_PATCH_SIZE": (32, 32, 32),
        "ENCODER_NAME": "efficientnet-b0",
        "ENCODER_WEIGHTS": "none",
        "ENCODER_DEPTH": 3,
        "DECODER_WIDTH": 8,
        "BATCHNORM_MOMENTUM": 0.1,
        "HEAD_BIAS_LOG_ODDS": True,
        "EPOCHS": 18,
        "BATCH_SIZE": 1,
        "LR": 5e-3,
        "LR_PATIENCE": 0,
        "VAL_EVERY": 2,
        "SW_OVERLAP": 0.25,
        "NUM_WORKERS": 0,
    },
}

DECISION = ("TTA_FLIPS", "THRESHOLD", "SMALLEST_PVS")  # by which probabilities become masks

# What --evaluate and --predict may change; all other settings are those of the checkpoint.
NOT_OF_CHECKPOINT = (
    *("DATA_DIR", "OUTPUT_DIR", "CACHE_DIR", "IMAGE_GLOB", "LABEL_GLOB"),
    *("SW_BATCH_SIZE", "SAVE_PROBABILITIES", "DEVICE", "AMP", "NUM_WORKERS"),
    *DECISION,
)

# What --resume may change; all else decides what the network becomes.
NOT_OF_TRAINING = (
    *(*DECISION, "TUNE_DECISION"),
    *("EPOCHS", "MAX_MINUTES", "DATA_DIR", "OUTPUT_DIR", "CACHE_DIR", "IMAGE_GLOB", "LABEL_GLOB"),
    *("SPLIT", "SW_BATCH_SIZE", "SAVE_PROBABILITIES", "DEVICE", "NUM_WORKERS"),
)

# Files that the beginning of a training reads, not one that goes on; and what --evaluate and
# --predict do not read either.
STARTS = {"ENCODER_WEIGHTS": "none", "INIT_FROM": ""}
UNUSED = STARTS | {"SPLIT": ""}

HOW_TO_GET_DATA = """\
To get OpenNeuro ds005595 (200 subjects, 4 GB, CC0), one of:
  aws s3 sync --no-sign-request s3://openneuro.org/ds005595 ds005595-1.0.0
  openneuro-py download --dataset ds005595 --target-dir ds005595-1.0.0
  datalad install --get-data -s https://github.com/OpenNeuroDatasets/ds005595 ds005595-1.0.0
then: python train_pvs.py --data-dir ds005595-1.0.0
To see the pipeline work without any data: python train_pvs.py --demo"""


def build_parser():
    """Return the command line: a flag for each command, and one for each field of `Config`."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Exit status: 0 done, 1 failed or learned nothing, 2 wrong input, 130, 143 stopped.",
        allow_abbrev=False,
    )
    command = parser.add_mutually_exclusive_group()
    for flag, text in {
        "--check": "look the data over, print what a run would use, stop",
        "--resume": "go on after an interruption, to the same weights as without one",
        "--evaluate": "test and draw again; with another --data-dir, score each scan with a mask",
    }.items():
        command.add_argument(flag, action="store_true", help=text)
    text = "segment new scans: files, or BIDS folders; nothing is trained"
    command.add_argument("--predict", nargs="+", metavar="SCAN", help=text)
    text = "weights for --evaluate and --predict, of several the mean probability; default: "
    text += "OUTPUT_DIR/checkpoints/best_model.pth"
    parser.add_argument("--checkpoint", nargs="+", metavar="FILE", help=text)
    text = "replace the results in the output folder"
    parser.add_argument("--overwrite", action="store_true", help=text)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--recipe", choices=RECIPES, default="published", help="set of settings")
    demo = "recipe demo, on simulated heads that it makes itself"
    which.add_argument("--demo", action="store_true", help=demo)
    settings = parser.add_argument_group("settings, explained in Config")
    for field in fields(Config):
        kind = {"dest": field.name, "default": argparse.SUPPRESS}
        if isinstance(field.default, bool):
            kind["action"] = argparse.BooleanOptionalAction
        else:
            kind["metavar"] = "VALUE"
        if isinstance(field.default, tuple):
            kind["nargs"] = len(field.default)
        if field.name in LIMITS:
            kind["type"] = parse_number
        flag = "--" + field.name.lower().replace("_", "-")
        settings.add_argument(flag, help=f"default: {field.default}", **kind)
    return parser


def parse_number(word):
    """Return the number that a word spells, else the word, for `check_config` to tell."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


def parse_command_line(argv):
    """Return (Config, options); a flag wins over the recipe, the recipe over Config.

    Raises:
        ValueError: lists every wrong setting by the name of its field.
    """
    options, problems = build_parser().parse_args(argv), []
    options.recipe = "demo" if options.demo else options.recipe
    settings = dict(RECIPES[options.recipe])
    given = {name: value for name, value in vars(options).items() if name.isupper()}
    options.given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    settings |= options.given
    if options.checkpoint and not (options.evaluate or options.predict):
        problems.append("--checkpoint: expected together with --evaluate or --predict")
    if options.predict and process_number("WORLD_SIZE") > 1:
        problems.append("--predict: works in one process; start it without torchrun")
    chosen = {"THRESHOLD", "SMALLEST_PVS"} & set(options.given)
    if settings.get("TUNE_DECISION") and chosen:
        problems += [f"{name}: --tune-decision chooses it; give only one" for name in chosen]
    if options.demo:
        if "DATA_DIR" in settings:
            problems.append("DATA_DIR: --demo makes its data; for your own use --recipe demo")
        settings.setdefault("OUTPUT_DIR", "outputs_3d_demo")
        settings["DATA_DIR"] = str(Path(settings["OUTPUT_DIR"]) / "data")
    cfg = replace(Config(), **settings)
    problems += check_config(replace(cfg, **STARTS) if options.resume else cfg)
    if problems:
        raise ValueError("wrong settings:\n  " + "\n  ".join(problems))
    if cfg.FOLD:  # one cache for all folds
        folds = {"CACHE_DIR": str(cache_folder(cfg)), "OUTPUT_DIR": str(fold_folder(cfg, cfg.FOLD))}
        cfg = replace(cfg, **folds)
    return cfg, options


def fold_folder(cfg, fold):
    """Return where the results of a fold go."""
    return Path(cfg.OUTPUT_DIR) / f"fold-{fold}"


def check_places(cfg, expect):
    """Call `expect` with every setting that names files or folders."""
    for name in ("DATA_DIR", "OUTPUT_DIR", "IMAGE_GLOB", "LABEL_GLOB"):
        expect(name, getattr(cfg, name).strip(), "a value")
    for name in ("IMAGE_GLOB", "LABEL_GLOB"):
        expect(name, not Path(getattr(cfg, name)).is_absolute(), "a pattern below DATA_DIR")
    expect("SPLIT", not (cfg.SPLIT and cfg.FOLDS), "none together with FOLDS")
    expect("SPLIT", not cfg.SPLIT or os.path.isfile(cfg.SPLIT), "a JSON file that exists")
    out = fold_folder(cfg, cfg.FOLD) if cfg.FOLD else cfg.OUTPUT_DIR
    apart = os.path.realpath(out) != os.path.realpath(cfg.DATA_DIR)
    expect("OUTPUT_DIR", apart, "another folder than DATA_DIR")
    for name in ("OUTPUT_DIR", "CACHE_DIR"):  # torch maps no others into memory
        expect(name, not re.search("[\ud800-\udfff]", getattr(cfg, name)), "a name in UTF-8")
    known = cfg.ENCODER_WEIGHTS in ("imagenet", "none") or os.path.isfile(cfg.ENCODER_WEIGHTS)
    expect("ENCODER_WEIGHTS", known, "imagenet, none or a file that exists")
    known = not cfg.INIT_FROM or os.path.isfile(cfg.INIT_FROM)
    expect("INIT_FROM", known, "a checkpoint that exists")


def check_words(cfg, expect):
    """Call `expect` with every setting that is one of several words."""
    known = re.fullmatch("efficientnet-b[0-7]", cfg.ENCODER_NAME)
    expect("ENCODER_NAME", known, "efficientnet-b0 to efficientnet-b7")
    expect("ARCHITECTURE", cfg.ARCHITECTURE in NETWORKS, " or ".join(NETWORKS))
    expect("LABEL_RESAMPLING", cfg.LABEL_RESAMPLING in ("nearest", "soft"), "nearest or soft")
    expect("DEVICE", cfg.DEVICE.strip(), "a value")
    expect("DEVICE", device_works(cfg.DEVICE), "auto, cpu or a device of this machine")


def check_numbers(cfg, expect, wrong):
    """Call `expect` with the numbers that depend on others, but for those in `wrong`."""
    if not {"FOLDS", "FOLD"} & wrong:
        expect("FOLDS", cfg.FOLDS != 1, "2 or more, or 0")
        good = 1 <= cfg.FOLD <= cfg.FOLDS if cfg.FOLDS else cfg.FOLD == 0
        expect("FOLD", good, "a number from 1 to FOLDS, which may be 0 for none")
    if "PIX_DIM" not in wrong:
        good = not any(cfg.PIX_DIM) or min(cfg.PIX_DIM) >= SMALLEST_SIDE
        expect("PIX_DIM", good, f"numbers from {SMALLEST_SIDE}, or 0 0 0")
    if "INTENSITY_PERCENTILES" not in wrong:
        low, high = cfg.INTENSITY_PERCENTILES
        expect("INTENSITY_PERCENTILES", low < high, "a smaller and a larger number")
    if not {"IMG_PATCH_SIZE", "ENCODER_DEPTH"} & wrong:
        divisor = 2**cfg.ENCODER_DEPTH
        multiple = all(side % divisor == 0 for side in cfg.IMG_PATCH_SIZE)
        expect("IMG_PATCH_SIZE", multiple, f"multiples of {divisor} (2**ENCODER_DEPTH)")
        lone = set(cfg.IMG_PATCH_SIZE) == {divisor}
        several = cfg.CROPS_PER_VOLUME > 1 or not lone
        expect("CROPS_PER_VOLUME", several, "more than 1 with such small patches (BatchNorm)")
        larger = cfg.ARCHITECTURE != "dynunet" or not lone
        expect("IMG_PATCH_SIZE", larger, f"more than {divisor} for dynunet (its norm)")


def check_config(cfg):
    """Return a list with a sentence for each wrong setting, starting with the field's name."""
    problems = {}

    def expect(name, good, expected):
        """Note a sentence where a setting is not good, the first of each."""
        if not good and name not in problems:
            value = getattr(cfg, name)
            got = " ".join(map(str, value)) if isinstance(value, tuple) else value
            problems[name] = f"{name}: expected {expected}, got {one_line(got) or 'nothing'}"

    for name, (low, high) in LIMITS.items():
        kind = int if np.array(getattr(Config, name)).dtype.kind == "i" else (int, float)
        value = getattr(cfg, name)
        values = value if isinstance(value, tuple) else (value,)
        good = all(isinstance(number, kind) and low <= number <= high for number in values)
        expect(name, good, f"{'whole numbers' if kind is int else 'numbers'} from {low} to {high}")
    check_places(cfg, expect)
    check_words(cfg, expect)
    check_numbers(cfg, expect, set(problems))
    return list(problems.values())


def check_types(cfg):
    """Return a sentence for each setting of another type than its default's, in a checkpoint."""
    problems = []
    for field in fields(Config):
        value, kind = getattr(cfg, field.name), type(field.default)
        good = isinstance(value, kind) or (kind in (int, float) and not isinstance(value, tuple))
        if not good or (kind is tuple and len(value) != len(field.default)):
            problems.append(f"{field.name}: expected one like {field.default}, got {value}")
    return problems


def device_works(name):
    """Return whether torch can compute on the device of that name."""
    try:
        torch.zeros(1, device="cpu" if name == "auto" else name).item()
    except (RuntimeError, AssertionError, ImportError):
        return False
    return True


# ----------------------------------------------------------------------------------------- Machine


def process_number(name):
    """Return RANK, WORLD_SIZE or their LOCAL_ ones (of this computer) as torchrun gives them."""
    alone = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone[name]


def first_process():
    """Return whether this is process 0, which writes the run's files and shows progress."""
    return process_number("RANK") == 0


@contextmanager
def joined_processes(cfg):
    """Let the processes that torchrun has started work together, each on a GPU of its own."""
    if process_number("WORLD_SIZE") == 1:
        yield
        return
    backends = "gloo"
    if choose_device(cfg).type == "cuda":
        count = torch.cuda.device_count()
        if process_number("LOCAL_WORLD_SIZE") > count or cfg.DEVICE not in ("auto", "cuda"):
            told = f"expected auto or cuda, and at most {count} processes, one a GPU"
            raise ValueError(f"DEVICE: {told}, with torchrun")
        torch.cuda.set_device(process_number("LOCAL_RANK"))
        backends = "cpu:gloo,cuda:nccl"
    # Long, since a process may prepare its scans for hours; one that ends is noticed at once.
    dist.init_process_group(backends, timeout=timedelta(hours=12))
    yield
    dist.destroy_process_group()  # not after an error: other processes may hang


def share(items):
    """Return the part of a list that this process works on: every n-th item."""
    return items[process_number("RANK") :: process_number("WORLD_SIZE")]


def gather(part):
    """Return the whole list, in its order, of which every process has its `share`."""
    if process_number("WORLD_SIZE") == 1:
        return part
    parts = [None] * process_number("WORLD_SIZE")
    dist.all_gather_object(parts, part)
    longest = range(max(map(len, parts)))
    return [part[i] for i in longest for part in parts if i < len(part)]


def wait_for_all():
    """Return when all processes have come here."""
    if process_number("WORLD_SIZE") > 1:
        dist.barrier()


@contextmanager
def first_process_first():
    """Run the block in the first process, then in the others."""
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


def worker_count(cfg):
    """Return NUM_WORKERS, but no more than each process may use processors."""
    processors = len(os.sched_getaffinity(0))
    return min(cfg.NUM_WORKERS, processors // process_number("LOCAL_WORLD_SIZE") or 1)


def autocast_dtype(device, cfg):
    """Return the number format of the network's arithmetic; float32 means no autocast."""
    if device.type == "cuda" and cfg.AMP:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    # A CPU without such instructions emulates bfloat16, over ten times slower than float32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and cfg.AMP and native else torch.float32


def autocast(device, cfg):
    """Return the autocast context in which the network runs."""
    dtype = autocast_dtype(device, cfg)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


PROC, CONTROL_GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
MEMORY_FILES = (  # of a control group, version 2 and 1: limit, use, and where the page cache stands
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
)


def lacks_memory(error):
    """Return whether an error is that memory ran out, of the device or of this computer."""
    words = "out of memory|not enough memory|allocate memory|MemoryError"  # in RuntimeErrors
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


def peak_memory():
    """Return the most memory that this process has had, bytes."""
    # Not getrusage's: that knows what the program had that started this one.
    lines = (PROC / "self" / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def resident_memory():
    """Return the memory that this process has now, bytes."""
    pages = int((PROC / "self" / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_memory():
    """Return the bytes of memory that are free: the host's, or the container's where it has fewer.

    Of both versions of Linux's control groups; their page cache counts as free. Without a limit
    where there is no Linux.
    """
    if not (PROC / "meminfo").exists():
        return math.inf
    lines = (PROC / "meminfo").read_text().splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    for line in (PROC / "self" / "cgroup").read_text().splitlines():
        kinds, name = line.split(":", 2)[1:]
        if kinds and "memory" not in kinds.split(","):
            continue
        top, files = CONTROL_GROUPS / ("memory" if kinds else ""), MEMORY_FILES[bool(kinds)]
        inner = top / name.strip("/")
        for group in (inner, *inner.parents):
            with suppress(OSError, ValueError, StopIteration):  # no limit: the word max, or no file
                limit, used, counts = ((group / file).read_text() for file in files[:3])
                cached = next(x for x in counts.splitlines() if x.startswith(files[3] + " "))
                free.append(int(limit) - int(used) + int(cached.split()[1]))
    return min(free, default=math.inf)


def check_zip(path):
    """Raise BadZipFile where a file of `write_torch` is damaged: torch compares no checksums."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise zipfile.BadZipFile("wrong checksum")


OUT_OF_MEMORY = (
    "To need less: --sw-batch-size 1; in training also --batch-size 1 --accumulate-steps 2 (the "
    "recipe's step in two halves), or smaller --crops-per-volume or --img-patch-size."
)


received_signals = []  # that end the run, see `stopping_on_signals`
CLEAN_UP_SECONDS = 10  # after a signal, before the run ends all the same


@contextmanager
def stopping_on_signals():
    """Let SIGINT and SIGTERM end the run at the next Python instruction, a second one at once.

    That is after the step or window in hand, and also while data are loaded or cached.
    """

    run = os.getpid()

    def end_at_once(*_):
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(128 + received_signals[0])

    def ask_again(*_):
        signal.signal(signal.SIGALRM, end_at_once)
        signal.alarm(CLEAN_UP_SECONDS)
        raise KeyboardInterrupt  # the first may be lost in a destructor, in a long step

    def stop(number, _):
        received_signals.append(number)
        if len(received_signals) > 1 or os.getpid() != run:  # or a worker that has just begun
            end_at_once()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch calls a worker's end an error
        for child in multiprocessing.active_children():
            child.terminate()
        # The end of a loader waits for ever for a lock that a worker had when it ended.
        signal.signal(signal.SIGALRM, ask_again)
        signal.alarm(CLEAN_UP_SECONDS)
        raise KeyboardInterrupt

    def ignore(lost):  # what was raised in a destructor; Progress asks again
        if not received_signals:
            hook(lost)

    received_signals.clear()
    numbers = (signal.SIGCHLD, signal.SIGALRM, signal.SIGINT, signal.SIGTERM)
    former = {number: signal.getsignal(number) for number in numbers}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    hook, sys.unraisablehook = sys.unraisablehook, ignore
    try:
        yield
    finally:
        signal.alarm(0)
        sys.unraisablehook = hook
        for number, handler in former.items():
            signal.signal(number, handler)


def leave_signals_to_the_run(_):
    """Let a worker pass over Ctrl-C, which a terminal sends to all its processes; obey SIGTERM."""

    def leave(*_):
        received_signals.append(signal.SIGTERM)
        signal.alarm(1)  # once more: the first exit may be lost in a destructor
        sys.exit()  # leaves no file half written

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, leave)
    signal.signal(signal.SIGTERM, leave)


# -------------------------------------------------------------------------------- Screen and files


def count_words(count, what):
    """Return a number of things as text, 1 scan, 2 scans."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def size_words(count):
    """Return a number of bytes as text, 1.5 GB."""
    for unit, size in {"GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def one_line(text):
    """Return a text with escapes for what cannot be printed: file names may hold line ends."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def quote_names(record):
    """Put the words that a message is filled with on one line: file names may hold line ends."""
    record.args = tuple(one_line(x) if isinstance(x, str | Path) else x for x in record.args)
    return True


class RunLog(logging.FileHandler):
    """The log file of a run, and a lock that keeps other runs out of the output folder.

    It is held as long as this process lives: workers that outlive it do not inherit it.
    """

    def __init__(self, folder, name):
        for path in (folder / ".lock", folder / f"{name}.log"):
            if path.exists() and not path.is_file():
                raise OSError(f"{path} is no file")
        self.folder_lock = open(folder / ".lock", "a")  # noqa: SIM115, closed by `close`
        try:
            fcntl.lockf(self.folder_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            super().__init__(folder / f"{name}.log", encoding="utf-8", errors="backslashreplace")
        except OSError:
            self.folder_lock.close()
            raise

    def handleError(self, record):
        """End the run where the log cannot be written, unless it tells of a failure already."""
        self.setLevel(logging.CRITICAL + 1)  # it takes no more messages
        error = sys.exc_info()[1]
        if error.__context__ is None:
            raise OSError(f"{self.baseFilename}: cannot be written ({explain(error)})") from None

    def close(self):
        """Close the file and give the folder free."""
        with suppress(OSError):  # told by handleError
            super().close()
        self.folder_lock.close()


@contextmanager
def logging_to_screen():
    """Show messages on stdout, errors on stderr; `open_output_folder` adds a file."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # of a notebook, which prints all letters
            stream.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False  # a screen that is gone ends no run
    screen, errors = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    screen.addFilter(lambda record: record.levelno < logging.ERROR)
    errors.setLevel(logging.ERROR)
    log.setLevel(logging.INFO if first_process() else logging.ERROR)
    log.propagate = False
    log.addFilter(quote_names)
    log.addHandler(screen)
    log.addHandler(errors)
    try:
        yield
    finally:
        for handler in log.handlers[:]:
            log.removeHandler(handler)
            handler.close()


class Progress(tqdm):
    """A progress bar with the time left; where stderr is no terminal, a plain line now and then."""

    def __init__(self, items, title):
        every = 0.1 if sys.stderr.isatty() else 30  # seconds
        bar = {"leave": False, "disable": not first_process()}
        super().__init__(items, title, mininterval=every, maxinterval=every, **bar)

    def display(self, msg=None, pos=None):
        """Show the bar, or write it as a line while the work is under way."""
        if self.fp.isatty():
            super().display(msg, pos)
        elif 0 < self.n < self.total:
            self.fp.write(f"{self}\n")

    def __iter__(self):
        """Yield the items; end the run where Python lost a signal's exception in a destructor."""
        for item in super().__iter__():
            yield item
            if received_signals:
                raise KeyboardInterrupt


def write_file(path, data):
    """Write bytes or text so that the file appears whole or not at all, also after a power cut.

    Raises:
        OSError: names the file, what it takes and what is free; a former file is as it was.
    """
    path = Path(path)
    data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else memoryview(data)
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        sizes = f"it takes {size_words(len(data))}, {size_words(free_disk(path))} are free"
        told = f"{path}: cannot be written ({error.strerror}); {sizes}"
        raise OSError(f"{told}. A former file of that name is as it was.") from None


def sync_folder(folder):
    """Flush a folder to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_disk(path):
    """Return the bytes that are free where `path` lies or will lie."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def json_text(content):
    """Return JSON; a NaN, for which JSON has no word, is an error here and not the reader's."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_json(path, content):
    """Write `content` as a JSON file."""
    write_file(path, json_text(content))


def write_torch(path, content):
    """Write tensors and plain values so that `torch.load(path, weights_only=True)` reads them."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


# -------------------------------------------------------------------------------------------- Data

BOTH = ("image", "label")  # the volumes of a case
NIFTI = (".nii", ".nii.gz")
NIFTI2_STARTS = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # the header's size, 540, in both byte orders


def bids_entities(path):
    """Return a BIDS name's entities: sub-01_ses-2_T2w.nii.gz gives {"sub": "01", "ses": "2"}."""
    stem = Path(path).name.split(".nii")[0]
    return dict(part.split("-", 1) for part in stem.split("_") if "-" in part)


def name_case(path):
    """Return {"subject": "sub-01", "name": "sub-01[_ses-1..]", "image": path} of a scan file.

    The name holds all entities but `desc` and `label`; where there is no `sub`, the letters and
    digits of the file name make one.
    """
    found = bids_entities(path)
    if "sub" not in found:
        found = {"sub": Path(path).name.split(".nii")[0]}
    order = sorted(found, key=lambda key: (key != "sub", key != "ses"))  # the others stay
    order = [key for key in order if key.isalnum() and key not in ("desc", "label")]
    words = {key: re.sub("[^0-9A-Za-z]", "", found[key]) for key in order}
    name = "_".join(f"{key}-{word}" for key, word in words.items() if word)
    return {"subject": f"sub-{words['sub']}", "name": name, "image": str(path)}


def raise_problems(problems, remedy):
    """Raise one ValueError that lists all problems and ends with what to do; none, no error."""
    if problems:
        title = f"{count_words(len(problems), 'problem')} in the data:"
        lines = [title, *map(one_line, problems)]
        raise ValueError("\n  ".join(lines) + f"\n{remedy} Nothing was done.")


def find_files(folder, pattern):
    """Return the NIfTI files below `folder` that fit the glob, sorted.

    Raises:
        ValueError: no usable pattern.
    """
    try:
        found = sorted(Path(folder).glob(pattern))
    except (ValueError, IndexError, AttributeError, OSError, RuntimeError) as error:
        raise ValueError(f"{pattern}: expected a pattern for files ({explain(error)})") from None
    return [path for path in found if path.name.endswith(NIFTI)]


def find_cases(cfg):
    """Pair scans and masks.

    A mask fits a scan whose name holds all entities of the mask, `desc` and `label` apart. Scans
    without a mask are logged and left out.

    Returns:
        list of {"subject": "sub-001", "name": "sub-001[_ses-1..]", "image": path, "label": path}

    Raises:
        FileNotFoundError: no scan or no mask; says how to get the data.
        ValueError: lists names without sub-, masks without a scan, and masks or scans with more
            than one partner.
    """
    images = find_files(cfg.DATA_DIR, cfg.IMAGE_GLOB)
    labels = find_files(cfg.DATA_DIR, cfg.LABEL_GLOB)
    if not images or not labels:
        found = f"{len(images)} scans {cfg.IMAGE_GLOB}, {len(labels)} masks {cfg.LABEL_GLOB}"
        expected = f"{cfg.DATA_DIR}: expected scans and masks, found {found}"
        raise FileNotFoundError(f"{expected}\n{HOW_TO_GET_DATA}")
    remedy = "Remove or rename files, or narrow IMAGE_GLOB and LABEL_GLOB."
    nameless = [path for path in images + labels if "sub" not in bids_entities(path)]
    raise_problems([f"{path}: expected a name with sub-" for path in nameless], remedy)
    problems, masks_of = [], {image: [] for image in images}
    for label in labels:
        wanted = {k: v for k, v in bids_entities(label).items() if k not in ("desc", "label")}
        fitting = [image for image in images if wanted.items() <= bids_entities(image).items()]
        if len(fitting) == 1:
            masks_of[fitting[0]].append(label)
        else:
            found = " and ".join(map(str, fitting)) or "none"
            problems.append(f"{label}: expected one scan for this mask, found {found}")
    for image, masks in masks_of.items():
        if len(masks) > 1:
            found = " and ".join(map(str, masks))
            problems.append(f"{image}: expected one mask for this scan, found {found}")
        if not masks:
            log.warning("Warning: left out, no mask: %s", image)
    cases = [name_case(image) | {"label": str(m[0])} for image, m in masks_of.items() if m]
    raise_problems(problems + check_names(cases), remedy)
    return cases


LONGEST_NAME = 180  # letters; what is written adds some, and file systems take 255


def check_names(cases):
    """Return a sentence for each case of whose name no file can be named, or another's is."""
    problems, first = [], {}
    for case in cases:
        other = first.setdefault(case["name"], case)
        if not case["subject"].removeprefix("sub-"):
            problems.append(f"{case['image']}: expected letters or digits in the name")
        elif len(case["name"]) > LONGEST_NAME:
            told = f"expected a name of at most {LONGEST_NAME} letters"
            problems.append(f"{case['image']}: {told}")
        elif other is not case:
            clash = f"expected names that differ, both would give {case['name']}"
            problems.append(f"{other['image']} and {case['image']}: {clash}")
    return problems


def find_scans(words, cfg):
    """Return the cases (without a label) of files and BIDS folders that are to be segmented.

    Raises:
        ValueError: lists what is no scan, folders without scans, and scans whose predictions would
            bear one name.
    """
    paths, problems = [], []
    for word in words:
        found = [Path(word)] if word.endswith(NIFTI) and os.path.isfile(word) else []
        if os.path.realpath(word) == os.path.realpath(cfg.OUTPUT_DIR):
            problems.append(f"{word}: expected another folder than OUTPUT_DIR")
        if os.path.isdir(word):
            found = find_files(word, cfg.IMAGE_GLOB)
            if not found:
                told = f"expected scans {cfg.IMAGE_GLOB} in the folder (--image-glob names others)"
                problems.append(f"{word}: {told}")
        elif not found:
            problems.append(f"{word}: expected a .nii or .nii.gz file, or a BIDS folder")
        paths += found
    cases = [name_case(path) for path in paths]
    remedy = "Give NIfTI files and BIDS folders; scans that would bear one name in separate runs."
    raise_problems(problems + check_names(cases), remedy)
    return cases


READ_ERRORS = (  # of nibabel and gzip on damaged files
    *(OSError, EOFError, zlib.error, ValueError, TypeError, OverflowError),
    *(nib.spatialimages.HeaderDataError, nib.filebasedimages.ImageFileError),
    nib.wrapstruct.WrapStructError,
)
TORCH_ERRORS = (  # of torch.load on damaged files
    *(*READ_ERRORS, RuntimeError, LookupError, AttributeError, MemoryError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
)
VOXEL_SIDES, FARTHEST, LARGEST_EXTENT = (0.05, 20), 10_000, 500  # mm
LARGEST_VOLUME = 2**29  # voxels, 800 along each axis: what claims more is no scan of a head
HEADER_BYTES = 2**24  # a header with its extensions is shorter
SURPLUS_BYTES = 2**20  # behind the voxels: fewer are passed over with a warning


def open_volume(path):
    """Open a NIfTI file for reading its bytes, decompressed.

    Raises:
        OSError: no regular file (a pipe would never end), or one that cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "a folder, pipe or device in place of a file")
    return (gzip.open if str(path).endswith(".gz") else open)(path, "rb")


def explain(error):
    """Return why a file cannot be read, in a line."""
    if isinstance(error, FileNotFoundError):
        return "no such file, or a link to a missing one; with DataLad: datalad get"
    told = getattr(error, "strerror", None) or str(error).split(". ")[0] or type(error).__name__
    return one_line(" ".join(told.split()))[:200]


def read_header(path):
    """Return a NIfTI file as a nibabel image whose data are not read yet, and its 3D shape.

    Raises:
        ValueError: no NIfTI file of real numbers, not 3D (trailing axes of length 1 are accepted),
            or a size, voxel or affine that no scan has; names the file.
    """
    try:
        with open_volume(path) as file:
            start = file.read(540)  # NIfTI-2 has a header of that size, NIfTI-1 a shorter one
            kind = nib.Nifti2Image if start[:4] in NIFTI2_STARTS else nib.Nifti1Image
            header = kind.header_class(start[: kind.header_class.sizeof_hdr], check=False)
            check_raw_header(header)
            start += file.read(int(header["vox_offset"]))
        volume = kind.from_bytes(start)
    except READ_ERRORS as error:
        told = f"expected a NIfTI file, cannot be read ({explain(error)})"
        raise ValueError(f"{path}: {told}") from None
    shape = volume.shape[:3] + tuple(n for n in volume.shape[3:] if n != 1)
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"{path}: expected a 3D volume, got shape {volume.shape}")
    if math.prod(shape) > LARGEST_VOLUME:
        raise ValueError(f"{path}: expected at most {LARGEST_VOLUME} voxels, got shape {shape}")
    if volume.get_data_dtype().kind not in "iuf":
        got = volume.get_data_dtype()
        raise ValueError(f"{path}: expected voxels that are real numbers, got {got}")
    check_affine(path, volume.affine)
    extent = (nib.affines.voxel_sizes(volume.affine) * shape).round()
    if max(extent) > LARGEST_EXTENT:
        told = f"expected a field of view of at most {LARGEST_EXTENT} mm"
        raise ValueError(f"{path}: {told}, got {extent.tolist()}")
    return volume, shape


def check_raw_header(header):
    """Raise a ValueError for what nibabel would mend or read past in a NIfTI header."""
    size, offset = header.sizeof_hdr, header["vox_offset"]
    if header["sizeof_hdr"] != size or header["magic"].item()[:3] not in (b"n+1", b"n+2"):
        raise ValueError("expected the header of a single file, n+1 or n+2")
    if not size + 4 <= offset <= HEADER_BYTES:
        raise ValueError(f"expected vox_offset from {size + 4} to {HEADER_BYTES}, got {offset}")
    sides = header["pixdim"][1:4]
    if not (np.isfinite(sides).all() and min(sides) > 0):
        raise ValueError(f"expected voxel sides above 0 (pixdim), got {sides.tolist()}")


def check_affine(path, affine):
    """Raise a ValueError, which names the file, for an affine that no scanner gives."""
    sides, (low, high) = nib.affines.voxel_sizes(affine), VOXEL_SIDES
    with np.errstate(all="ignore"):
        flat = abs(np.linalg.det(affine[:3, :3] / sides))  # 1 for axes that stand upright
    if not (np.isfinite(affine).all() and flat > 0.1):
        told = f"expected an affine that can be inverted, got {affine.tolist()}"
        raise ValueError(f"{path}: {told}")
    if min(sides) < low or max(sides) > high:
        expected = f"expected voxel sides of {low} to {high} mm"
        raise ValueError(f"{path}: {expected}, got {sides.tolist()} (another unit?)")
    if abs(affine[:3, 3]).max() > FARTHEST:
        told = f"expected an affine with an offset of at most {FARTHEST} mm"
        raise ValueError(f"{path}: {told}, got {affine[:3, 3].tolist()}")


def ras_spacing(affine):
    """Return the voxel's sides (mm) along the axes that lie next to right, front and top."""
    order = np.argsort(nib.io_orientation(affine)[:, 0])
    return nib.affines.voxel_sizes(affine)[order].round(4).tolist()


def spacing_words(spacing):
    """Return a voxel's sides as text, 0.8 x 0.8 x 0.8 mm."""
    return f"{' x '.join(f'{mm:g}' for mm in spacing)} mm"


def affine_displacement(affine, other, shape):
    """Return how far apart two affines put a volume's corners at most, in voxels of the first."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1])).reshape(4, -1)
    moved = np.linalg.solve(affine, other @ corners)
    return float(np.linalg.norm((moved - corners)[:3], axis=0).max())


def check_headers(case):
    """Compare the headers of a scan and its mask.

    Returns:
        (problems, warnings), sentences: a file that is no readable volume, a mask whose shape is
        not the scan's or whose corners lie off by more than half a voxel; from a tenth of a voxel
        on, a warning.
    """
    headers, problems = [], []
    for key in BOTH:
        try:
            headers.append(read_header(case[key]))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        return problems, []
    (image, shape), (label, label_shape) = headers
    if shape != label_shape:
        return [f"{case['label']}: expected the scan's shape {shape}, got {label_shape}"], []
    shift = affine_displacement(image.affine, label.affine, shape)
    told = f"{case['label']}: its affine puts corners {shift:.2f} voxels from the scan's"
    if shift > 0.5:
        axes = ["".join(nib.aff2axcodes(volume.affine)) for volume, _ in headers]
        flipped = f" (axes {axes[1]}, the scan's are {axes[0]})" if axes[0] != axes[1] else ""
        return [f"{told}, expected at most 0.5{flipped}"], []
    return [], [f"{told}; the scan's is used for both"] if shift > 0.1 else []


def read_voxel_bytes(path, volume):
    """Return the file of a `volume` up to its last voxel, decompressed, and how many bytes follow.

    Of what the header does not announce no more than `SURPLUS_BYTES` is read. The end of a .gz file
    is reached, so that its checksum was compared.

    Raises:
        ValueError: shorter than the header says, damaged, or longer by more than that.
    """
    voxels = math.prod(volume.shape) * volume.get_data_dtype().itemsize
    size, content, surplus = volume.dataobj.offset + voxels, bytearray(), 0
    with open_volume(path) as file:
        while len(content) < size and (chunk := file.read(min(2**24, size - len(content)))):
            content += chunk  # grows with what is there, not with what the header claims
        if len(content) < size:
            raise ValueError(f"it ends after {len(content)} of {size} bytes")
        try:
            while chunk := file.read(2**16):
                surplus += len(chunk)
                if surplus > SURPLUS_BYTES:
                    raise ValueError(f"it goes on after the {size} bytes that its header tells of")
        except gzip.BadGzipFile as error:
            if "Not a gzipped file" not in str(error):  # which some bytes after the end are
                raise
            surplus += 1
    return content, surplus


def read_volume(path):
    """Read a NIfTI file to its last byte, the checksum included.

    Returns:
        (volume, warnings): MetaTensor (1, X, Y, Z) float32 on the native grid, with the file's
        scaling and affine; sentences

    Raises:
        ValueError: cut off, damaged or not finite; names the file.
    """
    header, shape = read_header(path)
    try:
        content, surplus = read_voxel_bytes(path, header)
        with np.errstate(all="ignore"):  # what becomes infinite is told below
            data = np.asarray(type(header).from_bytes(content).dataobj, dtype=np.float32)
    except READ_ERRORS as error:
        reason = f"cannot be read to its last byte ({explain(error)})"
        raise ValueError(f"{path}: {reason}; expected a whole file, copy it again") from None
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise ValueError(f"{path}: expected finite voxels, {bad} are NaN or infinite")
    volume = torch.from_numpy(data.reshape(1, *shape))
    cautions = [f"{path}: bytes after the last voxel are passed over"] if surplus else []
    return MetaTensor(volume, torch.from_numpy(header.affine)), cautions


def check_scan(path, image):
    """Raise a ValueError, which names the file, where a volume (1, X, Y, Z) shows no head.

    Neighbours in noise have nothing in common; in scans of heads they are nearly equal.
    """
    volume = np.asarray(image)[0]
    if volume.min() == volume.max():
        raise ValueError(f"{path}: expected a scan, all voxels are {volume.min():g}")
    right = volume[1::2, ::2, ::2].ravel().astype(float)
    left = volume[:-1:2, ::2, ::2].ravel().astype(float)
    if min(left.std(), right.std()) == 0 or np.corrcoef(left, right)[0, 1] < 0.2:
        raise ValueError(f"{path}: expected a head, got nothing but noise")


def check_mask(case, label, entry):
    """Compare a mask (X, Y, Z), native grid, with the head on the working grid of its entry.

    Returns:
        (problems, warnings), sentences
    """
    values, cautions = torch.unique(label[label > 0]).tolist(), []
    if not values:
        return [], []
    if len(values) > 1:
        some = ", ".join(f"{value:g}" for value in values[:5])
        cautions.append(f"{case['label']}: {len(values)} values ({some}), all count as PVS")
    voxels = np.argwhere(label.numpy() > 0)
    to_working = np.linalg.solve(entry["affine"], entry["native_affine"])
    places = nib.affines.apply_affine(to_working, voxels).round().astype(int)
    head = head_mask(entry["image"].float())[0]
    inside = np.all((places >= 0) & (places < head.shape), axis=1)
    hits = tuple(places[inside].T)
    if not head[hits].any() and not ndimage.binary_fill_holes(head)[hits].any():
        told = f"expected PVS in the head, all {len(voxels)} voxels lie outside"
        return [f"{case['label']}: {told}"], []
    if not inside.all():
        lost = f"{(~inside).sum()} of {len(voxels)} voxels lie outside the head and are left out"
        cautions.append(f"{case['label']}: {lost}")
    share = 100 * int(entry["label"].sum()) / head.sum()
    if share > 5:
        cautions.append(f"{case['label']}: {share:.1f} % of the head is PVS, expected less than 5")
    return [], cautions


def own_spacing(cases):
    """Return the median spacing (mm, RAS axes) of scans by their headers; 1 mm if none is readable.

    What cannot be read is told by `prepare_cases`.
    """
    sides = []
    for case in cases:
        with suppress(ValueError):
            sides.append(ras_spacing(read_header(case["image"])[0].affine))
    spacing = np.median(sides or [[1.0, 1.0, 1.0]], axis=0)
    return tuple(np.clip(spacing, SMALLEST_SIDE, LIMITS["PIX_DIM"][1]).round(4).tolist())


def split_cases(cases, cfg):
    """Divide the cases by subject into {"train": cases, "val": cases, "test": cases}.

    As the file SPLIT says, else drawn from the sorted subjects with SEED, at least one subject
    each. On the 200 subjects of ds005595 this is the published split. With FOLDS the test part is
    FOLD's, and the folds' test parts hold every subject once.

    Raises:
        ValueError: too few subjects, or no usable split file.
    """
    subjects = sorted({case["subject"] for case in cases})
    if cfg.SPLIT:
        split = read_split(cfg.SPLIT, subjects)
    else:
        try:
            rest, test = draw_test(subjects, cfg)
            train, val = train_test_split(rest, test_size=cfg.VAL_FRACTION, random_state=cfg.SEED)
        except ValueError:
            raise ValueError(
                f"{cfg.DATA_DIR}: expected at least 3 subjects with a mask, no fewer than FOLDS, "
                "and a TEST_FRACTION and VAL_FRACTION that leave some to train; got "
                f"{', '.join(subjects)}"
            ) from None
        split = {"train": train, "val": val, "test": test}
    return {part: [c for c in cases if c["subject"] in names] for part, names in split.items()}


def draw_test(subjects, cfg):
    """Return (the other subjects, those of the test part)."""
    if not cfg.FOLDS:
        return train_test_split(subjects, test_size=cfg.TEST_FRACTION, random_state=cfg.SEED)
    folds = KFold(cfg.FOLDS, shuffle=True, random_state=cfg.SEED).split(subjects)
    rest, test = list(folds)[cfg.FOLD - 1]
    return [subjects[number] for number in rest], [subjects[number] for number in test]


def read_split(path, subjects):
    """Return {"train": subjects, "val": .., "test": ..} from a JSON file.

    Subjects that it does not name are logged and left out.

    Raises:
        ValueError: no such lists, an empty list, unknown subjects, or one named twice.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        split = {part: [*map(str, content[part])] for part in ("train", "val", "test")}
        if any(isinstance(content[part], str) for part in split):
            raise TypeError("text in place of a list")
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        reason = "no JSON" if isinstance(error, ValueError | RecursionError) else explain(error)
        raise ValueError(f"{path}: expected lists train, val and test ({reason})") from None
    named = [subject for names in split.values() for subject in names]
    problems = [f"{part}: expected at least one subject" for part in split if not split[part]]
    problems += [f"{s}: named more than once" for s in sorted(set(named)) if named.count(s) > 1]
    problems += [f"{s}: no subject with a mask" for s in sorted(set(named) - set(subjects))]
    if problems:
        lines = map(one_line, problems)
        raise ValueError(f"{path}: not a usable split:\n  " + "\n  ".join(lines))
    for subject in sorted(set(subjects) - set(named)):
        log.warning("Warning: left out, not in %s: %s", path, subject)
    return split


# -------------------------------------------------------------------------------------- Transforms

CACHE_VERSION = 4  # raise it with a change of the deterministic transforms: older entries expire
BACKGROUND_SAMPLE = 100_000  # voxels kept as centres of negative patches; all would take 8 B each
INTERPOLATION = ("bilinear", "nearest")  # of image, label


def head_mask(image):
    """Return where the head is in a volume (1, H, W, D), as bool; everywhere if nothing stands out.

    Air is Rician noise above zero, so the threshold is a low fraction of the bright tissue;
    opening removes specks and the largest component is kept.
    """
    volume = np.asarray(image)[0]
    dark, bright = np.percentile(volume[::2, ::2, ::2], (1, 99))
    components, count = ndimage.label(
        ndimage.binary_opening(volume > dark + 0.15 * (bright - dark))
    )
    if count == 0:
        return np.ones_like(volume, dtype=bool)[None]
    return (components == 1 + np.argmax(np.bincount(components.ravel())[1:]))[None]


def scale_intensity(image, percentiles):
    """Return the volume with these percentiles of the head's voxels taken to 0 and 1, clipped."""
    low, high = np.percentile(np.asarray(image)[head_mask(image)], percentiles)
    return torch.clamp((image - low) / max(high - low, 1e-6), 0, 1)


def build_transforms(cfg):
    """Return the deterministic transforms, native grid (1, X, Y, Z) to working grid (1, H, W, D).

    The image ends in [0, 1], the label as 0 or 1; the label may be missing.
    """
    scale = functools.partial(scale_intensity, percentiles=cfg.INTENSITY_PERCENTILES)
    spacing = {"pixdim": cfg.PIX_DIM, "mode": INTERPOLATION, "dtype": torch.float32}
    crop = {"source_key": "image", "select_fn": head_mask, "margin": 2, "allow_smaller": True}
    return mt.Compose(
        [
            mt.AsDiscreted("label", threshold=1e-6, allow_missing_keys=True),
            mt.Orientationd(BOTH, axcodes="RAS", labels=None, allow_missing_keys=True),
            mt.Spacingd(BOTH, **spacing, allow_missing_keys=True),
            mt.CropForegroundd(BOTH, **crop, allow_missing_keys=True),
            mt.Lambdad("image", scale),
            mt.SpatialPadd(BOTH, spatial_size=cfg.IMG_PATCH_SIZE, allow_missing_keys=True),
        ]
    )


def build_train_transforms(cfg):
    """Return the random transforms: a cached volume to CROPS_PER_VOLUME patches, plain float32."""
    crop = {"spatial_size": cfg.IMG_PATCH_SIZE, "num_samples": cfg.CROPS_PER_VOLUME}
    crop |= {"pos": cfg.POS_NEG_RATIO, "neg": 1, "label_key": "label"}
    crop |= {"fg_indices_key": "foreground", "bg_indices_key": "background"}
    affine = {"rotate_range": (math.radians(15),) * 3, "scale_range": (0.1,) * 3}
    modes = ("bilinear", "bilinear") if cfg.LABEL_RESAMPLING == "soft" else INTERPOLATION
    affine |= {"mode": modes, "padding_mode": "border"}
    # Elastic: shifts of up to 2 % of the patch at 6^3 knots. Its defaults are blocky.
    elastic = {"spatial_size": cfg.IMG_PATCH_SIZE, "rand_size": (6, 6, 6), "def_range": 0.04}
    elastic |= {"field_mode": "trilinear", "align_corners": True}
    elastic |= {"grid_mode": modes, "grid_align_corners": True}
    return mt.Compose(
        [
            mt.RandCropByPosNegLabeld(BOTH, **crop),
            mt.EnsureTyped(BOTH, dtype=torch.float32),
            mt.RandAffined(BOTH, prob=0.3, **affine),
            mt.RandSmoothDeformd(BOTH, prob=0.2, **elastic),
            mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
            mt.RandGaussianNoised("image", prob=0.2, std=0.05),
            mt.EnsureTyped(BOTH, dtype=torch.float32, track_meta=False),
        ]
    )


# ------------------------------------------------------------------------------- Cache and loaders


def cache_folder(cfg):
    """Return where the prepared volumes lie."""
    return Path(cfg.CACHE_DIR or Path(cfg.OUTPUT_DIR) / "cache")


def cache_path(case, cfg):
    """Return where a case's prepared volume lies; other files or settings, another name."""
    stats = [(path, os.stat(path)) for path in (case["image"], case["label"])]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = (files, cfg.PIX_DIM, cfg.INTENSITY_PERCENTILES, cfg.IMG_PATCH_SIZE, cfg.SEED)
    key = (CACHE_VERSION, *key, cfg.LABEL_RESAMPLING)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return cache_folder(cfg) / f"{case['name']}-{digest}.pt"


def load_cached(case):
    """Return the cache entry (see `build_cache_entry`) of a prepared case, memory-mapped.

    Raises:
        OSError: it is gone or damaged; names it.
    """
    try:
        return torch.load(case["cache"], mmap=True, weights_only=True)
    except TORCH_ERRORS as error:
        told = f"{case['cache']}: the prepared volume is missing or damaged ({explain(error)})"
        raise OSError(f"{told}; the next run rebuilds it") from None


def to_working_grid(volumes, cfg):
    """Transform the MetaTensors (1, X, Y, Z) of an image and, where there is one, its label.

    Returns:
        image (1, H, W, D) float16 in [0, 1] and label (1, H, W, D) uint8, with LABEL_RESAMPLING
        soft also soft_label, float16; affine, native_affine (4, 4) and native_shape, with which
        `to_native_grid` goes back
    """
    native = {"native_affine": volumes["image"].affine.clone()}
    native["native_shape"] = tuple(volumes["image"].shape[1:])
    label, volumes = volumes.get("label"), build_transforms(cfg)(volumes)
    working = {"affine": volumes["image"].affine, "image": volumes["image"].as_tensor().half()}
    if label is not None:
        working["label"] = volumes["label"].as_tensor().to(torch.uint8)
        if cfg.LABEL_RESAMPLING == "soft":
            shape = working["image"].shape[1:]
            working["soft_label"] = occupancy(label, working["affine"], shape)
    return native | working


def occupancy(label, affine, shape):
    """Return the part of each working-grid voxel that a native mask (1, X, Y, Z) fills.

    (1, H, W, D) float16 in [0, 1]: the mean of samples that lie at least as close as the mask's
    voxels, interpolated linearly between these.
    """
    ratio = nib.affines.voxel_sizes(affine.numpy()) / ras_spacing(label.affine.numpy())
    finer = np.ceil(ratio.round(2)).astype(int)  # headers hold float32: 0.8 mm is a little more
    to_samples = nib.affines.from_matvec(np.diag(1 / finer), (1 / finer - 1) / 2)
    target = {"dst_affine": affine @ torch.from_numpy(to_samples)}
    target["spatial_size"] = (finer * shape).tolist()
    resample = mt.SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)
    samples = resample((label > 0).float(), **target).as_tensor()
    return nn.functional.avg_pool3d(samples, finer.tolist()).clamp(0, 1).half()


def to_native_grid(volume, entry):
    """Return a volume (1, H, W, D) of the working grid on the scan's own grid (1, X, Y, Z).

    Linear interpolation between the voxel centres; 0 outside the working grid. The two affines
    hold all that was done: orientation, spacing, crop and padding.
    """
    resample = mt.SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)
    volume = MetaTensor(volume, affine=entry["affine"])
    target = {"dst_affine": entry["native_affine"], "spatial_size": entry["native_shape"]}
    return resample(volume, **target).as_tensor()


def build_cache_entry(case, cfg):
    """Read, check and transform one case.

    Returns:
        the working-grid volumes and affines of `to_working_grid`; foreground and background: int32
        flat indices of all labelled voxels and of a seeded sample of the others; native_voxels:
        labelled on the native grid; native_spacing: mm, of the axes next to right, front and top;
        roundtrip_dice: native Dice of the label taken to the working grid and back, None if it is
        empty; sha256 and label_sha256 of the files' voxels; warnings: sentences

    Raises:
        ValueError: holds a sentence for each thing that is wrong with the files.
    """
    volumes, problems, cautions = {}, [], []
    for key in BOTH:
        try:
            volumes[key], found = read_volume(case[key])
            cautions += found
            if key == "image":
                check_scan(case[key], volumes[key])
        except ValueError as error:
            problems.append(str(error))
    label = volumes.get("label", torch.zeros(1))
    if not torch.equal(label, label.round()):
        problems.append(f"{case['label']}: expected whole numbers in a mask, got fractions")
    if problems:
        raise ValueError(*problems)
    label.affine = volumes["image"].affine  # check_headers bounds the difference
    hashes = [hash_voxels(volumes[key]) for key in BOTH]
    entry, values = to_working_grid(volumes, cfg), label[0].as_tensor()
    problems, found = check_mask(case, values, entry)
    if problems:
        raise ValueError(*problems)
    native_label = values > 0
    back = to_native_grid(entry["label"].float(), entry)[0] > 0.5  # as a probability
    dice = compute_dice(back[None, None], native_label[None, None], ignore_empty=False)
    background = (entry["label"] == 0).flatten().nonzero().flatten().to(torch.int32)
    order = torch.randperm(len(background), generator=torch.Generator().manual_seed(cfg.SEED))
    return entry | {
        "foreground": entry["label"].flatten().nonzero().flatten().to(torch.int32),
        "background": background[order[:BACKGROUND_SAMPLE]],
        "native_voxels": int(native_label.sum()),
        "native_spacing": ras_spacing(label.affine.numpy()),
        "roundtrip_dice": float(dice) if native_label.any() else None,
        "sha256": hashes[0],
        "label_sha256": hashes[1],
        "warnings": cautions + found,
    }


def hash_voxels(volume):
    """Return the hash of a native volume (1, X, Y, Z) by which it is known again."""
    return hashlib.sha256(np.ascontiguousarray(volume)).hexdigest()


def cache_entry(case, cfg):
    """Return the cache entry of a case; it is made where there is none or a damaged one."""
    with suppress(*TORCH_ERRORS):
        check_zip(case["cache"])
        return load_cached(case)
    write_torch(case["cache"], build_cache_entry(case, cfg))
    return load_cached(case)


def prepare_case(case, cfg):
    """Check a case and put it into the cache unless it is there.

    Returns:
        {"problems": sentences, "warnings": sentences, "failure": of writing, or "", "memory":
        bytes that it took}, and where all is well "case": with "cache",
        the entry's path, and the hashes of its voxels, "cache_bytes", "native_voxels" and
        "working_voxels": labelled, "native_spacing", "roundtrip_dice"
    """
    before = resident_memory()
    with suppress(OSError):
        (PROC / "self" / "clear_refs").write_text("5")  # let the peak start from here
    problems, cautions = check_headers(case)
    report = {"problems": problems, "warnings": cautions, "failure": ""}
    if not problems:
        try:
            check_size(case, cfg)
            case = case | {"cache": str(cache_path(case, cfg))}
            entry = cache_entry(case, cfg)
        except ValueError as error:
            report["problems"] = list(error.args)
        except OSError as error:  # told by the parent: a worker's own error is a traceback
            report["failure"] = str(error)
        else:
            facts = ("native_voxels", "native_spacing", "roundtrip_dice")
            report |= {key: entry[key] for key in facts}
            report["warnings"] = cautions + entry["warnings"]
            report["working_voxels"] = len(entry["foreground"])
            report["cache_bytes"] = Path(case["cache"]).stat().st_size
            report["case"] = case | {key: entry[key] for key in ("sha256", "label_sha256")}
    return report | {"memory": peak_memory() - before}


FIRST_CASES = 3  # by which the estimates of memory and disk are refined
CACHE_BYTES = 3.2  # a voxel: image 2, label 1, and 4 for each labelled one, of which 5 % are many
# Bytes a voxel of native and working grid, and bytes besides, as measured with scans of 2 and 20
# million voxels: to read, check and resample a scan; to test one (prediction, scores, figures).
PREPARING_BYTES, TESTING_BYTES = (40, 5, 60e6), (78, 6, 200e6)
STEP_FACTOR = 1.2  # of a training step, as measured, to what `step_memory` counts


def count_voxels(case, cfg):
    """Return the voxels of a scan, and of its working grid at most (uncropped), from its header.

    (0, 0) where it cannot be read: the pass over all voxels names such scans.
    """
    try:
        volume, shape = read_header(case["image"])
    except ValueError:
        return 0, 0
    order = np.argsort(nib.io_orientation(volume.affine)[:, 0])
    sides = ras_spacing(volume.affine) * np.array(shape)[order]
    working = np.maximum(np.ceil(sides / cfg.PIX_DIM) + 1, cfg.IMG_PATCH_SIZE)
    return math.prod(shape), math.prod(working.astype(int).tolist())


def check_size(case, cfg):
    """Raise a ValueError, which names the file, where the working grid would be immense."""
    voxels = count_voxels(case, cfg)[1]
    if voxels > LARGEST_VOLUME:
        expected = f"expected a scan of at most {LARGEST_VOLUME} voxels on the working grid"
        raise ValueError(f"{case['image']}: {expected} (PIX_DIM), got {voxels}")


def step_memory(model, cfg):
    """Return the bytes of a training step: weights, gradients, AdamW's states, what backward keeps.

    With EMA_DECAY the average too.
    Found by a forward pass on the meta device, which computes nothing; float32.
    """
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    shape = (cfg.BATCH_SIZE * cfg.CROPS_PER_VOLUME, 1, *cfg.IMG_PATCH_SIZE)
    patches = torch.empty(shape, device="meta")
    shadow = copy.deepcopy(model).to("meta").train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        shadow(patches)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    copies = 5 if cfg.EMA_DECAY else 4
    return copies * weights + sum(storage.nbytes() for storage in kept.values())


def estimate_cache(voxels, reports, cfg):
    """Return the bytes that the cache takes at most; with first reports, by what their cases took.

    `voxels`: by case as `count_voxels` has them.
    """
    per_voxel = CACHE_BYTES + 2 * (cfg.LABEL_RESAMPLING == "soft")
    bounds = [per_voxel * n + 4 * min(n, BACKGROUND_SAMPLE) for _, n in voxels]
    taken = [report.get("cache_bytes", 0) for report in reports]
    return sum(bounds) * (sum(taken) / sum(share(bounds)[: len(taken)]) if any(taken) else 1)


def estimate_memory(voxels, reports, base, step, cfg):
    """Return the bytes of memory that the run and its workers take at most, at any time.

    With first reports the preparation's part is known from what their cases took. `base`: of this
    process before; `step`: of a training step, where it takes place in this memory.
    """
    preparing, testing = (
        [native * per_native + working * per_working + fixed for native, working in voxels]
        for per_native, per_working, fixed in (PREPARING_BYTES, TESTING_BYTES)
    )
    taken = [r["memory"] / p for r, p in zip(reports, share(preparing), strict=False)]
    prepared = max(preparing) * max(taken, default=1) * max(worker_count(cfg), 1)
    return base + max(prepared, STEP_FACTOR * step, max(testing))


def cached_bytes(cases, cfg):
    """Return the bytes that the cache entries of these cases take by now."""
    total = 0
    for case in cases:
        with suppress(OSError):  # no entry yet, or no scan
            total += cache_path(case, cfg).stat().st_size
    return total


def tell_needs(cases, reports, base, step, cfg):
    """Print what the run takes of disk and memory at most, and what is free; warn of too little.

    Raises:
        ValueError: the cache will not find room, as the first cases show.
    """
    voxels, folder = [count_voxels(case, cfg) for case in cases], cache_folder(cfg)
    disk = estimate_cache(voxels, reports, cfg)
    processes = process_number("LOCAL_WORLD_SIZE")  # each takes as much of this machine
    memory = processes * estimate_memory(voxels, reports, base, step, cfg)
    left = free_disk(folder) + cached_bytes(cases, cfg)
    when, free = f"After {len(reports)} scans" if reports else "Needs at most", free_memory()
    sizes = map(size_words, (disk, left, memory, free))
    log.info("%-15s %s of disk (%s free) for the cache, %s of memory (%s free)", when, *sizes)
    if memory - processes * base > free:
        log.warning("Warning: memory may run out. First lower --num-workers. %s", OUT_OF_MEMORY)
    if disk > left and reports:
        told = f"{folder}: expected {size_words(disk)} of disk, {size_words(left)} are free"
        raise ValueError(f"{told}; free some, or choose another folder with --cache-dir")


def log_grids(reports, cfg):
    """Print the scans' spacing and what the working grid alone costs the masks."""
    spacings = [report["native_spacing"] for report in reports]
    log.info("Native grid     %s", ", ".join(sorted(set(map(spacing_words, spacings)))))
    dices = [report["roundtrip_dice"] for report in reports if report["native_voxels"]]
    if dices:
        numbers = f"{np.mean(dices):.3f} ({min(dices):.3f} to {max(dices):.3f})"
        log.info("Round trip      %s: native Dice of masks to the working grid and back", numbers)
    usual = np.clip(np.median(spacings, axis=0), SMALLEST_SIDE, LIMITS["PIX_DIM"][1])
    for report, ratio in zip(reports, spacings / usual, strict=True):
        if max(ratio.max(), 1 / ratio.min()) > 1.5:
            words = f"{spacing_words(report['native_spacing'])}, far from {spacing_words(usual)}"
            log.warning("Warning: %s has voxels of %s", report["case"]["image"], words)
    if (np.array(cfg.PIX_DIM) > 1.01 * usual).any():
        log.warning(
            "Warning: the working grid is coarser than the scans, %.1f times in voxel volume. What "
            "that costs thin PVS is told by Round trip; training with --pix-dim %s avoids it.",
            np.maximum(cfg.PIX_DIM / usual, 1).prod(),  # where finer elsewhere, nothing is gained
            " ".join(f"{mm:g}" for mm in usual),
        )


def keep_with_pvs(reports):
    """Return the cases with PVS on the working grid; log those that are left out."""
    kept = []
    for case, report in ((report["case"], report) for report in reports):
        if report["working_voxels"]:
            kept.append(case)
        elif report["native_voxels"]:
            lost = f"its {report['native_voxels']} voxels vanish on the working grid"
            log.warning("Warning: left out, %s: %s", lost, case["label"])
        else:
            log.warning("Warning: left out, empty mask: %s", case["label"])
    return kept


def keep_prepared(split, prepared, cfg):
    """Return the split with the prepared cases in place of its own; those that are not go.

    Raises:
        ValueError: a part has none left.
    """
    ready = {case["name"]: case for case in prepared}
    split = {p: [ready[c["name"]] for c in part if c["name"] in ready] for p, part in split.items()}
    bare = [name for name, part in split.items() if not part]
    if bare:
        expected = "expected masks with PVS on the working grid (LABEL_GLOB, PIX_DIM), none is left"
        remedy = "Choose other subjects with --split, or draw them with another --seed."
        raise ValueError(f"{cfg.DATA_DIR}: {expected} in {', '.join(bare)}. {remedy}")
    return split


def prepare_cases(cases, cfg, step=0, keep_empty=False):
    """Check every voxel of all cases and cache them, in one pass; return those with PVS, or all.

    What that and the rest of the run take is told before, and again after the first cases; `step`:
    bytes of a training step in this memory.

    Raises:
        ValueError: lists everything that is wrong with the files; or the disk is too small for the
            cache.
        OSError: the cache cannot be written.
    """
    needs = {"cases": cases, "reports": [], "base": resident_memory(), "step": step, "cfg": cfg}
    tell_needs(**needs)
    prepare = functools.partial(prepare_case, cfg=cfg)
    # Each case is a batch of its own; collate_fn runs in the workers.
    workers = {"num_workers": worker_count(cfg), "worker_init_fn": leave_signals_to_the_run}
    loader = DataLoader(share(cases), batch_size=None, collate_fn=prepare, **workers)
    for report in Progress(loader, "checking and caching"):
        needs["reports"].append(report)
        if len(needs["reports"]) == FIRST_CASES < len(cases):
            tell_needs(**needs)
    reports = gather(needs["reports"])
    raise_problems(
        [problem for report in reports for problem in report["problems"]],
        "Repair these files (a mask must be on its scan's grid) or move them elsewhere.",
    )
    for failure in filter(None, (report["failure"] for report in reports)):
        raise OSError(f"{failure}\nFree space, or choose another folder with --cache-dir.")
    for warning in (warning for report in reports for warning in report["warnings"]):
        log.warning("Warning: %s", warning)
    problems, cases, first = [], [report["case"] for report in reports], {}
    for case in cases:
        other = first.setdefault(case["sha256"], case)
        if other["subject"] != case["subject"]:
            problems.append(f"{case['image']}: expected other voxels than {other['image']} has")
    raise_problems(problems, "Remove copies: one could be trained on and the other tested.")
    log_grids(reports, cfg)
    return cases if keep_empty else keep_with_pvs(reports)


def shift_centres(foreground, shape, cfg, rng):
    """Return the flat indices of voxels off those of PVS, by up to CROP_SHIFT of the patch.

    A network that sees PVS in the middle of its patches only learns that they are there: see issue
    2045 of nnU-Net, https://github.com/MIC-DKFZ/nnUNet/issues/2045.
    """
    centres = np.stack(np.unravel_index(foreground.numpy(), shape), axis=1)
    reach = cfg.CROP_SHIFT * np.array(cfg.IMG_PATCH_SIZE)
    centres += np.rint(rng.uniform(-reach, reach, centres.shape)).astype(int)
    inside = np.clip(centres, 0, np.array(shape) - 1)
    return torch.from_numpy(np.ravel_multi_index(inside.T, shape))


class TrainingPatches(Dataset):
    """Training cases by (epoch, number); the patches are a function of SEED, epoch and number."""

    def __init__(self, cases, cfg):
        self.cases, self.cfg, self.transforms = cases, cfg, build_train_transforms(cfg)

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, key):
        epoch, number = key
        entry = load_cached(self.cases[number])
        item = {name: entry[name] for name in (*BOTH, "foreground", "background")}
        item["label"] = entry.get("soft_label", entry["label"])
        seed = np.random.SeedSequence([self.cfg.SEED, epoch, number]).generate_state(1)[0]
        if self.cfg.CROP_SHIFT:
            shape, rng = entry["image"].shape[1:], np.random.default_rng(seed)
            item["foreground"] = shift_centres(item["foreground"], shape, self.cfg, rng)
        self.transforms.set_random_state(seed=int(seed))
        return self.transforms(item | {"name": self.cases[number]["name"]})


class EpochSampler(Sampler):
    """Yield batches of (epoch, number), epoch after epoch without end, from `epoch` on.

    An epoch has every training case once, in an order drawn from SEED and the epoch. Several
    processes share it out; a few cases come twice where they would not have equally many.
    """

    def __init__(self, count, cfg):
        self.count, self.seed, self.batch_size, self.epoch = count, cfg.SEED, cfg.BATCH_SIZE, 1
        self.shared = math.ceil(count / process_number("WORLD_SIZE"))  # cases of this process

    def __len__(self):
        """Return the number of batches of one epoch."""
        return math.ceil(self.shared / self.batch_size)

    def __iter__(self):
        for epoch in itertools.count(self.epoch):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            order = np.resize(order, self.shared * process_number("WORLD_SIZE"))
            keys = [(epoch, int(number)) for number in share(order)]
            for start in range(0, len(keys), self.batch_size):
                yield keys[start : start + self.batch_size]


class TrainLoader(DataLoader):
    """A loader that gives the batches of `epoch`, while its workers go on with the next epoch's.

    So only a run's first epoch waits until workers have begun, and validations leave none idle.
    """

    epoch, batches, following = 1, None, None

    def __iter__(self):
        epoch = self.epoch
        if epoch != self.following:
            self.batch_sampler.epoch = epoch
            self.batches = super().__iter__()
        self.following = None  # what is broken off here is begun anew
        yield from itertools.islice(self.batches, len(self))
        self.following = epoch + 1


def build_train_loader(cases, cfg, device):
    """Return the loader of batches: BATCH_SIZE volumes' patches, (B, 1, *IMG_PATCH_SIZE)."""
    return TrainLoader(
        TrainingPatches(cases, cfg),
        batch_sampler=EpochSampler(len(cases), cfg),
        num_workers=worker_count(cfg),
        collate_fn=list_data_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_run,
        generator=torch.Generator(),  # so that it draws nothing from the model's random numbers
    )


# ------------------------------------------------------------------------------------------- Model


NETWORKS = {"unetplusplus": "unetpp", "dynunet": "dynunet"}  # and their names in BIDS' `desc`


def build_model(cfg):
    """Return the network that ARCHITECTURE names, on the CPU.

    Takes images (B, 1, H, W, D), in [0, 1] but for noise, and gives logits of that shape. The
    weights that are not pretrained are a function of SEED.

    Raises:
        ValueError: the encoder's weights cannot be had or do not fit.
    """
    torch.manual_seed(cfg.SEED)
    model = build_dynunet(cfg) if cfg.ARCHITECTURE == "dynunet" else build_unetplusplus(cfg)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d) and cfg.BATCHNORM_MOMENTUM > 0:
            module.momentum = cfg.BATCHNORM_MOMENTUM
    return model


def build_unetplusplus(cfg):
    """Return UNet++ (Zhou et al. 2018, 10.1007/978-3-030-00889-5_1) over its encoder.

    Its first features have half the resolution of the image.
    """
    model = smp.UnetPlusPlus(
        encoder_name=cfg.ENCODER_NAME,
        encoder_depth=cfg.ENCODER_DEPTH,
        encoder_weights=None,
        decoder_channels=[cfg.DECODER_WIDTH * 2**i for i in reversed(range(cfg.ENCODER_DEPTH))],
        in_channels=1,
        classes=1,
    )
    if cfg.ENCODER_WEIGHTS != "none":
        load_encoder_weights(model.encoder, encoder_weights_file(cfg))
    return model


def build_dynunet(cfg):
    """Return MONAI's U-Net after nnU-Net (Isensee et al. 2021, 10.1038/s41592-020-01008-z).

    It has skips at all resolutions, the image's included, instance norm and at most 320 channels.
    """
    levels = cfg.ENCODER_DEPTH + 1
    return DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        kernel_size=levels * [3],
        strides=[1, *(cfg.ENCODER_DEPTH * [2])],
        upsample_kernel_size=cfg.ENCODER_DEPTH * [2],
        filters=[min(cfg.DECODER_WIDTH * 2**i, 320) for i in range(levels)],
    )


def describe_network(cfg):
    """Return the network in the words that log and files show."""
    if cfg.ARCHITECTURE == "dynunet":
        channels = f"{cfg.DECODER_WIDTH} channels at full resolution"
        return f"DynUNet, {cfg.ENCODER_DEPTH + 1} levels, {channels}"
    return f"UNet++ with {cfg.ENCODER_NAME}"


def encoder_weights_file(cfg):
    """Return the file that ENCODER_WEIGHTS asks for; ImageNet's is downloaded once, hash checked.

    Raises:
        ValueError: the download failed; says both ways out.
    """
    if cfg.ENCODER_WEIGHTS != "imagenet":
        return Path(cfg.ENCODER_WEIGHTS)
    url = smp.encoders.encoders[cfg.ENCODER_NAME]["pretrained_settings"]["imagenet"]["url"]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        log.info("Downloading %s", url)
        sha256_start = path.stem.rsplit("-", 1)[1]  # these files bear it in their names
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256_start, sys.stderr.isatty())
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # or a wrong hash
            raise ValueError(
                f"ENCODER_WEIGHTS: the ImageNet weights could not be downloaded ({error}).\n"
                f"Either fetch {url}\nelsewhere and put it at {path},\n"
                "or start from random weights with --encoder-weights none."
            ) from None
    return path


def load_encoder_weights(encoder, path):
    """Load a 2D EfficientNet's state dict into the 3D encoder.

    The stem's RGB kernels are summed to one channel; the encoder copies every 2D kernel along the
    third axis and divides by its length there.

    Raises:
        ValueError: damaged or of another network; names the file.
    """
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        state["_conv_stem.weight"] = state["_conv_stem.weight"].sum(1, keepdim=True)
        encoder.load_state_dict(state)
    except TORCH_ERRORS as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise ValueError(
            f"{path}: expected the state dict of a 2D EfficientNet as ENCODER_NAME says; it is "
            f"damaged or of another network ({reason}).\n"
            "Remove or replace the file, or use --encoder-weights none."
        ) from None


def start_at_log_odds(model, cases, cfg):
    """Set the output's bias so that the first prediction is the training masks' mean."""
    entries = [load_cached(case) for case in cases]
    total = sum(entry["label"].numel() for entry in entries)
    labelled = sum(len(entry["foreground"]) for entry in entries)
    labelled = min(max(labelled, 1), total - 1)
    bias = [p for p in model.parameters() if p.shape == (1,)][-1]  # the output's: one channel
    nn.init.constant_(bias, math.log(labelled / (total - labelled)))


# -------------------------------------------------------------------------------- Loss and metrics

# 0.5 BCE + 0.5 Dice loss of logits and labels (B, 1, H, W, D), both float32. The Dice term is one
# over the whole batch, smoothed by 1, since a patch may hold no PVS (Milletari et al. 2016,
# 10.1109/3DV.2016.79).
loss_function = DiceCELoss(
    sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1, lambda_dice=0.5, lambda_ce=0.5
)

METRICS = {"dice": "Dice", "iou": "IoU", "precision": "precision", "recall": "recall"}
EMPTY_MASKS = (  # so that neither a missed nor an invented finding drops out of a mean
    "Ground truth and prediction both empty: dice, iou, precision, recall, sensitivity, f1 and nsd "
    "are 1, hd95 is 0. One of them empty: these are 0, hd95 is the diagonal of the scan. A ground "
    "truth that is empty on the working grid only counts as missed there: 0. "
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


def volume_ml(mask, affine):
    """Return the volume of a mask's voxels."""
    return float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


TOUCHING = np.ones((3, 3, 3))  # voxels of one PVS share a face, an edge or a corner
LESION_RULES = {"any": "any overlap", "iou": "IoU above 0.1"}  # what makes a PVS found


def calculate_lesion_metrics(pred, label):
    """Compare the 26-connected components (PVS) of two masks (X, Y, Z).

    A PVS counts as matched where any voxel of it lies in the other mask ("any"), or where its best
    single counterpart has an IoU above 0.1 ("iou"). Each side is counted on its own, so that no
    ratio exceeds 1, however PVS are split or merged. See EMPTY_MASKS.

    Returns:
        {"count_label", "count_pred"} and for both rules "matched_label_", "matched_pred_",
        "lesion_sensitivity_", "lesion_precision_", "lesion_f1_"
    """
    (true, true_count), (found, found_count) = (ndimage.label(m, TOUCHING) for m in (label, pred))
    true_sizes, found_sizes = np.bincount(true.ravel()), np.bincount(found.ravel())
    overlap = (true > 0) & (found > 0)
    pairs = np.stack([true[overlap], found[overlap]])
    (true_ids, found_ids), hits = np.unique(pairs, axis=1, return_counts=True)
    iou = hits / (true_sizes[true_ids] + found_sizes[found_ids] - hits)
    row = {"count_label": true_count, "count_pred": found_count}
    for rule, matches in {"any": iou > 0, "iou": iou > 0.1}.items():
        matched_label = len(np.unique(true_ids[matches]))
        matched_pred = len(np.unique(found_ids[matches]))
        both_empty = float(true_count == found_count == 0)
        sensitivity = matched_label / true_count if true_count else both_empty
        precision = matched_pred / found_count if found_count else both_empty
        row[f"matched_label_{rule}"], row[f"matched_pred_{rule}"] = matched_label, matched_pred
        row[f"lesion_sensitivity_{rule}"], row[f"lesion_precision_{rule}"] = sensitivity, precision
        total = sensitivity + precision
        row[f"lesion_f1_{rule}"] = 2 * sensitivity * precision / total if total else 0.0
    return row


def calculate_boundary_metrics(pred, label, spacing):
    """Compare the surfaces of two masks (X, Y, Z) of voxels with sides `spacing` (mm).

    Normalised surface Dice at a tolerance of the largest voxel side and of 1 mm (Nikolov et al.
    2021, 10.2196/26151), and the 95th percentile of the Hausdorff distance (mm), of surface
    voxels. One mask empty is the worst case, see EMPTY_MASKS: MONAI's own NaN would drop out.

    Returns:
        {"nsd_voxel", "nsd_1mm", "hd95_mm", "one_mask_empty"}
    """
    if not pred.any() or not label.any():
        same = not (pred.any() or label.any())
        diagonal = np.linalg.norm(np.multiply(spacing, pred.shape))
        row = {"nsd_voxel": float(same), "nsd_1mm": float(same)}
        return row | {"hd95_mm": 0.0 if same else float(diagonal), "one_mask_empty": not same}
    masks = [torch.from_numpy(mask)[None, None] for mask in (pred, label)]
    settings = {"include_background": True, "spacing": [float(mm) for mm in spacing]}
    row = {}
    for name, tolerance in {"nsd_voxel": max(spacing), "nsd_1mm": 1}.items():
        # A hair more, since a shift of one voxel comes out as one voxel only up to rounding.
        threshold = {"class_thresholds": [float(tolerance) * 1.0001], "use_subvoxels": True}
        row[name] = float(compute_surface_dice(*masks, **settings, **threshold))
    row["hd95_mm"] = float(compute_hausdorff_distance(*masks, percentile=95, **settings))
    return row | {"one_mask_empty": False}


# --------------------------------------------------------------------------------------- Inference


def network_input(image, device, cfg):
    """Return images (B, 1, H, W, D) on `device`, in the memory layout that was measured to be fast.

    The features follow it. On CPUs channels-last is faster with small networks and no slower with
    large ones, except in training in bfloat16, for the backward pass of depthwise convolutions. On
    an H100 it is slower, with efficientnet-b7 4 times in training and 11 times in inference.
    """
    slow = torch.is_grad_enabled() and autocast_dtype(device, cfg) != torch.float32
    layout = torch.contiguous_format if device.type != "cpu" or slow else torch.channels_last_3d
    # Not `contiguous`, which leaves images of one channel as they are.
    return image.to(device, non_blocking=True, memory_format=layout)


def blending_device(image, device):
    """Return where a volume's windows are blended: on the CPU where the GPU lacks room.

    The volume, the sum of the windows and that of their weights take 4 bytes a voxel each; four
    times that is asked for, since the network and the resampling need room too.
    """
    if device.type != "cuda":
        return device
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = torch.cuda.mem_get_info(device)[0] + idle
    return device if 4 * 12 * image.numel() < room else torch.device("cpu")


@torch.inference_mode()
def predict_logits(model, image, cfg):
    """Return the logits (1, 1, H, W, D) float32 of a volume (1, H, W, D), both on the working grid.

    Windows of IMG_PATCH_SIZE overlap and are blended with Gaussian weights; a smaller volume is
    padded. Puts the model into evaluation mode.
    """
    model.eval()
    device = next(model.parameters()).device
    place = blending_device(image, device)

    def predict_windows(windows):
        with autocast(device, cfg):
            return model(network_input(windows, device, cfg)).float()

    return sliding_window_inference(
        image[None].float().to(place),
        cfg.IMG_PATCH_SIZE,
        cfg.SW_BATCH_SIZE,
        predict_windows,
        overlap=cfg.SW_OVERLAP,
        mode="gaussian",
        sw_device=device,
        device=place,
    )


def predict_prob(model, image, cfg):
    """Return the probability of PVS of a volume (1, H, W, D), of that shape, working grid.

    It is the mean over the models of a ModuleList and, with TTA_FLIPS, over the volume's eight
    views, mirrored along none, one, two or all axes.
    """
    models = model if isinstance(model, nn.ModuleList) else [model]
    most = 3 if cfg.TTA_FLIPS else 0
    views = [axes for n in range(most + 1) for axes in itertools.combinations((1, 2, 3), n)]
    total = torch.zeros(())
    for part, axes in itertools.product(models, views):
        prob = torch.sigmoid(predict_logits(part, image.flip(axes), cfg)[0]).flip(axes)
        total = prob + total.to(prob.device)
    return total / (len(models) * len(views))


def predict_case(model, entry, cfg):
    """Return the probabilities of PVS on the working grid (H, W, D) and the native grid (X, Y, Z).

    `entry` holds the image and affines of `to_working_grid`. Both are float32 arrays. The
    probability goes to the native grid, not the mask: what it says between voxels is kept.
    """
    prob = predict_prob(model, entry["image"], cfg)
    return prob[0].cpu().numpy(), to_native_grid(prob, entry)[0].cpu().numpy()


def find_components(pred, affine):
    """Return the components of a mask (X, Y, Z), numbered from 1 on, and their sizes by number.

    In mm3; that of the background, 0, is 0.
    """
    components, _ = ndimage.label(pred, TOUCHING)
    voxel_mm3 = float(f"{1000 * volume_ml(np.ones(1), affine):.4g}")  # 1 and not 0.9999999
    sizes = np.bincount(components.ravel()) * voxel_mm3
    sizes[0] = 0
    return components, sizes


def decide(prob, affine, cfg):
    """Return the mask of a probability (X, Y, Z): above THRESHOLD, without what is too small."""
    pred = prob > cfg.THRESHOLD
    if cfg.SMALLEST_PVS:
        components, sizes = find_components(pred, affine)
        pred &= (sizes >= cfg.SMALLEST_PVS)[components]
    return pred


# Candidates of TUNE_DECISION, the default first: of equally good ones the first is taken.
THRESHOLDS = sorted((percent / 100 for percent in range(10, 95, 5)), key=lambda t: abs(t - 0.5))
SMALLEST = (0.0, 1.0, 2.0, 4.0, 8.0)  # mm3


def score_decisions(prob, label, affine):
    """Return the Dice (thresholds, smallest sizes) of what `decide` makes of a probability.

    `prob` and `label` (X, Y, Z), which is not empty.
    """
    dices = np.zeros((len(THRESHOLDS), len(SMALLEST)))
    for i, threshold in enumerate(THRESHOLDS):
        components, sizes = find_components(prob > threshold, affine)
        voxels = np.bincount(components.ravel())
        hits = np.bincount(components[label], minlength=len(sizes))
        for j, smallest in enumerate(SMALLEST):
            kept = (sizes >= smallest) & (np.arange(len(sizes)) > 0)
            dices[i, j] = 2 * hits[kept].sum() / (voxels[kept].sum() + label.sum())
    return dices


# ------------------------------------------------------------------------------------- Checkpoints


def package_versions():
    """Return the versions of Python and of the packages that make the numbers."""
    names = ("torch", "monai", "segmentation_models_pytorch_3d", "numpy", "scipy", "nibabel")
    versions = {name: importlib.metadata.version(name) for name in (*names, "scikit-learn")}
    return {"python": platform.python_version()} | versions


def list_hashes(split, key):
    """Return by part of the split {name: hash of the voxels} of its cases."""
    return {part: {case["name"]: case[key] for case in cases} for part, cases in split.items()}


def save_checkpoint(path, model, cfg, split, row, known=()):
    """Write the weights with all that using them takes.

    Config, working grid, package versions, the epoch's row of history, and by part of the split
    {name: sha256 of the voxels} of the scans, by which those of the training are known again;
    `known`: hashes of those that INIT_FROM was trained with.
    """
    grid = {"orientation": "RAS", "spacing_mm": cfg.PIX_DIM}
    config = asdict(cfg) | {"TUNE_DECISION": False}  # until that is done, after the training
    content = {"model": model.state_dict(), "config": config, "working_grid": grid}
    content |= {"sha256": list_hashes(split, "sha256"), "history_row": row}
    if known:
        content["sha256"]["before"] = {sha256: sha256 for sha256 in known}
    write_torch(path, content | {"versions": package_versions()})


def save_last(path, training, cfg, split, progress):
    """Write all that going on takes: states, Config, hashes of the data, progress."""
    content = {name: part.state_dict() for name, part in training.items()}
    content |= {key: list_hashes(split, key) for key in ("sha256", "label_sha256")}
    if progress["known"]:
        content["sha256"]["before"] = {sha256: sha256 for sha256 in progress["known"]}
    content |= {"config": asdict(cfg), "history_row": progress["history"][-1]}
    content["processes"] = process_number("WORLD_SIZE")
    write_torch(path, content | {"progress": progress, "versions": package_versions()})


CHECKPOINT_KEYS = ("model", "config", "sha256", "history_row")  # what using a checkpoint takes
LAST_KEYS = ("optimizer", "plateau", "scaler", "progress", "label_sha256")  # what going on takes


def read_checkpoint(path, keys=CHECKPOINT_KEYS):
    """Return the content of a checkpoint file.

    Raises:
        ValueError: missing, damaged or not of this script; names the file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise TypeError("a folder, pipe or device in place of a file")
        check_zip(path)
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
        parts = [content[key] for key in keys]
        parts += content["sha256"].values()
        row = content["history_row"]
        good = isinstance(row["epoch"], int) and isinstance(row["val_dice"], float | None)
        if not good or not all(isinstance(part, dict) for part in parts):
            raise TypeError("other content")
        hashes = [sha256 for part in content["sha256"].values() for sha256 in part.values()]
        if not all(isinstance(sha256, str) for sha256 in hashes):
            raise TypeError("other content")
        return content
    except FileNotFoundError:
        expected = "expected a checkpoint; train first, or name one with --checkpoint"
        raise ValueError(f"{one_line(path)}: no such file, {expected}") from None
    except TORCH_ERRORS as error:
        told = f"expected a checkpoint of this script, damaged or of another ({explain(error)})"
        raise ValueError(f"{one_line(path)}: {told}") from None


def read_last(cfg, split):
    """Return the content of `last.pth`, from which the run goes on.

    Raises:
        ValueError: there is none; or settings, scans, masks or the split differ, names each.
    """
    path = Path(cfg.OUTPUT_DIR) / "checkpoints" / "last.pth"
    content = read_checkpoint(path, keys=CHECKPOINT_KEYS + LAST_KEYS)
    problems, processes = [], process_number("WORLD_SIZE")
    if content.get("processes") != processes:
        told = f"the run has {content.get('processes')}, now there are {processes}"
        problems.append(f"processes (torchrun --nproc_per_node): {told}")
    names = [name for name in asdict(cfg) if name not in NOT_OF_TRAINING]
    for name in list_differences(content["config"], asdict(cfg), names):
        trained = content["config"].get(name, getattr(Config, name))
        problems.append(f"{name}: the run has {trained}, now it is {getattr(cfg, name)}")
    for key, kind in {"sha256": "scan", "label_sha256": "mask"}.items():
        for part, now in list_hashes(split, key).items():
            then = content[key][part]
            for name in sorted(set(now) | set(then)):
                if name not in now or name not in then:
                    change = "now missing" if name in then else "new"
                    problems.append(f"{name}: {change} in {part}")
                elif now[name] != then[name]:
                    problems.append(f"{name}: another {kind} than the run began with")
    if problems:
        told = "\n  ".join(dict.fromkeys(problems))
        raise ValueError(f"cannot resume, these differ from the run that was begun:\n  {told}")
    return content


def load_weights(model, content, path):
    """Load a checkpoint's weights into `model`.

    Raises:
        ValueError: they are of another network; names the file.
    """
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise ValueError(
            f"{path}: its weights do not fit the network it names ({reason})"
        ) from None
    if not all(weights.isfinite().all() for weights in model.state_dict().values()):
        raise ValueError(f"{path}: expected finite weights, some are NaN or infinite")


NETWORK_SETTINGS = ("ARCHITECTURE", "ENCODER_NAME", "ENCODER_DEPTH", "DECODER_WIDTH")


def list_differences(one, two, names):
    """Return the names of the settings in which two dicts of them differ.

    Settings that one of them lacks are Config's; dynunet has no ENCODER_NAME; lists are tuples.
    """
    one, two = (asdict(Config()) | settings for settings in (one, two))
    unused = "ENCODER_NAME" if one["ARCHITECTURE"] == two["ARCHITECTURE"] == "dynunet" else ""
    for settings in (one, two):
        settings |= {k: list(v) for k, v in settings.items() if isinstance(v, tuple)}
    return [name for name in names if one[name] != two[name] and name != unused]


def load_initial_weights(model, cfg):
    """Load the weights of INIT_FROM, where there is one, into the model.

    Returns:
        (hashes of the scans that these weights were trained on, and of those of their validation)

    Raises:
        ValueError: it is no checkpoint, or of another network, names what differs.
    """
    if not cfg.INIT_FROM:
        return [], []
    content = read_checkpoint(cfg.INIT_FROM)
    problems = []
    for name in list_differences(content["config"], asdict(cfg), NETWORK_SETTINGS):
        trained = one_line(content["config"].get(name, getattr(Config, name)))
        problems.append(f"{name}: the checkpoint has {trained}, now it is {getattr(cfg, name)}")
    if problems:
        told = "\n  ".join(problems)
        raise ValueError(f"{cfg.INIT_FROM}: of another network than this run's:\n  {told}")
    load_weights(model, content, cfg.INIT_FROM)
    parts = {part: sorted(hashes.values()) for part, hashes in content["sha256"].items()}
    return parts.get("train", []) + parts.get("before", []), parts.get("val", [])


def check_unseen(split, trained, validated, cfg):
    """Raise a ValueError where a scan is to be tested or validated on that INIT_FROM knows.

    `trained`, `validated`: as `load_initial_weights` returns them. Its validation scans may be
    those of this run too.
    """
    seen = [c for part in ("val", "test") for c in split[part] if c["sha256"] in trained]
    seen += [c for c in split["test"] if c["sha256"] in validated]
    told = f"for validation or test, but {cfg.INIT_FROM} was trained or chosen with it"
    remedy = "Choose other subjects with --split, or draw them with another --seed."
    raise_problems([f"{c['image']}: {told}" for c in seen], remedy)


def restore_config(content, cfg, given):
    """Return the checkpoint's Config with what may differ from it taken from `cfg`.

    `given` are the settings of the command line. The data's place and AMP are the checkpoint's
    unless given; folder of the results, cache and machine are those of `cfg`.

    Raises:
        ValueError: settings are given that only training could change; or the checkpoint has
            settings that Config has not.
    """
    known = {field.name for field in fields(Config)}
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in content["config"].items()}
    problems = [f"{name}: in the checkpoint, unknown here" for name in sorted(set(saved) - known)]
    for name, value in given.items():
        trained = saved.get(name, getattr(Config, name))
        if name not in NOT_OF_CHECKPOINT and value != trained:
            way = "--resume can" if name == "TUNE_DECISION" else "only training can change it"
            told = f"the checkpoint has {one_line(trained) or 'none'}, {way}"
            problems.append(f"{name}: {told}")
    of_run = ("DATA_DIR", "IMAGE_GLOB", "LABEL_GLOB", "AMP", *DECISION)  # unless given
    here = {k: getattr(cfg, k) for k in NOT_OF_CHECKPOINT if k not in of_run or k in given}
    known_here = {name: value for name, value in (saved | here).items() if name in known}
    restored = replace(Config(), **known_here)
    if {"THRESHOLD", "SMALLEST_PVS"} & set(given):
        restored = replace(restored, TUNE_DECISION=False)  # chosen by hand now
    problems += check_types(restored)
    if restored.PIX_DIM == (0, 0, 0):
        problems.append("PIX_DIM: expected the spacing of a working grid, got 0 0 0")
    problems += [] if problems else check_config(replace(restored, **UNUSED))  # not used again
    if problems:
        raise ValueError("wrong settings:\n  " + "\n  ".join(problems))
    return restored


# ---------------------------------------------------------------------------------------- Training


CHECK_SECONDS = 1  # between looks at the losses: each waits for what the GPU has still to do
LEAST_SCALE = 1e-4  # of float16's gradients: halved that often, they are not too large but broken


def check_finite(numbers, epoch):
    """See that losses and other numbers of the training are finite; they come off their device.

    `numbers`: (what it is, tensor of one number, the names of its batch's cases)

    Raises:
        FloatingPointError: one is not finite; names the cases.
    """
    values = torch.stack([value for _, value, _ in numbers]).tolist()
    for value, (what, _, names) in zip(values, numbers, strict=True):
        if not math.isfinite(value):
            where = f"in epoch {epoch} with {', '.join(sorted(set(names)))}"
            raise FloatingPointError(
                f"the {what} became {value} {where}. Nothing was saved from this epoch. Look at "
                "these scans, or start anew (--overwrite) with a lower --lr or --no-amp."
            )


def train_one_epoch(model, loader, optimizer, scaler, cfg):
    """Train once on patches of every case; the epoch is the loader's.

    The GPU is not waited for in every step: numbers are read every second and at the end.

    Returns:
        (mean loss, Dice of all the epoch's patches as one volume: not comparable to a case's)

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the weights are of no use then.
    """
    model.train()
    device, epoch = next(model.parameters()).device, loader.epoch
    losses, numbers, names = [], [], []
    next_look = time.monotonic() + CHECK_SECONDS
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # voxels: hits, found + true
    seeds = [cfg.SEED, epoch, process_number("RANK")]
    torch.manual_seed(np.random.SeedSequence(seeds).generate_state(1)[0].item())
    for step, batch in enumerate(Progress(loader, f"epoch {epoch}, training")):
        image = network_input(batch["image"], device, cfg)
        label = batch["label"].to(device, non_blocking=True)
        with autocast(device, cfg):
            logits = model(image)
        loss = loss_function(logits.float(), label)
        losses.append(loss.detach())
        numbers.append(("loss", losses[-1], batch["name"]))
        group_start = step - step % cfg.ACCUMULATE_STEPS
        group = min(cfg.ACCUMULATE_STEPS, len(loader) - group_start)
        names = batch["name"] if step == group_start else names + batch["name"]
        scaler.scale(loss / group).backward()
        if step + 1 == group_start + group:
            norm = update_weights(model, optimizer, scaler, cfg)
            numbers.append(("gradient", norm, names))
        pred, true = logits.detach() > 0, label > 0.5
        counts += torch.stack([(pred & true).sum(), pred.sum() + true.sum()])
        if time.monotonic() > next_look or step + 1 == len(loader):
            if scaler.get_scale() < LEAST_SCALE:
                numbers.append(("gradient", loss.new_tensor(math.nan), names))
            check_finite(numbers, epoch)
            numbers, next_look = [], time.monotonic() + CHECK_SECONDS
    hits, both = (sum(counts) for counts in zip(*gather([counts.tolist()]), strict=True))
    losses = gather(torch.stack(losses).tolist())
    return float(np.mean(losses)), 2 * hits / max(both, 1)


def update_weights(model, optimizer, scaler, cfg):
    """Make one optimizer step with the gradients at hand, clipped, and clear them.

    Returns:
        their norm, a tensor; 0 where float16's scaler passed over the step since they were too
        large for it
    """
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.GRAD_CLIP)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return torch.where(norm.isfinite(), norm, 0) if scaler.is_enabled() else norm


def validate(model, cases, cfg, epoch):
    """Return (mean loss, mean Dice) of the blended logits of whole volumes, working grid.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    losses, dices = [], []
    for case in Progress(share(cases), f"epoch {epoch}, validation"):
        entry = load_cached(case)
        logits, label = predict_logits(model, entry["image"], cfg).cpu(), entry["label"][None]
        loss = loss_function(logits, label.float())
        check_finite([("validation loss", loss, [case["name"]])], epoch)
        losses.append(float(loss))
        dices.append(calculate_metrics(logits > 0, label)["dice"])
    return float(np.mean(gather(losses))), float(np.mean(gather(dices)))


NOTHING_LEARNED = (
    "See whether the masks fit the scans, "
    "then try --head-bias-log-odds --batchnorm-momentum 0.1, a lower --lr, or no --ema-decay."
)


def share_gradients(model):
    """Return the model whose backward pass averages the gradients of all processes.

    Of BatchNorm on CUDA the statistics are those of all processes' patches; on CPUs, where that
    does not exist, those of the first process count.
    """
    if process_number("WORLD_SIZE") == 1:
        return model
    device = next(model.parameters()).device
    # Some layers of the encoder have no part in the output and get no gradient.
    settings = {"find_unused_parameters": True}
    if device.type == "cuda":
        settings["device_ids"] = [device.index]
    return nn.parallel.DistributedDataParallel(model, **settings)


def build_training(model, cfg):
    """Return what training changes: model, AdamW, its ReduceLROnPlateau, float16's scaler.

    With EMA_DECAY also "average", a model that follows the other after every step of AdamW. Not
    torch's AveragedModel: it makes the GPU wait in every step.
    """
    settings = {"lr": cfg.LR, "weight_decay": cfg.WEIGHT_DECAY, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=cfg.LR_FACTOR, patience=cfg.LR_PATIENCE, min_lr=cfg.LR_MIN
    )
    device = next(model.parameters()).device
    fp16 = autocast_dtype(device, cfg) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    training = {"model": model, "optimizer": optimizer, "plateau": plateau, "scaler": scaler}
    if cfg.EMA_DECAY:
        training["average"] = copy.deepcopy(model).requires_grad_(False)
        pairs = zip(weights_of(training["average"]), weights_of(model), strict=True)
        follow = functools.partial(average_weights, list(pairs), cfg.EMA_DECAY)
        optimizer.register_step_post_hook(follow)
    return training


def weights_of(model):
    """Return a model's parameters and BatchNorm's statistics, but for its counts of batches."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point()]


@torch.no_grad()
def average_weights(pairs, decay, *_):
    """Move every average towards the tensor that it is paired with."""
    for average, now in pairs:
        average.lerp_(now, 1 - decay)


def model_to_keep(training):
    """Return the model that is validated and saved: the moving average where there is one."""
    return training.get("average", training["model"])


def fit(model, cfg, split, last=None, known=()):
    """Train until EPOCHS, or until EARLY_STOPPING validations in a row brought no better Dice.

    The weights of the best validation Dice are in `checkpoints/best_model.pth`, always written
    after the first epoch; `last.pth` holds after every epoch all that going on takes, and `last`
    is its content. No random state is among it: all randomness is a function of SEED and epoch.
    While the Dice has never left 0 the run is not stopped early: with 0.1 % foreground it can stay
    there for long.

    Returns:
        the history: a dict an epoch with epoch, train_loss, train_dice, val_loss and val_dice
        (None where not validated), lr, seconds
    """
    device = next(model.parameters()).device
    loader = build_train_loader(split["train"], cfg, device)
    training = build_training(model, cfg)
    parallel = share_gradients(model)
    progress = {"best_dice": -1.0, "waited": 0, "history": [], "known": list(known)}
    if last:
        progress |= last["progress"]
        for name, part in training.items():
            if last.get(name):  # of a scaler that is in use now only, there is none
                part.load_state_dict(last[name])
    history = progress["history"]
    while len(history) < cfg.EPOCHS and not stops_early(progress, cfg):
        loader.epoch = len(history) + 1
        row = train_and_validate(parallel, loader, training, split["val"], history, cfg)
        history.append(row)
        progress["waited"] += row["val_dice"] is not None
        improved = row["val_dice"] is not None and row["val_dice"] > progress["best_dice"]
        if improved:
            progress |= {"best_dice": row["val_dice"], "waited": 0}
        if first_process():
            save_epoch(training, cfg, split, progress, improved)
        log_epoch(history, improved, cfg)
        if row["epoch"] == 50 and progress["best_dice"] == 0:
            log.warning("Warning: validation Dice is still 0; going on. %s", NOTHING_LEARNED)
    return history


def train_and_validate(parallel, loader, training, val_cases, history, cfg):
    """Train an epoch and, where it is due, validate; return its row of the history.

    `parallel`: the model as `share_gradients` has it.
    """
    optimizer, plateau, scaler = (training[k] for k in ("optimizer", "plateau", "scaler"))
    model = model_to_keep(training)
    start, epoch = time.perf_counter(), loader.epoch
    row = {"epoch": epoch, "val_loss": None, "val_dice": None}
    row["lr"] = optimizer.param_groups[0]["lr"]
    row["train_loss"], row["train_dice"] = train_one_epoch(parallel, loader, optimizer, scaler, cfg)
    if parallel is not training["model"]:  # BatchNorm's statistics, as the checkpoint has them
        for buffer in itertools.chain(training["model"].buffers(), model.buffers()):
            dist.broadcast(buffer, 0)
    seconds = gather([time.perf_counter() - start])[0]  # the first process's, for all
    row["seconds"] = round(seconds, 2)
    last = epoch == cfg.EPOCHS or time_is_up([*history, row], cfg)
    if epoch == 1 or last or epoch % cfg.VAL_EVERY == 0:
        row["val_loss"], row["val_dice"] = validate(model, val_cases, cfg, epoch)
        plateau.step(row["val_loss"])
        row["seconds"] = round(gather([time.perf_counter() - start])[0], 2)
    return row


def save_epoch(training, cfg, split, progress, improved):
    """Write the checkpoints and the history after an epoch, the best weights if they are."""
    out, history = Path(cfg.OUTPUT_DIR), progress["history"]
    if improved:
        best = out / "checkpoints" / "best_model.pth"
        save_checkpoint(best, model_to_keep(training), cfg, split, history[-1], progress["known"])
    write_json(out / "logs" / "training_history.json", history)
    # Last: a run that is killed before goes through the epoch again, and writes all of it again.
    save_last(out / "checkpoints" / "last.pth", training, cfg, split, progress)


def stops_early(progress, cfg):
    """Return, and print, whether EARLY_STOPPING or MAX_MINUTES ends the training."""
    if progress["waited"] >= cfg.EARLY_STOPPING and progress["best_dice"] > 0:
        log.info("Stopped early: no better validation Dice in %d validations", progress["waited"])
        return True
    if time_is_up(progress["history"], cfg):
        log.info("Stopped after %g minutes of training", cfg.MAX_MINUTES)
        return True
    return False


def time_is_up(history, cfg):
    """Return whether the epochs of a history took MAX_MINUTES."""
    return 0 < cfg.MAX_MINUTES <= sum(row["seconds"] for row in history) / 60


def log_epoch(history, improved, cfg):
    """Print the last epoch's row, `*` for the best validation Dice so far, and the time left."""
    row = history[-1]
    if len(history) == 1:
        log.info("epoch  train loss   Dice    val loss   Dice         LR  seconds  time left")
    loss, dice = ("-" if row[k] is None else f"{row[k]:.4f}" for k in ("val_loss", "val_dice"))
    mean_seconds = np.mean([r["seconds"] for r in history[-20:]])
    left = (cfg.EPOCHS - row["epoch"]) * mean_seconds
    if cfg.MAX_MINUTES:
        left = min(left, max(60 * cfg.MAX_MINUTES - sum(r["seconds"] for r in history), 0))
    minutes, seconds = divmod(round(left), 60)
    log.info(
        f"{row['epoch']:5d} {row['train_loss']:11.4f} {row['train_dice']:6.4f} {loss:>11} "
        f"{dice:>6}{'*' if improved else ' '} {row['lr']:9.1e} {row['seconds']:8.1f} "
        f"{minutes // 60:4d}:{minutes % 60:02d}:{seconds:02d}"
    )


# -------------------------------------------------------------------------------------- Evaluation


def describe_grid(cfg):
    """Return the working grid in the words that every table, file and figure shows."""
    return f"working grid, RAS, {spacing_words(cfg.PIX_DIM)}"


def data_set_name(cfg):
    """Return the name that the data set gives itself; simulated data is called so by it."""
    path = Path(cfg.DATA_DIR) / "dataset_description.json"
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        if path.is_file():
            name = json.loads(path.read_text(encoding="utf-8"))["Name"]
            return one_line(" ".join(str(name).split()))[:200]
    return one_line(Path(cfg.DATA_DIR).resolve().name)


def score_case(case, entry, working_pred, pred, label):
    """Return a case's scores as one flat row.

    `working_pred` (H, W, D) on the working grid; `pred` and `label` (X, Y, Z) on the native grid,
    the label as its file has it; all bool.
    """
    affine, working_label = entry["native_affine"].numpy(), entry["label"][0].numpy() > 0
    row = {"name": case["name"], "subject": case["subject"]}
    row |= calculate_metrics(working_pred, working_label)
    if label.any() and not working_label.any():
        row |= dict.fromkeys(METRICS, 0.0)
    row["working_label_voxels"] = int(working_label.sum())
    row["working_pred_voxels"] = int(working_pred.sum())
    row |= {f"native_{name}": score for name, score in calculate_metrics(pred, label).items()}
    row |= {"roundtrip_dice": entry["roundtrip_dice"]} | calculate_lesion_metrics(pred, label)
    for side, mask in {"label": label, "pred": pred}.items():
        row[f"volume_ml_{side}"] = volume_ml(mask, affine)
    for burden in ("count", "volume_ml"):
        true, error = row[f"{burden}_label"], row[f"{burden}_pred"] - row[f"{burden}_label"]
        row[f"{burden}_error"] = error
        row[f"{burden}_error_percent"] = 100 * error / true if true else None
    return row | calculate_boundary_metrics(pred, label, nib.affines.voxel_sizes(affine))


RESAMPLES = {"n_resamples": 10_000, "vectorized": True}


def mean_of_scans(sums, counts, axis=-1):
    """Return the mean over scans from the sums and numbers of subjects."""
    return sums.sum(axis) / counts.sum(axis)


def summarise(rows, key, seed):
    """Return the distribution of a score over cases, without those where it is None.

    SD with ddof 0, as published. The interval is the bootstrap's for the mean, 95 %, seeded, from
    subjects that are resampled with all their scans; None below two subjects.

    Returns:
        {"mean", "sd", "median", "q1", "q3", "ci95": [low, high], "n", "undefined": how many None}
    """
    scans_of = {}
    for row in rows:
        if row[key] is not None:
            scans_of.setdefault(row["subject"], []).append(row[key])
    known, interval = [value for values in scans_of.values() for value in values], None
    if len(scans_of) > 1:
        sums = np.array([sum(values) for values in scans_of.values()], dtype=float)
        counts = np.array([len(values) for values in scans_of.values()], dtype=float)
        settings = {"paired": True, "rng": np.random.default_rng(seed), **RESAMPLES}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of subjects whose means are all equal
            result = stats.bootstrap((sums, counts), mean_of_scans, method="BCa", **settings)
        interval = list(map(float, result.confidence_interval))
        if not np.isfinite(interval).all():
            interval = np.percentile(result.bootstrap_distribution, (2.5, 97.5)).tolist()
    numbers = [None] * 5
    if known:
        numbers = [np.mean(known), np.std(known), *np.percentile(known, (50, 25, 75))]
        numbers = map(float, numbers)
    summary = dict(zip(("mean", "sd", "median", "q1", "q3"), numbers, strict=True))
    return summary | {"ci95": interval, "n": len(known), "undefined": len(rows) - len(known)}


def pearson_r(label, pred, axis=-1):
    """Return Pearson's correlation; NaN where one side is constant."""
    return stats.pearsonr(label, pred, axis=axis).statistic


def lin_ccc(label, pred, axis=-1):
    """Return Lin's concordance correlation (Lin 1989, 10.2307/2532051); NaN if nothing varies."""
    shift = label.mean(axis) - pred.mean(axis)
    centred = [values - values.mean(axis, keepdims=True) for values in (label, pred)]
    spread = label.var(axis) + pred.var(axis) + shift**2
    scale = (label**2).mean(axis) + (pred**2).mean(axis)
    defined = spread > 1e-12 * scale  # rounding alone gives some spread
    return np.where(defined, 2 * (centred[0] * centred[1]).mean(axis) / spread, np.nan)


def agreement(label, pred, seed):
    """Return how two measurements of the same cases agree.

    Pearson's r and Lin's concordance; the Bland-Altman bias (prediction minus ground truth) and its
    limits of agreement, 1.96 SD (ddof 1) around it (Bland and Altman 1986,
    10.1016/S0140-6736(86)90837-8). All None below 3 cases, r also where one side is constant. The
    intervals of r and concordance are the bootstrap's percentiles, 95 %, of the resamples that
    leave them defined; None below 10 cases, where too many resamples hold two or three of them.
    """
    label, pred = np.array(label, dtype=float), np.array(pred, dtype=float)
    result = dict.fromkeys(("bias", "limits_of_agreement"))
    for name, statistic in {"pearson_r": pearson_r, "lin_ccc": lin_ccc}.items():
        result |= {name: None, f"{name}_ci95": None}
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of constant sides
            value = float(statistic(label, pred)) if len(label) >= 3 else math.nan
            if math.isfinite(value):
                result[name] = value
            if math.isfinite(value) and len(label) >= 10:
                settings = {"paired": True, "method": "percentile", **RESAMPLES}
                rng = np.random.default_rng(seed)
                drawn = stats.bootstrap((label, pred), statistic, rng=rng, **settings)
                limits = np.nanpercentile(drawn.bootstrap_distribution, (2.5, 97.5))
                result[f"{name}_ci95"] = limits.tolist()
    if len(label) >= 3:
        error = pred - label
        bias, reach = float(error.mean()), float(1.96 * error.std(ddof=1))
        result |= {"bias": bias, "limits_of_agreement": [bias - reach, bias + reach]}
    return result


def aggregate(rows, cfg):
    """Return the blocks of summaries over the rows of all test cases."""

    def summaries(keys):
        return {name: summarise(rows, key, cfg.SEED) for name, key in keys.items()}

    def total(key):
        return sum(row[key] for row in rows)

    native = {"grid": "native grid of each scan"}
    lesions = native | {key: total(key) for key in ("count_label", "count_pred")}
    for rule, meaning in LESION_RULES.items():
        ratios = {name: f"lesion_{name}_{rule}" for name in ("sensitivity", "precision", "f1")}
        sides = {side: total(f"{side}_{rule}") for side in ("matched_label", "matched_pred")}
        lesions[rule] = {"matched_where": meaning, **sides, **summaries(ratios)}
    burden = dict(native)
    for name in ("count", "volume_ml"):
        kinds = {kind: f"{name}_{kind}" for kind in ("label", "pred", "error", "error_percent")}
        label, pred = ([row[kinds[side]] for row in rows] for side in ("label", "pred"))
        burden[name] = summaries(kinds) | agreement(label, pred, cfg.SEED)
    surfaces = {name: name for name in ("nsd_voxel", "nsd_1mm", "hd95_mm")}
    return {
        "working": {"grid": describe_grid(cfg)} | summaries({name: name for name in METRICS}),
        "native": native | summaries({name: f"native_{name}" for name in METRICS}),
        "roundtrip": native | summaries({"dice": "roundtrip_dice"}),
        "lesions": lesions | {"connectivity": 26},
        "burden": burden,
        "boundary": native | summaries(surfaces) | {"one_mask_empty": total("one_mask_empty")},
    }


def write_test_metrics(folder, rows, weights, model, cfg):
    """Write the scores of all test cases, with their origin, as JSON and CSV; return the blocks.

    `weights`: {"file", "epoch", "val_dice"} of the checkpoint, or a list of several.
    """
    content = {"data_set": data_set_name(cfg), "grid": describe_grid(cfg), "n": len(rows)}
    for name in METRICS:  # as published
        values = [row[name] for row in rows]
        content[f"{name}_mean"] = float(np.mean(values))
        content[f"{name}_std"] = float(np.std(values))
    blocks = aggregate(rows, cfg)
    content |= {"empty_masks": EMPTY_MASKS, **blocks, "subjects": rows}
    content |= {"config": asdict(cfg), "versions": package_versions()}
    content["checkpoint"] = weights
    content["device"] = str(next(model.parameters()).device)
    content["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(Path(folder) / "comprehensive_test_metrics.json", content)
    write_csv(Path(folder) / "test_metrics.csv", rows)
    return blocks


def write_cross_validation(cfg):
    """Write the scores of all folds that are finished, beside their folders; return the blocks.

    As JSON and as CSV: `cross_validation.json` has the blocks of the test metrics over all
    subjects of these folds.
    """
    top = Path(cfg.OUTPUT_DIR).parent
    with open(top / ".lock", "a") as lock:  # folds may end at once
        fcntl.lockf(lock, fcntl.LOCK_EX)
        found = read_folds(top, cfg)
        rows = [{"fold": fold} | row for fold, subjects in found.items() for row in subjects]
        blocks = aggregate(rows, cfg)
        content = {"data_set": data_set_name(cfg), "grid": describe_grid(cfg), "n": len(rows)}
        content |= {"folds": cfg.FOLDS, "finished": list(found), "empty_masks": EMPTY_MASKS}
        write_json(top / "cross_validation.json", content | blocks | {"subjects": rows})
        write_csv(top / "cross_validation.csv", rows)
    return blocks, found


def read_folds(top, cfg):
    """Return {fold: rows of its test scans} of the finished folds of the same settings and data."""
    found, own = {}, {*NOT_OF_TRAINING, "FOLD", "AMP"} - {*DECISION, "TUNE_DECISION"}
    own |= {"THRESHOLD", "SMALLEST_PVS"} if cfg.TUNE_DECISION else set()  # each fold's own
    wanted = [name for name in asdict(cfg) if name not in own]
    for fold in range(1, cfg.FOLDS + 1):
        path = top / f"fold-{fold}" / "logs" / "comprehensive_test_metrics.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            same = not list_differences(content["config"], asdict(cfg), wanted)
            tested = {row["name"] for rows in found.values() for row in rows}
            again = tested & {row["name"] for row in content["subjects"]}
            if same and not again and content["data_set"] == data_set_name(cfg):
                found[fold] = content["subjects"]
            else:
                told = "Warning: not in the cross-validation, of other settings or data: %s"
                log.warning(told, path)
    return found


def log_cross_validation(blocks, found, cfg):
    """Print the means over all subjects of the finished folds, with their intervals."""
    log.info("\nCross-validation, %d of %d folds finished", len(found), cfg.FOLDS)
    for title, (block, name, _) in TEST_TABLE.items():
        row = blocks[block][name]
        if row["mean"] is not None:
            low, high = row["ci95"] or (math.nan, math.nan)
            log.info("%12s %8.4f (95 %% from %.4f to %.4f)", title, row["mean"], low, high)


def write_csv(path, rows):
    """Write dicts of the same keys as a table; None becomes an empty cell."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, buffer.getvalue())


TEST_TABLE = {  # the columns of the printed table: title, block and name in it, key of a row
    **{title: ("working", name, name) for name, title in METRICS.items()},
    "native Dice": ("native", "dice", "native_dice"),
    "round trip": ("roundtrip", "dice", "roundtrip_dice"),
    "NSD 1 mm": ("boundary", "nsd_1mm", "nsd_1mm"),
    "HD95, mm": ("boundary", "hd95_mm", "hd95_mm"),
}


def log_test_table(rows, blocks, cfg):
    """Print a row a case, then mean, SD and the mean's confidence interval, then the burden."""
    log.info("\nTest scores of %s, %s", count_words(len(rows), "scan"), data_set_name(cfg))
    log.info(
        "Dice, IoU, precision, recall: %s; the others: native grid of each scan", describe_grid(cfg)
    )
    table = [(row["name"], [row[key] for *_, key in TEST_TABLE.values()]) for row in rows]
    summaries = [blocks[block][name] for block, name, _ in TEST_TABLE.values()]
    ends = [summary["ci95"] or [None, None] for summary in summaries]
    table += [("mean", [s["mean"] for s in summaries]), ("SD", [s["sd"] for s in summaries])]
    table += [("95 % from", [low for low, _ in ends]), ("95 % to", [high for _, high in ends])]
    width = max(len(name) for name, _ in table)
    log.info(" " * width + "".join(f"{title:>12}" for title in TEST_TABLE))
    for name, values in table:
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        log.info(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells))
    lesions, volume = blocks["lesions"], blocks["burden"]["volume_ml"]
    f1 = [f"{lesions[rule]['f1']['mean']:.4f} ({LESION_RULES[rule]})" for rule in LESION_RULES]
    counts = f"{lesions['count_label']} in the ground truth, {lesions['count_pred']} predicted"
    log.info("PVS: %s; mean F1 %s", counts, ", ".join(f1))
    means = [f"{volume[side]['mean']:.3f} ml" for side in ("label", "pred")]
    log.info("Mean volume: %s in the ground truth, %s predicted", *means)
    log.info("Scans where one mask is empty: %d", blocks["boundary"]["one_mask_empty"])


GEOMETRY = """pixdim xyzt_units qform_code sform_code quatern_b quatern_c quatern_d
    qoffset_x qoffset_y qoffset_z srow_x srow_y srow_z"""  # what a NIfTI header says of the grid


def write_nifti(path, volume, scan_path):
    """Write an array (X, Y, Z) on the grid of a scan file: its affine, shape, q and sform codes.

    Raises:
        OSError: it cannot be written, or the scan is gone.
    """
    try:
        scan, _ = read_header(scan_path)
    except ValueError as error:
        raise OSError(str(error)) from None
    header = type(scan.header)()
    for name in GEOMETRY.split():
        header[name] = scan.header[name]
    header.set_data_dtype(volume.dtype)
    nifti = type(scan)(volume.reshape(scan.shape), None, header)
    write_file(path, gzip.compress(nifti.to_bytes(), 4, mtime=0))


def prediction_path(case, cfg, suffix="mask"):
    """Return where a case's prediction lies in the BIDS derivative `predictions`."""
    sessions = re.findall(r"_(ses-[^_]+)", case["name"])
    folder = Path(cfg.OUTPUT_DIR, "predictions", case["subject"], *sessions[:1], "anat")
    return folder / f"{case['name']}_label-PVS_desc-{NETWORKS[cfg.ARCHITECTURE]}_{suffix}.nii.gz"


def write_prediction(case, pred, prob, cfg):
    """Write a mask on the native grid, with SAVE_PROBABILITIES the probability too."""
    write_nifti(prediction_path(case, cfg), pred.astype(np.uint8), case["image"])
    if cfg.SAVE_PROBABILITIES:
        write_nifti(prediction_path(case, cfg, "probseg"), prob, case["image"])


def write_description(cases, cfg):
    """Write `predictions/dataset_description.json`, which names the data sets of the scans."""
    folders = [Path(case["image"]).resolve().parents for case in cases]
    marked = ([p for p in above if (p / "dataset_description.json").exists()] for above in folders)
    sources = {(found or above)[0] for found, above in zip(marked, folders, strict=True)}
    made = f"{describe_network(cfg)}, {describe_grid(cfg)}; probability on the native grid, "
    made += "mean of eight mirrored views, " if cfg.TTA_FLIPS else ""
    made += f"mask where above {cfg.THRESHOLD:g}"
    if cfg.SMALLEST_PVS:
        made += f", without components below {cfg.SMALLEST_PVS:g} mm3"
    content = {
        "Name": "Perivascular spaces (PVS), predicted",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "train_pvs.py", "Description": made}],
        "SourceDatasets": [{"URL": folder.as_uri()} for folder in sorted(sources)],
    }
    write_json(Path(cfg.OUTPUT_DIR) / "predictions" / "dataset_description.json", content)


# ----------------------------------------------------------------------------------------- Figures

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the axis of a RAS volume that a plane cuts
COUNTED_FROM = {"axial": "below", "coronal": "behind", "sagittal": "the left"}
SIDES = {"axial": "RL", "coronal": "RL", "sagittal": "AP"}  # at the left and right of a picture
COLOURS = {"ground truth": (1.0, 0.15, 0.1), "prediction": (0.1, 0.9, 0.2)}  # red, green


def busiest_slice(masks, axis):
    """Return the index of the slice with the most voxels of the first mask that is not empty.

    Half the axis where all are.
    """
    across = tuple(other for other in range(3) if other != axis)
    for mask in masks:
        if mask.any():
            return int(mask.sum(across).argmax())
    return masks[0].shape[axis] // 2


def turn_to_ras(volume, affine):
    """Return a volume (X, Y, Z) of a native grid with its axes turned, and only that, to RAS."""
    return nib.orientations.apply_orientation(volume, nib.io_orientation(affine))


def display_slice(volume, axis, index):
    """Return a slice of a RAS volume for imshow's origin "lower", as radiologists look at it.

    Axial and coronal: the subject's right is on the picture's left. Sagittal: anterior is there.
    """
    return np.flip(np.take(volume, index, axis), 0).T


def draw_row(axes, image, masks, titles, plane, spacing):
    """Draw a slice alone and under each mask, sides marked at the edges.

    `image` (2D, [0, 1]); `masks`: {"ground truth": 2D, "prediction": 2D} or one of them; `titles`:
    one a panel; `spacing`: mm, of a RAS volume.
    """
    across, up = (mm for axis, mm in enumerate(spacing) if axis != PLANES[plane])
    colours = [None, *(COLOURS[name] for name in masks)]
    for ax, mask, colour, title in zip(axes, [None, *masks.values()], colours, titles, strict=True):
        shown = np.repeat(image[..., None], 3, 2)
        if mask is not None:
            shown[mask] = 0.2 * shown[mask] + 0.8 * np.array(colour)
        ax.imshow(shown, origin="lower", interpolation="nearest", aspect=up / across)
        place = {"y": 0.5, "color": "white", "size": 8, "va": "center", "transform": ax.transAxes}
        ax.text(0.02, s=SIDES[plane][0], ha="left", **place)
        ax.text(0.98, s=SIDES[plane][1], ha="right", **place)
        ax.set_title(title, color="white", size=9)
        ax.set_axis_off()


def display_image(image, affine):
    """Return a scan (X, Y, Z) turned to RAS, its intensities taken to [0, 1] for the eye."""
    low, high = np.percentile(image[::3, ::3, ::3], (1, 99.8))
    return np.clip((turn_to_ras(image, affine) - low) / max(high - low, 1e-6), 0, 1)


def write_figure(path, figure, title):
    """Give the figure its title, write it as a 300-DPI picture and close it."""
    letters = int(12 * figure.get_figwidth())  # that fit into a line
    title = "\n".join(textwrap.fill(line, letters) for line in title.splitlines())
    figure.suptitle(title, color="black" if figure.get_facecolor()[0] else "white", size=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:], dpi=300)
    plt.close(figure)
    write_file(path, buffer.getbuffer())


def draw_multi_plane(path, image, masks, spacing, title):
    """Draw a RAS volume in three planes, alone and under each mask, where masks are largest.

    `image` (X, Y, Z) in [0, 1]; `masks`: {"ground truth": bool, "prediction": bool}, or one of
    them; `spacing`: mm.
    """
    panels = 1 + len(masks)
    size = {"figsize": (3 * panels, 10), "layout": "constrained", "facecolor": "black"}
    figure, axes = plt.subplots(3, panels, **size)
    for line, (plane, axis) in zip(axes, PLANES.items(), strict=True):
        index = busiest_slice([*masks.values()], axis)
        cuts = {name: display_slice(mask, axis, index) for name, mask in masks.items()}
        place = f"slice {index + 1} of {image.shape[axis]} from {COUNTED_FROM[plane]}"
        titles = [f"{plane}, {place}"]
        titles += [f"{name}, {cut.sum()} voxels" for name, cut in cuts.items()]
        draw_row(line, display_slice(image, axis, index), cuts, titles, plane, spacing)
    write_figure(path, figure, title)


def draw_case(case, image, affine, masks, title, cfg):
    """Draw masks over their scan, all (X, Y, Z) on the native grid.

    Returns:
        the axial slice with the largest mask, as `draw_test_grid` takes it
    """
    image, spacing = display_image(image, affine), ras_spacing(affine)
    masks = {name: turn_to_ras(mask, affine) for name, mask in masks.items()}
    path = Path(cfg.OUTPUT_DIR) / "multi_plane" / f"{case['name']}.png"
    draw_multi_plane(path, image, masks, spacing, title)
    axis = PLANES["axial"]
    index = busiest_slice([*masks.values()], axis)
    cuts = {name: display_slice(mask, axis, index).copy() for name, mask in masks.items()}
    place = f"slice {index + 1} of {image.shape[axis]} from {COUNTED_FROM['axial']}"
    return display_slice(image, axis, index).copy(), cuts, spacing, place


def describe_scores(row, affine, cfg):
    """Return the title of a test case's figure: its scores, each with its grid."""
    scores = "   ".join(f"{words} {row[f'native_{name}']:.3f}" for name, words in METRICS.items())
    burden = [f"{row[f'count_{s}']} PVS, {row[f'volume_ml_{s}']:.2f} ml" for s in ("label", "pred")]
    back, spacing = row["roundtrip_dice"], spacing_words(ras_spacing(affine))
    back = "undefined" if back is None else f"Dice {back:.3f}"
    lines = (
        f"{row['name']}   {scores}",
        f"native grid, {spacing}; the ground truth taken to the working grid and back: {back}",
        f"Dice {row['dice']:.3f} on the {describe_grid(cfg)}",
        f"{burden[0]} in the ground truth; {burden[1]} predicted",
        data_set_name(cfg),
    )
    return "\n".join(lines)


def draw_test_grid(path, rows, slices, cfg, most=10):
    """Draw the axial slice with the most PVS of every test case, a row each.

    `slices`: a case's (image, masks, spacing) as `draw_row` takes them, and which slice it is. Of
    more than `most` cases those are drawn that are evenly spread from worst to best native Dice.
    """
    ranked = sorted(range(len(rows)), key=lambda number: rows[number]["native_dice"])
    spread = np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)
    size = {"figsize": (9, 0.8 + 3.4 * len(spread)), "layout": "constrained", "facecolor": "black"}
    figure, axes = plt.subplots(len(spread), 3, squeeze=False, **size)
    for line, number in zip(axes, (ranked[place] for place in spread), strict=True):
        row, (image, masks, spacing, place) = rows[number], slices[number]
        told = f"prediction, Dice {row['native_dice']:.3f}"
        titles = (f"{row['name']}, {place}", "ground truth", told)
        draw_row(line, image, masks, titles, "axial", spacing)
    shown = f"{len(spread)} of {count_words(len(rows), 'test case')}, worst to best; native grid"
    write_figure(path, figure, f"{data_set_name(cfg)}\n{shown}")


def draw_agreement(path, rows, burden, cfg):
    """Draw predicted against true burden, and the Bland-Altman plot, of PVS count and volume."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 9), layout="constrained")
    for line, (name, words) in zip(axes, {"count": "PVS", "volume_ml": "ml"}.items(), strict=True):
        label, pred = (
            np.array([row[f"{name}_{side}"] for row in rows]) for side in ("label", "pred")
        )
        result = burden[name]
        told = {"r": result["pearson_r"], "concordance": result["lin_ccc"]}
        scores = [f"{key} {value:.3f}" for key, value in told.items() if value is not None]
        title = {"count": "Number of PVS", "volume_ml": "Volume of PVS"}[name]
        end = 1.05 * max(label.max(), pred.max(), 1e-9)
        line[0].plot([0, end], [0, end], color="0.6", lw=1, label="identity")
        line[0].plot(label, pred, "o", alpha=0.7)
        span = (-0.03 * end, end)  # points at 0 are seen whole
        line[0].set(xlim=span, ylim=span, aspect="equal", title=", ".join([title, *scores]))
        line[0].set(xlabel=f"ground truth, {words}", ylabel=f"prediction, {words}")
        line[1].axhline(0, color="0.6", lw=1)
        line[1].plot((label + pred) / 2, pred - label, "o", alpha=0.7)
        if result["bias"] is not None:
            low, high = result["limits_of_agreement"]
            line[1].axhline(result["bias"], color="C1", label=f"bias {result['bias']:.2f}")
            told = f"limits of agreement {low:.2f} to {high:.2f}"
            line[1].axhline(low, color="C1", ls="--", label=told)
            line[1].axhline(high, color="C1", ls="--")
        line[1].set(title="Bland-Altman", xlabel=f"mean of both, {words}")
        line[1].set(ylabel=f"prediction - ground truth, {words}")
        line[1].margins(y=0.3)  # room for the legend
        for ax in line:
            ax.grid(alpha=0.3)
            if ax.get_legend_handles_labels()[1]:
                ax.legend()
    tested = count_words(len(rows), "test case")
    few = "" if len(rows) >= 3 else "; fewer than 3, no statistics"
    write_figure(path, figure, f"{data_set_name(cfg)}\n{tested}, native grid{few}")


def draw_training_curves(path, history, cfg):
    """Draw losses, Dice and learning rate over the epochs."""
    panels = {
        "loss, 0.5 BCE + 0.5 Dice loss": ("train_loss", "val_loss"),
        f"Dice, {describe_grid(cfg)}": ("train_dice", "val_dice"),
        "learning rate": ("lr",),
    }
    names = {"train": "training patches", "val": "validation volumes", "lr": "AdamW"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in history if row[key] is not None]
            ax.plot(*zip(*points, strict=True), ".-", label=names[key.split("_")[0]])
        ax.set(title=title, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
        ax.grid(alpha=0.3)
    axes[1].set_ylim(0, 1)
    axes[2].set_yscale("log")
    axes[2].yaxis.set_major_formatter(LogFormatter())  # the usual one writes in math text
    axes[2].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    write_figure(path, figure, data_set_name(cfg))


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
    noise = fine[tuple(slice(n) for n in shape)]
    return (noise - noise.mean()) / noise.std()


def simulate_tissue(rng, shape):
    """Return a head's T2w intensity relative to WM = 1, and masks of WM and basal ganglia."""
    ticks = [np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in shape]
    x, y, z = (
        axis + 1.5 * smooth_noise(rng, shape, 14) for axis in np.meshgrid(*ticks, indexing="ij")
    )
    radii = np.array(shape) / 2 * rng.uniform(0.9, 0.96, 3)
    radius = np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2)
    depth = (1 - radius) * radii.mean()  # mm below the skin
    sulci = smooth_noise(rng, shape, 3.5) ** 2  # thin sheets where the noise crosses zero
    csf = 7 + 8 * np.exp(-sulci / 0.02)
    cortex = 9.5 + 8 * np.exp(-sulci / 0.3)
    image = np.select(
        [depth < 0, depth < 3, depth < 6, depth < csf, depth < cortex],
        [0.02, 1.1, 0.2, 2.5, 1.3],
        1.0,
    ).astype(np.float32)
    side = np.abs(x)
    basal = ((side - 15) / 6) ** 2 + (y / 12) ** 2 + ((z + 4) / 8) ** 2 < 1
    ventricles = ((side - 6 - y**2 / 250) / 4) ** 2 + (y / 22) ** 2 + ((z - 6) / 6) ** 2 < 1
    image[basal], image[ventricles] = 1.25, 2.5
    white = (depth > cortex + 1) & ~ndimage.binary_dilation(basal | ventricles, iterations=2)
    return ndimage.gaussian_filter(image, 0.5), white, basal


def draw_tube(occupancy, centre, axis, length, radius, bend):
    """Raise `occupancy`, the fraction of each voxel that is filled, by a tube; lengths in voxels.

    Its centre line is a parabola: straight along `axis`, off by `bend` at both ends.
    """
    fine = 3  # samples a voxel and axis
    reach = length / 2 * np.abs(axis) + np.abs(bend) + radius
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre + reach) + 1, occupancy.shape).astype(int)
    ticks = [
        (np.arange(a * fine, b * fine) + 0.5) / fine - 0.5 - c
        for a, b, c in zip(low, high, centre, strict=True)
    ]
    offset = np.stack(np.meshgrid(*ticks, indexing="ij"), -1)
    along = np.clip(offset @ axis, -length / 2, length / 2)[..., None]
    inside = ((offset - along * axis - (2 * along / length) ** 2 * bend) ** 2).sum(-1) < radius**2
    a, b, c = high - low
    box = tuple(slice(start, stop) for start, stop in zip(low, high, strict=True))
    filled = inside.reshape(a, fine, b, fine, c, fine).mean((1, 3, 5))
    occupancy[box] = np.maximum(occupancy[box], filled)


def draw_tubes(rng, where, count, diameters):
    """Return the occupancy of tubes like PVS, centred in the mask `where` and kept within it.

    They are 6-18 voxels long, point to the head's centre within some 25 degrees, and are as wide as
    `diameters` (see DEMO_DIAMETERS) says.
    """
    median, sigma, *limits = diameters
    occupancy, middle = np.zeros(where.shape, np.float32), (np.array(where.shape) - 1) / 2
    candidates = np.argwhere(where)
    for centre in candidates[rng.integers(len(candidates), size=count)]:
        inward = (middle - centre) / (np.linalg.norm(middle - centre) + 1e-6)
        axis = inward + 0.3 * rng.standard_normal(3)
        axis /= np.linalg.norm(axis)
        length, bend = rng.uniform(6, 18), np.cross(axis, rng.standard_normal(3))
        diameter = np.clip(rng.lognormal(np.log(median), sigma), *limits)
        draw_tube(occupancy, centre, axis, length, diameter / 2, 0.08 * length * bend)
    return occupancy * ndimage.binary_dilation(where, iterations=1)


def simulate_head(rng, shape=DEMO_SHAPE, diameters=DEMO_DIAMETERS):
    """Return a simulated T2w head (X, Y, Z) int16 and the mask of its white-matter PVS.

    It is drawn for voxels of about 1 mm. Lesions of the white matter and PVS of the basal ganglia
    look alike and bear no label. Contrasts after Bernal et al. 2022 (10.1016/j.mri.2022.07.016).
    """
    image, white, basal = simulate_tissue(rng, shape)
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
    names = (f"{subject}/anat/{subject}_T2w.nii.gz", label_name)
    for name, volume in zip(names, volumes, strict=True):
        nifti = nib.Nifti1Image(volume, affine)
        nifti.header.set_xyzt_units("mm")
        write_file(Path(folder) / name, gzip.compress(nifti.to_bytes(), 3, mtime=0))


def make_demo_data(folder, seed):
    """Make the demo's BIDS data set, laid out as ds005595, unless it is there.

    The full description, with the seed, is written last: another or an unfinished set is remade.

    Raises:
        ValueError: the folder holds data that the demo has not made.
    """
    folder, maker = Path(folder), {"Name": "train_pvs.py --demo", "Version": f"1, seed {seed}"}
    description = {"Name": DEMO_NAME, "BIDSVersion": "1.9.0", "GeneratedBy": [maker]}
    marker = folder / "dataset_description.json"
    found = marker.read_text(encoding="utf-8") if marker.exists() else ""
    if found == json_text(description):
        return
    if folder.exists() and any(folder.iterdir()) and DEMO_NAME not in found:
        raise ValueError(f"{folder}: holds other data than the demo's; choose another --output-dir")
    shutil.rmtree(folder, ignore_errors=True)
    write_json(marker, {"Name": DEMO_NAME})
    for number in Progress(range(DEMO_SUBJECTS), "simulating heads"):
        volumes = simulate_head(np.random.default_rng([seed, number]))
        write_head(folder, f"sub-{number + 1:03d}", volumes)
    write_json(marker, description)


# -------------------------------------------------------------------------------------------- Main


RESULTS = (  # below the output folder, in the order in which --overwrite gives them up
    "checkpoints/last.pth",
    "checkpoints/best_model.pth",
    "logs/training_history.json",
    "logs/comprehensive_test_metrics.json",
    "logs/test_metrics.csv",
    "logs/participants_pvs.csv",
    "multi_plane/sub-*.png",
    *(f"predictions/sub-*/**/*_label-PVS_desc-{name}_*.nii.gz" for name in NETWORKS.values()),
    "test_set_visualization_grid_300dpi.jpg",
    "agreement.jpg",
    "training_curves.jpg",
)


def find_results(cfg):
    """Return the files of an earlier run in the output folder."""
    return [path for pattern in RESULTS for path in Path(cfg.OUTPUT_DIR).glob(pattern)]


def open_output_folder(cfg, name, replaceable):
    """Make the output folder and keep the messages in its `logs/<name>.log` from here on.

    Raises:
        ValueError: it holds results that nothing says may be replaced; or another run works there.
    """
    found, out = find_results(cfg), Path(cfg.OUTPUT_DIR)
    if not first_process():
        return
    if found and not replaceable:
        raise ValueError(
            f"{found[0]}: there are results in the output folder already.\n"
            "Choose another with --output-dir, replace them with --overwrite, or go on with a "
            "training run with --resume."
        )
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        log.addHandler(RunLog(out / "logs", name))
    except BlockingIOError:
        told = "another run is using this folder; wait for it, or choose another with --output-dir"
        raise ValueError(f"{out}: {told}") from None
    except OSError as error:
        raise ValueError(f"OUTPUT_DIR: expected a folder to write to ({error})") from None
    remove_half_files(cfg)


def remove_half_files(cfg):
    """Remove what runs that were killed left half written in the folder that this run has locked.

    In a cache other runs may be writing too, which takes seconds: what is an hour old is left over.
    """
    out, hour = Path(cfg.OUTPUT_DIR), 3600  # seconds
    found = [*out.glob(".writing-*"), *(out / "predictions").rglob(".writing-*")]
    for folder in ("checkpoints", "logs", "multi_plane"):
        found += (out / folder).glob(".writing-*")
    for path in cache_folder(cfg).glob(".writing-*"):
        with suppress(FileNotFoundError):  # finished meanwhile
            found += [path] if time.time() - path.stat().st_mtime > hour else []
    for path in found:
        path.unlink(missing_ok=True)


def log_settings(cfg, title, everything=False):
    """Print the title and every setting that differs from Config, or all of them."""
    log.info("%s, %s", datetime.now().isoformat(" ", "seconds"), title)
    for field in fields(Config):
        value = getattr(cfg, field.name)
        if everything or value != field.default:
            words = " ".join(map(str, value)) if isinstance(value, tuple) else value
            log.info("  %-21s %s", field.name, words)


def log_plan(cfg, model, scans):
    """Print on what, with what and into which folder the run works; `scans`: how many, of what."""
    device = choose_device(cfg)
    arithmetic = str(autocast_dtype(device, cfg)).removeprefix("torch.")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    log.info("Device          %s, arithmetic in %s", device, arithmetic)
    log.info("Scans           %s", scans)
    log.info("Grid            %s", describe_grid(cfg))
    log.info("Network         %s, %.1f M parameters", describe_network(cfg), parameters)
    log.info("Output folder   %s", Path(cfg.OUTPUT_DIR).resolve())


def read_again(case):
    """Return the scan and the bool mask (X, Y, Z) of a case that was checked before.

    Raises:
        OSError: a file is not what it was then; names it.
    """
    volumes = []
    for key, known in zip(BOTH, ("sha256", "label_sha256"), strict=True):
        try:
            volume, _ = read_volume(case[key])
        except ValueError as error:
            raise OSError(str(error)) from None
        if hash_voxels(volume) != case[known]:
            raise OSError(f"{case[key]}: has other voxels than when the run began")
        volumes.append(np.asarray(volume[0]))
    return volumes[0], volumes[1] > 0


def describe_weights(content, path):
    """Return {"file", "epoch", "val_dice"} of a checkpoint's content."""
    row = content["history_row"]
    return {"file": str(path), "epoch": row["epoch"], "val_dice": row["val_dice"]}


def evaluate(model, cases, weights, cfg):
    """Test prepared cases on both grids, write predictions, scores, figures; return status 0.

    `weights`: which they are, as `describe_weights` tells; a list for several checkpoints.
    """
    out, rows, slices = Path(cfg.OUTPUT_DIR), [], []
    for case in Progress(share(cases), "testing"):
        entry = load_cached(case)
        image, label = read_again(case)
        affine = entry["native_affine"].numpy()
        working_prob, prob = predict_case(model, entry, cfg)
        pred = decide(prob, affine, cfg)
        write_prediction(case, pred, prob, cfg)
        working_pred = decide(working_prob, entry["affine"].numpy(), cfg)
        rows.append(score_case(case, entry, working_pred, pred, label))
        masks = {"ground truth": label, "prediction": pred}
        title = describe_scores(rows[-1], affine, cfg)
        slices.append(draw_case(case, image, affine, masks, title, cfg))
    rows, slices = gather(rows), gather(slices)
    if not first_process():
        return 0
    write_description(cases, cfg)
    blocks = write_test_metrics(out / "logs", rows, weights, model, cfg)
    draw_test_grid(out / "test_set_visualization_grid_300dpi.jpg", rows, slices, cfg)
    draw_agreement(out / "agreement.jpg", rows, blocks["burden"], cfg)
    history = out / "logs" / "training_history.json"
    if history.exists():
        history = json.loads(history.read_text(encoding="utf-8"))
        draw_training_curves(out / "training_curves.jpg", history, cfg)
    log_test_table(rows, blocks, cfg)
    if out.name == f"fold-{cfg.FOLD}" and (out / "checkpoints").exists():  # no external test
        log_cross_validation(*write_cross_validation(cfg), cfg)
    log.info("\nScores and figures are in %s", out.resolve())
    return 0


def choose_decision(model, cases, cfg):
    """Return the Config with the THRESHOLD and SMALLEST_PVS of the best mean native Dice.

    `cases`: the validation's; the test cases must have no say in it.
    """
    dices = []
    for case in Progress(share(cases), "choosing the threshold"):
        entry, label = load_cached(case), read_again(case)[1]
        prob = predict_case(model, entry, cfg)[1]
        dices.append(score_decisions(prob, label, entry["native_affine"].numpy()))
    means = np.mean(gather(dices), axis=0)
    threshold, smallest = np.unravel_index(means.argmax(), means.shape)
    chosen = {"THRESHOLD": THRESHOLDS[threshold], "SMALLEST_PVS": SMALLEST[smallest]}
    told = "Chosen on the validation scans: threshold %g, smallest PVS %g mm3, with which their"
    told += " native Dice is %.4f (%.4f with 0.5 and 0); on other scans expect less"
    log.info(told, *chosen.values(), means.max(), means[0, 0])
    return replace(cfg, **chosen)


def keep_decision(path, content, cfg):
    """Write into a checkpoint, whose content is at hand, how its probabilities become masks."""
    decision = {name: getattr(cfg, name) for name in (*DECISION, "TUNE_DECISION")}
    if first_process() and list_differences(content["config"], decision, decision):
        write_torch(path, content | {"config": content["config"] | decision})


def train_and_test(model, split, cfg, last=None, known=()):
    """Fit, from `last.pth` on if there is its content, then test with the best weights and draw.

    `known`: hashes of the scans that the weights know already.

    Returns:
        the exit status
    """
    out, best_path = Path(cfg.OUTPUT_DIR), Path(cfg.OUTPUT_DIR) / "checkpoints" / "best_model.pth"
    old = find_results(cfg) if first_process() and not last else []  # --overwrite
    if old and cfg.FOLDS:  # the folds' table, which is written anew at this fold's end
        old += [out.parent / f"cross_validation.{ending}" for ending in ("json", "csv")]
    for path in old:
        path.unlink(missing_ok=True)
    subjects = {part: sorted({c["subject"] for c in cases}) for part, cases in split.items()}
    if first_process():
        write_json(out / "logs" / "split.json", subjects)
    model.to(choose_device(cfg))
    if cfg.HEAD_BIAS_LOG_ODDS and not cfg.INIT_FROM:
        start_at_log_odds(model, split["train"], cfg)
    if process_number("WORLD_SIZE") > 1 and choose_device(cfg).type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    fit(model, cfg, split, last, known)
    wait_for_all()  # the first has written the weights
    content = read_checkpoint(best_path)
    load_weights(model, content, best_path)
    best = describe_weights(content, best_path)
    told = "Best validation Dice %.4f on the working grid, in epoch %d"
    log.info(told, best["val_dice"], best["epoch"])
    if cfg.TUNE_DECISION:
        cfg = choose_decision(model, split["val"], cfg)
    keep_decision(best_path, content, cfg)
    evaluate(model, split["test"], best, cfg)
    if best["val_dice"] > 0:
        return 0
    if first_process():
        log.error("No PVS were learned: the validation Dice never left 0. %s", NOTHING_LEARNED)
    return 1


def segment_scan(model, case, cfg):
    """Segment a scan, write and draw its mask; return its row of `participants_pvs.csv`.

    Raises:
        ValueError: it cannot be read, or shows no head; names the file.
    """
    image, cautions = read_volume(case["image"])
    check_scan(case["image"], image)
    check_size(case, cfg)
    for caution in cautions:
        log.warning("Warning: %s", caution)
    entry = to_working_grid({"image": image}, cfg)
    prob, affine = predict_case(model, entry, cfg)[1], entry["native_affine"].numpy()
    pred = decide(prob, affine, cfg)
    write_prediction(case, pred, prob, cfg)
    burden = {"count": ndimage.label(pred, TOUCHING)[1], "volume_ml": volume_ml(pred, affine)}
    told = f"{case['name']}: {burden['count']} PVS, {burden['volume_ml']:.3f} ml predicted"
    spacing = spacing_words(ras_spacing(affine))
    grids = f"native grid, {spacing}\npredicted on the {describe_grid(cfg)}"
    draw_case(case, np.asarray(image[0]), affine, {"prediction": pred}, f"{told}\n{grids}", cfg)
    mask = prediction_path(case, cfg).relative_to(cfg.OUTPUT_DIR)
    names = {"participant_id": case["subject"], "name": case["name"]}
    return names | burden | {"scan": case["image"], "mask": mask}


def predict_scans(model, cases, cfg):
    """Segment scans one at a time, draw and measure them.

    A scan that cannot be read, or is too large for the memory, is named at the end; the others are
    done.

    Returns:
        the exit status, 1 where a scan could not be done
    """
    out, rows, problems = Path(cfg.OUTPUT_DIR), [], []
    write_description(cases, cfg)
    for case in Progress(cases, "predicting"):
        try:
            rows.append(segment_scan(model, case, cfg))
        except ValueError as error:
            problems.append(str(error))
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            problems.append(f"{case['image']}: memory ran out; {OUT_OF_MEMORY}")
        if rows:
            write_csv(out / "logs" / "participants_pvs.csv", rows)
    for row in rows:
        log.info("%s: %d PVS, %.3f ml", row["name"], row["count"], row["volume_ml"])
    log.info("%d of %d scans are segmented in %s", len(rows), len(cases), out.resolve())
    for problem in problems:
        log.error("Not segmented: %s", problem)
    return 1 if problems else 0


def check_data_folder(cfg):
    """Raise FileNotFoundError, which says how to get the data, where there is no DATA_DIR."""
    if not os.path.isdir(cfg.DATA_DIR):
        told = f"{one_line(cfg.DATA_DIR)}: no such folder (DATA_DIR)"
        raise FileNotFoundError(f"{told}\n{HOW_TO_GET_DATA}")


def check_start(cfg, options):
    """Raise a ValueError where there is nothing to resume, or where INIT_FROM would be replaced."""
    begun = Path(cfg.OUTPUT_DIR, "checkpoints", "last.pth")
    if options.resume and not begun.exists():
        raise ValueError(f"{begun}: no such file, nothing to resume; start without --resume")
    mine = [path for path in find_results(cfg) if cfg.INIT_FROM and not options.resume]
    if any(os.path.samefile(cfg.INIT_FROM, path) for path in mine):
        told = "INIT_FROM, which this run would replace; choose another --output-dir"
        raise ValueError(f"{cfg.INIT_FROM}: {told}")


def set_up_training(cfg, options):
    """Do all that comes before training; return the work that is left, a function."""
    if not options.demo:
        check_data_folder(cfg)
    check_start(cfg, options)
    own = options.demo and Path(cfg.DATA_DIR, "dataset_description.json").exists()
    replaceable = options.overwrite or options.check or options.resume or own
    with first_process_first():
        open_output_folder(cfg, "train", replaceable)
        log_settings(cfg, f"recipe {options.recipe}", everything=options.check)
        if options.demo:
            make_demo_data(cfg.DATA_DIR, cfg.SEED)
        started = options.resume or cfg.INIT_FROM  # with other weights than the encoder's
        model = build_model(replace(cfg, **UNUSED) if started else cfg)
        known = ([], []) if options.resume else load_initial_weights(model, cfg)
    cases = find_cases(cfg)
    split = split_cases(cases, cfg)
    names = {case["name"] for part in split.values() for case in part}
    cases = [case for case in cases if case["name"] in names]
    if not any(cfg.PIX_DIM):  # folds share a grid
        cfg = replace(cfg, PIX_DIM=own_spacing(cases if cfg.FOLDS else split["train"]))
    step = step_memory(model, cfg)
    if choose_device(cfg).type == "cuda":
        log.info("GPU memory      %s for a step without autocast, estimated", size_words(step))
        step = 0
    split = keep_prepared(split, prepare_cases(cases, cfg, step), cfg)
    last = read_last(cfg, split) if options.resume else None
    check_unseen(split, *known, cfg)
    log.info("Data            %s", data_set_name(cfg))
    log_plan(cfg, model, ", ".join(f"{len(part)} {name}" for name, part in split.items()))
    for part in ("val", "test"):
        log.info("  %-14s%s", part, " ".join(case["name"] for case in split[part][:10]))
    if options.check:
        log.info("Nothing was trained (--check)")
        return lambda: 0
    if last:
        log.info("Resumed         after epoch %d", len(last["progress"]["history"]))
    return functools.partial(train_and_test, model, split, cfg, last, [*known[0], *known[1]])


def choose_checkpoints(cfg, options):
    """Return the files of --checkpoint, else the output folder's, else the default folder's."""
    if options.checkpoint:
        return [Path(path) for path in options.checkpoint]
    folders = [Path(folder) / "checkpoints" for folder in (cfg.OUTPUT_DIR, Config.OUTPUT_DIR)]
    return [next(filter(Path.is_dir, folders), folders[0]) / "best_model.pth"]


ALIKE = (
    *(*NETWORK_SETTINGS, "PIX_DIM", "INTENSITY_PERCENTILES", "IMG_PATCH_SIZE"),
    *("SW_OVERLAP", "TTA_FLIPS"),
)


def restore_configs(paths, contents, cfg, given):
    """Return the Config of checkpoints that are used together, see `restore_config`.

    Of their THRESHOLD and SMALLEST_PVS the mean.

    Raises:
        ValueError: they are of different networks or grids, names what differs.
    """
    configs = [restore_config(content, cfg, given) for content in contents]
    first, *others = configs
    problems = []
    for path, other in zip(paths[1:], others, strict=True):
        for name in list_differences(asdict(first), asdict(other), ALIKE):
            one, two = getattr(first, name), getattr(other, name)
            problems.append(f"{name}: {paths[0]} has {one}, {path} has {two}")
    if problems:
        raise ValueError("checkpoints that do not go together:\n  " + "\n  ".join(problems))
    decision = ("THRESHOLD", "SMALLEST_PVS")
    return replace(first, **{k: float(np.mean([getattr(c, k) for c in configs])) for k in decision})


def load_models(paths, contents, cfg):
    """Return the networks of checkpoints as one ModuleList on their device."""
    models = nn.ModuleList()
    for path, content in zip(paths, contents, strict=True):
        models.append(build_model(replace(cfg, **UNUSED)))
        load_weights(models[-1], content, path)
    return models.to(choose_device(cfg))


def choose_test_cases(cases, contents):
    """Return the cases that checkpoints may be tested on, and whether they are the run's own.

    Scans are known again by their voxels, wherever the files lie. Of the run's own data set the
    test part is returned, of another one all cases.

    Raises:
        ValueError: scans of the training, but not all of the test part; or no scan that is in the
            test part of all checkpoints.
    """
    here, own, tests = {case["sha256"] for case in cases}, {}, []
    for content in contents:
        for part in content["sha256"].values():
            own |= {sha256: name for name, sha256 in part.items()}
        tests.append(set(content["sha256"].get("test", {}).values()))
    if not here & set(own):
        return cases, False
    test = set.intersection(*tests)
    if not test:
        raise ValueError(
            "DATA_DIR: holds scans that some of the checkpoints were trained with, and none that "
            "all of them have for their test; expected another data set"
        )
    missing = [own[sha256] for sha256 in sorted(test - here)]
    if missing:
        raise ValueError(
            "DATA_DIR: holds scans that the checkpoint was trained or tested with, but not its "
            f"test scans {', '.join(sorted(missing))}; expected those too, or another data set"
        )
    strangers = [case["name"] for case in cases if case["sha256"] not in own]
    if strangers:
        log.warning("Warning: left out, not in the run's split: %s", " ".join(strangers))
    return [case for case in cases if case["sha256"] in test], True


def is_in_place(paths, contents, cfg):
    """Return whether --evaluate makes the test of a run again: its weights, data and decision."""
    if list_differences(contents[0]["config"], asdict(cfg), DECISION):
        return False
    trained_on = str(contents[0]["config"].get("DATA_DIR", Config.DATA_DIR))
    folders = [Path(folder).resolve() for folder in (cfg.DATA_DIR, trained_on)]
    own = Path(cfg.OUTPUT_DIR, "checkpoints", "best_model.pth").resolve()
    return [path.resolve() for path in paths] == [own] and folders[0] == folders[1]


def set_up_trained(cfg, options):
    """Do all that comes before --evaluate and --predict; return the work left, a function."""
    paths = choose_checkpoints(cfg, options)
    contents = [read_checkpoint(path) for path in paths]
    cfg = restore_configs(paths, contents, cfg, options.given)
    command = "predict" if options.predict else f"evaluate-{Path(cfg.DATA_DIR).resolve().name}"
    if options.predict:
        cases = find_scans(options.predict, cfg)
    else:
        check_data_folder(cfg)
    in_place = not options.predict and is_in_place(paths, contents, cfg)
    if not in_place and Path(cfg.OUTPUT_DIR, "checkpoints").exists():
        cfg = replace(cfg, OUTPUT_DIR=str(Path(cfg.OUTPUT_DIR, command)))  # its own, in the run's
    model = load_models(paths, contents, cfg)
    with first_process_first():
        open_output_folder(cfg, command.split("-")[0], options.overwrite or in_place)
    for old in [] if in_place or not first_process() else find_results(cfg):  # --overwrite
        old.unlink()
    log_settings(cfg, f"{command}, checkpoint {', '.join(map(str, paths))}")
    weights = [describe_weights(*pair) for pair in zip(contents, paths, strict=True)]
    for row in weights:
        dice = "unknown" if row["val_dice"] is None else f"{row['val_dice']:.4f}"
        told = f"epoch {row['epoch']}, validation Dice {dice} on the working grid"
        log.info("Weights         %s", told)
    if options.predict:
        log_plan(cfg, model, f"{len(cases)} to segment")
        return functools.partial(predict_scans, model, cases, cfg)
    cases = prepare_cases(find_cases(cfg), cfg, keep_empty=True)
    cases, own = choose_test_cases(cases, contents)
    if in_place and not own:
        raise ValueError(f"{cfg.DATA_DIR}: expected the scans of the run, found only others")
    log.info("Data            %s", data_set_name(cfg))
    log_plan(cfg, model, f"{len(cases)} {'of the test split' if own else 'of an external test'}")
    weights = weights[0] if len(weights) == 1 else weights
    return functools.partial(evaluate, model, cases, weights, cfg)


def tell_way_on(cfg, options, begun):
    """Return what to do after a run that ended before its work was done."""
    if not begun:
        return "Nothing had begun: run the same command again."
    if options.evaluate or options.predict:
        return "Run the same command again; add --overwrite if the folder holds results."
    if Path(cfg.OUTPUT_DIR, "checkpoints", "last.pth").exists():
        return "Go on with the same command and --resume."
    return "No epoch was finished: run the same command again, with --overwrite."


def tell_failure(error, way_on, begun):
    """Print in a line or two why the run ended and what to do; return the exit status.

    Raises:
        the error, where it is no user's mistake, machine's failure or signal, but the script's
    """
    if received_signals or isinstance(error, KeyboardInterrupt):
        number = received_signals[0] if received_signals else signal.SIGINT
        if first_process():
            log.error("Interrupted (%s). %s", signal.Signals(number).name, way_on)
        return 128 + number
    if isinstance(error, ValueError | FileNotFoundError):
        if begun:
            raise error
        log.error("Error: %s", error)
        return 2
    if isinstance(error, FloatingPointError):
        log.error("Error: %s", error)
    elif isinstance(error, OSError):  # a worker's own holds its traceback
        text = str(error).strip().rsplit("\nOSError: ", 1)[-1]
        log.error(f"Error: {text}\n{way_on}")
    elif "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error):
        log.error("Error: another process of the run has ended.\n%s", way_on)
    elif "DataLoader worker (pid" in str(error):
        told = "a worker process was killed, most likely since memory, or /dev/shm, ran out"
        log.error("Error: %s.\nFirst lower --num-workers. %s\n%s", told, OUT_OF_MEMORY, way_on)
    elif lacks_memory(error):
        told = str(error).strip().split("\n")[0]
        log.error("Error: memory ran out (%s).\n%s\n%s", told, OUT_OF_MEMORY, way_on)
    else:
        raise error
    return 1


FAILURES = (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError, KeyboardInterrupt)


def main(argv=None):
    """Run the pipeline that the command line asks for; return the exit status."""
    with logging_to_screen(), stopping_on_signals():
        cfg = options = work = None
        try:
            cfg, options = parse_command_line(argv)
            trained = options.evaluate or options.predict
            with joined_processes(cfg):
                work = (set_up_trained if trained else set_up_training)(cfg, options)
                status = work()
                wait_for_all()  # torchrun ends all when one has ended with another status than 0
                return status
        except FAILURES as error:
            return tell_failure(error, tell_way_on(cfg, options, work), begun=work)


if __name__ == "__main__":
    sys.exit(main())
