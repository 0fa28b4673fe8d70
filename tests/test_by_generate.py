"""The door for `generate` and the engine are each other's test: the same answers, expression by expression."""

import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoProcessor

from analysis import ROOT, hf, models
from analysis.engine.evaluate import cells, evaluate
from analysis.models import by_generate, llava
from analysis.rec import datasets
from analysis.rec.boxes import BOX_FORMATS
from analysis.rec.scoring import perfect_answers, score
from analysis.training.processor import save_processor
from analysis.types import Cell
from tests.support import qwen


def copied(name, folder):
    """An embedded model with a processor's files beside it."""
    shutil.copytree(models.MODELS[name], folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(models.MODELS["tiny-llava"].parent / "tiny-clip", folder / "tiny-clip")
    return copied("tiny-llava", folder / "tiny-llava")


@pytest.fixture(scope="module")
def whole_class(folder):
    """The class of tiny-llava, as `from_pretrained(folder)`."""
    build, options = llava.whole_class(AutoConfig.from_pretrained(folder))
    return SimpleNamespace(from_pretrained=partial(build.from_pretrained, **options))


@pytest.fixture(scope="module")
def slow(folder, whole_class):
    return by_generate.assemble(
        whole_class.from_pretrained(folder, **by_generate.OPTIONS),
        str(folder),
        "tiny-llava",
        "copy",
        "cpu",
        rec=llava.REC_QUESTION,
        box_format="llava",
        frame="padded",
        max_new_tokens=40,
    )


GRID = [
    *cells("none"),
    *cells(["fastervlm", "random"], 0.25, ids=["original", "compact+original"]),
    *cells("prumerge", 0.1, order="raster", ids="original+cache"),
    *cells("trim:lowest=false", 0.25, ids="original"),
    *cells("text_similarity", 0.5, ids="shuffled:0.5", order="shuffled", seeds=1),
    *cells(["fastv", "sparsevlm"], 0.25, ids=["original", "compact"]),
    *cells(["pyramiddrop", "feather", "sparsevlm+"], 0.5, ids="compact+original"),
    *cells("random:inside=2", 0.5, order="shuffled", ids="compact|3|original+cache"),
]


def test_every_answer_is_the_engines(slow, tmp_path):
    """All rows of 600 answers were compared once; here 48."""
    fast, data = models.load("tiny-llava", device="cpu"), datasets.load("refstamps", "val", 1)
    rows = evaluate(fast, data, GRID, tmp_path / "engine.parquet", progress=False)
    again = evaluate(slow, data, GRID, tmp_path / "generate.parquet", progress=False, batch_size=4)
    same = [
        "expression",
        "raw",
        "tokens",
        "tokens_full",
        "layer_tokens",
        "pruner",
        "keep",
        "ids",
        "order",
        "seed",
        "frame",
        "dialect",
    ]
    assert again[same].equals(rows[same])
    assert list(again.columns) == list(rows.columns)
    assert rows.groupby(["pruner", "ids"])["raw"].agg(tuple).nunique() > 4
    with pytest.raises(ValueError, match="unknown pruner 'fastervml'"):
        slow.check(Cell("fastervml", 0.5))


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next"])
def test_the_processors_files_say_what_the_engine_does(name, tmp_path):
    processor, model = AutoProcessor.from_pretrained(copied(name, tmp_path / name)), models.load(name, device="cpu")
    for image, expression in ((datasets.load("refstamps", "val", 1).image("val_00000"), "the red, round cat"),):
        content = [dict(type="image", image=image), dict(type="text", text=llava.REC_QUESTION.format(expression))]
        inputs = processor.apply_chat_template(
            [dict(role="user", content=content)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        (before, after), visual = model.prompt(expression), model.encode([image])
        read = [*before.tolist(), *[model.image_token] * visual.length, *after.tolist()]
        assert inputs["input_ids"][0].tolist() == read
        assert torch.equal(inputs["pixel_values"].reshape(-1), model.pixels([image]).reshape(-1))
    with pytest.raises(ValueError, match="model with a processor"):
        save_processor(models.MODELS["tiny-shikra"])


def test_the_door_opens_first():
    """`analysis.hf` and `analysis.models` import each other, whichever comes first."""
    afresh = """import importlib, sys
for module in sys.argv[1:]:
    for known in [name for name in sys.modules if name.partition(".")[0] == "analysis"]:
        del sys.modules[known]
    importlib.import_module(module)
"""
    modules = ("analysis.hf", "analysis.models", "analysis.models.by_generate", "analysis.engine.evaluate")
    subprocess.run([sys.executable, "-c", afresh, *modules], check=True, cwd=Path(hf.__file__).parents[1])


def test_the_example_runs(folder, whole_class, monkeypatch, capsys):
    """The module's own lines, which the README begins with, word for word."""
    example = textwrap.dedent(hf.__doc__.split("\n\n", 1)[1].split("\n\n`generate`")[0])
    monkeypatch.setattr(transformers, "LlavaForConditionalGeneration", whole_class)
    data = datasets.load("refstamps", "val", 1)
    scope = dict(name=folder, image=data.image("val_00000"), expression=data.rows["expression"][0])
    exec(example, scope)
    said = dict(line.split(" ", 1) for line in capsys.readouterr().out.strip().splitlines())
    assert list(said) == ["compact", "original"] and said["compact"] != said["original"]
    assert BOX_FORMATS["llava"].parse(said["original"]) is not None
    exec((ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0], scope)  # the README's three lines
    answer = scope["out"][0, scope["inputs"]["input_ids"].shape[1] :]
    assert scope["processor"].decode(answer, skip_special_tokens=True)[: len(said["original"])] == said["original"]


def test_a_family_without_the_engine(tmp_path, monkeypatch):
    """Qwen3-VL by name of a folder, into rows that are scored."""
    qwen.build(tmp_path / "random-qwen3", "qwen3_vl")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda source, **where: qwen.Processor(source))
    model, data = models.load(tmp_path / "random-qwen3", device="cpu"), datasets.load("refstamps", "val", 1)
    grid = [*cells("none"), *cells("random", 0.25, ids=["original", "sequential"])]
    rows = evaluate(replace(model, max_new_tokens=4), data, grid, tmp_path / "rows.parquet", progress=False)
    assert len(rows) == 3 * len(data.rows) and set(rows["tokens_full"]) == {192}
    assert rows.groupby("ids", sort=False)["tokens"].first().tolist() == [192, 48, 48]
    assert rows.groupby("ids")["raw"].agg(tuple).nunique() == 3
    assert score(rows)["invalid"].all()  # weights are random
    assert score(perfect_answers(data.rows, model.frame, model.box_format))["iou"].min() > 0.9
    with pytest.raises(ValueError, match="offers no signal 'cls_attention'"):
        evaluate(model, data, cells("fastervlm", 0.5), tmp_path / "more.parquet", progress=False)


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("qwen3_vl", '```json\n[\n\t{"bbox_2d": [125, 250, 500, 1000], "label": "a [red] cat"}\n]\n```'),
        ("internvl", "the red cat[[125, 250, 500, 1000]]"),
    ],
)
def test_boxes_in_thousandths(dialect, text):
    kind, box = BOX_FORMATS[dialect], [0.125, 0.25, 0.5, 1]
    assert kind.parse(text).tolist() == kind.strict(text).tolist() == box
    assert kind.parse(kind.format(box)).tolist() == kind.strict(kind.format(box)).tolist() == box
    assert kind.parse(text.replace("1000", "1001")) is None and kind.parse("none") is None
