"""Fuzzing of everything that reads what others wrote: parsers, readers, images, weights, parameters.

    python -m tests.fuzz                           # 100,000 inputs, some minutes; exit code 1 if there is a finding
    python -m tests.fuzz --inputs 5000 --only images --seed 1 --show

Half of a target's inputs are its seeds with byte noise (texts and bytes) or with odd values (JSON), half are made by
hypothesis. Every input is accepted or refused: refused is an exception of exactly the target's types whose message
matches the target's pattern, which asks for the file or value at fault. Anything else is a finding, and so are a crash
of the process, an input that takes more than LIMIT seconds of one core, and memory beyond MEMORY. Findings are saved
as files; `python -m tests.fuzz --replay TARGET FILE` runs one again, with its traceback.
"""

from __future__ import annotations

import argparse
import atexit
import codecs
import copyreg
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import hypothesis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from PIL import Image
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from analysis import models, params, results
from analysis.engine import evaluate
from analysis.models import base, convert
from analysis.pruning import pruner
from analysis.pruning.images import prune_images
from analysis.rec import datasets, refcoco
from analysis.rec.boxes import BOX_FORMATS, FRAMES
from analysis.rec.scoring import score
from analysis.summarization import data as news
from tests.support import checkpoint
from tests.support import news as stories
from tests.support import refcoco as forms
from tests.support.visual import visual

LIMIT = 2.0  # seconds of one core for one input
MEMORY = 4 * 2**30  # bytes of address space beyond what a target's process has when it begins
HANG = 60  # seconds after which an input that waits for something is stopped


class Target(NamedTuple):
    """What is fuzzed. kind: how inputs are made, "bytes", "text", "json" (a text that may be broken) or "values" (whole
    JSON); seeds() -> the inputs to begin with; run(input, folder), with a folder to write in; names: pattern of the
    messages of refusals; refusals: their types; share: of all inputs, relative to the others."""

    kind: str
    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes, Path], Any]
    names: str = r"\S"
    refusals: tuple[type[Exception], ...] = (ValueError,)
    share: float = 1


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for a broken file."""


def text(data: bytes) -> str:
    """Any bytes as a text, what is no UTF-8 as lone surrogates."""
    return data.decode("utf-8", "surrogateescape")


@cache
def store() -> Path:
    """A folder for what targets share, removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Making inputs.

DIGITS = "٠١٢٣߁߂௧०१²③𝟎𝟙０１"
WORDS = [
    b"",
    b"\0",
    b"nan",
    b"NaN",
    b"-inf",
    b"Infinity",
    b"1e400",
    b"-1e-400",
    b"1" + b"0" * 400,
    b"9" * 5000,
    b"-0.0",
    b"null",
    b"true",
    b"[",
    b"]",
    b"{",
    b"}",
    b"[" * 3000,
    b'{"a":' * 2000,
    b'"',
    b"\\ud800",
    b"\n",
    b"\r\n",
    b",",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"=",
    b":",
    b"@",
    b"<s>",
    b"</s>",
    b"%s%n",
    b"../../etc/passwd",
    b"!!python/object/apply:os.system [id]",
    b"&a [*a]",
    DIGITS.encode(),
    b"A" * 20_000,
]
INTEGERS = [
    0,
    1,
    2,
    16,
    127,
    128,
    255,
    256,
    2**15 - 1,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    -0.0,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    10**400,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "a",
    "0.5",
    "nan",
    DIGITS,
    "x" * 5000,
    "\ud800",
    "\0",
    "a/../b",
    "\u202e",
    [],
    [[]],
    [None],
    [0] * 5,
    [float("nan")] * 4,
    ["a", "b"],
    [1, 2, 3, 4],
    {},
    {"a": None},
    {"": [1]},
    json.loads("[" * 60 + "]" * 60),
]


def noise(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """1 to 6 changes: a bit, a byte, an integer, a word; a piece deleted, repeated, cut off, or of another seed."""
    for _ in range(min(1 + int(rng.expovariate(0.8)), 6)):
        at, length = rng.randrange(len(data) + 1), min(int(rng.expovariate(0.05)) + 1, len(data) + 1)
        match rng.randrange(8):
            case 0 if data:
                at = min(at, len(data) - 1)
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case 1:
                data = data[:at] + bytes([rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])]) + data[at + 1 :]
            case 2:
                size, order = rng.choice([1, 2, 4, 8]), rng.choice(["little", "big"])
                value = (rng.choice(INTEGERS) + rng.randint(-1, 1)) % 2 ** (8 * size)
                data = data[:at] + value.to_bytes(size, order) + data[at + size * rng.randrange(2) :]
            case 3:
                data = data[:at] + rng.choice([*WORDS, rng.randbytes(length)]) + data[at + rng.choice([0, length]) :]
            case 4:
                data = data[:at] + data[at + length :]
            case 5:
                data = data[:at] + data[at : at + length] * rng.choice([2, 3, 50]) + data[at + length :]
            case 6:
                data = data[:at]
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data = data[:at] + other[start : start + rng.choice([length, len(other)])] + data[at:]
    return data[: 2**20]


def nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all parts of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inner for found in nodes(part, (*path, key)))]


def grafted(data: bytes, at: int, value: Any, how: int = 0) -> bytes:
    """A JSON text with one part replaced (how 0 to 2), left out (3), there twice (4) or beside a new key (5)."""
    whole = json.loads(data)
    paths = nodes(whole)
    *path, last = paths[at % len(paths)] or (None,)
    if last is None:
        return json.dumps(value).encode()
    place = whole
    for key in path:
        place = place[key]
    if how == 3:
        del place[last]
    elif how == 4 and isinstance(place, list):
        place.insert(last, place[last])
    elif how == 5 and isinstance(place, dict):
        place[str(value)[:20]] = value
    else:
        place[last] = value
    return json.dumps(whole).encode()


def mutated(target: Target, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    data = rng.choice(seeds)
    if target.kind in ("bytes", "text") or (target.kind == "json" and rng.random() < 0.3):
        return noise(rng, data, seeds)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = grafted(data, rng.randrange(10**6), rng.choice(ODD), rng.randrange(6))
    return data


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8
)


def strategy(target: Target, seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Inputs by hypothesis: a seed with a piece replaced by any bytes, any text, or with a part that is any JSON."""

    def spliced(seed: bytes, at: int, length: int, piece: bytes) -> bytes:
        return seed[: at % (len(seed) + 1)] + piece + seed[at % (len(seed) + 1) + length :]

    piece = st.text(max_size=30).map(str.encode) if target.kind == "text" else st.binary(max_size=64)
    if target.kind in ("json", "values"):
        return st.builds(grafted, st.sampled_from(seeds), st.integers(0, 10**4), ANYTHING, st.integers(0, 5))
    return st.builds(spliced, st.sampled_from(seeds), st.integers(0, 10**5), st.integers(0, 40), piece) | piece


# Boxes, frames, scoring.

ANSWERS = [
    "[0.12, 0.34, 0.56, 0.78]",
    "Answer: [0.123,0.345,0.567,0.789] .",
    "{<12><34><56><78>}",
    "[0, 0, 1, 1]",
    "no",
    f"[{DIGITS[0]}, 0, 1, 1]",
    "[1e400, 0, 1, 1]",
    "[" + "1" * 400 + ", 0, 1, 1]",
    "[nan, 0, 1, inf]",
    "{< 1 > <2><3><4>} [.5, 0.5, 1., +1]",
]


def answers(data: bytes, _: Path) -> None:
    for name, dialect in BOX_FORMATS.items():
        box = dialect.parse(text(data))
        if box is not None:
            assert box.shape == (4,) and (box >= 0).all() and (box[:2] <= box[2:]).all()
            assert (box <= 1).all() or name == "qwen2_5_vl"  # which is in pixels
            assert dialect.parse(dialect.format(box)) is not None


def frames(data: bytes, _: Path) -> None:
    """The input is two boxes and two sizes in float64; nothing may raise, and sane numbers come back."""
    numbers = np.frombuffer(data[:96].ljust(96, b"\0"), dtype=np.float64)
    box, size = numbers[:8].reshape(2, 4), numbers[8:].reshape(2, 2)
    for frame in FRAMES.values():
        with np.errstate(all="ignore"):
            pixels = frame.decode(box, size)
            again = frame.encode(pixels, size)
        assert pixels.shape == again.shape == (2, 4)
        if (np.abs(box) <= 2).all() and ((size >= 1) & (size <= 1e5)).all():
            assert np.allclose(again, box, atol=1e-6)
    for dialect in BOX_FORMATS.values():
        for one in box:
            if np.isfinite(one).all():
                dialect.format(one)
            else:
                try:
                    dialect.format(one)
                except ValueError as error:
                    assert "four finite numbers" in str(error)
                else:
                    raise AssertionError(f"{one} was written as a box")


ROWS = [
    dict(ref_id=str(i), width=80, height=60, x1=1.0, y1=2.0, x2=30.5, y2=40.0, raw=raw, dialect=dialect, frame=frame)
    for i, (raw, dialect, frame) in enumerate(
        [(ANSWERS[0], "llava", "padded"), (ANSWERS[1], "shikra", "padded"), (ANSWERS[2], "minigpt_v2", "resized")]
    )
]


def scored(data: bytes, _: Path) -> None:
    content = json.loads(data)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        return  # pandas would not make rows of it
    try:
        table = pd.DataFrame(content, dtype=object)
    except UnicodeEncodeError:  # pandas has no such names of columns
        return
    with np.errstate(all="ignore"):
        found = score(table)
    sane = (found[["width", "height"]].astype(float) < 1e9).all(axis=1)  # beyond, areas are no finite numbers
    assert found["iou"][sane].between(0, 1 + 1e-9).all() and not (found["correct"] & found["invalid"]).any()


# RefCOCO.


def written(writer: Callable, name: str, **options) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        writer(Path(folder), **options)
        return (Path(folder) / name).read_bytes()


@cache
def photos() -> Path:
    forms.instances(store())
    return forms.photos(store() / "photos")


def annotations(data: bytes, folder: Path, name: str, **options) -> pd.DataFrame:
    (folder / name).write_bytes(data)
    return datasets.annotations("refcoco", "val", folder / name, **options)


def pickled(data: bytes, folder: Path) -> None:
    """Nothing that the file names may be looked up, and nothing run."""
    photos()
    with watched() as seen:
        (folder / "refs.p").write_bytes(data)
        try:
            refcoco.read_annotations(folder / "refs.p", "val", instances=store() / "instances.json")
        finally:
            assert not seen, f"the pickle did this: {seen}"


def coco(data: bytes, folder: Path) -> None:
    (folder / "instances.json").write_bytes(data)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(forms.refs(), 2))
    refcoco.read_annotations(folder, "val")


def columns(names: str) -> list[bytes]:
    table = pq.read_table(
        io.BytesIO(
            written(
                getattr(forms, names),
                {"lmms": "val-00000-of-00001.parquet", "jxu124": "validation-00000-of-00001.parquet"}[names],
            )
        )
    )
    return [json.dumps({c: table[c].to_pylist() for c in table.column_names if c != "image"}).encode()]


def cells(data: bytes, folder: Path) -> None:
    """A Parquet file of the columns in a JSON object; what no column can hold is left out."""
    content, made = json.loads(data), {}
    for name, values in content.items() if isinstance(content, dict) else ():
        try:
            values = pa.array(values if isinstance(values, list) else [values] * 3)
            made[name.encode("utf-8", "replace").decode()] = values
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            continue
    shortest = min(map(len, made.values()), default=0)
    try:
        pq.write_table(pa.table({name: values[:shortest] for name, values in made.items()}), folder / "cells.parquet")
    except pa.ArrowException:  # Parquet cannot hold all that Arrow can
        return
    datasets.annotations("refcoco", "val", folder / "cells.parquet", images=photos())


def image_column(data: bytes, folder: Path) -> None:
    """A whole file, but for its images."""
    file = folder / "val-00000-of-00001.parquet"
    name = forms.WIDE
    pq.write_table(
        pa.table(
            {
                "question_id": ["1"],
                "answer": [["cat"]],
                "bbox": [[1.0, 2.0, 3.0, 4.0]],
                "file_name": [name],
                "image": [{"bytes": data, "path": name}],
            }
        ),
        file,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dataset = datasets.load("refcoco", "val", annotations=file)
    as_model_takes(dataset.image(dataset.rows["image_id"][0]))


def image_file(data: bytes, folder: Path) -> None:
    (folder / forms.WIDE).write_bytes(data)
    content = refcoco.folder_images([forms.WIDE], folder)
    as_model_takes(refcoco.picture(content, refcoco.image_key(forms.WIDE)))


def as_model_takes(image: Image.Image) -> None:
    assert image.mode == "RGB"
    base.Model.layout(None, image.size)
    base.pad_to_square(image, (0, 0, 0))


def sized(width: int, height: int) -> bytes:
    """A small PNG with another size in its header: a decompression bomb, or nothing at all."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 12), "red").save(stream, "PNG")
    png = stream.getvalue()
    head = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + head + struct.pack(">I", crc32(head)) + png[33:]


def pictures() -> list[bytes]:
    """Every format that PIL writes here, and every mode: CMYK, 16 bits, palette, alpha; sizes that are bombs."""
    rng, made = np.random.default_rng(0), []
    Image.init()

    def save(image: Image.Image, kind: str, **options) -> None:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        made.append(stream.getvalue())

    pixels = rng.integers(0, 256, (12, 16, 4), dtype=np.uint8)
    rgb, alpha = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    for kind in "JPEG PNG WEBP GIF BMP TIFF PPM ICO JPEG2000 TGA DDS SGI PCX AVIF".split():
        if kind in Image.SAVE:
            save(rgb, kind)
    save(rgb.convert("CMYK"), "JPEG")
    save(rgb.convert("L"), "JPEG", progressive=True)
    save(rgb, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    save(rgb, "TIFF", compression="tiff_lzw")
    save(Image.fromarray(rng.integers(0, 2**16, (12, 16), dtype=np.uint16)), "PNG")  # 16 bits
    save(rgb.quantize(16), "PNG", transparency=3)  # palette
    save(alpha.convert("LA"), "PNG")
    save(alpha, "PNG")
    save(alpha, "WEBP", lossless=True)
    save(rgb.convert("1"), "PNG")
    save(rgb.quantize(16), "GIF", save_all=True, append_images=[rgb.transpose(0).quantize(16)], loop=0)
    return made + [
        sized(*size)
        for size in [
            (0, 0),
            (0, 9),
            (2**31 - 1, 1),
            (60_000, 60_000),
            (10_000, 10_000),
            (80_000_000, 1),
            (2**32 - 1, 2**32 - 1),
        ]
    ]


# Gadgets: pickles that would run something, or that play with the machine that reads pickles.


class Call:
    def __init__(self, function: Callable, *arguments: Any, state: Any = None):
        self.call = function, arguments, *([state] if state else [])

    def __reduce__(self) -> tuple:
        return self.call


class State:
    def __setstate__(self, state: Any) -> None:
        raise AssertionError("__setstate__ ran")

    def __getstate__(self) -> dict:
        return {"a": 1}


class New(dict):
    def __new__(cls, *arguments: Any, **options: Any) -> New:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple:
        return (1,), {"a": 2}


NAMED = [
    "os system",
    "posix system",
    "nt system",
    "os popen",
    "os execv",
    "subprocess Popen",
    "subprocess check_output",
    "builtins eval",
    "__builtin__ eval",
    "builtins exec",
    "builtins compile",
    "builtins open",
    "builtins getattr",
    "builtins __import__",
    "builtins object",
    "builtins dict",
    "builtins bytearray",
    "functools partial",
    "functools reduce",
    "operator attrgetter",
    "operator methodcaller",
    "operator itemgetter",
    "itertools starmap",
    "importlib import_module",
    "runpy run_path",
    "shutil rmtree",
    "pathlib PosixPath",
    "copyreg _reconstructor",
    "copyreg __newobj__",
    "copyreg _extension_cache",
    "collections OrderedDict",
    "collections defaultdict",
    "numpy._core.multiarray _reconstruct",
    "numpy.core.multiarray scalar",
    "numpy dtype",
    "numpy load",
    "torch._utils _rebuild_tensor_v2",
    "torch.storage _load_from_bytes",
    "torch load",
    "codecs encode",
    "types FunctionType",
    "types CodeType",
    "pickle loads",
    "_pickle loads",
    "ctypes CDLL",
    "socket socket",
    "webbrowser open",
    "timeit timeit",
    "pdb run",
    "code interact",
    "pydoc pipepager",
    "pandas read_pickle",
    "analysis.rec.refcoco _Plain",
    "sys modules",
    "weakref ref",
    "logging.config dictConfig",
]


def gadgets(mark: Path) -> dict[str, bytes]:
    """Pickles by what they try; those that run something would make the file `mark`."""
    command, code = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    array = np.empty(1, dtype=object)
    array[0] = Call(os.system, command)
    objects = {
        "reduce": Call(os.system, command),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(mark), "w"),
        "partial": Call(partial, os.system, command),
        "object array": array,
        "array": np.zeros(3),
        "dtype": np.dtype("f4"),
        "scalar": np.float64(1),
        "setstate": State(),
        "newobj_ex": New(),
        "frame": pd.DataFrame({"a": [1]}),
        "tensor": torch.ones(1),
        "set": {1},
        "class": Call,
        "function": gadgets,
        "build": Call(dict, state={"a": Call(os.system, command)}),
        "path": mark,
        "complex": 1j,
        "bytearray": bytearray(b"x"),
        "dict key": {("a", Call(os.system, command)): 1},
    }
    made = {
        f"{name}, protocol {protocol}": pickle.dumps([{"ref_id": thing}], protocol)
        for name, thing in objects.items()
        for protocol in range(6)
    }
    said = f"S{command!r}\n".encode()
    for name in NAMED:
        module, function = name.split()
        short = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, function))
        called = b"c%s\n%s\n" % (module.encode(), function.encode())
        made |= {
            f"{name}, GLOBAL": called + b"(" + said + b"tR.",
            f"{name}, STACK_GLOBAL": short + b"\x93" + said + b"\x85R.",
            f"{name}, INST": b"(" + said + b"i%s\n%s\n." % (module.encode(), function.encode()),
            f"{name}, OBJ": b"(" + called + said + b"o.",
            f"{name}, NEWOBJ": called + said + b"\x85\x81.",
        }
    laughs = b"(lp0\n" + b"".join(b"(lp%d\n" % (i + 1) + b"g%d\na" % i * 10 for i in range(30)) + b"."
    nested = b"".join(b"(" + b"g%d\n" % i * 9 + b"tp%d\n0" % (i + 1) for i in range(30))
    tuples = b"(S'lol'\ntp0\n0" + nested + b"]}g30\nI1\nsa."
    return made | {
        "persistent id": b"P" + command.encode() + b"\n.",
        "persistent id, binary": said + b"Q.",
        **{
            f"extension {code!r}": code + b"(" + said + b"tR."
            for code in (b"\x82\x07", b"\x83\x07\0", b"\x84\x07\0\0\0")
        },
        "unknown extension": b"\x82\xfa.",
        "extension 0": b"\x84\0\0\0\0.",
        "no stack": b"R.",
        "no mark": b"t.",
        "no memo": b"g9\n.",
        "far memo": b"]r\xff\xff\xff\x7f.",
        "itself": b"]q\0h\0a.",
        "build on dict": b"}}b.",
        "build on list": b"]}b.",
        "build slots": b"]N}S'__class__'\nS'x'\ns\x86b.",
        "call of text": said + b"(" + said + b"tR.",
        "new of text": said + b")\x81.",
        "laughs": laughs,
        "laughs in a key": tuples,
        "duplicates": b"]" + b"2" * 1000 + b"a" * 900 + b".",
        "pop": b"0" * 50 + b".",
        "frozen set": b"(I1\n\x91.",
        "set": b"\x8f(I1\n\x90.",
        "buffer": b"\x97.",
        "read-only buffer": b"]\x98.",
        "huge text": b"X\xff\xff\xff\x7fa.",
        "huge bytes": b"\x8e" + b"\xff" * 8 + b".",
        "huge frame": b"\x80\x04\x95" + b"\xff" * 8,
        "huge long": b"\x8b\xff\xff\xff\x7f.",
        "long digits": b"L" + b"9" * 10_000 + b"L\n.",
        "protocol 255": b"\x80\xff.",
        "deep": b"(" * 100_000,
        "deep list": b"]" * 50_000 + b"a" * 49_999 + b".",
    }


