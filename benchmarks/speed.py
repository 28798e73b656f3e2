"""Measure what the pipeline's ingredients gain, side by side with what they replace.

    python benchmarks/speed.py                           all sections, on simulated heads
    python benchmarks/speed.py --only step inference     these; the file's other sections stay
    python benchmarks/speed.py --data-dir ds005595-1.0.0 the same on a data set's first scans
    python benchmarks/speed.py --only inference --checkpoint best_model.pth   of a trained network

A row compares an A with a B, measured in turn: A, B, A, B. The file is written anew with every row,
so that a run that is interrupted keeps what it has measured.
"""

import argparse
import json
import logging
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from monai import transforms as mt
from monai.data import Dataset, list_data_collate
from monai.inferers import sliding_window_inference
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_pvs

HEADS, HEAD_MM = 4, 0.8  # the last head is for validation
FIELD = (1, 0.9, 0.8)  # of a scan's sides that the head's box takes; air is behind and below
SMALL_HEADS, SMALL_SHAPE = 40, (48, 56, 48)  # of 1 mm, where only growth is of interest
SMALL = {"PIX_DIM": (1, 1, 1), "IMG_PATCH_SIZE": (32, 32, 32), "ENCODER_DEPTH": 3}
STEP_PATCH = (64, 64, 64)
WANTED, WORKERS = 20, 8  # patches a second that loading should give; processes that load
NO_GPU = "not run: no GPU here"
GPU_ROWS = {  # by section, what a machine with a GPU would measure on it
    "epoch": ("an epoch on a GPU, s", ("pipeline", "plain loop")),
    "step": ("a step on a GPU: s, MB", ("autocast, channels-last, fused AdamW", "each one off")),
    "recipes": ("a step of 8 patches on a GPU: s, MB", ("autocast", "float32")),
    "inference": ("whole head on a GPU, s", ("pipeline", "plain, and each ingredient off")),
}

# -------------------------------------------------------------------------------------- The report


