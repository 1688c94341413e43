"""What a guest says that means us harm: it ends in an error of ours, in bounded time and memory."""

from __future__ import annotations

import gc
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import paramiko
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_kdriver.errors import AgentError, AgentProtocolError, KdriverError, LinkError
from pytest_kdriver.guest import agent as agent_module
from pytest_kdriver.guest import frames, messages
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.frames import MAX_BODY, Frame, Kind, encode
from pytest_kdriver.guest.links.serial import SerialLink
from pytest_kdriver.guest.links.ssh import SshLink
from pytest_kdriver.guest.wire import MAX_ITEMS, Message, from_bytes, to_bytes
from pytest_kdriver.kernel.events import BugCheck, KernelMessage, PoolAllocated
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.wine import FRAME_HEADER, MAX_MESSAGE, WineTrace, frame
from pytest_kdriver.kernel.text import kernel_lines
from pytest_kdriver.port_stream import Decoder, Mark, MarkKind, encode_mark, encode_payload
from pytest_kdriver.targets.libvirt.domain import console_tail
from pytest_kdriver.targets.port_pump import PortPump
from tests.unit.far_ends import Sshd, command_line

PATIENCE = 30.0
MIB = 1 << 20
EVIL = "\x1b]0;owned\x07\x9b2J"
"""What a terminal would act on."""

HEADER = b"1.000:0020:0024:"
HELLO = messages.HelloReply(
    protocol=1,
    version=EVIL,
    architecture=EVIL,
    os_major=0xFFFFFFFF,
    os_minor=0xFFFFFFFF,
    os_build=0xFFFFFFFF,
    wine_version=EVIL,
    elevated=True,
    pid=0xFFFFFFFF,
    operations=(EVIL,) * 1000,
)


class Guest:
    """The guest's end of a port: says what it is told to until the host has gone, then hangs up."""

    def __init__(self, path: Path, talk: Callable[[Guest], None]) -> None:
        self.path = path
        self.sent_all = False
        self._talk = talk
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(1)
        self._accepted: socket.socket | None = None
        self._port = Decoder(MarkKind.SYNC)
        self._frames = frames.Decoder()
        self._requests: list[Frame] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            self._accepted, _ = self._server.accept()
            with self._accepted:
                self._talk(self)
                self.sent_all = True

    @property
    def _connection(self) -> socket.socket:
        assert self._accepted is not None
        return self._accepted

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._connection.sendall(data)

    def say(self, data: bytes) -> None:
        """Send payload."""
        self.send(encode_payload(data))

    def answer_sync(self) -> None:
        """Begin the session that the host asks for."""
        while True:
            for event in self._port.receive_data(self._receive()):
                if isinstance(event, Mark):
                    self.send(encode_mark(MarkKind.ANSWER, event.nonce))
                    return

    def next_request(self) -> Frame:
        """The host's next request."""
        while not self._requests:
            for event in self._port.receive_data(self._receive()):
                if isinstance(event, bytes):
                    self._requests += self._frames.receive_data(event)
        return self._requests.pop(0)

    def reply(self, request: Frame, body: bytes, kind: Kind = Kind.REPLY) -> None:
        """Answer a request, in as many parts as it takes."""
        while len(body) > MAX_BODY:
            self._say_frame(request, Kind.PART, body[:MAX_BODY])
            body = body[MAX_BODY:]
        self._say_frame(request, kind, body)

    def _say_frame(self, request: Frame, kind: Kind, body: bytes) -> None:
        answer = Frame(kind=kind, operation=request.operation, request=request.request, body=body)
        self.say(encode(answer))

    def greet(self, hello: Message = HELLO) -> None:
        """Begin, as an agent does."""
        self.answer_sync()
        self.reply(self.next_request(), to_bytes(hello))

    def _receive(self) -> bytes:
        data = self._connection.recv(1 << 16)
        if not data:
            raise ConnectionError("the host has gone")
        return data

    def wait(self) -> None:
        """Until it has hung up."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def close(self) -> None:
        for end in (self._accepted, self._server):
            with suppress(OSError):  # it has hung up
                if end is not None:
                    end.shutdown(socket.SHUT_RDWR)
        self.wait()
        self._server.close()


@contextmanager
def guest(folder: Path, talk: Callable[[Guest], None]) -> Iterator[Guest]:
    path = folder / "port"
    path.unlink(missing_ok=True)
    guest = Guest(path, talk)
    try:
        yield guest
    finally:
        guest.close()


@contextmanager
def agent_of(folder: Path, talk: Callable[[Guest], None]) -> Iterator[Agent]:
    """The agent of a guest that greets, then talks."""

    def greet_and_talk(guest: Guest) -> None:
        guest.greet()
        talk(guest)

    with (
        guest(folder, greet_and_talk) as made,
        Agent.connect(SerialLink(made.path, timeout=PATIENCE), timeout=PATIENCE) as agent,
    ):
        yield agent


@contextmanager
def memory(limit: int) -> Iterator[None]:
    """See that what is done within takes no more than ``limit`` bytes at any time."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak / MIB:.0f} MiB"


