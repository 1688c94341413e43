"""What a source of the kernel log is: bytes in, events out, and no socket, thread or clock of its own."""

from __future__ import annotations

from typing import Protocol

from pytest_kdriver.kernel.events import Event


class Source(Protocol):
    """A protocol by which a guest's kernel tells what happens in it, as a state machine.

    Not thread-safe: a pump owns it.
    """

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Take the next bytes, cut anywhere, and give the events that they complete, in order.

        ``now`` is the host's monotonic clock in seconds. Raises ``KernelLogError`` where the bytes
        make no sense; the source is of no use after that.
        """
        ...

    def data_to_send(self) -> bytes:
        """The bytes to be sent to the guest, each only once."""
        ...

    def next_deadline(self) -> float | None:
        """The time, on the clock of ``now``, at which ``receive_data(b"", now)`` is due. None: never."""
        ...
