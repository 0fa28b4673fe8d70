"""Notebook parameters that cannot be misspelt: papermill only warns about an unknown name and runs the defaults.

The last line of a parameters cell is `DECLARED = params.declare(globals())`; the first line after it, and so after
what papermill injects, is `params.check(globals(), DECLARED)`. Works under papermill, Snakemake and in JupyterLab.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from analysis.registry import pick


def declare(scope: dict[str, Any]) -> dict[str, Any]:
    """The parameters, {name: default}: what a notebook's own cells have defined, neither IPython's names nor modules,
    functions and classes. scope is the notebook's globals()."""
    hidden = {"In", "Out", "DECLARED", "exit", "quit", "open"}
    return {
        k: v
        for k, v in scope.items()
        if not k.startswith("_") and k not in hidden and not isinstance(v, ModuleType) and not callable(v)
    }


def check(scope: dict[str, Any], declared: dict[str, Any]) -> None:
    """Raises ValueError for an injected name that is not declared and for a value that cannot replace its default.

    A list may stand for one value where the default is a list, and None where the default is None or anything else.
    """
    for name, value in declare(scope).items():
        default = pick(declared, name, "parameter")
        if default is None or value is None or isinstance(default, list):
            continue
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(
                f"parameter {name!r} takes {type(default).__name__}, as in {default!r}; "
                f"got {type(value).__name__} {value!r}"
            )