def is_tame(text: str) -> bool:
    """Whether a terminal shows it, and does nothing else."""
    return all(sign.isprintable() or sign in "\t\n" for sign in text)


CALLS: dict[str, Callable[[Agent], object]] = {
    "clock": lambda agent: agent.clock(),
    "free_space": lambda agent: agent.free_space("C:\\"),
    "hash": lambda agent: agent.hash("C:\\x"),
    "get": lambda agent: agent.get("C:\\x"),
    "put": lambda agent: agent.put(b"x", "C:\\x", timeout=1),
    "processes": lambda agent: agent.processes(),
    "query_service": lambda agent: agent.query_service("x"),
    "start_service": lambda agent: agent.start_service("x"),
    "load_driver": lambda agent: agent.load_driver("x"),
    "get_value": lambda agent: agent.get_value("x", "y"),
    "system_information": lambda agent: agent.system_information(5),
    "run": lambda agent: agent.run(["x"]),
    "wait_process": lambda agent: agent.wait_process(4).result(PATIENCE),
    "open_device": lambda agent: agent.open_device("x", time_limit=1),
    "read_device": lambda agent: agent.read_device(1, 4, time_limit=1),
    "ioctl": lambda agent: agent.ioctl(1, 2, b"", 4, time_limit=1),
    "fence": lambda agent: agent.fence("x"),
}

NUMBERS = st.sampled_from([0, 1, 2, 3, 0x7FFFFFFF, 0xFFFFFFFF]).map(struct.Struct("<I").pack)
BODIES = st.lists(NUMBERS | st.binary(max_size=9), max_size=8).map(b"".join)
"""Numbers where the lengths and counts of messages are, and bytes."""

HOSTILE_FRAMES = st.builds(
    lambda kind, operation, request, body: encode(
        Frame(kind=kind, operation=operation, request=request, body=body)
    ),
    st.sampled_from(Kind),
    st.sampled_from([0, 1, 20, 0xFFFF]),
    st.sampled_from([0, 1, 2, 2, 2, 3, 0xFFFFFFFF]),
    BODIES,
)

HOSTILE_BYTES = st.lists(HOSTILE_FRAMES | BODIES, max_size=6).map(b"".join)


