import subprocess
import sys

import pandas as pd

from analysis import style

DRAW = """
import sys, pathlib
from analysis import style
style.ROOT = pathlib.Path(sys.argv[1])
style.paper_style()
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(2, 1))
ax.errorbar([0, 1], [0, 1], [0.1, 0.2], label="a")
ax.legend()
style.save(fig, "drawn", smoke=sys.argv[2] == "smoke")
"""


def draw(folder, smoke=""):
    subprocess.run([sys.executable, "-c", DRAW, folder, smoke], check=True)
    folder = folder / "figures"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_draw_the_same_bytes_and_smoke_is_stamped_elsewhere(tmp_path):
    paper = draw(tmp_path / "a")
    assert set(paper) == {"drawn.pdf", "drawn.png"}
    assert paper == draw(tmp_path / "b")
    smoke = draw(tmp_path / "c", "smoke")
    assert set(smoke) == {"smoke/drawn.pdf", "smoke/drawn.png"}
    assert smoke["smoke/drawn.png"] != paper["drawn.png"]


def test_a_table_is_escaped_in_each_form_and_only_a_smoke_run_is_stamped(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "output_folder", lambda smoke: tmp_path)
    shown = pd.DataFrame({("a_b", "50 %"): ["1 & 2", None], ("a_b", "c"): ["<3>", "4"]}, index=["x_y", "z"])
    bold = pd.DataFrame([[True, False], [False, False]], shown.index, shown.columns)
    tidy = pd.DataFrame({"value": [1 / 3, 2]})
    style.save_table("t", shown, tidy, bold)
    tex, html, csv = ((tmp_path / f"t.{kind}").read_text() for kind in ("tex", "html", "csv"))
    assert tex.startswith(r"\begin{tabular}") and r"x\_y & \bfseries 1 \& 2 & <3> \\" in tex and r"50 \%" in tex
    assert "&lt;3&gt;" in html and "font-weight: bold" in html and csv == "value\n0.333333\n2\n"
    assert "nan" not in (tex + html).lower() and "None" not in tex + html
    assert "SMOKE" not in tex + html
    style.save_table("t", shown, tidy, bold)
    assert (tmp_path / "t.html").read_text() == html
    style.save_table("t", shown, tidy, bold, smoke=True)
    assert all("SMOKE TEST" in (tmp_path / f"t.{kind}").read_text() for kind in ("tex", "html"))


def test_accuracy_cell_marks_what_gap_changes_and_nothing_else():
    row = pd.Series(dict(ids="original", accuracy=0.5661, low=0.54, high=0.59, gap_difference=0.5, gap_p_fdr=0.001))
    assert style.accuracy_cell(row) == "56.6 ±2.5*"
    assert style.accuracy_cell(row.replace({0.5: -0.5})) == "56.6 ±2.5v"
    for other in (
        row.drop(["gap_difference", "gap_p_fdr"]),
        row.replace({"original": "compact"}),
        row.replace({0.001: 0.2}),
    ):
        assert style.accuracy_cell(other) == "56.6 ±2.5"


def test_a_spreadsheet_runs_nothing_of_a_table(tmp_path):
    table = pd.DataFrame(
        {"expression": ["=1+1", "+cmd|' /C calc'!A0", "-2", "@x", "cat", "", None], "value": [-1.0] * 7}
    )
    style.write_csv(tmp_path / "t.csv", table)
    read = pd.read_csv(tmp_path / "t.csv")
    assert read["expression"].tolist()[:5] == ["'=1+1", "'+cmd|' /C calc'!A0", "'-2", "'@x", "cat"]
    assert (read["value"] == -1).all()
