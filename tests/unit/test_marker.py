"""The marker: merged from many, checked, and told what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_kdriver.errors import ConfigError
from pytest_kdriver.marker import DriverMark, isolation, merge


def test_the_closest_mark_wins_argument_by_argument() -> None:
    merged = merge(
        [
            (("hello",), {"timeout": 5, "parameters": {"A": 1}}),
            ((), {"leaks": "allow", "parameters": {"B": "x"}}),
        ]
    )
    assert merged == DriverMark(name="hello", timeout=5.0, leaks="allow", parameters={"B": "x"})


def test_a_path_s_stem_is_the_name() -> None:
    merged = merge([(("build/My Driver.sys",), {})])
    assert merged is not None
    assert (merged.name, merged.path) == ("My Driver", "build/My Driver.sys")


def test_marks_that_name_no_driver_are_none() -> None:
    assert merge([((), {"leaks": "allow"})]) is None


@pytest.mark.parametrize(
    ("positional", "keywords", "message"),
    [
        (("a", "b"), {}, "one positional argument"),
        (("a",), {"name": "b"}, "name twice"),
        (("a",), {"leak": "allow"}, "no argument 'leak'; there are: name, parameters"),
        ((1,), {}, "name is 1; allowed: a cargo package, or a path"),
        (("",), {}, "name is ''"),
        (("a",), {"parameters": [1]}, "parameters is .* allowed: a dict of names to int, str"),
        (("a",), {"parameters": {"x": 1.5}}, "parameters is {'x': 1.5}"),
        (("a",), {"parameters": {1: 1}}, "parameters is {1: 1}"),
        (("a",), {"service": 1}, "service is 1"),
        (("a",), {"service": "a\\b"}, "can't be a service's name"),
        (("grün",), {}, "can't be a service's name: letters"),
        (("a",), {"leaks": "no"}, "leaks is 'no'; allowed: 'forbid' or 'allow'"),
        (("a",), {"tags": ["abcde"]}, "pool tags, of one to four ASCII"),
        (("a",), {"tags": 1}, "tags is 1"),
        (("a",), {"tags": [1]}, r"tags is \[1\]"),
        (("a",), {"requires": ["fly"]}, "requires is .*; allowed: capabilities: kernel-log"),
        (("a",), {"timeout": 0}, "timeout is 0; allowed: seconds, more than 0"),
        (("a",), {"timeout": True}, "timeout is True"),
        (("a",), {"timeout": "1"}, "timeout is '1'"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(
    positional: tuple[Any, ...], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        merge([(positional, keywords)])


def test_parameters_of_each_kind_are_taken() -> None:
    values = {"d": 1, "q": 1 << 40, "s": "x", "b": b"\0", "m": ["a", "b"]}
    merged = merge([(("a",), {"parameters": values, "tags": "abcd", "requires": "pool"})])
    assert merged is not None
    assert merged.parameters == values
    assert (merged.tags, merged.requires) == (("abcd",), ("pool",))


def test_isolation_is_one_of_four() -> None:
    assert isolation((("test",), {})) == "test"
    for wrong in (("tests",), (), ("test", "none")):
        with pytest.raises(ConfigError, match="'test', 'module', 'session', 'none'"):
            isolation((wrong, {}))
