"""Orders and IDs against definitions written out by hand, and laws that hold for every selection."""

from fractions import Fraction
from itertools import product

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from analysis import ROOT
from analysis.positions import (
    GENERATED,
    IDS,
    ORDERS,
    TEXT,
    Spec,
    assign,
    generated_position,
    parse_spec,
    reorder,
    sequence_positions,
)
from analysis.types import Ids, Selection, Truth, raster_ids

ORIGIN = torch.tensor([7, 2, 5, 0])  # as emitted by some pruner, of n = 10
N = 10

origins = st.integers(1, 40).flatmap(
    lambda n: st.tuples(st.lists(st.integers(0, n - 1), min_size=1, max_size=n).map(torch.tensor), st.just(n))
)
ids_specs = st.one_of(
    st.sampled_from(
        ["compact", "original", "shuffled", "compressed:1/3", "shifted:0", "stretched", "prefix", "compact#1/2"]
    ),
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
        ("stretched", [0, 3, 6, 9], 10),
        ("stretched@after+cache", [0, 3, 6, 9], 10),
        ("prefix", [0, 1, 2, 3], 10),
        ("sequential", [0, 1, 2, 3], 4),
        ("regrid", [0, 1, 2, 3], 4),
    ],
)
def test_ids_by_hand(spec, visual, text):
    ids = assign(ORIGIN, raster_ids(N), spec, seed=0)
    assert ids.visual.tolist() == visual and ids.visual.dtype == torch.int64
    assert ids.text_start == text


def test_compressed_is_exact_where_floats_are_not():
    assert 100 * 0.07 > 7  # so ceil in floating point would say 8
    assert assign(torch.arange(100), raster_ids(100), "compressed:0.07", 0).text_start == 7
    assert 100 * 0.29 < 29
    assert assign(torch.tensor([100]), raster_ids(101), "compressed:0.29", 0).visual.tolist() == [29]
    thirds = assign(
        torch.tensor([2999]), raster_ids(3000), "compressed:0.33333333333333333", 0
    )  # numerator * origin > int64
    assert thirds.visual.tolist() == [999] and thirds.text_start == 1000


@given(origins, ids_specs, st.integers(0, 2**40))
def test_text_follows_every_visual_id(case, spec, seed):
    origin, n = case
    ids = assign(origin, raster_ids(n), spec, seed)
    assert ids.visual.shape == origin.shape and ids.visual.min() >= 0
    assert ids.visual.max() < ids.text_start


@given(origins, st.integers(0, 1000).map(lambda thousandths: Fraction(thousandths, 1000)), st.integers(0, 2**40))
def test_shuffles_move_at_most_the_share_and_lose_nothing(case, share, seed):
    origin, n = case
    most = int(share * len(origin) + Fraction(1, 2))
    ids = assign(origin, raster_ids(n), f"shuffled:{share}", seed).visual
    assert (ids != origin).sum() <= most and ids.sort().values.equal(origin.sort().values)
    before, after = selection(origin), reorder(selection(origin), f"shuffled:{share}", seed)
    places = after.features[:, 1].long()
    assert (places != torch.arange(len(origin))).sum() <= most
    assert after.features.equal(before.features[places]) and places.sort().values.equal(torch.arange(len(origin)))
    assert after.origin.equal(origin[places]) and after.synthetic.equal(before.synthetic[places])


def test_shuffles_are_seeded_uniform_and_independent_of_each_other():
    origin, few = torch.arange(1000), torch.arange(3)
    once, again, other = (assign(origin, raster_ids(1000), "shuffled:0.5", seed).visual for seed in (1, 1, 2))
    assert once.equal(again) and not once.equal(other)
    assert 450 < (once != origin).sum() <= 500  # a permutation of 500 leaves about one in place
    order = reorder(selection(origin), "shuffled:0.5", 1).origin
    assert not order.equal(once)  # one seed, two independent draws
    seen = {tuple(assign(few, raster_ids(3), "shuffled", seed).visual.tolist()) for seed in range(100)}
    assert len(seen) == 6
    moved = torch.stack([assign(few, raster_ids(3), "shuffled:2/3", seed).visual != few for seed in range(50)])
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
    plain = ("original", "compact", "compressed:1", "shifted:0", "shuffled:0", "original@after", "compact@original")
    for spec in (*plain, "stretched", "prefix", "sequential", "regrid", "original+cache", "compact+original"):
        ids = assign(whole.origin, raster_ids(n), spec, 0)
        assert generated_position(prefix, ids, suffix) == prefix + n + suffix, spec
        assert sequence_positions(prefix, ids, suffix).equal(torch.arange(prefix + n + suffix)), spec


