"""A grid, images of noise, and a run of them: what the tests of the engine's rows share."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from analysis.engine.evaluate import cells, evaluate

GRID = cells(["none", "random", "cls_similarity"], [0.25, 0.5], ["method", "shuffled"], ["compact", "original"], 7)


@dataclass(frozen=True)
class Noise:
    """Images of noise, three expressions each; those in `broken` cannot be read."""

    images: int = 5
    broken: tuple = ()
    name: str = "noise"
    split: str = "val"
    version: int = 1

    @property
    def rows(self):
        texts = ["the red cat", "cup", "dog left of the blue cat"]
        return pd.DataFrame(
            [
                dict(
                    image_id=i,
                    ref_id=10 * i + j,
                    sent_id=100 * i + j,
                    expression=text,
                    width=40,
                    height=30 + i,
                    x1=1.0,
                    y1=2.0,
                    x2=20.0,
                    y2=25.0,
                    pixels=1200,
                )
                for i in range(self.images)
                for j, text in enumerate(texts)
            ]
        )

    def image(self, image_id):
        if image_id in self.broken:
            raise UnidentifiedImageError("torn")
        pixels = np.random.default_rng(image_id).integers(0, 256, (30 + image_id, 40, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def digest(self, image_id):
        if image_id in self.broken:
            raise UnidentifiedImageError("torn")
        return f"noise {image_id}, {self.version}"


def run(model, out, grid=GRID, data=Noise(), **options):
    return evaluate(replace(model, max_new_tokens=6), data, grid, out, **{"chunk": 2, "progress": False} | options)
