"""Pruning whole images: newlines and tiles, which methods do not know of, and where in the decoder it happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from analysis.pruning import PRUNERS, Pruner
from analysis.types import Look, Selection, Stage, VisualTokens


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


def checked(made: Any, visual: VisualTokens, name: str) -> list[Selection]:
    """What a method returned for B images of N tokens, where it is a selection of them.

    Raises ValueError, naming the method and the first image, where it is not: no list of B selections; shapes, types or
    a device that do not fit; no token; a place outside 0..N-1; an existing token twice; features that are no numbers.
    """
    images, n, width = visual.features.shape
    if not (isinstance(made, list | tuple) and all(isinstance(one, Selection) for one in made) and len(made) == images):
        said = f"{type(made).__name__} of {len(made)}" if isinstance(made, list | tuple) else type(made).__name__
        raise ValueError(
            f"pruner {name} must return a list of one Selection for each of {images} images, and returned a {said}; "
            "types.kept makes such a list of raster indices"
        )

    def fault(number: int, what: str) -> ValueError:
        return ValueError(f"pruner {name}, image {number} of {images}: {what}")

    device = visual.features.device
    for number, one in enumerate(made):
        k = len(one.origin) if one.origin.dim() else 0
        for field, given, shape, dtype in (
            ("origin", one.origin, (k,), torch.int64),
            ("features", one.features, (k, width), visual.features.dtype),
            ("synthetic", one.synthetic, (k,), torch.bool),
        ):
            if given.shape != shape or given.dtype != dtype or given.device != device:
                raise fault(
                    number,
                    f"{field} must be {list(shape)} {dtype} on {device}, for the {k} tokens in origin; it is "
                    f"{list(given.shape)} {given.dtype} on {given.device}",
                )
        if k == 0:
            raise fault(number, "no token is kept; at least one must stay")

    origin, synthetic = (torch.cat([getattr(one, name) for one in made]) for name in ("origin", "synthetic"))
    counts = torch.tensor([len(one.origin) for one in made], device=origin.device)
    image = torch.arange(images, device=origin.device).repeat_interleave(counts, output_size=len(origin))
    outside = (origin < 0) | (origin >= n)
    place = image * n + origin.clamp(0, n - 1)
    twice = (
        torch.zeros(images * n, dtype=torch.int64, device=origin.device).index_add_(0, place, (~synthetic).long()) > 1
    )
    unknown = ~torch.cat([one.features for one in made]).isfinite().all(dim=1)
    found = torch.stack([outside.any(), twice.any(), unknown.any()])
    if not found.any():  # here a GPU waits for the host, once
        return list(made)
    for number, one in enumerate(made):
        if not visual.features[number].isfinite().all():
            continue  # the model's fault, not the method's; its answers become failed rows
        if beyond := one.origin[(one.origin < 0) | (one.origin >= n)].tolist():
            raise fault(number, f"origin must be raster indices in 0..{n - 1}, and holds {beyond[:5]}")
        own, often = one.origin[~one.synthetic].unique(return_counts=True)
        if again := own[often > 1].tolist():
            raise fault(number, f"a token can be kept once, but {again[:5]} are there several times")
        if broken := one.origin[~one.features.isfinite().all(dim=1)].tolist():
            raise fault(number, f"features of the tokens {broken[:5]} are no finite numbers")
    return list(made)


def prune_images(prune: Pruner, visual: VisualTokens, keep: float | None, seeds: Sequence[int]) -> list[Selection]:
    """Prune images: one Selection each, with `origin` along the tokens that the decoder would read unpruned.

    Where a model reads tiles besides the whole image (LLaVA-NeXT), each of the two is pruned by itself with the same
    keep ratio; newlines count neither for the ratio nor as candidates, and stay with the tokens of their row.
    Raises what the method raises, and ValueError as `checked`.
    """
    name = getattr(prune, "label", None) or getattr(prune, "__name__", repr(prune))
    made = checked(prune(visual, keep, seeds=seeds), visual, name)
    if visual.newline is not None:
        made = [_with_newlines(selection, visual.grid[1], visual.newline) for selection in made]
    if visual.tiles is None:
        return made
    start = visual.length - visual.tiles.length
    closer = prune_images(prune, visual.tiles, keep, [seed + 1 for seed in seeds])
    return [
        Selection(
            torch.cat([a.features, b.features]),
            torch.cat([a.origin, b.origin + start]),
            torch.cat([a.synthetic, b.synthetic]),
        )
        for a, b in zip(made, closer)
    ]


def _chosen(look: Look, origin: Tensor) -> Selection:
    """The tokens `origin` [k] of those that are there, in this order."""
    return look.take((look.origin == origin[:, None]).long().argmax(dim=1))


def staged_images(
    prune: Pruner, visual: VisualTokens, keep: float | None, seeds: Sequence[int], layers: int
) -> list[tuple[Selection, list[Stage]]]:
    """For each image what the decoder's first layer reads, and what is dropped on the way through its `layers` layers.

    Raises what the method raises, ValueError as `checked`, for a stage at a layer that is not there, and where a method
    that merges tokens is to do so inside the decoder.
    """
    if not getattr(prune, "inside", False):
        return [(selection, []) for selection in prune_images(prune, visual, keep, seeds)]
    whole = prune_images(PRUNERS["none"], visual, None, seeds)
    if prune.layer:
        made = prune_images(replace(prune, layer=0), visual, keep, seeds)
        for one, full in zip(made, whole):
            if one.synthetic.any() or not torch.equal(one.features, full.features[one.origin]):
                raise ValueError(
                    f"{prune.label} merges tokens, which it can only do before the decoder; leave out the option inside"
                )
        staged = [[Stage(prune.layer, partial(_chosen, origin=one.origin))] for one in made]
    else:
        staged = [prune.prune(visual, layers, keep, **prune.options)] * len(whole)
    if beyond := [stage.layer for stages in staged for stage in stages if not 0 <= stage.layer < layers]:
        raise ValueError(f"the decoder has the layers 0 to {layers - 1}, so {prune.label} cannot drop at {beyond[0]}")
    return list(zip(whole, staged))
