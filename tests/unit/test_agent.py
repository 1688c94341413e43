"""The agent's host side, over a link that is a fake."""

from __future__ import annotations

import hashlib
import queue
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.errors import (
    AgentError,
    AgentProtocolError,
    BuildError,
    LinkError,
    NotImplementedByGuest,
)
from pytest_kdriver.guest import executable, messages
from pytest_kdriver.guest.agent import Agent, IoOutcome, IoResult, OpenResult
from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.guest.frames import MAX_BODY, Decoder, Frame, Kind, encode
from pytest_kdriver.guest.registry import RegistryValue, decode_value, encode_value
from pytest_kdriver.guest.wire import Message, from_bytes, to_bytes
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.win32error import Win32Error

Answer = Message | bytes | None

HELLO = messages.HelloReply(
    protocol=1,
    version="0.1.0",
    architecture="x86_64",
    os_major=10,
    os_minor=0,
    os_build=19045,
    wine_version=None,
    elevated=True,
    pid=4,
    operations=("hello",),
)


class FakeGuest:
    """A link whose other side answers as the test says.

    ``answers`` has for each class of request its answer: a message, raw bytes, None for no answer, or a
    function that makes one of these. What was asked is in ``requests``, with its id.
    """

    def __init__(
        self, answers: dict[type[Message], Answer | Callable[[Message], Answer]] | None = None
    ) -> None:
        self.answers: dict[type[Message], Answer | Callable[[Message], Answer]] = {
            messages.Hello: HELLO,
            **(answers or {}),
        }
        self.requests: list[tuple[int, Message]] = []
        self.closed = False
        self.deaf = False
        self.ended: str | None = None
        self._decoder = Decoder()
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def send(self, data: bytes, timeout: float) -> None:
        if self.closed:
            raise LinkError("the fake is closed")
        if self.deaf:
            raise TimeoutError("the fake is deaf")
        for frame in self._decoder.receive_data(data):
            request = from_bytes(messages.OPERATIONS[frame.operation - 1].request, frame.body)
            self.requests.append((frame.request, request))
            answer = self.answers.get(type(request), messages.Done())
            if callable(answer):
                answer = answer(request)
            if answer is not None:
                self.answer(frame.request, answer, operation=frame.operation)

    def answer(self, number: int, answer: Message | bytes, *, operation: int = 1) -> None:
        kind = Kind.ERROR if isinstance(answer, messages.Error) else Kind.REPLY
        body = answer if isinstance(answer, bytes) else to_bytes(answer)
        while len(body) > MAX_BODY:
            self.push(
                encode(
                    Frame(kind=Kind.PART, operation=operation, request=number, body=body[:MAX_BODY])
                )
            )
            body = body[MAX_BODY:]
        self.push(encode(Frame(kind=kind, operation=operation, request=number, body=body)))

    def push(self, data: bytes) -> None:
        self._inbox.put(data)

    def receive(self) -> bytes:
        return b"" if self.closed else self._inbox.get()

    def close(self) -> None:
        self.closed = True
        self._inbox.put(b"")

    def asked(self, kind: type[Message]) -> list[Message]:
        return [request for _, request in self.requests if isinstance(request, kind)]


def connect(guest: FakeGuest) -> Agent:
    return Agent.connect(guest, timeout=10)


