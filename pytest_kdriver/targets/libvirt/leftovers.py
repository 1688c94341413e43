"""What is removed of guests whose run is over: domains, and the folders of their sockets."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.domain import end_domain, end_emulator, undefine_domain

_CONNECT_TIMEOUT: Final = 5.0


def domain_resource(uri: str, name: str) -> Path:
    """What a run records before it defines a domain."""
    return Path(f"{uri}#{name}")


def remove_domain(resource: Path) -> None:
    """End and undefine a domain that a run recorded. Raises OSError where it stays.

    Where its libvirt is gone for good, since nobody is at its socket, QEMU is ended by its name.
    """
    uri, _, name = str(resource).rpartition("#")
    uri = re.sub(r"^([a-z+]+):/+", r"\1:///", uri)  # a Path has made one slash of three
    try:
        hypervisor = Hypervisor.open(uri)
    except TargetError as e:
        sockets = parse_qs(urlsplit(uri).query).get("socket")
        if sockets is None or not _nobody_is_at(sockets[0]):
            raise OSError(str(e)) from e
        end_emulator(name)
        return
    try:
        end_domain(hypervisor, name)
        undefine_domain(hypervisor, name)
    except TargetError as e:
        raise OSError(str(e)) from e
    finally:
        hypervisor.close()


def _nobody_is_at(path: str) -> bool:
    """Whether a Unix socket is gone, or was left behind; not that it is busy, or not for us."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_TIMEOUT)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return True
        except OSError:
            return False
    return False
