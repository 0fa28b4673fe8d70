"""Data sets for referring-expression comprehension, each as one tidy frame and a way to get an image.

"refstamps", "refstamps+" and "refstampsg" (the embedded default, drawn from seeds) mirror RefCOCO, RefCOCO+ and
RefCOCOg: splits val, testA (people and animals), testB (things), for g val and test; "heldout" holds noun-by-location
pairs that training never shows. "refstamps-control" asks for colours, counts and presence on the scenes of "refstamps".
"refcoco", "refcoco+" and "refcocog" are those sets themselves: from files at hand, or downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd
from PIL import Image
from tqdm import tqdm

from analysis.rec import refcoco
from analysis.refstamps.grammar import control_questions, expressions
from analysis.refstamps.scenes import scene
from analysis.registry import pick

IMAGES = 1500  # images of a whole RefStamps split, as in RefCOCO val
SPLITS = {
    "refstamps": ("val", "testA", "testB", "heldout"),
    "refstamps+": ("val", "testA", "testB", "heldout"),
    "refstampsg": ("val", "test"),
    "refstamps-control": ("val", "testA", "testB"),
    **{name: tuple(splits) for name, splits in refcoco.COUNTS.items()},
}
HUB = {"refcoco": "RefCOCO", "refcoco+": "RefCOCOplus", "refcocog": "RefCOCOg"}  # names of lmms-lab's repositories
OWNERS = ("lmms-lab-encoder", "lmms-lab")  # where they lie since 2026, and where they lay before


@dataclass(frozen=True)
class RecDataset:
    """One split. rows: one per expression, with image_id, ref_id (the object), sent_id, expression, width, height and
    the ground truth x1, y1, x2, y2 in pixels of the original image; image(image_id) gives the RGB picture."""

    name: str
    split: str
    rows: pd.DataFrame
    image: Callable[[str], Image.Image]


@lru_cache(maxsize=64)
def stamp_image(split: str, index: int) -> Image.Image:
    return scene(split, index).image


def _drawn(name: str, split: str, rows: list[dict]) -> RecDataset:
    return RecDataset(name, split, pd.DataFrame(rows), lambda image_id: stamp_image(split, int(image_id.split("_")[1])))


def _common(split: str, index: int, what: int | str, sentence: int, text: str, size: tuple[int, int]) -> dict:
    """The columns that every row on a scene has; what: the object or the task that is asked about."""
    image_id = f"{split}_{index:05d}"
    return dict(
        image_id=image_id, ref_id=f"{image_id}_{what}", sent_id=sentence, expression=text, width=size[0], height=size[1]
    )


def refstamps(name: str, split: str, limit: int | None = None) -> RecDataset:
    """RefStamps drawn from its seeds: the first `limit` scenes of a split that have an expression of this set."""
    rows, taken, index = [], 0, 0
    bar = tqdm(total=limit or IMAGES, desc=f"{name} {split}", unit="image", leave=False)
    while taken < (limit or IMAGES):
        drawn = scene(split, index)
        said = expressions(drawn, name)
        for sentence, (text, target) in enumerate(said):
            box = drawn.objects[target].box
            rows.append(
                _common(split, index, target, sentence, text, drawn.size)
                | dict(zip(("x1", "y1", "x2", "y2"), map(float, box)))
            )
        taken += bool(said)
        bar.update(bool(said))
        index += 1
    bar.close()
    return _drawn(name, split, rows)


def refstamps_control(name: str, split: str, limit: int | None = None) -> RecDataset:
    """Questions on the first `limit` scenes that need no box: rows with task and answer, and no ground-truth box."""
    rows = []
    for index in tqdm(range(limit or IMAGES), desc=f"{name} {split}", unit="image", leave=False):
        drawn = scene(split, index)
        rows += [
            _common(split, index, task, sentence, question, drawn.size) | dict(task=task, answer=answer)
            for sentence, (task, question, answer) in enumerate(control_questions(drawn))
        ]
    return _drawn(name, split, rows)


def annotation_files(dataset: str, split: str, path: str | Path) -> list[Path]:
    """The file itself, or those of a folder that bear a name in use for this split.

    Raises FileNotFoundError, listing the names, where there is none.
    """
    path, by = Path(path), "umd" if dataset == "refcocog" else "unc"
    jxu124 = {"val": "validation", "testA": "test"}.get(split, split)
    names = [
        f"{dataset}_{split}.json",
        f"{dataset}_{split}.jsonl",
        f"REC_{dataset}_{by}_{split}.jsonl",
        f"refs({by}).p",
        f"{split}-*.parquet",
        f"{jxu124}-*.parquet",
    ]
    if path.is_file():
        return [path]
    for name in names:
        for folder in (path, path / dataset, path / "data"):
            if found := sorted(folder.glob(name)):
                return found
    raise FileNotFoundError(
        f"{path} holds no annotations of {dataset} {split}; known names there, in {dataset}/ and "
        f"in data/: {', '.join(names)}"
    )


def _counted(rows: pd.DataFrame, dataset: str, split: str) -> pd.DataFrame:
    try:
        refcoco.check_counts(rows, dataset, split)
    except ValueError as error:  # files with corrected or fewer expressions are worth evaluating, but not unnoticed
        warnings.warn(str(error), stacklevel=4)
    return rows


def annotations(dataset: str, split: str, path: str | Path, images: str | Path | None = None) -> pd.DataFrame:
    """The rows of a RefCOCO split from a file or a folder in any form of `refcoco.read`, without its images.

    images: folder of COCO train2014, only for a form that does not say how large the images are. A warning says where
    the rows are not as many as the split has. Raises FileNotFoundError where the folder has no file for this split.
    """
    rows = refcoco.read(annotation_files(dataset, split, path), split, images=images)
    return _counted(rows, dataset, split)


def _downloaded(repositories: Sequence[str], pattern: str) -> list[Path]:
    """The files of a data set on the Hugging Face hub, from the local cache where they are there.

    repositories: addresses of the same files, in the order in which they are tried.
    """
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    reasons = []
    for repository in repositories:
        try:
            folder = snapshot_download(repository, repo_type="dataset", allow_patterns=pattern)
            if files := sorted(Path(folder).glob(pattern)):
                return files
            reasons.append(f"{repository}: it has no {pattern}")
        except OSError as error:  # no network, no such repository, no room
            reasons.append(f"{repository}: {[*str(error).splitlines(), type(error).__name__][0]}")
    raise FileNotFoundError(
        f"no download ({'; '.join(reasons)}). With a network, run: hf download --repo-type dataset {repositories[0]} "
        f"--include '{pattern}'; or give annotations=<file or folder> and images=<COCO train2014>"
    )


def _refcoco(
    dataset: str,
    split: str,
    limit: int | None,
    path: str | Path | None,
    images: str | Path | None,
) -> RecDataset:
    if path is None:
        files = _downloaded([f"{owner}/{HUB[dataset]}" for owner in OWNERS], f"data/{split}-*.parquet")
        rows = refcoco.read(files, split)
        if split == "val" and dataset != "refcoco+":  # there, val holds 5000 objects of the Google split as well
            standard = _downloaded([f"jxu124/{HUB[dataset].lower()}"], "data/validation-*.parquet")
            rows = refcoco.unc_val(rows, refcoco.read(standard, split))
        rows = _counted(rows, dataset, split)
    else:
        files = annotation_files(dataset, split, path)
        rows = annotations(dataset, split, path, images)
    rows = rows[rows["image_id"].isin(rows["image_id"].unique()[:limit])].reset_index(drop=True)
    if not images and not refcoco.holds_images(files):
        raise ValueError(f"{files[0]} holds no images: give images=<folder of COCO train2014>; {refcoco.FETCH}")
    image = refcoco.folder_images(rows["file_name"], images) if images else refcoco.stored_images(files)
    return RecDataset(dataset, split, rows, lambda image_id: refcoco.rgb(image, image_id))


def load(
    dataset: str,
    split: str,
    limit: int | None = None,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
) -> RecDataset:
    """A data set by name; limit: number of images, the first of the split (None: all).

    The RefCOCO sets only: annotations, a file or folder (see `annotation_files`; None: downloaded with their images),
    and images, a folder with COCO train2014. Raises ValueError for an unknown data set or split, for a limit below one
    and for files in no known form; FileNotFoundError for missing files, saying how to get them.
    """
    splits = pick(SPLITS, dataset, "data set")
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r}; it has: {', '.join(splits)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is the number of images and must be at least 1, got {limit}")
    if dataset in refcoco.COUNTS:
        return _refcoco(dataset, split, limit, annotations, images)
    if annotations or images:
        raise ValueError(
            f"{dataset} is drawn from seeds and takes no annotations or images; these do: {', '.join(refcoco.COUNTS)}"
        )
    return (refstamps_control if dataset == "refstamps-control" else refstamps)(dataset, split, limit)
