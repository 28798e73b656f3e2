"""Measure what the pipeline's ingredients gain, side by side with what they replace.

    python benchmarks/speed.py                           all sections, on simulated heads
    python benchmarks/speed.py --only step inference     these; the file's other sections stay
    python benchmarks/speed.py --data-dir ds005595-1.0.0 the same on a data set's first scans

A row compares an A with a B, measured in turn: A, B, A, B. The file is written anew with every row,
so that a run that is interrupted keeps what it has measured. Other machines' rows in it stay; so do
this one's other sections, where versions and sizes are the same.
"""

import argparse
import importlib.metadata
import json
import logging
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from monai import transforms as mt
from monai.data import Dataset, list_data_collate
from monai.inferers import sliding_window_inference
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_pvs  # noqa: E402

HEADS, HEAD_MM = 4, 0.8  # the last head is for validation
FIELD = (1, 0.9, 0.8)  # of a scan's sides that the head's box takes; air is behind and below
SMALL_SHAPE = (48, 56, 48)  # voxels of 1 mm, where only growth is of interest
SMALL = "--encoder-name efficientnet-b0 --encoder-weights none --encoder-depth 3 --num-workers 0 "
SMALL += "--img-patch-size 32 32 32 --pix-dim 1 1 1 --device cpu"
EPOCH, PEAK = "an epoch, s a head", "peak memory of a run, GB"
PACKAGES = ("torch", "monai", "segmentation_models_pytorch_3d", "numpy")
LAYOUTS = {  # name: what takes the place of `network_input`
    "channels-last": lambda x, device, _: x.to(device, memory_format=torch.channels_last_3d),
    "contiguous": lambda x, device, _: x.to(device),
}
INTRODUCTION = """# Speed and memory, measured

A and B of a row were measured in turn (A, B, A, B, ..); their columns hold medians. B / A is the
median of the pairs' ratios, with their range: how many times as long, or as much, B takes.
"""


def processor():
    """Return the name of this computer's processor."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else "unknown processor"


def describe(options):
    """Return the head of a machine's part of the file: all that its numbers depend on."""
    place = f"{processor()}, {os.cpu_count()} cores"
    if options.device == "cuda":
        place = f"{torch.cuda.get_device_name()}, on {place}"
    dtype = train_pvs.autocast_dtype(torch.device(options.device), train_pvs.Config())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    scans = f"simulated heads, {' x '.join(map(str, options.shape))} voxels of {HEAD_MM} mm, "
    scans += f"{1 - math.prod(FIELD):.0%} of them air"
    if options.data_dir:
        scans = f"the first {HEADS} of {Path(options.data_dir).resolve().name}"
    return f"""## {place}

- Arithmetic: {str(dtype).removeprefix("torch.")}; versions: {versions}
- Scans: {scans}
- Patches: {options.patches[0]}^3 in training, {options.patches[1]}^3 in inference
- Network: UNet++ over efficientnet-b0, random weights, where no other is named
"""


