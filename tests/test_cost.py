"""Costs: FLOPs against a count by hand, and what each cell's rows hold."""

import pytest
import torch

from analysis.engine.cost import DECODERS, TEXT, cost_rows, decoder_flops, peak_bytes, ratio
from analysis.engine.evaluate import cells
from analysis.rec.datasets import RecDataset
from analysis.refstamps.dataset import refstamps


@pytest.fixture(scope="module")
def rows(tiny):
    grid = [*cells("none"), *cells(["random", "prumerge"], 0.25, ids=["compact", "original"])]
    return grid, cost_rows(tiny, refstamps("refstamps", "val", 2), grid, batch=2, turns=3, progress=False)


@pytest.mark.parametrize("name", DECODERS)
def test_flops_of_a_real_decoder_by_hand(name):
    visual, blocks, sizes = DECODERS[name]
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    for keep in (1.0, 0.25):
        length = TEXT + round(keep * visual)
        products = 4 * width * width + 3 * width * inner
        by_hand = blocks * (2 * length * products + 2 * 2 * length * length * width)
        assert decoder_flops(name, keep) == pytest.approx(by_hand, rel=2e-3)


def test_gap_costs_nothing_and_pruning_saves(rows):
    (full, compact, gap, *_), measured = rows
    assert len(measured) == 5 * 3 and set(measured["turn"]) == {1, 2, 3}
    assert set(measured.loc[measured["pruner"] != "none", "tokens"]) == {4}
    for column in ("flops", "cache_bytes", "peak_bytes"):
        assert ratio(measured, gap, compact, column)["ratio"] == 1
        assert ratio(measured, compact, full, column)["ratio"] < 0.9
    assert ratio(measured, gap, compact, "prefill_s")["n"] == 3
    assert (measured["peak_bytes"] >= measured["cache_bytes"] * measured["images"]).all()


def test_peak_memory_by_hand(tiny):
    def run():
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return b * 2

    assert peak_bytes(tiny, run) == pytest.approx(2 * 4_000_000, abs=1000)  # never three at a time


def test_too_little_to_measure(tiny):
    data = refstamps("refstamps", "val", 2)
    with pytest.raises(ValueError, match="at least two images and two turns are needed, got 2 and 1"):
        cost_rows(tiny, data, cells("none"), turns=1)
    one = RecDataset("refstamps", "val", data.rows[data.rows["image_id"] == data.rows["image_id"].iloc[0]], data.image)
    with pytest.raises(ValueError, match="got 1 and 20"):
        cost_rows(tiny, one, cells("none"))