class TestConnect:
    def test_learns_who_is_there(self) -> None:
        with connect(FakeGuest()) as agent:
            assert agent.info.os_version == (10, 0, 19045)
            assert agent.info.operations == {"hello"}
            assert not agent.closed

    def test_an_agent_of_another_version_is_refused_and_the_link_closed(self) -> None:
        hello = to_bytes(HELLO)
        guest = FakeGuest({messages.Hello: struct.pack("<I", 2) + hello[4:]})
        with pytest.raises(AgentProtocolError, match="speaks version 2"):
            connect(guest)
        assert guest.closed

    def test_what_is_no_agent_is_told_by_its_words(self) -> None:
        guest = FakeGuest({messages.Hello: None})
        guest.push(b"Microsoft Windows [Version 10.0.19045]\r\n")
        with pytest.raises(AgentProtocolError, match="Microsoft Windows"):
            connect(guest)

    def test_a_silent_agent_is_a_timeout_and_the_link_closed(self) -> None:
        guest = FakeGuest({messages.Hello: None})
        with pytest.raises(TimeoutError, match="hello"):
            Agent.connect(guest, timeout=0.01)
        assert guest.closed

    def test_a_link_that_ends_is_a_link_error(self) -> None:
        guest = FakeGuest({messages.Hello: None})
        guest.push(b"")
        with pytest.raises(LinkError, match="hello"):
            connect(guest)


class TestAnswers:
    def test_find_their_requests_in_any_order(self) -> None:
        guest = FakeGuest({messages.WaitProcess: None})
        with connect(guest) as agent:
            futures = [agent.wait_process(pid) for pid in range(3)]
            for number, request in reversed(guest.requests[1:]):
                assert isinstance(request, messages.WaitProcess)
                guest.answer(number, messages.ExitCode(exit_code=request.pid + 100))
            assert [future.result(10) for future in futures] == [100, 101, 102]

    def test_are_joined_from_their_parts(self) -> None:
        data = bytes(range(256)) * (3 << 12)  # 3 MiB
        file = messages.File(data=data, sha256=hashlib.sha256(data).digest())
        with connect(FakeGuest({messages.Get: file})) as agent:
            assert agent.get(r"C:\x") == data

    def test_that_come_late_are_dropped(self) -> None:
        guest = FakeGuest({messages.Hash: None})
        with connect(guest) as agent:
            with pytest.raises(TimeoutError, match="hash"):
                agent.hash("a", timeout=0.01)
            late = messages.OptionalHash(sha256=b"late")
            guest.answer(guest.requests[-1][0], late)
            guest.answers[messages.Hash] = messages.OptionalHash(sha256=b"in time")
            assert agent.hash("b") == b"in time"

    def test_to_nothing_that_was_asked_end_the_link(self) -> None:
        guest = FakeGuest({messages.WaitProcess: None})
        with connect(guest) as agent:
            future = agent.wait_process(1)
            guest.answer(77, messages.Done())
            with pytest.raises(AgentProtocolError, match="77"):
                future.result(10)
            assert agent.closed
            with pytest.raises(LinkError) as caught:
                agent.fence("x")
            assert isinstance(caught.value.__cause__, AgentProtocolError)

    def test_that_make_no_sense_fail_their_request_alone(self) -> None:
        with connect(FakeGuest({messages.Hash: b"\7"})) as agent:
            with pytest.raises(AgentProtocolError, match="OptionalHash"):
                agent.hash("a")
            agent.fence("x")

    def test_that_the_agent_gives_up_with_are_told(self) -> None:
        guest = FakeGuest({messages.Fence: None})
        with connect(guest) as agent:
            guest.answer(0, messages.Error(domain=0, code=0, message="a frame of 5 bytes"))
            with pytest.raises((AgentProtocolError, LinkError)) as caught:
                agent.fence("x")
            assert "5 bytes" in f"{caught.value} {caught.value.__cause__}"


