"""The trained summarizers by name: what each writes, which sentences it extracts, how often its attentions disagree.

The checkpoints are `train.export`'s; the model card beside them says how each was made.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from analysis import keys
from analysis.inconsistency import inconsistency_rate
from analysis.registry import pick
from analysis.summarization.beam import Hypothesis, beam_search
from analysis.summarization.data import Document, Vocabulary, collate, cut, sentences
from analysis.summarization.model import Sizes, Unified, chosen, text

CHECKPOINTS = Path(__file__).parent / "checkpoints"
# name -> how the model runs; the words are those of figures and tables
SYSTEMS = {"pointer-generator": "pointer-generator", "two-stage": "two-stage"} | {
    f"end-to-end-{weight}{inc}": "end-to-end" for weight in (1, 5) for inc in ("", "-inc")
}
LABELS = {"pointer-generator": "pointer-generator + coverage", "two-stage": "two-stage"} | {
    f"end-to-end-{weight}{inc}": f"end to end, {'with' if inc else 'without'} L_inc, λ1 = {weight}"
    for weight in (1, 5)
    for inc in ("", "-inc")
}
# With more words than this that a system does not know, its abstract is a salad of words: of the generated news it does
# not know 4 to 6 %, of real articles about 40 %, where the abstract's ROUGE is half of lead-3's.
MOST_UNKNOWN = 0.2
LENGTHS = dict(shortest=14, longest=70)  # tokens: 5th percentile and above the longest of the training abstracts


class Summarizer(NamedTuple):
    """name: of SYSTEMS; seed: of its training; limits: of what is read, for `data.collate`."""

    name: str
    seed: int
    model: Unified
    vocabulary: Vocabulary
    limits: dict[str, int]


class Summary(NamedTuple):
    """What a system makes of a document of N sentences, M words.

    words: the summary; extracted: numbers of the sentences with beta > 0.5, at least one; beta: [N'] of the sentences
    read; r_inc, chance: inconsistency rate and what attention at random would have; hypothesis: attention, see
    `beam.Hypothesis`.
    """

    words: list[str]
    extracted: list[int]
    beta: list[float]
    r_inc: float
    chance: float
    hypothesis: Hypothesis

    @property
    def sentences(self) -> list[list[str]]:
        return cut(self.words)


def _files(name: str, seed: int, folder: Path) -> list[Path]:
    """Checkpoints of a system, one over the other: what an arm's file lacks is as in two-stage."""
    pick(SYSTEMS, name, "system")
    files = [folder / f"{part}-seed{seed}.safetensors" for part in dict.fromkeys(("two-stage", name))]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"no checkpoint {', '.join(missing)}; python -m analysis.summarization.train "
            f"--seeds {seed} --out {folder} makes it"
        )
    return files


def revision(name: str, seed: int = 0, folder: Path = CHECKPOINTS) -> str:
    """16 hex digits that name a system's weights, for provenance. Errors as for `load`."""
    return keys.fingerprint([sha256(file.read_bytes()).hexdigest() for file in _files(name, seed, folder)])


def load(name: str, seed: int = 0, folder: Path = CHECKPOINTS) -> Summarizer:
    """A trained system; its weights are stored as fp16 and run as fp32.

    The pointer-generator has the pretrained extractor beside it, whose beta it ignores: R_inc says what its attention
    would be worth under that. Raises ValueError for an unknown name, FileNotFoundError without its checkpoint.
    """
    files = _files(name, seed, folder)
    config = json.loads((folder / "config.json").read_text())
    model = Unified(Sizes(**config["sizes"]))
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights |= load_file(file)
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    limits = dict(max_words=config["words"], max_sentences=config["sentences"], max_target=config["target"])
    return Summarizer(name, seed, model.eval(), Vocabulary.load(folder / "vocabulary.txt"), limits)


def _labelled(document: Document) -> Document:
    return document if document.labels is not None else document._replace(labels=[0] * len(document.article))


