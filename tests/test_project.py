"""What holds for the project as a whole: dependency lists, notebooks, sizes."""

import re
import subprocess
import tomllib

import nbformat
import pytest
import yaml

from analysis import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_pip_and_conda_install_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pip = {*project["dependencies"], f"python{project['requires-python']}"}
    conda = {
        line.replace("pytorch", "torch")
        for line in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    }
    assert conda - {"pip"} == pip


def test_the_readme_names_commands_and_files_that_exist():
    if not (ROOT / "README.md").is_file():
        pytest.skip("README.md is not written yet")
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", readme, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"the Makefile has no target {target}"
    for path in re.findall(r"\bnotebooks/\w+\.ipynb", readme):
        assert (ROOT / path).is_file(), f"{path} does not exist"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_clean_and_titled(path):
    book = nbformat.read(path, as_version=4)
    assert "papermill" not in book.metadata
    assert book.cells[0].source.startswith("# ")
    for cell in book.cells:
        assert "papermill" not in cell.metadata and "injected-parameters" not in cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_no_tracked_file_is_large():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert [f for f in files if f.is_file() and f.stat().st_size > 25 * 2**20] == []


def test_tests_import_no_tests():
    """What several of them share is in tests/support: a file can be read, moved and run by itself."""
    for file in sorted((ROOT / "tests").rglob("*.py")):
        imported = set(re.findall(r"^\s*(?:from|import) (?:tests\.)?(test_\w+|conftest)\b", file.read_text(), re.M))
        assert not imported, f"{file.name} imports {', '.join(imported)}"
