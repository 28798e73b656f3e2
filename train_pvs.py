"""Train a 3D UNet++ that segments perivascular spaces (PVS) in T2-weighted brain MRI.

    python train_pvs.py --data-dir DIR   train, test and draw on a BIDS folder such as ds005595
    python train_pvs.py --check          look the data over, print what a run would use, stop
    python train_pvs.py --demo           the whole pipeline on simulated heads: CPU, minutes

The file reads in the order of a run: Config > Data > Transforms > Model > Loss and metrics >
Inference > Checkpoints > Training > Evaluation > Figures > Demo data > Main. Two grids occur: the
*native grid* of a scan file, and the *working grid* (RAS, `PIX_DIM`, cropped to the head) on which
the network lives. All scores are on the working grid.
"""

import argparse
import functools
import gzip
import hashlib
import http.client
import importlib.metadata
import io
import json
import logging
import math
import os
import pickle
import platform
import re
import shutil
import struct
import sys
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
import torch
from monai import transforms as mt
from monai.data import MetaTensor, list_data_collate
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from scipy import ndimage
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

with warnings.catch_warnings():  # its timm 0.9.7 imports what is deprecated
    warnings.simplefilter("ignore")
    import segmentation_models_pytorch_3d as smp

matplotlib.use("Agg")  # figures go to files; no screen is needed
import matplotlib.pyplot as plt

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
    SEED: int = 123  # of split, first weights, crops, augmentation and demo data
    # Working grid
    PIX_DIM: tuple = (1.5, 1.5, 1.5)  # spacing, mm
    INTENSITY_PERCENTILES: tuple = (0.5, 99.5)  # of the voxels in the head, taken to 0 and 1
    # Patches
    IMG_PATCH_SIZE: tuple = (96, 96, 96)  # voxels; sides are multiples of 2**ENCODER_DEPTH
    CROPS_PER_VOLUME: int = 4  # patches from a volume each time it is drawn
    POS_NEG_RATIO: float = 2.0  # patches centred on a PVS voxel for each one centred elsewhere
    # Network
    ENCODER_NAME: str = "efficientnet-b7"  # efficientnet-b0 to efficientnet-b7
    ENCODER_WEIGHTS: str = "imagenet"  # imagenet, none, or a 2D EfficientNet's state dict file
    ENCODER_DEPTH: int = 5  # halvings of the patch
    DECODER_WIDTH: int = 16  # decoder channels at full resolution, doubled at every halving
    BATCHNORM_MOMENTUM: float = 0.0  # of all BatchNorm layers; 0: the library's (encoder 0.01)
    HEAD_BIAS_LOG_ODDS: bool = False  # start at the training masks' log-odds of foreground
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
    # Inference
    SW_OVERLAP: float = 0.5  # of neighbouring windows, fraction of the patch
    SW_BATCH_SIZE: int = 4  # windows at once
    # Machine
    DEVICE: str = "auto"  # auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ...
    AMP: bool = True  # bfloat16 or float16 autocast where the hardware gains from it
    NUM_WORKERS: int = 4  # processes that prepare volumes and cut patches


LIMITS = {  # the smallest and the largest value that a number may have
    name: limits
    for limits, names in {
        (0, 2**32 - 1): "SEED",
        (0.001, 0.9): "TEST_FRACTION VAL_FRACTION",
        (0.1, 20): "PIX_DIM",
        (0, 100): "INTENSITY_PERCENTILES",
        (8, 1024): "IMG_PATCH_SIZE",
        (3, 5): "ENCODER_DEPTH",
        (1, 1000): "CROPS_PER_VOLUME BATCH_SIZE ACCUMULATE_STEPS SW_BATCH_SIZE DECODER_WIDTH",
        (1, 10**6): "EPOCHS VAL_EVERY EARLY_STOPPING",
        (0, 1000): "POS_NEG_RATIO LR_PATIENCE NUM_WORKERS",
        (0, 1): "BATCHNORM_MOMENTUM LR_MIN",
        (1e-9, 10): "LR",
        (0, 10): "WEIGHT_DECAY",
        (1e-6, 1e6): "GRAD_CLIP",
        (0.01, 0.99): "LR_FACTOR",
        (0, 0.9): "SW_OVERLAP",
    }.items()
    for name in names.split()
}

