"""Draw what each rule of IDs gives for a grid of 4 x 4 tokens of which 6 are kept: docs/ids_*.png, for docs/ids.md.

python docs/draw_ids.py     # draws what `analysis.positions` gives now; a test compares
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # this project's code, whatever else is installed
from analysis.positions import assign, generated_position, reads_truth, sequence_positions
from analysis.style import COLOURS, paper_style
from analysis.types import Ids, Truth, raster_ids

SIDE, QUESTION = 4, 3  # tokens in a row and in a column; of the question after the image
FED = torch.tensor([7, 1, 13, 4, 12, 3])  # raster indices of the kept tokens, in the order in which a method emits them
PLANES = torch.tensor([[0, row, column] for row in range(SIDE) for column in range(SIDE)])
UNPRUNED = {"rope": raster_ids(SIDE**2), "mrope": Ids(PLANES, SIDE, SIDE)}
UNPRUNED["moved"] = UNPRUNED["rope"]._replace(grids=((SIDE, SIDE, False),))
TRUTH = Truth((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5))  # the target's box, and another object's
SEED = 1  # of all that is drawn by lot
SPECS = {
    "rope": (
        "original",
        "compact",
        "compact:0.5",
        "compressed:0.5",
        "shifted:3",
        "shuffled",
        "shuffled:0.5",
        "stretched",
        "prefix",
        "original@after",
        "original@compact",
        "compact@original",
        "original+cache",
        "compact+original",
    ),
    "mrope": (
        "original",
        "compact",
        "compressed:0.5",
        "shifted:3",
        "shuffled",
        "stretched",
        "prefix",
        "sequential",
        "regrid",
        "shuffled_rows",
        "shuffled_columns",
        "original+cache",
    ),
    "moved": (
        "rolled_columns:1/4",
        "rolled_rows:1/4",
        "flipped_columns",
        "flipped_rows",
        "exchanged",
        "compact#target",
        "compact#background",
        "compact#0.5",
    ),
}


def numbers(kind: str, spec: str) -> tuple[list[str], list[str], str]:
    """What is written: the IDs of the kept tokens in `FED`'s order, of the question, and of the first answered token.

    Text has one ID in all planes; a visual token's planes are written as row and column, where the first is always 0
    as "row,column", else all three.
    """
    ids = assign(FED, UNPRUNED[kind], spec, SEED, TRUTH)
    flat = ids.visual.dim() == 1
    moved = not flat and bool(ids.visual[:, 0].any())
    image = [str(one) if flat else ",".join(map(str, one if moved else one[1:])) for one in ids.visual.tolist()]
    text = sequence_positions(0, ids, QUESTION)[len(FED) :]
    return image, [str(int(one)) for one in (text if flat else text[:, 0])], str(generated_position(0, ids, QUESTION))


def draw(kind: str) -> Figure:
    """All specifications of one kind, each a grid, with the question and the answer below it.

    Blue: the ID that the token has unpruned; orange: another; grey: dropped. Small: in which place a token is fed.
    Framed where the IDs read them: the target's box, and dotted another object's.
    """
    paper_style()
    size = (7, {"rope": 5.4, "mrope": 6.3, "moved": 4.2}[kind])
    down, across = (2 if kind == "moved" else 3), (5 if kind == "rope" else 4)
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained")
    _, own_text, own_answer = numbers(kind, "original")
    own = numbers(kind, "original")[0]
    for ax, spec in zip(axes.flat, SPECS[kind]):
        image, text, answer = numbers(kind, spec)

        def box(x, y, said, right, ax=ax):
            colour = COLOURS["original" if right else "compact"] if said else "#E6E6E6"
            ax.add_patch(plt.Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour, edgecolor="none"))
            ax.text(
                x + 0.5, y + 0.5, said, ha="center", va="center", color="white", fontsize=8 if len(said) < 5 else 6.5
            )

        kept = FED.tolist()
        for index in range(SIDE**2):
            place = kept.index(index) if index in kept else None
            said = "" if place is None else image[place]
            box(index % SIDE, index // SIDE, said, place is not None and said == own[place])
            if place is not None:
                corner = dict(ha="right", va="bottom", color="white", fontsize=5)
                ax.text(index % SIDE + 0.92, index // SIDE + 0.94, f"{place + 1}.", **corner)
        for place, (said, right) in enumerate(zip([*text, answer], [*own_text, own_answer])):
            box(place, SIDE + 0.35, said, said == right)
        for (x1, y1, x2, y2), line in zip(TRUTH if reads_truth(spec) else (), ("-", ":")):
            corner, *lengths = (SIDE * x1, SIDE * y1), SIDE * (x2 - x1), SIDE * (y2 - y1)
            ax.add_patch(
                plt.Rectangle(corner, *lengths, facecolor="none", edgecolor="black", lw=1.2, ls=line, clip_on=False)
            )
        ax.text(0, SIDE + 1.45, "question", fontsize=6.5, va="top")
        ax.text(SIDE, SIDE + 1.45, "answer", fontsize=6.5, va="top", ha="right")
        ax.set(xlim=(0, SIDE), ylim=(SIDE + 1.75, 0), aspect="equal")
        ax.set_title(spec, family="DejaVu Sans Mono", fontsize=7.5)
    for ax in axes.flat:
        ax.axis("off")
    return figure


if __name__ == "__main__":
    for kind in SPECS:
        draw(kind).savefig(Path(__file__).with_name(f"ids_{kind}.png"), metadata={"Software": None}, dpi=160)
