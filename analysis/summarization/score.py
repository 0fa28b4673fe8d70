"""What a summary and an extraction are worth: ROUGE, recall, novelty, length, and whether two systems differ.

ROUGE is rouge-score's with stemming; RL is rougeLsum over sentences, ROUGE-1.5.5's ROUGE-L of a summary (plain rougeL
takes a summary as one sentence and gives far less). A summary is a list of tokenised sentences;
`analysis.summarization.data.cut` makes one of a decoder's words. All shares are in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from analysis.registry import matching
from analysis.stats import paired_difference
from analysis.summarization.data import Document

METRICS = {"R1": "rouge1", "R2": "rouge2", "RL": "rougeLsum"}
VALUES = ("precision", "recall", "f1")
Sentences = Sequence[Sequence[str]]


@cache
def _scorer() -> RougeScorer:
    tokenizer = DefaultTokenizer(use_stemmer=True)
    tokenizer._stemmer.stem = lru_cache(2**17)(tokenizer._stemmer.stem)  # most of the time goes into stemming
    return RougeScorer(list(METRICS.values()), tokenizer=tokenizer)


def _text(summary: Sentences) -> str:
    return "\n".join(" ".join(words) for words in summary)


def rouge(summaries: Sequence[Sentences], documents: Sequence[Document]) -> pd.DataFrame:
    """One row per document and metric (R1, R2, RL): document, metric, precision, recall, f1.

    An empty summary scores 0. Raises ValueError for an empty abstract, for a document that is there twice and for
    another number of summaries than of documents.
    """
    if len(summaries) != len(documents):
        raise ValueError(f"one summary per document: got {len(summaries)} summaries, {len(documents)} documents")
    if len({document.id for document in documents}) < len(documents):
        raise ValueError("each document needs an ID of its own, for scores are paired by it")
    rows = []
    for summary, document in zip(summaries, documents):
        if not any(document.abstract):
            raise ValueError(f"document {document.id!r} has no abstract to compare with")
        scores = _scorer().score(_text(document.abstract), _text(summary))
        rows += [(document.id, metric, *scores[name]) for metric, name in METRICS.items()]
    return pd.DataFrame(rows, columns=["document", "metric", *VALUES])


def difference(a: pd.DataFrame, b: pd.DataFrame, metric: str = "R1", value: str = "f1", **options) -> dict[str, float]:
    """difference = mean of b - mean of a over the same documents, low, high, p (`paired_difference`), and n documents.

    a, b: from `rouge`. options: level, resamples, permutations, seed. Raises ValueError where the documents differ.
    """
    one, two = (matching(scores, {"metric": metric}).set_index("document")[value] for scores in (a, b))
    if not one.index.is_unique or not two.index.is_unique or set(one.index) != set(two.index) or one.empty:
        raise ValueError(
            f"a and b must have the {metric} of the same documents, each once: a has {len(one)}, b has "
            f"{len(two)}, {len(one.index.intersection(two.index))} are in both"
        )
    return paired_difference(one, two.reindex(one.index), one.index, **options) | {"n": len(one)}


def lead(document: Document, count: int = 3) -> list[list[str]]:
    """The first sentences: the baseline lead-3."""
    return document.article[:count]


def oracle(document: Document) -> list[list[str]]:
    """The sentences labelled 1: what an extractor without fault would take. Raises ValueError without labels."""
    if document.labels is None:
        raise ValueError(f"document {document.id!r} has no labels; data.labelled(documents) finds them")
    return [words for words, label in zip(document.article, document.labels) if label]


def selected_sentences(beta: ArrayLike, threshold: float = 0.5, floor: int = 0, budget: int | None = None) -> list[int]:
    """Sentences to extract by their scores beta [N], in the order of the article.

    Those above the threshold, but at least `floor` of them; with a budget, exactly so many, whatever their score. The
    best ones first, of equal ones the earlier; never more than there are. Raises ValueError for a beta outside [0, 1].
    """
    beta = np.asarray(beta, dtype=np.float64)
    if beta.ndim != 1 or not ((beta >= 0) & (beta <= 1)).all():
        raise ValueError(f"beta must be one number in [0, 1] per sentence, got {beta.tolist()!s:.60}")
    count = max(int((beta > threshold).sum()), floor) if budget is None else budget
    return sorted(np.argsort(-beta, kind="stable")[:count].tolist())


def extractor_recall(
    documents: Sequence[Document], betas: Sequence[ArrayLike], budgets: Sequence[int] | None = None
) -> pd.DataFrame:
    """ROUGE recall of the extracted sentences by three rules: document, rule, metric, recall, sentences (how many).

    "beta > 0.5"; "at least 5", the same but never fewer (the paper's); "matched": the best so many as `budgets` says,
    or else as are labelled, so that an extractor is not better only because it keeps more. betas: [N] per document, of
    its first N sentences; later ones are not extracted. Raises ValueError where there are more betas than sentences.
    """
    if len(betas) != len(documents) or (budgets is not None and len(budgets) != len(documents)):
        raise ValueError(
            f"betas and budgets are per document: got {len(betas)} betas and "
            f"{'no' if budgets is None else len(budgets)} budgets for {len(documents)} documents"
        )
    if wrong := [d for d, beta in zip(documents, betas) if len(beta) > len(d.article)]:
        raise ValueError(f"document {wrong[0].id!r} has {len(wrong[0].article)} sentences, but more betas")
    budgets = [len(oracle(document)) for document in documents] if budgets is None else budgets
    chosen = {
        "beta > 0.5": [selected_sentences(beta) for beta in betas],
        "at least 5": [selected_sentences(beta, floor=5) for beta in betas],
        "matched": [selected_sentences(beta, budget=budget) for beta, budget in zip(betas, budgets)],
    }
    tables = []
    for rule, kept in chosen.items():
        scores = rouge([[d.article[i] for i in rows] for d, rows in zip(documents, kept)], documents)
        count = dict(zip((d.id for d in documents), map(len, kept)))
        tables.append(scores.assign(rule=rule, sentences=scores["document"].map(count)))
    return pd.concat(tables, ignore_index=True)[["document", "rule", "metric", "recall", "sentences"]]


def _ngrams(text: Sentences, n: int) -> list[tuple[str, ...]]:
    """Runs of n words within a sentence."""
    return [tuple(words[i : i + n]) for words in text for i in range(len(words) - n + 1)]


def novel(summary: Sentences, article: Sentences, n: int) -> float:
    """Share of the summary's n-grams, repetitions counted, that are not in the article; NaN where it has none."""
    known, said = set(_ngrams(article, n)), _ngrams(summary, n)
    return sum(gram not in known for gram in said) / len(said) if said else np.nan


def style(
    summaries: Sequence[Sentences], documents: Sequence[Document], orders: Sequence[int] = (1, 2, 3, 4)
) -> pd.DataFrame:
    """One row per document: document, words and sentences of the summary, novel_n for each order n."""
    if len(summaries) != len(documents):
        raise ValueError(f"one summary per document: got {len(summaries)} summaries, {len(documents)} documents")
    return pd.DataFrame(
        [
            dict(
                document=document.id,
                words=sum(map(len, summary)),
                sentences=len(summary),
                **{f"novel_{n}": novel(summary, document.article, n) for n in orders},
            )
            for summary, document in zip(summaries, documents)
        ]
    )
