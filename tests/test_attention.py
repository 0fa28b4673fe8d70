"""Attention and soft selection: against transformers' own model, against hard pruning, and against their formulas."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.stats import spearmanr
from transformers import LlavaForConditionalGeneration

from analysis.engine import attention, shared_prefix
from analysis.engine.attention import (
    AskedImages,
    Look,
    Ratio,
    agreement,
    answers,
    look,
    rank_correlations,
    sinks,
    soft_weights,
)
from analysis.engine.decode import Inputs, greedy, prefill
from analysis.engine.evaluate import cells, evaluate
from analysis.positions import assign, sequence_positions
from analysis.pruning import PRUNERS, all_pruners, pruner
from analysis.pruning.images import prune_images
from analysis.rec.datasets import RecDataset
from analysis.types import Signals, VisualTokens, raster_ids
from tests.support.checkpoint import noise

WORDS = ["red cat", "the left blue dog", "cup", "a red cup right of the dog"]
IMAGE = [0, 0, 1, 2]


@pytest.fixture(scope="module")
def pictures():
    return [noise(40, 30), noise(30, 40, 1), noise(32, 32, 2)]


@pytest.fixture(scope="module")
def batch(tiny, pictures):
    features = tiny.encode(pictures).features
    features = features / features.std()  # else the random tokens are so large that attention between them is lost
    return AskedImages(features, raster_ids(features.shape[1]), IMAGE, [tiny.prompt(words) for words in WORDS])


def alone(model, batch):
    """The unpruned answers, one expression at a time, by `decode` alone."""
    found = []
    for image, (before, after) in zip(batch.image, batch.prompts):
        embeds = torch.cat([model.embed(before), batch.features[image], model.embed(after)])
        found += greedy(model, [Inputs(embeds, torch.arange(len(embeds)))])
    return found


def test_alpha_is_the_attention_of_transformers_own_model(tiny, tiny_folder, batch):
    """Loaded anew as eager, output_attentions, one expression at a time, neither cache nor shared beginnings."""
    whole = LlavaForConditionalGeneration.from_pretrained(tiny_folder, attn_implementation="eager").eval()
    words, expected = whole.get_input_embeddings(), alone(tiny, batch)
    assert max(map(len, expected)) > 3
    for one, image, (before, after), answer in zip(look(tiny, batch), batch.image, batch.prompts, expected):
        n, said = batch.features.shape[1], torch.tensor(answer)
        with torch.no_grad():
            embeds = torch.cat([words(before), batch.features[image], words(after), words(said)])[None]
            out = whole.model.language_model(inputs_embeds=embeds, output_attentions=True, use_cache=False)
            logits = whole.lm_head(out.last_hidden_state)
        seen = torch.stack(out.attentions).mean(dim=(0, 2))[0]
        start = len(before) + n
        assert one.answer == answer
        torch.testing.assert_close(one.alpha, seen[start:, len(before) : start], atol=1e-5, rtol=0)
        chose = logits[0, start + len(after) - 1 : -1].argmax(dim=-1)
        assert chose.tolist() == answer  # `steps` are the queries that chose the answer's tokens
        torch.testing.assert_close(one.steps, seen[start + len(after) - 1 : -1, len(before) : start], atol=1e-5, rtol=0)
    assert shared_prefix.LONG == 64


def test_beta_1_is_the_unpruned_model(tiny, batch):
    ones = torch.ones(len(WORDS), batch.features.shape[1])
    assert answers(tiny, batch, ones) == answers(tiny, batch) == alone(tiny, batch)
    assert (soft_weights(torch.rand(4, 16), 1) == 1).all()
    assert len({str(answer) for answer in answers(tiny, batch)}) > 1


def logits(model, batch, beta):
    """After the question, under soft selection."""
    inputs = batch.inputs(model)
    return prefill(model, [one.after for one in inputs], context=batch.context(model, inputs, beta.log()))[0]


def test_beta_1_gives_the_same_logits_bit_for_bit(tiny, batch):
    inputs = batch.inputs(tiny)
    plain = prefill(tiny, [one.after for one in inputs], context=batch.context(tiny, inputs))[0]
    # the same beginnings: with a bias they are shared by image, prefix and bias, here all ones
    assert torch.equal(plain, logits(tiny, batch, torch.ones(len(WORDS), batch.features.shape[1])))


def test_beta_0_is_hard_pruning_with_original_ids(tiny, batch):
    """Dropping a key and keeping the other IDs is masking it: other tokens for each expression, also on one image."""
    n, draw = batch.features.shape[1], torch.Generator().manual_seed(3)
    stay = torch.stack([torch.randperm(n, generator=draw) < k for k in (5, 9, 3, 7)])
    hard, said = [], []
    for row, image, (before, after) in zip(stay, batch.image, batch.prompts):
        origin = row.nonzero()[:, 0]
        ids = sequence_positions(len(before), assign(origin, raster_ids(n), "original", 0), len(after))
        embeds = torch.cat([tiny.embed(before), batch.features[image][origin], tiny.embed(after)])
        hard.append(prefill(tiny, [Inputs(embeds, ids)])[0][0])
        said += greedy(tiny, [Inputs(embeds, ids)])
    torch.testing.assert_close(logits(tiny, batch, stay.float()), torch.stack(hard), atol=1e-4, rtol=0)
    assert answers(tiny, batch, stay.float()) == said != answers(tiny, batch)


def test_the_bias_follows_when_answers_end(tiny, batch):
    """Ends made early and at different steps: each answer is what its expression gets alone."""
    draw = torch.Generator().manual_seed(1)
    beta = soft_weights(torch.rand(len(WORDS), batch.features.shape[1], generator=draw), 0.2)
    whole = answers(tiny, batch, beta)
    stops = {answer[place] for answer, place in zip(whole, (2, 5, 7, 9)) if len(answer) > place}
    model = replace(tiny, eos=stops)
    together = answers(model, batch, beta)
    assert len({len(answer) for answer in together}) > 1
    for row in range(len(WORDS)):
        one = AskedImages(batch.features, batch.unpruned, [batch.image[row]], [batch.prompts[row]])
        assert answers(model, one, beta[row : row + 1]) == together[row : row + 1]


def test_modulation_is_alpha_beta_over_their_sum(tiny, batch):
    """softmax(e + log beta) = alpha beta / sum, text's keys with beta 1; in the first layer, where the inputs agree."""
    n = batch.features.shape[1]
    beta = soft_weights(torch.rand(len(WORDS), n, generator=torch.Generator().manual_seed(2)), 0.25)
    seen = []
    for weights in (torch.ones_like(beta), beta):
        inputs = batch.inputs(tiny)
        context = batch.context(tiny, inputs, weights.log())
        hook = tiny.decoder.layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1]))
        first = [Inputs(one.after.embeds[:1], one.after.position_ids[:1]) for one in inputs]
        prefill(tiny, first, context=context)
        hook.remove()
    alpha, modulated = seen
    end = alpha.shape[-1] - 1  # the one query's own key comes last
    everywhere = torch.ones(len(WORDS), alpha.shape[-1])
    everywhere[:, end - n : end] = beta
    expected = alpha * everywhere[:, None, None]
    torch.testing.assert_close(modulated, expected / expected.sum(-1, keepdim=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [torch.ones(1, 16), torch.full((4, 16), 1.5), torch.full((4, 16), float("nan"))])
def test_bad_weights_are_refused(tiny, batch, beta):
    with pytest.raises(ValueError, match=r"beta must be \[4, 16\] in \[0, 1\]"):
        answers(tiny, batch, beta)


@settings(max_examples=30)
@given(keep=some.floats(0.05, 1), n=some.integers(8, 600), seed=some.integers(0, 99))
def test_soft_weights_spend_the_budget(keep, n, seed):
    scores = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    beta = soft_weights(scores, keep)
    assert (beta > 0).all() and (beta.max(dim=1).values == 1).all()
    more = beta.mean(dim=1) - keep
    assert (more > -1e-9).all() and (more <= 1 / n).all()
    order = scores.argsort(dim=1, descending=True, stable=True)  # two of 600 scores may tie
    assert (beta.gather(1, order).diff(dim=1) <= 0).all()


def test_soft_weights_refuse_a_bad_ratio():
    with pytest.raises(ValueError, match="keep ratio must be in"):
        soft_weights(torch.rand(1, 4), 0)


SCORED = [name for name in all_pruners() if PRUNERS[name].score is not None]


def test_methods_with_a_score():
    """A score that does not know an option says nothing about the method with that option."""
    without = {"none", "spatial", "prumerge+", "divprune", "vispruner", "cdpruner", "holov", "dart"}
    without |= {name for name, one in PRUNERS.items() if one.inside}
    assert {"none", *all_pruners()} - set(SCORED) == without
    assert pruner("trim:about=expression").score is not None and pruner("trim:anchor=last").score is None
    assert pruner("prumerge:plus=true").score is None


@pytest.mark.parametrize("name", [*SCORED, "text_similarity:about=prompt", "trim:about=expression,lowest=no"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_scores_are_those_that_the_methods_select_by(name, keep, tiny, pictures):
    """The tokens that stay as themselves are the best by score."""
    visual = tiny.encode(pictures).take(torch.tensor(IMAGE), **tiny.texts(WORDS))
    seeds = [5, 6, 7, 8]
    stay = attention.survivors(prune_images(pruner(name), visual, keep, seeds), 16)
    scores = pruner(name).score(visual, seeds)
    for row, kept in zip(scores, stay):
        best = row.argsort(descending=True, stable=True)[: int(kept.sum())]
        assert kept.nonzero()[:, 0].tolist() == sorted(best.tolist())


def test_merged_tokens_do_not_survive(tiny, pictures):
    made = prune_images(
        pruner("trim"), tiny.encode(pictures).take(torch.arange(3), **tiny.texts(WORDS[:3])), 0.5, [0, 0, 0]
    )
    assert all(len(selection.origin) == 8 for selection in made)
    assert attention.survivors(made, 16).sum(1).tolist() == [7, 7, 7]


def test_agreement_by_hand():
    """Five tokens, the last a sink; two answers of two and one steps, and an empty one."""

    def shown(*rows):
        return Look(torch.tensor([*rows, [0.2] * 5]), [9] * len(rows))

    looks = [
        shown([0.1, 0.4, 0.0, 0.0, 0.5], [0.6, 0.2, 0.1, 0.1, 0.0]),
        shown([0.0, 0.1, 0.2, 0.1, 0.6]),
        Look(torch.full((1, 5), 0.2), []),
    ]
    beta = torch.tensor([[0.9, 0.1, 0.1, 0.1, 5.0], [0.2, 0.2, 0.4, 0.4, 5.0], [0.9, 0.1, 0.1, 0.1, 5.0]])
    stay = torch.tensor([[True, True, False, False, True], [True, False, False, False, False], [True] * 5])
    found = agreement(looks, beta, stay, torch.tensor([[False] * 4 + [True]] * 3))
    # mean beta 0.3: token 0 alone is above; mean 0.3: tokens 2, 3
    assert found["score_rate"][:2] == [0.5, 0.0] and found["score_chance"][:2] == [0.75, 0.5]
    assert found["rate"][:2] == [0.0, 1.0] and found["chance"][:2] == [0.5, 0.75]
    assert found["mass"][:2] == pytest.approx([(1 + 0.8) / 2, 0.0])
    assert all(np.isnan(found[name][2]) for name in ("score_rate", "rate", "mass"))
    unknown = agreement(looks, torch.full((3, 5), torch.nan), stay, torch.zeros(3, 5, dtype=torch.bool))
    assert np.isnan(unknown["score_rate"]).all() and np.isnan(unknown["score_chance"]).all()


def test_a_sink_is_looked_at_by_most_queries_whatever_is_asked():
    even = torch.full((4, 10), 0.1)
    often, seldom = even.clone(), even.clone()
    often[:3, 2], seldom[:2, 2] = 2.0, 2.0  # half of the queries are not a majority
    assert sinks([Look(often[:2], []), Look(often[2:], [])]).tolist() == [i == 2 for i in range(10)]
    assert not sinks([Look(seldom, [])]).any() and not sinks([Look(often, [])], None).any()


def test_rank_correlations_against_scipy():
    draw = np.random.default_rng(0)
    signal = np.repeat(np.arange(8.0), 2)[:, None] * 0.5
    lost = Ratio(signal + draw.normal(size=(16, 30)), np.ones((16, 30)))
    measures = {
        "good": Ratio(signal + draw.normal(size=(16, 30)), np.ones((16, 30))),
        "ratio": Ratio(draw.normal(size=(16, 30)), draw.uniform(1, 2, size=(16, 30))),
    }
    groups = [0, 1] * 8
    found = {row["measure"]: row for row in rank_correlations(measures, lost, [0] * 16, "ratio", resamples=300)}
    for name, measure in measures.items():
        values = measure.above.sum(1) / measure.below.sum(1)
        assert found[name]["rho"] == pytest.approx(spearmanr(values, lost.above.mean(1)).statistic)
        assert found[name]["low"] <= found[name]["rho"] <= found[name]["high"]
    assert found["good"]["difference"] == pytest.approx(found["good"]["rho"] - found["ratio"]["rho"])
    assert found["good"]["difference_low"] > 0 and found["ratio"]["difference_high"] == 0
    within = rank_correlations(measures, lost, groups, "ratio", resamples=10)[1]["rho"]
    x, y = measures["ratio"].above.sum(1) / measures["ratio"].below.sum(1), lost.above.mean(1)
    assert within == pytest.approx(np.mean([spearmanr(x[g::2], y[g::2]).statistic for g in (0, 1)]))
    methods = np.repeat(np.arange(8), 2)
    wider = {
        row["measure"]: row for row in rank_correlations(measures, lost, [0] * 16, "ratio", methods, resamples=300)
    }
    for name in measures:
        assert wider[name]["rho"] == found[name]["rho"]
        assert wider[name]["high"] - wider[name]["low"] > found[name]["high"] - found[name]["low"]


def test_a_weighted_rank_correlation_is_the_one_of_repeated_points():
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 5, (2, 6, 12)).astype(float)  # with ties
    weights = draw.integers(0, 4, (6, 12))
    groups = np.repeat([0, 1], 6)
    found = attention._spearman(x, y, groups, weights)
    for one, a, b, times in zip(found, x, y, weights):
        parts = [
            spearmanr(np.repeat(a[at], times[at]), np.repeat(b[at], times[at])).statistic
            for at in np.split(np.arange(12), 2)
        ]
        assert one == pytest.approx(np.mean(parts))


def test_rows(tiny, tmp_path):
    """Two frames with the engine's expressions and columns; hard and soft agree where soft is hard."""
    rows = pd.DataFrame(
        [
            dict(
                image_id=f"i{i}",
                ref_id=f"i{i}",
                sent_id=s,
                expression=WORDS[i + s],
                width=32,
                height=24,
                x1=1.0,
                y1=1.0,
                x2=20.0,
                y2=20.0,
            )
            for i in range(3)
            for s in range(2)
            if i + s < 4
        ]
    )
    data = RecDataset("noise", "val", rows, lambda name: noise(32, 24, int(name[1])))
    methods = ["random", "divprune"]
    looked, soft = attention.attention_rows(tiny, data, methods, [0.25, 1.0], ["random"], chunk=2, progress=False)
    grid = [*cells("none", ids="original"), *cells(methods, 0.25, "raster", "original")]
    hard = evaluate(tiny, data, grid, tmp_path / "rows.parquet", progress=False)
    assert set(hard.columns) == set(soft.columns) and len(looked) == 4 * len(rows) and len(soft) == 2 * len(rows)
    unpruned = hard.loc[hard["pruner"] == "none", "raw"].tolist()
    assert soft.loc[soft["keep"] == 1, "raw"].tolist() == unpruned
    assert (looked.loc[looked["keep"] == 1, "mass"] == 1).all() and set(looked["tokens"]) == {4, 16}
    assert looked.loc[looked["pruner"] == "divprune", "score_rate"].isna().all()


def test_tiles_are_refused():
    visual = VisualTokens(torch.zeros(1, 4, 3), (2, 2), Signals(), newline=torch.zeros(3))
    with pytest.raises(ValueError, match="visual tokens are one grid"):
        attention.one_grid(visual)


def test_a_method_without_a_score_cannot_select_softly(tiny):
    data = RecDataset("noise", "val", pd.DataFrame(dict(image_id=["i0"])), None)
    with pytest.raises(ValueError, match="needs a score for each token; divprune has none"):
        attention.attention_rows(tiny, data, [], [0.5], ["divprune"], progress=False)


def test_the_decoder_is_itself_again_after_an_error(tiny):
    with pytest.raises(RuntimeError), attention.captured(tiny.decoder):
        raise RuntimeError
    assert shared_prefix.LONG == 64 and not tiny.decoder.layers[0].self_attn._forward_hooks
