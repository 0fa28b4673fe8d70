"""Order and position IDs of the kept visual tokens: two independent controls.

The physical order sets the causal mask: which visual tokens a visual token can see. The IDs set the rotation (RoPE):
how far apart two tokens seem. Pruners upstream tie the two together by numbering tokens as they come; arXiv:2506.21873
shows that this breaks grounding in two ways, permuted (another order) and shifted (gaps closed), and GAP unties them.

Specifications are strings, name[:value] for an order and name[:value][@text] for IDs. n is the number of visual tokens
before pruning, K after; IDs count from the image's first slot, and `layout` puts the text around them.

  order   method             as the pruner emits them
          raster             by raster index before pruning
          shuffled[:share]   method, a seeded share of the tokens permuted among itself (default 1), the others stay
  ids     compact[:factor]   floor(factor * 0..K-1) in physical order: re-numbering after pruning (default 1)
          original           the raster index before pruning: GAP
          compressed:factor  floor(original * factor), 0 < factor <= 1: right order, wrong distances
          shifted:offset     original + offset, an integer >= 0: right distances, but for those to the text before
          shuffled[:share]   original, a seeded share permuted among itself (default 1): right values, wrong order
  @text   not given          the text goes on where the image would end unpruned (compact: pruned) under the same rule:
                             ceil(K * factor), n, ceil(n * factor), n + offset, n. No visual ID then reaches the text's.
          @after             largest visual ID + 1: isolates the gap between the last kept token and the text
          @original          n: the text stands where it would unpruned, which isolates the image's own IDs
          @compact           K: the text stands where re-numbering puts it, which isolates the text's IDs
                             (with @original and @compact the IDs of image and text may overlap)

Shares and factors are exact: 0.75 and 3/4 are the same, and the denominator is at most a million.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil, floor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.registry import pick
from analysis.types import Selection

Value = Fraction | int | None


class Spec(NamedTuple):
    """A parsed specification. value: share, factor, offset or None; text: a name in `TEXT`, None for the default."""

    name: str
    value: Value
    text: str | None


class Ids(NamedTuple):
    """IDs of one image, counted from its first slot. visual: [K] int64; text: of the first token after the image."""

    visual: Tensor
    text: int


def _shuffle(origin: Tensor, share: Fraction, seed: int, stream: int) -> Tensor:
    """[K] permutation that fixes all but round-half-up(share * K) places; seeds agree across streams, draws do not."""
    rng = np.random.default_rng((seed, stream))
    order = np.arange(len(origin))
    places = rng.choice(order, floor(share * len(origin) + Fraction(1, 2)), replace=False)
    order[np.sort(places)] = places
    return torch.from_numpy(order).to(origin.device)


def _compact(origin: Tensor) -> Tensor:
    return torch.arange(len(origin), device=origin.device)


# (origin [K] as emitted, value, seed) -> [K] permutation of the tokens
ORDERS: dict[str, Callable[[Tensor, Value, int], Tensor]] = {
    "method": lambda origin, value, seed: _compact(origin),
    "raster": lambda origin, value, seed: origin.argsort(stable=True),
    "shuffled": lambda origin, value, seed: _shuffle(origin, value, seed, stream=0),
}

# (origin [K] in physical order, n, value, seed) -> [K] int64 IDs
IDS: dict[str, Callable[[Tensor, int, Value, int], Tensor]] = {
    "compact": lambda origin, n, value, seed: _compact(origin) * value.numerator // value.denominator,
    "original": lambda origin, n, value, seed: origin,
    "compressed": lambda origin, n, value, seed: origin * value.numerator // value.denominator,
    "shifted": lambda origin, n, value, seed: origin + value,
    "shuffled": lambda origin, n, value, seed: origin[_shuffle(origin, value, seed, stream=1)],
}

# (n, K, value) -> ID of the first text token, where the specification has no @
_TEXT_OF_IDS: dict[str, Callable[[int, int, Value], int]] = {
    "compact": lambda n, k, value: ceil(k * value),
    "original": lambda n, k, value: n,
    "compressed": lambda n, k, value: ceil(n * value),
    "shifted": lambda n, k, value: n + value,
    "shuffled": lambda n, k, value: n,
}

# (n, IDs [K]) -> ID of the first text token, by the name after @
TEXT: dict[str, Callable[[int, Tensor], int]] = {
    "after": lambda n, ids: int(ids.max()) + 1,
    "original": lambda n, ids: n,
    "compact": lambda n, ids: len(ids),
}


def _fraction(text: str) -> Fraction:
    text = str(float(text)) if "e" in text.lower() else text  # 1e999999999 as a fraction would fill the memory
    return Fraction(text).limit_denominator(10**6)  # bounded, so that origin * numerator stays inside int64


# how to read a value, which ones are valid, that in words, the value where none is written
_VALUES: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str, str]] = {
    "shuffled": (_fraction, lambda share: 0 <= share <= 1, "a share in [0, 1], as in 'shuffled:0.5'", "1"),
    "compact": (_fraction, lambda factor: 0 < factor <= 1, "a factor in (0, 1], as in 'compact:0.5'", "1"),
    "compressed": (_fraction, lambda factor: 0 < factor <= 1, "a factor in (0, 1], as in 'compressed:0.75'", ""),
    "shifted": (int, lambda offset: 0 <= offset < 2**31, "an integer offset >= 0, as in 'shifted:100'", ""),
}


def parse_spec(spec: str, registry: dict[str, Callable] = IDS) -> Spec:
    """Read a specification of IDs, or of an order with registry=ORDERS.

    Raises ValueError on an unknown name or text rule, a missing or surplus value, a value out of range, and an order
    with a text rule.
    """
    if not isinstance(spec, str):
        raise ValueError(f"an order or IDs are named by a text such as 'original', got {spec!r:.60}")
    rest, at, text = spec.partition("@")
    name, colon, written = rest.partition(":")
    pick(registry, name, "order" if registry is ORDERS else "IDs")
    if at and registry is ORDERS:
        raise ValueError(f"an order has no text rule, got {spec!r}; write {rest!r} and give '@{text}' to the IDs")
    if at:
        pick(TEXT, text, "text rule")
    if name not in _VALUES:
        if colon:
            raise ValueError(f"{name!r} takes no value, got {spec!r}")
        return Spec(name, None, text or None)
    read, valid, wanted, default = _VALUES[name]
    try:
        value = read(written if colon else default)
    except (ValueError, ZeroDivisionError):
        value = None
    if value is None or not valid(value):
        raise ValueError(f"{name!r} needs {wanted}, got {spec!r}")
    return Spec(name, value, text or None)


def reorder(selection: Selection, spec: str, seed: int) -> Selection:
    """The same tokens in the order that `spec` names. Raises ValueError as `parse_spec`."""
    name, value, _ = parse_spec(spec, ORDERS)
    return selection.take(ORDERS[name](selection.origin, value, seed))


def assign(origin: Tensor, n: int, spec: str, seed: int) -> Ids:
    """IDs of one image's visual tokens and of the text after it.

    origin: [K] int64, raster indices before pruning in physical order; n: visual tokens before pruning.
    Raises ValueError as `parse_spec`, and unless there is a token and every origin is in 0..n-1; without that the
    default text rules could give a visual token an ID that text has.
    """
    name, value, text = parse_spec(spec)
    if len(origin) == 0 or origin.min() < 0 or origin.max() >= n:
        raise ValueError(f"origin must hold at least one raster index, all in 0..{n - 1}, got {origin.tolist()}")
    ids = IDS[name](origin, n, value, seed)
    return Ids(ids, TEXT[text](n, ids) if text else _TEXT_OF_IDS[name](n, len(origin), value))


def layout(prefix: int, visual: Tensor, text: int, suffix: int) -> Tensor:
    """Position IDs [prefix + K + suffix] of text, image, text.

    prefix, suffix: text tokens before and after the image; visual, text: as in `Ids`. Raises ValueError if one is < 0.
    """
    if min(prefix, text, suffix) < 0:
        raise ValueError(f"prefix, text and suffix must be >= 0, got {prefix}, {text} and {suffix}")
    before, after = (torch.arange(length, device=visual.device) for length in (prefix, suffix))
    return torch.cat([before, prefix + visual, prefix + text + after])
