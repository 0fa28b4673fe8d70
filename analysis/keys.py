"""What moves a row, in one place: evaluation, resuming, the Snakefile, `status` and `doctor` all ask here.

The key of a row holds everything that can move it: the files of the model and of its CLIP, the adapter's settings, the
data and its pictures, the cell, the code that answers and selects, and the versions of the libraries below. Of code
counts what it says, not how it is laid out: comments, docstrings and white space do not change a digest. A package's
`__init__.py` counts with its functions and classes only: what its registries list counts where it is used.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import platform
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from analysis import IN_CLONE, ROOT

HOME = Path(__file__).parents[1]  # the code and what comes with it, also where that is a wheel and ROOT is elsewhere

ENGINE = "analysis.engine.evaluate"  # with all that it imports, what answers an expression
# Modules that look at rows after they are made, write them, or speak to the user: nothing in them moves a number.
AFTERWARDS = frozenset(
    f"analysis.{name}"
    for name in ("results", "keys", "params", "registry", "stats", "style", "published", "rec.scoring")
)
ENTRY = re.compile(r"analysis(\.\w+)+:\w+")
# The way by transformers' generate, which the engine takes for models of that kind only.
BY_GENERATE = frozenset({"analysis.models.by_generate", "analysis.hf"})
# Files of a model's folder that are read when it is loaded; cards and training logs are not.
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def fingerprint(facts: Any) -> str:
    """16 hex digits that name JSON-able facts; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- code


def _said(node: Any) -> Any:
    """What a syntax tree says, the same in every version of Python: nested lists without places and empty fields."""
    if isinstance(node, ast.AST):
        fields = [(name, _said(value)) for name, value in ast.iter_fields(node) if name not in ("kind", "type_comment")]
        return [type(node).__name__, *[field for field in fields if field[1] not in ("None", [])]]
    return [_said(one) for one in node] if isinstance(node, list) else repr(node)


def normalised(text: str, definitions: bool = False) -> str:
    """A digest of Python source that comments, docstrings and layout do not change.

    definitions: only functions and classes count. Source that is not valid Python counts as it is.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return fingerprint(text)
    if definitions:
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:]
    return fingerprint(_said(tree))


def _file(module: str) -> Path | None:
    """The file of a module of this project, or None."""
    base = HOME.joinpath(*module.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def _imports(text: str) -> set[str]:
    """The modules of this project that a source imports, and the names that it takes from them.

    A text "analysis.module:name", as a registry has it for what is imported when it is asked for, counts as an import.
    """
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and ENTRY.fullmatch(str(node.value)):
            found.add(node.value.partition(":")[0])
    return {name for name in found if name.partition(".")[0] == "analysis"}


@cache
def _read(file: Path) -> tuple[str, tuple[str, ...]]:
    """Digest of a module's file, and what it imports of this project; see `code` for a package's."""
    text, package = file.read_text(), file.name == "__init__.py"
    return normalised(text, definitions=package), () if package else tuple(sorted(_imports(text)))


def code(*roots: str, skip: Collection[str] = AFTERWARDS | BY_GENERATE) -> dict[str, str]:
    """{module: digest} of modules of this project and of all that they import, without those to `skip`."""
    skip = AFTERWARDS if BY_GENERATE & set(roots) else skip
    found, todo = {}, list(roots)
    while todo:
        module = todo.pop()
        file = _file(module)
        if module in found or module in skip or file is None:
            continue
        found[module], imported = _read(file)
        todo += [*imported, *(module.rsplit(".", 1)[:-1])]
    return dict(sorted(found.items()))


def pruner(spec: str, function: Callable | None = None) -> dict[str, Any]:
    """What moves the selection of a pruner named by a specification: {module or file: digest}, and options bound to it.

    function: the method itself, where it is at hand: one that is registered at run time, or comes from a file of the
    user's, has its own source in the key. Without it the file is found by the name.
    """
    name = spec.partition(":")[0]
    if function is not None:
        return _function(function)
    if _file(f"analysis.pruning.{name.rstrip('+')}") is not None:
        return code(f"analysis.pruning.{name.rstrip('+')}")
    if (file := Path(name.removesuffix(".py") + ".py")).is_file():
        return {file.name: normalised(file.read_text())}
    return code(*(f"analysis.pruning.{file.stem}" for file in sorted((HOME / "analysis/pruning").glob("*.py"))))


def _function(function: Any) -> dict[str, Any]:
    """The source of a function, of what it is made of (partial, wrapped, closed over), and the values bound to it."""
    found: dict[str, Any] = {}
    if isinstance(function, partial):
        inside = [function.func, *function.args, *function.keywords.values()]
        bound = [
            *map(repr, filter(lambda one: not callable(one), function.args)),
            repr(sorted((name, value) for name, value in function.keywords.items() if not callable(value))),
        ]
    elif hasattr(function, "prune") and hasattr(function, "options"):  # an entry of the registry
        inside, bound = [function.prune], [repr(sorted(function.options.items()))] if function.options else []
    else:
        inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        bound, module = [], getattr(function, "__module__", "")
        if _file(module) is not None:
            found |= code(module)
        else:
            try:  # a file of the user's, or a notebook's cell
                file = Path(inspect.getsourcefile(function))
                name, source = file.name, file.read_text()
            except (OSError, TypeError):
                name, source = function.__qualname__, inspect.getsource(function)
            found |= {name: normalised(source)} | code(*_imports(source))
    for one in inside:
        if inspect.isfunction(one) or isinstance(one, partial) or hasattr(one, "prune"):
            found |= _function(one)
    return found | ({"bound": fingerprint([found.get("bound"), bound])} if bound else {})


# The source of every module as it was when this process began: what runs is that, whatever an editor has saved since.
_BEGUN = {file: file.read_text() for file in sorted((HOME / "analysis").rglob("*.py"))}


def check_unchanged(modules: Iterable[str]) -> None:
    """Raises RuntimeError where a module's file no longer says what this process has imported."""
    for file in filter(None, map(_file, modules)):
        text = file.read_text()
        if file in _BEGUN and text != _BEGUN[file] and normalised(text) != normalised(_BEGUN[file]):
            raise RuntimeError(
                f"{file.relative_to(HOME)} has changed since this process began, so rows would bear the name of code "
                "that did not make them; restart the kernel and run again"
            )


