"""The Snakefile: what makes a job stale, what a run removes, and what happens after a kill.

In a copy of the project whose papermill only notes that it was called and writes what the job should write.
"""

import json
import os
import re
import subprocess
import sys
import time
from base64 import urlsafe_b64encode

import pytest

from analysis import ROOT, results

PAPERMILL = """#!{python}
import json, sys
from pathlib import Path
given = dict(zip(sys.argv[1:], sys.argv[2:]))
parameters = json.loads(given.get("-y", "{{}}"))
notebook = Path(sys.argv[1]).stem
out = parameters.get("out", notebook)
with open("calls", "a") as calls:
    calls.write(json.dumps([notebook, parameters]) + "\\n")
if notebook[:3] in ("fig", "tab"):
    files = [f"figures/{{notebook}}.{{kind}}" for kind in ("pdf", "png", "tex", "html", "csv", "txt", "caption.tex")]
elif notebook == "12_real_checkpoints":
    name = f"{{parameters['model']}}_{{parameters['dataset']}}"
    files = [f"{{out}}/{{name}}_{{split}}.parquet" for split in parameters["splits"]]
else:
    files = [out]
for file in files:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("made")
"""
TARGETS = ["figures/fig1_collapse.pdf", "figures/tab1_methods.tex"]


class Project:
    """A copy of the project's code, notebooks and parameter files."""

    def __init__(self, folder):
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            wanted = name.endswith(
                (
                    ".py",
                    ".ipynb",
                    ".yaml",
                    "Snakefile",
                    "config.json",
                    "probe.csv",
                    "/log.csv",
                    "testbed_design/rows.parquet",
                )
            )
            if wanted and not name.startswith("tests/") and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / "bin").mkdir()
        (folder / "bin/papermill").write_text(PAPERMILL.format(python=sys.executable))
        (folder / "bin/papermill").chmod(0o755)

    def run(self, *arguments):
        """What Snakemake says and its exit code; the notebooks that were run are in `calls`."""
        (self.folder / "calls").unlink(missing_ok=True)
        env = os.environ | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(self.folder)}
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--cores", "2", *arguments],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
        )
        calls = self.folder / "calls"
        self.calls = [json.loads(line) for line in calls.read_text().splitlines()] if calls.is_file() else []
        return done.returncode, done.stdout + done.stderr

    def made(self, *arguments):
        code, said = self.run(*(arguments or TARGETS))
        assert code == 0, said[-3000:]
        return sorted(notebook for notebook, _ in self.calls)

    def edit(self, name, old, new):
        file = self.folder / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    project = Project(tmp_path_factory.mktemp("project"))
    for name in (*TARGETS, "papermill_runs/10_rec_eval/fig1.parquet"):  # as git brings them along
        (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (project.folder / name).write_text("tracked")
    for name in (
        "figures/mine.pdf",
        "papermill_runs/10_rec_eval/mine.parquet",
        "papermill_runs/12_real_checkpoints/llava.parquet",
    ):
        (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (project.folder / name).write_text("GPU hours")
    ten = ["10_rec_eval"] * 9
    assert project.made() == [*ten, "fig1_collapse", "tab1_methods"]  # all is made anew, nothing else is removed
    return project


def test_the_first_run_of_a_clone_removes_only_what_it_makes_again(project):
    for name in (
        "figures/mine.pdf",
        "papermill_runs/10_rec_eval/mine.parquet",
        "papermill_runs/12_real_checkpoints/llava.parquet",
    ):
        assert (project.folder / name).read_text() == "GPU hours"
    assert (project.folder / TARGETS[0]).read_text() == "made"
    consumer = dict(project.calls)["tab1_methods"]
    assert consumer["out"] == "tab1_methods" and len(consumer["rows"]) == 8
    assert "Makefile" in os.listdir(ROOT) and not re.search(
        r"rm .*(parquet|figures/\*)", (ROOT / "Makefile").read_text()
    )


def test_what_a_later_pull_brings_is_made_anew(project):
    records = project.folder / ".snakemake/metadata"
    (records / urlsafe_b64encode(b"papermill_runs/10_rec_eval/fig1.parquet").decode()).unlink()
    (project.folder / "papermill_runs/10_rec_eval/fig1.parquet").write_text("pulled")
    assert project.made() == ["10_rec_eval", "fig1_collapse"]
    assert project.made() == []


def test_each_consumer_takes_what_the_graph_gives_it(project):
    """The first cells of every figure and table, run with the parameters that `make paper` gives."""
    code, said = project.run("--dry-run", "--forceall")
    assert code == 0, said[-3000:]
    given = dict(re.findall(r"papermill notebooks/((?:fig|tab)\w+)\.ipynb .* -y '(\{.*?\})'", said))
    consumers = {path.stem for kind in ("fig", "tab") for path in (ROOT / "notebooks").glob(f"{kind}*.ipynb")}
    assert set(given) == consumers and sum(parameters != "{}" for parameters in given.values()) > 15
    for name, parameters in given.items():
        cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        at = next(i for i, source in enumerate(code) if "params.check(" in source)
        scope = {}
        for source in code[:at]:
            exec(source, scope)
        scope |= json.loads(parameters)
        exec(code[at].split("\nfrom ")[0].split("\nimport ")[0], scope)
        assert scope["out"] == name


def test_only_content_makes_a_job_stale(project):
    """Dates, outputs, texts, comments, formatting and a further pruner do not; what a job uses does, and only there."""
    notebook = project.folder / "notebooks/10_rec_eval.ipynb"
    book = json.loads(notebook.read_text())
    book["metadata"]["saved"] = "by JupyterLab"
    book["cells"][0]["source"] = ["another text"]
    next(cell for cell in book["cells"] if cell["cell_type"] == "code")["outputs"] = [{"output_type": "stream"}]
    notebook.write_text(json.dumps(book))
    (project.folder / "analysis/pruning/new.py").write_text("def prune(visual, keep, *, seeds=()): ...\n")
    project.edit("analysis/pruning/trim.py", "def prune", "# a comment\n\n\ndef prune")
    assert project.made() == []

    project.edit("analysis/pruning/trim.py", "def prune", "MORE = 1\n\n\ndef prune")
    assert project.made() == [*["10_rec_eval"] * 8, "tab1_methods"]  # Figure 1 does not show TRIM
    project.edit("papermill_runs/10_rec_eval/fig1.yaml", "limit: 500", "limit: 400")
    assert project.made() == ["10_rec_eval", "fig1_collapse"]
    assert project.calls[0][1]["limit"] == 400
    project.edit("analysis/checkpoints/tiny-llava/config.json", "{", '{"frame": "resized",')
    code, said = project.run("-n", TARGETS[0])
    assert code == 0 and "rec_eval" in said
    project.edit("analysis/checkpoints/tiny-llava/config.json", '{"frame": "resized",', "{")
    assert project.made() == []  # what is as it was when the rows were made is not stale


def test_after_a_kill_the_next_run_goes_on_and_beside_another_it_does_not_begin(project):
    locks = project.folder / ".snakemake/locks"
    locks.mkdir(exist_ok=True)
    (locks / "0.output.lock").write_text("\n".join(TARGETS))  # what a killed driver leaves
    (project.folder / TARGETS[0]).unlink()
    assert project.made() == ["fig1_collapse"]
    (project.folder / TARGETS[0]).unlink()
    with results.locked(project.folder / ".snakemake/driver"):
        code, said = project.run(*TARGETS)
    assert code != 0 and project.calls == []
    assert f"process {os.getpid()} on" in said and "remove" in said and "driver.lock" in said


def test_a_trial_of_a_real_checkpoint_is_not_the_whole_and_removes_nothing(project):
    real = ["real", "--config", "model=tiny-llava", "dataset=refcocog", "splits=val"]
    rows = project.folder / "papermill_runs/12_real_checkpoints"
    assert project.made(*real, "limit=2") == ["12_real_checkpoints"]
    assert project.made(*real) == ["12_real_checkpoints"]
    assert project.calls[0][1]["out"] != "papermill_runs/12_real_checkpoints/limit=2"
    assert (rows / "limit=2/tiny-llava_refcocog_val.parquet").exists()
    whole = rows / "tiny-llava_refcocog_val.parquet"
    whole.write_text("GPU hours")
    assert project.made(*real, "limit=2") == project.made(*real) == []
    whole.with_suffix(
        ".done"
    ).unlink()  # as a kill after the rows were written: the notebook is run, and reads them back
    before = whole.stat().st_ino
    (project.folder / "bin/papermill").write_text("#!/bin/sh\nexit 1\n")
    assert project.run(*real)[0] != 0
    assert whole.read_text() == "GPU hours" and whole.stat().st_ino == before
    (project.folder / "bin/papermill").write_text(PAPERMILL.format(python=sys.executable))


def test_two_notebooks_of_one_project_wait_for_each_other(tmp_path):
    """A job of a killed driver that still works is waited for, where Snakemake has asked for it."""
    script = (
        "import sys, time; from pathlib import Path; from analysis.results import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(1.5)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "rows"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match=rf"process {other.pid} on .*if no such process runs there"):
        results.locked(tmp_path / "rows").__enter__()
    begun = time.monotonic()
    with results.locked(tmp_path / "rows", wait=60):
        assert time.monotonic() - begun > 0.3 and other.wait() == 0
