#!/usr/bin/env bash
# Seen with scikit-image 0.26.0, scipy 1.17.1 and numpy 2.4.6, Python 3.11 or newer.
#
# skimage.filters.frangi gives another answer for sigmas (4, 3, 2, 1) than for (1, 2, 3, 4). What
# counts as strong (gamma) is taken from the first sigma and kept, and the answers of different
# sigmas are not brought to one scale. Smallest first, the larger ones hardly count: a tube 6
# voxels wide has a dark middle, a tube 2 wide gets what sigma 1 alone gives. Largest first, both
# are bright, and so are thousands of voxels beside them. sato's answer is the same in any order.
# Source: https://github.com/scikit-image/scikit-image/issues/7711
# Guess: it is the maximum over the sigmas, so their order cannot matter.
# Matters: Frangi's filter is the classical way to find perivascular spaces. A threshold holds for
# one list of sigmas in one order; lists from small to large, as usual, lose the wide ones.
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
from skimage.filters import frangi, sato

SIZE = 64
HALF = slice(SIZE // 2 - 1, SIZE // 2 + 1)
ORDERS = {"1": (1,), "1, 2, 3, 4": (1, 2, 3, 4), "4, 3, 2, 1": (4, 3, 2, 1)}


def tube(radius):
    """A round tube along the last axis, 1 in noise of spread 0.05, and where it is."""
    across = ((np.indices((SIZE, SIZE)) - (SIZE - 1) / 2) ** 2).sum(0) <= radius**2
    where = np.repeat(across[:, :, None], SIZE, axis=2)
    return where + np.random.default_rng(0).normal(0, 0.05, where.shape), where


seen = {}
for width, radius in ((2, 1.2), (6, 3.0)):
    scan, where = tube(radius)
    for vesselness in (frangi, sato):
        for name, sigmas in ORDERS.items():
            answer = vesselness(scan, sigmas=sigmas, black_ridges=False)
            middle = float(answer[HALF, HALF, 20:44].mean())
            beside = int((answer[~where] > 0.5).sum())
            seen[vesselness.__name__, width, name] = middle, beside
            print(
                f"{vesselness.__name__}, tube {width} wide ({where.sum()} voxels), sigmas {name}:"
                f" {middle:.3f} in its middle; {beside} voxels beside it above 0.5"
            )

up, down = "1, 2, 3, 4", "4, 3, 2, 1"
thin, wide = seen["frangi", 2, up], seen["frangi", 6, up]
ok = abs(thin[0] - seen["frangi", 2, "1"][0]) < 1e-3 and thin[0] < 0.5 and wide[0] < 0.3
ok = ok and all(seen["frangi", w, down][0] > 0.8 for w in (2, 6))
ok = ok and thin[1] < 10 and seen["frangi", 2, down][1] > 5000
ok = ok and all(abs(seen["sato", w, up][0] - seen["sato", w, down][0]) < 1e-9 for w in (2, 6))
sys.exit(0 if ok and seen["sato", 6, up][0] > seen["sato", 6, "1"][0] * 3 else 1)
PY
