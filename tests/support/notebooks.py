"""Notebooks run by papermill, or a producer's cells in this process."""

import nbformat
import papermill

from analysis import ROOT


def run(notebook, out, parameters):
    """Run it in its folder, as JupyterLab does (`make paper` runs all from the project's)."""
    where = ROOT / "notebooks"
    papermill.execute_notebook(notebook, out, parameters, kernel_name="python3", cwd=where, progress_bar=False)


def produce(notebook, parameters):
    """The rows that a producer ends with, without the seconds that a kernel takes to import everything again."""
    scope = {}
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, scope)
        if "parameters" in cell.metadata.get("tags", []):
            scope |= parameters
    return scope["rows"]


def draw(notebook, kinds, parameters, folder):
    """Run a consumer; its stamped files must be made anew, and nothing may warn but that two images say too little."""
    files = [ROOT / f"figures/smoke/{notebook}.{kind}" for kind in kinds]
    for file in files:
        file.unlink(missing_ok=True)
    run(ROOT / f"notebooks/{notebook}.ipynb", folder / "drawn.ipynb", parameters | {"smoke": True})
    for cell in nbformat.read(folder / "drawn.ipynb", 4).cells:
        for said in cell.get("outputs", []):
            assert "Warning" not in said.get("text", "").replace("RuntimeWarning: All-NaN slice", ""), said["text"]
    assert all(file.stat().st_size > 100 for file in files)
    if "tex" in kinds:
        assert "SMOKE TEST" in files[kinds.index("tex")].read_text()


FIGURE, TABLE = ("pdf", "png", "txt", "caption.tex"), ("tex", "html", "csv", "txt", "caption.tex")
