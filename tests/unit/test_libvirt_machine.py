"""A virtual machine's life where libvirt is a fake, made by hand: what fails, is interrupted, or stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from pytest_kdriver.cli import main
from pytest_kdriver.config import TargetConfig
from pytest_kdriver.errors import ConfigError, TargetError
from pytest_kdriver.guest.links.link import Link
from pytest_kdriver.image.preflight import Report
from pytest_kdriver.kernel.events import BugCheck
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.targets.leftovers import DOMAIN, REMOVERS
from pytest_kdriver.targets.libvirt import machine as machine_module
from pytest_kdriver.targets.libvirt.accelerator import find_accelerator
from pytest_kdriver.targets.libvirt.address import NotLetInError, SerialAddress, WinrmAddress
from pytest_kdriver.targets.libvirt.base_disk import make_overlay
from pytest_kdriver.targets.libvirt.connection import Hypervisor, Owner, call
from pytest_kdriver.targets.libvirt.domain import INTERNAL_ERROR, Domain
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec
from pytest_kdriver.targets.libvirt.kept import KeptVm
from pytest_kdriver.targets.libvirt.leftovers import domain_resource, remove_domain
from pytest_kdriver.targets.libvirt.machine import LibvirtMachine, _Vm
from pytest_kdriver.targets.libvirt.warm_start import WarmStart
from pytest_kdriver.targets.machine import Guest
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.runs import Run, collect_garbage, runs_directory
from tests.unit.far_ends import PATIENCE

needs_qemu_img = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="needs qemu-img (Debian: qemu-utils)"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets lie; a short path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def error(code: int, message: str) -> libvirt.libvirtError:
    made = libvirt.libvirtError(message)
    made.err = (code, libvirt.VIR_FROM_QEMU, message, 2, None, None, None, 0, 0)
    return made


class FakeDomain:
    """What libvirt has under a name. What is in ``refuses`` is raised instead of doing it."""

    def __init__(self, libvirt: FakeLibvirt, name: str) -> None:
        self._libvirt = libvirt
        self._name = name

    def createWithFlags(self, flags: int) -> None:
        self._libvirt.do(f"create {self._name}", "create")

    def resume(self) -> None:
        self._libvirt.do(f"resume {self._name}", "resume")

    def destroy(self) -> None:
        self._libvirt.do(f"destroy {self._name}", "destroy")

    def undefineFlags(self, flags: int) -> None:
        self._libvirt.do(f"undefine {self._name}", "undefine")
        del self._libvirt.domains[self._name]


class FakeLibvirt:
    """A connection to a libvirt that only notes what it is to do."""

    def __init__(self, refuses: dict[str, BaseException]) -> None:
        self.domains: dict[str, FakeDomain] = {}
        self.done: list[str] = []
        self._refuses = refuses

    def do(self, what: str, kind: str) -> None:
        if kind in self._refuses:
            raise self._refuses[kind]
        self.done.append(what)

    def defineXMLFlags(self, xml: str, flags: int) -> None:
        name = xml.partition("<name>")[2].partition("</name>")[0]
        self.do(f"define {name}", "define")
        self.domains[name] = FakeDomain(self, name)

    def lookupByName(self, name: str) -> FakeDomain:
        if name not in self.domains:
            raise error(libvirt.VIR_ERR_NO_DOMAIN, f"no domain {name}")
        return self.domains[name]

    def domainEventRegisterAny(self, *_: object) -> int:
        return 1

    def domainEventDeregisterAny(self, number: int) -> None:
        pass

    def newStream(self) -> object:
        self.do("look", "look")
        raise error(libvirt.VIR_ERR_NO_SUPPORT, "it has no screen")


class FakeHypervisor(Hypervisor):
    """A ``Hypervisor`` whose libvirt is a fake. The rest is the real one's."""

    def __init__(self, uri: str, emulator: Path, refuses: dict[str, BaseException]) -> None:
        self.uri = uri
        self.emulator = emulator
        self.qemu_version = "7.2.22"
        self.owner = Owner(os.geteuid(), os.getegid())
        self.libvirt = FakeLibvirt(refuses)
        self._lock = threading.RLock()
        self._watchers = []

    @property
    def connection(self) -> Any:
        return self.libvirt


