"""The small files that make a tiny model's folder loadable by transformers' AutoProcessor, as a published model's is.

`save_processor(folder)` adds three to what `save_pretrained` of the model and the tokenizer leave there:
preprocessor_config.json (how an image becomes pixels, as `models` does it), processor_config.json (how many tokens
stand for an image) and chat_template.jinja (the prompt). Prompts, pixels and answers are then those of `models.load`,
to the bit. Qwen2.5-VL's own processor also asks for torchvision, which it needs for videos.
"""

from __future__ import annotations

import json
from pathlib import Path

from analysis.models.base import SYSTEM
from analysis.registry import pick

_TEXT = "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
_IMAGE = "{% for part in message['content'] if part['type'] == 'image' %}IMAGE{% endfor %}"
VICUNA = (
    "{{ bos_token }}"
    + SYSTEM
    + "{% for message in messages %}{% if message['role'] == 'user' %} USER: "
    + _IMAGE.replace("IMAGE", "<image>\n")
    + _TEXT
    + "{% else %} ASSISTANT: "
    + _TEXT
    + "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    + _IMAGE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + _TEXT
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PIXELS = dict(
    do_resize=True, resample=3, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=True
)
_LLAVA = dict(vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>")

# model_type -> names of the image processor's and the processor's class, more of the first's settings, of the
# second's, chat
FAMILIES: dict[str, tuple[str, str, dict, dict, str]] = {
    "llava": (
        "LlavaImageProcessor",
        "LlavaProcessor",
        dict(do_pad=True, do_center_crop=False),  # padded to a square with CLIP's mean colour, never cropped
        _LLAVA,
        VICUNA,
    ),
    "llava_next": ("LlavaNextImageProcessor", "LlavaNextProcessor", {}, _LLAVA, VICUNA),
    "qwen2_5_vl": ("Qwen2VLImageProcessor", "Qwen2_5_VLProcessor", {}, {}, CHATML),
}


def save_processor(folder: str | Path) -> None:
    """Write the processor's files into a model's folder, which holds config.json and preprocessor_config.json.

    What preprocessor_config.json says already (size, mean, tiles, patches) stays. Raises ValueError for a model that
    transformers itself has no processor for.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    image_class, processor_class, pixels, tokens, chat = pick(FAMILIES, config["model_type"], "model with a processor")
    if tokens:
        tokens = tokens | dict(patch_size=config["vision_config"]["patch_size"])
    file = folder / "preprocessor_config.json"
    known = json.loads(file.read_text())
    named = dict(image_processor_type=image_class, processor_class=processor_class)
    file.write_text(json.dumps(_PIXELS | pixels | known | named, indent=2, sort_keys=True) + "\n")
    written = json.dumps(tokens | dict(processor_class=processor_class), indent=2, sort_keys=True) + "\n"
    (folder / "processor_config.json").write_text(written)
    (folder / "chat_template.jinja").write_text(chat)
