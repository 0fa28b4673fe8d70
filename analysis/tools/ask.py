"""Ask about any picture: the boxes of an expression under several settings, no ground truth needed, and a drawing.

python -m analysis ask photo.jpg "left mug" --pruner fastervlm --keep 0.25 --ids original,compact --out boxes.png
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from analysis.engine.decode import greedy, prompt_inputs
from analysis.engine.evaluate import image_seed, needs_text, texts
from analysis.models import Model
from analysis.positions import assign, reorder
from analysis.pruning import pruner as find_pruner
from analysis.pruning.images import prune_images
from analysis.rec.boxes import BOX_FORMATS, frame
from analysis.rec.pictures import read_picture
from analysis.types import Cell, Selection, VisualTokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.0  # inches of the drawing, unless it has many panels
LONGEST = 1200  # pixels of a picture's longer side in the drawing
MARGIN = 0.06  # around a picture in the drawing, as a share of its longer side


class Answer(NamedTuple):
    """What a model says in one cell.

    raw: its text; error: why there is none, else ""; box: [4] float64 x1, y1, x2, y2 in pixels of the picture, None
    where the text is no box; tokens, tokens_full: visual tokens read and there were; shown: [H, W] float32 in 0..1, how
    bright each pixel of the picture is drawn, 1 where its token was kept; merged: [M, 2] x, y in pixels where tokens
    that stand for several are anchored.
    """

    cell: Cell
    raw: str
    error: str
    box: NDArray[np.float64] | None
    tokens: int
    tokens_full: int
    shown: NDArray[np.float32]
    merged: NDArray[np.float64]


def _grid(view: VisualTokens, origin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns [K] of tokens in one view of the picture, -1 for newlines and for tokens of other views."""
    rows, columns = view.grid
    width = columns + (view.newline is not None)
    inside = (origin >= 0) & (origin < rows * width) & (origin % width < columns)
    return (origin // width).where(inside, -1), (origin % width).where(inside, -1)


def _read_area(model: Model, size: tuple[int, int], visual: VisualTokens) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size, and left and top margin around a picture of `size`, of what the model reads, in the picture's pixels.

    It reads a square around the picture, or the picture itself, stretched; tiles are cut from the picture.
    """
    width, height = (max(size),) * 2 if visual.tiles is None and model.frame == "padded" else size
    return (width, height), ((width - size[0]) // 2, (height - size[1]) // 2)


def spread(
    model: Model, size: tuple[int, int], visual: VisualTokens, origin: torch.Tensor, values: torch.Tensor
) -> NDArray[np.float32]:
    """[H, W]: values [K] of tokens in the pixels that these read, in a picture of `size` = width, height; else 0.

    origin: [K], as in `Selection`; values of one place add up. Where a model reads tiles besides the whole picture, the
    tiles are shown: their tokens are finer.
    """
    row, column, view = _seen_at(visual, origin)
    cells = np.zeros(view.grid, dtype=np.float32)
    np.add.at(cells, (row[row >= 0].numpy(), column[row >= 0].numpy()), values.float().cpu()[row >= 0].numpy())
    area, (left, top) = _read_area(model, size, visual)
    pixels = Image.fromarray(cells).resize(area, Image.Resampling.NEAREST)
    return np.asarray(pixels.crop((left, top, left + size[0], top + size[1])))


def _seen_at(visual: VisualTokens, origin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, VisualTokens]:
    """Rows and columns [K] of tokens in the view that is shown, as `_grid` gives them, and that view."""
    origin, view = origin.cpu(), visual
    if visual.tiles is not None:
        origin, view = origin - (visual.length - visual.tiles.length), visual.tiles
    return *_grid(view, origin), view


def kept_pixels(
    model: Model, size: tuple[int, int], visual: VisualTokens, selection: Selection
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """`Answer.shown` and `Answer.merged` of a picture of `size` = width, height."""
    synthetic = selection.synthetic.cpu()
    row, column, view = _seen_at(visual, selection.origin)
    (width, height), margins = _read_area(model, size, visual)
    anchors = torch.stack([column, row], dim=1)[(row >= 0) & synthetic].double().numpy() + 0.5
    anchors = anchors * [width / view.grid[1], height / view.grid[0]] - margins
    return spread(model, size, visual, selection.origin, ~synthetic), anchors


@torch.inference_mode()
def answers(
    model: Model, image: Image.Image, expression: str, grid: Sequence[Cell], image_id: str = ""
) -> list[Answer]:
    """The model's answer in each cell of the grid, as `evaluate` gives it for a picture of this ID.

    image: RGB; image_id: seeds what is random in a cell, together with the cell's own seed. Raises ValueError for a
    picture that the model cannot read, for a cell that it cannot run, and what a pruner raises.
    """
    model.layout(image.size)
    visual = model.encode([image]).take(torch.tensor([0], device=model.device), **model.texts([expression]))
    prompt = model.prompt(expression)
    found = []
    for cell in grid:
        seed = image_seed(cell.seed, image_id)
        [selection] = prune_images(find_pruner(cell.pruner), visual, cell.keep, [seed])
        selection = reorder(selection, cell.order, seed)
        ids = assign(selection.origin, visual.unpruned, cell.ids, seed)
        said = greedy(model, [prompt_inputs(model.embed, prompt, selection.features, ids).whole])
        [raw], [error] = texts(model, said)
        box = BOX_FORMATS[model.box_format].parse(raw)
        if box is not None:
            box = frame(model.frame).decode(box, image.size)
        sizes = len(selection.origin), len(visual.unpruned.visual)
        found.append(Answer(cell, raw, error, box, *sizes, *kept_pixels(model, image.size, visual, selection)))
    return found


def check(model: Model, grid: Sequence[Cell]) -> None:
    """Raises ValueError for a pruner that cannot run on this model, or not with this keep ratio."""
    for name, keep in dict.fromkeys((cell.pruner, cell.keep) for cell in grid):
        try:
            needs_text(model, find_pruner(name), keep)
        except (ValueError, AttributeError, OSError) as error:
            raise ValueError(f"pruner {name!r} cannot run on {model.name} with keep {keep}: {error}") from error


def pairs(asked: Sequence[str]) -> list[tuple[Path, str]]:
    """Pictures and expressions, from a CSV with the columns image and expression, or from pictures and one expression.

    A CSV's pictures are found beside it. Raises ValueError where neither is given, FileNotFoundError for a file that is
    not there.
    """
    if len(asked) == 1 and asked[0].lower().endswith(".csv"):
        file = Path(asked[0])
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there")
        try:
            table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
            raise ValueError(f"{file} is no CSV file: {error}") from error
        if not {"image", "expression"} <= set(table):
            raise ValueError(f"{file} needs the columns image and expression; it has: {', '.join(map(str, table))}")
        found = [(file.parent / image, text) for image, text in zip(table["image"], table["expression"])]
    elif len(asked) >= 2:
        found = [(Path(image), asked[-1]) for image in asked[:-1]]
    else:
        raise ValueError('give pictures and an expression, as in photo.jpg "left mug", or a CSV file')
    for path, expression in found:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there" + ("" if len(asked) > 2 else "; the expression comes last"))
        if not expression.strip():
            raise ValueError(f"the expression for {path} is empty")
    if not found:
        raise ValueError(f"{asked[0]} holds no rows")
    return found


def label(cell: Cell) -> str:
    """A cell in a few words."""
    if cell.pruner == "none":
        return "unpruned" + ("" if cell.ids in ("compact", "original") else f", {cell.ids} IDs")
    keep = "its own rule" if cell.keep is None else f"{100 * cell.keep:g} %"
    return f"{cell.pruner} {keep}, {cell.ids} IDs" + ("" if cell.order == "method" else f", {cell.order} order")


def table(found: Sequence[tuple[Path, str, Sequence[Answer]]]) -> pd.DataFrame:
    """One row per picture and cell: the setting, tokens, and the box in whole pixels or what was said instead."""
    return pd.DataFrame(
        [
            dict(
                picture=path.name,
                expression=expression,
                setting=label(answer.cell),
                tokens=f"{answer.tokens} of {answer.tokens_full}",
                box="none: " + (answer.error or repr(answer.raw))
                if answer.box is None
                else " ".join(f"{side:.0f}" for side in answer.box),
            )
            for path, expression, given in found
            for answer in given
        ]
    )


def draw_panel(axis: Axes, pixels: NDArray, size: tuple[int, int], panel: Sequence[Answer], looks: dict) -> None:
    """One selection of tokens: the kept ones bright, and the boxes of all IDs. pixels: [H, W, 3] in 0..1; size: of the
    picture; looks: colour and line of each label."""
    from matplotlib.patches import Rectangle

    light = Image.fromarray(panel[0].shown).resize(pixels.shape[1::-1], Image.Resampling.NEAREST)
    light = np.asarray(light)[..., None]
    pixels = pixels * light + (0.3 * pixels + 0.5) * (1 - light)
    axis.imshow(pixels, extent=(0, size[0], size[1], 0), interpolation="lanczos")
    axis.plot(*panel[0].merged.T, "o", mfc="white", mec="black", ms=4)
    rim = MARGIN * max(size)  # where boxes that go beyond the picture are seen to do so
    axis.set(xlim=(-rim, size[0] + rim), ylim=(size[1] + rim, -rim))
    for answer in panel:
        if answer.box is not None:
            x1, y1, x2, y2 = answer.box
            colour, line = looks[_kind(answer.cell)]
            for edge, width, dashes in (("white", 3.2, "-"), (colour, 1.8, line)):  # a white rim shows on any picture
                box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, lw=width, ls=dashes)
                axis.add_patch(box)
    if silent := [_kind(answer.cell) for answer in panel if answer.box is None]:
        background = dict(facecolor="white", alpha=0.8, lw=0)
        axis.text(
            0.5, 0.5, f"no box: {', '.join(silent)}", transform=axis.transAxes, ha="center", fontsize=7, bbox=background
        )
    first, cell = panel[0], panel[0].cell
    name = label(cell).partition(",")[0] + ("" if cell.order == "method" else f", {cell.order} order")
    axis.set_title(f"{name}: {first.tokens} of {first.tokens_full} tokens", fontsize=7.5)


def _kind(cell: Cell) -> str:
    """What boxes of one colour have in common."""
    return "unpruned" if cell.pruner == "none" and cell.ids in ("compact", "original") else cell.ids


def draw(found: Sequence[tuple[Path, str, Sequence[Answer]]], title: str = "") -> Figure:
    """A row for each picture, a panel in it for each selection of tokens, and a line of text below.

    Raises ModuleNotFoundError, with the command to run, where the extra "figures" is not installed.
    """
    try:
        import matplotlib.pyplot as plt

        from analysis import style
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; drawing needs an extra: pip install 'analysis[figures]'") from error

    style.paper_style()
    kinds = list(dict.fromkeys(_kind(answer.cell) for *_, given in found for answer in given))
    spare = cycle(style.COLOURS[name] for name in ("compressed", "permuted"))
    own = style.COLOURS | {"unpruned": style.COLOURS["full"]}
    looks = {kind: (own.get(kind) or next(spare), line) for kind, line in zip(kinds, cycle(("-", "--", ":", "-.")))}
    rows = []
    for path, expression, given in found:
        panels: dict[tuple, list[Answer]] = {}
        for answer in given:
            panels.setdefault((answer.cell.pruner, answer.cell.keep, answer.cell.order), []).append(answer)
        rows.append((path, expression, list(panels.values())))
    columns = max(len(panels) for *_, panels in rows)
    side = max(2.4, WIDTH / columns)
    tall = [side * panels[0][0].shown.shape[0] / panels[0][0].shown.shape[1] + 0.4 for *_, panels in rows]
    fig, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(side * columns, sum(tall) + 0.35),
        height_ratios=tall,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.axis("off")
    for line, (path, expression, panels) in zip(axes, rows):
        picture = read_picture(path)
        small = picture.copy()
        small.thumbnail((LONGEST, LONGEST))
        for axis, panel in zip(line, panels):
            draw_panel(axis, np.asarray(small) / 255, picture.size, panel, looks)
        said = f"{path.name}: “{expression}”"
        where = dict(transform=line[0].transAxes, va="top", parse_math=False)  # dollars start no formula
        line[0].text(0.06, 0, said, fontsize=7.5, **where).set_in_layout(False)
    named = style.LABELS | {"unpruned": "unpruned"}
    handles = [
        plt.Line2D([], [], color=colour, ls=line, label=named.get(kind, f"{kind} IDs"))
        for kind, (colour, line) in looks.items()
    ]
    if any(len(answer.merged) for *_, given in found for answer in given):
        handles.append(plt.Line2D([], [], color="none", marker="o", mfc="white", mec="black", label="merged tokens"))
    fig.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)))
    fig.supxlabel(title, fontsize=7)
    return fig