RECIPES = {  # named overrides of Config, chosen with --recipe
    "published": {},
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
        epilog="Exit status: 0 done, 1 failed or nothing learned, 2 wrong input, 130 interrupted.",
        allow_abbrev=False,
    )
    for flag, text in {
        "--check": "look the data over, print what a run would use, stop",
        "--overwrite": "replace the results in the output folder",
    }.items():
        parser.add_argument(flag, action="store_true", help=text)
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
    settings |= {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if options.demo:
        if "DATA_DIR" in settings:
            problems.append("DATA_DIR: --demo makes its data; for your own use --recipe demo")
        settings.setdefault("OUTPUT_DIR", "outputs_3d_demo")
        settings["DATA_DIR"] = str(Path(settings["OUTPUT_DIR"]) / "data")
    cfg = replace(Config(), **settings)
    problems += check_config(cfg)
    if problems:
        raise ValueError("wrong settings:\n  " + "\n  ".join(problems))
    return cfg, options


def check_config(cfg):
    """Return a list with a sentence for each wrong setting, starting with the field's name."""
    problems = {}

    def expect(name, good, expected):
        if not good and name not in problems:
            value = getattr(cfg, name)
            got = " ".join(map(str, value)) if isinstance(value, tuple) else value
            problems[name] = f"{name}: expected {expected}, got {got if got != '' else 'nothing'}"

    for name, (low, high) in LIMITS.items():
        kind = int if np.array(getattr(Config, name)).dtype.kind == "i" else (int, float)
        value = getattr(cfg, name)
        values = value if isinstance(value, tuple) else (value,)
        good = all(isinstance(number, kind) and low <= number <= high for number in values)
        expect(name, good, f"{'whole numbers' if kind is int else 'numbers'} from {low} to {high}")
    for name in ("DATA_DIR", "OUTPUT_DIR", "IMAGE_GLOB", "LABEL_GLOB", "DEVICE"):
        expect(name, getattr(cfg, name).strip(), "a value")
    for name in ("IMAGE_GLOB", "LABEL_GLOB"):
        expect(name, not Path(getattr(cfg, name)).is_absolute(), "a pattern below DATA_DIR")
    expect("SPLIT", not cfg.SPLIT or Path(cfg.SPLIT).is_file(), "a JSON file that exists")
    known = re.fullmatch("efficientnet-b[0-7]", cfg.ENCODER_NAME)
    expect("ENCODER_NAME", known, "efficientnet-b0 to efficientnet-b7")
    known = cfg.ENCODER_WEIGHTS in ("imagenet", "none") or Path(cfg.ENCODER_WEIGHTS).is_file()
    expect("ENCODER_WEIGHTS", known, "imagenet, none or a file that exists")
    expect("DEVICE", device_works(cfg.DEVICE), "auto, cpu or a device of this machine")
    if "INTENSITY_PERCENTILES" not in problems:
        low, high = cfg.INTENSITY_PERCENTILES
        expect("INTENSITY_PERCENTILES", low < high, "a smaller and a larger number")
    if not {"IMG_PATCH_SIZE", "ENCODER_DEPTH"} & set(problems):
        divisor = 2**cfg.ENCODER_DEPTH
        multiple = all(side % divisor == 0 for side in cfg.IMG_PATCH_SIZE)
        expect("IMG_PATCH_SIZE", multiple, f"multiples of {divisor} (2**ENCODER_DEPTH)")
        lone = cfg.CROPS_PER_VOLUME == 1 and set(cfg.IMG_PATCH_SIZE) == {divisor}
        expect("CROPS_PER_VOLUME", not lone, "more than 1 with such small patches (BatchNorm)")
    return list(problems.values())


def device_works(name):
    """Return whether torch can compute on the device of that name."""
    try:
        torch.zeros(1, device="cpu" if name == "auto" else name).item()
    except (RuntimeError, AssertionError, ImportError):
        return False
    return True


def choose_device(cfg):
    """Return the torch device of the run."""
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(fastest if cfg.DEVICE == "auto" else cfg.DEVICE)


def worker_count(cfg):
    """Return NUM_WORKERS, but no more than there are processors."""
    return min(cfg.NUM_WORKERS, os.cpu_count() or 1)


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


class Progress(tqdm):
    """A progress bar with the time left; where stderr is no terminal, a plain line now and then."""

    def __init__(self, items, title):
        every = 0.1 if sys.stderr.isatty() else 30  # seconds
        super().__init__(items, title, leave=False, mininterval=every, maxinterval=every)

    def display(self, msg=None, pos=None):
        """Show the bar, or write it as a line while the work is under way."""
        if self.fp.isatty():
            super().display(msg, pos)
        elif 0 < self.n < self.total:
            self.fp.write(f"{self}\n")


def write_file(path, data):
    """Write bytes or text so that the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


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


def bids_entities(path):
    """Return a BIDS name's entities: sub-01_ses-2_T2w.nii.gz gives {"sub": "01", "ses": "2"}."""
    stem = Path(path).name.split(".nii")[0]
    return dict(part.split("-", 1) for part in stem.split("_") if "-" in part)


def raise_problems(problems, remedy):
    """Raise one ValueError that lists all problems and ends with what to do; none, no error."""
    if problems:
        title = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the data:"
        raise ValueError("\n  ".join([title, *problems]) + f"\n{remedy} Nothing was trained.")


def find_files(folder, pattern):
    """Return the NIfTI files below `folder` that fit the glob, sorted.

    Raises:
        ValueError: no usable pattern, or files whose names hold no sub- entity; lists them.
    """
    try:
        found = sorted(Path(folder).glob(pattern))
    except ValueError as error:
        raise ValueError(f"{pattern}: expected a pattern for files ({error})") from None
    files = [path for path in found if path.name.endswith((".nii", ".nii.gz"))]
    nameless = [f"{p}: expected a name with sub-" for p in files if "sub" not in bids_entities(p)]
    raise_problems(nameless, "Rename files, or narrow IMAGE_GLOB and LABEL_GLOB.")
    return files


def find_cases(cfg):
    """Pair scans and masks.

    A mask fits a scan whose name holds all entities of the mask, `desc` and `label` apart. Scans
    without a mask are logged and left out.

    Returns:
        list of {"subject": "sub-001", "name": "sub-001[_ses-1..]", "image": path, "label": path}

    Raises:
        FileNotFoundError: no scan or no mask; says how to get the data.
        ValueError: lists masks without a scan, and masks or scans with more than one partner.
    """
    images = find_files(cfg.DATA_DIR, cfg.IMAGE_GLOB)
    labels = find_files(cfg.DATA_DIR, cfg.LABEL_GLOB)
    if not images or not labels:
        found = f"{len(images)} scans {cfg.IMAGE_GLOB}, {len(labels)} masks {cfg.LABEL_GLOB}"
        expected = f"{cfg.DATA_DIR}: expected scans and masks, found {found}"
        raise FileNotFoundError(f"{expected}\n{HOW_TO_GET_DATA}")
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
    raise_problems(problems, "Remove or rename files, or narrow IMAGE_GLOB and LABEL_GLOB.")
    return [
        {
            "subject": f"sub-{bids_entities(image)['sub']}",
            "name": image.name.split(".nii")[0].removesuffix("_T2w"),
            "image": str(image),
            "label": str(masks[0]),
        }
        for image, masks in masks_of.items()
        if masks
    ]


READ_ERRORS = (  # of nibabel and gzip on damaged files
    *(OSError, EOFError, zlib.error, ValueError, TypeError, MemoryError),
    *(nib.spatialimages.HeaderDataError, nib.filebasedimages.ImageFileError),
)


def read_header(path):
    """Return a NIfTI file as a nibabel image whose data are not read yet, and its 3D shape.

    Raises:
        ValueError: no NIfTI file, not 3D (trailing axes of length 1 are accepted), or no affine
            that can be inverted; names the file.
    """
    try:
        volume = nib.load(path)
    except READ_ERRORS as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "the link's file is missing; with DataLad: datalad get" if missing else error
        raise ValueError(f"{path}: expected a NIfTI file, cannot be read ({reason})") from None
    if not isinstance(volume, nib.Nifti1Image):
        raise ValueError(f"{path}: expected a NIfTI file, got {type(volume).__name__}")
    shape = volume.shape[:3] + tuple(n for n in volume.shape[3:] if n != 1)
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"{path}: expected a 3D volume, got shape {volume.shape}")
    linear = volume.affine[:3, :3]
    if not np.isfinite(volume.affine).all() or abs(np.linalg.det(linear)) < 1e-9:
        raise ValueError(f"{path}: expected an affine that can be inverted, got {linear.tolist()}")
    return volume, shape


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
        return [f"{told}, expected at most 0.5"], []
    return [], [f"{told}; the scan's is used for both"] if shift > 0.1 else []


