"""A virtual machine under libvirt as a target's machine.

Each generation that boots is a domain of its own over a linked clone of the base disk; the ports of the agent
and the kernel log are Unix sockets. When the agent answers, a live snapshot is taken; a revert loads it into
the QEMU that runs, so that the sockets stay, and begins new sessions on them.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from pytest_kdriver.config import TargetConfig, password_variable
from pytest_kdriver.errors import LinkError, TargetError
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.links.serial import PORT_GONE
from pytest_kdriver.image.preflight import Report, preflight
from pytest_kdriver.kernel.crash import describe
from pytest_kdriver.kernel.events import BugCheck, ProcessorState
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.text import SerialText
from pytest_kdriver.kernel.sources.wine import WineTrace
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets.disk_images import Phase, ensure
from pytest_kdriver.targets.kd_pump import KdPump, SerialPump
from pytest_kdriver.targets.leftovers import DOMAIN, SOCKETS
from pytest_kdriver.targets.libvirt.accelerator import find_accelerator, remember_failure
from pytest_kdriver.targets.libvirt.address import (
    Address,
    NotLetInError,
    SerialAddress,
    SshAddress,
    WinrmAddress,
)
from pytest_kdriver.targets.libvirt.base_disk import BaseDisk, make_overlay
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.domain import (
    INTERNAL_ERROR,
    PANICKED,
    Domain,
    SnapshotMethod,
    logged_panic,
)
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec
from pytest_kdriver.targets.libvirt.enlightenments import Enlightenments, find_enlightenments
from pytest_kdriver.targets.libvirt.kept import KeptVm
from pytest_kdriver.targets.libvirt.leftovers import domain_resource
from pytest_kdriver.targets.libvirt.warm_start import WarmStart
from pytest_kdriver.targets.machine import Guest, WatchedLog
from pytest_kdriver.targets.port_pump import PortPump
from pytest_kdriver.targets.prefix import MORE_ROOM
from pytest_kdriver.targets.recipe import find_recipe
from pytest_kdriver.targets.runs import Run, remove_tree
from pytest_kdriver.telling import tell
from pytest_kdriver.vm_config import vm_config

_ALWAYS: Final = frozenset({"snapshots", "programs"})
_SEEN: Final = {
    "wine-trace": frozenset({"kernel-log", "pool", "pool-blocks", "crashes"}),
    "kd": frozenset({"kernel-log", "pool", "crashes"}),
    "text": frozenset({"kernel-log", "pool", "crashes"}),
    "none": frozenset({"pool"}),
}
"""What a kernel log gives. A kernel that is no Wine's tells of its pool without."""

SNAPSHOT: Final = "kdriver-first"
ATTEMPT: Final = 5.0
"""Seconds that one attempt to reach the agent of a guest that boots may take, before it is looked whether the
guest still runs."""

ATTACH_TIMEOUT: Final = 60.0
"""Seconds for the kernel of a guest that is up to answer its debugger."""

RESUME_TIMEOUT: Final = 30.0
BREAK_IN_TIMEOUT: Final = 5.0
"""Seconds for a kernel to tell its debugger where its processors are."""

STOP_TIMEOUT: Final = 3.0
"""Seconds between the end of QEMU and libvirt's word that it ended."""

CLOCK_TOLERANCE: Final = 5.0
FREE_SPACE: Final = 64 << 20
"""Bytes that have to be free on the guest's C:."""

_ASKED_FOR: Final = frozenset(operation.name for operation in messages.OPERATIONS)
_LISTEN: Final = {
    "kd": "kdriver kd listen unix:{}",
    "text": "kdriver kd listen --text unix:{}",
    "wine-trace": "",
    "none": "",
}
_WAYS: Final = {
    "qmp": "QEMU's snapshot-load",
    "libvirt": "libvirt's revert, which starts QEMU anew",
}


