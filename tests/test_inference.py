"""Prediction of whole volumes: sliding windows, the way to the scan's own grid, its files."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage, special
from scipy.spatial.transform import Rotation
from torch import nn

import train_pvs
from conftest import save_nifti


class Pointwise(nn.Module):
    """A model without context, so that windows and blending must not show in its output."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0))
        self.seen = []

    def forward(self, image):
        self.seen.append(tuple(image.shape[2:]))
        return self.weight * image - 5


@pytest.mark.parametrize("shape", [(5, 7, 3), (16, 16, 16), (17, 23, 9), (33, 16, 20)])
def test_blended_logits_of_any_shape_are_those_of_the_model(shape, tiny_config):
    model, image = Pointwise(), torch.rand(1, *shape)
    logits = train_pvs.predict_logits(model, image, tiny_config(AMP=False))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, (10 * image - 5)[None], atol=1e-4, rtol=0)
    assert set(model.seen) == {(16, 16, 16)}  # windows of the patch's size, also if it is larger


def test_prediction_of_a_cached_half_precision_volume_is_float32(tiny_config):
    image = torch.rand(1, 9, 9, 9).half()
    logits = train_pvs.predict_logits(Pointwise(), image, tiny_config(AMP=False))
    torch.testing.assert_close(logits, (10 * image.float() - 5)[None], atol=1e-4, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_of_the_images_is_that_of_all_features(dtype, training, monkeypatch, tiny_config):
    """An image of one channel counts as contiguous and channels-last at once: it must be one."""
    monkeypatch.setattr(train_pvs, "autocast_dtype", lambda *_: dtype)
    conv, cpu = nn.Conv3d(1, 8, 3, padding=1), torch.device("cpu")
    with torch.set_grad_enabled(training):
        image = train_pvs.network_input(torch.rand(2, 1, 16, 16, 16), cpu, tiny_config())
        features = conv(image)
    channels_last = dtype == torch.float32 or not training
    assert (features.stride(1) == 1) == channels_last


def test_prediction_puts_the_model_into_evaluation_mode(tiny_config):
    model = train_pvs.build_model(tiny_config()).train()
    image = torch.rand(1, 16, 16, 20)
    first = train_pvs.predict_logits(model, image, tiny_config())
    assert not any(module.training for module in model.modules())
    # Random dropped paths or running statistics that move would change the second one.
    assert torch.equal(first, train_pvs.predict_logits(model, image, tiny_config()))


# ------------------------------------------------------------------------- to the scan's own grid


def affine_of(codes, spacing, turn=(0, 0, 0)):
    """Return an affine whose axes run to these sides, `spacing` along them, turned by degrees."""
    linear = np.diag(spacing).astype(float)
    to_ras = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), (1, 1, 1))
    rotation = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
    return nib.affines.from_matvec(rotation @ to_ras[:3, :3] @ linear, (-17.3, 8.1, 40.7))


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


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def interpolate(volume, affine, native_affine, native_shape):
    """Return a working-grid volume between its voxels at the native ones, by scipy; 0 outside."""
    places = nib.affines.apply_affine(
        np.linalg.inv(affine) @ native_affine, np.moveaxis(np.indices(native_shape), 0, -1)
    )
    return ndimage.map_coordinates(
        volume, np.moveaxis(places, -1, 0), order=1, mode="grid-constant", cval=0
    )


GRIDS = {
    "RAS": (affine_of("RAS", (1, 1, 1)), (21, 25, 19), (1, 1, 1)),
    "LPS": (affine_of("LPS", (1, 1, 1)), (21, 25, 19), (1, 1, 1)),
    "LAS, even": (affine_of("LAS", (0.8, 0.8, 0.8)), (22, 26, 20), (0.8, 0.8, 0.8)),
    # The axes run up, to the back and to the right: along right, front and top 2, 1 and 0.7 mm.
    "SPR, anisotropic": (affine_of("SPR", (0.7, 1, 2)), (31, 25, 17), (2, 1, 0.7)),
    "SPL": (affine_of("SPL", (1.1, 0.9, 0.6)), (19, 23, 27), (0.6, 0.9, 1.1)),
    "oblique": (affine_of("RAS", (1, 1, 1), (12, -7, 20)), (21, 25, 19), (1, 1, 1)),
    "oblique LIP, anisotropic": (
        affine_of("LIP", (0.5, 0.9, 1.3), (-9, 14, 5)), (33, 27, 19), (0.5, 1.3, 0.9)
    ),
    "smaller than the patch": (affine_of("PIR", (1, 1, 1)), (11, 13, 9), (1, 1, 1)),
}  # fmt: skip


