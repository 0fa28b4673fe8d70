"""Models by name: the embedded tiny ones, a local folder, or a Hugging Face name whose weights are already here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import AutoConfig

from analysis.models import llava, llava_next, minigpt_v2, shikra
from analysis.models.base import ATTENTION, Model
from analysis.registry import pick

__all__ = ["FAMILIES", "MODELS", "Model", "load"]

_CHECKPOINTS = Path(__file__).parents[1] / "testbed" / "checkpoints"

MODELS: dict[str, Path] = {name: _CHECKPOINTS / name for name in (
    "tiny-llava", "tiny-llava-wide", "tiny-llava-next", "tiny-shikra", "tiny-minigpt-v2")}

# config.json's model_type -> module with whole_class(config) and assemble(whole, source, name, revision, device)
FAMILIES = {"llava": llava, "llava_next": llava_next, "shikra": shikra, "minigpt_v2": minigpt_v2}


def _digest(folder: Path) -> str:
    """First 12 hex digits of the SHA-256 of the weights, files in order of name."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:12]


def _missing(name: str) -> str:
    if name in MODELS:
        folder = f"analysis/testbed/checkpoints/{name}"
        return f"the checkpoint of {name!r} is not in {folder}; restore it with: git checkout -- {folder}"
    return f"{name!r} is no local folder, and its weights are not on this machine; fetch them with: hf download {name}"


def load(name: str | Path, device: str | None = None, dtype: torch.dtype | None = None) -> Model:
    """Load a model for inference; nothing is downloaded.

    name: in `MODELS`, a local folder in Hugging Face form, or a Hugging Face name; device: None takes a GPU if there
    is one; dtype: None is float32 on the CPU and the checkpoint's own elsewhere. A local model's revision is a digest
    of its weights, a Hugging Face model's its commit.
    Raises ValueError for an unknown name or family, FileNotFoundError (with the command to run) for missing weights.
    """
    name = str(name)
    folder = MODELS.get(name, Path(name))
    local = folder.is_dir()
    if not local and name not in MODELS and name.count("/") != 1:
        pick(MODELS, name, "model (neither a local folder nor a Hugging Face name owner/model)")
    if local and not any(folder.glob("*.safetensors")) or not local and name in MODELS:
        raise FileNotFoundError(_missing(name) if name in MODELS else f"no *.safetensors in the folder {folder}")
    source = str(folder) if local else name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else "auto")
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        revision = _digest(folder) if local else config._commit_hash
        family = pick(FAMILIES, config.model_type, "model family")
        build, options = family.whole_class(config)
        whole, info = build.from_pretrained(
            source, config=config, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True,
            output_loading_info=True, **options,
        )
        if wrong := {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}:
            raise ValueError(f"{name}: the weights do not fit config.json: {wrong}")
        shown = folder.resolve().name if local else name
        return family.assemble(whole, source=source, name=shown, revision=revision, device=device)
    except OSError as error:
        raise FileNotFoundError(f"{folder} is incomplete: {error}" if local else _missing(name)) from error
