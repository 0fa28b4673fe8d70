"""The training loop: fresh scenes from worker processes, a resumable run with its log, and where both are kept.

Scenes are drawn afresh all the time; a pool holds the last few thousand, so that a scene is asked about several times,
each time with other questions (drawing costs more than a step on two cores).
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from analysis import ROOT
from analysis.models.base import pad_to_square
from analysis.models.llava import Llava
from analysis.refstamps.scenes import Scene, scene

CHECKPOINTS = ROOT / "analysis" / "checkpoints"
RUNS = ROOT / "runs"
HELD_OUT = 200  # scenes of the training side that are never trained on, to follow the accuracy without touching val
MEAN, STD = torch.tensor([0.481, 0.458, 0.408]), torch.tensor([0.269, 0.261, 0.276])  # CLIP's, rounded
FROZEN = "model.vision_tower."  # comes from the tiny CLIP and is not saved again


# ---------------------------------------------------------------------------------------------------- scenes


def padded(picture: np.ndarray) -> np.ndarray:
    """A scene as the tiny CLIP sees it: uint8 [3, IMAGE, IMAGE]. Scenes are IMAGE pixels on their longer side."""
    return np.asarray(pad_to_square(Image.fromarray(picture), Llava.fill)).transpose(2, 0, 1).copy()


def objects_wanted(index: int) -> int | None:
    """Curriculum: many one-object scenes at first, 15 % for ever; of the rest, three in ten of two objects, the
    others as in evaluation."""
    rng = np.random.default_rng([7, index])
    if rng.random() < max(0.15, 0.7 - index / 20_000):
        return 1
    return 2 if rng.random() < 0.3 else None


class FreshScenes(IterableDataset):
    """Endless training scenes from `start`: (scene without its picture, picture as uint8 [H, W, 3])."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[tuple[Scene, np.ndarray]]:
        info = get_worker_info()
        index = self.start + info.id
        while True:
            drawn = scene("train", index, objects_wanted(index))
            yield replace(drawn, image=None), np.asarray(drawn.image)
            index += info.num_workers


class Pool:
    """The last `size` scenes; each `sample` first replaces `fresh` of them. Items are what `prepare` makes of a batch."""

    def __init__(self, start: int, size: int, fresh: int, workers: int, prepare, seed: int):
        loader = DataLoader(FreshScenes(start), batch_size=fresh, num_workers=workers, collate_fn=list)
        self.source, self.prepare, self.fresh = iter(loader), prepare, fresh
        self.rng = np.random.default_rng([11, seed])
        self.drawn, self.place, self.items = start, 0, []
        for _ in tqdm(range(0, size, fresh), desc="first scenes", unit=f"x{fresh} scenes"):
            self.items += self.draw()

    def draw(self) -> list:
        self.drawn += self.fresh
        return self.prepare(next(self.source))

    def sample(self, count: int) -> list:
        new = self.draw()
        for item in new:
            self.items[self.place] = item
            self.place = (self.place + 1) % len(self.items)
        return [self.items[i] for i in self.rng.integers(len(self.items), size=count)]


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> CLIP's normalised floats."""
    shape = (1, 3, 1, 1)
    return (pixels.float() / 255 - MEAN.view(shape).to(pixels.device)) / STD.view(shape).to(pixels.device)


# ---------------------------------------------------------------------------------------------------- the loop


def rate(step: int, args) -> float:
    """Warm-up, constant, linear decay."""
    return args.lr * min(1.0, (step + 1) / 200, max(0.0, (args.steps - step) / max(1, args.decay)))


def autocast(device: torch.device):
    return torch.autocast(device.type, dtype=torch.bfloat16)


def run(stage: str, model: torch.nn.Module, args, make_batches, loss_of, evaluate, export) -> None:
    """Train `model`'s trainable weights; resume, log and checkpoint. loss_of(batch) -> (loss, {name: number})."""
    folder = RUNS / stage
    folder.mkdir(parents=True, exist_ok=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            dict(params=[p for p in trainable if p.ndim > 1], weight_decay=0.05),
            dict(params=[p for p in trainable if p.ndim <= 1], weight_decay=0.0),
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    state = dict(step=0, scenes=0, seconds=0.0)
    if (folder / "state.pt").exists():
        saved = torch.load(folder / "state.pt", map_location=args.device, weights_only=True)
        absent, surplus = model.load_state_dict(saved["model"], strict=False)
        if surplus or any(not key.startswith(FROZEN) for key in absent):
            raise ValueError(
                f"{folder / 'state.pt'} is of another model (missing {absent}, surplus {surplus}); "
                "move it away to start anew"
            )
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        print(f"{stage}: going on from step {state['step']}")
    if args.export or state["step"] >= args.steps:
        export(model, state)
        return

    def save() -> None:
        kept = {k: v for k, v in model.state_dict().items() if not k.startswith(FROZEN)}
        torch.save(dict(model=kept, optimizer=optimizer.state_dict(), state=state), folder / "state.tmp")
        (folder / "state.tmp").replace(folder / "state.pt")

    batches = make_batches(state["scenes"], state["step"])
    bar = tqdm(range(state["step"], args.steps), initial=state["step"], total=args.steps, desc=stage, mininterval=10)
    sums: dict[str, float] = {}
    began, seconds = time.monotonic(), state["seconds"]
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        batch, scenes = next(batches)
        loss, numbers = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        for name, value in (dict(loss=loss.item()) | numbers).items():
            sums[name] = sums.get(name, 0.0) + value
        state = dict(step=step + 1, scenes=scenes, seconds=seconds + time.monotonic() - began)
        if (step + 1) % args.log == 0 or step + 1 == args.steps:
            span = (step % args.log) + 1
            row = dict(state, lr=rate(step, args), **{k: round(v / span, 4) for k, v in sums.items()})
            row["accuracy"] = evaluate() if (step + 1) % args.evaluate == 0 or step + 1 == args.steps else ""
            sums = {}
            bar.set_postfix({k: row[k] for k in ("loss", "accuracy") if row[k] != ""})
            new = not (folder / "log.csv").exists()
            with open(folder / "log.csv", "a", newline="") as f:
                writer = csv.DictWriter(f, row.keys())
                if new:
                    writer.writeheader()
                writer.writerow(row)
            save()
    save()
    export(model, state)


def ship_log(stage: str, folder: Path) -> None:
    """The curve goes with the checkpoint."""
    shutil.copy(RUNS / stage / "log.csv", folder / "log.csv")
