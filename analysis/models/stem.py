"""The tiny CLIP: `transformers`' CLIPModel with a convolutional stem and no absolute position embedding.

Why not plain patches with learned positions: the tower must not hand the language model absolute positions in its
features, or misaligned position IDs would cost nothing and there would be nothing to study. The stem (as in "Early
Convolutions Help Transformers See Better", arXiv:2106.14881) gives each patch its neighbourhood by convolution, which
looks the same everywhere; `position_embedding` stays, at zero and frozen. The model card reports what a probe finds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

IMAGE, PATCH = 192, 16  # pixels: 12 x 12 = 144 visual tokens
GRID = IMAGE // PATCH


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Replicated borders: zero padding would tell a patch how near the border it is."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, padding_mode="replicate"),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ConvStem(nn.Module):
    """Stands in for CLIP's `patch_embedding`: pixels [B, 3, H, W] -> [B, width, H / 16, W / 16]."""

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        steps = [block(a, b, 2) for a, b in zip([3, *channels], channels)]
        self.steps = nn.Sequential(*steps, block(channels[-1], channels[-1], 1))
        self.project = nn.Conv2d(channels[-1], width, 1)

    @property
    def weight(self) -> Tensor:
        """CLIP reads its patch embedding's dtype here."""
        return self.project.weight

    def forward(self, pixels: Tensor) -> Tensor:
        return self.project(self.steps(pixels))


class NormedStem(ConvStem):
    """The stem with CLIP's first norm, which EVA has not: so that an EVA tower can hold a tiny CLIP's weights."""

    def __init__(self, channels: list[int], width: int):
        super().__init__(channels, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(super().forward(pixels).movedim(1, -1)).movedim(-1, 1)


def install_stem(embeddings: nn.Module, config) -> None:
    """Replace the patch embedding of a CLIP's or an EVA's embeddings; silence and freeze their position embedding."""
    clip = isinstance(embeddings.position_embedding, nn.Embedding)
    position = embeddings.position_embedding.weight if clip else embeddings.position_embedding
    stem = (ConvStem if clip else NormedStem)(config.stem, config.hidden_size)
    embeddings.patch_embedding = stem.to(position).train(embeddings.training)
    nn.init.zeros_(position).requires_grad_(False)


@torch.no_grad()
def eva_from_clip(eva: nn.Module, clip: nn.Module) -> None:
    """Give transformers' EVA tower (with the stem) the weights of a tiny CLIP's tower; it then computes the same.

    The two differ in names, in EVA's fused queries, keys and values, and in where the first norm stands.
    """
    norm, old, new = clip.pre_layrnorm, clip.embeddings, eva.embeddings
    new.class_embedding.copy_(norm(old.class_embedding)[None, None])  # the position embedding is zero
    absent, surplus = new.patch_embedding.load_state_dict(old.patch_embedding.state_dict(), strict=False)
    assert not surplus and all(key.startswith("norm.") for key in absent)
    new.patch_embedding.norm.load_state_dict(norm.state_dict())
    for theirs, ours in zip(eva.encoder.layers, clip.encoder.layers, strict=True):
        attention = ours.self_attn
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(attention, f"{letter}_proj"), kind) for letter in "qkv"]
            getattr(theirs.self_attn.qkv, kind).copy_(torch.cat(parts))
        theirs.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    eva.post_layernorm.load_state_dict(clip.post_layernorm.state_dict())


def clip_config(vocab: int, width: int = 128) -> CLIPConfig:
    """The tiny CLIP's sizes; the text tower reads the tokenizer's ids."""
    vision = dict(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE,
        patch_size=PATCH,
        stem=[32, 64, 96, 128],
    )
    text = dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)


class StemClip(CLIPModel):
    """CLIP with the convolutional stem as patch embedding; `vision_config.stem` holds its channels."""

    def __init__(self, config):
        super().__init__(config)
        install_stem(self.vision_model.embeddings, config.vision_config)


def project_patches(clip: CLIPModel, hidden: Tensor) -> Tensor:
    """Patches in CLIP's joint space, as [CLS] gets. hidden: [B, 1 + N, C] last state -> [B, N, P], unit length."""
    patches = clip.visual_projection(clip.vision_model.post_layernorm(hidden[:, 1:]))
    return torch.nn.functional.normalize(patches, dim=-1)
