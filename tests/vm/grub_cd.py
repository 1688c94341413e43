"""A CD of GRUB's, for BIOS and UEFI, that stands for an installer's. See ``make_cd``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

MEBIBYTE = 1 << 20
NEEDS = "grub-pc-bin, grub-efi-amd64-bin, grub-common, mtools, xorriso"


def make_cd(
    folder: Path, script: str, *, first: str = "", files: Mapping[str, Path] | None = None
) -> Path:
    """A CD whose GRUB asks for a key as Windows' does, reads the 20 MiB of a file, and obeys ``script``.

    It talks to COM1, where UEFI's console is too. ``first`` is obeyed before it asks; ``files`` are on it,
    and leave where they were.
    """
    if shutil.which("grub-mkrescue") is None or shutil.which("mformat") is None:
        pytest.skip(f"needs grub-mkrescue (Debian: {NEEDS})")
    tree = folder / "cd"
    (tree / "boot/grub").mkdir(parents=True)
    (tree / "filler").write_bytes(bytes(20 * MEBIBYTE))
    for name, source in (files or {}).items():
        shutil.move(source, tree / name)
    (tree / "boot/grub/grub.cfg").write_text(
        f"""serial --unit=0 --speed=115200
if [ $grub_platform = pc ]; then terminal_output serial; fi
{first}
echo Press Enter to boot from CD
read answer
echo A key was pressed
crc /filler
{script}
"""
    )
    iso = folder / "windows.iso"
    subprocess.run(
        ["grub-mkrescue", "-o", str(iso), str(tree)], check=True, capture_output=True, timeout=300
    )
    shutil.rmtree(tree)
    iso.chmod(0o644)
    return iso
