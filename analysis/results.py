"""Rows on disk: the only writer. Parquet files that are whole or absent, each with the provenance of its numbers.

A long evaluation collects parts in `<out>.parts/`, one small file per finished piece of work, and merges them at the
end. Every file is written under a temporary name and renamed, so a kill at any moment leaves only whole files. A part
carries the fingerprint of its run; one of another run, or a damaged one, counts as missing. A run may be dealt out to
shards, on as many machines, each with a file of its own, which `merge_shards` makes into the file of the whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd
import psutil
import pyarrow as pa
from pyarrow import parquet

from analysis.params import paths


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


def answered(rows: pd.DataFrame | str | list[str]) -> pd.DataFrame:
    """Rows for a figure or table, from files as `params.paths` takes them: without the expressions that failed.

    An expression that failed in one cell is left out of all cells of its model and split, so that cells stay paired;
    how many these are, and why, is printed. Raises what `read_rows` raises.
    """
    rows = rows if isinstance(rows, pd.DataFrame) else read_rows(paths(rows))
    if "error" not in rows or not (failed := rows["error"] != "").any():
        return rows
    expression = pd.MultiIndex.from_frame(
        rows[[name for name in ("model", "dataset", "split", "image_id", "ref_id", "sent_id") if name in rows]]
    )
    out = expression.isin(expression[failed])
    reasons = [f"{count} x {reason}" for reason, count in rows.loc[failed, "error"].value_counts().head(5).items()]
    print(
        f"{failed.sum()} of {len(rows)} rows have failed; {expression[failed].nunique()} of {expression.nunique()} "
        f"expressions are left out of all cells and of n: {'; '.join(reasons)}"
    )
    return rows[~out].reset_index(drop=True)


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


def _holder(path: Path) -> tuple[str, int]:
    """Host and process that a lock file names; ("", 0) where it names none."""
    try:
        host, process = path.read_text().split()
        return host, int(process)
    except (OSError, ValueError):
        return "", 0


def _try_lock(path: Path) -> IO | Path | None:
    """Lock a file and write this host and process into it; None while another process holds it.

    Where the file system knows no `flock`, a second file beside it, which only one process can create, stands for the
    lock. It outlives a kill, so it is taken over from a process that is dead, as far as this host can tell.
    """
    mine = f"{socket.gethostname()} {os.getpid()}"
    handle = path.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    except OSError:  # ENOSYS, ENOLCK, ENOTSUP
        handle.close()
        held = path.with_name(f"{path.name}.held")
        host, process = _holder(held)
        if host == socket.gethostname() and not psutil.pid_exists(process):
            held.unlink(missing_ok=True)
        try:
            with held.open("x") as created:
                created.write(mine)
        except FileExistsError:
            path.write_text(held.read_text())
            return None
        return held
    handle.truncate(0)
    handle.write(mine)
    handle.flush()
    return handle


@contextmanager
def locked(out: Path, wait: float | None = None) -> Iterator[None]:
    """Hold `out` for this process, until it ends in whatever way.

    wait: seconds to wait for another process that holds it; None takes the environment's ROWS_WAIT, or 0. RuntimeError,
    with the other's host and process and the way out, when it still does.
    """
    wait = float(os.environ.get("ROWS_WAIT", 0)) if wait is None else wait
    out.parent.mkdir(parents=True, exist_ok=True)
    path, begun = out.with_name(f".{out.name}.lock"), time.monotonic()
    while (lock := _try_lock(path)) is None:
        host, process = _holder(path)
        who = f"process {process} on {host}" if host else "a process that does not name itself"
        if time.monotonic() - begun >= wait:
            held = path.with_name(f"{path.name}.held")
            file = held if held.exists() else path
            raise RuntimeError(
                f"another process is working on {out}: {who}, by {file}. Wait for it, or give another file; if no such "
                f"process runs there any more, remove {file}"
            )
        time.sleep(min(1, wait))
    try:
        yield
    finally:
        if isinstance(lock, Path):
            lock.unlink(missing_ok=True)
        else:
            lock.truncate(0)
            lock.close()


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
    tables, commits, dirty, whole, total = {}, set(), False, {}, 0
    for path in paths:
        rows, made = _read(path)
        if "shard" not in made:
            raise ValueError(f"{path} is no shard, it holds the rows of a whole run")
        number, count = parse_shard(made.pop("shard"))
        made["fingerprint"] = made.pop("whole")
        commits.add(made.pop("commit"))  # does not make another run of it, as when a killed one is resumed
        dirty |= made.pop("dirty") is not False
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
    write_rows(out, rows, whole | {"commit": ", ".join(sorted(commits)), "dirty": dirty})
    return rows
