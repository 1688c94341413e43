"""A million DbgPrints by KD through a socket: their time, how long the guest waits, and the memory."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import kd_sender
from bench.figure import Figure, median
from bench.memory import MEBIBYTE, forget_peak, peak
from pytest_kdriver.kernel.events import DebugPrint
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.targets.kd_pump import RECEIVE_BUFFER, KdPump, connect

PRINTS = 1_000_000
FLOOR_PRINTS = 100_000
FLOORS = 5
START_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class _Flood:
    seconds: float
    """For one print."""
    processor: float
    """Seconds of processor time of this process, for one print."""
    longest: float
    lost: int = 0
    lag: float = 0.0
    longest_lag: float = 0.0
    memory: int = 0


def measure() -> list[Figure]:
    """Each in a process of its own, whose memory nothing else has stretched; floors before and behind."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        floors = [processes.submit(_floor).result() for _ in range(FLOORS // 2 + 1)]
        flood = processes.submit(_flood).result()
        floors += [processes.submit(_floor).result() for _ in range(FLOORS // 2)]
    what = (
        f"{PRINTS:,} prints of {kd_sender.LENGTH} bytes, each acknowledged before the next is sent"
    )
    bare = f"a bare loop that reads a packet and writes a fixed acknowledgement; median of {FLOORS}"
    floor = median([floor.seconds for floor in floors])
    return [
        Figure(
            name="KD print",
            value=flood.seconds * 1e6,
            unit="us",
            floor=floor * 1e6,
            limit=100,
            note=f"{what}, from a process that does no more. Floor: {bare}",
        ),
        Figure(
            name="KD prints per second",
            value=1 / flood.seconds,
            unit="1/s",
            floor=1 / floor,
            note="the same",
        ),
        Figure(
            name="KD print, processor time",
            value=flood.processor * 1e6,
            unit="us",
            floor=median([floor.processor for floor in floors]) * 1e6,
            limit=50,
            note="of the host's process, the system's calls included",
        ),
        Figure(
            name="KD prints lost",
            value=flood.lost,
            unit="prints",
            limit=0,
            note=f"or out of order, of {PRINTS:,}",
        ),
        Figure(
            name="KD print, lag",
            value=flood.lag * 1e6,
            unit="us",
            note="from the print in the socket to its acknowledgement; the mean of the most that it can be",
        ),
        Figure(
            name="KD print, longest lag",
            value=flood.longest_lag * 1e3,
            unit="ms",
            note=f"the same; the sender waited {flood.longest * 1e3:.1f} ms at most",
        ),
        Figure(
            name="KD prints, memory",
            value=flood.memory / MEBIBYTE,
            unit="MiB",
            limit=20,
            note="growth of the host's process, at its peak",
        ),
    ]


def _flood() -> _Flood:
    with tempfile.TemporaryDirectory() as folder, _sender(Path(folder), PRINTS) as sender:
        log = KernelLog(Path(folder) / "log")
        before = forget_peak()
        pump = KdPump(sender.path, log, "bench", timeout=START_TIMEOUT)
        try:
            processor = time.process_time()
            told = sender.told()
            pump.catch_up()
            processor = time.process_time() - processor
            lag = pump.lag
        finally:
            pump.close()
        grown = peak() - before
        said = [event.raw for event in log.read() if type(event) is DebugPrint]
    ordered = sum(raw == kd_sender.text(number) for number, raw in enumerate(said))
    return _Flood(
        seconds=told["seconds"] / PRINTS,
        processor=processor / PRINTS,
        longest=told["longest"],
        lost=PRINTS - ordered + max(len(said) - PRINTS, 0),
        lag=lag.mean,
        longest_lag=lag.longest,
        memory=grown,
    )


def _floor() -> _Flood:
    """The same prints, but nobody looks at them."""
    answers = [kd_sender.acknowledgement(kd_sender.INITIAL | flip) for flip in (0, 1)]
    with tempfile.TemporaryDirectory() as folder, _sender(Path(folder), FLOOR_PRINTS) as sender:
        with connect(f"unix:{sender.path}", START_TIMEOUT) as connection:
            connection.setblocking(True)
            processor = time.process_time()
            number = 0
            while connection.recv(RECEIVE_BUFFER):
                connection.send(answers[number & 1])
                number += 1
            processor = time.process_time() - processor
        told = sender.told()
    return _Flood(
        seconds=told["seconds"] / FLOOR_PRINTS,
        processor=processor / FLOOR_PRINTS,
        longest=told["longest"],
    )


class _Sender:
    """The kernel that only prints."""

    def __init__(self, path: Path, process: subprocess.Popen[str]) -> None:
        self.path = path
        self._process = process

    def told(self) -> dict[str, float]:
        """What it has measured, when it is over."""
        output, _ = self._process.communicate()
        told: dict[str, float] = json.loads(output)
        return told


@contextmanager
def _sender(folder: Path, count: int) -> Iterator[_Sender]:
    path = folder / "com1"
    command = [sys.executable, kd_sender.__file__, str(path), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Sender(path, process)
        finally:
            process.kill()
