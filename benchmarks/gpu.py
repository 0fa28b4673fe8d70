"""What the engine does on a GPU, in one bounded run that reaches no network:

    python benchmarks/gpu.py [--out FOLDER] [--seconds N] [--train COMMAND]    # make gpu
    python benchmarks/gpu.py --table [benchmarks/gpu.csv]                      # README's table of such a run

Steps, the most telling first; each has a bound of its own, and what a step has measured is in FOLDER/gpu.csv at once,
so that a run that is cut off still counts. A step that fails says so in one line, and the next one begins.

  ceilings  one large matrix product and one large copy: what "share of" means below
  build     LLaVA-1.5-7B with random weights, made on the GPU from its configuration (no weights are downloaded)
  prefill   GAP against compact IDs, time and memory; a pruned prefill against what its FLOPs promise
  engine    six methods x {compact, GAP} and the unpruned model, seven expressions an image: the engine against a loop
            of `generate` for one expression at a time, and against `generate` in batches
  kernels   which attention kernels run under our masks, where the time goes, and how busy the GPU is
  decode    time of a decoding step, and its share of the memory's bandwidth
  rows      tiny-llava's answers on this device in float32, bfloat16 and float16 against the CPU's in float32
  tests     pytest -m gpu, at the same time as `rows`
  flash     the flash kernels under IDs that have gaps: right, wrong or refused
  fastv     pruning inside the decoder against pruning before it, at as many tokens a layer on average
  qwen      the same prefills, and the engine alone, for Qwen2.5-VL-7B with random weights and 576 tokens
  train     the command given with --train, for what is left of the time

Random weights end no answer, so all say equally many tokens: as many as a box takes. For drafts to come true, as those
of a trained model do, a box is written over the result of the head's product ("drafts"); without that, nothing is tried
ahead ("no drafts"). Without a GPU, or with --tiny, every step runs with toy sizes: that is what the tests do, and its
times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STARTED = time.monotonic()  # imports count: on a borrowed machine they take a while
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a borrowed machine has the checkout, but nothing installed from it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from analysis import models
from analysis.engine.cost import cost_rows, ratio, whole_prompts
from analysis.engine.decode import prefill
from analysis.engine.evaluate import cells, evaluate, image_seed
from analysis.engine.stages import layer_mean
from analysis.models import clip
from analysis.models.base import ATTENTION
from analysis.pruning import pruner
from analysis.pruning.images import prune_images
from analysis.rec import datasets
from analysis.rec.boxes import BOX_FORMATS
from analysis.rec.scoring import score
from analysis.registry import matching
from analysis.stats import paired_difference
from analysis.types import Cell

METHODS = ["random", "spatial", "cls_similarity", "text_similarity", "prumerge", "trim"]
GRID = [*cells("none"), *cells(METHODS, [0.25], ids=["compact", "original"])]
FULL, COMPACT, GAP = [*cells("none"), *cells("random", 0.25, ids=["compact", "original"])]
UNMEASURED = "not measured on a GPU"
COLUMNS = ["step", "name", "value", "low", "high", "n", "unit", "goal", "met", "model", "device", "dtype", "note"]

# name of a row -> the goal in words, and whether a value reaches it
GOALS: dict[str, tuple[str, Callable[[float], bool]]] = {
    **{f"loop_over_{kind}": (">= 20", lambda x: x >= 20) for kind in ("engine", "engine_drafts")},
    **{
        f"batch{size}_over_{kind}": (">= 6", lambda x: x >= 6)
        for size in (8, 32)
        for kind in ("engine", "engine_drafts")
    },
    **{
        prefix + name: (goal, reached)
        for prefix in ("", "qwen_")
        for name, goal, reached in (
            ("gap_time", "1.00 +- 0.01", lambda x: abs(x - 1) <= 0.01),
            ("gap_memory", "1.00 +- 0.01", lambda x: abs(x - 1) <= 0.01),
            ("speedup_share", ">= 0.85", lambda x: x >= 0.85),
        )
    },
    "tests_failed": ("0", lambda x: x == 0),
}

# README's table: what a line says, the rows it takes its numbers from, and their format
KINDS = ["float32", "bfloat16", "float16"]
TABLE: list[tuple[str, list[str], str]] = [
    ("a loop of `generate` / engine: no drafts, drafts", ["loop_over_engine", "loop_over_engine_drafts"], "x"),
    ("`generate` in batches of 8 / engine", ["batch8_over_engine", "batch8_over_engine_drafts"], "x"),
    ("`generate` in batches of 32 / engine", ["batch32_over_engine", "batch32_over_engine_drafts"], "x"),
    ("GAP / compact, time of the prefill", ["gap_time"], ".3f"),
    ("GAP / compact, peak memory of the prefill", ["gap_memory"], ".3f"),
    ("prefill, a quarter of the tokens: speed-up / what FLOPs promise", ["speedup_share"], ".2f"),
    ("prefill, share of a large matrix product's speed: all, a quarter", ["roofline", "roofline_pruned"], ".2f"),
    ("decoding, share of the memory's bandwidth: engine, loop", ["bandwidth_engine", "bandwidth_loop"], ".2f"),
    ("decoding step in ms: engine, loop", ["step_engine", "step_loop"], ".1f"),
    ("tokens/s of the engine: no drafts, drafts", ["tokens_per_s_engine", "tokens_per_s_engine_drafts"], ".0f"),
    ("peak memory of the engine in GB", ["peak_gb_engine"], ".1f"),
    ("Qwen2.5-VL-7B: GAP / compact, time of the prefill", ["qwen_gap_time"], ".3f"),
    ("Qwen2.5-VL-7B: speed-up / what FLOPs promise", ["qwen_speedup_share"], ".2f"),
    ("FastV / pruning as much before the decoder, time", ["fastv_time"], ".2f"),
    ("tiny-llava, answers equal to the CPU's: fp32, bf16, fp16", [f"equal_{kind}" for kind in KINDS], ".3f"),
    ("tiny-llava, accuracy - the CPU's: fp32, bf16, fp16", [f"accuracy_{kind}" for kind in KINDS], "+.3f"),
    ("`pytest -m gpu`: passed, failed", ["tests_passed", "tests_failed"], ".0f"),
]


class Late(BaseException):
    """A step's time is over. No Exception, so that nothing on the way takes it for a failure and goes on."""


