"""The debugger's end of a KD line against a kernel that was written without it, over lines that fail."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

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
from pytest_kdriver.kernel.sources.kd.session import KdSession, KdState
from tests.kd.faulty_wire import Fault, FaultyWire, Kind
from tests.kd.simulator import (
    BREAK_WITH_STATUS,
    CONTROL,
    DATA,
    DEBUG_IO,
    HEADER,
    INITIAL,
    KERNEL,
    KERNEL_PATH,
    HostStream,
    KdTarget,
)

ATTACH: Final = 60.0
"""Seconds in which a debugger has found a kernel, wherever it is."""
PER_FAULT: Final = 30.0
"""Seconds that one fault may cost."""

LATE: Final = 0.9
"""Seconds by which bytes are late, at most; with more a kernel says them again."""

AT_ONCE: Final = 10_000
"""Exchanges, at most, in no time."""

DRIVER: Final = 0xFFFFF80340000000
SIZE: Final = 0x8000
PATH: Final = r"\SystemRoot\System32\drivers\demo.sys"

Plan = dict[int, Fault]
Step = Callable[[KdTarget], int]


@dataclass
class Exchange:
    """A debugger and a kernel at the ends of two wires, on one clock."""

    target: KdTarget
    session: KdSession = field(default_factory=KdSession)
    to_host: FaultyWire = field(default_factory=FaultyWire)
    to_target: FaultyWire = field(default_factory=FaultyWire)
    now: float = 1000.0
    events: list[Event] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    watched: HostStream = field(default_factory=HostStream)
    at_once: int | None = None
    """Bytes that the kernel sends at one time, at most."""

    def run(self, until: Callable[[], bool], limit: float = PER_FAULT) -> None:
        """Let bytes and time go on. Fails where that takes more than ``limit`` seconds."""
        end = self.now + limit
        at_once = 0
        while True:
            moved = self._move()
            if until():
                return
            at_once = at_once + 1 if moved else 0
            assert at_once < AT_ONCE, "they talk for ever"
            if moved:
                continue
            parts = (self.session, self.target, self.to_host, self.to_target)
            deadlines = [d for d in (part.next_deadline() for part in parts) if d is not None]
            later = min(deadlines, default=end + 1)
            assert later <= end, f"it hangs: {self.session.state}, {vars(self.target)}"
            self.now = max(later, self.now)

    def finish(self, limit: float = PER_FAULT) -> None:
        """Until the kernel has done all that it was told to, and the debugger has told of it."""
        self.run(lambda: self.target.idle, limit)
        self.settle()

    def step(self, moves: int) -> None:
        """Let so many things happen, but no time pass."""
        for _ in range(moves):
            self._move()

    def settle(self, seconds: float = 5.0) -> None:
        """Let it be for a while."""
        end = self.now + seconds
        while self.now < end:
            self._move()
            self.now += 0.05

    def revert(self, snapshot: dict[str, object]) -> None:
        """Put the kernel back. What is on the wires is lost, as what a machine's sockets hold."""
        self.target.restore(snapshot, self.now)
        self.to_host.clear()
        self.to_target.clear()

    def of(self, *kinds: type[Event]) -> list[Event]:
        """The events of these kinds."""
        return [event for event in self.events if isinstance(event, kinds)]

    @property
    def prints(self) -> list[bytes]:
        """What was printed, as the debugger tells it."""
        return [event.raw for event in self.events if isinstance(event, DebugPrint)]

    def _move(self) -> bool:
        arrived = self.to_host.take(self.now)
        self.events += self.session.receive_data(arrived, self.now)
        sent = self.session.data_to_send()
        self.mistakes += self.watched.receive_data(sent)
        self.to_target.put(sent, self.now)
        taken = self.to_target.take(self.now)
        self.target.receive_data(taken, self.now)
        said = self.target.data_to_send(self.at_once)
        self.to_host.put(said, self.now)
        return bool(arrived or sent or taken or said)


def exchange(to_host: Plan | None = None, to_target: Plan | None = None) -> Exchange:
    clean = not to_host and not to_target
    made = Exchange(
        KdTarget(processors=4, clean_wire=clean),
        to_host=FaultyWire(to_host),
        to_target=FaultyWire(to_target),
    )
    made.session.end_of_boot()
    return made


