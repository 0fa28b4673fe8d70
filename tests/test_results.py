"""Files of rows: whole, byte-stable, and honest about damage."""

import os

import numpy as np
import pandas as pd
import pytest

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


def test_finished_only_under_its_own_fingerprint(out):
    pd.testing.assert_frame_equal(results.finished(out, "f"), ROWS)
    assert results.finished(out, "g") is None and results.finished(out.with_name("absent"), "f") is None


def test_fingerprint_depends_on_facts_not_on_their_order():
    assert keys.fingerprint({"a": 1, "b": None}) == keys.fingerprint({"b": None, "a": 1})
    assert keys.fingerprint({"a": 1}) != keys.fingerprint({"a": 2})
