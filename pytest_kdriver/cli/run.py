"""``kdriver run``: load one driver, watch it, unload it."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pytest_kdriver.config import find_root, load_config
from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import ConfigError, DriverError, StartFailed
from pytest_kdriver.guest.registry import encode_value
from pytest_kdriver.kernel.events import DebugPrint
from pytest_kdriver.kernel.log import Window
from pytest_kdriver.kernel.text import printable
from pytest_kdriver.session import Session
from pytest_kdriver.targets.target import ParameterValue

POLL = 0.2
"""Seconds after which the follower looks whether it shall stop; lines are shown at once."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "run",
        help="load a driver, show what it prints, unload it",
        description="Load a driver, show what it prints as it prints it, unload it, and tell "
        "DriverEntry's status and what is left of its pool. The exit code is 0 if it started, stopped "
        "and leaked nothing, else 1.",
    )
    parser.add_argument(
        "driver", help="a .sys file, or a package of the configured cargo workspace"
    )
    parser.add_argument(
        "--vm", metavar="NAME", help="the target (default: the config's, else wine)"
    )
    parser.add_argument(
        "--for",
        dest="seconds",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="how long it stays loaded (default: 0); Ctrl-C unloads it earlier",
    )
    parser.add_argument(
        "-p",
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a value of the service's Parameters key: a number becomes a REG_DWORD or REG_QWORD, "
        "anything else a REG_SZ; may be repeated",
    )
    parser.add_argument(
        "--service", metavar="NAME", help="the service's name (default: the driver's)"
    )
    parser.add_argument(
        "--timeout", type=deadline, metavar="SECONDS", help="for each of load and unload"
    )
    parser.set_defaults(call=call)


def call(options: argparse.Namespace) -> int:
    """Do it, and tell."""
    config = load_config(find_root(Path.cwd()))
    target = options.vm or (config.vm[0] if config.vm else "wine")
    parameters = _parameters(options.parameter)
    name = options.driver
    if "/" not in name and Path(name).is_file():
        name = f"./{name}"
    session = Session(config)
    try:
        session.images.find(name, beside=Path.cwd())  # what isn't there needs no target to say so
        session.current.beside = Path.cwd()
        handle = session.handle(target)
        session.prepare(target, "none", "")
        driver = handle.make_driver(
            name,
            service=options.service,
            parameters=parameters,
            timeout=options.timeout,
        )
        return _run(driver, options.seconds)
    finally:
        session.close()


def _run(driver: Driver, seconds: float) -> int:
    with _live(driver.window):
        failed = _load_and_unload(driver, seconds)
    for finding in driver.preflight.warnings if driver.preflight else ():
        _say(str(finding))
    if failed is not None:
        _say(f"FAILED: {failed}")
        return 1
    _say(f"{driver.service} started, stopped and left nothing behind")
    return 0


def _load_and_unload(driver: Driver, seconds: float) -> str | None:
    """What went wrong, None for nothing."""
    wrong = []
    try:
        status = driver.start()
        try:
            _say(f"DriverEntry returned {status}")
            time.sleep(seconds)
        except KeyboardInterrupt:
            _say("interrupted: unloading")
    except StartFailed as error:
        wrong.append(str(error) if error.status.is_success else str(error.status))
    except DriverError as error:
        wrong.append(str(error))
    try:
        driver.finish()
    except DriverError as error:
        wrong.append(str(error))
    return "\n".join(wrong) or None


@contextmanager
def _live(window: Window) -> Iterator[None]:
    """Show what the driver prints while it prints it."""
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(window, done), name="kdriver-follow")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _follow(window: Window, done: threading.Event) -> None:
    position = window.start
    while True:
        last_look, end = done.is_set(), len(window.log)
        for at, event in window.numbered(position):
            position = at + 1
            if isinstance(event, DebugPrint):
                try:
                    for line in event.lines:
                        print(printable(line), flush=True)
                except BrokenPipeError:
                    return  # nobody looks any more
        if last_look:
            return
        window.log.wait(max(position, end), time.monotonic() + POLL)


def _parameters(settings: Sequence[str]) -> dict[str, ParameterValue]:
    parameters: dict[str, ParameterValue] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise ConfigError(f"--parameter {setting!r}: write NAME=VALUE")
        try:
            parameters[name] = int(value, 0)
        except ValueError:
            parameters[name] = value
        try:
            encode_value(parameters[name])
        except ValueError as error:
            raise ConfigError(f"--parameter {setting!r}: {error}") from None
    return parameters


def seconds(text: str) -> float:
    """An argument that is a number of seconds."""
    value = float(text)
    if not 0 <= value < threading.TIMEOUT_MAX:
        raise ValueError
    return value


def deadline(text: str) -> float:
    """The same, but more than 0."""
    value = seconds(text)
    if not value:
        raise ValueError
    return value


def _say(text: str) -> None:
    print(f"kdriver: {text}", file=sys.stderr, flush=True)
