"""The engine: rows do not depend on cells, batches, crashes or resumption; bad input stops before any work."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import keys, models, results
from analysis.engine import evaluate as evaluation
from analysis.engine.evaluate import cells, image_seed, needs_text
from analysis.pruning import all_pruners, pruner, random
from analysis.rec.scoring import score, score_words, summarise
from analysis.types import Cell
from tests.support.rows import GRID, Noise, run


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The rows of an uninterrupted run, and their file."""
    out = tmp_path_factory.mktemp("whole") / "rows.parquet"
    return run(tiny, out), out


def test_rows(whole, tiny):
    rows, out = whole
    assert len(rows) == len(GRID) * 15 and not rows.duplicated(["sent_id", *GRID[0].columns()]).any()
    pd.testing.assert_frame_equal(results.read_rows(out), rows)
    assert sorted(p.name for p in out.parent.iterdir()) == [".rows.parquet.lock", "rows.parquet"]
    assert set(rows["tokens"][rows["keep"] == 0.25]) == {4.0} and set(rows["tokens_full"]) == {16}
    assert rows["keep"].isna().sum() == 4 * 15 and (rows["error"] == "").all()
    made = results.provenance(out)
    assert made["revision"] == tiny.revision and len(made["cells"]) == len(GRID)
    summary = summarise(score(rows), by=["pruner", "keep", "order", "ids"])
    assert len(summary) == len(GRID) and summary["n"].eq(15).all()


def test_the_cells_reach_the_model(whole):
    """Answers differ between IDs, orders, pruners and images; without pruning compact and original are the same."""
    raw = whole[0].set_index(["pruner", "keep", "order", "ids", "sent_id"])["raw"].unstack("sent_id")
    assert (
        (raw.loc["none"].xs("compact", level="ids") == raw.loc["none"].xs("original", level="ids"))
        .loc[pd.IndexSlice[:, "method"], :]
        .all(axis=None)
    )
    for a, b in [
        (("random", 0.25, "method", "compact"), ("random", 0.25, "method", "original")),
        (("random", 0.5, "method", "compact"), ("random", 0.5, "shuffled", "compact")),
        (("random", 0.5, "method", "original"), ("cls_similarity", 0.5, "method", "original")),
    ]:
        assert (raw.loc[a] != raw.loc[b]).any()
    assert raw.loc[("random", 0.5, "method", "original")].nunique() > 5


def test_other_cells_and_images_change_nothing(whole, tiny, tmp_path):
    rows = whole[0]
    alone = run(tiny, tmp_path / "a", grid=[GRID[-1]])
    mine = rows[(rows[list(GRID[-1].columns())] == pd.Series(GRID[-1].columns())).all(axis=1)]
    pd.testing.assert_frame_equal(alone, mine.reset_index(drop=True))
    single = run(tiny, tmp_path / "b", grid=[GRID[-1]], batch_size=1, chunk=1)
    pd.testing.assert_frame_equal(single, alone)


SCRIPT = """
import sys
from analysis import models
from tests.support.rows import GRID, run
run(models.load(sys.argv[1], device="cpu"), sys.argv[2])
"""


def test_sigkill_and_resume(whole, tiny, tiny_folder, tmp_path, monkeypatch):
    """Killed when some parts are written; afterwards a part is damaged, one is of another run, one is torn."""
    out = tmp_path / "rows.parquet"
    root = Path(__file__).parents[1]
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, tiny_folder, out], cwd=root, stderr=subprocess.PIPE)
    parts = results.parts_folder(out)
    deadline = time.monotonic() + 240
    while len(list(parts.glob("*.parquet"))) < 4 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not out.exists()
    done = sorted(parts.glob("*.parquet"))
    assert 4 <= len(done) < 3 * len(GRID)
    kept = set(done[2:])
    done[0].write_bytes(done[0].read_bytes()[:-9])
    results.write_rows(done[1], results.read_rows(done[1]).assign(raw="stale"), {"fingerprint": "another run"})
    (parts / "00000-torn.parquet.1.tmp").write_bytes(b"PAR1")

    written, write_rows = [], results.write_rows
    monkeypatch.setattr(results, "write_rows", lambda path, *rest: (written.append(path), write_rows(path, *rest)))
    resumed = run(tiny, out)
    assert not set(written) & kept and len(written) == 3 * len(GRID) - len(kept)
    assert set(done[:2]) <= set(written)
    pd.testing.assert_frame_equal(resumed, whole[0])
    assert out.read_bytes() == whole[1].read_bytes()
    assert not parts.exists()


