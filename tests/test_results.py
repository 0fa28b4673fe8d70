"""Files of rows: whole, byte-stable, and honest about damage."""

import os
import socket
import subprocess

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from analysis import keys, results

ROWS = pd.DataFrame({"image_id": [3, 3, 9], "raw": ["[0.1, 0, 1, 1]", "", "ü\n"], "keep": [0.25, np.nan, 1.0]})
MADE = {"fingerprint": "f", "cells": [{"keep": None}]}


@pytest.fixture
def out(tmp_path):
    results.write_rows(tmp_path / "new" / "rows.parquet", ROWS, MADE)
    return tmp_path / "new" / "rows.parquet"


def test_round_trip_leaves_nothing_else_behind(out):
    pd.testing.assert_frame_equal(results.read_rows(out), ROWS)
    assert results.provenance(out) == MADE
    assert [p.name for p in out.parent.iterdir()] == ["rows.parquet"]


def test_same_rows_same_bytes(out, tmp_path):
    again = tmp_path / "again.parquet"
    results.write_rows(again, ROWS.copy(), dict(reversed(MADE.items())))
    assert again.read_bytes() == out.read_bytes()
    results.write_rows(again, ROWS, MADE | {"fingerprint": "g"})
    assert again.read_bytes() != out.read_bytes()


def test_a_failed_write_keeps_the_old_file(out, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        results.write_rows(out, ROWS.head(1), MADE)
    assert len(results.read_rows(out)) == 3 and len(list(out.parent.iterdir())) == 1


def test_several_files_in_the_order_given(out, tmp_path):
    other = tmp_path / "other.parquet"
    results.write_rows(other, ROWS.assign(image_id=[1, 2, 4]), MADE)
    assert results.read_rows([other, out])["image_id"].tolist() == [1, 2, 4, 3, 3, 9]
    results.write_rows(other, ROWS.assign(extra=1), MADE)
    with pytest.raises(ValueError, match="differ in the columns extra"):
        results.read_rows([out, other])
    with pytest.raises(ValueError, match="at least one path"):
        results.read_rows([])
    with pytest.raises(FileNotFoundError, match="no rows at"):
        results.read_rows(tmp_path / "absent.parquet")


@pytest.mark.parametrize("where", ["head", "middle", "tail", "empty", "one bit"])
def test_damage_is_seen(out, where):
    content = bytearray(out.read_bytes())
    half = len(content) // 2
    place = content.index(b"\x28\xb5\x2f\xfd") + 12  # inside the first zstd frame: data, not metadata
    damaged = {
        "head": content[half:],
        "middle": content[:half],
        "tail": content[:-1],
        "empty": b"",
        "one bit": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
    }[where]
    out.write_bytes(damaged)
    with pytest.raises(ValueError, match="rows.parquet is damaged"):
        results.read_rows(out)
    assert results.finished(out, "f") is None


def test_a_foreign_parquet_is_refused(tmp_path):
    ROWS.to_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match="no provenance"):
        results.read_rows(tmp_path / "foreign.parquet")


def test_finished_only_under_its_own_fingerprint(tmp_path):
    """A part says how many of its rows have failed; absent, damaged and of another key are alike."""
    part = tmp_path / "part.parquet"
    results.write_rows(part, ROWS.assign(error=["", "torn", ""]), MADE)
    assert results.finished(part, "f") == 1 and results.finished(part, "g") is None
    assert results.finished(part.with_name("absent"), "f") is None
    results.write_rows(part, ROWS.assign(error=""), MADE)
    assert results.finished(part, "f") == 0


