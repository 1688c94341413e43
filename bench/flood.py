"""A hundred thousand DbgPrint lines: the time they take, and the memory."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from bench.figure import Figure, median
from bench.guest import bare_prefix, driver_image, wine_target
from bench.memory import MEBIBYTE, forget_peak, peak
from pytest_kdriver.driver import Driver
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.guest.links.process import ProcessLink
from pytest_kdriver.kernel.sources.wine import DEBUG_CHANNELS
from pytest_kdriver.targets.pump import RECEIVE_BUFFER

LINES = 100_000
LENGTH = 60
RUNS = 5
_PARAMETERS = {"Lines": LINES, "Length": LENGTH}


@dataclass(frozen=True, slots=True)
class _Flood:
    seconds: float
    lost: int
    memory: int
    """Bytes by which the process was larger, at its largest, than before."""


def measure() -> list[Figure]:
    """Each flood in a process of its own, whose memory nothing else has stretched."""
    floods, floors = [], []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for _ in range(RUNS):
            floods.append(processes.submit(_flood).result())
            floors.append(processes.submit(_discarded_flood).result())
    return [
        Figure(
            name="flood",
            value=median([flood.seconds for flood in floods]),
            unit="s",
            floor=median(floors),
            limit=1.5,
            note=f"{LINES:,} lines of chatty, from start to the list of lines; median of {RUNS}. Floor: the "
            "same start with a bare loop that receives and discards",
        ),
        Figure(
            name="flood, lines lost",
            value=sum(flood.lost for flood in floods),
            unit="lines",
            limit=0,
            note=f"in all {RUNS} runs",
        ),
        Figure(
            name="flood, memory",
            value=max(flood.memory for flood in floods) / MEBIBYTE,
            unit="MiB",
            limit=50,
            note="growth of the host's process, at its peak, the list of lines included; the largest",
        ),
    ]


def _flood() -> _Flood:
    with wine_target() as target:
        driver = Driver(target, driver_image("chatty"), name="chatty", parameters=_PARAMETERS)
        before = forget_peak()
        begin = time.perf_counter()
        driver.start()
        lines = driver.dbgprint.lines
        seconds = time.perf_counter() - begin
        grown = peak() - before
        driver.stop()
    wanted = {f"{number} " for number in range(1, LINES + 1)}
    lost = wanted - {line[: line.index(" ") + 1] for line in lines if len(line) == LENGTH}
    return _Flood(seconds, len(lost) + abs(len(lines) - LINES), grown)


def _discarded_flood() -> float:
    path = "C:\\kdriver\\chatty.sys"
    with _discarding_agent() as agent:
        agent.put(driver_image("chatty"), path)
        agent.create_service("chatty", path)
        for name, value in _PARAMETERS.items():
            key = "SYSTEM\\CurrentControlSet\\Services\\chatty\\Parameters"
            agent.set_value(key, name, value)
        begin = time.perf_counter()
        agent.start_service("chatty")
        return time.perf_counter() - begin


@contextmanager
def _discarding_agent() -> Iterator[Agent]:
    """An agent as a target has it, but what its guest says is received and forgotten."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, bare_prefix() as prefix:
        with theirs:
            link = ProcessLink(
                prefix.command(AGENT.executable()),
                env=prefix.wine.environment(prefix.path, DEBUG_CHANNELS),
                stderr=theirs.fileno(),
            )
        discarding = threading.Thread(target=_discard, args=(ours,), daemon=True)
        discarding.start()
        with Agent.connect(link, timeout=60) as agent:
            yield agent


def _discard(connection: socket.socket) -> None:
    while connection.recv(RECEIVE_BUFFER):
        pass
