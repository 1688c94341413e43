"""Guests under libvirt and QEMU. Nothing outside of here imports libvirt."""
