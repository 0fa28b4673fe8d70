"""Boxes: how a model writes them (box format), in which image it means them (frame), and when two agree (IoU).

A box is float64 [..., 4] = x1, y1, x2, y2 with the origin at the top left; a size is [..., 2] = width, height in
pixels of the original image. Leading dimensions broadcast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from math import ceil, floor, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.registry import pick

Boxes = NDArray[np.float64]


class Frame(NamedTuple):
    """The image a model's fractions refer to; a box beyond that image becomes fractions outside 0..1, unclipped.

    encode(boxes_px [..., 4], sizes [..., 2]) -> fractions [..., 4]; decode is its inverse. In "resized_pixels" the
    numbers are pixels of that image, not fractions.
    """

    encode: Callable[[ArrayLike, ArrayLike], Boxes]
    decode: Callable[[ArrayLike, ArrayLike], Boxes]


def touched(box: Sequence[float], rows: int, columns: int) -> tuple[slice, slice]:
    """The rows and columns of a grid whose cells a box of fractions shares an area with; at least one of each."""

    def span(low: float, high: float, count: int) -> slice:
        first = min(max(floor(low * count + 1e-9), 0), count - 1)
        return slice(first, max(first + 1, min(ceil(high * count - 1e-9), count)))

    return span(box[1], box[3], rows), span(box[0], box[2], columns)


def _twice(xy: NDArray) -> NDArray:
    return np.concatenate([xy, xy], axis=-1)


def _stretch(sizes: ArrayLike) -> tuple[Boxes, float]:
    """Scale and offset [..., 4] of an image whose two axes are resized separately."""
    return _twice(np.asarray(sizes, dtype=np.float64)), 0.0


def _pad(sizes: ArrayLike) -> tuple[Boxes, Boxes]:
    """Scale and offset [..., 4] of an image centred in a square; whole-pixel offsets, as the padding of pixels has."""
    sizes = np.asarray(sizes, dtype=np.float64)
    side = sizes.max(axis=-1, keepdims=True)
    return side, _twice((side - sizes) // 2)


def _frame(layout: Callable[[ArrayLike], tuple]) -> Frame:
    def encode(boxes_px: ArrayLike, sizes: ArrayLike) -> Boxes:
        scale, offset = layout(sizes)
        return (np.asarray(boxes_px, dtype=np.float64) + offset) / scale

    def decode(fractions: ArrayLike, sizes: ArrayLike) -> Boxes:
        scale, offset = layout(sizes)
        return np.asarray(fractions, dtype=np.float64) * scale - offset

    return Frame(encode, decode)


def resized_to_tokens(size: tuple[float, float], side: int, fewest: int, most: int) -> tuple[int, int]:
    """Width and height that Qwen2.5-VL resizes an image of this size to.

    Multiples of a token's `side`, the nearest ones, halves to even, as long as the area is within `fewest` and `most`
    pixels; else both sides are first scaled to that bound, then rounded down or up. Raises ValueError for an image more
    than 200 times as long as wide.
    """
    width, height = size
    if max(size) > 200 * min(size):
        raise ValueError(
            f"an image of {width:g} x {height:g} pixels is too thin; at most a side is 200 times the other"
        )
    wide, high = (round(length / side) * side for length in size)
    if wide * high > most:
        scale = sqrt(width * height / most)
        wide, high = (max(side, floor(length / scale / side) * side) for length in size)
    elif wide * high < fewest:
        scale = sqrt(fewest / (width * height))
        wide, high = (ceil(length * scale / side) * side for length in size)
    return wide, high


def _resized_pixels(side: int, fewest: int, most: int) -> Frame:
    """Pixels of the image that `resized_to_tokens` makes; see there for the arguments."""

    def ratio(sizes: ArrayLike) -> Boxes:
        sizes = np.asarray(sizes, dtype=np.float64)
        flat = sizes.reshape(-1, 2)
        known = {size: resized_to_tokens(size, side, fewest, most) for size in set(map(tuple, flat.tolist()))}
        made = np.array([known[size] for size in map(tuple, flat.tolist())], dtype=np.float64)
        return _twice((made.reshape(flat.shape) / flat).reshape(sizes.shape))

    return Frame(
        lambda boxes_px, sizes: np.asarray(boxes_px, dtype=np.float64) * ratio(sizes),
        lambda boxes, sizes: np.asarray(boxes, dtype=np.float64) / ratio(sizes),
    )


# "resized" and "original" compute the same. Two names because they claim different things: "resized" is what a model
# that sees the plainly resized image answers in; "original" is what lmms-eval assumes of every model, padded or not.
FRAMES: dict[str, Frame] = {
    "padded": _frame(_pad),  # LLaVA-1.5, Shikra
    "resized": _frame(_stretch),  # MiniGPT-v2
    "original": _frame(_stretch),
}


def frame(name: str) -> Frame:
    """The frame of a name in `FRAMES`, or "resized_pixels:side,fewest,most" of a model that answers in pixels of its
    own resized image (Qwen2.5-VL; see `resized_to_tokens`). Raises ValueError for any other."""
    base, colon, written = str(name).partition(":")
    if base != "resized_pixels":
        return pick(FRAMES, name, "frame")
    numbers = re.fullmatch(r"([1-9][0-9]{0,8}),([0-9]{1,9}),([1-9][0-9]{0,9})", written)
    if not colon or not numbers:
        raise ValueError(
            f"'resized_pixels' needs a token's side and the fewest and most pixels, as in "
            f"'resized_pixels:28,3136,1003520', got {name!r:.80}"
        )
    return _resized_pixels(*map(int, numbers.groups()))


class BoxFormat(NamedTuple):
    """How a model writes a box of fractions: format(box [4]) -> text; parse(text) -> box [4], None if invalid.

    convention: when upstream counts it as correct, a name in `CONVENTIONS`; strict: `parse` as the script does it whose
    numbers were published, which takes boxes outside 0..1 and inverted ones as they are.
    """

    format: Callable[[ArrayLike], str]
    parse: Callable[[str], Boxes | None]
    convention: str
    strict: Callable[[str], Boxes | None]


# Possessive quantifiers: no backtracking, so any text takes linear time.
_NUMBER = r"\s*+([-+]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))\s*+"
_BRACKETED = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")
_BRACES = re.compile(r"\{" + r"\s*+<\s*+([0-9]{1,3})\s*+>" * 4 + r"\s*+\}")


def _clipped(box: ArrayLike) -> Boxes:
    """Fractions [4] clipped to 0..1. ValueError unless four finite numbers."""
    box = np.asarray(box, dtype=np.float64)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"a box is four finite numbers x1, y1, x2, y2, not {box.tolist()}")
    return abs(box.clip(0, 1))  # abs: -0.0 would print its sign


def format_llava(box: ArrayLike) -> str:
    """[0.12, 0.34, 0.56, 0.78]: fractions [4] clipped to 0..1, two decimals. ValueError unless four finite numbers."""
    return "[" + ", ".join(f"{x:.2f}" for x in _clipped(box)) + "]"


def format_shikra(box: ArrayLike) -> str:
    """Answer: [0.123,0.345,0.567,0.789] . : as `format_llava`, with three decimals and Shikra's words."""
    return "Answer: [" + ",".join(f"{x:.3f}" for x in _clipped(box)) + "] ."


