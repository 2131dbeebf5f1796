"""Pages of Markdown as the tests of this folder see them: code blocks, headings and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# What a user reads; the changelog has links and no code.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted(DOCS.rglob("*.md")),
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        line: number of the fence's line in the page, from 1.
        language: the word after the fence; empty where there is none.
        text: the lines between the fences, each with its newline.
    """

    line: int
    language: str
    text: str


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        ValueError: a fence that is not closed.
    """
    found: list[Block] = []
    opened: tuple[int, str, str] | None = None  # number of the line, indentation, language
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"( *)```(.*)$", line)
        if fence is None:
            lines.append(line if opened is None else line.removeprefix(opened[1]))
        elif opened is None:
            opened, lines = (number, fence[1], fence[2].strip()), []
        else:
            found.append(Block(opened[0], opened[2], "".join(f"{line}\n" for line in lines)))
            opened = None
    if opened is not None:
        raise ValueError(f"the fence of line {opened[0]} is not closed")
    return found


def prose_of(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site name them."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", prose_of(text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        anchors.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return anchors


def links_of(text: str) -> list[str]:
    """The targets of a page's links and pictures."""
    without_code = re.sub(r"`[^`\n]*`", "", prose_of(text))
    return re.findall(r"\]\(([^)\s]+)\)", without_code)


def section_of(text: str, heading: str) -> str:
    """The text below a heading of the second level, to the next one.

    Raises:
        KeyError: there is no such heading.
    """
    _, found, rest = text.partition(f"\n## {heading}\n")
    if not found:
        raise KeyError(heading)
    return rest.partition("\n## ")[0]