def read_volume(path):
    """Read a NIfTI file to its last byte, the checksum included.

    Returns:
        MetaTensor (1, X, Y, Z) float32 on the native grid, with the file's scaling and affine.

    Raises:
        ValueError: cut off, damaged or not finite; names the file.
    """
    header, shape = read_header(path)
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            data = np.asarray(type(header).from_bytes(file.read()).dataobj, dtype=np.float32)
    except READ_ERRORS as error:
        reason = f"cannot be read to its last byte ({error})"
        raise ValueError(f"{path}: {reason}; expected a whole file, copy it anew") from None
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise ValueError(f"{path}: expected finite voxels, {bad} are NaN or infinite")
    return MetaTensor(torch.from_numpy(data.reshape(1, *shape)), torch.from_numpy(header.affine))


def split_cases(cases, cfg):
    """Divide the cases by subject into {"train": cases, "val": cases, "test": cases}.

    As the file SPLIT says, else drawn from the sorted subjects with SEED, at least one subject
    each. On the 200 subjects of ds005595 this is the published split.

    Raises:
        ValueError: too few subjects, or no usable split file.
    """
    subjects = sorted({case["subject"] for case in cases})
    if cfg.SPLIT:
        split = read_split(cfg.SPLIT, subjects)
    else:
        try:
            rest, test = train_test_split(
                subjects, test_size=cfg.TEST_FRACTION, random_state=cfg.SEED
            )
            train, val = train_test_split(rest, test_size=cfg.VAL_FRACTION, random_state=cfg.SEED)
        except ValueError:
            raise ValueError(
                f"{cfg.DATA_DIR}: expected at least 3 subjects with a mask, and a TEST_FRACTION "
                f"and VAL_FRACTION that leave some to train; got {', '.join(subjects)}"
            ) from None
        split = {"train": train, "val": val, "test": test}
    return {part: [c for c in cases if c["subject"] in names] for part, names in split.items()}


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
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error)[:100] if isinstance(error, KeyError | TypeError) else "no JSON"
        raise ValueError(f"{path}: expected lists train, val and test ({reason})") from None
    named = [subject for names in split.values() for subject in names]
    problems = [f"{part}: expected at least one subject" for part in split if not split[part]]
    problems += [f"{s}: named more than once" for s in sorted(set(named)) if named.count(s) > 1]
    problems += [f"{s}: no subject with a mask" for s in sorted(set(named) - set(subjects))]
    if problems:
        raise ValueError(f"{path}: not a usable split:\n  " + "\n  ".join(problems))
    for subject in sorted(set(subjects) - set(named)):
        log.warning("Warning: left out, not in %s: %s", path, subject)
    return split


# -------------------------------------------------------------------------------------- Transforms

CACHE_VERSION = 1  # raise it with a change of the deterministic transforms: older entries expire
BACKGROUND_SAMPLE = 100_000  # voxels kept as centres of negative patches; all would take 8 B each
INTERPOLATION = ("bilinear", "nearest")


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
    affine |= {"mode": INTERPOLATION, "padding_mode": "border"}
    # Elastic: shifts of up to 2 % of the patch at 6^3 knots. Its defaults are blocky.
    elastic = {"spatial_size": cfg.IMG_PATCH_SIZE, "rand_size": (6, 6, 6), "def_range": 0.04}
    elastic |= {"field_mode": "trilinear", "align_corners": True}
    elastic |= {"grid_mode": INTERPOLATION, "grid_align_corners": True}
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


def cache_path(case, cfg):
    """Return where a case's prepared volume lies; other files or settings, another name."""
    stats = [(path, os.stat(path)) for path in (case["image"], case["label"])]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = (files, cfg.PIX_DIM, cfg.INTENSITY_PERCENTILES, cfg.IMG_PATCH_SIZE, cfg.SEED)
    digest = hashlib.sha256(repr((CACHE_VERSION, *key)).encode()).hexdigest()[:16]
    return Path(cfg.CACHE_DIR or Path(cfg.OUTPUT_DIR) / "cache") / f"{case['name']}-{digest}.pt"


def load_cached(case, cfg):
    """Return a case's cache entry (see `build_cache_entry`), memory-mapped."""
    return torch.load(cache_path(case, cfg), mmap=True, weights_only=True)


def build_cache_entry(case, cfg):
    """Read, check and transform one case.

    Returns:
        image (1, H, W, D) float16 and label (1, H, W, D) uint8 on the working grid, foreground
        and background: int32 flat indices of all labelled voxels and of a seeded sample of the
        others, native_voxels: labelled on the native grid, native_spacing: mm

    Raises:
        ValueError: a line for each file that is damaged, not finite, or not of whole numbers.
    """
    volumes, problems = {}, []
    for key in BOTH:
        try:
            volumes[key] = read_volume(case[key])
        except ValueError as error:
            problems.append(str(error))
    label = volumes.get("label", torch.zeros(1))
    if not torch.equal(label, label.round()):
        problems.append(f"{case['label']}: expected whole numbers in a mask, got fractions")
    if problems:
        raise ValueError("\n".join(problems))
    label.affine = volumes["image"].affine  # check_headers bounds the difference
    spacing = nib.affines.voxel_sizes(label.affine.numpy()).round(4).tolist()
    entry = {"native_voxels": int((label > 0).sum()), "native_spacing": spacing}
    volumes = build_transforms(cfg)(volumes)
    image, label = (volumes[key].as_tensor() for key in BOTH)
    background = (label == 0).flatten().nonzero().flatten().to(torch.int32)
    order = torch.randperm(len(background), generator=torch.Generator().manual_seed(cfg.SEED))
    return entry | {
        "image": image.to(torch.float16),
        "label": label.to(torch.uint8),
        "foreground": label.flatten().nonzero().flatten().to(torch.int32),
        "background": background[order[:BACKGROUND_SAMPLE]],
    }


