"""``kdriver dump``: what a crash dump says, in words."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from pytest_kdriver.kernel.dump import Dump, read_dump
from pytest_kdriver.kernel.dump_memory import with_memory
from pytest_kdriver.kernel.text import printable
from pytest_kdriver.ntstatus import NTSTATUS


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "dump",
        help="tell what a crash dump of Windows says",
        description="Tell the bug check of each FILE in words, where it was, and what else its header says; "
        "of a minidump its stack, too. Of 64-bit dumps; symbols are not read.",
    )
    parser.add_argument(
        "file", nargs="+", type=Path, metavar="FILE", help="a minidump, or a MEMORY.DMP"
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="look into the memory of a kernel dump or a complete one, too, for its modules and its stack: "
        "takes the extra dumps, and some time",
    )
    parser.add_argument("--json", action="store_true", help="as a JSON list, for programs")
    parser.set_defaults(call=call)


def call(options: argparse.Namespace) -> int:
    """Read them all, then tell."""
    dumps = [(file, read_dump(file)) for file in options.file]
    if options.deep:
        dumps = [(file, dump if dump.modules else with_memory(file, dump)) for file, dump in dumps]
    if options.json:
        print(json.dumps([as_json(file, dump) for file, dump in dumps], indent=2))
        return 0
    for file, dump in dumps:
        for line in (f"{file}:", *lines(dump)):
            print(printable(line))
    return 0


def lines(dump: Dump) -> Iterator[str]:
    """What a dump says, for a person; not yet what a terminal may be shown: see ``printable``."""
    when = f", {dump.time:%Y-%m-%d %H:%M:%S} UTC" if dump.time else ""
    up = "" if dump.uptime is None else f", up {timedelta(seconds=int(dump.uptime))}"
    processors = f"{dump.processors} processor{'' if dump.processors == 1 else 's'}"
    yield f"  {dump.kind} of Windows build {dump.build}, {dump.machine}, {processors}{when}{up}"
    named = f" {dump.name}" if dump.name else ""
    yield f"  bug check 0x{dump.code:X}{named} ({', '.join(map(_hex, dump.parameters))})"
    yield from (f"    {words}" for words in dump.words)
    if dump.exception is not None:
        yield f"  exception {NTSTATUS(dump.exception.code)} at {_place(dump, dump.exception.address)}"
    if dump.instruction is not None:
        yield f"  the processor was at {_place(dump, dump.instruction)}"
    if dump.stack:
        yield "  on the stack:"
        yield from (f"    {_place(dump, address)}" for address in dump.stack)
    if dump.modules:
        yield f"  {len(dump.modules)} modules"
    if dump.missing:
        yield f"  not in it: {'; '.join(dump.missing)}"


def _hex(value: int) -> str:
    return f"0x{value:X}"


def _place(dump: Dump, address: int) -> str:
    return dump.where(address) or _hex(address)


def as_json(file: Path, dump: Dump) -> dict[str, object]:
    """The same, for programs; addresses and codes as text, in hex."""

    def place(address: int | None) -> dict[str, object] | None:
        if address is None:
            return None
        return {"address": _hex(address), "where": dump.where(address)}

    exception = None
    if dump.exception is not None:
        exception = {
            "code": _hex(dump.exception.code),
            "name": str(NTSTATUS(dump.exception.code)),
            **(place(dump.exception.address) or {}),
        }
    return {
        "file": str(file),
        "kind": dump.kind,
        "code": _hex(dump.code),
        "name": dump.name or None,
        "parameters": [_hex(value) for value in dump.parameters],
        "words": dump.words,
        "build": dump.build,
        "machine": dump.machine,
        "processors": dump.processors,
        "time": dump.time.isoformat() if dump.time else None,
        "uptime": dump.uptime,
        "exception": exception,
        "instruction": place(dump.instruction),
        "stack": [place(address) for address in dump.stack],
        "modules": [
            {"name": module.name, "base": _hex(module.base), "size": module.size}
            for module in dump.modules
        ],
        "missing": list(dump.missing),
    }
