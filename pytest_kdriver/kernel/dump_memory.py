"""What the memory in a kernel's or a complete dump says: its modules, and the crashed thread's stack.

The pages are found by kdmp-parser, of the extra ``dumps``. It is C++ and reads what nobody vouches for, so it
runs in a process of its own: ``python -m pytest_kdriver.kernel.dump_memory FILE LIST STACK`` writes JSON.
Layouts: KLDR_DATA_TABLE_ENTRY as rizin's ``dmp_specs.h`` has it, of x64.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from pytest_kdriver.errors import ConfigError, DumpError
from pytest_kdriver.kernel.dump import MODULES_MOST, Dump, Module, addresses_in, is_image

TIMEOUT: Final = 120.0
"""Seconds. It looks at each page of a dump, which may have gigabytes."""

_PAGE: Final = 0x1000
_NAME_MOST: Final = 520
_STACK_SIZE: Final = 4 * _PAGE


def with_memory(path: Path, dump: Dump) -> Dump:
    """``dump``, which is that in ``path``, with its modules and its stack.

    Raises ``ConfigError`` without the extra, and ``DumpError`` where the dump has no memory or it makes no
    sense.
    """
    if dump.module_list is None or dump.stack_pointer is None:
        raise DumpError(
            f"{path} is a {dump.kind}, which has no memory to look at, or is not of x64"
        )
    if find_spec("kdmp_parser") is None:
        raise ConfigError("--deep takes a package: pip install 'pytest-kdriver[dumps]'")
    arguments = [str(path.absolute()), str(dump.module_list), str(dump.stack_pointer)]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DumpError(f"{path}: its memory took more than {TIMEOUT:g} s to read") from error
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else _last_line(done.stderr)
        raise DumpError(f"{path}: its memory can't be read: {how}")
    told = json.loads(done.stdout)
    modules = tuple(sorted((Module(*one) for one in told["modules"]), key=lambda one: one.base))
    stack = tuple(addresses_in(modules, bytes.fromhex(told["stack"])))
    missing = [what for what in dump.missing if not what.startswith("modules")]
    if not modules:
        missing.append("modules")
    return replace(dump, modules=modules, stack=stack, missing=tuple(missing))


def _last_line(output: bytes) -> str:
    return output.decode("utf-8", "replace").strip().rpartition("\n")[2]


class _Memory:
    """The guest's virtual memory; what is not in the dump is None."""

    def __init__(self, path: str) -> None:
        import kdmp_parser

        self._dump: Any = kdmp_parser.KernelDumpParser(path)

    def read(self, address: int, size: int) -> bytes | None:
        data = b""
        for page in range(address & -_PAGE, address + size, _PAGE):
            content = self._dump.read_virtual_page(page) if page < 1 << 64 else None
            if content is None:
                return None
            data += bytes(content)
        begin = address % _PAGE
        return data[begin : begin + size]


def _modules(memory: _Memory, listed: int) -> Iterator[tuple[str, int, int]]:
    head = memory.read(listed, 8)
    seen = {listed}
    at = int.from_bytes(head or b"", "little")
    while at and at not in seen and len(seen) <= MODULES_MOST:
        seen.add(at)
        entry = memory.read(at, 0x68)
        if entry is None:
            return
        base, size = struct.unpack_from("<Q8xI", entry, 0x30)
        length, buffer = struct.unpack_from("<H6xQ", entry, 0x58)
        name = memory.read(buffer, min(length, _NAME_MOST)) if length else None
        if name and is_image(base, size):
            yield name.decode("utf-16-le", "replace"), base, size
        (at,) = struct.unpack_from("<Q", entry)


def _stack(memory: _Memory, pointer: int) -> bytes:
    """What lies above ``pointer``, as far as it is there."""
    data = b""
    while len(data) < _STACK_SIZE:
        at = pointer + len(data)
        more = memory.read(at, _PAGE - at % _PAGE)
        if not more:
            break
        data += more
    return data


def _main(path: str, module_list: str, stack_pointer: str) -> None:
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)  # where kdmp-parser writes what it can't read
        memory = _Memory(path)
        modules = list(_modules(memory, int(module_list)))
        told = {"modules": modules, "stack": _stack(memory, int(stack_pointer)).hex()}
        json.dump(told, output)


if __name__ == "__main__":
    _main(*sys.argv[1:])
