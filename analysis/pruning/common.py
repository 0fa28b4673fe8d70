"""What several methods share: ranking, the outlier rule, how many tokens to keep, and synthetic tokens.

An order is [B, N] int64: each image's raster indices, the kept ones first as they are emitted. A count is [B] int64:
how many of them an image keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature

import torch
from torch import Tensor

from analysis.pruning._budget import budget
from analysis.registry import pick
from analysis.types import Selection, Signals, VisualTokens, kept

TEXTS = {"expression": "clip_text", "prompt": "clip_prompt"}
LAYERS = {"last": "clip_patches", "read": "clip_read"}


def text(signals: Signals, about: str) -> Tensor:
    """[B, P] CLIP's embedding of the text that `about` names. Raises ValueError on an unknown one."""
    return getattr(signals, pick(TEXTS, about, "value of option about")).float()


def clip_patches(signals: Signals, layer: str) -> Tensor:
    """[B, N, P] patches in CLIP's space, of the tower's "last" layer or of the one the connector reads ("read").

    Raises ValueError on an unknown layer.
    """
    return getattr(signals, pick(LAYERS, layer, "value of option layer")).float()


def flag(value: bool, option: str) -> bool:
    """The value of a yes/no option. Raises ValueError unless it is true or false."""
    return pick({"true": True, "false": False}, str(value).lower(), f"value of option {option}")


def ranking(scores: Tensor) -> Tensor:
    """The order by score [B, N], descending; ties go to the lower raster index."""
    return scores.argsort(dim=1, descending=True, stable=True)


def top_k(score: Callable[..., Tensor], emit: str) -> Callable[..., list[Selection]]:
    """The `prune` of a method that is only a score: it keeps the k tokens that `score` ranks first.

    score(visual, *, seeds, **options) -> [B, N], higher is kept first, ties go to the lower raster index. emit: the
    order, "score", best first, or "raster", unless the option emit says otherwise. The other options are the score's;
    ValueError on a bad keep ratio or order.
    """
    given = emit

    @wraps(score)
    def prune(
        visual: VisualTokens, keep: float | None, *, seeds: Sequence[int] = (), emit: str = given, **options
    ) -> list[Selection]:
        k = budget(keep, visual.features.shape[1])
        best = ranking(score(visual, seeds=seeds, **options))[:, :k]
        return kept(visual.features, best if by_score(emit) else best.sort(dim=1).values)

    own = signature(score)  # its keywords are the method's options
    option = Parameter("emit", Parameter.KEYWORD_ONLY, default=given)
    prune.__signature__ = own.replace(parameters=[*own.parameters.values(), option])
    return prune


def by_score(emit: str) -> bool:
    """Whether the option emit asks for the best first. Raises ValueError on an unknown order."""
    return pick({"score": True, "raster": False}, str(emit), "value of option emit")


def outliers(scores: Tensor) -> Tensor:
    """[B] how many scores lie above Q3 + 1.5 (Q3 - Q1) of their own image, quartiles interpolated linearly."""
    q1, q3 = torch.quantile(scores, scores.new_tensor([0.25, 0.75]), dim=1, keepdim=True)
    return (scores > q3 + 1.5 * (q3 - q1)).sum(dim=1)


def token_count(scores: Tensor, keep: float | None, anchor: str) -> tuple[Tensor, bool]:
    """How many original tokens to keep, [B], and whether a merged token takes one place of the budget.

    keep None: the outliers among scores [B, N], but at least one, and the merged token follows them. Otherwise it takes
    one place of the budget k, if 1 < k < N. Raises ValueError on a bad keep ratio or an unknown anchor.
    """
    batch, n = scores.shape
    spare = pick(ANCHORS, anchor, "value of option anchor") is not None
    if keep is None:
        return outliers(scores).clamp(min=1), spare
    k = budget(keep, n)
    spare = spare and 1 < k < n
    return torch.full((batch,), k - spare, device=scores.device), spare


def _centroid(members: Tensor, columns: int) -> Tensor:
    # float64 holds these sums exactly if all weights are equal, so that a half is a half wherever it is computed.
    members, index = members.double(), torch.arange(members.shape[1], device=members.device)
    row, column = (
        (members @ place.double() / members.sum(dim=1) + 0.5).floor().long()
        for place in (index // columns, index % columns)
    )
    return row * columns + column


# (weights of the members [B, N], zero for all others, columns) -> [B] raster index that the leftover token carries
ANCHORS: dict[str, Callable[[Tensor, int], Tensor] | None] = {
    "centroid": _centroid,  # cell nearest to their weighted mean row and column; halves go down and right
    "last": lambda members, columns: torch.full_like(members[:, 0], members.shape[1] - 1, dtype=torch.int64),
    "drop": None,  # no such token
}


def leftover(visual: VisualTokens, order: Tensor, count: Tensor, weights: Tensor, anchor: str) -> tuple[Tensor, Tensor]:
    """Features [B, D] and origin [B] of one token for all pruned ones: the connector on their weighted sum of patches.

    weights: [B, N] float32. An image that prunes nothing gets a meaningless one, which `emit` leaves out.
    """
    pruned = order.argsort(dim=1) >= count[:, None]
    # The floor gives members whose weights underflow a centroid; in the sum it is lost.
    members = torch.where(pruned, weights.clamp(min=2.0**-100), 0)
    patches = visual.signals.patches
    token = (members[:, None] @ patches.float())[:, 0]
    return visual.connect(token.to(patches.dtype)), ANCHORS[anchor](members, visual.grid[1])


def append(chosen: Selection, features: Tensor, origin: Tensor) -> Selection:
    """One image with synthetic tokens after its own. features: [M, D]; origin: [M] int64."""
    synthetic = torch.ones_like(origin, dtype=torch.bool)
    return Selection(
        torch.cat([chosen.features, features]),
        torch.cat([chosen.origin, origin]),
        torch.cat([chosen.synthetic, synthetic]),
    )


def emit(tokens: Tensor, order: Tensor, count: Tensor, extra: tuple[Tensor, Tensor] | None) -> list[Selection]:
    """One Selection an image: the tokens it keeps, then its extra one unless it keeps all N.

    tokens: [B, K, D], features in the order's order, K >= every count; extra: as `leftover` returns it, or None.
    """
    chosen = []
    for image, k in enumerate(count.tolist()):
        origin = order[image, :k]
        one = Selection(tokens[image, :k], origin, torch.zeros_like(origin, dtype=torch.bool))
        if extra is not None and k < order.shape[1]:
            one = append(one, extra[0][image, None], extra[1][image, None])
        chosen.append(one)
    return chosen
