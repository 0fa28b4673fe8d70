"""The prompts token by token: against the IDs that upstream's code makes with Llama's vocabulary.

The lists are facts, of upstream's own code run with Llama's tokenizer at the version of transformers that each names
(LLaVA at any; MiniGPT-v2 at 4.30.0; Shikra at 4.28). `llama_pieces.json` has the pieces of these prompts, each with its
ID: merged in the order of their IDs they cut these prompts as the whole vocabulary does.
"""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    Blip2VisionConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    MistralConfig,
)

from analysis import models
from analysis.models.base import plain_ids
from analysis.models.minigpt_v2 import MiniGPTv2Config, MiniGPTv2ForConditionalGeneration
from analysis.models.shikra import ShikraConfig, ShikraForConditionalGeneration

PIECES = json.loads((Path(__file__).parent / "llama_pieces.json").read_text())
SIZE = 32003  # of the vocabulary, with the three tokens that LLaVA or Shikra adds
ADDED = {"shikra": ["<im_patch>", "<im_start>", "<im_end>"], "minigpt_v2": []}  # others have <image>
SPELLS_SPECIALS = "the <image> of <s> </s> <im_start> [INST]"

# fmt: off
VICUNA = [1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892,
          13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901]
ASSISTANT = [319, 1799, 9047, 13566, 29901]
LLAVA = [29871, 13, 12148, 3867, 278, 3216, 292, 3800, 14821, 310, 278, 5120, 445, 10541, 16612, 29901]
MINIGPT_V2 = [1, 1, 518, 25580, 29962, 529, 25518, 29958]
REFER = [1533, 25518, 29958, 518, 20275, 29962, 2367, 592, 278, 4423, 310]
END = [518, 29914, 25580, 29962]
EXPRESSIONS = {
    "the red cat": [278, 2654, 6635],
    "cup on left, 2nd row": [18002, 373, 2175, 29892, 29871, 29906, 299, 1948],
    SPELLS_SPECIALS: [278, 529, 3027, 29958, 310, 529, 29879, 29958, 1533, 29879, 29958, 529, 326, 29918, 2962, 29958,
                      518, 25580, 29962],
}


def expected(family, words):
    """IDs before and after the image, written down."""
    return {
        "llava": ([*VICUNA, 29871], [*LLAVA, *words, *ASSISTANT]),
        "llava_next": ([*VICUNA, 29871], [*LLAVA, *words, *ASSISTANT]),
        "mistral": ([1, 518, 25580, 29962, 29871], [*LLAVA, *words, *END]),  # Mistral's prompt in Llama's pieces
        "shikra": ([*VICUNA, 1815, 366, 1298, 714, *words, 297, 278, 1967, 32001],
                   [32002, 322, 3867, 278, 10350, 310, 967, 4423, 29973, *ASSISTANT]),
        "minigpt_v2": (MINIGPT_V2, [*REFER, *words, *END]),
    }[family]
# fmt: on


def llama_tokenizer(folder, family, legacy, whole_file=False, special=True):
    """Write a tokenizer with Llama's pieces and settings as real folders have them.

    legacy: in tokenizer_config.json, None for absent; whole_file: the pipeline of the file is used as it is (class
    PreTrainedTokenizerFast) and not made anew from its vocabulary; special: of the added tokens.
    """
    added = ADDED.get(family, ["<image>"])
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)} | PIECES
    merges = []
    for piece in sorted(PIECES, key=PIECES.get):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in halves if left in PIECES and right in PIECES]
    vocabulary |= {token: 32000 + place for place, token in enumerate(added)}
    words = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy is False:
        words.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    words.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    words.save(str(folder / "tokenizer.json"))
    settings = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True, add_eos_token=False)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast" if whole_file else "LlamaTokenizer"
    if legacy is not None:
        settings["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module", params=["llava", "llava_next", "mistral", "shikra", "minigpt_v2"])
def folder(request, tmp_path_factory):
    """family, and the folder of a very small model of it, without tokenizer."""
    family, sizes = request.param, dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    text = (MistralConfig if family == "mistral" else LlamaConfig)(
        vocab_size=SIZE, intermediate_size=8, num_key_value_heads=2, pad_token_id=0, **sizes
    )
    clip = CLIPVisionConfig(intermediate_size=8, image_size=32, patch_size=8, **sizes)
    eva = Blip2VisionConfig(intermediate_size=8, image_size=32, patch_size=8, **sizes)
    tiles = dict(image_grid_pinpoints=[[32, 64]])
    build, config, settings = {
        "llava": (LlavaForConditionalGeneration, LlavaConfig, dict(image_token_index=32000)),
        "llava_next": (LlavaNextForConditionalGeneration, LlavaNextConfig, dict(image_token_index=32000, **tiles)),
        "mistral": (LlavaNextForConditionalGeneration, LlavaNextConfig, dict(image_token_index=32000, **tiles)),
        "shikra": (ShikraForConditionalGeneration, ShikraConfig, dict(image_token_index=32000)),
        "minigpt_v2": (MiniGPTv2ForConditionalGeneration, MiniGPTv2Config, dict(image_token_index=32000)),
    }[family]
    folder = tmp_path_factory.mktemp(family)
    vision = eva if family == "minigpt_v2" else clip
    build(config(vision_config=vision, text_config=text, **settings)).save_pretrained(folder)
    if "image_grid_pinpoints" in settings:
        LlavaNextImageProcessorPil(size=dict(shortest_edge=32), **tiles).save_pretrained(folder)
    return family, folder


@pytest.mark.parametrize(
    "settings",
    [
        dict(legacy=True),
        dict(legacy=False),
        dict(legacy=None),
        dict(legacy=True, whole_file=True),
        dict(legacy=False, whole_file=True),
        dict(legacy=True, whole_file=True, special=False),
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_prompts_are_upstreams(folder, settings):
    family, where = folder
    llama_tokenizer(where, family, **settings)
    model = models.load(where, device="cpu")
    for expression, words in EXPRESSIONS.items():
        before, after = model.prompt(expression)
        assert (before.tolist(), after.tolist()) == expected(family, words)
    assert expression == SPELLS_SPECIALS  # which is read as text
    if family == "llava":
        assert len(before) == 35  # where the image begins
    if family == "shikra":
        before, after = model.prompt("the red cat")
        assert (len(before), len(before) + 256 + len(after)) == (45, 315)  # of upstream, with its visual tokens
    before, after = model.ask("What colour is the cat?")
    asked = [12384, 338, 278, 6635, 29973]
    assert after.tolist() == {
        "mistral": [29871, 13, 5618, *asked, *END],
        "shikra": [32002, 1724, *asked, *ASSISTANT],
        "minigpt_v2": [1533, 25518, 29958, 518, 29894, 25621, 29962, 1724, *asked, *END],
    }.get(family, [29871, 13, 5618, *asked, *ASSISTANT])


def test_the_image_token_itself_stays_one(tmp_path):
    """The tokenizer that a test builds does read special tokens, or reading them as text would prove nothing."""
    for special in (True, False):
        llama_tokenizer(tmp_path, "llava", legacy=True, whole_file=True, special=special)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer("<image>", add_special_tokens=False).input_ids == [32000]
        assert plain_ids(tokenizer, "<image>") == [529, 3027, 29958]
