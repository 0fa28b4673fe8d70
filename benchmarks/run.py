"""How fast the engine is, as ratios measured in one run: python benchmarks/run.py [--model NAME] [--images N]

(a) the engine against a plain loop that answers one expression at a time by `generate`, encoding and pruning its image
    anew, on the grid of six methods x {compact, GAP} and the unpruned model; every answer must be the same
    and against `hf.pruned` and `generate` on batches of the same size, 32, which encode an image for every expression
(b) GAP against compact IDs: time and peak memory of the prefill
(c) the speed-up of a pruned prefill as a share of what its FLOPs promise
(d) how the time of an evaluation grows with images and cells, that of a prefill with tokens and batch: log-log slopes
(e) matrix products per second in the prefill, as a share of what one large product reaches on this machine
(f) FastV in the engine against pruning before the decoder at as many tokens a layer on average: by text similarity,
    which reads the expression as FastV does, and at random, whose tokens all expressions of an image share; and against
    `hf.pruned` and `generate` for one expression at a time

Writes benchmarks/results.csv. Times on a shared machine drift, so what is compared takes turns; medians over the turns,
with the quartiles beside them.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoConfig, LlamaForCausalLM

from analysis import models
from analysis.engine.cost import clock, cost_rows, flops, ratio, whole_prompts
from analysis.engine.evaluate import cells, evaluate, image_seed
from analysis.engine.stages import layer_mean
from analysis.models.by_generate import OPTIONS, ByGenerate, assemble
from analysis.pruning import pruner
from analysis.pruning.images import prune_images
from analysis.rec import datasets
from analysis.registry import matching
from analysis.training.processor import save_processor
from analysis.types import Cell

METHODS = ["random", "spatial", "cls_similarity", "text_similarity", "prumerge", "trim"]
GOALS = {
    "engine": ">= 15 on 2 CPU cores, >= 20 on a GPU",
    "generate": ">= 12 at batch 32 on 2 CPU cores",
    "gap_time": "1.00 +- 0.01",
    "gap_memory": "1.00 +- 0.01",
    "speedup_share": ">= 0.85 on a GPU at 576 tokens",
    "slope_images": "1",
    "slope_cells": "< 1",
    "fastv": "<= 1.15",
    "fastv_shared": "<= 1.15",
}


def timed(model: models.Model, run: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun = clock(model)
    run()
    return clock(model) - begun


def plain_loop(model: models.Model, data: datasets.RecDataset, grid: list) -> list[str]:
    """What one writes without an engine: for each cell and expression encode, prune, generate."""
    whole = LlamaForCausalLM(model.decoder.config).to(model.device, model.dtype).eval()
    whole.model, whole.lm_head = model.decoder, model.head
    answers = []
    with torch.inference_mode():
        for cell in grid:
            for row in data.rows.itertuples():
                seed = image_seed(cell.seed, row.image_id)
                visual = model.encode([data.image(row.image_id)]).take(
                    torch.tensor([0]), **model.texts([row.expression])
                )
                chosen = prune_images(pruner(cell.pruner), visual, cell.keep, [seed])
                (inputs,) = whole_prompts(model, chosen, visual.unpruned, [model.prompt(row.expression)], cell)
                made = whole.generate(
                    inputs_embeds=inputs.embeds[None],
                    position_ids=inputs.position_ids[None],
                    attention_mask=torch.ones(1, len(inputs.embeds), dtype=torch.long, device=model.device),
                    max_new_tokens=model.max_new_tokens,
                    do_sample=False,
                    eos_token_id=model.eos,
                    pad_token_id=0,
                )
                answers.append(model.text([t for t in made[0].tolist() if t not in (0, model.eos)]))
    return answers


def by_generate(model: models.Model, folder: Path) -> ByGenerate:
    """The same embedded model for `hf.pruned`; its files, and a processor's, are put in the folder."""
    source = models.MODELS[model.name]
    for name in (source.name, "tiny-clip"):
        shutil.copytree(source.parent / name, folder / name)
    save_processor(folder / source.name)
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    build, options = models.FAMILIES[config.model_type].whole_class(config)
    whole = build.from_pretrained(source, dtype=model.dtype, use_safetensors=True, **OPTIONS, **options)
    return assemble(
        whole,
        str(folder / source.name),
        model.name,
        model.revision,
        str(model.device),
        rec=model.rec.removeprefix("<image>\n"),
        box_format=model.box_format,
        frame=model.frame,
        max_new_tokens=model.max_new_tokens,
    )


