"""Train the tiny multimodal models: a connector and a language model on a frozen tower, as in LLaVA.

One script for all families: a model asks and answers through its own adapter in `models/`, so it is trained with the
very prompts, frames and boxes that it is evaluated with. The workers (`stream.py`) write and tokenize the questions,
the frozen tower sees each scene once, and a step is index arithmetic on the device, which `loop.py` can capture as one
graph.

What stands before the image varies in length in half of the rows, as conversations do: some words are put in after <s>.
Without that a model learns the distance from <s> to the image by heart, and a constant shift of all IDs destroys it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from analysis import models
from analysis.engine.decode import for_decoder, greedy, prompt_inputs
from analysis.models import clip, towers
from analysis.models.base import ATTENTION, Model
from analysis.pruning import none
from analysis.pruning.images import prune_images
from analysis.rec.boxes import BOX_FORMATS, frame, hit
from analysis.refstamps.grammar import answer_box, questions, rec_question
from analysis.refstamps.scenes import Scene
from analysis.training import imitate, loop
from analysis.training.design import GRID, TOWER, build, family_of, write_rest
from analysis.training.grow import grow
from analysis.training.stream import Item, Pool, Scenes, held_out

WRITTEN = 16  # questions that are written for a scene; a step asks some of them
LONG = "the brown dog that is above the yellow guitar and left of the red car"
FILLED = 40  # words, at most, that are put in before the image
FITTED = 100  # scenes that a linear connector is fitted on at first
PREFIXES = 512  # variants of the text before the image
# Shikra is asked in one of its 54 templates; the 31st has the image first, so that one row can hold several questions
IMAGE_FIRST = "In {image}, I need the bounding box coordinates of {{}}."


# ---------------------------------------------------------------------------------------------------- in the workers


class Blocks(NamedTuple):
    """Questions with their answers as padded tokens. ids: [Q, BLOCK]; asked, length: [Q], tokens of the question, and
    with its answer."""

    ids: Tensor
    asked: Tensor
    length: Tensor


def blocks(pairs: Sequence[tuple[list[int], list[int]]], longest: int) -> Blocks:
    """(question tokens, answer tokens) as `Blocks` of `longest` places."""
    ids = torch.zeros(len(pairs), longest, dtype=torch.int16)
    for row, (question, answer) in zip(ids, pairs):
        row[: len(question) + len(answer)] = torch.tensor(question + answer, dtype=torch.int16)
    asked, length = (torch.tensor(x, dtype=torch.int16) for x in zip(*((len(q), len(q) + len(a)) for q, a in pairs)))
    return Blocks(ids, asked, length)


def asks_first(model: Model) -> bool:
    """Whether a family's own question puts the expression before the image, so that a row holds one question only."""
    return model.prompt("dog")[0].tolist() != model.prompt("cat")[0].tolist()


