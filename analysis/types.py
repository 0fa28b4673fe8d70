"""The types that flow through the library, in the order of the road of the data.

image -> VisualTokens (encoded once) -> Selection (pruned, one per image) -> position IDs -> answer.
A `Cell` names one point of the experimental grid; its fields are columns of every result row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image


class Signals:
    """What pruners may ask for, computed on first use and kept.

    Built from thunks: `Signals(cls_attention=lambda: ...)`; then `signals.cls_attention` runs the thunk once.
    Names used by the models here (B images, N visual tokens in raster order, C encoder width, P width of CLIP's space):
      patches        [B, N, C]      encoder features of the layer the connector reads, before the connector
      cls            [B, C]         the same layer's [CLS] state
      cls_attention  [B, N]         attention of [CLS] to each patch in the block that made that layer, mean over heads
      keys           [B, 1 + N, C]  keys of the tower's last block, heads side by side, [CLS] first
      cls_query      [B, C]         the same block's query of [CLS]
      read_keys      [B, 1 + N, H]  keys of the block that made the layer the connector reads, mean over heads
      clip_patches   [B, N, P]      patches of the last layer in the space CLIP shares with text, not normalised
      clip_read      [B, N, P]      the same of the layer the connector reads
      clip_text      [B, P]         CLIP's embedding of the expression, not normalised
      clip_prompt    [B, P]         the same of the whole question, cut to CLIP's text length
    and, in evaluation on data with boxes, ground truth for methods that are only there to be compared with (`Truth`):
      target         [B, 4]         box of the object that the expression means
      other          [B, 4]         box of another object, where the data name one
    A pruner that asks for one of `OF_EXPRESSION` selects anew for every expression, any other once for an image.
    """

    OF_EXPRESSION = frozenset({"clip_text", "clip_prompt", "target", "other"})

    def __init__(self, **thunks: Callable[[], Tensor]):
        self._thunks = thunks
        self._values: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._thunks:
            offered = sorted(self._thunks.keys() - set(Truth._fields))
            truth = "; ground truth comes with data of boxes in evaluation only" if name in Truth._fields else ""
            raise AttributeError(f"this model offers no signal {name!r}; it offers: {', '.join(offered)}{truth}")
        if name not in self._values:
            self._values[name] = self._thunks[name]()
        return self._values[name]

    @property
    def asked(self) -> frozenset[str]:
        """Names of the signals that have been computed."""
        return frozenset(self._values)

    def take(self, index: Tensor, **more: Callable[[], Tensor]) -> Signals:
        """The signals of images `index` [M], which may repeat, and `more` thunks; still computed on first use."""
        return Signals(**{name: lambda name=name: getattr(self, name)[index] for name in self._thunks}, **more)


class Truth(NamedTuple):
    """Ground truth of one expression, for oracles: boxes x1, y1, x2, y2 in fractions of what the tokens show.

    target: of the object that is meant; other: of another object on the picture, None where the data name none.
    """

    target: tuple[float, float, float, float]
    other: tuple[float, float, float, float] | None = None


class Ids(NamedTuple):
    """Position IDs of one image and of what follows it, counted from the image's first slot.

    visual: [K] int64, or [K, P] in P planes where a model rotates by several IDs (M-RoPE: t, row, column);
    text_start: of the first token after the image; generated_start: of the first generated token, were there no text
    between image and answer: equal to text_start where generated tokens simply go on. Text has one ID in all planes.
    grids: of unpruned IDs, (rows, columns, whether a newline ends each row) of each view of the image, in turn.
    """

    visual: Tensor
    text_start: int
    generated_start: int
    grids: tuple[tuple[int, int, bool], ...] = ()


def raster_ids(n: int, device: torch.device | str = "cpu") -> Ids:
    """The unpruned IDs of a model that counts its n visual tokens as if they were words."""
    return Ids(torch.arange(n, device=device), n, n)


@dataclass(frozen=True)
class VisualTokens:
    """One batch of images of one layout, encoded once.

    features: [B, N, D] projected tokens in raster order; grid: (rows, columns) with rows * columns == N; connect: the
    model's connector, [..., C] -> [..., D], for methods that merge `signals.patches` before it; newline: [D] token that
    ends each row, if there is one; tiles: the same images seen more closely, whose tokens follow (LLaVA-NeXT); ids: the
    tokens' unpruned IDs, the same for all images of the batch, None where a model counts its tokens as `raster_ids`.
    """

    features: Tensor
    grid: tuple[int, int]
    signals: Signals
    connect: Callable[[Tensor], Tensor] | None = None
    newline: Tensor | None = None
    tiles: VisualTokens | None = None
    ids: Ids | None = None

    @property
    def unpruned(self) -> Ids:
        """IDs of all tokens of one image where nothing is pruned; a rule of `positions` starts from them."""
        ids = raster_ids(self.length, self.features.device) if self.ids is None else self.ids
        return ids._replace(grids=self.grids)

    @property
    def grids(self) -> tuple[tuple[int, int, bool], ...]:
        """Of each view, as in `Ids`."""
        return (*self.grid, self.newline is not None), *(self.tiles.grids if self.tiles else ())

    @property
    def length(self) -> int:
        """Tokens of one image that the decoder reads unpruned, newlines and tiles included."""
        rows, columns = self.grid
        return rows * (columns + (self.newline is not None)) + (self.tiles.length if self.tiles else 0)

    def take(self, index: Tensor, **more: Callable[[], Tensor]) -> VisualTokens:
        """Images `index` [M], which may repeat, with `more` signals such as the text of each."""
        return replace(
            self,
            features=self.features[index],
            signals=self.signals.take(index, **more),
            tiles=self.tiles.take(index, **more) if self.tiles else None,
        )


@dataclass(frozen=True)
class Selection:
    """One image after pruning: K tokens in the order the method emits them.

    features: [K, D]; origin: [K] int64, the index each token had before pruning: its raster index, where there are
    newlines or tiles its place among all tokens (a synthetic token carries its anchor); synthetic: [K] bool, True for
    tokens that stand for several, not for one with others merged into it.
    """

    features: Tensor
    origin: Tensor
    synthetic: Tensor

    def take(self, order: Tensor) -> Selection:
        """The same tokens in another order; order: [K] int64, a permutation."""
        return Selection(self.features[order], self.origin[order], self.synthetic[order])


class Attention(NamedTuple):
    """Which attention of the decoder ranks visual tokens.

    layer: whose queries and keys compare; rope: False leaves their rotation out; over: "all" for a softmax over all
    keys, "image" for one over the visual tokens; queries: "last" of the question or all of its "text"; unbiased:
    divided by what rotation alone makes of a query and a key of ones (SparseVLM+).
    """

    layer: int
    rope: bool = True
    over: str = "all"
    queries: str = "last"
    unbiased: bool = False


class Look(NamedTuple):
    """What a stage inside the decoder sees of one sequence: K visual tokens, S of the question.

    states: [K, D], as they enter the stage's first layer; origin: [K], as in `Selection`; attention: [heads, Q, K] of
    the queries that the stage asked for, None where for none; image: [N, D] the visual tokens, words: [S, D] the
    question as they entered the decoder.
    """

    states: Tensor
    origin: Tensor
    attention: Tensor | None
    image: Tensor
    words: Tensor

    def take(self, index: Tensor) -> Selection:
        """The tokens at these places, [k] int64, in this order."""
        return Selection(self.states[index], self.origin[index], torch.zeros_like(index, dtype=torch.bool))


class Stage(NamedTuple):
    """A drop inside the decoder. layer: the first that reads only what is kept; select: what is kept, of `Look.states`;
    attention: what it asks for, None where its choice needs no look."""

    layer: int
    select: Callable[[Look], Selection]
    attention: Attention | None = None


def kept(features: Tensor, index: Tensor) -> list[Selection]:
    """Selections that keep original tokens only. features: [B, N, D]; index: [B, K] raster indices as emitted."""
    chosen = torch.gather(features, 1, index[..., None].expand(-1, -1, features.shape[-1]))
    none = torch.zeros(index.shape[1], dtype=torch.bool, device=index.device)
    return [Selection(f, i, none) for f, i in zip(chosen, index)]


@dataclass(frozen=True)
class RecDataset:
    """One split; anything with the first four of these can be evaluated.

    rows: one per expression, with image_id, ref_id (the object), sent_id, expression, width, height and the ground
    truth x1, y1, x2, y2 in pixels of the original image (ox1, oy1, ox2, oy2, too, where they name another object to
    compare with), or one per question, with task and the answer's words instead of the box; image(image_id) gives the
    RGB picture; digest(image_id) a text that changes with the picture: without it the pixels are read for their digest,
    which is part of a row's key.
    """

    name: str
    split: str
    rows: pd.DataFrame
    image: Callable[[Any], Image.Image]
    digest: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    pruner: a specification for `pruning.pruner`, such as "trim" or "trim:anchor=last"; keep: share of the visual tokens
    that the decoder still reads, None where the method decides itself;
    order, ids: specifications for `positions` such as "method", "shuffled:0.5", "original", "original@compact+cache";
    seed: of everything random in this cell.
    """

    pruner: str = "none"
    keep: float | None = None
    order: str = "method"
    ids: str = "compact"
    seed: int = 0

    def columns(self) -> dict:
        return asdict(self)
