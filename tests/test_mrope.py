"""The engine on a decoder whose IDs have three planes, a small random Qwen2.5-VL, against a loop without a cache."""

from functools import cache

import pytest
import torch
from transformers import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from analysis.engine.decode import Inputs, LanguageModel, draft_from, greedy, hidden_states, prefill_shared
from analysis.engine.shared_prefix import NAME
from analysis.positions import assign, generated_position, sequence_positions
from analysis.types import Ids

ROWS, COLUMNS, WIDTH, VOCABULARY, NEW, NEVER = 5, 7, 32, 50, 8, -2
PREFIX, SUFFIXES = 3, (2, 4, 1)
SPECS = ("original", "compact", "sequential", "prefix", "regrid", "shuffled_rows", "original@after", "original+cache")


@cache
def decoder(attention=NAME):
    torch.manual_seed(0)
    config = Qwen2_5_VLTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,  # with the default weights tokens hardly depend on position
        rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[2, 3, 3]),
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    model = Qwen2_5_VLTextModel(config).eval()
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    torch.nn.init.normal_(head.weight)
    return model, head.requires_grad_(False)


def unpruned():
    visual = torch.tensor([[0, row, column] for row in range(ROWS) for column in range(COLUMNS)])
    return Ids(visual, COLUMNS, COLUMNS)


@cache
def sequences(spec):
    """Three prompts on one image pruned in three ways: embeddings, IDs, and the first generated ID of each."""
    draw = torch.Generator().manual_seed(1)
    words, image = torch.randn(PREFIX, WIDTH, generator=draw), torch.randn(ROWS * COLUMNS, WIDTH, generator=draw)
    embeds, positions, next_ids = [], [], []
    for k, suffix in zip((9, 5, 3), SUFFIXES):
        origin = torch.randperm(ROWS * COLUMNS, generator=draw)[:k]
        ids = assign(origin, unpruned(), spec, 0)
        embeds.append(torch.cat([words, image[origin], torch.randn(suffix, WIDTH, generator=draw)]))
        positions.append(sequence_positions(PREFIX, ids, suffix))
        next_ids.append(generated_position(PREFIX, ids, suffix))
    return embeds, positions, next_ids


def lower_triangle(n):
    return torch.zeros(n, n).masked_fill(~torch.ones(n, n).tril().bool(), torch.finfo(torch.float32).min)[None, None]


@torch.inference_mode()
def plain_loop(embeds, positions, next_id):
    """One sequence, the whole forward again for each token, in a model with transformers' own attention."""
    model, head = decoder("sdpa")
    answer = []
    for step in range(NEW):
        states = model(
            inputs_embeds=embeds[None],
            position_ids=positions.T[:, None],
            attention_mask=lower_triangle(len(embeds)),
            use_cache=False,
        ).last_hidden_state
        answer.append(int(head(states[0, -1]).argmax()))
        embeds = torch.cat([embeds, model.embed_tokens.weight[answer[-1]][None]])
        positions = torch.cat([positions, torch.full((1, 3), next_id + step)])
    return answer


@cache
def expected(spec):
    return [plain_loop(*one) for one in zip(*sequences(spec))]


def test_the_decoder_is_sensitive_enough_to_test_with():
    assert len({str(expected(spec)) for spec in SPECS}) == len(SPECS)
    assert all(len(set(answer)) > 3 for spec in SPECS for answer in expected(spec))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("spec", SPECS)
def test_greedy_equals_a_plain_loop(spec, padding):
    """Batched with padding; then the words before the image, and the image after them, shared; then with a draft."""
    decoding, head = decoder()
    model = LanguageModel(decoder=decoding, head=head, embed=decoding.embed_tokens, eos=NEVER, max_new_tokens=NEW)
    inputs = [Inputs(*one) for one in zip(*sequences(spec))]
    assert greedy(model, inputs, padding=padding) == expected(spec)

    words, images, questions = [], [], []
    for one, suffix in zip(inputs, SUFFIXES):
        for part, place in (
            (words, slice(PREFIX)),
            (images, slice(PREFIX, -suffix)),
            (questions, slice(-suffix, None)),
        ):
            part.append(Inputs(one.embeds[place], one.position_ids[place], one.next_id))
    context = prefill_shared(decoding, images, [0, 1, 2], prefill_shared(decoding, words[:1], [0] * 3))
    for draft in ((), draft_from(expected(spec)[:1]), [3, -1, 7, 7]):
        assert greedy(model, questions, context, draft, padding) == expected(spec)


@torch.inference_mode()
def test_pruned_with_original_ids_equals_full_length_with_the_dropped_masked_out():
    model, _ = decoder()
    draw = torch.Generator().manual_seed(2)
    embeds, n = torch.randn(PREFIX + ROWS * COLUMNS + 4, WIDTH, generator=draw), ROWS * COLUMNS
    whole = sequence_positions(PREFIX, unpruned(), 4)
    origin = torch.randperm(n, generator=draw)[:9].sort().values
    stay = torch.ones(len(embeds), dtype=torch.bool)
    stay[PREFIX : PREFIX + n] = torch.isin(torch.arange(n), origin)
    mask = lower_triangle(len(embeds)).masked_fill(~stay, torch.finfo(torch.float32).min)
    reference = decoder("sdpa")[0](inputs_embeds=embeds[None], position_ids=whole.T[:, None], attention_mask=mask)
    ids = assign(origin, unpruned(), "original", 0)
    states, *_ = hidden_states(model, [Inputs(embeds[stay], sequence_positions(PREFIX, ids, 4))])
    torch.testing.assert_close(states[0], reference.last_hidden_state[0, stay], atol=1e-4, rtol=0)
    compact = assign(origin, unpruned(), "compact", 0)
    other, *_ = hidden_states(model, [Inputs(embeds[stay], sequence_positions(PREFIX, compact, 4))])
    assert (other[0] - states[0]).abs().max() > 0.1


@torch.inference_mode()
def test_nothing_pruned_is_the_models_own_forward_bit_for_bit():
    model, _ = decoder("sdpa")
    embeds = torch.randn(1, PREFIX + ROWS * COLUMNS + 4, WIDTH, generator=torch.Generator().manual_seed(3))
    positions = sequence_positions(PREFIX, assign(torch.arange(ROWS * COLUMNS), unpruned(), "original", 0), 4)
    plain = model(
        inputs_embeds=embeds, position_ids=positions.T[:, None], attention_mask=lower_triangle(embeds.shape[1])
    ).last_hidden_state
    assert torch.equal(hidden_states(model, [Inputs(embeds[0], positions)])[0], plain)
