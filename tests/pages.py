"""HTML pages, read for tests."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """What is in a page, whose tags close in order.

    Args:
        left_open: tags that need not close.
    """

    def __init__(self, text: str, left_open: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._left_open = left_open
        self._open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in ("meta", "img", "br", *self._left_open):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._left_open:
            assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
