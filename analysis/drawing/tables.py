"""Tables as LaTeX: escaped text, numbers under numbers, and nothing but booktabs needed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import pandas as pd

_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{sign: f"${sign}$" for sign in "<>|"},
    **{sign: rf"$\{unicodedata.name(sign).split()[-1].lower()}$" for sign in "αβγδεζηθικμνξπρστυφχψω"},
    "λ": r"$\lambda$",  # Unicode's name of it is lamda
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "²": r"\textsuperscript{2}",
    "†": r"\dag{}",
    "°": r"\textdegree{}",
    "–": "--",
    "−": "$-$",
    "“": "``",
    "”": "''",
    "\u2007": r"\phantom{0}",  # figure space, punctuation space and the space of a sign: see `aligned`
    "\u2008": r"\phantom{.}",
    "\u2009": r"\phantom{$-$}",
}


def latex(text: str) -> str:
    """Plain text as LaTeX: what it takes for code is escaped, and a sign before a number is a minus."""
    text = re.sub(r"(?<![\w.)])-(?=\.?\d)", "−", text)
    text = "".join(_TEX.get(sign, sign) for sign in text)
    return re.sub(r"\b([RL])\\_inc\b", r"$\1_\\mathrm{inc}$", text)


def aligned(cells: Sequence[str]) -> list[str]:
    """The cells of a column, padded so that their numbers stand digit under digit and point under point.

    Each number of a cell ("56.6 ±2.5*" has two) is padded to the widest of its place with spaces as wide as a digit, a
    point or a sign (U+2007, U+2008, U+2009). A cell that does not begin with a number is left as it is.
    """
    split = [re.split(r"((?<![\w.])[+−-]?\d+(?:\.\d+)?)", cell) for cell in cells]
    rows = [i for i, parts in enumerate(split) if len(parts) > 1 and not parts[0]]
    for place in range(1, max((len(split[i]) for i in rows), default=0), 2):
        here = [i for i in rows if len(split[i]) > place]
        numbers = [split[i][place] for i in here]
        signed = any(number[0] in "+−-" for number in numbers)
        whole = max(len(number.lstrip("+−-").partition(".")[0]) for number in numbers)
        after = max(len(number.partition(".")[2]) for number in numbers)
        for i, number in zip(here, numbers):
            sign, digits = (number[0], number[1:]) if number[0] in "+−-" else ("\u2009" * signed, number)
            left, _, right = digits.partition(".")
            more = "\u2007" * (after - len(right))
            if after and not right:
                more = "\u2008" + more
            last = place + 2 >= len(split[i]) and not split[i][place + 1]
            split[i][place] = "\u2007" * (whole - len(left)) + sign + digits + ("" if last else more)
    return ["".join(parts) for parts in split]


def _levels(index: pd.Index) -> list[tuple[str, ...]]:
    return [tuple(str(part) for part in (key if isinstance(key, tuple) else (key,))) for key in index]


def _cell(text: str, strong: bool) -> str:
    """A cell as LaTeX; of a strong one the value is bold, without what follows it (bold figures are wider)."""
    value, space, more = text.partition(" ")
    told = f"\\textbf{{{latex(value)}}}" if strong and value else latex(value)
    return told + (r"\," if more.startswith("±") else space) + latex(more)


def _heads(columns: pd.Index, first: int) -> list[str]:
    """The header's lines without their ends: names that go on over columns are set once, with a rule below."""
    keys, lines = _levels(columns), []
    for level in range(columns.nlevels):
        last, cells, rules, start = level == columns.nlevels - 1, [], [], 0
        while start < len(keys):
            end = start + 1
            while not last and end < len(keys) and keys[end][: level + 1] == keys[start][: level + 1]:
                end += 1
            text = latex(keys[start][level])
            cells.append(f"\\multicolumn{{{end - start}}}{{c}}{{{text}}}")
            if text and not last:
                rules.append(f"\\cmidrule(lr){{{first + start + 1}-{first + end}}}")
            start = end
        lines.append(" & ".join(cells) + " \\\\ " + "".join(rules))
    return lines


def tabular(shown: pd.DataFrame, bold: pd.DataFrame, note: str, groups: bool, gap: float) -> str:
    """A table of text cells as LaTeX that needs booktabs: 7 points in a document of 10, the note as wide as the line.

    shown: cells as `aligned` pads them; bold, groups, gap: as for `style.Page.save_table`.
    """
    keys, first = _levels(shown.index), shown.index.nlevels - groups
    names = [str(name or "") for name in shown.index.names][groups:]
    heads = _heads(shown.columns, first)
    body, before = [], None
    for key, cells, heavy in zip(keys, shown.to_numpy(), bold.to_numpy()):
        if groups and (before is None or before[0] != key[0]):
            body += [r"\addlinespace"] * bool(body)
            body.append(f"\\multicolumn{{{first + len(cells)}}}{{@{{}}l}}{{\\itshape {latex(key[0])}}} \\\\")
        line = []
        for level, part in enumerate(key[groups:], groups):
            # an index that goes on is set once; an empty group before a row's "[" keeps it from being an option of \\
            again = before is not None and level < len(key) - 1 and key[: level + 1] == before[: level + 1]
            line.append("" if again else f"{{}}{latex(part)}")
        line += [_cell(cell, strong) for cell, strong in zip(cells, heavy)]
        body.append(" & ".join(line) + r" \\")
        before = key
    corner = [" & ".join([""] * first + [heads[0]])] + [" & ".join([""] * first + [line]) for line in heads[1:]]
    corner[-1] = " & ".join([latex(name) for name in names] + [heads[-1]])
    return "\n".join(
        [
            r"% \usepackage{booktabs}; \begin{table*} \input{this} \caption[]{\input{this.caption}} \end{table*}",
            rf"\begingroup\centering\scriptsize\setlength{{\tabcolsep}}{{{gap:g}pt}}%",
            rf"\begin{{tabular}}{{@{{}}{'l' * (first + shown.shape[1])}@{{}}}}",
            r"\toprule",
            *corner,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}\par",
            *([rf"\vspace{{2pt}}\parbox{{\linewidth}}{{\scriptsize {latex(note)}}}\par"] if note else []),
            r"\endgroup",
            "",
        ]
    )
