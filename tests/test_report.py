"""The page of all figures: everything is in it, it says where each comes from, and what is missing or stale is said."""

import base64
import json
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from analysis import ROOT, keys, params, results, style
from analysis.__main__ import main
from analysis.tools import report

CAPTION = 'Accuracy < 50 % & "more".'
README = """# What <breaks>?

| figure or table | notebook | rows from | file in `figures/` |
|---|---|---|---|
| 1: a figure | `fig1_a` | `10_rec_eval` | [`fig1_a.pdf`](figures/fig1_a.png) |
| Table 1: two tables | `tab1_b` | Figure 1's | [`tab1_b.tex`](figures/tab1_b.csv), [`tab1_c.tex`](figures/tab1_c.csv) |
| Real checkpoints | `12_real_checkpoints` | - | rows only |
"""


def notebook(parameters):
    cell = dict(
        cell_type="code", metadata={"tags": ["parameters"]}, source=parameters, outputs=[], execution_count=None
    )
    return json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5))


def write_rows(root, answers):
    rows = [
        dict(
            model=model,
            dataset="d",
            split="val",
            image_id=i // 2,
            ref_id=i,
            sent_id=i,
            raw=answers,
            error="x" * (i > 4),
        )
        for i in range(6)
        for model in ("m<1>", "m2")
    ]
    made = keys.versions() | {"code": {}, "model": "m<1>", "revision": "r1", "commit": "c0ffee"}
    results.write_rows(root / "papermill_runs/r.parquet", pd.DataFrame(rows), made)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one figure and one notebook of two tables, drawn by `style` from one file of rows."""
    for name in ("figures", "notebooks", "papermill_runs"):
        (tmp_path / name).mkdir()
    for module in (report, params):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(style, "output_folder", lambda smoke: tmp_path / "figures")
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "notebooks/fig1_a.ipynb").write_text(notebook('rows = "papermill_runs/r.parquet"\nsmoke = False'))
    (tmp_path / "notebooks/tab1_b.ipynb").write_text(notebook('rows = "papermill_runs/*.parquet"\nsmoke = False'))
    write_rows(tmp_path, "[0, 0, 1, 1]")
    files, scope = [tmp_path / "papermill_runs/r.parquet"], {"smoke": False, "rows": ["papermill_runs/r.parquet"]}
    figure, ax = plt.subplots(figsize=(3.3, 2), layout="constrained")
    ax.plot([0, 1], [0, 1])
    style.page("fig1_a", scope, scope, read=files).save(figure, CAPTION)
    for name in ("tab1_b", "tab1_c"):
        shown = pd.DataFrame({"a <b>": ["1.0 ±0.5"]}, index=["random"])
        style.page(name, scope, scope, read=files).save_table(shown, shown, CAPTION, note=["±: <half>"])
    return tmp_path


class Reader(HTMLParser):
    """Tags with their attributes, the text, and whether every tag is closed in turn."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""


def test_everything_is_in_the_page_and_said_of_each_figure(project):
    assert report.write(project / "report.html") == []
    text = (project / "report.html").read_text()
    page = Reader(text)
    picture = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(picture) == 1 and picture[0]["alt"] == CAPTION and page.text.count(CAPTION) == 3
    kind, _, data = picture[0]["src"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == (project / "figures/fig1_a.png").read_bytes()
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base"), "nothing is loaded, nothing runs"
        assert {"srcset", "data", "background", "style"}.isdisjoint(attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert "href" not in attributes or (attributes["href"][0] == "#" and attributes["href"][1:] in ids)
    assert not any(word in text for word in ("url(", "@import", "http:", "https:", "file:", str(project)))
    assert (
        "@media (prefers-color-scheme: dark)" in text
        and ("meta", {"name": "color-scheme", "content": "light dark"}) in page.tags
    )
    titles = ["What <breaks>?", "Figure 1: a figure", "Table 1: two tables"]
    assert all(title in page.text for title in titles) and "Real checkpoints" not in page.text
    assert page.text.count("±: <half>.") == 2 and page.text.count("a <b>") == 2
    assert page.text.count("5 expressions about 3 images") == 2, "without the one that failed"
    assert page.text.count("m<1> (revision r1)") == 2 and page.text.count("c0ffee") == 2
    for file in ("fig1_a.png", "tab1_b.tex"):
        assert f".venv/bin/snakemake --profile profiles/local figures/{file}" in page.text
    assert "warning" not in text.partition("</style>")[2]
    report.write(project / "again.html")
    assert (project / "again.html").read_text() == text


def test_what_is_stale_is_said(project):
    write_rows(project, "[0, 0, 2, 2]")
    page = Reader(report.page()[0])
    assert page.text.count("Drawn from other rows than those that are here now") == 2
    rows = results.read_rows(project / "papermill_runs/r.parquet")
    results.write_rows(project / "papermill_runs/r.parquet", rows.assign(model="m2"), {"code": {"analysis.gone": "0"}})
    assert "1 of 1 files of rows were made under another key: code" in Reader(report.page()[0]).text
    (project / "papermill_runs/r.parquet").unlink()
    page = Reader(report.page()[0])
    assert page.text.count("cannot be read: no rows at papermill_runs/r.parquet") == 2
    assert page.text.count(CAPTION) == 3


def test_what_is_missing_is_listed_and_the_rest_is_shown(project, capsys):
    out = ["report", "--out", str(project / "report.html")]
    assert main(out) == 0 and "written" in capsys.readouterr().out
    (project / "figures/tab1_c.html").unlink()
    (project / "figures/fig1_a.txt").unlink()
    assert main(out) == 1
    said = capsys.readouterr().err.splitlines()
    command = "make it with: .venv/bin/snakemake --profile profiles/local figures"
    assert said == [
        f"Figure 1: a figure: figures/fig1_a.txt, its caption, is missing; {command}/fig1_a.png",
        f"Table 1: two tables: figures/tab1_c is missing; {command}/tab1_b.tex",
    ]
    page = Reader((project / "report.html").read_text())
    assert "2 of 3 figures and tables" in page.text and f"figures/tab1_c is missing; {command}" in page.text
    (project / "figures/fig1_a.png").write_bytes(b"\x89PNG")
    (project / "figures/tab1_b.html").write_text("<p>")
    before = (project / "report.html").read_bytes()
    assert main(out) == 2 and "none of the 3 figures and tables" in capsys.readouterr().err
    assert (project / "report.html").read_bytes() == before


def test_the_table_of_readme_names_every_figure_notebook_and_every_file_of_the_paper():
    lines = report.listing((ROOT / "README.md").read_text())
    notebooks = {path.stem for kind in ("fig", "tab") for path in (ROOT / "notebooks").glob(f"{kind}*.ipynb")}
    assert {line.notebook for line in lines} == notebooks and len(lines) == len(notebooks)
    assert all(line.names[0] == line.notebook for line in lines)
    drawn = {path.stem for kind in ("fig*.png", "tab*.html") for path in (ROOT / "figures").glob(kind)}
    assert drawn <= {name for line in lines for name in line.names}
    with pytest.raises(ValueError, match="README.md has no table of figures"):
        report.listing("# nothing\n")
