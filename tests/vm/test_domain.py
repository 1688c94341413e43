"""A guest's life under a real libvirt and QEMU: a sector of code, by TCG."""

from __future__ import annotations

import os
import signal
import stat
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.domain import console_tail
from tests.vm.daemon import PrivateLibvirt, emulators
from tests.vm.tiny_guest import TinyGuest

Make = Callable[..., TinyGuest]


@pytest.fixture
def make(hypervisor: Hypervisor, guest_folder: Path) -> Iterator[Make]:
    guests: list[TinyGuest] = []

    def make(**settings: object) -> TinyGuest:
        folder = guest_folder / str(len(guests))
        folder.mkdir()
        folder.chmod(0o755)
        guests.append(TinyGuest(hypervisor, folder, **settings))  # type: ignore[arg-type]
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


@pytest.fixture
def guest(make: Make) -> TinyGuest:
    guest = make()
    guest.start()
    return guest


def _emulator(guest: TinyGuest) -> int:
    (pid,) = emulators(f"={guest.spec.name},")
    return pid


def test_it_is_defined_runs_and_is_gone(make: Make) -> None:
    guest = make()
    assert guest.domain.state == "shut off"
    assert guest.domain.stopped == "not started"
    guest.start()
    assert guest.domain.state == "running"
    assert guest.domain.stopped is None
    assert guest.ask("x") == ord("x")
    guest.domain.destroy()
    assert guest.domain.state == "shut off"
    assert guest.domain.stopped == "ended"
    guest.domain.undefine()
    assert guest.domain.state == "undefined"


def test_a_load_brings_memory_and_disk_back_and_keeps_the_socket(guest: TinyGuest) -> None:
    guest.ask("c")
    guest.ask("w")
    assert guest.domain.snapshot_save("first") == "qmp"
    for _ in range(3):
        for count in (2, 3):
            assert guest.ask("c") == count
        assert guest.ask("w") == ord("W")
        assert guest.ask("r") == 3
        guest.domain.snapshot_load("first")
        assert guest.ask("k") == 1
        assert guest.ask("r") == 1
    assert guest.domain.stopped is None


def test_a_snapshot_is_not_saved_over(guest: TinyGuest) -> None:
    guest.ask("c")
    guest.domain.snapshot_save("first", method="qmp")
    guest.ask("c")
    with pytest.raises(TargetError, match=r"snapshot-save: .*first"):
        guest.domain.snapshot_save("first", method="qmp")
    guest.domain.snapshot_load("first")
    assert guest.ask("k") == 1


def test_libvirts_own_revert_works_too(guest: TinyGuest) -> None:
    guest.ask("c")
    assert guest.domain.snapshot_save("first", method="libvirt") == "libvirt"
    before = _emulator(guest)
    guest.ask("c")
    guest.domain.snapshot_load("first")
    assert _emulator(guest) != before  # which is why it is slow, and the sockets are others
    guest.connect()
    assert guest.ask("k") == 1
    assert guest.domain.stopped is None


def test_a_snapshot_that_is_not_there_is_told(guest: TinyGuest) -> None:
    with pytest.raises(TargetError, match=r"snapshot-load: .*nowhere"):
        guest.domain.snapshot_load("nowhere")


@pytest.mark.parametrize("tag", ["", "1", "a b", "a'b", "a<b>", "../a"])
def test_a_snapshots_name_is_only_a_name(guest: TinyGuest, tag: str) -> None:
    with pytest.raises(ValueError, match="can't be a snapshot's name"):
        guest.domain.snapshot_save(tag)


def test_a_killed_emulator_is_known_at_once(make: Make) -> None:
    told: list[tuple[str, float]] = []
    guest = make(on_stop=lambda reason: told.append((reason, time.monotonic())))
    guest.start()
    killed = time.monotonic()
    os.kill(_emulator(guest), signal.SIGKILL)
    assert guest.wait_stopped() == "QEMU ended: it was killed, or it crashed"
    assert [reason for reason, _ in told] == [guest.domain.stopped]
    assert told[0][1] - killed < 2
    with pytest.raises(TargetError, match="not running"):
        guest.domain.monitor("query-status")


def test_a_guest_that_shuts_down_is_known_at_once(guest: TinyGuest) -> None:
    guest.send("s")
    assert guest.wait_stopped() == "the guest shut itself down"


def test_a_guest_that_is_paused_is_not_running(guest: TinyGuest) -> None:
    guest.domain.monitor("stop")
    assert guest.wait_stopped() == "paused from outside"
    assert guest.domain.state == "paused"


def test_a_guest_ended_by_someone_else_is_known_at_once(
    guest: TinyGuest, hypervisor: Hypervisor
) -> None:
    hypervisor.connection.lookupByName(guest.spec.name).destroy()
    assert guest.wait_stopped() == "ended from outside (virsh destroy?)"


def test_an_emulator_that_hangs_does_not_hang_us(guest: TinyGuest) -> None:
    os.kill(_emulator(guest), signal.SIGSTOP)
    with pytest.raises(TargetError, match=r"did not return within 0\.5 s"):
        guest.domain.monitor("query-status", timeout=0.5)
    guest.domain.destroy()
    assert guest.domain.state == "shut off"


def test_a_triple_fault_at_boot_is_told_from_a_reboot(make: Make, tmp_path: Path) -> None:
    guest = make(first="t", ports=())
    guest.domain.start()
    assert guest.wait_stopped() == "the guest reset itself 3 times while it booted (triple faults?)"
    guest.domain.screenshot(tmp_path / "screen.png")
    assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_triple_fault_later_is_the_end(guest: TinyGuest) -> None:
    guest.domain.snapshot_save("first")
    guest.send("t")
    assert guest.wait_stopped() == "the guest reset itself (a reboot, or a triple fault)"


