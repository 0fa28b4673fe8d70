"""Intervals and tests that respect the data: several expressions share an image, so images are what is resampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.registry import matching


def _cluster_totals(values: ArrayLike, clusters: ArrayLike) -> tuple[NDArray, NDArray]:
    """Sum and count of the values [n] in each cluster, both float64 [C]."""
    values, clusters = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    if values.shape != clusters.shape or values.ndim != 1:
        raise ValueError(f"one cluster per value: values have shape {values.shape}, clusters {clusters.shape}")
    if np.isnan(values).any() or pd.isna(clusters).any():
        raise ValueError("values and clusters must not be missing; count an invalid answer as 0")
    codes, names = pd.factorize(clusters)
    return np.bincount(codes, values, len(names)), np.bincount(codes, minlength=len(names)).astype(np.float64)


def _ratio_interval(above: NDArray, below: NDArray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(above) / sum(below) over clusters [C], which are resampled whole.

    A resample without anything below has no ratio and is left out.
    """

    def ratio(above: NDArray, below: NDArray, axis: int) -> NDArray:
        total = below.sum(axis)
        return np.divide(above.sum(axis), total, out=np.full(np.shape(total), np.nan), where=total > 0)

    drawn = stats.bootstrap(
        (above, below),
        ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        batch=200,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def clustered_interval(
    values: ArrayLike, clusters: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values [n], resampling whole clusters [n] (images).

    Each resample draws as many clusters as there are, with replacement, and takes the ratio estimator
    sum of values / number of values. (nan, nan) below two clusters: nothing is known about the spread between images.
    Raises ValueError for missing values or unequal lengths.
    """
    sums, counts = _cluster_totals(values, clusters)
    if len(sums) < 2:
        return np.nan, np.nan
    return _ratio_interval(sums, counts, level, resamples, seed)


def _sign_flip_p(sums: NDArray, permutations: int, seed: int) -> float:
    sums = sums[sums != 0]  # a sign changes nothing there; fewer clusters make the exact test possible more often
    if len(sums) < 2:
        return 1.0  # both signs of a single cluster are equally extreme
    return float(
        stats.permutation_test(
            (sums,),
            lambda x, axis: x.sum(axis),
            permutation_type="samples",
            vectorized=True,
            batch=200,
            n_resamples=permutations,
            alternative="two-sided",
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike,
    level: float = 0.95,
    resamples: int = 2000,
    permutations: int = 9999,
    seed: int = 0,
) -> dict[str, float]:
    """difference = mean(b) - mean(a) of aligned scores [n], with low, high and a two-sided p.

    low, high: `clustered_interval` of b - a. p: sign-flip permutation test of the sum of b - a; under the null
    hypothesis that a and b are exchangeable within an image, each cluster's summed difference is as likely with the
    other sign. Exact (all 2^C sign patterns of the C clusters that differ) when 2^C <= permutations, else sampled with
    (hits + 1) / (permutations + 1).
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"a and b must be aligned and not empty, but have shapes {a.shape} and {b.shape}")
    low, high = clustered_interval(b - a, clusters, level, resamples, seed)
    p = _sign_flip_p(_cluster_totals(b - a, clusters)[0], permutations, seed)
    return {"difference": float((b - a).mean()), "low": low, "high": high, "p": p}


def paired_cells(
    scored: pd.DataFrame,
    cell_a: Mapping[str, Any],
    cell_b: Mapping[str, Any],
    on: Sequence[str] = ("image_id", "ref_id", "sent_id"),
    clusters: str = "image_id",
    **options: Any,
) -> dict[str, float]:
    """`paired_difference` of "correct" from cell a to cell b over the same expressions, plus n (expressions).

    cell_a, cell_b: column values that single out one cell each, e.g. {"pruner": "trim", "ids": "compact"}; None
    matches a missing value. on: the columns that name an expression. options go to `paired_difference`.
    Raises ValueError where a cell is empty, holds an expression twice, or the two hold different expressions.
    """
    sides = []
    for cell in (cell_a, cell_b):
        rows = matching(scored, cell).set_index(list(on))
        if rows.empty:
            raise ValueError(f"no rows in cell {dict(cell)}")
        if repeated := rows.index.duplicated().sum():
            raise ValueError(f"cell {dict(cell)} holds {repeated} expressions more than once; name more of its columns")
        sides.append(rows["correct"])
    a, b = sides
    if not a.index.sort_values().equals(b.index.sort_values()):
        raise ValueError(
            f"the cells must hold the same expressions: {len(a.index.difference(b.index))} of cell a are missing in "
            f"cell b, {len(b.index.difference(a.index))} of cell b are missing in cell a"
        )
    return paired_difference(a, b.reindex(a.index), a.index.get_level_values(clusters), **options) | {"n": len(a)}


def gap_pairs(scored: pd.DataFrame, by: Sequence[str] = ("pruner", "keep")) -> pd.DataFrame:
    """GAP against compact IDs: a row for each group of the columns `by` that is pruned, in order of first appearance.

    The columns of `by`, `paired_cells` from compact to original IDs (difference, low, high, p, n), and p_fdr, adjusted
    over the whole table. Raises what `paired_cells` raises, so where a group has not both.
    """
    by = list(by)
    pairs = pd.DataFrame(
        [
            where | paired_cells(scored, where | {"ids": "compact"}, where | {"ids": "original"})
            for where in scored.loc[scored["pruner"] != "none", by].drop_duplicates().to_dict("records")
        ]
    )
    return pairs.assign(p_fdr=fdr(pairs["p"]))


def retention(accuracy: ArrayLike, full: ArrayLike) -> ArrayLike:
    """Share of the unpruned accuracy `full` that is left, accuracy / full; NaN where full is 0."""
    return accuracy / np.where(np.equal(full, 0), np.nan, full)


def retained(
    full: ArrayLike, pruned: ArrayLike, clusters: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """retention = sum(pruned) / sum(full) of aligned scores [n], with low, high (`clustered_interval`'s bootstrap).

    NaN, all three, where a resample may have nothing right to retain (full right in fewer than two clusters).
    """
    kept, counted = _cluster_totals(pruned, clusters)[0], _cluster_totals(full, clusters)[0]
    if (counted > 0).sum() < 2:
        return dict.fromkeys(("retention", "low", "high"), np.nan)

    low, high = _ratio_interval(kept, counted, level, resamples, seed)
    return {"retention": float(kept.sum() / counted.sum()), "low": low, "high": high}


def fdr(p_values: ArrayLike) -> NDArray:
    """p values adjusted for the false discovery rate (Benjamini-Hochberg 1995), in the given order."""
    return stats.false_discovery_control(p_values)
