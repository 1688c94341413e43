"""What is removed of guests whose run is over: domains, and the folders of their sockets."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.libvirt.connection import Hypervisor, call
from pytest_kdriver.targets.libvirt.domain import end_domain, undefine_domain
from pytest_kdriver.targets.libvirt.domain_xml import read_metadata

_END_TIMEOUT: Final = 10.0


def domain_resource(uri: str, name: str) -> Path:
    """What a run records before it defines a domain."""
    return Path(f"{uri}#{name}")


def remove_domain(resource: Path) -> None:
    """End and undefine a domain that a run recorded. Raises OSError where it stays.

    Where its libvirt is gone for good, since its socket is, QEMU is ended by its name.
    """
    uri, _, name = str(resource).rpartition("#")
    uri = re.sub(r"^([a-z+]+):/+", r"\1:///", uri)  # a Path has made one slash of three
    try:
        hypervisor = Hypervisor.open(uri)
    except TargetError as e:
        socket = parse_qs(urlsplit(uri).query).get("socket")
        if socket is None:
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


def abandoned_domains(hypervisor: Hypervisor) -> list[str]:
    """The domains whose metadata says that they were made for a process that is gone."""
    abandoned = []
    for domain in call(hypervisor.connection.listAllDomains):
        with suppress(TargetError):  # gone meanwhile
            owner = read_metadata(call(domain.XMLDesc))
            if owner is not None and not Path("/proc", str(owner[1])).exists():
                abandoned.append(str(domain.name()))
    return abandoned


def end_emulator(name: str) -> None:
    """Kill the QEMU of the domain ``name``. Raises OSError where it stays."""
    deadline = time.monotonic() + _END_TIMEOUT
    while alive := _emulators(name):
        if time.monotonic() > deadline:
            raise OSError(f"QEMU of {name} does not end: {alive}")
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _emulators(name: str) -> list[int]:
    """libvirt starts QEMU with ``-name guest=NAME,...``; our names are not given twice."""  # noqa: D403
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            named = any(a.split(b",")[0] == f"guest={name}".encode() for a in arguments)
            if named and b"qemu" in arguments[0]:
                found.append(int(entry.name))
    return found
