#!/usr/bin/env bash
# Seen with torchio 1.2.1, MONAI 1.6.1, torch 2.14.1, SimpleITK 2.5.7, nibabel 5.4.2, numpy 2.4.6,
# Python 3.11 or newer.
#
# torchio's Resample(0.8) of a scan with 320 slices of 0.799998 mm makes 319 (the whole number below
# 319.9992), centred on the old ones: each new slice lies half-way between two old ones. Along that
# axis the scan is blurred: a structure one slice thick falls to half its height, noise to 0.7 of
# its spread. The label keeps its width.
# Guess: 320 slices, unchanged, as MONAI's Spacing gives, and torchio where the file says 0.8.
# Matters: spacings off by millionths come from matrices stored with few digits. Of two scans of
# one protocol one is blurred; thin structures lose half their contrast to their label; masks on
# the new grid do not fit the scan's. Round the spacing first, or resample to a reference image.
set -euo pipefail
export OMP_NUM_THREADS=1
dir=$(mktemp -d)
trap 'rm -rf -- "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    'torch==2.14.1' 'torchio==1.2.1' 'monai==1.6.1' 'SimpleITK==2.5.7' 'nibabel==5.4.2' \
    'numpy==2.4.6'
"$dir/venv/bin/python" -W ignore - "$dir" <<'PY'
import sys

import monai.transforms as mt
import nibabel as nib
import numpy as np
import torch
import torchio as tio

torch.set_num_threads(1)
label = np.zeros((320, 16, 16), dtype=np.uint8)
label[100, 4:12, 4:12] = 1  # a structure one slice thick
scan = label.astype(np.float32)
scan[200:300] = np.random.default_rng(0).normal(size=(100, 16, 16))  # noise of spread 1 elsewhere


def measure(name, spacing, image, mask, start):
    peak, noise, thick = (
        float(image[0, 90:110].max()),
        float(image[0, 210:290].std()),
        int(mask[0, :, 8, 8].sum()),
    )
    print(
        f"{spacing} mm, {name}: {image.shape[1]} slices from {start:.2f} mm; "
        f"structure {peak:.2f} high, noise {noise:.2f};"
        f" label {thick} slice thick"
    )
    return image.shape[1], round(start, 2), round(peak, 2), round(noise, 1), thick


seen = {}
for spacing in (0.799998, 0.8):
    paths = []
    for kind, data in (("scan", scan), ("label", label)):
        paths.append(f"{sys.argv[1]}/{kind}_{spacing}.nii.gz")
        nib.save(nib.Nifti1Image(data, np.diag([spacing, 0.8, 0.8, 1.0])), paths[-1])

    image, mask = (
        tio.Resample(0.8)(tio.ScalarImage(paths[0])),
        tio.Resample(0.8)(tio.LabelMap(paths[1])),
    )
    seen["torchio", spacing] = measure(
        "torchio", spacing, image.data, mask.data, float(image.affine[0, 3])
    )

    load = mt.LoadImage(ensure_channel_first=True)
    image = mt.Spacing((0.8, 0.8, 0.8), mode="bilinear")(load(paths[0]))
    mask = mt.Spacing((0.8, 0.8, 0.8), mode="nearest")(load(paths[1]))
    seen["MONAI", spacing] = measure("MONAI", spacing, image, mask, float(image.affine[0, 3]))

same = (320, 0.0, 1.0, 1.0, 1)
moved = (319, 0.4, 0.5, 0.7, 1)
ok = seen["torchio", 0.799998] == moved and all(
    seen[key] == same for key in seen if key != ("torchio", 0.799998)
)
sys.exit(0 if ok else 1)
PY