SEEN: list | None = None
EVENTS = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "exec",
    "compile",
    "socket.connect",
    "ctypes.dlopen",
    "shutil.rmtree",
    "os.remove",
    "os.rename",
    "os.mkdir",
}


class watched:
    """A list of what happens meanwhile that no reader of annotations has reason to do, by Python's audit events."""

    def __enter__(self) -> list:
        global SEEN
        hooked()
        copyreg._extension_cache[7] = os.system  # as if someone had used it before
        SEEN = []
        return SEEN

    def __exit__(self, *_: Any) -> None:
        global SEEN
        SEEN = None
        del copyreg._extension_cache[7]


@cache
def hooked() -> None:
    def hook(event: str, arguments: tuple) -> None:
        if SEEN is not None and event in EVENTS:
            SEEN.append((event, repr(arguments)[:200]))
            raise PermissionError(event)  # nothing is to happen, even if it gets this far

    for codec in ("raw_unicode_escape", "latin1", "utf-8", "ascii"):
        codecs.lookup(codec)  # imported on first use, which is an exec that nobody minds
    sys.addaudithook(hook)


# Rows on disk.


@cache
def rows_file() -> bytes:
    file = store() / "rows.parquet"
    results.write_rows(
        file, pd.DataFrame(ROWS).assign(keep=[1.0, None, 0.5], error=""), {"fingerprint": "f", "commit": "c"}
    )
    return file.read_bytes()


