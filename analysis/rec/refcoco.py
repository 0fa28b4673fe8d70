"""Readers of RefCOCO, RefCOCO+ and RefCOCOg: every form in which their annotations go around, as one tidy frame.

`read` tells the forms apart by what a file holds. Whatever the form, a row is one expression, boxes are x1, y1, x2, y2
in pixels of the original image, and file_name is COCO's. Nothing in a file is ever run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from analysis.rec.pictures import read_picture, upright_size
from analysis.rec.scoring import SIZE, TRUTH, check_boxes
from analysis.registry import pick

COLUMNS = ["image_id", "ref_id", "sent_id", "expression", *SIZE, *TRUTH, "file_name"]
SLACK = 2.0  # px by which a box may stick out of its image and is clipped; more is no rounding but an error
COUNTS = {  # expressions, objects, images of the splits called UNC (RefCOCO, RefCOCO+) and UMD (RefCOCOg)
    "refcoco": {"val": (10834, 3811, 1500), "testA": (5657, 1975, 750), "testB": (5095, 1810, 750)},
    "refcoco+": {"val": (10758, 3805, 1500), "testA": (5726, 1975, 750), "testB": (4889, 1798, 750)},
    "refcocog": {"val": (4896, 2573, 1300), "test": (9602, 5023, 2600)},
}
FETCH = "wget http://images.cocodataset.org/zips/train2014.zip && unzip train2014.zip (about 13 GB)"
_COCO = re.compile(r"(COCO_[a-z]+2014_\d{12})(?:_\d+)?(?:\.jpg)?")  # some forms append the object's number


class Form(NamedTuple):
    """keys: what a record must have to be of this form; order: its boxes', None if that has to be found out;
    row(record, instances) -> file_name, expression or a list of them, box, and ref_id, split, width, height if known.
    """

    keys: Sequence[str]
    order: str | None
    row: Callable[[dict, dict], dict]


def _jxu124(record: dict, _: dict) -> dict:
    """raw_anns and raw_image_info are COCO's own records as JSON; raw_anns may be "{}"."""
    image, known = (_parsed(record[key], key) for key in ("raw_image_info", "raw_anns"))
    return dict(
        file_name=record["image_path"],
        ref_id=record["ref_id"],
        split=record["split"],
        box=record["bbox"],
        expression=[said["sent"] for said in record["sentences"]],
        width=image["width"],
        height=image["height"],
        true_box=known.get("bbox"),
    )


def _refer(record: dict, instances: dict) -> dict:
    image, known = instances["images"].get(record["image_id"]), instances["annotations"].get(record["ann_id"])
    if not (image and known):
        raise ValueError(f"instances.json lacks image {record['image_id']} or annotation {record['ann_id']}")
    return (
        image
        | known
        | dict(
            ref_id=record["ref_id"], split=record["split"], expression=[said["sent"] for said in record["sentences"]]
        )
    )


def _flat(names: str, said: str, ref: str | None = None) -> Callable[[dict, dict], dict]:
    """The forms that need only their keys renamed."""

    def row(record: dict, _: dict) -> dict:
        size = {side: record[side] for side in SIZE if side in record}
        ids = {"ref_id": record[ref]} if ref else {}
        return dict(file_name=record[names], expression=record[said], box=record["bbox"]) | ids | size

    return row


FORMS = {  # the first whose keys a record has
    "jxu124 Parquet": Form(
        ["ref_id", "image_path", "split", "sentences", "bbox", "raw_anns", "raw_image_info"], None, _jxu124
    ),
    "refer pickle": Form(["ref_id", "ann_id", "image_id", "split", "sentences"], "xywh", _refer),
    "lmms-lab Parquet": Form(
        ["question_id", "file_name", "answer", "bbox"], "xywh", _flat("file_name", "answer", "question_id")
    ),
    "MiniGPT-v2 JSON": Form(["img_id", "sents", "bbox", *SIZE], "xywh", _flat("img_id", "sents", "img_id")),
    "Qwen-VL JSON lines": Form(["image", "sent", "bbox", *SIZE], "xyxy", _flat("image", "sent")),
    "Shikra JSON lines": Form(["img_path", "expression", "bbox"], "xyxy", _flat("img_path", "expression")),
}
_EXPECTED = "valid forms are " + "; ".join(f"{name} with {', '.join(form.keys)}" for name, form in FORMS.items())