def format_minigpt_v2(box: ArrayLike) -> str:
    """{<12><34><56><78>}: fractions [4] clipped to 0..1, in whole per cents. ValueError unless four finite numbers."""
    return "{" + "".join(f"<{100 * x:.0f}>" for x in _clipped(box)) + "}"


def _ordered(box: Boxes) -> Boxes | None:
    """The box, or None if a value lies outside [0, 1], or x2 < x1 or y2 < y1."""
    inside = (box >= 0).all() and (box <= 1).all()
    return box if inside and (box[:2] <= box[2:]).all() else None


def parse_llava(text: str) -> Boxes | None:
    """The first bracketed list of exactly four decimal numbers in the text, as float64 [4].

    Lenient about: any text around the list, white space anywhere inside it, an explicit sign, any number of decimals
    including none ("0", "1.", ".5"). Nothing else: no exponents, no other brackets or separators.
    None where there is no such list, a value lies outside [0, 1], or x2 < x1 or y2 < y1. Later lists are not tried:
    the first one is the answer. Raises nothing and takes linear time on any string.
    """
    found = _BRACKETED.search(text)
    if not found:
        return None
    return _ordered(np.array(found.groups(), dtype=np.float64))


def parse_minigpt_v2(text: str) -> Boxes | None:
    """The first {<x1><y1><x2><y2>} of whole numbers of at most three digits in the text, as fractions, float64 [4].

    Lenient about text around it and white space inside it. None, and linear time, as in `parse_llava`. Upstream, too,
    counts an invalid answer as a miss, but with `--resample` it asks again first, up to twenty times.
    """
    found = _BRACES.search(text)
    return _ordered(np.array(found.groups(), dtype=np.float64) / 100) if found else None


