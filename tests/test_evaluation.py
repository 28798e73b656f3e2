"""Rows, summaries and tables of test scores against hand-worked numbers and libraries."""

import csv
import json
import math

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import train_pvs


def summarise(values, seed=0):
    """Summarise values of one scan of each subject."""
    rows = [{"subject": f"sub-{n}", "score": value} for n, value in enumerate(values)]
    return train_pvs.summarise(rows, "score", seed)


UNDEFINED = {"mean": None, "sd": None, "median": None, "q1": None, "q3": None, "ci95": None}


def test_summary_of_hand_worked_values():
    # Mean 12/4; SD of 4 + 1 + 0 + 9 over 4; median between 2 and 3; quartiles at the places 0.75
    # and 2.25 counted from 0: 1 + 0.75 * 1 and 3 + 0.25 * 3.
    expected = {"mean": 3, "sd": 3.5**0.5, "median": 2.5, "q1": 1.75, "q3": 3.75}
    summary = summarise([6, 1, 3, 2], seed=0)
    low, high = summary.pop("ci95")
    assert 1 < low < 3 < high < 6
    assert summary == pytest.approx(expected | {"n": 4, "undefined": 0})


def test_summary_says_how_many_values_are_undefined():
    summary = summarise([1, None, 2, 3, 6, None], seed=0)
    known = summarise([1, 2, 3, 6], seed=0)
    assert summary == known | {"n": 4, "undefined": 2}
    assert summarise(3 * [None], seed=0) == UNDEFINED | {"n": 0, "undefined": 3}
    assert summarise([0, None], seed=0)["mean"] == 0  # known, though it is nothing


def test_summary_of_one_or_of_equal_values():
    one = {"mean": 5, "sd": 0, "median": 5, "q1": 5, "q3": 5, "n": 1, "undefined": 0}
    assert summarise([5], seed=0) == one | {"ci95": None}
    equal = summarise(4 * [5], seed=0)
    assert equal == one | {"ci95": [5, 5], "n": 4}


def test_scans_of_one_subject_are_resampled_together():
    # One subject has 20 scans at 0.9, nine have one scan each at 0.50 to 0.58.
    rows = [{"subject": "many", "score": 0.9} for _ in range(20)]
    rows += [{"subject": f"sub-{n}", "score": 0.5 + n / 100} for n in range(9)]
    summary = train_pvs.summarise(rows, "score", 0)
    assert summary["mean"] == pytest.approx((20 * 0.9 + 9 * 0.54) / 29)
    assert summary["n"] == 29
    low, high = summary["ci95"]
    # Resamples without the first subject, 0.9**10 = 35 % of them, have means below 0.58.
    assert low < 0.58 < summary["mean"] < high
    alone = [row | {"subject": f"sub-{n}"} for n, row in enumerate(rows)]
    assert train_pvs.summarise(alone, "score", 0)["ci95"][0] > low  # 29 subjects tell more
    assert train_pvs.summarise(rows[:20], "score", 0)["ci95"] is None  # one subject


def test_interval_of_the_mean_is_scipys_bootstrap_and_seeded():
    values = np.random.default_rng(1).normal(0.7, 0.1, 40).tolist()
    interval = summarise(values, seed=2)["ci95"]
    plain = stats.bootstrap((values,), np.mean, n_resamples=10_000, rng=np.random.default_rng(2))
    assert interval == pytest.approx(tuple(plain.confidence_interval))
    # Of 40 normal values it is nearly the mean and 1.96 standard errors around it.
    reach = 1.96 * np.std(values) / 40**0.5
    assert interval == pytest.approx([np.mean(values) - reach, np.mean(values) + reach], abs=0.004)
    assert interval == summarise(values, seed=2)["ci95"]
    assert interval != summarise(values, seed=3)["ci95"]


