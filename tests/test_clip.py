"""CLIP beside a LLaVA: its text and patch embeddings against transformers' own."""

import pytest
import torch

from analysis import models
from analysis.models import clip
from tests.support.checkpoint import noise

IMAGES = [noise(40, 30, 0), noise(32, 32, 1)]


def test_text_and_patches_equal_transformers_own(tiny):
    own = tiny.clip()
    texts = ["the red cat", "cup"]
    ids = [[*own.tokenizer(text, add_special_tokens=False).input_ids, own.tokenizer.eos_token_id] for text in texts]
    expected = torch.cat([own.model.get_text_features(input_ids=torch.tensor([i])).pooler_output for i in ids])
    torch.testing.assert_close(own.text(texts), expected, atol=1e-5, rtol=1e-4)
    assert own.text(texts[:1]).allclose(own.text(texts)[:1], atol=1e-5)  # padding changes nothing
    last = tiny.tower(tiny.pixels(IMAGES), output_hidden_states=True).hidden_states[-1]
    projected = own.model.visual_projection(tiny.tower.post_layernorm(last))
    torch.testing.assert_close(tiny.encode(IMAGES).signals.clip_patches, projected[:, 1:])


def test_long_text_is_cut_and_keeps_its_end_token(tiny):
    own, long = tiny.clip(), " ".join(["red cat"] * 20)
    assert own.text([long]).allclose(own.text([" ".join(["red cat"] * 5 + ["red"])]), atol=1e-5)  # 12 - 1 words


def test_keys_and_query_of_the_last_block(tiny):
    visual = tiny.encode(IMAGES)
    block, hidden = (
        tiny.tower.encoder.layers[-1],
        tiny.tower(tiny.pixels(IMAGES), output_hidden_states=True).hidden_states,
    )
    entered = block.layer_norm1(hidden[-2])
    assert torch.equal(visual.signals.keys, block.self_attn.k_proj(entered))
    torch.testing.assert_close(visual.signals.cls_query, block.self_attn.q_proj(entered)[:, 0])
    assert torch.equal(visual.connect(visual.signals.patches), visual.features)


def test_a_clip_that_is_absent_or_of_another_tower(tiny_folder):
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"):
        clip.load("nobody/nothing", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="projects patches of width 16, the model's tower makes 99"):
        clip.load(tiny_folder.parent / "random-clip", torch.device("cpu"), torch.float32, 99)


def test_the_tiny_llava_finds_the_tiny_clip():
    own = models.load("tiny-llava", device="cpu").clip()
    assert own.text(["a photo of brown dog"]).shape == (1, 128)
