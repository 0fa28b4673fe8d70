"""Intervals and tests that respect the data: several expressions share an image, so images are what is resampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.registry import matching

EXPRESSION_ID = ("image_id", "ref_id", "sent_id")  # the columns that name an expression


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


class _Rate(NamedTuple):
    """A rate of hits p with its interval, and how far each cluster's hits are from what p expects, [C]."""

    p: float
    low: float
    high: float
    residuals: NDArray


def _rate(sums: NDArray, counts: NDArray, level: float) -> _Rate:
    """`rate_interval` of hits: sums of `counts` values in each of C >= 2 clusters."""
    clusters, total = len(sums), counts.sum()
    p = sums.sum() / total
    residuals = sums - p * counts
    between = clusters / (clusters - 1) * (residuals**2).sum() / total**2  # variance of the ratio estimator
    design = between * total / (p * (1 - p)) if 0 < p < 1 else 0.0
    # The k rarer clusters (those with a hit, or with a miss) say little of the design effect where they are few, so it
    # is shrunk, with the weight of one of them, towards the worst case: a whole image is right or wrong together.
    rarer = min((sums > 0).sum(), (sums < counts).sum())
    n = total * (rarer + 1) / (rarer * design + total / clusters)
    t2 = stats.t.ppf((1 + level) / 2, clusters - 1) ** 2
    middle, half = (p + t2 / (2 * n)) / (1 + t2 / n), np.sqrt(t2 * (p * (1 - p) / n + t2 / (4 * n**2))) / (1 + t2 / n)
    return _Rate(p, min(max(middle - half, 0.0), p), max(min(middle + half, 1.0), p), residuals)  # rounding aside


def _correlation(a: _Rate, b: _Rate, size: float) -> float:
    """Correlation of two rates of the same clusters of `size` values on average.

    One more cluster, in which the two disagree about half its values, is thought to be there: without it two cells that
    happen to agree everywhere would be known to be equal.
    """
    (x, y), more = (a.residuals, b.residuals), size**2 / 4
    return float(((x * y).sum() - more) / np.sqrt(((x**2).sum() + more) * ((y**2).sum() + more)))


def _binary(values: ArrayLike) -> bool:
    values = np.asarray(values, dtype=np.float64)
    return bool(((values == 0) | (values == 1)).all())


