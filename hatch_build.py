"""The wheel's build hook: puts the agent, the forwarder and the recipes of the disk images into it.

In the wheel, ``pytest_kdriver/guest/kdagent.exe`` is the agent and ``pytest_kdriver/guest/kdtrace`` the
forwarder, both built here by cargo, and ``pytest_kdriver/_images/NAME/`` is ``vm/images/NAME/``. An editable
install has none of them: there the package finds ``vm/`` beside it, and builds each when it is first needed.

The wheel is for any platform ("py3-none-any"): what is compiled in it runs in the guest, not here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KdriverBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Found by hatchling by being the only one in this file."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add what is not Python; ``version`` is "standard" or "editable"."""
        if version == "editable":
            return
        root = Path(self.root)
        included = build_data["force_include"]
        agent, forwarder = build_programs(root)
        included[str(agent)] = "pytest_kdriver/guest/kdagent.exe"
        included[str(forwarder)] = "pytest_kdriver/guest/kdtrace"
        if (root / "vm/images").is_dir():
            included[str(root / "vm/images")] = "pytest_kdriver/_images"


def build_programs(root: Path) -> tuple[Path, Path]:
    """Build what runs in guests: the agent and the forwarder. ``$CARGO_TARGET_DIR`` counts, as for cargo."""
    sys.path.insert(0, str(root))
    try:
        from pytest_kdriver.guest.executable import AGENT, FORWARDER
        from pytest_kdriver.toolchain import find_toolchain
    finally:
        sys.path.remove(str(root))
    toolchain = find_toolchain()
    target_directory = Path(os.environ.get("CARGO_TARGET_DIR", root / "vm/target")).absolute()
    return AGENT.build(toolchain, target_directory), FORWARDER.build(toolchain, target_directory)
