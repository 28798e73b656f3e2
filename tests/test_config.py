"""Settings: what is published, which value wins, edits in the file, and how wrong ones are told."""

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import train_pvs
from conftest import edited_copy
from running import refused
from train_pvs import PUBLISHED, RECIPES, Config, parse_command_line

FIELDS = {field.name: field.default for field in fields(Config)}
SOURCE = Path(train_pvs.__file__).read_text()
COMMENTS = dict(re.findall(r"^    ([A-Z_]+): \w+ = .*  # (.+)$", SOURCE, re.MULTILINE))


def flag_of(name):
    return "--" + name.lower().replace("_", "-")


def words_of(value):
    return [*map(str, value)] if isinstance(value, tuple) else [str(value)]


def test_defaults_are_the_published_values_and_recipes_set_only_fields_of_their_type():
    assert FIELDS == PUBLISHED
    assert (FIELDS["PIX_DIM"], FIELDS["LR"], FIELDS["EPOCHS"]) == ((1.5, 1.5, 1.5), 1e-3, 1000)
    assert list(RECIPES) == ["published", "native", "demo"]
    for recipe in RECIPES:
        cfg, _ = parse_command_line(["--recipe", recipe])
        assert all(type(getattr(cfg, name)) is type(value) for name, value in FIELDS.items())
        differ = {name for name in FIELDS if getattr(cfg, name) != FIELDS[name]}
        assert bool(differ) == (recipe != "published")


def test_every_field_has_a_comment_that_is_the_help_of_its_flag(capsys):
    assert set(COMMENTS) == set(FIELDS)
    with pytest.raises(SystemExit, match=r"^0$"):
        train_pvs.main(["--help"])
    out = "".join(capsys.readouterr().out.split())  # it is wrapped, also at hyphens
    for name, comment in COMMENTS.items():
        shown = " ".join(words_of(FIELDS[name])) or "nothing"
        told = re.escape("".join(f"{comment}; default: {shown}".split()))
        value = "(,--no-[a-z-]+|[^a-z]+)"
        assert re.search(f"{flag_of(name)}{value}{told}(--|$|Exit)", out), name
    for flag in "--check --resume --evaluate --predict --checkpoint --overwrite --demo".split():
        assert flag in out, flag


# Valid values that are not the default, where adding a little does not give one.
OTHER = {"IMG_PATCH_SIZE": (64, 128, 96), "PIX_DIM": (1.0, 2.0, 0.7), "ENCODER_WEIGHTS": "none"}
OTHER |= {"INTENSITY_PERCENTILES": (1.0, 99.0), "ENCODER_NAME": "efficientnet-b1", "FOLD": 2}
OTHER |= {"INIT_FROM": __file__, "SPLIT": __file__, "ENCODER_DEPTH": 4, "FOLDS": 5}
OTHER |= {"ARCHITECTURE": "dynunet", "DEVICE": "cpu", "AUGMENTATION": "native", "TTA_FLIPS": "full"}
OTHER |= {"CACHE_DIR": os.path.abspath("x"), "FLIP_AXES": "xz", "LR_SCHEDULE": "poly"}
OTHER |= {"ENGINE": "openvino"}


def test_flag_reaches_its_field_in_its_type():
    for name, default in FIELDS.items():
        if isinstance(default, bool):
            wanted = not default
            flags = [flag_of(name if wanted else f"NO_{name}")]
        else:
            step = {str: "x", int: 1, float: 0.01}.get(type(default))
            wanted = OTHER[name] if name in OTHER else default + step
            flags = [flag_of(name), *words_of(wanted)]
        also = {"FOLDS": "--fold 1", "FOLD": "--folds 5", "TTA_FLIPS": "--flip-axes x"}
        cfg, _ = parse_command_line([*flags, *also.get(name, "--architecture dynunet").split()])
        assert getattr(cfg, name) == wanted != default, name
        assert type(getattr(cfg, name)) is type(default), name


