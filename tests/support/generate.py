"""Small random models of transformers' own classes, and batches for them: three prompts, one with two images, padded
left.

Weights are large enough that answers differ between images, prompts and position IDs.
"""

import torch
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

IMAGE, VIDEO, START, END, PAD, VOCAB = 60, 61, 58, 59, 0, 64
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=1024,
)
CLIP = CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
    initializer_factor=10.0,
)
SIGLIP = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)
PINPOINTS = dict(image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
IDS = dict(image_token_id=IMAGE, pad_token_id=PAD)
QWEN = dict(video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]))


def _idefics(config, whole):
    return whole(
        config(
            vision_config=SIGLIP | dict(image_size=64),
            text_config=LlamaConfig(**TEXT).to_dict() | {"model_type": "llama"},
            scale_factor=2,
            **IDS,
        )
    )


def _qwen(config, whole, vision, **text):
    sizes = dict(depth=3, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2) | vision
    return whole(config(vision_config=sizes, text_config=TEXT | ROPE | text, **IDS, **QWEN))


MODELS = {
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIP, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE)
    ),
    "llava_next": lambda: LlavaNextForConditionalGeneration(
        LlavaNextConfig(vision_config=CLIP, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, **PINPOINTS)
    ),
    "llava_onevision": lambda: LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**SIGLIP),
            text_config=Qwen2Config(**TEXT),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            vision_aspect_ratio="anyres_max_9",
            **PINPOINTS,
        )
    ),
    "internvl": lambda: InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=dict(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=[32, 32],
                patch_size=[4, 4],
                use_qk_norm=True,
                layer_scale_init_value=1.0,
            ),
            text_config=Qwen2Config(**TEXT),
            image_token_id=IMAGE,
        )
    ),
    "idefics3": lambda: _idefics(Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": lambda: _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration),
    "qwen2_vl": lambda: _qwen(
        Qwen2VLConfig, Qwen2VLForConditionalGeneration, dict(embed_dim=16, hidden_size=32, mlp_ratio=2)
    ),
    "qwen2_5_vl": lambda: _qwen(
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        dict(hidden_size=16, out_hidden_size=32, intermediate_size=24, window_size=16, fullatt_block_indexes=[2]),
    ),
    "qwen3_vl": lambda: _qwen(
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        dict(
            hidden_size=16,
            out_hidden_size=32,
            intermediate_size=24,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        head_dim=8,
    ),
}


def build(name, seed=0):
    """A random model in evaluation mode."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    model.generation_config.update(
        do_sample=False, eos_token_id=None, pad_token_id=PAD, suppress_tokens=[0, IMAGE, VIDEO]
    )
    with torch.no_grad():  # towers start with weights so small that all images look alike
        for key, weight in model.base_model.named_parameters():
            if weight.ndim > 1 and not key.startswith(("language_model", "text_model")):
                weight.normal_(0, 0.3)
    return model


def batch(name, seed=0):
    """Inputs of three prompts with one, two and one images, padded left, and what a test must know of the images: for
    each the runs of its tokens, a run as its grid or, with a mosaic of tiles, as two grids."""
    made = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=made)

    def words(count):
        return torch.randint(3, 57, (count,), generator=made).tolist()

    whole = ((4, 4), None)
    runs = [[whole]] * 4
    if name.startswith("qwen"):
        grids = torch.tensor([[1, 8, 12], [1, 8, 8], [1, 4, 8], [1, 12, 8]])  # patches of 4 pixels
        extra = dict(pixel_values=noise(int(grids.prod(1).sum()), 3 * 2 * 4 * 4), image_grid_thw=grids)
        runs = [[((rows // 2, columns // 2), None)] for _, rows, columns in grids.tolist()]
        images = [[START, *[IMAGE] * (rows * columns // 4), END] for _, rows, columns in grids.tolist()]
    elif name in ("llava_next", "llava_onevision"):
        sizes = torch.tensor([[40, 60], [32, 64], [50, 50], [64, 30]])  # height, width
        extra = dict(pixel_values=noise(4, 5, 3, 32, 32), image_sizes=sizes)
        mosaics = [(6, 8), (4, 8), (8, 8), (8, 4)]  # without the rows and columns of the padding
        runs = [[((4, 4), mosaic)] for mosaic in mosaics]
        images = [[IMAGE] * (16 + rows * (columns + 1)) for rows, columns in mosaics]
        if name == "llava_onevision":  # of several images in a prompt each is read whole, with one newline
            extra |= dict(batch_num_images=torch.tensor([1, 2, 1]))
            runs[1:3], images[1:3] = [[whole]] * 2, [[IMAGE] * 17] * 2
    elif name in ("idefics3", "smolvlm"):
        pixels = noise(3, 2, 3, 64, 64)
        pixels[2, 1:] = 0  # no second tile there
        extra = dict(pixel_values=pixels)
        images, runs = [[*[IMAGE] * 16, 57, *[IMAGE] * 16], *[[IMAGE] * 16] * 3], [[whole, whole], *[[whole]] * 3]
    elif name == "internvl":
        extra = dict(pixel_values=noise(5, 3, 32, 32))
        images, runs = [[START, *[IMAGE] * n, END] for n in (32, 16, 16, 16)], [[whole, whole], *[[whole]] * 3]
    else:
        extra, images = dict(pixel_values=noise(4, 3, 32, 32)), [[IMAGE] * 16] * 4
    rows = [
        [1, *words(4), *images[0], *words(3)],
        [1, *words(2), *images[1], *words(2), *images[2], *words(5)],
        [1, *images[3], *words(6)],
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    if name.startswith("qwen"):
        extra |= dict(mm_token_type_ids=(ids == IMAGE).int())
    return dict(input_ids=ids, attention_mask=mask, **extra), runs
