"""The plug-in for lmms-eval, without lmms-eval: a stand-in for its built-in models; the tasks' functions against
`analysis.rec`. `make lmms-test` runs the same against the real one."""

from dataclasses import dataclass
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image, ImageChops

from analysis import lmms, models
from analysis.engine.evaluate import image_seed
from analysis.hf import pruned
from analysis.rec import datasets, refcoco
from analysis.rec.scoring import perfect_answers, score
from analysis.stats import rate_interval
from tests.support import generate as small


@dataclass
class Request:
    arguments: tuple

    @property
    def args(self):
        return self.arguments


class BuiltIn:
    """As lmms-eval's chat models: in batches of three asked for their messages, then answered, errors logged."""

    def __init__(self, broken=False, blind=False):
        self.model, self.processor = small.build("llava"), None
        self.inputs, _ = small.batch("llava")
        self.broken, self.blind = broken, blind

    def generate_until(self, requests):
        answers = []
        for batch in (requests[:3], requests[3:]):
            for request in batch:
                _, messages, number = request.args
                messages(dict(image_id=f"image {number}"))
            answers += self.answered() if batch else []
        return answers

    def answered(self):
        inputs = self.inputs
        if self.blind:
            inputs = dict(input_ids=torch.ones(1, 4, dtype=torch.int64))
        if self.broken:
            inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
        try:
            return self.model.generate(**inputs, max_new_tokens=6).tolist()
        except Exception:
            return [""]


class Plugged(lmms._Pruning, BuiltIn):
    pass


REQUESTS = [Request(("where?", lambda document: [document], number)) for number in range(3)]


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(lmms, "_RUNNING", [])


def test_all_tokens_are_the_built_ins_answers_and_fewer_are_those_of_pruned(capsys):
    plain = BuiltIn().generate_until(REQUESTS)
    assert Plugged(keep=1).generate_until(REQUESTS) == plain
    given = BuiltIn()
    seeds = [image_seed(3, f"image {number}") for number in range(3)]
    with pruned(given.model, None, "random", 0.25, "original", seed=seeds):
        expected = given.generate_until(REQUESTS)
    plugged = Plugged(pruner="random", keep=0.25, seed=3)
    assert plugged.generate_until(REQUESTS * 2) == expected * 2 and expected != plain
    assert capsys.readouterr().err.endswith("6 prompts: 5.3 of 21.3 visual tokens kept on average\n")
    assert plugged.model.generate.__func__ is type(plugged.model).generate  # all is as it was
    assert Plugged(pruner="none").generate_until(REQUESTS) == plain


@pytest.mark.parametrize(
    "how, message",
    [(dict(blind=True), "no image was pruned in this call"), (dict(broken=True), "ValueError: the prompt has places")],
)
def test_what_lmms_eval_would_take_for_a_wrong_answer_stops_it(how, message):
    requests = REQUESTS[:1] if "blind" in how else REQUESTS
    with pytest.raises(SystemExit, match=message):
        Plugged(**how).generate_until(requests)


def test_a_wrong_argument_is_refused_before_the_model_is_loaded():
    for given, message in (
        (dict(pruner="fastervml"), "did you mean 'fastervlm'"),
        (dict(keep=25), "keep ratio must be in"),
        (dict(ids="gap"), "unknown IDs 'gap'"),
        (dict(keep="None"), "keep"),
    ):
        with pytest.raises(ValueError, match=message):
            Plugged(**given)
    with pytest.raises(AttributeError, match="no attribute 'gap_none'"):
        lmms.gap_none  # noqa: B018 (asking is the test)


QWEN = SimpleNamespace(
    image_processor=SimpleNamespace(patch_size=14, merge_size=2, size=dict(shortest_edge=200704, longest_edge=1605632))
)


def running(model_type):
    lmms._RUNNING[:] = [lmms.ASKED[model_type](SimpleNamespace(), QWEN)]