def prepare_case(case, cfg):
    """Check a case and put it into the cache unless it is there.

    Returns:
        {"problems": sentences, "warnings": sentences, "failure": of writing, or "", and where all
        is well "voxels": labelled on the native and on the working grid, "spacing": native, mm}
    """
    problems, cautions = check_headers(case)
    report = {"problems": problems, "warnings": cautions, "failure": ""}
    if problems:
        return report
    try:
        if not cache_path(case, cfg).exists():
            write_torch(cache_path(case, cfg), build_cache_entry(case, cfg))
    except ValueError as error:
        return report | {"problems": str(error).splitlines()}
    except OSError as error:  # told by the parent: a worker's own error is a traceback
        return report | {"failure": str(error)}
    entry = load_cached(case, cfg)
    voxels = [entry["native_voxels"], len(entry["foreground"])]
    return report | {"voxels": voxels, "spacing": entry["native_spacing"]}


def prepare_cases(cases, cfg):
    """Check every voxel of all cases and cache them, in one pass; return those with PVS.

    Masks that are empty, or are so on the working grid, are logged and left out.

    Raises:
        ValueError: lists everything that is wrong with the files; or no mask has PVS.
        OSError: the cache cannot be written.
    """
    prepare, kept = functools.partial(prepare_case, cfg=cfg), []
    # Each case is a batch of its own; collate_fn runs in the workers.
    loader = DataLoader(cases, batch_size=None, collate_fn=prepare, num_workers=worker_count(cfg))
    reports = list(Progress(loader, "checking and caching"))
    raise_problems(
        [problem for report in reports for problem in report["problems"]],
        "Mend these files (a mask lies on its scan's grid) or move them away.",
    )
    for failure in filter(None, (report["failure"] for report in reports)):
        raise OSError(f"{failure}\nFree space, or choose another folder with --cache-dir.")
    for case, report in zip(cases, reports, strict=True):
        for warning in report["warnings"]:
            log.warning("Warning: %s", warning)
        native, working = report["voxels"]
        if working:
            kept.append(case)
        elif native:
            log.warning(
                "Warning: left out, its %d voxels vanish on the working grid: %s",
                *(native, case["label"]),
            )
        else:
            log.warning("Warning: left out, empty mask: %s", case["label"])
    if not kept:
        expected = "expected masks with voxels above 0, all are empty (see LABEL_GLOB)"
        raise ValueError(f"{cfg.DATA_DIR}: {expected}")
    spacings = sorted({" x ".join(f"{mm:g}" for mm in report["spacing"]) for report in reports})
    log.info("Native grid     %s mm", ", ".join(spacings))
    return kept


class TrainingPatches(Dataset):
    """Training cases by (epoch, number); the patches are a function of SEED, epoch and number."""

    def __init__(self, cases, cfg):
        self.cases, self.cfg, self.transforms = cases, cfg, build_train_transforms(cfg)

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, key):
        epoch, number = key
        entry = load_cached(self.cases[number], self.cfg)
        item = {name: entry[name] for name in (*BOTH, "foreground", "background")}
        seed = np.random.SeedSequence([self.cfg.SEED, epoch, number]).generate_state(1)[0]
        self.transforms.set_random_state(seed=int(seed))
        return self.transforms(item | {"name": self.cases[number]["name"]})


class EpochSampler(Sampler):
    """Yield (epoch, number) of every training case, in an order drawn from SEED and the epoch."""

    def __init__(self, count, seed):
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        return ((self.epoch, int(number)) for number in order)


def build_train_loader(cases, cfg, device):
    """Return the loader of batches: BATCH_SIZE volumes' patches, (B, 1, *IMG_PATCH_SIZE)."""
    return DataLoader(
        TrainingPatches(cases, cfg),
        batch_size=cfg.BATCH_SIZE,
        sampler=EpochSampler(len(cases), cfg.SEED),
        num_workers=worker_count(cfg),
        collate_fn=list_data_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=cfg.NUM_WORKERS > 0,
        generator=torch.Generator(),  # so that it draws nothing from the model's random numbers
    )


# ------------------------------------------------------------------------------------------- Model


def build_model(cfg):
    """Return UNet++ (Zhou et al. 2018, 10.1007/978-3-030-00889-5_1) over its encoder, on the CPU.

    Takes images (B, 1, H, W, D), in [0, 1] but for noise, and gives logits of that shape. The
    weights that are not pretrained are a function of SEED.

    Raises:
        ValueError: the encoder's weights cannot be had or do not fit.
    """
    torch.manual_seed(cfg.SEED)
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
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d) and cfg.BATCHNORM_MOMENTUM > 0:
            module.momentum = cfg.BATCHNORM_MOMENTUM
    return model


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


UNPICKLE_ERRORS = (pickle.UnpicklingError, struct.error)  # of torch.load on damaged files


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
    except (*READ_ERRORS, RuntimeError, LookupError, AttributeError, *UNPICKLE_ERRORS) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: expected the state dict of a 2D EfficientNet as ENCODER_NAME says; it is "
            f"damaged or of another network ({reason}).\n"
            "Remove or replace the file, or use --encoder-weights none."
        ) from None


def start_at_log_odds(model, cases, cfg):
    """Set the output's bias so that the first prediction is the training masks' mean."""
    entries = [load_cached(case, cfg) for case in cases]
    total = sum(entry["label"].numel() for entry in entries)
    labelled = sum(len(entry["foreground"]) for entry in entries)
    labelled = min(max(labelled, 1), total - 1)
    nn.init.constant_(model.segmentation_head[0].bias, math.log(labelled / (total - labelled)))


# -------------------------------------------------------------------------------- Loss and metrics

# 0.5 BCE + 0.5 Dice loss of logits and labels (B, 1, H, W, D), both float32. The Dice term is one
# over the whole batch, smoothed by 1, since a patch may hold no PVS (Milletari et al. 2016,
# 10.1109/3DV.2016.79).
loss_function = DiceCELoss(
    sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1, lambda_dice=0.5, lambda_ce=0.5
)

METRICS = {"dice": "Dice", "iou": "IoU", "precision": "precision", "recall": "recall"}


