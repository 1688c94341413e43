"""An existing machine as a target: how its agent gets there, and what its Windows refuses, in words.

What Windows says here, it says by a fake: not verified on Windows.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import paramiko
import pytest

from pytest_kdriver.config import TargetConfig, password_variable
from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import ConfigError, LinkError, StopFailed, TargetError
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.links.link import Link
from pytest_kdriver.guest.links.ssh import SshServerDown, place_file
from pytest_kdriver.guest.registry import encode_value
from pytest_kdriver.guest.wire import Message
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.remote_config import RemoteConfig
from pytest_kdriver.targets import machine_target, nt_loader
from pytest_kdriver.targets import remote as remote_module
from pytest_kdriver.targets.machine_target import START_ATTEMPTS, MachineTarget
from pytest_kdriver.targets.remote import (
    NotUpError,
    RemoteMachine,
    agent_path,
    sftp_path,
)
from pytest_kdriver.targets.windows import exact_status
from pytest_kdriver.win32error import Win32Error
from tests.pe_builder import build
from tests.signature_builder import with_signature
from tests.unit.far_ends import PATIENCE, Sshd, until
from tests.unit.test_agent import HELLO, FakeGuest

CONTENT = b"an agent" * 10_000


class TestPaths:
    @pytest.mark.parametrize(
        ("path", "sftp"),
        [
            (r"C:\kdriver\kdagent.exe", "/C:/kdriver/kdagent.exe"),
            ("/srv/kdagent.exe", "/srv/kdagent.exe"),
        ],
    )
    def test_are_as_sftp_has_them(self, path: str, sftp: str) -> None:
        assert sftp_path(path) == sftp

    def test_of_an_agent_have_its_content_s_hash(self) -> None:
        assert (
            agent_path(r"C:\kdriver\kdagent.exe", b"") == r"C:\kdriver\kdagent-e3b0c44298fc1c14.exe"
        )
        assert password_variable("lab-1") == "KDRIVER_PASSWORD_LAB_1"


class TestPlacingAFile:
    def test_where_no_server_is_up_is_told_from_a_refusal(self, sshd: Sshd) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            with pytest.raises(SshServerDown, match="did not take the connection"):
                place_file(sshd.config(port=port), CONTENT, "/file", timeout=PATIENCE)
        key = sshd.new_key("unknown")
        with pytest.raises(LinkError, match="did not let the user") as refused:
            place_file(sshd.config(key=key), CONTENT, "/file", timeout=PATIENCE)
        assert not isinstance(refused.value, SshServerDown)

    def test_makes_its_folders_and_copies_once(self, sshd: Sshd, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "file"
        assert place_file(sshd.config(), CONTENT, str(path), timeout=PATIENCE)
        assert path.read_bytes() == CONTENT
        assert not place_file(sshd.config(), CONTENT, str(path), timeout=PATIENCE)
        assert list(path.parent.iterdir()) == [path]

    def test_over_another_content_replaces_it(self, sshd: Sshd, tmp_path: Path) -> None:
        path = tmp_path / "file"
        for other in (CONTENT + b"more", CONTENT[:-1], b""):
            path.write_bytes(other)
            assert place_file(sshd.config(), CONTENT, str(path), timeout=PATIENCE)
            assert path.read_bytes() == CONTENT

    def test_that_can_t_be_replaced_is_told_and_leaves_nothing(
        self, sshd: Sshd, tmp_path: Path
    ) -> None:
        path = tmp_path / "file"
        path.mkdir()
        with pytest.raises(LinkError, match=r"on 127.0.0.1:\d+, .*file can't be read|renamed"):
            place_file(sshd.config(), CONTENT, str(path), timeout=PATIENCE)
        assert list(tmp_path.iterdir()) == [path]

    def test_where_no_folder_can_be_made_is_told(self, sshd: Sshd, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(LinkError, match=r"on 127.0.0.1:\d+, .*file/below.* can't be "):
            place_file(sshd.config(), CONTENT, str(tmp_path / "file/below/it"), timeout=PATIENCE)

    def test_with_a_server_without_sftp_is_told_with_what_mends_it(self, tmp_path: Path) -> None:
        server = Sshd(tmp_path / "sshd", sftp=False)
        try:
            with pytest.raises(
                LinkError, match=r"has no SFTP \(.*\): give its sshd_config the line"
            ):
                place_file(server.config(), CONTENT, str(tmp_path / "file"), timeout=PATIENCE)
        finally:
            server.close()

    @pytest.mark.parametrize(
        ("fault", "told"),
        [
            ("write", r"/file\S* can't be written \(is its disk full\?\): Failure"),
            (
                "rename",
                r"/file\S*\.new can't be renamed to /file \(if that is there, does it run\?",
            ),
        ],
    )
    def test_on_a_disk_that_refuses_is_told(
        self, sshd: Sshd, tmp_path: Path, fault: str, told: str
    ) -> None:
        """A full disk: SFTP's version 3, which OpenSSH speaks, has no code for it but its Failure."""
        with faulty_server(sshd, fault) as port:
            config = sshd.config(port=port, host_key_alias=f"[127.0.0.1]:{sshd.port}")
            with pytest.raises(LinkError, match=told):
                place_file(config, CONTENT, "/file", timeout=PATIENCE)

    def test_whose_connection_hangs_is_a_timeout(self, sshd: Sshd) -> None:
        with faulty_server(sshd, "hang") as port:
            config = sshd.config(port=port, host_key_alias=f"[127.0.0.1]:{sshd.port}")
            with pytest.raises(TimeoutError, match="did not take the file /file within 2 s"):
                place_file(config, CONTENT, "/file", timeout=2)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = Sshd(tmp_path_factory.mktemp("ssh") / "sshd")
    yield server
    server.close()


