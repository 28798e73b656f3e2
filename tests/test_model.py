"""The network, its pretrained weights and where its output starts."""

import io
import math
import urllib.error
from unittest.mock import Mock

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from torch import nn

import train_pvs
from conftest import Malicious, prepared_case
from running import refused


@pytest.fixture(scope="module")
def flat():
    """The state dict of a 2D EfficientNet-b0, with running statistics unlike the initial ones."""
    torch.manual_seed(0)
    state = dict(EfficientNet.from_name("efficientnet-b0").state_dict())
    return {n: torch.rand_like(v) if "running" in n else v for n, v in state.items()}


@pytest.fixture
def imagenet_home(tmp_path, monkeypatch):
    """An empty folder for downloads; returns where the weights of efficientnet-b0 belong."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints" / "efficientnet-b0-355c32eb.pth"


def test_output_has_the_shape_of_the_input_and_first_weights_follow_the_seed(tiny_config):
    for architecture in ("unetplusplus", "dynunet"):
        cfgs = [tiny_config(ARCHITECTURE=architecture, SEED=seed) for seed in (1, 1, 2)]
        one, again, other = (train_pvs.build_model(cfg).state_dict() for cfg in cfgs)
        assert all(torch.equal(one[name], again[name]) for name in one)
        kernels = [name for name in one if one[name].ndim == 5 and one[name].numel() > 1]
        assert len(kernels) > 10
        assert not any(torch.equal(one[name], other[name]) for name in kernels)
        model = train_pvs.build_model(cfgs[0]).eval()
        assert model(torch.rand(2, 1, 16, 24, 32)).shape == (2, 1, 16, 24, 32)


def test_batchnorm_momentum_is_set_on_every_layer_and_0_keeps_those_of_the_library(tiny_config):
    found = []
    for momentum in (0.25, 0.0):
        model = train_pvs.build_model(tiny_config(BATCHNORM_MOMENTUM=momentum))
        for part in (model.encoder, model.decoder):
            norms = [m for m in part.modules() if isinstance(m, nn.BatchNorm3d)]
            found.append({round(norm.momentum, 6) for norm in norms})
    assert found == [{0.25}, {0.25}, {0.01}, {0.1}]


def test_default_networks_keep_their_sizes_and_name_the_outputs_bias(monkeypatch):
    cfg = train_pvs.parse_command_line(["--encoder-weights", "none"])[0]
    with torch.device("meta"):  # sizes only, no memory
        model = train_pvs.build_model(cfg)
        dynunet = train_pvs.build_model(train_pvs.replace(cfg, ARCHITECTURE="dynunet"))
    parts = model.encoder, model.decoder, model, dynunet
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    assert millions == pytest.approx([68.8, 13.1, 81.9, 16.6], abs=0.1)
    monkeypatch.setitem(train_pvs.NETWORKS, "unetplusplus", ("gone", "unetpp", "UNet++"))
    with torch.device("meta"), pytest.raises(ValueError, match="NETWORKS: unetplusplus: expected"):
        train_pvs.build_model(train_pvs.replace(cfg, HEAD_BIAS_LOG_ODDS=True))


def test_2d_weights_are_spread_over_the_third_axis(flat, tiny_config, tmp_path, imagenet_home):
    imagenet_home.parent.mkdir(parents=True)
    kernels = {name: flat[name] for name in flat if name.endswith("wise_conv.weight")}
    assert {kernel.shape[-1] for kernel in kernels.values()} == {3, 5}
    kernels |= {name: flat[name] for name in flat if name.endswith("_expand_conv.weight")}
    kernels["_conv_stem.weight"] = flat["_conv_stem.weight"].sum(1, keepdim=True)  # one channel
    for path, weights in ((tmp_path / "b0.pth", str(tmp_path / "b0.pth")), (imagenet_home, None)):
        torch.save(flat, path)
        cfg = tiny_config(ENCODER_WEIGHTS=weights or "imagenet")
        state = train_pvs.build_model(cfg).encoder.state_dict()
        for name, kernel in kernels.items():
            for place in range(kernel.shape[-1]):
                torch.testing.assert_close(state[name][..., place], kernel / kernel.shape[-1])
        assert all(torch.equal(state[name], flat[name]) for name in flat if "_bn" in name)
        path.unlink()


def test_unfit_or_missing_weights_are_told_by_name_and_run_no_code(
    flat, data, run, monkeypatch, tmp_path, imagenet_home
):
    monkeypatch.chdir(tmp_path)
    path, whole = tmp_path / "weights.pth", io.BytesIO()
    torch.save(flat, whole)
    for content in (
        EfficientNet.from_name("efficientnet-b1").state_dict(),
        flat | {"_conv_stem.weight": torch.zeros(32)},  # of one axis
        {"_conv_stem.weight": Malicious()},
        *(whole.getvalue()[:-1000], b"Not Found\n", b""),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        told = f"Error: {path}: expected the state dict of a 2D EfficientNet"
        refused(run("--encoder-weights", path), told, "--encoder-weights none")
    assert not (tmp_path / "code was run").exists()
    # A failed download says both ways out.
    url = "https://github.com/lukemelas/EfficientNet-PyTorch/releases/download/1.0/"
    for error in (urllib.error.URLError("no network"), RuntimeError("invalid hash value")):
        monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=error))
        told = url + imagenet_home.name, imagenet_home, "--encoder-weights none"
        refused(run("--encoder-weights", "imagenet"), *told)
        assert not list(tmp_path.rglob("cache"))


def masks(tmp_path, *sizes):
    """Return cases with prepared masks of these (labelled, voxels)."""
    labels = {n: torch.arange(n).view(-1, 1, 1) < labelled for labelled, n in sizes}
    return [prepared_case(tmp_path / f"{n}.pt", label, label) for n, label in labels.items()]


def test_bias_of_the_output_layer_starts_at_the_labelled_fraction(tiny_config, tmp_path):
    # (3 + 7) of (1000 + 3000) voxels; with one channel other biases have the shape of the output's.
    cases = masks(tmp_path, (3, 1000), (7, 3000))
    names = {"unetplusplus": "segmentation_head.0.bias", "dynunet": "output_block.conv.conv.bias"}
    for architecture, name in names.items():
        for width in (1, 4):
            cfg = tiny_config(ARCHITECTURE=architecture, DECODER_WIDTH=width)
            model = train_pvs.build_model(cfg)
            before = {key: value.clone() for key, value in model.state_dict().items()}
            train_pvs.start_at_log_odds(model, cases, cfg)
            after = model.state_dict()
            assert [key for key in before if not torch.equal(before[key], after[key])] == [name]
            assert after[name].tolist() == pytest.approx([math.log(10 / 3990)])
    model = train_pvs.build_model(train_pvs.replace(cfg, DEEP_SUPERVISION=True))
    train_pvs.start_at_log_odds(model, cases, cfg)  # all three outputs'
    biases = [weights.tolist() for key, weights in model.named_parameters() if "conv.bias" in key]
    assert biases == 3 * [[pytest.approx(math.log(10 / 3990))]]
    for labelled in (0, 1000):  # all masks are empty, or full: as if a voxel were not
        train_pvs.start_at_log_odds(model, masks(tmp_path, (labelled, 1000)), cfg)
        assert abs(model.get_parameter(name).item()) == pytest.approx(math.log(999), rel=1e-5)


def test_deep_supervision_weighs_the_loss_of_each_resolution_and_ends_with_training(tiny_config):
    cfg = tiny_config(ARCHITECTURE="dynunet", ENCODER_DEPTH=4, DEEP_SUPERVISION=True)
    model, image = train_pvs.build_model(cfg), torch.rand(2, 1, 32, 32, 32)
    outputs, label, total = model.train()(image), torch.zeros(2, 1, 32, 32, 32), 0
    label[0, 0, 9, 5, 30] = 1  # one voxel is one at each resolution
    for output, weight, side in zip(outputs, (8, 4, 2, 1), (32, 16, 8, 4), strict=True):
        small = torch.zeros(2, 1, side, side, side)
        small[0, 0, 9 * side // 32, 5 * side // 32, 30 * side // 32] = 1
        total += weight / 15 * train_pvs.loss_function(output, small)
    torch.testing.assert_close(train_pvs.supervise(outputs, label), total)
    train_pvs.supervise(outputs, label).backward()
    assert [name for name, weights in model.named_parameters() if weights.grad is None] == []
    alone = train_pvs.build_model(train_pvs.replace(cfg, DEEP_SUPERVISION=False)).eval()
    assert alone.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    copied = torch.optim.swa_utils.AveragedModel(model).eval()  # as of MONAI's own it cannot be
    torch.testing.assert_close(copied(image), alone(image), rtol=0, atol=0)
    places = {kept.data_ptr() for kept in train_pvs.copy_of(model.state_dict()).values()}
    assert len(places) == len(list(model.parameters()))  # no weight is kept twice