_JSON_BOX = re.compile(rf'"bbox_2d"\s*+:\s*+\[{",".join([_NUMBER] * 4)}\]')


def format_qwen2_5_vl(box: ArrayLike) -> str:
    """{"bbox_2d": [12, 34, 56, 78]}: pixels [4], whole ones. ValueError unless four finite numbers."""
    box = np.asarray(box, dtype=np.float64)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"a box is four finite numbers x1, y1, x2, y2, not {box.tolist()}")
    return '{"bbox_2d": [' + ", ".join(str(round(x)) for x in box.clip(min=0)) + "]}"


def parse_qwen2_5_vl(text: str) -> Boxes | None:
    """The first "bbox_2d": [x1, y1, x2, y2] in the text, in pixels of the resized image, float64 [4].

    Lenient as `parse_llava`; what stands around it need not be JSON, for long answers are cut off. None where there is
    none, where a number is negative, or x2 < x1 or y2 < y1.
    """
    found = _JSON_BOX.search(text)
    if not found:
        return None
    box = np.array(found.groups(), dtype=np.float64)
    return box if (box >= 0).all() and (box[:2] <= box[2:]).all() else None


# Possessive, too, where upstream's patterns are not: what they match is the same.
_LMMS_NUMBER = r"(-?\d++(?:\.\d++)?+)"
_LMMS_LIST = re.compile(rf"\[\s*+{_LMMS_NUMBER},\s*+{_LMMS_NUMBER},\s*+{_LMMS_NUMBER},\s*+{_LMMS_NUMBER}\s*+\]")
_SHIKRA_BOX = r"\d(?:\.\d*+)?+(?:,\d(?:\.\d*+)?+){3}"
_SHIKRA_LIST = re.compile(rf"\[{_SHIKRA_BOX}(?:;{_SHIKRA_BOX})*+\]")
_MINIGPT_BOX = re.compile(r"\{" + r"<\d{1,3}>" * 4 + r"\}")


def strict_llava(text: str) -> Boxes | None:
    """The first list of four numbers as lmms-eval (tasks/refcoco/utils_rec.py) reads it; None where there is none.

    White space only after a bracket or comma and at the end; a digit on both sides of a point; a minus, but no plus.
    """
    found = _LMMS_LIST.search(text)
    return np.array([float(number) for number in found.groups()]) if found else None


def strict_shikra(text: str) -> Boxes | None:
    """The box as Shikra's rec.py reads it: exactly one list in the text, of exactly one box, else None.

    No white space and no sign in the list; each number has one digit before the point.
    """
    found = _SHIKRA_LIST.findall(text)
    if len(found) != 1 or ";" in found[0]:
        return None
    return np.array([float(number) for number in found[0][1:-1].split(",")])


def strict_minigpt_v2(text: str) -> Boxes | None:
    """The box as MiniGPT-4's eval_ref.py reads it without `--resample`, else None.

    "<unk>" and spaces are taken out; the box must stand at the start, and the whole answer hold no fifth whole number.
    """
    text = text.replace("<unk>", "").replace(" ", "").strip()
    if not _MINIGPT_BOX.match(text):
        return None
    numbers = re.findall(r"\d+", text)
    return np.array([int(number) / 100 for number in numbers]) if len(numbers) == 4 else None


def _thousandths(box: ArrayLike) -> str:
    return ", ".join(f"{1000 * x:.0f}" for x in _clipped(box))


def format_qwen3_vl(box: ArrayLike) -> str:
    """{"bbox_2d": [12, 34, 56, 78]}: fractions [4] clipped to 0..1, in whole thousandths. ValueError as above."""
    return '{"bbox_2d": [' + _thousandths(box) + "]}"


def parse_qwen3_vl(text: str) -> Boxes | None:
    """As `parse_qwen2_5_vl`, but thousandths made fractions; None also where one is beyond 1000."""
    box = parse_qwen2_5_vl(text)
    return None if box is None else _ordered(box / 1000)


