"""Builds ``probe.c`` as others build drivers: by mingw's gcc, linked by its ld or by LLVM's lld."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("probe.c")
COMPILER = "x86_64-w64-mingw32-gcc"

FREE_BASE = 0x10000000
"""An address where nothing is in a process that Wine runs drivers in."""

_TIMEOUT = 120.0


class Linker(Enum):
    """Who links."""

    LD = "ld"
    LLD = "lld"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to link. Without a ``base`` the image has the linker's own: 0x140000000, as programs have."""

    linker: Linker
    relocations: bool = True
    base: int | None = None

    def __str__(self) -> str:
        base = "" if self.base is None else f"-at-{self.base:x}"
        return f"{self.linker.value}-{'relocatable' if self.relocations else 'fixed'}{base}"


def compiler() -> str:
    """mingw's gcc. Fails the test where that is not here."""
    gcc = shutil.which(COMPILER)
    if gcc is None:
        pytest.fail(
            f"{COMPILER} is not here, so no C driver can be built: "
            "apt-get install gcc-mingw-w64-x86-64, or run make setup-tests",
            pytrace=False,
        )
    return gcc


def build_probe(variant: Variant, folder: Path) -> Path:
    """``probe.sys`` in a folder of its own below ``folder``. Fails the test where a tool is missing."""
    place = folder / str(variant)
    place.mkdir()
    image = place / "probe.sys"
    options = []
    if not variant.relocations:
        options += ["--disable-dynamicbase", "--disable-reloc-section"]
    if variant.base is not None:
        options += ["--image-base", hex(variant.base)]
    _build(SOURCE, image, "-O1", variant.linker, options)
    return image


def build_driver(source: Path, *, optimized: str, linker: Linker = Linker.LD) -> Path:
    """The driver of another C file, beside it. Fails the test where a tool is missing."""
    image = source.with_name(f"{source.stem}{optimized}-{linker.value}.sys")
    _build(source, image, optimized, linker, [])
    return image


def _build(
    source: Path, image: Path, optimized: str, linker: Linker, options: Sequence[str]
) -> None:
    gcc = compiler()
    compiled = image.with_suffix(".o")
    _run(
        gcc,
        *("-Wall", "-Wextra", "-Werror", optimized, "-g", "-ffreestanding", "-fno-stack-protector"),
        *("-isystem", str(_headers(gcc))),
        *("-c", str(source), "-o", str(compiled)),
    )
    entry = ["--subsystem", "native", "--entry", "DriverEntry", "-o", str(image)]
    libraries = ["-L", str(_library_of(gcc).parent), "-lntoskrnl"]
    _run(*_linker(linker, gcc), *entry, *options, str(compiled), *libraries)


def _linker(linker: Linker, gcc: str) -> list[str]:
    if linker is Linker.LD:
        return [_run(gcc, "-print-prog-name=ld")]
    if shutil.which("rustc") is not None:
        sysroot = Path(_run("rustc", "--print", "sysroot"))
        for rust_lld in sysroot.glob("lib/rustlib/*/bin/rust-lld"):
            return [str(rust_lld), "-flavor", "gnu", "-m", "i386pep"]
    for lld in (*Path("/usr/bin").glob("ld.lld"), *Path("/usr/bin").glob("ld.lld-*")):
        return [str(lld), "-m", "i386pep"]
    pytest.fail("neither rustup's rust-lld nor ld.lld is here: apt-get install lld", pytrace=False)


def _library_of(gcc: str) -> Path:
    return Path(_run(gcc, "-print-file-name=libntoskrnl.a"))


def _headers(gcc: str) -> Path:
    """The folder of the DDK's headers, which gcc does not look into by itself."""
    for include in (_library_of(gcc).parents[1] / "include", Path("/usr/share/mingw-w64/include")):
        if (include / "ddk" / "ntddk.h").exists():
            return include / "ddk"
    pytest.fail(
        f"{COMPILER} is here, but not the DDK's header ntddk.h: apt-get install mingw-w64-x86-64-dev",
        pytrace=False,
    )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout.strip()
