"""PyramidDrop: at a quarter, a half and three quarters of the decoder's depth, drop the same share of what is left.

Source: arXiv:2410.17247, github.com/Cooperx521/PyramidDrop.
Score: attention of the question's last token by the queries and keys of the layer that will read the kept ones first,
  softmax over all keys, mean over heads.
Selection: keep^(1/3), keep^(2/3) and keep of all tokens, the highest scores; ties go to the lower raster index. The
  paper's shares .5, .25 and .125 are those of keep = .125.
  Option layers: where, as in 8+16+24 (the paper's, of 32). Option rope: false leaves the rotation out of the score.
Order emitted: raster; by score with the option emit=score.
Upstream IDs: compact, anew at each stage, while decoding too; LightCompress's port decodes with original ones.
"""

from __future__ import annotations

from functools import partial

from analysis.pruning._budget import budget
from analysis.pruning.common import by_score, flag
from analysis.pruning.fastv import select
from analysis.pruning.inside import depths, shrinking
from analysis.types import Attention, Stage, VisualTokens


def stages(
    visual: VisualTokens,
    depth: int,
    keep: float | None,
    *,
    layers: str | int | None = None,
    rope: bool = True,
    emit: str = "raster",
) -> list[Stage]:
    """A stage at each layer. Raises ValueError on a bad keep ratio or option."""
    at, rope, ranked = depths((8, 16, 24), depth, layers), flag(rope, "rope"), by_score(emit)
    return [
        Stage(layer, partial(select, k=budget(share, visual.length), ranked=ranked), Attention(layer, rope=rope))
        for layer, share in zip(at, shrinking(keep, len(at)))
    ]
