"""A machine on which the simulated NT runs, with the real links, ports and pump of a virtual machine."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pytest_kdriver.errors import LinkError, TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.links.serial import SerialLink
from pytest_kdriver.image.preflight import Report, preflight
from pytest_kdriver.kernel.crash import describe
from pytest_kdriver.kernel.events import BugCheck
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.targets.kd_pump import KdPump
from pytest_kdriver.targets.machine import Guest, WatchedLog
from pytest_kdriver.targets.runs import Run
from tests.nt.drivers import find_script
from tests.nt.guest import NtGuest

CAPABILITIES = frozenset({"kernel-log", "pool", "crashes", "snapshots"})
TIMEOUT = 30.0
BREAK_IN_TIMEOUT = 5.0


class NtMachine:
    """See ``Machine``."""

    def __init__(self, name: str) -> None:
        self.capabilities = CAPABILITIES
        self._name = name
        self._folder = Path()
        self._stack = ExitStack()
        self.guest: NtGuest | None = None
        self.pump: KdPump | None = None
        self.agent: Agent | None = None
        self._bug_check: str | None = None
        self.boots = self.reverts = 0
        self.mistakes: list[str] = []
        self._saved = False

    def describe(self) -> str:
        return "a simulated NT, with its kernel's debugger"

    def boot(self, run: Run, log: KernelLog, generation: int) -> Guest:
        self.boots += 1
        self._saved = False
        self._bug_check = None
        with ExitStack() as undo:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="nt-")))
            self._folder = folder
            self.guest = nt = NtGuest(folder / "agent", folder / "com1", find_script)
            undo.callback(nt.close)
            watched = WatchedLog(log, self._note_bug_check)
            self.pump = pump = KdPump(folder / "com1", watched, self._name)
            undo.callback(pump.close)
            undo.callback(self._close_agent)
            nt.boot()
            self._reach_agent()
            pump.begin(TIMEOUT)
            pump.end_of_boot()
            self._stack = undo.pop_all()
        return self._guest()

    def _reach_agent(self) -> None:
        """As with a virtual machine, an agent may be seen that ends with its guest's restart."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                link = SerialLink(self._folder / "agent", timeout=TIMEOUT)
                self.agent = Agent.connect(link, timeout=TIMEOUT)
            except LinkError:
                if time.monotonic() >= deadline:
                    raise
            else:
                self.agent.set_clock(time.time())
                return

    def _close_agent(self) -> None:
        if self.agent is not None:
            self.agent.close()

    def _guest(self) -> Guest:
        assert self.agent is not None
        return Guest(self.agent, self.pump)

    def _note_bug_check(self, event: BugCheck) -> None:
        self._bug_check = describe(event)
        threading.Thread(target=self._close_agent, name="nt-stopped", daemon=True).start()

    def save(self, guest: Guest) -> Guest:
        nt = self._running()
        guest.agent.park(timeout=TIMEOUT)
        nt.save()
        self._saved = True
        self._reach_agent()
        return self._guest()

    def revert(self, guest: Guest, log: KernelLog) -> Guest | None:
        nt, pump = self._running(), self.pump
        assert pump is not None
        if not self._saved:
            return None
        nt.revert()
        self.reverts += 1
        self._bug_check = None
        if guest.agent.closed:
            guest.agent.close()
            self._reach_agent()
        else:
            guest.agent.resume(timeout=TIMEOUT)
            guest.agent.set_clock(time.time())
        if not pump.alive:
            pump.reconnect(TIMEOUT)
        pump.begin(TIMEOUT)
        pump.end_of_boot()
        return self._guest()

    def failure(self) -> str | None:
        return f"the guest stopped: {self._bug_check}" if self._bug_check is not None else None

    def keep(self, guest: Guest) -> str | None:
        return None

    def check(self, guest: Guest) -> None:
        pass

    def catch_up(self, guest: Guest) -> bool:
        assert self.pump is not None
        self.pump.catch_up()
        return True

    def examine_hang(self, guest: Guest) -> None:
        assert self.pump is not None
        self.pump.break_in(BREAK_IN_TIMEOUT)

    def evidence(self) -> dict[str, Callable[[Path], None]]:
        return {}

    def let_dump(self, guest: Guest) -> Guest | None:
        assert self.pump is not None
        if self._bug_check is None:
            return None
        guest.agent.close()
        self.pump.go_on()
        self._bug_check = None
        self._reach_agent()
        return self._guest()

    def preflight(self, image: Path) -> Report:
        return preflight(image, None, guest="windows")

    def end(self) -> None:
        if self.guest is not None:
            self.mistakes += self.guest.port.mistakes
        self._stack.close()
        self.guest = self.pump = self.agent = None

    def _running(self) -> NtGuest:
        if self.guest is None:
            raise TargetError("it is not running", target=self._name)
        return self.guest