def rate_interval(hits: ArrayLike, clusters: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Interval of the share of hits [n] (0 or 1), of which several share a cluster [n] (an image).

    Wilson's, with n / design effect for n (Korn and Graubard 1998) and Student's t of C - 1 degrees. Never [0, 0] or
    [1, 1]: no hit in C images gives [0, t^2 / (C + t^2)], about 4 / C. It covers 91 to 99 % at 30 to 200 images and
    rates from 0.3 to 50 %, where a bootstrap of images covers down to 20 %.
    (nan, nan) below two clusters: nothing is known about the spread between images.
    Raises ValueError for values that are no hits, missing ones, and unequal lengths.
    """
    sums, counts = _cluster_totals(hits, clusters)
    if not _binary(hits):
        raise ValueError("a rate is of hits: each value must be 0 or 1; use clustered_interval for others")
    if len(sums) < 2:
        return np.nan, np.nan
    rate = _rate(sums, counts, level)
    return float(rate.low), float(rate.high)


def clustered_interval(
    values: ArrayLike, clusters: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values [n], resampling whole clusters [n] (images).

    Each resample draws as many clusters as there are, with replacement, and takes the ratio estimator
    sum of values / number of values. For hits `rate_interval` is right. (nan, nan) below two clusters.
    Raises ValueError for missing values or unequal lengths.
    """
    sums, counts = _cluster_totals(values, clusters)
    if len(sums) < 2:
        return np.nan, np.nan
    return _ratio_interval(sums, counts, level, resamples, seed)


def _difference_interval(a: _Rate, b: _Rate, size: float) -> tuple[float, float]:
    """Interval of b - a from the intervals of two rates of the same clusters (Newcombe 1998, method 10; MOVER)."""
    r, d = _correlation(a, b, size), b.p - a.p
    down, up = (b.p - b.low, a.high - a.p), (b.high - b.p, a.p - a.low)
    return tuple(
        float(d + sign * np.sqrt(max(x**2 + y**2 - 2 * r * x * y, 0.0))) for sign, (x, y) in ((-1, down), (1, up))
    )


def _quotient_interval(above: _Rate, below: _Rate, size: float) -> tuple[float, float]:
    """Interval of above / below from the intervals of two rates of the same clusters (Donner and Zou 2012, MOVER-R)."""
    r, (p, low, high, _), (q, least, most, _) = _correlation(above, below, size), above, below
    if least <= 0:  # nothing says that there is anything to divide by
        return np.nan, np.nan
    ends = []
    for sign, end, other in ((-1, low, most), (1, high, least)):
        middle = p * q - r * (p - end) * (other - q)
        root = np.sqrt(max(middle**2 - end * other * (2 * p - end) * (2 * q - other), 0.0))
        ends.append(float((middle + sign * root) / (other * (2 * q - other))))
    return max(ends[0], 0.0), ends[1]


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

    low, high: of hits (0 or 1), from the two `rate_interval`s and their correlation over images, which covers 91 %
    and more where a bootstrap of the differences covers down to 80 %; of other values, `clustered_interval` of b - a.
    p: sign-flip permutation test of the sum of b - a; under the null
    hypothesis that a and b are exchangeable within an image, each cluster's summed difference is as likely with the
    other sign. Exact (all 2^C sign patterns of the C clusters that differ) when 2^C <= permutations, else sampled with
    (hits + 1) / (permutations + 1).
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"a and b must be aligned and not empty, but have shapes {a.shape} and {b.shape}")
    (sums, counts), before = _cluster_totals(b, clusters), _cluster_totals(a, clusters)[0]
    if _binary(a) and _binary(b) and len(sums) > 1:
        rates = _rate(before, counts, level), _rate(sums, counts, level)
        low, high = _difference_interval(*rates, counts.mean())
    else:
        low, high = clustered_interval(b - a, clusters, level, resamples, seed)
    p = _sign_flip_p(_cluster_totals(b - a, clusters)[0], permutations, seed)
    return {"difference": float((b - a).mean()), "low": low, "high": high, "p": p}


def same_expressions(
    scored: pd.DataFrame, cell_a: Mapping[str, Any], cell_b: Mapping[str, Any], on: Sequence[str] = EXPRESSION_ID
) -> tuple[pd.Series, pd.Series]:
    """ "correct" of two cells over the same expressions, in the same order, indexed by `on`.

    cell_a, cell_b: column values that single out one cell each, e.g. {"pruner": "trim", "ids": "compact"}; None
    matches a missing value. Cells of several seeds are joined seed by seed; one of a single seed stands against each
    seed of the other. Raises ValueError where a cell is empty, holds an expression twice, or the two hold different
    expressions.
    """
    cells, sides = (cell_a, cell_b), []
    found = [matching(scored, cell) for cell in cells]
    for cell, rows in zip(cells, found):
        if rows.empty:
            raise ValueError(f"no rows in cell {dict(cell)}")
    seeds = [rows["seed"].unique() if "seed" in rows else [0] for rows in found]
    index = [*on, "seed"] if max(map(len, seeds)) > 1 else list(on)
    for cell, rows, own, others in zip(cells, found, seeds, reversed(seeds)):
        if len(own) == 1 < len(others):
            rows = pd.concat([rows.assign(seed=seed) for seed in others])
        rows = rows.set_index(index)
        if repeated := rows.index.duplicated().sum():
            raise ValueError(f"cell {dict(cell)} holds {repeated} expressions more than once; name more of its columns")
        sides.append(rows["correct"])
    a, b = sides
    if not a.index.sort_values().equals(b.index.sort_values()):
        raise ValueError(
            f"the cells must hold the same expressions: {len(a.index.difference(b.index))} of cell a are missing in "
            f"cell b, {len(b.index.difference(a.index))} of cell b are missing in cell a"
        )
    return a, b.reindex(a.index)