def test_a_finished_run_is_read_back_and_one_of_another_key_is_not_replaced(tiny, tmp_path, monkeypatch, capsys):
    """A trial on the same file, before or after, costs neither rows nor parts of the other run."""
    out, answered = tmp_path / "rows.parquet", []
    text = models.Model.text
    monkeypatch.setattr(models.Model, "text", lambda self, tokens: (answered.append(1), text(self, tokens))[1])
    first = run(tiny, out, GRID[:2])
    assert len(answered) == 30 and "30 of them answered now" in capsys.readouterr().out
    pd.testing.assert_frame_equal(run(tiny, out, GRID[:2]), first)
    assert len(answered) == 30 and "read back from" in capsys.readouterr().out
    bytes_before = out.read_bytes()
    for model, data, options, said in [
        (replace(tiny, revision="other"), Noise(), {}, "revision"),
        (replace(tiny, files={"config.json": "0"}), Noise(), {}, "files of config.json"),
        (replace(tiny, mean=(0.1, 0.2, 0.3)), Noise(), {}, "adapter of mean"),
        (tiny, Noise(images=4), {}, r"images \(5 there, 4 wanted\)"),
        (tiny, Noise(images=5, version=2), {}, "pictures"),
        (tiny, Noise(), {"batch_size": 2}, r"batch_size \(32 there, 2 wanted\)"),
    ]:
        with pytest.raises(ValueError, match=f"rows of another key, and nothing is replaced: .*{said}.*mv "):
            run(model, out, GRID[:2], data, **options)
    assert len(answered) == 30 and out.read_bytes() == bytes_before

    results.write_rows(results.parts_folder(out) / "00000-other.parquet", first, {"fingerprint": "another run's"})
    out.rename(tmp_path / "moved.parquet")
    pd.testing.assert_frame_equal(run(tiny, out, GRID[:2]), first)
    assert [path.name for path in results.parts_folder(out).iterdir()] == ["00000-other.parquet"]
    assert "1 parts of other keys stay in" in capsys.readouterr().out


