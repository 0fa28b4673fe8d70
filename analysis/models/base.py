"""What a model offers the rest of the library: encode images once, split a prompt at the image, read an answer.

A family (one file each) is a subclass of `Model` that says how it pads, asks and answers, with a `load` that builds it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from analysis.engine import shared_prefix
from analysis.engine.decode import LanguageModel
from analysis.models import clip, towers
from analysis.types import Signals, VisualTokens

# Vicuna's, and of all that is tuned from it
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# CLS attention needs eager attention in the tower; `decode` needs a decoder that takes a 4-D mask.
ATTENTION = {"vision_config": "eager", "text_config": shared_prefix.NAME}
LONGEST = 2**14  # pixels of an image's longer side: its square in RGB takes 0.8 GB


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token IDs of a text in which no added token is read, also where its letters spell one, such as "<image>"."""
    if not tokenizer.is_fast:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    # `split_special_tokens` still reads added tokens that are not marked as special, so the pipeline is run without any
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [token.id for part in parts for token in backend.model.tokenize(part)]


def pad_to_square(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """The image centred in a square of its longer side, at whole-pixel offsets; the frame "padded" inverts this."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, tuple((side - length) // 2 for length in image.size))
    return square


@dataclass(frozen=True, kw_only=True)
class Model(LanguageModel):
    """A multimodal model ready to answer.

    name, revision: which weights; grid: rows, columns of visual tokens (of the whole image, where there are tiles;
    None where they vary by image); tower, connector: as `encode` takes them; image_token: ID that stands for the
    visual tokens in a tokenized prompt; mean, std: [3] of the tower's input; layer: hidden layer the connector reads;
    clip: loads the CLIP whose words the tower's patches compare with; chat: the whole prompt, "{}" for a message;
    files, clip_files: digests of its folder and of its CLIP's (`keys.folder`), which are part of a row's key. The rest
    is `decode.LanguageModel`'s; its 40 new tokens are enough for a box in a vocabulary of 32,000.

    Of a family: ask_for: message of any question about one image, rec: of a referring expression, both with the image's
    words `image` in them and "{}" for the question or expression; marks: the special tokens of `image` that enclose the
    visual tokens; box_format, frame: names in `rec.boxes`; token_frame: the frame of what the visual tokens show; fill:
    RGB of the padding.
    """

    name: str
    revision: str
    grid: tuple[int, int] | None
    tower: nn.Module
    connector: nn.Module
    tokenizer: PreTrainedTokenizerBase
    image_token: int
    layer: int
    clip: Callable[[], clip.Clip]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    chat: str = f"{SYSTEM} USER: {{}} ASSISTANT:"
    files: Mapping[str, str] = field(default_factory=dict)
    clip_files: Mapping[str, str] = field(default_factory=dict)

    image: ClassVar[str] = "<image>"
    marks: ClassVar[tuple[str, str] | None] = None
    ask_for: ClassVar[str]
    rec: ClassVar[str]
    box_format: ClassVar[str]
    frame: ClassVar[str]
    token_frame: ClassVar[str] = "padded"
    fill: ClassVar[tuple[int, int, int]]

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def layout(self, size: tuple[int, int]) -> Hashable:
        """Images whose sizes (width, height) have equal layouts can be encoded in one batch; here all can.

        Raises ValueError for an image that cannot be read, here one too long to be padded to a square.
        """
        if max(size) > LONGEST:
            raise ValueError(f"an image of {size[0]} x {size[1]} pixels is too long; {LONGEST} pixels are the most")
        return None

    def squared(self, image: Image.Image) -> Image.Image:
        """The image as a square, before it is resized to the tower's."""
        return pad_to_square(image, self.fill)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Input of the tower, [B, 3, S, S]: squared, resized to S = image_size (bicubic), normalised."""
        side = self.tower.config.image_size
        squares = [self.squared(image.convert("RGB")).resize((side, side), Resampling.BICUBIC) for image in images]
        return self.normalised(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2))

    def normalised(self, raw: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] as the tower takes it."""
        mean, std = torch.tensor([self.mean, self.std])[:, :, None, None]
        return ((raw / 255 - mean) / std).to(self.device, self.dtype)

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> VisualTokens:
        """Encode B >= 1 images once, with the signals of `types.Signals` that need no text.

        Raises ValueError for images of several layouts.
        """
        if len({self.layout(image.size) for image in images}) > 1:
            raise ValueError("images of several layouts cannot be encoded in one batch; see `layout`")
        return self.see(self.pixels(images), images[0].size)

    def see(self, pixels: Tensor, size: tuple[int, int]) -> VisualTokens:
        """`encode` from the tower's input on; size: width and height of one of the images, all of one `layout`."""
        signals = self.look(pixels)
        return VisualTokens(self.connector(signals.patches), self.grid, signals, self.connector)

    def look(self, pixels: Tensor) -> Signals:
        """Run the tower, a CLIP, on [B, 3, S, S]."""
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states
        return towers.clip_signals(self.tower, hidden, self.layer, self.clip)

    def texts(self, expressions: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
        """The signals of `types.Signals` that need text, as thunks, for one expression an image."""
        words = " ".join(self.rec.replace(self.image, "").split())
        questions = [words.format(expression) for expression in expressions]
        return {"clip_text": lambda: self.clip().text(expressions), "clip_prompt": lambda: self.clip().text(questions)}

    def split(self, message: str, words: str) -> tuple[Tensor, Tensor]:
        """Token IDs [P], [S] of the whole prompt before and after the image.

        message: such as `rec`; words: what stands for its "{}", read as plain text whatever it spells. As in all
        upstream codes, each side of the image is tokenized by itself, so that both begin with a piece "▁" whatever the
        settings of a Llama tokenizer. Raises ValueError unless the message has one image.
        """
        sides = self.chat.format(message).split(self.image)
        if len(sides) != 2:
            raise ValueError(f"a prompt needs exactly one image {self.image!r}, got {len(sides) - 1} in {message!r}")
        before, after = sides
        # BOS by hand: whether a tokenizer adds it itself depends on how it was saved
        start = [self.tokenizer.bos_token_id]
        while before.startswith(self.tokenizer.bos_token):
            before = before.removeprefix(self.tokenizer.bos_token)
            start.append(self.tokenizer.bos_token_id)
        if self.marks:  # upstream's tokenizer drops the spaces beside them
            before, after = before.rstrip(), after.lstrip()
        start += plain_ids(self.tokenizer, before.replace("{}", words))
        end = plain_ids(self.tokenizer, after.replace("{}", words))
        if self.marks:
            opening, closing = self.tokenizer.convert_tokens_to_ids(list(self.marks))
            start, end = [*start, opening], [closing, *end]
        return torch.tensor(start, device=self.device), torch.tensor(end, device=self.device)

    def ask(self, question: str) -> tuple[Tensor, Tensor]:
        """`split` for any question about the image."""
        return self.split(self.ask_for, question)

    def prompt(self, expression: str) -> tuple[Tensor, Tensor]:
        """`split` for the box of a referring expression."""
        return self.split(self.rec, expression)

    def prompt_text(self, expression: str) -> str:
        """The whole prompt of `prompt` in words."""
        return self.chat.format(self.rec.format(expression))

    def text(self, tokens: Sequence[int]) -> str:
        """The answer's text, without special tokens and surrounding white space."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def _normalisation(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation [3] from the preprocessor's file, CLIP's where there is none; else ValueError."""
    try:
        written = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=True)[0]
    except OSError:
        written = {}
    found = [written.get(f"image_{key}", clip) for key, clip in (("mean", OPENAI_CLIP_MEAN), ("std", OPENAI_CLIP_STD))]
    for numbers in found:
        if not (
            isinstance(numbers, list | tuple)
            and len(numbers) == 3
            and all(type(number) in (int, float) and abs(number) < 1e6 for number in numbers)
        ):
            raise ValueError(f"{source}: image_mean and image_std must be three numbers each, not {found!r:.100}")
    return tuple(found[0]), tuple(found[1])


def feature_layer(config) -> int:
    """Number of the tower's hidden layer that the connector reads, from 1. ValueError for variants that differ."""
    layer = config.vision_feature_layer
    if not isinstance(layer, int) or config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"only one feature layer without [CLS] is supported, got vision_feature_layer {layer} and "
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}"
        )
    layer = layer % (config.vision_config.num_hidden_layers + 1)
    if layer == 0:
        raise ValueError(f"vision_feature_layer {config.vision_feature_layer} is the tower's input")
    return layer


def parts(whole: nn.Module, source: str, name: str, revision: str, device: str) -> dict:
    """The fields of `Model` that are found alike in all families, from a LLaVA-like model and the folder of its other
    files.

    Raises ValueError for a tokenizer without BOS or EOS, OSError where a file is missing.
    """
    whole = whole.to(device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: tokenizer_config.json must name bos_token, which begins prompts, and eos_token")
    mean, std = _normalisation(source)
    words = getattr(whole.config, "clip", clip.DEFAULT)  # a folder beside the model's, or a Hugging Face name
    if (beside := Path(source).parent / words).is_dir():
        words = beside
    vision = whole.config.vision_config
    side = vision.image_size // vision.patch_size
    return dict(
        name=name,
        revision=revision,
        grid=(side, side),
        tower=whole.model.vision_tower,
        connector=whole.model.multi_modal_projector,
        decoder=whole.model.language_model,
        head=whole.lm_head,
        embed=whole.get_input_embeddings(),
        tokenizer=tokenizer,
        image_token=whole.config.image_token_id,
        eos=tokenizer.eos_token_id,
        mean=mean,
        std=std,
        clip=cache(lambda: clip.load(words, whole.device, whole.dtype, vision.hidden_size)),
    )
