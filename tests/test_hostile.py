"""Hostile and broken inputs that must be refused: every gadget of a pickle, bombs, and all that fuzzing once found.

The search for more runs apart: `make fuzz`.
"""

import ast
import json
import time
from pathlib import Path

import pytest

from analysis.rec import refcoco
from tests import fuzz
from tests.fuzz import TARGETS

ROOT = Path(__file__).parents[1]


def test_every_gadget_is_refused_and_does_nothing(tmp_path):
    mark = tmp_path / "mark"
    hostile = fuzz.gadgets(mark)
    assert len(hostile) > 400 and len({name.split(",")[0] for name in hostile}) > 80
    for name, content in hostile.items():
        start = time.process_time()
        with pytest.raises(ValueError, match=r"refs\.p") as error:
            fuzz.pickled(content, tmp_path)
        assert type(error.value) is ValueError and not mark.exists(), name
        assert time.process_time() - start < 2, name
        if name.endswith(("GLOBAL", "INST", "OBJ", "NEWOBJ")):
            module, function = name.split(",")[0].split()
            assert f"it asks for {module}.{function}, but only plain" in str(error.value)


def test_a_gadget_is_seen_where_the_unpickler_is_the_usual_one(tmp_path, monkeypatch):
    """The watch is no decoration: with pickle's own look-up, a gadget is caught in the act."""
    monkeypatch.setattr(refcoco._Plain, "find_class", refcoco.pickle._Unpickler.find_class)
    with pytest.raises(AssertionError, match=r"pickle\.find_class.*posix.*system"):
        fuzz.pickled(fuzz.gadgets(tmp_path / "mark")["posix system, GLOBAL"], tmp_path)
    assert not (tmp_path / "mark").exists()


FOUND = [  # what fuzzing found: target, input, and what the refusal says
    ("orders and IDs", b"ids compact:1e999999999", "needs a factor"),
    ("orders and IDs", b"order shuffled:1e-999999999999", None),
    ("pruner names", b"trim:anchor=[", "cannot be read"),
    ("pruner names", b"trim:anchor=[1]", "unknown value of option anchor"),
    ("grid of cells", b'{"pruner": [3], "ids": [null]}', "named by a text"),
    ("grid of cells", b'{"ids": [null]}', "named by a text"),
    ("scoring of odd rows", json.dumps([fuzz.ROWS[0] | {"raw": 3}]).encode(), "ref_id 0; an empty answer is '', not 3"),
    ("scoring of odd rows", json.dumps([fuzz.ROWS[0] | {"dialect": "\ud800"}]).encode(), "unknown dialect"),
    ("scoring of odd rows", json.dumps([fuzz.ROWS[0] | {"x1": [1]}]).encode(), "x1, y1, x2, y2 must hold numbers"),
    ("scoring of odd rows", json.dumps([fuzz.ROWS[0] | {"dialect": []}]).encode(), "unknown dialect"),
    ("shards", b"9" * 5000 + b"/1", "a shard is given as number/count"),
    ("rows, provenance", b"[]", "has no provenance"),
    ("RefCOCO instances.json", b"\xff", "no COCO instances file"),
    ("model config.json", b'{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}', "cannot be loaded"),
]


@pytest.mark.parametrize("name, data, message", FOUND)
def test_what_fuzzing_found_is_refused(name, data, message, tmp_path):
    result = fuzz.attempt(TARGETS[name], data, tmp_path)
    assert result.outcome == ("refused" if message else "accepted"), result
    assert (message or "") in result.said


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size"])
def test_a_config_of_a_far_larger_model_takes_no_memory(part, key, tmp_path):
    config = json.loads((fuzz.model_folder() / "config.json").read_text())
    config[part][key] = 2**30
    result = fuzz.attempt(TARGETS["model config.json"], json.dumps(config).encode(), tmp_path)
    assert result.outcome == "refused" and ("files hold" in result.said or "files have" in result.said), result


def test_bombs_and_long_images_are_refused(tmp_path):
    for size in ((10_000, 10_000), (60_000, 60_000), (80_000_000, 1), (2**31 - 1, 1)):
        bomb = fuzz.sized(*size)
        result = fuzz.attempt(TARGETS["images in a folder"], bomb, tmp_path)
        assert result.outcome == "refused", result


# What may not be in the code.


def called(node):
    """torch.load of torch.load(...), as text."""
    return ast.unparse(node.func)


def unsafe(source):
    """Calls in Python code that could run what is in a file."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "_pickle", "dill", "joblib", "cloudpickle"):
            found.append(ast.unparse(node))
        if not isinstance(node, ast.Call):
            continue
        name, options = called(node), {word.arg: ast.unparse(word.value) for word in node.keywords}
        bad = {
            "torch.load": options.get("weights_only") != "True",
            "eval": True,
            "exec": True,
            "yaml.load": True,
            "yaml.unsafe_load": True,
            "pickle.load": True,
            "pickle.loads": True,
            "pickle.Unpickler": True,
            "pd.read_pickle": True,
            "joblib.load": True,
            "np.load": options.get("allow_pickle") == "True",
            **dict.fromkeys(
                ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained"),
                options.get("trust_remote_code") != "False",
            ),
            "build.from_pretrained": "True" not in (options.get("use_safetensors"), options.get("weights_only")),
        }
        if bad.get(name) or options.get("trust_remote_code", "False") != "False":
            found.append(ast.unparse(node))
    return found


def sources():
    for folder in ("analysis", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file, file.read_text(encoding="utf-8")
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        yield file, "\n".join(line for line in code.split("\n") if not line.lstrip().startswith(("%", "!")))


def test_nothing_unpickles_or_runs_what_is_in_a_file():
    assert {file.name: calls for file, source in sources() if (calls := unsafe(source))} == {}


def test_the_scan_sees_what_it_looks_for():
    for call in (
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.load(f)",
        "pickle.loads(b)",
        "eval('1')",
        "from pickle import loads",
        "yaml.load(f)",
        "np.load(f, allow_pickle=True)",
        "pd.read_pickle(f)",
        "AutoConfig.from_pretrained(f)",
        "AutoTokenizer.from_pretrained(f, trust_remote_code=True)",
        "build.from_pretrained(f)",
        "build.from_pretrained(f, use_safetensors=safe)",
    ):
        assert unsafe(call), call
    assert not unsafe("torch.load(f, weights_only=True); yaml.safe_load(f); np.load(f); json.load(f)")
