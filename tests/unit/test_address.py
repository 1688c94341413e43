"""Where a guest's agent is: what is written down of it, and where WinRM's password comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.errors import LinkError
from pytest_kdriver.targets.libvirt.address import (
    Address,
    NotLetInError,
    SerialAddress,
    SshAddress,
    WinrmAddress,
    from_json,
    to_json,
)
from tests.unit.wsman_server import PASSWORD, USER, WsmanServer

VARIABLE = "KDRIVER_PASSWORD_MINE"
WRONG = "correct horse"
TIMEOUT = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WsmanServer]:
    with WsmanServer(tmp_path_factory.mktemp("wsman")) as server:
        yield server


def address(server: WsmanServer, password_file: Path | None) -> WinrmAddress:
    return WinrmAddress(
        port=server.https_port,
        user=USER,
        password_file=str(password_file) if password_file is not None else None,
        https=True,
        ca=str(server.certificate),
        command="cat; :",  # behind which kdagent's options do nothing
        password_variable=VARIABLE,
    )


def write(path: Path, password: str, mode: int = 0o600) -> Path:
    path.touch(mode=mode)
    path.chmod(mode)
    path.write_text(f"{password}\n")
    return path


class TestWinrm:
    def test_takes_the_password_from_a_file(self, server: WsmanServer, tmp_path: Path) -> None:
        address(server, write(tmp_path / "password", PASSWORD)).open(TIMEOUT).close()

    def test_takes_it_from_the_environment_rather(
        self, server: WsmanServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(VARIABLE, PASSWORD)
        address(server, write(tmp_path / "password", WRONG)).open(TIMEOUT).close()

    def test_says_where_a_password_may_come_from(self, server: WsmanServer) -> None:
        with pytest.raises(NotLetInError, match=f"needs a password: set {VARIABLE}"):
            address(server, None).open(TIMEOUT)

    def test_takes_none_that_others_may_read(self, server: WsmanServer, tmp_path: Path) -> None:
        path = write(tmp_path / "password", PASSWORD, 0o640)
        with pytest.raises(NotLetInError, match=f"chmod 600 {path}"):
            address(server, path).open(TIMEOUT)

    def test_says_that_the_file_is_not_there(self, server: WsmanServer, tmp_path: Path) -> None:
        with pytest.raises(NotLetInError, match="can't be read from .*: No such file"):
            address(server, tmp_path / "password").open(TIMEOUT)

    def test_with_a_wrong_password_is_over(self, server: WsmanServer, tmp_path: Path) -> None:
        path = write(tmp_path / "password", WRONG)
        with pytest.raises(NotLetInError, match="401") as refused:
            address(server, path).open(TIMEOUT)
        assert WRONG not in str(refused.getrepr(showlocals=True))

    def test_may_be_asked_again_while_nobody_listens(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(VARIABLE, PASSWORD)
        with WsmanServer(tmp_path) as server:
            gone = address(server, None)
        with pytest.raises(LinkError, match="refused") as down:
            gone.open(TIMEOUT)
        assert not isinstance(down.value, NotLetInError)


@pytest.mark.parametrize(
    "written",
    [
        SerialAddress(path="/run/agent"),
        SshAddress(
            port=1,
            user="root",
            key=None,
            known_hosts="/known",
            host_key_alias="kdriver-mine",
            command="kdagent",
            password_variable=VARIABLE,
        ),
        WinrmAddress(
            port=1,
            user="root",
            password_file="/password",
            https=True,
            ca=None,
            command="kdagent",
            password_variable=VARIABLE,
        ),
    ],
    ids=lambda written: type(written).__name__,
)
def test_what_is_written_down_is_read_again(written: Address) -> None:
    assert from_json(json.loads(json.dumps(to_json(written)))) == written
