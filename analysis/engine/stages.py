"""Prefill of prompts whose visual tokens, or IDs, change on the way through the decoder's layers.

A *stretch* of layers reads the same tokens under the same IDs. A new one begins where a method drops tokens
(`types.Stage`), or where the IDs name another rule (`positions.by_layer`); pruning before the decoder is one stretch of
all layers. In each the words before the image, then the image, are run once for all sequences that share them, as long
as these share what is kept, and each question continues both.

Decoding is the ordinary call: the keys of words and images are `SharedPrefix`es that only their stretch's layers hold,
and the questions' own keys have one length in all layers. A generated token has one ID in all layers, too, so where a
stretch's IDs would put it elsewhere, all that comes before it in that stretch is moved: RoPE is relative.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from analysis.engine.decode import (
    Context,
    Inputs,
    LanguageModel,
    causal_mask,
    for_decoder,
    grouped,
    hidden_states,
    padded,
    shared,
)
from analysis.positions import assign, by_layer, generated_position, reorder, sequence_positions
from analysis.types import Attention, Ids, Look, Selection, Stage, Truth


class Shown(NamedTuple):
    """An image as a decoder is shown it. selection: what its first layer reads, in physical order; unpruned: as
    `VisualTokens.unpruned`; seed: of orders and IDs; stages: what is dropped on the way, by layer; truth: of the
    expression, where the IDs read it."""

    selection: Selection
    unpruned: Ids
    seed: int = 0
    stages: Sequence[Stage] = ()
    truth: Truth | None = None


class Prefilled(NamedTuple):
    """B prompts, ready to be continued by `decode.continued`, whose arguments the first six are.

    read: for each prompt (first layer, visual tokens that it and the layers after it read).
    """

    logits: Tensor
    cache: Cache
    valid: Tensor
    starts: list[int]
    planes: torch.Size
    context: Context
    read: list[list[tuple[int, int]]]


def layer_mean(read: Sequence[tuple[int, int]], depth: int) -> float:
    """Visual tokens that a layer of `depth` reads on average. read: as in `Prefilled`, for one prompt."""
    layers, tokens = zip(*read)
    return sum(n * (end - start) for n, (start, end) in zip(tokens, pairwise([*layers, depth]))) / depth


def layer_text(read: Sequence[tuple[int, int]]) -> str:
    """The same as rows keep it: "0:144 2:36" where layers 0 and 1 read 144 tokens, the others 36."""
    changes = [one for before, one in pairwise([(0, None), *read]) if before[1] != one[1]]
    return " ".join(f"{layer}:{n}" for layer, n in changes)


@dataclass
class Part:
    """The words before the image, the image, or the question of B prompts.

    states: [L, D] each, as they enter the next layer; owner: [B] which of them each prompt has; ids: [L] or [L, P].
    """

    states: list[Tensor]
    owner: list[int]
    ids: list[Tensor]

    @property
    def inputs(self) -> list[Inputs]:
        return [Inputs(*one) for one in zip(self.states, self.ids)]

    @property
    def firsts(self) -> list[int]:
        """The first prompt that has each of the states."""
        return [self.owner.index(number) for number in range(len(self.states))]


def stretch(decoder: nn.Module, start: int, end: int) -> nn.Module:
    """The decoder's layers `start` to `end` - 1, with its last norm if they are the last; weights are not copied."""
    depth = len(decoder.layers)
    if (start, end) == (0, depth):
        return decoder
    part, part_config = copy(decoder), copy(decoder.config)
    part._modules = dict(decoder._modules)
    part.layers, part.config = nn.ModuleList(decoder.layers[start:end]), part_config
    if end < depth:
        part.norm = nn.Identity()
    part_config.num_hidden_layers = end - start
    if getattr(part_config, "layer_types", None):
        part_config.layer_types = part_config.layer_types[start:end]
    return part


def _read(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, heads: list, **others) -> tuple:
    heads += [query, key]
    return torch.zeros_like(query).transpose(1, 2), None


READ = "read_heads"  # the attn_implementation under which a layer only shows its queries and keys
AttentionInterface.register(READ, _read)


