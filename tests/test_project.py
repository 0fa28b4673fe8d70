"""What holds for the project as a whole: dependency lists, notebooks, sizes."""

import ast
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from analysis import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "rouge_score": "rouge-score",
    "nbformat": "papermill",
    "lmms_eval": "lmms-eval",
}


def extra(*names):
    """What an extra installs besides the library, the extras that it names included."""
    found = set()
    for line in (line for name in names for line in EXTRAS[name]):
        inner = re.fullmatch(r"analysis\[(.*)\]", line)
        found |= extra(*inner[1].split(",")) if inner else {line}
    return found


def names(lines):
    return {Requirement(line).name for line in lines}


def imported(files):
    """The packages that files import, standard library and project aside."""
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {module.partition(".")[0] for module in modules}
    return {MODULES.get(module, module) for module in found - sys.stdlib_module_names - {"analysis", "aclsum"}}


def test_the_library_depends_on_what_it_imports_and_each_extra_on_what_its_part_does():
    """A function of the command line that needs an extra imports it when it is called."""
    files, core = set((ROOT / "analysis").rglob("*.py")), names(PROJECT["dependencies"])
    notebooks = {ROOT / f"analysis/{name}.py" for name in ("__main__", "tools/explore")}
    figures = {file for file in files if file.parent.name in ("drawing", "tools")} | {ROOT / "analysis/style.py"}
    parts = {
        "summarization": {file for file in files if file.parent.name == "summarization"},
        "figures": figures - notebooks,
        "notebooks": notebooks,
        "lmms": {ROOT / "analysis/lmms.py"},
    }
    assert imported(files.difference(*parts.values())) | {"packaging"} == core
    for name, part in parts.items():
        assert imported(part) - core <= names(extra(name)), name
    assert imported(parts["summarization"]) - core == names(EXTRAS["summarization"])


def test_pip_and_conda_install_the_same():
    pip = {*PROJECT["dependencies"], *extra("paper", "test"), f"python{PROJECT['requires-python']}"}
    conda = {
        line.replace("pytorch", "torch")
        for line in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    }
    assert conda - {"pip"} == pip


def test_the_lock_file_pins_all_that_is_installed_in_versions_that_fit():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "no hosts, no local paths, no builds"
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for wanted in map(Requirement, {*PROJECT["dependencies"], *extra("paper", "test")} - {"setuptools>=77"}):
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), wanted


@pytest.mark.parametrize("what", ["check", "format --check"])
def test_ruff_finds_nothing(what):
    done = subprocess.run([sys.executable, "-m", "ruff", *what.split(), "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_commands_and_files_that_exist(name):
    said, makefile = (ROOT / name).read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", said, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"the Makefile has no target {target}"
    folders = "analysis|benchmarks|figures|notebooks|papermill_runs|profiles|tests"
    for path in re.findall(rf"`((?:{folders})/[\w.*/+-]+)`", said):
        assert any(ROOT.glob(path)), f"{path} does not exist"
    for path in re.findall(r"\]\(([^)#:]+)\)", said):
        assert ((ROOT / name).parent / path).exists(), f"a link leads to {path}, which does not exist"


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
