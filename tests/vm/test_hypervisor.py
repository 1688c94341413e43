"""A connection to a real libvirt, of the tests' own; what is refused; and what runs leave there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.libvirt import connection
from pytest_kdriver.targets.libvirt.accelerator import (
    Accelerator,
    find_accelerator,
    forget,
    remember_failure,
    run_trial,
)
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.domain import Domain, end_emulator
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec
from pytest_kdriver.targets.libvirt.enlightenments import (
    WANTED,
    find_enlightenments,
    offered_enlightenments,
    try_enlightenments,
)
from pytest_kdriver.targets.libvirt.leftovers import domain_resource, remove_domain
from pytest_kdriver.targets.runs import collect_garbage, remove_tree
from tests.vm.daemon import PrivateLibvirt, daemon_user, emulators, remove_leftovers
from tests.vm.tiny_guest import TinyGuest, trial_disk

ROOT = Path(__file__).parents[2]


def test_it_says_what_it_is(hypervisor: Hypervisor) -> None:
    assert [int(part) for part in hypervisor.version.split(".")] >= [9, 0, 0]
    assert [int(part) for part in hypervisor.qemu_version.split(".")] >= [7, 0, 0]
    assert hypervisor.emulator.name == "qemu-system-x86_64"
    assert hypervisor.owner.uid == daemon_user().pw_uid != 0


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("qemu+ssh://host/system", "on another machine"),
        ("qemu+tls:///system", "on another machine"),
        ("qemu://host/session", "names the host 'host'"),
        ("qemu://session", "names the host 'session'.*three slashes"),
        ("test:///default", "is none of"),
        ("qemu:///", "is none of"),
        ("qemu:///embed?root=/tmp", "is none of"),
        ("lxc:///", "is none of"),
    ],
)
def test_what_is_not_a_local_qemu_is_refused(uri: str, sentence: str) -> None:
    with pytest.raises(TargetError, match=sentence):
        Hypervisor.open(uri)


def test_roots_session_is_the_systems_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(TargetError, match="as root is the system's own libvirt"):
        Hypervisor.open("qemu:///session")


def test_a_daemon_that_is_not_there_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TargetError, match=r"can't be reached: .*Is the daemon .* running\?"):
        Hypervisor.open(f"qemu:///session?socket={tmp_path / 'nobody'}")
    assert capfd.readouterr().err == ""  # libvirt itself would print its errors


def test_a_closed_connection_is_told(libvirt_uri: str) -> None:
    hypervisor = Hypervisor.open(libvirt_uri)
    hypervisor.close()
    hypervisor.close()
    with pytest.raises(TargetError, match="was closed"):
        _ = hypervisor.connection


def test_a_socket_folder_is_announced_and_the_guests_alone(hypervisor: Hypervisor) -> None:
    announced: list[tuple[Path, bool]] = []
    folder = hypervisor.make_socket_folder(lambda path: announced.append((path, path.exists())))
    try:
        assert announced == [(folder, False)]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == hypervisor.owner.uid
        assert len(bytes(folder / ("n" * 31))) < 107
    finally:
        remove_tree(folder)


def test_a_folder_that_guests_cannot_enter_is_told(
    hypervisor: Hypervisor, guest_folder: Path
) -> None:
    closed = guest_folder / "closed"
    closed.mkdir(mode=0o700)
    disk = closed / "disk"
    disk.write_bytes(b"")
    disk.chmod(0)
    if os.geteuid() == 0:
        with pytest.raises(TargetError, match="can't read .*KDRIVER_CACHE"):
            hypervisor.hand_over(disk)
    with pytest.raises(TargetError, match="can't read .*KDRIVER_CACHE"):
        hypervisor.require_access(disk)


def test_the_daemon_leaves_nothing() -> None:
    daemon = PrivateLibvirt()
    try:
        daemon.start()
        assert daemon.processes()
    finally:
        daemon.stop()
    assert not daemon.folder.exists()
    assert not daemon.processes()


def test_a_killed_test_runs_daemon_is_ended_by_the_next(tmp_path: Path) -> None:
    program = (
        "import signal, sys; from tests.vm.daemon import PrivateLibvirt\n"
        "daemon = PrivateLibvirt(); daemon.start(); print(daemon.folder, flush=True); signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as run:
        try:
            assert run.stdout is not None
            folder = Path(run.stdout.readline().strip())
            remove_leftovers()
            assert (folder / "r/libvirt/libvirt-sock").is_socket()  # it lives, and is left alone
        finally:
            run.kill()
    remove_leftovers()
    assert not folder.exists()


def test_a_trial_passes_where_the_processor_is_sound(hypervisor: Hypervisor) -> None:
    assert run_trial(hypervisor.emulator, "tcg", hypervisor.owner, timeout=30).passed


def test_what_is_found_is_remembered_until_it_is_forgotten(
    hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path))
    emulator, owner = hypervisor.emulator, hypervisor.owner
    found = find_accelerator(emulator, owner)
    assert find_accelerator(emulator, owner) == found
    if found.kind == "tcg":
        assert found.reason.startswith(("KVM can't be had: ", "KVM is there, but "))
    failed = remember_failure(emulator, "paused by an internal error of the accelerator", owner)
    assert failed == Accelerator(
        "tcg", "KVM failed a guest on this host: paused by an internal error of the accelerator"
    )
    assert find_accelerator(emulator, owner) == failed
    forget(emulator, owner)
    assert find_accelerator(emulator, owner) == found


def test_a_guest_that_kvm_fails_is_known_at_once(
    hypervisor: Hypervisor, guest_folder: Path
) -> None:
    found = find_accelerator(hypervisor.emulator, hypervisor.owner)
    if not found.reason.startswith("KVM is there, but fails at"):
        pytest.skip("needs a host whose KVM starts guests and then fails them")
    told: list[str] = []
    guest = TinyGuest(
        hypervisor,
        guest_folder,
        accelerator="kvm",
        boots=trial_disk(),
        ports=(),
        on_stop=told.append,
    )
    try:
        guest.domain.start()
        assert guest.wait_stopped() == "paused by an internal error of the accelerator"
        assert told == [guest.domain.stopped]
    finally:
        guest.close()


def test_by_tcg_there_are_no_enlightenments(hypervisor: Hypervisor) -> None:
    found = find_enlightenments(hypervisor, "tcg")
    assert (found.features, found.dropped) == ((), ())


def test_an_enlightenment_is_kept_or_dropped_with_a_reason(hypervisor: Hypervisor) -> None:
    try:
        offered = offered_enlightenments(hypervisor)
    except TargetError as e:
        pytest.skip(f"needs KVM: {e}")
    before = _domains(hypervisor)
    found = find_enlightenments(hypervisor, "kvm")
    dropped = [name for name, _ in found.dropped]
    assert sorted((*found.features, *dropped)) == sorted(WANTED)
    assert set(found.features) <= offered
    assert all(reason for _, reason in found.dropped)
    assert _domains(hypervisor) == before


def test_an_enlightenment_falls_with_the_one_it_needs(hypervisor: Hypervisor) -> None:
    try:
        offered_enlightenments(hypervisor)
    except TargetError as e:
        pytest.skip(f"needs KVM: {e}")
    found = try_enlightenments(hypervisor, ["vpindex", "synic"])
    if "vpindex" in found.features:
        pytest.skip("this host's KVM has vpindex: nothing falls")
    assert "VP_INDEX" in dict(found.dropped)["vpindex"]
    assert dict(found.dropped)["synic"] == "needs vpindex"


def test_a_killed_runs_guest_is_removed_by_the_next(
    hypervisor: Hypervisor, own_cache: Path, guest_folder: Path, libvirt_uri: str
) -> None:
    program = f"""
