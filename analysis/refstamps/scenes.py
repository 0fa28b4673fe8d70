"""RefStamps scenes: photographs of objects on procedural backgrounds, drawn from a seed.

`scene(split, index)` always draws the same picture. Three rules keep training and evaluation apart:

- Every multiset of stamps belongs to one side by its hash: an evaluation scene's combination of stamps never occurs in
  training, so no scene of an evaluation split has a mirrored, rescaled or re-arranged twin there.
- Each noun has one of nine regions of the canvas, `heldout_region(noun)`, in which it never stands in any split but
  "heldout", whose targets all stand there: that split measures generalisation to unseen noun-by-location pairs.
- In the second edition one stamp of every noun that has three or more, `heldout_stamps()`, is shown in no split but
  "stamps", whose targets all are such stamps: that split measures generalisation to pictures never seen.

The embedded models were trained on the first edition, and evaluation draws it; models for the second, whose objects are
larger, are in training (`analysis.training`), and it will then take the first one's place.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from analysis.refstamps.stamps import Stamp, nouns, picture, stamps

SIZES = ((192, 144), (192, 160), (192, 192), (160, 192), (144, 192))  # width, height in pixels: 4:3 to 3:4
# a scene's seed is (its split's place here, index)
SPLITS = ("train", "val", "testA", "testB", "test", "heldout", "stamps")
EVAL_SHARE = 16  # one combination of stamps in sixteen is kept for evaluation


class Edition(NamedTuple):
    """How scenes are composed.

    objects: per scene, least and most; smallest: longer side of an object as a share of the canvas's longer side, at
    least; largest: at most, by the number of objects; copies: chances of 1, 2 and 3 of a kind; held_out: whether some
    stamps are kept for the split "stamps".
    """

    objects: tuple[int, int]
    smallest: float
    largest: dict[int, float]
    copies: tuple[float, float, float]
    held_out: bool


FIRST = Edition((3, 6), 0.22, {count: 0.46 for count in range(1, 6)} | {6: 0.38}, (0.5, 0.3, 0.2), False)
# On a grid of 16 x 16 tokens an object covers some 10 to 50 of them, so that a quarter of the tokens still shows it.
SECOND = Edition((3, 5), 0.28, {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.44, 5: 0.38}, (0.4, 0.35, 0.25), True)
OVERLAP = 0.12  # largest share of an object's box that another box may cover
MARGIN = 3  # pixels kept free at the border


@dataclass(frozen=True)
class Object:
    """One placed stamp. box: (x1, y1, x2, y2) in pixels, tight around its opaque pixels."""

    stamp: Stamp
    box: tuple[int, int, int, int]

    @property
    def noun(self) -> str:
        return self.stamp.noun

    @property
    def colour(self) -> str:
        return self.stamp.colour

    @property
    def x(self) -> float:
        return (self.box[0] + self.box[2]) / 2

    @property
    def y(self) -> float:
        return (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> int:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class Scene:
    """A picture (RGB; None where only the annotation is carried on) with its objects; size is (width, height)."""

    split: str
    index: int
    size: tuple[int, int]
    objects: tuple[Object, ...]
    image: Image.Image | None = field(repr=False, compare=False)


def rng_for(split: str, index: int, stream: int = 0) -> np.random.Generator:
    """The generator behind one scene (stream 0) or its expressions (stream 1)."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; RefStamps has: {', '.join(SPLITS)}")
    return np.random.default_rng([SPLITS.index(split), index, stream])


def is_eval_combination(chosen: list[int]) -> bool:
    """Whether a multiset of stamps (indices into `stamps()`) belongs to the evaluation side."""
    key = ",".join(sorted(stamps()[i].file for i in chosen))
    return zlib.crc32(key.encode()) % EVAL_SHARE == 0


def region(x: float, y: float, size: tuple[int, int]) -> int:
    """Which ninth of the canvas a point lies in, 0..8 in raster order."""
    return 3 * min(2, int(3 * y / size[1])) + min(2, int(3 * x / size[0]))


def heldout_region(noun: str) -> int:
    return zlib.crc32(noun.encode()) % 9


@cache
def heldout_stamps() -> frozenset[int]:
    """The last stamp of every noun that has three or more, as indices into `stamps()`."""
    of: dict[str, list[int]] = {}
    for i, stamp in enumerate(stamps()):
        of.setdefault(stamp.noun, []).append(i)
    return frozenset(found[-1] for found in of.values() if len(found) >= 3)


