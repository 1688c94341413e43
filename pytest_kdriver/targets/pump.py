"""The pump: the thread that feeds a source from its socket, and the log from the source."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Final

from pytest_kdriver.kernel.events import KernelMessage
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.source import Source
from pytest_kdriver.kernel.sources.wine import frame

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

    def __init__(
        self, connection: socket.socket, source: Source, log: KernelLog, name: str
    ) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        connection.setblocking(False)
        self._connection = connection
        self._source = source
        self._log = log
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"kdriver-pump-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read what has arrived, then stop; the thread is gone afterwards."""
        self._wake.close()
        self._thread.join()
        self._woken.close()
        self._connection.close()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        closing = False
        while not closing:
            closing = any(handle == self._woken.fileno() for handle, _ in poll.poll())
            more = True
            while more:
                data, more = self._receive(poll)
                self._feed(data)

    def _feed(self, data: bytes) -> None:
        if self.failure is not None:
            return
        try:
            events = self._source.receive_data(data, time.monotonic())
        except Exception as error:  # a mistake of ours must not hold up the guest, nor stay unseen
            self.failure = f"{type(error).__name__}: {error}"
            told = f"the kernel log ends here: {self.failure}"
            events = [KernelMessage(time.monotonic(), None, told)]
        self._log.append(events)

    def _receive(self, poll: select.poll) -> tuple[bytes, bool]:
        """The frames of a batch of messages, and whether there may be more at once."""
        frames: list[bytes] = []
        receive = self._connection.recvmsg
        for _ in range(BATCH):
            try:
                message, ancillary, _, _ = receive(RECEIVE_BUFFER, _ANCILLARY)
            except BlockingIOError:
                return b"".join(frames), False
            if not message and not ancillary:  # the end: nobody holds the other side any more
                with suppress(KeyError):  # it was said before
                    poll.unregister(self._connection)
                return b"".join(frames), False
            sender = _CREDENTIALS.unpack(ancillary[0][2])[0] if ancillary else 0
            frames.append(frame(message, sender))
        return b"".join(frames), True
