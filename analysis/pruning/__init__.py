"""Pruning methods: visual tokens -> one Selection per image. One flat file per method, named as in `PRUNERS`.

A method selects tokens and fixes the order it emits them in; IDs are given later, by `analysis.positions`.
"""

from __future__ import annotations

from collections.abc import Callable

from analysis.pruning import cls_similarity, none, random, spatial
from analysis.pruning._budget import budget
from analysis.types import Selection

__all__ = ["PRUNERS", "Pruner", "budget"]

# prune(visual: VisualTokens, keep: float | None, *, seeds: Sequence[int]) -> one Selection per image.
# seeds: one int per image, so that a result does not depend on how images are batched.
Pruner = Callable[..., list[Selection]]

PRUNERS: dict[str, Pruner] = {
    "none": none.prune,
    "random": random.prune,
    "spatial": spatial.prune,
    "cls_similarity": cls_similarity.prune,
}
