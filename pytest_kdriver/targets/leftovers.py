"""How each kind of thing that runs leave behind is removed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets import disk_images, prefix
from pytest_kdriver.targets.libvirt import require_libvirt
from pytest_kdriver.targets.runs import Remover, remove_tree

SPILL: Final = "spilled-kernel-log"
DOMAIN: Final = "libvirt-domain"
SOCKETS: Final = "socket-folder"


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    with suppress(OSError):  # its folder may be gone, or never have been one
        path.unlink()


def _remove_prefix(path: Path) -> None:
    with suppress(TargetError):
        prefix.remove(path)


def _remove_domain(path: Path) -> None:
    try:
        require_libvirt()
    except TargetError as error:
        raise OSError(str(error)) from error
    from pytest_kdriver.targets.libvirt.leftovers import remove_domain

    remove_domain(path)


REMOVERS: Final[dict[str, Remover]] = {
    prefix.RESOURCE: _remove_prefix,
    SPILL: remove_file,
    disk_images.RESOURCE: disk_images.remove_unfinished,
    DOMAIN: _remove_domain,
    SOCKETS: remove_tree,
}
