"""The training scripts: packed rows equal single questions, prompts are the adapters', runs resume."""

import csv

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, CLIPModel, LlamaConfig, LlamaModel

from analysis import models
from analysis.engine.decode import for_decoder
from analysis.positions import sequence_positions
from analysis.pruning import PRUNERS
from analysis.pruning.images import prune_images
from analysis.rec.boxes import BOX_FORMATS, frame
from analysis.refstamps import grammar
from analysis.refstamps.scenes import scene
from analysis.training import contrast, design, grow, imitate, instruct, loop, stream, train
from analysis.training.tokenizer import build
from analysis.types import Ids

NAMES = list(design.FAMILY)


@pytest.fixture(scope="module")
def towers():
    torch.manual_seed(0)
    vision = CLIPModel(design.clip_config(len(build()))).vision_model.eval()
    return {None: vision} | {stage: student.build(vision.config).eval() for stage, student in imitate.STUDENTS.items()}


@pytest.fixture(scope="module", params=NAMES)
def tiny_model(request, towers, tmp_path_factory):
    torch.manual_seed(0)
    tower = design.TOWER.get(design.family_of(request.param))
    return design.build(request.param, towers[tower], tmp_path_factory.mktemp("folder") / request.param)[1]


def drawn_rows(model, numbers, single=False):
    """What the workers write and the tower sees of some scenes: image tokens, which are valid, and questions."""
    drawn, writer = [scene("train", i) for i in numbers], instruct.Writer(model)
    pixels = torch.stack([writer.pixels(s) for s in drawn])
    seen = instruct.views(model, pixels, torch.tensor([s.size for s in drawn]))
    if single:
        room = instruct.room(model)
        items = [writer.single(s, np.random.default_rng(i), 2, room) for i, s in zip(numbers, drawn)]
        asked = instruct.Blocks(*(torch.stack([i[f"single_{n}"] for i in items]) for n in instruct.Blocks._fields))
        prefix, before = (torch.stack([i[f"single_{n}"] for i in items]) for n in ("prefix", "before"))
    else:
        asked = [writer.packed(s, np.random.default_rng(i), 4) for i, s in zip(numbers, drawn)]
        asked = instruct.Blocks(*map(torch.stack, zip(*asked)))
        table, lengths = instruct.prefixes(model, np.random.default_rng(0))
        prefix, before = table[: len(drawn)], lengths[: len(drawn)]
    with torch.no_grad():
        image = instruct.connected(model, seen["seen"], seen["kind"])
    return prefix, before, image, seen, asked


def states(model, prefix, before, image, seen, asked):
    """Hidden states that predict answers, and the tokens that they are to predict."""
    with torch.no_grad():
        embeds, positions, mask, labels = instruct.packed(model.embed, prefix, before, image, seen, asked)
        found = model.decoder(
            inputs_embeds=embeds, position_ids=for_decoder(positions), attention_mask=mask, use_cache=False
        )
    return found.last_hidden_state[:, -labels.shape[1] :][labels != -100], labels[labels != -100]


def test_packed_blocks_equal_single_questions(tiny_model):
    """Each question sees what comes before it, the image and itself, at the position IDs it would have alone."""
    prefix, before, image, seen, asked = drawn_rows(tiny_model, [0, 3, 6])  # of several sizes
    together, labels = states(tiny_model, prefix, before, image, seen, asked)
    valid = seen["kind"] > 0
    single, wanted = [], []
    for row in range(len(prefix)):
        tokens = torch.cat([tiny_model.embed(prefix[row, -int(before[row]) :].long()), image[row, valid[row]]])
        for ids, question, length in zip(*(part[row] for part in asked)):
            ids = ids[: int(length)].long()
            embeds = torch.cat([tokens, tiny_model.embed(ids)])[None]
            own = Ids(seen["place"][row, valid[row]].long().squeeze(-1), int(seen["text_start"][row]), 0)
            places = sequence_positions(int(before[row]), own, len(ids))[None]
            with torch.no_grad():
                found = tiny_model.decoder(inputs_embeds=embeds, position_ids=for_decoder(places), use_cache=False)
            found = found.last_hidden_state[0, len(tokens) :]
            single.append(found[int(question) - 1 : -1])
            wanted.append(ids[int(question) :])
    assert torch.equal(labels, torch.cat(wanted))
    torch.testing.assert_close(together, torch.cat(single), atol=5e-5, rtol=1e-3)
    # the label of a state is the next token, and an answer ends with </s>
    assert (labels == tiny_model.eos).sum() == len(single) > len(prefix)


