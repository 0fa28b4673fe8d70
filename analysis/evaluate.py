"""Images x cells -> rows. Each image is encoded once for all cells, each selection made once for all orders and IDs
(and once for all expressions of the image, unless the method reads the expression).

The piece of work is one cell on one chunk of images. Its batches hold nothing else, so its rows depend neither on
which other cells run nor on where a killed run was taken up again.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Hashable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from analysis import results
from analysis.decode import begin, greedy
from analysis.models import Model
from analysis.positions import ORDERS, Ids, assign, layout, parse_spec, reorder
from analysis.pruning import Pruner, select
from analysis.pruning import pruner as find_pruner
from analysis.rec.scoring import check_boxes
from analysis.types import Cell, Selection, Signals, VisualTokens

_KEY = ["image_id", "ref_id", "sent_id"]
EXPRESSION = [*_KEY, "expression", "width", "height", "x1", "y1", "x2", "y2"]
QUESTION = [*_KEY, "expression", "width", "height", "task", "answer"]  # of data whose answers are words


class RecDataset(Protocol):
    """What is evaluated: one row per expression with the columns `EXPRESSION`, and the images by their ID.

    Rows with a column "answer" are questions instead, with the columns `QUESTION`.
    """

    name: str
    split: str
    rows: pd.DataFrame

    def image(self, image_id: Any) -> Image.Image: ...


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def cells(
    pruner: Any = "none", keep: Any = None, order: Any = "method", ids: Any = "compact", seeds: Any = 0
) -> list[Cell]:
    """The grid: every combination of the arguments, each one value or a list. Pruner "none" has keep None, once.

    Raises ValueError for an empty list, an unknown pruner, order or IDs, a keep that is no number in (0, 1] and a
    seed that is no integer >= 0.
    """
    given = dict(pruner=pruner, keep=keep, order=order, ids=ids, seeds=seeds)
    lists = {name: _listed(values) for name, values in given.items()}
    if empty := [name for name, values in lists.items() if not values]:
        raise ValueError(f"no cells to evaluate: {', '.join(empty)} is an empty list")
    grid = [Cell(p, None if p == "none" else k, o, i, s) for p, k, o, i, s in product(*lists.values())]
    check(grid)
    return list(dict.fromkeys(grid))


def check(grid: Sequence[Cell]) -> None:
    """Raises ValueError on the first cell that no model could run; see `cells`."""
    if not grid:
        raise ValueError("no cells to evaluate; `cells` builds a grid")
    for cell in grid:
        find_pruner(cell.pruner)
        parse_spec(cell.order, ORDERS)
        parse_spec(cell.ids)
        if cell.keep is not None and not (isinstance(cell.keep, int | float) and 0 < cell.keep <= 1):
            raise ValueError(f"keep ratio must be in (0, 1], got {cell.keep!r}; give a share such as 0.25")
        if not isinstance(cell.seed, int) or cell.seed < 0:
            raise ValueError(f"a seed must be an integer >= 0, got {cell.seed!r}")


def _columns(rows: pd.DataFrame) -> list[str]:
    return QUESTION if "answer" in rows else EXPRESSION


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


def image_seed(seed: int, image_id: Any) -> int:
    """The seed of one image in one cell: the same on every machine and however the images are batched."""
    return zlib.crc32(f"{seed}:{image_id}".encode())


def _readable(model: Model, dataset: RecDataset, rows: pd.DataFrame) -> tuple[dict[Any, Image.Image], dict[Any, str]]:
    """The chunk's images by ID, and by ID what is wrong with the others."""
    images, errors = {}, {}
    once = rows[["image_id", "width", "height"]].drop_duplicates("image_id")
    for image_id, width, height in once.itertuples(index=False, name=None):
        try:
            image = dataset.image(image_id).convert("RGB")
            if image.size != (width, height):
                raise ValueError(f"image is {image.width} x {image.height}, its rows say {width} x {height}")
            model.layout(image.size)  # raises where the model cannot read an image of this shape
            images[image_id] = image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that PIL raises
            errors[image_id] = f"{type(error).__name__}: {error}"
    return images, errors