class Writer:
    """What a worker makes of a scene: the tower's input and tokenized questions, in the model's own words.

    model: on the CPU, for its words and pixels only.
    """

    def __init__(self, model: Model):
        self.model, self.first = model, asks_first(model)
        box = BOX_FORMATS[model.box_format].format(
            np.array([0.123, 0.456, 0.789, 0.987]) * (190 if model.grid is None else 1)
        )
        _, question, answer = self.tokens(self.prompt(LONG), box)
        self.longest = up_to_eight(len(question) + len(answer))

    def tokens(self, prompt: tuple[Tensor, Tensor], answer: str) -> tuple[list[int], list[int], list[int]]:
        """Tokens before the image, of the question after it, and of the answer."""
        prefix, suffix = prompt
        said = self.model.tokenizer.encode(answer, add_special_tokens=False)
        return prefix.tolist(), suffix.tolist(), [*said, self.model.eos]

    def prompt(self, expression: str) -> tuple[Tensor, Tensor]:
        """The family's question for a box, or one that has the image first."""
        if not self.first:
            return self.model.prompt(expression)
        return self.model.split(IMAGE_FIRST.format(image=self.model.image), expression)

    def pixels(self, drawn: Scene) -> Tensor:
        """The tower's input of one scene, in half precision; Qwen's patches, as many as the image has, are padded."""
        pixels = self.model.pixels([drawn.image])[0].half()
        return F.pad(pixels, (0, 0, 0, 4 * GRID**2 - len(pixels))) if pixels.dim() == 2 else pixels

    def box(self, drawn: Scene, i: int) -> str:
        return answer_box(drawn, i, self.model.frame, self.model.box_format)

    def packed(self, drawn: Scene, rng: np.random.Generator, count: int) -> Blocks:
        """`count` questions whose text before the image is the same."""
        pairs = []
        while len(pairs) < count:
            for task, question, answer in questions(drawn, rng, count, self.box):
                _, *pair = self.tokens((self.prompt if task == "rec" else self.model.ask)(question), answer)
                if sum(map(len, pair)) <= self.longest:
                    pairs.append(pair)
        return blocks(pairs[:count], self.longest)

    def single(self, drawn: Scene, rng: np.random.Generator, count: int, room: int) -> Item:
        """`count` referring expressions in the words of evaluation, with what stands before the image [count, room]."""
        prefixes, pairs = [], []
        while len(pairs) < count:
            if (found := rec_question(drawn, rng, self.box)) is None:
                found = ("thing", self.box(drawn, 0))
                if len(drawn.objects) > 1:
                    found = (drawn.objects[0].noun, self.box(drawn, 0))
            prefix, *pair = self.tokens(self.model.prompt(found[0]), found[1])
            if len(prefix) <= room:
                prefixes.append(torch.tensor(prefix))
                pairs.append(pair)
        made = blocks(pairs, self.longest)
        return dict(
            single_prefix=pad_sequence([*prefixes, torch.zeros(room, dtype=torch.int64)], batch_first=True,
                                       padding_side="left")[:-1].to(torch.int16),
            single_before=torch.tensor([len(prefix) for prefix in prefixes], dtype=torch.int16),
            single_ids=made.ids, single_asked=made.asked, single_length=made.length,
        )  # fmt: skip

    def __call__(self, drawn: Scene, rng: np.random.Generator) -> Item:
        made = self.packed(drawn, rng, WRITTEN)
        item = dict(pixels=self.pixels(drawn), size=torch.tensor(drawn.size),
                    ids=made.ids, asked=made.asked, length=made.length)  # fmt: skip
        return item | (self.single(drawn, rng, WRITTEN // 4, room(self.model)) if self.first else {})


def up_to_eight(length: int) -> int:
    """The next multiple of eight, which GPUs like."""
    return -(-length // 8) * 8


def room(model: Model) -> int:
    """Places for the text before the image."""
    return up_to_eight(len(model.prompt(LONG)[0]) + FILLED)


def fillers(tokenizer) -> list[int]:
    """Tokens of whole words, which can be put in before the image."""
    return sorted(i for piece, i in tokenizer.get_vocab().items() if piece[0] == "▁" and piece[1:].isalpha())


def digit_tokens(tokenizer, device="cpu") -> Tensor:
    """[V] bool: the tokens that are a digit."""
    digits = torch.zeros(len(tokenizer), dtype=torch.bool, device=device)
    digits[tokenizer.convert_tokens_to_ids(list("0123456789"))] = True
    return digits


def prefixes(model: Model, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Variants of the text before the image [PREFIXES, room], padded on the left, and their lengths; half have words
    put in."""
    standard = (Writer(model).prompt("dog"))[0].cpu()
    words, rows = fillers(model.tokenizer), []
    for _ in range(PREFIXES):
        count = int(rng.integers(1, FILLED + 1)) if rng.random() < 0.5 else 0
        rows.append(torch.cat([standard[:1], torch.from_numpy(rng.choice(words, count)), standard[1:]]))
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence([*rows, torch.zeros(room(model), dtype=torch.int64)], batch_first=True, padding_side="left")
    return padded[:-1], lengths


# ---------------------------------------------------------------------------------------------------- on the device


@torch.no_grad()
def views(model: Model, pixels: Tensor, sizes: Tensor) -> Item:
    """What is kept of B scenes: seen [B, N, C], what the connector reads, in half precision; kind [B, N], 1 a token of
    the image, 2 a newline, 0 none; place [B, N, planes] and text_start [B], the unpruned IDs."""
    found: dict[int, Item] = {}
    layouts: dict = {}
    for i, size in enumerate(sizes.tolist()):
        layouts.setdefault((model.layout(tuple(size)), tuple(size)), []).append(i)
    for (_, size), group in layouts.items():
        with loop.autocast(model.device):
            visual = model.see(pixels[group].to(model.device, model.dtype), size)
            seen = visual.signals.patches.half()
        rows, kinds = [seen], [torch.ones(visual.features.shape[1])]
        if visual.tiles is not None:
            (high, wide), patches = visual.tiles.grid, visual.tiles.signals.patches.half()
            laid = F.pad(patches.unflatten(1, (high, wide)), (0, 0, 0, 1))
            rows.append(laid.flatten(1, 2))
            kinds.append(torch.cat([torch.ones(high, wide), torch.full((high, 1), 2.0)], 1).flatten())
        seen, kind = torch.cat(rows, 1), torch.cat(kinds).to(torch.int8).to(pixels.device)
        unpruned = visual.unpruned
        place = unpruned.visual.to(pixels.device, torch.int16).view(len(kind), -1)
        for at, i in enumerate(group):
            found[i] = dict(seen=seen[at], kind=kind, place=place, text_start=unpruned.text_start)
    made = dict(text_start=torch.tensor([found[i]["text_start"] for i in range(len(sizes))], device=pixels.device))
    for name in ("seen", "kind", "place"):
        column = pad_sequence([found[i][name] for i in range(len(sizes))], batch_first=True)
        made[name] = column.new_zeros(len(column), longest_image(model), *column.shape[2:])
        made[name][:, : column.shape[1]] = column
    return made


def longest_image(model: Model) -> int:
    """Most tokens that a training scene takes."""
    whole = model.grid[0] * model.grid[1] if model.grid else GRID**2
    return whole if not hasattr(model, "mosaic") else whole * 3 + 2 * max(model.grid)


def connector(model: Model):
    """[..., C] -> [..., D] what makes visual tokens of patches."""
    return towers.merger(model.tower) if model.box_format == "qwen2_5_vl" else model.connector


def connected(model: Model, seen: Tensor, kind: Tensor) -> Tensor:
    """[B, N, D] visual tokens of `views`, with gradients."""
    tokens = connector(model)(seen.float())
    if hasattr(model, "newline"):
        tokens = torch.where((kind == 2)[..., None], model.newline.to(tokens), tokens)
    return tokens


def packed(
    embed: nn.Embedding, prefix: Tensor, before: Tensor, image: Tensor, views: Item, asked: Blocks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Several questions on one image in one row: each block sees the prefix, the image and itself, and its position
    IDs restart after the image, so a block is exactly a single question.

    prefix: [B, P], padded on the left; before: [B], its true length; image: [B, N, D]; views: kind, place, text_start
    of `views`; asked: blocks [B, K, L]. Returns embeds [B, S, D], position_ids [B, S] or [B, S, planes], mask
    [B, 1, S, S] (True = visible) and labels [B, K * L]: for each place of the blocks the token it predicts, or -100.
    """
    device, (rows, room), (count, longest) = prefix.device, prefix.shape, asked.ids.shape[1:]
    valid, within = views["kind"] > 0, torch.arange(longest, device=device)
    ids, length = asked.ids.long(), asked.length[..., None]
    shift = torch.arange(room, device=device) - (room - before[:, None])
    text = (before + views["text_start"])[:, None, None] + within.expand(rows, count, -1)
    planes = views["place"].shape[2]
    positions = [shift.clamp(min=0)[..., None].expand(-1, -1, planes), before[:, None, None] + views["place"],
                 text.flatten(1)[..., None].expand(-1, -1, planes)]  # fmt: skip
    positions = torch.cat(positions, 1)
    block = torch.arange(count, device=device)[:, None].expand(rows, count, longest)
    block = torch.where(within < length, block, -2).flatten(1)
    block = torch.cat([torch.where(shift >= 0, -1, -2), torch.where(valid, -1, -2), block], 1)
    causal = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool, device=device).tril()
    seen = (block[:, None] == block[:, :, None]) | (block[:, None] == -1)
    mask = causal & seen & (block[:, None] != -2) | torch.eye(len(causal), dtype=torch.bool, device=device)
    following = F.pad(ids[..., 1:], (0, 1))
    predicts = (within >= asked.asked[..., None] - 1) & (within < length - 1)
    labels = torch.where(predicts, following, -100).flatten(1)
    embeds = torch.cat([embed(prefix.long()), image, embed(ids.flatten(1))], 1)
    return embeds, positions if planes > 1 else positions[..., 0], mask[:, None], labels


class PackedAttention:
    """An attention function for `packed` rows on the CPU: prefix and image (`context` places) need not look at the
    blocks.

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
        made = [
            self.part(query[:, :, first], key[:, :, first], value[:, :, first], attention_mask[:, :, first, first]),
            self.part(query[:, :, rest], key, value, attention_mask[:, :, rest]),
        ]
        return torch.cat(made, 2).transpose(1, 2), None


# ---------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def begin_as(model: Model, other: Model) -> None:
    """Start a model's language model, and its connector where it is of the same kind, as another's.

    A linear connector starts as the least-squares fit of the other's output (MiniGPT-v2's: of the mean over a strip;
    Qwen's: the last layer of its merger).
    """
    grow(model.decoder, other.decoder)
    grow(model.head, other.head)
    qwen = model.box_format == "qwen2_5_vl"
    last = model.connector.mlp[2] if qwen else model.connector
    if not isinstance(last, nn.Linear):
        grow(model.connector, other.connector)
        return
    side = other.tower.config.image_size
    squares = [other.squared(drawn.image).resize((side, side)) for drawn in held_out(FITTED)]
    wanted = other.encode(squares).features
    if not qwen and model.grid != other.grid:
        wanted = wanted.unflatten(1, (-1, 4)).mean(2)
    patches = model.encode(squares).signals.patches
    if qwen:
        norm, mlp = model.connector.ln_q, model.connector.mlp
        merged = norm(patches.unflatten(-1, (4, -1))).flatten(-2)
        patches = mlp[1](mlp[0](merged))
    seen = patches.flatten(0, 1)
    ones = torch.ones(len(seen), 1, device=seen.device)
    solved = torch.linalg.lstsq(torch.cat([seen, ones], 1), wanted.flatten(0, 1)).solution
    last.weight[: solved.shape[1]] = solved[:-1].T
    last.bias[: solved.shape[1]] = solved[-1]


@torch.no_grad()
def accuracy(model: Model, scenes: Sequence[Scene]) -> float:
    """Acc@0.5 of one expression on each scene."""
    rng, right = np.random.default_rng(0), []
    pairs = [(s, *pair) for s in scenes if (pair := rec_question(s, rng))]
    for at in range(0, len(pairs), 100):
        part, inputs = pairs[at : at + 100], []
        for drawn, expression, _ in part:
            visual = model.encode([drawn.image])
            tokens = prune_images(none.prune, visual, None, [0])[0].features
            inputs.append(prompt_inputs(model.embed, model.prompt(expression), tokens, visual.unpruned).whole)
        answers = greedy(model, inputs)
        for (drawn, _, truth), answer in zip(part, answers):
            said, size = BOX_FORMATS[model.box_format].parse(model.text(answer)), np.array(drawn.size)
            true = frame("padded").decode(BOX_FORMATS["llava"].parse(truth), size)
            right.append(said is not None and bool(hit(frame(model.frame).decode(said, size), true)[1]))
    return round(float(np.mean(right)), 4)


def on_cpu(model: Model) -> Model:
    """The model for `Writer`: its words and pixels without its weights, which the workers must not hold on a GPU."""
    return replace(model, embed=nn.Embedding(1, 1), decoder=None, head=None, connector=None)


def feeder(model: Model, args):
    """`feed` of `loop.run`: (kind, inputs of `losses`, scenes drawn); one question a row in `args.alone` of the steps
    where the family's own question puts the expression before the image."""
    device, first = model.device, asks_first(model)
    table, lengths = (x.to(device) for x in prefixes(on_cpu(model), np.random.default_rng([5, args.seed])))

    def prepare(items: Item) -> Item:
        seen = views(model, items.pop("pixels").to(device), items.pop("size"))
        return seen | {name: value.to(device) for name, value in items.items()}

    def feed(state: dict) -> Iterator[tuple[str, Item, int]]:
        scenes = Scenes(Writer(on_cpu(model)), args.seed, state["scenes"], args.easy)
        pool = Pool(scenes, args.pool, args.fresh * args.every, args.workers, prepare)
        rng = np.random.default_rng([17, args.seed, state["step"]])
        for _ in pool.steps(args.every):
            single = first and rng.random() < args.alone
            rows = args.batch * (2 if single else 1)
            index = pool.pick(rng, rows)
            inputs = {key: pool.items[key][index] for key in ("seen", "kind", "place", "text_start")}
            name = "single_" if single else ""
            written = pool.items[f"{name}ids"].shape[1]
            picks = np.argsort(rng.random((rows, written)), axis=1)[:, : 1 if single else args.questions]
            which = index[:, None], torch.from_numpy(picks).to(device)
            inputs |= {key: pool.items[name + key][which] for key in ("ids", "asked", "length")}
            if single:
                one = which[0][:, 0], which[1][:, 0]
                inputs |= dict(prefix=pool.items["single_prefix"][one], before=pool.items["single_before"][one].long())
            else:
                variant = torch.from_numpy(rng.integers(PREFIXES, size=rows)).to(device)
                inputs |= dict(prefix=table[variant], before=lengths[variant])
            if device.type == "cpu":  # no graph wants fixed shapes
                inputs["ids"] = inputs["ids"][..., : int(inputs["length"].max())]
                inputs["prefix"] = inputs["prefix"][:, -int(inputs["before"].max()) :]
            yield "single" if single else "packed", inputs, pool.drawn

    return feed


def losses(model: Model, attention: PackedAttention | None, digits: Tensor, inputs: Item) -> tuple[Tensor, Item]:
    """Cross-entropy of the answers' tokens: the mean, and of digits and others apart."""
    with loop.autocast(model.device):
        image = connected(model, inputs["seen"], inputs["kind"])
        asked = Blocks(inputs["ids"], inputs["asked"], inputs["length"])
        embeds, positions, mask, labels = packed(model.embed, inputs["prefix"], inputs["before"], image, inputs, asked)
        context = embeds.shape[1] - labels.shape[1]
        if attention:
            attention.context = context
        else:  # fused attention takes an additive mask of the queries' own type
            mask = torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill(~mask, torch.finfo(torch.bfloat16).min)
        states = model.decoder(inputs_embeds=embeds, position_ids=for_decoder(positions), attention_mask=mask,
                               use_cache=False)  # fmt: skip
        logits = model.head(states.last_hidden_state[:, context:]).float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view(
        labels.shape
    )
    told = labels != -100
    digit = digits[labels.clamp(min=0)] & told
    other = told & ~digit
    return loss.sum() / told.sum(), dict(digit=(loss * digit).sum() / digit.sum(),
                                         other=(loss * other).sum() / other.sum())  # fmt: skip


def tower_of(name: str) -> nn.Module:
    """The frozen tower that a model is trained on."""
    if stage := TOWER.get(family_of(name)):
        return imitate.load(stage)
    return clip.load(loop.CHECKPOINTS / "tiny-clip", torch.device("cpu"), torch.float32).model.vision_model


def train(name: str, args) -> None:
    """The language model and the connector learn REC and its companions; the tower is frozen."""
    whole, model = build(name, tower_of(name), loop.RUNS / name / "folder", args.device)
    if args.start:
        beside = loop.CHECKPOINTS / args.start
        begin_as(model, models.load(beside if beside.is_dir() else args.start, device=str(args.device)))
    decoder, attention = model.decoder, None
    if args.device.type == "cpu":
        attention = PackedAttention()
        AttentionInterface.register("packed", attention)
        decoder.set_attn_implementation("packed")
    else:
        decoder.set_attn_implementation("sdpa")
    digits = digit_tokens(model.tokenizer, args.device)
    scenes = held_out(args.held_out)

    def evaluate():
        whole.eval()
        found = accuracy(model, scenes)
        decoder.train()
        return found

    def export():
        folder = loop.CHECKPOINTS / name
        decoder.set_attn_implementation(ATTENTION["text_config"])
        whole.save_pretrained(folder)
        write_rest(folder, whole.config, model.tokenizer)
        loop.ship_log(name, folder)

    decoder.train()
    loop.run(name, whole, args, feeder(model, args), partial(losses, model, attention, digits), evaluate, export)