_ONLY = "but only plain lists, dicts, strings and numbers are allowed"


class _Plain(pickle._Unpickler):  # the one written in Python: the one in C allocates whatever a broken file asks for
    """Builds lists, dicts, strings and numbers; a pickle that names anything else is refused before that can run.

    Tuples and frozen sets become lists: a key made of tuples in tuples takes for ever to hash.
    """

    dispatch = pickle._Unpickler.dispatch | {
        pickle.EMPTY_TUPLE[0]: lambda self: self.append([]),
        **dict.fromkeys((pickle.TUPLE[0], pickle.FROZENSET[0]), lambda self: self.append(self.pop_mark())),
        **{
            code[0]: lambda self, n=n: self.stack.__setitem__(slice(-n, None), [self.stack[-n:]])
            for n, code in enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), 1)
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it asks for {module}.{name}, {_ONLY}")

    def get_extension(self, code: int) -> Any:  # would take what another pickle has found, past find_class
        raise ValueError(f"it asks for the extension {code}, {_ONLY}")


def _unpickled(file: Path) -> list[tuple[str, Any]]:
    try:
        records = list(_Plain(BytesIO(file.read_bytes()), encoding="latin1").load())  # written by Python 2
    except Exception as error:  # noise makes an unpickler raise anything
        raise ValueError(f"{file} is refused, or is no whole pickle of a list: {error!s:.300}") from error
    return [(f"{file}, entry {i}", record) for i, record in enumerate(records, 1)]


def _parquet(file: Path) -> list[tuple[str, Any]]:
    """All columns but the images; `stored_images` gets those when they are needed."""
    try:
        stored = pq.ParquetFile(file)
        records = stored.read([c for c in stored.schema_arrow.names if c != "image"]).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} is no whole Parquet file: {error}") from error
    return [(f"{file}, row {i}", record) for i, record in enumerate(records, 1)]


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: broken JSON: {error}; {_EXPECTED}") from error


def _text(file: Path) -> list[tuple[str, Any]]:
    """JSON: one list, or one object a line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is neither Parquet nor text: {error}; {_EXPECTED}") from error
    if text.lstrip().startswith("["):
        return [(f"{file}, entry {i}", record) for i, record in enumerate(_parsed(text, str(file)), 1)]
    lines = [(f"{file}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(place, _parsed(line, place)) for place, line in lines]


def _refs(folder: Path) -> list[Path]:
    """The pickle of a `refer` folder; of several, the split in common use."""
    if found := [folder / f"refs({by}).p" for by in ("unc", "umd", "google") if (folder / f"refs({by}).p").is_file()]:
        return found[:1]
    raise ValueError(f"{folder} holds no refs(unc).p, refs(umd).p or refs(google).p; {_EXPECTED}")


def _records(file: Path) -> list[tuple[str, Any]]:
    """Each record of a file with its place, for messages."""
    with open(file, "rb") as stream:
        whole = stream.read(4) == b"PAR1"
    return (_parquet if whole else _unpickled if file.suffix in (".p", ".pkl", ".pickle") else _text)(file)


def _instances(file: Path) -> dict[str, dict]:
    """COCO's images (file_name, width, height) and annotations (box) by their IDs."""
    try:
        content = _parsed(file.read_text(encoding="utf-8"), str(file))
        return {
            "images": {i["id"]: {key: i[key] for key in ("file_name", *SIZE)} for i in content["images"]},
            "annotations": {a["id"]: {"box": a["bbox"]} for a in content["annotations"]},
        }
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no COCO instances file with images and annotations: {error!r}") from error


def coco_name(path: str) -> str:
    """An image's file name from a path or from a name with an object's number: COCO_train2014_<12 digits>.jpg.

    Of any other the whole path stays, from the folder of the images on.
    """
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")] or [path]
    return f"{found[1]}.jpg" if (found := _COCO.fullmatch(parts[-1])) else "/".join(parts)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # halves of pairs, which no file can hold


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e6 < value < 1e6


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_side(value: Any) -> bool:
    return _is_number(value) and value >= 1 and value == int(value)


