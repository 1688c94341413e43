"""``python -m bench [NAME ...]``: measure, print a table, write ``bench/results.json``.

The exit code is 1 where a limit is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import (
    clone,
    cycle,
    first_driver,
    flood,
    ioctl,
    kd,
    preflight,
    symbols,
    unused,
    vm,
    winrm,
)
from bench.figure import Figure
from bench.table import render

RESULTS = Path(__file__).with_name("results.json")
MEASUREMENTS = {
    "cycle": cycle.measure,
    "first-driver": first_driver.measure,
    "unused": unused.measure,
    "flood": flood.measure,
    "clone": clone.measure,
    "ioctl": ioctl.measure,
    "preflight": preflight.measure,
    "symbols": symbols.measure,
    "winrm": winrm.measure,
    "kd": kd.measure,
    "vm": vm.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure speed and scale.")
    parser.add_argument("name", nargs="*", choices=[*MEASUREMENTS, []], help="only these")
    names = parser.parse_args().name
    figures: list[Figure] = []
    for name in names or MEASUREMENTS:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        figures += MEASUREMENTS[name]()
    print(render(figures))
    loads = " ".join(f"{load:.2f}" for load in os.getloadavg())
    print(f"load average: {loads}; cores: {os.cpu_count()}")
    _write(figures, keep_others=bool(names))
    return 0 if all(figure.ok is not False for figure in figures) else 1


def _write(figures: Sequence[Figure], *, keep_others: bool) -> None:
    """Each figure has its floor beside it, so one of another day may stay beside a new one."""
    told: dict[str, object] = {}
    if keep_others and RESULTS.exists():
        told = {known["name"]: known for known in json.loads(RESULTS.read_text(encoding="utf-8"))}
    told |= {figure.name: figure.as_json() for figure in figures}
    RESULTS.write_text(json.dumps(list(told.values()), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