def plans(largest: int) -> st.SearchStrategy[Plan]:
    """Up to six faults, which touch ``largest`` bytes each, at most, of so many pieces."""
    position, size, bit = st.integers(0, 700), st.integers(1, largest), st.integers(0, 7)
    faults = (
        st.builds(Fault, st.just(Kind.DROP), position, size),
        st.builds(Fault, st.just(Kind.DUPLICATE), position, size),
        st.builds(Fault, st.just(Kind.FLIP), position, bit=bit),
        st.builds(Fault, st.just(Kind.DELAY), seconds=st.floats(0.01, LATE)),
        st.builds(Fault, st.just(Kind.CUT), position, seconds=st.floats(0.01, 5.0)),
    )
    return st.dictionaries(st.integers(0, 40), st.one_of(faults), max_size=6)


TO_HOST = plans(700)
TO_TARGET = plans(16)
"""No whole request comes twice: the second is taken for the acknowledgement of what the kernel says next, and
nobody could get that back if it was lost, too (ReactOS' kddll.c)."""


THREE_DEAD_TIMES: Final = {
    8: Fault(Kind.CUT, 634, seconds=4.33),
    14: Fault(Kind.DROP, 289, 222),
    23: Fault(Kind.CUT, 337, seconds=3.48),
    32: Fault(Kind.CUT, 337, seconds=3.48),
}
"""In one stop: a debugger that then lets the kernel go on without its context has it crash."""


class Sequenced:
    """What a kernel does, and what a debugger has to tell of it."""

    def __init__(self) -> None:
        self.number = 0
        self.events: list[tuple[int, tuple[object, ...]]] = []
        self.loaded = False

    @property
    def expected(self) -> list[tuple[object, ...]]:
        return self.behind(0)

    def behind(self, completed: int) -> list[tuple[object, ...]]:
        """What is to be told from when the kernel had done so much."""
        return [event for number, event in self.events if number > completed]

    def do(self, target: KdTarget, step: str, processor: int, size: int) -> None:
        self.number += 1
        match step:
            case "print":
                text = f"{self.number}: ".encode().ljust(size, b".") + b"\n"
                number = target.print(text, processor)
                self.events.append((number, ("print", text)))
            case "load" if not self.loaded:
                number = target.load(PATH, DRIVER, SIZE, processor)
                self.loaded = True
                self.events.append((number, ("load", DRIVER)))
            case "unload" if self.loaded:
                number = target.unload(PATH, processor)
                self.loaded = False
                self.events.append((number, ("unload", DRIVER)))
            case "prompt":
                target.prompt(f"{self.number}?", processor, most=1)
            case "file":
                target.file_io(rf"\??\C:\{self.number}.sys")
            case "command":
                target.command("it", f"is {self.number}")
            case "int3":
                number = target.breakpoint(DRIVER + self.number, processor=processor)
                self.events.append((number, ("break", DRIVER + self.number)))
            case "assertion":
                number = target.breakpoint(
                    DRIVER + self.number, assertion=True, processor=processor
                )
                self.events.append((number, ("break", DRIVER + self.number)))


def told(events: Sequence[Event]) -> list[tuple[object, ...]]:
    """The same, as it was told."""
    found: list[tuple[object, ...]] = []
    for event in events:
        match event:
            case DebugPrint():
                found.append(("print", event.raw))
            case ImageLoaded() if event.base != KERNEL:
                found.append(("load", event.base))
            case ImageUnloaded():
                found.append(("unload", event.base))
            case Breakpoint():
                found.append(("break", event.address))
            case BugCheck():
                found.append(("bug check", event.code, event.parameters, event.blamed))
    return found