def rows(data: bytes, folder: Path) -> None:
    """A damaged part counts as missing; reading it says so."""
    file = folder / "rows.parquet"
    file.write_bytes(data)
    part = results.finished(file, "f")
    found = results.read_rows([file, file])
    assert isinstance(results.provenance(file), dict) and (part is None or 0 <= part <= len(found))


def made_of(data: bytes, folder: Path) -> None:
    """Rows whose provenance is any text, as of another writer."""
    table = pq.read_table(io.BytesIO(rows_file()))
    pq.write_table(table.replace_schema_metadata({"provenance": data}), folder / "rows.parquet")
    rows((folder / "rows.parquet").read_bytes(), folder)


# Summarization.


def news_json() -> list[bytes]:
    article, abstract = stories.ARTICLE, stories.ABSTRACT
    return [
        json.dumps(record).encode()
        for record in (
            dict(id="a", article_sents=article, abstract_sents=abstract, labels=[1, 0, 1]),
            dict(article_sents=[" ".join(words) for words in article], abstract_sents=["b ."]),
            dict(id=3, article="A storm hit. It was loud.\nShops closed.", highlights="Storm hits\nShops closed ."),
        )
    ]


def documents(data: bytes, folder: Path, name: str) -> None:
    (folder / name).write_bytes(data)
    for document in news.read_documents(folder / name):
        assert document.article and all(document.article) and all(document.abstract)
        assert document.labels is None or len(document.labels) == len(document.article)


