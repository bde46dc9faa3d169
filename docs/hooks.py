"""For mkdocs: docstrings have Sphinx's roles, such as ``:func:`name```, and formulas; both show as code here."""

import re
from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

ROLE = re.compile(r":(?:attr|class|data|func|math|meth|mod):`~?([^`]+)`")
MATH = re.compile(r"^\.\. math:: ?(.*)$", re.MULTILINE)


class _Roles(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        text = MATH.sub(r"    \1", "\n".join(lines))
        # A role may be broken over two lines.
        return ROLE.sub(lambda role: f"`{' '.join(role[1].split())}`", text).split("\n")


class Roles(Extension):
    """Show Sphinx's roles and formulas as code."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Called by Markdown."""
        md.preprocessors.register(_Roles(md), "roles", 35)


def on_config(config: Any) -> Any:
    """Called by mkdocs."""
    config.markdown_extensions.append(Roles())
    return config
