"""Every notebook through papermill on two images, and what a misspelt parameter does."""

import json
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from analysis import ROOT, models
from analysis.engine.evaluate import cells
from analysis.results import read_rows, write_rows
from tests.support.notebooks import FIGURE, TABLE, draw, produce, run

PRODUCER = "notebooks/10_rec_eval.ipynb"


@pytest.fixture(scope="module")
def model(tiny_folder):
    """The embedded model, or a random one where its checkpoint is absent."""
    name = "tiny-llava"
    return name if (models.MODELS[name] / "model.safetensors").is_file() else str(tiny_folder)


@pytest.fixture(scope="module")
def produced(model, tmp_path_factory):
    """Rows of a parameter file (a smoke run), made once: produced("fig1") -> path."""
    folder, made = tmp_path_factory.mktemp("rows"), {}

    def rows(key, **more):
        name = "_".join([key, *map(str, more.values())])
        if name not in made:
            given = yaml.safe_load((ROOT / f"papermill_runs/10_rec_eval/{key}.yaml").read_text())
            for part in given["grid"]:
                if part.get("pruner") == "all" and isinstance(part["keep"], list):
                    part["keep"] = [0.25, 0.5]  # two of them show as much
            made[name] = folder / f"{name}.parquet"
            rows = produce(ROOT / PRODUCER, given | more | {"model": model, "out": str(made[name]), "smoke": True})
            assert rows["image_id"].nunique() == 2
        return str(made[name])

    return rows


@pytest.mark.parametrize(
    "notebook, key, kinds",
    [
        ("fig1_collapse", "fig1", FIGURE),
        ("fig2_misalignment", "fig2", FIGURE),
        ("fig3_keep_ratio", "fig3", FIGURE),
        ("fig4_order_and_value", "fig4", FIGURE),
        ("fig10_relocation", "fig10", FIGURE),
        ("fig11_where_ids_matter", "fig11", FIGURE),
        ("tabB_order_ids", "tabB", TABLE),
        ("tab8_ids_after_pruning", "tab8", TABLE),
        ("tabA_frames", "fig1", TABLE),
    ],
)
def test_a_notebook_from_its_parameters_to_its_files(notebook, key, kinds, produced, tmp_path):
    draw(notebook, kinds, {"rows": produced(key)}, tmp_path)


def test_figure_1_of_a_model_that_is_never_right(produced, tmp_path):
    """Nothing is retained of nothing, so no cell can be matched with the paper's."""
    rows = read_rows(produced("fig1"))
    write_rows(tmp_path / "rows.parquet", rows.assign(raw="no box"), {})
    draw("fig1_collapse", FIGURE, {"rows": str(tmp_path / "rows.parquet")}, tmp_path)


def test_figure_12_of_answers_at_random(produced, tmp_path):
    """Its 505 cells, each with the unpruned answers of other expressions."""
    whole = read_rows(produced("fig1"))
    whole = whole[whole["pruner"] == "none"].drop_duplicates(["image_id", "ref_id", "sent_id"])
    given, rng = yaml.safe_load((ROOT / "papermill_runs/10_rec_eval/fig12.yaml").read_text()), np.random.default_rng(0)
    grid = [cell for part in given["grid"] for cell in cells(**part)]
    rows = [whole.assign(raw=rng.permutation(whole["raw"]), **cell.columns()) for cell in grid]
    write_rows(tmp_path / "mine.parquet", pd.concat(rows, ignore_index=True).astype({"keep": float}), {})
    assert len(grid) == 505
    draw("fig12_selection_or_ids", FIGURE, {"rows": str(tmp_path / "mine.parquet")}, tmp_path)


@pytest.mark.parametrize("count", [2, 13])
def test_figure_3_of_few_methods(count, produced, tmp_path):
    """As of a person's own rows: the name of the paper's figure stays free, no panel is missed, 13 take two pages."""
    whole = read_rows(produced("fig3"))
    few = [name for name in whole["pruner"].unique() if name != "none"][:count]
    write_rows(tmp_path / "mine.parquet", whole[whole["pruner"].isin(["none", *few])].reset_index(drop=True), {})
    second = ROOT / "figures/smoke/fig3_keep_ratio_2.png"
    second.unlink(missing_ok=True)
    draw("fig3_keep_ratio", FIGURE, {"rows": str(tmp_path / "mine.parquet")}, tmp_path)
    assert second.is_file() == (count > 12)