def test_agreement_of_hand_worked_burdens():
    # Means 25 and 27; squares around them 500 and 225 + 64 + 36 + 289 = 614, products
    # 225 + 40 + 30 + 255 = 550. Errors 2, -1, 3, 4: mean 2, squares around it 0 + 9 + 1 + 4 = 14.
    result = train_pvs.agreement([10, 20, 30, 40], [12, 19, 33, 44], seed=0)
    reach = 1.96 * (14 / 3) ** 0.5
    assert result["pearson_r"] == pytest.approx(550 / (500 * 614) ** 0.5)
    assert result["lin_ccc"] == pytest.approx(2 * 550 / (500 + 614 + 4 * (27 - 25) ** 2))
    assert result["bias"] == pytest.approx(2)
    assert result["limits_of_agreement"] == pytest.approx([2 - reach, 2 + reach])


def slow_ccc(label, pred):
    """Return Lin's concordance by its formula."""
    mean_label, mean_pred = sum(label) / len(label), sum(pred) / len(pred)
    products, squares = 0.0, len(label) * (mean_label - mean_pred) ** 2
    for true, found in zip(label, pred, strict=True):
        products += (true - mean_label) * (found - mean_pred)
        squares += (true - mean_label) ** 2 + (found - mean_pred) ** 2
    return 2 * products / squares


def slow_r(label, pred):
    return np.corrcoef(label, pred)[0, 1]


@pytest.mark.parametrize("shift", [0, 40])
def test_correlations_and_intervals_agree_with_independent_ones(shift):
    rng = np.random.default_rng(4)
    label = rng.gamma(2, 100, 30)
    pred = 0.8 * label + rng.normal(shift, 40, 30)
    result = train_pvs.agreement(label, pred, seed=5)
    settings = {"paired": True, "n_resamples": 10_000, "vectorized": False}
    for name, function in {"pearson_r": slow_r, "lin_ccc": slow_ccc}.items():
        value = function(label, pred)
        assert result[name] == pytest.approx(value)
        low, high = result[f"{name}_ci95"]
        assert low < value < high
        rng = np.random.default_rng(5)
        plain = stats.bootstrap((label, pred), function, method="percentile", rng=rng, **settings)
        assert (low, high) == pytest.approx(tuple(plain.confidence_interval))
    assert result["lin_ccc"] < result["pearson_r"]
    assert train_pvs.agreement(label, pred, seed=5) == result


def test_subjects_of_equal_means_have_an_interval_of_no_width():
    values = {"a": (3, 5), "b": (4, 4)}  # both means are 4, the scans differ
    rows = [{"subject": name, "score": x} for name, scans in values.items() for x in scans]
    assert train_pvs.summarise(rows, "score", seed=0)["ci95"] == [4, 4]


def test_correlations_have_an_interval_from_ten_cases_on():
    label = np.arange(10.0)
    result = train_pvs.agreement(label, label**2, seed=0)
    assert result["pearson_r_ci95"][0] < result["pearson_r"] < result["pearson_r_ci95"][1]
    result = train_pvs.agreement(label[1:], label[1:] ** 2, seed=0)
    assert result["pearson_r"] > 0.9
    assert result["pearson_r_ci95"] is result["lin_ccc_ci95"] is None


def test_resamples_that_leave_a_correlation_undefined_are_left_out_of_its_interval():
    # Nine pairs of ten are (0, 0): 0.9**10 = 35 % of the resamples hold nothing else.
    label, pred = [*9 * [0], 8], [*9 * [0], 4]
    result = train_pvs.agreement(label, pred, seed=0)
    assert result["pearson_r_ci95"] == pytest.approx([1, 1])
    # With the last pair k times, means 0.8 k and 0.4 k, variances 64 and 16 times p (1 - p) and
    # the covariance 32 times it, p = k / 10: 64 (1 - p) / (80 (1 - p) + 16 p), at most at k = 1.
    low, high = result["lin_ccc_ci95"]
    assert high == pytest.approx(64 * 0.9 / (80 * 0.9 + 16 * 0.1))
    assert 0 <= low < high


@pytest.mark.parametrize("count", [1, 2])
def test_agreement_of_fewer_than_three_subjects_is_undefined(count):
    result = train_pvs.agreement([3, 5][:count], [4, 9][:count], seed=0)
    assert set(result.values()) == {None}
    assert set(result) == set(train_pvs.agreement([3, 5, 6], [4, 9, 9], seed=0))


