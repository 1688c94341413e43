"""The pump: the thread that feeds a source from its socket, and the log from the source."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from typing import Final

from pytest_kdriver.errors import KernelLogError
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
    its length and its sender's pid.
    """

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
        if self._thread.is_alive():
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
                data, more = self._receive()
                try:
                    self._log.append(self._source.receive_data(data, time.monotonic()))
                except KernelLogError as error:
                    told = f"the kernel log ends here: {error}"
                    self._log.append([KernelMessage(time.monotonic(), None, told)])
                    return

    def _receive(self) -> tuple[bytes, bool]:
        """The frames of a batch of messages, and whether there may be more at once."""
        frames: list[bytes] = []
        receive = self._connection.recvmsg
        for _ in range(BATCH):
            try:
                message, ancillary, _, _ = receive(RECEIVE_BUFFER, _ANCILLARY)
            except BlockingIOError:
                return b"".join(frames), False
            if not message and not ancillary:  # the end: nobody holds the other side any more
                self._connection.shutdown(socket.SHUT_RD)
                return b"".join(frames), False
            sender = _CREDENTIALS.unpack(ancillary[0][2])[0] if ancillary else 0
            frames.append(frame(message, sender))
        return b"".join(frames), True
