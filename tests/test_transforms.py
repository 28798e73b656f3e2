"""From a scan on its native grid to a volume on the working grid, and on to training patches."""

import itertools
import math
import os
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from monai import transforms as mt
from monai.data import MetaTensor
from scipy import ndimage

import train_pvs
from conftest import save_nifti

KEYS = ("image", "label")


def ball(shape, radius, centre=None):
    """Return where a ball is, as bool; in the middle unless told."""
    centre = (np.array(shape) - 1) / 2 if centre is None else centre
    offsets = [axis - c for axis, c in zip(np.indices(shape), centre, strict=True)]
    return sum(axis**2 for axis in offsets) <= radius**2


def transform(cfg, image, label, affine=None):
    """Run the deterministic transforms on two arrays and return the dict of results."""
    affine = torch.from_numpy(np.eye(4) if affine is None else affine)
    arrays = {"image": image, "label": label}
    return train_pvs.build_transforms(cfg)(
        {
            key: MetaTensor(torch.from_numpy(np.array(array, np.float32))[None], affine)
            for key, array in arrays.items()
        }
    )


# --------------------------------------------------------------------------------------------- head


def test_head_is_found_in_rician_noise():
    rng, head = np.random.default_rng(0), ball((40, 44, 36), 14)
    noise = rng.normal(0, 20, (2, *head.shape))
    found = train_pvs.head_mask(np.hypot(400 * head + noise[0], noise[1])[None])
    assert (found.dtype, found.shape) == (bool, (1, *head.shape))
    assert (found[0] != head).mean() < 0.001


def test_smaller_bright_part_does_not_belong_to_the_head():
    head, coil = ball((40, 40, 40), 12), ball((40, 40, 40), 3, (4, 4, 4))
    found = train_pvs.head_mask((400.0 * head + 2000 * coil)[None])[0]
    assert np.array_equal(found, ndimage.binary_opening(head))


def test_constant_volume_is_all_head():
    assert train_pvs.head_mask(torch.full((1, 9, 8, 7), 5.0)).all()
    assert train_pvs.head_mask(torch.zeros(1, 9, 8, 7)).shape == (1, 9, 8, 7)


def test_percentiles_are_those_of_the_head():
    # In air of 0 a cube of 10 voxels; its layer x has the value 1000 + 100 x. The opening rounds
    # its 12 edges off: layers 0 and 9 keep 8 * 8 = 64 voxels, the others 100 - 4 = 96; in all 896.
    # The 10th percentile is at place 0.1 * 895 = 89.5, in layer 1 (64 to 159): 1100. By symmetry
    # the 90th is in layer 8: 1800. Layer 4 comes to (1400 - 1100) / 700 = 3/7.
    image = torch.zeros(1, 20, 20, 20)
    image[0, 5:15, 5:15, 5:15] = 1000 + 100 * torch.arange(10.0)[:, None, None]
    scaled = train_pvs.scale_intensity(image, (10, 90))[0, :, 10, 10]
    layers = [0, *[n / 7 for n in range(8)], 1]  # 0 and 9 are clipped
    expected = [0] * 5 + layers + [0] * 5
    assert scaled.tolist() == pytest.approx(expected)


def test_constant_volume_is_scaled_without_dividing_by_zero():
    scaled = train_pvs.scale_intensity(torch.full((1, 8, 8, 8), 7.0), (0.5, 99.5))
    assert torch.equal(scaled, torch.zeros(1, 8, 8, 8))


# ------------------------------------------------------------------------------------- working grid


