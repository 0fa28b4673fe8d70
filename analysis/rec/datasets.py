"""Data sets for referring-expression comprehension, each as one tidy frame and a way to get an image.

"refstamps", "refstamps+" and "refstampsg" (the embedded default, drawn from seeds) mirror RefCOCO, RefCOCO+ and
RefCOCOg: splits val, testA (people and animals), testB (things), for g val and test; "heldout" holds noun-by-location
pairs that training never shows. "refstamps-control" asks for colours, counts and presence on the scenes of "refstamps".
"refcoco", "refcoco+" and "refcocog" are those sets themselves: from files at hand, or downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import pandas as pd

from analysis.rec import refcoco
from analysis.registry import pick
from analysis.types import RecDataset

IMAGES = 1500  # images of a whole RefStamps split, as in RefCOCO val
SPLITS = {
    "refstamps": ("val", "testA", "testB", "heldout"),
    "refstamps+": ("val", "testA", "testB", "heldout"),
    "refstampsg": ("val", "test"),
    "refstamps-control": ("val", "testA", "testB"),
    **{name: tuple(splits) for name, splits in refcoco.COUNTS.items()},
}
# Sets that are drawn: module and function, called with (name, split, limit). By name, for what draws a set may need
# more than this package does, and reads this module.
DRAWN = {
    **dict.fromkeys(("refstamps", "refstamps+", "refstampsg"), "analysis.refstamps.dataset:refstamps"),
    "refstamps-control": "analysis.refstamps.dataset:refstamps_control",
}
HUB = {"refcoco": "RefCOCO", "refcoco+": "RefCOCOplus", "refcocog": "RefCOCOg"}  # names of lmms-lab's repositories
OWNERS = ("lmms-lab-encoder", "lmms-lab")  # where they lie since 2026, and where they lay before


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
    """The rows of a RefCOCO split from a file or folder in any form of `refcoco.read_annotations`, without its images.

    images: folder of COCO train2014, only for a form that does not say how large the images are. A warning says where
    the rows are not as many as the split has. Raises FileNotFoundError where the folder has no file for this split.
    """
    rows = refcoco.read_annotations(annotation_files(dataset, split, path), split, images=images)
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
        rows = refcoco.read_annotations(files, split)
        if split == "val" and dataset != "refcoco+":  # there, val holds 5000 objects of the Google split as well
            standard = _downloaded([f"jxu124/{HUB[dataset].lower()}"], "data/validation-*.parquet")
            rows = refcoco.unc_val(rows, refcoco.read_annotations(standard, split))
        rows = _counted(rows, dataset, split)
    else:
        files = annotation_files(dataset, split, path)
        rows = annotations(dataset, split, path, images)
    rows = rows[rows["image_id"].isin(rows["image_id"].unique()[:limit])].reset_index(drop=True)
    if not images and not refcoco.holds_images(files):
        raise ValueError(f"{files[0]} holds no images: give images=<folder of COCO train2014>; {refcoco.FETCH}")
    content = refcoco.folder_images(rows["file_name"], images) if images else refcoco.stored_images(files)
    return RecDataset(
        dataset,
        split,
        rows,
        lambda image_id: refcoco.picture(content, image_id),
        lambda image_id: sha256(content(image_id)).hexdigest()[:16],
    )


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
    module, _, function = DRAWN[dataset].partition(":")
    return getattr(import_module(module), function)(dataset, split, limit)
