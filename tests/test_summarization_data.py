"""Documents, labels, vocabulary and batches: every form reads back what was written; whatever is broken is refused."""

import hashlib
import json
import struct
import sys
import types
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from analysis.summarization import news
from analysis.summarization.batch import PAD, START, STOP, UNK
from analysis.summarization.data import (
    SPECIAL,
    Document,
    Vocabulary,
    aclsum,
    batches,
    collate,
    cut,
    labelled,
    labels,
    read_documents,
    sentences,
    tokenise,
)
from tests.support.news import ABSTRACT, ARTICLE, HSU, SEE, chunk, example, feature, joined, tagged, varint

HASH = "7d10ff5a9fcc3e7ad948935c4d23bc7ebb6b9a836d008c9a73dc32a25c1ad910"


def written(folder, content, name="file.jsonl"):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


# Text.


def test_words_are_cut_as_in_the_penn_treebank():
    assert tokenise("He said: \"It's 3.5% (or don't).\"") == (
        "he said : `` it 's 3.5 % -lrb- or do n't -rrb- . ''".split()
    )


def test_sentences_end_at_full_stops_and_lines_but_not_at_abbreviations():
    text = 'Dr. Kay left the U.S. on Monday. "Why?" he asked.\nNo comment\n\n She smiled.'
    assert [" ".join(said) for said in sentences(text)] == [
        "dr. kay left the u.s. on monday .",
        "`` why ? ''",
        "he asked .",
        "no comment",
        "she smiled .",
    ]
    assert sentences(" \n ") == []


def test_tokenised_text_is_cut_after_its_quotes():
    assert cut(word for said in ARTICLE for word in said) == ARTICLE
    assert cut("'' who ?! no . '' -rrb- yes".split()) == [["''", "who", "?!", "no", ".", "''", "-rrb-"], ["yes"]]
    assert cut([]) == []


# Readers.


def test_bin_chunks_of_both_papers_read_back(tmp_path):
    file = written(tmp_path, chunk(SEE, HSU), "val_000.bin")
    assert list(read_documents(file)) == [
        Document(ARTICLE, ABSTRACT, None, "val_000-0"),
        Document(ARTICLE, ABSTRACT, [1, 0, 1], "val_000-1"),
    ]


def test_bin_fields_that_nobody_needs_are_passed_over(tmp_path):
    more = varint(5 << 3) + varint(2**60) + varint(6 << 3 | 1) + b"\xff" * 8 + varint(7 << 3 | 5) + b"\xff" * 4
    numbers = feature("length", "\x01", kind=3)
    file = written(tmp_path, chunk(more + example(numbers) + SEE + more), "odd.bin")
    assert [document.article for document in read_documents(file)] == [ARTICLE]


def test_a_pattern_reads_its_files_in_order(tmp_path):
    for number, name in ((1, "train_001.bin"), (0, "train_000.bin"), (2, "val_000.bin")):
        text = example(feature("article", f"number {number} ."), feature("abstract", tagged(ABSTRACT)))
        written(tmp_path, chunk(text), name)
    assert [document.article[0][1] for document in read_documents(tmp_path / "train_*.bin")] == ["0", "1"]
    with pytest.raises(FileNotFoundError, match=r"train_\*\.bin"):
        read_documents(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_documents(tmp_path / "test_*.bin")


def test_another_ending_is_refused_with_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match="valid: .bin, .jsonl"):
        read_documents(written(tmp_path, "{}", "file.json"))


def test_json_lines_of_sentences_read_back(tmp_path):
    texts = dict(article_sents=[" ".join(words).upper() for words in ARTICLE], abstract_sents=ABSTRACT)
    marked = dict(article_sents=[*ARTICLE, []], abstract_sents=["", *ABSTRACT], labels=[0, 1, 0, 1], id=7)
    file = written(tmp_path, f"{json.dumps(texts)}\n\n{json.dumps(marked)}\n")
    assert list(read_documents(file)) == [
        Document(ARTICLE, ABSTRACT, None, "file-0"),
        Document(ARTICLE, ABSTRACT, [0, 1, 0], "7"),
    ]


def test_json_lines_of_plain_text_read_back(tmp_path):
    plain = dict(
        article='A storm hit Rowfield. "It was loud." Shops closed.',
        id="x",
        highlights="Storm hits Rowfield .\nShops closed",
    )
    assert list(read_documents(written(tmp_path, json.dumps(plain)))) == [Document(ARTICLE, ABSTRACT, None, "x")]