def test_training_rows_are_evaluation_prompts(tiny_model):
    """What is trained on is what `evaluate` feeds: the tokens of the prompt and of the unpruned image."""
    drawn, writer = scene("train", 0), instruct.Writer(tiny_model)
    expression, truth = grammar.rec_question(drawn, np.random.default_rng(0))
    first, then = tiny_model.prompt(expression)
    if instruct.asks_first(tiny_model):
        made = writer.single(drawn, np.random.default_rng(0), 1, instruct.room(tiny_model))
        prefix = made["single_prefix"][0, -int(made["single_before"]) :]
        asked = instruct.Blocks(made["single_ids"], made["single_asked"], made["single_length"])
    else:
        table, lengths = instruct.prefixes(tiny_model, np.random.default_rng(0))
        assert len(lengths.unique()) > 10 and lengths.max() <= instruct.room(tiny_model)
        prefix = table[lengths.argmin(), -int(lengths.min()) :]
        answer = writer.box(drawn, 0)
        asked = instruct.blocks([writer.tokens(tiny_model.prompt(expression), writer.box(drawn, 0))[1:]], 64)
        truth = grammar.answer_box(drawn, 0)
        assert answer
    ids, question, length = (part[0] for part in asked)
    assert prefix.tolist() == first.tolist() and ids[: int(question)].tolist() == then.tolist()
    answer = ids[int(question) : int(length)].tolist()
    box = BOX_FORMATS[tiny_model.box_format].parse(tiny_model.text(answer))
    size = np.array(drawn.size)
    decoded = frame(tiny_model.frame).decode(box, size) - frame("padded").decode(
        BOX_FORMATS["llava"].parse(truth), size
    )
    assert abs(decoded).max() <= 0.011 * size.max()
    assert tiny_model.tokenizer.unk_token_id not in [*prefix.tolist(), *ids[: int(length)].tolist()]
    whole = prune_images(PRUNERS["none"], tiny_model.encode([drawn.image]), None, [0])[0].features
    _, _, image, seen, _ = drawn_rows(tiny_model, [0])
    torch.testing.assert_close(image[0, seen["kind"][0] > 0], whole, atol=5e-2, rtol=5e-2)  # kept in half precision


def test_packed_attention_is_attention(tiny_model):
    """The attention written out for training on CPU against PyTorch's own, on rows of unequal length."""
    rows, decoder = drawn_rows(tiny_model, [0, 3]), tiny_model.decoder
    expected = states(tiny_model, *rows)[0]
    attention = instruct.PackedAttention()
    attention.context = rows[0].shape[1] + rows[2].shape[1]
    AttentionInterface.register("packed", attention)
    decoder.set_attn_implementation("packed")
    try:
        assert torch.equal(states(tiny_model, *rows)[0], expected)  # in evaluation it is PyTorch's
        decoder.train()
        torch.testing.assert_close(states(tiny_model, *rows)[0], expected, atol=5e-5, rtol=1e-3)
    finally:
        decoder.eval().set_attn_implementation("sdpa")


