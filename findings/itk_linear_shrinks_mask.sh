#!/usr/bin/env bash
# Seen with SimpleITK 2.5.7, scipy 1.17.1 and numpy 2.4.6, Python 3.11 or newer.
#
# SimpleITK.Resample with its default, linear interpolation, cuts the fractions of an 8-bit 0/1 mask
# off: 0.9 becomes 0. A line one voxel wide, moved by a tenth of a voxel, is wholly lost; a cube of
# 4 x 4 x 4 voxels loses a layer on each axis that it is moved along, however little.
# Guess: it rounds, and 0.5 and more stay, as with scipy.ndimage for the same mask and shift.
# Matters: hand-drawn masks of thin structures, brought to the scan's grid like this, come out
# thinner or empty, with no warning. Take nearest neighbour, or cast to float and cut at 0.5.
set -euo pipefail
export OMP_NUM_THREADS=1
dir=$(mktemp -d)
trap 'rm -rf -- "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    'SimpleITK==2.5.7' 'scipy==1.17.1' 'numpy==2.4.6'
"$dir/venv/bin/python" - <<'PY'
import sys

import numpy as np
import SimpleITK as sitk
from scipy import ndimage


def itk(mask, shift, pixel_type=sitk.sitkUInt8):
    """The mask's size after a move of `shift` voxels (z, y, x), counted at 0.5 and above."""
    image = sitk.Cast(sitk.GetImageFromArray(mask), pixel_type)
    moved = sitk.Resample(image, image, sitk.TranslationTransform(3, [-s for s in shift[::-1]]))
    return int((sitk.GetArrayFromImage(moved) >= 0.5).sum())


def scipy(mask, shift):
    return int(ndimage.shift(mask, shift, order=1).sum())


line = np.zeros((20, 20, 40), dtype=np.uint8)
line[10, 10, 5:35] = 1
cube = np.zeros((20, 20, 20), dtype=np.uint8)
cube[8:12, 8:12, 8:12] = 1

ok = True
for name, mask, shift, expected in [
    ("line 1 voxel wide", line, (0, 0.1, 0), 0),
    ("cube of 4", cube, (0, 0, 0.1), 48),
    ("cube of 4", cube, (0, 0, 0.9), 48),
    ("cube of 4", cube, (0.1, 0.1, 0.1), 27),
]:
    before, after = int(mask.sum()), itk(mask, shift)
    as_float, other = itk(mask, shift, sitk.sitkFloat32), scipy(mask, shift)
    print(
        f"{name} moved by {shift}: {before} voxels -> SimpleITK {after}, "
        f"as float at 0.5 {as_float}, scipy {other}"
    )
    ok = ok and after == expected and as_float == before and other == before
sys.exit(0 if ok else 1)
PY
