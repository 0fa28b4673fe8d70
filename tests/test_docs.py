"""docs/: every code block runs and gives what it says; tables name what there is; pictures are of the present rules."""

import doctest
import re
import runpy
from fractions import Fraction

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from analysis import ROOT, keys, results
from analysis.engine.evaluate import cells, evaluate
from analysis.positions import GENERATED, IDS, PARTS, TEXT, parse_spec
from analysis.rec import datasets

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_code_block_gives_what_it_says(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    assert blocks and {kind for kind, _ in blocks} == {"python"}, "other blocks would not be run"
    assert all(block.startswith(">>> ") for _, block in blocks)
    test = doctest.DocTestParser().get_doctest("\n".join(block for _, block in blocks), {}, page.name, str(page), 0)
    said = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)


def test_the_schema_names_every_column_of_the_rows(tiny, tmp_path):
    rows = evaluate(tiny, datasets.load("refstamps", "val", 1), cells(), tmp_path / "rows.parquet", progress=False)
    said = (ROOT / "docs/row-schema.md").read_text()
    table = re.findall(r"^\| (`.+?`) \| (.+?) \|", said, re.M)
    described = {name: kind for names, kind in table for name in re.findall(r"`(\w+)`", names)}
    assert list(described) == list(rows.columns)
    kinds = {"text": "OTU", "integer": "i", "number": "if"}
    for name, kind in described.items():
        assert kind == "as in the data" or rows[name].dtype.kind in kinds[kind], name
    lines = [line.strip("| ").split(" | ")[0] for line in said.partition("| entry |")[2].splitlines()[2:]]
    told = [entry.strip() for line in lines[: lines.index("")] for entry in line.split(",")]
    assert sorted(told) == sorted(results.provenance(tmp_path / "rows.parquet"))
    assert {"fingerprint", *told[-3:]} <= keys.NOT_KEY and not keys.NOT_KEY & set(told[:-4])


def test_pictures_show_every_rule_as_it_is_now():
    script = runpy.run_path(str(ROOT / "docs/draw_ids.py"))
    specs = [parse_spec(spec) for shown in script["SPECS"].values() for spec in shown]
    assert {spec.name for spec in specs} == set(IDS)
    assert {spec.part for spec in specs} == {None, *PARTS, Fraction(1, 2)}
    assert {spec.text for spec in specs} == {None, *TEXT} and {spec.generated for spec in specs} == {None, *GENERATED}
    for kind in script["SPECS"]:
        figure = script["draw"](kind)
        figure.set_dpi(160)
        figure.canvas.draw()
        now = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        plt.close(figure)
        there = np.asarray(Image.open(ROOT / f"docs/ids_{kind}.png").convert("RGB"))
        assert there.shape == now.shape and (there == now).mean() > 0.999, "python docs/draw_ids.py draws them anew"


def test_written_ids_are_the_rules():
    """By hand, for the six tokens of the picture."""
    script = runpy.run_path(str(ROOT / "docs/draw_ids.py"))
    assert script["FED"].tolist() == [7, 1, 13, 4, 12, 3]
    numbers = script["numbers"]
    assert numbers("rope", "compact") == (list("012345"), ["6", "7", "8"], "9")
    assert numbers("rope", "original@after") == (["7", "1", "13", "4", "12", "3"], ["14", "15", "16"], "17")
    assert numbers("rope", "original+cache")[1:] == (["16", "17", "18"], "9")
    assert numbers("moved", "exchanged")[0] == ["5", "3", "13", "6", "12", "1"]
    assert numbers("moved", "compact#target") == (["7", "1", "13", "3", "12", "3"], ["16", "17", "18"], "19")
    assert numbers("mrope", "compact") == (["1,2", "0,1", "2,1", "1,0", "2,0", "0,2"], ["3", "4", "5"], "6")
    assert numbers("mrope", "sequential")[0][:2] == ["0,0,0", "1,1,1"] and numbers("mrope", "original+cache")[2] == "-3"
