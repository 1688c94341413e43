"""What Setup keeps of an answer file, found and removed through an agent, on Wine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.errors import AgentError, TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.targets.windows.answer_file import Secrets
from pytest_kdriver.targets.windows.scrubbing import scrub_guest
from tests.wine.test_wine_agent import new_guest

SECRETS = Secrets(password="Pw-1.unheard_of=24+chars", product_key="AAAAA-BBBBB-CCCCC-DDDDD-EEEEE")
PANTHER = "C:\\Windows\\Panther"


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[tuple[Agent, Path]]:
    """An agent, and the folder that its C: is."""
    with new_guest() as guest, guest.agent() as agent:
        yield agent, guest.path / "drive_c"


def put(drive: Path, name: str, content: bytes) -> Path:
    """A file, whatever the case of the folders that are there."""
    place = drive
    *folders, last = name.split("/")
    for folder in folders:
        there = [p for p in place.iterdir() if p.name.lower() == folder.lower()]
        place = there[0] if there else place / folder
        place.mkdir(exist_ok=True)
    (place / last).write_bytes(content)
    return place / last


def test_copies_go_and_what_has_a_secret_does_and_nothing_else(guest: tuple[Agent, Path]) -> None:
    agent, drive = guest
    password, key = SECRETS.password, SECRETS.product_key
    assert key is not None
    removed = [
        put(drive, "Windows/Panther/unattend.xml", b"*SENSITIVE*DATA*DELETED*"),
        put(drive, "Windows/Panther/unattend-original.xml", b""),
        put(drive, "Windows/Panther/UnattendGC/Unattend.XML", b""),
        put(drive, "Windows/System32/Sysprep/unattend.xml", b""),
        put(drive, "autounattend.xml", b""),
        put(drive, "Windows/Panther/setupact.log", b"a line\r\n" + password.encode() + b"\r\n"),
        put(drive, "Windows/Panther/with spaces/\u00e4 log", password.encode("utf-16-le")),
        put(drive, "Windows/Setup/State/keys.txt", key.encode()),
    ]
    kept = [
        put(drive, "Windows/Panther/setuperr.log", b"nothing"),
        put(drive, "Windows/Panther/cbs.xml", b"<a/>"),
        put(drive, "other.xml", b"<a/>"),
        put(drive, "users/notes.txt", b"of the user's"),
    ]
    told: list[str] = []
    scrub_guest(agent, SECRETS, told.append)
    assert [path for path in removed if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []
    assert told == []
    scrub_guest(agent, SECRETS, told.append)  # a second time finds nothing


def test_nothing_of_setup_s_is_nothing_to_remove(guest: tuple[Agent, Path]) -> None:
    agent, _ = guest
    scrub_guest(agent, SECRETS, lambda _: None)


class Refusing:
    """An agent whose files can't be read, or deleted, as files that are in use can't be."""

    def __init__(self, agent: Agent, operation: str) -> None:
        self._agent = agent
        self._operation = operation

    def __getattr__(self, name: str) -> object:
        if name == self._operation:
            return self._refuse
        return getattr(self._agent, name)

    def _refuse(self, path: str, *, timeout: float = 0.0) -> None:
        raise AgentError(f"{path} is in use", operation=self._operation)


def test_a_copy_that_stays_fails_and_a_file_in_use_is_told(guest: tuple[Agent, Path]) -> None:
    agent, drive = guest
    put(drive, "Windows/Panther/unattend.xml", b"")
    put(drive, "Windows/Panther/setupact.log", b"")
    with pytest.raises(TargetError, match=r"unattend\.xml .* can't be deleted") as failure:
        scrub_guest(Refusing(agent, "delete"), SECRETS, lambda _: None)  # type: ignore[arg-type]
    assert SECRETS.password not in str(failure.value)
    told: list[str] = []
    scrub_guest(Refusing(agent, "get"), SECRETS, told.append)  # type: ignore[arg-type]
    (line,) = told
    assert "not looked into for the password" in line
    assert "setupact.log is in use" in line
