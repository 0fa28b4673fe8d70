"""Train the tiny CLIP: contrastive on scenes and captions, plus patches against the words for what they show."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from analysis.models.stem import GRID, PATCH, StemClip, clip_config, project_patches
from analysis.refstamps.grammar import caption
from analysis.refstamps.scenes import Scene, scene
from analysis.refstamps.stamps import stamps
from analysis.training import loop
from analysis.training.tokenizer import build as build_tokenizer


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


def train(args) -> None:
    """Contrastive on scenes and captions, plus patches against words, as in RegionCLIP (arXiv:2112.09106)."""
    tokenizer = build_tokenizer()
    model = StemClip(clip_config(len(tokenizer))).to(args.device)
    classes = {name: i for i, name in enumerate(["", *names()])}
    prompts = tokenizer(
        [f"a photo of {name}".strip() + "</s>" for name in classes],
        return_tensors="pt",
        padding=True,
        padding_side="right",
        return_token_type_ids=False,
    ).to(args.device)

    def prepare(items):
        return [
            (torch.from_numpy(loop.padded(picture)), drawn, patch_labels(drawn, classes)) for drawn, picture in items
        ]

    def make_batches(start, step):
        pool = loop.Pool(start, args.pool, args.fresh, args.workers, prepare, step)
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
        tokens = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False
        ).to(args.device)
        labels = labels.to(args.device)
        with loop.autocast(args.device):
            seen = model.vision_model(pixel_values=loop.normalised(pixels.to(args.device)))
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
        return (
            contrast,
            region,
            dict(contrast=contrast.item(), region=region.item(), patch=right.item(), retrieved=retrieved.item()),
        )

    def loss_of(batch):
        contrast, region, numbers = losses(batch)
        return contrast + 3 * region, numbers

    held_out = [scene("train", 10**9 + i) for i in range(loop.HELD_OUT)]

    @torch.no_grad()
    def evaluate():
        model.eval()
        rng = np.random.default_rng(0)
        batch = (
            torch.from_numpy(np.stack([loop.padded(np.asarray(s.image)) for s in held_out])),
            [caption(s, rng) + "</s>" for s in held_out],
            torch.from_numpy(np.stack([patch_labels(s, classes) for s in held_out])),
        )
        numbers = losses(batch)[2]
        model.train()
        return round(numbers["patch"], 4)

    def export(model, state):
        folder = loop.CHECKPOINTS / "tiny-clip"
        model.config.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        tokenizer.save_pretrained(folder)
        loop.ship_log("tiny-clip", folder)

    loop.run("tiny-clip", model, args, make_batches, loss_of, evaluate, export)
