"""The first pruners: what they keep, in which order, and that features are never touched."""

import math
import os

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from analysis.positions import reorder
from analysis.pruning import PRUNERS, all_pruners, budget, pruner, random
from analysis.types import Signals, VisualTokens
from tests.support.visual import visual

RATIOS = ("random", "spatial", "cls_similarity")


def spatial_origin(k, rows, columns):
    image = VisualTokens(torch.zeros(1, rows * columns, 1), (rows, columns), Signals())
    return PRUNERS["spatial"](image, k / (rows * columns), seeds=[0])[0].origin


@pytest.mark.parametrize(
    ("keep", "n", "k"),
    [(1, 576, 576), (0.25, 576, 144), (0.0001, 576, 1), (0.5, 5, 3), (0.25, 2, 1), (0.145, 100, 15), (0.14, 100, 14)],
)
def test_budget_rounds_half_up_in_decimal(keep, n, k):
    assert budget(keep, n) == k


@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.01, float("nan"), None])
@pytest.mark.parametrize("name", RATIOS)
def test_bad_keep_ratio(name, keep):
    with pytest.raises(ValueError, match=rf"keep ratio must be in \(0, 1\], got {keep}"):
        PRUNERS[name](visual(), keep, seeds=[0, 1, 2])


@given(st.sampled_from(RATIOS), st.integers(1, 24), st.integers(0, 2**40))
def test_selections_are_distinct_tokens_of_their_own_image(name, k, seed):
    tokens = visual()
    chosen = PRUNERS[name](tokens, k / 24, seeds=[seed, seed + 1, seed])
    assert len(chosen) == 3
    for image, one in enumerate(chosen):
        assert len(one.origin.unique()) == len(one.origin) == k and one.origin.dtype == torch.int64
        assert one.features.equal(tokens.features[image, one.origin]) and not one.synthetic.any()
        if name != "cls_similarity":
            assert one.origin.equal(one.origin.sort().values)


@given(st.sampled_from(["none", *all_pruners(inside=False)]), st.integers(1, 9), st.integers(1, 9))
def test_identity(name, rows, columns):
    """keep = 1 in raster order gives the input back, bit for bit."""
    tokens = visual(2, rows, columns)
    for image, one in enumerate(PRUNERS[name](tokens, 1, seeds=[3, 4])):
        one = reorder(one, "raster", 0)
        assert one.features.equal(tokens.features[image]) and one.origin.equal(torch.arange(rows * columns))


def test_none_takes_no_other_ratio():
    tokens = visual()
    assert all(one.features.equal(f) for one, f in zip(PRUNERS["none"](tokens, None, seeds=[0, 0, 0]), tokens.features))
    with pytest.raises(ValueError, match="keep must be None or 1, got 0.5"):
        PRUNERS["none"](tokens, 0.5, seeds=[0, 0, 0])


def test_random_depends_on_the_seed_alone():
    tokens = visual()
    a, b, c = (one.origin.tolist() for one in PRUNERS["random"](tokens, 0.5, seeds=[5, 6, 5]))
    assert a == c != b
    alone = VisualTokens(tokens.features[1:2], tokens.grid, tokens.signals)
    assert PRUNERS["random"](alone, 0.5, seeds=[6])[0].origin.tolist() == b  # not on the batch
    assert set(PRUNERS["random"](alone, 0.25, seeds=[6])[0].origin.tolist()) < set(b)
    with pytest.raises(ValueError, match="got 2 seeds for 3 images"):
        PRUNERS["random"](tokens, 0.5, seeds=[0, 1])


def test_what_is_ranked_can_be_emitted_either_way():
    """The option emit of every method that is only a score; its score does not change with it."""
    for name in ("random", "fastervlm", "cls_similarity", "text_similarity", "oracle"):
        tokens = visual(2)
        made = {
            e: [one.origin.tolist() for one in pruner(f"{name}:emit={e}")(tokens, 0.4, seeds=[5, 6])]
            for e in ("score", "raster")
        }
        scores = pruner(f"{name}:emit=score").score(tokens, [5, 6])
        for ranked, raster, score in zip(made["score"], made["raster"], scores):
            assert ranked != raster == sorted(ranked)
            assert ranked == sorted(ranked, key=lambda i: (-float(score[i]), i))
    with pytest.raises(ValueError, match="value of option emit"):
        pruner("random:emit=best")(visual(), 0.5, seeds=[0, 1, 2])


