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

ACKNOWLEDGE_WITHIN: Final = 1.0
"""Seconds without an acknowledgement, after which the kernel is asked to repeat what it said."""
MOST_ASKED: Final = 2
"""Times that it is asked; behind that the ids are agreed on anew."""
MOST_SENDS: Final = 4
"""Times that one packet of ours is sent, where the kernel asks for it; behind that the same."""
REPLY_AFTER: Final = 3.0
"""Seconds in which a request that was acknowledged is answered."""
MOST_UNANSWERED: Final = 5
"""Requests of one stop; behind that the kernel goes on without more of them."""
ATTEMPT: Final = 2.0
"""Seconds for which a break-in or a RESET is waited for: a kernel that is stopped looks for one at a time."""
MOST_ATTEMPTS: Final = 10
"""Behind so many without an answer the kernel counts as lost; it is still tried."""
UNSURE_FOR: Final = 5.0
"""Seconds after a damaged packet or a missed acknowledgement, in which more of that may be on its way."""
CONFIRM_AFTER: Final = 1.0
MOST_CONFIRMATIONS: Final = 3
"""How often, and behind how many seconds, a kernel that says nothing is then asked whether it waits."""
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
    ACKNOWLEDGE = auto()
    CONFIRM = auto()
    REPLY = auto()
    ATTEMPT = auto()
    BREAK_IN = auto()
    JOIN = auto()
    BUG_CHECK = auto()


