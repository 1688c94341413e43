"""The pump of a virtual machine: the thread that feeds a source from one of the machine's ports."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import LinkError
from pytest_kdriver.kernel.events import KernelMessage
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.source import Source
from pytest_kdriver.port_stream import SYNC_INTERVAL, HostStream, new_nonce

RECEIVE_BUFFER: Final = 1 << 16


class PortPump:
    """Reads from the Unix socket of a machine's port until ``close``, and always: a port that is not read
    holds up the guest.

    Owns the socket, a thread and the sources, which ``new_source`` makes: one for each session, since what a
    source knows of the guest is void when that is put back. ``failure`` says why nothing more comes.
    Raises ``LinkError`` where nobody listens there.
    """

    failure: str | None = None
    carries_words = True

    def __init__(
        self, path: Path, new_source: Callable[[], Source], log: KernelLog, name: str
    ) -> None:
        self._new_source = new_source
        self._source = new_source()
        self._log = log
        self._stream = HostStream()
        self._changed = threading.Condition()
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connection.connect(str(path))
        except OSError as error:
            self._connection.close()
            raise LinkError(f"the kernel log's port {path.name}: {error}") from error
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"kdriver-pump-{name}", daemon=True)
        self._thread.start()

    def begin(self, timeout: float) -> None:
        """Begin a session: what the log gets from here on was said behind this call.

        Raises ``TimeoutError`` where the guest does not answer, ``LinkError`` where the port is gone.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            if not self.alive:
                raise LinkError("the kernel log's port is gone")
            self.failure = None
            self._source = self._new_source()
            asking = self._stream.begin(new_nonce())
            while True:
                self._send(asking)
                if self._answered(min(deadline, time.monotonic() + SYNC_INTERVAL)):
                    return
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"the kernel log's port did not answer in {timeout:g} s")
                asking = self._stream.sync()

    @property
    def alive(self) -> bool:
        """Whether the port is still there: a session can be begun."""
        return self._thread.is_alive()

    def describe(self) -> str:
        """See ``LogFeed``."""
        return ""

    def close(self) -> None:
        """Stop; the thread is gone afterwards."""
        self._closing = True
        with suppress(OSError):  # the other side was first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    def _answered(self, until: float) -> bool:
        """Wait for the answer; the lock is held, and given back for the while."""
        self._changed.wait_for(
            lambda: self._stream.synced or self.failure is not None,
            max(until - time.monotonic(), 0.0),
        )
        if self.failure is not None:
            raise LinkError(f"the kernel log's port: {self.failure}")
        return self._stream.synced

    def _send(self, mark: bytes) -> None:
        """Send a mark. Where nobody reads yet there are others in the socket's buffer, and they will do."""
        with suppress(BlockingIOError):
            try:
                self._connection.send(mark, socket.MSG_DONTWAIT)
            except ConnectionError as error:
                raise LinkError("the kernel log's port is gone") from error

    def _run(self) -> None:
        while not self._closing:
            try:
                data = self._connection.recv(RECEIVE_BUFFER)
            except OSError:
                data = b""
            with self._changed:
                if data:
                    self._take(data)
                elif not self._closing:
                    self._fail("the machine's port is gone")
                self._changed.notify_all()
            if not data:
                return

    def _take(self, data: bytes) -> None:
        payload = self._stream.receive_data(data)
        if payload and self.failure is None:
            try:
                self._log.append(self._source.receive_data(payload, time.monotonic()))
            except (
                Exception
            ) as error:  # a mistake of ours must not hold up the guest, nor stay unseen
                self._fail(f"{type(error).__name__}: {error}")
        if self._stream.ended is not None and self.failure is None:
            self._fail(self._stream.ended)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        told = f"the kernel log ends here: {reason}"
        self._log.append([KernelMessage(time.monotonic(), None, told)])
