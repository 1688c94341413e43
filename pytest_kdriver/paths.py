"""Where this package keeps what it can make again, and what it can't."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The cache folder, which need not exist yet.

    ``$KDRIVER_CACHE``, else ``kdriver`` in ``$XDG_CACHE_HOME``, else ``~/.cache/kdriver``.
    """
    if own := os.environ.get("KDRIVER_CACHE"):
        return Path(own).absolute()
    # The XDG Base Directory Specification: a relative path is to be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "kdriver"


def state_directory() -> Path:
    """The folder of what is the user's own and can't be made again; it need not exist yet.

    ``pytest-kdriver`` in ``$XDG_STATE_HOME``, else in ``~/.local/state``.
    """
    xdg = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".local" / "state") / "pytest-kdriver"
