"""What is done while a kernel is stopped: what to ask it for, what to tell of it, and how it goes on.

Each stop is a generator. It yields requests and gets the replies, None where there was none; what it returns
is the status by which the kernel goes on, or None where it stays stopped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from typing import Final, TypeAlias

from pytest_kdriver.kernel.bug_checks import FatalError, parse_fatal
from pytest_kdriver.kernel.events import (
    Breakpoint,
    BugCheck,
    Event,
    ImageLoaded,
    ImageUnloaded,
    KernelMessage,
    ProcessorState,
    UnhandledException,
)
from pytest_kdriver.kernel.sources.kd.known_images import KnownImages, stem
from pytest_kdriver.kernel.sources.kd.machines import (
    ASSERTION,
    BREAKPOINT,
    MACHINES,
    SINGLE_STEP,
    X64,
)
from pytest_kdriver.kernel.sources.kd.packets import (
    ALL_IMAGES,
    COMMAND_STRING,
    CONTEXT_CHUNK,
    DBG_CONTINUE,
    DBG_EXCEPTION_NOT_HANDLED,
    EXCEPTION,
    LOAD_SYMBOLS,
    MOST_DATA,
    Api,
    ExceptionRecord,
    Reply,
    Request,
    StateChange,
    memory_in,
    read_command,
    read_exception,
    read_memory,
    read_symbols,
    read_version,
    set_context,
    set_context_part,
)

Stop: TypeAlias = Generator[Request, Reply | None, int | None]

STACK_SIZE: Final = 4096
"""Bytes that are looked through for return addresses."""
MOST_FRAMES: Final = 32
MOST_PROCESSORS: Final = 256

_PAGE: Final = 4096
_FATAL: Final = b"*** Fatal System Error"
_MOST_FATAL_TEXT: Final = 4096

_CONTROL_C: Final = 1
_BUG_CHECK_FIRST: Final = 3
_BUG_CHECK_SECOND: Final = 4
"""DBG_STATUS_*, the argument of nt!DbgBreakPointWithStatus (ReactOS' kdtypes.h)."""

_BUG_CHECK_DATA: Final = 0x88
"""KiBugCheckData's address in KDDEBUGGER_DATA64 (QEMU's win_dump_defs.h)."""

_KERNEL_SPACE: Final = 1 << 63
"""Set in each address of the kernel's, on x64 and ARM64; a breakpoint elsewhere is its program's own."""

_ACCESS_VIOLATION: Final = 0xC0000005
_ACCESSES: Final = {0: "read", 1: "write", 8: "execute"}


class Stops:
    """What is known of a kernel from its stops. ``tell`` takes the events."""

    def __init__(self, *, tell: Callable[[Event], None], hold_bug_checks: bool) -> None:
        self._tell = tell
        self._hold_bug_checks = hold_bug_checks
        self.now = 0.0
        self.machine = X64
        self.images = KnownImages()
        self.boot_is_over = False
        self.break_in_is_wanted = False
        self.fatal: FatalError | None = None
        """A bug check that its text told of, and which is not told yet."""
        self._fatal_text = b""
        self._bug_checked = False
        self._is_told = False

    def forget_bug_check(self) -> None:
        """The kernel is another now: a snapshot was loaded, or it boots."""
        self.fatal = None
        self._fatal_text = b""
        self._bug_checked = False

    def look_for_bug_check(self, text: bytes) -> bool:
        """Whether ``text``, which was printed, completes what tells of a bug check."""
        if self._fatal_text:
            self._fatal_text += text
        elif _FATAL in text and not self._bug_checked:
            self._fatal_text = text
        else:
            return False
        if len(self._fatal_text) > _MOST_FATAL_TEXT:
            self._fatal_text = b""
            return False
        self.fatal = parse_fatal(self._fatal_text.decode("latin-1"))
        return self.fatal is not None

    def tell_bug_check(self, stack: tuple[int, ...] = ()) -> None:
        """Tell the bug check, unless it is told already."""
        if self.fatal is None:
            return
        code, parameters, blamed = self.fatal
        self._tell(BugCheck(self.now, None, code, parameters, None, blamed, stack))
        self.fatal = None
        self._fatal_text = b""
        self._bug_checked = True

    def handle(self, change: StateChange, *, is_again: bool, probe: bool) -> Stop:
        """A stop. ``is_again``: it was begun before, and what it told is not told again.

        ``probe``: ask what kernel it is first; it is not known whether it hears us.
        """
        self._is_told = self._is_told and is_again
        if probe:
            reply = yield Request(Api.GET_VERSION, change.processor)
            if reply is not None and reply.is_success:
                number = read_version(reply).machine
                self.machine = next((one for one in MACHINES if one.number == number), self.machine)
        match change.kind:
            case kind if kind == EXCEPTION:
                return (yield from self._exception(change))
            case kind if kind == LOAD_SYMBOLS:
                self._symbols(change)
            case kind if kind == COMMAND_STRING:
                text = b" ".join(read_command(change))
                self._tell_once(
                    KernelMessage(self.now, None, f"a command for the debugger: {_text(text)}")
                )
        return DBG_CONTINUE

    def look_around(self, change: StateChange) -> Stop:
        """Tell where the processors are, and stay."""
        yield from self._processors(change)
        return None

    def leave(self, change: StateChange) -> Stop:
        """Go on from a breakpoint."""
        context = yield from self._context(change.processor)
        return (yield from self._step_over(change, context))

    def _tell_once(self, event: Event) -> None:
        if not self._is_told:
            self._tell(event)
        self._is_told = True

    def _symbols(self, change: StateChange) -> None:
        symbols = read_symbols(change)
        path = _text(symbols.path)
        if not symbols.is_unload:
            image = self.images.load(symbols.base, symbols.size, path)
            self._tell_once(ImageLoaded(self.now, image.driver, image.base, symbols.size, path))
        elif symbols.base == ALL_IMAGES:
            self.images.clear()
            self._tell_once(KernelMessage(self.now, None, "the kernel shuts down"))
        else:
            known = self.images.unload(symbols.base)
            path = path or (known.path if known is not None else "")
            self._tell_once(ImageUnloaded(self.now, stem(path), symbols.base, path))

    def _exception(self, change: StateChange) -> Stop:
        record = read_exception(change)
        if record.code in {BREAKPOINT, ASSERTION} and record.address & _KERNEL_SPACE:
            return (yield from self._breakpoint(change, record.code))
        if record.code == SINGLE_STEP:
            return DBG_CONTINUE
        if not record.is_first_chance:
            driver = self.images.driver_at(record.address)
            self._tell_once(
                UnhandledException(self.now, driver, record.code, record.address, _access(record))
            )
        return DBG_EXCEPTION_NOT_HANDLED

    def _breakpoint(self, change: StateChange, code: int) -> Stop:
        address = change.program_counter
        context = yield from self._context(change.processor)
        driver = self.images.driver_at(address)
        status = None
        if context is not None and code == BREAKPOINT and driver is None:
            status = self.machine.register(context, self.machine.first_argument)
        if not self._bug_checked and code == BREAKPOINT:
            if self.fatal is None and status in {_BUG_CHECK_FIRST, _BUG_CHECK_SECOND}:
                self.fatal = yield from self._bug_check_data(change.processor)
            if self.fatal is not None and status != _CONTROL_C:
                self.tell_bug_check((yield from self._stack(change.processor, context)))
        if self._bug_checked:
            if self._hold_bug_checks or status != _BUG_CHECK_FIRST:
                if self.break_in_is_wanted:
                    yield from self._processors(change)
                return None
        elif status == _CONTROL_C or (context is None and self.break_in_is_wanted):
            if self.break_in_is_wanted:
                yield from self._processors(change)
        elif self.boot_is_over:
            self._tell_once(Breakpoint(self.now, driver, code, address))
        return (yield from self._step_over(change, context))

    def _step_over(self, change: StateChange, context: bytes | None) -> Stop:
        """Have the kernel go on behind the instruction that it stopped at, which it does not skip itself."""
        machine = self.machine
        address = change.program_counter
        if context is not None and machine.register(context, machine.program_counter) != address:
            return DBG_CONTINUE  # it was stepped over already
        instructions = machine.instructions_at(change)
        if not instructions:
            instructions = yield from self._memory(change.processor, address, 4)
        length = machine.length_of_trap(instructions)
        if not length:
            return DBG_CONTINUE
        if context is not None:
            stepped = machine.with_program_counter(context, address + length)
            for put in (self._put_parts, self._put_whole):
                if not (yield from put(change.processor, stepped)):
                    continue
                now = yield from self._context(change.processor)
                if now is not None and machine.register(now, machine.program_counter) != address:
                    return DBG_CONTINUE
        told = f"the kernel can't be made to step over the breakpoint at 0x{address:X}"
        self._tell(KernelMessage(self.now, None, told))
        return DBG_EXCEPTION_NOT_HANDLED

    def _put_parts(self, processor: int, context: bytes) -> Generator[Request, Reply | None, bool]:
        for offset in range(0, len(context), CONTEXT_CHUNK):
            reply = yield set_context_part(processor, context, offset)
            if reply is None or not reply.is_success:
                return False
        return True

    def _put_whole(self, processor: int, context: bytes) -> Generator[Request, Reply | None, bool]:
        reply = yield set_context(processor, context, self.machine.flags_in(context))
        return reply is not None and reply.is_success

    def _processors(self, change: StateChange) -> Generator[Request, Reply | None, None]:
        states = []
        for processor in range(min(change.processors, MOST_PROCESSORS)):
            context = yield from self._context(processor)
            if context is None:
                continue
            address = self.machine.register(context, self.machine.program_counter)
            stack = yield from self._stack(processor, context)
            states.append(ProcessorState(self.now, None, processor, address, stack))
        if not states:
            states = [ProcessorState(self.now, None, change.processor, change.program_counter)]
        for state in states:
            self._tell(state)
        self.break_in_is_wanted = False

    def _context(self, processor: int) -> Generator[Request, Reply | None, bytes | None]:
        reply = yield Request(Api.GET_CONTEXT, processor)
        if reply is None or not reply.is_success:
            return None
        for machine in MACHINES:
            if len(reply.data) == machine.context_size:
                self.machine = machine
                return reply.data
        return None

    def _stack(
        self, processor: int, context: bytes | None
    ) -> Generator[Request, Reply | None, tuple[int, ...]]:
        """Return addresses, innermost first: what lies in a known image, of all that is on the stack."""
        if context is None or not self.images:
            return ()
        pointer = self.machine.register(context, self.machine.stack_pointer) & ~7
        memory = yield from self._memory(processor, pointer, STACK_SIZE)
        words = struct.unpack(f"<{len(memory) // 8}Q", memory[: len(memory) & ~7])
        found = [word for word in words if self.images.at(word) is not None]
        return tuple(found[:MOST_FRAMES])

    def _memory(
        self, processor: int, address: int, size: int
    ) -> Generator[Request, Reply | None, bytes]:
        """Up to ``size`` bytes; fewer where the memory ends, which it does at a page's border."""
        memory = b""
        while len(memory) < size:
            at = (address + len(memory)) % (1 << 64)
            wanted = min(size - len(memory), MOST_DATA, _PAGE - at % _PAGE)
            reply = yield read_memory(processor, at, wanted)
            part = memory_in(reply, at)[:wanted] if reply is not None else b""
            memory += part
            if len(part) < wanted:
                break
        return memory

    def _bug_check_data(
        self, processor: int
    ) -> Generator[Request, Reply | None, FatalError | None]:
        """The bug check as the kernel keeps it, where its text was not heard."""
        reply = yield Request(Api.GET_VERSION, processor)
        if reply is None or not reply.is_success:
            return None
        address = read_version(reply).data_list
        for offset in (0, _BUG_CHECK_DATA):
            pointer = yield from self._memory(processor, address + offset, 8)
            address = int.from_bytes(pointer, "little")
            if not address:
                return None
        data = yield from self._memory(processor, address, 40)
        if len(data) < 40:
            return None
        code, first, second, third, fourth = struct.unpack("<5Q", data)
        return FatalError(code & 0xFFFFFFFF, (first, second, third, fourth), None) if code else None


def _access(record: ExceptionRecord) -> tuple[str, int] | None:
    """For a page fault what was tried, and where."""
    if record.code != _ACCESS_VIOLATION or len(record.information) < 2:
        return None
    kind, address = record.information[:2]
    return _ACCESSES.get(kind, "unknown"), address


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
