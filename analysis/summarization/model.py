"""The model of Hsu et al., arXiv:1805.06266: an extractor, an abstracter, and what lies between them.

The extractor gives each sentence n a beta_n in [0, 1]; the abstracter's decoder attends to word m with alpha_m at each
step. Modulated attention, which then feeds context, coverage and copies, is

    alphahat_m = alpha_m beta_n(m) / sum_j alpha_j beta_n(j) = softmax(e + log beta)_m,  alpha = softmax(e)

The extractor is that of SummaRuNNer (arXiv:1611.04230) without its position features, the abstracter is the
pointer-generator with coverage of See et al. (arXiv:1704.04368). Known differences from the TensorFlow original: the
GRU's reset gate acts after the product with the weights, as PyTorch has it, and weights begin as in `_initialise`.

B articles, M words in N sentences, T steps, V words in the vocabulary; E, H: width of embedding and recurrent state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from analysis.inconsistency import of_words
from analysis.registry import pick
from analysis.summarization.batch import PAD, STOP, UNK, Batch

SYSTEMS = {
    "pointer-generator": "beta is ignored",
    "two-stage": "only the sentences with beta > 0.5 are read",
    "end-to-end": "beta modulates attention; trained with or without the inconsistency loss",
}


@dataclass(frozen=True)
class Sizes:
    """vocabulary: V, special words included; embedding: E of both tables; extractor, abstracter: H of their encoders,
    one direction. Raises ValueError for a vocabulary of special words only and for a width below 1."""

    vocabulary: int = 50_000
    embedding: int = 128
    extractor: int = 200
    abstracter: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            least = STOP + 2 if field.name == "vocabulary" else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name} must be at least {least}, got {getattr(self, field.name)}")


PAPER = Sizes()
SMALL = Sizes(vocabulary=1_000, embedding=48, extractor=48, abstracter=64)  # for a CPU


def _precise(x: Tensor) -> Tensor:
    """At least float32: exponentials and logarithms lose too much in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _one_bias(rnn: nn.LSTM | nn.LSTMCell) -> nn.LSTM | nn.LSTMCell:
    """TensorFlow's LSTM: one bias per gate, so PyTorch's second stays at zero, frozen; the forget gate begins at 1."""
    biases = {name: nn.init.zeros_(parameter) for name, parameter in rnn.named_parameters() if "bias" in name}
    for name, bias in biases.items():
        if "bias_hh" in name:
            bias.requires_grad_(False)
        else:
            nn.init.ones_(bias.data[rnn.hidden_size : 2 * rnn.hidden_size])  # the gates: input, forget, cell, output
    return rnn


