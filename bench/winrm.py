"""A file and a request through WinRM, against what others do over the same endpoint, and against SSH."""

from __future__ import annotations

import base64
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from pypsrp.shell import Process, SignalCode, WinRS
from pypsrp.wsman import WSMan
from winrm.protocol import Protocol

from bench.figure import Figure, Limited, median
from bench.guest import BarePrefix, bare_prefix
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.guest.links.ssh import SshLink
from pytest_kdriver.guest.links.winrm import WinrmLink, open_agent
from tests.unit.far_ends import Sshd
from tests.unit.wsman_server import HOST, PASSWORD, USER, WsmanServer

SIZE = 10_000_000
RUNS = 5
USUAL_SIZE = SIZE // 10
"""The usual way's time is ten times that of this many bytes: it is made of equal steps."""

USUAL_RUNS = 3
STREAM_RUNS = 31
_MEGABYTE = 1_000_000
COMMAND_SIZE = 8000
"""The most signs of base64 in a command: cmd.exe takes a line of 8191."""

ENVELOPE = 500 << 10
REQUESTS = 500
START_TIMEOUT = 120.0


def measure() -> list[Figure]:
    """All over one endpoint, by HTTPS and NTLM."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bare = stack.enter_context(bare_prefix())
        server = stack.enter_context(WsmanServer(folder / "wsman"))
        sshd = Sshd(folder / "sshd")
        stack.callback(sshd.close)
        command = _agent_command(bare)
        ours = Agent.connect(
            open_agent(server.config(), command, timeout=START_TIMEOUT), timeout=START_TIMEOUT
        )
        stack.callback(ours.close)
        by_ssh = Agent.connect(
            SshLink(sshd.config(), command, timeout=START_TIMEOUT), timeout=START_TIMEOUT
        )
        stack.callback(by_ssh.close)
        return _copies(ours, server, bare, folder) + _requests(ours, by_ssh)


def _agent_command(bare: BarePrefix) -> str:
    environment = bare.wine.environment(bare.path, "-all")
    own = [f"{name}={value}" for name, value in environment.items() if name.startswith("WINE")]
    return shlex.join(["exec", "env", *own, *bare.command(AGENT.executable())])


def _copies(agent: Agent, server: WsmanServer, bare: BarePrefix, folder: Path) -> list[Figure]:
    data = os.urandom(SIZE)
    part = data[:USUAL_SIZE]
    path = folder / "copy"
    puts = [
        _timed(lambda: agent.put(data, r"C:\copy"), bare.path / "drive_c" / "copy", data)
        for _ in range(RUNS)
    ]
    with _pywinrm_shell(server) as run:
        usual = [
            _timed(lambda: _by_commands(run, part, path), path, part) for _ in range(USUAL_RUNS)
        ]
    ours, theirs = [], []
    command = f"echo ready; head -c {SIZE} >{path}; echo done"
    with _pypsrp_shell(server) as shell:
        for _ in range(STREAM_RUNS):
            ours.append(_stream_by_link(server, command, data))
            theirs.append(_stream_by_pypsrp(shell, command, data))
    return [
        Figure(
            name="copy by WinRM",
            value=median(puts),
            unit="s",
            floor=median(usual) * SIZE / USUAL_SIZE,
            limit=1 / 20,
            limited=Limited.RATIO,
            note=f"Agent.put of {SIZE // _MEGABYTE} MB over WinrmLink into a Wine, its hash checked; median "
            f"of {RUNS}. Floor: base64 in commands of {COMMAND_SIZE} signs by pywinrm, all in one shell; "
            f"{SIZE // USUAL_SIZE} times the median of {USUAL_RUNS} copies of {USUAL_SIZE // _MEGABYTE} MB",
        ),
        Figure(
            name="standard input by WinRM",
            value=min(ours),
            unit="s",
            floor=min(theirs),
            limit=1,
            limited=Limited.RATIO,
            note=f"{SIZE // _MEGABYTE} MB over WinrmLink, until the program there has them in a file; best "
            f"of {STREAM_RUNS}, as what else runs only adds. Floor: pypsrp's WinRS, in envelopes of the same "
            "size, by turns",
        ),
    ]


def _timed(copy: Callable[[], None], path: Path, data: bytes) -> float:
    path.unlink(missing_ok=True)
    begin = time.perf_counter()
    copy()
    seconds = time.perf_counter() - begin
    assert path.read_bytes() == data
    return seconds


@contextmanager
def _pywinrm_shell(server: WsmanServer) -> Iterator[Callable[[str], None]]:
    protocol = Protocol(
        f"https://{HOST}:{server.https_port}/wsman",
        transport="ntlm",
        username=USER,
        password=PASSWORD,
        ca_trust_path=str(server.certificate),
    )
    shell = protocol.open_shell()

    def run(line: str) -> None:
        command = protocol.run_command(shell, line)
        _, complaint, code = protocol.get_command_output(shell, command)
        protocol.cleanup_command(shell, command)
        assert code == 0, complaint

    yield run
    protocol.close_shell(shell)


def _by_commands(run: Callable[[str], None], data: bytes, path: Path) -> None:
    size = COMMAND_SIZE // 4 * 3
    for start in range(0, len(data), size):
        text = base64.b64encode(data[start : start + size]).decode()
        run(f"echo {text} | base64 -d >>{path}")


@contextmanager
def _pypsrp_shell(server: WsmanServer) -> Iterator[WinRS]:
    connection = WSMan(
        HOST,
        port=server.https_port,
        username=USER,
        password=PASSWORD,
        auth="ntlm",
        cert_validation=str(server.certificate),  # type: ignore[arg-type]  # a file may be named, too
        max_envelope_size=ENVELOPE,
    )
    with connection, WinRS(connection) as shell:
        yield shell


def _stream_by_link(server: WsmanServer, command: str, data: bytes) -> float:
    with closing(WinrmLink(server.config(), command, timeout=START_TIMEOUT)) as link:
        assert link.receive() == b"ready\n"
        begin = time.perf_counter()
        link.send(data, START_TIMEOUT)
        assert link.receive() == b"done\n"
        return time.perf_counter() - begin


def _stream_by_pypsrp(shell: WinRS, command: str, data: bytes) -> float:
    process = Process(shell, command)
    process.begin_invoke()
    process.poll_invoke()
    assert process.stdout == b"ready\n"
    size = shell.wsman.max_payload_size
    begin = time.perf_counter()
    for start in range(0, len(data), size):
        process.send(data[start : start + size], end=False)
    while process.stdout == b"ready\n":
        process.poll_invoke()
    seconds = time.perf_counter() - begin
    process.end_invoke()
    process.signal(SignalCode.TERMINATE)  # it gives its place in the shell back
    assert process.stdout == b"ready\ndone\n"
    return seconds


def _requests(ours: Agent, by_ssh: Agent) -> list[Figure]:
    values: list[float] = []
    floors: list[float] = []
    for _ in range(REQUESTS):
        for agent, times in ((ours, values), (by_ssh, floors)):
            begin = time.perf_counter()
            agent.fence("x")
            times.append(time.perf_counter() - begin)
    return [
        Figure(
            name="request by WinRM",
            value=median(values) * 1000,
            unit="ms",
            floor=median(floors) * 1000,
            note=f"a request to the agent and its answer; median of {REQUESTS}. Floor: by SSH, by turns",
        )
    ]