def test_an_edited_pruner_gives_new_rows_and_keeps_the_parts_of_all_others(tiny, tmp_path, monkeypatch):
    """As by README's "new pruner in ten minutes": edit it, run the same command. Comments change nothing."""
    file = tmp_path / "mine.py"
    grid, edit = [Cell(f"{file}:prune", 0.25), Cell("random", 0.25)], file.write_text
    source = (
        "import torch\nfrom analysis.types import kept\n\n\ndef prune(visual, keep, *, seeds=()):\n"
        "    return kept(visual.features, torch.arange(4).expand(len(visual.features), 4))\n"
    )
    edit(source)
    first = run(tiny, tmp_path / "rows.parquet", grid)
    edit("# a comment\n" + source.replace("seeds=()):\n", 'seeds=()):\n    """A docstring."""\n\n'))
    pd.testing.assert_frame_equal(run(tiny, tmp_path / "rows.parquet", grid), first)
    edit(source.replace("arange(4)", "arange(12, 16)"))
    with pytest.raises(ValueError, match="differ in pruners of .*mine.py:prune"):
        run(tiny, tmp_path / "rows.parquet", grid)
    second = run(tiny, tmp_path / "new.parquet", grid)
    mine = first["pruner"] != "random"
    assert (first["raw"] != second["raw"])[mine].any() and (first["raw"] == second["raw"])[~mine].all()

    run(tiny, tmp_path / "{key}.parquet", grid)  # a name by the key: the same command after an edit writes a new file
    edit(source)
    run(tiny, tmp_path / "{key}.parquet", grid)
    named = {path: results.read_rows(path) for path in tmp_path.glob("????????????????.parquet")}
    assert len(named) == 2 and any(rows.equals(first) for rows in named.values())

    # a killed run that goes on after the edit takes over only what the edit cannot move
    def killed(*_):
        raise KeyboardInterrupt

    edit(source)
    with monkeypatch.context() as patch:
        patch.setattr(results, "merge", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tmp_path / "killed.parquet", grid)
    edit(source.replace("arange(4)", "arange(12, 16)"))
    written, write_rows = [], results.write_rows
    monkeypatch.setattr(results, "write_rows", lambda path, *rest: (written.append(path), write_rows(path, *rest)))
    pd.testing.assert_frame_equal(run(tiny, tmp_path / "killed.parquet", grid), second)
    assert len(written) == 3 and len(list(results.parts_folder(tmp_path / "killed.parquet").iterdir())) == 3


def test_what_has_changed_since_the_process_began_is_not_run(tiny, tmp_path, monkeypatch):
    """In a notebook whose kernel has imported a module that an editor has saved since."""
    module = next(file for file in keys._BEGUN if file.name == "random.py")
    monkeypatch.setitem(keys._BEGUN, module, keys._BEGUN[module] + "\nMORE = 1\n")
    with pytest.raises(RuntimeError, match="pruning/random.py has changed since this process began.*restart"):
        run(tiny, tmp_path / "rows.parquet", [Cell("random", 0.5)])
    assert len(run(tiny, tmp_path / "rows.parquet", [Cell("cls_similarity", 0.5)])) == 15


def test_failed_rows_are_tried_anew(whole, tiny, tmp_path, monkeypatch):
    """One passing input error: the next run answers what has failed, and nothing else."""
    out, grid = tmp_path / "rows.parquet", GRID[:6]
    assert (run(tiny, out, grid, Noise(broken=(1,)), max_failed=0.5)["error"] != "").sum() == 18
    assert results.provenance(out)["failed"] == 18
    written, write_rows = [], results.write_rows
    monkeypatch.setattr(results, "write_rows", lambda path, *rest: (written.append(path), write_rows(path, *rest)))
    mended = run(tiny, out, grid)
    pd.testing.assert_frame_equal(mended, whole[0].head(len(mended)))
    assert len(written) == 6  # those of the chunk with the broken image
    with pytest.raises(RuntimeError, match="18 of 90 rows have failed"):
        run(tiny, tmp_path / "bad.parquet", grid, Noise(broken=(1,)), max_failed=0)
    pd.testing.assert_frame_equal(run(tiny, tmp_path / "bad.parquet", grid, max_failed=0), mended)


def test_large_runs_have_coarser_parts(tiny, tmp_path, monkeypatch):
    """Chunks form blocks, which moves no row."""
    assert [len(evaluation._blocks(range(25 * n), 25)) for n in (1, 64, 65, 640, 6400)] == [1, 64, 33, 80, 800]
    whole = run(tiny, tmp_path / "a.parquet", GRID[:2], chunk=1)
    monkeypatch.setattr(
        evaluation, "_blocks", lambda ids, chunk: [[ids[i : i + 1] for i in range(5)][:3], [ids[3:4], ids[4:]]]
    )
    pd.testing.assert_frame_equal(run(tiny, tmp_path / "b.parquet", GRID[:2], chunk=1), whole)


