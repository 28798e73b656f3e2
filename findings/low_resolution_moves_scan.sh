#!/usr/bin/env bash
# Seen with MONAI 1.6.1, torch 2.14.1, batchgeneratorsv2 0.3.6, numpy 2.4.6, Python 3.11 or newer.
#
# MONAI's RandSimulateLowResolution moves the scan: by 0.65 voxels towards higher indices on every
# axis, 1.1 voxels along the diagonal, on average over its default zooms of 0.5 to 1. Its "nearest"
# (torch's) takes the lower voxel, and the linear way back takes that for the middle one. The label
# stays where it was, so a scan and its label no longer fit.
# Guess: it blurs and moves nothing. nnU-Net's transform, which it says it corresponds to, does so.
# Matters: for a tube two voxels wide such pairs teach to draw the mask beside the tube, always on
# the same side; less than half of its height is left within its label. downsample_mode=
# "nearest-exact" heals it.
set -euo pipefail
export OMP_NUM_THREADS=1
dir=$(mktemp -d)
trap 'rm -rf -- "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    'torch==2.14.1' 'monai==1.6.1' 'numpy==2.4.6'
# of batchgeneratorsv2 one file is used, that needs torch only
"$dir/venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps \
    'batchgeneratorsv2==0.3.6'
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from monai.transforms import RandSimulateLowResolution

torch.set_num_threads(1)
SIZE = 96
AXIS = torch.arange(SIZE, dtype=torch.float32)
ZOOMS = [float(zoom) for zoom in np.linspace(0.5, 1, 41)]


def monai(scan, zoom, **options):
    return RandSimulateLowResolution(prob=1, zoom_range=(zoom, zoom), **options)(scan)


def exact(scan, zoom):
    return monai(scan, zoom, downsample_mode="nearest-exact")


def nnunet(scan, zoom):
    return SimulateLowResolutionTransform((zoom, zoom), True, True, None)(image=scan.clone())[
        "image"
    ]


def blob(centre):
    """A smooth bright spot, some 10 voxels wide, far from the borders."""
    z, y, x = (torch.exp(-((AXIS - c) ** 2) / 32) for c in centre)
    return (z[:, None, None] * y[None, :, None] * x[None, None, :])[None]


def middle(scan):
    sums = [scan[0].sum(axes) for axes in ((1, 2), (0, 2), (0, 1))]
    return np.array([float((s * AXIS).sum() / s.sum()) for s in sums])


def measure(name, transform):
    """Mean move of a blob on each axis and its mean length; mean height of a tube in its label."""
    rng = np.random.default_rng(0)
    moves, heights = [], []
    for zoom in ZOOMS:
        scan = blob(rng.uniform(25, 70, 3))
        moves.append(middle(transform(scan, zoom)) - middle(scan))
        i, j = rng.integers(10, 84, 2)
        tube = torch.zeros(1, SIZE, SIZE, SIZE)
        tube[:, i : i + 2, j : j + 2, 20:76] = 1
        heights.append(float(transform(tube, zoom)[tube > 0].mean()))
    mean, length = np.mean(moves, 0), float(np.linalg.norm(moves, axis=1).mean())
    print(
        f"{name}: moved by {', '.join(f'{m:.2f}' for m in mean)} voxels, length {length:.2f};"
        f" a tube's height in its label {np.mean(heights):.2f}"
    )
    return mean, length, np.mean(heights)


mean, length, height = measure("MONAI, as it comes", monai)
others = [measure("MONAI, nearest-exact", exact), measure("nnU-Net", nnunet)]
ok = bool((np.abs(mean - 0.64) < 0.05).all()) and abs(length - 1.1) < 0.1 and height < 0.5
ok = ok and all(np.abs(m).max() < 0.1 and n < 0.2 and h > 0.6 for m, n, h in others)
sys.exit(0 if ok else 1)
PY
