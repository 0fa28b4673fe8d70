"""Tables: what LaTeX and HTML take for code, numbers under numbers, and whether LaTeX sets them on a page."""

import re
import shutil
import subprocess

import pandas as pd
import pytest

from analysis import ROOT, style
from analysis.drawing.tables import aligned, latex

PAPER = sorted(path.stem for path in (ROOT / "figures").glob("tab*.csv"))


def saved(folder, monkeypatch, shown, smoke=False, **more):
    monkeypatch.setattr(style, "output_folder", lambda smoke: folder)
    scope = dict(smoke=smoke)
    page = style.page("t", scope, scope)
    page.save_table(shown, pd.DataFrame({"value": [1 / 3, 2]}), "A <title>.", "50 % more.", **more)
    return tuple((folder / f"t.{kind}").read_text() for kind in ("tex", "html", "csv"))


def hostile():
    columns = pd.MultiIndex.from_tuples([("a_b", "50 %"), ("a_b", "c^2"), ("", "d & e")])
    index = pd.MultiIndex.from_tuples([("[CLS] one", "λ1 = 5"), ("[CLS] one", "R_inc ~"), ("x\\y", "[z]")])
    cells = [["1 & 2", None, "#$"], ["<3>", "−4.5 ±10.3*", "{4†}"], ["12.0 ±0.3", "−14 ≥ ρ²", "“q” – ×"]]
    shown = pd.DataFrame(cells, index, columns)
    shown.index.names = ["m_n", "λ"]
    return shown


def test_a_table_is_escaped_in_each_form_and_only_a_smoke_run_is_stamped(tmp_path, monkeypatch):
    shown = hostile()
    bold = pd.DataFrame(False, shown.index, shown.columns)
    bold.iloc[2, 0] = True
    tex, html, csv = saved(tmp_path, monkeypatch, shown, bold=bold, note=["*: better", "†: not checked"])
    assert r"{}[CLS] one & {}$\lambda$1 = 5" in tex and r"\textbf{12.0}\,$\pm$\phantom{0}0.3" not in tex
    assert r"\textbf{12.0}\,$\pm$0.3" in tex and r"$<$3$>$" in tex and r"50 \%" in tex and r"x\textbackslash{}y" in tex
    assert r"\parbox{\linewidth}{\scriptsize *: better. \dag{}: not checked.}" in tex
    assert "<title>A &lt;title&gt;.</title>" in html and "*: better. †: not checked." in html and "50 % more." in html
    assert "&lt;3&gt;" in html and "font-weight: bold" in html and csv == "value\n0.333333\n2\n"
    assert "nan" not in (tex + html).lower() and "None" not in tex + html and "SMOKE" not in tex + html
    assert (tex, html, csv) == saved(tmp_path, monkeypatch, shown, bold=bold, note=["*: better", "†: not checked"])
    stamped = saved(tmp_path, monkeypatch, shown, smoke=True)
    assert all("SMOKE TEST" in text for text in stamped[:2])