@pytest.fixture(params=GRIDS)
def grid(request):
    """(native affine, native shape, PIX_DIM equal to the scan's own spacing)"""
    return GRIDS[request.param]


@pytest.fixture
def case_of(tmp_path):
    """Return a function that writes a scan and its mask and returns their case."""

    def write(affine, image, label, suffix=".nii"):
        paths = [tmp_path / f"sub-1_{key}{suffix}" for key in ("T2w", "mask")]
        for path, volume in zip(paths, (image, label), strict=True):
            save_nifti(path, volume, affine)
        return train_pvs.name_case(paths[0]) | {"label": str(paths[1])}

    return write


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_mask_comes_back_exact_from_a_working_grid_of_the_scans_own_spacing(
    suffix, grid, case_of, tiny_config
):
    affine, shape, pix_dim = grid
    image, label = make_scan(shape)
    case = case_of(affine, image, label, suffix)
    entry = train_pvs.build_cache_entry(case, tiny_config(PIX_DIM=pix_dim))
    assert entry["roundtrip_dice"] == 1.0
    assert entry["native_spacing"] == pytest.approx(pix_dim)
    assert min(entry["label"].shape[1:]) >= 16  # padded to the patch
    back = train_pvs.to_native_grid(entry["label"].float(), entry)[0].numpy() > 0.5
    assert back.shape == shape
    assert np.array_equal(back, label > 0)


def test_probability_comes_back_as_it_was_from_a_working_grid_of_the_scans_own_spacing(
    grid, tiny_config, monkeypatch
):
    # Percentiles 0 and 100 leave noise in [0, 1] as it is; all is head, so nothing is cropped.
    affine, shape, pix_dim = grid
    prob = np.random.default_rng(0).random(shape).astype(np.float32)
    prob.flat[:2] = 0, 1
    cfg = tiny_config(PIX_DIM=pix_dim, INTENSITY_PERCENTILES=(0, 100))
    volume = MetaTensor(torch.from_numpy(prob)[None], torch.from_numpy(affine))
    monkeypatch.setattr(train_pvs, "head_mask", lambda image: np.ones(image.shape, bool))
    entry = train_pvs.to_working_grid({"image": volume}, cfg)
    back = train_pvs.to_native_grid(entry["image"].float(), entry)[0].numpy()
    np.testing.assert_allclose(back, prob, atol=2e-3)  # float16 has steps of 0.0005 below 1


@pytest.mark.parametrize("pix_dim", [(1.4, 1.4, 1.4), (1.2, 1.8, 1.4)])
@pytest.mark.parametrize("name", ["RAS", "SPR, anisotropic", "oblique LIP, anisotropic"])
def test_round_trip_dice_of_a_coarser_grid_is_that_of_an_independent_computation(
    name, pix_dim, case_of, tiny_config
):
    affine, shape, _ = GRIDS[name]
    image, label = make_scan(shape)
    cfg = tiny_config(PIX_DIM=pix_dim)
    entry = train_pvs.build_cache_entry(case_of(affine, image, label), cfg)
    # There: the native voxel nearest to each working one; half-way between two it may be either.
    working_affine = entry["affine"].numpy()
    assert nib.affines.voxel_sizes(working_affine) == pytest.approx(pix_dim)
    places = nib.affines.apply_affine(
        np.linalg.inv(affine) @ working_affine,
        np.moveaxis(np.indices(entry["label"].shape[1:]), 0, -1),
    )
    working = ndimage.map_coordinates(label, np.moveaxis(places, -1, 0), order=0)
    clear = (np.abs(places % 1 - 0.5) > 1e-3).all(-1)
    assert working[clear].any()
    assert np.array_equal(working[clear], entry["label"][0].numpy()[clear])
    back = interpolate(entry["label"][0].numpy().astype(float), working_affine, affine, shape)
    assert np.abs(back - 0.5).min() > 1e-4  # so that rounding decides nothing
    assert entry["roundtrip_dice"] == pytest.approx(dice(back > 0.5, label > 0), abs=1e-6)
    assert 0 < entry["roundtrip_dice"] < 1


