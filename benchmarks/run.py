"""How fast the engine is, as ratios measured in one run: python benchmarks/run.py [--model NAME] [--images N]

(a) the engine against a plain loop that answers one expression at a time by `generate`, encoding and pruning its image
    anew, on the grid of six methods x {compact, GAP} and the unpruned model; every answer must be the same
(b) GAP against compact IDs: time of the prefill, and peak memory where there is a GPU
(c) the speed-up of a pruned prefill as a share of what its FLOPs promise
(d) how the time of an evaluation grows with images and cells, that of a prefill with tokens and batch: log-log slopes
(e) matrix products per second in the prefill, as a share of what one large product reaches on this machine

Writes benchmarks/results.csv. Times on a shared machine drift, so what is compared takes turns; medians over the turns, with
the quartiles beside them.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from analysis import models
from analysis.cost import flops
from analysis.decode import prefill
from analysis.evaluate import cells, evaluate, image_seed
from analysis.positions import assign, layout, reorder
from analysis.pruning import pruner, select
from analysis.rec import datasets

METHODS = ["random", "spatial", "cls_similarity", "text_similarity", "prumerge", "trim"]
GOALS = {"engine": ">= 15 on 2 CPU cores, >= 20 on a GPU", "gap_time": "1.00 +- 0.01", "gap_memory": "1.00 +- 0.01",
         "speedup_share": ">= 0.85 on a GPU at 576 tokens", "slope_images": "1", "slope_cells": "< 1"}


def timed(model: models.Model, run: Callable[[], object]) -> float:
    """Seconds of one call."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def plain_loop(model: models.Model, data: datasets.RecDataset, grid: list) -> list[str]:
    """What one writes without an engine: for each cell and expression encode, prune, generate."""
    whole = LlamaForCausalLM(model.decoder.config).to(model.device, model.dtype).eval()
    whole.model, whole.lm_head = model.decoder, model.head
    answers = []
    with torch.inference_mode():
        for cell in grid:
            for row in data.rows.itertuples():
                seed = image_seed(cell.seed, row.image_id)
                visual = model.encode([data.image(row.image_id)]).take(torch.tensor([0]), **model.texts([row.expression]))
                tokens = reorder(select(pruner(cell.pruner), visual, cell.keep, [seed])[0], cell.order, seed)
                ids = assign(tokens.origin, visual.length, cell.ids, seed)
                prefix, suffix = model.prompt(row.expression)
                embeds = torch.cat([model.embed(prefix), tokens.features, model.embed(suffix)])[None]
                made = whole.generate(
                    inputs_embeds=embeds, position_ids=layout(len(prefix), ids.visual, ids.text, len(suffix))[None],
                    attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
                    max_new_tokens=model.max_new_tokens, do_sample=False, eos_token_id=model.eos, pad_token_id=0)
                answers.append(model.text([t for t in made[0].tolist() if t not in (0, model.eos)]))
    return answers


