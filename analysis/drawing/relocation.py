"""Where position IDs say that an object is: the place, in the unpruned image, of the IDs that its tokens were given.

Boxes and centres are fractions of what the visual tokens show (`Model.token_frame`). Rows are scored ones of one model,
with another object's box (ox1 .. oy2).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from analysis.engine.evaluate import image_seed
from analysis.positions import assign, parse_spec
from analysis.pruning import pruner as find_pruner
from analysis.pruning.oracle import inside
from analysis.rec.boxes import BOX_FORMATS, frame, hit, resized_to_tokens
from analysis.rec.scoring import PREDICTION, SIZE, TRUTH
from analysis.types import Signals, VisualTokens


def grids(adapter: Mapping[str, Any], sizes: NDArray) -> NDArray:
    """[n, 2] rows and columns of the tokens of images of these sizes [n, 2]; adapter: of the rows' provenance."""
    if adapter["grid"] is not None:
        return np.tile(adapter["grid"], (len(sizes), 1))
    side, fewest, most = map(int, adapter["frame"].partition(":")[2].split(","))
    return np.array([resized_to_tokens(size, side, fewest, most)[::-1] for size in sizes]) // side


def implied_boxes(boxes: NDArray, others: NDArray, spec: str, grid: NDArray) -> tuple[NDArray, NDArray]:
    """Where each box [n, 4] is by the IDs `spec`, all tokens kept, and whether it is whole there [n].

    others: [n, 4] of another object each; grid: [n, 2]. A box that goes over the edge, so that a part of it follows on
    the other side, is not whole. A part after # does not count. Raises ValueError for IDs that are no relocation.
    """
    name, share, *_ = parse_spec(spec)
    axis = 0 if name.endswith("columns") else 1
    ends, moved, whole = [axis, axis + 2], boxes.copy(), np.ones(len(boxes), dtype=bool)
    if name == "exchanged":
        moved = others.copy()
    elif name.startswith("flipped"):
        moved[:, ends] = 1 - boxes[:, ends[::-1]]
    elif name.startswith("rolled"):
        moved[:, ends] += [[floor(share * int(cells) + 1 / 2) / cells] for cells in grid[:, 1 - axis]]
        moved[:, ends] -= np.floor(moved[:, [axis]] + 1e-9)
        whole = moved[:, axis + 2] <= 1 + 1e-9
    elif name != "original":
        raise ValueError(f"IDs {spec!r} are no relocation of an image")
    return moved, whole


def implied_centres(rows: pd.DataFrame, boxes: NDArray, grid: tuple[int, int]) -> NDArray:
    """Mean place [n, 2] (x, y) of the IDs of the target's kept tokens, for the rows [n] of one cell with pruning.

    boxes: [n, 4] of the targets. NaN where none of the target's tokens is kept. The method selects anew, so it must
    read nothing of the tokens; otherwise AttributeError.
    """
    (name, keep, ids, seed), images = rows[["pruner", "keep", "ids", "seed"]].iloc[0], list(rows["image_id"].unique())
    blank = VisualTokens(torch.zeros(len(images), grid[0] * grid[1], 1), grid, Signals())
    seeds = [image_seed(int(seed), image_id) for image_id in images]
    chosen = dict(zip(images, find_pruner(name)(blank, keep, seeds=seeds)))
    found = np.full((len(rows), 2), np.nan)
    for row, (image_id, target) in enumerate(zip(rows["image_id"], inside(torch.from_numpy(boxes), grid))):
        origin = chosen[image_id].origin
        if (kept := target[origin]).any():
            at = assign(origin, blank.unpruned, ids, image_seed(int(seed), image_id)).visual[kept].double().numpy()
            found[row] = [(at % grid[1] + 0.5).mean() / grid[1], (at // grid[1] + 0.5).mean() / grid[0]]
    return found


def places(scored: pd.DataFrame, adapter: Mapping[str, Any]) -> pd.DataFrame:
    """A copy of scored rows with centres true_x, true_y, said_x, said_y, implied_x, implied_y, whether the box is whole
    at the implied place, and there: whether the answer hits it (False where pruned, for there is no implied box).

    Implied places after pruning are NaN for a model whose tokens are no single grid. Index as that of scored.
    """
    view, sizes = frame(adapter["token_frame"]), scored[SIZE].to_numpy(np.float64)
    names = [TRUTH, [f"o{name}" for name in TRUTH], PREDICTION]
    true, other, said = (view.encode(scored[columns].to_numpy(np.float64), sizes) for columns in names)
    grid, implied = grids(adapter, sizes), np.full((len(scored), 2), np.nan)
    whole, there = np.ones(len(scored), dtype=bool), np.zeros(len(scored), dtype=bool)
    convention = BOX_FORMATS[scored["dialect"].iloc[0]].convention
    for (name, _, ids, _), here in scored.reset_index(drop=True).groupby(
        ["pruner", "keep", "ids", "seed"], dropna=False
    ):
        at = here.index.to_numpy()
        if name == "none":
            boxes, whole[at] = implied_boxes(true[at], other[at], ids, grid[at])
            implied[at] = (boxes[:, :2] + boxes[:, 2:]) / 2
            there[at] = hit(here[PREDICTION].to_numpy(np.float64), view.decode(boxes, sizes[at]), convention)[1]
        elif adapter["grid"] is not None and (here["tokens_full"] == np.prod(adapter["grid"])).all():
            implied[at] = implied_centres(here, true[at], tuple(adapter["grid"]))
    centres = dict(true=(true[:, :2] + true[:, 2:]) / 2, said=(said[:, :2] + said[:, 2:]) / 2, implied=implied)
    made = {f"{name}_{axis}": place for name, both in centres.items() for axis, place in zip("xy", both.T)}
    return scored.assign(**made, whole=whole, there=there)
