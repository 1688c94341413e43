"""The packets of KD over a serial line, and what is in them.

All numbers are little-endian. The layouts are those of ReactOS (sdk/include/reactos/windbgkd.h,
drivers/base/kdcom/kddll.c, ntoskrnl/kd64), which radare2 (shlr/winkd) and ntoseye (src/kd, used with Windows
10 and 11) have the same.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

BREAK_IN: Final = b"b"
"""It stands alone, in no packet (BREAKIN_PACKET_BYTE)."""

MOST_PAYLOAD: Final = 4000
"""Bytes (PACKET_MAX_SIZE)."""

INITIAL_ID: Final = 0x80800000
SYNC: Final = 0x800
"""The bit that the id of a target's first packet has."""

_DATA: Final = 0x30303030
_CONTROL: Final = 0x69696969
_TRAILER: Final = 0xAA
_HEADER: Final = struct.Struct("<IHHII")
"""Leader, type, size of the payload, id, sum of the payload's bytes."""
_LEADER: Final = re.compile(rb"0000|iiii|(?:0{1,3}|i{1,3})\Z")
"""Or what may become one when more bytes come."""


class PacketType(IntEnum):
    """PACKET_TYPE_KD_*."""

    MANIPULATE = 2
    DEBUG_IO = 3
    ACKNOWLEDGE = 4
    RESEND = 5
    RESET = 6
    STATE_CHANGE = 7
    TRACE_IO = 9
    CONTROL_REQUEST = 10
    FILE_IO = 11


_CONTROL_TYPES: Final = frozenset({PacketType.ACKNOWLEDGE, PacketType.RESEND, PacketType.RESET})
_DATA_TYPES: Final = frozenset(range(1, 12)) - _CONTROL_TYPES
_IDS: Final = frozenset(INITIAL_ID | bits for bits in (0, 1, SYNC, SYNC | 1))


class DataPacket(NamedTuple):
    """A packet with a payload, whole and with the right checksum."""

    type: int
    id: int
    payload: bytes


class ControlPacket(NamedTuple):
    """A packet without one."""

    type: int
    id: int


class DamagedPacket(NamedTuple):
    """A data packet whose checksum or last byte is wrong."""


Packet: TypeAlias = DataPacket | ControlPacket | DamagedPacket


def data_packet(packet_type: int, packet_id: int, payload: bytes) -> bytes:
    """A data packet's bytes."""
    header = _HEADER.pack(_DATA, packet_type, len(payload), packet_id, sum(payload))
    return b"%b%b\xaa" % (header, payload)


def control_packet(packet_type: int, packet_id: int = 0) -> bytes:
    """A control packet's bytes; it has nothing behind its header."""
    return _HEADER.pack(_CONTROL, packet_type, 0, packet_id, 0)


class PacketReader:
    """Finds packets in a stream that may begin anywhere, and have anything in it.

    It holds back no more than one packet. ``skipped`` counts the bytes that were none of a good one's.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self.skipped = 0

    @property
    def is_within_packet(self) -> bool:
        """Whether a packet has begun, as it seems, and is not complete."""
        return bool(self._buffer)

    def clear(self) -> None:
        """Forget what is there of a packet."""
        self._buffer = b""

    def give_up(self) -> Iterator[Packet]:
        """The packets behind the beginning of one that is not going to be completed."""
        rest, self._buffer = self._buffer[1:], b""
        self.skipped += 1
        return self.receive(rest)

    def receive(self, data: bytes) -> Iterator[Packet]:
        """The packets that ``data`` completes; to be exhausted before the next call.

        Where a packet is damaged, another is looked for in what seemed to be its bytes.
        """
        buffer = self._buffer + data
        at, end = 0, len(buffer)
        while end - at >= _HEADER.size:
            leader, packet_type, size, packet_id, checksum = _HEADER.unpack_from(buffer, at)
            if leader == _DATA and _is_data(packet_type, size, packet_id):
                payload_at = at + _HEADER.size
                trailer_at = payload_at + size
                if trailer_at >= end:
                    break
                payload = buffer[payload_at:trailer_at]
                if buffer[trailer_at] == _TRAILER and sum(payload) == checksum:
                    at = trailer_at + 1
                    yield DataPacket(packet_type, packet_id, payload)
                    continue
                yield DamagedPacket()
            elif leader == _CONTROL and packet_type in _CONTROL_TYPES and not size | checksum:
                at += _HEADER.size
                yield ControlPacket(packet_type, packet_id)
                continue
            at = self._skip(buffer, at, at + 1)
        else:
            at = self._skip(buffer, at, at)
        self._buffer = buffer[at:]

    def _skip(self, buffer: bytes, at: int, search_at: int) -> int:
        """Where the next leader stands, or the beginning of one at the end."""
        found = _LEADER.search(buffer, search_at)
        behind = found.start() if found is not None else len(buffer)
        self.skipped += behind - at
        return behind


def _is_data(packet_type: int, size: int, packet_id: int) -> bool:
    return packet_type in _DATA_TYPES and size <= MOST_PAYLOAD and packet_id in _IDS


# Text: type DEBUG_IO.

PRINT_STRING: Final = 0x3230
GET_STRING: Final = 0x3231
PRINT_SIZE: Final = 512
"""Bytes of one DbgPrint that are sent at most."""

_DEBUG_IO: Final = struct.Struct("<IHHII")
"""Api, processor's level, processor, length of the text, most bytes of an answer; then the text."""


