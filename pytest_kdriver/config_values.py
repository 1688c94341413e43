"""Checks of a config's values, as virtual and remote machines have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias, cast

from pytest_kdriver.errors import ConfigError

Check: TypeAlias = Callable[[object, Path], object]
"""Takes a value, and the folder that paths are relative to; gives what is meant. Raises ``Refused``."""


class Refused(Exception):
    """A value that can't be; the message says what can."""


def check_values(
    table: Mapping[str, object], checks: Mapping[str, Check], where: str, folder: Path
) -> dict[str, object]:
    """The values that are meant. Raises ``ConfigError``; ``where`` says what is being read."""
    checked = {}
    for key, value in table.items():
        try:
            checked[key] = checks[key](value, folder)
        except Refused as refused:
            raise ConfigError(f"{where}: {key} is {value!r}; allowed: {refused}") from None
    return checked


def one_of(*words: str) -> Check:
    """One of these words."""

    def check(value: object, _: Path) -> object:
        if value not in words:
            raise Refused(", ".join(words))
        return value

    return check


def matching(pattern: re.Pattern[str], words: str) -> Check:
    """What matches ``pattern``, which ``words`` describe."""

    def check(value: object, _: Path) -> object:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise Refused(words)
        return value

    return check


def between(least: int, most: int, words: str) -> Check:
    """An integer of a range; ``words`` say of what."""

    def check(value: object, _: Path) -> object:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise Refused(f"{words}, {least} to {most}")
        return value

    return check


def flag(value: object, _: Path) -> object:
    """True or false."""
    if not isinstance(value, bool):
        raise Refused("true, false")
    return value


def text(value: object, _: Path) -> object:
    """A line of text."""
    if not isinstance(value, str) or not value or any(not sign.isprintable() for sign in value):
        raise Refused("a line of text")
    return value


def path(value: object, folder: Path) -> object:
    """A path of this host."""
    return folder / Path(cast("str", text(value, folder))).expanduser()


def seconds(value: object, _: Path) -> object:
    """A duration."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise Refused("seconds, more than 0")
    return float(value)


tcp_port = between(1, 65535, "a TCP port")
