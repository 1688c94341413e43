"""Registry values: what Python has and what the registry keeps."""

from __future__ import annotations

import struct
from collections.abc import Sequence

REG_SZ = 1
REG_EXPAND_SZ = 2
REG_BINARY = 3
REG_DWORD = 4
REG_MULTI_SZ = 7
REG_QWORD = 11

RegistryValue = int | str | bytes | Sequence[str]


def encode_value(value: RegistryValue) -> tuple[int, bytes]:
    """Type and bytes of a value.

    ``int``: REG_DWORD, or REG_QWORD where it needs more than 32 bits; a negative one that fits into 32 bits
    is a REG_DWORD in two's complement. ``str``: REG_SZ. ``bytes``: REG_BINARY. A sequence of ``str``:
    REG_MULTI_SZ. ``TypeError`` and ``ValueError`` for what the registry can't keep.
    """
    match value:
        case bool():
            raise _no_value(value)
        case int():
            return _encode_number(value)
        case str():
            return REG_SZ, _encode_string(value)
        case bytes() | bytearray():
            return REG_BINARY, bytes(value)
        case Sequence():
            return REG_MULTI_SZ, b"".join([_encode_item(item) for item in value]) + b"\0\0"
        case _:
            raise _no_value(value)


def _no_value(value: object) -> TypeError:
    return TypeError(
        f"{value!r} is no registry value: it takes int, str, bytes, or a sequence of str"
    )


def _encode_item(item: object) -> bytes:
    if not isinstance(item, str):
        raise _no_value(item)
    if not item:
        raise ValueError("REG_MULTI_SZ can't keep an empty string: it ends the list")
    return _encode_string(item)


def _encode_number(value: int) -> tuple[int, bytes]:
    if -0x80000000 <= value <= 0xFFFFFFFF:
        return REG_DWORD, struct.pack("<I", value & 0xFFFFFFFF)
    if 0 <= value <= 0xFFFFFFFFFFFFFFFF:
        return REG_QWORD, struct.pack("<Q", value)
    raise ValueError(f"{value} fits neither into REG_DWORD nor into REG_QWORD")


def _encode_string(value: str) -> bytes:
    if "\0" in value:
        raise ValueError(f"{value!r} has a NUL, which ends a string in the registry")
    return (value + "\0").encode("utf-16-le")


def decode_value(kind: int, data: bytes) -> int | str | bytes | list[str]:
    """The inverse of ``encode_value``.

    REG_EXPAND_SZ is a ``str``, not expanded. Types without a Python form, and numbers of a wrong length,
    are ``bytes``. What is no UTF-16 is replaced by U+FFFD.
    """
    match kind, len(data):
        case (4, 4) | (11, 8):
            return int.from_bytes(data, "little")
        case (1 | 2, _):
            return _decode_string(data).partition("\0")[0]
        case (7, _):
            text = _decode_string(data)
            return text[: (text + "\0\0").index("\0\0")].split("\0") if text.strip("\0") else []
        case _:
            return data


def _decode_string(data: bytes) -> str:
    return data.decode("utf-16-le", "replace")
