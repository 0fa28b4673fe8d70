"""Look-ups by name whose errors say what would have been right."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from typing import Any

import pandas as pd


def pick(registry: Mapping[str, Any], name: str, what: str) -> Any:
    """registry[name]; raises ValueError with the closest name and all valid ones. what: the kind of thing, "frame"."""
    if isinstance(name, Hashable) and name in registry:
        return registry[name]
    close = get_close_matches(str(name), registry, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown {what} {name!r:.100}; {hint}valid: {', '.join(registry)}")


def matching(table: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """The rows whose columns equal the given values; None and NaN match a missing value.

    Raises ValueError for an unknown column.
    """
    columns = dict(table.items())
    chosen = pd.Series(True, index=table.index)
    for name, value in where.items():
        column = pick(columns, name, "column")
        chosen &= column.isna() if pd.isna(value) else column == value
    return table[chosen]
