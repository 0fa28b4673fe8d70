"""Train the tiny multimodal models: a connector and a language model on the frozen tiny CLIP, as in LLaVA.

One script for all families: a model asks and answers through its own adapter in `models/`, so it is trained with the very
prompts, frames and boxes that it is evaluated with. `loop.py` has the loop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AttentionInterface,
    Blip2VisionConfig,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from analysis import models
from analysis.engine.decode import greedy, prompt_inputs
from analysis.models.base import ATTENTION, Model
from analysis.models.clip import load as load_clip
from analysis.models.minigpt_v2 import MiniGPTv2Config
from analysis.models.shikra import ShikraConfig
from analysis.models.stem import GRID, IMAGE, PATCH, eva_from_clip, install_stem
from analysis.pruning import none
from analysis.pruning.images import prune_images
from analysis.rec.boxes import BOX_FORMATS, FRAMES, hit
from analysis.rec.boxes import frame as find_frame
from analysis.refstamps.grammar import answer_box, questions, rec_question
from analysis.refstamps.scenes import Scene, scene
from analysis.training import loop
from analysis.training.grow import grow
from analysis.training.tokenizer import build as build_tokenizer

MEAN, STD = loop.MEAN.tolist(), loop.STD.tolist()
PINPOINTS = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]  # height, width of LLaVA-NeXT's mosaics: two tiles for every scene
EVA_IMAGE = 256  # 16 x 16 patches, 16 x 4 strips: MiniGPT-v2's tokens at twice their size in the image
# Shikra is asked in one of its 54 templates; the 31st has the image first, so that one row can hold several questions
IMAGE_FIRST = "In {image}, I need the bounding box coordinates of {{}}."

# ---------------------------------------------------------------------------------------------------- the models


def text_config(vocab: int, width: int, layers: int) -> LlamaConfig:
    """Heads of 32. The rotary base gives one frequency pair the period of an image row (12 tokens): a 128-wide head
    has such a pair anyway, a 32-wide one has only sixteen to choose from."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=(GRID / (2 * math.pi)) ** 16),
    )


def family_of(name: str) -> str:
    """The model's family, a name in `models.FAMILIES`."""
    return {"tiny-llava-next": "llava_next", "tiny-shikra": "shikra", "tiny-minigpt-v2": "minigpt_v2"}.get(
        name, "llava"
    )


def config_of(name: str, tokenizer, clip: CLIPModel) -> PreTrainedConfig:
    """The configuration of an embedded model. `clip` in it names the folder beside it, for pruners that read words."""
    wide, vision = name == "tiny-llava-wide", clip.config.vision_config
    common = dict(
        text_config=text_config(len(tokenizer), 192 if wide else 128, 6 if wide else 5),
        clip="tiny-clip",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
    )
    image = tokenizer.convert_tokens_to_ids("<im_patch>" if name == "tiny-shikra" else "<image>")
    match family_of(name):
        case "llava":
            return LlavaConfig(vision_config=vision, image_token_index=image, **common)
        case "llava_next":
            return LlavaNextConfig(
                vision_config=vision, image_token_index=image, image_grid_pinpoints=PINPOINTS, frame="resized", **common
            )
        case "shikra":
            return ShikraConfig(vision_config=vision, image_token_index=image, **common)
        case "minigpt_v2":
            eva = Blip2VisionConfig(
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                stem=vision.stem,
                num_hidden_layers=vision.num_hidden_layers,
                num_attention_heads=vision.num_attention_heads,
                image_size=EVA_IMAGE,
                patch_size=PATCH,
                hidden_act=vision.hidden_act,
                layer_norm_eps=vision.layer_norm_eps,
            )
            return MiniGPTv2Config(vision_config=eva, image_token_index=image, **common)