def vocabulary(data: bytes, folder: Path) -> None:
    (folder / "vocabulary.txt").write_bytes(data)
    found = news.Vocabulary.load(folder / "vocabulary.txt")
    found.save(folder / "again.txt")
    assert news.Vocabulary.load(folder / "again.txt") == found


# Parameters and names.

DECLARED = dict(model="tiny-llava", limit=None, keep=[1.0], share=0.5, smoke=False, count=3)
GRID = dict(pruner=["none", "trim:anchor=last"], keep=[0.5, None], order=["method"], ids=["original"], seeds=[0])


def parameters(data: bytes, _: Path) -> None:
    if isinstance(content := json.loads(data), dict):
        params.check(DECLARED | content, DECLARED)


def grid(data: bytes, _: Path) -> None:
    """Values that notebook 10_rec_eval passes on from papermill."""
    if isinstance(content := json.loads(data), dict):
        evaluate.cells(**GRID | {name: value for name, value in content.items() if name in GRID})


def pruners(data: bytes, _: Path) -> None:
    """A specification that is taken must run, or refuse its options."""
    found = prune_images(pruner(text(data)), visual(batch=1), 0.5, [0])
    assert len(found) == 1 and len(found[0].origin)


def positions(data: bytes, _: Path) -> None:
    name, _, spec = text(data).partition(" ")
    evaluate.check_cells([evaluate.Cell(**{name if name in ("order", "ids") else "ids": spec})])


