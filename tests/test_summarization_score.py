"""ROUGE by hand, baselines, extraction rules, novelty, and differences between systems."""

import numpy as np
import pandas as pd
import pytest
from rouge_score.rouge_scorer import RougeScorer

from analysis.summarization import news
from analysis.summarization.data import Document
from analysis.summarization.score import (
    difference,
    extractor_recall,
    lead,
    novel,
    oracle,
    rouge,
    selected_sentences,
    style,
)

CATS = Document(
    [["the", "cat", "sat"], ["it", "rained"], ["a", "dog", "ran", "home"], ["the", "end"]],
    [["the", "cat", "sat"], ["a", "dog", "ran"]],
    [1, 0, 1, 0],
    "cats",
)
SWAPPED = [["a", "dog", "ran"], ["the", "cat"]]


def test_rouge_by_hand():
    found = rouge([SWAPPED], [CATS]).set_index("metric")
    assert list(found.index) == ["R1", "R2", "RL"] and set(found["document"]) == {"cats"}
    assert found.loc["R1", ["precision", "recall", "f1"]].tolist() == pytest.approx([1, 5 / 6, 10 / 11])
    assert found.loc["R2", ["precision", "recall", "f1"]].tolist() == pytest.approx([3 / 4, 3 / 5, 2 / 3])
    assert found.loc["RL", ["precision", "recall", "f1"]].tolist() == pytest.approx([1, 5 / 6, 10 / 11])


def test_plain_rouge_l_would_be_less():
    plain = RougeScorer(["rougeL"], use_stemmer=True).score("the cat sat a dog ran", "a dog ran the cat")["rougeL"]
    assert plain.recall == 3 / 6
    one_line = rouge([[sum(SWAPPED, [])]], [CATS._replace(abstract=[sum(CATS.abstract, [])])])
    assert one_line.set_index("metric").loc["RL", "recall"] == 3 / 6, "sentences are what makes the difference"


def test_words_are_stemmed_and_empty_summaries_score_nothing():
    document = CATS._replace(abstract=[["dogs", "were", "running"]])
    assert rouge([[["dog", "was", "runs"]]], [document]).set_index("metric").loc["R1", "f1"] == pytest.approx(2 / 3)
    assert (rouge([[]], [CATS])[["precision", "recall", "f1"]] == 0).all(axis=None)
    assert rouge([CATS.abstract], [CATS])["f1"].tolist() == [1, 1, 1]


def test_rouge_says_what_does_not_fit():
    with pytest.raises(ValueError, match="got 2 summaries, 1 documents"):
        rouge([[], []], [CATS])
    with pytest.raises(ValueError, match="'cats' has no abstract"):
        rouge([SWAPPED], [CATS._replace(abstract=[[]])])
    with pytest.raises(ValueError, match="an ID of its own"):
        rouge([SWAPPED, SWAPPED], [CATS, CATS])


def scored(values, first=0):
    names = [f"d{i}" for i in range(first, first + len(values))]
    return pd.concat(
        [
            pd.DataFrame({"document": names, "metric": metric, "f1": values * scale, "recall": 0.5})
            for metric, scale in (("R1", 1.0), ("R2", 0.5))
        ]
    )


def test_the_difference_is_paired_by_document():
    rng = np.random.default_rng(0)
    a = rng.random(60)
    b = a + rng.normal(0.03, 0.02, 60)  # far less than documents differ: only pairing can see it
    found = difference(scored(a), scored(b).sample(frac=1, random_state=1), resamples=500, permutations=500)
    assert found["difference"] == pytest.approx((b - a).mean()) and found["n"] == 60
    assert 0.02 < found["low"] < found["difference"] < found["high"] < 0.04 and found["p"] < 0.01
    assert difference(scored(a), scored(b), "R2", resamples=50)["difference"] == pytest.approx((b - a).mean() / 2)
    same = difference(scored(a), scored(a), resamples=50)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    assert difference(scored(a), scored(b), value="recall", resamples=50)["difference"] == 0


def test_a_difference_needs_the_same_documents():
    a = np.linspace(0, 1, 5)
    with pytest.raises(ValueError, match="a has 5, b has 5, 4 are in both"):
        difference(scored(a), scored(a, first=1))
    with pytest.raises(ValueError, match="a has 10, b has 5"):
        difference(pd.concat([scored(a), scored(a)]), scored(a))
    with pytest.raises(ValueError, match="a has 0"):
        difference(scored(a), scored(a), metric="R3")


