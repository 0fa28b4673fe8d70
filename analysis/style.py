"""The one module that writes figures and tables: widths, fonts, colours; byte-stable PDF, PNG, LaTeX, HTML and CSV.

A notebook makes a `Page` of its parameters, draws, and hands the figure or table to it with its caption's sentences.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.transforms import ScaledTranslation
from pandas.io.formats.style import Styler

from analysis import ROOT, pruning, results
from analysis.drawing.tables import aligned, latex, tabular
from analysis.stats import over_seeds

PAGE, COLUMN = 7.0, 3.3  # inches: the text width of most two-column papers, and one of its columns
SMALLEST = 7.0  # points: what can be read in print
# Okabe and Ito's colours, told apart by colour-blind readers and in grey; the same thing has the same colour everywhere
COLOURS = {
    "full": "#4D4D4D",
    "compact": "#D55E00",
    "original": "#0072B2",
    "compressed": "#E69F00",
    "permuted": "#CC79A7",
    "both": "#D55E00",
    "soft": "#009E73",
    "other": "#56B4E9",
}
LABELS = {"compact": "compact IDs (numbered anew)", "original": "original IDs (GAP)"}
IDS = {"compact": "compact", "original": "GAP"}  # the same in a table's column
MARKS = {  # what a table's marks mean, for its note
    "ids": "compact: kept tokens are numbered anew, as they come; GAP: each keeps its own ID",
    "°": "°: the IDs that the authors' public code gives (Table 9); no mark where there is no such code",
    "±": "±: distance to the farther end of the 95 % interval; an interval ends at 0 and at 100",
    "bold": "bold: the better of a method's two",
    "*": "* and v: GAP is better (*) or worse (v) than compact IDs at a false discovery rate of 5 % over the whole "
    "table, paired by expression, sign-flip test over images",
    "†": "†: quoted from memory, not checked against the paper",
}
SORT = """\
<script>
// A click on a column's head, or Enter, sorts by it; once more turns the order. What is equal keeps its order.
for (const head of document.querySelectorAll("th.index_name, th.col_heading.level%d")) {
  const value = row => {
    const text = row.cells[head.cellIndex].textContent.replace("−", "-").trim(), number = parseFloat(text);
    return isNaN(number) ? text : number;
  };
  const sort = () => {
    const body = head.closest("table").tBodies[0], rows = [...body.rows], before = head.ariaSort;
    const full = rows.filter(row => value(row) !== ""), numbers = typeof value(full[0] || rows[0]) === "number";
    const turn = (before ? before === "descending" : !numbers) ? 1 : -1;
    full.sort((a, b) => turn * (value(a) > value(b) ? 1 : value(a) < value(b) ? -1 : 0));
    body.append(...full, ...rows.filter(row => value(row) === ""));
    document.querySelectorAll("[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
    head.ariaSort = turn > 0 ? "ascending" : "descending";
  };
  head.tabIndex = 0;
  head.onclick = sort;
  head.onkeydown = event => event.key === "Enter" && sort();
}
</script>
"""
PRUNERS = {name: method.label for name, method in pruning.PRUNERS.items()}


def pruner_label(spec: str) -> str:
    """How figures and tables call a pruner that a notebook names by its specification."""
    return PRUNERS.get(spec, spec)


def paper_style() -> None:
    """Set matplotlib's defaults for every figure."""
    sns.set_theme(style="ticks", context="paper")
    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 7,
            "axes.labelsize": 7.5,
            "axes.titlesize": 8,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "legend.fontsize": 7,
            "legend.frameon": False,
            "legend.handlelength": 1.6,
            "legend.columnspacing": 1.2,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.7,
            "xtick.major.width": 0.7,
            "ytick.major.width": 0.7,
            "xtick.major.size": 3,
            "ytick.major.size": 3,
            "lines.linewidth": 1.0,
            "pdf.fonttype": 42,
            "savefig.dpi": 200,
            "figure.dpi": 110,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
        }
    )


def output_folder(smoke: bool) -> Path:
    """figures/, or figures/smoke/ for a smoke run; made if it is not there."""
    folder = ROOT / "figures" / ("smoke" if smoke else "")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---------------------------------------------------------------------------------------------------- text


@cache
def _ink(text: str, size: float, weight: str) -> float:
    return TextPath((0, 0), text, prop=FontProperties(size=size, weight=weight)).get_extents().x1 / 72


def _inches(text: str, size: float, weight: str) -> float:
    """How far a text moves the pen; its ink ends before that."""
    return _ink(f"{text}x", size, weight) - _ink("x", size, weight)