def _place(selection: Selection, n: int, cell: Cell, seed: int) -> tuple[Tensor, Ids]:
    """One image's tokens [K, D] in the cell's order, and the cell's IDs."""
    selection = reorder(selection, cell.order, seed)
    return selection.features, assign(selection.origin, n, cell.ids, seed)


def _out_of_memory(model: Model, size: int, what: str) -> int:
    """Half of `size`, with a word to the user. RuntimeError where one is already too many."""
    if size <= 1:
        raise RuntimeError(f"out of memory on {model.device} with a single {what.removesuffix('s')}; take a GPU with "
                           "more memory or a smaller model")
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    tqdm.write(f"out of memory on {model.device}: going on with {size // 2} {what} at a time")
    return size // 2


@torch.inference_mode()
def _answer(
    model: Model, placed: dict[Any, tuple[Tensor, Ids]], prompts: dict[Any, tuple[Tensor, Tensor]]
) -> list[list[int] | None]:
    """The tokens that answer one batch; arguments by row index. Rows that hold the same tuple share their prefill."""
    shared, owner, questions = {}, [], []
    for row, (features, ids) in placed.items():
        prefix, suffix = prompts[row]
        positions = layout(len(prefix), ids.visual, ids.text, len(suffix))
        before, after = positions.tensor_split([len(prefix) + len(features)])
        key = id(features), tuple(prefix.tolist())  # in some prompts the expression comes before the image
        if key not in shared:
            shared[key] = len(shared), torch.cat([model.embed(prefix), features]), before
        owner.append(shared[key][0])
        questions.append((model.embed(suffix), after))
    _, beginnings, their_ids = zip(*shared.values())
    context = begin(model.decoder, beginnings, their_ids, owner)
    return greedy(model.decoder, model.head, *zip(*questions), embed=model.embed, max_new_tokens=model.max_new_tokens,
                  eos=model.eos, context=context)


def _answers(
    model: Model, placed: dict[Any, tuple[Tensor, Ids]], prompts: dict[str, tuple[Tensor, Tensor]], rows: pd.DataFrame,
    sizes: dict[str, int], bar: tqdm,
) -> tuple[pd.Series, pd.Series]:
    """The model's text for each row, "" where there is none, and why there is none, in batches of similar length.

    placed: by row index; sizes: "expressions", how many are answered together, which falls when memory runs out.
    """
    raw, errors = (pd.Series("", index=rows.index) for _ in range(2))
    todo = sorted(placed, key=lambda row: len(placed[row][0]))  # stable: the rows of an image stay together
    while todo:
        part = todo[: sizes["expressions"]]
        try:
            tokens = _answer(model, {row: placed[row] for row in part},
                             {row: prompts[rows["expression"][row]] for row in part})
        except torch.OutOfMemoryError:
            sizes["expressions"] = _out_of_memory(model, len(part), "expressions")
            continue
        raw[part] = ["" if answer is None else model.text(answer) for answer in tokens]
        errors[part] = ["the model's logits are not numbers (NaN)" if answer is None else "" for answer in tokens]
        todo = todo[len(part) :]
        bar.update(len(part))
    bar.update(len(rows) - len(placed))
    return raw, errors


def needs_text(model: Model, prune: Pruner, keep: float | None) -> bool:
    """Whether a method selects anew for every expression: it is tried on a blank image, and what it asked for counts.

    Raises what the method raises where it cannot run.
    """
    blank = model.encode([Image.new("RGB", (8, 8))]).take(torch.tensor([0]), **model.texts(["thing"]))
    select(prune, blank, keep, [0])
    return bool(blank.signals.asked & Signals.TEXT)


def _encode(
    model: Model, images: dict[Any, Image.Image], sizes: dict[str, int]
) -> Iterator[tuple[list, VisualTokens]]:
    """(IDs, tokens) of the images, in batches of one layout. sizes: as for `_answers`, "images"."""
    layouts: dict[Hashable, list] = {}
    for image_id, image in images.items():
        layouts.setdefault(model.layout(image.size), []).append(image_id)
    for todo in layouts.values():
        while todo:
            part = todo[: sizes["images"]]
            try:
                visual = model.encode([images[image_id] for image_id in part])
            except torch.OutOfMemoryError:
                sizes["images"] = _out_of_memory(model, len(part), "images")
                continue
            yield part, visual
            todo = todo[len(part) :]


