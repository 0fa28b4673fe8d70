"""Random tokens: what a method must beat.

Source: baseline of arXiv:2506.21873.
Score: the place in a uniform random permutation of the tokens, seeded per image.
Selection: the first k of it, so that under one seed a smaller budget is a subset of a larger one.
Order emitted: raster.
Upstream IDs: compact (shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.pruning.common import top_k
from analysis.types import VisualTokens


def permutations(n: int, seeds: Sequence[int]) -> Tensor:
    """[B, n] a permutation for each seed.

    Drawn on the CPU: the generators of CPU and GPU differ, and a seed must name the same tokens on both.
    """
    return torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def score(visual: VisualTokens, *, seeds: Sequence[int]) -> Tensor:
    """[B, N] in (0, 1]: 1 for the first token of the permutation. ValueError unless there is one seed per image."""
    batch, n, _ = visual.features.shape
    if len(seeds) != batch:
        raise ValueError(f"pruner 'random' needs one seed per image, got {len(seeds)} seeds for {batch} images")
    return (1 - permutations(n, seeds).argsort(dim=1) / n).to(visual.features.device)


prune = top_k(score, emit="raster")
