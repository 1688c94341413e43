"""Wine's trace: what its lines become, however they are cut, and whatever a driver prints."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.errors import KernelLogError
from pytest_kdriver.kernel.events import (
    BugCheck,
    DebugPrint,
    DriverInit,
    DriverInitCalled,
    DriverLoadFailed,
    DriverUnload,
    DriverUnloadCalled,
    Event,
    Fence,
    KernelMessage,
    MissingExport,
    PoolAllocated,
    PoolFreed,
    PoolStack,
    UnhandledException,
)
from pytest_kdriver.kernel.sources.wine import FRAME_HEADER, MAX_MESSAGE, WineTrace, frame
from pytest_kdriver.ntstatus import NTSTATUS

KEY = rb"\\Registry\\Machine\\System\\CurrentControlSet\\Services\\"
HEADER = b"1933.239:010c:0118:"
SENDER = 4711


def called(service: bytes = b"hello", header: bytes = HEADER) -> bytes:
    return header + b'Call driver init 0000000281B51016 (obj=0000000000376630,str=L"%s%s")\n' % (
        KEY,
        service,
    )


def returned(service: bytes = b"hello", status: bytes = b"00000000") -> bytes:
    return (
        HEADER
        + b'Ret  driver init 0000000281B51016 (obj=0000000000376630,str=L"%s%s") retval=%s\n'
        % (KEY, service, status)
    )


def printed(text: bytes, header: bytes = HEADER) -> bytes:
    return header + b"warn:debugstr:vDbgPrintExWithPrefix 00000000:00000001: " + text


def events_of(
    *messages: bytes, sender: int = SENDER, source: WineTrace | None = None
) -> list[Event]:
    stream = b"".join(frame(message, sender) for message in messages)
    return (source or WineTrace()).receive_data(stream, 1.5)


def test_a_driver_is_loaded_prints_and_is_unloaded() -> None:
    assert events_of(
        called(),
        printed(b"Hello, world!\n"),
        returned(),
        HEADER + b"Call driver unload 0000000180001070 (obj=0000000000376430)\n",
        HEADER + b"Ret  driver unload 0000000180001070 (obj=0000000000376430)\n",
    ) == [
        DriverInitCalled(1.5, "hello", 0x10C, 0x281B51016),
        DebugPrint(1.5, "hello", b"Hello, world!\n", 0, 1),
        DriverInit(1.5, "hello", 0x10C, NTSTATUS.STATUS_SUCCESS),
        DriverUnloadCalled(1.5, "hello", 0x10C),
        DriverUnload(1.5, "hello", 0x10C),
    ]


@pytest.mark.parametrize("seconds", [b"  9.001", b" 99.999", b"100.000", b"4294967.295"])
def test_the_seconds_may_be_of_a_machine_that_has_just_started(seconds: bytes) -> None:
    header = seconds + b":010c:0118:"
    assert events_of(called(header=header), printed(b"Hello, world!\n", header)) == [
        DriverInitCalled(1.5, "hello", 0x10C, 0x281B51016),
        DebugPrint(1.5, "hello", b"Hello, world!\n", 0, 1),
    ]


def test_driver_entry_s_status_is_exact() -> None:
    event = events_of(called(), returned(status=b"c0de1234"))[-1]
    assert event == DriverInit(1.5, "hello", 0x10C, NTSTATUS(0xC0DE1234))


def test_a_failed_load_names_the_driver_and_the_status() -> None:
    message = (
        HEADER + b'err:ntoskrnl:ZwLoadDriver failed to create driver L"%sfail": c0000182\n' % KEY
    )
    assert events_of(message) == [DriverLoadFailed(1.5, "fail", NTSTATUS(0xC0000182))]


def test_pool_calls_have_size_type_tag_and_caller() -> None:
    events = events_of(
        called(),
        HEADER
        + b"Call ntoskrnl.exe.ExAllocatePoolWithTag(00000200,0000000f,74737572) ret=18000102a\n",
        HEADER + b"Ret  ntoskrnl.exe.ExAllocatePoolWithTag() retval=014a0370 ret=18000102a\n",
        HEADER + b"Call ntoskrnl.exe.ExFreePoolWithTag(014a0370,74737572) ret=18000103b\n",
        HEADER + b"Ret  ntoskrnl.exe.ExFreePoolWithTag() retval=00000001 ret=18000103b\n",
        HEADER + b"Call ntoskrnl.exe.ExFreePool(014a0370) ret=18000104c\n",
        HEADER + b"Ret  ntoskrnl.exe.ExFreePool() retval=00000000 ret=18000104c\n",
    )
    assert events[1:] == [
        PoolAllocated(1.5, "hello", 0x14A0370, 15, b"rust", "NonPagedPoolNx", 0x18000102A),
        PoolFreed(1.5, "hello", 0x14A0370, b"rust", 0x18000103B, True),
        PoolFreed(1.5, "hello", 0x14A0370, None, 0x18000104C, False),
    ]


def test_pool_2_has_flags_for_a_type() -> None:
    events = events_of(
        called(),
        HEADER + b"Call ntoskrnl.exe.ExAllocatePool2(00000040,00000010,74737572) ret=18000102a\n",
        HEADER + b"Ret  ntoskrnl.exe.ExAllocatePool2() retval=014a0370 ret=18000102a\n",
    )
    assert events[1:] == [
        PoolAllocated(1.5, "hello", 0x14A0370, 16, b"rust", "NonPagedPoolNx", 0x18000102A)
    ]


def stack(text: bytes, levels: bytes = b"0000004d:40000000") -> bytes:
    return HEADER + b"warn:debugstr:vDbgPrintExWithPrefix " + levels + b": kdriver:stack " + text


def test_a_stack_record_is_no_print() -> None:
    events = events_of(called(), stack(b"14a0370 180001f2b 180001070 fffff80012345678\n"))
    assert events[1:] == [
        PoolStack(1.5, "hello", 0x14A0370, (0x180001F2B, 0x180001070, 0xFFFFF80012345678))
    ]


def test_a_stack_ends_where_it_has_an_address_of_0() -> None:
    (event,) = events_of(called(), stack(b"14a0370 180001f2b 7b627e49 0 1eaf67330 372610 0\n"))[1:]
    assert event == PoolStack(1.5, "hello", 0x14A0370, (0x180001F2B, 0x7B627E49))


def test_a_stack_record_that_wine_cuts_in_two_is_whole() -> None:
    record = stack(b"14a0370 %s\n" % b" ".join([b"fffff80012345678"] * 27))
    border = record.index(b"0000004d:")
    (event,) = events_of(called(), record[:border], record[border:])[1:]
    assert isinstance(event, PoolStack)
    assert event.frames == (0xFFFFF80012345678,) * 27


def test_equal_stacks_take_the_memory_of_one() -> None:
    first, second = events_of(
        called(), stack(b"14a0370 1234567890\n"), stack(b"14a03a0 1234567890\n")
    )[1:]
    assert isinstance(first, PoolStack)
    assert isinstance(second, PoolStack)
    assert (first.address, second.address) == (0x14A0370, 0x14A03A0)
    assert first.frames is second.frames


def test_a_stack_of_no_known_driver_is_nothing() -> None:
    assert events_of(stack(b"14a0370 180001f2b\n")) == []


@pytest.mark.parametrize(
    "message",
    [
        stack(b"14a0370 180001f2b\n", b"00000000:00000001"),
        stack(b"14a0370 180001f2b\n", b"0000004d:00000008"),
        stack(b"14a0370 180001f2b\n", b"0000004e:40000000"),
        stack(b"\n"),
        stack(b"14a0370 180001F2B\n"),
        stack(b"14a0370 180001f2b \n"),
        stack(b"14a0370  180001f2b\n"),
        stack(b"14a0370 180001f2b\nmore\n"),
        stack(b"14a0370 12345678123456781\n"),
        stack(b"14a0370" + b" 1" * 29 + b"\n"),
        stack(b"nonsense\n"),
    ],
)
def test_what_only_looks_like_a_stack_record_is_a_print(message: bytes) -> None:
    event = events_of(called(), message)[-1]
    assert isinstance(event, DebugPrint)
    assert event.raw == message[message.index(b"kdriver:") :]


def test_an_allocation_that_failed_is_none() -> None:
    events = events_of(
        called(),
        HEADER
        + b"Call ntoskrnl.exe.ExAllocatePoolWithTag(00000200,0000000f,74737572) ret=18000102a\n",
        HEADER + b"Ret  ntoskrnl.exe.ExAllocatePoolWithTag() retval=00000000 ret=18000102a\n",
    )
    assert len(events) == 1


def test_pool_calls_of_interleaved_threads_do_not_mix() -> None:
    other = b"1933.239:010c:0120:"
    call = b"Call ntoskrnl.exe.ExAllocatePoolWithTag(00000000,%08x,74737572) ret=18000102a\n"
    answer = b"Ret  ntoskrnl.exe.ExAllocatePoolWithTag() retval=%08x ret=18000102a\n"
    events = events_of(
        called(), HEADER + call % 1, other + call % 2, HEADER + answer % 0x10, other + answer % 0x20
    )
    found = [(e.size, e.address) for e in events if isinstance(e, PoolAllocated)]
    assert found == [(1, 0x10), (2, 0x20)]


def test_what_a_driver_prints_is_never_taken_for_the_trace() -> None:
    fake = returned(status=b"c0000001") + b"wine: Unhandled page fault on write access to 00\n"
    text = b"x\n" + fake
    assert events_of(called(), printed(text))[1:] == [DebugPrint(1.5, "hello", text, 0, 1)]


def test_a_long_print_comes_as_header_and_text_and_is_one() -> None:
    whole = printed(b"y" * 950 + b"\n")
    border = whole.index(b"00000000:")
    assert events_of(called(), whole[:border], whole[border:])[1:] == [
        DebugPrint(1.5, "hello", b"y" * 950 + b"\n", 0, 1)
    ]


def test_another_thread_may_speak_between_header_and_text() -> None:
    whole = printed(b"z" * 950 + b"\n")
    border = whole.index(b"00000000:")
    events = events_of(
        called(), whole[:border], printed(b"short\n", b"1933.240:010c:0120:"), whole[border:]
    )
    assert [e.raw for e in events if isinstance(e, DebugPrint)] == [b"short\n", b"z" * 950 + b"\n"]


def test_long_prints_of_two_processes_do_not_mix() -> None:
    first, second = printed(b"1" * 950 + b"\n"), printed(b"2" * 950 + b"\n", b"1933.240:0200:0204:")
    border = first.index(b"00000000:")
    source = WineTrace()
    events = events_of(first[:border], sender=1, source=source)
    events += events_of(second[:border], sender=2, source=source)
    events += events_of(first[border:], sender=1, source=source)
    events += events_of(second[border:], sender=2, source=source)
    assert [e.raw[:1] for e in events if isinstance(e, DebugPrint)] == [b"1", b"2"]


def test_two_long_prints_of_one_process_are_both_whole() -> None:
    first, second = printed(b"1" * 950 + b"\n"), printed(b"2" * 950 + b"\n", b"1933.240:010c:0204:")
    border = first.index(b"00000000:")
    events = events_of(called(), first[:border], second[:border], first[border:], second[border:])
    assert [e.raw[:1] for e in events if isinstance(e, DebugPrint)] == [b"1", b"2"]


def test_bytes_that_are_no_utf_8_are_kept() -> None:
    event = events_of(called(), printed(b"\xff\xfe ok\n"))[-1]
    assert isinstance(event, DebugPrint)
    assert (event.raw, event.text) == (b"\xff\xfe ok\n", "\\xff\\xfe ok\n")


def test_a_bug_check_has_code_and_parameters() -> None:
    events = events_of(called(), HEADER + b"err:ntoskrnl:KeBugCheckEx e2e2 1 2 3 4\n")
    assert events[-1] == BugCheck(1.5, "hello", 0xE2E2, (1, 2, 3, 4))


@pytest.mark.parametrize(
    "call",
    [
        b"KeBugCheckEx(0000e2e2,00000001,00000002,00000003,00000004) ret=180001029",
        b"KeBugCheck(0000e2e2) ret=180001029",
    ],
)
def test_a_bug_check_has_its_caller(call: bytes) -> None:
    other = b"1933.239:010c:0120:"
    events = events_of(
        called(),
        HEADER + b"Call ntoskrnl.exe.%s\n" % call,
        other + b"err:ntoskrnl:KeBugCheckEx e2e2 0 0 0 0\n",
        HEADER + b"err:ntoskrnl:KeBugCheckEx e2e2 1 2 3 4\n",
    )
    assert events[1:] == [
        BugCheck(1.5, "hello", 0xE2E2, (0, 0, 0, 0), None),
        BugCheck(1.5, "hello", 0xE2E2, (1, 2, 3, 4), 0x180001029),
    ]


def test_a_page_fault_has_address_and_access_and_is_the_sender_s() -> None:
    events = events_of(
        called(),
        b"wine: Unhandled page fault on write access to 0000000000000010 at address 00000000021A1010"
        b" (thread 0118), starting debugger...\n",
    )
    assert events[-1] == UnhandledException(
        1.5, "hello", NTSTATUS.STATUS_ACCESS_VIOLATION, 0x21A1010, ("write", 0x10)
    )


def test_a_page_fault_without_a_sender_is_the_thread_s() -> None:
    events = events_of(
        called(),
        b"wine: Unhandled page fault on read access to 0000000000000010 at address 00000000021A1010"
        b" (thread 0118), starting debugger...\n",
        sender=0,
    )
    assert events[-1].driver == "hello"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (b"Unhandled exception 0x80000005 in thread 118", 0x80000005),
        (b"Unhandled division by zero", NTSTATUS.STATUS_INTEGER_DIVIDE_BY_ZERO),
        (b"Unhandled illegal instruction", NTSTATUS.STATUS_ILLEGAL_INSTRUCTION),
        (b"Unhandled stack overflow", NTSTATUS.STATUS_STACK_OVERFLOW),
    ],
)
def test_other_exceptions_have_their_code(words: bytes, code: int) -> None:
    told = b"wine: %s at address 0000000170025DE8 (thread 0118), starting debugger...\n" % words
    assert events_of(called(), told)[-1] == UnhandledException(1.5, "hello", code, 0x170025DE8)


def test_a_missing_export_is_named() -> None:
    told = (
        b"wine: Call from 000000017002D3F8 to unimplemented function "
        b"ntoskrnl.exe.KdriverNoSuchExport, aborting\n"
    )
    assert events_of(called(), told)[-1] == MissingExport(
        1.5, "hello", "ntoskrnl.exe", "KdriverNoSuchExport", 0x17002D3F8
    )


def test_a_fence_is_the_agent_s_word_and_no_driver_can_say_it() -> None:
    fence = b'warn:debugstr:OutputDebugStringA "COOKIE"\n'
    events = events_of(HEADER + fence, called(), printed(fence), printed(b"\n" + HEADER + fence))
    assert [type(event) for event in events] == [Fence, DriverInitCalled, DebugPrint, DebugPrint]


def test_other_errors_and_messages_of_wine_are_kept_as_text() -> None:
    events = events_of(called(), HEADER + b"err:ntoskrnl:foo bar\n", b"wine: something else\n")
    assert events[1:] == [
        KernelMessage(1.5, "hello", "err:ntoskrnl:foo bar"),
        KernelMessage(1.5, "hello", "wine: something else"),
    ]


def test_noise_is_nothing() -> None:
    assert not events_of(
        HEADER + b"Starting thread proc 0000000140002380 (arg=0000000067FF0000)\n",
        HEADER + b'Call PE DLL (proc=000000031CAB2410,module=0 L"a.dll",reason=PROCESS_ATTACH)\n',
        HEADER + b'trace:relay:load_list L"RelayInclude" = L"x"\n',
        b"",
        b"\n",
        b"a program's own words\n",
    )


def test_a_process_of_several_drivers_tells_nobody_s_prints_after_their_init() -> None:
    events = events_of(
        called(b"one"), returned(b"one"), called(b"two"), printed(b"in init\n"), returned(b"two"),
        printed(b"later\n"),
    )  # fmt: skip
    assert [e.driver for e in events if isinstance(e, DebugPrint)] == ["two", None]


def test_a_process_number_that_comes_back_is_another_process() -> None:
    source = WineTrace()
    events_of(called(b"old"), returned(b"old"), sender=1, source=source)
    events = events_of(called(b"new"), returned(b"new"), printed(b"x\n"), sender=2, source=source)
    assert [e.driver for e in events if isinstance(e, DebugPrint)] == ["new"]


def test_a_service_s_name_is_unescaped() -> None:
    event = events_of(called(rb"gr\x00fcn \"x\""))[0]
    assert isinstance(event, DriverInitCalled)
    assert event.driver == 'grün "x"'


def test_a_print_without_levels_is_still_a_print() -> None:
    message = HEADER + b"warn:debugstr:vDbgPrintExWithPrefix odd\n"
    assert events_of(called(), message)[-1] == DebugPrint(1.5, "hello", b"odd\n")


def test_a_message_too_large_to_be_one_is_an_error() -> None:
    with pytest.raises(KernelLogError, match="bytes in Wine's trace"):
        WineTrace().receive_data(FRAME_HEADER.pack(MAX_MESSAGE + 1, 1), 0.0)


def test_nothing_is_sent_and_nothing_is_due() -> None:
    source = WineTrace()
    assert source.data_to_send() == b""
    assert source.next_deadline() is None


def test_a_driver_that_lives_long_is_not_forgotten() -> None:
    source = WineTrace()
    events_of(called(b"old"), returned(b"old"), sender=1, source=source)
    for number in range(5000):
        other = b"1.000:%04x:%04x:" % (0x1000 + number, 0x9000 + number)
        events_of(called(b"new", other), sender=100 + number, source=source)
        events_of(printed(b"x\n"), sender=1, source=source)
    events = events_of(
        HEADER + b"Call ntoskrnl.exe.ExAllocatePool(00000000,00000001) ret=18000102a\n",
        HEADER + b"Ret  ntoskrnl.exe.ExAllocatePool() retval=00000010 ret=18000102a\n",
        sender=1,
        source=source,
    )
    assert [event.driver for event in events] == ["old"]


def test_a_thread_number_that_comes_back_is_another_thread() -> None:
    source = WineTrace()
    events_of(called(b"crashed"), sender=1, source=source)  # never returns
    event = events_of(printed(b"x\n", b"1.000:0200:0118:"), sender=2, source=source)[0]
    assert event.driver is None


def test_an_unload_that_returns_where_nobody_loaded_does_no_harm() -> None:
    source = WineTrace()
    events_of(called(b"a"), sender=1, source=source)
    unload = b"1.000:0200:0118:Ret  driver unload 0000000180001070 (obj=0000000000376430)\n"
    assert events_of(unload, sender=2, source=source) == []


def test_what_a_dead_process_left_unfinished_is_not_its_successor_s() -> None:
    source = WineTrace()
    begun = printed(b"")[: -len(b"00000000:00000001: ")]
    events_of(called(b"a"), begun, sender=1, source=source)
    events = events_of(
        called(b"b", b"1.000:0200:0204:"), b"00000000:00000001: x\n", sender=1, source=source
    )
    assert [type(event) for event in events] == [DriverInitCalled]


def test_an_exception_code_too_large_to_be_one_is_only_text() -> None:
    told = b"wine: Unhandled exception 0x123456789 in thread 1 at address 01 (thread 0118), starting debugger"
    assert isinstance(events_of(called(), told + b"\n")[-1], KernelMessage)


MESSAGES = [
    called(),
    stack(b"14a0370 180001f2b\n"),
    HEADER + b"Call ntoskrnl.exe.KeBugCheck(0000e2e2) ret=180001029\n",
    printed(b"a\nb\n\n"),
    printed(b"\xff" * 960 + b"\n"),
    HEADER + b"Call ntoskrnl.exe.ExAllocatePoolWithTag(00000200,0000000f,74737572) ret=18000102a\n",
    HEADER + b"Ret  ntoskrnl.exe.ExAllocatePoolWithTag() retval=014a0370 ret=18000102a\n",
    HEADER + b'warn:debugstr:OutputDebugStringA "COOKIE"\n',
    returned(status=b"c0000001"),
    b"wine: Unhandled division by zero at address 0000000170025DE8 (thread 0118), starting debugger\n",
]


@given(st.lists(st.integers(0, sum(len(m) + FRAME_HEADER.size for m in MESSAGES)), max_size=12))
def test_reads_may_be_cut_anywhere(cuts: list[int]) -> None:
    stream = b"".join(frame(message, SENDER) for message in MESSAGES)
    source, events = WineTrace(), []
    borders = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for begin, end in itertools.pairwise(borders):
        events += source.receive_data(stream[begin:end], 1.5)
    assert events == events_of(*MESSAGES)


@given(st.lists(st.binary(max_size=200)))
def test_any_text_is_one_print_and_comes_back_whole(texts: list[bytes]) -> None:
    terminated = [text + b"\n" for text in texts]
    events = events_of(called(), *map(printed, terminated))
    assert [e.raw for e in events if isinstance(e, DebugPrint)] == terminated


@given(st.lists(st.tuples(st.integers(0, 3), st.one_of(st.binary(), st.sampled_from(MESSAGES)))))
def test_any_messages_at_all_do_no_harm(messages: Iterable[tuple[int, bytes]]) -> None:
    source = WineTrace()
    for sender, message in messages:
        source.receive_data(frame(message, sender), 0.0)
    assert events_of(called(), sender=9, source=source)[-1] == DriverInitCalled(
        1.5, "hello", 0x10C, 0x281B51016
    )
