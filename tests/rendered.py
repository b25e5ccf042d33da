"""Markdown as a reader sees it."""

import math
from html.parser import HTMLParser

import cmarkgfm
from cmarkgfm.cmark import Options


class Tags(HTMLParser):
    """The tags of a page, the text of its headings, and where its links lead."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.headings, self.links = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name == "href"]

    def handle_data(self, data):
        if self.tags[-1:] in (["h1"], ["h2"]) and data.strip():
            self.headings.append(data)


def page_of(text):
    """Markdown as GitHub's renderer makes it, before anything is taken out for safety."""
    return Tags(cmarkgfm.github_flavored_markdown_to_html(text, Options.CMARK_OPT_UNSAFE))


class Lines(HTMLParser):
    """How many lines of a page are seen while all that is folded stays so; long ones are broken."""

    COLUMNS = 110  # of GitHub's pages, about
    VOID = "br", "hr", "img"

    def __init__(self, page):
        super().__init__()
        self.count, self._open, self._text = 0, [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag in ("li", "tr", "p", "h2", "summary", "pre"):
            self._end()
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open[-1] == tag
        if tag in ("li", "tr", "p", "h2", "summary", "pre"):
            self._end()
        self._open.pop()

    def handle_data(self, data):
        self._text += data

    def _end(self):
        """Count the text so far, which stands in the tags that are open."""
        text, self._text = self._text.strip(), ""
        if not text or self._open.count("details") > ("summary" in self._open):
            return
        if {"pre", "tr"} & {*self._open}:  # these are never broken
            self.count += text.count("\n") + 1 if "pre" in self._open else 1
        else:
            self.count += math.ceil(len(text) / self.COLUMNS)


def lines_of_page(text):
    """How many lines of Markdown a reader sees on GitHub."""
    page = cmarkgfm.github_flavored_markdown_to_html(text, Options.CMARK_OPT_UNSAFE)
    return Lines(page).count
