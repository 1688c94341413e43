"""What has to be in force in a Windows before a test begins: what its kernel says, where that can be asked.

A setting in the registry is what the next start makes of it; what is in force now the kernel knows. Not
verified on Windows.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from pytest_kdriver.errors import AgentError, TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.targets.windows.kinds import (
    CONTROL,
    INTEGRITY,
    PRINT_FILTER,
    Element,
    shown,
)

CODE_INTEGRITY: Final = 103
"""SystemCodeIntegrityInformation: Length, CodeIntegrityOptions; in Microsoft's NtQuerySystemInformation."""

SECURE_BOOT: Final = 145
"""SystemSecureBootInformation: SecureBootEnabled, SecureBootCapable, a byte each, by phnt's ntexapi.h."""

KERNEL_DEBUGGER: Final = 35
"""SystemKernelDebuggerInformation: KernelDebuggerEnabled, KernelDebuggerNotPresent, likewise."""

DBG_PRINT: Final = 1 << 3
"""What DbgPrint's level, DPFLTR_INFO_LEVEL, is in a component's mask."""

CLOCK_TOLERANCE: Final = 300.0
"""Seconds; Kerberos takes no more, and a certificate made just now is valid."""

FREE_SPACE: Final = 64 << 20
"""Bytes of disk C: that images, and what a crash leaves, may take."""


