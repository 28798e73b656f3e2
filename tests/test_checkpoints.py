"""What a checkpoint holds, what is refused in its place, and whose settings count."""

import json
import os
import pickle

import pytest
import torch
from torch import nn

import train_pvs
from conftest import TINY

SPLIT = {
    "train": [{"name": "sub-1", "sha256": "1f2e"}],
    "test": [{"name": "sub-2", "sha256": "a0b1"}],
}
ROW = {"epoch": 3, "val_dice": 0.25}


@pytest.fixture
def model(tiny_config):
    return train_pvs.build_model(tiny_config())


@pytest.fixture
def checkpoint(tmp_path, model, tiny_config):
    """Return the path of a checkpoint with two scans, of 10 and 20 bytes."""
    path = tmp_path / "checkpoints" / "best_model.pth"
    train_pvs.save_checkpoint(path, model, tiny_config(), SPLIT, ROW)
    return path


def contains(value, kinds):
    """Return whether a value is one of these kinds, and so all that it holds."""
    if isinstance(value, dict):
        return all(contains(v, kinds) for pair in value.items() for v in pair)
    if isinstance(value, list | tuple):
        return all(contains(item, kinds) for item in value)
    return isinstance(value, kinds)


def test_checkpoint_gives_back_weights_settings_grid_split_and_row(checkpoint, model, tiny_config):
    content = train_pvs.read_checkpoint(checkpoint)
    assert content["history_row"] == ROW
    assert content["sha256"] == {"train": {"sub-1": "1f2e"}, "test": {"sub-2": "a0b1"}}
    assert content["working_grid"] == {"orientation": "RAS", "spacing_mm": (1, 1, 1)}
    assert train_pvs.Config(**content["config"]) == tiny_config()
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert contains(content, (torch.Tensor, str, int, float, bool, type(None)))
    other = train_pvs.build_model(tiny_config(SEED=5))
    train_pvs.load_weights(other, content, checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


# ---------------------------------------------------------------------------- what is no checkpoint


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_malicious_pickle(path, marker):
    path.write_bytes(pickle.dumps({"model": Malicious(marker)}, protocol=2))


def write_malicious_checkpoint(path, marker):
    names = train_pvs.CHECKPOINT_KEYS
    torch.save(dict.fromkeys(names, Malicious(marker)), path)


def write_truncated(path, marker):
    torch.save({"model": {"weight": torch.ones(10_000)}}, path)
    path.write_bytes(path.read_bytes()[:-1000])


OTHERS = {
    "truncated": write_truncated,
    "empty": lambda path, _: path.write_bytes(b""),
    "text": lambda path, _: path.write_text("weights\n"),
    "JSON": lambda path, _: path.write_text(json.dumps({"model": {}, "config": {}})),
    "zeros": lambda path, _: path.write_bytes(bytes(5000)),
    "folder": lambda path, _: path.mkdir(),
    "pickle that runs code": write_malicious_pickle,
    "checkpoint that runs code": write_malicious_checkpoint,
    "whole model": lambda path, _: torch.save(nn.Conv3d(1, 1, 1), path),
    "state dict": lambda path, _: torch.save(nn.Conv3d(1, 1, 1).state_dict(), path),
    "tensor": lambda path, _: torch.save(torch.ones(3), path),
    "some keys only": lambda path, _: torch.save({"model": {}, "config": {}}, path),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_refused_by_name_and_run_no_code(kind, tmp_path):
    path, marker = tmp_path / "weights.pth", tmp_path / "code was run"
    OTHERS[kind](path, marker)
    with pytest.raises(ValueError, match="expected a checkpoint of this script") as error:
        train_pvs.read_checkpoint(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 400
    assert not marker.exists()


def test_malicious_pickle_does_run_code_elsewhere(tmp_path):
    # So that the test above can fail.
    path, marker = tmp_path / "weights.pth", tmp_path / "code was run"
    write_malicious_checkpoint(path, marker)
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_missing_checkpoint_is_named_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no such file.*train first.*--checkpoint") as error:
        train_pvs.read_checkpoint(tmp_path / "none.pth")
    assert str(tmp_path / "none.pth") in str(error.value)


def test_checkpoint_cut_off_anywhere_is_refused(checkpoint):
    whole = checkpoint.read_bytes()
    for share in (0.001, 0.5, 0.999):
        checkpoint.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"best_model\.pth: expected a checkpoint"):
            train_pvs.read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "overrides", [{"DECODER_WIDTH": 3}, {"ENCODER_DEPTH": 4}, {"ENCODER_NAME": "efficientnet-b1"}]
)
def test_weights_of_another_network_are_refused_by_the_name_of_the_file(
    overrides, checkpoint, tiny_config
):
    content = train_pvs.read_checkpoint(checkpoint)
    other = train_pvs.build_model(tiny_config(**overrides))
    with pytest.raises(ValueError, match="weights do not fit the network") as error:
        train_pvs.load_weights(other, content, checkpoint)
    assert str(checkpoint) in str(error.value)
    assert len(str(error.value)) < len(str(checkpoint)) + 400


@pytest.mark.parametrize("state", [None, 5, "weights", {}, {"weight": 3}])
def test_weights_that_are_none_are_refused_by_the_name_of_the_file(state, model):
    with pytest.raises(ValueError, match=r"mine\.pth: its weights do not fit"):
        train_pvs.load_weights(model, {"model": state}, "mine.pth")


# ----------------------------------------------------------------------------- whose settings count


def command_line(*flags):
    """Return (Config, given settings) of a command line as --evaluate gets it."""
    cfg, options = train_pvs.parse_command_line(["--evaluate", *map(str, flags)])
    return cfg, options.given


def saved_content(tiny_config, **overrides):
    return {"config": train_pvs.asdict(tiny_config()) | overrides}


def test_network_grid_and_windows_are_the_checkpoints_although_config_differs(tiny_config):
    saved = tiny_config(
        PIX_DIM=(0.7, 0.8, 0.9),
        IMG_PATCH_SIZE=(16, 24, 32),
        DECODER_WIDTH=7,
        INTENSITY_PERCENTILES=(1.0, 98.0),
        SW_OVERLAP=0.3,
        SEED=77,
    )
    cfg, given = command_line()
    restored = train_pvs.restore_config({"config": train_pvs.asdict(saved)}, cfg, given)
    for field in train_pvs.fields(train_pvs.Config):
        name, here = field.name, getattr(cfg, field.name)
        is_machines = name in (
            *("OUTPUT_DIR", "CACHE_DIR", "SW_BATCH_SIZE", "SAVE_PROBABILITIES"),
            *("DEVICE", "AMP", "NUM_WORKERS"),
        )
        assert getattr(restored, name) == (here if is_machines else getattr(saved, name)), name
    assert restored.PIX_DIM != cfg.PIX_DIM
    assert restored.ENCODER_NAME == "efficientnet-b0" != cfg.ENCODER_NAME


def test_machine_settings_are_those_of_the_command_line(tiny_config):
    flags = "--output-dir o --cache-dir c --sw-batch-size 9 --save-probabilities --no-amp"
    cfg, given = command_line(*flags.split(), "--device", "cpu", "--num-workers", 3)
    restored = train_pvs.restore_config(saved_content(tiny_config), cfg, given)
    assert (restored.OUTPUT_DIR, restored.CACHE_DIR) == ("o", "c")
    assert (restored.SW_BATCH_SIZE, restored.NUM_WORKERS, restored.DEVICE) == (9, 3, "cpu")
    assert restored.SAVE_PROBABILITIES is True
    assert restored.AMP is False


def test_place_of_the_data_is_the_checkpoints_unless_given(tiny_config):
    content = saved_content(
        tiny_config, DATA_DIR="trained", IMAGE_GLOB="*_FLAIR.nii", LABEL_GLOB="masks/*.nii"
    )
    restored = train_pvs.restore_config(content, *command_line())
    assert (restored.DATA_DIR, restored.IMAGE_GLOB) == ("trained", "*_FLAIR.nii")
    assert restored.LABEL_GLOB == "masks/*.nii"
    flags = ("--data-dir", "new", "--label-glob", "manual/*.nii")
    restored = train_pvs.restore_config(content, *command_line(*flags))
    assert (restored.DATA_DIR, restored.IMAGE_GLOB) == ("new", "*_FLAIR.nii")
    assert restored.LABEL_GLOB == "manual/*.nii"


OTHER_VALUES = {
    "LABEL_RESAMPLING": "soft",
    "CROP_SHIFT": "0.25",
    "EMA_DECAY": "0.9",
    # of what only training can change, other than in TINY
    "TEST_FRACTION": "0.3",
    "VAL_FRACTION": "0.3",
    "SEED": "9",
    "PIX_DIM": "1 1 0.9",
    "INTENSITY_PERCENTILES": "1 99",
    "IMG_PATCH_SIZE": "32 32 32",
    "CROPS_PER_VOLUME": "3",
    "POS_NEG_RATIO": "1",
    "ARCHITECTURE": "dynunet",
    "ENCODER_NAME": "efficientnet-b1",
    "ENCODER_WEIGHTS": "imagenet",
    "ENCODER_DEPTH": "4",
    "DECODER_WIDTH": "3",
    "BATCHNORM_MOMENTUM": "0.2",
    "EPOCHS": "9",
    "BATCH_SIZE": "3",
    "ACCUMULATE_STEPS": "2",
    "LR": "0.5",
    "WEIGHT_DECAY": "0.1",
    "GRAD_CLIP": "3",
    "LR_FACTOR": "0.6",
    "LR_PATIENCE": "4",
    "LR_MIN": "1e-7",
    "VAL_EVERY": "2",
    "EARLY_STOPPING": "5",
    "MAX_MINUTES": "7",
    "SW_OVERLAP": "0.7",
}


def flag_of(name):
    return "--" + name.lower().replace("_", "-")


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_setting_that_only_training_can_change_is_refused_by_name(name, tiny_config):
    cfg, given = command_line(flag_of(name), *OTHER_VALUES[name].split())
    with pytest.raises(ValueError, match=f"{name}: the checkpoint has .*only training") as error:
        train_pvs.restore_config(saved_content(tiny_config), cfg, given)
    assert str(getattr(tiny_config(), name)) in str(error.value)
    assert len(str(error.value).splitlines()) == 2  # a title, and no other setting


def test_every_setting_is_the_machines_or_only_training_can_change_it():
    # These take files, need each other, or take no value: tested on their own.
    own = {"SPLIT", "INIT_FROM", "FOLDS", "FOLD", "HEAD_BIAS_LOG_ODDS", "TUNE_DECISION"}
    names = {*OTHER_VALUES, *train_pvs.NOT_OF_CHECKPOINT, *own}
    assert names == {field.name for field in train_pvs.fields(train_pvs.Config)}


def test_switch_and_split_file_that_differ_are_refused_together(tiny_config, tmp_path):
    split = tmp_path / "split.json"
    split.write_text("{}")
    cfg, given = command_line("--no-head-bias-log-odds", "--split", split, "--lr", 0.5)
    with pytest.raises(ValueError, match="HEAD_BIAS_LOG_ODDS: the checkpoint has True") as error:
        train_pvs.restore_config(saved_content(tiny_config), cfg, given)
    assert "SPLIT: the checkpoint has" in str(error.value)
    assert "LR: the checkpoint has 0.001" in str(error.value)


def test_settings_that_equal_the_checkpoints_may_be_given(tiny_config):
    flags = list(TINY)  # as the run was started
    flags[flags.index("--pix-dim") : flags.index("--pix-dim") + 4] = "--pix-dim 1.0 1 1.00".split()
    cfg, given = command_line(*flags)
    assert {"PIX_DIM", "ENCODER_DEPTH", "HEAD_BIAS_LOG_ODDS"} <= set(given)
    restored = train_pvs.restore_config(saved_content(tiny_config), cfg, given)
    assert restored.PIX_DIM == (1, 1, 1)


def test_recipe_of_the_command_line_does_not_change_the_checkpoints_settings(tiny_config):
    cfg, given = command_line("--recipe", "demo")
    assert cfg.SW_OVERLAP == 0.25 != tiny_config().SW_OVERLAP
    restored = train_pvs.restore_config(saved_content(tiny_config), cfg, given)
    assert restored.SW_OVERLAP == tiny_config().SW_OVERLAP
    assert restored.IMG_PATCH_SIZE == (16, 16, 16)


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"DROPOUT": 0.1, "AUGMENT": True}, ("AUGMENT: in the checkpoint", "DROPOUT: in the")),
        ({"ENCODER_NAME": "resnet34"}, ("ENCODER_NAME: expected efficientnet-b0 to",)),
        ({"PIX_DIM": (1.0, 0.0, 1.0), "LR": 99.0}, ("PIX_DIM: expected", "LR: expected")),
        ({"ENCODER_DEPTH": 9}, ("ENCODER_DEPTH: expected whole numbers from 3 to 5, got 9",)),
        ({"IMG_PATCH_SIZE": (20, 16, 16)}, ("IMG_PATCH_SIZE: expected multiples of 8",)),
        ({"SW_OVERLAP": "half"}, ("SW_OVERLAP: expected numbers from 0 to 0.9, got half",)),
    ],
)
def test_settings_of_a_checkpoint_that_are_unknown_or_out_of_range_are_refused(
    saved, told, tiny_config
):
    with pytest.raises(ValueError, match="wrong settings") as error:
        train_pvs.restore_config(saved_content(tiny_config, **saved), *command_line())
    for words in told:
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1 + len(told)


def test_files_that_only_training_read_need_not_exist_any_more(tiny_config):
    gone = {"SPLIT": "gone.json", "ENCODER_WEIGHTS": "gone.pth"}
    restored = train_pvs.restore_config(saved_content(tiny_config, **gone), *command_line())
    assert (restored.SPLIT, restored.ENCODER_WEIGHTS) == ("gone.json", "gone.pth")


def test_checkpoint_of_an_older_script_without_a_setting_takes_the_default(tiny_config):
    content = saved_content(tiny_config)
    del content["config"]["SAVE_PROBABILITIES"], content["config"]["WEIGHT_DECAY"]
    restored = train_pvs.restore_config(content, *command_line())
    assert restored.WEIGHT_DECAY == train_pvs.Config.WEIGHT_DECAY
