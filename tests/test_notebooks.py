"""Every notebook through papermill on two images, and what a misspelt parameter does."""

import subprocess
import sys

import papermill
import pytest
import yaml

from analysis import ROOT, models
from analysis.results import read_rows

PRODUCER = "notebooks/10_rec_eval.ipynb"


def run(notebook, out, parameters):
    papermill.execute_notebook(notebook, out, parameters, kernel_name="python3", cwd=ROOT, progress_bar=False)


@pytest.fixture(scope="module")
def model(tiny_folder):
    """The embedded model, or a random one where its checkpoint is absent."""
    name = "tiny-llava"
    return name if (models.MODELS[name] / "model.safetensors").is_file() else str(tiny_folder)


@pytest.mark.parametrize("key, figure", [("fig1", "fig1_collapse"), ("fig2", "fig2_misalignment")])
def test_a_figure_from_its_parameters_to_its_files(key, figure, model, tmp_path):
    given = yaml.safe_load((ROOT / f"papermill_runs/10_rec_eval/{key}.yaml").read_text())
    rows = tmp_path / "rows.parquet"
    produced = given | {"model": model, "out": str(rows), "smoke": True}
    run(ROOT / PRODUCER, tmp_path / "produced.ipynb", produced)
    assert read_rows(rows)["image_id"].nunique() == 2
    files = [ROOT / f"figures/smoke/{figure}.{extension}" for extension in ("pdf", "png")]
    for file in files:
        file.unlink(missing_ok=True)
    run(ROOT / f"notebooks/{figure}.ipynb", tmp_path / "drawn.ipynb", {"rows": str(rows), "smoke": True})
    assert all(file.stat().st_size > 1000 for file in files)


@pytest.mark.parametrize("figure", ["figA_refstamps", "figB_testbed"])
def test_a_figure_that_needs_no_rows(figure, tmp_path):
    files = [ROOT / f"figures/smoke/{figure}.{extension}" for extension in ("pdf", "png")]
    for file in files:
        file.unlink(missing_ok=True)
    run(ROOT / f"notebooks/{figure}.ipynb", tmp_path / "drawn.ipynb", {"smoke": True})
    assert all(file.stat().st_size > 1000 for file in files)


def test_bare_papermill_fails_on_a_misspelt_parameter(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", PRODUCER, tmp_path / "out.ipynb", "-k", "python3", "-p", "pruners", "trim"],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode != 0
    assert "unknown parameter 'pruners'; did you mean 'pruner'?" in done.stderr