class LibvirtMachine:
    """See ``Machine``. ``artifacts`` is where pictures go of guests that did not come up.

    With ``dumps`` a kernel that crashes may go on behind its word to the panic device, and write its dump.
    """

    def __init__(
        self, config: TargetConfig, *, artifacts: Path | None = None, dumps: bool = False
    ) -> None:
        self._dumps = dumps
        self._target = config.name
        self._settings = config.vm
        self._pictures = artifacts or cache_directory() / "screenshots"
        image = config.vm.get("image")
        self._recipe = find_recipe(str(image)) if image is not None else None
        self._where = f"targets.{config.name}"
        defaults = self._recipe.target if self._recipe is not None else {}
        self._config = vm_config(defaults, config.vm, where=self._where)
        seen = _SEEN[self._config.kernel_log]
        if self._config.enlightenments:
            seen |= {"crashes"}  # Windows tells them the panic device
        self.capabilities = (_ALWAYS | seen) - config.without
        self._hypervisor: Hypervisor | None = None
        self.base: BaseDisk | None = None
        self._vm: _Vm | None = None
        self._dropped: tuple[tuple[str, str], ...] = ()

    # what it is

    def describe(self) -> str:
        """See ``Machine``."""
        hypervisor = self._connect()
        accelerator = find_accelerator(hypervisor.emulator, hypervisor.owner)
        told = (
            f"{self._config.image or self._config.disk} under libvirt {hypervisor.version}, "
            f"QEMU {hypervisor.qemu_version} with {accelerator.kind.upper()}"
        )
        if accelerator.kind != "kvm":
            told += f", which is slow: {accelerator.reason}"
        if self._dropped:
            told += f"; without {', '.join(name for name, _ in self._dropped)}"
        if (
            self._vm is not None
            and self._vm.pump is not None
            and (waited := self._vm.pump.describe())
        ):
            told += f"; {waited}"
        way = self._vm.method if self._vm is not None else None
        return f"{told}; put back by {_WAYS[way or 'qmp']}"

    def _connect(self) -> Hypervisor:
        if self._hypervisor is None:
            self._hypervisor = Hypervisor.open(self._config.uri)
        return self._hypervisor

    # its life

    def boot(self, run: Run, log: KernelLog, generation: int) -> Guest:
        """See ``Machine``."""
        hypervisor = self._connect()
        if self._recipe is not None:
            image = ensure(self._recipe, run, _tell)
            self._config = vm_config(image.target, self._settings, where=self._where)
            base, sha256 = image.disk, image.sha256
        else:
            assert self._config.disk is not None
            base, sha256 = self._config.disk, self._config.sha256
        if self.base is None:
            self.base = BaseDisk(base, sha256)
        self.base.check()
        for attempt in ("", "-2", "-3"):
            guest = self._try_to_boot(hypervisor, run, log, f"{generation}{attempt}")
            if guest is not None:
                return guest
        raise AssertionError("only a warm start, and KVM, get a second try")

    def _try_to_boot(
        self, hypervisor: Hypervisor, run: Run, log: KernelLog, number: str
    ) -> Guest | None:
        """Make a domain and bring it up; None where it failed in a way that does not come again.

        KVM's failure is remembered, and a guest that does not go on from where it was kept is kept no longer.
        """
        self._vm = vm = self._make(hypervisor, run, number)
        try:
            return self._bring_up(vm, log)
        except NotLetInError as error:
            self.end()
            raise TargetError(str(error), target=self._target) from error
        except BaseException as error:
            if vm.is_warm and isinstance(error, TargetError | LinkError | TimeoutError):
                self.end()
                tell(
                    f"target {self._target} boots, as it could not go on from its last boot: {error}"
                )
                return None
            try:
                told = self._last_words(vm) if isinstance(error, TargetError | TimeoutError) else ""
                why, kvm_failed = vm.domain.stopped, vm.note_kvm_failure()
            finally:
                self.end()
            if kvm_failed:
                tell(f"target {self._target}: KVM can't run it, so TCG does, which is slow: {why}")
                return None
            if told:
                raise TargetError(f"{error}{told}", target=self._target) from error
            raise

    def _make(self, hypervisor: Hypervisor, run: Run, number: str) -> _Vm:
        """Make the domain and all that it takes, each recorded before. Where this fails, nothing is left."""
        config = self._config
        assert self.base is not None
        need_room(run.path, config.memory << 20)
        if self._recipe is not None:
            hypervisor.let_read(self.base.path)
        hypervisor.require_access(self.base.path)
        with ExitStack() as undo:
            folder = run.path / f"vm-{number}"
            folder.mkdir(mode=0o700)
            undo.callback(remove_quietly, folder)
            hypervisor.let_through(run.path)

            def announce(path: Path) -> None:
                run.record(SOCKETS, path)
                undo.callback(remove_sockets, run, path)

            sockets = hypervisor.make_socket_folder(announce)
            spec = self._specify(hypervisor, run, number, folder=folder, sockets=sockets)
            overlay = folder / "disk.qcow2"
            vm = _Vm(hypervisor, spec, run, folder, sockets)
            if self._can_start_warm():
                vm.warm_start = WarmStart(spec, self.base.sha256, hypervisor.qemu_version)
                vm.is_warm = vm.warm_start.take(overlay, self.base.path)
            if not vm.is_warm:
                make_overlay(self.base.path, overlay)
            # The folder comes last: what its owner puts there must not be written to in our name.
            hypervisor.give(overlay)
            hypervisor.hand_over(folder)
            hypervisor.require_access(overlay)
            run.record(DOMAIN, domain_resource(hypervisor.uri, spec.name))
            undo.pop_all()
            return vm

    def _can_start_warm(self) -> bool:
        """Whether a guest may go on from where another one was kept, in a QEMU of its own.

        What has state outside of memory and disk, UEFI's variables or a TPM, was not seen to.
        """
        config = self._config
        plain = config.firmware == "bios" and not config.tpm and config.cdrom is None
        return config.warm_start and plain and "snapshots" in self.capabilities

    def _specify(
        self, hypervisor: Hypervisor, run: Run, number: str, *, folder: Path, sockets: Path
    ) -> DomainSpec:
        """Say what the domain is to be. Raises ``ConfigError`` for what can't be."""
        config = self._config
        ports = []
        if config.tcp_port is None:
            ports.append((str(config.agent_port), sockets / "agent"))
        if config.kernel_log != "none":
            ports.append((config.log_port, sockets / "trace"))
        accelerator = find_accelerator(hypervisor.emulator, hypervisor.owner)
        enlightenments = Enlightenments()
        if config.enlightenments:
            enlightenments = find_enlightenments(hypervisor, accelerator.kind)
            self._tell_dropped(enlightenments.dropped)
        return DomainSpec(
            name=f"kdriver-{self._target[:32]}-{run.path.name.rpartition('-')[2]}-{number}",
            run=run.path.name,
            owner_pid=os.getpid(),
            accelerator=accelerator.kind,
            emulator=hypervisor.emulator,
            disk=folder / "disk.qcow2",
            memory=config.memory,
            cpus=config.cpus,
            bus=config.bus,
            cdrom=config.cdrom,
            kernel=config.kernel,
            initrd=config.initrd,
            cmdline=config.cmdline or None,
            firmware=config.firmware,
            varstore=folder / "varstore.fd" if config.firmware == "uefi" else None,
            tpm=config.tpm,
            nic=config.nic,
            network=config.network,
            forwards=(config.tcp_port,) if config.tcp_port is not None else (),
            ports=tuple(ports),
            console=folder / "console.log",
            enlightenments=enlightenments.features,
            panic="hyperv" if config.enlightenments else "isa",
        )

    def _tell_dropped(self, dropped: tuple[tuple[str, str], ...]) -> None:
        if dropped and not self._dropped:
            names = ", ".join(f"{name} ({reason})" for name, reason in dropped)
            tell(f"target {self._target} goes without Hyper-V's {names}")
        self._dropped = dropped

    def _bring_up(self, vm: _Vm, log: KernelLog) -> Guest:
        vm.log = log
        vm.domain.define()
        deadline = time.monotonic() + self._config.boot_timeout
        if vm.is_warm:
            vm.domain.start_from(SNAPSHOT, before_it_runs=lambda: self._open_feed(vm, log))
            deadline = time.monotonic() + RESUME_TIMEOUT
        else:
            vm.domain.start_held(lambda: self._open_feed(vm, log))
        if self._dumps:
            vm.domain.let_panic()
        agent = vm.take(self._reach_agent(vm, deadline))
        self._begin_feed(vm, min(max(deadline - time.monotonic(), ATTEMPT), ATTACH_TIMEOUT))
        set_clock(agent)
        return Guest(agent, vm.pump)

    def _open_feed(self, vm: _Vm, log: KernelLog) -> None:
        """Have the kernel log's port read. A kernel that has a debugger waits for it from the first."""
        path, kind = vm.sockets / "trace", self._config.kernel_log
        if kind == "wine-trace":
            vm.pump = PortPump(path, WineTrace, log, self._target)
        elif kind == "kd":
            vm.pump = KdPump(path, WatchedLog(log, vm.note_bug_check), self._target)
        elif kind == "text":
            watched = WatchedLog(log, vm.note_bug_check)
            vm.pump = SerialPump(path, SerialText(), watched, self._target)

    @staticmethod
    def _begin_feed(vm: _Vm, timeout: float) -> None:
        """Have the log tell what is said from here on, in a guest that is up."""
        if vm.pump is not None:
            vm.pump.begin(timeout)
        if isinstance(vm.pump, KdPump):
            vm.pump.end_of_boot()

    def _reach_agent(self, vm: _Vm, deadline: float) -> Agent:
        """Have the agent's answer, or say at once why there won't be one.

        A server's handshake takes what it takes: the attempt after one that was cut may take twice as long.
        """
        limit = ATTEMPT
        while True:
            began = time.monotonic()
            attempt = min(limit, max(deadline - began, 0.1))
            try:
                return Agent.connect(self._address(vm).open(attempt), timeout=attempt)
            except NotLetInError:
                raise
            except (LinkError, TimeoutError) as error:
                if (stopped := vm.bug_check or vm.domain.stopped) is not None:
                    raise TargetError(f"the guest stopped while it booted: {stopped}") from error
                if time.monotonic() >= deadline:
                    failure = vm.pump.failure if vm.pump is not None else None
                    raise TargetError(
                        f"the agent did not answer within {self._config.boot_timeout:g} s ({error}); "
                        + (f"its kernel log broke: {failure}; " if failure is not None else "")
                        + "a guest that needs longer gets it by boot_timeout in its config"
                    ) from error
                if self._config.tcp_port is not None and time.monotonic() - began >= attempt:
                    limit *= 2
                vm.stopped.wait(min(0.2, max(deadline - time.monotonic(), 0.0)))

    def _address(self, vm: _Vm) -> Address:
        config = self._config
        if config.tcp_port is None:
            return SerialAddress(path=str(vm.sockets / "agent"))
        port, variable = vm.domain.forwarded(config.tcp_port), password_variable(self._target)
        if config.agent == "winrm":
            return WinrmAddress(
                port=port,
                user=config.winrm_user,
                password_file=_text(config.winrm_password_file),
                https=config.winrm_https,
                ca=_text(config.winrm_ca),
                command=config.winrm_command,
                password_variable=variable,
            )
        return SshAddress(
            port=port,
            user=config.ssh_user,
            key=_text(config.ssh_key),
            known_hosts=_text(config.ssh_known_hosts),
            host_key_alias=f"kdriver-{config.image or self._target}",
            command=config.ssh_command,
            password_variable=variable,
        )

    def save(self, guest: Guest) -> Guest:
        """See ``Machine``. No session with the agent is in the snapshot."""
        vm = self._running()
        if vm.is_warm:  # by the snapshot that it is put back to
            vm.method = "qmp"
            return guest
        if self._config.tcp_port is not None:
            guest.agent.close()
        else:
            guest.agent.park(timeout=RESUME_TIMEOUT)
        vm.method = vm.domain.snapshot_save(SNAPSHOT)
        if vm.warm_start is not None and vm.method == "qmp":
            with vm.domain.held(), suppress(OSError):  # it is a gain of time, and no more
                vm.warm_start.keep(vm.folder / "disk.qcow2", vm.folder.parent)
        agent = vm.take(self._reach_agent(vm, time.monotonic() + RESUME_TIMEOUT))
        set_clock(agent)  # it stood still
        return Guest(agent, guest.feed)

    def revert(self, guest: Guest, log: KernelLog) -> Guest | None:
        """See ``Machine``."""
        vm = self._running()
        assert self.base is not None
        self.base.check()
        if vm.method is None or vm.domain.stopped is not None:
            return None  # what stopped would be loaded, and stay as it is
        if self._config.tcp_port is not None:
            guest.agent.close()
        vm.domain.snapshot_load(SNAPSHOT)
        self._forget_crash(vm)
        is_new = vm.method == "libvirt"  # whose revert starts QEMU anew
        if is_new and self._dumps:
            vm.domain.let_panic()
        if vm.pump is not None and (is_new or not vm.pump.alive):
            vm.pump.close()
            self._open_feed(vm, log)
        agent = guest.agent
        if agent.closed or is_new:
            agent.close()
            agent = self._reach_agent(vm, time.monotonic() + RESUME_TIMEOUT)
        else:
            agent.resume(timeout=RESUME_TIMEOUT)
        vm.take(agent)
        set_clock(agent)
        self._begin_feed(vm, RESUME_TIMEOUT)
        return Guest(agent, vm.pump)

    def failure(self) -> str | None:
        """See ``Machine``. Where a port is gone, libvirt's word on why is waited for."""
        vm = self._vm
        if vm is None:
            return None
        if vm.domain.stopped is None and vm.lost_a_port:
            vm.stopped.wait(STOP_TIMEOUT)
        stopped = vm.bug_check or vm.domain.stopped
        return f"the guest stopped: {stopped}" if stopped is not None else None

    def keep(self, guest: Guest) -> str | None:  # noqa: ARG002
        """See ``Machine``."""
        vm = self._running()
        kept = KeptVm(
            folder=vm.folder.parent,
            target=self._target,
            domain=vm.domain.spec.name,
            uri=self._config.uri,
            console=str(vm.domain.spec.console),
            address=self._address(vm),
            listen=_LISTEN[self._config.kernel_log].format(vm.sockets / "trace"),
        )
        kept.write()
        vm.let_go()
        self._vm = None
        return kept.how_to_reach()

    def check(self, guest: Guest) -> None:
        """See ``Machine``."""
        lacking = sorted(_ASKED_FOR - guest.agent.info.operations)
        if lacking:
            raise TargetError(
                f"the guest's agent is older than this package, and can't {', '.join(lacking)}; "
                + self._rebuild(),
                target=self._target,
            )
        off = guest.agent.clock() - time.time()
        if abs(off) > CLOCK_TOLERANCE:
            raise TargetError(
                f"the guest's clock is off by {off:.0f} s though it was just set: has the guest a "
                "program that sets it, too? Turn that off in the disk image",
                target=self._target,
            )
        free = guest.agent.free_space("C:\\")
        if free < FREE_SPACE:
            raise TargetError(
                f"the guest's disk C: has {free >> 20} MiB free, {FREE_SPACE >> 20} are needed; "
                + self._rebuild(),
                target=self._target,
            )

    def _rebuild(self) -> str:
        if self._recipe is None:
            return f"mend {self._config.disk}"
        name = self._recipe.name
        again = f"kdriver image build {name} --iso FILE" if self._recipe.windows else "run again"
        return f"kdriver image remove {name}, then {again}"

    def catch_up(self, guest: Guest) -> bool:  # noqa: ARG002
        """See ``Machine``.

        A kernel that prints waits for its debugger, or has written all of the text to QEMU's port. The trace
        comes by a port of its own, which is no faster than the agent's.
        """
        pump = self._running().pump
        if not isinstance(pump, SerialPump):
            return False
        pump.catch_up()
        return True

    def examine_hang(self, guest: Guest) -> None:  # noqa: ARG002
        """See ``Machine``.

        A kernel that does not hear its debugger takes an NMI, of which it dies; without a debugger QEMU knows
        the processors' registers, and no more.
        """
        vm = self._running()
        if isinstance(vm.pump, KdPump):
            try:
                vm.pump.break_in(BREAK_IN_TIMEOUT)
            except TimeoutError:
                vm.domain.interrupt()
                vm.broke_down.wait(BREAK_IN_TIMEOUT)
        elif vm.log is not None:
            now = time.monotonic()
            places = vm.domain.instruction_pointers()
            vm.log.append(
                [ProcessorState(now, None, number, place) for number, place in enumerate(places)]
            )

    def evidence(self) -> Mapping[str, Callable[[Path], None]]:
        """See ``Machine``."""
        if self._vm is None:
            return {}
        domain = self._vm.domain
        return {
            ".png": domain.screenshot,
            ".xml": lambda path: _write(path, domain.xml()),
            ".domain.log": lambda path: _write(path, domain.log()),
        }

    def let_dump(self, guest: Guest) -> Guest | None:
        """See ``Machine``. Not verified on Windows."""
        vm = self._running()
        if not self._dumps or vm.bug_check is None or vm.domain.stopped is not None:
            return None
        guest.agent.close()
        vm.domain.let_restart()
        if isinstance(vm.pump, KdPump):
            vm.pump.go_on()
        self._forget_crash(vm)
        agent = vm.take(self._reach_agent(vm, time.monotonic() + self._config.boot_timeout))
        return Guest(agent, vm.pump)

    @staticmethod
    def _forget_crash(vm: _Vm) -> None:
        vm.bug_check = None
        vm.broke_down.clear()
        if vm.domain.stopped is None:
            vm.stopped.clear()

    def preflight(self, image: Path) -> Report:
        """See ``Machine``. The guest's kernel is not looked into."""
        vm = self._running()
        on_wine = vm.agent is not None and vm.agent.info.wine_version is not None
        return preflight(image, None, guest="wine" if on_wine else "windows")

    def end(self) -> None:
        """See ``Machine``."""
        if self._vm is not None:
            self._vm.end()
            self._vm = None

    def _running(self) -> _Vm:
        if self._vm is None:
            raise TargetError("it is not running", target=self._target)
        return self._vm

    def _last_words(self, vm: _Vm) -> str:
        """What a guest that did not come up shows, for an error."""
        told = ""
        lines = vm.domain.console_tail()
        if lines:
            told += "\nthe last lines of its console:\n" + "\n".join(
                f"    {line}" for line in lines
            )
        picture = self._pictures / f"{vm.domain.spec.name}.png"
        try:
            self._pictures.mkdir(parents=True, exist_ok=True)
            vm.domain.screenshot(picture)
        except (TargetError, OSError) as error:
            return f"{told}\nno picture of its screen could be had: {error}"
        return f"{told}\nits screen: {picture}"


