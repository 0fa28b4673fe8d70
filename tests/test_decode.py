"""Decoding with explicit IDs against a naive loop and against transformers' own generate, on tiny random Llamas."""

from functools import cache

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.engine import shared_prefix
from analysis.engine.decode import (
    Inputs,
    LanguageModel,
    causal_mask,
    draft_from,
    greedy,
    grouped,
    hidden_states,
    prefill,
    prefill_shared,
    prompt_inputs,
)
from analysis.positions import assign, sequence_positions
from analysis.types import raster_ids

VOCABULARY, WIDTH, NEW, NEVER = 50, 32, 12, -2
PADDINGS, SCHEMES = ("left", "right"), ("compact", "original", "shuffled", "shifted:100", "original@compact")


@cache
def llama(attention):
    torch.manual_seed(0)
    # Large random weights: with the default ones the tokens repeat, and hardly depend on position.
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


@cache
def batch(scheme):
    """Three ragged prompts: text, 30 visual tokens pruned to 5, 9 and 1 in scrambled order, text; and their IDs."""
    draw = torch.Generator().manual_seed(1)
    origins = [torch.randperm(30, generator=draw)[:k] for k in (5, 9, 1)]
    ids = [
        sequence_positions(2, assign(o, raster_ids(30), scheme, seed), suffix)
        for seed, (o, suffix) in enumerate(zip(origins, (3, 2, 1)))
    ]
    return [torch.randn(len(i), WIDTH, generator=draw) for i in ids], ids


def lower_triangle(n):
    """The causal mask of one unpadded sequence, [1, 1, n, n], written out."""
    low = torch.finfo(torch.float32).min
    return torch.tensor([[[[0.0 if j <= i else low for j in range(n)] for i in range(n)]]])


@torch.inference_mode()
def naive(embeds, ids, new=NEW, stop=NEVER):
    """One sequence, the whole forward again for each token: no cache, no padding, no shared code."""
    model, answer = llama("sdpa"), []
    while len(answer) < new:
        logits = model(
            inputs_embeds=embeds[None], position_ids=ids[None], attention_mask=lower_triangle(len(ids)), use_cache=False
        ).logits
        token = int(logits[0, -1].argmax())
        if token == stop:
            break
        answer.append(token)
        embeds = torch.cat([embeds, model.model.embed_tokens.weight[token][None]])
        ids = torch.cat([ids, ids[-1:] + 1])
    return answer


def parts(model, new=NEW, eos=NEVER):
    """A Llama as the engine takes it."""
    return LanguageModel(
        decoder=model.model, head=model.lm_head, embed=model.model.embed_tokens, eos=eos, max_new_tokens=new
    )


def zipped(embeds, ids):
    return [Inputs(e, i) for e, i in zip(embeds, ids, strict=True)]


def decode(embeds, ids, padding="left", new=NEW, eos=NEVER, attention="sdpa", draft=()):
    return greedy(parts(llama(attention), new, eos), zipped(embeds, ids), draft=draft, padding=padding)


@cache
def expected(scheme):
    return [naive(e, i) for e, i in zip(*batch(scheme))]


def test_the_model_is_sensitive_enough_to_test_with():
    """Tokens vary and IDs matter to them; else the equalities below would say little."""
    assert all(len(set(answer)) > 3 for scheme in SCHEMES for answer in expected(scheme))
    assert len({str(expected(scheme)) for scheme in SCHEMES}) == len(SCHEMES)


@pytest.mark.parametrize("attention", ["sdpa", "eager", shared_prefix.NAME])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_greedy_equals_the_naive_loop(scheme, padding, attention):
    """Batched, and one sequence at a time: the answer does not depend on the batch."""
    embeds, ids = batch(scheme)
    assert decode(embeds, ids, padding, attention=attention) == expected(scheme)
    assert [decode([e], [i], padding, attention=attention)[0] for e, i in zip(embeds, ids)] == expected(scheme)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("long", [1, 1000])  # with the shared keys copied for the fused kernel, and never
