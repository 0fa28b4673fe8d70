"""Prefill and greedy decoding with explicit position IDs, for any Llama-like decoder of transformers.

Where decoding goes on: each sequence continues at its own last ID + 1. Under GAP (original IDs, arXiv:2506.21873) the
text after the image stands where it would unpruned, and so do the generated tokens. Counting the tokens in the cache
instead is the bug to avoid: "GAP prefill, compact decode".

Why the mask is explicit: transformers 5 takes IDs with gaps, without mask and cache, for several packed sequences and
silently cuts attention at every gap. A 4-D mask is used as it is. It is additive, which both "sdpa" and "eager"
attention take; load the decoder with one of the two, as the flash kernels take no such mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

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


@torch.inference_mode()
def hidden_states(
    decoder: nn.Module, embeds: Sequence[Tensor], position_ids: Sequence[Tensor], padding: Padding = "left"
) -> tuple[Tensor, Cache, Tensor]:
    """Run a ragged batch: last hidden states [B, L, D], the filled cache, and which places are tokens [B, L] bool.

    embeds: B tensors [L_i, D]; position_ids: B tensors [L_i] int64. L is the longest L_i; padding embeds as zeros.
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
    out = decoder(
        inputs_embeds=states, position_ids=ids, attention_mask=causal_mask(valid, states.dtype), use_cache=True
    )
    return out.last_hidden_state, out.past_key_values, valid


@torch.inference_mode()
def prefill(
    decoder: nn.Module,
    head: nn.Module,
    embeds: Sequence[Tensor],
    position_ids: Sequence[Tensor],
    padding: Padding = "left",
) -> tuple[Tensor, Cache, Tensor]:
    """Logits [B, V] after each sequence's last token, the cache, and which of its places are tokens [B, L] bool.

    Arguments and errors as for `hidden_states`; head maps [B, D] to [B, V] and sees the last tokens only.
    """
    states, cache, valid = hidden_states(decoder, embeds, position_ids, padding)
    place = torch.arange(valid.shape[1], device=valid.device)
    last = (place * valid).argmax(dim=1)
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
    padding: Padding = "left",
) -> list[list[int]]:
    """Greedy continuation of each sequence, at most max_new_tokens long, without eos and what would follow.

    embed: the decoder's token embedding; other arguments and errors as for `prefill`, and ValueError unless
    max_new_tokens >= 1. Sequences that ended leave the batch.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    logits, cache, valid = prefill(decoder, head, embeds, position_ids, padding)
    device = logits.device
    next_id = torch.stack([ids[-1] for ids in position_ids]) + 1
    ends = torch.tensor([eos] if isinstance(eos, int) else sorted(eos), device=device)
    rows = torch.arange(len(logits), device=device)  # which sequence each row of the shrinking batch is
    tokens = torch.full((len(rows), max_new_tokens), -1, device=device)  # -1: nothing generated here

    for step in range(max_new_tokens):
        token = logits.argmax(dim=-1)
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
    return [[token for token in row if token >= 0] for row in tokens.tolist()]