class TestErrors:
    @pytest.mark.parametrize(
        ("domain", "code", "expected"),
        [
            (1, 1073, Win32Error.ERROR_SERVICE_EXISTS),
            (2, 0xC0000034, NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND),
            (0, 0, None),
        ],
    )
    def test_have_operation_code_and_subject(
        self, domain: int, code: int, expected: Win32Error | NTSTATUS | None
    ) -> None:
        error = messages.Error(domain=domain, code=code, message="create the service")
        guest = FakeGuest({messages.CreateService: error})
        told = r"create_service: .*create the service.*'echo'"
        with connect(guest) as agent, pytest.raises(AgentError, match=told) as caught:
            agent.create_service("echo", r"C:\echo.sys")
        assert caught.value.operation == "create_service"
        assert caught.value.code == expected
        assert type(caught.value.code) is type(expected)

    def test_not_implemented_is_told_as_such(self) -> None:
        code = NTSTATUS.STATUS_NOT_IMPLEMENTED
        guest = FakeGuest(
            {
                messages.Hello: replace(HELLO, wine_version="8.0"),
                messages.LoadDriver: messages.Code(code=code),
                messages.UnloadDriver: messages.Code(code=code),
                messages.SystemInformation: messages.Error(domain=2, code=code, message="ask"),
            }
        )
        with connect(guest) as agent:
            calls: list[Callable[[], object]] = [
                lambda: agent.load_driver("x"),
                lambda: agent.unload_driver("x"),
                lambda: agent.system_information(5),
            ]
            for call in calls:
                with pytest.raises(NotImplementedByGuest) as caught:
                    call()
                assert caught.value.code == code

    def test_not_implemented_is_a_driver_s_own_status_on_windows(self) -> None:
        code = NTSTATUS.STATUS_NOT_IMPLEMENTED
        guest = FakeGuest(
            {
                messages.LoadDriver: messages.Code(code=code),
                messages.UnloadDriver: messages.Code(code=code),
                messages.SystemInformation: messages.Error(domain=2, code=code, message="ask"),
            }
        )
        with connect(guest) as agent:
            assert agent.load_driver("x") is code
            assert agent.unload_driver("x") is code
            with pytest.raises(NotImplementedByGuest):
                agent.system_information(5)

    def test_codes_that_are_answers_are_no_errors(self) -> None:
        guest = FakeGuest(
            {
                messages.StartService: messages.Code(code=1053),
                messages.StopService: messages.Code(code=1062),
                messages.LoadDriver: messages.Code(code=0xC0000034),
            }
        )
        with connect(guest) as agent:
            assert agent.start_service("x") is Win32Error.ERROR_SERVICE_REQUEST_TIMEOUT
            assert agent.submit_start("x").result(10) is Win32Error.ERROR_SERVICE_REQUEST_TIMEOUT
            assert agent.stop_service("x") is Win32Error.ERROR_SERVICE_NOT_ACTIVE
            assert agent.submit_stop("x").result(10) is Win32Error.ERROR_SERVICE_NOT_ACTIVE
            assert agent.load_driver("x") is NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND


class TestTheEndOfTheLink:
    def test_fails_all_that_waits_and_all_that_comes(self) -> None:
        guest = FakeGuest({messages.WaitProcess: None})
        agent = connect(guest)
        futures = [agent.wait_process(pid) for pid in range(5)]
        guest.push(b"")
        for future in futures:
            with pytest.raises(LinkError, match="wait_process"):
                future.result(10)
        assert agent.closed
        assert guest.closed
        with pytest.raises(LinkError, match="has ended"):
            agent.processes()
        agent.close()

    def test_by_close_does_the_same_and_ends_the_thread(self) -> None:
        others = set(threading.enumerate())
        agent = connect(FakeGuest({messages.WaitProcess: None}))
        future = agent.wait_process(1)
        agent.close()
        agent.close()
        assert isinstance(future.exception(0), LinkError)
        assert set(threading.enumerate()) <= others

    def test_may_come_from_a_callback(self) -> None:
        guest = FakeGuest({messages.WaitProcess: None})
        agent = connect(guest)
        closed = threading.Event()

        def close(_: object) -> None:
            agent.close()
            closed.set()

        agent.wait_process(1).add_done_callback(close)
        guest.answer(guest.requests[-1][0], messages.ExitCode(exit_code=0))
        assert closed.wait(10)
        agent.close()
        assert agent.closed

    def test_a_deaf_agent_is_a_timeout(self) -> None:
        guest = FakeGuest()
        with connect(guest) as agent:
            guest.deaf = True
            with pytest.raises(TimeoutError):
                agent.fence("x")
            guest.deaf = False
            agent.fence("x")