class CodeIntegrity(IntFlag):
    """CODEINTEGRITY_OPTION_..., as far as it counts here."""

    ENABLED = 0x1
    TESTSIGN = 0x2
    HVCI_KMCI_ENABLED = 0x400


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What was found of one thing.

    ``found`` is in words; ``mends`` says what to do where it is not ``in_force``. ``needed``: without it a
    test fails, or passes, for a reason that is not its driver's.
    """

    name: str
    found: str
    in_force: bool
    needed: bool
    mends: str


class NotInForce(TargetError):
    """A Windows is not as tests need it. Nobody but its owner can change that, so it is not tried again."""


def decode_code_integrity(data: bytes) -> CodeIntegrity:
    """What SystemCodeIntegrityInformation says. ``AgentError`` for what is none."""
    if len(data) != 8:
        raise AgentError(f"{data.hex(' ')} is no code integrity information")
    return CodeIntegrity(struct.unpack("<II", data)[1])


def decode_flags(data: bytes, count: int = 2) -> tuple[bool, ...]:
    """What a structure of ``count`` BOOLEANs says. ``AgentError`` for what is shorter."""
    if len(data) < count:
        raise AgentError(f"{data.hex(' ') or 'nothing'} is not {count} flags")
    return tuple(bool(flag) for flag in data[:count])


def assert_in_force(agent: Agent, *, kernel_log: bool, target: str) -> list[Fact]:
    """See that a Windows is what tests need. What is not, and no test suffers from, is the answer.

    ``kernel_log`` says whether tests see what is printed there. ``NotInForce`` names all that is not, and
    what mends it. What a Windows does not tell is not in force, and stops nobody.
    """
    lacking = [fact for fact in examine(agent, kernel_log=kernel_log) if not fact.in_force]
    needed = [fact for fact in lacking if fact.needed]
    if needed:
        told = "; ".join(f"{fact.name}: {fact.found}. {fact.mends}" for fact in needed)
        raise NotInForce(f"this is not in force in its Windows: {told}", target=target)
    return lacking


def examine(agent: Agent, *, kernel_log: bool) -> Iterator[Fact]:
    """Each thing that is asserted."""
    for name, look in (
        ("test signing", _test_signing),
        ("debug print filter", lambda agent: _print_filter(agent, needed=kernel_log)),
        ("memory integrity", _memory_integrity),
        ("signatures beside a debugger", _debugger),
        ("crash dumps", _crash_dumps),
        ("clock", _clock),
        ("free disk", _free_disk),
    ):
        yield _looked_at(agent, name, look)


def _looked_at(agent: Agent, name: str, look: Callable[[Agent], Fact]) -> Fact:
    try:
        return look(agent)
    except AgentError as error:
        return Fact(
            name=name,
            found=f"can't be told ({error})",
            in_force=False,
            needed=False,
            mends="kdriver doctor --vm has more",
        )


def _test_signing(agent: Agent) -> Fact:
    options = decode_code_integrity(agent.system_information(CODE_INTEGRITY))
    signs = CodeIntegrity.TESTSIGN in options
    checks = CodeIntegrity.ENABLED in options
    found = "on" if signs else "off" if checks else "off, as are all checks of signatures"
    return Fact(
        name="test signing",
        found=f"{found} (code integrity {options:#x})",
        in_force=signs or not checks,
        needed=True,
        mends="" if signs else _how_to_sign(agent),
    )


def _how_to_sign(agent: Agent) -> str:
    if secure_boot(agent):
        return (
            "Secure Boot is on, which keeps it off: switch that off in the firmware's settings, then "
            "bcdedit /set testsigning on, and restart"
        )
    if Element("{default}", 0x16000049, "testsigning", 1).found(agent):
        return "It is switched on for the next start: restart it"
    return "As administrator: bcdedit /set testsigning on, and restart"


def secure_boot(agent: Agent) -> bool:
    """Whether Secure Boot is on; where the kernel does not say, by the registry. Without UEFI it is not."""
    try:
        return decode_flags(agent.system_information(SECURE_BOOT))[0]
    except AgentError:
        return agent.get_value(f"{CONTROL}\\SecureBoot\\State", "UEFISecureBootEnabled") == 1


def _print_filter(agent: Agent, *, needed: bool) -> Fact:
    mask = agent.get_value(PRINT_FILTER, "DEFAULT")
    lets_through = isinstance(mask, int) and bool(mask & DBG_PRINT)
    return Fact(
        name="debug print filter",
        found=f"DEFAULT {shown(mask)}",
        in_force=lets_through,
        needed=needed,
        mends=f'DbgPrint prints nothing: reg add "HKLM\\{PRINT_FILTER}" /v DEFAULT /t REG_DWORD '
        "/d 0xffffffff /f, and restart",
    )


def _memory_integrity(agent: Agent) -> Fact:
    """It is in force as it was set: on where it was set on. Nobody is stopped by one that is on by itself."""
    options = decode_code_integrity(agent.system_information(CODE_INTEGRITY))
    runs = CodeIntegrity.HVCI_KMCI_ENABLED in options
    wanted = agent.get_value(INTEGRITY, "Enabled") == 1
    return Fact(
        name="memory integrity",
        found=f"set {'on' if wanted else 'off'}, and {'runs' if runs else 'does not run'}",
        in_force=wanted == runs,
        needed=wanted and not runs,
        mends="What it refuses would load: restart it, and give its processor virtualization (SVM, VMX)"
        if wanted
        else f'reg add "HKLM\\{INTEGRITY}" /v Enabled /t REG_DWORD /d 0 /f, and restart',
    )


def _debugger(agent: Agent) -> Fact:
    """A debugger that is attached lifts the check of signatures, but for this value."""
    enabled, not_present = decode_flags(agent.system_information(KERNEL_DEBUGGER))
    flags = agent.get_value(f"{CONTROL}\\CI", "DebugFlags")
    kept = isinstance(flags, int) and bool(flags & 0x10)
    attached = enabled and not not_present
    return Fact(
        name="signatures beside a debugger",
        found=f"a debugger is {'' if attached else 'not '}attached, DebugFlags {shown(flags)}",
        in_force=kept or not attached,
        needed=False,
        mends=f'What nobody signed loads: reg add "HKLM\\{CONTROL}\\CI" /v DebugFlags /t REG_DWORD '
        "/d 0x10 /f, and restart",
    )


def _crash_dumps(agent: Agent) -> Fact:
    key = f"{CONTROL}\\CrashControl"
    kind, reboots = agent.get_value(key, "CrashDumpEnabled"), agent.get_value(key, "AutoReboot")
    return Fact(
        name="crash dumps",
        found=f"CrashDumpEnabled is {shown(kind)}, AutoReboot {shown(reboots)}",
        in_force=bool(kind) and reboots == 1,
        needed=False,
        mends=f'A crash leaves no dump, or the machine at its blue screen: reg add "HKLM\\{key}" /v '
        "CrashDumpEnabled /t REG_DWORD /d 3 /f, and the same of AutoReboot with 1",
    )


def _clock(agent: Agent) -> Fact:
    off = agent.clock() - time.time()
    return Fact(
        name="clock",
        found=f"off by {off:.0f} s",
        in_force=abs(off) <= CLOCK_TOLERANCE,
        needed=False,
        mends="A logon may be refused, and certificates be not yet valid: set it, by w32tm /resync say",
    )


def _free_disk(agent: Agent) -> Fact:
    free = agent.free_space("C:\\")
    return Fact(
        name="free disk",
        found=f"{free >> 20} MiB of C: are free",
        in_force=free >= FREE_SPACE,
        needed=True,
        mends=f"{FREE_SPACE >> 20} MiB are needed: free some",
    )
