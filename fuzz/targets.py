"""What is fuzzed, how an input is tried, and what must hold for each.

An input is bytes, the same for every engine, so that one that was found can be tried again. Its first byte
says how the rest is read: as what a guest sends, or as a program that makes it, so that checksums and counts
which only a search of years would hit are right more often than not.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hypothesis import strategies as st

from pytest_kdriver.cli.dump import as_json, lines
from pytest_kdriver.errors import DumpError, KernelLogError
from pytest_kdriver.kernel.dump import parse_dump
from pytest_kdriver.kernel.events import DebugPrint, Event
from pytest_kdriver.kernel.sources.kd.packets import (
    INITIAL_ID,
    MOST_PAYLOAD,
    control_packet,
    data_packet,
)
from pytest_kdriver.kernel.sources.kd.session import KdSession
from pytest_kdriver.kernel.sources.source import Source
from pytest_kdriver.kernel.sources.text import SerialText
from pytest_kdriver.kernel.text import describe_event
from tests.dump_builder import header, minidump

CAPTURES: Final = Path(__file__).parents[1] / "tests" / "data" / "kd"
_MOST_SENT: Final = 64 << 10
_MOST_PIECES: Final = 24
"""So that an input takes a millisecond, and not a call for each byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A parser. ``check`` raises for an input that shows a mistake, ``inputs`` makes inputs of some sense.

    ``longest`` is the bytes of an input of those engines that would make longer ones.
    """

    name: str
    check: Callable[[bytes], None]
    inputs: st.SearchStrategy[bytes]
    seeds: Callable[[], Sequence[bytes]]
    longest: int


def _feed(source: Source, data: bytes, size: int, step: float, host: bytes = b"") -> list[Event]:
    """All events of ``data`` in pieces of ``size``, ``step`` seconds apart; the clock goes on behind it.

    ``host`` has what the host does in between, for a KD session.
    """
    events: list[Event] = []
    now = 100.0
    size = max(size, -(-len(data) // _MOST_PIECES))
    for number, at in enumerate(range(0, len(data), size)):
        if isinstance(source, KdSession) and number < len(host):
            _act(source, host[number], now)
        events += source.receive_data(data[at : at + size], now)
        _check_sent(source)
        now += step
    for _ in range(8):
        deadline = source.next_deadline()
        if deadline is None:
            break
        now = max(now, deadline)
        events += source.receive_data(b"", now)
        _check_sent(source)
    for event in events:
        describe_event(event)
    return events


def _act(session: KdSession, action: int, now: float) -> None:
    match action % 8:
        case 1:
            session.attach(now)
        case 2:
            session.break_in(now)
        case 3:
            session.end_of_boot()
        case 4:
            session.go_on(now)


def _check_sent(source: Source) -> None:
    assert len(source.data_to_send()) <= _MOST_SENT


def _printed(events: Sequence[Event]) -> bytes:
    return b"".join(event.raw for event in events if isinstance(event, DebugPrint))


# Serial text: size of pieces, time between them, then the text.


def _check_text(data: bytes) -> None:
    size, step, text = 1 + data[0] if data else 1, data[1] / 40 if len(data) > 1 else 0.0, data[2:]
    raw = _printed(_feed(SerialText(), text, size, step))
    assert raw.replace(b"\r", b"") == text.replace(b"\r", b"")


_LOADING: Final = (
    rb"(/ntoskrnl/mm/ARM3/sysldr.c:170) Loading: \SystemRoot\system32\drivers\bug.sys "
    b"at FFFFF88004EBE000 with 3b pages\r\n"
)
_FATAL: Final = (
    b"\r\n*** Fatal System Error: 0x000000d1\r\n                       (0x0000000000000001,"
    b"0x0000000000000002,0x0000000000000003,0xFFFFF88004EBE123)\r\n\r\nDriver at fault: bug.sys.\r\n"
)
_STOPPED: Final = b"\r\nEntered debugger on embedded INT3 at 0x0010:0xFFFFF88004EBE123.\r\n"
_TEXTS: Final = (
    _LOADING, _FATAL, _STOPPED, b"<bug.sys:1029>\r\n", b"\r\nkdb:> ", b"\r\n", b"\r", b"\n",
    b"(/ntoskrnl/mm/ARM3/sysldr.c:989) Leaking driver: bug.sys\r\n",
    b"<ntoskrnl.exe:a0123 (/ntoskrnl/io/iomgr/driver.c:601 (IopInitializeDriverModule))>\r\n",
    b"--- Press q to abort, any other key to continue ---",
    b"Break repeatedly, break Once, Ignore, terminate Process or terminate Thread (boipt)? ",
    b"*** Fatal System Error: 0x", b"x" * 5000,
)  # fmt: skip


def _cut(parts: tuple[list[bytes], list[tuple[int, int]]]) -> bytes:
    """Parts joined, each with some of its bytes changed or left out."""
    pieces, changes = parts
    data = bytearray(b"".join(pieces))
    for at, value in changes:
        if data and value == 256:
            del data[at % len(data)]
        elif data:
            data[at % len(data)] = value
    return bytes(data)


_CHANGES: Final = st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 256)), max_size=4)
_TEXT_INPUTS: Final = st.builds(
    lambda head, text: head + text,
    st.binary(min_size=2, max_size=2),
    st.tuples(st.lists(st.sampled_from(_TEXTS) | st.binary(max_size=20), max_size=8), _CHANGES).map(
        _cut
    ),
)


# Packets: how to read, size of pieces, time between them, how many actions of the host, these; then a
# stream, or a program: each step a kind, and what it takes.


def _check_packets(data: bytes) -> None:
    head = data[:4].ljust(4, b"\0")
    host, rest = data[4 : 4 + head[3] % 16], data[4 + head[3] % 16 :]
    stream = rest if head[0] & 1 else _packets(rest)
    session = KdSession(hold_bug_checks=not head[0] & 2)
    try:
        events = _feed(session, stream, 1 + head[1] * 4, head[2] / 40, host)
    except KernelLogError:
        return
    assert len(_printed(events)) <= len(stream)


_FIXED: Final = {
    4: struct.Struct("<IHHII"),  # a print, or a prompt
    5: struct.Struct("<IHHI4xQQ"),  # a state change's beginning
    6: struct.Struct("<I2xHI4x"),  # a reply's beginning
}
_APIS: Final = (0x3230, 0x3231)
_STATES: Final = (0x3030, 0x3031, 0x3032, 0x13030)
_REPLIES: Final = (0x3130, 0x3132, 0x3133, 0x3146, 0x315F, 0x3160, 0x3136)
_EXCEPTIONS: Final = (0x80000003, 0x80000004, 0xC0000005, 0xC0000420)


def _packets(program: bytes) -> bytes:
    """The stream that ``program`` makes: kind, ids, length of what belongs to it, that; again and again."""
    stream = bytearray()
    at = 0
    while at + 3 <= len(program):
        kind, ids, length = program[at : at + 3]
        body = program[at + 3 : at + 3 + length]
        at += 3 + length
        packet_id = INITIAL_ID | ids & 1 | (ids & 2) << 10
        packet = _packet(kind % 12, packet_id, ids, body)
        if ids & 0x80 and packet:
            packet = packet[:-1] + bytes([packet[-1] ^ (ids | 1)])
        stream += packet
    return bytes(stream)


def _packet(kind: int, packet_id: int, ids: int, body: bytes) -> bytes:
    match kind:
        case 0:
            return body
        case 1:
            return control_packet(4, packet_id & ~0x800)
        case 2:
            return control_packet(5 + (ids >> 2 & 1))
        case 3:
            return data_packet(ids >> 2 & 15, packet_id, body * 16 if ids & 0x40 else body)
        case 4 | 5:
            text = (body * 16)[: MOST_PAYLOAD - 16] if ids & 0x40 else body
            head = struct.pack("<IHHII", _APIS[kind - 4], 0, ids >> 2 & 3, len(text), 64)
            return data_packet(3, packet_id, head + text)
        case 6 | 7:
            return data_packet(7, packet_id, _stop(ids >> 2 & 3, kind == 7, body))
        case 8:
            head = struct.pack("<I2xHI4x", _REPLIES[(ids >> 2) % 7], 0, 0)
            return data_packet(2, packet_id, (head + body).ljust(56, b"\0"))
        case 9:
            head = struct.pack("<I2xHI4x40x", _REPLIES[(ids >> 2) % 7], 0, 0)
            return data_packet(2, packet_id, head + (body * 64)[: MOST_PAYLOAD - 56])
        case 10:
            head = struct.pack("<IHHII", 0x3230, 0, 0, len(_FATAL), 0)
            return data_packet(3, packet_id, head + _FATAL)
        case _:
            return data_packet(11, packet_id, body.ljust(64, b"\0"))


def _stop(state: int, known: bool, body: bytes) -> bytes:
    """A state change: of ``body``, or one that a kernel could have sent with what ``body`` has."""
    data = bytearray(struct.pack("<IHHI4xQQ", _STATES[state], 0, 0, 2, 1, 0xFFFFF88004EBE123))
    data += bytes(240 - len(data))
    if not known:
        data[32 : 32 + len(body)] = body
        return bytes(data)
    number = int.from_bytes(body[:1], "little")
    if state == 1:
        path = body[1:] + b"\0"
        struct.pack_into("<I4xQQIIB", data, 32, len(path), number << 16, 0, 0, 0x7000, number & 1)
        return bytes(data) + path
    struct.pack_into("<II", data, 32, _EXCEPTIONS[number % 4], 0)
    struct.pack_into("<QII", data, 48, 0xFFFFF88004EBE123, 2, 0)
    struct.pack_into("<I", data, 184, number >> 2 & 1)
    struct.pack_into("<H", data, 212, 16)
    data[216:218] = (b"\xcc\xc3", b"\xcd\x2c")[number >> 3 & 1]
    return bytes(data) + body


_STEP: Final = st.builds(
    lambda kind, ids, body: bytes([kind, ids, len(body)]) + body,
    st.integers(0, 11),
    st.integers(0, 0x7F) | st.integers(0, 0xFF),
    st.binary(max_size=24),
)
_PACKET_INPUTS: Final = st.builds(
    lambda head, host, steps: bytes([*head, len(host)]) + host + b"".join(steps),
    st.tuples(st.sampled_from((0, 2)), st.integers(0, 255), st.integers(0, 255)),
    st.sampled_from((b"", b"\1", b"\2", b"\3", b"\3\1")) | st.binary(max_size=15),
    st.lists(_STEP, max_size=12),
)


def _packet_seeds() -> list[bytes]:
    """Pieces of real traffic, and programs of each kind of packet."""
    seeds = [
        bytes([1, 255, 0, 0]) + data[at : at + 2000]
        for file in sorted(CAPTURES.glob("*.target.bin"))
        for data in (file.read_bytes(),)
        for at in range(0, len(data), len(data) // 8 + 1)
    ]
    every = b"".join(bytes([kind, kind & 1 | 2 * (not kind), 3]) + b"abc" for kind in range(12))
    return [*seeds, bytes([0, 255, 0, 0]) + every, bytes([0, 7, 10, 4, 1, 2, 3, 4]) + every]


# Dumps: a file as it is, or one of the builder's that is cut and changed in places.


def _check_dump(data: bytes) -> None:
    file = _dump(data[1:]) if data[:1] < b"\x80" else data[1:]
    try:
        dump = parse_dump(io.BytesIO(file), "x.dmp")
    except DumpError:
        return
    assert len(dump.modules) <= 4096
    assert len(dump.stack) <= 32
    told = json.dumps(as_json(Path("x.dmp"), dump))
    assert len(told) + sum(map(len, lines(dump))) < 4 << 20


_KERNEL_AT: Final = 0xFFFFF80012000000
_BASES: Final = (
    minidump(
        [("bad.sys", _KERNEL_AT + 0x10000000, 0x7000), (r"\x\nt.exe", _KERNEL_AT, 0x1046000)],
        [1, _KERNEL_AT + 0x100, _KERNEL_AT + 0x10001029],
    ),
    bytes(header(kind=6)),
    bytes(header(kind=1, exception=None, instruction=None, size=1 << 40)),
)
_PLACES: Final = (
    0, 4, 8, 0x0C, 0x30, 0x34, 0x38, 0x40, 0x48, 0x50, 0x58, 0x348 + 0x30, 0x348 + 0xF8, 0xF00,
    0xF10, 0xF98, 0xFA0, 0xFA8, 0x1030, *range(0x2028, 0x2050, 4),
)  # fmt: skip


def _dump(program: bytes) -> bytes:
    """Which of the bases, its length from the end, then places and what is written there."""
    head = program[:3].ljust(3, b"\0")
    data = bytearray(_BASES[head[0] % len(_BASES)])
    for at in range(3, len(program) - 9, 10):
        (place,) = struct.unpack_from("<H", program, at)
        known = _PLACES[place % len(_PLACES)] if place & 0x8000 else place % len(data)
        value = program[at + 2 : at + 2 + (4 if place & 0x4000 else 8)]
        data[known : known + len(value)] = value
    cut = int.from_bytes(head[1:], "little")
    return bytes(data[: len(data) - cut] if cut < len(data) else data)


_VALUE: Final = st.one_of(
    st.integers(0, 16), st.sampled_from((0x2000, 0x2080, 0x2098, 0x21B8, 2**32 - 1, 2**64 - 1)),
    st.integers(0, 2**64 - 1), st.just(_KERNEL_AT),
).map(lambda value: value.to_bytes(8, "little"))  # fmt: skip
_CHANGE: Final = st.builds(
    lambda place, value: place.to_bytes(2, "little") + value, st.integers(0, 0xFFFF), _VALUE
)
_DUMP_INPUTS: Final = st.builds(
    lambda base, cut, changes: bytes([0, base]) + cut.to_bytes(2, "little") + b"".join(changes),
    st.integers(0, 2),
    st.just(0) | st.integers(0, 0x2400),
    st.lists(_CHANGE, max_size=6),
)

TARGETS: Final = {
    target.name: target
    for target in (
        Target(
            name="packets",
            check=_check_packets,
            inputs=_PACKET_INPUTS,
            seeds=_packet_seeds,
            longest=2 << 10,
        ),
        Target(
            name="text",
            check=_check_text,
            inputs=_TEXT_INPUTS,
            seeds=lambda: [b"\xff\0" + text for text in _TEXTS] + [b"\x07\x05" + b"".join(_TEXTS)],
            longest=5 << 10,  # a line is told in pieces of 4 KiB
        ),
        Target(
            name="dumps",
            check=_check_dump,
            inputs=_DUMP_INPUTS,
            seeds=lambda: [*(b"\xff" + base for base in _BASES), bytes(4), bytes([0, 1, 0, 0])],
            longest=10 << 10,  # the headers, and more
        ),
    )
}
