"""What a target's guest runs on, as far as the target has to know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.image.preflight import Report
from pytest_kdriver.kernel.events import BugCheck, Event
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.targets.runs import Run

FOLDER: Final = "C:\\kdriver"
"""Each image has a folder of its own in it, named after its hash: what is there need not be copied again, and
what ran, and may be mapped for a while, is never replaced."""


class LogFeed(Protocol):
    """Whatever feeds the kernel log from a guest."""

    failure: str | None
    """Why nothing more comes; None while all is well."""

    carries_words: bool
    """Whether the agent's word for a fence comes by it. Where not, who prints waits until it was taken."""

    def close(self) -> None:
        """Read what has arrived, then stop."""
        ...

    def describe(self) -> str:
        """How long the guest waited for it, in half a sentence; "" where guests don't wait."""
        ...


class WatchedLog:
    """The kernel log as a feed writes it; its thread tells ``on_bug_check`` what ended the guest."""

    def __init__(self, log: KernelLog, on_bug_check: Callable[[BugCheck], None]) -> None:
        self._log = log
        self._on_bug_check = on_bug_check

    def append(self, events: Sequence[Event]) -> None:
        """See ``KernelLog``."""
        self._log.append(events)
        for event in events:
            if type(event) is BugCheck and event.driver is None:
                self._on_bug_check(event)


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest that runs. ``feed`` is None where its kernel log can't be had."""

    agent: Agent
    feed: LogFeed | None


class Machine(Protocol):
    """Where a guest runs: an emulator's virtual machine, or a Wine prefix. At most one guest at a time.

    Its methods raise ``TargetError``, and what links and agents raise.
    """

    capabilities: frozenset[str]

    def describe(self) -> str:
        """What it is, in one line, for a report's header."""
        ...

    def boot(self, run: Run, log: KernelLog, generation: int) -> Guest:
        """Bring a guest up in its first state. What is made for it is recorded in ``run`` before.

        Where this fails, nothing of the guest is left.
        """
        ...

    def save(self, guest: Guest) -> Guest:
        """Remember the state of a guest in which nothing has run yet; the guest that goes on from there."""
        ...

    def revert(self, guest: Guest, log: KernelLog) -> Guest | None:
        """Put a guest back into the state that was saved; None where only a new one will do."""
        ...

    def failure(self) -> str | None:
        """Why the guest can't go on, as far as the machine knows; None where it can."""
        ...

    def keep(self, guest: Guest) -> str | None:
        """Let a guest live on behind the run; how to reach it, in lines. None where it can't."""
        ...

    def check(self, guest: Guest) -> None:
        """See that what tests rely on is in force. Raises ``TargetError`` with what mends it."""
        ...

    def catch_up(self, guest: Guest) -> bool:
        """Have the log hold what was printed before an answer of the agent's; False: it takes a fence."""
        ...

    def examine_hang(self, guest: Guest) -> None:
        """Have the log tell where the processors of a guest are that hangs, as far as that can be had."""
        ...

    def evidence(self) -> Mapping[str, Callable[[Path], None]]:
        """What can be written of a guest in which a test failed, each by the suffix of its file's name."""
        ...

    def let_dump(self, guest: Guest) -> Guest | None:
        """Let a kernel that crashed write its dump and start again; the guest then. None where it can't."""
        ...

    def preflight(self, image: Path) -> Report:
        """What the guest's kernel will make of ``image``. Raises ``ImageError``."""
        ...

    def end(self) -> None:
        """End the guest, if there is one, and remove what was made for it.

        Never raises for what is gone already. Where it was interrupted, it can be called again.
        """
        ...


@dataclass(frozen=True, slots=True)
class Installed:
    """What was put into a guest: services, and files, whose folders are ours."""

    services: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.services or self.files)


@runtime_checkable
class LastingMachine(Machine, Protocol):
    """A machine that was there before the run, and stays, with all that was put into it."""

    def clean(self, guest: Guest, installed: Installed) -> list[str]:
        """Remove what was installed, as far as that can be, and take it out of ``installed``.

        A service whose image lies elsewhere than ours is somebody else's, and stays. What else stays, and
        why, in words. Raises nothing for it.
        """
        ...

    def reach_again(self) -> Guest | None:
        """A guest to clean up in, where the last one's agent is gone; None where that can't be had soon."""
        ...

    def tell(self, text: str) -> None:
        """Tell the user what is no test's."""
        ...
