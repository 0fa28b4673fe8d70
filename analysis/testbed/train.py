"""Train the tiny models on RefStamps.

    python -m analysis.testbed.train clip  --steps 1500
    python -m analysis.testbed.train llava --steps 12000 --decay 1500

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
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm
from transformers import (AttentionInterface, CLIPConfig, CLIPModel, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .. import ROOT
from ..decode import greedy
from ..models import load
from ..models.clip import load as load_clip
from ..models.llava import SYSTEM, pad_to_square
from ..positions import layout
from ..rec.boxes import DIALECTS, FRAMES, hit
from .grammar import caption, questions, rec_question
from .scenes import Scene, scene
from .stamps import stamps
from .tokenizer import build as build_tokenizer
from .tower import GRID, IMAGE, PATCH, StemClip, clip_config, install_stem, project_patches

CHECKPOINTS = Path(__file__).parent / "checkpoints"
RUNS = ROOT / "runs"
HELD_OUT = 200  # scenes of the training side that are never trained on, to follow the accuracy without touching val
MEAN, STD = torch.tensor([0.481, 0.458, 0.408]), torch.tensor([0.269, 0.261, 0.276])  # CLIP's, rounded
FROZEN = "model.vision_tower."  # comes from the tiny CLIP and is not saved again


# ---------------------------------------------------------------------------------------------------- scenes


def padded(picture: Image.Image) -> np.ndarray:
    """A scene as the model sees it: uint8 [3, IMAGE, IMAGE]. Scenes are IMAGE pixels on their longer side."""
    return np.asarray(pad_to_square(picture)).transpose(2, 0, 1).copy()


def objects_wanted(index: int) -> int | None:
    """Curriculum: many one-object scenes at first, 15 % for ever; of the rest, three in ten of two objects, the
    others as in evaluation."""
    rng = np.random.default_rng([7, index])
    if rng.random() < max(0.15, 0.7 - index / 20_000):
        return 1
    return 2 if rng.random() < 0.3 else None


class FreshScenes(IterableDataset):
    """Endless training scenes from `start`, without their PIL pictures: (scene, pixels)."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[tuple[Scene, np.ndarray]]:
        info = get_worker_info()
        index = self.start + info.id
        while True:
            drawn = scene("train", index, objects_wanted(index))
            yield replace(drawn, image=None), padded(drawn.image)
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
        return [(torch.from_numpy(pixels), drawn, patch_labels(drawn, classes)) for drawn, pixels in items]

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
        batch = (torch.from_numpy(np.stack([padded(s.image) for s in held_out])),
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
        ship_log("clip", folder)

    run("clip", model, args, make_batches, loss_of, evaluate, export)


# ---------------------------------------------------------------------------------------------------- LLaVA


def llava_config(tokenizer, vision: CLIPVisionConfig, width: int = 128, layers: int = 5) -> LlavaConfig:
    """Heads of 32. The rotary base gives one frequency pair the period of an image row (12 tokens): a 128-wide head
    has such a pair anyway, a 32-wide one has only sixteen to choose from."""
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
                       num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=width // 32,
                       max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=1, eos_token_id=3,
                       pad_token_id=0,
                       rope_parameters=dict(rope_type="default", rope_theta=(GRID / (2 * math.pi)) ** 16))
    return LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2,
                       image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=GRID * GRID,
                       tie_word_embeddings=False)


def build_llava(tokenizer, clip: CLIPModel) -> LlavaForConditionalGeneration:
    """Random language model and connector on the frozen tiny CLIP."""
    model = LlavaForConditionalGeneration(llava_config(tokenizer, clip.config.vision_config))
    tower = model.model.vision_tower
    install_stem(tower.embeddings, clip.config.vision_config)
    tower.load_state_dict(clip.vision_model.state_dict())
    tower.eval().requires_grad_(False)
    return model


