"""A guest under libvirt: its life, its monitor, its snapshots, its screen."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

import libvirt
import libvirt_qemu

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.libvirt.connection import Hypervisor, call
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec, domain_xml

SnapshotMethod = Literal["qmp", "libvirt"]

_START_TIMEOUT: Final = 60.0
_MONITOR_TIMEOUT: Final = 30.0
_SNAPSHOT_TIMEOUT: Final = 120.0
_END_TIMEOUT: Final = 10.0
_JOB_INTERVAL: Final = 0.005
_KEY_HELD: Final = 50  # milliseconds
_RESETS_WHILE_BOOTING: Final = 2  # Windows does it; a triple fault does it again and again

_DROP: Final = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)

INTERNAL_ERROR: Final = "paused by an internal error of the accelerator"
"""Why a guest stopped that its accelerator can't run. What libvirt calls so can be anything."""

PANICKED: Final = "its kernel panicked"

_STATUS: Final = {  # QEMU's RunState: those in which a guest no longer runs, for good
    "internal-error": INTERNAL_ERROR,
    "io-error": "paused, as its disk could not be written or read",
    "guest-panicked": PANICKED,
    "shutdown": "shut down",
    "watchdog": "paused by its watchdog",
    "paused": "paused from outside",
}

_STATES: Final = {
    libvirt.VIR_DOMAIN_NOSTATE: "no state",
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "blocked",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutting down",
    libvirt.VIR_DOMAIN_SHUTOFF: "shut off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended",
}

_GONE: Final = "QEMU ended: it was killed, or it crashed"


