"""``python -m bench [NAME ...]``: measure, print a table, write ``bench/results.json``.

The exit code is 1 where a limit is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from bench import clone, cycle, first_driver, flood, ioctl, preflight, symbols, unused
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
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure speed and scale.")
    parser.add_argument("name", nargs="*", choices=[*MEASUREMENTS, []], help="only these")
    names = parser.parse_args().name or list(MEASUREMENTS)
    figures = []
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        figures += MEASUREMENTS[name]()
    print(render(figures))
    loads = " ".join(f"{load:.2f}" for load in os.getloadavg())
    print(f"load average: {loads}; cores: {os.cpu_count()}")
    told = [figure.as_json() for figure in figures]
    RESULTS.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0 if all(figure.ok is not False for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
