"""The command line: python -m analysis ask | compare | report | run | resume | status | clean | doctor | summarize

`run` executes a producer notebook with papermill, as `make paper` does; the executed notebook beside the rows is the
log. Exit codes: 0 all is well, 1 something failed or is not as it should be, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import count
from pathlib import Path

import pandas as pd
import psutil
import yaml
from packaging.requirements import Requirement
from PIL import Image

from analysis import IN_CLONE, ROOT, keys, results

RUNS = ROOT / "papermill_runs"
PRODUCERS = (
    "10_rec_eval",
    "11_cost",
    "12_real_checkpoints",
    "13_attention_rows",
    "20_train_summarizer",
    "21_decode_summaries",
)


def _execute(notebook: str, log: Path, parameters: dict) -> int:
    """Run a producer; its executed copy goes to `log`. 0, or 1 after a failure, whose message is printed."""
    import papermill  # slow to import, and seldom needed
    from papermill.exceptions import PapermillExecutionError

    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{notebook}.ipynb",
            log,
            parameters,
            kernel_name="python3",
            cwd=ROOT,
            log_output=True,
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )
    except PapermillExecutionError as error:
        print(f"\n{error.ename}: {error.evalue}\nThe log is {log}", file=sys.stderr)
        return 1
    print(f"the log is {log}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Make the rows of a parameter file, or of the parameters given."""
    if not IN_CLONE:
        print("notebooks are in a clone of the project, not in the installed package; run this there", file=sys.stderr)
        return 2
    given, folder = {}, RUNS / args.notebook
    if args.key:
        known = {path.stem: path for path in folder.glob("*.yaml")}
        if args.key not in known:
            print(f"{folder} has no {args.key}.yaml; it has: {', '.join(sorted(known)) or 'none'}", file=sys.stderr)
            return 2
        given = yaml.safe_load(known[args.key].read_text()) | {"out": str(folder / f"{args.key}.parquet")}
    names = [name for name, _ in args.parameter]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        print(f"{', '.join(repeated)} is given more than once; give a list: -p {repeated[0]} '[a, b]'", file=sys.stderr)
        return 2
    given |= {name: yaml.safe_load(value) for name, value in args.parameter}
    name = Path(given["out"]).stem if isinstance(given.get("out"), str) else "latest"
    return _execute(args.notebook, folder / f"{name}.ipynb", given)


def _out(parts: Path) -> Path:
    """The file that the parts of a folder are of."""
    return parts.with_name(parts.name.removesuffix(".parts"))


def _unfinished() -> list[Path]:
    """Folders of parts whose file is not there; where it is, they are of other keys, or of rows that have failed."""
    return [parts for parts in sorted(RUNS.rglob("*.parts")) if not _out(parts).exists()]


def resume(args: argparse.Namespace) -> int:
    """Go on with every run that was killed, under the parameters that its log holds."""
    import nbformat

    code = 0
    for parts in _unfinished():
        log = parts.with_name(parts.name.removesuffix(".parquet.parts") + ".ipynb")
        if not log.is_file():
            print(f"{parts} has no log {log.name} that says how it was run; run it again as before", file=sys.stderr)
            code = 1
            continue
        made = nbformat.read(log, as_version=4).metadata.papermill
        print(f"going on with {parts.name.removesuffix('.parts')}")
        code |= _execute(Path(made.input_path).stem, log, dict(made.parameters))
    if not _unfinished() and not code:
        print("nothing is unfinished")
    return code


def status(args: argparse.Namespace) -> int:
    """List the rows that are there, whether they are of this code and these models, and what is unfinished."""
    found = []
    for path in sorted(RUNS.rglob("*.parquet")):
        if path.parent.suffix == ".parts":
            continue
        try:
            rows, changed = results.read_rows(path), keys.outdated(results.provenance(path))
        except ValueError as error:
            found.append(dict(file=path.relative_to(RUNS), state=str(error)))
            continue
        state = f"whole, but made under another key: {'; '.join(changed)}" if changed else "whole"
        about = dict(file=path.relative_to(RUNS), state=state, rows=len(rows), model=", ".join(rows["model"].unique()))
        if "error" in rows:
            about |= dict(images=rows["image_id"].nunique(), failed=(rows["error"] != "").sum())
        found.append(about)
    unfinished = _unfinished()
    for path in sorted(RUNS.rglob("*.parts")):
        count = len(list(path.glob("*.parquet")))
        what = "unfinished" if path in unfinished else "whole; beside it"
        found.append(dict(file=path.relative_to(RUNS), state=f"{what}, {count} parts"))
    print(
        pd.DataFrame(found, dtype=object).fillna("").to_string(index=False)
        if found
        else f"no rows in {RUNS}; make paper writes them"
    )
    return int(any(not about["state"].startswith("whole") for about in found))


