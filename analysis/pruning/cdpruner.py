"""CDPruner: tokens that suit the text and differ from each other, by a determinantal point process.

Source: arXiv:2506.10967, github.com/Theia-4869/CDPruner.
Score: relevance r of a patch: minus its cosine with the text in CLIP's space, plus what makes the image's lowest 1e-6,
  divided by the image's range; the minus sign is upstream's. Kernel: r_i r_j cosine of the projected tokens i and j.
  Option about: "prompt" (default, the whole question as upstream) or "expression". Option lowest: true (default), or
  false for the patches most like the text. Option layer: "last" (default), signals.clip_patches, or "read", upstream's:
  the layer that the connector reads, projected into CLIP's space.
Selection: greedy: k times the token that raises the kernel's determinant most. Its gain is what is left of r^2 once the
  directions of the chosen tokens are taken out. Where no gain is left (no more independent tokens than the width of
  the features: upstream divides by zero), relevance decides. Ties go to the lower raster index.
Order emitted: raster.
Upstream IDs: compact (shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from analysis.pruning._budget import budget
from analysis.pruning.common import clip_patches, flag, text
from analysis.types import Selection, VisualTokens, kept

NOTHING = 1e-13  # gains below are rounding errors, in float64


def relevance_of(visual: VisualTokens, about: str = "prompt", lowest: bool = True, layer: str = "last") -> Tensor:
    """[B, N] float64, relevance of each token; 1 where all are alike. Raises ValueError on an unknown option."""
    words = text(visual.signals, about)  # first, so that a model without a text tower is told that it lacks one
    similarity = cosine_similarity(clip_patches(visual.signals, layer), words[:, None], dim=-1)
    relevance = (-similarity if flag(lowest, "lowest") else similarity).double()
    low, high = relevance.aminmax(dim=1, keepdim=True)
    return torch.where(high > low, (relevance - low + 1e-6) / (high - low), 1)


def prune(
    visual: VisualTokens,
    keep: float | None,
    *,
    seeds: Sequence[int] = (),
    about: str = "prompt",
    lowest: bool = True,
    layer: str = "last",
) -> list[Selection]:
    """k relevant and distinct tokens. Raises ValueError on a bad keep ratio or option."""
    relevance = relevance_of(visual, about, lowest, layer)
    batch, n = relevance.shape
    k, image = budget(keep, n), torch.arange(batch, device=relevance.device)
    tokens = normalize(visual.features.double(), dim=-1) * relevance[..., None]
    kernel = tokens @ tokens.mT
    gain, taken = kernel.diagonal(dim1=1, dim2=2).clone(), torch.zeros_like(relevance, dtype=torch.bool)
    directions = kernel.new_zeros(batch, k, n)  # rows of the kernel's Cholesky factor
    chosen = []
    for i in range(k):
        best = torch.where(gain > NOTHING, gain, relevance - 2).masked_fill(taken, -torch.inf).argmax(dim=1)
        row = kernel[image, best] - (directions[image, :i, best][:, None] @ directions[:, :i])[:, 0]
        left = gain[image, best][:, None]
        directions[:, i] = torch.where(left > NOTHING, row / left.clamp(min=NOTHING).sqrt(), 0)
        gain -= directions[:, i] ** 2
        taken[image, best] = True
        chosen.append(best)
    return kept(visual.features, torch.stack(chosen, dim=1).sort(dim=1).values)
