"""Begin a larger language model as exactly the function of a smaller one, which training then goes on from.

The smaller one's weights fill the first rows and columns. What would reach a new channel of the residual stream starts
at zero, what reads from one keeps its random start (times zero until it learns), and a new block adds nothing at first.
RMSNorm divides by the root mean square over more channels, so its weights shrink by sqrt(old / new).
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import nn

WRITERS = ("o_proj.weight", "down_proj.weight")  # what a block adds to the residual stream goes through these


@torch.no_grad()
def grow(larger: nn.Module, smaller: nn.Module) -> None:
    """Fill `larger` (decoder, head or connector) so that it computes what `smaller` computes.

    Heads keep their size, so the old ones stay whole. Raises ValueError if a part of `smaller` finds no place.
    """
    new, old = dict(larger.named_parameters()), dict(smaller.named_parameters())
    if lost := [
        name
        for name, weight in old.items()
        if name not in new or any(a > b for a, b in zip(weight.shape, new[name].shape, strict=True))
    ]:
        raise ValueError(f"the larger model has no room for {', '.join(lost)}")
    for name, weight in new.items():
        if name not in old:
            if name.endswith(WRITERS):
                weight.zero_()
            continue
        place, scale = tuple(map(slice, old[name].shape)), 1.0
        if "norm" in name:
            scale = sqrt(len(old[name]) / len(weight))
        elif name.endswith(WRITERS) or name.startswith("linear_"):
            weight.zero_()
        elif name.endswith(
            "embed_tokens.weight"
        ):  # known words do not write to new channels; new words are as loud as they
            weight.normal_(std=float(old[name].std()))
            weight[: len(old[name])] = 0
        weight[place] = old[name] * scale
