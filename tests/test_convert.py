"""Small models are taken apart into upstream's names and files, and come back by the command line."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from analysis import models
from analysis.engine.decode import Inputs, prefill
from analysis.models import convert
from tests.support.checkpoint import noise, saved
from tests.support.families import build

EVA_NAMES = {
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn": "attn",
    "attn.projection": "attn.proj",
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.class_embedding": "cls_token",
}
LORA = "llama_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}{}.weight"
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
Gadget = type("Gadget", (), {"__reduce__": lambda self: (print, ("it ran",))})  # runs code when it is unpickled


def sharded(weights, folder):
    """Two safetensors files and their index."""
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(index.values()):
        save_file({name: weights[name].contiguous() for name in weights if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def taken_apart(family, folder):
    """A small model, its language model and connector; the folder keeps the tokenizer and the former's config.json."""
    whole = build(family, None, folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(whole.config.text_config.to_dict() | dict(pad_token_id=-1)))
    llama = {f"model.{name}": weight.clone() for name, weight in whole.model.language_model.state_dict().items()}
    llama["lm_head.weight"] = whole.lm_head.weight.detach().clone()
    return whole, llama, whole.model.multi_modal_projector.state_dict()


@pytest.fixture
def shikra(tmp_path, monkeypatch):
    """The small model, its sources in upstream's names and as files, and the command that puts these together."""
    monkeypatch.setattr(convert, "SHIKRA_SIDE", 32)
    for name in ("delta", "llama", "clip"):
        (tmp_path / name).mkdir()
    whole, delta, connector = taken_apart("shikra", tmp_path / "delta")
    llama = {
        name: torch.randn_like(weight[: -7 if name.split(".")[-2] in ("embed_tokens", "lm_head") else None])
        for name, weight in delta.items()
    }
    for name, weight in llama.items():
        delta[name][: len(weight)] -= weight
    delta |= {f"model.mm_projector.{kind}": weight for kind, weight in connector.items()} | {BUFFER: torch.ones(6)}
    clip = {f"vision_model.{name}": weight for name, weight in whole.model.vision_tower.state_dict().items()}
    clip |= {
        name: torch.ones(1)
        for name in (
            "vision_model.embeddings.position_ids",
            "text_model.norm.bias",
            "logit_scale",
            "visual_projection.weight",
        )
    }
    torch.save(delta, tmp_path / "delta" / "pytorch_model.bin")
    sharded(llama, tmp_path / "llama")
    save_file(clip, tmp_path / "clip" / "model.safetensors")
    torch.save({}, tmp_path / "clip" / "pytorch_model.bin")  # safetensors are preferred
    config = dict(model_type="clip", vision_config=whole.config.vision_config.to_dict())
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    return SimpleNamespace(
        whole=whole,
        sources=dict(delta=delta, llama=llama, clip=clip),
        weights=convert.shikra_weights,
        out=tmp_path / "out",
        command=["shikra", *(f"--{n}={tmp_path / n}" for n in ("delta", "llama", "clip", "out"))],
    )


@pytest.fixture
def minigpt_v2(tmp_path, monkeypatch):
    """As `shikra`; LoRA in both spellings; no ln_vision; EVA at half the side, with a block too many."""
    whole, llama, connector = taken_apart("minigpt_v2", tmp_path)
    for name in convert.EVA:
        monkeypatch.setitem(convert.EVA, name, getattr(whole.config.vision_config, name))
    tower = whole.model.vision_tower.requires_grad_(False)
    tower.post_layernorm.reset_parameters()
    positions = torch.randn(1, 17, 16)
    wide = torch.nn.functional.interpolate(positions[:, 1:].view(1, 4, 4, 16).permute(0, 3, 1, 2), 8, mode="bicubic")[0]
    tower.embeddings.position_embedding[0] = torch.cat([positions[0, :1], wide.permute(1, 2, 0).reshape(64, 16)])
    unused = ("norm.weight", "head.bias", "fc_norm.bias", "mask_token", "rel_pos_bias.relative_position_bias_table")
    unused += ("blocks.0.attn.relative_position_index", "blocks.1.attn.relative_position_bias_table")
    eva = {"pos_embed": positions} | {name: torch.ones(1) for name in unused}
    for name, weight in tower.state_dict().items():
        for ours, theirs in EVA_NAMES.items():
            name = name.replace(ours, theirs)
        if name.endswith("qkv.bias"):
            weight[16:32] = 0
            eva |= {name.replace("qkv.", "q_"): weight[:16], name.replace("qkv.", "v_"): weight[32:]}
        elif "position" not in name and "post" not in name:
            eva[name] = weight
    eva |= {name.replace("blocks.2", "blocks.3"): weight for name, weight in eva.items() if "blocks.2" in name}
    checkpoint = {f"llama_proj.{kind}": weight for kind, weight in connector.items()}
    checkpoint[f"llama_model.base_model.model.{BUFFER}"] = torch.ones(6)
    for i, part in ((i, part) for i in (0, 1) for part in "qv"):
        a, b = torch.randn(64, 24) / 8, torch.randn(24, 64) / 8
        checkpoint |= {LORA.format(i, part, "A", ".default" * i): a, LORA.format(i, part, "B", ".default" * i): b}
        llama[f"model.layers.{i}.self_attn.{part}_proj.weight"] -= 16 / 64 * b @ a
    sharded(llama, tmp_path)
    torch.save({"model": checkpoint, "epoch": 3}, tmp_path / "checkpoint")
    torch.save(eva, tmp_path / "eva", _use_new_zipfile_serialization=False)
    return SimpleNamespace(
        whole=whole,
        out=tmp_path / "out",
        sources=dict(checkpoint=checkpoint, eva=eva, llama=llama),
        weights=convert.minigpt_v2_weights,
        command=["minigpt-v2", f"--llama={tmp_path}", *(f"--{n}={tmp_path / n}" for n in ("checkpoint", "eva", "out"))],
    )