@pytest.mark.parametrize(
    "clicks, order",
    [
        (["th.index_name.level0"], "a m n p"),
        (["th.col_heading.level1.col0"], "p a m n"),  # the largest number first, what is empty last
        (["th.col_heading.level1.col1"] * 2, "m n p a"),
        (["th.index_name.level0", "th.col_heading.level1.col2"], "a m n p"),  # what is equal keeps its order
    ],
)
def test_a_click_on_a_column_s_head_sorts_by_it(clicks, order, tmp_path, monkeypatch):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine; Debian: apt-get install chromium")
    index = pd.MultiIndex.from_tuples([("m", "0"), ("p", "1"), ("n", ""), ("a", "")], names=["method", "k"])
    columns = pd.MultiIndex.from_tuples([("x", "one"), ("x", "two"), ("y", "three")])
    cells = [["1 ±3", "−20.1", "1"], ["20.5 ±2*", "3", "0"], ["", "−1", "1"], ["9", "4", "1"]]
    saved(tmp_path, monkeypatch, pd.DataFrame(cells, index, columns))
    assert "<script>" not in (tmp_path / "t.html").read_text()
    html = saved(tmp_path, monkeypatch, pd.DataFrame(cells, index, columns), sortable=True)[1]
    clicked = "".join(f"document.querySelector('{head}').click();" for head in clicks)
    (tmp_path / "t.html").write_text(html.replace("</body>", f"<script>{clicked}</script></body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path}/t.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert re.findall(r'class="row_heading level0[^>]*>(\w)</th>', dom) == order.split()


def test_numbers_stand_under_numbers():
    wide = {"\u2007": 1.0, "\u2008": 0.5, "\u2009": 1.5, "+": 1.5, "−": 1.5, "-": 1.5, ".": 0.5}

    def points(cell):
        """Where the decimal point (or the end) of each number stands, in digits."""
        found, x = [], 0.0
        for part in re.split(r"(\d+(?:\.\d*)?)", cell):
            if part and part[0].isdigit():
                found.append(x + len(part.partition(".")[0]))
            x += sum(wide.get(sign, 1.0) for sign in part)
        return found

    cells = ["56.6 ±2.5*", "0.6 ±10.3", "100.0 ±0.4v", "", "own rule", "1 ±1"]
    done = aligned(cells)
    numbers = [points(done[i]) for i in (0, 1, 2, 5)]
    assert {tuple(one) for one in numbers} == {tuple(numbers[0])}
    assert done[3:5] == ["", "own rule"]
    assert [cell.translate({0x2007: "", 0x2008: "", 0x2009: ""}) for cell in done] == cells
    signed = aligned(["+1.2 [-0.3, 2.7]", "-10.4 [-12.0, -9.1]", "3.0 [1.0, 5.0]"])
    assert len({tuple(points(cell)) for cell in signed}) == 1


def test_latex_of_plain_text():
    assert latex("a_b & 5 % of -3, x-ray 2-3 <1> R_inc") == (
        r"a\_b \& 5 \% of $-$3, x-ray 2-3 $<$1$>$ $R_\mathrm{inc}$"
    )


def compiled(folder, *names):
    """LaTeX's log of a two-column paper, 497 points wide, with these tables and their captions."""
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on this machine; Debian: apt-get install texlive-latex-recommended")
    floats = [
        rf"\begin{{table*}}\input{{{name}}}\caption[]{{\input{{{name}.caption}}}}\end{{table*}}" for name in names
    ]
    paper = [
        r"\documentclass[10pt,twocolumn]{article}\usepackage{booktabs}",
        r"\setlength{\textwidth}{497pt}\hfuzz=0.5pt\begin{document}",
        *(line + r"\clearpage" for line in floats),
        r"\end{document}",
    ]
    (folder / "paper.tex").write_text("\n".join(paper))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    return (folder / "paper.log").read_text(errors="replace")


def test_no_letter_of_a_table_or_caption_needs_more_than_latin_1():
    assert latex("β and λ, α to ω") == r"$\beta$ and $\lambda$, $\alpha$ to $\omega$"
    for path in (ROOT / "figures").glob("*.tex"):
        path.read_text().encode("latin-1")


def test_latex_sets_whatever_a_table_holds(tmp_path, monkeypatch):
    saved(tmp_path, monkeypatch, hostile(), note=["λ_1, 50 % & [CLS]"], groups=True)
    assert "Overfull" not in compiled(tmp_path, "t")
    saved(tmp_path, monkeypatch, pd.DataFrame([["1.0 ±0.3"] * 40], index=["x"]))
    assert "Overfull" in compiled(tmp_path, "t")  # so that the test below can fail


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_tables_compile_and_fit_the_page(name, tmp_path):
    for file in (f"{name}.tex", f"{name}.caption.tex"):
        shutil.copy(ROOT / "figures" / file, tmp_path)
    log = compiled(tmp_path, name)
    assert "Overfull" not in log and "Missing character" not in log


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_tables_explain_their_marks(name):
    tex, html = ((ROOT / "figures" / f"{name}.{kind}").read_text() for kind in ("tex", "html"))
    body, _, note = tex.partition(r"\end{tabular}")
    for mark, told in (
        (r"\d\*", r"\*"),
        (r"\d(\\phantom{0})*v ", " v: "),
        (r"\\textdegree", r"\\textdegree{}:"),
        (r"\\dag", r"\\dag{}:"),
    ):
        if re.search(mark, body):
            assert re.search(told, note), f"{mark} is not explained"
    assert "<title>" in html and "<caption>" in html