class TestAgent:
    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(name=st.sampled_from(sorted(CALLS)), said=HOSTILE_BYTES, body=BODIES)
    def test_that_says_anything_is_answered_or_refused(
        self, tmp_path: Path, name: str, said: bytes, body: bytes
    ) -> None:
        """Every call has a value or an error of ours, at once when the guest hangs up."""

        def talk(guest: Guest) -> None:
            request = guest.next_request()
            guest.say(said)
            guest.reply(request, body)

        with agent_of(tmp_path, talk) as agent, suppress(KdriverError):
            CALLS[name](agent)
        assert agent.closed

    def test_that_knows_no_bounds_has_them(self, tmp_path: Path) -> None:
        def talk(guest: Guest) -> None:
            while True:
                request = guest.next_request()
                guest.reply(request, b"\xff" * 8)

        with agent_of(tmp_path, talk) as agent:
            assert agent.clock() == pytest.approx(1.833e12, rel=1e-3)  # the year 60056
            assert agent.free_space("C:\\") == 0xFFFFFFFFFFFFFFFF
            with pytest.raises(AgentProtocolError, match="a bool that is neither"):
                agent.hash("C:\\x")

    def test_that_answers_without_end_is_cut_off(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(agent_module, "MAX_REPLY", 4 * MIB)

        def talk(guest: Guest) -> None:
            request = guest.next_request()
            part = encode(
                Frame(kind=Kind.PART, operation=6, request=request.request, body=bytes(MAX_BODY))
            )
            for _ in range(32):
                guest.say(part)
            guest.reply(guest.next_request(), bytes(8))

        with memory(24 * MIB), agent_of(tmp_path, talk) as agent:
            with pytest.raises(AgentError, match=f"get: the answer is above {4 * MIB} bytes"):
                agent.get("C:\\x")
            assert agent.free_space("C:\\") == 0  # and all the rest was dropped

    @pytest.mark.parametrize(
        ("kind", "request_id"), [(Kind.PART, 2), (Kind.REPLY, 1)], ids=["parts", "late"]
    )
    def test_that_talks_without_saying_anything_is_a_timeout(
        self, tmp_path: Path, kind: Kind, request_id: int
    ) -> None:
        def talk(guest: Guest) -> None:
            guest.next_request()
            nothing = encode(Frame(kind=kind, operation=31, request=request_id, body=b""))
            while True:
                guest.say(nothing * 1000)

        with memory(8 * MIB), agent_of(tmp_path, talk) as agent:
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                agent.clock(timeout=0.3)
        assert time.monotonic() - began < PATIENCE

    def test_that_counts_too_far_is_refused(self) -> None:
        nothing = struct.pack("<I", 0)
        body = struct.pack("<I", MAX_ITEMS + 1) + nothing * 3 * (MAX_ITEMS + 1)
        with memory(4 * MIB), pytest.raises(AgentProtocolError, match="65537 items"):
            from_bytes(messages.ProcessList, body)
        most = struct.pack("<I", MAX_ITEMS) + nothing * 3 * MAX_ITEMS
        assert len(from_bytes(messages.ProcessList, most).processes) == MAX_ITEMS

    @pytest.mark.parametrize("domain", [0, 1, 2])
    def test_that_complains_does_not_write_to_the_terminal(
        self, tmp_path: Path, domain: int
    ) -> None:
        error = messages.Error(domain=domain, code=0xFFFFFFFF, message=EVIL + "x" * 100_000)

        def talk(guest: Guest) -> None:
            guest.reply(guest.next_request(), to_bytes(error), Kind.ERROR)
            guest.say(encode(Frame(kind=Kind.ERROR, operation=0, request=0, body=to_bytes(error))))

        with agent_of(tmp_path, talk) as agent:
            with pytest.raises(AgentError, match="owned") as of_the_request:
                agent.hash("C:\\x")
            with pytest.raises((AgentError, LinkError)) as of_the_stream:
                agent.wait_process(4).result(PATIENCE)
        for caught in (of_the_request.value, of_the_stream.value):
            assert is_tame(str(caught))
            assert len(str(caught)) < 5000

    def test_whose_date_complains_does_not_write_to_the_terminal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(agent_module, "_DATE_TIMEOUT", 0.1)
        said = messages.Completed(
            exit_code=1, stdout=b"", stderr=EVIL.encode() * 10_000, timed_out=False, truncated=True
        )

        def talk(guest: Guest) -> None:
            guest.reply(guest.next_request(), to_bytes(said))
            while True:
                guest.reply(guest.next_request(), bytes(8))

        told = "s off behind date"
        with agent_of(tmp_path, talk) as agent, pytest.raises(AgentError, match=told) as caught:
            agent.set_clock(0.0)
        assert is_tame(str(caught.value))
        assert len(str(caught.value)) < 20_000


FLOODS = {
    "bytes": b"x" * 65536,
    "flags": b"~" * 65536,
    "escapes": b"}" * 65535,
    "halves of marks": b"~A0123" * 10000,
    "answers to others": encode_mark(MarkKind.ANSWER, "0" * 32) * 1500,
    "boots": encode_mark(MarkKind.BOOT, "0" * 32) * 1500,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_port_that_floods_before_it_answers_is_a_timeout(tmp_path: Path, flood: str) -> None:
    def talk(guest: Guest) -> None:
        while True:
            guest.send(FLOODS[flood])

    with memory(4 * MIB), guest(tmp_path, talk) as made:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="no agent answered"):
            SerialLink(made.path, timeout=0.5)
    assert time.monotonic() - began < PATIENCE


@pytest.mark.parametrize("flood", FLOODS)
def test_a_port_that_floods_a_session_is_no_answer(tmp_path: Path, flood: str) -> None:
    def talk(guest: Guest) -> None:
        guest.next_request()
        while True:
            guest.send(FLOODS[flood])

    ends = (LinkError, AgentProtocolError, TimeoutError)
    with memory(4 * MIB), agent_of(tmp_path, talk) as agent, pytest.raises(ends):
        agent.clock(timeout=1)


@contextmanager
def pump_of(made: Guest, folder: Path) -> Iterator[tuple[PortPump, KernelLog]]:
    log = KernelLog(folder / "spill")
    pump = PortPump(made.path, WineTrace, log, "test")
    try:
        with suppress(LinkError):  # what breaks it may come right behind the answer
            pump.begin(PATIENCE)
        yield pump, log
    finally:
        pump.close()


TEMPLATES = [
    b"%b\n",
    b"%b",
    HEADER + b"%b\n",
    HEADER + b"%b",
    HEADER + b"warn:debugstr:vDbgPrintExWithPrefix %b\n",
    HEADER + b"warn:debugstr:vDbgPrintExWithPrefix 00000000:00000001: %b\n",
    HEADER + b"warn:debugstr:vDbgPrintExWithPrefix 0000004d:40000000: kdriver:stack 1 %b\n",
    HEADER + b'warn:debugstr:OutputDebugStringA "%b"\n',
    HEADER + b"Call ntoskrnl.exe.ExAllocatePoolWithTag(%b,%b,%b) ret=%b\n",
    HEADER + b"Ret  ntoskrnl.exe.ExAllocatePoolWithTag() retval=%b ret=1\n",
    HEADER + b"Call ntoskrnl.exe.ExAllocatePool(%b,%b) ret=1\n",
    HEADER + b"Ret  ntoskrnl.exe.ExAllocatePool() retval=1 ret=%b\n",
    HEADER + b"Call ntoskrnl.exe.ExFreePoolWithTag(%b) ret=%b\n",
    HEADER + b"Ret  ntoskrnl.exe.ExFreePoolWithTag() retval=1 ret=1\n",
    HEADER + b'Call driver init 1 (obj=1,str=L"\\\\%b")\n',
    HEADER + b'Ret  driver init %b (obj=1,str=L"\\\\%b") retval=c0000001\n',
    HEADER + b"Call driver unload %b (obj=1)\n",
    HEADER + b"Ret  driver unload 1 (obj=1)\n",
    HEADER + b'err:ntoskrnl:ZwLoadDriver failed to create driver L"\\\\%b": c0000001\n',
    HEADER + b"err:ntoskrnl:KeBugCheckEx %b %b %b\n",
    HEADER + b"err:%b\n",
    b"wine: Unhandled page fault on %b access to %b at address %b (thread %b), starting debugger\n",
    b"wine: Unhandled exception 0x%b at address 1 (thread 1), starting debugger\n",
    b"wine: Call from %b to unimplemented function %b.%b, aborting\n",
    b"wine: %b\n",
]
"""All that the source looks for, with holes for what a guest may put there."""

FILLINGS = st.sampled_from(
    [b"", b"0", b"1", b"f" * 8, b"f" * 16, b"f" * 17, b"f" * 6000, b"1," * 50, b"\\x", b"\\xd800"]
) | st.binary(max_size=12)


@st.composite
def trace_messages(draw: st.DrawFn) -> bytes:
    template = draw(st.sampled_from(TEMPLATES))
    return template % tuple(draw(FILLINGS) for _ in range(template.count(b"%b")))


LENGTHS = st.sampled_from([0, 1, 7, MAX_MESSAGE, MAX_MESSAGE + 1, 0xFFFFFFFF])
TRACES = st.lists(
    st.builds(frame, trace_messages(), st.integers(0, 2))
    | st.builds(FRAME_HEADER.pack, LENGTHS, st.integers(0, 0xFFFFFFFF)).map(
        lambda head: head + b"x"
    ),
    max_size=12,
).map(b"".join)


def wine(folder: Path) -> tuple[WineTrace, KernelLog]:
    return WineTrace(), KernelLog(folder / "spill")


class TestTrace:
    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(trace=TRACES, raw=BODIES)
    def test_of_anything_holds_up_nobody(self, tmp_path: Path, trace: bytes, raw: bytes) -> None:
        """The thread reads on to the end, says why nothing more comes, and all can be shown."""

        def talk(guest: Guest) -> None:
            guest.answer_sync()
            guest.say(trace)
            guest.send(raw)
            guest.send(FLOODS["bytes"] * 8)

        with guest(tmp_path, talk) as made, pump_of(made, tmp_path) as (pump, log):
            made.wait()
            assert made.sent_all
            window = log.window(None, 0)
            assert window.wait_for(
                lambda _, event: isinstance(event, KernelMessage) and "ends here" in event.text,
                PATIENCE,
            )
            assert pump.failure is not None
            assert all(is_tame(line) for line in kernel_lines(window, 100))

    @given(trace=st.lists(trace_messages(), max_size=30))
    def test_s_numbers_can_be_shown_in_any_way(self, trace: list[bytes]) -> None:
        """Python refuses to write a number of thousands of digits in decimal."""
        events = WineTrace().receive_data(b"".join(map(frame, trace)), 0.0)
        for event in events:
            assert repr(event)
            assert hash(event) is not None

    def test_that_broke_goes_on_in_the_next_session(self, tmp_path: Path) -> None:
        def talk(guest: Guest) -> None:
            guest.answer_sync()
            guest.say(FRAME_HEADER.pack(0xFFFFFFFF, 1))
            guest.say(bytes(4 * MIB))
            guest.answer_sync()
            guest.say(frame(HEADER + b"err:still:here\n"))
            guest.next_request()

        with guest(tmp_path, talk) as made, pump_of(made, tmp_path) as (pump, log):
            window = log.window(None, 0)
            assert window.wait_for(lambda _, event: "ends here" in str(event), PATIENCE)
            assert pump.failure == "KernelLogError: a message of 4294967295 bytes in Wine's trace"
            pump.begin(PATIENCE)
            assert window.wait_for(lambda _, event: "still:here" in str(event), PATIENCE)
            assert pump.failure is None

    @pytest.mark.parametrize("flood", FLOODS)
    def test_s_port_that_floods_before_it_answers_is_a_timeout(
        self, tmp_path: Path, flood: str
    ) -> None:
        def talk(guest: Guest) -> None:
            while True:
                guest.send(FLOODS[flood])

        log = KernelLog()
        with memory(4 * MIB), guest(tmp_path, talk) as made:
            pump = PortPump(made.path, WineTrace, log, "test")
            try:
                with pytest.raises(TimeoutError, match="did not answer"):
                    pump.begin(0.3)
            finally:
                pump.close()
        assert len(log) == 0

    @pytest.mark.parametrize(
        ("write", "limit"),
        [
            pytest.param(lambda n: frame(HEADER + b"x" * 30_000, n % 50), 12, id="half messages"),
            pytest.param(
                lambda n: frame(HEADER + b"x" * 65_000, n) + frame(b"x" * 100_000, n),
                2,
                id="half messages that go on",
            ),
            pytest.param(
                lambda _: frame(HEADER + b"Call ntoskrnl.exe.ExFreePool(1,2,3) ret=1\n") * 20,
                1,
                id="calls that do not return",
            ),
            pytest.param(
                lambda _: frame(
                    HEADER + b"Call ntoskrnl.exe.ExFreePool(" + b"1," * 5000 + b"1) ret=1\n"
                ),
                1,
                id="calls with many arguments",
            ),
            pytest.param(
                lambda n: b"".join(
                    frame(HEADER + b'Call driver init 1 (obj=1,str=L"\\\\%d")\n' % (20 * n + more))
                    for more in range(20)
                ),
                1,
                id="drivers without number",
            ),
            pytest.param(
                lambda n: (
                    frame(HEADER + b'Call driver init 1 (obj=1,str=L"\\\\evil")\n') * (n == 0)
                    + b"".join(
                        frame(
                            HEADER
                            + b'Ret  driver init 1 (obj=1,str=L"\\\\%d") retval=c0000001\n' % more
                        )
                        for more in range(20 * n, 20 * n + 20)
                    )
                ),
                1,
                id="drivers that never were",
            ),
            pytest.param(
                lambda n: b"".join(
                    frame(b'1.000:%08x:%08x:Call driver init 1 (obj=1,str=L"\\\\a")\n' % (m, m), m)
                    for m in range(20 * n, 20 * n + 20)
                ),
                8,
                id="processes without number",
            ),
        ],
    )
    def test_is_remembered_in_parts(self, write: Callable[[int], bytes], limit: int) -> None:
        source = WineTrace()
        began = time.monotonic()
        with memory(limit * MIB):
            for number in range(1000):
                source.receive_data(write(number), 0.0)
        assert time.monotonic() - began < PATIENCE

    @pytest.mark.parametrize(
        "message",
        [
            b"err:" + b"x" * 500_000,
            b"warn:debugstr:vDbgPrintExWithPrefix " + b"x" * 500_000,
            b'Call driver init 1 (obj=1,str=L"\\\\' + b"x" * 500_000 + b'")',
            b'warn:debugstr:OutputDebugStringA "' + b"x" * 500_000 + b'"',
        ],
        ids=["error", "print", "name", "fence"],
    )
    def test_s_long_messages_go_to_the_disk(self, tmp_path: Path, message: bytes) -> None:
        source, log = WineTrace(), KernelLog(tmp_path / "spill")
        long = frame(HEADER + message + b"\n")
        with memory(16 * MIB):
            for _ in range(100):
                log.append(source.receive_data(long, 0.0))

    def test_s_numbers_have_as_many_digits_as_the_guest_s(self) -> None:
        def events(text: bytes) -> list[object]:
            return list(WineTrace().receive_data(frame(HEADER + text + b"\n"), 0.0))

        assert isinstance(events(b"err:ntoskrnl:KeBugCheckEx " + b"f" * 16)[0], BugCheck)
        (event,) = events(b"err:ntoskrnl:KeBugCheckEx x" + b"f" * 17)
        assert isinstance(event, KernelMessage)
        source = WineTrace()
        trace = [
            HEADER + b'Call driver init 1 (obj=1,str=L"\\\\evil")\n',
            HEADER + b"Call ntoskrnl.exe.ExAllocatePool(" + b"f" * 16 + b",1) ret=1\n",
            HEADER + b"Ret  ntoskrnl.exe.ExAllocatePool() retval=1 ret=1\n",
        ]
        found = source.receive_data(b"".join(map(frame, trace)), 0.0)
        assert [event for event in found if isinstance(event, PoolAllocated)]


@given(said=st.binary(max_size=3000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_console_s_last_lines_are_shown_and_not_obeyed(tmp_path: Path, said: bytes) -> None:
    console = tmp_path / "console"
    console.write_bytes(said)
    lines = console_tail(console, 5)
    assert len(lines) <= 5
    assert all(line.isprintable() for line in lines)


def test_a_console_without_lines_is_cut(tmp_path: Path) -> None:
    console = tmp_path / "console"
    with console.open("wb") as file:
        file.truncate(1 << 33)
        file.seek(0, 2)
        file.write(b"the end")
    with memory(MIB):
        (line,) = console_tail(console)
    assert line.endswith("the end")
    assert len(line) <= 4000


class HangsUp(paramiko.ServerInterface):  # type: ignore[misc]  # its types are not known
    """A server that is gone when it hears the password."""

    transport: paramiko.Transport

    def check_auth_password(self, username: str, password: str) -> int:
        self.transport.close()
        return int(paramiko.AUTH_FAILED)

    def get_allowed_auths(self, username: str) -> str:
        return "password"


class TestSsh:
    @pytest.fixture
    def sshd(self, tmp_path: Path) -> Iterator[Sshd]:
        server = Sshd(tmp_path / "sshd")
        yield server
        server.close()

    def test_last_words_do_not_write_to_the_terminal(self, sshd: Sshd) -> None:
        script = f"import sys; sys.stderr.write({EVIL!r}); sys.exit(3)"
        link = SshLink(sshd.config(), command_line(script), timeout=PATIENCE)
        try:
            assert link.receive() == b""
            assert link.ended is not None
            assert "said: " in link.ended
            assert is_tame(link.ended)
        finally:
            link.close()

    def test_passwords_are_in_no_report(
        self, sshd: Sshd, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever fails: pytest shows with what functions were called, and what their variables are."""
        password = "correct horse"
        monkeypatch.setenv("PASSWORD", password)
        locked = sshd.new_key("locked", "battery staple")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=_serve_rudely, args=(listener, sshd.host_key))
            thread.start()
            rude = listener.getsockname()[1]
            pytester.makepyfile(
                f"""
                import os
                from pathlib import Path
                import pytest
                from pytest_kdriver.guest.links.ssh import SshConfig, SshLink

                @pytest.mark.parametrize("changes", [
                    dict(port={rude}), dict(), dict(key=Path({str(locked)!r})),
                ], ids=["hangs-up", "refused", "locked"])
                def test_it(changes):
                    SshLink(SshConfig(**dict(
                        host="127.0.0.1", port={sshd.port}, user="tester", agent=False,
                        password=os.environ["PASSWORD"], known_hosts=Path({str(sshd.known_hosts)!r}),
                        host_key_alias="[127.0.0.1]:{sshd.port}",
                    ) | changes), "x", timeout={PATIENCE})
                """
            )
            arguments = ("-vv", "--showlocals", "--log-level=DEBUG")
            result = pytester.runpytest_subprocess(*arguments, timeout=120)
            thread.join(PATIENCE)
        result.assert_outcomes(failed=3)
        told = "\n".join([*result.outlines, *result.errlines])
        assert "it hung up after the password" in told
        assert "tried: the password." in told
        assert "locked can't be read" in told
        assert password not in told


def _serve_rudely(listener: socket.socket, host_key: Path) -> None:
    connection, _ = listener.accept()
    transport = paramiko.Transport(connection)
    transport.add_server_key(paramiko.PKey.from_path(host_key))
    server = HangsUp()
    server.transport = transport
    with suppress(paramiko.SSHException, EOFError):
        transport.start_server(server=server)
    transport.join(PATIENCE)
