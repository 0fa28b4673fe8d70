"""What the vision towers of transformers' models give a pruner: one `VisualTokens` for each run of tokens.

`units` reads the output of a model's own `get_image_features`. Where an image is cut into tiles that the decoder reads
one after the other (InternVL, Idefics3, SmolVLM), each tile is a unit by itself; LLaVA-NeXT's and LLaVA-OneVision's
mosaic belongs to its image as `VisualTokens.tiles`.

Which signals a tower offers: CLIP and InternVL's tower have a [CLS] token, SigLIP and Qwen's have none. Where a
connector joins s x s patches to a token, the token has its patches' features side by side, in the connector's order,
the mean of their keys and of their [CLS] attention, and [CLS] itself s * s times, as in `minigpt_v2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from analysis.models.clip import Clip
from analysis.registry import pick
from analysis.types import Ids, Signals, VisualTokens

Units = list[list[VisualTokens]]  # for each image of a batch (each sample of Idefics3) its runs of tokens, in order

WITH_CLS = ("patches", "cls", "cls_attention", "keys", "cls_query")
WITH_TEXT = (*WITH_CLS, "read_keys", "clip_patches", "clip_read", "clip_text", "clip_prompt")


def cls_attention(attention: nn.Module, states: Tensor) -> Tensor:
    """[B, N] attention of [CLS], the first of the states [B, 1 + N, C], to the others; mean over heads.

    Only [CLS] asks, so this is cheap, and the same whichever kernel the tower itself runs on.
    attention: with q_proj, k_proj, num_heads and, in InternVL, q_norm and k_norm.
    """
    query, keys = projected(attention, "q", states[:, :1]), projected(attention, "k", states)
    query, keys = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (query, keys))
    weights = (query @ keys.mT * query.shape[-1] ** -0.5).softmax(dim=-1, dtype=torch.float32).to(states.dtype)
    return weights[:, :, 0, 1:].mean(dim=1)


def projected(attention: nn.Module, letter: str, states: Tensor) -> Tensor:
    """Queries ("q") or keys ("k") [B, L, C], heads side by side, of states [B, L, C]."""
    norm = getattr(attention, f"{letter}_norm", nn.Identity())
    return norm(getattr(attention, f"{letter}_proj")(states))


def clip_signals(tower: nn.Module, hidden: tuple[Tensor, ...], layer: int, clip: Callable[[], Clip]) -> Signals:
    """The signals of a CLIP tower that need no text. hidden: its hidden states; layer: the one that is read, from 1."""
    read, before, second_last, last = hidden[layer], hidden[layer - 1], hidden[-2], hidden[-1]
    block, final = tower.encoder.layers[layer - 1], tower.encoder.layers[-1]  # `block` makes `read`

    def read_keys() -> Tensor:
        keys = block.self_attn.k_proj(block.layer_norm1(before))
        return keys.unflatten(-1, (block.self_attn.num_heads, -1)).mean(dim=2)

    return Signals(
        patches=lambda: read[:, 1:],
        cls=lambda: read[:, 0],
        cls_attention=lambda: cls_attention(block.self_attn, block.layer_norm1(before)),
        keys=lambda: final.self_attn.k_proj(final.layer_norm1(second_last)),
        cls_query=lambda: final.self_attn.q_proj(final.layer_norm1(second_last[:, 0])),
        read_keys=read_keys,
        clip_patches=lambda: clip().patches(tower, last),
        clip_read=lambda: clip().patches(tower, read),
    )


def _each(visual: VisualTokens) -> Units:
    """A batch of images as single ones; what one of them asks for is computed for all."""
    places = torch.arange(len(visual.features), device=visual.features.device)
    return [[visual.take(place[None])] for place in places]


def _square(n: int) -> tuple[int, int]:
    side = isqrt(n)
    if side * side != n:
        raise ValueError(f"this tower's {n} tokens are no square, so that what lies where in the image is not known")
    return side, side


def _read_layer(config) -> int | None:
    """Number, from 1, of the CLIP layer that a LLaVA reads without its [CLS]; None where it is another tower or reads
    otherwise, and no signals are offered."""
    layer, vision = config.vision_feature_layer, config.vision_config
    if vision.model_type != "clip_vision_model" or not isinstance(layer, int):
        return None
    layer %= vision.num_hidden_layers + 1
    return layer if layer and config.vision_feature_select_strategy == "default" else None


def _llava(model: nn.Module, output: Any, inputs: Mapping[str, Any], clip: Callable[[], Clip]) -> Units:
    base, layer = model.base_model, _read_layer(model.config)
    signals = clip_signals(base.vision_tower, output.hidden_states, layer, clip) if layer else Signals()
    if inputs.get("image_sizes") is not None:
        raise ValueError("a LLaVA whose tower takes images of any size (Pixtral) is not supported")
    features = torch.stack(list(output.pooler_output))
    return _each(VisualTokens(features, _square(features.shape[1]), signals, base.multi_modal_projector))


def _anyres(model: nn.Module, output: Any, inputs: Mapping[str, Any], clip: Callable[[], Clip]) -> Units:
    """LLaVA-NeXT and LLaVA-OneVision: the whole image, then a mosaic of tiles with a newline after each row.

    The model's own packing, of numbers instead of features, says which token lies where in the mosaic.
    """
    base, layer = model.base_model, _read_layer(model.config)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    n, device = side * side, output.pooler_output[0].device
    views = clip_signals(base.vision_tower, output.hidden_states, layer, clip) if layer else None
    asked = inputs.get("batch_num_images")
    single = [False] * len(output.pooler_output) if asked is None else [k > 1 for k in asked for _ in range(k)]
    options = {
        name: getattr(model.config, name)
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
        if name in base.pack_image_features.__code__.co_varnames
    }
    made, first = [], 0
    for features, size, alone in zip(output.pooler_output, inputs["image_sizes"], single):
        tiles = 0 if alone else _tile_count(model.config, size)
        numbers = torch.arange((1 + tiles) * n, dtype=torch.float64, device=device).view(1 + tiles, n, 1)
        newline = torch.full((1,), -1.0, dtype=torch.float64, device=device)
        packed = base.pack_image_features([numbers], [size], image_newline=newline, **options)[0][0][:, 0]
        signals = views.take(torch.tensor([first], device=device)) if views else Signals()
        closer = None
        if tiles:
            laid = packed[n:].view(int((packed == -1).sum()), -1)[:, :-1]
            place = laid.flatten().long() - n  # among all tokens of the tiles
            tokens = features[n:].view(*(laid.shape[0], laid.shape[1] + 1), -1)[:, :-1].flatten(0, 1)
            seen = _mosaic_signals(views, first, tiles, place) if views else Signals()
            closer = VisualTokens(
                tokens[None], tuple(laid.shape), seen, base.multi_modal_projector, newline=features[-1]
            )
        whole = VisualTokens(features[None, :n], (side, side), signals, base.multi_modal_projector, tiles=closer)
        made.append([whole])
        first += 1 + tiles
    return made


def _tile_count(config, size) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) - 1


def _mosaic_signals(views: Signals, first: int, tiles: int, place: Tensor) -> Signals:
    """Signals of one image's mosaic; where a method needs one [CLS], it is the whole image's."""

    def laid(name: str, start: int = 0) -> Tensor:
        return getattr(views, name)[first + 1 : first + 1 + tiles, start:].flatten(0, 1)[place][None]

    def whole(name: str) -> Tensor:
        return getattr(views, name)[first : first + 1]

    return Signals(
        patches=lambda: laid("patches"),
        cls=lambda: whole("cls"),
        cls_attention=lambda: laid("cls_attention"),
        cls_query=lambda: whole("cls_query"),
        keys=lambda: torch.cat([whole("keys")[:, :1], laid("keys", start=1)], dim=1),
        read_keys=lambda: torch.cat([whole("read_keys")[:, :1], laid("read_keys", start=1)], dim=1),
        clip_patches=lambda: laid("clip_patches"),
        clip_read=lambda: laid("clip_read"),
    )


def _internvl(model: nn.Module, output: Any, inputs: Mapping[str, Any], clip: Callable[[], Clip]) -> Units:
    base, config, hidden = model.base_model, model.config, output.hidden_states
    layer = config.vision_feature_layer
    read = output.last_hidden_state if layer == -1 else hidden[layer]
    block = base.vision_tower.encoder.layer[layer % len(hidden) - 1]
    before, last = hidden[layer % len(hidden) - 1], base.vision_tower.encoder.layer[-1]
    group = round(1 / config.downsample_ratio) ** 2

    def shuffled(patches: Tensor) -> Tensor:
        """[B, n, c] -> [B, N, group * c]"""
        side = isqrt(patches.shape[1])
        laid = patches.reshape(len(patches), side, side, -1)
        return base.pixel_shuffle(laid, scale_factor=config.downsample_ratio).flatten(1, 2)

    def keys() -> Tensor:
        made = projected(last.attention, "k", last.layernorm_before(hidden[-2]))
        mean = shuffled(made[:, 1:]).unflatten(-1, (group, -1)).mean(dim=2)
        return torch.cat([made[:, :1], mean], dim=1)

    def attention() -> Tensor:
        return shuffled(cls_attention(block.attention, block.layernorm_before(before))[..., None]).mean(dim=2)

    signals = Signals(
        patches=lambda: shuffled(read[:, 1:]),
        cls=lambda: read[:, 0].repeat(1, group),
        cls_attention=attention,
        keys=keys,
        cls_query=lambda: projected(last.attention, "q", last.layernorm_before(hidden[-2])[:, :1])[:, 0],
    )
    features = output.pooler_output
    return _each(VisualTokens(features, _square(features.shape[1]), signals, base.multi_modal_projector))


def _idefics3(model: nn.Module, output: Any, inputs: Mapping[str, Any], clip: Callable[[], Clip]) -> Units:
    connector, read = model.base_model.connector, output.last_hidden_state
    features = torch.cat(list(output.pooler_output)).unflatten(0, (len(read), -1))
    signals = Signals(patches=lambda: connector.pixel_shuffle(read, connector.scale_factor))
    visual = VisualTokens(features, _square(features.shape[1]), signals, connector.modality_projection)
    units = iter(unit for (unit,) in _each(visual))
    return [[next(units) for _ in range(len(sample) // features.shape[1])] for sample in output.pooler_output]


def merged_patches(tower: nn.Module, states: Tensor, grids: Tensor) -> Tensor:
    """[N, merge**2 * C] patches of each token of Qwen's tower, all images one after the other in raster order.

    states: [N * merge**2, C], its last ones, which Qwen2.5-VL leaves in window order; grids: [B, 3] of patches (t, h,
    w).
    """
    merge = tower.spatial_merge_size
    patches = states.reshape(-1, merge**2 * states.shape[-1])
    if not hasattr(tower, "window_size"):
        return patches
    window, _ = get_vision_window_index(grids, merge, tower.window_size, tower.patch_size)
    return patches[window.to(patches.device).argsort()]


def merger(tower: nn.Module) -> Callable[[Tensor], Tensor]:
    """Qwen's connector as `VisualTokens.connect`: [..., merge**2 * C] -> [..., D]."""
    group = tower.spatial_merge_size**2
    return lambda patches: tower.merger(patches.reshape(-1, patches.shape[-1] // group)).view(*patches.shape[:-1], -1)


def _qwen(model: nn.Module, output: Any, inputs: Mapping[str, Any], clip: Callable[[], Clip]) -> Units:
    tower, grids = model.base_model.visual, inputs["image_grid_thw"]
    patches, merge = merged_patches(tower, output.last_hidden_state, grids), tower.spatial_merge_size
    made, start = [], 0
    for features, (frames, rows, columns) in zip(output.pooler_output, grids.tolist()):
        if frames != 1:
            raise ValueError(f"an image of {frames} frames cannot be pruned; only still images can")
        here = slice(start, start := start + len(features))
        signals = Signals(patches=lambda here=here: patches[None, here])
        grid = rows // merge, columns // merge
        ids = grid_ids(*grid, device=features.device)
        made.append([VisualTokens(features[None], grid, signals, merger(tower), ids=ids)])
    return made


def grid_ids(rows: int, columns: int, device: torch.device | str = "cpu") -> Ids:
    """The unpruned IDs of Qwen's still images under M-RoPE: (0, row, column), and text after the longer side."""
    row, column = torch.meshgrid(*(torch.arange(n, device=device) for n in (rows, columns)), indexing="ij")
    planes = torch.stack([torch.zeros_like(row), row, column], dim=2).flatten(0, 1)
    return Ids(planes, max(rows, columns), max(rows, columns))


class Tower(NamedTuple):
    """units(whole model, output of get_image_features, its arguments by name, CLIP) -> `Units`; hidden: whether the
    output must hold all hidden states; cls: whether there is a [CLS]."""

    units: Callable[[nn.Module, Any, Mapping[str, Any], Callable[[], Clip]], Units]
    hidden: bool = False
    cls: bool = False


# config.json's model_type -> tower
TOWERS: dict[str, Tower] = {
    "llava": Tower(_llava, hidden=True),
    "llava_next": Tower(_anyres, hidden=True),
    "llava_onevision": Tower(_anyres),
    "internvl": Tower(_internvl, hidden=True, cls=True),
    "idefics3": Tower(_idefics3),
    "smolvlm": Tower(_idefics3),
    "qwen2_vl": Tower(_qwen),
    "qwen2_5_vl": Tower(_qwen),
    "qwen3_vl": Tower(_qwen),
}


def offers(config) -> tuple[str, ...]:
    """Names of the signals that a model offers. Raises ValueError for a model that is not in `TOWERS`."""
    tower = pick(TOWERS, config.model_type, "model type that can be pruned under generate")
    if config.model_type in ("llava", "llava_next") and _read_layer(config):
        return WITH_TEXT
    return WITH_CLS if tower.cls else () if config.model_type.startswith("llava") else ("patches",)
