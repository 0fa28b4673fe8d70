"""Do the selector and the reader agree? The second paper's questions, asked of visual token pruning.

arXiv:1805.06266 selects sentences with weights beta and writes with word attention alpha. Read here: a sentence is a
visual token, beta the pruner's score, alpha the decoder's attention over visual tokens in the unpruned run, their hard
two-stage model prune-then-decode, their modulation softmax(e + log beta) a bias on attention logits, and their
inconsistency rate R_inc the share of decoding steps that look at what the pruner would drop.

alpha, stated once: teacher-forced over the model's own greedy answer; the query of step t is the token before answer
token t; mean over all layers and heads; visual tokens only, without sinks (`sinks`).

Only models whose tokens are one grid are read this way: with newlines or tiles (LLaVA-NeXT) no score ranks all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from analysis.engine import shared_prefix
from analysis.engine.decode import (
    Context,
    Inputs,
    PromptInputs,
    greedy,
    grouped,
    hidden_states,
    joined,
    prefill_shared,
    prompt_inputs,
)
from analysis.engine.evaluate import EXPRESSION, box_draft, id_columns, image_seed, texts
from analysis.engine.stages import layer_text
from analysis.inconsistency import inconsistency_rate
from analysis.models import Model
from analysis.pruning import pruner as find_pruner
from analysis.pruning._budget import check_keep
from analysis.pruning.common import ranking
from analysis.pruning.images import prune_images
from analysis.registry import pick
from analysis.types import Cell, Ids, RecDataset, Selection, VisualTokens

# Chosen on 60 training scenes: 3 takes out 0.03, 2.3 and 0.03 of 144 tokens an image (tiny-llava, -wide, tiny-shikra)
SINK = 3.0

Prompt = tuple[Tensor, Tensor]  # token IDs before and after the image, as `Model.prompt` gives them


def one_grid(visual: VisualTokens) -> VisualTokens:
    """The tokens themselves. Raises ValueError where newlines or tiles stand among them."""
    if visual.tiles is not None or visual.newline is not None:
        raise ValueError(
            "attention is compared with a pruner's score on models whose visual tokens are one grid; this "
            "one has tiles: take tiny-llava, tiny-llava-wide, tiny-shikra or a real LLaVA-1.5"
        )
    return visual


def survivors(selections: Sequence[Selection], n: int) -> Tensor:
    """[B, n] bool: the tokens that stay as themselves. What is merged into another token counts as dropped."""
    stay = torch.zeros(len(selections), n, dtype=torch.bool)
    for row, selection in zip(stay, selections):
        row[selection.origin[~selection.synthetic].cpu()] = True
    return stay


def soft_weights(scores: Tensor, keep: float) -> Tensor:
    """beta [B, N] in (0, 1] for soft selection, by rank: the r-th best of N scores gets (1 - r / N)^(1/keep - 1).

    scores: [B, N]; r counts from 0, ties go to the lower index. The exponent makes the mean of beta equal to keep, or
    at most 1 / N more: the budget that hard selection spends. keep = 1 gives 1 everywhere.
    Raises ValueError unless 0 < keep <= 1.
    """
    check_keep(keep)
    rank = ranking(scores).argsort(dim=1)
    return (1 - rank.double() / scores.shape[1]) ** (1 / keep - 1)  # float64: small ratios of many tokens underflow


class _Biased:
    """A decoder, as `decode` calls it, that adds a bias [M, N] to the attention logits of the last N keys."""

    def __init__(self, decoder: nn.Module, bias: Tensor):
        self.decoder, self.bias = decoder, bias[:, None, None]

    def __call__(self, *, attention_mask: Tensor, **inputs: Any) -> Any:
        mask = attention_mask.clone()
        mask[..., -self.bias.shape[-1] :] += self.bias.to(mask.dtype)
        return self.decoder(attention_mask=mask, **inputs)


class AskedImages(NamedTuple):
    """B expressions on I images. features: [I, N, D], raster order; unpruned: as `VisualTokens.unpruned`; image: [B],
    which one; prompts: of each."""

    features: Tensor
    unpruned: Ids
    image: Sequence[int]
    prompts: Sequence[Prompt]

    def inputs(self, model: Model) -> list[PromptInputs]:
        """The unpruned prompt of each expression."""
        return [
            prompt_inputs(model.embed, prompt, self.features[image], self.unpruned)
            for prompt, image in zip(self.prompts, self.image)
        ]

    def context(self, model: Model, inputs: Sequence[PromptInputs], bias: Tensor | None = None) -> Context:
        """All that comes up to the image's end, prefilled once for the expressions that share it.

        bias: [B, N], of the logits of the image's keys, for the image's own queries and for all that come later.
        """
        firsts, owner = grouped(
            (image, tuple(before.tolist()), None if bias is None else bias[row].cpu().numpy().tobytes())
            for row, (image, (before, _)) in enumerate(zip(self.image, self.prompts))
        )
        shared = [joined(inputs[row].before, inputs[row].image) for row in firsts]
        if bias is None:
            return prefill_shared(model.decoder, shared, owner)
        (prefix,) = prefill_shared(_Biased(model.decoder, bias[firsts]), shared, owner)
        mask = prefix.mask.clone()  # a prefill pads on the left: the image is at the end
        mask[..., -bias.shape[1] :] += bias[firsts][:, None, None].to(mask.dtype)
        return (prefix._replace(mask=mask),)


@torch.inference_mode()
def answers(
    model: Model, asked: AskedImages, beta: Tensor | None = None, draft: Sequence[int] = ()
) -> list[list[int] | None]:
    """Greedy answers (token IDs, as `decode.greedy`) with all visual tokens and their IDs, weighted by beta [B, N].

    At every layer and head every query sees visual key j with log beta_j added to its logit: beta = 0 on what a method
    drops is hard pruning with original IDs in raster order, beta = 1 no pruning.
    Raises ValueError unless beta has a row for each expression and lies in [0, 1].
    """
    bias = None
    if beta is not None:
        shape = (len(asked.prompts), asked.features.shape[1])
        if beta.shape != shape or not ((beta >= 0) & (beta <= 1)).all():
            raise ValueError(
                f"beta must be {list(shape)} in [0, 1], a row for each expression; got {list(beta.shape)} "
                f"in [{beta.min():.3g}, {beta.max():.3g}]"
            )
        bias = beta.to(asked.features.device).log()
    inputs = asked.inputs(model)
    return greedy(model, [one.after for one in inputs], asked.context(model, inputs, bias), draft=draft)


@contextmanager
def captured(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the decoder's calls append each layer's attention, mean over heads, [B, Q, L] to the list it gives.

    The fused kernels, which keep their attention to themselves, are not used meanwhile.
    """
    seen, long = [], shared_prefix.LONG
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1].float().mean(dim=1)))
        for layer in decoder.layers
    ]
    shared_prefix.LONG = math.inf
    try:
        yield seen
    finally:
        shared_prefix.LONG = long
        for hook in hooks:
            hook.remove()


