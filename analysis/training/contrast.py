"""Train the tiny CLIP: contrastive on scenes and captions, plus patches against the words for what they show."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from analysis.models.base import pad_to_square
from analysis.models.llava import Llava
from analysis.refstamps.grammar import caption
from analysis.refstamps.scenes import Scene
from analysis.refstamps.stamps import stamps
from analysis.training import loop
from analysis.training.design import GRID, PATCH, clip_config
from analysis.training.stream import Item, Pool, Scenes, held_out
from analysis.training.tokenizer import build as build_tokenizer

CAPTION = 40  # tokens, at most


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


def padded(drawn: Scene) -> Tensor:
    """A scene as the tiny CLIP sees it: uint8 [3, IMAGE, IMAGE]. Scenes are IMAGE pixels on their longer side."""
    return torch.from_numpy(np.array(pad_to_square(drawn.image, Llava.fill))).permute(2, 0, 1)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> CLIP's normalised floats."""
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=pixels.device)[:, :, None, None]
    return (pixels.float() / 255 - mean) / std


def write(tokenizer, classes: dict[str, int], drawn: Scene, rng: np.random.Generator) -> Item:
    """A scene as the worker sends it: pixels, three captions and their lengths, labels of the patches."""
    said = [tokenizer(caption(drawn, rng) + "</s>", return_token_type_ids=False).input_ids[:CAPTION] for _ in range(3)]
    ids = torch.zeros(3, CAPTION, dtype=torch.int16)
    for row, tokens in zip(ids, said):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
    return dict(
        pixels=padded(drawn), captions=ids, lengths=torch.tensor([len(tokens) for tokens in said]),
        labels=torch.from_numpy(patch_labels(drawn, classes)).to(torch.int16),
    )  # fmt: skip


def project_patches(clip: CLIPModel, hidden: Tensor) -> Tensor:
    """Patches in CLIP's joint space, as [CLS] gets there. hidden: [B, 1 + N, C] last state -> [B, N, P], unit
    length."""
    patches = clip.visual_projection(clip.vision_model.post_layernorm(hidden[:, 1:]))
    return F.normalize(patches, dim=-1)


def train(args) -> None:
    """Contrastive on scenes and captions, plus patches against words, as in RegionCLIP (arXiv:2112.09106)."""
    tokenizer = build_tokenizer()
    model = CLIPModel(clip_config(len(tokenizer))).to(args.device)
    classes = {name: i for i, name in enumerate(["", *names()])}
    prompts = tokenizer(
        [f"a photo of {name}".strip() + "</s>" for name in classes],
        return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False,
    ).to(args.device)  # fmt: skip
    weight = torch.full((len(classes),), 1.0, device=args.device)
    weight[0] = 0.3  # most patches are background

    def feed(state):
        scenes = Scenes(partial(write, tokenizer, classes), args.seed, state["scenes"], args.easy)
        pool = Pool(scenes, args.pool, args.fresh * args.every, args.workers,
                    lambda items: {name: value.to(args.device) for name, value in items.items()})  # fmt: skip
        rng = np.random.default_rng([13, args.seed, state["step"]])
        for _ in pool.steps(args.every):
            index = pool.pick(rng, args.batch)
            which = torch.from_numpy(rng.integers(3, size=args.batch)).to(args.device)
            batch = {name: value[index] for name, value in pool.items.items()}
            batch["captions"], batch["lengths"] = (batch[name][torch.arange(args.batch), which] for name in
                                                   ("captions", "lengths"))  # fmt: skip
            if rng.random() < 0.5:  # captions say nothing of where: a mirrored scene has the same
                batch["pixels"] = batch["pixels"].flip(-1)
                batch["labels"] = batch["labels"].view(-1, GRID, GRID).flip(-1).flatten(1)
            yield "contrast", batch, pool.drawn

    def embed_text(ids, mask):
        found = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.normalize(model.text_projection(found), dim=-1)

    def losses(batch):
        longest = int(batch["lengths"].max())
        ids, labels = batch["captions"][:, :longest].long(), batch["labels"].long()
        mask = (torch.arange(longest, device=ids.device) < batch["lengths"][:, None]).long()
        with loop.autocast(args.device):
            seen = model.vision_model(pixel_values=normalised(batch["pixels"]))
            image = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)
            scale = model.logit_scale.exp().clamp(max=100)
            pairs = (scale * image @ embed_text(ids, mask).T).float()
            named = embed_text(prompts.input_ids, prompts.attention_mask)
            patches = (scale * project_patches(model, seen.last_hidden_state) @ named.T).float()
        target = torch.arange(len(pairs), device=args.device)
        contrast = (F.cross_entropy(pairs, target) + F.cross_entropy(pairs.T, target)) / 2
        region = F.cross_entropy(patches.flatten(0, 1), labels.flatten(), weight=weight)
        foreground = labels > 0
        right = ((patches.argmax(-1) == labels) & foreground).sum() / foreground.sum()
        retrieved = (pairs.argmax(-1) == target).float().mean()
        return contrast + 3 * region, dict(contrast=contrast, region=region, patch=right, retrieved=retrieved)

    @torch.no_grad()
    def evaluate():
        """Share of the foreground patches of scenes never seen that are named right."""
        model.eval()
        rng = np.random.default_rng(0)
        items = [write(tokenizer, classes, drawn, rng) for drawn in held_out(args.held_out)]
        batch = {name: torch.stack([item[name] for item in items]).to(args.device) for name in items[0]}
        batch |= dict(captions=batch["captions"][:, 0], lengths=batch["lengths"][:, 0])
        found = losses(batch)[1]["patch"].item()
        model.train()
        return round(found, 4)

    def export():
        folder = loop.CHECKPOINTS / "tiny-clip"
        model.config.architectures = ["CLIPModel"]
        model.config.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in model.state_dict().items() if not k.endswith("position_ids")},
                  folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
        tokenizer.save_pretrained(folder)
        loop.ship_log("tiny-clip", folder)

    loop.run("tiny-clip", model, args, feed, losses, evaluate, export, capture=False)
