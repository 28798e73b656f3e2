#!/usr/bin/env bash
# Seen with scikit-learn 1.9.1, scipy 1.17.1 and numpy 2.4.6, Python 3.11 or newer.
#
# auc(recall, precision), of sklearn's own curve, and average_precision_score both go by the name of
# area under the precision-recall curve. For tied scores they part: at 0.5% foreground, one constant
# score gets 0.50 from the first and 0.005 from the second; a 0/1 mask of precision 0.5 and recall
# 0.6 gets 0.55 and 0.30. The first draws straight lines between few points, from (recall 0,
# precision 1) on.
# Guess: the two differ by less than a hundredth, as they do if no two scores are equal.
# Matters: small structures mean few positives; maps that are cut, rounded to 8 bits or saturated
# are full of ties; the worst map then looks good. Say which of the two a table gives.
set -euo pipefail
export OMP_NUM_THREADS=1
dir=$(mktemp -d)
trap 'rm -rf -- "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    'scikit-learn==1.9.1' 'scipy==1.17.1' 'numpy==2.4.6'
"$dir/venv/bin/python" - <<'PY'
import sys

import numpy as np
from sklearn.metrics import auc, average_precision_score, precision_recall_curve

N, POSITIVE = 100_000, 500
truth = np.zeros(N, dtype=int)
truth[:POSITIVE] = 1


def both(score):
    precision, recall, _ = precision_recall_curve(truth, score)
    return float(auc(recall, precision)), float(average_precision_score(truth, score))


mask = np.zeros(N)
mask[:300] = 1  # 300 of the 500 found: recall 0.6
mask[POSITIVE : POSITIVE + 300] = 1  # and as many voxels beside them: precision 0.5
distinct = np.random.default_rng(0).normal(size=N) + 2.5 * truth

results = {
    "one constant score": both(np.zeros(N)),
    "0/1 mask": both(mask),
    "all scores differ": both(distinct),
}
for name, (area, average) in results.items():
    print(f"{name}: auc(recall, precision) {area:.4f}, average_precision_score {average:.4f}")

constant, hard, smooth = results.values()
ok = constant[0] > 0.5 and abs(constant[1] - 0.005) < 1e-9
ok = ok and abs(hard[0] - 0.551) < 1e-3 and abs(hard[1] - 0.302) < 1e-3
ok = ok and abs(smooth[0] - smooth[1]) < 5e-3
sys.exit(0 if ok else 1)
PY
