"""The LLaVA adapter against transformers' own LLaVA, and the identity law."""

import runpy
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from analysis import models
from analysis.engine.decode import Inputs, greedy, prefill
from analysis.models.base import pad_to_square
from analysis.models.llava import Llava
from analysis.models.stem import install_stem
from analysis.positions import assign, sequence_positions
from analysis.pruning import PRUNERS
from analysis.rec.boxes import FRAMES
from analysis.types import raster_ids
from tests.support.checkpoint import config, noise, tokenizer

NEW = 12
EXPRESSIONS = ["the red cat", "cup left of the blue dog"]
IMAGES = [noise(40, 30, 0), noise(32, 32, 1)]


def sequences(model, pruner, keep, ids):
    """Both prompts as the decoder reads them."""
    with torch.inference_mode():
        inputs = []
        for selection, expression in zip(PRUNERS[pruner](model.encode(IMAGES), keep, seeds=[3, 4]), EXPRESSIONS):
            prefix, suffix = model.prompt(expression)
            given = assign(selection.origin, raster_ids(16), ids, 0)
            embeds = torch.cat([model.embed(prefix), selection.features, model.embed(suffix)])
            inputs.append(Inputs(embeds, sequence_positions(len(prefix), given, len(suffix))))
    return inputs


def test_unpruned_equals_transformers(tiny, tiny_folder):
    theirs = LlavaForConditionalGeneration.from_pretrained(tiny_folder).eval()
    inputs = sequences(tiny, "none", None, "compact")
    logits, _, _ = prefill(tiny, inputs)
    answers = greedy(replace(tiny, max_new_tokens=NEW), inputs)
    for i, (image, expression) in enumerate(zip(IMAGES, EXPRESSIONS)):
        prefix, suffix = tiny.prompt(expression)
        prompt = torch.cat([prefix, torch.full((16,), tiny.image_token), suffix])[None]
        given = dict(input_ids=prompt, pixel_values=tiny.pixels([image]), attention_mask=torch.ones_like(prompt))
        with torch.inference_mode():
            torch.testing.assert_close(logits[i], theirs(**given).logits[0, -1], atol=1e-4, rtol=0)
        expected = theirs.generate(**given, max_new_tokens=NEW, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert answers[i] == [t for t in expected if t not in (tiny.eos, 0)]
    assert answers[0] != answers[1]


def test_identity_law(tiny):
    full, kept = (
        prefill(tiny, sequences(tiny, *how))[0] for how in [("none", None, "compact"), ("random", 1, "original")]
    )
    assert torch.equal(full, kept)
    fewer = prefill(tiny, sequences(tiny, "random", 0.5, "original"))[0]
    assert not torch.allclose(full, fewer)


def test_signals_are_the_connector_layers(tiny):
    visual = tiny.encode(IMAGES)
    with torch.inference_mode():
        tower = tiny.tower(tiny.pixels(IMAGES), output_hidden_states=True, output_attentions=True)
    assert torch.equal(visual.signals.patches, tower.hidden_states[-2][:, 1:])
    assert torch.equal(visual.signals.cls, tower.hidden_states[-2][:, 0])
    torch.testing.assert_close(visual.signals.cls_attention, tower.attentions[-2][:, :, 0, 1:].mean(1))
    assert visual.features.shape == (2, 16, 24)


@pytest.mark.parametrize("size", [(41, 30), (30, 41), (32, 32)])
def test_padding_and_the_padded_frame_agree(size):
    image = noise(*size, 0)
    square = np.asarray(pad_to_square(image, Llava.fill))
    x1, y1, x2, y2 = (FRAMES["padded"].encode([0, 0, *size], size) * len(square)).round().astype(int)
    assert (square[y1:y2, x1:x2] == np.asarray(image)).all()
    square = square.copy()
    square[y1:y2, x1:x2] = Llava.fill
    assert (square == Llava.fill).all()


def test_pixels_are_normalised_with_the_written_statistics(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.25, 0], "image_std": [0.5, 1, 2]}')
    image = Image.new("RGB", (32, 32), (255, 0, 51))
    pixels = models.load(folder, device="cpu").pixels([image])
    torch.testing.assert_close(pixels, torch.tensor([1.0, -0.25, 0.1])[None, :, None, None].expand(1, 3, 32, 32))


