"""Pruning inside lmms-eval: its built-in models under `hf.pruned`, and referring expressions as tasks of its own.

    pip install -e '.[lmms]'
    python -m lmms_eval --model gap_llava_hf --batch_size 1 --include_path $(python -m analysis.lmms) \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,device_map=cuda,pruner=fastervlm,keep=0.25,ids=original \\
        --tasks gap_refcoco_val --output_path logs --log_samples

The models run all of lmms-eval's tasks that show images; what a table says of them is lmms-eval's. The tasks here
score as `rec.scoring` does, with the splits of `rec.datasets`: which question, which frame and which form of box are
right is a matter of the model, so they take a model of this module. With pruner=none it gives the built-in's answers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image

from analysis import hf
from analysis.engine.evaluate import cells, image_seed
from analysis.models.base import Model, pad_to_square
from analysis.models.llava import Llava
from analysis.models.llava_next import LlavaNext
from analysis.models.qwen2_5_vl import Qwen2_5VL
from analysis.rec import datasets, scoring
from analysis.rec.boxes import resized_to_tokens
from analysis.stats import rate_interval
from analysis.types import RecDataset

TASKS = Path(__file__).with_name("lmms_tasks")  # for --include_path
BUILT_IN = {
    "gap_llava_hf": "lmms_eval.models.chat.llava_hf.LlavaHf",
    "gap_qwen2_5_vl": "lmms_eval.models.chat.qwen2_5_vl.Qwen2_5_VL",
}


class Rec(NamedTuple):
    """How a model is asked for a box, and answers. question: "{}" in it for the expression; box_format, frame: names in
    `rec.boxes`; shown: what its processor is given of an image, so that nothing is cropped."""

    question: str
    box_format: str
    frame: str
    shown: Callable[[Image.Image], Image.Image]


def _question(family: type[Model]) -> str:
    return family.rec.replace(family.image, "").strip()


def _llava(config, processor) -> Rec:
    return Rec(_question(Llava), Llava.box_format, Llava.frame, partial(pad_to_square, fill=Llava.fill))


def _llava_next(config, processor) -> Rec:
    frame = getattr(config, "frame", LlavaNext.frame)
    return Rec(_question(LlavaNext), LlavaNext.box_format, frame, lambda image: image)


def _qwen2_5_vl(config, processor) -> Rec:
    images = processor.image_processor
    bounds = images.patch_size * images.merge_size, images.size["shortest_edge"], images.size["longest_edge"]

    def shown(image: Image.Image) -> Image.Image:
        """In its final size: lmms-eval would resize it twice, and the second size is not that of the frame."""
        return image.resize(resized_to_tokens(image.size, *bounds), Image.Resampling.BICUBIC)

    return Rec(_question(Qwen2_5VL), Qwen2_5VL.box_format, "resized_pixels:" + ",".join(map(str, bounds)), shown)


ASKED = {"llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen2_5_vl}  # by config.json's model_type
# Of the model that lmms-eval made last, None for another type: it runs one at a time, and tells its tasks of none.
_RUNNING: list[Rec | None] = []


def _rec() -> Rec:
    """Of the running model. Raises ValueError where it is none of this module or of a type that is not in `ASKED`."""
    for rec in filter(None, _RUNNING):
        return rec
    raise ValueError(
        "only the model knows how it is asked for a box and in which frame it answers: run this task with --model "
        f"{' or '.join(BUILT_IN)} and weights of type {', '.join(ASKED)}; pruner=none gives the built-in's answers"
    )


class _Pruning:
    """Over a built-in model of lmms-eval: what that generates, it generates inside `hf.pruned`.

    pruner, keep, ids, order, seed: as in `types.Cell`; the rest is the built-in's. In tasks that name an expression and
    an image, a method that reads words gets the expression, and each image has its own seed, both as in the engine;
    elsewhere these are the task's question and the seed as it is.
    """

    def __init__(self, pruner="fastervlm", keep=0.25, ids="original", order="method", seed=0, **built_in):
        (self.cell,) = cells(pruner, None if keep == "None" else keep, order, ids, seed)
        super().__init__(**built_in)
        self.reader = self.processor if hasattr(self, "processor") else self._image_processor
        hf.check_pruner(self.model, self.cell)
        asked = ASKED.get(self.model.config.model_type)
        _RUNNING[:] = [asked and asked(self.model.config, self.reader)]

    def generate_until(self, requests: list) -> list:
        """The built-in's. Raises SystemExit in the first call that fails or prunes no image, for lmms-eval would go on
        with an empty answer, which looks like a wrong one."""
        batch: list[tuple[str, Mapping]] = []  # question and document of what is generated next
        counts: list[tuple[int, int]] = []

        def noted(request):
            question, messages, *rest = request.args

            def note(document: Mapping, **more):
                batch.append((question, document))
                return messages(document, **more)

            return replace(request, arguments=(question, note, *rest))

        def generate(*args, **kwargs):
            done.words = dict(
                clip_text=[document.get("expression", question) for question, document in batch],
                clip_prompt=[question for question, _ in batch],
            )
            done.seeds = [
                image_seed(cell.seed, one["image_id"]) if "image_id" in one else cell.seed for _, one in batch
            ]
            batch.clear()
            before = done.fired
            try:
                made = pruned_generate(*args, **kwargs)
            except Exception as error:
                raise SystemExit(f"pruned generation failed: {type(error).__name__}: {error}") from error
            if done.fired == before:
                raise SystemExit("no image was pruned in this call: the task shows none, or not to this model")
            counts.extend(zip(done.kept, done.full, strict=True))
            return made

        cell = self.cell
        with hf.pruned(self.model, self.reader, cell.pruner, cell.keep, cell.ids, cell.order, cell.seed) as done:
            pruned_generate, self.model.generate = self.model.generate, generate
            answers = super().generate_until(list(map(noted, requests)))
        kept, full = (sum(column) / len(counts) for column in zip(*counts))
        print(f"{len(counts)} prompts: {kept:.1f} of {full:.1f} visual tokens kept on average", file=sys.stderr)
        return answers


def __getattr__(name: str) -> type:
    """The classes of `BUILT_IN`, made when lmms-eval asks for one: the built-ins take seconds to import."""
    if name not in BUILT_IN:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    module, _, built_in = BUILT_IN[name].rpartition(".")
    return type(name, (_Pruning, getattr(import_module(module), built_in)), dict(__module__=__name__))


def manifests() -> list:
    """What the entry point `lmms_eval.models` says: each name, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(name, chat_class_path=f"{__name__}.{name}") for name in BUILT_IN]


