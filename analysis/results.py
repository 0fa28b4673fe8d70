"""Rows on disk: the only writer. Parquet files that are whole or absent, each with the provenance of its numbers.

A long evaluation collects parts in `<out>.parts/`, one small file per finished piece of work, and merges them at the
end. Every file is written under a temporary name and renamed, so a kill at any moment leaves only whole files. A part
carries the fingerprint of its run; one of another run, or a damaged one, counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import parquet

from analysis import ROOT


def fingerprint(facts: Any) -> str:
    """16 hex digits that name JSON-able facts; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def environment() -> dict[str, str]:
    """What of the surroundings can move a number: git commit ("unknown" outside a repository) and versions."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--verify", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"commit": commit, "python": platform.python_version(), **versions}


def write_rows(path: str | Path, rows: pd.DataFrame, provenance: dict[str, Any]) -> None:
    """Write rows to a Parquet file in one step, with provenance (JSON-able) in its metadata.

    The same rows and provenance give the same bytes: put no time and no host name into it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(rows, preserve_index=False)
    written = json.dumps(provenance, sort_keys=True).encode()
    table = table.replace_schema_metadata({**table.schema.metadata, b"provenance": written})
    torn = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        parquet.write_table(table, torn, compression="zstd", write_page_checksum=True)
        os.replace(torn, path)
    finally:
        torn.unlink(missing_ok=True)


def _read(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows and provenance. FileNotFoundError, or ValueError where the file is torn, damaged or not ours."""
    if not path.is_file():
        raise FileNotFoundError(f"no rows at {path}; run the notebook that writes them")
    try:
        table = parquet.ParquetFile(path, page_checksum_verification=True).read()
        return table.to_pandas(), json.loads(table.schema.metadata[b"provenance"])
    except KeyError:
        raise ValueError(f"{path} has no provenance; only files that `write_rows` wrote are read") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run its notebook again") from error


def read_rows(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """The rows of one or several files, one after the other.

    Raises FileNotFoundError, and ValueError for no path, a damaged file and files whose columns differ.
    """
    paths = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    if not paths:
        raise ValueError("no files to read rows from; give at least one path")
    tables = [_read(path)[0] for path in paths]
    for path, table in zip(paths, tables):
        if differ := set(table.columns) ^ set(tables[0].columns):
            raise ValueError(f"{path} and {paths[0]} differ in the columns {', '.join(sorted(differ))}")
    return pd.concat(tables, ignore_index=True)


def provenance(path: str | Path) -> dict[str, Any]:
    """How the rows of a file were made. Errors as for `read_rows`."""
    return _read(Path(path))[1]


def finished(path: Path, key: str) -> pd.DataFrame | None:
    """The rows of a whole file whose provenance carries this fingerprint, otherwise None."""
    try:
        rows, made = _read(path)
    except (FileNotFoundError, ValueError):
        return None
    return rows if made.get("fingerprint") == key else None


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold `out` for this process, until it ends in whatever way. RuntimeError while another one holds it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise RuntimeError(f"another process is working on {out}; wait for it, or give another file") from None


def parts_folder(out: Path) -> Path:
    """Where the parts of `out` lie until it is merged."""
    return out.with_name(f"{out.name}.parts")


def merge(out: Path, parts: Iterable[Path], provenance: dict[str, Any]) -> pd.DataFrame:
    """Write the rows of the parts, in the order given, to `out`, and return them."""
    rows = read_rows(parts)
    write_rows(out, rows, provenance)
    return rows


def remove_parts(out: Path) -> None:
    """Remove the parts of a merged `out`, if there are any."""
    if parts_folder(out).exists():
        shutil.rmtree(parts_folder(out))