def shards(data: bytes, _: Path) -> None:
    results.parse_shard(text(data))


# Folders of models.


@cache
def model_folder() -> Path:
    folder, words = store() / "models" / "tiny", checkpoint.tokenizer()
    torch.manual_seed(0)
    LlavaForConditionalGeneration(checkpoint.config(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(dict(image_processor_type="CLIPImageProcessor", image_mean=[0.5] * 3, image_std=[0.5] * 3))
    )
    return folder


def model_file(name: str) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        whole = (model_folder() / name).read_bytes()
        if name == "config.json":
            remote = json.loads(whole) | {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}
            return [whole, json.dumps(remote).encode()]
        return [whole]

    return seeds


def model(data: bytes, folder: Path, name: str) -> None:
    """The tiny model with one file replaced; a file of code beside it must not be run, nor a pickle."""
    made = folder / "tiny"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for file in model_folder().iterdir():
        if file.name != name:
            os.link(file, made / file.name)
    (made / "evil.py").write_text(f"open({str(folder / 'mark')!r}, 'w')")
    (made / "pytorch_model.bin").write_bytes(pickle.dumps(Call(open, str(folder / "mark"), "w")))
    (made / name).write_bytes(data)
    try:
        models.load(made, device="cpu")
    finally:
        assert not (folder / "mark").exists(), "something in the folder was run"


def torch_files() -> list[bytes]:
    made, weights = [], {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}
    for content in (weights, {"model": weights, "epoch": 3}, Call(open, "/dev/null")):
        for new in (True, False):
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=new)
            made.append(stream.getvalue())
    return made


def weights(data: bytes, folder: Path) -> None:
    (folder / "weights.bin").write_bytes(data)
    with watched() as seen:
        try:
            convert.tensors(convert.read_weights(folder / "weights.bin"), folder / "weights.bin")
        finally:
            assert not [event for event in seen if event[0] != "compile"], f"the file did this: {seen}"


def jsonl(writer: Callable, **options) -> Callable[[], list[bytes]]:
    return lambda: [written(writer, "rows.jsonl", **options)]


def encoded(texts: Sequence[str]) -> Callable[[], list[bytes]]:
    return lambda: [one.encode() for one in texts]


