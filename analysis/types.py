"""The four types that flow through the library, in the order of the road of the data.

image -> VisualTokens (encoded once) -> Selection (pruned, one per image) -> position IDs -> answer.
A `Cell` names one point of the experimental grid; its fields are columns of every result row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


class Signals:
    """What pruners may ask for, computed on first use and kept.

    Built from thunks: `Signals(cls_attention=lambda: ...)`; then `signals.cls_attention` runs the thunk once.
    Names used by the models here (B images, N visual tokens in raster order, C encoder width, P CLIP space):
      patches        [B, N, C]  encoder features of the layer the connector reads, before the connector
      cls            [B, C]     the same layer's [CLS] state
      cls_attention  [B, N]     attention of [CLS] to each patch in that layer, mean over heads
    """

    def __init__(self, **thunks: Callable[[], Tensor]):
        self._thunks = thunks
        self._values: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._thunks:
            raise AttributeError(f"this model offers no signal {name!r}; it offers: {', '.join(sorted(self._thunks))}")
        if name not in self._values:
            self._values[name] = self._thunks[name]()
        return self._values[name]


@dataclass(frozen=True)
class VisualTokens:
    """One batch of images, encoded once.

    features: [B, N, D] projected tokens in raster order; grid: (rows, columns) with rows * columns == N.
    """

    features: Tensor
    grid: tuple[int, int]
    signals: Signals


@dataclass(frozen=True)
class Selection:
    """One image after pruning: K tokens in the order the method emits them.

    features: [K, D]; origin: [K] int64, the raster index each token had before pruning (a synthetic token carries
    its anchor); synthetic: [K] bool, True for merged or leftover tokens.
    """

    features: Tensor
    origin: Tensor
    synthetic: Tensor

    def take(self, order: Tensor) -> Selection:
        """The same tokens in another order; order: [K] int64, a permutation."""
        return Selection(self.features[order], self.origin[order], self.synthetic[order])


def kept(features: Tensor, index: Tensor) -> list[Selection]:
    """Selections that keep existing tokens only. features: [B, N, D]; index: [B, K] raster indices, in emitted order."""
    chosen = torch.gather(features, 1, index[..., None].expand(-1, -1, features.shape[-1]))
    none = torch.zeros(index.shape[1], dtype=torch.bool, device=index.device)
    return [Selection(f, i, none) for f, i in zip(chosen, index)]


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    pruner: a name in `pruning.PRUNERS`; keep: share of visual tokens kept, None where the method decides itself;
    order, ids: specifications for `positions` such as "method", "shuffled:0.5", "original", "compressed:0.75";
    seed: of everything random in this cell.
    """

    pruner: str = "none"
    keep: float | None = None
    order: str = "method"
    ids: str = "compact"
    seed: int = 0

    def columns(self) -> dict:
        return asdict(self)