def test_sequence_positions_by_hand():
    ids = Ids(torch.tensor([4, 1]), 9, 7)
    assert sequence_positions(2, ids, 3).tolist() == [0, 1, 6, 3, 11, 12, 13]
    assert sequence_positions(0, ids, 0).tolist() == [4, 1]
    assert generated_position(2, ids, 3) == 2 + 7 + 3
    with pytest.raises(ValueError, match="must be >= 0"):
        sequence_positions(-1, ids, 1)


def test_parsed_specs():
    assert parse_spec("original@after") == Spec("original", None, "after")
    assert parse_spec("original@compact+cache") == Spec("original", None, "compact", "cache")
    assert parse_spec("compact:0.5+original") == Spec("compact", Fraction(1, 2), None, "original")
    assert parse_spec("compact#target@compact+cache") == Spec("compact", Fraction(1), "compact", "cache", "target")
    assert parse_spec("rolled_rows:1/4#0.5") == Spec("rolled_rows", Fraction(1, 4), None, None, Fraction(1, 2))
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
        ("compact#object", IDS, "unknown part 'object'.*target, background"),
        ("compact#", IDS, "unknown part ''"),
        ("compact#2", IDS, r"'compact#' needs a share in \[0, 1\], as in 'compact#:0.5'"),
        ("rolled_rows", IDS, r"'rolled_rows' needs a share"),
        ("flipped_rows:1", IDS, "'flipped_rows' takes no value"),
        ("raster#target", ORDERS, "an order has no part.*give '#target' to the IDs"),
        ("original@end", IDS, "unknown text rule 'end'.*after, original, compact"),
        ("original@", IDS, "unknown text rule ''"),
        ("raster@after", ORDERS, "an order has no text rule.*'raster'"),
        ("raster+cache", ORDERS, "an order has no generated rule.*'raster'"),
        ("original+compact", IDS, "unknown generated rule 'compact'.*original, cache"),
        ("original+", IDS, "unknown generated rule ''"),
        ("stretched:2", IDS, "'stretched' takes no value"),
        ("shuffled_rows:2", IDS, r"'shuffled_rows' needs a share"),
    ],
)
def test_bad_specs_say_what_is_wrong(spec, registry, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(spec, registry)


@pytest.mark.parametrize("origin", [[], [0, 10], [-1, 3]])
def test_origins_outside_the_image_are_refused(origin):
    with pytest.raises(ValueError, match=r"all in 0\.\.9"):
        assign(torch.tensor(origin, dtype=torch.int64), raster_ids(N), "original", 0)


def test_a_compact_factor_closes_up_whatever_the_order():
    origin = torch.tensor([7, 2, 5, 0])
    ids = assign(origin, raster_ids(8), "compact:0.5", seed=0)
    assert ids.visual.tolist() == [0, 0, 1, 1] and ids.text_start == 2


@pytest.mark.parametrize(
    ("spec", "text", "generated"),
    [
        ("original", 10, 10),
        ("compact", 4, 4),
        ("original+cache", 10, 4),  # GAP at prefill, compact while decoding
        ("compact+original", 4, 10),  # the reverse
        ("original@compact+original", 4, 10),
        ("shifted:100+cache", 110, 4),
        ("shifted:100", 110, 110),
    ],
)
def test_generated_tokens_have_a_control_of_their_own(spec, text, generated):
    ids = assign(ORIGIN, raster_ids(N), spec, 0)
    assert (ids.text_start, ids.generated_start) == (text, generated)
    length = 7 + len(ORIGIN) + 5  # what a cache holds after a prompt of 7 + 4 + 5 tokens
    assert generated_position(7, ids, 5) == (length if "cache" in spec else 7 + generated + 5)


ROWS, COLUMNS = 3, 4


def grid_ids(rows=ROWS, columns=COLUMNS):
    """(t, row, column) of a grid in raster order, and the text after it, as Qwen2.5-VL counts them."""
    visual = torch.tensor([[0, row, column] for row in range(rows) for column in range(columns)])
    start = max(rows, columns)
    return Ids(visual, start, start)


# Of a grid of 3 x 4, cells (2, 3), (0, 1), (2, 1), (0, 3): row 1 and columns 0 and 2 are empty.
OF_GRID = torch.tensor([11, 1, 9, 3])


@pytest.mark.parametrize(
    ("spec", "visual", "text"),
    [
        ("original", [[0, 2, 3], [0, 0, 1], [0, 2, 1], [0, 0, 3]], 4),
        ("compact", [[0, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]], 2),
        ("compact:0.5", [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], 1),
        ("original@compact", [[0, 2, 3], [0, 0, 1], [0, 2, 1], [0, 0, 3]], 2),
        ("original@after", [[0, 2, 3], [0, 0, 1], [0, 2, 1], [0, 0, 3]], 4),
        ("sequential", [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]], 4),
        ("prefix", [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3]], 4),
        ("regrid", [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0]], 3),
        ("stretched", [[0, 2, 3], [0, 0, 0], [0, 2, 0], [0, 0, 3]], 4),
        ("compressed:0.5", [[0, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]], 2),
        ("shifted:5", [[5, 7, 8], [5, 5, 6], [5, 7, 6], [5, 5, 8]], 9),
    ],
)
def test_ids_in_planes_by_hand(spec, visual, text):
    ids = assign(OF_GRID, grid_ids(), spec, 0)
    assert ids.visual.tolist() == visual and ids.visual.dtype == torch.int64
    assert ids.text_start == ids.generated_start == text