class Anybody(paramiko.ServerInterface):  # type: ignore[misc]  # its types are not known
    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return int(paramiko.AUTH_SUCCESSFUL)

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return int(paramiko.OPEN_SUCCEEDED)


class faulty_server:
    """An SSH server whose disk is at fault; ``with`` gives its port."""

    def __init__(self, sshd: Sshd, fault: str) -> None:
        self._key = sshd.host_key
        self._fault = fault
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> int:
        self._thread.start()
        return int(self._listener.getsockname()[1])

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        transport = paramiko.Transport(connection)
        transport.add_server_key(paramiko.PKey.from_path(self._key))
        transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _disk(self._fault, self._over))
        with suppress(paramiko.SSHException, EOFError):
            transport.start_server(server=Anybody())
        self._over.wait(PATIENCE)
        transport.close()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE)
        self._listener.close()


def _disk(fault: str, over: threading.Event) -> type:
    class Handle(paramiko.SFTPHandle):  # type: ignore[misc]
        def write(self, offset: int, data: bytes) -> int:
            if fault == "hang":
                over.wait(PATIENCE)
            return int(paramiko.SFTP_FAILURE if fault == "write" else paramiko.SFTP_OK)

    class Disk(paramiko.SFTPServerInterface):  # type: ignore[misc]
        def open(self, path: str, flags: int, attr: object) -> object:
            return Handle() if path.endswith(".new") else paramiko.SFTP_NO_SUCH_FILE

        def stat(self, path: str) -> object:
            return paramiko.SFTPAttributes() if path == "" else paramiko.SFTP_NO_SUCH_FILE

        def posix_rename(self, oldpath: str, newpath: str) -> int:
            return int(paramiko.SFTP_FAILURE)

        def remove(self, path: str) -> int:
            return int(paramiko.SFTP_OK)

    return Disk


class FakeWay:
    """A machine whose agent is a fake; ``guests`` come one after the other."""

    def __init__(self, *guests: FakeGuest | Exception) -> None:
        self.guests = list(guests)

    def describe(self) -> str:
        return "lab by a fake"

    def place_agent(self, content: bytes, path: str, timeout: float) -> None:
        pass

    def open(self, path: str, timeout: float) -> Link:
        guest = self.guests.pop(0) if len(self.guests) > 1 else self.guests[0]
        if isinstance(guest, Exception):
            raise guest
        return guest


CONTROL = r"SYSTEM\CurrentControlSet\Control"


