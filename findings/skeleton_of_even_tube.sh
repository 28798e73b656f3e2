#!/usr/bin/env bash
# Seen with scikit-image 0.26.0, scipy 1.17.1 and numpy 2.4.6, Python 3.11 or newer.
#
# skimage.morphology.skeletonize leaves NOTHING of a straight 3D tube 60 voxels long if it is 2 x 2,
# 2 x 4, 4 x 4 or 6 x 6 voxels wide, even with a corner missing. No error, no warning. Tubes 1 x 1,
# 2 x 3 or 3 x 3 wide keep their line, and so does a bar 2 wide in 2D.
# Source: https://github.com/scikit-image/scikit-image/issues/3757
# Guess: every component keeps a line, at worst with ends about a radius short.
# Matters: perivascular spaces are often 2 voxels wide. Lengths, counts and centreline scores from a
# skeleton lose whole structures; compare the number of components before and after.
set -euo pipefail
export OMP_NUM_THREADS=1
dir=$(mktemp -d)
trap 'rm -rf -- "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    'scikit-image==0.26.0' 'scipy==1.17.1' 'numpy==2.4.6'
"$dir/venv/bin/python" - <<'PY'
import sys

import numpy as np
from skimage.measure import label
from skimage.morphology import skeletonize

LENGTH = 60


def tube(a, b):
    """A mask with one straight tube of a x b voxels, 60 long, well inside the volume."""
    mask = np.zeros((20, 20, LENGTH + 20), dtype=bool)
    mask[5 : 5 + a, 5 : 5 + b, 10 : 10 + LENGTH] = True
    return mask


kept = {
    size: int(skeletonize(tube(*size)).sum())
    for size in [(1, 1), (2, 3), (3, 3), (2, 2), (2, 4), (4, 4), (6, 6)]
}
print(
    "skeleton voxels of a tube",
    LENGTH,
    "long:",
    ", ".join(f"{a} x {b}: {n}" for (a, b), n in kept.items()),
)

chipped = tube(2, 2)
chipped[5, 5, 10] = False
pair = tube(2, 2)
pair[12:15, 12:15, 10 : 10 + LENGTH] = True
flat = np.pad(np.ones((2, LENGTH), dtype=bool), 5)
n_chipped, n_flat = int(skeletonize(chipped).sum()), int(skeletonize(flat).sum())
before, after = int(label(pair).max()), int(label(skeletonize(pair)).max())
print(
    f"2 x 2 without one corner: {n_chipped}; the same bar in 2D: {n_flat}; "
    f"a mask with {before} tubes keeps {after}"
)

odd_kept = all(kept[size] >= LENGTH - 4 for size in [(1, 1), (2, 3), (3, 3)])
even_gone = all(kept[size] == 0 for size in [(2, 2), (2, 4), (4, 4), (6, 6)])
sys.exit(
    0
    if odd_kept and even_gone and n_chipped == 0 and n_flat > 50 and (before, after) == (2, 1)
    else 1
)
PY
