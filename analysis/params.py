"""Notebook parameters that cannot be misspelt: papermill only warns about an unknown name and runs the defaults.

The last line of a parameters cell is `DECLARED = params.declare(globals())`; the first line after it, and so after
what papermill injects, is `params.check(globals(), DECLARED)`. Works under papermill, Snakemake and in JupyterLab,
where any cell may be run again.
"""

from __future__ import annotations

import ast
import json
import re
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import reduce
from operator import or_
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, get_args, get_origin

from analysis import ROOT
from analysis.registry import pick

_CHECKED = "_parameters_checked"  # the name in a notebook that says that its cells below may have run


def declare(scope: dict[str, Any]) -> dict[str, Any]:
    """The parameters, {name: default}: what the cell that calls this assigns. scope is the notebook's globals().

    Under IPython the cell's own source says so; names that other cells have left behind do not count. Elsewhere all of
    scope counts, but for IPython's names, modules, functions and classes.
    """
    names = _names(scope)
    if isinstance(scope.get("In"), list) and scope["In"]:
        assigned = {
            target.id
            for statement in ast.parse(scope["In"][-1]).body
            if isinstance(statement, ast.Assign | ast.AnnAssign)
            for target in ast.walk(statement)
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
        }
        names = [name for name in names if name in assigned]
    return {name: scope[name] for name in names}


def _names(scope: dict[str, Any]) -> list[str]:
    hidden = {"In", "Out", "DECLARED", "exit", "quit", "open"}
    return [
        name
        for name, value in scope.items()
        if not name.startswith("_") and name not in hidden and not isinstance(value, ModuleType) and not callable(value)
    ]


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind: a type, a union or list[...] of kinds; True is no number, an int may be a float."""
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(one is None or _fits(one, get_args(kind)[0]) for one in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _kind(default: Any) -> Any:
    """The kind that a default value stands for."""
    if isinstance(default, list):
        kinds = {type(one) for one in default if one is not None}
        return list[reduce(or_, sorted(kinds, key=str))] if kinds else list
    return type(default)


def _written(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)


def check(scope: dict[str, Any], declared: dict[str, Any], **kinds: Any) -> None:
    """Raises ValueError for an injected name that is not declared and for a value that cannot replace its default.

    kinds: by name, what a parameter takes besides its default where that is None, or does not say all: a type such as
    int, list[str] or float | list[float], or an ending such as ".parquet" of a file's name. One value may stand for a
    list: it is put into one. The values of scope are changed in place.
    """
    values = dict(scope)
    given = [name for name in _names(scope) if name in declared] if _CHECKED in scope else _names(scope)
    for name in given:
        default, value = pick(declared, name, "parameter"), values[name]
        kind = kinds.get(name, _kind(default))
        if isinstance(kind, str):
            ending, kind = kind, str
            if isinstance(value, str) and not value.endswith(ending):
                raise ValueError(f"parameter {name!r} is the name of a {ending} file, got {value!r}")
        if value is None and default is None:
            continue
        if get_origin(kind) is list and not isinstance(value, list) and _fits(value, get_args(kind)[0]):
            scope[name] = [value]
        elif default is None and name not in kinds:
            continue
        elif not _fits(value, kind):
            like = f", as in {default!r}" if default is not None else " or None"
            raise ValueError(f"parameter {name!r} takes {_written(kind)}{like}; got {type(value).__name__} {value!r}")
    scope[_CHECKED] = True


def paths(rows: str | list[str]) -> list[Path]:
    """The files that a parameter names, seen from the project's folder: one, a list, or a pattern "a/tab4_*.parquet".

    Raises FileNotFoundError for a pattern that fits no file.
    """
    found = []
    for name in [rows] if isinstance(rows, str) else rows:
        files = sorted(ROOT.glob(name)) if "*" in name else [ROOT / name]
        if not files:
            raise FileNotFoundError(f"no file fits {name} in {ROOT}; run the notebook that writes them")
        found += files
    return found


def output(name: str, scope: dict[str, Any], declared: dict[str, Any]) -> str:
    """The name in figures/ of what a notebook draws: its own name for the paper's rows and settings only.

    name: the notebook's. Other rows or settings get `out`, or without it a name with that of their file. ValueError
    where `out` is no plain name, or that of one of the paper's figures or tables, which nothing else may take.
    """
    given, smoke, changed = scope["out"], scope["smoke"], []
    for key in declared.keys() - {"out", "smoke"}:
        value, default = scope[key], declared[key]
        if value != default and [value] != default and not _among(value, default):
            changed.append(key)
    if given is None and not changed:
        return name
    if given is None:
        files = [scope[key] for key in changed if ".parquet" in str(scope[key])]
        files = [Path(file) for one in files for file in ([one] if isinstance(one, str) else one)]
        given = f"{name}_{files[0].stem}" if files and not smoke else f"{name}_own" if not smoke else name
    if not re.fullmatch(r"[\w+.=,-]+", given):
        raise ValueError(f"out is a name in figures/ without folder and ending, such as {name}_mine; got {given!r}")
    taken = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    if given in taken and not smoke and (changed or given != name):
        raise ValueError(
            f"figures/{given} is the paper's and stays so: {', '.join(sorted(changed)) or 'this'} would draw another "
            f"one under its name; give another out, such as {name}_mine"
        )
    return given


def _among(value: Any, default: Any) -> bool:
    """Whether the files given are ones that a default pattern stands for."""
    values = [value] if isinstance(value, str) else value
    return (
        isinstance(default, str)
        and "*" in default
        and isinstance(values, list)
        and all(isinstance(one, str) and fnmatchcase(one, default) for one in values)
    )


def defaults(notebook: str | Path) -> dict[str, Any]:
    """The parameters of a notebook and their defaults, as far as these are plain values. Nothing is run."""
    cells = json.loads(Path(notebook).read_text())["cells"]
    source = next(cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    found = {}
    for statement in ast.parse("".join(source)).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            with suppress(ValueError):
                found[statement.targets[0].id] = ast.literal_eval(statement.value)
    return found
