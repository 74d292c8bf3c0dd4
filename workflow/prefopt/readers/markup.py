"""HTML fragments as plain text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any


class _PlainText(HTMLParser):
    """Collects the text of an HTML fragment; paragraphs and list items start on lines of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def handle_data(self, data: str) -> None:
        """Text between tags, entities already resolved."""
        self.pieces.append(data)

    def parse_html_declaration(self, i: int) -> int:
        """The end of what starts with ``<!``; the base class fails where a keyword after ``<![`` is not known to it."""
        try:
            return super().parse_html_declaration(i)
        except AssertionError:
            return self.parse_bogus_comment(i)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """A line break where one is shown."""
        if tag in ("br", "li"):
            self.pieces.append("\n")


def plain_text(html: str) -> str:
    """The text of an HTML fragment, at most one empty line between paragraphs."""
    parser = _PlainText()
    parser.feed(html)
    parser.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(parser.pieces)).strip()
