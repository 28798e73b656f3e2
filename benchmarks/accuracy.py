"""Train recipes for equal minutes, test them on the same scanner and on another, compare them.

    python benchmarks/accuracy.py                            all rows, 3 seeds, 8 minutes each
    python benchmarks/accuracy.py --rows native --seeds 1    one of them
    python benchmarks/accuracy.py --data-dir DATA            on a BIDS folder laid out as ds005595
    python benchmarks/accuracy.py --epochs 28                equal steps, whatever else the CPU does

Without --data-dir, heads are simulated by `heads.py`, which also scans the test heads again as
another scanner would. Every run is the script's own, `train_pvs.main`, on one thread, with networks
and patches that a CPU trains in minutes; nnU-Net, where it is installed, is run by `nnunet.py`. A
row is runs of several seeds, on the same heads and the same split. What is done is kept in the
folder --work and not done again, so that several commands may share the rows or seeds out; a run
that was interrupted goes on. `docs/accuracy.md` is written after every run, from all that is below
--work, asked for or not.
"""

import argparse
import dataclasses
import importlib.util
import json
import platform
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import heads  # noqa: E402

import speed  # noqa: E402
import train_pvs  # noqa: E402

COMMON = (  # what makes a run small, the same for all rows
    "--encoder-name efficientnet-b0 --encoder-weights none --encoder-depth 3 --decoder-width 16 "
    "--img-patch-size 64 --batch-size 1 --crops-per-volume 2 --batchnorm-momentum 0.1 "
    "--head-bias-log-odds --val-overlap 0.25 --num-workers 1 --save-probabilities"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: what it is, flags of train_pvs.py, the row whose weights it tests, what it drops."""

    what: str
    flags: str = ""
    weights: str = ""  # of the row of this name; the flags are then those of --evaluate
    without: tuple = ()  # of NATIVE_AUGMENTATION


BASE, NNUNET = "native", "nnU-Net"
ROWS = {
    "published": Row("UNet++ on a 1.5 mm grid", "--recipe published"),
    "native": Row("DynUNet on the scans' own grid, as `--recipe native`", "--recipe native"),
    "one view": Row("native, without mirrored views in the test", "--tta-flips none", BASE),
    "no mirroring": Row(
        "native, neither in training nor test", "--flip-axes none --tta-flips none"
    ),
    "all axes": Row("native, mirrored along all three axes", "--flip-axes xyz"),
    "plateau": Row("native with the published schedule of the rate", "--lr-schedule plateau"),
    "lower rate": Row("native with the published learning rate", "--lr 1e-3"),
    "published patches": Row("native with these, not its own", "--augmentation published"),
    "no bias field": Row("native without it in the augmentation", without=("bias",)),
    "no deep supervision": Row("native with one loss, at full resolution", "--no-deep-supervision"),
    "no blur": Row("native without it in the augmentation", without=("blur",)),
    NNUNET: Row("nnU-Net, its own plan cut to the same patches and channels, mirrored"),
}
NO_NNUNET = "The row nnU-Net needs a package that is not installed: pip install nnunetv2"
SCORES = {  # title of the column: key of a head's row of the test scores
    "native Dice": "native_dice",
    "lesion F1, any overlap": "lesion_f1_any",
    "volume error, %": "volume_ml_error_percent",
}
COMPARED = ("native_dice", "lesion_f1_any")
SETS = {"same": "the same scanner", "other": "another scanner"}
THRESHOLDS = np.arange(0.1, 0.95, 0.1)


def write_json(path, content):
    """Write a JSON file."""
    train_pvs.write_file(path, json.dumps(content, indent=2) + "\n")


def prepare_data(options):
    """Make what is missing: simulated heads, split, the test heads of another scanner."""
    data, other = options.data_dir or options.work / "data", options.work / "other"
    kept = options.work / "settings.json"  # written last
    if not kept.exists():
        if not options.data_dir:
            heads.main([str(data), str(sum(options.heads))])
        cfg = train_pvs.Config(DATA_DIR=str(data))
        cases = train_pvs.find_cases(cfg)
        subjects = [case.subject for case in cases]
        train, val, end = np.cumsum(options.heads)
        split = {"train": subjects[:train], "val": subjects[train:val], "test": subjects[val:end]}
        write_json(options.work / "split.json", split)
        heads.rescan_cases([case for case in cases if case.subject in split["test"]], other)
        name = train_pvs.data_set_name(cfg) if options.data_dir else "Simulated heads"
        told = {"data": name, "length": length_words(options)}
        first = nib.load(cases[0].image)
        told["scans"] = " x ".join(map(str, first.shape)) + " voxels of "
        told["scans"] += train_pvs.spacing_words(train_pvs.ras_spacing(first.affine))
        told["processor"] = speed.processor()
        write_json(kept, told | {"heads": options.heads, "data_dir": str(data.resolve())})
    split = json.loads((options.work / "split.json").read_text())
    return json.loads(kept.read_text())["data_dir"], other, split


def length_words(options):
    """Return how long each row trains, in words."""
    return f"{options.epochs or options.minutes:g} {'epochs' if options.epochs else 'minutes'}"


def has_nnunet():
    """Return whether nnU-Net v2 is installed."""
    return importlib.util.find_spec("nnunetv2") is not None


def run_folder(row, seed, options):
    """Return the folder of a run."""
    return options.work / f"{row} {seed}".replace(" ", "-")


def call(*flags):
    """Run the script; an error ends the benchmark."""
    status = train_pvs.main([str(flag) for flag in flags])
    if status not in (0, 1):  # 1: nothing was learned, which is a result
        sys.exit(status)


def train(row, out, seed, options):
    """Train and test a row with a seed on the data's own heads."""
    made, augmentation = ROWS[row], dict(train_pvs.NATIVE_AUGMENTATION)
    for name in made.without:
        del train_pvs.NATIVE_AUGMENTATION[name]
    recipe = [] if "--recipe" in made.flags else ["--recipe", BASE]
    places = ["--data-dir", prepare_data(options)[0], "--split", options.work / "split.json"]
    places += ["--cache-dir", options.work / "cache", "--output-dir", out.folder]
    length = ["--seed", seed, f"--{'epochs' if options.epochs else 'max-minutes'}", options.length]
    begun = "--resume" if out.last.exists() else "--overwrite"
    call(begun, *COMMON.split(), *recipe, *made.flags.split(), *places, *length)
    train_pvs.NATIVE_AUGMENTATION.clear()  # so that the order stays
    train_pvs.NATIVE_AUGMENTATION.update(augmentation)


def run(row, seed, options):
    """Train and test a row with a seed; its result, written last, means that it is done."""
    made, (data, other, split) = ROWS[row], prepare_data(options)
    out = train_pvs.Run(run_folder(row, seed, options))
    trained = train_pvs.Run(run_folder(made.weights or row, seed, options))
    if not trained.scores.exists():
        train(made.weights or row, trained, seed, options)
    flags = ["--evaluate", "--overwrite", "--save-probabilities", "--checkpoint", trained.best]
    flags += [*(made.flags.split() if made.weights else []), "--cache-dir", options.work / "cache"]
    result = {"epochs": len(json.loads(trained.history.read_text()))}
    for name, folder in {"same": data, "other": other}.items():
        place = out if name == "same" and not made.weights else train_pvs.Run(out.folder / name)
        if place is not out:
            call(*flags, "--data-dir", folder, "--output-dir", place.folder)
        rows = json.loads(place.scores.read_text())["subjects"]
        result[name] = {"subjects": rows} | find_threshold(place, folder, split)
    write_json(out.folder / "result.json", result)


def find_threshold(place, data, split):
    """Return the best threshold, see `choose_threshold`; the files of probabilities are removed."""
    dices = []
    for case in train_pvs.find_cases(train_pvs.Config(DATA_DIR=str(data))):
        if case.subject in split["test"]:
            path = next(place.predictions.glob(f"{case.subject}/anat/*_probseg.nii.gz"))
            prob, label = (np.asarray(nib.load(file).dataobj) for file in (path, case.label))
            preds = (prob > threshold for threshold in THRESHOLDS)
            dices.append([train_pvs.calculate_metrics(p, label > 0)["dice"] for p in preds])
            path.unlink()
    return choose_threshold(dices)


def choose_threshold(dices):
    """Return the threshold of the highest mean Dice, and its gain over 0.5; (heads, THRESHOLDS)."""
    means = dict(zip(THRESHOLDS.round(1).tolist(), np.mean(dices, 0), strict=True))
    best = max(means, key=means.get)
    return {"best_threshold": best, "threshold_gain": round(float(means[best] - means[0.5]), 4)}


def read_run(row, seed, options):
    """Return a run's result; None: it is not done."""
    path = run_folder(row, seed, options) / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_rows(work):
    """Return {row: {seed: result}} of what is done in a folder; rows as in ROWS."""
    options, rows = argparse.Namespace(work=work), {}
    for row in ROWS:
        runs = {seed: read_run(row, seed, options) for seed in range(1, 10)}
        rows[row] = {seed: result for seed, result in runs.items() if result}
    return {row: runs for row, runs in rows.items() if runs}


def table_of(runs, name, key):
    """Return a score of a test set, (seeds, heads)."""
    return np.array([[abs(s[key]) for s in run[name]["subjects"]] for run in runs.values()])


def interval(values):
    """Return the 95 % bootstrap interval of a mean over seeds and heads (S, H), both drawn."""
    rng = np.random.default_rng(0)
    seeds, subjects = (rng.integers(n, size=(10_000, n)) for n in values.shape)
    means = [values[np.ix_(a, b)].mean() for a, b in zip(seeds, subjects, strict=True)]
    return np.percentile(means, (2.5, 97.5))


def describe_mean(values, digits=3, sign=""):
    """Return a mean and its interval in words."""
    low, high = interval(values)
    numbers = (f"{number:{sign}.{digits}f}" for number in (values.mean(), low, high))
    return "{} ({} to {})".format(*numbers)


def describe_threshold(result):
    """Return the best threshold and what Dice gains by it, in words."""
    return f"{result['best_threshold']} (+{result['threshold_gain']:.3f})"


def describe_row(row, results, name):
    """Return a table line: means over heads and seeds, and the paired differences to BASE."""
    runs, base = results[row], results.get(BASE, {})
    cells = [f"**{row}**: {ROWS[row].what}"]
    for key in SCORES.values():
        cells.append(describe_mean(table_of(runs, name, key), 0 if key.endswith("percent") else 3))
    common = [seed for seed in runs if seed in base and row != BASE]
    for key in COMPARED:
        pair = [table_of({seed: of[seed] for seed in common}, name, key) for of in (runs, base)]
        cells.append(describe_mean(pair[0] - pair[1], sign="+") if common else "")
    dices = table_of(runs, name, "native_dice").mean(1)
    cells += [
        f"{np.ptp(dices):.3f}" if len(dices) > 1 else "",
        ", ".join(describe_threshold(run[name]) for run in runs.values()),
    ]
    cells.append(", ".join(str(result["epochs"]) for result in runs.values()))
    return "| " + " | ".join(cells) + " |"


INTRODUCTION = f"""\
# Recipes compared

Written by `benchmarks/accuracy.py`. The PVS are **simulated**. Networks are small (three halvings,
nnU-Net four; 16 channels at full resolution, EfficientNet-B0 in UNet++), steps are two patches of
64^3. The script's own networks start at the log-odds, with a BatchNorm momentum of 0.1. Training is
short, on one thread of a CPU and one process for patches. Scores are means over test heads and
seeds on the **native grid**, at threshold 0.5, with the 95 % bootstrap interval over heads and
seeds. Differences are to `{BASE}`, paired by head and seed: one counts if its interval leaves out
0. Spread: the largest less the smallest mean Dice of a seed. Best threshold: of 0.1 to 0.9, by the
Dice of the test heads, for each seed, with its gain over 0.5. With calibrated probabilities it is
half the Dice reached (Lipton et al. 2014, 10.1007/978-3-662-44851-9_15). Another scanner: the same
test heads with other contrast, blur, bias field, noise, intensities, and voxels of 0.9 x 0.9 x 1
mm. Of 12 heads an epoch is 12 steps; `{NNUNET}`'s epochs are 12 steps always.

The heads on the MNI template are copies of it, each warped differently, with simulated PVS of their
own. What made them is not part of this project (`--data-dir` takes any folder). The simulated heads
are those of `benchmarks/heads.py`; their two tables are of an earlier version of the script.
"""

LEFT_OUT = """\
## What stays in `native`, and why

By the tables of 28 epochs these have gains that count. On both scanners: deep supervision (F1) and
the higher rate (Dice). On the same scanner: mirrored views (Dice). On another: `native`'s own
patches (Dice, F1) and the higher rate (F1). Mirroring as a whole and the bias field have none
there. On 17 **former heads** of the same making, before deep supervision (28 epochs, three seeds),
they had. Gains in Dice there, same and another scanner: mirroring 0.012, 0.014; bias field 0.002,
0.016; own patches 0.001, 0.033; higher rate 0.015, 0.023. So all of them stay. Own patches cost
Dice on the same scanner, and on the former heads the higher rate cost F1 there (0.012): what they
gain is more.

In 8 minutes deep supervision gains on another scanner, too (Dice, F1). On the former heads it
gained in 40 minutes Dice 0.006 (0.002 to 0.010) and, on another scanner, F1 0.019 (0.005 to 0.037);
in 8 minutes nothing counted there. Those networks were trained by another program, with a loss of
the same kind.

In 8 minutes (11 epochs) nnU-Net's probabilities hardly pass 0.5, so its Dice is 0. Cut at 0.1, two
of its three seeds reach 0.61 and 0.56 (another scanner 0.27 and 0.34). It makes fewer steps a
minute; one reason is that it works in float32 on a CPU, `native` in bfloat16. By steps, too,
`native` is ahead: after 28 epochs it is at 0.861 and 0.600, nnU-Net after 54 at 0.815 and 0.365.
nnU-Net's third seed ended 0.09 below its others.

Two parts stay without a gain that counts. Under poly a run by the clock ends, and seeds agree: on
another scanner within 0.011 on both sets of heads, under plateau within 0.051 and 0.056. The blur
hardly matters. With it F1 is 0.007 higher on another scanner (former heads 0.006). On the same one
it is 0.003 lower (former heads 0.009, 0.001 to 0.022, a loss that counts). It stays because the
other rows of `native` were made with it.

## Tried and left out

Seen while `native` was made, on one or two seeds: two other heads of the MNI template, 26 epochs,
the same scanner; native Dice at 0.5 and lesion F1 by any overlap.

- Mirroring along all three axes, eight views: 0.856 and 0.856; left-right alone 0.862 and 0.875. On
  the former heads, 28 epochs, one seed: Dice 0.023 lower, on another scanner 0.027.
- nnU-Net's list of augmentation: 0.816 and 0.858 (another scanner 0.587 and 0.627); the list kept
  0.869 and 0.883 (0.595 and 0.613).
- An average of the weights, by five rules, up to 320 steps: Dice 0 to 0.01 below the last weights.
- Labels turned linearly, cut at a half: validation Dice 0.798; by the nearest voxel 0.820.

With trained networks: `SMALLEST_PVS` of two voxels lowers F1 from 0.876 to 0.848, since a quarter
of the simulated PVS are single voxels. Rows of mirrored windows give a Dice 0.001 to 0.003 below
full views, the chessboard -0.001 to +0.001 (five networks).

## What another scanner costs

A network of 40 minutes without deep supervision was tested on four former heads, one change at a
time. Native Dice: with none 0.936; its voxels 0.732, its noise 0.828, its contrast, blur or bias
field 0.933 to 0.935; all of them 0.662. Most of it is lost in the scans: after 20 more epochs on
the twelve training heads, as that scanner shows them, it is 0.681. On the training's grid of 0.8 mm
in place of the scans' own it is 0.626: `SPACING_TOLERANCE` stays.
"""


def write_tables(top, output):
    """Write the tables of all that is done below `top`."""
    parts = [INTRODUCTION]
    titles = [*SCORES, "Dice, difference", "F1, difference", "spread", "best threshold", "epochs"]
    for kept in sorted(top.glob("*/settings.json")):
        results, told = read_rows(kept.parent), json.loads(kept.read_text())
        counts = "{} heads to train, {} to validate, {} to test".format(*told["heads"])
        counts += f", of {told['scans']}; {told.get('processor', platform.machine())}."
        for name, title in SETS.items() if results else ():
            made = f"{told['data']}, {told['length']}, {title}"
            parts.append(f"## {made[0].upper()}{made[1:]}\n\n{counts}\n")
            parts.append(f"| recipe | {' | '.join(titles)} |\n|{' --- |' * (len(titles) + 1)}")
            parts += [describe_row(row, results, name) for row in results]
            parts[-1] += "\n"
    train_pvs.write_file(output, "\n".join([*parts, LEFT_OUT]))


def parse(parser, argv):
    """Return the options; what runs of other data or minutes did lies in other folders."""
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--epochs", type=int, default=0, help="in place of the minutes")
    parser.add_argument("--data-dir", type=Path, help="BIDS folder; none: heads are simulated")
    text = "how many to train, validate, test, in the order of their names"
    parser.add_argument("--heads", type=int, nargs=3, default=(12, 1, 4), help=text)
    parser.add_argument("--work", type=Path, default=Path("outputs_accuracy"))
    options = parser.parse_args(argv)
    data = options.data_dir.resolve().name if options.data_dir else "simulated"
    options.top, size = options.work, "-".join(map(str, options.heads))
    options.length = options.epochs or options.minutes
    options.work /= f"{data}-{size}-{length_words(options)}".replace(" ", "-")
    torch.set_num_threads(1)
    return options


def main(argv=None):
    """Make the data, train what has not been, write the tables; return the status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    rows = [row for row in ROWS if row != NNUNET or has_nnunet()]
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=rows)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "accuracy.md")
    options = parse(parser, argv)
    if options.epochs:  # nnU-Net's are others
        rows = [row for row in rows if row != NNUNET]
        options.rows = [row for row in options.rows if row != NNUNET]
    if not set(options.rows) <= set(rows):
        print(NO_NNUNET, file=sys.stderr)
        return 2
    for seed in options.seeds:
        for row in options.rows:
            if read_run(row, seed, options) is None:
                if row == NNUNET:
                    import nnunet

                    nnunet.run(seed, options)
                else:
                    run(row, seed, options)
                write_tables(options.top, options.output)
    write_tables(options.top, options.output)
    print(options.output.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
