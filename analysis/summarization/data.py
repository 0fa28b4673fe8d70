"""Documents for the summarizer: readers of CNN/Daily Mail in the forms it goes around in, and of ACLSum; labels,
vocabulary, batches. Words are lower-cased and cut as in the Penn Treebank, as the paper has them.
"""

from __future__ import annotations

import json
import random
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import torch
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
from rouge_score.rouge_scorer import lcs_ind
from rouge_score.tokenizers import DefaultTokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from analysis.registry import pick
from analysis.summarization.batch import PAD, START, STOP, UNK, Batch

SPECIAL = ["[PAD]", "[UNK]", "[START]", "[STOP]"]  # in the order of their IDs
LARGEST = 2**24  # bytes of one example in a .bin file; a real one has some thousands
ASPECTS = {"challenge": 0, "approach": 1, "outcome": 2}  # ACLSum has a summary for each
ENDS = {".", "!", "?"}
CLOSES = {"''", "'", '"', "”", "’", "-rrb-", ")"}  # may follow the end of a sentence and still belong to it
ABBREVIATIONS = (
    "mr mrs ms dr prof rev gen col lt sgt capt gov sen rep st jr sr co corp inc ltd no vs etc u.s u.k u.n "
    "d.c a.m p.m e.g i.e jan feb mar apr aug sept oct nov dec"
).split()


class Document(NamedTuple):
    """article, abstract: tokenised sentences, none empty; labels: 1 for each sentence to extract, 0 else."""

    article: list[list[str]]
    abstract: list[list[str]]
    labels: list[int] | None = None
    id: str = ""


def tokenise(sentence: str) -> list[str]:
    """A sentence's words in lower case, cut as in the Penn Treebank: it 's, do n't, `` quoted '', -lrb- and -rrb-."""
    return [intern(word.lower()) for word in NLTKWordTokenizer().tokenize(sentence, convert_parentheses=True)]


@cache
def _splitter() -> PunktSentenceTokenizer:
    """Punkt without its trained model, which would have to be downloaded, but with the usual abbreviations."""
    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters)


def sentences(text: str) -> list[list[str]]:
    """Tokenised sentences of running text; a line break ends one, too."""
    found = (tokenise(said) for line in text.splitlines() for said in _splitter().tokenize(line))
    return [words for words in found if words]


def cut(words: Iterable[str]) -> list[list[str]]:
    """Sentences of a tokenised text: each ends with . ! or ? and the quotes and brackets that it closes."""
    found: list[list[str]] = []
    ended = False
    for word in words:
        if not found or (ended and word not in CLOSES):
            found.append([])
        found[-1].append(word)
        ended = word in ENDS or (ended and word in CLOSES)
    return found


def _words(text: str) -> list[str]:
    """Words of a text that is tokenised already; interned, for the corpus has 2e8 of them."""
    return [intern(word) for word in text.lower().split()]


# The .bin files of See et al., arXiv:1704.04368, and of Hsu et al.: 8 bytes of length (little-endian), then a
# serialised tf.Example = {1: {1: entry, ...}}, entry = {1: name, 2: {1: {1: bytes}}}; https://protobuf.dev/
# programming-guides/encoding. Hsu et al. mark the article's sentences, too, and number the extracted ones.


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 number that starts at `at`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends within a number")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number in it has more than 10 bytes")


