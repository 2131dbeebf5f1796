"""Checks a built site: links, anchors and pictures lead to files of the site, and no file comes of another host.

    python -m tests.docs.site build/site

prints the links to other hosts, which it does not follow, and exits with 1 if anything is wrong.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes by which a browser loads a file when it opens a page, and those by which a reader goes to another.
_LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src")}
_LEADS = {("a", "href")}
# `<link rel=...>` that loads nothing.
_NAMES_ONLY = {"canonical", "prev", "next", "license", "edit"}
_REMOTE_STYLE = re.compile(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)'\"]+")


class _Page(HTMLParser):
    """What one page loads, leads to and can be led to."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.loads: list[str] = []
        self.leads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.update(value for key in ("id", "name") if (value := given.get(key)))
        if tag == "link" and (given.get("rel") or "") in _NAMES_ONLY:
            return
        for key, value in attrs:
            if value and (tag, key) in _LOADS:
                self.loads.append(value)
            elif value and (tag, key) in _LEADS:
                self.leads.append(value)


def _parsed(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page


def _is_remote(target: str) -> bool:
    parts = urlsplit(target)
    return bool(parts.netloc) or parts.scheme in ("http", "https")


def faults_of(site: Path) -> tuple[list[str], list[str]]:
    """What is wrong with a site, each with its page, and the links to other hosts.

    Args:
        site: folder of the built site.

    Returns:
        Faults, and distinct remote links in order.
    """
    site = site.resolve()
    pages = {path: _parsed(path) for path in sorted(site.rglob("*.html"))}
    faults = [] if pages else [f"{site} has no pages"]
    remote: set[str] = set()
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # a server gives it for any address, so its own links can't be relative to a place
        where = path.relative_to(site)
        for target in page.loads + page.leads:
            if _is_remote(target):
                if target in page.loads:
                    faults.append(f"{where} loads {target} of another host")
                remote.add(target)
            elif not urlsplit(target).scheme and not _is_there(target, path, pages, site):
                faults.append(f"{where} leads to {target}, which is not there")
    for path in sorted(site.rglob("*.css")):
        faults += [f"{path.relative_to(site)} loads {found}" for found in _REMOTE_STYLE.findall(path.read_text())]
    return faults, sorted(remote)


def _is_there(target: str, page: Path, pages: dict[Path, _Page], site: Path) -> bool:
    parts = urlsplit(target)
    file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if file.is_dir():
        file = file / "index.html"
    if not file.is_file() or not file.is_relative_to(site):
        return False
    return not parts.fragment or file not in pages or unquote(parts.fragment) in pages[file].anchors


def main(arguments: list[str]) -> int:
    """Check the site of the first argument; the exit code."""
    faults, remote = faults_of(Path(arguments[0]))
    print(f"{len(remote)} links to other hosts, not followed:", *remote, sep="\n  ")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
