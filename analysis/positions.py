"""Order and position IDs of the kept visual tokens, of the text after them and of the answer: independent controls.

The physical order sets the causal mask: which visual tokens a visual token can see. The IDs set the rotation (RoPE):
how far apart two tokens seem. Pruners upstream tie the two together by numbering tokens as they come; arXiv:2506.21873
shows that this breaks grounding in two ways, permuted (another order) and shifted (gaps closed), and GAP unties them.

Specifications are strings, name[:value] for an order and name[:value][@text][+generated] for IDs. A rule starts from
the image's own unpruned IDs (`VisualTokens.unpruned`): u is that of a kept token, n the number of visual tokens before
pruning, K after, and e the ID at which the text goes on unpruned. In most models u is the raster index and e = n. Under
M-RoPE u has three planes, (0, row, column), and e = max(rows, columns): what a rule does, it does to each plane. IDs
count from the image's first slot; `sequence_positions` puts the text around them.

  order   method             as the pruner emits them
          raster             by raster index before pruning
          shuffled[:share]   method, a seeded share of the tokens permuted among itself (default 1), the others stay

  ids                        visual IDs                                                     text, where no @ is given
          original           u: GAP                                                         e
          compact[:factor]   re-numbering after pruning: floor(factor * r), where r is      ceil(factor * (max r + 1)),
                             0..K-1 in physical order, in planes the rank of u among the    so K in one plane with the
                             kept values, so that empty rows and columns vanish             default factor 1
          compressed:factor  floor(u * factor), 0 < factor <= 1: right order, wrong         ceil(e * factor)
                             distances
          shifted:offset     u + offset, an integer >= 0: right distances, but for those    e + offset
                             to the text before
          shuffled[:share]   u, a seeded share permuted among itself (default 1): right     e
                             values, wrong order; planes of a token stay together
          stretched          r as above, spread evenly over the whole unpruned range,       e
                             halves rounded up (the idea of Nuwa's RPME)
          prefix             u of the first K slots, whichever were kept                    e
          sequential         0..K-1 in all planes, as if the image were words               K
          regrid             in planes, K cells of a smaller grid of the same aspect,       max(rows, columns) of it
                             in physical order row by row; in one plane as compact
          shuffled_rows[:share], shuffled_columns[:share]                                   e
                             in planes, u with only this plane permuted, as in shuffled

  @text   @after             largest visual ID + 1: isolates the gap between the last kept token and the text
          @original          e: the text stands where it would unpruned, which isolates the image's own IDs
          @compact           the text stands where compact puts it, which isolates the text's IDs
                             (with @original and @compact the IDs of image and text may overlap)
          Without @ no visual ID reaches the text's.

  +generated                 without it, generated tokens go on at the text's last ID + 1
          +original          they go on where they would unpruned
          +cache             they are counted by the cache, as loops do that forget the prefill's IDs: the number of
                             tokens read so far, plus e - n (the offset that M-RoPE's models keep from the whole prompt)

As in "original@compact", "shifted:100@after" or "original+cache": GAP at prefill, compact IDs while decoding.
Shares and factors are exact: 0.75 and 3/4 are the same, and the denominator is at most a million.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil, floor, isqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.registry import pick
from analysis.types import Ids, Selection

Value = Fraction | int | None


class Spec(NamedTuple):
    """A parsed specification. value: share, factor, offset or None; text: a name in `TEXT`, generated: in `GENERATED`,
    each None for the default."""

    name: str
    value: Value
    text: str | None
    generated: str | None = None


def _shuffled(length: int, share: Fraction, seed: int, stream: int) -> Tensor:
    """[length] permutation that fixes all but round-half-up(share * length) places.

    Orders and IDs may share a seed but draw from independent streams.
    """
    rng = np.random.default_rng((seed, stream))
    order = np.arange(length)
    places = rng.choice(order, floor(share * length + Fraction(1, 2)), replace=False)
    order[np.sort(places)] = places
    return torch.from_numpy(order)


def _renumbered(own: Tensor) -> Tensor:
    """What re-numbering makes of unpruned IDs [K] or [K, P]: the physical order, in planes each plane's dense rank."""
    if own.dim() == 1:
        return torch.arange(len(own), device=own.device)
    return torch.stack([plane.unique(return_inverse=True)[1] for plane in own.unbind(1)], dim=1)


def _scaled(ids: Tensor, factor: Fraction) -> Tensor:
    return ids * factor.numerator // factor.denominator


