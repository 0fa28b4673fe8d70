"""What the unified model is trained on, and how often its two attentions disagree (arXiv:1805.06266).

Each loss is a mean over an article's sentences or steps, then over the batch's articles. B articles, M words,
N sentences, T steps; written: [B, T] bool, the steps that have a target.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from analysis.inconsistency import of_words
from analysis.registry import pick
from analysis.summarization.batch import PAD
from analysis.summarization.model import Output

# the paper's; where one is left out, the loss is not computed
WEIGHTS = {"extraction": 5.0, "abstraction": 1.0, "coverage": 1.0, "inconsistency": 1.0}


def _mean(values: Tensor, there: Tensor) -> Tensor:
    """Mean of values [B, L] over each row as far as there [B, L] bool, then over the rows."""
    return (values.masked_fill(~there, 0).sum(1) / there.sum(1).clamp(min=1)).mean()


def extraction(logits: Tensor, labels: Tensor, sentences: Tensor) -> Tensor:
    """L_ext: binary cross-entropy of logits [B, N] with labels [B, N]; sentences: [B], how many there are."""
    there = torch.arange(logits.shape[1], device=logits.device) < sentences[:, None]
    return _mean(binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none"), there)


def abstraction(log_prob: Tensor, written: Tensor) -> Tensor:
    """L_abs = -(1/T) sum_t log P_final(y_t); log_prob: [B, T]."""
    return -_mean(log_prob, written)


def coverage(alphahat: Tensor, written: Tensor) -> Tensor:
    """L_cov = (1/T) sum_t sum_m min(alphahat_m, sum of the earlier alphahat_m); alphahat: [B, T, M]."""
    earlier = pad(alphahat.cumsum(1)[:, :-1], (0, 0, 1, 0))
    return _mean(torch.minimum(alphahat, earlier).sum(-1), written)


def inconsistency(alpha: Tensor, beta: Tensor, written: Tensor, k: int = 3) -> Tensor:
    """L_inc = -(1/T) sum_t log((1/K) sum of alpha_m beta_m over the K words with the largest alpha_m).

    alpha: [B, T, M], not modulated; beta: [B, M], of each word's sentence. Both get a gradient. An article of fewer
    than K words counts 0 for those that it lacks.
    """
    if k < 1:
        raise ValueError(f"the inconsistency loss needs at least one word, got k={k}")
    top, where = alpha.topk(min(k, alpha.shape[-1]), dim=-1)
    mean = (top * beta[:, None].expand_as(alpha).gather(-1, where)).sum(-1) / k
    return -_mean(mean.clamp(min=torch.finfo(torch.float32).tiny).log(), written)


LOSSES = {
    "extraction": lambda output, written: extraction(output.logits, output.batch.labels, output.batch.sentences),
    "abstraction": lambda output, written: abstraction(output.log_prob, written),
    "coverage": lambda output, written: coverage(output.alphahat, written),
    "inconsistency": lambda output, written: inconsistency(
        output.alpha, of_words(output.beta, output.batch.sentence), written
    ),
}


def total(output: Output, weights: Mapping[str, float] = WEIGHTS) -> dict[str, Tensor]:
    """The losses that `weights` names, and "total", their weighted sum. Raises ValueError for an unknown name."""
    written = output.batch.target != PAD
    losses = {name: pick(LOSSES, name, "loss")(output, written) for name in weights}
    return losses | {"total": sum(weights[name] * loss for name, loss in losses.items())}
