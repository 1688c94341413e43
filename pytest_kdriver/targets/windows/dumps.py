"""The minidump that a Windows writes when it crashes, fetched behind its restart.

Where Windows keeps them, by Microsoft's "Memory dump file options". Not verified on Windows.
"""

from __future__ import annotations

import time
from typing import Final

from pytest_kdriver.errors import TargetError
from pytest_kdriver.guest.agent import Agent

FOLDER: Final = "C:\\Windows\\Minidump"

_LIST: Final = ["cmd.exe", "/d", "/c", "dir", "/b", "/a-d", "/o-d", f"{FOLDER}\\*.dmp"]
"""The newest first."""

WRITTEN_WITHIN: Final = 60.0
"""Seconds from the agent's answer on. The kernel writes into the page file; of that Windows makes the dump's
file when it starts (WerFault.exe -k, which wininit.exe runs; "Windows Internals", part 2)."""

POLL: Final = 1.0
"""Seconds between two looks."""


def fetch_minidump(agent: Agent) -> bytes:
    """The newest minidump of a guest that was put back to a state without any before it crashed.

    Raises ``TargetError`` where there is none, and what the agent raises.
    """
    deadline = time.monotonic() + WRITTEN_WITHIN
    while True:
        listed = agent.run(_LIST).stdout.decode("ascii", "replace").split("\r\n")
        names = [name for name in listed if name.lower().endswith(".dmp")]
        if names:
            return agent.get(f"{FOLDER}\\{names[0]}")
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL)
    raise TargetError(
        f"the guest started again, and {WRITTEN_WITHIN:g} s later there is no dump in its {FOLDER}"
    )
