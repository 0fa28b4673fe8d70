"""Attention to keys and values that several sequences share, without copying them (as Hydragen, arXiv:2402.05099).

Some seven expressions ask about an image, and all of them begin with the same words. A `SharedPrefix` holds the cache
of M such prefixes and which of them each of the B sequences continues. All sequences of a prefix read it in one
product; the softmax runs over all prefixes and the sequence's own keys together: this is ordinary attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "shared_prefix"  # the attn_implementation that transformers knows `attend` by
# From so many queries of a sequence on, the fused kernel is faster and smaller, though shared keys are copied for it.
LONG = 64


class SharedPrefix(NamedTuple):
    """M prefixes of at most C tokens, and the B sequences that continue them.

    cache: keys and values [M, H, C, d] of each layer, or of some, which alone read the prefixes; mask: [M, 1, 1, C],
    additive, lowest for padding; owner: [B] int64, the prefix that each sequence continues; slots: [M, E] the sequences
    of each prefix, filled up with 0; place:
    [B], where a sequence stands among the M * E slots; even: whether that is where it stands anyway, E for each prefix,
    so that nothing is gathered (in every layer and step, where a GPU waits for kernels more than for their work).
    """

    cache: Cache
    mask: Tensor
    owner: Tensor
    slots: Tensor
    place: Tensor
    even: bool

    @classmethod
    def of(cls, cache: Cache, mask: Tensor, owner: Tensor) -> SharedPrefix:
        """Prefixes with their sequences sorted into slots."""
        counts = owner.bincount(minlength=len(mask))
        order = owner.argsort(stable=True)
        first = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
        slots = torch.zeros(len(mask), int(counts.max()), dtype=torch.int64, device=owner.device)
        slots[owner[order], first] = order
        place = torch.empty_like(owner).scatter(0, order, owner[order] * slots.shape[1] + first)
        even = slots.numel() == len(owner) and bool((place == torch.arange(len(owner), device=owner.device)).all())
        return cls(cache, mask, owner, slots, place, even)

    def held(self, layer: int) -> bool:
        """Whether this layer has keys and values of the prefixes."""
        return layer < len(self.cache.layers) and self.cache.layers[layer].is_initialized

    def take(self, index: Tensor) -> SharedPrefix:
        """The same prefixes, continued by the sequences `index`, which may repeat."""
        return SharedPrefix.of(self.cache, self.mask, self.owner[index])

    def by_prefix(self, rows: Tensor) -> Tensor:
        """[B, H, Q, x] of the sequences -> [M, H, E * Q, x] of the prefixes."""
        slots = rows.unflatten(0, self.slots.shape) if self.even else rows[self.slots]
        return slots.transpose(1, 2).flatten(2, 3)

    def by_sequence(self, rows: Tensor) -> Tensor:
        """[M, H, E * Q, x] of the prefixes -> [B, H, Q, x] of the sequences."""
        slots = rows.unflatten(2, (self.slots.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return slots if self.even else slots[self.place]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    shared_prefixes: Sequence[SharedPrefix] = (),
    **others,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers; without shared prefixes it is transformers' own "sdpa".

    query: [B, H, Q, d]; key, value: [B, H', L, d], a sequence's own; attention_mask: [B, 1, Q, L], additive, for those.
    Returns [B, Q, H, d] and, unless a fused kernel did it, the attention [B, H, Q, C + L], shared prefixes first.
    """
    shared_prefixes = [one for one in shared_prefixes if one.held(module.layer_idx)]
    if not shared_prefixes:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    layers = [one.cache.layers[module.layer_idx] for one in shared_prefixes]
    (batch, heads, queries, width), groups = query.shape, query.shape[1] // key.shape[1]
    if queries >= LONG:
        key, value = (
            torch.cat(
                [*(getattr(layer, name)[one.owner] for one, layer in zip(shared_prefixes, layers)), own],
                dim=2,
            )
            for name, own in (("keys", key), ("values", value))
        )
        masks = [one.mask[one.owner].expand(-1, -1, queries, -1) for one in shared_prefixes]
        attention_mask = torch.cat([*masks, attention_mask], dim=3)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    rows = (query * scaling).reshape(batch, -1, groups * queries, width)  # heads that share keys are further queries
    scores = [
        one.by_sequence(one.by_prefix(rows) @ layer.keys.mT + one.mask) for one, layer in zip(shared_prefixes, layers)
    ]
    scores.append(rows @ key.mT + attention_mask.repeat(1, 1, groups, 1))
    weights = torch.cat(scores, dim=3).softmax(dim=3, dtype=torch.float32).to(query.dtype)
    *shared, own = weights.split([one.shape[3] for one in scores], dim=3)
    out = own @ value
    for one, layer, part in zip(shared_prefixes, layers, shared):
        out = out + one.by_sequence(one.by_prefix(part) @ layer.values)
    out = out.view(batch, heads, queries, width).transpose(1, 2).contiguous()
    return out, weights.reshape(batch, heads, queries, -1)


AttentionInterface.register(NAME, attend)
