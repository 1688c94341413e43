"""What a failed test's report says of the driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import KdriverError
from pytest_kdriver.kernel.text import kernel_lines, printable

MOST_LINES: Final = 100


def sections(drivers: Sequence[Driver]) -> list[tuple[str, str]]:
    """Titles and texts, for a person: what is wrong with each driver's file, what it printed, its pool,
    and its kernel log.
    """
    return [
        (f"{title} of {driver.service}" if len(drivers) > 1 else title, text(driver))
        for driver in drivers
        for title, text in (
            *([("Image", _image)] if driver.preflight and driver.preflight.findings else []),
            ("DbgPrint", _printed),
            ("Pool", _pool),
            ("Kernel", _kernel),
        )
    ]


def _image(driver: Driver) -> str:
    return str(driver.preflight)


def _printed(driver: Driver) -> str:
    try:
        lines = driver.dbgprint.lines
    except KdriverError as error:
        return str(error)
    if not lines:
        return f"{driver.service} printed nothing"
    left_out = [f"... {len(lines) - MOST_LINES} lines before"] if len(lines) > MOST_LINES else []
    return "\n".join(left_out + [printable(line) for line in lines[-MOST_LINES:]])


def _pool(driver: Driver) -> str:
    try:
        if (driver.loaded or driver.lost) and not driver.sees_blocks:
            return f"{driver.service} is not unloaded: what it leaves can't be counted yet"
        if driver.loaded:
            return f"in use, while {driver.service} is loaded:\n{driver.pool.in_use}"
        if driver.lost:
            return f"in use when {driver.service} was lost:\n{driver.pool.in_use}"
        return driver.pool.problems(leaks=True) or f"{driver.service} left nothing behind"
    except KdriverError as error:
        return str(error)


def _kernel(driver: Driver) -> str:
    try:
        lines = kernel_lines(driver.window, MOST_LINES)
    except KdriverError as error:
        return str(error)
    if lag := driver.log_lag:
        lines.append(f"(the guest's kernel: {lag})")
    return "\n".join(lines) or "nothing was seen"
