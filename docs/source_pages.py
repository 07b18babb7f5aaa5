"""Links to source files of the repository lead to pages of the site that show them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

LANGUAGES = {".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".h": "cpp", ".py": "python"}


def link_to_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Makes links of MyST's downloads, which is what it takes files for that are no documents."""
    for node in list(doctree.findall(addnodes.download_reference)):
        folder = Path(app.srcdir, app.env.docname).parent
        path = os.path.relpath((folder / node["reftarget"]).resolve(), app.srcdir)
        app.source_pages.add(path)
        here = app.builder.get_target_uri(app.env.docname)
        uri = os.path.relpath(f"source/{path}.html", os.path.dirname(here))
        node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    for path in sorted(app.source_pages):
        code = Path(app.srcdir, path).read_text()
        language = LANGUAGES.get(Path(path).suffix, "none")
        body = app.builder.highlighter.highlight_block(code, language)
        yield (
            f"source/{path}",
            {"title": path, "body": f"<h1>{escape(path)}</h1>{body}"},
            "page.html",
        )


def setup(app: Sphinx) -> None:
    app.source_pages = set()
    app.connect("doctree-read", link_to_pages)
    app.connect("html-collect-pages", source_pages)
