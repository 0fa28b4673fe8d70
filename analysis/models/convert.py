"""Make folders that `models.load` takes from the files that Shikra and MiniGPT-v2 publish.

    python -m analysis.models.convert shikra --help
    python -m analysis.models.convert minigpt-v2 --help

Names, shapes and rules are those of the upstream code: apply_delta.py and shikra.py (github.com/shikras/shikra);
minigpt_v2.py, base_model.py and eva_vit.py (github.com/Vision-CAIR/MiniGPT-4).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    Blip2VisionConfig,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from analysis.models.minigpt_v2 import MiniGPTv2Config, MiniGPTv2ForConditionalGeneration
from analysis.models.shikra import ShikraConfig, ShikraForConditionalGeneration

Weights = Mapping[str, Tensor]

SHIKRA_CLIP = "openai/clip-vit-large-patch14"
SHIKRA_SIDE = 224  # pixels; LLaVA's CLIP, of 336, would fit, too
SHIKRA_WORDS = ("<im_patch>", "<im_start>", "<im_end>")
# the tower of MiniGPT-v2: eva_vit_g.pth without its last block, at twice the side it was trained at
EVA = dict(
    hidden_size=1408,
    intermediate_size=6144,
    num_hidden_layers=39,
    num_attention_heads=16,
    image_size=448,
    patch_size=14,
    layer_norm_eps=1e-6,
)
RANK, ALPHA = 64, 16  # of MiniGPT-v2's LoRA

# what is looked for in a folder, best first
FILES = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
SHARD = "5GB"

# (in the name of a weight of our class, in upstream's), applied in this order
SHIKRA_NAMES = (
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.", "model.mm_projector."),
    ("model.vision_tower.", "vision_model."),
)
MINIGPT_V2_NAMES = (
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.", "llama_proj."),
    ("model.vision_tower.post_layernorm.", "ln_vision."),
    ("model.vision_tower.embeddings.class_embedding", "cls_token"),
    ("model.vision_tower.embeddings.position_embedding", "pos_embed"),
    ("model.vision_tower.embeddings.patch_embedding.", "patch_embed.proj."),
    ("model.vision_tower.encoder.layers.", "blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
)

# keys that are known and not needed, as patterns
BUFFERS = r"\.rotary_emb\.inv_freq$"  # saved by old transformers, computed by new
CLIP_UNUSED = r"position_ids$|^text_model\.|^(text|visual)_projection\.|^logit_scale$"
# upstream's tower ends with its blocks, and has neither masks nor relative positions
EVA_UNUSED = r"^(norm|fc_norm|head)\.|^mask_token$|^rel_pos|\.relative_position_(index|bias_table)$"


def names_and_shapes(
    build: type[PreTrainedModel], config: PreTrainedConfig, pairs: tuple[tuple[str, str], ...]
) -> dict[str, tuple[str, torch.Size]]:
    """{our name: (upstream's name, shape)} of every weight of the class; none is made."""
    with torch.device("meta"):
        weights = build(config).state_dict()
    found = {}
    for ours, weight in weights.items():
        theirs = ours
        for old, new in pairs:
            theirs = theirs.replace(old, new)
        found[ours] = theirs, weight.shape
    return found


def checked(weights: Weights, shapes: Mapping[str, tuple[int, ...]], source: str, unused: str) -> dict[str, Tensor]:
    """The weights that `shapes` asks for by name. source: words for where they are from; unused: pattern of the names
    that may be there and are dropped. Raises ValueError with the names that are missing, left over or of another shape.
    """
    wrong = {
        "missing": [name for name in shapes if name not in weights],
        "left over": [name for name in weights if name not in shapes and not re.search(unused, name)],
        "of another shape": [
            f"{name} {list(weights[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in weights and weights[name].shape != shape
        ],
    }
    if said := [
        f"{kind}: {', '.join(names[:8])}" + f" and {len(names) - 8} more" * (len(names) > 8)
        for kind, names in wrong.items()
        if names
    ]:
        raise ValueError(f"{source} does not have the weights it should have; {'; '.join(said)}")
    return {name: weights[name] for name in shapes}


def shikra_weights(
    delta: Weights, llama: Weights, clip: Weights, config: ShikraConfig, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """The weights of `ShikraForConditionalGeneration` from dictionaries in upstream's names.

    LLaMA is added to the delta, to the first rows where the delta has more words; the connector is in the delta whole.
    Sums are in float32. Raises ValueError where a dictionary is not as `config` wants it.
    """
    names = names_and_shapes(ShikraForConditionalGeneration, config, SHIKRA_NAMES)
    shapes = dict(names.values())
    if not any(name.startswith("vision_model.") for name in clip):  # newer CLIPVisionModel folders leave it out
        clip = {f"vision_model.{name}": weight for name, weight in clip.items()}
    tower = {name: shape for name, shape in shapes.items() if name.startswith("vision_model.")}
    own = {name: shape for name, shape in shapes.items() if name not in tower}
    base = {name: shape for name, shape in own.items() if "mm_projector" not in name}
    for name in base.keys() & llama.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        rows, width = base[name]
        base[name] = (min(rows, len(llama[name])), width)
    clip = checked(clip, tower, "the CLIP tower", CLIP_UNUSED)
    delta, llama = checked(delta, own, "the delta", BUFFERS), checked(llama, base, "LLaMA", BUFFERS)
    whole = {}
    for ours, (theirs, _) in tqdm(names.items(), "adding", unit=" weights", leave=False):
        weight = clip[theirs] if theirs in clip else delta[theirs]
        if theirs in llama:
            weight = weight.to(torch.float32, copy=True)
            weight[: len(llama[theirs])] += llama[theirs]
        whole[ours] = weight.to(dtype)
    return whole


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """EVA's position embedding [1, 1 + n * n, C] -> [1, 1 + grid * grid, C], bicubic in float32; [CLS]'s is kept.

    Raises ValueError where the patches are no square.
    """
    side = round(max(positions.shape[1] - 1, 0) ** 0.5) if positions.dim() == 3 else 0
    if not side or positions.shape[:2] != (1, 1 + side**2):
        raise ValueError(f"pos_embed has the shape {list(positions.shape)}; it should be [1, 1 + n * n, width]")
    if side == grid:
        return positions
    cls, patches = positions.float().split([1, side**2], dim=1)
    image = patches.transpose(1, 2).unflatten(2, (side, side))
    image = interpolate(image, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, image.flatten(2).transpose(1, 2)], dim=1)


LLAMA = "llama_model.base_model.model."  # what stands before Llama's own names in a MiniGPT checkpoint


def _plain(checkpoint: Weights) -> dict[str, Tensor]:
    """A MiniGPT checkpoint without what parallel training and other versions of peft write into its names."""

    def plain(name: str) -> str:
        name = name.removeprefix("module.").replace(".base_layer.", ".")
        return re.sub(r"(\.lora_[AB])\.default\.weight$", r"\1.weight", name)

    return {plain(name): weight for name, weight in checkpoint.items()}


def _lora(name: str, side: str) -> str:
    """Upstream's name of one of the two matrices, "A" or "B", that change a weight of Llama."""
    return f"{LLAMA}{name.removesuffix('weight')}lora_{side}.weight"


def minigpt_v2_weights(
    checkpoint: Weights,
    eva: Weights,
    llama: Weights,
    config: MiniGPTv2Config,
    dtype: torch.dtype = torch.float16,
    rank: int = RANK,
    alpha: float = ALPHA,
) -> dict[str, Tensor]:
    """The weights of `MiniGPTv2ForConditionalGeneration` from dictionaries in upstream's names.

    LoRA is merged: W [D, D] + alpha / rank * B [D, rank] @ A [rank, D], in float32; EVA's and Llama's weights that the
    checkpoint has, too (a state of the whole model), are the checkpoint's. Raises ValueError where a dictionary is not
    as `config` wants it.
    """
    names = names_and_shapes(MiniGPTv2ForConditionalGeneration, config, MINIGPT_V2_NAMES)
    shapes, vision = dict(names.values()), config.vision_config
    base = {name: shape for name, shape in shapes.items() if name.startswith(("model.", "lm_head."))}
    own = {name: shape for name, shape in shapes.items() if name.startswith(("llama_proj.", "ln_vision."))}
    tower = {name: shape for name, shape in shapes.items() if name not in base and name not in own}
    for name in [name for name in tower if name.endswith("qkv.bias")]:  # the keys have none
        del tower[name]
        tower |= {name.replace("qkv.bias", f"{part}_bias"): (vision.hidden_size,) for part in "qv"}
    for name in [name for name in base if name.endswith(("q_proj.weight", "v_proj.weight"))]:
        outputs, inputs = base[name]
        own |= {_lora(name, "A"): (rank, inputs), _lora(name, "B"): (outputs, rank)}

    checkpoint, prefix = _plain(checkpoint), "visual_encoder."
    eva = dict(eva) | {n.removeprefix(prefix): weight for n, weight in checkpoint.items() if n.startswith(prefix)}
    frozen = [name for name in checkpoint if name.startswith(LLAMA) and name not in own]
    llama = dict(llama) | {name.removeprefix(LLAMA): checkpoint.pop(name) for name in frozen}
    if "pos_embed" in eva:
        eva["pos_embed"] = resized_positions(eva["pos_embed"], vision.image_size // vision.patch_size)
    llama = checked(llama, base, "Llama-2", BUFFERS)
    one_more = rf"^blocks\.{vision.num_hidden_layers}\."  # EVA's own last block, which upstream leaves out
    found = checked(eva, tower, "EVA", f"{EVA_UNUSED}|{one_more}") | checked(
        checkpoint, own, "the checkpoint", rf"{BUFFERS}|^visual_encoder\."
    )
    whole = {}
    for ours, (theirs, _) in tqdm(names.items(), "merging", unit=" weights", leave=False):
        if theirs.endswith("qkv.bias"):
            q, v = (found[theirs.replace("qkv.bias", f"{part}_bias")] for part in "qv")
            weight = torch.cat([q, torch.zeros_like(v), v])
        else:
            weight = llama[theirs] if theirs in llama else found[theirs]
        if _lora(theirs, "A") in found:
            a, b = (found[_lora(theirs, side)].float() for side in "AB")
            weight = weight.float() + alpha / rank * (b @ a)
        whole[ours] = weight.to(dtype)
    return whole


def read_weights(source: Path) -> dict:
    """The contents of a torch file, or the weights of a folder in Hugging Face form, safetensors where there are both.

    They stay on disk until used, but for torch files of before 2020. Raises FileNotFoundError for a folder without
    weights, ValueError for a file that is cut off or that holds, in a pickle, more than tensors and plain values.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} is not there")
    if source.is_dir():
        files = next(filter(None, (sorted(source.glob(pattern)) for pattern in FILES)), None)
        if files is None:
            raise FileNotFoundError(f"{source} holds no weights; it should have one of {', '.join(FILES)}")
        return {name: weight for file in files for name, weight in tensors(read_weights(file), file).items()}
    try:
        if source.suffix == ".safetensors":
            return load_file(source)
        return torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # cut files make torch fail in many ways, struct.error and IndexError among them
        raise ValueError(
            f"{source} is cut off, or holds more than weights, and is not read; download it again"
        ) from error


def tensors(found: object, source: Path) -> dict[str, Tensor]:
    """What was read, if it is a dictionary of tensors; ValueError if not."""
    if isinstance(found, dict) and found and all(isinstance(weight, Tensor) for weight in found.values()):
        return found
    held = f"a dictionary of {', '.join(map(str, [*found][:8]))}" if isinstance(found, dict) else type(found).__name__
    raise ValueError(f"{source} should hold tensors by name; it holds {held}")


def read_config(kind: type[PreTrainedConfig], folder: Path, **changes) -> PreTrainedConfig:
    """A folder's configuration as one of `kind`; FileNotFoundError without config.json."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; it should be a model's folder in Hugging Face form")
    return kind.from_pretrained(folder, local_files_only=True, **changes)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer; ImportError with the command to run where it takes a package that is not installed."""
    old = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if old and not (is_sentencepiece_available() and is_protobuf_available()):
        raise ImportError(
            f"{folder} has a tokenizer.model and no tokenizer.json; to read it: pip install sentencepiece protobuf"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def refuse_full(out: Path) -> None:
    """Raises FileExistsError if there is something at `out` other than an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; give --out a new folder")


def write(
    out: Path,
    build: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a folder that `models.load` takes. It has its name only when it is whole: until then it lies in
    ".NAME-..." beside, which a killed run leaves there and which may be deleted."""
    with torch.device("meta"):
        whole = build(config)
    whole.load_state_dict(weights, assign=True)
    side = config.vision_config.image_size
    pixels = dict(
        image_processor_type="CLIPImageProcessor",
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
        size=dict(height=side, width=side),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        folder = Path(beside) / out.name
        whole.save_pretrained(folder, max_shard_size=SHARD)
        tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2))
        folder.rename(out)


def shikra(delta: Path, llama: Path, clip: Path, out: Path, dtype: str = "float16") -> None:
    """Write Shikra's folder from three folders in Hugging Face form.

    Raises ValueError for weights or a tokenizer that are not Shikra's, OSError for files that are missing, ImportError.
    """
    refuse_full(out)
    text, tokenizer = read_config(LlamaConfig, delta, pad_token_id=None), read_tokenizer(delta)
    words = tokenizer.get_vocab()
    if absent := [word for word in SHIKRA_WORDS if word not in words]:
        raise ValueError(f"the tokenizer in {delta} has no {', '.join(absent)}; --delta should be Shikra's own folder")
    if max(words.values()) >= text.vocab_size:
        raise ValueError(
            f"the tokenizer in {delta} has IDs up to {max(words.values())}, but its config.json says "
            f"vocab_size {text.vocab_size}; both should be those of one download"
        )
    vision = read_config(CLIPVisionConfig, clip)
    if vision.image_size != SHIKRA_SIDE:
        raise ValueError(
            f"the tower in {clip} takes images of {vision.image_size} pixels; --clip should be "
            f"{SHIKRA_CLIP}, which takes {SHIKRA_SIDE}"
        )
    config = ShikraConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-2,
        clip=SHIKRA_CLIP,
        image_token_index=words["<im_patch>"],
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
    )
    weights = shikra_weights(
        read_weights(delta), read_weights(llama), read_weights(clip), config, getattr(torch, dtype)
    )
    write(out, ShikraForConditionalGeneration, config, weights, tokenizer)


def minigpt_v2(checkpoint: Path, eva: Path, llama: Path, out: Path, dtype: str = "float16", vision: dict = EVA) -> None:
    """Write MiniGPT-v2's folder from two torch files and a folder in Hugging Face form. vision: EVA's sizes.

    Raises ValueError for weights that are not as upstream's, OSError for files that are missing, ImportError.
    """
    refuse_full(out)
    text, tokenizer = read_config(LlamaConfig, llama, pad_token_id=None), read_tokenizer(llama)
    held = read_weights(checkpoint)
    # weights alone, or a training state, which has them at "model"
    own = _plain(tensors(held["model"] if isinstance(held, dict) and "model" in held else held, checkpoint))
    if not any(name.startswith("ln_vision.") for name in own):
        # upstream freezes this norm as it is made, and saves only what it trains
        print(f"{checkpoint} has no ln_vision: the norm after the tower gets upstream's initial weight 1 and bias 0")
        width = vision["hidden_size"]
        own = own | {"ln_vision.weight": torch.ones(width), "ln_vision.bias": torch.zeros(width)}
    # MiniGPTv2 cuts prompts at "<ImageHere>" before they are tokenized, so that no ID stands for the image
    config = MiniGPTv2Config(
        vision_config=Blip2VisionConfig(**vision),
        text_config=text,
        vision_feature_layer=-1,
        image_token_index=text.vocab_size,
    )
    weights = minigpt_v2_weights(
        own, tensors(read_weights(eva), eva), read_weights(llama), config, getattr(torch, dtype)
    )
    write(out, MiniGPTv2ForConditionalGeneration, config, weights, tokenizer)


def main(arguments: list[str] | None = None) -> None:
    """The command line; a refusal is one message and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m analysis.models.convert", description=__doc__.partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)

    def command(name: str, convert: Callable, says: str, **inputs: str) -> None:
        kind = kinds.add_parser(name, help=says, description=f"{says} Takes as much memory as it writes.")
        for option, words in inputs.items():
            metavar, _, words = words.partition(": ")
            kind.add_argument(f"--{option}", type=Path, required=True, metavar=metavar, help=words)
        kind.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="what is written: a new folder")
        kind.add_argument(
            "--dtype",
            choices=["float16", "bfloat16", "float32"],
            default="float16",
            help="of the weights written; %(default)s, as upstream, if not given",
        )
        kind.set_defaults(convert=convert)

    command(
        "shikra",
        shikra,
        "Shikra-7B: its delta added to LLaMA-7B, with CLIP's tower; 14 GB.",
        delta="FOLDER: where you put hf download shikras/shikra-7b-delta-v1 (14 GB; the model of the paper)",
        llama="FOLDER: LLaMA-7B, the first LLaMA, in Hugging Face form (13.5 GB; Meta grants access on request)",
        clip=f"FOLDER: where you put hf download {SHIKRA_CLIP} (1.7 GB; the one of 224 pixels)",
    )
    command(
        "minigpt-v2",
        minigpt_v2,
        "MiniGPT-v2: its LoRA merged into Llama-2-chat-7B, with EVA's tower; 16 GB.",
        checkpoint="FILE: a MiniGPT-v2 .pth (some 0.2 GB of LoRA and connector) by the links in the README of "
        "github.com/Vision-CAIR/MiniGPT-4",
        eva="FILE: eva_vit_g.pth (2 GB) from "
        "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth",
        llama="FOLDER: where you put hf download meta-llama/Llama-2-7b-chat-hf (13.5 GB; Meta grants access on "
        "request)",
    )
    given = vars(parser.parse_args(arguments))
    del given["kind"]
    try:
        given.pop("convert")(**given)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {given['out']}; load it with models.load({str(given['out'])!r})")


if __name__ == "__main__":
    main()
