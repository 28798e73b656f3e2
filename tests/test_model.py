"""The network, its pretrained weights and where its output starts."""

import builtins
import urllib.error

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from torch import nn
from torch.nn.functional import conv2d, pad

import train_pvs


def same(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def momenta(module):
    return {round(m.momentum, 6) for m in module.modules() if isinstance(m, nn.BatchNorm3d)}


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.fixture(scope="module")
def flat():
    """The state dict of a 2D EfficientNet-b0, with running statistics unlike the initial ones."""
    torch.manual_seed(0)
    state = dict(EfficientNet.from_name("efficientnet-b0").state_dict())
    for name in state:
        if "running" in name:
            state[name] = torch.rand_like(state[name])
    return state


@pytest.fixture
def imagenet_home(tmp_path, monkeypatch):
    """An empty folder for downloads; returns where the weights of efficientnet-b0 belong."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints" / "efficientnet-b0-355c32eb.pth"


def test_output_has_the_shape_of_the_input(tiny_config):
    model = train_pvs.build_model(tiny_config())
    assert model(torch.rand(2, 1, 16, 16, 16)).shape == (2, 1, 16, 16, 16)


def test_first_weights_are_a_function_of_the_seed(tiny_config):
    one, again, other = (train_pvs.build_model(tiny_config(SEED=seed)) for seed in (1, 1, 2))
    assert same(one, again)
    assert not same(one.encoder, other.encoder)
    assert not same(one.decoder, other.decoder)


def test_batchnorm_momentum_is_set_on_every_layer(tiny_config):
    model = train_pvs.build_model(tiny_config(BATCHNORM_MOMENTUM=0.25))
    assert momenta(model.encoder) == momenta(model.decoder) == {0.25}


def test_batchnorm_momentum_0_keeps_those_of_the_library(tiny_config):
    model = train_pvs.build_model(tiny_config(BATCHNORM_MOMENTUM=0.0))
    assert momenta(model.encoder) == {0.01}
    assert momenta(model.decoder) == {0.1}


def test_default_network_has_the_published_size():
    model = train_pvs.build_model(train_pvs.Config(ENCODER_WEIGHTS="none"))
    assert millions(model.encoder) == pytest.approx(68.8, abs=0.1)
    assert millions(model.decoder) == pytest.approx(13.1, abs=0.1)
    assert millions(model) == pytest.approx(81.9, abs=0.1)


@pytest.mark.parametrize("source", ["file", "imagenet"])
def test_2d_weights_are_spread_over_the_third_axis(
    source, flat, tiny_config, tmp_path, imagenet_home
):
    path = tmp_path / "b0.pth" if source == "file" else imagenet_home
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(flat, path)
    weights = str(path) if source == "file" else "imagenet"
    state = train_pvs.build_model(tiny_config(ENCODER_WEIGHTS=weights)).encoder.state_dict()

    stem = flat["_conv_stem.weight"].sum(1, keepdim=True)  # RGB to one channel
    kernels = {name: flat[name] for name in flat if name.endswith("wise_conv.weight")}
    assert {kernel.shape[-1] for kernel in kernels.values()} == {3, 5}
    kernels |= {name: flat[name] for name in flat if name.endswith("_expand_conv.weight")}
    for name, kernel in (kernels | {"_conv_stem.weight": stem}).items():
        length = kernel.shape[-1]
        for place in range(length):
            torch.testing.assert_close(state[name][..., place], kernel / length)
    for name in (name for name in flat if "_bn" in name):
        assert torch.equal(state[name], flat[name])


def test_volume_that_is_constant_along_the_third_axis_gives_the_2d_stem(
    flat, tiny_config, tmp_path
):
    torch.save(flat, tmp_path / "b0.pth")
    model = train_pvs.build_model(tiny_config(ENCODER_WEIGHTS=str(tmp_path / "b0.pth")))
    picture = torch.rand(1, 1, 16, 16)
    volume = picture[..., None].expand(1, 1, 16, 16, 16)
    # "Same" padding of an even side at stride 2: none before, one zero after.
    expected = conv2d(
        pad(picture.expand(1, 3, 16, 16), (0, 1, 0, 1)), flat["_conv_stem.weight"], stride=2
    )
    result = model.encoder._conv_stem(volume)
    for place in range(7):  # the last of 8 sees the zeros
        torch.testing.assert_close(result[..., place], expected, atol=1e-5, rtol=0)


class Intruder:
    """Creates a file when a trusting reader unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


def wrong_weights(kind, path, flat):
    """Write a file that holds no weights of efficientnet-b0."""
    without_stem = {name: flat[name] for name in flat if name != "_conv_stem.weight"}
    if kind == "cut off":
        torch.save(flat, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind in ("Not Found\n", "error: no such file\n", ""):
        path.write_text(kind)
    else:
        content = {
            "other network": lambda: EfficientNet.from_name("efficientnet-b1").state_dict(),
            "no stem": lambda: without_stem,
            "stem of one axis": lambda: without_stem | {"_conv_stem.weight": torch.zeros(32)},
            "list": lambda: [1, 2, 3],
        }
        torch.save(content[kind](), path)


@pytest.mark.parametrize(
    "kind",
    [
        "cut off",
        "Not Found\n",
        "error: no such file\n",
        "",
        "other network",
        "no stem",
        "stem of one axis",
        "list",
    ],
)
def test_file_that_holds_no_fitting_weights_is_told_by_name(kind, data, run, tmp_path, flat):
    wrong_weights(kind, tmp_path / "wrong.pth", flat)
    status, _, err = run("--encoder-weights", tmp_path / "wrong.pth")
    assert status == 2
    assert f"Error: {tmp_path / 'wrong.pth'}: expected the state dict of a 2D EfficientNet" in err
    assert "--encoder-weights none" in err


def test_every_cut_of_a_file_of_the_old_format_is_told(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"_conv_stem.weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"old\.pth: expected the state dict"):
            train_pvs.load_encoder_weights(nn.Identity(), path)


def test_weights_that_bring_code_are_refused_and_it_does_not_run(data, run, tmp_path):
    torch.save({"_conv_stem.weight": Intruder(tmp_path / "intruder")}, tmp_path / "evil.pth")
    status, _, err = run("--encoder-weights", tmp_path / "evil.pth")
    assert status == 2
    assert str(tmp_path / "evil.pth") in err
    assert not (tmp_path / "intruder").exists()


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no network"), RuntimeError('invalid hash value (expected "355c32eb")')],
)
def test_failed_download_says_both_ways_out_before_any_volume_is_read(
    error, data, run, monkeypatch, imagenet_home
):
    def fail(*_):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(train_pvs, "read_volume", lambda path: pytest.fail(f"{path} was read"))
    status, _, err = run("--encoder-weights", "imagenet")
    assert status == 2
    url = "https://github.com/lukemelas/EfficientNet-PyTorch/releases/download/1.0/"
    assert url + imagenet_home.name in err
    assert str(imagenet_home) in err
    assert "--encoder-weights none" in err


def first_prediction(monkeypatch, cfg, *masks):
    """Return the probability at which the output starts with these (labelled, voxels)."""
    entries = [
        {"foreground": torch.arange(labelled), "label": torch.zeros(1, voxels, 1, 1)}
        for labelled, voxels in masks
    ]
    monkeypatch.setattr(train_pvs, "load_cached", lambda number: entries[number])
    model = train_pvs.build_model(cfg)
    train_pvs.start_at_log_odds(model, range(len(entries)), cfg)
    return torch.sigmoid(model.segmentation_head[0].bias).item()


def test_head_bias_gives_the_labelled_fraction_of_all_masks(monkeypatch, tiny_config):
    # (3 + 7) of (1000 + 3000) voxels, which is not the mean of 3/1000 and 7/3000
    fraction = first_prediction(monkeypatch, tiny_config(), (3, 1000), (7, 3000))
    assert fraction == pytest.approx(0.0025, rel=1e-5)


@pytest.mark.parametrize("labelled", [0, 1000])
def test_head_bias_stays_finite_where_all_masks_are_empty_or_full(
    labelled, monkeypatch, tiny_config
):
    fraction = first_prediction(monkeypatch, tiny_config(), (labelled, 1000))
    assert 0 < fraction < 1


# ------------------------------------------------------------------------------------------ dynunet


@pytest.fixture
def dynunet(tiny_config):
    return tiny_config(ARCHITECTURE="dynunet", DECODER_WIDTH=4)


def test_dynunet_gives_logits_of_the_images_shape_and_has_a_level_at_full_resolution(dynunet):
    model, seen = train_pvs.build_model(dynunet).eval(), []
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda module, _, out: seen.append(tuple(out.shape[1:])))
    assert model(torch.zeros(2, 1, 16, 24, 32)).shape == (2, 1, 16, 24, 32)
    assert seen[0] == (4, 16, 24, 32)
    assert min(shape[1:] for shape in seen) == (2, 3, 4)  # halved ENCODER_DEPTH times
    assert {shape[0] for shape in seen} == {1, 4, 8, 16, 32}


def test_dynunet_is_a_function_of_the_seed(dynunet):
    one, again = (train_pvs.build_model(dynunet).state_dict() for _ in range(2))
    other = train_pvs.build_model(train_pvs.replace(dynunet, SEED=5)).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_step_memory_of_dynunet_leaves_the_network_as_it_was(dynunet):
    model = train_pvs.build_model(dynunet)
    assert train_pvs.step_memory(model, dynunet) > 0
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_dynunet_needs_patches_that_its_norm_can_scale(dynunet):
    cfg = train_pvs.replace(dynunet, IMG_PATCH_SIZE=(8, 8, 8))
    (problem,) = train_pvs.check_config(cfg)
    assert problem == "IMG_PATCH_SIZE: expected more than 8 for dynunet (its norm), got 8 8 8"
