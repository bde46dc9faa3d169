"""The documentation: lines that fit, links that lead somewhere, code that runs, and examples in public docstrings."""

import contextlib
import doctest
import importlib.util
import inspect
import io
import pkgutil
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import gmn_lopt
import gmn_lopt.meta
from gmn_lopt.cli import eval as eval_
from gmn_lopt.cli import meta_train
from gmn_lopt.cli.command_line import parse

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tools").rglob("*.md")])
PAGES = [path for path in FILES if "```python" in path.read_text()]
WIDTH, PARAGRAPH = 120, 7
# What tools/ writes from the cards; rows of tables cannot be broken, nor the words of commands.
GENERATED = re.compile(r"<!-- table: begin -->.*?<!-- table: end -->", re.DOTALL)
FENCE = re.compile(r"^( *)```(.*?)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]\n]*\](?:\[[^\]\n]*\])?\(([^)\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    """A page without code and generated parts, as many lines long as it is."""
    for pattern in (GENERATED, FENCE):
        text = pattern.sub(lambda match: "\n" * match[0].count("\n"), text)
    return text


def long_lines(text: str) -> list[int]:
    text = GENERATED.sub(lambda match: re.sub(r"^(\|.*| *\S+ \\)$", "", match[0], flags=re.MULTILINE), text)
    return [i for i, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH]


def long_paragraphs(text: str) -> list[int]:
    """Where paragraphs of eight lines or more begin; an item of a list is a paragraph, a table is none."""
    found, start = [], 0
    lines = [*prose(text).splitlines(), ""]
    for i, line in enumerate(lines, 1):
        if not line.strip() or re.match(r"\s*([-*|#>]|\d+\.)(\s|$)", line):
            if i - start > PARAGRAPH and start:
                found.append(start)
            start = i if line.strip() and not re.match(r"\s*[|#]", line) else 0
        elif not start:
            start = i
    return found


def test_the_checks_of_lines_and_paragraphs_see_what_is_too_long():
    assert long_lines("short\n" + "x" * 121) == [2] and long_lines("x" * 120) == []
    lines = "line\n" * 8
    assert long_paragraphs(lines) == [1] and long_paragraphs(lines.replace("\n", "\n\n")) == []
    assert long_paragraphs("line\n" * 7) == [] and long_paragraphs("\n- " + lines) == [2]
    assert long_paragraphs(f"```\n{lines}```\n") == [] and long_paragraphs("- line\n" * 8) == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_lines_and_paragraphs_fit(path):
    text = path.read_text()
    assert long_lines(text) == [] and long_paragraphs(text) == []


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_links_lead_somewhere(path):
    for link in LINK.findall(prose(path.read_text())):
        if re.match(r"\w+:", link):  # another site
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), f"{name(path)}: no file {file}"
        if (ROOT / "docs") in path.parents:  # the site holds nothing else
            assert (ROOT / "docs") in target.resolve().parents, f"{name(path)}: {file} is not in docs/"
        assert not anchor or anchor in anchors(target), f"{name(path)}: no heading {link}"


@dataclass(frozen=True)
class Block:
    """Code of a page, and what it has to print (the text block right after it)."""

    line: int
    code: str
    printed: str | None


def blocks(text: str) -> list[Block]:
    found = list(FENCE.finditer(text))
    after = [*found[1:], None]
    return [
        Block(
            text[: match.start()].count("\n") + 1,
            match[3],
            next_[3] if next_ and next_[2] == "text" and not text[match.end() : next_.start()].strip() else None,
        )
        for match, next_ in zip(found, after)
        if match[2] == "python"
    ]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_code_of_a_page_runs_and_prints_what_stands_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what it saves
    names: dict = {"__name__": "page"}
    for block in blocks(path.read_text()):
        printed = io.StringIO()
        source = "\n" * block.line + block.code  # so that an error's line is the page's
        with contextlib.redirect_stdout(printed):
            exec(compile(source, name(path), "exec", dont_inherit=True), names)
        if block.printed is not None:
            assert printed.getvalue().rstrip() == block.printed.rstrip()


def commands(text: str) -> list[list[str]]:
    """The command lines of a page that are complete: resuming reads the rest from a run."""
    lines = re.sub(r" *\\\n *", " ", "\n".join(match[3] for match in FENCE.finditer(GENERATED.sub("", text))))
    found = [shlex.split(line) for line in lines.splitlines() if line.startswith(("gmn-meta-train ", "gmn-eval "))]
    return [command for command in found if "--task" in command]


COMMANDS = sorted({tuple(command) for path in FILES for command in commands(path.read_text())})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:5]))
def test_the_commands_are_understood(command):
    if command[0] == "gmn-meta-train":
        meta_train.from_command_line(None, command[1:])
    else:
        parse(eval_.Config, None, command[1:])


def public(module) -> list[tuple[str, object]]:
    """The functions and classes that a module exports."""
    return [(f"{module.__name__}.{key}", getattr(module, key)) for key in module.__all__ if key != "__version__"]


def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).read_text() if spec and spec.origin else ""


COMMON = {"jax": jax, "jnp": jnp, "optax": optax, "gmn_lopt": gmn_lopt}  # what examples need not import
PUBLIC = [*public(gmn_lopt), *public(gmn_lopt.meta)]


def listed() -> dict[str, list[str]]:
    """The names that the pages of the API ask for, by module."""
    found: dict[str, list[str]] = {}
    for path in (ROOT / "docs" / "api").glob("*.md"):
        for module, options in re.findall(r"^::: (\S+)\n((?: +.*\n)*)", path.read_text(), re.MULTILINE):
            found.setdefault(module, []).extend(re.findall(r"^ +- (\w+)$", options, re.MULTILINE))
    return found


def test_the_api_pages_have_every_public_name_and_no_other():
    for module, names in listed().items():  # mkdocstrings passes over a name that there is not
        assert not [key for key in names if not hasattr(importlib.import_module(module), key)], module
    names = {key for names in listed().values() for key in names}
    assert not [name for name, _ in PUBLIC if name.rpartition(".")[2] not in names]


@pytest.mark.parametrize("name, value", PUBLIC, ids=[key for key, _ in PUBLIC])
def test_public_names_have_an_example(name, value):
    assert ">>> " in (inspect.getdoc(value) or ""), f"{name} has no example in its docstring"


MODULES = [module.name for module in pkgutil.walk_packages(gmn_lopt.__path__, "gmn_lopt.")]


@pytest.mark.parametrize("name", [name for name in MODULES if ">>> " in source_of(name)])
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what they save
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = doctest.testmod(importlib.import_module(name), extraglobs=COMMON, optionflags=doctest.ELLIPSIS)
    assert not found.failed, printed.getvalue()
    assert found.attempted == len(re.findall(r"^ *>>> ", source_of(name), re.MULTILINE))
