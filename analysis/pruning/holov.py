"""HoloV: the image in crops, each with a quota of tokens, so that no part of it is lost.

Source: arXiv:2510.02912, github.com/obananas/HoloV.
Score: attention of [CLS] to each patch, mean over heads, in the block that makes the layer the connector reads.
Selection: crops are stretches of the raster, as long as each other or one longer. A token's crop score is 1000 times
  its attention and 0.09 times the variance of its cosines with the crop's other tokens, scaled to the mean of the
  former; a crop's score is the mean of its tokens'. That scaling makes the second term the same share in all crops, so
  that quotas follow attention alone. A crop gets floor(k * its share of all crops' scores) tokens, and the best crops
  one more each until k are given out; quotas beyond a crop's length go, one each in turn, to the best crops with room
  (upstream appends tokens of zeros instead). Inside a crop the most attended tokens stay; ties go to the lower raster
  index. A crop of one token has no variance; upstream also forgets its factor 1000.
  Option crops: 16, as upstream for 576 tokens.
Order emitted: crop by crop, in each by attention, descending; a crop that stays whole in raster order.
Upstream IDs: compact (permuted and shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.pruning._budget import budget
from analysis.pruning.common import ranking
from analysis.types import Selection, VisualTokens, kept

EPSILON = 1e-6


def _lengths(n: int, crops: int) -> list[int]:
    """Lengths of the crops of n tokens; none is empty."""
    return [n // crops + (i < n % crops) for i in range(min(crops, n))]


def _crop_scores(tokens: Tensor, attention: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B, crops] of projected tokens [B, N, D] and attention [B, N]."""
    found = []
    for part, seen in zip(tokens.split(lengths, dim=1), attention.split(lengths, dim=1)):
        seen, others = 1e3 * seen, max(part.shape[1] - 1, 1)
        unit = part / (part.norm(dim=2, keepdim=True) + EPSILON)
        cosine = unit @ unit.mT
        cosine.diagonal(dim1=1, dim2=2).zero_()  # counted as a zero, as upstream does
        mean = cosine.sum(dim=2, keepdim=True) / others
        variance = ((cosine - mean) ** 2).sum(dim=2) / others
        scale = seen.abs().mean(dim=1, keepdim=True) / (variance.mean(dim=1, keepdim=True) + EPSILON)
        found.append((seen + 0.09 * variance * scale).mean(dim=1))
    return torch.stack(found, dim=1)


def _quotas(scores: Tensor, k: int, lengths: Sequence[int]) -> list[int]:
    """How many of k tokens each crop of one image gets; scores: [crops]."""
    scores = scores.nan_to_num(0, posinf=0, neginf=0).clamp(min=0)  # features that are no numbers say nothing
    given = (scores / (scores.sum() + EPSILON) * k).floor().long().tolist()
    best = ranking(scores[None])[0].tolist()
    for crop in best[: max(0, k - sum(given))]:
        given[crop] += 1
    given = [min(quota, length) for quota, length in zip(given, lengths)]
    while (missing := k - sum(given)) > 0:
        for crop in [crop for crop in best if given[crop] < lengths[crop]][:missing]:
            given[crop] += 1
    return given


def prune(visual: VisualTokens, keep: float | None, *, seeds: Sequence[int] = (), crops: int = 16) -> list[Selection]:
    """The most attended tokens of each crop. Raises ValueError on a bad keep ratio or option."""
    if not isinstance(crops, int) or isinstance(crops, bool) or crops < 1:
        raise ValueError(f"option crops is a number of crops and must be at least 1, got {crops!r}")
    attention = visual.signals.cls_attention.float()
    batch, n = attention.shape
    k, lengths = budget(keep, n), _lengths(n, crops)
    scores = _crop_scores(visual.features.float(), attention, lengths)
    inside = [ranking(part) for part in attention.split(lengths, dim=1)]  # [B, length] places in the crop, best first
    index = torch.empty(batch, k, dtype=torch.int64, device=attention.device)
    for image in range(batch):
        chosen, start = [], 0
        for order, quota, length in zip(inside, _quotas(scores[image], k, lengths), lengths):
            places = order[image, :quota]
            chosen.append(start + (places.sort().values if quota == length else places))
            start += length
        index[image] = torch.cat(chosen)
    return kept(visual.features, index)
