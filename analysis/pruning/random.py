"""Random tokens: what a method must beat.

Source: baseline of arXiv:2506.21873.
Score: a uniform random permutation of the tokens, seeded per image.
Selection: the first k of it, so that under one seed a smaller budget is a subset of a larger one.
Order emitted: raster.
Upstream IDs: compact (shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.pruning._budget import budget
from analysis.types import Selection, VisualTokens, kept


def permutations(n: int, seeds: Sequence[int]) -> Tensor:
    """[B, n] a permutation for each seed.

    Drawn on the CPU: the generators of CPU and GPU differ, and a seed must name the same tokens on both.
    """
    return torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def prune(visual: VisualTokens, keep: float | None, *, seeds: Sequence[int]) -> list[Selection]:
    """k random tokens per image. Raises ValueError on a bad keep ratio or unless there is one seed per image."""
    batch, n, _ = visual.features.shape
    k = budget(keep, n)
    if len(seeds) != batch:
        raise ValueError(f"pruner 'random' needs one seed per image, got {len(seeds)} seeds for {batch} images")
    return kept(visual.features, permutations(n, seeds)[:, :k].sort(dim=1).values.to(visual.features.device))
