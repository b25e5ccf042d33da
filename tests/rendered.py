"""Markdown as a reader sees it."""

from html.parser import HTMLParser

import cmarkgfm
from cmarkgfm.cmark import Options


class Tags(HTMLParser):
    """The tags of a page, and the text of its headings."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.headings = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.tags[-1:] in (["h1"], ["h2"]) and data.strip():
            self.headings.append(data)


def page_of(text):
    """Markdown as GitHub's renderer makes it, before anything is taken out for safety."""
    return Tags(cmarkgfm.github_flavored_markdown_to_html(text, Options.CMARK_OPT_UNSAFE))