class Listener:
    """Somebody at a Unix socket who hangs up at once, and counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard = 0
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self.heard += 1
                connection.close()

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._server.close()
        self.path.unlink(missing_ok=True)


@pytest.fixture
def listener(runtime: Path) -> Iterator[Listener]:
    listener = Listener(runtime / "libvirt")
    yield listener
    listener.close()


Make = Callable[..., tuple[LibvirtMachine, FakeHypervisor]]


@pytest.fixture
def make(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a machine whose libvirt is a fake; QEMU has ``status`` once it was started."""
    emulator = tmp_path / "qemu-system-x86_64"
    emulator.write_text("#!/bin/sh\nprintf rlcix\nexit 85\n")  # a sound KVM, in a trial
    emulator.chmod(0o755)
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))

    def make(
        status: str = "running", refuses: dict[str, BaseException] | None = None, **vm: object
    ) -> tuple[LibvirtMachine, FakeHypervisor]:
        reply = json.dumps({"return": {"status": status}})
        monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventRegister", lambda *_: 1)
        monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventDeregister", lambda *_: None)
        monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", lambda *_: reply)
        settings = {"disk": disk, "memory": 64, "boot_timeout": 0.2, **vm}
        config = TargetConfig(name="mine", kind="libvirt", vm=settings)
        machine = LibvirtMachine(config, artifacts=tmp_path / "pictures")
        uri = f"qemu:///session?socket={runtime / 'libvirt'}"
        hypervisor = FakeHypervisor(uri, emulator, refuses or {})
        machine._hypervisor = hypervisor
        return machine, hypervisor

    return make


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    yield run
    run.close()


NO_MEMORY = error(
    libvirt.VIR_ERR_INTERNAL_ERROR,
    "internal error: process exited while connecting to monitor: cannot set up guest memory",
)


