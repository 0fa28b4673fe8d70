"""Prefill and greedy decoding with explicit position IDs, for any Llama-like decoder of transformers.

Where decoding goes on: each sequence continues at its own last ID + 1, unless its `next_id` says otherwise. Under GAP
(original IDs, arXiv:2506.21873) the text after the image stands where it would unpruned, and so do generated tokens.
Counting the tokens in the cache instead is the bug to avoid: "GAP prefill, compact decode".

Position IDs are [L], or [L, P] for decoders that rotate by P planes of IDs (M-RoPE), which take them as [P, B, L].

Several expressions on one image share all that comes before the question: `prefill_shared` runs it once, and the
attention of `shared_prefix` reads it without copying it.

Why the mask is explicit: transformers 5 takes IDs with gaps, without mask and cache, for several packed sequences and
silently cuts attention at every gap. A 4-D mask is used as it is. It is additive, which "sdpa", "eager" and our
"shared_prefix" attention take; the flash kernels take no such mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from analysis.engine.shared_prefix import NAME, SharedPrefix
from analysis.positions import generated_position, sequence_positions
from analysis.types import Ids

Padding = Literal["left", "right"]
Context = tuple[SharedPrefix, ...]  # what sequences continue, from the first tokens to the last


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """The parts of a model that read and write words.

    decoder: a Llama-like decoder of transformers, which takes embeddings, position IDs and a 4-D mask; head: [..., D]
    -> logits [..., V]; embed: token IDs -> embeddings; eos: the token ID or IDs that end an answer; max_new_tokens: the
    most tokens of an answer.
    """

    decoder: nn.Module
    head: nn.Module
    embed: nn.Embedding
    eos: int | set[int]
    max_new_tokens: int = 40


class Inputs(NamedTuple):
    """A sequence, or a part of one, as a decoder reads it.

    embeds: [L, D]; position_ids: [L] or [L, P] int64; next_id: the position ID, in all planes, of the first token
    generated after it, None for its last ID + 1.
    """

    embeds: Tensor
    position_ids: Tensor
    next_id: int | None = None


def joined(*parts: Inputs) -> Inputs:
    """Consecutive parts of one sequence as one."""
    embeds, position_ids, next_ids = zip(*parts)
    return Inputs(torch.cat(embeds), torch.cat(position_ids), next_ids[-1])


class PromptInputs(NamedTuple):
    """A prompt as a decoder reads it, in three parts: the words before the image, the image, the words after it."""

    before: Inputs
    image: Inputs
    after: Inputs

    @property
    def whole(self) -> Inputs:
        return joined(*self)


def prompt_inputs(embed: nn.Embedding, prompt: tuple[Tensor, Tensor], features: Tensor, ids: Ids) -> PromptInputs:
    """Embeddings and position IDs of a prompt with its image; the one place where they are put together.

    prompt: token IDs before and after the image, as `Model.prompt` gives them; features: [K, D] visual tokens in
    physical order; ids: theirs, as `positions.assign` gives them, or `VisualTokens.unpruned` where all are kept.
    """
    before, after = prompt
    places = sequence_positions(len(before), ids, len(after)).tensor_split([len(before), len(before) + len(features)])
    first, image, last = (Inputs(*one) for one in zip((embed(before), features, embed(after)), places))
    return PromptInputs(first, image, last._replace(next_id=generated_position(len(before), ids, len(after))))


def grouped(keys: Iterable[Hashable]) -> tuple[list[int], list[int]]:
    """Rows with equal keys form a group: the first row of each group, and the group of each row."""
    firsts, owner = {}, []
    for row, key in enumerate(keys):
        owner.append(firsts.setdefault(key, (len(firsts), row))[0])
    return [row for _, row in firsts.values()], owner


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


def shared(
    decoder: nn.Module, inputs: Sequence[Inputs], owner: Sequence[int], context: Context = ()
) -> tuple[list[Tensor], Context]:
    """Run M shared prefixes once: their last hidden states, [L, D] each, and the context of the B sequences, of which b
    continues prefix owner[b].

    context: what the prefixes themselves continue. Errors as for `hidden_states`.
    """
    states, cache, valid = hidden_states(decoder, inputs, context=context)
    index, dtype = torch.tensor(owner, device=valid.device), inputs[0].embeds.dtype
    mask = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, torch.finfo(dtype).min)
    made = *(one.take(index) for one in context), SharedPrefix.of(cache, mask[:, None, None], index)
    return [row[len(row) - len(one.embeds) :] for row, one in zip(states, inputs)], made


def prefill_shared(
    decoder: nn.Module, inputs: Sequence[Inputs], owner: Sequence[int], context: Context = ()
) -> Context:
    """The context that `shared` makes."""
    return shared(decoder, inputs, owner, context)[1]


def for_decoder(position_ids: Tensor) -> Tensor:
    """A batch's IDs as transformers' decoders take them: [B, L] as it is, [B, L, P] as [P, B, L]."""
    return position_ids if position_ids.dim() == 2 else position_ids.permute(2, 0, 1)


def padded(rows: Sequence[Tensor], side: Padding) -> Tensor:
    """Tensors [L_i, ...] as one [B, L, ...], filled up with zeros on a side.

    As torch's `pad_sequence`, which torch 2.11 cannot count FLOPs of.
    """
    made = rows[0].new_zeros(len(rows), max(map(len, rows)), *rows[0].shape[1:])
    for place, row in zip(made, rows):
        place[len(place) - len(row) if side == "left" else 0 :][: len(row)] = row
    return made


@torch.inference_mode()
def hidden_states(
    decoder: nn.Module,
    inputs: Sequence[Inputs],
    padding: Padding = "left",
    context: Context = (),
    cache: Cache | None = None,
) -> tuple[Tensor, Cache, Tensor]:
    """Run a ragged batch: last hidden states [B, L, D], the filled cache, and which places are tokens [B, L] bool.

    inputs: B sequences; L is the longest one's length, padding embeds as zeros; context: what the B sequences continue,
    as `prefill_shared` makes it; cache: where the keys of these layers come beside those of others, None for a new one.
    Raises ValueError on an empty batch or sequence, on lengths that disagree, on an unknown padding side, and for a
    context where the decoder's attention is not "shared_prefix".
    """
    if context and decoder.config._attn_implementation != NAME:  # others would not see it, and not say so
        raise ValueError(
            f"shared prefixes need a decoder with attn_implementation {NAME!r}, this one has "
            f"{decoder.config._attn_implementation!r}"
        )
    lengths = [len(one.embeds) for one in inputs]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"decoding needs at least one sequence and one token in each, got lengths {lengths}")
    if lengths != (given := [len(one.position_ids) for one in inputs]):
        raise ValueError(f"each token needs one position ID: got {given} IDs for sequences of lengths {lengths}")
    if padding not in ("left", "right"):
        raise ValueError(f"padding must be 'left' or 'right', got {padding!r}")
    embeds, position_ids, _ = zip(*inputs)
    tokens = [torch.ones(length, dtype=torch.bool, device=embeds[0].device) for length in lengths]
    states, ids, valid = (padded(rows, padding) for rows in (embeds, position_ids, tokens))
    out = decoder(
        inputs_embeds=states,
        position_ids=for_decoder(ids),
        attention_mask=causal_mask(valid, states.dtype),
        past_key_values=Cache(layer_class_to_replicate=RoomyLayer) if cache is None else cache,
        use_cache=True,
        shared_prefixes=context,
    )
    return out.last_hidden_state, out.past_key_values, valid


@torch.inference_mode()
def prefill(
    model: LanguageModel, inputs: Sequence[Inputs], padding: Padding = "left", context: Context = ()
) -> tuple[Tensor, Cache, Tensor]:
    """Logits [B, V] after each sequence's last token, the cache, and which of its places are tokens [B, L] bool.

    Arguments and errors as for `hidden_states`; the head sees the last tokens only.
    """
    states, cache, valid = hidden_states(model.decoder, inputs, padding, context)
    place = torch.arange(states.shape[1], device=valid.device)
    last = (place * valid).argmax(dim=1)
    return model.head(states[torch.arange(len(last), device=last.device), last]), cache, valid


def draft_from(answers: Sequence[Sequence[int]], share: float = 0.9) -> list[int]:
    """A `Draft` of more answers like these: at each position the token that most answers have, else -1.

    share: how many of the answers must agree on it.
    """
    draft = []
    for tokens in zip_longest(*answers, fillvalue=-1):
        token, count = Counter(tokens).most_common(1)[0]
        draft.append(token if count >= share * len(tokens) else -1)
    return draft


class Draft:
    """Tokens expected at each position of an answer, which a forward can try ahead of the model's own choice.

    expected: the tokens from the answer's first position on, -1 where it is open. An end of the answer is never tried.
    tokens: the tokens, 0 where open; runs: how many tokens the draft goes on for from a position; both are longer than
    an answer and what is tried after it, so that they are indexed without a check.
    """

    def __init__(self, expected: Sequence[int], model: LanguageModel, device: torch.device):
        length, ends = 2 * model.max_new_tokens, end_tokens(model)
        runs = [0] * (length + 1)
        for place in reversed(range(min(len(expected), model.max_new_tokens - 1))):  # the last token is the model's
            runs[place] = 0 if expected[place] < 0 or expected[place] in ends else runs[place + 1] + 1
        self.tokens = torch.tensor([*expected, *[0] * length], device=device).clamp(min=0)
        self.runs = torch.tensor(runs, device=device)

    def ahead(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """What to try after the tokens at `place` [B]: tokens [B, T], and which of them the draft has [B, T]."""
        steps = torch.arange(int(self.runs[place].max()), device=place.device)  # here a GPU waits for the host
        return self.tokens[place[:, None] + steps], steps < self.runs[place][:, None]


def end_tokens(model: LanguageModel) -> list[int]:
    """The token IDs that end an answer."""
    return [model.eos] if isinstance(model.eos, int) else sorted(model.eos)


@torch.inference_mode()
def greedy(
    model: LanguageModel,
    inputs: Sequence[Inputs],
    context: Context = (),
    draft: Sequence[int] = (),
    padding: Padding = "left",
) -> list[list[int] | None]:
    """Greedy continuation of each sequence, at most max_new_tokens long, without eos and what would follow; None
    where a logit was not a number.

    Arguments and errors as for `prefill`, and ValueError unless max_new_tokens >= 1. Sequences that ended leave the
    batch. draft: the token expected at each position of an answer, -1 where it is open. Boxes have a form, so a forward
    can try all tokens up to the next open position; what the model would not have said itself is dropped (speculative
    decoding, arXiv:2211.17192, with a table as the drafter), so a wrong draft costs time and changes nothing.
    """
    if model.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {model.max_new_tokens}")
    prefilled = prefill(model, inputs, padding, context)
    starts = [int(one.position_ids[-1].max()) + 1 if one.next_id is None else one.next_id for one in inputs]
    return continued(model, *prefilled, starts, inputs[0].position_ids.shape[1:], context, draft)


@torch.inference_mode()
def continued(
    model: LanguageModel,
    logits: Tensor,
    cache: Cache,
    valid: Tensor,
    starts: Sequence[int],
    planes: Sequence[int],
    context: Context,
    draft: Sequence[int],
) -> list[list[int] | None]:
    """`greedy` from the end of the prefill on. logits, cache, valid: as `prefill` gives them; starts: [B] ID of the
    first token generated in each sequence; planes: (P,) where a token has P IDs, else ()."""
    device = logits.device
    ends = torch.tensor(end_tokens(model), device=device)
    drafted = Draft(draft, model, device)
    next_id = torch.tensor(starts, device=device)  # of the token to come, for each row
    rows = torch.arange(len(logits), device=device)  # which sequence each row of the shrinking batch is
    place = torch.zeros_like(rows)  # of the token to come, in its answer
    tokens = torch.full((len(rows), 2 * model.max_new_tokens), -1, device=device)  # -1: nothing generated here
    sane = torch.ones(len(rows), dtype=torch.bool, device=device)

    while True:
        token = logits.argmax(dim=-1)
        sane[rows] &= ~logits.isnan().any(dim=-1)
        ended = torch.isin(token, ends)
        tokens[rows, place] = token.masked_fill(ended, -1)
        place = place + 1
        going = (~ended & (place < model.max_new_tokens)).nonzero().squeeze(1)  # here a GPU waits for the host
        if len(going) == 0:
            break
        if len(going) < len(rows):
            rows, place, token, next_id, valid = (x[going] for x in (rows, place, token, next_id, valid))
            cache.batch_select_indices(going)
            context = tuple(one.take(going) for one in context)
        tried, fresh = drafted.ahead(place)
        valid = torch.cat([pad(valid, (0, 1), value=True), fresh], dim=1)
        latest = model.embed(torch.cat([token[:, None], tried], dim=1))
        latest_ids = next_id[:, None] + torch.arange(latest.shape[1], device=device)
        out = model.decoder(
            inputs_embeds=latest,
            position_ids=latest_ids.expand(*planes, -1, -1),
            attention_mask=causal_mask(valid, latest.dtype, queries=latest.shape[1]),
            past_key_values=cache,
            use_cache=True,
            shared_prefixes=context,
        )
        logits = model.head(out.last_hidden_state)
        right = fresh & (logits[:, :-1].argmax(dim=-1) == tried) & ~logits[:, :-1].isnan().any(dim=-1)
        agreed = right.long().cumprod(dim=1)
        written = place[:, None] + torch.arange(tried.shape[1], device=device)
        tokens[rows[:, None], written] = tried.masked_fill(agreed == 0, -1)
        valid[:, valid.shape[1] - tried.shape[1] :] &= agreed.bool()
        count = agreed.sum(dim=1)
        logits = logits[torch.arange(len(rows), device=device), count]
        place, next_id = place + count, next_id + 1 + count
    return [[token for token in row if token >= 0] if ok else None for row, ok in zip(tokens.tolist(), sane.tolist())]
