"""From a scan on its native grid to a volume on the working grid, and on to training patches."""

import numpy as np
import pytest
import torch
from monai import transforms as mt
from monai.data import MetaTensor
from scipy import ndimage
from scipy.spatial.transform import Rotation

import train_pvs
from conftest import prepared_case

KEYS = ("image", "label")


def ball(shape, radius, centre=None):
    """Return where a ball is, as bool; in the middle unless told."""
    centre = (np.array(shape) - 1) / 2 if centre is None else centre
    offsets = [axis - c for axis, c in zip(np.indices(shape), centre, strict=True)]
    return sum(axis**2 for axis in offsets) <= radius**2


def test_head_is_found_in_rician_noise_and_without_smaller_bright_parts():
    rng, head = np.random.default_rng(0), ball((40, 44, 36), 14)
    noise = rng.normal(0, 20, (2, *head.shape))
    found = train_pvs.head_mask(np.hypot(400 * head + noise[0], noise[1])[None])
    assert (found.dtype, found.shape) == (bool, (1, *head.shape))
    assert (found[0] != head).mean() < 0.001
    coil = ball(head.shape, 3, (4, 4, 4))
    found = train_pvs.head_mask((400.0 * head + 2000 * coil)[None])[0]
    assert np.array_equal(found, ndimage.binary_opening(head))
    assert train_pvs.head_mask(torch.full((1, 9, 8, 7), 7.0)).all()  # nothing stands out


def test_percentiles_are_those_of_the_head():
    # In air of 0 a cube of 10 voxels; its layer x has the value 1000 + 100 x. The opening rounds
    # its 12 edges off: layers 0 and 9 keep 8 * 8 = 64 voxels, the others 100 - 4 = 96; in all 896.
    # The 10th percentile is at place 0.1 * 895 = 89.5, in layer 1 (64 to 159): 1100. By symmetry
    # the 90th is in layer 8: 1800. Layer 4 comes to (1400 - 1100) / 700 = 3/7.
    image = torch.zeros(1, 20, 20, 20)
    image[0, 5:15, 5:15, 5:15] = 1000 + 100 * torch.arange(10.0)[:, None, None]
    scaled = train_pvs.scale_intensity(image, (10, 90))[0, :, 10, 10]
    layers = [0, *[n / 7 for n in range(8)], 1]  # 0 and 9 are clipped
    assert scaled.tolist() == pytest.approx([0] * 5 + layers + [0] * 5)
    constant = torch.full((1, 9, 8, 7), 7.0)  # is not divided by 0
    assert torch.equal(train_pvs.scale_intensity(constant, (0.5, 99.5)), 0 * constant)


@pytest.fixture
def loader_of(tiny_config, tmp_path):
    """Return a function that gives the loader of a case with these volumes, and its settings."""

    def make(image, label, **settings):
        case = prepared_case(tmp_path / "prepared.pt", image, label)
        return train_pvs.build_train_loader([case], tiny_config(**settings), torch.device("cpu"))

    return make


def draw(loader, *epochs):
    """Return the batches of these epochs."""
    return [batch for loader.batch_sampler.epoch in epochs for batch in loader]


def draw_forced(loader, *kinds):
    """Return a batch; random transforms of these kinds happen every time, the others never."""
    for step in loader.dataset.transforms.transforms:
        if hasattr(step, "prob"):
            step.prob = float(isinstance(step, kinds))
    (batch,) = draw(loader, 1)
    return batch


def same(one, two):
    """Return whether two batches are equal to the bit."""
    return one["name"] == two["name"] and all(torch.equal(one[key], two[key]) for key in KEYS)


def test_neck_is_left_out_so_far_below_the_top_as_is_asked_for(tiny_config):
    image = np.zeros((40, 40, 110))
    image[14:26, 14:26, :60] = image[5:35, 5:35, 50:100] = image[20:22, 20:22, 95:107] = 400
    # What sticks out is cut off by the opening, but for section 100. The top is 99 all the same, as
    # its section is large: 120 mm below it are 40 to 99, and there are two voxels on both sides.
    for depth, expected in ((120, range(38, 103)), (0, range(103))):
        cfg = tiny_config(PIX_DIM=(2, 2, 2), HEAD_DEPTH=depth)
        for array, side in ((image, 2), (image[:, :, ::-1], -2)):
            volume = MetaTensor(torch.tensor(array.copy())[None], np.diag([2.0, 2, side, 1]))
            kept = train_pvs.build_transforms(cfg)({"image": volume, "label": volume})["label"]
            places = np.argwhere(kept[0].numpy()) @ kept.affine.numpy()[:3, :3].T
            heights = {*(places[:, 2] + kept.affine.numpy()[2, 3])}
            first = 0 if side > 0 else -2 * 109
            assert heights == {first + 2.0 * section for section in expected}