PROCESSORS, SIZES = st.integers(0, 3), st.integers(0, 505)
PRINTS = st.lists(st.tuples(st.just("print"), PROCESSORS, SIZES), max_size=12)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "print",
                "print",
                "print",
                "load",
                "unload",
                "prompt",
                "file",
                "command",
                "int3",
                "assertion",
            ]
        ),
        PROCESSORS,
        SIZES,
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, to_host=TO_HOST, to_target=TO_TARGET)
def test_each_thing_is_told_once_and_in_order_whatever_the_line_does(
    steps: list[tuple[str, int, int]], to_host: Plan, to_target: Plan
) -> None:
    both = exchange(to_host, to_target)
    script = Sequenced()
    for step in steps:
        script.do(both.target, *step)
    both.finish(PER_FAULT * (1 + len(to_host) + len(to_target)))
    assert told(both.events) == script.expected
    assert both.target.errors == both.mistakes == []
    assert both.target.present


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, pieces=st.sets(st.integers(0, 40), max_size=6), back=st.booleans())
def test_what_comes_twice_is_told_once(
    steps: list[tuple[str, int, int]], pieces: set[int], back: bool
) -> None:
    """Whole pieces, on the line to the kernel or back."""
    twice = {piece: Fault(Kind.DUPLICATE, size=4096) for piece in pieces}
    both = exchange(twice if back else None, None if back else twice)
    script = Sequenced()
    for step in steps:
        script.do(both.target, *step)
    both.finish(PER_FAULT * (1 + len(pieces)))
    assert told(both.events) == script.expected
    assert both.target.errors == both.mistakes == []


@settings(max_examples=50, deadline=None)
@given(steps=STEPS)
def test_on_a_line_without_faults_the_debugger_makes_no_mistake(
    steps: list[tuple[str, int, int]],
) -> None:
    both = exchange()
    script = Sequenced()
    for step in steps:
        script.do(both.target, *step)
    began = both.now
    both.run(lambda: both.target.idle)
    assert both.now == began  # nobody waited for a time-out
    both.settle()
    assert told(both.events) == script.expected
    assert both.target.errors == both.mistakes == []
    assert both.target.answers == [""] * len([step for step in steps if step[0] == "prompt"])


@settings(max_examples=100, deadline=None)
@given(to_host=TO_HOST, to_target=TO_TARGET, prints=st.integers(0, 5))
def test_a_bug_check_is_found_whatever_the_line_does(
    to_host: Plan, to_target: Plan, prints: int
) -> None:
    both = exchange(to_host, to_target)
    both.target.load(PATH, DRIVER, SIZE)
    lines = [f"{number}\n" for number in range(prints)]
    for line in lines:
        both.target.print(line)
    stack = (DRIVER + 0x1234, KERNEL + 0x5678)
    both.target.bug_check(0xD1, (1, 2, 3, DRIVER + 0x1230), "demo.sys", stack=stack)
    both.run(
        lambda: both.session.state is KdState.HELD,
        PER_FAULT * (1 + len(to_host) + len(to_target)),
    )
    both.settle(30)
    assert both.session.state is KdState.HELD
    (found,) = both.of(BugCheck)
    assert isinstance(found, BugCheck)
    assert (found.code, found.parameters) == (0xD1, (1, 2, 3, DRIVER + 0x1230))
    assert found.blamed in {
        None,
        "demo.sys",
    }  # told before the line that says so, where that is late
    assert not found.stack or [at for at in found.stack if at in stack] == list(stack)
    assert [text.decode() for text in both.prints][:prints] == lines
    assert b"".join(both.prints[prints:]).count(b"Fatal System Error") == 1
    assert both.mistakes == both.target.errors == []


def test_a_bug_check_comes_with_its_stack_and_the_driver_that_the_kernel_blames() -> None:
    both = exchange()
    both.target.load(PATH, DRIVER, SIZE)
    stack = (DRIVER + 0x1234, KERNEL + 0x5678)
    both.target.bug_check(0xD1, (1, 2, 3, DRIVER + 0x1230), "demo.sys", processor=3, stack=stack)
    both.run(lambda: both.session.state is KdState.HELD)
    (found,) = both.of(BugCheck)
    assert isinstance(found, BugCheck)
    assert found.blamed == "demo.sys"
    assert [at for at in found.stack if at in stack] == list(stack)
    assert both.mistakes == both.target.errors == []


