"""The LLaVA-NeXT adapter against transformers' own and a preprocessing of its own; newlines under pruning."""

from dataclasses import replace
from functools import cache
from itertools import takewhile
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, MistralConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from analysis import models
from analysis.engine.decode import Inputs, greedy, prefill
from analysis.engine.evaluate import RunState, _encode
from analysis.positions import assign, reorder, sequence_positions
from analysis.pruning import budget, pruner
from analysis.pruning.images import prune_images
from tests.support import checkpoint
from tests.support.checkpoint import noise

SIDE, GRID = 32, 4  # pixels and tokens of the tower's square
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # height, width
SIZES = [(48, 30), (30, 48), (64, 64), (61, 67), (100, 9), (9, 100), (130, 40), (20, 90)]  # width, height
NEW = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two random models: by their decoder's name, a folder and transformers' own LLaVA-NeXT."""
    made, words = {}, checkpoint.tokenizer("[INST] [/INST]")
    whole = checkpoint.config(words)
    mistral = MistralConfig(**{k: v for k, v in whole.text_config.to_dict().items() if k != "model_type"})
    for text in (whole.text_config, mistral):
        folder = tmp_path_factory.mktemp(text.model_type)
        torch.manual_seed(0)
        config = LlavaNextConfig(
            vision_config=whole.vision_config,
            text_config=text,
            image_grid_pinpoints=PINPOINTS,
            image_token_index=whole.image_token_index,
        )
        made[text.model_type] = folder, checkpoint.saved(LlavaNextForConditionalGeneration(config), words, folder)
        LlavaNextImageProcessorPil(
            size=dict(shortest_edge=SIDE),
            crop_size=dict(height=SIDE, width=SIDE),
            image_grid_pinpoints=PINPOINTS,
        ).save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def model(folders):
    return models.load(folders["llama"][0], device="cpu")


@pytest.fixture(scope="module")
def encoded(model):
    return cache(lambda size: model.encode([noise(*size)]))


def best(width, height):
    """Height and width of the pinpoint that keeps most of an image and wastes least."""

    def suits(pinpoint):
        h, w = pinpoint
        scale = min(w / width, h / height)
        useful = min(int(width * scale) * int(height * scale), width * height)
        return useful, useful - h * w

    return max(PINPOINTS, key=suits)


def pixels(image):
    """The whole image, plainly resized, and the tiles of the image resized and padded to its best pinpoint."""
    (width, height), (h, w) = image.size, best(*image.size)
    inner = min(w, ceil(width * (h / height))), min(h, ceil(height * (w / width)))
    mosaic = Image.new("RGB", (w, h))
    mosaic.paste(image.resize(inner, Image.Resampling.BICUBIC), ((w - inner[0]) // 2, (h - inner[1]) // 2))
    views = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)]
    views += [mosaic.crop((x, y, x + SIDE, y + SIDE)) for y in range(0, h, SIDE) for x in range(0, w, SIDE)]
    raw = np.stack([np.asarray(view) for view in views]).astype(np.float32)
    return torch.from_numpy(((raw / 255 - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD).transpose(0, 3, 1, 2)).float()


@given(st.integers(2, 150), st.integers(2, 150))
@settings(max_examples=40)
def test_pixels_are_the_image_and_its_tiles(model, width, height):
    image = noise(width, height)
    found = model.pixels([image])[0]
    # a hundredth of a grey level: the same bytes, normalised in another order of operations
    torch.testing.assert_close(found, pixels(image), atol=1e-4, rtol=0)


def sequence(model, image, expression, prune="none", keep=None, ids="compact", order="method"):
    """One prompt as the decoder reads it."""
    visual = model.encode([image])
    selection = reorder(prune_images(pruner(prune), visual, keep, [3])[0], order, 0)
    prefix, suffix = model.prompt(expression)
    given = assign(selection.origin, visual.unpruned, ids, 0)
    with torch.inference_mode():
        embeds = torch.cat([model.embed(prefix), selection.features, model.embed(suffix)])
    return Inputs(embeds, sequence_positions(len(prefix), given, len(suffix)))


@pytest.mark.parametrize("decoder", ["llama", "mistral"])
def test_unpruned_equals_transformers(folders, decoder):
    folder, theirs = folders[decoder]
    ours, images = models.load(folder, device="cpu"), [noise(*size, i) for i, size in enumerate(SIZES)]
    assert ours.chat.startswith("[INST]" if decoder == "mistral" else "A chat between")
    inputs = [sequence(ours, image, "the red cat") for image in images]
    logits = prefill(ours, inputs)[0]
    answers = greedy(replace(ours, max_new_tokens=NEW), inputs)
    for i, image in enumerate(images):
        prefix, suffix = ours.prompt("the red cat")
        count = torch.full((len(inputs[i].embeds) - len(prefix) - len(suffix),), ours.image_token)
        prompt = torch.cat([prefix, count, suffix])[None]
        given = dict(
            input_ids=prompt,
            pixel_values=pixels(image)[None],
            attention_mask=torch.ones_like(prompt),
            image_sizes=torch.tensor([image.size[::-1]]),
        )
        with torch.inference_mode():
            expected = theirs(**given).logits[0, -1]
        torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(prefill(ours, [inputs[i]])[0][0], expected, atol=1e-4, rtol=0)
        said = theirs.generate(**given, max_new_tokens=NEW, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert answers[i] == list(takewhile(lambda token: token != ours.eos, said))
    assert len({tuple(answer) for answer in answers}) > len(answers) / 2


def test_layouts(model):
    """Images of one layout have one mosaic, and are encoded in a batch as alone; others are refused."""
    mosaics = {}
    for size in [(w, h) for w in range(2, 100, 3) for h in range(2, 100, 3) if max(w, h) <= GRID * min(w, h)]:
        index, tiles = model.mosaic(size)
        assert mosaics.setdefault(model.layout(size), index).equal(index) and int(index.max()) < tiles * GRID**2
    images = {name: noise(*size, i) for i, (name, size) in enumerate(zip("abcde", [*SIZES[:3], (47, 30), (30, 47)]))}
    batches = list(_encode(model, images, RunState(expressions=1, images=10)))
    assert sorted(name for names, _ in batches for name in names) == list(images) and len(batches) == 3
    for names, visual in batches:
        for i, name in enumerate(names):
            alone = model.encode([images[name]])
            torch.testing.assert_close(visual.features[i], alone.features[0])
            torch.testing.assert_close(visual.tiles.features[i], alone.tiles.features[0])
            torch.testing.assert_close(visual.tiles.signals.keys[i], alone.tiles.signals.keys[0])
    with pytest.raises(ValueError, match="several layouts cannot be encoded in one batch"):
        model.encode([images["a"], images["b"]])
    with pytest.raises(ValueError, match="2 x 11 pixels is too thin"):
        model.layout((2, 11))


@pytest.mark.parametrize("size", SIZES)
def test_signals_of_the_mosaic_are_its_tiles_own(model, size):
    visual, given = model.encode([noise(*size)]), model.pixels([noise(*size)])[0]
    with torch.inference_mode():
        tower = model.tower(given, output_hidden_states=True, output_attentions=True)
        last = model.tower.encoder.layers[-1]
        keys = last.self_attn.k_proj(last.layer_norm1(tower.hidden_states[-2]))
    rows, columns = visual.tiles.grid
    shape = [length // SIDE for length in best(*size)]

    def laid(values):  # [1 + T, N, ...]: the tiles side by side, and what the padding left of them
        tiles = values[1:].unflatten(1, (GRID, GRID)).unflatten(0, shape)
        whole = torch.cat([torch.cat(list(row), dim=1) for row in tiles], dim=0)
        top, left = (whole.shape[0] - rows) // 2, (whole.shape[1] - columns) // 2
        return whole[top : top + rows, left : left + columns].flatten(0, 1)

    signals = visual.tiles.signals
    torch.testing.assert_close(signals.patches[0], laid(tower.hidden_states[-2][:, 1:]))
    torch.testing.assert_close(signals.cls_attention[0], laid(tower.attentions[-2][:, :, 0, 1:].mean(1)))
    torch.testing.assert_close(signals.keys[0], torch.cat([keys[0, :1], laid(keys[:, 1:])]))
    block = model.tower.encoder.layers[-2]
    with torch.inference_mode():
        keys = block.self_attn.k_proj(block.layer_norm1(tower.hidden_states[-3])).unflatten(-1, (2, 8)).mean(2)
    torch.testing.assert_close(signals.read_keys[0], torch.cat([keys[0, :1], laid(keys[:, 1:])]))
    for one in (signals, visual.signals):
        torch.testing.assert_close(one.cls[0], tower.hidden_states[-2][0, 0])
    torch.testing.assert_close(visual.signals.cls_attention[0], tower.attentions[-2][0, :, 0, 1:].mean(0))


@pytest.mark.parametrize("size", SIZES)
def test_identity_law(model, size):
    ways = ("none", None, "original"), ("random", 1, "original", "raster"), ("random", 0.5, "original", "raster")
    full, kept, fewer = (prefill(model, [sequence(model, noise(*size), "cup", *way)])[0] for way in ways)
    assert torch.equal(full, kept) and not torch.allclose(full, fewer)


@pytest.mark.parametrize(
    "name", ["random", "spatial", "cls_similarity", "fastervlm", "divprune", "prumerge", "visionzip"]
)
@given(st.sampled_from(SIZES), st.floats(0.01, 1), st.integers(0, 2**32))
@settings(max_examples=25)
def test_newlines_stay_with_their_rows(model, encoded, name, size, keep, seed):
    visual = encoded(size)
    (full,), (one,) = prune_images(pruner("none"), visual, None, [0]), prune_images(pruner(name), visual, keep, [seed])
    assert full.origin.tolist() == list(range(visual.length)) and len(full.features) == visual.length
    base, (rows, columns) = GRID**2, visual.tiles.grid
    k = budget(keep, base)
    tiles = [divmod(place - base, columns + 1) for place in one.origin[k:].tolist()]
    kept_rows = [row for row, column in tiles if column < columns]
    assert len(kept_rows) == budget(keep, rows * columns) and one.origin[:k].max() < base
    newlines = [i for i, (_, column) in enumerate(tiles) if column == columns]
    assert sorted(tiles[i][0] for i in newlines) == sorted(set(kept_rows))
    for i in newlines:
        row = tiles[i][0]
        assert tiles[i - 1][0] == row and tiles[i - 1][1] < columns and row not in [r for r, _ in tiles[i + 1 :]]
        assert one.features[k + i].equal(model.newline) and not one.synthetic[k + i]
    own = one.origin[~one.synthetic]
    assert len(own.unique()) == len(own) and one.origin.min() >= 0 and one.origin.max() < visual.length
    if name != "prumerge":  # which merges others into the tokens it keeps
        assert one.features[~one.synthetic].equal(full.features[own])
