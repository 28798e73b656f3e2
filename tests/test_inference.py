"""Prediction of whole volumes: sliding windows, the way to the scan's own grid, its files."""

import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage, special
from scipy.spatial.transform import Rotation
from torch import nn

import train_pvs
from conftest import prepared_case, save_nifti


class Pointwise(nn.Module):
    """A model without context, so that windows and blending must not show in its output."""

    def __init__(self, weight=10.0, shift=-5.0):
        super().__init__()
        self.weight, self.shift, self.seen = nn.Parameter(torch.tensor(weight)), shift, []

    def forward(self, image):
        self.seen += image[:, 0]
        return self.weight * image + self.shift


def affine_of(codes, spacing, turn=(0, 0, 0)):
    """Return an affine whose axes run to these sides, `spacing` along them, turned by degrees."""
    to_ras = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), (1, 1, 1))
    rotation = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
    matrix = rotation @ to_ras[:3, :3] @ np.diag(spacing)
    return nib.affines.from_matvec(matrix, (-17.3, 8.1, 40.7))


def make_scan(shape):
    """Return a head (400, air 0), and thin bright tubes in it (800), which are the label."""
    axes = [np.linspace(-1, 1, n) for n in shape]
    head = sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")) < 0.8
    label = np.zeros(shape, np.int16)
    x, y, z = (n // 2 for n in shape)
    label[x, y - 2 : y + 3, z] = label[x - 3 : x + 2, y + 1, z - 1] = 1
    label[x + 2, y - 2 : y, z - 2 : z + 3] = label[x - 3, y - 2, z + 1] = 1
    assert head[label > 0].all()
    return (400 * head + 400 * label).astype(np.int16), label


def places_of(shape, affine, other_affine):
    """Return the places (3, ..) in another grid of the voxels of a grid."""
    indices = np.moveaxis(np.indices(shape), 0, -1)
    places = nib.affines.apply_affine(np.linalg.inv(other_affine) @ affine, indices)
    return np.moveaxis(places, -1, 0)


def interpolate(volume, affine, native_affine, native_shape):
    """Return a working-grid volume between its voxels at the native ones, by scipy; 0 outside."""
    places = places_of(native_shape, native_affine, affine)
    return ndimage.map_coordinates(volume, places, order=1, mode="grid-constant", cval=0)


GRIDS = {  # affine, shape, PIX_DIM that is the scan's own spacing along right, front and top
    "RAS": (affine_of("RAS", (1, 1, 1)), (21, 25, 19), (1, 1, 1)),
    "LAS, even": (affine_of("LAS", (0.8, 0.8, 0.8)), (22, 26, 20), (0.8, 0.8, 0.8)),
    # The axes run up, to the back and to the right.
    "SPR, anisotropic": (affine_of("SPR", (0.7, 1, 2)), (31, 25, 17), (2, 1, 0.7)),
    "oblique LIP": (affine_of("LIP", (0.5, 0.9, 1.3), (-9, 14, 5)), (33, 27, 19), (0.5, 1.3, 0.9)),
    "smaller than the patch": (affine_of("PIR", (1, 1, 1)), (11, 13, 9), (1, 1, 1)),
}


@pytest.fixture
def prepare(tmp_path):
    """Return a function that writes a scan and its mask, and returns the case and its entry."""

    def write(affine, image, label, cfg):
        paths = [tmp_path / f"sub-1_{key}.nii.gz" for key in ("T2w", "mask")]
        for path, volume in zip(paths, (image, label), strict=True):
            save_nifti(path, volume, affine)
        case = train_pvs.Case("sub-1", "sub-1", *map(str, paths))
        cfg = train_pvs.replace(cfg, CACHE_DIR=str(tmp_path / "cache"))
        (case,) = train_pvs.prepare_cases([case], cfg)
        return case, train_pvs.load_cached(case)

    return write


@pytest.mark.parametrize("tolerance", [0, 0.3])
@pytest.mark.parametrize("grid", GRIDS)
def test_working_grid_of_the_scans_own_spacing_loses_nothing(grid, tolerance, prepare, tiny_config):
    affine, shape, pix_dim = GRIDS[grid]
    image, label = make_scan(shape)
    # Percentiles 0 and 100 of the head take 400 to 0 and 800 to 1: the logits are -5 and 5.
    cfg = tiny_config(AMP=False, INTENSITY_PERCENTILES=(0, 100), SPACING_TOLERANCE=tolerance)
    cfg = train_pvs.replace(cfg, PIX_DIM=tuple(np.multiply(pix_dim, 1 + 0.9 * tolerance)))
    case, entry = prepare(affine, image, label, cfg)
    assert case.roundtrip_dice == 1.0
    assert train_pvs.working_spacing(pix_dim, cfg) == pytest.approx(pix_dim)
    assert case.native_spacing == pytest.approx(pix_dim)
    assert case.native_voxels == case.working_voxels == label.sum()
    middle = nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)  # the head is symmetric
    np.testing.assert_allclose(train_pvs.middle_of_head(entry), middle, atol=1e-2)
    back = train_pvs.to_native_grid(entry["label"].float(), entry)[0].numpy() > 0.5
    assert np.array_equal(back, label > 0)
    model = Pointwise()
    _, prob = train_pvs.predict_case(model, entry, cfg)
    assert np.array_equal(prob > 0.5, label > 0)
    assert {window.shape for window in model.seen} == {(16, 16, 16)}  # also if it is larger
    # Every native voxel in the box is one of the working grid's, with its value.
    values = 0.1 + torch.rand(entry["label"].shape)
    native = train_pvs.to_native_grid(values, entry)[0].numpy()
    places = places_of(shape, affine, entry["affine"].numpy())[:, native > 0]
    assert places.shape[1] == values.numel()
    np.testing.assert_allclose(places, places.round(), atol=1e-3)
    there = values[0].numpy()[tuple(places.round().astype(int))]
    np.testing.assert_allclose(native[native > 0], there, atol=2e-3)