def test_a_kernel_that_is_let_go_on_behind_its_bug_check_boots_anew() -> None:
    both = exchange()
    both.target.bug_check(0xE2)
    both.run(lambda: both.session.state is KdState.HELD)
    both.settle(60)
    assert both.target.boots == 0
    both.session.go_on(both.now)
    both.run(lambda: both.target.boots == 1)
    both.target.print("again\n")
    both.finish()
    assert both.prints[-1] == b"again\n"
    assert both.session.state is KdState.RUNNING
    assert both.session.attached
    assert len(both.of(BugCheck)) == 1
    loads = [event for event in both.events if isinstance(event, ImageLoaded)]
    assert [load.path for load in loads] == [KERNEL_PATH] * 2
    assert both.mistakes == both.target.errors == []


def test_a_kernel_that_does_not_reboot_is_held_where_it_stops_again() -> None:
    both = exchange()
    both.target.auto_reboot = False
    both.target.bug_check(0xE2)
    both.run(lambda: both.session.state is KdState.HELD)
    both.session.go_on(both.now)
    both.settle()
    assert both.session.state is KdState.HELD
    assert both.target.stopped
    assert len(both.of(BugCheck)) == 1
    assert both.mistakes == both.target.errors == []


def test_an_exception_that_nobody_handles_becomes_the_bug_check_that_it_is() -> None:
    both = exchange()
    both.target.load(PATH, DRIVER, SIZE)
    both.target.exception(0xC0000005, DRIVER + 0x100, (1, 0xFFFFF00000000010), processor=2)
    both.run(lambda: both.session.state is KdState.HELD)
    (exception,) = both.of(UnhandledException)
    assert isinstance(exception, UnhandledException)
    assert (exception.driver, exception.code) == ("demo", 0xC0000005)
    assert exception.access == ("write", 0xFFFFF00000000010)
    (bug_check,) = both.of(BugCheck)
    assert isinstance(bug_check, BugCheck)
    assert bug_check.code == 0x1E
    assert bug_check.parameters[:2] == (0xC0000005, DRIVER + 0x100)
    assert both.mistakes == both.target.errors == []


def test_breakpoints_of_the_boot_are_stepped_over_quietly() -> None:
    both = exchange()
    both.session = KdSession()
    both.target.breakpoint(KERNEL + 0x100)
    both.finish()
    assert not both.of(Breakpoint)
    assert both.target.errors == []


@settings(max_examples=100, deadline=None)
@given(to_host=TO_HOST, to_target=TO_TARGET)
@example(to_host=THREE_DEAD_TIMES, to_target={})
def test_a_break_in_tells_where_each_processor_is_whatever_the_line_does(
    to_host: Plan, to_target: Plan
) -> None:
    both = exchange(to_host, to_target)
    both.target.load(PATH, DRIVER, SIZE)
    both.target.run_at(1, DRIVER + 0x40, (DRIVER + 0x90, KERNEL + 0x77))
    both.finish(PER_FAULT * (1 + len(to_host) + len(to_target)))
    both.session.break_in(both.now)
    both.run(
        lambda: len(both.of(ProcessorState)) == 4,
        PER_FAULT * (1 + len(to_host) + len(to_target)),
    )
    both.target.print("it goes on\n")
    both.finish(PER_FAULT * (1 + len(to_host) + len(to_target)))
    states = {s.processor: s for s in both.events if isinstance(s, ProcessorState)}
    assert states[0].address == BREAK_WITH_STATUS
    assert states[1].address == DRIVER + 0x40
    assert states[1].stack[:2] == (DRIVER + 0x90, KERNEL + 0x77)
    assert len(both.of(ProcessorState)) == 4
    assert both.prints == [b"it goes on\n"]
    assert both.mistakes == both.target.errors == []


