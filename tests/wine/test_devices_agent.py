"""Calls of devices by the agent, on a C driver that answers at once, later, or never."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import AgentError, LinkError, TargetError
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.agent import Agent, IoOutcome, IoResult
from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.guest.frames import Decoder, Frame, Kind, encode
from pytest_kdriver.guest.links.process import ProcessLink
from pytest_kdriver.guest.wire import Message, from_bytes, to_bytes
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.kernel.events import DriverInitCalled
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.wine import WineTarget
from tests.wine.c_drivers.build import Linker, Variant, build_probe
from tests.wine.test_framework import CHECKS

DRIVERS = Path(__file__).parents[2] / "drivers" / "Cargo.toml"
PATH = r"\??\probe"
INVERT, FAIL, PEND, KEEP, GIVE_BACK, TIMER, WORK, HANG, POOL, LOOKASIDE, CREATES = (
    0x22 << 16 | (0x800 + function) << 2 for function in range(11)
)
ALL_BYTES = bytes(range(256))
PATIENCE = 30.0
MOST_WAITING = 64
"""So many requests may wait at a time for drivers and programs."""

GRACE = 2.0
"""So long, in seconds, a call may take to end after it was cancelled."""

SOON = 0.1
"""A time limit, in seconds, for what shall not be over before it."""

DEVICE_GONE = NTSTATUS.STATUS_FILE_DELETED
"""What Wine ends a device's calls with when the process that its driver runs in has ended."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_probe(Variant(linker=Linker.LD), tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def target() -> Iterator[WineTarget]:
    try:
        target = WineTarget(TargetConfig(name="wine", kind="wine"))
    except TargetError as error:
        pytest.skip(str(error))
    try:
        yield target
    finally:
        target.close()


@pytest.fixture
def driver(target: WineTarget, image: Path) -> Iterator[Driver]:
    """The driver, running."""
    target.repair()
    driver = Driver(target, image, name="probe", leaks="allow")
    driver.start()
    yield driver
    driver.finish()


@pytest.fixture
def agent(target: WineTarget, driver: Driver) -> Iterator[Agent]:
    """The agent, which each test leaves in good health."""
    assert driver.loaded
    agent = target.agent
    yield agent
    agent.fence("still there")


@pytest.fixture
def own_agent(target: WineTarget, driver: Driver) -> Iterator[Agent]:
    """One that nobody else asks for anything."""
    assert driver.loaded
    with Agent.connect(own_link(target), timeout=PATIENCE) as agent:
        yield agent


@pytest.fixture
def device(agent: Agent) -> int:
    return opened(agent)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


def own_link(target: WineTarget) -> ProcessLink:
    """To an agent of its own."""
    wine = prefix.find_wine()
    return ProcessLink(
        [wine.loader, str(AGENT.executable())],
        env=wine.environment(target.prefix, "-all"),
        cwd=target.prefix,
    )


def opened(agent: Agent) -> int:
    """A device that was just opened."""
    result = agent.open_device(PATH, time_limit=PATIENCE)
    assert result.status is NTSTATUS.STATUS_SUCCESS
    assert result.outcome is IoOutcome.COMPLETED
    assert result.device is not None
    return result.device


def control(
    agent: Agent,
    device: int,
    code: int,
    data: bytes = b"",
    output_size: int = 0,
    *,
    time_limit: float = PATIENCE,
) -> IoResult:
    return agent.ioctl(device, code, data, output_size, time_limit=time_limit)


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


def end_process(agent: Agent, driver: Driver) -> None:
    """End the process that the driver runs in. Its target is a new one for the next test."""
    driver.abandon()
    agent.terminate(next(driver.window.of(DriverInitCalled)).process)