def test_batches_are_a_function_of_seed_and_epoch_with_any_workers(data, tiny_config, tmp_path):
    settings = {"DATA_DIR": str(data), "OUTPUT_DIR": str(tmp_path), "IMG_PATCH_SIZE": (8, 16, 24)}
    cfg = tiny_config(**settings, BATCH_SIZE=3)
    cases, device = train_pvs.prepare_cases(train_pvs.find_cases(cfg), cfg), torch.device("cpu")

    def batches(epochs, **changed):
        loader = train_pvs.build_train_loader(cases, train_pvs.replace(cfg, **changed), device)
        return draw(loader, *epochs)

    one = batches((1, 2, 1))
    assert [len(batch["name"]) for batch in one] == 3 * [6, 2]  # 3 and 1 volumes of 2 patches
    for first, second in (one[:2], one[2:4]):  # every case once, each patch beside its name
        named = sorted([*first["name"], *second["name"]])
        assert named == sorted(2 * [f"sub-00{n}" for n in (1, 2, 3, 4)])
    for batch in one:
        for key in KEYS:
            assert (type(batch[key]), batch[key].dtype) == (torch.Tensor, torch.float32)
            assert batch[key].shape == (len(batch["name"]), 1, 8, 16, 24)
        assert set(batch["label"].unique().tolist()) <= {0, 1}
    assert not torch.equal(*one[0]["image"][:2])  # the crops of one volume
    assert one[0]["name"] + one[1]["name"] != one[2]["name"] + one[3]["name"]
    sums = [{p.sum().item() for b in pair for p in b["image"]} for pair in (one[:2], one[2:4])]
    assert sums[0].isdisjoint(sums[1])  # other patches in each epoch
    assert same(one[0], one[4])
    assert not same(one[0], one[2])
    assert same(batches((2,))[0], one[2])  # nothing is left of former epochs
    assert not same(batches((1,), SEED=5)[0], one[0])
    assert all(map(same, one, batches((1, 2, 1), NUM_WORKERS=2)))
    # A function of one's own may take its numbers from numpy.
    dataset = train_pvs.build_train_loader(cases, cfg, device).dataset
    dataset.transforms.transforms += (mt.Lambdad("image", lambda i: i * np.random.random()),)
    one, again = (dataset[1, 0] for _ in range(2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, again, strict=True))


def test_volumes_smaller_than_the_patch_are_padded_and_their_centres_found_again(loader_of):
    # The volume is smaller along two axes: 32 - 13 = 19 and 16 - 7 = 9 voxels are missing, of
    # which MONAI puts the smaller half, 9 and 4, before. Along the axis of 40 voxels the patch is
    # centred, on its ninth voxel, on one of the three that are labelled. Padding is no image.
    label = np.zeros((13, 40, 7))
    label[4, [12, 20, 28], 2] = 1
    settings = {"IMG_PATCH_SIZE": (32, 16, 16), "CROPS_PER_VOLUME": 30, "POS_NEG_RATIO": 1000.0}
    image = 0.25 + np.arange(40)[:, None] / 100 + label
    batch, seen = draw_forced(loader_of(image, label, **settings)), set()
    for patch, mask in zip(batch["image"][:, 0], batch["label"][:, 0], strict=True):
        assert mask[9 + 4, 8, 4 + 2] == 1
        assert torch.equal(mask, (patch > 1).float())
        assert torch.equal(patch[9:22, :, 4:11] > 0, torch.ones(13, 16, 7, dtype=bool))
        assert patch.count_nonzero() == 13 * 16 * 7
        seen.add(round(patch[9, 8, 4].item(), 2))
    assert seen == {0.37, 0.45, 0.53}  # 0.25 + 0.12, 0.20, 0.28: all three are centres
    batch = draw_forced(loader_of(image, label, **settings | {"POS_NEG_RATIO": 0.0}))
    assert batch["label"][:, 0, 9 + 4, 8, 4 + 2].mean() < 0.3  # 3 of 40 by chance