def test_lead_and_oracle():
    assert lead(CATS) == CATS.article[:3] and lead(CATS, 1) == CATS.article[:1]
    assert oracle(CATS) == [CATS.article[0], CATS.article[2]]
    with pytest.raises(ValueError, match="'cats' has no labels"):
        oracle(CATS._replace(labels=None))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [1, 4]),
        ({"floor": 3}, [1, 3, 4]),
        ({"floor": 4}, [0, 1, 3, 4]),
        ({"floor": 1}, [1, 4]),
        ({"floor": 9}, [0, 1, 2, 3, 4]),
        ({"budget": 1}, [4]),
        ({"budget": 0}, []),
        ({"threshold": 0.3}, [1, 3, 4]),
        ({"budget": 3, "floor": 5}, [1, 3, 4]),
    ],
)
def test_select_takes_the_best_in_the_order_of_the_article(options, expected):
    assert selected_sentences([0.2, 0.6, 0.2, 0.5, 0.9], **options) == expected


@pytest.mark.parametrize("beta", [[[0.1]], [0.5, np.nan], [1.2], [-0.1]])
def test_a_score_that_is_no_probability_is_refused(beta):
    with pytest.raises(ValueError, match=r"one number in \[0, 1\] per sentence"):
        selected_sentences(beta)


def recall_of(table, rule, metric="R1"):
    row = table[(table["rule"] == rule) & (table["metric"] == metric)].iloc[0]
    return row["recall"], row["sentences"]


def test_extractor_recall_by_its_rules():
    found = extractor_recall([CATS], [[0.4, 0.9, 0.6, 0.1]])
    assert len(found) == 9 and list(found) == ["document", "rule", "metric", "recall", "sentences"]
    assert recall_of(found, "beta > 0.5") == (pytest.approx(3 / 6), 2)
    assert recall_of(found, "at least 5") == (1, 4)
    assert recall_of(found, "matched") == (pytest.approx(3 / 6), 2)
    assert recall_of(extractor_recall([CATS], [[0.4, 0.9, 0.6, 0.1]], [3]), "matched") == (1, 3)
    assert recall_of(extractor_recall([CATS], [[0.9]]), "at least 5") == (pytest.approx(3 / 6), 1)


def test_keeping_more_pays_only_without_a_budget():
    careful, greedy = ([0.9, 0.1, 0.1, 0.1], [0.9, 0.8, 0.7, 0.6])
    a, b = (extractor_recall([CATS], [beta], [1]) for beta in (careful, greedy))
    assert recall_of(b, "beta > 0.5")[0] > recall_of(a, "beta > 0.5")[0]
    assert recall_of(b, "matched") == recall_of(a, "matched") == (pytest.approx(3 / 6), 1)


def test_extractor_recall_says_what_does_not_fit():
    with pytest.raises(ValueError, match="got 2 betas and no budgets for 1 documents"):
        extractor_recall([CATS], [[0.1], [0.2]])
    with pytest.raises(ValueError, match="'cats' has 4 sentences, but more betas"):
        extractor_recall([CATS], [[0.1] * 5])
    with pytest.raises(ValueError, match="has no labels"):
        extractor_recall([CATS._replace(labels=None)], [[0.1] * 4])
    assert len(extractor_recall([CATS._replace(labels=None)], [[0.1] * 4], [1])) == 9


def test_novelty_by_hand():
    article = [["a", "b", "c"], ["d", "e"]]
    assert novel([["a", "b", "x"]], article, 1) == pytest.approx(1 / 3)
    assert novel([["a", "b", "x"]], article, 2) == pytest.approx(1 / 2)
    assert novel([["c", "d"]], article, 2) == 1, "not across sentences of the article"
    assert novel([["a", "b"], ["c", "x"]], article, 2) == pytest.approx(1 / 2), "nor of the summary"
    assert novel([["x", "x", "a"]], article, 1) == pytest.approx(2 / 3), "repetitions count"
    assert np.isnan(novel([["a"]], article, 2)) and np.isnan(novel([], article, 1))


def test_style_has_a_row_per_document():
    found = style([SWAPPED, []], [CATS, CATS._replace(id="more")], orders=(1, 2))
    assert found.columns.tolist() == ["document", "words", "sentences", "novel_1", "novel_2"]
    assert found.loc[0].tolist() == ["cats", 5, 2, 0, 0] and found.loc[1, ["words", "sentences"]].tolist() == [0, 0]
    with pytest.raises(ValueError, match="got 0 summaries"):
        style([], [CATS])


def test_news_leave_room_above_lead_3():
    documents = news.documents("test", 100)
    tables = {
        name: rouge([baseline(d) for d in documents], documents)
        for name, baseline in (("lead", lead), ("oracle", oracle))
    }
    f1 = {name: table.groupby("metric")["f1"].mean() for name, table in tables.items()}
    assert (f1["oracle"] > f1["lead"] + 0.15).all() and (f1["oracle"] < 0.7).all()
    novelty = style([d.abstract for d in documents], documents)["novel_2"].mean()
    assert 0.2 < novelty < 0.6, "part is copied, part is not"
