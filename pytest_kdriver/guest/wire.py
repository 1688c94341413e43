"""How messages are written, sans-IO: dataclasses to bytes and back, by the types of their fields.

The twin of ``vm/agent/frames/src/wire.rs``. A message is its fields, one after the other::

    u32 | u64 | bool u8 (0, 1) | bytes (u32 length, bytes) | str (bytes, UTF-8)
        | tuple (u32 count, items) | optional (bool, item if true) | message (its fields)
"""

from __future__ import annotations

import struct
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pytest_kdriver.errors import AgentProtocolError

U32 = Annotated[int, struct.Struct("<I")]
U64 = Annotated[int, struct.Struct("<Q")]


class Message:
    """What all messages are."""

    __slots__ = ()


M = TypeVar("M", bound=Message)


def to_bytes(message: Message) -> bytes:
    """The body that a message makes. ``ValueError`` for a number that does not fit its field."""
    out = bytearray()
    try:
        _codec(type(message)).write(message, out)
    except (struct.error, UnicodeEncodeError) as error:
        raise ValueError(f"{message!r} can't be sent: {error}") from None
    return bytes(out)


def from_bytes(kind: type[M], body: bytes) -> M:
    """Read a message that is all of ``body``. ``AgentProtocolError`` if it is none."""
    reader = _Reader(body)
    try:
        message = _codec(kind).read(reader)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise AgentProtocolError(f"no {kind.__name__}: {error}") from None
    if reader.offset != len(body):
        raise AgentProtocolError(f"{len(body) - reader.offset} bytes behind the {kind.__name__}")
    assert isinstance(message, kind)
    return message


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def number(self, layout: struct.Struct) -> int:
        (value,) = layout.unpack_from(self.data, self.offset)
        self.offset += layout.size
        assert isinstance(value, int)
        return value

    def counted(self) -> bytes:
        length = self.number(_COUNT)
        start = self.offset
        if length > len(self.data) - start:
            raise ValueError("the message ends within a field")
        self.offset += length
        return self.data[start : self.offset]


_COUNT = struct.Struct("<I")
_BOOL = struct.Struct("<B")


@dataclass(frozen=True, slots=True)
class _Codec:
    read: Callable[[_Reader], object]
    write: Callable[[Any, bytearray], None]


_codecs: dict[object, _Codec] = {}


def _codec(kind: object) -> _Codec:
    """The way of one type of field, or of one message."""
    codec = _codecs.get(kind)
    if codec is None:
        codec = _codecs[kind] = _make_codec(kind)
    return codec


def _make_codec(kind: Any) -> _Codec:
    if get_origin(kind) is Annotated:
        return _number(get_args(kind)[1])
    if kind is bool:
        return _Codec(_read_bool, lambda value, out: out.append(value))
    if kind is bytes:
        return _Codec(_Reader.counted, _write_counted)
    if kind is str:
        return _Codec(
            lambda reader: reader.counted().decode(),
            lambda value, out: _write_counted(value.encode(), out),
        )
    if get_origin(kind) is tuple:
        return _tuple(_codec(get_args(kind)[0]))
    if get_origin(kind) in {Union, types.UnionType}:
        return _optional(_codec(get_args(kind)[0]))
    return _message(kind)


def _number(layout: struct.Struct) -> _Codec:
    def write(value: int, out: bytearray) -> None:
        out += layout.pack(value)

    return _Codec(lambda reader: reader.number(layout), write)


def _read_bool(reader: _Reader) -> bool:
    value = reader.number(_BOOL)
    if value > 1:
        raise ValueError("a bool that is neither 0 nor 1")
    return value == 1


def _write_counted(value: bytes, out: bytearray) -> None:
    out += _COUNT.pack(len(value))
    out += value


MAX_ITEMS = 1 << 16
"""The most items of a tuple: in Python each takes many times the room that it takes in a message."""


def _tuple(item: _Codec) -> _Codec:
    def read(reader: _Reader) -> tuple[object, ...]:
        count = reader.number(_COUNT)
        if count > MAX_ITEMS:
            raise ValueError(f"{count} items; {MAX_ITEMS} are the most")
        return tuple(item.read(reader) for _ in range(count))

    def write(value: tuple[object, ...], out: bytearray) -> None:
        out += _COUNT.pack(len(value))
        for element in value:
            item.write(element, out)

    return _Codec(read, write)


def _optional(item: _Codec) -> _Codec:
    def write(value: object, out: bytearray) -> None:
        out.append(value is not None)
        if value is not None:
            item.write(value, out)

    return _Codec(lambda reader: item.read(reader) if _read_bool(reader) else None, write)


def _message(kind: type[Message]) -> _Codec:
    hints = get_type_hints(kind, include_extras=True)
    codecs = [(field.name, _codec(hints[field.name])) for field in fields(kind)]  # type: ignore[arg-type]

    def write(value: Message, out: bytearray) -> None:
        for name, codec in codecs:
            codec.write(getattr(value, name), out)

    return _Codec(
        lambda reader: kind(**{name: codec.read(reader) for name, codec in codecs}), write
    )