def queries_and_keys(layer: nn.Module, states: Tensor, rotation: tuple[Tensor, Tensor]) -> list[Tensor]:
    """[B, H, L, d] and [B, H', L, d] that a decoder layer compares; its own code makes them, norms and rotation
    included. states: [B, L, D] that enter it; rotation: cosines and sines."""
    attention, heads = layer.self_attn, []
    usual = attention.config._attn_implementation
    attention.config._attn_implementation = READ
    try:
        attention(
            hidden_states=layer.input_layernorm(states), position_embeddings=rotation, attention_mask=None, heads=heads
        )
    finally:
        attention.config._attn_implementation = usual
    return heads


def attention(decoder: nn.Module, how: Attention, said: Part, shown: Part, asked: Part) -> list[Tensor]:
    """[heads, Q, K] for each prompt: attention to its visual tokens, in float32. The parts are as they enter the
    layer."""
    layer, keys, seen, turns = decoder.layers[how.layer], [], [], []
    for part in (said, shown, asked):
        states, ids = padded(part.states, "left"), padded(part.ids, "left")
        turn = cos, sin = decoder.rotary_emb(states, for_decoder(ids))
        query, key = queries_and_keys(
            layer, states, turn if how.rope else (torch.ones_like(cos), torch.zeros_like(sin))
        )
        valid = padded([torch.ones_like(one[:, 0], dtype=torch.bool) for one in part.states], "left")
        owner = torch.tensor(part.owner, device=states.device)
        keys.append(key[owner])
        seen.append(valid[owner])
        turns.append(torch.cat(turn, dim=-1)[owner] if how.unbiased else None)
    ask = 1 if how.queries == "last" else query.shape[2]
    start = keys[0].shape[2]
    image = slice(start, start + keys[1].shape[2])
    every, mask = torch.cat(keys, dim=2), causal_mask(torch.cat(seen, dim=1), query.dtype, queries=ask)
    rows = query[:, :, -ask:].unflatten(1, (every.shape[1], -1))
    logits = (rows @ every[:, :, None].mT * layer.self_attn.scaling + mask[:, :, None]).flatten(1, 2).float()
    if how.over == "image":
        weights = logits[..., image].softmax(dim=-1)
    else:
        weights = logits.softmax(dim=-1)[..., image]
    if how.unbiased:
        weights = weights / (turns[2][:, -ask:] @ turns[1].mT * layer.self_attn.scaling).float()[:, None]
    return [
        one[:, -min(ask, len(asked.states[row])) :, one.shape[2] - len(shown.states[shown.owner[row]]) :]
        for row, one in enumerate(weights)
    ]


