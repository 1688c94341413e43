r"""The CD that an unattended installation finds beside Windows' own.

::

    autounattend.xml            Setup looks for it at the root of every medium
    kdagent.exe                 the agent
    $WinPEDriver$\NAME\         virtio's drivers: Setup takes what it finds there into the new system, too

Written by pycdlib, as ISO 9660 with Joliet, whose names Windows reads. Not verified on Windows.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.recipe import Release
from pytest_kdriver.targets.windows.answer_file import AGENT_FILE, is_virtio
from pytest_kdriver.vm_config import VmConfig

if TYPE_CHECKING:
    from pycdlib import PyCdlib
    from pycdlib.dr import DirectoryRecord
    from pycdlib.udf import UDFFileEntry

ANSWER_FILE: Final = "autounattend.xml"
DRIVERS: Final = "$WinPEDriver$"
_LABEL: Final = "KDRIVER"

MOST_OF_A_DRIVER: Final = 64 << 20
"""Bytes that one driver's folder may have; those of virtio-win take some two hundred thousand."""


def needed_drivers(machine: VmConfig) -> tuple[str, ...]:
    """The folders of virtio-win's CD that have the drivers for this machine."""
    needed = {
        "viostor": machine.bus == "virtio",
        "vioserial": is_virtio(machine),
        "NetKVM": machine.nic == "virtio",
    }
    return tuple(name for name, is_needed in needed.items() if is_needed)


def read_drivers(
    virtio_win: Path, names: tuple[str, ...], release: Release
) -> dict[str, dict[str, bytes]]:
    """The files of these drivers on virtio-win's CD, for 64 bits. ``TargetError`` where there are none."""
    PyCdlib, CdError = _pycdlib()  # noqa: N806 -- they are classes
    cd = PyCdlib()
    try:
        cd.open(str(virtio_win))
    except (CdError, OSError, ValueError, struct.error) as error:
        raise TargetError(f"{virtio_win} can't be read as a CD: {error}") from error
    try:
        return {name: _read_folder(cd, f"/{name}/{release}/amd64", virtio_win) for name in names}
    except CdError as error:
        raise TargetError(
            f"{virtio_win} has no drivers {', '.join(names)} for {release}: {error}"
        ) from error
    finally:
        cd.close()


def _read_folder(cd: PyCdlib, folder: str, source: Path) -> dict[str, bytes]:
    view = cd.get_joliet_facade() if cd.has_joliet() else cd.get_rock_ridge_facade()
    files: dict[str, bytes] = {}
    size = 0
    for child in view.list_children(folder):
        if child is None or child.is_dir():
            continue
        size += child.get_data_length()
        if size > MOST_OF_A_DRIVER:
            raise TargetError(f"{source}: {folder} has more than a driver's files")
        name = _name_of(cd, child)
        content = io.BytesIO()
        view.get_file_from_iso_fp(content, f"{folder}/{name}")
        files[name] = content.getvalue()
    if not any(name.lower().endswith(".inf") for name in files):
        raise TargetError(f"{source}: {folder} has no driver's .inf")
    return files


def _name_of(cd: PyCdlib, record: DirectoryRecord | UDFFileEntry) -> str:
    path: str = cd.full_path_from_dirrecord(record, rockridge=not cd.has_joliet())
    return path.rpartition("/")[2]


def write_cd(
    path: Path, answer: bytes, agent: Path, drivers: Mapping[str, Mapping[str, bytes]]
) -> None:
    """Write the CD, for nobody else to read. Raises ``TargetError``, OSError."""
    PyCdlib, CdError = _pycdlib()  # noqa: N806 -- they are classes
    cd = PyCdlib()
    try:
        cd.new(interchange_level=3, joliet=3, vol_ident=_LABEL)
        _add_file(cd, 1, f"/{ANSWER_FILE}", answer)
        _add_file(cd, 2, f"/{AGENT_FILE}", agent.read_bytes())
        if drivers:
            cd.add_directory("/DRIVERS", joliet_path=f"/{DRIVERS}")
        number = 3
        for place, (folder, files) in enumerate(drivers.items(), 1):
            cd.add_directory(f"/DRIVERS/D{place}", joliet_path=f"/{DRIVERS}/{folder}")
            for name, content in files.items():
                where = f"/DRIVERS/D{place}"
                _add_file(cd, number, f"/{DRIVERS}/{folder}/{name}", content, where=where)
                number += 1
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 -- a descriptor
            cd.write_fp(file)
    except CdError as error:
        raise TargetError(f"the installation's CD can't be written: {error}") from None
    finally:
        cd.close()


def _add_file(cd: PyCdlib, number: int, joliet: str, content: bytes, *, where: str = "") -> None:
    """Add a file; what ISO 9660 calls it is a number, since its own names are too few for the rest."""
    cd.add_fp(io.BytesIO(content), len(content), f"{where}/F{number}.;1", joliet_path=joliet)


def _pycdlib() -> tuple[type[PyCdlib], type[Exception]]:
    try:
        from pycdlib import PyCdlib
        from pycdlib.pycdlibexception import PyCdlibException
    except ImportError:
        raise TargetError(
            "a CD for Windows takes the package pycdlib: pip install 'pytest-kdriver[windows]'"
        ) from None
    return PyCdlib, PyCdlibException