class Look(NamedTuple):
    """What one expression's unpruned run looked at. alpha: [S + T, N], attention to the visual tokens of each query
    after the image (S tokens of the question, T of the answer), mean over layers and heads; answer: T token IDs."""

    alpha: Tensor
    answer: list[int]

    @property
    def steps(self) -> Tensor:
        """[T, N]: the queries that chose the answer's tokens."""
        return self.alpha[len(self.alpha) - len(self.answer) - 1 : -1]


@torch.inference_mode()
def look(model: Model, asked: AskedImages) -> list[Look]:
    """The unpruned run's attention for each expression, teacher-forced over its own greedy answer.

    An answer that is no text (NaN logits) counts as empty.
    """
    n, found = asked.features.shape[1], [answer or [] for answer in answers(model, asked)]
    said = [torch.tensor(answer, dtype=torch.int64, device=asked.features.device) for answer in found]
    inputs = asked.inputs(model)
    context = asked.context(model, inputs)
    forced = [
        joined(
            one.after, Inputs(model.embed(s), one.after.position_ids[-1] + 1 + torch.arange(len(s), device=s.device))
        )
        for one, s in zip(inputs, said)
    ]
    end = context[0].mask.shape[-1]  # of the image: a prefill pads on the left
    with captured(model.decoder) as seen:
        hidden_states(model.decoder, forced, "right", context)
    alpha = torch.stack(seen).mean(dim=0)[..., end - n : end].cpu()
    return [Look(a[: len(one.embeds)], answer) for a, one, answer in zip(alpha, forced, found)]