def paired_cells(
    scored: pd.DataFrame,
    cell_a: Mapping[str, Any],
    cell_b: Mapping[str, Any],
    on: Sequence[str] = EXPRESSION_ID,
    clusters: str = "image_id",
    **options: Any,
) -> dict[str, float]:
    """`paired_difference` of "correct" from cell a to cell b over the same expressions, plus n (answers: expressions
    times seeds).

    See `same_expressions` for the cells and for what is raised; options go to `paired_difference`.
    """
    a, b = same_expressions(scored, cell_a, cell_b, on)
    return paired_difference(a, b, a.index.get_level_values(clusters), **options) | {"n": len(a)}


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


def line(
    x: ArrayLike, y: ArrayLike, clusters: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Least squares line of y [n] over x [n]: slope and r2, the share of y's variance that it explains.

    slope_low, slope_high, r2_low, r2_high: percentile bootstrap that resamples whole clusters [n] (images); n. NaN
    where x or y does not vary.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    sums = np.stack([_cluster_totals(one, clusters)[0] for one in (np.ones_like(x), x, y, x * x, y * y, x * y)], axis=1)

    def fit(totals: NDArray) -> NDArray:
        n, x, y, xx, yy, xy = np.moveaxis(totals, -1, 0)
        across, xx, yy = xy - x * y / n, xx - x * x / n, yy - y * y / n
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where((xx > 1e-12 * n) & (yy > 1e-12 * n), [across / xx, across**2 / (xx * yy)], np.nan)

    slope, r2 = fit(sums.sum(0))
    often = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), resamples)
    drawn = fit(often @ sums)
    ends = (
        np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=1) if slope == slope else np.full((2, 2), slope)
    )
    (slope_low, r2_low), (slope_high, r2_high) = ends.tolist()
    names = dict(slope_low=slope_low, slope_high=slope_high, r2_low=r2_low, r2_high=r2_high)
    return {"slope": float(slope), "r2": float(r2), "n": len(x)} | names


def retention(accuracy: ArrayLike, full: ArrayLike) -> ArrayLike:
    """Share of the unpruned accuracy `full` that is left, accuracy / full; NaN where full is 0."""
    return accuracy / np.where(np.equal(full, 0), np.nan, full)


def retained(full: ArrayLike, pruned: ArrayLike, clusters: ArrayLike, level: float = 0.95) -> dict[str, float]:
    """retention = sum(pruned) / sum(full) of aligned hits [n] (0 or 1), with low and high.

    They are made from the two `rate_interval`s and their correlation over images. NaN where full is right in fewer
    than two clusters. Raises ValueError for values that are no hits.
    """
    if not (_binary(full) and _binary(pruned)):
        raise ValueError("retention is of hits: each value must be 0 or 1")
    (kept, counts), right = _cluster_totals(pruned, clusters), _cluster_totals(full, clusters)[0]
    if (right > 0).sum() < 2:
        return dict.fromkeys(("retention", "low", "high"), np.nan)
    low, high = _quotient_interval(_rate(kept, counts, level), _rate(right, counts, level), counts.mean())
    return {"retention": float(kept.sum() / right.sum()), "low": low, "high": high}


