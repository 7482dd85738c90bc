"""Links of the notebooks where they do not stand in the clone: beside the site's pages, and in a learner's folder.

A notebook links to sources as `[ring](../ultralong/attention/ring/ring.py)`, which GitHub and a clone open. The site
has the API's page of that module instead. Where nothing can be opened, the words stay, with the path behind them.
"""

from __future__ import annotations

import re
from collections.abc import Container

MARKDOWN = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")
ANCHOR = re.compile(r'<a href="\.\./([^"]+)">(.*?)</a>', re.DOTALL)
NOTEBOOK = re.compile(r"notebooks/(\d\d_\w+)\.ipynb(#.*)?")


def as_words(markdown: str) -> str:
    """Markdown whose links out of the notebooks' folder are words with the path behind them."""
    return MARKDOWN.sub(r"\1 (`\2`)", markdown)


def as_pages(page: str, modules: Container[str], others: dict[str, str]) -> str:
    """HTML whose links out of the notebooks' folder open pages of the site, or are words with the path behind them.

    Args:
        page: Rendered Markdown.
        modules: Names of the modules that have a page of the API.
        others: Pages of other files, by their path from the clone's root.
    """

    def one(match: re.Match[str]) -> str:
        path, words = match.group(1), match.group(2)
        module = path.removesuffix(".py").rstrip("/").replace("/", ".")
        if module in modules:
            return f'<a href="api/{module.replace(".", "/")}.html">{words}</a>'
        if notebook := NOTEBOOK.fullmatch(path):
            return f'<a href="{notebook[1]}.html{notebook[2] or ""}">{words}</a>'
        file, hash_, anchor = path.partition("#")
        if file in others:
            return f'<a href="{others[file]}{hash_}{anchor}">{words}</a>'
        return f"{words} (<code>{path}</code>)"

    return ANCHOR.sub(one, page)
