"""What methods that drop tokens inside the decoder share. Such a method is one file with

    stages(visual, depth, keep, **options) -> [Stage, ...]

visual: one `VisualTokens` of the layout that is asked about; depth: layers of the decoder; keep: share of the visual
tokens that its last layers read. A `Stage` says at which layer it drops, which attention it wants to see, and selects.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from analysis.pruning._budget import check_keep
from analysis.pruning.common import ranking
from analysis.types import Look, Selection


def best(look: Look, scores: Tensor, k: int, ranked: bool = False) -> Selection:
    """The k tokens of the highest scores [K], ties go to the one that stands first; ranked: the best first, else in the
    order that they are in."""
    order = ranking(scores[None])[0, :k]
    return look.take(order if ranked else order.sort().values)


def depths(published: Sequence[int], depth: int, given: str | int | None) -> list[int]:
    """At which layers to drop. published: for 32 layers, scaled to as many as there are, rounded, each at least one
    after the one before; given: the option layers, as in "2+6+15", which goes before. ValueError on a bad one."""
    if given is not None:
        made = [int(part) if part.strip().isdecimal() else -1 for part in str(given).split("+")]
        if made != sorted(set(made)) or min(made) < 0:
            raise ValueError(f"option layers names layers of the decoder that rise, as in 2+6+15, got {given!r}")
        return made
    made = []
    for layer in published:
        made.append(max(round(layer * depth / 32), made[-1] + 1 if made else 1))
    return made


def shrinking(keep: float | None, steps: int) -> list[float]:
    """Shares that shrink by one factor at each of several stages, the last of them `keep`. ValueError on a bad one."""
    check_keep(keep)
    return [keep ** (step / steps) for step in range(1, steps)] + [keep]
