"""The scripted design of many small models, on a smoke size, and what its rows and factors promise."""

import pytest
import torch

from analysis.keys import outdated
from analysis.positions import assign, sequence_positions
from analysis.results import provenance, read_rows
from analysis.training import testbed_design as design
from analysis.training.instruct import Blocks, packed
from analysis.training.tokenizer import build
from analysis.types import raster_ids


def test_runs_go_on_where_they_stopped_and_only_from_what_was_made_alike(tmp_path, capsys):
    rows = tmp_path / "rows.parquet"
    given = f"--train 12 --test 4 --steps 2 --batch 3 --rows {rows} --folder {tmp_path}".split()
    design.main([*given, "--only", "1"])
    first = read_rows(rows)
    design.main([*given, "--only", "2"])
    found = read_rows(rows)
    assert found.iloc[: len(first)].equals(first)
    runs = found[list(design.Run._fields)].drop_duplicates()
    assert [tuple(run) for run in runs.itertuples(index=False)] == design.design(1)[:3]
    assert (found.groupby(list(design.Run._fields)).size() == len(design.SETTINGS)).all() and (found["n"] == 4).all()
    with pytest.raises(SystemExit):
        design.main([*given, "--steps", "1"])
    assert "steps (2 there, 1 wanted)" in capsys.readouterr().err and read_rows(rows).equals(found)
    design.main([*given, "--steps", "1", "--only", "1", "--afresh"])
    assert len(read_rows(rows)) == len(first) and outdated(provenance(rows)) == []


def test_any_block_of_runs_is_balanced():
    runs = design.design(3)
    assert len(set(runs)) == 45
    for start in range(0, 45, 3):
        assert len({run[1:] for run in runs[start : start + 3]}) == 1
        assert [run.features for run in runs[start : start + 3]] == list(design.FEATURES)


def test_features_say_of_position_what_their_level_says():
    torch.manual_seed(0)
    seen = (torch.randn(400, 64, 128) + 2 * torch.randn(64, 128) + 3).half()
    none, learned, strong = (design.positioned(seen, level, seen).float() for level in design.FEATURES)
    assert learned.equal(seen.float())
    assert torch.allclose(none.mean(0), none.mean((0, 1)).expand(64, -1), atol=0.01)
    assert torch.allclose(none.mean((0, 1)), learned.mean((0, 1)), atol=0.01)
    extra = strong - learned
    assert torch.allclose(extra, extra[:1].expand_as(extra), atol=0.02)
    assert extra.pow(2).mean().sqrt() == pytest.approx(float(learned.pow(2).mean().sqrt()), rel=0.01)
    r2 = {level: design.probed(*design.positioned(seen, level, seen).split([300, 100])) for level in design.FEATURES}
    assert max(r2["none"]) < 0.05 and min(r2["strong"]) > 0.95


@pytest.mark.parametrize("training", ["all", "original", "compact"])
def test_dropping_trains_on_the_ids_that_are_tested(training):
    model = design.language_model(build())
    seen = torch.arange(5 * 64, dtype=torch.float16).view(5, 64, 1).expand(-1, -1, 128)
    asked = Blocks(torch.ones(5, 2, 9, dtype=torch.int16), torch.full((5, 2), 4), torch.full((5, 2), 9))
    for _, inputs in zip(range(4), design.feed(design.Run("learned", 10_000, training, 0), seen, asked, model, 2)):
        origin = inputs["seen"][..., 0].long() % 64
        assert origin.shape[1] == 64 or training != "all"
        positions = packed(model.embed, inputs["prefix"], inputs["before"], inputs["seen"].float(), inputs,
                           Blocks(inputs["ids"], inputs["asked"], inputs["length"]))[1]  # fmt: skip
        for row, own in zip(positions, origin):
            ids = assign(own, raster_ids(64), "compact" if training == "compact" else "original", 0)
            assert row.equal(sequence_positions(inputs["prefix"].shape[1], ids, 9))
