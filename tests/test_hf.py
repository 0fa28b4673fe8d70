"""`pruned` on random models of nine families: the identity and reference laws, what goes through `generate`,
refusals."""

import re
from functools import cache

import pytest
import torch
from torch.nn.functional import log_softmax

from analysis import hf
from analysis.hf import Pruned, pruned
from analysis.pruning import pruner
from analysis.pruning.images import prune_images
from analysis.types import Cell, Signals, VisualTokens
from tests.support import generate as small

NAMES = list(small.MODELS)
STEPS = 6

model_of = cache(small.build)


@cache
def inputs_of(name):
    return small.batch(name)[0]


def answer(name, **options):
    """Sequences and per-step logits of a greedy answer."""
    return model_of(name).generate(
        **inputs_of(name), max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True, **options
    )


@cache
def plain(name):
    return answer(name)


def dropped(name, method, keep):
    """[B, L] bool: the visual tokens that a method drops which looks at no feature."""
    inputs, runs = small.batch(name)
    gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    places = iter((inputs["input_ids"] == small.IMAGE).nonzero().tolist())

    def tokens(grid, **more):
        return VisualTokens(torch.zeros(1, grid[0] * grid[1], 2), grid, Signals(), **more)

    for image, lengths in zip(runs, image_lengths(name)):
        for grid, mosaic in image:
            tiles = tokens(mosaic, newline=torch.zeros(2)) if mosaic else None
            visual = tokens(grid, tiles=tiles)
            (kept,) = prune_images(pruner(method), visual, keep, [0])
            for place in range(visual.length):
                row, column = next(places)
                gone[row, column] = place not in kept.origin.tolist()
            lengths -= visual.length
        for _ in range(lengths):  # a single newline
            next(places)
    assert next(places, None) is None
    return gone


def image_lengths(name):
    _, runs = small.batch(name)
    if name == "llava_onevision":
        return [16 + 6 * 9, 17, 17, 16 + 8 * 5]
    return [sum(a * b + (c[0] * (c[1] + 1) if c else 0) for (a, b), c in image) for image in runs]


def reference(name, sequences, gone):
    """Logits of the steps of these sequences at full length, where no token sees a dropped one (a 4-D mask)."""
    model, inputs = model_of(name), dict(inputs_of(name))
    repeats = len(sequences) // len(inputs["input_ids"])
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    real = torch.nn.functional.pad(inputs.pop("attention_mask"), (0, new), value=1).repeat_interleave(repeats, 0)
    gone = torch.nn.functional.pad(gone, (0, new)).repeat_interleave(repeats, 0)
    ids = real.cumsum(1) - 1
    if name.startswith("qwen"):
        kinds = (sequences == small.IMAGE).int()
        grids = torch.cat([inputs["image_grid_thw"][a:b].repeat(repeats, 1) for a, b in ((0, 1), (1, 3), (3, 4))])
        ids = model.base_model.get_rope_index(sequences, kinds, grids, attention_mask=real)[0]
    place = torch.arange(sequences.shape[1])
    seen = (place[:, None] >= place) & (real.bool() & ~gone)[:, None] | (place[:, None] == place)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    with torch.no_grad():
        features = model.base_model.get_image_features(
            **{key: value for key, value in inputs.items() if key not in ("input_ids", "mm_token_type_ids")},
            return_dict=True,
        )
        features = model._expand_multimodal_outputs(inputs["input_ids"], {"image": features}, repeats)
        out = model(input_ids=sequences, attention_mask=mask, position_ids=ids, mm_encoder_outputs=features)
    return out.logits[:, -new - 1 : -1]


def gap(name, out):
    """The largest difference of logits from the reference, for spatial pruning at a quarter."""
    expected = reference(name, out.sequences, dropped(name, "spatial", 0.25))
    return float((torch.stack(out.logits, dim=1) - expected).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_with_original_ids_give_the_unpruned_models_bits(name):
    model = model_of(name)
    beams = dict(num_beams=3, num_return_sequences=2, max_new_tokens=STEPS)
    plain_beams = model.generate(**inputs_of(name), **beams)
    with torch.no_grad():
        states = model(**inputs_of(name)).logits
    with pruned(model, None, "none", keep=None, ids="original"):
        out, pruned_beams = answer(name), model.generate(**inputs_of(name), **beams)
        with torch.no_grad():
            pruned_states = model(**inputs_of(name)).logits
    assert torch.equal(out.sequences, plain(name).sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, plain(name).logits, strict=True))
    assert torch.equal(pruned_beams, plain_beams)
    real = inputs_of(name)["attention_mask"].bool()
    assert torch.equal(pruned_states[real], states[real])


