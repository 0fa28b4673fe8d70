"""From raw answers to accuracy. Rows hold the model's text, so every choice made here can be redone without a model.

A row is one expression in one cell. Columns read here: ref_id; width, height of the original image and x1, y1, x2, y2
of the ground truth in its pixels; raw, the model's text; dialect and frame, how the model writes boxes; tokens and
tokens_full, visual tokens measured after and before pruning; image_id for the intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from analysis.rec.boxes import BOX_FORMATS, CONVENTIONS, PARSINGS, hit
from analysis.rec.boxes import frame as find_frame
from analysis.registry import pick
from analysis.stats import EXPRESSION_ID, rate_interval

SIZE = ["width", "height"]
TRUTH = ["x1", "y1", "x2", "y2"]
PREDICTION = ["px1", "py1", "px2", "py2"]


def _require(table: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [c for c in columns if c not in table]:
        raise ValueError(f"missing columns: {', '.join(missing)}; the table has: {', '.join(map(str, table.columns))}")


def _by_name(names: pd.Series) -> Iterator[tuple[str, np.ndarray]]:
    """Each distinct name with the mask [n] of its rows."""
    names = np.array([str(name) for name in names], dtype=object)  # pandas cannot hold every text
    for name in dict.fromkeys(names):
        yield name, names == name


def _numbers(rows: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    try:
        return rows[columns].to_numpy(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the columns {', '.join(columns)} must hold numbers: {error}") from error


def check_boxes(rows: pd.DataFrame) -> None:
    """Raises ValueError unless every ground-truth box has x1 < x2 and y1 < y2 and lies inside its image (1e-6 px)."""
    _require(rows, ["ref_id", *SIZE, *TRUTH])
    box, size = _numbers(rows, TRUTH), _numbers(rows, SIZE)
    low, high = box[:, :2], box[:, 2:]
    bad = ~((low < high) & (low >= -1e-6) & (high <= size + 1e-6)).all(axis=1)
    if bad.any():
        first = rows[bad].iloc[0]
        raise ValueError(
            f"{bad.sum()} of {len(rows)} ground-truth boxes are empty or outside their image; first: ref_id "
            f"{first['ref_id']}, box {box[bad][0].tolist()} in an image of {first['width']} x "
            f"{first['height']}; expected 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height in pixels"
        )


def _parse(rows: pd.DataFrame, parsing: str) -> np.ndarray:
    """Fractions [n, 4] of the raw answers, NaN where invalid; each distinct text is parsed once."""
    fractions = np.full((len(rows), 4), np.nan)
    for name, here in _by_name(rows["dialect"]):
        parse = pick(PARSINGS, parsing, "parsing")(pick(BOX_FORMATS, name, "dialect"))
        codes, texts = pd.factorize(rows["raw"][here])
        boxes = [parse(text) for text in texts]
        fractions[here] = np.array([np.full(4, np.nan) if box is None else box for box in boxes])[codes]
    return fractions


def score_words(rows: pd.DataFrame) -> pd.DataFrame:
    """A copy of rows whose answer is a word, with correct (the same word, case aside), invalid (no answer), iou NaN.

    Columns read: raw, answer. Raises ValueError where one is missing.
    """
    _require(rows, ["raw", "answer"])
    said = rows["raw"].str.strip().str.lower()
    return rows.assign(iou=np.nan, correct=said == rows["answer"].str.lower(), invalid=said == "")


def score(
    rows: pd.DataFrame, frame: str | None = None, convention: str | None = None, parsing: str = "lenient"
) -> pd.DataFrame:
    """A copy of rows with px1, py1, px2, py2 (predicted pixels, NaN if invalid), iou, correct and invalid.

    frame: the frame the answers are read in, a name in `FRAMES`; None takes each row's own, which is right;
    "original" reproduces lmms-eval. convention: a name in `CONVENTIONS`; None takes the one of each row's dialect.
    parsing: "strict" reads an answer as the dialect's own script does, for comparison with published numbers; "lenient"
    finds a box wherever the answer has one. An invalid answer has iou 0 and is a miss.
    Raises ValueError for missing columns or answers, unknown names and impossible ground truth.
    """
    _require(rows, ["raw", "dialect", *(["frame"] if frame is None else [])])
    check_boxes(rows)
    if convention is not None:
        pick(CONVENTIONS, convention, "IoU convention")
    pick(PARSINGS, parsing, "parsing")
    unanswered = np.array([not isinstance(raw, str) for raw in rows["raw"]], dtype=bool)
    if unanswered.any():
        first = rows[unanswered].iloc[0]
        raise ValueError(
            f"{unanswered.sum()} rows have no raw answer, first: ref_id {first['ref_id']}; an "
            f"empty answer is '', not {first['raw']!r:.60}"
        )
    sizes, truth = rows[SIZE].to_numpy(np.float64), rows[TRUTH].to_numpy(np.float64)
    fractions, pixels = _parse(rows, parsing), np.full((len(rows), 4), np.nan)
    frames = rows["frame"] if frame is None else pd.Series(frame, index=rows.index)
    for name, here in _by_name(frames):
        pixels[here] = find_frame(name).decode(fractions[here], sizes[here])
    overlap, correct = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    for name, here in _by_name(rows["dialect"].map(lambda name: convention or BOX_FORMATS[name].convention)):
        overlap[here], correct[here] = hit(pixels[here], truth[here], name)
    scores = {"iou": overlap, "correct": correct, "invalid": np.isnan(pixels[:, 0])}
    return rows.assign(**dict(zip(PREDICTION, pixels.T)), **scores)


def one_setting(scored: pd.DataFrame) -> str:
    """ "tiny-llava on refstamps val: 1545 expressions, 200 images", for a figure's foot.

    Raises ValueError unless the rows are of one model on one split.
    """
    which = scored[["model", "dataset", "split"]].drop_duplicates()
    if len(which) != 1:
        raise ValueError(f"one model on one split is to be shown, but the rows hold {which.to_dict('records')}")
    model, dataset, split = which.iloc[0]
    n = len(scored.drop_duplicates(EXPRESSION_ID))
    return f"{model} on {dataset} {split}: {n} expressions, {scored['image_id'].nunique()} images"


def percent(table: pd.DataFrame, columns: Sequence[str] = ("accuracy", "low", "high")) -> pd.DataFrame:
    """The table with these shares in per cent, as figures show them."""
    return table.assign(**{c: 100 * table[c] for c in columns})


def summarise(scored: pd.DataFrame, by: Sequence[str], clusters: str = "image_id") -> pd.DataFrame:
    """One row per group of the columns `by`, in order of first appearance; a missing value is a group of its own.

    n expressions, images (distinct clusters), accuracy with low and high (95 % `rate_interval`), mean_iou,
    invalid (share of answers), tokens (mean kept visual tokens), token_share (mean of tokens / tokens_full).
    Raises ValueError for missing columns.
    """
    by = list(by)
    _require(scored, [*by, clusters, "correct", "iou", "invalid", "tokens", "tokens_full"])
    summaries = []
    for key, group in scored.groupby(by, dropna=False, sort=False):
        low, high = rate_interval(group["correct"], group[clusters])
        summaries.append(
            dict(zip(by, key))
            | {
                "n": len(group),
                "images": group[clusters].nunique(),
                "accuracy": group["correct"].mean(),
                "low": low,
                "high": high,
                "mean_iou": group["iou"].mean(),
                "invalid": group["invalid"].mean(),
                "tokens": group["tokens"].mean(),
                "token_share": (group["tokens"] / group["tokens_full"]).mean(),
            }
        )
    return pd.DataFrame(summaries)


def perfect_answers(rows: pd.DataFrame, frame: str = "padded", box_format: str = "llava") -> pd.DataFrame:
    """A copy of rows answered by a model that is always right: raw is the ground truth as it would write it.

    frame, box_format: names in `FRAMES` and `BOX_FORMATS`, for the columns frame and dialect. tokens is 0 and
    tokens_full 1, so that `summarise` takes the rows. Scored in another frame, they measure what reading the wrong
    frame costs.
    Raises ValueError for missing columns, unknown names and impossible ground truth.
    """
    check_boxes(rows)
    encode, write = find_frame(frame).encode, pick(BOX_FORMATS, box_format, "box format").format
    boxes = encode(rows[TRUTH].to_numpy(np.float64), rows[SIZE].to_numpy(np.float64))
    return rows.assign(raw=list(map(write, boxes)), dialect=box_format, frame=frame, tokens=0, tokens_full=1)
