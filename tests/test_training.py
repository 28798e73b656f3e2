"""The training loop: its steps, its arithmetic, that it learns, what validations change."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train_pvs
from conftest import prepared_case, save_subject

BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Batches(list):
    """A list of batches in the place of the loader."""

    batch_sampler = SimpleNamespace(epoch=None)


def make_batches(count):
    """Return batches of images, labelled where they are bright; their names are a, b, c, .."""
    images = torch.rand(count, 2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    pairs = zip(images, "abcdef"[:count], strict=True)
    return [{"image": i, "label": (i > 0.7).float(), "name": [name]} for i, name in pairs]


def conv_step(cfg, batches, epoch=1):
    """Train a convolution for an epoch by SGD at LR 1; return its weights before and after."""
    torch.manual_seed(0)
    model, loader = nn.Conv3d(1, 1, 3, padding=1), Batches(batches)
    state = train_pvs.TrainState(model, cfg)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    state.optimizer = torch.optim.SGD(model.parameters(), lr=1)
    result = train_pvs.train_one_epoch(model, state, loader, epoch)
    assert loader.batch_sampler.epoch == epoch
    return before, nn.utils.parameters_to_vector(model.parameters()).detach(), result


def descend(weights, groups):
    """Return the weights of the convolution after a step down the mean loss of each group."""
    model = nn.Conv3d(1, 1, 3, padding=1)
    for group in groups:
        nn.utils.vector_to_parameters(weights, model.parameters())
        losses = [train_pvs.loss_function(model(b["image"]), b["label"]) for b in group]
        gradient = torch.autograd.grad(sum(losses) / len(losses), model.parameters())
        weights = weights - nn.utils.parameters_to_vector(gradient)
    return weights


def test_accumulated_batches_make_one_step_down_the_mean_of_their_losses(tiny_config):
    batches = make_batches(5)
    for steps, groups in ((1, [[b] for b in batches]), (3, [batches[:3], batches[3:]])):
        cfg = tiny_config(AMP=False, GRAD_CLIP=1e6, ACCUMULATE_STEPS=steps)
        before, after, _ = conv_step(cfg, batches)
        torch.testing.assert_close(after, descend(before, groups), atol=1e-6, rtol=1e-5)


def test_gradient_is_clipped_and_loss_and_dice_of_an_epoch_are_those_of_its_patches(tiny_config):
    for clip, length in ((1e6, None), (0.01, 0.01)):  # a step of SGD at LR 1 is a gradient
        before, after, _ = conv_step(tiny_config(AMP=False, GRAD_CLIP=clip), make_batches(1))
        norm = (after - before).norm().item()
        assert norm > 0.02 if length is None else norm == pytest.approx(length, rel=1e-3)
    # Clipped to nothing, the weights stay: what the epoch tells can be calculated afterwards.
    batches = make_batches(3)
    cfg = tiny_config(AMP=False, GRAD_CLIP=1e-12)
    before, after, (loss, dice) = conv_step(cfg, batches, epoch=7)
    torch.testing.assert_close(before, after, atol=1e-9, rtol=0)
    model = nn.Conv3d(1, 1, 3, padding=1)
    nn.utils.vector_to_parameters(before, model.parameters())
    logits = [model(batch["image"]).detach() for batch in batches]
    losses = [train_pvs.loss_function(z, b["label"]) for z, b in zip(logits, batches, strict=True)]
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    pred, label = torch.cat(logits) > 0, torch.cat([b["label"] for b in batches]) > 0.5
    assert dice == pytest.approx((2 * (pred & label).sum() / (pred.sum() + label.sum())).item())


def gradient_errors(cfg, batch):
    """Return {layer: relative error of its weights' gradient} to float32, for equal input."""
    model, found, errors = train_pvs.build_model(cfg), {}, {}
    kinds = nn.Conv3d | nn.ConvTranspose3d
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}

    def keep(layer, inputs, out):
        found[layer] = {"inputs": inputs[0].detach().float()}
        out.register_hook(lambda grad: found[layer].update(out=grad.float()))

    for layer in layers.values():
        layer.register_forward_hook(keep)
        layer.weight.register_hook(lambda g, at=layer: found[at].update(got=g + 0))
    train_pvs.train_one_epoch(model, train_pvs.TrainState(model, cfg), Batches([batch]), 1)
    for name, layer in layers.items():
        if "got" in found.get(layer, {}):  # some have no part in the output
            inputs, out, got = (found[layer][key] for key in ("inputs", "out", "got"))
            (expected,) = torch.autograd.grad(layer.forward(inputs), layer.weight, out)
            errors[name] = ((got - expected).norm() / expected.norm()).item()
    return errors


