"""A KD session, exchange by exchange. The kernel's side is written by hand."""

import struct
from collections.abc import Sequence

import pytest

from pytest_kdriver.kernel.events import (
    Breakpoint,
    BugCheck,
    DebugPrint,
    Event,
    ImageLoaded,
    ImageUnloaded,
    KernelMessage,
    ProcessorState,
    UnhandledException,
)
from pytest_kdriver.kernel.sources.kd.packets import (
    ControlPacket,
    DataPacket,
    Packet,
    PacketReader,
    control_packet,
    data_packet,
)
from pytest_kdriver.kernel.sources.kd.session import KdSession, KdState, answer_prompt

MANIPULATE, DEBUG_IO, ACKNOWLEDGE, RESEND, RESET, STATE_CHANGE = 2, 3, 4, 5, 6, 7
TRACE_IO, CONTROL_REQUEST, FILE_IO = 9, 10, 11
INITIAL, SYNC = 0x80800000, 0x800

READ_MEMORY, GET_CONTEXT, SET_CONTEXT, SET_CONTEXT_EX = 0x3130, 0x3132, 0x3133, 0x3160
CONTINUE2, GET_VERSION = 0x313C, 0x3146
CONTINUE, NOT_HANDLED = 0x00010002, 0x80010001

INT3, ASSERTION, SINGLE_STEP, ACCESS_VIOLATION = 0x80000003, 0xC0000420, 0x80000004, 0xC0000005

KERNEL, DRIVER = 0xFFFFF80120000000, 0xFFFFF80340000000
STACK = 0xFFFFA10000005F00
DR7 = 0x455
FATAL = "\n*** Fatal System Error: 0x000000d1\n       (0x{:016X},0x{:016X},0x{:016X},0x{:016X})\n\n"


def printed(text: bytes, processor: int = 0) -> bytes:
    return struct.pack("<IHHII", 0x3230, 15, processor, len(text), 0) + text


def prompted(text: bytes, most: int = 2) -> bytes:
    return struct.pack("<IHHII", 0x3231, 15, 0, len(text), most) + text


def state(kind: int, counter: int, code: bytes = b"\xcc\xc3", processor: int = 1) -> bytearray:
    payload = bytearray(240)
    struct.pack_into("<IHHI4xQQ", payload, 0, kind, 15, processor, 2, 0xFFFFA80000001000, counter)
    struct.pack_into("<QQIHH16s", payload, 192, 0xFFFF0FF0, DR7, 0x282, len(code), 3, code)
    return payload


def loaded(path: str, base: int, size: int, *, unload: bool = False) -> bytes:
    payload = state(0x3031, KERNEL)
    name = path.encode() + b"\0" if path else b""
    struct.pack_into("<I4xQQIIB", payload, 32, len(name), base, 0, 0, size, unload)
    return bytes(payload) + name


def raised(
    code: int, address: int, *information: int, first: bool = True, text: bytes = b"\xcc\xc3"
) -> bytes:
    payload = state(0x3030, address, text)
    struct.pack_into("<II8xQI4x", payload, 32, code, 0, address, len(information))
    struct.pack_into(f"<{len(information)}Q", payload, 64, *information)
    struct.pack_into("<I", payload, 184, first)
    return bytes(payload)


class Kernel:
    """A kernel that says what the test has it say, and answers a session's requests while it is stopped."""

    def __init__(self, session: KdSession, *, sync: bool = True) -> None:
        self.session = session
        self.now = 100.0
        self.id = INITIAL | (SYNC if sync else 0)
        self.contexts = [bytearray(0x4D0), bytearray(0x4D0)]
        self.memory: dict[int, bytes] = {}
        self.refused: set[int] = set()
        self.requests: list[DataPacket] = []
        self.status: int | None = None
        """By which it goes on."""
        self._reader = PacketReader()

    def at(
        self, counter: int, argument: int = 0, processor: int = 1, stack: Sequence[int] = ()
    ) -> None:
        context = self.contexts[processor]
        for offset, value in ((0x80, argument), (0x98, STACK), (0xF8, counter)):
            struct.pack_into("<Q", context, offset, value)
        self.memory[STACK] = struct.pack(f"<{len(stack)}Q", *stack)

    def counter(self, processor: int = 1) -> int:
        return int.from_bytes(self.contexts[processor][0xF8:0x100], "little")

    def give(self, data: bytes) -> tuple[list[Event], list[Packet]]:
        events = self.session.receive_data(data, self.now)
        return events, list(self._reader.receive(self.session.data_to_send()))

    def say(self, kind: int, payload: bytes) -> tuple[list[Event], list[Packet]]:
        """Say something new; see to it that it is acknowledged."""
        events, sent = self.give(data_packet(kind, self.id, payload))
        assert sent[0] == ControlPacket(ACKNOWLEDGE, self.id & ~SYNC)
        self.id = (self.id ^ 1) & ~SYNC
        return events, sent[1:]

    def acknowledge(self, packet: Packet) -> tuple[list[Event], list[Packet]]:
        assert isinstance(packet, DataPacket)
        return self.give(control_packet(ACKNOWLEDGE, packet.id))

    def stop(self, payload: bytes) -> list[Event]:
        """Stop, and answer all that is asked, until it goes on or nothing more is asked."""
        self.status = None
        events, sent = self.say(STATE_CHANGE, payload)
        return events + self.serve(sent)

    def serve(self, sent: list[Packet]) -> list[Event]:
        events: list[Event] = []
        while sent:
            (request,) = sent
            assert isinstance(request, DataPacket)
            self.requests.append(request)
            more, sent = self.acknowledge(request)
            events += more
            api, processor = struct.unpack_from("<I2xH", request.payload)
            if api == CONTINUE2:
                self.status, trace, dr7 = struct.unpack_from("<IIQ", request.payload, 16)
                assert (trace, dr7, processor) == (0, DR7, 1)
            else:
                assert not sent
                more, sent = self.say(MANIPULATE, self._reply(api, processor, request.payload))
                events += more
        return events

    def _reply(self, api: int, processor: int, payload: bytes) -> bytes:
        reply = bytearray(payload[:56])
        data = b""
        if api in self.refused:
            struct.pack_into("<I", reply, 8, 0xC0000001)
        elif api == GET_CONTEXT:
            data = bytes(self.contexts[processor])
        elif api == SET_CONTEXT:
            self.contexts[processor][:] = payload[56:]
        elif api == SET_CONTEXT_EX:
            offset, size, whole = struct.unpack_from("<III", payload, 16)
            assert whole == len(self.contexts[processor])
            self.contexts[processor][offset : offset + size] = payload[56:]
        elif api == READ_MEMORY:
            address, size = struct.unpack_from("<QI", payload, 16)
            for base, memory in self.memory.items():
                if base <= address < base + len(memory):
                    data = memory[address - base :][:size]
            struct.pack_into("<II", reply, 8, 0 if len(data) == size else 0xC0000001, 0)
            struct.pack_into("<I", reply, 28, len(data))
        elif api == GET_VERSION:
            struct.pack_into(
                "<HHBBHHIHQQQ", reply, 16, 15, 19041, 6, 2, 2, 0x8664, 0, 0, KERNEL, 0, KERNEL + 64
            )
        return bytes(reply) + data

    def asked(self, api: int) -> int:
        return sum(request.payload.startswith(struct.pack("<I", api)) for request in self.requests)