_PRINT: Final = struct.pack("<I", PRINT_STRING)


class DebugIo(NamedTuple):
    """A print, or a prompt, which waits for an answer of at most ``most`` bytes."""

    api: int
    level: int
    processor: int
    text: bytes
    most: int


def read_debug_io(payload: bytes) -> DebugIo | None:
    """What a packet of text says; None where it is too short."""
    if len(payload) < _DEBUG_IO.size:
        return None
    api, level, processor, length, most = _DEBUG_IO.unpack_from(payload)
    text = payload[_DEBUG_IO.size : _DEBUG_IO.size + length]
    return DebugIo(api, level, processor, text, most)


def is_print(packet: DataPacket) -> bool:
    """Whether it is a print, which the target waits for nothing but its acknowledgement of."""
    return packet.type == PacketType.DEBUG_IO and packet.payload.startswith(_PRINT)


def answer_to(prompt: DebugIo, answer: bytes) -> bytes:
    """The payload that answers ``prompt``."""
    answer = answer[: min(prompt.most, MOST_PAYLOAD - _DEBUG_IO.size)]
    head = _DEBUG_IO.pack(prompt.api, prompt.level, prompt.processor, 0, len(answer))
    return head + answer


# Files of the debugger's, which a kernel asks for before it loads a driver: type FILE_IO.

_FILE_IO_SIZE: Final = 64
_UNSUCCESSFUL: Final = 0xC0000001


def refusal_of_file(payload: bytes) -> bytes:
    """The payload that says no to any of these requests: the api as it came, then the status."""
    return payload[:4].ljust(4, b"\0") + struct.pack("<I", _UNSUCCESSFUL).ljust(
        _FILE_IO_SIZE - 4, b"\0"
    )


# Debug registers that the kernel asks for: type CONTROL_REQUEST.

_RELEASE_BREAKPOINT: Final = 0x4301


def answer_to_control_request(payload: bytes) -> bytes:
    """None is available; what the kernel gives back is taken. Api, number, what is answered."""
    api, number = struct.unpack_from("<II", payload.ljust(8, b"\0"))
    return struct.pack("<III", api, number, api == _RELEASE_BREAKPOINT)


# Why the kernel stopped: type STATE_CHANGE.

EXCEPTION: Final = 0x3030
LOAD_SYMBOLS: Final = 0x3031
COMMAND_STRING: Final = 0x3032
_ALTERNATE: Final = 0x10000
"""Or'ed to these where the state is from an alternate source."""

STATE_CHANGE_SIZE: Final = 240
"""Bytes in front of a path or of trace data, at least; some stubs send 244."""

CONTROL_REPORT: Final = 192
"""Where the machine's own part begins: see ``machines``."""

_STATE_CHANGE: Final = struct.Struct("<IHHI4xQQ")
"""State, processor's level, processor, number of processors, thread, program counter."""
_EXCEPTION: Final = struct.Struct("<II QQ I4x 15Q I")
"""Code, flags, record, address, number of parameters, the parameters, whether it is the first chance."""
_SYMBOLS: Final = struct.Struct("<I4x QQ IIB")
"""Length of the path, base, process, checksum, size of the image, whether it is unloaded."""
_UNION: Final = 32

ALL_IMAGES: Final = (1 << 64) - 1
"""The base that a kernel names when it unloads everything, since it shuts down."""


class StateChange(NamedTuple):
    """The kernel stopped: ``payload`` is all of what it says."""

    kind: int
    processor: int
    processors: int
    program_counter: int
    payload: bytes


class ExceptionRecord(NamedTuple):
    """What an exception's stop says of it."""

    code: int
    address: int
    information: tuple[int, ...]
    is_first_chance: bool


class Symbols(NamedTuple):
    """An image that is loaded, or unloaded."""

    base: int
    size: int
    path: bytes
    is_unload: bool


