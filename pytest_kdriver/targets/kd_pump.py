"""The pumps of a kernel that talks over a serial port: the thread that answers it, and feeds the log.

A kernel that prints to its debugger stops all of the guest's processors until the print is acknowledged. So
what a source has to send is sent before anybody looks at what it says.
"""

from __future__ import annotations

import array
import fcntl
import math
import select
import socket
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from pytest_kdriver.errors import ConfigError, LinkError
from pytest_kdriver.kernel.events import Event, KernelMessage, ProcessorState
from pytest_kdriver.kernel.sources.kd.session import KdSession, KdState
from pytest_kdriver.kernel.sources.source import Source

RECEIVE_BUFFER: Final = 1 << 16
MOST_UNSENT: Final = 1 << 16
"""Bytes that the guest did not take, at which it is given up on. An acknowledgement has 16."""

LOOK: Final = 0.5
"""Seconds after which the thread looks at the clock, also where nothing comes: see ``Lag``."""

HELD_UP: Final = 1.0
"""Seconds without an answer that are told of."""

GIVEN_UP: Final = 10.0
"""Seconds without an answer after which a kernel may have gone on without a debugger. ReactOS's sends 20
times, and waits some 205,000 reads of a port each time (drivers/base/kdcom), then drops what it prints."""

JOIN: Final = 0.3
"""Seconds for which a part of a print may be kept for the rest of it, with a margin."""

CLOSE_TIMEOUT: Final = 1.0
"""Seconds in which a kernel that stands in a stop is helped out of it before a pump is closed."""

ATTEMPT: Final = 5.0
"""Seconds that one attempt to connect may take."""

GONE: Final = "the machine's serial port is gone"
_NO_ANSWER: Final = "the guest's kernel does not answer its debugger any more"
_RETRY: Final = 0.05
_AT_ONCE: Final = 20e-6
"""A poll that is over so soon did not wait."""

_BUSY: Final = 1e-3
"""Seconds since the last look, after which it is asked what was there meanwhile."""


class Sink(Protocol):
    """What takes events, as a kernel log does."""

    def append(self, events: Sequence[Event], /) -> None:
        """Take them, in order."""
        ...


class SerialSource(Source, Protocol):
    """A source of what a kernel says on a serial port."""

    def attach(self, now: float) -> None:
        """Begin to meet a guest that runs already, or was put back to a snapshot."""
        ...


@dataclass(frozen=True, slots=True)
class Lag:
    """How long the guest waited for us, in seconds: from its bytes in the socket to our answer's.

    Each time is the most that it can have been: where bytes were there when the thread looked, it counts from
    its last answer, or from when it had looked before. Where this process had no processor, or the thread not
    the interpreter, that is seen if it took longer than ``LOOK``.
    """

    longest: float
    mean: float
    answers: int


@dataclass(slots=True)
class _Task:
    """What another thread wants done by the pump's; it waits for ``over``."""

    begin: Callable[[float], object]
    is_done: Callable[[Sequence[Event]], bool]
    needs_port: bool
    over: threading.Event = field(default_factory=threading.Event)
    error: LinkError | None = None