@pytest.fixture
def session() -> KdSession:
    return KdSession()


@pytest.fixture
def kernel(session: KdSession) -> Kernel:
    """It has booted, with an image of a driver."""
    kernel = Kernel(session)
    kernel.stop(loaded(r"\SystemRoot\system32\ntoskrnl.exe", KERNEL, 0x1000000))
    kernel.stop(loaded(r"\SystemRoot\System32\drivers\demo.sys", DRIVER, 0x8000))
    session.end_of_boot()
    return kernel


def kinds(packets: list[Packet]) -> list[int]:
    return [packet.type for packet in packets if isinstance(packet, DataPacket | ControlPacket)]


class TestPrints:
    def test_the_first_packet_attaches(self, session: KdSession) -> None:
        kernel = Kernel(session)
        assert (session.state, session.attached) == (KdState.SILENT, False)
        assert kernel.say(DEBUG_IO, printed(b"hi\n")) == ([DebugPrint(100.0, None, b"hi\n")], [])
        assert (session.state, session.attached) == (KdState.RUNNING, True)

    def test_one_that_comes_again_is_acknowledged_again_and_not_told(self, kernel: Kernel) -> None:
        packet = data_packet(DEBUG_IO, kernel.id, printed(b"once\n"))
        acknowledged = [ControlPacket(ACKNOWLEDGE, kernel.id)]
        assert kernel.give(packet) == ([DebugPrint(100.0, None, b"once\n")], acknowledged)
        assert kernel.give(packet) == ([], acknowledged)
        assert kernel.session.statistics.duplicates == 1

    def test_the_very_first_one_that_comes_again_is_not_told(self, session: KdSession) -> None:
        packet = data_packet(DEBUG_IO, INITIAL | SYNC, printed(b"once\n"))
        assert len(session.receive_data(packet + packet, 0.0)) == 1

    def test_equal_ones_are_told_each(self, kernel: Kernel) -> None:
        for _ in range(3):
            events, _ = kernel.say(DEBUG_IO, printed(b"tick\n"))
            assert events == [DebugPrint(100.0, None, b"tick\n")]

    def test_a_damaged_one_is_asked_for_again(self, kernel: Kernel) -> None:
        packet = data_packet(DEBUG_IO, kernel.id, printed(b"hi\n"))
        assert kernel.give(packet[:-2] + b"?\xaa") == ([], [ControlPacket(RESEND, 0)])
        assert kernel.give(packet)[0] == [DebugPrint(100.0, None, b"hi\n")]
        assert kernel.session.statistics.bad_checksums == 1

    def test_one_that_stops_in_the_middle_is_asked_for_again(self, kernel: Kernel) -> None:
        kernel.give(data_packet(DEBUG_IO, kernel.id, printed(b"hi\n"))[:20])
        deadline = kernel.session.next_deadline()
        assert deadline is not None
        kernel.now = deadline
        assert kernel.give(b"") == ([], [ControlPacket(RESEND, 0)])
        assert kernel.say(DEBUG_IO, printed(b"hi\n"))[0] == [DebugPrint(deadline, None, b"hi\n")]

    def test_cut_ones_are_joined_by_processor(self, kernel: Kernel) -> None:
        first, second = b"a" * 512, b"b" * 512
        assert kernel.say(DEBUG_IO, printed(first, 0))[0] == []
        assert kernel.say(DEBUG_IO, printed(second, 1))[0] == []
        assert kernel.say(DEBUG_IO, printed(b"end\n", 1))[0] == [
            DebugPrint(100.0, None, second + b"end\n")
        ]
        assert kernel.say(DEBUG_IO, printed(first, 0))[0] == []
        assert kernel.say(DEBUG_IO, printed(b"!\n", 0))[0] == [
            DebugPrint(100.0, None, first + first + b"!\n")
        ]
        assert kernel.session.next_deadline() is None

    def test_one_of_the_greatest_size_with_a_newline_is_whole(self, kernel: Kernel) -> None:
        whole = b"a" * 511 + b"\n"
        assert kernel.say(DEBUG_IO, printed(whole))[0] == [DebugPrint(100.0, None, whole)]

    def test_the_rest_of_one_is_not_waited_for_long(self, kernel: Kernel) -> None:
        kernel.say(DEBUG_IO, printed(b"a" * 512))
        deadline = kernel.session.next_deadline()
        assert deadline == 100.25
        kernel.now = deadline
        assert kernel.give(b"")[0] == [DebugPrint(100.25, None, b"a" * 512)]

    def test_a_stop_ends_it_too(self, kernel: Kernel) -> None:
        kernel.say(DEBUG_IO, printed(b"a" * 512))
        events = kernel.stop(loaded("x.sys", DRIVER + 0x10000, 0x1000))
        assert [type(event) for event in events] == [DebugPrint, ImageLoaded]

    def test_the_parts_are_bounded(self, kernel: Kernel) -> None:
        events = []
        for number in range(400):
            events += kernel.say(DEBUG_IO, printed(b"a" * 512, number % 200))[0]
        assert sum(len(event.raw) for event in events if isinstance(event, DebugPrint)) > 400 * 256
        one = [kernel.say(DEBUG_IO, printed(b"a" * 512, 0))[0] for _ in range(300)]
        assert any(one)