class Domain:
    """One domain. ``stopped`` is None while it runs as it should, else why it does not.

    ``on_stop`` is called with the same words as soon as an event of libvirt's or QEMU's says so, in the
    thread that hears it: it must not wait, nor ask libvirt. One thread at a time uses the rest. A guest
    that ``may_restart`` does so as often as it likes; any other is taken to have failed.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        spec: DomainSpec,
        *,
        on_stop: Callable[[str], None] | None = None,
        may_restart: bool = False,
    ) -> None:
        self.spec = spec
        self.resets = 0
        self.panic: tuple[int, ...] | None = None
        """What Windows told the panic device: the bug check and its parameters."""
        self._hypervisor = hypervisor
        self._on_stop = on_stop
        self._may_restart = may_restart
        self._lock = threading.Lock()
        self._stopped: str | None = "not started"
        self._resets_allowed = _RESETS_WHILE_BOOTING
        self._held = False
        self._panics_go_on = False
        self._restarts = False
        self._callbacks: list[Callable[[], object]] = []
        self._methods: dict[str, SnapshotMethod] = {}
        self._nodes: tuple[str, list[str]] | None = None
        self._jobs = 0
        self._known: tuple[libvirt.virConnect, libvirt.virDomain] | None = None

    @property
    def stopped(self) -> str | None:
        return self._stopped

    @property
    def state(self) -> str:
        """Libvirt's own word for the domain's state; "undefined" where it knows none."""
        return domain_state(self._hypervisor, self.spec.name)

    def define(self) -> None:
        """Tell libvirt of it. Raises ``TargetError``."""
        connection = self._hypervisor.connection
        flags = libvirt.VIR_DOMAIN_DEFINE_VALIDATE
        try:
            call(connection.defineXMLFlags, domain_xml(self.spec), flags)
        except TargetError as e:
            raise TargetError(f"libvirt refuses the domain: {e}") from e

    def start(self, *, timeout: float = _START_TIMEOUT, paused: bool = False) -> None:
        """Start QEMU; the guest begins to boot, unless it is to be ``paused``. Raises ``TargetError``."""
        self._forget_events()
        self._listen()
        self._hypervisor.watch(self._reconnected)
        with self._lock:
            self._methods = {}
            self._nodes = None
            self._stopped = None
            self.resets = 0
            self._resets_allowed = _RESETS_WHILE_BOOTING
            self.panic = None
            self._panics_go_on = False
            self._restarts = False
        try:
            flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
            call(self._domain().createWithFlags, flags, timeout=timeout)
        except TargetError as e:
            self._forget_events()
            with self._lock:
                self._stopped = f"did not start: {e}"
            raise TargetError(f"QEMU does not start: {e}") from e
        self._check_status()

    def start_from(
        self,
        tag: str,
        *,
        before_it_runs: Callable[[], None] = lambda: None,
        timeout: float = _START_TIMEOUT,
    ) -> None:
        """Start QEMU; the guest goes on from a snapshot that its disk has, by QMP. Raises ``TargetError``."""
        with self._holding():
            self.start(timeout=timeout, paused=True)
            self._methods[tag] = "qmp"
            self.snapshot_load(tag, timeout=timeout)
            self._resets_allowed = self.resets
            before_it_runs()
            call(self._domain().resume)
        self._check_status()

    def start_held(self, before_it_runs: Callable[[], None]) -> None:
        """Start QEMU; the guest begins to boot behind ``before_it_runs``. Raises ``TargetError``."""
        with self._holding():
            self.start(paused=True)
            before_it_runs()
            call(self._domain().resume)
        self._check_status()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The guest stands still meanwhile, and its disk's file is as it is on a machine that is off."""
        with self._holding():
            call(self._domain().suspend)
            try:
                yield
            finally:
                call(self._domain().resume)

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Who pauses it is us."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def destroy(self) -> None:
        """End QEMU, whatever it does. Raises ``TargetError`` where it stays."""
        self._forget_events()
        with self._lock:
            self._stopped = "ended"
        end_domain(self._hypervisor, self.spec.name)

    def forget(self) -> None:
        """Hear nothing more of it; it goes on."""
        self._forget_events()
        with self._lock:
            self._stopped = "let go"

    def undefine(self) -> None:
        """Have libvirt forget it, and what it kept for it (UEFI variables, the TPM's state)."""
        undefine_domain(self._hypervisor, self.spec.name)

    def monitor(
        self, command: str, *, timeout: float = _MONITOR_TIMEOUT, **arguments: object
    ) -> Any:
        """Do a QMP command; what it returned. ``_`` in an argument's name is QMP's ``-``."""
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): v for name, v in arguments.items()}
        text = call(
            libvirt_qemu.qemuMonitorCommand, self._domain(), json.dumps(request), 0, timeout=timeout
        )
        reply = json.loads(text)
        if "error" in reply:
            raise TargetError(f"QEMU's {command}: {reply['error'].get('desc', reply['error'])}")
        return reply["return"]

    def forwarded(self, port: int) -> int:
        """The port on 127.0.0.1 that leads to this TCP port of the guest."""
        listing = self.monitor("human-monitor-command", command_line="info usernet")
        pattern = rf"^\s*TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+{port}\s"
        if match := re.search(pattern, listing, re.MULTILINE):
            return int(match[1])
        raise TargetError(f"no port of the host leads to the guest's port {port}")

    def snapshot_save(
        self,
        tag: str,
        *,
        method: SnapshotMethod | None = None,
        timeout: float = _SNAPSHOT_TIMEOUT,
    ) -> SnapshotMethod:
        """Keep memory and disk under ``tag``; by which way. The guest pauses meanwhile, and goes on.

        By QMP where that is sound, since QEMU and its sockets live on through a load; else by libvirt,
        whose revert starts QEMU anew. From the first snapshot on a reset of the guest counts as its end.
        """
        if method is None:
            try:
                return self.snapshot_save(tag, method="qmp", timeout=timeout)
            except TargetError as first:
                if self.stopped is not None:
                    raise
                try:
                    return self.snapshot_save(tag, method="libvirt", timeout=timeout)
                except TargetError as e:
                    raise TargetError(f"{first}; and by libvirt's own snapshot: {e}") from e
        if method == "qmp":
            self._save_by_qmp(tag, timeout)
        else:
            xml = f"<domainsnapshot><name>{_tag(tag)}</name></domainsnapshot>"
            call(self._domain().snapshotCreateXML, xml, 0, timeout=timeout)
        self._methods[tag] = method
        self._resets_allowed = self.resets
        return method

    def snapshot_load(self, tag: str, *, timeout: float = _SNAPSHOT_TIMEOUT) -> None:
        """Put memory and disk back to what they were at the save. Raises ``TargetError``."""
        if self._methods.get(tag) == "libvirt":
            snapshot = call(self._domain().snapshotLookupByName, tag)
            call(self._domain().revertToSnapshot, snapshot, 0, timeout=timeout)
            with self._lock:
                self._stopped = None
        else:
            node, devices = self._writable_nodes()
            self._do_job("snapshot-load", timeout, tag=_tag(tag), vmstate=node, devices=devices)
        self._restarts = False
        self.panic = None
        self._check_status()

    def screenshot(self, path: Path, *, timeout: float = _MONITOR_TIMEOUT) -> None:
        """Write the guest's screen to ``path``, a PNG. Raises ``TargetError``."""
        screenshot(self._hypervisor, self.spec.name, path, timeout=timeout)

    def interrupt(self) -> None:
        """Send its processors an NMI. Raises ``TargetError``."""
        call(self._domain().injectNMI, 0)

    def instruction_pointers(self) -> list[int]:
        """Where each processor is. Raises ``TargetError``."""
        told = self.monitor("human-monitor-command", command_line="info registers -a")
        return [int(value, 16) for value in re.findall(r"\b[RE]IP=([0-9a-f]{8,16})\b", told)]

    def let_panic(self) -> None:
        """From here on a kernel that panics goes on, and may write its dump. Raises ``TargetError``."""
        self.monitor("set-action", panic="none")
        self._panics_go_on = True

    def let_restart(self) -> None:
        """Up to the next load of a snapshot a panic and a reset of the guest are expected."""
        self._restarts = True

    def xml(self) -> str:
        """What libvirt runs, without what it keeps secret. Raises ``TargetError``."""
        return str(call(self._domain().XMLDesc, 0))

    def log(self) -> str:
        """What libvirt and QEMU wrote of it, as far as we may read that; "" for nothing."""
        try:
            return self._hypervisor.log_of(self.spec.name).read_text(errors="replace")
        except OSError:
            return ""

    def press(self, key: int) -> None:
        """Press a key of the keyboard; its number is Linux' (``linux/input-event-codes.h``)."""
        codes = libvirt.VIR_KEYCODE_SET_LINUX
        call(self._domain().sendKey, codes, _KEY_HELD, [key], 1, 0)

    def press_power_button(self) -> None:
        """Ask the guest by ACPI to shut down."""
        call(self._domain().shutdown)

    def transferred(self, device: str) -> tuple[int, int]:
        """How many bytes the guest has read from a disk or a CD ("vda", "sdb"), and written to it."""
        _, read, _, written, _ = call(self._domain().blockStats, device)
        return read, written

    def console_tail(self, lines: int = 20) -> list[str]:
        """The last lines that the guest said on its console; none where that is not a file."""
        return console_tail(self.spec.console, lines) if self.spec.console is not None else []

    def _save_by_qmp(self, tag: str, timeout: float) -> None:
        node, devices = self._writable_nodes()
        self._do_job("snapshot-save", timeout, tag=_tag(tag), vmstate=node, devices=devices)

    def _writable_nodes(self) -> tuple[str, list[str]]:
        """The disk's node, and all that a snapshot has to hold; the same for as long as QEMU runs.

        Not what can't be written, and not a raw pflash: it can't hold snapshots, the guest's memory has
        its content, and QEMU writes it back after a load.
        """
        if self._nodes is not None:
            return self._nodes
        inserted = [block.get("inserted") for block in self.monitor("query-block")]
        nodes = [i["node-name"] for i in inserted if i and not i["ro"] and i["drv"] == "qcow2"]
        if len(nodes) != 1:
            raise TargetError(f"a snapshot needs one writable qcow2 disk, there are {len(nodes)}")
        self._nodes = nodes[0], nodes
        return self._nodes

    def _do_job(self, command: str, timeout: float, **arguments: object) -> None:
        self._jobs += 1
        job = f"kdriver-{os.getpid()}-{self._jobs}"
        deadline = time.monotonic() + timeout
        self.monitor(command, job_id=job, timeout=timeout, **arguments)
        while True:
            left = max(0.0, deadline - time.monotonic())
            jobs = self.monitor("query-jobs", timeout=left + 1)
            found = next((entry for entry in jobs if entry["id"] == job), None)
            if found is None:
                raise TargetError(f"QEMU forgot its {command}")
            if found["status"] == "concluded":
                break
            if not left:
                raise TargetError(f"QEMU's {command} was not over after {timeout:g} s")
            time.sleep(_JOB_INTERVAL)
        self.monitor("job-dismiss", id=job)
        if "error" in found:
            raise TargetError(f"QEMU's {command}: {found['error']}")

    def _domain(self) -> libvirt.virDomain:
        connection = self._hypervisor.connection
        if self._known is None or self._known[0] is not connection:
            self._known = (connection, call(connection.lookupByName, self.spec.name))
        return self._known[1]

    # What is learnt from events. libvirt's thread only notes them; ours asks.

    def _listen(self) -> None:
        connection, domain = self._hypervisor.connection, self._domain()
        lifecycle = call(
            connection.domainEventRegisterAny,
            domain,
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
            self._on_lifecycle,
            None,
        )
        qemu = call(
            libvirt_qemu.qemuMonitorEventRegister, connection, domain, None, self._on_event, None
        )
        self._callbacks = [
            lambda: connection.domainEventDeregisterAny(lifecycle),
            lambda: libvirt_qemu.qemuMonitorEventDeregister(connection, qemu),
        ]

    def _forget_events(self) -> None:
        self._hypervisor.unwatch(self._reconnected)
        callbacks, self._callbacks = self._callbacks, []
        for deregister in callbacks:
            with suppress(libvirt.libvirtError):
                deregister()

    def _on_lifecycle(
        self, _connection: object, _domain: object, event: int, detail: int, _opaque: object
    ) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT:
                return  # libvirt's own revert: it starts it again
            if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED:
                self._note("ended from outside (virsh destroy?)")
            elif detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN:
                self._note("shut down")
            else:
                self._note(_GONE)
        elif event == libvirt.VIR_DOMAIN_EVENT_CRASHED:
            self._note_panic()
        elif event == libvirt.VIR_DOMAIN_EVENT_UNDEFINED:
            return

    def _on_event(
        self,
        _connection: object,
        _domain: object,
        event: str,
        _seconds: int,
        _micros: int,
        details: str | None,
        _opaque: object,
    ) -> None:
        told = json.loads(details) if details else {}
        if event == "STOP":
            self._hypervisor.defer(self._check_status)
        elif event == "GUEST_PANICKED":
            self.panic = self.panic or _panic(told.get("info"))
            self._note_panic()
        elif event == "SHUTDOWN" and told.get("guest"):
            self._note("the guest shut itself down")
        elif event == "BLOCK_IO_ERROR" and told.get("action") == "stop":
            why = "no space left on the host's disk" if told.get("nospace") else told.get("reason")
            self._note(f"paused, as its disk could not be written or read: {why}")
        elif event == "RESET" and told.get("guest"):
            self._note_reset()

    def _note_panic(self) -> None:
        """A kernel that may go on behind it has not stopped; who waits for its agent waits in vain."""
        told = _panic_words(self.panic)
        if not self._panics_go_on:
            self._note(told)
        else:
            self._note_crash(told)

    def _note_crash(self, reason: str) -> None:
        if self._on_stop is not None and not self._restarts:
            self._on_stop(reason)

    def _note_reset(self) -> None:
        self.resets += 1
        if self._may_restart or self.resets <= self._resets_allowed:
            return
        if self._panics_go_on:
            self._note_crash("the guest reset itself")
        elif self.resets == 1 or self._methods:
            self._note("the guest reset itself (a reboot, or a triple fault)")
        else:
            self._note(
                f"the guest reset itself {self.resets} times while it booted (triple faults?)"
            )

    def _check_status(self) -> None:
        status = self.monitor("query-status")["status"]
        if status in _STATUS and not (self._held and status == "paused"):
            self._note(_STATUS[status])

    def _reconnected(self, back: bool) -> None:
        if not back:
            self._note("libvirt's daemon is gone")
            return
        try:
            self._listen()
            if call(self._domain().isActive):
                self._check_status()
            else:
                self._note(_GONE)
        except TargetError as e:
            self._note(f"lost when libvirt's daemon came back: {e}")

    def _note(self, reason: str) -> None:
        """Keep the first reason, and tell whoever waits."""
        with self._lock:
            if self._stopped is not None:
                return
            self._stopped = reason
        if self._on_stop is not None:
            self._on_stop(reason)


