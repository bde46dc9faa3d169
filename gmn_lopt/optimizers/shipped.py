"""The pretrained optimizers that ship with the package, and their model cards."""

from importlib import resources
from pathlib import Path
from typing import Any

from gmn_lopt.optimizers.saved import SHIPPED, SerializationError, shipped_names
from gmn_lopt.util.errors import FileError
from gmn_lopt.util.files import read_json

CARD_FILE = "card.json"


def list_pretrained() -> dict[str, str]:
    """List the pretrained optimizers that ship with the package.

    Returns:
        For each name, which :func:`gmn_lopt.load` takes, one line on what the optimizer is.

    Raises:
        SerializationError: in one line, if a card is missing or damaged.

    Example:
        >>> "default" in list_pretrained()
        True
    """
    return {name: card(name)["description"] for name in shipped_names()}


def card(name: str) -> dict[str, Any]:
    """Read the model card of a shipped optimizer: how it was trained, and all numbers of its evaluations.

    Args:
        name: one of :func:`list_pretrained`.

    Returns:
        JSON values. ``training`` has the tasks, the recipe with the time it took and the commands; ``evaluations`` one
        entry for each report of ``gmn-eval``. Losses are as measured, times in seconds.

    Raises:
        SerializationError: in one line, if there is no such optimizer, or its card is missing or damaged.

    Example:
        >>> card("default")["training"]["tasks"]
        ['mixture']
    """
    names = shipped_names()
    if name not in names:
        raise SerializationError(f"{name} is not a shipped optimizer; there are: {', '.join(names) or 'none yet'}")
    file = Path(str(resources.files("gmn_lopt") / SHIPPED / name / CARD_FILE))
    try:
        content = read_json(file)
    except FileError as error:
        raise SerializationError(f"{error}; reinstall gmn_lopt") from error
    if not isinstance(content.get("description"), str):
        raise SerializationError(f"{file} is damaged: it has no description; reinstall gmn_lopt")
    return content
