"""What `hf.pruned` does inside the decoder: its layers' hooks drop tokens and change IDs as `engine.stages` does.

The decoder's own forward goes on as it is; before a layer where something changes, the states, the mask and the
rotation that it was to read are replaced. In the cache the layers then have keys of different lengths, and while
decoding each reads its own with a mask of its own; a generated token has one ID in all layers, since what comes before
it was moved. Without a cache every step is a prefill, at which a method that looks at the last token chooses anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analysis.engine.decode import causal_mask, for_decoder, padded
from analysis.engine.stages import Part, Run, Shown
from analysis.types import Selection


class Inside:
    """One prefill of B rows with one image each, and the steps after it.

    embeds, ids: [L, D] and [L] or [L, P] of each row, as they enter the decoder; words: tokens before its image;
    images: one for each row; rules, order: as in `types.Cell`. read: as in `stages.Prefilled`.
    """

    def __init__(
        self,
        decoder: nn.Module,
        embeds: Sequence[Tensor],
        ids: Sequence[Tensor],
        words: Sequence[int],
        images: Sequence[Shown],
        rules: str,
        order: str,
    ):
        self.decoder, self.words, self.lengths, self.ids = decoder, words, [len(row) for row in embeds], list(ids)
        self.starts = [row[0] for row in ids]  # 0, or the padding's length in a plain forward
        rows, every = self.parts(embeds, [len(image.selection.origin) for image in images]), list(range(len(embeds)))
        said, _, asked = (Part(list(part), every, []) for part in zip(*rows))
        shown = Part([image.selection.features for image in images], every, [])
        self.run = Run(decoder, images, every, said, shown, asked, rules, order)
        self.read: list[list[tuple[int, int]]] = [[] for _ in images]
        self.stretches: list[tuple[int, Tensor]] = []  # first layer, [B, K] which places are tokens, where it changes
        self.now: dict[str, Any] = {}  # what the layer at hand reads in place of what it is given
        self.masks: dict[int, Tensor] = {}

    def parts(self, rows: Sequence[Tensor], shown: Sequence[int]) -> list[tuple[Tensor, ...]]:
        return [row.tensor_split([p, p + k]) for row, p, k in zip(rows, self.words, shown)]

    def enter(self, layer: int, states: Tensor) -> Tensor:
        """The states [B, L, D] that a layer is to read in place of these, at a prefill."""
        run = self.run
        if layer not in run.changes:
            return states
        rows = [row[len(row) - length :] for row, length in zip(states, self.lengths)]
        said, shown, asked = zip(*self.parts(rows, [len(one.origin) for one in run.selections]))
        run.said.states, run.asked.states = list(said), list(asked)
        run.show([Selection(new, one.origin, one.synthetic) for new, one in zip(shown, run.selections)])
        before = run.selections
        run.enter(layer)
        for row, one in zip(self.read, run.selections):
            row.append((layer, len(one.origin)))
        ids = [
            torch.cat(parts) + start
            for *parts, start in zip(run.said.ids, run.shown.ids, run.asked.ids, self.starts, strict=True)
        ]
        same = all(torch.equal(a.origin, b.origin) for a, b in zip(before, run.selections))
        if same and all(map(torch.equal, ids, self.ids)):
            return states  # to the bit
        made = [torch.cat(parts) for parts in zip(run.said.states, run.shown.states, run.asked.states)]
        self.ids, self.lengths = ids, [len(row) for row in made]
        valid = padded([torch.ones_like(row[:, 0], dtype=torch.bool) for row in made], "left")
        states = padded(made, "left")
        self.stretches.append((layer, valid))
        self.now = dict(
            attention_mask=causal_mask(valid, states.dtype),
            position_embeddings=self.decoder.rotary_emb(states, for_decoder(padded(ids, "left"))),
        )
        return states

    def step(self) -> None:
        """A forward after the prefill begins."""
        self.masks = {}

    def mask(self, layer: int, seen: int, states: Tensor) -> Tensor | None:
        """The mask of a layer after the prefill, None where it is the decoder's own. seen: tokens since the prefill
        that are in the cache; states: [B, Q, D]."""
        past = [(first, valid) for first, valid in self.stretches if first <= layer]
        if not past:
            return None
        first, valid = past[-1]
        if first not in self.masks:
            new = states.shape[1]
            valid = torch.nn.functional.pad(valid, (0, seen + new), value=True)
            self.masks[first] = causal_mask(valid, states.dtype, queries=new)
        return self.masks[first]
