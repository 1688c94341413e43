"""What a test in a virtual machine costs: one of the project's own, under a private libvirt."""

from __future__ import annotations

from contextlib import closing

from bench.figure import Figure


def measure() -> list[Figure]:
    """All in one guest, but for the whole runs of pytest, which have their own."""
    from bench.vm import (
        cycle,
        put,
        revert,
        sessions,
        start,
    )  # who measures something else may lack libvirt
    from bench.vm.guest import BareGuest, own_libvirt, winevm_target

    with own_libvirt() as uri:
        with winevm_target(uri) as target, closing(BareGuest(uri)) as bare:
            figures = cycle.measure(target) + put.measure(target, bare)
            figures += revert.measure(target, bare)
        figures += start.measure(uri)
        return figures + sessions.measure(uri)
