"""lmms-eval itself runs the plug-in, by its command line: `make lmms-test`, in an environment of its own."""

import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from lmms_eval import __main__ as command_line
from lmms_eval.models.simple import llava_hf
from lmms_eval.tasks import TaskManager
from PIL import Image
from qwen_vl_utils import fetch_image
from transformers import AutoConfig, AutoProcessor

from analysis import hf, lmms, models
from analysis.engine.evaluate import cells, evaluate
from analysis.models import llava
from analysis.rec import datasets
from analysis.rec.scoring import score
from analysis.stats import rate_interval
from analysis.training.processor import save_processor
from tests.support import qwen

LIMIT = 20  # expressions
CPU = dict(device="cpu", device_map="cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A copy of tiny-llava with a processor's files, and its class where the built-in looks for LLaVA's."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("tiny-llava", "tiny-clip"):
        shutil.copytree(models.MODELS["tiny-llava"].parent / name, folder / name)
    save_processor(folder / "tiny-llava")
    build, options = llava.whole_class(AutoConfig.from_pretrained(folder / "tiny-llava"))
    llava_hf.model_map["llava"] = SimpleNamespace(from_pretrained=partial(build.from_pretrained, **options))
    return dict(pretrained=folder / "tiny-llava", **CPU)


@pytest.fixture(scope="session")
def random_qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random-qwen2.5-vl"
    qwen.build(folder)
    save_processor(folder)
    return dict(pretrained=folder, min_pixels=12 * 12 * 64, max_pixels=12 * 12 * 256, **CPU)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """lmms-eval's command line: the samples that it writes, in the order of the task, and its numbers."""
    monkeypatch.setattr(datasets, "IMAGES", 20)  # the first 20 images hold enough

    def run(model, limit=LIMIT, **model_args):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        given = ",".join(f"{name}={value}" for name, value in model_args.items())
        argv = ["lmms_eval", "--model", model, "--model_args", given, "--tasks", "gap_refstamps_val"]
        argv += ["--include_path", str(lmms.TASKS), "--batch_size", "1", "--limit", str(limit)]
        monkeypatch.setattr(sys, "argv", [*argv, "--log_samples", "--output_path", str(out)])
        command_line.cli_evaluate()
        (samples,), (results,) = out.rglob("*_samples_*.jsonl"), out.rglob("*_results.json")
        read = [json.loads(line) for line in samples.read_text().splitlines()]
        read = pd.DataFrame(sorted(read, key=lambda sample: sample["doc_id"]))
        assert len(read) == limit
        return read, json.loads(results.read_text())["results"]["gap_refstamps_val"]

    return run


@pytest.mark.parametrize(
    "cell",
    [
        dict(pruner="fastervlm", keep=0.25, ids="original"),
        dict(pruner="random", keep=0.5, ids="compact", seed=1),
        dict(pruner="trim", keep=0.25, ids="original"),  # it reads the expression
    ],
    ids=lambda cell: cell["pruner"],
)
def test_twenty_answers_and_their_scores_are_the_engines(cell, run, tiny, tmp_path):
    samples, results = run("gap_llava_hf", **tiny, **cell)
    data = datasets.load("refstamps", "val", 20)
    data.rows.drop(data.rows.index[LIMIT:], inplace=True)
    given = cells(cell["pruner"], cell["keep"], ids=cell["ids"], seeds=cell.get("seed", 0))
    rows = score(
        evaluate(models.load("tiny-llava", device="cpu"), data, given, tmp_path / "rows.parquet"), parsing="strict"
    )
    said = samples["filtered_resps"].tolist()
    assert said == rows["raw"].tolist() and len(set(said)) > 5
    assert [one["score"] for one in samples["acc"]] == rows["correct"].astype(float).tolist()
    assert results["acc,none"] == rows["correct"].mean() and results["iou,none"] == pytest.approx(rows["iou"].mean())
    interval = rate_interval(rows["correct"], rows["image_id"])
    assert (results["acc_low,none"], results["acc_high,none"]) == pytest.approx(interval)


@pytest.mark.parametrize("name, weights", [("llava_hf", "tiny"), ("qwen2_5_vl", "random_qwen")])
def test_all_tokens_give_the_built_ins_answers(name, weights, run, request):
    given = request.getfixturevalue(weights)
    method = "fastervlm" if name == "llava_hf" else "spatial"
    whole, _ = run(f"gap_{name}", limit=4, **given, pruner=method, keep=1, ids="original")
    built_in, _ = run(name, limit=4, **given)  # the task asks as for the model before
    fewer, _ = run(f"gap_{name}", limit=4, **given, pruner=method, keep=0.25, ids="compact")
    raw = ["input", "filtered_resps", "token_counts"]
    assert whole[raw].to_json() == built_in[raw].to_json() != fewer[raw].to_json()


def test_a_failure_stops_lmms_eval_which_would_call_it_an_empty_answer(run, tiny, monkeypatch):
    def out_of_memory(*args):
        raise MemoryError("as much as there is")

    monkeypatch.setattr(hf.Pruned, "prefill", out_of_memory)
    with pytest.raises(SystemExit, match="MemoryError: as much as there is"):
        run("gap_llava_hf", **tiny, limit=1)


def test_a_call_without_an_image_stops_lmms_eval(run, tiny, monkeypatch):
    """An image that is lost on its way to the model."""
    generate = llava_hf.LlavaForConditionalGeneration.generate

    def blind(self, input_ids, pixel_values=None, **more):
        return generate(self, input_ids=input_ids[input_ids != self.config.image_token_id][None], **more)

    monkeypatch.setattr(llava_hf.LlavaForConditionalGeneration, "generate", blind)
    with pytest.raises(SystemExit, match="no image was pruned in this call"):
        run("gap_llava_hf", **tiny, limit=1)


def test_qwens_images_are_resized_once(random_qwen):
    """What the task shows goes through lmms-eval's own two steps as it is, and so its frame is the model's."""
    processor = AutoProcessor.from_pretrained(random_qwen["pretrained"])
    images = processor.image_processor
    images.patch_size, images.size = 14, images.size | dict(shortest_edge=256 * 28 * 28, longest_edge=1605632)
    rec = lmms.ASKED["qwen2_5_vl"](processor=processor, config=None)
    assert rec.frame == "resized_pixels:28,200704,1605632"
    for size in np.random.default_rng(0).integers(60, 2400, (40, 2)).tolist():
        shown = rec.shown(Image.new("RGB", size))
        assert fetch_image(dict(image=shown)).size == shown.size
        _, rows, columns = images(shown, return_tensors="pt").image_grid_thw[0].tolist()
        assert (columns * 14, rows * 14) == shown.size


def test_all_tasks_are_found_and_the_tag_names_the_eight_of_refcoco():
    index = TaskManager(include_path=str(lmms.TASKS), include_defaults=False).task_index
    assert sorted(index["gap_rec"]["task"]) == sorted({*index} - {"gap_rec", "gap_refstamps_val"})
    assert len(index["gap_rec"]["task"]) == 8