def test_unreadable_images_stay_in_the_rows(whole, tiny, tmp_path, capsys):
    grid = GRID[:6]
    rows = run(tiny, tmp_path / "rows", grid, Noise(broken=(1, 4)), max_failed=0.5)
    assert "failed: 36 rows: UnidentifiedImageError: torn" in capsys.readouterr().out
    bad = rows["image_id"].isin([1, 4])
    assert (rows[bad]["raw"] == "").all() and (rows[bad]["error"] == "UnidentifiedImageError: torn").all()
    assert rows[bad]["tokens"].isna().all() and (rows[~bad]["error"] == "").all()
    assert len(rows) == 15 * len(grid) and score(rows)["invalid"][bad].all()
    expected = whole[0].head(len(rows))
    assert (rows["raw"] == expected["raw"])[~bad].all()


def test_an_image_of_another_size_is_an_error(tiny, tmp_path):
    class Wrong(Noise):
        def image(self, image_id):
            return super().image(image_id).resize((80, 60))

    rows = run(tiny, tmp_path / "rows", GRID[:1], Wrong(images=1), max_failed=1)
    assert rows["error"].iloc[0] == "ValueError: image is 80 x 60, its rows say 40 x 30"


def test_cells():
    assert cells(keep=[0.25, 0.5], ids=["compact", "original"]) == [Cell(ids="compact"), Cell(ids="original")]
    assert cells("random", 1, "raster", "original@after", [0, 1]) == [
        Cell("random", 1.0, "raster", "original@after", seed) for seed in (0, 1)
    ]
    assert len(GRID) == (1 + 2 * 2) * 4
    every = cells(["none", "all"], 0.25)
    assert [cell.pruner for cell in every] == ["none", *all_pruners()] and {cell.keep for cell in every[1:]} == {0.25}
    assert cells("all", 0.25) == every[1:] and "none" not in all_pruners()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(pruner="randon"), "did you mean 'random'"),
        (dict(order="sorted"), "unknown order"),
        (dict(ids="compressed"), "'compressed' needs"),
        (dict(pruner="random", keep=0), "keep ratio"),
        (dict(pruner="random", keep="a quarter"), "keep ratio"),
        (dict(pruner="random", keep=True), "keep ratio"),
        (dict(seeds=True), "a seed must be"),
        (dict(seeds=-1), "a seed must be"),
        (dict(pruner="trim:anchor=last,anchor=first", keep=0.5), "option 'anchor' .* twice"),
        (dict(seeds=0.5), "a seed must be"),
        (dict(ids=[]), "ids is an empty list"),
    ],
)
def test_bad_cells(wrong, message):
    with pytest.raises(ValueError, match=message):
        cells(**wrong)


