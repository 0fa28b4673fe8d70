"""Rows on disk: the only writer. Parquet files that are whole or absent, each with the provenance of its numbers.

A long evaluation collects parts in `<out>.parts/`, one small file per finished piece of work, and merges them at the
end. Every file is written under a temporary name and renamed, so a kill at any moment leaves only whole files. A part
carries the fingerprint of its run; one of another run, or a damaged one, counts as missing. A run may be dealt out to
shards, on as many machines, each with a file of its own, which `merge_shards` makes into the file of the whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import parquet

from analysis import IN_CLONE, ROOT


def fingerprint(facts: Any) -> str:
    """16 hex digits that name JSON-able facts; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def environment() -> dict[str, str]:
    """What of the surroundings can move a number: git commit ("unknown" outside a clone) and versions."""
    commit = "unknown"
    if IN_CLONE:  # a wheel may lie in somebody else's repository
        with suppress(OSError, subprocess.CalledProcessError):
            commit = subprocess.run(
                ["git", "rev-parse", "--verify", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
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
        rows, made = table.to_pandas(), json.loads((table.schema.metadata or {}).get(b"provenance", b"null"))
    except Exception as error:  # damage makes Arrow and pandas raise anything
        raise ValueError(f"{path} is damaged ({error}); delete it and run its notebook again") from error
    if not isinstance(made, dict):
        raise ValueError(f"{path} has no provenance; only files that `write_rows` wrote are read")
    return rows, made


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


def parse_shard(shard: str) -> tuple[int, int]:
    """Number and count of a shard: "2/5", the second of five, is (2, 5). ValueError for what is none."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"a shard is given as number/count, such as 2/5 for the second of five; got {shard!r}")
    return number, count


def shard_path(out: str | Path, shard: str) -> Path:
    """Where the rows of a shard of `out` go: rows.2of5.parquet beside rows.parquet, and `out` itself for "1/1"."""
    out, (number, count) = Path(out), parse_shard(shard)
    return out if count == 1 else out.with_name(f"{out.stem}.{number}of{count}{out.suffix}")


def merge_shards(out: str | Path, shards: Iterable[str | Path]) -> pd.DataFrame:
    """Write the rows of all shards of a run to `out`, the same file to the byte as the run in one piece writes.

    shards: their files, in any order. Rows are sorted by cell, in the order of the run's cells, then by the number of
    the shard, and are otherwise left in their order. Raises FileNotFoundError and ValueError as `read_rows` does, and
    ValueError where a file is no shard, where two are of different runs or the same shard, and where one is missing.
    """
    paths = [Path(path) for path in shards]
    if not paths:
        raise ValueError("no shards to merge; give the files of all of them")
    tables, commits, whole, total = {}, set(), {}, 0
    for path in paths:
        rows, made = _read(path)
        if "shard" not in made:
            raise ValueError(f"{path} is no shard, it holds the rows of a whole run")
        number, count = parse_shard(made.pop("shard"))
        made["fingerprint"] = made.pop("whole")
        commits.add(made.pop("commit"))  # does not make another run of it, as when a killed one is resumed
        whole, total = whole or made, total or count
        differ = sorted(name for name in {*made, *whole} - {"fingerprint"} if made.get(name) != whole.get(name))
        differ += ["number of shards"] if count != total else []
        if differ:
            raise ValueError(f"{path} and {paths[0]} are of different runs: they differ in {', '.join(differ)}")
        if number in tables:
            raise ValueError(f"{path} is shard {number}/{count}, which is there already; each shard counts once")
        tables[number] = rows
    if missing := [f"{number}/{total}" for number in range(1, total + 1) if number not in tables]:
        raise ValueError(f"shards {', '.join(missing)} are missing; {out} is written when all {total} are there")
    rows = pd.concat([tables[number] for number in sorted(tables)], ignore_index=True)
    cell = rows.groupby(list(whole["cells"][0]), dropna=False, sort=False).ngroup()  # in order of first appearance
    rows = rows.iloc[cell.argsort(kind="stable")].reset_index(drop=True)
    write_rows(out, rows, whole | {"commit": ", ".join(sorted(commits))})
    return rows
