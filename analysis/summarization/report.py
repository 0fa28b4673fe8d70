"""What tables and figures make of the rows of `21_decode_summaries`: scores, means over seeds, differences, cells.

A number is the mean over documents and seeds, with the lowest and the highest seed beside it. Two systems are compared
on the same documents, seed by seed; a difference *holds* where every seed has it with the same sign and an interval
(paired bootstrap over documents, 95 %) that leaves zero out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from analysis import results
from analysis.published import PUBLISHED, UNCHECKED
from analysis.registry import matching
from analysis.stats import paired_difference
from analysis.summarization import news
from analysis.summarization.data import Document, cut
from analysis.summarization.score import lead, oracle, rouge, style
from analysis.summarization.systems import LABELS

# name -> label in tables, in their order; those without a model first and last
NAMES = {"lead-3": "lead-3"} | LABELS | {"oracle": "gold sentences (oracle)"}
PAPER = {
    "lead-3": "lead-3",
    "pointer-generator": "pointer-generator + coverage",
    "two-stage": "two-stage",
    "end-to-end-1": "end to end without L_inc",
    "end-to-end-5-inc": "end to end with L_inc",
}
# Of the embedded summarizers, for the captions of what they did; it goes when a schedule fixed beforehand made them.
EXPLORATORY = (
    "Exploratory: the training was lengthened after test results of a shorter one were known, so no difference here is "
    "confirmed."
)
PAIRS = [(f"end-to-end-{weight}", f"end-to-end-{weight}-inc") for weight in (1, 5)]  # what L_inc does
OTHERS = ("lead-3", "pointer-generator", "two-stage")  # what the full model is compared with


def read(paths: str | Path | Sequence[str | Path]) -> tuple[pd.DataFrame, list[Document]]:
    """Rows of one or several seeds, and the documents that they are of, in order.

    Raises ValueError where the files are of different splits, and what `results.read_rows` raises.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    rows = results.read_rows(files)
    splits = {results.provenance(file)["split"] for file in files}
    if len(splits) > 1:
        raise ValueError(f"rows must be of one split, not of {', '.join(sorted(splits))}")
    numbers = sorted({int(name.rsplit("-", 1)[1]) for name in rows["document"]})
    return rows, [news.document(*splits, number) for number in numbers]


def setting(rows: pd.DataFrame) -> str:
    """One line about the rows for captions."""
    return (
        f"{rows['document'].nunique():,} generated test documents; seeds "
        f"{', '.join(map(str, sorted(rows['seed'].unique())))}"
    )


def summaries(rows: pd.DataFrame, documents: Sequence[Document]) -> dict[tuple[str, int], list]:
    """(system, seed) -> the summary's sentences of each document it has, with lead-3 and oracle as seed -1."""
    known = {document.id: document for document in documents}
    found: dict[tuple[str, int], list] = {
        ("lead-3", -1): [(d, lead(d)) for d in documents],
        ("oracle", -1): [(d, oracle(d)) for d in documents],
    }
    for (model, seed), part in rows.groupby(["model", "seed"], sort=False):
        found[model, seed] = [(known[name], cut(said.split())) for name, said in zip(part["document"], part["summary"])]
    return found


def scored(rows: pd.DataFrame, documents: Sequence[Document]) -> pd.DataFrame:
    """model, seed, document, metric (R1, R2, RL, words, sentences, novel_1 ... novel_4), value: F1 or as named."""
    tables = []
    for (model, seed), pairs in summaries(rows, documents).items():
        docs, said = zip(*pairs)
        f1 = rouge(said, docs)[["document", "metric", "f1"]].rename(columns={"f1": "value"})
        looks = style(said, docs).melt("document", var_name="metric")
        tables.append(pd.concat([f1, looks]).assign(model=model, seed=seed))
    return pd.concat(tables, ignore_index=True)[["model", "seed", "document", "metric", "value"]]


def over_seeds(table: pd.DataFrame, by: Sequence[str], value: str = "value") -> pd.DataFrame:
    """The columns `by`, mean (over the seeds' means), lowest and highest seed, seeds, n (documents of a seed)."""
    seeds = table.dropna(subset=[value]).groupby([*by, "seed"], sort=False)[value].agg(["mean", "size"]).reset_index()
    return (
        seeds.groupby(list(by), sort=False)
        .agg(
            mean=("mean", "mean"),
            lowest=("mean", "min"),
            highest=("mean", "max"),
            seeds=("seed", "nunique"),
            n=("size", "max"),
        )
        .reset_index()
    )