class FakePort(FakeGuest):
    """The same at a port, which survives the end of its session."""

    def __init__(
        self, answers: dict[type[Message], Answer | Callable[[Message], Answer]] | None = None
    ) -> None:
        super().__init__(answers)
        self.suspended = False
        self.failure: Exception | None = None

    def receive(self) -> bytes:
        return b"" if self.suspended else super().receive()

    def suspend(self) -> None:
        self.suspended = True
        self.push(b"")

    def resync(self, timeout: float) -> None:
        if self.failure:
            raise self.failure
        self.suspended = False
        self._decoder = Decoder()
        self._inbox = queue.SimpleQueue()


class TestResume:
    def test_fails_what_waits_and_greets_anew(self) -> None:
        guest = FakePort({messages.WaitProcess: None})
        with connect(guest) as agent:
            futures = [agent.wait_process(pid) for pid in range(3)]
            assert agent.pending == 3
            guest.answers[messages.Hello] = replace(HELLO, pid=5)
            agent.resume(timeout=10)
            assert agent.pending == 0
            for future in futures:
                with pytest.raises(LinkError, match="wait_process: the guest was put back"):
                    future.result(0)
            assert agent.info.pid == 5
            agent.fence("x")

    def test_forgets_half_a_frame(self) -> None:
        guest = FakePort()
        with connect(guest) as agent:
            guest.push(b"\x10\0\0\0\1\3half")
            agent.resume(timeout=10)
            agent.fence("x")

    def test_is_no_matter_of_links_that_end_with_the_guest(self) -> None:
        with connect(FakeGuest()) as agent, pytest.raises(TypeError, match="FakeGuest .* anew"):
            agent.resume(timeout=10)

    def test_of_a_link_that_has_ended_is_a_link_error(self) -> None:
        guest = FakePort()
        with connect(guest) as agent:
            guest.ended = "the virtual machine's port is gone"
            guest.push(b"")
            agent._reader.join()
            with pytest.raises(
                LinkError, match="resume: the link to the agent has ended"
            ) as caught:
                agent.resume(timeout=10)
            assert "port is gone" in str(caught.value.__cause__)

    @pytest.mark.parametrize("failure", [TimeoutError("no agent answered"), LinkError("gone")])
    def test_that_fails_is_the_end(self, failure: Exception) -> None:
        guest = FakePort()
        with connect(guest) as agent:
            guest.failure = failure
            with pytest.raises(type(failure), match=str(failure)):
                agent.resume(timeout=10)
            assert agent.closed
            assert guest.closed

    def test_that_nobody_greets_is_the_end(self) -> None:
        guest = FakePort()
        with connect(guest) as agent:
            guest.answers[messages.Hello] = None
            with pytest.raises(TimeoutError, match="hello"):
                agent.resume(timeout=0.05)
            assert agent.closed

    def test_is_refused_in_a_callback(self) -> None:
        guest = FakePort({messages.WaitProcess: None})
        errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

        def resume(_: object) -> None:
            try:
                agent.resume(timeout=10)
            except RuntimeError as error:
                errors.put(error)

        with connect(guest) as agent:
            agent.wait_process(1).add_done_callback(resume)
            guest.answer(guest.requests[-1][0], messages.ExitCode(exit_code=0))
            assert "callback" in str(errors.get(timeout=10))
            agent.fence("x")


