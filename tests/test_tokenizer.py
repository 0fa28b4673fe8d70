"""The tiny models' tokenizer: it knows every word that training says, and cuts text so that it comes back."""

import numpy as np
import pytest

from analysis.models.base import SYSTEM
from analysis.refstamps import grammar
from analysis.refstamps.scenes import scene
from analysis.training.tokenizer import EXTRA, build

VAL = [scene("val", i) for i in range(80)]


@pytest.mark.parametrize("family", EXTRA)
def test_tokenizer_knows_every_word_and_gives_the_text_back(family):
    tokenizer, rng = build(family), np.random.default_rng(0)
    assert build().get_vocab().items() <= tokenizer.get_vocab().items()  # so that models can begin as one another
    box_format = {"shikra": "shikra", "minigpt_v2": "minigpt_v2"}.get(family, "llava")

    def write(scene, i):
        return grammar.answer_box(scene, i, box_format=box_format)

    for drawn in VAL:
        for _, question, answer in grammar.questions(drawn, rng, 10, write):
            ids = tokenizer.encode(f"<s>{SYSTEM} USER: <image>\n{question} ASSISTANT: {answer}</s>")
            assert tokenizer.unk_token_id not in ids
            assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 1
            assert tokenizer.decode(tokenizer.encode(f"ASSISTANT: {answer}")) == f"ASSISTANT: {answer}"
        assert tokenizer.unk_token_id not in tokenizer.encode(grammar.caption(drawn, rng) + "</s>")