class Windows(FakeGuest):
    """Its services and files, as far as these tests look at them. ``refuses`` has answers for requests.

    ``information`` is what NtQuerySystemInformation gives for a class, and ``values`` what the registry has:
    those that are asserted at a start, as a Windows for tests has them.
    """

    def __init__(self, refuses: dict[type[Message], Message] | None = None) -> None:
        self.services: dict[str, str] = {}
        self.states: dict[str, int] = {}
        self.files: dict[str, bytes] = {}
        self.others: tuple[messages.Process, ...] = ()
        self.pends = False
        self.information = {
            103: bytes.fromhex("08000000 03000000"),  # signatures are checked, test signing is on
            145: bytes.fromhex("00 01"),  # there is Secure Boot, and it is off
            35: bytes.fromhex("00 01"),  # no debugger
        }
        self.values: dict[tuple[str, str], int | str | bytes] = {
            (f"{CONTROL}\\Session Manager\\Debug Print Filter", "DEFAULT"): 0xFFFFFFFF,
            (f"{CONTROL}\\CrashControl", "CrashDumpEnabled"): 3,
            (f"{CONTROL}\\CrashControl", "AutoReboot"): 1,
        }
        self.proof: int = 0xC0DE1234
        self.clock_off = 0.0
        self.free = 20 << 30
        super().__init__(
            {
                messages.Processes: lambda _: messages.ProcessList(processes=self.others),
                messages.Hash: self._hash,
                messages.PutBegin: self._begin,
                messages.CreateService: self._create,
                messages.DeleteService: self._forget,
                messages.QueryService: self._query,
                messages.GetValue: self._value,
                messages.SystemInformation: self._inform,
                messages.Clock: lambda _: messages.FileTime(
                    time=round((time.time() + self.clock_off + 11_644_473_600) * 10_000_000)
                ),
                messages.FreeSpace: lambda _: messages.Room(bytes=self.free),
                messages.LoadDriver: self._load,
                messages.UnloadDriver: self._unload,
                messages.StopService: self._stop,
                messages.Delete: self._delete,
                messages.Run: messages.Completed(
                    exit_code=0, timed_out=False, stdout=b"", stderr=b"", truncated=False
                ),
                **(refuses or {}),
            }
        )

    def _hash(self, request: Message) -> Message:
        assert isinstance(request, messages.Hash)
        there = request.path in self.files
        return messages.OptionalHash(sha256=b"\0" * 32 if there else None)

    def _begin(self, request: Message) -> Message:
        assert isinstance(request, messages.PutBegin)
        self.files[request.path] = b""
        return messages.Upload(upload=1)

    def _create(self, request: Message) -> Message:
        assert isinstance(request, messages.CreateService)
        if request.name in self.services:
            return refusal(Win32Error.ERROR_SERVICE_EXISTS, "create the service")
        self.services[request.name] = request.image_path
        return messages.Done()

    def _forget(self, request: Message) -> Message:
        assert isinstance(request, messages.DeleteService)
        self.services.pop(request.name)
        return messages.Done()

    def _query(self, request: Message) -> Message:
        assert isinstance(request, messages.QueryService)
        if request.name not in self.services:
            return messages.OptionalServiceStatus(status=None)
        state = self.states.get(request.name, 1)
        return messages.OptionalServiceStatus(
            status=messages.ServiceStatus(
                state=state, win32_exit_code=0, service_exit_code=0, pid=0
            )
        )

    def _inform(self, request: Message) -> Message:
        assert isinstance(request, messages.SystemInformation)
        if (data := self.information.get(request.information_class)) is None:
            code = NTSTATUS.STATUS_INVALID_INFO_CLASS
            return messages.Error(domain=2, code=code, message="query the information")
        return messages.Information(data=data)

    def _value(self, request: Message) -> Message:
        assert isinstance(request, messages.GetValue)
        held = self.values.get((request.key, request.name))
        service = request.key.rpartition("\\")[2]
        if request.name == "ImagePath" and service in self.services:
            held = f"\\??\\{self.services[service]}"
        if held is None:
            return messages.OptionalValue(value=None)
        kind, data = encode_value(held)
        return messages.OptionalValue(value=messages.Value(kind=kind, data=data))

    def _load(self, request: Message) -> Message:
        assert isinstance(request, messages.LoadDriver)
        if request.name == exact_status.SERVICE:
            return messages.Code(code=self.proof)
        if self.states.get(request.name, 1) != 1:
            return messages.Code(code=NTSTATUS.STATUS_IMAGE_ALREADY_LOADED)
        self.states[request.name] = 4
        return messages.Code(code=0)

    def _unload(self, request: Message) -> Message:
        assert isinstance(request, messages.UnloadDriver)
        self.states[request.name] = 3 if self.pends else 1
        return messages.Code(code=0)

    def _stop(self, request: Message) -> Message:
        assert isinstance(request, messages.StopService)
        if self.states.get(request.name) == 3:
            return messages.Code(code=Win32Error.ERROR_SERVICE_CANNOT_ACCEPT_CTRL)
        self.states[request.name] = 1
        return messages.Code(code=0)

    def _delete(self, request: Message) -> Message:
        assert isinstance(request, messages.Delete)
        self.files.pop(request.path)
        return messages.Done()


def refusal(code: Win32Error, message: str) -> messages.Error:
    return messages.Error(domain=1, code=code, message=message)


