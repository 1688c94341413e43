"""What stands for powershell.exe where there is none: it does what one script of ours says, and no other.

Written by hand after the script, so it shows how both ends get on, and not that Windows understands it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from pathlib import Path

from pytest_kdriver.guest.links.powershell import POWERSHELL, SCRIPT

PLACES = re.compile(
    re.sub(r"@([A-Z0-9]+)@", r"(?P<\1>[^']+)", re.escape(SCRIPT), flags=re.ASCII), re.ASCII
)


def install(folder: Path) -> Path:
    """Make a folder for PATH with it."""
    folder.mkdir()
    program = folder / "powershell.exe"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    program.chmod(0o755)
    return folder


def say(line: str) -> None:
    print(line, end="\r\n", flush=True)


def has(path: Path, sha256: str) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def main() -> None:
    *options, encoded = sys.argv[1:]
    assert " ".join(["powershell.exe", *options, ""]) == POWERSHELL
    found = PLACES.fullmatch(base64.b64decode(encoded).decode("utf-16-le"))
    assert found is not None, "another script than ours"
    path, new = Path(found["PATH"]), Path(found["NEW"])
    left, sha256 = int(found["LENGTH"]), found["SHA256"]
    try:
        if has(path, sha256):
            say("there")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        file = new.open("wb")
    except OSError as error:
        say(f"no {error}")
        return
    say("send")
    with file:
        for line in sys.stdin:
            if left <= 0:
                continue
            try:
                data = base64.b64decode(line.rstrip("\r\n"), validate=True)
                file.write(data)
                left -= len(data)
                if left > 0:
                    continue
                file.close()
                if not has(new, sha256):
                    raise ValueError("it was changed on its way")
                path.unlink(missing_ok=True)
                new.rename(path)
                say("done")
            except (OSError, ValueError) as error:
                left = 0
                say(f"no {error}")
    new.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