@pytest.mark.parametrize("name", NAMES)
def test_a_quarter_with_original_ids_is_full_length_with_the_rest_masked_out(name):
    model = model_of(name)
    with pruned(model, None, "spatial", keep=0.25, ids="original"):
        out = answer(name)
        beams = answer(name, num_beams=3, output_scores=True)
    assert out.sequences.shape == plain(name).sequences.shape
    assert gap(name, out) <= 1e-4
    assert not torch.allclose(out.logits[0], plain(name).logits[0], atol=1e-2)  # pruning changes something
    logits = reference(name, beams.sequences, dropped(name, "spatial", 0.25))
    logits[..., [0, small.IMAGE, small.VIDEO]] = -torch.inf  # as suppressed
    made = beams.sequences[:, -STEPS:]
    scores = log_softmax(reference(name, beams.sequences, dropped(name, "spatial", 0.25)), dim=-1)
    scores = scores.gather(2, made[..., None])[..., 0].mean(dim=1)
    torch.testing.assert_close(beams.sequences_scores, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llava_onevision"])
def test_signals_belong_to_their_tokens(name):
    """The connector makes a run's features of its patches, in that order; a mosaic's newlines are the model's."""
    done = Pruned(model_of(name), None, pruner("none"), Cell(), None, {}, None)
    inputs = inputs_of(name)
    given = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        given.pop("mm_token_type_ids", None)
        out = done.get_image_features(**given)
        units = [unit for _, image in done.images for unit in image]
        parts = [part for unit in units for part in (unit, unit.tiles) if part is not None]
        for part in parts:
            made = part.connect(part.signals.patches)
            torch.testing.assert_close(made, part.features, atol=1e-4, rtol=1e-4)
    grids = [(part.grid, part.tiles.grid if part.tiles else None) for part in units]
    assert grids == [tuple(run) for image in small.batch(name)[1] for run in image]
    assert sum(len(features) for features in out.pooler_output) == int((inputs["input_ids"] == small.IMAGE).sum())


def test_internvls_attention_of_cls():
    """Of a token of 2 x 2 patches: the mean of theirs, as the tower's own eager attention has it."""
    model = small.build("internvl")
    done = Pruned(model, None, pruner("none"), Cell(), None, {}, None)
    with torch.no_grad():
        done.get_image_features(inputs_of("internvl")["pixel_values"])
        units = [unit for _, image in done.images for unit in image]
        model.model.vision_tower.set_attn_implementation("eager")
        seen = model.model.vision_tower(inputs_of("internvl")["pixel_values"], output_attentions=True).attentions
    layer = model.config.vision_feature_layer
    patches = seen[layer][:, :, 0, 1:].mean(dim=1).view(-1, 4, 2, 4, 2)
    expected = patches.mean(dim=(2, 4)).flatten(1)
    torch.testing.assert_close(torch.cat([unit.signals.cls_attention for unit in units]), expected)
    assert expected.std() > 1e-3


def cached_ids(self, cache, seen, kwargs, step=hf.Pruned.step):
    self.cut = self.cut._replace(next_id=torch.full_like(self.cut.next_id, self.prefilled))
    return step(self, cache, seen, kwargs)


def no_mask(method):
    return lambda self, *args: method(self, *args) | dict(attention_mask=None)


def next_images(self, slots, shared=hf.Pruned.shared):
    count = len(self.images)
    return [[(number + 1) % count for number in row] for row in shared(self, slots)]


def padded_right(rows):
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


MUTANTS = {
    "cache-length IDs": [(hf.Pruned, "step", cached_ids)],
    "right padding": [(hf, "_left", padded_right)],
    "lost mask": [(hf.Pruned, "step", no_mask(hf.Pruned.step)), (hf.Pruned, "prefill", no_mask(hf.Pruned.prefill))],
    "wrong image": [(hf.Pruned, "shared", next_images)],
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_reference_catches(mutant, monkeypatch):
    for where, attribute, other in MUTANTS[mutant]:
        monkeypatch.setattr(where, attribute, other)
    with pruned(model_of("llava"), None, "spatial", keep=0.25, ids="original"):
        out = answer("llava")
    assert gap("llava", out) > 1e-2


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_way_of_decoding_gives_the_same_answer(name):
    model = model_of(name)
    one = dict(inputs_of(name))
    with pruned(model, None, "random", keep=0.25, ids="original", seed=3):
        out = answer(name).sequences
        assert torch.equal(answer(name, cache_implementation="static").sequences, out)
        assert torch.equal(answer(name, use_cache=False).sequences, out)
        torch.manual_seed(0)
        several = answer(name, do_sample=True, num_return_sequences=2, top_k=1).sequences
        assert torch.equal(several, out.repeat_interleave(2, dim=0))
    # the last prompt alone, unpadded
    real = one["attention_mask"][2].bool()
    alone = {key: one[key][2:, real] for key in one if one[key].shape == one["input_ids"].shape}
    if name == "llava":
        alone["pixel_values"] = one["pixel_values"][3:]
    else:
        patches = int(one["image_grid_thw"][3].prod())
        alone |= dict(image_grid_thw=one["image_grid_thw"][3:], pixel_values=one["pixel_values"][-patches:])
    with pruned(model, None, "random", keep=0.25, ids="original", seed=3):
        single = model.generate(**alone, max_new_tokens=STEPS)
        looked_up = model.generate(**alone, max_new_tokens=STEPS, prompt_lookup_num_tokens=3)
    assert torch.equal(single[0, -STEPS:], out[2, -STEPS:])
    assert torch.equal(looked_up, single)


def hooks_of(model):
    parts = (model, model.base_model, model.get_decoder())
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [len(getattr(part, kind)) for part in parts for kind in kinds], [sorted(part.__dict__) for part in parts]


def test_everything_is_restored_also_after_an_exception():
    model = model_of("llava")
    before = plain("llava").sequences, hooks_of(model)
    with pytest.raises(KeyError, match="mine"), pruned(model, None, "random", keep=0.25):
        answer("llava")
        raise KeyError("mine")
    assert hooks_of(model) == before[1]
    assert torch.equal(answer("llava").sequences, before[0])
    with pruned(model, None, "random", keep=0.25):  # nothing is left of the block before
        answer("llava")
    assert hooks_of(model) == before[1]


def test_states_at_full_length():
    inputs = inputs_of("llava")
    with pruned(model_of("llava"), None, "spatial", keep=0.25) as done, torch.no_grad():
        out = model_of("llava")(**inputs, output_hidden_states=True)
    assert (done.kept, done.full) == ([4, 8, 4], [16, 32, 16])
    assert {state.shape[:2] for state in out.hidden_states} == {inputs["input_ids"].shape}
    gone = dropped("llava", "spatial", 0.25)
    row, place = gone.nonzero().T
    assert torch.equal(out.logits[row, place], out.logits[row, place - 1])  # the last kept one before it
    assert torch.equal(model_of("llava").lm_head(out.hidden_states[-1]), out.logits)


def test_gradients_flow_through_the_kept_tokens():
    model, inputs = small.build("llava"), inputs_of("llava")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == small.IMAGE, -100)
    with pruned(model, None, "fastervlm", keep=0.25):
        model(**inputs, labels=labels).loss.backward()
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_ids_and_seeds_are_used():
    answers = {}
    for ids in ("original", "compact", "original+cache", "original@compact"):
        with pruned(model_of("llava"), None, "random", keep=0.25, ids=ids):
            answers[ids] = answer("llava")
    first = {ids: out.logits[0] for ids, out in answers.items()}
    second = {ids: out.logits[1] for ids, out in answers.items()}
    assert torch.equal(first["original"], first["original+cache"])
    assert not torch.equal(second["original"], second["original+cache"])
    assert not torch.equal(first["original"], first["original@compact"])
    assert not torch.equal(first["compact"], first["original@compact"])
    with pruned(model_of("llava"), None, "random", keep=0.25, seed=[0, 0, 1]):
        other = answer("llava").logits[0]
    assert torch.equal(other[:2], first["original"][:2])
    assert not torch.equal(other[2], first["original"][2])


def refused(error, message, name="llava", model=None, **options):
    """The message with which a block raises; it runs `call` inside."""
    call = options.pop("call", lambda model: model.generate(**inputs_of(name), max_new_tokens=2))
    with pytest.raises(error, match=re.escape(message)), pruned(model or model_of(name), None, **options):
        call(model or model_of(name))


def nested(model):
    with pruned(model, None):
        pass


def resumed(model):
    out = model.generate(**inputs_of("llava"), max_new_tokens=2, return_dict_in_generate=True)
    model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2)