def domain_state(hypervisor: Hypervisor, name: str) -> str:
    """Libvirt's own word for a domain's state; "undefined" where it knows none. Raises ``TargetError``."""
    try:
        return _STATES.get(call(call(hypervisor.connection.lookupByName, name).state)[0], "unknown")
    except TargetError as e:
        if _is_gone(e):
            return "undefined"
        raise


def screenshot(
    hypervisor: Hypervisor, name: str, path: Path, *, timeout: float = _MONITOR_TIMEOUT
) -> None:
    """Write a domain's screen to ``path``, a PNG. Raises ``TargetError``."""
    connection = hypervisor.connection
    domain, stream = call(connection.lookupByName, name), call(connection.newStream)
    kind = call(domain.screenshot, stream, 0, 0, timeout=timeout)
    parts: list[bytes] = []

    def take(_stream: libvirt.virStream, data: bytes, _opaque: object) -> int:
        parts.append(data)
        return len(data)

    call(stream.recvAll, take, None, timeout=timeout)
    call(stream.finish)
    if kind != "image/png":  # QEMU before 7.1
        raise TargetError(f"libvirt gives a screenshot as {kind}; one in PNG needs QEMU 7.1")
    path.write_bytes(b"".join(parts))


def end_domain(hypervisor: Hypervisor, name: str) -> None:
    """End the QEMU of a domain, if it runs; by its process where libvirt is gone. Raises ``TargetError``."""
    try:
        _ = hypervisor.connection
    except TargetError as e:
        try:
            end_emulator(name)
        except OSError as error:
            raise TargetError(f"{e}; and {error}") from error
        return
    try:
        call(call(hypervisor.connection.lookupByName, name).destroy)
    except TargetError as e:
        if not _is_gone(e):
            raise


