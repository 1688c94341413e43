"""The simulated kernel as a program on a serial device, a Unix socket or a TCP port.

    python3 run.py (--port /dev/ttyS0 [--baud 115200] | --socket PATH | --tcp PORT)
        [--script FILE] [--status FILE] [--faulty]

The script is a JSON list of steps. A step is an object with one key, a method of ``KdTarget``, and its
arguments: ``{"print": {"text": "hello", "processor": 1}}``. Besides these there are

- ``{"count": {"text": "line {n}", "first": 0, "number": 1000, "every": 0.01}}``: prints, one each ``every``
  seconds, or each as soon as the one before it is done where that is left out
- ``{"wait": {"seconds": 1.5}}``, and ``{"finish": {}}``: until all before it is done
- ``{"end": {}}``: the program ends.

Without a script steps come on the standard input, a line each, and the program ends when that does. A
socket is listened on, for one host after the other; what is said while there is none is lost. The status
file has an object with ``completed``, ``errors``, ``answers``, ``boots``, ``idle`` and ``stopped``.
``--faulty``: mistakes that a fault of the wire can look like are none.

It takes the standard library alone, and ``simulator.py`` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING or __package__:
    from tests.kd.simulator import KdTarget
else:
    from simulator import KdTarget

CHUNK = 4096
FIFO = 16
"""Bytes that a serial port takes at one time."""
BITS = 10
"""Bits on the line for a byte, with those around it."""
TELL = 0.1
"""Seconds between two writes of the status, while the target is busy."""


class Script:
    """Steps, which a target takes one after the other. More can be added at any time."""

    def __init__(self, target: KdTarget) -> None:
        self.over = False
        self._target = target
        self._steps: deque[dict[str, dict[str, Any]]] = deque()
        self._step: Iterator[float | None] = iter(())
        self._due: float | None = None
        """When to go on; None: when the target is idle."""

    def add(self, steps: Iterable[dict[str, dict[str, Any]]]) -> None:
        """Have ``steps`` done behind all others."""
        self._steps.extend(steps)

    def advance(self, now: float) -> None:
        """Do all that is due, and have the target do what is."""
        self._target.receive_data(b"", now)
        while not self.over and (self._target.idle if self._due is None else now >= self._due):
            try:
                seconds = next(self._step)
                self._due = now + seconds if seconds is not None else None
            except StopIteration:
                self._due = None
                if not self._steps:
                    break
                self._step = self._begin(self._steps.popleft())
            self._target.receive_data(b"", now)
        self._target.receive_data(b"", now)

    def next_deadline(self) -> float | None:
        """When something is due that does not depend on the target. None: never."""
        return self._due

    def _begin(self, step: dict[str, dict[str, Any]]) -> Iterator[float | None]:
        """The seconds to wait before going on; None for as long as the target takes."""
        ((name, arguments),) = step.items()
        match name:
            case "count":
                first = arguments.get("first", 0)
                for number in range(first, first + arguments["number"]):
                    self._target.print(arguments["text"].format(n=number))
                    yield arguments.get("every")
            case "wait":
                yield arguments["seconds"]
            case "finish":
                yield None
            case "end":
                self.over = True
            case _:
                getattr(self._target, name)(**arguments)


class Line(Protocol):
    """What leads to the host."""

    def fileno(self) -> int: ...

    def read(self) -> bytes: ...

    def write(self, data: bytes) -> int:
        """How many bytes of ``data`` are written, or lost for want of a host."""
        ...


class Port:
    """A terminal that passes each byte as it is, no faster than ``baud`` allows, which 0 does not limit."""

    def __init__(self, path: str, baud: int) -> None:
        self._baud = baud
        self._port = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        tty.setraw(self._port)
        attributes = termios.tcgetattr(self._port)
        attributes[2] = (attributes[2] | termios.CLOCAL | termios.CREAD) & ~termios.CRTSCTS
        attributes[4] = attributes[5] = termios.B115200
        termios.tcsetattr(self._port, termios.TCSANOW, attributes)

    def fileno(self) -> int:
        return self._port

    def read(self) -> bytes:
        return os.read(self._port, CHUNK)

    def write(self, data: bytes) -> int:
        try:
            if not self._baud:
                return os.write(self._port, data)
            size = os.write(self._port, data[:FIFO])
        except BlockingIOError:
            return 0
        termios.tcdrain(self._port)
        time.sleep(size * BITS / self._baud)
        return size


class Listener:
    """A socket on which one host after the other is waited for."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._host: socket.socket | None = None

    def fileno(self) -> int:
        return (self._host or self._listening).fileno()

    def read(self) -> bytes:
        if self._host is None:
            self._host, _ = self._listening.accept()
            return b""
        try:
            data = self._host.recv(CHUNK)
        except ConnectionError:
            data = b""
        if not data:
            self._host.close()
            self._host = None
        return data

    def write(self, data: bytes) -> int:
        if self._host is None:
            return len(data)
        try:
            return self._host.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except ConnectionError:
            return len(data)