def test_coarser_grid_costs_what_an_independent_computation_says(prepare, tiny_config):
    for grid in ("RAS", "SPR, anisotropic", "oblique LIP"):
        affine, shape, _ = GRIDS[grid]
        image, label = make_scan(shape)
        for pix_dim in ((1.4, 1.4, 1.4), (1.2, 1.8, 1.4)):
            cfg = tiny_config(PIX_DIM=pix_dim, AMP=False, INTENSITY_PERCENTILES=(0, 100))
            case, entry = prepare(affine, image, label, cfg)
            # There: the native voxel nearest to each working one; half-way it may be either.
            working_affine, mask = entry["affine"].numpy(), entry["label"][0].numpy()
            assert nib.affines.voxel_sizes(working_affine) == pytest.approx(pix_dim)
            assert nib.aff2axcodes(working_affine) == ("R", "A", "S")
            places = places_of(mask.shape, working_affine, affine)
            nearest = ndimage.map_coordinates(label, places, order=0)
            clear = (np.abs(places % 1 - 0.5) > 1e-3).all(0)
            assert nearest[clear].any()
            assert np.array_equal(nearest[clear], mask[clear])
            # In the head (the air is darkened) one scaling is left of what lies between voxels.
            got, tissue = entry["image"][0].float().numpy(), (image > 0).astype(float)
            linear = ndimage.map_coordinates(image.astype(float), places, order=1)
            inner = (ndimage.map_coordinates(tissue, places, order=1) > 0.999) & (got < 1)
            scale, start = np.polyfit(linear[inner], got[inner], 1)
            np.testing.assert_allclose(got[inner], scale * linear[inner] + start, atol=1e-3)
            assert (scale > 0, got.min(), got.max()) == (True, 0, 1)
            # And back: between the working voxels, the probability and not the mask.
            back = interpolate(mask.astype(float), working_affine, affine, shape)
            assert np.abs(back - 0.5).min() > 1e-4  # so that rounding decides nothing
            hits = ((back > 0.5) & (label > 0)).sum()
            dice = 2 * hits / ((back > 0.5).sum() + label.sum())
            assert case.roundtrip_dice == pytest.approx(dice, abs=1e-6)
            assert 0 < case.roundtrip_dice < 1
            working, native = train_pvs.predict_case(Pointwise(), entry, cfg)
            assert (working.dtype, native.dtype) == (np.float32, np.float32)
            expected = special.expit(10 * got - 5)
            np.testing.assert_allclose(working, expected, atol=1e-4)
            expected = interpolate(working, working_affine, affine, shape)
            np.testing.assert_allclose(native, expected, atol=1e-3)


