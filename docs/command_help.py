"""The directive `command-help`: a section for each command of gpt-ext, with what `--help` says."""

from __future__ import annotations

from importlib import import_module

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from gpt_ext.cli import COMMANDS


class CommandHelp(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        return [self.section(name, line) for name, line in COMMANDS.items()]

    def section(self, name: str, line: str) -> nodes.section:
        parser = import_module(f"gpt_ext.commands.{name}").parser()
        parser.prog = f"gpt-ext {name}"
        text = parser.format_help()
        section = nodes.section("", nodes.title("", name), ids=[name], names=[name])
        section += [nodes.paragraph("", line), nodes.literal_block(text, text, language="none")]
        return section


def setup(app: Sphinx) -> None:
    app.add_directive("command-help", CommandHelp)