class TestOpening:
    def test_by_each_of_its_names_and_more_than_once(self, agent: Agent) -> None:
        paths = [PATH, r"\??\PROBE", r"\Device\Probe"]
        devices = [agent.open_device(path, time_limit=PATIENCE).device for path in paths]
        assert None not in devices
        assert len(set(devices)) == 3

    @pytest.mark.parametrize(
        ("path", "status"),
        [
            (r"\??\nowhere", NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND),
            ("probe", NTSTATUS.STATUS_OBJECT_PATH_SYNTAX_BAD),
        ],
        ids=["no-such", "no-path"],
    )
    def test_what_is_not_there_is_answered_with_the_status(
        self, agent: Agent, path: str, status: NTSTATUS
    ) -> None:
        result = agent.open_device(path, time_limit=PATIENCE)
        assert (result.status, result.device) == (status, None)

    @pytest.mark.parametrize("path", ["\\??\\" + "x" * 40_000, "\\??\\a\0b"], ids=["long", "nul"])
    def test_what_can_t_be_a_path_is_refused(self, agent: Agent, path: str) -> None:
        with pytest.raises(AgentError) as caught:
            agent.open_device(path, time_limit=PATIENCE)
        assert caught.value.code is None

    def test_is_bounded_and_closing_makes_room(self, agent: Agent) -> None:
        devices: list[int] = []
        with suppress(AgentError):
            while len(devices) < 1000:
                devices.append(opened(agent))
        assert len(devices) < 1000
        with pytest.raises(AgentError, match="too many devices are open"):
            opened(agent)
        for device in devices:
            agent.close_device(device)
        # Behind all of them: Wine crashes where the driver goes with a close on its way to it.
        assert control(agent, opened(agent), INVERT, b"\0", 1).data == b"\xff"

    def test_does_not_wait_for_the_driver_on_wine(
        self, agent: Agent, device: int, driver: Driver
    ) -> None:
        """What the driver makes of IRP_MJ_CREATE, Wine does not tell, nor wait for: on Windows the first of
        these opens fails, and the second one hangs."""
        for status in (NTSTATUS.STATUS_ACCESS_DENIED, NTSTATUS.STATUS_PENDING):
            control(agent, device, CREATES, number(status))
            other = opened(agent)
        assert control(agent, other, INVERT, time_limit=SOON).outcome is IoOutcome.STUCK
        end_process(agent, driver)