def clean(args: argparse.Namespace) -> int:
    """List the parts of runs that were not finished, or of other keys than their file's, and remove them on a yes."""
    folders = sorted(RUNS.rglob("*.parts"))
    if not folders:
        print(f"no parts in {RUNS}")
    for folder in folders:
        parts = sorted(folder.glob("*.parquet"))
        size = sum(part.stat().st_size for part in parts) / 1e6
        runs: dict[str, int] = {}
        for part in parts:
            try:
                of = json.dumps(results.provenance(part).get("of", "a run of an earlier version"))
            except (ValueError, FileNotFoundError):
                of = "damaged"
            runs[of] = runs.get(of, 0) + 1
        state = "beside its whole file" if _out(folder).exists() else "UNFINISHED: the run would go on from them"
        print(f"{folder.relative_to(RUNS)}: {len(parts)} parts, {size:.1f} MB, {state}")
        for of, many in runs.items():
            print(f"  {many} of {of}")
        if not args.yes and input("remove them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("  kept")
            continue
        try:
            with results.locked(_out(folder), wait=0):
                for part in parts:
                    part.unlink(missing_ok=True)
                if not any(folder.iterdir()):
                    folder.rmdir()
            print("  removed")
        except RuntimeError as error:
            print(f"  kept: {error}")
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Check versions, device, memory, disk, weights and data; say what to do about what is wrong."""
    from analysis.models import MODELS, load
    from analysis.rec import datasets

    wrong = 0

    def check(what: str, right: bool, seen: str, remedy: str = "") -> None:
        nonlocal wrong
        wrong += not right
        print(f"{'ok   ' if right else 'WRONG'} {what}: {seen}" + ("" if right else f"; {remedy}"))

    check("python", sys.version_info >= (3, 11), platform.python_version(), "3.11 or newer is needed")
    extras = ("", "figures", "notebooks", "summarization", "paper", "test") if IN_CLONE else ("",)
    for wanted in map(Requirement, requires("analysis") or ()):
        if wanted.name == "analysis" or not any(
            wanted.marker is None or wanted.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        try:
            seen = version(wanted.name)
        except PackageNotFoundError:
            seen = "missing"
        check(
            wanted.name,
            seen != "missing" and wanted.specifier.contains(seen, prereleases=True),
            seen,
            f"pip install '{wanted.name}{wanted.specifier}'",
        )
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, the CPU works"
    check("device", True, f"{gpu}; {torch.get_num_threads()} threads")
    free, disk = psutil.virtual_memory().available / 1e9, shutil.disk_usage(ROOT).free / 1e9
    check("memory", free > 2, f"{free:.1f} GB free", "the tiny models take 2 GB")
    check("disk", disk > 1, f"{disk:.1f} GB free", "rows and figures take 1 GB")
    for name in MODELS:
        try:
            check(name, True, load(name, device="cpu").revision)
        except (OSError, ValueError, MemoryError) as error:
            check(name, False, str(error), "see its folder")
    try:
        check("RefStamps", len(datasets.load("refstamps", "val", 1).rows) > 0, "drawn")
    except (OSError, ValueError) as error:
        check("RefStamps", False, str(error), "git checkout -- analysis/refstamps/stamps")
    files, old = sorted(RUNS.glob("*/*.parquet")), {}
    for file in files:
        try:
            changed = keys.outdated(results.provenance(file))
        except ValueError as error:
            changed = [str(error)]
        if changed:
            old[file.name] = "; ".join(changed)
    check(
        "rows",
        not old,
        f"{len(files)} files, {len(old)} of them made under another key than the present one"
        + "".join(f"\n        {name}: {why}" for name, why in list(old.items())[:3]),
        "make paper makes those of the paper anew; python -m analysis status lists them all",
    )
    print("all is well" if not wrong else f"{wrong} things are wrong")
    return int(wrong > 0)


def summarize(args: argparse.Namespace) -> int:
    """Summarize a text with an embedded summarizer, which knows only the words of the generated news. It shows what the
    second paper's systems do; of a text whose words it does not know it extracts sentences, and writes no abstract."""
    from analysis.summarization import systems

    try:
        document = systems.article(args.article)
        system = systems.load(args.system, args.seed)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    [found] = systems.summarize(system, [document])
    share, most = systems.unknown(system, document), systems.MOST_UNKNOWN
    if share <= most:
        for said in found.sentences:
            print(" ".join(said))
        print()
    else:
        print(
            f"no abstract: {share:.0%} of the words read are not among the {len(system.vocabulary):,} of the generated "
            f"news that this small model knows, and it could only string copies together (the limit is {most:.0%})"
        )
    best = sorted(range(len(found.beta)), key=lambda number: -found.beta[number])[:3]
    print("extracted sentences:" if share <= most else "extracted sentences, the three best at least:")
    for number in sorted({*found.extracted, *(best if share > most else [])}):
        print(f"  {number + 1} (beta {found.beta[number]:.2f}): {' '.join(document.article[number])}")
    if share <= most:
        print(f"\nR_inc {found.r_inc:.2f} (attention at random: {found.chance:.2f})")
    print(
        f"note: the model knows the {len(system.vocabulary):,} commonest words of the generated news; {share:.0%} of "
        f"the words read are others, which it can only copy. It reads the first {system.limits['max_words']} words and "
        f"{system.limits['max_sentences']} sentences.",
        file=sys.stderr,
    )
    return 0


def _split(values: list[str]) -> list[str]:
    """Values given apart or with commas between them."""
    return [part for value in values for part in value.split(",") if part]


def _shares(values: list[str]) -> list[float | None]:
    """Keep ratios; none: the method's own rule. Raises ValueError for what is neither."""
    try:
        return [None if part == "none" else float(part) for part in _split(values)]
    except ValueError as error:
        raise ValueError(f"--keep takes shares such as 0.25, or none for a method's own rule: {error}") from error


def ask(args: argparse.Namespace) -> int:
    """Say where in a picture an expression is, unpruned and under every setting given, and draw it. Needs no ground
    truth. Without --out, a picture is never overwritten."""
    from tqdm import tqdm

    from analysis import models
    from analysis.engine.evaluate import cells
    from analysis.tools import ask as asking

    try:
        asked = asking.pairs(args.asked)
        grid = cells("none") + cells(args.pruner, _shares(args.keep), args.order, _split(args.ids), args.seed)
        model = models.load(args.model)
        asking.check(model, grid)
    except (OSError, ValueError, MemoryError) as error:
        print(error, file=sys.stderr)
        return 2
    found, failed = [], 0
    for path, expression in tqdm(asked, unit="picture", disable=len(asked) < 2):
        try:
            picture = asking.read_picture(path)
            found.append((path, expression, asking.answers(model, picture, expression, grid, path.stem)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed += 1
    if not found:
        return 1
    print(asking.table(found).to_string(index=False))
    if model.name in models.MODELS:
        print(
            f"note: {model.name} was trained on RefStamps scenes only; on a photograph its boxes show how settings "
            "differ, not where things are. python -m analysis.models lists models that read photographs: --model",
            file=sys.stderr,
        )
    out = args.out or next(
        path for i in count(1) if not (path := Path(f"boxes-{i}.png" if i > 1 else "boxes.png")).exists()
    )
    try:
        asking.draw(found, f"{model.name}, seed {args.seed}").savefig(out, dpi=200)
    except (ModuleNotFoundError, OSError, ValueError) as error:  # matplotlib raises ValueError on an unknown suffix
        print(error, file=sys.stderr)
        return 1
    print(f"drawn: {out}")
    return int(failed > 0)


def compare(args: argparse.Namespace) -> int:
    """Compare pruning methods, one's own (file.py:function) among them: rows, paired differences with intervals and
    tests, and a figure, in a folder of its own."""
    from analysis import models
    from analysis.engine.evaluate import cells
    from analysis.rec import datasets
    from analysis.tools import compare as comparing

    try:
        keep, ids = _shares(args.keep), _split(args.ids)
        cells(args.pruner, keep, ids=ids, seeds=args.seed)  # what is misspelt is said before a model is loaded
        where = dict(annotations=args.annotations, images=args.images)
        data = datasets.load(args.dataset, args.split, args.limit, **where)
        model = models.load(args.model)
        options = dict(keep=keep, ids=ids, seed=args.seed, batch_size=args.batch_size)
        out = comparing.compare(model, data, args.pruner, args.out, **options)
    except (OSError, ValueError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\nall of it is in {out}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Gather all figures and tables that are there, with captions and how they were made, in one page that opens from
    disk without a network. Exit code 1: some are missing; they are listed, and the page has the others."""
    try:
        from analysis.tools import report as reporting

        missing = reporting.write(args.out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(*missing, sep="\n", end="\n" * bool(missing), file=sys.stderr)
    print(f"written: {args.out}")
    return int(bool(missing))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    runs = command("run", run)
    runs.add_argument("key", nargs="?", help="name of a parameter file in papermill_runs/<notebook>/, such as fig1")
    runs.add_argument("--notebook", choices=PRODUCERS, default=PRODUCERS[0], help="default: %(default)s")
    runs.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebook, as in papermill; VALUE is read as YAML: -p keep '[0.25, 0.5]'",
    )
    for name, function in (("resume", resume), ("status", status), ("doctor", doctor)):
        command(name, function)
    asked = command("ask", ask)
    asked.add_argument("asked", nargs="+", help="pictures, then an expression; or a CSV file with image and expression")
    asked.add_argument("--model", default="tiny-llava", help="as in python -m analysis.models; default: %(default)s")
    asked.add_argument("--pruner", nargs="+", default=["fastervlm"], help="one or several; default: fastervlm")
    asked.add_argument("--keep", nargs="+", default=["0.25"], help="share of the visual tokens kept; default: 0.25")
    asked.add_argument("--order", default="method", help="of the kept tokens; default: %(default)s")
    asked.add_argument("--ids", nargs="+", default=["original,compact"], help="position IDs; default: original,compact")
    asked.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    asked.add_argument("--out", type=Path, help="the drawing; default: boxes.png, or the next free boxes-2.png")
    compared = command("compare", compare)
    compared.add_argument("pruner", nargs="+", help="methods: names, or file.py:function; the first against the others")
    compared.add_argument("--model", default="tiny-llava", help="as in python -m analysis.models; default: %(default)s")
    compared.add_argument("--keep", nargs="+", default=["0.5", "0.25"], help="shares of tokens kept; default: 0.5 0.25")
    compared.add_argument("--ids", nargs="+", default=["compact,original"], help="default: compact,original")
    compared.add_argument("--dataset", default="refstamps", help="default: %(default)s")
    compared.add_argument("--split", default="val", help="default: %(default)s")
    compared.add_argument("--limit", type=int, default=100, help="images; default: %(default)s")
    compared.add_argument("--annotations", help="of RefCOCO: a file or folder; default: downloaded")
    compared.add_argument("--images", help="of RefCOCO: folder of COCO train2014")
    compared.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    compared.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    compared.add_argument("--out", type=Path, help="a folder; default: compare_<methods>_<data>")
    reported = command("report", report)
    reported.add_argument("--out", type=Path, default=Path("report.html"), help="default: %(default)s")
    cleaned = command("clean", clean)
    cleaned.add_argument("--yes", action="store_true", help="remove all of them without asking")
    texts = command("summarize", summarize)
    texts.add_argument("article", help="a text file; - reads standard input")
    texts.add_argument(
        "--system",
        default="end-to-end-5-inc",
        help="pointer-generator, two-stage, end-to-end-5 (without L_inc), ...; default: %(default)s",
    )
    texts.add_argument("--seed", type=int, default=0, help="of its training: 0, 1 or 2; default: %(default)s")
    args = parser.parse_args(argv)
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
