"""A hook of MkDocs: links of pages to files of the repository, which the site does not hold, become their paths.

On GitHub such a link opens the file. On the site `[the example](../examples/README.md)` reads "the example
(`examples/README.md`)". Whether the files exist is a test of its own (tests/docs/test_links.py).
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)\s#]+)(?:#[^)]*)?\)")


def without_repository_links(markdown: str, page: str) -> str:
    """A page's Markdown in which no link leaves the folder of the pages.

    Args:
        markdown: the page's text. Fenced code stays as it is.
        page: the page's path within the folder of the pages, which is `docs/` of the repository.
    """

    def replaced(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link["target"]))
        if path.startswith("docs/"):
            return link[0]
        return link["text"] if path in link["text"] else f"{link['text']} (`{path}`)"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(replaced, part) for part in parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs calls it for each page."""
    return without_repository_links(markdown, page.file.src_uri)
