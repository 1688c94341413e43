"""What is to be sent, in whole messages, over what takes parts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Outbox:
    """The way of ``Link.send``: its callers take turns, and a message that was begun is finished first.

    ``write`` is given bytes and a deadline (of ``time.monotonic``). It writes until all is written or the
    time is up, gives the rest, and raises ``LinkError`` if the stream is gone. One thread at a time is in it.
    """

    def __init__(self, write: Callable[[bytes, float], bytes]) -> None:
        self._write = write
        self._unsent = b""
        self.lock = threading.Lock()
        """Held while somebody sends."""

    def send(self, data: bytes, timeout: float) -> None:
        """See ``Link.send``."""
        deadline = time.monotonic() + timeout
        if not self.lock.acquire(timeout=max(timeout, 0)):
            raise TimeoutError(f"the agent did not read for {timeout:g} s")
        try:
            self._unsent = self._write(self._unsent, deadline)
            rest = data if self._unsent else self._write(data, deadline)
            if len(rest) == len(data) > 0:
                raise TimeoutError(f"the agent did not read for {timeout:g} s")
            self._unsent = self._unsent or rest
        finally:
            self.lock.release()

    def clear(self) -> None:
        """Forget the rest of what was begun. The caller holds the lock."""
        self._unsent = b""
