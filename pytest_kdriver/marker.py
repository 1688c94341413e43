"""The marker ``kdriver``, checked and merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any, Final, get_args

from pytest_kdriver.config import CAPABILITIES, ISOLATIONS, Isolation
from pytest_kdriver.driver import Permission, check_service_name
from pytest_kdriver.errors import ConfigError
from pytest_kdriver.guest.registry import encode_value
from pytest_kdriver.image.finder import is_path
from pytest_kdriver.targets.target import ParameterValue

KEYWORDS: Final = (
    "name",
    "parameters",
    "service",
    "leaks",
    "breakpoints",
    "tags",
    "requires",
    "timeout",
)

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The positional and keyword arguments of one ``@pytest.mark.kdriver(...)``, as the user wrote them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverMark:
    """What a test says of its driver, all of it.

    ``name`` is a cargo package, or the stem of ``path``. ``timeout`` None: the config's.
    """

    name: str
    path: str | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    service: str | None = None
    leaks: Permission = "forbid"
    breakpoints: Permission = "forbid"
    tags: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    timeout: float | None = None


def merge(marks: Iterable[Arguments]) -> DriverMark | None:
    """The outcome of marks given outermost first: of each argument the closest one wins.

    None where none of them names a driver. Raises ``ConfigError`` for an argument that can't be.
    """
    merged: dict[str, Any] = {}
    for positional, keywords in marks:
        merged.update(_arguments(positional, keywords))
    if "name" not in merged:
        return None
    name = str(merged.pop("name"))
    path = name if is_path(name) else None
    mark = DriverMark(name=path_name(path) if path else name, path=path, **merged)
    check_service_name(mark.service or mark.name)
    return mark


def path_name(path: str) -> str:
    """What the driver at ``path`` is called: cargo-wdk's folder of ``hello`` is ``hello_package``."""
    return PurePath(path).stem.removesuffix("_package")


def _arguments(positional: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    if len(positional) > 1:
        raise ConfigError(
            f"kdriver takes one positional argument, the driver's name; got {positional!r}"
        )
    for key in keywords:
        if key not in KEYWORDS:
            raise ConfigError(f"kdriver has no argument {key!r}; there are: {', '.join(KEYWORDS)}")
    arguments = dict(keywords)
    if positional:
        if "name" in arguments:
            raise ConfigError("kdriver got its name twice")
        arguments["name"] = positional[0]
    return {key: _CHECKS[key](value) for key, value in arguments.items()}


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong("name", value, "a cargo package, or a path to a .sys file")
    return value


def _parameters(value: object) -> dict[str, ParameterValue]:
    allowed = "a dict of names to int, str, bytes or lists of str"
    if not isinstance(value, Mapping):
        raise _wrong("parameters", value, allowed)
    for key, entry in value.items():
        if not isinstance(key, str):
            raise _wrong("parameters", {key: entry}, allowed)
        try:
            encode_value(entry)
        except (TypeError, ValueError) as error:
            raise _wrong("parameters", {key: entry}, f"{allowed} ({error})") from None
    return dict(value)


def _service(value: object) -> str:
    if not isinstance(value, str):
        raise _wrong("service", value, "a service's name")
    return check_service_name(value)


def _permission(key: str, value: object) -> Permission:
    for known in get_args(Permission):
        if value == known:
            return value  # type: ignore[return-value]  # it is one of them
    raise _wrong(key, value, "'forbid' or 'allow'")


def _tags(value: object) -> tuple[str, ...]:
    tags = _strings("tags", value)
    for tag in tags:
        if not (0 < len(tag) <= 4 and tag.isascii()):
            raise _wrong("tags", value, "pool tags, of one to four ASCII characters")
    return tags


def _requires(value: object) -> tuple[str, ...]:
    names = _strings("requires", value)
    for name in names:
        if name not in CAPABILITIES:
            raise _wrong("requires", value, f"capabilities: {', '.join(CAPABILITIES)}")
    return names


def _timeout(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _wrong("timeout", value, "seconds, more than 0")
    return float(value)


def _strings(key: str, value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple | set | frozenset):
        raise _wrong(key, value, "a string, or a list of strings")
    if not all(isinstance(entry, str) for entry in strings):
        raise _wrong(key, value, "a string, or a list of strings")
    return tuple(strings)


def _wrong(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"kdriver: {key} is {value!r}; allowed: {allowed}")


_CHECKS: Final[Mapping[str, Callable[[object], Any]]] = {
    "name": _name,
    "parameters": _parameters,
    "service": _service,
    "leaks": partial(_permission, "leaks"),
    "breakpoints": partial(_permission, "breakpoints"),
    "tags": _tags,
    "requires": _requires,
    "timeout": _timeout,
}


def isolation(arguments: Arguments) -> Isolation:
    """What ``@pytest.mark.kdriver_isolation(...)`` says. Raises ``ConfigError``."""
    positional, keywords = arguments
    wanted = positional[0] if len(positional) == 1 and not keywords else None
    for known in ISOLATIONS:
        if wanted == known:
            return known
    raise ConfigError(
        f"kdriver_isolation takes one argument; allowed: {', '.join(map(repr, ISOLATIONS))}"
    )