def _fields(data: bytes, wanted: int) -> Iterator[bytes]:
    """Contents of a protobuf message's fields of this number, as far as they are bytes or messages."""
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            _, at = _number(data, at)
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"it has a field of the unknown kind {kind}")
        size, at = _number(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if size > len(data) - at:
            raise ValueError(f"field {number} is to have {size} bytes, but {len(data) - at} are left")
        if kind == 2 and number == wanted:
            yield data[at : at + size]
        at += size


def _features(example: bytes) -> dict[str, str]:
    """Texts of a tf.Example by their names."""
    found = {}
    for entry in (entry for features in _fields(example, 1) for entry in _fields(features, 1)):
        name = b"".join(_fields(entry, 1)).decode()
        texts = [text for feature in _fields(entry, 2) for values in _fields(feature, 1) for text in _fields(values, 1)]
        if texts:
            found[name] = texts[0].decode()
    return found


def _tagged(text: str) -> list[list[str]]:
    """Sentences of "<s> ... </s> <s> ... </s>"."""
    *found, rest = (part.strip() for part in text.split("</s>"))
    if rest or not all(part.startswith("<s>") and part.count("<s>") == 1 for part in found):
        raise ValueError(f"sentences must be in <s> ... </s>, not {text!r:.80}")
    return [_words(part[3:]) for part in found]


def _from_example(example: bytes) -> Document:
    features = _features(example)
    if not {"article", "abstract"} <= set(features):
        raise ValueError(f"it needs article and abstract, but has {', '.join(sorted(features))[:200] or 'nothing'}")
    article = features["article"]
    found = _tagged(article) if "<s>" in article else cut(_words(article))
    extracted = features.get("extract_ids")
    if extracted is None:
        return Document(found, _tagged(features["abstract"]))
    numbers = {int(number) for number in extracted.split(",") if number}
    if not numbers <= set(range(len(found))):
        raise ValueError(f"extract_ids must number {len(found)} sentences from 0, not {extracted:.60}")
    return Document(found, _tagged(features["abstract"]), [int(i in numbers) for i in range(len(found))])


def _bin(file: Path) -> Iterator[tuple[str, Document]]:
    """The documents of a .bin file with their places, for messages."""
    with open(file, "rb") as stream:
        number = 0
        while head := stream.read(8):
            number += 1
            place = f"{file}, example {number}"
            size = struct.unpack("<q", head)[0] if len(head) == 8 else -1
            if not 0 < size <= LARGEST:
                raise ValueError(f"{place}: 8 bytes must say its length, 1 to {LARGEST}: broken, or no .bin chunk")
            example = stream.read(size)
            if len(example) < size:
                raise ValueError(f"{place}: the file ends after {len(example)} of {size} bytes: fetch it again")
            try:
                yield place, _from_example(example)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error


def _listed(value: Any, key: str) -> list[list[str]]:
    """Sentences, each a text with spaces between its words or a list of words."""
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list of sentences, not {value!r:.60}")
    for said in value:
        if not isinstance(said, str) and not (
            isinstance(said, list) and all(isinstance(word, str) and word.split() == [word] for word in said)
        ):
            raise ValueError(f"{key} must hold texts or lists of words, not {said!r:.60}")
    return [_words(said if isinstance(said, str) else " ".join(said)) for said in value]


def _from_record(record: Any) -> Document:
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object, not {record!r:.60}")
    name = str(record.get("id", ""))
    if {"article_sents", "abstract_sents"} <= set(record):
        article, abstract = (_listed(record[key], key) for key in ("article_sents", "abstract_sents"))
        marked = record.get("labels")
        if marked is not None and (
            not isinstance(marked, list)
            or len(marked) != len(article)
            or not all(type(mark) is int and mark in (0, 1) for mark in marked)
        ):
            raise ValueError(f"labels must be 0 or 1 for each of {len(article)} sentences, not {marked!r:.60}")
        return Document(article, abstract, marked, name)
    if {"article", "highlights"} <= set(record):
        for key in ("article", "highlights"):
            if not isinstance(record[key], str):
                raise ValueError(f"{key} must be text, not {record[key]!r:.60}")
        lines = [tokenise(line) for line in record["highlights"].splitlines()]
        ended = [line if not line or line[-1] in ENDS | CLOSES else [*line, "."] for line in lines]
        return Document(sentences(record["article"]), ended, None, name)
    raise ValueError(
        f"a record has article_sents and abstract_sents, or article and highlights, "
        f"but this one has {', '.join(record)[:200] or 'nothing'}"
    )


def _jsonl(file: Path) -> Iterator[tuple[str, Document]]:
    """The documents of a file with one JSON object a line, with their places."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                record = json.loads(line.decode())
                if b"\\u" in line:
                    json.dumps(record, ensure_ascii=False).encode()  # raises for half a pair, which no file can hold
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: broken JSON: {error}") from error
            try:
                yield place, _from_record(record)
            except (ValueError, TimeoutError) as error:  # nltk gives up on a line that takes it too long
                raise ValueError(f"{place}: {error}") from error


READERS = {".bin": _bin, ".jsonl": _jsonl}


def _without_empty_sentences(document: Document) -> Document:
    kept = [i for i, words in enumerate(document.article) if words]
    return document._replace(
        article=[document.article[i] for i in kept],
        abstract=[words for words in document.abstract if words],
        labels=document.labels and [document.labels[i] for i in kept],
    )


def _documents(files: Sequence[Path], skip_empty: bool) -> Iterator[Document]:
    skipped = 0
    for file in files:
        for number, (place, document) in enumerate(READERS[file.suffix](file)):
            document = _without_empty_sentences(document)
            if document.article and document.abstract:
                yield document._replace(id=document.id or f"{file.stem}-{number}")
            elif skip_empty:
                skipped += 1
            else:
                what = "abstract" if document.article else "article"
                raise ValueError(f"{place}: the {what} is empty; skip_empty=True leaves such documents out")
    if skipped:
        warnings.warn(f"{skipped} documents without an article or an abstract are left out", stacklevel=2)


def read_documents(path: str | Path, skip_empty: bool = False) -> Iterator[Document]:
    """The documents of a file, or of all that fit a pattern such as chunked/train_*.bin, one after the other.

    .bin: chunks of See et al. or Hsu et al. (these with labels). .jsonl: an object a line, with article_sents and
    abstract_sents (sentences tokenised already: texts or lists of words; labels if there are some), or plain text with
    article and highlights, one a line. skip_empty: go on, with a warning at the end, where an article or an abstract
    is empty, as more than a hundred articles of CNN/Daily Mail are. Raises FileNotFoundError, and ValueError for
    whatever is broken, naming the line or the example.
    """
    path = Path(path)
    files = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"{path} is no file; give a file or a pattern such as chunked/train_*.bin")
    for file in files:
        pick(READERS, file.suffix, f"ending of {file.name}")
    return _documents(files, skip_empty)


def aclsum(split: str, aspect: str) -> list[Document]:
    """ACLSum (Takeshita et al. 2024): abstract, introduction and conclusion of papers, with people's summary of an
    aspect (challenge, approach or outcome) and their highlights for it as labels. Splits: train, val, test.

    Raises ImportError, saying how to install it, where the package is missing.
    """
    pick(ASPECTS, aspect, "aspect")
    pick({"train": 100, "val": 50, "test": 100}, split, "split")
    try:
        from aclsum import ACLSum  # optional: only this reader needs it
    except ImportError as error:
        raise ImportError("ACLSum comes with a package of its own; run: pip install aclsum") from error
    return [
        _without_empty_sentences(
            Document(
                [tokenise(said) for said in paper.get_all_sentences()],
                sentences(paper.summaries[aspect]),
                paper.get_all_highlights(aspect),
                f"{paper.id}-{aspect}",
            )
        )
        for paper in ACLSum(split)
    ]


def _covered(sentence: list[str], reference: list[list[str]]) -> set[int]:
    """Positions in the reference, counted through, that the sentence has in common with each of its sentences (LCS)."""
    found, start, known = set(), 0, set(sentence)
    for line in reference:
        kept = [i for i, word in enumerate(line) if word in known]  # the others cannot be in common: less to compute
        found |= {start + kept[i] for i in lcs_ind([line[i] for i in kept], sentence)}
        start += len(line)
    return found


def labels(article: list[list[str]], abstract: list[list[str]]) -> list[int]:
    """1 for each sentence to extract, 0 else; the rule of arXiv:1805.06266.

    Sentences are sorted by the ROUGE-L recall (summary level, not stemmed, as rouge-score's rougeLsum) of each alone
    against the whole abstract, the earlier of two equal ones first; from the best on, each is kept that raises the
    recall of those kept so far.
    """
    tokenizer = DefaultTokenizer()
    said, reference = ([tokenizer.tokenize(" ".join(words)) for words in side] for side in (article, abstract))
    words = [word for line in reference for word in line]
    covers, counts = [_covered(sentence, reference) for sentence in said], [Counter(sentence) for sentence in said]

    def hits(chosen: list[int]) -> int:
        """Words of the reference in common with any of the sentences, none more often than these have it."""
        common = Counter(words[i] for i in set().union(*(covers[i] for i in chosen)))
        return sum(min(count, sum(counts[i][word] for i in chosen)) for word, count in common.items())

    kept, best = [], 0
    for i in sorted(range(len(said)), key=lambda i: -hits([i])):
        if (raised := hits([*kept, i])) > best:
            kept, best = [*kept, i], raised
    return [int(i in kept) for i in range(len(said))]


def labelled(documents: Iterable[Document]) -> list[Document]:
    """The documents with the labels of the paper's rule, whatever labels they had."""
    return [
        document._replace(labels=labels(document.article, document.abstract))
        for document in tqdm(documents, "labels", unit="document", leave=False)
    ]


class Vocabulary:
    """words: the special ones, then the others; ids: their numbers."""

    def __init__(self, words: Iterable[str]) -> None:
        """words: without the special ones. Raises ValueError for one that is there twice, empty or has a space."""
        self.words = [*SPECIAL, *words]
        self.ids = {word: i for i, word in enumerate(self.words)}
        if wrong := [word for word in self.words if word.split() != [word]]:
            raise ValueError(f"a word must be without spaces and not empty, not {wrong[0]!r:.60}")
        if len(self.ids) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"{twice!r} is in the vocabulary more than once")

    @classmethod
    def build(cls, documents: Iterable[Document], size: int = 50_000) -> Vocabulary:
        """The most frequent words of articles and abstracts, in alphabetical order where equally frequent; size: how
        many at most, the four special ones included."""
        if size <= len(SPECIAL):
            raise ValueError(f"a vocabulary has {len(SPECIAL)} special words and more, so size cannot be {size}")
        count = Counter(
            word
            for document in documents
            for side in (document.article, document.abstract)
            for words in side
            for word in words
        )
        ordered = sorted(set(count) - set(SPECIAL), key=lambda word: (-count[word], word))
        return cls(ordered[: size - len(SPECIAL)])

    def save(self, path: str | Path) -> None:
        """A text file with one word a line."""
        Path(path).write_text("".join(f"{word}\n" for word in self.words), encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Raises ValueError for a file that `save` did not write."""
        try:
            words = Path(path).read_bytes().decode().removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text: {error}") from error
        if words[: len(SPECIAL)] != SPECIAL:
            raise ValueError(f"{path} must begin with the lines {', '.join(SPECIAL)}, not with {words[0]!r:.60}")
        try:
            return cls(words[len(SPECIAL) :])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def numbers(self, words: Iterable[str], oov: Sequence[str] = ()) -> list[int]:
        """IDs of words; those of `oov` go on from the vocabulary's, all other unknown ones are UNK."""
        more = {word: len(self) + i for i, word in enumerate(oov)}
        return [self.ids.get(word, more.get(word, UNK)) for word in words]


def _padded(rows: list[list[int]], padding: int = PAD, kind: torch.dtype = torch.int64) -> Tensor:
    """[B, longest] of rows of different lengths."""
    return pad_sequence([torch.tensor(row, dtype=kind) for row in rows], batch_first=True, padding_value=padding)


def collate(
    documents: Sequence[Document],
    vocabulary: Vocabulary,
    max_words: int = 600,
    max_sentences: int = 50,
    max_target: int = 100,
) -> Batch:
    """Documents as a batch: their first words and sentences, and the beginnings of their abstracts.

    max_target: of words, STOP included; an abstract that is cut has no STOP, for it does not end there. An abstract
    may be empty, an article may not. Raises ValueError for that, for missing labels, and for a limit below one.
    """
    if not documents or min(max_words, max_sentences, max_target) < 1:
        raise ValueError(
            f"a batch needs documents and limits of at least 1, got {len(documents)} documents, max_words="
            f"{max_words}, max_sentences={max_sentences}, max_target={max_target}"
        )
    rows: dict[str, list] = {field: [] for field in Batch._fields}
    for document in documents:
        if not document.article or not all(document.article):
            raise ValueError(f"document {document.id!r} has an empty article or an empty sentence in it")
        if document.labels is None or len(document.labels) != len(document.article):
            raise ValueError(
                f"document {document.id!r} needs a label for each of its {len(document.article)} "
                f"sentences; labelled(documents) finds them"
            )
        kept = [(n, word) for n, words in enumerate(document.article[:max_sentences]) for word in words][:max_words]
        where, words = [n for n, _ in kept], [word for _, word in kept]
        oov = [word for word in dict.fromkeys(words) if word not in vocabulary.ids]
        abstract = [word for line in document.abstract for word in line]
        rows["words"].append(vocabulary.numbers(words))
        rows["extended"].append(vocabulary.numbers(words, oov))
        rows["sentence"].append(where)
        rows["labels"].append(document.labels[: where[-1] + 1])
        rows["sentences"].append(where[-1] + 1)
        rows["inputs"].append([START, *vocabulary.numbers(abstract)][:max_target])
        rows["target"].append([*vocabulary.numbers(abstract, oov), STOP][:max_target])
        rows["oov"].append(oov)
    return Batch(
        _padded(rows["words"]),
        _padded(rows["extended"]),
        _padded(rows["sentence"], -1),
        _padded(rows["labels"], 0, torch.float32),
        torch.tensor(rows["sentences"]),
        _padded(rows["inputs"]),
        _padded(rows["target"]),
        rows["oov"],
    )


def batches(
    documents: Sequence[Document],
    vocabulary: Vocabulary,
    size: int,
    seed: int | None = None,
    **limits: int,
) -> Iterator[Batch]:
    """Each document once, `size` a batch, the last one smaller where they do not come out even.

    seed: shuffled, with articles of about the same length together, so that little is padded: buckets of 20 batches
    are sorted by length, then the batches shuffled; another seed gives another epoch. None: in the given order.
    limits go to `collate`.
    """
    if size < 1:
        raise ValueError(f"size is the number of documents in a batch and must be at least 1, got {size}")
    order = list(range(len(documents)))
    if seed is not None:
        rng, bucket = random.Random(seed), 20 * size
        rng.shuffle(order)
        buckets = [order[i : i + bucket] for i in range(0, len(order), bucket)]
        order = [i for part in buckets for i in sorted(part, key=lambda i: sum(map(len, documents[i].article)))]
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    if seed is not None:
        rng.shuffle(groups)
    return (collate([documents[i] for i in group], vocabulary, **limits) for group in groups)
