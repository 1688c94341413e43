"""What a failed test leaves in the artifacts folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import CapabilityError
from pytest_kdriver.kernel.text import all_lines

_LONGEST: Final = 100
"""Bytes of a file's name that tell the test; most file systems take 255 in all."""


def stem_of(folder: Path, test: str) -> Path:
    """The path of the files of the test with the id ``test``, without their suffixes."""
    readable = re.sub(r"[^A-Za-z0-9.\-\[\]]+", "_", test)[-_LONGEST:]
    unique = hashlib.sha256(test.encode()).hexdigest()[:8]
    return folder / f"{readable}-{unique}"


def keep(stem: Path, drivers: Sequence[Driver], sections: Sequence[tuple[str, str]]) -> None:
    """Write ``sections``, titles and texts, and all of the kernel log of a test with these drivers.

    That is what anybody said, not the drivers alone; nothing where the target has no kernel log. Raises
    OSError.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"=== {title} ===\n{content}\n\n" for title, content in sections)
    stem.with_name(f"{stem.name}.txt").write_text(text, encoding="utf-8")
    try:
        windows = [driver.window for driver in drivers]
    except CapabilityError:
        return
    whole = windows[0].log.window(None, min(window.start for window in windows))
    with stem.with_name(f"{stem.name}.kernel.log").open("w", encoding="utf-8") as file:
        for line in all_lines(whole):
            print(line, file=file)
