"""Run two versions of the script on the same data and compare every number and mask.

    python benchmarks/compare_builds.py OLD/train_pvs.py train_pvs.py --keep FOLDER

Four runs: the demo, and small runs of `published`, of `published` in float32 with a validation
every other epoch, and of `native`. History, split, scores of all subjects, summaries and masks must
be equal to the last bit; seconds, dates, versions and settings do not count; else exit status 1.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import TINY, make_subjects

SMALL = [*TINY, "--test-fraction", "0.5", "--lr", "5e-3", "--epochs", "10", "--seed", "123"]
NATIVE = "--recipe native --architecture dynunet --img-patch-size 16 16 16 --encoder-depth 3 "
NATIVE += "--decoder-width 4 --pix-dim 0 0 0 --no-amp --val-every 2"
RUNS = {
    "demo": ["--demo"],
    "published": SMALL,
    "published_float32": [*SMALL, "--no-amp", "--val-every", "2", "--pix-dim", "1.2", "1.2", "1.2"],
    "native": [*SMALL, *NATIVE.split()],
}


def run(script, name, folder):
    """Make one of RUNS, unless it is there, and return its output folder."""
    out = folder / name
    if not (out / "finished").exists():
        flags = [*RUNS[name], "--output-dir", str(out)]
        if name != "demo":
            flags += ["--data-dir", str(folder / "data")]
        done = subprocess.run([sys.executable, script, *flags, "--overwrite"], check=False)
        if done.returncode not in (0, 1):
            sys.exit(f"{name} of {script} ended with {done.returncode}")
        (out / "finished").touch()
    return out


def numbers(out):
    """Return what a run comes to: {name: value}."""
    logs = out / "logs"
    history = json.loads((logs / "training_history.json").read_text())
    scores = json.loads((logs / "comprehensive_test_metrics.json").read_text())
    history = [{k: row[k] for k in row if k not in ("seconds", "val_seconds")} for row in history]
    for name in ("config", "versions", "checkpoint", "date", "device", "empty_masks"):
        scores.pop(name, None)
    masks = sorted((out / "predictions").rglob("*.nii.gz"))
    masks = {path.name: gzip.decompress(path.read_bytes()) for path in masks}
    split = json.loads((logs / "split.json").read_text())
    table = (logs / "test_metrics.csv").read_text()
    return {"history": history, "split": split, "table": table, "masks": masks} | scores


def differences(old, new, where=""):
    """Yield a line for each value that is not equal; what only the new one has is passed over."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            yield from differences(old[key], new.get(key, "missing"), f"{where}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{where}/{number}")
    elif old != new:
        yield f"{where}: {str(old)[:60]} became {str(new)[:60]}"


def main():
    """Compare all runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs=2, metavar="SCRIPT")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--keep", type=Path, help="folder of the results, else a temporary one")
    options, wrong = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folders = [(options.keep or Path(temporary)) / side for side in ("old", "new")]
        for folder in folders:
            if not (folder / "data").exists():
                make_subjects(folder / "data", 6)
        for name in options.only:
            pair = zip(options.scripts, folders, strict=True)
            found = [numbers(run(script, name, folder)) for script, folder in pair]
            lines = list(differences(*found))
            print(f"{name}: {'equal to the bit' if not lines else f'{len(lines)} differences'}")
            print(*(f"  {line}" for line in lines[:20]), sep="\n")
            wrong += bool(lines)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
