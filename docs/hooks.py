"""For mkdocs: docstrings are written with Sphinx's roles, ``:func:`name```, which show as code here."""

import re
from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

ROLE = re.compile(r":(?:class|data|func|meth|mod):`~?([^`]+)`")


class _Roles(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        # A role may be broken over two lines.
        return ROLE.sub(lambda role: f"`{' '.join(role[1].split())}`", "\n".join(lines)).split("\n")


class Roles(Extension):
    """Show Sphinx's roles as code."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Called by Markdown."""
        md.preprocessors.register(_Roles(md), "roles", 35)


def on_config(config: Any) -> Any:
    """Called by mkdocs."""
    config.markdown_extensions.append(Roles())
    return config