class TestAttaching:
    """To a kernel that is somewhere in its life, with ids that nobody here knows."""

    @staticmethod
    def meet(both: Exchange, limit: float = ATTACH) -> None:
        both.session.attach(both.now)
        both.run(lambda: both.session.attached, limit)

    @staticmethod
    def lived() -> KdTarget:
        """A kernel with an odd number of packets behind it, in both directions."""
        both = exchange()
        both.target.load(PATH, DRIVER, SIZE)
        both.target.print("before\n")
        both.finish()
        assert both.target.send_id == INITIAL | 1
        return both.target

    @pytest.mark.parametrize(
        "step",
        [
            lambda target: 0,
            lambda target: target.print("first\n"),
            lambda target: target.load(r"\a.sys", DRIVER + SIZE, SIZE),
            lambda target: target.prompt("?"),
            lambda target: target.file_io("a.sys"),
            lambda target: target.breakpoint(DRIVER + 8),
            lambda target: target.command("a", "b"),
        ],
        ids=["runs", "prints", "loads", "prompts", "asks", "stopped", "commands"],
    )
    @pytest.mark.parametrize("waited", [0.0, 3.0], ids=["at once", "late"])
    def test_finds_a_kernel_that(self, step: Step, waited: float) -> None:
        both = Exchange(self.lived())
        step(both.target)
        both.target.receive_data(b"", both.now)
        both.now += waited
        self.meet(both)
        both.target.print("behind\n")
        both.finish()
        assert both.prints[-1] == b"behind\n"
        assert both.prints.count(b"first\n") == (both.prints[0] == b"first\n")
        both.session.break_in(both.now)
        both.run(lambda: len(both.of(ProcessorState)) == 4)
        both.settle()
        assert both.target.idle
        assert both.target.errors == both.mistakes == []

    @settings(max_examples=100, deadline=None)
    @given(
        steps=STEPS.filter(bool),
        moves=st.integers(0, 400),
        more=st.integers(0, 200),
        to_host=TO_HOST,
    )
    def test_a_kernel_that_is_put_back_is_followed_from_there_on(
        self, steps: list[tuple[str, int, int]], moves: int, more: int, to_host: Plan
    ) -> None:
        """The snapshot is from anywhere: between two bytes of a packet, too."""
        both = exchange()
        both.target.clean_wire = False
        both.at_once = 13
        script = Sequenced()
        for step in steps:
            script.do(both.target, *step)
        both.step(moves)
        snapshot, completed = both.target.snapshot(), both.target.completed
        both.step(more)
        both.revert(snapshot)
        both.at_once = None  # so that a packet has one fault at most
        both.to_host = FaultyWire(to_host)
        before = len(both.events)
        self.meet(both, ATTACH + PER_FAULT * len(to_host))
        both.finish(PER_FAULT * (1 + len(to_host)))
        both.run(lambda: both.session.attached)
        assert told(both.events[before:]) == script.behind(completed)
        assert both.target.errors == both.mistakes == []

    @settings(max_examples=50, deadline=None)
    @given(steps=STEPS, more=PRINTS, moves=st.integers(0, 200))
    def test_what_is_under_way_when_a_kernel_is_put_back_does_no_harm(
        self, steps: list[tuple[str, int, int]], more: list[tuple[str, int, int]], moves: int
    ) -> None:
        """It is put back to a moment at which it said nothing; what was for the other kernel comes late."""
        both = exchange()
        both.target.clean_wire = False
        script = Sequenced()
        for step in steps:
            script.do(both.target, *step)
        both.finish()
        snapshot, completed = both.target.snapshot(), both.target.completed
        for step in more:
            script.do(both.target, *step)
        both.at_once = 13
        both.step(moves)
        both.target.restore(snapshot, both.now)
        both.events += both.session.receive_data(both.to_host.take(both.now), both.now)
        script.events.clear()
        for step in more:
            script.do(both.target, *step)
        before = len(both.events)
        self.meet(both)
        both.finish()
        assert told(both.events[before:]) == script.behind(completed)
        assert both.target.errors == both.mistakes == []

    def test_gives_up_on_what_is_not_there_and_says_so(self) -> None:
        session = KdSession()
        now = 0.0
        session.attach(now)
        events: list[Event] = []
        while now < 10 * ATTACH:
            events += session.receive_data(b"", now)
            session.data_to_send()
            now = max(session.next_deadline() or now, now + 0.1)
        assert session.state is KdState.LOST
        assert not session.attached
        (message,) = events
        assert isinstance(message, KernelMessage)

    def test_a_kernel_that_gave_its_debugger_up_is_found_again(self) -> None:
        both = Exchange(self.lived())
        both.target.print("lost\n")
        said = b""
        while both.target.present:
            both.target.receive_data(b"", both.now)
            said += both.target.data_to_send()
            both.now += 0.5
        assert said.count(b"lost") == 20  # as ReactOS was seen to do
        both.target.print("dropped\n")
        both.target.receive_data(b"", both.now)
        assert both.target.idle
        self.meet(both)
        both.target.print("found\n")
        both.finish()
        assert both.target.present
        assert both.prints == [b"found\n"]
        assert both.target.errors == both.mistakes == []


