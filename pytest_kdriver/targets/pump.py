"""The pump: the thread that feeds a source from its socket, and the log from the source."""

from __future__ import annotations

import array
import fcntl
import select
import socket
import struct
import termios
import threading
import time
from contextlib import suppress
from typing import Final

from pytest_kdriver.kernel.events import KernelMessage
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.source import Source
from pytest_kdriver.kernel.sources.wine import FRAME_HEADER, frame

BATCH: Final = 512
"""Messages taken from the socket before the source sees them: what they cost apart is much more."""

RECEIVE_BUFFER: Final = 1 << 16
_CREDENTIALS: Final = struct.Struct("iii")  # struct ucred: pid, uid, gid; unix(7)
_ANCILLARY: Final = socket.CMSG_SPACE(_CREDENTIALS.size)


class MessagePump:
    """Reads messages from an AF_UNIX SOCK_SEQPACKET socket until ``close``.

    Owns the socket, the source and a thread. Each message goes to the source in a frame that tells
    its length and its sender's pid. ``failure`` says why nothing more can be had of the source, None
    while all is well; whoever writes is not held up even then.
    """

    failure: str | None = None
    carries_words = True

    def __init__(
        self, connection: socket.socket, source: Source, log: KernelLog, name: str
    ) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        connection.setblocking(False)
        self._connection = connection
        self._source = source
        self._log = log
        self._reading = threading.Lock()
        self._nobody_waits = threading.Event()
        self._nobody_waits.set()
        self._ended = False
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"kdriver-pump-{name}", daemon=True)
        self._thread.start()

    def describe(self) -> str:
        """See ``LogFeed``."""
        return ""

    def close(self) -> None:
        """Read what has arrived, then stop; the thread is gone afterwards."""
        self._wake.close()
        self._thread.join()
        self._woken.close()
        self._connection.close()

    def catch_up(self) -> None:
        """Have the log hold all that was written before this call.

        It is the calling thread that reads, so it costs a system call where nothing is waiting.
        """
        self._nobody_waits.clear()
        try:
            with self._reading:
                left = self._waiting()
                more = True
                while left > 0 and more:
                    frames, more = self._receive()
                    left -= sum(map(len, frames)) - FRAME_HEADER.size * len(frames)
                    self._feed(frames)
        finally:
            self._nobody_waits.set()

    def _waiting(self) -> int:
        """How many bytes the socket holds: all messages' together, by the kernel's ``unix_inq_len``."""
        count = array.array("i", [0])
        fcntl.ioctl(self._connection, termios.FIONREAD, count)
        return count[0]

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        closing = False
        while not closing:
            closing = any(handle == self._woken.fileno() for handle, _ in poll.poll())
            more = True
            while more:
                self._nobody_waits.wait()  # a lock that is released and taken at once goes to no other
                with self._reading:
                    frames, more = self._receive()
                    self._feed(frames)
            if self._ended:
                with suppress(KeyError):  # it was done before
                    poll.unregister(self._connection)

    def _feed(self, frames: list[bytes]) -> None:
        if self.failure is not None:
            return
        try:
            events = self._source.receive_data(b"".join(frames), time.monotonic())
        except Exception as error:  # a mistake of ours must not hold up the guest, nor stay unseen
            self.failure = f"{type(error).__name__}: {error}"
            told = f"the kernel log ends here: {self.failure}"
            events = [KernelMessage(time.monotonic(), None, told)]
        self._log.append(events)

    def _receive(self) -> tuple[list[bytes], bool]:
        """The frames of a batch of messages, and whether there may be more at once."""
        frames: list[bytes] = []
        receive = self._connection.recvmsg
        for _ in range(BATCH):
            try:
                message, ancillary, _, _ = receive(RECEIVE_BUFFER, _ANCILLARY)
            except BlockingIOError:
                return frames, False
            if not message and not ancillary:  # the end: nobody holds the other side any more
                self._ended = True
                return frames, False
            sender = _CREDENTIALS.unpack(ancillary[0][2])[0] if ancillary else 0
            frames.append(frame(message, sender))
        return frames, True
