"""Settings: what is published, which value wins, and how wrong ones are refused."""

import errno
import inspect
import json
import os
import re
from dataclasses import fields

import pytest
import torch

import train_pvs
from train_pvs import LIMITS, RECIPES, Config

FIELDS = {field.name: field.default for field in fields(Config)}
PUBLISHED = {
    "IMG_PATCH_SIZE": (96, 96, 96),
    "BATCH_SIZE": 2,
    "CROPS_PER_VOLUME": 4,
    "EPOCHS": 1000,
    "LR": 1e-3,
    "WEIGHT_DECAY": 1e-5,
    "GRAD_CLIP": 1.0,
    "PIX_DIM": (1.5, 1.5, 1.5),
    "EARLY_STOPPING": 100,
    "SEED": 123,
    "OUTPUT_DIR": "outputs_3d",
    "TEST_FRACTION": 0.05,
    "VAL_FRACTION": 0.0526,
    "LR_FACTOR": 0.5,
    "LR_PATIENCE": 5,
    "LR_MIN": 1e-6,
    "SW_OVERLAP": 0.5,
    "POS_NEG_RATIO": 2,
    "ENCODER_NAME": "efficientnet-b7",
    "ENCODER_WEIGHTS": "imagenet",
    "ENCODER_DEPTH": 5,
}


def numbers_of(value):
    """Return the numbers in a setting: none in a word or a switch."""
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]


def flag_of(name):
    return "--" + name.lower().replace("_", "-")


# ---------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_used_beyond_its_check(name):
    source = inspect.getsource(train_pvs).replace(inspect.getsource(train_pvs.check_config), "")
    assert re.search(rf"\bcfg\.{name}\b", source)


def test_exactly_the_numeric_fields_have_limits():
    assert set(LIMITS) == {name for name, value in FIELDS.items() if numbers_of(value)}