class SerialPump:
    """Reads from a machine's serial port until ``close``, and always: who waits for it is the guest.

    ``address`` is the path of a Unix socket, or ``unix:PATH`` or ``tcp:HOST:PORT``. It may take ``timeout``
    seconds until somebody listens there. Owns the socket, a thread and the source, which nobody else may
    touch. ``failure`` says why the log can't be relied on; None while it can.

    Raises ``LinkError`` where nobody listens, and ``ConfigError`` for an address that is none.
    """

    failure: str | None = None
    carries_words: bool = False
    """See ``LogFeed``."""

    def __init__(
        self,
        address: Path | str,
        source: SerialSource,
        log: Sink,
        name: str,
        *,
        timeout: float = 0.0,
    ) -> None:
        self._address = f"unix:{address}" if isinstance(address, Path) else address
        self._source = source
        self._log = log
        self._poll = select.poll()
        self._connection: socket.socket | None = None
        self._unsent = b""
        self._asked: deque[_Task] = deque()
        self._tasks: list[_Task] = []
        self._closing = False
        self._answers = 0
        self._waited = 0.0
        self._longest = 0.0
        self._looked = time.monotonic()
        """When the guest had all that it waited for, as far as that is known."""
        self._adopt(connect(self._address, timeout))
        self._wake, self._woken = socket.socketpair()
        self._poll.register(self._woken, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name=f"kdriver-pump-{name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the port is still there."""
        return self._connection is not None

    @property
    def lag(self) -> Lag:
        """How long the guest waited for us so far."""
        return Lag(self._longest, self._waited / max(self._answers, 1), self._answers)

    def describe(self) -> str:
        """See ``LogFeed``."""
        lag = self.lag
        if not lag.answers:
            return ""
        mean, longest = lag.mean * 1e6, lag.longest * 1e3
        return f"it waited {mean:.0f} us for its debugger on average, {longest:.0f} ms at most"

    def attach(self) -> None:
        """Begin to meet the guest, and wait for no answer. Raises ``LinkError``."""
        self._ask(self._attach)

    def begin(self, timeout: float) -> None:
        """Have the log follow the guest from here on: one that runs already, or was put back to a snapshot.

        Raises ``LinkError`` where the port is gone, ``TimeoutError`` where the guest does not answer.
        """
        self._ask(self._attach, timeout)

    def catch_up(self) -> None:
        """Have the log hold what the guest said before this call; of a KD kernel, what was answered."""
        deadline = time.monotonic() + JOIN
        self._ask(
            lambda _: None,
            is_done=lambda _: self._is_at_rest or time.monotonic() >= deadline,
            needs_port=False,
        )

    def reconnect(self, timeout: float) -> None:
        """Take up the port of a machine that was started anew, once somebody listens there.

        A guest that runs there already has to be met by ``begin``. Raises ``LinkError`` where nobody listens.
        """
        self._ask(lambda _: self._drop(), needs_port=False)
        connection = connect(self._address, timeout)
        try:
            self._ask(lambda _: self._adopt(connection), needs_port=False)
        except LinkError:
            connection.close()
            raise

    def close(self) -> None:
        """Read what has arrived, help the kernel out of a stop, and end; the thread is gone afterwards."""
        if not self._closing:
            self._closing = True
            self._wake.close()
        self._thread.join()
        self._woken.close()

    def _ask(
        self,
        begin: Callable[[float], object],
        timeout: float | None = None,
        *,
        is_done: Callable[[Sequence[Event]], bool] = lambda _: True,
        needs_port: bool = True,
        told: Callable[[], str] = lambda: "the guest did not answer",
    ) -> None:
        """Have the pump's thread do ``begin``; wait until ``is_done``, which sees each batch of events."""
        task = _Task(begin, is_done, needs_port)
        self._asked.append(task)
        with suppress(OSError):  # it is closed, or about to wake anyway
            self._wake.send(b"!", socket.MSG_DONTWAIT)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        try:
            while not task.over.wait(max(min(deadline - time.monotonic(), LOOK), 0.0)):
                if not self._thread.is_alive():
                    raise LinkError("the serial port is not served any more")
                if time.monotonic() >= deadline:
                    raise TimeoutError(told())
        finally:
            task.over.set()
        if task.error is not None:
            raise task.error

    # for its own thread

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._drop()

    def _serve(self) -> None:
        closing: float | None = None
        while closing is None or not self._may_close(closing):
            deadline = self._source.next_deadline()
            asked = time.monotonic()
            timeout = LOOK if deadline is None else max(min(deadline - asked, LOOK), 0.0)
            ready = self._poll.poll(0) if asked - self._looked > _BUSY else []
            were_there = bool(ready)
            if not ready:
                ready = self._poll.poll(timeout * 1000)
            now = time.monotonic()
            were_there = were_there or now - asked < _AT_ONCE
            if now - asked - timeout > HELD_UP:
                self._note_hold_up(now - asked - timeout)
            data, is_woken = b"", False
            for handle, what in ready:
                if handle == self._woken.fileno():
                    is_woken = True
                else:
                    if what & select.POLLOUT:
                        self._send(b"")
                    if what & ~select.POLLOUT:
                        data = self._receive()
            if data or deadline is not None or self._tasks:
                self._feed(data, now, self._looked if were_there else now)
            else:
                self._looked = now
            if is_woken:
                if not self._woken.recv(64):
                    self._poll.unregister(self._woken)
                    self._read_all()
                    closing = now
                self._take_up_tasks()

    def _feed(self, data: bytes, now: float, since: float) -> None:
        """Have the source take ``data``, which came at ``since`` or later; answer, then think."""
        events: Sequence[Event] = ()
        self._looked = now
        try:
            events = self._source.receive_data(data, now)
            answer = self._source.data_to_send()
            if answer:
                self._send(answer)
                self._looked = time.monotonic()
                if data:
                    waited = self._looked - since
                    self._answers += 1
                    self._waited += waited
                    if waited > self._longest:  # noqa: PLR1730 -- max() takes longer
                        self._longest = waited
                    if waited > HELD_UP:
                        self._note_hold_up(waited)
            if events:
                self._log.append(events)
        except Exception as error:  # a mistake of ours must not stay unseen
            self._fail(f"{type(error).__name__}: {error}")
        if self._tasks:
            self._settle(events)

    def _send(self, answer: bytes) -> None:
        """Send what can be sent now; the rest when the guest has taken that."""
        if self._connection is None:
            return
        unsent = self._unsent + answer
        try:
            unsent = unsent[self._connection.send(unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # it is gone, which is told when all that it said was read
            unsent = b""
        if len(unsent) > MOST_UNSENT:
            self._fail("the guest takes no answers")
            unsent = b""
        if unsent or self._unsent:
            self._unsent = unsent
            events = select.POLLIN | select.POLLOUT if unsent else select.POLLIN
            self._poll.modify(self._connection, events)

    def _receive(self) -> bytes:
        """What came; where that is the port's end, nothing."""
        if self._connection is None:
            return b""
        try:
            data = self._connection.recv(RECEIVE_BUFFER)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._drop()
            self._fail(GONE, "the kernel log ends here")
        return data

    def _read_all(self) -> None:
        """Take what the socket holds now."""
        count = array.array("i", [0])
        if self._connection is not None:
            fcntl.ioctl(self._connection, termios.FIONREAD, count)
        left = count[0]
        while left > 0 and self._connection is not None:
            now = time.monotonic()
            data = self._receive()
            left -= max(len(data), 1)
            self._feed(data, now, now)

    def _take_up_tasks(self) -> None:
        while self._asked:
            task = self._asked.popleft()
            self._read_all()
            now = time.monotonic()
            if self._connection is not None or not task.needs_port:
                task.begin(now)
            self._tasks.append(task)
            self._feed(b"", now, now)

    def _settle(self, events: Sequence[Event]) -> None:
        """End the tasks that are done, that can't be any more, or that nobody waits for."""
        for task in self._tasks:
            if task.needs_port and self._connection is None:
                task.error = LinkError(GONE)
                task.over.set()
            elif task.is_done(events):
                task.over.set()
        self._tasks = [task for task in self._tasks if not task.over.is_set()]

    def _attach(self, now: float) -> None:
        self.failure = None
        self._source.attach(now)

    def _adopt(self, connection: socket.socket) -> None:
        self._connection = connection
        self._poll.register(connection, select.POLLIN)
        self.failure = None

    def _drop(self) -> None:
        if self._connection is not None:
            self._poll.unregister(self._connection)
            self._connection.close()
            self._connection = None
            self._unsent = b""

    @property
    def _is_at_rest(self) -> bool:
        """Whether the source keeps nothing that it would tell soon."""
        deadline = self._source.next_deadline()
        return deadline is None or deadline - time.monotonic() > JOIN

    def _may_close(self, since: float) -> bool:
        over = time.monotonic() - since > CLOSE_TIMEOUT
        return over or self._connection is None or self._is_at_rest

    def _note_hold_up(self, seconds: float) -> None:
        """Tell of a time in which the guest had no answer, and may have stood still."""
        self._longest = max(self._longest, seconds)
        told = f"nobody answered the guest for {seconds:.1f} s: this process was held up"
        self._log.append([KernelMessage(time.monotonic(), None, told)])

    def _fail(self, reason: str, what: str = "the kernel log can't be relied on from here") -> None:
        if self.failure is None:
            self.failure = reason
            self._log.append([KernelMessage(time.monotonic(), None, f"{what}: {reason}")])


class KdPump(SerialPump):
    """The same, for a kernel that speaks KD: it is served by ``session``, a new one if there is none.

    A kernel that does not answer any more is a ``failure``, until it does again.
    """

    def __init__(
        self,
        address: Path | str,
        log: Sink,
        name: str,
        *,
        session: KdSession | None = None,
        timeout: float = 0.0,
    ) -> None:
        self._session = session if session is not None else KdSession()
        super().__init__(address, self._session, log, name, timeout=timeout)

    @property
    def state(self) -> KdState:
        """What is known of the kernel."""
        return self._session.state

    @property
    def attached(self) -> bool:
        """Whether the kernel and we agree on where we are, so that it can be asked things."""
        return self._session.attached

    def begin(self, timeout: float) -> None:
        """Meet the kernel; see ``SerialPump``."""
        self._ask(
            self._attach,
            timeout,
            is_done=lambda _: self._session.attached,
            told=lambda: f"no kernel answered its debugger within {timeout:g} s: {self._why()}",
        )

    def break_in(self, timeout: float) -> None:
        """Have the log hold a ``ProcessorState`` of each processor; the kernel goes on.

        Raises ``LinkError`` where the port is gone, ``TimeoutError`` where the kernel does not stop.
        """
        told: list[Event] = []

        def is_done(events: Sequence[Event]) -> bool:
            told.extend(event for event in events if isinstance(event, ProcessorState))
            return bool(told) and self._session.state is not KdState.STOPPED

        self._ask(
            self._session.break_in,
            timeout,
            is_done=is_done,
            told=lambda: (
                f"the kernel did not stop for its debugger within {timeout:g} s: it may be "
                "spinning with its interrupts off"
            ),
        )

    def end_of_boot(self) -> None:
        """From here on breakpoints and assertions are events."""
        self._ask(lambda _: self._session.end_of_boot(), needs_port=False)

    def go_on(self) -> None:
        """Let a kernel that is held behind a bug check write its dump and reboot."""
        self._ask(self._session.go_on)

    def _why(self) -> str:
        if not self._session.was_heard:
            return (
                "is debugging on in the guest (bcdedit /debug on, /dbgsettings serial debugport:1), "
                "and has nobody else this port?"
            )
        return "it was heard, but does not do what it is asked"

    def _feed(self, data: bytes, now: float, since: float) -> None:
        super()._feed(data, now, since)
        if self._session.state is KdState.LOST:
            self.failure = self.failure or _NO_ANSWER
        elif self.failure is _NO_ANSWER:
            self.failure = None

    def _may_close(self, since: float) -> bool:
        over = time.monotonic() - since > CLOSE_TIMEOUT
        return over or (super()._may_close(since) and self._session.state is not KdState.STOPPED)

    def _note_hold_up(self, seconds: float) -> None:
        super()._note_hold_up(seconds)
        if seconds > GIVEN_UP:
            self._fail(f"the guest's kernel had no debugger for {seconds:.1f} s")


def connect(address: str, timeout: float) -> socket.socket:
    """A connection to ``unix:PATH`` or ``tcp:HOST:PORT``, where somebody listens within ``timeout`` seconds.

    It does not block. Raises ``LinkError``, and ``ConfigError`` for what is no address.
    """
    kind, _, where = address.partition(":")
    host, _, port = where.rpartition(":")
    is_tcp = kind == "tcp" and host and port.isdecimal() and int(port) < 1 << 16
    if not where or not (kind == "unix" or is_tcp):
        raise ConfigError(f"{address!r} is no serial port: write unix:PATH or tcp:HOST:PORT")
    deadline = time.monotonic() + timeout
    while True:
        try:
            if is_tcp:
                connection = socket.create_connection((host.strip("[]"), int(port)), ATTEMPT)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            else:
                connection = _connect_unix(where)
        except (ConnectionError, FileNotFoundError, BlockingIOError, TimeoutError) as error:
            if time.monotonic() >= deadline:
                raise LinkError(
                    f"nobody listens at {address}: {error.strerror or error}"
                ) from error
            time.sleep(_RETRY)
        except OSError as error:
            raise LinkError(f"{address}: {error}") from error
        else:
            connection.setblocking(False)
            return connection


def _connect_unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ATTEMPT)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