def retained_cells(
    scored: pd.DataFrame, by: Sequence[str] = ("pruner", "keep", "ids"), on: Sequence[str] = EXPRESSION_ID
) -> pd.DataFrame:
    """`retained` of every group of the columns `by` that is pruned, in order of first appearance.

    Each against the unpruned answers to the same expressions, which agree with it in what else `by` names, such as the
    model; on: the columns that name an expression. Raises what `same_expressions` raises.
    """
    found, by = [], list(by)
    for cell in scored.loc[scored["pruner"] != "none", by].drop_duplicates().to_dict("records"):
        elsewhere = {name: value for name, value in cell.items() if name not in ("pruner", "keep", "order", "ids")}
        whole = elsewhere | {"pruner": "none"}
        full, pruned = same_expressions(scored, whole, cell, on)
        found.append(cell | retained(full, pruned, full.index.get_level_values("image_id")))
    return pd.DataFrame(found)


def fdr(p_values: ArrayLike) -> NDArray:
    """p values adjusted for the false discovery rate (Benjamini-Hochberg 1995), in the given order."""
    return stats.false_discovery_control(p_values)


def over_seeds(values: ArrayLike, level: float = 0.95) -> dict[str, float]:
    """Mean of training runs' values with Student's t interval: mean, low, high and seeds, the number of runs.

    Runs are the units, whatever each was measured on. Below three runs the interval says nothing, and is NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    half = np.nan
    if count >= 3:
        half = float(stats.t.ppf((1 + level) / 2, count - 1) * values.std(ddof=1) / np.sqrt(count))
    return dict(mean=mean, low=mean - half, high=mean + half, seeds=count)


def variance_shares(
    scored: pd.DataFrame,
    factors: Sequence[str],
    clusters: str = "image_id",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """What explains the accuracies of a full factorial's cells: a row for each factor and pair of factors, and "rest".

    scored: rows with "correct", `clusters` and the factors, the same expressions in each combination of their levels.
    Columns: term (a pair as "a:b"), share of the variance between cells (the classical decomposition of a balanced
    design, so that shares sum to 1), low and high: percentiles of a bootstrap that resamples clusters, moved so that
    its mean is the share, since resampling repeats the cells' noise and adds it to the "rest".
    Raises ValueError where combinations are missing or hold different numbers of rows.
    """
    sums = scored.groupby([clusters, *factors], sort=True)["correct"].agg(["sum", "size"])
    shape = [scored[name].nunique() for name in factors]
    images = scored[clusters].nunique()
    if len(sums) != images * int(np.prod(shape)):
        raise ValueError(f"a full factorial of {' x '.join(map(str, shape))} cells is needed, and some are missing")
    hits, sizes = (sums[name].to_numpy(float).reshape(images, -1) for name in ("sum", "size"))
    if (sizes != sizes[:, :1]).any():
        raise ValueError("the cells must hold the same expressions")
    terms = [*combinations(range(len(factors)), 1), *combinations(range(len(factors)), 2)]

    def decomposed(weights: NDArray) -> NDArray:
        """[R, images] -> [R, terms + 1]"""
        cells = (weights @ hits / (weights @ sizes)).reshape(-1, *shape)
        cells = cells - cells.reshape(len(cells), -1).mean(axis=1).reshape(-1, *[1] * len(shape))
        effects, total = {}, (cells**2).reshape(len(cells), -1).mean(axis=1)
        for term in terms:
            others = tuple(axis + 1 for axis in range(len(shape)) if axis not in term)
            effect = cells.mean(axis=others, keepdims=True)
            effects[term] = effect - sum(effects[single,] for single in term) if len(term) == 2 else effect
        found = np.stack([(effects[term] ** 2).reshape(len(cells), -1).mean(axis=1) for term in terms], axis=1)
        found = found / np.where(total == 0, np.nan, total)[:, None]
        return np.concatenate([found, 1 - found.sum(axis=1, keepdims=True)], axis=1)

    [share] = decomposed(np.ones((1, images)))
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    again = decomposed(drawn)
    low, high = np.nanquantile(again - np.nanmean(again, axis=0) + share, [(1 - level) / 2, (1 + level) / 2], axis=0)
    names = [":".join(factors[axis] for axis in term) for term in terms]
    return pd.DataFrame(dict(term=[*names, "rest"], share=share, low=low.clip(0), high=high.clip(max=1)))
