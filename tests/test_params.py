"""A misspelt or mistyped notebook parameter is an error, whatever cell is run again."""

import json
import logging

import nbformat
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell

from analysis import ROOT, params

DECLARED = dict(model="tiny-llava", limit=None, keep=[1.0], share=0.5, smoke=False, count=3, out=None, seeds=[0])
KINDS = dict(limit=int, out=".parquet")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize(
    "injected", [{}, dict(model="x", limit=4, keep=0.5, share=1, smoke=True, count=1, out="a.parquet")]
)
def test_good_values_pass(injected):
    params.check(DECLARED | injected | {"_i1": "source", "In": [], "DECLARED": DECLARED}, DECLARED, **KINDS)


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        (dict(modle="x"), "unknown parameter 'modle'; did you mean 'model'?.*limit, keep"),
        (dict(model=3), "'model' takes str, as in 'tiny-llava'; got int 3"),
        (dict(model=None), "'model' takes str"),
        (dict(smoke=1), "'smoke' takes bool"),
        (dict(share="half"), "'share' takes float"),
        (dict(count=True), "'count' takes int"),
        (dict(limit=2.5), "'limit' takes int or None; got float 2.5"),
        (dict(limit=True), "'limit' takes int or None"),
        (dict(out="results.csv"), "'out' is the name of a .parquet file, got 'results.csv'"),
        (dict(keep="a lot"), r"'keep' takes list\[float\]"),
        (dict(keep=[0.5, "a lot"]), r"'keep' takes list\[float\]"),
        (dict(seeds=[True]), r"'seeds' takes list\[int\]"),
    ],
)
def test_bad_values_say_what_is_right(injected, message):
    with pytest.raises(ValueError, match=message):
        params.check(DECLARED | injected, DECLARED, **KINDS)


def test_one_value_stands_for_a_list_and_is_put_into_one():
    scope = dict(splits="val")
    params.check(scope, dict(splits=["val", "testA"]))
    assert scope["splits"] == ["val"]  # and not its letters


def test_declare_sees_only_what_the_cell_defined():
    assert params.declare({"pytest": pytest, "check": params.check, "_i": "", "In": [], "a": 1, "b": None}) == {
        "a": 1,
        "b": None,
    }


FIRST, SECOND = (
    "a = 1\nb = [2]\nDECLARED = params.declare(globals())",
    "params.check(globals(), DECLARED)\nROOT, other = 'x', 3",
)


def test_any_cell_may_be_run_again():
    """As by hand in JupyterLab: no false alarm, and a misspelt name is still one."""
    shell = InteractiveShell()
    run = lambda cell: shell.run_cell(cell, store_history=True)  # noqa: E731
    run("from analysis import params").raise_error()
    for cell in (FIRST, SECOND, SECOND, FIRST, SECOND, "a = 7", SECOND):
        run(cell).raise_error()
    run("a = 'seven'")
    assert "'a' takes int" in str(run(SECOND).error_in_exec)

    shell = InteractiveShell()
    run("from analysis import params").raise_error()
    run(FIRST), run("c = 1")
    assert "unknown parameter 'c'" in str(run(SECOND).error_in_exec)
    run(FIRST)  # does not make the misspelt name one that is declared
    assert "unknown parameter 'c'" in str(run(SECOND).error_in_exec)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_reads_every_parameters_cell(path, caplog):
    """No "Unable to parse line", no "Passed unknown parameter" for a right one; nothing is run."""
    caplog.set_level(logging.WARNING)
    seen = papermill.inspect_notebook(path)
    assert caplog.text == ""
    cell = next(c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", []))
    scope = {"params": params}
    exec(cell.source, scope)
    assert {name for name in seen if name != "DECLARED"} == set(scope["DECLARED"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_as_jupyterlab_writes_them(path):
    """Opening one leaves no difference but, under another Python, its version."""
    book = json.loads(path.read_text())
    assert book["metadata"]["kernelspec"] == {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    assert book["metadata"]["language_info"].keys() >= {"codemirror_mode", "pygments_lexer", "version"}
    assert path.read_text() == nbformat.writes(nbformat.read(path, as_version=4)) + "\n"


ROWS = "papermill_runs/10_rec_eval/fig1.parquet"


def test_other_rows_never_take_the_name_of_the_papers_figure():
    declared = dict(rows=ROWS, out=None, smoke=False)

    def name(**given):
        return params.output("fig1_collapse", declared | given, declared)

    assert name() == name(out="fig1_collapse") == name(smoke=True) == "fig1_collapse"
    assert name(rows="mine.parquet") == "fig1_collapse_mine" and name(rows=["a/b.parquet"]) == "fig1_collapse_b"
    assert name(rows="mine.parquet", out="any") == "any"
    for given in (dict(rows="mine.parquet", out="fig1_collapse"), dict(out="fig2_misalignment")):
        with pytest.raises(ValueError, match="is the paper's and stays so"):
            name(**given)
    with pytest.raises(ValueError, match="out is a name in figures/"):
        name(out="../mine.pdf")
    assert (
        params.output("fig5", dict(keep=0.5, out=None, smoke=False), dict(keep=0.25, out=None, smoke=False))
        == "fig5_own"
    )
    many = dict(rows="papermill_runs/10_rec_eval/tab4_*.parquet", out=None, smoke=False)
    paper = [f"papermill_runs/10_rec_eval/tab4_{model}_val.parquet" for model in "ab"]
    assert params.output("tab4_models", many | dict(rows=paper), many) == "tab4_models"


def test_paths(tmp_path):
    assert params.paths(ROWS) == params.paths([ROWS]) == [ROOT / ROWS]
    assert params.paths("papermill_runs/10_rec_eval/fig*.yaml") == sorted(
        (ROOT / "papermill_runs/10_rec_eval").glob("fig*.yaml")
    )
    assert params.paths(str(tmp_path / "a.parquet")) == [tmp_path / "a.parquet"]
    with pytest.raises(FileNotFoundError, match="no file fits"):
        params.paths("papermill_runs/none_*.parquet")


def test_defaults_are_read_without_running_anything():
    assert params.defaults(ROOT / "notebooks/fig1_collapse.ipynb")["rows"] == ROWS
