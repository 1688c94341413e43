"""COM1 of the simulated NT: a Unix socket in the place of QEMU's, and behind it the kernel's side of KD."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.kd.simulator import KdTarget, Snapshot

PATIENCE = 30.0

BYTE_TIMEOUT = 0.1
"""Seconds that the kernel waits for a byte of its debugger's: a tenth of the real ones, to be short."""


class Halted(BaseException):
    """The thread that is here runs no more: its guest has stopped, or was put back."""


class DebugPort:
    """Serves ``kd`` by a thread of its own until ``close``. What nobody takes is lost, as QEMU does it.

    ``on_reboot`` is called when the debugger lets a kernel go on that has bug-checked.
    """

    def __init__(self, path: Path, processors: int, on_reboot: Callable[[], None]) -> None:
        self.kd = KdTarget(processors=processors, byte_timeout=BYTE_TIMEOUT)
        self._on_reboot = on_reboot
        self._is_on = False
        self._boots = self.kd.boots
        self._epoch = 0
        self._saved: Snapshot | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(4)
        self._connection: socket.socket | None = None
        self._changed = threading.Condition()
        self._wake, self._woken = socket.socketpair()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="nt-com1", daemon=True)
        self._thread.start()

    @property
    def mistakes(self) -> list[str]:
        """What the debugger did that no debugger does."""
        with self._changed:
            return list(self.kd.errors)

    def boot(self) -> None:
        """Switch the kernel on, and wait until it has told of its own image."""
        self._is_on = True
        self.call(lambda _: 1)

    def call(self, act: Callable[[KdTarget], int]) -> None:
        """Begin ``act``, and wait until it is over: so long the thread that does it stands still."""
        with self._changed:
            epoch = self._epoch
            number = act(self.kd)
            self._poke()
            self._changed.wait_for(lambda: self._epoch != epoch or self.kd.completed >= number)
            if self._epoch != epoch:
                raise Halted

    def post(self, act: Callable[[KdTarget], object]) -> None:
        """Begin ``act``, which is never over for who does it."""
        with self._changed:
            act(self.kd)
            self._poke()

    def freeze(self) -> None:
        """Have the kernel do nothing any more; ``restore`` has it go on from the snapshot."""
        self._is_on = False

    def save(self) -> None:
        with self._changed:
            self._saved = self.kd.snapshot()

    def restore(self) -> None:
        """Put the kernel back to where it was, ids and all.

        What is on its way to the host will be acknowledged all the same, which is no mistake of the host's.
        """
        with self._changed:
            assert self._saved is not None
            owed, host = self.kd._owed, self.kd._host
            self.kd.restore(self._saved, time.monotonic())
            self.kd._owed, self.kd._host = owed, host
            self._boots = self.kd.boots
            self._is_on = True
            self._epoch += 1
            self._changed.notify_all()
            self._poke()

    def hang_up(self) -> None:
        """Close QEMU's end of the connection; another one is taken."""
        with self._changed:
            if self._connection is not None:
                with suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._epoch += 1
            self._changed.notify_all()
            self._poke()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        for end in (self._server, self._connection, self._wake, self._woken):
            if end is not None:
                end.close()

    def _poke(self) -> None:
        with suppress(BlockingIOError):
            self._wake.send(b"!", socket.MSG_DONTWAIT)

    def _run(self) -> None:
        while not self._closed:
            data = self._wait()
            if not self._is_on:
                continue
            with self._changed:
                self.kd.receive_data(data, time.monotonic())
                answer = self.kd.data_to_send()
                rebooted = self.kd.boots != self._boots
                self._boots = self.kd.boots
                self._changed.notify_all()
            if rebooted:
                self._on_reboot()
            self._send(answer)

    def _wait(self) -> bytes:
        """Wait for bytes, a debugger, a script's words or the time; the bytes."""
        with self._changed:
            deadline = self.kd.next_deadline() if self._is_on else None
        connection = self._connection or self._server
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        ready, _, _ = select.select([connection, self._woken], [], [], left)
        if self._woken in ready:
            self._woken.recv(4096)
        if self._server in ready:
            self._connection, _ = self._server.accept()
        elif connection in ready:
            with suppress(OSError):
                if data := connection.recv(1 << 16):
                    return data
            connection.close()
            self._connection = None
        return b""

    def _send(self, data: bytes) -> None:
        if self._connection is not None and data:
            with suppress(OSError):
                self._connection.sendall(data)
