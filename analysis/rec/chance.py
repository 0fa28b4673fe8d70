"""What an answer is worth that has not looked at the image, and what a miss has hit instead."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.rec.boxes import BOX_FORMATS, hit
from analysis.rec.boxes import frame as find_frame
from analysis.rec.scoring import PREDICTION, SIZE, TRUTH
from analysis.registry import pick
from analysis.stats import EXPRESSION_ID


def chance(rows: pd.DataFrame, frame: str = "padded", convention: str | None = None, most: int = 1000) -> float:
    """Share of hits when each expression is answered with the right box of an expression about another image.

    The answerer knows the data set, in fractions of the image as `frame` has them, and nothing of the image. The mean
    over all pairs, exact where the data set (each expression counted once) has at most `most` expressions, else over
    the pairs of that many, drawn with a fixed seed. convention: a name in `CONVENTIONS`; None takes the first row's
    dialect's ("ge" where the rows have none). NaN for a single image.
    rows: ref_id, sent_id, image_id, width, height, x1, y1, x2, y2. Raises ValueError for an unknown name.
    """
    if convention is None:
        convention = pick(BOX_FORMATS, rows["dialect"].iloc[0], "dialect").convention if "dialect" in rows else "ge"
    one = rows.drop_duplicates(EXPRESSION_ID)
    one = one.sample(min(most, len(one)), random_state=0)
    sizes, truth = one[SIZE].to_numpy(np.float64), one[TRUTH].to_numpy(np.float64)
    images, layout = pd.factorize(one["image_id"])[0], find_frame(frame)
    answers, hits, pairs = layout.encode(truth, sizes), 0, 0
    for image, size, box in zip(images, sizes, truth):
        others = images != image
        hits += hit(layout.decode(answers[others], size), box, convention)[1].sum()
        pairs += others.sum()
    return float(hits / pairs) if pairs else np.nan


def chances(scored: pd.DataFrame) -> pd.Series:
    """`chance` of each data set and split in the rows, each in its rows' own frame; index: dataset, split."""
    return pd.Series(
        {key: chance(here, here["frame"].iloc[0]) for key, here in scored.groupby(["dataset", "split"], sort=False)},
        dtype=float,
    )


def other_objects(scored: pd.DataFrame) -> pd.Series:
    """Whether each answer of `rec.scoring.score` is a miss that hits another object of its image (IoU at least 0.5).

    Objects are those that an expression of the rows is about. Index as that of scored.
    """
    found = np.zeros(len(scored), dtype=bool)
    objects = scored.drop_duplicates(["dataset", "split", "image_id", *TRUTH])
    objects = {key: part[TRUTH].to_numpy(float) for key, part in objects.groupby(["dataset", "split", "image_id"])}
    for key, here in scored.reset_index(drop=True).groupby(["dataset", "split", "image_id"]):
        said, truth = here[PREDICTION].to_numpy(float), here[TRUTH].to_numpy(float)
        hits = hit(said[:, None], objects[key][None])[1] & (objects[key][None] != truth[:, None]).any(-1)
        found[here.index] = hits.any(1)
    return pd.Series(found, scored.index) & ~scored["correct"]
