"""The training script: its packed rows equal single questions, and it resumes."""

import csv
import sys

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from analysis.testbed import train
from analysis.testbed.grammar import questions
from analysis.testbed.scenes import scene
from analysis.testbed.tokenizer import build
from analysis.testbed.tower import StemClip, clip_config


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    tokenizer = build()
    return tokenizer, train.build_llava(tokenizer, StemClip(clip_config(len(tokenizer)))).eval()


@torch.no_grad()
def test_a_packed_block_equals_a_single_question(llava):
    """Each question sees the system prompt, the image and itself, at the position IDs it would have alone."""
    tokenizer, model = llava
    embed, visual = model.get_input_embeddings(), torch.randn(1, 144, 128)
    before = torch.tensor(tokenizer.encode("<s>A chat USER: ", add_special_tokens=False))
    asked = questions(scene("train", 0), np.random.default_rng(0), 4)

    def states(pairs):
        ids, positions, mask, labels = train.pack(tokenizer, [pairs], len(before), "cpu")
        embeds = torch.cat([embed(before)[None], visual, embed(ids)], 1)
        found = model.model.language_model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask,
                                           use_cache=False).last_hidden_state[:, -ids.shape[1]:]
        return found[labels != -100], labels[labels != -100], positions

    together, labels, positions = states(asked)
    alone = [states([pair]) for pair in asked]
    assert torch.equal(labels, torch.cat([a[1] for a in alone]))
    torch.testing.assert_close(together, torch.cat([a[0] for a in alone]), atol=2e-5, rtol=1e-4)
    assert all(torch.equal(a[2], torch.arange(a[2].shape[1])[None]) for a in alone)
    assert positions.max() < max(a[2].shape[1] for a in alone)
    # the label of a state is the next token, and an answer ends with </s>
    assert (labels == tokenizer.eos_token_id).sum() == len(asked)


def test_packed_attention_is_attention(llava):
    """The attention written out for training on CPU against PyTorch's own, on rows of unequal length."""
    tokenizer, model = llava
    decoder = model.model.language_model
    before = tokenizer.encode("<s>A chat USER: ", add_special_tokens=False)
    asked = [questions(scene("train", i), np.random.default_rng(i), 3) for i in (0, 1)]
    ids, positions, mask, labels = train.pack(tokenizer, asked, len(before), "cpu")
    embeds = torch.randn(2, mask.shape[-1], 128, generator=torch.Generator().manual_seed(0))
    AttentionInterface.register("packed", train.packed_attention(len(before) + 144))

    def states():
        with torch.no_grad():
            return decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
                           ).last_hidden_state[:, -ids.shape[1]:][labels != -100]

    expected, was = states(), decoder.config._attn_implementation
    decoder.set_attn_implementation("packed")
    try:
        assert torch.equal(states(), expected)  # in evaluation it is PyTorch's
        decoder.train()
        torch.testing.assert_close(states(), expected, atol=2e-5, rtol=1e-4)
    finally:
        decoder.eval().set_attn_implementation(was)


def test_patch_labels_cover_the_boxes():
    drawn = scene("val", 0)
    classes = {name: i for i, name in enumerate(["", *train.names()])}
    labels = train.patch_labels(drawn, classes)
    assert set(labels) - {0} <= {classes[f"{o.colour} {o.noun}".strip()] for o in drawn.objects}
    area = sum(o.area for o in drawn.objects) / 16**2
    assert 0.6 * area < (labels > 0).sum() < 1.4 * area


def test_features_of_the_trainer_are_those_of_the_adapter():
    """What the language model is trained on is what it is evaluated on."""
    from analysis.models import load
    model = load("tiny-llava")
    pictures = [scene("val", i).image for i in range(3)]
    pixels = torch.from_numpy(np.stack([train.padded(p) for p in pictures]))
    torch.testing.assert_close(train.normalised(pixels), model.pixels(pictures), atol=1e-6, rtol=1e-5)


def test_llava_training_resumes_and_exports(tmp_path, monkeypatch):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "tiny-clip").symlink_to(train.CHECKPOINTS / "tiny-clip")
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(train, "CHECKPOINTS", checkpoints)
    small = "--batch 2 --questions 2 --pool 4 --fresh 2 --log 1 --evaluate 100 --device cpu".split()
    monkeypatch.setattr(train, "HELD_OUT", 2)
    for steps in ("2", "3"):
        monkeypatch.setattr(sys, "argv", ["train", "llava", "--steps", steps, *small])
        train.main()
    with open(tmp_path / "runs/llava/log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert int(rows[2]["scenes"]) > int(rows[1]["scenes"])  # fresh scenes, not the first ones again
    assert rows[2]["accuracy"] != ""
    assert (checkpoints / "tiny-llava/model.safetensors").stat().st_size < 25e6
