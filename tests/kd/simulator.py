"""A KD target: what an NT kernel with debugging on COM1 says and does, as a state machine.

Layouts, ids and time-outs are those of ReactOS' kdcom and kd64 (kddll.c, kdserial.c, kdapi.c, kdprint.c,
kdlock.c) and of Microsoft's public headers and pages. Bytes go in and come out, and the clock is the
caller's. The standard library is all it takes, so that it runs inside a guest, too.
"""

from __future__ import annotations

import copy
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

DATA: Final = 0x30303030
CONTROL: Final = 0x69696969
LEADER_BYTES: Final = b"0i"
TRAILER: Final = 0xAA
BREAK_IN: Final = ord("b")
HEADER: Final = struct.Struct("<IHHII")
"""Leader, type, size of the payload, id, sum of the payload's bytes."""
MOST: Final = 4000
"""Bytes of payload in a packet, at most."""

INITIAL: Final = 0x80800000
SYNC: Final = 0x800

MANIPULATE, DEBUG_IO, ACKNOWLEDGE, RESEND, RESET, STATE_CHANGE = 2, 3, 4, 5, 6, 7
CONTROL_REQUEST, FILE_IO = 10, 11
HEADER_SIZE: Final = {MANIPULATE: 56, DEBUG_IO: 16, CONTROL_REQUEST: 12, FILE_IO: 64}
"""What the payload of a packet from the host has at least."""

PRINT_STRING, GET_STRING = 0x3230, 0x3231
EXCEPTION, LOAD_SYMBOLS, COMMAND_STRING = 0x3030, 0x3031, 0x3032
CREATE_FILE: Final = 0x3430


class Api:
    """What a request is for."""

    READ_MEMORY = 0x3130
    GET_CONTEXT = 0x3132
    SET_CONTEXT = 0x3133
    CONTINUE = 0x3136
    REBOOT = 0x313B
    CONTINUE2 = 0x313C
    GET_VERSION = 0x3146
    GET_CONTEXT_EX = 0x315F
    SET_CONTEXT_EX = 0x3160


BREAKPOINT, ASSERTION = 0x80000003, 0xC0000420
UNSUCCESSFUL: Final = 0xC0000001
CONTINUE_STATUSES: Final = (0x00010001, 0x00010002, 0x80010001)

PRINT_SIZE: Final = 512
"""Bytes of one DbgPrint that the kernel sends; the rest is cut off."""

CONTEXT_SIZE: Final = 0x4D0
CONTEXT_FLAGS, RCX, RSP, RIP = 0x30, 0x80, 0x98, 0xF8
DR7: Final = 0x400

BYTE_TIMEOUT: Final = 1.0
"""Seconds for which kdcom waits for one byte, about."""
RETRIES: Final = 20
TICK: Final = 1 / 64
"""Seconds of the clock interrupt, which polls one byte for a break-in."""

KERNEL: Final = 0xFFFFF80120000000
KERNEL_SIZE: Final = 0x1046000
KERNEL_PATH: Final = r"\SystemRoot\system32\ntoskrnl.exe"
BREAK_WITH_STATUS: Final = KERNEL + 0x3FD0B0
"""nt!DbgBreakPointWithStatus: an int 3 and a return, its argument in RCX."""
BUG_CHECK_CODE: Final = KERNEL + 0x3FC1E0
CLOCK_CODE: Final = KERNEL + 0x2511F0
IDLE: Final = KERNEL + 0x3FA0CE
STACKS: Final = 0xFFFFA10000000000
STACK_SIZE: Final = 0x6000
PAGE: Final = 0x1000

CONTROL_C, BUG_CHECK_FIRST, BUG_CHECK_SECOND = 1, 3, 4

KMODE_EXCEPTION_NOT_HANDLED: Final = 0x1E


@dataclass(frozen=True)
class Print:
    text: bytes
    processor: int


@dataclass(frozen=True)
class Prompt:
    text: bytes
    processor: int
    most: int


@dataclass(frozen=True)
class Symbols:
    path: str
    base: int
    size: int
    unload: bool
    processor: int