def test_bad_runs_stop_before_any_work(tiny, tmp_path):
    class Untouched(Noise):
        def image(self, image_id):
            raise AssertionError("work has begun")

    class Twice(Untouched):
        @property
        def rows(self):
            return pd.concat([super().rows] * 2, ignore_index=True)

    class Outside(Untouched):
        @property
        def rows(self):
            return super().rows.assign(x2=41)

    for grid, data, options, message in [
        ([], Untouched(), {}, "no cells"),
        (GRID, Untouched(images=0), {}, "no expressions"),
        ([Cell("spatial")], Untouched(), {}, "pruner 'spatial' cannot run on random-llava with keep None"),
        (
            [Cell(ids="shuffled_rows")],
            Untouched(),
            {},
            "IDs 'shuffled_rows' cannot be given on random-llava: only IDs in",
        ),
        (GRID, Twice(), {}, "repeats 15 expressions"),
        (GRID, Outside(), {}, "outside their image"),
        (GRID, Untouched(), {"batch_size": 0}, "batch_size must be >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tiny, tmp_path / "rows", grid, data, **options)
    assert not list(tmp_path.iterdir())


def test_the_ids_of_generated_tokens_reach_the_model(tiny, tmp_path):
    """The first token is the prefill's; the others depend on where they stand, unless nothing was pruned."""
    ids = ["original", "original+cache", "original+original"]
    rows = run(tiny, tmp_path / "pruned.parquet", cells("random", 0.25, ids=ids))
    said = {name: table["raw"].tolist() for name, table in rows.groupby("ids")}
    assert said["original"] == said["original+original"] != said["original+cache"]
    whole = run(tiny, tmp_path / "whole.parquet", cells("none", ids=ids))
    assert whole.groupby("ids")["raw"].apply(tuple).nunique() == 1
    assert len(set(said["original"])) > 3


def test_each_image_draws_its_own_seed(tiny, tmp_path, monkeypatch):
    pruned, ordered = [], []
    prune, reorder = random.prune, evaluation.reorder
    monkeypatch.setattr(random, "prune", lambda v, k, *, seeds: (pruned.extend(seeds), prune(v, k, seeds=seeds))[1])
    monkeypatch.setattr(evaluation, "reorder", lambda s, spec, seed: (ordered.append(seed), reorder(s, spec, seed))[1])
    run(tiny, tmp_path / "rows", [Cell("random", 0.5, "shuffled", "original", 7)])
    assert pruned[1:] == ordered == [image_seed(7, i) for i in range(5)]  # the first is the trial on a blank image


def test_seeds_differ_between_images_and_cells():
    assert len({image_seed(s, i) for s in range(20) for i in range(20)}) == 400
    assert image_seed(0, 1) == 2942165697  # the same on every machine


BY_TEXT = cells(["text_similarity", "trim", "prumerge"], [None, 0.5], ids="original")[
    1:
]  # text similarity needs a keep


def test_methods_that_read_the_expression_select_for_each(tiny, tmp_path):
    """The same rows in any batches and alone; selections of one image differ between its expressions."""
    assert [needs_text(tiny, pruner(c.pruner), c.keep) for c in BY_TEXT] == [True, True, True, False, False]
    rows = run(tiny, tmp_path / "a", BY_TEXT, batch_size=32)
    pd.testing.assert_frame_equal(rows, run(tiny, tmp_path / "b", BY_TEXT, batch_size=1, chunk=5))
    adaptive = rows[(rows["pruner"] == "prumerge") & rows["keep"].isna()]
    assert adaptive.groupby("image_id")["tokens"].nunique().max() == 1 and adaptive["tokens"].max() <= 16
    data = Noise(images=1)
    visual = tiny.encode([data.image(0)])
    cell = Cell("text_similarity", 0.5)
    for anew, groups in ((True, [0, 1, 2]), (False, [0, 0, 0])):
        how = SimpleNamespace(model=tiny, by_text={("text_similarity", 0.5): anew}, state=evaluation.RunState(2, 1))
        if not anew:
            visual = visual.take(torch.tensor([0]), **tiny.texts(["cat"]))
        chosen = evaluation._choose(how, [([0], visual)], data.rows, cell)
        assert chosen.of_row == dict(zip(data.rows.index, groups)) and set(chosen.image_ids) == {0}
        assert len({str(one.origin.tolist()) for one, _ in chosen.made}) == len(chosen.made) == len(set(groups))


def test_a_model_without_its_clip_says_how_to_get_it(tiny, tmp_path):
    def absent():
        raise FileNotFoundError("fetch it with: hf download openai/clip")

    with pytest.raises(ValueError, match="'trim' cannot run on random-llava .* hf download openai/clip"):
        run(replace(tiny, clip=absent), tmp_path / "rows", [Cell("trim", 0.5)])


@dataclass(frozen=True)
class Asked(Noise):
    """Questions whose answer is a word: no box."""

    @property
    def rows(self):
        rows = super().rows.drop(columns=["x1", "y1", "x2", "y2"])
        return rows.assign(task="colour", answer="red")


def test_questions_are_asked_as_they_are_and_scored_by_the_word(tiny, tmp_path, monkeypatch):
    asked = []
    ask = models.Model.ask
    monkeypatch.setattr(models.Model, "ask", lambda self, question: (asked.append(question), ask(self, question))[1])
    rows = run(tiny, tmp_path / "rows", [Cell()], Asked())
    assert set(asked) == set(Asked().rows["expression"])
    assert "x1" not in rows and set(rows["answer"]) == {"red"}
    scored = score_words(rows.assign(raw=[" Red "] * 5 + ["", "reddish"] + ["blue"] * 8))
    assert scored["correct"].sum() == 5 and scored["invalid"].sum() == 1


@dataclass(frozen=True)
class Boxed(Noise):
    """Every expression has a box of its own, and that of another object. only: which rows, all by default."""

    only: tuple = ()

    @property
    def rows(self):
        rows = super().rows
        x, y = 3.0 * (np.arange(len(rows)) % 5), 2.0 * (np.arange(len(rows)) % 4)
        rows = rows.assign(x1=x, x2=x + 9, y1=y, y2=y + 11, ox1=25 - x, ox2=37 - x, oy1=18 - y, oy2=30 - y)
        return rows.iloc[list(self.only or range(len(rows)))]


TOLD = [
    *cells(["oracle", "anti_oracle"], 0.25, ids="original"),
    *cells("random", 0.5, ids=["compact#target", "original"]),
    *cells("none", ids=["exchanged", "flipped_rows#background", "original"]),
]


def test_what_reads_the_ground_truth_differs_between_expressions(tiny, tmp_path, monkeypatch):
    """The truth that IDs get is each expression's own box in the padded square; rows do not depend on batches."""
    given = []
    plain = evaluation.stages.assign
    monkeypatch.setattr(evaluation.stages, "assign", lambda *all: (given.append(all[-1]), plain(*all))[1])
    rows = run(tiny, tmp_path / "a", TOLD, Boxed())
    pd.testing.assert_frame_equal(rows, run(tiny, tmp_path / "b", TOLD, Boxed(), batch_size=1, chunk=5))
    pd.testing.assert_frame_equal(
        rows[rows["ids"] == "exchanged"].reset_index(drop=True),
        run(tiny, tmp_path / "c", cells(ids="exchanged"), Boxed()),
    )
    for which in (1, 11):  # each row has its own truth: alone it is answered alike
        alone = run(tiny, tmp_path / f"{which}", TOLD, Boxed(only=(which,)))
        same = rows[rows["sent_id"] == alone["sent_id"].iloc[0]]
        assert len(alone) == len(TOLD) and alone["raw"].tolist() == same["raw"].tolist()
    wanted = set()
    for _, row in Boxed().rows.iterrows():
        down = (40 - row["height"]) // 2
        corners = [(row[f"{who}x{i}"], row[f"{who}y{i}"] + down) for who in ("", "o") for i in (1, 2)]
        wanted.add(tuple(round(place / 40, 9) for corner in corners for place in corner))
    told = {tuple(round(place, 9) for box in one for place in box) for one in given if one is not None}
    assert told == wanted and {"ox1", "oy2"} < set(rows)
    said = rows.set_index(["pruner", "ids", "sent_id"])["raw"].unstack("sent_id")
    assert not said.duplicated().any()


@pytest.mark.parametrize(
    ("data", "cell", "message"),
    [
        (Noise(), Cell(ids="exchanged"), "IDs 'exchanged' cannot be given on random-llava: .*of another object"),
        (Asked(), Cell(ids="compact#target"), "cannot be given on random-llava: .*needs the target's box"),
        (Asked(), Cell("oracle", 0.5), "pruner 'oracle' cannot run .*no signal 'target'.* ground truth comes with"),
    ],
)
def test_data_without_the_truth_are_refused_before_work(data, cell, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tiny, tmp_path / "rows", [cell], data)