@pytest.mark.parametrize("pix_dim", [None, (1.4, 1.4, 1.4)])
def test_native_probability_is_the_working_one_interpolated(grid, pix_dim, case_of, tiny_config):
    affine, shape, own_spacing = grid
    cfg = tiny_config(PIX_DIM=pix_dim or own_spacing, AMP=False)
    entry = train_pvs.build_cache_entry(case_of(affine, *make_scan(shape)), cfg)
    working, native = train_pvs.predict_case(Pointwise(), entry, cfg)
    assert (working.dtype, native.dtype) == (np.float32, np.float32)
    assert (working.shape, native.shape) == (entry["image"].shape[1:], shape)
    image = entry["image"][0].float().numpy()
    np.testing.assert_allclose(working, special.expit(10 * image - 5), atol=1e-4)
    expected = interpolate(working, entry["affine"].numpy(), affine, shape)
    np.testing.assert_allclose(native, expected, atol=1e-3)
    if pix_dim:  # a resampled mask would hold what lies between 0 and 1, but not the extremes' mix
        mask = interpolate((working > 0.5).astype(float), entry["affine"].numpy(), affine, shape)
        assert np.abs(native - mask).max() > 0.1


def test_native_probability_is_0_outside_the_box_of_the_head(tiny_config, tmp_path):
    # The head fills voxels 10 to 19 along each axis, the box two more on either side: 8 to 21,
    # which are 14; the padding to the patch's 16 makes it 7 to 22. A model that is sure of PVS
    # everywhere (logit 5 at least) must not claim the air.
    image = np.zeros((30, 32, 34), np.int16)
    image[10:20, 10:20, 10:20] = 400
    path = save_nifti(tmp_path / "sub-1_T2w.nii", image)
    cfg = tiny_config(AMP=False)
    entry = train_pvs.to_working_grid({"image": train_pvs.read_volume(path)[0]}, cfg)
    model = Pointwise()
    model.forward = lambda image: 10 * image + 5
    working, native = train_pvs.predict_case(model, entry, cfg)
    assert working.shape == (16, 16, 16)
    assert working.min() > 0.99
    inside = np.zeros(image.shape, bool)
    inside[7:23, 7:23, 7:23] = True
    assert native[inside].min() > 0.99
    assert np.abs(native[~inside]).max() < 1e-4


def test_prediction_marks_the_very_voxels_that_are_bright_in_the_scan(grid, case_of, tiny_config):
    # Percentiles 0 and 100 of the head take 400 to 0 and 800 to 1: the logits are -5 and 5.
    affine, shape, pix_dim = grid
    image, label = make_scan(shape)
    cfg = tiny_config(PIX_DIM=pix_dim, AMP=False, INTENSITY_PERCENTILES=(0, 100))
    case = case_of(affine, image, label)
    entry = train_pvs.to_working_grid({"image": train_pvs.read_volume(case["image"])[0]}, cfg)
    _, prob = train_pvs.predict_case(Pointwise(), entry, cfg)
    assert np.array_equal(prob > 0.5, label > 0)


# --------------------------------------------------------------------------------- written volumes


def write_scan(path, shape, qform, sform, kind=nib.Nifti1Image, endianness="<", units="mm"):
    """Write a scan with these (affine or None, code) as its q and sform; return the path."""
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(np.int16)
    scan = kind(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), None, header)
    scan.header.set_zooms([0.7, 1.1, 1.3, 1][: len(shape)])
    scan.header.set_qform(*qform)
    scan.header.set_sform(*sform)
    scan.header.set_xyzt_units(units, "sec")
    path.write_bytes(scan.to_bytes())
    return path