TARGETS: dict[str, Target] = {
    "answers, all dialects": Target("text", encoded(ANSWERS), answers, refusals=(), share=16),
    "frames and formats": Target(
        "bytes",
        lambda: [
            np.array(numbers, dtype=float).tobytes()
            for numbers in (
                [0.1, 0.2, 0.3, 0.4] * 2 + [640, 480, 33, 1000],
                [np.nan, np.inf, 1e308, -1] * 2 + [0, -1, 1e-320, np.inf],
            )
        ],
        frames,
        refusals=(),
        share=8,
    ),
    "scoring of odd rows": Target("values", lambda: [json.dumps(ROWS).encode()], scored, share=2),
    "RefCOCO JSON lines": Target(
        "json",
        lambda: [
            line for writer in (forms.qwen, forms.shikra) for line in [written(writer, "rows.jsonl").splitlines()[0]]
        ],
        partial(annotations, name="rows.jsonl"),
        r"rows\.jsonl|ref_id",
        share=2,
    ),
    "RefCOCO corrupt lines": Target(
        "text",
        lambda: [written(writer, "rows.jsonl") for writer in (forms.qwen, forms.shikra)],
        partial(annotations, name="rows.jsonl"),
        r"rows\.jsonl|ref_id",
        share=2,
    ),
    "RefCOCO JSON": Target(
        "json",
        lambda: [written(forms.minigpt, "refcoco_val.json")],
        partial(annotations, name="rows.json"),
        r"rows\.json|ref_id",
        share=2,
    ),
    "RefCOCO refs.p": Target(
        "bytes",
        lambda: (
            [pickle.dumps(forms.refs(), protocol) for protocol in range(6)]
            + [written(forms.refer, "refs(unc).p", protocol=protocol) for protocol in (0, 2)]
        ),
        pickled,
        r"refs\.p|ref_id",
        share=5,
    ),
    "RefCOCO gadgets": Target(
        "bytes", lambda: list(gadgets(store() / "mark").values()), pickled, r"refs\.p|ref_id", share=5
    ),
    "RefCOCO instances.json": Target(
        "json",
        lambda: [written(forms.instances, "instances.json")],
        coco,
        r"refs\(unc\)\.p|instances|ref_id",
        share=2,
    ),
    "RefCOCO Parquet bytes": Target(
        "bytes",
        lambda: [
            written(forms.lmms, "val-00000-of-00001.parquet"),
            written(forms.jxu124, "validation-00000-of-00001.parquet"),
        ],
        lambda data, folder: annotations(data, folder, "a.parquet", images=photos()),
        r"a\.parquet|ref_id|\.jpg",
        (ValueError, FileNotFoundError),
        share=2,
    ),
    "RefCOCO Parquet cells": Target(
        "values",
        lambda: columns("lmms") + columns("jxu124"),
        cells,
        r"cells\.parquet|ref_id|\.jpg|images are missing",
        (ValueError, FileNotFoundError),
        share=2,
    ),
    "images in a folder": Target(
        "bytes", pictures, image_file, r"COCO_train2014|pixels|ref_id", (ValueError, FileNotFoundError), share=4
    ),
    "images in Parquet": Target("bytes", pictures, image_column, r"COCO_train2014|pixels|ref_id", share=0.5),
    "rows, Parquet bytes": Target("bytes", lambda: [rows_file(), rows_file()[:-9]], rows, r"rows\.parquet", share=2),
    "rows, provenance": Target("json", lambda: [b'{"fingerprint": "f", "commit": "c"}'], made_of, r"rows\.parquet"),
    "news .bin": Target(
        "bytes",
        lambda: [
            stories.chunk(*examples)
            for examples in (
                [stories.SEE],
                [stories.HSU],
                [stories.SEE, stories.HSU],
            )
        ],
        partial(documents, name="a.bin"),
        r"a\.bin, example \d",
        share=10,
    ),
    "news JSON lines": Target("json", news_json, partial(documents, name="a.jsonl"), r"a\.jsonl, line \d", share=5),
    "vocabulary file": Target(
        "text", encoded(["[PAD]\n[UNK]\n[START]\n[STOP]\na\nb\n"]), vocabulary, r"vocabulary\.txt", share=5
    ),
    "notebook parameters": Target("values", lambda: [json.dumps(DECLARED).encode()], parameters, "parameter", share=6),
    "grid of cells": Target("values", lambda: [json.dumps(GRID).encode()], grid, share=5),
    "pruner names": Target(
        "text",
        encoded(
            [
                "none",
                "random",
                "spatial",
                "visionzip",
                "divprune",
                "prumerge+:anchor=drop",
                "fastervlm",
                "trim:anchor=last,about=expression",
                "trim:lowest=false",
                "text_similarity:about=prompt",
            ]
        ),
        pruners,
        "prun|option|anchor|must|lowest|about",
        share=4,
    ),
    "orders and IDs": Target(
        "text",
        encoded(
            [
                "order shuffled:0.5",
                "ids compressed:3/4@after",
                "ids shifted:100",
                "order raster",
                "ids original@compact",
                "ids shuffled:1e-3",
                "ids compact:1e999999999",
            ]
        ),
        positions,
        "order|IDs|needs|takes|text rule",
        share=10,
    ),
    "shards": Target("text", encoded(["2/5", "1/1", "٢/٥"]), shards, "shard", share=4),
    "model config.json": Target(
        "json",
        model_file("config.json"),
        partial(model, name="config.json"),
        "tiny",
        (ValueError, FileNotFoundError),
        share=0.5,
    ),
    "model safetensors": Target(
        "bytes",
        model_file("model.safetensors"),
        partial(model, name="model.safetensors"),
        "tiny",
        (ValueError, FileNotFoundError),
        share=0.5,
    ),
    "model tokenizer.json": Target(
        "json",
        model_file("tokenizer.json"),
        partial(model, name="tokenizer.json"),
        "tiny",
        (ValueError, FileNotFoundError),
        share=0.3,
    ),
    "model tokenizer_config.json": Target(
        "json",
        model_file("tokenizer_config.json"),
        partial(model, name="tokenizer_config.json"),
        "tiny",
        (ValueError, FileNotFoundError),
        share=0.3,
    ),
    "model preprocessor_config.json": Target(
        "json",
        model_file("preprocessor_config.json"),
        partial(model, name="preprocessor_config.json"),
        "tiny",
        (ValueError, FileNotFoundError),
        share=0.3,
    ),
    "weights .bin": Target("bytes", torch_files, weights, r"weights\.bin", share=4),
}


# Running.


class Result(NamedTuple):
    """outcome: "accepted", "refused" or "finding"; seconds of one core; what was said."""

    outcome: str
    seconds: float
    said: str


