"""What a failed test leaves in the artifacts folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_LONGEST: Final = 100
"""Bytes of a file's name that tell the test; most file systems take 255 in all."""


def keep(folder: Path, test: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write ``sections``, titles and texts, of the test with the id ``test``. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    readable = re.sub(r"[^A-Za-z0-9.\-\[\]]+", "_", test)[-_LONGEST:]
    unique = hashlib.sha256(test.encode()).hexdigest()[:8]
    text = "".join(f"=== {title} ===\n{content}\n\n" for title, content in sections)
    (folder / f"{readable}-{unique}.txt").write_text(text, encoding="utf-8")