def own_cache(model):
    with torch.no_grad():
        cache = model(**inputs_of("llava")).past_key_values
        model(**inputs_of("llava"))
        model(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)


def features_from_elsewhere(model):
    with torch.no_grad():
        made = small.build("llava").model.get_image_features(inputs_of("llava")["pixel_values"])
    model.generate(
        **{key: value for key, value in inputs_of("llava").items() if key != "pixel_values"},
        mm_encoder_outputs={"image": made},
    )


def generated(**more):
    return lambda model: model.generate(**inputs_of("llava") | more, max_new_tokens=2)


def two_way(model):
    length = inputs_of("llava")["input_ids"].shape[1]
    with torch.no_grad():
        model(**inputs_of("llava") | dict(attention_mask=torch.zeros(3, 1, length, length)))


def one_place_moved():
    """The prompts with one image token moved from the first to the last; together there are as many as before."""
    ids = inputs_of("llava")["input_ids"].clone()
    ids[0, (ids[0] == small.IMAGE).nonzero()[0]] = 5
    ids[2, -1] = small.IMAGE
    return ids


WRONG = {
    "no image": (RuntimeError, "no image was pruned", dict(call=lambda model: None)),
    "text only": (
        RuntimeError,
        "no image was pruned",
        dict(call=lambda model: model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2)),
    ),
    "nested": (RuntimeError, "being pruned already", dict(call=nested)),
    "resumed": (RuntimeError, "leave out past_key_values", dict(call=resumed)),
    "own cache": (RuntimeError, "give it the whole prompt first", dict(call=own_cache)),
    "own features": (ValueError, "give the model pixel_values inside", dict(call=features_from_elsewhere)),
    "chunks": (ValueError, "leave it out inside `pruned`", dict(call=generated(prefill_chunk_size=8))),
    "own assistant": (
        ValueError,
        "cannot be its own assistant_model",
        dict(call=lambda model: model.generate(**inputs_of("llava"), assistant_model=model)),
    ),
    "embeddings": (ValueError, "give generate input_ids", dict(call=generated(inputs_embeds=torch.zeros(3, 42, 32)))),
    "images missing": (
        ValueError,
        "no pixel_values came with it",
        dict(call=lambda model: (generated()(model), model.generate(inputs_of("llava")["input_ids"]))),
    ),
    "places moved": (
        ValueError,
        "give images and prompts to the processor in one call",
        dict(call=generated(input_ids=one_place_moved())),
    ),
    "mask": (ValueError, "is not causal", dict(call=two_way)),
    "position IDs": (
        ValueError,
        "no position_ids of your own",
        dict(call=generated(position_ids=2 * torch.arange(42).expand(3, -1))),
    ),
    "pruner": (ValueError, "did you mean 'fastervlm'", dict(pruner="fastrvlm")),
    "keep": (ValueError, "keep ratio must be in (0, 1]", dict(keep=25)),
    "keep of none": (ValueError, "keep must be None or 1", dict(pruner="none", keep=0.5)),
    "ids": (ValueError, "did you mean 'original'", dict(ids="orignal")),
    "order": (ValueError, "an order has no text rule", dict(order="raster@after")),
    "seeds": (ValueError, "seed must hold one for each prompt, got 2 for 3", dict(pruner="random", seed=[1, 2])),
    "texts": (ValueError, "texts must hold one for each prompt, got 1 for 3", dict(pruner="random", texts=["a"])),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_says_what_would_be_right(case):
    error, message, options = WRONG[case]
    refused(error, message, **options)
    assert torch.equal(answer("llava").sequences, plain("llava").sequences)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "llava_onevision"])
