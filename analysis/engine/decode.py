"""Prefill and greedy decoding with explicit position IDs, for any Llama-like decoder of transformers.

Where decoding goes on: each sequence continues at its own last ID + 1, unless `next_ids` says otherwise. Under GAP
(original IDs, arXiv:2506.21873) the text after the image stands where it would unpruned, and so do generated tokens.
Counting the tokens in the cache instead is the bug to avoid: "GAP prefill, compact decode".

Position IDs are [L], or [L, P] for decoders that rotate by P planes of IDs (M-RoPE), which take them as [P, B, L].

Several expressions on one image share all that comes before the question: `begin` runs it once, and `cascade` reads it
without copying it.

Why the mask is explicit: transformers 5 takes IDs with gaps, without mask and cache, for several packed sequences and
silently cuts attention at every gap. A 4-D mask is used as it is. It is additive, which both "sdpa" and "eager"
attention take, and our "cascade", which shared beginnings need; the flash kernels take no such mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from analysis.engine.shared_prefix import NAME, Level, level

Padding = Literal["left", "right"]
Context = tuple[Level, ...]  # what sequences come after, from the first to the last


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
            self.rooms = [
                new.new_empty(*new.shape[:-2], end + (self.ROOM if start else 0), new.shape[-1])
                for new in (key_states, value_states)
            ]
            if start:
                self.rooms[0][..., :start, :], self.rooms[1][..., :start, :] = self.keys, self.values
        self.rooms[0][..., start:end, :], self.rooms[1][..., start:end, :] = key_states, value_states
        self.keys, self.values = (room[..., :end, :] for room in self.rooms)
        return self.keys, self.values


def begin(
    decoder: nn.Module,
    embeds: Sequence[Tensor],
    position_ids: Sequence[Tensor],
    owner: Sequence[int],
    context: Context = (),
) -> Context:
    """Run M shared beginnings (prompt, image) once, for the sequences that go on from them.

    owner: for each sequence the number of its beginning; context: what the beginnings themselves come after; other
    arguments and errors as for `hidden_states`.
    """
    _, cache, valid = hidden_states(decoder, embeds, position_ids, context=context)
    index, dtype = torch.tensor(owner, device=valid.device), embeds[0].dtype
    mask = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, torch.finfo(dtype).min)
    return *(one.take(index) for one in context), level(cache, mask[:, None, None], index)


def for_decoder(position_ids: Tensor) -> Tensor:
    """A batch's IDs as transformers' decoders take them: [B, L] as it is, [B, L, P] as [P, B, L]."""
    return position_ids if position_ids.dim() == 2 else position_ids.permute(2, 0, 1)


@torch.inference_mode()
def hidden_states(
    decoder: nn.Module,
    embeds: Sequence[Tensor],
    position_ids: Sequence[Tensor],
    padding: Padding = "left",
    context: Context = (),
) -> tuple[Tensor, Cache, Tensor]:
    """Run a ragged batch: last hidden states [B, L, D], the filled cache, and which places are tokens [B, L] bool.

    embeds: B tensors [L_i, D]; position_ids: B tensors [L_i] or [L_i, P] int64. L is the longest L_i; padding embeds
    as zeros.
    context: what the B sequences come after, as `begin` makes it.
    Raises ValueError on an empty batch or sequence, on lengths that disagree, on an unknown padding side, and for a
    context where the decoder's attention is not "cascade".
    """
    if context and decoder.config._attn_implementation != NAME:  # others would not see it, and not say so
        raise ValueError(
            f"shared beginnings need a decoder with attn_implementation {NAME!r}, this one has "
            f"{decoder.config._attn_implementation!r}"
        )
    lengths = [len(e) for e in embeds]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"decoding needs at least one sequence and one token in each, got lengths {lengths}")
    if lengths != (given := [len(p) for p in position_ids]):
        raise ValueError(f"each token needs one position ID: got {given} IDs for sequences of lengths {lengths}")
    if padding not in ("left", "right"):
        raise ValueError(f"padding must be 'left' or 'right', got {padding!r}")
    masks = [torch.ones(len(p), dtype=torch.bool, device=p.device) for p in position_ids]
    states, ids, valid = (
        pad_sequence(list(rows), batch_first=True, padding_side=padding) for rows in (embeds, position_ids, masks)
    )
    out = decoder(
        inputs_embeds=states,
        position_ids=for_decoder(ids),
        attention_mask=causal_mask(valid, states.dtype),
        past_key_values=Cache(layer_class_to_replicate=RoomyLayer),
        use_cache=True,
        levels=context,
    )
    return out.last_hidden_state, out.past_key_values, valid


@torch.inference_mode()
def prefill(
    decoder: nn.Module,
    head: nn.Module,
    embeds: Sequence[Tensor],
    position_ids: Sequence[Tensor],
    padding: Padding = "left",
    context: Context = (),
) -> tuple[Tensor, Cache, Tensor]:
    """Logits [B, V] after each sequence's last token, the cache, and which of its places are tokens [B, L] bool.

    Arguments and errors as for `hidden_states`; head maps [B, D] to [B, V] and sees the last tokens only.
    """
    states, cache, valid = hidden_states(decoder, embeds, position_ids, padding, context)
    place = torch.arange(states.shape[1], device=valid.device)
    last = (place * valid).argmax(dim=1)
    return head(states[torch.arange(len(last), device=last.device), last]), cache, valid


def usual(answers: Sequence[Sequence[int]], share: float = 0.9) -> list[int]:
    """A `draft` for more answers like these: the token that this share of them has at a place, -1 where none is."""
    draft = []
    for tokens in zip_longest(*answers, fillvalue=-1):
        token, count = Counter(tokens).most_common(1)[0]
        draft.append(token if count >= share * len(tokens) else -1)
    return draft


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
    context: Context = (),
    padding: Padding = "left",
    draft: Sequence[int] = (),
    next_ids: Sequence[int] | None = None,
) -> list[list[int] | None]:
    """Greedy continuation of each sequence, at most max_new_tokens long, without eos and what would follow; None where
    a logit was not a number.

    embed: the decoder's token embedding; context: what each sequence comes after, as `begin` makes it; other arguments
    and errors as for `prefill`, and ValueError unless max_new_tokens >= 1. Sequences that ended leave the batch.
    draft: the token expected at each place of an answer, -1 where it is open. Boxes have a form, so a forward can try all
    tokens up to the next open place; what the model would not have said itself is dropped (speculative decoding,
    arXiv:2211.17192, with a table as the drafter), so a wrong draft costs time and changes nothing.
    next_ids: the position ID of each sequence's first generated token, in all planes; None goes on at its last ID + 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    logits, cache, valid = prefill(decoder, head, embeds, position_ids, padding, context)
    device = logits.device
    if next_ids is None:
        next_ids = [int(ids[-1].max()) + 1 for ids in position_ids]
    next_id = torch.tensor(next_ids, device=device)
    planes = position_ids[0].shape[1:]
    ends = [eos] if isinstance(eos, int) else sorted(eos)
    runs = [0] * (2 * max_new_tokens + 1)  # how many tokens the draft goes on for at a place; the last is the model's
    for place in reversed(range(min(len(draft), max_new_tokens - 1))):
        runs[place] = 0 if draft[place] < 0 or draft[place] in ends else runs[place + 1] + 1
    draft = torch.tensor([*draft, *[0] * 2 * max_new_tokens], device=device).clamp(min=0)
    runs, ends = torch.tensor(runs, device=device), torch.tensor(ends, device=device)
    rows = torch.arange(len(logits), device=device)  # which sequence each row of the shrinking batch is
    place = torch.zeros_like(rows)  # of the token to come
    tokens = torch.full((len(rows), 2 * max_new_tokens), -1, device=device)  # -1: nothing generated here
    sane = torch.ones(len(rows), dtype=torch.bool, device=device)

    while True:
        token = logits.argmax(dim=-1)
        sane[rows] &= ~logits.isnan().any(dim=-1)
        ended = torch.isin(token, ends)
        tokens[rows, place] = token.masked_fill(ended, -1)
        place = place + 1
        going = (~ended & (place < max_new_tokens)).nonzero().squeeze(1)  # here a GPU waits for the host
        if len(going) == 0:
            break
        if len(going) < len(rows):
            rows, place, token, next_id, valid = (x[going] for x in (rows, place, token, next_id, valid))
            cache.batch_select_indices(going)
            context = tuple(one.take(going) for one in context)
        ahead = torch.arange(int(runs[place].max()), device=device)  # and here
        tried = draft[place[:, None] + ahead]
        fresh = ahead < runs[place][:, None]
        valid = torch.cat([pad(valid, (0, 1), value=True), fresh], dim=1)
        latest = embed(torch.cat([token[:, None], tried], dim=1))
        latest_ids = next_id[:, None] + torch.arange(latest.shape[1], device=device)
        out = decoder(
            inputs_embeds=latest,
            position_ids=latest_ids.expand(*planes, -1, -1),
            attention_mask=causal_mask(valid, latest.dtype, queries=latest.shape[1]),
            past_key_values=cache,
            use_cache=True,
            levels=context,
        )
        logits = head(out.last_hidden_state)
        right = fresh & (logits[:, :-1].argmax(dim=-1) == tried) & ~logits[:, :-1].isnan().any(dim=-1)
        agreed = right.long().cumprod(dim=1)
        tokens[rows[:, None], place[:, None] + ahead] = tried.masked_fill(agreed == 0, -1)
        valid[:, valid.shape[1] - len(ahead) :] &= agreed.bool()
        count = agreed.sum(dim=1)
        logits, place, next_id = (
            logits[torch.arange(len(rows), device=device), count],
            place + count,
            next_id + 1 + count,
        )
    return [[token for token in row if token >= 0] if ok else None for row, ok in zip(tokens.tolist(), sane.tolist())]
