"""The unified summarizer against loops over single articles and words, hand-computed values and exhaustive search."""

from functools import cache
from itertools import product
from math import log

import pytest
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from analysis.inconsistency import inconsistency_rate, of_words
from analysis.summarization import losses
from analysis.summarization.batch import PAD, START, STOP, UNK, Batch
from analysis.summarization.beam import beam_search, greedy
from analysis.summarization.model import (
    PAPER,
    SMALL,
    SYSTEMS,
    Abstracter,
    Sizes,
    Unified,
    chosen,
    keep_sentences,
    text,
    trainable,
)

TINY = Sizes(vocabulary=9, embedding=3, extractor=2, abstracter=3)
# articles as sentences of word IDs, and abstracts; 9, 10 are outside the vocabulary; the second has fewer than K words
ARTICLES = [[[4, 5, 9], [6, 4], [7, 8, 9, 5]], [[6, 7]], [[8, 9, 10, 4], [10], [5, 6, 6], [7, 4]]]
ABSTRACTS = [[5, 9, 8], [7], [10, 4, 6, 6]]
LABELS = [[1, 0, 1], [1], [0, 1, 1, 0]]


def padded(rows, value=PAD, more=0):
    return pad(pad_sequence([torch.tensor(row) for row in rows], True, value), (0, more), value=value)


def known(ids):
    return [i if i < TINY.vocabulary else UNK for i in ids]


def make(articles=(0, 1, 2), more=0):
    """A batch of the articles, with `more` padding in words, sentences and steps."""
    words = [[word for said in ARTICLES[a] for word in said] for a in articles]
    return Batch(
        padded([known(row) for row in words], more=more),
        padded(words, more=more),
        padded([[n for n, said in enumerate(ARTICLES[a]) for _ in said] for a in articles], -1, more),
        padded([LABELS[a] for a in articles], more=more).double(),
        torch.tensor([len(ARTICLES[a]) for a in articles]),
        padded([[START, *known(ABSTRACTS[a])] for a in articles], more=more),
        padded([[*ABSTRACTS[a], STOP] for a in articles], more=more),
        [[str(i) for i in range(TINY.vocabulary, max(row) + 1)] for row in words],
    )


@cache
def unified(seed=0):
    """A tiny model in float64 with random weights, large enough for everything to depend on everything."""
    model, draw = Unified(TINY).double(), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.uniform_(-2, 2, generator=draw)
    return model


# One article, one word at a time: from the formulae, with the model's parameters but none of its code.


def weights(model, prefix):
    return {name.removeprefix(prefix): p for name, p in model.named_parameters() if name.startswith(prefix)}


def linear(p, name, x):
    return p[f"{name}.weight"] @ x + p.get(f"{name}.bias", 0)


def gru(p, name, xs):
    h, states = xs[0].new_zeros(TINY.extractor), []
    for x in xs:
        (r, z, n), (hr, hz, hn) = (
            (p[name.format(f"weight_{a}")] @ y + p[name.format(f"bias_{a}")]).chunk(3)
            for a, y in (("ih", x), ("hh", h))
        )
        z = (z + hz).sigmoid()
        h = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h
        states.append(h)
    return states


def lstm(p, name, x, h, c):
    gates = p[name.format("weight_ih")] @ x + p[name.format("weight_hh")] @ h + p[name.format("bias_ih")]
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def both_ways(p, name, xs):
    back = gru(p, f"{name}.{{}}_l0_reverse", xs[::-1])[::-1]
    return [torch.cat(pair) for pair in zip(gru(p, f"{name}.{{}}_l0", xs), back)]


def naive_extractor(model, article):
    """Logits [N] of an article."""
    p = weights(model, "extractor.")
    means = [
        sum(both_ways(p, "over_words", [p["embed.weight"][word] for word in known(said)])) / len(said)
        for said in article
    ]
    states = both_ways(p, "over_sentences", means)
    whole = linear(p, "article", sum(states) / len(states)).tanh()
    summary, logits = torch.zeros_like(whole), []
    for state in states:
        h = linear(p, "sentence", state).tanh()
        logits.append(
            linear(p, "content", h)[0] + h @ p["salience.weight"].T @ whole - h @ p["novelty.weight"].T @ summary.tanh()
        )
        summary = summary + logits[-1].sigmoid() * h
    return torch.stack(logits)