@pytest.mark.parametrize("constant", [0, 5, 0.1, 0.7])
def test_agreement_with_a_constant_side_has_no_correlation(constant):
    varied, equal = 3 * [1, 2, 4, 8], 12 * [constant]
    for pair in ((equal, varied), (varied, equal)):
        result = train_pvs.agreement(*pair, seed=0)
        json.dumps(result, allow_nan=False)
        assert (result["pearson_r"], result["pearson_r_ci95"]) == (None, None)
        assert result["lin_ccc"] == pytest.approx(0)  # its covariance is 0, its variance is not


@pytest.mark.parametrize("constant", [0, 5, 0.1, 0.7])
def test_agreement_of_two_constant_sides_is_undefined(constant):
    result = train_pvs.agreement(12 * [constant], 12 * [constant], seed=0)
    assert (result["pearson_r"], result["pearson_r_ci95"]) == (None, None)
    assert (result["lin_ccc"], result["lin_ccc_ci95"]) == (None, None)  # 0 / 0
    assert (result["bias"], result["limits_of_agreement"]) == (0, [0, 0])


# Voxels of 0.5 x 2 x 3 mm, 3 mm3, turned by 30 degrees about the third axis, the first flipped.
AFFINE = np.eye(4)
WEIGHTS = {"file": "best_model.pth", "epoch": 3, "val_dice": 0.5}
AFFINE[:3, :3] = [
    [-0.5 * math.cos(math.pi / 6), -2 * math.sin(math.pi / 6), 0],
    [-0.5 * math.sin(math.pi / 6), 2 * math.cos(math.pi / 6), 0],
    [0, 0, 3],
]
AFFINE[:3, 3] = 40, -20, 7


def make_entry(label, roundtrip_dice=0.75):
    """Return of a cache entry what scores need; `label` (H, W, D) on the working grid."""
    label = torch.from_numpy(label.astype(np.uint8))[None]
    affine = torch.from_numpy(AFFINE)
    return {"label": label, "native_affine": affine, "roundtrip_dice": roundtrip_dice}


def make_masks():
    """Return a reference with a chain of 3 voxels and a voxel far off, a chain of 5 as found."""
    label, pred = np.zeros((2, 8, 5, 4), bool)
    label[0:3, 0, 0] = label[6, 4, 3] = True
    pred[1:6, 0, 0] = True
    return label, pred


def test_pvs_that_the_working_grid_has_lost_count_as_missed_there():
    label = np.zeros((8, 5, 4), bool)
    label[2, 2, 2] = True
    case, nothing = {"name": "sub-1", "subject": "sub-1", "image": "scan.nii"}, np.zeros((2, 2, 2))
    row = train_pvs.score_case(case, make_entry(nothing), nothing > 0, label & False, label)
    assert [row[name] for name in train_pvs.METRICS] == [0, 0, 0, 0]
    assert row["native_dice"] == 0
    row = train_pvs.score_case(case, make_entry(nothing), nothing > 0, label & False, label & False)
    assert (row["dice"], row["native_dice"]) == (1, 1)


def test_missed_subject_makes_the_mean_hd95_worse():
    affine = np.diag([0.8, 0.8, 0.8, 1])
    label = np.zeros((30, 30, 30), bool)
    label[5:8, 5, 5] = label[20:22, 9, 9] = True
    found, some = np.roll(label, 1, 0), label.copy()
    some[20:22] = False
    means = []
    for pred in (some, label & False):
        rows = [
            train_pvs.calculate_boundary_metrics(p, label, nib.affines.voxel_sizes(affine))
            | {"subject": subject}
            for subject, p in {"sub-1": found, "sub-2": pred}.items()
        ]
        means.append(train_pvs.summarise(rows, "hd95_mm", seed=0)["mean"])
    # Missed: (0.8 + the diagonal 0.8 * 30 * sqrt(3)) / 2.
    assert means[1] == pytest.approx((0.8 + 0.8 * 30 * 3**0.5) / 2)
    assert means[0] < means[1]