def calculate_metrics(pred, label):
    """Return {"dice", "iou", "precision", "recall"} in [0, 1] of two binary masks of one shape.

    Both empty: all are 1, nothing was there and nothing was found. One of them empty: all are 0,
    so that neither a missed nor an invented finding drops out of a mean.
    """
    pred, label = torch.as_tensor(pred).bool(), torch.as_tensor(label).bool()
    hits, found, true = (int(mask.sum()) for mask in (pred & label, pred, label))
    if found == 0 or true == 0:
        return dict.fromkeys(METRICS, float(found == true))
    scores = 2 * hits / (found + true), hits / (found + true - hits), hits / found, hits / true
    return dict(zip(METRICS, scores, strict=True))


# --------------------------------------------------------------------------------------- Inference


def network_input(image, device, cfg):
    """Return images (B, 1, H, W, D) on `device`, in the memory layout that was measured to be fast.

    On CPUs channels-last is faster in inference, and in float32 it halves training steps; in
    bfloat16 its depthwise convolutions' backward pass is slow. GPUs were not measured.
    """
    image = image.to(device, non_blocking=True)
    training = torch.is_grad_enabled()
    if device.type != "cpu" or (training and autocast_dtype(device, cfg) != torch.float32):
        return image
    return image.contiguous(memory_format=torch.channels_last_3d)


@torch.inference_mode()
def predict_case(model, image, cfg):
    """Return the logits (1, 1, H, W, D) float32 of a volume (1, H, W, D), both on the working grid.

    Windows of IMG_PATCH_SIZE overlap and are blended with Gaussian weights; a smaller volume is
    padded. Puts the model into evaluation mode.
    """
    model.eval()
    device = next(model.parameters()).device

    def predict_windows(windows):
        with autocast(device, cfg):
            return model(network_input(windows, device, cfg)).float()

    return sliding_window_inference(
        image[None].float().to(device),
        cfg.IMG_PATCH_SIZE,
        cfg.SW_BATCH_SIZE,
        predict_windows,
        overlap=cfg.SW_OVERLAP,
        mode="gaussian",
    )


# ------------------------------------------------------------------------------------- Checkpoints


def package_versions():
    """Return the versions of Python and of the packages that make the numbers."""
    names = ("torch", "monai", "segmentation_models_pytorch_3d", "numpy", "scipy", "nibabel")
    versions = {name: importlib.metadata.version(name) for name in (*names, "scikit-learn")}
    return {"python": platform.python_version()} | versions


def save_checkpoint(path, model, cfg, row):
    """Write the weights with the Config, the grid, the versions and the epoch's row of history."""
    grid = {"orientation": "RAS", "spacing_mm": cfg.PIX_DIM}
    content = {"model": model.state_dict(), "config": asdict(cfg), "working_grid": grid}
    write_torch(path, content | {"history_row": row, "versions": package_versions()})


def load_checkpoint(path, model):
    """Load a checkpoint's weights into `model` and return the rest of its content."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(content.pop("model"))
    return content


# ---------------------------------------------------------------------------------------- Training


def check_finite(loss, epoch, names):
    """Return the loss as a number.

    Raises:
        FloatingPointError: it is not finite; names the cases of the batch.
    """
    if not math.isfinite(loss.item()):
        raise FloatingPointError(
            f"the loss became {loss.item()} in epoch {epoch} with {', '.join(sorted(set(names)))}. "
            "Nothing was saved from it. Look at these scans; lower LR, or use --no-amp."
        )
    return loss.item()


def train_one_epoch(model, loader, optimizer, scaler, cfg):
    """Train once on patches of every case; the epoch is the sampler's.

    Returns:
        (mean loss, Dice of all the epoch's patches as one volume: not comparable to a case's)

    Raises:
        FloatingPointError: a loss is not finite; the weights are untouched by it.
    """
    model.train()
    device, epoch, losses = next(model.parameters()).device, loader.sampler.epoch, []
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # voxels: hits, found + true
    torch.manual_seed(np.random.SeedSequence([cfg.SEED, epoch]).generate_state(1)[0].item())
    for step, batch in enumerate(Progress(loader, f"epoch {epoch}, training")):
        image = network_input(batch["image"], device, cfg)
        label = batch["label"].to(device, non_blocking=True)
        with autocast(device, cfg):
            logits = model(image)
        loss = loss_function(logits.float(), label)
        losses.append(check_finite(loss, epoch, batch["name"]))
        group_start = step - step % cfg.ACCUMULATE_STEPS
        group = min(cfg.ACCUMULATE_STEPS, len(loader) - group_start)
        scaler.scale(loss / group).backward()
        if step + 1 == group_start + group:
            update_weights(model, optimizer, scaler, cfg)
        pred, true = logits.detach() > 0, label > 0
        counts += torch.stack([(pred & true).sum(), pred.sum() + true.sum()])
    hits, both = counts.tolist()
    return float(np.mean(losses)), 2 * hits / max(both, 1)


def update_weights(model, optimizer, scaler, cfg):
    """Make one optimizer step with the gradients at hand, clipped, and clear them."""
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), cfg.GRAD_CLIP)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def validate(model, cases, cfg, epoch):
    """Return (mean loss, mean Dice) of the blended logits of whole volumes, working grid.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    losses, dices = [], []
    for case in Progress(cases, f"epoch {epoch}, validation"):
        entry = load_cached(case, cfg)
        logits, label = predict_case(model, entry["image"], cfg).cpu(), entry["label"][None]
        loss = loss_function(logits, label.float())
        losses.append(check_finite(loss, epoch, [case["name"]]))
        dices.append(calculate_metrics(logits > 0, label)["dice"])
    return float(np.mean(losses)), float(np.mean(dices))


NOTHING_LEARNED = (
    "See whether the masks fit the scans, "
    "then try --head-bias-log-odds --batchnorm-momentum 0.1 or a lower --lr."
)


