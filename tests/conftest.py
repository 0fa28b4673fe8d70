"""A random tiny LLaVA in Hugging Face form, shared by all tests that need a model."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too: tests run beside each other

import pytest
import torch
from hypothesis import settings
from transformers import LlavaForConditionalGeneration

from analysis import models
from tests.support.checkpoint import clip, config, tokenizer

settings.register_profile("busy", deadline=None)  # a machine that does something else, too, is no failure
settings.load_profile("busy")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with weights so large that answers differ between images, expressions and IDs; a 4 x 4 grid."""
    folder = tmp_path_factory.mktemp("models") / "random-llava"
    words = tokenizer()
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    clip(words).save_pretrained(folder.parent / "random-clip")
    words.save_pretrained(folder.parent / "random-clip")
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return models.load(tiny_folder, device="cpu")
