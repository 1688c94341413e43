"""What goes wrong with a virtual machine: the right test fails, the run goes on, nothing stays behind."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.errors import AgentError, KdriverError, TargetError
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.frames import Frame, Kind, encode
from pytest_kdriver.guest.wire import to_bytes
from pytest_kdriver.port_stream import encode_payload
from pytest_kdriver.targets.libvirt import accelerator
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.machine import LibvirtMachine
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.win32error import Win32Error
from tests.conftest import Verdicts
from tests.vm.daemon import PrivateLibvirt, emulators
from tests.vm.tiny_guest import trial_disk

Configure = Callable[..., None]


def frames_of(operation: int, number: int, body: bytes) -> bytes:
    return encode(Frame(kind=Kind.REQUEST, operation=operation, request=number, body=body))


LeftBehind = Callable[[], list[str]]


def tiny_disk(first: str) -> bytes:
    """The disk of a guest that greets, and then obeys ``first``; see ``tiny_guest.S``."""
    sector = bytearray(Path(__file__).with_name("tiny_guest.bin").read_bytes())
    sector[509] = ord(first)
    return bytes(sector).ljust(1 << 20, b"\0")


@pytest.fixture
def left_behind(there: Callable[[], set[str]]) -> LeftBehind:
    """What is new since the test began."""
    before = there()
    return lambda: sorted(there() - before)


@pytest.fixture
def failing(own_cache: Path) -> Callable[..., tuple[str, float]]:
    """Start a target that does not come up; what it says, and after how long."""

    def failing(uri: str, **settings: object) -> tuple[str, float]:
        config = TargetConfig(name="broken", kind="libvirt", vm={"uri": uri, **settings})
        target = MachineTarget("broken", LibvirtMachine(config, artifacts=own_cache / "pictures"))
        began = time.monotonic()
        try:
            with pytest.raises(TargetError) as raised:
                target.start()
            return str(raised.value), time.monotonic() - began
        finally:
            target.close()

    return failing


class TestAGuestThatDoesNotComeUp:
    def test_since_it_never_boots_shows_its_screen(
        self,
        failing: Callable[..., tuple[str, float]],
        libvirt_uri: str,
        guest_folder: Path,
        own_cache: Path,
        left_behind: LeftBehind,
    ) -> None:
        disk = guest_folder / "no-agent.raw"
        disk.write_bytes(tiny_disk("\0"))
        told, _ = failing(libvirt_uri, disk=disk, boot_timeout=10.0, memory=64, nic="none")
        assert "the agent did not answer within 10 s" in told
        assert "boot_timeout in its config" in told
        assert "the last lines of its console:\n    the tiny guest is up" in told
        (picture,) = (own_cache / "pictures").glob("*.png")
        assert f"its screen: {picture}" in told
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert left_behind() == []

    def test_since_it_faults_thrice_says_so_at_once(
        self,
        failing: Callable[..., tuple[str, float]],
        libvirt_uri: str,
        guest_folder: Path,
    ) -> None:
        disk = guest_folder / "faults.raw"
        disk.write_bytes(tiny_disk("t"))
        told, seconds = failing(libvirt_uri, disk=disk, boot_timeout=600.0, memory=64, nic="none")
        assert "the guest stopped while it booted" in told
        assert "reset itself" in told
        assert seconds < 300  # and not when its time is over

    def test_since_its_disk_is_no_disk_says_so(
        self, failing: Callable[..., tuple[str, float]], libvirt_uri: str, guest_folder: Path
    ) -> None:
        told, _ = failing(libvirt_uri, disk=guest_folder / "absent.qcow2")
        assert "absent.qcow2 can't be used: No such file or directory" in told


def test_kvm_that_fails_a_guest_is_noticed_and_remembered(  # noqa: PLR0917 -- fixtures
    failing: Callable[..., tuple[str, float]],
    hypervisor: Hypervisor,
    guest_folder: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A host whose kernel was changed since its trial, say. The guest does what only a sound KVM can."""
    trial = accelerator.run_trial(hypervisor.emulator, "kvm", hypervisor.owner)
    if trial.passed or not trial.step:
        pytest.skip("KVM works here, or is not there at all: it can't fail")
    cache = own_cache / "another"
    cache.mkdir()
    monkeypatch.setenv("KDRIVER_CACHE", str(cache))
    with monkeypatch.context() as patch:
        passed = accelerator.Trial(passed=True, step="x", said="")
        patch.setattr(accelerator, "run_trial", lambda *_: passed)
        assert accelerator.find_accelerator(hypervisor.emulator, hypervisor.owner).kind == "kvm"
    disk = guest_folder / "trial.raw"
    disk.write_bytes(trial_disk().ljust(1 << 20, b"\0"))
    told, _ = failing(hypervisor.uri, disk=disk, boot_timeout=15.0, memory=64, nic="none")
    assert "the agent did not answer within 15 s" in told  # TCG's guest has none
    assert (
        "KVM can't run it, so TCG does, which is slow: paused by an internal error"
        in capfd.readouterr().err
    )
    found = accelerator.find_accelerator(hypervisor.emulator, hypervisor.owner)
    assert found.kind == "tcg"
    assert "KVM failed a guest on this host: paused by an internal error" in found.reason