def median_ratio(pairs):
    """Return the median, smallest and largest of b / a over pairs (a, b)."""
    ratios = [b / a for a, b in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


def number_words(number):
    """Return a number with three digits, or all before the point."""
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def header_text(scans, device, network):
    """Return the head of the report: what all of its numbers depend on."""
    lines, cfg = Path("/proc/cpuinfo").read_text().splitlines(), train_pvs.Config()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
    on_cpu, here = (train_pvs.autocast_dtype(d, cfg) for d in (torch.device("cpu"), device))
    native = "native" if on_cpu == torch.bfloat16 else "emulated, so not used"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = ", ".join(map(" ".join, train_pvs.package_versions().items()))
    return f"""# Speed and memory, measured

A and B of a row were measured in turn (A, B, A, B, ..); their columns hold medians. B / A is the
median of the pairs' ratios, with their range: how many times as long, or as much, B takes.

- Processor: {model}, {os.cpu_count()} cores, bfloat16 {native}; GPU: {gpu}
- Measured on: {device.type}; the pipeline's arithmetic there: {str(here).removeprefix("torch.")}
- Versions: {versions}
- Scans: {scans}
- Network: {network}
"""


class Report:
    """The markdown file; sections of an earlier run stay where its head was the same."""

    def __init__(self, path, header, command):
        self.path, self.header, self.command = Path(path), header, command
        self.name, self.rows, self.facts, self.texts = "", [], [], {}
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if text.startswith(header):
            parts = text.split("\n## ")[1:]
            self.texts = {part.split(":")[0]: f"## {part.rstrip()}\n" for part in parts}

    def begin(self, name):
        """Begin a section, in place of an earlier one of that name."""
        print(f"\n{name}")
        self.name, self.rows, self.facts = name, [], []

    def add(self, what, names, pairs):
        """Add a row: names of A and B, pairs of numbers, or a sentence on why there are none."""
        cells = ["-", "-", pairs, "-"]
        if not isinstance(pairs, str):
            middle, low, high = map(number_words, median_ratio(pairs))
            cells = [number_words(statistics.median(side)) for side in zip(*pairs, strict=True)]
            count = train_pvs.count_words(len(pairs), "pair")
            cells += [f"**{middle}**", f"{low} to {high}, {count}"]
        self.rows.append(f"| {' | '.join([what, *names, *cells])} |")
        print(f"  {self.rows[-1]}", flush=True)
        self.write()

    def tell(self, fact):
        """Add a sentence below the section's table."""
        print(f"  {fact}", flush=True)
        self.facts.append(f"- {fact}")
        self.write()

    def write(self):
        """Write the file with what there is so far."""
        title = SECTIONS[self.name].__doc__.split("\n")[0].removeprefix("Measure ").rstrip(".")
        table = ["| measured | A | B | A | B | B / A | range |", "|---" * 7 + "|", *self.rows]
        facts = ["", *self.facts] if self.facts else []
        lines = [f"## {self.name}: {title}", "", *(table if self.rows else []), *facts]
        origin = f"Measured on {date.today()} by `{self.command}`.\n"
        self.texts[self.name] = "\n".join([*lines, "", origin])
        parts = [self.texts[name] for name in SECTIONS if name in self.texts]
        train_pvs.write_file(self.path, "\n".join([self.header, *parts]))


# --------------------------------------------------------------------------- Heads and measurements


@dataclass
class Bench:
    """What the sections share."""

    folder: Path  # for simulated heads, caches and results
    data_dir: Path  # BIDS
    pairs: int
    device: torch.device
    report: Report
    checkpoint: str = ""  # of the network whose inference is measured; empty: random weights


def simulate_scan(rng, shape, field):
    """Return a simulated head and its mask (X, Y, Z), in air where `field` leaves room."""
    inner = [round(part * side) for part, side in zip(field, shape, strict=True)]
    image, label = train_pvs.simulate_head(rng, tuple(inner))
    air = rng.rayleigh(image[:4, :4, :4].mean() / math.sqrt(math.pi / 2), shape)
    place = tuple(slice(side - part, side) for part, side in zip(inner, shape, strict=True))
    scan, mask = air.astype(image.dtype), np.zeros(shape, label.dtype)
    scan[place], mask[place] = image, label
    return scan, mask


def make_heads(folder, count, shape, spacing, field=(1, 1, 1)):
    """Write simulated heads as a BIDS data set, unless they are there; return its folder."""
    for number in range(count):
        subject = f"sub-{number + 1:03d}"
        if any(folder.glob(f"derivatives/mask/{subject}/*")):  # the mask is written last
            continue
        volumes = simulate_scan(np.random.default_rng([123, number]), tuple(shape), field)
        train_pvs.write_head(folder, subject, volumes, spacing)
        print(f"simulated {subject} of {folder.name}", flush=True)
    return folder


def settings(bench, spacing=1.5, **overrides):
    """Return the Config of a measurement with a working grid of that spacing (mm)."""
    base = {"DATA_DIR": str(bench.data_dir), "OUTPUT_DIR": str(bench.folder / "out")}
    base |= {"CACHE_DIR": str(bench.folder / "cache"), "DEVICE": bench.device.type}
    base |= {"ENCODER_NAME": "efficientnet-b0", "ENCODER_WEIGHTS": "none"}
    return replace(train_pvs.Config(), **base | {"PIX_DIM": (spacing,) * 3} | overrides)


def prepare_heads(cfg, count=HEADS):
    """Return the first cases, prepared."""
    return train_pvs.prepare_cases(train_pvs.find_cases(cfg)[:count], cfg)


def prepare_small_heads(bench, **overrides):
    """Return the small heads, prepared, and their Config; all work in one process."""
    folder = make_heads(bench.folder / "small", SMALL_HEADS, SMALL_SHAPE, 1)
    cfg = settings(bench, DATA_DIR=str(folder), NUM_WORKERS=0, **SMALL | overrides)
    return prepare_heads(cfg, SMALL_HEADS), cfg


def seconds_of(work, device):
    """Return how long a call takes, until a GPU has done its part too."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(bench, what, sides, warm_up=False):
    """Call two works in turn and add the row of their seconds; return the pairs.

    `sides`: {name: work}. A work that returns {what: number} adds those rows in place of its
    seconds. With `warm_up` a first call of each does not count.
    """
    results = []
    for number in range(-warm_up, bench.pairs):
        start, pair = time.perf_counter(), []
        for work in sides.values():
            returned = []
            seconds = seconds_of(lambda w=work, r=returned: r.append(w()), bench.device)
            pair.append(returned[0] if isinstance(returned[0], dict) else {what: seconds})
        results += [pair] if number >= 0 else []
        name = f"pair {number + 1} of {bench.pairs}" if number >= 0 else "warm-up"
        print(f"  {what}, {name}: {time.perf_counter() - start:.1f} s", flush=True)
    for row in results[0][0]:
        bench.report.add(row, sides, [(a[row], b[row]) for a, b in results])
    return results


def keep_pipeline_quiet():
    """Keep the pipeline's own messages and warnings off the screen."""
    train_pvs.log.setLevel(logging.ERROR)


def in_fresh_process(work, *arguments):
    """Return what a call returns in a process that has done nothing before."""
    context = {"mp_context": get_context("spawn"), "initializer": keep_pipeline_quiet}
    with ProcessPoolExecutor(1, **context) as pool:
        return pool.submit(work, *arguments).result()


# ----------------------------------------------------------------------------------- Epoch and step


def plain_loader(cases, cfg, training):
    """Return a loader that does all anew from the files in every epoch, and gives MetaTensors."""
    both, size = train_pvs.BOTH, {"spatial_size": cfg.IMG_PATCH_SIZE}
    steps = [mt.LoadImaged(both), mt.EnsureChannelFirstd(both)]
    steps += [mt.AsDiscreted("label", threshold=1e-6), mt.Orientationd(both, "RAS", labels=None)]
    steps.append(mt.Spacingd(both, pixdim=cfg.PIX_DIM, mode=train_pvs.INTERPOLATION))
    scale = (*cfg.INTENSITY_PERCENTILES, 0, 1)
    steps.append(mt.ScaleIntensityRangePercentilesd("image", *scale, clip=True))
    steps.append(mt.SpatialPadd(both, **size))
    if training:
        crop = size | {"num_samples": cfg.CROPS_PER_VOLUME, "pos": cfg.POS_NEG_RATIO, "neg": 1}
        steps.append(mt.RandCropByPosNegLabeld(both, label_key="label", **crop))
        steps += train_pvs.build_train_transforms(cfg).transforms[1:-1]  # the last ends MetaTensors
    files = [{key: case[key] for key in both} for case in cases]
    workers = train_pvs.worker_count(cfg) if training else 0
    how = {"num_workers": workers, "persistent_workers": workers > 0, "shuffle": training}
    how |= {"batch_size": cfg.BATCH_SIZE if training else 1, "collate_fn": list_data_collate}
    return DataLoader(Dataset(files, mt.Compose(steps)), **how)


def plain_training(model, loader, optimizer, cfg):
    """Train one epoch in float32, contiguous; the loss is read in every step."""
    model.train()
    device = next(model.parameters()).device
    for batch in loader:
        optimizer.zero_grad()
        loss = train_pvs.loss_function(model(batch["image"].to(device)), batch["label"].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.GRAD_CLIP)
        optimizer.step()
        loss.item()


@torch.inference_mode()
def plain_logits(model, image, cfg):
    """Return the logits of a volume (1, H, W, D): windows of equal weight, float32, contiguous."""
    model.eval()
    image = image[None].float().to(next(model.parameters()).device)
    windows = {"roi_size": cfg.IMG_PATCH_SIZE, "sw_batch_size": cfg.SW_BATCH_SIZE}
    windows |= {"overlap": cfg.SW_OVERLAP, "mode": "constant"}
    return sliding_window_inference(image, predictor=model, **windows)


def plain_validation(model, loader, cfg):
    """Score whole volumes, uncropped."""
    for batch in loader:
        logits, label = plain_logits(model, batch["image"][0], cfg).cpu(), batch["label"]
        train_pvs.loss_function(logits, label).item()
        train_pvs.calculate_metrics(logits > 0, label)


class WatchedLoader:
    """A loader that notes how many seconds its user waits for batches."""

    def __init__(self, loader):
        self.loader, self.epoch, self.waited = loader, 0, 0.0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        start, self.loader.epoch = time.perf_counter(), self.epoch
        for batch in self.loader:
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def rest(self):
        """End the workers, which would go on with the next epoch while others are measured."""
        self.loader.batches = self.loader.following = None


def timed_epoch(train, validate, device):
    """Return the seconds of an epoch's parts by the names of their rows."""
    training, validation = seconds_of(train, device), seconds_of(validate, device)
    whole = {"training and validation, s": training + validation}
    return whole | {"training alone, s": training, "validation alone, s": validation}


def measure_epoch(bench):
    """Measure an epoch of three heads and the validation of a fourth, 1.5 mm, patches of 64^3.

    Network, loss, patches and random transforms are the same on both sides.
    """
    cfg, shares = settings(bench, IMG_PATCH_SIZE=STEP_PATCH), []
    cases = prepare_heads(cfg)
    models = [train_pvs.build_model(cfg).to(bench.device) for _ in range(2)]
    loader = WatchedLoader(train_pvs.build_train_loader(cases[:-1], cfg, bench.device))
    training = train_pvs.build_training(models[0], cfg)
    adamw, scaler = training["optimizer"], training["scaler"]
    weights, decay = models[1].parameters(), cfg.WEIGHT_DECAY
    plain_adamw = torch.optim.AdamW(weights, lr=cfg.LR, weight_decay=decay)
    loaders = plain_loader(cases[:-1], cfg, True), plain_loader(cases[-1:], cfg, False)

    def ours():
        loader.waited, loader.epoch = 0.0, loader.epoch + 1
        train = partial(train_pvs.train_one_epoch, models[0], loader, adamw, scaler, cfg)
        validate = partial(train_pvs.validate, models[0], cases[-1:], cfg, loader.epoch)
        numbers = timed_epoch(train, validate, bench.device)
        shares.append(100 * loader.waited / numbers["training and validation, s"])
        loader.rest()
        return numbers

    def plain():
        train = partial(plain_training, models[1], loaders[0], plain_adamw, cfg)
        validate = partial(plain_validation, models[1], loaders[1], cfg)
        return timed_epoch(train, validate, bench.device)

    compare(bench, "epoch", {"pipeline, cached": ours, "plain loop": plain})
    told = ", ".join(f"{share:.1f} %" for share in shares)
    workers = train_pvs.count_words(train_pvs.worker_count(cfg), "worker")
    bench.report.tell(f"The pipeline waits for batches in {told} of its epochs' time, {workers}.")
    bench.report.tell(
        "Plain loop: MONAI's transforms from the files in every epoch, MetaTensors, float32, "
        "contiguous, the loss read in every step, AdamW not fused; validation by windows of equal "
        "weight on the uncropped volume. Its workers stay; the pipeline's start in every epoch."
    )


def contiguous(image, device, _):
    """Take the place of `network_input` where all is to stay contiguous."""
    return image.to(device)


def channels_last(image, device, _):
    """Take the place of `network_input` where all is to be channels-last."""
    return image.to(device, memory_format=torch.channels_last_3d)


class OneBatch(list):
    """A loader of one batch."""

    epoch = 1


def training_step(bench, what, network_input=train_pvs.network_input, patches=4, **overrides):
    """Return a work: a training step with some patches; on a GPU it tells of memory too.

    That is without the weights and AdamW's states, also of networks that are measured in turn.
    """
    cfg = settings(bench, **{"IMG_PATCH_SIZE": STEP_PATCH} | overrides)
    model = train_pvs.build_model(cfg).to(bench.device)
    training = train_pvs.build_training(model, cfg)
    optimizer, scaler = training["optimizer"], training["scaler"]
    image = torch.rand(patches, 1, *cfg.IMG_PATCH_SIZE)
    loader = OneBatch([{"image": image, "label": (image > 0.999).float(), "name": ["noise"]}])
    train = partial(train_pvs.train_one_epoch, model, loader, optimizer, scaler, cfg)

    def step():
        with mock.patch.multiple(train_pvs, network_input=network_input):
            if bench.device.type != "cuda":
                return train()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            numbers = {what: seconds_of(train, bench.device)}
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        return numbers | {f"{what.removesuffix(', s')}: GPU memory on top, MB": peak}

    return step


def optimizer_steps(bench, **kind):
    """Return a work: ten steps of AdamW with the network's weights."""
    weights = list(train_pvs.build_model(settings(bench)).to(bench.device).parameters())
    for tensor in weights:
        tensor.grad = torch.full_like(tensor, 1e-3)
    optimizer = torch.optim.AdamW(weights, **kind)
    return lambda: [optimizer.step() for _ in range(10)]


def compare_autocast(bench, what, ours, float32, warm_up=False):
    """Add the row of autocast, unless the processor would emulate it."""
    sides = {"autocast": ours, "float32": float32}
    if train_pvs.autocast_dtype(bench.device, settings(bench)) == torch.float32:
        bench.report.add(what, sides, "not run: bfloat16 is emulated here")
    else:
        compare(bench, what, sides, warm_up)


def measure_step(bench):
    """Measure a training step of four patches of 64^3, one ingredient at a time."""
    what = "training step, s"
    step = partial(training_step, bench, what)
    compare_autocast(bench, what, step(), step(AMP=False), True)
    steps = {"channels-last": channels_last, "contiguous": contiguous}
    steps = {name: step(layout) for name, layout in steps.items()}
    compare(bench, what, steps, warm_up=True)
    kinds = {"AdamW, fused": {"fused": True}, "AdamW, torch's default": {}}
    kinds = {name: optimizer_steps(bench, **kind) for name, kind in kinds.items()}
    compare(bench, "ten optimizer steps alone, s", kinds, warm_up=True)


def measure_recipes(bench):
    """Measure the networks of two recipes at full size: patches of 96^3."""
    patch = {"IMG_PATCH_SIZE": (96, 96, 96), "ENCODER_WEIGHTS": "none"}
    full = {
        "published": {"ENCODER_NAME": train_pvs.Config().ENCODER_NAME, **patch},
        "native": train_pvs.RECIPES["native"] | patch,
    }
    on_gpu = bench.device.type == "cuda"
    what = f"training step of {'8 patches' if on_gpu else 'one patch'}, s"
    step = partial(training_step, bench, what, patches=8 if on_gpu else 1)
    compare(bench, what, {name: step(**flags) for name, flags in full.items()}, warm_up=True)
    for name, flags in full.items() if on_gpu else ():
        sides = {f"{name}, autocast": step(**flags), f"{name}, float32": step(**flags, AMP=False)}
        compare(bench, what, sides, warm_up=True)
    volume, windows = torch.rand(1, 96, 96, 96), {}
    for name, flags in full.items():
        cfg = settings(bench, **flags)
        model = train_pvs.build_model(cfg).to(bench.device)
        windows[name] = partial(train_pvs.predict_logits, model, volume, cfg)
    compare(bench, "inference of one window, s", windows, warm_up=True)


# ---------------------------------------------------------------------------------------- Inference


def build_model_at(cfg, bias):
    """Return a network of random weights whose logits are moved by `bias`."""
    model = train_pvs.build_model(cfg).to(train_pvs.choose_device(cfg))
    with torch.no_grad():
        model.segmentation_head[0].bias += bias
    return model


def uncropped_entry(case, cfg):
    """Return the working grid of a scan without the crop to the head."""
    steps = train_pvs.build_transforms(cfg).transforms
    whole = mt.Compose([step for step in steps if not isinstance(step, mt.CropForegroundd)])
    with mock.patch.object(train_pvs, "build_transforms", return_value=whole):
        return train_pvs.to_working_grid({"image": train_pvs.read_volume(case["image"])[0]}, cfg)


def windows_words(volume, cfg):
    """Return how many windows inference takes for a volume (1, H, W, D), as text."""
    step = [side * (1 - cfg.SW_OVERLAP) for side in cfg.IMG_PATCH_SIZE]
    sides = zip(volume.shape[1:], cfg.IMG_PATCH_SIZE, step, strict=True)
    count = math.prod(1 + math.ceil(max(n - p, 0) / s) for n, p, s in sides)
    return train_pvs.count_words(count, "window")


def equal_weights(*arguments, **named):
    """Take the place of MONAI's inference where all windows are to have equal weight."""
    return sliding_window_inference(*arguments, **named | {"mode": "constant"})


def predict_with(model, image, cfg, **substitutes):
    """Predict a volume with other functions in place of the pipeline's own."""
    own = {"network_input": train_pvs.network_input}
    with mock.patch.multiple(train_pvs, **own | substitutes):
        train_pvs.predict_logits(model, image, cfg)


def compare_ingredients(bench, model, image, whole, cfg):
    """Add rows of whole-head inference, each with one ingredient off; volumes cropped and not."""
    what, ours = "one thing changed, s", partial(predict_with, model, image, cfg)
    sides = {f"cropped to the head, {windows_words(image, cfg)}": ours}
    sides[f"whole volume, {windows_words(whole, cfg)}"] = partial(predict_with, model, whole, cfg)
    compare(bench, what, sides)
    layouts = {"channels-last": channels_last, "contiguous": contiguous}
    layouts = {name: partial(ours, network_input=layout) for name, layout in layouts.items()}
    compare(bench, what, layouts)
    float32 = partial(predict_with, model, image, replace(cfg, AMP=False))
    compare_autocast(bench, what, ours, float32)
    constant = partial(ours, sliding_window_inference=equal_weights)
    compare(bench, what, {"Gaussian blending": ours, "equal weights": constant})


def random_network(bench, spacing):
    """Return a network of random weights that finds 0.1 % of a head, its Config and the head."""
    cfg = settings(bench, spacing)
    case = prepare_heads(cfg)[-1]
    image = train_pvs.load_cached(case)["image"]
    logits = train_pvs.predict_logits(build_model_at(cfg, 0), image, cfg)
    return build_model_at(cfg, -float(np.quantile(logits.cpu().numpy(), 0.999))), cfg, case


def trained_network(bench):
    """Return the checkpoint's network, its Config and a head of which its training knew nothing."""
    content = train_pvs.read_checkpoint(bench.checkpoint)
    data = {"DATA_DIR": str(bench.data_dir)}
    cfg = train_pvs.restore_config(content, settings(bench), data)
    model = train_pvs.build_model(cfg).to(bench.device)
    train_pvs.load_weights(model, content, bench.checkpoint)
    parts = content["sha256"]
    known = {sha256 for part in {*parts} - {"test"} for sha256 in parts[part].values()}
    unknown = [case for case in prepare_heads(cfg) if case["sha256"] not in known]
    if not unknown:
        raise ValueError(f"{bench.checkpoint}: its training knew the first {HEADS} heads")
    return model, cfg, unknown[-1]


def compare_inference(bench, model, cfg, case):
    """Add the row of a head's inference, with the Dice of what it finds."""
    entry, whole, found = train_pvs.load_cached(case), uncropped_entry(case, cfg), {}

    def ours():
        found["A"] = train_pvs.predict_logits(model, entry["image"], cfg), entry

    def plain():
        found["B"] = plain_logits(model, whole["image"], cfg), whole

    grid = train_pvs.spacing_words(cfg.PIX_DIM)
    compare(bench, f"whole head, {grid}, s", {"pipeline": ours, "plain": plain})
    probs = [torch.sigmoid(logits[0]).cpu() for logits, _ in found.values()]
    grids = [grid for _, grid in found.values()]
    masks = [train_pvs.to_native_grid(p, g) > 0.5 for p, g in zip(probs, grids, strict=True)]
    label = train_pvs.read_again(case)[1]
    dices = [train_pvs.calculate_metrics(mask[0], label)["dice"] for mask in masks]
    between, share = train_pvs.calculate_metrics(*masks)["dice"], 100 * masks[0].float().mean()
    told = f"native Dice of the two masks {between:.4f}, {share:.2g} % of the scan is foreground"
    if bench.checkpoint:
        told = f"native Dice of {case['name']} {dices[0]:.4f}, plain {dices[1]:.4f}"
    patch = " x ".join(map(str, cfg.IMG_PATCH_SIZE))
    bench.report.tell(f"{grid}, patches of {patch}, overlap {cfg.SW_OVERLAP}: {told}.")
    if cfg.PIX_DIM[0] > HEAD_MM:
        compare_ingredients(bench, model, entry["image"], whole["image"], cfg)


def measure_inference(bench):
    """Measure whole-head inference: logits by sliding windows."""
    if bench.checkpoint:
        compare_inference(bench, *trained_network(bench))
    else:
        for spacing in (1.5, HEAD_MM):
            compare_inference(bench, *random_network(bench, spacing))
        bench.report.tell("Random weights respond to a window's edges more than trained ones do.")
    bench.report.tell("Plain: whole volume, float32, contiguous, windows of equal weight.")
    bench.report.tell("Masks are cut at 0.5, without mirrored views, on both sides.")


# ------------------------------------------------------------------------ Preparation, augmentation


def measure_preparation(bench):
    """Measure checking and caching of four scans, 1.5 mm."""
    cfg = replace(settings(bench), CACHE_DIR=str(bench.folder / "cache-anew"))

    def first():
        shutil.rmtree(cfg.CACHE_DIR, ignore_errors=True)
        return prepare_heads(cfg)

    sides = {"first run, empty cache": first, "second run": partial(prepare_heads, cfg)}
    compare(bench, f"prepare_cases, {HEADS} scans, s", sides)
    cases = train_pvs.find_cases(cfg)[:HEADS]
    taken = train_pvs.cached_bytes(cases, cfg)
    files = [train_pvs.cache_path(case, cfg) for case in cases]
    voxels = sum(train_pvs.load_cached({"cache": file})["image"].numel() for file in files)
    told = f"{train_pvs.size_words(taken / len(cases))} a scan"
    bench.report.tell(f"The cache takes {taken / voxels:.2f} bytes a voxel of the box, {told}.")


def patch_rate(cases, cfg, what):
    """Cut and augment every case's patches once with one thread; return patches a second."""
    patches, threads = train_pvs.TrainingPatches(cases, cfg), torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    count = sum(len(patches[1, number]) for number in range(len(cases)))
    torch.set_num_threads(threads)
    return {what: count / (time.perf_counter() - start)}


def measure_augmentation(bench):
    """Measure how fast one process of one thread cuts and augments patches of 96^3."""
    grids, what = [settings(bench, spacing) for spacing in (1.5, HEAD_MM)], "patches a second"
    works = [partial(patch_rate, prepare_heads(cfg), cfg, what) for cfg in grids]
    names = [f"working grid {train_pvs.spacing_words(cfg.PIX_DIM)}" for cfg in grids]
    results = compare(bench, what, dict(zip(names, works, strict=True)))
    for side, name in enumerate(names):
        pairs = [(WANTED, WORKERS * pair[side][what]) for pair in results]
        sides = f"{WANTED} wanted", f"{WORKERS} workers (calculated)"
        bench.report.add(f"{what}, {name}", sides, pairs)


# ---------------------------------------------------------------------------- Memory, scaling, more


def predict_peak(case, cfg):
    """Segment a scan; return the memory after loading the network and the peak, MB."""
    model = build_model_at(cfg, -7)  # finds next to nothing
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # let the peak start from here
    loaded = train_pvs.resident_memory()
    train_pvs.segment_scan(model, case, cfg)
    return loaded / 1e6, train_pvs.peak_memory() / 1e6


def epoch_peaks(cases, cfg):
    """Fit for EPOCHS; return the peak after each epoch, MB."""
    split, peaks = {"train": cases[:-1], "val": cases[-1:], "test": []}, []

    def note(*_):
        peaks.append(train_pvs.peak_memory() / 1e6)

    with mock.patch.multiple(train_pvs, log_epoch=note):
        train_pvs.fit(train_pvs.build_model(cfg), cfg, split)
    return peaks


def evaluate_peak(cases, cfg):
    """Test the cases; return the peak, MB."""
    weights = {"file": "none", "epoch": 0, "val_dice": 0.0}
    train_pvs.evaluate(build_model_at(cfg, -7), cases, weights, cfg)
    return {"peak of testing small heads, MB": train_pvs.peak_memory() / 1e6}


def measure_memory(bench):
    """Measure peaks of memory, each in a process that has done nothing before."""
    cfg = settings(bench, HEAD_MM)
    case, report = train_pvs.find_cases(cfg)[0], bench.report
    loaded, peak = in_fresh_process(predict_peak, case, cfg)  # long, and the same every time
    names = "network loaded", "peak"
    report.add(f"predicting a scan at {HEAD_MM} mm, MB", names, [(loaded, peak)])
    report.tell(f"Predicting a scan takes {peak - loaded:.0f} MB beyond the loaded network.")
    cases, cfg = prepare_small_heads(bench, EPOCHS=20)
    runs = [in_fresh_process(epoch_peaks, cases[:5], cfg) for _ in range(bench.pairs)]
    for count in (5, 20):
        pairs = [(peaks[0], peaks[count - 1]) for peaks in runs]
        report.add("peak of training, MB", ("after 1 epoch", f"after {count} epochs"), pairs)
    for counts in ((2, 8), (12, 16)):
        works = [partial(in_fresh_process, evaluate_peak, cases[:n], cfg) for n in counts]
        names = [f"{count} test scans" for count in counts]
        compare(bench, "testing", dict(zip(names, works, strict=True)))
    report.tell("The figure of all test scans grows up to ten of them.")


def epoch_cost(cases, cfg):
    """Return the cost of the second of two epochs by row names."""
    device = train_pvs.choose_device(cfg)
    model = train_pvs.build_model(cfg).to(device)
    loader = train_pvs.build_train_loader(cases, cfg, device)
    training = train_pvs.build_training(model, cfg)
    optimizer, scaler = training["optimizer"], training["scaler"]
    train = partial(train_pvs.train_one_epoch, model, loader, optimizer, scaler, cfg)
    seconds = [seconds_of(train, device) for _ in range(2)][-1]
    peak = train_pvs.peak_memory() / 1e6
    return {"epoch, s a head": seconds / len(cases), "peak memory, MB": peak}


def inference_cost(model, volume, cfg):
    """Return the seconds of inference for a million voxels by the row's name."""
    device = torch.device(cfg.DEVICE)
    seconds = seconds_of(partial(train_pvs.predict_logits, model, volume, cfg), device)
    return {"inference, s a million voxels": seconds / (volume.numel() / 1e6)}


def measure_scaling(bench):
    """Measure whether cost grows in step with heads and voxels: small heads, patches of 32^3."""
    cases, cfg = prepare_small_heads(bench)
    few = partial(in_fresh_process, epoch_cost, cases[:5], cfg)
    for count in (10, 20, 40):
        many = partial(in_fresh_process, epoch_cost, cases[:count], cfg)
        compare(bench, "5 and more heads", {"5 heads": few, f"{count} heads": many})
    model, works = train_pvs.build_model(cfg).to(bench.device), {}
    for shape in ((96, 96, 96), (96, 96, 192), (96, 192, 192)):
        volume = torch.rand(1, *shape)
        name = f"{volume.numel() / 1e6:.2f} M voxels, {windows_words(volume, cfg)}"
        works[name] = partial(inference_cost, model, volume, cfg)
    names = list(works)
    for name in names[1:]:
        compare(bench, "inference", {side: works[side] for side in (names[0], name)})


def run_script(bench, processes, device):
    """Train as a user does; return the mean seconds of an epoch, but for the first."""
    out = bench.folder / f"run-{processes}-{device}"
    shutil.rmtree(out, ignore_errors=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = {"--data-dir": bench.folder / "small", "--cache-dir": bench.folder / "cache"}
    flags |= {"--output-dir": out, "--split": bench.folder / "split.json", "--device": device}
    flags |= {"--encoder-name": "efficientnet-b0", "--encoder-weights": "none"}
    flags |= {"--encoder-depth": 3, "--epochs": 4, "--num-workers": 0}
    argv = [*(torchrun if processes > 1 else []), train_pvs.__file__]
    argv += [*(str(word) for flag in flags.items() for word in flag), "--img-patch-size"]
    argv += ["32", "32", "32", "--pix-dim", "1", "1", "1"]
    process = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *argv], **process, check=False)
    history = out / "logs" / "training_history.json"
    if not history.exists():  # the status is 1 also where four epochs taught nothing
        raise RuntimeError(f"the run ended early: {done.stderr.strip()[-500:]}")
    rows = json.loads(history.read_text())[1:]
    return {"an epoch, one thread a process, s": statistics.mean(row["seconds"] for row in rows)}