def test_the_pool_replaces_the_oldest():
    scenes = stream.Scenes(lambda drawn, rng: dict(number=torch.tensor(drawn.index)), seed=1, start=4, easy=100)
    pool = stream.Pool(scenes, 6, 2, 0, lambda items: items)
    first = stream.SEEDS + 4
    assert pool.filled == 2 and pool.items["number"][:2].tolist() == [first, first + 1]
    kept = pool.items["number"]
    for _ in range(3):
        pool.refresh()
    assert kept.tolist() == [first + 6, first + 7, *range(first + 2, first + 6)]
    assert pool.drawn == 12 and pool.filled == 6


@torch.no_grad()
def test_begin_as_keeps_what_is_shared(towers, tmp_path, monkeypatch):
    """A linear connector starts as the least-squares fit of the other's; what two models share computes the same."""
    torch.manual_seed(0)
    monkeypatch.setattr(instruct, "FITTED", 20)
    llava, shikra = (design.build(name, towers[None], tmp_path / name)[1] for name in ("tiny-llava", "tiny-shikra"))
    instruct.begin_as(shikra, llava)
    words = torch.arange(10)[None]
    assert torch.equal(shikra.decoder(input_ids=words)[0], llava.decoder(input_ids=words)[0])
    pictures = [llava.squared(scene("train", i).image) for i in range(4)]
    found, wanted = (model.encode(pictures).features for model in (shikra, llava))
    assert (found - wanted).var() < 0.2 * wanted.var()


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
    area = sum(o.area for o in drawn.objects) / design.PATCH**2
    assert 0.6 * area < (labels > 0).sum() < 1.4 * area


def test_training_resumes_and_exports(tmp_path, monkeypatch):
    """Every kind of stage, in the order of the real thing: a CLIP, a LLaVA on it, another tower, a model that begins as
    it."""
    checkpoints = tmp_path / "checkpoints"
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(loop, "CHECKPOINTS", checkpoints)
    monkeypatch.setattr(loop, "BEGUN", tmp_path)
    monkeypatch.setattr(instruct, "FITTED", 4)
    common = "--batch 2 --pool 4 --fresh 2 --log 1 --evaluate 100 --device cpu --workers 0 --held-out 2".split()
    train.main(["tiny-clip", "--steps", "1", *common])
    train.main(["tiny-llava", "--steps", "1", "--questions", "2", *common])
    train.main(["tiny-eva", "--steps", "1", *common])
    start = ["--start", "tiny-llava"]
    train.main(["tiny-minigpt-v2", "--steps", "1", "--questions", "2", *start, *common])
    train.main(["tiny-qwen-tower", "--steps", "1", *common])
    train.main(["tiny-qwen2.5-vl", "--steps", "1", "--questions", "2", *start, *common])
    for steps in ("2", "3"):
        train.main(["tiny-shikra", "--steps", steps, "--questions", "2", *start, *common])
    with open(tmp_path / "runs/tiny-shikra/log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert int(rows[2]["scenes"]) > int(rows[1]["scenes"])  # fresh scenes, not the first ones again
    assert rows[2]["accuracy"] != ""
    loaded = models.load(checkpoints / "tiny-shikra", device="cpu")
    assert loaded.prompt_text("x").index("x") < loaded.prompt_text("x").index("<im_patch>")
    assert (checkpoints / "tiny-shikra/model.safetensors").stat().st_size < 25e6
    assert models.load(checkpoints / "tiny-qwen2.5-vl", device="cpu").layout((192, 160)) == (13, 16)
    assert models.load(checkpoints / "tiny-minigpt-v2", device="cpu").grid == (design.GRID, design.GRID // 4)


def test_a_run_can_be_bounded_by_time():
    class Args:
        lr, decay = 1.0, 0.5

    assert loop.rate(0, 0.0, Args) == 1 / loop.WARM_UP and loop.rate(10**6, 0.4, Args) == 1.0
    assert loop.rate(10**6, 0.75, Args) == 0.5 and loop.rate(10**6, 1.0, Args) == 0.0
