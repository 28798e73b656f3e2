"""Train recipes for equal minutes on simulated heads with thin PVS, and compare them.

    python benchmarks/accuracy.py                          all rows, 3 seeds, 4 minutes each
    python benchmarks/accuracy.py --rows native --seeds 1  one of them

Every run is the script's own, `train_pvs.main`, with networks and patches that a CPU trains in
minutes; nnU-Net, where it is installed, is run by `nnunet.py`. A row is runs of several seeds, on
the same heads and the same split. What is done is kept in the folder --work and not done again.
`docs/accuracy.md` is written after every run, with all rows whose seeds are done, asked for or not.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_pvs  # noqa: E402

SHAPE, SPACING = (128, 160, 64), 0.8  # voxels, mm
# Of PVS: 1.6 mm at the median, 0.9 to 3 mm, in voxels; half are at most two voxels wide.
DIAMETERS = (2.0, 0.25, 1.1, 3.75)
PARTS = {"train": 12, "val": 1, "test": 4}  # heads
COMMON = (  # what makes a run small, the same for all rows
    "--encoder-name efficientnet-b0 --encoder-weights none --encoder-depth 3 "
    "--img-patch-size 48 48 48 --batch-size 1 --crops-per-volume 2 --batchnorm-momentum 0.1 "
    "--head-bias-log-odds --val-every 1000000 --sw-overlap 0.25 --num-workers 1"
)
NATIVE = "--recipe native --decoder-width 16"
PLAIN = f"{NATIVE} --ema-decay 0 --no-tta-flips --no-tune-decision"
# Name: (what it is; flags of train_pvs.py, or the channels of nnU-Net's network, 0 as it plans; the
# row that it is compared with). A row that resumes tests the weights of that other row anew.
ROWS = {
    "published": ("UNet++ on a 1.5 mm grid", "--recipe published", "native"),
    "published, soft": (
        "trained on the part of each voxel that is PVS",
        "--recipe published --label-resampling soft",
        "published",
    ),
    "native": (
        "DynUNet on the scans' own grid, averaged, mirrored and tuned as below",
        NATIVE,
        "plain",
    ),
    "plain": ("native without these three", PLAIN, "native"),
    "plain, averaged": ("moving average of the weights", f"{PLAIN} --ema-decay 0.95", "plain"),
    "plain, mirrored": (
        "mean of eight mirrored views of a head",
        f"{PLAIN} --tta-flips --resume",
        "plain",
    ),
    "plain, tuned": (
        "threshold and smallest PVS chosen on the validation head",
        f"{PLAIN} --tune-decision --resume",
        "plain",
    ),
    "plain, shifted": (
        "patches up to a quarter of their size off their PVS voxel",
        f"{PLAIN} --crop-shift 0.25",
        "plain",
    ),
    "plain, UNet++": (
        "UNet++ on the scans' own grid",
        f"{PLAIN} --architecture unetplusplus",
        "plain",
    ),
    "plain, 1.5 mm": ("DynUNet on a 1.5 mm grid", f"{PLAIN} --pix-dim 1.5 1.5 1.5", "plain"),
    "nnU-Net": (
        "nnU-Net v2, its own plan cut to 2 patches of 48 x 48 x 48 a step, learning rate over "
        "these minutes, no mirroring; epochs of 5 steps",
        0,
        "native",
    ),
    "nnU-Net, 16 channels": (
        "nnU-Net v2, its own plan cut to 2 patches of 48 x 48 x 48 a step and to half its "
        "channels, learning rate over these minutes, no mirroring; epochs of 5 steps",
        16,
        "native",
    ),
}
NO_NNUNET = "The row nnU-Net needs a package that is not installed: pip install nnunetv2"
SCORES = {  # title of the column: key of a head's row of the test scores
    "native Dice": "native_dice",
    "round trip": "roundtrip_dice",
    "lesion F1, any overlap": "lesion_f1_any",
    "volume error, %": "volume_ml_error_percent",
}
COMPARED = ("native_dice", "lesion_f1_any")


def make_heads(folder):
    """Make the simulated data set, laid out as ds005595, and its split, unless they are there."""
    marker = folder / "dataset_description.json"
    if marker.exists():
        return
    names = [f"sub-{number:03d}" for number in range(1, 1 + sum(PARTS.values()))]
    for number, name in enumerate(names):
        print(f"simulating {name}", flush=True)
        rng = np.random.default_rng([7, number])
        volumes = train_pvs.simulate_head(rng, SHAPE, DIAMETERS)
        train_pvs.write_head(folder, name, volumes, SPACING)
    ends = np.cumsum([0, *PARTS.values()])
    parts = {part: names[a:b] for part, a, b in zip(PARTS, ends[:-1], ends[1:], strict=True)}
    train_pvs.write_json(folder / "split.json", parts)
    name = "Simulated heads with thin perivascular spaces"
    train_pvs.write_json(marker, {"Name": name, "BIDSVersion": "1.9.0"})


def has_nnunet():
    """Return whether nnU-Net v2 is installed."""
    return importlib.util.find_spec("nnunetv2") is not None


def run_folder(row, seed, options):
    """Return the folder of a run."""
    name = f"{row} {seed} {options.minutes:g} minutes"
    return options.work / name.replace(", ", "-").replace(" ", "-")


def run(row, seed, options):
    """Train and test a row with a seed."""
    out, (_, flags, other) = run_folder(row, seed, options), ROWS[row]
    if isinstance(flags, int):
        import nnunet

        nnunet.run(out, seed, options.minutes, options.work, channels=flags)
        return
    flags = [*COMMON.split(), *flags.split(), "--max-minutes", str(options.minutes)]
    if "--resume" in flags:
        trained = run_folder(other, seed, options)
        if not read_run(trained):
            run(other, seed, options)
        if not read_run(trained):
            return
        shutil.rmtree(out, ignore_errors=True)
        without = shutil.ignore_patterns("comprehensive_test_metrics.json")  # it means: done
        shutil.copytree(trained, out, ignore=without)
    else:
        flags.append("--overwrite")
    flags += ["--data-dir", str(options.work / "data"), "--output-dir", str(out)]
    flags += ["--cache-dir", str(options.work / "cache"), "--seed", str(seed)]
    flags += ["--split", str(options.work / "data" / "split.json")]
    subprocess.run([sys.executable, str(ROOT / "train_pvs.py"), *flags], check=False)


def read_run(out):
    """Return a run's rows of its subjects, its grid and number of epochs; None: it is not done."""
    scores = out / "logs" / "comprehensive_test_metrics.json"
    if not scores.exists():
        return None
    content = json.loads(scores.read_text())
    history = json.loads((out / "logs" / "training_history.json").read_text())
    return content["subjects"], content["grid"], len(history)


