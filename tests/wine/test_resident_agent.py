"""The agent at a port, in a Wine of its own: hosts come and go, and so does the agent."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import threading
import tty
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from pytest_kdriver.driver import ServiceState
from pytest_kdriver.errors import AgentError, LinkError
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.agent import Agent, ServiceStatus
from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.guest.frames import Decoder, Frame, Kind, encode
from pytest_kdriver.guest.links.serial import SerialLink
from pytest_kdriver.guest.wire import Message, from_bytes, to_bytes
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.port_stream import HostStream, encode_payload, new_nonce
from pytest_kdriver.targets import prefix
from tests.wine.test_wine_agent import (
    ALL_BYTES,
    FOLDER,
    START_TIMEOUT,
    Blocked,
    Guest,
    new_guest,
    services,
    until,
)

PATIENCE = 30.0


class Port:
    """A guest's port as QEMU makes it of a Unix socket: one host at a time, and the guest keeps its end.

    The guest reads nothing (0 bytes) while no host is there, and its writes wait.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "port"
        self._to_guest = folder / "to-guest"
        os.mkfifo(self._to_guest)
        self.guest_input = os.open(self._to_guest, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(self.guest_input, True)
        self._from_guest, self.guest_output = os.pipe()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen(1)
        self._closed = False
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while not self._closed:
                host, _ = self._server.accept()
                gone = threading.Event()
                downwards = threading.Thread(target=self._send_to_host, args=(host, gone))
                with host, self._to_guest.open("wb", buffering=0) as guest:
                    downwards.start()
                    with suppress(OSError):
                        while data := host.recv(1 << 16):
                            guest.write(data)
                    gone.set()
                    with suppress(OSError):
                        host.shutdown(socket.SHUT_RDWR)
                    downwards.join()

    def _send_to_host(self, host: socket.socket, gone: threading.Event) -> None:
        with suppress(OSError):
            while not gone.is_set():
                if select.select([self._from_guest], [], [], 0.05)[0]:
                    host.sendall(os.read(self._from_guest, 1 << 16))

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        for descriptor in (self.guest_input, self._from_guest, self.guest_output):
            os.close(descriptor)


class ResidentAgent:
    """The agent's program at a port."""

    def __init__(self, guest: Guest, port: Port) -> None:
        self._guest = guest
        self._port = port
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return start(
            self._guest,
            "--end",
            "resident",
            stdin=self._port.guest_input,
            stdout=self._port.guest_output,
        )

    def restart(self) -> None:
        self.end()
        self.process = self._start()

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start(
    guest: Guest,
    *arguments: str,
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [guest.wine.loader, str(AGENT.executable()), *arguments],
        env=guest.wine.environment(guest.path, "-all"),
        cwd=guest.path,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with new_guest() as guest:
        yield guest


@pytest.fixture(scope="module")
def keeper(guest: Guest) -> Iterator[Agent]:
    """Another agent, so that the guest's own processes stay."""
    with guest.agent() as agent:
        yield agent


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    with closing(Port(tmp_path_factory.mktemp("port"))) as port:
        yield port


@pytest.fixture(scope="module")
def resident(guest: Guest, keeper: Agent, port: Port) -> Iterator[ResidentAgent]:
    resident = ResidentAgent(guest, port)
    yield resident
    resident.end()


@pytest.fixture
def agent(resident: ResidentAgent, port: Port) -> Iterator[Agent]:
    with Agent.connect(SerialLink(port.path, timeout=START_TIMEOUT), timeout=10) as agent:
        yield agent
        if not agent.closed:
            agent.fence("still there")
    assert resident.process.poll() is None


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


class RawHost:
    """A host, byte by byte."""

    def __init__(self, port: Port) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(port.path))
        self.socket.settimeout(PATIENCE)
        self.stream = HostStream()
        self.decoder = Decoder()
        self._frames: list[Frame] = []

    def begin(self, nonce: str | None = None) -> None:
        self.socket.sendall(self.stream.begin(nonce or new_nonce()))
        self.decoder = Decoder()
        while not self.stream.synced:
            payload = self.stream.receive_data(self.socket.recv(1 << 16))
            assert payload == b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(encode_payload(data))

    def next(self) -> Frame:
        while not self._frames:
            payload = self.stream.receive_data(self.socket.recv(1 << 16))
            assert self.stream.ended is None
            self._frames = self.decoder.receive_data(payload)
        return self._frames.pop(0)

    def ask(self, request: Message, number: int = 1) -> Frame:
        self.send(frame(request, number))
        return self.next()

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def host(resident: ResidentAgent, port: Port, agent: Agent) -> Iterator[RawHost]:
    """Comes when another was there before."""
    agent.close()
    with closing(RawHost(port)) as host:
        yield host


def frame(request: Message, number: int = 1) -> bytes:
    operation = next(o for o in messages.OPERATIONS if o.request is type(request))
    return encode(
        Frame(kind=Kind.REQUEST, operation=operation.number, request=number, body=to_bytes(request))
    )


FENCE = messages.Fence(cookie="x")


class TestHosts:
    def test_come_and_go_and_the_agent_stays(self, resident: ResidentAgent, port: Port) -> None:
        pids = set()
        for _ in range(3):
            with Agent.connect(SerialLink(port.path, timeout=START_TIMEOUT), timeout=10) as agent:
                pids.add(agent.info.pid)
        assert len(pids) == 1
        assert resident.process.poll() is None

    def test_get_through_whatever_bytes_there_are(self, guest: Guest, agent: Agent) -> None:
        content = ALL_BYTES * 20_000 + b"~}" * 1_000_000
        path = rf"{FOLDER}\through the port"
        agent.put(content, path)
        assert guest.host_path(path).read_bytes() == content
        assert agent.get(path) == content

    def test_ask_much_at_the_same_time(self, agent: Agent, pool: ThreadPoolExecutor) -> None:
        list(pool.map(agent.fence, map(str, range(500))))

    def test_are_heard_though_the_one_before_left_an_answer_half_read(
        self, guest: Guest, port: Port, agent: Agent
    ) -> None:
        path = rf"{FOLDER}\much"
        agent.put(bytes(32 << 20), path)
        for _ in range(2):
            agent.close()
            with closing(RawHost(port)) as host:
                host.begin()
                host.send(frame(messages.Get(path=path)))
                assert host.next().kind is Kind.PART
            agent = Agent.connect(SerialLink(port.path, timeout=10), timeout=10)
            assert len(agent.get(path)) == 32 << 20
        agent.close()


class TestResume:
    """As behind the load of a snapshot, which the agent does not notice."""

    def test_is_a_new_beginning_with_the_same_agent(self, agent: Agent) -> None:
        info = agent.info
        for _ in range(20):
            agent.resume(timeout=10)
            agent.fence("x")
            assert agent.info == info

    def test_fails_what_waits_and_gives_its_place_back(self, agent: Agent) -> None:
        for _ in range(3):
            waiting = [agent.wait_process(services(agent).pid) for _ in range(64)]
            refused = agent.wait_process(services(agent).pid)
            with pytest.raises(AgentError, match="too many requests at a time"):
                refused.result(PATIENCE)
            assert agent.pending == 64
            agent.resume(timeout=10)
            assert agent.pending == 0
            for future in waiting:
                with pytest.raises(LinkError, match="wait_process: the guest was put back"):
                    future.result(0)
        until(lambda: _runs(agent))

    def test_closes_what_was_open(self, guest: Guest, agent: Agent) -> None:
        held = guest.host_path(rf"{FOLDER}\held")
        agent.put(b"", rf"{FOLDER}\held")
        opened = agent.open_device(rf"\??\{FOLDER}\held", time_limit=10)
        assert opened.device is not None, opened
        written = agent.write_device(opened.device, b"x", time_limit=10)
        assert written.status == NTSTATUS.STATUS_SUCCESS
        assert _is_open(guest, held)
        agent.resume(timeout=10)
        with pytest.raises(AgentError, match="no such device is open"):
            agent.write_device(opened.device, b"x", time_limit=10)
        until(lambda: not _is_open(guest, held))

    def test_removes_files_that_are_not_whole(self, guest: Guest, agent: Agent) -> None:
        path = rf"{FOLDER}\half"
        upload = agent._call(messages.PutBegin(path=path), 10).upload
        agent._call(messages.PutData(upload=upload, offset=0, data=b"half of it"), 10)
        assert _named(guest, "half")
        agent.resume(timeout=10)
        until(lambda: not _named(guest, "half"))
        with pytest.raises(AgentError, match="no such upload"):
            agent._call(messages.PutAbort(upload=upload), 10)

    def test_ends_programs_that_nobody_waits_for(
        self, agent: Agent, keeper: Agent, tmp_path: Path, pool: ThreadPoolExecutor
    ) -> None:
        program = Blocked(tmp_path / "fifo")
        running = pool.submit(agent.run, program.command, time_limit=600)
        until(lambda: program.find(keeper))
        agent.resume(timeout=10)
        with pytest.raises(LinkError, match="run: the guest was put back"):
            running.result(PATIENCE)
        until(lambda: not program.find(keeper))
        program.let_go()


def _runs(agent: Agent) -> bool:
    with suppress(AgentError):  # the places come back a moment later
        return agent.run(["cmd", "/c", "exit 3"]).exit_code == 3
    return False


def _is_open(guest: Guest, path: Path) -> bool:
    for pid in prefix.processes(guest.path):
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                if descriptor.readlink() == path:
                    return True
    return False


def _named(guest: Guest, name: str) -> list[Path]:
    return [path for path in guest.host_path(FOLDER).iterdir() if name in path.name]


class TestTheStream:
    def test_may_be_cut_at_every_place_of_a_request(self, host: RawHost) -> None:
        request = encode_payload(frame(messages.Hash(path=r"C:\~}~}")))
        for cut in range(len(request) + 1):
            host.begin()
            host.socket.sendall(request[:cut])
            host.begin()
            assert host.ask(FENCE, number=7).request == 7

    def test_may_be_cut_in_a_mark(self, host: RawHost) -> None:
        for cut in range(36):
            host.socket.sendall(host.stream.begin(new_nonce())[:cut])
            host.begin()
            assert host.ask(FENCE).kind is Kind.REPLY

    def test_has_no_answers_of_an_earlier_session(self, host: RawHost) -> None:
        host.begin()
        for number in range(1, 200):
            host.send(frame(messages.Processes(), number))
        host.begin()
        # All that came up to now was dropped; and none of the earlier ones comes from here on.
        for _ in range(20):
            assert host.ask(messages.Processes(), number=1000).request == 1000

    def test_goes_on_where_the_host_asks_again_with_the_same_nonce(self, host: RawHost) -> None:
        nonce = new_nonce()
        host.begin(nonce)
        opened = host.ask(messages.OpenDevice(path=r"\??\nul", time_limit=10_000))
        device = from_bytes(messages.DeviceOpened, opened.body).device
        host.socket.sendall(host.stream.sync())
        reply = host.ask(messages.WriteDevice(device=device, data=b"x", time_limit=10_000))
        assert reply.kind is Kind.REPLY

    @pytest.mark.parametrize(
        ("bad", "complaint"),
        [
            (b"\0\0\0\0", "a frame of 0 bytes"),
            (b"GET / HTTP/1.1\r\n\r\n", "a frame of"),
            (b"\x08\0\0\0\x02\x01\x01\0\1\0\0\0", "version 2"),
            (b"\x08\0\0\0\x01\x03\x01\0\1\0\0\0", "kind 3"),
        ],
    )
    def test_of_bad_frames_is_told_and_dropped_until_the_next_host(
        self, resident: ResidentAgent, host: RawHost, bad: bytes, complaint: str
    ) -> None:
        nonce = new_nonce()
        host.begin(nonce)
        host.send(bad + frame(FENCE))
        error = host.next()
        assert (error.kind, error.request) == (Kind.ERROR, 0)
        assert complaint in from_bytes(messages.Error, error.body).message
        for again in (nonce, None):
            host.send(frame(FENCE))
            host.begin(again)
            assert host.ask(FENCE, number=3).request == 3
        assert resident.process.poll() is None

    def test_of_too_many_requests_does_not_end_the_agent(
        self, resident: ResidentAgent, host: RawHost, agent: Agent
    ) -> None:
        host.begin()
        request = frame(messages.WaitProcess(pid=resident_pid(host)))
        host.send(request * 20_000)  # nobody reads the refusals
        host.begin()
        assert host.ask(FENCE).kind is Kind.REPLY
        assert resident.process.poll() is None


def resident_pid(host: RawHost) -> int:
    hello = from_bytes(messages.HelloReply, host.ask(messages.Hello(protocol=1)).body)
    return hello.pid


class TestAnotherAgent:
    def test_is_the_end_of_the_link(
        self, resident: ResidentAgent, port: Port, agent: Agent
    ) -> None:
        waiting = agent.wait_process(services(agent).pid)
        before = agent.info.pid
        resident.restart()
        with pytest.raises(LinkError, match="started anew"):
            waiting.result(PATIENCE)
        assert agent.closed
        with pytest.raises(LinkError):
            agent.fence("x")
        agent.close()
        with Agent.connect(SerialLink(port.path, timeout=START_TIMEOUT), timeout=10) as other:
            assert other.info.pid != before

    def test_is_waited_for(
        self, resident: ResidentAgent, port: Port, agent: Agent, pool: ThreadPoolExecutor
    ) -> None:
        agent.close()
        resident.end()
        link = pool.submit(SerialLink, port.path, timeout=START_TIMEOUT)
        resident.restart()
        with Agent.connect(link.result(START_TIMEOUT), timeout=10) as other:
            other.fence("x")


@contextmanager
def com_port(guest: Guest, folder: Path) -> Iterator[Path]:
    """A pseudo-terminal as the guest's COM1, for one host; the path of the host's socket."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    device = guest.path / "dosdevices" / "com1"  # Wine makes its own when it begins
    device.unlink(missing_ok=True)
    device.symlink_to(os.ttyname(theirs))
    path = folder / "com1"
    path.unlink(missing_ok=True)
    with ExitStack() as last_to_first:
        for descriptor in (ours, theirs):
            last_to_first.callback(os.close, descriptor)
        last_to_first.callback(device.unlink)
        bridge = threading.Thread(target=_bridge, args=(path, ours))
        bridge.start()
        until(path.exists)
        last_to_first.callback(bridge.join)
        yield path


class TestComPort:
    """The code that Windows runs, at a pseudo-terminal."""

    def test_serves_hosts_too(self, guest: Guest, keeper: Agent, tmp_path: Path) -> None:
        with com_port(guest, tmp_path) as path, ExitStack() as last_to_first:
            process = start(guest, "--end", "port", r"\\.\COM1")
            last_to_first.callback(process.wait)
            last_to_first.callback(os.killpg, process.pid, signal.SIGKILL)
            link = SerialLink(path, timeout=START_TIMEOUT)
            with Agent.connect(link, timeout=10) as agent:
                for _ in range(100):
                    agent.fence("x")
                content = ALL_BYTES * 2000
                agent.put(content, rf"{FOLDER}\by COM1")
                assert agent.get(rf"{FOLDER}\by COM1") == content
                waiting = agent.wait_process(services(agent).pid)
                agent.resume(timeout=10)
                assert isinstance(waiting.exception(0), LinkError)
                agent.fence("x")
            assert process.poll() is None


SERVICE = "kdagent-test"


@contextmanager
def service(keeper: Agent, port: str) -> Iterator[None]:
    """The agent as a service that the service control manager knows."""
    program = "Z:" + str(AGENT.executable()).replace("/", "\\")
    image = f'"{program}" --service {SERVICE} --end port {port}'
    made = keeper.run(["sc.exe", "create", SERVICE, "binPath=", image])
    assert made.exit_code == 0, made
    try:
        yield
    finally:
        keeper.delete_service(SERVICE)


def status(keeper: Agent) -> ServiceStatus:
    found = keeper.query_service(SERVICE)
    assert found is not None
    return found


class TestTheService:
    def test_is_started_serves_hosts_is_stopped_and_starts_again(
        self, guest: Guest, keeper: Agent, tmp_path: Path
    ) -> None:
        with service(keeper, r"\\.\COM1"):
            for _ in range(2):
                with com_port(guest, tmp_path) as path:
                    assert keeper.start_service(SERVICE) == 0
                    link = SerialLink(path, timeout=START_TIMEOUT)
                    with Agent.connect(link, timeout=10) as agent:
                        pid = agent.info.pid
                        agent.put(ALL_BYTES, rf"{FOLDER}\by a service")
                        running = status(keeper)
                        assert (running.state, running.pid) == (ServiceState.RUNNING.value, pid)
                        assert keeper.stop_service(SERVICE) == 0
                        until(lambda: status(keeper).state == ServiceState.STOPPED.value)
                        assert status(keeper).win32_exit_code == 0
                        until(lambda: pid not in [p.pid for p in keeper.processes()])  # noqa: B023

    def test_whose_port_is_not_there_stops_and_says_why(self, keeper: Agent) -> None:
        with service(keeper, r"\\.\COM77"):
            keeper.start_service(SERVICE)
            until(lambda: status(keeper).state == ServiceState.STOPPED.value)
            assert status(keeper).win32_exit_code == 2  # ERROR_FILE_NOT_FOUND

    def test_that_nobody_started_as_one_says_so(self, guest: Guest, keeper: Agent) -> None:
        process = start(
            guest, "--service", SERVICE, "--end", "port", r"\\.\COM1", stderr=subprocess.PIPE
        )
        _, complaint = process.communicate(timeout=START_TIMEOUT)
        assert process.returncode == 1
        assert complaint == b"kdagent: can't run as a service: error 1063\n"


def _bridge(path: Path, terminal: int) -> None:
    """One host's bytes to the terminal and back, until it has gone."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path.with_suffix(".new")))
        server.listen(1)
        path.with_suffix(".new").rename(path)
        host, _ = server.accept()
    with host:
        while True:
            ready, _, _ = select.select([host.fileno(), terminal], [], [])
            if terminal in ready:
                host.sendall(os.read(terminal, 1 << 16))
            if host.fileno() in ready:
                data = host.recv(1 << 12)
                if not data:
                    return
                while data:
                    data = data[os.write(terminal, data) :]


class TestTheCommandLine:
    def test_of_a_port_that_is_not_there_is_told(self, guest: Guest, keeper: Agent) -> None:
        process = start(guest, "--end", "port", r"\\.\COM77", stderr=subprocess.PIPE)
        _, complaint = process.communicate(timeout=START_TIMEOUT)
        assert process.returncode == 1
        assert complaint == b"kdagent: can't open the port: error 2\n"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--end"],
            ["--end", "port"],
            ["--end", "port", "a", "b"],
            ["--ent", "stdio"],
            ["--service", "a"],
        ],
    )
    def test_that_is_none_is_told(self, guest: Guest, keeper: Agent, arguments: list[str]) -> None:
        process = start(guest, *arguments, stderr=subprocess.PIPE)
        _, complaint = process.communicate(timeout=START_TIMEOUT)
        assert process.returncode == 64
        assert complaint.startswith(b"usage: kdagent [--check-bytes|--base64|")