class TestCalls:
    def test_carry_their_data_both_ways(self, agent: Agent, device: int) -> None:
        for size in (0, 1, 256, 100_000):
            data = (ALL_BYTES * (size // 256 + 1))[:size]
            result = control(agent, device, INVERT, data, size)
            assert result.data == bytes(255 - byte for byte in data)
            assert (result.status, result.count) == (NTSTATUS.STATUS_SUCCESS, size)
            assert result.outcome is IoOutcome.COMPLETED

    def test_read_and_write(self, agent: Agent, device: int) -> None:
        written = agent.write_device(device, ALL_BYTES, time_limit=PATIENCE)
        assert (written.status, written.count) == (NTSTATUS.STATUS_SUCCESS, 256)
        read = agent.read_device(device, 100, time_limit=PATIENCE)
        assert (read.data, read.count) == (ALL_BYTES[:100], 100)
        assert agent.read_device(device, 1000, time_limit=PATIENCE).data == ALL_BYTES
        too_long = agent.write_device(device, bytes(5000), time_limit=PATIENCE)
        assert (too_long.status, too_long.count) == (NTSTATUS.STATUS_INVALID_PARAMETER, 0)

    def test_may_give_more_than_a_message_holds(self, agent: Agent, device: int) -> None:
        size = 3 << 20
        result = control(agent, device, FAIL, struct.pack("<II", 0, size), size)
        assert result.data == b"\xee" * size

    def test_that_fail_give_no_data_and_warnings_do(self, agent: Agent, device: int) -> None:
        for status, data in (
            (NTSTATUS.STATUS_UNSUCCESSFUL, b""),
            (NTSTATUS.STATUS_BUFFER_OVERFLOW, b"\xee\xee\xee"),
        ):
            result = control(agent, device, FAIL, struct.pack("<II", status, 3), 8)
            assert (result.status, result.data) == (status, data)
            assert result.outcome is IoOutcome.COMPLETED

    def test_of_devices_that_are_not_open_are_refused(self, agent: Agent, device: int) -> None:
        agent.close_device(device)
        for number_of_none in (device, 0, 0xFFFFFFFF):
            with pytest.raises(AgentError, match="no such device is open"):
                control(agent, number_of_none, INVERT)
            with pytest.raises(AgentError, match="no such device is open"):
                agent.close_device(number_of_none)

    def test_that_ask_for_too_much_are_refused(self, agent: Agent, device: int) -> None:
        most = 16 << 20
        with pytest.raises(AgentError, match="above 16 MiB"):
            control(agent, device, INVERT, output_size=most + 1)
        with pytest.raises(AgentError, match="above 16 MiB"):
            agent.read_device(device, most + 1, time_limit=PATIENCE)
        assert agent.read_device(device, most, time_limit=PATIENCE).data == b""
        with pytest.raises(ValueError, match="fit into a frame"):
            agent.write_device(device, bytes(1 << 20), time_limit=PATIENCE)
        with pytest.raises(ValueError, match="time limit"):
            control(agent, device, INVERT, time_limit=-1)


class TestWaiting:
    def test_is_for_many_at_a_time(
        self, agent: Agent, device: int, driver: Driver, pool: ThreadPoolExecutor
    ) -> None:
        pending = [pool.submit(control, agent, device, PEND) for _ in range(4)]
        pending += [pool.submit(control, agent, opened(agent), PEND) for _ in range(4)]
        for _ in pending:
            driver.dbgprint.expect("probe: pend")
        later = [
            pool.submit(control, agent, device, code, number(20)) for code in (TIMER, WORK) * 4
        ]
        assert control(agent, device, INVERT, b"\0", 1).data == b"\xff"
        for future in later:
            assert future.result(PATIENCE).status is NTSTATUS.STATUS_SUCCESS
        assert not any(future.done() for future in pending)
        agent.close_device(device)
        for future in pending[:4]:
            assert future.result(PATIENCE).status is NTSTATUS.STATUS_CANCELLED
        assert not any(future.done() for future in pending[4:])
        end_process(agent, driver)

    def test_ends_at_the_time_limit_by_a_cancel(
        self, agent: Agent, device: int, driver: Driver
    ) -> None:
        result = control(agent, device, PEND, output_size=8, time_limit=SOON)
        assert result.outcome is IoOutcome.CANCELLED
        assert (result.status, result.data) == (NTSTATUS.STATUS_CANCELLED, b"")
        driver.dbgprint.expect("probe: cancelled")
        assert control(agent, device, INVERT, b"\0", 1).data == b"\xff"

    def test_ends_without_the_driver_where_that_heeds_no_cancel(
        self, agent: Agent, device: int
    ) -> None:
        result = control(agent, device, KEEP, output_size=8, time_limit=SOON)
        assert result.outcome is IoOutcome.STUCK
        assert (result.status, result.data) == (NTSTATUS.STATUS_PENDING, b"")
        assert control(agent, device, INVERT, b"\0", 1).data == b"\xff"
        # The driver may still write to what it kept.
        assert control(agent, device, GIVE_BACK, output_size=4).data == number(1)

    def test_for_what_is_stuck_takes_up_no_room(
        self, agent: Agent, device: int, pool: ThreadPoolExecutor
    ) -> None:
        for _ in range(2):  # 80 in all, and 64 may wait at a time
            stuck = [pool.submit(control, agent, device, KEEP, time_limit=SOON) for _ in range(40)]
            assert {future.result(PATIENCE).outcome for future in stuck} == {IoOutcome.STUCK}
        assert control(agent, device, GIVE_BACK, output_size=4).data == number(80)

    def test_for_what_is_stuck_does_not_hold_up_a_close(
        self, agent: Agent, device: int, driver: Driver, pool: ThreadPoolExecutor
    ) -> None:
        kept = pool.submit(control, agent, device, KEEP)
        pending = pool.submit(control, agent, device, PEND)
        driver.dbgprint.wait_for("probe: [kp]e*")
        driver.dbgprint.wait_for("probe: [kp]e*")
        agent.close_device(device, timeout=PATIENCE / 2)
        assert kept.result(PATIENCE).outcome is IoOutcome.STUCK
        assert pending.result(PATIENCE).outcome is IoOutcome.CANCELLED
        assert control(agent, opened(agent), GIVE_BACK, output_size=4).data == number(1)

    def test_for_a_routine_that_does_not_return_is_given_up(
        self, agent: Agent, device: int, driver: Driver, pool: ThreadPoolExecutor
    ) -> None:
        hanging = pool.submit(control, agent, device, HANG)
        driver.dbgprint.expect("probe: hang")
        # On Wine one routine of a driver runs at a time, so this one hangs too.
        assert control(agent, device, INVERT, time_limit=SOON).outcome is IoOutcome.STUCK
        assert not hanging.done()
        list(pool.map(agent.fence, map(str, range(100))))
        end_process(agent, driver)
        assert hanging.result(PATIENCE).status is DEVICE_GONE
        agent.close_device(device)


def test_a_host_that_does_not_read_holds_up_no_time_limit(
    target: WineTarget, driver: Driver
) -> None:
    with closing(own_link(target)) as link:
        decoder = Decoder()

        def send(number_of_it: int, request: Message) -> None:
            operation = next(o.number for o in messages.OPERATIONS if o.request is type(request))
            body = to_bytes(request)
            link.send(
                encode(
                    Frame(kind=Kind.REQUEST, operation=operation, request=number_of_it, body=body)
                ),
                PATIENCE,
            )

        def answers(count: int) -> dict[int, bytes]:
            """The next so many, by the request's number."""
            got: dict[int, bytes] = {}
            while len(got) < count:
                for frame in decoder.receive_data(link.receive()):
                    if frame.kind is Kind.REPLY:
                        got[frame.request] = frame.body
            return got

        send(1, messages.OpenDevice(path=PATH, time_limit=int(PATIENCE * 1000)))
        opened = from_bytes(messages.DeviceOpened, answers(1)[1]).device

        def ioctl(code: int, data: bytes = b"", output_size: int = 0, *, limit: float) -> Message:
            return messages.Ioctl(
                device=opened,
                code=code,
                data=data,
                output_size=output_size,
                time_limit=int(limit * 1000),
            )

        size = 3 << 20  # far more than a pipe holds
        send(2, ioctl(FAIL, struct.pack("<II", 0, size), size, limit=PATIENCE))
        send(3, ioctl(KEEP, limit=SOON))
        send(4, ioctl(PEND, limit=GRACE + 1))
        driver.dbgprint.expect("probe: cancelled", timeout=PATIENCE)
        outcomes = {
            request: IoOutcome(from_bytes(messages.IoEnded, body).outcome)
            for request, body in answers(3).items()
            if request > 2
        }
        assert outcomes == {3: IoOutcome.STUCK, 4: IoOutcome.CANCELLED}
        send(5, ioctl(GIVE_BACK, output_size=4, limit=PATIENCE))
        assert from_bytes(messages.IoEnded, answers(1)[5]).data == number(1)


class TestSoManyCallsThatThereIsRoomForNoMore:
    @pytest.fixture
    def device(self, own_agent: Agent) -> int:
        return opened(own_agent)

    @pytest.fixture
    def waiting(
        self, own_agent: Agent, device: int, driver: Driver
    ) -> Iterator[list[Future[IoResult]]]:
        too_many = 100
        with ThreadPoolExecutor(too_many) as pool:
            calls = [pool.submit(control, own_agent, device, PEND) for _ in range(too_many)]
            for call in islice(as_completed(calls, PATIENCE), too_many - MOST_WAITING):
                with pytest.raises(AgentError, match="too many requests at a time"):
                    call.result()
            for _ in range(MOST_WAITING):
                driver.dbgprint.expect("probe: pend")
            yield [call for call in calls if not call.done()]

    def test_are_ended_by_a_close(
        self, own_agent: Agent, device: int, waiting: list[Future[IoResult]]
    ) -> None:
        own_agent.close_device(device)
        assert {call.result(PATIENCE).outcome for call in waiting} == {IoOutcome.CANCELLED}
        assert control(own_agent, opened(own_agent), INVERT, b"\0", 1).data == b"\xff"

    def test_are_ended_by_a_stop(
        self, own_agent: Agent, driver: Driver, waiting: list[Future[IoResult]]
    ) -> None:
        driver.abandon()
        assert own_agent.stop_service(driver.service) == 0
        assert {call.result(PATIENCE).status for call in waiting} == {DEVICE_GONE}


class TestTheDriversEnd:
    """On Wine. On Windows a driver whose device is open stays, and its calls with it."""

    @pytest.fixture
    def waiting(
        self, agent: Agent, device: int, driver: Driver, pool: ThreadPoolExecutor
    ) -> list[Future[IoResult]]:
        """Two calls that the driver pends; the second one it gives back in its DriverUnload."""
        waiting = [pool.submit(control, agent, device, code) for code in (PEND, KEEP)]
        driver.dbgprint.wait_for("probe: [kp]e*")
        driver.dbgprint.wait_for("probe: [kp]e*")
        return waiting

    def test_by_a_kill_ends_what_waits_for_it_and_all_that_comes(
        self, agent: Agent, device: int, driver: Driver, waiting: list[Future[IoResult]]
    ) -> None:
        end_process(agent, driver)
        for future in waiting:
            assert future.result(PATIENCE).status is DEVICE_GONE
            assert future.result().outcome is IoOutcome.COMPLETED
        assert control(agent, device, INVERT, b"\0", 1).status is DEVICE_GONE
        again = agent.open_device(PATH, time_limit=PATIENCE)
        assert again.status is NTSTATUS.STATUS_OBJECT_PATH_NOT_FOUND  # the link is still there
        agent.close_device(device)

    def test_by_a_stop_ends_what_waits_for_it_and_all_that_comes(
        self, agent: Agent, device: int, driver: Driver, waiting: list[Future[IoResult]]
    ) -> None:
        pending, kept = waiting
        driver.stop()
        assert pending.result(PATIENCE).status is DEVICE_GONE
        assert kept.result(PATIENCE).status is NTSTATUS.STATUS_SUCCESS
        assert control(agent, device, INVERT, b"\0", 1).status is DEVICE_GONE
        again = agent.open_device(PATH, time_limit=PATIENCE)
        assert again.status is NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND
        agent.close_device(device)


def test_a_driver_in_rust_ends_behind_the_closes_that_are_on_their_way(target: WineTarget) -> None:
    """On Wine they come later than the last handle's end, and an unload would overtake them."""
    target.repair()
    driver = Driver(target, Cargo(DRIVERS).build("checks"), name="checks", parameters=CHECKS)
    for _ in range(5):  # of those that do not wait, one in three is too early
        driver.start()
        with Agent.connect(own_link(target), timeout=PATIENCE) as agent:
            for _ in range(200):
                agent.open_device(r"\??\Checks1", time_limit=PATIENCE)
        driver.stop()
    assert driver.dbgprint.lines.count("device 1 closed") == 5 * 200
    driver.finish()


def test_what_hangs_in_a_driver_does_not_hold_up_the_agents_end(
    target: WineTarget, driver: Driver, pool: ThreadPoolExecutor
) -> None:
    link = own_link(target)
    with Agent.connect(link, timeout=PATIENCE) as agent:
        device = opened(agent)
        hanging = [pool.submit(control, agent, device, code) for code in (KEEP, PEND, HANG)]
        driver.dbgprint.wait_for("probe: hang")
    assert link.returncode == 0
    for future in hanging:
        assert isinstance(future.exception(PATIENCE), LinkError)
    end_process(target.agent, driver)