def make_volume(shape=(30, 34, 26)):
    """Return a head with a gradient, and a label without any symmetry."""
    x, y, z = np.indices(shape)
    image = np.where(ball(shape, 12), 300 + 5 * x + 3 * y + 2 * z, 0).astype(np.float32)
    label = np.zeros(shape, np.float32)
    label[10:14, 12:18, 11:19] = label[17:19, 20:22, 10:12] = 1
    return image, label


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.7)])
@pytest.mark.parametrize("codes", ["LPS", "PSR", "IRA"])
def test_result_does_not_depend_on_the_order_of_the_axes_in_the_file(tiny_config, codes, spacing):
    cfg, volumes = tiny_config(PIX_DIM=spacing), make_volume()
    affine = nib.affines.from_matvec(np.eye(3), (-10, -20, 5))
    expected = transform(cfg, *volumes, affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    stored = [nib.Nifti1Image(volume, affine).as_reoriented(turn) for volume in volumes]
    assert "".join(nib.aff2axcodes(stored[0].affine)) == codes
    result = transform(cfg, *(volume.get_fdata() for volume in stored), stored[0].affine)
    for key in KEYS:
        assert result[key].shape == expected[key].shape
        assert torch.allclose(result[key], expected[key], atol=1e-4)
        np.testing.assert_allclose(result[key].affine, expected[key].affine, atol=1e-4)


@pytest.mark.parametrize("native", [(1, 1, 1), (0.8, 1.2, 2.0)])
def test_result_is_in_range_and_spaced_as_asked(tiny_config, native):
    cfg = tiny_config(PIX_DIM=(1.5, 1.0, 1.2))
    result = transform(cfg, *make_volume(), np.diag([*native, 1]))
    assert result["image"].shape == result["label"].shape
    assert (result["image"].min(), result["image"].max()) == (0, 1)
    assert result["label"].unique().tolist() == [0, 1]
    for key in KEYS:
        affine = result[key].affine.numpy()
        assert nib.aff2axcodes(affine) == ("R", "A", "S")
        np.testing.assert_allclose(nib.affines.voxel_sizes(affine), cfg.PIX_DIM)


def test_voxels_lie_where_the_affine_of_the_result_says(tiny_config):
    # A flipped, permuted grid of odd spacing, and a scan that is linear in the place in mm: linear
    # interpolation gives that line again, as long as a voxel's neighbours are in the head.
    affine = np.array([[0, -1.3, 0, 20], [0, 0, 0.9, -5], [1.1, 0, 0, 3], [0, 0, 0, 1.0]])
    shape, slope = (34, 30, 36), np.array([3, -2, 1])
    head = ball(shape, 13)
    places = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    cfg = tiny_config(INTENSITY_PERCENTILES=(0, 100))
    result = transform(cfg, np.where(head, 500 + places @ slope, 0), head, affine)
    image, label = (result[key][0].numpy() for key in KEYS)
    inner = np.argwhere(ndimage.binary_erosion(label > 0, iterations=3))
    assert len(inner) > 1000
    values = nib.affines.apply_affine(result["image"].affine.numpy(), inner) @ slope
    got = image[tuple(inner.T)]
    scale, start = np.polyfit(values, got, 1)  # what is left of the intensity is one scaling
    np.testing.assert_allclose(got, scale * values + start, atol=1e-3)
    assert scale > 0


def test_thicker_slices_are_resampled_to_the_working_grid(tiny_config):
    # 20 slices of 2 mm are 40 mm; nothing is cropped off a volume that is all head.
    result = transform(
        tiny_config(), np.ones((24, 22, 20)), np.ones((24, 22, 20)), np.diag([1, 1, 2, 1])
    )
    assert result["image"].shape[1:3] == (24, 22)
    assert abs(result["image"].shape[3] - 40) <= 1


def test_air_is_cropped_to_two_voxels_around_the_head(tiny_config):
    # The ball has a diameter of 2 * 8 + 1 voxels; two more on either side make 21.
    head = ball((41, 45, 43), 8)
    result = transform(tiny_config(), 500 * head, head)
    assert result["image"].shape == result["label"].shape == (1, 21, 21, 21)
    assert result["label"].sum() == head.sum()


def test_volume_smaller_than_the_patch_is_padded_to_it(tiny_config):
    # The head is cropped to 21 voxels, as above.
    head, inner = ball((41, 41, 41), 8), ball((41, 41, 41), 4)
    cfg = tiny_config(IMG_PATCH_SIZE=(16, 24, 32))
    result = transform(cfg, 500 * head + 300 * inner, inner)
    assert result["image"].shape == result["label"].shape == (1, 21, 24, 32)
    assert result["label"].sum() == inner.sum()
    assert torch.equal(result["image"] > 0.5, result["label"] > 0)


def test_label_may_be_missing(tiny_config):
    image, label = make_volume()
    expected = transform(tiny_config(), image, label)["image"]
    item = {"image": MetaTensor(torch.from_numpy(image)[None], torch.eye(4))}
    assert torch.equal(train_pvs.build_transforms(tiny_config())(item)["image"], expected)


# -------------------------------------------------------------------------------- training patches


@pytest.fixture
def prepared(data, tiny_config, tmp_path):
    """Return four cached cases, and a function that gives the Config with overrides."""

    def make(**overrides):
        return tiny_config(DATA_DIR=str(data), OUTPUT_DIR=str(tmp_path / "out"), **overrides)

    return train_pvs.prepare_cases(train_pvs.find_cases(make()), make()), make


def patches_of(monkeypatch, cfg, image, label):
    """Return the dataset of a single case whose volume on the working grid is at hand."""
    flat = torch.as_tensor(label).flatten()
    entry = {
        "image": torch.as_tensor(image, dtype=torch.float16)[None],
        "label": torch.as_tensor(label, dtype=torch.uint8)[None],
        "foreground": flat.nonzero().flatten().to(torch.int32),
        "background": (flat == 0).nonzero().flatten().to(torch.int32),
    }
    monkeypatch.setattr(train_pvs, "load_cached", lambda *_: entry)
    return train_pvs.TrainingPatches([{"name": "sub-001"}], cfg)


def force(dataset, *kinds):
    """Let the random transforms of these kinds happen every time, and the others never."""
    for step in dataset.transforms.transforms:
        if hasattr(step, "prob"):
            step.prob = float(isinstance(step, kinds))


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_patches_are_plain_float32_of_the_patch_size(prepared):
    cases, make = prepared
    cfg = make(IMG_PATCH_SIZE=(8, 16, 24), CROPS_PER_VOLUME=3)
    dataset = train_pvs.TrainingPatches(train_pvs.prepare_cases(cases, cfg), cfg)
    for epoch in range(5):
        patches = dataset[epoch, 1]
        assert [patch["name"] for patch in patches] == ["sub-002"] * 3
        for patch in patches:
            for key in KEYS:
                assert type(patch[key]) is torch.Tensor
                assert (patch[key].dtype, patch[key].shape) == (torch.float32, (1, 8, 16, 24))
            assert set(patch["label"].unique().tolist()) <= {0, 1}


def test_patches_are_a_function_of_epoch_and_number(prepared):
    cases, make = prepared
    keys = [(epoch, number) for epoch in range(4) for number in range(4)]

    def draw(keys):
        dataset = train_pvs.TrainingPatches(cases, make())
        return {key: [patch["image"] for patch in dataset[key]] for key in keys}

    one, two = draw(keys), draw(reversed(keys))  # in another order: nothing is left of the former
    assert all(torch.equal(a, b) for key in keys for a, b in zip(one[key], two[key], strict=True))
    assert not any(torch.equal(one[0, number][0], one[1, number][0]) for number in range(4))
    assert not torch.equal(*one[0, 0])  # the crops of one volume


def test_patches_differ_with_the_seed(monkeypatch, tiny_config):
    image = np.random.default_rng(0).random((24, 24, 24))
    one, two = (
        patches_of(monkeypatch, tiny_config(SEED=seed), image, image > 0.5)[1, 0][0]["image"]
        for seed in (1, 2)
    )
    assert not torch.equal(one, two)


def test_batches_are_the_same_with_and_without_workers(prepared):
    cases, make = prepared

    def draw(workers):
        cfg = make(BATCH_SIZE=3, NUM_WORKERS=workers)
        loader = train_pvs.build_train_loader(cases, cfg, torch.device("cpu"))
        batches = []
        for loader.epoch in (1, 2, 2, 1):  # the last two are begun anew
            batches += list(loader)
        return batches

    one, two = draw(0), draw(2)
    assert [len(batch["name"]) for batch in one] == 4 * [6, 2]  # 3 and 1 volumes of 2 patches
    for first, again in ((0, 6), (1, 7), (2, 4), (3, 5)):
        assert torch.equal(one[first]["image"], one[again]["image"])
    assert not torch.equal(one[0]["image"], one[2]["image"])
    for a, b in zip(one, two, strict=True):
        assert a["name"] == b["name"]
        for key in KEYS:
            assert type(a[key]) is type(b[key]) is torch.Tensor
            assert a[key].shape == (len(a["name"]), 1, 16, 16, 16)
            assert torch.equal(a[key], b[key])


def test_epoch_takes_every_case_once_in_its_own_order():
    sampler, orders = train_pvs.EpochSampler(20, train_pvs.Config(SEED=1, BATCH_SIZE=8)), []
    for sampler.epoch, count in ((1, 2), (2, 1)):
        batches = iter(sampler)
        for epoch in range(sampler.epoch, sampler.epoch + count):
            drawn = list(itertools.islice(batches, len(sampler)))
            assert [len(batch) for batch in drawn] == [8, 8, 4]  # none has cases of two epochs
            epochs, numbers = zip(*itertools.chain(*drawn), strict=True)
            assert set(epochs) == {epoch}
            assert sorted(numbers) == list(range(20))
            orders.append(numbers)
    assert orders[0] != orders[1] == orders[2]


def test_worker_goes_on_with_the_next_epoch_while_nobody_waits(prepared, monkeypatch, tmp_path):
    cases, make = prepared
    real = train_pvs.TrainingPatches.__getitem__

    def get(dataset, key):
        (tmp_path / f"epoch-{key[0]}-of-{os.getpid()}").touch()
        return real(dataset, key)

    monkeypatch.setattr(train_pvs.TrainingPatches, "__getitem__", get)
    cfg = make(BATCH_SIZE=1, NUM_WORKERS=1)
    loader = train_pvs.build_train_loader(cases, cfg, torch.device("cpu"))
    assert len(list(loader)) == len(loader) == len(cases)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("epoch-2-*")):
        time.sleep(0.1)
        assert time.monotonic() < end
    loader.epoch = 2
    second = [batch["image"] for batch in loader]
    workers = {path.name.split("-")[-1] for path in tmp_path.glob("epoch-*")}
    assert len(workers) == 1  # none was begun anew
    loader.epoch = 1
    next(iter(loader))
    loader.epoch = 2  # what was broken off has no part in it
    assert all(
        torch.equal(batch["image"], image) for batch, image in zip(loader, second, strict=True)
    )