@needs_qemu_img
class TestAGuestThatDoesNotComeUp:
    def test_since_qemu_does_not_start_is_no_failure_of_kvm(self, make: Make, run: Run) -> None:
        machine, hypervisor = make(refuses={"create": NO_MEMORY})
        with pytest.raises(TargetError, match="QEMU does not start: internal error: process"):
            machine.boot(run, KernelLog(), 1)
        assert find_accelerator(hypervisor.emulator, hypervisor.owner).kind == "kvm"
        assert hypervisor.libvirt.domains == {}

    def test_since_its_accelerator_gave_up_is_one(self, make: Make, run: Run) -> None:
        machine, hypervisor = make(status="internal-error")
        with pytest.raises(TargetError, match="the guest stopped while it booted"):
            machine.boot(run, KernelLog(), 1)
        found = find_accelerator(hypervisor.emulator, hypervisor.owner)
        assert (found.kind, found.reason) == (
            "tcg",
            f"KVM failed a guest on this host: {INTERNAL_ERROR}",
        )

    def test_is_told_also_where_the_failure_of_kvm_can_t_be_noted(
        self, make: Make, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def disk_is_full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(machine_module, "remember_failure", disk_is_full)
        machine, hypervisor = make(status="internal-error")
        with pytest.raises(TargetError, match="the guest stopped while it booted"):
            machine.boot(run, KernelLog(), 1)
        assert hypervisor.libvirt.domains == {}

    def test_since_it_lets_nobody_in_is_asked_once(
        self, make: Make, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Windows would count. Nor is it booted anew, where it went on from an earlier boot."""
        asked = []

        def refuse(address: WinrmAddress, _timeout: float) -> Link:
            asked.append(address.user)
            raise NotLetInError("it refused the user tester")

        def take(_start: WarmStart, overlay: Path, base: Path) -> bool:
            make_overlay(base, overlay)
            return True

        monkeypatch.setattr(WinrmAddress, "open", refuse)
        monkeypatch.setattr(WarmStart, "take", take)
        monkeypatch.setattr(Domain, "start_from", lambda domain, _, **__: domain.start())
        monkeypatch.setattr(Domain, "forwarded", lambda *_: 1)
        machine, hypervisor = make(agent="winrm", winrm_user="tester")
        with pytest.raises(TargetError, match="it refused the user tester"):
            machine.boot(run, KernelLog(), 1)
        assert asked == ["tester"]
        assert hypervisor.libvirt.domains == {}

    def test_is_ended_though_its_last_words_were_interrupted(
        self, make: Make, run: Run, runtime: Path
    ) -> None:
        machine, hypervisor = make(refuses={"look": KeyboardInterrupt()})
        with pytest.raises(KeyboardInterrupt):
            machine.boot(run, KernelLog(), 1)
        assert [what.split()[0] for what in hypervisor.libvirt.done] == [
            *("define", "create", "resume"),
            *("destroy", "undefine"),
        ]
        assert list(runtime.iterdir()) == []
        assert not list(run.path.glob("vm-*"))


@needs_qemu_img
def test_a_machine_that_can_t_be_made_leaves_nothing(make: Make, run: Run, runtime: Path) -> None:
    machine, _ = make(cmdline="\1")
    with pytest.raises(ConfigError, match="has characters that libvirt can't be told"):
        machine.boot(run, KernelLog(), 1)
    assert list(runtime.iterdir()) == []
    assert not list(run.path.glob("vm-*"))


@needs_qemu_img
class TestTheEndOfARun:
    def test_asks_no_libvirt_for_a_domain_that_was_ended(
        self, make: Make, listener: Listener
    ) -> None:
        machine, _ = make()
        target = MachineTarget("mine", machine)
        with pytest.raises(TargetError):
            target.start()
        target.close()
        assert list(runs_directory().iterdir()) == []
        assert listener.heard == 0

    def test_keeps_the_record_of_a_domain_that_stays(
        self, make: Make, listener: Listener, runtime: Path
    ) -> None:
        busy = error(libvirt.VIR_ERR_SYSTEM_ERROR, "Failed to terminate process: it is busy")
        machine, _ = make(refuses={"destroy": busy})
        target = MachineTarget("mine", machine)
        with pytest.raises(TargetError):
            target.start()
        target.close()
        (folder,) = runs_directory().iterdir()
        assert DOMAIN in (folder / "resources").read_text()
        assert listener.heard > 0
        listener.close()
        assert collect_garbage(REMOVERS) == [folder]
        assert not folder.exists()


class FakeMachine:
    """A machine that is interrupted when its guest is up, before anybody else knows of that."""

    capabilities = frozenset[str]()

    def __init__(self) -> None:
        self.ends = 0

    def describe(self) -> str:
        return "a fake"

    def boot(self, run: Run, log: KernelLog, generation: int) -> Guest:
        raise KeyboardInterrupt

    def save(self, guest: Guest) -> Guest:
        return guest

    def revert(self, guest: Guest, log: KernelLog) -> Guest | None:
        return None

    def failure(self) -> str | None:
        return None

    def keep(self, guest: Guest) -> str | None:
        return None

    def check(self, guest: Guest) -> None:
        pass

    def catch_up(self, guest: Guest) -> bool:
        return True

    def examine_hang(self, guest: Guest) -> None:
        pass

    def evidence(self) -> dict[str, Callable[[Path], None]]:
        return {}

    def let_dump(self, guest: Guest) -> Guest | None:
        return None

    def preflight(self, image: Path) -> Report:
        raise NotImplementedError

    def end(self) -> None:
        self.ends += 1


def test_a_guest_that_the_target_was_not_given_yet_is_ended() -> None:
    machine = FakeMachine()
    target = MachineTarget("mine", machine)
    with pytest.raises(KeyboardInterrupt):
        target.start()
    assert machine.ends == 1
    target.close()


class TestRemovingADomain:
    def test_whose_libvirt_is_gone_ends_its_qemu(self, tmp_path: Path) -> None:
        qemu = _fake_qemu(tmp_path, "kdriver-mine-1")
        with qemu:
            remove_domain(_resource(tmp_path / "absent"))
            assert qemu.wait(PATIENCE) == -signal.SIGKILL

    def test_whose_libvirt_left_its_socket_ends_its_qemu(self, runtime: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(runtime / "stale"))
        with _fake_qemu(runtime, "kdriver-mine-1") as qemu:
            remove_domain(_resource(runtime / "stale"))
            assert qemu.wait(PATIENCE) == -signal.SIGKILL

    def test_whose_libvirt_is_there_and_does_not_answer_leaves_it(
        self, runtime: Path, listener: Listener
    ) -> None:
        with _fake_qemu(runtime, "kdriver-mine-1") as qemu:
            with pytest.raises(OSError, match="can't be reached"):
                remove_domain(_resource(listener.path))
            assert qemu.poll() is None
            qemu.kill()


def _resource(path: Path) -> Path:
    return domain_resource(f"qemu:///session?socket={path}", "kdriver-mine-1")


def _fake_qemu(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """A process that looks as the QEMU of a domain does."""
    program = "import time; print(flush=True); time.sleep(600)"
    process = subprocess.Popen(
        ["qemu-system-x86_64", "-c", program, "-name", f"guest={name},debug-threads=on"],
        executable=sys.executable,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_an_interrupt_does_not_overtake_a_call() -> None:
    finished = threading.Event()

    def define() -> None:
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        signal.pthread_kill(main_thread, signal.SIGINT)
        threading.Event().wait(0.3)
        finished.set()

    with pytest.raises(KeyboardInterrupt):
        call(define)
    assert finished.is_set()


class Reached(Exception):
    pass


class SlowServer(SerialAddress):
    """An SSH server whose handshake takes ``SECONDS``."""

    SECONDS = 0.3

    def open(self, timeout: float) -> Link:
        threading.Event().wait(min(timeout, self.SECONDS))
        if timeout < self.SECONDS:
            raise TimeoutError("the handshake was not over")
        raise Reached


class SlowMachine(LibvirtMachine):
    def _address(self, vm: object) -> SlowServer:
        return SlowServer(path="")


class BootingVm:
    """What is waited for while a guest boots."""

    def __init__(self) -> None:
        self.domain = self
        self.stopped: str | None = None
        self.bug_check: str | None = None
        self.pump = self
        self.failure: str | None = None


def test_a_guest_that_never_answers_is_told_with_what_its_debugger_lost(tmp_path: Path) -> None:
    settings = {"disk": tmp_path / "disk", "agent": "ssh", "boot_timeout": 0.2}
    machine = SlowMachine(TargetConfig(name="mine", kind="libvirt", vm=settings))
    vm: Any = BootingVm()
    vm.failure = "the guest's kernel does not answer its debugger any more"
    vm.domain, vm.stopped = BootingVm(), threading.Event()
    with pytest.raises(TargetError, match="within 0.2 s .*; its kernel log broke: the guest's k"):
        machine._reach_agent(vm, time.monotonic() + 0.2)


def test_a_handshake_of_ssh_s_may_take_longer_than_an_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_module, "ATTEMPT", 0.05)
    settings = {"disk": tmp_path / "disk", "agent": "ssh"}
    machine = SlowMachine(TargetConfig(name="mine", kind="libvirt", vm=settings))
    vm: Any = BootingVm()
    vm.domain, vm.stopped = BootingVm(), threading.Event()
    with pytest.raises(Reached):
        machine._reach_agent(vm, time.monotonic() + PATIENCE)


@pytest.fixture
def kept(run: Run) -> KeptVm:
    """A machine that was kept, and whose lock ``run`` still holds, as who removes it would."""
    kept = KeptVm(
        folder=run.path,
        target="mine",
        domain="kdriver-mine-1",
        uri="qemu:///session",
        console="",
        address=SerialAddress(path=""),
    )
    kept.write()
    (run.path / "kept").touch()
    return kept


def test_a_machine_that_another_kdriver_has_is_not_said_to_be_gone(
    kept: KeptVm, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["vm", "stop", "mine"]) == 1
    told = capfd.readouterr().err
    assert f"{kept.domain} stays" in told
    assert "is in use by another kdriver" in told
    assert kept.folder.exists()


def test_a_machine_that_another_kdriver_only_looks_at_is_stopped(kept: KeptVm, run: Run) -> None:
    letting_go = threading.Timer(0.2, run.keep)
    letting_go.start()
    assert main(["vm", "stop", "mine"]) == 0
    letting_go.join()
    assert not kept.folder.exists()


def test_a_config_that_contradicts_itself_ends_the_run_with_a_sentence(
    pytester: pytest.Pytester,
) -> None:
    pytester.makefile(
        ".toml", kdriver="[targets.mine]\nkind = 'libvirt'\ndisk = 'a'\nagent_port = 22"
    )
    pytester.makepyfile("def test(kdriver): pass")
    result = pytester.runpytest_subprocess("--kdriver-vm", "mine", timeout=120)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: targets.mine: agent is 'serial', agent_port 22; *"])


class TestAKernelThatPanics:
    """What the panic device tells, where no debugger does."""

    EVENT = json.dumps(
        {"action": "pause", "info": {"type": "hyper-v"} | {f"arg{n}": n * 16 for n in range(1, 6)}}
    )
    LOGGED = "panic hyper-v: arg1='0x1', arg2='0x2', arg3='0x3', arg4='0x4', arg5='0x5'\n"

    @pytest.fixture
    def vm(self, tmp_path: Path, run: Run) -> _Vm:
        hypervisor = FakeHypervisor("qemu:///session", tmp_path / "qemu", {})
        spec = DomainSpec(
            name="kdriver-mine-1", run="1-1", owner_pid=1, accelerator="tcg", emulator=tmp_path, disk=tmp_path
        )  # fmt: skip
        vm = _Vm(hypervisor, spec, run, tmp_path, tmp_path)
        vm.log = KernelLog()
        vm.domain._stopped = None  # it runs
        return vm

    def tell(self, vm: _Vm, details: str | None) -> None:
        vm.domain._on_event(None, None, "GUEST_PANICKED", 0, 0, details, None)

    def crashes(self, vm: _Vm) -> list[tuple[int, tuple[int, ...]]]:
        assert vm.log is not None
        return [(e.code, e.parameters) for e in vm.log.read() if isinstance(e, BugCheck)]

    def test_is_a_bug_check_in_the_log_told_once(self, vm: _Vm) -> None:
        self.tell(vm, self.EVENT)
        self.tell(vm, self.EVENT)
        assert self.crashes(vm) == [(16, (32, 48, 64, 80))]
        assert vm.bug_check == "bug check 0x10 SPIN_LOCK_NOT_OWNED (0x20, 0x30, 0x40, 0x50)"
        assert vm.domain.stopped == "its kernel panicked: bug check 0x10 (0x20, 0x30, 0x40, 0x50)"

    def test_is_none_beside_the_debugger_s(self, vm: _Vm) -> None:
        vm.note_bug_check(BugCheck(0.0, None, 0xD1, (1, 2, 3, 4)))
        self.tell(vm, self.EVENT)
        assert self.crashes(vm) == []

    def test_is_looked_for_in_the_domain_s_log_where_its_event_has_no_parameters(
        self, vm: _Vm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        log = tmp_path / "cache/libvirt/qemu/log/kdriver-mine-1.log"
        log.parent.mkdir(parents=True)
        log.write_text(self.LOGGED)
        self.tell(vm, None)
        assert self.crashes(vm) == [(1, (2, 3, 4, 5))]

    def test_that_says_nothing_more_is_no_bug_check(self, vm: _Vm) -> None:
        self.tell(vm, None)
        assert self.crashes(vm) == []
        assert vm.domain.stopped == "its kernel panicked"

    def test_that_may_go_on_has_not_stopped(self, vm: _Vm) -> None:
        vm.domain._panics_go_on = True
        self.tell(vm, self.EVENT)
        assert self.crashes(vm) == [(16, (32, 48, 64, 80))]
        assert vm.domain.stopped is None

    def test_of_a_guest_that_was_put_back_is_its_own(
        self, vm: _Vm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("_do_job", "_check_status"):
            monkeypatch.setattr(vm.domain, name, lambda *_, **__: None)
        vm.domain._nodes = "disk", ["disk"]
        vm.domain._panics_go_on = True
        self.tell(vm, self.EVENT)
        vm.domain.snapshot_load("first")
        LibvirtMachine._forget_crash(vm)
        self.tell(vm, self.EVENT.replace("16", "80"))
        assert [code for code, _ in self.crashes(vm)] == [16, 80]
        vm.domain.snapshot_load("first")
        LibvirtMachine._forget_crash(vm)
        vm.domain._on_event(None, None, "RESET", 0, 0, '{"guest": true}', None)
        vm.domain._on_event(None, None, "RESET", 0, 0, '{"guest": true}', None)
        vm.domain._on_event(None, None, "RESET", 0, 0, '{"guest": true}', None)
        assert vm.bug_check == "the guest reset itself"
        assert len(self.crashes(vm)) == 2