def test_flag_wins_over_recipe_and_recipe_over_config(monkeypatch):
    flags = "--recipe demo --epochs 7 --no-head-bias-log-odds --pix-dim 0.9".split()
    cfg, _ = parse_command_line(flags)  # one number for three
    assert (cfg.EPOCHS, cfg.HEAD_BIAS_LOG_ODDS, cfg.PIX_DIM) == (7, False, (0.9, 0.9, 0.9))
    assert (cfg.LR, cfg.ENCODER_DEPTH) == (5e-3, 3)  # the recipe's
    assert cfg.WEIGHT_DECAY == 1e-5  # Config's
    cfg, _ = parse_command_line(["--cache-dir", "c"])
    assert os.path.isabs(cfg.CACHE_DIR)
    cfg, options = parse_command_line(["--demo", "--output-dir", "here"])
    assert (cfg.DATA_DIR, options.recipe) == (os.path.abspath("here/data"), "demo")
    monkeypatch.setitem(RECIPES, "first-one", "--recipe=native --lr 1e-4 --epochs 9")
    monkeypatch.setitem(RECIPES, "mine", "--recipe first-one --grad-clip 2")
    cfg, _ = parse_command_line("--recipe mine --epochs 7".split())
    assert cfg.GRAD_CLIP == 2
    assert (cfg.ARCHITECTURE, cfg.LR, cfg.EPOCHS) == ("dynunet", 1e-4, 7)
    monkeypatch.setitem(RECIPES, "first-one", "--recipe mine")
    got = "expected settings, got "
    for wrong, told in (
        *(("--recipe native --overwrite", f"{got}overwrite"), ("--recipe mine", f"{got}--recipe")),
        *(("--recipe first-one", f"{got}--recipe mine"), ("--recipe natve", "argument --recipe: ")),
    ):
        monkeypatch.setitem(RECIPES, "mine", wrong)
        with pytest.raises(ValueError, match=f"^RECIPES: (mine|first-one): {told}"):
            parse_command_line(["--recipe", "mine"])


# What a user may write into Config: the value that is used.
TAKEN = {"PIX_DIM": ("1.0", (1.0, 1.0, 1.0)), "IMG_PATCH_SIZE": ("96", (96, 96, 96))}
TAKEN |= {"DATA_DIR": ('Path("scans") / "mine"', os.path.abspath("scans/mine"))}
TAKEN |= {"OUTPUT_DIR": ('"~/x"', os.path.expanduser("~/x"))}
TAKEN |= {"CACHE_DIR": ('Path("~/x")', os.path.expanduser("~/x"))}
TAKEN |= {"EPOCHS": ("2.0", 2), "BATCH_SIZE": ("np.int64(3)", 3), "LR": ("1", 1.0)}
TAKEN |= {"INTENSITY_PERCENTILES": ("np.array([1, 99])", (1.0, 99.0)), "AMP": ("False", False)}
TAKEN |= {"ENCODER_NAME": ('"efficientnet-" + "b2"', "efficientnet-b2")}


def test_what_is_written_into_config_is_taken_where_it_can_be_meant(tmp_path):
    copy = edited_copy(tmp_path, **{name: text for name, (text, _) in TAKEN.items()})
    cfg, _ = copy.parse_command_line([])
    for name, default in FIELDS.items():
        wanted = TAKEN[name][1] if name in TAKEN else default
        assert getattr(cfg, name) == wanted, name
        assert type(getattr(cfg, name)) is type(wanted), name


WRONG_EDITS = {"AMP": '"no"', "EPOCHS": "2.5", "LR": '"fast"', "PIX_DIM": "(1, 1)", "DEVICE": "0"}
WRONG_EDITS |= {"IMG_PATCH_SIZE": "(96, 96.5, 96)", "INTENSITY_PERCENTILES": "None"}
WRONG_EDITS |= {"SPLIT": "{1: 2, 3: 4}"}
WRONG_EDITS |= {"BATCH_SIZE": "True", "SEED": "None", "DATA_DIR": "5", "TTA_FLIPS": "1"}


