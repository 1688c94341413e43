r"""What an installation leaves of the answer file's secrets, found and removed.

In the guest: the copies that Setup keeps, which lie where it looks for answer files ("Windows Setup
Automation Overview", learn.microsoft.com/windows-hardware/manufacture/desktop/
windows-setup-automation-overview), and whatever else in Setup's folders has one. On the disk: all that was
deleted since, by whoever. Not verified on Windows.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Final

from pytest_kdriver.errors import AgentError, TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.targets.windows.answer_file import Secrets
from pytest_kdriver.targets.windows.kinds import run

FOLDERS: Final = (r"C:\Windows\Panther", r"C:\Windows\System32\Sysprep", r"C:\Windows\Setup")
"""Where Setup keeps answer files, states and logs."""

ANSWER_FILES: Final = "*unattend*.xml"
_PIECE: Final = 16 << 20
_GET_TIME: Final = 600.0
"""Seconds that a log of Setup's may take, tens of megabytes through a COM port."""


def patterns(secrets: Secrets) -> tuple[bytes, ...]:
    """How the secrets can stand in a file: in UTF-8, in UTF-16, and as Setup hides passwords.

    That is base64 of the UTF-16 text with the name of its element behind it.
    """
    found = []
    for secret in (secrets.password, secrets.product_key):
        if secret is not None:
            found += [secret.encode(), secret.encode("utf-16-le")]
    for element in ("Password", "AdministratorPassword"):
        hidden = base64.b64encode(f"{secrets.password}{element}".encode("utf-16-le"))
        found += [hidden, hidden.decode().encode("utf-16-le")]
    return tuple(found)


def scrub_guest(agent: Agent, secrets: Secrets, tell: Callable[[str], None]) -> None:
    """Delete the copies of the answer file, and what else of Setup's has a secret in it.

    ``tell`` is told of a file that can't be looked into. Raises ``TargetError`` for one that stays.
    """
    wanted = patterns(secrets)
    for path in _files(agent):
        if path.match(ANSWER_FILES) or _has(agent, path, wanted, tell):
            try:
                agent.delete(str(path))
            except AgentError:
                raise TargetError(f"{path} has the password, and can't be deleted") from None


def _files(agent: Agent) -> Iterator[PureWindowsPath]:
    for folder in FOLDERS:
        yield from _listed(agent, folder, "/s")
    for path in _listed(agent, "C:\\"):
        if path.match(ANSWER_FILES):
            yield path


def _listed(agent: Agent, folder: str, *options: str) -> list[PureWindowsPath]:
    """The files in a folder, by cmd.exe's ``dir``, which ends with 1 where there is none."""
    done = run(agent, ["cmd.exe", "/u", "/c", "dir", "/b", "/a-d", *options, folder], accept=(0, 1))
    lines = done.stdout.decode("utf-16-le", "replace").splitlines()
    return [PureWindowsPath(folder, line.strip()) for line in lines if line.strip()]


def _has(
    agent: Agent, path: PureWindowsPath, wanted: tuple[bytes, ...], tell: Callable[[str], None]
) -> bool:
    try:
        content = agent.get(str(path), timeout=_GET_TIME)
    except AgentError as error:
        tell(f"not looked into for the password: {error}")
        return False
    return any(pattern in content for pattern in wanted)


def scrub_disk(disk: Path, secrets: Secrets) -> int:
    """Overwrite with zeros whatever of a raw disk is a secret; how many times one was found.

    What is deleted in a guest stays on its disk. Raises OSError.
    """
    wanted = patterns(secrets)
    overlap = max(map(len, wanted)) - 1
    found = 0
    with disk.open("r+b") as file:
        for begin, end in _data(file.fileno()):
            at = begin
            while at < end:
                piece = os.pread(file.fileno(), min(_PIECE, end - at), at)
                if not piece:
                    break
                for pattern in wanted:
                    place = piece.find(pattern)
                    while place >= 0:
                        os.pwrite(file.fileno(), bytes(len(pattern)), at + place)
                        found += 1
                        place = piece.find(pattern, place + len(pattern))
                at += max(len(piece) - overlap, 1) if at + len(piece) < end else len(piece)
    return found


def _data(descriptor: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data: from, to."""
    end, size = 0, os.fstat(descriptor).st_size
    while end < size:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # ENXIO: there is none behind
            return
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end