class TestTheSimulatedKernel:
    """Against what a real one sent, and what a real debugger answered: ``tests/data/kd/README.md``."""

    RECORDED = Path(__file__).parents[1] / "data" / "kd"

    @pytest.mark.parametrize("name", ["boot-load-unload", "bugcheck"])
    def test_takes_a_real_debugger_s_bytes_for_whole_packets(self, name: str) -> None:
        said = (self.RECORDED / f"{name}.host.bin").read_bytes()
        assert HostStream().receive_data(said) == []
        assert HostStream().receive_data(said[1:]) != []

    def test_says_what_a_real_kernel_said_in_the_same_packets(self) -> None:
        """It gets the recorded answers. What it says is compared but for what the real one left to chance."""
        said = packets((self.RECORDED / "boot-load-unload.target.bin").read_bytes())
        answers = packets((self.RECORDED / "boot-load-unload.host.bin").read_bytes())
        target = booted_without_its_own_image()
        for packet in said:
            leader, kind, *_ = HEADER.unpack_from(packet)
            if leader == CONTROL:
                continue
            payload = packet[HEADER.size : -1]
            if kind == DEBUG_IO:
                target.print(payload[16:], int.from_bytes(payload[6:8], "little"))
                same = [slice(0, 4), slice(6, 12), slice(16, None)]
            else:
                base, size = struct.unpack_from("<Q12xI", payload, 40)
                target.load(payload[240:-1].decode(), base, size)
                same = [slice(0, 4), slice(32, 36), slice(40, 48), slice(60, 65), slice(240, None)]
            target.receive_data(b"", 0.0)
            (simulated,) = packets(target.data_to_send())
            assert simulated[:12] == packet[:12]  # the leader, the type, the size, the id
            assert [simulated[16:-1][part] for part in same] == [payload[part] for part in same]
            target.receive_data(answers.pop(0), 0.0)
            if kind != DEBUG_IO:
                target.receive_data(answers.pop(0), 0.0)
                (acknowledgement,) = packets(target.data_to_send())
                assert acknowledgement[4:6] == b"\x04\0"
            assert target.idle
        assert target.errors == []
        assert answers == []

    def test_tells_of_a_bug_check_as_a_real_kernel_did(self) -> None:
        said = packets((self.RECORDED / "bugcheck.target.bin").read_bytes())
        place, text = next(
            (place, packet) for place, packet in enumerate(said) if b"Fatal System" in packet
        )
        target = booted_without_its_own_image()
        target.bug_check(0xDEADBEEF, (1, 2, 3, 4))
        target.receive_data(b"", 0.0)
        (simulated,) = packets(target.data_to_send())
        assert simulated[32:] == text[32:]
        target.receive_data(HEADER.pack(CONTROL, 4, 0, INITIAL, 0), 0.0)
        (stop,) = packets(target.data_to_send())
        real = said[place + 1]
        assert stop[4:8] == real[4:8]  # the type and the size
        both = [slice(0, 4), slice(6, 8), slice(32, 36), slice(184, 188), slice(216, 217)]
        assert [stop[16:][part] for part in both] == [real[16:][part] for part in both]


def booted_without_its_own_image() -> KdTarget:
    """A kernel that has said nothing yet."""
    target = KdTarget(processors=1)
    target._queue.clear()
    return target


def packets(data: bytes) -> list[bytes]:
    """The packets of a stream without a fault."""
    found = []
    while data:
        leader, _, size, _, _ = HEADER.unpack_from(data)
        end = HEADER.size + (size + 1 if leader == DATA else 0)
        found.append(data[:end])
        data = data[end:]
    return found