def test_sequences_that_share_a_prefix(scheme, padding, long, monkeypatch):
    """Each prefix is run once, whatever its length; two questions after each, of one and of three tokens."""
    embeds, ids = batch(scheme)
    monkeypatch.setattr(shared_prefix, "LONG", long)
    model, draw = llama(shared_prefix.NAME), torch.Generator().manual_seed(2)
    ends = [torch.randn(length, WIDTH, generator=draw) for length in (3, 1, 3, 1, 1, 3)]
    owner = [0, 0, 2, 1, 2, 1]
    end_ids = [ids[i][-1] + 1 + torch.arange(len(e)) for i, e in zip(owner, ends)]
    sizes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(len(inputs["inputs_embeds"])), with_kwargs=True
    )
    context = prefill_shared(model.model, zipped(embeds, ids), owner)
    answers = greedy(parts(model, 4), zipped(ends, end_ids), context, padding=padding)
    hook.remove()
    assert sizes == [3, 6, 6, 6, 6]
    assert answers == [
        naive(torch.cat([embeds[i], e]), torch.cat([ids[i], j]), new=4) for i, e, j in zip(owner, ends, end_ids)
    ]
    assert len({str(answer) for answer in answers}) == 6


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("long", [1, 3, 1000])
def test_prefixes_that_share_their_own_prefix(scheme, padding, long, monkeypatch):
    embeds, ids = batch(scheme)
    monkeypatch.setattr(shared_prefix, "LONG", long)
    model, draw = llama(shared_prefix.NAME), torch.Generator().manual_seed(3)
    words = [torch.randn(length, WIDTH, generator=draw) for length in (2, 4)]
    ends, owner, whose = [torch.randn(2, WIDTH, generator=draw) for _ in range(4)], [2, 0, 1, 0], [0, 1, 1]
    word_ids = [torch.arange(len(w)) for w in words]
    ids = [4 + i for i in ids]
    end_ids = [ids[i][-1] + 1 + torch.arange(2) for i in owner]
    full = [
        naive(torch.cat([words[whose[i]], embeds[i], e]), torch.cat([word_ids[whose[i]], ids[i], j]), new=6)
        for i, e, j in zip(owner, ends, end_ids)
    ]
    for eos in (NEVER, full[1][2]):  # some leave the batch, and what they shared stays in order
        said = prefill_shared(model.model, zipped(words, word_ids), whose)
        context = prefill_shared(model.model, zipped(embeds, ids), owner, said)
        draft = [*full[0][:2], -1, *full[0][3:]]
        answers = greedy(parts(model, 6, eos), zipped(ends, end_ids), context, draft, padding)
        assert answers == [answer[: answer.index(eos)] if eos in answer else answer for answer in full]
    with pytest.raises(ValueError, match="shared prefixes need a decoder with attn_implementation 'shared_prefix'"):
        hidden_states(llama("sdpa").model, zipped(ends, end_ids), context=context)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_draft_right_or_wrong_changes_no_answer_and_saves_forwards(scheme, padding):
    """Drafts that are right, wrong at a place, open at a place, another sequence's, too short, too long; with eos."""
    embeds, ids = batch(scheme)
    full, sizes = expected(scheme), []
    hook = llama("sdpa").model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(inputs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for right in full:
        wrong = [*right[:5], (right[5] + 1) % VOCABULARY, *right[6:]]
        opened = [*right[:3], -1, *right[4:9], -1, *right[10:]]
        for draft in (right, wrong, opened, right[:4], right * 3, [-1] * NEW, [VOCABULARY - 1] * NEW, []):
            for eos in (NEVER, right[4], right[-1]):
                cut = [answer[: answer.index(eos)] if eos in answer else answer for answer in full]
                assert decode(embeds, ids, padding, eos=eos, draft=draft) == cut, (draft, eos)
    sizes.clear()
    assert decode(embeds[:1], ids[:1], padding, draft=full[0]) == full[:1]
    assert sizes[1:] == [NEW - 1]  # the prefill, and one forward for all the rest
    sizes.clear()
    assert decode(embeds[:1], ids[:1], padding, draft=[*full[0][:6], -1, *full[0][7:]]) == full[:1]
    assert sizes[1:] == [6, 5]
    hook.remove()


def test_a_draft_is_what_nine_in_ten_say():
    answers = [[5, 1, 7, 8]] * 18 + [[5, 2, 7], [5, 3, 9]]
    assert draft_from(answers) == [5, 1, 7, 8]
    assert draft_from(answers + [[6], [6, 1]]) == [5, -1, -1, -1]
    assert draft_from([]) == [] and draft_from([[]]) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_greedy_equals_generate(scheme):
    embeds, ids = batch(scheme)
    rows = (embeds, ids, [torch.ones_like(i) for i in ids])
    inputs = (pad_sequence(list(r), batch_first=True, padding_side="left") for r in rows)
    inputs = dict(zip(("inputs_embeds", "position_ids", "attention_mask"), inputs))
    assert decode(embeds, ids) == llama("sdpa").generate(**inputs, max_new_tokens=NEW, do_sample=False).tolist()


@pytest.mark.parametrize("padding", PADDINGS)
def test_each_sequence_stops_at_its_own_eos(padding):
    embeds, ids = batch("original")
    full = expected("original")
    for eos in sorted({token for answer in full for token in answer}):
        cut = [answer[: answer.index(eos)] if eos in answer else answer for answer in full]
        assert decode(embeds, ids, padding, eos=eos) == cut, eos
    first = {answer[0] for answer in full}
    assert decode(embeds, ids, padding, eos=first) == [[], [], []]
    assert decode(embeds, ids, padding, new=1) == [answer[:1] for answer in full]


def test_ended_sequences_leave_the_batch_and_no_forward_is_wasted():
    embeds, ids = batch("original")
    eos, sizes = expected("original")[0][0], []
    hook = llama("sdpa").model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(len(inputs["inputs_embeds"])), with_kwargs=True
    )
    try:
        decode(embeds, ids, eos=eos, new=4)
    finally:
        hook.remove()
    still = [sum(eos not in answer[:step] for answer in expected("original")) for step in (1, 2, 3)]
    assert sizes == [3, *still] and still[0] < 3