class Bench:
    """The command's options and the markdown file."""

    def __init__(self, options, command):
        self.options, self.command, self.head = options, command, describe(options)
        self.device, self.path = torch.device(options.device), Path(options.output)
        self.sections, title = {}, self.head.split("\n")[0]
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else INTRODUCTION
        self.introduction, *parts = re.split(r"^(?=## )", text, flags=re.M)
        self.others = [part for part in parts if part.split("\n")[0] != title]
        for part in parts:
            if part.startswith(self.head):
                for section in re.split(r"^(?=### )", part, flags=re.M)[1:]:
                    self.sections[section[4:].split(":")[0]] = section

    def add(self, what, names, pairs):
        """Add a row: names of A and B, pairs of numbers."""
        ratios = [b / a for a, b in pairs]
        cells = [f"{statistics.median(side):.3g}" for side in zip(*pairs, strict=True)]
        cells += [f"**{statistics.median(ratios):.3g}**", f"{min(ratios):.3g} to {max(ratios):.3g}"]
        cells[-1] += f", {len(ratios)} pair{'s' if len(ratios) > 1 else ''}"
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
        origin = f"Measured on {date.today()} by `{self.command}`."
        blocks = [f"### {self.name}: {title}", "\n".join(table), "\n".join(self.facts), origin]
        self.sections[self.name] = "\n\n".join(filter(None, blocks))
        parts = [self.sections[name] for name in SECTIONS if name in self.sections]
        parts = [self.introduction, self.head, *parts, *self.others]
        train_pvs.write_file(self.path, "\n\n".join(part.strip() for part in parts) + "\n")

    def compare(self, what, sides, warm_up=False):
        """Call two works, {name: work}, in turn, and add the row of their seconds.

        A work that returns {what: number} adds those rows instead. With `warm_up` a first call of
        each does not count.
        """
        pairs = []
        for number in range(-warm_up, self.options.pairs):
            pair = []
            for work in sides.values():
                start, result = time.perf_counter(), work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                pair.append(result if isinstance(result, dict) else {what: seconds})
            pairs += [pair] * (number >= 0)
            print(f"  {what}: {len(pairs)} of {self.options.pairs} pairs", flush=True)
        for row in pairs[0][0]:
            self.add(row, sides, [(a[row], b[row]) for a, b in pairs])

    def compare_autocast(self, what, make_work, cfg, warm_up=False):
        """Add the row of autocast, unless the pipeline does without it here."""
        if train_pvs.autocast_dtype(self.device, cfg) != torch.float32:
            sides = {"autocast": cfg, "float32": replace(cfg, AMP=False)}
            self.compare(what, {name: make_work(cfg) for name, cfg in sides.items()}, warm_up)

    def compare_layouts(self, what, work, warm_up=False):
        """Add the row of the memory layouts."""

        def work_in(layout):
            with mock.patch.object(train_pvs, "network_input", layout):
                work()

        layouts = {name: partial(work_in, layout) for name, layout in LAYOUTS.items()}
        self.compare(what, layouts, warm_up)

    def settings(self, spacing=1.5, side=None, **overrides):
        """Return the Config of a measurement; `spacing` in mm, `side` of a patch in voxels."""
        folder, side = Path(self.options.work), side or self.options.patches[1]
        base = {"DATA_DIR": str(self.options.data_dir), "OUTPUT_DIR": str(folder / "out")}
        base |= {"CACHE_DIR": str(folder / "cache"), "DEVICE": self.device.type}
        base |= {"ENCODER_NAME": "efficientnet-b0", "ENCODER_WEIGHTS": "none"}
        base |= {"PIX_DIM": (spacing,) * 3, "IMG_PATCH_SIZE": (side,) * 3}
        return replace(train_pvs.Config(), **base | overrides)


def make_heads(folder, count, shape, spacing, field=(1, 1, 1)):
    """Write simulated heads as a BIDS data set, unless they are there; return its folder.

    They take `field` of a scan's sides; the rest is air.
    """
    for number in range(count):
        subject = f"sub-{number + 1:03d}"
        if any(folder.glob(f"derivatives/mask/{subject}/*")):  # the mask is written last
            continue
        rng = np.random.default_rng([123, number])
        inner = tuple(round(part * side) for part, side in zip(field, shape, strict=True))
        image, label = train_pvs.simulate_head(rng, inner)
        air = rng.rayleigh(image[:4, :4, :4].mean() / math.sqrt(math.pi / 2), shape)
        scan, mask = air.astype(image.dtype), np.zeros(shape, label.dtype)
        place = tuple(slice(-side, None) for side in inner)
        scan[place], mask[place] = image, label
        train_pvs.write_head(folder, subject, (scan, mask), spacing)
    return folder


def prepare_heads(cfg):
    """Return the first cases, prepared."""
    return train_pvs.prepare_cases(train_pvs.find_cases(cfg)[:HEADS], cfg)


