"""Pruning and IDs inside the decoder, against a loop over layers and tokens without a cache, padding or sharing."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2_5_VLTextConfig
from transformers.models.llama.modeling_llama import rotate_half
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from analysis.engine import stages
from analysis.engine.decode import LanguageModel, continued
from analysis.engine.shared_prefix import NAME
from analysis.positions import assign, by_layer
from analysis.pruning import pruner
from analysis.pruning.images import staged_images
from analysis.types import Ids, Stage, raster_ids
from tests.support.visual import visual

ROWS, COLUMNS, WIDTH, VOCABULARY, DEPTH, NEW, KEEP = 4, 6, 32, 50, 5, 6, 0.25
N = ROWS * COLUMNS
METHODS = ["fastv", "fastv:layer=1,rope=false", "pyramiddrop", "feather", "sparsevlm", "sparsevlm+", "spatial:inside=2"]
SPECS = [
    "original",
    "compact",
    "stretched",
    "compact+original",
    "original+cache",
    "original|2|compact",
    "compact|3|shifted:3",
]


@cache
def language_model(planes):
    """A decoder with weights so large that tokens depend on positions; IDs in one plane or in three."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
        eos_token_id=None,
        bos_token_id=None,
        attn_implementation=NAME,
    )
    if planes:
        rope = dict(rope_type="default", rope_theta=100.0, mrope_section=[1, 1, 2])
        decoder = qwen.Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(rope_parameters=rope, **sizes)).eval()
    else:
        decoder = LlamaForCausalLM(LlamaConfig(**sizes)).model.eval()
    head, embed = torch.nn.Linear(WIDTH, VOCABULARY, bias=False), torch.nn.Embedding(VOCABULARY, WIDTH)
    torch.nn.init.normal_(head.weight)
    for part in (decoder, head, embed):
        part.requires_grad_(False)
    return LanguageModel(decoder=decoder, head=head, embed=embed, eos=-2, max_new_tokens=NEW)


def unpruned(planes):
    cells = torch.tensor([[0, row, column] for row in range(ROWS) for column in range(COLUMNS)])
    return Ids(cells, COLUMNS, COLUMNS) if planes else raster_ids(N)


@cache
def asked():
    """Five prompts on two images, two beginnings; and the images."""
    draw = torch.Generator().manual_seed(1)
    words = [torch.randint(VOCABULARY, (length,), generator=draw) for length in (3, 2)]
    ends = [torch.randint(VOCABULARY, (length,), generator=draw) for length in (3, 5, 2, 4, 3)]
    images = visual(2, ROWS, COLUMNS, features=torch.randn(2, N, WIDTH, generator=draw))
    return [(words[w], end) for w, end in zip((0, 0, 1, 0, 0), ends)], [0, 1, 1, 0, 1], images


# ---- the reference


def rotated(planes, decoder, x, ids, on):
    """x: [H, L, d]; ids: [L] or [L, 3]."""
    if not on:
        return x
    cos, sin = decoder.rotary_emb(x[None], ids.T[:, None] if planes else ids[None])
    return x * cos + rotate_half(x) * sin