def undefine_domain(hypervisor: Hypervisor, name: str) -> None:
    """Have libvirt forget a domain that does not run, and all that it kept for it."""
    try:
        call(call(hypervisor.connection.lookupByName, name).undefineFlags, _DROP)
    except TargetError as e:
        if not _is_gone(e):
            raise


def end_emulator(name: str) -> None:
    """Kill the QEMU of the domain ``name``. Raises OSError where it stays."""
    deadline = time.monotonic() + _END_TIMEOUT
    while alive := _emulators(name):
        if time.monotonic() > deadline:
            raise OSError(f"QEMU of {name} does not end: {alive}")
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _emulators(name: str) -> list[int]:
    """libvirt starts QEMU with ``-name guest=NAME,...``; our names are not given twice."""  # noqa: D403
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            named = any(a.split(b",")[0] == f"guest={name}".encode() for a in arguments)
            if named and b"qemu" in arguments[0]:
                found.append(int(entry.name))
    return found


def console_tail(path: Path, lines: int = 20) -> list[str]:
    """The last lines of a console's file; none where nothing was said."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 200 * lines))
            text = file.read(200 * lines).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [_printable(line) for line in text.splitlines() if line.strip()][-lines:]


def _printable(line: str) -> str:
    """The line without what a terminal would obey: a guest wrote it."""
    plain = re.sub(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[@-_])", "", line)
    return "".join(c if c.isprintable() else "?" for c in plain)


def _tag(tag: str) -> str:
    """A snapshot's name, checked. One of digits alone would be taken for a number."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,62}", tag):
        raise ValueError(f"{tag!r} can't be a snapshot's name")
    return tag