def _summary(found: Hypothesis, count: int, words: Sequence[str], oov: Sequence[str]) -> Summary:
    beta = found.beta[:count]
    rate = inconsistency_rate(found.alpha[None], beta[None], found.sentence[None])
    extracted = chosen(beta[None], torch.tensor([count]))[0].nonzero().flatten().tolist()
    said = text(found.tokens, words, oov)
    return Summary(said, extracted, beta.tolist(), float(rate.rate), float(rate.chance), found)


@torch.inference_mode()
def summarize(
    system: Summarizer, documents: Sequence[Document], size: int = 25, beam: int = 4, **lengths: int
) -> list[Summary]:
    """A summary of each document in order; batches of `size` are of about equal length inside.

    lengths: shortest and longest as for `beam_search`, LENGTHS by default. Labels and abstracts are not looked at.
    """
    order = sorted(range(len(documents)), key=lambda i: sum(map(len, documents[i].article)))
    found: dict[int, Summary] = {}
    for start in tqdm(
        range(0, len(order), size),
        f"{system.name}, seed {system.seed}",
        unit=f"x{size}",
        leave=False,
        disable=len(order) <= size,
    ):
        rows = order[start : start + size]
        batch = collate([_labelled(documents[i]) for i in rows], system.vocabulary, **system.limits)
        best = beam_search(system.model, batch, SYSTEMS[system.name], beam=beam, **LENGTHS | lengths)
        for i, one, count, oov in zip(rows, best, batch.sentences.tolist(), batch.oov):
            found[i] = _summary(one, count, system.vocabulary.words, oov)
    return [found[i] for i in range(len(documents))]


def article(path: str | Path) -> Document:
    """A text file, or standard input for "-", as a document without an abstract: its first 100,000 characters.

    Raises ValueError for what is no UTF-8 text or has no words, FileNotFoundError for no file.
    """
    if str(path) == "-":
        name, data = "standard input", sys.stdin.buffer.read(400_000)  # a character has at most four bytes
    else:
        name, path = str(path), Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; give a text file, or -")
        with open(path, "rb") as file:
            data = file.read(400_000)
    whole = len(data) < 400_000  # else the last character may be cut
    try:
        said = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)[:100_000]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    if "\0" in said:
        raise ValueError(f"{name} is no text: it has zero bytes")
    found = sentences(said.replace("\r\n", "\n"))
    if not any(letter.isalnum() for words in found for word in words for letter in word):
        raise ValueError(f"{name} has no words; give an article")
    return Document(found, [], id=Path(name).name)


def unknown(system: Summarizer, document: Document) -> float:
    """Share of the words that the system reads of a document and does not know: it can only copy them."""
    read = [word for said in document.article[: system.limits["max_sentences"]] for word in said]
    read = read[: system.limits["max_words"]]
    return sum(word not in system.vocabulary.ids for word in read) / max(len(read), 1)


def rows(system: Summarizer, documents: Sequence[Document], attention: int = 0, **options: int) -> pd.DataFrame:
    """One row per document, all that the figures and tables need.

    model, seed: system and seed of its training; document: its ID; summary: words with spaces between; extracted, beta,
    r_inc, chance, as in `Summary`; steps: of the decoder, STOP included. alpha, alphahat: [M] of each word read, the
    mean over the steps, for the first `attention` documents. options: as for `summarize`.
    """
    found = []
    for i, (document, one) in enumerate(zip(documents, summarize(system, documents, **options), strict=True)):
        read = one.hypothesis.sentence >= 0
        seen = {
            name: np.round(steps[:, read].mean(0).numpy(), 5) if i < attention else None
            for name, steps in (("alpha", one.hypothesis.alpha), ("alphahat", one.hypothesis.alphahat))
        }
        found.append(
            dict(
                model=system.name,
                seed=system.seed,
                document=document.id,
                summary=" ".join(one.words),
                extracted=one.extracted,
                beta=np.round(one.beta, 4),
                r_inc=one.r_inc,
                chance=one.chance,
                steps=len(one.hypothesis.alpha),
                **seen,
            )
        )
    return pd.DataFrame(found)
