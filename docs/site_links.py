"""MkDocs hook: links to files outside docs/ work in the repository only; the site shows the path in their place."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)#:\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Called by MkDocs with the source of each page."""
    folder = posixpath.dirname(page.file.src_uri)

    def shown(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, link["target"]))
        if path.startswith("docs/"):
            return link[0]
        path = path.removesuffix("/docs/README.md")  # of a bundle
        return f"`{path}`" if path.endswith(link["text"].strip("`")) else f"{link['text']} (`{path}`)"

    return LINK.sub(shown, markdown)
