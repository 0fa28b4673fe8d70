"""Does the damage of wrong IDs depend on how the testbed is built? Many small independent models, each trained anew.

    python -m analysis.training.testbed_design            # `make testbed-design`; goes on where it stopped

The frozen tower is the second edition's plain CLIP with learned absolute positions; its 16 x 16 tokens are averaged to
8 x 8, and the decoder has three layers instead of tiny-llava's five, so that a run takes 90 seconds of one core.
Scenes hold one object, so the question is where it is, not which one is meant. IDs are changed at test time only, on
scenes that no run was trained on. Three factors, fixed beforehand:

- features: what they say of position. "none" (the mean of each position is taken out), "learned" (as the tower gives
  them), "strong" (2-D sinusoids besides, as large as the features), with a linear probe's R^2 beside each;
- base: the rotary base, that of which one frequency pair repeats in every row of tokens, 500, or 10,000;
- training: on "all" tokens, or on a random 25 to 100 % of them in every step under "original" or "compact" IDs, at base
  10,000.

Steps and batch came from one pilot of the middle cell (learned, 10,000), on other scenes than those tested on. After 24
runs of 300 steps those with dropping were seen to be far from done, so the steps of all were doubled and all were made
anew. Every row is one run under one setting of `SETTINGS`, with n expressions and its hits (IoU >= 0.5). Rows of other
code than the present are refused, as everywhere; `--afresh` replaces them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, CLIPModel, LlamaModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from analysis import ROOT, keys
from analysis.engine.decode import greedy, prompt_inputs
from analysis.engine.evaluate import box_draft, image_seed
from analysis.models.base import ATTENTION
from analysis.models.llava import Llava
from analysis.positions import assign
from analysis.pruning import none, random
from analysis.rec.boxes import BOX_FORMATS, frame, hit
from analysis.refstamps.grammar import answer_box, groups
from analysis.refstamps.scenes import SECOND, Scene, scene
from analysis.results import locked, provenance, read_rows, write_rows
from analysis.training import contrast, loop
from analysis.training.design import GRID as FINE
from analysis.training.design import clip_config, text_config
from analysis.training.instruct import Blocks, PackedAttention, blocks, digit_tokens, fillers, losses
from analysis.training.probe import ridge_r2
from analysis.training.stream import HELD_OUT, SEEDS
from analysis.training.tokenizer import build as build_tokenizer
from analysis.types import Signals, VisualTokens

FOLDER = loop.RUNS / "testbed_design"
ROWS = ROOT / "papermill_runs" / "testbed_design" / "rows.parquet"
GRID = 8  # rows and columns of tokens, each the mean of 2 x 2 of the tower's
WIDTH, LAYERS = 128, 3
ROW_BASE = round((GRID / (2 * math.pi)) ** (32 / 2))  # the second pair of a head of 32 repeats every GRID tokens
FEATURES = ("none", "learned", "strong")
LEAST = 0.25  # of the tokens are kept in a training step with dropping, up to all
FILLED = 16  # words, at most, that are put in before the image in half of the steps
WARM_UP = 50  # steps
SETTINGS = [
    (None, "original"), (None, "shuffled"), (None, "shifted:6"), (None, "compressed:0.75"),
    *((keep, ids) for keep in (0.75, 0.5, 0.25) for ids in ("compact", "original")),
]  # fmt: skip


class Run(NamedTuple):
    """One model: what its features say of position, its rotary base, its training, its seed."""

    features: str
    base: int
    training: str
    seed: int


def design(seeds: int) -> list[Run]:
    """All runs, seed by seed, in blocks of one of each level of `FEATURES`: what a shorter time leaves is balanced."""
    blocks = [(10_000, "all"), (ROW_BASE, "all"), (10_000, "compact"), (10_000, "original"), (500, "all")]
    return [Run(features, *block, seed) for seed in range(seeds) for block in blocks for features in FEATURES]


# ---------------------------------------------------------------------------------------------------- scenes


def named(drawn: Scene) -> list[str]:
    """The names of a scene's only object: its noun, and colour and noun where the colour is beyond dispute."""
    return [name for name, _ in groups(drawn)]


@dataclass
class Pool:
    """Scenes as the models see and hear them.

    seen: [M, N, C] the tower's features, averaged to GRID x GRID, in half precision; told: of each scene its object's
    names, answer and box; size: of each its width and height.
    """

    seen: Tensor
    told: list[tuple[list[str], str, tuple[int, ...]]]
    size: list[tuple[int, int]]


