"""The host of a KD serial connection, as a state machine: bytes in, events out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from pytest_kdriver.kernel.events import Event


class KdState(Enum):
    """What is known of the kernel."""

    SILENT = "nothing was heard yet"
    RUNNING = "running"
    STOPPED = "in a stop that is being handled"
    HELD = "stopped for good, behind a bug check"
    LOST = "no answer"


@dataclass(slots=True)
class Statistics:
    """What was counted since the session began."""

    prints: int = 0
    packets: int = 0
    resends_sent: int = 0
    resends_received: int = 0
    duplicates: int = 0
    bad_checksums: int = 0
    bytes_skipped: int = 0


def answer_prompt(prompt: str) -> str:
    """What a DbgPrompt is answered with, so that the kernel goes on."""
    return "b" if "(bic)" in prompt else ""


class KdSession:
    """A debugger that is always there, and never stands in the kernel's way.

    ``answer`` is asked for the answer to each DbgPrompt. Where ``hold_bug_checks`` the kernel stays stopped
    behind a bug check until ``go_on``.
    """

    def __init__(
        self, *, answer: Callable[[str], str] = answer_prompt, hold_bug_checks: bool = True
    ) -> None:
        self._answer = answer
        self._hold_bug_checks = hold_bug_checks
        self.state = KdState.SILENT
        self.attached = False
        self.statistics = Statistics()

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Take the next bytes, cut anywhere, do what is due at ``now``, and give the events, in order."""
        return []

    def data_to_send(self) -> bytes:
        """The bytes to be sent to the kernel, each only once; acknowledgements first."""
        return b""

    def next_deadline(self) -> float | None:
        """The time at which ``receive_data(b"", now)`` is due. None: never."""
        return None

    def attach(self, now: float) -> None:
        """Begin to agree on ids with a kernel that runs, is stopped, or was put back to a snapshot.

        It is done when ``attached``.
        """

    def break_in(self, now: float) -> None:
        """Stop the kernel, tell a ``ProcessorState`` of each processor, and let it go on."""

    def end_of_boot(self) -> None:
        """From here on breakpoints and assertions are events."""

    def go_on(self, now: float) -> None:
        """In ``HELD``: let the kernel write its dump and reboot."""
