"""SparseVLM: words of the question that have to do with the image rate its tokens; some of the dropped are merged.

Source: arXiv:2410.04417, github.com/Gumpest/SparseVLMs; "+" is its version 2.0.
Raters: words whose share in the softmax, over the words, of visual token . word is above the words' mean; the products
  are those of the embeddings that enter the decoder, the share is the mean over the visual tokens.
Score: attention of the raters in the layer before the drop, softmax over all keys, mean over heads and raters.
  Plus: each weight divided by what rotation alone makes of a query and a key of ones, and only of the 14 in 32 heads
  that then give the image most.
Selection: the highest scores; keep^(1/3), keep^(2/3) and keep of all tokens in all. Upstream has fixed counts (300, 200
  and 110 of 576 for 192 on average), and merged tokens beyond them; here these are part of the budget, so that keep
  means what it does elsewhere. Of the m dropped ones the int(.3 m) + 1 of highest scores are merged into
  int(that / 10) + 1 clusters by density peaks (`clusters`); a cluster is the mean of its tokens. Plus merges none.
  Option layers: where, as in 3+7+16 (upstream drops after its layers 2, 6 and 15, of 32).
  Upstream breaks ties of density by noise, here the lower raster index is denser.
Order emitted: raster, clusters after the kept, in the order of their peaks' scores.
Synthetic: clusters; the origin is the peak's.
Upstream IDs: compact; plus: original.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from analysis.pruning._budget import budget
from analysis.pruning.common import append, flag, ranking
from analysis.pruning.inside import best, depths, shrinking
from analysis.types import Attention, Look, Selection, Stage, VisualTokens


def raters(look: Look) -> Tensor:
    """[S] bool: the words that rate."""
    share = (look.image.float() @ look.words.float().mT).softmax(dim=1).mean(dim=0)
    return share > share.mean()


def score(look: Look, plus: bool) -> Tensor:
    """[K], higher is kept first. A question of equal words has no raters; then all rate."""
    rate = raters(look)
    weights = look.attention[:, rate] if rate.any() else look.attention
    if plus:
        heads = weights.sum(dim=(1, 2)).topk(max(1, round(len(weights) * 14 / 32))).indices
        weights = weights[heads]
    return weights.mean(dim=(0, 1))


def clusters(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Density peaks among states [m, D] (arXiv:2004.09666's k nearest neighbours, as in upstream): the cluster of each
    [m], and the peaks [count].

    Density: exp of minus the mean squared distance to the `count` nearest, itself included, distances over sqrt(D);
    a peak has a high product of density and distance to the nearest denser token.
    """
    states = states.float()
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[1] ** 0.5
    density = (-distance.topk(count, dim=1, largest=False).values.square().mean(dim=1)).exp()
    place = torch.arange(len(states), device=states.device)
    denser = (density > density[:, None]) | (density == density[:, None]) & (place < place[:, None])
    apart = distance.masked_fill(~denser, distance.max()).amin(dim=1)
    peaks = ranking((apart * density)[None])[0, :count]
    member = distance[peaks].argmin(dim=0)
    member[peaks] = torch.arange(count, device=states.device)
    return member, peaks


def merged(dropped: int) -> tuple[int, int]:
    """Of so many dropped tokens, how many are merged, and into how many clusters."""
    tokens = min(int(0.3 * dropped) + 1, dropped)
    return tokens, min(int(tokens / 10) + 1, tokens)


def select(look: Look, k: int, plus: bool) -> Selection:
    """k tokens, clusters among them."""
    n, scores = len(look.states), score(look, plus)
    if plus or k < 2 or k >= n:
        return best(look, scores, k)
    alone = max(own for own in range(1, k) if own + merged(n - own)[1] <= k or own == 1)
    tokens, count = merged(n - alone)
    rest = ranking(scores[None])[0, alone : alone + tokens]
    member, peaks = clusters(look.states[rest], min(count, k - alone))
    means = torch.stack([look.states[rest[member == i]].mean(dim=0) for i in range(len(peaks))])
    return append(best(look, scores, alone), means, look.origin[rest[peaks]])


def stages(
    visual: VisualTokens, depth: int, keep: float | None, *, layers: str | int | None = None, plus: bool = False
) -> list[Stage]:
    """A stage at each layer. Raises ValueError on a bad keep ratio or option."""
    at, plus = depths((3, 7, 16), depth, layers), flag(plus, "plus")
    if at[0] < 1:
        raise ValueError(
            f"option layers: SparseVLM looks at the layer before the drop, so the first is 1, got {layers!r}"
        )
    return [
        Stage(
            layer,
            partial(select, k=budget(share, visual.length), plus=plus),
            Attention(layer - 1, queries="text", unbiased=plus),
        )
        for layer, share in zip(at, shrinking(keep, len(at)))
    ]
