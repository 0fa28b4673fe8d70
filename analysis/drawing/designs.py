"""Figures A2 and 13: one panel for each design of a testbed, with a dot for each model that was trained so.

Their rows are those of `training.testbed_design`: a model under one setting of its IDs, with n expressions and its
hits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from analysis import results, style
from analysis.registry import matching

FEATURES = {  # what a model's features say of position, from top to bottom
    "none": "no positions",
    "learned": "learned positions",
    "strong": "strong positions",
}
WHOLE = {  # IDs of all tokens -> what the axis calls them, and their colour
    "original": ("unpruned", "full"),
    "shifted:6": ("shifted by 6", "other"),
    "shuffled": ("shuffled", "permuted"),
    "compressed:0.75": ("compressed", "compressed"),
}


def read(file: str | Path) -> pd.DataFrame:
    """The rows, with their accuracy."""
    return results.answered(file).assign(accuracy=lambda rows: rows["hits"] / rows["n"])


def present(rows: pd.DataFrame) -> list[str]:
    """Which of `FEATURES` there are."""
    return [name for name in FEATURES if name in set(rows["features"])]


def keeps(rows: pd.DataFrame) -> list[float]:
    """Keep ratios of the pruned settings, from large to small."""
    return sorted(set(rows["keep"]) - {1.0}, reverse=True)


def panel(ax: plt.Axes, rows: pd.DataFrame, shares: list[float]) -> None:
    """One design: accuracy under each setting of the IDs, all tokens on the left and pruned ones on the right."""
    for place, (ids, (_, shade)) in enumerate(WHOLE.items()):
        style.seed_points(ax, place, matching(rows, dict(ids=ids, keep=1.0))["accuracy"], style.COLOURS[shade])
    for place, keep in enumerate(shares, len(WHOLE)):
        for shift, ids in ((0.38, "compact"), (0.82, "original")):
            values = matching(rows, dict(ids=ids, keep=keep))["accuracy"]
            style.seed_points(ax, place + shift, values, style.COLOURS[ids], mfc="white" if ids == "compact" else None)
    ax.axvline(len(WHOLE) - 0.2, color="#BBBBBB", lw=0.6)
    ax.set(ylim=(-3, 100), xlim=(-0.6, len(WHOLE) + len(shares) + 0.2))


def draw(page: style.Page, rows: pd.DataFrame, factor: str, titles: Mapping) -> tuple[Figure, pd.Series, str, str]:
    """A row of panels for each of `FEATURES`, a column for each level of another factor.

    factor: a column of rows; titles: its levels, from left to right, and their names. Returns the figure, how many
    models there are of each design, and for the caption what was trained on what, and what the marks mean.
    """
    levels, shares = present(rows), keeps(rows)
    fig, axes = plt.subplots(
        len(levels),
        len(titles),
        figsize=page.size(6.2, 6.2),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for line, level in zip(axes, levels):
        probe = matching(rows, dict(features=level)).iloc[0][["probe_row", "probe_column"]].clip(lower=0)
        line[0].set_ylabel(f"{FEATURES[level]}\n(R² {probe.iloc[0]:.2f}, {probe.iloc[1]:.2f})\nAcc@0.5 (%)")
        for ax, value in zip(line, titles):
            panel(ax, matching(rows, {"features": level, factor: value}), shares)
            style.chance_line(ax, 100 * rows["chance"].iloc[0])
    for letter, ax, title in zip("abcdefghi", axes.flat, [*titles.values()] * len(levels)):
        page.title(ax, letter, title * page.wide)
    ticks = [*range(len(WHOLE)), *(len(WHOLE) + 0.6 + place for place in range(len(shares)))]
    names = [*(name for name, _ in WHOLE.values()), *(f"{100 * keep:g} % kept" for keep in shares)]
    for ax in axes[-1]:
        ax.set_xticks(ticks, names, rotation=90)
    mark = dict(marker="o", ls="none", ms=4)
    handles = [
        plt.Line2D([], [], color=style.COLOURS["full"], label="all tokens", **mark),
        plt.Line2D([], [], color=style.COLOURS["compact"], mfc="white", label=style.LABELS["compact"], **mark),
        plt.Line2D([], [], color=style.COLOURS["original"], label=style.LABELS["original"], **mark),
        plt.Line2D([], [], color="black", lw=0.8, ls=(0, (1, 1.5)), label="chance"),
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles) if page.wide else 2)

    each = rows.groupby(["features", factor])["seed"].nunique()
    n, steps = rows["n"].max(), rows["steps"].max()
    setting = (
        f"One-object scenes, {n:,} held out; {steps:,} training steps of {rows['batch'].max()} scenes; "
        f"{' to '.join(map(str, sorted({each.min(), each.max()})))} run{'s' * bool(each.max() > 1)} of each design"
    )
    marks = "Dots are training runs, dashes means"
    marks += ", bars 95 % intervals (Student's t over runs)" * bool(each.max() >= 3)
    marks += "; fewer than three runs have no interval" * bool(each.min() < 3)
    page.foot(fig, f"{setting}. {marks}.")
    return fig, each, setting, marks
