"""Data sets for referring-expression comprehension, each as one tidy frame and a way to get an image.

"refstamps", "refstamps+" and "refstampsg" (the embedded default, drawn from seeds) mirror RefCOCO, RefCOCO+ and
RefCOCOg: splits val, testA (people and animals), testB (things), for g val and test; "heldout" holds noun-by-location
pairs that training never shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from ..registry import pick
from ..testbed.grammar import expressions
from ..testbed.scenes import scene

IMAGES = 1500  # images of a whole RefStamps split, as in RefCOCO val
SPLITS = {
    "refstamps": ("val", "testA", "testB", "heldout"),
    "refstamps+": ("val", "testA", "testB", "heldout"),
    "refstampsg": ("val", "test"),
}


@dataclass(frozen=True)
class RecDataset:
    """One split. rows: one per expression, with image_id, ref_id (the object), sent_id, expression, width, height and the
    ground truth x1, y1, x2, y2 in pixels of the original image; image(image_id) gives the RGB picture."""

    name: str
    split: str
    rows: pd.DataFrame
    image: Callable[[str], Image.Image]


@lru_cache(maxsize=64)
def stamp_image(split: str, index: int) -> Image.Image:
    return scene(split, index).image


def refstamps(name: str, split: str, limit: int | None = None) -> RecDataset:
    """RefStamps drawn from its seeds: the first `limit` scenes of a split that have an expression of this set."""
    rows, taken, index = [], 0, 0
    bar = tqdm(total=limit or IMAGES, desc=f"{name} {split}", unit="image", leave=False)
    while taken < (limit or IMAGES):
        drawn = scene(split, index)
        said = expressions(drawn, name)
        for sentence, (text, target) in enumerate(said):
            box = drawn.objects[target].box
            rows.append(dict(image_id=f"{split}_{index:05d}", ref_id=f"{split}_{index:05d}_{target}", sent_id=sentence,
                             expression=text, width=drawn.size[0], height=drawn.size[1],
                             **dict(zip(("x1", "y1", "x2", "y2"), map(float, box)))))
        taken += bool(said)
        bar.update(bool(said))
        index += 1
    bar.close()
    return RecDataset(name, split, pd.DataFrame(rows), lambda image_id: stamp_image(split, int(image_id.split("_")[1])))


def load(dataset: str, split: str, limit: int | None = None) -> RecDataset:
    """A data set by name; limit: number of images (None: all).

    Raises ValueError for an unknown data set or split and for a limit below one.
    """
    splits = pick(SPLITS, dataset, "data set")
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}; it has: {', '.join(splits)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is the number of images and must be at least 1, got {limit}")
    return refstamps(dataset, split, limit)