# (origin [K] as emitted, value, seed) -> [K] permutation of the tokens
ORDERS: dict[str, Callable[[Tensor, Value, int], Tensor]] = {
    "method": lambda origin, value, seed: torch.arange(len(origin), device=origin.device),
    "raster": lambda origin, value, seed: origin.argsort(stable=True),
    "shuffled": lambda origin, value, seed: _shuffled(len(origin), value, seed, stream=0).to(origin.device),
}

Rule = Callable[[Tensor, Ids, Value, int], tuple[Tensor, int]]


def _compact(own: Tensor, unpruned: Ids, value: Value, seed: int) -> tuple[Tensor, int]:
    ranks = _renumbered(own)
    return _scaled(ranks, value), ceil((int(ranks.max()) + 1) * value)


def _stretched(own: Tensor, unpruned: Ids, value: Value, seed: int) -> tuple[Tensor, int]:
    ranks, last = _renumbered(own), unpruned.visual.amax(dim=0)
    steps = ranks.amax(dim=0).clamp(min=1)
    return (2 * ranks * last + steps) // (2 * steps), unpruned.text_start


def _sequential(own: Tensor, unpruned: Ids, value: Value, seed: int) -> tuple[Tensor, int]:
    place = torch.arange(len(own), device=own.device)
    return place.view(-1, *[1] * (own.dim() - 1)).expand_as(own), len(own)


