"""Train the tiny models on RefStamps.

    python -m analysis.testbed.train tiny-clip   --steps 1600 --decay 400 --lr 1.5e-3
    python -m analysis.testbed.train tiny-llava  --steps 13500 --decay 7000
    python -m analysis.testbed.train tiny-shikra --steps 6000 --decay 5000 --start tiny-llava

Each stage keeps `RUNS/<stage>/state.pt` (weights, optimizer, step) and `log.csv`, and goes on from there when it is
started again, also with more steps: the learning rate is constant after its warm-up and falls linearly to zero over
the last `--decay` steps, so a run can be lengthened as long as it has not begun to decay. At the end (and with
`--export`, at any time) the stage writes its checkpoint in Hugging Face form to `analysis/testbed/checkpoints/`.

Scenes are drawn afresh all the time by worker processes; a pool holds the last few thousand, so that a scene is asked
about several times, each time with other questions (drawing costs more than a step on two cores).
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from .. import ROOT
from ..models import MODELS
from ..models.base import pad_to_square
from ..models.llava import Llava
from .grammar import caption
from .scenes import Scene, scene
from .stamps import stamps
from .tokenizer import build as build_tokenizer
from .tower import GRID, PATCH, StemClip, clip_config, project_patches

CHECKPOINTS = Path(__file__).parent / "checkpoints"
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
        [dict(params=[p for p in trainable if p.ndim > 1], weight_decay=0.05),
         dict(params=[p for p in trainable if p.ndim <= 1], weight_decay=0.0)], lr=args.lr, betas=(0.9, 0.98))
    state = dict(step=0, scenes=0, seconds=0.0)
    if (folder / "state.pt").exists():
        saved = torch.load(folder / "state.pt", map_location=args.device, weights_only=True)
        absent, surplus = model.load_state_dict(saved["model"], strict=False)
        if surplus or any(not key.startswith(FROZEN) for key in absent):
            raise ValueError(f"{folder / 'state.pt'} is of another model (missing {absent}, surplus {surplus}); "
                             "move it away to start anew")
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


# ---------------------------------------------------------------------------------------------------- CLIP


def names() -> list[str]:
    """Every "colour noun" of the stamps: what a patch can be."""
    return list(dict.fromkeys(f"{s.colour} {s.noun}".strip() for s in stamps()))


def patch_labels(drawn: Scene, classes: dict[str, int]) -> np.ndarray:
    """[N] class of the topmost object whose box holds the patch's centre; 0 for background."""
    width, height = drawn.size
    left, top = ((max(drawn.size) - side) // 2 for side in (width, height))
    centres = (np.arange(GRID) + 0.5) * PATCH
    labels = np.zeros((GRID, GRID), dtype=np.int64)
    for obj in drawn.objects:  # later objects are drawn over earlier ones
        x1, y1, x2, y2 = obj.box
        rows = (centres >= y1 + top) & (centres < y2 + top)
        columns = (centres >= x1 + left) & (centres < x2 + left)
        labels[np.ix_(rows, columns)] = classes[f"{obj.colour} {obj.noun}".strip()]
    return labels.ravel()


def train_clip(args) -> None:
    """Contrastive on scenes and captions, plus patches against the words for what they show (as RegionCLIP)."""
    tokenizer = build_tokenizer()
    model = StemClip(clip_config(len(tokenizer))).to(args.device)
    classes = {name: i for i, name in enumerate(["", *names()])}
    prompts = tokenizer([f"a photo of {name}".strip() + "</s>" for name in classes], return_tensors="pt",
                        padding=True, padding_side="right", return_token_type_ids=False).to(args.device)

    def prepare(items):
        return [(torch.from_numpy(padded(picture)), drawn, patch_labels(drawn, classes)) for drawn, picture in items]

    def make_batches(start, step):
        pool = Pool(start, args.pool, args.fresh, args.workers, prepare, step)
        rng = np.random.default_rng([13, step])
        while True:
            items = pool.sample(args.batch)
            texts = [caption(drawn, rng) + "</s>" for _, drawn, _ in items]
            pixels = torch.stack([p for p, _, _ in items])
            labels = torch.from_numpy(np.stack([label for _, _, label in items]))
            if rng.random() < 0.5:  # captions say nothing of where: a mirrored scene has the same
                pixels, labels = pixels.flip(-1), labels.view(-1, GRID, GRID).flip(-1).flatten(1)
            yield (pixels, texts, labels), pool.drawn

    def embed_text(tokens):
        return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)

    def losses(batch):
        pixels, texts, labels = batch
        tokens = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right",
                           return_token_type_ids=False).to(args.device)
        labels = labels.to(args.device)
        with autocast(args.device):
            seen = model.vision_model(pixel_values=normalised(pixels.to(args.device)))
            image = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)
            scale = model.logit_scale.exp().clamp(max=100)
            pairs = (scale * image @ embed_text(tokens).T).float()
            patches = (scale * project_patches(model, seen.last_hidden_state) @ embed_text(prompts).T).float()
        target = torch.arange(len(pairs), device=args.device)
        contrast = (F.cross_entropy(pairs, target) + F.cross_entropy(pairs.T, target)) / 2
        weight = torch.full((len(classes),), 1.0, device=args.device)
        weight[0] = 0.3  # most patches are background
        region = F.cross_entropy(patches.flatten(0, 1), labels.flatten(), weight=weight)
        foreground = labels > 0
        right = (patches.argmax(-1) == labels)[foreground].float().mean()
        retrieved = (pairs.argmax(-1) == target).float().mean()
        return contrast, region, dict(contrast=contrast.item(), region=region.item(), patch=right.item(),
                                      retrieved=retrieved.item())

    def loss_of(batch):
        contrast, region, numbers = losses(batch)
        return contrast + 3 * region, numbers

    held_out = [scene("train", 10**9 + i) for i in range(HELD_OUT)]

    @torch.no_grad()
    def evaluate():
        model.eval()
        rng = np.random.default_rng(0)
        batch = (torch.from_numpy(np.stack([padded(np.asarray(s.image)) for s in held_out])),
                 [caption(s, rng) + "</s>" for s in held_out],
                 torch.from_numpy(np.stack([patch_labels(s, classes) for s in held_out])))
        numbers = losses(batch)[2]
        model.train()
        return round(numbers["patch"], 4)

    def export(model, state):
        folder = CHECKPOINTS / "tiny-clip"
        model.config.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        tokenizer.save_pretrained(folder)
        ship_log("tiny-clip", folder)

    run("tiny-clip", model, args, make_batches, loss_of, evaluate, export)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tiny-clip", *MODELS])
    parser.add_argument("--steps", type=int, default=10_000, help="train up to this step in all")
    parser.add_argument("--decay", type=int, default=0, help="linear fall of the learning rate over the last steps")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--questions", type=int, default=6, help="questions on each image (not tiny-clip)")
    parser.add_argument("--alone", type=float, default=0.5,
                        help="tiny-shikra: share of the steps that ask with the image after the expression")
    parser.add_argument("--pool", type=int, default=4000, help="scenes kept to draw from")
    parser.add_argument("--fresh", type=int, default=12, help="new scenes a step")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--log", type=int, default=50, help="steps between two lines of log.csv")
    parser.add_argument("--evaluate", type=int, default=500, help="steps between two measurements of the accuracy")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="a model without saved state begins as this one: embedded or a folder of the same shape or smaller")
    parser.add_argument("--export", action="store_true", help="only write the checkpoint from the saved state")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.stage == "tiny-clip":
        train_clip(args)
    else:
        from .instruct import train_model
        train_model(args.stage, args)


if __name__ == "__main__":
    main()
