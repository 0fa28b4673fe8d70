"""The Shikra and MiniGPT-v2 adapters against plain forward passes written from the papers' protocols; EVA from CLIP."""

from dataclasses import replace
from itertools import takewhile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import layer_norm, linear
from transformers import Blip2VisionConfig, Blip2VisionModel, LlamaForCausalLM
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from analysis import models
from analysis.engine.decode import Inputs, greedy, prefill
from analysis.engine.evaluate import needs_text
from analysis.models.stem import StemClip, clip_config, eva_from_clip, install_stem
from analysis.pruning import all_pruners, budget, pruner
from tests.support.checkpoint import noise, pieces
from tests.support.families import SIDE, STRIP, TEXTS, build

NEW = 12
EXPRESSIONS = ["the red cat", "cup left of the blue dog"]
IMAGES = [noise(40, 30, 0), noise(31, 44, 1)]


@pytest.fixture(
    scope="module",
    ids=["shikra", "shikra-stem", "minigpt_v2", "minigpt_v2-stem"],
    params=[("shikra", None), ("shikra", [4, 8, 8]), ("minigpt_v2", None), ("minigpt_v2", [4, 8])],
)
def case(request, tmp_path_factory):
    """family; whole: as built; model: as loaded."""
    (family, stem), folder = request.param, tmp_path_factory.mktemp("family")
    whole = build(family, stem, folder)
    return SimpleNamespace(family=family, whole=whole, model=models.load(folder, device="cpu"))


@torch.inference_mode()
def features(case, pixels):
    """[B, N, D], what the decoder reads of the images."""
    inner = case.whole.model
    tower, connector = inner.vision_tower, inner.multi_modal_projector
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    if case.family == "shikra":
        patches = hidden[-2][:, 1:]
    else:
        norm = tower.post_layernorm
        patches = layer_norm(hidden[-1], norm.weight.shape, norm.weight, norm.bias, eps=1e-5)[:, 1:]
        patches = torch.stack(
            [torch.cat(list(image[i : i + STRIP])) for image in patches for i in range(0, len(image), STRIP)]
        ).unflatten(0, (len(pixels), -1))
    return linear(patches, connector.weight, connector.bias)


def prompt(case, expression):
    """IDs before and after the image: each side cut by itself, BOS before the first."""
    ids, bos = case.model.tokenizer.get_vocab(), case.model.tokenizer.bos_token_id
    sides = TEXTS[case.family].split("|")
    before, after = ([ids[piece] for piece in pieces(side.format(expression))] for side in sides)
    return [bos, *before], after