def build_model(cfg):
    """Return a network of random weights on its device."""
    return train_pvs.build_model(cfg, pretrained=False).to(cfg.DEVICE)


class Watched:
    """A loader, or a list of batches, that notes how many seconds its user waits for batches."""

    def __init__(self, batches):
        self.batches, self.waited = batches, 0.0
        self.batch_sampler = getattr(batches, "batch_sampler", SimpleNamespace())

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start = time.perf_counter()
        for batch in self.batches:
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()


def plain_loader(cases, cfg, training, workers=0):
    """Return a loader that does all anew from the files in every epoch, and gives MetaTensors."""
    both, size = ("image", "label"), {"spatial_size": cfg.IMG_PATCH_SIZE}
    steps = [mt.LoadImaged(both), mt.EnsureChannelFirstd(both)]
    steps += [mt.AsDiscreted("label", threshold=1e-6), mt.Orientationd(both, "RAS", labels=None)]
    steps.append(mt.Spacingd(both, pixdim=cfg.PIX_DIM, mode=("bilinear", "nearest")))
    scale = (*cfg.INTENSITY_PERCENTILES, 0, 1)
    steps.append(mt.ScaleIntensityRangePercentilesd("image", *scale, clip=True))
    steps.append(mt.SpatialPadd(both, **size))
    if training:
        crop = size | {"num_samples": cfg.CROPS_PER_VOLUME, "pos": cfg.POS_NEG_RATIO, "neg": 1}
        steps.append(mt.RandCropByPosNegLabeld(both, label_key="label", **crop))
        own = train_pvs.build_train_transforms(cfg).transforms
        steps += [step for step in own if isinstance(step, mt.RandomizableTransform)]
    files = Dataset([{k: getattr(case, k) for k in both} for case in cases], mt.Compose(steps))
    how = {"num_workers": workers, "persistent_workers": workers > 0, "shuffle": training}
    how |= {"batch_size": cfg.BATCH_SIZE if training else 1, "collate_fn": list_data_collate}
    return DataLoader(files, **how)


@torch.inference_mode()
def plain_logits(model, image, cfg):
    """Return the logits of a volume (1, H, W, D): windows of equal weight, float32, contiguous."""
    image, windows = image[None].float().to(cfg.DEVICE), (cfg.IMG_PATCH_SIZE, cfg.SW_BATCH_SIZE)
    return sliding_window_inference(image, *windows, model.eval(), cfg.SW_OVERLAP, mode="constant")


def plain_epoch(model, optimizer, train_loader, val_loader, cfg):
    """Train in float32, contiguous, without a cache, then score whole volumes, uncropped."""
    model.train()
    for batch in train_loader:
        image, label = batch["image"].to(cfg.DEVICE), batch["label"].to(cfg.DEVICE)
        optimizer.zero_grad()
        loss = train_pvs.loss_function(model(image), label)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.GRAD_CLIP)
        optimizer.step()
        loss.item()
    for batch in val_loader:
        logits, label = plain_logits(model, batch["image"][0], cfg).cpu(), batch["label"]
        train_pvs.loss_function(logits, label).item()
        train_pvs.calculate_metrics(logits > 0, label)


