"""A person's own method: nonsense gets a clear error wherever it runs, and a comparison takes file.py:function."""

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis import __main__ as cli
from analysis.engine.evaluate import cells
from analysis.pruning import PRUNERS, all_pruners
from analysis.pruning.images import prune_images
from analysis.rec.scoring import score
from analysis.tools import ask, compare
from analysis.types import Selection
from tests.support.checkpoint import noise
from tests.support.rows import Noise, run
from tests.support.visual import visual


def selection(origin, features=None, synthetic=None, width=5):
    origin = torch.tensor(origin)
    features = torch.zeros(len(origin), width) if features is None else features
    return Selection(features, origin, torch.zeros(len(origin), dtype=torch.bool) if synthetic is None else synthetic)


FINE = selection([3, 1])
HOLES = torch.zeros(2, 5)
HOLES[1, 2] = float("nan")


@pytest.mark.parametrize(
    "made, message",
    [
        (torch.zeros(3, 2), "must return a list of one Selection for each of 3 images, and returned a Tensor"),
        (None, "returned a NoneType"),
        ([FINE, FINE], "returned a list of 2"),
        ([[0, 1]] * 3, "returned a list of 3; types.kept makes such a list of raster indices"),
        ([FINE, selection([0.0, 1.0]), FINE], r"image 1 of 3: origin must be \[2\] torch.int64 on cpu.* torch.float32"),
        ([selection([[0, 1]]), FINE, FINE], r"origin must be \[1\] torch.int64.* it is \[1, 2\]"),
        ([selection([0, 1], torch.zeros(3, 5)), FINE, FINE], r"features must be \[2, 5\] .*2 tokens.* is \[3, 5\]"),
        ([selection([0, 1], torch.zeros(2, 7)), FINE, FINE], r"features must be \[2, 5\].* is \[2, 7\]"),
        ([selection([0, 1], torch.zeros(2, 5).double()), FINE, FINE], "float32.*float64"),
        ([selection([0, 1], synthetic=torch.zeros(2)), FINE, FINE], r"synthetic must be \[2\] torch.bool"),
        ([FINE, selection([24, -1]), FINE], r"image 1 of 3: origin must be .* in 0..23, and holds \[24, -1\]"),
        ([FINE, selection([4, 2, 4]), FINE], r"image 1 of 3: a token can be kept once, but \[4\] are there several"),
        ([FINE, FINE, selection([7, 9], HOLES)], r"image 2 of 3: features of the tokens \[9\] are no finite numbers"),
    ],
)  # fmt: skip
def test_nonsense_gets_a_clear_error(made, message):
    def mine(visual, keep, *, seeds=()):
        return made

    with pytest.raises(ValueError, match=f"pruner mine.*{message}"):
        prune_images(mine, visual(), 0.5, [0, 1, 2])


