"""[CLS]-visual similarity: keep the patches most like the whole image.

Source: baseline of arXiv:2506.21873; its code is not public, so space, layer and order are this project's choices.
Score: cosine(signals.cls, signals.patches), both from the encoder layer that the connector reads.
Selection: the k highest scores; ties go to the lower raster index.
Order emitted: score, descending; order "raster" gives the other reading.
Upstream IDs: compact (permuted and shifted; under raster order only shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from analysis.pruning.common import top_k
from analysis.types import VisualTokens


def score(visual: VisualTokens, *, seeds: Sequence[int] = ()) -> Tensor:
    """[B, N]; in float32, for in half precision many would tie."""
    return cosine_similarity(visual.signals.patches.float(), visual.signals.cls.float()[:, None], dim=-1)


prune = top_k(score, emit="score")