@dataclass(frozen=True)
class Command:
    name: str
    text: str


@dataclass(frozen=True)
class Trap:
    code: int
    address: int
    processor: int
    information: tuple[int, ...] = ()
    first_chance: bool = True
    status: int | None = None
    """The argument of nt!DbgBreakPointWithStatus, where the trap is there."""
    stack: tuple[int, ...] = ()


@dataclass(frozen=True)
class File:
    name: str


@dataclass(frozen=True)
class Fatal:
    code: int
    parameters: tuple[int, ...]
    blamed: str | None
    processor: int
    stack: tuple[int, ...]


Operation: TypeAlias = Print | Prompt | Symbols | Command | Trap | File | Fatal

Snapshot: TypeAlias = dict[str, object]


class KdTarget:
    """A kernel that a script drives: what it is told to do it does one after the other.

    Each call of ``print`` and the like gives the number of what it began; it is over when ``completed`` has
    reached that number. ``errors`` has each mistake of the host. Where the wire between both is not to be
    trusted (``clean_wire`` is False) only those are looked for that no fault of the wire can look like.
    Times are in seconds, on the clock of the caller.
    """

    def __init__(
        self,
        *,
        processors: int = 2,
        clean_wire: bool = True,
        auto_reboot: bool = True,
        byte_timeout: float = BYTE_TIMEOUT,
    ) -> None:
        self.processors = processors
        self.auto_reboot = auto_reboot
        self.errors: list[str] = []
        self.answers: list[str] = []
        self.clean_wire = clean_wire
        self._timeout = byte_timeout
        self._now = 0.0
        self.boots = -1
        self._number = 0
        self.boot()

    # What the script tells it to do.

    def boot(self) -> int:
        """Start anew: what was under way is gone, and the first packet has the SYNC bit."""
        self.boots += 1
        self.present = True
        """Whether the kernel believes that there is a debugger: KdDebuggerNotPresent is the contrary."""
        self.bug_checked = False
        self.send_id = INITIAL | SYNC
        self.expected_id = INITIAL
        self.completed = self._number
        self._queue: deque[tuple[int, Operation]] = deque()
        self._current: tuple[int, Operation] | None = None
        self._report = (0, b"")
        self._sending: tuple[int, bytes] | None = None
        self._tries_left = 0
        self._in = bytearray()
        self._out = bytearray()
        self._leader = b""
        self._packet: bytearray | None = None
        self._deadline: float | None = None
        self._next_poll = self._now
        self._polled = b""
        self._break_pending = False
        self._context_sent = False
        self._pages: dict[int, bytearray] = {}
        self._images: dict[int, tuple[str, int]] = {}
        self._contexts = [bytearray(CONTEXT_SIZE) for _ in range(self.processors)]
        self._interrupted: bytearray | None = None
        self._host = HostStream()
        self._owed = 0
        for processor in range(self.processors):
            self.run_at(processor, IDLE)
        return self.load(KERNEL_PATH, KERNEL, KERNEL_SIZE)

    def _reboot(self) -> None:
        """Start anew by itself, behind all that it said."""
        said = self._out
        self.boot()
        self._out += said

    def print(self, text: str | bytes, processor: int = 0) -> int:
        """DbgPrint, which sends 512 bytes at most."""
        raw = text.encode() if isinstance(text, str) else text
        return self._add(Print(raw[:PRINT_SIZE], processor))

    def prompt(self, text: str, processor: int = 0, most: int = 2) -> int:
        """DbgPrompt, for at most ``most`` bytes; what is answered is put to ``answers``."""
        return self._add(Prompt(text.encode()[:PRINT_SIZE], processor, most))

    def load(self, path: str, base: int, size: int, processor: int = 0) -> int:
        """Load an image; its memory is zeros until it is written."""
        return self._add(Symbols(path, base, size, False, processor))

    def unload(self, path: str, processor: int = 0) -> int:
        """Unload the image that was loaded, or is to be, from ``path``."""
        symbols = [operation for _, operation in self._queue if isinstance(operation, Symbols)]
        known = {base: (name, size) for base, (name, size) in self._images.items()}
        known |= {one.base: (one.path, one.size) for one in symbols if not one.unload}
        base = next(base for base, (name, _) in known.items() if name == path)
        return self._add(Symbols(path, base, known[base][1], True, processor))

    def command(self, name: str, text: str) -> int:
        """DbgCommandString."""
        return self._add(Command(name, text))

    def breakpoint(
        self,
        address: int,
        *,
        assertion: bool = False,
        processor: int = 0,
        stack: Sequence[int] = (),
    ) -> int:
        """Run into an int 3 at ``address``, or an int 2Ch, which is an assertion that failed."""
        code = ASSERTION if assertion else BREAKPOINT
        return self._add(Trap(code, address, processor, stack=tuple(stack)))

    def exception(
        self,
        code: int,
        address: int,
        information: Sequence[int] = (),
        *,
        processor: int = 0,
        stack: Sequence[int] = (),
    ) -> int:
        """Raise an exception that nobody handles: the debugger's second chance, then a bug check."""
        return self._add(
            Trap(
                code, address, processor, tuple(information), first_chance=False, stack=tuple(stack)
            )
        )

    def bug_check(
        self,
        code: int,
        parameters: Sequence[int] = (0, 0, 0, 0),
        blamed: str | None = None,
        *,
        processor: int = 0,
        stack: Sequence[int] = (),
    ) -> int:
        """KeBugCheckEx; ``stack`` are the return addresses below it, innermost first."""
        return self._add(Fatal(code, tuple(parameters), blamed, processor, tuple(stack)))

    def file_io(self, name: str) -> int:
        """Ask for a file of the debugger's, as before a driver is loaded."""
        return self._add(File(name))

    def run_at(self, processor: int, address: int, stack: Sequence[int] = ()) -> None:
        """Have ``processor`` run at ``address``, with ``stack`` as return addresses, innermost first."""
        self._set(processor, RIP, address)
        self._set(processor, RSP, STACKS + (processor + 1) * 0x10000 - STACK_SIZE)
        self._push(processor, stack)

    def write(self, address: int, data: bytes) -> None:
        """Put ``data`` into its memory; the pages around are there from now on."""
        for offset, byte in enumerate(data, address):
            page = self._pages.setdefault(offset // PAGE, bytearray(PAGE))
            page[offset % PAGE] = byte

    def read(self, address: int, size: int) -> bytes:
        """What is in its memory, up to the first byte that is not there."""
        found = bytearray()
        while len(found) < size:
            number, offset = divmod(address + len(found), PAGE)
            page = self._pages.get(number)
            if page is None:
                if not any(
                    base <= number * PAGE < base + size_
                    for base, (_, size_) in self._images.items()
                ):
                    break
                page = bytearray(PAGE)
            found += page[offset : offset + size - len(found)]
        return bytes(found)

    def snapshot(self) -> Snapshot:
        """All of it as it is now, be it in the middle of a packet."""
        return copy.deepcopy(
            {name: value for name, value in vars(self).items() if name != "errors"}
        )

    def restore(self, snapshot: Snapshot, now: float) -> None:
        """Go on from ``snapshot``, at ``now``: the guest's own time has stood still."""
        vars(self).update(copy.deepcopy(snapshot))
        passed = now - self._now
        self._now = now
        self._next_poll += passed
        self._deadline = self._deadline + passed if self._deadline is not None else None

    # What can be seen of it.

    @property
    def idle(self) -> bool:
        """All that it was told to do is done."""
        return self._current is None and not self._queue

    @property
    def stopped(self) -> bool:
        """It waits for the host to let it go on."""
        return self._current is not None and isinstance(self._current[1], Symbols | Command | Trap)

    # Bytes and time.

    def receive_data(self, data: bytes, now: float) -> None:
        """Take bytes of the host's, and do what is due at ``now``."""
        self._now = now
        if self.clean_wire:
            self.errors += self._host.receive_data(data)
            self._owed -= self._host.acknowledged
            self._host.acknowledged = 0
            if self._owed < 0:
                self.errors.append("acknowledged a packet that was not sent")
                self._owed = 0
        self._in += data
        while self._step():
            pass

    def data_to_send(self, most: int | None = None) -> bytes:
        """The bytes for the host, at most ``most``; each is given once."""
        data = bytes(self._out[:most])
        del self._out[: len(data)]
        return data

    def next_deadline(self) -> float | None:
        """When ``receive_data(b"", now)`` is due. None: never."""
        if self._current is None:
            return self._next_poll if self._in else None
        return self._deadline

    def _step(self) -> bool:
        """Do one thing; False where there is nothing to do now."""
        if self._current is None:
            if self._break_pending:
                self._break_pending = False
                self._begin(0, Trap(BREAKPOINT, BREAK_WITH_STATUS, 0, status=CONTROL_C))
            elif self._queue:
                self._begin(*self._queue.popleft())
            elif self._in and self._now >= self._next_poll:
                self._poll()
            else:
                return False
        elif self._in:
            self._take(self._in.pop(0))
        elif self._deadline is not None and self._now >= self._deadline:
            self._time_out()
        else:
            return False
        return True

    def _poll(self) -> None:
        """Look at one byte, as at each tick of the clock and behind each print."""
        self._next_poll = self._now + TICK
        if not self._in:
            return
        byte = self._in.pop(0)
        self._break_pending = self._break_pending or byte == BREAK_IN
        self._polled = (self._polled + bytes([byte]))[-4:]
        if self.clean_wire and self._polled == LEADER_BYTES[:1] * 4:
            self.errors.append("sent a request to a kernel that runs")

    # What is done for each operation.

    def _add(self, operation: Operation) -> int:
        self._number += 1
        self._queue.append((self._number, operation))
        return self._number

    def _begin(self, number: int, operation: Operation) -> None:
        self._current = (number, operation)
        self._context_sent = False
        self._polled = b""
        match operation:
            case Print() | Symbols() | File() | Command() if not self.present:
                self._note(operation)
                self._finish()
                return
            case Trap() if operation.status == BUG_CHECK_FIRST and not self.present:
                self._reboot()
                return
            case Print():
                size = len(operation.text)
                head = struct.pack("<IHHII", PRINT_STRING, 15, operation.processor, size, 0)
                self._report = (DEBUG_IO, head + operation.text)
            case Prompt():
                size = len(operation.text)
                head = struct.pack(
                    "<IHHII", GET_STRING, 15, operation.processor, size, operation.most
                )
                self._report = (DEBUG_IO, head + operation.text)
            case File():
                head = struct.pack("<I4xIIIII", CREATE_FILE, 0x80100000, 0x80, 1, 1, 0x20)
                name = operation.name.encode("utf-16-le") + b"\0\0"
                self._report = (FILE_IO, head.ljust(HEADER_SIZE[FILE_IO], b"\0") + name)
            case Symbols():
                self._note(operation)
                path = operation.path.encode() + b"\0"
                fields = struct.pack(
                    "<I4xQQIIB", len(path), operation.base, 0, 0, operation.size, operation.unload
                )
                self._report = self._state_change(LOAD_SYMBOLS, operation.processor, fields, path)
            case Command():
                data = operation.name.encode() + b"\0" + operation.text.encode() + b"\0"
                self._report = self._state_change(COMMAND_STRING, 0, b"", data)
            case Trap():
                self._enter(operation)
                info = operation.information
                fields = struct.pack(
                    "<IIQQI4x15QI",
                    operation.code, 0, 0, operation.address,
                    len(info), *info, *[0] * (15 - len(info)),
                    operation.first_chance,
                )  # fmt: skip
                data = struct.pack("<I", 1)  # the trace data: one word, their number
                self._report = self._state_change(EXCEPTION, operation.processor, fields, data)
            case Fatal():
                self._crash(operation)
                return
        self._send(*self._report)

    def _note(self, operation: Operation) -> None:
        if isinstance(operation, Symbols) and not operation.unload:
            self._images[operation.base] = (operation.path, operation.size)
            if operation.base == KERNEL:
                self.write(BREAK_WITH_STATUS, b"\xcc\xc3")
        elif isinstance(operation, Symbols):
            self._images.pop(operation.base, None)
            first, last = operation.base // PAGE, (operation.base + operation.size - 1) // PAGE
            for number in [page for page in self._pages if first <= page <= last]:
                del self._pages[number]

    def _finish(self) -> None:
        assert self._current is not None
        number, _ = self._current
        self.completed = number or self.completed
        self._current = self._sending = self._deadline = None
        self._packet, self._leader = None, b""
        self._next_poll = self._now + TICK

    def _enter(self, trap: Trap) -> None:
        """Have the processor at the instruction that traps, which is put there."""
        context = self._contexts[trap.processor]
        self._interrupted = bytearray(context)
        if trap.status is not None:
            inner = BUG_CHECK_CODE if trap.status != CONTROL_C else CLOCK_CODE
            under = trap.stack if trap.status != CONTROL_C else (self._get(trap.processor, RIP),)
            self._push(trap.processor, (inner, inner + 0x3A7, *under))
            self._set(trap.processor, RCX, trap.status)
        elif trap.stack:
            self._push(trap.processor, trap.stack)
        if trap.code == BREAKPOINT:
            self.write(trap.address, b"\xcc")
        elif trap.code == ASSERTION:
            self.write(trap.address, b"\xcd\x2c")
        self._set(trap.processor, RIP, trap.address)

    def _leave(self, trap: Trap, *, handled: bool) -> None:
        """Go on behind a trap, as far as the host has made that possible."""
        assert self._current is not None
        number, _ = self._current
        stayed = self._get(trap.processor, RIP) == trap.address
        if self._interrupted is not None:
            self._contexts[trap.processor] = self._interrupted
            self._interrupted = None
        if handled and stayed:
            self.errors.append(
                f"let the kernel run into 0x{trap.code:X} at 0x{trap.address:X} again"
            )
            self._begin(number, trap)
        elif handled and trap.status == BUG_CHECK_FIRST and not self.auto_reboot:
            again = Trap(BREAKPOINT, BREAK_WITH_STATUS, trap.processor, status=BUG_CHECK_SECOND)
            self._begin(number, again)
        elif trap.status in {BUG_CHECK_FIRST, BUG_CHECK_SECOND}:
            self._reboot()
        elif handled:
            self._finish()
        else:
            parameters = (trap.code, trap.address, *trap.information[:2], 0, 0)[:4]
            self._begin(
                number,
                Fatal(
                    KMODE_EXCEPTION_NOT_HANDLED, parameters, None, trap.processor,
                    (trap.address, *trap.stack),
                ),
            )  # fmt: skip

    def _crash(self, fatal: Fatal) -> None:
        assert self._current is not None
        number, _ = self._current
        self._current = None
        self.bug_checked = True
        self._queue.clear()
        padded = (*fatal.parameters, 0, 0, 0, 0)[:4]
        values = ",".join(f"0x{value:016X}" for value in padded)
        text = f"\n*** Fatal System Error: 0x{fatal.code:08x}\n{'':23}({values})\n\n"
        self._queue.append((0, Print(text.encode(), fatal.processor)))
        if fatal.blamed is not None:
            line = f"Driver at fault: {fatal.blamed}.\n"
            self._queue.append((0, Print(line.encode(), fatal.processor)))
        stop = Trap(
            BREAKPOINT,
            BREAK_WITH_STATUS,
            fatal.processor,
            status=BUG_CHECK_FIRST,
            stack=fatal.stack,
        )
        self._queue.append((number, stop))

    def _state_change(
        self, state: int, processor: int, fields: bytes, data: bytes
    ) -> tuple[int, bytes]:
        address = self._get(processor, RIP)
        head = struct.pack(
            "<IHHI4xQQ",
            state,
            15,
            processor,
            self.processors,
            0xFFFFA80000001000 + processor,
            address,
        )
        stream = self.read(address, 16)
        report = struct.pack("<QQIHH", 0xFFFF0FF0, DR7, 0x282, len(stream), 3)
        segments = struct.pack("<4H", 0x10, 0x2B, 0x2B, 0x53)
        report += stream.ljust(16, b"\0") + segments
        return STATE_CHANGE, (head + fields).ljust(192, b"\0") + report.ljust(48, b"\0") + data

    # Packets.

    def _send(self, kind: int, payload: bytes) -> None:
        """Send a data packet, and wait for it to be acknowledged."""
        self._sending = (kind, payload)
        self._tries_left = RETRIES
        self._transmit()

    def _transmit(self) -> None:
        assert self._sending is not None
        kind, payload = self._sending
        self._out += HEADER.pack(DATA, kind, len(payload), self.send_id, sum(payload))
        self._out += payload + bytes([TRAILER])
        self._owed += 1
        self._listen()

    def _listen(self) -> None:
        self._packet, self._leader = None, b""
        self._deadline = self._now + self._timeout

    def _control(self, kind: int, identifier: int = 0) -> None:
        self._out += HEADER.pack(CONTROL, kind, 0, identifier, 0)

    def _time_out(self) -> None:
        """No byte came for so long. What that means depends on how much of a packet was there."""
        if self._packet is None and self._leader == bytes([BREAK_IN]):
            self._break_pending = True
            self._send_again()
        elif self._packet is not None and len(self._packet) >= 12:
            self._control(RESEND)
            self._listen()
        elif self._sending is None:
            self._listen()
        else:
            self._tries_left = max(self._tries_left - 1, 0)
            if self._tries_left == 0 and self._may_give_up():
                self._give_up()
            else:
                self._transmit()

    def _may_give_up(self) -> bool:
        assert self._sending is not None
        kind, payload = self._sending
        (number,) = struct.unpack_from("<I", payload)
        limit = {DEBUG_IO: PRINT_STRING, STATE_CHANGE: LOAD_SYMBOLS, FILE_IO: CREATE_FILE}
        return kind not in limit or limit[kind] == number

    def _give_up(self) -> None:
        self.present = False
        self.send_id = INITIAL | SYNC
        self.expected_id = INITIAL
        self._finish()

    def _send_again(self) -> None:
        """The host asked for it: the packet under way, or what the host is to answer."""
        if self._sending is not None:
            self._transmit()
        else:
            self._send(*self._report)

    def _take(self, byte: int) -> None:
        self._deadline = self._now + self._timeout
        if self._packet is None:
            self._take_leader(byte)
            return
        packet = self._packet
        packet.append(byte)
        control = self._leader[0] == LEADER_BYTES[1]
        kind = int.from_bytes(packet[:2], "little")
        if control and len(packet) == 2 and kind == RESEND:
            self._send_again()
        elif len(packet) < 12:
            return
        elif control:
            self._take_control(kind, int.from_bytes(packet[4:8], "little"))
        elif self._sending is not None:
            if self.clean_wire:
                self.errors.append("sent a request instead of the acknowledgement")
            self._control(RESEND)
            self._sent()
        else:
            self._take_data(packet)

    def _take_leader(self, byte: int) -> None:
        if byte in LEADER_BYTES:
            self._leader = (self._leader if self._leader[:1] == bytes([byte]) else b"") + bytes(
                [byte]
            )
        elif byte == BREAK_IN:
            self._leader = bytes([byte])
        else:
            self._leader = b""
        if len(self._leader) == 4:
            self.present = True
            self._packet = bytearray()

    def _take_control(self, kind: int, identifier: int) -> None:
        if kind == RESET:
            self.send_id = self.expected_id = INITIAL
            self._control(RESET)
            self._send_again()
        elif kind == ACKNOWLEDGE and self._sending and identifier == self.send_id & ~SYNC:
            self._sent()
        else:
            self._listen()

    def _take_data(self, packet: bytearray) -> None:
        kind, size, identifier, checksum = struct.unpack_from("<HHII", packet)
        wanted = self._report[0] if self._report[0] in HEADER_SIZE else MANIPULATE
        if len(packet) == 12 and not HEADER_SIZE[wanted] <= size <= MOST:
            self._control(RESEND)
            self._listen()
        elif len(packet) == 12 + size + 1:
            payload = bytes(packet[12:-1])
            if packet[-1] != TRAILER or sum(payload) != checksum:
                self._control(RESEND)
                self._listen()
                return
            self._control(ACKNOWLEDGE, identifier)
            self._listen()
            if identifier == self.expected_id and kind == wanted:
                self.expected_id ^= 1
                self._answered(kind, payload)
            elif identifier == self.expected_id and self.clean_wire:
                self.errors.append(f"sent a packet of type {kind} where {wanted} was waited for")

    def _sent(self) -> None:
        """The packet under way was acknowledged."""
        assert self._current is not None
        self.send_id = (self.send_id ^ 1) & ~SYNC
        self._sending = None
        if isinstance(self._current[1], Print):
            self._finish()
            self._poll()
        else:
            self._listen()

    # What the host asks for, or answers.

    def _answered(self, kind: int, payload: bytes) -> None:
        assert self._current is not None
        operation = self._current[1]
        if isinstance(operation, Prompt):
            api, _, processor, _, size = struct.unpack_from("<IHHII", payload)
            text = payload[16:]
            if api != GET_STRING or processor != operation.processor or size != len(text):
                self.errors.append(f"answered a prompt by {payload[:16].hex(' ')}")
            if len(text) > operation.most:
                self.errors.append(f"answered {len(text)} bytes where {operation.most} have room")
            self.answers.append(text[: operation.most].decode())
            self._finish()
        elif isinstance(operation, File):
            api, status = struct.unpack_from("<II", payload)
            if api != CREATE_FILE or len(payload) != 64 or status < 0xC0000000:
                self.errors.append(f"answered a file request by {payload.hex(' ')}")
            self._finish()
        else:
            self._manipulate(payload)

    def _manipulate(self, payload: bytes) -> None:
        assert self._current is not None
        api, _, processor = struct.unpack_from("<IHH", payload)
        data = payload[56:]
        request = bytearray(payload[:56])
        if processor >= self.processors:
            self.errors.append(f"asked for processor {processor} of {self.processors}")
            self._reply(request, UNSUCCESSFUL)
            return
        match api:
            case Api.CONTINUE | Api.CONTINUE2:
                self._continue(api, processor, request)
            case Api.REBOOT:
                self._reboot()
            case Api.READ_MEMORY:
                address, size = struct.unpack_from("<QI", request, 16)
                size = min(size, MOST - len(request))
                found = self.read(address, size)
                struct.pack_into("<I", request, 28, len(found))
                self._reply(request, 0 if len(found) == size else UNSUCCESSFUL, found)
            case Api.GET_CONTEXT:
                self._context_sent = True
                self._reply(request, 0, bytes(self._contexts[processor]))
            case Api.SET_CONTEXT:
                self._set_context(request, processor, 0, data, CONTEXT_SIZE)
            case Api.GET_CONTEXT_EX:
                offset, size = struct.unpack_from("<II", request, 16)
                found = bytes(self._contexts[processor][offset : offset + size])
                struct.pack_into("<I", request, 24, len(found))
                self._context_sent = True
                self._reply(request, 0 if len(found) == size else UNSUCCESSFUL, found)
            case Api.SET_CONTEXT_EX:
                offset, size, total = struct.unpack_from("<III", request, 16)
                if size != len(data) or total != CONTEXT_SIZE:
                    self.errors.append(f"set {size} of {total} bytes of a context by {len(data)}")
                struct.pack_into("<I", request, 24, size)
                self._set_context(request, processor, offset, data, size)
            case Api.GET_VERSION:
                version = struct.pack(
                    "<HHBBHHBBBBHQQQ",
                    15, 19041, 6, 2, 0x47, 0x8664, 12, 3, 0x31, 0, 0,
                    KERNEL, KERNEL + 0xC2A2B0, KERNEL + 0xC4F0E8,
                )  # fmt: skip
                self._reply(request[:16] + version, 0)
            case _:
                self.errors.append(f"asked for 0x{api:X}")
                self._reply(request, UNSUCCESSFUL)

    def _reply(self, request: bytearray, status: int, data: bytes = b"") -> None:
        struct.pack_into("<I", request, 8, status)
        self._send(MANIPULATE, bytes(request) + data)

    def _set_context(
        self, request: bytearray, processor: int, offset: int, data: bytes, size: int
    ) -> None:
        if not self._context_sent or len(data) != size or offset + size > CONTEXT_SIZE:
            self.errors.append(
                f"set {len(data)} bytes of a context at {offset}, unread or too many"
            )
            self._reply(request, UNSUCCESSFUL)
            return
        self._contexts[processor][offset : offset + size] = data
        self._reply(request, 0)

    def _continue(self, api: int, processor: int, request: bytearray) -> None:
        assert self._current is not None
        operation = self._current[1]
        assert isinstance(operation, Trap | Symbols | Command)
        (status,) = struct.unpack_from("<I", request, 16)
        if status not in CONTINUE_STATUSES:
            self.errors.append(f"let the kernel go on by 0x{status:X}")
        if processor != (0 if isinstance(operation, Command) else operation.processor):
            self.errors.append(f"let processor {processor} go on")
        if api == Api.CONTINUE2:
            trace, dr7, start, end = struct.unpack_from("<IQQQ", request, 20)
            if (trace, dr7, end) != (0, DR7, 0) or start not in {0, 1}:
                self.errors.append(f"let the kernel go on with {request[16:52].hex(' ')}")
        if isinstance(operation, Trap):
            self._leave(operation, handled=status < 0x80000000)
        else:
            self._finish()

    # Registers.

    def _get(self, processor: int, register: int) -> int:
        return int.from_bytes(self._contexts[processor][register : register + 8], "little")

    def _set(self, processor: int, register: int, value: int) -> None:
        context = self._contexts[processor]
        struct.pack_into("<I", context, CONTEXT_FLAGS, 0x10001F)
        struct.pack_into("<Q", context, register, value)

    def _push(self, processor: int, addresses: Sequence[int]) -> None:
        """Put return addresses on the stack, each in a frame of its own, the innermost at RSP."""
        frames = b"".join(
            struct.pack("<5Q", address, 0, number, 0x1234, 0)
            for number, address in enumerate(addresses)
        )
        top = self._get(processor, RSP) - len(frames)
        self.write(top, frames)
        self._set(processor, RSP, top)


class HostStream:
    """What a host sends, looked at byte by byte: whole packets and break-ins, and nothing else."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.acknowledged = 0
        """Packets that it acknowledged since this was last set to 0."""

    def receive_data(self, data: bytes) -> list[str]:
        """The mistakes in the packets that ``data`` completes."""
        self._data += data
        errors = []
        while self._data:
            size, error = self._look()
            if size == 0:
                break
            del self._data[:size]
            if error is not None:
                errors.append(error)
        return errors

    def _look(self) -> tuple[int, str | None]:
        """The size of what stands first, 0 where it is not complete, and what is wrong with it."""
        data = self._data
        if data[0] == BREAK_IN:
            return 1, None
        if data[0] not in LEADER_BYTES:
            return len(data), f"sent {bytes(data[:16]).hex(' ')}, which is no packet"
        if len(data) < HEADER.size:
            return 0, None
        leader, kind, size, identifier, checksum = HEADER.unpack_from(data)
        head = bytes(data[: HEADER.size]).hex(" ")
        if leader == CONTROL:
            known = {ACKNOWLEDGE: (INITIAL, INITIAL | 1), RESEND: (0,), RESET: (0,)}
            if size or checksum or identifier not in known.get(kind, ()):
                return HEADER.size, f"sent the control packet {head}"
            self.acknowledged += kind == ACKNOWLEDGE
            return HEADER.size, None
        if leader != DATA or size > MOST or kind not in HEADER_SIZE:
            return len(data), f"sent the packet {head}"
        whole = HEADER.size + size + 1
        if len(data) < whole:
            return 0, None
        payload = data[HEADER.size : whole - 1]
        if (
            identifier not in {INITIAL, INITIAL | 1}
            or size < HEADER_SIZE[kind]
            or sum(payload) != checksum
            or data[whole - 1] != TRAILER
        ):
            return whole, f"sent the packet {head}"
        return whole, None
