"""``kdriver kd``: what a virtual machine's kernel says on its serial port."""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Final

from pytest_kdriver.errors import LinkError
from pytest_kdriver.kernel.bug_checks import describe_bug_check, name_of
from pytest_kdriver.kernel.events import BugCheck, DebugPrint, Event, ImageLoaded, ImageUnloaded
from pytest_kdriver.kernel.images import Modules
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.kd.session import KdSession
from pytest_kdriver.kernel.sources.text import SerialText
from pytest_kdriver.kernel.text import describe_event, printable
from pytest_kdriver.targets.kd_pump import KdPump, SerialPump

SILENCE: Final = 5.0
"""Seconds without an answer after which it is said what may be the matter."""

MOST_WAITING: Final = 100_000
"""Events that may wait for the output. Behind that the guest waits for it, too."""

_LOOK: Final = 0.25
_HEXADECIMAL: Final = {"base", "address", "code", "caller", "parameters", "stack"}

_SILENT: Final = (
    "no kernel has answered yet: is debugging on in the guest (bcdedit /debug on, /dbgsettings serial "
    "debugport:1), and has nobody else this socket? Going on to listen"
)
_WITHOUT_DEBUGGER: Final = (
    "the guest has no debugger now: its next print waits some seconds for one, then it goes on without; at "
    "an exception or a bug check it stands still until one is there: listen again"
)
_WITHOUT_READER: Final = "what the guest writes from now on is lost, until somebody listens again"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "kd",
        help="show what a virtual machine's kernel says on its serial port",
        description="Be the kernel debugger of a virtual machine with a serial port.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listen = actions.add_parser(
        "listen",
        help="show each DbgPrint at once, and images, breakpoints and bug checks",
        description="Show each DbgPrint of a guest at once, the images that it loads, its breakpoints and "
        "its bug checks, until Ctrl-C. The guest is never held up: breakpoints are stepped over, and behind "
        "a bug check it writes its dump and starts anew. A machine that is started anew is met again.",
    )
    listen.add_argument(
        "socket",
        metavar="SOCKET",
        help="the machine's end of its serial port: unix:PATH or tcp:HOST:PORT",
    )
    listen.add_argument(
        "--text",
        action="store_true",
        help="the kernel writes plain text, as ReactOS does, instead of Windows's KD",
    )
    listen.add_argument(
        "--json",
        action="store_true",
        help="an object a line; times are seconds since 1970, addresses and codes hexadecimal strings",
    )
    listen.add_argument("--wait", action="store_true", help="wait until the socket is there")
    listen.set_defaults(call=_listen)


def _listen(options: argparse.Namespace) -> int:
    events = _Events()
    show = _as_json if options.json else _Lines()
    timeout = math.inf if options.wait else 0.0
    pump: SerialPump | None = None
    try:
        if options.text:
            pump = SerialPump(options.socket, SerialText(), events, "listen", timeout=timeout)
        else:
            session = KdSession(hold_bug_checks=False)
            pump = KdPump(options.socket, events, "listen", session=session, timeout=timeout)
            pump.end_of_boot()
        while _follow(pump, events, show):
            _say(f"{options.socket} is gone; waiting for it")
            pump.reconnect(math.inf)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # for Python's own last flush
    except KeyboardInterrupt:
        _say(_WITHOUT_READER if options.text else _WITHOUT_DEBUGGER)
        if pump is not None:
            lag = pump.lag
            mean, longest = lag.mean * 1e6, lag.longest * 1e3
            _say(f"it was answered within {mean:.0f} us on average, {longest:.1f} ms at most")
    finally:
        events.close()
        if pump is not None:
            pump.close()
    return 0


def _follow(pump: SerialPump, events: _Events, show: Callable[[Event], Sequence[str]]) -> bool:
    """Meet the guest and show what it says until its port is gone; False where nobody looks any more."""
    try:
        pump.attach()
    except LinkError:
        return True
    hint_at = time.monotonic() + SILENCE
    while True:
        alive = pump.alive
        lines = [line for event in events.take(_LOOK) for line in show(event)]
        if lines:
            print("\n".join(lines), flush=True)
        elif not alive:
            return True
        elif _nobody_looks():
            return False
        if isinstance(pump, KdPump) and not pump.attached and time.monotonic() > hint_at:
            _say(_SILENT)
            hint_at = math.inf


def _nobody_looks() -> bool:
    """Whether the output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(what & select.POLLERR for _, what in poll.poll(0))


class _Events:
    """Events on their way from the pump to the output. Whoever brings too many waits, until ``close``."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._closed = False

    def append(self, events: Sequence[Event]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) < MOST_WAITING or self._closed)
            self._events += events
            self._changed.notify_all()

    def take(self, timeout: float) -> list[Event]:
        """All that is there, as soon as there is any, or nothing after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._events, timeout)
            taken, self._events = self._events, []
            self._changed.notify_all()
        return taken

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Lines:
    """Events as lines for a person, each with its time of day."""

    def __init__(self) -> None:
        self._images: dict[int, ImageLoaded] = {}

    def __call__(self, event: Event) -> list[str]:
        match event:
            case ImageLoaded():
                self._images[event.base] = event
            case ImageUnloaded():
                self._images.pop(event.base, None)
        at = datetime.fromtimestamp(_wall_clock(event)).strftime("%H:%M:%S.%f")[:-3]
        return [f"{at}  {printable(line)}" for line in self._words(event)]

    def _words(self, event: Event) -> list[str]:
        lines = [line.removeprefix("?: ") for line in describe_event(event)]
        if isinstance(event, BugCheck):
            log = KernelLog()
            log.append(list(self._images.values()))
            where = Modules(log, len(log)).where
            lines += describe_bug_check(event.code, event.parameters, where, blamed=event.blamed)
            lines += [f"    {where(address) or f'0x{address:X}'}" for address in event.stack]
        return lines


def _as_json(event: Event) -> list[str]:
    told: dict[str, object] = {"event": type(event).__name__}
    for field in fields(event):
        told[field.name] = _plain(field.name, getattr(event, field.name))
    told["time"] = _wall_clock(event)
    if isinstance(event, DebugPrint):
        told["text"] = event.text
        del told["raw"]
    elif isinstance(event, BugCheck):
        told["name"] = name_of(event.code) or None
    return [json.dumps(told)]


def _plain(name: str, value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(name, item) for item in value]
    if isinstance(value, int) and name in _HEXADECIMAL:
        return f"0x{value:X}"
    return repr(value) if isinstance(value, bytes) else value


def _wall_clock(event: Event) -> float:
    return round(time.time() - time.monotonic() + event.time, 6)


def _say(text: str) -> None:
    print(f"kdriver: {text}", file=sys.stderr, flush=True)