@pytest.mark.parametrize(
    "model_type, frame",
    [("llava", "padded"), ("llava_next", "padded"), ("qwen2_5_vl", "resized_pixels:28,200704,1605632")],
)
def test_the_tasks_score_is_ours_strictly_parsed(model_type, frame):
    running(model_type)
    rows = datasets.load("refstamps", "val", 3).rows.assign(width=300, height=200)
    rows = rows.assign(x2=rows["x2"] + 60)  # off square, where the frame shows
    right = perfect_answers(rows, frame, model_type.removesuffix("_next"))
    rows = right.assign(
        raw=[text if i % 3 else f"box {text.replace(', ', ' , ')}" for i, text in enumerate(right["raw"])]
    )
    rows.loc[rows.index[:2], "raw"] = ["", "there is none"]
    scored = score(rows, parsing="strict")
    items = [lmms.score(document, [document.pop("raw")]) for document in rows.to_dict("records")]
    for metric, column in dict(acc="correct", iou="iou", invalid="invalid").items():
        assert [item[metric]["score"] for item in items] == scored[column].astype(float).tolist()
        assert lmms.mean([item[metric] for item in items]) == pytest.approx(scored[column].mean())
    assert 0 < scored["correct"].mean() < 1 and scored["invalid"].sum() > 2
    interval = lmms.low([item["acc_low"] for item in items]), lmms.high([item["acc_high"] for item in items])
    assert interval == pytest.approx(rate_interval(scored["correct"], scored["image_id"]))
    assert not score(rows)["correct"].equals(scored["correct"])  # lenient parsing is another number


def test_a_model_is_asked_and_shown_as_in_the_engine():
    photo = Image.new("RGB", (320, 200), (1, 2, 3))
    running("llava")
    engine = models.load("tiny-llava", device="cpu")
    document = dict(expression="the red {cat}")
    shown = lmms._rec().shown(photo)
    assert lmms.question(document) in engine.prompt_text("the red {cat}") and shown.size == (320, 320)
    assert ImageChops.difference(shown, engine.squared(photo)).getbbox() is None
    running("qwen2_5_vl")
    assert lmms.question(document).startswith("Locate the red {cat} in this image") and "<|" not in lmms.question(
        document
    )
    assert lmms._rec().shown(photo).size == (588, 364)
    lmms._RUNNING.clear()
    with pytest.raises(ValueError, match="run this task with --model gap_llava_hf"):
        lmms.question(document)


def test_there_is_a_task_for_each_split_and_its_documents_are_the_rows(monkeypatch):
    named = {}

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: named.setdefault(node.value, node.value))
    shared = yaml.load((lmms.TASKS / "_rec_yaml").read_text(), Loader)
    for path in named:
        assert path.startswith("analysis.lmms.") and callable(getattr(lmms, path.removeprefix("analysis.lmms.")))
    assert {metric["metric"] for metric in shared["metric_list"]} == set(_metrics())
    tasks = [yaml.load(file.read_text(), Loader) for file in lmms.TASKS.glob("*.yaml")]
    files = shared["dataset_kwargs"]["data_files"]
    assert sorted(task["test_split"] for task in tasks) == sorted(files)
    assert all((lmms.TASKS / file).is_file() for file in files.values())
    loaded = []
    monkeypatch.setattr(lmms, "_data", lambda *which: loaded.append(which) or SimpleNamespace(rows=pd.DataFrame()))
    for split in files:
        rows = lmms.documents(SimpleNamespace(split=split, from_pandas=lambda rows, preserve_index: rows))
        assert list(rows.columns) == ["dataset", "split"]
    unc = {(name, split) for name, splits in refcoco.COUNTS.items() for split in splits}
    assert set(loaded) == {*unc, ("refstamps", "val")}


def _metrics():
    running("llava")
    (document,) = datasets.load("refstamps", "val", 1).rows.head(1).to_dict("records")
    return lmms.score(document, [""])