class TestQuestions:
    @pytest.mark.parametrize(
        ("prompt", "answer"),
        [
            ("Break repeatedly, break Once, Ignore, terminate Process or terminate Thread (boipt)? ", "o"),
            ("Break, Ignore, Terminate Process or Terminate Thread (bipt)? ", "i"),
            ("(bic)", "b"),
            ("Anything else? ", ""),
        ],
    )  # fmt: skip
    def test_prompts_are_answered_so_that_the_kernel_goes_on(
        self, prompt: str, answer: str
    ) -> None:
        assert answer_prompt(prompt) == answer

    def test_an_answer_is_told_when_the_kernel_has_it(self) -> None:
        kernel = Kernel(KdSession(answer=lambda text: {"Name? ": "Nobody"}[text]))
        events, sent = kernel.say(DEBUG_IO, prompted(b"Name? ", most=4))
        reply = struct.pack("<IHHII", 0x3231, 15, 0, 0, 4) + b"Nobo"
        assert (events, sent) == ([], [DataPacket(DEBUG_IO, INITIAL, reply)])
        assert kernel.acknowledge(sent[0])[0] == [KernelMessage(100.0, None, "Name? Nobody")]

    def test_a_file_of_the_debuggers_is_refused(self, kernel: Kernel) -> None:
        request = struct.pack("<I", 0x3430) + bytes(60) + "demo.sys".encode("utf-16-le")
        _, sent = kernel.say(FILE_IO, request)
        refusal = struct.pack("<II", 0x3430, 0xC0000001) + bytes(56)
        assert sent == [DataPacket(FILE_IO, INITIAL, refusal)]
        assert kernel.acknowledge(sent[0]) == ([], [])
        assert kernel.session.next_deadline() is None

    def test_a_debug_register_is_refused_and_traces_are_acknowledged(self, kernel: Kernel) -> None:
        _, sent = kernel.say(CONTROL_REQUEST, struct.pack("<III", 0x4300, 0, 1))
        assert sent == [DataPacket(CONTROL_REQUEST, INITIAL, struct.pack("<III", 0x4300, 0, 0))]
        kernel.acknowledge(sent[0])
        assert kernel.say(TRACE_IO, bytes(40)) == ([], [])

    def test_an_answer_that_was_damaged_is_sent_again(self, kernel: Kernel) -> None:
        _, sent = kernel.say(DEBUG_IO, prompted(b"? "))
        assert kernel.give(control_packet(RESEND)) == ([], sent)

    def test_nothing_is_answered_before_the_ids_agree(self, session: KdSession) -> None:
        kernel = Kernel(session, sync=False)
        assert kinds(kernel.say(DEBUG_IO, prompted(b"? "))[1]) == [RESET]
        kernel.id = INITIAL
        kernel.give(control_packet(RESET))
        _, sent = kernel.say(DEBUG_IO, prompted(b"? "))
        assert [packet.id for packet in sent if isinstance(packet, DataPacket)] == [INITIAL]
        kernel.acknowledge(sent[0])
        assert session.attached


