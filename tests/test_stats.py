"""Clustered intervals and paired tests against brute force, and what must not move them."""

import itertools
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.positions import parse_spec
from analysis.pruning import PRUNERS
from analysis.published import PUBLISHED, UPSTREAM_IDS, published
from analysis.registry import matching
from analysis.stats import (
    clustered_interval,
    fdr,
    gap_pairs,
    line,
    paired_cells,
    paired_difference,
    rate_interval,
    retained,
    retained_cells,
    retention,
    variance_shares,
)


def draws(n=300, images=60, seed=0, spread=0.35):
    """0/1 values whose chance of success is shared by all expressions of an image."""
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, images, n)
    chance = np.clip(0.5 + spread * rng.standard_normal(images), 0, 1)
    return (rng.random(n) < chance[clusters]).astype(float), clusters


def test_interval_is_the_naive_cluster_bootstrap():
    values, clusters = draws()
    rng, means = np.random.default_rng(1), []
    members = [values[clusters == c] for c in np.unique(clusters)]
    for _ in range(4000):
        means.append(np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]).mean())
    for level, tolerance in ((0.95, 0.01), (0.5, 0.006)):
        expected = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        np.testing.assert_allclose(clustered_interval(values, clusters, level, 4000), expected, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_copies_within_an_image_add_no_certainty(seed, copies):
    """The reason for clustering: asking the same question again narrows nothing."""
    values, clusters = draws(40, 10, seed)
    repeated = clustered_interval(np.repeat(values, copies), np.repeat(clusters, copies), resamples=200)
    np.testing.assert_allclose(repeated, clustered_interval(values, clusters, resamples=200), atol=1e-12)


def test_interval_edge_cases():
    values, clusters = draws()
    assert clustered_interval(values, clusters) == clustered_interval(values, clusters)
    assert clustered_interval(values, clusters) != clustered_interval(values, clusters, seed=1)
    names = np.array([f"image {c}" for c in clusters])
    assert clustered_interval(pd.Series(values), names) == clustered_interval(values, clusters)
    assert clustered_interval(np.ones(5), np.arange(5)) == (1, 1) and clustered_interval([0, 1], [0, 1]) == (0, 1)
    assert np.isnan(clustered_interval([0, 1, 1], [7, 7, 7])).all() and np.isnan(clustered_interval([], [])).all()
    for bad in (([0, 1], [0]), ([0, np.nan], [0, 1]), ([0, 1], [0, None]), ([[0, 1]], [[0, 1]])):
        with pytest.raises(ValueError, match="one cluster per value|must not be missing"):
            clustered_interval(*bad)


def images(rng, rate, alike, count):
    """Hits of 3 to 12 expressions of each image; alike: correlation of two expressions of an image, in (0, 1)."""
    sizes = rng.integers(3, 13, count)
    chance = rng.beta(rate * (1 - alike) / alike, (1 - rate) * (1 - alike) / alike, count)
    clusters = np.repeat(np.arange(count), sizes)
    return (rng.random(len(clusters)) < chance[clusters]).astype(float), clusters


@pytest.mark.parametrize("count", [30, 50])
@pytest.mark.parametrize("rate", [0.003, 0.01, 0.03, 0.1, 0.5])
def test_rate_intervals_cover_the_truth_also_at_few_images_and_tiny_rates(count, rate):
    """95 % intervals cover 91 % or more; a bootstrap of images covers 20 to 90 % at 3 % and below."""
    rng = np.random.default_rng(0)
    for alike in (0.1, 0.5):
        found = np.array([rate_interval(*images(rng, rate, alike, count)) for _ in range(400)])
        assert ((found[:, 0] <= rate) & (rate <= found[:, 1])).mean() >= 0.91
        assert (found[:, 1] > 0).all() and (found[:, 0] < 1).all()


@pytest.mark.parametrize("left", [0.01, 0.3, 0.9])
def test_intervals_of_differences_and_quotients_cover_the_truth_at_30_images(left):
    rng, covered = np.random.default_rng(1), np.zeros(2)
    for _ in range(400):
        full, clusters = images(rng, 0.75, 0.2, 30)
        pruned = full * (rng.random(len(full)) < left)
        difference, share = (
            paired_difference(full, pruned, clusters, permutations=1),
            retained(full, pruned, clusters),
        )
        covered += (
            difference["low"] <= 0.75 * (left - 1) <= difference["high"],
            share["low"] <= left <= share["high"],
        )
    assert (covered >= 0.92 * 400).all(), covered


def test_images_are_what_is_counted_in_a_rate():
    """Expressions as units cover less than 88 % where an image's expressions are alike; images 92 % and more."""
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(300):
        values, clusters = images(rng, 0.5, 0.4, 60)
        for i, grouping in enumerate((clusters, np.arange(len(values)))):
            low, high = rate_interval(values, grouping)
            covered[i] += low <= 0.5 <= high
    assert covered[0] >= 276 and covered[1] < 264, covered


def test_rate_interval_at_its_ends():
    clusters = np.repeat(np.arange(40), 5)
    none, every = rate_interval(np.zeros(200), clusters), rate_interval(np.ones(200), clusters)
    t2 = 2.0227**2  # Student's t, 39 degrees
    assert none == pytest.approx((0, t2 / (40 + t2)), abs=1e-4)  # the rule of three, for so few images
    assert every == pytest.approx((1 - none[1], 1), abs=1e-9)
    one = rate_interval(np.eye(1, 200)[0], clusters)
    assert 0 < one[0] < 1 / 200 < one[1] and one[1] > 0.02
    values, clusters = draws()
    low, high = rate_interval(values, clusters)
    wide, narrow = rate_interval(values, clusters, 0.99), rate_interval(values, clusters, 0.5)
    assert wide[0] < low < narrow[0] < values.mean() < narrow[1] < high < wide[1]
    np.testing.assert_allclose(rate_interval(1 - values, clusters), (1 - high, 1 - low))
    np.testing.assert_allclose((low, high), clustered_interval(values, clusters), atol=0.02)  # nothing new at 50 %
    assert np.isnan(rate_interval([0, 1, 1], [7, 7, 7])).all() and np.isnan(rate_interval([], [])).all()
    with pytest.raises(ValueError, match="each value must be 0 or 1"):
        rate_interval([0, 0.5], [0, 1])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_copies_within_an_image_add_no_certainty_about_a_rate(seed, copies):
    values, clusters = draws(40, 10, seed)
    repeated = rate_interval(np.repeat(values, copies), np.repeat(clusters, copies))
    np.testing.assert_allclose(repeated, rate_interval(values, clusters), atol=1e-12)


def test_interval_and_test_are_fast():
    values, clusters = draws(3500, 500)
    start = time.process_time()
    clustered_interval(values, clusters)
    assert time.process_time() - start < 0.5
    start = time.process_time()
    paired_difference(values, values[::-1], clusters)
    assert time.process_time() - start < 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_p_is_the_enumerated_one_for_few_clusters(seed, images):
    rng = np.random.default_rng(seed)
    a, b, clusters = rng.integers(0, 2, 20), rng.integers(0, 2, 20), rng.integers(0, images, 20)
    sums = [sum((b - a)[clusters == c]) for c in range(images)]
    flips = [abs(sum(s * x for s, x in zip(signs, sums))) for signs in itertools.product((-1, 1), repeat=images)]
    result = paired_difference(a, b, clusters, resamples=50)
    assert result["p"] == pytest.approx(np.mean([f >= abs(sum(sums)) for f in flips]))
    assert result["difference"] == pytest.approx(b.mean() - a.mean())


def test_p_is_uniform_without_a_difference():
    """Rejections at 5 % under the null: about 10 of 200 with images as units, far more with expressions as units."""
    rng, rejected = np.random.default_rng(0), np.zeros(2)
    for _ in range(200):
        clusters = np.repeat(np.arange(30), 7)
        shift = rng.integers(0, 2, 30)[clusters]  # a whole image flips between the cells
        a = np.where(shift, 0, 1)
        b = 1 - a
        for i, grouping in enumerate((clusters, np.arange(len(a)))):
            rejected[i] += paired_difference(a, b, grouping, resamples=2, permutations=199)["p"] <= 0.05
    assert rejected[0] <= 20 and rejected[1] > 60, rejected


def test_paired_difference_signs_and_extremes():
    a, clusters = draws()
    b = np.maximum(a, draws(seed=5)[0])
    forth, back = paired_difference(a, b, clusters), paired_difference(b, a, clusters)
    assert forth["difference"] > 0 and forth["low"] > 0 and forth["p"] < 0.01
    assert forth["low"] <= forth["difference"] <= forth["high"]
    assert back["p"] == forth["p"]
    np.testing.assert_allclose([back["low"], back["high"]], [-forth["high"], -forth["low"]], atol=1e-12)
    same = paired_difference(a, a, clusters)
    assert (same["difference"], same["p"]) == (0, 1) and same["low"] < 0 < same["high"]  # 60 images prove no equality
    assert same["high"] - same["low"] < 0.6 * (forth["high"] - forth["low"])
    half = paired_difference(a / 2, a / 2, clusters)
    assert (half["low"], half["high"]) == (0, 0)  # no hits: the bootstrap
    assert paired_difference([0, 0], [1, 1], [3, 3])["p"] == 1  # one image proves nothing
    assert paired_difference([0] * 40, [1] * 5 + [0] * 35, range(40))["p"] == 2 / 2**5  # exact: 35 images do not count
    c = draws(seed=6)[0]
    first, second = (paired_difference(a / 2, c / 2, clusters, 0.9, 300, seed=seed) for seed in (0, 1))
    assert first["p"] != second["p"] and first["p"] == pytest.approx(second["p"], abs=0.03)  # sampled, hence seeded
    for seed, result in enumerate((first, second)):
        assert (result["low"], result["high"]) == clustered_interval((c - a) / 2, clusters, 0.9, 300, seed)
    hits = paired_difference(a, c, clusters, permutations=1)
    bootstrap = clustered_interval(c - a, clusters)
    np.testing.assert_allclose((hits["low"], hits["high"]), bootstrap, atol=0.025)  # the same far from 0 and 1
    for bad in (([0, 1], [0], [0, 1]), ([], [], [])):
        with pytest.raises(ValueError, match="aligned and not empty"):
            paired_difference(*bad)
    with pytest.raises(ValueError, match="one cluster per value"):
        paired_difference([0, 1], [1, 1], [0])


def cells():
    a, image = draws(90, 30)
    b, _ = draws(90, 30, seed=1)
    keys = {"image_id": image, "ref_id": np.arange(90) // 2, "sent_id": np.arange(90)}
    full = pd.DataFrame(keys | {"pruner": "none", "keep": np.nan, "ids": "compact", "correct": a > 0})
    gap = pd.DataFrame(keys | {"pruner": "trim", "keep": 0.1, "ids": "original", "correct": b > 0})
    return full, gap, paired_difference(a, b, image) | {"n": 90}


def test_paired_cells_joins_by_expression_not_by_place():
    full, gap, expected = cells()
    mixed = pd.concat([full, gap.sample(frac=1, random_state=0)])
    assert paired_cells(mixed, {"keep": None}, {"pruner": "trim", "ids": "original"}) == expected
    other = paired_cells(mixed, {"keep": np.nan}, {"keep": 0.1}, level=0.9)
    assert other["difference"] == expected["difference"] and other["low"] > expected["low"]


def test_paired_cells_refuses_what_is_not_paired():
    full, gap, _ = cells()
    none, trim = {"pruner": "none"}, {"pruner": "trim"}
    with pytest.raises(ValueError, match="0 of cell a are missing in cell b, 3 of cell b are missing in cell a"):
        paired_cells(pd.concat([full[3:], gap]), none, trim)
    with pytest.raises(ValueError, match="2 of cell a are missing in cell b, 1 of cell b are missing in cell a"):
        paired_cells(pd.concat([full[1:], gap[:-2]]), none, trim)
    with pytest.raises(ValueError, match="holds 90 expressions more than once"):
        paired_cells(pd.concat([full, gap, gap.assign(ids="compact")]), none, trim)
    with pytest.raises(ValueError, match="no rows in cell {'pruner': 'prumerge'}"):
        paired_cells(pd.concat([full, gap]), none, {"pruner": "prumerge"})
    with pytest.raises(ValueError, match="unknown column 'prunner'; did you mean 'pruner'"):
        paired_cells(pd.concat([full, gap]), {"prunner": "none"}, trim)


def test_seeds_are_paired_with_their_own_and_one_seed_with_each():
    full, gap, expected = cells()
    seeds = [gap.assign(seed=seed, correct=np.roll(gap["correct"], seed)) for seed in range(3)]
    mixed = pd.concat([full.assign(seed=0), *seeds])
    none, trim = {"pruner": "none"}, {"pruner": "trim"}
    found = paired_cells(mixed, none, trim)
    alone = [paired_cells(mixed[mixed["seed"].eq(seed) | mixed["pruner"].eq("none")], none, trim) for seed in range(3)]
    assert alone[0] == expected and found["n"] == 3 * 90
    assert np.isclose(found["difference"], np.mean([one["difference"] for one in alone]))
    again = mixed[mixed["pruner"] == "trim"].assign(ids="compact")
    same = paired_cells(pd.concat([mixed, again]), trim | {"ids": "compact"}, trim | {"ids": "original"})
    assert same["difference"] == 0 and same["n"] == 3 * 90
    fewer = pd.concat([*seeds[:2], *(rows.assign(ids="compact") for rows in seeds)])
    with pytest.raises(ValueError, match="90 of cell a are missing in cell b"):
        paired_cells(fewer, trim | {"ids": "compact"}, trim | {"ids": "original"})


def test_retention_of_every_pruned_cell():
    full, gap, _ = cells()
    seeds = pd.concat([full.assign(seed=0), *(gap.assign(seed=seed) for seed in range(3))])
    for rows in (pd.concat([full, gap]), seeds):
        table = retained_cells(rows)
        assert table[["pruner", "keep", "ids"]].to_numpy().tolist() == [["trim", 0.1, "original"]]
        assert np.isclose(table.loc[0, "retention"], gap["correct"].mean() / full["correct"].mean())
    two = [pd.concat([full, gap]).assign(model="a"), pd.concat([full, gap]).assign(model="b", correct=True)]
    found = retained_cells(pd.concat(two), ["model", "pruner", "keep", "ids"])
    assert found["model"].tolist() == ["a", "b"] and found.loc[1, "retention"] == 1


def test_gap_pairs_are_paired_cells_with_a_common_false_discovery_rate():
    full, gap, _ = cells()
    compact = gap.assign(ids="compact", correct=gap["correct"].to_numpy()[::-1])
    own = [table.assign(keep=None, pruner="prumerge") for table in (gap, compact.assign(correct=gap["correct"]))]
    found = gap_pairs(pd.concat([full, gap, compact, *own]))
    assert found["pruner"].tolist() == ["trim", "prumerge"] and found["keep"].isna().tolist() == [False, True]
    expected = paired_cells(pd.concat([gap, compact]), {"ids": "compact"}, {"ids": "original"})
    assert found.loc[0, list(expected)].to_dict() == expected
    assert found.loc[1, "difference"] == 0
    np.testing.assert_array_equal(found["p_fdr"], fdr(found["p"]))
    with pytest.raises(ValueError, match="no rows in cell"):
        gap_pairs(pd.concat([full, gap]))


def test_matching_keeps_missing_values_apart():
    rows = pd.DataFrame({"keep": [None, 0.5, np.nan, 0.1], "ids": ["a", None, "b", "a"]})
    assert matching(rows, {"keep": None}).index.tolist() == [0, 2]
    assert matching(rows, {"keep": None, "ids": "b"}).index.tolist() == [2]
    assert matching(rows, {"ids": None}).index.tolist() == [1]
    assert matching(rows, {}).index.tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("error")
def test_retention_and_fdr():
    assert retention(51.42, 56.14) == pytest.approx(0.9159, abs=1e-4)  # GAP's abstract: "90% of the original"
    assert np.isnan(retention(0.0, 0.0))
    np.testing.assert_array_equal(retention(pd.Series([1.0, 2.0, 3.0]), np.array([4, 4, 0])), [0.25, 0.5, np.nan])
    p = [0.01, 0.04, 0.03, 0.5]
    by_hand = [0.04, min(0.04 * 4 / 3, 0.5), min(0.03 * 4 / 2, 0.04 * 4 / 3), 0.5]
    np.testing.assert_allclose(fdr(p), by_hand)


def test_published_numbers_have_sources_and_are_found_once():
    assert PUBLISHED["source"].notna().all() and PUBLISHED["value"].between(0, 100).all()
    assert not PUBLISHED.drop(columns="value").duplicated().any()
    where = {"dataset": "RefCOCO", "model": "LLaVA", "split": "val"}
    assert published(**where, pruner="none") == 56.14
    assert published(**where, pruner=None, ids="compact") == 15.34
    assert published(**where, ids="original") == 51.42
    assert published(model="LLaVA", split="testA") is None
    with pytest.raises(ValueError, match="2 published values match"):
        published(model="MiniGPTv2", ids="compact")
    with pytest.raises(ValueError, match="unknown column 'modle'; did you mean 'model'"):
        published(modle="LLaVA")


def test_what_public_code_does_with_ids_is_well_formed_and_what_methods_say_of_it():
    assert UPSTREAM_IDS["commit"].str.fullmatch("[0-9a-f]{40}").all() and not UPSTREAM_IDS.duplicated().any()
    assert UPSTREAM_IDS["repository"].str.fullmatch(r"[\w.-]+/[\w.-]+").all()
    assert set(UPSTREAM_IDS["where"]) == {"before", "inside", "both"}
    assert (UPSTREAM_IDS[["method", "file", "note", "source"]] != "").all(axis=None)
    read = UPSTREAM_IDS["source"].str.match("read( |$)")
    assert UPSTREAM_IDS.loc[~read, "source"].str.startswith("not confirmed: ").all()
    assert (UPSTREAM_IDS.loc[~read, ["image", "text", "generated", "ids"]] == "").all(axis=None)
    for row in UPSTREAM_IDS[read].itertuples():
        assert {row.image, row.text, row.generated} <= {"original", "compact", "after", "cache", "columns"}
        if row.ids:
            spec = parse_spec(row.ids)
            text = spec.text or spec.name
            assert (row.image, row.text, row.generated) == (spec.name, text, spec.generated or text), row.method
    own = UPSTREAM_IDS[UPSTREAM_IDS["pruner"] != ""].groupby("pruner")["ids"].first().to_dict()
    assert own == {name: method.upstream for name, method in PRUNERS.items() if method.upstream}


def test_retained_is_the_ratio_of_sums_and_its_interval_nearly_the_naive_one():
    full, clusters = draws()
    pruned = full * (np.random.default_rng(2).random(len(full)) < 0.4)
    found = retained(full, pruned, clusters)
    assert found["retention"] == pruned.sum() / full.sum()
    rng, names = np.random.default_rng(1), np.unique(clusters)
    sums = np.array([(pruned[clusters == c].sum(), full[clusters == c].sum()) for c in names])
    ratios = [
        kept / right for kept, right in (sums[rng.integers(0, len(names), len(names))].sum(0) for _ in range(4000))
    ]
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(ratios, [0.025, 0.975]), atol=0.03)
    whole = retained(full, full, clusters)
    assert whole["retention"] == 1 and 0.9 < whole["low"] < 1 < whole["high"] < 1.1
    none = retained(full, 0 * full, clusters)
    assert none["retention"] == none["low"] == 0 and none["high"] > 0.05
    assert np.isnan(list(retained(0 * full, full, clusters).values())).all()
    with pytest.raises(ValueError, match="retention is of hits"):
        retained(full, pruned / 2, clusters)


def test_variance_shares_of_a_factorial():
    """Against the classical decomposition of cells whose effects are put in, and what is not a factorial is refused."""
    levels = dict(a=3, b=2, c=2)
    rows = [
        dict(image_id=image, correct=0.3 * a + (0.2 * b if a == 1 else 0) + 0.05 * image, a=a, b=b, c=c)
        for image in range(4)
        for a in range(levels["a"])
        for b in range(levels["b"])
        for c in range(levels["c"])
    ]
    table = variance_shares(pd.DataFrame(rows), list(levels)).set_index("term")
    cells = np.array([[0, 0], [0.3, 0.5], [0.6, 0.6]])
    rest = cells - cells.mean()
    a, b = rest.mean(axis=1), rest.mean(axis=0)
    total = (rest**2).mean()
    expected = [(a**2).mean(), (b**2).mean(), 0, ((rest - a[:, None] - b) ** 2).mean(), 0, 0, 0]
    assert list(table.index) == ["a", "b", "c", "a:b", "a:c", "b:c", "rest"]
    np.testing.assert_allclose(table["share"], np.array(expected) / total, atol=1e-12)
    np.testing.assert_allclose(table["low"], table["high"], atol=1e-12)  # images differ by a constant only
    with pytest.raises(ValueError, match="a full factorial of 3 x 2 x 2 cells is needed"):
        variance_shares(pd.DataFrame(rows[1:]), list(levels))
    with pytest.raises(ValueError, match="the same expressions"):
        variance_shares(pd.DataFrame([*rows, rows[0]]), list(levels))


def test_a_line_is_least_squares_and_resamples_whole_images():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 40, 200)
    x = rng.random(200) + 0.3 * rng.standard_normal(40)[clusters]
    y = 0.7 * x + 0.2 * rng.standard_normal(40)[clusters] + 0.3 * rng.standard_normal(200)
    found = line(x, y, clusters)
    assert found["slope"] == pytest.approx(np.polyfit(x, y, 1)[0]) and found["n"] == 200
    assert found["r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    members, naive = [np.flatnonzero(clusters == c) for c in np.unique(clusters)], []
    for _ in range(2000):
        drawn = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        naive.append((np.polyfit(x[drawn], y[drawn], 1)[0], np.corrcoef(x[drawn], y[drawn])[0, 1] ** 2))
    ends = np.quantile(naive, [0.025, 0.975], axis=0)
    for name, (low, high) in zip(("slope", "r2"), ends.T):
        assert found[f"{name}_low"] == pytest.approx(low, abs=0.03) and found[f"{name}_high"] == pytest.approx(
            high, abs=0.03
        )
    assert np.isnan(line(np.ones(4), np.arange(4), [0, 0, 1, 1])["slope"])
