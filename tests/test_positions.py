"""Orders and IDs against definitions written out by hand, and laws that hold for every selection."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.positions import IDS, ORDERS, Spec, assign, layout, parse_spec, reorder
from analysis.types import Selection

ORIGIN = torch.tensor([7, 2, 5, 0])  # as emitted by some pruner, of n = 10
N = 10

origins = st.integers(1, 40).flatmap(
    lambda n: st.tuples(st.lists(st.integers(0, n - 1), min_size=1, max_size=n).map(torch.tensor), st.just(n))
)
ids_specs = st.one_of(
    st.sampled_from(["compact", "original", "shuffled", "compressed:1/3", "shifted:0"]),
    st.integers(1, 1000).map(lambda thousandths: f"compressed:{thousandths / 1000}"),
    st.integers(0, 1000).map(lambda thousandths: f"shuffled:{thousandths / 1000}"),
    st.integers(0, 50).map(lambda offset: f"shifted:{offset}"),
)


def selection(origin):
    """Features are functions of the origin and the emitted place, so a token that loses its own is seen."""
    return Selection(torch.stack([origin, torch.arange(len(origin))], 1).float(), origin, origin % 2 == 0)


@pytest.mark.parametrize(
    ("spec", "visual", "text"),
    [
        ("compact", [0, 1, 2, 3], 4),
        ("original", [7, 2, 5, 0], 10),
        ("compressed:0.5", [3, 1, 2, 0], 5),
        ("compressed:0.75", [5, 1, 3, 0], 8),
        ("compressed:3/4", [5, 1, 3, 0], 8),
        ("shifted:100", [107, 102, 105, 100], 110),
        ("shuffled:0", [7, 2, 5, 0], 10),
        ("original@after", [7, 2, 5, 0], 8),
        ("shifted:3@after", [10, 5, 8, 3], 11),
        ("original@compact", [7, 2, 5, 0], 4),
        ("compact@original", [0, 1, 2, 3], 10),
    ],
)
def test_ids_by_hand(spec, visual, text):
    ids = assign(ORIGIN, N, spec, seed=0)
    assert ids.visual.tolist() == visual and ids.visual.dtype == torch.int64
    assert ids.text == text


def test_compressed_is_exact_where_floats_are_not():
    assert 100 * 0.07 > 7  # so ceil in floating point would say 8
    assert assign(torch.arange(100), 100, "compressed:0.07", 0).text == 7
    assert 100 * 0.29 < 29
    assert assign(torch.tensor([100]), 101, "compressed:0.29", 0).visual.tolist() == [29]
    thirds = assign(torch.tensor([2999]), 3000, "compressed:0.33333333333333333", 0)  # numerator * origin > int64
    assert thirds.visual.tolist() == [999] and thirds.text == 1000


@given(origins, ids_specs, st.integers(0, 2**40))
def test_text_follows_every_visual_id(case, spec, seed):
    origin, n = case
    ids = assign(origin, n, spec, seed)
    assert ids.visual.shape == origin.shape and ids.visual.min() >= 0
    assert ids.visual.max() < ids.text


@given(origins, st.integers(0, 1000).map(lambda thousandths: Fraction(thousandths, 1000)), st.integers(0, 2**40))
def test_shuffles_move_at_most_the_share_and_lose_nothing(case, share, seed):
    origin, n = case
    most = int(share * len(origin) + Fraction(1, 2))
    ids = assign(origin, n, f"shuffled:{share}", seed).visual
    assert (ids != origin).sum() <= most and ids.sort().values.equal(origin.sort().values)
    before, after = selection(origin), reorder(selection(origin), f"shuffled:{share}", seed)
    places = after.features[:, 1].long()
    assert (places != torch.arange(len(origin))).sum() <= most
    assert after.features.equal(before.features[places]) and places.sort().values.equal(torch.arange(len(origin)))
    assert after.origin.equal(origin[places]) and after.synthetic.equal(before.synthetic[places])


def test_shuffles_are_seeded_uniform_and_independent_of_each_other():
    origin, few = torch.arange(1000), torch.arange(3)
    once, again, other = (assign(origin, 1000, "shuffled:0.5", seed).visual for seed in (1, 1, 2))
    assert once.equal(again) and not once.equal(other)
    assert 450 < (once != origin).sum() <= 500  # a permutation of 500 leaves about one in place
    order = reorder(selection(origin), "shuffled:0.5", 1).origin
    assert not order.equal(once)  # one seed, two independent draws
    seen = {tuple(assign(few, 3, "shuffled", seed).visual.tolist()) for seed in range(100)}
    assert len(seen) == 6
    moved = torch.stack([assign(few, 3, "shuffled:2/3", seed).visual != few for seed in range(50)])
    assert moved.any(dim=0).all() and moved.sum(dim=1).max() == 2  # which tokens are shuffled is drawn, too


def test_orders_by_hand():
    synthetic_last = selection(torch.tensor([7, 2, 5, 2]))
    assert reorder(synthetic_last, "method", 0).features[:, 1].tolist() == [0, 1, 2, 3]
    raster = reorder(synthetic_last, "raster", 0)
    assert raster.features[:, 1].tolist() == [1, 3, 2, 0]  # equal origins stay in the emitted order
    assert raster.origin.tolist() == [2, 2, 5, 7] and raster.synthetic.tolist() == [True, True, False, False]


@given(st.integers(1, 60), st.integers(0, 20), st.integers(0, 20))
def test_identity(n, prefix, suffix):
    """Nothing pruned: raster order, original and compact IDs give the unpruned model's own IDs, bit for bit."""
    whole = reorder(selection(torch.arange(n)), "raster", 0)
    schemes = ("original", "compact", "compressed:1", "shifted:0", "shuffled:0", "original@after", "compact@original")
    for spec in schemes:
        ids = assign(whole.origin, n, spec, 0)
        assert layout(prefix, *ids, suffix).equal(torch.arange(prefix + n + suffix)), spec