import signal
from pathlib import Path
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.leftovers import domain_resource
from pytest_kdriver.targets.runs import Run
from tests.vm.tiny_guest import TinyGuest, trial_disk
run = Run()
run.record("libvirt-domain", domain_resource({libvirt_uri!r}, "kdriver-abandoned"))
guest = TinyGuest(Hypervisor.open({libvirt_uri!r}), Path({str(guest_folder)!r}), name="kdriver-abandoned")
run.record("socket-folder", guest.sockets)
guest.start()
guest.domain.snapshot_save("first")
print(guest.sockets, flush=True)
signal.pause()
"""
    removers = {"libvirt-domain": remove_domain, "socket-folder": remove_tree}
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as run:
        try:
            assert run.stdout is not None
            sockets = Path(run.stdout.readline().strip())
            assert (sockets / "com1").is_socket()
            assert collect_garbage(removers) == []  # its owner lives
        finally:
            run.kill()
    assert "kdriver-abandoned" in _domains(hypervisor)
    assert len(collect_garbage(removers)) == 1
    assert not sockets.exists()
    assert "kdriver-abandoned" not in _domains(hypervisor)
    remove_domain(domain_resource(libvirt_uri, "kdriver-abandoned"))  # gone already: no complaint


def test_a_guest_whose_libvirt_is_gone_is_ended(guest_folder: Path) -> None:
    daemon = PrivateLibvirt()
    try:
        daemon.start()
        hypervisor = Hypervisor.open(daemon.uri)
        guest = TinyGuest(hypervisor, guest_folder, name=f"kdriver-orphan-{uuid.uuid4().hex[:8]}")
        guest.start()
        hypervisor.close()
        daemon.kill()
        daemon.socket.unlink()
        assert emulators(f"={guest.spec.name},")
        remove_domain(domain_resource(daemon.uri, guest.spec.name))
        assert not emulators(f"={guest.spec.name},")
        guest.disconnect()
        remove_tree(guest.sockets)
    finally:
        daemon.stop()


def test_a_libvirt_that_stays_away_is_told_and_its_guest_ended(
    guest_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_REOPEN_TIMEOUT", 0.5)
    daemon = PrivateLibvirt()
    try:
        daemon.start()
        hypervisor = Hypervisor.open(daemon.uri)
        guest = TinyGuest(hypervisor, guest_folder, name=f"kdriver-forsaken-{uuid.uuid4().hex[:8]}")
        guest.start()
        daemon.kill()
        assert guest.wait_stopped() == "libvirt's daemon is gone"
        with pytest.raises(TargetError, match=r"is gone, and did not come back"):
            guest.domain.monitor("query-status")
        assert emulators(f"={guest.spec.name},")
        guest.domain.destroy()
        assert not emulators(f"={guest.spec.name},")
        guest.disconnect()
        remove_tree(guest.sockets)
        hypervisor.close()
    finally:
        daemon.stop()


def test_only_the_emulator_of_that_name_is_ended() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)", "guest=kdriver-other,x"]
    with subprocess.Popen(command) as bystander:
        end_emulator("kdriver-other")
        assert bystander.poll() is None
        bystander.kill()


def test_a_refused_domain_is_told(hypervisor: Hypervisor, guest_folder: Path) -> None:
    spec = DomainSpec(
        name="kdriver-refused",
        run="tests",
        owner_pid=os.getpid(),
        accelerator="tcg",
        emulator=Path("/nonexistent/qemu"),
        disk=guest_folder / "none.qcow2",
    )
    with pytest.raises(TargetError, match="libvirt refuses the domain: .*nonexistent"):
        Domain(hypervisor, spec).define()


def _domains(hypervisor: Hypervisor) -> set[str]:
    return {domain.name() for domain in hypervisor.connection.listAllDomains()}