def _seed_by_seed(pooled: Mapping[str, float], seeds: Sequence[Mapping[str, float]], n: int) -> dict[str, Any]:
    """A difference over all seeds with what each seed says of it; each with keys difference, low, high."""
    holds = all(one["low"] > 0 for one in seeds) or all(one["high"] < 0 for one in seeds)
    return {k: pooled[k] for k in ("difference", "low", "high")} | dict(
        n=n, seeds=len(seeds), by_seed=[one["difference"] for one in seeds], holds=bool(holds and len(seeds) >= 3)
    )


def compared(table: pd.DataFrame, a: Mapping[str, Any], b: Mapping[str, Any], value: str = "value") -> dict[str, Any]:
    """mean(b) - mean(a) over the same documents: difference, low, high, n over all seeds, its sign "holds" in each.

    a, b: column values that single out one system each; a system without seeds (-1) is compared with every seed.
    Raises ValueError where the two have no document of a seed in common.
    """
    one, two = (matching(table, where).dropna(subset=[value]) for where in (a, b))
    if set(one["seed"]) == {-1}:
        one = pd.concat([one.assign(seed=seed) for seed in two["seed"].unique()])
    both = one.merge(two, on=["document", "seed"], suffixes=("_a", "_b"), validate="one_to_one")
    if both.empty:
        raise ValueError(f"no document of a seed has both {dict(a)} and {dict(b)}")
    x, y = f"{value}_a", f"{value}_b"
    pooled = paired_difference(both[x], both[y], both["document"], permutations=1)
    seeds = [paired_difference(part[x], part[y], part["document"], permutations=1) for _, part in both.groupby("seed")]
    return _seed_by_seed(pooled, seeds, both["document"].nunique())


def ratio_change(rows: pd.DataFrame, a: str, b: str, resamples: int = 2000) -> dict[str, Any]:
    """Mean R_inc / mean chance of system b less that of a, in the form of `compared`; documents are drawn.

    rows: of `21_decode_summaries`. Raises ValueError where a and b have not the same documents of the same seeds.
    """
    one, two = (
        matching(rows, {"model": model}).set_index(["document", "seed"])[["r_inc", "chance"]] for model in (a, b)
    )
    if one.empty or set(one.index) != set(two.index):
        raise ValueError(f"{a} and {b} must have the same documents of the same seeds")
    both = one.join(two.reindex(one.index), rsuffix="_b")

    def change(part: pd.DataFrame) -> dict[str, float]:
        def of(r_a, c_a, r_b, c_b, axis=-1):
            return r_b.mean(axis) / c_b.mean(axis) - r_a.mean(axis) / c_a.mean(axis)

        columns = part.groupby("document").mean().to_numpy().T
        drawn = bootstrap(
            tuple(columns),
            of,
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=resamples,
            batch=200,
            rng=np.random.default_rng(0),
        )
        low, high = map(float, drawn.confidence_interval)
        return dict(difference=float(of(*columns)), low=low, high=high)

    seeds = [change(part) for _, part in both.groupby("seed")]
    return _seed_by_seed(change(both), seeds, both.index.get_level_values(0).nunique())


def spread(row: Mapping[str, float], scale: float = 100, digits: int = 1) -> str:
    """ "43.1 ±0.4": mean, and distance to the farther of the lowest and highest seed; the mean alone of one seed."""
    mean, far = row["mean"], max(row["mean"] - row["lowest"], row["highest"] - row["mean"])
    return f"{scale * mean:.{digits}f}" + ("" if row["seeds"] == 1 else f" ±{scale * far:.{digits}f}")


def gain(found: Mapping[str, Any], scale: float = 100, digits: int = 1) -> str:
    """ "+1.2 [0.8, 1.6]*": a difference with its interval; * where it holds in every one of at least three seeds."""
    number, low, high = (scale * found[name] for name in ("difference", "low", "high"))
    return f"{number:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{'*' if found['holds'] else ''}"


def published(model: str, metric: str, scale: float = 1, digits: int = 2) -> str:
    """The published number as a cell, with a dagger where it is unchecked; empty where there is none."""
    found = matching(PUBLISHED, {"paper": "Unified", "model": model, "metric": metric})
    return "".join(
        f"{scale * value:.{digits}f}{'†' * source.endswith(UNCHECKED)}"
        for value, source in zip(found["value"], found["source"])
    )


def order(models: Sequence[str]) -> list[str]:
    """The systems that are there, as tables list them."""
    return [name for name in NAMES if name in set(models)]