def strict_qwen3_vl(text: str) -> Boxes | None:
    """As `strict_qwen2_5_vl`, but thousandths made fractions."""
    box = strict_qwen2_5_vl(text)
    return None if box is None else box / 1000


def format_internvl(box: ArrayLike) -> str:
    """[[12, 34, 56, 78]]: fractions [4] clipped to 0..1, in whole thousandths. ValueError as above."""
    return f"[[{_thousandths(box)}]]"


def parse_internvl(text: str) -> Boxes | None:
    """The first bracketed list of four numbers, thousandths made fractions; else as `parse_llava`."""
    found = _BRACKETED.search(text)
    return _ordered(np.array(found.groups(), dtype=np.float64) / 1000) if found else None


def strict_internvl(text: str) -> Boxes | None:
    """The first list of four numbers as `strict_llava` reads it, thousandths made fractions."""
    box = strict_llava(text)
    return None if box is None else box / 1000


def strict_qwen2_5_vl(text: str) -> Boxes | None:
    """The first object's box where the answer, without a fence around it, is JSON; else None.

    Scripts that read such answers load them as JSON; none of Qwen's own for these numbers is known.
    """
    try:
        found = json.loads(re.sub(r"^\s*```(?:json)?|```\s*$", "", text))
        found = found[0] if isinstance(found, list) else found
        box = np.array(found["bbox_2d"], dtype=np.float64)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError):
        return None
    return box if box.shape == (4,) and np.isfinite(box).all() else None


BOX_FORMATS: dict[str, BoxFormat] = {
    "llava": BoxFormat(format_llava, parse_llava, "ge", strict_llava),
    # lenient parsing is LLaVA's: the two differ in decimals and spaces only
    "shikra": BoxFormat(format_shikra, parse_llava, "gt", strict_shikra),
    "minigpt_v2": BoxFormat(format_minigpt_v2, parse_minigpt_v2, "plus_one", strict_minigpt_v2),
    "qwen2_5_vl": BoxFormat(format_qwen2_5_vl, parse_qwen2_5_vl, "ge", strict_qwen2_5_vl),  # in pixels, not fractions
    "qwen3_vl": BoxFormat(format_qwen3_vl, parse_qwen3_vl, "ge", strict_qwen3_vl),
    "internvl": BoxFormat(format_internvl, parse_internvl, "ge", strict_internvl),
}

# How an answer becomes a box: `BoxFormat.parse` finds one wherever the text has one, and so measures where a model
# points; `BoxFormat.strict` is what published numbers were scored with.
PARSINGS: dict[str, Callable[[BoxFormat], Callable[[str], Boxes | None]]] = {
    "lenient": lambda box_format: box_format.parse,
    "strict": lambda box_format: box_format.strict,
}


def iou(a: ArrayLike, b: ArrayLike, plus_one: bool = False) -> Boxes:
    """Intersection over union [...] of boxes [..., 4], as torchvision.ops.box_iou defines it, pair by pair.

    plus_one: a side measures x2 - x1 + 1, for boxes that name whole pixels (MiniGPT-v2's metric).
    Boxes without area, inverted boxes and NaN give 0.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)

    def area(top_left: Boxes, bottom_right: Boxes) -> Boxes:
        return (bottom_right - top_left + plus_one).clip(min=0).prod(axis=-1)

    overlap = area(np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - overlap
    return np.divide(overlap, union, out=np.zeros_like(union), where=union > 0)


class Convention(NamedTuple):
    """When a prediction counts as correct: compare(IoU, 0.5), with or without the extra pixel."""

    compare: Callable[[ArrayLike, float], NDArray[np.bool_]]
    plus_one: bool


CONVENTIONS: dict[str, Convention] = {
    "ge": Convention(np.greater_equal, False),  # lmms-eval, big_vision
    "gt": Convention(np.greater, False),  # Shikra
    "plus_one": Convention(np.greater, True),  # MiniGPT-v2
}


def hit(pred_px: ArrayLike, truth_px: ArrayLike, convention: str = "ge") -> tuple[Boxes, NDArray[np.bool_]]:
    """IoU [...] and correctness [...] of predictions against ground truth, both [..., 4] in the same pixels.

    convention: a name in `CONVENTIONS`, otherwise ValueError.
    """
    compare, plus_one = pick(CONVENTIONS, convention, "IoU convention")
    overlap = iou(pred_px, truth_px, plus_one)
    return overlap, compare(overlap, 0.5)