@torch.inference_mode()
def first_logits(model):
    before, after = map(model.embed, model.prompt("the red cat"))
    embeds = [torch.cat([before, image, after]) for image in model.encode([noise(40, 30), noise(31, 44, 1)]).features]
    return prefill(model, [Inputs(one, torch.arange(len(one))) for one in embeds])[0]


@pytest.mark.parametrize("family", ["shikra", "minigpt_v2"])
def test_round_trip(family, request, tmp_path, capsys, monkeypatch):
    case = request.getfixturevalue(family)
    monkeypatch.setattr(convert, "SHARD", "20KB")
    convert.main([*case.command, "--dtype", "float32"])
    assert ("has no ln_vision: the norm after the tower gets" in capsys.readouterr().out) == (family == "minigpt_v2")
    saved(case.whole, convert.read_tokenizer(case.out), tmp_path / "small")
    model, small = (models.load(folder, device="cpu") for folder in (case.out, tmp_path / "small"))
    for part in ("tower", "connector", "decoder", "head"):
        torch.testing.assert_close(*(dict(getattr(one, part).state_dict()) for one in (model, small)))
    torch.testing.assert_close(first_logits(model), first_logits(small), atol=1e-3, rtol=1e-3)
    assert len([*case.out.glob("*.safetensors")]) > 1 and not [*tmp_path.glob(".out*")]
    written = json.loads((case.out / "preprocessor_config.json").read_text())
    assert written["size"] == dict(height=32, width=32) and written["image_mean"][0] == 0.48145466
    if family == "shikra":
        assert model.image_token == model.tokenizer.get_vocab()["<im_patch>"] and model.layer == 2
        assert json.loads((case.out / "config.json").read_text())["clip"] == "openai/clip-vit-large-patch14"


def test_what_the_checkpoint_has_of_the_tower_is_taken(minigpt_v2):
    (weight, bias), norm, sources = torch.rand(2, 16), "model.vision_tower.post_layernorm", minigpt_v2.sources
    whole = dict(minigpt_v2.whole.state_dict()) | {f"{norm}.weight": weight, f"{norm}.bias": bias}
    own = sources["checkpoint"] | {"ln_vision.weight": weight, "ln_vision.bias": bias}
    own |= {f"visual_encoder.{name}": weight for name, weight in sources["eva"].items()}
    own["visual_encoder.pos_embed"] = whole["model.vision_tower.embeddings.position_embedding"]  # of full size
    eva = {name: weight + 1 for name, weight in sources["eva"].items()}
    found = minigpt_v2.weights(own, eva, sources["llama"], minigpt_v2.whole.config, torch.float32)
    torch.testing.assert_close(found, whole)


def test_a_state_of_the_whole_model_is_read(minigpt_v2, tmp_path, capsys):
    """As parallel training saves it: all names begin with "module.", and the frozen weights are there, too."""
    sources, (weight, bias), norm = minigpt_v2.sources, torch.rand(2, 16), "model.vision_tower.post_layernorm"
    whole = sources["checkpoint"] | {"ln_vision.weight": weight, "ln_vision.bias": bias}
    whole |= {f"visual_encoder.{name}": frozen for name, frozen in sources["eva"].items()}
    for name, frozen in sources["llama"].items():  # newer versions of peft call a layer with LoRA by another name
        whole[f"llama_model.base_model.model.{name.replace('q_proj.', 'q_proj.base_layer.')}"] = frozen
    whole = {f"module.{name}": tensor for name, tensor in whole.items()}
    others = {part: {name: tensor + 1 for name, tensor in sources[part].items()} for part in ("eva", "llama")}
    found = minigpt_v2.weights(whole, **others, config=minigpt_v2.whole.config, dtype=torch.float32)
    expected = dict(minigpt_v2.whole.state_dict()) | {f"{norm}.weight": weight, f"{norm}.bias": bias}
    torch.testing.assert_close(found, expected)
    torch.save(whole, tmp_path / "checkpoint")  # without "model" around it
    convert.main([*minigpt_v2.command, "--dtype", "float32"])
    assert "has no ln_vision" not in capsys.readouterr().out
    assert models.load(minigpt_v2.out, device="cpu").tower.state_dict()["post_layernorm.bias"].equal(bias)
    eight_bits = {"module.llama_model.base_model.model.model.layers.0.mlp.gate_proj.SCB": bias}
    with pytest.raises(ValueError, match="Llama-2 does not .*; left over: model.layers.0.mlp.gate_proj.SCB$"):
        minigpt_v2.weights(whole | eight_bits, **others, config=minigpt_v2.whole.config)