class TestTheClock:
    def test_is_told_in_seconds_since_1970(self) -> None:
        guest = FakeGuest({messages.Clock: messages.FileTime(time=133_801_632_001_234_567)})
        with connect(guest) as agent:
            assert agent.clock() == pytest.approx(1_735_689_600.1234567)

    def test_is_set_by_windows_itself(self) -> None:
        guest = FakeGuest()
        with connect(guest) as agent:
            agent.set_clock(1_735_689_600.5)
        assert guest.asked(messages.SetClock) == [messages.SetClock(time=133_801_632_005_000_000)]

    def wine(self, clock: float, *, stderr: bytes = b"") -> FakeGuest:
        done = messages.Completed(
            exit_code=None, stdout=b"", stderr=stderr, timed_out=False, truncated=False
        )
        ticks = round((clock + 11_644_473_600) * 10_000_000)
        return FakeGuest(
            {
                messages.Hello: replace(HELLO, wine_version="8.0"),
                messages.Run: done,
                messages.Clock: messages.FileTime(time=ticks),
            }
        )

    def test_is_set_by_date_on_wine(self) -> None:
        guest = self.wine(1_735_689_601)
        with connect(guest) as agent:
            agent.set_clock(1_735_689_600.5)
        (run,) = guest.asked(messages.Run)
        assert isinstance(run, messages.Run)
        assert run.command_line == r"Z:\bin\date -u -s @1735689600.500"
        assert guest.asked(messages.SetClock) == []

    def test_that_does_not_take_it_is_an_error(self) -> None:
        told = b"date: cannot set date: Operation not permitted\n"
        guest = self.wine(1_735_689_590, stderr=told)
        with connect(guest) as agent, pytest.raises(AgentError, match=r"-10\.\d s off .*permitted"):
            agent.set_clock(1_735_689_600, timeout=0.2)