@torch.no_grad()
def encode(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the connector reads: uint8 [B, 3, H, W] -> [B, N, C] of the second-last block, [CLS] dropped."""
    seen = model.model.vision_tower(pixel_values=normalised(pixels), output_hidden_states=True)
    return seen.hidden_states[model.config.vision_feature_layer][:, 1:]


def pack(tokenizer, asked: list[list[tuple[str, str, str]]], prefix: int, device):
    """Several questions on one image in one row: each block sees the prefix, the image and itself, and its position
    IDs restart after the image, so a block is exactly a single question.

    Returns ids [B, L] of the blocks, position_ids [B, prefix + N + L], mask [B, 1, S, S] (True = visible), labels [B, L].
    """
    context = prefix + GRID * GRID
    rows = []
    for pairs in asked:
        ids, places, block, labels = [], [], [], []
        for b, (_, question, answer) in enumerate(pairs):
            q = tokenizer.encode(f"\n{question} ASSISTANT:", add_special_tokens=False)
            a = tokenizer.encode(f"{answer}</s>", add_special_tokens=False)
            ids += q + a
            places += range(context, context + len(q) + len(a))
            block += [b] * (len(q) + len(a))
            # the hidden state before each answer token predicts it
            labels += [-100] * (len(q) - 1) + a + [-100]
        rows.append((ids, places, block, labels))
    length = max(len(ids) for ids, *_ in rows)

    def stack(column: int, fill: int) -> Tensor:
        return torch.tensor([row[column] + [fill] * (length - len(row[column])) for row in rows], device=device)

    ids, places, block, labels = stack(0, 0), stack(1, context), stack(2, -1), stack(3, -100)
    block = F.pad(block, (context, 0), value=-2)
    causal = torch.ones(context + length, context + length, dtype=torch.bool, device=device).tril()
    mask = causal & ((block[:, :, None] == block[:, None, :]) | (block[:, None, :] == -2))
    positions = F.pad(places, (context, 0))
    positions[:, :context] = torch.arange(context, device=device)
    return ids, positions, mask[:, None], labels


def packed_attention(context: int):
    """An attention function for `pack`'s rows: prefix and image (`context` tokens) need not look at the blocks' keys.

    Written out, because PyTorch's fused attention on CPU trains 2.4 times slower in bfloat16 with such a mask.
    """
    def part(query, key, value, visible):
        return (query @ key.mT).masked_fill(~visible, -1e4).softmax(-1) @ value

    def attend(module, query, key, value, attention_mask, scaling, **others):
        if not module.training:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        query, key = (query * scaling).to(value.dtype), key.to(value.dtype)
        first, rest = slice(None, context), slice(context, None)
        made = torch.cat([part(query[:, :, first], key[:, :, first], value[:, :, first],
                               attention_mask[:, :, first, first]),
                          part(query[:, :, rest], key, value, attention_mask[:, :, rest])], 2)
        return made.transpose(1, 2), None

    return attend


def train_llava(args) -> None:
    """The language model and the connector learn REC and its companions; the tower is frozen, as in LLaVA."""
    tokenizer = build_tokenizer()
    model = build_llava(tokenizer, load_clip(CHECKPOINTS / "tiny-clip", torch.device("cpu"), torch.float32).model).to(args.device)
    if args.start:
        begun = load(str(args.start), device=str(args.device))
        for part, weights in ((model.model.language_model, begun.decoder), (model.lm_head, begun.head),
                              (model.model.multi_modal_projector, begun.connector)):
            part.load_state_dict(weights.state_dict())
    core, embed = model.model, model.get_input_embeddings()
    before = torch.tensor(tokenizer.encode(f"<s>{SYSTEM} USER: ", add_special_tokens=False), device=args.device)
    if args.device.type == "cpu":
        AttentionInterface.register("packed", packed_attention(len(before) + GRID * GRID))
        core.language_model.set_attn_implementation("packed")

    def prepare(items):
        pixels = torch.from_numpy(np.stack([pixels for _, pixels in items])).to(args.device)
        with autocast(args.device):
            features = encode(model, pixels)
        return [(drawn, f) for (drawn, _), f in zip(items, features.half().cpu())]

    def make_batches(start, step):
        pool = Pool(start, args.pool, args.fresh, args.workers, prepare, step)
        rng = np.random.default_rng([17, step])
        while True:
            items = pool.sample(args.batch)
            asked = [questions(drawn, rng, args.questions) for drawn, _ in items]
            features = torch.stack([f for _, f in items]).to(args.device).float()
            yield (features, pack(tokenizer, asked, len(before), args.device)), pool.drawn

    def loss_of(batch):
        features, (ids, positions, mask, labels) = batch
        with autocast(args.device):
            visual = core.multi_modal_projector(features)
            embeds = torch.cat([embed(before).expand(len(ids), -1, -1), visual, embed(ids)], 1)
            states = core.language_model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask,
                                         use_cache=False).last_hidden_state[:, -ids.shape[1]:]
            chosen = labels != -100
            logits = model.lm_head(states[chosen]).float()
        loss = F.cross_entropy(logits, labels[chosen], reduction="none")
        digit = digits[labels[chosen]]
        return loss.mean(), dict(digit=loss[digit].mean().item(), other=loss[~digit].mean().item())

    digits = torch.zeros(len(tokenizer), dtype=torch.bool, device=args.device)
    digits[tokenizer.convert_tokens_to_ids(list("0123456789"))] = True
    held_out = [scene("train", 10**9 + i) for i in range(HELD_OUT)]

    @torch.no_grad()
    def evaluate():
        """Acc@0.5 of one expression on each of HELD_OUT training-side scenes that are never trained on."""
        model.eval()
        rng = np.random.default_rng(0)
        asked = [(s, rec_question(s, rng)) for s in held_out]
        asked = [(s, pair) for s, pair in asked if pair]
        right = []
        for at in range(0, len(asked), 50):
            part = asked[at:at + 50]
            pixels = torch.from_numpy(np.stack([padded(s.image) for s, _ in part])).to(args.device)
            visual = core.multi_modal_projector(encode(model, pixels))
            rows, places = [], []
            for v, (_, (question, _)) in zip(visual, part):
                after = torch.tensor(tokenizer.encode(f"\n{question} ASSISTANT:", add_special_tokens=False),
                                     device=args.device)
                rows.append(torch.cat([embed(before), v, embed(after)]))
                places.append(layout(len(before), torch.arange(len(v), device=args.device), len(v), len(after)))
            answers = greedy(core.language_model, model.lm_head, rows, places, embed=embed, max_new_tokens=16,
                             eos=tokenizer.eos_token_id)
            for (s, (_, truth)), answer in zip(part, answers):
                said = DIALECTS["llava"].parse(tokenizer.decode(answer))
                frame = FRAMES["padded"].decode
                true = frame(DIALECTS["llava"].parse(truth), np.array(s.size))
                right.append(said is not None and bool(hit(frame(said, np.array(s.size)), true, "ge")[1]))
        model.train()
        core.vision_tower.eval()
        return round(float(np.mean(right)), 4)

    def export(model, state):
        folder = CHECKPOINTS / "tiny-llava"
        model.config.clip = "tiny-clip"  # the folder beside it, for pruners that compare patches with words
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = dict(image_mean=MEAN.tolist(), image_std=STD.tolist(), size=dict(height=IMAGE, width=IMAGE))
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        ship_log("llava", folder)

    run("llava", model, args, make_batches, loss_of, evaluate, export)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["clip", "llava"])
    parser.add_argument("--steps", type=int, default=10_000, help="train up to this step in all")
    parser.add_argument("--decay", type=int, default=0, help="linear fall of the learning rate over the last steps")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--questions", type=int, default=6, help="questions on each image (llava)")
    parser.add_argument("--pool", type=int, default=4000, help="scenes kept to draw from")
    parser.add_argument("--fresh", type=int, default=12, help="new scenes a step")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--log", type=int, default=50, help="steps between two lines of log.csv")
    parser.add_argument("--evaluate", type=int, default=500, help="steps between two measurements of the accuracy")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="llava without saved state: begin with the weights of this folder")
    parser.add_argument("--export", action="store_true", help="only write the checkpoint from the saved state")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    dict(clip=train_clip, llava=train_llava)[args.stage](args)


if __name__ == "__main__":
    main()
