"""House rules that no linter knows: sizes, purity, tests beside sources, and nothing set on strangers' objects."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.architecture.covered_elsewhere import BY_TEST

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lightning_superscale"
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})
MAX_FILE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 600, 450, 60
# A folder is what a newcomer takes in at a glance.
MAX_FILES_PER_FOLDER = 16


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            limit = MAX_FUNCTION_LINES if isinstance(node, ast.FunctionDef) else MAX_CLASS_LINES
            assert node.end_lineno - node.lineno < limit, f"{node.name} is longer than {limit} lines"


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_folder_is_taken_in_at_a_glance(folder):
    found = sorted(path.name for path in folder.glob("*.py"))
    assert len(found) <= MAX_FILES_PER_FOLDER, f"{len(found)} files: make a folder of those that belong together"
    assert "__init__.py" in found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_attribute_is_set_by_name_and_no_asserts(path):
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise AssertionError instead"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "setattr", f"line {node.lineno}: keep a side table instead"


def test_every_module_says_what_it_is_for():
    silent = [name_of(p) for p in FILES if p.read_text().strip() and ast.get_docstring(tree(p)) is None]
    assert not silent


def imported_by(path: Path) -> set[str]:
    """Top-level names that a file imports, also inside of functions."""
    return {
        (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }


PURE = [PACKAGE / "errors.py", PACKAGE / "run" / "report" / "plan.py"] + [
    path for folder in ("config", "layout") for path in sorted((PACKAGE / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_pure_modules_import_no_torch(path):
    assert "torch" not in imported_by(path)


def test_engine_names_stay_in_their_places():
    """A technique's name outside its own folder, the configs and the plugins is a leak."""
    # What migrates other programs' settings has the words of both sides.
    allowed = ("offload", "plugins", "config", "cli/migrate", "__init__.py")
    leaks = [
        name_of(path)
        for path in FILES
        if not name_of(path).startswith(allowed)
        and any(isinstance(n, ast.Constant) and n.value in ("superoffload", "zenflow") for n in ast.walk(tree(path)))
    ]
    assert not leaks


def test_tests_mirror_sources():
    tests = ROOT / "tests"
    elsewhere = {source: test for test, sources in BY_TEST.items() for source in sources}
    names = {name_of(path): path for path in FILES if path.name != "__init__.py"}
    for source, test in elsewhere.items():
        assert source in names, f"{source} is gone: take it out of covered_elsewhere.py"
        assert (tests / test).is_file(), f"{test} is gone: say what holds {source} now"
    own = {
        name
        for name, path in names.items()
        if (tests / path.relative_to(PACKAGE).parent / f"test_{path.name}").is_file()
    }
    assert not own & elsewhere.keys(), "these have a test file of their own: take them out of covered_elsewhere.py"
    missing = sorted(names.keys() - own - elsewhere.keys())
    assert not missing, f"write tests/<folder>/test_<name>.py, or say in covered_elsewhere.py what holds {missing}"