Q = affine_of("LPS", (0.7, 1.1, 1.3), (10, 20, -5))
S = affine_of("LPS", (0.71, 1.1, 1.3), (12, 18, -5))  # the two can be told apart
SCANS = [
    ((None, 0), (S, 2), (5, 6, 7), nib.Nifti1Image, "<", "mm"),
    ((Q, 1), (None, 0), (5, 6, 7, 1), nib.Nifti2Image, ">", "mm"),
    ((Q, 2), (S, 1), (5, 6, 7), nib.Nifti1Image, ">", "micron"),
    ((None, 0), (None, 0), (5, 6, 7, 1), nib.Nifti1Image, "<", "unknown"),
]


def test_written_volume_has_the_geometry_of_the_scans_header_and_nothing_else(tmp_path):
    prob = np.random.default_rng(1).random((5, 6, 7)).astype(np.float32)
    scan_path, path = tmp_path / "scan.nii", tmp_path / "a" / "pred.nii.gz"
    for qform, sform, shape, kind, endianness, units in SCANS:
        scan = kind(np.ones(shape, np.int16), None, kind.header_class(endianness=endianness))
        scan.header.set_zooms([0.7, 1.1, 1.3, 1][: len(shape)])
        scan.header.set_qform(*qform)
        scan.header.set_sform(*sform)
        scan.header.set_xyzt_units(units, "sec")
        scan.header["cal_max"], scan.header["descrip"] = 3000, b"name of a patient"
        content = bytearray(scan.to_bytes())
        if kind is nib.Nifti1Image:  # scl_slope and scl_inter, which nibabel does not set
            content[112:120] = np.array([0.25, 100], f"{endianness}f4").tobytes()
        scan_path.write_bytes(content)
        scan = nib.load(scan_path)
        assert (scan.get_fdata() == (100.25 if kind is nib.Nifti1Image else 1)).all()
        for volume in (prob, (prob > 0.5).astype(np.uint8)):
            train_pvs.write_nifti(path, volume, scan_path)
            written = nib.load(path)
            values = np.asarray(written.dataobj)
            assert (type(written), values.dtype) == (kind, volume.dtype)
            assert np.array_equal(values, volume.reshape(shape))
            assert np.array_equal(written.affine, scan.affine)
            for name in ("qform_code", "sform_code", "xyzt_units", "pixdim"):
                assert np.array_equal(written.header[name], scan.header[name]), name
            for get in ("get_qform", "get_sform"):
                assert np.array_equal(*(getattr(v.header, get)() for v in (written, scan)))
            assert float(written.header["cal_max"]) == 0
            assert b"patient" not in written.header.binaryblock