@pytest.fixture
def target(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., MachineTarget]:
    """A target on the machine that is handed in. ``timeout`` is its config's."""
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_module, "AGENT", FakeProgram(tmp_path / "kdagent.exe"))
    monkeypatch.setattr(nt_loader, "UNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(machine_target, "assert_exact_status", lambda target, folder: [])

    def make(*guests: FakeGuest | Exception, timeout: float = 5.0) -> MachineTarget:
        remote = RemoteConfig(host="lab", user="tester", timeout=timeout)
        config = TargetConfig(name="lab", kind="remote", remote=remote)
        made = MachineTarget("lab", RemoteMachine(config, way=FakeWay(*guests)))
        request.addfinalizer(made.close)
        made.start()
        return made

    return make


class FakeProgram:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(CONTENT)

    def executable(self) -> Path:
        return self._path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "hello.sys"
    path.write_bytes(with_signature(build(imports={"ntoskrnl.exe": ["DbgPrint"]}, pointers=1)))
    return path


def driver(target: MachineTarget, image: Path) -> Driver:
    return Driver(target, image, name="hello", leaks="allow", timeout=5)


Make = Callable[..., MachineTarget]


class TestATarget:
    def test_can_run_programs_and_is_described_by_what_it_runs(self, target: Make) -> None:
        made = target(Windows())
        assert made.capabilities == {"programs"}
        assert made.describe() == "Windows 10.0.19045 on lab by a fake"

    def test_whose_user_is_no_administrator_does_not_start(self, target: Make) -> None:
        hello = replace(HELLO, elevated=False)
        with pytest.raises(TargetError, match="the user tester is no administrator there"):
            target(*(Windows({messages.Hello: hello}) for _ in range(START_ATTEMPTS)))

    def test_that_another_run_has_tells_which_agent_that_is(self, target: Make) -> None:
        windows = Windows()
        windows.others = (
            messages.Process(pid=77, parent=1, name="kdagent-0123456789abcdef.exe"),
            messages.Process(pid=78, parent=1, name="kdagent.exe"),
        )
        with pytest.raises(
            TargetError, match="kdagent-0123456789abcdef.exe runs there, as process 77"
        ):
            target(windows, timeout=0.1)

    def test_ends_the_agent_of_its_own_lost_connection(self, target: Make) -> None:
        first, second = Windows(), Windows({messages.Hello: replace(HELLO, pid=5)})
        made = target(first, second)
        second.others = (messages.Process(pid=4, parent=1, name="kdagent-0123456789abcdef.exe"),)
        first.close()
        until(lambda: made.agent.closed)
        made.repair()
        assert second.asked(messages.Terminate) == [messages.Terminate(pid=4, exit_code=1)]

    def test_that_is_on_its_way_up_is_waited_for(self, target: Make) -> None:
        down = NotUpError("the SSH server lab:22 did not take the connection: refused")
        assert target(down, Windows()).describe().startswith("Windows")

    def test_that_lets_nobody_in_is_not_asked_again(self, target: Make) -> None:
        with pytest.raises(TargetError, match="target 'lab': lab:22 did not let the user in"):
            target(LinkError("lab:22 did not let the user in"), Windows())

    def test_removes_what_it_installed_at_the_end(self, target: Make, image: Path) -> None:
        windows = Windows()
        made = target(windows)
        driver(made, image).start()
        assert list(windows.services) == ["hello"]
        assert len(windows.files) == 1
        made.close()
        assert (windows.services, windows.files, windows.states) == ({}, {}, {"hello": 1})

    def test_whose_agent_was_lost_removes_it_by_the_next_one(
        self, target: Make, image: Path
    ) -> None:
        first, second = Windows(), Windows()
        made = target(first, second)
        driver(made, image).start()
        second.services, second.files, second.states = first.services, first.files, first.states
        first.close()
        made.close()
        assert (second.services, second.files, second.states) == ({}, {}, {"hello": 1})

    def test_whose_agent_was_lost_between_two_calls_of_a_test_fails_it_once(
        self, target: Make, image: Path
    ) -> None:
        first, second = Windows(), Windows()
        made = target(first, second)
        hello = driver(made, image)
        hello.start()
        second.services, second.files, second.states = first.services, first.files, first.states
        first.close()
        until(lambda: made.agent.closed)
        with pytest.raises(TargetError, match="the connection was lost while hello was installed"):
            hello.stop()
        hello.finish()
        made.repair()
        assert driver(made, image).start() == NTSTATUS.STATUS_SUCCESS

    def test_tells_what_it_could_not_remove(
        self, target: Make, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[str] = []
        monkeypatch.setattr(RemoteMachine, "tell", lambda _, text: told.append(text))
        in_use = refusal(Win32Error.ERROR_SHARING_VIOLATION, "delete the file")
        first, second = (Windows({messages.Delete: in_use}) for _ in range(2))
        second.files = first.files
        made = target(first, second)
        driver(made, image).start()
        made.close()
        assert len(told) == 1
        assert "this is left there: C:\\kdriver\\" in told[0]

    def test_takes_the_place_of_a_service_that_a_dead_run_left(
        self, target: Make, image: Path
    ) -> None:
        windows = Windows()
        windows.services["hello"] = r"C:\kdriver\0123456789abcdef\hello.sys"
        windows.states["hello"] = 4
        assert driver(target(windows), image).start() == NTSTATUS.STATUS_SUCCESS
        assert windows.services["hello"] != r"C:\kdriver\0123456789abcdef\hello.sys"

    def test_leaves_a_service_alone_that_is_somebody_else_s(
        self, target: Make, image: Path
    ) -> None:
        windows = Windows()
        windows.services["hello"] = r"C:\Windows\System32\drivers\hello.sys"
        made = target(windows)
        with pytest.raises(ConfigError, match="has a service 'hello' already"):
            driver(made, image).start()
        made.close()
        assert list(windows.services) == ["hello"]


class TestARefusal:
    @pytest.mark.parametrize(
        ("request_kind", "code", "told"),
        [
            (messages.PutEnd, Win32Error.ERROR_SHARING_VIOLATION, "hello's file is in use there"),
            (messages.PutEnd, Win32Error.ERROR_USER_MAPPED_FILE, "hello's file is in use there"),
            (messages.PutData, Win32Error.ERROR_DISK_FULL, "no room for hello's file there"),
            (
                messages.CreateService,
                Win32Error.ERROR_SERVICE_MARKED_FOR_DELETE,
                "service hello is marked for deletion there.*close services.msc",
            ),
        ],
    )
    def test_of_an_install_is_told_with_what_mends_it(
        self,
        target: Make,
        image: Path,
        request_kind: type[Message],
        code: Win32Error,
        told: str,
    ) -> None:
        made = target(Windows({request_kind: refusal(code, "do it")}))
        with pytest.raises(TargetError, match=f"target 'lab': .*{told}.*{code.name}"):
            driver(made, image).start()
        assert made.broken is not None

    def test_to_unregister_is_told(self, target: Make, image: Path) -> None:
        marked = refusal(Win32Error.ERROR_SERVICE_MARKED_FOR_DELETE, "delete the service")
        hello = driver(target(Windows({messages.DeleteService: marked})), image)
        hello.start()
        with pytest.raises(TargetError, match="marked for deletion there"):
            hello.finish()

    def test_to_load_what_somebody_else_has_loaded_is_told(self, target: Make, image: Path) -> None:
        windows = Windows()
        windows.states["hello"] = 4
        made = target(windows)
        with pytest.raises(
            TargetError, match=r"hello is in the kernel already, and not by this run"
        ):
            driver(made, image).start()

    def test_to_start_what_somebody_else_has_started_is_told(
        self, target: Make, image: Path
    ) -> None:
        running = messages.Code(code=Win32Error.ERROR_SERVICE_ALREADY_RUNNING)
        made = target(Windows({messages.StartService: running}))
        with pytest.raises(
            TargetError, match=r"hello is in the kernel already, and not by this run"
        ):
            driver(made, image).start_service()

    def test_to_load_it_twice_is_the_status(self, target: Make, image: Path) -> None:
        hello = driver(target(Windows()), image)
        hello.start()
        assert hello.start(check=False) == NTSTATUS.STATUS_IMAGE_ALREADY_LOADED

    def test_to_unload_at_once_is_told(self, target: Make, image: Path) -> None:
        windows = Windows()
        windows.pends = True
        made = target(windows)
        hello = driver(made, image)
        hello.start()
        with pytest.raises(TargetError, match="hello's unload is pended: a handle"):
            hello.stop()
        assert hello.lost
        assert made.broken is not None

    def test_to_unload_at_all_is_the_guest_s_own_word(self, target: Make, image: Path) -> None:
        denied = messages.Code(code=NTSTATUS.STATUS_ACCESS_DENIED)
        hello = driver(target(Windows({messages.UnloadDriver: denied})), image)
        hello.start()
        with pytest.raises(StopFailed, match="the guest says STATUS_ACCESS_DENIED"):
            hello.stop()

    def test_of_a_driver_that_hangs_asks_for_a_restart(self, target: Make, image: Path) -> None:
        windows = Windows()
        windows.answers[messages.LoadDriver] = None
        hello = Driver(target(windows), image, name="hello", leaks="allow", timeout=0.5)
        with pytest.raises(Exception, match="can't be ended: restart the machine"):
            hello.start()