@pytest.mark.skipif(not BFLOAT16, reason="this processor has no bfloat16 instructions")
def test_bfloat16_gradients_of_every_layer_are_right_where_it_is_used(tiny_config):
    # Rounding to 8 bits gives errors of up to 0.004; those of broken kernels begin at 0.4.
    for architecture, depth, sides in (
        *(("unetplusplus", 3, (16, 16, 16)), ("unetplusplus", 4, (32, 32, 32))),
        *(("dynunet", 3, (32, 16, 16)), ("dynunet", 3, (24, 8, 16))),
    ):
        settings = {"ARCHITECTURE": architecture, "ENCODER_DEPTH": depth, "IMG_PATCH_SIZE": sides}
        cfg = tiny_config(**settings, DECODER_WIDTH=8, DEEP_SUPERVISION=architecture == "dynunet")
        assert train_pvs.autocast_dtype(torch.device("cpu"), cfg) == torch.bfloat16
        image = torch.rand(4, 1, *sides, generator=torch.Generator().manual_seed(0))
        batch = {"image": image, "label": (image > 0.9).float(), "name": ["a"]}
        errors = gradient_errors(cfg, batch)
        assert len(errors) > 15
        assert {n: e for n, e in errors.items() if not e < 0.02} == {}, settings
        assert max(errors.values()) > 1e-5  # it was bfloat16


def test_small_network_learns_a_single_volume(tmp_path, tiny_config):
    label = np.zeros((32, 32, 32), np.int16)
    for x, y in [(8, 8), (8, 22), (22, 8), (22, 22), (15, 15)]:
        label[x : x + 3, y : y + 3, 6:26] = 1
    head = np.pad(np.ones((26, 26, 26)), 3)
    image = head * (400 + 400 * label + np.random.default_rng(0).normal(0, 10, label.shape))
    save_subject(tmp_path, "sub-1", image.astype(np.int16), label)
    settings = {"DATA_DIR": str(tmp_path), "OUTPUT_DIR": str(tmp_path / "out"), "DECODER_WIDTH": 8}
    settings |= {"CROPS_PER_VOLUME": 4, "LR": 5e-3, "EPOCHS": 3, "VAL_EVERY": 100}
    cfg, run = tiny_config(**settings), train_pvs.Run(tmp_path / "out")
    (case,) = train_pvs.prepare_cases(train_pvs.find_cases(cfg), cfg)
    model = train_pvs.build_model(cfg)
    train_pvs.start_at_log_odds(model, [case], cfg)
    train_pvs.fit(run, model, cfg, {"train": 8 * [case], "val": [case], "test": []})
    history = json.loads(run.history.read_text())
    assert history[0]["val_dice"] < history[-1]["val_dice"]
    assert min(history[-1]["val_dice"], history[-1]["train_dice"]) > 0.8
    assert train_pvs.validate(model, [train_pvs.replace(case, working_voxels=0)], cfg, 4)[1] == 0


class Scripted(nn.Module):
    """Its n-th validation finds the n-th number of 64 labelled voxels, with logits of a size."""

    def __init__(self, found, sizes=()):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(1)), []
        self.script = list(found), list(sizes) or [10.0] * len(found)

    def forward(self, image):
        if self.training:
            return self.weight * image
        found, size = (column[len(self.seen)] for column in self.script)
        self.seen.append(self.weight.detach().clone())
        block, logits = torch.full((64,), -float(size)), torch.full(image.shape, -float(size))
        block[: max(found, 0)] = size
        logits[:, :, 4, 4:12, 4:12] = block.view(8, 8)
        return logits if found >= 0 else logits * torch.nan