class Slope(nn.Module):
    """A model that adds to the image's value how far a voxel is along the axes of its window."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, image):
        axes = (torch.linspace(-1, 1, n) for n in image.shape[2:])
        places = torch.meshgrid(*axes, indexing="ij")
        return image + self.factor * sum(k * place for k, place in enumerate(places, 1))


def test_probability_is_the_mean_over_mirrored_views_and_models(tiny_config):
    # One window, in which the voxel at (x, y, z) of -1 to 1 has the logit image + x + 2 y + 3 z,
    # and in the views mirrored along some of FLIP_AXES image +- x +- 2 y +- 3 z.
    image = torch.rand(1, 16, 16, 16)
    plain = tiny_config(AMP=False, FLIP_AXES="xyz", TTA_FLIPS="none")
    flips = train_pvs.replace(plain, TTA_FLIPS="full")
    y_only = train_pvs.replace(flips, FLIP_AXES="y")
    x, y, z = torch.meshgrid(*3 * [torch.linspace(-1, 1, 16)], indexing="ij")
    signs = [(a, b, c) for a in (1, -1) for b in (1, -1) for c in (1, -1)]
    views = [[torch.sigmoid(image + f * (a * x + 2 * b * y + 3 * c * z)) for a, b, c in signs]
             for f in (1, 0.3)]  # fmt: skip
    both = nn.ModuleList([Slope(), Slope(0.3)])
    for model, cfg, expected in (
        (Slope(), plain, views[0][0]),
        (Slope(), flips, sum(views[0]) / 8),
        (Slope(), y_only, (views[0][0] + views[0][2]) / 2),
        (both, plain, (views[0][0] + views[1][0]) / 2),
        (both, flips, sum(views[0] + views[1]) / 16),
    ):
        prob = train_pvs.predict_prob(model, image, cfg)
        torch.testing.assert_close(prob, expected, atol=1e-5, rtol=0)


def ends_of(windows):
    return [(window.flatten()[0].item(), window.flatten()[-1].item()) for window in windows]


def test_every_other_window_is_mirrored_along_the_axes_of_the_training(tiny_config):
    # Voxel (x, y, z) has the value 100 x + z. Of 37 voxels 3 steps of 7, and not 8, 8 and 5, lead
    # to the last window of 16; of 20 a step of 4. Along z the second is mirrored, along x the black
    # fields of a chessboard of both. All come back to where they were.
    image = (100.0 * torch.arange(37)[:, None, None] + torch.arange(20)).repeat(1, 1, 16, 1)
    cfg = tiny_config(AMP=False, FLIP_AXES="xz", TTA_FLIPS="windows", IMG_PATCH_SIZE=(16, 16, 16))
    model, expected = Pointwise(1.0, 0.0), set()
    prob = train_pvs.predict_prob(model, image, cfg)
    torch.testing.assert_close(prob, torch.sigmoid(image))
    for x, turned in ((0, False), (7, True), (14, False), (21, True)):
        for z, back in ((0, False), (4, True)):
            ends = [(x, x + 15)[:: -1 if turned != back else 1], (z, z + 15)[:: -1 if back else 1]]
            expected.add(tuple(100 * a + b for a, b in zip(*ends, strict=True)))
    assert (len(model.seen), set(ends_of(model.seen))) == (8, expected)
    # An axis of one window has no other to mirror: the volume is seen both ways.
    cfg = tiny_config(AMP=False, FLIP_AXES="y", TTA_FLIPS="windows", IMG_PATCH_SIZE=(16, 16, 16))
    model, image = Pointwise(1.0, 0.0), torch.arange(16.0)[:, None].repeat(1, 16, 1, 16)
    torch.testing.assert_close(train_pvs.predict_prob(model, image, cfg), torch.sigmoid(image))
    assert ends_of(model.seen) == [(0, 15), (15, 0)]


def test_validation_and_test_have_their_own_overlaps(tiny_config, tmp_path):
    cfg, ones = tiny_config(AMP=False, SW_OVERLAP=0.75, VAL_OVERLAP=0.0), np.ones((48, 16, 16))
    model, case = Pointwise(), prepared_case(tmp_path / "a.pt", ones, ones)
    train_pvs.validate(model, [case], cfg, 1)
    assert len(model.seen) == 3
    train_pvs.predict_prob(model, torch.ones(1, 48, 16, 16), cfg)
    assert len(model.seen) == 3 + 9


@pytest.mark.parametrize("architecture", train_pvs.NETWORKS)
def test_openvino_gives_the_probabilities_of_torch(tiny_config, architecture):
    image = torch.rand(1, 20, 40, 32, generator=torch.Generator().manual_seed(0))
    cfg = tiny_config(AMP=False, ARCHITECTURE=architecture, ENGINE="openvino")
    model = train_pvs.build_model(cfg)
    expected = train_pvs.predict_prob(model, image, cfg)
    compiled = train_pvs.for_inference(model, cfg)
    assert isinstance(compiled, train_pvs.OpenVINO)
    assert "openvino_telemetry.main" not in sys.modules  # nothing is told to anybody
    got = train_pvs.predict_prob(nn.ModuleList([compiled]), image, cfg)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_mask_is_above_the_threshold_without_components_that_are_too_small(tiny_config):
    # Components of 1, 3 and 8 voxels of 0.5 x 2 x 2 = 2 mm3; the three touch at corners only.
    prob, affine = np.zeros((12, 10, 8), np.float32), np.diag([0.5, -2, 2, 1])
    prob[1, 1, 1] = prob[4, 1, 1] = prob[5, 2, 2] = prob[6, 3, 3] = 0.9
    prob[8:10, 6:8, 4:6] = 0.6
    table = {(0.5, 0): 12, (0.5, 2): 12, (0.5, 2.5): 11, (0.5, 6.0005): 11, (0.5, 6.1): 8}
    table |= {(0.6001, 0): 4, (0.7, 6): 3, (0.7, 100): 0, (0.95, 2): 0}
    for (threshold, smallest), voxels in table.items():
        cfg = tiny_config(THRESHOLD=threshold, SMALLEST_PVS=smallest)
        pred = train_pvs.decide(prob, affine, cfg)
        assert (pred.dtype, pred.sum()) == (bool, voxels), (threshold, smallest)