class TestImages:
    def test_they_are_told_and_the_kernel_goes_on_as_it_was(self, session: KdSession) -> None:
        kernel = Kernel(session)
        path = r"\??\C:\Demo\Demo.sys"
        assert kernel.stop(loaded(path, DRIVER, 0x8000)) == [
            ImageLoaded(100.0, "Demo", DRIVER, 0x8000, path)
        ]
        assert kernel.status == CONTINUE
        assert session.state is KdState.RUNNING
        assert kernel.stop(loaded(path, DRIVER, 0x8000, unload=True)) == [
            ImageUnloaded(100.0, "Demo", DRIVER, path)
        ]

    def test_one_that_is_unloaded_without_a_name_is_known_by_its_base(self, kernel: Kernel) -> None:
        assert kernel.stop(loaded("", DRIVER, 0, unload=True)) == [
            ImageUnloaded(100.0, "demo", DRIVER, r"\SystemRoot\System32\drivers\demo.sys")
        ]

    def test_a_shutdown_unloads_all(self, kernel: Kernel) -> None:
        assert kernel.stop(loaded("", (1 << 64) - 1, 0, unload=True)) == [
            KernelMessage(100.0, None, "the kernel shuts down")
        ]

    def test_a_command_string_is_told(self, kernel: Kernel) -> None:
        assert kernel.stop(bytes(state(0x3032, KERNEL)) + b"echo\0hi\0") == [
            KernelMessage(100.0, None, "a command for the debugger: echo hi")
        ]
        assert kernel.status == CONTINUE


class TestTraps:
    def test_an_int3_is_an_event_and_is_stepped_over(self, kernel: Kernel) -> None:
        kernel.at(DRIVER + 0x100)
        assert kernel.stop(raised(INT3, DRIVER + 0x100)) == [
            Breakpoint(100.0, "demo", INT3, DRIVER + 0x100)
        ]
        assert (kernel.counter(), kernel.status) == (DRIVER + 0x101, CONTINUE)
        assert kernel.session.state is KdState.RUNNING

    def test_an_assertion_is_two_bytes_long(self, kernel: Kernel) -> None:
        kernel.at(DRIVER + 0x100)
        events = kernel.stop(raised(ASSERTION, DRIVER + 0x100, text=b"\xcd\x2c\xc3"))
        assert events == [Breakpoint(100.0, "demo", ASSERTION, DRIVER + 0x100)]
        assert (kernel.counter(), kernel.status) == (DRIVER + 0x102, CONTINUE)

    def test_one_in_the_kernel_itself_is_nobodys(self, kernel: Kernel) -> None:
        kernel.at(KERNEL + 0x100)
        assert kernel.stop(raised(INT3, KERNEL + 0x100)) == [
            Breakpoint(100.0, None, INT3, KERNEL + 0x100)
        ]

    def test_one_of_a_program_s_is_its_own(self, kernel: Kernel) -> None:
        kernel.at(0x7FF6_1234_1000)
        assert kernel.stop(raised(INT3, 0x7FF6_1234_1000)) == []
        assert kernel.status == NOT_HANDLED

    def test_while_it_boots_nothing_is_told(self, session: KdSession) -> None:
        kernel = Kernel(session)
        kernel.at(KERNEL + 0x100)
        assert kernel.stop(raised(INT3, KERNEL + 0x100)) == []
        assert (kernel.counter(), kernel.status) == (KERNEL + 0x101, CONTINUE)

    def test_the_instruction_is_read_where_the_kernel_does_not_show_it(
        self, kernel: Kernel
    ) -> None:
        kernel.at(DRIVER + 0x100)
        kernel.memory[DRIVER + 0x100] = b"\xcc\xc3\x90\x90"
        kernel.stop(raised(INT3, DRIVER + 0x100, text=b""))
        assert kernel.counter() == DRIVER + 0x101

    def test_what_is_no_breakpoint_any_more_is_not_stepped_over(self, kernel: Kernel) -> None:
        kernel.at(DRIVER + 0x100)
        kernel.stop(raised(INT3, DRIVER + 0x100, text=b"\x90\xc3"))
        assert (kernel.counter(), kernel.status) == (DRIVER + 0x100, CONTINUE)

    def test_a_kernel_without_the_newer_request_gets_the_older(self, kernel: Kernel) -> None:
        kernel.refused = {SET_CONTEXT_EX}
        kernel.at(DRIVER + 0x100)
        kernel.stop(raised(INT3, DRIVER + 0x100))
        assert kernel.counter() == DRIVER + 0x101
        assert (kernel.asked(SET_CONTEXT_EX), kernel.asked(SET_CONTEXT)) == (1, 1)

    def test_a_kernel_that_cannot_be_made_to_step_has_it_as_its_own(self, kernel: Kernel) -> None:
        kernel.refused = {SET_CONTEXT_EX, SET_CONTEXT}
        kernel.at(DRIVER + 0x100)
        events = kernel.stop(raised(INT3, DRIVER + 0x100))
        assert [type(event) for event in events] == [Breakpoint, KernelMessage]
        assert kernel.status == NOT_HANDLED

    def test_a_fault_that_nobody_handles_is_passed_on(self, kernel: Kernel) -> None:
        payload = raised(ACCESS_VIOLATION, DRIVER + 0x200, 1, 0xDEAD, first=False)
        assert kernel.stop(payload) == [
            UnhandledException(100.0, "demo", ACCESS_VIOLATION, DRIVER + 0x200, ("write", 0xDEAD))
        ]
        assert kernel.status == NOT_HANDLED

    def test_a_first_chance_is_passed_on_quietly(self, kernel: Kernel) -> None:
        assert kernel.stop(raised(ACCESS_VIOLATION, DRIVER + 0x200, 1, 0xDEAD)) == []
        assert kernel.status == NOT_HANDLED

    def test_a_single_step_of_an_earlier_debuggers_is_ended(self, kernel: Kernel) -> None:
        assert kernel.stop(raised(SINGLE_STEP, DRIVER + 0x200)) == []
        assert kernel.status == CONTINUE

    def test_an_arm64_kernel_is_stepped_over_its_brk(self, session: KdSession) -> None:
        kernel = Kernel(session)
        kernel.contexts = [bytearray(0x390), bytearray(0x390)]
        struct.pack_into("<Q", kernel.contexts[1], 0x108, DRIVER + 0x100)
        payload = bytearray(raised(INT3, DRIVER + 0x100))
        struct.pack_into("<QQI16s", payload, 192, 0, DR7, 16, b"\0\0\x3e\xd4" * 4)
        _, sent = kernel.say(STATE_CHANGE, bytes(payload))
        while kernel.asked(GET_CONTEXT) < 2:  # the second sees whether it was set
            (request,) = sent
            assert isinstance(request, DataPacket)
            kernel.requests.append(request)
            kernel.acknowledge(request)
            api, processor = struct.unpack_from("<I2xH", request.payload)
            _, sent = kernel.say(MANIPULATE, kernel._reply(api, processor, request.payload))
        (last,) = sent
        assert isinstance(last, DataPacket)
        assert last.payload[16:] == struct.pack("<I", CONTINUE) + bytes(36)
        assert int.from_bytes(kernel.contexts[1][0x108:0x110], "little") == DRIVER + 0x104