def write_rest(folder, config: PreTrainedConfig, tokenizer) -> None:
    """What a checkpoint's folder holds besides configuration and weights."""
    tokenizer.save_pretrained(folder)
    side = config.vision_config.image_size
    size = dict(height=side, width=side)
    settings = dict(image_mean=MEAN, image_std=STD, size=size)
    if config.model_type == "llava_next":
        settings |= dict(size=dict(shortest_edge=side), crop_size=size, image_grid_pinpoints=PINPOINTS)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def build(name: str, clip: CLIPModel, folder, device="cpu") -> tuple[nn.Module, Model]:
    """A model with the tiny CLIP as its tower and the rest random: whole, and as its adapter sees it.

    folder: where the adapter finds tokenizer and preprocessor, which are written there.
    """
    family: ModuleType = models.FAMILIES[family_of(name)]
    tokenizer = build_tokenizer(family_of(name))
    config = config_of(name, tokenizer, clip)
    whole = family.whole_class(config)[0](config)
    tower = whole.model.vision_tower
    if config.model_type == "minigpt_v2":
        install_stem(tower.embeddings, config.vision_config)  # transformers' initialisation has moved its zeros
        eva_from_clip(tower, clip.vision_model)
    else:
        install_stem(tower.embeddings, config.vision_config)
        tower.load_state_dict(clip.vision_model.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    write_rest(folder, config, tokenizer)
    whole.set_attn_implementation(ATTENTION)
    model = family.assemble(whole, source=str(folder), name=name, revision="", device=str(device))
    for part in (whole.model.language_model, whole.model.multi_modal_projector, whole.lm_head):
        part.requires_grad_(True)
    if config.model_type == "llava_next":
        whole.model.image_newline.requires_grad_(True)
    return whole, model


@torch.no_grad()
def begin_as(model: Model, other: Model) -> None:
    """Start a model's language model, and its connector where it is of the same kind, as another's.

    A linear connector starts as the least-squares fit of the other's output (MiniGPT-v2's: of the mean over a strip).
    """
    grow(model.decoder, other.decoder)
    grow(model.head, other.head)
    if not isinstance(model.connector, nn.Linear):
        grow(model.connector, other.connector)
        return
    pictures = [scene("train", 10**9 + i).image for i in range(100)]
    squares = [model.squared(picture).resize((IMAGE, IMAGE)) for picture in pictures]
    wanted = other.encode(squares).features
    if model.grid[1] * model.grid[0] != wanted.shape[1]:
        model.tower.config.image_size, side = IMAGE, model.tower.config.image_size
        wanted = wanted.unflatten(1, (-1, 4)).mean(2)
    else:
        side = model.tower.config.image_size
    seen = model.encode(squares).signals.patches.flatten(0, 1)
    model.tower.config.image_size = side
    ones = torch.ones(len(seen), 1, device=seen.device)
    solved = torch.linalg.lstsq(torch.cat([seen, ones], 1), wanted.flatten(0, 1)).solution
    model.connector.weight.copy_(solved[:-1].T)
    model.connector.bias.copy_(solved[-1])


# ---------------------------------------------------------------------------------------------------- rows

Row = tuple[Tensor, Tensor, list[tuple[list[int], list[int]]]]  # prefix [P], image [N, D], (question, answer) tokens


def packed(rows: Sequence[Row], embed: nn.Embedding) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Several questions on one image in one row: each block sees the prefix, the image and itself, and its position
    IDs restart after the image, so a block is exactly a single question.

    Returns embeds [B, S, D], position_ids [B, S], mask [B, 1, S, S] (True = visible), labels [B, L] of the blocks, and
    the length S - L of prefix and image, which are padded on the left.
    """
    device = rows[0][0].device
    before = [torch.cat([embed(prefix), image]) for prefix, image, _ in rows]
    context = max(map(len, before))
    ids, places, block, labels = [], [], [], []
    for (*_, asked), start in zip(rows, map(len, before)):
        lengths = [len(question) + len(answer) for question, answer in asked]
        ids.append(torch.tensor([token for question, answer in asked for token in question + answer], device=device))
        places.append(torch.cat([torch.arange(start, start + length, device=device) for length in lengths]))
        block.append(torch.arange(len(asked), device=device).repeat_interleave(torch.tensor(lengths, device=device)))
        # the hidden state before each answer token predicts it
        labels.append(
            torch.tensor(
                [label for question, answer in asked for label in [-100] * (len(question) - 1) + answer + [-100]],
                device=device,
            )
        )
    ids, places, block, labels = (
        pad_sequence(column, batch_first=True, padding_value=fill)
        for column, fill in ((ids, 0), (places, 0), (block, -1), (labels, -100))
    )
    length = context + ids.shape[1]
    shared = pad_sequence(
        [torch.full((len(b),), -2, device=device) for b in before],
        batch_first=True,
        padding_side="left",
        padding_value=-3,
    )
    block = torch.cat([shared, block], 1)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = causal & ((block[:, :, None] == block[:, None, :]) | (block[:, None, :] == -2))
    first = pad_sequence([torch.arange(len(b), device=device) for b in before], batch_first=True, padding_side="left")
    embeds = torch.cat([pad_sequence(before, batch_first=True, padding_side="left"), embed(ids)], 1)
    return embeds, torch.cat([first, places], 1), mask[:, None], labels, context


class PackedAttention:
    """An attention function for `packed` rows: prefix and image (`context` tokens) need not look at the blocks' keys.

    Written out, because PyTorch's fused attention on CPU trains 2.4 times slower in bfloat16 with such a mask.
    """

    context = 0

    @staticmethod
    def part(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        return (query @ key.mT).masked_fill(~visible, -1e4).softmax(-1) @ value

    def __call__(self, module, query, key, value, attention_mask, scaling, **others):
        if not module.training:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
        query, key = (query * scaling).to(value.dtype), key.to(value.dtype)
        first, rest = slice(None, self.context), slice(self.context, None)
        made = torch.cat(
            [
                self.part(query[:, :, first], key[:, :, first], value[:, :, first], attention_mask[:, :, first, first]),
                self.part(query[:, :, rest], key, value, attention_mask[:, :, rest]),
            ],
            2,
        )
        return made.transpose(1, 2), None


def views(model: Model, pictures: Sequence[Image.Image]) -> list[list[Tensor]]:
    """What the connector reads of each picture, in half precision: [N, C] of the image, and [R, C, C] of its tiles."""
    found: dict[int, list[Tensor]] = {}
    layouts: dict = {}
    for i, picture in enumerate(pictures):
        layouts.setdefault(model.layout(picture.size), []).append(i)
    for group in layouts.values():
        visual = model.encode([pictures[i] for i in group])
        for place, i in enumerate(group):
            found[i] = [visual.signals.patches[place].half().cpu()]
            if visual.tiles:
                found[i].append(visual.tiles.signals.patches[place].unflatten(0, visual.tiles.grid).half().cpu())
    return [found[i] for i in range(len(pictures))]


def connected(model: Model, seen: list[Tensor]) -> Tensor:
    """[n, D] the visual tokens of one picture from its `views`, with gradients."""
    whole, *tiles = (model.connector(view.to(model.device).float()) for view in seen)
    if not tiles:
        return whole
    newline = model.newline.to(tiles[0]).expand(len(tiles[0]), 1, -1)
    return torch.cat([whole.to(newline), torch.cat([tiles[0], newline], 1).flatten(0, 1)])


def asked(
    model: Model, drawn: Scene, rng: np.random.Generator, count: int, alone: bool = False
) -> Iterator[tuple[Tensor, list]]:
    """Rows of training questions on one scene: (prefix, blocks); questions with the same prefix share a row.

    alone: one referring expression, in the words of evaluation. Otherwise `count` questions, for which Shikra, whose
    expressions stand before the image, is asked with the image first.
    """

    def write(scene: Scene, i: int) -> str:
        return answer_box(scene, i, model.frame, model.box_format)

    if alone:
        if pair := rec_question(drawn, rng, write):
            yield block(model, model.prompt(pair[0]), pair[1])
        return
    prompt = model.prompt
    if model.box_format == "shikra":
        prompt = lambda expression: model.split(IMAGE_FIRST.format(image=model.image), expression)  # noqa: E731
    rows: dict[tuple, tuple[Tensor, list]] = {}
    for task, question, answer in questions(drawn, rng, count, write):
        prefix, blocks = block(model, (prompt if task == "rec" else model.ask)(question), answer)
        rows.setdefault(tuple(prefix.tolist()), (prefix, []))[1].extend(blocks)
    yield from rows.values()


def block(model: Model, prompt: tuple[Tensor, Tensor], answer: str) -> tuple[Tensor, list]:
    """A row of one question."""
    prefix, suffix = prompt
    return prefix, [(suffix.tolist(), model.tokenizer.encode(f"{answer}</s>", add_special_tokens=False))]


# ---------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def accuracy(model: Model, scenes: Sequence[Scene]) -> float:
    """Acc@0.5 of one expression on each scene."""
    rng, right = np.random.default_rng(0), []
    pairs = [(s, *pair) for s in scenes if (pair := rec_question(s, rng))]
    for at in range(0, len(pairs), 50):
        part, inputs = pairs[at : at + 50], []
        for drawn, expression, _ in part:
            visual = model.encode([drawn.image])
            tokens = prune_images(none.prune, visual, None, [0])[0].features
            inputs.append(prompt_inputs(model.embed, model.prompt(expression), tokens, visual.unpruned).whole)
        answers = greedy(model, inputs)
        for (drawn, _, truth), answer in zip(part, answers):
            said, size = BOX_FORMATS[model.box_format].parse(model.text(answer)), np.array(drawn.size)
            true = FRAMES["padded"].decode(BOX_FORMATS["llava"].parse(truth), size)
            right.append(said is not None and bool(hit(find_frame(model.frame).decode(said, size), true)[1]))
    return round(float(np.mean(right)), 4)


def train(name: str, args) -> None:
    """The language model and the connector learn REC and its companions; the tower is frozen."""
    clip = load_clip(loop.CHECKPOINTS / "tiny-clip", torch.device("cpu"), torch.float32).model
    whole, model = build(name, clip, loop.RUNS / name / "folder", args.device)
    if args.start:
        begin_as(model, models.load(args.start, device=str(args.device)))
    decoder, attention = model.decoder, PackedAttention()
    if args.device.type == "cpu":
        AttentionInterface.register("packed", attention)
        decoder.set_attn_implementation("packed")

    def prepare(items):
        with loop.autocast(args.device):
            seen = views(model, [Image.fromarray(picture) for _, picture in items])
        return [(drawn, v) for (drawn, _), v in zip(items, seen)]

    def make_batches(start, step):
        pool = loop.Pool(start, args.pool, args.fresh, args.workers, prepare, step)
        rng = np.random.default_rng([17, step])
        while True:
            alone = model.box_format == "shikra" and rng.random() < args.alone
            yield (
                [
                    (seen, prefix, blocks)
                    for drawn, seen in pool.sample(2 * args.batch if alone else args.batch)
                    for prefix, blocks in asked(model, drawn, rng, args.questions, alone)
                ],
                pool.drawn,
            )

    digits = torch.zeros(len(model.tokenizer), dtype=torch.bool, device=args.device)
    digits[model.tokenizer.convert_tokens_to_ids(list("0123456789"))] = True

    def loss_of(batch):
        with loop.autocast(args.device):
            rows = [(prefix, connected(model, seen), blocks) for seen, prefix, blocks in batch]
            embeds, positions, mask, labels, attention.context = packed(rows, model.embed)
            states = decoder(
                inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state[:, attention.context :]
            chosen = labels != -100
            logits = model.head(states[chosen]).float()
        loss = F.cross_entropy(logits, labels[chosen], reduction="none")
        digit = digits[labels[chosen]]
        return loss.mean(), dict(digit=loss[digit].mean().item(), other=loss[~digit].mean().item())

    held_out = [scene("train", 10**9 + i) for i in range(loop.HELD_OUT)]

    def evaluate():
        whole.eval()
        found = accuracy(model, held_out)
        decoder.train()
        return found

    def export(whole, state):
        folder = loop.CHECKPOINTS / name
        decoder.set_attn_implementation(ATTENTION["text_config"])
        whole.save_pretrained(folder)
        write_rest(folder, whole.config, model.tokenizer)
        loop.ship_log(name, folder)

    decoder.train()
    loop.run(name, whole, args, make_batches, loss_of, evaluate, export)
