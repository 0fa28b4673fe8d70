"""A uniform grid of tokens: even coverage without looking at the image.

Source: baseline of arXiv:2506.21873; its code is not public, so the grid is this project's.
Score: none.
Selection: k tokens on r of the R rows of an R x C grid, with r = sqrt(k R / C) rounded, which makes the pitch the same
  along rows and columns, and moved into [ceil(k / C), k]. Row i of r is row floor((i + 1/2) R / r). The k tokens are
  dealt to the rows as evenly as they go, floor((i + 1) k / r) - floor(i k / r) to row i; token j of a row of m is in
  column floor((j + 1/2) C / m). As r <= R and m <= C, all are distinct. A quarter of an even grid is every second row
  and column.
Order emitted: raster.
Upstream IDs: compact (shifted).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch

from analysis.pruning._budget import budget
from analysis.types import Selection, VisualTokens, kept


def _centres(m: int, length: int) -> list[int]:
    """Centres of m equal parts of 0..length-1: floor((j + 1/2) length / m) in exact integers."""
    return [(2 * j + 1) * length // (2 * m) for j in range(m)]


def grid_index(k: int, rows: int, columns: int) -> list[int]:
    """The k raster indices of the grid, ascending; 1 <= k <= rows * columns."""
    r = min(max(round(sqrt(k * rows / columns)), -(-k // columns)), k)
    dealt = [(i + 1) * k // r - i * k // r for i in range(r)]
    return [row * columns + column for row, m in zip(_centres(r, rows), dealt) for column in _centres(m, columns)]


def prune(visual: VisualTokens, keep: float | None, *, seeds: Sequence[int] = ()) -> list[Selection]:
    """The same k grid tokens of every image. Raises ValueError on a bad keep ratio."""
    batch, n, _ = visual.features.shape
    index = torch.tensor(grid_index(budget(keep, n), *visual.grid), device=visual.features.device)
    return kept(visual.features, index.expand(batch, -1))