@dataclass(slots=True)
class _Wait:
    """What the kernel said before it waited for us: a stop, or a question."""

    packet: Arrived
    change: StateChange | None = None
    """Of a stop."""
    program: Stop | None = None
    """Of a stop, while something is asked."""
    request: Request | None = None
    unanswered: int = 0
    is_held: bool = False
    is_interrupted: bool = False
    """The kernel says it again, and it is to be handled again."""
    told: str = ""
    """A prompt and its answer, until the kernel has that."""


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
        self.was_heard = False
        """Whether anything was, since ``attach``: a kernel that was not has no debugging, perhaps."""
        self.statistics = Statistics()
        self._answer = answer
        self._now = 0.0
        self._events: list[Event] = []
        self._timers: dict[_Timer, float] = {}
        self._parts: dict[int, bytes] = {}
        self._stops = Stops(tell=self._tell, hold_bug_checks=hold_bug_checks)
        self._wait: _Wait | None = None
        self._last_wait: _Wait | None = None
        """The one that is over, until something else is heard."""
        self._line = Line(self.statistics)
        self._is_attaching = False
        self._attempts = 0
        self._reset_is_next = False
        self._asked = 0
        self._is_asked_again = False
        self._unsure_until = 0.0
        self._confirmations = 0
        self._repetition_is_due = False
        self._due: dict[_Timer, Callable[[], None]] = {
            _Timer.STALL: self._give_up_packet,
            _Timer.ACKNOWLEDGE: self._miss_acknowledgement,
            _Timer.CONFIRM: self._confirm,
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
        self._forget_kernel()
        self._timers.clear()
        self._line.start_over()
        self._stops.break_in_is_wanted = False
        self.state = KdState.SILENT
        self.was_heard = False
        self._agree_on_ids(reset_first=False)

    def break_in(self, now: float) -> None:
        """Stop the kernel, tell a ``ProcessorState`` of each processor, and let it go on.

        One that is held is asked at once, and stays.
        """
        self._now = self._stops.now = now
        self._stops.break_in_is_wanted = True
        wait = self._wait
        if wait is not None and wait.change is not None and wait.is_held:
            self._run(wait, self._stops.look_around(wait.change))
        elif _Timer.BREAK_IN not in self._timers:
            self._send_break_in()

    def end_of_boot(self) -> None:
        """From here on breakpoints and assertions are events."""
        self._stops.boot_is_over = True

    def go_on(self, now: float) -> None:
        """In ``HELD``: let the kernel write its dump and reboot."""
        self._now = self._stops.now = now
        wait = self._wait
        if wait is not None and wait.change is not None and wait.is_held:
            self._run(wait, self._stops.leave(wait.change))

    def _tell(self, event: Event) -> None:
        self._events.append(event)

    def _set_timer(self, timer: _Timer, seconds: float) -> None:
        self._timers[timer] = self._now + seconds

    # What comes in.

    def _take(self, incoming: Iterable[Incoming]) -> None:
        asked = self.statistics.resends_sent
        for one in incoming:
            if self.state is KdState.SILENT or self.state is KdState.LOST:
                self._come_back()
            if type(one) is Arrived:
                self._take_packet(one)
            elif one is Signal.ACKNOWLEDGED:
                self._acknowledged()
            elif one is Signal.RESEND:
                self._is_asked_again = True
            elif one is Signal.RESET:
                self._interrupt()
                self._await_repetition()
            elif one is Signal.EARLIER_RESET:
                self._repetition_is_due = True
            elif one is Signal.SYNC:
                self._interrupt()
                self._forget_kernel()
                self._stops.images.clear()
                self._finish_attaching()
        if self._is_asked_again:  # and what came behind that did not say that it has arrived
            self._send_again()
        if self.statistics.resends_sent != asked:
            self._doubt()
        if self._line.is_within_packet:
            self._set_timer(_Timer.STALL, STALL)
        else:
            self._timers.pop(_Timer.STALL, None)

    def _come_back(self) -> None:
        self._attempts = 0
        self.was_heard = True
        self.state = KdState.RUNNING
        if self._wait is not None and self._wait.change is not None:
            self.state = KdState.HELD if self._wait.is_held else KdState.STOPPED

    def _give_up_packet(self) -> None:
        self._take(self._line.give_up_packet())

    def _forget_kernel(self) -> None:
        """It is another from here on."""
        self._flush_parts()
        self._stops.tell_bug_check()
        self._stops.forget_bug_check()
        self._wait = self._last_wait = None
        self._repetition_is_due = False

    def _take_packet(self, packet: Arrived) -> None:
        kind, payload = packet
        if kind == PacketType.DEBUG_IO:
            text = read_debug_io(payload)
            if text is not None and text.api == PRINT_STRING:
                self._print(text)
            elif text is not None and text.api == GET_STRING:
                self._take_wait(_Wait(packet))
        elif kind == PacketType.STATE_CHANGE:
            change = read_state_change(payload)
            if change is not None:
                self._take_wait(_Wait(packet, change))
        elif kind == PacketType.MANIPULATE:
            self._repetition_is_due = False  # it was lost
            reply = read_reply(payload)
            if reply is not None:
                self._take_reply(reply)
        elif kind in {PacketType.FILE_IO, PacketType.CONTROL_REQUEST}:
            self._take_wait(_Wait(packet))

    # Prints.

    def _print(self, text: DebugIo) -> None:
        self.statistics.prints += 1
        if self._wait is not None or self._last_wait is not None or self._is_attaching:
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

    def _see_it_run(self) -> None:
        """The kernel runs, so what was sent to have it go on has arrived."""
        wait = self._wait
        if wait is not None and wait.program is None and not wait.is_held:
            if self._line.times_sent:
                self._line.take_as_acknowledged()
            self._timers.pop(_Timer.ACKNOWLEDGE, None)
            self._finish_wait(wait)
        if self._wait is None:
            self._last_wait = None
            self._timers.pop(_Timer.CONFIRM, None)
            if self._line.ids_agree:
                self._finish_attaching()

    # What the kernel waits with.

    def _take_wait(self, wait: _Wait) -> None:
        """The kernel waits for us; it may have said why before."""
        self._flush_parts()
        if not self._line.ids_agree:
            self._ask_what_it_waits_for()
            return
        known = self._wait or self._last_wait
        is_due, self._repetition_is_due = self._repetition_is_due, False
        if known is None or known.packet != wait.packet:
            self._begin(wait, is_again=False)
        elif known.is_interrupted:
            self._begin(known, is_again=True)
        elif is_due:
            return
        elif known.program is not None:
            self._send_again()
        elif not known.is_held and self._now < self._unsure_until:
            self._wait = known
            self._agree_on_ids(reset_first=True)
        elif not known.is_held:
            self._begin(wait, is_again=False)

    def _begin(self, wait: _Wait, *, is_again: bool) -> None:
        if self._line.times_sent:
            self._line.take_as_acknowledged()
        if self._wait is not None and not is_again:
            self._finish_wait(self._wait)
        self._interrupt()
        for timer in (_Timer.CONFIRM, _Timer.BREAK_IN, _Timer.ATTEMPT):
            self._timers.pop(timer, None)
        self._wait, self._last_wait = wait, None
        if wait.change is None:
            wait.is_interrupted = False
            self._send(wait.packet.type, self._answer_to(wait, is_again=is_again))
            return
        if self._stops.fatal is not None:
            self._set_timer(_Timer.BUG_CHECK, BUG_CHECK_AFTER)
        probe = self._is_attaching
        self._run(wait, self._stops.handle(wait.change, is_again=is_again, probe=probe))

    def _answer_to(self, wait: _Wait, *, is_again: bool) -> bytes:
        kind, payload = wait.packet
        if kind == PacketType.FILE_IO:
            return refusal_of_file(payload)
        prompt = read_debug_io(payload) if kind == PacketType.DEBUG_IO else None
        if prompt is None:
            return answer_to_control_request(payload)
        text = prompt.text.decode("utf-8", "backslashreplace")
        answer = self._answer(text)
        if not is_again:
            wait.told = f"{text}{answer}"
        return answer_to(prompt, answer.encode())

    def _run(self, wait: _Wait, program: Stop) -> None:
        self.state = KdState.STOPPED
        wait.program = program
        wait.is_held = wait.is_interrupted = False
        self._advance(wait, program, None)

    def _advance(self, wait: _Wait, program: Stop, reply: Reply | None) -> None:
        """Have the stop's program go on with ``reply``."""
        try:
            request = program.send(reply)
            while wait.unanswered > MOST_UNANSWERED:
                request = program.send(None)
        except StopIteration as end:
            wait.program = wait.request = None
            self._leave(wait, end.value)
            return
        wait.request = request
        self._send(PacketType.MANIPULATE, request.payload())

    def _leave(self, wait: _Wait, status: int | None) -> None:
        assert wait.change is not None
        if self._stops.fatal is None:
            self._timers.pop(_Timer.BUG_CHECK, None)
        if status is None:
            wait.is_held = True
            self.state = KdState.HELD
            self._finish_attaching()
        else:
            request = self._stops.machine.go_on(wait.change, status)
            self._send(PacketType.MANIPULATE, request.payload())

    def _take_reply(self, reply: Reply) -> None:
        wait = self._wait
        if wait is not None and wait.is_interrupted and self._line.ids_agree:
            self._begin(wait, is_again=True)  # it repeated this, and takes requests now
            return
        if wait is None or wait.program is None or wait.request is None:
            return
        if (reply.api, reply.processor) != (wait.request.api, wait.request.processor):
            return
        if self._line.times_sent:
            self._line.take_as_acknowledged()
            self._timers.pop(_Timer.ACKNOWLEDGE, None)
        self._timers.pop(_Timer.REPLY, None)
        self._advance(wait, wait.program, reply)

    def _miss_reply(self) -> None:
        wait = self._wait
        if wait is None or wait.program is None:
            return
        wait.unanswered += 1
        if wait.unanswered <= MOST_UNANSWERED:
            self._agree_on_ids(reset_first=True)
        else:
            self._advance(wait, wait.program, None)

    def _finish_wait(self, wait: _Wait) -> None:
        """The kernel has what it waited for."""
        if wait.told:
            self._tell(KernelMessage(self._now, None, wait.told))
        wait.told = ""
        self._wait, self._last_wait = None, wait
        self.state = KdState.RUNNING

    def _confirm(self) -> None:
        """Ask a kernel whether it still waits: it may have dropped what it acknowledged."""
        self._line.ask_to_repeat()
        self._doubt()
        self._confirmations += 1
        if self._confirmations < MOST_CONFIRMATIONS:
            self._set_timer(_Timer.CONFIRM, CONFIRM_AFTER)

    # What goes out.

    def _send(self, packet_type: int, payload: bytes) -> None:
        self._line.send(packet_type, payload)
        self._set_timer(_Timer.ACKNOWLEDGE, ACKNOWLEDGE_WITHIN)
        self._asked = 0
        self._is_asked_again = False

    def _doubt(self) -> None:
        self._unsure_until = self._now + UNSURE_FOR

    def _miss_acknowledgement(self) -> None:
        """Have the kernel repeat what it said.

        Where ours was lost, that is why it waits, and ours is sent again. Where the acknowledgement was lost,
        it runs; or it waits for that of something new, which then comes again. Ours must not: the kernel
        would take any data packet for the acknowledgement (kddll.c).
        """
        if self._asked == MOST_ASKED:
            self._agree_on_ids(reset_first=True)
            return
        self._asked += 1
        self._line.ask_to_repeat()
        self._doubt()
        self._set_timer(_Timer.ACKNOWLEDGE, ACKNOWLEDGE_WITHIN)

    def _send_again(self) -> None:
        self._is_asked_again = False
        self._doubt()
        if self._line.times_sent >= MOST_SENDS:
            self._agree_on_ids(reset_first=True)
        elif self._line.times_sent:
            self._line.send_again()
            self._set_timer(_Timer.ACKNOWLEDGE, ACKNOWLEDGE_WITHIN)

    def _acknowledged(self) -> None:
        self._timers.pop(_Timer.ACKNOWLEDGE, None)
        wait = self._wait
        if wait is None:
            return
        if wait.program is not None:
            self._set_timer(_Timer.REPLY, REPLY_AFTER)
            return
        self._finish_wait(wait)
        self._finish_attaching()
        if self._now < self._unsure_until:
            self._confirmations = 0
            self._set_timer(_Timer.CONFIRM, CONFIRM_AFTER)

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
        self._timers.pop(_Timer.ACKNOWLEDGE, None)
        self._timers.pop(_Timer.REPLY, None)
        if self._wait is not None:
            self._wait.program = None
            self._wait.is_interrupted = True

    def _await_repetition(self) -> None:
        """It is going to say again what it waits for, if it does; where that is lost, it is asked again."""
        if self._wait is not None and not self._wait.is_held:
            self._is_attaching = self._reset_is_next = True
            self._timers.setdefault(_Timer.ATTEMPT, self._now + ATTEMPT)

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
        if not self._stops.break_in_is_wanted or self._wait is not None:
            return
        if self._line.ids_agree:
            self._count_attempt()
            self._line.break_in()
            self._set_timer(_Timer.BREAK_IN, ATTEMPT)
        elif not self._is_attaching:
            self._agree_on_ids(reset_first=False)
