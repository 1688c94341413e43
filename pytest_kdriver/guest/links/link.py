"""What an agent is reached by."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


class Link(Protocol):
    """A duplex byte stream to an agent.

    Bytes keep their order and their values; borders between calls mean nothing. All methods may be called
    from any thread. ``send`` may have many callers at a time, ``receive`` has one.
    """

    @property
    def ended(self) -> str | None:
        """Why the stream is at its end, where it is and more is known, to stand behind a colon."""
        ...

    def send(self, data: bytes, timeout: float) -> None:
        """Write all of ``data``, with nothing of another call's within it.

        Waits while the other side does not read (back-pressure). ``TimeoutError`` after ``timeout``
        seconds in which not one byte of ``data`` could be written: nothing of it will be. If a part could,
        the call returns, and the rest goes in front of what is sent next. ``LinkError`` if the stream is
        gone or closed.
        """
        ...

    def receive(self) -> bytes:
        """Wait for bytes, and give what came.

        ``b""`` is the end: the other side is gone, the stream broke, or ``close`` was called meanwhile or
        before. It stays the end.
        """
        ...

    def close(self) -> None:
        """End the stream and free what it holds, within a bounded time.

        A ``receive`` or ``send`` that waits returns at once. To close again does nothing.
        """
        ...


@runtime_checkable
class PortLink(Link, Protocol):
    """A link over a port, which stays while sessions come and go."""

    def suspend(self) -> None:
        """End this session: from now on ``receive`` gives ``b""``, and ``send`` is a ``LinkError``.

        Who waits in one of them returns at once. ``resync`` begins the next session.
        """
        ...

    def resync(self, timeout: float) -> None:
        """Begin a new session over the same port, after the guest was put back to a snapshot, say.

        Whatever is still on its way is dropped. ``TimeoutError`` if the agent does not answer in time, and
        ``LinkError`` if the port is gone.
        """
        ...