def report_of(spacing):
    return {
        "native_spacing": spacing,
        "roundtrip_dice": 1.0,
        "native_voxels": 5,
        "case": {"image": f"scan-{spacing[2]}.nii"},
    }


@pytest.mark.parametrize(
    ("pix_dim", "factor"),
    [
        ((1.5, 1.5, 1.5), "6.6"),  # (1.5 / 0.8)**3
        ((0.8, 0.8, 0.8), None),
        ((0.4, 0.4, 1.6), "2.0"),  # 1.6 / 0.8 where it is coarser; finer elsewhere gives nothing
    ],
)
def test_coarser_working_grid_is_told_with_its_factor(pix_dim, factor, tiny_config, messages):
    train_pvs.log_grids([report_of([0.8, 0.8, 0.8])], tiny_config(PIX_DIM=pix_dim))
    assert ("coarser than the scans" in messages.text) == (factor is not None)
    if factor:
        assert f"scans, {factor} times in voxel volume" in messages.text
        assert "--pix-dim 0.8 0.8 0.8" in messages.text


def test_spacing_far_from_the_others_is_told(tiny_config, messages):
    reports = [report_of(spacing) for spacing in ([1, 1, 1], [1, 1, 1.4], [1, 1, 1], [1, 1, 1.6])]
    train_pvs.log_grids(reports, tiny_config(PIX_DIM=(1, 1, 1)))
    told = "Warning: scan-1.6.nii has voxels of 1 x 1 x 1.6 mm, far from 1 x 1 x 1 mm"
    assert told not in messages.text  # 1.33 times the median of 1.2
    reports += [report_of([1, 1, 1])] * 2
    train_pvs.log_grids(reports, tiny_config(PIX_DIM=(1, 1, 1)))
    assert told in messages.text
    assert "scan-1.4.nii" not in messages.text


def test_scores_of_a_hand_worked_case():
    label, pred = make_masks()
    working_label, working_pred = np.zeros((2, 2, 2, 2), bool)
    working_label[0, 0] = True  # 2 voxels
    working_pred[0, 0, 0] = working_pred[1, 1] = True  # 3 voxels, 1 hit
    case = {"name": "sub-7_ses-1", "subject": "sub-7", "image": "scan.nii"}
    row = train_pvs.score_case(case, make_entry(working_label), working_pred, pred, label)
    # All voxels lie on a surface. The far one is 1 x 0.5, 4 x 2 and 3 x 3 mm from the nearest one
    # found; from the reference the distances are 0, 0, 0.5 and this: the 95th percentile is at
    # 0.95 * 3 = 2.85. To the reference they are only 0 to 1.5 mm.
    far = (0.25 + 64 + 81) ** 0.5
    surfaces = train_pvs.calculate_boundary_metrics(pred, label, np.array([0.5, 2, 3]))
    assert row == pytest.approx(
        {
            "name": "sub-7_ses-1",
            "subject": "sub-7",
            # working grid: 2 * 1/(3+2), 1/(3+2-1), 1/3, 1/2
            "dice": 2 / 5,
            "iou": 1 / 4,
            "precision": 1 / 3,
            "recall": 1 / 2,
            "working_label_voxels": 2,
            "working_pred_voxels": 3,
            # native grid: 2 hits, 5 found, 4 true
            "native_dice": 4 / 9,
            "native_iou": 2 / 7,
            "native_precision": 2 / 5,
            "native_recall": 2 / 4,
            "roundtrip_dice": 0.75,
            # the chains share 2 of 3 + 5 - 2 voxels, IoU 1/3; F1 2 * 1/2 * 1 / (3/2)
            "count_label": 2,
            "count_pred": 1,
            "matched_label_any": 1,
            "matched_pred_any": 1,
            "lesion_sensitivity_any": 1 / 2,
            "lesion_precision_any": 1,
            "lesion_f1_any": 2 / 3,
            "matched_label_iou": 1,
            "matched_pred_iou": 1,
            "lesion_sensitivity_iou": 1 / 2,
            "lesion_precision_iou": 1,
            "lesion_f1_iou": 2 / 3,
            # 4 and 5 voxels of 3 mm3
            "volume_ml_label": 0.012,
            "volume_ml_pred": 0.015,
            "count_error": -1,
            "count_error_percent": -50,
            "volume_ml_error": 0.003,
            "volume_ml_error_percent": 25,
            "nsd_voxel": surfaces["nsd_voxel"],
            "nsd_1mm": surfaces["nsd_1mm"],
            "hd95_mm": 0.5 + 0.85 * (far - 0.5),
            "one_mask_empty": False,
        }
    )
    json.dumps(row, allow_nan=False)  # plain numbers