def wrap(text: str, inches: float, size: float = SMALLEST, weight: str = "normal") -> list[str]:
    """The text in lines that fill so many inches; no line begins with a point or a comma that stands by itself."""
    lines: list[str] = []
    space = _inches(" ", size, weight)
    used = 0.0
    for word in re.sub(r" ([.,;:])(?= |$)", "\u00a0\\1", text).split(" "):
        width = _inches(word, size, weight)
        if lines and used + space + width <= inches:
            lines[-1], used = f"{lines[-1]} {word}", used + space + width
        else:
            lines, used = [*lines, word], width
    return [line.replace("\u00a0", " ") for line in lines]


def math(text: str) -> str:
    """R_inc and L_inc as matplotlib sets formulas."""
    return re.sub(r"\b([RL])_inc\b", r"$\1_\\mathrm{inc}$", text)


# ---------------------------------------------------------------------------------------------------- page


def digest(files: Iterable[Path]) -> str:
    """16 hex digits of the content of files, in the order given."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()[:16]


@dataclass(frozen=True)
class Page:
    """One figure or table: its name, how it is to look, and what its rows were made of.

    width: inches; titles: whether panels bear more than their letter; footer: whether the setting stands below; the
    caption tells both, too. made: what goes into the files' metadata.
    """

    name: str
    width: float
    titles: bool
    footer: bool
    smoke: bool
    made: Mapping[str, str]

    @property
    def _made(self) -> str:
        return "; ".join(f"{name} {value}" for name, value in self.made.items())

    @property
    def wide(self) -> bool:
        """Whether panels fit side by side."""
        return self.width >= 5

    def size(self, wide: float, narrow: float | None = None) -> tuple[float, float]:
        """Width and height in inches; the height of a wide page and of one column."""
        return self.width, wide if self.wide or narrow is None else narrow

    def title(self, ax: plt.Axes, letter: str, text: str, **look: Any) -> None:
        """ "(a) text", or the letter alone where titles are off."""
        ax.set_title(" ".join([f"({letter})"] * bool(letter) + [text] * self.titles), **look)

    def foot(self, figure: Figure | SubFigure, text: str) -> None:
        """A line or more below the figure, where footers are on."""
        if self.footer:
            lines = text.replace(" %", "\u00a0%").split("\n")
            lines = [line for part in lines for line in wrap(part, self.width - 0.15)]
            figure.supxlabel(math("\n".join(lines)), fontsize=SMALLEST)

    def _caption(self, sentences: Sequence[str]) -> str:
        """Write the caption beside the figure, as text and as LaTeX, and return it."""
        text = " ".join(" ".join(sentence.split()) for sentence in sentences if sentence)
        if self.smoke:
            text = f"SMOKE TEST. {text}"
        folder = output_folder(self.smoke)
        (folder / f"{self.name}.txt").write_text(text + "\n")
        (folder / f"{self.name}.caption.tex").write_text(latex(text) + "%\n")
        print(f"{folder / self.name}.*: written")
        return text

    def save(self, figure: Figure, *caption: str) -> None:
        """Write figures/<name>.pdf, .png, and the caption as .txt and .caption.tex; the same rows give the same bytes.

        caption: its sentences, the first of which is the title. A smoke run's output is stamped and goes to
        figures/smoke/: it can never take a paper figure's place. Printed are where it is, its caption, and what cannot
        be read or lies over something.
        """
        for fault in faults(figure):
            print(f"{self.name}: {fault}")
        folder, text = output_folder(self.smoke), self._caption(caption)
        if self.smoke:
            stamp = dict(color="red", alpha=0.3, ha="center", va="center", rotation=20)
            figure.text(0.5, 0.5, "SMOKE TEST", fontsize=6 * self.width, in_layout=False, **stamp)
        paths = [folder / f"{self.name}.pdf", folder / f"{self.name}.png"]
        about = {"Title": caption[0] if caption else self.name, "Subject": text, "Keywords": self._made}
        figure.savefig(paths[0], metadata=about | {"CreationDate": None, "Producer": None, "Creator": None})
        figure.savefig(
            paths[1],
            metadata={"Title": about["Title"], "Description": text, "Source": self._made, "Software": None},
        )
        print(fill(text, 110))

    def save_table(
        self,
        shown: pd.DataFrame,
        tidy: pd.DataFrame,
        *caption: str,
        note: Sequence[str] = (),
        bold: pd.DataFrame | None = None,
        groups: bool = False,
        gap: float = 3,
        sortable: bool = False,
    ) -> Styler:
        """Write figures/<name>.tex (to \\input, needs booktabs), .html and .csv, and the caption as a figure's.

        shown: text cells as they are to be read, missing ones empty; tidy: the numbers behind them, for the .csv;
        caption: its sentences, the first of which is the HTML's title; note: what marks mean, below the table; bold:
        which cells of shown are best; groups: the first index level heads its rows, in LaTeX; gap: points between
        columns there; sortable: the HTML sorts by the column whose head is clicked. What LaTeX and HTML take for code
        is escaped. Returns the table for a notebook to display.
        """
        shown = shown.fillna("").map(str)
        bold = pd.DataFrame(False, shown.index, shown.columns) if bold is None else bold
        folder, text = output_folder(self.smoke), self._caption(caption)
        below = ". ".join(["SMOKE TEST"] * self.smoke + [line.rstrip(".") for line in note]) + "." * bool(note)
        padded = shown.apply(aligned)
        (folder / f"{self.name}.tex").write_text(tabular(padded, bold, below, groups, gap))
        table = padded.style.format(escape="html").format_index(escape="html", axis=0)
        table = table.format_index(escape="html", axis=1).set_uuid(self.name)
        table = table.apply(lambda _: bold.map({True: "font-weight: bold", False: ""}.get), axis=None)
        looks = [
            ("td", "font-variant-numeric: tabular-nums; white-space: nowrap; padding: 1px 8px; text-align: left"),
            ("th", "padding: 1px 8px; text-align: left; vertical-align: top"),
            ("caption", "text-align: left; max-width: 60em"),
        ]
        if sortable:
            looks += [
                ("th[tabindex]", "cursor: pointer"),
                ("th[aria-sort=ascending]::after", 'content: " ▲"'),
                ("th[aria-sort=descending]::after", 'content: " ▼"'),
            ]
        table = table.set_table_styles([dict(selector=name, props=look) for name, look in looks])
        table = table.set_caption(escape(text) + f"<br><small>{escape(below)}</small>" * bool(below))
        title, made = (escape(part) for part in (caption[0] if caption else self.name, self._made))
        (folder / f"{self.name}.html").write_text(
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f'<meta name="source" content="{made}">\n</head>\n<body>\n{table.to_html(sparse_index=not sortable)}'
            f"{SORT % (shown.columns.nlevels - 1) if sortable else ''}</body>\n</html>\n"
        )
        write_csv(folder / f"{self.name}.csv", tidy)
        return table


def page(name: str, scope: Mapping[str, Any], declared: Mapping[str, Any], read: Iterable[str | Path] = ()) -> Page:
    """The page of a notebook, and matplotlib's defaults set for it.

    name: of its files, without ending; scope: the notebook's globals(), declared: its parameters, of which width,
    titles, footer and smoke are read where they are there; read: the files drawn from. Into the metadata go their
    digest, the commit that rows say they were made with, and the parameters.
    Raises ValueError for a width that fits no paper, and what `results.provenance` raises.
    """
    paper_style()
    given = {key: scope[key] for key in declared if key != "out"}
    width = given.get("width", PAGE)
    if not 3 <= width <= 10:
        raise ValueError(f"width is in inches, {COLUMN} for one column and {PAGE} for two; got {width!r}")
    files = [Path(file) for file in read]
    commits = {results.provenance(file).get("commit", "unknown") for file in files if file.suffix == ".parquet"}
    made = {"commit": ", ".join(sorted(commits))} if commits else {}
    made |= {"rows": f"sha256 {digest(files)}"} if files else {}
    made |= {"parameters": json.dumps(given, sort_keys=True, ensure_ascii=False)}
    looks = {key: given.get(key, default) for key, default in (("titles", True), ("footer", True), ("smoke", False))}
    return Page(name, width, **looks, made=made)


def faults(figure: Figure) -> list[str]:
    """What cannot be read in print: text below 7 points, beyond the figure's edge, or over other text; in words."""
    canvas, drawn, dpi = FigureCanvasAgg(figure), [], figure.dpi
    figure.set_dpi(288)  # fine enough that letters do not snap to pixels; four to a point
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    plain = renderer.draw_text

    def record(gc, x, y, s, prop, angle, ismath=False, mtext=None):
        width, height, below = renderer.get_text_width_height_descent(s, prop, ismath)
        corners = np.array([(0, -below), (width, -below), (width, height - below), (0, height - below)])
        turn = np.deg2rad(angle)
        corners = corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        corners = corners * (1, -1) + (x, y)  # y points down here
        drawn.append((s, prop.get_size_in_points(), *corners.min(0), *corners.max(0)))
        plain(gc, x, y, s, prop, angle, ismath, mtext)

    renderer.draw_text = record
    figure.draw(renderer)
    figure.set_dpi(dpi)
    found, (right, bottom) = [], figure.get_size_inches() * 288
    drawn = [one for one in drawn if one[0].strip()]
    for i, (text, size, x1, y1, x2, y2) in enumerate(drawn):
        if size < SMALLEST:
            found.append(f"{text!r} has {size:g} points, below {SMALLEST:g}")
        if min(x1, y1) < -4 or x2 > right + 4 or y2 > bottom + 4:
            found.append(f"{text!r} leaves the page")
        for other, _, u1, v1, u2, v2 in drawn[:i]:
            if min(x2, u2) - max(x1, u1) > 4 and min(y2, v2) - max(y1, v1) > 7:
                found.append(f"{text!r} lies over {other!r}")
    return found


