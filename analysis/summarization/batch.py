"""What flows through the summarizer: a batch of articles as word IDs, with the words outside the vocabulary numbered
on.

IDs 0..V-1 are the vocabulary's; in `extended` and `target` the words of an article that are outside it are V, V + 1,
... in order of their first appearance there, so that they can be copied.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PAD, UNK, START, STOP = 0, 1, 2, 3  # IDs of the special words in every vocabulary


class Batch(NamedTuple):
    """B articles of at most M words in at most N sentences, abstracts of at most T words, STOP included.

    words: [B, M] int64, article, UNK outside the vocabulary, PAD at the end; extended: [B, M] the same with copyable
    IDs; sentence: [B, M] int64, which sentence each word is in, -1 for padding; labels: [B, N] float, 1 for sentences
    to extract, 0 else; sentences: [B] int64, how many there are; inputs: [B, T] abstract after START, UNK outside the
    vocabulary, PAD at the end; target: [B, T] abstract with copyable IDs, then STOP, PAD at the end; oov: for each
    article its words outside the vocabulary in order.
    """

    words: Tensor
    extended: Tensor
    sentence: Tensor
    labels: Tensor
    sentences: Tensor
    inputs: Tensor
    target: Tensor
    oov: list[list[str]]
