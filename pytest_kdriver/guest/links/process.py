"""An agent that is a child process of ours, over its standard input and output."""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.outbox import Outbox

CLOSE_TIMEOUT = 5.0
"""How long, in seconds, a child may take to end after its input did, before it is killed."""

_CHUNK = 1 << 16


class ProcessLink:
    """A ``Link`` to a child process.

    The child gets a session of its own, so that a Ctrl-C at the terminal is ours alone to act on. It is the
    end of the stream when the child ends, even if a process that it left behind (Wine's services) keeps its
    output open; what it wrote before is still received.

    ``stderr`` is what ``subprocess`` takes: a file descriptor, None for our own. ``LinkError`` if the child
    can't be started.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        stderr: int | None = None,
        cwd: str | Path | None = None,
        close_timeout: float = CLOSE_TIMEOUT,
    ) -> None:
        try:
            self._process = subprocess.Popen(
                argv,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            raise LinkError(f"{argv[0]} can't be started: {error}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin
        self._output = self._process.stdout
        os.set_blocking(self._input.fileno(), False)
        os.set_blocking(self._output.fileno(), False)
        self._exited = os.pidfd_open(self._process.pid)
        self._wake = os.eventfd(0)
        self._close_timeout = close_timeout
        self._closed = False
        self._ended = False
        self._outbox = Outbox(self._write)
        self._receiving = threading.Lock()
        self._closing = threading.Lock()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """What the child ended with, as ``subprocess`` has it; None before ``close``."""
        return self._process.returncode

    @property
    def ended(self) -> str | None:
        """See ``Link.ended``."""
        return "the agent's process is gone" if self._ended else None

    def send(self, data: bytes, timeout: float) -> None:
        """See ``Link.send``."""
        self._outbox.send(data, timeout)

    def _write(self, data: bytes, deadline: float) -> bytes:
        """Write until all is written or the time is up, and give the rest."""
        rest = memoryview(data)
        while rest and not (self._closed or self._ended):
            ready = self._wait(self._input.fileno(), select.POLLOUT, deadline)
            if not ready:
                return bytes(rest)
            if ready != {self._input.fileno()}:
                break
            try:
                rest = rest[os.write(self._input.fileno(), rest[:_CHUNK]) :]
            except BrokenPipeError:
                break
        if rest:
            raise LinkError("the link is closed" if self._closed else "the agent's process is gone")
        return b""

    def receive(self) -> bytes:
        """See ``Link.receive``."""
        with self._receiving:
            while not (self._closed or self._ended):
                ready = self._wait(self._output.fileno(), select.POLLIN, None)
                if self._wake in ready:
                    break
                try:
                    data = os.read(self._output.fileno(), _CHUNK)
                except BlockingIOError:
                    self._ended = self._exited in ready
                else:
                    self._ended = not data
                    return data
            return b""

    def _wait(self, descriptor: int, event: int, deadline: float | None) -> set[int]:
        """Wait for a pipe, the child's end or ``close``; what of them is there."""
        poll = select.poll()
        poll.register(descriptor, event)
        poll.register(self._wake, select.POLLIN)
        poll.register(self._exited, select.POLLIN)
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        return {ready for ready, _ in poll.poll(timeout)}

    def close(self) -> None:
        """See ``Link.close``. The child's input ends first; a child that stays is killed."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
            with self._outbox.lock, self._receiving:
                self._input.close()
                self._reap()
                self._output.close()
                os.close(self._exited)
                os.close(self._wake)

    def _reap(self) -> None:
        poll = select.poll()  # not select, which knows no descriptor from 1024 on
        poll.register(self._exited, select.POLLIN)
        if not poll.poll(self._close_timeout * 1000):
            self._process.kill()
        self._process.wait()
