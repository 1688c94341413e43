r"""Wine's ntoskrnl as a target: a second to start, no VM, no Windows.

Each generation of the guest is a clone of a template prefix with a wineserver of its own. The agent is
the prefix's first process, so that everything that runs there inherits its stderr: a SOCK_SEQPACKET
socket, whose messages are Wine's trace and the kernel log's source.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.guest.links.process import ProcessLink
from pytest_kdriver.image.exports import KernelExports
from pytest_kdriver.image.preflight import Report, preflight
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.wine import DEBUG_CHANNELS, WineTrace
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.machine import Guest
from pytest_kdriver.targets.machine_target import START_TIMEOUT, MachineTarget
from pytest_kdriver.targets.pump import MessagePump
from pytest_kdriver.targets.runs import Run

CAPABILITIES: Final = frozenset(
    {"kernel-log", "pool", "pool-blocks", "crashes", "snapshots", "programs"}
)

START_ATTEMPTS: Final = 3
"""On a busy machine a Wine process was seen, once in thousands of starts, to be gone before anything ran in
it."""

SEND_BUFFER: Final = 4 << 20
"""Bytes of trace that may wait for the pump before a driver has to; the system may allow less."""

_SO_SNDBUFFORCE: Final = 32  # socket(7); Python has no name for it


class _Stillborn(LinkError):
    """The agent's process ended before its first answer."""


class WineMachine:
    """See ``Machine``: Wine on this host; ``config`` says which."""

    def __init__(self, config: TargetConfig) -> None:
        self.capabilities = CAPABILITIES - config.without
        self.prefix = Path()
        self._name = config.name
        self._wine = prefix.find_wine(config.wine)
        self._run: Run | None = None
        self._pump: MessagePump | None = None
        self._guest: Guest | None = None

    def describe(self) -> str:
        """See ``Machine``."""
        return f"Wine {self._wine.version}"

    def boot(self, run: Run, log: KernelLog, generation: int) -> Guest:
        """See ``Machine``. An agent that ended before it said a word is started again, in a new prefix."""
        for _ in range(START_ATTEMPTS - 1):
            with suppress(_Stillborn):
                return self._boot(run, log, generation)
        return self._boot(run, log, generation)

    def _boot(self, run: Run, log: KernelLog, generation: int) -> Guest:
        source = prefix.template(self._wine, run)
        path = run.path / f"prefix-{generation}"
        run.record(prefix.RESOURCE, path)
        prefix.clone(source, path)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pump = MessagePump(ours, WineTrace(), log, self._name)
        try:
            with theirs:
                _enlarge_send_buffer(theirs)
                link = ProcessLink(
                    [self._wine.loader, str(AGENT.executable())],
                    env=self._wine.environment(path, DEBUG_CHANNELS),
                    stderr=theirs.fileno(),
                    cwd=str(path),
                )
            try:
                agent = Agent.connect(link, timeout=START_TIMEOUT)
            except BaseException as error:
                prefix.end(path)
                link.close()
                if isinstance(error, LinkError):
                    raise _Stillborn(f"{error} (it ended with {link.returncode})") from error
                raise
        except BaseException:
            pump.close()
            prefix.remove(path)
            raise
        self.prefix = path
        self._run = run
        self._pump = pump
        self._guest = guest = Guest(agent, pump)
        return guest

    def save(self, guest: Guest) -> Guest:
        """See ``Machine``. A new clone is as good."""
        return guest

    def revert(self, guest: Guest, log: KernelLog) -> Guest | None:  # noqa: ARG002
        """See ``Machine``."""
        return None

    def failure(self) -> str | None:
        """See ``Machine``. Nobody but the agent can tell."""
        return None

    def keep(self, guest: Guest) -> str | None:  # noqa: ARG002
        """See ``Machine``. A prefix lives no longer than its agent, whose end of the link we are."""
        return None

    def check(self, guest: Guest) -> None:
        """See ``Machine``. Nothing in a prefix can be off: it is this host's Wine, disk and clock."""

    def catch_up(self, guest: Guest) -> bool:  # noqa: ARG002
        """See ``Machine``.

        Whoever prints writes into the trace's socket before it goes on, so what was printed before an answer
        was sent is there when the answer is.
        """
        assert self._pump is not None
        self._pump.catch_up()
        return True

    def examine_hang(self, guest: Guest) -> None:
        """See ``Machine``. The driver's process is ended, and says nothing."""

    def evidence(self) -> Mapping[str, Callable[[Path], None]]:
        """See ``Machine``. Nothing that the kernel log has not."""
        return {}

    def let_dump(self, guest: Guest) -> Guest | None:  # noqa: ARG002
        """See ``Machine``."""
        return None

    def preflight(self, image: Path) -> Report:
        """See ``Machine``."""
        windows = self.prefix / "drive_c" / "windows"
        return preflight(image, KernelExports(windows, self.describe()), guest="wine")

    def end(self) -> None:
        """See ``Machine``."""
        guest = self._guest
        if guest is None:
            return
        with ExitStack() as last_to_first:
            last_to_first.callback(prefix.remove, self.prefix)
            if guest.feed is not None:
                last_to_first.callback(guest.feed.close)
            last_to_first.callback(guest.agent.close)
            prefix.end(self.prefix)
        if self._run is not None and not self.prefix.exists():
            self._run.forget(prefix.RESOURCE, self.prefix)
        self._guest = None


class WineTarget(MachineTarget):
    """See ``Target``; ``config`` says which Wine."""

    def __init__(self, config: TargetConfig, *, artifacts: Path | None = None) -> None:
        self._wine = WineMachine(config)
        super().__init__(config.name, self._wine, artifacts=artifacts)

    @property
    def prefix(self) -> Path:
        """The prefix of this generation. Raises ``TargetError`` where it is not running."""
        _ = self.guest
        return self._wine.prefix


def _enlarge_send_buffer(connection: socket.socket) -> None:
    """Let more of the trace wait; beyond the system's limit only root may."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER)
    except PermissionError:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
