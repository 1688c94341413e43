"""Which of Hyper-V's enlightenments guests get: those that this host's KVM really has.

Windows is slow without them. A host's domain capabilities name what libvirt could ask for; what the kernel
then refuses keeps QEMU from starting, so it is tried.
"""

from __future__ import annotations

import os
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import libvirt

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.libvirt.connection import Hypervisor, call
from pytest_kdriver.targets.libvirt.domain_xml import Accelerator, DomainSpec, domain_xml

WANTED: Final = (
    "relaxed",
    "vapic",
    "spinlocks",
    "vpindex",
    "runtime",
    "synic",
    "stimer",
    "reset",
    "frequencies",
    "tlbflush",
    "ipi",
)
"""By libvirt's names, each after those that it needs; none of those that forbid snapshots (evmcs, say)."""

_NEEDS: Final = {"synic": "vpindex", "stimer": "synic", "tlbflush": "vpindex", "ipi": "vpindex"}


@dataclass(frozen=True, slots=True)
class Enlightenments:
    """Those to be had, and the others, each with the reason."""

    features: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()


def find_enlightenments(hypervisor: Hypervisor, accelerator: Accelerator) -> Enlightenments:
    """What guests by ``accelerator`` can have. Raises ``TargetError`` where none starts at all."""
    if accelerator == "tcg":
        return Enlightenments()  # they are KVM's
    offered = offered_enlightenments(hypervisor)
    missing = [(name, "libvirt does not offer it") for name in WANTED if name not in offered]
    tried = try_enlightenments(hypervisor, [name for name in WANTED if name in offered])
    return Enlightenments(tried.features, (*missing, *tried.dropped))


def offered_enlightenments(hypervisor: Hypervisor) -> frozenset[str]:
    """What libvirt's domain capabilities name for KVM."""
    xml = call(hypervisor.connection.getDomainCapabilities, None, "x86_64", "q35", "kvm")
    tree = ET.fromstring(xml)  # noqa: S314 -- from libvirt itself
    values = tree.iterfind("./features/hyperv/enum[@name='features']/value")
    return frozenset(value.text or "" for value in values)


def try_enlightenments(hypervisor: Hypervisor, names: Sequence[str]) -> Enlightenments:
    """Those with which QEMU starts. All at once, and one after the other only where that fails."""
    if not names or _refusal(hypervisor, names) is None:
        return Enlightenments(tuple(names))
    if (reason := _refusal(hypervisor, ())) is not None:
        raise TargetError(f"no guest starts by KVM, with or without enlightenments: {reason}")
    kept: list[str] = []
    dropped: list[tuple[str, str]] = []
    for name in names:
        if (needed := _NEEDS.get(name)) is not None and needed not in kept:
            dropped.append((name, f"needs {needed}"))
        elif (reason := _refusal(hypervisor, [*kept, name])) is not None:
            dropped.append((name, reason))
        else:
            kept.append(name)
    return Enlightenments(tuple(kept), tuple(dropped))


def _refusal(hypervisor: Hypervisor, names: Sequence[str]) -> str | None:
    """Why a guest with these does not start; it never runs an instruction, and ends with the connection."""
    name = f"kdriver-trial-{uuid.uuid4().hex[:12]}"
    spec = DomainSpec(
        name=name,
        run="trial",
        owner_pid=os.getpid(),
        accelerator="kvm",
        emulator=hypervisor.emulator,
        disk=None,
        memory=16,
        nic="none",
        enlightenments=tuple(names),
    )
    flags = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY
    try:
        domain = call(hypervisor.connection.createXML, domain_xml(spec), flags)
    except TargetError as e:
        return str(e)
    with suppress(TargetError):
        call(domain.destroy)
    return None
