"""Which package may import which: the core needs nothing of the testbed, of training, of the second paper."""

import ast
from functools import cache

import pytest

from analysis import ROOT, keys

PACKAGE = ROOT / "analysis"
APART = ("analysis.refstamps", "analysis.training", "analysis.summarization")
COMMAND_LINE = "analysis.__main__"  # reaches everything, when it is asked to


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(nodes):
    """The modules that import statements name; of `from a import b` both a and a.b, where that is a module."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if not name.startswith("analysis") or name in MODULES}


@cache
def everywhere(name):
    """All imports of a module, those inside functions, too."""
    return imported(ast.walk(ast.parse(MODULES[name].read_text())))


@cache
def at_once(name):
    """What importing a module imports, by whatever way: other modules of the project and of libraries."""
    found, todo = set(), [name]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            if one in MODULES:
                parents = (one.rsplit(".", depth)[0] for depth in range(1, one.count(".") + 1))
                todo += [*imported(ast.parse(MODULES[one].read_text()).body), *parents]
    return found


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def against(packages, forbidden, allowed=()):
    """Imports from within the packages of what is forbidden to them."""
    return sorted(
        f"{name} imports {other}"
        for name in MODULES
        if within(name, packages) and name not in allowed
        for other in everywhere(name)
        if any(within(other, [package]) and not within(name, [package]) for package in forbidden)
    )


def test_the_test_sees_imports():
    assert "analysis.refstamps.grammar" in everywhere("analysis.training.instruct")
    assert "analysis.summarization.systems" in everywhere(COMMAND_LINE)  # inside a function
    assert "torch" in at_once("analysis.engine.evaluate") and "analysis.models.base" in at_once("analysis.engine.cost")
    assert against(["analysis.training"], ["analysis.refstamps"])
    assert len(MODULES) > 50


def test_the_core_imports_neither_the_testbed_nor_training_nor_the_second_paper():
    core = [name for name in MODULES if not within(name, APART)]
    assert against([name for name in core if name != "analysis"], APART, allowed=[COMMAND_LINE]) == []


@pytest.mark.parametrize("package", ["analysis.training", "analysis.tools"])
def test_only_the_command_line_imports(package):
    assert against([name for name in MODULES if name != "analysis"], [package], [COMMAND_LINE]) == []


def test_the_three_know_only_what_they_need():
    assert against(["analysis.refstamps"], ["analysis.engine", "analysis.models", *APART[1:]]) == []
    assert against(["analysis.summarization"], ["analysis.engine", "analysis.models", *APART[:2]]) == []
    assert against(["analysis.training"], ["analysis.summarization"]) == []


LIGHT = "style drawing.captions drawing.tables drawing.designs stats published results params rec.scoring rec.boxes"


@pytest.mark.parametrize("name", LIGHT.split())
def test_drawing_imports_no_model(name):
    heavy = ["torch", "transformers", "analysis.models", "analysis.engine"]
    assert sorted(other for other in at_once(f"analysis.{name}") if within(other, heavy)) == []


def test_what_a_registry_names_counts_as_imported_for_the_key_of_rows():
    assert "analysis.refstamps.scenes" in keys.code("analysis.rec.datasets")