def test_sequences_in_planes_by_hand():
    """Text counts alike in all planes; the cache counts tokens, from the offset that the unpruned prompt leaves."""
    ids = assign(OF_GRID, grid_ids(), "original+cache", 0)
    assert sequence_positions(2, ids, 2).tolist() == [
        *([0] * 3, [1] * 3),
        *([2, 4, 5], [2, 2, 3], [2, 4, 3], [2, 2, 5]),
        *([6] * 3, [7] * 3),
    ]
    assert generated_position(2, ids, 2) == (2 + 4 + 2) + (4 - 12)


@pytest.mark.parametrize(("plane", "spec"), [(1, "shuffled_rows"), (2, "shuffled_columns")])
def test_one_plane_shuffled_leaves_the_others(plane, spec):
    unpruned, origin = grid_ids(9, 11), torch.arange(99)
    ids, own = assign(origin, unpruned, spec, 3), unpruned.visual
    moved = (ids.visual != own).any(dim=0)
    assert moved.tolist() == [i == plane for i in range(3)] and ids.text_start == 11
    assert ids.visual.sort(dim=0).values.equal(own.sort(dim=0).values)
    assert assign(origin, unpruned, f"{spec}:0", 3).visual.equal(own)
    triples = assign(origin, unpruned, "shuffled", 3).visual
    assert {tuple(t) for t in triples.tolist()} == {tuple(t) for t in own.tolist()} and not triples.equal(own)
    with pytest.raises(ValueError, match="only IDs in several planes"):
        assign(torch.arange(4), raster_ids(9), spec, 0)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_planes_of_a_whole_grid_are_kept_and_the_text_follows(rows, columns, data):
    unpruned, n = grid_ids(rows, columns), rows * columns
    for spec in ("original", "compact", "stretched", "prefix", "regrid", "shuffled:0", "compressed:1", "shifted:0"):
        ids = assign(torch.arange(n), unpruned, spec, 0)
        assert ids.visual.equal(unpruned.visual) and ids.text_start == max(rows, columns), spec
    origin = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True)))
    for spec in ("original", "compact", "stretched", "prefix", "regrid", "sequential", "shuffled", "shuffled_rows"):
        ids = assign(origin, unpruned, spec, 0)
        assert ids.visual.shape == (len(origin), 3) and ids.visual.min() >= 0, spec
        assert ids.visual.max() < ids.text_start, spec
    regrid = assign(origin, unpruned, "regrid", 0).visual
    assert len(regrid.unique(dim=0)) == len(origin)