def _read(rnn: nn.LSTM, x: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """States [B, M, 2H] of a one-layer bidirectional LSTM over x [B, M, E], 0 where mask [B, M] ends, and the last h, c
    of each direction [2, B, H], as from a packed sequence.

    Not packed, for the gradient through a packed sequence takes time quadratic in M on a CPU. Instead padding has an
    input of its own which closes the input gate and opens the forget gate: the cell stays as it is.
    """
    gates = x.new_zeros(4 * rnn.hidden_size, 1)
    gates[: 2 * rnn.hidden_size] = gates.new_tensor([-1e4, 1e4]).repeat_interleave(rnn.hidden_size)[:, None]
    weights = [
        torch.cat([p, gates.to(p.dtype)], dim=1) if "weight_ih" in name else p for name, p in rnn.named_parameters()
    ]
    start = x.new_zeros(2, len(x), rnn.hidden_size)
    states, h, c = torch.lstm(
        torch.cat([x, ~mask[..., None]], dim=-1), (start, start), weights, True, 1, 0.0, rnn.training, True, True
    )
    last = (mask.sum(1) - 1).clamp(min=0)
    h = torch.stack([states[torch.arange(len(x), device=x.device), last, : rnn.hidden_size], h[1]])
    return states * mask[..., None], (h, c)


def _initialise(model: nn.Module) -> None:
    """Embeddings begin as in the original, linear layers as most of them there (Glorot, bias 0), GRUs and the LSTMs'
    weights as in PyTorch."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=1e-4)


def trainable(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def chosen(beta: Tensor, sentences: Tensor, at_least: int = 1) -> Tensor:
    """[B, N] bool: the sentences with beta [B, N] > 0.5, and the best `at_least` in any case, as far as there are so
    many. sentences: [B], how many each article has. The paper evaluates its extractor with at_least=5."""
    rank = beta.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    there = torch.arange(beta.shape[1], device=beta.device) < sentences[:, None]
    return there & ((beta > 0.5) | (rank < at_least))


def keep_sentences(batch: Batch, keep: Tensor, vocabulary: int) -> Batch:
    """The batch with the words of the sentences keep [B, N] bool only, closed up; sentences keep their numbers.

    vocabulary: V. A target outside the vocabulary that cannot be copied any more becomes UNK. Raises ValueError where
    nothing of an article is kept.
    """
    kept = of_words(keep.long(), batch.sentence) > 0
    lengths = kept.sum(1)
    if empty := (lengths == 0).nonzero().flatten().tolist():
        raise ValueError(f"articles {empty} of the batch keep no sentence with words")
    order = kept.sort(dim=1, descending=True, stable=True).indices[:, : int(lengths.max())]
    left = kept.gather(1, order)
    words, extended, sentence = (
        field.gather(1, order).masked_fill(~left, padding)
        for field, padding in ((batch.words, PAD), (batch.extended, PAD), (batch.sentence, -1))
    )
    lost = (batch.target >= vocabulary) & ~(extended[:, None] == batch.target[:, :, None]).any(-1)
    return batch._replace(words=words, extended=extended, sentence=sentence, target=batch.target.masked_fill(lost, UNK))


class Extractor(nn.Module):
    """Word biGRU, mean over each sentence's words, sentence biGRU, then a classifier from sentence to sentence."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.extractor
        self.embed = nn.Embedding(sizes.vocabulary, sizes.embedding)
        self.over_words = nn.GRU(sizes.embedding, width, batch_first=True, bidirectional=True)
        self.over_sentences = nn.GRU(2 * width, width, batch_first=True, bidirectional=True)
        self.sentence, self.article = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.content = nn.Linear(width, 1)
        self.salience, self.novelty = (nn.Linear(width, width, bias=False) for _ in range(2))
        _initialise(self)

    def _means(self, batch: Batch) -> Tensor:
        """Means of the word biGRU's states over each sentence [B, N, 2H]; 0 where there is none."""
        read = (batch.sentence >= 0) & (batch.sentence < batch.sentences[:, None])
        counts = torch.zeros_like(batch.labels, dtype=torch.int64)
        counts.scatter_add_(1, batch.sentence.clamp(0, counts.shape[1] - 1), read.long())
        packed = pack_sequence(batch.words[read].split(counts[counts > 0].tolist()), enforce_sorted=False)
        states, lengths = pad_packed_sequence(
            self.over_words(packed._replace(data=self.embed(packed.data)))[0], batch_first=True
        )
        mean = states.sum(1) / lengths.to(states.device)[:, None]
        means = mean.new_zeros(*counts.shape, mean.shape[-1])
        means[counts > 0] = mean
        return means

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, N] and beta [B, N], 0 for sentences that are not there. The words of a sentence stand together.

        beta_j = sigmoid(content + salience - novelty), the novelty term against what is summed up to there:
        h_j^T W tanh(sum_i<j beta_i h_i).
        """
        n = batch.labels.shape[1]
        packed = pack_padded_sequence(self._means(batch), batch.sentences.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.over_sentences(packed)[0], batch_first=True, total_length=n)
        h = self.sentence(states).tanh()
        article = self.article(states.sum(1) / batch.sentences[:, None]).tanh()
        first = self.content(h).squeeze(-1) + (self.salience(h) * article[:, None]).sum(-1)
        new, summary, logits = self.novelty(h), torch.zeros_like(article), []
        for j in range(n):
            logits.append(first[:, j] - (new[:, j] * summary.tanh()).sum(-1))
            summary = summary + logits[-1].sigmoid()[:, None] * h[:, j]
        logits = _precise(torch.stack(logits, dim=1))
        return logits, logits.sigmoid() * (torch.arange(n, device=h.device) < batch.sentences[:, None])


class Memory(NamedTuple):
    """What the decoder attends to: states, keys [B, M, 2H]; mask [B, M] bool; log_beta [B, M] or None."""

    states: Tensor
    keys: Tensor
    mask: Tensor
    log_beta: Tensor | None


class State(NamedTuple):
    """What the decoder carries on: h, c [B, H]; context [B, 2H]; coverage [B, M], the sum of alphahat so far."""

    h: Tensor
    c: Tensor
    context: Tensor
    coverage: Tensor


class Step(NamedTuple):
    """What one step leaves to read: seen [B, 4H + E] (context, h, c, the cell's input); alpha, alphahat [B, M]."""

    seen: Tensor
    alpha: Tensor
    alphahat: Tensor


class Written(NamedTuple):
    """log_prob: [B, T], log P_final of the targets; alpha, alphahat: [B, T, M]; p_gen: [B, T]."""

    log_prob: Tensor
    alpha: Tensor
    alphahat: Tensor
    p_gen: Tensor


class Abstracter(nn.Module):
    """Pointer-generator with coverage (equations are those of arXiv:1704.04368), whose attention beta may modulate.

    21,501,265 parameters at the paper's sizes, as published (21,499,600 + 1,153 for the gate + 512 for coverage).
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        e, h = sizes.embedding, sizes.abstracter
        self.embed = nn.Embedding(sizes.vocabulary, e)
        self.encoder = _one_bias(nn.LSTM(e, h, batch_first=True, bidirectional=True))
        self.reduce_h, self.reduce_c = nn.Linear(2 * h, h), nn.Linear(2 * h, h)
        # input feeding: a linear layer of word and context in two parts, as all words are known before the first step
        self.from_word, self.from_context = nn.Linear(e, e), nn.Linear(2 * h, e, bias=False)
        self.cell = _one_bias(nn.LSTMCell(e, h))
        self.key, self.query = nn.Linear(2 * h, 2 * h, bias=False), nn.Linear(2 * h, 2 * h)
        self.covered, self.energy = nn.Linear(1, 2 * h, bias=False), nn.Linear(2 * h, 1, bias=False)
        self.gate = nn.Linear(4 * h + e, 1)
        self.readout, self.project = nn.Linear(3 * h, h), nn.Linear(h, sizes.vocabulary)
        _initialise(self)

    def encode(self, words: Tensor, beta: Tensor | None = None) -> tuple[Memory, State]:
        """Read words [B, M]; beta: [B, M] of each word, which modulates attention, or None. The state is the first."""
        mask = words != PAD
        states, ends = _read(self.encoder, self.embed(words), mask)
        h, c = (
            reduce(end.transpose(0, 1).flatten(1)).relu() for reduce, end in zip((self.reduce_h, self.reduce_c), ends)
        )
        if beta is not None:
            # an article all of whose beta are 0 has plain attention: a constant changes no softmax
            beta = _precise(beta).clamp(min=torch.finfo(torch.float32).tiny).log()
        context, coverage = states.new_zeros(len(words), states.shape[-1]), _precise(states.new_zeros(words.shape))
        return Memory(states, self.key(states), mask, beta), State(h, c, context, coverage)

    def step(self, word: Tensor, memory: Memory, state: State, coverage: bool = True) -> tuple[State, Step]:
        """One step of the decoder after word [B, E], an embedding through `from_word`; coverage: whether attention sees
        it (equation 11)."""
        x = word + self.from_context(state.context)
        h, c = self.cell(x, (state.h, state.c))
        features = memory.keys + self.query(torch.cat([c, h], dim=-1))[:, None]
        if coverage:
            features = features + self.covered(state.coverage.to(features.dtype)[..., None])
        e = _precise(self.energy(features.tanh()).squeeze(-1))
        e = e.masked_fill(~memory.mask, torch.finfo(e.dtype).min)
        alpha = e.softmax(-1)
        alphahat = alpha if memory.log_beta is None else (e + memory.log_beta).softmax(-1)
        context = (alphahat.to(memory.states.dtype)[:, None] @ memory.states).squeeze(1)
        return (
            State(h, c, context, state.coverage + alphahat),
            Step(torch.cat([context, h, c, x], dim=-1), alpha, alphahat),
        )

    def generate(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the vocabulary [..., V] (equation 4) and of p_gen [...] (equation 8) from seen [..., 4H + E]."""
        output = self.readout(seen[..., : self.readout.in_features])
        return _precise(self.project(output)), _precise(self.gate(seen).squeeze(-1))

    def distribution(self, step: Step, extended: Tensor, oov: int) -> Tensor:
        """P_final [B, V + oov] (equation 9) after a step; extended: [B, M], with oov IDs beyond the vocabulary."""
        logits, gate = self.generate(step.seen)
        p_gen = gate.sigmoid()[:, None]
        return pad(p_gen * logits.softmax(-1), (0, oov)).scatter_add(1, extended, (1 - p_gen) * step.alphahat)

    def forward(self, batch: Batch, beta: Tensor | None = None, coverage: bool = True) -> Written:
        """Teacher forcing: attention over the batch's words and the probabilities of its targets.

        beta: [B, M] or None as for `encode`. P_final is not laid out over the extended vocabulary: of what is generated
        and of what is copied only the target's share is needed.
        """
        memory, state = self.encode(batch.words, beta)
        steps = []
        for word in self.from_word(self.embed(batch.inputs)).unbind(1):
            state, step = self.step(word, memory, state, coverage)
            steps.append(step)
        seen, alpha, alphahat = (torch.stack(parts, dim=1) for parts in zip(*steps))
        logits, gate = self.generate(seen)
        known = batch.target < logits.shape[-1]
        vocabulary = logits.gather(-1, batch.target.where(known, UNK)[..., None]).squeeze(-1) - logits.logsumexp(-1)
        copied = (alphahat * (batch.extended[:, None] == batch.target[..., None])).sum(-1)
        log_prob = torch.logaddexp(
            logsigmoid(gate) + vocabulary.masked_fill(~known, -torch.inf),
            logsigmoid(-gate) + copied.clamp(min=torch.finfo(torch.float32).tiny).log(),
        )
        return Written(log_prob, alpha, alphahat, gate.sigmoid())


class Reading(NamedTuple):
    """logits, beta: [B, N] of the extractor; batch: what the abstracter reads; modulation: [B, M] or None."""

    logits: Tensor
    beta: Tensor
    batch: Batch
    modulation: Tensor | None


class Output(NamedTuple):
    """What the losses need: logits, beta, batch as in `Reading`; log_prob, alpha, alphahat, p_gen as in `Written`."""

    logits: Tensor
    beta: Tensor
    batch: Batch
    log_prob: Tensor
    alpha: Tensor
    alphahat: Tensor
    p_gen: Tensor


class Unified(nn.Module):
    """Extractor and abstracter; the same weights may be run as each of the `SYSTEMS`."""

    def __init__(self, sizes: Sizes = PAPER) -> None:
        super().__init__()
        self.sizes = sizes
        self.extractor, self.abstracter = Extractor(sizes), Abstracter(sizes)

    def read(self, batch: Batch, system: str = "end-to-end") -> Reading:
        """Extract, and make what the abstracter reads in this system: all words, the chosen sentences, or with beta.

        Raises ValueError for an unknown system, an article without words and a word outside the model's vocabulary.
        """
        pick(SYSTEMS, system, "system")
        if not batch.words.numel() or not ((batch.sentences > 0) & (batch.words != PAD).any(1)).all():
            raise ValueError("each article of a batch needs at least one sentence and one word")
        largest = max(int(batch.words.max()), int(batch.inputs.max()))
        if largest >= self.sizes.vocabulary:
            raise ValueError(
                f"the batch has a word of ID {largest}, but the model's vocabulary ends before ID "
                f"{self.sizes.vocabulary}: they do not belong together"
            )
        logits, beta = self.extractor(batch)
        if system == "two-stage":
            batch = keep_sentences(batch, chosen(beta, batch.sentences), self.sizes.vocabulary)
        return Reading(logits, beta, batch, of_words(beta, batch.sentence) if system == "end-to-end" else None)

    def forward(self, batch: Batch, system: str = "end-to-end", coverage: bool = True) -> Output:
        """Teacher forcing in one of the systems. coverage: as for `Abstracter.step`; errors as for `read`."""
        logits, beta, batch, modulation = self.read(batch, system)
        return Output(logits, beta, batch, *self.abstracter(batch, modulation, coverage))


def text(tokens: Sequence[int], words: Sequence[str], oov: Sequence[str]) -> list[str]:
    """Words of tokens: those of the vocabulary, then the article's own, which were copied."""
    return [words[token] if token < len(words) else oov[token - len(words)] for token in tokens]
