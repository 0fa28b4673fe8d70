"""The one module that writes figures and tables: widths, fonts, colours; byte-stable PDF, PNG, LaTeX, HTML and CSV."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from analysis import ROOT, pruning

WIDTH = 7.0  # inches: the text width of most papers; one column is half of it
# Okabe and Ito's colours, told apart by colour-blind readers and in grey; the same thing has the same colour everywhere
COLOURS = {
    "full": "#4D4D4D",
    "compact": "#D55E00",
    "original": "#0072B2",
    "compressed": "#E69F00",
    "permuted": "#CC79A7",
    "both": "#D55E00",
}
LABELS = {"compact": "compact IDs (as pruners do)", "original": "original IDs (GAP)"}
IDS = {"compact": "upstream", "original": "GAP"}  # the same in a table's column
PRUNERS = {name: method.label for name, method in pruning.PRUNERS.items()}


def paper_style() -> None:
    """Set matplotlib's defaults for every figure."""
    sns.set_theme(style="ticks", context="paper")
    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 8,
            "axes.labelsize": 8,
            "axes.titlesize": 8.5,
            "xtick.labelsize": 7.5,
            "ytick.labelsize": 7.5,
            "legend.fontsize": 7.5,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
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


def save(figure: Figure, name: str, smoke: bool = False) -> list[Path]:
    """Write figures/<name>.pdf and .png; the same figure gives the same bytes.

    A smoke run's output is stamped and goes to figures/smoke/: it can never take a paper figure's place.
    """
    folder = output_folder(smoke)
    if smoke:
        figure.text(0.5, 0.5, "SMOKE TEST", fontsize=40, color="red", alpha=0.3, ha="center", va="center", rotation=20)
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    figure.savefig(paths[0], bbox_inches="tight", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    figure.savefig(paths[1], bbox_inches="tight", metadata={"Software": None})
    return paths


def percent_axis(axis: plt.Axes, label: str) -> None:
    """An accuracy axis in per cent from zero."""
    axis.set_ylabel(label)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    axis.set_ylim(bottom=0)


def accuracy_cell(row: pd.Series) -> str:
    """ "56.6 ±2.1": accuracy and half the width of its interval in per cent, from columns accuracy, low and high.

    With the columns of `stats.gap_pairs` as gap_difference and gap_p_fdr, GAP's cell ends in * where it is
    significantly better than compact IDs', in v where worse.
    """
    mark = ""
    if row["ids"] == "original" and row.get("gap_p_fdr", 1) < 0.05:
        mark = "*" if row["gap_difference"] > 0 else "v"
    return f"{100 * row['accuracy']:.1f} ±{50 * (row['high'] - row['low']):.1f}{mark}"


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


def save_table(
    name: str, shown: pd.DataFrame, tidy: pd.DataFrame, bold: pd.DataFrame | None = None, smoke: bool = False
) -> Styler:
    """Write figures/<name>.tex (a tabular for \\input, needs booktabs and multirow), .html and .csv.

    shown: text cells as they are to be read, missing ones empty; tidy: the numbers behind them, for the .csv; bold:
    which cells of shown are best. What LaTeX and HTML take for code is escaped. Returns the table for a notebook to
    display.
    """
    shown = shown.fillna("")
    bold = pd.DataFrame(False, shown.index, shown.columns) if bold is None else bold

    def styled(escape: str) -> Styler:
        table = (
            shown.style.format(escape=escape).format_index(escape=escape, axis=0).format_index(escape=escape, axis=1)
        )
        table = table.apply(lambda _: bold.map({True: "font-weight: bold", False: ""}.get), axis=None)
        return table.set_caption("SMOKE TEST") if smoke else table

    folder, html = output_folder(smoke), styled("html").set_uuid(name)
    tex = styled("latex").to_latex(hrules=True, convert_css=True, multicol_align="c")
    (folder / f"{name}.tex").write_text(tex)
    (folder / f"{name}.html").write_text(html.to_html(doctype_html=True))
    write_csv(folder / f"{name}.csv", tidy)
    return html
