"""The layer below a port's frames, sans-IO: a byte stream that has no beginning and no end.

A serial or virtio-serial port stays, while programs on both sides come and go, and the guest may be put back
to a snapshot in the middle of a frame. So marks stand between the bytes::

    payload   any bytes; 7D and 7E are sent as 7D and the byte xor 20
    mark      7E, 7E, kind, nonce (32 lowercase hexadecimal digits), 7E
    kind      S sync, host to guest | A answer | B boot, both guest to host

A 7E in a mark that is not whole begins a new mark, so that one too many does no harm. One too many is sent:
behind a mark that was cut off right before its end, the first would be that end. After a mark or an escape
that is none, the receiver drops everything up to the next good mark.

The host begins a session by ``S`` with a new nonce, and again every now and then until ``A`` with that nonce
comes: a program may not be there yet. A program in the guest sends ``B`` when it begins, so that the host
learns that another one is there now. The twin is ``vm/agent/frames/src/port.rs``.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from enum import Enum
from typing import Final

SYNC_INTERVAL: Final = 0.5
"""How often, in seconds, the host asks until it is answered."""

_ESCAPE: Final = b"}"
_FLAG: Final = b"~"
_NONCE: Final = re.compile("[0-9a-f]{32}")
_BAD_ESCAPE: Final = re.compile(rb"\}(?![\]^])")


class MarkKind(Enum):
    """What a mark says."""

    SYNC = "S"
    """From the host: begin the session with this nonce."""
    ANSWER = "A"
    """From the guest: it has begun."""
    BOOT = "B"
    """From the guest: a program has begun to serve the port."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark in a stream."""

    kind: MarkKind
    nonce: str


@dataclass(frozen=True, slots=True)
class Lost:
    """What came makes no sense; all behind it is dropped up to the next mark."""


def new_nonce() -> str:
    """A nonce that nobody has had before."""
    return secrets.token_hex(16)


def encode_payload(data: bytes) -> bytes:
    """The bytes that stand for ``data``."""
    return data.replace(b"}", b"}]").replace(b"~", b"}^")


def encode_mark(kind: MarkKind, nonce: str) -> bytes:
    """A mark's bytes. ``ValueError`` for a nonce that is not 32 lowercase hexadecimal digits."""
    if not _NONCE.fullmatch(nonce):
        raise ValueError(f"{nonce!r} is no nonce: it has 32 lowercase hexadecimal digits")
    return f"~~{kind.value}{nonce}~".encode("ascii")


class Decoder:
    """Bytes in; payload, marks of these kinds and ``Lost`` out. It begins as if lost."""

    def __init__(self, *kinds: MarkKind) -> None:
        accepted = "".join(kind.value for kind in kinds).encode("ascii")
        self._mark = re.compile(rb"~([%b])([0-9a-f]{32})~" % accepted)
        self._unfinished = re.compile(rb"~(?:[%b][0-9a-f]{0,32})?" % accepted)
        self._rest = b""
        self._lost = True

    def receive_data(self, data: bytes) -> list[bytes | Mark | Lost]:
        """Take what came, cut anywhere. No piece of payload is empty."""
        data = self._rest + data
        self._rest = b""
        out: list[bytes | Mark | Lost] = []
        start = 0
        while start < len(data):
            flag = data.find(_FLAG, start)
            if not self._lost:
                self._take_payload(data[start : len(data) if flag < 0 else flag], flag >= 0, out)
            if flag < 0:
                break
            start = self._take_mark(data, flag, out)
        return out

    def _take_payload(self, data: bytes, whole: bool, out: list[bytes | Mark | Lost]) -> None:
        if not whole and data.endswith(_ESCAPE):
            # Even where the escape before it is none, which is found below.
            self._rest = _ESCAPE
            data = data[:-1]
        bad = None
        if _ESCAPE in data:
            bad = _BAD_ESCAPE.search(data)
            if bad is not None:
                data = data[: bad.start()]
            data = data.replace(b"}^", b"~").replace(b"}]", b"}")
        if data:
            out.append(data)
        if bad is not None:
            self._rest = b""
            self._lose(out)

    def _take_mark(self, data: bytes, flag: int, out: list[bytes | Mark | Lost]) -> int:
        """Take what begins with a flag; where it ends."""
        if match := self._mark.match(data, flag):
            kind, nonce = match.groups()
            out.append(Mark(MarkKind(kind.decode()), nonce.decode()))
            self._lost = False
            return match.end()
        unfinished = self._unfinished.match(data, flag)
        assert unfinished is not None
        end = unfinished.end()
        if end == len(data):
            self._rest = data[flag:]
        elif data[end] != ord(_FLAG):
            self._lose(out)
        return end

    def _lose(self, out: list[bytes | Mark | Lost]) -> None:
        if not self._lost:
            out.append(Lost())
        self._lost = True


class HostStream:
    """The host's side: what to send, and which bytes are of this session.

    ::

        stream = HostStream()
        send(stream.begin(new_nonce()))            # and sync() again, until ``synced``
        while not stream.ended:
            payload = stream.receive_data(receive())

    Before ``synced`` nothing is to be sent but what ``begin`` and ``sync`` give, then payload.
    ``begin`` may be called again at any time: the session before is over then, and so is all that is still on
    its way.
    """

    def __init__(self) -> None:
        self._nonce = ""
        self._decoder = Decoder(MarkKind.ANSWER, MarkKind.BOOT)
        self._synced = False
        self._ended: str | None = None

    @property
    def synced(self) -> bool:
        """Whether the guest has answered: the session has begun (and may have ended since)."""
        return self._synced

    @property
    def ended(self) -> str | None:
        """Why the session is over, as the end of a sentence; None if it is not."""
        return self._ended

    def begin(self, nonce: str) -> bytes:
        """Begin a session with a new nonce; what to send."""
        self._nonce = nonce
        self._decoder = Decoder(MarkKind.ANSWER, MarkKind.BOOT)
        self._synced = False
        self._ended = None
        return self.sync()

    def sync(self) -> bytes:
        """What to send again as long as no answer comes."""
        return encode_mark(MarkKind.SYNC, self._nonce)

    def receive_data(self, data: bytes) -> bytes:
        """Take what came, and give the payload of this session that is in it."""
        payload = []
        for event in self._decoder.receive_data(data):
            match event:
                case _ if self._ended is not None:
                    break
                case bytes():
                    if self._synced:
                        payload.append(event)
                case Mark(MarkKind.ANSWER, nonce) if nonce == self._nonce:
                    self._synced = True
                case Mark() if self._synced:
                    self._ended = "the program in the guest was started anew"
                case Lost() if self._synced:
                    self._ended = "bytes came from the guest that make no sense"
                case _:
                    pass
        return b"".join(payload)
