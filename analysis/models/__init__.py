"""Models by name: the embedded tiny ones, a local folder, or a Hugging Face name whose weights are already here.

python -m analysis.models     # the models that are known, what they need and how to get them
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from analysis import keys
from analysis.models import internvl, llava, llava_next, llava_onevision, minigpt_v2, qwen2_5_vl, qwen3_vl, shikra
from analysis.models.base import ATTENTION, Model
from analysis.models.clip import DEFAULT as CLIP
from analysis.registry import pick

__all__ = ["FAMILIES", "KNOWN", "MODELS", "Model", "load"]

_CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"

MODELS: dict[str, Path] = {
    name: _CHECKPOINTS / name
    for name in ("tiny-llava", "tiny-llava-wide", "tiny-llava-next", "tiny-shikra", "tiny-minigpt-v2")
}

# config.json's model_type -> module with whole_class(config) and assemble(whole, source, name, revision, device)
FAMILIES = {
    "llava": llava,
    "llava_next": llava_next,
    "shikra": shikra,
    "minigpt_v2": minigpt_v2,
    "qwen2_5_vl": qwen2_5_vl,
    # and those that `hf.pruned` and `generate` answer for, without the engine
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "llava_onevision": llava_onevision,
}


class Known(NamedTuple):
    """A published model. parameters: billions, tower included; tokens: visual, unpruned; download: GB, None where
    unknown; licence: of the weights; convert: the command that makes it of the original weights, if it has to be
    made."""

    parameters: float
    tokens: str
    download: float | None
    licence: str
    gated: bool = False
    convert: str | None = None

    @property
    def memory(self) -> float:
        """GB of the weights in 16 bits; the cache of a 7B model takes half a MB more for each token of a sequence."""
        return 2 * self.parameters


KNOWN: dict[str, Known] = {  # by their name on the Hugging Face hub, where they have one
    "llava-hf/llava-1.5-7b-hf": Known(7.06, "576", 14.1, "Llama 2"),
    "llava-hf/llava-1.5-13b-hf": Known(13.35, "576", 26.7, "Llama 2"),
    "llava-hf/llava-v1.6-vicuna-7b-hf": Known(7.06, "2340 at 640 x 480", 14.1, "Llama 2"),
    "llava-hf/llava-v1.6-mistral-7b-hf": Known(7.57, "2340 at 640 x 480", 15.1, "Apache 2.0"),
    "Shikra-7B": Known(
        7.05, "256", None, "LLaMA, non-commercial", True, "python -m analysis.models.convert shikra --help"
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": Known(3.75, "391 at 640 x 480", 7.5, "Qwen Research"),
    "Qwen/Qwen2.5-VL-7B-Instruct": Known(8.29, "391 at 640 x 480", 16.6, "Apache 2.0"),
    "Qwen/Qwen3-VL-8B-Instruct": Known(8.77, "300 at 640 x 480", 17.5, "Apache 2.0"),
    "OpenGVLab/InternVL3-8B-hf": Known(7.94, "256 for each of up to 13 tiles", 15.9, "Apache 2.0"),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": Known(8.03, "729 and its tiles", 16.1, "Apache 2.0"),
    "MiniGPT-v2": Known(7.8, "256", None, "Llama 2", True, "python -m analysis.models.convert minigpt-v2 --help"),
}


def _digest(folder: Path) -> str:
    """First 12 hex digits of the SHA-256 of the weights, files in order of name."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(keys.content(file)))
    return digest.hexdigest()[:12]


def _missing(name: str, revision: str | None = None) -> str:
    if name in MODELS:
        folder = f"analysis/checkpoints/{name}"
        return f"the checkpoint of {name!r} is not in {folder}; restore it with: git checkout -- {folder}"
    size = f" ({KNOWN[name].download} GB)" if name in KNOWN else ""
    return (
        f"{name!r} is no local folder, and its weights are not on this machine; fetch them{size} with: "
        f"hf download {name}" + (f" --revision {revision}" if revision else "")
    )


