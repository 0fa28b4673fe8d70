"""Published numbers, each with its source. What has no source is absent: an empty cell, never a guess.

What public code does with position IDs stands in upstream_ids.csv, as read at the commit that each row names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis.registry import matching

_COLUMNS = ["paper", "table", "model", "dataset", "split", "pruner", "ids", "metric", "value", "source"]
_GAP = "arXiv:2506.21873"
_UNIFIED = "arXiv:1805.06266"
_README = f"{_UNIFIED}, the authors' README"
_NLP = "arXiv:1704.04368, by NLP-progress"
UNCHECKED = "quoted from memory, not checked against the paper"  # what tables mark with a dagger


def _summaries(model: str, metric: str, source: str, *values: float) -> list[tuple]:
    """R1, R2, RL (or R1 alone) of a summarizer, in per cent."""
    return [
        ("Unified", None, model, "CNN/Daily Mail", "test", None, None, f"{name} {metric}", value, source)
        for name, value in zip(("R1", "R2", "RL"), values)
    ]


# Names are the paper's own. None: not stated. Accuracy and ROUGE in percent. Unpruned, compact and original IDs are the
# same. Human scores are left out: they cannot be made anew here.
PUBLISHED = pd.DataFrame(
    [
        ("GAP", "Fig. 1", "LLaVA", "RefCOCO", "val", "none", "compact", "Acc@0.5", 56.14, f"{_GAP}, abstract"),
        ("GAP", "Fig. 1", "LLaVA", "RefCOCO", "val", None, "compact", "Acc@0.5", 15.34, f"{_GAP}, abstract"),
        ("GAP", "Fig. 1", "LLaVA", "RefCOCO", "val", None, "original", "Acc@0.5", 51.42, f"{_GAP}, abstract"),
        ("GAP", None, "MiniGPTv2", "RefCOCO", None, "none", "compact", "Acc@0.5", 88.69, _GAP),
        ("GAP", None, "MiniGPTv2", "RefCOCO", None, None, "compact", "Acc@0.5", 2.73, _GAP),
        ("GAP", None, "MiniGPTv2", "RefCOCO", None, None, "original", "Acc@0.5", 68.91, _GAP),
        # FastV's criterion, the same without RoPE, and with a grid besides: all keep original IDs
        *(
            ("FEATHER", None, "Prismatic", "RefCOCO", None, pruner, "original", "Acc@0.5", value, "arXiv:2412.13180")
            for pruner, value in (("FastV", 7.6), ("FastV without RoPE", 15.4), ("FEATHER", 43.4))
        ),
        # points that stretched IDs add to VisionZip at 64 and at 128 tokens
        ("Nuwa", None, "LLaVA", None, None, "VisionZip, 64 tokens", "stretched", "gain", 5.6, f"Nuwa, {UNCHECKED}"),
        ("Nuwa", None, "LLaVA", None, None, "VisionZip, 128 tokens", "stretched", "gain", 13.4, f"Nuwa, {UNCHECKED}"),
        *_summaries("lead-3", "F1", _NLP, 40.34, 17.70, 36.57),
        *_summaries("pointer-generator + coverage", "F1", _NLP, 39.53, 17.28, 36.38),
        *_summaries("two-stage", "F1", f"{_UNIFIED}, {UNCHECKED}", 39.97, 17.43, 36.34),
        *_summaries("end to end without L_inc", "F1", f"{_UNIFIED}, {UNCHECKED}", 40.19, 17.67, 36.68),
        *_summaries("end to end with L_inc", "F1", _README, 40.68, 17.97, 37.13),
        *_summaries("extractor, pretrained", "recall", _README, 73.5, 35.6, 68.6),
        *_summaries("end to end without L_inc", "recall", f"{_UNIFIED}, {UNCHECKED}", 72.97),
        *_summaries("end to end with L_inc", "recall", f"{_UNIFIED}, {UNCHECKED}", 78.40),
        *_summaries("gold labels", "recall", f"{_UNIFIED}, {UNCHECKED}", 89.23),
        *(
            (
                "Unified",
                None,
                f"end to end {which} L_inc",
                "CNN/Daily Mail",
                "test",
                None,
                None,
                "R_inc",
                value,
                f"{_UNIFIED}, {UNCHECKED}",
            )
            for which, value in (("without", 0.198), ("with", 0.042))
        ),
    ],
    columns=_COLUMNS,
)

# One row for each public code, a method's own before ports of it. where: tokens are dropped before the decoder, inside
# it or in both; image, text, generated: IDs of kept tokens at prefill, of the text after them, and of the answer
# (original, compact, after: one beyond the kept tokens' largest, cache: counted by it, columns: of the grid); ids: the
# same as a specification of `analysis.positions`, empty where none says it; source: "read", or what is not confirmed.
UPSTREAM_IDS = pd.read_csv(Path(__file__).with_name("upstream_ids.csv"), keep_default_na=False)


def published(**where: Any) -> float | None:
    """The one published value whose columns equal `where` (None matches "not stated"), or None if there is none.

    published(model="LLaVA", ids="original") -> 51.42. Raises ValueError for an unknown column, or if several rows
    match.
    """
    found = matching(PUBLISHED, where)
    if len(found) > 1:
        raise ValueError(f"{len(found)} published values match {where}; name more columns, such as pruner or ids")
    return None if found.empty else float(found["value"].iloc[0])