def _is_gone(error: TargetError) -> bool:
    """Whether libvirt said that it knows no such domain, or that it does not run."""
    cause = error.__cause__
    return isinstance(cause, libvirt.libvirtError) and cause.get_error_code() in {
        libvirt.VIR_ERR_NO_DOMAIN,
        libvirt.VIR_ERR_OPERATION_INVALID,
    }


def _panic(info: dict[str, Any] | None) -> tuple[int, ...] | None:
    """What the panic device says: on Windows the bug check and its parameters."""
    if not info or info.get("type") != "hyper-v":
        return None
    return tuple(int(info.get(f"arg{n}", 0)) for n in range(1, 6))


_LOGGED_PANIC: Final = re.compile(
    r"panic hyper-v: "
    + ", ".join(rf"arg{n}='(0x[0-9a-f]{{1,16}}|\d{{1,20}})'" for n in range(1, 6))
)


def logged_panic(log: str) -> tuple[int, ...] | None:
    """The last bug check that libvirt wrote into a domain's log; None where it wrote none."""
    found = _LOGGED_PANIC.findall(log)
    return tuple(int(value, 0) for value in found[-1]) if found else None


def _panic_words(panic: tuple[int, ...] | None) -> str:
    if panic is None:
        return PANICKED
    code, *parameters = panic
    return f"{PANICKED}: bug check 0x{code:X} ({', '.join(f'0x{p:X}' for p in parameters)})"
