"""Random tiny models of the families that are not LLaVAs."""

import torch
from transformers import Blip2VisionConfig

from analysis.models.minigpt_v2 import MiniGPTv2Config, MiniGPTv2ForConditionalGeneration
from analysis.models.shikra import ShikraConfig, ShikraForConditionalGeneration
from tests.support import checkpoint

SIDE, STRIP = 32, 4
# the prompts to the letter, "|" for the visual tokens
TEXTS = {
    "shikra": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: Can you point out {} in the image "
    "<im_start>|<im_end> and provide the coordinates of its location? ASSISTANT:",
    "minigpt_v2": "<s>[INST] <Img>|</Img> [refer] give me the location of {} [/INST]",
}


@torch.no_grad()
def build(family, stem, folder, side=SIDE):
    """A random model of a family, saved in the folder."""
    words = checkpoint.tokenizer(TEXTS[family].replace("|", " <im_patch> " if family == "shikra" else " "))
    base, more = checkpoint.config(words), dict(stem=stem) if stem else {}
    torch.manual_seed(0)
    if family == "shikra":
        return checkpoint.saved(
            ShikraForConditionalGeneration(
                ShikraConfig(
                    vision_config=base.vision_config.to_dict() | more,
                    text_config=base.text_config,
                    image_token_index=words.convert_tokens_to_ids("<im_patch>"),
                )
            ),
            words,
            folder,
        )
    eva = Blip2VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=side,
        patch_size=4,
        initializer_range=0.4,
        **more,
    )
    whole = MiniGPTv2ForConditionalGeneration(
        MiniGPTv2Config(vision_config=eva, text_config=base.text_config, image_token_index=base.image_token_index)
    )
    tower = whole.model.vision_tower
    for name, parameter in tower.named_parameters():
        if "norm" in name or name.endswith("qkv.bias"):
            parameter.add_(torch.randn_like(parameter) / 4)
        elif "layers" not in name or "projection" in name or "fc2" in name:
            parameter.mul_(0.01)  # so small before the last norm that its epsilon shows
    return checkpoint.saved(whole, words, folder)