VIEWS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7), st.booleans()), min_size=1, max_size=2)
fractions = st.integers(0, 100).map(lambda hundredths: hundredths / 100)
spans = st.tuples(fractions, fractions).filter(lambda ends: ends[0] != ends[1]).map(sorted)
boxes = st.tuples(spans, spans).map(lambda both: (both[0][0], both[1][0], both[0][1], both[1][1]))
RELOCATED = ("rolled_columns:1/4", "rolled_columns:0.5", "rolled_rows:1/3", "flipped_columns", "flipped_rows")


def cells_of(views):
    """(view, row, column) of every token in turn; a newline's column is that after the last."""
    return [
        (view, row, column)
        for view, (rows, columns, newline) in enumerate(views)
        for row in range(rows)
        for column in range(columns + newline)
    ]


def seen(box, row, column, rows, columns):
    """Whether a cell and a box share an area, which a box of no area less than a cell does with one at least."""
    width = min(box[2], (column + 1) / columns) - max(box[0], column / columns)
    height = min(box[3], (row + 1) / rows) - max(box[1], row / rows)
    return min(width, height) > 1e-9


def source_cell(spec, cell, views, truth):
    """The cell whose ID a cell has after a relocation, one at a time."""
    view, row, column = cell
    rows, columns, _ = views[view]
    name, value, *_ = parse_spec(spec)
    if name == "rolled_rows":
        return view, (row + int(value * rows + Fraction(1, 2))) % rows, column
    if name == "flipped_rows":
        return view, rows - 1 - row, column
    if column == columns:  # a newline
        return cell
    if name == "rolled_columns":
        return view, row, (column + int(value * columns + Fraction(1, 2))) % columns
    if name == "flipped_columns":
        return view, row, columns - 1 - column
    of = {
        box: sorted((r, c) for r in range(rows) for c in range(columns) if seen(box, r, c, rows, columns))
        for box in truth
    }
    if ((row, column) in of[truth.target]) == ((row, column) in of[truth.other]):
        return cell
    mine, theirs = truth if (row, column) in of[truth.target] else truth[::-1]
    found = []
    for axis, place in enumerate((row, column)):
        a, b = (sorted({one[axis] for one in of[box]}) for box in (mine, theirs))
        found.append(b[int((Fraction(a.index(place)) + Fraction(1, 2)) * len(b) / len(a))])
    return view, *found


@given(VIEWS, boxes, boxes, st.sampled_from([*RELOCATED, "exchanged"]), st.booleans(), st.data())
def test_relocations_against_a_loop_over_cells(views, target, other, spec, planes, data):
    """Every token has the ID of one other token: in one plane and in three, with newlines and with two views."""
    cells, truth = cells_of(views), Truth(target, other)
    place = {cell: index for index, cell in enumerate(cells)}
    visual = torch.tensor(cells) if planes else torch.arange(len(cells))
    unpruned = Ids(visual, len(cells), len(cells), tuple(views))
    origin = torch.tensor(data.draw(st.lists(st.integers(0, len(cells) - 1), min_size=1, unique=True)))
    wanted = torch.stack([visual[place[source_cell(spec, cells[i], views, truth)]] for i in origin])
    made = assign(origin, unpruned, spec, 0, truth)
    assert made.visual.equal(wanted) and made.text_start == made.generated_start == len(cells)
    whole = assign(torch.arange(len(cells)), raster_ids(len(cells))._replace(grids=tuple(views)), spec, 0, truth)
    if spec != "exchanged":
        assert whole.visual.sort().values.equal(torch.arange(len(cells)))  # a permutation
    inside = torch.tensor([
        cells[i][2] < views[cells[i][0]][1] and seen(target, *cells[i][1:], *views[cells[i][0]][:2]) for i in origin
    ])  # fmt: skip
    for part, wrong in (("target", inside), ("background", ~inside)):
        only = assign(origin, unpruned, f"{spec}#{part}", 0, truth).visual
        assert only[wrong].equal(wanted[wrong]) and only[~wrong].equal(visual[origin][~wrong])


