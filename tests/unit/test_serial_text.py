r"""Serial text: as ReactOS writes it, cut anywhere, and from a guest that lies.

The lines are those of a real one, as in the capture of its KD traffic, and as its source prints them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.kernel.events import (
    Breakpoint,
    BugCheck,
    DebugPrint,
    Event,
    ImageLoaded,
    ImageUnloaded,
)
from pytest_kdriver.kernel.sources.kd.packets import (
    DataPacket,
    PacketReader,
    PacketType,
    read_debug_io,
)
from pytest_kdriver.kernel.sources.text import (
    BUG_CHECK_WAITS,
    LINE_MOST,
    LINE_WAITS,
    SerialText,
)

CAPTURES = Path(__file__).parents[1] / "data" / "kd"
LOADING = (
    rb"(/ntoskrnl/mm/ARM3/sysldr.c:170) Loading: \SystemRoot\system32\drivers\bug.sys "
    b"at FFFFF88004EBE000 with 3b pages\r\n"
)
BASE = 0xFFFFF88004EBE000
PRINT = b"bug: DriverEntry \\REGISTRY\\MACHINE\\SYSTEM\\CONTROLSET001\\SERVICES\\BUG\r\n"
FATAL = (
    b"\r\n*** Fatal System Error: 0xdeadbeef\r\n"
    b"                       (0x0000000000000001,0x0000000000000002,"
    b"0x0000000000000003,0x0000000000000004)\r\n\r\n"
)
INT3 = b"\r\nEntered debugger on embedded INT3 at 0x0010:0xFFFFF80000587D22.\r\n"
BACKTRACE = (
    b"<ntoskrnl.exe:187d22>\r\n<bug.sys:1029>\r\n"
    b"<ntoskrnl.exe:a0123 (/ntoskrnl/io/iomgr/driver.c:601 (IopInitializeDriverModule))>\r\n"
    b"<bug.sys: 2a>\r\n"
)
PROMPT = b"\r\nkdb:> "
CRASH = LOADING + PRINT + FATAL + INT3 + BACKTRACE + PROMPT
UNLOADING = b"(/ntoskrnl/mm/ARM3/sysldr.c:989) Leaking driver: bug.sys\r\n"
ASSERTION = (
    b"\r\n*** Assertion failed: 1 == 2\r\n***   Source File: /x.c, line 3\r\n\r\n"
    b"Break repeatedly, break Once, Ignore, terminate Process or terminate Thread (boipt)? "
)
PAGER = b"--- Press q to abort, any other key to continue ---"


def printed(events: list[Event]) -> bytes:
    return b"".join(event.raw for event in events if isinstance(event, DebugPrint))


def besides_prints(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, DebugPrint)]


def test_a_line_is_a_print_with_the_guests_own_line_break() -> None:
    events = SerialText().receive_data(b"one\r\n\r\nthree\ntwo \x81\xff\r\n", 1.5)
    assert events == [
        DebugPrint(1.5, None, raw) for raw in (b"one\n", b"\n", b"three\n", b"two \x81\xff\n")
    ]


def test_what_is_no_whole_line_is_told_after_a_quarter_of_a_second() -> None:
    source = SerialText()
    assert source.receive_data(b"half\r", 1.0) == []
    assert source.next_deadline() == 1.0 + LINE_WAITS
    assert source.receive_data(b"", 1.2) == []
    assert source.receive_data(b"", 1.25) == [DebugPrint(1.25, None, b"half")]
    assert source.next_deadline() is None
    assert source.receive_data(b"\n", 2.0) == [DebugPrint(2.0, None, b"\n")]


def test_a_bug_check_is_told_at_the_prompt_where_the_guest_is_left() -> None:
    source = SerialText()
    events = source.receive_data(CRASH, 2.0)
    parameters = (1, 2, 3, 4)
    stack = (BASE + 0x1029, BASE + 0x2A)
    path = r"\SystemRoot\system32\drivers\bug.sys"
    assert besides_prints(events) == [
        ImageLoaded(2.0, "bug", BASE, 0x3B000, path),
        BugCheck(2.0, None, 0xDEADBEEF, parameters, stack=stack),
    ]
    assert printed(events) == CRASH.replace(b"\r", b"")
    assert source.data_to_send() == b""
    assert source.next_deadline() is None


def test_a_bug_check_without_a_prompt_is_told_two_seconds_later() -> None:
    source = SerialText()
    assert not besides_prints(source.receive_data(FATAL, 1.0))
    assert not besides_prints(source.receive_data(b"Driver at fault: bug.sys.\r\n", 2.0))
    assert source.next_deadline() == 1.0 + BUG_CHECK_WAITS
    (told,) = source.receive_data(b"", 3.0)
    assert told == BugCheck(3.0, None, 0xDEADBEEF, (1, 2, 3, 4), blamed="bug.sys")
    assert source.receive_data(b"", 9.0) == []
    assert not besides_prints(source.receive_data(PROMPT, 9.0))
    assert source.data_to_send() == b""


def test_a_second_bug_check_tells_the_first_and_then_itself() -> None:
    source = SerialText()
    events = source.receive_data(FATAL + FATAL.replace(b"deadbeef", b"000000d1") + PROMPT, 1.0)
    codes = [event.code for event in events if isinstance(event, BugCheck)]
    assert codes == [0xDEADBEEF, 0xD1]


def test_half_a_bug_check_is_prints_and_nothing_else() -> None:
    source = SerialText()
    source.receive_data(FATAL[:60] + b"\r\n", 1.0)
    assert source.receive_data(b"", 4.0) == []


def test_a_breakpoint_is_told_and_gone_on_from() -> None:
    source = SerialText()
    int3 = b"\r\nEntered debugger on embedded INT3 at 0x0010:0xFFFFF88004EBE123.\r\n"
    events = source.receive_data(LOADING + int3 + PROMPT, 1.0)
    assert besides_prints(events)[1:] == [Breakpoint(1.0, "bug", 0x80000003, BASE + 0x123)]
    assert source.data_to_send() == b"cont\r"
    assert source.data_to_send() == b""


def test_a_breakpoint_in_no_known_image_is_everybodys() -> None:
    (_, _, told) = SerialText().receive_data(INT3, 1.0)
    assert told == Breakpoint(1.0, None, 0x80000003, 0xFFFFF80000587D22)


def test_an_image_that_is_unloaded_is_gone() -> None:
    source = SerialText()
    source.receive_data(LOADING, 1.0)
    told = besides_prints(source.receive_data(UNLOADING, 2.0))
    assert told == [ImageUnloaded(2.0, "bug", BASE, r"\SystemRoot\system32\drivers\bug.sys")]
    assert besides_prints(source.receive_data(UNLOADING, 3.0)) == []


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (PROMPT, b"cont\r"),
        (PAGER, b"q"),
        (b"--- Press q to abort, e/End,h/Home,u/PgUp, other key/PgDn ---", b"q"),
        (ASSERTION, b"o\r"),
    ],
)
def test_prompts_are_answered_and_told_at_once(prompt: bytes, answer: bytes) -> None:
    source = SerialText()
    events = source.receive_data(prompt, 1.0)
    assert printed(events) == prompt.replace(b"\r", b"")
    assert source.data_to_send() == answer


def test_a_prompt_that_comes_slowly_is_answered_nevertheless() -> None:
    source = SerialText()
    told = [
        event
        for number, byte in enumerate(PROMPT)
        for event in source.receive_data(bytes([byte]), float(number))
    ]
    assert printed(told) == b"\nkdb:> "
    assert source.data_to_send() == b"cont\r"


@pytest.mark.parametrize("text", [b"x kdb:> ", b"\r\nkdb:", b"--- Press q to", b"x" + PAGER])
def test_what_is_like_a_prompt_is_not_answered(text: bytes) -> None:
    source = SerialText()
    source.receive_data(text, 1.0)
    assert source.data_to_send() == b""


PIECES = (
    LOADING, PRINT, FATAL, INT3, BACKTRACE, PROMPT, UNLOADING, ASSERTION, PAGER, CRASH,
    b"Driver at fault: bug.sys.\r\n", b"\r", b"\n", b"\r\r\n", b"\xff\xfe\x00", b"kdb", b"x" * 5000,
)  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.binary(max_size=40), max_size=12).map(b"".join)


@given(texts, st.data())
def test_where_it_is_cut_changes_nothing(text: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    whole, cut = SerialText(), SerialText()
    expected = whole.receive_data(text, 1.0)
    got = [
        event
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
        for event in cut.receive_data(text[start:end], 1.0)
    ]
    assert got == expected
    assert whole.data_to_send() == cut.data_to_send()
    assert whole.receive_data(b"", 9.0) == cut.receive_data(b"", 9.0)


@given(texts)
def test_every_byte_is_printed_once_and_in_order(text: bytes) -> None:
    source = SerialText()
    raw = printed([*source.receive_data(text, 1.0), *source.receive_data(b"", 2.0)])
    assert raw.replace(b"\r", b"") == text.replace(b"\r", b"")
    assert source.next_deadline() is None or source.next_deadline() == 1.0 + BUG_CHECK_WAITS


def test_what_a_hostile_guest_can_have_kept_is_bounded() -> None:
    source = SerialText()
    endless = source.receive_data(b"x" * (10 * LINE_MOST), 1.0)
    assert [len(event.raw) for event in endless if isinstance(event, DebugPrint)] == (
        [LINE_MOST] * 9
    )
    source.receive_data(b"\n" + PROMPT * 10_000, 1.0)
    assert len(source.data_to_send()) < 5000
    line = b"(/ntoskrnl/mm/ARM3/sysldr.c:170) Loading: \\%d.sys at FFFFF88004EBE000 with 1 pages\n"
    for number in range(3000):
        source.receive_data(line % number, 1.0)
    source.receive_data(FATAL + b"<2999.sys:1>\n" * 50_000, 1.0)
    (told,) = besides_prints(source.receive_data(PROMPT, 1.0))
    assert isinstance(told, BugCheck)
    assert len(told.stack) == 32
    gone = [source.receive_data(UNLOADING.replace(b"bug", b"%d" % n), 1.0) for n in range(3000)]
    assert sum(len(besides_prints(events)) for events in gone) == 1024


def prints_of(capture: str) -> bytes:
    """What a real kernel printed, as it would write it on a port without KD."""
    packets = PacketReader().receive((CAPTURES / f"{capture}.target.bin").read_bytes())
    texts = [
        read_debug_io(packet.payload)
        for packet in packets
        if isinstance(packet, DataPacket) and packet.type == PacketType.DEBUG_IO
    ]
    return b"".join(text.text for text in texts if text).replace(b"\n", b"\r\n")


def test_a_real_kernels_prints_are_lines_images_and_its_bug_check() -> None:
    text = prints_of("bugcheck")
    source = SerialText()
    events = [*source.receive_data(text, 1.0), *source.receive_data(b"", 4.0)]
    assert printed(events) == text.replace(b"\r", b"")
    told = besides_prints(events)
    images = [event.driver for event in told if isinstance(event, ImageLoaded)]
    assert len(images) == text.count(b") Loading: ")
    assert {"hello", "fail", "fail2", "bug"} <= set(images)
    gone = [event.driver for event in told if isinstance(event, ImageUnloaded)]
    assert gone == ["hello"] * 4 + ["fail"] * 2 + ["fail2"]
    checks = [event for event in told if isinstance(event, BugCheck)]
    assert checks == [BugCheck(4.0, None, 0xDEADBEEF, (1, 2, 3, 4))]
