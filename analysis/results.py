"""Rows on disk: the only writer. Parquet files that are whole or absent, each with the provenance of its numbers.

A long evaluation collects parts in `<out>.parts/`, one small file per finished piece of work, and merges them at the
end. Every file is written under a temporary name and renamed, so a kill at any moment leaves only whole files. A part
is named by its key (`analysis.keys`), so parts of several runs lie side by side, and a run takes and removes only its
own. Nothing that has another key is ever replaced. A run may be dealt out to shards, on as many machines, each with a
file of its own, which `merge_shards` makes into the file of the whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import pandas as pd
import psutil
import pyarrow as pa
from pyarrow import parquet

from analysis import keys
from analysis.params import paths

GROUP = 2**17  # rows that a file's reader and writer hold at a time


def _write(path: Path, tables: Iterable[pa.Table], provenance: dict[str, Any]) -> None:
    """Write tables of the same columns one after the other to a Parquet file in one step, in constant memory.

    How the rows are dealt out to tables does not show in the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = json.dumps(provenance, sort_keys=True).encode()
    torn, writer, waiting = path.with_name(f"{path.name}.{os.getpid()}.tmp"), None, []
    try:
        for table in tables:
            if writer is None:
                schema = table.schema.with_metadata({**(table.schema.metadata or {}), b"provenance": written})
                writer = parquet.ParquetWriter(torn, schema, compression="zstd", write_page_checksum=True)
            waiting.append(table.cast(schema.remove_metadata()).replace_schema_metadata(schema.metadata))
            while sum(part.num_rows for part in waiting) >= GROUP:
                whole = pa.concat_tables(waiting)
                writer.write_table(whole.slice(0, GROUP).combine_chunks(), row_group_size=GROUP)
                waiting = [whole.slice(GROUP)]
        whole = pa.concat_tables(waiting).combine_chunks()
        if whole.num_rows:
            writer.write_table(whole, row_group_size=GROUP)
        writer.close()
        os.replace(torn, path)
    finally:
        if writer is not None and writer.is_open:
            with suppress(OSError):
                writer.close()
        torn.unlink(missing_ok=True)


def write_rows(path: str | Path, rows: pd.DataFrame, provenance: dict[str, Any]) -> None:
    """Write rows to a Parquet file in one step, with provenance (JSON-able) in its metadata.

    The same rows and provenance give the same bytes: put no time and no host name into it.
    """
    _write(Path(path), [pa.Table.from_pandas(rows, preserve_index=False)], provenance)


MOST = 2**24  # rows of one file: a small damaged or hostile file can claim any number, and fill the memory


def _opened(path: Path) -> tuple[parquet.ParquetFile, dict[str, Any]]:
    """A file and its provenance; nothing of its rows is read. FileNotFoundError, or ValueError where it is not ours."""
    if not path.is_file():
        raise FileNotFoundError(f"no rows at {path}; run the notebook that writes them")
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        made = json.loads((file.schema_arrow.metadata or {}).get(b"provenance", b"null"))
        rows = file.metadata.num_rows
    except Exception as error:  # damage makes Arrow raise anything
        raise ValueError(f"{path} is damaged ({error}); delete it and run its notebook again") from error
    if not isinstance(made, dict):
        raise ValueError(f"{path} has no provenance; only files that `write_rows` wrote are read")
    if rows > MOST:
        raise ValueError(f"{path} claims {rows:,} rows; no more than {MOST:,} are read from one file")
    return file, made