GOOD = dict(article_sents=ARTICLE, abstract_sents=ABSTRACT)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: broken JSON"),
        ("[" * 100_000, "line 2: broken JSON"),
        (b"\xff\xfe", "line 2: broken JSON"),
        ("[1]", "line 2: a record must be an object"),
        (json.dumps({"text": "a", "summary": "b"}), "line 2: .*article_sents.*but this one has text, summary"),
        (json.dumps(GOOD | {"article_sents": "a b ."}), "article_sents must be a list"),
        (json.dumps(GOOD | {"abstract_sents": [["a b"]]}), "abstract_sents must hold texts or lists of words"),
        (json.dumps(GOOD | {"abstract_sents": [3]}), "abstract_sents must hold texts or lists of words"),
        (json.dumps(GOOD | {"labels": [1, 0]}), "labels must be 0 or 1 for each of 3 sentences"),
        (json.dumps(GOOD | {"labels": [1, 0, True]}), "labels must be 0 or 1"),
        (json.dumps({"article": ["a"], "highlights": "b"}), "article must be text"),
        (json.dumps(GOOD | {"article_sents": ["", " "]}), "line 2: the article is empty; skip_empty"),
        (json.dumps(GOOD | {"abstract_sents": []}), "line 2: the abstract is empty"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(ValueError, match=message):
        list(read_documents(written(tmp_path, json.dumps(GOOD).encode() + b"\n" + line)))


@pytest.mark.parametrize(
    "content, message",
    [
        (chunk(SEE, SEE)[:-1], f"example 2: the file ends after {len(SEE) - 1} of {len(SEE)} bytes"),
        (chunk(SEE) + b"\1\0\0", "example 2: 8 bytes must say its length"),
        (struct.pack("<q", 2**62) + SEE, "example 1: 8 bytes must say its length"),
        (struct.pack("<q", -1) + SEE, "example 1: 8 bytes"),
        (struct.pack("<q", 0), "example 1: 8 bytes"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "example 1"),
        (chunk(b"\x0a\xff\xff\xff\xff\x07"), r"field 1 is to have \d+ bytes, but 0 are left"),
        (chunk(b"\x0a"), "it ends within a number"),
        (chunk(b"\xff" * 11), "more than 10 bytes"),
        (chunk(b"\x0b"), "unknown kind 3"),
        (chunk(example(feature("article", "a ."))), "needs article and abstract, but has article"),
        (chunk(b"\x12\x00"), "but has nothing"),
        (chunk(example(feature("article", "a ."), feature("abstract", "a ."))), "must be in <s> ... </s>, not 'a .'"),
        (chunk(example(feature("article", "a ."), feature("abstract", "<s> a <s> b </s>"))), "must be in <s>"),
        (
            chunk(example(feature("article", " "), feature("abstract", tagged(ABSTRACT)))),
            "example 1: the article is empty",
        ),
        (chunk(HSU.replace(b"0,2", b"0,3")), "extract_ids must number 3 sentences from 0, not 0,3"),
        (chunk(HSU.replace(b"0,2", b"0,x")), "example 1: "),
        (chunk(SEE.replace(b"storm", b"\xff\xfe\xfd\xfc\xfb")), "example 1: .*utf-8"),
    ],
)
def test_a_broken_chunk_is_refused_with_its_example(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_documents(written(tmp_path, content, "broken.bin")))


def test_a_chunk_cut_anywhere_is_refused(tmp_path):
    whole = chunk(SEE, HSU)
    for length in set(range(1, len(whole), 3)) - {len(chunk(SEE))}:
        with pytest.raises(ValueError, match="broken.bin, example"):
            list(read_documents(written(tmp_path, whole[:length], "broken.bin")))


def only_value_errors(file):
    try:
        return all(document.article and document.abstract for document in read_documents(file))
    except ValueError:
        return True


@settings(max_examples=80)
@given(st.binary(max_size=200), st.sampled_from([".bin", ".jsonl"]), st.booleans())
def test_noise_is_a_value_error(tmp_path_factory, noise, ending, framed):
    content = chunk(noise) if framed and ending == ".bin" else noise
    assert only_value_errors(written(tmp_path_factory.getbasetemp(), content, f"noise{ending}"))


@settings(max_examples=80)
@given(st.integers(0, len(chunk(SEE, HSU)) - 1), st.integers(0, 255))
def test_a_wrong_byte_is_a_value_error_or_another_text(tmp_path_factory, at, value):
    content = bytearray(chunk(SEE, HSU))
    content[at] = value
    assert only_value_errors(written(tmp_path_factory.getbasetemp(), bytes(content), "byte.bin"))


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["article", "highlights", "article_sents", "abstract_sents", "labels", "id"]),
        st.recursive(st.none() | st.integers() | st.text(max_size=20), st.lists, max_leaves=6),
    )
)
def test_a_record_of_anything_is_a_value_error_or_a_document(tmp_path_factory, record):
    assert only_value_errors(written(tmp_path_factory.getbasetemp(), json.dumps(record), "record.jsonl"))