@given(st.integers(1, 8), st.integers(1, 8), st.booleans(), boxes)
def test_what_moves_nothing_is_original(rows, columns, newline, box):
    n, truth = rows * (columns + newline), Truth(box, box)
    unpruned = raster_ids(n)._replace(grids=((rows, columns, newline),))
    for spec in ("rolled_columns:0", "rolled_rows:1", "exchanged", "shuffled#0", "compact#0", "compact#target"):
        ids = assign(torch.arange(n), unpruned, spec, 0, truth)
        assert ids.visual.equal(torch.arange(n)) and ids.text_start == n, spec


def test_exchanging_boxes_of_one_size_is_a_permutation_that_undoes_itself():
    unpruned = raster_ids(60)._replace(grids=((6, 10, False),))
    truth = Truth((0, 0, 0.3, 0.5), (0.6, 0.5, 0.9, 1))
    moved = assign(torch.arange(60), unpruned, "exchanged", 0, truth).visual
    assert (
        moved[:3].tolist() == [36, 37, 38]
        and moved[36:39].tolist() == [0, 1, 2]
        and (moved != torch.arange(60)).sum() == 18
    )
    assert moved[moved].equal(torch.arange(60))


@given(origins, st.integers(0, 100), st.integers(0, 2**40))
def test_a_dose_repairs_a_nested_share(case, hundredths, seed):
    origin, n = case
    compact, share = torch.arange(len(origin)), Fraction(hundredths, 100)
    ids = assign(origin, raster_ids(n), f"compact#{share}", seed)
    wrong = ids.visual != origin
    assert ids.visual[wrong].equal(compact[wrong]) and ids.text_start == n
    assert wrong.sum() <= int(share * len(origin) + Fraction(1, 2))
    more = assign(origin, raster_ids(n), f"compact#{min(share + Fraction(1, 4), 1)}", seed).visual
    assert more[wrong].equal(compact[wrong])
    assert assign(origin, raster_ids(n), "compact#1", seed).visual.equal(compact)


def test_a_dose_is_as_large_as_it_says_and_drawn_anew_by_seed():
    origin = torch.arange(1, 1001)
    wrong = [assign(origin, raster_ids(1001), "compact#0.3", seed).visual != origin for seed in (0, 0, 1)]
    assert [int(one.sum()) for one in wrong] == [300] * 3
    assert wrong[0].equal(wrong[1]) and 50 < (wrong[0] & wrong[2]).sum() < 140


@pytest.mark.parametrize(
    ("spec", "truth", "message"),
    [
        ("compact#target", None, "'#target' needs the target's box, which only evaluation on data with boxes has"),
        ("exchanged", None, "'exchanged' needs the boxes of the target and of another object"),
        ("exchanged", Truth((0, 0, 1, 1)), "'exchanged' needs the boxes of the target and of another object"),
        ("flipped_rows", None, "need the grid of the image's 10 tokens"),
    ],
)
def test_what_a_rule_reads_must_be_there(spec, truth, message):
    unpruned = raster_ids(N) if spec == "flipped_rows" else raster_ids(N)._replace(grids=((2, 5, False),))
    with pytest.raises(ValueError, match=message):
        assign(ORIGIN, unpruned, spec, 0, truth)


def test_table_8_shows_each_combination_once():
    """What image x text x generated rules make of one plane, over several selections: no two rows are the same."""
    drawn = [torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:10].sort().values for seed in range(5)]
    crossed = product(
        ["original", "compact", "stretched", "prefix"],
        ["", *(f"@{text}" for text in TEXT)],
        ["", *(f"+{generated}" for generated in GENERATED)],
    )
    made = {}
    for spec in map("".join, crossed):
        ids = [assign(origin, raster_ids(40), spec, seed=0) for origin in drawn]
        made[spec] = str([(one.visual.tolist(), one.text_start, one.generated_start) for one in ids])
    grid = yaml.safe_load((ROOT / "papermill_runs/10_rec_eval/tab8.yaml").read_text())["grid"]
    shown = [made[spec] for spec in grid[-1]["ids"]]
    assert len(set(shown)) == len(shown) and set(shown) == set(made.values())
