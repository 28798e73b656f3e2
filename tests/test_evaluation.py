"""Rows, summaries and tables of test scores against hand-worked numbers and libraries."""

import csv
import functools
import json
import math
import re
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import train_pvs
from conftest import MACHINE, TINY, save_subject
from running import call, done, draw_nothing


def summarise(values, seed=0):
    """Summarise values of one scan of each subject."""
    rows = [{"participant_id": f"sub-{n}", "score": value} for n, value in enumerate(values)]
    return train_pvs.summarise(rows, "score", seed)


def test_summary_of_hand_worked_values_counts_the_undefined_apart():
    # Mean 12/4; SD of 4 + 1 + 0 + 9 over 4; median between 2 and 3; quartiles at the places 0.75
    # and 2.25 counted from 0: 1 + 0.75 * 1 and 3 + 0.25 * 3.
    expected = {"mean": 3, "sd": 3.5**0.5, "median": 2.5, "q1": 1.75, "q3": 3.75}
    summary = summarise([6, None, 1, 3, 2, None])
    low, high = summary.pop("ci95")
    assert 1 < low < 3 < high < 6
    assert summary == pytest.approx(expected | {"n": 4, "undefined": 2})
    assert [low, high] == summarise([6, 1, 3, 2])["ci95"]
    none = dict.fromkeys([*expected, "ci95"])
    assert summarise(3 * [None]) == none | {"n": 0, "undefined": 3}
    assert summarise([0, None])["mean"] == 0  # known, though it is nothing
    one = {"mean": 5, "sd": 0, "median": 5, "q1": 5, "q3": 5, "n": 1, "undefined": 0}
    assert summarise([5]) == one | {"ci95": None}


def test_interval_of_the_mean_is_scipys_bootstrap_of_subjects_and_seeded():
    values = np.random.default_rng(1).normal(0.7, 0.1, 40).tolist()
    interval = summarise(values, seed=2)["ci95"]
    plain = stats.bootstrap((values,), np.mean, n_resamples=10_000, rng=np.random.default_rng(2))
    assert interval == pytest.approx(tuple(plain.confidence_interval))
    assert interval == summarise(values, seed=2)["ci95"] != summarise(values, seed=3)["ci95"]
    # Scans of one subject go together: one has 20 scans at 0.9, nine have one at 0.50 to 0.58.
    rows = [{"participant_id": "many", "score": 0.9} for _ in range(20)]
    rows += [{"participant_id": f"sub-{n}", "score": 0.5 + n / 100} for n in range(9)]
    summary = train_pvs.summarise(rows, "score", 0)
    assert (summary["mean"], summary["n"]) == (pytest.approx((20 * 0.9 + 9 * 0.54) / 29), 29)
    low, high = summary["ci95"]
    # Resamples without the first subject, 0.9**10 = 35 % of them, have means below 0.58.
    assert low < 0.58 < summary["mean"] < high
    assert train_pvs.summarise(rows[:20], "score", 0)["ci95"] is None  # one subject


def test_agreement_of_hand_worked_burdens():
    # Means 25 and 27; squares around them 500 and 225 + 64 + 36 + 289 = 614, products
    # 225 + 40 + 30 + 255 = 550. Errors 2, -1, 3, 4: mean 2, squares around it 0 + 9 + 1 + 4 = 14.
    result = train_pvs.agreement([10, 20, 30, 40], [12, 19, 33, 44])
    reach = 1.96 * (14 / 3) ** 0.5
    assert result["pearson_r"] == pytest.approx(550 / (500 * 614) ** 0.5)
    assert result["lin_ccc"] == pytest.approx(2 * 550 / (500 + 614 + 4 * (27 - 25) ** 2))
    assert result["bias"] == pytest.approx(2)
    assert result["limits_of_agreement"] == pytest.approx([2 - reach, 2 + reach])
    for count in (1, 2):  # below 3 cases nothing is defined
        assert train_pvs.agreement([10, 20][:count], [12, 19][:count]) == dict.fromkeys(result)
    # Of constant sides the correlation is 0 / 0.
    for constant in (0, 5, 0.1, 0.7):
        varied, equal = 3 * [1, 2, 4, 8], 12 * [constant]
        for pair in ((equal, varied), (varied, equal)):
            result = train_pvs.agreement(*pair)
            json.dumps(result, allow_nan=False)
            assert result["pearson_r"] is None
            assert result["lin_ccc"] == pytest.approx(0)  # covariance 0, but not the variance
        undefined = dict.fromkeys(result) | {"bias": 0, "limits_of_agreement": [0, 0]}  # 0 / 0
        assert train_pvs.agreement(equal, equal) == undefined


