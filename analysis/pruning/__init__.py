"""Pruning methods: visual tokens -> one Selection per image. One flat file per method, named as in `PRUNERS`.

A method selects tokens and fixes the order it emits them in; IDs are given later, by `analysis.positions`.

A specification is name[:option=value[,option=value]], as in "trim:anchor=last"; the options of a method are the
keywords of its `prune` that have defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature

import torch
import yaml
from torch import Tensor

from analysis.pruning import (
    cdpruner,
    cls_similarity,
    dart,
    divprune,
    fastervlm,
    holov,
    none,
    prumerge,
    random,
    spatial,
    text_similarity,
    trim,
    visionzip,
    vispruner,
)
from analysis.pruning._budget import budget
from analysis.registry import pick
from analysis.types import Selection, VisualTokens

__all__ = ["PRUNERS", "Pruner", "budget", "pruner", "select"]

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
    "vispruner": vispruner.prune,
    "cdpruner": cdpruner.prune,
    "holov": holov.prune,
    "dart": dart.prune,
}


def pruner(spec: str) -> Pruner:
    """The method that a specification names, its options bound. Raises ValueError on an unknown name or option."""
    if not isinstance(spec, str):
        raise ValueError(f"a pruner is named by a text such as 'trim' or 'trim:anchor=last', got {spec!r:.60}")
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
        try:
            options[option] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"option {option!r} in {spec!r:.100} has a value that cannot be read: {error}") from error
    return partial(prune, **options) if options else prune


def _with_newlines(selection: Selection, columns: int, newline: Tensor) -> Selection:
    """The selection, and after the last emitted token of each row that row's newline; a row without tokens has none.

    origin counts the newlines, too.
    """
    row, place = selection.origin // columns, torch.arange(len(selection.origin), device=selection.origin.device)
    rows, which = row.unique(return_inverse=True)
    last = torch.zeros_like(rows).scatter_reduce_(0, which, place, "amax")
    order = torch.cat([2 * place, 2 * last + 1]).argsort()
    return Selection(
        torch.cat([selection.features, newline.expand(len(rows), -1)]),
        torch.cat([selection.origin + row, rows * (columns + 1) + columns]),
        torch.cat([selection.synthetic, torch.zeros_like(rows, dtype=torch.bool)]),
    ).take(order)


def select(prune: Pruner, visual: VisualTokens, keep: float | None, seeds: Sequence[int]) -> list[Selection]:
    """Prune images: one Selection each, with `origin` along the tokens that the decoder would read unpruned.

    Where a model reads tiles besides the whole image (LLaVA-NeXT), each of the two is pruned by itself with the same
    keep ratio; newlines count neither for the ratio nor as candidates, and stay with the tokens of their row.
    Raises what the method raises.
    """
    made = prune(visual, keep, seeds=seeds)
    if visual.newline is not None:
        made = [_with_newlines(selection, visual.grid[1], visual.newline) for selection in made]
    if visual.tiles is None:
        return made
    start = visual.length - visual.tiles.length
    closer = select(prune, visual.tiles, keep, [seed + 1 for seed in seeds])
    return [
        Selection(
            torch.cat([a.features, b.features]),
            torch.cat([a.origin, b.origin + start]),
            torch.cat([a.synthetic, b.synthetic]),
        )
        for a, b in zip(made, closer)
    ]
