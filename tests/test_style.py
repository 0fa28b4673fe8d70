"""Figures: the same bytes from the same rows, sizes, what can be read, captions and metadata."""

import json
import re
import subprocess
import sys
import zlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import results, style
from analysis.drawing import captions

DRAW = """
import sys, pathlib
from analysis import style
import matplotlib.pyplot as plt
style.ROOT = pathlib.Path(sys.argv[1])
scope = dict(rows="rows.parquet", width=3.3, titles=True, footer=True, smoke=sys.argv[2] == "smoke")
page = style.page("drawn", scope, scope, read=[style.ROOT / "rows.parquet"])
fig, ax = plt.subplots(figsize=page.size(2.0), layout="constrained")
ax.errorbar([0, 1], [0, 1], [0.1, 0.2], label="a")
page.title(ax, "a", "panel")
page.foot(fig, "20 expressions; R_inc of 95 % of them")
style.legend_below(ax)
page.save(fig, "A title.", "50 % of λ1 & R_inc >= 0.5 [0.1, 0.9].")
"""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Everything is written to a folder of its own."""
    monkeypatch.setattr(style, "ROOT", tmp_path)
    results.write_rows(tmp_path / "rows.parquet", pd.DataFrame({"a": [1.0, 2.0]}), {"commit": "abc123"})
    return tmp_path


def page(**parameters):
    scope = dict(rows="rows.parquet", smoke=False) | parameters
    return style.page("drawn", scope, scope, read=[style.ROOT / "rows.parquet"])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of a figure that a process of its own has drawn, and the same again."""
    folders = [tmp_path_factory.mktemp("drawn") for _ in range(2)]
    for folder in folders:
        results.write_rows(folder / "rows.parquet", pd.DataFrame({"a": [1.0, 2.0]}), {"commit": "abc123"})
    processes = [subprocess.Popen([sys.executable, "-c", DRAW, folder, ""]) for folder in folders]
    assert [process.wait() for process in processes] == [0, 0]
    return folders


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_draw_the_same_bytes(drawn):
    one, two = (files(folder / "figures") for folder in drawn)
    assert set(one) == {"drawn.pdf", "drawn.png", "drawn.txt", "drawn.caption.tex"} and one == two


def test_smoke_is_stamped_elsewhere_and_other_rows_are_told_apart(folder, capsys):
    def saved(place="figures", **parameters):
        here = page(**parameters)
        fig, _ = plt.subplots(figsize=(3, 1))
        here.save(fig, "Title.")
        plt.close(fig)
        assert f"{folder / place}/drawn.*: written\n" in capsys.readouterr().out
        return (folder / place / "drawn.png").read_bytes()

    plain = saved()
    stamped = saved("figures/smoke", smoke=True)
    assert saved() == plain != stamped and (folder / "figures/smoke/drawn.txt").read_text() == "SMOKE TEST. Title.\n"
    results.write_rows(folder / "rows.parquet", pd.DataFrame({"a": [1.0, 2.0]}), {"commit": "def456"})
    assert saved() != plain


def test_files_say_what_they_show_and_what_they_are_made_of(drawn):
    folder = drawn[0] / "figures"
    text = "A title. 50 % of λ1 & R_inc >= 0.5 [0.1, 0.9]."
    assert (folder / "drawn.txt").read_text() == f"{text}\n"
    tex = r"A title. 50 \% of $\lambda$1 \& $R_\mathrm{inc}$ $>$= 0.5 [0.1, 0.9].%"
    assert (folder / "drawn.caption.tex").read_text() == tex + "\n"
    told = Image.open(folder / "drawn.png").text
    digest = style.digest([drawn[0] / "rows.parquet"])
    assert told["Title"] == "A title." and told["Description"] == text
    commit, rows, parameters = told["Source"].split("; ")
    assert (commit, rows) == ("commit abc123", f"rows sha256 {digest}")
    assert json.loads(parameters.removeprefix("parameters "))["width"] == 3.3
    pdf = (folder / "drawn.pdf").read_bytes()
    width = float(re.search(rb"/MediaBox \[ ?0 0 ([0-9.]+)", pdf)[1])
    assert width == pytest.approx(3.3 * 72, abs=0.01)  # what is asked for, to the point: nothing is cut to its contents
    streams = b"".join(zlib.decompress(part) for part in re.findall(rb"stream\r?\n(x.*?)endstream", pdf, re.S))
    assert b"abc123" in pdf + streams and b"/CreationDate" not in pdf


def test_titles_and_footers_are_there_or_not(folder):
    for on in (True, False):
        made = page(width=7.0, titles=on, footer=on)
        fig, ax = plt.subplots(figsize=made.size(2, 3))
        made.title(ax, "b", "what it is")
        made.foot(fig, "setting " * 40)
        assert ax.get_title(loc="left") == ("(b) what it is" if on else "(b)")
        assert (fig._supxlabel is not None) == on and fig.get_size_inches().tolist() == [7, 2]
        plt.close(fig)
    assert page(width=3.3).size(2, 3) == (3.3, 3) and page().size(2, 3) == (7.0, 2)
    with pytest.raises(ValueError, match="3.3 for one column and 7.0 for two; got 33"):
        page(width=33)


def test_faults_are_found_and_only_they():
    fig, ax = plt.subplots(figsize=(3, 2), layout="constrained")
    style.paper_style()
    ax.set(xlabel="one", ylabel="two", title="three")
    assert style.faults(fig) == []
    fig.text(0.2, 0.5, "tiny", fontsize=5)
    fig.text(0.95, 0.5, "far out of the page")
    fig.text(0.4, 0.6, "here is a text")
    fig.text(0.45, 0.605, "there is another")
    found = style.faults(fig)
    assert [one.split("'")[1] for one in found] == ["tiny", "far out of the page", "there is another"]
    assert "below 7" in found[0] and "leaves the page" in found[1] and "lies over" in found[2]
    plt.close(fig)


