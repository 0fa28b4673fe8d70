"""LLaVA-1.5: CLIP tower, two-layer projector, Llama decoder (arXiv:2310.03744).

Facts this file fixes, from the upstream code: the image is padded to a centred square, never cropped (transformers'
own processor crops); the connector reads one hidden layer of the tower without its [CLS] token; the prompt is
upstream's "vicuna_v1" with the image first; a box is answered as fractions of the padded square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor, nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from analysis.models import clip
from analysis.testbed.tower import install_stem
from analysis.types import Signals, VisualTokens

FILL = (122, 116, 104)  # CLIP's mean colour, in whole numbers as upstream
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
REC_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}"
# CLS attention needs eager attention in the tower; `decode` needs a decoder that takes a 4-D mask.
ATTENTION = {"vision_config": "eager", "text_config": "sdpa"}


def prompt_text(question: str) -> str:
    """The vicuna_v1 prompt of any question about one image; "<image>" stands for the visual tokens."""
    return f"{SYSTEM} USER: <image>\n{question} ASSISTANT:"


def pad_to_square(image: Image.Image) -> Image.Image:
    """The image centred in a square of its longer side, at whole-pixel offsets; the frame "padded" inverts this."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), FILL)
    square.paste(image, tuple((side - length) // 2 for length in image.size))
    return square


@dataclass(frozen=True)
class Model:
    """A LLaVA ready to answer.

    name, revision: which weights; grid: rows, columns of visual tokens; decoder, head, embed: as `decode.greedy` takes
    them; eos: token ID that ends an answer; mean, std: [3] of the tower's input; layer: hidden layer the connector
    reads; clip: loads the CLIP whose words the tower's patches compare with; dialect, frame: names in `rec.boxes`;
    max_new_tokens: a box takes about two dozen tokens.
    """

    name: str
    revision: str
    grid: tuple[int, int]
    tower: nn.Module
    connector: nn.Module
    decoder: nn.Module
    head: nn.Module
    embed: nn.Embedding
    tokenizer: PreTrainedTokenizerBase
    image_token: int
    eos: int
    layer: int
    clip: Callable[[], clip.Clip]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dialect: str = "llava"
    frame: str = "padded"
    max_new_tokens: int = 40

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Input of the tower, [B, 3, S, S]: padded, resized to S = image_size (bicubic), normalised."""
        side = self.tower.config.image_size
        squares = [pad_to_square(image.convert("RGB")).resize((side, side), Resampling.BICUBIC) for image in images]
        raw = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
        mean, std = torch.tensor([self.mean, self.std])[:, :, None, None]
        return ((raw / 255 - mean) / std).to(self.device, self.dtype)

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> VisualTokens:
        """Encode B >= 1 images once, with the signals of `types.Signals` that need no text."""
        hidden = self.tower(self.pixels(images), output_hidden_states=True).hidden_states
        read, before, second_last, last = hidden[self.layer], hidden[self.layer - 1], hidden[-2], hidden[-1]
        block, final = self.tower.encoder.layers[self.layer - 1], self.tower.encoder.layers[-1]  # `block` makes `read`

        @torch.inference_mode()
        def cls_attention() -> Tensor:
            weights = block.self_attn(block.layer_norm1(before))[1]  # [B, heads, 1 + N, 1 + N]
            return weights[:, :, 0, 1:].mean(dim=1)

        signals = Signals(
            patches=lambda: read[:, 1:], cls=lambda: read[:, 0], cls_attention=cls_attention,
            keys=lambda: final.self_attn.k_proj(final.layer_norm1(second_last)),
            cls_query=lambda: final.self_attn.q_proj(final.layer_norm1(second_last[:, 0])),
            clip_patches=lambda: self.clip().patches(self.tower, last),
        )
        return VisualTokens(self.connector(read[:, 1:]), self.grid, signals, self.connector)

    def texts(self, expressions: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
        """The signals of `types.Signals` that need text, as thunks, for one expression an image."""
        questions = [REC_QUESTION.format(expression) for expression in expressions]
        return {"clip_text": lambda: self.clip().text(expressions), "clip_prompt": lambda: self.clip().text(questions)}

    def ask(self, question: str) -> tuple[Tensor, Tensor]:
        """Token IDs [P], [S] before and after the image of any question. ValueError if it holds "<image>" itself."""
        # BOS by hand: whether a tokenizer adds it itself depends on how it was saved
        text = self.tokenizer(prompt_text(question), add_special_tokens=False).input_ids
        ids = torch.tensor([self.tokenizer.bos_token_id, *text])
        (places,) = (ids == self.image_token).nonzero(as_tuple=True)
        if len(places) != 1:
            raise ValueError(f"a prompt needs exactly one image token, got {len(places)} for the question {question!r}")
        ids = ids.to(self.device)
        return ids[: places[0]], ids[places[0] + 1 :]

    def prompt(self, expression: str) -> tuple[Tensor, Tensor]:
        """`ask` for the box of a referring expression."""
        return self.ask(REC_QUESTION.format(expression))

    def prompt_text(self, expression: str) -> str:
        """The whole prompt of `prompt` in words."""
        return prompt_text(REC_QUESTION.format(expression))

    def text(self, tokens: Sequence[int]) -> str:
        """The answer's text, without special tokens and surrounding white space."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


class StemLlava(LlavaForConditionalGeneration):
    """LLaVA with the testbed's convolutional stem as patch embedding; `vision_config.stem` holds its channels."""

    def __init__(self, config):
        super().__init__(config)
        install_stem(self.model.vision_tower.embeddings, config.vision_config)


def _normalisation(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation [3] from the preprocessor's file, CLIP's where there is none."""
    try:
        written = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=True)[0]
    except OSError:
        written = {}
    return tuple(written.get("image_mean", OPENAI_CLIP_MEAN)), tuple(written.get("image_std", OPENAI_CLIP_STD))


def load(source: str, config, name: str, revision: str, device: str, dtype: torch.dtype | str) -> Model:
    """Build a Model from a local folder or a cached Hugging Face name; `models.load` is the front door.

    Raises ValueError where weights are missing, surplus or of another shape, and for a variant of LLaVA that reads
    several layers or keeps [CLS]. Raises OSError where a file is missing.
    """
    layer, vision = config.vision_feature_layer, config.vision_config
    if not isinstance(layer, int) or config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"{name}: only one feature layer without [CLS] is supported, got vision_feature_layer {layer} and "
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}"
        )
    layer = layer % (vision.num_hidden_layers + 1)
    if layer == 0:
        raise ValueError(f"{name}: vision_feature_layer {config.vision_feature_layer} is the tower's input")
    # transformers renames the saved key of the head for its own classes only
    build, renamed = LlavaForConditionalGeneration, None
    if getattr(vision, "stem", None):
        build, renamed = StemLlava, {r"^language_model\.lm_head": "lm_head"}
    whole, info = build.from_pretrained(
        source, config=config, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True,
        output_loading_info=True, key_mapping=renamed,
    )
    if wrong := {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}:
        raise ValueError(f"{name}: the weights do not fit config.json: {wrong}")
    whole = whole.to(device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: tokenizer_config.json must name bos_token, which begins prompts, and eos_token")
    mean, std = _normalisation(source)
    words = getattr(config, "clip", clip.DEFAULT)  # the name of a folder beside the model's, or a Hugging Face name
    if (beside := Path(source).parent / words).is_dir():
        words = beside
    side = vision.image_size // vision.patch_size
    return Model(
        name=name, revision=revision, grid=(side, side), tower=whole.model.vision_tower,
        connector=whole.model.multi_modal_projector, decoder=whole.model.language_model, head=whole.lm_head,
        embed=whole.get_input_embeddings(), tokenizer=tokenizer, image_token=config.image_token_id,
        eos=tokenizer.eos_token_id, layer=layer, mean=mean, std=std,
        clip=cache(lambda: clip.load(words, whole.device, whole.dtype, vision.hidden_size)),
    )
