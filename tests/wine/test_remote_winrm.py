"""A remote machine behind WinRM: a real WS-Management endpoint, with a Wine prefix for its Windows.

Its shell is /bin/sh and its PowerShell a stand-in: not verified on Windows.
"""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

pytest.importorskip("winrm")

from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.guest.links.winrm import open_agent
from tests.unit import powershell_stand_in
from tests.unit.far_ends import until
from tests.unit.test_winrm_link import Connections, Relay
from tests.unit.wsman_server import HOST, PASSWORD, USER, WsmanServer
from tests.wine.test_remote import HELLO, Machine, Run, Verdicts, begin, choose

VARIABLE = "KDRIVER_PASSWORD_LAB"
ALL_BYTES = bytes(range(256))


class Lab(Machine):
    """The machine behind its WinRM server."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._path = powershell_stand_in.install(folder / "bin")
        self.server = self.serve("wsman")

    def serve(self, name: str, *options: str) -> WsmanServer:
        """A server of the machine's."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(self._path), prepend=":")
            return WsmanServer(self._folder / name, *options)

    def close(self) -> None:
        self.server.close()
        super().close()

    def settings(self) -> dict[str, object]:
        return super().settings() | {
            "via": "winrm",
            "port": self.server.https_port,
            "user": USER,
            "ca": str(self.server.certificate),
            "winrm_command": self.command,
        }