METRICS = ("dice", "iou", "precision", "recall")
# Voxels of 0.5 x 2 x 3 mm, 3 mm3, turned by 30 degrees about the third axis, the first flipped.
TURN = nib.eulerangles.euler2mat(math.pi / 6) @ np.diag([-0.5, 2, 3])
AFFINE = nib.affines.from_matvec(TURN, (40, -20, 7))


def test_scores_of_a_hand_worked_case(monkeypatch):
    label, pred = np.zeros((2, 8, 5, 4), bool)
    label[0:3, 0, 0] = label[6, 4, 3] = True  # a chain of 3 voxels and a voxel far off
    pred[1:6, 0, 0] = True  # a chain of 5
    working_label, working_pred = np.zeros((2, 2, 2, 2), bool)
    working_label[0, 0] = True  # 2 voxels
    working_pred[0, 0, 0] = working_pred[1, 1] = True  # 3 voxels, 1 hit
    surfaces = train_pvs.calculate_boundary_metrics(pred, label, np.array([0.5, 2, 3]))
    # All voxels lie on a surface. The far one is 1 x 0.5, 4 x 2 and 3 x 3 mm from the nearest one
    # found; from the reference the distances are 0, 0, 0.5 and this: the 95th percentile is at
    # 0.95 * 3 = 2.85. To the reference they are only 0 to 1.5 mm.
    far = (0.25 + 64 + 81) ** 0.5
    expected = {"name": "sub-7_ses-1", "participant_id": "sub-7", "roundtrip_dice": 0.75}
    # working grid: 2 * 1/(3+2), 1/(3+2-1), 1/3, 1/2
    expected |= {"dice": 2 / 5, "iou": 1 / 4, "precision": 1 / 3, "recall": 1 / 2}
    expected |= {"working_label_voxels": 2, "working_pred_voxels": 3}
    # native grid: 2 hits, 5 found, 4 true
    expected |= {"native_dice": 4 / 9, "native_iou": 2 / 7}
    expected |= {"native_precision": 2 / 5, "native_recall": 2 / 4}
    # the chains share 2 of 3 + 5 - 2 voxels, IoU 1/3; F1 2 * 1/2 * 1 / (3/2)
    for rule in ("any", "iou"):
        expected |= {f"matched_label_{rule}": 1, f"matched_pred_{rule}": 1}
        expected |= {f"lesion_sensitivity_{rule}": 1 / 2, f"lesion_precision_{rule}": 1}
        expected |= {f"lesion_f1_{rule}": 2 / 3}
    expected |= {"count_label": 2, "count_pred": 1, "count_error": -1, "count_error_percent": -50}
    # 4 and 5 voxels of 3 mm3
    expected |= {"volume_ml_label": 0.012, "volume_ml_pred": 0.015, "volume_ml_error": 0.003}
    expected |= {"volume_ml_error_percent": 25, "one_mask_empty": False}
    expected |= {name: surfaces[name] for name in ("nsd_voxel", "nsd_1mm")}
    expected |= {"hd95_mm": 0.5 + 0.85 * (far - 0.5)}
    # 2 of the 5 voxels above are right; all 160 are not below: (2 * 2/5 + 2 * 4/160) / 4.
    expected |= {"average_precision": 0.2125, "cldice": 4 / 9}
    for side in ("label", "pred"):
        expected |= {f"section_count_{side}": 1, f"grade_{side}": 1}
    case = train_pvs.Case("sub-7", "sub-7_ses-1", "scan.nii", roundtrip_dice=0.75)
    volume, affine = torch.from_numpy(working_label)[None], torch.from_numpy(AFFINE)
    entry = {"label": volume, "image": volume, "native_affine": affine, "affine": affine}
    own = {"mine": torch.tensor(2), "none": np.float32("nan")}  # scores that a user adds
    monkeypatch.setattr(train_pvs, "calculate_boundary_metrics", lambda *_: surfaces | own)
    expected |= {"mine": 2, "none": None}
    row = train_pvs.score_case(case, entry, working_pred, 0.5 + 0.3 * pred, pred, label)
    json.dumps(row, allow_nan=False)  # plain numbers
    row = {k: v for k, v in row.items() if not k.startswith(("section_side", "section_z"))}
    assert row == pytest.approx(expected)
    lost = entry | {"label": 0 * volume}  # on the working grid: it counts 0, and not as empty
    row = train_pvs.score_case(case, lost, working_pred & False, 0.5 + 0.3 * pred, pred, label)
    assert [row[name] for name in train_pvs.METRICS] == [0, 0, 0, 0]


