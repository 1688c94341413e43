"""A file's way to a machine by WinRM: what our script says, and what becomes of what it answers.

What does it here is a stand-in: not verified on Windows.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("winrm")

import tree_sitter
import tree_sitter_powershell

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links import powershell
from pytest_kdriver.guest.links.powershell import POWERSHELL, SCRIPT, command_line, place_file
from tests.unit import powershell_stand_in
from tests.unit.far_ends import PATIENCE
from tests.unit.wsman_server import WsmanServer

CONTENT = bytes(range(256)) * 1000
LONGEST_COMMAND = 8191
"""Of cmd.exe, which runs a WinRM shell's commands."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WsmanServer]:
    folder = tmp_path_factory.mktemp("winrm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(powershell_stand_in.install(folder / "bin")), prepend=":")
        server = WsmanServer(folder / "wsman")
    with server:
        yield server


class TestTheScript:
    def test_is_powershell(self) -> None:
        parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
        text = "& {\n" + SCRIPT.replace("@LENGTH@", "5") + "}\n"
        tree = parser.parse(text.encode())
        assert not tree.root_node.has_error
        blocks, nodes = [], [tree.root_node]
        while nodes:
            node = nodes.pop(0)
            blocks += [node] if node.type == "named_block" else []
            nodes += node.children
        texts = [(block.text or b"").split()[0] for block in blocks]
        assert texts == [b"begin", b"process", b"end"]
        assert parser.parse(text.replace("catch {", "catch (").encode()).root_node.has_error

    def test_fits_into_a_command_line_whatever_the_path(self) -> None:
        command = command_line(b"x" * 10_000_000, "C:\\" + "a" * 250 + ".exe")
        assert len(command) < LONGEST_COMMAND

    def test_goes_there_as_it_is_with_nothing_of_the_content(self) -> None:
        command = command_line(b"\0" * 100, r"C:\kdriver\kdagent.exe")
        assert command.startswith(POWERSHELL)
        script = base64.b64decode(command.removeprefix(POWERSHELL)).decode("utf-16-le")
        assert "$path = 'C:\\kdriver\\kdagent.exe'\n" in script
        assert "$left = 100\n" in script
        assert "@" not in script


class TestPlacingAFile:
    def test_makes_its_folders_and_copies_once(self, server: WsmanServer, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "file"
        assert place_file(server.config(), CONTENT, str(path), timeout=PATIENCE)
        assert path.read_bytes() == CONTENT
        before = path.stat()
        assert not place_file(server.config(), CONTENT, str(path), timeout=PATIENCE)
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("other", [CONTENT + b"more", CONTENT[:-1], b""])
    def test_over_another_content_replaces_it(
        self, server: WsmanServer, tmp_path: Path, other: bytes
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(other)
        assert place_file(server.config(), CONTENT, str(path), timeout=PATIENCE)
        assert path.read_bytes() == CONTENT

    def test_that_can_t_be_made_is_told(self, server: WsmanServer, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "below"
        with pytest.raises(LinkError, match=r"on 127.0.0.1:\d+, .*file/below can't be written: .*"):
            place_file(server.config(), CONTENT, str(path), timeout=PATIENCE)

    def test_that_can_t_be_replaced_is_told_and_leaves_nothing(
        self, server: WsmanServer, tmp_path: Path
    ) -> None:
        path = tmp_path / "file"
        path.mkdir()
        with pytest.raises(LinkError, match="file can't be written: .*Is a directory"):
            place_file(server.config(), CONTENT, str(path), timeout=PATIENCE)
        assert list(tmp_path.iterdir()) == [path]

    def test_that_was_changed_on_its_way_is_told_and_leaves_nothing(
        self, server: WsmanServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changed = binascii.b2a_base64(CONTENT[:-1] + b"?")
        monkeypatch.setattr(powershell, "_lines", lambda _: changed)
        with pytest.raises(LinkError, match="can't be written: it was changed on its way"):
            place_file(server.config(), CONTENT, str(tmp_path / "file"), timeout=PATIENCE)
        assert list(tmp_path.iterdir()) == []

    def test_where_there_is_no_powershell_is_told(self, tmp_path: Path) -> None:
        with (
            WsmanServer(tmp_path / "wsman") as server,
            pytest.raises(LinkError, match="PowerShell is gone: it ended with exit code 127"),
        ):
            place_file(server.config(), CONTENT, "/nowhere/file", timeout=PATIENCE)

    def test_whose_powershell_hangs_is_a_timeout(
        self, server: WsmanServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(powershell, "POWERSHELL", "exec cat >/dev/null # ")
        with pytest.raises(TimeoutError, match="did not take the file /file within 1 s"):
            place_file(server.config(), CONTENT, "/file", timeout=1)