class Run:
    """Prompts on their way through the layers of a decoder.

    images: as `prefill` takes them, which: [B] the one of each prompt; said, shown, asked: the parts of the prompts as
    they enter the decoder; ids, order: as for `prefill`. changes: the layers before which something changes.
    Raises ValueError for a layer that the decoder does not have, and as `by_layer`.
    """

    def __init__(
        self,
        decoder: nn.Module,
        images: Sequence[Shown],
        which: Sequence[int],
        said: Part,
        shown: Part,
        asked: Part,
        ids: str,
        order: str,
    ):
        self.decoder, self.images, self.which, self.order = decoder, images, list(which), order
        self.said, self.shown, self.asked = said, shown, asked
        self.selections = [self.image(row).selection for row in shown.firsts]
        self.first_image, self.first_words = (
            [self.image(row).selection.features for row in range(len(which))],
            asked.states,
        )
        self.rules, self.stages = dict(by_layer(ids)), images[which[0]].stages
        self.rule, self.weights = self.rules[0], {}
        self.starts: list[int] = []  # IDs of the first generated tokens
        looks = [one.attention.layer for one in self.stages if one.attention]
        self.changes = sorted({*self.rules, *looks, *(one.layer for one in self.stages)})
        if self.changes[-1] >= (depth := len(decoder.layers)):
            raise ValueError(f"this decoder has the layers 0 to {depth - 1}, and not {self.changes[-1]}")
        self.place()

    def image(self, row: int) -> Shown:
        return self.images[self.which[row]]

    def enter(self, layer: int) -> None:
        """Do what is to be done before a layer: drop, give IDs, look."""
        for number, stage in enumerate(self.stages):
            if stage.layer == layer:
                if stage.attention and stage.attention.layer == layer:
                    self.look(number)
                self.drop(number)
        self.rule = self.rules.get(layer, self.rule)
        self.place()
        for number, stage in enumerate(self.stages):
            if stage.attention and stage.attention.layer == layer < stage.layer:
                self.look(number)

    def place(self) -> None:
        """Give all tokens the IDs of the rule, moved so that generated tokens have the IDs of the first stretch."""
        images = [self.image(row) for row in self.shown.firsts]
        ids = [
            assign(selection.origin, image.unpruned, self.rule, image.seed, image.truth)
            for selection, image in zip(self.selections, images)
        ]
        mine = [ids[number] for number in self.shown.owner]
        words = [len(self.said.states[number]) for number in self.said.owner]
        ends = [
            generated_position(before, one, len(asked)) for before, one, asked in zip(words, mine, self.asked.states)
        ]
        self.starts = self.starts or ends
        moved = [start - end for start, end in zip(self.starts, ends)]
        first, owner = grouped(zip(self.said.owner, moved))
        self.said = Part([self.said.states[self.said.owner[row]] for row in first], owner, [])
        places = [
            (sequence_positions(before, one, len(asked)) + by).tensor_split([before, before + len(one.visual)])
            for before, one, asked, by in zip(words, mine, self.asked.states, moved)
        ]
        self.said.ids = [places[row][0] for row in first]
        self.shown.ids = [places[row][1] for row in self.shown.firsts]
        self.asked.ids = [place[2] for place in places]

    def look(self, number: int) -> None:
        """Compute the attention that a stage asks for."""
        how = self.stages[number].attention
        self.weights[number] = attention(self.decoder, how, self.said, self.shown, self.asked)

    def drop(self, number: int) -> None:
        """Let each image's stage of this number select; prompts go on sharing images of which they keep the same."""
        weights, owner, made = self.weights.pop(number, None), self.shown.owner, []
        for row in self.shown.firsts if weights is None else range(len(self.which)):
            image, selection = self.image(row), self.selections[owner[row]]
            weight = None if weights is None else weights[row]
            look = Look(selection.features, selection.origin, weight, self.first_image[row], self.first_words[row])
            made.append(reorder(image.stages[number].select(look), self.order, image.seed))
        if weights is not None:
            first, owner = grouped(
                (view, row if one.synthetic.any() else tuple(one.origin.tolist()))
                for row, (view, one) in enumerate(zip(owner, made))
            )
            made = [made[row] for row in first]
        self.shown = Part([], owner, [])
        self.show(made)

    def show(self, selections: Sequence[Selection]) -> None:
        """Go on with these images, whose features are the states that enter the next layer."""
        self.selections, self.shown.states = list(selections), [one.features for one in selections]


@torch.inference_mode()
def prefill(
    model: LanguageModel,
    prompts: Sequence[tuple[Tensor, Tensor]],
    images: Sequence[Shown],
    which: Sequence[int],
    ids: str,
    order: str = "method",
) -> Prefilled:
    """Prefill B prompts, each with an image.

    prompts: token IDs before and after the image, as `Model.prompt` gives them; images: their stages are at the same
    layers in all; which: [B] the image of each prompt; ids, order: specifications of `positions`; a stage's tokens go
    on in this order, those of the first layer are in theirs already. A stage is ranked under the IDs that are in force
    where its attention is, at its own first layer under those of the layer before it.
    Raises ValueError as `Run`.
    """
    words_first, words = grouped(tuple(before.tolist()) for before, _ in prompts)
    first, view = grouped(zip(words, which))
    run = Run(
        model.decoder,
        images,
        which,
        Part([model.embed(prompts[row][0]) for row in words_first], words, []),
        Part([images[which[row]].selection.features for row in first], view, []),
        Part([model.embed(after) for _, after in prompts], list(range(len(prompts))), []),
        ids,
        order,
    )
    context, cache, read = (), None, [[] for _ in prompts]
    for start, end in pairwise([*run.changes, len(model.decoder.layers)]):
        run.enter(start)
        part = stretch(model.decoder, start, end)
        for row, number in zip(read, run.shown.owner):
            row.append((start, len(run.shown.states[number])))
        said = [run.said.owner[row] for row in run.shown.firsts]
        run.said.states, here = shared(part, run.said.inputs, said)
        made, here = shared(part, run.shown.inputs, run.shown.owner, here)
        run.show([Selection(new, one.origin, one.synthetic) for new, one in zip(made, run.selections)])
        states, cache, valid = hidden_states(part, run.asked.inputs, context=here, cache=cache)
        run.asked.states = [row[tokens] for row, tokens in zip(states, valid)]
        context += here
    logits = model.head(states[:, -1].contiguous())
    return Prefilled(logits, cache, valid, run.starts, run.asked.ids[0].shape[1:], context, read)
