"""A Windows that installs itself in a machine, which is watched from outside until its agent answers.

What is seen before that: what the guest read from its CD and wrote to its disk (libvirt's block statistics),
its restarts, and its screen. Not verified on Windows.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from pytest_kdriver.errors import KdriverError, LinkError, TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.links.serial import SerialLink
from pytest_kdriver.guest.words import words
from pytest_kdriver.targets.leftovers import DOMAIN, SOCKETS
from pytest_kdriver.targets.libvirt.accelerator import find_accelerator
from pytest_kdriver.targets.libvirt.base_disk import qemu_img
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.domain import Domain
from pytest_kdriver.targets.libvirt.domain_xml import CDROMS, DomainSpec
from pytest_kdriver.targets.libvirt.enlightenments import find_enlightenments
from pytest_kdriver.targets.libvirt.leftovers import domain_resource
from pytest_kdriver.targets.runs import Run, remove_tree
from pytest_kdriver.targets.windows.answer_file import is_virtio
from pytest_kdriver.vm_config import VmConfig

T = TypeVar("T")

ENTER: Final = 28
"""The key that answers "Press any key to boot from CD or DVD": KEY_ENTER of linux/input-event-codes.h."""

LOADED: Final = 16 << 20
"""Bytes read from the CD that are more than what comes before that question takes, and far less than the
400 MB and more of Windows PE's image, behind which a key could press a button."""

WRITTEN: Final = 64 << 20
"""Bytes written to the disk that are more than partitions and file systems take."""

INTERVAL: Final = 1.0
"""Seconds between two looks; the question above stands for five."""

RESTARTS_APART: Final = 10.0
"""Seconds between restarts; a firmware that was asked for one may reset the machine again at once."""

PICTURE_INTERVAL: Final = 60.0
ATTEMPT: Final = 3.0
"""Seconds that one attempt to reach the agent takes."""

SHUTDOWN_TIME: Final = 900.0
"""Seconds that Windows gets to shut down, or to restart and to answer again."""

