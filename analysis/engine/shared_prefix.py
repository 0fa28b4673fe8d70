"""Attention to keys and values that several sequences share, without copying them (as Hydragen, arXiv:2402.05099).

Some seven expressions ask about an image, and all of them begin with the same words. A `Level` holds the cache of M such
beginnings and which of them each of the B sequences goes on from. The queries of all its sequences read a beginning in one
product; the softmax runs over all levels and the sequence's own keys together, so this is ordinary attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "cascade"  # its attn_implementation
# Queries of a sequence from which on the fused kernel is faster and smaller, though the shared keys are copied for it
LONG = 64


class Level(NamedTuple):
    """M beginnings of C places at most, and the B sequences that go on from them.

    cache: keys and values [M, H, C, d] of each layer; mask: [M, 1, 1, C], additive, lowest for padding; owner: [B] int64;
    slots: [M, E] the sequences of each beginning, filled up with 0; place: [B], where a sequence is among the slots.
    """

    cache: Cache
    mask: Tensor
    owner: Tensor
    slots: Tensor
    place: Tensor

    def take(self, index: Tensor) -> Level:
        """The level of the sequences `index`, which may repeat."""
        return level(self.cache, self.mask, self.owner[index])

    def asked(self, rows: Tensor) -> Tensor:
        """[B, H, Q, x] of the sequences -> [M, H, E * Q, x] of the beginnings."""
        return rows[self.slots].transpose(1, 2).flatten(2, 3)

    def answered(self, rows: Tensor) -> Tensor:
        """[M, H, E * Q, x] of the beginnings -> [B, H, Q, x] of the sequences."""
        return rows.unflatten(2, (self.slots.shape[1], -1)).transpose(1, 2).flatten(0, 1)[self.place]


def level(cache: Cache, mask: Tensor, owner: Tensor) -> Level:
    """Beginnings as `Level` wants them."""
    counts = owner.bincount(minlength=len(mask))
    order = owner.argsort(stable=True)
    first = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
    slots = torch.zeros(len(mask), int(counts.max()), dtype=torch.int64, device=owner.device)
    slots[owner[order], first] = order
    return Level(
        cache, mask, owner, slots, torch.empty_like(owner).scatter(0, order, owner[order] * slots.shape[1] + first)
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    levels: Sequence[Level] = (),
    **others,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers, "cascade": its "sdpa" where nothing is shared.

    query: [B, H, Q, d]; key, value: [B, H', L, d], a sequence's own; attention_mask: [B, 1, Q, L], additive, for those.
    Returns [B, Q, H, d] and, unless a fused kernel did it, the attention [B, H, Q, C + L], levels first.
    """
    if not levels:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    kept = [one.cache.layers[module.layer_idx] for one in levels]
    (batch, heads, queries, width), groups = query.shape, query.shape[1] // key.shape[1]
    if queries >= LONG:
        key, value = (
            torch.cat([*(getattr(layer, name)[one.owner] for one, layer in zip(levels, kept)), own], dim=2)
            for name, own in (("keys", key), ("values", value))
        )
        masks = [one.mask[one.owner].expand(-1, -1, queries, -1) for one in levels]
        attention_mask = torch.cat([*masks, attention_mask], dim=3)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    rows = (query * scaling).reshape(batch, -1, groups * queries, width)  # heads that share keys are further queries
    scores = [one.answered(one.asked(rows) @ layer.keys.mT + one.mask) for one, layer in zip(levels, kept)]
    scores.append(rows @ key.mT + attention_mask.repeat(1, 1, groups, 1))
    weights = torch.cat(scores, dim=3).softmax(dim=3, dtype=torch.float32).to(query.dtype)
    *shared, own = weights.split([one.shape[3] for one in scores], dim=3)
    out = own @ value
    for one, layer, part in zip(levels, kept, shared):
        out = out + one.answered(one.asked(part) @ layer.values)
    return out.view(batch, heads, queries, width).transpose(1, 2).contiguous(), weights.reshape(
        batch, heads, queries, -1
    )


AttentionInterface.register(NAME, attend)
