"""A Windows' pool is counted around each load. The Windows is a fake: not verified on Windows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import CapabilityError, KdriverError, PoolError, TargetError
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.wire import Message
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.remote_config import RemoteConfig
from pytest_kdriver.targets import machine_target, pool_sampling
from pytest_kdriver.targets import remote as remote_module
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.remote import RemoteMachine
from tests.pe_builder import build
from tests.pool_counters import entry, information
from tests.signature_builder import with_signature
from tests.unit.test_remote import FakeProgram, FakeWay, Windows
from tests.unit.test_used_pool_tags import CALL, LOAD, image_of

POOL_TAGS = 22


class Counting(Windows):
    """A Windows that counts its pool.

    ``on_load`` and ``on_unload`` are what a driver does, ``meanwhile`` what others do before each look at the
    counters, whose number is ``looks``. ``status`` is DriverEntry's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Counter({b"Irp ": 70})
        self.freed = Counter({b"Irp ": 0xFFFFFFF0})
        self.on_load: Callable[[], object] = lambda: None
        self.on_unload: Callable[[], object] = lambda: None
        self.meanwhile: Callable[[], object] = lambda: None
        self.status = NTSTATUS.STATUS_SUCCESS
        self.looks = 0
        self.nonsense: bytes | None = None

    def take(self, *tags: bytes, count: int = 1) -> None:
        for tag in tags:
            self.blocks[tag] += count

    def give(self, tag: bytes, count: int = 1) -> None:
        self.blocks[tag] -= count
        self.freed[tag] += count

    def _inform(self, request: Message) -> Message:
        assert isinstance(request, messages.SystemInformation)
        if request.information_class != POOL_TAGS:
            return super()._inform(request)
        self.looks += 1
        self.meanwhile()
        if self.nonsense is not None:
            return messages.Information(data=self.nonsense)
        entries = [
            entry(tag, (0, 0, 0), ((n + self.freed[tag]) % 2**32, self.freed[tag], 48 * n))
            for tag, n in self.blocks.items()
        ]
        return messages.Information(data=information(*entries))

    def _load(self, request: Message) -> Message:
        assert isinstance(request, messages.LoadDriver)
        self.on_load()
        if self.status.is_success:
            return super()._load(request)
        return messages.Code(code=self.status)

    def _unload(self, request: Message) -> Message:
        self.on_unload()
        return super()._unload(request)


@pytest.fixture
def windows() -> Counting:
    return Counting()


@pytest.fixture
def target(
    windows: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MachineTarget]:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_module, "AGENT", FakeProgram(tmp_path / "kdagent.exe"))
    monkeypatch.setattr(machine_target, "assert_exact_status", lambda target, folder: [])
    monkeypatch.setattr(pool_sampling, "INTERVAL", 0.01)
    monkeypatch.setattr(pool_sampling, "SETTLE_TIMEOUT", 0.2)
    remote = RemoteConfig(host="lab", user="tester", timeout=5)
    config = TargetConfig(name="lab", kind="remote", remote=remote)
    made = MachineTarget("lab", RemoteMachine(config, way=FakeWay(windows, Counting())))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def driver(target: MachineTarget, tmp_path: Path) -> Driver:
    path = tmp_path / "hello.sys"
    path.write_bytes(with_signature(build(imports={"ntoskrnl.exe": ["DbgPrint"]}, pointers=1)))
    return Driver(target, path, name="hello", timeout=5)


def cycle(driver: Driver) -> None:
    driver.start()
    driver.stop()


def test_a_machine_that_tells_its_counters_lets_its_pool_be_seen(target: MachineTarget) -> None:
    assert target.capabilities == {"programs", "pool"}


def test_a_leak_fails_with_its_table(windows: Counting, driver: Driver) -> None:
    windows.on_load = lambda: windows.take(b"hell", count=3)
    windows.on_unload = lambda: windows.give(b"hell", 1)
    cycle(driver)
    with pytest.raises(PoolError) as caught:
        driver.finish()
    assert str(caught.value).startswith("hello on lab: 2 blocks, 96 bytes leaked:\n")
    assert "tag 'hell'  NonPaged  from unknown\nThe kernel's counters name no caller" in str(
        caught.value
    )


def test_a_driver_that_leaves_nothing_passes(windows: Counting, driver: Driver) -> None:
    windows.on_load = lambda: windows.take(b"hell", count=3)
    windows.on_unload = lambda: windows.give(b"hell", 3)
    cycle(driver)
    assert driver.pool.leaked == []
    driver.finish()


def test_a_driver_that_refuses_and_leaves_blocks_fails(windows: Counting, driver: Driver) -> None:
    windows.on_load = lambda: windows.take(b"hell")
    windows.status = NTSTATUS.STATUS_DEVICE_NOT_CONNECTED
    driver.start(check=False)
    with pytest.raises(PoolError, match="1 block, 48 bytes leaked"):
        driver.finish()


def test_a_driver_that_the_verdict_stops_is_judged_too(windows: Counting, driver: Driver) -> None:
    windows.on_load = lambda: windows.take(b"hell")
    driver.start()
    with pytest.raises(PoolError, match="1 block, 48 bytes leaked"):
        driver.finish()