def test_no_token_at_all():
    with pytest.raises(ValueError, match="image 1 of 3: no token is kept; at least one must stay"):
        none = Selection(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
        prune_images(lambda visual, keep, *, seeds: [FINE, none, FINE], visual(), 0.5, [0, 1, 2])


@given(st.data())
def test_every_sound_selection_passes_and_each_fault_in_it_is_found(data):
    """Against a plain reading of the rules, image by image."""
    places = st.lists(st.integers(-1, 24), min_size=1, max_size=6)
    origins = data.draw(st.lists(places, min_size=3, max_size=3))
    synthetic = [data.draw(st.lists(st.booleans(), min_size=len(o), max_size=len(o))) for o in origins]
    made = [selection(o, synthetic=torch.tensor(s)) for o, s in zip(origins, synthetic)]
    existing = [[place for place, new in zip(o, s) if not new] for o, s in zip(origins, synthetic)]
    sound = all(0 <= place < 24 for o in origins for place in o) and all(len(set(e)) == len(e) for e in existing)
    try:
        found = prune_images(lambda visual, keep, *, seeds: made, visual(), 0.5, [0, 1, 2])
    except ValueError:
        assert not sound
    else:
        assert sound and found == made


def test_a_model_whose_own_features_are_no_numbers_is_not_the_methods_fault():
    broken = visual()
    broken.features[1, 3] = float("nan")
    for name in ["none", *all_pruners(inside=False)]:
        prune_images(PRUNERS[name], broken, None if name == "none" else 0.5, [0, 1, 2])


MINE = """
import torch
from analysis.types import kept

def corner(visual, keep, *, seeds=(), again=False):
    k = max(1, round(keep * visual.features.shape[1]))
    index = torch.arange(k).expand(len(visual.features), -1)
    return kept(visual.features, index * 0 if again else index)
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:corner"


def test_own_methods_run_wherever_one_is_named_and_fail_before_the_work(tiny, mine, tmp_path):
    rows = run(tiny, tmp_path / "rows.parquet", cells(mine, 0.25), Noise(images=2))
    assert (rows["pruner"] == mine).all() and set(rows["tokens"]) == {4}
    [answer] = ask.answers(tiny, noise(32, 32), "cup", cells(mine, 0.25))
    assert answer.shown[:8].all() and not answer.shown[8:].any()
    message = r"cannot run on random-llava with keep 0.25: pruner .*corner.*a token can be kept once, but \[0\]"
    with pytest.raises(ValueError, match=message):
        run(tiny, tmp_path / "other.parquet", cells(f"{mine}:again=true", 0.25), Noise(images=2))
    assert not (tmp_path / "other.parquet").exists()


def test_a_comparison(tiny_folder, mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["compare", mine, "random", "--model", str(tiny_folder), "--limit", "3", "--keep", "0.5,0.25"]
    assert cli.main(given) == 0
    said = capsys.readouterr().out
    [folder] = tmp_path.glob("compare_*")
    assert "random_refstamps_val" in folder.name and f"all of it is in {folder.name}" in said
    files = {"rows.parquet", "accuracies.csv", "differences.csv", "gap.csv", "figure.pdf", "figure.png"}
    assert files <= {file.name for file in folder.iterdir()}
    scored = score(pd.read_parquet(folder / "rows.parquet"))
    assert scored["image_id"].nunique() == 3 and len(scored[["pruner", "keep", "ids"]].drop_duplicates()) == 9
    table = pd.read_csv(folder / "differences.csv")
    assert len(table) == 4 and set(table["first"]) == {mine} and set(table["other"]) == {"random"}
    for row in table.to_dict("records"):
        here = scored[(scored["keep"] == row["keep"]) & (scored["ids"] == row["ids"])]
        mean = here.groupby("pruner")["correct"].mean()
        assert row["difference"] == pytest.approx(mean[mine] - mean["random"], abs=1e-6)
        assert row["low"] <= row["difference"] <= row["high"] and 0 < row["p"] <= row["p_fdr"] <= 1
    assert len(pd.read_csv(folder / "gap.csv")) == 4 and len(pd.read_csv(folder / "accuracies.csv")) == 9
    before = (folder / "rows.parquet").stat().st_mtime_ns
    assert cli.main([*given, "--out", str(folder)]) == 0  # read back
    assert (folder / "rows.parquet").stat().st_mtime_ns == before
    for more, message in [
        (["--keep", "half"], "--keep takes shares such as 0.25, or none"),
        (["--ids", "gap"], "unknown IDs 'gap'"),
        (["--split", "vall"], "has no split 'vall'"),
        (["--model", "tiny-lava"], "did you mean 'tiny-llava'"),
    ]:
        assert cli.main([*given, *more]) == 2 and message in capsys.readouterr().err
    assert cli.main(["compare", "mine.py:other"]) == 2 and "cannot be loaded" in capsys.readouterr().err


def test_one_method_alone_has_nothing_to_differ_from(tiny, tmp_path):
    out = compare.compare(tiny, Noise(images=3), ["random"], tmp_path / "alone", keep=[0.5], ids=["original"], chunk=2)
    assert not (out / "differences.csv").exists() and not (out / "gap.csv").exists()
    assert len(pd.read_csv(out / "accuracies.csv")) == 2