class TestBugChecks:
    text = FATAL.format(1, 2, 3, 4).encode()
    told = BugCheck(100.0, None, 0xD1, (1, 2, 3, 4), None, None, (DRIVER + 0x10, KERNEL + 0x20))

    def crash(self, kernel: Kernel) -> list[Event]:
        kernel.at(KERNEL + 0x100, argument=3, stack=(5, DRIVER + 0x10, 0, KERNEL + 0x20))
        (event,), _ = kernel.say(DEBUG_IO, printed(self.text))
        assert isinstance(event, DebugPrint)
        return kernel.stop(raised(INT3, KERNEL + 0x100))

    def test_one_is_told_at_its_stop_with_the_stack_and_held(self, kernel: Kernel) -> None:
        assert self.crash(kernel) == [self.told]
        assert (kernel.status, kernel.session.state) == (None, KdState.HELD)
        assert kernel.session.next_deadline() is None

    def test_the_kernel_names_the_driver_that_it_blames(self, kernel: Kernel) -> None:
        kernel.say(DEBUG_IO, printed(self.text))
        kernel.say(DEBUG_IO, printed(b"Driver at fault: demo.sys.\n"))
        kernel.at(KERNEL + 0x100, argument=3)
        (event,) = kernel.stop(raised(INT3, KERNEL + 0x100))
        assert isinstance(event, BugCheck)
        assert event.blamed == "demo.sys"

    def test_it_goes_on_when_it_is_let(self, kernel: Kernel) -> None:
        self.crash(kernel)
        kernel.session.go_on(kernel.now)
        _, sent = kernel.give(b"")
        assert kernel.serve(sent) == []
        assert (kernel.counter(), kernel.status) == (KERNEL + 0x101, CONTINUE)
        assert kernel.session.state is KdState.RUNNING

    def test_where_it_is_not_held_it_goes_on_and_is_held_at_its_second_stop(self) -> None:
        kernel = Kernel(KdSession(hold_bug_checks=False))
        kernel.stop(loaded("ntoskrnl.exe", KERNEL, 0x1000000))
        kernel.stop(loaded("demo.sys", DRIVER, 0x8000))
        assert self.crash(kernel) == [self.told]
        assert (kernel.status, kernel.session.state) == (CONTINUE, KdState.RUNNING)
        kernel.at(KERNEL + 0x100, argument=4)
        assert kernel.stop(raised(INT3, KERNEL + 0x100)) == []
        assert (kernel.status, kernel.session.state) == (None, KdState.HELD)

    def test_one_whose_stop_does_not_come_is_told_behind_two_seconds(self, kernel: Kernel) -> None:
        kernel.say(DEBUG_IO, printed(self.text))
        kernel.now = kernel.session.next_deadline() or 0.0
        assert kernel.now == 102.0
        assert kernel.give(b"")[0] == [BugCheck(102.0, None, 0xD1, (1, 2, 3, 4))]

    def test_one_whose_stack_cannot_be_read_is_told_behind_two_seconds(
        self, kernel: Kernel
    ) -> None:
        kernel.say(DEBUG_IO, printed(self.text))
        kernel.say(STATE_CHANGE, raised(INT3, KERNEL + 0x100))
        kernel.now = 102.0
        assert kernel.give(b"")[0] == [BugCheck(102.0, None, 0xD1, (1, 2, 3, 4))]

    def test_one_that_is_followed_by_a_boot_is_told_before_it(self, kernel: Kernel) -> None:
        kernel.say(DEBUG_IO, printed(self.text))
        kernel.id = INITIAL | SYNC
        events, _ = kernel.say(DEBUG_IO, printed(b"boot\n"))
        assert [type(event) for event in events] == [BugCheck, DebugPrint]

    def test_one_that_a_late_debugger_finds_is_read_from_the_kernels_memory(self) -> None:
        session = KdSession()
        session.attach(100.0)
        kernel = Kernel(session, sync=False)
        kernel.at(KERNEL + 0x100, argument=3)
        block, data = KERNEL + 0x1000, KERNEL + 0x2000
        kernel.memory = {
            KERNEL + 64: struct.pack("<Q", block),
            block + 0x88: struct.pack("<Q", data),
            data: struct.pack("<5Q", 0xD1, 1, 2, 3, 4),
        }
        kernel.say(STATE_CHANGE, raised(INT3, KERNEL + 0x100))
        kernel.id = INITIAL
        kernel.give(control_packet(RESET))
        assert kernel.stop(raised(INT3, KERNEL + 0x100)) == [
            BugCheck(100.0, None, 0xD1, (1, 2, 3, 4))
        ]
        assert (session.state, session.attached) == (KdState.HELD, True)

    def test_what_a_driver_prints_of_one_is_no_second_one(self, kernel: Kernel) -> None:
        self.crash(kernel)
        assert [type(event) for event in kernel.say(DEBUG_IO, printed(self.text))[0]] == [
            DebugPrint
        ]
        kernel.now += 10
        assert kernel.give(b"")[0] == []