class Status:
    """A file that tells how far the target is."""

    def __init__(self, path: Path | None, target: KdTarget) -> None:
        self._path = path
        self._target = target
        self._told = ""
        self._next = 0.0

    def tell(self, now: float) -> None:
        """Write it anew, where the target has nothing to do, or where it was not for a while."""
        if self._path is None or not (self._target.idle or now >= self._next):
            return
        self._next = now + TELL
        names = ("completed", "errors", "answers", "boots", "idle", "stopped")
        told = json.dumps({name: getattr(self._target, name) for name in names})
        if told != self._told:
            unfinished = self._path.with_suffix(".new")
            unfinished.write_text(told)
            unfinished.rename(self._path)
            self._told = told


def run(line: Line, script: Script, target: KdTarget, status: Status, steps: int | None) -> None:
    """Until the script is over; ``steps`` is where more of them are read from."""
    unsent = b""
    lines = b""
    while True:
        now = time.monotonic()
        if not unsent:  # a kernel that sends waits until it can
            script.advance(now)
            unsent = target.data_to_send()
            unsent = unsent[line.write(unsent) :]
            status.tell(now)
        if script.over:
            break
        deadlines = [d for d in (target.next_deadline(), script.next_deadline()) if d is not None]
        wait = max(min(deadlines) - now, 0) if deadlines and not unsent else None
        reading: list[Line | int] = [line] if steps is None else [line, steps]
        readable, writable, _ = select.select(reading, [line] if unsent else [], [], wait)
        if writable:
            unsent = unsent[line.write(unsent) :]
        if line in readable:
            target.receive_data(line.read(), time.monotonic())
            unsent += target.data_to_send()
        if steps is not None and steps in readable:
            data = os.read(steps, CHUNK)
            *whole, lines = (lines + data).split(b"\n")
            script.add(map(json.loads, whole))
            if not data:
                script.add([{"finish": {}}, {"end": {}}])
                steps = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port")
    where.add_argument("--socket", type=Path)
    where.add_argument("--tcp", type=int)
    parser.add_argument("--baud", type=int, default=0)
    parser.add_argument("--script", type=Path)
    parser.add_argument("--status", type=Path)
    parser.add_argument("--processors", type=int, default=2)
    parser.add_argument("--faulty", action="store_true")
    arguments = parser.parse_args()
    target = KdTarget(processors=arguments.processors, clean_wire=not arguments.faulty)
    script = Script(target)
    if arguments.script is not None:
        script.add(json.loads(arguments.script.read_text()))
    status = Status(arguments.status, target)
    steps = sys.stdin.fileno() if arguments.script is None else None
    if arguments.port:
        line: Line = Port(arguments.port, arguments.baud)
    elif arguments.socket is not None:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(arguments.socket))
        listening.listen()
        line = Listener(listening)
    else:
        line = Listener(socket.create_server(("127.0.0.1", arguments.tcp)))
    run(line, script, target, status, steps)


if __name__ == "__main__":
    main()