def test_pixels(case):
    for image in IMAGES:
        seen = image
        if case.family == "shikra":
            (width, height), side = image.size, max(image.size)
            square = np.full((side, side, 3), 255, dtype=np.uint8)
            top, left = (side - height) // 2, (side - width) // 2
            square[top : top + height, left : left + width] = image
            seen = Image.fromarray(square)
        raw = np.asarray(seen.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
        mean, std = np.float32(OPENAI_CLIP_MEAN), np.float32(OPENAI_CLIP_STD)
        expected = torch.from_numpy(((raw / np.float32(255) - mean) / std).transpose(2, 0, 1))
        assert case.model.pixels([image])[0].equal(expected)


def test_prompt(case):
    for expression in EXPRESSIONS:
        before, after = case.model.prompt(expression)
        assert (before.tolist(), after.tolist()) == prompt(case, expression)
        assert case.model.tokenizer.unk_token_id not in [*before, *after]
    assert before.tolist().count(case.model.tokenizer.bos_token_id) == (2 if case.family == "minigpt_v2" else 1)
    holder = "<im_patch>" if case.family == "shikra" else "<ImageHere>"
    assert case.model.prompt_text("cup") == TEXTS[case.family].format("cup").replace("|", holder)
    with pytest.raises(ValueError, match="a prompt needs exactly one image.*got 2"):
        case.model.split(f"{case.model.image} {case.model.rec}", "cat")
    bos = case.model.tokenizer.bos_token_id
    for spelt in ("<s>", case.model.image):  # read as text, whatever it spells
        found, plain = (torch.cat(case.model.prompt(words)).tolist() for words in (f"the {spelt} cat", "the cat"))
        assert len(found) > len(plain) and found.count(bos) == plain.count(bos)


def test_unpruned_equals_the_plain_forward(case):
    whole, model = case.whole, case.model
    for ours, theirs in (
        (model.tower, whole.model.vision_tower),
        (model.connector, whole.model.multi_modal_projector),
        (model.decoder, whole.model.language_model),
        (model.head, whole.lm_head),
    ):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    visual, expected = model.encode(IMAGES), features(case, model.pixels(IMAGES))
    torch.testing.assert_close(visual.features, expected, atol=1e-3 if case.family == "shikra" else 1e-5, rtol=1e-4)
    assert visual.grid == ((4, 4) if case.family == "shikra" else (8, 2))
    llama = LlamaForCausalLM(whole.config.text_config).eval()
    llama.model, llama.lm_head = whole.model.language_model, whole.lm_head
    embeds = []
    for expression, image in zip(EXPRESSIONS, visual.features):
        before, after = map(model.embed, model.prompt(expression))
        embeds.append(torch.cat([before, image, after]))
    ids = [torch.arange(len(one)) for one in embeds]
    logits = prefill(model, list(map(Inputs, embeds, ids)))[0]
    answers = greedy(replace(model, max_new_tokens=NEW), list(map(Inputs, embeds, ids)))
    for i, expression in enumerate(EXPRESSIONS):
        before, after = (whole.get_input_embeddings()(torch.tensor(side)) for side in prompt(case, expression))
        given = dict(
            inputs_embeds=torch.cat([before, expected[i], after])[None], attention_mask=torch.ones(1, len(embeds[i]))
        )
        with torch.inference_mode():
            torch.testing.assert_close(logits[i], llama(**given).logits[0, -1], atol=1e-4, rtol=0)
        said = llama.generate(**given, max_new_tokens=NEW, do_sample=False)[0].tolist()
        assert answers[i] == list(takewhile(lambda token: token != model.eos, said))
    assert answers[0] != answers[1]


@pytest.mark.parametrize("case", [("minigpt_v2", None)], indirect=True, ids=["minigpt_v2"])
def test_signals_of_strips(case):
    """Against the last block's attention computed by hand."""
    tower, visual = case.whole.model.vision_tower, case.model.encode(IMAGES)
    with torch.inference_mode():
        hidden = tower(case.model.pixels(IMAGES), output_hidden_states=True).hidden_states
        block = tower.encoder.layers[-1]
        mixed = linear(block.layer_norm1(hidden[-2]), block.self_attn.qkv.weight, block.self_attn.qkv.bias)
        read = tower.post_layernorm(hidden[-1])
    queries, keys, _ = mixed.split(16, dim=-1)
    heads = [
        (keys[..., h] @ queries[:, 0, h, None] / 8**0.5).softmax(dim=1)[:, 1:, 0] for h in (slice(8), slice(8, 16))
    ]
    attention = (heads[0] + heads[1]).view(2, 16, STRIP).mean(dim=2) / 2
    signals = visual.signals
    torch.testing.assert_close(signals.cls_attention, attention)
    assert attention.std() > 1e-3
    torch.testing.assert_close(signals.keys, torch.cat([keys[:, :1], keys[:, 1:].view(2, 16, STRIP, 16).mean(2)], 1))
    torch.testing.assert_close(signals.read_keys, (signals.keys[..., :8] + signals.keys[..., 8:]) / 2)
    torch.testing.assert_close(signals.cls_query, queries[:, 0])
    torch.testing.assert_close(signals.patches, read[:, 1:].reshape(2, 16, 64), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(signals.cls, torch.cat([read[:, 0]] * STRIP, dim=1), atol=1e-4, rtol=1e-4)
    assert visual.connect(signals.patches).equal(visual.features)


@pytest.mark.parametrize("case", [("minigpt_v2", None)], indirect=True, ids=["minigpt_v2"])
@pytest.mark.parametrize("name", ["none", *all_pruners(inside=False)])
def test_pruners_that_read_no_text_run_on_strips(case, name):
    if name.split(":")[0] in ("text_similarity", "trim", "cdpruner"):
        with pytest.raises(AttributeError, match=r"no signal 'clip_(text|prompt)'; it offers: cls, cls_attention"):
            needs_text(case.model, pruner(name), 0.5)
        return
    assert not needs_text(case.model, pruner(name), None if name == "none" else 0.5)
    for one in pruner(name)(case.model.encode(IMAGES), None if name == "none" else 0.3, seeds=[0, 1]):
        assert len(one.features) == (16 if name == "none" else budget(0.3, 16)) and one.features.isfinite().all()


def test_rows_that_are_no_strips_are_refused(tmp_path):
    build("minigpt_v2", None, tmp_path, side=24)
    with pytest.raises(ValueError, match="6 patches in a row do not split into strips of 4"):
        models.load(tmp_path, device="cpu")


@torch.inference_mode()
def test_eva_from_clip_computes_the_same():
    torch.manual_seed(0)
    clip = StemClip(clip_config(10, width=32)).vision_model.eval()
    for name, value in clip.state_dict().items():
        if "norm" in name or "bias" in name or "class" in name or "running" in name:
            value.copy_(torch.rand(value.shape) + (0.5 if name.endswith(("weight", "var")) else -0.5))
    vision = clip.config
    eva = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=192,
            patch_size=16,
            hidden_act=vision.hidden_act,
            layer_norm_eps=vision.layer_norm_eps,
            stem=vision.stem,
        )
    )
    install_stem(eva.embeddings, eva.config)
    eva_from_clip(eva.eval(), clip)
    pixels = torch.randn(2, 3, 192, 192)
    ours, theirs = (tower(pixels, output_hidden_states=True) for tower in (eva, clip))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 5
    for layer, expected in zip(ours.hidden_states, theirs.hidden_states):
        torch.testing.assert_close(layer, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.last_hidden_state, clip.post_layernorm(theirs.hidden_states[-1]), atol=1e-5, rtol=0)
    assert ours.hidden_states[-1].std(dim=1).mean() > 0.01  # patches differ