def test_errors_in_percent_of_an_empty_reference_are_undefined():
    label, pred = make_masks()
    label[:] = False
    case = {"name": "sub-7", "subject": "sub-7"}
    row = train_pvs.score_case(case, make_entry(label), pred, pred, label)
    assert (row["count_error"], row["count_error_percent"]) == (1, None)
    assert (row["volume_ml_error"], row["volume_ml_error_percent"]) == (pytest.approx(0.015), None)
    assert (row["native_dice"], row["one_mask_empty"]) == (0, True)
    row = train_pvs.score_case(case, make_entry(pred), label, label, pred)  # missed
    assert (row["count_error_percent"], row["volume_ml_error_percent"]) == (-100, -100)


@pytest.fixture
def rows():
    """Rows of six cases: four found in part, one missed, one invented."""
    rng, made = np.random.default_rng(6), []
    for number in range(6):
        label = rng.random((9, 8, 7)) < 0.02 * (1 + number)
        pred = label & (rng.random(label.shape) < 0.7) | (rng.random(label.shape) < 0.01)
        if number == 1:
            pred[:] = False
        if number == 4:
            label[:] = False
        case = {"name": f"sub-{number}, again", "subject": f"sub-{number}"}  # a comma, for the CSV
        entry = make_entry(label[::2], roundtrip_dice=0.6 + 0.05 * number)
        made.append(train_pvs.score_case(case, entry, pred[::2], pred, label))
    return made


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


@pytest.fixture
def written(rows, tiny_config, tmp_path):
    """Return the JSON that the rows give, and the CSV as a list of dicts of text."""
    model = torch.nn.Linear(1, 1)
    blocks = train_pvs.write_test_metrics(
        tmp_path / "logs", rows, WEIGHTS, model, tiny_config(SEED=9)
    )
    text = (tmp_path / "logs" / "comprehensive_test_metrics.json").read_text()
    content = json.loads(text, parse_constant=refuse)
    assert {key: content[key] for key in blocks} == blocks
    with open(tmp_path / "logs" / "test_metrics.csv", newline="") as file:
        return content, list(csv.DictReader(file))


def test_published_scores_are_mean_and_sd_of_the_rows(written, rows):
    content, _ = written
    for name in ("dice", "iou", "precision", "recall"):
        values = [row[name] for row in rows]
        assert content[f"{name}_mean"] == content["working"][name]["mean"]
        assert content[f"{name}_mean"] == pytest.approx(np.mean(values))
        assert content[f"{name}_std"] == pytest.approx(np.std(values))
    assert (content["n"], content["subjects"]) == (6, rows)
    assert (content["device"], content["config"]["SEED"]) == ("cpu", 9)


SUMMARISED = {  # block of the file: {name of a summary: column of the rows}
    "working": {name: name for name in train_pvs.METRICS},
    "native": {name: f"native_{name}" for name in train_pvs.METRICS},
    "roundtrip": {"dice": "roundtrip_dice"},
    "boundary": {name: name for name in ("nsd_voxel", "nsd_1mm", "hd95_mm")},
    **{
        ("lesions", rule): {
            name: f"lesion_{name}_{rule}" for name in ("sensitivity", "precision", "f1")
        }
        for rule in ("any", "iou")
    },
    **{
        ("burden", name): {
            kind: f"{name}_{kind}" for kind in ("label", "pred", "error", "error_percent")
        }
        for name in ("count", "volume_ml")
    },
}


