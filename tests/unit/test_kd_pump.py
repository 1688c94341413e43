"""The pumps of serial ports: simulated kernels over real sockets, into the log, to the end and beyond."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from pytest_kdriver.errors import ConfigError, LinkError
from pytest_kdriver.kernel.events import (
    Breakpoint,
    BugCheck,
    DebugPrint,
    Event,
    ImageLoaded,
    KernelMessage,
    ProcessorState,
)
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.kd.session import KdSession, KdState
from pytest_kdriver.kernel.sources.text import SerialText
from pytest_kdriver.targets import kd_pump
from pytest_kdriver.targets.kd_pump import HELD_UP, KdPump, SerialPump
from tests.kd.simulator import KERNEL, KdTarget
from tests.nt.debug_port import DebugPort

PATIENCE = 30.0
DRIVER = r"\SystemRoot\System32\drivers\hello.sys"
BASE = 0xFFFFF80300000000


def printed(log: KernelLog) -> list[bytes]:
    return [event.raw for event in log.read() if isinstance(event, DebugPrint)]


def messages(log: KernelLog) -> list[str]:
    return [event.text for event in log.read() if isinstance(event, KernelMessage)]


def wait_for(log: KernelLog, wanted: Callable[[Event], bool]) -> Event:
    found = log.window(None, 0).wait_for(lambda _, event: wanted(event), PATIENCE)
    assert found is not None, list(log.read())
    return found[1]


def wait_until(pump: SerialPump, is_so: Callable[[], bool]) -> None:
    """Wait for what the pump's thread does; ``catch_up`` goes through it."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        pump.catch_up()


def print_packet(text: bytes, identifier: int) -> bytes:
    payload = struct.pack("<IHHII", 0x3230, 15, 0, len(text), 0) + text
    header = struct.pack("<IHHII", 0x30303030, 3, len(payload), identifier, sum(payload))
    return header + payload + b"\xaa"


@contextmanager
def a_port(path: Path) -> Iterator[DebugPort]:
    """A kernel that runs, whose debugger has made no mistake at the end."""
    port = DebugPort(path, processors=2, on_reboot=lambda: None)
    try:
        yield port
    finally:
        port.close()
    assert port.mistakes == []


@contextmanager
def a_pump(path: Path, log: KernelLog) -> Iterator[KdPump]:
    pump = KdPump(path, log, "test")
    try:
        yield pump
    finally:
        pump.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "com1"


@pytest.fixture
def log() -> KernelLog:
    return KernelLog()


@pytest.fixture
def port(path: Path) -> Iterator[DebugPort]:
    with a_port(path) as port:
        yield port


@pytest.fixture
def pump(port: DebugPort, path: Path, log: KernelLog) -> Iterator[KdPump]:
    with a_pump(path, log) as pump:
        port.boot()
        yield pump


@pytest.fixture
def peer(path: Path) -> Iterator[socket.socket]:
    """What listens at the path, to be no kernel."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield server


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no descriptor is left behind a test."""
    handles = Path("/proc/self/fd")
    threads, count = set(threading.enumerate()), len(list(handles.iterdir()))
    yield
    assert set(threading.enumerate()) == threads
    assert len(list(handles.iterdir())) == count


