"""Scoring against a row-by-row reference and against what a perfect model must get; summaries against plain sums."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.rec.boxes import BOX_FORMATS, CONVENTIONS, FRAMES, hit
from analysis.rec.scoring import PREDICTION, TRUTH, check_boxes, score, summarise
from analysis.stats import rate_interval


def table(n=60, frame="padded", seed=0, wrong=0.0):
    """n expressions on n // 3 images with their true boxes as answers; a share `wrong` are answered with nonsense."""
    rng = np.random.default_rng(seed)
    image = np.arange(n) // 3
    size = rng.integers(300, 640, (n // 3 + 1, 2))[image]
    corner, side = rng.uniform(0, 0.6, (n, 2)), rng.uniform(0.3, 0.4, (n, 2))
    truth = np.concatenate([corner * size, (corner + side) * size], 1)
    raw = [BOX_FORMATS["llava"].format(box) for box in FRAMES[frame].encode(truth, size)]
    raw = [
        ("I cannot see it.", "[0.9, 0.9, 0.1, 0.1]", "[0, 0, 0.01, 0.01]")[i % 3] if rng.random() < wrong else text
        for i, text in enumerate(raw)
    ]
    ids = {"image_id": image, "ref_id": np.arange(n) + 1000, "sent_id": np.arange(n), "expression": "the cat"}
    cell = {"pruner": "none", "keep": None, "order": "method", "ids": "compact", "seed": 0}
    return pd.DataFrame(
        ids
        | dict(zip(TRUTH, truth.T))
        | {
            "width": size[:, 0],
            "height": size[:, 1],
            "raw": raw,
            "dialect": "llava",
            "frame": frame,
            "tokens": 576,
            "tokens_full": 576,
        }
        | cell
    )


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("frame", FRAMES)
def test_a_perfect_model_scores_one_in_its_own_frame(frame, convention):
    scored = score(table(frame=frame), convention=convention)
    assert scored["correct"].all() and not scored["invalid"].any()
    assert scored["iou"].min() > 0.7  # what two decimals lose
    np.testing.assert_allclose(scored[PREDICTION].to_numpy(), scored[TRUTH].to_numpy(), atol=0.0051 * 640)


def test_reading_padded_answers_as_original_loses_accuracy_and_only_off_square():
    """The lmms-eval artefact (protocols, section 0): a perfect padded model is marked down."""
    rows = table(300)
    assert score(rows, frame="original")["correct"].mean() < 0.97 < score(rows)["correct"].mean()
    square = table(60)
    square["height"] = square["width"] = square[["width", "height"]].max(axis=1)
    pd.testing.assert_frame_equal(score(square, frame="original"), score(square, frame="padded"))


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6), convention=st.sampled_from(list(CONVENTIONS)), frame=st.sampled_from([None, *FRAMES])
)
def test_score_is_the_row_by_row_one(seed, convention, frame):
    rows = pd.concat([table(9, "padded", seed, 0.5), table(9, "resized", seed + 1, 0.5)])  # repeated index labels
    rows = rows.sample(frac=1, random_state=seed)
    before = rows.copy()
    scored = score(rows, frame, convention)
    pd.testing.assert_frame_equal(rows, before)  # a copy
    pd.testing.assert_frame_equal(scored[list(rows)], rows)
    for (_, row), (_, got) in zip(rows.iterrows(), scored.iterrows()):
        box = BOX_FORMATS[row["dialect"]].parse(row["raw"])
        assert got["invalid"] == (box is None)
        if box is None:
            assert got["iou"] == 0 and not got["correct"] and got[PREDICTION].isna().all()
        else:
            pixels = FRAMES[frame or row["frame"]].decode(box, [row["width"], row["height"]])
            overlap, correct = hit(pixels, row[TRUTH].to_numpy(float), convention)
            assert got[PREDICTION].tolist() == pixels.tolist()
            assert (got["iou"], got["correct"]) == (overlap, correct)


def test_score_can_be_redone_on_scored_rows_and_takes_no_rows():
    rows = table(30, wrong=0.3)
    pd.testing.assert_frame_equal(score(score(rows, "original", "plus_one")), score(rows))
    empty = score(rows.iloc[:0])
    assert len(empty) == 0 and {*PREDICTION, "iou", "correct", "invalid"} <= set(empty)


