"""No pruning: the upper reference of every comparison.

Source: the unpruned baseline of arXiv:2506.21873.
Score: none.
Selection: every token.
Order emitted: raster.
Upstream IDs: 0..N-1, where compact and original agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from analysis.types import Selection, VisualTokens, kept


def prune(visual: VisualTokens, keep: float | None = None, *, seeds: Sequence[int] = ()) -> list[Selection]:
    """Every token of every image. Raises ValueError unless keep is None or 1."""
    if keep not in (None, 1):
        raise ValueError(f"pruner 'none' keeps every token: keep must be None or 1, got {keep}")
    batch, n, _ = visual.features.shape
    return kept(visual.features, torch.arange(n, device=visual.features.device).expand(batch, n))
