"""Any model that `hf.pruned` can prune, evaluated by transformers' own `generate`: slowly, but at once.

A family's file says how to ask and how boxes are answered; `evaluate` then gives the same rows as for the families of
the engine, some ten times slower: every expression encodes its image and reads its whole prompt anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel

from analysis import hf  # not its names, for it begins by importing this package
from analysis.types import Cell

OPTIONS = dict(attn_implementation="sdpa")  # of `from_pretrained`: no kernel of the engine's


@dataclass(frozen=True, kw_only=True)
class ByGenerate:
    """A whole model with its processor.

    name, revision: which weights; rec, ask_for: message for the box of a referring expression, and for any question,
    "{}" in them for its words; box_format, frame: names in `rec.boxes`; max_new_tokens: enough for a box;
    files, clip_files: see `base.Model`.
    """

    name: str
    revision: str
    whole: PreTrainedModel
    processor: Any
    rec: str
    box_format: str
    frame: str
    ask_for: str = "{}"
    max_new_tokens: int = 64
    files: Mapping[str, str] = field(default_factory=dict)
    clip_files: Mapping[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.whole.device

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def layout(self, size: tuple[int, int]) -> None:
        """See `base.Model.layout`; what an image must be, the processor says itself."""

    def check(self, cell: Cell) -> None:
        """Raises ValueError where the cell's method cannot run on this model."""
        hf.check_pruner(self.whole, cell)

    def _chat(self, message: str, picture: Image.Image | None) -> list[dict]:
        image = dict(type="image") | (dict(image=picture) if picture else {})
        return [dict(role="user", content=[image, dict(type="text", text=message)])]

    def prompt_text(self, expression: str) -> str:
        """The whole prompt for the box of an expression in words."""
        return self.processor.apply_chat_template(
            self._chat(self.rec.replace("{}", expression), None), add_generation_prompt=True
        )

    def answer(
        self, images: Sequence[Image.Image], expressions: Sequence[str], message: str, cell: Cell, seeds: Sequence[int]
    ) -> tuple[list[str], hf.Pruned]:
        """The texts that answer a batch, and how it was pruned. message: `rec` or `ask_for`; the rest has length B."""
        questions = [message.replace("{}", words) for words in expressions]
        inputs = self.processor.apply_chat_template(
            [self._chat(question, image) for question, image in zip(questions, images, strict=True)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=dict(padding=True, padding_side="left"),
        ).to(self.device, self.dtype)
        given = cell.pruner, cell.keep, cell.ids, cell.order, seeds, expressions, questions
        with hf.pruned(self.whole, self.processor, *given) as done:
            made = self.whole.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        answers = made[:, inputs["input_ids"].shape[1] :]
        said = self.processor.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in said], done


def assemble(whole: PreTrainedModel, source: str, name: str, revision: str, device: str, **family) -> ByGenerate:
    """See `base.parts` for the first arguments; family: the other fields. OSError where the processor's files are
    missing."""
    whole = whole.to(device).eval().requires_grad_(False)
    processor = AutoProcessor.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    return ByGenerate(name=name, revision=revision, whole=whole, processor=processor, **family)