Q = affine_of("LPS", (0.7, 1.1, 1.3), (10, 20, -5))
S = affine_of("LPS", (0.71, 1.1, 1.3), (12, 18, -5))
FORMS = {
    "sform only": ((None, 0), (S, 2)),
    "qform only": ((Q, 1), (None, 0)),
    "both, sform wins": ((Q, 2), (S, 1)),
    "both the same": ((Q, 1), (Q, 1)),
    "none": ((None, 0), (None, 0)),
}


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize(
    ("shape", "kind", "endianness", "units"),
    [
        ((5, 6, 7), nib.Nifti1Image, "<", "mm"),
        ((5, 6, 7), nib.Nifti1Image, ">", "micron"),
        ((5, 6, 7, 1), nib.Nifti1Image, "<", "unknown"),
        ((5, 6, 7), nib.Nifti2Image, "<", "mm"),
        ((5, 6, 7, 1), nib.Nifti2Image, ">", "mm"),
    ],
)
def test_written_prediction_lies_on_the_grid_of_the_scan_by_its_very_header(
    forms, shape, kind, endianness, units, tiny_config, tmp_path
):
    path = write_scan(tmp_path / "sub-1_T2w.nii", shape, *FORMS[forms], kind, endianness, units)
    cfg = tiny_config(OUTPUT_DIR=str(tmp_path), SAVE_PROBABILITIES=True)
    case = train_pvs.name_case(path)
    prob = np.random.default_rng(1).random((5, 6, 7)).astype(np.float32)
    train_pvs.write_prediction(case, prob > 0.5, prob, cfg)
    scan = nib.load(path)
    folder = tmp_path / "predictions" / "sub-1" / "anat"
    assert sorted(p.name for p in folder.iterdir()) == [
        "sub-1_label-PVS_desc-unetpp_mask.nii.gz",
        "sub-1_label-PVS_desc-unetpp_probseg.nii.gz",
    ]
    for suffix, dtype, expected in (
        ("mask", np.uint8, (prob > 0.5).astype(np.uint8)),
        ("probseg", np.float32, prob),
    ):
        written = nib.load(folder / f"sub-1_label-PVS_desc-unetpp_{suffix}.nii.gz")
        assert type(written) is kind
        assert written.shape == shape
        assert written.get_data_dtype() == dtype
        values = np.asarray(written.dataobj)
        assert values.dtype == dtype  # no scaling
        assert np.array_equal(values, expected.reshape(shape))
        assert np.array_equal(written.affine, scan.affine)
        for form in ("qform", "sform"):
            assert int(written.header[f"{form}_code"]) == int(scan.header[f"{form}_code"])
        assert np.array_equal(written.header.get_qform(), scan.header.get_qform())
        assert np.array_equal(written.header.get_sform(), scan.header.get_sform())
        assert written.header.get_zooms() == scan.header.get_zooms()
        assert written.header.get_xyzt_units() == scan.header.get_xyzt_units() == (units, "sec")
    if forms == "both, sform wins":  # the case tells the two apart
        assert not np.allclose(scan.header.get_qform(), scan.header.get_sform(), atol=1e-3)


def test_scaling_and_intent_of_the_scan_are_not_those_of_the_mask(tiny_config, tmp_path):
    path = write_scan(tmp_path / "sub-1_T2w.nii", (5, 6, 7), (Q, 1), (Q, 1))
    content = bytearray(path.read_bytes())
    header = np.frombuffer(content, nib.nifti1.header_dtype, count=1)
    header["scl_slope"], header["scl_inter"], header["cal_max"] = 0.25, 100, 3000
    header["descrip"], header["intent_name"] = b"name of a patient", b"patient"
    path.write_bytes(content)
    assert nib.load(path).get_fdata()[0, 0, 1] == 100.25
    cfg = tiny_config(OUTPUT_DIR=str(tmp_path))
    prob = np.ones((5, 6, 7), np.float32)
    train_pvs.write_prediction(train_pvs.name_case(path), prob > 0.5, prob, cfg)
    written = nib.load(next((tmp_path / "predictions").rglob("*_mask.nii.gz")))
    assert (written.get_fdata() == 1).all()
    assert float(written.header["cal_max"]) == 0
    assert b"patient" not in written.header.binaryblock


@pytest.mark.parametrize(("free", "place"), [(10**6, "cpu"), (10**9, "cuda")])
def test_windows_are_blended_on_the_cpu_where_the_gpu_lacks_room(free, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**10))
    image = torch.zeros(1, 64, 64, 64)
    assert train_pvs.blending_device(image, torch.device("cuda")).type == place
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10**9)  # torch's own, unused
    assert train_pvs.blending_device(image, torch.device("cuda")).type == "cuda"
    assert train_pvs.blending_device(image, torch.device("cpu")).type == "cpu"


def test_windows_come_from_and_go_to_the_device_where_they_are_blended(monkeypatch, tiny_config):
    """The network is elsewhere (as the meta device stands for), so that each must be moved."""
    monkeypatch.setattr(train_pvs, "blending_device", lambda image, device: torch.device("cpu"))
    moved, model = [], nn.Conv3d(1, 1, 1)

    def sliding_window_inference(inputs, size, batch, predictor, **settings):
        moved.append((inputs.device.type, settings["sw_device"].type, settings["device"].type))
        return inputs

    monkeypatch.setattr(train_pvs, "sliding_window_inference", sliding_window_inference)
    train_pvs.predict_logits(model.to("meta"), torch.zeros(1, 8, 8, 8), tiny_config())
    assert moved == [("cpu", "meta", "cpu")]