def test_how_rows_are_dealt_out_does_not_show_in_the_file(tmp_path, monkeypatch):
    """Merged in constant memory: the same bytes from one table, from single rows, and in any groups of rows."""
    monkeypatch.setattr(results, "GROUP", 4)
    rows = pd.concat([ROWS] * 7, ignore_index=True)
    results.write_rows(tmp_path / "whole.parquet", rows, MADE)
    for size in (1, 3, 5, 21):
        parts = []
        for start in range(0, 21, size):
            parts.append(tmp_path / f"{size}_{start}.parquet")
            results.write_rows(
                parts[-1], rows.iloc[start : start + size].reset_index(drop=True), {"fingerprint": "part"}
            )
        pd.testing.assert_frame_equal(results.merge(tmp_path / "merged.parquet", parts, MADE), rows)
        assert (tmp_path / "merged.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert parquet.ParquetFile(tmp_path / "whole.parquet").metadata.num_row_groups == 6


def test_a_small_file_that_claims_many_rows_is_refused(tmp_path):
    table = pa.table({"image_id": pa.array(np.zeros(2**24 + 1, np.int8))})
    table = table.replace_schema_metadata({b"provenance": b"{}"})
    parquet.write_table(table, tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    with pytest.raises(ValueError, match="claims 16,777,217 rows; no more than 16,777,216"):
        results.read_rows(tmp_path / "bomb.parquet")


def test_rows_of_another_key_are_never_replaced(tmp_path, capsys):
    out, made = tmp_path / "rows.parquet", []

    def rows():
        made.append(1)
        return {"": ROWS}

    results.once({"": out}, dict(limit=8, code={"analysis.a": "1", "analysis.b": "2"}), rows)
    before = out.read_bytes()
    again = results.once({"": out}, dict(limit=8, code={"analysis.a": "1", "analysis.b": "2"}), rows)
    assert len(made) == 1 and f"read back from {out}, nothing computed" in capsys.readouterr().out
    pd.testing.assert_frame_equal(again[""], ROWS)
    with pytest.raises(
        ValueError, match=r"code of analysis.b; limit \(8 there, 2 wanted\).*mv .*rows.parquet .*rows_old"
    ):
        results.once({"": out}, dict(limit=2, code={"analysis.a": "1", "analysis.b": "3"}), rows)
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(ValueError, match="is damaged"):
        results.once({"": tmp_path / "results.csv"}, {}, rows)
    assert len(made) == 1 and out.read_bytes() == before and (tmp_path / "results.csv").read_text() == "mine"


def test_failed_expressions_are_told_of_and_left_out_of_every_cell(capsys):
    cell = dict(model="m", dataset="d", split="s", sent_id=0)
    rows = pd.DataFrame(
        [
            cell | dict(image_id=i, ref_id=i, ids=ids, error="torn" if (i, ids) == (3, "a") else "")
            for ids in "ab"
            for i in range(5)
        ]
    )
    told = results.answered(rows)
    assert told.groupby("ids")["image_id"].apply(list).tolist() == [[0, 1, 2, 4]] * 2
    assert "1 of 10 rows have failed; 1 of 5 expressions are left out" in capsys.readouterr().out
    pd.testing.assert_frame_equal(results.answered(told), told)


def test_a_lock_without_flock_names_its_holder_and_outlives_no_process_of_this_host(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(results.fcntl, "flock", unknown)
    out, held = tmp_path / "rows.parquet", tmp_path / ".rows.parquet.lock.held"
    refused = pytest.raises(RuntimeError, match=f"process {os.getpid()} on .*remove {held}")
    with results.locked(out), refused:
        results.locked(out).__enter__()
    assert not held.exists()
    dead = subprocess.Popen(["true"])
    dead.wait()
    held.write_text(f"{socket.gethostname()} {dead.pid}")  # killed here
    with results.locked(out):
        pass
    held.write_text("node17 4711")  # of another host: nobody here can tell, so it is named
    with pytest.raises(RuntimeError, match="process 4711 on node17, by .*held. Wait for it.*remove"):
        results.locked(out).__enter__()


def test_fingerprint_depends_on_facts_not_on_their_order():
    assert keys.fingerprint({"a": 1, "b": None}) == keys.fingerprint({"b": None, "a": 1})
    assert keys.fingerprint({"a": 1}) != keys.fingerprint({"a": 2})
