"""Qwen2.5-VL in the engine against transformers' own forward and `generate`, unpruned and under `pruned`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from analysis import models
from analysis.engine.decode import prefill, prompt_inputs
from analysis.engine.evaluate import cells, evaluate, image_seed
from analysis.hf import pruned
from analysis.rec import datasets
from analysis.rec.boxes import BOX_FORMATS, frame, resized_to_tokens
from analysis.rec.scoring import perfect_answers, score
from analysis.training.processor import CHATML
from tests.support import qwen
from tests.support.checkpoint import noise

RULES = ["original", "compact", "sequential", "prefix", "regrid", "stretched", "shuffled_rows", "original+cache"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random-qwen"
    qwen.build(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return replace(models.load(folder, device="cpu"), max_new_tokens=12)


@pytest.fixture(scope="module")
def whole(folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


def test_the_unpruned_forward_is_transformers_own(model, whole, folder):
    for size in ((192, 144), (100, 170), (30, 20)):
        image, visual = noise(*size), model.encode([noise(*size)])
        inputs = qwen.prepared(folder, [image], [model.prompt_text("the red cat")])
        with torch.no_grad():
            expected = whole(**inputs).logits[0, -1]
        prefix, suffix = model.prompt("the red cat")
        read = [*prefix.tolist(), *[model.image_token] * visual.length, *suffix.tolist()]
        assert read == inputs["input_ids"][0].tolist()
        read = prompt_inputs(model.embed, (prefix, suffix), visual.features[0], visual.unpruned)
        (found,), *_ = prefill(model, [read.whole])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(visual.connect(visual.signals.patches), visual.features, atol=1e-5, rtol=1e-5)


def test_the_chat_template_is_the_engines_prompt(model):
    text = model.rec.removeprefix(model.image).format("the red cat")
    chat = [dict(role="user", content=[dict(type="image"), dict(type="text", text=text)])]
    options = dict(chat_template=CHATML, tokenize=False, add_generation_prompt=True)
    assert model.tokenizer.apply_chat_template(chat, **options) == model.prompt_text("the red cat")


def test_a_batch_of_one_layout(model):
    both = model.encode([noise(97, 71, 0), noise(92, 75, 1)])
    for i, image in enumerate((noise(97, 71, 0), noise(92, 75, 1))):
        alone = model.encode([image])
        torch.testing.assert_close(both.features[i], alone.features[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="several layouts"):
        model.encode([noise(97, 71), noise(40, 71)])
    with pytest.raises(ValueError, match="too thin"):
        model.layout((4000, 10))


def test_every_answer_of_the_engine_is_generates_own(model, whole, folder, tmp_path):
    data = datasets.load("refstamps", "val", 3)
    data = replace(data, rows=data.rows.groupby("image_id").head(4).reset_index(drop=True))
    grid = [*cells("none"), *cells("random", 0.25, ids=RULES), *cells("divprune", 0.5, order=["method", "shuffled"])]
    rows = evaluate(model, data, grid, tmp_path / "rows.parquet", progress=False)
    images = [data.image(image_id) for image_id in data.rows["image_id"]]
    texts = [model.prompt_text(expression) for expression in data.rows["expression"]]
    inputs = qwen.prepared(folder, images, texts)
    assert len({image.size for image in images}) > 1
    found = []
    for cell in grid:
        seeds = [image_seed(cell.seed, image_id) for image_id in data.rows["image_id"]]
        with pruned(whole, None, cell.pruner, cell.keep, cell.ids, cell.order, seeds):
            out = whole.generate(**inputs, max_new_tokens=model.max_new_tokens, do_sample=False)
        found += [model.text(answer) for answer in out[:, inputs["input_ids"].shape[1] :].tolist()]
    assert rows["raw"].tolist() == found
    told = rows.groupby(["ids", "pruner", "order"])["raw"].agg(tuple)
    assert told.nunique() >= len(grid) - 1  # compact is original where no row or column of tokens is left empty


def test_methods_that_need_cls_or_words_say_so(model, tmp_path):
    data = datasets.load("refstamps", "val", 1)
    for method, signal in (("fastervlm", "cls_attention"), ("trim", "clip_prompt")):
        with pytest.raises(ValueError, match=f"offers no signal '{signal}'; it offers: patches"):
            evaluate(model, data, cells(method, 0.5), tmp_path / "rows.parquet", progress=False)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(12, 576, 30000), (28, 3136, 1003520)]))
def test_the_resized_image_is_transformers_own(width, height, bounds):
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="too thin"):
            resized_to_tokens((width, height), *bounds)
    else:
        assert resized_to_tokens((width, height), *bounds)[::-1] == smart_resize(height, width, *bounds)


def test_boxes_are_pixels_of_the_resized_image(model):
    assert frame(model.frame).encode([10, 20, 100, 143], [200, 143]).tolist() == pytest.approx(
        [10 * 204 / 200, 20 * 144 / 143, 100 * 204 / 200, 144]
    )
    data = datasets.load("refstamps", "val", 5)
    scored = score(perfect_answers(data.rows, model.frame, model.box_format))
    assert scored["iou"].min() > 0.8  # whole pixels of small images
    assert score(scored.assign(frame="resized"))["iou"].max() == 0
    for wrong in ("resized_pixels", "resized_pixels:28", "resized_pixels:0,1,2"):
        with pytest.raises(ValueError, match="resized_pixels"):
            frame(wrong)


def test_answers_in_json():
    parse, write = BOX_FORMATS["qwen2_5_vl"].parse, BOX_FORMATS["qwen2_5_vl"].format
    assert write([11.6, 0, 300, 99.2]) == '{"bbox_2d": [12, 0, 300, 99]}'
    official = '```json\n[\n\t{"bbox_2d": [341, 82, 620, 374], "label": "the [red] cat"}\n]\n```'
    np.testing.assert_array_equal(parse(official), [341, 82, 620, 374])
    np.testing.assert_array_equal(parse('{"bbox_2d" :[ 1,2 , 3.5,4]'), [1, 2, 3.5, 4])
    strict = BOX_FORMATS["qwen2_5_vl"].strict
    np.testing.assert_array_equal(strict(official), [341, 82, 620, 374])
    np.testing.assert_array_equal(strict(write([1, 2, 3, 4])), [1, 2, 3, 4])
    for broken in (official[:-10], "", "[]", "[" * 10**5, '{"bbox_2d": [1, NaN, 2, 3]}', '{"bbox_2d": ["a", 1, 2, 3]}'):
        assert strict(broken) is None
    assert parse("[1, 2, 3, 4]") is None
    for invalid in ("[1, 2, 3]", "[5, 2, 3, 4]", "[-5, 2, 3, 4]"):
        assert parse(f'{{"bbox_2d": {invalid}}}') is None