def sinks(looks: Sequence[Look], times: float | None = SINK) -> Tensor:
    """[N] bool: the tokens of one image that more than half of all queries (of every expression on it, in question and
    answer) give more than `times` their mean attention to a visual token. None: no sinks.
    """
    alpha = torch.cat([one.alpha for one in looks])
    if times is None:
        return torch.zeros(alpha.shape[1], dtype=torch.bool)
    return (alpha > times * alpha.mean(dim=1, keepdim=True)).float().mean(dim=0) > 0.5


def agreement(looks: Sequence[Look], beta: Tensor, stay: Tensor, sink: Tensor) -> dict[str, list[float]]:
    """How B looks go with a selector; each value a list over the expressions.

    beta: [B, N] scores; stay: [B, N] bool; sink: [B, N] bool, left out of everything.
    score_rate, score_chance: R_inc as published, a step counts whose most attended token has beta below the mean,
    chance is the share of such tokens; rate, chance: the same of beta = 1 for what stays, 0 for what is dropped, so the
    share of steps whose most attended token is dropped; mass: share of the attention that stays, mean over steps. NaN
    for an empty answer, score_* also where beta is NaN.
    """
    alpha = pad_sequence([one.steps for one in looks], batch_first=True).masked_fill(sink[:, None], 0)
    written = torch.arange(alpha.shape[1]) < torch.tensor([len(one.answer) for one in looks])[:, None]
    place = torch.arange(alpha.shape[2]).expand(len(looks), -1).masked_fill(sink, -1)
    found = {}
    for name, weights in (("score_", beta.double()), ("", stay.double())):
        mean = torch.where(sink, 0, weights).sum(1, keepdim=True) / (~sink).sum(1, keepdim=True)
        measured = inconsistency_rate(alpha, torch.where(sink, mean, weights), place, written=written)
        known = ~weights.isnan().any(dim=1)
        for part in ("rate", "chance"):
            found[name + part] = torch.where(known, getattr(measured, part), torch.nan).tolist()
    share = (alpha * stay[:, None]).sum(2) / alpha.sum(2)
    found["mass"] = (torch.where(written, share, 0).sum(1) / written.sum(1)).tolist()
    return found