def naive_abstracter(model, words, inputs, beta=None):
    """For each step P_final [V + oov], alpha [M], alphahat [M]; words with IDs as in `extended`, beta of each word."""
    p, zero = weights(model, "abstracter."), torch.zeros(TINY.abstracter, dtype=torch.float64)
    embedded, runs = [p["embed.weight"][word] for word in known(words)], []
    for name, order in (("encoder.{}_l0", 1), ("encoder.{}_l0_reverse", -1)):
        h, c, states = zero, zero, []
        for x in embedded[::order]:
            h, c = lstm(p, name, x, h, c)
            states.append(h)
        runs.append((states[::order], h, c))
    states = [torch.cat(pair) for pair in zip(runs[0][0], runs[1][0])]
    h, c = (linear(p, f"reduce_{x}", torch.cat([runs[0][i], runs[1][i]])).relu() for i, x in ((1, "h"), (2, "c")))
    context, coverage, found = torch.zeros_like(states[0]), [0.0] * len(words), []
    for word in inputs:
        x = linear(p, "from_word", p["embed.weight"][word]) + linear(p, "from_context", context)
        h, c = lstm(p, "cell.{}", x, h, c)
        query = linear(p, "query", torch.cat([c, h]))
        energy = [
            linear(p, "energy", (linear(p, "key", state) + query + p["covered.weight"][:, 0] * cov).tanh())[0]
            for state, cov in zip(states, coverage)
        ]
        weight = [e.exp() for e in energy]
        alpha = [w / sum(weight) for w in weight]
        alphahat = alpha
        if beta is not None:
            alphahat = [a * b / sum(a * b for a, b in zip(alpha, beta)) for a, b in zip(alpha, beta)]
        coverage = [cov + a for cov, a in zip(coverage, alphahat)]
        context = sum(a * state for a, state in zip(alphahat, states))
        p_gen = linear(p, "gate", torch.cat([context, h, c, x]))[0].sigmoid()
        final = list(p_gen * linear(p, "project", linear(p, "readout", torch.cat([context, h]))).softmax(0))
        final += [torch.zeros((), dtype=torch.float64)] * (max([*words, TINY.vocabulary - 1]) + 1 - TINY.vocabulary)
        for a, word in zip(alphahat, words):
            final[word] = final[word] + (1 - p_gen) * a
        found.append((final, alpha, alphahat))
    return found


def naive_losses(model, article, labels, abstract, modulated):
    logits = naive_extractor(model, article)
    beta = [logits[n].sigmoid() for n, said in enumerate(article) for _ in said]
    words = [word for said in article for word in said]
    steps = naive_abstracter(model, words, [START, *known(abstract)], beta if modulated else None)
    found = dict.fromkeys(losses.WEIGHTS, 0)
    for logit, label in zip(logits, labels):
        found["extraction"] -= (logit.sigmoid() if label else 1 - logit.sigmoid()).log() / len(labels)
    for t, ((final, alpha, alphahat), target) in enumerate(zip(steps, [*abstract, STOP])):
        top = sorted(range(len(words)), key=lambda m: -alpha[m])[:3]
        found["abstraction"] -= final[target].log() / len(steps)
        found["inconsistency"] -= (sum(alpha[m] * beta[m] for m in top) / 3).log() / len(steps)
        for m, a in enumerate(alphahat):
            found["coverage"] += min(a, sum(before[2][m] for before in steps[:t])) / len(steps)
    return found


def test_parameters_are_those_that_see_et_al_published():
    model = Abstracter(PAPER)
    assert trainable(model) == 21_501_265
    assert trainable(model.gate) == 1_153 and trainable(model.covered) == 512
    assert trainable(Unified(SMALL)) < 500_000


