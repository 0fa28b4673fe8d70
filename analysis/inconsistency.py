"""How often a reader looks at what a selector would drop: R_inc of arXiv:1805.06266, of both papers' models.

In summarization the reader's steps look at words and the selector weighs sentences; in pruning both are visual tokens
(`engine.attention`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def of_words(beta: Tensor, sentence: Tensor) -> Tensor:
    """[B, M]: beta [B, N] of each word's sentence [B, M]; 0 for padding and for sentences past the limit N."""
    n = beta.shape[1]
    return beta.gather(1, sentence.clamp(0, n - 1)) * ((sentence >= 0) & (sentence < n))


class Rate(NamedTuple):
    """Each [B]: rate, R_inc; chance, what attention at random would have; ratio of the two, NaN where chance is 0."""

    rate: Tensor
    chance: Tensor
    ratio: Tensor


def inconsistency_rate(
    alpha: Tensor, beta: Tensor, sentence: Tensor, sentences: Tensor | None = None, written: Tensor | None = None
) -> Rate:
    """R_inc: share of steps whose most attended word is in a sentence with beta below the article's mean beta.

    alpha: [B, T, M]; beta: [B, N]; sentence: [B, M], -1 for padding; sentences: [B], how many there are, N by default;
    written: [B, T], all steps by default. chance: share of words in such sentences; those past the limit N have beta 0.
    An article with nothing written has rate NaN.
    """
    beta = beta.double()  # exact sums: the mean of equal betas must not be above them
    there = torch.ones_like(beta, dtype=torch.bool)
    if sentences is not None:
        there = torch.arange(beta.shape[1], device=beta.device) < sentences[:, None]
    mean = (beta * there).sum(1) / there.sum(1)
    words = sentence >= 0
    below = of_words(beta, sentence) < mean[:, None]
    written = torch.ones(alpha.shape[:2], dtype=torch.bool, device=alpha.device) if written is None else written
    looked = below.gather(1, alpha.argmax(-1))  # [B, T]
    rate, chance = ((x & y).sum(1) / y.sum(1) for x, y in ((looked, written), (below, words)))
    return Rate(rate, chance, torch.where(chance > 0, rate / chance, torch.nan))