def test_wrong_edits_are_told_in_a_line_each(tmp_path, capsys):
    copy = edited_copy(tmp_path, **WRONG_EDITS)
    assert copy.main(["--check", "--output-dir", str(tmp_path / "out")]) == 2
    title, *lines = capsys.readouterr().err.splitlines()
    assert title == "Error: wrong settings:"
    assert all(re.match(r"  [A-Z_]+: expected .+, got .+", line) for line in lines)
    assert sorted(line.split(":")[0].strip() for line in lines) == sorted(WRONG_EDITS)
    assert not (tmp_path / "out").exists()


def test_start_tells_edits_and_where_a_recipe_overrides_them(data, tmp_path, capsys):
    edits = {"GRAD_CLIP": "2.0", "DECODER_WIDTH": "4", "PIX_DIM": "1.0", "IMG_PATCH_SIZE": "64"}
    edits |= {"NUM_WORKERS": "0", "DEVICE": '"cpu"', "ENCODER_WEIGHTS": '"none"', "VAL_EVERY": "5"}
    copy = edited_copy(tmp_path, DATA_DIR=f'Path("{data}")', **edits)
    flags = ["--output-dir", str(tmp_path / "out"), "--encoder-name", "efficientnet-b0"]
    # ENCODER_WEIGHTS, VAL_EVERY: the recipe has the same; DECODER_WIDTH: the flag was meant.
    warning = "Warning: PIX_DIM: edited to 1.0 1.0 1.0 in the file, but the recipe native has"
    warning += " 0.0 0.0 0.0, which is used"
    for recipe, pix_dim, warnings in (
        ([], "1.0 1.0 1.0", []),
        (["--recipe", "native", "--decoder-width", "2"], "0.0 0.0 0.0", [warning]),
    ):
        assert copy.main(["--check", *flags, *recipe]) == 0
        out = capsys.readouterr().out
        assert re.search(rf"^  PIX_DIM +{pix_dim}$", out, re.MULTILINE)
        assert [line for line in out.splitlines() if "edited" in line] == warnings


def test_setting_added_to_a_group_becomes_a_flag(tmp_path, capsys):
    place = "    WEIGHT_DECAY: float = 1e-5  # AdamW's\n"
    new = "    DROPOUT: float = 1  # of features\n    CLASSES = (1, 2)\n    MIXUP = False  # x\n"
    copy = edited_copy(tmp_path, (place, place + new))
    assert {"DROPOUT", "CLASSES", "MIXUP"} <= copy.names(copy.Training)
    cfg, _ = copy.parse_command_line("--dropout 0.5 --classes 3 4 --mixup".split())
    assert (cfg.DROPOUT, cfg.CLASSES, cfg.MIXUP) == (0.5, (3, 4), True)
    assert copy.main(["--dropout", "much"]) == 2
    assert "\n  DROPOUT: expected a number, got much" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        copy.main(["--help"])
    assert re.search(r"--dropout \w+\s+of features; default: 1", capsys.readouterr().out)