# -------------------------------------------------------------------- from probabilities to a mask


class Slope(nn.Module):
    """A model that adds to the image's value how far a voxel is along the axes of its window."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, image):
        axes = (torch.linspace(-1, 1, n) for n in image.shape[2:])
        places = torch.meshgrid(*axes, indexing="ij")
        return image + sum(k * place for k, place in enumerate(places, 1))


def test_mirrored_views_are_put_back_and_averaged(tiny_config):
    # One window, in which the voxel at (x, y, z) of -1 to 1 has the logit image + x + 2 y + 3 z,
    # and in the views mirrored along some axes image +- x +- 2 y +- 3 z.
    image = torch.rand(1, 16, 16, 16)
    entry = {"image": image, "affine": torch.eye(4), "native_affine": torch.eye(4)}
    entry["native_shape"] = image.shape[1:]
    plain, cfg = tiny_config(AMP=False), tiny_config(AMP=False, TTA_FLIPS=True)
    x, y, z = torch.meshgrid(*3 * [torch.linspace(-1, 1, 16)], indexing="ij")
    signs = [(a, b, c) for a in (1, -1) for b in (1, -1) for c in (1, -1)]
    expected = sum(torch.sigmoid(image[0] + a * x + 2 * b * y + 3 * c * z) for a, b, c in signs) / 8
    working, native = train_pvs.predict_case(Slope(), entry, cfg)
    np.testing.assert_allclose(working, expected, atol=1e-5)
    np.testing.assert_allclose(native, expected, atol=1e-5)
    working, _ = train_pvs.predict_case(Slope(), entry, plain)
    np.testing.assert_allclose(working, torch.sigmoid(image[0] + x + 2 * y + 3 * z), atol=1e-5)


def three_components():
    """Return probabilities with components of 1, 3 and 8 voxels, the last of 0.6, and an affine.

    A voxel has 0.5 x 2 x 2 = 2 mm3; the three voxels touch at corners only.
    """
    prob = np.zeros((12, 10, 8), np.float32)
    prob[1, 1, 1] = 0.9
    prob[4, 1, 1] = prob[5, 2, 2] = prob[6, 3, 3] = 0.9
    prob[8:10, 6:8, 4:6] = 0.6
    return prob, np.diag([0.5, -2, 2, 1])


@pytest.mark.parametrize(
    ("threshold", "smallest", "voxels"),
    [
        *[(0.5, 0, 12), (0.5, 2, 12), (0.5, 2.5, 11), (0.5, 6, 11), (0.5, 6.1, 8)],
        *[(0.7, 0, 4), (0.7, 6, 3), (0.7, 100, 0), (0.95, 2, 0)],
    ],
)
def test_mask_is_above_the_threshold_without_components_that_are_too_small(
    threshold, smallest, voxels, tiny_config
):
    prob, affine = three_components()
    pred = train_pvs.decide(prob, affine, tiny_config(THRESHOLD=threshold, SMALLEST_PVS=smallest))
    assert (pred.dtype, pred.sum()) == (bool, voxels)


def test_scores_of_the_candidates_are_those_of_the_masks_that_they_make(tiny_config):
    rng = np.random.default_rng(0)
    prob = ndimage.gaussian_filter(rng.random((20, 20, 20)), 1)
    prob = ((prob - prob.min()) / np.ptp(prob)).astype(np.float32)
    label, affine = rng.random(prob.shape) < prob - 0.2, np.diag([1, 1, 1.5, 1])
    dices = train_pvs.score_decisions(prob, label, affine)
    assert dices.shape == (17, 5)
    assert len(np.unique(dices)) > 20
    for i, threshold in enumerate(train_pvs.THRESHOLDS):
        for j, smallest in enumerate(train_pvs.SMALLEST):
            cfg = tiny_config(THRESHOLD=threshold, SMALLEST_PVS=smallest)
            pred = train_pvs.decide(prob, affine, cfg)
            expected = train_pvs.calculate_metrics(pred, label)["dice"]
            assert dices[i, j] == pytest.approx(expected)


def test_first_candidates_are_those_of_the_settings():
    assert (train_pvs.THRESHOLDS[0], train_pvs.SMALLEST[0]) == (0.5, 0)
    assert min(train_pvs.THRESHOLDS) == 0.1
    assert max(train_pvs.THRESHOLDS) == 0.9