def build_optimizer(model, cfg):
    """Return AdamW, its ReduceLROnPlateau, and the gradient scaler that float16 needs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.LR, weight_decay=cfg.WEIGHT_DECAY)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=cfg.LR_FACTOR, patience=cfg.LR_PATIENCE, min_lr=cfg.LR_MIN
    )
    device = next(model.parameters()).device
    fp16 = autocast_dtype(device, cfg) == torch.float16
    return optimizer, plateau, torch.amp.GradScaler(device.type, enabled=fp16)


def fit(model, cfg, split):
    """Train until EPOCHS, or until EARLY_STOPPING validations in a row brought no better Dice.

    The weights of the best validation Dice are in `checkpoints/best_model.pth`, always written
    after the first epoch. While the Dice has never left 0 the run is not stopped early: with 0.1 %
    foreground it can stay there for long.

    Returns:
        the history: a dict an epoch with epoch, train_loss, train_dice, val_loss and val_dice
        (None where not validated), lr, seconds
    """
    device, out = next(model.parameters()).device, Path(cfg.OUTPUT_DIR)
    loader = build_train_loader(split["train"], cfg, device)
    optimizer, plateau, scaler = build_optimizer(model, cfg)
    best_dice, waited, history = -1.0, 0, []
    for epoch in range(1, cfg.EPOCHS + 1):
        start, loader.sampler.epoch = time.perf_counter(), epoch
        row = {"epoch": epoch, "val_loss": None, "val_dice": None}
        row["lr"] = optimizer.param_groups[0]["lr"]
        row["train_loss"], row["train_dice"] = train_one_epoch(
            model, loader, optimizer, scaler, cfg
        )
        if epoch in (1, cfg.EPOCHS) or epoch % cfg.VAL_EVERY == 0:
            row["val_loss"], row["val_dice"] = validate(model, split["val"], cfg, epoch)
            plateau.step(row["val_loss"])
            waited += 1
        row["seconds"] = round(time.perf_counter() - start, 2)
        history.append(row)
        improved = row["val_dice"] is not None and row["val_dice"] > best_dice
        if improved:
            best_dice, waited = row["val_dice"], 0
            save_checkpoint(out / "checkpoints" / "best_model.pth", model, cfg, row)
        write_json(out / "logs" / "training_history.json", history)
        log_epoch(history, improved, cfg)
        if epoch == 50 and best_dice == 0:
            log.warning("Warning: validation Dice is still 0; going on. %s", NOTHING_LEARNED)
        if waited >= cfg.EARLY_STOPPING and best_dice > 0:
            log.info("Stopped early: no better validation Dice in %d validations", waited)
            break
    return history


def log_epoch(history, improved, cfg):
    """Print the last epoch's row, `*` for the best validation Dice so far, and the time left."""
    row = history[-1]
    if len(history) == 1:
        log.info("epoch  train loss   Dice    val loss   Dice         LR  seconds  time left")
    loss, dice = ("-" if row[k] is None else f"{row[k]:.4f}" for k in ("val_loss", "val_dice"))
    mean_seconds = np.mean([r["seconds"] for r in history[-20:]])
    minutes, seconds = divmod(round((cfg.EPOCHS - row["epoch"]) * mean_seconds), 60)
    log.info(
        f"{row['epoch']:5d} {row['train_loss']:11.4f} {row['train_dice']:6.4f} {loss:>11} "
        f"{dice:>6}{'*' if improved else ' '} {row['lr']:9.1e} {row['seconds']:8.1f} "
        f"{minutes // 60:4d}:{minutes % 60:02d}:{seconds:02d}"
    )


# -------------------------------------------------------------------------------------- Evaluation


def describe_grid(cfg):
    """Return the working grid in the words that every table, file and figure shows."""
    return f"working grid, RAS, {' x '.join(f'{mm:g}' for mm in cfg.PIX_DIM)} mm"


def data_set_name(cfg):
    """Return the name that the data set gives itself; simulated data is called so by it."""
    try:
        path = Path(cfg.DATA_DIR) / "dataset_description.json"
        return str(json.loads(path.read_text(encoding="utf-8"))["Name"])
    except (OSError, ValueError, KeyError, TypeError):
        return Path(cfg.DATA_DIR).resolve().name


def evaluate(model, cfg, cases):
    """Score every test case on the working grid; write the scores and figures, print a table."""
    out, rows, slices = Path(cfg.OUTPUT_DIR), [], []
    for case in Progress(cases, "testing"):
        entry = load_cached(case, cfg)
        pred = (predict_case(model, entry["image"], cfg)[0, 0] > 0).cpu().numpy()
        image, label = entry["image"][0].float().numpy(), entry["label"][0].numpy() > 0
        row = {"name": case["name"], "subject": case["subject"]} | calculate_metrics(pred, label)
        row |= {"label_voxels": int(label.sum()), "pred_voxels": int(pred.sum())}
        rows.append(row)
        index = busiest_slice(label, pred, PLANES["axial"])
        volumes = (image, label, pred)
        slices.append([display_slice(v, PLANES["axial"], index).copy() for v in volumes])
        draw_multi_plane(out / "multi_plane" / f"{case['name']}.png", volumes, row, cfg)
    write_test_metrics(out / "logs" / "comprehensive_test_metrics.json", rows, model, cfg)
    draw_test_grid(out / "test_set_visualization_grid_300dpi.jpg", rows, slices, cfg)
    log_test_table(rows, cfg)