class TestInTheMiddle:
    def test_a_link_that_is_cut_in_a_frame_is_made_anew(self, winevm: MachineTarget) -> None:
        link = winevm.agent._link
        socket = link._socket  # type: ignore[attr-defined]
        socket.sendall(b"\x40\x00\x00\x00\x01\x01half a frame")
        socket.shutdown(2)
        with pytest.raises(KdriverError):
            winevm.agent.processes()
        winevm.repair()
        assert winevm.agent.processes()

    def test_a_request_that_is_on_its_way_is_not_done_after_the_load(
        self, winevm: MachineTarget, put_back: Callable[[], None]
    ) -> None:
        """It lies in QEMU's socket: the guest that is put back must not take it for its own.

        QEMU and the guest's kernel take what they have room for before the agent asks for any: it has to be
        more.
        """
        agent = winevm.agent
        request = messages.SetValue(
            key="Software\\ghost", name="is" + 200 * "x", kind=4, data=b"here"
        )
        number = messages.OPERATION_OF[type(request)].number
        frame = encode_payload(frames_of(number, 1, to_bytes(request)))
        # Whatever QEMU takes at a time, what it leaves begins with a frame.
        request = dataclasses.replace(request, name=request.name + (512 - len(frame)) * "x")
        frame = encode_payload(frames_of(number, 1, to_bytes(request)))
        assert len(frame) == 512
        socket = agent._link._socket  # type: ignore[attr-defined]
        socket.settimeout(0.05)
        with suppress(TimeoutError):
            while True:
                assert socket.send(frame) == len(frame)
        lying = fcntl.ioctl(socket, termios.TIOCOUTQ, bytes(4))
        assert int.from_bytes(lying, sys.byteorder) > 10 * len(frame)
        put_back()
        time.sleep(0.5)  # nothing tells that something will not be done
        assert winevm.agent.get_value("Software\\ghost", request.name) is None

    def test_libvirt_that_dies_and_comes_back_is_no_matter(
        self, winevm: MachineTarget, put_back: Callable[[], None], private_libvirt: PrivateLibvirt
    ) -> None:
        winevm.agent.put(b"alive", r"C:\canary")
        private_libvirt.kill()
        assert winevm.agent.hash(r"C:\canary") is not None
        private_libvirt.start()
        put_back()
        assert winevm.agent.hash(r"C:\canary") is None

    def test_a_full_disk_of_the_guest_s_is_the_guest_s_own_error(
        self, winevm: MachineTarget, put_back: Callable[[], None]
    ) -> None:
        agent = winevm.agent
        free = agent.free_space("C:\\")
        agent.run([r"Z:\usr\bin\fallocate", "-l", str(free - (1 << 20)), "/var/tmp/fill"])
        deadline = time.monotonic() + 10
        while agent.free_space("C:\\") > 2 << 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(AgentError) as raised:
            agent.put(b"x" * (4 << 20), r"C:\too much")
        assert raised.value.code == Win32Error.ERROR_DISK_FULL
        with pytest.raises(TargetError, match="MiB free, 64 are needed"):
            winevm.machine.check(winevm.guest)
        put_back()
        winevm.machine.check(winevm.guest)

    def test_a_base_disk_that_somebody_changes_is_noticed(self, winevm: MachineTarget) -> None:
        machine = winevm.machine
        assert isinstance(machine, LibvirtMachine)
        assert machine.base is not None
        path = machine.base.path
        status = path.stat()
        winevm.agent.put(b"alive", r"C:\canary")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        try:
            with pytest.raises(TargetError, match="was changed while clones of it were in use"):
                machine.revert(winevm.guest, winevm.log)
        finally:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_test_that_loses_its_guest_fails_and_the_next_has_another(
    project: pytest.Pytester,
    configure: Configure,
    verdicts: Verdicts,
    left_behind: LeftBehind,
    own_cache: Path,
) -> None:
    configure()
    project.makepyfile(
        f"""
        import os, pathlib, signal, sys
        import pytest

        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.vm.daemon import emulators

        def run_name():
            (run,) = pathlib.Path(os.environ["KDRIVER_CACHE"], "runs").glob(f"{{os.getpid()}}-*")
            return run.name.rpartition("-")[2]

        @pytest.mark.kdriver("hello")
        def test_kills_the_agent(kdriver, kdriver_target):
            kdriver.start()
            kdriver_target.run(["taskkill", "/f", "/im", "kdagent.exe"])

        @pytest.mark.kdriver("hello")
        def test_has_an_agent(kdriver):
            kdriver.start()
            assert kdriver.dbgprint.lines == ["Hello, world!"]

        @pytest.mark.kdriver("hello")
        def test_kills_qemu(kdriver):
            kdriver.start()
            (pid,) = emulators(run_name())
            os.kill(pid, signal.SIGKILL)
            kdriver.stop()

        @pytest.mark.kdriver("hello")
        def test_has_a_guest(kdriver):
            kdriver.start()
            assert kdriver.dbgprint.lines == ["Hello, world!"]
        """
    )
    result = project.runpytest_subprocess(
        *("-W", "error", "-v", "--kdriver-vm=winevm", "--kdriver-isolation=none"), timeout=300
    )
    assert verdicts(result) == {
        "test_kills_the_agent[winevm]": "FAILED",
        "test_has_an_agent[winevm]": "PASSED",
        "test_kills_qemu[winevm]": "FAILED",
        "test_has_a_guest[winevm]": "PASSED",
    }
    result.stdout.fnmatch_lines(
        ["*TargetError: *the guest stopped: QEMU ended: it was killed, or it crashed*"]
    )
    assert left_behind() == []


