r"""What a Windows is set to so that drivers can be tested on it, by requests to its agent.

Each setting is made, then read back from where nothing is translated: the registry, also for what bcdedit
writes, or a program's exit code. ``docs/windows.md`` says where each is from. Not verified on Windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from pytest_kdriver.errors import AgentError, TargetError
from pytest_kdriver.guest.agent import Agent, Completed
from pytest_kdriver.guest.words import words
from pytest_kdriver.targets.machine import FOLDER

PROGRAM_TIME: Final = 120.0
"""Seconds that a program may take; those that are run here take one, as a rule."""

CONTROL: Final = r"SYSTEM\CurrentControlSet\Control"
SERVICES: Final = r"SYSTEM\CurrentControlSet\Services"
POLICIES: Final = r"SOFTWARE\Policies\Microsoft"

FILTERS: Final = (
    *("DEFAULT", "IHVDRIVER", "IHVAUDIO", "IHVBUS", "IHVNETWORK", "IHVSTREAMING", "IHVVIDEO"),
)
"""The components that drivers print as; DbgPrint's is DEFAULT."""

ALL_LEVELS: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """In what one Windows for tests differs from another.

    ``agent_service`` is the name of the agent's service; "" where it is no service. ``hvci``: memory
    integrity is to be on. ``certificate`` is a PFX without a password, for WinRM's HTTPS; None: HTTP alone.
    """

    agent_service: str
    hvci: bool = False
    certificate: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was found of one setting, in words, and whether it is what was wanted."""

    name: str
    wanted: str
    found: str
    in_force: bool


class Setting(Protocol):
    """One thing that is set. Its methods raise what the agent raises."""

    @property
    def name(self) -> str:
        """What it is about."""
        ...

    def make(self, agent: Agent) -> None:
        """Set it."""
        ...

    def read(self, agent: Agent) -> Reading:
        """What it is set to."""
        ...


def make_settings(agent: Agent, wanted: Wanted, progress: Callable[[str], None]) -> None:
    """Set all, and read each back; ``progress`` is told the name of each before.

    Most are in force behind the next restart of the guest. ``TargetError`` for one that reads otherwise
    than it was set; what the agent raises.
    """
    for setting in settings(wanted):
        progress(setting.name)
        setting.make(agent)
        reading = setting.read(agent)
        if not reading.in_force:
            raise TargetError(
                f"{reading.name} was set to {reading.wanted}, and reads {reading.found}"
            )


def read_settings(agent: Agent, wanted: Wanted) -> list[Reading]:
    """What all are set to, in the order in which they are made."""
    return [setting.read(agent) for setting in settings(wanted)]


@dataclass(frozen=True, slots=True)
class Value:
    """A value below HKEY_LOCAL_MACHINE. ``data`` is None for one that shall not be there."""

    key: str
    name: str
    data: int | str | tuple[str, ...] | None

    def found(self, agent: Agent) -> int | str | bytes | tuple[str, ...] | None:
        """What is there."""
        data = agent.get_value(self.key, self.name)
        return tuple(data) if isinstance(data, list) else data


@dataclass(frozen=True, slots=True)
class Values:
    """A setting that is values of the registry."""

    name: str
    values: tuple[Value, ...]

    def make(self, agent: Agent) -> None:
        """See ``Setting``."""
        for value in self.values:
            if value.data is not None:
                agent.set_value(value.key, value.name, value.data)
            elif value.found(agent) is not None:
                agent.delete_value(value.key, value.name)

    def read(self, agent: Agent) -> Reading:
        """See ``Setting``."""
        found = [(value, value.found(agent)) for value in self.values]
        return Reading(
            name=self.name,
            wanted=_told((value.name, value.data) for value in self.values),
            found=_told((value.name, data) for value, data in found),
            in_force=all(value.data == data for value, data in found),
        )


def _told(values: Iterator[tuple[str, object]]) -> str:
    return ", ".join(f"{name} {_shown(data)}" for name, data in values)


def _shown(data: object) -> str:
    match data:
        case None:
            return "absent"
        case int():
            return str(data) if data < 10 else f"{data:#x}"
        case tuple():
            return "; ".join(map(str, data))
        case bytes():
            return data.hex(" ")
        case _:
            return str(data)


def run(agent: Agent, command: Sequence[str], *, accept: Sequence[int] = (0,)) -> Completed:
    """Run a program of the guest's. ``AgentError`` with what it said, unless ``accept`` has its exit code."""
    done = agent.run(command, time_limit=PROGRAM_TIME)
    if done.exit_code in accept:
        return done
    ended = "was not over in time" if done.timed_out else f"ended with {done.exit_code}"
    said = words((done.stdout + b"\n" + done.stderr).decode(errors="replace").strip())
    raise AgentError(f"{' '.join(command)} {ended}: {said or 'it said nothing'}", operation="run")


def _one(name: str, key: str, value: str, data: int | str | tuple[str, ...] | None) -> Values:
    return Values(name, (Value(key, value, data),))


def settings(wanted: Wanted) -> tuple[Setting, ...]:
    """All settings, as data, in the order in which they are made."""
    guard = f"{CONTROL}\\DeviceGuard"
    integrity = f"{guard}\\Scenarios\\HypervisorEnforcedCodeIntegrity"
    crash = f"{CONTROL}\\CrashControl"
    power = f"{POLICIES}\\Power\\PowerSettings"
    updates = f"{POLICIES}\\Windows\\WindowsUpdate\\AU"
    defender = f"{POLICIES}\\Windows Defender\\Exclusions"
    logon = r"SOFTWARE\Microsoft\Windows NT\CurrentVersion\Winlogon"
    return (
        Values(
            "memory integrity",
            (
                Value(integrity, "Enabled", int(wanted.hvci)),
                Value(guard, "EnableVirtualizationBasedSecurity", int(wanted.hvci)),
            ),
        ),
        Values(
            "debug print filter",
            tuple(
                Value(f"{CONTROL}\\Session Manager\\Debug Print Filter", component, ALL_LEVELS)
                for component in FILTERS
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
        Values(
            "updates",
            (
                Value(updates, "NoAutoUpdate", 1),
                Value(f"{SERVICES}\\wuauserv", "Start", 4),
                Value(f"{SERVICES}\\UsoSvc", "Start", 4),
            ),
        ),
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