def write_constant_network(path, bias, flags):
    """Write a checkpoint of a UNet++ that gives the same logit everywhere."""
    cfg, _ = train_pvs.parse_command_line(["--data-dir", "data", *flags])
    model = train_pvs.build_model(cfg)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(model.segmentation_head[0].bias, bias)
    row = {"epoch": 3, "val_dice": 0.5}
    content = {"model": model.state_dict(), "config": asdict(cfg), "sha256": {}, "history_row": row}
    torch.save(content, path)


# Label boxes of 1 mm voxels. The head fills voxels 8 to 19 of each axis and is predicted with two
# more on each side, 16**3 = 4096 voxels from 6 to 21, as one PVS.
LABELS = {
    "sub-1": [np.s_[10:12, 10:12, 10:15]],  # 20 voxels
    "sub-2": [np.s_[9:19, 9:19, 9:14], np.s_[15:17, 15:17, 16:19]],  # 500 + 12
    "sub-3": [np.s_[12, 12, 12:16], np.s_[12, 22, 10:16]],  # 4, and 6 outside of the box
    "sub-4": [],
}
VOXELS, INSIDE = np.array([20, 512, 10, 0]), np.array([20, 512, 4, 0])


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """Return the JSON, the CSV's rows and the log of a test by a network that knows one word."""
    folder = tmp_path_factory.mktemp("tested")
    for number, (name, boxes) in enumerate(LABELS.items()):
        image, label = np.zeros((2, 28, 30, 26), np.int16)
        image[8:20, 8:20, 8:20] = 400 + number
        for box in boxes:
            label[box] = 1
        save_subject(folder / "heads", name, image, label)
    write_constant_network(folder / "constant.pth", 5.0, [*TINY, "--seed", "9"])
    places = "--data-dir", folder / "heads", "--output-dir", folder / "out", *MACHINE
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        done(call("--evaluate", "--checkpoint", folder / "constant.pth", *places))
    run = train_pvs.Run(folder / "out")
    content = json.loads(run.scores.read_text(), parse_constant=pytest.fail)  # at NaN, no JSON
    table = csv.DictReader(run.table.read_text().splitlines())
    return content, [*table], (run.logs / "evaluate.log").read_text().splitlines()


def test_rows_of_a_whole_test_are_those_worked_out_by_hand(tested):
    rows = tested[0]["subjects"]
    assert [row["name"] for row in rows] == list(LABELS)
    for line, row in zip(tested[1], rows, strict=True):  # the table's and the file's
        cells = [f"{v:.6g}" if isinstance(v, float) else v for v in row.values()]
        cells = ["" if value is None else str(value) for value in cells]
        assert list(line.items()) == list(zip(row, cells, strict=True))
    expected = {
        "dice": 2 * INSIDE / (INSIDE + 4096),
        "native_dice": 2 * INSIDE / (VOXELS + 4096),
        "native_recall": [1, 1, 0.4, 0],
        # What lies outside of the box does not come back: 2 * 4 / (4 + 10).
        "roundtrip_dice": [1, 1, 8 / 14, None],
        **{"count_label": [1, 2, 2, 0], "count_pred": [1, 1, 1, 1]},
        # IoU 500/4096 = 0.12 is enough, 12/4096 and 20/4096 are not.
        "matched_label_iou": [0, 1, 0, 0],
        **{"volume_ml_label": VOXELS / 1000, "volume_ml_pred": 4 * [4.096]},
        "one_mask_empty": [False, False, False, True],
        "count_error_percent": [0, -50, -50, None],
        "volume_ml_error_percent": [*(100 * 4096 / VOXELS[:3] - 100), None],
    }
    got = {key: [row[key] for row in rows] for key in expected}
    assert not {key: got[key] for key in got if got[key] != pytest.approx(list(expected[key]))}