def test_a_kernel_that_panics_is_known_at_once_and_can_be_looked_at(
    make: Make, tmp_path: Path
) -> None:
    tells_the_panic_device = bytes.fromhex("ba0505 b001 ee f4").ljust(510, b"\0") + b"\x55\xaa"
    guest = make(boots=tells_the_panic_device, panic="isa")
    guest.domain.start()
    assert guest.wait_stopped() == "its kernel panicked"
    guest.domain.screenshot(tmp_path / "screen.png")


def test_a_kernel_that_panics_may_go_on(make: Make) -> None:
    panics_then_says_x = bytes.fromhex("ba0505 b001 ee baf803 b078 ee f4 ebfd")
    told: list[str] = []
    guest = make(
        boots=panics_then_says_x.ljust(510, b"\0") + b"\x55\xaa", panic="isa", on_stop=told.append
    )

    def before_it_runs() -> None:
        guest.domain.let_panic()
        guest.connect()

    guest.domain.start_held(before_it_runs)
    assert guest.port.recv(1) == b"x"
    deadline = time.monotonic() + 20
    while not told:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert set(told) == {"its kernel panicked"}
    assert guest.domain.stopped is None


def test_it_can_be_told_where_a_guest_is_that_hangs(make: Make) -> None:
    hangs = bytes.fromhex("fa ebfe").ljust(510, b"\0") + b"\x55\xaa"
    guest = make(boots=hangs, cpus=2)
    guest.domain.start()
    deadline = time.monotonic() + 20
    while (places := guest.domain.instruction_pointers())[0] != 0x7C01:
        assert time.monotonic() < deadline, places
        time.sleep(0.02)
    assert len(places) == 2
    guest.domain.interrupt()
    assert guest.domain.stopped is None


def test_what_is_kept_of_it_is_what_libvirt_has(
    guest: TinyGuest, private_libvirt: PrivateLibvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ET.fromstring(guest.domain.xml()).findtext("name") == guest.spec.name
    monkeypatch.setenv("XDG_CACHE_HOME", str(private_libvirt.folder / "k"))
    assert f"guest={guest.spec.name}," in guest.domain.log()


def test_the_console_is_kept(make: Make, guest_folder: Path) -> None:
    guest = make(ports=(), console=guest_folder / "0" / "console")
    guest.hypervisor.hand_over(guest_folder / "0")
    guest.domain.start()
    deadline = time.monotonic() + 20
    while (tail := guest.domain.console_tail(1)) != ["the tiny guest is up"]:
        assert time.monotonic() < deadline, tail
        time.sleep(0.02)


def test_a_console_that_is_hostile_is_only_text(tmp_path: Path) -> None:
    console = tmp_path / "console"
    said = b"\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[0m\r\n\xff\xfe\0\r\n\r\n\xe2\x80\xaegnol\r\n"
    console.write_bytes(b"x" * 10_000_000 + b"\r\n" + said)
    first, *rest = console_tail(console, 4)
    assert first.strip("x") == ""
    assert len(first) < 1000
    assert rest == ["0;title?red", "\ufffd\ufffd?", "?gnol"]
    assert console_tail(tmp_path / "none") == []


def test_the_screen_is_the_guests_own(make: Make, tmp_path: Path) -> None:
    pictures = set()
    for number, code in enumerate((None, b"")):
        guest = make(boots=code)
        guest.domain.start() if code is not None else guest.start()
        picture = tmp_path / f"{number}.png"
        guest.domain.screenshot(picture)
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pictures.add(picture.read_bytes())
    assert len(pictures) == 2


def test_the_sockets_are_nobody_elses(guest: TinyGuest) -> None:
    status = guest.sockets.stat()
    assert stat.S_IMODE(status.st_mode) == 0o700
    assert status.st_uid == guest.hypervisor.owner.uid
    assert (guest.sockets / "com1").is_socket()


def test_it_says_whose_it_is(guest: TinyGuest, hypervisor: Hypervisor) -> None:
    xml = hypervisor.connection.lookupByName(guest.spec.name).XMLDesc()
    run = ET.fromstring(xml).find("metadata/{urn:pytest-kdriver:run}run")
    assert run is not None
    assert run.attrib == {"id": "tests", "owner": str(os.getpid())}


def test_a_daemon_that_is_killed_and_comes_back(
    guest: TinyGuest, private_libvirt: PrivateLibvirt
) -> None:
    guest.domain.snapshot_save("first")
    emulator = _emulator(guest)
    private_libvirt.kill()
    assert guest.ask("c") == 1  # the guest does not notice
    private_libvirt.start()
    guest.domain.snapshot_load("first")
    assert guest.ask("k") == 0
    assert _emulator(guest) == emulator
    assert guest.domain.stopped is None
    os.kill(emulator, signal.SIGKILL)  # events come by the new connection
    assert guest.wait_stopped() == "QEMU ended: it was killed, or it crashed"


def test_a_guest_that_died_while_the_daemon_was_away(
    guest: TinyGuest, private_libvirt: PrivateLibvirt
) -> None:
    private_libvirt.kill()
    os.kill(_emulator(guest), signal.SIGKILL)
    private_libvirt.start()
    assert guest.wait_stopped() == "QEMU ended: it was killed, or it crashed"