def write_test_metrics(path, rows, model, cfg):
    """Write means and standard deviations (ddof 0) and each case's scores, with their origin."""
    content = {"data_set": data_set_name(cfg), "grid": describe_grid(cfg), "n": len(rows)}
    for name in METRICS:
        values = [row[name] for row in rows]
        content[f"{name}_mean"] = float(np.mean(values))
        content[f"{name}_std"] = float(np.std(values))
    content |= {"subjects": rows, "config": asdict(cfg), "versions": package_versions()}
    content["device"] = str(next(model.parameters()).device)
    content["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(path, content)


def log_test_table(rows, cfg):
    """Print a row a case, then mean and standard deviation."""
    log.info("\nTest scores, %s\n%s", describe_grid(cfg), data_set_name(cfg))
    width = max(len(row["name"]) for row in rows)
    log.info(" " * width + "".join(f"{name:>11}" for name in METRICS))
    scores = np.array([[row[name] for name in METRICS] for row in rows])
    names = [row["name"] for row in rows]
    table = [*zip(names, scores, strict=True), ("mean", scores.mean(0)), ("SD", scores.std(0))]
    for name, values in table:
        log.info(f"{name:{width}}" + "".join(f"{value:11.4f}" for value in values))


# ----------------------------------------------------------------------------------------- Figures

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the axis of a RAS volume that a plane cuts
SIDES = {"axial": "RL", "coronal": "RL", "sagittal": "AP"}  # at the left and right of a picture
RED, GREEN = (1.0, 0.15, 0.1), (0.1, 0.9, 0.2)  # ground truth, prediction


def busiest_slice(label, pred, axis):
    """Return the index of the slice with the most labelled voxels, else predicted, else half."""
    across = tuple(other for other in range(3) if other != axis)
    for mask in (label, pred):
        if mask.any():
            return int(mask.sum(across).argmax())
    return label.shape[axis] // 2


def display_slice(volume, axis, index):
    """Return a slice of a RAS volume for imshow's origin "lower", as radiologists look at it.

    Axial and coronal: the subject's right is on the picture's left. Sagittal: anterior is there.
    """
    return np.flip(np.take(volume, index, axis), 0).T


def draw_panel(ax, image, mask, colour, plane):
    """Draw a slice (2D, [0, 1]) with a mask over it and the sides marked at the edges."""
    shown = np.repeat(np.clip(image, 0, 1)[..., None], 3, 2)
    shown[mask] = 0.2 * shown[mask] + 0.8 * np.array(colour)
    ax.imshow(shown, origin="lower", interpolation="nearest")
    for x, side, word in zip((0.02, 0.98), SIDES[plane], ("left", "right"), strict=True):
        ax.text(x, 0.5, side, color="white", size=8, ha=word, va="center", transform=ax.transAxes)
    ax.set_axis_off()


def draw_row(axes, slices, titles, plane, spacing):
    """Draw image, ground truth and prediction of one plane; `spacing`: mm, of a RAS volume."""
    image, label, pred = slices
    masks, colours = (np.zeros_like(label), label, pred), (RED, RED, GREEN)
    across, up = (mm for axis, mm in enumerate(spacing) if axis != PLANES[plane])
    for ax, mask, colour, title in zip(axes, masks, colours, titles, strict=True):
        draw_panel(ax, image, mask, colour, plane)
        ax.set_aspect(up / across)
        ax.set_title(title, color="white", size=9)


def write_figure(path, figure, title):
    """Give the figure its title, write it as a 300-DPI picture and close it."""
    figure.suptitle(title, color="black" if figure.get_facecolor()[0] else "white", size=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:], dpi=300)
    plt.close(figure)
    write_file(path, buffer.getbuffer())


def draw_multi_plane(path, volumes, row, cfg):
    """Draw one case in three planes; `volumes`: image, label and pred (H, W, D), working grid."""
    image, label, pred = volumes
    size = {"figsize": (9, 10), "layout": "constrained", "facecolor": "black"}
    figure, axes = plt.subplots(3, 3, **size)
    for line, (plane, axis) in zip(axes, PLANES.items(), strict=True):
        index = busiest_slice(label, pred, axis)
        slices = [display_slice(volume, axis, index) for volume in volumes]
        titles = (
            f"{plane}, slice {index} of {image.shape[axis]}",
            f"ground truth, {slices[1].sum()} voxels",
            f"prediction, {slices[2].sum()} voxels",
        )
        draw_row(line, slices, titles, plane, cfg.PIX_DIM)
    scores = "   ".join(f"{METRICS[name]} {row[name]:.3f}" for name in METRICS)
    counts = f"{row['label_voxels']} voxels in the ground truth, {row['pred_voxels']} predicted"
    title = f"{row['name']}   {scores}\n{counts}; {describe_grid(cfg)}\n{data_set_name(cfg)}"
    write_figure(path, figure, title)


def draw_test_grid(path, rows, slices, cfg, most=10):
    """Draw the axial slice with the most PVS of every test case, a row each.

    Of more than `most` cases those are drawn that are evenly spread from worst to best Dice.
    """
    ranked = sorted(range(len(rows)), key=lambda number: rows[number]["dice"])
    spread = np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)
    size = {"figsize": (9, 0.8 + 3.4 * len(spread)), "layout": "constrained", "facecolor": "black"}
    figure, axes = plt.subplots(len(spread), 3, squeeze=False, **size)
    for line, number in zip(axes, (ranked[place] for place in spread), strict=True):
        row = rows[number]
        titles = (row["name"], "ground truth", f"prediction, Dice of the volume {row['dice']:.3f}")
        draw_row(line, slices[number], titles, "axial", cfg.PIX_DIM)
    shown = f"{len(spread)} of {len(rows)} test cases, worst to best; {describe_grid(cfg)}"
    write_figure(path, figure, f"{data_set_name(cfg)}\n{shown}")


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
    write_figure(path, figure, data_set_name(cfg))


# --------------------------------------------------------------------------------------- Demo data

DEMO_SHAPE = (96, 112, 96)  # voxels of 1 mm
DEMO_SUBJECTS = 16
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


def draw_tubes(rng, where, count):
    """Return the occupancy of tubes like PVS, centred in the mask `where` and kept within it.

    They are 6-18 mm long, point to the head's centre within some 25 degrees, and are 2.8-4 mm wide:
    wider than most PVS, so that a small network learns them in voxels of 1 mm within minutes.
    """
    occupancy, middle = np.zeros(where.shape, np.float32), (np.array(where.shape) - 1) / 2
    candidates = np.argwhere(where)
    for centre in candidates[rng.integers(len(candidates), size=count)]:
        inward = (middle - centre) / (np.linalg.norm(middle - centre) + 1e-6)
        axis = inward + 0.3 * rng.standard_normal(3)
        axis /= np.linalg.norm(axis)
        length, bend = rng.uniform(6, 18), np.cross(axis, rng.standard_normal(3))
        diameter = np.clip(rng.lognormal(np.log(3.4), 0.1), 2.8, 4)
        draw_tube(occupancy, centre, axis, length, diameter / 2, 0.08 * length * bend)
    return occupancy * ndimage.binary_dilation(where, iterations=1)


def simulate_head(rng, shape=DEMO_SHAPE):
    """Return a simulated T2w head (X, Y, Z) int16 of 1 mm and the mask of its white-matter PVS.

    Lesions of the white matter and PVS of the basal ganglia look alike and bear no label. Contrasts
    after Bernal et al. 2022 (10.1016/j.mri.2022.07.016).
    """
    image, white, basal = simulate_tissue(rng, shape)
    pvs = draw_tubes(rng, white, rng.integers(50, 90))
    unlabelled = draw_tubes(rng, basal, rng.integers(2, 6))
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
    affine = nib.affines.from_matvec(np.eye(3), -(np.array(DEMO_SHAPE) - 1) / 2)
    for number in Progress(range(DEMO_SUBJECTS), "simulating heads"):
        subject = f"sub-{number + 1:03d}"
        label_name = f"derivatives/mask/{subject}/{subject}_desc-mask_PVS.nii.gz"
        names = (f"{subject}/anat/{subject}_T2w.nii.gz", label_name)
        volumes = simulate_head(np.random.default_rng([seed, number]))
        for name, volume in zip(names, volumes, strict=True):
            nifti = nib.Nifti1Image(volume, affine)
            nifti.header.set_xyzt_units("mm")
            write_file(folder / name, gzip.compress(nifti.to_bytes(), 3, mtime=0))
    write_json(marker, description)