# ---------------------------------------------------------------------------------------------------- files


@lru_cache(maxsize=4096)
def _hashed(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def content(file: Path) -> str:
    """A file's SHA-256; of the Hugging Face cache the name of the blob, which for large files is just that."""
    target = file.resolve()
    if target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    about = target.stat()
    return _hashed(target, about.st_size, about.st_mtime_ns)


def folder(path: str | Path, patterns: Iterable[str] = MODEL_FILES) -> dict[str, str]:
    """{file name: 16 hex digits of its content} of a model's folder without its cards and logs; {} where none is."""
    files = {file for pattern in patterns for file in Path(path).glob(pattern) if file.is_file()}
    return {file.name: content(file)[:16] for file in sorted(files)}


def environment() -> dict[str, Any]:
    """Of the surroundings: the commit, whether files differ from it, and the versions that can move a number.

    commit is "unknown" and dirty None outside a clone; dirty counts changed and new files of the code.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    commit, dirty = "unknown", None
    if IN_CLONE:  # a wheel may lie in somebody else's repository
        with suppress(OSError, subprocess.CalledProcessError):
            commit = git("rev-parse", "--verify", "HEAD")
            dirty = bool(git("status", "--porcelain", "--", "analysis", "notebooks"))
    return {"commit": commit, "dirty": dirty, **versions()}


def versions() -> dict[str, str]:
    """Versions that can move a number. Of Python only the minor one: a bug fix release moves no row."""
    names = ("torch", "transformers", "tokenizers", "numpy", "pillow")
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version(name).partition("+")[0] for name in names},  # the device says which build it was
    }


def pictures(dataset: Any, image_ids: Iterable[Any]) -> list[str]:
    """A digest of each picture of a data set: its `digest(image_id)` where it has one, otherwise of the pixels.

    One that cannot be read now is "unreadable": its rows will say why, and are tried anew the next time.
    """
    digest, found = getattr(dataset, "digest", None), []
    for image_id in image_ids:
        try:
            if digest is not None:
                found.append(str(digest(image_id)))
            else:
                image = dataset.image(image_id)
                found.append(fingerprint([image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()]))
        except Exception:  # whatever a decoder raises; evaluation raises it again, and keeps what it says
            found.append("unreadable")
    return found


# ---------------------------------------------------------------------------------------------------- models


def adapter(model: Any) -> dict[str, Any]:
    """The settings of a model that are plain values, of it and its class: prompts, frame, dialect, layer, mean ..."""
    found: dict[str, Any] = {}
    for owner in (*reversed(type(model).__mro__), model):
        found |= {
            name: value
            for name, value in vars(owner).items()
            if not name.startswith("_") and isinstance(value, str | int | float | tuple | None)
        }
    return json.loads(json.dumps({name: found[name] for name in sorted(found.keys() - {"name", "revision"})}))


def model_facts(model: Any, device: str) -> dict[str, Any]:
    """What of a loaded model can move its answers, and the code of the engine and of its family."""
    import torch

    return {
        "model": model.name,
        "revision": model.revision,
        "files": model.files,
        "adapter": adapter(model),
        "prompt": model.prompt_text("{}"),
        "dtype": str(model.dtype),
        "device": device,
        "kernels": {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "precision": torch.get_float32_matmul_precision(),
        },
        "code": code(ENGINE, *(owner.__module__ for owner in type(model).__mro__ if owner is not object)),
    }


def given(model: Any, grid: Iterable[Any], root: str, **more: Any) -> dict[str, Any]:
    """What moves rows that `root`, not `evaluate`, makes of a model in the cells of a grid."""
    grid = list(grid)
    return model_facts(model, str(model.device)) | {
        "code": code(root, *(owner.__module__ for owner in type(model).__mro__ if owner is not object)),
        "data_code": code("analysis.rec.datasets"),
        "stamps": stamps(),
        "cells": [cell.columns() for cell in grid],
        "pruners": {spec: pruner(spec) for spec in sorted({cell.pruner for cell in grid})},
        "clip": model.clip_files,
        **more,
    }


# ---------------------------------------------------------------------------------------------------- differences

NOT_KEY = frozenset({"commit", "dirty", "fingerprint", "failed", "shard", "whole"})  # said of rows, but moves none


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In words, in what two runs differ that can move a row: "batch_size (32 there, 100 wanted)"."""
    found = []
    for name in sorted((there.keys() | wanted.keys()) - NOT_KEY):
        a, b = there.get(name), wanted.get(name)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
            found.append(f"{name} of {', '.join(keys[:4])}{' and others' if len(keys) > 4 else ''}")
        elif len(str(a)) + len(str(b)) < 120:
            found.append(f"{name} ({a} there, {b} wanted)")
        else:
            found.append(name)
    return found


def outdated(made: Mapping[str, Any]) -> list[str]:
    """In words, what has changed since rows were made, as far as that can be seen without loading the model.

    made: their provenance. Rows without digests, as earlier versions of this project wrote them, are of unknown code.
    """
    if "code" not in made:
        return ["code that is not recorded"]
    now: dict[str, Any] = {"code": {}, **versions()}
    for module in made["code"]:
        file = _file(module)
        now["code"][module] = _read(file)[0] if file else "gone"
    then = {name: made.get(name) for name in now}
    home = HOME / "analysis/checkpoints" / str(made.get("model"))
    if "files" in made and home.is_dir():
        then["files"], now["files"] = made["files"], folder(home)
    return differences(then, now)


# ---------------------------------------------------------------------------------------------------- jobs


@cache
def checkpoint(name: str) -> dict[str, Any]:
    """What moves the answers of an embedded model: its folder, its CLIP's, and the code of its family."""
    home = HOME / "analysis/checkpoints" / name
    config = json.loads((home / "config.json").read_text()) if (home / "config.json").is_file() else {}
    family, clip = f"analysis.models.{config.get('model_type')}", str(config.get("clip", ""))
    every = (f"analysis.models.{file.stem}" for file in (HOME / "analysis/models").glob("*.py"))
    roots = [family] if _file(family) else every
    return {"files": folder(home), "clip": folder(home.parent / clip) if clip else {}, "code": code(*roots)}


@cache
def stamps() -> str:
    """A digest of the pictures that RefStamps is composed of."""
    return fingerprint(folder(HOME / "analysis/refstamps/stamps", ("*.png", "*.csv")))


def job(
    notebook: str, pruners: Iterable[str] = (), models: Iterable[str] = (), drawing: bool = False, **more: Any
) -> str:
    """The key of one job of the graph, 16 hex digits: it changes when something changes that the job really uses.

    That is the code cells of its notebook and the modules that these import (texts, outputs and metadata do not count),
    its pruners, its models with their files, the stamps where scenes are drawn, the libraries' versions and whatever
    `more` names. drawing: the modules that only look at rows count, too.
    """
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    used = code(*set().union(*map(_imports, texts)), skip=BY_GENERATE if drawing else AFTERWARDS | BY_GENERATE)
    return fingerprint(
        {
            "notebook": [normalised(text) for text in texts],
            "code": used,
            "pruners": {spec: pruner(spec) for spec in pruners},
            "models": {name: checkpoint(name) for name in models},
            "stamps": stamps() if "analysis.refstamps.stamps" in used else "",
            "versions": versions(),
            **more,
        }
    )