def test_weights_that_do_not_fit_are_refused(shikra, minigpt_v2):
    for case, source, how, name, message in (
        (shikra, "delta", "lose", "model.norm.weight", "the delta does not .*; missing: model.norm.weight$"),
        (shikra, "llama", "lose", "all", r"LLaMA does not .*; missing: (\S+, ){7}\S+ and 13 more$"),
        (shikra, "clip", "add", "vision_model.more", "the CLIP tower does not .*; left over: vision_model.more$"),
        (minigpt_v2, "eva", "lose", "blocks.2.attn.v_bias", "EVA does not .*; missing: blocks.2.attn.v_bias$"),
        (minigpt_v2, "eva", "add", "blocks.4.norm1.bias", "left over: blocks.4.norm1.bias$"),
        (minigpt_v2, "eva", "cut", "pos_embed", r"shape \[0, 17, 16\]; it should be \[1, 1 \+ n \* n, width\]$"),
        (minigpt_v2, "checkpoint", "cut", LORA.format(0, "v", "B", ""), r"B.weight \[23, 64\] instead of \[24, 64\]$"),
        (minigpt_v2, "checkpoint", "add", "llama_proj.more", "the checkpoint does not .*; left over: llama_proj.more$"),
    ):
        found = dict(case.sources[source]) if name != "all" else {}
        weight = found.pop(name, torch.ones(2))
        found |= {} if how == "lose" else {name: weight[:-1]}
        with pytest.raises(ValueError, match=message):
            case.weights(**case.sources | {source: found}, config=case.whole.config)


def refused(case, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        convert.main(case.command)
    assert not [*case.out.parent.glob(".out*")]


def test_files_that_cannot_be_used_are_refused(shikra, tmp_path, monkeypatch, capsys):
    delta, shard = tmp_path / "delta" / "pytorch_model.bin", tmp_path / "llama" / "model-00002-of-00002.safetensors"
    content = delta.read_bytes()
    torch.save({"model.norm.weight": Gadget()}, delta)
    for held in (delta.read_bytes(), b"", content[:100], content[:-1]):
        delta.write_bytes(held)
        refused(shikra, "pytorch_model.bin is cut off, or holds more than weights")
    assert "it ran" not in capsys.readouterr().out
    delta.write_bytes(content)
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(shikra, f"{shard.name} is cut off")
    monkeypatch.setattr(convert, "SHIKRA_SIDE", 224)
    refused(shikra, "takes images of 32 pixels; --clip should be openai/clip-vit-large-patch14, which takes 224")
    (tmp_path / "clip" / "config.json").unlink()
    refused(shikra, "clip has no config.json")
    for file in delta.parent.glob("tokenizer*"):
        file.write_text(file.read_text().replace("im_patch", "im_other"))
    refused(shikra, "delta has no <im_patch>; --delta should be Shikra's own folder")
    monkeypatch.setattr(convert, "is_sentencepiece_available", lambda: False)
    delta.with_name("tokenizer.json").rename(delta.with_name("tokenizer.model"))
    refused(shikra, "a tokenizer.model and no tokenizer.json; to read it: pip install sentencepiece protobuf")


def test_out_is_whole_or_not_there_and_in_half_precision(shikra, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # the tokenizer is written after the weights
        patch.setattr(convert.PreTrainedTokenizerBase, "save_pretrained", Mock(side_effect=OSError("no space left")))
        refused(shikra, "no space left")
    assert not shikra.out.exists()
    tower = shikra.whole.model.vision_tower.state_dict()
    save_file(tower, tmp_path / "clip" / "model.safetensors")  # newer folders of the tower alone have no vision_model.
    convert.main(shikra.command)
    found = models.load(shikra.out, device="cpu").tower.state_dict()
    assert all(found[name].equal(weight.half().float()) for name, weight in tower.items())
    assert json.loads((shikra.out / "config.json").read_text())["dtype"] == "float16"
    refused(shikra, "out exists and is not empty; give --out a new folder")