# -------------------------------------------------------------------------------------------- Main


@contextmanager
def logging_to_screen():
    """Show messages on stdout, errors on stderr; `open_output_folder` adds a file."""
    screen, errors = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    screen.addFilter(lambda record: record.levelno < logging.ERROR)
    errors.setLevel(logging.ERROR)
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(screen)
    log.addHandler(errors)
    try:
        yield
    finally:
        for handler in log.handlers[:]:
            log.removeHandler(handler)
            handler.close()


def open_output_folder(cfg, options):
    """Make the output folder and keep the messages in its `logs/train.log` from here on.

    Raises:
        ValueError: it holds results that nothing says may be replaced.
    """
    out = Path(cfg.OUTPUT_DIR)
    checkpoint = out / "checkpoints" / "best_model.pth"
    own = options.demo and (out / "data" / "dataset_description.json").exists()
    if checkpoint.exists() and not (options.overwrite or options.check or own):
        raise ValueError(
            f"{checkpoint}: there are results in the output folder already.\n"
            "Choose another with --output-dir, or replace them with --overwrite."
        )
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        log.addHandler(logging.FileHandler(out / "logs" / "train.log", encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"OUTPUT_DIR: expected a folder to write to ({error})") from None


def log_settings(cfg, options):
    """Print the recipe and every setting that differs from Config; all of them for --check."""
    log.info("%s, recipe %s", datetime.now().isoformat(" ", "seconds"), options.recipe)
    for field in fields(Config):
        value = getattr(cfg, field.name)
        if options.check or value != field.default:
            words = " ".join(map(str, value)) if isinstance(value, tuple) else value
            log.info("  %-21s %s", field.name, words)


def log_plan(cfg, model, split):
    """Print on what, with what and into which folder the run works."""
    device = choose_device(cfg)
    arithmetic = str(autocast_dtype(device, cfg)).removeprefix("torch.")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    log.info("Device          %s, arithmetic in %s", device, arithmetic)
    log.info("Data            %s", data_set_name(cfg))
    log.info("Scans           %s", ", ".join(f"{len(c)} {part}" for part, c in split.items()))
    for part in ("val", "test"):
        log.info("  %-14s%s", part, " ".join(case["name"] for case in split[part][:10]))
    log.info("Grid            %s", describe_grid(cfg))
    log.info("Network         UNet++ with %s, %.1f M parameters", cfg.ENCODER_NAME, parameters)
    log.info("Output folder   %s", Path(cfg.OUTPUT_DIR).resolve())


RESULTS = (  # below the output folder
    "checkpoints/best_model.pth",
    "logs/training_history.json",
    "logs/comprehensive_test_metrics.json",
    "multi_plane/sub-*.png",
    "test_set_visualization_grid_300dpi.jpg",
    "training_curves.jpg",
)


def train_and_test(model, split, cfg):
    """Fit, reload the best weights, test and draw; return the exit status."""
    out = Path(cfg.OUTPUT_DIR)
    for path in (path for pattern in RESULTS for path in out.glob(pattern)):
        path.unlink()  # of a run that --overwrite gives up
    subjects = {part: sorted({c["subject"] for c in cases}) for part, cases in split.items()}
    write_json(out / "logs" / "split.json", subjects)
    model.to(choose_device(cfg))
    if cfg.HEAD_BIAS_LOG_ODDS:
        start_at_log_odds(model, split["train"], cfg)
    history = fit(model, cfg, split)
    best = load_checkpoint(out / "checkpoints" / "best_model.pth", model)["history_row"]
    log.info("Best validation Dice %.4f, in epoch %d", best["val_dice"], best["epoch"])
    draw_training_curves(out / "training_curves.jpg", history, cfg)
    evaluate(model, cfg, split["test"])
    log.info("\nScores, figures and weights are in %s", out.resolve())
    if best["val_dice"] > 0:
        return 0
    log.error("No PVS were learned: the validation Dice never left 0. %s", NOTHING_LEARNED)
    return 1


OUT_OF_MEMORY = (
    "To need less: --batch-size 1 --accumulate-steps 2 (the recipe's step in two halves), or "
    "smaller --crops-per-volume, --sw-batch-size or --img-patch-size."
)


def set_up(argv):
    """Do all that comes before training; return (cfg, options, model, split).

    Raises:
        ValueError, FileNotFoundError: what the user can set right, told in full.
    """
    cfg, options = parse_command_line(argv)
    if not (options.demo or Path(cfg.DATA_DIR).is_dir()):
        raise FileNotFoundError(f"{cfg.DATA_DIR}: no such folder (DATA_DIR)\n{HOW_TO_GET_DATA}")
    open_output_folder(cfg, options)
    log_settings(cfg, options)
    if options.demo:
        make_demo_data(cfg.DATA_DIR, cfg.SEED)
    cases = find_cases(cfg)
    model = build_model(cfg)
    split = split_cases(prepare_cases(cases, cfg), cfg)
    log_plan(cfg, model, split)
    return cfg, options, model, split


def main(argv=None):
    """Run the pipeline that the command line asks for; return the exit status."""
    with logging_to_screen():
        prepared = None
        try:
            cfg, options, *prepared = set_up(argv)
            if options.check:
                log.info("Nothing was trained (--check)")
                return 0
            return train_and_test(*prepared, cfg)
        except (ValueError, FileNotFoundError) as error:
            if prepared:  # no mistake of the user's but of the script
                raise
            log.error("Error: %s", error)
            return 2
        except torch.OutOfMemoryError as error:
            log.error("Error: %s\n%s", error, OUT_OF_MEMORY)
            return 1
        except (FloatingPointError, OSError) as error:
            log.error("Error: %s", error)
            return 1
        except KeyboardInterrupt:
            log.error("Interrupted; the best weights so far, if any, are in the output folder.")
            return 130


if __name__ == "__main__":
    sys.exit(main())