def test_a_tower_without_cls_refuses_methods_that_need_one(name):
    refused(ValueError, "methods that can: random, spatial, divprune", name, pruner="fastervlm")


def test_models_kernels_and_videos_that_cannot_be_pruned():
    model = small.build("llava")
    refused(ValueError, "give the whole model", model=model.model)
    model.config.model_type = "gemma3"
    refused(ValueError, "gemma3", model=model)
    flash = small.build("llava")
    flash.get_decoder().config._attn_implementation = "flash_attention_2"
    refused(ValueError, "attn_implementation='sdpa'", model=flash)
    qwen = model_of("qwen2_vl")
    refused(
        ValueError,
        "still images",
        "qwen2_vl",
        pruner="random",
        call=lambda model: model.model.get_video_features(torch.zeros(16, 96), torch.tensor([[1, 4, 4]])),
    )
    assert "get_video_features" not in qwen.model.__dict__


# ---- inside the decoder (the engine's answers: tests/test_by_generate.py)


@cache
def one_image(name):
    """The last prompt of the batch by itself, with its one image, in one piece in all families."""
    inputs, _ = small.batch(name)
    real = inputs["attention_mask"][2].bool()
    pictures = 96 if name.startswith("qwen") else 1  # patches of its image
    lengths = dict(pixel_values=pictures, image_grid_thw=1, image_sizes=1, batch_num_images=1)
    return {
        key: value[-lengths[key] :] if key in lengths else value[2:, real].contiguous() for key, value in inputs.items()
    }


