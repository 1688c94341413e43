"""What Windows refuses with a code alone, in words: what it is, and what mends it.

Not verified on Windows; the facts are from Microsoft's pages on DeleteService and on the Unload routine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pytest_kdriver.errors import AgentError
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.win32error import Win32Error

_IN_USE: Final = (
    "{subject}'s file is in use there: a driver that was loaded from it is still in the kernel, or another "
    "program, as a virus scanner, has it open. Unload the one or end the other, else restart the machine"
)

_REFUSALS: Final[Mapping[Win32Error | NTSTATUS, str]] = {
    Win32Error.ERROR_SHARING_VIOLATION: _IN_USE,
    Win32Error.ERROR_USER_MAPPED_FILE: _IN_USE,
    Win32Error.ERROR_SERVICE_MARKED_FOR_DELETE: (
        "service {subject} is marked for deletion there, and stays until each handle to it is closed and its "
        "driver is stopped: close services.msc, Process Explorer and the like, else restart the machine"
    ),
    Win32Error.ERROR_DISK_FULL: "there is no room for {subject}'s file there: free some of the disk",
}

ALREADY_LOADED: Final = (
    "{subject} is in the kernel already, and not by this run: it was loaded by another one, or its unload is "
    "pended. Stop it there (sc stop {subject}), else restart the machine, or give this driver another name, "
    "with service="
)

UNLOAD_PENDED: Final = (
    "{subject}'s unload is pended: a handle to one of its devices is open, a request is on its way, or "
    "another driver is attached. Close or complete these; the driver stays in the kernel until then, or "
    "until the machine is restarted"
)


def in_words(error: AgentError, subject: str) -> str | None:
    """What the guest's refusal means for ``subject``, a service; None for one that says all by itself."""
    refusal = _REFUSALS.get(error.code) if error.code is not None else None
    return f"{refusal.format(subject=subject)} ({error})" if refusal is not None else None