class TestPut:
    def guest(self, **data: Answer) -> FakeGuest:
        return FakeGuest(
            {
                messages.PutBegin: messages.Upload(upload=3),
                messages.PutData: data.get("data", messages.Done()),
            }
        )

    @pytest.mark.parametrize("size", [0, 1, 512 << 10, (3 << 20) + 1])
    def test_sends_all_of_it_and_its_hash(self, size: int, tmp_path: Path) -> None:
        content = bytes(range(251)) * (size // 251 + 1)
        content = content[:size]
        (tmp_path / "file").write_bytes(content)
        for source in (content, tmp_path / "file"):
            guest = self.guest()
            with connect(guest) as agent:
                agent.put(source, r"C:\x")
            pieces = guest.asked(messages.PutData)
            assert b"".join(p.data for p in pieces if isinstance(p, messages.PutData)) == content
            digest = hashlib.sha256(content).digest()
            assert guest.asked(messages.PutEnd) == [messages.PutEnd(upload=3, sha256=digest)]
            assert guest.asked(messages.PutAbort) == []

    def test_that_fails_removes_what_it_began(self) -> None:
        full = messages.Error(domain=1, code=112, message="write the file")
        guest = self.guest(data=full)
        with connect(guest) as agent, pytest.raises(AgentError, match="ERROR_DISK_FULL"):
            agent.put(b"x", r"C:\x")
        assert guest.asked(messages.PutAbort) == [messages.PutAbort(upload=3)]
        assert guest.asked(messages.PutEnd) == []

    def test_that_times_out_removes_what_it_began(self) -> None:
        guest = self.guest(data=None)
        with connect(guest) as agent, pytest.raises(TimeoutError, match="put_data"):
            agent.put(b"x", r"C:\x", timeout=0.05)
        assert guest.asked(messages.PutAbort) == [messages.PutAbort(upload=3)]

    def test_of_a_file_that_is_not_there_asks_nothing(self, tmp_path: Path) -> None:
        guest = self.guest()
        with connect(guest) as agent, pytest.raises(FileNotFoundError):
            agent.put(tmp_path / "nowhere", r"C:\x")
        assert guest.asked(messages.PutBegin) == []


def test_a_get_that_arrives_changed_is_an_error() -> None:
    file = messages.File(data=b"changed", sha256=hashlib.sha256(b"sent").digest())
    guest = FakeGuest({messages.Get: file})
    with connect(guest) as agent, pytest.raises(AgentError, match="did not arrive"):
        agent.get(r"C:\x")


class TestRun:
    completed = messages.Completed(
        exit_code=0, stdout=b"", stderr=b"", timed_out=False, truncated=False
    )

    # The examples of Microsoft's page on CommandLineToArgvW, turned round.
    @pytest.mark.parametrize(
        ("command", "line"),
        [
            (["a.exe", "b c", "d"], 'a.exe "b c" d'),
            (["a.exe", 'b"c', "d"], r"a.exe b\"c d"),
            (["a.exe", r"a\\b", "d e"], r'a.exe a\\b "d e"'),
            (["a.exe", 'a\\"b'], r"a.exe a\\\"b"),
            (["a.exe", "a b\\"], 'a.exe "a b\\\\"'),
            (["a.exe", ""], 'a.exe ""'),
        ],
    )
    def test_quotes_the_command(self, command: Sequence[str], line: str) -> None:
        guest = FakeGuest({messages.Run: self.completed})
        with connect(guest) as agent:
            agent.run(command, stdin=b"\0", directory=r"C:\x", time_limit=1.5)
        (request,) = guest.asked(messages.Run)
        assert isinstance(request, messages.Run)
        assert (request.command_line, request.time_limit) == (line, 1500)
        assert (request.stdin, request.directory) == (b"\0", r"C:\x")

    def test_refuses_what_can_t_be_sent(self) -> None:
        with connect(FakeGuest()) as agent:
            with pytest.raises(ValueError, match="time limit"):
                agent.run(["x"], time_limit=-1)
            with pytest.raises(ValueError, match="fit into a frame"):
                agent.run(["x"], stdin=bytes(1 << 20))
            agent.fence("still there")


class TestDevices:
    def test_calls_are_answered_with_all_that_came_of_them(self) -> None:
        ended = messages.IoEnded(status=0x80000005, outcome=1, count=9, data=b"data")
        guest = FakeGuest(
            {
                messages.Ioctl: ended,
                messages.ReadDevice: replace(ended, outcome=0),
                messages.WriteDevice: replace(ended, outcome=2, status=0x103),
            }
        )
        with connect(guest) as agent:
            controlled = agent.ioctl(5, 0x222000, b"in", 4, time_limit=1.5)
            assert controlled == IoResult(
                status=NTSTATUS.STATUS_BUFFER_OVERFLOW,
                data=b"data",
                count=9,
                outcome=IoOutcome.CANCELLED,
            )
            assert agent.read_device(5, 4, time_limit=0).outcome is IoOutcome.COMPLETED
            written = agent.write_device(5, b"in", time_limit=1)
            assert (written.status, written.outcome) == (0x103, IoOutcome.STUCK)
            agent.close_device(5)
        assert [request for _, request in guest.requests[1:]] == [
            messages.Ioctl(device=5, code=0x222000, data=b"in", output_size=4, time_limit=1500),
            messages.ReadDevice(device=5, length=4, time_limit=0),
            messages.WriteDevice(device=5, data=b"in", time_limit=1000),
            messages.CloseDevice(device=5),
        ]

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ((0, 0, 7), OpenResult(status=NTSTATUS(0), device=7, outcome=IoOutcome.COMPLETED)),
            (
                (0xC0000034, 0, 0),
                OpenResult(
                    status=NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND,
                    device=None,
                    outcome=IoOutcome.COMPLETED,
                ),
            ),
            (
                (0x103, 2, 0),
                OpenResult(status=NTSTATUS(0x103), device=None, outcome=IoOutcome.STUCK),
            ),
        ],
        ids=["open", "not-there", "stuck"],
    )
    def test_are_open_or_not(self, answer: tuple[int, int, int], expected: OpenResult) -> None:
        status, outcome, device = answer
        opened = messages.DeviceOpened(status=status, outcome=outcome, device=device)
        with connect(FakeGuest({messages.OpenDevice: opened})) as agent:
            assert agent.open_device(r"\??\echo", time_limit=1) == expected

    def test_calls_that_can_t_be_are_refused(self) -> None:
        with connect(FakeGuest()) as agent:
            for time_limit in (-1, 1 << 22, float("nan")):
                with pytest.raises(ValueError, match="time limit"):
                    agent.read_device(1, 4, time_limit=time_limit)
            with pytest.raises(ValueError, match="fit into a frame"):
                agent.write_device(1, bytes(1 << 20), time_limit=1)
            with pytest.raises(ValueError, match="can't be sent"):
                agent.ioctl(1, 1 << 32, b"", 0, time_limit=1)
            agent.fence("still there")

    def test_an_outcome_that_is_none_is_told(self) -> None:
        ended = messages.IoEnded(status=0, outcome=3, count=0, data=b"")
        guest = FakeGuest({messages.Ioctl: ended})
        with connect(guest) as agent, pytest.raises(AgentProtocolError, match="3 is no outcome"):
            agent.ioctl(1, 1, b"", 0, time_limit=1)