@pytest.mark.parametrize("system", ["end-to-end", "pointer-generator"])
def test_a_training_step_is_that_of_a_loop_over_articles_and_words(system):
    model = unified()
    got = losses.total(model(make(), system))
    parts = [naive_losses(model, *one, system == "end-to-end") for one in zip(ARTICLES, LABELS, ABSTRACTS)]
    expected = {name: sum(part[name] for part in parts) / len(parts) for name in losses.WEIGHTS}
    expected["total"] = sum(weight * expected[name] for name, weight in losses.WEIGHTS.items())
    assert min(expected.values()) > 0.01
    torch.testing.assert_close(got, expected)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours, theirs = (torch.autograd.grad(loss["total"], list(trained.values())) for loss in (got, expected))
    for name, a, b in zip(trained, ours, theirs):
        torch.testing.assert_close(a, b, msg=lambda text: f"{name}: {text}")


def test_modulated_attention():
    model, batch = unified().abstracter, make(more=2)
    beta = torch.rand(batch.words.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = model(batch, beta)
    product_ = got.alpha * beta[:, None]
    torch.testing.assert_close(got.alphahat, product_ / product_.sum(-1, keepdim=True))
    assert (got.alpha - got.alphahat).abs().max() > 0.1
    assert (got.alpha[..., -2:] == 0).all() and (got.alphahat[..., -2:] == 0).all()
    beta[0, 3:], beta[1] = 0, 0  # a sentence past the limit, and an article of which nothing is left
    got = model(batch, beta)
    assert got.alphahat[0, :, 3:].max() < 1e-30
    plain = model(batch)
    torch.testing.assert_close(got.alphahat[1], plain.alphahat[1])
    torch.testing.assert_close(plain.alpha, plain.alphahat)


def test_beta_of_words():
    beta = torch.tensor([[0.2, 0.7], [0.9, 0.0]])
    got = of_words(beta, torch.tensor([[0, 1, 1, 2, -1], [0, 0, -1, -1, -1]]))  # sentence 2 is past the limit
    torch.testing.assert_close(got, torch.tensor([[0.2, 0.7, 0.7, 0, 0], [0.9, 0.9, 0, 0, 0]]))


def test_p_final_on_values_by_hand():
    """p_gen = 1/4, a vocabulary of 9 equally likely words, and three words to copy of which two are the same."""
    model = Abstracter(TINY).double()
    for layer in (model.gate, model.readout, model.project):
        layer.weight.data.zero_(), layer.bias.data.zero_()
    model.gate.bias.data.fill_(log(1 / 3))
    _, step = model.step(torch.zeros(1, 3).double(), *model.encode(torch.tensor([[4, UNK, 4]])))
    step = step._replace(alphahat=torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64))
    got = model.distribution(step, torch.tensor([[4, 9, 4]]), oov=2)[0]
    expected = [1 / 36] * 9 + [0.75 * 0.3, 0]
    expected[4] += 0.75 * 0.7
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("modulated", [False, True])
def test_p_final_sums_to_one_and_is_what_training_sees(modulated):
    model, batch = unified().abstracter, make()
    beta = torch.linspace(0.1, 1, batch.words.numel()).view(batch.words.shape).double() if modulated else None
    got = model(batch, beta)
    memory, state = model.encode(batch.words, beta)
    for t in range(batch.inputs.shape[1]):
        state, step = model.step(model.from_word(model.embed(batch.inputs[:, t])), memory, state)
        final = model.distribution(step, batch.extended, oov=2)
        torch.testing.assert_close(final.sum(-1), torch.ones(3).double())
        torch.testing.assert_close(final.gather(1, batch.target[:, t, None])[:, 0].log(), got.log_prob[:, t])