def test_empty_documents_are_left_out_only_when_asked_for(tmp_path):
    lines = [GOOD, GOOD | {"article_sents": []}, GOOD | {"abstract_sents": [""]}, GOOD]
    file = written(tmp_path, "\n".join(map(json.dumps, lines)))
    with pytest.warns(UserWarning, match="2 documents without"):
        assert [document.id for document in read_documents(file, skip_empty=True)] == ["file-0", "file-3"]


class Paper:
    id, summaries = "P1", {"outcome": "It works. Very well."}

    def get_all_sentences(self):
        return ["We sort .", "", "It works ."]

    def get_all_highlights(self, aspect):
        return [0, 1, 1]


def test_aclsum_gives_papers_with_their_highlights(monkeypatch):
    monkeypatch.setitem(sys.modules, "aclsum", types.SimpleNamespace(ACLSum=lambda split: [Paper()] * (split == "val")))
    expected = Document(
        [["we", "sort", "."], ["it", "works", "."]], [["it", "works", "."], ["very", "well", "."]], [0, 1], "P1-outcome"
    )
    assert aclsum("val", "outcome") == [expected]
    assert aclsum("test", "outcome") == []
    with pytest.raises(ValueError, match="unknown split 'validation'"):
        aclsum("validation", "outcome")
    with pytest.raises(ValueError, match="valid: challenge, approach, outcome"):
        aclsum("val", "result")


def test_without_its_package_aclsum_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "aclsum", None)
    with pytest.raises(ImportError, match="pip install aclsum"):
        aclsum("val", "outcome")


# Labels.


def naive_labels(article, abstract):
    """The rule, word for word, with rouge-score at each step."""
    scorer, reference = RougeScorer(["rougeLsum"]), "\n".join(map(" ".join, abstract))

    def recall(numbers):
        return scorer.score(reference, "\n".join(" ".join(article[i]) for i in sorted(numbers)))["rougeLsum"].recall

    kept = set()
    for i in sorted(range(len(article)), key=lambda i: (-recall({i}), i)):
        if recall(kept | {i}) > recall(kept):
            kept |= {i}
    return [int(i in kept) for i in range(len(article))]


SENTENCE = st.lists(st.sampled_from("a b c d e , It's x-y".split()), min_size=1, max_size=8)
SAID = st.lists(SENTENCE, min_size=1, max_size=6)


@settings(max_examples=100)
@given(SAID, SAID)
def test_labels_follow_the_rule(article, abstract):
    assert labels(article, abstract) == naive_labels(article, abstract)


def test_labels_of_news_follow_the_rule():
    for document in news.documents("validation", 8):
        assert labels(document.article, document.abstract) == naive_labels(document.article, document.abstract)


def test_labels_by_hand():
    article = [["a", "x"], ["a", "b", "c"], ["d", "y"], ["a", "b"], ["z"]]
    assert labels(article, [["a", "b", "c"], ["d"]]) == [0, 1, 1, 0, 0]
    assert labels([["a", "x"], ["a", "y"]], [["a"]]) == [1, 0], "of two equal ones the first"
    assert labels([["a", "b"], ["b", "a"]], [["a", "b", "a"]]) == [1, 1], "the second has the last word"
    assert labels([["dogs"]], [["dog"]]) == [0], "not stemmed"
    assert labels([["a"]], []) == [0]
    document = Document([["a"], ["b"]], [["b"]], [1, 1], "x")
    assert labelled([document]) == [document._replace(labels=[0, 1])]


# Vocabulary and batches.