@pytest.mark.parametrize("ratio", [0, 0.5, 2])
def test_share_of_patches_centred_on_pvs_follows_the_ratio(monkeypatch, tiny_config, ratio):
    # The label is far enough from the borders for a patch to be centred on each of its voxels, and
    # those patches that are moved inwards are not centred on it. 600 draws of share 2/3 or 1/3
    # have a standard deviation of sqrt(2/9 / 600) = 0.02.
    label = ball((32, 32, 32), 3)
    cfg = tiny_config(POS_NEG_RATIO=float(ratio), CROPS_PER_VOLUME=600)
    dataset = patches_of(monkeypatch, cfg, label, label)
    dataset.transforms = mt.Compose(dataset.transforms.transforms[:1])
    share = np.mean([patch["label"][0, 8, 8, 8].item() for patch in dataset[1, 0]])
    assert share == pytest.approx(ratio / (1 + ratio), abs=0.06)


def test_volume_without_pvs_on_the_working_grid_gives_patches(monkeypatch, tiny_config):
    dataset = patches_of(monkeypatch, tiny_config(), np.ones((20, 20, 20)), np.zeros((20, 20, 20)))
    with pytest.warns(UserWarning, match="unable to generate class balanced samples"):
        patches = dataset[1, 0]
    assert [patch["label"].sum().item() for patch in patches] == [0, 0]


