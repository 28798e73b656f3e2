#!/usr/bin/env bash
# Seen with MONAI 1.6.1, torch 2.14.1 and numpy 2.4.6, Python 3.11 or newer.
#
# MONAI's sliding_window_inference with mode="gaussian" and sw_batch_size=1 weights the predictor's
# answer in place. If the predictor returns its input, or one channel of it, that is a view of the
# caller's volume: it is changed, the next windows read the changed values, and the result is
# far off, with no warning.
# Guess: with torch.nn.Identity the output equals the input up to rounding, as it does with
# mode="constant", with sw_batch_size=4, or for a predictor that returns a copy.
# Matters: an identity is the usual check of window and overlap settings, and one channel passed on
# (an earlier map) a usual baseline. Both fail, and spoil the scan for what is scored or drawn next.
set -euo pipefail
export OMP_NUM_THREADS=1
dir=$(mktemp -d)
trap 'rm -rf -- "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    'torch==2.14.1' 'monai==1.6.1' 'numpy==2.4.6'
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from monai.inferers import sliding_window_inference

torch.set_num_threads(1)


def errors(predictor, mode, batch):
    """Largest error of the output, and largest change of the volume that was handed in."""
    scan = torch.rand(1, 2, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    original = scan.clone()
    with torch.no_grad():
        out = sliding_window_inference(scan, (16, 16, 16), batch, predictor, overlap=0.5, mode=mode)
    return float((out - predictor(original)).abs().max()), float((scan - original).abs().max())


identity, channel, copy = torch.nn.Identity(), lambda x: x[:, :1], lambda x: x.clone()
ok = True
for name, predictor, mode, batch, spoilt in [
    ("identity", identity, "gaussian", 1, True),
    ("one channel", channel, "gaussian", 1, True),
    ("identity", identity, "gaussian", 4, False),
    ("identity", identity, "constant", 1, False),
    ("copy", copy, "gaussian", 1, False),
]:
    error, change = errors(predictor, mode, batch)
    print(
        f"{name}, {mode}, sw_batch_size={batch}: output off by up to {error:.6f}, "
            f"the input changed by up to {change:.6f}"
    )
    ok = ok and ((error > 0.5 and change > 0.5) if spoilt else (error < 1e-5 and change == 0))
sys.exit(0 if ok else 1)
PY
