"""Abstracts from the model: beam search as in See et al., arXiv:1704.04368, and greedy search.

A beam of K goes on with the K likeliest words that do not stop; what stops is finished if it is likelier than the last
of these. It ends when K are finished or the length is reached, and the best is the one with the highest mean log
probability per token, START and STOP included; what is unfinished counts only where nothing is finished.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from analysis.summarization.batch import PAD, START, STOP, UNK, Batch
from analysis.summarization.model import Memory, State, Unified


class Hypothesis(NamedTuple):
    """tokens: at least one, IDs as in a batch's `extended`, without START and STOP (`text` turns them to words).

    score: mean log probability; alpha, alphahat: [steps, M], a step for each token, and one for STOP where it was
    reached; beta: [N]; sentence: [M], that of each word attended to, -1 for padding (two-stage reads fewer words).
    """

    tokens: list[int]
    score: float
    alpha: Tensor
    alphahat: Tensor
    beta: Tensor
    sentence: Tensor


def _rows(parts: Memory | State, index: Tensor) -> Memory | State:
    """The given rows [R] of each part."""
    return type(parts)(*(part if part is None else part[index] for part in parts))


@torch.inference_mode()
def beam_search(
    model: Unified,
    batch: Batch,
    system: str = "end-to-end",
    *,
    beam: int = 4,
    shortest: int = 35,
    longest: int = 120,
    coverage: bool = True,
) -> list[Hypothesis]:
    """The best abstract of each article of the batch.

    beam: K; shortest: tokens without STOP, but never an empty abstract; longest: tokens with STOP; system, coverage: as
    for `Unified`. Words outside the vocabulary are copied, and read as UNK by the next step. Raises ValueError for
    beam < 1, a negative shortest, and lengths that no abstract can have; other errors as for `Unified.read`.
    """
    if beam < 1 or not 0 <= shortest <= longest or longest < 1:
        raise ValueError(
            f"a search needs beam >= 1, 0 <= shortest <= longest and longest >= 1, got beam={beam}, "
            f"shortest={shortest}, longest={longest}"
        )
    reading = model.read(batch, system)
    batch, abstracter, size = reading.batch, model.abstracter, model.sizes.vocabulary
    articles, device = len(batch.words), batch.words.device
    first = torch.arange(articles, device=device) * beam  # the first row of each article: row = article * beam + place
    every = torch.arange(articles, device=device).repeat_interleave(beam)
    memory, state = (_rows(part, every) for part in abstracter.encode(batch.words, reading.modulation))
    extended, oov = batch.extended[every], max(map(len, batch.oov))

    score = torch.full((articles, beam), -torch.inf, device=device)
    score[:, 0] = 0  # all rows are equal at the beginning, so only one may go on
    latest = torch.full_like(every, START)
    tokens, parents, seen = [], [], []  # of each step: [B * K], [B * K] and alpha, alphahat [B * K, M]
    done: list[list[tuple[float, int, int]]] = [[] for _ in range(articles)]  # score, step and row where STOP came

    for step in range(longest):
        word = abstracter.from_word(abstracter.embed(latest.where(latest < size, UNK)))
        state, left = abstracter.step(word, memory, state, coverage)
        log_prob = abstracter.distribution(left, extended, oov).log()
        log_prob[:, [PAD, START] + [STOP] * (step < max(shortest, 1))] = -torch.inf
        seen.append((left.alpha, left.alphahat))

        # one STOP per row at most: among the best 2 K are K that go on
        best, place = (score[..., None] + log_prob.view(articles, beam, -1)).flatten(1).topk(2 * beam)
        token, row = place % log_prob.shape[1], first[:, None] + place // log_prob.shape[1]
        stops = token == STOP
        ends = stops & best.isfinite() & ((~stops).cumsum(1) < beam)
        for article, i in ends.nonzero().tolist():
            if len(done[article]) < beam:
                done[article].append((float(best[article, i]) / (step + 2), step, int(row[article, i])))
        if all(len(found) == beam for found in done):
            break
        onward = stops.sort(dim=1, stable=True).indices[:, :beam]
        score, latest, row = (x.gather(1, onward) for x in (best, token, row))
        latest, row = latest.flatten(), row.flatten()
        state = _rows(state, row)
        tokens.append(latest)
        parents.append(row)

    history = [(token.tolist(), row.tolist()) for token, row in zip(tokens, parents)]
    found = []
    for article, ended in enumerate(done):
        if ended:
            value, step, row = max(ended)
            rows, words = [row], []  # that of the step which gave STOP
        else:
            step, row = longest, int(first[article])  # the likeliest comes first
            value, rows, words = float(score[article, 0]) / (longest + 1), [], []
        for token, parent in reversed(history[:step]):
            words.append(token[row])
            row = parent[row]
            rows.append(row)
        alpha, alphahat = (torch.stack([seen[t][kind][r] for t, r in enumerate(reversed(rows))]) for kind in (0, 1))
        found.append(Hypothesis(words[::-1], value, alpha, alphahat, reading.beta[article], batch.sentence[article]))
    return found


greedy = partial(beam_search, beam=1)  # a beam of one goes on with the likeliest word until that is STOP