def test_coverage_may_be_left_out():
    """Attention does not see it then, as before the last thousand steps of the abstracter's pretraining."""
    model, batch = unified().abstracter, make()
    seen, unseen = model(batch), model(batch, coverage=False)
    torch.testing.assert_close(seen.alpha[:, 0], unseen.alpha[:, 0])
    assert (seen.alpha[:, 1] - unseen.alpha[:, 1]).abs().max() > 0.01
    blind = Abstracter(TINY).double()
    blind.load_state_dict(model.state_dict() | {"covered.weight": torch.zeros(6, 1)})
    torch.testing.assert_close(blind(batch).alpha, unseen.alpha)


@pytest.mark.parametrize("system", SYSTEMS)
def test_padding_and_other_articles_change_nothing(system):
    model = unified(seed=1)
    whole, wide = model(make(), system), model(make(more=3), system)
    torch.testing.assert_close(losses.total(wide), losses.total(whole))
    assert wide.beta[:, -3:].abs().max() == 0
    for a, article in enumerate(ARTICLES):
        alone = model(make((a,)), system)
        steps, words = len(ABSTRACTS[a]) + 1, alone.batch.words.shape[1]
        for other in (whole, wide):
            torch.testing.assert_close(other.logits[a, : len(article)], alone.logits[0])
            torch.testing.assert_close(other.beta[a, : len(article)], alone.beta[0])
            torch.testing.assert_close(other.log_prob[a, :steps], alone.log_prob[0])
            for name in ("alpha", "alphahat"):
                torch.testing.assert_close(getattr(other, name)[a, :steps, :words], getattr(alone, name)[0])
                assert (getattr(other, name)[a, :, words:] == 0).all()


def test_sentences_past_the_limit():
    """The extractor does not read them, and modulated attention does not look at them."""
    model, cut = unified(), make()
    cut = cut._replace(labels=cut.labels[:, :1], sentences=cut.sentences.clamp(max=1))
    got = model(cut)
    for a, article in enumerate(ARTICLES):
        torch.testing.assert_close(got.logits[a], naive_extractor(model, article[:1]))
    past = cut.sentence > 0
    assert got.alphahat.transpose(1, 2)[past].max() < 1e-30 < 1e-6 < got.alpha.transpose(1, 2)[past].max()


def test_losses_by_hand():
    logits, labels = torch.tensor([[0.0, 0.0, 99.0], [log(3), 5.0, 5.0]]), torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    loss = losses.extraction(logits, labels, torch.tensor([2, 1]))
    torch.testing.assert_close(loss, torch.tensor((log(2) + log(4)) / 2))
    written = torch.tensor([[True, True, False], [True, False, False]])
    log_prob = torch.tensor([[-1.0, -3.0, -50], [-4.0, -50, -50]])
    torch.testing.assert_close(losses.abstraction(log_prob, written), torch.tensor(3.0))
    alphahat = torch.tensor([[[0.5, 0.5, 0.0], [0.6, 0.1, 0.3], [1.0, 0, 0]], [[1.0, 0, 0]] * 3])
    torch.testing.assert_close(losses.coverage(alphahat, written), torch.tensor((0.6 / 2 + 0) / 2))
    three = torch.ones(1, 3, dtype=torch.bool)  # the third step: min(1, 1.1) is 1
    torch.testing.assert_close(losses.coverage(alphahat[:1], three), torch.tensor((0 + 0.6 + 1) / 3))


def test_inconsistency_loss_by_hand():
    """The three largest alpha count (not the largest products), and the mean is taken before the logarithm."""
    alpha = torch.tensor([[[0.5, 0.25, 0.15, 0.1]]], requires_grad=True)
    beta = torch.tensor([[0.2, 0.8, 0.0, 1.0]], requires_grad=True)
    written = torch.ones(1, 1, dtype=torch.bool)
    loss = losses.inconsistency(alpha, beta, written)
    torch.testing.assert_close(loss, torch.tensor(-log((0.1 + 0.2 + 0) / 3)))
    loss.backward()
    torch.testing.assert_close(alpha.grad, -torch.tensor([[[0.2, 0.8, 0.0, 0.0]]]) / 0.3)
    torch.testing.assert_close(beta.grad, -torch.tensor([[0.5, 0.25, 0.15, 0.0]]) / 0.3)
    short = losses.inconsistency(torch.tensor([[[0.6, 0.4]]]), torch.tensor([[0.5, 1.0]]), written)
    torch.testing.assert_close(short, torch.tensor(-log(0.7 / 3)))
    torch.testing.assert_close(losses.inconsistency(alpha, beta, written, k=1), torch.tensor(-log(0.1)))