def test_turned_patches_are_interpolated_out_of_the_volume_with_nothing_smeared(loader_of):
    """scipy's affine_transform is the independent computation; beyond the volume there is 0."""
    volume = ndimage.gaussian_filter(np.random.default_rng(0).random((24, 30, 27)), 1)
    volume = (volume > np.median(volume)) * 0.5 + 0.25 * volume
    volume, size = volume.astype(np.float16).astype(np.float32), (16, 8, 16)
    loader = loader_of(volume, volume > 0.5, IMG_PATCH_SIZE=size, AUGMENTATION="native")
    entry = train_pvs.load_cached(loader.dataset.cases[0])
    cut, volumes = loader.dataset.transforms.transforms[0].cut, [entry[key] for key in KEYS]
    turn = Rotation.from_euler("xyz", (20, -30, 10), degrees=True).as_matrix() / 0.8
    for centre in ((12, 15, 13), (2, 28, 3), (23, 0, 26)):
        middle = np.array(centre)
        for matrix in (None, turn):
            image, label = (patch[0].numpy() for patch in cut(volumes, middle, matrix))
            whole = np.eye(3) if matrix is None else matrix
            how = {"offset": middle - whole @ (np.array(size) // 2), "output_shape": size}
            how |= {"order": 1, "mode": "grid-constant"}
            expected = ndimage.affine_transform(volume, whole, **how)
            np.testing.assert_allclose(image, expected, atol=2e-5)
            nearest = how | {"order": 0, "output": np.float32}
            mask = ndimage.affine_transform(np.float32(volume > 0.5), whole, **nearest)
            assert (label != mask).mean() < 0.002  # places halfway between voxels
            assert set(np.unique(label)) == {0, 1}


def test_native_patches_are_mirrored_turned_in_mm_and_centred_in_the_head(loader_of, tiny_config):
    # Half of the volume is air. A patch's middle voxel is its centre, but of mirrored ones (8 of 16
    # voxels lie before it), where it is the one before.
    image, label = np.zeros((40, 40, 40)), np.zeros((40, 40, 40))
    image[:20] = 0.5 + np.arange(20)[:, None, None] / 100
    label[10, 20, 20] = 1
    settings = {"AUGMENTATION": "native", "CROPS_PER_VOLUME": 300, "IMG_PATCH_SIZE": (16, 16, 16)}
    loader = loader_of(image, label, **settings, POS_NEG_RATIO=0.5, FLIP_AXES="xz")
    loader.dataset.transforms.transforms[0].draw_matrix = lambda spacing: None
    batch = draw_forced(loader, mt.RandFlipd)
    assert (batch["image"][:, 0, 7] > 0).all()  # centred in the head, and none reaches beyond
    assert batch["label"][:, 0, 7, 8, 7].mean().item() == pytest.approx(1 / 3, abs=0.09)
    rising = torch.diff(batch["image"][:, 0, 7:10, 8, 7], dim=1)
    assert (rising < 0).any(1).all()  # all mirrored along x
    # 300 draws of 0.2 and 0.2; a voxel of 1 x 1 x 3 mm: turned by mm, lengths in mm are kept.
    cutter = train_pvs.CutPatches(tiny_config()).set_random_state(0)
    drawn = [cutter.draw_matrix(np.array((1, 1, 3))) for _ in range(300)]
    drawn = [matrix for matrix in drawn if matrix is not None]
    assert len(drawn) / 300 == pytest.approx(0.36, abs=0.09)
    for matrix in drawn:
        in_mm = np.diag((1, 1, 3)) @ matrix @ np.diag((1, 1, 1 / 3))
        scale = np.cbrt(np.linalg.det(in_mm))
        assert 1 / 1.4 <= scale <= 1 / 0.7
        np.testing.assert_allclose(in_mm @ in_mm.T, scale**2 * np.eye(3), atol=1e-9)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_augmentation_moves_the_label_with_the_image(loader_of):
    """All transforms at once, and each alone; those of the image alone leave the label as it is."""
    shape = (48, 48, 48)
    balls = ball(shape, 7, (14, 15, 24)) | ball(shape, 9, (32, 30, 22))
    stripes = np.broadcast_to(np.arange(48)[:, None, None] // 4 % 2 == 1, shape).copy()
    for label, kind in ((balls, "published"), (stripes, "published"), (stripes, "native")):
        loader = loader_of(label, label, IMG_PATCH_SIZE=shape, AUGMENTATION=kind, FLIP_AXES="x")
        loader.dataset.transforms.transforms[0].draw_matrix = lambda _: None  # of native
        transforms, whole = loader.dataset.transforms.transforms, torch.from_numpy(label)[None]
        steps = [step for step in transforms if hasattr(step, "prob")]
        assert len(steps) >= 4
        for step in [None] if label is balls else steps:
            batch = draw_forced(loader, type(step) if step else object)
            for image, mask in zip(batch["image"], batch["label"] > 0, strict=True):
                told = f"{step}: Dice {dice(mask, whole)} of labels, {dice(image > 0.5, mask)}"
                assert not torch.equal(image, whole.float()), told
                if step is None or "label" in step.keys:
                    assert dice(mask, whole) < 0.98, told
                    assert dice(image > 0.5, mask) > (0.98 if step else 0.85), told
                else:
                    assert torch.equal(mask, whole), told
