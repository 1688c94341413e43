"""The command ``kdriver``."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from pytest_kdriver.cli import build, check, doctor, dump, gc, image, kd, run, sign, vm
from pytest_kdriver.errors import ConfigError, KdriverError

COMMANDS = (run, check, build, sign, image, vm, kd, dump, doctor, gc)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments``; the exit code.

    0: done. 1: the driver, its build or the target failed. 2: the call or the config is wrong.
    130: interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="kdriver", description="Build, load and watch Windows kernel drivers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    chosen = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a driver prints what it likes
    try:
        return int(chosen.call(chosen))
    except ConfigError as error:
        print(f"kdriver: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KdriverError as error:
        print(f"kdriver: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED
    except OSError as error:
        print(f"kdriver: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
