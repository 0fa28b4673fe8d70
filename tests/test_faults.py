"""What goes wrong in long runs, done for real: memory and disk run out, logits are not numbers, runs meet."""

import resource
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis import results
from analysis.engine import evaluate as evaluation
from tests.support.rows import GRID, Noise, run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return run(tiny, tmp_path_factory.mktemp("whole") / "rows.parquet", GRID[:6])


def test_out_of_memory_halves_the_batch_and_goes_on(whole, tiny, tmp_path, monkeypatch, capsys):
    """At most 5 expressions and one image fit: the same rows, and the smaller size is kept."""
    sizes, continued, encode = [], evaluation.continued, type(tiny).encode

    def small_gpu(model, logits, *rest, **more):
        sizes.append(len(logits))
        if len(logits) > 5:
            raise torch.OutOfMemoryError("no room")
        return continued(model, logits, *rest, **more)

    def small_tower(self, images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("no room")
        return encode(self, images)

    monkeypatch.setattr(evaluation, "continued", small_gpu)
    monkeypatch.setattr(type(tiny), "encode", small_tower)
    pd.testing.assert_frame_equal(run(tiny, tmp_path / "rows.parquet", GRID[:6]), whole)
    assert sum(size > 5 for size in sizes) == 1 and set(sizes[1:]) <= {1, 2, 3}
    said = capsys.readouterr()
    assert (said.out + said.err).count("going on with 3 expressions at a time") == 1

    def no_gpu(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(evaluation, "continued", no_gpu)
    with pytest.raises(RuntimeError, match="out of memory on cpu with a single expression"):
        run(tiny, tmp_path / "none.parquet", GRID[:1])


def test_logits_that_are_no_numbers_are_marked_and_counted(whole, tiny, tmp_path, monkeypatch, capsys):
    """One batch in four gives NaN in its first row: that row says so, all others are as they were."""
    head, calls = tiny.head.forward, []

    def broken(states):
        logits = head(states)
        calls.append(1)
        if len(calls) % 40 == 1:
            logits = logits.clone()
            logits[0, ..., 3] = float("nan")
        return logits

    monkeypatch.setattr(tiny.head, "forward", broken)
    rows = run(tiny, tmp_path / "rows.parquet", GRID[:6], max_failed=0.5)
    bad = rows["error"] != ""
    assert 0 < bad.sum() < len(rows) / 4 and set(rows["error"][bad]) == {"the model's logits are not numbers (NaN)"}
    assert (rows["raw"][bad] == "").all() and (rows["raw"] == whole["raw"])[~bad].all()
    assert f"failed: {bad.sum()} rows: the model's logits" in capsys.readouterr().out


def test_too_many_failures_stop_the_run_and_keep_the_rows(tiny, tmp_path):
    out = tmp_path / "rows.parquet"
    with pytest.raises(
        RuntimeError, match="6 of 15 rows have failed, more than the share max_failed=0.3; one reason: Un"
    ):
        run(tiny, out, GRID[:1], Noise(broken=(0, 3)), max_failed=0.3)
    kept = len(list(results.parts_folder(out).glob("*.parquet")))
    assert kept == 2 and not out.exists()
    assert len(run(tiny, out, GRID[:1], Noise(broken=(0, 3)), max_failed=0.4)) == 15


SCRIPT = """
import sys
from tests.support.rows import GRID, run
from analysis import models
run(models.load(sys.argv[1], device="cpu"), sys.argv[2], GRID[:6])
"""


def child(folder, out, **more):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, folder, out],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def test_a_full_disk_loses_nothing(whole, tiny, tiny_folder, tmp_path):
    """No file may grow beyond 8 KB: parts fit, the merged file does not. With room, the run goes on from its parts."""
    out = tmp_path / "rows.parquet"

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    part = tmp_path / "part.parquet"
    results.write_rows(part, whole.head(9), {})
    limit = part.stat().st_size + 1500
    failed = child(tiny_folder, out, preexec_fn=small_disk)
    message = failed.communicate()[1]
    assert failed.returncode != 0 and "File too large" in message
    assert not out.exists() and not list(tmp_path.glob("*.tmp"))
    parts = sorted(results.parts_folder(out).glob("*.parquet"))
    assert len(parts) == 18 and all(len(results.read_rows(p)) for p in parts)
    pd.testing.assert_frame_equal(run(tiny, out, GRID[:6]), whole)


def test_two_processes_on_the_same_rows(whole, tiny, tiny_folder, tmp_path):
    out = tmp_path / "rows.parquet"
    with results.locked(out), pytest.raises(RuntimeError, match="another process is working on .*rows.parquet"):
        run(tiny, out, GRID[:1])
    both = [child(tiny_folder, out) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes and all(code == 0 or "another process is working on" in text for code, text in zip(codes, said))
    pd.testing.assert_frame_equal(results.read_rows(out), whole)


def test_a_slurm_job_that_does_not_advance_stops_and_one_that_does_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "rows.parquet"
    for _ in range(9):
        results.check_progress(out, 0)  # not under Slurm: as often as somebody likes
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    for done in (0, 3, 3, 3, 4, 4, 4, 9):  # runs out of time again and again
        results.check_progress(out, done)
    results.check_progress(out, 9), results.check_progress(out, 9)
    with pytest.raises(RuntimeError, match="three starts of this job in a row .*remove .*starts.json"):
        results.check_progress(out, 9)