def test_random_is_uniform():
    counts = torch.zeros(24)
    for seed in range(400):
        counts[PRUNERS["random"](visual(1), 0.25, seeds=[seed])[0].origin] += 1
    expected, sd = 100, math.sqrt(400 * 0.25 * 0.75)
    assert counts.sum() == 2400 and (counts - expected).abs().max() < 4 * sd


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (32, 8), (6, 4)])
def test_spatial_quarter_is_every_second_row_and_column(rows, columns):
    grid = torch.arange(rows * columns).view(rows, columns)
    assert spatial_origin(rows * columns // 4, rows, columns).equal(grid[1::2, 1::2].flatten())


def test_spatial_single_token_is_the_centre():
    assert spatial_origin(1, 9, 9).tolist() == [40]


grids = st.tuples(st.integers(1, 20), st.integers(1, 20)).flatmap(
    lambda grid: st.tuples(st.integers(1, grid[0] * grid[1]), st.just(grid))
)


@given(grids)
@example((10, (2, 9)))  # the rounded number of rows, 1, has no room for 10 tokens
def test_spatial_is_even(case):
    """Exactly k; rows and columns near-equally spaced, margins too; no token of the grid is far from a kept one."""
    k, (rows, columns) = case
    origin = spatial_origin(k, rows, columns)
    assert len(origin.unique()) == len(origin) == k
    by_row = {row: (origin[origin // columns == row] % columns).tolist() for row in (origin // columns).tolist()}
    dealt = torch.tensor([len(in_row) for in_row in by_row.values()])
    even = k / len(dealt)
    assert ((dealt - even).abs() < 1).all()
    assert ((dealt.cumsum(0) - even * torch.arange(1, len(dealt) + 1)).abs() < 1).all()  # so no side gets more
    for places, length in [(list(by_row), rows), *((in_row, columns) for in_row in by_row.values())]:
        gaps = torch.tensor(places).diff()
        assert ((gaps - length / len(places)).abs() < 1).all()
        assert abs(places[0] - (length - 1 - places[-1])) <= 1
    row_of, column_of = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    apart = torch.maximum((row_of[:, None] - origin // columns).abs(), (column_of[:, None] - origin % columns).abs())
    pitch = max(math.sqrt(rows * columns / k), rows / k, columns / k)
    assert apart.min(dim=1).values.max() <= pitch


def test_cls_similarity_against_a_loop():
    tokens = visual(4, 5, 5)
    patches, cls = tokens.signals.patches, tokens.signals.cls
    for image, one in enumerate(PRUNERS["cls_similarity"](tokens, 0.4, seeds=[0] * 4)):
        cosine = [float(p @ cls[image] / (p.norm() * cls[image].norm())) for p in patches[image]]
        assert one.origin.tolist() == sorted(range(25), key=lambda i: -cosine[i])[:10]


def test_cls_similarity_ignores_length_and_breaks_ties_by_raster_index():
    direction = torch.randn(1, 1, 7, generator=torch.Generator().manual_seed(0))
    ties = direction.expand(1, 24, 7) * 2.0 ** torch.arange(24).view(1, 24, 1)  # powers of two: equal cosines, exactly
    assert PRUNERS["cls_similarity"](visual(1, patches=ties), 0.25, seeds=[0])[0].origin.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_method_of_a_file_outside_the_package(tmp_path):
    """path.py:function[:options], read anew after a change; what is wrong with a file is said."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from analysis.types import kept\nimport torch\n\n"
        "def first(visual, keep, *, seeds=(), start=0):\n"
        "    return kept(visual.features, torch.arange(start, start + 3).expand(len(visual.features), -1))\n"
    )
    tokens = visual()
    assert pruner(f"{file}:first")(tokens, 0.5)[0].origin.tolist() == [0, 1, 2]
    assert pruner(f"{file}:first:start=4")(tokens, 0.5)[1].origin.tolist() == [4, 5, 6]
    assert pruner(f"{file}:first").score is None and pruner(f"{file}:first").label == "first"
    file.write_text(file.read_text().replace("start=0", "start=1"))
    os.utime(file, ns=(1, 1))
    assert pruner(f"{file}:first")(tokens, 0.5)[0].origin.tolist() == [1, 2, 3]
    for spec, message in (
        (f"{file}:last", "has no attribute 'last'"),
        (f"{tmp_path}/none.py:prune", "FileNotFoundError"),
        (f"{file}:torch", "is no function but module"),
        (f"{file}:first:stop=4", "unknown option of pruner .*'stop'; valid: start"),
    ):
        with pytest.raises(ValueError, match=message):
            pruner(spec)


corners = st.tuples(st.floats(-0.2, 1.2), st.floats(-0.2, 1.2)).map(sorted)


@given(st.integers(1, 24), st.integers(0, 2**40), corners, corners)
def test_oracles_keep_the_targets_tokens_first_or_last(k, seed, across, down):
    """Which tokens share an area with the box, cell by cell; within and without it in the order of `random`."""
    x1, x2, y1, y2 = *across, *down
    tokens = visual(1, 6, 4, target=torch.tensor([[x1, y1, x2, y2]], dtype=torch.float64))
    target = {
        4 * row + column
        for row in range(6)
        for column in range(4)
        if min(x2 - column / 4, (column + 1) / 4 - x1) > 1e-8 and min(y2 - row / 6, (row + 1) / 6 - y1) > 1e-8
    }
    first, last = (
        set(PRUNERS[name](tokens, k / 24, seeds=[seed])[0].origin.tolist()) for name in ("oracle", "anti_oracle")
    )
    assert len(first) == len(last) == k
    if min(x2 - x1, y2 - y1) > 1e-6 and target:
        assert len(first & target) == min(k, len(target)) and len(last - target) == min(k, 24 - len(target))
        order = random.permutations(24, [seed])[0].tolist()
        wanted = [i for i in order if i in target] + [i for i in order if i not in target]
        assert first == set(wanted[:k])
    assert pruner("oracle:last=true")(tokens, k / 24, seeds=[seed])[0].origin.tolist() == sorted(last)


def test_oracles_are_no_methods():
    assert not {"oracle", "anti_oracle"} & set(all_pruners()) and {"oracle", "anti_oracle"} < set(PRUNERS)
    assert all("ground truth" in PRUNERS[name].label for name in ("oracle", "anti_oracle"))