STATE_KEY: Final = r"SOFTWARE\Microsoft\Windows\CurrentVersion\Setup\State"
STATE_VALUE: Final = "ImageState"
COMPLETE: Final = "IMAGE_STATE_COMPLETE"
"""What Windows says of itself when the passes specialize and oobeSystem are over ("Windows Setup States",
learn.microsoft.com/windows-hardware/manufacture/desktop/windows-setup-states)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds: for the whole installation, and how long neither disk nor CD may be used meanwhile."""

    whole: float = 4 * 3600.0
    stall: float = 900.0


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was seen of a guest: bytes read from the CD, read from its disk and written to it; restarts."""

    cd: int
    disk_read: int
    disk_written: int
    restarts: int


def _state(agent: Agent) -> object:
    return agent.get_value(STATE_KEY, STATE_VALUE, timeout=ATTEMPT)


class Installation:
    """A machine with an empty disk, Windows' CD and the provisioning CD.

    A context: when it is left nothing of it is there any more, the disk included. ``phase`` is told what
    begins, and ``picture`` is a file that has the screen, a minute old at most.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        run: Run,
        name: str,
        machine: VmConfig,
        *,
        phase: Callable[[str], None],
        picture: Path,
        limits: Limits,
    ) -> None:
        self.folder = run.path / "installation"
        self.disk = self.folder / "disk.qcow2"
        self.provisioning = self.folder / "provisioning.iso"
        self._hypervisor = hypervisor
        self._run = run
        self._name = f"kdriver-{name[:32]}-{run.path.name.rpartition('-')[2]}-install"
        self._machine = machine
        self.phase = phase
        self._picture = picture
        self._limits = limits
        self._undo = ExitStack()
        self._stopped = threading.Event()
        self._domain: Domain | None = None
        self._sockets: Path | None = None
        self._agent: Agent | None = None
        self._devices = ("", "")
        self._seen = _Seen(0, 0, 0, 0)
        self._resets = 0
        self._last_reset = -RESTARTS_APART
        self._active = self._pictured = self._began = time.monotonic()
        self._why_no_agent = ""

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(remove_tree, self.folder)
            self.folder.mkdir(mode=0o700)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    # the machine

    def start(self, iso: Path, disk_size: int) -> None:
        """Make the machine, whose CD of ours is there already, and start it."""
        hypervisor = self._hypervisor
        hypervisor.require_access(iso)
        hypervisor.let_through(self._run.path)
        qemu_img("create", "-q", "-f", "qcow2", "--", str(self.disk), str(disk_size))
        for file in (self.disk, self.provisioning):
            hypervisor.give(file)
        hypervisor.hand_over(self.folder)
        self._sockets = hypervisor.make_socket_folder(self._announce_sockets)
        spec = self._specify(iso, self._sockets)
        self._run.record(DOMAIN, domain_resource(hypervisor.uri, spec.name))
        domain = Domain(hypervisor, spec, on_stop=self._on_stop, may_restart=True)
        self._undo.callback(self._end, domain)
        domain.define()
        domain.start()
        self._domain = domain
        self._devices = ("vda" if spec.bus == "virtio" else "sda", CDROMS[0])

    def _announce_sockets(self, folder: Path) -> None:
        self._run.record(SOCKETS, folder)
        self._undo.callback(self._remove_sockets, folder)

    def _remove_sockets(self, folder: Path) -> None:
        remove_tree(folder)
        self._run.forget(SOCKETS, folder)

    def _end(self, domain: Domain) -> None:
        """End the machine; the run knows of it until that is done."""
        self._close_agent()
        try:
            domain.destroy()
        finally:
            domain.undefine()
        self._run.forget(DOMAIN, domain_resource(self._hypervisor.uri, domain.spec.name))

    def _specify(self, iso: Path, sockets: Path) -> DomainSpec:
        config, hypervisor = self._machine, self._hypervisor
        accelerator = find_accelerator(hypervisor.emulator, hypervisor.owner).kind
        features: tuple[str, ...] = ()
        if config.enlightenments:
            features = find_enlightenments(hypervisor, accelerator).features
        return DomainSpec(
            name=self._name,
            run=self._run.path.name,
            owner_pid=os.getpid(),
            accelerator=accelerator,
            emulator=hypervisor.emulator,
            disk=self.disk,
            media=(iso.absolute(), self.provisioning),
            memory=config.memory,
            cpus=config.cpus,
            bus=config.bus,
            firmware=config.firmware,
            varstore=self.folder / "varstore.fd" if config.firmware == "uefi" else None,
            tpm=config.tpm,
            nic=config.nic,
            network=config.network,
            ports=((str(config.agent_port), sockets / "agent"),),
            console=self.folder / "console.log",
            enlightenments=features,
        )

    def _on_stop(self, _reason: str) -> None:
        self._stopped.set()

    # what happens

    @property
    def agent(self) -> Agent:
        """The agent of the Windows that runs."""
        if self._agent is None:
            raise TargetError("Windows does not answer")
        return self._agent

    def wait_until_complete(self) -> None:
        """Answer the CD's question, and wait until Windows is installed. Raises ``TargetError``."""
        self.phase("starting from the CD")
        self._wait(self._is_loaded)
        self.phase("loading Windows Setup")
        self._wait(self._is_complete)

    def _is_loaded(self) -> bool:
        assert self._domain is not None
        if self._seen.cd >= LOADED:
            return True
        self._domain.press(ENTER)
        return False

    def _is_complete(self) -> bool:
        """Ask; at a COM port not before the first restart, since Windows PE may take it for a mouse."""
        if not is_virtio(self._machine) and not self._seen.restarts:
            return False
        return self._ask(_state) == COMPLETE

    @property
    def is_debugged(self) -> bool:
        """Whether the machines of the image will have a debugger, on the port that settings name."""
        return self._machine.kernel_log == "kd" and self._machine.log_port == "com1"

    def restart(self) -> Agent:
        """Restart Windows; its agent. Raises ``TargetError``."""
        before = self._seen.restarts
        self._shut_down("/r")
        self._wait(lambda: self._seen.restarts > before, SHUTDOWN_TIME, "restart")
        self._wait(lambda: self._ask(lambda agent: agent.info) is not None, SHUTDOWN_TIME, "answer")
        return self.agent

    def shut_down(self) -> None:
        """Shut Windows down; its disk is whole then. Raises ``TargetError``."""
        assert self._domain is not None
        self._shut_down("/s")
        deadline = time.monotonic() + SHUTDOWN_TIME
        while self._domain.state != "shut off":
            if time.monotonic() >= deadline:
                raise self._failure(f"it did not shut down within {SHUTDOWN_TIME:g} s")
            time.sleep(INTERVAL)

    def _shut_down(self, how: str) -> None:
        """By Windows' own program; its answer may be lost with the agent."""
        with suppress(LinkError, TimeoutError):
            done = self.agent.run(["shutdown.exe", how, "/f", "/t", "0"])
            if done.exit_code:
                told = words((done.stdout + b"\n" + done.stderr).decode(errors="replace"))
                raise self._failure(f"shutdown.exe {how} ended with {done.exit_code}: {told}")
        self._close_agent()

    def _ask(self, question: Callable[[Agent], T]) -> T | None:
        """What the agent answers; None where there is none yet, or none any more."""
        assert self._sockets is not None
        try:
            if self._agent is None:
                link = SerialLink(self._sockets / "agent", timeout=ATTEMPT)
                self._agent = Agent.connect(link, timeout=ATTEMPT)
                self.phase("Windows answers")
                self._why_no_agent = ""
            return question(self._agent)
        except (KdriverError, TimeoutError) as error:
            self._why_no_agent = str(error)
            self._close_agent()
            return None

    def _close_agent(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()

    def _wait(self, done: Callable[[], bool], time_limit: float = 0.0, what: str = "") -> None:
        """Look at the guest until it is done."""
        deadline = time.monotonic() + time_limit
        while True:
            self._look()
            if done():
                return
            if what and time.monotonic() >= deadline:
                raise self._failure(f"it did not {what} within {time_limit:g} s")
            self._stopped.wait(INTERVAL)

    def _look(self) -> None:
        """See what happened, and tell it. Raises ``TargetError`` where nothing will any more."""
        domain = self._domain
        assert domain is not None
        if domain.stopped is not None:
            raise self._failure(f"the machine stopped: {domain.stopped}")
        disk, cd = self._devices
        now, before = time.monotonic(), self._seen
        restarts = before.restarts + self._restarted(domain.resets, now)
        self._seen = seen = _Seen(domain.transferred(cd)[0], *domain.transferred(disk), restarts)
        if seen != before:
            self._active = now
        if before.disk_written < WRITTEN <= seen.disk_written and not seen.restarts:
            self.phase("copying Windows to the disk")
        if seen.restarts > before.restarts:
            self.phase(f"restart {seen.restarts}")
        if now - self._pictured >= PICTURE_INTERVAL:
            self._pictured = now
            self._take_picture()
        if now - self._active >= self._limits.stall:
            raise self._failure(
                f"neither its disk nor its CD was used for {self._limits.stall / 60:g} minutes"
            )
        if now - self._began >= self._limits.whole:
            raise self._failure(
                f"it was not over within {self._limits.whole / 60:g} minutes "
                f"(--timeout allows it more)"
            )

    def _restarted(self, resets: int, now: float) -> bool:
        """Whether the guest has restarted since the last look."""
        if resets == self._resets:
            return False
        self._resets = resets
        last, self._last_reset = self._last_reset, now
        return now - last >= RESTARTS_APART

    def _failure(self, why: str) -> TargetError:
        """What to say of an installation that fails, with what can be seen of it."""
        seen = self._seen
        told = (
            f"the image of Windows was not made: {why}; {seen.cd >> 20} MiB were read from the CD, "
            f"{seen.disk_written >> 20} MiB written to the disk, {seen.restarts} restarts"
        )
        if self._why_no_agent:
            told += f"; the agent: {self._why_no_agent}"
        pictured = self._take_picture()
        return TargetError(
            f"{told}; {'its screen' if pictured else 'its last picture'}: {self._picture}"
        )

    def _take_picture(self) -> bool:
        """Take a picture of the screen; whoever looks at the file sees a whole one."""
        assert self._domain is not None
        unfinished = self._picture.with_suffix(".new")
        try:
            self._picture.parent.mkdir(parents=True, exist_ok=True)
            self._domain.screenshot(unfinished)
            unfinished.replace(self._picture)
        except (TargetError, OSError):
            return False
        return True