def test_stem_checkpoints_load_whole(tmp_path):
    words = tokenizer()
    torch.manual_seed(0)
    built = LlavaForConditionalGeneration(config(words, stem=[4, 8, 8]))
    install_stem(built.model.vision_tower.embeddings, built.config.vision_config)
    for statistics in (buffer for name, buffer in built.named_buffers() if "running" in name):
        statistics.uniform_(0.5, 2)
    built.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded = models.load(tmp_path, device="cpu")
    with torch.inference_mode():
        expected = built.eval().model.get_image_features(loaded.pixels(IMAGES)).pooler_output
        # not bit for bit: the tower here runs with sdpa, the loaded one with eager attention
        torch.testing.assert_close(loaded.encode(IMAGES).features, torch.stack(list(expected)), rtol=1e-3, atol=1e-3)


def test_prompt_is_split_at_the_image(tiny):
    prefix, suffix = tiny.prompt("the red cat")
    whole = tiny.tokenizer(tiny.prompt_text("the").replace("<image>", "")).input_ids
    assert tiny.image_token not in torch.cat([prefix, suffix])
    assert prefix.tolist() == [tiny.tokenizer.bos_token_id, *whole[: len(prefix) - 1]]
    assert tiny.text(suffix[-6:].tolist()) == ": the red cat ASSISTANT :"
    assert tiny.image_token not in torch.cat(tiny.prompt("the <image> cat"))
    with pytest.raises(ValueError, match="exactly one image '<image>', got 2"):
        tiny.split("<image> {} <image>", "the cat")


def test_missing_models_name_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny-gone", tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="git checkout -- analysis/checkpoints/tiny-gone"):
        models.load("tiny-gone")
    with pytest.raises(ValueError, match="did you mean 'tiny-llava'"):
        models.load("tiny-lava")
    with pytest.raises(FileNotFoundError, match="hf download no-such-owner/no-such-model"):
        models.load("no-such-owner/no-such-model")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        models.load(tmp_path)


def test_what_cannot_be_loaded_says_why(tiny_folder, monkeypatch):
    with pytest.raises(ValueError, match="a revision names a commit of a Hugging Face model"):
        models.load(tiny_folder, revision="main")
    with pytest.raises(ValueError, match="unknown dtype 'float61'; did you mean 'float16'"):
        models.load(tiny_folder, dtype="float61")
    with pytest.raises(
        FileNotFoundError, match=r"\(14.1 GB\) with: hf download llava-hf/llava-1.5-7b-hf --revision abc"
    ):
        models.load("llava-hf/llava-1.5-7b-hf", revision="abc")
    with pytest.raises(
        FileNotFoundError, match="Shikra-7B has to be converted: python -m analysis.models.convert shikra"
    ):
        models.load("Shikra-7B")
    assert models.load(tiny_folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    with pytest.raises(MemoryError, match="billion parameters, .* GB as float32, but only 0.0 GB are free on cpu"):
        models.load(tiny_folder, device="cpu")


def test_the_list_of_models(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["python -m analysis.models"])
    runpy.run_module("analysis.models", run_name="__main__")
    said = capsys.readouterr().out
    assert all(name in said for name in [*models.MODELS, *models.KNOWN])


def test_weights_that_do_not_fit_are_refused(tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    lost = sorted(weights)[0]
    save_file({k: w for k, w in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit"):
        models.load(folder, device="cpu")


def test_revision_names_the_weights(tiny, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    assert models.load(folder, device="cpu").revision == tiny.revision
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert models.load(folder, device="cpu").revision != tiny.revision
