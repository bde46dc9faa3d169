"""The one grammar of the command lines' strings: ``NAME``, or ``NAME:setting=value,setting=value``.

Stages of meta-training (``nres:meta_steps=400,schedule=cosine``), optimizers (``optax:adam:learning_rate=1e-3``) and
tasks (``cifar10_mlp:hidden=64``) are written in it.
"""

import ast
import re
import warnings
from collections.abc import Mapping
from typing import Any

LONGEST = 4096  # characters
# The name ends where the first setting begins: it may hold colons itself, as in optax:adam or package.module:make.
_SPEC = re.compile(r"(?P<name>.*?)(?::(?P<settings>\s*[^\W\d]\w*\s*=.*))?", re.DOTALL)


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``NAME:setting=value,setting=value`` into the name and the settings; nothing is evaluated.

    Args:
        text: the name alone, or followed by a colon and settings. A value is a Python literal, or a bare word, which
            is a string.

    Returns:
        The name, without spaces around it, and the settings' values.

    Raises:
        ValueError: in one line, if the text is not of this form.

    Example:
        >>> parse_spec("optax:adam:learning_rate=1e-3,nesterov=True")
        ('optax:adam', {'learning_rate': 0.001, 'nesterov': True})
        >>> parse_spec("nres:schedule=cosine")
        ('nres', {'schedule': 'cosine'})
        >>> parse_spec("digits_mlp")
        ('digits_mlp', {})
    """
    if len(text) > LONGEST:
        raise ValueError(f"{text[:40]!r}... has {len(text)} characters, more than {LONGEST}")
    found = _SPEC.fullmatch(text)
    assert found is not None, "the pattern matches everything"
    name = found["name"].strip()
    if not name or not name.isprintable():
        raise ValueError(
            f"{text!r}: write NAME or NAME:setting=value,setting=value, the name without control characters"
        )
    try:
        return name, _settings(found["settings"] or "")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"{text!r}: write {name}:setting=value,setting=value, each setting once, with numbers, words or other "
            "literals as values"
        ) from None


def format_spec(name: str, settings: Mapping[str, Any]) -> str:
    """The text that :func:`parse_spec` splits into this name and these settings.

    Example:
        >>> format_spec("nres", {"meta_steps": 400, "schedule": "cosine"})
        'nres:meta_steps=400,schedule=cosine'
    """
    plain = {key: isinstance(value, str) and value.isidentifier() for key, value in settings.items()}
    texts = [f"{key}={value if plain[key] else repr(value)}" for key, value in settings.items()]
    return f"{name}:{','.join(texts)}" if texts else name


def split_label(name: str) -> tuple[str | None, str]:
    """Split the name of a spec that may have a label in front, ``LABEL=NAME``; without one the label is None.

    Raises:
        ValueError: in one line, if the label or what follows it is empty.

    Example:
        >>> split_label("tuned=optax:adam")
        ('tuned', 'optax:adam')
        >>> split_label("runs/digits")
        (None, 'runs/digits')
    """
    label, equals, rest = (part.strip() for part in name.partition("="))
    if not equals:
        return None, name
    if not label or not rest:
        raise ValueError(f"{name!r}: write LABEL=NAME, with neither of them empty")
    return label, rest


def _settings(text: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is no number, or no escape sequence
        call = ast.parse(f"f({text})", mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError
    values = {keyword.arg: _value(keyword.value) for keyword in call.keywords}
    if len(values) != len(call.keywords) or None in values:
        raise ValueError
    return {str(name): value for name, value in values.items()}


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