@pytest.mark.parametrize("place", SUMMARISED)
def test_blocks_summarise_their_columns_of_the_rows(place, written, rows):
    block, _ = written
    for key in [place] if isinstance(place, str) else place:
        block = block[key]
    for name, column in SUMMARISED[place].items():
        known = [row[column] for row in rows if row[column] is not None]
        summary = block[name]
        assert summary["n"] + summary["undefined"] == 6
        assert summary["undefined"] == (1 if column.endswith("percent") else 0)  # the empty one
        assert summary["mean"] == pytest.approx(np.mean(known))
        assert summary["sd"] == pytest.approx(np.std(known))
        assert summary["median"] == pytest.approx(np.median(known))
        assert [summary["q1"], summary["q3"]] == pytest.approx(np.quantile(known, (0.25, 0.75)))
        low, high = summary["ci95"]
        assert low < summary["mean"] < high


def test_blocks_name_their_grid_and_count_over_all_cases(written, rows):
    content, _ = written
    working = "working grid, RAS, 1 x 1 x 1 mm"
    assert (content["grid"], content["working"]["grid"]) == (working, working)
    for name in ("native", "roundtrip", "lesions", "burden", "boundary"):
        assert content[name]["grid"] == "native grid of each scan"
    lesions = content["lesions"]
    for side in ("label", "pred"):
        assert lesions[f"count_{side}"] == sum(row[f"count_{side}"] for row in rows) > 0
        for rule in ("any", "iou"):
            expected = sum(row[f"matched_{side}_{rule}"] for row in rows)
            assert lesions[rule][f"matched_{side}"] == expected > 0
    assert lesions["connectivity"] == 26
    assert content["boundary"]["one_mask_empty"] == 2  # the missed and the invented


def test_burden_agrees_over_all_cases(written, rows):
    content, _ = written
    for name in ("count", "volume_ml"):
        label, pred = ([row[f"{name}_{side}"] for row in rows] for side in ("label", "pred"))
        block = content["burden"][name]
        assert block["pearson_r"] == pytest.approx(slow_r(label, pred))
        assert block["lin_ccc"] == pytest.approx(slow_ccc(label, pred))
        assert block["bias"] == pytest.approx(np.mean(pred) - np.mean(label))
        assert block["bias"] == pytest.approx(block["error"]["mean"])


def test_table_has_a_row_a_case_and_empty_cells_where_undefined(written, rows):
    _, table = written
    assert [list(line) for line in table] == 6 * [list(rows[0])]
    assert [line["count_error_percent"] == "" for line in table] == [n == 4 for n in range(6)]
    for line, row in zip(table, rows, strict=True):
        assert line == {key: "" if value is None else str(value) for key, value in row.items()}
        assert float(line["hd95_mm"]) == row["hd95_mm"]  # all digits


def test_one_case_is_written_without_intervals(rows, tiny_config, tmp_path):
    train_pvs.write_test_metrics(tmp_path, rows[:1], WEIGHTS, torch.nn.Linear(1, 1), tiny_config())
    text = (tmp_path / "comprehensive_test_metrics.json").read_text()
    content = json.loads(text, parse_constant=refuse)
    assert content["native"]["dice"]["ci95"] is None
    assert (content["dice_mean"], content["dice_std"]) == (rows[0]["dice"], 0)
    assert content["burden"]["count"]["pearson_r"] is None


def printed(messages):
    """Return the lines of the printed table."""
    return "\n".join(messages.messages).splitlines()


def cells(lines, name):
    """Return the cells of the last line that begins with the name."""
    (*_, line) = (line for line in lines if line.startswith(f"{name} "))
    return line[len(name) :].split()


