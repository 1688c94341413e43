r"""What a Windows is set to so that drivers can be tested on it, by requests to its agent.

Each setting is made, then read back from where nothing is translated: the registry, also for what bcdedit
writes, or a program's exit code. ``docs/windows.md`` says where each is from. Not verified on Windows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pytest_kdriver.errors import TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.targets.machine import FOLDER
from pytest_kdriver.targets.windows.kinds import (
    CONTROL,
    DEBUGGER_SETTINGS,
    GUARD,
    INTEGRITY,
    POLICIES,
    PRINT_FILTER,
    SERVICES,
    Boot,
    Element,
    Reading,
    Setting,
    Value,
    Values,
    run,
    shown,
)
from pytest_kdriver.targets.windows.listeners import FirewallRule, Listeners

__all__ = ["Reading", "Wanted", "make_settings", "read_settings", "settings"]

ALL_LEVELS: Final = 0xFFFFFFFF
STACKS: Final = 1 << 30
"""The level of IHVDRIVER at which the framework's allocator tells each block's stack, in builds for tests:
over a serial port that would take longer than all else a driver does."""

FILTERS: Final = {
    "DEFAULT": ALL_LEVELS,
    "IHVDRIVER": ALL_LEVELS & ~STACKS,
    "IHVAUDIO": ALL_LEVELS,
    "IHVBUS": ALL_LEVELS,
    "IHVNETWORK": ALL_LEVELS,
    "IHVSTREAMING": ALL_LEVELS,
    "IHVVIDEO": ALL_LEVELS,
}
"""The components that drivers print as, and which levels are let through; DbgPrint's is DEFAULT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """In what one Windows for tests differs from another.

    ``agent_service`` is the name of the agent's service; "" where it is no service. ``hvci``: memory
    integrity is to be on. ``certificate`` is a PFX without a password, for WinRM's HTTPS; None: HTTP alone.
    """

    agent_service: str
    hvci: bool = False
    certificate: bytes | None = field(default=None, repr=False)


def make_settings(agent: Agent, wanted: Wanted, progress: Callable[[str], None]) -> None:
    """Set all, and read each back; ``progress`` is told the name of each before.

    Most are in force behind the next restart of the guest. ``TargetError`` for one that reads otherwise
    than it was set; what the agent raises.
    """
    for setting in settings(wanted):
        progress(setting.name)
        _make(agent, setting)


def switch_debugger_on(agent: Agent) -> None:
    """Have all starts of the guest from the next one on wait for a debugger.

    Raises as ``make_settings``.
    """
    _make(agent, DEBUGGER)


def _make(agent: Agent, setting: Setting) -> None:
    setting.make(agent)
    reading = setting.read(agent)
    if not reading.in_force:
        raise TargetError(f"{reading.name} was set to {reading.wanted}, and reads {reading.found}")


def read_settings(agent: Agent, wanted: Wanted) -> list[Reading]:
    """What all are set to, in the order in which they are made."""
    return [setting.read(agent) for setting in settings(wanted)]


@dataclass(frozen=True, slots=True)
class Hibernation:
    """That there is no hibernation: its file would be as large as the memory."""

    name: str = "hibernation"

    def make(self, agent: Agent) -> None:
        """See ``Setting``. Where the machine has none anyway, powercfg may say no."""
        run(agent, ["powercfg.exe", "/hibernate", "off"], accept=(0, 1))

    def read(self, agent: Agent) -> Reading:
        """See ``Setting``."""
        found = agent.get_value(f"{CONTROL}\\Power", "HibernateEnabled")
        return Reading(
            name=self.name,
            wanted="off",
            found=f"HibernateEnabled {shown(found)}",
            in_force=not found,
        )


@dataclass(frozen=True, slots=True)
class PasswordAge:
    """That the user's password does not expire, which it does after 42 days."""

    name: str = "password age"

    def make(self, agent: Agent) -> None:
        """See ``Setting``."""
        run(agent, ["net.exe", "accounts", "/maxpwage:unlimited"])

    def read(self, agent: Agent) -> Reading:
        """See ``Setting``. By the security template, whose keys are nobody's language."""
        path = f"{FOLDER}\\policy.inf"
        command = ["secedit.exe", "/export", "/areas", "SECURITYPOLICY", "/cfg", path, "/quiet"]
        run(agent, command)
        template = agent.get(path)
        agent.delete(path)
        age = maximum_password_age(template)
        return Reading(
            name=self.name, wanted="unlimited", found=shown(age), in_force=age == UNLIMITED
        )


UNLIMITED: Final = -1


def maximum_password_age(template: bytes) -> int | None:
    """The days after which passwords expire, ``UNLIMITED`` for never, from what secedit exports: UTF-16."""
    found = re.search(
        r"^MaximumPasswordAge\s*=\s*(-?\d+)\s*$", template.decode("utf-16", "replace"), re.M
    )
    return int(found[1]) if found else None


def _one(
    name: str, key: str, value: str, data: int | str | bytes | tuple[str, ...] | None
) -> Values:
    return Values(name, (Value(key, value, data),))


def _set_boot(name: str, option: str, told: str, element: Element) -> Boot:
    return Boot(name, (("/set", element.of, option, told),), (element,))