@pytest.fixture
def fit(tiny_config, tmp_path):
    """Fit a scripted model to a volume of one window; return the history and the Run."""

    def fit(model, last=None, **settings):
        label = torch.zeros(16, 16, 16)
        label[4, 4:12, 4:12] = 1
        case = prepared_case(tmp_path / "entry.pt", torch.rand(label.shape), label)
        run, cfg = train_pvs.Run(tmp_path / "out"), tiny_config(AMP=False, **settings)
        with train_pvs.logging_to_screen():
            train_pvs.fit(run, model, cfg, {"train": [case], "val": [case], "test": []}, last)
        return json.loads(run.history.read_text()), run

    return fit


def test_run_stops_after_so_many_validations_without_a_better_dice_if_it_left_0(fit, capsys):
    history, run = fit(Scripted([0] * 50), EPOCHS=50, EARLY_STOPPING=3)
    out = capsys.readouterr().out
    assert (len(history), "Stopped early" in out) == (50, False)
    assert train_pvs.read_checkpoint(run.best)["history_row"]["epoch"] == 1
    assert out.count("Warning: ") == out.count("Warning: validation Dice is still 0") == 1
    # Validated: 1 (best), 2, 4, 6; the third without a better Dice is in epoch 6.
    for found, every, last in (([0] * 4 + [9] * 9, 1, 8), ([9] * 20, 2, 6)):
        settings, content = {"EPOCHS": 20, "EARLY_STOPPING": 3, "VAL_EVERY": every}, None
        for model in (Scripted(found), Scripted([])):  # going on goes no further
            history, _ = fit(model, content, **settings)
            content = train_pvs.read_checkpoint(run.last)
            assert history[-1]["epoch"] == content["history_row"]["epoch"] == last
            assert "Stopped early: no better validation Dice in 3 val" in capsys.readouterr().out


def test_best_weights_and_scores_are_those_of_the_first_validation_with_the_best_dice(fit):
    found = (0, 0, 30, 20, 30, 16)
    model = Scripted(found)
    history, run = fit(model, EPOCHS=6)
    best = train_pvs.read_checkpoint(run.best)
    assert best["history_row"] == history[2]
    assert torch.equal(best["model"]["weight"], model.seen[2])
    assert [row["val_dice"] for row in history] == pytest.approx([2 * n / (n + 64) for n in found])
    # 48 of 4096 voxels are missed with a logit of -10; the other ones cost next to nothing.
    expected = 0.5 * 48 / 4096 * 10 + 0.5 * (1 - (2 * 16 + 1) / (16 + 64 + 1))
    assert history[-1]["val_loss"] == pytest.approx(expected, abs=2e-3)


def test_validation_loss_that_is_not_finite_ends_the_run_without_new_weights(fit, tmp_path):
    with pytest.raises(FloatingPointError, match="loss became nan in epoch 2 with sub-1"):
        fit(Scripted((5, -1)), EPOCHS=3)
    content = train_pvs.read_checkpoint(tmp_path / "out" / "checkpoints" / "best_model.pth")
    assert content["history_row"]["epoch"] == 1


def test_learning_rate_is_reduced_on_a_plateau_of_the_validation_loss(fit):
    # Patience 1: halved after the second validation in a row without a better loss than in epoch
    # 2, which is 4, and again after 6, then not below the least. The Dice improves all the time.
    model = Scripted(range(10, 17), (60, 8, 20, 30, 40, 45, 50))
    history, _ = fit(model, EPOCHS=7, LR=1e-3, LR_PATIENCE=1, LR_MIN=3e-4)
    losses = [row["val_loss"] for row in history]
    assert min(losses) == losses[1]
    assert [row["lr"] for row in history] == pytest.approx(4 * [1e-3] + 2 * [5e-4] + [3e-4])