# ---------------------------------------------------------------------------------------------------- axes


def percent_axis(axis: plt.Axes, label: str) -> None:
    """An accuracy axis in per cent from zero."""
    axis.set_ylabel(label)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axis.set_ylim(bottom=0)


def unpruned_line(ax: plt.Axes, row: Mapping[str, float]) -> None:
    """The unpruned model's accuracy with the band of its interval, from accuracy, low and high in per cent."""
    ax.axhspan(row["low"], row["high"], color=COLOURS["full"], alpha=0.12, lw=0)
    ax.axhline(row["accuracy"], color=COLOURS["full"], lw=1, label="unpruned")


def chance_line(ax: plt.Axes, percent: float, upright: bool = True) -> None:
    """The level of an answer that has not seen the image, in per cent; upright: accuracy is the vertical axis."""
    line = ax.axhline if upright else ax.axvline
    line(percent, color="black", lw=0.8, ls=(0, (1, 1.5)), label="chance", zorder=1)


def legend_below(ax: plt.Axes, columns: int = 1, **look: Any) -> None:
    """The legend under the ticks and the label of the horizontal axis, which are set before; there it hides nothing."""
    ticks = 1 + max((label.get_text().count("\n") for label in ax.get_xticklabels()), default=0)
    down = 10 + 8.6 * ticks + 10 * bool(ax.get_xlabel())  # points
    below = ax.transAxes + ScaledTranslation(0, -down / 72, ax.figure.dpi_scale_trans)
    looks = dict(handletextpad=0.4, columnspacing=1.0, borderaxespad=0, labelspacing=0.3) | look
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=columns, **looks)


