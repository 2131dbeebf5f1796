"""Every error that docs/troubleshooting.md quotes is one that the code raises, word for word."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.markdown import DOCS, ROOT

PAGE = DOCS / "troubleshooting.md"
# Lightning's own answer to a name that nobody registered; found without importing it.
OF_LIGHTNING = Path(importlib.util.find_spec("lightning").origin).parent / "pytorch/trainer/connectors"
GAP = "\0"  # where a message has a value


def messages_of(source: str) -> list[str]:
    """Texts of a file's strings, with GAP for each value that an f-string puts in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def quoted_errors(text: str) -> dict[str, str]:
    """By heading, the error that the section quotes in its first paragraph."""
    sections = re.split(r"^### +", text, flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        heading, _, body = section.partition("\n")
        quote = re.match(r"\s*`(.+)`\n\n", body)
        found[heading] = quote[1] if quote else ""
    return found


def occurs(quote: str, message: str) -> bool:
    """Whether a message has the parts of a quote in order, with something else at each `...`."""
    parts = [re.escape(part.strip()) for part in quote.split("...") if part.strip()]
    return bool(parts) and re.search(".*".join(parts), message, flags=re.DOTALL) is not None


@pytest.fixture(scope="module")
def messages() -> list[str]:
    files = [*(ROOT / "lightning_superscale").rglob("*.py"), *OF_LIGHTNING.glob("accelerator_connector.py")]
    return [message for file in files for message in messages_of(file.read_text())]


ERRORS = quoted_errors(PAGE.read_text())


@pytest.mark.parametrize("heading", ERRORS)
def test_the_quoted_error_is_one_of_the_code(heading, messages):
    quote = ERRORS[heading]
    assert quote, "the section begins with the error's text in backquotes"
    assert sum(len(part.strip()) for part in quote.split("...")) >= 10, "too short to be searched for"
    assert any(occurs(quote, message) for message in messages)


def test_quotes_are_compared_word_for_word():
    (message,) = [m for m in messages_of('f"rank {r} failed: "\n') if GAP in m]
    assert occurs("rank ... failed: ...", message)
    assert not occurs("rank ... has failed: ...", message)
    assert not occurs("...", message)
    assert quoted_errors("### A\n\n`x y`\n\nWhy.\n### B\nno quote\n") == {"A": "x y", "B": ""}