def language_model(tokenizer, base: float = 10_000) -> Llava:
    """A random connector, decoder and head; prompts and boxes are LLaVA's, without the system's words."""
    config = text_config(len(tokenizer), WIDTH, LAYERS)
    config.rope_parameters["rope_theta"] = float(base)
    decoder = LlamaModel(config)
    return Llava(
        name="testbed", revision="", grid=(GRID, GRID), tower=None, tokenizer=tokenizer, layer=0, clip=None,
        connector=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)),
        decoder=decoder, head=nn.Linear(WIDTH, len(tokenizer), bias=False), embed=decoder.embed_tokens,
        image_token=tokenizer.convert_tokens_to_ids("<image>"), eos=tokenizer.eos_token_id, max_new_tokens=20,
        mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD, chat="USER: {} ASSISTANT:",
    )  # fmt: skip


@torch.no_grad()
def pool_of(start: int, count: int, tower: nn.Module) -> Pool:
    """Draw scenes and run the tower on them once."""
    seen, told, size, waiting = [], [], [], []
    for number in tqdm(range(count), desc="scenes", mininterval=10):
        drawn = scene("train", start + number, 1, SECOND)
        told.append((named(drawn), answer_box(drawn, 0), drawn.objects[0].box))
        size.append(drawn.size)
        waiting.append(contrast.padded(drawn))
        if len(waiting) == 50 or number == count - 1:
            with loop.autocast(torch.device("cpu")):
                states = tower(contrast.normalised(torch.stack(waiting)), output_hidden_states=True).hidden_states
            fine = states[-2][:, 1:].float().unflatten(1, (GRID, FINE // GRID, GRID, FINE // GRID))
            seen.append(fine.mean((2, 4)).flatten(1, 2).half())
            waiting = []
    return Pool(torch.cat(seen), told, size)


def pools(train: int, test: int, tokenizer, file: Path) -> tuple[Pool, Pool]:
    """Scenes to train on and scenes to test on, drawn and encoded once for all runs and kept in `file`."""
    if not file.exists():
        clip = CLIPModel(clip_config(len(tokenizer)))
        clip.load_state_dict({name: w.float() for name, w in load_file(loop.BEGUN / "tiny-clip.safetensors").items()})
        tower = clip.vision_model.eval()
        made = [pool_of(*which, tower) for which in ((9 * SEEDS, train), (HELD_OUT + 1_000_000, test))]
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save([vars(pool) for pool in made], file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return tuple(Pool(**pool) for pool in torch.load(file, weights_only=True))


def sinusoids() -> Tensor:
    """[N, C] fixed 2-D sinusoids as in MAE (arXiv:2111.06377): half of the channels for the row, half for the
    column."""
    rates = 10_000 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
    angles = torch.arange(GRID)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.cat([one[:, None].expand(-1, GRID, -1), one[None].expand(GRID, -1, -1)], 2).flatten(0, 1)


def positioned(seen: Tensor, features: str, reference: Tensor) -> Tensor:
    """[M, N, C] features that say of position what the factor's level says.

    none: without the mean of each position over `reference`, the training scenes, so that what adds up alike in all of
    them is gone; strong: with 2-D sinusoids of the features' own root mean square.
    """
    if features == "learned":
        return seen
    reference = reference.float()
    if features == "none":
        mean = reference.mean(0)
        return (seen.float() - mean + mean.mean(0)).half()
    extra = sinusoids()
    return (seen.float() + extra * (reference.pow(2).mean() / extra.pow(2).mean()).sqrt()).half()


def probed(train: Tensor, test: Tensor) -> tuple[float, float]:
    """R^2 of a ridge regression from single tokens to their row and column, scenes held out."""
    place = torch.arange(GRID**2)
    where = torch.stack([place // GRID, place % GRID], 1).float()
    r2 = ridge_r2(*(x.flatten(0, 1).float() for x in (train, test)), *(where.repeat(len(x), 1) for x in (train, test)))
    return round(float(r2[0]), 4), round(float(r2[1]), 4)


# ---------------------------------------------------------------------------------------------------- training


def written(pool: Pool, model: Llava) -> Blocks:
    """Tokenized questions with their answers [M, 2, L]: the object by its noun, and where it can be by colour and
    noun."""
    rows = []
    for names, answer, _ in pool.told:
        said = [*model.tokenizer.encode(answer, add_special_tokens=False), model.eos]
        rows += [(model.prompt(name)[1].tolist(), said) for name in (names[0], names[-1])]
    made = blocks(rows, max(len(question) + len(answer) for question, answer in rows))
    return Blocks(*(x.unflatten(0, (-1, 2)) for x in made))


def feed(run: Run, seen: Tensor, asked: Blocks, model: Llava, batch: int) -> Iterator[dict[str, Tensor]]:
    """Endless inputs of `instruct.losses`: one question on each of `batch` scenes."""
    rng, n = np.random.default_rng([29, run.seed]), GRID**2
    start = model.prompt("dog")[0]
    words = torch.tensor(fillers(model.tokenizer))
    while True:
        index = torch.from_numpy(rng.integers(len(seen), size=batch))
        filled = int(rng.integers(1, FILLED + 1)) if rng.random() < 0.5 else 0
        fill = words[torch.from_numpy(rng.integers(len(words), size=(batch, filled)))]
        prefix = torch.cat([start[:1].expand(batch, -1), fill, start[1:].expand(batch, -1)], 1)
        which = torch.from_numpy(rng.integers(2, size=(batch, 1)))
        kept = n if run.training == "all" else max(1, round(n * rng.uniform(LEAST, 1)))
        origin = torch.from_numpy(np.sort(np.argsort(rng.random((batch, n)), 1)[:, :kept], 1))
        ids = torch.arange(kept).expand(batch, -1) if run.training == "compact" else origin
        yield dict(
            seen=seen[index[:, None], origin], kind=torch.ones(batch, kept, dtype=torch.int8), place=ids[..., None],
            text_start=torch.full((batch,), kept if run.training == "compact" else n), prefix=prefix,
            before=torch.full((batch,), prefix.shape[1]), ids=asked.ids[index[:, None], which],
            asked=asked.asked[index[:, None], which], length=asked.length[index[:, None], which],
        )  # fmt: skip


def optimizers_of(model: Llava, whole: nn.Module, args) -> tuple[list, list[Tensor]]:
    """Muon for the blocks' and the connector's matrices, AdamW for the rest, each with its rate; and all weights.

    With AdamW alone the pilot needed 1.6 times as many steps of twice the scenes.
    """
    weights = list(whole.parameters())
    apart = {id(w) for w in (*model.embed.parameters(), *model.head.parameters())}
    inner = [w for w in weights if w.ndim == 2 and id(w) not in apart]
    rest = [w for w in weights if w.ndim != 2 or id(w) in apart]
    return [
        (torch.optim.Muon(inner, lr=args.muon, weight_decay=0.0), args.muon),
        (torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0), args.lr),
    ], weights


def trained(run: Run, seen: Tensor, asked: Blocks, tokenizer, args, watch=None) -> tuple[Llava, float]:
    """A model trained for `args.steps`, and its mean loss over the last tenth of them."""
    torch.manual_seed(run.seed)
    model = language_model(tokenizer, run.base)
    whole = nn.ModuleList([model.connector, model.decoder, model.head])
    attention = PackedAttention()
    AttentionInterface.register("packed", attention)
    model.decoder.set_attn_implementation("packed")
    digits = digit_tokens(tokenizer)
    optimizers, weights = optimizers_of(model, whole, args)
    lost = []
    bar = tqdm(range(args.steps), desc=" ".join(map(str, run)), mininterval=10)
    for number, inputs in zip(bar, feed(run, seen, asked, model, args.batch)):
        rise, fall = (number + 1) / WARM_UP, (1 + math.cos(math.pi * number / args.steps)) / 2
        whole.train()
        loss, numbers = losses(model, attention, digits, inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer, rate in optimizers:
            loop.set_rate(optimizer, rate * min(1.0, rise) * fall)
            optimizer.step()
            optimizer.zero_grad()
        lost.append(numbers["digit"].item())
        if number % 20 == 0:
            bar.set_postfix(digit=round(float(np.mean(lost[-20:])), 3))
        if watch:
            watch(number + 1, model, lost)
    return model, float(np.mean(lost[-max(1, args.steps // 10) :]))


# ---------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def hits(model: Llava, seen: Tensor, pool: Pool, keep: float | None, ids: str, seed: int) -> list[bool]:
    """Whether each object of each scene is found (IoU >= 0.5), asked by its shortest name."""
    model.decoder.eval()
    model.decoder.set_attn_implementation(ATTENTION["text_config"])
    found, draft = [], box_draft(model)
    for first in range(0, len(seen), 50):
        part = range(first, min(first + 50, len(seen)))
        patches = seen[first : first + 50].float()
        visual = VisualTokens(model.connector(patches), model.grid, Signals())
        seeds = [image_seed(seed, i) for i in part]
        selections = (random if keep else none).prune(visual, keep, seeds=seeds)
        prompts, truth = [], []
        for i, selection, own in zip(part, selections, seeds):
            places = assign(selection.origin, visual.unpruned, ids, own)
            names, _, box = pool.told[i]
            prompts.append(prompt_inputs(model.embed, model.prompt(names[0]), selection.features, places))
            truth.append((box, pool.size[i]))
        for answer, (box, size) in zip(greedy(model, [one.whole for one in prompts], draft=draft), truth):
            said = BOX_FORMATS[model.box_format].parse(model.text(answer or ()))
            found.append(said is not None and bool(
                hit(frame(model.frame).decode(said, np.array(size)), np.array(box, float))[1]))  # fmt: skip
    return found


def chance(pool: Pool) -> float:
    """Share of hits when each question is answered with the right box of another scene, in fractions of the square."""
    layout = frame(Llava.frame)
    boxes = [layout.encode(np.array(box, float), np.array(size)) for (_, _, box), size in zip(pool.told, pool.size)]
    right = hit(np.stack(boxes)[:, None], np.stack(boxes)[None])[1]
    return float((right.sum() - len(boxes)) / (len(boxes) * (len(boxes) - 1)))


def evaluated(run: Run, model: Llava, seen: Tensor, pool: Pool) -> list[dict]:
    """Hits of one run under every setting, with the number of expressions."""
    rows = []
    for keep, ids in SETTINGS:
        right = hits(model, seen, pool, keep, ids, run.seed)
        rows.append(dict(keep=1.0 if keep is None else keep, ids=ids, n=len(right), hits=sum(right)))
    return rows


# ---------------------------------------------------------------------------------------------------- all runs


def facts_of(args) -> dict[str, Any]:
    """What moves a run's rows besides what is in them: code, the tower's weights, sizes and rates, versions."""
    sizes = {name: getattr(args, name) for name in ("steps", "batch", "lr", "muon", "train", "test")}
    tower = keys.folder(loop.BEGUN, ("tiny-clip.safetensors",))
    return {"code": keys.code("analysis.training.testbed_design"), "tower": tower, **sizes, **keys.versions()}


def run_all(args, refuse: Callable[[str], None]) -> None:
    """Do the runs that the rows do not hold yet; `refuse` is told why rows cannot be gone on from."""
    made_by = facts_of(args)
    found = pd.DataFrame(columns=Run._fields)
    if args.rows.exists() and not args.afresh:
        if differing := keys.differences(provenance(args.rows), made_by):
            refuse(
                f"{args.rows} holds runs that were made otherwise ({'; '.join(differing)}): give other --rows, or "
                "--afresh to replace them"
            )
        found = read_rows(args.rows)
    tokenizer = build_tokenizer()
    train, test = pools(args.train, args.test, tokenizer, args.folder / f"scenes-{keys.fingerprint(made_by)}.pt")
    asked = written(train, language_model(tokenizer))
    done = set(found[list(Run._fields)].itertuples(index=False, name=None))
    todo = [run for run in design(args.seeds) if tuple(run) not in done][: args.only]
    levels = {run.features for run in todo}
    seen = {level: [positioned(pool.seen, level, train.seen) for pool in (train, test)] for level in levels}
    probes = {level: probed(a[:1000], b) for level, (a, b) in seen.items()}
    level, made = chance(test), keys.environment()
    for run in tqdm(todo, desc="runs"):
        began = time.process_time()
        model, loss = trained(run, seen[run.features][0], asked, tokenizer, args)
        facts = dict(
            loss=loss, chance=level, layers=LAYERS, probe_row=probes[run.features][0],
            probe_column=probes[run.features][1], steps=args.steps, batch=args.batch, scenes=args.train,
            seconds=time.process_time() - began, commit=made["commit"], dirty=made["dirty"],
        )  # fmt: skip
        rows = [run._asdict() | row | facts for row in evaluated(run, model, seen[run.features][1], test)]
        found = pd.concat([found, pd.DataFrame(rows)], ignore_index=True) if len(found) else pd.DataFrame(rows)
        write_rows(args.rows, found, made_by | {"commit": ", ".join(found["commit"].unique())})
        tqdm.write(f"{' '.join(map(str, run))}: {json.dumps(rows[0])}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=24, help="scenes a step, with a question on each")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW: embeddings, head, norms and biases")
    parser.add_argument("--muon", type=float, default=0.02, help="learning rate of Muon: all other matrices")
    parser.add_argument("--train", type=int, default=3000, help="scenes to train on")
    parser.add_argument("--test", type=int, default=300, help="scenes to test on")
    parser.add_argument("--only", type=int, help="do so many runs, then stop")
    parser.add_argument("--afresh", action="store_true", help="replace rows that are there")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args(argv)
    args.device = torch.device("cpu")
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    with locked(args.rows):
        run_all(args, parser.error)


if __name__ == "__main__":
    main()
