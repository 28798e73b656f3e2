"""Small data sets and settings that make the whole pipeline run in seconds."""

import functools
import importlib.util
import json
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from running import call, done, draw_nothing, live, members, train_pvs

torch.set_num_threads(1)  # in all processes of the tests: sums depend on the number of threads

# A network and patches of the smallest size that the settings allow, made small by flags alone.
TINY = (
    "--encoder-name efficientnet-b0 --encoder-weights none --encoder-depth 3 --decoder-width 2 "
    "--img-patch-size 16 16 16 --pix-dim 1 1 1 --crops-per-volume 2 --batch-size 1 --epochs 1 "
    "--num-workers 0 --device cpu --head-bias-log-odds --batchnorm-momentum 0.1"
).split()
# BatchNorm that keeps up with the last batch and a fast start: four epochs find some of the PVS.
LEARNING = [*TINY, *"--epochs 4 --lr 3e-3 --batchnorm-momentum 0.9 --no-amp".split()]
MACHINE = "--device cpu --num-workers 0".split()  # of commands that take the rest from weights


def save_nifti(path, data, affine=None):
    """Write an array as NIfTI (1 mm, RAS unless an affine is given) and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def image_path(folder, subject):
    return folder / subject / "anat" / f"{subject}_T2w.nii.gz"


def label_path(folder, subject):
    return folder / "derivatives" / "mask" / subject / f"{subject}_desc-mask_PVS.nii.gz"


def make_head(shape=(24, 28, 20), seed=0):
    """Return a scan, a bright ball in noise with three tubes in it, and the mask of the tubes."""
    rng = np.random.default_rng(seed)
    ticks = [np.linspace(-1, 1, n) for n in shape]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*ticks, indexing="ij")))
    label = np.zeros(shape, np.int16)
    for _ in range(3):
        x, y, z = (int(rng.integers(n // 3, 2 * n // 3)) for n in shape)
        label[x : x + 2, y : y + 2, z - 4 : z + 4] = 1
    image = np.where(radius < 0.9, 400, 5) + 400 * label + rng.normal(0, 10, shape)
    return np.clip(image, 0, None).astype(np.int16), label


def save_subject(folder, subject, image, label, affine=None):
    save_nifti(image_path(folder, subject), image, affine)
    save_nifti(label_path(folder, subject), label, affine)


def make_subject(folder, subject, seed=0):
    save_subject(folder, subject, *make_head(seed=seed))


def make_subjects(folder, count, seed=0):
    """Write sub-001, sub-002, .., each with a seed of its own, and return the folder."""
    for number in range(1, count + 1):
        make_subject(folder, f"sub-{number:03d}", seed=seed + number)
    return folder


def snapshot(folder, without=()):
    """Return the content of every file below a folder, by path in it; `without`: file names."""
    files = (p for p in Path(folder).rglob("*") if p.is_file() and p.name not in without)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def scores(out):
    """Return the content of a run's file of test scores."""
    return json.loads((out / "logs" / "comprehensive_test_metrics.json").read_text())


def about(data, out):
    """Return what tests want to know of a run's folders."""
    best = out / "checkpoints" / "best_model.pth"
    split = json.loads((out / "logs" / "split.json").read_text())
    return SimpleNamespace(data=data, out=out, best=best, split=split, scores=scores(out))


def edited_copy(folder, *replacements, **settings):
    """Import a copy of the script with texts replaced, and settings written into its Config."""
    text = Path(train_pvs.__file__).read_text()
    for name, value in settings.items():
        line = rf"^    {name}: (\w+) = .*?(  # .*)$"
        text, count = re.subn(line, rf"    {name}: \1 = {value}\2", text, flags=re.MULTILINE)
        assert count == 1, name
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    number = sum(name.startswith("edited_") for name in sys.modules)
    path = folder / f"edited_{number}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split_flags(folder, **numbers):
    """Write a split by numbers of subjects, such as "1 3", to a folder; return its flags."""
    split = {part: [f"sub-00{n}" for n in words.split()] for part, words in numbers.items()}
    (folder / "split.json").write_text(json.dumps(split))
    return ["--split", str(folder / "split.json")]


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("code was run",)


def prepared_case(path, image, label):
    """Write a volume as caching leaves it, and return its case."""
    label = torch.as_tensor(label, dtype=torch.uint8)
    entry = {"image": torch.as_tensor(image).half()[None], "label": label[None]}
    entry["affine"] = torch.eye(4)
    kinds = {"foreground": label > 0, "background": label == 0}
    for kind, there in (kinds | {"head": (label == 0) & (entry["image"][0] > 0)}).items():
        entry[kind] = there.flatten().nonzero().flatten().int()
    torch.save(entry, path)
    facts = {"cache": str(path), "working_voxels": int(label.sum())}
    return train_pvs.Case("sub-1", "sub-1", "scan.nii", **facts)


@pytest.fixture(scope="session")
def nursery():
    """Where runs are forked from: a process that has imported the script and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_and_resume"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture
def launch(nursery):
    """Start main in a process of its own; what is left of it in the end is killed."""
    begun = []

    def start(argv, screens, function=train_pvs.main, environment=None, hook=None):
        args = function, [*map(str, argv)], screens, environment or {}, hook
        begun.append(nursery.Process(target=live, args=args))
        begun[-1].start()
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        for member in members(process.pid):
            os.kill(member, signal.SIGKILL)
        process.join()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run over six subjects that has learned something; nothing may change its folders."""
    folder = tmp_path_factory.mktemp("finished")
    data, out = make_subjects(folder / "data", 6), folder / "out"
    description = data / "dataset_description.json"
    description.write_text('{"Name": "Simulated heads of a test", "BIDSVersion": "1.9.0"}')
    parts = ("--test-fraction", 0.3, "--val-fraction", 0.25)  # 3 train, 1 val, 2 test
    screen = done(call("--data-dir", data, "--output-dir", out, *LEARNING, *parts))
    return SimpleNamespace(**vars(about(data, out)), screen=screen)


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run and its data in folders that a test may change."""
    shutil.copytree(finished.out, tmp_path / "run")
    shutil.copytree(finished.data, tmp_path / "moved")
    return about(tmp_path / "moved", tmp_path / "run")


@pytest.fixture
def predict(finished, tmp_path):
    """Call --predict with the run's weights, results in `out`; returns (status, stdout, stderr)."""
    flags = ("--checkpoint", finished.best, "--output-dir", tmp_path / "out", *MACHINE)
    return lambda *words, command="--predict": call(*flags, command, *words)


@pytest.fixture
def no_figures(monkeypatch):
    draw_nothing(monkeypatch)


@pytest.fixture
def data(tmp_path):
    """A BIDS folder with four subjects of 24 x 28 x 20 voxels of 1 mm."""
    return make_subjects(tmp_path / "data", 4)


@pytest.fixture
def run(tmp_path):
    """Call main with the tiny settings; returns (status, stdout, stderr)."""
    return lambda *flags, data=tmp_path / "data", out=tmp_path / "out": call(
        "--data-dir", data, "--output-dir", out, *TINY, *flags
    )


@pytest.fixture
def tiny_config():
    """Return a function that gives the tiny Config with overrides."""
    cfg, _ = train_pvs.parse_command_line(["--data-dir", "data", "--output-dir", "out", *TINY])
    return functools.partial(train_pvs.replace, cfg)
