"""What moves a row is in its key, and what does not is not."""

import json
import shutil
import subprocess

import pytest

from analysis import keys, models, results
from tests.support.rows import GRID, run

SOURCE = (
    '"""A module."""\nimport math  # a reason\n\n\ndef area(r):\n    """Of a circle."""\n    return math.pi * r**2\n'
)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("  # a reason", "  # another reason", True),
        ('"""Of a circle."""\n', '"""Of a circle,\n\n    in words.\n    """\n', True),
        ('    """Of a circle."""\n', "", True),
        ("math.pi * r**2", "(math.pi\n            * r ** 2)", True),
        ("r**2", "r**3", False),
        ("def area", "def volume", False),
        ("(r)", "(r=1)", False),
        ("math.pi", "'''math.pi'''", False),
    ],
)
def test_a_digest_of_source_changes_with_what_it_says(old, new, same):
    assert (keys.normalised(SOURCE.replace(old, new)) == keys.normalised(SOURCE)) is same


def test_a_package_counts_with_its_functions_and_not_with_its_registry():
    package = "from a import b, c\nREGISTRY = {'b': b.prune}\n\n\ndef find(name):\n    return REGISTRY[name]\n"
    more = package.replace("c\n", "c, d\n").replace("b.prune}", "b.prune, 'd': d.prune}")
    assert keys.normalised(package, definitions=True) == keys.normalised(more, definitions=True)
    assert keys.normalised(package) != keys.normalised(more)


def test_code_is_a_module_and_all_that_it_imports_and_nothing_else():
    engine = keys.code(keys.ENGINE)
    assert {"analysis.engine.decode", "analysis.positions", "analysis.types", "analysis.rec.boxes"} <= set(engine)
    assert not {name for name in engine if "pruning." in name and "trim" in name} and not keys.AFTERWARDS & set(engine)
    assert "analysis.pruning.trim" in keys.pruner("trim:anchor=last")
    assert "analysis.pruning.trim" not in keys.pruner("fastervlm")
    assert keys.pruner("prumerge+") == keys.pruner("prumerge")


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """The random model and its CLIP, free to be edited."""
    shutil.copytree(tiny_folder.parent, tmp_path / "models")
    return tmp_path / "models" / tiny_folder.name


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text() if file.is_file() else "{}") | values))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            lambda home: edit(home / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]),
            "adapter of mean; files of pre",
        ),
        (lambda home: edit(home / "config.json", vision_feature_layer=-1), "adapter of layer.*; files of config.json"),
        (lambda home: edit(home / "tokenizer_config.json", model_max_length=77), "files of tokenizer_config.json"),
        (lambda home: edit(home.parent / "random-clip/config.json", logit_scale_init_value=1.0), "clip of config.json"),
        (lambda home: (home / "README.md").write_text("a card"), None),
        (lambda home: edit(home.parent / "random-clip/log.csv", step=1), None),
    ],
)
def test_a_changed_file_of_a_model_is_never_answered_with_old_rows(what, said, copied, tmp_path):
    """On the same `out`: all that is read when a model is loaded counts, its cards and logs do not."""
    grid, out = [*GRID[:1], *[c for c in models_cells() if c.keep == 0.5]], tmp_path / "rows.parquet"
    first = run(models.load(copied, device="cpu"), out, grid)
    what(copied)
    if said is None:
        assert run(models.load(copied, device="cpu"), out, grid).equals(first)
    else:
        with pytest.raises(ValueError, match=f"rows of another key.*{said}"):
            run(models.load(copied, device="cpu"), out, grid)


def models_cells():
    from analysis.engine.evaluate import cells

    return cells("text_similarity", 0.5)  # the one that reads the CLIP


def test_a_clip_counts_only_where_it_is_read(copied, tmp_path):
    out = tmp_path / "rows.parquet"
    first = run(models.load(copied, device="cpu"), out, GRID[:2])
    edit(copied.parent / "random-clip/config.json", logit_scale_init_value=1.0)
    assert run(models.load(copied, device="cpu"), out, GRID[:2]).equals(first)


def test_provenance_names_commit_dirt_and_digests(tiny, tmp_path):
    run(tiny, tmp_path / "rows.parquet", GRID[:1])
    made = results.provenance(tmp_path / "rows.parquet")
    assert {"commit", "dirty", "code", "files", "adapter", "pictures", "data", "pruners", "torch", "failed"} <= set(
        made
    )
    assert (
        made["adapter"]["frame"] == "padded"
        and made["code"]["analysis.positions"] == keys.code("analysis.positions")["analysis.positions"]
    )
    assert keys.outdated(made) == []
    made["code"]["analysis.positions"] = "0"
    assert keys.outdated(made) == ["code of analysis.positions"]
    assert keys.outdated({"commit": "abc"}) == ["code that is not recorded"]


def test_a_blob_of_the_hugging_face_cache_is_named_by_its_content(tmp_path):
    """Its weights are not read for their digest; a file that somebody has edited in place is."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    (blobs / ("1" * 64)).write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(blobs / ("1" * 64))
    (blobs / ("2" * 40)).write_text("{}")
    (snapshot / "config.json").symlink_to(blobs / ("2" * 40))
    before = keys.folder(snapshot)
    assert before["model.safetensors"] == "1" * 16
    (blobs / ("2" * 40)).write_text('{"frame": "resized"}')
    assert {name for name, digest in keys.folder(snapshot).items() if before[name] != digest} == {"config.json"}


def test_the_environment_says_what_is_not_committed():
    if subprocess.run(["git", "rev-parse"], cwd=keys.HOME, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    assert len(keys.environment()["commit"]) == 40 and isinstance(keys.environment()["dirty"], bool)