_VALID = {
    "file_name": ("the name of an image", lambda x: _is_text(x) and re.fullmatch(r".+\.\w+", coco_name(x))),
    "expression": ("an expression", lambda x: _is_text(x) and x.strip()),
    "box": ("four finite numbers", _is_box),
    "true_box": ("four finite numbers or nothing", lambda x: x is None or _is_box(x)),
    "width": ("whole pixels", _is_side),
    "height": ("whole pixels", _is_side),
    "ref_id": ("a number or a text", lambda x: _is_text(x) or (isinstance(x, int) and abs(x) < 2**63)),
    "split": ("a text", _is_text),
}


def _checked(row: dict) -> dict:
    for key, (what, valid) in _VALID.items():
        if key in row and not valid(row[key]):
            raise ValueError(f"its {key} must be {what}, not {short(row[key]):.60}")
    return row


def _form(records: list[tuple[str, Any]], file: Path) -> str:
    keys = list(records[0][1]) if records and isinstance(records[0][1], dict) else []
    if fits := [name for name, form in FORMS.items() if set(form.keys) <= set(keys)]:
        return fits[0]
    begins = f"begins with a record of keys {', '.join(map(str, keys))}" if keys else "does not begin with a record"
    raise ValueError(f"{file} {begins:.300}; {_EXPECTED}")


def _rows(records: list[tuple[str, Any]], name: str, instances: dict) -> pd.DataFrame:
    """One row per expression, checked, but otherwise as the file has it; entry counts the records."""
    rows = []
    for entry, (place, record) in enumerate(records):
        try:
            row = FORMS[name].row(record, instances)
            if not isinstance(row["expression"], list):  # then a ref's expressions are spread over several records
                row, entry = row | dict(expression=[row["expression"]]), 0
            rows += [_checked(row | dict(expression=said, entry=entry)) for said in row["expression"]]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{place}: {what}; {name} has {', '.join(FORMS[name].keys)}") from error
    if not rows:
        raise ValueError(f"{records[0][0]}: no record has an expression")
    return pd.DataFrame(rows)


def image_key(name: str) -> str:
    """The ID of an image by its file's name: COCO's without its ending; any other is the whole path that is given, for
    a/1.jpg and b/1.jpg, 1.jpg and 1.png are different images."""
    return name.removesuffix(".jpg") if _COCO.fullmatch(name) else name


def folder_images(names: Sequence[str], folder: str | Path) -> Callable[[str], bytes]:
    """content(image_id), the files' bytes, of the named images in a folder.

    A path that is not there is looked for by its last part, where that is no other image's. FileNotFoundError, naming
    the first, if any is missing.
    """
    names, folder = list(dict.fromkeys(names)), Path(folder)
    last, paths = Counter(Path(name).name for name in names), {}
    for name in names:
        path, short = folder / name, Path(name).name
        found = os.path.isfile(path) or last[short] > 1
        paths[image_key(name)] = path if found else folder / short
    if missing := [path for path in paths.values() if not os.path.isfile(path)]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} images are missing, first {missing[0]}; the folder is "
            f"to hold COCO train2014: {FETCH}"
        )
    return lambda image_id: paths[image_id].read_bytes()


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Whatever PIL raises for a broken image, and warns of a huge one, as a ValueError that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except Exception as error:  # PIL's decoders raise anything
        what = "it is no image" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"the image {name} cannot be read: {what}") from error


def picture(content: Callable[[str], bytes], image_id: str) -> Image.Image:
    """The image of content(image_id) as a viewer shows it. ValueError, naming it, where it is broken."""
    with _readable(image_id):
        return read_picture(BytesIO(content(image_id)))


def holds_images(files: Sequence[Path]) -> bool:
    """Whether the files are Parquet with columns of images and of their names."""
    return files[0].suffix == ".parquet" and {"image", "file_name"} <= set(pq.ParquetFile(files[0]).schema_arrow.names)


def stored_images(files: Sequence[Path]) -> Callable[[str], bytes]:
    """content(image_id) of the images in Parquet files with the columns file_name and image (encoded bytes)."""
    place = {}
    for file in files:
        stored = pq.ParquetFile(file)
        for group in range(stored.num_row_groups):
            names = stored.read_row_group(group, ["file_name"])["file_name"].to_pylist()
            place |= {image_key(coco_name(str(name))): (file, group, row) for row, name in enumerate(names)}

    @lru_cache(2)  # rows of one image are near each other, and a group of 100 images is some 20 MB
    def loaded(file: Path, group: int) -> list[dict]:
        return pq.ParquetFile(file).read_row_group(group, ["image"])["image"].to_pylist()

    def content(image_id: str) -> bytes:
        file, group, row = place[image_id]
        cell = loaded(file, group)[row]
        if not isinstance(cell, dict) or not cell.get("bytes"):
            raise ValueError(f"{file} holds no bytes of {image_id}; give images=<folder of COCO train2014>")
        return cell["bytes"]

    return content


