"""The rooms: what imports what, read from the source, and what is installed."""

import ast
import configparser
import graphlib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"gmn_lopt": ROOT / "gmn_lopt", "gmn_lopt.tasks": ROOT / "tasks"}
ROOMS = (
    "util",
    "factors",
    "networks",
    "curvature",
    "optimizers",
    "meta",
    "interop",
    "evaluation",
    "tasks",
    "cli",
)  # each imports those before it
OUTSIDE = ("bench", "examples", "experiments", "tests", "tools", "eval", "meta_train")  # not installed


@cache
def modules() -> dict[str, Path]:
    """All modules of the package and their files, as they are named once installed."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


def imported(module: str, file: Path, known: frozenset[str]) -> set[str]:
    """The modules that a module imports, where it runs to be defined or anywhere in it."""
    found: set[str] = set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], node.module or ""]).strip(".")
            base = base if node.level else str(node.module)
            # ``from package import name`` takes a module, or what the package itself has.
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return found - {module}


def arrows(sources: dict[str, Path]) -> dict[str, set[str]]:
    known = frozenset(sources)
    return {module: imported(module, file, known) for module, file in sources.items()}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none: an empty list."""
    try:
        graphlib.TopologicalSorter({m: found & arrows.keys() for m, found in arrows.items()}).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_circles():
    assert circle(arrows(modules())) == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_downwards(module):
    found = imported(module, modules()[module], frozenset(modules()))
    assert not [name for name in found if name.split(".")[0] in (*OUTSIDE, "tasks")], "what is not installed"
    if module == "gmn_lopt":  # the public names
        return
    assert room(module) in ROOMS
    own = {name for name in found if name.split(".")[0] == "gmn_lopt"}
    # ``import gmn_lopt`` in the highest rooms means the public names.
    above = [n for n in own if room(n) and ROOMS.index(room(n)) > ROOMS.index(room(module))]
    assert not above, f"{module} imports what is above it"
    assert "gmn_lopt" not in own or room(module) in ("evaluation", "tasks", "cli")


def test_few_doors():
    entries = {path.name for path in (ROOT / "gmn_lopt").iterdir()} - {"__init__.py", "py.typed", "__pycache__"}
    assert len(entries) <= 10, sorted(entries)
    assert entries <= {*ROOMS, "pretrained"}


def test_all_packages_are_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = {module for module, file in modules().items() if file.name == "__init__.py"}
    assert set(config["options"]["packages"].split()) == packages
    assert max(package.count(".") for package in packages) <= 2
    assert config["options"]["py_modules"].split() == ["gmn_commands"]


def test_nothing_is_put_on_the_path():
    files = [file for folder in (*PACKAGES.values(), *map(ROOT.joinpath, OUTSIDE)) for file in folder.rglob("*.py")]
    calls = [f"sys.path.{method}" for method in ("insert", "append", "extend")]
    assert not [str(file) for file in (*files, *ROOT.glob("*.py")) if any(call in file.read_text() for call in calls)]


@pytest.mark.parametrize(
    ("text", "finds"),
    [
        ("import gmn_lopt.b", ["gmn_lopt.a", "gmn_lopt.b", "gmn_lopt.a"]),
        ("from gmn_lopt import b", ["gmn_lopt.a", "gmn_lopt.b", "gmn_lopt.a"]),
        ("from . import b", ["gmn_lopt.a", "gmn_lopt.b", "gmn_lopt.a"]),
        ("def later():\n    from .b import name", ["gmn_lopt.a", "gmn_lopt.b", "gmn_lopt.a"]),
        ("from other import b", []),
    ],
)
def test_circles_are_seen(tmp_path, text, finds):
    sources = {"gmn_lopt": tmp_path / "__init__.py", "gmn_lopt.a": tmp_path / "a.py", "gmn_lopt.b": tmp_path / "b.py"}
    for file, content in zip(sources.values(), ("", text, "from gmn_lopt.a import something")):
        file.write_text(content)
    found = circle(arrows(sources))
    assert set(found) == set(finds)
