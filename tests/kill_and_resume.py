"""Kill runs at random moments, resume them, and compare with the run that was never killed.

    python tests/kill_and_resume.py --kills 200
    python tests/kill_and_resume.py --kills 5 --predict 200

The second command kills and repeats one --predict of 200 scans. Every run is a fork, so that it
starts at once; it is killed (SIGKILL) after a random time, or as it flushes or renames a file.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from conftest import LEARNING, MACHINE, TINY, make_subjects, scores, snapshot
from running import live, train_pvs

FLAGS = ("--epochs", 4, "--val-every", 2, "--lr", 5e-3, "--test-fraction", 0.5, "--no-amp")
FLAGS += ("--augmentation", "native", "--flip-axes", "xyz", "--tta-flips", "windows")


def digest(content):
    """Return a hash of tensors and plain values, nested as they may be."""
    if isinstance(content, torch.Tensor):
        return hashlib.sha256(content.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(content, dict):
        return {key: digest(value) for key, value in content.items()}
    return [digest(value) for value in content] if isinstance(content, list) else content


def comparable(out):
    """Return a run's test scores without what tells when, where and with which file."""
    content = scores(out)
    del content["date"], content["checkpoint"]["file"]
    del content["config"]["DATA_DIR"], content["config"]["OUTPUT_DIR"]
    return content


def outcome(out):
    """Return what a run comes to, by name, but for seconds, dates and the folder."""
    run = train_pvs.Run(out)
    history = json.loads(run.history.read_text())
    last, best = (torch.load(path, weights_only=True) for path in (run.last, run.best))
    for row in [*history, *last["progress"]["history"], last["history_row"], best["history_row"]]:
        for key in ("seconds", "val_seconds"):
            row.pop(key, None)  # a row may be here twice
    metrics = comparable(out)
    for content in (metrics, last, best):
        content.pop("date", None)
        for name in ("DATA_DIR", "OUTPUT_DIR", "CACHE_DIR", "NUM_WORKERS", "EPOCHS"):
            content["config"].pop(name, None)
    found = {"history": history, "metrics": metrics, "last": digest(last), "best": digest(best)}
    files = [run.table, *sorted(run.predictions.rglob("*.nii.gz"))]
    return found | {path.name: path.read_bytes() for path in files}


def die_at(number):
    """Let this process kill itself at its flush or renaming of this number."""
    moments = itertools.count(1)

    def deadly(function):
        def call(*args):
            if next(moments) == number:
                os.write(1, f"\nkilled in {function.__name__} {args}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)


def start(argv, log_path, kill_at=0):
    """Fork a run, which kills itself at its `kill_at`-th flush or renaming."""
    args = train_pvs.main, argv, 2 * [log_path], {}, (die_at, kill_at)
    process = multiprocessing.get_context("fork").Process(target=live, args=args)
    process.start()
    return process


def run_to_the_end(argv, out, rng, duration, kills):
    """Run and resume until the run ends, killed at random up to `kills` times; count how."""
    survived = Counter()
    while True:
        left = kills - survived.total()
        in_write = rng.random() < 0.5
        kill_at = rng.randint(1, 40) if left and in_write else 0
        way = "--resume" if (out / "checkpoints" / "last.pth").exists() else "--overwrite"
        child = start([*argv, way], out.with_suffix(".log"), kill_at)
        if left and not in_write:
            time.sleep(rng.uniform(0, duration))
            child.kill()
        child.join()
        if child.exitcode in (0, 1):
            return survived
        if child.exitcode != -signal.SIGKILL:
            sys.exit(f"a run ended with {child.exitcode}, see {out}.log")
        survived["in a write" if in_write else "at a random time"] += 1


def predict_to_the_end(folder, count, kills, rng):
    """Predict `count` scans twice, once killed so many times; exit with 1 where results differ."""
    data, scans = (
        make_subjects(folder / "data", 4),
        make_subjects(folder / "scans", count, seed=100),
    )
    train_pvs.main(["--data-dir", str(data), "--output-dir", str(folder / "run"), *LEARNING])
    best, results, duration, killed = train_pvs.Run(folder / "run").best, [], 0, 0
    flags = ["--predict", str(scans), *MACHINE, "--checkpoint", str(best), "--output-dir"]
    for name, times in (("whole", 0), ("killed", kills)):
        for left in range(times, -1, -1):
            begin = time.perf_counter()
            child = start([*flags, str(folder / name)], folder / f"{name}.log")
            if left:
                time.sleep(rng.uniform(0, duration / 3))
                child.kill()
            child.join()
            killed += child.exitcode == -signal.SIGKILL
        assert child.exitcode == 0, (folder / f"{name}.log").read_text()[-2000:]
        duration, found = time.perf_counter() - begin, snapshot(folder / name)
        results.append({n: found[n] for n in found if n.endswith((".csv", ".gz", ".json"))})
    if results[0] != results[1]:
        sys.exit("the prediction that was killed has other masks or another table")
    print(f"{count} scans, killed {killed} times: {len(results[0])} equal files")


def main(argv=None):
    """Compare as many killed runs as it takes; exit with 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--predict", type=int, metavar="SCANS", help="of one --predict")
    options = parser.parse_args(argv)
    rng, survived, runs = random.Random(options.seed), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if options.predict:
            return predict_to_the_end(folder, options.predict, options.kills, rng)
        flags = ["--data-dir", str(make_subjects(folder / "data", 4)), *TINY, *map(str, FLAGS)]
        flags += ["--lr-schedule", "poly"]
        begin = time.perf_counter()
        run_to_the_end([*flags, "--output-dir", str(folder / "0")], folder / "0", rng, 0, 0)
        duration, expected = time.perf_counter() - begin, outcome(folder / "0")
        while survived.total() < options.kills:
            runs += 1
            out = folder / str(runs)
            left = min(options.kills - survived.total(), 10)
            survived += run_to_the_end([*flags, "--output-dir", str(out)], out, rng, duration, left)
            found = outcome(out)
            wrong = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
            if wrong:
                sys.exit(f"run {runs} has another {wrong} than the one that was never killed")
    print(f"{survived.total()} kills survived in {runs} runs: {dict(survived)}")


if __name__ == "__main__":
    main()