class Report:
    """Rows as they come: each is in the file, and on the screen, as soon as it is added."""

    def __init__(self, path: Path, device: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="", encoding="utf-8")
        self.rows, self.step, self.judges = [], "", True
        self.about = dict(device=device, model="", dtype="")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()
        self.file.flush()

    def add(self, name: str, value: float | None = None, unit: str = "", note: str = "", **numbers: Any) -> None:
        """numbers: low, high, n and what of model, device and dtype differs from `about`."""
        goal, reached = GOALS.get(name, ("", None))
        met = "" if reached is None or value is None or not self.judges else "yes" if reached(value) else "no"
        row = dict(step=self.step, name=name, value=value, unit=unit, goal=goal, met=met, note=" ".join(note.split()))
        row |= self.about | numbers
        self.rows.append(row)
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()
        shown = "" if value is None else f" {value:.5g}"
        if row.get("low") is not None:
            shown += f" [{row['low']:.5g}, {row['high']:.5g}]"
        judged = f" (goal {goal}: {'met' if met == 'yes' else 'MISSED'})" if met else ""
        print(f"  {name}{shown} {unit}{judged}{' - ' + row['note'][:300] if note else ''}", flush=True)


class Timeouts:
    """Runs steps one after another, each for so many seconds at most, all of them until `end`."""

    def __init__(self, end: float, report: Report):
        self.end, self.report, self.armed = end, report, False  # end: on the clock of `time.monotonic`
        self.usual = signal.signal(signal.SIGALRM, self._ring)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def _ring(self, *_: Any) -> None:
        if self.armed:
            raise Late

    def run(self, name: str, step: Callable[[], object], bound: float, least: float) -> bool:
        """Whether the step ran to its end. least: seconds without which it is not even begun."""
        self.report.step, bound = name, min(bound, self.left)
        if bound < least:
            print(f"{name}: left out, {max(self.left, 0):.0f} s are left and it takes {least:.0f}", flush=True)
            self.report.add("skipped", note=f"{max(self.left, 0):.0f} s were left")
            return False
        print(f"{name}: at most {bound:.0f} s", flush=True)
        begun, failed = time.monotonic(), ""
        try:
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, bound, 2)  # and again, should something swallow the first
            step()
            self.armed = False
        except Late:
            self.armed, failed = False, f"cut off after {bound:.0f} s"
        except Exception as error:
            self.armed, failed = False, traceback.format_exception_only(error)[-1].strip()
            where = traceback.extract_tb(error.__traceback__)[-3:]
            failed += f" ({' < '.join(f'{Path(f.filename).name}:{f.lineno}' for f in reversed(where))})"
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        if failed:
            self.report.add("failed", note=failed)
        self.report.add("seconds", time.monotonic() - begun, "s")
        gc.collect()
        with suppress(RuntimeError):  # where the GPU is beyond saving, the other steps say so, too
            torch.cuda.is_available() and torch.cuda.empty_cache()
        return not failed