class TestAttaching:
    def attach(self, session: KdSession) -> Kernel:
        kernel = Kernel(session, sync=False)
        session.attach(kernel.now)
        assert session.data_to_send() == b"b"
        return kernel

    def answer_reset(self, kernel: Kernel, sent: list[Packet]) -> None:
        assert kinds(sent) == [RESET]
        kernel.id = INITIAL
        assert kernel.give(control_packet(RESET)) == ([], [])

    @pytest.mark.parametrize("number", [INITIAL, INITIAL | 1])
    def test_a_kernel_that_runs_is_stopped_and_goes_on(
        self, session: KdSession, number: int
    ) -> None:
        session.end_of_boot()
        kernel = self.attach(session)
        kernel.id = number
        kernel.at(KERNEL + 0x100, argument=1)
        events, sent = kernel.say(STATE_CHANGE, raised(INT3, KERNEL + 0x100))
        self.answer_reset(kernel, sent)
        assert not session.attached
        events += kernel.stop(raised(INT3, KERNEL + 0x100))
        assert (events, session.attached, session.state) == ([], True, KdState.RUNNING)
        assert kernel.counter() == KERNEL + 0x101
        assert kernel.asked(GET_VERSION) == 1
        assert session.next_deadline() is None

    def test_a_kernel_that_is_stopped_says_again_why(self, session: KdSession) -> None:
        kernel = self.attach(session)
        kernel.now = session.next_deadline() or 0.0
        assert kernel.now == 102.0
        self.answer_reset(kernel, kernel.give(b"")[1])
        events = kernel.stop(loaded("demo.sys", DRIVER, 0x8000))
        assert events == [ImageLoaded(102.0, "demo", DRIVER, 0x8000, "demo.sys")]
        assert session.attached

    def test_a_print_that_is_repeated_because_of_the_reset_is_told_once(
        self, session: KdSession
    ) -> None:
        kernel = self.attach(session)
        kernel.now = 102.0
        assert kinds(kernel.give(b"")[1]) == [RESET]
        kernel.id = INITIAL | 1
        events, _ = kernel.say(DEBUG_IO, printed(b"once\n"))
        kernel.id = INITIAL
        kernel.give(control_packet(RESET))
        events += kernel.say(DEBUG_IO, printed(b"once\n"))[0]
        events += kernel.say(DEBUG_IO, printed(b"once\n"))[0]
        assert [event.raw for event in events if isinstance(event, DebugPrint)] == [b"once\n"] * 2
        assert session.attached

    def test_prints_are_taken_with_any_id_behind_a_revert(self, kernel: Kernel) -> None:
        kernel.say(DEBUG_IO, printed(b"before\n"))
        kernel.session.attach(kernel.now)
        kernel.session.data_to_send()
        kernel.id ^= 1
        assert kernel.say(DEBUG_IO, printed(b"behind\n"))[0] == [
            DebugPrint(100.0, None, b"behind\n")
        ]
        assert not kernel.session.attached

    def test_what_was_half_received_is_dropped(self, kernel: Kernel) -> None:
        kernel.give(data_packet(DEBUG_IO, kernel.id, printed(b"x" * 100))[:60])
        kernel.session.attach(kernel.now)
        kernel.session.data_to_send()
        assert kernel.say(DEBUG_IO, printed(b"hi\n"))[0] == [DebugPrint(100.0, None, b"hi\n")]

    def test_the_images_are_kept_over_it_and_forgotten_by_a_boot(self, kernel: Kernel) -> None:
        def driver() -> str | None:
            kernel.at(DRIVER + 0x100)
            (event,) = kernel.stop(raised(INT3, DRIVER + 0x100))
            assert isinstance(event, Breakpoint)
            return event.driver

        kernel.session.attach(kernel.now)
        kernel.session.data_to_send()
        kernel.id = INITIAL
        kernel.give(control_packet(RESET))
        kernel.session.data_to_send()
        assert driver() == "demo"
        kernel.id = INITIAL | SYNC
        assert driver() is None

    def test_an_unknown_stream_of_ids_is_not_trusted_with_requests(self, kernel: Kernel) -> None:
        kernel.id ^= 1  # put back, and nobody said so
        _, sent = kernel.say(STATE_CHANGE, loaded("new.sys", DRIVER + 0x10000, 0x1000))
        self.answer_reset(kernel, sent)
        assert len(kernel.stop(loaded("new.sys", DRIVER + 0x10000, 0x1000))) == 1
        assert kernel.session.attached

    def test_a_reset_of_the_targets_own_is_answered_once(self, kernel: Kernel) -> None:
        assert kinds(kernel.give(control_packet(RESET))[1]) == [RESET]
        for _ in range(5):
            assert kinds(kernel.give(control_packet(RESET))[1]) == []

    def test_a_kernel_that_finds_an_old_reset_in_its_port_as_it_boots_is_let_go_on_once(
        self, session: KdSession
    ) -> None:
        kernel = self.attach(session)
        kernel.now = 102.0
        assert kinds(kernel.give(b"")[1]) == [RESET]
        payload = loaded("ntoskrnl.exe", KERNEL, 0x1000000)
        events, sent = kernel.give(
            data_packet(STATE_CHANGE, INITIAL | SYNC, payload)
            + control_packet(RESET)
            + data_packet(STATE_CHANGE, INITIAL, payload)
        )
        assert [type(event) for event in events] == [ImageLoaded]
        assert kinds(sent) == [ACKNOWLEDGE, ACKNOWLEDGE, MANIPULATE]
        kernel.id = INITIAL | 1
        assert kernel.serve(sent[2:]) == []
        assert (session.attached, session.state) == (True, KdState.RUNNING)

    def test_a_request_behind_a_reset_outlives_the_answer_to_that(self, session: KdSession) -> None:
        kernel = self.attach(session)
        kernel.now = 102.0
        assert kinds(kernel.give(b"")[1]) == [RESET]
        payload = loaded("demo.sys", DRIVER, 0x8000)
        kernel.id = INITIAL | SYNC
        events, (go_on,) = kernel.say(STATE_CHANGE, payload)
        assert len(events) == 1
        kernel.id = INITIAL
        assert kernel.give(control_packet(RESET)) == ([], [])
        assert kernel.say(STATE_CHANGE, payload) == ([], [])
        assert kernel.acknowledge(go_on) == ([], [])
        assert (session.attached, session.state) == (True, KdState.RUNNING)

    def test_a_reset_that_brings_nothing_is_followed_by_more(self, session: KdSession) -> None:
        kernel = self.attach(session)
        kernel.at(KERNEL + 0x100, argument=1)
        _, sent = kernel.say(STATE_CHANGE, raised(INT3, KERNEL + 0x100))
        self.answer_reset(kernel, sent)
        for now, stimulus in ((102.0, b"b"), (104.0, control_packet(RESET))):
            assert session.next_deadline() == now
            session.receive_data(b"", now)
            assert session.data_to_send() == stimulus

    def test_a_kernel_that_does_not_answer_is_lost_and_can_come_back(
        self, session: KdSession
    ) -> None:
        kernel = self.attach(session)
        events: list[Event] = []
        sent: list[bytes] = []
        while session.state is not KdState.LOST:
            kernel.now = session.next_deadline() or 0.0
            events += session.receive_data(b"", kernel.now)
            sent.append(session.data_to_send())
        assert events == [
            KernelMessage(118.0, None, "the kernel has not answered its debugger for 20 s")
        ]
        assert {*sent} == {b"b", control_packet(RESET)}
        assert not session.was_heard
        kernel.id = INITIAL | SYNC
        kernel.say(DEBUG_IO, printed(b"boot\n"))
        assert (session.state, session.attached) == (KdState.RUNNING, True)
        assert session.was_heard