def test_wrapped_lines_fill_their_width_and_no_more():
    text = "the model , which reads the words of the page one after the other , says so . " * 6
    for inches in (1.5, 3.0):
        lines = style.wrap(text.strip(), inches)
        assert " ".join(lines) == text.strip()
        assert not any(line[0] in ",." for line in lines)
        widths = [style._inches(line, 7, "normal") for line in lines]
        assert max(widths) <= inches + 0.02 and np.mean(widths[:-1]) > 0.8 * inches
    assert style.wrap("unbreakable" * 5, 1.0) == ["unbreakable" * 5] and style.wrap("", 1.0) == [""]


def test_accuracy_cell_marks_what_gap_changes_and_nothing_else():
    row = pd.Series(dict(ids="original", accuracy=0.5661, low=0.54, high=0.59, gap_difference=0.5, gap_p_fdr=0.001))
    assert style.accuracy_cell(row) == "56.6 ±2.6*"  # the farther end
    assert style.accuracy_cell(row.replace({0.5: -0.5})) == "56.6 ±2.6v"
    for other in (
        row.drop(["gap_difference", "gap_p_fdr"]),
        row.replace({"original": "compact"}),
        row.replace({0.001: 0.2}),
    ):
        assert style.accuracy_cell(other) == "56.6 ±2.6"
    assert style.accuracy_cell(dict(ids="compact", accuracy=0.0, low=0.0, high=0.019)) == "0.0 ±1.9"


def test_pictures_in_markdown_get_their_captions(tmp_path):
    (tmp_path / "fig1_a.txt").write_text("What it shows, n = 3 [1, 2].\n")
    text = "![old \\[x\\] words](figures/fig1_a.png) and ![kept](figures/other.png), [link](figures/fig1_a.png)"
    told = captions.alternative_texts(text, tmp_path)
    assert told == text.replace(r"old \[x\] words", r"What it shows, n = 3 \[1, 2\].") != text
    assert captions.alternative_texts(told, tmp_path) == told


def scored(**more):
    rows = pd.DataFrame(
        dict(model="tiny-x", dataset="refstamps", split=["val"] * 4 + ["testA"] * 2, image_id=list("aabbcc"))
    )
    return rows.assign(ref_id=range(6), sent_id=0, dialect="llava", **more)


def test_captions_are_made_of_the_rows():
    rows = scored()
    said = captions.data(pd.concat([rows, rows]))  # two cells of the same expressions
    assert said == "tiny-x on RefStamps val and testA: 6 expressions, 3 images."
    both = captions.data(pd.concat([rows, rows[:2].assign(model="y")]))
    assert both == "tiny-x and y on RefStamps val and testA: tiny-x 6 expressions, 3 images; y 2 expressions, 1 images."
    assert captions.data(pd.concat([rows, rows.assign(model="y")])).endswith("6 expressions, 3 images for each model.")
    assert "IoU ≥ 0.5; answers are read as" in captions.scoring(rows, "strict")
    mixed = captions.scoring(pd.concat([rows, rows.assign(dialect="shikra")]), "lenient")
    assert "IoU ≥ 0.5 and IoU > 0.5 (each model its own)" in mixed and "lenient" in mixed
    assert captions.level(pd.Series([0.0138, 0.014])).startswith("Chance is 1.4 %")
    assert captions.level(pd.Series([0.01, 0.02])).startswith("Chance is 1.0 to 2.0 %")
    assert captions.points(dict(difference=0.012, low=-0.003, high=0.027)) == "+1.2 [-0.3, 2.7]"
    assert captions.extremes([0.131, 0.75, 0.2]) == "13 to 75 %" and captions.extremes([0.5]) == "50 %"


def test_the_testbed_is_told_from_the_models_own_files(tmp_path):
    assert captions.testbed(["tiny-x"], tmp_path) == ""
    (tmp_path / "tiny-x").mkdir()
    config = dict(text_config=dict(rope_parameters=dict(rope_theta=10000.0)), vision_config=dict(stem=[1]))
    (tmp_path / "tiny-x/config.json").write_text(json.dumps(config))
    (tmp_path / "tiny-x/log.csv").write_text("step,loss\n100,1\n1200,0.5\n")
    said = captions.testbed(["tiny-x", "someone/real-7b"], tmp_path)
    assert "tiny-x is a tiny model" in said and "real-7b" not in said
    assert "no position embeddings, rotary base 10,000, 1,200 steps" in said
    (tmp_path / "tiny-x/config.json").write_text(json.dumps(config | dict(vision_config={}, begun="tiny-y")))
    said = captions.testbed(["tiny-x"], tmp_path)
    assert "learned position embeddings" in said and "tiny-x began as tiny-y" in said


def test_a_spreadsheet_runs_nothing_of_a_table(tmp_path):
    table = pd.DataFrame(
        {"expression": ["=1+1", "+cmd|' /C calc'!A0", "-2", "@x", "cat", "", None], "value": [-1.0] * 7}
    )
    style.write_csv(tmp_path / "t.csv", table)
    read = pd.read_csv(tmp_path / "t.csv")
    assert read["expression"].tolist()[:5] == ["'=1+1", "'+cmd|' /C calc'!A0", "'-2", "'@x", "cat"]
    assert (read["value"] == -1).all()