def engine(model: models.Model | ByGenerate, data: datasets.RecDataset, grid: list, batch: int) -> list[str]:
    """The same by `evaluate`, into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return evaluate(model, data, grid, Path(folder) / "rows.parquet", batch_size=batch, progress=False)[
            "raw"
        ].tolist()


def spread(values: list[float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), map(float, np.quantile(values, [0.5, 0.25, 0.75]))))


def slope(x: list[float], y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


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
    add(
        "engine", f"times faster than the plain loop, {len(grid)} cells, {len(data.rows)} expressions", **spread(ratios)
    )
    add("engine_same", "share of equal answers", value=float(min(same)))
    if model.name in ("tiny-llava", "tiny-llava-wide", "tiny-llava-next"):  # whose processor transformers has
        ratios, same, few = [], [], datasets.load("refstamps", "val", min(images, 12))
        with tempfile.TemporaryDirectory() as folder:
            door = by_generate(model, Path(folder))
            for _ in tqdm(range(3), desc="(a) engine against generate"):
                slow = timed(model, lambda: answers.update(door=engine(door, few, grid, 32)))
                fast = timed(model, lambda: answers.update(engine=engine(model, few, grid, 32)))
                ratios.append(slow / fast)
                same.append(np.mean([a == b for a, b in zip(answers["door"], answers["engine"], strict=True)]))
            fewer = [flops(lambda who=who: engine(who, small, grid, 32)) for who in (door, model)]
            inside, depth = cells("fastv", 0.25, ids="original"), len(model.decoder.layers)
            share = round(layer_mean([(0, 1), (2, 0.25)], depth), 4)
            others = {"fastv": "text_similarity", "fastv_shared": "random"}
            before = {name: cells(method, share, ids="original") for name, method in others.items()}
            times = {name: [] for name in (*others, "fastv_loop")}
            for _ in tqdm(range(turns // 20), desc="(f) FastV"):
                mine = timed(model, lambda: engine(model, data, inside, batch))
                for name, cell in before.items():
                    times[name].append(mine / timed(model, lambda cell=cell: engine(model, data, cell, batch)))
                alone = timed(model, lambda: engine(door, small, inside, 1))
                times["fastv_loop"].append(alone / len(small.rows) / (mine / len(data.rows)))
        for name, method in others.items():
            unit = f"FastV, a quarter from layer 2 on / {share:.0%} of the tokens before the decoder, {method}: time"
            add(name, unit, **spread(times[name]))
        add(
            "fastv_loop",
            "times faster than FastV by pruned and generate, an expression at a time",
            **spread(times["fastv_loop"]),
        )
        unit = (
            f"times faster than pruned and generate, both at batch 32, {len(grid)} cells, {len(few.rows)} expressions"
        )
        add("generate", unit, **spread(ratios))
        add(
            "generate_flops",
            "times fewer FLOPs than pruned and generate: what sharing promises",
            value=fewer[0] / fewer[1],
        )
        add("generate_same", "share of equal answers", value=float(min(same)))

    full, compact, gap = prefills = [*cells("none"), *cells("random", 0.25, ids=["compact", "original"])]
    measured = cost_rows(model, data, prefills, min(images, 16), turns, progress=False)

    def compared(cell: Cell, other: Cell, column: str) -> dict[str, float]:
        found = ratio(measured, cell, other, column)
        return dict(value=found["ratio"], low=found["low"], high=found["high"])

    add("gap_time", "GAP / compact, time of the prefill", **compared(gap, compact, "prefill_s"))
    add("gap_memory", "GAP / compact, peak memory of the prefill", **compared(gap, compact, "peak_bytes"))
    speedup, promised = compared(full, compact, "prefill_s"), compared(full, compact, "flops")["value"]
    add("speedup", f"full / pruned prefill, a quarter kept; FLOPs promise {promised:.2f}", **speedup)
    add("speedup_share", "speed-up / what FLOPs promise", **{key: value / promised for key, value in speedup.items()})
    side = 4096 if model.device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=model.device, dtype=model.dtype) for _ in range(2))
    peak = 2 * side**3 / min(timed(model, lambda: a @ b) for _ in range(10))
    unpruned = matching(measured, full.columns())
    add(
        "roofline",
        f"of the {peak / 1e9:.0f} GFLOP/s of one product of {side} x {side}, in the full prefill",
        **spread(unpruned["flops"] * unpruned["images"] / unpruned["prefill_s"] / peak),
    )

    def evaluated(n: int, chosen: list) -> float:
        part = datasets.load("refstamps", "val", n)
        return timed(model, lambda: engine(model, part, chosen, batch))

    steps = [max(2, images // 4), max(3, images // 2), max(4, images)]
    add(
        "slope_images",
        f"of log time against log images, {steps}",
        value=slope(steps, [evaluated(n, grid[:3]) for n in steps]),
    )
    counts = [1, 4, 16]
    add(
        "slope_cells",
        f"of log time against log cells, {counts} of the same kind",
        value=slope(
            counts, [evaluated(steps[1], cells("spatial", 0.25, ids="original", seeds=[*range(n)])) for n in counts]
        ),
    )
    by_keep = cost_rows(
        model, data, cells("random", [0.1, 0.25, 0.5, 1.0], ids="original"), min(images, 16), 5, progress=False
    )
    text = sum(map(len, model.prompt(data.rows["expression"][0])))
    fastest = by_keep.groupby("keep")[["tokens", "prefill_s"]].min() + [text, 0]
    add(
        "slope_tokens",
        "of log prefill time against log tokens of the prompt, a tenth to all of the image kept",
        value=slope(*fastest.to_numpy().T),
    )
    sizes = [n for n in (2, 4, 8, 16) if n <= images]
    fastest = [
        cost_rows(model, data, cells("random", 0.5, ids="original"), n, 5, progress=False)["prefill_s"].min()
        for n in sizes
    ]
    add("slope_batch", f"of log prefill time against log batch, {sizes}", value=slope(sizes, fastest))
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU"
    return pd.DataFrame(found).assign(
        model=model.name, device=where, threads=torch.get_num_threads(), dtype=str(model.dtype)[6:]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--turns", type=int, default=100, help="of the prefills")
    parser.add_argument("--batch", type=int, default=200, help="expressions answered together by the engine")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.csv")
    args = parser.parse_args()
    found = bench(models.load(args.model), args.images, args.turns, args.batch)
    found.round(4).to_csv(args.out, index=False)
    print(found.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
