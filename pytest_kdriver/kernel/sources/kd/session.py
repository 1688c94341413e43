"""The host of a KD serial connection, as a state machine: bytes in, events out.

A kernel that runs prints, and each print stops it until the acknowledgement. A state change stops it until
it is told to go on, and only then does it answer requests: see ``stops``. It drops, and yet acknowledges, a
packet with the wrong id; so nothing is asked or answered before the ids are known to agree: see ``line``.
They do from a SYNC or an answered RESET on. To bring that about, a byte "b", which stops a kernel that runs,
and a RESET, which has a kernel that is stopped repeat why, are sent in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from pytest_kdriver.kernel.events import DebugPrint, Event, KernelMessage
from pytest_kdriver.kernel.sources.kd.line import Arrived, Incoming, Line, Signal, Statistics
from pytest_kdriver.kernel.sources.kd.packets import (
    GET_STRING,
    PRINT_SIZE,
    PRINT_STRING,
    DebugIo,
    PacketType,
    Reply,
    Request,
    StateChange,
    answer_to,
    answer_to_control_request,
    read_debug_io,
    read_reply,
    read_state_change,
    refusal_of_file,
)
from pytest_kdriver.kernel.sources.kd.stops import Stop, Stops

RESEND_AFTER: Final = 1.0
"""Seconds without an acknowledgement, after which a packet is sent again."""
MOST_SENDS: Final = 4
"""Of one packet; behind that the ids are agreed on anew."""
REPLY_AFTER: Final = 3.0
"""Seconds in which a request that was acknowledged is answered."""
MOST_UNANSWERED: Final = 2
"""Requests of one stop; behind that the kernel goes on without more of them."""
ATTEMPT: Final = 2.0
"""Seconds for which a break-in or a RESET is waited for: a kernel that is stopped looks for one at a time."""
MOST_ATTEMPTS: Final = 10
"""Behind so many without an answer the kernel counts as lost; it is still tried."""
STALL: Final = 0.5
"""Seconds without a byte, after which a packet that has begun is not going to be completed."""
JOIN_WITHIN: Final = 0.25
"""Seconds for which a print of the greatest size is kept for what follows it."""
MOST_JOINED: Final = 1 << 16
"""Bytes of a print that is joined so."""
MOST_PARTS: Final = 64
"""Processors whose prints are."""
BUG_CHECK_AFTER: Final = 2.0
"""Seconds from a bug check's text to its stop, and from there to what is read in it."""

_PROMPTS: Final = (("(boipt)", "o"), ("(bic)", "b"), ("(bipt)", "i"))


class KdState(Enum):
    """What is known of the kernel."""

    SILENT = "nothing was heard yet"
    RUNNING = "running"
    STOPPED = "in a stop that is being handled"
    HELD = "stopped for good, behind a bug check"
    LOST = "no answer"


def answer_prompt(prompt: str) -> str:
    """What a DbgPrompt is answered with, so that the kernel goes on.

    Of an assertion's ways out, "break Once" is the one that is seen: it runs into a breakpoint, and on. It
    asks again and again until it gets a letter that it knows (ReactOS' sdk/lib/rtl/assert.c).
    """
    return next((answer for choice, answer in _PROMPTS if choice in prompt), "")


class _Timer(Enum):
    STALL = auto()
    RESEND = auto()
    REPLY = auto()
    ATTEMPT = auto()
    BREAK_IN = auto()
    JOIN = auto()
    BUG_CHECK = auto()


class _Purpose(Enum):
    """Of a packet of ours."""

    REQUEST = auto()
    GO_ON = auto()
    ANSWER = auto()


@dataclass(slots=True)
class _CurrentStop:
    """A stop, until the kernel goes on from it. ``program`` is there while something is asked."""

    change: StateChange
    program: Stop | None = None
    request: Request | None = None
    unanswered: int = 0
    is_held: bool = False
    is_interrupted: bool = False
    """The kernel repeats it, and it is to be handled again."""


