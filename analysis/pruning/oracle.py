"""Oracle and anti-oracle: the tokens of the object that is asked for are kept first, or last.

Source: none; they read the ground truth, so no method can be them. They bound from above and below what selection can
do, and so are part of no comparison of methods (`pruner: all`), and cannot run under `pruned`.
Score: whether a token's cell shares an area with the target's box; within and without the box as `random`.
  Option last: false (default), or true to keep the target's tokens last.
Selection: the first k by score: a random part of the target's tokens where they are more than k.
Order emitted: raster.
Upstream IDs: none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.pruning import random
from analysis.pruning.common import flag, top_k
from analysis.rec.boxes import touched
from analysis.types import VisualTokens


def inside(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N] bool: the tokens of a grid that each box [B, 4] touches."""
    mask = torch.zeros(len(boxes), *grid, dtype=torch.bool, device=boxes.device)
    for image, box in zip(mask, boxes.tolist()):
        image[touched(box, *grid)] = True
    return mask.flatten(1)


def score(visual: VisualTokens, *, seeds: Sequence[int], last: bool = False) -> Tensor:
    """[B, N]. ValueError unless there is one seed per image."""
    target = inside(visual.signals.target, visual.grid).float()
    return random.score(visual, seeds=seeds) + (-target if flag(last, "last") else target)


prune = top_k(score, emit="raster")
