"""Train recipes for equal minutes on simulated heads with thin PVS, and compare them.

    python benchmarks/accuracy.py                          all rows, 3 seeds, 4 minutes each
    python benchmarks/accuracy.py --rows native --seeds 1  one of them

Every run is the script's own, `train_pvs.main`, with networks and patches that a CPU trains in
minutes; nnU-Net, where it is installed, is run by `nnunet.py`. A row is runs of several seeds, on
the same heads and the same split. What is done is kept in the folder --work and not done again; a
run that was interrupted goes on. `docs/accuracy.md` is written after every run, with all rows whose
seeds are done, asked for or not.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_pvs  # noqa: E402

SPACING = 0.8  # mm
# Of PVS: 1.6 mm at the median, 0.9 to 3 mm, in voxels; half are at most two voxels wide.
DIAMETERS = (2.0, 0.25, 1.1, 3.75)
COMMON = (  # what makes a run small, the same for all rows
    "--encoder-name efficientnet-b0 --encoder-weights none --encoder-depth 3 --decoder-width 16 "
    "--img-patch-size 48 48 48 --batch-size 1 --crops-per-volume 2 --batchnorm-momentum 0.1 "
    "--head-bias-log-odds --val-every 1000000 --sw-overlap 0.25 --num-workers 1"
)
NNUNET = "nnU-Net, 16 channels"
# Name: what it is, flags of train_pvs.py, the row that it is compared with. A row that evaluates
# tests the weights of the row named fourth anew.
ROWS = {
    "published": ("UNet++ on a 1.5 mm grid", "--recipe published", "native"),
    "published, own grid": (
        "UNet++ on the scans' own grid",
        "--recipe published --pix-dim 0 0 0",
        "plain",
    ),
    "native": (
        "DynUNet on the scans' own grid, averaged and mirrored as below",
        "--recipe native",
        "plain",
    ),
    "plain": ("native without these two", "--recipe native --ema-decay 0 --no-tta-flips", "native"),
    "plain, averaged": (
        "native without mirrored views: moving average of the weights",
        "--evaluate --no-tta-flips",
        "plain",
        "native",
    ),
    "plain, mirrored": (
        "native without the average: mean of eight mirrored views of a head",
        "--evaluate --tta-flips",
        "plain",
        "plain",
    ),
    NNUNET: (
        "nnU-Net v2, its own plan cut to 2 patches of 48 x 48 x 48 a step and to half its "
        "channels, learning rate over these minutes, no mirroring; epochs of 5 steps",
        "",
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


def write_json(path, content):
    """Write a JSON file."""
    train_pvs.write_file(path, json.dumps(content, indent=2) + "\n")


def make_heads(options):
    """Make the simulated data set, laid out as ds005595, and its split, unless they are there."""
    folder = options.work / "data"
    marker = folder / "dataset_description.json"
    if marker.exists():
        return
    names = [f"sub-{number:03d}" for number in range(1, 1 + sum(options.heads))]
    for number, name in enumerate(names):
        print(f"simulating {name}", flush=True)
        rng = np.random.default_rng([7, number])
        volumes = train_pvs.simulate_head(rng, tuple(options.shape), DIAMETERS)
        train_pvs.write_head(folder, name, volumes, SPACING)
    train, val, _ = np.cumsum(options.heads)
    split = {"train": names[:train], "val": names[train:val], "test": names[val:]}
    write_json(folder / "split.json", split)
    name = "Simulated heads with thin perivascular spaces"
    write_json(marker, {"Name": name, "BIDSVersion": "1.9.0"})


def has_nnunet():
    """Return whether nnU-Net v2 is installed."""
    return importlib.util.find_spec("nnunetv2") is not None


def run_folder(row, seed, options):
    """Return the folder of a run."""
    return options.work / f"{row} {seed}".replace(", ", "-").replace(" ", "-")


def run(row, seed, options):
    """Train and test a row with a seed."""
    out, (_, flags, _, *trained) = run_folder(row, seed, options), ROWS[row]
    if row == NNUNET:
        import nnunet

        nnunet.run(out, seed, options)
        return
    places = {"--data-dir": options.work / "data", "--cache-dir": options.work / "cache"}
    places["--output-dir"] = out
    if trained:
        weights = train_pvs.Run(run_folder(trained[0], seed, options)).best
        if not read_run(trained[0], seed, options):
            run(trained[0], seed, options)
        flags = ["--overwrite", *flags.split(), "--checkpoint", weights]
    else:
        places |= {"--split": options.work / "data" / "split.json", "--seed": seed}
        places["--max-minutes"] = options.minutes
        begun = train_pvs.Run(out).last.exists()
        flags = ["--resume" if begun else "--overwrite", *COMMON.split(), *flags.split()]
    flags += [word for place in places.items() for word in place]
    train_pvs.main(list(map(str, flags)))


def read_run(row, seed, options):
    """Return a run's rows of its subjects, its grid and number of epochs; None: it is not done."""
    done = train_pvs.Run(run_folder(row, seed, options))
    if not done.scores.exists():
        return None
    content, trained = json.loads(done.scores.read_text()), ROWS.get(row, ())[3:]
    history = train_pvs.Run(run_folder(trained[0] if trained else row, seed, options)).history
    return content["subjects"], content["grid"], len(json.loads(history.read_text()))


def read_rows(options):
    """Return {row: {seed: run}} of the rows of which all seeds are done."""
    seeds = range(1, 1 + options.seeds)
    rows = {row: {seed: read_run(row, seed, options) for seed in seeds} for row in ROWS}
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


def write_table(results, options):
    """Write the table of all runs so far."""
    heads = "{} train, {} val, {} test".format(*options.heads)
    shape = " x ".join(map(str, options.shape))
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
        "are paired: the same heads and seeds. nnU-Net is made for a thousand epochs; its row says "
        "only what these minutes give.",
        "",
        f"| recipe | trained on | {' | '.join(SCORES)} | compared with | native Dice, difference | "
        "lesion F1, difference | epochs |",
        "| --- | --- | " + " | ".join("---" for _ in SCORES) + " | --- | --- | --- | --- |",
    ]
    lines += [describe_row(row, results) for row in results]
    train_pvs.write_file(options.output, "\n".join(lines) + "\n")


def parse(parser, argv):
    """Return the options; what runs of other sizes did lies in other folders below --work."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--shape", type=int, nargs=3, default=(128, 160, 64), help="of heads")
    text = "how many to train, validate, test"
    parser.add_argument("--heads", type=int, nargs=3, default=(12, 1, 4), help=text)
    parser.add_argument("--work", type=Path, default=Path("outputs_accuracy"))
    options = parser.parse_args(argv)
    size = ("x".join(map(str, options.shape)), *options.heads, f"{options.minutes:g}min")
    options.work /= "-".join(map(str, size))
    return options


def main(argv=None):
    """Make the data, train what has not been, write the table; return the status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    rows = [row for row in ROWS if row != NNUNET or has_nnunet()]
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=rows)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "accuracy.md")
    options = parse(parser, argv)
    if not set(options.rows) <= set(rows):
        print(NO_NNUNET, file=sys.stderr)
        return 2
    make_heads(options)
    for seed in range(1, 1 + options.seeds):
        for row in options.rows:
            if not read_run(row, seed, options):
                run(row, seed, options)
            if not read_run(row, seed, options):
                told = f"{run_folder(row, seed, options)}: expected scores, found none"
                print(f"{told}; see what was said above", file=sys.stderr)
                return 1
            if results := read_rows(options):
                write_table(results, options)
    print(options.output.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