def _select(
    model: Model, visual: VisualTokens, image_ids: Sequence[Any], rows: pd.DataFrame, cell: Cell, by_text: bool,
    batch_size: int,
) -> dict[Any, Selection]:
    """A Selection for each row, by its index, where there is an image: one an image, or one an expression of it."""
    prune, place = find_pruner(cell.pruner), {image_id: i for i, image_id in enumerate(image_ids)}
    rows = rows[rows["image_id"].isin(place)]
    if not by_text:
        made = select(prune, visual, cell.keep, [image_seed(cell.seed, image_id) for image_id in image_ids])
        return {row: made[place[image_id]] for row, image_id in rows["image_id"].items()}
    made = {}
    for start in range(0, len(rows), batch_size):
        part = rows.iloc[start : start + batch_size]
        index = torch.tensor([place[image_id] for image_id in part["image_id"]], device=visual.features.device)
        pairs = visual.take(index, **model.texts(list(part["expression"])))
        seeds = [image_seed(cell.seed, image_id) for image_id in part["image_id"]]
        made |= zip(part.index, select(prune, pairs, cell.keep, seeds))
    return made


def _pieces(
    model: Model, dataset: RecDataset, rows: pd.DataFrame, missing: Sequence[Cell], by_text: dict[tuple, bool],
    sizes: dict[str, int], bar: tqdm,
) -> Iterator[tuple[Cell, pd.DataFrame]]:
    """The finished rows of one chunk, cell by cell."""
    images, errors = _readable(model, dataset, rows)
    encoded = list(_encode(model, images, sizes))
    lengths = {image_id: visual.length for image_ids, visual in encoded for image_id in image_ids}
    ask = model.ask if "answer" in rows else model.prompt
    prompts = {expression: ask(expression) for expression in rows["expression"].unique()}
    made: dict[tuple, dict[Any, Selection]] = {}
    for cell in missing:
        key = (cell.pruner, cell.keep, cell.seed)
        if key not in made:
            made[key] = {row: selection for image_ids, visual in encoded for row, selection in
                         _select(model, visual, image_ids, rows, cell, by_text[key[:2]], sizes["expressions"]).items()}
        once = {id(selection): (selection, rows["image_id"][row]) for row, selection in made[key].items()}
        done = {name: _place(selection, lengths[i], cell, image_seed(cell.seed, i))
                for name, (selection, i) in once.items()}
        placed = {row: done[id(selection)] for row, selection in made[key].items()}
        whose = dict(model=model.name, revision=model.revision, dataset=dataset.name, split=dataset.split)
        raw, failed = _answers(model, placed, prompts, rows, sizes, bar)
        answered = dict(
            raw=raw, dialect=model.dialect, frame=model.frame,
            **cell.columns(),
            tokens=[float(len(placed[row][0])) if row in placed else float("nan") for row in rows.index],
            tokens_full=[float(lengths.get(i, "nan")) for i in rows["image_id"]],
            error=[errors.get(i, "") for i in rows["image_id"]] + failed,
        )
        table = pd.DataFrame(whose, index=rows.index).join(rows[_columns(rows)]).assign(**answered)
        yield cell, table.astype({"keep": float}).reset_index(drop=True)


def _device(model: Model) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type