class TestOfAKernelThatRuns:
    def test_its_boot_is_seen_from_the_first_image_on(
        self, port: DebugPort, pump: KdPump, log: KernelLog
    ) -> None:
        pump.catch_up()
        first = next(event for event in log.read() if isinstance(event, ImageLoaded))
        assert first.base == KERNEL
        assert pump.attached
        assert pump.state is KdState.RUNNING

    def test_each_print_is_in_the_log_when_it_was_caught_up_with(
        self, port: DebugPort, pump: KdPump, log: KernelLog
    ) -> None:
        said = [b"line %d\n" % number for number in range(200)]
        for number, line in enumerate(said):
            port.call(partial(KdTarget.print, text=line, processor=number & 1))
            pump.catch_up()
            assert printed(log) == said[: number + 1]

    def test_a_part_of_a_print_is_in_the_log_when_it_was_caught_up_with(
        self, port: DebugPort, pump: KdPump, log: KernelLog
    ) -> None:
        port.call(lambda kd: kd.print(b"x" * 512))
        pump.catch_up()
        assert printed(log) == [b"x" * 512]

    def test_a_kernel_that_has_been_running_is_met(
        self, port: DebugPort, pump: KdPump, path: Path, log: KernelLog
    ) -> None:
        pump.close()
        late = KernelLog()
        with a_pump(path, late) as other:
            assert not other.attached
            other.begin(PATIENCE)
            assert other.attached
            port.call(lambda kd: kd.print("met\n"))
            other.catch_up()
            assert printed(late) == [b"met\n"]

    def test_it_tells_where_its_processors_are_and_goes_on(
        self, port: DebugPort, pump: KdPump, log: KernelLog
    ) -> None:
        pump.break_in(PATIENCE)
        states = [event for event in log.read() if isinstance(event, ProcessorState)]
        assert [state.processor for state in states] == [0, 1]
        port.call(lambda kd: kd.print("on\n"))
        pump.catch_up()
        assert printed(log) == [b"on\n"]

    def test_a_breakpoint_counts_from_the_end_of_its_boot_on(
        self, port: DebugPort, pump: KdPump, log: KernelLog
    ) -> None:
        port.call(lambda kd: kd.load(DRIVER, BASE, 0x5000))
        port.call(lambda kd: kd.breakpoint(BASE + 0x1000))
        pump.end_of_boot()
        port.call(lambda kd: kd.breakpoint(BASE + 0x2000))
        pump.catch_up()
        told = [event for event in log.read() if isinstance(event, Breakpoint)]
        assert [event.address for event in told] == [BASE + 0x2000]

    def test_it_is_held_behind_a_bug_check_until_it_is_let_go_on(
        self, port: DebugPort, pump: KdPump, log: KernelLog
    ) -> None:
        port.post(lambda kd: kd.bug_check(0xD1, (1, 2, 3, 4)))
        told = wait_for(log, lambda event: isinstance(event, BugCheck))
        assert isinstance(told, BugCheck)
        assert told.code == 0xD1
        wait_until(pump, lambda: pump.state is KdState.HELD)
        assert port.kd.stopped
        boots = port.kd.boots
        pump.go_on()
        wait_for(log, lambda event: isinstance(event, ImageLoaded) and event.time > told.time)
        assert port.kd.boots == boots + 1

    def test_it_goes_on_where_it_was_put_back_to(
        self, port: DebugPort, pump: KdPump, log: KernelLog
    ) -> None:
        port.call(lambda kd: kd.print("first\n"))
        port.save()
        for _ in range(3):
            port.call(lambda kd: kd.print("tested\n"))
            port.restore()
            pump.begin(PATIENCE)
            port.call(lambda kd: kd.print("again\n"))
            pump.break_in(PATIENCE)
        pump.catch_up()
        assert printed(log) == [b"first\n", *[b"tested\n", b"again\n"] * 3]

    def test_it_is_known_how_long_it_waited(self, port: DebugPort, pump: KdPump) -> None:
        pump.catch_up()
        before = pump.lag.answers
        for _ in range(10):
            port.call(lambda kd: kd.print("x\n"))
        pump.catch_up()
        lag = pump.lag
        assert lag.answers == before + 10
        assert 0 < lag.mean <= lag.longest

    def test_two_are_served_at_once(self, tmp_path: Path) -> None:
        def talk(port: DebugPort, name: str) -> None:
            port.boot()
            for number in range(100):
                port.call(partial(KdTarget.print, text=f"{name} {number}\n"))

        one, other = KernelLog(), KernelLog()
        with (
            a_port(tmp_path / "one") as port,
            a_port(tmp_path / "other") as other_port,
            a_pump(tmp_path / "one", one) as pump,
            a_pump(tmp_path / "other", other) as other_pump,
        ):
            thread = threading.Thread(target=talk, args=(other_port, "other"))
            thread.start()
            talk(port, "one")
            thread.join()
            pump.catch_up()
            other_pump.catch_up()
        assert printed(one) == [b"one %d\n" % number for number in range(100)]
        assert printed(other) == [b"other %d\n" % number for number in range(100)]


