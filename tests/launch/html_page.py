"""A page as its tags, for tests of what a page holds and what it must not."""

from __future__ import annotations

import html.parser
import re


class Page(html.parser.HTMLParser):
    """Tags with their attributes, in order; text of titles and cells."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(name == tag and attributes.items() <= found.items() for name, found in self.tags)


def card_with(source: str, mark: str) -> str:
    """The one card that holds `mark`."""
    found = [card for card in re.findall(r"<figure>.*?</figure>", source, re.DOTALL) if mark in card]
    assert len(found) == 1, f"{len(found)} cards with {mark}"
    return found[0]