def measure_epoch(bench):
    """Measure an epoch of three heads and the validation of a fourth, 1.5 mm.

    Network, loss, patches and random transforms are the same on both sides.
    """
    cfg, waits = bench.settings(side=bench.options.patches[0]), []
    *cases, last = prepare_heads(cfg)
    models = build_model(cfg), build_model(cfg)
    state = train_pvs.TrainState(models[0], cfg)
    pipeline = train_pvs.build_train_loader(cases, cfg, bench.device)
    loader = Watched(pipeline)
    adamw = torch.optim.AdamW(models[1].parameters(), lr=cfg.LR, weight_decay=cfg.WEIGHT_DECAY)
    loaders = plain_loader(cases, cfg, True, pipeline.num_workers), plain_loader([last], cfg, False)

    def ours():
        start, epoch, loader.waited = time.perf_counter(), len(waits) + 1, 0.0
        train_pvs.train_one_epoch(models[0], state, loader, epoch)
        train_pvs.validate(models[0], [last], cfg, epoch)
        waits.append(f"{100 * loader.waited / (time.perf_counter() - start):.1f} %")

    theirs = partial(plain_epoch, models[1], adamw, *loaders, cfg)
    bench.compare("training and validation, s", {"pipeline, cached": ours, "plain loop": theirs})
    told = f"The pipeline waits for batches in {', '.join(waits)} of its epochs' time"
    bench.tell(f"{told}, {pipeline.num_workers} workers; both sides' start in the first epoch.")
    bench.tell(
        "Plain loop: MONAI's transforms from the files in every epoch, MetaTensors, float32, "
        "contiguous, AdamW not fused; windows of equal weight on the uncropped volume."
    )


def training_step(cfg, patches=4):
    """Return a work: a training step with some patches."""
    state = train_pvs.TrainState(build_model(cfg), cfg)
    image = torch.rand(patches, 1, *cfg.IMG_PATCH_SIZE)
    loader = Watched([{"image": image, "label": (image > 0.999).float(), "name": ["noise"]}])
    return partial(train_pvs.train_one_epoch, state.model, state, loader, 1)


def measure_step(bench):
    """Measure a training step, one ingredient at a time, and the networks of two recipes."""
    what, cfg = "four patches, s", bench.settings(side=bench.options.patches[0])
    bench.compare_autocast(what, training_step, cfg, True)
    bench.compare_layouts(what, training_step(cfg), True)
    # The networks at full size, with inference's patches.
    flags = ["--encoder-weights", "none", "--device", bench.options.device, "--img-patch-size"]
    flags, names = [*flags, *3 * [str(bench.options.patches[1])]], ("published", "native")
    recipes = {name: train_pvs.parse_command_line(["--recipe", name, *flags])[0] for name in names}
    patches = 8 if bench.device.type == "cuda" else 1  # as in training; a CPU takes 20 s for one
    what, step = f"full size, step of {patches}, s", partial(training_step, patches=patches)
    bench.compare(what, {name: step(cfg) for name, cfg in recipes.items()}, True)
    for name, cfg in recipes.items():
        bench.compare_autocast(f"{name}, {what}", step, cfg, True)


def compare_plain(bench, cfg):
    """Add the row of a head's inference, against the plain one."""
    model, case, what = (
        build_model(cfg),
        prepare_heads(cfg)[-1],
        f"whole head, {cfg.PIX_DIM[0]:g} mm",
    )
    what += f", windows of {cfg.IMG_PATCH_SIZE[0]}^3, overlap {cfg.SW_OVERLAP}, s"
    image = train_pvs.load_cached(case)["image"]
    whole = next(iter(plain_loader([case], cfg, training=False)))["image"][0]
    ours = partial(train_pvs.predict_logits, model, image, cfg, cfg.SW_OVERLAP)
    bench.compare(what, {"pipeline": ours, "plain": partial(plain_logits, model, whole, cfg)})


def compare_tests(bench):
    """Add the rows of a head's test by a small network of the recipe native."""
    small = {"ARCHITECTURE": "dynunet", "ENCODER_DEPTH": 3, "FLIP_AXES": "x", "HEAD_DEPTH": 170.0}
    cfg = bench.settings(HEAD_MM, TTA_FLIPS="windows", DEEP_SUPERVISION=True, **small)
    full = replace(cfg, TTA_FLIPS="full")
    eight, model = replace(full, FLIP_AXES="xyz", HEAD_DEPTH=0.0), build_model(cfg)
    short, whole = (train_pvs.load_cached(prepare_heads(c)[-1])["image"] for c in (cfg, eight))

    def test(cfg, image=short, model=model):
        return partial(train_pvs.predict_prob, model, image, cfg)

    what, ours = f"test of a head, {HEAD_MM} mm, small DynUNet, s", "every other window mirrored"
    bench.compare(what, {ours: test(cfg), "left-right, two passes": test(full)})
    bench.compare(what, {f"{ours}, 170 mm": test(cfg), "eight passes": test(eight, whole)})
    if bench.device.type == "cpu":
        compiled = train_pvs.for_inference(model, replace(cfg, ENGINE="openvino"))
        bench.compare(what, {"openvino": test(cfg, model=compiled), "torch": test(cfg)})


