"""A run in shards: the same file to the byte as the run in one piece, whoever does which shard, in whatever order."""

import re
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import ROOT, keys, results
from analysis.engine import evaluate as evaluation
from analysis.engine.evaluate import cells
from tests.support.rows import GRID, Noise, run

MIXED = [
    *cells(["random", "prumerge"], [0.5, None], ids=["compact", "original"])[:1],
    *GRID[:2],
    *cells("prumerge", [None, 0.5]),
    GRID[-1],
]  # a keep that is none first, last and in between


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The file of a run in one piece: 3 chunks of up to 2 images x 6 cells."""
    out = tmp_path_factory.mktemp("whole") / "rows.parquet"
    run(tiny, out, MIXED)
    return out


@pytest.mark.parametrize("count", [2, 3, 5, 18])
def test_shards_make_the_same_file_as_one_run(count, whole, tiny, tmp_path):
    out = tmp_path / "rows.parquet"
    shards = [f"{number}/{count}" for number in range(1, count + 1)]
    sizes = [len(run(tiny, out, MIXED, shard=shard)) for shard in reversed(shards)]
    paths = [results.shard_path(out, shard) for shard in shards]
    assert not out.exists() and sum(sizes) == len(MIXED) * 15 and min(sizes) > 0
    results.merge_shards(out, reversed(paths))
    assert out.read_bytes() == whole.read_bytes()
    pd.testing.assert_frame_equal(
        run(tiny, out, MIXED), results.read_rows(whole)
    )  # and it counts as that run, which is read back


def test_a_shard_does_only_its_share_and_is_read_back(tiny, tmp_path, monkeypatch):
    read, image = [], Noise.image
    monkeypatch.setattr(Noise, "image", lambda self, i: (read.append(i), image(self, i))[1])
    rows = run(tiny, tmp_path / "rows.parquet", GRID[:2], shard="2/3")
    assert read == [2, 3] and len(rows) == 12
    pd.testing.assert_frame_equal(run(tiny, tmp_path / "rows.parquet", GRID[:2], shard="2/3"), rows)
    assert read == [2, 3]
    lock, claim = ".rows.2of3.parquet.lock", ".rows.parquet.shards"
    assert sorted(path.name for path in tmp_path.iterdir()) == [lock, claim, "rows.2of3.parquet"]


def test_what_does_not_belong_together_is_not_merged(whole, tiny, tmp_path):
    out, other = tmp_path / "rows.parquet", tmp_path / "other.parquet"
    one, two, three = (results.shard_path(out, f"{number}/3") for number in (1, 2, 3))
    for shard in ("1/3", "2/3", "3/3"):
        run(tiny, out, GRID[:2], shard=shard)
    run(replace(tiny, revision="other"), other, GRID[:2], Noise(images=6), shard="2/3")
    run(tiny, tmp_path / "two.parquet", GRID[:2], shard="2/2")
    for paths, message in [
        ([one, three], "shards 2/3 are missing"),
        ([two], "shards 1/3, 3/3 are missing"),
        ([one, two, two, three], "rows.2of3.parquet is shard 2/3, which is there already"),
        (
            [one, other.with_name("other.2of3.parquet"), three],
            "differ in data, expressions, images, pictures, revision",
        ),
        ([one, other.with_name("two.2of2.parquet")], "differ in number of shards"),
        ([one, whole], "is no shard"),
        ([], "no shards to merge"),
    ]:
        with pytest.raises(ValueError, match=message):
            results.merge_shards(out, paths)
    with pytest.raises(FileNotFoundError, match="no rows at .*rows.1of2"):
        results.merge_shards(out, [tmp_path / "rows.1of2.parquet"])
    assert not out.exists()


def test_shards_of_two_commits_are_of_one_run_and_both_are_named(tiny, tmp_path, monkeypatch):
    out = tmp_path / "rows.parquet"
    environment = keys.environment()
    for shard, commit in (("1/2", "b"), ("2/2", "a")):
        monkeypatch.setattr(keys, "environment", lambda: environment | {"commit": commit})
        run(tiny, out, GRID[:1], shard=shard)
    results.merge_shards(out, [results.shard_path(out, shard) for shard in ("1/2", "2/2")])
    assert results.provenance(out)["commit"] == "a, b"


def test_a_shard_that_could_not_be_merged_is_refused_before_its_work(tiny, tmp_path, monkeypatch):
    """A GPU of another kind, or other code, is seen when a shard begins, not after the hours."""
    out, read, image = tmp_path / "rows.parquet", [], Noise.image
    run(tiny, out, GRID[:2], shard="1/3")
    monkeypatch.setattr(Noise, "image", lambda self, i: (read.append(i), image(self, i))[1])
    monkeypatch.setattr(evaluation, "_device", lambda model: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"differ from this one in device \(cpu there, NVIDIA A100 wanted\).*remove"):
        run(tiny, out, GRID[:2], shard="2/3")
    assert read == []
    results.shard_path(out, "1/3").unlink()  # nothing of the first is left: the second may have its way
    run(tiny, out, GRID[:2], shard="2/3")


def test_wrong_shards_stop_before_any_work(tiny, tmp_path):
    for shard in ("0/2", "3/2", "2", "a/b", "1/0", "-1/2", "1/2/3", ""):
        with pytest.raises(ValueError, match="a shard is given as number/count, such as 2/5"):
            run(tiny, tmp_path / "rows.parquet", shard=shard)
    with pytest.raises(ValueError, match="shard 1/4 of 3 pieces .* no more than 3 shards"):
        run(tiny, tmp_path / "rows.parquet", GRID[:1], shard="1/4")
    assert not list(tmp_path.iterdir())


@given(st.integers(1, 40), st.integers(1, 40))
def test_names(number, count):
    if number <= count:
        assert results.parse_shard(f"{number}/{count}") == (number, count)
        path = results.shard_path("a/rows.parquet", f"{number}/{count}")
        assert str(path) == ("a/rows.parquet" if count == 1 else f"a/rows.{number}of{count}.parquet")


def test_the_graph_merges_shards_and_has_none_by_default():
    """What Snakemake would run for rows of REC, and for a real checkpoint with its parameters from --config."""

    def planned(*config):
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--printshellcmds", "--forceall", *config],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        return said, [line for line in said.splitlines() if line.startswith("Shell command: ") and "papermill" in line]

    rows = "papermill_runs/10_rec_eval/smoke.parquet"
    said, commands = planned(rows)
    assert len(commands) == 1 and f'"out": "{rows}", "shard": "1/1"' in commands[0] and "rule merge" not in said
    said, commands = planned("real", "--config", "shards=2", "model=some/model", "dataset=refcocog", "limit=9", "gpu=4")
    assert len(commands) == 4 and said.count("rule merge_real:") == 2
    assert len(re.findall("resources: .*gpu=4", said)) == 4
    assert "output: papermill_runs/12_real_checkpoints/limit=9/some_model_refcocog_test.2of2.done" in said
    assert sum('"model": "some/model", "dataset": "refcocog", "limit": 9' in line for line in commands) == 4
    assert sum('"splits": ["test"], "shard": "2/2"' in line for line in commands) == 1


def test_the_draft_is_the_form_of_a_box_and_the_same_in_shards(tiny, tmp_path, monkeypatch):
    """What is tried ahead moves the last bit of the logits: it may not depend on what was answered before."""
    drafts, continued = [], evaluation.continued
    monkeypatch.setattr(evaluation, "continued", lambda *given: (drafts.append(tuple(given[-1])), continued(*given))[1])
    run(tiny, tmp_path / "whole.parquet", GRID[:3], batch_size=2)
    whole, drafts[:] = list(drafts), []
    for number in range(1, 7):
        run(tiny, tmp_path / "rows.parquet", GRID[:3], shard=f"{number}/6", batch_size=2)
    assert drafts == whole and set(whole) == {tuple(evaluation.box_draft(tiny))}
    word = tiny.tokenizer.convert_tokens_to_ids
    said = tiny.tokenizer.encode("[0.12,0.34,0.56,0.78]", add_special_tokens=False)
    assert [expected for expected in whole[0] if expected >= 0] == [t for t in said if t not in map(word, "12345678")]
