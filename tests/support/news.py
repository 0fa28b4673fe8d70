"""A document, and a writer of the .bin files that both papers' data come in."""

import struct

ARTICLE = [["a", "storm", "hit", "rowfield", "."], ["``", "it", "was", "loud", ".", "''"], ["shops", "closed", "."]]
ABSTRACT = [["storm", "hits", "rowfield", "."], ["shops", "closed", "."]]


def joined(said):
    return " ".join(" ".join(words) for words in said)


def tagged(said):
    return " ".join(f"<s> {' '.join(words)} </s>" for words in said)


def varint(number):
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(name, text, kind=1):
    return field(1, field(1, name.encode()) + field(2, field(kind, field(1, text.encode()))))


def example(*features):
    return field(1, b"".join(features))


def chunk(*examples):
    return b"".join(struct.pack("<q", len(e)) + e for e in examples)


SEE = example(feature("abstract", tagged(ABSTRACT)), feature("article", joined(ARTICLE)))
HSU = example(
    feature("article", tagged(ARTICLE)),
    feature("abstract", tagged(ABSTRACT)),
    feature("extract", tagged(ARTICLE[:1])),
    feature("extract_ids", "0,2"),
)