DEBUGGER: Final = _set_boot(
    "kernel debugger", "debug", "on", Element("{default}", 0x260000A0, "debug", 1)
)


def _agent_service(service: str) -> Values:
    key = f"{SERVICES}\\{service}"
    restart = (1).to_bytes(4, "little") + (1000).to_bytes(4, "little")
    header = b"".join(number.to_bytes(4, "little") for number in (0, 0, 0, 3, 20))
    return Values(
        "agent's service",
        (
            Value(key, "Start", 2),
            Value(key, "FailureActions", header + 3 * restart),
            Value(key, "FailureActionsOnNonCrashFailures", 1),
        ),
    )


def settings(wanted: Wanted) -> tuple[Setting, ...]:
    """All settings, as data, in the order in which they are made."""
    crash = f"{CONTROL}\\CrashControl"
    power = f"{POLICIES}\\Power\\PowerSettings"
    defender = f"{POLICIES}\\Windows Defender\\Exclusions"
    logon = r"SOFTWARE\Microsoft\Windows NT\CurrentVersion\Winlogon"
    boot = "{default}"
    return (
        _set_boot("test signing", "testsigning", "on", Element(boot, 0x16000049, "testsigning", 1)),
        Values(
            "memory integrity",
            (
                Value(INTEGRITY, "Enabled", int(wanted.hvci)),
                Value(GUARD, "EnableVirtualizationBasedSecurity", int(wanted.hvci)),
            ),
        ),
        _set_boot(
            "hypervisor",
            "hypervisorlaunchtype",
            "auto" if wanted.hvci else "off",
            Element(boot, 0x250000F0, "hypervisorlaunchtype", int(wanted.hvci)),
        ),
        Values(
            "debug print filter",
            tuple(Value(PRINT_FILTER, component, levels) for component, levels in FILTERS.items()),
        ),
        Boot(
            "kernel debugger on COM1",
            (("/dbgsettings", "serial", "debugport:1", "baudrate:115200"),),
            (
                Element(DEBUGGER_SETTINGS, 0x15000011, "type", 0),
                Element(DEBUGGER_SETTINGS, 0x15000013, "port", 1),
                Element(DEBUGGER_SETTINGS, 0x15000014, "baud rate", 115200),
            ),
        ),
        _one("signatures beside a debugger", f"{CONTROL}\\CI", "DebugFlags", 0x10),
        _one(
            "vulnerable driver blocklist",
            f"{CONTROL}\\CI\\Config",
            "VulnerableDriverBlocklistEnable",
            0,
        ),
        Values(
            "crash dumps",
            (
                Value(crash, "CrashDumpEnabled", 3),
                Value(crash, "AutoReboot", 1),
                Value(crash, "Overwrite", 1),
                Value(crash, "LogEvent", 1),
                Value(crash, "AlwaysKeepMemoryDump", 1),
            ),
        ),
        _one(
            "page file",
            f"{CONTROL}\\Session Manager\\Memory Management",
            "PagingFiles",
            (r"C:\pagefile.sys 512 512",),
        ),
        _one("updates", f"{POLICIES}\\Windows\\WindowsUpdate\\AU", "NoAutoUpdate", 1),
        Values(
            "sleep and screen",
            tuple(
                Value(f"{power}\\{setting}", "ACSettingIndex", 0)
                for setting in (
                    "29F6C1DB-86DA-48C5-9FDB-F2B67B1F44DA",
                    "3C0BC021-C8A8-4E07-A973-6B14CBCB2B7E",
                )
            ),
        ),
        Hibernation(),
        Boot(
            "recovery prompts",
            (
                ("/set", boot, "recoveryenabled", "no"),
                ("/set", boot, "bootstatuspolicy", "ignoreallfailures"),
            ),
            (
                Element(boot, 0x16000009, "recoveryenabled", 0),
                Element(boot, 0x250000E0, "bootstatuspolicy", 1),
            ),
        ),
        Values(
            "virus scanner",
            (
                Value(defender, "Exclusions_Paths", 1),
                Value(f"{defender}\\Paths", FOLDER, "0"),
            ),
        ),
        _one(
            "administrators over the network",
            r"SOFTWARE\Microsoft\Windows\CurrentVersion\Policies\System",
            "LocalAccountTokenFilterPolicy",
            1,
        ),
        Values(
            "WinRM service",
            (
                Value(f"{SERVICES}\\WinRM", "Start", 2),
                Value(f"{POLICIES}\\Windows\\WinRM\\Service", "AllowUnencryptedTraffic", 0),
            ),
        ),
        Listeners(wanted.certificate),
        FirewallRule(),
        PasswordAge(),
        *((_agent_service(wanted.agent_service),) if wanted.agent_service else ()),
        Values(
            "clock",
            (
                Value(f"{CONTROL}\\TimeZoneInformation", "RealTimeIsUniversal", 1),
                Value(f"{SERVICES}\\w32time", "Start", 4),
            ),
        ),
        Values(
            "automatic logon",
            (
                Value(logon, "AutoAdminLogon", "0"),
                Value(logon, "AutoLogonCount", None),
                Value(logon, "DefaultPassword", None),
            ),
        ),
    )