WRONG = {  # values that are refused; each by the name of its field, and no other
    "IMG_PATCH_SIZE": ["16 20 16", "-16 16 16", "16 16 2000", "16 16"],  # 2**3 does not divide 20
    "PIX_DIM": ["1 0 1", "inf 1 1", "1 nan 1", "0.05 1 1", "1 1", "21"],
    "INTENSITY_PERCENTILES": ["99 1", "5 5", "-1 99", "1 101", "1"],
    "LR": ["nan", "inf", "-1", "0", "1e400", "fast", "", "9" * 5000],
    "EPOCHS": ["ten", "-5", "0", "1.5", "nan", "1" + "0" * 30],
    "DEVICE": ["", "gpu", "cuda:99", "cuda:x", "cpu:-1", "meta"],
    "ENCODER_NAME": ["no-such-net", "resnet18", "efficientnet-b8", "efficientnet-b0x"],
    **{"TEST_FRACTION": ["1.5", "nan", "0", "1"], "VAL_FRACTION": ["0", "1"]},
    **{"SEED": ["-1", "4294967296"], "BATCH_SIZE": ["2.5", "0"], "CROPS_PER_VOLUME": ["0"]},
    **{"NUM_WORKERS": ["-1", "many"], "GRAD_CLIP": ["inf", "0"], "WEIGHT_DECAY": ["-0.1"]},
    **{"LR_FACTOR": ["1", "0"], "SW_OVERLAP": ["1", "-0.1"], "THRESHOLD": ["0", "1"]},
    **{"FLIP_AXES": ["yx", "all", ""], "LR_SCHEDULE": ["cosine"], "AUGMENTATION": ["none"]},
    **{"SMALLEST_PVS": ["-1"], "MAX_MINUTES": ["-1"], "IMAGE_GLOB": [""], "LABEL_GLOB": [""]},
    **{"FOLDS": ["-2", "1"], "FOLD": ["1", "-1"]},  # without FOLDS
    **{"ENCODER_DEPTH": ["6", "2"], "ARCHITECTURE": ["unet", ""], "ENGINE": ["tensorrt"]},
    **{"INIT_FROM": ["no/such/checkpoint.pth"], "ENCODER_WEIGHTS": ["no/such/weights.pth", "/"]},
    **{"SPLIT": ["no/such/split.json", "/"], "DATA_DIR": ["", " "], "OUTPUT_DIR": ["", " "]},
}


def test_wrong_setting_is_told_by_its_name_before_anything_is_made(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, values in WRONG.items():
        for value in values:
            err = refused(run("--check", flag_of(name), *(value.split() or [value])))
            told = [re.match("  ([A-Z_]+): expected .+, got", ln) for ln in err.splitlines()[1:]]
            assert None not in told, err
            others = {"ENCODER_DEPTH": "IMG_PATCH_SIZE", "FOLDS": "FOLD"}.get(name, name)
            assert {name} <= {match[1] for match in told} <= {name, others}, (name, value[:30], err)
    names = set(WRONG) - {"ENCODER_DEPTH"}  # a wrong one leaves no multiple for IMG_PATCH_SIZE
    flags = [word for name in names for word in (flag_of(name), *(WRONG[name][0].split() or [""]))]
    refused(run("--check", *flags), *(f"\n  {name}: " for name in names))
    for flags, told in {  # what does not go together; 3 halvings would leave one voxel of 8
        "--img-patch-size 8 --encoder-depth 3": "IMG_PATCH_SIZE: expected multiples of 8 from 16",
        "--tta-flips full": "TTA_FLIPS: expected none without FLIP_AXES, got full",
        f"--split {__file__} --folds 5 --fold 1": "SPLIT: expected none together with FOLDS",
        "--folds 5 --fold 6": "FOLD: expected --fold 1 to 5 as well, or all, got 6",
    }.items():
        refused(run("--check", *flags.split()), told)
    assert list(tmp_path.iterdir()) == []


def test_arithmetic_is_of_16_bits_where_the_hardware_gains_from_it_and_is_right(monkeypatch):
    def dtype(device, **overrides):
        return train_pvs.autocast_dtype(torch.device(device), Config(**overrides))

    for native, with_16_bits in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, n=native: (7 + n, 5))
        assert (dtype("cuda"), dtype("cuda", AMP=False)) == (with_16_bits, torch.float32)
    for avx512, amx in ((False, False), (False, True), (True, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda n=avx512: n)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda n=amx: n)
        assert dtype("cpu") == (torch.bfloat16 if avx512 or amx else torch.float32)
        assert dtype("cpu", AMP=False) == torch.float32
    # Features of side 2, of which the weights' gradients are noise, are the last of 16, 8, 4, 2;
    # UNet++ has no dense convolution there.
    found = {
        (name, side): dtype("cpu", ARCHITECTURE=name, ENCODER_DEPTH=3, IMG_PATCH_SIZE=(side, 9, 9))
        for name in ("unetplusplus", "dynunet")
        for side in (16, 24, 32)
    }
    noisy = {key for key, kind in found.items() if kind == torch.float32}
    assert noisy == {("dynunet", 16)}
