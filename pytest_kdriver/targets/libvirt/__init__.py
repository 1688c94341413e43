"""Guests under libvirt and QEMU. Nothing outside of here imports libvirt."""

from __future__ import annotations

import importlib.util

from pytest_kdriver.errors import TargetError


def require_libvirt() -> None:
    """See that libvirt's module for Python is there. Raises ``TargetError``."""
    if importlib.util.find_spec("libvirt") is None:
        raise TargetError(
            "libvirt's module for Python is missing; pip install 'pytest-kdriver[libvirt]', which needs "
            "libvirt-dev, pkg-config and gcc (on Debian and Ubuntu)"
        )
