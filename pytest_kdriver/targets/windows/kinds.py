r"""The kinds of settings that a Windows has: values of its registry, and its boot configuration.

Each is read back from where nothing is translated. Not verified on Windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from pytest_kdriver.errors import AgentError
from pytest_kdriver.guest.agent import Agent, Completed
from pytest_kdriver.guest.words import words

PROGRAM_TIME: Final = 120.0
"""Seconds that a program may take; those that are run here take one, as a rule."""

CONTROL: Final = r"SYSTEM\CurrentControlSet\Control"
SERVICES: Final = r"SYSTEM\CurrentControlSet\Services"
POLICIES: Final = r"SOFTWARE\Policies\Microsoft"
GUARD: Final = f"{CONTROL}\\DeviceGuard"
INTEGRITY: Final = f"{GUARD}\\Scenarios\\HypervisorEnforcedCodeIntegrity"
PRINT_FILTER: Final = f"{CONTROL}\\Session Manager\\Debug Print Filter"

OBJECTS: Final = r"BCD00000000\Objects"
"""Where the boot configuration is on a Windows that runs."""

BOOT_MANAGER: Final = "{9dea862c-5cdd-4e70-acc1-f32b344d4795}"
DEBUGGER_SETTINGS: Final = "{4636856e-540f-4170-a130-a84776f4c654}"


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


@dataclass(frozen=True, slots=True)
class Value:
    """A value below HKEY_LOCAL_MACHINE. ``data`` is None for one that shall not be there."""

    key: str
    name: str
    data: int | str | bytes | tuple[str, ...] | None

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
    return ", ".join(f"{name} {shown(data)}" for name, data in values)


def shown(data: object) -> str:
    """What is in the registry, in words."""
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


@dataclass(frozen=True, slots=True)
class Element:
    """An element of the boot configuration, below the object ``of``: {default} is the system that starts.

    What it is worth stands in the registry, a boolean as one byte and an integer as eight.
    """

    of: str
    type: int
    name: str
    data: int
    or_absent: bool = False

    def found(self, agent: Agent) -> int | None:
        """What is there."""
        of = self.of
        if of == "{default}":
            default = agent.get_value(f"{OBJECTS}\\{BOOT_MANAGER}\\Elements\\23000003", "Element")
            if not isinstance(default, str):
                return None
            of = default
        data = agent.get_value(f"{OBJECTS}\\{of}\\Elements\\{self.type:08x}", "Element")
        return int.from_bytes(data, "little") if isinstance(data, bytes) else None


@dataclass(frozen=True, slots=True)
class Boot:
    """A setting that is the boot configuration's, as ``arguments`` of bcdedit, which say it."""

    name: str
    arguments: tuple[tuple[str, ...], ...]
    elements: tuple[Element, ...]

    def make(self, agent: Agent) -> None:
        """See ``Setting``."""
        for arguments in self.arguments:
            run(agent, ["bcdedit.exe", *arguments])

    def read(self, agent: Agent) -> Reading:
        """See ``Setting``."""
        found = [(element, element.found(agent)) for element in self.elements]
        return Reading(
            name=self.name,
            wanted=_told((element.name, element.data) for element in self.elements),
            found=_told((element.name, data) for element, data in found),
            in_force=all(element.data == data for element, data in found),
        )
