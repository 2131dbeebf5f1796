"""House rules that no linter knows: sizes, purity, and nothing set on strangers' objects."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "lightning_superscale"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 400, 320, 60


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            limit = MAX_FUNCTION_LINES if isinstance(node, ast.FunctionDef) else MAX_CLASS_LINES
            assert node.end_lineno - node.lineno < limit, f"{node.name} is longer than {limit} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_attribute_is_set_by_name_and_no_asserts(path):
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise AssertionError instead"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "setattr", f"line {node.lineno}: keep a side table instead"


def test_every_module_says_what_it_is_for():
    silent = [str(p) for p in FILES if p.read_text().strip() and ast.get_docstring(tree(p)) is None]
    assert not silent


@pytest.mark.parametrize("name", ["layout.py", "plan.py", "config.py", "errors.py"])
def test_pure_modules_import_no_torch(name):
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree(PACKAGE / name))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert "torch" not in imported


def test_engine_names_stay_in_their_places():
    """A technique's name outside its own folder, the configs and the plugins is a leak."""
    allowed = ("offload", "plugins", "config.py", "plan.py", "__init__.py")
    leaks = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if not str(path.relative_to(PACKAGE)).startswith(allowed)
        and any(isinstance(n, ast.Constant) and n.value in ("superoffload", "zenflow") for n in ast.walk(tree(path)))
    ]
    assert not leaks