@pytest.fixture(scope="module")
def machine(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with closing(Lab(tmp_path_factory.mktemp("lab"))) as lab:
        yield lab


@pytest.fixture
def lab(machine: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv(VARIABLE, PASSWORD)
    for agent in machine.agents():
        agent.unlink()
    return machine


class TestARun:
    def test_brings_the_agent_tests_a_driver_and_leaves_nothing_but_the_agent(
        self,
        project: pytest.Pytester,
        run: Run,
        verdicts: Verdicts,
        lab: Lab,
        left_behind: Callable[[], list[str]],
    ) -> None:
        choose(project, lab)
        project.makepyfile(HELLO)
        result = run("--kdriver-vm", "lab")
        assert verdicts(result) == {"test_hello[lab]": "PASSED"}
        where = f"127.0.0.1:{lab.server.https_port} by WinRM"
        result.stdout.fnmatch_lines([f"kdriver: lab ({where})*"])
        (agent,) = lab.folder.iterdir()
        assert agent.read_bytes() == AGENT.executable().read_bytes()
        assert lab.images() == []
        until(lambda: not lab.agent_processes())
        assert left_behind() == []

    def test_behind_another_copies_nothing(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts, lab: Lab
    ) -> None:
        choose(project, lab, https=False, port=lab.server.http_port)
        project.makepyfile(HELLO)
        run()
        (agent,) = lab.folder.iterdir()
        before = agent.stat()
        assert verdicts(run()) == {"test_hello[lab]": "PASSED"}
        after = agent.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_waits_for_a_machine_that_is_on_its_way_up(
        self, project: pytest.Pytester, lab: Lab
    ) -> None:
        with socket.create_server((HOST, 0)) as nobody:
            port = nobody.getsockname()[1]
            certificate = lab.folder.parent / "later" / "certificate.pem"
            choose(project, lab, port=port, ca=certificate)
            certificate.parent.mkdir(exist_ok=True)
            certificate.write_bytes(lab.server.certificate.read_bytes())
            project.makepyfile(test_it=HELLO)
            process = begin(project, "test_it.py")
            nobody.accept()[0].close()
        with lab.serve("later", "--https", str(port)):
            assert process.wait(60) == 0, (project.path / "test_it.py.log").read_text()

    def test_goes_on_behind_a_connection_that_was_lost_in_the_middle_of_a_test(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts, lab: Lab
    ) -> None:
        with CutRelay(lab.server.https_port) as relay, Trigger(relay.cut) as trigger:
            choose(project, lab, port=relay.port)
            project.makepyfile(
                test_cut=f"""
                import socket
                import pytest

                @pytest.mark.kdriver("hello", leaks="allow")
                def test_is_cut_off(kdriver):
                    kdriver.start()
                    with socket.create_connection(("{HOST}", {trigger.port})) as trigger:
                        assert trigger.recv(1) == b""
                    kdriver.stop()
                """,
                test_next=HELLO,
            )
            result = run()
        assert verdicts(result) == {"test_is_cut_off[lab]": "FAILED", "test_hello[lab]": "PASSED"}
        result.stdout.fnmatch_lines(["*target 'lab': *the connection was lost*"])
        assert lab.images() == []
        until(lambda: not lab.agent_processes())


class CutRelay(Relay):
    """Between a client and a server. Where it is cut the next two connections are refused, too: what is
    asked over a new one, because nothing was on its way just then, would be no loss."""

    def __init__(self, port: int) -> None:
        self._refused = 0
        super().__init__(port)

    def __enter__(self) -> CutRelay:
        return self

    def serve(self, connection: socket.socket) -> None:
        if self._refused > 0:
            self._refused -= 1
        else:
            super().serve(connection)

    def cut(self) -> None:
        self._refused = 2
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Trigger(Connections):
    """Does something for whoever connects, and hangs up then."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        super().__init__()

    def __enter__(self) -> Trigger:
        return self

    def serve(self, connection: socket.socket) -> None:
        self._act()


class TestTheAgent:
    @pytest.mark.parametrize(
        ("options", "before", "is_base64"),
        [
            ((), "", False),
            (("--mangle",), "", True),
            ((), "stdbuf -o0 tr '\\200-\\377' '?' |", True),
        ],
        ids=["unharmed", "changed on the way here", "changed on the way there"],
    )
    def test_is_understood_whatever_becomes_of_the_bytes(
        self, lab: Lab, options: tuple[str, ...], before: str, is_base64: bool
    ) -> None:
        command = lab.command.replace("{agent}", str(AGENT.executable()))
        if before:
            script = f'{before} {command.removeprefix("exec ")} "$@"'
            command = f"sh -c {shlex.quote(script)} sh"
        with lab.serve(f"server-{is_base64}-{len(options)}", *options) as server:
            seen = set()
            link = open_agent(server.config(), command, timeout=60)
            with Agent.connect(link, timeout=60) as agent:
                content = ALL_BYTES * 10_000
                agent.put(content, r"C:\all bytes")
                assert agent.get(r"C:\all bytes") == content
                for pid in lab.agent_processes():
                    seen |= set(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
            assert (b"--base64" in seen) == is_base64

    def test_that_can_not_be_started_is_told(self, lab: Lab) -> None:
        with pytest.raises(Exception, match=r"exit code 127 and said: .*no-such.*not found"):
            open_agent(lab.server.config(), "no-such-agent", timeout=60)

    def test_that_says_nothing_is_given_up(self, lab: Lab) -> None:
        with pytest.raises(TimeoutError, match="the agent did not answer within 1 s"):
            open_agent(lab.server.config(), "exec cat >/dev/null #", timeout=1)


class TestARunThatCanTBeginTells:
    @pytest.mark.parametrize(
        "case",
        [
            ({}, "tell-nobody", f"*it refused the user {USER} (401): the user or the password *"),
            ({}, None, f"*needs a password: put it into the environment as {VARIABLE}"),
            ({"ca": "/etc/hostname"}, PASSWORD, "*TLS did not work out*"),
            ({"port": 1, "timeout": 1}, PASSWORD, "*refused; does WinRM run there*"),
            (
                {"agent_path": "/proc/kdagent.exe"},
                PASSWORD,
                "*, /proc/kdagent-*.exe can't be written: *",
            ),
            ({"winrm_command": "no-such {agent}"}, PASSWORD, "*exit code 127*not found*"),
        ],
        ids=["password", "no-password", "ca", "port", "unwritable", "command"],
    )
    def test_why(
        self,
        project: pytest.Pytester,
        run: Run,
        lab: Lab,
        monkeypatch: pytest.MonkeyPatch,
        case: tuple[dict[str, object], str | None, str],
    ) -> None:
        changes, password, sentence = case
        choose(project, lab, **changes)
        if password is None:
            monkeypatch.delenv(VARIABLE)
        else:
            monkeypatch.setenv(VARIABLE, password)
        project.makepyfile(HELLO)
        result = run("--showlocals", "--full-trace")
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines([f"*target 'lab': {sentence}"])
        for line in ("*Traceback*", f"*{password or PASSWORD}*"):
            result.stdout.no_fnmatch_line(line)
            result.stderr.no_fnmatch_line(line)