class TestBreakingIn:
    def break_in(self, kernel: Kernel) -> list[Event]:
        kernel.session.break_in(kernel.now)
        assert kernel.session.data_to_send() == b"b"
        kernel.at(KERNEL + 0x500, processor=0)
        kernel.at(KERNEL + 0x100, argument=1, stack=(DRIVER + 0x10,))
        return kernel.stop(raised(INT3, KERNEL + 0x100))

    def test_it_tells_where_the_processors_are_and_the_kernel_goes_on(self, kernel: Kernel) -> None:
        assert self.break_in(kernel) == [
            ProcessorState(100.0, None, 0, KERNEL + 0x500, (DRIVER + 0x10,)),
            ProcessorState(100.0, None, 1, KERNEL + 0x100, (DRIVER + 0x10,)),
        ]
        assert (kernel.counter(), kernel.status) == (KERNEL + 0x101, CONTINUE)
        assert kernel.session.next_deadline() is None

    def test_a_break_in_that_comes_late_is_stepped_over_quietly(self, kernel: Kernel) -> None:
        self.break_in(kernel)
        kernel.at(KERNEL + 0x100, argument=1)
        assert kernel.stop(raised(INT3, KERNEL + 0x100)) == []
        assert kernel.counter() == KERNEL + 0x101

    def test_a_drivers_own_int3_with_the_same_argument_is_none(self, kernel: Kernel) -> None:
        kernel.session.break_in(kernel.now)
        kernel.session.data_to_send()
        kernel.at(DRIVER + 0x100, argument=1)
        assert kernel.stop(raised(INT3, DRIVER + 0x100)) == [
            Breakpoint(100.0, "demo", INT3, DRIVER + 0x100)
        ]

    def test_it_is_tried_again_until_the_kernel_stops(self, kernel: Kernel) -> None:
        kernel.session.break_in(kernel.now)
        kernel.session.data_to_send()
        kernel.now = kernel.session.next_deadline() or 0.0
        assert kernel.now == 102.0
        kernel.session.receive_data(b"", kernel.now)
        assert kernel.session.data_to_send() == b"b"

    def test_a_stop_that_comes_first_does_not_swallow_it(self, kernel: Kernel) -> None:
        kernel.session.break_in(kernel.now)
        kernel.session.data_to_send()
        payload = loaded("new.sys", DRIVER + 0x10000, 0x1000)
        _, (go_on,) = kernel.say(STATE_CHANGE, payload)
        assert isinstance(go_on, DataPacket)
        kernel.session.receive_data(control_packet(ACKNOWLEDGE, go_on.id), kernel.now)
        assert kernel.session.data_to_send() == b"b"

    def test_one_that_is_held_is_asked_where_it_is(self, kernel: Kernel) -> None:
        TestBugChecks().crash(kernel)
        kernel.session.break_in(kernel.now)
        _, sent = kernel.give(b"")
        events = kernel.serve(sent)
        assert [type(event) for event in events] == [ProcessorState] * 2
        assert kernel.session.state is KdState.HELD


