"""A target's start, from where a guest like its own had booted to, against a boot."""

from __future__ import annotations

import time

from bench.figure import Figure, Limited, median
from bench.vm.guest import winevm_target

RUNS = 5


def measure(uri: str) -> list[Figure]:
    """Behind a start of the same target, which has kept its guest."""
    cold = _start(uri, warm_start=False)
    return [
        Figure(
            name="start, warm",
            value=median([_start(uri) for _ in range(RUNS)]),
            unit="s",
            floor=cold,
            limit=0.25,
            limited=Limited.RATIO,
            note=f"of a target until a test may begin; median of {RUNS}. Floor: one whose guest boots",
        )
    ]


def _start(uri: str, **settings: object) -> float:
    began = time.monotonic()
    with winevm_target(uri, **settings):
        return time.monotonic() - began
