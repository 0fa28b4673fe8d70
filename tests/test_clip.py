"""CLIP beside a LLaVA: its text and patch embeddings against transformers' own."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from analysis import models
from analysis.models import clip
from tests.support import checkpoint
from tests.support.checkpoint import noise

IMAGES = [noise(40, 30, 0), noise(32, 32, 1)]


def test_text_and_patches_equal_transformers_own(tiny):
    own = tiny.clip()
    texts = ["the red cat", "cup"]
    ids = [[*own.tokenizer(text, add_special_tokens=False).input_ids, own.tokenizer.eos_token_id] for text in texts]
    expected = torch.cat([own.model.get_text_features(input_ids=torch.tensor([i])).pooler_output for i in ids])
    torch.testing.assert_close(own.text(texts), expected, atol=1e-5, rtol=1e-4)
    assert own.text(texts[:1]).allclose(own.text(texts)[:1], atol=1e-5)  # padding changes nothing
    hidden = tiny.tower(tiny.pixels(IMAGES), output_hidden_states=True).hidden_states
    signals = tiny.encode(IMAGES).signals
    for found, layer in ((signals.clip_patches, hidden[-1]), (signals.clip_read, hidden[-2])):
        projected = own.model.visual_projection(tiny.tower.post_layernorm(layer))
        torch.testing.assert_close(found, projected[:, 1:])


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
    read = tiny.tower.encoder.layers[-2]  # makes the layer that the connector reads, with two heads of 8
    made = read.self_attn.k_proj(read.layer_norm1(hidden[-3]))
    torch.testing.assert_close(visual.signals.read_keys, (made[..., :8] + made[..., 8:]) / 2)
    assert torch.equal(visual.connect(visual.signals.patches), visual.features)


def test_a_clip_that_is_absent_or_of_another_tower(tiny_folder):
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"):
        clip.load("nobody/nothing", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="projects patches of width 16, the model's tower makes 99"):
        clip.load(tiny_folder.parent / "random-clip", torch.device("cpu"), torch.float32, 99)


def load(folder):
    return clip.load(folder, torch.device("cpu"), torch.float32)


def test_weights_in_a_torch_file_are_read(tiny_folder, tmp_path):
    """As OpenAI's CLIPs lie on the hub: pytorch_model.bin with old buffers, no safetensors."""
    safe = shutil.copytree(tiny_folder.parent / "random-clip", tmp_path / "safe")
    folder = shutil.copytree(safe, tmp_path / "torch")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {f"{part}_model.embeddings.position_ids": torch.arange(4)[None] for part in ("text", "vision")}
    torch.save(weights | old, folder / "pytorch_model.bin")
    found, expected = load(folder).model.state_dict(), load(safe).model.state_dict()
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)
    torch.save({"weights": Unsafe()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded: .*[Ww]eights.only"):
        load(folder)
    lost = sorted(weights)[0]
    torch.save({name: weight for name, weight in weights.items() if name != lost}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="the weights do not fit config.json.*missing_keys"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="neither .*safetensors nor pytorch_model.bin"):
        load(folder)


class Unsafe:
    """What a pickle must not make."""


def test_a_clip_without_its_own_tokenizer_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder.parent / "random-clip", tmp_path / "clip")
    fewer = checkpoint.tokenizer("another word")
    assert len(fewer) != len(checkpoint.tokenizer())
    fewer.save_pretrained(folder)
    with pytest.raises(ValueError, match="no tokenizer of its own: .* knows .* tokens, its text tower"):
        load(folder)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer of its own|cannot be loaded"):
        load(folder)


def test_true_causes_are_told(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder.parent / "random-clip", tmp_path / "clip")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be loaded: SafetensorError"):
        load(folder)
    with pytest.raises(ValueError, match="config.json is of a 'llava' model, not of a CLIP"):
        load(tiny_folder)


def test_words_that_spell_a_special_token_are_text(tiny):
    ids = [row.tolist() for row in tiny.clip().ids(["the </s> cat", "the cat"])]
    assert len(ids[0]) > len(ids[1]) and ids[0].count(tiny.clip().tokenizer.eos_token_id) == 1


def test_the_tiny_llava_finds_the_tiny_clip():
    own = models.load("tiny-llava", device="cpu").clip()
    assert own.text(["a photo of brown dog"]).shape == (1, 128)
