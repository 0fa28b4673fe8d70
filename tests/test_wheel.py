"""The wheel: it holds every file that the package works with, and works from any folder."""

import os
import shutil
import subprocess
import sys

import pytest

from analysis import ROOT

BUILT_OF = ("analysis", "LICENSES", "LICENSE", "README.md", "pyproject.toml")
SCRIPT = """
import sys
from pathlib import Path
import analysis
from analysis import keys, models, style
from analysis.engine.evaluate import cells, evaluate
from analysis.rec import datasets
from analysis.summarization import systems

assert Path(analysis.__file__).is_relative_to(sys.argv[1]), analysis.__file__
grid = [*cells("none"), *cells("random", 0.5, ids=["compact", "original"])]
rows = evaluate(models.load("tiny-llava", device="cpu"), datasets.load("refstamps", "val", 2), grid, "rows.parquet")
assert rows["image_id"].nunique() == 2 and set(rows["error"]) == {""} and rows["raw"].str.startswith("[").all()
assert keys.environment()["commit"] == "unknown"
assert style.output_folder(smoke=True) == Path.cwd() / "figures" / "smoke"
assert systems.load("end-to-end-5-inc", 0)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of this tree is installed in, without what it depends on."""
    tree, site = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("site")
    for name in BUILT_OF:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tree, tree], check=True)
    [wheel] = tree.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-compile", "--target", site, wheel], check=True)
    return site


def test_the_wheel_holds_every_tracked_file(installed):
    listed = subprocess.run(["git", "ls-files", "-z", "analysis"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    begun = "analysis/training/begun/"  # weights that only a clone goes on training
    tracked = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file() and not name.startswith(begun)]
    assert len(tracked) > 200 and [name for name in tracked if not (installed / name).is_file()] == []
    assert list(installed.glob("*.dist-info/licenses/LICENSES/GPL-2.0-or-later.txt"))


def test_the_wheel_works_from_another_folder(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, installed], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    asked = [sys.executable, "-m", "analysis", "run", "fig1"]
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "in a clone of the project" in done.stderr
