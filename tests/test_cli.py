"""The command line: what it runs, what it says, and its exit codes."""

import pandas as pd
import pytest
import yaml

from analysis import __main__ as cli
from analysis import keys, results


@pytest.fixture
def runs(tmp_path, monkeypatch, tiny_folder):
    """A folder of runs with one parameter file."""
    monkeypatch.setattr(cli, "RUNS", tmp_path)
    folder = tmp_path / "10_rec_eval"
    folder.mkdir()
    (folder / "few.yaml").write_text(yaml.safe_dump({"model": str(tiny_folder), "limit": 2}))
    return folder


def test_a_run_its_status_and_what_is_left_of_a_killed_one(runs, capsys):
    assert cli.main(["status"]) == 0 and "no rows" in capsys.readouterr().out
    assert cli.main(["run", "few", "-p", "ids", "[compact, shuffled]", "-p", "pruner", "none"]) == 0
    rows = results.read_rows(runs / "few.parquet")
    assert set(rows["ids"]) == {"compact", "shuffled"} and rows["image_id"].nunique() == 2
    capsys.readouterr()
    assert cli.main(["status"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("few.parquet", "whole", "random-llava"))

    results.parts_folder(runs / "few.parquet").mkdir()  # as a kill leaves it: parts, and no rows
    (runs / "few.parquet").unlink()
    assert cli.main(["status"]) == 1 and "unfinished, 0 parts" in capsys.readouterr().out
    assert cli.main(["resume"]) == 0
    assert results.read_rows(runs / "few.parquet").equals(rows) and cli.main(["status"]) == 0
    (runs / "few.parquet").write_bytes(b"PAR1")
    assert cli.main(["status"]) == 1 and "damaged" in capsys.readouterr().out
    (runs / "other.parquet.parts").mkdir()
    assert cli.main(["resume"]) == 1 and "has no log other.ipynb" in capsys.readouterr().err


def test_clean_lists_parts_and_removes_them_on_a_yes_only(runs, capsys, monkeypatch):
    folder = results.parts_folder(runs / "few.parquet")
    rows = pd.DataFrame({"model": ["m"], "error": [""]})
    for name in "ab":
        results.write_rows(folder / f"{name}.parquet", rows, {"fingerprint": name, "of": {"model": "m", "images": 9}})
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert cli.main(["clean"]) == 0
    said = capsys.readouterr().out
    assert "few.parquet.parts: 2 parts" in said and '2 of {"images": 9, "model": "m"}' in said and "kept" in said
    assert "UNFINISHED" in said and len(list(folder.iterdir())) == 2
    with results.locked(runs / "few.parquet"):  # somebody works on it
        assert cli.main(["clean", "--yes"]) == 0
    assert "another process is working on" in capsys.readouterr().out and len(list(folder.iterdir())) == 2
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert cli.main(["clean"]) == 0 and not folder.exists()


def test_status_says_what_is_older_than_the_code(runs, capsys):
    made = keys.versions() | {"code": keys.code("analysis.positions"), "model": "m"}
    rows = pd.DataFrame({"model": ["m"] * 3, "image_id": [1, 1, 2], "error": ["", "", "torn"]})
    results.write_rows(runs / "new.parquet", rows, made)
    results.write_rows(runs / "old.parquet", rows, made | {"code": made["code"] | {"analysis.positions": "0"}})
    assert cli.main(["status"]) == 0
    said = capsys.readouterr().out
    assert "old.parquet whole, but made under another key: code of analysis.positions" in " ".join(said.split())
    assert "50.0" not in said and [line.split()[-2:] for line in said.splitlines()[1:3]] == [["2", "1"]] * 2


def test_wrong_usage(runs, capsys):
    assert cli.main(["run", "fewer"]) == 2
    assert "has no fewer.yaml; it has: few" in capsys.readouterr().err
    assert cli.main(["run", "few", "-p", "pruners", "none"]) == 1
    assert "unknown parameter 'pruners'; did you mean 'pruner'?" in capsys.readouterr().err
    assert cli.main(["run", "few", "-p", "keep", "0.5", "-p", "keep", "0.25"]) == 2
    assert "keep is given more than once; give a list" in capsys.readouterr().err
    for argv in ([], ["go"], ["run", "--notebook", "fig1_collapse"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == 2


def test_the_doctor_finds_what_is_wrong(capsys, monkeypatch, tmp_path):
    code = cli.main(["doctor"])
    said = capsys.readouterr().out
    assert code == ("WRONG" in said) and "ok    torch" in said and "ok    RefStamps" in said
    from analysis import models

    monkeypatch.setitem(models.MODELS, "tiny-gone", tmp_path)
    monkeypatch.setattr(cli, "version", lambda name: "0.1")
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "WRONG torch: 0.1; pip install 'torch==2.13.0'" in said and "WRONG tiny-gone" in said
