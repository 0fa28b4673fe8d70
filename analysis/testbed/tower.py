"""The tiny CLIP: `transformers`' CLIPModel with a convolutional stem and no absolute position embedding.

Why not plain patches with learned positions: the tower must not hand the language model absolute positions in its
features, or misaligned position IDs would cost nothing and there would be nothing to study. The stem (as in "Early
Convolutions Help Transformers See Better", arXiv:2106.14881) gives each patch its neighbourhood by convolution, which
looks the same everywhere; `position_embedding` stays, at zero and frozen. The model card reports what a probe finds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

IMAGE, PATCH = 192, 16  # pixels: 12 x 12 = 144 visual tokens
GRID = IMAGE // PATCH


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Replicated borders: zero padding would tell a patch how near the border it is."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, padding_mode="replicate"),
                         nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


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


def install_stem(embeddings: nn.Module, config: CLIPVisionConfig) -> None:
    """Replace the patch embedding of CLIPVisionEmbeddings; silence and freeze its position embedding."""
    stem = ConvStem(config.stem, config.hidden_size)
    embeddings.patch_embedding = stem.to(embeddings.position_embedding.weight)
    nn.init.zeros_(embeddings.position_embedding.weight).requires_grad_(False)


def clip_config(vocab: int, width: int = 128) -> CLIPConfig:
    """The tiny CLIP's sizes; the text tower reads the tokenizer's ids."""
    vision = dict(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=4,
                  image_size=IMAGE, patch_size=PATCH, stem=[32, 64, 96, 128])
    text = dict(vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=40, bos_token_id=1, eos_token_id=3, pad_token_id=0)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)


class StemClip(CLIPModel):
    """CLIP with the convolutional stem as patch embedding; `vision_config.stem` holds its channels."""

    def __init__(self, config):
        super().__init__(config)
        install_stem(self.vision_model.embeddings, config.vision_config)


def project_patches(clip: CLIPModel, hidden: Tensor) -> Tensor:
    """Patches in CLIP's joint space, as [CLS] gets there. hidden: [B, 1 + N, C] last state -> [B, N, P], unit length."""
    patches = clip.visual_projection(clip.vision_model.post_layernorm(hidden[:, 1:]))
    return torch.nn.functional.normalize(patches, dim=-1)
