"""Ten megabytes into the guest, against the same bytes through a bare virtio-serial port."""

from __future__ import annotations

import os
import socket
import time

from bench.figure import Figure, median
from bench.vm.guest import ANSWER_TIMEOUT, BareGuest
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.targets.machine_target import MachineTarget

SIZE = 10_000_000
RUNS = 5
_MEGABYTE = 1_000_000
_PORT = "kdriver.bench"
_WAIT_FOR_PORT = f"until test -c /dev/virtio-ports/{_PORT}; do sleep 0.05; done"
_DISCARD = f"exec 3<>/dev/virtio-ports/{_PORT}; echo >&3; head -c {SIZE} <&3 >/dev/null; echo >&3"


def measure(target: MachineTarget, bare: BareGuest) -> list[Figure]:
    """By turns."""
    data = os.urandom(SIZE)
    path = bare.port("kdriver.agent").with_name("bench")
    values, floors = [], []
    with bare.plugged_port(_PORT, path):
        for run in range(RUNS):
            floors.append(_send_bare(target.agent, path, data))
            begin = time.perf_counter()
            target.agent.put(data, rf"C:\kdriver\large-{run}")
            values.append(time.perf_counter() - begin)
    return [
        Figure(
            name="put in a VM",
            value=SIZE / _MEGABYTE / median(values),
            unit="MB/s",
            floor=SIZE / _MEGABYTE / median(floors),
            note=f"a file of {SIZE // _MEGABYTE} MB over the serial link, its hash checked; median of "
            f"{RUNS}. Floor: the same bytes through a virtio-serial port, discarded there, by turns",
        )
    ]


def _send_bare(agent: Agent, path: os.PathLike[str], data: bytes) -> float:
    with socket.socket(socket.AF_UNIX) as port:
        port.settimeout(ANSWER_TIMEOUT)
        port.connect(os.fspath(path))
        agent.run([r"Z:\bin\sh", "-c", f"{_WAIT_FOR_PORT}; {_DISCARD}"])
        assert port.recv(1)
        begin = time.perf_counter()
        port.sendall(data)
        assert port.recv(1)
        return time.perf_counter() - begin
