"""Published numbers, each with its source. What has no source is absent: an empty cell, never a guess."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.registry import matching

_COLUMNS = ["paper", "table", "model", "dataset", "split", "pruner", "ids", "metric", "value", "source"]
_GAP = "arXiv:2506.21873"

# Names are the paper's own. None: not stated. Accuracy in percent. Unpruned, compact and original IDs are the same.
PUBLISHED = pd.DataFrame(
    [
        ("GAP", "Fig. 1", "LLaVA", "RefCOCO", "val", "none", "compact", "Acc@0.5", 56.14, f"{_GAP}, abstract"),
        ("GAP", "Fig. 1", "LLaVA", "RefCOCO", "val", None, "compact", "Acc@0.5", 15.34, f"{_GAP}, abstract"),
        ("GAP", "Fig. 1", "LLaVA", "RefCOCO", "val", None, "original", "Acc@0.5", 51.42, f"{_GAP}, abstract"),
        ("GAP", None, "MiniGPTv2", "RefCOCO", None, "none", "compact", "Acc@0.5", 88.69, _GAP),
        ("GAP", None, "MiniGPTv2", "RefCOCO", None, None, "compact", "Acc@0.5", 2.73, _GAP),
        ("GAP", None, "MiniGPTv2", "RefCOCO", None, None, "original", "Acc@0.5", 68.91, _GAP),
    ],
    columns=_COLUMNS,
)


def published(**where: Any) -> float | None:
    """The one published value whose columns equal `where` (None matches "not stated"), or None if there is none.

    published(model="LLaVA", ids="original") -> 51.42. Raises ValueError for an unknown column, or if several rows
    match.
    """
    found = matching(PUBLISHED, where)
    if len(found) > 1:
        raise ValueError(f"{len(found)} published values match {where}; name more columns, such as pruner or ids")
    return None if found.empty else float(found["value"].iloc[0])
