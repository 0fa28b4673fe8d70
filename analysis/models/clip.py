"""CLIP's joint space of image and text, for pruners that compare patches with words.

A LLaVA brings CLIP's vision tower but neither its text tower nor the two projections, so those come from a CLIP
beside it: `clip` in the model's config.json names it, the embedded default of LLaVA-1.5 is `DEFAULT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from analysis.models.stem import StemClip

DEFAULT = "openai/clip-vit-large-patch14-336"  # the tower of LLaVA-1.5 and LLaVA-NeXT


@dataclass(frozen=True)
class Clip:
    """A CLIP ready to embed words and to project a tower's patches."""

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase

    @torch.inference_mode()
    def text(self, texts: Sequence[str]) -> Tensor:
        """[n, P] of n texts, not normalised; each is cut to the length that CLIP reads, its end token kept."""
        limit, eos = self.model.config.text_config.max_position_embeddings, self.tokenizer.eos_token_id
        rows = []
        for text in texts:
            ids = self.tokenizer(text, split_special_tokens=True).input_ids  # of the text, whatever it spells
            ids = ids[:-1] if ids[-1] == eos else ids  # whether a tokenizer adds it depends on how it was saved
            rows.append(torch.tensor([*ids[: limit - 1], eos]))
        device = self.model.text_projection.weight.device
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=eos)
        found = self.model.text_model(input_ids=ids.to(device), attention_mask=mask.to(device))
        return self.model.text_projection(found.pooler_output)

    @torch.inference_mode()
    def patches(self, tower, last: Tensor) -> Tensor:
        """[B, N, P] of a tower's last hidden state [B, 1 + N, C], as CLIP itself embeds [CLS]; not normalised."""
        return self.model.visual_projection(tower.post_layernorm(last[:, 1:]))


def load(source: str | Path, device: torch.device, dtype: torch.dtype, width: int | None = None) -> Clip:
    """A CLIP from a local folder or a cached Hugging Face name. width: hidden size of the tower that it is to project.

    Raises ValueError if it is another tower's, FileNotFoundError with the command to run if it is not here.
    """
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        build = StemClip if getattr(config.vision_config, "stem", None) else CLIPModel
        model = build.from_pretrained(source, config=config, dtype=dtype, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"this pruner compares patches with words and needs the CLIP {str(source)!r}, which is not on this "
            f"machine; fetch it with: hf download {source}"
        ) from error
    if width not in (None, model.visual_projection.in_features):
        raise ValueError(
            f"the CLIP {str(source)!r} projects patches of width {model.visual_projection.in_features}, "
            f'the model\'s tower makes {width}; name its own CLIP as "clip" in config.json'
        )
    return Clip(model.to(device).eval().requires_grad_(False), tokenizer)
