"""Images x cells -> rows. Each image is encoded once for all cells, each selection made once for all orders and IDs
(and once for all expressions of the image, unless the method reads the expression).

The piece of work is one cell on one chunk of images. Its batches hold nothing else, so its rows depend neither on
which other cells run, nor on where a killed run was taken up again, nor on how the pieces are dealt out to shards.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from analysis import keys, results
from analysis.engine import stages
from analysis.engine.decode import continued, draft_from
from analysis.models import Model
from analysis.models.by_generate import ByGenerate
from analysis.positions import ORDERS, assign, by_layer, parse_spec, reads_truth, reorder
from analysis.pruning import Pruner, all_pruners
from analysis.pruning import pruner as find_pruner
from analysis.pruning.images import staged_images
from analysis.rec.boxes import BOX_FORMATS, frame
from analysis.rec.pictures import read_picture
from analysis.rec.scoring import check_boxes, score, score_words
from analysis.types import Cell, RecDataset, Selection, Signals, Stage, Truth, VisualTokens

_KEY = ["image_id", "ref_id", "sent_id"]
EXPRESSION = [*_KEY, "expression", "width", "height", "x1", "y1", "x2", "y2"]
OTHER = ["ox1", "oy1", "ox2", "oy2"]  # of another object, in data that have it
QUESTION = [*_KEY, "expression", "width", "height", "task", "answer"]  # of data whose answers are words


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def cells(
    pruner: Any = "none", keep: Any = None, order: Any = "method", ids: Any = "compact", seeds: Any = 0
) -> list[Cell]:
    """The grid: every combination of the arguments, each one value or a list. Pruner "none" has keep None, once;
    "all" stands for all others by name.

    Raises ValueError for an empty list, an unknown pruner, order or IDs, a keep that is no number in (0, 1] and a
    seed that is no integer >= 0.
    """
    given = dict(pruner=pruner, keep=keep, order=order, ids=ids, seeds=seeds)
    lists = {name: _listed(values) for name, values in given.items()}
    lists["pruner"] = [one for name in lists["pruner"] for one in (all_pruners() if name == "all" else [name])]
    if empty := [name for name, values in lists.items() if not values]:
        raise ValueError(f"no cells to evaluate: {', '.join(empty)} is an empty list")
    grid = [Cell(p, None if p == "none" else k, o, i, s) for p, k, o, i, s in product(*lists.values())]
    check_cells(grid)
    return list(dict.fromkeys(grid))


def check_cells(grid: Sequence[Cell]) -> None:
    """Raises ValueError on the first cell that no model could run; see `cells`."""
    if not grid:
        raise ValueError("no cells to evaluate; `cells` builds a grid")
    for cell in grid:
        find_pruner(cell.pruner)
        parse_spec(cell.order, ORDERS)
        by_layer(cell.ids)
        number = isinstance(cell.keep, int | float) and not isinstance(cell.keep, bool)
        if cell.keep is not None and not (number and 0 < cell.keep <= 1):
            raise ValueError(f"keep ratio must be in (0, 1], got {cell.keep!r}; give a share such as 0.25")
        if not isinstance(cell.seed, int) or isinstance(cell.seed, bool) or cell.seed < 0:
            raise ValueError(f"a seed must be an integer >= 0, got {cell.seed!r}")


def _columns(rows: pd.DataFrame) -> list[str]:
    return QUESTION if "answer" in rows else EXPRESSION + [name for name in OTHER if name in rows]


def _check_data(dataset: RecDataset) -> None:
    what = f"{dataset.name} {dataset.split}"
    if dataset.rows.empty:
        raise ValueError(f"{what} holds no expressions; check the split and the limit")
    if absent := [c for c in _columns(dataset.rows) if c not in dataset.rows]:
        raise ValueError(f"{what} lacks the columns {', '.join(absent)}")
    if repeated := dataset.rows.duplicated(_KEY).sum():
        raise ValueError(f"{what} repeats {repeated} expressions; {', '.join(_KEY)} must be unique")
    if "answer" not in dataset.rows:
        check_boxes(dataset.rows)
        if set(OTHER) <= set(dataset.rows):
            check_boxes(dataset.rows.assign(**{name[1:]: dataset.rows[name] for name in OTHER}))


def image_seed(seed: int, image_id: Any) -> int:
    """The seed of one image in one cell: the same on every machine and however the images are batched."""
    return zlib.crc32(f"{seed}:{image_id}".encode())


def _readable(model: Model, dataset: RecDataset, rows: pd.DataFrame) -> tuple[dict[Any, Image.Image], dict[Any, str]]:
    """The chunk's images by ID, and by ID what is wrong with the others."""
    images, errors = {}, {}
    once = rows[["image_id", "width", "height"]].drop_duplicates("image_id")
    for image_id, width, height in once.itertuples(index=False, name=None):
        try:
            image = read_picture(dataset.image(image_id))
            if image.size != (width, height):
                raise ValueError(f"image is {image.width} x {image.height}, its rows say {width} x {height}")
            model.layout(image.size)  # raises where the model cannot read an image of this shape
            images[image_id] = image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that PIL raises
            errors[image_id] = f"{type(error).__name__}: {error}"
    return images, errors


