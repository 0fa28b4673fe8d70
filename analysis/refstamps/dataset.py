"""RefStamps as data sets like any other: `analysis.rec.datasets` loads them by name."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from analysis import keys
from analysis.rec.datasets import IMAGES
from analysis.refstamps.grammar import control_questions, expressions
from analysis.refstamps.scenes import Object, Scene, scene
from analysis.types import RecDataset

BOXES = ("x1", "y1", "x2", "y2", "ox1", "oy1", "ox2", "oy2")  # of the target, and of another object


@lru_cache(maxsize=64)
def stamp_image(split: str, index: int) -> Image.Image:
    return scene(split, index).image


def _drawn(name: str, split: str, rows: list[dict]) -> RecDataset:
    drawn_by = keys.fingerprint(
        [keys.code("analysis.refstamps.scenes"), keys.stamps()]
    )  # the ID says which scene it is
    return RecDataset(
        name,
        split,
        pd.DataFrame(rows),
        lambda image_id: stamp_image(split, int(image_id.split("_")[1])),
        lambda image_id: drawn_by,
    )


def _common(split: str, index: int, what: int | str, sentence: int, text: str, size: tuple[int, int]) -> dict:
    """The columns that every row on a scene has; what: the object or the task that is asked about."""
    image_id = f"{split}_{index:05d}"
    return dict(
        image_id=image_id, ref_id=f"{image_id}_{what}", sent_id=sentence, expression=text, width=size[0], height=size[1]
    )


def _other(drawn: Scene, target: int) -> Object:
    """Of a scene's other objects the one whose sides are most like the target's, by their ratios."""

    def unlike(other: Object) -> float:
        sides = [np.subtract(one.box[2:], one.box[:2]) for one in (other, drawn.objects[target])]
        return float(np.abs(np.log(sides[0] / sides[1])).sum())

    return min((one for number, one in enumerate(drawn.objects) if number != target), key=unlike)


def refstamps(name: str, split: str, limit: int | None = None) -> RecDataset:
    """RefStamps drawn from its seeds: the first `limit` scenes of a split that have an expression of this set."""
    rows, taken, index = [], 0, 0
    bar = tqdm(total=limit or IMAGES, desc=f"{name} {split}", unit="image", leave=False)
    while taken < (limit or IMAGES):
        drawn = scene(split, index)
        said = expressions(drawn, name)
        for sentence, (text, target) in enumerate(said):
            boxes = (*drawn.objects[target].box, *_other(drawn, target).box)
            rows.append(_common(split, index, target, sentence, text, drawn.size) | dict(zip(BOXES, map(float, boxes))))
        taken += bool(said)
        bar.update(bool(said))
        index += 1
    bar.close()
    return _drawn(name, split, rows)


def refstamps_control(name: str, split: str, limit: int | None = None) -> RecDataset:
    """Questions on the first `limit` scenes that need no box: rows with task and answer, and no ground-truth box."""
    rows = []
    for index in tqdm(range(limit or IMAGES), desc=f"{name} {split}", unit="image", leave=False):
        drawn = scene(split, index)
        rows += [
            _common(split, index, task, sentence, question, drawn.size) | dict(task=task, answer=answer)
            for sentence, (task, question, answer) in enumerate(control_questions(drawn))
        ]
    return _drawn(name, split, rows)