def attention_rows(
    model: Model,
    dataset: RecDataset,
    pruners: Sequence[str],
    keeps: Sequence[float],
    soft: Sequence[str] = (),
    *,
    sink: float | None = SINK,
    seed: int = 0,
    chunk: int = 10,
    progress: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Attention against selection, and answers under soft selection: two frames, a row for each expression and cell.

    The first holds the columns of `agreement`, steps (T) and tokens (that stay as themselves) for each pruner and keep
    ratio. The second the columns of `evaluate`'s rows for each of the pruners `soft`, with order "raster", IDs
    "original" and all tokens. sink: as for `sinks`; chunk: images worked on together.
    Raises ValueError for a pruner in `soft` without a score, for a model with tiles, and what the pruners raise.
    """
    prune = {name: find_pruner(name) for name in (*pruners, *soft)}
    score = {name: method.score for name, method in prune.items() if method.score is not None}
    if unscored := [name for name in soft if name not in score]:
        raise ValueError(f"soft selection needs a score for each token; {', '.join(unscored)} has none")
    draft = box_draft(model)
    looked, answered, image_ids = [], [], dataset.rows["image_id"].unique()
    for start in tqdm(range(0, len(image_ids), chunk), unit=" chunks", disable=not progress):
        part = list(image_ids[start : start + chunk])
        rows = dataset.rows[dataset.rows["image_id"].isin(part)].reset_index(drop=True)
        visual = one_grid(model.encode([dataset.image(image_id) for image_id in part]))
        n, index = visual.length, torch.tensor([part.index(image_id) for image_id in rows["image_id"]])
        pairs = visual.take(index.to(visual.features.device), **model.texts(list(rows["expression"])))
        seeds = [image_seed(seed, image_id) for image_id in rows["image_id"]]
        asked = AskedImages(
            visual.features,
            visual.unpruned,
            index.tolist(),
            [model.prompt(expression) for expression in rows["expression"]],
        )
        looks, scores = look(model, asked), {name: compute(pairs, seeds).cpu() for name, compute in score.items()}
        expressions = id_columns(model, dataset, rows, EXPRESSION)
        unknown = torch.full((len(rows), n), torch.nan)
        of_image = [[one for one, i in zip(looks, asked.image) if i == image] for image in range(len(part))]
        sunk = torch.stack([sinks(some, sink) for some in of_image])[index]
        for name, keep in product(pruners, keeps):
            stay = survivors(prune_images(prune[name], pairs, keep, seeds), n)
            looked.append(
                expressions.assign(
                    pruner=name,
                    keep=keep,
                    seed=seed,
                    tokens=stay.sum(1).tolist(),
                    steps=[len(one.answer) for one in looks],
                    **agreement(looks, scores.get(name, unknown), stay, sunk),
                )
            )
        for name, keep in product(soft, keeps):
            raw, error = texts(model, answers(model, asked, soft_weights(scores[name], keep), draft))
            answered.append(
                expressions.assign(
                    raw=raw,
                    dialect=model.box_format,
                    frame=model.frame,
                    **Cell(name, keep, "raster", "original", seed).columns(),
                    tokens=float(n),
                    tokens_full=float(n),
                    layer_tokens=layer_text([(0, n)]),
                    error=error,
                )
            )
    return tuple(pd.concat(tables, ignore_index=True) if tables else pd.DataFrame() for tables in (looked, answered))


class Ratio(NamedTuple):
    """A measure of P points on I images, each [P, I]: a point's value is sum(above) / sum(below) over the images."""

    above: NDArray
    below: NDArray


def _ranks(values: NDArray, weights: NDArray) -> NDArray:
    """Ranks [R, P] of values [R, P], each point as often as its weight says; equal ones share their middle rank."""
    below = (values[:, None, :] < values[:, :, None]) + 0.5 * (values[:, None, :] == values[:, :, None])
    return np.einsum("rpq,rq->rp", below, weights)


def _spearman(x: NDArray, y: NDArray, groups: NDArray, weights: NDArray) -> NDArray:
    """Rank correlation [R] of x and y [R, P] within each group of points [P], mean over groups; NaN without spread.

    weights: [R, P], how often each point stands in the sample.
    """
    found = []
    for group in np.unique(groups):
        here, times = groups == group, weights[:, groups == group]
        a, b = (_ranks(values[:, here], times) for values in (x, y))
        with np.errstate(invalid="ignore"):
            total = times.sum(1, keepdims=True)
            a, b = (ranks - (times * ranks).sum(1, keepdims=True) / total for ranks in (a, b))
            found.append((times * a * b).sum(1) / np.sqrt((times * a**2).sum(1) * (times * b**2).sum(1)))
    return np.mean(found, axis=0)


def rank_correlations(
    measures: Mapping[str, Ratio],
    outcome: Ratio,
    groups: Sequence[Any],
    reference: str,
    methods: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Spearman's rho of each measure with the outcome over P points: a dict for each measure.

    groups: [P]; rho is taken within each and averaged (one group for all: plain). low, high: percentile bootstrap that
    resamples images and computes every point anew. methods: [P], the pruning method of each point; given, methods are
    resampled, too, each with all its points: without that an interval says nothing about methods that were not tried.
    difference, difference_low, difference_high: rho minus that of the measure `reference`, on the same resamples. A
    resample without spread has no rho and is left out. Raises ValueError for an unknown reference.
    """
    pick(measures, reference, "measure")
    images, groups = outcome.above.shape[1], np.asarray(groups)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    weights = np.vstack([np.ones(images), drawn])  # the first row: the data as they are
    times = np.ones((resamples + 1, len(groups)))
    if methods is not None:
        codes, names = pd.factorize(np.asarray(methods))
        times[1:] = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)[:, codes]

    def value(x: Ratio) -> NDArray:
        return (weights @ x.above.T) / (weights @ x.below.T)

    rho = {name: _spearman(value(x), value(outcome), groups, times) for name, x in measures.items()}
    tails = [(1 - level) / 2, (1 + level) / 2]
    rows = []
    for name, values in rho.items():
        less = values - rho[reference]
        low, high, less_low, less_high = (float(q) for v in (values, less) for q in np.nanquantile(v[1:], tails))
        rows.append(
            {
                "measure": name,
                "rho": float(values[0]),
                "low": low,
                "high": high,
                "difference": float(less[0]),
                "difference_low": less_low,
                "difference_high": less_high,
                "points": len(groups),
                "images": images,
            }
        )
    return rows