def test_where_gradients_go():
    def reached(name, system):
        model = unified()
        model.zero_grad()
        losses.total(model(make(), system), {name: 1.0})["total"].backward()
        return tuple(
            any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
            for part in (model.extractor, model.abstracter)
        )

    assert reached("inconsistency", "end-to-end") == (True, True)
    assert reached("abstraction", "end-to-end") == (True, True)
    assert reached("abstraction", "pointer-generator") == (False, True)
    assert reached("coverage", "two-stage") == (False, True)
    assert reached("extraction", "end-to-end") == (True, False)


def test_inconsistency_rate_by_hand():
    alpha = torch.eye(5)[None, [0, 1, 2, 4]]  # looks at words 0, 1, 2, 4
    beta, sentence = torch.tensor([[0.9, 0.1, 0.4, 0.0]]), torch.tensor([[0, 0, 1, 2, 3]])  # word 4: past the limit
    three = torch.tensor([3])  # mean 1.4 / 3: sentences 1, 2 are below, and so is what is past the limit
    got = inconsistency_rate(alpha, beta, sentence, three)
    torch.testing.assert_close(torch.cat(got), torch.tensor([2 / 4, 3 / 5, 5 / 6]))
    first = torch.tensor([[True, True, True, False]])
    assert inconsistency_rate(alpha, beta, sentence, three, first).rate.item() == pytest.approx(1 / 3)
    four = inconsistency_rate(alpha, beta, sentence)  # mean 0.35: sentence 2 is above it now
    torch.testing.assert_close(torch.cat(four), torch.tensor([2 / 4, 2 / 5, 5 / 4]))
    padded_ = inconsistency_rate(pad(alpha, (0, 3)), pad(beta, (0, 2)), pad(sentence, (0, 3), value=-1), three)
    torch.testing.assert_close(padded_, got)
    equal = inconsistency_rate(alpha, torch.full((1, 7), 0.1), sentence)  # whose mean in float32 is above 0.1
    assert equal.rate == 0 and equal.chance == 0 and equal.ratio.isnan()