def test_each_judgement_is_of_what_came_since_the_last(windows: Counting, driver: Driver) -> None:
    windows.on_load = lambda: windows.take(b"hell")
    cycle(driver)
    with pytest.raises(PoolError):
        driver.finish()
    windows.on_load = lambda: None
    driver.resume()
    cycle(driver)
    driver.finish()


def test_other_tags_do_not_count(windows: Counting, driver: Driver) -> None:
    windows.on_load = lambda: windows.take(b"Irp ", count=9)
    cycle(driver)
    driver.finish()


def test_the_marker_s_tags_are_those_that_count(
    windows: Counting, driver: Driver, target: MachineTarget
) -> None:
    windows.on_load = lambda: windows.take(b"mine", b"hell")
    named = Driver(target, driver.image, name="hello", tags=["mine"], timeout=5)
    cycle(named)
    assert [use.tag for use in named.pool.leaked] == ["mine"]


def test_the_tags_of_the_image_s_code_are_those_that_count(
    windows: Counting, driver: Driver, target: MachineTarget, tmp_path: Path
) -> None:
    windows.on_load = lambda: windows.take(b"mine", b"hell")
    path = tmp_path / "coded.sys"
    path.write_bytes(with_signature(image_of(LOAD + b"mine", (CALL, "ExAllocatePool2"))))
    coded = Driver(target, path, name="hello", timeout=5)
    cycle(coded)
    assert [use.tag for use in coded.pool.leaked] == ["mine"]


def test_what_is_freed_a_little_later_is_no_leak(windows: Counting, driver: Driver) -> None:
    windows.on_load = lambda: windows.take(b"hell", count=4)
    windows.on_unload = lambda: setattr(
        windows, "meanwhile", lambda: windows.give(b"hell", min(windows.blocks[b"hell"], 1))
    )
    cycle(driver)
    driver.finish()


def test_of_counters_that_do_not_settle_the_lowest_are_taken(
    windows: Counting, driver: Driver
) -> None:
    rises = [0, 5, 1, 7]
    windows.blocks[b"hell"] = 10

    def others() -> None:
        windows.blocks[b"hell"] = base[0] + rises[windows.looks % 4]

    base = [10]
    windows.meanwhile = others
    windows.on_load = lambda: base.__setitem__(0, 11)
    cycle(driver)
    with pytest.raises(PoolError, match="1 block, 48 bytes leaked") as caught:
        driver.finish()
    assert "were still changing" in str(caught.value)
    assert "'hell' may be others' as well: 1" in str(caught.value)


def test_a_clean_cycle_looks_once_before_and_once_behind(windows: Counting, driver: Driver) -> None:
    cycle(driver)
    before = windows.looks
    driver.cycle(10)
    assert windows.looks - before == 20


def others_have_it(windows: Counting, leak: int) -> Callable[[], None]:
    """A load of a driver whose tag others have as well: 400 blocks, and in each seventh cycle 50 more."""
    loads = itertools.count(1)

    def load() -> None:
        number = next(loads)
        windows.blocks[b"hell"] = 400 + leak * number + (0 if number % 7 else 50)

    windows.blocks[b"hell"] = 400
    return load


def test_many_cycles_tell_a_leak_from_others_bursts(windows: Counting, driver: Driver) -> None:
    windows.on_load = others_have_it(windows, leak=1)
    done = driver.cycle(20)
    assert [cycle.leaked.total_count for cycle in done][:8] == [1, 1, 1, 1, 1, 1, 51, 0]
    (growth,) = done.growth
    assert (growth.tag, growth.blocks, growth.size, growth.certain) == ("hell", 1, 48, True)


def test_many_cycles_of_a_clean_driver_are_certain_of_nothing(
    windows: Counting, driver: Driver
) -> None:
    windows.on_load = others_have_it(windows, leak=0)
    (growth,) = driver.cycle(20).growth
    assert (growth.blocks, growth.certain) == (0, False)


def test_single_blocks_are_not_seen(windows: Counting, driver: Driver) -> None:
    driver.start()
    for look in (
        lambda: driver.pool.in_use,
        lambda: driver.pool.allocated,
        lambda: driver.pool.double_frees,
        lambda: driver.pool.wrong_tags,
    ):
        with pytest.raises(CapabilityError, match="no capability 'pool-blocks'"):
            look()
    with pytest.raises(KdriverError, match="still loaded"):
        _ = driver.pool.leaked


@pytest.mark.parametrize("nonsense", [b"", b"\xff" * 48])
def test_counters_that_make_no_sense_are_told(
    windows: Counting, driver: Driver, nonsense: bytes
) -> None:
    windows.nonsense = nonsense
    with pytest.raises(TargetError, match=r"does not tell the pool's counters: .*pool tag"):
        driver.start()


def test_who_does_not_hear_that_nothing_was_counted_behind_the_unload_fails(
    windows: Counting, driver: Driver, target: MachineTarget
) -> None:
    driver.start()
    windows.nonsense = b""
    with pytest.raises(TargetError):
        driver.stop()
    target.break_down("it is old")
    target.repair()
    with pytest.raises(PoolError, match="whether it leaks can't be seen: its pool was not counted"):
        driver.finish()


def test_counters_that_vanish_during_a_look_are_the_target_s_loss(
    windows: Counting, driver: Driver, target: MachineTarget
) -> None:
    windows.meanwhile = windows.close
    with pytest.raises(TargetError, match="pool counters"):
        driver.start()
    assert target.broken is not None
