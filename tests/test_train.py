"""The training scripts: packed rows equal single questions, prompts are the adapters', runs resume."""

import csv
import sys

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaModel

from analysis import models
from analysis.models.stem import StemClip, clip_config
from analysis.pruning import PRUNERS
from analysis.pruning.images import prune_images
from analysis.rec.boxes import BOX_FORMATS, FRAMES
from analysis.refstamps import grammar
from analysis.refstamps.scenes import scene
from analysis.training import contrast, grow, instruct, loop, train
from analysis.training.tokenizer import build

NAMES = ["tiny-llava", "tiny-llava-next", "tiny-shikra", "tiny-minigpt-v2"]


@pytest.fixture(scope="module")
def random_clip():
    torch.manual_seed(0)
    clip = StemClip(clip_config(len(build()))).eval()
    for statistics in (buffer for name, buffer in clip.named_buffers() if "running" in name):
        statistics.uniform_(0.5, 2)
    return clip


@pytest.fixture(scope="module", params=NAMES)
def tiny_model(request, random_clip, tmp_path_factory):
    torch.manual_seed(0)
    return instruct.build(request.param, random_clip, tmp_path_factory.mktemp("folder") / request.param)[1]


def some_rows(model, scenes, alone=False):
    """Rows of questions on scenes, ready to be packed."""
    drawn = [scene("train", i) for i in scenes]
    seen = instruct.views(model, [s.image for s in drawn])
    with torch.no_grad():
        return [
            (prefix, instruct.connected(model, v), blocks)
            for i, s, v in zip(scenes, drawn, seen)
            for prefix, blocks in instruct.asked(model, s, np.random.default_rng(i), 4, alone)
        ]


def states(model, rows):
    """Hidden states that predict answers, their labels, position IDs and the length of what the blocks share."""
    with torch.no_grad():
        embeds, positions, mask, labels, context = instruct.packed(rows, model.embed)
        found = model.decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False)
    return found.last_hidden_state[:, context:][labels != -100], labels[labels != -100], positions, context


def test_packed_blocks_equal_single_questions(tiny_model):
    """Each question sees what comes before it, the image and itself, at the position IDs it would have alone."""
    rows = some_rows(tiny_model, [0, 3])  # of two sizes
    together, labels, _, _ = states(tiny_model, rows)
    single = [states(tiny_model, [(prefix, image, [one])]) for prefix, image, blocks in rows for one in blocks]
    assert torch.equal(labels, torch.cat([s[1] for s in single]))
    torch.testing.assert_close(together, torch.cat([s[0] for s in single]), atol=5e-5, rtol=1e-3)
    assert all(torch.equal(s[2], torch.arange(s[2].shape[1])[None]) for s in single)
    # the label of a state is the next token, and an answer ends with </s>
    assert (labels == tiny_model.eos).sum() == len(single) > len(rows)


def test_training_rows_are_evaluation_prompts(tiny_model):
    """What is trained on is what `evaluate` feeds: the tokens of the prompt and of the unpruned image."""
    drawn = scene("train", 0)
    ((prefix, image, [(suffix, answer)]),) = some_rows(tiny_model, [0], alone=True)
    found = grammar.rec_question(drawn, np.random.default_rng(0))
    expected = tiny_model.prompt(found[0])
    assert (prefix.tolist(), suffix) == (expected[0].tolist(), expected[1].tolist())
    whole = prune_images(PRUNERS["none"], tiny_model.encode([drawn.image]), None, [0])[0].features
    torch.testing.assert_close(image, whole, atol=2e-2, rtol=2e-2)  # features are kept in half precision
    box = BOX_FORMATS[tiny_model.box_format].parse(tiny_model.text(answer))
    truth = BOX_FORMATS["llava"].parse(found[1])
    size = np.array(drawn.size)
    decoded = FRAMES[tiny_model.frame].decode(box, size) - FRAMES["padded"].decode(truth, size)
    assert abs(decoded).max() <= 0.011 * size.max()
    assert tiny_model.tokenizer.unk_token_id not in [*prefix.tolist(), *suffix, *answer]


def test_packed_attention_is_attention(tiny_model):
    """The attention written out for training on CPU against PyTorch's own, on rows of unequal length."""
    rows, decoder = some_rows(tiny_model, [0, 3]), tiny_model.decoder
    expected = states(tiny_model, rows)[0]
    attention = instruct.PackedAttention()
    attention.context = states(tiny_model, rows)[3]
    AttentionInterface.register("packed", attention)
    decoder.set_attn_implementation("packed")
    try:
        assert torch.equal(states(tiny_model, rows)[0], expected)  # in evaluation it is PyTorch's
        decoder.train()
        torch.testing.assert_close(states(tiny_model, rows)[0], expected, atol=5e-5, rtol=1e-3)
    finally:
        decoder.eval().set_attn_implementation("sdpa")


@torch.no_grad()
def test_a_grown_model_computes_the_same():
    """Wider, deeper and with more words: the same states, zeros in the new channels."""

    def decoder(width, layers, words):
        return LlamaModel(
            LlamaConfig(
                vocab_size=words,
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                rms_norm_eps=1e-12,
                num_attention_heads=width // 32,
                num_key_value_heads=width // 32,
                attn_implementation="sdpa",
            )
        ).eval()

    torch.manual_seed(0)
    small, large = decoder(64, 2, 30), decoder(96, 3, 33)
    for model in (small, large):
        for weight in model.parameters():
            weight.normal_(std=1 if weight.ndim == 1 else 0.1)
    ids = torch.randint(30, (2, 20))
    before = large(input_ids=ids, use_cache=False).last_hidden_state[..., :64]
    grow.grow(large, small)
    expected, found = (m(input_ids=ids, use_cache=False).last_hidden_state for m in (small, large))
    torch.testing.assert_close(found[..., :64], expected, atol=1e-4, rtol=1e-4)
    assert not found[..., 64:].any() and not torch.allclose(before, expected, atol=0.1)
    with pytest.raises(ValueError, match="no room for"):
        grow.grow(small, large)


def test_patch_labels_cover_the_boxes():
    drawn = scene("val", 0)
    classes = {name: i for i, name in enumerate(["", *contrast.names()])}
    labels = contrast.patch_labels(drawn, classes)
    assert set(labels) - {0} <= {classes[f"{o.colour} {o.noun}".strip()] for o in drawn.objects}
    area = sum(o.area for o in drawn.objects) / 16**2
    assert 0.6 * area < (labels > 0).sum() < 1.4 * area


def test_training_resumes_and_exports(tmp_path, monkeypatch):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "tiny-clip").symlink_to(loop.CHECKPOINTS / "tiny-clip")
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(loop, "CHECKPOINTS", checkpoints)
    small = "--batch 2 --questions 2 --pool 4 --fresh 2 --log 1 --evaluate 100 --device cpu --start tiny-llava".split()
    monkeypatch.setattr(loop, "HELD_OUT", 2)
    for steps in ("2", "3"):
        monkeypatch.setattr(sys, "argv", ["train", "tiny-shikra", "--steps", steps, *small])
        train.main()
    with open(tmp_path / "runs/tiny-shikra/log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert int(rows[2]["scenes"]) > int(rows[1]["scenes"])  # fresh scenes, not the first ones again
    assert rows[2]["accuracy"] != ""
    loaded = models.load(checkpoints / "tiny-shikra", device="cpu")
    assert loaded.prompt_text("x").index("x") < loaded.prompt_text("x").index("<im_patch>")
    assert (checkpoints / "tiny-shikra/model.safetensors").stat().st_size < 25e6
