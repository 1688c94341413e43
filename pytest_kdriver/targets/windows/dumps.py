"""The minidump that a Windows writes when it crashes, fetched behind its restart.

Where Windows keeps them, by Microsoft's "Memory dump file options". Not verified on Windows.
"""

from __future__ import annotations

from typing import Final

from pytest_kdriver.errors import TargetError
from pytest_kdriver.guest.agent import Agent

FOLDER: Final = "C:\\Windows\\Minidump"

_LIST: Final = ["cmd.exe", "/d", "/c", "dir", "/b", "/a-d", "/o-d", f"{FOLDER}\\*.dmp"]
"""The newest first."""


def fetch_minidump(agent: Agent) -> bytes:
    """The newest minidump of a guest that was put back to a state without any before it crashed.

    Raises ``TargetError`` where there is none, and what the agent raises.
    """
    listed = agent.run(_LIST).stdout.decode("ascii", "replace").split("\r\n")
    names = [name for name in listed if name.lower().endswith(".dmp")]
    if not names:
        raise TargetError(f"the guest started again, and there is no dump in its {FOLDER}")
    return agent.get(f"{FOLDER}\\{names[0]}")