def test_chosen_sentences():
    beta = torch.tensor([[0.6, 0.2, 0.9, 0.1], [0.3, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    there = torch.tensor([4, 2, 1])
    assert chosen(beta, there).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    assert chosen(beta, there, at_least=3).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert not chosen(beta, there, at_least=0)[1].any()


def test_select_reads_the_chosen_sentences_only():
    batch = make()
    keep = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    got = keep_sentences(batch, keep, TINY.vocabulary)
    assert got.extended.tolist() == [[6, 4, PAD], [6, 7, PAD], [10, 7, 4]]
    assert got.words.tolist() == [[6, 4, PAD], [6, 7, PAD], [UNK, 7, 4]]
    assert got.sentence.tolist() == [[1, 1, -1], [0, 0, -1], [1, 3, 3]]
    assert got.target.tolist() == [[5, UNK, 8, STOP, PAD], [7, STOP, PAD, PAD, PAD], [10, 4, 6, 6, STOP]]
    with pytest.raises(ValueError, match=r"articles \[1\] of the batch keep no sentence"):
        keep_sentences(batch, keep & torch.tensor([[True], [False], [True]]), TINY.vocabulary)


def test_two_stage_with_all_sentences_is_the_pointer_generator():
    model, batch = Unified(TINY).double(), make(more=2)
    model.load_state_dict(unified().state_dict())
    model.extractor.content.bias.data.fill_(50)
    two, one = model(batch, "two-stage"), model(batch, "pointer-generator")
    torch.testing.assert_close(two.log_prob, one.log_prob)
    torch.testing.assert_close(two.alpha, one.alpha[..., :-2])
    model.extractor.content.bias.data.fill_(-50)  # now nothing is above 0.5, so one sentence each is read
    left = model(batch, "two-stage")
    assert [len(set(row) - {-1}) for row in left.batch.sentence.tolist()] == [1, 1, 1]
    expected = model.abstracter(keep_sentences(batch, chosen(left.beta, batch.sentences), TINY.vocabulary))
    torch.testing.assert_close(left.log_prob, expected.log_prob)


def following(model, article, tokens):
    """Naive log P_final after these tokens, and without PAD and START, which are no words of an abstract."""
    words = [word for said in ARTICLES[article] for word in said]
    beta = naive_extractor(model, ARTICLES[article]).sigmoid()
    beta = [beta[n] for n, said in enumerate(ARTICLES[article]) for _ in said]
    final = naive_abstracter(model, words, [START, *known(tokens)], beta)[-1][0]
    return {i: float(p.log()) for i, p in enumerate(final) if i not in (PAD, START)}


def writer(seed=2):
    """A model that stops now and then, and never writes the words 5 to 8: 4, UNK, STOP and what is copied are left."""
    model = Unified(TINY).double()
    model.load_state_dict(unified(seed).state_dict())
    model.abstracter.project.bias.data = torch.tensor([0, 0, 0, 1.0, 0, -99, -99, -99, -99]).double()
    return model


@torch.inference_mode()
def test_a_wide_beam_is_exhaustive_search():
    model, batch = writer(), make((0, 1))
    got = beam_search(model, batch, beam=200, shortest=1, longest=3)
    after = cache(lambda article, tokens: following(model, article, tokens))
    for article, best in enumerate(got):
        ids = [i for i in after(article, ()) if i != STOP]
        scores = {}
        for n in (1, 2):
            for tokens in product(ids, repeat=n):
                total = sum(after(article, tokens[:t])[token] for t, token in enumerate([*tokens, STOP]))
                scores[tokens] = total / (n + 2)
        assert tuple(best.tokens) == max(scores, key=scores.get)
        assert best.score == pytest.approx(max(scores.values()))


def naive_beam(model, article, beam, shortest, longest):
    """Beam search with lists as See et al. have it: tokens and score of the best."""
    live, results = [((), 0.0)], []
    for step in range(longest):
        candidates = sorted(
            (
                (tokens + (token,), total + gain)
                for tokens, total in live
                for token, gain in following(model, article, tokens).items()
            ),
            key=lambda one: -one[1],
        )
        live = []
        for tokens, total in candidates:
            if tokens[-1] != STOP:
                live.append((tokens, total))
            elif step >= shortest:
                results.append((tokens[:-1], total / (len(tokens) + 1)))
            if len(live) == beam or len(results) == beam:
                break
        if len(results) == beam:
            break
    return max(results or [(tokens, total / (len(tokens) + 1)) for tokens, total in live], key=lambda one: one[1])


@pytest.mark.parametrize(
    "seed, beam, shortest, longest",
    [
        (2, 1, 1, 6),
        (2, 2, 2, 6),
        (2, 3, 1, 5),
        (2, 4, 3, 5),
        (2, 3, 4, 4),
        (1, 2, 1, 6),  # the first article is done long before the last
    ],
)
@torch.inference_mode()
def test_beam_search_of_a_batch_is_that_of_lists(seed, beam, shortest, longest):
    model = writer(seed)
    got = beam_search(model, make(more=1), beam=beam, shortest=shortest, longest=longest)
    for article, best in enumerate(got):
        tokens, score = naive_beam(model, article, beam, shortest, longest)
        assert tuple(best.tokens) == tokens and best.score == pytest.approx(score)
        assert shortest <= len(best.tokens) <= longest


@torch.inference_mode()
def test_a_beam_of_one_is_greedy():
    model, lengths = writer(), set()
    for article, best in enumerate(greedy(model, make(), shortest=1, longest=6)):
        tokens = []
        while len(tokens) < 6:
            gains = following(model, article, tokens)
            token = max((i for i in gains if tokens or i != STOP), key=gains.get)
            if token == STOP:
                break
            tokens.append(token)
        assert best.tokens == tokens
        lengths.add(len(tokens))
    assert len(lengths) > 1


@pytest.mark.parametrize("system", SYSTEMS)
@torch.inference_mode()
def test_a_hypothesis_is_what_teacher_forcing_sees_for_its_tokens(system):
    model, stopped = writer(), set()
    for longest in (5, 12):
        for a, best in enumerate(beam_search(model, make(), system, beam=3, shortest=2, longest=longest)):
            target = [*best.tokens, STOP][:longest]
            batch = make((a,))._replace(
                inputs=torch.tensor([[START, *known(best.tokens)][:longest]]), target=torch.tensor([target])
            )
            forced = model(batch, system)
            words = forced.batch.words.shape[1]
            torch.testing.assert_close(best.alpha[:, :words], forced.alpha[0])
            torch.testing.assert_close(best.alphahat[:, :words], forced.alphahat[0])
            torch.testing.assert_close(best.beta[: len(ARTICLES[a])], forced.beta[0])
            assert best.sentence[:words].tolist() == forced.batch.sentence[0].tolist()
            assert best.score == pytest.approx(float(forced.log_prob.sum()) / (len(target) + 1))
            assert len(best.tokens) >= 2 and not {PAD, START, STOP} & set(best.tokens)
            stopped.add(len(best.tokens) < longest)
    assert True in stopped


@torch.inference_mode()
def test_no_abstract_is_empty():
    """Not even where the model wants to stop at once, or to write what is no word."""
    model = writer()
    model.abstracter.project.bias.data[[PAD, START, STOP]] = 99
    model.abstracter.gate.bias.data.fill_(99)
    for beam, longest in ((1, 4), (4, 4), (1, 1), (4, 1)):
        for best in beam_search(model, make(), beam=beam, shortest=0, longest=longest):
            assert len(best.tokens) == 1 and best.tokens[0] not in (PAD, START, STOP)


def test_text_has_the_articles_own_words():
    words = ["[PAD]", "[UNK]", "[START]", "[STOP]", "the", "match"]
    assert text([4, 7, 5, 6, 1], words, ["ajax", "feyenoord"]) == ["the", "feyenoord", "match", "ajax", "[UNK]"]


def test_half_precision():
    torch.manual_seed(0)
    model, batch = Unified(TINY), make()
    with torch.autocast("cpu", torch.bfloat16):
        half = losses.total(model(batch))
    half["total"].backward()
    for name, loss in losses.total(model(batch)).items():
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], loss, rtol=0.03, atol=0.03)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: unified()(make(), "soft"), "unknown system 'soft'; valid: pointer-generator, two-stage, end-to-end"),
        (
            lambda: losses.total(unified()(make()), {"abstract": 1}),
            "unknown loss 'abstract'; did you mean 'abstraction'",
        ),
        (lambda: unified()(make()._replace(words=make().extended)), "a word of ID 10, but the model's vocabulary ends"),
        (
            lambda: unified()(make()._replace(words=torch.zeros_like(make().words))),
            "at least one sentence and one word",
        ),
        (lambda: unified()(make()._replace(sentences=torch.tensor([3, 0, 4]))), "at least one sentence and one word"),
        (lambda: beam_search(unified(), make(), beam=0), "beam >= 1, .* got beam=0"),
        (lambda: beam_search(unified(), make(), shortest=9, longest=8), "shortest <= longest"),
        (lambda: losses.inconsistency(torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1) > 0, k=0), "got k=0"),
        (lambda: Sizes(vocabulary=4), "vocabulary must be at least 5, got 4"),
        (lambda: Sizes(extractor=0), "extractor must be at least 1, got 0"),
    ],
)
def test_bad_input_gets_one_clear_message(call, message):
    with pytest.raises(ValueError, match=message):
        call()