def test_printed_table_has_all_cases_and_their_summary_in_each_column(
    rows, tiny_config, tmp_path, messages
):
    cfg = tiny_config(DATA_DIR=str(tmp_path))
    train_pvs.log_test_table(rows, train_pvs.aggregate(rows, cfg), cfg)
    lines = printed(messages)
    assert tmp_path.name in "".join(lines)
    assert any("working grid, RAS, 1 x 1 x 1 mm" in li and "native grid" in li for li in lines)
    titles = ("Dice", "IoU", "precision", "recall")
    titles += ("native Dice", "round trip", "NSD 1 mm", "HD95, mm")
    (header,) = (line for line in lines if line.split() == " ".join(titles).split())
    columns = ("dice", "iou", "precision", "recall")
    columns += ("native_dice", "roundtrip_dice", "nsd_1mm", "hd95_mm")
    for row in rows:
        assert cells(lines, row["name"]) == [f"{row[column]:.4f}" for column in columns]
    for place, column in enumerate(columns):
        values = [row[column] for row in rows]
        interval = stats.bootstrap(
            (values,), np.mean, n_resamples=10_000, rng=np.random.default_rng(cfg.SEED)
        ).confidence_interval
        assert cells(lines, "mean")[place] == f"{np.mean(values):.4f}"
        assert cells(lines, "SD")[place] == f"{np.std(values):.4f}"
        assert cells(lines, "95 % from")[place] == f"{interval.low:.4f}"
        assert cells(lines, "95 % to")[place] == f"{interval.high:.4f}"
    table = lines[lines.index(header) : lines.index(header) + 11]  # 6 cases and 4 lines below
    assert {len(line) for line in table} == {len(header)}


def test_printed_table_tells_of_all_pvs_and_volumes(rows, tiny_config, messages):
    cfg = tiny_config()
    train_pvs.log_test_table(rows, train_pvs.aggregate(rows, cfg), cfg)
    counts, volumes, empty = printed(messages)[-3:]
    label, pred = (sum(row[f"count_{side}"] for row in rows) for side in ("label", "pred"))
    any_f1, iou_f1 = (
        np.mean([row[f"lesion_f1_{rule}"] for row in rows]) for rule in ("any", "iou")
    )
    told = f"{label} in the ground truth, {pred} predicted"
    rules = f"mean F1 {any_f1:.4f} (any overlap), {iou_f1:.4f} (IoU above 0.1)"
    assert counts == f"PVS: {told}; {rules}"
    label, pred = (
        np.mean([row[f"volume_ml_{side}"] for row in rows]) for side in ("label", "pred")
    )
    told = f"{label:.3f} ml in the ground truth, {pred:.3f} ml predicted"
    assert volumes == f"Mean volume: {told}"
    assert empty == "Scans where one mask is empty: 2"


def test_printed_table_of_one_case_has_no_interval(rows, tiny_config, messages):
    cfg = tiny_config()
    train_pvs.log_test_table(rows[:1], train_pvs.aggregate(rows[:1], cfg), cfg)
    assert cells(printed(messages), "95 % from") == 8 * ["-"]
    assert cells(printed(messages), "mean") == cells(printed(messages), rows[0]["name"])


def make_burden(label, pred):
    """Return rows with counts and volumes (a tenth as many ml) and the block of their agreement."""
    rows = [
        {
            "count_label": true,
            "count_pred": found,
            "volume_ml_label": true / 10,
            "volume_ml_pred": found / 10,
        }
        for true, found in zip(label, pred, strict=True)
    ]
    tenth = [[number / 10 for number in side] for side in (label, pred)]
    agree = train_pvs.agreement
    return rows, {"count": agree(label, pred, 0), "volume_ml": agree(*tenth, 0)}


@pytest.fixture
def drawn(monkeypatch, tiny_config):
    """Return a function that draws burdens and gives what each panel holds, and the title."""
    panels, titles = [], []

    def write_figure(path, figure, title):
        titles.append(title)
        for ax in figure.axes:
            points = [line for line in ax.lines if line.get_marker() == "o"]
            others = [line for line in ax.lines if line.get_marker() != "o"]
            legend = [text.get_text() for text in ax.get_legend().texts] if ax.get_legend() else []
            panels.append(
                {
                    "points": [line.get_xydata() for line in points],
                    "lines": [line.get_xydata() for line in others],
                    "title": ax.get_title(),
                    "legend": " ".join(legend),
                    "limits": (ax.get_xlim(), ax.get_ylim()),
                    "axes": (ax.get_xlabel(), ax.get_ylabel()),
                }
            )
        plt.close(figure)

    def draw(label, pred):
        rows, burden = make_burden(label, pred)
        train_pvs.draw_agreement("agreement.jpg", rows, burden, tiny_config())
        return panels, titles[0]

    monkeypatch.setattr(train_pvs, "write_figure", write_figure)
    return draw