def _find(name: str, revision: str | None) -> tuple[Path, str]:
    """The folder of a model, and its revision."""
    folder = MODELS.get(name, Path(name))
    if name not in MODELS and not folder.is_dir():
        if name in KNOWN and KNOWN[name].convert:
            raise FileNotFoundError(
                f"{name} has to be converted: {KNOWN[name].convert}; then give the folder it writes"
            )
        if name.count("/") != 1:
            pick(MODELS, name, "model (neither a local folder nor a Hugging Face name owner/model)")
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise FileNotFoundError(_missing(name, revision)) from error
        return folder, folder.name
    if revision is not None:
        raise ValueError(f"a revision names a commit of a Hugging Face model; {name!r} is a folder on this machine")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(_missing(name) if name in MODELS else f"no *.safetensors in the folder {folder}")
    return folder, _digest(folder)


def _clip_files(folder: Path, name: str) -> dict[str, str]:
    """`keys.folder` of the CLIP beside a model, or of the Hugging Face cache; {} where it is not here."""
    if (folder.parent / name).is_dir():
        return keys.folder(folder.parent / name)
    try:
        return keys.folder(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not here, or no name of a model
        return {}


def _stored(folder: Path) -> list[int]:
    """How many numbers each of the folder's weights has."""
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found += [prod(weights.get_slice(key).get_shape()) for key in weights.keys()]  # noqa: SIM118 (it is no dict)
    return found


def _check_config(stored: list[int], config: PreTrainedConfig, build: type[PreTrainedModel]) -> None:
    """Raises ValueError, before memory is taken, where config.json is of a far larger model than the weights are."""
    for part in (config.vision_config, config.text_config):
        if not 0 < part.num_hidden_layers <= len(stored):
            raise ValueError(
                f"config.json has a part of {part.num_hidden_layers} layers, but the files hold "
                f"{len(stored)} weights in all"
            )
    with torch.device("meta"):
        numbers = sum(weight.numel() for weight in build(config).parameters())
    if numbers > 2 * sum(stored):
        raise ValueError(f"config.json describes {numbers} parameters, but the files hold {sum(stored)}")


def _check_memory(stored: list[int], name: str, device: str, dtype: torch.dtype) -> None:
    """Raises MemoryError where the weights alone are more than what is free."""
    numbers = sum(stored)
    needed, cuda = numbers * dtype.itemsize, device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"{name} has {numbers / 1e9:.2f} billion parameters, {needed / 1e9:.1f} GB as {str(dtype)[6:]}, but only "
            f"{free / 1e9:.1f} GB are free on {device}; take a larger GPU, a smaller model, or dtype bfloat16"
        )


def load(
    name: str | Path, revision: str | None = None, dtype: torch.dtype | str | None = None, device: str | None = None
) -> Model:
    """Load a model for inference; nothing is downloaded.

    name: in `MODELS`, a local folder in Hugging Face form, or a Hugging Face name; revision: branch, tag or commit of a
    Hugging Face model; dtype: such as torch.bfloat16 or "bfloat16"; None is float32 on the CPU and the checkpoint's own
    elsewhere; device: None takes a GPU if there is one. A local model's revision is a digest of its weights.
    Raises ValueError for an unknown name, family or dtype and for weights that do not fit, FileNotFoundError (with the
    command to run) for missing weights, MemoryError where they cannot fit.
    """
    name = str(name)
    folder, found = _find(name, revision)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if isinstance(dtype, str):
            dtype = pick({kind: getattr(torch, kind) for kind in ("float32", "bfloat16", "float16")}, dtype, "dtype")
        dtype = dtype or (torch.float32 if device == "cpu" else config.dtype or torch.float32)
        stored = _stored(folder)
        _check_memory(stored, name, device, dtype)
        family = pick(FAMILIES, config.model_type, "model family")
        build, options = family.whole_class(config)
        _check_config(stored, config, build)
        whole, info = build.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
            **dict(attn_implementation=ATTENTION) | options,
        )
        if wrong := {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}:
            raise ValueError(f"{name}: the weights do not fit config.json: {wrong}")
        shown = folder.resolve().name if Path(name).is_dir() or name in MODELS else name
        model = family.assemble(whole, source=str(folder), name=shown, revision=found, device=device)
        return replace(model, files=keys.folder(folder), clip_files=_clip_files(folder, getattr(config, "clip", CLIP)))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise FileNotFoundError(f"{folder} is incomplete: {error}") from error
    except Exception as error:  # broken files make transformers raise anything
        said = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} cannot be loaded: {said}") from error