class KdSession:
    """A debugger that is always there, and never stands in the kernel's way.

    ``answer`` is asked for the answer to each DbgPrompt. Where ``hold_bug_checks`` the kernel stays stopped
    behind a bug check until ``go_on``; where it stops there once more, since it does not reboot, it is held
    in any case.
    """

    def __init__(
        self, *, answer: Callable[[str], str] = answer_prompt, hold_bug_checks: bool = True
    ) -> None:
        self.state = KdState.SILENT
        self.statistics = Statistics()
        self._answer = answer
        self._now = 0.0
        self._events: list[Event] = []
        self._timers: dict[_Timer, float] = {}
        self._line = Line(self.statistics)
        self._purpose = _Purpose.REQUEST
        self._parts: dict[int, bytes] = {}
        self._stops = Stops(tell=self._tell, hold_bug_checks=hold_bug_checks)
        self._stop: _CurrentStop | None = None
        self._is_attaching = False
        self._attempts = 0
        self._reset_is_next = False
        self._due: dict[_Timer, Callable[[], None]] = {
            _Timer.STALL: lambda: self._take(self._line.give_up_packet()),
            _Timer.RESEND: self._send_again,
            _Timer.REPLY: self._miss_reply,
            _Timer.ATTEMPT: self._attempt,
            _Timer.BREAK_IN: self._send_break_in,
            _Timer.JOIN: self._flush_parts,
            _Timer.BUG_CHECK: self._stops.tell_bug_check,
        }

    @property
    def attached(self) -> bool:
        """The ids agree, and the stop that it took is over."""
        return self._line.ids_agree and not self._is_attaching

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Take the next bytes, cut anywhere, do what is due at ``now``, and give the events, in order."""
        self._now = self._stops.now = now
        if data:
            self._take(self._line.receive(data))
        if self._timers:
            for timer in [timer for timer, at in self._timers.items() if at <= now]:
                if self._timers.pop(timer, None) is not None:
                    self._due[timer]()
        events, self._events = self._events, []
        return events

    def data_to_send(self) -> bytes:
        """The bytes to be sent to the kernel, each only once; acknowledgements first."""
        return self._line.data_to_send()

    def next_deadline(self) -> float | None:
        """The time at which ``receive_data(b"", now)`` is due. None: never."""
        return min(self._timers.values(), default=None)

    def attach(self, now: float) -> None:
        """Begin to agree on ids with a kernel that runs, is stopped, or was put back to a snapshot.

        It is done when ``attached``. What is half received is dropped; the images that are known are kept.
        """
        self._now = self._stops.now = now
        self._flush_parts()
        self._stops.tell_bug_check()
        self._timers.clear()
        self._line.start_over()
        self._stops.forget_bug_check()
        self._stops.break_in_is_wanted = False
        self._stop = None
        self.state = KdState.SILENT
        self._agree_on_ids(reset_first=False)

    def break_in(self, now: float) -> None:
        """Stop the kernel, tell a ``ProcessorState`` of each processor, and let it go on.

        One that is held is asked at once, and stays.
        """
        self._now = self._stops.now = now
        self._stops.break_in_is_wanted = True
        stop = self._stop
        if stop is not None and stop.is_held:
            self._run(stop, self._stops.look_around(stop.change))
        elif _Timer.BREAK_IN not in self._timers:
            self._send_break_in()

    def end_of_boot(self) -> None:
        """From here on breakpoints and assertions are events."""
        self._stops.boot_is_over = True

    def go_on(self, now: float) -> None:
        """In ``HELD``: let the kernel write its dump and reboot."""
        self._now = self._stops.now = now
        stop = self._stop
        if stop is not None and stop.is_held:
            self._run(stop, self._stops.leave(stop.change))

    def _tell(self, event: Event) -> None:
        self._events.append(event)

    def _set_timer(self, timer: _Timer, seconds: float) -> None:
        self._timers[timer] = self._now + seconds

    # What comes in.

    def _take(self, incoming: Iterable[Incoming]) -> None:
        for one in incoming:
            if self.state is KdState.SILENT or self.state is KdState.LOST:
                self._come_back()
            if type(one) is Arrived:
                self._take_packet(one)
            elif one is Signal.ACKNOWLEDGED:
                self._acknowledged()
            elif one is Signal.RESEND:
                self._send_again()
            elif one is Signal.RESET:
                self._interrupt()
            elif one is Signal.SYNC:
                self._flush_parts()
                self._interrupt()
                self._stop = None
                self._stops.tell_bug_check()
                self._stops.forget_bug_check()
                self._stops.images.clear()
                self._finish_attaching()
        if self._line.is_within_packet:
            self._set_timer(_Timer.STALL, STALL)
        else:
            self._timers.pop(_Timer.STALL, None)

    def _come_back(self) -> None:
        self._attempts = 0
        self.state = KdState.RUNNING
        if self._stop is not None:
            self.state = KdState.HELD if self._stop.is_held else KdState.STOPPED

    def _take_packet(self, packet: Arrived) -> None:
        if packet.type == PacketType.DEBUG_IO:
            text = read_debug_io(packet.payload)
            if text is not None and text.api == PRINT_STRING:
                self._print(text)
            elif text is not None and text.api == GET_STRING and self._may_answer(packet):
                answer = self._answer(text.text.decode("utf-8", "backslashreplace"))
                self._prompt(text, answer)
        elif packet.type == PacketType.STATE_CHANGE:
            change = read_state_change(packet.payload)
            if change is not None:
                self._take_stop(change, may_be_repeated=packet.may_be_repeated)
        elif packet.type == PacketType.MANIPULATE:
            reply = read_reply(packet.payload)
            if reply is not None:
                self._take_reply(reply)
        elif packet.type == PacketType.FILE_IO:
            if self._may_answer(packet):
                self._send(_Purpose.ANSWER, PacketType.FILE_IO, refusal_of_file(packet.payload))
        elif packet.type == PacketType.CONTROL_REQUEST and self._may_answer(packet):
            answer_to_request = answer_to_control_request(packet.payload)
            self._send(_Purpose.ANSWER, PacketType.CONTROL_REQUEST, answer_to_request)

    # Text.

    def _print(self, text: DebugIo) -> None:
        self.statistics.prints += 1
        if self._line.times_sent or self._is_attaching:
            self._see_it_run()
        raw = text.text
        if self._stops.look_for_bug_check(raw):
            self._set_timer(_Timer.BUG_CHECK, BUG_CHECK_AFTER)
        is_cut = len(raw) == PRINT_SIZE and not raw.endswith(b"\n")
        if self._parts or is_cut:
            raw = self._parts.pop(text.processor, b"") + raw
            if is_cut and len(raw) < MOST_JOINED and len(self._parts) < MOST_PARTS:
                self._parts[text.processor] = raw
                self._timers.setdefault(_Timer.JOIN, self._now + JOIN_WITHIN)
                return
            if not self._parts:
                self._timers.pop(_Timer.JOIN, None)
        self._events.append(DebugPrint(self._now, None, raw))

    def _flush_parts(self) -> None:
        for raw in self._parts.values():
            self._events.append(DebugPrint(self._now, None, raw))
        self._parts.clear()
        self._timers.pop(_Timer.JOIN, None)

    def _prompt(self, prompt: DebugIo, answer: str) -> None:
        self._flush_parts()
        payload = answer_to(prompt, answer.encode())
        self._send(_Purpose.ANSWER, PacketType.DEBUG_IO, payload)
        text = prompt.text.decode("utf-8", "backslashreplace")
        self._tell(KernelMessage(self._now, None, f"{text}{answer}"))

    def _may_answer(self, packet: Arrived) -> bool:
        """Whether the kernel would take an answer, and has not got it."""
        if not self._line.ids_agree:
            self._ask_what_it_waits_for()
            return False
        if self._line.times_sent:
            if packet.may_be_repeated and self._purpose is _Purpose.ANSWER:
                return False
            self._see_it_run()
        return True

    def _see_it_run(self) -> None:
        """The kernel does something, so what was sent to have it go on has arrived."""
        if self._line.times_sent and self._purpose is not _Purpose.REQUEST:
            self._line.take_as_acknowledged()
            self._acknowledged()
        if self._line.ids_agree and self._stop is None:
            self._finish_attaching()

    # What goes out.

    def _send(self, purpose: _Purpose, packet_type: int, payload: bytes) -> None:
        self._purpose = purpose
        self._line.send(packet_type, payload)
        self._set_timer(_Timer.RESEND, RESEND_AFTER)

    def _send_again(self) -> None:
        if self._line.times_sent >= MOST_SENDS:
            self._agree_on_ids(reset_first=True)
        elif self._line.times_sent:
            self._line.send_again()
            self._set_timer(_Timer.RESEND, RESEND_AFTER)

    def _acknowledged(self) -> None:
        self._timers.pop(_Timer.RESEND, None)
        if self._purpose is _Purpose.REQUEST:
            self._set_timer(_Timer.REPLY, REPLY_AFTER)
            return
        if self._purpose is _Purpose.GO_ON:
            self._stop = None
            self.state = KdState.RUNNING
        self._finish_attaching()

    # Ids.

    def _agree_on_ids(self, *, reset_first: bool) -> None:
        self._interrupt()
        self._line.drop()
        self._line.ids_agree = False
        self._is_attaching = True
        self._attempts = 0
        self._reset_is_next = reset_first
        self._attempt()

    def _interrupt(self) -> None:
        """What was under way with the kernel is void."""
        self._timers.pop(_Timer.RESEND, None)
        self._timers.pop(_Timer.REPLY, None)
        if self._stop is not None:
            self._stop.program = None
            self._stop.is_interrupted = True

    def _attempt(self) -> None:
        self._count_attempt()
        if self._reset_is_next:
            self._line.reset()
        else:
            self._line.break_in()
        self._reset_is_next = not self._reset_is_next
        self._set_timer(_Timer.ATTEMPT, ATTEMPT)

    def _count_attempt(self) -> None:
        self._attempts += 1
        if self._attempts == MOST_ATTEMPTS:
            self.state = KdState.LOST
            self._stops.tell_bug_check()
            seconds = f"{MOST_ATTEMPTS * ATTEMPT:g} s"
            told = f"the kernel has not answered its debugger for {seconds}"
            self._tell(KernelMessage(self._now, None, told))

    def _ask_what_it_waits_for(self) -> None:
        """It waits for us, and the ids are not known to agree."""
        self._is_attaching = True
        self._reset_is_next = True
        if not self._line.resets_under_way:
            self._attempt()
        else:
            self._timers.setdefault(_Timer.ATTEMPT, self._now + ATTEMPT)

    def _finish_attaching(self) -> None:
        self._is_attaching = False
        self._attempts = 0
        self._timers.pop(_Timer.ATTEMPT, None)
        if self._stops.break_in_is_wanted:
            self._timers.setdefault(_Timer.BREAK_IN, self._now)

    def _send_break_in(self) -> None:
        if not self._stops.break_in_is_wanted or self._stop is not None:
            return
        if self._line.ids_agree:
            self._count_attempt()
            self._line.break_in()
            self._set_timer(_Timer.BREAK_IN, ATTEMPT)
        elif not self._is_attaching:
            self._agree_on_ids(reset_first=False)

    # Stops.

    def _take_stop(self, change: StateChange, *, may_be_repeated: bool) -> None:
        self._flush_parts()
        if not self._line.ids_agree:
            self._ask_what_it_waits_for()
            return
        stop = self._stop
        is_same = stop is not None and stop.change.payload == change.payload
        if stop is None or not is_same:
            self._begin(_CurrentStop(change), is_again=False)
        elif stop.is_interrupted:
            self._begin(stop, is_again=True)
        elif stop.program is None and not stop.is_held and not may_be_repeated:
            self._begin(_CurrentStop(change), is_again=False)

    def _begin(self, stop: _CurrentStop, *, is_again: bool) -> None:
        if self._line.times_sent:
            self._line.take_as_acknowledged()
        self._interrupt()
        self._timers.pop(_Timer.BREAK_IN, None)
        self._stop = stop
        if self._stops.fatal is not None:
            self._set_timer(_Timer.BUG_CHECK, BUG_CHECK_AFTER)
        self._run(
            stop,
            self._stops.handle(stop.change, is_again=is_again, probe=self._is_attaching),
        )

    def _run(self, stop: _CurrentStop, program: Stop) -> None:
        self.state = KdState.STOPPED
        stop.program = program
        stop.is_held = stop.is_interrupted = False
        self._advance(stop, None)

    def _advance(self, stop: _CurrentStop, reply: Reply | None) -> None:
        """Have the stop's program go on with ``reply``."""
        assert stop.program is not None
        try:
            stop.request = stop.program.send(reply)
            while stop.unanswered > MOST_UNANSWERED:
                stop.request = stop.program.send(None)
        except StopIteration as end:
            stop.program = stop.request = None
            self._leave(stop, end.value)
            return
        self._send(_Purpose.REQUEST, PacketType.MANIPULATE, stop.request.payload())

    def _leave(self, stop: _CurrentStop, status: int | None) -> None:
        if status is None:
            stop.is_held = True
            self.state = KdState.HELD
            self._finish_attaching()
            return
        request = self._stops.machine.go_on(stop.change, status)
        self._send(_Purpose.GO_ON, PacketType.MANIPULATE, request.payload())

    def _take_reply(self, reply: Reply) -> None:
        stop = self._stop
        if stop is None or stop.program is None or stop.request is None:
            return
        if (reply.api, reply.processor) != (stop.request.api, stop.request.processor):
            return
        if self._line.times_sent:
            self._line.take_as_acknowledged()
            self._timers.pop(_Timer.RESEND, None)
        self._timers.pop(_Timer.REPLY, None)
        self._advance(stop, reply)

    def _miss_reply(self) -> None:
        stop = self._stop
        if stop is None or stop.program is None:
            return
        stop.unanswered += 1
        if stop.unanswered <= MOST_UNANSWERED:
            self._agree_on_ids(reset_first=True)
        else:
            self._advance(stop, None)
