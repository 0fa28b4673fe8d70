"""CLIP's joint space of image and text, for pruners that compare patches with words.

A LLaVA brings CLIP's vision tower but neither its text tower nor the two projections, so those come from a CLIP
beside it: `clip` in the model's config.json names it, the embedded default of LLaVA-1.5 is `DEFAULT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
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

    def ids(self, texts: Sequence[str]) -> list[Tensor]:
        """Token IDs of n texts, special tokens in them as text; each cut to what CLIP reads, its end token kept."""
        limit, eos = self.model.config.text_config.max_position_embeddings, self.tokenizer.eos_token_id
        rows = [self.tokenizer(text, split_special_tokens=True).input_ids for text in texts]
        # whether a tokenizer adds the end token depends on how it was saved
        rows = [row[:-1] if row[-1:] == [eos] else row for row in rows]
        return [torch.tensor([*row[: limit - 1], eos]) for row in rows]

    @torch.inference_mode()
    def text(self, texts: Sequence[str]) -> Tensor:
        """[n, P] of n texts, not normalised."""
        rows, device = self.ids(texts), self.model.text_projection.weight.device
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.eos_token_id)
        found = self.model.text_model(input_ids=ids.to(device), attention_mask=mask.to(device))
        return self.model.text_projection(found.pooler_output)

    @torch.inference_mode()
    def patches(self, tower, hidden: Tensor) -> Tensor:
        """[B, N, P] of a tower's hidden state [B, 1 + N, C], as CLIP embeds the last one's [CLS]; not normalised."""
        return self.model.visual_projection(tower.post_layernorm(hidden[:, 1:]))


def _folder(source: str | Path) -> Path:
    """The folder of a CLIP's files; FileNotFoundError with the command to run if it is not on this machine."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"this pruner compares patches with words and needs the CLIP {str(source)!r}, which is not on this "
            f"machine; fetch it with: hf download {source}"
        ) from error


def load(source: str | Path, device: torch.device, dtype: torch.dtype, width: int | None = None) -> Clip:
    """A CLIP from a local folder or a cached Hugging Face name. width: hidden size of the tower that it is to project.

    Weights are read from safetensors, or where there are none, as in `DEFAULT`, from a torch file, of which only
    tensors are read. Raises ValueError if it is another tower's, cannot be read, or its tokenizer is not its text
    tower's; FileNotFoundError with the command to run if it or one of its files is not here.
    """
    folder, shown = _folder(source), f"the CLIP {str(source)!r}"
    safe = any(folder.glob("*.safetensors"))
    if not safe and not any(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(f"{shown} has no weights: {folder} holds neither *.safetensors nor pytorch_model.bin")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.model_type != "clip":
            raise ValueError(f"config.json is of a {config.model_type!r} model, not of a CLIP")
        build = StemClip if getattr(config.vision_config, "stem", None) else CLIPModel
        how = dict(config=config, dtype=dtype, local_files_only=True, output_loading_info=True)
        model, info = build.from_pretrained(folder, use_safetensors=safe, weights_only=True, **how)
        # old files also hold buffers, which are unexpected and say nothing
        if lacking := {
            kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]
        }:
            raise ValueError(f"the weights do not fit config.json: {lacking}")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # broken files make transformers raise anything
        said = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{shown} in {folder} cannot be loaded: {said}") from error
    if width not in (None, model.visual_projection.in_features):
        raise ValueError(
            f"{shown} projects patches of width {model.visual_projection.in_features}, "
            f'the model\'s tower makes {width}; name its own CLIP as "clip" in config.json'
        )
    words = config.text_config.vocab_size
    if len(tokenizer) != words or tokenizer.eos_token_id is None:  # transformers makes an empty one where there is none
        raise ValueError(
            f"{shown} has no tokenizer of its own: that in {folder} knows {len(tokenizer)} tokens, its text tower "
            f"{words}; the folder should have tokenizer.json, or vocab.json and merges.txt, of the same download"
        )
    return Clip(model.to(device).eval().requires_grad_(False), tokenizer)