def test_score_refuses_bad_input():
    rows = table(6)
    with pytest.raises(ValueError, match="missing columns: raw, frame; the table has: image_id"):
        score(rows.drop(columns=["raw", "frame"]))
    assert score(rows.drop(columns="frame"), frame="padded")["correct"].all()
    with pytest.raises(ValueError, match="missing columns: width"):
        score(rows.drop(columns="width"))
    for column, what in (("dialect", "dialect"), ("frame", "frame")):
        with pytest.raises(ValueError, match=f"unknown {what} 'lava'"):
            score(rows.assign(**{column: "lava"}))
        with pytest.raises(ValueError, match=f"unknown {what} .*nan"):
            score(rows.assign(**{column: np.nan}))
    with pytest.raises(ValueError, match="unknown frame 'pad'; did you mean 'padded'"):
        score(rows, frame="pad")
    with pytest.raises(ValueError, match="unknown IoU convention"):
        score(rows, convention=">=")
    with pytest.raises(ValueError, match="1 rows have no raw answer, first: ref_id 1002; an empty answer is ''"):
        score(rows.assign(raw=[*rows["raw"][:2], None, *rows["raw"][3:]]))


@pytest.mark.parametrize(
    "change",
    [
        {"x1": -1.0},
        {"y1": -0.001},
        {"x2": 1e4},
        {"y2": 1e4},
        {"x2": 0.0, "x1": 0.0},
        {"y1": 50.0, "y2": 40.0},
        {"x1": np.nan},
        {"width": 0},
    ],
)
def test_check_boxes_names_the_first_offender(change):
    rows = table(12)
    check_boxes(rows)
    for column, value in change.items():
        rows[column] = rows[column].astype(float)
        rows.loc[[4, 7], column] = value
    with pytest.raises(ValueError, match=r"^2 of 12 ground-truth boxes .* first: ref_id 1004, box \["):
        score(rows)


def test_check_boxes_allows_the_whole_image():
    rows = table(3).assign(x1=0.0, y1=0.0)
    check_boxes(rows.assign(x2=rows["width"] + 1e-9, y2=rows["height"]))


def test_summarise_counts_by_hand():
    full, pruned = table(9, wrong=0.4), table(9, wrong=0.9, seed=1)
    pruned = pruned.assign(pruner="trim", keep=0.1, tokens=[10, 20, 30] * 3)
    scored = score(pd.concat([pruned, full]))
    summary = summarise(scored, ["pruner", "keep"])
    assert summary["pruner"].tolist() == ["trim", "none"]  # first appearance, and keep = None is a group
    assert summary["keep"].isna().tolist() == [False, True]
    for _, got in summary.iterrows():
        rows = scored[scored["pruner"] == got["pruner"]]
        correct, overlaps = list(rows["correct"]), list(rows["iou"])
        assert (got["n"], got["images"]) == (9, 3)
        assert got["accuracy"] == pytest.approx(sum(correct) / 9)
        assert got["mean_iou"] == pytest.approx(sum(overlaps) / 9)  # invalid answers stay in the denominator
        assert got["invalid"] == pytest.approx(sum(BOX_FORMATS["llava"].parse(t) is None for t in rows["raw"]) / 9)
        assert (got["low"], got["high"]) == rate_interval(rows["correct"], rows["image_id"])
    assert summary["tokens"].tolist() == [20, 576]
    np.testing.assert_allclose(summary["token_share"], [20 / 576, 1])
    assert scored["invalid"].any() and 0 < summary["accuracy"][1] < 1  # the case is not trivial


def test_summarise_clusters_seeds_and_errors():
    scored = score(table(30, wrong=0.5)).assign(folder=np.arange(30) % 2)
    by_image, by_folder = summarise(scored, ["pruner"]), summarise(scored, ["pruner"], clusters="folder")
    assert (by_image["images"][0], by_folder["images"][0]) == (10, 2)
    pd.testing.assert_frame_equal(by_image, summarise(scored, ["pruner"]))
    large = score(table(300, wrong=0.5)).assign(folder=np.arange(300) // 10)
    for clusters in ("image_id", "folder"):
        got = summarise(large, ["pruner"], clusters)
        assert (got["low"][0], got["high"][0]) == rate_interval(large["correct"], large[clusters])
    with pytest.raises(ValueError, match="missing columns: ratio, correct, iou, invalid"):
        summarise(table(3), ["pruner", "ratio"])