def test_the_vocabulary_has_the_most_frequent_words():
    documents = [Document([["b", "b", "c"], ["a"]], [["c", "b", "[UNK]"]])]
    assert Vocabulary.build(documents).words == [*SPECIAL, "b", "c", "a"]
    small = Vocabulary.build(documents, size=6)
    assert small.words == [*SPECIAL, "b", "c"] and len(small) == 6
    equal = Vocabulary.build([Document([list("zyxwvuts")], [])], 9)
    assert equal.words == [*SPECIAL, *"stuvw"], "of equally frequent ones those that are first in the alphabet"
    assert [SPECIAL[i] for i in (PAD, UNK, START, STOP)] == ["[PAD]", "[UNK]", "[START]", "[STOP]"]
    with pytest.raises(ValueError, match="size cannot be 4"):
        Vocabulary.build(documents, size=4)


def test_the_vocabulary_reads_back(tmp_path):
    words = Vocabulary(["a", "café", "-lrb-"])
    words.save(tmp_path / "words.txt")
    assert (tmp_path / "words.txt").read_bytes() == "[PAD]\n[UNK]\n[START]\n[STOP]\na\ncafé\n-lrb-\n".encode()
    assert Vocabulary.load(tmp_path / "words.txt") == words != Vocabulary(["a"])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\nb\n", "must begin with the lines .*not with 'a'"),
        ("\n".join([*SPECIAL, "a", "b", "a"]).encode(), "words.txt: 'a' is in the vocabulary more than once"),
        ("\n".join([*SPECIAL, "a 12"]).encode(), "words.txt: a word must be without spaces and not empty, not 'a 12'"),
        ("\n".join([*SPECIAL, "", "b"]).encode(), "not ''"),
        (b"\xff\xfe", "is no text"),
        (b"", "must begin"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.load(written(tmp_path, content, "words.txt"))


V = Vocabulary(["a", "b", "."])  # IDs 4, 5, 6; the next, 7, is the first that can only be copied
LONG = Document([["a", "kay", "."], ["lee", "b", "kay", "."]], [["lee", "a", "moe"], ["kay", "."]], [0, 1], "long")
SHORT = Document([["b"]], [["moe"]], [1], "short")


def test_collate_by_hand():
    batch = collate([LONG, SHORT], V)
    assert batch.words.tolist() == [[4, 1, 6, 1, 5, 1, 6], [5, 0, 0, 0, 0, 0, 0]]
    assert batch.extended.tolist() == [[4, 7, 6, 8, 5, 7, 6], [5, 0, 0, 0, 0, 0, 0]]
    assert batch.sentence.tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, -1, -1, -1, -1, -1, -1]]
    assert batch.labels.tolist() == [[0, 1], [1, 0]] and batch.labels.dtype == torch.float32
    assert batch.sentences.tolist() == [2, 1]
    assert batch.inputs.tolist() == [[START, 1, 4, 1, 1, 6], [START, 1, 0, 0, 0, 0]]
    assert batch.target.tolist() == [[8, 4, UNK, 7, 6, STOP], [UNK, STOP, 0, 0, 0, 0]]
    assert batch.oov == [["kay", "lee"], []]
    integers = {"words", "extended", "sentence", "sentences", "inputs", "target"}
    assert {getattr(batch, name).dtype for name in integers} == {torch.int64}


def test_collate_cuts_what_is_too_long():
    batch = collate([LONG], V, max_words=4, max_target=3)
    assert batch.words.tolist() == [[4, 1, 6, 1]] and batch.sentences.tolist() == [2]
    assert batch.target.tolist() == [[8, 4, UNK]], "a cut abstract does not stop"
    assert batch.inputs.tolist() == [[START, 1, 4]]
    few = collate([LONG], V, max_sentences=1, max_target=6)
    assert few.words.tolist() == [[4, 1, 6]] and few.labels.tolist() == [[0]] and few.oov == [["kay"]]
    assert few.target.tolist() == [[UNK, 4, UNK, 7, 6, STOP]], "lee is no longer there to be copied"
    assert collate([LONG], V, max_words=3).sentences.tolist() == [1]


@pytest.mark.parametrize(
    "documents, limits, message",
    [
        ([], {}, "got 0 documents"),
        ([LONG], {"max_words": 0}, "max_words=0"),
        ([SHORT, LONG._replace(labels=None)], {}, "'long' needs a label for each of its 2 sentences; labelled"),
        ([LONG._replace(labels=[1])], {}, "needs a label"),
        ([LONG._replace(article=[])], {}, "'long' has an empty article"),
        ([LONG._replace(article=[["a"], []])], {}, "empty sentence"),
    ],
)
def test_what_cannot_be_collated_is_said(documents, limits, message):
    with pytest.raises(ValueError, match=message):
        collate(documents, V, **limits)