def evaluate(
    model: Model, dataset: RecDataset, grid: Sequence[Cell], out: str | Path, *,
    batch_size: int = 32, chunk: int = 25, max_failed: float = 0.05, progress: bool = True,
) -> pd.DataFrame:
    """Answer every expression in every cell; write the rows to `out` (Parquet) and return them, cell by cell.

    batch_size: expressions answered together; chunk: images encoded together; both are halved where memory runs out. A
    killed run goes on where it stopped, and a finished one is read back; delete
    `out` and `<out>.parts` after a change of code, which is not noticed, unlike one of model, data or settings.
    Expressions of an unreadable image have raw "", tokens NaN and the reason in the column "error", those whose logits
    are not numbers raw "" and that reason. max_failed: share of all rows that may fail so; beyond it the run stops.
    Everything is checked before work starts: ValueError for bad cells, for data that are empty, incomplete,
    repeated or impossible, and for a pruner that cannot run on this model or with this keep ratio.
    RuntimeError beyond `max_failed`, when one expression alone needs more memory than there is, and while another
    process works on the same `out`.
    """
    out, grid = Path(out), list(dict.fromkeys(grid))
    check(grid)
    _check_data(dataset)
    for name, size in (("batch_size", batch_size), ("chunk", chunk)):
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    by_text = {}
    for pruner, keep in dict.fromkeys((c.pruner, c.keep) for c in grid):
        try:
            by_text[pruner, keep] = needs_text(model, find_pruner(pruner), keep)
        except (ValueError, AttributeError, OSError) as error:
            raise ValueError(f"pruner {pruner!r} cannot run on {model.name} with keep {keep}: {error}") from error

    settings = {
        "model": model.name, "revision": model.revision, "dtype": str(model.dtype), "device": _device(model),
        "prompt": model.prompt_text("{}"), "max_new_tokens": model.max_new_tokens,
        "dataset": dataset.name, "split": dataset.split, "batch_size": batch_size, "chunk": chunk,
        "expressions": results.fingerprint(dataset.rows[_columns(dataset.rows)].to_json()), **results.environment(),
    }
    key = results.fingerprint({k: v for k, v in settings.items() if k != "commit"})
    whole = settings | {"cells": [cell.columns() for cell in grid]}
    whole["fingerprint"] = results.fingerprint([key, whole["cells"]])
    begun = time.monotonic()
    with results.alone(out):
        if (rows := results.finished(out, whole["fingerprint"])) is None:
            rows = _run(model, dataset, grid, by_text, out, key, whole, batch_size, chunk, max_failed, progress)
        results.remove_parts(out)
    print(_summary(model, out, rows, time.monotonic() - begun))
    return rows


def _summary(model: Model, out: Path, rows: pd.DataFrame, seconds: float) -> str:
    """What a run has done, in a few lines; reasons of failure are counted."""
    lines = [f"{out.name}: {len(rows)} rows, {rows['image_id'].nunique()} images, {seconds:.1f} s, "
             f"{len(rows) / max(seconds, 1e-3):.0f} expressions/s"]
    if model.device.type == "cuda":
        lines[0] += f", peak memory {torch.cuda.max_memory_allocated(model.device) / 1e9:.1f} GB"
    failed = rows.loc[rows["error"] != "", "error"]
    lines += [f"failed: {count} rows: {reason}" for reason, count in failed.value_counts().head(5).items()]
    return "\n".join(lines)


def _run(
    model: Model, dataset: RecDataset, grid: list[Cell], by_text: dict[tuple, bool], out: Path, key: str,
    provenance: dict, batch_size: int, chunk: int, max_failed: float, progress: bool,
) -> pd.DataFrame:
    """Work off the pieces that have no part yet, then merge."""
    data = dataset.rows.reset_index(drop=True)
    image_ids = data["image_id"].unique()
    chunks = [data[data["image_id"].isin(image_ids[i : i + chunk])] for i in range(0, len(image_ids), chunk)]

    def part(number: int, cell: Cell) -> Path:
        return results.parts_folder(out) / f"{number:05d}-{results.fingerprint(cell.columns())}.parquet"

    sizes, failed, reason = {"expressions": batch_size, "images": chunk}, 0, ""
    with tqdm(total=len(data) * len(grid), unit=" expressions", disable=not progress) as bar:
        for number, rows in enumerate(chunks):
            done = {cell: results.finished(part(number, cell), key) for cell in grid}
            missing = [cell for cell in grid if done[cell] is None]
            tables = [table for table in done.values() if table is not None]
            bar.update(sum(map(len, tables)))
            for cell, table in _pieces(model, dataset, rows, missing, by_text, sizes, bar) if missing else ():
                results.write_rows(part(number, cell), table, {"fingerprint": key})
                tables.append(table)
            errors = pd.concat(table["error"] for table in tables)
            failed, reason = failed + (errors != "").sum(), max(errors, default="") or reason
            if failed > max_failed * bar.total:
                raise RuntimeError(
                    f"{failed} of {bar.total} rows have failed, more than the share max_failed={max_failed}; one reason: "
                    f"{reason}. The rows so far are kept: mend the cause, or give a larger max_failed, and run again")
    return results.merge(out, [part(i, cell) for cell in grid for i in range(len(chunks))], provenance)