class _Vm:
    """One domain, what was made for it, and our ends of its ports."""

    def __init__(
        self, hypervisor: Hypervisor, spec: DomainSpec, run: Run, folder: Path, sockets: Path
    ) -> None:
        self.domain = Domain(hypervisor, spec, on_stop=self._on_stop)
        self._owner = hypervisor.owner
        self._run = run
        self._resource = domain_resource(hypervisor.uri, spec.name)
        self.folder = folder
        self.sockets = sockets
        self.agent: Agent | None = None
        self.pump: PortPump | SerialPump | None = None
        self.log: KernelLog | None = None
        self.broke_down = threading.Event()
        self.bug_check: str | None = None
        """What ended the kernel, as its debugger tells it; QEMU goes on."""
        self.method: SnapshotMethod | None = None
        self.stopped = threading.Event()
        self.warm_start: WarmStart | None = None
        self.is_warm = False

    @property
    def lost_a_port(self) -> bool:
        """Whether one of our ends has met QEMU's end."""
        agent_s = self.agent is not None and self.agent.ended == PORT_GONE
        return agent_s or (self.pump is not None and not self.pump.alive)

    def note_kvm_failure(self) -> bool:
        """Whether it stopped since KVM can't run it, and that is remembered for this host."""
        spec = self.domain.spec
        if spec.accelerator != "kvm" or self.domain.stopped != INTERNAL_ERROR:
            return False
        try:
            remember_failure(spec.emulator, INTERNAL_ERROR, self._owner)
        except OSError:  # a full disk, say: KVM would be tried again
            return False
        return True

    def take(self, agent: Agent) -> Agent:
        """Have its agent; one of a kernel that crashed meanwhile is given up at once."""
        self.agent = agent
        if self.bug_check is not None:
            self._give_up_agent()
        return agent

    def note_bug_check(self, event: BugCheck) -> None:
        """The kernel stopped; it waits for its debugger, and the agent will never answer."""
        self.bug_check = describe(event)
        self.broke_down.set()
        self._give_up_agent()

    def _on_stop(self, reason: str) -> None:
        """Have all that waits for the agent's answer fail now."""
        self.note_kvm_failure()
        panic = self.domain.panic
        if panic is None and reason.startswith(PANICKED):  # by an event that has no parameters
            panic = logged_panic(self.domain.log())
        if panic is not None and self.log is not None and self.bug_check is None:
            event = BugCheck(time.monotonic(), None, panic[0], panic[1:])
            self.bug_check = describe(event)
            self.log.append([event])
        if self.domain.stopped is None:  # it goes on, to write its dump and to start again
            self.bug_check = self.bug_check or reason
        self.stopped.set()
        self._give_up_agent()

    def _give_up_agent(self) -> None:
        agent = self.agent
        if agent is not None:  # whose end may take a moment, and the caller must not wait
            threading.Thread(target=agent.close, name="kdriver-vm-stopped", daemon=True).start()

    def let_go(self) -> None:
        """Close our ends; the guest goes on."""
        self.domain.forget()
        for end in (self.agent, self.pump):
            if end is not None:
                end.close()

    def end(self) -> None:
        """End it, and remove what was made for it. Never raises for what is gone already.

        A warm start that came to nothing is not tried again.
        """
        if self.is_warm and self.method is None:
            assert self.warm_start is not None
            self.warm_start.drop()
        with ExitStack() as last_to_first:
            last_to_first.callback(remove_quietly, self.folder)
            last_to_first.callback(remove_sockets, self._run, self.sockets)
            last_to_first.callback(self._end_domain)
            for end in (self.pump, self.agent):
                if end is not None:
                    last_to_first.callback(end.close)

    def _end_domain(self) -> None:
        """End it, and have libvirt forget it; the run knows of it until both were done."""
        with suppress(TargetError):
            try:
                self.domain.destroy()
            finally:
                self.domain.undefine()
            self._run.forget(DOMAIN, self._resource)


def _tell(phase: Phase) -> None:
    """Say what the making of a disk image has come to: it takes minutes."""
    tell(f"{phase.elapsed:4.0f} s: {phase.name}")


def need_room(folder: Path, size: int) -> None:
    """See that a clone, and a snapshot of its memory, will fit. Raises ``TargetError``."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise TargetError(
            f"a clone of the guest takes up to {size >> 20} MiB, and {free >> 20} MiB are free in {folder}: "
            f"{MORE_ROOM}"
        )


def _write(path: Path, text: str) -> None:
    """Write a file, unless nothing would be in it."""
    if text:
        path.write_text(text, encoding="utf-8")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def set_clock(agent: Agent) -> None:
    """Give the guest the host's time."""
    agent.set_clock(time.time())


def remove_sockets(run: Run, folder: Path) -> None:
    """Remove a folder of sockets; what stays goes with the run, or with the next."""
    with suppress(OSError):
        remove_tree(folder)
        run.forget(SOCKETS, folder)


def remove_quietly(folder: Path) -> None:
    """Remove a folder; what stays goes with the run, or with the next."""
    with suppress(OSError):
        remove_tree(folder)