def _regrid(own: Tensor, unpruned: Ids, value: Value, seed: int) -> tuple[Tensor, int]:
    if own.dim() == 1:
        return _sequential(own, unpruned, value, seed)
    rows, columns = (unpruned.visual.amax(dim=0)[-2:] + 1).tolist()
    wide = isqrt((len(own) * columns - 1) // rows) + 1  # the smallest width with width ** 2 * rows >= K * columns
    place, ids = torch.arange(len(own), device=own.device), torch.zeros_like(own)
    ids[:, -2], ids[:, -1] = place // wide, place % wide
    return ids, max(-(-len(own) // wide), wide)


def _plane_shuffled(plane: int) -> Rule:
    def rule(own: Tensor, unpruned: Ids, value: Value, seed: int) -> tuple[Tensor, int]:
        if own.dim() == 1:
            raise ValueError("only IDs in several planes (M-RoPE) have one to shuffle by itself; take 'shuffled'")
        ids = own.clone()
        ids[:, plane] = own[_shuffled(len(own), value, seed, stream=1 - plane).to(own.device), plane]
        return ids, unpruned.text_start

    return rule


# (unpruned IDs of the kept tokens [K] or [K, P] in physical order, those of the whole image, value, seed)
# -> their IDs, of the same shape, and the ID of the first text token
IDS: dict[str, Rule] = {
    "original": lambda own, unpruned, value, seed: (own, unpruned.text_start),
    "compact": _compact,
    "compressed": lambda own, unpruned, value, seed: (_scaled(own, value), ceil(unpruned.text_start * value)),
    "shifted": lambda own, unpruned, value, seed: (own + value, unpruned.text_start + value),
    "shuffled": lambda own, unpruned, value, seed: (
        own[_shuffled(len(own), value, seed, stream=1).to(own.device)],
        unpruned.text_start,
    ),
    "stretched": _stretched,
    "prefix": lambda own, unpruned, value, seed: (unpruned.visual[: len(own)], unpruned.text_start),
    "sequential": _sequential,
    "regrid": _regrid,
    "shuffled_rows": _plane_shuffled(-2),
    "shuffled_columns": _plane_shuffled(-1),
}

# (unpruned IDs of the kept tokens, those of the whole image, the kept tokens' IDs) -> ID of the first text token
TEXT: dict[str, Callable[[Tensor, Ids, Tensor], int]] = {
    "after": lambda own, unpruned, ids: int(ids.max()) + 1,
    "original": lambda own, unpruned, ids: unpruned.text_start,
    "compact": lambda own, unpruned, ids: int(_renumbered(own).max()) + 1,
}

# (K, the whole image's unpruned IDs) -> `Ids.generated_start`
GENERATED: dict[str, Callable[[int, Ids], int]] = {
    "original": lambda k, unpruned: unpruned.text_start,
    "cache": lambda k, unpruned: k + unpruned.text_start - len(unpruned.visual),
}


def _fraction(text: str) -> Fraction:
    text = str(float(text)) if "e" in text.lower() else text  # 1e999999999 as a fraction would fill the memory
    return Fraction(text).limit_denominator(10**6)  # bounded, so that ID * numerator stays inside int64


def _share(name: str) -> tuple:
    return _fraction, lambda share: 0 <= share <= 1, f"a share in [0, 1], as in '{name}:0.5'", "1"


# how to read a value, which ones are valid, that in words, the value where none is written
_VALUES: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str, str]] = {
    **{name: _share(name) for name in ("shuffled", "shuffled_rows", "shuffled_columns")},
    "compact": (_fraction, lambda factor: 0 < factor <= 1, "a factor in (0, 1], as in 'compact:0.5'", "1"),
    "compressed": (_fraction, lambda factor: 0 < factor <= 1, "a factor in (0, 1], as in 'compressed:0.75'", ""),
    "shifted": (int, lambda offset: 0 <= offset < 2**31, "an integer offset >= 0, as in 'shifted:100'", ""),
}


def parse_spec(spec: str, registry: dict[str, Callable] = IDS) -> Spec:
    """Read a specification of IDs, or of an order with registry=ORDERS.

    Raises ValueError on an unknown name, text rule or generated rule, a missing or surplus value, a value out of range,
    and an order with one of the two rules.
    """
    if not isinstance(spec, str):
        raise ValueError(f"an order or IDs are named by a text such as 'original', got {spec!r:.60}")
    rest, plus, generated = spec.partition("+")
    rest, at, text = rest.partition("@")
    name, colon, written = rest.partition(":")
    pick(registry, name, "order" if registry is ORDERS else "IDs")
    for given, kind, sign, rule, rules in (
        (at, "text", "@", text, TEXT),
        (plus, "generated", "+", generated, GENERATED),
    ):
        if given and registry is ORDERS:
            raise ValueError(
                f"an order has no {kind} rule, got {spec!r}; write {rest!r} and give '{sign}{rule}' to the IDs"
            )
        if given:
            pick(rules, rule, f"{kind} rule")
    text, generated = text or None, generated or None
    if name not in _VALUES:
        if colon:
            raise ValueError(f"{name!r} takes no value, got {spec!r}")
        return Spec(name, None, text, generated)
    read, valid, wanted, default = _VALUES[name]
    try:
        value = read(written if colon else default)
    except (ValueError, ZeroDivisionError):
        value = None
    if value is None or not valid(value):
        raise ValueError(f"{name!r} needs {wanted}, got {spec!r}")
    return Spec(name, value, text, generated)


def reorder(selection: Selection, spec: str, seed: int) -> Selection:
    """The same tokens in the order that `spec` names. Raises ValueError as `parse_spec`."""
    name, value, *_ = parse_spec(spec, ORDERS)
    return selection.take(ORDERS[name](selection.origin, value, seed))


def assign(origin: Tensor, unpruned: Ids, spec: str, seed: int) -> Ids:
    """IDs of one image's visual tokens, of the text after it and of the answer.

    origin: [K] int64, as in `Selection`, in physical order; unpruned: as `VisualTokens.unpruned`.
    Raises ValueError as `parse_spec`, for a rule of planes where the IDs have one, and unless there is a token and
    every origin is in 0..n-1; without that the default text rules could give a visual token an ID that text has.
    """
    name, value, text, generated = parse_spec(spec)
    n = len(unpruned.visual)
    if len(origin) == 0 or origin.min() < 0 or origin.max() >= n:
        raise ValueError(f"origin must hold at least one raster index, all in 0..{n - 1}, got {origin.tolist()}")
    own = unpruned.visual[origin]
    ids, start = IDS[name](own, unpruned, value, seed)
    start = TEXT[text](own, unpruned, ids) if text else start
    return Ids(ids, start, GENERATED[generated](len(origin), unpruned) if generated else start)


def sequence_positions(prefix: int, ids: Ids, suffix: int) -> Tensor:
    """Position IDs [prefix + K + suffix], or [prefix + K + suffix, P] in planes, of text, image, text.

    prefix, suffix: text tokens before and after the image. Raises ValueError if one of them or ids.text_start is < 0.
    """
    if min(prefix, ids.text_start, suffix) < 0:
        raise ValueError(f"prefix, text_start and suffix must be >= 0, got {prefix}, {ids.text_start} and {suffix}")
    before, after = (torch.arange(length, device=ids.visual.device) for length in (prefix, suffix))
    if ids.visual.dim() == 2:
        before, after = (text[:, None].expand(-1, ids.visual.shape[1]) for text in (before, after))
    return torch.cat([before, prefix + ids.visual, prefix + ids.text_start + after])


def generated_position(prefix: int, ids: Ids, suffix: int) -> int:
    """Position ID of the first token generated after `sequence_positions` of the same arguments."""
    return prefix + ids.generated_start + suffix