def test_layout_by_hand():
    assert layout(2, torch.tensor([4, 1]), 9, 3).tolist() == [0, 1, 6, 3, 11, 12, 13]
    assert layout(0, torch.tensor([4, 1]), 9, 0).tolist() == [4, 1]
    with pytest.raises(ValueError, match="must be >= 0"):
        layout(-1, torch.tensor([0]), 1, 1)


def test_parsed_specs():
    assert parse_spec("original@after") == Spec("original", None, "after")
    assert parse_spec("shuffled") == Spec("shuffled", Fraction(1), None)
    assert parse_spec("shifted:12") == Spec("shifted", 12, None)
    assert parse_spec("shuffled:0.25", ORDERS) == Spec("shuffled", Fraction(1, 4), None)


@pytest.mark.parametrize(
    ("spec", "registry", "message"),
    [
        ("orignal", IDS, "unknown IDs 'orignal'.*'original'.*compressed"),
        ("rasta", ORDERS, "unknown order 'rasta'.*'raster'"),
        ("", IDS, "unknown IDs ''"),
        ("original:3", IDS, "'original' takes no value"),
        ("compact:3", IDS, r"'compact' needs a factor in \(0, 1\]"),
        ("compact:", IDS, "'compact' needs a factor"),
        ("compressed", IDS, r"'compressed' needs a factor in \(0, 1\]"),
        ("compressed:0", IDS, "needs a factor"),
        ("compressed:1.1", IDS, "needs a factor"),
        ("compressed:1/0", IDS, "needs a factor"),
        ("compressed:nan", IDS, "needs a factor"),
        ("shifted", IDS, "needs an integer offset >= 0"),
        ("shifted:-1", IDS, "needs an integer offset"),
        ("shifted:1.5", IDS, "needs an integer offset"),
        ("shuffled:", IDS, r"needs a share in \[0, 1\]"),
        ("shuffled:2", ORDERS, "needs a share"),
        ("original@end", IDS, "unknown text rule 'end'.*after, original, compact"),
        ("original@", IDS, "unknown text rule ''"),
        ("raster@after", ORDERS, "an order has no text rule.*'raster'"),
    ],
)
def test_bad_specs_say_what_is_wrong(spec, registry, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(spec, registry)


@pytest.mark.parametrize("origin", [[], [0, 10], [-1, 3]])
def test_origins_outside_the_image_are_refused(origin):
    with pytest.raises(ValueError, match=r"all in 0\.\.9"):
        assign(torch.tensor(origin, dtype=torch.int64), N, "original", 0)


def test_a_compact_factor_closes_up_whatever_the_order():
    origin = torch.tensor([7, 2, 5, 0])
    ids = assign(origin, 8, "compact:0.5", seed=0)
    assert ids.visual.tolist() == [0, 0, 1, 1] and ids.text == 2
