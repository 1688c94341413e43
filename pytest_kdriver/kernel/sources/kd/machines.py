"""What differs between the machines that a kernel runs on: registers, breakpoints, how it is let go on.

Contexts are those of winnt.h (CONTEXT, ARM64_NT_CONTEXT), control reports and control sets those of
windbgkd.h. Only x64 was tried with a kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from pytest_kdriver.kernel.sources.kd.packets import (
    CONTROL_REPORT,
    Api,
    Request,
    StateChange,
)

BREAKPOINT: Final = 0x80000003
SINGLE_STEP: Final = 0x80000004
ASSERTION: Final = 0xC0000420


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the registers stand in its context, and the rest that is its own. Offsets are in bytes."""

    number: int
    """As in a PE file's header."""
    context_size: int
    context_flags: int
    program_counter: int
    stack_pointer: int
    first_argument: int
    traps: Mapping[bytes, int]
    """The instructions that a kernel stops at, and how much further it goes on."""
    instruction_count: int
    instructions: int
    """In a control report."""
    debug_register: int | None
    """In a control report: Dr7, which Continue2 writes to all processors."""

    def instructions_at(self, change: StateChange) -> bytes:
        """What stands where the kernel stopped, as it says; b"" where it could not read it."""
        report = change.payload[CONTROL_REPORT:]
        count = report[self.instruction_count]
        return report[self.instructions : self.instructions + min(count, 16)]

    def length_of_trap(self, instructions: bytes) -> int:
        """How many bytes the trap has that ``instructions`` begin with; 0 where it is none."""
        return next((size for trap, size in self.traps.items() if instructions.startswith(trap)), 0)

    def register(self, context: bytes, offset: int) -> int:
        """A register of 8 bytes."""
        return int.from_bytes(context[offset : offset + 8], "little")

    def with_program_counter(self, context: bytes, value: int) -> bytes:
        """``context``, to go on at ``value``."""
        behind = self.program_counter + 8
        return context[: self.program_counter] + struct.pack("<Q", value) + context[behind:]

    def flags_in(self, context: bytes) -> int:
        """What of the context is valid."""
        return int.from_bytes(context[self.context_flags : self.context_flags + 4], "little")

    def go_on(self, change: StateChange, status: int) -> Request:
        """Lets the kernel go on: not traced, with no range of symbols, and Dr7 as it was."""
        fields = struct.pack("<II", status, 0)
        if self.debug_register is not None:
            at = CONTROL_REPORT + self.debug_register
            fields += change.payload[at : at + 8]
        return Request(Api.CONTINUE2, change.processor, fields)


X64: Final = Machine(
    number=0x8664,
    context_size=0x4D0,
    context_flags=0x30,
    program_counter=0xF8,
    stack_pointer=0x98,
    first_argument=0x80,
    traps=MappingProxyType({b"\xcc": 1, b"\xcd\x2c": 2}),
    instruction_count=20,
    instructions=24,
    debug_register=8,
)
ARM64: Final = Machine(
    number=0xAA64,
    context_size=0x390,
    context_flags=0,
    program_counter=0x108,
    stack_pointer=0x100,
    first_argument=0x8,
    traps=MappingProxyType({b"\x00\x00\x3e\xd4": 4}),
    instruction_count=16,
    instructions=20,
    debug_register=None,
)
MACHINES: Final = (X64, ARM64)