class TestOfTheEnd:
    def test_a_kernel_that_prints_all_the_time_is_left(
        self, port: DebugPort, pump: KdPump, log: KernelLog
    ) -> None:
        for number in range(2000):
            port.post(partial(KdTarget.print, text=f"{number}\n"))
        wait_for(log, lambda event: isinstance(event, DebugPrint))
        pump.close()
        said = printed(log)
        assert 0 < len(said) <= 2000
        assert said == [b"%d\n" % number for number in range(len(said))]

    def test_no_kernel_is_left_in_a_stop(self, port: DebugPort, path: Path) -> None:
        boot = threading.Thread(target=port.boot)
        for number in range(5):
            log = KernelLog()
            with a_pump(path, log):
                if number == 0:
                    boot.start()
                else:
                    base = BASE + number * 0x10000
                    port.post(partial(KdTarget.load, path=DRIVER, base=base, size=0x5000))
                wait_for(log, lambda event: isinstance(event, ImageLoaded))
            assert not port.kd.stopped
        boot.join()

    def test_it_can_be_closed_twice_and_is_asked_nothing_more(self, pump: KdPump) -> None:
        pump.close()
        pump.close()
        with pytest.raises(LinkError, match="not served"):
            pump.begin(PATIENCE)


class TestOfALostPort:
    def test_it_is_a_failure_and_said_in_the_log(
        self, port: DebugPort, pump: KdPump, log: KernelLog
    ) -> None:
        port.hang_up()
        wait_until(pump, lambda: not pump.alive)
        assert pump.failure == "the machine's serial port is gone"
        assert messages(log) == ["the kernel log ends here: the machine's serial port is gone"]

    def test_who_asks_is_told(self, port: DebugPort, pump: KdPump) -> None:
        port.hang_up()
        wait_until(pump, lambda: not pump.alive)
        asked: list[Callable[[], None]] = [
            partial(pump.begin, PATIENCE),
            partial(pump.break_in, PATIENCE),
            pump.attach,
            pump.go_on,
        ]
        for ask in asked:
            with pytest.raises(LinkError, match="is gone"):
                ask()

    def test_who_waits_is_told(self, peer: socket.socket, path: Path, log: KernelLog) -> None:
        def hang_up() -> None:
            connection.recv(1)
            connection.close()

        with a_pump(path, log) as pump:
            connection, _ = peer.accept()
            thread = threading.Thread(target=hang_up)
            thread.start()
            began = time.monotonic()
            with pytest.raises(LinkError, match="is gone"):
                pump.begin(PATIENCE)
            assert time.monotonic() - began < PATIENCE
            thread.join()

    def test_a_machine_that_is_started_anew_is_taken_up_again(
        self, path: Path, log: KernelLog
    ) -> None:
        with ExitStack() as stack:
            with a_port(path) as port:
                pump = stack.enter_context(a_pump(path, log))
                port.boot()
                port.call(lambda kd: kd.print("before\n"))
            wait_until(pump, lambda: not pump.alive)
            path.unlink()
            machines: list[DebugPort] = []
            start = threading.Timer(0.2, lambda: machines.append(stack.enter_context(a_port(path))))
            start.start()
            pump.reconnect(PATIENCE)
            start.join()
            assert pump.alive
            assert pump.failure is None
            (anew,) = machines
            anew.boot()
            assert pump.attached
            anew.call(lambda kd: kd.print("behind\n"))
            pump.break_in(PATIENCE)
        assert printed(log) == [b"before\n", b"behind\n"]

    def test_one_that_stays_away_is_an_error(self, path: Path, log: KernelLog) -> None:
        with ExitStack() as stack:
            with a_port(path):
                pump = stack.enter_context(a_pump(path, log))
            path.unlink()
            with pytest.raises(LinkError, match=f"nobody listens at unix:{path}"):
                pump.reconnect(0.1)
            assert not pump.alive

    def test_what_it_said_last_is_read(
        self, peer: socket.socket, path: Path, log: KernelLog
    ) -> None:
        pump = SerialPump(path, SerialText(), log, "test")
        connection, _ = peer.accept()
        with connection:
            connection.sendall(b"last\n" * 100_000)
        wait_until(pump, lambda: not pump.alive)
        pump.close()
        assert b"".join(printed(log)) == b"last\n" * 100_000


