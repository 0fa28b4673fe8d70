"""Compare pruning methods, one's own among them: rows, paired differences with intervals and tests, and a figure.

    python -m analysis compare mine.py:prune random fastervlm --keep 0.5 0.25

Everything goes to a folder of its own, which a second run of the same comparison reads back or goes on with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis import results
from analysis.engine.evaluate import RecDataset, cells, evaluate
from analysis.models import Model
from analysis.pruning import pruner as find_pruner
from analysis.rec.scoring import one_setting, percent, score, summarise
from analysis.stats import fdr, gap_pairs, paired_cells, retained, same_expressions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.0  # inches
CELL = ["pruner", "keep", "order", "ids"]


def folder(pruners: Sequence[str], dataset: RecDataset) -> Path:
    """Where a comparison goes if nothing else is said: a folder named after what is compared on what."""
    said = "_".join([*pruners, dataset.name, dataset.split])
    return Path("compare_" + re.sub(r"[^\w+=.-]+", "-", said)[:150])


def rows(
    model: Model,
    dataset: RecDataset,
    pruners: Sequence[str],
    out: Path,
    keep: Sequence[float | None] = (0.5, 0.25),
    ids: Sequence[str] = ("compact", "original"),
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """The rows of the unpruned model and of every pruner with every keep ratio and IDs, scored, without failed ones.

    Written to out / "rows.parquet" as `evaluate` does, with its options and errors.
    """
    grid = [*cells("none", seeds=seed), *cells(list(pruners), list(keep), ids=list(ids), seeds=seed)]
    return score(results.answered(evaluate(model, dataset, grid, out / "rows.parquet", **options)))


def accuracies(scored: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell: `scoring.summarise`, and the retention of the unpruned accuracy with its interval."""
    table = summarise(scored, CELL)
    kept = []
    for where in table[CELL].to_dict("records"):
        full, here = same_expressions(scored, {"pruner": "none"}, where)
        kept.append(retained(full, here, full.index.get_level_values("image_id")))
    more = pd.DataFrame(kept).rename(columns={"low": "retention_low", "high": "retention_high"})
    return table.join(more)


def differences(scored: pd.DataFrame) -> pd.DataFrame:
    """The first method minus each other one, with the same keep ratio and IDs, paired over the same expressions.

    first, other, keep, ids, difference with low and high, p, p_fdr (Benjamini-Hochberg over the table) and n.
    """
    first, *others = [name for name in scored["pruner"].unique() if name != "none"]
    found = [
        dict(first=first, other=other)
        | where
        | paired_cells(scored, where | {"pruner": other}, where | {"pruner": first})
        for where in scored.loc[scored["pruner"] == first, ["keep", "ids"]].drop_duplicates().to_dict("records")
        for other in others
    ]
    return pd.DataFrame(found).assign(p_fdr=fdr([row["p"] for row in found])) if found else pd.DataFrame()


def draw(table: pd.DataFrame, setting: str) -> Figure:
    """Accuracy against the measured share of tokens, a panel for each method and a line for each kind of IDs."""
    import matplotlib.pyplot as plt

    from analysis import style

    style.paper_style()
    table = percent(table, ["accuracy", "low", "high", "token_share"])
    full = table[table["pruner"] == "none"].iloc[0]
    pruners = [name for name in table["pruner"].unique() if name != "none"]
    kinds = list(table.loc[table["pruner"] != "none", "ids"].unique())
    spare = iter(plt.colormaps["tab10"].colors * 9)
    looks = {
        kind: dict(color=style.COLOURS.get(kind) or next(spare), marker="so^vDX"[i % 6], ls=("--", "-", ":")[i % 3])
        for i, kind in enumerate(kinds)
    }
    columns = min(4, len(pruners))
    lines = -(-len(pruners) // columns)
    fig, axes = plt.subplots(
        lines, columns, figsize=(WIDTH, 1 + 2 * lines), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(pruners) :]:
        ax.axis("off")
    for ax, pruner in zip(axes.flat, pruners):
        ax.axhspan(full["low"], full["high"], color=style.COLOURS["full"], alpha=0.12, lw=0)
        ax.axhline(full["accuracy"], color=style.COLOURS["full"], lw=1, label="unpruned")
        for kind, look in looks.items():
            here = table[(table["pruner"] == pruner) & (table["ids"] == kind)].sort_values("token_share")
            spread = [here["accuracy"] - here["low"], here["high"] - here["accuracy"]]
            label = style.LABELS.get(kind, f"{kind} IDs")
            ax.errorbar(here["token_share"], here["accuracy"], spread, label=label, ms=3.5, capsize=1.5, lw=1, **look)
        ax.set_title(find_pruner(pruner).label, fontsize=7)
    axes[0, 0].set(ylim=(0, 100), xlim=(0, 5 + table.loc[table["pruner"] != "none", "token_share"].max()))
    fig.supylabel("Acc@0.5 (%)", fontsize=8)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=1 + len(looks))
    fig.supxlabel(f"visual tokens read by the decoder (%, measured)\n{setting}; 95 % intervals, by image", fontsize=7)
    return fig


def _points(pairs: pd.DataFrame) -> str:
    """Differences as text, in per cent."""
    shares = ["difference", "low", "high"]
    return percent(pairs, shares).round(dict.fromkeys(shares, 1)).to_string(index=False, float_format="%.3g")


def compare(model: Model, dataset: RecDataset, pruners: Sequence[str], out: Path | None = None, **options) -> Path:
    """Do all of it and print the tables; the folder with rows.parquet, accuracies.csv, differences.csv, gap.csv and
    figure.pdf and .png. options: of `rows`."""
    from analysis import style

    out = out or folder(pruners, dataset)
    scored = rows(model, dataset, pruners, out, **options)
    table, setting = accuracies(scored), one_setting(scored)
    shares = ["accuracy", "low", "high", "retention", "token_share", "invalid"]
    shown = percent(table, shares)[[*CELL, *shares, "n"]].round(dict.fromkeys(shares, 1)).to_string(index=False)
    print(f"\n{setting}; per cent, 95 % intervals clustered by image\n{shown}")
    style.write_csv(out / "accuracies.csv", table)
    if len(pairs := differences(scored)):
        style.write_csv(out / "differences.csv", pairs)
        print(f"\n{pruners[0]} minus each other method, in points, paired over expressions\n{_points(pairs)}")
    if {"compact", "original"} <= set(scored.loc[scored["pruner"] != "none", "ids"]):
        pairs = gap_pairs(scored)
        style.write_csv(out / "gap.csv", pairs)
        print(f"\noriginal (GAP) minus compact IDs, in points, paired over expressions\n{_points(pairs)}")
    figure = draw(table, setting)
    figure.savefig(out / "figure.pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    figure.savefig(out / "figure.png", metadata={"Software": None}, dpi=200)
    return out