def now(device: str) -> float:
    """Seconds; waits for what the GPU has been given to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(device: str, run: Callable[[], object]) -> float:
    begun = now(device)
    run()
    return now(device) - begun


def spread(values: Sequence[float]) -> dict[str, float]:
    middle, low, high = np.quantile(values, [0.5, 0.25, 0.75]).tolist()
    return dict(value=middle, low=low, high=high, n=len(values))


# ---- the models and what they are asked


# Sizes of the run on a GPU, and of the toy run
REAL = dict(
    vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336),
    text=dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    words=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    vocabulary=32064,
    product=8192,
    copied=2**31,
    image=(640, 480),
    qwen_image=(672, 672),  # of which Qwen2.5-VL makes 24 x 24 tokens
    images=32,
    expressions=7,
    batch=8,
    turns=15,
    sizes=(8, 32),
    tiny_images=60,
)
TOY = dict(
    vision=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56),
    text=dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2),
    words=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
    vocabulary=600,
    product=256,
    copied=2**20,
    image=(64, 48),
    qwen_image=(112, 112),
    images=2,
    expressions=3,
    batch=2,
    turns=2,
    sizes=(8, 32),
    tiny_images=2,
)
BOX = (0.12, 0.34, 0.56, 0.78)
LIKELY = 38  # tokens after the image, which with 35 before it make up `cost.TEXT`


def tokenizer(size: int, rec: str, marks: Sequence[str] = ("<image>",)) -> PreTrainedTokenizerFast:
    """`size` words, those of the question among them; digits one by one, and the space before a number, as Llama."""
    first = ["<unk>", "<s>", "</s>", "<pad>", *marks, *"0123456789[].,:{}<>", " ", *re.findall(r"\w+", rec)]
    words = list(dict.fromkeys(first + [f"w{i}" for i in range(size)]))[:size]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|[A-Za-z_]\w*|[^\w\s]| (?=\d)"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(marks),
    )


def random_llava(size: dict, device: str, dtype: torch.dtype, folder: Path) -> models.Model:
    """LLaVA-1.5-7B (or a toy) with normal weights, and the CLIP whose words its tower compares with.

    Its prompts have 35 tokens before the image and some 38 after it; an answer is as long as a box.
    """
    family = models.FAMILIES["llava"]
    rec = family.Llava.rec
    words = tokenizer(size["vocabulary"], rec)
    words.save_pretrained(folder)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(patch_size=14, **size["vision"]),
        text_config=LlamaConfig(vocab_size=size["vocabulary"], max_position_embeddings=4096, **size["text"]),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    text = dict(vocab_size=size["vocabulary"], bos_token_id=1, eos_token_id=2, pad_token_id=3, **size["words"])
    beside = CLIPConfig(
        vision_config=dict(size["vision"], patch_size=14, num_hidden_layers=1),  # only its projection is used
        text_config=text,
        projection_dim=size["words"]["hidden_size"],
    )
    with torch.device(device):
        whole = LlavaForConditionalGeneration._from_config(config, attn_implementation=ATTENTION, dtype=dtype)
        joint = CLIPModel._from_config(beside, dtype=dtype).eval().requires_grad_(False)
    with torch.no_grad():  # whatever the library's own initialisation is
        for weight in whole.model.language_model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02)
        whole.lm_head.weight.normal_(0, 0.02)
    model = family.assemble(whole, source=str(folder), name="random LLaVA-1.5-7B", revision="random", device=device)
    asked = len(words(rec.replace("<image>", "").format("")).input_ids)
    chat = " ".join(["w0"] * 34) + " {} " + " ".join(["w0"] * (LIKELY - asked - 6))  # an expression has some six
    box = words(BOX_FORMATS[model.box_format].format(BOX), add_special_tokens=False).input_ids
    joint = clip.Clip(joint, words)
    return replace(model, chat=chat, eos=-1, max_new_tokens=len(box), clip=cache(lambda: joint))


class Scripted(nn.Module):
    """A head whose result says a given answer, as if the model had learned it: the product is made and written over."""

    def __init__(self, head: nn.Module, script: Sequence[int]):
        super().__init__()
        self.head, self.script, self.place = head, list(script), 0

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        if hidden.dim() == 2:  # the prefill asks for one place of each sequence
            self.place = 0
        places = logits if hidden.dim() == 3 else logits[:, None]
        for query in range(places.shape[1]):
            places[:, query, self.script[min(self.place + query, len(self.script) - 1)]] = 1e4
        self.place += places.shape[1]
        return logits


def scripted(model: models.Model) -> models.Model:
    box = BOX_FORMATS[model.box_format].format(BOX)
    return replace(model, head=Scripted(model.head, model.tokenizer(box, add_special_tokens=False).input_ids))


def scenes(model: models.Model, size: dict, images: int, boxes: bool, pixels: tuple[int, int] | None = None) -> Any:
    """`images` noisy pictures with `expressions` each, of three to nine words. boxes: False makes questions of them,
    with the same words, for which the engine tries nothing ahead."""
    width, height = pixels or size["image"]
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(min(images, 8))]
    question, rows = model.rec.replace(model.image, "").strip(), []
    for image in range(images):
        for sentence in range(size["expressions"]):
            words = " ".join(f"w{i}" for i in rng.integers(1, 300, rng.integers(3, 10)))
            row = dict(image_id=image, ref_id=sentence, sent_id=sentence, width=width, height=height)
            if boxes:
                row |= dict(expression=words, x1=10.0, y1=10.0, x2=40.0, y2=30.0)
            else:
                row |= dict(expression=question.format(words), task="box", answer="none")
            rows.append(row)
    return SimpleNamespace(name="noise", split="val", rows=pd.DataFrame(rows), image=lambda i: noise[i % len(noise)])


def run_engine(model: models.Model, data: Any, grid: Sequence[Cell], batch: int) -> pd.DataFrame:
    """The rows of `evaluate`, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.parquet"
        return evaluate(model, data, grid, out, batch_size=batch, chunk=64, progress=False)


@contextmanager
def library_attention(model: models.Model) -> Iterator[LlamaForCausalLM]:
    """The decoder and head as transformers' own model, with its "sdpa" attention; back to ours afterwards.

    Made without memory of its own, and around the engine's own layers.
    """
    config = model.decoder.config
    with torch.device("meta"):
        whole = LlamaForCausalLM(config)
    whole.model, whole.lm_head = model.decoder, model.head
    whole.generation_config = GenerationConfig(
        max_new_tokens=model.max_new_tokens, do_sample=False, eos_token_id=None, pad_token_id=3
    )
    usual = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield whole.eval()
    finally:
        config._attn_implementation = usual


@torch.inference_mode()
def by_generate(model: models.Model, whole: LlamaForCausalLM, data: Any, rows: pd.DataFrame, cell: Cell) -> list[str]:
    """What one writes without an engine: encode the rows' images, prune, pad on the left, and `generate`."""
    index = torch.arange(len(rows), device=model.device)
    encoded = model.encode([data.image(i) for i in rows["image_id"]])
    visual = encoded.take(index, **model.texts(list(rows["expression"])))
    chosen = prune_images(pruner(cell.pruner), visual, cell.keep, [image_seed(cell.seed, i) for i in rows["image_id"]])
    prompts = [model.ask(expression) for expression in rows["expression"]]
    embeds, places, _ = zip(*whole_prompts(model, chosen, visual.unpruned, prompts, cell))
    seen = [torch.ones_like(ids) for ids in places]
    states, ids, mask = (pad_sequence(list(x), batch_first=True, padding_side="left") for x in (embeds, places, seen))
    made = whole.generate(inputs_embeds=states, position_ids=ids, attention_mask=mask)
    if made.shape[1] != model.max_new_tokens:
        raise RuntimeError(f"generate said {made.shape[1]} tokens instead of {model.max_new_tokens}")
    return [model.text(row) for row in made.tolist()]


# ---- the steps


