"""A serial line that is not to be trusted: one direction of it, with its faults planned beforehand."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from tests.kd.simulator import CONTROL, DATA, HEADER, INITIAL, SYNC


class Kind(Enum):
    """What goes wrong."""

    DROP = "bytes are lost"
    FLIP = "a bit is another"
    DUPLICATE = "bytes come twice"
    DELAY = "bytes, and all behind them, come late"
    CUT = "the line is dead for a while, and what is put on it is lost"


@dataclass(frozen=True)
class Fault:
    """``position`` is the first byte that it touches of a piece that is long enough, else modulo its length.

    ``bit`` is a flip's, ``size`` the number of bytes that are lost or come twice, ``seconds`` a delay's or a
    cut's.
    """

    kind: Kind
    position: int = 0
    size: int = 1
    bit: int = 0
    seconds: float = 0.0


class FaultyWire:
    """What one end puts on it the other can take, later, and not always as it was put.

    ``plan`` says which pieces, numbered from 0 in the order in which they are put, have which fault. A piece
    is what one end has to send at one time, and has one fault at most: two can cancel one another out in a
    packet's sum of bytes.
    """

    def __init__(self, plan: Mapping[int, Fault] | None = None) -> None:
        self._plan = plan or {}
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._dead_until = 0.0
        self._late_until = 0.0
        self.pieces = 0
        """How many were put on it."""

    def put(self, data: bytes, now: float) -> None:
        """Put a piece on the wire."""
        if not data:
            return
        fault = self._plan.get(self.pieces)
        self.pieces += 1
        if now < self._dead_until:
            return
        if fault is not None:
            data = self._damage(data, fault, now)
        if data:
            self._pieces.append((max(now, self._late_until), data))

    def take(self, now: float) -> bytes:
        """What has arrived by now."""
        data = b""
        while self._pieces and self._pieces[0][0] <= now:
            data += self._pieces.popleft()[1]
        return data

    def clear(self) -> None:
        """What is under way is lost."""
        self._pieces.clear()

    def next_deadline(self) -> float | None:
        """When the next byte arrives."""
        return self._pieces[0][0] if self._pieces else None

    def _damage(self, data: bytes, fault: Fault, now: float) -> bytes:
        at = fault.position % len(data)
        match fault.kind:
            case Kind.DROP:
                return data[:at] + data[at + fault.size :]
            case Kind.DUPLICATE:
                return data[: at + fault.size] + data[at:]
            case Kind.DELAY:
                self._late_until = max(self._late_until, now) + fault.seconds
                return data
            case Kind.CUT:
                self._dead_until = now + fault.seconds
                return data[:at]
            case Kind.FLIP:
                flips = (_flip(data, at, (fault.bit + more) % 8) for more in range(8))
                return next((flipped for flipped in flips if not _looks_whole(flipped, at)), data)


def _flip(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


_IDS: Final = frozenset({INITIAL, INITIAL | 1, INITIAL | SYNC, INITIAL | 1 | SYNC})
_CONTROLS: Final = frozenset({4, 5, 6})


def _looks_whole(data: bytes, at: int) -> bool:
    """Whether the header that byte ``at`` lies in is one that could have been meant.

    No sum covers a header: nobody can see that its id is the other one, or that it is of another type. A
    kernel acknowledges a packet of a type that it does not wait for, and drops it.
    """
    start = 0
    while start + HEADER.size <= len(data):
        leader, kind, size, identifier, _ = HEADER.unpack_from(data, start)
        end = start + HEADER.size + (0 if leader == CONTROL else size + 1)
        if start <= at < start + HEADER.size:
            where = at - start
            is_type = where in {4, 5} and (leader == DATA or kind in _CONTROLS)
            is_id = where in range(8, 12) and identifier in _IDS
            return leader in {DATA, CONTROL} and (is_type or is_id)
        if leader not in {CONTROL, DATA} or at < end:
            return False
        start = end
    return False