def attempt(target: Target, data: bytes, folder: Path) -> Result:
    def hang(*_: Any) -> None:
        raise Hang(f"it took more than {HANG} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    start = time.process_time()
    outcome, said = "accepted", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(data, folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        said = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode()
        clean = type(error) in target.refusals and re.search(target.names, str(error))
        outcome = "refused" if clean else "finding"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    seconds = time.process_time() - start
    if seconds > LIMIT:
        outcome, said = "finding", f"it took {seconds:.1f} s of one core, more than {LIMIT}; {said}"
    return Result(outcome, seconds, said[:2000])


def fuzz(name: str, count: int, seed: int = 0, keep: Path | None = None) -> dict[str, Any]:
    """Run a target on its seeds and on `count` inputs more: one row of the table, and the findings as input -> what was
    said. keep: a file that always holds the input at work, for crashes."""
    target, rng = TARGETS[name], random.Random(f"{seed} {name}")
    seeds, found, times, said = target.seeds(), Counter(), [], Counter()
    findings: dict[bytes, str] = {}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=count, desc=name, leave=False, mininterval=1) as bar:

        def one(data: bytes) -> None:
            if keep:
                keep.write_bytes(data)
            with redirect_stdout(io.StringIO()):
                result = attempt(target, data, Path(folder))
            found[result.outcome] += 1
            times.append((result.seconds, data))
            said[re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "_", result.said)[:150]] += 1
            if result.outcome == "finding":
                findings[data] = result.said
            bar.update()

        for data in seeds:
            one(data)
        times.clear()  # a first run imports and compiles
        for data in seeds:
            one(data)
        for _ in range(max(count // 2 - len(seeds), 0)):
            one(mutated(target, seeds, rng))
        generated = settings(
            max_examples=max(count - count // 2, 1),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        hypothesis.seed(seed)(generated(hypothesis.given(strategy(target, seeds))(one)))()
        while sum(found.values()) - len(seeds) < count:  # where hypothesis has no more to give
            one(mutated(target, seeds, rng))
    worst, slowest = max(times)
    return dict(
        target=name,
        inputs=sum(found.values()),
        accepted=found["accepted"],
        refused=found["refused"],
        findings=found["finding"],
        worst_ms=1000 * worst,
        slowest=slowest,
        failing=findings,
        said=said,
    )


def _alone(name: str, count: int, seed: int, keep: Path) -> dict[str, Any]:
    """`fuzz` in a process of its own, with bounded memory."""
    torch.set_num_threads(1)
    TARGETS[name].seeds()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
    return fuzz(name, count, seed, keep)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together; %(default)s if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name this pattern finds")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir(), "fuzz-findings"),
        help="folder for failing inputs; %(default)s if not given",
    )
    parser.add_argument("--show", action="store_true", help="list what refusals said, with their counts")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="run one input again")
    given = parser.parse_args(arguments)
    if given.replay:
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[given.replay[0]].run(Path(given.replay[1]).read_bytes(), Path(folder))
        return
    chosen = [name for name in TARGETS if re.search(given.only, name)]
    unit = given.inputs / sum(TARGETS[name].share for name in chosen)
    table, bad = [], 0
    for name in tqdm(chosen, "targets"):
        keep = Path(tempfile.mkdtemp(prefix="fuzz-")) / "input"
        count = int(-(-unit * TARGETS[name].share // 1))
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
                row = pool.submit(_alone, name, count, given.seed, keep).result()
        except BrokenProcessPool:
            row = dict(
                target=name,
                inputs=1,
                accepted=0,
                refused=0,
                findings=1,
                worst_ms=0,
                said={},
                failing={keep.read_bytes(): "the process crashed"},
            )
        shutil.rmtree(keep.parent)
        for i, (data, said) in enumerate(list(row["failing"].items())[:20]):
            given.out.mkdir(exist_ok=True)
            file = given.out / f"{'-'.join(re.findall(r'[A-Za-z.]+', name))}-{i}"
            file.write_bytes(data)
            tqdm.write(f"{file}: {said[:300]}")
        if given.show:
            for said, count in sorted(row["said"].items(), key=lambda pair: -pair[1])[:25]:
                tqdm.write(f"{count:6} {said}")
        table.append(row)
        bad += row["findings"]
    shown = pd.DataFrame(table).drop(columns=["failing", "slowest", "said"], errors="ignore")
    total = shown.sum(numeric_only=True).to_dict() | {"target": "all", "worst_ms": shown["worst_ms"].max()}
    print(
        pd.concat([shown, pd.DataFrame([total])]).to_string(
            index=False, float_format="{:.0f}".format, formatters={"target": "{:<30}".format}
        )
    )
    print(f"{bad} findings; limit {LIMIT:g} s of one core per input, {MEMORY >> 30} GiB per target; seed {given.seed}")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