class Bench:
    def __init__(self, report: Report, timeouts: Timeouts, out: Path, device: str, tiny: bool):
        self.report, self.timeouts, self.out, self.device = report, timeouts, out, device
        self.tiny, self.size = tiny, TOY if tiny else REAL
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-"))
        self.product = self.copy = None  # FLOP/s and bytes/s that this device reaches
        self.model: models.Model | None = None
        self.seconds: dict[str, float] = {}  # of one expression in one cell, by who did it
        self.cpu: subprocess.Popen | None = None  # works on the CPU's rows from the beginning
        self.suite: subprocess.Popen | None = None

    def close(self) -> None:
        for child in (self.cpu, self.suite):
            if child is not None:
                stop(child)
        shutil.rmtree(self.folder, ignore_errors=True)

    def ceilings(self) -> None:
        side, device = self.size["product"], self.device
        self.report.about |= dict(dtype=str(self.dtype)[6:])
        a, b = (torch.randn(side, side, device=device, dtype=self.dtype) for _ in range(2))
        for _ in range(3):
            a @ b
        repeats = 3 if self.tiny else 20

        def products() -> None:
            for _ in range(repeats):
                a @ b

        self.product = repeats * 2 * side**3 / min(timed(device, products) for _ in range(3))
        self.report.add("product", self.product / 1e12, "TFLOP/s", f"of one matrix product of {side} x {side}")
        source = torch.empty(self.size["copied"], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        target.copy_(source)
        best = min(timed(device, lambda: target.copy_(source)) for _ in range(5))
        self.copy = 2 * source.numel() / best
        self.report.add("copy", self.copy / 1e9, "GB/s", "read and written, of one copy on the device")

    def build(self) -> None:
        begun = now(self.device)
        self.model = random_llava(self.size, self.device, self.dtype, self.folder / "llava")
        if self.tiny:
            self.model = replace(self.model, name="random toy LLaVA")
        model = self.model
        self.report.about |= dict(model=model.name, dtype=str(model.dtype)[6:])
        self.report.add("build", now(self.device) - begun, "s", "random weights from the configuration")
        prompts = [model.prompt("w1 w2 w3 w4 w5 w6"), model.ask("w1")]
        said = f"{len(prompts[0][0])} tokens before the image, {len(prompts[0][1])} after it with six words"
        self.report.add("tokens", float(model.grid[0] * model.grid[1]), "visual tokens", said)

    def _model(self) -> models.Model:
        if self.model is None:
            raise RuntimeError("there is no model: `build` has failed")
        return self.model

    def prefill(self) -> None:
        self._prefill(self._model(), "", self.size)

    def _prefill(self, model: models.Model, prefix: str, size: dict) -> None:
        side = getattr(model.tower.config, "image_size", None)
        pixels = (side, side) if side else size["qwen_image"]
        data = scenes(model, size | dict(expressions=1), size["batch"], True, pixels)
        run_engine(model, scenes(model, size, 1, False), [FULL, GAP], 8)  # warms up
        found = []
        for turns in (2, size["turns"]) if size["turns"] > 2 else (2,):  # a few at once, in case the time is cut short
            found = cost_rows(model, data, [FULL, COMPACT, GAP], size["batch"], turns, progress=False)
            self._ratios(model, found, prefix)

    def _ratios(self, model: models.Model, found: pd.DataFrame, prefix: str) -> None:
        def compared(cell: Cell, other: Cell, column: str) -> dict[str, float]:
            numbers = ratio(found, cell, other, column)
            return dict(
                value=float(numbers["ratio"]), **{k: float(numbers[k]) for k in ("low", "high")}, n=numbers["n"]
            )

        add = self.report.add
        add(f"{prefix}gap_time", unit="GAP / compact, prefill", **compared(GAP, COMPACT, "prefill_s"))
        add(f"{prefix}gap_memory", unit="GAP / compact, peak memory", **compared(GAP, COMPACT, "peak_bytes"))
        speed, promised = compared(FULL, COMPACT, "prefill_s"), compared(FULL, COMPACT, "flops")["value"]
        add(f"{prefix}speedup", unit="full / a quarter of the tokens, prefill", **speed)
        share = {k: v / promised if k != "n" else v for k, v in speed.items()}
        add(f"{prefix}speedup_share", unit=f"of the {promised:.2f} that FLOPs promise", **share)
        for name, cell in ((f"{prefix}roofline", FULL), (f"{prefix}roofline_pruned", COMPACT)):
            rows = matching(found, cell.columns())
            if self.product:
                rates = rows["flops"] * rows["images"] / rows["prefill_s"] / self.product
                add(name, unit=f"of {self.product / 1e12:.0f} TFLOP/s", **spread(rates.to_numpy()))
        prefills = matching(found, FULL.columns())
        for column in ("encode_s", "prefill_s"):
            add(prefix + column, unit=f"s, {int(prefills['images'].iloc[0])} images", **spread(prefills[column]))
        add(f"{prefix}prefill_peak_gb", float(prefills["peak_bytes"].max() / 1e9), "GB beyond the weights")

    def engine(self) -> None:
        """Per expression and cell: the engine first, then what it is compared with, for as long as the time allows."""
        model, size = self._model(), self.size
        images, tokens = size["images"], model.max_new_tokens
        trial = scenes(model, size, images, False)
        run = partial(run_engine, model, trial, [GAP], len(trial.rows))
        seconds = min(timed(self.device, run) for _ in range(1 if self.tiny else 2))  # the first warms up
        while images > 4 and seconds * len(GRID) > 45:  # an all too slow machine: fewer images
            images, seconds = images // 2, seconds / 2
        batch = images * size["expressions"]
        questions, boxes = (scenes(model, size, images, kind) for kind in (False, True))
        found = self._engine(model, questions, batch, "engine", f"no drafts, {tokens} tokens an answer")
        first = questions.rows[: max(size["sizes"])]
        with library_attention(model) as whole:
            one = first[:1]
            by_generate(model, whole, questions, one, FULL)  # warms up
            said = self._generate(model, whole, questions, one, GRID, "loop")
        self._same(found, said, questions)
        with library_attention(model) as whole:
            few = [cell for cell in GRID if (cell.pruner, cell.ids) in SAMPLE] if not self.tiny else GRID
            for many in size["sizes"]:
                said |= self._generate(model, whole, questions, first[:many], few, f"batch{many}")
        found = self._engine(scripted(model), boxes, batch, "engine_drafts", f"drafts, {tokens} tokens an answer")
        box = "".join(BOX_FORMATS[model.box_format].format(BOX).split())
        right = found["raw"].str.replace(" ", "") == box
        self.report.add("drafts_said", float(right.mean()), "of the answers are the box that was written over them")
        with library_attention(model) as whole:
            self._generate(model, whole, questions, questions.rows[1:2], GRID, "loop", again=True)

    def _engine(self, model: models.Model, data: Any, batch: int, name: str, note: str) -> pd.DataFrame:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rows: list[pd.DataFrame] = []
        seconds = timed(self.device, lambda: rows.append(run_engine(model, data, GRID, batch)))
        found = rows[0]
        self.seconds[name] = seconds / len(found)
        add = self.report.add
        add(f"s_{name}", self.seconds[name], "s an expression and cell", f"{len(found)} answers, batch {batch}, {note}")
        add(
            f"tokens_per_s_{name}",
            model.max_new_tokens * len(found) / seconds,
            "tokens/s",
            "prefill and encoding included",
        )
        if self.device == "cuda":
            add(f"peak_gb_{name}", torch.cuda.max_memory_allocated() / 1e9, "GB, weights included")
        if errors := set(found["error"]) - {""}:
            add(f"errors_{name}", float((found["error"] != "").sum()), "answers", str(sorted(errors)[:2]))
        self._compare()
        return found

    def _generate(
        self,
        model: models.Model,
        whole: LlamaForCausalLM,
        data: Any,
        rows: pd.DataFrame,
        grid: Sequence[Cell],
        name: str,
        again: bool = False,
    ) -> dict[tuple[Cell, Any, Any], str]:
        """Answers by cell, image and expression; the time of the pruned cells stands for those not among `grid`."""
        said, times = {}, {}
        rows = rows.reset_index(drop=True)
        for cell in grid:
            made: list[str] = []
            times[cell] = timed(self.device, lambda cell=cell: made.extend(by_generate(model, whole, data, rows, cell)))
            said |= {(cell, *key): text for key, text in zip(zip(rows["image_id"], rows["ref_id"]), made)}
        pruned = [seconds for cell, seconds in times.items() if cell.pruner != "none"]
        mean = (times[FULL] + (len(GRID) - 1) * sum(pruned) / len(pruned)) / len(GRID) / len(rows)
        if again:
            mean = (mean + self.seconds[name]) / 2
        self.seconds[name] = mean
        self.report.add(
            f"s_{name}",
            mean,
            "s an expression and cell",
            f"{len(rows)} expression(s) in {len(grid)} of {len(GRID)} cells{', mean of two turns' if again else ''}",
            low=min(times.values()) / len(rows),
            high=max(times.values()) / len(rows),
            n=len(times),
        )
        self._compare()
        return said

    def _compare(self) -> None:
        for slow in ("loop", *(f"batch{many}" for many in self.size["sizes"])):
            for fast in ("engine", "engine_drafts"):
                if slow in self.seconds and fast in self.seconds:
                    self.report.add(f"{slow}_over_{fast}", self.seconds[slow] / self.seconds[fast], "times")

    def _same(self, found: pd.DataFrame, said: dict, data: Any) -> None:
        """How many answers of engine and loop are equal: all in float32; in 16 bits random weights make near ties."""
        place = {key: i for i, key in enumerate(zip(data.rows["image_id"], data.rows["ref_id"]))}
        pairs = [
            (matching(found, cell.columns())["raw"].iloc[place[image, which]].split(), text.split())
            for (cell, image, which), text in said.items()
        ]
        self.report.add("same", float(np.mean([a == b for a, b in pairs])), "of the loop's answers", n=len(pairs))
        first = [a[:1] == b[:1] for a, b in pairs]
        self.report.add("same_first", float(np.mean(first)), "of the answers' first words", n=len(pairs))

    def decode(self) -> None:
        """A decoding step's time: an answer's beyond its first two. Its bytes: the weights and all that is cached."""
        model, size, device = self._model(), self.size, self.device
        config, more = model.decoder.config, model.max_new_tokens - 2
        short = replace(model, max_new_tokens=2)
        matrices = sum(p.numel() for p in [*model.decoder.layers.parameters(), *model.head.parameters()])
        weights = matrices * model.dtype.itemsize
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        a_token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
        kept = int(0.25 * model.grid[0] * model.grid[1])

        def add(name: str, seconds: list[float], cached: float, note: str) -> None:
            numbers = spread([s / more * 1e3 for s in seconds])
            self.report.add(f"step_{name}", unit="ms a decoding step", note=note, **numbers)
            if self.copy:
                rates = [(weights + cached * a_token) / (s / more) / self.copy for s in seconds]
                self.report.add(f"bandwidth_{name}", unit=f"of {self.copy / 1e9:.0f} GB/s", note=note, **spread(rates))

        def engine_times(images: int) -> list[float]:
            data = scenes(model, size, images, False)
            return [
                timed(device, lambda: run_engine(model, data, [GAP], len(data.rows)))
                - timed(device, lambda: run_engine(short, data, [GAP], len(data.rows)))
                for _ in range(2)
            ]

        images = size["images"]
        own = LIKELY + model.max_new_tokens / 2
        for name, many in (("engine", images), ("engine_one_image", 1)):
            asked = many * size["expressions"]
            add(name, engine_times(many), 35 + many * kept + asked * own, f"{asked} sequences, {kept} visual tokens")
        data = scenes(model, size, 1, False)
        for name, many in (("loop", 1), (f"batch{size['sizes'][-1]}", size["sizes"][-1])):
            data, seconds = scenes(model, size, -(-many // size["expressions"]), False), []
            rows = data.rows[:many]
            with library_attention(model) as whole, library_attention(short) as brief:
                for _ in range(2):
                    long = timed(device, lambda r=rows, d=data, w=whole: by_generate(model, w, d, r, GAP))
                    seconds.append(
                        long - timed(device, lambda r=rows, d=data, w=brief: by_generate(short, w, d, r, GAP))
                    )
            add(name, seconds, many * (35 + kept + own), f"generate, {many} sequence(s)")

    def kernels(self) -> None:
        model, size = self._model(), self.size
        data = scenes(model, size, size["images"], False)
        few, more = (replace(model, max_new_tokens=n) for n in (2, 8))
        runs = [partial(run_engine, one, data, [GAP], len(data.rows)) for one in (few, more)]
        self._profile("engine_prefill", runs[0])
        self._steps("engine", runs, 6)
        for name, many in (("loop", 1), ("batch32", min(32, len(data.rows)))):
            with library_attention(few) as brief, library_attention(more) as whole:
                runs = [
                    partial(by_generate, m, w, data, data.rows[:many], GAP) for m, w in ((few, brief), (more, whole))
                ]
                if name == "loop":
                    self._profile("loop", runs[1])
                self._steps(name, runs, 6)

    def _kernels(self, run: Callable[[], object]) -> tuple[dict[str, tuple[float, int]], float]:
        """Seconds and number of runs of each kernel (on a CPU: of each operator) during one call, and its seconds."""
        on_gpu = self.device == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
            wall = timed(self.device, run)
        spent: dict[str, tuple[float, int]] = {}
        for event in seen.events():
            if not on_gpu or "CUDA" in str(event.device_type):
                took = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
                seconds, runs = spent.get(event.name, (0.0, 0))
                spent[event.name] = seconds + took / 1e6, runs + 1
        return spent, wall

    def _steps(self, name: str, runs: Sequence[Callable[[], object]], more: int) -> None:
        """A decoding step's time in kernels, from two runs of which the second takes `more` steps."""
        (few, many), add = (
            ([(seconds, n) for seconds, n in self._kernels(run)[0].values()] for run in runs),
            self.report.add,
        )
        (a, calls_a), (b, calls_b) = (map(sum, zip(*found)) for found in (few, many))
        add(
            f"kernels_step_{name}",
            (b - a) / more * 1e3,
            "ms in kernels a decoding step",
            n=round((calls_b - calls_a) / more),
        )

    def _profile(self, name: str, run: Callable[[], object]) -> None:
        """The names of the attention's kernels, the share of the time the GPU was busy, and where its time went."""
        spent, wall = self._kernels(run)
        if not spent:
            raise RuntimeError("the profiler has seen no kernels")
        total, calls = (sum(column) for column in zip(*spent.values()))
        ranked = sorted(spent, key=lambda kernel: -spent[kernel][0])

        def listed(kernels: Sequence[str]) -> str:
            return "; ".join(f"{short_name(k)} x{spent[k][1]} {spent[k][0] / total:.1%}" for k in kernels)

        attention = [k for k in ranked if re.search(r"fmha|flash|cudnn|attention|attn|softmax", k, re.I)]
        self.report.add(f"attention_kernels_{name}", float(len(attention)), "kernels", listed(attention[:6]))
        self.report.add(f"busy_{name}", total / wall, f"of {wall:.2f} s in kernels", listed(ranked[:10]), n=calls)

    @torch.inference_mode()
    def flash(self) -> None:
        """Whether the flash kernels are right under IDs with gaps, or are refused: with our mask, and without one."""
        model = self._model()
        data = scenes(model, self.size, 1, False)
        visual = model.encode([data.image(0)])
        visual = visual.take(torch.tensor([0], device=model.device))
        chosen = prune_images(pruner(GAP.pruner), visual, GAP.keep, [0])
        prompts = [model.ask(data.rows["expression"][0])]
        (one,) = whole_prompts(model, chosen, visual.unpruned, prompts, GAP)
        right = prefill(model, [one])[0].float()
        compact = torch.arange(len(one.embeds), device=model.device)
        wrong = prefill(model, [one._replace(position_ids=compact)])[0]
        apart = (wrong.float() - right).norm() / right.norm()
        self.report.add(
            "flash_compact", float(apart), "relative distance of logits", "GAP's from compact IDs', for scale"
        )

        def reached(name: str, run: Callable[[], Tensor]) -> None:
            try:
                found = run().float()
            except Exception as error:
                said = " ".join(str(error).split())[:160]
                self.report.add(name, None, "refused", f"{type(error).__name__}: {said}")
                return
            self.report.add(name, float((found - right).norm() / right.norm()), "relative distance of logits")

        def with_mask() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return prefill(model, [one])[0]

        def without_mask(cached: bool) -> Tensor:
            with library_attention(model), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                states = model.decoder(
                    inputs_embeds=one.embeds[None], position_ids=one.position_ids[None], use_cache=cached
                )
            return model.head(states.last_hidden_state[:, -1])

        def flash_attention_2() -> Tensor:
            config = model.decoder.config
            usual, config._attn_implementation = config._attn_implementation, "flash_attention_2"
            try:
                return prefill(model, [one])[0]
            finally:
                config._attn_implementation = usual

        reached("flash_sdpa_our_mask", with_mask)
        reached("flash_sdpa_no_mask_cache", lambda: without_mask(True))
        reached("flash_sdpa_no_mask_no_cache", lambda: without_mask(False))
        reached("flash_attention_2", flash_attention_2)

    def fastv(self) -> None:
        model, size = self._model(), self.size
        data, depth = scenes(model, size, size["images"], False), len(model.decoder.layers)
        layer = min(2, depth - 1)
        average = round(layer_mean([(0, 1), (layer, 0.25)], depth), 4)  # of the tokens that a layer reads
        grid, before, times = (
            cells(f"fastv:layer={layer}", 0.25, ids="original"),
            cells("random", average, ids="original"),
            {},
        )
        for _ in range(2):  # the first warms up
            for name, chosen in (("fastv", grid), ("before", before)):
                times[name] = timed(self.device, lambda chosen=chosen: run_engine(model, data, chosen, len(data.rows)))
        note = f"a quarter from layer {layer} on; {average:.0%} before the decoder take {times['before']:.2f} s"
        self.report.add("fastv_time", times["fastv"] / times["before"], "of pruning before the decoder, engine", note)

    def qwen(self) -> None:
        self.model = None  # its memory is needed
        gc.collect()
        model = random_qwen(self.size, self.device, self.dtype, self.folder / "qwen", self.tiny)
        self.report.about |= dict(model=model.name)
        # half the images and a third of the turns: its tower goes through an image's windows one by one
        self._prefill(
            model, "qwen_", self.size | dict(batch=max(2, self.size["batch"] // 2), turns=self.size["turns"] // 3)
        )
        data = scenes(model, self.size, max(2, self.size["batch"]), False, self.size["qwen_image"])
        grid = [*cells("none"), *cells(["random", "spatial"], 0.25, ids=["compact", "original"])]
        seconds = timed(self.device, lambda: run_engine(model, data, grid, len(data.rows)))
        tokens = len(data.rows) * len(grid) * model.max_new_tokens
        note = f"{len(grid)} cells, {len(data.rows)} expressions, no drafts, {model.max_new_tokens} tokens an answer"
        self.report.add("qwen_tokens_per_s_engine", tokens / seconds, "tokens/s", note)

    def rows(self) -> None:
        """tiny-llava's answers here against the CPU's, on which another process has been at work from the beginning."""
        images = self.size["tiny_images"]
        self.report.about |= dict(model="tiny-llava")
        kinds = KINDS[:2] if self.tiny else KINDS
        here = {kind: answers(self.device, kind, images) for kind in kinds}
        if self.device == "cuda":  # cuDNN's own choice for float32, which `answers` does not leave it
            here["tf32"] = answers(self.device, "float32", images, tf32=True)
        cpu = self._cpu_rows()
        for kind, found in here.items():
            equal = (found["raw"].to_numpy() == cpu["raw"].to_numpy()).astype(float)
            self.report.add(f"equal_{kind}", float(equal.mean()), "of the answers", dtype=kind, n=len(equal))
            self._difference(f"accuracy_{kind}", cpu, found, kind)
            for cell in TINY_GRID:
                a, b = (matching(one, cell.columns()) for one in (cpu, found))
                self._difference(f"accuracy_{kind}_{cell.pruner}_{cell.ids}", a, b, kind)

    def _difference(self, name: str, a: pd.DataFrame, b: pd.DataFrame, kind: str) -> None:
        found = paired_difference(a["correct"], b["correct"], a["image_id"], permutations=99)
        note = f"accuracy {b['correct'].mean():.3f} here, {a['correct'].mean():.3f} on the CPU in float32"
        numbers = {k: found[k] for k in ("low", "high")}
        self.report.add(name, found["difference"], "here - CPU", note, dtype=kind, n=len(a), **numbers)

    def _start(self, command: Sequence[str], log: Path, **env: str) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | env, start_new_session=True
            )

    def start_cpu_rows(self) -> None:
        """Begins early, beside the steps that leave most CPUs idle."""
        command = [sys.executable, __file__, "--cpu-rows", str(self.folder), "--images", str(self.size["tiny_images"])]
        self.cpu = self._start(command, self.folder / "cpu.log", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="4")

    def _cpu_rows(self) -> pd.DataFrame:
        if self.cpu is None:
            return answers("cpu", "float32", self.size["tiny_images"])
        if self.cpu.wait(timeout=max(self.timeouts.left - 5, 1)):
            raise RuntimeError(f"the CPU's rows failed: {(self.folder / 'cpu.log').read_text()[-300:]}")
        return pd.read_parquet(self.folder / "cpu.parquet")

    def start_tests(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
        threads = "1" if self.tiny else "6"
        self.suite = self._start(command, self.out / "gpu_tests.txt", OMP_NUM_THREADS=threads)

    def tests(self) -> None:
        log = self.out / "gpu_tests.txt"
        try:
            self.suite.wait(timeout=max(min(self.timeouts.left - 3, STEPS["tests"][0] - 5), 1))
        except subprocess.TimeoutExpired:
            stop(self.suite)
        said = log.read_text()
        counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", said[-300:])}
        lines = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if self.suite.returncode not in (0, 1):  # cut off, or pytest itself broke
            raise RuntimeError(f"pytest ended with {self.suite.returncode}: {said[-200:]}")
        note = f"{counts.get('skipped', 0)} skipped; {' '.join(lines)}; see {log.name}"
        self.report.add("tests_passed", float(counts.get("passed", 0)), "tests of pytest -m gpu", note)
        self.report.add(
            "tests_failed", float(counts.get("failed", 0) + counts.get("error", 0)), "tests of pytest -m gpu"
        )

    def train(self, command: str) -> None:
        env = os.environ | dict(OUT=str(self.out))
        child = subprocess.Popen(command, shell=True, cwd=ROOT, start_new_session=True, env=env)
        try:
            child.wait(timeout=max(self.timeouts.left - 15, 1))
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop(child, patience=12)
        self.report.add("train", float(child.returncode), "exit code", command)


# the cells of a batched `generate` on a GPU; their times stand for the other pruned cells
SAMPLE = {("none", "compact"), ("random", "compact"), ("cls_similarity", "original"), ("trim", "original")}
TINY_GRID = [*cells("none"), *cells(["random", "text_similarity"], 0.25, ids=["compact", "original"])]


def short_name(kernel: str) -> str:
    """A kernel's name without return type, templates and arguments, or cut."""
    name = re.sub(r"^void |<.*|\(.*", "", kernel)
    return (kernel if len(name) < 4 else name)[-90:]


def answers(device: str, dtype: str, images: int, tf32: bool = False) -> pd.DataFrame:
    """Scored rows of tiny-llava on RefStamps. tf32: whether convolutions may use it where the dtype is float32."""
    usual, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, tf32
    try:
        model = models.load("tiny-llava", device=device, dtype=dtype)
        return score(run_engine(model, datasets.load("refstamps", "val", images), TINY_GRID, 100))
    finally:
        torch.backends.cudnn.allow_tf32 = usual


def random_qwen(size: dict, device: str, dtype: torch.dtype, folder: Path, tiny: bool) -> models.Model:
    """Qwen2.5-VL-7B (or a toy) with random weights, by the family's own `assemble`."""
    family = models.FAMILIES["qwen2_5_vl"]
    marks = [f"<|{name}|>" for name in "im_start im_end vision_start vision_end image_pad video_pad".split()]
    words = tokenizer(size["vocabulary"], f"{family.Qwen2_5VL.rec} system user assistant You are a helpful", marks)
    words.save_pretrained(folder)
    known = dict(patch_size=14, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    known |= dict(
        image_processor_type="Qwen2VLImageProcessor", size=dict(shortest_edge=56**2, longest_edge=28**2 * 1280)
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(known))
    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31]
    )
    if tiny:
        text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, fullatt_block_indexes=[1])
    width = text["hidden_size"] // text["num_attention_heads"]
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[width // 8, 3 * width // 16, 3 * width // 16])
    ids = {mark: words.convert_tokens_to_ids(mark) for mark in marks}
    config = Qwen2_5_VLConfig(
        vision_config=dict(**vision, out_hidden_size=text["hidden_size"], patch_size=14, window_size=112),
        text_config=dict(
            **text,
            num_key_value_heads=2 if tiny else 4,
            vocab_size=size["vocabulary"] if tiny else 152064,
            rope_parameters=rope,
            max_position_embeddings=32768,
            bos_token_id=None,
            eos_token_id=None,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.device(device):
        whole = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=ATTENTION, dtype=dtype)
    name = "random toy Qwen2.5-VL" if tiny else "random Qwen2.5-VL-7B"
    model = family.assemble(whole, source=str(folder), name=name, revision="random", device=device)
    return replace(model, eos=-1, max_new_tokens=24)


def stop(child: subprocess.Popen, patience: float = 3) -> None:
    """End a process and all that it has started: asked first, then not asked."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=patience)


def table(path: Path) -> str:
    """README's table, from the last row of each name; `UNMEASURED` where there is none, or none from a GPU."""
    try:
        rows = pd.read_csv(path).dropna(subset=["value"]).drop_duplicates("name", keep="last").set_index("name")
        rows = rows[~rows["device"].str.startswith("CPU")]
    except FileNotFoundError:
        rows = pd.DataFrame(columns=COLUMNS).set_index("name")
    known = rows["device"].unique()
    lines = [f"| on {', '.join(known) if len(known) else 'a GPU'} | measured | goal |", "|---|---|---|"]
    for label, names, form in TABLE:
        found = []
        for name in names:
            if name not in rows.index:
                found.append(UNMEASURED)
                continue
            row = rows.loc[name]
            one = "{:.1f}x" if form == "x" else f"{{:{form}}}"
            text = one.format(row["value"])
            if not pd.isna(row["low"]):
                text += f" [{one.format(row['low'])}, {one.format(row['high'])}]"
            found.append(text)
        if set(found) == {UNMEASURED}:
            found = found[:1]
        goals = list(dict.fromkeys(GOALS[name][0] for name in names if name in GOALS))
        lines.append(f"| {label} | {', '.join(found)} | {', '.join(goals) or '-'} |")
    return "\n".join(lines)


# name: seconds at most, and seconds without which it is not begun, on a GPU
STEPS = {
    "ceilings": (15, 1),
    "build": (30, 5),
    "prefill": (35, 5),
    "engine": (110, 15),
    "kernels": (25, 5),
    "decode": (30, 8),
    "rows": (40, 5),
    "tests": (60, 5),
    "flash": (10, 3),
    "fastv": (20, 6),
    "qwen": (40, 15),
}


def main(arguments: Sequence[str] | None = None, begun: float | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of gpu.csv and gpu_tests.txt")
    parser.add_argument("--seconds", type=float, default=520, help="of all steps together")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; so it is where there is no GPU")
    parser.add_argument("--steps", default=",".join(STEPS), help="those to run, in this order")
    parser.add_argument(
        "--train", metavar="COMMAND", help="to run for what is left of the time, with OUT in its environment"
    )
    parser.add_argument("--table", nargs="?", type=Path, const=ROOT / "benchmarks" / "gpu.csv", metavar="CSV")
    parser.add_argument("--cpu-rows", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.table:
        print(table(args.table))
        return
    if args.cpu_rows:
        answers("cpu", "float32", args.images).to_parquet(args.cpu_rows / "cpu.parquet")
        return
    steps = args.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"unknown steps {', '.join(sorted(unknown))}; valid: {', '.join(STEPS)}")
    begun, on_gpu = begun or time.monotonic(), torch.cuda.is_available()
    tiny = args.tiny or not on_gpu
    device = "cuda" if on_gpu else "cpu"
    report = Report(args.out / "gpu.csv", torch.cuda.get_device_name() if on_gpu else "CPU")
    bench = Bench(report, timeouts := Timeouts(begun + args.seconds, report), args.out, device, tiny)
    report.step, report.judges = "start", not tiny
    report.add("torch", None, torch.__version__, f"{torch.get_num_threads()} threads{', toy sizes' if tiny else ''}")
    try:
        if "rows" in steps and not tiny:  # one core would only be in its own way
            bench.start_cpu_rows()
        for name in steps:
            if "tests" in steps and bench.suite is None and name in ("rows", "tests"):
                bench.start_tests()
            timeouts.run(name, getattr(bench, name), *STEPS[name])
        if args.train:
            timeouts.run("train", lambda: bench.train(args.train), args.seconds, 20)
    finally:
        bench.close()
        signal.signal(signal.SIGALRM, timeouts.usual)
        report.file.close()
    last = {row["name"]: row for row in report.rows if row["goal"]}
    print(
        "goals:", *(f"{n} {r['value']:.4g} ({r['goal']}: {r['met']})" for n, r in last.items() if r["met"]), sep="\n  "
    )


if __name__ == "__main__":
    main(begun=STARTED)