def logits_of(planes, decoder, number, states, ids, rope=True):
    """[H, L, L] of a layer, not causal yet."""
    layer = decoder.layers[number]
    x = layer.input_layernorm(states)
    q, k = (
        rotated(planes, decoder, proj(x).unflatten(1, (-1, 8)).transpose(0, 1), ids, rope)
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    return q @ k.repeat_interleave(2, dim=0).mT / 8**0.5


def causal(length):
    return torch.full((length, length), -torch.inf).triu(1)


def top(scores, k):
    """Places of the k highest, in the order they stand."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k])


def budget(share):
    return max(1, int(share * N + 0.5))


@torch.inference_mode()
def choose(name, number, view, here):
    """(places kept, merged states or None, their origins) by each method's own words; here: what its layer sees.

    here.logits(layer, rope): [H, L, L] of a layer that has been run, or of the next.
    """
    first, end = view.words, view.words + len(view.origin)
    third = [KEEP ** ((i + 1) / 3) for i in range(3)]
    if name.startswith("fastv"):
        layer, rope = (0, False) if "rope" in name else (1, True)
        scores = (here.logits(layer, rope) + causal(view.length)).softmax(2)[:, -1, first:end].mean(0)
        return top(scores, budget(KEEP)), None
    if name == "pyramiddrop":
        scores = (here.logits(here.layer, True) + causal(view.length)).softmax(2)[:, -1, first:end].mean(0)
        return top(scores, budget(third[number])), None
    if name == "feather":
        scores = here.logits(here.layer - 1, False)[:, -1, first:end].softmax(1).mean(0)
        kept = top(scores, budget([KEEP**0.5, KEEP][number]))
        grid = [i for i, o in enumerate(view.origin) if o // COLUMNS % 3 == 0 and o % COLUMNS % 3 == 0]
        return sorted({*kept, *(grid if number == 0 else [])}), None
    if name == "spatial:inside=2":
        want = pruner("spatial")(asked()[2], KEEP)[0].origin.tolist()
        return [view.origin.index(o) for o in want], None
    weights = (here.logits(here.layer - 1, True) + causal(view.length)).softmax(2)
    relevance = (view.image @ view.asked.T).softmax(1).mean(0)
    raters = [end + i for i, share in enumerate(relevance) if share > relevance.mean()]
    k = budget(third[number])
    if name == "sparsevlm+":
        ones = rotated(view.planes, view.decoder, torch.ones(1, view.length, 8), here.ids(here.layer - 1), True)[0]
        weights = weights / (ones @ ones.T / 8**0.5)
        weights = weights[:, raters, first:end]
        heads = sorted(range(4), key=lambda h: -float(weights[h].sum()))[:2]
        return top(weights[heads].mean(dim=(0, 1)), k), None
    scores, n = weights[:, raters, first:end].mean(dim=(0, 1)), len(view.origin)
    alone = k - 1  # few tokens: at most 30 of them are merged, into at most this one cluster below 10, two from 10 on
    while alone + int((int(0.3 * (n - alone)) + 1) / 10) + 1 > k:
        alone -= 1
    order = sorted(range(n), key=lambda i: (-float(scores[i]), i))
    merged = order[alone : alone + int(0.3 * (n - alone)) + 1]
    assert len(merged) < 10, "one cluster: the mean of all"
    states = here.states[first:end][merged]
    distance = (states[:, None] - states[None]).norm(dim=2) / WIDTH**0.5
    peak = max(range(len(merged)), key=lambda i: (float(density_peak(distance)[i]), -i))
    return sorted(order[:alone]), (states.mean(0, keepdim=True), [view.origin[merged[peak]]])


def density_peak(distance):
    """Of one cluster: the nearest is the token itself, so all densities are 1, and the first counts as the densest."""
    farthest = distance.max()
    return torch.tensor([farthest] + [distance[i, :i].min() for i in range(1, len(distance))])


@cache
@torch.inference_mode()
def naive(name, planes, spec, row):
    """Answer, first logits and the origins kept in each layer, of one prompt."""
    model, rules, full = language_model(planes), by_layer(spec), unpruned(planes)
    decoder = model.decoder
    prompts, which, images = asked()
    (before, after), image = prompts[row], images.features[which[row]]
    drop_at = {"pyramiddrop": [1, 2, 4], "feather": [1, 2], "sparsevlm": [1, 2, 3], "sparsevlm+": [1, 2, 3]}.get(
        name, [] if name == "none" else [1 if "layer=1" in name else 2]
    )
    chosen, answer, first = {}, [], None
    for step in range(NEW):
        said = model.embed(torch.tensor(answer, dtype=torch.int64))
        states = torch.cat([model.embed(before), image, model.embed(after), said])
        origin, P, S = list(range(N)), len(before), len(after)
        entered, kept = {}, []
        for layer in range(DEPTH):
            rule = [one for at, one in rules if at <= layer][-1]
            if layer in drop_at:
                number = drop_at.index(layer)
                if step == 0:
                    last = [one for at, one in rules if at <= max(layer - 1, 0)][-1]
                    now = positions(planes, full, torch.tensor(origin), last, P, S, 0)
                    view = SimpleNamespace(
                        words=P,
                        origin=origin,
                        length=len(states),
                        image=image,
                        asked=model.embed(after),
                        decoder=decoder,
                        planes=planes,
                    )
                    here = SimpleNamespace(
                        layer=layer,
                        states=states,
                        ids=lambda at, entered=entered: entered[at][1],
                        logits=lambda at, rope, entered=entered, states=states, now=now: logits_of(
                            planes, decoder, at, *entered.get(at, (states, now)), rope
                        ),
                    )
                    chosen[number] = choose(name, number, view, here)
                places, extra = chosen[number]
                rest = states[P + len(origin) :]
                more, origins = extra or (states[:0], [])
                states = torch.cat([states[:P], states[P:][places], more, rest])
                origin = [origin[place] for place in places] + origins
            ids = positions(planes, full, torch.tensor(origin), rule, P, S, len(answer))
            entered[layer] = states, ids
            kept.append(origin)
            turn = decoder.rotary_emb(states[None], ids.T[:, None] if planes else ids[None])
            states = decoder.layers[layer](
                states[None], attention_mask=causal(len(states))[None, None], position_embeddings=turn
            )
            states = (states[0] if isinstance(states, tuple) else states)[0]
        logits = model.head(decoder.norm(states[-1]))
        first = logits if first is None else first
        answer.append(int(logits.argmax()))
    return answer, first, kept


def positions(planes, full, origin, rule, words, question, generated):
    """As they are, in each layer by its own rule."""
    ids = assign(origin, full, rule, 0)
    after = torch.cat(
        [ids.text_start + torch.arange(question), ids.generated_start + question + torch.arange(generated)]
    )
    before = torch.arange(words)
    if planes:
        before, after = before[:, None].expand(-1, 3), after[:, None].expand(-1, 3)
    return torch.cat([before, words + ids.visual, words + after])


# ---- the engine


def engine(name, planes, spec, rows=None, share=True, order="method", keep=KEEP):
    """Answers, first logits, what was kept in each layer in the order of physical places, and the Prefilled."""
    model = language_model(planes)
    prompts, which, images = asked()
    rows, kept = list(range(len(prompts))) if rows is None else rows, []

    def seen(stage, number):
        def select(look):
            made = stage.select(look)
            kept.append((number, tuple(made.origin.tolist())))
            return made

        return Stage(stage.layer, select, stage.attention)

    made = staged_images(pruner(name), images, None if name == "none" else keep, [0, 1], DEPTH)
    shown = [
        stages.Shown(selection, unpruned(planes), 0, [seen(one, number) for number, one in enumerate(drops)])
        for selection, drops in made
    ]
    where = [which[row] for row in rows]
    if not share:
        shown, where = [shown[number] for number in where], list(range(len(rows)))
    done = stages.prefill(model, [prompts[row] for row in rows], shown, where, spec, order)
    return continued(model, *done[:6], draft=()), done.logits, kept, done


CASES = [
    *((name, 0, spec) for name in METHODS for spec in ("original", "compact")),
    *(("fastv", 0, spec) for spec in SPECS[2:]),
    *(
        ("none", 0, spec)
        for spec in ("compressed:0.5|2|original", "original|1|shuffled", "original|4|shifted:2@original")
    ),
    ("pyramiddrop", 0, "compact+original"),
    ("pyramiddrop", 3, "compact"),
    ("feather", 3, "original|2|stretched"),
    ("sparsevlm", 3, "compact+original"),
    ("sparsevlm+", 3, "original"),
]


@pytest.mark.parametrize(("name", "planes", "spec"), CASES)
def test_equals_a_loop_over_layers_without_a_cache(name, planes, spec):
    answers, logits, kept, done = engine(name, planes, spec)
    references = [naive(name, planes, spec, row) for row in range(len(answers))]
    assert answers == [answer for answer, _, _ in references]
    torch.testing.assert_close(logits, torch.stack([first for _, first, _ in references]), atol=1e-4, rtol=0)
    for read, (_, _, by_layer_kept) in zip(done.read, references):
        assert stages.layer_mean(read, DEPTH) == sum(map(len, by_layer_kept)) / DEPTH
        for origins in by_layer_kept:
            assert len(origins) == N or any(tuple(origins) == one for _, one in kept)


def test_the_cases_differ_where_they_should():
    """Else the equalities above would say little."""
    answers = {case: str([naive(*case, row)[0] for row in range(5)]) for case in CASES}
    assert len(set(answers.values())) >= len(CASES) - 2


@pytest.mark.parametrize("planes", [0, 3])
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "feather", "sparsevlm", "random:inside=3"])
def test_stages_that_drop_nothing_change_no_bit(name, planes):
    plain = engine("none", planes, "original")
    for spec in ("original", "original|2|original", "compact"):
        assert torch.equal(engine("none", planes, spec)[1], plain[1])
        answers, logits, *_ = engine(name, planes, spec, keep=1)
        assert torch.equal(logits, plain[1]) and answers == plain[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_alone_and_without_sharing_answers_as_in_its_batch(name):
    answers, logits, *_ = engine(name, 0, "compact")
    apart, again, *_ = engine(name, 0, "compact", share=False)
    assert apart == answers
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=0)
    for row, answer in enumerate(answers):
        alone, single, *_ = engine(name, 0, "compact", rows=[row])
        assert alone == [answer]
        torch.testing.assert_close(single[0], logits[row], atol=1e-4, rtol=0)


def test_images_stay_shared_while_their_prompts_keep_the_same():
    """Three prompts on one image, two on the other, one of them with another beginning."""
    for name, shared in (("spatial:inside=2", [3, 3]), ("fastv", [3, 3, 5])):
        done = engine(name, 0, "original")[3]
        assert [len(one.mask) for one in done.context][1::2] == shared


def test_the_order_of_what_is_kept_begins_at_its_stage():
    ranked, raster = engine("fastv:emit=score", 0, "original"), engine("fastv", 0, "original")
    kept = [[origins for _, origins in one[2]] for one in (ranked, raster)]
    assert kept[0] != kept[1] == [tuple(sorted(origins)) for origins in kept[0]]
    assert ranked[0] != raster[0] and engine("fastv:emit=score", 0, "original", order="raster")[0] == raster[0]
    shuffled = engine("fastv", 0, "original", order="shuffled")
    assert shuffled[0] != engine("fastv", 0, "original")[0]
    plain, again = engine("none", 0, "original"), engine("none", 0, "original", order="shuffled")
    assert torch.equal(plain[1], again[1])  # `evaluate` orders what the first layer reads


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fastv:layer=0", "option layer must be at least 1"),
        ("fastv:layer=9", "has the layers 0 to 4, so FastV cannot drop at 9"),
        ("fastv:rope=maybe", "option rope"),
        ("random:inside=7", "has the layers 0 to 4, so random cannot drop at 7"),
        ("pyramiddrop:layers=3+1", "layers of the decoder that rise"),
        ("feather:layers=2", "FEATHER drops at two layers"),
        ("feather:stride=-1", "option stride"),
        ("trim:inside=1", "TRIM merges tokens"),
    ],
)
def test_bad_options(spec, said):
    with pytest.raises(ValueError, match=said):
        staged_images(pruner(spec), visual(2, ROWS, COLUMNS), 0.5, [0, 1], DEPTH)


@pytest.mark.parametrize("spec", ["random:inside=-1", "random:inside=x", "none:inside=2", "fastv:layers=2"])
def test_bad_specifications(spec):
    with pytest.raises(ValueError, match="layer|inside|no options"):
        pruner(spec)


@pytest.mark.parametrize(
    "spec", ["original|compact", "original|0|compact", "original|2|compact|1|original", "original|2"]
)
def test_ids_that_change_name_rising_layers(spec):
    with pytest.raises(ValueError, match=r"written IDs\|layer\|IDs|unknown IDs"):
        by_layer(spec)


def test_what_rows_say_of_the_layers():
    read = [(0, 144), (1, 144), (2, 36)]
    assert stages.layer_text(read) == "0:144 2:36" and stages.layer_mean(read, 5) == (2 * 144 + 3 * 36) / 5
    assert stages.layer_text([(0, 7)]) == "0:7" and stages.layer_mean([(0, 7)], 3) == 7


def test_a_method_inside_the_decoder_is_refused_before_it():
    with pytest.raises(ValueError, match="FastV drops tokens inside the decoder"):
        pruner("fastv")(asked()[2], 0.5)