def one_answer(name, **options):
    out = model_of(name).generate(
        **one_image(name), max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name", NAMES)
def test_stages_that_drop_nothing_change_no_bit_and_others_need_no_cache(name):
    model, first = model_of(name), 2 if name == "qwen3_vl" else 1  # whose first layers add features to all tokens
    sequences, logits = one_answer(name)
    with pruned(model, None, f"fastv:layer={first}", keep=1, ids=f"original|{first}|compact@original"):
        again, same = one_answer(name)
    assert torch.equal(again, sequences) and torch.equal(same, logits)
    with pruned(model, None, f"random:inside={first}", keep=0.5, ids="compact", order="shuffled") as done:
        again, changed = one_answer(name)
        beams, _ = one_answer(name, num_beams=3)
        without, slowly = one_answer(name, use_cache=False)
        assert torch.equal(one_answer(name, use_cache=False, num_beams=3)[0], beams)
    assert torch.equal(again, without) and not torch.allclose(changed, logits, atol=1e-2)
    torch.testing.assert_close(changed, slowly, atol=1e-4, rtol=0)
    depth, [full] = len(model.get_decoder().layers), set(done.full)
    half = done.read[0][-1][1]
    assert done.kept[0] == pytest.approx((first * full + (depth - first) * half) / depth) and full / 2 <= half < full


def test_what_inside_the_decoder_cannot_be_done_is_refused():
    model = model_of("llava")
    with pruned(model, None, "fastv:layer=1", keep=0.5):
        with pytest.raises(ValueError, match="with one image in one piece"):
            answer("llava")
        for options, said in (
            (dict(prompt_lookup_num_tokens=2), "leave out assistant_model"),
            (dict(cache_implementation="static"), "the cache must grow"),
            (dict(output_hidden_states=True), "no common hidden states"),
        ):
            with pytest.raises(ValueError, match=said):
                one_answer("llava", **options)
        one_answer("llava")
    with (
        pytest.raises(ValueError, match="has the layers 0 to"),
        pruned(model, None, "random", ids="original|9|compact"),
    ):
        pass
    with pruned(model_of("qwen3_vl"), None, "random:inside=1", keep=0.5):
        with pytest.raises(ValueError, match="nothing can be dropped before layer 2"):
            one_answer("qwen3_vl")
        with pytest.raises(ValueError, match="nothing can be dropped"):
            one_answer("qwen3_vl")