class TestOfAKernelThatIsNone:
    def test_one_that_never_answers_is_an_error_in_words(
        self, peer: socket.socket, path: Path, log: KernelLog
    ) -> None:
        with a_pump(path, log) as pump:
            with pytest.raises(TimeoutError, match="no kernel answered .* is debugging on"):
                pump.begin(0.2)
            with pytest.raises(TimeoutError, match="the kernel did not stop"):
                pump.break_in(0.2)
            assert pump.state is KdState.SILENT

    def test_one_that_takes_no_answers_is_given_up_on(
        self, peer: socket.socket, path: Path, log: KernelLog
    ) -> None:
        packets = print_packet(b"x\n", 0x80800000) + print_packet(b"x\n", 0x80800001)
        with a_pump(path, log) as pump:
            connection, _ = peer.accept()
            with connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
                while pump.failure is None:
                    connection.sendall(packets * 100)
            assert pump.failure == "the guest takes no answers"

    def test_one_that_answers_no_more_is_a_failure_until_it_does(
        self, peer: socket.socket, path: Path, log: KernelLog
    ) -> None:
        class Quick(KdSession):
            """A session that loses the kernel at a word, and not after its own 20 s."""

            def receive_data(self, data: bytes, now: float) -> list[Event]:
                if data == b"lost":
                    self.state = KdState.LOST
                    return []
                return super().receive_data(data, now)

        pump = KdPump(path, log, "test", session=Quick())
        connection, _ = peer.accept()
        with connection:
            connection.sendall(b"lost")
            wait_until(pump, lambda: pump.failure is not None)
            assert pump.failure == "the guest's kernel does not answer its debugger any more"
            connection.sendall(print_packet(b"back\n", 0x80800800))
            wait_for(log, lambda event: isinstance(event, DebugPrint))
            wait_until(pump, lambda: pump.failure is None)
        pump.close()

    def test_a_source_that_breaks_is_told(
        self, peer: socket.socket, path: Path, log: KernelLog
    ) -> None:
        class Breaking(SerialText):
            def receive_data(self, data: bytes, now: float) -> list[Event]:
                if data == b"break":
                    raise ValueError("it broke")
                return super().receive_data(data, now)

        pump = SerialPump(path, Breaking(), log, "test")
        connection, _ = peer.accept()
        with connection:
            connection.sendall(b"break")
            wait_for(log, lambda event: isinstance(event, KernelMessage))
            connection.sendall(b"more\n")
            pump.catch_up()
        pump.close()
        assert pump.failure == "ValueError: it broke"
        told = "the kernel log can't be relied on from here: ValueError: it broke"
        assert messages(log) == [told]
        assert printed(log) == [b"more\n"]


class TestOfText:
    @pytest.fixture
    def connection(self, peer: socket.socket, text: SerialPump) -> Iterator[socket.socket]:
        connection, _ = peer.accept()
        with connection:
            connection.settimeout(PATIENCE)
            yield connection

    @pytest.fixture
    def text(self, peer: socket.socket, path: Path, log: KernelLog) -> Iterator[SerialPump]:
        pump = SerialPump(path, SerialText(), log, "test")
        yield pump
        pump.close()

    def test_what_was_written_before_is_in_the_log(
        self, connection: socket.socket, text: SerialPump, log: KernelLog
    ) -> None:
        text.begin(PATIENCE)
        for number in range(1000):
            connection.sendall(b"%d\r\n" % number)
            text.catch_up()
            assert len(log) == number + 1

    def test_what_is_no_whole_line_is_in_the_log_too(
        self, connection: socket.socket, text: SerialPump, log: KernelLog
    ) -> None:
        connection.sendall(b"cut")
        text.catch_up()
        assert printed(log) == [b"cut"]

    def test_a_prompt_is_answered(self, connection: socket.socket) -> None:
        connection.sendall(b"\r\n--- Press q to abort, any other key to continue ---")
        assert connection.recv(10) == b"q"

    def test_it_rests_when_nothing_is_said(
        self, connection: socket.socket, text: SerialPump, log: KernelLog
    ) -> None:
        before = time.process_time()
        log.wait(0, time.monotonic() + 0.3)
        assert time.process_time() - before < 0.2