def read_rows(options):
    """Return {row: {seed: run}} of the rows of which all seeds are done."""
    seeds = range(1, 1 + options.seeds)
    rows = {row: {seed: read_run(run_folder(row, seed, options)) for seed in seeds} for row in ROWS}
    return {row: runs for row, runs in rows.items() if all(runs.values())}


def interval(values):
    """Return the 95 % bootstrap interval of a mean."""
    settings = {"n_resamples": 10_000, "rng": np.random.default_rng(0), "method": "percentile"}
    return tuple(stats.bootstrap((values,), np.mean, **settings).confidence_interval)


def describe_row(row, results):
    """Return a table line: the means over subjects and seeds, and the differences to its base."""
    runs, base = results[row], results.get(ROWS[row][2])
    cells = [f"**{row}**: {ROWS[row][0]}", next(iter(runs.values()))[1].split(", ")[-1]]
    for key in SCORES.values():
        values = np.array([abs(s[key]) for subjects, *_ in runs.values() for s in subjects])
        low, high = interval(values)
        digits = 0 if key.endswith("percent") else 3
        cells.append(f"{values.mean():.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
    cells.append(ROWS[row][2])
    cells += [compare(runs, base, key) if base else "" for key in COMPARED]
    cells.append(", ".join(str(epochs) for *_, epochs in runs.values()))
    return "| " + " | ".join(cells) + " |"


def compare(runs, base, key):
    """Return the paired difference of a score to the base's, same seeds and heads."""
    pairs = [zip(runs[seed][0], base[seed][0], strict=True) for seed in runs]
    gains = np.array([a[key] - b[key] for pair in pairs for a, b in pair])
    low, high = interval(gains)
    return f"{gains.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def write_table(path, results, options):
    """Write the table of all runs so far."""
    heads = ", ".join(f"{count} {part}" for part, count in PARTS.items())
    shape = " x ".join(map(str, SHAPE))
    lines = [
        "# Recipes compared on simulated PVS",
        "",
        f"Simulated heads of {shape} voxels of {SPACING} mm ({heads}) with thin PVS (0.9 to 3 mm, "
        "half below 1.6 mm), lesions and unlabelled PVS in the basal ganglia that look alike. "
        f"{options.minutes:g} minutes of training each, on {os.cpu_count()} cores of a "
        "CPU; networks and patches are small: see `benchmarks/accuracy.py`, which makes this "
        "table, and `nnunet.py` beside it. Scores are means over the test heads and seeds, with "
        "the 95 % bootstrap interval over these pairs, which are not independent, all on the "
        "**native grid**. Round trip: what the grid alone leaves of a perfect mask. Differences "
        "are paired: the same heads and seeds.",
        "",
        f"| recipe | trained on | {' | '.join(SCORES)} | compared with | native Dice, difference | "
        "lesion F1, difference | epochs |",
        "| --- | --- | " + " | ".join("---" for _ in SCORES) + " | --- | --- | --- | --- |",
    ]
    lines += [describe_row(row, results) for row in results]
    train_pvs.write_file(path, "\n".join(lines) + "\n")


def main(argv=None):
    """Make the data, train what has not been, write the table; return the status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    rows = [row for row, (_, flags, _) in ROWS.items() if isinstance(flags, str) or has_nnunet()]
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=rows)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--work", type=Path, default=Path("outputs_accuracy"))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "accuracy.md")
    options = parser.parse_args(argv)
    if not set(options.rows) <= set(rows):
        print(NO_NNUNET, file=sys.stderr)
        return 2
    make_heads(options.work / "data")
    for seed in range(1, 1 + options.seeds):
        for row in options.rows:
            out = run_folder(row, seed, options)
            if not read_run(out):
                run(row, seed, options)
            if not read_run(out):
                print(
                    f"{out}: expected scores, found none; see what was said above", file=sys.stderr
                )
                return 1
            if results := read_rows(options):
                write_table(options.output, results, options)
    print(options.output.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
