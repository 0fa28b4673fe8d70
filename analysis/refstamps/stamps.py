"""The photographic stamps that RefStamps scenes are made of.

`stamps/` holds a small subset of the Tux Paint stamps (GPL-2, see stamps/COPYRIGHT), shrunk to at most 96 pixels, and
`manifest.csv`: file, noun, kind (animate or thing), colour (empty where it would be arguable), source path upstream.

    python -m analysis.refstamps.stamps FOLDER    # shrink them again from an unpacked tuxpaint-stamps folder
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent / "stamps"
SIDE = 96  # pixels of the longer side: objects in a scene are smaller than this
PLURALS = {
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "bus": "buses",
    "mailbox": "mailboxes",
    "ostrich": "ostriches",
}


@dataclass(frozen=True)
class Stamp:
    """One cut-out photograph. kind: "animate" (people and animals) or "thing"; colour: "" where arguable."""

    file: str
    noun: str
    kind: str
    colour: str
    source: str


@cache
def stamps() -> tuple[Stamp, ...]:
    """All stamps, in the order of manifest.csv (scenes index into it, so the order is part of the data set)."""
    with open(FOLDER / "manifest.csv", newline="") as f:
        return tuple(Stamp(**row) for row in csv.DictReader(f))


@cache
def nouns() -> tuple[str, ...]:
    return tuple(dict.fromkeys(s.noun for s in stamps()))


@cache
def colours() -> tuple[str, ...]:
    return tuple(sorted({s.colour for s in stamps() if s.colour}))


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


@cache
def picture(index: int) -> Image.Image:
    """The stamp's RGBA picture."""
    return Image.open(FOLDER / stamps()[index].file).convert("RGBA")


def shrink(source: Path) -> None:
    """Write every stamp of the manifest again from an upstream folder."""
    for stamp in stamps():
        image = Image.open(source / stamp.source).convert("RGBA")
        image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox())
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(FOLDER / stamp.file, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Shrink the stamps of manifest.csv from a tuxpaint-stamps folder.")
    parser.add_argument("folder", type=Path)
    shrink(parser.parse_args().folder)
