"""Links of every page lead somewhere, and files of this repository that a page names are there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.markdown import DOCS, PAGES, ROOT, anchors_of, links_of, name_of, prose_of


def dead_links(page: Path) -> list[str]:
    dead = []
    for target in links_of(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue  # of other hosts: not fetched
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        is_there = file.exists() and file.is_relative_to(ROOT)
        if not is_there or (anchor and (file.suffix != ".md" or anchor not in anchors_of(file.read_text()))):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    assert not dead_links(page)


@pytest.mark.parametrize(
    "target", ["absent.md", "../../outside.md", "page.md#absent", "#absent", "picture.png", "run.py#main"]
)
def test_a_dead_link_is_found(tmp_path, target, monkeypatch):
    monkeypatch.setattr("tests.docs.test_links.ROOT", tmp_path)
    (tmp_path / "run.py").touch()
    page = tmp_path / "page.md"
    page.write_text(f"# A heading\n[one](#a-heading) [two](page.md#a-heading) [three](run.py)\n![four]({target})\n")
    assert dead_links(page) == [target]


# Paths as pages write them: in backquotes, from the root of the repository, or from the package for its own files.
_PATH = re.compile(r"`((?:tests|examples|benchmarks|docs|lightning_superscale|csrc)/[\w./-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page):
    if page.name == "CHANGELOG.md":
        return  # tells of what was
    named = _PATH.findall(prose_of(page.read_text()))
    # A page may name a file of the package from the package's folder, where rooms have the names of such folders.
    absent = [path for path in named if not any((top / path).exists() for top in (ROOT, ROOT / "lightning_superscale"))]
    assert not absent


@pytest.fixture(scope="module")
def hook():
    """The hook of MkDocs that takes links to files of the repository away."""
    spec = importlib.util.spec_from_file_location("repository_links", DOCS / "site" / "repository_links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.without_repository_links


def test_on_the_site_a_link_to_a_file_of_the_repository_is_its_path(hook):
    page = (
        "See [the example](../../examples/README.md#time) and [`tests/x.py`](../../tests/x.py), "
        "[units](../units.md#a)\n"
        "![a picture](../pictures/a.png)\n```python\n[code](../../code.py)\n```\n[a place](../../Makefile)\n"
    )
    assert hook(page, "tasks/page.md") == (
        "See the example (`examples/README.md`) and `tests/x.py`, "
        "[units](../units.md#a)\n"
        "![a picture](../pictures/a.png)\n```python\n[code](../../code.py)\n```\na place (`Makefile`)\n"
    )
