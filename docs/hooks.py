"""What mkdocs runs while it builds the pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_FETCHED = re.compile(r'<(?:script|link rel="stylesheet"|img)[^>]*(?:src|href)="https?:[^>]*>')
_ROLE = re.compile(r":(?:class|data|func|meth|mod):(?=<code>)")


def on_config(config: Any) -> Any:
    """The version that the pages are of stands at the foot of each."""
    found = re.search(r'^__version__ = "(.+)"$', Path("src/shardwright/__init__.py").read_text(encoding="utf-8"), re.M)
    if found is None:
        raise PluginError("src/shardwright/__init__.py has no __version__.")
    config.copyright = f"Shardwright {found[1]}"
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The changelog lies beside the folder of the pages, and so do its links."""
    if page.file.src_uri != "changelog.md":
        return markdown
    return Path("CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other objects with Sphinx's roles, of which the pages show the name alone.

    An option without a default has one that click calls so (8.3).
    """
    return _ROLE.sub("", html).replace("<code>Sentinel.UNSET</code>", "none")


def on_post_page(output: str, **_: Any) -> str:
    """The pages are read where there is no network."""
    if found := _FETCHED.search(output):
        raise PluginError(f"A page would fetch {found[0]} when it is read.")
    return output
