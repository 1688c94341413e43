"""The codec of the agent's protocol, sans-IO: frames and their limits.

The twin of ``vm/agent/frames``, which describes the protocol; ``messages`` has what is in the frames. All
numbers are little-endian::

    frame   length u32, then as many bytes: version u8, kind u8, operation u16, request u32, body
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from pytest_kdriver.errors import AgentProtocolError

PROTOCOL_VERSION = 1

HEADER_SIZE = 8
"""The bytes of a frame between its length and its body."""

MAX_FRAME = 1 << 20
"""The greatest length a frame may announce, in bytes. It bounds what a peer can make us keep, and how long
one message holds up the others on a slow link."""

MAX_BODY = MAX_FRAME - HEADER_SIZE
"""The most body bytes in one frame."""

MAX_REPLY = 256 << 20
"""The most bytes of a reply, all its parts together. A reply is held in memory; h11 and others bound only
headers, for they hand bodies on piece by piece."""

_LENGTH = struct.Struct("<I")
_HEADER = struct.Struct("<BBHI")


class Kind(IntEnum):
    """What a frame is."""

    REQUEST = 1
    """From the host: do this."""
    PART = 2
    """From the agent: a piece of a reply, more follow."""
    REPLY = 3
    """From the agent: the last piece of a reply, most often the only one."""
    ERROR = 4
    """From the agent: it could not be done."""


_KINDS = frozenset(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame. ``request`` 0 is no request's id: an error about the stream itself."""

    kind: Kind
    operation: int
    request: int
    body: bytes


def encode(frame: Frame) -> bytes:
    """The frame's bytes. ``ValueError`` for a body above ``MAX_BODY``."""
    if len(frame.body) > MAX_BODY:
        raise ValueError(f"a message of {len(frame.body)} bytes; {MAX_BODY} fit into a frame")
    length = _LENGTH.pack(HEADER_SIZE + len(frame.body))
    header = _HEADER.pack(PROTOCOL_VERSION, frame.kind, frame.operation, frame.request)
    return b"".join((length, header, frame.body))


class Decoder:
    """Bytes in, frames out.

    A header is judged as soon as it is there, not when its frame is whole. After an error there is nothing
    but this error, for behind a broken frame no border is known.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._failure: str | None = None

    def receive_data(self, data: bytes) -> list[Frame]:
        """Take what came, cut anywhere, and give the frames that it makes whole.

        ``AgentProtocolError`` if what comes next is no frame. It is raised only when no good frame is
        before it: after a call that returned frames, call again with ``b""`` to learn at once.
        """
        self._buffer += data
        frames: list[Frame] = []
        while (frame := self._next_frame()) is not None:
            frames.append(frame)
        if self._failure is not None and not frames:
            raise AgentProtocolError(self._failure)
        return frames

    def _next_frame(self) -> Frame | None:
        if self._failure is None:
            self._failure = self._judge_header()
        if self._failure is not None or len(self._buffer) < 4 + HEADER_SIZE:
            return None
        end = 4 + _LENGTH.unpack_from(self._buffer)[0]
        if len(self._buffer) < end:
            return None
        _, kind, operation, request = _HEADER.unpack_from(self._buffer, 4)
        body = bytes(memoryview(self._buffer)[4 + HEADER_SIZE : end])
        del self._buffer[:end]
        return Frame(kind=Kind(kind), operation=operation, request=request, body=body)

    def _judge_header(self) -> str | None:
        """What is wrong with the next frame's header, as far as it is there."""
        if len(self._buffer) < 4:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if not HEADER_SIZE <= length <= MAX_FRAME:
            problem = f"a frame of {length} bytes; it has {HEADER_SIZE} to {MAX_FRAME}"
        elif len(self._buffer) < 4 + HEADER_SIZE:
            return None
        else:
            version, kind, _, _ = _HEADER.unpack_from(self._buffer, 4)
            if version != PROTOCOL_VERSION:
                problem = (
                    f"a frame of protocol version {version}; this side speaks {PROTOCOL_VERSION}"
                )
            elif kind not in _KINDS:
                problem = f"a frame of kind {kind}, which is none"
            else:
                return None
        return f"{problem}; the bytes begin with {bytes(self._buffer[:64])!r}"
