"""FEATHER: attention without the bias of RoPE, and a coarse grid so that every part of the image stays in sight.

Source: arXiv:2412.13180, github.com/markendo/FEATHER.
Score: attention of the question's last token in the layer before the drop, from queries and keys that are not rotated,
  softmax over the visual tokens, mean over heads.
Selection: first the sqrt(keep) n highest scores, united with every third token of every third row; then keep n of
  these. The paper's 30 and 9 % are those of keep = .09. Ties go to the lower raster index.
  Option layers: two, as in 8+16 (the paper's, of 32). Option stride: of the grid, 3; 0 for none. Where an image has
  several views (LLaVA-NeXT), the grid is laid on each; newlines are on none.
Order emitted: raster.
Upstream IDs: original.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from analysis.pruning._budget import budget
from analysis.pruning.inside import best, depths, shrinking
from analysis.types import Attention, Look, Selection, Stage, VisualTokens


def lattice(visual: VisualTokens, stride: int) -> Tensor:
    """[n] bool: the tokens of an image, in raster order, on every `stride`-th row and column of their view."""
    (rows, columns), wide = visual.grid, visual.newline is not None
    on = torch.zeros(rows, columns + wide, dtype=torch.bool, device=visual.features.device)
    on[::stride, :columns:stride] = True
    return torch.cat([on.flatten(), lattice(visual.tiles, stride)]) if visual.tiles else on.flatten()


def select(look: Look, k: int, grid: Tensor | None) -> Selection:
    """The k highest scores, and the tokens of the grid [n] bool, where there is one."""
    scores = look.attention.mean(dim=(0, 1))
    chosen = best(look, scores, k)
    if grid is None:
        return chosen
    on = torch.isin(look.origin, chosen.origin) | grid[look.origin]
    return look.take(on.nonzero()[:, 0])


def stages(
    visual: VisualTokens, depth: int, keep: float | None, *, layers: str | int | None = None, stride: int = 3
) -> list[Stage]:
    """Two stages. Raises ValueError on a bad keep ratio or option."""
    at = depths((8, 16), depth, layers)
    if len(at) != 2 or at[0] < 1:
        raise ValueError(f"FEATHER drops at two layers, the first at least 1, as in layers=8+16; got {layers!r}")
    if not isinstance(stride, int) or isinstance(stride, bool) or stride < 0:
        raise ValueError(f"option stride is a number of tokens, 0 for no grid, got {stride!r}")
    grids = [lattice(visual, stride) if stride else None, None]
    return [
        Stage(layer, partial(select, k=budget(share, visual.length), grid=grid), Attention(layer - 1, False, "image"))
        for layer, share, grid in zip(at, shrinking(keep, 2), grids)
    ]