def test_packed_sequence_trap():
    """transformers takes gapped IDs without mask and cache for packed sequences; here they are one sequence."""
    embeds, ids = (rows[0][None] for rows in batch("original"))
    model, mask = llama("sdpa").model, lower_triangle(ids.shape[1])
    with torch.inference_mode():
        right = model(inputs_embeds=embeds, position_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        trapped = model(inputs_embeds=embeds, position_ids=ids, attention_mask=None, use_cache=False).last_hidden_state
    assert not torch.allclose(right, trapped, atol=1e-2)
    assert torch.equal(hidden_states(model, zipped(embeds, ids))[0], right)


def test_identity_bit_for_bit():
    """All visual tokens kept, original IDs: the unpruned model's own states and logits, no tolerance."""
    embeds = torch.randn(1, 36, WIDTH, generator=torch.Generator().manual_seed(2))
    ids = sequence_positions(2, assign(torch.arange(30), raster_ids(30), "original", 0), 4)[None]
    model = llama("sdpa")
    with torch.inference_mode():
        plain = model(inputs_embeds=embeds, attention_mask=lower_triangle(36)).logits
    assert torch.equal(model.lm_head(hidden_states(model.model, zipped(embeds, ids))[0]), plain)
    last = prefill(parts(model), zipped(embeds, ids))[0]
    torch.testing.assert_close(last, plain[:, -1])


@pytest.mark.parametrize("padding", PADDINGS)
def test_prefill_logits_are_those_after_the_last_token(padding):
    embeds, ids = batch("original")
    model = llama("sdpa")
    logits, filled, valid = prefill(parts(model), zipped(embeds, ids), padding)
    with torch.inference_mode():
        for row, (e, i) in enumerate(zip(embeds, ids)):
            alone = model(inputs_embeds=e[None], position_ids=i[None], attention_mask=lower_triangle(len(i)))
            torch.testing.assert_close(logits[row], alone.logits[0, -1])
            place = slice(-len(i), None) if padding == "left" else slice(len(i))
            assert valid[row].sum() == valid[row, place].sum() == len(i)
    assert filled.get_seq_length() == valid.shape[1] == max(map(len, ids))


def test_causal_mask_against_a_loop():
    valid = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    mask = causal_mask(valid, torch.float16)
    low = torch.finfo(torch.float16).min
    assert mask.shape == (4, 1, 4, 4) and mask.dtype == torch.float16
    for b in range(4):
        for q in range(4):
            row = [0 if k == q or (k < q and valid[b, k]) else low for k in range(4)]
            assert mask[b, 0, q].tolist() == row
    assert torch.equal(causal_mask(valid, torch.float16, queries=1), mask[:, :, -1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_gives_no_nan(padding, dtype):
    embeds, ids = batch("original")
    model = LlamaForCausalLM(llama("sdpa").config).to(dtype).eval()
    embeds = [e.to(dtype) for e in embeds]
    assert hidden_states(model.model, zipped(embeds, ids), padding)[0].isfinite().all()
    answers = greedy(parts(model, 3), zipped(embeds, ids), padding=padding)
    assert all(len(answer) == 3 for answer in answers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeds": [], "ids": []}, "at least one sequence"),
        ({"embeds": [torch.zeros(0, WIDTH)], "ids": [torch.arange(0)]}, r"got lengths \[0\]"),
        ({"ids": [torch.arange(3)]}, r"got \[3\] IDs for sequences of lengths \[2\]"),
        ({"padding": "middle"}, "padding must be 'left' or 'right', got 'middle'"),
        ({"new": 0}, "max_new_tokens must be >= 1, got 0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        decode(**{"embeds": [torch.zeros(2, WIDTH)], "ids": [torch.arange(2)], **change})


def test_generated_tokens_go_on_where_they_are_told():
    """Naively: IDs of the prefill as they are, those of generated tokens counted from another start."""
    embeds, ids = batch("original")
    model, starts = llama("sdpa"), [len(e) for e in embeds]
    expected_here = []
    for e, i, start in zip(embeds, ids, starts):
        answer = []
        for step in range(NEW):
            with torch.inference_mode():
                logits = model(
                    inputs_embeds=e[None], position_ids=i[None], attention_mask=lower_triangle(len(i)), use_cache=False
                ).logits
            answer.append(int(logits[0, -1].argmax()))
            e = torch.cat([e, model.model.embed_tokens.weight[answer[-1]][None]]).detach()
            i = torch.cat([i, torch.tensor([start + step])])
        expected_here.append(answer)
    told = [one._replace(next_id=start) for one, start in zip(zipped(embeds, ids), starts)]
    assert greedy(parts(model), told) == expected_here
    assert expected_here != expected("original")
    own = [one._replace(next_id=int(one.position_ids[-1]) + 1) for one in told]
    assert greedy(parts(model), own) == expected("original")


def test_a_prompt_in_three_parts_is_the_whole():
    model, draw = llama(shared_prefix.NAME), torch.Generator().manual_seed(4)
    for spec, k, start in (("original+cache", 4, 4), ("compact", 7, 7)):
        ids = assign(torch.arange(k) * 2, raster_ids(30), spec, 0)
        words, end = (torch.randint(VOCABULARY, (length,), generator=draw) for length in (3, 2))
        image, embed = torch.randn(k, WIDTH, generator=draw), model.model.embed_tokens
        one = prompt_inputs(embed, (words, end), image, ids)
        assert one.whole.position_ids.equal(sequence_positions(3, ids, 2))
        assert one.whole.embeds.equal(torch.cat([embed(words), image, embed(end)]))
        assert one.whole.next_id == 3 + start + 2
        context = prefill_shared(model.model, [one.image], [0], prefill_shared(model.model, [one.before], [0]))
        assert greedy(parts(model), [one.after], context) == greedy(parts(model), [one.whole])


def test_rows_with_equal_keys_form_a_group():
    assert grouped("abcab") == ([0, 1, 2], [0, 1, 2, 0, 1]) and grouped([]) == ([], [])


@pytest.mark.parametrize("owner", [[0, 0, 1, 1], [0, 0, 0], [0, 1, 2], [0, 1, 0, 1], [1, 1, 0], [0, 0, 1]])
def test_sequences_in_the_order_of_their_prefixes_are_not_gathered(owner):
    """`even` saves the gathering of rows, and is only set where that would change nothing."""
    prefixes = max(owner) + 1
    shared = shared_prefix.SharedPrefix.of(None, torch.zeros(prefixes, 1, 1, 3), torch.tensor(owner))
    assert shared.even == (owner == sorted(owner) and len(owner) % prefixes == 0)
    gathered = shared._replace(even=False)
    rows = torch.randn(len(owner), 2, 4, 7)
    asked = shared.by_prefix(rows)
    assert torch.equal(asked, gathered.by_prefix(rows))
    assert torch.equal(shared.by_sequence(asked), rows) and torch.equal(gathered.by_sequence(asked), rows)
    for number in range(prefixes):
        mine = rows[torch.tensor(owner) == number].transpose(0, 1).flatten(1, 2)
        assert torch.equal(asked[number, :, : mine.shape[1]], mine)
