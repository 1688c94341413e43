"""``kdriver vm``, ``kdriver doctor --vm`` and ``kdriver gc``, as a person types them."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_kdriver.cli import main
from pytest_kdriver.targets.disk_images import DiskImage
from pytest_kdriver.targets.libvirt import kept
from pytest_kdriver.targets.libvirt.address import SerialAddress
from pytest_kdriver.targets.libvirt.domain import end_emulator
from pytest_kdriver.targets.runs import Run

KDRIVER = str(Path(sys.executable).with_name("kdriver"))

Kdriver = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, libvirt_uri: str, winevm_image: DiskImage
) -> Path:
    """A user's folder, whose winevm is under the tests' libvirt."""
    home = tmp_path_factory.mktemp("home")
    (home / "kdriver.toml").write_text(f'[targets.winevm]\nuri = "{libvirt_uri}"\n')
    return home


@pytest.fixture(scope="module")
def environment(vm_cache: Path) -> dict[str, str]:
    return {**os.environ, "KDRIVER_CACHE": str(vm_cache)}


@pytest.fixture(scope="module")
def kdriver(home: Path, environment: dict[str, str]) -> Kdriver:
    """Call the command in that folder."""

    def kdriver(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [KDRIVER, *arguments],
            cwd=home,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert "Traceback" not in done.stderr
        return done

    return kdriver


@pytest.fixture(scope="module")
def doctor(home: Path, environment: dict[str, str]) -> Iterator[Callable[[], tuple[int, str]]]:
    """``kdriver doctor --vm winevm``, which goes on while the first tests do: what it came to."""
    process = subprocess.Popen(
        [KDRIVER, "doctor", "--vm", "winevm", "--self-test"],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:

            def ended() -> tuple[int, str]:
                told, _ = process.communicate(timeout=600)
                return process.returncode, told

            yield ended
        finally:
            process.kill()


@pytest.fixture(scope="module")
def started(doctor: object, kdriver: Kdriver) -> Iterator[subprocess.CompletedProcess[str]]:
    """One machine for all of these tests, as ``kdriver vm start`` leaves it."""
    done = kdriver("vm", "start", "winevm")
    try:
        yield done
    finally:
        for line in kdriver("vm", "status").stdout.splitlines():
            kdriver("vm", "stop", line.split()[0])


@pytest.fixture(scope="module")
def machine(started: subprocess.CompletedProcess[str]) -> str:
    """Its name."""
    return started.stdout.split()[0]


@contextmanager
def kept_machine(cache: Path, uri: str, *, name: str = "kdriver-winevm-1") -> Iterator[Path]:
    """What is written down of a machine that was kept, and of which nothing is left."""
    (cache / "runs").mkdir(exist_ok=True)
    run = Run()
    kept.KeptVm(
        folder=run.path,
        target="winevm",
        domain=name,
        uri=uri,
        console="/absent/console",
        address=SerialAddress(path="/absent/agent"),
    ).write()
    run.record("libvirt-domain", Path(f"{uri}#{name}"))
    run.keep()
    yield run.path


class TestStart:
    def test_tells_how_to_reach_it(
        self, started: subprocess.CompletedProcess[str], machine: str
    ) -> None:
        assert started.returncode == 0
        assert re.fullmatch(r"kdriver-winevm-[0-9a-f]{8}-1", machine)
        for command in ("shell", "screenshot", "stop"):
            assert f"kdriver vm {command} {machine}" in started.stdout
        assert "winevm under libvirt" in started.stderr

    def test_tells_of_another_and_ctrl_c_leaves_nothing_of_this_one(  # noqa: PLR0917 -- fixtures
        self,
        machine: str,
        libvirt_uri: str,
        tmp_path: Path,
        environment: dict[str, str],
        doctor: Callable[[], tuple[int, str]],
        there: Callable[[], set[str]],
    ) -> None:
        doctor()  # whose machine is gone by then
        settings = f'[targets.winevm]\nuri = "{libvirt_uri}"\nwarm_start = false\n'
        (tmp_path / "kdriver.toml").write_text(settings)  # one that takes its time
        before = there()
        process = subprocess.Popen(
            [KDRIVER, "vm", "start", "winevm"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            deadline = time.monotonic() + 60
            while not any(name.startswith("kdriver-winevm-") for name in there() - before):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        assert process.returncode == 130
        assert f"{machine} goes on; this starts another one" in told
        assert "Traceback" not in told
        assert there() == before

    def test_of_what_is_no_machine_says_so(self, kdriver: Kdriver) -> None:
        done = kdriver("vm", "start", "wine")
        assert done.returncode == 2
        assert "target 'wine' is no virtual machine" in done.stderr

    def test_of_an_unknown_name_says_which_there_are(self, kdriver: Kdriver) -> None:
        done = kdriver("vm", "start", "winvm")
        assert done.returncode == 2
        assert "no target 'winvm' (did you mean 'winevm'?); there are: " in done.stderr


class TestRun:
    def test_shows_what_the_program_wrote_and_ends_as_it_did(
        self, kdriver: Kdriver, machine: str
    ) -> None:
        done = kdriver("vm", "run", "winevm", "--", "cmd", "/c", "echo out& echo err>&2& exit 7")
        assert (done.stdout.strip(), done.stderr.strip(), done.returncode) == ("out", "err", 7)

    def test_of_a_large_exit_code_does_not_end_well(self, kdriver: Kdriver, machine: str) -> None:
        assert kdriver("vm", "run", machine, "cmd", "/c", "exit 256").returncode == 255

    def test_of_a_unix_program_says_that_nothing_more_is_known(
        self, kdriver: Kdriver, machine: str
    ) -> None:
        done = kdriver("vm", "run", machine, r"Z:\bin\true")
        assert done.returncode == 1
        assert "of a Unix program Wine tells no end, and no exit code" in done.stderr

    def test_of_a_program_that_there_is_not_says_so(self, kdriver: Kdriver, machine: str) -> None:
        done = kdriver("vm", "run", machine, "absent.exe")
        assert done.returncode == 1
        assert "can't start the program ('absent.exe'): ERROR_FILE_NOT_FOUND" in done.stderr


class TestShell:
    def test_takes_lines_from_a_pipe(self, kdriver: Kdriver, machine: str) -> None:
        done = kdriver("vm", "shell", machine, stdin="echo one\n\nabsent.exe\necho two& exit 3\n")
        assert [line.strip() for line in done.stdout.splitlines()] == ["one", "two"]
        assert "absent.exe" in done.stderr
        assert done.returncode == 3

    def test_ends_at_exit(self, kdriver: Kdriver, machine: str) -> None:
        done = kdriver("vm", "shell", machine, stdin="exit\necho more\n")
        assert (done.stdout, done.returncode) == ("", 0)

    def test_asks_for_each_line_at_a_terminal(
        self, machine: str, home: Path, environment: dict[str, str]
    ) -> None:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [KDRIVER, "vm", "shell", machine],
            cwd=home,
            env={**environment, "TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)

        seen = b""

        def read_until(*words: bytes) -> None:
            """Each behind the one before."""
            nonlocal seen
            while not re.search(b".*".join(map(re.escape, words)), seen, re.DOTALL):
                ready, _, _ = select.select([ours], [], [], 30)
                assert ready, f"nothing more came behind {seen!r}"
                seen += os.read(ours, 1000)

        try:
            read_until(b"winevm> ")
            os.write(ours, b"echo a^&b\n")
            read_until(b"winevm> ", b"a&b", b"winevm> ")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()
            process.wait()
        os.close(ours)


class TestOthers:
    def test_status_lists_it(self, kdriver: Kdriver, machine: str, libvirt_uri: str) -> None:
        (line,) = kdriver("vm", "status").stdout.splitlines()
        assert line.split() == [machine, "target", "winevm", libvirt_uri, "running"]

    def test_screenshot_writes_a_picture_that_is_named_after_it(
        self, kdriver: Kdriver, machine: str, home: Path
    ) -> None:
        done = kdriver("vm", "screenshot", "winevm")
        assert done.stdout == f"{machine}.png\n"
        assert (home / f"{machine}.png").read_bytes().startswith(b"\x89PNG")

    def test_gc_leaves_it_alone(self, kdriver: Kdriver, machine: str) -> None:
        done = kdriver("gc")
        assert machine.split("-")[-2] not in done.stdout
        assert kdriver("vm", "run", machine, "cmd", "/c", "echo alive").stdout.strip() == "alive"

    def test_who_comes_while_somebody_is_there_is_told(
        self,
        machine: str,
        own_cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(kept, "CONNECT_TIMEOUT", 5.0)
        somebody = kept.find_kept(machine).connect()
        monkeypatch.setattr(kept, "CONNECT_TIMEOUT", 0.5)
        try:
            assert main(["vm", "run", machine, "cmd"]) == 1
        finally:
            somebody.close()
        told = capsys.readouterr().err
        assert "another program is connected to this socket" in told
        assert f"{machine} is running" in told

    def test_doctor_finds_nothing_missing(self, doctor: Callable[[], tuple[int, str]]) -> None:
        code, told = doctor()
        assert code == 0, told
        assert "ok       target winevm: winevm under libvirt" in told
        assert told.endswith("nothing is missing\n")

    def test_doctor_tries_there_what_is_said_of_windows(
        self, doctor: Callable[[], tuple[int, str]]
    ) -> None:
        _, told = doctor()
        assert "DriverEntry's status is exact\n    it came back as 0xC0DE1234\n" in told
        assert "\ndoes not hold" not in told

    def test_one_that_died_is_told_and_can_be_removed(
        self, kdriver: Kdriver, machine: str, there: Callable[[], set[str]]
    ) -> None:
        end_emulator(machine)
        deadline = time.monotonic() + 30
        while not kdriver("vm", "status").stdout.endswith("shut off\n"):
            assert time.monotonic() < deadline
        remedy = f"{machine} is shut off: kdriver vm stop {machine} removes it"
        for action in (("run", machine, "cmd"), ("shell", machine), ("screenshot", machine)):
            done = kdriver("vm", *action)
            assert done.returncode == 1
            assert remedy in done.stderr
        before = there()
        done = kdriver("vm", "stop", machine)
        assert (done.returncode, done.stderr) == (0, f"kdriver: {machine} is gone\n")
        gone = before - there()
        assert machine in gone
        assert len(gone) == 3  # and its run's folder, and that of its sockets


class TestWithoutAMachine:
    """No guest is needed for these."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_status_says_how_to_get_one(
        self, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["vm", "status"]) == 0
        assert "there is none; kdriver vm start NAME starts one" in capsys.readouterr().err

    @pytest.mark.parametrize("action", ["shell", "stop", "screenshot"])
    def test_an_unknown_name_is_told(
        self, cache: Path, capsys: pytest.CaptureFixture[str], action: str
    ) -> None:
        assert main(["vm", action, "winevm"]) == 1
        told = capsys.readouterr().err
        assert "no machine 'winevm' was started or kept; there is none" in told

    def test_a_name_of_several_is_told_with_them(
        self, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        uri = "qemu:///session?socket=/absent"
        with kept_machine(cache, uri, name="a"), kept_machine(cache, uri, name="b"):
            assert main(["vm", "stop", "winevm"]) == 1
        assert "more than one machine of the target 'winevm': " in capsys.readouterr().err
        assert main(["vm", "stop", "b"]) == 0
        assert main(["vm", "stop", "winevm"]) == 0

    def test_status_without_its_libvirt_says_that_it_is_gone(
        self, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with kept_machine(cache, "qemu:///session?socket=/absent") as folder:
            assert main(["vm", "status"]) == 0
            assert "kdriver-winevm-1  target winevm" in (told := capsys.readouterr().out)
            assert "can't be reached" in told
            assert main(["vm", "screenshot", "winevm"]) == 1
            assert "Is the daemon that owns this socket running?" in capsys.readouterr().err
            assert main(["vm", "stop", "winevm"]) == 0
            assert not folder.exists()

    def test_doctor_says_what_mends_a_libvirt_that_is_not_there(
        self, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (cache / "kdriver.toml").write_text(
            '[targets.winevm]\nuri = "qemu:///session?socket=/absent"\n'
        )
        assert main(["doctor", "--vm", "winevm"]) == 1
        told = capsys.readouterr().out
        assert (
            "missing  libvirt: libvirt at qemu:///session?socket=/absent can't be reached" in told
        )
        assert "Is the daemon that owns this socket running?" in told
        assert told.endswith("libvirt, target winevm: missing, see above\n")
