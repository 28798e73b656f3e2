"""The training loop: that it learns, and what it does with the validations."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import train_pvs
from conftest import TINY, image_path, label_path, make_subject, save_nifti


class Batches(list):
    """A list of batches in the place of the loader."""

    epoch = 1


def make_batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        image = torch.rand(size, 1, 4, 4, 4, generator=generator)
        yield {"image": image, "label": (image > 0.7).float(), "name": ["a"]}


def joined(*batches):
    return {key: torch.cat([b[key] for b in batches]) for key in ("image", "label")} | {"name": []}


@pytest.fixture
def train_one_epoch(monkeypatch, tiny_config):
    """Train a convolution for an epoch with SGD at LR 1; return how far its weights moved."""
    monkeypatch.setattr(train_pvs, "loss_function", nn.BCEWithLogitsLoss())

    def train(batches, **settings):
        torch.manual_seed(0)
        model = nn.Conv3d(1, 1, 3, padding=1)
        start = nn.utils.parameters_to_vector(model.parameters()).detach()
        cfg = tiny_config(**{"AMP": False, "GRAD_CLIP": 1e6} | settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train_pvs.train_one_epoch(model, Batches(batches), optimizer, scaler, cfg)
        return nn.utils.parameters_to_vector(model.parameters()).detach() - start

    return train


def test_two_accumulated_batches_make_the_step_of_one_large_batch(train_one_epoch):
    one, two = make_batches(2, 2)
    step = train_one_epoch([one, two], ACCUMULATE_STEPS=2)
    torch.testing.assert_close(step, train_one_epoch([joined(one, two)]))
    assert not torch.allclose(step, train_one_epoch([one, two]))


def test_incomplete_last_group_is_averaged_over_its_own_size(train_one_epoch):
    one, two, three, four, five = make_batches(2, 2, 2, 2, 2)
    step = train_one_epoch([one, two, three, four, five], ACCUMULATE_STEPS=3)
    torch.testing.assert_close(step, train_one_epoch([joined(one, two, three), joined(four, five)]))


def test_gradient_is_clipped_to_its_largest_norm(train_one_epoch):
    # A step of SGD at LR 1 is as long as the gradient.
    assert train_one_epoch(make_batches(2)).norm() > 0.02
    assert train_one_epoch(make_batches(2), GRAD_CLIP=0.01).norm() == pytest.approx(0.01, rel=1e-3)


def test_small_network_learns_a_single_volume(tmp_path, tiny_config):
    label = np.zeros((32, 32, 32), np.int16)
    for x, y in [(8, 8), (8, 22), (22, 8), (22, 22), (15, 15)]:
        label[x : x + 3, y : y + 3, 6:26] = 1
    image = 400 + 400 * label + np.random.default_rng(0).normal(0, 10, label.shape)
    save_nifti(image_path(tmp_path, "sub-1"), image.astype(np.int16))
    save_nifti(label_path(tmp_path, "sub-1"), label)
    cfg = tiny_config(
        DATA_DIR=str(tmp_path),
        OUTPUT_DIR=str(tmp_path / "out"),
        DECODER_WIDTH=8,
        CROPS_PER_VOLUME=4,
        LR=5e-3,
        EPOCHS=4,
        VAL_EVERY=100,
    )
    (case,) = train_pvs.prepare_cases(train_pvs.find_cases(cfg), cfg)
    model = train_pvs.build_model(cfg)
    train_pvs.start_at_log_odds(model, [case], cfg)
    history = train_pvs.fit(model, cfg, {"train": 15 * [case], "val": [case]})
    assert history[0]["val_dice"] < history[-1]["val_dice"]
    assert history[-1]["val_dice"] > 0.8
    assert history[-1]["train_dice"] > 0.8


@pytest.fixture
def fit(monkeypatch, tiny_config, tmp_path):
    """Run `fit` with the validation Dice (and loss) of each epoch given, and no training."""

    monkeypatch.setattr(train_pvs.log, "propagate", False)  # or `messages` has each twice

    def script(dice, loss=lambda epoch: 1.0, **settings):
        monkeypatch.setattr(train_pvs, "train_one_epoch", lambda *_: (0.5, 0.0))
        scores = lambda model, cases, cfg, epoch: (loss(epoch), dice(epoch))  # noqa: E731
        monkeypatch.setattr(train_pvs, "validate", scores)
        cfg = tiny_config(OUTPUT_DIR=str(tmp_path), **settings)
        case = {"name": "sub-1", "sha256": "a0b1", "label_sha256": "c2"}
        return train_pvs.fit(nn.Conv3d(1, 1, 1), cfg, {"train": [case], "val": [case]})

    return script


def test_run_is_not_stopped_while_the_validation_dice_never_left_0(fit, messages):
    assert len(fit(lambda epoch: 0.0, EPOCHS=55, EARLY_STOPPING=3)) == 55
    assert "Stopped early" not in messages.text


@pytest.mark.parametrize(("first", "last"), [(1, 4), (10, 13)])
def test_run_stops_after_so_many_validations_without_a_better_dice(first, last, fit, messages):
    history = fit(lambda epoch: 0.2 * (epoch == first), EPOCHS=20, EARLY_STOPPING=3)
    assert history[-1]["epoch"] == last
    assert "Stopped early: no better validation Dice in 3 validations" in messages.text


def test_epochs_without_validation_do_not_count_for_early_stopping(fit):
    # Validated: 1 (best), 2, 4, 6; the third without a better Dice is in epoch 6.
    history = fit(lambda epoch: 0.2, EPOCHS=20, EARLY_STOPPING=3, VAL_EVERY=2)
    assert history[-1]["epoch"] == 6


@pytest.mark.parametrize(("dice", "times"), [(0.0, 1), (0.1, 0)])
def test_dice_of_0_is_warned_of_once(dice, times, fit, messages):
    fit(lambda epoch: dice, EPOCHS=55)
    warnings = [r.getMessage() for r in messages.records if r.levelname == "WARNING"]
    assert len(warnings) == times
    assert all("validation Dice is still 0" in warning for warning in warnings)


def test_best_weights_are_written_after_the_first_epoch_and_where_the_dice_improves(
    fit, monkeypatch
):
    saved = []
    monkeypatch.setattr(train_pvs, "save_checkpoint", lambda path, *args: saved.append(args[3]))
    dices = dict(enumerate((0.0, 0.0, 0.3, 0.2, 0.3, 0.4), start=1))
    history = fit(dices.get, EPOCHS=6)
    assert [row["epoch"] for row in saved] == [1, 3, 6]
    assert saved[-1] == history[-1]


def test_learning_rate_is_reduced_on_a_plateau_of_the_validation_loss(fit):
    # Patience 1: halved after the second validation in a row without a better loss than in epoch
    # 2, which is 4, and again after 6, then not below the least.
    history = fit(
        lambda epoch: epoch / 10,  # Dice improves all the time
        lambda epoch: 2.0 if epoch == 1 else 1.0,
        EPOCHS=7,
        LR=1e-3,
        LR_PATIENCE=1,
        LR_MIN=3e-4,
    )
    rates = [1e-3, 1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 3e-4]
    assert [row["lr"] for row in history] == pytest.approx(rates)


def test_validation_is_in_the_first_every_third_and_the_last_epoch(fit, tmp_path):
    fit(lambda epoch: 0.1, EPOCHS=7, VAL_EVERY=3)
    history = json.loads((tmp_path / "logs" / "training_history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6, 7]
    for key in ("val_loss", "val_dice"):
        assert [row["epoch"] for row in history if row[key] is not None] == [1, 3, 6, 7]


@pytest.fixture
def no_test(monkeypatch):
    """Leave out what follows the training."""
    monkeypatch.setattr(train_pvs, "evaluate", lambda *_: None)
    monkeypatch.setattr(train_pvs, "draw_training_curves", lambda *_: None)


@pytest.mark.parametrize(
    ("call", "epoch", "part"), [(2, 1, "train"), (3, 1, "val"), (5, 2, "train")]
)
def test_loss_that_is_not_finite_ends_the_run_and_names_the_case(
    call, epoch, part, data, run, monkeypatch, tmp_path
):
    # Calls of the loss in an epoch: 2 training cases, 1 validation case.
    losses, real = [], train_pvs.loss_function

    def loss_function(logits, label):
        losses.append(real(logits, label))
        return losses[-1] * float("nan") if len(losses) == call else losses[-1]

    monkeypatch.setattr(train_pvs, "loss_function", loss_function)
    status, _, err = run("--epochs", 2)
    assert status == 1
    assert len(losses) == call
    subjects = json.loads((tmp_path / "out" / "logs" / "split.json").read_text())[part]
    sampler = train_pvs.EpochSampler(len(subjects), train_pvs.Config(BATCH_SIZE=2))
    sampler.epoch = epoch
    order = [subjects[number] for _, number in next(iter(sampler))]
    kind = "validation loss" if part == "val" else "loss"
    case = order[(call - 1) % 3 % len(order)]
    assert f"the {kind} became nan in epoch {epoch} with {case}." in err
    best = tmp_path / "out" / "checkpoints" / "best_model.pth"
    assert best.exists() == (epoch == 2)
    if best.exists():
        assert torch.load(best, weights_only=True)["history_row"]["epoch"] == 1


@pytest.mark.parametrize(("dice", "expected"), [(0.0, 1), (0.5, 0)])
def test_run_that_learned_nothing_tests_and_draws_and_exits_with_1(
    dice, expected, data, run, monkeypatch, tmp_path
):
    monkeypatch.setattr(train_pvs, "validate", lambda *_: (1.0, dice))
    status, out, err = run()
    assert status == expected
    assert ("No PVS were learned" in err) == (dice == 0)
    assert "Test scores" in out
    for name in ("training_curves.jpg", "test_set_visualization_grid_300dpi.jpg"):
        assert (tmp_path / "out" / name).exists()
    assert len(list((tmp_path / "out" / "multi_plane").glob("*.png"))) == 1


def test_weights_of_the_best_epoch_are_tested_and_not_those_of_the_last(
    data, run, monkeypatch, tmp_path, no_test
):
    tested, seen = [], []

    def validate(model, cases, cfg, epoch):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return 1.0, 0.5 / epoch

    monkeypatch.setattr(train_pvs, "validate", validate)
    monkeypatch.setattr(train_pvs, "evaluate", lambda model, *_: tested.append(model.state_dict()))
    assert run("--epochs", 2)[0] == 0
    name = "segmentation_head.0.weight"
    assert torch.equal(tested[0][name], seen[0][name])
    assert not torch.equal(tested[0][name], seen[1][name])


def test_runs_with_one_seed_are_equal_bit_by_bit_with_or_without_workers(
    data, run, tmp_path, no_test
):
    results = []
    for name, seed, workers in [("a", 1, 0), ("b", 1, 0), ("c", 1, 2), ("d", 2, 0)]:
        out = tmp_path / name
        run("--epochs", 2, "--seed", seed, "--num-workers", workers, out=out)
        history = json.loads((out / "logs" / "training_history.json").read_text())
        for row in history:
            del row["seconds"]
        best = torch.load(out / "checkpoints" / "best_model.pth", weights_only=True)["model"]
        results.append((history, best))
    (history, best), *equal, (other, _) = results
    assert len(history) == 2
    for again, weights in equal:
        assert history == again
        assert all(torch.equal(best[name], weights[name]) for name in best)
    assert history != other


def test_checkpoint_holds_plain_values_and_gives_the_same_prediction(tmp_path, tiny_config):
    cfg, path = tiny_config(SEED=1), tmp_path / "best_model.pth"
    model = train_pvs.build_model(cfg)
    image = torch.rand(1, 16, 16, 20)
    expected = train_pvs.predict_logits(model, image, cfg)
    row = {"epoch": 3, "val_dice": 0.5}
    train_pvs.save_checkpoint(
        path, model, cfg, {"test": [{"name": "sub-1", "sha256": "a0b1"}]}, row
    )

    content = torch.load(path, weights_only=True)
    assert train_pvs.Config(**content["config"]) == cfg
    assert content["working_grid"] == {"orientation": "RAS", "spacing_mm": (1.0, 1.0, 1.0)}
    assert content["sha256"] == {"test": {"sub-1": "a0b1"}}
    assert content["history_row"] == row
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]

    other = train_pvs.build_model(tiny_config(SEED=2))
    assert not torch.equal(train_pvs.predict_logits(other, image, cfg), expected)
    train_pvs.load_weights(other, train_pvs.read_checkpoint(path), path)
    assert torch.equal(train_pvs.predict_logits(other, image, cfg), expected)


@pytest.mark.parametrize(("minutes", "epochs"), [(0, 9), (0.5, 5), (0.6, 7)])
def test_training_ends_with_a_validated_epoch_when_its_minutes_are_over(
    minutes, epochs, fit, monkeypatch, messages
):
    # Looks at the clock are 5 s apart: the first epoch takes 10 s, with its validation, others 5.
    clock = iter(range(0, 10**6, 5))
    monkeypatch.setattr(train_pvs.time, "perf_counter", lambda: next(clock))
    history = fit(lambda epoch: 0.5, EPOCHS=9, VAL_EVERY=100, MAX_MINUTES=minutes)
    assert [row["epoch"] for row in history] == list(range(1, epochs + 1))
    validated = [row["epoch"] for row in history if row["val_dice"] is not None]
    assert validated == [1, epochs]
    assert ("Stopped after" in messages.text) == (minutes > 0)


# ------------------------------------------------------------------------------ weights' average


def test_average_follows_the_weights_and_is_what_is_validated_and_kept(
    data, run, monkeypatch, tmp_path
):
    seen, real = [], train_pvs.validate

    def validate(model, *args):
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        return real(model, *args)

    weights, update = [], train_pvs.update_weights
    begin = train_pvs.build_training

    def build_training(model, cfg):
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        return begin(model, cfg)

    def update_weights(model, *args):
        norm = update(model, *args)
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        return norm

    monkeypatch.setattr(train_pvs, "validate", validate)
    monkeypatch.setattr(train_pvs, "build_training", build_training)
    monkeypatch.setattr(train_pvs, "update_weights", update_weights)
    assert run("--ema-decay", 0.6, "--epochs", 2, "--no-amp")[0] in (0, 1)
    average, steps = weights[0], len(weights) // 2  # an epoch's
    for step, now in enumerate(weights[1:], 1):
        average = 0.6 * average + 0.4 * now
        if step % steps == 0:
            torch.testing.assert_close(seen[step // steps - 1], average, atol=1e-6, rtol=1e-4)
            assert (average - now).abs().max() > 1e-4
    content = torch.load(tmp_path / "out" / "checkpoints" / "best_model.pth", weights_only=True)
    best = content["history_row"]["epoch"]
    cfg, _ = train_pvs.parse_command_line(["--data-dir", str(data), *TINY])
    model = train_pvs.build_model(cfg)
    model.load_state_dict(content["model"])
    kept = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert torch.equal(kept, seen[best - 1])


# --------------------------------------------------------------------- threshold and smallest PVS


def test_average_and_decision_are_of_the_validation_scans_and_never_of_the_test(
    data, run, monkeypatch, tmp_path
):
    """Other test scans and masks must not change a bit; other validation masks must.

    The network's probability is taken to be 0.44 in every other slice of the bright tubes, 0.24 in
    other tissue. A mask of the tubes is met best by thresholds below 0.44, with Dice 0.67 or so;
    one of all tissue by those below 0.24, with Dice 1, and so would be the mean of the two.
    """

    def predict_logits(model, image, cfg):
        prob = torch.where(image.float() > 0.02, 0.24, 0.01)
        prob[:, ::2][image[:, ::2] > 0.7] = 0.44
        return torch.logit(prob)[None]

    monkeypatch.setattr(train_pvs, "predict_logits", predict_logits)
    flags = ("--ema-decay", 0.5, "--tune-decision", "--epochs", 2)

    def kept(out):
        assert run(*flags, out=out)[0] == 1
        content = torch.load(out / "checkpoints" / "best_model.pth", weights_only=True)
        weights = torch.cat([value.flatten().float() for value in content["model"].values()])
        return weights, [content["config"][name] for name in ("THRESHOLD", "SMALLEST_PVS")]

    weights, decision = kept(tmp_path / "out")
    assert decision == [0.4, 0.0]
    parts = json.loads((tmp_path / "out" / "logs" / "split.json").read_text())
    (test,), (val,) = parts["test"], parts["val"]
    make_subject(data, test, seed=50)
    tissue = {
        name: np.asarray(nib.load(image_path(data, name)).dataobj) > 200 for name in (test, val)
    }
    save_nifti(label_path(data, test), tissue[test].astype(np.int16))
    other = kept(tmp_path / "other-test")
    assert torch.equal(other[0], weights)
    assert other[1] == decision
    save_nifti(label_path(data, val), tissue[val].astype(np.int16))
    assert kept(tmp_path / "other-val")[1] == [0.2, 0.0]


def test_chosen_decision_is_what_tests_and_predictions_use(data, run, monkeypatch, tmp_path):
    chosen = {"THRESHOLD": 0.003, "SMALLEST_PVS": 3.0}
    choose = lambda model, cases, cfg: train_pvs.replace(cfg, **chosen)  # noqa: E731
    monkeypatch.setattr(train_pvs, "choose_decision", choose)
    assert run("--tune-decision")[0] in (0, 1)
    out = tmp_path / "out"
    metrics = out / "logs" / "comprehensive_test_metrics.json"
    first = json.loads(metrics.read_text())
    description = json.loads((out / "predictions" / "dataset_description.json").read_text())
    told = description["GeneratedBy"][0]["Description"]
    assert told.endswith("mask where above 0.003, without components below 3 mm3")
    machine = ["--output-dir", str(out), "--num-workers", "0", "--device", "cpu"]
    assert train_pvs.main(["--evaluate", *machine]) == 0
    again = json.loads(metrics.read_text())
    assert again["subjects"] == first["subjects"]
    assert again["config"]["SMALLEST_PVS"] == 3
    # Another decision is another test: it does not replace the run's own.
    assert train_pvs.main(["--evaluate", *machine, "--smallest-pvs", "100000"]) == 0
    assert json.loads(metrics.read_text()) == again
    other = json.loads((out / "evaluate-data" / "logs" / metrics.name).read_text())
    assert other["subjects"][0]["count_pred"] == 0
    assert other["config"]["THRESHOLD"] == 0.003
    assert not other["config"]["TUNE_DECISION"]


def test_finished_run_is_tested_again_with_another_decision(data, run, monkeypatch, tmp_path):
    """Nothing is trained again, and the checkpoint tells of the latest decision."""
    choose = lambda model, cases, cfg: train_pvs.replace(cfg, THRESHOLD=0.25)  # noqa: E731
    monkeypatch.setattr(train_pvs, "choose_decision", choose)
    path = tmp_path / "out" / "checkpoints" / "best_model.pth"
    first = run()[0]
    before = torch.load(path, weights_only=True)
    monkeypatch.setattr(train_pvs, "train_one_epoch", None)
    for flags, threshold in ((("--tune-decision",), 0.25), (("--threshold", 0.3), 0.3), ((), 0.5)):
        assert run("--resume", *flags)[0] == first
        after = torch.load(path, weights_only=True)
        metrics = tmp_path / "out" / "logs" / "comprehensive_test_metrics.json"
        tested = json.loads(metrics.read_text())["config"]
        assert after["config"]["THRESHOLD"] == tested["THRESHOLD"] == threshold
        assert after["history_row"] == before["history_row"]
        assert all(torch.equal(before["model"][k], v) for k, v in after["model"].items())
    assert after["config"] == before["config"]