@cache
def shown(kind: str | None, held_out: bool) -> dict[str, list[int]]:
    """The stamps that scenes are made of, by noun; kind: None takes all kinds; held_out: leave `heldout_stamps` out."""
    pool: dict[str, list[int]] = {}
    for i, stamp in enumerate(stamps()):
        if kind in (None, stamp.kind) and not (held_out and i in heldout_stamps()):
            pool.setdefault(stamp.noun, []).append(i)
    return pool


def choose(
    rng: np.random.Generator, count: int, kind: str | None, edition: Edition, first: int | None = None
) -> list[int]:
    """Stamp indices of one scene: a few nouns, some of them several times, so that a noun alone often does not do.

    first: the stamp that the scene begins with, which others of its noun may follow.
    """
    pool = shown(kind, edition.held_out)
    names = list(pool)
    chosen: list[int] = [] if first is None else [first]
    while len(chosen) < count:
        again = first is not None and len(chosen) == 1
        noun = stamps()[first].noun if again else names[rng.integers(len(names))]
        copies = 1 + int(rng.choice(3, p=edition.copies)) - again  # 1, 2 or 3 of a kind
        chosen += [int(rng.choice(pool[noun])) for _ in range(copies)]
    return chosen[:count]


def background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Smooth colour noise between two tints, over a gradient, with grain."""
    width, height = size
    tints = rng.integers(40, 230, (2, 3)).astype(np.float32)
    coarse = rng.random((int(rng.integers(2, 7)), int(rng.integers(2, 7))), dtype=np.float32)
    field_ = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    grain = rng.normal(0, float(rng.uniform(0, 10)), (height, width, 1)).astype(np.float32)
    canvas = tints[0] * field_ + tints[1] * (1 - field_) + grain
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def vary(rng: np.random.Generator, index: int, longest: float) -> Image.Image:
    """One stamp flipped, rotated, brightened and scaled so that its longer side is `longest` pixels; cropped tight."""
    image = picture(index)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BICUBIC, expand=True)
    scale = longest / max(image.size)
    image = image.resize([max(4, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.7, 1.25)))
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 60)).getbbox())


def covered(box, other) -> float:
    """The larger of the two shares that two boxes cover of each other."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return width * height / min(areas)


def place(rng, shape, size, taken, noun: str, wanted: bool) -> tuple[int, int, int, int] | None:
    """A free box of `shape` on the canvas, inside (wanted) or outside the noun's held-out region; None if none is
    found."""
    for _ in range(30):
        x = int(rng.integers(MARGIN, size[0] - shape[0] - MARGIN + 1))
        y = int(rng.integers(MARGIN, size[1] - shape[1] - MARGIN + 1))
        box = (x, y, x + shape[0], y + shape[1])
        inside = region(x + shape[0] / 2, y + shape[1] / 2, size) == heldout_region(noun)
        if inside == wanted and all(covered(box, other) <= OVERLAP for other in taken):
            return box
    return None


def scene(split: str, index: int, count: int | None = None, edition: Edition = FIRST) -> Scene:
    """Draw scene `index` of a split. count: number of objects wanted (default: the edition's); training mixes in easy
    ones.

    testA scenes hold people and animals only, testB things only, the others both. In "heldout" the first object
    stands in its noun's held-out region, in "stamps" it is a held-out stamp. Raises ValueError for "stamps" in an
    edition that holds none out.
    """
    rng = rng_for(split, index)
    if split == "stamps" and not edition.held_out:
        raise ValueError("this edition of RefStamps holds no stamps out")
    kind = {"testA": "animate", "testB": "thing"}.get(split)
    while True:
        size = SIZES[rng.integers(len(SIZES))]
        want = count or int(rng.integers(edition.objects[0], edition.objects[1] + 1))
        first = int(rng.choice(sorted(heldout_stamps()))) if split == "stamps" else None
        chosen = choose(rng, want, kind, edition, first)
        if is_eval_combination(chosen) != (split != "train"):
            continue
        placed: list[tuple[int, Image.Image, tuple]] = []
        for i in chosen:
            image = vary(rng, i, float(rng.uniform(edition.smallest, edition.largest[want])) * max(size))
            box = place(
                rng,
                image.size,
                size,
                [p[2] for p in placed],
                stamps()[i].noun,
                wanted=split == "heldout" and not placed,
            )
            if box is None:
                break
            placed.append((i, image, box))
        if len(placed) == want:
            break
    canvas = background(rng, size)
    for _, image, box in placed:
        canvas.paste(image, box[:2], image)
    return Scene(split, index, size, tuple(Object(stamps()[i], box) for i, _, box in placed), canvas)


__all__ = ["SPLITS", "Object", "Scene", "heldout_region", "nouns", "region", "rng_for", "scene"]
