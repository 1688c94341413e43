"""The recorded traffic of a real NT kernel, replayed: tests/data/kd."""

import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_kdriver.kernel.events import BugCheck, DebugPrint, Event, ImageLoaded, KernelMessage
from pytest_kdriver.kernel.sources.kd.session import KdSession, KdState

DATA = Path(__file__).parents[1] / "data" / "kd"
CAPTURES = ("boot-load-unload", "bugcheck")

DEBUG_IO, ACKNOWLEDGE, STATE_CHANGE, MANIPULATE = 3, 4, 7, 2


def packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The packets of a recording, in which nothing is damaged: type and payload."""
    at = 0
    while at < len(data):
        leader, kind, size, _, checksum = struct.unpack_from("<IHHII", data, at)
        payload = data[at + 16 : at + 16 + size]
        assert leader == 0x30303030 if size else leader == 0x69696969
        assert sum(payload) == checksum
        at += 16 + size + (1 if size else 0)
        yield kind, payload


def recorded(name: str, direction: str) -> bytes:
    return (DATA / f"{name}.{direction}.bin").read_bytes()


def told(name: str) -> list[Event]:
    """What the recording says, read packet by packet, each by where its fields stand."""
    events: list[Event] = []
    for kind, payload in packets(recorded(name, "target")):
        (api,) = struct.unpack_from("<I", payload) if payload else (0,)
        if kind == DEBUG_IO:
            assert api == 0x3230
            events.append(DebugPrint(0.0, None, payload[16:]))
        elif kind == STATE_CHANGE and api == 0x3031:
            (base,) = struct.unpack_from("<Q", payload, 40)
            (size,) = struct.unpack_from("<I", payload, 60)
            path = payload[240:].rstrip(b"\0").decode()
            if payload[64]:
                events.append(KernelMessage(0.0, None, "the kernel shuts down"))
            else:
                stem = path.rpartition("\\")[2].rpartition(".")[0]
                events.append(ImageLoaded(0.0, stem, base, size, path))
        elif kind == STATE_CHANGE:
            events.append(BugCheck(0.0, None, 0xDEADBEEF, (1, 2, 3, 4)))
    return events


def replay(name: str, *sizes: int) -> tuple[list[Event], bytes, KdSession]:
    """The recording, in pieces that are cut behind so many bytes."""
    data = recorded(name, "target")
    session = KdSession()
    session.end_of_boot()
    events: list[Event] = []
    sent = b""
    for begin, end in zip((0, *sizes), (*sizes, len(data)), strict=True):
        events += session.receive_data(data[begin:end], 0.0)
        sent += session.data_to_send()
    return events, sent, session


def borders(name: str) -> list[int]:
    """Where the recording's packets end."""
    ends = [0]
    for _, payload in packets(recorded(name, "target")):
        ends.append(ends[-1] + 16 + len(payload) + (1 if payload else 0))
    return ends[1:-1]


def acknowledged(data: bytes) -> list[bytes]:
    """The acknowledgements in what a host sent, in order."""
    return re.findall(rb"iiii\x04\0\0\0[\0\x01]\0\x80\x80\0{4}", data)


def heard(name: str, *sizes: int) -> tuple[list[Event], list[bytes]]:
    """What a replay tells, and what it acknowledges."""
    events, sent, _ = replay(name, *sizes)
    return events, acknowledged(sent)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("boot-load-unload", {DEBUG_IO: 238, STATE_CHANGE: 32, ACKNOWLEDGE: 32}),
        ("bugcheck", {DEBUG_IO: 245, STATE_CHANGE: 34, ACKNOWLEDGE: 37, MANIPULATE: 3}),
    ],
)
def test_the_recordings_hold_what_their_readme_says(name: str, counts: dict[int, int]) -> None:
    assert Counter(kind for kind, _ in packets(recorded(name, "target"))) == counts


@pytest.mark.parametrize("name", CAPTURES)
def test_every_print_image_and_trap_is_told_in_order(name: str) -> None:
    events, _, session = replay(name)

    assert events == told(name)
    assert session.attached
    assert session.statistics.bytes_skipped == session.statistics.bad_checksums == 0


