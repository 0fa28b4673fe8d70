"""Train the summarizers of the second paper: one command for all stages and seeds.

    python -m analysis.summarization.train                               # the embedded ones, on generated news
    python -m analysis.summarization.train --stages abstracter --seeds 0
    python -m analysis.summarization.train --config paper --data 'chunked/train_*.bin' --validation 'chunked/val_*.bin'
    python -m analysis.summarization.train --config paper --estimate     # how long that would take here

Stages, each for every seed (arXiv:1805.06266; the pointer-generator is arXiv:1704.04368):

    extractor          alone, on labels; of its checkpoints the one that selects least at a label recall of 0.9 is kept
    abstracter         alone, on the labelled sentences: lengths grow, then coverage; the last one is kept
    pointer-generator  the same on whole articles, for as many steps as abstracter and end-to-end together; coverage
                       from the same step on as there
    end-to-end-<w>     from extractor and abstracter on whole articles with modulated attention; w: weight of L_ext
    end-to-end-<w>-inc the same with the inconsistency loss

The two-stage system is extractor and abstracter without more training. Each stage keeps `state.pt` (weights, optimizer,
step, log) and `log.csv` in runs/summarization/<config>/seed<seed>/<stage>/ and goes on from there when it is started
again; a stage that is finished is left alone. When all are finished, the checkpoints (fp16) go to --out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

from analysis import ROOT, results
from analysis.registry import pick
from analysis.summarization import data, losses, news
from analysis.summarization.batch import PAD, Batch
from analysis.summarization.data import Document, Vocabulary
from analysis.summarization.model import PAPER, Sizes, Unified
from analysis.summarization.score import oracle

RUNS = ROOT / "runs" / "summarization"
ARMS = {
    f"end-to-end-{weight}{'-inc' * inc}": {"extraction": weight, "abstraction": 1, "coverage": 1}
    | ({"inconsistency": 1} if inc else {})
    for weight in (1, 5)
    for inc in (False, True)
}
STAGES = ("extractor", "abstracter", "pointer-generator", *ARMS)  # an arm needs the first two
TABLES = ("embed.", "project.")  # the parameters with a row for each word
RECALL = 0.9  # of the labels, at which extractors are compared
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # autocast, on a GPU only


@dataclass(frozen=True)
class Config:
    """sizes; optimizer: "adam" (warm-up, then linearly to 0) or "adagrad" (constant, the paper's).

    rates, batches, steps: of extractor, abstracter, end-to-end. grow: (step up to which, words of the labelled
    sentences, words of the abstract), the lengths of the abstracter's first steps; words, sentences, target: the limits
    after these and of all else. coverage: of the abstracter's last steps. frozen: end-to-end leaves the tables with a
    row for each word as they are. train, validation: how many documents; log: steps between two lines of the log;
    evaluations: on the validation set, in each stage.
    """

    sizes: Sizes
    optimizer: str
    rates: tuple[float, float, float]
    batches: tuple[int, int, int]
    steps: tuple[int, int, int]
    grow: tuple[tuple[int, int, int], ...]
    coverage: int
    frozen: bool
    train: int | None
    validation: int
    words: int = 600
    sentences: int = 50
    target: int = 100
    log: int = 50
    evaluations: int = 5


SMALL = Config(
    Sizes(vocabulary=1_200, embedding=32, extractor=24, abstracter=44),
    "adam",
    rates=(4e-3, 4e-3, 2e-3),
    batches=(32, 16, 8),
    steps=(250, 2400, 1600),
    grow=((200, 60, 20),),
    coverage=200,
    frozen=True,
    train=None,
    validation=160,
    words=400,
    sentences=20,
    target=70,
)
# The paper's but for the numbers of steps, which its code leaves to the user, and the batch of the pointer-generator's
# last steps, which stays at the abstracter's.
CONFIGS = {
    "small": SMALL,
    "smoke": replace(
        SMALL,
        sizes=Sizes(200, 8, 6, 8),
        batches=(4, 4, 4),
        steps=(4, 4, 2),
        grow=((2, 30, 10),),
        coverage=2,
        train=24,
        validation=6,
        log=2,
        evaluations=2,
    ),
    "paper": Config(
        PAPER,
        "adagrad",
        rates=(0.15, 0.15, 0.01),
        batches=(64, 16, 8),
        steps=(30_000, 81_000, 50_000),
        grow=((20_000, 50, 15), (40_000, 100, 30), (60_000, 200, 60), (80_000, 400, 100)),
        coverage=1_000,
        frozen=False,
        train=None,
        validation=2_000,
        log=100,
        evaluations=30,
    ),
}


class Corpus(NamedTuple):
    train: list[Document]
    validation: list[Document]
    vocabulary: Vocabulary


def corpus(config: Config, train: str | None = None, validation: str | None = None) -> Corpus:
    """Documents with labels and their vocabulary; generated news, or files as for `data.read_documents`.

    Documents without a labelled sentence are left out. Raises ValueError where none is left, and what `read_documents`
    raises.
    """
    if train is None:
        found = [news.documents("train", config.train), news.documents("validation", config.validation)]
    else:
        if validation is None:
            raise ValueError("training on files needs a validation set too: give --validation as well as --data")
        found = [list(data.read_documents(path, skip_empty=True)) for path in (train, validation)]
        found[1] = found[1][: config.validation]
        found = [docs if all(d.labels is not None for d in docs) else data.labelled(docs) for docs in found]
        found = [[d for d in docs if any(d.labels)] for docs in found]
        if not all(found):
            raise ValueError(f"no document with an extractable sentence in {train} or {validation}")
    return Corpus(*found, Vocabulary.build(found[0], config.sizes.vocabulary))


def gold(document: Document) -> Document:
    """The document with its labelled sentences only."""
    kept = oracle(document)
    return document._replace(article=kept, labels=[1] * len(kept))


class Task(NamedTuple):
    """One stage: the documents it reads, its size of batch, steps, rate and the step from which it has coverage."""

    train: list[Document]
    validation: list[Document]
    batch: int
    steps: int
    rate: float
    coverage: int


def task(stage: str, config: Config, known: Corpus) -> Task:
    whole = (known.train, known.validation)
    (_, abstracter, together), begin = config.steps, config.steps[1] - config.coverage
    if stage == "extractor":
        return Task(*whole, config.batches[0], config.steps[0], config.rates[0], 0)
    if stage == "abstracter":
        read = ([gold(d) for d in documents] for documents in whole)
        return Task(*read, config.batches[1], abstracter, config.rates[1], begin)
    if stage == "pointer-generator":
        return Task(*whole, config.batches[1], abstracter + together, config.rates[1], begin)
    return Task(*whole, config.batches[2], together, config.rates[2], 0)


def groups(documents: Sequence[Document], size: int, seed: int, step: int) -> Iterator[list[Document]]:
    """Batches from `step` on, without end: each epoch in another order, documents whose abstracts are about as long
    together, for what is padded there costs most."""
    each = -(-len(documents) // size)
    while True:
        epoch, rng = step // each, random.Random(f"{seed} {step // each}")
        order = list(range(len(documents)))
        rng.shuffle(order)
        buckets = (order[i : i + 20 * size] for i in range(0, len(order), 20 * size))
        order = [i for part in buckets for i in sorted(part, key=lambda i: sum(map(len, documents[i].abstract)))]
        found = [order[i : i + size] for i in range(0, len(order), size)]
        rng.shuffle(found)
        yield from ([documents[i] for i in group] for group in found[step - epoch * each :])
        step = (epoch + 1) * each


def limits(stage: str, config: Config, step: int) -> dict[str, int]:
    """How much of articles and abstracts is read at a step."""
    words, target = config.words, config.target
    for until, short_words, short_target in config.grow if stage in ("abstracter", "pointer-generator") else ():
        if step < until:
            words, target = short_words if stage == "abstracter" else words, short_target
            break
    return dict(max_words=words, max_sentences=config.sentences, max_target=target)


def on(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch))


def stage_losses(stage: str, model: Unified, batch: Batch, coverage: bool = True) -> dict[str, Tensor]:
    """The stage's losses and "total"."""
    if stage in ARMS:
        return losses.total(model(batch), ARMS[stage])
    if stage == "extractor":
        loss = losses.extraction(model.extractor(batch)[0], batch.labels, batch.sentences)
        return dict(extraction=loss, total=loss)
    written, there = model.abstracter(batch, None, coverage), batch.target != PAD
    found = dict(abstraction=losses.abstraction(written.log_prob, there))
    if coverage:
        found |= dict(coverage=losses.coverage(written.alphahat, there))
    return found | dict(total=sum(found.values()))


def selected_share(betas: Sequence[NDArray], labels: Sequence[Sequence[int]], recall: float = RECALL) -> float:
    """Share of all sentences with a beta at least as high as that which keeps this share of the labelled ones."""
    beta, label = np.concatenate(list(betas)), np.concatenate([np.asarray(one, dtype=bool) for one in labels])
    if beta.shape != label.shape or not label.any():
        raise ValueError(f"one beta per label, and some labels 1: got {len(beta)} betas, {len(label)} labels")
    positive = np.sort(beta[label])[::-1]
    return float((beta >= positive[int(np.ceil(recall * len(positive))) - 1]).mean())


@torch.no_grad()
def validate(stage: str, model: Unified, batches: list[Batch], autocast) -> dict[str, float]:
    """Losses on the validation set as "val_...", and selected_share where the stage has an extractor."""
    rows, betas, labels = [], [], []
    for batch in batches:
        with autocast():
            rows.append({f"val_{k}": float(v) for k, v in stage_losses(stage, model, batch).items() if k != "total"})
            if stage == "extractor" or stage in ARMS:
                beta = model.extractor(batch)[1].float().cpu().numpy()
                betas += [one[:n] for one, n in zip(beta, batch.sentences.tolist())]
                labels += [one[:n] for one, n in zip(batch.labels.cpu().numpy(), batch.sentences.tolist())]
    sizes = [len(batch.words) for batch in batches]
    found = {k: float(np.average([row[k] for row in rows], weights=sizes)) for k in rows[0]}
    return found | (dict(selected_share=selected_share(betas, labels)) if betas else {})


def _rate(config: Config, rate: float, step: int, steps: int) -> float:
    return rate if config.optimizer == "adagrad" else rate * min((step + 1) / 50, (steps - step) / steps * 1.25, 1)


def parts(stage: str, model: Unified) -> nn.Module:
    """What a stage trains."""
    return {"extractor": model.extractor}.get(stage, model if stage in ARMS else model.abstracter)


def begin(stage: str, config: Config, seed: int, weights: dict[str, dict[str, Tensor]]) -> tuple[Unified, list]:
    """The model before a stage and its trainable parameters by name. weights: of the stages before it."""
    torch.manual_seed(seed)
    model = Unified(config.sizes)
    if stage in ARMS:
        model.extractor.load_state_dict(weights["extractor"])
        model.abstracter.load_state_dict(weights["abstracter"])
        for name, parameter in model.named_parameters():
            if config.frozen and any(f".{table}" in name for table in TABLES):
                parameter.requires_grad_(False)
    return model, [p for p in parts(stage, model).parameters() if p.requires_grad]


def _save(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train_stage(
    stage: str,
    config: Config,
    known: Corpus,
    seed: int,
    folder: Path,
    device: torch.device = torch.device("cpu"),
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """Train a stage, or go on with it, and return the weights of what it trains. folder: the seed's.

    Raises FileNotFoundError where an arm lacks the stages before it, ValueError for a state of another configuration,
    FloatingPointError where the loss is not finite.
    """
    pick(dict.fromkeys(STAGES), stage, "stage")
    before = {name: finished(name, folder) for name in STAGES[:2]} if stage in ARMS else {}
    model, parameters = begin(stage, config, seed, before)
    model.to(device)
    part, todo = parts(stage, model), task(stage, config, known)
    optimizer = (
        torch.optim.Adam(parameters, todo.rate, betas=(0.9, 0.98))
        if config.optimizer == "adam"
        else torch.optim.Adagrad(parameters, todo.rate, initial_accumulator_value=0.1)
    )
    half = device.type == "cuda" and precision != "fp32"
    autocast = partial(torch.autocast, device.type, PRECISIONS[precision]) if half else nullcontext
    scaler = torch.amp.GradScaler(device.type, enabled=half and precision == "fp16")
    state = dict(step=0, seconds=0.0, log=[], best=None, done=False)
    path = folder / stage / "state.pt"
    made = json.dumps(
        dict(
            stage=stage,
            seed=seed,
            sizes=asdict(config.sizes),
            optimizer=config.optimizer,
            task=todo[2:],
            grow=config.grow,
            limits=limits(stage, config, todo.steps),
            frozen=config.frozen,
            documents=len(todo.train),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["made"] != made:
            raise ValueError(f"{path} is of another configuration; move {folder} away to start anew")
        part.load_state_dict(saved["weights"])
        if saved["state"]["done"]:
            return part.state_dict()
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        state = saved["state"]
    fixed = [
        on(data.collate(todo.validation[i : i + 32], known.vocabulary, **limits(stage, config, todo.steps)), device)
        for i in range(0, len(todo.validation), 32)
    ]

    sums, began, seconds = [], time.monotonic(), state["seconds"]
    stream = groups(todo.train, todo.batch, seed, state["step"])
    bar = tqdm(
        range(state["step"], todo.steps), f"seed {seed}, {stage}", todo.steps, initial=state["step"], mininterval=5
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _rate(config, todo.rate, step, todo.steps)
        batch = on(data.collate(next(stream), known.vocabulary, **limits(stage, config, step)), device)
        with autocast():
            found = stage_losses(stage, model, batch, step >= todo.coverage)
        optimizer.zero_grad()
        scaler.scale(found["total"]).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 2.0)
        scaler.step(optimizer)
        scaler.update()
        sums.append({name: loss.detach() for name, loss in found.items()})
        last, due = step + 1 == todo.steps, (step + 1) % -(-todo.steps // config.evaluations) == 0
        if (step + 1) % config.log and not due and not last:
            continue
        row = {name: float(torch.stack([one[name] for one in sums if name in one]).mean()) for name in sums[-1]}
        if not np.isfinite(row["total"]):
            raise FloatingPointError(f"{stage}, seed {seed}: the loss is {row['total']} at step {step + 1}")
        sums = []
        if due or last:
            row |= validate(stage, model, fixed, autocast)
            if stage == "extractor" and (state["best"] is None or row["selected_share"] < state["best"][0]):
                state["best"] = (row["selected_share"], {k: v.clone() for k, v in part.state_dict().items()})
        state |= dict(step=step + 1, seconds=seconds + time.monotonic() - began, done=last)
        state["log"].append(
            dict(
                seed=seed,
                stage=stage,
                step=step + 1,
                seconds=round(state["seconds"], 1),
                **{k: round(v, 4) for k, v in row.items()},
            )
        )
        if last and stage == "extractor":
            part.load_state_dict(state["best"][1])
        _save(
            path,
            dict(
                made=made,
                state=state,
                weights=part.state_dict(),
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
            ),
        )
        pd.DataFrame(state["log"]).to_csv(path.with_name("log.csv"), index=False)
        bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k in ("total", "val_abstraction", "selected_share")})
    return part.state_dict()


def finished(stage: str, folder: Path) -> dict[str, Tensor]:
    """The weights of a finished stage. Raises FileNotFoundError where it is not."""
    path = folder / stage / "state.pt"
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
    if not saved or not saved["state"]["done"]:
        raise FileNotFoundError(f"{path} is not there or not finished; train the stage {stage} of this seed first")
    return saved["weights"]


def export(config: Config, known: Corpus, seeds: Sequence[int], runs: Path, out: Path) -> None:
    """Write the checkpoints of the seeds to a folder in half precision, with vocabulary, configuration and log.

    two-stage-seed<s>: extractor and abstracter; an arm's file: what differs from that. Errors as for `finished`.
    """
    out.mkdir(parents=True, exist_ok=True)
    known.vocabulary.save(out / "vocabulary.txt")
    (out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    logs = []
    for seed in seeds:
        folder = runs / f"seed{seed}"
        both = {f"{name}.{k}": v for name in STAGES[:2] for k, v in finished(name, folder).items()}
        found = {
            "two-stage": both,
            "pointer-generator": {f"abstracter.{k}": v for k, v in finished("pointer-generator", folder).items()},
        }
        for arm in ARMS:
            found[arm] = {k: v for k, v in finished(arm, folder).items() if not torch.equal(v, both[k])}
        for name, weights in found.items():
            save_file({k: v.half().contiguous() for k, v in weights.items()}, out / f"{name}-seed{seed}.safetensors")
        logs += [pd.read_csv(folder / stage / "log.csv") for stage in STAGES]
    pd.concat(logs, ignore_index=True).to_csv(out / "log.csv", index=False)


class _Counted(TorchDispatchMode):
    """Counts the operators that run inside it: about as many kernels a GPU is given."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def estimate(config: str = "paper", device: str | None = None, precision: str = "bf16") -> pd.DataFrame:
    """How long each stage would take for one seed: stage, steps, batch, seconds of a step, hours, GPU hours.

    One step with articles and abstracts of full length is measured here, after one that warms up; without a GPU in
    seconds of one core, with two articles, and taken as proportional to the batch. GPU hours are then a guess: 10
    microseconds for each operator of a step, for such loops over words are bound by the launches of their kernels.
    """
    chosen, rng = pick(CONFIGS, config, "configuration"), random.Random(0)
    on_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = on_device.type == "cuda"
    autocast = partial(torch.autocast, on_device.type, PRECISIONS[precision]) if gpu else nullcontext
    long = max(1, chosen.words // chosen.sentences)
    words = [f"w{i}" for i in range(chosen.sizes.vocabulary - 4)]

    def document(count: int) -> Document:
        said = [rng.choices(words, k=long) for _ in range(count)]
        return Document(said, [rng.choices(words, k=chosen.target)], [rng.randrange(2) for _ in said])

    known, rows = Corpus([], [], Vocabulary(words)), []
    model = Unified(chosen.sizes).to(on_device)
    for stage in STAGES:
        todo, count = task(stage, chosen, known), chosen.sentences
        size = todo.batch if gpu else 2
        lengths = limits(stage, chosen, todo.steps)
        batch = on(data.collate([document(count) for _ in range(size)], known.vocabulary, **lengths), on_device)

        def once() -> None:
            with autocast():
                loss = stage_losses(stage, model, batch)["total"]
            loss.backward()
            loss.item()  # waits for the device

        with _Counted() as counted:
            once()
        clock = time.monotonic if gpu else time.process_time
        began = clock()
        once()
        seconds = clock() - began
        step = seconds * todo.batch / size
        rows.append(
            dict(
                stage=stage,
                steps=todo.steps,
                batch=todo.batch,
                step_s=step,
                hours=step * todo.steps / 3600,
                gpu_hours=(step if gpu else counted.count * 1e-5) * todo.steps / 3600,
            )
        )
    return pd.DataFrame(rows)


def train(
    config: str = "small",
    seeds: Sequence[int] = (0, 1, 2),
    stages: Sequence[str] = STAGES,
    out: Path | None = None,
    runs: Path = RUNS,
    device: str | None = None,
    precision: str = "bf16",
    data: str | None = None,
    validation: str | None = None,
) -> pd.DataFrame:
    """All stages of all seeds; returns their log. out: where checkpoints go when all stages of the seeds are there.

    Raises RuntimeError while another process trains a stage of the same folder; other errors as for `corpus` and
    `train_stage`.
    """
    chosen = pick(CONFIGS, config, "configuration")
    known = corpus(chosen, data, validation)
    # few documents may have fewer words; IDs beyond the vocabulary must be beyond the model's, too
    chosen = replace(chosen, sizes=replace(chosen.sizes, vocabulary=len(known.vocabulary)))
    on_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    logs = []
    for seed in seeds:
        folder = runs / config / f"seed{seed}"
        for stage in stages:
            with results.locked(folder / stage):
                train_stage(stage, chosen, known, seed, folder, on_device, precision)
            logs.append(pd.read_csv(folder / stage / "log.csv"))
    if out is not None:
        export(chosen, known, seeds, runs / config, out)
    return pd.concat(logs, ignore_index=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.summarization.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", choices=CONFIGS, default="small", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        metavar="STAGE",
        help=f"of {', '.join(STAGES)}; default: all",
    )
    parser.add_argument("--data", help="training documents, .bin or .jsonl, or a pattern; default: generated news")
    parser.add_argument("--validation", help="validation documents in the same form")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where state and logs are kept; default: %(default)s")
    parser.add_argument("--out", type=Path, help="write checkpoints there when all stages of the seeds are finished")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bf16", help="autocast on a GPU; default: %(default)s"
    )
    parser.add_argument("--estimate", action="store_true", help="train nothing: say how long each stage would take")
    args = vars(parser.parse_args(argv))
    if args.pop("estimate"):
        found = estimate(args["config"], args["device"], args["precision"])
        print(found.round(2).to_string(index=False))
        print(
            f"one seed: {found['hours'].sum():.1f} hours of this device (of one core, where it is a CPU), about "
            f"{found['gpu_hours'].sum():.1f} hours of a GPU"
        )
    else:
        train(**args)


if __name__ == "__main__":
    main()