@pytest.mark.parametrize("name", ["last.pth", "best_model.pth"])
def test_late_best_weights_survive_a_full_disk(fit, monkeypatch, tmp_path, name):
    real, settings = train_pvs.write_torch, {"VAL_EVERY": 3, "EPOCHS": 7}

    def write(path, content):
        if path.name == name and content["history_row"]["epoch"] == 7:
            raise OSError("the disk is full")
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(train_pvs, "write_torch", write)
        with pytest.raises(OSError, match="full"):
            fit(Scripted((9, 9, 9, 30)), **settings)
    run = train_pvs.Run(tmp_path / "out")
    found = (30,) if name == "last.pth" else ()  # else the epoch is done
    fit(Scripted(found), train_pvs.read_checkpoint(run.last), **settings)
    assert train_pvs.read_checkpoint(run.best)["history_row"]["epoch"] == 7
    # A run of 9 epochs has not seen that validation; those of 3, 6 and 9 are no better than 1's.
    fit(Scripted((9,)), train_pvs.read_checkpoint(run.last), VAL_EVERY=3, EPOCHS=9)
    assert train_pvs.read_checkpoint(run.best)["history_row"]["epoch"] == 1
    assert train_pvs.read_checkpoint(run.last)["progress"]["waited"] == 3


def test_training_ends_with_a_validated_epoch_when_its_minutes_are_over(fit, capsys, monkeypatch):
    clock = [0.0]  # which the network moves
    monkeypatch.setattr(train_pvs.time, "perf_counter", lambda: sum(clock))
    for schedule in ("plateau", "poly"):
        settings = {"EPOCHS": 40, "VAL_EVERY": 100, "MAX_MINUTES": 0.6 / 60, "LR": 1.0}
        model = Scripted(range(1, 50))
        model.register_forward_pre_hook(lambda *_: clock.append(0.1))
        history, _ = fit(model, LR_SCHEDULE=schedule, **settings)
        seconds = [row["seconds"] for row in history]
        left = 0.6 - sum(seconds)  # less than half of an epoch; before the last one, more
        assert left < np.mean(seconds) / 2
        assert left + seconds[-1] >= np.mean(seconds[:-1]) / 2
        validated = {row["epoch"] for row in history if row["val_dice"] is not None}
        assert validated == {1, len(history)} != {1, 40}
        assert "Stopped after" in capsys.readouterr().out


def test_poly_schedule_warms_up_and_ends_at_0_by_epochs_and_by_the_clock(tiny_config):
    cfg = tiny_config(LR=2.0, EPOCHS=100, LR_SCHEDULE="poly")
    state = train_pvs.TrainState(nn.Conv3d(1, 1, 3), cfg)
    kind, decay = type(state.optimizer), state.optimizer.defaults["weight_decay"]
    assert (kind, decay) == (torch.optim.AdamW, 1e-5)
    rows = [{"seconds": 4.0}]  # an epoch

    def rate(epochs, steps, share=0.0, **changed):
        state.cfg = train_pvs.replace(cfg, **changed)
        state.progress |= {"history": epochs * rows, "steps": steps}
        state.set_rate(share)
        return state.optimizer.param_groups[0]["lr"]

    assert rate(0, 0) == pytest.approx(2 / 30)  # the first of 30 steps that warm up
    assert rate(0, 14) == pytest.approx(1)
    # Of 100 epochs 50 and a half are done; the last epoch ends at 0.
    assert rate(50, 999, 0.5) == pytest.approx(2 * 0.495**0.9)
    assert rate(99, 999, 0.5) == pytest.approx(2 * 0.005**0.9)
    assert rate(99, 999, 1) == 0
    # 2 minutes are 30 epochs of 4 s, which is more of the training than 10 of 100 epochs are.
    assert rate(10, 999, MAX_MINUTES=2.0) == pytest.approx(2 * (1 - 10 / 30) ** 0.9)
    assert rate(10, 999, MAX_MINUTES=9.0) == pytest.approx(2 * 0.9**0.9)
    # 30.4 epochs fit in: the 30th is the last; of 29.6, too.
    for minutes in (30.4 / 15, 29.6 / 15):
        assert rate(29, 999, 1, MAX_MINUTES=minutes) == 0 < rate(29, 999, 0.5, MAX_MINUTES=minutes)
    assert rate(0, 999) == rate(50, 999, LR_SCHEDULE="plateau")  # it is the validation's to change