# -- what the YAML files of `TASKS` name


@cache
def _data(name: str, split: str) -> RecDataset:
    """`rec.datasets.load`; REC_ANNOTATIONS and REC_IMAGES in the environment are its two folders."""
    return datasets.load(
        name, split, annotations=os.environ.get("REC_ANNOTATIONS"), images=os.environ.get("REC_IMAGES")
    )


def documents(stub):
    """process_docs: one document for each expression of the split that the task names, such as "refcocoplus_val"."""
    name, _, split = str(stub.split).replace("plus", "+").rpartition("_")
    rows = _data(name, split).rows.assign(dataset=name, split=split)
    return stub.from_pandas(rows, preserve_index=False)


def visual(document: Mapping) -> list[Image.Image]:
    """doc_to_visual"""
    image = _data(document["dataset"], document["split"]).image(document["image_id"])
    return [_rec().shown(image.convert("RGB"))]


def question(document: Mapping) -> str:
    """doc_to_text"""
    return _rec().question.replace("{}", document["expression"])


def score(document: Mapping, results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """process_results: for each metric the score of one answer, strictly parsed, and its image, which clusters."""
    rec = _rec()
    answered = pd.DataFrame([dict(document, raw=results[0], dialect=rec.box_format, frame=rec.frame)])
    (scored,) = scoring.score(answered, parsing="strict").to_dict("records")
    image = document["image_id"]
    end = dict(correct=scored["correct"], image_id=image)  # without a "score" lmms-eval gives it no error of its own
    means = dict(acc="correct", iou="iou", invalid="invalid")
    made = {metric: dict(score=float(scored[column]), image_id=image) for metric, column in means.items()}
    return made | dict(acc_low=end, acc_high=end)


def mean(items: Sequence[Mapping]) -> float:
    """aggregation"""
    return sum(item["score"] for item in items) / len(items)


def _interval(items: Sequence[Mapping]) -> tuple[float, float]:
    answers = pd.DataFrame(items)
    return rate_interval(answers["correct"], answers["image_id"])


def low(items: Sequence[Mapping]) -> float:
    """aggregation: the lower end of the 95 % interval, images as clusters"""
    return _interval(items)[0]


def high(items: Sequence[Mapping]) -> float:
    """aggregation: the upper end"""
    return _interval(items)[1]


if __name__ == "__main__":
    print(TASKS)
