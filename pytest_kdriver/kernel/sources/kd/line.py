"""The line to a KD target: ids, acknowledgements, duplicates, RESET. No kernels here, and no clock.

Each side's data packets have one of two ids in turn, and are sent again until they are acknowledged. The
SYNC bit says that the target begins anew, with the ids of both directions. RESET says so from either side;
the target answers it by another, and repeats what it waits to have acknowledged or answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, NamedTuple, TypeAlias

from pytest_kdriver.kernel.sources.kd.packets import (
    BREAK_IN,
    INITIAL_ID,
    SYNC,
    ControlPacket,
    DataPacket,
    Packet,
    PacketReader,
    PacketType,
    control_packet,
    data_packet,
    is_print,
)

_ACKNOWLEDGEMENTS: Final = {
    INITIAL_ID | bits: control_packet(PacketType.ACKNOWLEDGE, INITIAL_ID | bits & 1)
    for bits in (0, 1, SYNC, SYNC | 1)
}
_RESEND: Final = control_packet(PacketType.RESEND)
_RESET: Final = control_packet(PacketType.RESET)


@dataclass(slots=True)
class Statistics:
    """What was counted since the session began."""

    prints: int = 0
    packets: int = 0
    resends_sent: int = 0
    resends_received: int = 0
    duplicates: int = 0
    bad_checksums: int = 0
    bytes_skipped: int = 0


class Arrived(NamedTuple):
    """A data packet that was not there before. It is acknowledged."""

    type: int
    payload: bytes


class Signal(Enum):
    """What else happens on a line."""

    HEARD = auto()
    """Something that says nothing new."""
    ACKNOWLEDGED = auto()
    """What was sent has arrived."""
    RESEND = auto()
    """It has not."""
    RESET = auto()
    """The ids agree; what was sent is void. The target repeats what it waits for."""
    EARLIER_RESET = auto()
    """The same, but what is under way was sent behind that, and is valid."""
    SYNC = auto()
    """The ids agree, and what was sent is void, since the target begins anew."""


Incoming: TypeAlias = Arrived | Signal


class Line:
    """Our end of a line. ``ids_agree``: the target takes what is sent, and does not only acknowledge it."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._reader = PacketReader()
        self._out = bytearray()
        self.ids_agree = False
        self.times_sent = 0
        """How often the packet was sent that is not acknowledged; 0 where there is none."""
        self.resets_under_way = 0
        self._id = INITIAL_ID
        self._expected_id: int | None = None
        self._sent = b""
        self._is_behind_resets = False
        """Whether it was sent behind all RESETs, as the first of a new stream of ids."""
        self._unsent = b""
        """The same, until it is handed out; what became void before that never is."""
        self._last: DataPacket | None = None
        self._behind_reset: DataPacket | None = None
        """What came since a RESET was sent: the target reads that before the acknowledgement."""
        self._repeated: DataPacket | None = None
        """What came before the answer to a RESET, which the target sent before that: it may be said again."""
        self._has_reset = False

    @property
    def is_within_packet(self) -> bool:
        """Whether a packet has begun, and is not complete."""
        return self._reader.is_within_packet

    def data_to_send(self) -> bytes:
        """The bytes for the target, each only once; a data packet comes last."""
        data = bytes(self._out) + self._unsent
        self._out.clear()
        self._unsent = b""
        return data

    def start_over(self) -> None:
        """Forget all of the target: it is another, or an earlier one."""
        self._reader.clear()
        self.drop()
        self.ids_agree = False
        self.resets_under_way = 0
        self._expected_id = self._last = None
        self._behind_reset = self._repeated = None

    # Out.

    def send(self, packet_type: int, payload: bytes) -> None:
        """Send a data packet; the one before, if it is under way, is given up."""
        self._sent = self._unsent = data_packet(packet_type, self._id, payload)
        self.times_sent = 1
        self._is_behind_resets = self._id == INITIAL_ID

    def send_again(self) -> None:
        """Send what is not acknowledged once more."""
        self.times_sent += 1
        self._unsent = self._sent

    def drop(self) -> None:
        """Nothing is under way."""
        self._sent = self._unsent = b""
        self.times_sent = 0

    def take_as_acknowledged(self) -> None:
        """What was sent has arrived, as is seen by what the target does."""
        if not self._unsent:
            self._id ^= 1
            self.resets_under_way = 0
        self.drop()

    def break_in(self) -> None:
        """Stop a kernel that runs."""
        self._out += BREAK_IN

    def reset(self) -> None:
        """Have a kernel that waits for something begin anew, and say it again."""
        self._out += _RESET
        self.resets_under_way += 1
        self._has_reset = True
        self._behind_reset = None
        self._is_behind_resets = False

    def ask_to_repeat(self) -> None:
        """Have the target send its packet again."""
        self._out += _RESEND
        self._statistics.resends_sent += 1

    # In.

    def receive(self, data: bytes) -> Iterator[Incoming]:
        """What ``data`` completes; to be exhausted before the next call."""
        return self._take(self._reader.receive(data))

    def give_up_packet(self) -> Iterator[Incoming]:
        """What stands behind the beginning of a packet that is not going to be completed."""
        yield from self._take(self._reader.give_up())
        self.ask_to_repeat()

    def _take(self, packets: Iterable[Packet]) -> Iterator[Incoming]:
        is_damaged = False
        statistics = self._statistics
        for packet in packets:
            if type(packet) is DataPacket:
                statistics.packets += 1
                self._out += _ACKNOWLEDGEMENTS[packet.id]
                yield from self._take_data(packet)
            elif type(packet) is ControlPacket:
                statistics.packets += 1
                yield self._take_control(packet)
            else:
                statistics.bad_checksums += 1
                is_damaged = True
        statistics.bytes_skipped = self._reader.skipped
        if is_damaged:
            self.ask_to_repeat()

    def _take_control(self, packet: ControlPacket) -> Signal:
        if packet.type == PacketType.RESET:
            if self.resets_under_way:
                self.resets_under_way -= 1
                self._repeated, self._behind_reset = self._last, None
                if self.times_sent and self._is_behind_resets:
                    self._expected_id, self._last = INITIAL_ID, None
                    return Signal.EARLIER_RESET
            elif not self._has_reset:  # a target answers each, so that this would have no end
                self.reset()
            self._begin_anew(INITIAL_ID)
            return Signal.RESET
        if packet.type == PacketType.RESEND:
            self._statistics.resends_received += 1
            return Signal.RESEND if self.times_sent else Signal.HEARD
        if self.times_sent and not self._unsent and packet.id & ~SYNC == self._id:
            self.take_as_acknowledged()
            return Signal.ACKNOWLEDGED
        return Signal.HEARD

    def _begin_anew(self, expected_id: int) -> None:
        self._id = INITIAL_ID
        self._expected_id = expected_id
        self._last = None
        self.ids_agree = True
        self.drop()

    def _take_data(self, packet: DataPacket) -> Iterator[Incoming]:
        """Tell a packet that was not there before.

        Who has to wait for each acknowledgement can only repeat the last packet. So one that has the wrong
        id and is another was not there before: the target has begun anew, and it could not be heard.
        """
        last, base = self._last, packet.id & ~SYNC
        repeated, self._repeated = self._repeated, None
        if packet.id & SYNC:
            is_duplicate = packet == last
            if not is_duplicate:
                self._behind_reset = None
                self._begin_anew(base)
                yield Signal.SYNC
        elif self._expected_id is not None and base != self._expected_id:
            is_duplicate = last is not None and _same(packet, last)
            self.ids_agree = self.ids_agree and is_duplicate
        else:
            is_duplicate = repeated is not None and is_print(packet) and _same(packet, repeated)
            self._expected_id = base
        if is_duplicate:
            self._statistics.duplicates += 1
            self._last = packet
            if base == self._expected_id:
                self._expected_id = base ^ 1
            yield Signal.HEARD
            return
        self._expected_id = base ^ 1
        self._last = packet
        if self.resets_under_way:
            if self._behind_reset is not None:
                self.resets_under_way = 0
            self._behind_reset = packet
        yield Arrived(packet.type, packet.payload)


def _same(one: DataPacket, other: DataPacket) -> bool:
    return (one.type, one.payload) == (other.type, other.payload)
