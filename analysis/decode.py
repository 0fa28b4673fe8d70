"""Prefill and greedy decoding with explicit position IDs, for any Llama-like decoder of transformers.

Where decoding goes on: each sequence continues at its own last ID + 1. Under GAP (original IDs, arXiv:2506.21873) the
text after the image stands where it would unpruned, and so do the generated tokens. Counting the tokens in the cache
instead is the bug to avoid: "GAP prefill, compact decode".

Several expressions on one image share all that comes before the question: `begin` runs it once.

Why the mask is explicit: transformers 5 takes IDs with gaps, without mask and cache, for several packed sequences and
silently cuts attention at every gap. A 4-D mask is used as it is. It is additive, which both "sdpa" and "eager"
attention take; load the decoder with one of the two, as the flash kernels take no such mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.cache_utils import DynamicLayer

Padding = Literal["left", "right"]


def causal_mask(valid: Tensor, dtype: torch.dtype, queries: int | None = None) -> Tensor:
    """Additive mask [B, 1, Q, L]: 0 where a token sees another, the dtype's lowest value where not.

    valid: [B, L] bool, False for padding; queries: the last Q = `queries` tokens ask, all L by default.
    A token sees itself and the valid tokens before it. Padding sees itself too: a row that sees nothing would be NaN.
    """
    place = torch.arange(valid.shape[1], device=valid.device)
    query = place[-queries:] if queries else place
    seen = (query[:, None] > place) & valid[:, None, :] | (query[:, None] == place)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


class RoomyLayer(DynamicLayer):
    """A cache that grows by `ROOM` places at a time: copying all of it for every token would take half the time."""

    ROOM = 64

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append [B, H, L, d]; return all keys and values [B, H, C + L, d], which are views into larger tensors."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not start or self.keys.data_ptr() != self.rooms[0].data_ptr() or end > self.rooms[0].shape[-2]:
            # no room, or `batch_select_indices` has put other tensors in place
            self.rooms = [new.new_empty(*new.shape[:-2], end + self.ROOM, new.shape[-1])
                          for new in (key_states, value_states)]
            if start:
                self.rooms[0][..., :start, :], self.rooms[1][..., :start, :] = self.keys, self.values
        self.rooms[0][..., start:end, :], self.rooms[1][..., start:end, :] = key_states, value_states
        self.keys, self.values = (room[..., :end, :] for room in self.rooms)
        return self.keys, self.values


class Context(NamedTuple):
    """What several sequences begin with, already run: the cache, which of its places are tokens [B, L] bool."""

    cache: Cache
    valid: Tensor


def begin(
    decoder: nn.Module, embeds: Sequence[Tensor], position_ids: Sequence[Tensor], owner: Sequence[int]
) -> Context:
    """Run M shared beginnings (prompt and image) once, for the sequences that go on from them.

    owner: for each sequence the number of its beginning; other arguments and errors as for `hidden_states`.
    """
    _, cache, valid = hidden_states(decoder, embeds, position_ids)
    index = torch.tensor(owner, device=valid.device)
    cache.batch_select_indices(index)
    return Context(cache, valid[index])


@torch.inference_mode()
def hidden_states(
    decoder: nn.Module, embeds: Sequence[Tensor], position_ids: Sequence[Tensor], padding: Padding = "left",
    context: Context | None = None,
) -> tuple[Tensor, Cache, Tensor]:
    """Run a ragged batch: last hidden states [B, L, D], the filled cache, and which places are tokens [B, C + L] bool.

    embeds: B tensors [L_i, D]; position_ids: B tensors [L_i] int64. L is the longest L_i; padding embeds as zeros.
    context: what the B sequences come after, C places, used up by this call; C = 0 without.
    Raises ValueError on an empty batch or sequence, on lengths that disagree, and on an unknown padding side.
    """
    lengths = [len(e) for e in embeds]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"decoding needs at least one sequence and one token in each, got lengths {lengths}")
    if lengths != (given := [len(p) for p in position_ids]):
        raise ValueError(f"each token needs one position ID: got {given} IDs for sequences of lengths {lengths}")
    if padding not in ("left", "right"):
        raise ValueError(f"padding must be 'left' or 'right', got {padding!r}")
    masks = [torch.ones_like(p, dtype=torch.bool) for p in position_ids]
    states, ids, valid = (
        pad_sequence(list(rows), batch_first=True, padding_side=padding) for rows in (embeds, position_ids, masks)
    )
    if context:
        valid = torch.cat([context.valid, valid], dim=1)
    out = decoder(
        inputs_embeds=states, position_ids=ids, attention_mask=causal_mask(valid, states.dtype, states.shape[1]),
        past_key_values=context.cache if context else Cache(layer_class_to_replicate=RoomyLayer), use_cache=True,
    )
    return out.last_hidden_state, out.past_key_values, valid


@torch.inference_mode()
def prefill(
    decoder: nn.Module, head: nn.Module, embeds: Sequence[Tensor], position_ids: Sequence[Tensor],
    padding: Padding = "left", context: Context | None = None,
) -> tuple[Tensor, Cache, Tensor]:
    """Logits [B, V] after each sequence's last token, the cache, and which of its places are tokens [B, C + L] bool.

    Arguments and errors as for `hidden_states`; head maps [B, D] to [B, V] and sees the last tokens only.
    """
    states, cache, valid = hidden_states(decoder, embeds, position_ids, padding, context)
    place = torch.arange(states.shape[1], device=valid.device)
    last = (place * valid[:, -len(place):]).argmax(dim=1)
    return head(states[torch.arange(len(last), device=last.device), last]), cache, valid


@torch.inference_mode()
def greedy(
    decoder: nn.Module,
    head: nn.Module,
    embeds: Sequence[Tensor],
    position_ids: Sequence[Tensor],
    *,
    embed: nn.Embedding,
    max_new_tokens: int,
    eos: int | set[int],
    context: Context | None = None,
    padding: Padding = "left",
) -> list[list[int] | None]:
    """Greedy continuation of each sequence, at most max_new_tokens long, without eos and what would follow; None where
    a logit was not a number.

    embed: the decoder's token embedding; context: what each sequence comes after, as `begin` makes it; other arguments
    and errors as for `prefill`, and ValueError unless max_new_tokens >= 1. Sequences that ended leave the batch.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    logits, cache, valid = prefill(decoder, head, embeds, position_ids, padding, context)
    device = logits.device
    next_id = torch.stack([ids[-1] for ids in position_ids]) + 1
    ends = torch.tensor([eos] if isinstance(eos, int) else sorted(eos), device=device)
    rows = torch.arange(len(logits), device=device)  # which sequence each row of the shrinking batch is
    tokens = torch.full((len(rows), max_new_tokens), -1, device=device)  # -1: nothing generated here
    sane = torch.ones(len(rows), dtype=torch.bool, device=device)

    for step in range(max_new_tokens):
        token = logits.argmax(dim=-1)
        sane[rows] &= ~logits.isnan().any(dim=-1)
        going = (~torch.isin(token, ends)).nonzero().squeeze(1)  # the only point where a GPU waits for the host
        if len(going) < len(rows):
            rows, token, next_id, valid = rows[going], token[going], next_id[going], valid[going]
            cache.batch_select_indices(going)
        tokens[rows, step] = token
        if len(rows) == 0 or step == max_new_tokens - 1:
            break
        valid = pad(valid, (0, 1), value=True)
        latest = embed(token)[:, None]
        out = decoder(
            inputs_embeds=latest,
            position_ids=next_id[:, None],
            attention_mask=causal_mask(valid, latest.dtype, queries=1),
            past_key_values=cache,
            use_cache=True,
        )
        logits = head(out.last_hidden_state[:, -1])
        next_id = next_id + 1
    return [[token for token in row if token >= 0] if ok else None for row, ok in zip(tokens.tolist(), sane.tolist())]