class TestFaults:
    def test_what_is_not_acknowledged_is_not_sent_again_before_the_kernel_says_that_it_waits(
        self, kernel: Kernel
    ) -> None:
        payload = loaded("new.sys", DRIVER + 0x10000, 0x1000)
        events, _ = kernel.say(STATE_CHANGE, payload)
        assert len(events) == 1
        kernel.now = kernel.session.next_deadline() or 0.0
        assert kernel.give(b"") == ([], [ControlPacket(RESEND, 0)])
        events, sent = kernel.say(STATE_CHANGE, payload)
        assert (events, kinds(sent)) == ([], [RESET])
        kernel.id = INITIAL
        kernel.give(control_packet(RESET))
        assert kernel.stop(payload) == []
        assert kernel.status == CONTINUE

    def test_a_kernel_that_dropped_what_it_acknowledged_is_found_out(self, kernel: Kernel) -> None:
        payload = loaded("new.sys", DRIVER + 0x10000, 0x1000)
        _, (go_on,) = kernel.say(STATE_CHANGE, payload)
        assert kernel.give(control_packet(RESEND)) == ([], [go_on])
        assert kernel.acknowledge(go_on) == ([], [])
        assert kernel.session.state is KdState.RUNNING
        kernel.now = kernel.session.next_deadline() or 0.0
        assert kernel.give(b"") == ([], [ControlPacket(RESEND, 0)])
        events, sent = kernel.say(STATE_CHANGE, payload)
        assert (events, kinds(sent)) == ([], [RESET])
        kernel.id = INITIAL
        kernel.give(control_packet(RESET))
        assert kernel.stop(payload) == []
        assert kernel.status == CONTINUE

    def test_a_kernel_that_runs_is_not_asked_for_long_whether_it_waits(
        self, kernel: Kernel
    ) -> None:
        _, (go_on,) = kernel.say(STATE_CHANGE, loaded("new.sys", DRIVER + 0x10000, 0x1000))
        kernel.give(control_packet(RESEND))
        kernel.acknowledge(go_on)
        asked = 0
        while (deadline := kernel.session.next_deadline()) is not None:
            kernel.now = deadline
            asked += len(kernel.give(b"")[1])
        assert asked == 3
        assert kernel.session.attached

    def test_what_the_kernel_does_next_stands_for_the_acknowledgement(self, kernel: Kernel) -> None:
        kernel.say(STATE_CHANGE, loaded("new.sys", DRIVER + 0x10000, 0x1000))
        events, sent = kernel.say(DEBUG_IO, printed(b"on\n"))
        assert (events, sent) == ([DebugPrint(100.0, None, b"on\n")], [])
        assert kernel.session.state is KdState.RUNNING
        kernel.at(DRIVER + 0x100)
        assert len(kernel.stop(raised(INT3, DRIVER + 0x100))) == 1

    def test_a_request_that_is_never_answered_does_not_hold_the_kernel(
        self, kernel: Kernel
    ) -> None:
        kernel.at(DRIVER + 0x100)
        payload = raised(INT3, DRIVER + 0x100)
        events, sent = kernel.say(STATE_CHANGE, payload)
        apis = []
        while CONTINUE2 not in apis:
            for packet in sent:
                if isinstance(packet, DataPacket):
                    apis.append(struct.unpack_from("<I", packet.payload)[0])
                    events += kernel.acknowledge(packet)[0]
                elif packet == ControlPacket(RESET, 0):
                    kernel.id = INITIAL
                    kernel.give(control_packet(RESET))
                    more, sent = kernel.say(STATE_CHANGE, payload)
                    events += more
                    break
            else:
                kernel.now = kernel.session.next_deadline() or 0.0
                more, sent = kernel.give(b"")
                events += more
        assert kernel.now < 120
        assert [type(event) for event in events] == [Breakpoint, KernelMessage]

    def test_a_flood_of_resends_is_not_answered_by_a_flood(self, kernel: Kernel) -> None:
        kernel.say(STATE_CHANGE, loaded("new.sys", DRIVER + 0x10000, 0x1000))
        kernel.session.receive_data(control_packet(RESEND) * 10_000, kernel.now)
        assert len(kernel.session.data_to_send()) < 200

    def test_damage_in_many_packets_is_told_once(self, kernel: Kernel) -> None:
        damaged = data_packet(DEBUG_IO, kernel.id, printed(b"x" * 50))[:-1] + b"?"
        assert kernel.give(damaged * 100)[1] == [ControlPacket(RESEND, 0)]

    @pytest.mark.parametrize("state", [0x3030, 0x3031, 0x3032, 0x7777])
    def test_an_empty_stop_is_gone_on_from(self, kernel: Kernel, state: int) -> None:
        payload = bytearray(240)
        struct.pack_into("<IHHI", payload, 0, state, 0, 1, 0)
        struct.pack_into("<Q", payload, 200, DR7)
        kernel.stop(bytes(payload))
        assert kernel.status is not None