def heights(panel):
    """Return the heights of a panel's lines, all of them level."""
    for line in panel["lines"]:
        assert line[0, 1] == line[1, 1]
    return sorted(line[0, 1] for line in panel["lines"])


def test_agreement_figure_shows_points_identity_bias_and_limits(drawn):
    panels, title = drawn([10, 20, 30, 40], [12, 19, 33, 44])
    reach = 1.96 * (14 / 3) ** 0.5  # see the hand-worked burdens above; the bias is 2
    assert len(panels) == 4
    for (scatter, difference), scale in ((panels[:2], 1), (panels[2:], 0.1)):
        truth = scale * np.array([[10, 12], [20, 19], [30, 33], [40, 44]])
        np.testing.assert_allclose(scatter["points"], [truth])
        (identity,) = scatter["lines"]
        np.testing.assert_allclose(identity[:, 0], identity[:, 1])
        assert identity[0, 0] == 0
        assert identity[1, 0] == scatter["limits"][0][1] == scatter["limits"][1][1] > 44 * scale
        # Means of both, and predicted minus true.
        apart = scale * np.array([[11, 2], [19.5, -1], [31.5, 3], [42, 4]])
        np.testing.assert_allclose(difference["points"], [apart])
        expected = scale * np.array([2 - reach, 0, 2, 2 + reach])
        assert heights(difference) == pytest.approx(expected)
        assert "bias" in difference["legend"]
        assert "limits of agreement" in difference["legend"]
        # r = 550 / sqrt(500 * 614) = 0.9926, concordance 1100 / 1130 = 0.9735
        assert "r 0.993, concordance 0.973" in scatter["title"]
        assert ["ground truth" in words for words in scatter["axes"]] == [True, False]
    assert "Number of PVS" in panels[0]["title"]
    assert "Volume of PVS" in panels[2]["title"]
    assert [words[-2:] for words in panels[2]["axes"]] == ["ml", "ml"]
    assert "4 test cases, native grid" in title
    assert "no statistics" not in title


def test_agreement_figure_of_two_cases_has_points_and_no_statistics(drawn):
    panels, title = drawn([10, 20], [12, 19])
    np.testing.assert_allclose(panels[0]["points"], [[[10, 12], [20, 19]]])
    np.testing.assert_allclose(panels[1]["points"], [[[11, 2], [19.5, -1]]])
    assert heights(panels[1]) == [0]
    assert panels[1]["legend"] == ""
    assert "concordance" not in panels[0]["title"]
    assert "2 test cases" in title
    assert "no statistics" in title


def test_agreement_figure_of_a_constant_burden_names_no_correlation(drawn):
    panels, _ = drawn([5, 5, 5], [4, 5, 9])
    assert panels[0]["title"] == "Number of PVS, concordance 0.000"
    # errors -1, 0, 4: mean 1, squares around it 4 + 1 + 9 = 14, SD the root of 7
    reach = 1.96 * 7**0.5
    assert heights(panels[1]) == pytest.approx([1 - reach, 0, 1, 1 + reach])


@pytest.mark.parametrize("burdens", [([0, 0, 0], [0, 0, 0]), ([31], [27]), ([0], [0])])
def test_agreement_figure_can_be_drawn_of_nothing_and_of_one_case(burdens, tiny_config, tmp_path):
    path = tmp_path / "agreement.jpg"
    train_pvs.draw_agreement(path, *make_burden(*burdens), tiny_config())
    picture = Image.open(path)
    assert (picture.format, picture.size, picture.info["dpi"]) == ("JPEG", (3000, 2700), (300, 300))
    assert plt.get_fignums() == []