def _read(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows and provenance. FileNotFoundError, or ValueError where the file is torn, damaged or not ours."""
    file, made = _opened(path)
    try:
        return file.read().to_pandas(), made
    except Exception as error:  # damage makes Arrow and pandas raise anything
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
    """How the rows of a file were made, without reading them. Errors as for `read_rows`."""
    return _opened(Path(path))[1]


def finished(path: Path, key: str) -> int | None:
    """How many rows of a part have failed; None where it is absent, damaged, or of another key."""
    try:
        rows, made = _read(path)
    except (FileNotFoundError, ValueError):
        return None
    if made.get("fingerprint") != key or "error" not in rows:
        return None
    return int((rows["error"] != "").sum())


def made_before(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds the rows of this key; False where they are still to be made.

    wanted: the provenance that they would get. Rows of which some have failed are to be made anew from their parts.
    Raises ValueError for a file of another key, which is never replaced: it says in what the two differ and what to do.
    """
    if not out.exists():
        return False
    made = provenance(out)
    differ = keys.differences(made, wanted)
    if not differ:
        return not made.get("failed")
    if made.get("failed") and [what.partition(" ")[0] for what in differ] == ["pictures"]:
        return False  # those that could not be read can be now
    raise ValueError(
        f"{out} holds rows of another key, and nothing is replaced: they differ in {'; '.join(differ)}. Give another "
        f"out, or move them away: mv {out} {out.with_name(out.stem + '_old' + out.suffix)}"
    )


def read_back(out: Path) -> pd.DataFrame:
    """The rows of a file that was made before, and a line that says so."""
    print(f"read back from {out}, nothing computed")
    return read_rows(out)


def once(outs: dict[str, Path], given: dict[str, Any], make: Callable[[], dict[str, pd.DataFrame]]) -> dict:
    """Rows that are made in one piece, by kind, or read back where all have been made under the same key.

    outs: {kind: file}; given: what moves them, to which versions and the commit are added; make: gives the rows of each
    kind. Errors as for `made_before`, before anything is made.
    """
    wanted = keys.environment() | given
    wanted["fingerprint"] = keys.fingerprint({name: wanted[name] for name in wanted.keys() - keys.NOT_KEY})
    with ExitStack() as locks:
        for out in outs.values():
            locks.enter_context(locked(out))
        if all([made_before(out, wanted) for out in outs.values()]):
            return {kind: read_back(out) for kind, out in outs.items()}
        found = make()
        for kind, out in outs.items():
            write_rows(out, found[kind], wanted)
            print(f"{out}: {len(found[kind])} rows written")
    return found


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


def check_progress(out: Path, done: int) -> None:
    """Under Slurm, count the starts of a run that have finished no piece of work since the one before.

    done: pieces finished now. RuntimeError at the third such start in a row: a job that runs out of time but advances
    may start as often as it needs, one that does not advance stops before it takes hours again.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return
    note = parts_folder(out) / "starts.json"
    before, idle = json.loads(note.read_text()) if note.is_file() else (-1, 0)
    idle = 0 if done > before else idle + 1
    if idle > 2:
        raise RuntimeError(
            "three starts of this job in a row have finished no piece of work; see their logs. To try again, remove "
            f"{note}"
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps([done, idle]))


def merge(out: Path, parts: Iterable[Path], provenance: dict[str, Any]) -> pd.DataFrame:
    """Write the rows of the parts, in the order given, to `out`, and return them."""
    _write(out, (_opened(part)[0].read() for part in parts), provenance)
    return read_rows(out)


def remove_parts(out: Path, parts: Iterable[Path]) -> None:
    """Remove these parts of a merged `out`; those of other keys stay, and are told of."""
    for part in parts:
        part.unlink(missing_ok=True)
    folder = parts_folder(out)
    for other in (*folder.glob("*.tmp"), *folder.glob("starts.json")):
        other.unlink()
    if left := len(list(folder.glob("*.parquet"))):
        print(f"{left} parts of other keys stay in {folder}; python -m analysis clean lists and removes such parts")
    elif folder.exists():
        folder.rmdir()


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


def merge_shards(out: str | Path, shards: Iterable[str | Path]) -> None:
    """Write the rows of all shards of a run to `out`, the same file to the byte as the run in one piece writes.

    shards: their files, in any order. Rows are sorted by cell, in the order of the run's cells, then by the number of
    the shard, and are otherwise left in their order. Raises FileNotFoundError and ValueError as `read_rows` does, and
    ValueError where a file is no shard, where two are of different runs or the same shard, and where one is missing.
    """
    paths, failed = [Path(path) for path in shards], 0
    if not paths:
        raise ValueError("no shards to merge; give the files of all of them")
    files, commits, dirty, whole, total = {}, set(), set(), {}, 0
    for path in paths:
        file, made = _opened(path)
        if "shard" not in made:
            raise ValueError(f"{path} is no shard, it holds the rows of a whole run")
        number, count = parse_shard(made.pop("shard"))
        made["fingerprint"] = made.pop("whole")
        commits.add(made.pop("commit"))  # does not make another run of it, as when a killed one is resumed
        dirty.add(made.pop("dirty"))
        failed += made.pop("failed")
        whole, total = whole or made, total or count
        differ = sorted(name for name in {*made, *whole} - {"fingerprint"} if made.get(name) != whole.get(name))
        differ += ["number of shards"] if count != total else []
        if differ:
            raise ValueError(f"{path} and {paths[0]} are of different runs: they differ in {', '.join(differ)}")
        if number in files:
            raise ValueError(f"{path} is shard {number}/{count}, which is there already; each shard counts once")
        files[number] = file
    if missing := [f"{number}/{total}" for number in range(1, total + 1) if number not in files]:
        raise ValueError(f"shards {', '.join(missing)} are missing; {out} is written when all {total} are there")
    wanted = whole | {"commit": ", ".join(sorted(commits)), "failed": failed}
    wanted["dirty"] = dirty.pop() if len(dirty) == 1 else True
    if not made_before(Path(out), wanted):
        _write(Path(out), _by_cell([files[number] for number in sorted(files)], whole["cells"]), wanted)
    _claim(Path(out)).unlink(missing_ok=True)


def _by_cell(shards: list[parquet.ParquetFile], cells: list[dict[str, Any]]) -> Iterator[pa.Table]:
    """The rows of shards, each of which is in the order of the cells: cell by cell, and in each the shards in order."""
    names = list(cells[0])
    number = {tuple(cell[name] for name in names): place for place, cell in enumerate(cells)}

    def runs(file: parquet.ParquetFile) -> Iterator[tuple[int, pa.Table]]:
        for batch in file.iter_batches(batch_size=2**14):
            table = pa.Table.from_batches([batch])
            columns = [table[name].to_pylist() for name in names]
            codes = [
                number[tuple(None if value != value else value for value in cell)]
                for cell in zip(*columns, strict=True)
            ]
            start = 0
            for code, run in groupby(codes):
                length = len(list(run))
                yield code, table.slice(start, length)
                start += length

    open_runs = [runs(file) for file in shards]
    heads = [next(run, None) for run in open_runs]
    for place in range(len(cells)):
        for shard, run in enumerate(open_runs):
            while heads[shard] is not None and heads[shard][0] == place:
                yield heads[shard][1]
                heads[shard] = next(run, None)


def _claim(out: Path) -> Path:
    return out.with_name(f".{out.name}.shards")


def claim(out: Path, wanted: dict[str, Any]) -> None:
    """Say what the shards of `out` are made under; ValueError where others of them are being made under another key.

    So a GPU of another kind, or other code, is refused before the work and not when the shards are merged.
    """
    path, facts = _claim(out), {name: value for name, value in wanted.items() if name not in keys.NOT_KEY}
    begun = [*out.parent.glob(f"{out.stem}.*of*{out.suffix}"), *out.parent.glob(f"{out.stem}.*of*{out.suffix}.parts")]
    there = json.loads(path.read_text()) if path.is_file() and begun else facts
    if differ := keys.differences(there, facts):
        raise ValueError(
            f"the shards of {out} that have begun differ from this one in {'; '.join(differ)}, so they could not be "
            f"merged. Run all of them alike; or, if those are not wanted any more, remove {path} and {out.stem}.*of*"
        )
    torn = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    torn.write_text(json.dumps(facts, sort_keys=True))
    os.replace(torn, path)
