"""Order and position IDs of the kept visual tokens, of the text after them and of the answer: independent controls.

The physical order sets the causal mask: which visual tokens a visual token can see. The IDs set the rotation (RoPE):
how far apart two tokens seem. Pruners upstream tie the two together by numbering tokens as they come; arXiv:2506.21873
shows that this breaks grounding in two ways, permuted (another order) and shifted (gaps closed), and GAP unties them.

Specifications are strings, name[:value] for an order and name[:value][#part][@text][+generated] for IDs. A rule starts
from the image's own unpruned IDs (`VisualTokens.unpruned`): u is that of a kept token, n the number of visual tokens
before pruning, K after, and e the ID at which the text goes on unpruned. In most models u is the raster index and
e = n. Under M-RoPE u has three planes, (0, row, column), and e = max(rows, columns): what a rule does, it does to each
plane. IDs count from the image's first slot; `sequence_positions` puts the text around them.

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
          rolled_columns:share, rolled_rows:share                                           e
                             the u of the token a share of the columns (rows) farther on, in whole ones, halves
                             rounded up; beyond the last follows the first
          flipped_columns, flipped_rows                                                     e
                             the u of the token at the mirrored place
          exchanged          a token of the target's box has the u of the one at the same relative      e
                             place in another object's box, and the reverse; of both boxes: u

  #part   #target            only the tokens that the target's box touches get the rule's IDs, all others u
          #background        the reverse
          #share             a seeded share of the tokens, halves rounded up, gets them; a smaller share is part of a
                             larger one: with compact, all but the share are repaired
          With # the text starts at e where no @ is given (shifted may then reach its IDs).

  @text   @after             largest visual ID + 1: isolates the gap between the last kept token and the text
          @original          e: the text stands where it would unpruned, which isolates the image's own IDs
          @compact           the text stands where compact puts it, which isolates the text's IDs
                             (with @original and @compact the IDs of image and text may overlap)
          Without @ no visual ID reaches the text's.

  +generated                 without it, generated tokens go on at the text's last ID + 1
          +original          they go on where they would unpruned
          +cache             they are counted by the cache, as loops do that forget the prefill's IDs: the number of
                             tokens read so far, plus e - n (the offset that M-RoPE's models keep from the whole prompt)

As in "original@compact", "compact#target", "shifted:100@after" or "original+cache": GAP at prefill, compact IDs while
decoding. Views of an image (LLaVA-NeXT) are rolled, flipped and exchanged each by itself, newlines with their rows.
exchanged, #target and #background read the ground truth (`types.Truth`), which only evaluation on data with boxes has.

IDs|layer|IDs  changes the IDs inside the decoder: "original|2|compact" are wrong from layer 2 on (layers count from 0),
"compact|2|original" before it. Where tokens are dropped inside the decoder, a rule starts at each layer from what that
layer reads.
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

from analysis.rec.boxes import touched
from analysis.registry import pick
from analysis.types import Ids, Selection, Truth

Value = Fraction | int | None


class Spec(NamedTuple):
    """A parsed specification. value: share, factor, offset or None; text: a name in `TEXT`, generated: in `GENERATED`,
    each None for the default; part: "target", "background" or a share, None for all tokens."""

    name: str
    value: Value
    text: str | None
    generated: str | None = None
    part: Fraction | str | None = None


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


def _views(tokens: Tensor, unpruned: Ids) -> list[tuple[Tensor, int]]:
    """Each view's part of `tokens` [n] as [rows, columns], newlines as a last column, and the columns without them.

    The parts are views into `tokens`. Raises ValueError where the unpruned IDs do not say what grids they are of.
    """
    sizes = [rows * (columns + newline) for rows, columns, newline in unpruned.grids]
    if sum(sizes) != len(tokens):
        raise ValueError(
            f"these IDs need the grid of the image's {len(tokens)} tokens, as VisualTokens.unpruned has it, got "
            f"{unpruned.grids}"
        )
    parts = tokens.split(sizes)
    return [(part.view(rows, -1), columns) for part, (rows, columns, _) in zip(parts, unpruned.grids)]


def _rolled(cells: Tensor, dim: int, share: Fraction) -> Tensor:
    return cells.roll(-floor(share * cells.shape[dim] + Fraction(1, 2)), dim)


def _exchanged(cells: Tensor, truth: Truth | None) -> Tensor:
    if truth is None or truth.other is None:
        raise ValueError("'exchanged' needs the boxes of the target and of another object, as RefStamps gives them")
    made, (mine, theirs) = cells.clone(), (touched(box, *cells.shape) for box in truth)
    for to, source in ((mine, theirs), (theirs, mine)):
        rows, columns = (  # of cell i of m, the cell of k whose part of the box holds its centre
            a.start + (2 * torch.arange(b.stop - b.start) + 1) * (a.stop - a.start) // (2 * (b.stop - b.start))
            for a, b in zip(source, to)
        )
        made[to] = cells[rows.to(cells.device)[:, None], columns.to(cells.device)]
    both = tuple(slice(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop))) for a, b in zip(mine, theirs))
    made[both] = cells[both]
    return made


# (places of one view's tokens as a grid, value, ground truth) -> the place whose ID each token gets; what moves rows
# gets newlines as a last column
RELOCATIONS: dict[str, Callable[[Tensor, Value, Truth | None], Tensor]] = {
    "rolled_columns": lambda cells, value, truth: _rolled(cells, 1, value),
    "rolled_rows": lambda cells, value, truth: _rolled(cells, 0, value),
    "flipped_columns": lambda cells, value, truth: cells.flip(1),
    "flipped_rows": lambda cells, value, truth: cells.flip(0),
    "exchanged": lambda cells, value, truth: _exchanged(cells, truth),
}


def _relocated(name: str, unpruned: Ids, value: Value, truth: Truth | None) -> Tensor:
    """Visual IDs of the whole image after a relocation."""
    source = torch.arange(len(unpruned.visual), device=unpruned.visual.device)
    for grid, columns in _views(source, unpruned):
        cells = grid if name.endswith("rows") else grid[:, :columns]
        cells.copy_(RELOCATIONS[name](cells.clone(), value, truth))
    return unpruned.visual[source]


def _original(own: Tensor, unpruned: Ids, value: Value, seed: int) -> tuple[Tensor, int]:
    return own, unpruned.text_start


# (unpruned IDs of the kept tokens [K] or [K, P] in physical order, those of the whole image, value, seed)
# -> their IDs, of the same shape, and the ID of the first text token. A relocation is original IDs of a moved image.
IDS: dict[str, Rule] = {
    "original": _original,
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
    **dict.fromkeys(RELOCATIONS, _original),
}

# (unpruned IDs of the kept tokens, those of the whole image, the kept tokens' IDs) -> ID of the first text token
TEXT: dict[str, Callable[[Tensor, Ids, Tensor], int]] = {
    "after": lambda own, unpruned, ids: int(ids.max()) + 1,
    "original": lambda own, unpruned, ids: unpruned.text_start,
    "compact": lambda own, unpruned, ids: int(_renumbered(own).max()) + 1,
}

# parts of an image by the ground truth: name -> whether its tokens are those that the target's box touches
PARTS = {"target": True, "background": False}


def _part(part: Fraction | str, origin: Tensor, unpruned: Ids, seed: int, truth: Truth | None) -> Tensor:
    """[K] bool: the kept tokens that a part holds."""
    if part not in PARTS:
        share = np.random.default_rng((seed, 4)).permutation(len(origin)) < floor(part * len(origin) + Fraction(1, 2))
        return torch.from_numpy(share).to(origin.device)
    if truth is None:
        raise ValueError(f"'#{part}' needs the target's box, which only evaluation on data with boxes has")
    inside = torch.zeros(len(unpruned.visual), dtype=torch.bool, device=origin.device)
    for grid, columns in _views(inside, unpruned):
        grid[touched(truth.target, len(grid), columns)] = True
    return inside[origin] == PARTS[part]


# (K, the whole image's unpruned IDs) -> `Ids.generated_start`
GENERATED: dict[str, Callable[[int, Ids], int]] = {
    "original": lambda k, unpruned: unpruned.text_start,
    "cache": lambda k, unpruned: k + unpruned.text_start - len(unpruned.visual),
}


def _fraction(text: str) -> Fraction:
    text = str(float(text)) if "e" in text.lower() else text  # 1e999999999 as a fraction would fill the memory
    return Fraction(text).limit_denominator(10**6)  # bounded, so that ID * numerator stays inside int64


def _share(name: str, default: str = "1") -> tuple:
    return _fraction, lambda share: 0 <= share <= 1, f"a share in [0, 1], as in '{name}:0.5'", default


# how to read a value, which ones are valid, that in words, the value where none is written
_VALUES: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str, str]] = {
    **{name: _share(name) for name in ("shuffled", "shuffled_rows", "shuffled_columns")},
    **{name: _share(name, "") for name in ("rolled_rows", "rolled_columns")},
    "compact": (_fraction, lambda factor: 0 < factor <= 1, "a factor in (0, 1], as in 'compact:0.5'", "1"),
    "compressed": (_fraction, lambda factor: 0 < factor <= 1, "a factor in (0, 1], as in 'compressed:0.75'", ""),
    "shifted": (int, lambda offset: 0 <= offset < 2**31, "an integer offset >= 0, as in 'shifted:100'", ""),
}


def _value(told: tuple, written: str, spec: str, name: str) -> Any:
    read, valid, wanted = told
    try:
        value = read(written)
    except (ValueError, ZeroDivisionError):
        value = None
    if value is None or not valid(value):
        raise ValueError(f"{name!r} needs {wanted}, got {spec!r}")
    return value


def parse_spec(spec: str, registry: dict[str, Callable] = IDS) -> Spec:
    """Read a specification of IDs, or of an order with registry=ORDERS.

    Raises ValueError on an unknown name, part, text rule or generated rule, a missing or surplus value, a value out of
    range, and an order with a part or a rule.
    """
    if not isinstance(spec, str):
        raise ValueError(f"an order or IDs are named by a text such as 'original', got {spec!r:.60}")
    rest, plus, generated = spec.partition("+")
    rest, at, text = rest.partition("@")
    rest, cross, part = rest.partition("#")
    name, colon, written = rest.partition(":")
    pick(registry, name, "order" if registry is ORDERS else "IDs")
    for given, kind, sign, rule, rules in (
        (cross, "part", "#", part, PARTS),
        (at, "text rule", "@", text, TEXT),
        (plus, "generated rule", "+", generated, GENERATED),
    ):
        if given and registry is ORDERS:
            raise ValueError(f"an order has no {kind}, got {spec!r}; write {rest!r} and give '{sign}{rule}' to the IDs")
        if given and not (rules is PARTS and rule[:1].isdigit()):
            pick(rules, rule, kind)
    if part[:1].isdigit():
        part = _value(_share(f"{name}#")[:3], part, spec, f"{name}#")
    value, told = None, _VALUES.get(name)
    if told is None and colon:
        raise ValueError(f"{name!r} takes no value, got {spec!r}")
    if told is not None:
        value = _value(told[:3], written if colon else told[3], spec, name)
    return Spec(name, value, text or None, generated or None, part if cross else None)


def by_layer(spec: str) -> list[tuple[int, str]]:
    """(first layer, IDs from there on) of a specification of IDs, which may have several: "original|2|compact".

    Raises ValueError unless the layers are whole numbers that rise from 1, and as `parse_spec`.
    """
    parts = spec.split("|") if isinstance(spec, str) else [spec]
    layers = [int(part) if part.isdecimal() else -1 for part in parts[1::2]]
    if len(parts) % 2 == 0 or sorted({0, *layers}) != [0, *layers]:
        raise ValueError(f"IDs that change are written IDs|layer|IDs, as in 'original|2|compact', got {spec!r}")
    for one in parts[::2]:
        parse_spec(one)
    return list(zip([0, *layers], parts[::2]))


def reorder(selection: Selection, spec: str, seed: int) -> Selection:
    """The same tokens in the order that `spec` names. Raises ValueError as `parse_spec`."""
    name, value, *_ = parse_spec(spec, ORDERS)
    return selection.take(ORDERS[name](selection.origin, value, seed))


def reads_truth(spec: str) -> bool:
    """Whether IDs depend on the ground truth, and so on the expression. Raises ValueError as `parse_spec`."""
    parsed = [parse_spec(one) for _, one in by_layer(spec)]
    return any(one.name == "exchanged" or one.part in PARTS for one in parsed)


def assign(origin: Tensor, unpruned: Ids, spec: str, seed: int, truth: Truth | None = None) -> Ids:
    """IDs of one image's visual tokens, of the text after it and of the answer.

    origin: [K] int64, as in `Selection`, in physical order; unpruned: as `VisualTokens.unpruned`; truth: of the
    expression, where the IDs read it.
    Raises ValueError as `parse_spec`, for a rule of planes where the IDs have one, without the truth that a rule reads
    or the grids that it moves, and unless there is a token and every origin is in 0..n-1; without that the default text
    rules could give a visual token an ID that text has.
    """
    name, value, text, generated, part = parse_spec(spec)
    n = len(unpruned.visual)
    if len(origin) == 0 or origin.min() < 0 or origin.max() >= n:
        raise ValueError(f"origin must hold at least one raster index, all in 0..{n - 1}, got {origin.tolist()}")
    own = unpruned.visual[origin]
    moved = _relocated(name, unpruned, value, truth)[origin] if name in RELOCATIONS else own
    ids, start = IDS[name](moved, unpruned, value, seed)
    if part is not None:
        wrong = _part(part, origin, unpruned, seed, truth).view(-1, *[1] * (own.dim() - 1))
        ids, start = torch.where(wrong, ids, own), unpruned.text_start
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