@pytest.mark.parametrize("name", LIMITS)
def test_default_lies_within_its_limits(name):
    low, high = LIMITS[name]
    assert all(low <= value <= high for value in numbers_of(FIELDS[name]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_sets_only_fields_of_their_type_and_is_valid(recipe):
    for name, value in RECIPES[recipe].items():
        assert type(value) is type(FIELDS[name])
    cfg, _ = train_pvs.parse_command_line(["--recipe", recipe])
    assert {name: getattr(cfg, name) for name in FIELDS} == FIELDS | RECIPES[recipe]


def test_defaults_are_the_published_values():
    assert {name: FIELDS[name] for name in PUBLISHED} == PUBLISHED


# --------------------------------------------------------------------------------- which value wins


def test_flag_wins_over_recipe_and_recipe_over_config():
    flags = ["--epochs", "7", "--no-head-bias-log-odds", "--pix-dim", "2", "1", "0.7"]
    cfg, options = train_pvs.parse_command_line(["--recipe", "demo", *flags])
    assert (cfg.EPOCHS, cfg.HEAD_BIAS_LOG_ODDS, cfg.PIX_DIM) == (7, False, (2.0, 1.0, 0.7))
    assert (cfg.LR, cfg.ENCODER_DEPTH) == (5e-3, 3)  # the recipe's
    assert cfg.WEIGHT_DECAY == 1e-5  # Config's
    assert options.recipe == "demo"


def test_demo_keeps_its_data_below_the_output_folder():
    cfg, options = train_pvs.parse_command_line(["--demo", "--output-dir", "here"])
    assert (cfg.DATA_DIR, options.recipe) == (os.path.join("here", "data"), "demo")


OTHER = {  # valid values that are not the default, where adding a little does not give one
    "IMG_PATCH_SIZE": (64, 32, 96),
    "PIX_DIM": (1.0, 2.0, 0.7),
    "INTENSITY_PERCENTILES": (1.0, 99.0),
    "ENCODER_NAME": "efficientnet-b1",
    "ENCODER_WEIGHTS": "none",
    "ENCODER_DEPTH": 4,
    "ARCHITECTURE": "dynunet",
    "LABEL_RESAMPLING": "soft",
    "INIT_FROM": __file__,
    "SPLIT": __file__,
    "FOLDS": 5,
    "FOLD": 2,
    "DEVICE": "cpu",
}


@pytest.mark.parametrize("name", FIELDS)
def test_flag_reaches_its_field_in_its_type(name):
    default = FIELDS[name]
    if isinstance(default, bool):
        wanted = not default
        flags = [flag_of(name) if wanted else flag_of("NO_" + name)]
    else:
        step = {str: "x", int: 1, float: 0.01}.get(type(default))
        wanted = OTHER[name] if name in OTHER else default + step
        flags = [flag_of(name), *map(str, wanted if isinstance(wanted, tuple) else [wanted])]
    flags += {"FOLDS": ["--fold", "1"], "FOLD": ["--folds", "5"]}.get(name, [])
    cfg, _ = train_pvs.parse_command_line(flags)
    assert getattr(cfg, name) == wanted != default
    assert type(getattr(cfg, name)) is type(default)


# ----------------------------------------------------------------------------------- wrong settings

WRONG = {
    "LABEL_RESAMPLING": "linear",
    "THRESHOLD": "0",
    "EMA_DECAY": "1",
    "CROP_SHIFT": "0.6",
    "SMALLEST_PVS": "-1",
    "IMG_PATCH_SIZE": "16 20 16",  # 2**3 does not divide 20
    "TEST_FRACTION": "1.5",
    "VAL_FRACTION": "0",
    "INTENSITY_PERCENTILES": "99 1",  # the wrong way round
    "EPOCHS": "ten",
    "BATCH_SIZE": "2.5",
    "CROPS_PER_VOLUME": "0",
    "SEED": "-1",
    "LR": "nan",
    "GRAD_CLIP": "inf",
    "WEIGHT_DECAY": "-0.1",
    "PIX_DIM": "1 0 1",
    "ENCODER_DEPTH": "6",
    "ENCODER_NAME": "no-such-net",
    "ARCHITECTURE": "unet",
    "INIT_FROM": "no/such/checkpoint.pth",
    "ENCODER_WEIGHTS": "no/such/weights.pth",
    "LABEL_GLOB": "",
    "SPLIT": "no/such/split.json",
    "DEVICE": "cuda:99",
}


def flags_for(name):
    return [flag_of(name), *(WRONG[name].split() or [""])]


def expect_refused(result, names, folder):
    status, _, err = result
    assert status == 2
    assert [name for name in names if f"\n  {name}: " not in err] == []
    assert "Traceback" not in err
    assert not folder.exists()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_setting_is_named(run, tmp_path, name):
    result = run("--check", *flags_for(name))
    expect_refused(result, [name], tmp_path / "out")
    others = set(WRONG) - {name, "ENCODER_DEPTH", "IMG_PATCH_SIZE", "ENCODER_WEIGHTS"}
    assert [other for other in others if f"\n  {other}: " in result[2]] == []


def test_all_wrong_settings_are_named_at_once(run, tmp_path):
    names = set(WRONG) - {"ENCODER_DEPTH"}  # a wrong one leaves no multiple for IMG_PATCH_SIZE
    flags = [flag for name in names for flag in flags_for(name)]
    expect_refused(run("--check", *flags), names, tmp_path / "out")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:x", "meta", "hpu", "privateuseone"])
def test_device_that_cannot_compute_is_named(run, tmp_path, device):
    expect_refused(run("--check", "--device", device), ["DEVICE"], tmp_path / "out")


@pytest.mark.parametrize("name", ["DATA_DIR", "OUTPUT_DIR", "IMAGE_GLOB"])
@pytest.mark.parametrize("value", ["", " "])
def test_empty_path_is_named(run, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    expect_refused(run("--check", flag_of(name), value), [name], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("side", [0, 1])
def test_value_just_beyond_a_limit_is_named(name, side, tiny_config):
    beyond = LIMITS[name][side] + (1 if side else -1)
    value = (beyond,) * len(FIELDS[name]) if isinstance(FIELDS[name], tuple) else beyond
    problems = train_pvs.check_config(tiny_config(**{name: value}))
    assert any(problem.startswith(f"{name}: expected ") for problem in problems)


@pytest.mark.parametrize("name", ["resnet18", "mit_b0", "efficientnet-b8", "efficientnet-b0x"])
def test_encoder_that_is_not_efficientnet_b0_to_b7_is_named(run, tmp_path, name):
    expect_refused(run("--check", "--encoder-name", name), ["ENCODER_NAME"], tmp_path / "out")


def test_single_crop_that_ends_as_one_voxel_is_refused(run, tmp_path):
    # 2**3 halvings leave 1 of 8 voxels, and BatchNorm wants more than one value in training.
    flags = ["--check", "--img-patch-size", 8, 8, 8, "--crops-per-volume", 1]
    expect_refused(run(*flags), ["CROPS_PER_VOLUME"], tmp_path / "out")


def test_demo_refuses_a_data_folder(run, tmp_path):
    expect_refused(run("--demo"), ["DATA_DIR"], tmp_path / "out")


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--recipe", "mine"], ["--epoch", "1"]])
def test_unknown_flag_or_recipe_exits_with_2(run, tmp_path, flags):
    status, _, err = run("--check", *flags)
    assert (status, (tmp_path / "out").exists()) == (2, False)
    assert flags[-1] in err or flags[0] in err


def test_wrong_count_of_numbers_exits_with_2(run):
    status, _, err = run("--check", "--pix-dim", 1, 1)
    assert status == 2
    assert "--pix-dim" in err


def test_help_names_every_flag(run):
    status, out, _ = run("--help")
    assert status == 0
    names = ["--demo", "--check", "--overwrite", "--recipe", *map(flag_of, FIELDS)]
    assert [name for name in names if not re.search(rf"{name}\b(?!-)", out)] == []


@pytest.mark.parametrize("exists", [False, True])
def test_no_data_says_how_to_get_them(run, tmp_path, exists):
    if exists:
        (tmp_path / "data").mkdir()
    status, _, err = run("--check")
    assert status == 2
    for word in (str(tmp_path / "data"), "aws s3", "openneuro-py", "datalad", "--demo"):
        assert word in err
    assert "Traceback" not in err
    assert (tmp_path / "out").exists() == exists  # nothing is made for a folder that is not there


# ------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_gpu_computes_in_16_bits(monkeypatch, native, expected):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert train_pvs.autocast_dtype(torch.device("cuda"), Config()) == expected


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_cpu_computes_in_bfloat16_where_it_has_instructions(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    expected = torch.bfloat16 if avx512 or amx else torch.float32
    assert train_pvs.autocast_dtype(torch.device("cpu"), Config()) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_amp_arithmetic_is_float32(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    cfg = Config(AMP=False)
    assert train_pvs.autocast_dtype(torch.device(device), cfg) == torch.float32
    assert not train_pvs.autocast(torch.device("cpu"), cfg)._enabled


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_gpu_where_there_is_one(monkeypatch, available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert train_pvs.choose_device(Config()).type == expected
    assert train_pvs.choose_device(Config(DEVICE="cpu")).type == "cpu"


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_failed_writing_leaves_the_former_file_alone(monkeypatch, tmp_path, name):
    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left")

    train_pvs.write_file(tmp_path / "file", "former")
    monkeypatch.setattr(os, name, fail)
    told = f"{tmp_path / 'file'}: cannot be written (no space left); it takes 3 B, "
    with pytest.raises(OSError, match=re.escape(told)):
        train_pvs.write_file(tmp_path / "file", "new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "former"


def test_written_file_replaces_the_former(tmp_path):
    path = tmp_path / "new" / "file"
    train_pvs.write_file(path, "former")
    train_pvs.write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_json_refuses_nan(tmp_path):
    train_pvs.write_json(tmp_path / "file", {"dice": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        train_pvs.write_json(tmp_path / "file", {"dice": float("nan")})
    assert json.loads((tmp_path / "file").read_text()) == {"dice": 0.5}


def test_decision_is_not_both_given_and_chosen(run, tmp_path):
    status, _, err = run("--tune-decision", "--threshold", 0.3)
    assert status == 2
    assert "THRESHOLD: --tune-decision chooses it; give only one" in err
    assert not (tmp_path / "out").exists()
