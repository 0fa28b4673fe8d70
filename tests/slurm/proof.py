"""Runs in shards through profiles/slurm on a real Slurm: `make slurm-test`, which starts a Slurm where none runs.

Not part of `make test`. Works in a copy of the project in runs/slurm/, which all nodes must see; there is the log, too.
SLURM_TEST="--default-resources slurm_account=mine mem_mb=4000" hands a cluster's own flags to Snakemake.
"""

import os
import shlex
import shutil
import subprocess
import time

import pytest

from analysis import ROOT
from analysis.results import parts_folder, provenance, read_rows, shard_path

FOLDER = ROOT / "runs/slurm"
SMOKE = "papermill_runs/10_rec_eval/smoke.parquet"
BEGUN = time.monotonic()
# stands before papermill on the jobs' PATH: notes which Slurm job starts which shard, and lets one fail the first time
PAPERMILL = """#!/usr/bin/env bash
shard=$(grep -o '[0-9]*of[0-9]*' <<<"$*" | head -1)
echo "$SLURM_JOB_ID" >>"starts.$shard"
[ "$shard" = "$FAILS_ONCE" ] && [ "$(wc -l <"starts.$shard")" = 1 ] && { echo "failing once, on purpose"; exit 1; }
exec PAPERMILL "$@"
"""


def say(text):
    """A line of the log, with the seconds since the beginning."""
    line = f"{time.monotonic() - BEGUN:5.0f} s  {text}"
    print(line, flush=True)
    with open(FOLDER / "log.txt", "a") as log:
        print(line, file=log)


def copy(name):
    """A copy of the project without its rows, for one run."""
    folder = FOLDER / name
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for file in files:
        wanted = not file.startswith(("papermill_runs/", "figures/")) or file == SMOKE.replace("parquet", "yaml")
        if wanted and (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    (folder / "bin").mkdir()
    (folder / "bin/papermill").write_text(PAPERMILL.replace("PAPERMILL", shutil.which("papermill")))
    (folder / "bin/papermill").chmod(0o755)
    return folder


def snakemake(folder, *flags, **env):
    """Start Snakemake in a copy; its output goes to snakemake.log there."""
    paths = {
        "PYTHONPATH": str(folder),
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "GIT_CEILING_DIRECTORIES": str(FOLDER),
    }  # a commit meanwhile would be seen in the provenance
    env = os.environ | paths | {"FAILS_ONCE": "none"} | env
    return subprocess.Popen(
        ["snakemake", *flags], cwd=folder, env=env, stdout=open(folder / "snakemake.log", "w"), stderr=subprocess.STDOUT
    )


def on_slurm(folder, *flags, **env):
    return snakemake(
        folder,
        *flags,
        "--profile",
        "profiles/slurm",
        "--slurm-init-seconds-before-status-checks",
        "3",
        "--latency-wait",
        "20",
        *shlex.split(os.environ.get("SLURM_TEST", "")),
        **env,
    )


def ended_well(process, folder):
    code = process.wait(timeout=3600)
    assert code == 0, (folder / "snakemake.log").read_text()[-5000:]


def starts(folder, shard):
    """The Slurm job of each start of a shard."""
    return (folder / f"starts.{shard}").read_text().split()


@pytest.fixture(scope="module")
def runs():
    """All runs, side by side: {name: (process, folder)}."""
    if not shutil.which("sinfo"):
        pytest.fail("no Slurm here; `make slurm-test` starts one for the test")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    say(subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=True).stdout.strip())
    folders = {name: copy(name) for name in ("faults", "plain", "local", "real", "real-local")}
    real = [
        "real",
        "--config",
        "model=tiny-llava",
        "dataset=refstamps",
        "splits=[val]",
        "limit=2",
        "pruner=[random]",
        "gpu=0",
    ]
    started = {
        "faults": on_slurm(folders["faults"], SMOKE, "--config", "shards=4", FAILS_ONCE="1of4"),
        "plain": on_slurm(folders["plain"], SMOKE, "--config", "shards=2"),
        "local": snakemake(folders["local"], SMOKE, "--cores", "1"),
        "real": on_slurm(
            folders["real"],
            *real,
            "shards=2",
            "--set-resources",
            "real_checkpoints:mem_mb=4000",
            "real_checkpoints:runtime=60",
        ),
        "real-local": snakemake(folders["real-local"], *real, "--cores", "1"),
    }
    return {name: (process, folders[name]) for name, process in started.items()}


@pytest.fixture(scope="module")
def faults(runs):
    """The run whose jobs fail: one by itself, the others while they work."""
    process, folder = runs["faults"]
    harm = {
        "2of4": ("cancelled", "scancel {}"),
        "3of4": ("killed by SIGKILL", "scancel --signal=KILL {}.0"),
        "4of4": ("requeued", "scontrol requeue {}"),
    }
    while harm:
        assert process.poll() is None, (folder / "snakemake.log").read_text()[-5000:]
        time.sleep(0.02)
        for shard in list(harm):
            out = shard_path(folder / SMOKE, shard.replace("of", "/"))
            if parts := len(list(parts_folder(out).glob("*.parquet"))):
                (done, command), job = harm.pop(shard), starts(folder, shard)[-1]
                subprocess.run(command.format(job).split(), check=True)
                say(f"shard {shard}: job {job} {done} ({command.format(job)}) with {parts} of its pieces of work done")
    return process, folder


@pytest.fixture(scope="module")
def one_run(runs, faults):
    """The file of a run in one piece, without Slurm."""
    process, folder = runs["local"]
    ended_well(process, folder)
    say(f"one run without Slurm: {len(read_rows(folder / SMOKE))} rows")
    return folder / SMOKE


def test_two_shards_give_the_rows_of_one_run(runs, one_run):
    process, folder = runs["plain"]
    ended_well(process, folder)
    jobs = [starts(folder, shard) for shard in ("1of2", "2of2")]
    assert [len(each) for each in jobs] == [1, 1]
    assert (folder / SMOKE).read_bytes() == one_run.read_bytes()
    assert [path.name for path in (folder / SMOKE).parent.glob("[!.]*.parquet*")] == ["smoke.parquet"]
    say(f"two shards, Slurm jobs {jobs[0][0]} and {jobs[1][0]}: the same {one_run.stat().st_size} bytes")


def test_jobs_that_fail_are_cancelled_killed_or_requeued(faults, one_run):
    process, folder = faults
    ended_well(process, folder)
    for shard in ("1of4", "2of4", "3of4", "4of4"):
        first, second = starts(folder, shard)
        again = "the same job, restarted by Slurm" if first == second else "a new job, submitted by Snakemake"
        say(f"shard {shard}: started twice, job {first}, then {second} ({again}), and ended well")
        assert (first == second) == (shard == "4of4")
    assert (folder / SMOKE).read_bytes() == one_run.read_bytes()
    say(f"all four shards: the same {one_run.stat().st_size} bytes as without Slurm")


def test_the_target_of_real_checkpoints(runs):
    """With an embedded model and two images instead of a GPU and 57,457 expressions."""
    made = []
    for name in ("real", "real-local"):
        process, folder = runs[name]
        ended_well(process, folder)
        made.append(folder / "papermill_runs/12_real_checkpoints/tiny-llava_refstamps_val.parquet")
    assert made[0].read_bytes() == made[1].read_bytes() and len(provenance(made[0])["cells"]) == 3
    say(f"real checkpoints, two shards: the same {made[0].stat().st_size} bytes as in one run without Slurm")