class Held(KernelLog):
    """A log that takes its first event when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()

    def append(self, events: Sequence[Event]) -> None:
        self.let.wait(PATIENCE)
        super().append(events)


class TestOfATimeInWhichNobodyAnswered:
    @pytest.fixture
    def held(self) -> Held:
        return Held()

    @contextmanager
    def printed_while_held(self, peer: socket.socket, held: Held) -> Iterator[None]:
        """Have a print wait for more than ``HELD_UP``, behind another one that holds up the pump."""
        connection, _ = peer.accept()
        later = threading.Timer(HELD_UP + 0.1, held.let.set)
        with connection:
            connection.settimeout(PATIENCE)
            connection.sendall(print_packet(b"first\n", 0x80800800))
            assert len(connection.recv(100)) == 16
            connection.sendall(print_packet(b"second\n", 0x80800001))
            later.start()
            assert len(connection.recv(100)) == 16
            wait_for(held, lambda event: isinstance(event, KernelMessage))
            yield
        later.join()

    def test_it_is_told_and_no_more(self, peer: socket.socket, path: Path, held: Held) -> None:
        with a_pump(path, held) as pump, self.printed_while_held(peer, held):
            pump.catch_up()
            assert pump.failure is None
            assert pump.lag.longest > HELD_UP
            assert "nobody answered the guest for 1." in messages(held)[0]
            assert printed(held) == [b"first\n", b"second\n"]

    def test_it_is_a_failure_where_the_kernel_may_have_gone_on(
        self, peer: socket.socket, path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kd_pump, "GIVEN_UP", HELD_UP)
        with a_pump(path, held) as pump, self.printed_while_held(peer, held):
            pump.catch_up()
            assert pump.failure is not None
            assert "had no debugger for 1." in pump.failure


class TestOfAddresses:
    @pytest.mark.parametrize(
        "address",
        [
            "",
            "com1",
            "/run/com1",
            "unix:",
            "tcp:",
            "tcp:localhost",
            "tcp:host:x",
            "tcp::1",
            "udp:h:1",
        ],
    )
    def test_what_is_none_is_told(self, address: str, log: KernelLog) -> None:
        with pytest.raises(ConfigError, match="write unix:PATH or tcp:HOST:PORT"):
            KdPump(address, log, "test")

    def test_where_nobody_listens_it_is_told(self, path: Path, log: KernelLog) -> None:
        with pytest.raises(LinkError, match=f"nobody listens at unix:{path}: No such file"):
            KdPump(path, log, "test")

    def test_what_can_be_no_socket_is_told_at_once(self, path: Path, log: KernelLog) -> None:
        with pytest.raises(LinkError, match="path too long"):
            KdPump(path / ("x" * 100), log, "test", timeout=PATIENCE)

    def test_who_comes_late_is_waited_for(self, path: Path, log: KernelLog) -> None:
        server = socket.socket(socket.AF_UNIX)

        def come() -> None:
            server.bind(str(path))
            server.listen()

        coming = threading.Timer(0.2, come)
        coming.start()
        pump = KdPump(f"unix:{path}", log, "test", timeout=PATIENCE)
        assert pump.alive
        pump.close()
        coming.join()
        server.close()

    def test_a_tcp_port_will_do(self, log: KernelLog) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            host, number = server.getsockname()
            pump = SerialPump(f"tcp:{host}:{number}", SerialText(), log, "test")
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"hello\n")
                wait_for(log, lambda event: isinstance(event, DebugPrint))
            pump.close()
        assert printed(log) == [b"hello\n"]