def seed_points(ax: plt.Axes, place: float, values: Sequence[float], colour: str, **look: Any) -> None:
    """Training runs' shares in per cent: a dot for each run, their mean as a dash, and its interval over runs.

    See `stats.over_seeds`; the interval is cut at 0 and 100 %, and below three runs there is none. look: of the dots.
    Nothing is drawn of no values, as of a design that has not been run yet.
    """
    if not len(values):
        return
    told = {name: 100 * value for name, value in over_seeds(values).items()}
    if not np.isnan(told["low"]):
        ax.vlines(place, max(told["low"], 0), min(told["high"], 100), color=colour, lw=0.9)
    ax.plot(place, told["mean"], marker="_", ms=7, mew=1.3, color=colour)
    spread = place + np.linspace(-0.09, 0.09, len(values)) * (len(values) > 1)
    ax.plot(spread, 100 * np.asarray(values), **dict(marker="o", ls="none", ms=2.4, mew=0.6, color=colour) | look)


def spans(table: pd.DataFrame, value: str = "accuracy") -> list[pd.Series]:
    """Distances from a value down to low and up to high, as `errorbar` wants them."""
    return [(table[value] - table["low"]).clip(lower=0), (table["high"] - table[value]).clip(lower=0)]


# ---------------------------------------------------------------------------------------------------- tables


def accuracy_cell(row: Mapping[str, Any]) -> str:
    """ "56.6 ±2.1": accuracy and the distance to the farther end of its interval in per cent.

    Columns read: accuracy, low, high. It is no half width: the interval of a small rate is lopsided, ends at 0. With
    the columns of `stats.gap_pairs` as gap_difference and gap_p_fdr, GAP's cell ends in * where it is significantly
    better than compact IDs', in v where worse.
    """
    mark = ""
    if row["ids"] == "original" and row.get("gap_p_fdr", 1) < 0.05:
        mark = "*" if row["gap_difference"] > 0 else "v"
    far = max(row["accuracy"] - row["low"], row["high"] - row["accuracy"])
    return f"{100 * row['accuracy']:.1f} ±{100 * far:.1f}{mark}"


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV. A text that a spreadsheet would run as a formula gets an apostrophe before it."""
    texts = table.select_dtypes(exclude="number").columns
    safe = {
        name: [
            f"'{cell}" if isinstance(cell, str) and cell[:1] in "=+-@\t\r" and cell else cell for cell in table[name]
        ]
        for name in texts
    }
    table.assign(**safe).to_csv(path, index=False, float_format="%.6g")