def test_what_public_code_does_with_ids(produced, tmp_path):
    draw("tab9_upstream_ids", TABLE, {"rows": [produced("tab9"), produced("fig3")]}, tmp_path)


def test_what_is_made_of_the_rows_of_table_1(produced, tmp_path):
    val = produced("tab1", dataset="refstamps", split="val")
    draw("tab1_methods", TABLE, {"rows": [val, produced("tab1", dataset="refstampsg", split="test")]}, tmp_path)
    draw("tab2_control", TABLE, {"rec": val, "words": produced("tab2")}, tmp_path)
    draw("fig5_qualitative", FIGURE, {"rows": val}, tmp_path)


def test_what_is_made_of_the_rows_of_several_models(produced, tmp_path):
    rows = [produced("tab4", dataset="refstamps", split="val"), produced("tab4", dataset="refstampsg", split="test")]
    draw("tab4_models", TABLE, {"rows": rows}, tmp_path)
    draw("fig6_models", FIGURE, {"rows": rows}, tmp_path)


def test_real_checkpoints(tiny_folder, tmp_path):
    """A random LLaVA in Hugging Face form, RefCOCO's file names and one of its annotation formats."""
    rng = np.random.default_rng(0)
    with open(tmp_path / "REC_refcoco_unc_val.jsonl", "w") as lines:
        for i, size in enumerate([(64, 48), (48, 64), (50, 50)]):
            name = f"COCO_train2014_{i:012d}.jpg"
            Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / name)
            for expression in ("left cat", "dog"):
                line = dict(img_path=name, expression=expression, bbox=[4, 5, 30, 40], width=size[0], height=size[1])
                lines.write(json.dumps(line | dict(dataset_name="refcoco")) + "\n")
    given = dict(
        model=str(tiny_folder),
        device="cpu",
        dtype="float32",
        splits=["val"],
        annotations=str(tmp_path),
        images=str(tmp_path),
        keep=[0.5],
        smoke=True,
    )
    run(ROOT / "notebooks/12_real_checkpoints.ipynb", tmp_path / "made.ipynb", given)
    rows = read_rows(ROOT / f"papermill_runs/smoke/{tiny_folder.name}_refcoco_val.parquet")
    assert rows["image_id"].nunique() == 2 and (rows["error"] == "").all()
    assert set(rows["pruner"]) == {"none", "random", "spatial", "cls_similarity", "text_similarity", "prumerge", "trim"}


def test_cost(model, tmp_path):
    rows = str(tmp_path / "cost.parquet")
    run(ROOT / "notebooks/11_cost.ipynb", tmp_path / "made.ipynb", {"model": model, "out": rows, "smoke": True})
    draw("tab3_cost", TABLE, {"rows": rows}, tmp_path)


def test_attention(model, produced, tmp_path):
    rows = tmp_path / "rows"
    run(
        ROOT / "notebooks/13_attention_rows.ipynb",
        tmp_path / "made.ipynb",
        {"model": model, "out": str(rows), "smoke": True},
    )
    given = {kind: [f"{rows}_{kind}.parquet"] for kind in ("attention", "soft")}
    draw("fig9_inconsistency_of_pruning", FIGURE, given | {"hard": [produced("fig3")]}, tmp_path)


def test_the_explorer_as_a_static_picture(model, tmp_path):
    draw("00_explore", FIGURE, {"model": model, "limit": 1, "ids": "original+cache"}, tmp_path)
    outputs = [out for cell in nbformat.read(tmp_path / "drawn.ipynb", 4).cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert any("original+cache" in out.get("data", {}).get("text/html", "") for out in outputs)


@pytest.mark.parametrize("figure", ["fig13_unlearning", "figA_refstamps", "figA2_testbed_design", "figB_testbed"])
def test_a_figure_of_what_the_project_ships(figure, tmp_path):
    draw(figure, FIGURE, {}, tmp_path)


def test_bare_papermill_fails_on_a_misspelt_parameter(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", PRODUCER, tmp_path / "out.ipynb", "-k", "python3", "-p", "pruners", "trim"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "unknown parameter 'pruners'; did you mean 'pruner'?" in done.stderr
