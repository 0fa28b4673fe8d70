"""Pruning methods: visual tokens -> one Selection per image. One flat file per method, named as in `PRUNERS`.

A method selects tokens and fixes the order it emits them in; IDs are given later, by `analysis.positions`.

A specification is name[:option=value[,option=value]], as in "trim:anchor=last"; the options of a method are the
keywords of its `prune` that have defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature

import yaml

from analysis.pruning import (
    cls_similarity, divprune, fastervlm, none, prumerge, random, spatial, text_similarity, trim, visionzip,
)
from analysis.pruning._budget import budget
from analysis.registry import pick
from analysis.types import Selection

__all__ = ["PRUNERS", "Pruner", "budget", "pruner"]

# prune(visual: VisualTokens, keep: float | None, *, seeds: Sequence[int], **options) -> one Selection per image.
# keep: share of the tokens that the decoder still reads, synthetic ones included; None: the method decides itself.
# seeds: one int per image, so that a result does not depend on how images are batched.
Pruner = Callable[..., list[Selection]]

PRUNERS: dict[str, Pruner] = {
    "none": none.prune,
    "random": random.prune,
    "spatial": spatial.prune,
    "cls_similarity": cls_similarity.prune,
    "text_similarity": text_similarity.prune,
    "prumerge": prumerge.prune,
    "prumerge+": partial(prumerge.prune, plus=True),
    "trim": trim.prune,
    "fastervlm": fastervlm.prune,
    "divprune": divprune.prune,
    "visionzip": visionzip.prune,
}


def pruner(spec: str) -> Pruner:
    """The method that a specification names, its options bound. Raises ValueError on an unknown name or option."""
    name, _, written = spec.partition(":")
    prune = pick(PRUNERS, name, "pruner")
    valid = {k: p for k, p in signature(prune).parameters.items() if p.kind is p.KEYWORD_ONLY and k != "seeds"}
    options = {}
    for part in written.split(",") if written else ():
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"an option is written option=value, got {part!r} in {spec!r}")
        if not valid:
            raise ValueError(f"pruner {name!r} takes no options, got {spec!r}")
        pick(valid, option, f"option of pruner {name!r}")
        options[option] = yaml.safe_load(value)
    return partial(prune, **options) if options else prune