SIDES = "label", "pred", "error", "error_percent"
LESIONS = ("sensitivity", "precision", "f1")
SUMMARISED = {  # place in the file: {name of a summary: column of the rows}
    ("working",): {name: name for name in METRICS},
    ("native",): {name: f"native_{name}" for name in METRICS},
    ("roundtrip",): {"dice": "roundtrip_dice"},
    ("boundary",): {name: name for name in ("nsd_voxel", "nsd_1mm", "hd95_mm")},
    **{("lesions", rule): {n: f"lesion_{n}_{rule}" for n in LESIONS} for rule in ("any", "iou")},
    **{("burden", kind): {n: f"{kind}_{n}" for n in SIDES} for kind in ("count", "volume_ml")},
}


def test_blocks_of_the_file_summarise_its_rows(tested):
    content, rows = tested[0], tested[0]["subjects"]
    assert (content["n"], content["config"]["SEED"], content["device"]) == (4, 9, "cpu")
    assert (content["checkpoint"]["epoch"], content["checkpoint"]["val_dice"]) == (3, 0.5)
    for place, columns in SUMMARISED.items():
        block = functools.reduce(dict.__getitem__, place, content)
        for name, column in columns.items():
            assert block[name] == train_pvs.summarise(rows, column, 9), (place, name)
    for name in METRICS:  # as published
        values = [row[name] for row in rows]
        told = content[f"{name}_mean"], content[f"{name}_std"]
        assert told == pytest.approx((np.mean(values), np.std(values)))
    assert content["grid"] == content["working"]["grid"] == "working grid, RAS, 1 x 1 x 1 mm"
    assert content["native"]["grid"] == "native grid of each scan"
    lesions = content["lesions"]
    assert (lesions["count_label"], lesions["count_pred"], lesions["connectivity"]) == (5, 4, 26)
    matched = [[lesions[r][f"matched_{s}"] for s in ("label", "pred")] for r in ("any", "iou")]
    assert matched == [[4, 3], [1, 1]]
    assert content["boundary"]["one_mask_empty"] == 1
    for name in ("count", "volume_ml"):
        pair = [[row[f"{name}_{side}"] for row in rows] for side in ("label", "pred")]
        assert train_pvs.agreement(*pair).items() <= content["burden"][name].items()
    # Squared differences: 0 + 1 + 9 + 0 = 10; of all pairs (2 * 33 + 19 + 25) / 4 = 27.5 by chance.
    graded = zip(rows, (0, 0, 1, 4), (0, 1, 4, 4), strict=True)
    rows = [row | {"grade_label": a, "grade_pred": b} for row, a, b in graded]
    blocks = train_pvs.summarise_all(rows, train_pvs.Config(**content["config"]))
    assert blocks["rating"]["weighted_kappa"] == pytest.approx(1 - 10 / 27.5)


def test_printed_table_has_all_cases_and_their_summary_in_each_column(tested):
    content, _, log = tested
    names = "Dice IoU precision recall native Dice round trip NSD 1 mm HD95, mm".split()
    columns = (*METRICS, "native_dice", "roundtrip_dice", "nsd_1mm", "hd95_mm")
    (start,) = (n for n, line in enumerate(log) if line.split() == names)
    assert log[start - 2] == "Test scores of 4 scans, heads"
    assert re.search("working grid, RAS, 1 x 1 x 1 mm.*native grid", log[start - 1])
    rows = content["subjects"]
    expected = {row["name"]: [row[column] for column in columns] for row in rows}
    summaries = [train_pvs.summarise(rows, column, 9) for column in columns]
    expected |= {name: [s[name.lower()] for s in summaries] for name in ("mean", "SD")}
    for n, word in enumerate(("from", "to")):
        expected[f"95 % {word}"] = [s["ci95"][n] for s in summaries]
    for line, (name, values) in zip(log[start + 1 : start + 9], expected.items(), strict=True):
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        assert line.startswith(f"{name} ")
        assert line[len(name) :].split() == cells
        assert len(line) == len(log[start])
    # F1 by IoU is 2/3, 0, 0, 0; by overlap 1, 1, 2 * 0.5 * 1 / 1.5, 0. Volumes 0.542 ml of four.
    assert log[start + 9 : start + 12] == [
        "PVS: 5 in the ground truth, 4 predicted; "
        "mean F1 0.6667 (any overlap), 0.1667 (IoU above 0.1)",
        "Mean volume: 0.136 ml in the ground truth, 4.096 ml predicted",
        "Scans where one mask is empty: 1",
    ]