def _sizes(names: pd.Series, files: Sequence[Path], instances: dict, images: Path | None) -> np.ndarray:
    """Width and height [n, 2] of images whose annotations do not give them."""
    distinct = names.unique()
    if instances:
        known = {image["file_name"]: (image["width"], image["height"]) for image in instances["images"].values()}
        if lost := [name for name in distinct if name not in known]:
            raise ValueError(f"the instances lack {len(lost)} of {len(distinct)} images, first {lost[0]}")
    elif images or holds_images(files):
        content, known = folder_images(names, images) if images else stored_images(files), {}
        for name in tqdm(distinct, "sizes", unit="image", leave=False):
            with _readable(name), Image.open(BytesIO(content(image_key(name)))) as opened:
                known[name] = upright_size(opened)
    else:
        raise ValueError(
            f"{files[0]} does not say how large its images are: give instances=<instances.json> or "
            "images=<folder of COCO train2014>"
        )
    if wrong := [name for name in distinct if not all(map(_is_side, known[name]))]:
        raise ValueError(f"the instances have no width and height in whole pixels for {wrong[0]}")
    return np.array([known[name] for name in names])


def _xyxy(boxes: np.ndarray) -> np.ndarray:
    """Corners [n, 4] of boxes given as x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _ordered(boxes: np.ndarray, rows: pd.DataFrame, file: Path) -> np.ndarray:
    """Corners [n, 4] of boxes in either order: the one that gives COCO's own box, or else the one that fits the images.

    Raises ValueError where that leaves both or none.
    """
    readings = {"xyxy": boxes, "xywh": _xyxy(boxes)}
    if rows["true_box"].notna().all():
        true = _xyxy(np.array(rows["true_box"].tolist(), dtype=float))
        fits = [order for order, box in readings.items() if np.abs(box - true).max() < 0.01]
    else:
        limit = rows[SIZE].to_numpy() + SLACK
        fits = [
            order for order, box in readings.items() if (box[:, :2] < box[:, 2:]).all() and (box[:, 2:] <= limit).all()
        ]
    if len(fits) != 1:
        fit = "fit both as xyxy and as xywh" if fits else "fit neither as xyxy nor as xywh"
        raise ValueError(f"the boxes in {file} {fit}; COCO's own bbox in every raw_anns would settle their order")
    return readings[fits[0]]


def _with_refs(rows: pd.DataFrame) -> pd.DataFrame:
    """ref_id as text and sent_id, counting in it. Where the file names no ref, each box of an image is one; an ID that
    comes again with another box, or in another record that lists expressions, is numbered."""
    named = "ref_id" in rows
    rows["ref_id"] = rows["ref_id" if named else "image_id"].map(str)
    rows["object"] = rows.groupby(["ref_id", "entry", *TRUTH], sort=False).ngroup()
    number = rows.groupby("ref_id")["object"].rank("dense").astype(int) - 1
    rows["ref_id"] += ("_" + number.astype(str)).where((number > 0) | (not named), "")
    return rows.assign(sent_id=rows.groupby("ref_id").cumcount())


def _clipped(rows: pd.DataFrame) -> pd.DataFrame:
    """Boxes that stick out of their image by no more than SLACK are clipped, with a warning; others raise."""
    box, size = rows[TRUTH].to_numpy(float), rows[SIZE].to_numpy(float)
    out = np.maximum(-box[:, :2], box[:, 2:] - size).max(axis=1)
    rows[TRUTH] = np.where(out[:, None] <= SLACK, np.clip(box, 0, np.tile(size, 2)), box)
    check_boxes(rows)
    moved = rows["ref_id"][out > 0].unique()
    if len(moved):
        warnings.warn(
            f"{len(moved)} boxes stuck out of their image, by at most {out.max():.2f} px, and were clipped; "
            f"first: ref_id {moved[0]}",
            stacklevel=3,
        )
    return rows


def read_annotations(
    path: str | Path | Sequence[Path],
    split: str | None = None,
    instances: str | Path | None = None,
    images: str | Path | None = None,
) -> pd.DataFrame:
    """The annotations in a file, in a `refer` folder or in the files of one Parquet table: a frame with `COLUMNS`.

    split: kept where the file says each record's split, otherwise the file is the split. instances: COCO's
    instances.json, by default the one beside a refer pickle. images: a folder of images; that or instances gives the
    sizes where the file has none. Raises ValueError for whatever is none of `FORMS`, naming the place, and for boxes
    outside their image.
    """
    files = list(map(Path, path)) if isinstance(path, list | tuple) else [Path(path)]
    files = _refs(files[0]) if files[0].is_dir() else files
    records = [record for file in files for record in _records(file)]
    name = _form(records, files[0])
    if name == "refer pickle" and instances is None:
        instances = files[0].with_name("instances.json")
        if not instances.is_file():
            raise ValueError(f"{files[0]} gives no boxes: instances.json is to lie beside it, or give instances=<it>")
    coco = _instances(Path(instances)) if instances else {}
    rows = _rows(records, name, coco)
    if split and "split" in rows:
        has = rows["split"].map(str)
        if not (has == split).any():
            raise ValueError(f"{files[0]} has no split {split!r}; it has: {', '.join(has.unique())}")
        rows = rows[has == split].reset_index(drop=True)
    rows["file_name"] = rows["file_name"].map(coco_name)
    rows["image_id"] = rows["file_name"].map(image_key)
    if not set(SIZE) <= set(rows) or rows[SIZE].isna().any(axis=None):
        rows[SIZE] = _sizes(rows["file_name"], files, coco, images and Path(images))
    boxes = np.array(rows["box"].tolist(), dtype=float)
    order = FORMS[name].order
    boxes = _ordered(boxes, rows, files[0]) if order is None else _xyxy(boxes) if order == "xywh" else boxes
    rows[TRUTH] = boxes.round(3)  # they have two decimals; this undoes single precision and the sums x + width
    return _clipped(_with_refs(rows)[COLUMNS].astype(dict.fromkeys(SIZE, int)))


def check_counts(rows: pd.DataFrame, dataset: str, split: str) -> None:
    """Raises ValueError unless the rows are as many expressions, objects and images as the split has, see `COUNTS`."""
    expected = pick(pick(COUNTS, dataset, "data set"), split, f"split of {dataset}")
    found = len(rows), rows["ref_id"].nunique(), rows["image_id"].nunique()
    if found != expected:
        has, have = ("{} expressions of {} objects in {} images".format(*counts) for counts in (expected, found))
        hint = "; unc_val cuts the standard split out of lmms-lab's" if split == "val" and found > expected else ""
        raise ValueError(f"{dataset} {split} has {has}, but these rows have {have}{hint}")


def unc_val(lmms: pd.DataFrame, unc: pd.DataFrame) -> pd.DataFrame:
    """The rows of lmms-lab's val that are in the standard one: theirs adds objects of the Google split.

    unc: the standard split in any form (UNC; UMD for RefCOCOg). Objects are joined on file name and box (0.01 px); one
    listed twice, with the same expressions, is kept once. Prints how many were found. ValueError where none was.
    """

    def objects(rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows.assign(**rows[TRUTH].round(2))
        return (
            rows.groupby("ref_id", sort=False)
            .agg({"file_name": "first"} | dict.fromkeys(TRUTH, "first") | {"expression": tuple})
            .reset_index()
        )

    where = ["file_name", *TRUTH]
    theirs, wanted = objects(lmms).drop_duplicates([*where, "expression"]), objects(unc)[where].drop_duplicates()
    found = theirs.merge(wanted, on=where)
    lost = len(wanted) - len(found[where].drop_duplicates())
    print(
        f"{len(wanted) - lost} of the {len(wanted)} boxes of the standard split are there, {lost} are missing; "
        f"{len(theirs) - len(found)} objects are of other splits"
    )
    if found.empty:
        raise ValueError("no object of the standard split is among these rows; are both of the same data set?")
    return lmms[lmms["ref_id"].isin(found["ref_id"])].reset_index(drop=True)
