"""``kdriver gc``: remove what killed runs left behind."""

from __future__ import annotations

import argparse

from pytest_kdriver.targets.leftovers import REMOVERS
from pytest_kdriver.targets.runs import collect_garbage


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "gc",
        help="remove what killed runs left behind",
        description="End the processes and remove the files of runs whose owner is gone. "
        "Each run does the same when it starts.",
    )
    parser.set_defaults(call=call)


def call(options: argparse.Namespace) -> int:  # noqa: ARG001 -- the commands' shape
    """Remove, and say what."""
    removed = collect_garbage(REMOVERS)
    for folder in removed:
        print(f"removed {folder}")
    if not removed:
        print("nothing was left behind")
    return 0