def test_an_abstract_may_be_empty():
    batch = collate([SHORT._replace(abstract=[])], V)
    assert batch.inputs.tolist() == [[START]] and batch.target.tolist() == [[STOP]]


LENGTHS = [Document([["a"] * length], [["a"]], [1], str(length)) for length in (9, 1, 8, 2, 7, 3, 6, 4, 5)]


def lengths(found):
    return [(batch.words != PAD).sum(1).tolist() for batch in found]


def test_batches_hold_each_document_once():
    assert lengths(batches(LENGTHS, V, 4)) == [[9, 1, 8, 2], [7, 3, 6, 4], [5]]
    shuffled = lengths(batches(LENGTHS, V, 2, seed=3))
    assert sorted(sum(shuffled, [])) == list(range(1, 10))
    assert shuffled == lengths(batches(LENGTHS, V, 2, seed=3)) != lengths(batches(LENGTHS, V, 2, seed=4))
    assert all(batch == sorted(batch) and max(batch) - min(batch) == len(batch) - 1 for batch in shuffled)
    assert shuffled != sorted(shuffled), "short and long batches mixed"
    assert lengths(batches(LENGTHS, V, 9, max_words=3)) == [[3, 1, 3, 2, 3, 3, 3, 3, 3]]
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        batches(LENGTHS, V, 0)


# The generated news.


@pytest.fixture(scope="module")
def splits():
    return {split: news.documents(split, 300) for split in news.COUNTS}


def words_of(documents):
    return {word for d in documents for side in (d.article, d.abstract) for words in side for word in words}


def test_news_are_the_same_on_every_machine(splits):
    text = json.dumps(splits)
    assert hashlib.sha256(text.encode()).hexdigest() == HASH
    assert news.document("test", 5) == splits["test"][5] != splits["validation"][5]


def test_there_are_enough_documents_and_none_twice():
    assert news.COUNTS["train"] >= 3000 and news.COUNTS["validation"] == 300 and news.COUNTS["test"] == 1000
    found = [joined(d.article) for split in news.COUNTS for d in news.documents(split, 300)]
    assert len(set(found)) == 900
    with pytest.raises(ValueError, match="at least 1, got 0"):
        news.documents("test", 0)
    with pytest.raises(ValueError, match="valid: train, validation, test"):
        news.documents("val")


def test_names_are_in_one_split_only(splits):
    named = {split: set(sum(news.names(split), ())) for split in splits}
    for split, documents in splits.items():
        words = words_of(documents)
        assert len(words & named[split]) > 300
        assert all(not words & named[other] for other in splits if other != split)
    vocabulary = Vocabulary.build(splits["train"])
    copied = [batch for batch in batches(splits["test"], vocabulary, 50)]
    share = (torch.cat([(b.target >= len(vocabulary)).any(1) for b in copied])).float().mean()
    assert share > 0.9, "nearly every abstract has a word that can only be copied"


def test_news_have_the_shape_they_promise(splits):
    documents = sum(splits.values(), [])
    assert {len(d.article) for d in documents} <= set(range(8, 21))
    assert {sum(d.labels) for d in documents} == {2, 3, 4} and {len(d.abstract) for d in documents} == {2, 3}
    assert all(len(d.labels) == len(d.article) and all(s[-1] in (".", "''") for s in d.article) for d in documents)
    assert not any("{" in word or "}" in word for word in words_of(documents))
    assert len(news.topics()) == 8 and all(len(topic.facts) == 5 for topic in news.topics().values())


def test_cues_are_right_in_four_of_five_cases(splits):
    cued = Counter(
        (any(word in news.DAYS for word in words), label)
        for split in splits.values()
        for d in split
        for words, label in zip(d.article, d.labels)
    )
    assert cued[True, 1] / (cued[True, 0] + cued[True, 1]) == pytest.approx(0.8, abs=0.03)
    assert cued[True, 1] / (cued[False, 1] + cued[True, 1]) == pytest.approx(0.8, abs=0.03)


def test_the_rule_finds_the_key_sentences(splits):
    marks = [(a, b) for d in splits["test"][:100] for a, b in zip(d.labels, labels(d.article, d.abstract))]
    assert sum(a and b for a, b in marks) > 0.95 * sum(a for a, _ in marks)
    assert sum(a and b for a, b in marks) > 0.7 * sum(b for _, b in marks)
