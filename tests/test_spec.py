import doctest

import pytest

from gmn_lopt.util import spec
from gmn_lopt.util.spec import format_spec, parse_spec, split_label


def test_examples():
    assert doctest.testmod(spec) == (0, 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/c10", ("runs/c10", {})),
        ("runs/a=b:c", ("runs/a=b:c", {})),
        ("label=runs/c10:learning_rate=3e-3", ("label=runs/c10", {"learning_rate": 3e-3})),
        (
            "package.module:make: hidden = (64, 32), augment=False",
            ("package.module:make", {"hidden": (64, 32), "augment": False}),
        ),
        ("nres:n=-1,note='a:b=c,d',objective=final", ("nres", {"n": -1, "note": "a:b=c,d", "objective": "final"})),
    ],
)
def test_specs(text, expected):
    assert parse_spec(text) == expected
    assert parse_spec(format_spec(*expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ":a=1",
        "a\nb",
        "a\x1b[31m:b=1",
        "a:b=",
        "a:b=1,b=2",
        "a:b=1,2",
        "a:b=1) or f(c=2",
        "a:b=1)(c=2",
        "a:b=f()",
        "a:b=1+x",
        "a:lambda=1",
        "a:b=1,**{}",
        "a:b={[]: 1}",
        "a:b=\0",
        "a:b=" + "(" * 500,
    ],
)
def test_what_is_no_spec_is_refused_in_one_printable_line(text):
    with pytest.raises(ValueError) as error:
        parse_spec(text)
    assert str(error.value).isprintable() and "write" in str(error.value)


@pytest.mark.parametrize("name", ["=a", "a= "])
def test_labels_are_not_empty(name):
    with pytest.raises(ValueError, match="neither of them empty"):
        split_label(name)