class TestRegistryValues:
    @pytest.mark.parametrize(
        ("value", "kind", "data"),
        [
            (5, 4, b"\5\0\0\0"),
            (0xC00000A1, 4, b"\xa1\0\0\xc0"),
            (-1, 4, b"\xff\xff\xff\xff"),
            (-0x80000000, 4, b"\0\0\0\x80"),
            (1 << 32, 11, b"\0\0\0\0\1\0\0\0"),
            ("ü", 1, b"\xfc\0\0\0"),
            (b"\0\xff", 3, b"\0\xff"),
            (["a", "b"], 7, b"a\0\0\0b\0\0\0\0\0"),
            ([], 7, b"\0\0"),
        ],
    )
    def test_have_the_type_that_fits(self, value: RegistryValue, kind: int, data: bytes) -> None:
        assert encode_value(value) == (kind, data)

    text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))

    @given(st.integers(0, (1 << 64) - 1) | st.binary() | text | st.lists(text.filter(bool)))
    def test_come_back(self, value: RegistryValue) -> None:
        assert decode_value(*encode_value(value)) == value

    @given(st.integers(0, 20), st.binary(max_size=30))
    def test_of_any_type_and_bytes_can_be_read(self, kind: int, data: bytes) -> None:
        assert isinstance(decode_value(kind, data), int | str | bytes | list)

    @pytest.mark.parametrize("value", [1 << 64, -0x80000001, "a\0b", ["a", ""], ["a\0"]])
    def test_that_the_registry_can_t_keep_are_refused(self, value: RegistryValue) -> None:
        with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
            encode_value(value)

    @pytest.mark.parametrize("value", [None, 1.5, True, [1], {"a"}])
    def test_of_another_type_are_refused(self, value: object) -> None:
        with pytest.raises(TypeError, match="it takes int, str, bytes, or a sequence of str"):
            encode_value(value)  # type: ignore[arg-type]


def test_many_threads_may_ask_at_a_time() -> None:
    def echo(request: Message) -> Message:
        assert isinstance(request, messages.Hash)
        return messages.OptionalHash(sha256=request.path.encode())

    with connect(FakeGuest({messages.Hash: echo})) as agent, ThreadPoolExecutor(8) as pool:
        paths = [str(number) for number in range(1000)]
        assert list(pool.map(agent.hash, paths)) == [path.encode() for path in paths]


class TestExecutable:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def test_a_wheel_s_own_is_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(executable, "PACKAGED", tmp_path)
        (tmp_path / "kdagent.exe").touch()
        assert AGENT.executable() == tmp_path / "kdagent.exe"

    def test_without_source_it_says_where_it_looked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(executable, "SOURCE", tmp_path / "nowhere")
        with pytest.raises(BuildError, match="nowhere"):
            AGENT.executable()

    def test_a_build_that_fails_shows_cargo_s_output(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
    ) -> None:
        (tmp_path / "Cargo.toml").write_text("what is this")
        monkeypatch.setattr(executable, "SOURCE", tmp_path)
        with pytest.raises(BuildError, match="what is this") as caught:
            AGENT.executable()
        assert "Cargo.toml" in caught.value.output
        assert not list(cache.rglob("*.exe"))
