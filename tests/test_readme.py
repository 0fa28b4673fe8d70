"""What the README says works: its example pruner, and errors that lead to the right specification."""

import re
import sys

import pytest
import torch

from analysis import ROOT, pruning
from analysis.engine.evaluate import cells, evaluate
from analysis.pruning import PRUNERS, Method, pruner
from analysis.rec import datasets
from analysis.rec.datasets import RecDataset
from analysis.types import Signals, VisualTokens


@pytest.fixture
def feature_norm(monkeypatch, tmp_path):
    """The README's file and its line in the registry."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "score" in c)
    assert len(code.splitlines()) < 30
    (tmp_path / "feature_norm.py").write_text(code)
    monkeypatch.setattr(pruning, "__path__", [*pruning.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "analysis.pruning.feature_norm", raising=False)
    (line,) = re.findall(r'`("feature_norm": Method\(.*?\),)`', (ROOT / "README.md").read_text())
    for name, method in eval("{" + line + "}", {"Method": Method}).items():
        monkeypatch.setitem(PRUNERS, name, method)


def test_the_example_pruner_keeps_what_it_says(feature_norm):
    draw = torch.Generator().manual_seed(0)
    patches, features = torch.randn(3, 24, 7, generator=draw), torch.randn(3, 24, 5, generator=draw)
    tokens = VisualTokens(features, (6, 4), Signals(patches=lambda: patches))
    for spec, sign in (("feature_norm", -1), ("feature_norm:longest=false", 1)):
        for image, one in enumerate(pruner(spec)(tokens, 0.25, seeds=[0, 0, 0])):
            norms = [float(p.norm()) for p in patches[image]]
            assert one.origin.tolist() == sorted(sorted(range(24), key=lambda i: sign * norms[i])[:6])


def test_the_example_pruner_runs_through_the_grid(feature_norm, tiny, tmp_path):
    stamps = datasets.load("refstamps", "val", 2)
    data = RecDataset("refstamps", "val", stamps.rows.head(3), stamps.image)
    grid = cells(["feature_norm", "feature_norm:longest=false"], 0.25, ids=["compact", "original"])
    rows = evaluate(tiny, data, grid, tmp_path / "rows.parquet", progress=False)
    assert len(rows) == 12 and set(rows["tokens"]) == {4}
    assert rows.groupby("pruner")["raw"].apply(tuple).nunique() == 2


@pytest.mark.parametrize(
    "spec, message",
    [
        ("randon", "unknown pruner 'randon'; did you mean 'random'"),
        ("none:k=3", "takes no options"),
        ("trim:anker=last", "unknown option of pruner 'trim' 'anker'.*valid: about, anchor, lowest"),
        ("trim:last", "an option is written option=value, got 'last'"),
    ],
)
def test_a_wrong_specification_says_what_is_right(spec, message):
    with pytest.raises(ValueError, match=message):
        pruner(spec)


def test_a_link_opens_the_file_it_names():
    links = re.findall(r"\[`([^`]+)`\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 15
    for text, target in links:
        assert (ROOT / target).exists() and ("." not in text or text.rsplit("/", 1)[-1] == target.rsplit("/", 1)[-1])


def test_what_is_said_is_what_the_figures_say():
    """Each value with an interval, in the README's and the findings' own words, stands in a caption."""
    captions = " ".join(file.read_text() for file in (ROOT / "figures").glob("*.txt"))
    told = (ROOT / "README.md").read_text() + (ROOT / "docs/findings.md").read_text()
    said = re.findall(
        r"[+-]?[\d.]+ %? ?\[[-\d., ]+\]", re.sub(r"!\[.*?\]\(figures", "", told, flags=re.S).replace("\n", " ")
    )
    assert len(said) > 15
    assert [one for one in said if one not in captions] == []