def test_a_driver_can_be_followed_through_its_life() -> None:
    events, _, _ = replay("boot-load-unload")
    text = "".join(event.text for event in events if isinstance(event, DebugPrint))

    assert text.count("Hello, world!") == text.count("Bye bye!") > 1
    assert re.search(r"'\\Driver\\fail2' initialization failed, status \(0xc0de1234\)", text)
    images = [event.driver for event in events if isinstance(event, ImageLoaded)]
    assert images[:2] == ["ntoskrnl", "hal"]
    assert len(images) == 32


def test_the_bug_check_is_told_with_what_it_was_called_with() -> None:
    events, _, _ = replay("bugcheck")

    (bug_check,) = [event for event in events if isinstance(event, BugCheck)]
    assert (bug_check.code, bug_check.parameters) == (0xDEADBEEF, (1, 2, 3, 4))
    following = events[events.index(bug_check) + 1 :]
    assert [event for event in following if not isinstance(event, DebugPrint)] == [
        KernelMessage(0.0, None, "the kernel shuts down")
    ]


@pytest.mark.parametrize("name", CAPTURES)
def test_each_packet_is_acknowledged_as_the_recorded_host_did(name: str) -> None:
    _, acknowledgements = heard(name)

    assert acknowledgements == acknowledged(recorded(name, "host"))


def test_the_kernel_is_let_go_on_from_images_as_the_recorded_host_did() -> None:
    def requests(data: bytes) -> list[bytes]:
        return [payload for kind, payload in packets(data) if kind == MANIPULATE]

    _, sent, _ = replay("boot-load-unload", *borders("boot-load-unload"))

    assert requests(sent) == requests(recorded("boot-load-unload", "host"))


def test_the_bug_checks_stop_is_held_where_the_recording_ends_there() -> None:
    data = recorded("bugcheck", "target")
    text = data.index(b"*** Fatal System Error")
    stop = data.index(b"0000\x07\0", text)
    reply = data.index(b"0000\x02\0", stop)
    context_end = reply + 16 + 56 + 0x4D0 + 1

    session = KdSession()
    events = session.receive_data(data[:context_end], 0.0)
    assert session.state is KdState.STOPPED  # its stack is asked for
    events += session.receive_data(b"", 2.0)

    assert [event for event in events if isinstance(event, BugCheck)] == [
        BugCheck(2.0, None, 0xDEADBEEF, (1, 2, 3, 4))
    ]


@pytest.mark.parametrize("name", CAPTURES)
def test_a_replay_in_single_bytes_tells_the_same(name: str) -> None:
    size = len(recorded(name, "target"))

    assert heard(name, *range(1, size)) == heard(name)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(CAPTURES), data=st.data())
def test_a_replay_cut_anywhere_and_resumed_tells_the_same(name: str, data: st.DataObject) -> None:
    size = len(recorded(name, "target"))
    cuts = data.draw(st.lists(st.integers(0, size), max_size=8).map(sorted))

    assert heard(name, *cuts) == heard(name)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(CAPTURES), data=st.data())
def test_garbage_between_the_packets_costs_none_of_them(name: str, data: st.DataObject) -> None:
    whole = recorded(name, "target")
    dirty = whole
    places = st.lists(st.sampled_from([0, *borders(name), len(whole)]), max_size=8)
    for border in sorted(data.draw(places), reverse=True):
        garbage = data.draw(st.binary(max_size=40).map(lambda noise: noise.replace(b"0000", b"")))
        dirty = dirty[:border] + garbage + dirty[border:]

    session = KdSession()
    events = session.receive_data(dirty, 0.0)

    assert events == told(name)
    assert session.statistics.bytes_skipped == len(dirty) - len(whole)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(CAPTURES), data=st.data())
def test_a_host_that_comes_later_hears_the_rest_of_the_prints(
    name: str, data: st.DataObject
) -> None:
    whole = recorded(name, "target")
    begin = data.draw(st.integers(1, len(whole) - 1))

    session = KdSession()
    events = session.receive_data(whole[begin:], 0.0)

    rest = [event for event in events if isinstance(event, DebugPrint)]
    prints = [event for event in told(name) if isinstance(event, DebugPrint)]
    assert rest == prints[len(prints) - len(rest) :]
    assert whole.count(b"0000\x03\0", begin) == len(rest)