def measure_processes(bench):
    """Measure an epoch with 16 small heads, and 2 to validate, in one process and in two."""
    make_heads(bench.folder / "small", SMALL_HEADS, SMALL_SHAPE, 1)
    names = [f"sub-{number:03d}" for number in range(1, 20)]
    split = {"train": names[:16], "val": names[16:18], "test": names[18:]}
    train_pvs.write_json(bench.folder / "split.json", split)
    for device, available in {"cpu": 2, "cuda": torch.cuda.device_count()}.items():
        runs = [partial(run_script, bench, count, device) for count in (1, 2)]
        sides = dict(zip((f"1 process, {device}", f"2 processes, {device}"), runs, strict=True))
        if available < 2:
            bench.report.add("an epoch, s", sides, "not run: needs two GPUs")
        else:
            compare(bench, "processes", sides)


# --------------------------------------------------------------------------------------------- Main

MEASURES = (measure_epoch, measure_step, measure_recipes, measure_inference, measure_preparation)
MEASURES += (measure_augmentation, measure_memory, measure_scaling, measure_processes)
SECTIONS = {measure.__name__.removeprefix("measure_"): measure for measure in MEASURES}


def build_parser():
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="BIDS", help="real scans; default: simulated heads")
    add("--shape", type=int, nargs=3, default=(208, 300, 320), help="voxels of simulated heads")
    add("--pairs", type=int, default=3, help="pairs of measurements of a row")
    add("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS], metavar="NAME")
    add("--work", metavar="DIR", help="keep heads and caches there; default: a temporary folder")
    add("--checkpoint", metavar="FILE", help="trained network for `inference`; default: random")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--output", metavar="FILE", default="docs/benchmark.md")
    return parser


def run_sections(bench, names):
    """Measure; return the exit status, 1 where a section failed."""
    status = 0
    for name in names:
        start = time.perf_counter()
        bench.report.begin(name)
        try:
            SECTIONS[name](bench)
            if bench.device.type != "cuda" and name in GPU_ROWS:
                bench.report.add(*GPU_ROWS[name], NO_GPU)
        except (ValueError, OSError, RuntimeError, MemoryError, FloatingPointError) as error:
            bench.report.tell(f"Ended early: {train_pvs.one_line(error)}")
            status = 1
        print(f"  {name} took {time.perf_counter() - start:.0f} s", flush=True)
    return status


def main(argv=None):
    """Measure what the command line asks for; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    options = parser.parse_args(argv)
    keep_pipeline_quiet()
    device = train_pvs.choose_device(replace(train_pvs.Config(), DEVICE=options.device))
    size = " x ".join(map(str, options.shape))
    box = " x ".join(f"{100 * part:.0f} %" for part in FIELD)
    scans = f"simulated heads, {size} voxels of {HEAD_MM} mm, the head's box takes {box} of them"
    if options.data_dir:
        scans = f"the first {HEADS} of {Path(options.data_dir).resolve().name}"
    command = f"python benchmarks/speed.py {shlex.join(argv)}".strip()
    network = "UNet++ over efficientnet-b0, random weights"
    if options.checkpoint:
        try:
            trained = train_pvs.Config(**train_pvs.read_checkpoint(options.checkpoint)["config"])
        except ValueError as error:
            parser.error(error)
        network = f"{train_pvs.describe_network(trained)} for `inference`, trained; else {network}"
    report = Report(options.output, header_text(scans, device, network), command)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.work or temporary)
        heads = options.data_dir
        if not heads:
            folder_of_size = folder / "-".join(map(str, ("heads-in-air", *options.shape)))
            heads = make_heads(folder_of_size, HEADS, options.shape, HEAD_MM, FIELD)
        shared = folder, heads, options.pairs, device, report, options.checkpoint
        return run_sections(Bench(*shared), options.only)


if __name__ == "__main__":
    sys.exit(main())
