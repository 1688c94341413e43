"""An agent at a serial port of a virtual machine, which the machine's host has as a Unix socket."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from pathlib import Path

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.outbox import Outbox
from pytest_kdriver.port_stream import SYNC_INTERVAL, HostStream, encode_payload, new_nonce

_CHUNK = 1 << 16
_RETRY = 0.05
"""How long, in seconds, until a socket is tried again at which too many wait."""


class SerialLink:
    """A ``Link`` to an agent that stays (``kdagent --end resident``, ``--end port``).

    ``path`` is the socket of QEMU's character device. The link is there when the agent has answered, and its
    end is the socket's, or that another agent has begun to serve the port. ``close`` leaves the agent there.

    ``LinkError`` if the socket can't be connected to, ``TimeoutError`` if no agent answers within ``timeout``
    seconds.
    """

    def __init__(self, path: Path, *, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._path = path
        self._socket = _connect(path, deadline, timeout)
        self._wake = os.eventfd(0)
        self._stream = HostStream()
        self._suspended = False
        self._closed = False
        self._gone: str | None = None
        self._received = b""
        self._outbox = Outbox(self._write)
        self._receiving = threading.Lock()
        self._closing = threading.Lock()
        try:
            self._begin(deadline, timeout)
        except BaseException:
            self.close()
            raise

    def suspend(self) -> None:
        """End this session: from now on ``receive`` gives ``b""``, and ``send`` is a ``LinkError``.

        Who waits in one of them returns at once. ``resync`` begins the next session.
        """
        with self._closing:
            if not self._closed:
                self._suspended = True
                os.eventfd_write(self._wake, 1)

    def resync(self, timeout: float) -> None:
        """Begin a new session over the same socket, after the guest was put back to a snapshot, say.

        Whatever is still on its way is dropped. ``TimeoutError`` if the agent does not answer in time, and
        ``LinkError`` if the socket is gone: no session is there then, but it may be tried again.
        """
        deadline = time.monotonic() + timeout
        self.suspend()
        with self._outbox.lock, self._receiving:
            if self._closed:
                raise LinkError("the link is closed")
            os.eventfd_read(self._wake)
            self._outbox.clear()
            self._begin(deadline, timeout)
            self._suspended = False

    def _begin(self, deadline: float, timeout: float) -> None:
        """Ask for a new session until the answer comes or the time is up. The caller holds both locks."""
        self._received = b""
        sync = self._stream.begin(new_nonce())
        unsent = b""
        again = 0.0
        while not self._stream.synced:
            now = time.monotonic()
            if now >= deadline:
                raise TimeoutError(
                    f"no agent answered at {self._path} within {timeout:g} s: "
                    "perhaps none runs in the guest, or another program is connected to this socket"
                )
            if not unsent and now >= again:
                unsent, again = sync, now + SYNC_INTERVAL
            until = deadline if unsent else min(again, deadline)
            ready = self._poll(select.POLLIN | (select.POLLOUT if unsent else 0), until - now)
            if self._closed:
                raise LinkError("the link is closed")
            if ready & select.POLLOUT:
                unsent = unsent[self._send_some(unsent) :]
            if ready & ~select.POLLOUT:
                self._take()
            if self._gone is not None:
                raise LinkError(self._gone)

    @property
    def ended(self) -> str | None:
        """See ``Link.ended``."""
        return self._stream.ended or self._gone

    def send(self, data: bytes, timeout: float) -> None:
        """See ``Link.send``."""
        self._outbox.send(encode_payload(data), timeout)

    def _write(self, data: bytes, deadline: float) -> bytes:
        rest = memoryview(data)
        while rest and self._why_not() is None:
            ready = self._poll(select.POLLOUT, max(0.0, deadline - time.monotonic()))
            if self._why_not() is None:
                if not ready:
                    return bytes(rest)
                rest = rest[self._send_some(rest[:_CHUNK]) :]
        if rest:
            raise LinkError(self._why_not() or "")
        return b""

    def _why_not(self) -> str | None:
        """Why nothing can be sent or received; None if it can."""
        if self._closed:
            return "the link is closed"
        if self._suspended:
            return "the guest is being put back"
        if self._stream.ended is not None:
            return f"the agent is gone: {self._stream.ended}"
        return self._gone

    def _send_some(self, data: bytes | memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._gone = PORT_GONE
            return 0

    def receive(self) -> bytes:
        """See ``Link.receive``."""
        with self._receiving:
            while not self._received and self._why_not() is None:
                self._poll(select.POLLIN, None)
                if self._why_not() is None:
                    self._take()
            received, self._received = self._received, b""
            return received if not (self._closed or self._suspended) else b""

    def _take(self) -> None:
        """Take what came, or learn that the socket is gone."""
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._received += self._stream.receive_data(data)
        else:
            self._gone = PORT_GONE

    def _poll(self, events: int, timeout: float | None) -> int:
        """Wait for the socket, ``suspend`` or ``close``; what of the socket is there."""
        poll = select.poll()
        poll.register(self._socket, events)
        poll.register(self._wake, select.POLLIN)
        ready = poll.poll(None if timeout is None else timeout * 1000)
        return dict(ready).get(self._socket.fileno(), 0)

    def close(self) -> None:
        """See ``Link.close``."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
            with self._outbox.lock, self._receiving:
                self._socket.close()
                os.close(self._wake)


PORT_GONE = "the virtual machine's port is gone"


def _connect(path: Path, deadline: float, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        while not _try_connect(connection, path):
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"{path} took no connection within {timeout:g} s: other programs are connected to it"
                )
            time.sleep(_RETRY)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise LinkError(
                f"{path} can't be connected to: {error}; is the machine that it belongs to running?"
            ) from error
        raise
    return connection


def _try_connect(connection: socket.socket, path: Path) -> bool:
    """False while so many others wait there that there is no room to wait, too."""
    try:
        connection.connect(str(path))
    except BlockingIOError:
        return False
    return True
