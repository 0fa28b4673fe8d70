"""What pruning saves and what GAP costs: FLOPs, time, cache and memory of the prefill, cell against cell in one run.

FLOPs are counted by `torch.utils.flop_counter`: two for each multiply-add of a matrix product, attention included,
element-wise work left out. Peak memory is counted, too: what the allocator has given out beyond what was there before.
Times on a shared machine drift, so the cells take turns and are compared within a turn.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from statistics import median

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import Cache, LlamaConfig, LlamaModel

from analysis.engine import stages
from analysis.engine.decode import Inputs, causal_mask, prefill, prompt_inputs
from analysis.engine.evaluate import image_seed
from analysis.models import Model
from analysis.positions import assign, reorder
from analysis.pruning import budget, pruner
from analysis.pruning.images import staged_images
from analysis.registry import matching, pick
from analysis.types import Cell, Ids, RecDataset, Selection, VisualTokens

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would write two lines to stderr each time
TEXT = 73  # tokens of a REC prompt to LLaVA-1.5: 35 before the image, some 38 (taken as typical) after it
# decoders of published models, for FLOPs that need no weights: visual tokens, blocks, LlamaConfig's sizes
DECODERS = {
    "LLaVA-1.5-7B": (576, 32, dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)),
    "LLaVA-1.5-13B": (576, 40, dict(hidden_size=5120, intermediate_size=13824, num_attention_heads=40)),
}


def flops(run: Callable[[], object]) -> int:
    """FLOPs of one call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def clock(model: Model) -> float:
    """Seconds; waits for what the GPU has been given to do."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(model: Model, run: Callable[[], object]) -> int:
    """Most bytes that one call holds at a time beyond those before it."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    steps = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(steps, key=lambda e: e.start_ns())), initial=0))


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds."""
    held = [layer for layer in cache.layers if layer.is_initialized]
    return sum(t.numel() * t.element_size() for layer in held for t in (layer.keys, layer.values))


def decoder_flops(name: str, keep: float | Sequence[tuple[int, float]]) -> int:
    """Prefill FLOPs of a published model's decoder (without head) on one prompt, from its configuration alone.

    keep: share of the visual tokens, or (first layer, share) of each stretch of layers; what ranks tokens in between
    costs some thousandth of a layer and is left out.
    """
    visual, blocks, sizes = pick(DECODERS, name, "decoder")
    starts, shares = zip(*(keep if isinstance(keep, Sequence) else [(0, keep)]))
    with torch.device("meta"):
        block = LlamaModel(LlamaConfig(vocab_size=32, num_hidden_layers=1, attn_implementation="eager", **sizes))

    def block_flops(length: int) -> int:
        embeds = torch.empty(1, length, sizes["hidden_size"], device="meta")
        mask = causal_mask(torch.ones(1, length, dtype=torch.bool, device="meta"), embeds.dtype)
        ids = torch.arange(length, device="meta")[None]
        return flops(lambda: block(inputs_embeds=embeds, position_ids=ids, attention_mask=mask, use_cache=False))

    layers = [end - start for start, end in pairwise([*starts, blocks])]
    return sum(count * block_flops(TEXT + budget(share, visual)) for count, share in zip(layers, shares))


@torch.inference_mode()
def whole_prompts(
    model: Model, selections: Sequence[Selection], unpruned: Ids, prompts: Sequence[tuple[Tensor, Tensor]], cell: Cell
) -> list[Inputs]:
    """Whole prompts under a cell, one for each selection; unpruned: as `VisualTokens.unpruned`."""
    inputs = []
    for selection, prompt in zip(selections, prompts):
        selection = reorder(selection, cell.order, cell.seed)
        ids = assign(selection.origin, unpruned, cell.ids, cell.seed)
        inputs.append(prompt_inputs(model.embed, prompt, selection.features, ids).whole)
    return inputs


@torch.inference_mode()
def cost_rows(
    model: Model, dataset: RecDataset, grid: Sequence[Cell], batch: int = 8, turns: int = 20, progress: bool = True
) -> pd.DataFrame:
    """One row per turn and cell, for `batch` images with their first expression.

    Columns: the cell's; turn; tokens (visual tokens read, mean over prompts and layers); flops, cache_bytes (per
    prompt), peak_bytes of the prefill beyond the weights (per batch), which are counted once; encode_s (tower and
    connector, the same for all), select_s (selection, order, IDs and embeddings; of a method inside the decoder it is
    part of the prefill), prefill_s (decoder), all per batch. The first turn warms up and is left out.
    Raises ValueError for fewer than two images or turns.
    """
    first = dataset.rows.drop_duplicates("image_id").head(batch)
    if len(first) < 2 or turns < 2:
        raise ValueError(f"at least two images and two turns are needed, got {len(first)} and {turns}")
    images = [dataset.image(i) for i in first["image_id"]]
    expressions, seeds = list(first["expression"]), [image_seed(0, i) for i in first["image_id"]]
    prompts = [model.prompt(expression) for expression in expressions]
    index, depth = torch.arange(len(first), device=model.device), len(model.decoder.layers)

    def encode() -> VisualTokens:
        return model.encode(images).take(index, **model.texts(expressions))

    counted, rows = {}, []
    for turn in tqdm(range(turns + 1), desc="turns", disable=not progress):
        start = clock(model)
        encode()
        encode_s = clock(model) - start
        for cell in grid:
            visual = encode()  # anew, so that each method pays for its own signals
            start = clock(model)
            made = staged_images(pruner(cell.pruner), visual, cell.keep, seeds, depth)
            if made[0][1]:
                shown = [stages.Shown(one, visual.unpruned, cell.seed, drops) for one, drops in made]
                # each prompt has its own image, so that nothing is shared here, as in the plain prefill below
                again = partial(stages.prefill, model, prompts, shown, range(len(shown)), cell.ids, cell.order)
            else:
                again = partial(
                    prefill, model, whole_prompts(model, [one for one, _ in made], visual.unpruned, prompts, cell)
                )
            selected = clock(model)
            prefilled = again()
            done = clock(model)
            if cell not in counted:
                caches = [prefilled[1], *(one.cache for one in prefilled.context)] if made[0][1] else [prefilled[1]]
                read = prefilled.read if made[0][1] else [[(0, len(one.origin))] for one, _ in made]
                counted[cell] = dict(
                    tokens=sum(stages.layer_mean(one, depth) for one in read) / len(first),
                    flops=flops(again) / len(first),
                    cache_bytes=sum(map(cache_bytes, caches)) / len(first),
                    peak_bytes=peak_bytes(model, again),
                )
            rows.append(
                cell.columns()
                | dict(
                    model=model.name,
                    revision=model.revision,
                    device=str(model.device),
                    images=len(first),
                    turn=turn,
                    tokens_full=visual.length,
                    encode_s=encode_s,
                    select_s=selected - start,
                    prefill_s=done - selected,
                    **counted[cell],
                )
            )
    return pd.DataFrame(rows).query("turn > 0").astype({"keep": float}).reset_index(drop=True)


def ratio(rows: pd.DataFrame, cell: Cell, other: Cell, column: str) -> dict[str, float]:
    """column of one cell over that of another, turn by turn: median, low and high quartile, n turns."""
    sides = (matching(rows, one.columns()).set_index("turn")[column] for one in (cell, other))
    values = operator.truediv(*sides)
    return dict(ratio=median(values), low=values.quantile(0.25), high=values.quantile(0.75), n=len(values))
