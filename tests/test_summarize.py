"""The summarizer's training, its checkpoints, and what is decoded and reported from them."""

import io
import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import __main__ as cli
from analysis import results
from analysis.summarization import news, report, systems, train
from analysis.summarization.data import Document, collate
from analysis.summarization.model import Unified, keep_sentences
from tests.support.notebooks import FIGURE, TABLE, draw, run

CONFIG = train.CONFIGS["smoke"]


@pytest.fixture(scope="module")
def known():
    return train.corpus(CONFIG)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of three seeds, a few steps each, and the folder of their runs."""
    runs = tmp_path_factory.mktemp("runs")
    train.train("smoke", (0, 1, 2), out=runs / "checkpoints", runs=runs, device="cpu")
    return runs


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage", ["extractor", "pointer-generator", "end-to-end-5-inc"])
def test_a_stage_that_was_killed_ends_with_the_same_weights(stage, known, trained, tmp_path, monkeypatch):
    config = replace(CONFIG, steps=(4, 4, 4))
    for name in train.STAGES[:2]:
        train.train_stage(name, CONFIG, known, 0, tmp_path / "whole")
        train.train_stage(name, CONFIG, known, 0, tmp_path / "killed")
    for folder in ("whole", "killed"):
        if stage == "extractor":
            (tmp_path / folder / stage / "state.pt").unlink()
    whole = train.train_stage(stage, config, known, 0, tmp_path / "whole")
    calls, losses_of = [], train.stage_losses

    def dies(*args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) > 3:  # in the fourth step, after the state of the second was kept
            raise Killed
        return losses_of(*args)

    monkeypatch.setattr(train, "stage_losses", dies)
    with pytest.raises(Killed):
        train.train_stage(stage, config, known, 0, tmp_path / "killed")
    assert torch.load(tmp_path / "killed" / stage / "state.pt")["state"]["step"] == 2
    monkeypatch.setattr(train, "stage_losses", losses_of)
    resumed = train.train_stage(stage, config, known, 0, tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    one, two = (
        pd.read_csv(tmp_path / folder / stage / "log.csv").drop(columns="seconds") for folder in ("whole", "killed")
    )
    pd.testing.assert_frame_equal(one, two)
    with pytest.raises(ValueError, match="of another configuration"):
        train.train_stage(stage, replace(config, rates=(1, 1, 1)), known, 0, tmp_path / "killed")


def test_an_arm_needs_the_stages_before_it(known, tmp_path):
    with pytest.raises(FileNotFoundError, match="train the stage extractor of this seed first"):
        train.train_stage("end-to-end-1", CONFIG, known, 0, tmp_path)
    with pytest.raises(ValueError, match="unknown stage 'end-to-end-2'"):
        train.train_stage("end-to-end-2", CONFIG, known, 0, tmp_path)


def test_every_document_once_an_epoch_and_the_same_after_a_resumption(known):
    documents = known.train
    stream = train.groups(documents, 5, 3, 0)
    first = [next(stream) for _ in range(12)]
    for epoch in (first[:5], first[5:10]):  # 24 documents in batches of 5
        assert sorted(d.id for group in epoch for d in group) == sorted(d.id for d in documents)
    assert first[:5] != first[5:10]
    for step in (3, 5, 11):
        assert next(train.groups(documents, 5, 3, step)) == first[step]
    assert next(train.groups(documents, 5, 4, 0)) != first[0]


def test_gold_documents_are_what_a_perfect_extractor_leaves(known):
    documents, vocabulary = known.train[:4], known.vocabulary
    whole = collate(documents, vocabulary)
    one = keep_sentences(whole, whole.labels.bool(), len(vocabulary))
    two = collate([train.gold(d) for d in documents], vocabulary)
    assert torch.equal(one.words, two.words)
    assert torch.equal(one.target == 1, two.target == 1)  # what cannot be copied any more is UNK


def test_lengths_grow():
    paper = train.CONFIGS["paper"]
    at = [train.limits("abstracter", paper, step) for step in (0, 19_999, 20_000, 80_000)]
    assert [(a["max_words"], a["max_target"]) for a in at] == [(50, 15), (50, 15), (100, 30), (600, 100)]
    assert train.limits("end-to-end-1", paper, 0)["max_target"] == 100
    assert train.limits("pointer-generator", paper, 0) == dict(max_words=600, max_sentences=50, max_target=15)
    known = train.Corpus([Document([["a"]], [["a"]], [1])] * 2, [Document([["a"]], [["a"]], [1])], None)
    tasks = {stage: train.task(stage, paper, known) for stage in train.STAGES}
    assert tasks["pointer-generator"].steps == tasks["abstracter"].steps + tasks["end-to-end-5"].steps
    assert tasks["pointer-generator"].coverage == tasks["abstracter"].coverage == 80_000
    assert {tasks[stage].coverage for stage in train.ARMS} == {0}


def test_the_paper_s_schedule_runs(known, tmp_path):
    """Adagrad at a constant rate, growing lengths, no frozen tables; only sizes and numbers of steps are small."""
    config = replace(
        train.CONFIGS["paper"],
        sizes=CONFIG.sizes,
        batches=(4, 4, 2),
        steps=(2, 5, 2),
        log=1,
        evaluations=1,
        grow=((2, 50, 15), (4, 400, 100)),
        coverage=1,
    )
    short = known._replace(train=known.train[:8], validation=known.validation[:2])
    for stage in ("extractor", "abstracter", "end-to-end-5-inc"):
        train.train_stage(stage, config, short, 0, tmp_path)
    log = pd.read_csv(tmp_path / "abstracter" / "log.csv")
    assert list(log["coverage"].isna()) == [True] * 4 + [False]
    before, after = (train.finished(stage, tmp_path) for stage in ("abstracter", "end-to-end-5-inc"))
    assert not torch.equal(before["embed.weight"], after["abstracter.embed.weight"])
    saved = torch.load(tmp_path / "abstracter" / "state.pt")["optimizer"]["param_groups"][0]
    assert saved["lr"] == 0.15 and saved["initial_accumulator_value"] == 0.1


def test_training_on_files(tmp_path):
    """Fewer words than the configuration has: the model's vocabulary ends where the words' does."""
    for name, split, count in (("train", "train", 5), ("val", "validation", 3)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(
                json.dumps(dict(article_sents=d.article[:1], abstract_sents=d.abstract[:1])) + "\n"
                for d in news.documents(split, count)
            )
        )
    given = dict(data=str(tmp_path / "train.jsonl"), runs=tmp_path, out=tmp_path / "out", device="cpu")
    with pytest.raises(ValueError, match="give --validation"):
        train.train("smoke", (0,), **given)
    train.train("smoke", (0,), **given, validation=str(tmp_path / "val.jsonl"))
    words = len((tmp_path / "out" / "vocabulary.txt").read_text().splitlines())
    assert words == json.loads((tmp_path / "out" / "config.json").read_text())["sizes"]["vocabulary"] < 200
    systems.rows(systems.load("end-to-end-5", 0, tmp_path / "out"), news.documents("test", 2), beam=2, longest=20)
    with (
        results.locked(tmp_path / "smoke" / "seed0" / "extractor"),
        pytest.raises(RuntimeError, match="another process"),
    ):
        train.train("smoke", (0,), **given, validation=str(tmp_path / "val.jsonl"))


@pytest.mark.parametrize("stage", train.STAGES)
def test_half_precision_trains_about_the_same(stage, known):
    torch.manual_seed(0)
    model, batch = Unified(CONFIG.sizes), collate(known.train[:4], known.vocabulary)
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1 * weight.requires_grad)
    exact = train.stage_losses(stage, model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = train.stage_losses(stage, model, batch)
    half["total"].backward()
    for name, loss in exact.items():
        assert half[name].dtype == torch.float32 and half[name].item() == pytest.approx(loss.item(), rel=0.05), name


def test_an_estimate_of_every_stage():
    found = train.estimate("smoke", "cpu")
    assert list(found["stage"]) == list(train.STAGES) and (found[["step_s", "hours", "gpu_hours"]] > 0).all(axis=None)


def test_selected_share():
    betas, labels = [np.array([0.9, 0.8, 0.1]), np.array([0.7, 0.6])], [[1, 0, 0], [0, 1]]
    assert train.selected_share(betas, labels, 0.5) == 1 / 5
    assert train.selected_share(betas, labels, 0.9) == 4 / 5  # all of the labelled: as far down as 0.6
    with pytest.raises(ValueError, match="one beta per label"):
        train.selected_share(betas, [[1, 0, 0]])


def test_the_validation_rule_keeps_the_best_extractor(known, tmp_path, monkeypatch):
    shares, seen = iter([0.5, 0.2, 0.4, 0.3]), []

    def validate(stage, model, *_):
        seen.append({k: v.clone() for k, v in model.extractor.state_dict().items()})
        return dict(selected_share=next(shares))

    monkeypatch.setattr(train, "validate", validate)
    kept = train.train_stage("extractor", replace(CONFIG, evaluations=4), known, 0, tmp_path)
    assert len(seen) == 4 and all(torch.equal(kept[k], seen[1][k]) for k in kept)


def test_the_frozen_tables_stay_and_the_rest_learns(known, trained):
    before = {part: train.finished(part, trained / "smoke" / "seed0") for part in train.STAGES[:2]}
    after = train.finished("end-to-end-1-inc", trained / "smoke" / "seed0")
    for part, weights in before.items():
        for name, weight in weights.items():
            moved = not torch.equal(weight, after[f"{part}.{name}"])
            assert moved != (name.startswith(train.TABLES) or ("bias_hh" in name and part == "abstracter")), name


def test_a_checkpoint_is_the_trained_model_in_half_precision(trained, known):
    folder = trained / "checkpoints"
    expected = {f"{name}-seed{seed}.safetensors" for name in systems.SYSTEMS for seed in (0, 1, 2)}
    assert expected < set(os.listdir(folder))
    log = pd.read_csv(folder / "log.csv")
    assert set(log["stage"]) == set(train.STAGES) and set(log["seed"]) == {0, 1, 2}
    system = systems.load("end-to-end-5-inc", 1, folder)
    model = Unified(CONFIG.sizes)
    model.load_state_dict(train.finished("end-to-end-5-inc", trained / "smoke" / "seed1"))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.half().float(), system.model.state_dict()[name]), name
    assert system.vocabulary == known.vocabulary and system.limits["max_words"] == CONFIG.words
    two = systems.load("two-stage", 1, folder).model.state_dict()
    plain = systems.load("pointer-generator", 1, folder).model.state_dict()
    assert all(torch.equal(two[k], plain[k]) for k in two if k.startswith("extractor."))
    revisions = {systems.revision(name, seed, folder) for name in systems.SYSTEMS for seed in (0, 1)}
    assert len(revisions) == 2 * len(systems.SYSTEMS)
    with pytest.raises(FileNotFoundError, match="--seeds 7"):
        systems.load("two-stage", 7, folder)
    with pytest.raises(ValueError, match="did you mean 'two-stage'"):
        systems.load("twostage", 0, folder)


def test_decoded_rows(trained):
    folder, documents = trained / "checkpoints", news.documents("test", 3)
    for name in systems.SYSTEMS:
        system = systems.load(name, 0, folder)
        rows = systems.rows(system, documents, attention=2, size=2, beam=2, shortest=3, longest=6)
        assert list(rows["document"]) == [d.id for d in documents]
        assert rows["steps"].le(6).all() and rows["summary"].str.split().str.len().between(3, 6).all()
        for document, row in zip(documents, rows.itertuples()):
            assert len(row.beta) == len(document.article) and ((row.beta >= 0) & (row.beta <= 1)).all()
            assert row.extracted == [i for i, b in enumerate(row.beta) if b > 0.5] or len(row.extracted) == 1
            reads = row.extracted if name == "two-stage" else range(len(document.article))
            read = sum(len(document.article[i]) for i in reads)
            assert row.alpha is None or len(row.alpha) == len(row.alphahat) == read
            assert 0 <= row.r_inc <= 1 and 0 <= row.chance < 1
        assert [a is None for a in rows["alpha"]] == [False, False, True]
        alone = systems.rows(system, documents[2:], size=1, beam=2, shortest=3, longest=6)
        assert alone["summary"][0] == rows["summary"][2]  # neither the batch nor the order matters


def test_what_a_comparison_claims():
    rng = np.random.default_rng(0)

    def rows(model, values, seeds=(0, 1, 2)):
        return pd.concat(
            [
                pd.DataFrame(dict(model=model, seed=seed, document=range(60), value=values[i]))
                for i, seed in enumerate(seeds)
            ]
        )

    base = rng.random((3, 60))
    table = pd.concat(
        [
            rows("a", base),
            rows("b", base + 0.1 + 0.01 * rng.random((3, 60))),
            rows("c", base + np.array([[0.1], [0.1], [-0.1]])),
            rows("d", base[:1], [-1]),
        ]
    )
    found = report.compared(table, {"model": "a"}, {"model": "b"})
    assert found["holds"] and 0.1 < found["low"] < found["difference"] < found["high"] < 0.11 and found["n"] == 60
    assert report.gain(found).endswith("*") and report.gain(found).startswith("+10.")
    assert not report.compared(table, {"model": "a"}, {"model": "c"})["holds"]  # one seed says otherwise
    assert not report.compared(table[table["seed"] < 2], {"model": "a"}, {"model": "b"})["holds"]  # two seeds only
    assert report.compared(table, {"model": "d"}, {"model": "b"})["seeds"] == 3  # without seeds: against each
    mean = report.over_seeds(table, ["model"]).set_index("model").loc["b"]
    means = [part["value"].mean() for _, part in table[table["model"] == "b"].groupby("seed")]
    assert [mean["lowest"], mean["highest"], mean["seeds"], mean["n"]] == pytest.approx([min(means), max(means), 3, 60])
    far = max(np.mean(means) - min(means), max(means) - np.mean(means))
    assert report.spread(mean) == f"{100 * np.mean(means):.1f} ±{100 * far:.1f}"
    assert report.spread({**mean, "seeds": 1}) == f"{100 * np.mean(means):.1f}"
    with pytest.raises(ValueError, match="no document of a seed"):
        report.compared(table, {"model": "a"}, {"model": "e"})


def test_the_change_of_a_ratio():
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.4, 0.6, 100)
    rows = pd.concat(
        [
            pd.DataFrame(dict(model=model, seed=seed, document=range(100), chance=chance, r_inc=chance * share))
            for model, share in (("a", 0.5), ("b", 0.2))
            for seed in range(3)
        ]
    )
    found = report.ratio_change(rows, "a", "b")
    assert [found[k] for k in ("difference", "low", "high")] == pytest.approx([-0.3] * 3) and found["holds"]
    rows.loc[(rows["model"] == "b") & (rows["seed"] == 1), "r_inc"] = rng.uniform(0, 0.5, 100)
    found = report.ratio_change(rows, "a", "b")
    assert not found["holds"] and found["low"] < found["difference"] < found["high"] and found["n"] == 100
    with pytest.raises(ValueError, match="same documents"):
        report.ratio_change(rows, "a", "c")


def test_published_cells():
    assert report.published("lead-3", "R1 F1") == "40.34"
    assert report.published("two-stage", "R1 F1") == "39.97†"
    assert report.published("end to end with L_inc", "R_inc", 100, 1) == "4.2†"
    assert report.published("two-stage", "R_inc") == ""


def test_summarize_a_file(known, trained, tmp_path, capsys, monkeypatch):
    load = systems.load
    monkeypatch.setattr(systems, "load", lambda name, seed: load(name, seed, trained / "checkpoints"))
    words = [word for word in known.vocabulary.words if word.isalpha()]
    familiar = f"{' '.join(words[:12])}. {' '.join(words[12:24])}."
    strange = "A zyx carrying 30 wvuts qrashed near Zyxwvut. Nobody wazz hurt, pnolice maid.\nIt qained."
    file = tmp_path / "article.txt"
    for text, written in ((familiar, True), (strange, False)):
        file.write_text(text)
        assert cli.main(["summarize", str(file)]) == 0
        said = capsys.readouterr()
        assert "extracted sentences" in said.out and "(beta " in said.out
        assert ("R_inc" in said.out) == written and ("no abstract:" in said.out) != written
        assert "of the generated news" in said.err and "it can only copy" in said.err
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert cli.main(["summarize", "-"]) == 0 and capsys.readouterr().out == said.out
    assert cli.main(["summarize", str(file), "--system", "end-to-end-6"]) == 2
    assert "did you mean 'end-to-end-5'" in capsys.readouterr().err


def test_a_long_text_is_cut_between_characters(tmp_path):
    file = tmp_path / "article.txt"
    file.write_text(
        "a" + "\U0001d400 " * 90_000
    )  # five bytes for two characters: the first 400,000 bytes end inside one
    assert sum(map(len, systems.article(file).article)) > 30_000
    file.write_bytes(b"word " * 10 + b"\xe2\x82")  # a short one that ends inside a character is damaged
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        systems.article(file)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has no words"),
        (b" \n\n", "has no words"),
        (b"... !?\n--", "has no words"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is no UTF-8 text"),
        (b"text \x00 and more", "it has zero bytes"),
        (None, "is not there"),
    ],
)
def test_what_cannot_be_summarized(content, message, tmp_path, capsys):
    file = tmp_path / "article.txt"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["summarize", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["summarize", str(tmp_path)]) == 2 and "is a folder" in capsys.readouterr().err


def test_from_the_checkpoints_to_the_figures(trained, tmp_path):
    """Notebook 21 on three documents of one seed; tables of two seeds, figures of the first."""
    rows, checkpoints = [str(tmp_path / f"seed{seed}.parquet") for seed in (0, 1)], trained / "checkpoints"
    run(
        train.ROOT / "notebooks/21_decode_summaries.ipynb",
        tmp_path / "made.ipynb",
        {"checkpoints": str(checkpoints), "out": rows[0], "longest": 20, "smoke": True},
    )
    made = results.provenance(rows[0])
    assert made["weights"] == {name: systems.revision(name, 0, checkpoints) for name in systems.SYSTEMS}
    decoded = results.read_rows(rows[0])
    assert set(decoded["model"]) == set(systems.SYSTEMS) and decoded["document"].nunique() == 3
    results.write_rows(rows[1], decoded.assign(seed=1), made)
    for table in ("tab5_extractor_recall", "tab6_summarization_rouge", "tab7_inconsistency_rate"):
        draw(table, TABLE, {"rows": rows}, tmp_path)
    for figure in ("fig7_attention_consistency", "fig8_summaries_side_by_side"):
        draw(figure, FIGURE, {"rows": rows[0]}, tmp_path)


def test_the_training_notebook(tmp_path):
    given = {"out": str(tmp_path / "out"), "smoke": True}
    run(train.ROOT / "notebooks/20_train_summarizer.ipynb", tmp_path / "made.ipynb", given)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(systems.SYSTEMS)


def test_the_embedded_checkpoints_are_whole_and_small():
    files = sorted(systems.CHECKPOINTS.glob("*.safetensors"))
    assert len(files) == 3 * len(systems.SYSTEMS) and sum(file.stat().st_size for file in files) < 5e6
    assert len({systems.revision(name, seed) for name in systems.SYSTEMS for seed in (0, 1, 2)}) == len(files)
    config = json.loads((systems.CHECKPOINTS / "config.json").read_text())
    assert config["sizes"] == train.CONFIGS["small"].sizes.__dict__


def test_the_embedded_rows_are_of_the_embedded_checkpoints():
    folder = train.ROOT / "papermill_runs/21_decode_summaries"
    for seed in (0, 1, 2):
        made = results.provenance(folder / f"seed{seed}.parquet")
        assert made["weights"] == {name: systems.revision(name, seed) for name in systems.SYSTEMS}
