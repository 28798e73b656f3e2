"""Simulated heads with directions, and scans as another scanner would have made them.

    python benchmarks/heads.py FOLDER 20                   make a BIDS data set of 20 heads
    python benchmarks/heads.py FOLDER --rescan DATA_DIR    its scans as of another scanner

The demo's heads have neither front nor back. These have what tells a network the directions of a
head: horns of the ventricles, one side's larger than the other's, lobes, a fissure between the
hemispheres, a cerebellum, a neck. Thin PVS in the white matter are labelled; lesions, PVS of the
basal ganglia, and the folds of the cerebellum look alike and are not.
"""

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_pvs  # noqa: E402

SHAPE, SPACING = (128, 160, 128), 0.8  # voxels, mm
OTHER_SPACING = np.array((0.9, 0.9, 1.0))  # mm, of the other scanner
# Of PVS: 1.6 mm at the median, 0.9 to 3 mm, in voxels; half are at most two voxels wide.
DIAMETERS = (2.0, 0.25, 1.1, 3.75)


def near_curve(x, y, z, points, radius):
    """Return where voxels are within `radius` of the line through `points`, [(x, y, z)]."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), bool)
    points = np.asarray(points, float)
    for start, step in zip(points[:-1], np.diff(points, axis=0), strict=True):
        offset = np.stack(np.broadcast_arrays(x - start[0], y - start[1], z - start[2]), -1)
        along = np.clip(offset @ step / (step @ step), 0, 1)
        inside |= ((offset - along[..., None] * step) ** 2).sum(-1) < radius**2
    return inside


def simulate_tissue(rng, shape):
    """Return a head's T2w intensity relative to WM = 1, and masks of WM and basal ganglia.

    Axes point to the right, front and top. Lengths are parts of the head's half height, 1.
    """
    grid, unit = np.indices(shape, np.float32), 0.45 * shape[2]
    centre = np.multiply(shape, (0.5, 0.5, 0.55))
    x, y, z = (
        (ticks - middle + 1.5 * train_pvs.smooth_noise(rng, shape, 14)) / unit
        for ticks, middle in zip(grid, centre, strict=True)
    )
    x = x + rng.uniform(0.03, 0.07) * y  # the right front and the left back reach further
    width, length = rng.uniform(0.9, 1, 2) * (0.95, 1.2)
    wide = width * (1 - 0.2 * (y / length) ** 2 - 0.12 * y / length)  # the back is wider
    skull = np.sqrt((x / wide) ** 2 + (y / length) ** 2 + (z / 0.98) ** 2)
    depth = (1 - skull) * unit  # voxels below the skin
    neck = ((x / 0.5) ** 2 + ((y + 0.25) / 0.55) ** 2 < 1) & (z < -0.5)
    cord = (x**2 + (y + 0.3) ** 2 < 0.1**2) & (z < -0.5)
    sulci = train_pvs.smooth_noise(rng, shape, 3.5) ** 2  # thin sheets where the noise crosses zero
    csf, cortex = 7 + 8 * np.exp(-sulci / 0.02), 9.5 + 8 * np.exp(-sulci / 0.3)
    layers = [neck & (depth < 0), depth < 0, depth < 3, depth < 6, depth < csf, depth < cortex]
    image = np.select(layers, [0.7, 0.02, 1.1, 0.2, 2.5, 1.3], 1.0).astype(np.float32)
    fissure = (np.abs(x) < 0.025) & (z > 0.3) & (depth > 6)
    small_brain = (x / 0.55) ** 2 + ((y + 0.65) / 0.35) ** 2 + ((z + 0.55) / 0.3) ** 2 < 1
    base = (z < -0.45) & (depth > 6) & ~small_brain
    image[base], image[fissure] = 1.1, 2.5
    image[small_brain] = 1.15 + 0.2 * np.sin(60 * z + 8 * y)[small_brain]  # its folds
    basal, ventricles = np.zeros(shape, bool), np.zeros(shape, bool)
    larger = rng.uniform(1.1, 1.6)  # the left one
    for side, size in ((1, 1.0), (-1, larger)):
        front, middle = (side * 0.12, 0.45, 0.1), (side * 0.1, 0, 0.22)
        back, horn = (side * 0.3, -0.45, 0.1), (side * 0.22, -0.75, 0.0)
        radius = 0.055 * size * rng.uniform(0.8, 1.3)
        ventricles |= near_curve(x, y, z, (front, middle, back), radius)
        ventricles |= near_curve(x, y, z, (back, horn), 0.7 * radius)
        basal |= near_curve(x, y, z, ((side * 0.28, 0.2, -0.08), (side * 0.3, -0.05, -0.08)), 0.12)
        basal |= near_curve(x, y, z, ((side * 0.1, -0.12, -0.02), (side * 0.14, -0.3, -0.02)), 0.1)
    image[basal], image[ventricles] = 1.25, 2.5
    image[cord] = 1.4
    apart = ndimage.binary_dilation(basal | ventricles | fissure, iterations=2)
    white = (depth > cortex + 1) & ~apart & ~base & ~small_brain & (z > -0.35)
    return ndimage.gaussian_filter(image, 0.5), white, basal


def simulate_head(rng, shape=SHAPE):
    """Return a simulated T2w head (X, Y, Z) int16 and the mask of its white-matter PVS."""
    return train_pvs.simulate_head(rng, shape, DIAMETERS, simulate_tissue)


def rescan(image, label, spacing, rng):
    """Return (image int16, label uint8) as another scanner makes them, with OTHER_SPACING.

    Another T2 weighting, more blur, bias and noise (Rician), another scale of intensity. Labels are
    of the nearest voxel: linear ones above a half lose a third of thin PVS.
    """
    spacing, shape = np.asarray(spacing, float), np.array(image.shape)
    image = image / np.percentile(image, 99.5)
    weighting = rng.uniform(0.7, 0.85) if rng.random() < 0.5 else rng.uniform(1.2, 1.4)
    image = np.maximum(image, 0) ** weighting
    image = ndimage.gaussian_filter(image, rng.uniform(0.2, 0.5) / spacing)  # mm
    new = np.floor(shape * spacing / OTHER_SPACING).astype(int)
    scale = OTHER_SPACING / spacing
    places = np.meshgrid(
        *((np.arange(n) + 0.5) * s - 0.5 for n, s in zip(new, scale, strict=True)), indexing="ij"
    )
    image = ndimage.map_coordinates(image, places, order=3, mode="nearest")
    label = ndimage.map_coordinates(label.astype(np.uint8), places, order=0) > 0
    image *= np.exp(0.2 * train_pvs.smooth_noise(rng, new, min(new) / 3))
    noise = rng.uniform(0.05, 0.1) * np.median(image[label]) if label.any() else 0.02
    image = np.hypot(*(rng.standard_normal((2, *new)) * noise + [image, 0 * image]))
    return (image * rng.uniform(100, 3000)).astype(np.int16), label.astype(np.uint8)


def rescan_cases(cases, folder):
    """Write scans and masks of cases, as of another scanner, to a BIDS folder."""
    for number, case in enumerate(cases):
        print(f"scanning {case.subject} again", flush=True)
        image, label = nib.load(case.image), np.asarray(nib.load(case.label).dataobj) > 0
        rng = np.random.default_rng([8, number])
        volumes = rescan(np.asarray(image.dataobj), label, image.header.get_zooms()[:3], rng)
        train_pvs.write_head(folder, case.subject, volumes, OTHER_SPACING)


def main(argv=None):
    """Make what is asked for; return the status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int, nargs="?", default=0)
    parser.add_argument("--rescan", metavar="DATA_DIR")
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE)
    options = parser.parse_args(argv)
    for number in range(options.count):
        print(f"simulating head {number + 1}", flush=True)
        volumes = simulate_head(np.random.default_rng([7, number]), tuple(options.shape))
        train_pvs.write_head(options.folder, f"sub-{number + 1:03d}", volumes, SPACING)
    if options.rescan:
        rescan_cases(
            train_pvs.find_cases(train_pvs.Config(DATA_DIR=options.rescan)), options.folder
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