def read_state_change(payload: bytes) -> StateChange | None:
    """What a stop says; None where it is too short."""
    if len(payload) < STATE_CHANGE_SIZE:
        return None
    kind, _, processor, processors, _, counter = _STATE_CHANGE.unpack_from(payload)
    return StateChange(kind & ~_ALTERNATE, processor, processors, counter, payload)


def read_exception(change: StateChange) -> ExceptionRecord:
    """An exception's stop: DBGKM_EXCEPTION64."""
    code, _, _, address, count, *information, first = _EXCEPTION.unpack_from(change.payload, _UNION)
    return ExceptionRecord(code, address, tuple(information[:count]), bool(first))


def read_symbols(change: StateChange) -> Symbols:
    """A stop for an image: DBGKD_LOAD_SYMBOLS64. The path stands at the end."""
    length, base, _, _, size, unload = _SYMBOLS.unpack_from(change.payload, _UNION)
    trailing = change.payload[STATE_CHANGE_SIZE:]
    path = trailing[-length:] if length else b""
    return Symbols(base, size, path.split(b"\0", 1)[0], bool(unload))


def read_command(change: StateChange) -> list[bytes]:
    """A stop for a command: its name and its text, each with a NUL behind it."""
    return [part for part in change.payload[STATE_CHANGE_SIZE:].split(b"\0") if part]


# Requests to a kernel that is stopped, and its replies: type MANIPULATE.


class Api(IntEnum):
    """DbgKd*Api."""

    READ_MEMORY = 0x3130
    GET_CONTEXT = 0x3132
    SET_CONTEXT = 0x3133
    CONTINUE2 = 0x313C
    GET_VERSION = 0x3146
    SET_CONTEXT_EX = 0x3160


DBG_CONTINUE: Final = 0x00010002
DBG_EXCEPTION_NOT_HANDLED: Final = 0x80010001

_MANIPULATE: Final = struct.Struct("<I2xHI4x40s")
"""Api, processor's level (0), processor, status, what belongs to the api; then data."""

MOST_DATA: Final = MOST_PAYLOAD - _MANIPULATE.size
CONTEXT_CHUNK: Final = 512
"""Bytes of a context in one request, as ntoseye has them."""


class Request(NamedTuple):
    """What a stopped kernel is asked for. ``fields`` is what belongs to the api."""

    api: int
    processor: int
    fields: bytes = b""
    data: bytes = b""

    def payload(self) -> bytes:
        """Its bytes."""
        return _MANIPULATE.pack(self.api, self.processor, 0, self.fields) + self.data


class Reply(NamedTuple):
    """What it answers; ``fields`` are 40 bytes."""

    api: int
    processor: int
    status: int
    fields: bytes
    data: bytes

    @property
    def is_success(self) -> bool:
        """NT_SUCCESS."""
        return self.status < 0x80000000


class Version(NamedTuple):
    """What kernel it is. ``machine`` is a PE file's; ``data_list`` is 0 where there is none."""

    build: int
    machine: int
    kernel_base: int
    data_list: int


def read_reply(payload: bytes) -> Reply | None:
    """What a reply says; None where it is too short."""
    if len(payload) < _MANIPULATE.size:
        return None
    api, processor, status, fields = _MANIPULATE.unpack_from(payload)
    return Reply(api, processor, status, fields, payload[_MANIPULATE.size :])


def read_memory(processor: int, address: int, size: int) -> Request:
    """Asks for ``size`` bytes, at most ``MOST_DATA``."""
    return Request(Api.READ_MEMORY, processor, struct.pack("<QI", address, size))


def memory_in(reply: Reply, address: int) -> bytes:
    """What was read, also where it is less than was asked for."""
    base, _, actual = struct.unpack_from("<QII", reply.fields)
    return reply.data[:actual] if base == address else b""


def set_context(processor: int, context: bytes, flags: int) -> Request:
    """Puts a whole context into place."""
    return Request(Api.SET_CONTEXT, processor, struct.pack("<I", flags), context)


def set_context_part(processor: int, context: bytes, offset: int) -> Request:
    """Puts a context into place, part by part; it is taken over with the last.

    The field in which the target answers how many bytes it took has the whole size here.
    """
    part = context[offset : offset + CONTEXT_CHUNK]
    fields = struct.pack("<III", offset, len(part), len(context))
    return Request(Api.SET_CONTEXT_EX, processor, fields, part)


def read_version(reply: Reply) -> Version:
    """DBGKD_GET_VERSION64; the list is there where the flag DBGKD_VERS_FLAG_DATA is set."""
    build, flags, machine, base, data = struct.unpack_from("<2xH2xHH6xQ8xQ", reply.fields)
    return Version(build, machine, base, data if flags & 2 else 0)