# ------------------------------------------------------------------------------------- augmentation


def test_augmentation_keeps_image_and_label_aligned(monkeypatch, tiny_config):
    label = ball((40, 40, 40), 5, (12, 15, 20)) | ball((40, 40, 40), 6, (26, 25, 18))
    cfg = tiny_config(IMG_PATCH_SIZE=(32, 32, 32), CROPS_PER_VOLUME=4)
    dataset = patches_of(monkeypatch, cfg, label, label)
    force(dataset, object)  # all of them
    patches = [patch for epoch in range(4) for patch in dataset[epoch, 0]]
    scores = [dice(p["image"] > 0.5, p["label"] > 0) for p in patches if p["label"].sum() > 200]
    assert len(scores) >= 8
    assert min(scores) > 0.8


@pytest.mark.parametrize("kind", [mt.RandAffined, mt.RandSmoothDeformd])
def test_each_spatial_transform_moves_the_label_with_the_image(monkeypatch, tiny_config, kind):
    # Of a volume of the patch's size the label is the same in every patch but for the transform.
    label = np.broadcast_to(np.arange(64)[:, None, None] // 4 % 2 == 1, (64, 64, 64)).copy()
    cfg = tiny_config(IMG_PATCH_SIZE=(64, 64, 64))
    dataset = patches_of(monkeypatch, cfg, label, label)
    force(dataset, kind)
    for patch in dataset[1, 0]:
        moved = patch["label"] > 0
        assert dice(moved, torch.from_numpy(label)[None]) < 0.98 < dice(patch["image"] > 0.5, moved)


def test_rotation_tilts_a_rod_by_15_degrees_an_axis_at_most(monkeypatch, tiny_config):
    # Two turns by 15 degrees, each about an axis across the rod: acos(cos(15)**2) = 21 degrees.
    label = np.zeros((32, 32, 32))
    label[15:17, 15:17, 3:29] = 1
    dataset = patches_of(monkeypatch, tiny_config(IMG_PATCH_SIZE=(32, 32, 32)), label, label)
    force(dataset, mt.RandAffined)
    tilts = []
    for patch in (patch for epoch in range(15) for patch in dataset[epoch, 0]):
        axis = np.linalg.svd(np.cov(patch["label"][0].nonzero().T.numpy()))[0][:, 0]
        tilts.append(math.degrees(math.acos(min(1, abs(axis[2])))))
    assert 10 < max(tilts) < 21 + 1
    assert min(tilts) < 10


def test_elastic_shifts_are_at_most_two_percent_of_the_patch(monkeypatch, tiny_config):
    # The image rises by 1/31 a voxel, so a shift of 2 % of 32 voxels changes it by 0.64 / 31.
    ramp = np.broadcast_to(np.linspace(0, 1, 32)[:, None, None], (32, 32, 32))
    dataset = patches_of(
        monkeypatch, tiny_config(IMG_PATCH_SIZE=(32, 32, 32)), ramp.copy(), ramp > 0.5
    )
    force(dataset, mt.RandSmoothDeformd)
    changes = [
        (patch["image"][0].numpy() - ramp.astype(np.float16))[1:-1]
        for epoch in range(5)
        for patch in dataset[epoch, 0]
    ]
    assert 0.2 / 31 < np.abs(changes).max() <= 0.65 / 31
    assert abs(np.mean(changes)) < 0.1 / 31  # nothing is shifted as a whole


def test_contrast_and_noise_leave_the_label_alone(monkeypatch, tiny_config):
    image = torch.rand(16, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    dataset = patches_of(monkeypatch, tiny_config(), image, image > 0.9)
    force(dataset)
    plain = dataset[1, 0][0]
    force(dataset, mt.RandAdjustContrastd, mt.RandGaussianNoised)
    changed = dataset[1, 0][0]
    assert torch.equal(plain["image"][0], image.float())
    assert torch.equal(plain["label"], changed["label"])
    assert 0.01 < (plain["image"] - changed["image"]).abs().mean() < 0.2


def test_case_is_augmented_as_often_as_the_probabilities_say(monkeypatch, tiny_config):
    # The patch is the whole volume: only augmentation changes it. None of the four happens with
    # 0.7 * 0.8 * 0.7 * 0.8 = 0.31; over 200 patches the standard deviation is 0.033.
    image = torch.rand(16, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    dataset = patches_of(monkeypatch, tiny_config(CROPS_PER_VOLUME=200), image, image > 0.9)
    same = np.mean([torch.equal(patch["image"][0], image.float()) for patch in dataset[1, 0]])
    assert same == pytest.approx(0.31, abs=0.1)


@pytest.mark.parametrize(("shift", "least", "most"), [(0.0, 8, 8), (0.25, 4, 12)])
def test_crops_are_off_their_pvs_voxel_by_at_most_the_shift(
    shift, least, most, monkeypatch, tiny_config
):
    # One labelled voxel in the middle of 64^3, patches of 16^3: without a shift it is in their
    # middle, the ninth voxel, with one of 0.25 up to 4 voxels from there along each axis.
    label = np.zeros((64, 64, 64), np.float32)
    label[32, 32, 32] = 1
    cfg = tiny_config(CROP_SHIFT=shift, POS_NEG_RATIO=1000.0, CROPS_PER_VOLUME=1)
    dataset = patches_of(monkeypatch, cfg, np.zeros_like(label), label)
    force(dataset)
    patches = [dataset[epoch, 0][0]["label"][0] for epoch in range(60)]
    places = np.array([patch.nonzero()[0].tolist() for patch in patches if patch.any()])
    assert len(places) > 55
    assert (places.min(), places.max()) == (least, most)
    assert len(np.unique(places[:, 0])) == most - least + 1


# ------------------------------------------------------------------------------------- soft labels


def occupancy(label, affine, working_affine, shape):
    label = MetaTensor(torch.from_numpy(label)[None].float(), torch.from_numpy(affine))
    return train_pvs.occupancy(label, torch.from_numpy(working_affine), shape)


def test_soft_label_is_the_part_of_the_voxel_that_is_labelled():
    # Voxels of 1 mm in blocks of 2 x 2 x 2: the samples of a 2 mm voxel are the 1 mm voxels.
    label = np.random.default_rng(0).random((8, 10, 12)) < 0.3
    working = nib.affines.from_matvec(2 * np.eye(3), 3 * [0.5])
    soft = occupancy(label, np.eye(4), working, (4, 5, 6))
    expected = label.reshape(4, 2, 5, 2, 6, 2).mean((1, 3, 5))
    assert soft.dtype == torch.float16
    np.testing.assert_allclose(soft[0].float(), expected, atol=1e-3)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR"])
def test_soft_label_keeps_the_volume_of_thin_pvs_in_any_orientation(codes, tiny_config):
    to_ras = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), (1, 1, 1))
    affine = to_ras @ np.diag([0.8, 0.8, 0.8, 1])
    head, label = 400.0 * ball((50, 46, 44), 18), np.zeros((50, 46, 44))
    for x, y in ((20, 18), (25, 25), (29, 22), (22, 28)):
        label[x, y, 15:30] = 1
    volumes = {
        key: MetaTensor(torch.from_numpy(np.float32(array))[None], torch.from_numpy(affine))
        for key, array in {"image": head + 200 * label, "label": label}.items()
    }
    cfg = tiny_config(PIX_DIM=(1.5, 1.5, 1.5), LABEL_RESAMPLING="soft")
    entry = train_pvs.to_working_grid(volumes, cfg)
    soft = entry["soft_label"]
    assert soft.shape == entry["label"].shape
    volume = float(soft.sum()) * 1.5**3
    assert volume == pytest.approx(label.sum() * 0.8**3, rel=0.03)
    assert "soft_label" not in train_pvs.to_working_grid(volumes, tiny_config())


def test_training_sees_the_soft_label_and_scores_the_other(data, tiny_config, tmp_path):
    settings = {"DATA_DIR": str(data), "OUTPUT_DIR": str(tmp_path), "PIX_DIM": (1.5, 1.5, 1.5)}
    cfg = tiny_config(LABEL_RESAMPLING="soft", **settings)
    cases = train_pvs.prepare_cases(train_pvs.find_cases(cfg), cfg)
    values = torch.cat([p["label"].flatten() for p in train_pvs.TrainingPatches(cases, cfg)[1, 0]])
    assert ((values > 0.05) & (values < 0.95)).any()
    assert 0 <= values.min() < values.max() <= 1
    nearest = train_pvs.prepare_cases(train_pvs.find_cases(cfg), tiny_config(**settings))
    assert nearest[0]["cache"] != cases[0]["cache"]
    labels = [train_pvs.load_cached(case[0])["label"] for case in (cases, nearest)]
    assert torch.equal(*labels)


def test_soft_label_of_a_grid_that_is_the_scans_own_is_the_label(tmp_path, tiny_config):
    # A NIfTI header holds float32: sides of 0.8 mm are a hair longer there.
    label = np.random.default_rng(0).random((24, 22, 20)) < 0.1
    image = np.where(ball(label.shape, 9), 400, 0) + 200 * label
    affine, volumes = np.diag([0.8, 0.8, 0.8, 1]), {}
    for key, array in {"image": image, "label": label}.items():
        path = save_nifti(tmp_path / f"{key}.nii", array.astype(np.int16), affine)
        volumes[key] = train_pvs.read_volume(path)[0]
    assert nib.load(path).affine[0, 0] > 0.8
    cfg = tiny_config(PIX_DIM=(0.8, 0.8, 0.8), LABEL_RESAMPLING="soft")
    entry = train_pvs.to_working_grid(volumes, cfg)
    np.testing.assert_allclose(entry["soft_label"].float(), entry["label"].float(), atol=2e-3)
