"""FastV: after two layers, keep the visual tokens that the last token of the question attends to most.

Source: arXiv:2403.06764, github.com/pkunlp-icler/FastV.
Score: attention of the last token in layer K - 1, softmax over all keys, mean over heads.
Selection: the k highest scores, from layer K on; ties go to the lower raster index.
  Option layer: K, 2 in the paper, 3 in its port to lmms-eval. Option rope: false leaves the rotation out of the score.
Order emitted: raster; by score with the option emit=score.
Upstream IDs: original; the code's first version with a cache counted generated tokens by it (original+cache).
"""

from __future__ import annotations

from functools import partial

from analysis.pruning._budget import budget
from analysis.pruning.common import by_score, flag
from analysis.pruning.inside import best
from analysis.types import Attention, Look, Selection, Stage, VisualTokens


def select(look: Look, k: int, ranked: bool) -> Selection:
    """The k tokens with the most attention, mean over heads and queries."""
    return best(look, look.attention.mean(dim=(0, 1)), k, ranked)


def stages(
    visual: VisualTokens, depth: int, keep: float | None, *, layer: int = 2, rope: bool = True, emit: str = "raster"
) -> list[Stage]:
    """One stage. Raises ValueError on a bad keep ratio or option."""
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 1:
        raise ValueError(f"option layer must be at least 1, for FastV looks at the attention before it, got {layer!r}")
    choose = partial(select, k=budget(keep, visual.length), ranked=by_score(emit))
    return [Stage(layer, choose, Attention(layer - 1, rope=flag(rope, "rope")))]