def engine(model: models.Model, data: datasets.RecDataset, grid: list, batch: int) -> list[str]:
    """The same by `evaluate`, into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return evaluate(model, data, grid, Path(folder) / "rows.parquet", batch_size=batch, progress=False)["raw"].tolist()


def spread(values: list[float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), map(float, np.quantile(values, [0.5, 0.25, 0.75]))))


def slope(x: list[float], y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def prompts(model: models.Model, data: datasets.RecDataset, keep: float | None, ids: str, batch: int):
    """Embeddings and position IDs of `batch` prompts."""
    first = data.rows.drop_duplicates("image_id").head(batch)
    embeds, positions = [], []
    with torch.inference_mode():
        for image_id, expression in zip(first["image_id"], first["expression"]):
            visual = model.encode([data.image(image_id)])
            tokens = select(pruner("random" if keep else "none"), visual, keep, [0])[0]
            given, (prefix, suffix) = assign(tokens.origin, visual.length, ids, 0), model.prompt(expression)
            embeds.append(torch.cat([model.embed(prefix), tokens.features, model.embed(suffix)]))
            positions.append(layout(len(prefix), given.visual, given.text, len(suffix)))
    return embeds, positions


def bench(model: models.Model, images: int, turns: int, batch: int) -> pd.DataFrame:
    data = datasets.load("refstamps", "val", images)
    grid = [*cells("none"), *cells(METHODS, [0.25], ids=["compact", "original"])]
    small = datasets.load("refstamps", "val", min(images, 3))
    found: list[dict] = []

    def add(name: str, unit: str, **numbers) -> None:
        found.append(dict(name=name, unit=unit, goal=GOALS.get(name, "")) | numbers)

    ratios, same = [], []
    for _ in tqdm(range(3), desc="(a) engine against plain loop"):
        answers = {}
        slow = timed(model, lambda: answers.update(plain=plain_loop(model, small, grid)))
        fast = timed(model, lambda: answers.update(engine=engine(model, data, grid, batch)))
        ratios.append((slow / len(small.rows)) / (fast / len(data.rows)))
        again = engine(model, small, grid, batch)
        same.append(np.mean([a == b for a, b in zip(answers["plain"], again, strict=True)]))
    add("engine", f"times faster than the plain loop, {len(grid)} cells, {len(data.rows)} expressions", **spread(ratios))
    add("engine_same", "share of equal answers", value=float(min(same)))

    times: dict[tuple, list[float]] = {}
    run = {(keep, ids): prompts(model, data, keep, ids, min(images, 16)) for keep, ids in
           ((None, "compact"), (0.25, "compact"), (0.25, "original"))}
    for turn in tqdm(range(turns + 1), desc="(b), (c), (e) prefill"):
        for key, given in run.items():
            seconds = timed(model, lambda: prefill(model.decoder, model.head, *given))
            if turn:
                times.setdefault(key, []).append(seconds)
    full, compact, gap = (np.array(times[key]) for key in run)
    add("gap_time", "GAP / compact, time of the prefill", **spread(gap / compact))
    if model.device.type == "cuda":
        peaks = []
        for ids in ("compact", "original"):
            torch.cuda.reset_peak_memory_stats()
            prefill(model.decoder, model.head, *run[0.25, ids])
            peaks.append(torch.cuda.max_memory_allocated())
        add("gap_memory", "GAP / compact, peak memory", value=peaks[1] / peaks[0])
    work = {key: flops(lambda given=given: prefill(model.decoder, model.head, *given)) for key, given in run.items()}
    promised = work[None, "compact"] / work[0.25, "compact"]
    add("speedup", f"full / pruned prefill, a quarter kept; FLOPs promise {promised:.2f}", **spread(full / compact))
    add("speedup_share", "speed-up / what FLOPs promise", **spread(full / compact / promised))
    side = 4096 if model.device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=model.device, dtype=model.dtype) for _ in range(2))
    peak = 2 * side**3 / min(timed(model, lambda: a @ b) for _ in range(10))
    add("roofline", f"of the {peak / 1e9:.0f} GFLOP/s of one product of {side} x {side}, in the full prefill",
        **spread(work[None, "compact"] / full / peak))

    def evaluated(n: int, chosen: list) -> float:
        part = datasets.load("refstamps", "val", n)
        return timed(model, lambda: engine(model, part, chosen, batch))

    steps = [max(2, images // 4), max(3, images // 2), max(4, images)]
    add("slope_images", f"of log time against log images, {steps}", value=slope(steps, [evaluated(n, grid[:3]) for n in steps]))
    counts = [2, 5, 13]
    add("slope_cells", f"of log time against log cells, {counts}",
        value=slope(counts, [evaluated(steps[0], grid[:n]) for n in counts]))
    keeps = [0.1, 0.25, 0.5, 1.0]
    given = [prompts(model, data, keep, "original", min(images, 16)) for keep in keeps]
    seconds = [min(timed(model, lambda: prefill(model.decoder, model.head, *g)) for _ in range(5)) for g in given]
    add("slope_tokens", "of log prefill time against log tokens, a tenth to all",
        value=slope([sum(map(len, g[0])) for g in given], seconds))
    sizes = [n for n in (1, 4, 16) if n <= images]
    given = [prompts(model, data, 0.5, "original", n) for n in sizes]
    seconds = [min(timed(model, lambda: prefill(model.decoder, model.head, *g)) for _ in range(5)) for g in given]
    add("slope_batch", f"of log prefill time against log batch, {sizes}", value=slope(sizes, seconds))
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU"
    return pd.DataFrame(found).assign(model=model.name, device=where, threads=torch.get_num_threads(), dtype=str(model.dtype)[6:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--turns", type=int, default=30, help="of the prefills")
    parser.add_argument("--batch", type=int, default=100, help="expressions answered together by the engine")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.csv")
    args = parser.parse_args()
    found = bench(models.load(args.model), args.images, args.turns, args.batch)
    found.round(4).to_csv(args.out, index=False)
    print(found.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