def write(target: MachineTarget, size: int) -> None:
    """Have the guest write to its disk."""
    for number in range(size >> 23):
        target.agent.put(os.urandom(8 << 20), rf"C:\fill{number}")
        target.agent.run([r"Z:\bin\sync"])
        time.sleep(0.5)  # sync ends when it does, and Wine does not tell
    target.agent.processes()


class TestTheHost:
    def start(self, project: pytest.Pytester, *options: str) -> subprocess.Popen[bytes]:
        """Pytest, in its own process group, and with a test that waits for ever once it is there."""
        project.makepyfile(
            """
            import pathlib, time, pytest

            @pytest.mark.kdriver("hello")
            def test_waits(kdriver):
                kdriver.start()
                pathlib.Path("started").touch()
                time.sleep(600)
            """
        )
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                "--kdriver-vm=winevm",
                *options,
            ],
            cwd=project.path,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 600
        while not (project.path / "started").exists():
            assert process.poll() is None, "pytest ended before its test began"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return process

    def test_ctrl_c_leaves_nothing(
        self, project: pytest.Pytester, configure: Configure, left_behind: LeftBehind
    ) -> None:
        configure()
        process = self.start(project)
        assert left_behind() != []
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 2
        assert left_behind() == []

    def test_kill_9_leaves_what_gc_removes(
        self, project: pytest.Pytester, configure: Configure, left_behind: LeftBehind
    ) -> None:
        configure()
        process = self.start(project)
        process.kill()
        process.wait()
        (run,) = [Path(name).name for name in left_behind() if "/runs/" in name]
        assert emulators(run.rpartition("-")[2]) != []
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from pytest_kdriver.cli import main; sys.exit(main(['gc']))",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert run in done.stdout
        assert emulators(run.rpartition("-")[2]) == []
        assert left_behind() == []

    @pytest.fixture
    def small_cache(self, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A cache on a file system of its own, of 1,100 MiB."""
        if os.geteuid() != 0:
            pytest.skip("only root can mount a small file system")
        small = own_cache / "small"
        small.mkdir()
        options = "size=1100M,mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", small], check=True)
        for name in ("programs", "hosts", "disks"):
            (small / name).symlink_to((own_cache / name).resolve())
        monkeypatch.setenv("KDRIVER_CACHE", str(small))
        yield small
        subprocess.run(["umount", small], check=True)
        small.rmdir()

    def test_has_no_room_and_says_so_before(
        self, failing: Callable[..., tuple[str, float]], small_cache: Path, libvirt_uri: str
    ) -> None:
        told, _ = failing(libvirt_uri, image="winevm", memory=2048)
        assert "a clone of the guest takes up to 2048 MiB" in told
        assert "set KDRIVER_CACHE to a folder elsewhere" in told

    def test_has_no_room_any_more_and_says_so(
        self, small_cache: Path, winevm_config: TargetConfig
    ) -> None:
        target = MachineTarget("winevm", LibvirtMachine(winevm_config))
        try:
            target.start()
            free = shutil.disk_usage(small_cache).free
            with (small_cache / "fill").open("wb") as fill:
                os.posix_fallocate(fill.fileno(), 0, free - (2 << 20))
            with pytest.raises((KdriverError, TimeoutError)):
                write(target, 64 << 20)
            assert "no space left on the host's disk" in (target.machine.failure() or "")
        finally:
            target.close()


def test_two_runs_at_once_do_not_meet(
    project: pytest.Pytester, configure: Configure, left_behind: LeftBehind
) -> None:
    configure()
    project.makepyfile(
        """
        import pytest

        @pytest.mark.kdriver("hello")
        def test_says_hello(kdriver):
            with kdriver.running():
                kdriver.dbgprint.expect("Hello, world!")
        """
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--kdriver-vm=winevm"]
    runs = [subprocess.Popen(command, cwd=project.path, stdin=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait(600) for run in runs] == [0, 0]
    assert left_behind() == []