def measure_inference(bench):
    """Measure a whole head's logits by sliding windows, and the test of one.

    Plain is the whole volume in float32, contiguous, with windows of equal weight.
    """
    for spacing in (1.5, HEAD_MM):
        compare_plain(bench, bench.settings(spacing))
    compare_tests(bench)


def measure_waiting(bench):
    """Measure what one waits for beside the work: the start, checkpoints of 1 GB."""
    run, command = train_pvs.Run(Path(bench.options.work) / "waiting"), [sys.executable]
    start = partial(subprocess.run, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    told, every = [*command, "train_pvs.py", "--help"], [*command, "-c", "import train_pvs"]
    bench.compare(
        "start, s", {"--help": partial(start, told), "all imports": partial(start, every)}
    )
    model = torch.nn.ModuleList([torch.nn.Linear(4100, 4100) for _ in range(5)])
    state = train_pvs.TrainState(model, bench.settings(DEVICE="cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.step()
    state.progress["history"] = [{"epoch": 1}]
    case = SimpleNamespace(stripped=0, native_spacing=(1, 1, 1), name="", sha256="", label_sha256=0)
    save = partial(train_pvs.save_epoch, run, state, {"train": [case]}, True, True)
    sides = {"copied, for a thread": save, "written": lambda: save()()}  # best and last
    bench.compare("checkpoints of 1 GB, s", sides, True)


def measure_preparation(bench):
    """Measure checking and caching of four scans, 1.5 mm."""
    cfg = bench.settings(CACHE_DIR=str(Path(bench.options.work) / "cache-anew"))

    def first():
        shutil.rmtree(cfg.CACHE_DIR, ignore_errors=True)
        prepare_heads(cfg)

    sides = {"first run, empty cache": first, "second run": partial(prepare_heads, cfg)}
    bench.compare(f"prepare_cases, {HEADS} scans, s", sides)
    cases = prepare_heads(cfg)
    size = sum(os.path.getsize(case.cache) for case in cases)
    voxels = sum(train_pvs.load_cached(case)["image"].numel() for case in cases)
    told = f"{size / voxels:.2f} bytes a voxel of the box"
    bench.tell(f"The cache takes {told}, {size / HEADS / 1e6:.1f} MB a scan.")


def memory(field, status):
    """Return VmRSS, the memory of a process, or VmHWM, its peak, in GB; 0: it is not told."""
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / 1e9 if found else 0


def predict_peak(path, cfg):
    """Predict a scan; return the memory after loading the network and the peak, GB."""
    model, status = build_model(cfg), Path("/proc/self/status")
    loaded = memory("VmRSS", status.read_text())
    entry = train_pvs.to_working_grid({"image": train_pvs.read_volume(path)}, cfg)
    train_pvs.predict_case(model, entry, cfg)
    return loaded, memory("VmHWM", status.read_text())


def run_script(bench, rows, heads, *flags, processes=1, **environment):
    """Train and test on small heads as a user does; return some of EPOCH and PEAK.

    `heads`: how many to train, to validate and to test. The first epoch does not count.
    """
    work = Path(bench.options.work).resolve()
    data, out = make_heads(work / "small", sum(heads), SMALL_SHAPE, 1), work / "run"
    names = iter([f"sub-{number + 1:03d}" for number in range(sum(heads))])
    parts = zip(("train", "val", "test"), heads, strict=True)
    split = {part: [next(names) for _ in range(count)] for part, count in parts}
    train_pvs.write_file(work / "split.json", json.dumps(split))
    shutil.rmtree(out, ignore_errors=True)
    code = "import train_pvs as t; s = t.main(); print(open('/proc/self/status').read()); exit(s)"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    argv = ["-c", code] if processes == 1 else [*torchrun, train_pvs.__file__]
    argv += [*SMALL.split(), "--data-dir", data, "--cache-dir", work / "cache", *flags]
    argv += ["--split", work / "split.json", "--output-dir", out]
    argv, env = [sys.executable, *map(str, argv)], os.environ | environment
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
    run = train_pvs.Run(out)
    if not run.scores.exists():  # the status is 1 also where the epochs taught nothing
        raise RuntimeError(f"a run ended early: {done.stderr.strip()[-500:]}")
    seconds = [epoch["seconds"] for epoch in json.loads(run.history.read_text())]
    numbers = {PEAK: memory("VmHWM", done.stdout)}
    numbers[EPOCH] = statistics.median(seconds[1:] or seconds) / heads[0]
    return {row: numbers[row] for row in rows}


def measure_runs(bench):
    """Measure memory, and whole runs of small heads on the CPU, each in a process of its own."""
    cfg = bench.settings(HEAD_MM)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # the same every time
        pair = pool.submit(predict_peak, train_pvs.find_cases(cfg)[0].image, cfg).result()
    bench.add(f"predicting a scan at {HEAD_MM} mm, GB", ("network loaded", "peak"), [pair])
    peak, run = partial(run_script, bench, [PEAK]), partial(run_script, bench, [EPOCH, PEAK])
    least = ("--epochs", 1, "--batch-size", 1, "--crops-per-volume", 1)  # testing takes more
    seldom = ("--epochs", 4, "--val-every", 9)  # the median epoch has no validation
    threads = partial(run_script, bench, [EPOCH], (16, 2, 1), "--epochs", 4, OMP_NUM_THREADS="1")
    for sides in (
        {f"epochs: {n}": partial(peak, (4, 1, 1), "--epochs", n) for n in (1, 20)},
        {f"test scans: {n}": partial(peak, (2, 1, n), *least) for n in (12, 16)},
        {f"heads: {n}": partial(run, (n, 1, 1), *seldom) for n in (5, 40)},
        {f"processes of one thread: {n}": partial(threads, processes=n) for n in (1, 2)},
    ):
        bench.compare("run", sides)


MEASURES = (measure_epoch, measure_step, measure_inference, measure_preparation, measure_runs)
MEASURES += (measure_waiting,)
SECTIONS = {measure.__name__.removeprefix("measure_"): measure for measure in MEASURES}


def main(argv=None):
    """Measure what the command line asks for; return the exit status 0."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="BIDS", help="real scans; default: simulated heads")
    add("--shape", type=int, nargs=3, default=(208, 300, 320), help="voxels of simulated heads")
    add("--patches", type=int, nargs=2, default=(64, 96), help="their sides: training, inference")
    add("--pairs", type=int, default=3, help="pairs of measurements of a row")
    add("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS], metavar="NAME")
    add("--work", metavar="DIR", help="keep heads and caches there; default: a temporary folder")
    add("--device", choices=("cpu", "cuda"), default=("cpu", "cuda")[torch.cuda.is_available()])
    add("--output", metavar="FILE", default="docs/benchmark.md")
    options = parser.parse_args(argv)
    logging.getLogger("train_pvs").setLevel(logging.ERROR)
    bench = Bench(options, f"python benchmarks/speed.py {shlex.join(argv)}".strip())
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or temporary
        if not options.data_dir:
            folder = Path(options.work, "-".join(map(str, ("heads", *options.shape))))
            options.data_dir = make_heads(folder, HEADS, options.shape, HEAD_MM, FIELD)
        for name in options.only:
            print(f"\n{name}")
            bench.name, bench.rows, bench.facts = name, [], []
            SECTIONS[name](bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