def _truths(model: Model, rows: pd.DataFrame) -> dict[Any, Truth]:
    """The ground truth of each row, by its index, as the model's tokens see it; {} of data without boxes."""
    if "answer" in rows:
        return {}
    encode, sizes = frame(model.token_frame).encode, rows[["width", "height"]].to_numpy()
    named = [columns for columns in (EXPRESSION[-4:], OTHER) if set(columns) <= set(rows)]
    boxes = [map(tuple, encode(rows[columns].to_numpy(), sizes).tolist()) for columns in named]
    return dict(zip(rows.index, map(Truth, *boxes)))


def _told(truths: Sequence[Truth], device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The signals of `types.Signals` that are ground truth, as thunks, for one expression an image."""
    known = [name for name in Truth._fields if truths and getattr(truths[0], name) is not None]
    return {name: lambda name=name: torch.tensor([getattr(one, name) for one in truths]).to(device) for name in known}


@dataclass
class RunState:
    """How a run goes.

    expressions, images: how many are answered and encoded together, fewer when memory runs out; draft: as `greedy`
    takes it; tokens, rows: how many have been generated and answered.
    """

    expressions: int
    images: int
    draft: Sequence[int] = ()
    tokens: int = 0
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of `evaluate`, checked and ready to work.

    by_text: for each pruner and keep ratio whether it selects anew for every expression; out: the file of all rows;
    facts: what can move a row besides its cell and the chunk it is in; pruners: the same of each pruner; pictures: a
    digest of each image, by ID; provenance: of the whole file.
    """

    model: Model | ByGenerate
    dataset: RecDataset
    grid: Sequence[Cell]
    by_text: dict[tuple[str, float | None], bool]
    out: Path
    facts: dict[str, Any]
    pruners: dict[str, dict[str, Any]]
    pictures: dict[Any, str]
    provenance: dict[str, Any]
    shard: str
    max_failed: float
    state: RunState
    bar: tqdm


def box_draft(model: Model) -> list[int]:
    """A `draft` of boxes: the tokens that all have in common in the model's box format.

    The same in every run, for what is tried ahead moves the last bit of a logit, and in 16 bits near ties with it.
    """
    size = np.array([1000, 1000])
    boxes = frame(model.frame).encode(1000 * np.random.default_rng(0).uniform(0.1, 0.99, (100, 4)), size)
    written = map(BOX_FORMATS[model.box_format].format, boxes)
    return draft_from([model.tokenizer.encode(text, add_special_tokens=False) for text in written])


def _out_of_memory(model: Model, size: int, what: str) -> int:
    """Half of `size`, with a word to the user. RuntimeError where one is already too many."""
    if size <= 1:
        raise RuntimeError(
            f"out of memory on {model.device} with a single {what.removesuffix('s')}; take a GPU with "
            "more memory or a smaller model"
        )
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    tqdm.write(f"out of memory on {model.device}: going on with {size // 2} {what} at a time")
    return size // 2


class Chosen(NamedTuple):
    """What a method chose on one chunk.

    made, image_ids: one for each image, or for each expression where the method reads it, as `staged_images` makes
    them; of_row: which of them a row, by its index, is answered from. Rows of broken images are not in it.
    """

    made: list[tuple[Selection, list[Stage]]]
    image_ids: list[Any]
    of_row: dict[Any, int]


def _choose(run: Run, encoded: Sequence[tuple[list, VisualTokens]], rows: pd.DataFrame, cell: Cell) -> Chosen:
    prune, chosen = find_pruner(cell.pruner), Chosen([], [], {})

    def add(visual: VisualTokens, image_ids: Sequence[Any]) -> None:
        seeds = [image_seed(cell.seed, image_id) for image_id in image_ids]
        chosen.made.extend(staged_images(prune, visual, cell.keep, seeds, len(run.model.decoder.layers)))
        chosen.image_ids.extend(image_ids)

    for image_ids, visual in encoded:
        here, start = rows[rows["image_id"].isin(image_ids)], len(chosen.made)
        if not run.by_text[cell.pruner, cell.keep]:
            add(visual, image_ids)
            chosen.of_row.update({row: start + image_ids.index(i) for row, i in here["image_id"].items()})
            continue
        for at in range(0, len(here), run.state.expressions):
            part = here.iloc[at : at + run.state.expressions]
            index = torch.tensor([image_ids.index(i) for i in part["image_id"]], device=visual.features.device)
            told = _told(list(_truths(run.model, part).values()), visual.features.device)
            add(visual.take(index, **run.model.texts(list(part["expression"])), **told), list(part["image_id"]))
        chosen.of_row.update(zip(here.index, range(start, len(chosen.made))))
    return chosen


def texts(model: Model, answers: Sequence[list[int] | None]) -> tuple[list[str], list[str]]:
    """The texts of `greedy`'s answers, "" where there is none, and why there is none."""
    return (
        ["" if answer is None else model.text(answer) for answer in answers],
        ["the model's logits are not numbers (NaN)" if answer is None else "" for answer in answers],
    )


def _table(
    run: Run,
    rows: pd.DataFrame,
    errors: dict[Any, str],
    cell: Cell,
    todo: Sequence[Any],
    answer: Callable[[list[Any]], dict[str, Any]],
) -> pd.DataFrame:
    """The finished rows of one cell on one chunk, answered in batches, which are halved where memory runs out.

    errors: as `_readable` gives them; todo: the rows to answer, by their index; answer: (some of them) -> their columns
    raw, tokens, tokens_full and layer_tokens, and error where an answer can fail.
    """
    model = run.model
    table = id_columns(model, run.dataset, rows, _columns(rows)).assign(
        raw="", dialect=model.box_format, frame=model.frame, **cell.columns(), tokens=np.nan, tokens_full=np.nan
    )
    table["layer_tokens"] = ""
    table["error"] = [errors.get(image_id, "") for image_id in rows["image_id"]]
    run.bar.update(len(rows) - len(todo))
    while todo:
        part = todo[: run.state.expressions]
        try:
            answered = answer(part)
        except torch.OutOfMemoryError:
            run.state.expressions = _out_of_memory(model, len(part), "expressions")
            continue
        table.loc[part, list(answered)] = pd.DataFrame(answered, index=part)
        todo = todo[len(part) :]
        run.bar.update(len(part))
    return table.astype({"keep": float}).reset_index(drop=True)


def _blank(model: Model, truths: Sequence[Truth] = ()) -> VisualTokens:
    """A blank image, to try on it what will be done to all others."""
    told = model.texts(["thing"]) | _told(truths, model.device)
    return model.encode([Image.new("RGB", (8, 8))]).take(torch.tensor([0]), **told)


def needs_text(model: Model, prune: Pruner, keep: float | None, truths: Sequence[Truth] = ()) -> bool:
    """Whether a method selects anew for every expression: it is tried on a blank image, and what it asked for counts.

    truths: one, where the data have boxes. Raises what the method raises where it cannot run.
    """
    blank = _blank(model, truths)
    staged_images(prune, blank, keep, [0], len(model.decoder.layers))
    return bool(blank.signals.asked & Signals.OF_EXPRESSION)


def _encode(model: Model, images: dict[Any, Image.Image], state: RunState) -> Iterator[tuple[list, VisualTokens]]:
    """(IDs, tokens) of the images, in batches of one layout."""
    layouts: dict[Hashable, list] = {}
    for image_id, image in images.items():
        layouts.setdefault(model.layout(image.size), []).append(image_id)
    for todo in layouts.values():
        while todo:
            part = todo[: state.images]
            try:
                visual = model.encode([images[image_id] for image_id in part])
            except torch.OutOfMemoryError:
                state.images = _out_of_memory(model, len(part), "images")
                continue
            yield part, visual
            todo = todo[len(part) :]


def id_columns(model: Model, dataset: RecDataset, rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The columns that say what a row is of: model, dataset, split, and the expression's own."""
    given = dict(model=model.name, revision=model.revision, dataset=dataset.name, split=dataset.split)
    return pd.DataFrame(given, index=rows.index).join(rows[columns])


def _tables(
    run: Run,
    rows: pd.DataFrame,
    images: dict[Any, Image.Image],
    errors: dict[Any, str],
    missing: Sequence[Cell],
) -> Iterator[tuple[Cell, pd.DataFrame]]:
    """The finished rows of one chunk, cell by cell; images and errors as `_readable` gives them."""
    if isinstance(run.model, ByGenerate):
        yield from _tables_by_generate(run, rows, images, errors, missing)
        return
    model, encoded = run.model, list(_encode(run.model, images, run.state))
    unpruned = {image_id: visual.unpruned for image_ids, visual in encoded for image_id in image_ids}
    ask = model.ask if "answer" in rows else model.prompt
    prompts = {expression: ask(expression) for expression in rows["expression"].unique()}
    made: dict[tuple, Chosen] = {}
    for cell in missing:
        key = (cell.pruner, cell.keep, cell.seed)
        if key not in made:
            made[key] = _choose(run, encoded, rows, cell)
        chosen, image_ids, of_row = made[key]
        truths = _truths(model, rows) if reads_truth(cell.ids) else {}
        wanted = {row: (number, truths.get(row)) for row, number in of_row.items()}
        uses = {one: at for at, one in enumerate(dict.fromkeys(wanted.values()))}  # a selection, as one truth has it
        of_row = {row: uses[one] for row, one in wanted.items()}
        shown = []
        for number, truth in uses:
            (selection, drops), image_id = chosen[number], image_ids[number]
            seed = image_seed(cell.seed, image_id)
            # What is dropped inside the decoder is put in order there.
            first = selection if drops else reorder(selection, cell.order, seed)
            shown.append(stages.Shown(first, unpruned[image_id], seed, drops, truth))

        def answer(part: list[Any], cell=cell, shown=shown, of_row=of_row) -> dict[str, Any]:
            numbers, asked = [of_row[row] for row in part], [prompts[e] for e in rows["expression"][part]]
            *prefilled, read = stages.prefill(model, asked, shown, numbers, cell.ids, cell.order)
            tokens = continued(model, *prefilled, run.state.draft)
            run.state.tokens += sum(len(one) for one in tokens if one is not None)
            raw, error = texts(model, tokens)
            return dict(
                raw=raw,
                tokens=[stages.layer_mean(one, len(model.decoder.layers)) for one in read],
                tokens_full=[float(len(shown[number].unpruned.visual)) for number in numbers],
                layer_tokens=[stages.layer_text(one) for one in read],
                error=error,
            )

        # Batches of similar length; stable, so that the rows of an image stay together.
        todo = sorted(of_row, key=lambda row: len(shown[of_row[row]].selection.origin))
        yield cell, _table(run, rows, errors, cell, todo, answer)


def _tables_by_generate(
    run: Run,
    rows: pd.DataFrame,
    images: dict[Any, Image.Image],
    errors: dict[Any, str],
    missing: Sequence[Cell],
) -> Iterator[tuple[Cell, pd.DataFrame]]:
    """As `_tables`, for a model that the engine cannot run: every expression goes through `generate` with its image."""
    model, message = run.model, run.model.ask_for if "answer" in rows else run.model.rec
    for cell in missing:

        def answer(part: list[Any], cell=cell) -> dict[str, Any]:
            image_ids = rows["image_id"][part]
            seeds, shown = [image_seed(cell.seed, i) for i in image_ids], [images[i] for i in image_ids]
            said, done = model.answer(shown, list(rows["expression"][part]), message, cell, seeds)
            return dict(
                raw=said,
                tokens=np.array(done.kept, float),
                tokens_full=np.array(done.full, float),
                layer_tokens=[stages.layer_text(one) for one in done.read],
            )

        todo = [row for row, image_id in rows["image_id"].items() if image_id in images]
        yield cell, _table(run, rows, errors, cell, todo, answer)


def _device(model: Model) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type


def _check_model(
    model: Model | ByGenerate, grid: Sequence[Cell], rows: pd.DataFrame
) -> dict[tuple[str, float | None], bool]:
    """For each pruner and keep ratio of the grid, `needs_text`. Raises ValueError where one, or IDs, cannot run."""
    if isinstance(model, ByGenerate):
        for cell in grid:
            model.check(cell)
        return {}
    by_text, truths = {}, list(_truths(model, rows.head(1)).values())
    for pruner, keep in dict.fromkeys((c.pruner, c.keep) for c in grid):
        try:
            by_text[pruner, keep] = needs_text(model, find_pruner(pruner), keep, truths)
        except (ValueError, AttributeError, OSError) as error:
            raise ValueError(f"pruner {pruner!r} cannot run on {model.name} with keep {keep}: {error}") from error
    unpruned = _blank(model).unpruned
    for ids in dict.fromkeys(c.ids for c in grid):
        try:
            for layer, one in by_layer(ids):
                assign(torch.zeros(1, dtype=torch.int64, device=unpruned.visual.device), unpruned, one, 0, *truths)
                if layer >= (depth := len(model.decoder.layers)):
                    raise ValueError(f"the decoder has the layers 0 to {depth - 1}")
        except ValueError as error:
            raise ValueError(f"IDs {ids!r} cannot be given on {model.name}: {error}") from error
    return by_text


def evaluate(
    model: Model | ByGenerate,
    dataset: RecDataset,
    grid: Sequence[Cell],
    out: str | Path,
    *,
    batch_size: int = 32,
    chunk: int = 25,
    shard: str = "1/1",
    max_failed: float = 0.05,
    progress: bool = True,
) -> pd.DataFrame:
    """Answer every expression in every cell; write the rows to `out` (Parquet) and return them, cell by cell.

    batch_size: expressions answered together; chunk: images encoded together; both are halved where memory runs out. A
    killed run goes on where it stopped, and a finished one is read back, if nothing has changed that could move a row:
    `analysis.keys` says what that is. Pieces of work with failed rows are tried anew. "{key}" in the name of `out`
    stands for the key of all rows, so that whatever could move one gives another file.
    shard: "2/5" does the second of five shares of the work, on any machine and in any order, and writes its rows to
    `results.shard_path(out, "2/5")`; `results.merge_shards` makes of all five the file of one run, to the byte.
    Expressions of an unreadable image have raw "", tokens NaN and the reason in the column "error", those whose logits
    are not numbers raw "" and that reason. max_failed: share of all rows that may fail so; beyond it the run stops.
    Everything is checked before work starts: ValueError for bad cells, for data that are empty, incomplete,
    repeated or impossible, for a pruner that cannot run on this model or with this keep ratio, and for a shard that is
    none or more than there are pieces of work.
    ValueError also where `out` holds rows of another key, and RuntimeError beyond `max_failed`, when one expression
    alone needs more memory than there is, and while another process works on the same `out`.
    """
    out, grid = Path(out), list(dict.fromkeys(grid))
    check_cells(grid)
    _check_data(dataset)
    for name, size in (("batch_size", batch_size), ("chunk", chunk)):
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    pieces = len(grid) * len(_blocks(dataset.rows["image_id"].unique(), chunk))
    if results.parse_shard(shard)[1] > pieces:
        raise ValueError(
            f"shard {shard} of {pieces} pieces of work, each one cell on up to {chunk} images; there can "
            f"be no more than {pieces} shards"
        )
    by_text = _check_model(model, grid, dataset.rows)
    about = _about_rows(model, dataset, grid, batch_size, chunk, any(by_text.values()))
    out, about["provenance"] = _share(out, about["provenance"], shard)
    worded = "answer" in dataset.rows or isinstance(model, ByGenerate)
    state, start = RunState(batch_size, chunk, () if worded else box_draft(model)), time.monotonic()
    with results.locked(out):
        if results.made_before(out, about["provenance"]):
            return results.read_back(out)
        with tqdm(unit=" expressions", disable=not progress) as bar:
            run = Run(
                model=model,
                dataset=dataset,
                grid=grid,
                by_text=by_text,
                out=out,
                shard=shard,
                max_failed=max_failed,
                state=state,
                bar=bar,
                **about,
            )
            rows = _run(run)
    print(_summary(model, out, rows, state, time.monotonic() - start))
    return rows


def _about_rows(
    model: Model | ByGenerate, dataset: RecDataset, grid: Sequence[Cell], batch_size: int, chunk: int, texts: bool
) -> dict[str, Any]:
    """The fields facts, pruners, pictures and provenance of a `Run`. texts: whether the model's CLIP reads words.

    Raises RuntimeError where the code that would answer has changed since this process began.
    """
    image_ids = list(dataset.rows["image_id"].unique())
    pictures = dict(zip(image_ids, keys.pictures(dataset, image_ids), strict=True))
    pruners = {spec: keys.pruner(spec, find_pruner(spec)) for spec in sorted({cell.pruner for cell in grid})}
    facts = keys.model_facts(model, _device(model)) | {
        "dataset": dataset.name,
        "split": dataset.split,
        "batch_size": batch_size,
        "chunk": chunk,
        **keys.versions(),
    }
    keys.check_unchanged([*facts["code"], *(module for digests in pruners.values() for module in digests)])
    whole = keys.environment() | facts
    whole |= {
        "images": len(image_ids),
        "expressions": len(dataset.rows),
        "data": _data_key(dataset.rows),
        "pictures": keys.fingerprint(list(pictures.values())),
        "cells": [cell.columns() for cell in grid],
        "pruners": pruners,
        "clip": model.clip_files if texts else {},
    }
    whole["fingerprint"] = keys.fingerprint({name: whole[name] for name in whole.keys() - keys.NOT_KEY})
    return dict(facts=facts, pruners=pruners, pictures=pictures, provenance=whole)


def _share(out: Path, whole: dict[str, Any], shard: str) -> tuple[Path, dict[str, Any]]:
    """The file and the provenance of one shard's rows. out: of all rows, with "{key}" for their key; whole: of all."""
    out = out.with_name(out.name.replace("{key}", whole["fingerprint"]))
    if results.parse_shard(shard)[1] > 1:
        results.claim(out, whole)
        key = keys.fingerprint([whole["fingerprint"], shard])
        whole = whole | {"shard": shard, "whole": whole["fingerprint"], "fingerprint": key}
    return results.shard_path(out, shard), whole


def _data_key(rows: pd.DataFrame) -> str:
    return keys.fingerprint(rows[_columns(rows)].to_json(orient="split", index=False))


def _blocks(image_ids: Sequence[Any], chunk: int) -> list[list[Sequence[Any]]]:
    """The images in chunks, and these in blocks: a piece of work is a cell on a block.

    Up to 64 chunks each is a block; more make larger blocks, of 8 chunks at most, so that a large run has fewer parts.
    """
    chunks = [image_ids[i : i + chunk] for i in range(0, len(image_ids), chunk)]
    size = min(8, -(-len(chunks) // 64))
    return [chunks[i : i + size] for i in range(0, len(chunks), max(1, size))]


def _summary(model: Model, out: Path, rows: pd.DataFrame, state: RunState, seconds: float) -> str:
    """What a run has done, in a few lines; reasons of failure are counted."""
    invalid = (score_words if "answer" in rows else score)(rows[rows["error"] == ""])["invalid"].sum()
    lines = [
        f"{out.name}: {len(rows)} rows, {rows['image_id'].nunique()} images, {invalid} answers that are none, "
        f"{state.rows} of them answered now in {seconds:.1f} s, {state.rows / max(seconds, 1e-3):.0f} expressions/s, "
        f"{state.tokens / max(seconds, 1e-3):.0f} tokens/s generated"
    ]
    if model.device.type == "cuda":
        lines[0] += f", peak memory {torch.cuda.max_memory_allocated(model.device) / 1e9:.1f} GB"
    failed = rows.loc[rows["error"] != "", "error"]
    lines += [f"failed: {count} rows: {reason}" for reason, count in failed.value_counts().head(5).items()]
    return "\n".join(lines)


def _part(run: Run, number: int, rows: pd.DataFrame, cell: Cell) -> tuple[Path, str]:
    """The file of a piece of work, and its key: all that can move its rows."""
    spec = cell.pruner
    key = keys.fingerprint(
        [
            run.facts,
            cell.columns(),
            run.pruners[spec],
            run.model.clip_files if run.by_text.get((spec, cell.keep)) else {},
            _data_key(rows),
            [run.pictures[image_id] for image_id in rows["image_id"].unique()],
        ]
    )
    return results.parts_folder(run.out) / f"{number:05d}-{key}.parquet", key


def _run(run: Run) -> pd.DataFrame:
    """Work off the shard's pieces that have no part yet, or one with failed rows, then merge them, cell by cell."""
    data, grid, bar = run.dataset.rows.reset_index(drop=True), run.grid, run.bar
    blocks = [
        [data[data["image_id"].isin(chunk)] for chunk in block]
        for block in _blocks(data["image_id"].unique(), run.state.images)
    ]
    pieces, (share, of) = list(product(range(len(blocks)), grid)), results.parse_shard(run.shard)
    mine = pieces[len(pieces) * (share - 1) // of : len(pieces) * share // of]
    sizes = [sum(map(len, block)) for block in blocks]
    parts = {piece: _part(run, piece[0], pd.concat(blocks[piece[0]]), piece[1]) for piece in mine}
    todo = [piece for piece in mine if results.finished(*parts[piece]) != 0]  # absent, or with failed rows
    results.check_progress(run.out, len(mine) - len(todo))
    bar.reset(total=sum(sizes[number] for number, _ in mine))
    bar.n = bar.initial = bar.total - sum(sizes[number] for number, _ in todo)  # not counted in speed and time left

    failed, reason, place, reading = 0, "", 0, {}
    order = [(number, chunk) for number in dict.fromkeys(n for n, _ in todo) for chunk in range(len(blocks[number]))]
    with ThreadPoolExecutor(1) as reader:

        def read_ahead(place: int) -> tuple:
            """What a chunk's images are; the next chunk's are read while the model has these."""
            for number, chunk in order[place : place + 2]:
                if (number, chunk) not in reading:
                    reading[number, chunk] = reader.submit(_readable, run.model, run.dataset, blocks[number][chunk])
            return reading.pop(order[place]).result()

        for number, pieces_here in groupby(todo, key=itemgetter(0)):
            cells_here = [cell for _, cell in pieces_here]
            tables = {cell: [] for cell in cells_here}
            for rows in blocks[number]:
                for cell, table in _tables(run, rows, *read_ahead(place), cells_here):
                    tables[cell].append(table)
                    run.state.rows += len(table)
                    if len(tables[cell]) == len(blocks[number]):
                        path, key = parts[number, cell]
                        whole = pd.concat(tables.pop(cell), ignore_index=True)
                        results.write_rows(path, whole, {"fingerprint": key, "of": _about(run)})
                        failed += (whole["error"] != "").sum()
                        reason = max(whole["error"], default="") or reason
                place += 1
            if failed > run.max_failed * bar.total:
                raise RuntimeError(
                    f"{failed} of {bar.total} rows have failed, more than the share max_failed={run.max_failed}; one "
                    f"reason: {reason}. The rows so far are kept: mend the cause, or give a larger max_failed, and run "
                    "again, which tries those that failed anew"
                )
    mine.sort(key=lambda piece: grid.index(piece[1]))  # stable: the blocks of a cell stay in order
    files = [parts[piece][0] for piece in mine]
    rows = results.merge(run.out, files, run.provenance | {"failed": int(failed)})
    if not failed:  # otherwise they are what the next run goes on from
        results.remove_parts(run.out, files)
    return rows


def _about(run: Run) -> dict[str, Any]:
    """What a part says of its run, for `python -m analysis clean`."""
    return {name: run.provenance[name] for name in ("model", "dataset", "split", "images", "batch_size", "commit")}
