"""The passwords of the Windows that were installed here: the user's own, each in a file of mode 0600."""

from __future__ import annotations

import os
import secrets
import string
from pathlib import Path
from typing import Final

from pytest_kdriver.paths import state_directory

_KINDS: Final = (string.ascii_lowercase, string.ascii_uppercase, string.digits, "-_.+=")
"""Of each of these a password has one, as Windows asks of it; none means anything to cmd.exe or to XML."""

_LENGTH: Final = 24


def new_password() -> str:
    """A random password that any Windows takes."""
    letters = [secrets.choice(kind) for kind in _KINDS]
    letters += [secrets.choice("".join(_KINDS)) for _ in range(_LENGTH - len(letters))]
    secrets.SystemRandom().shuffle(letters)
    return "".join(letters)


def passwords_directory() -> Path:
    """Where they are."""
    return state_directory() / "windows-passwords"


def password_file(image: str) -> Path:
    """Where the password of the image in the folder of this name is, if it was installed here."""
    return passwords_directory() / image


def keep_password(image: str, password: str) -> None:
    """Keep the password of the image in the folder of this name. Raises OSError."""
    path = password_file(image)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    forget_password(image)
    with open(
        path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)
    ) as file:
        file.write(password)


def find_password(image: str) -> str | None:
    """The password of the image in the folder of this name; None where it was not installed here."""
    try:
        return password_file(image).read_text(encoding="utf-8")
    except OSError:
        return None


def forget_password(image: str) -> None:
    """Remove it, if it is there."""
    password_file(image).unlink(missing_ok=True)
