"""Pruning whole images: newlines and tiles, which methods do not know of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.pruning import Pruner
from analysis.types import Selection, VisualTokens


def _with_newlines(selection: Selection, columns: int, newline: Tensor) -> Selection:
    """The selection, and after the last emitted token of each row that row's newline; a row without tokens has none.

    origin counts the newlines, too.
    """
    row, place = selection.origin // columns, torch.arange(len(selection.origin), device=selection.origin.device)
    rows, which = row.unique(return_inverse=True)
    last = torch.zeros_like(rows).scatter_reduce_(0, which, place, "amax")
    order = torch.cat([2 * place, 2 * last + 1]).argsort()
    return Selection(
        torch.cat([selection.features, newline.expand(len(rows), -1)]),
        torch.cat([selection.origin + row, rows * (columns + 1) + columns]),
        torch.cat([selection.synthetic, torch.zeros_like(rows, dtype=torch.bool)]),
    ).take(order)


def prune_images(prune: Pruner, visual: VisualTokens, keep: float | None, seeds: Sequence[int]) -> list[Selection]:
    """Prune images: one Selection each, with `origin` along the tokens that the decoder would read unpruned.

    Where a model reads tiles besides the whole image (LLaVA-NeXT), each of the two is pruned by itself with the same
    keep ratio; newlines count neither for the ratio nor as candidates, and stay with the tokens of their row.
    Raises what the method raises.
    """
    made = prune(visual, keep, seeds=seeds)
    if visual.newline is not None:
        made = [_with_newlines(selection, visual.grid[1], visual.newline) for selection in made]
    if visual.tiles is None:
        return made
    start = visual.length - visual.tiles.length
    closer = prune_images(prune, visual.tiles, keep, [seed + 1 for seed in seeds])
    return [
        Selection(
            torch.cat([a.features, b.features]),
            torch.cat([a.origin, b.origin + start]),
            torch.cat([a.synthetic, b.synthetic]),
        )
        for a, b in zip(made, closer)
    ]
