"""A file's way to a Windows that is reached by WinRM: by PowerShell, over a shell's standard input.

``powershell.exe`` invokes a command, and then hands each line of its standard input to the command's
``process`` (``Executor.cs`` of PowerShell/PowerShell). Not verified on Windows.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import time
import uuid
from typing import Final

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.winrm import WinrmConfig, WinrmLink, closed_at, receive_more
from pytest_kdriver.guest.words import words

POWERSHELL: Final = (
    "powershell.exe -NoProfile -NonInteractive -ExecutionPolicy Bypass -EncodedCommand "
)

SCRIPT: Final = """\
begin {
    $ErrorActionPreference = 'Stop'
    $path = '@PATH@'
    $new = '@NEW@'
    $left = @LENGTH@
    function Say($line) { [Console]::Out.WriteLine($line) }
    function Test-Hash($file) {
        (Test-Path -LiteralPath $file) -and
            (Get-FileHash -LiteralPath $file -Algorithm SHA256).Hash -eq '@SHA256@'
    }
    try {
        if (Test-Hash $path) { Say 'there'; exit }
        [void][IO.Directory]::CreateDirectory([IO.Path]::GetDirectoryName($path))
        $file = [IO.File]::Create($new)
        Say 'send'
    }
    catch { Say "no $($_.Exception.Message)"; exit }
}
process {
    if ($left -le 0) { return }
    try {
        $bytes = [Convert]::FromBase64String($_)
        $file.Write($bytes, 0, $bytes.Length)
        $left -= $bytes.Length
        if ($left -gt 0) { return }
        $file.Close()
        if (-not (Test-Hash $new)) { throw 'it was changed on its way' }
        [IO.File]::Delete($path)
        [IO.File]::Move($new, $path)
        Say 'done'
    }
    catch { $left = 0; Say "no $($_.Exception.Message)" }
}
end {
    $file.Close()
    [IO.File]::Delete($new)
}
"""
"""Writes ``@PATH@`` of lines of base64, under another name until it is whole.

It says ``there`` if that file has the right hash already; else ``send``, and ``done`` when it is in its
place; ``no`` and why, if that can't be.
"""

_LINE = 48 << 10
"""How many bytes a line stands for."""

_LONGEST_ANSWER = 10_000


def place_file(config: WinrmConfig, content: bytes, path: str, *, timeout: float) -> bool:
    """See to it that the server's file ``path`` has ``content``; whether it had to be copied.

    It appears whole or not at all. Folders are made. ``path`` has no quotes in it, and ``content`` at least
    one byte. Errors are those of ``WinrmLink``.
    """
    where = f"{config.host}:{config.effective_port}"
    deadline = time.monotonic() + timeout
    late = f"the WinRM server {where} did not take the file {path} within {timeout:g} s"
    link = WinrmLink(config, command_line(content, path), timeout=timeout)
    with contextlib.closing(link), closed_at(link, deadline, late):
        answer = _receive_line(link)
        if answer == "there":
            return False
        if answer == "send":
            link.send(_lines(content), deadline - time.monotonic())
            answer = _receive_line(link)
            if answer == "done":
                return True
    why = words(answer.removeprefix("no ")) or "no reason was given"
    raise LinkError(f"on {where}, {path} can't be written: {why}")


def command_line(content: bytes, path: str) -> str:
    """What places this content there."""
    script = SCRIPT
    for name, value in {
        "PATH": path,
        "NEW": f"{path}.{uuid.uuid4().hex[:8]}.new",
        "LENGTH": str(len(content)),
        "SHA256": hashlib.sha256(content).hexdigest(),
    }.items():
        script = script.replace(f"@{name}@", value)
    return POWERSHELL + base64.b64encode(script.encode("utf-16-le")).decode()


def _lines(content: bytes) -> bytes:
    parts = (content[start : start + _LINE] for start in range(0, len(content), _LINE))
    return b"".join(map(binascii.b2a_base64, parts))


def _receive_line(link: WinrmLink) -> str:
    line = b""
    while b"\n" not in line and len(line) < _LONGEST_ANSWER:
        line += receive_more(link, "PowerShell")
    return line.partition(b"\n")[0].decode(errors="replace").strip()
