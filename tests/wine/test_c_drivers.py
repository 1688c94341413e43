"""A driver that nobody of ours wrote for: C, by mingw, linked in all the ways there are."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pytest_kdriver import NTSTATUS, DeviceError, Driver, PoolError, TargetHandle, ctl_code
from pytest_kdriver.device import Device
from tests.wine.c_drivers.build import FREE_BASE, Linker, Variant, build_probe

PATH = r"\\.\probe"
INVERT, TIMER, WORK, POOL, LOOKASIDE = (ctl_code(0x800 + function) for function in (0, 5, 6, 8, 9))

# probe.c's ALLOCATE_ROUTINE, and what it asks each for
ROUTINES = {
    "ExAllocatePool": "NonPagedPool",
    "ExAllocatePoolWithTag": "PagedPool",
    "ExAllocatePoolWithQuota": "NonPagedPool",
    "ExAllocatePoolWithQuotaTag": "PagedPool",
    "ExAllocatePool2": "NonPagedPoolNx",
}
WITHOUT_TAG = {"ExAllocatePool", "ExAllocatePoolWithQuota"}
NO_TAG = "None"  # what the system itself puts there: 'None'
NEVER, BY_EX_FREE_POOL, BY_EX_FREE_POOL_WITH_TAG = range(3)

RELOCATABLE = [Variant(linker=linker) for linker in Linker]
FIXED = [Variant(linker=linker, relocations=False, base=FREE_BASE) for linker in Linker]
TAKEN = [Variant(linker=linker, relocations=False) for linker in Linker]


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, str]:
    folder = tmp_path_factory.mktemp("probe")
    variants = [*RELOCATABLE, *FIXED, *TAKEN]
    return {variant: str(build_probe(variant, folder)) for variant in variants}


@pytest.fixture(params=[*RELOCATABLE, *FIXED], ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    value = request.param
    assert isinstance(value, Variant)
    return value


@pytest.fixture
def probe(
    kdriver_target: TargetHandle, images: dict[Variant, str], variant: Variant
) -> Iterator[Driver]:
    """The driver; in the end it is judged, as each is."""
    with kdriver_target.driver(images[variant]) as driver:
        yield driver


@pytest.fixture
def leaking_probe(
    kdriver_target: TargetHandle, images: dict[Variant, str], variant: Variant
) -> Iterator[Driver]:
    """The same, but leaks do not fail the test."""
    with kdriver_target.driver(images[variant], leaks="allow") as driver:
        yield driver


@contextmanager
def running(probe: Driver) -> Iterator[Device]:
    with probe.running(), probe.device(PATH) as device:
        yield device


def allocate(device: Device, routine: str, size: int, *, freed: int = NEVER) -> bool:
    """Have the driver allocate; False where the system has no such routine."""
    which = list(ROUTINES).index(routine)
    try:
        device.ioctl(POOL, struct.pack("<II4sI", which, size, b"tst1", freed))
    except DeviceError as error:
        if routine != "ExAllocatePool2" or error.status != NTSTATUS.STATUS_NOT_IMPLEMENTED:
            raise
        return False
    return True


def test_starts_answers_and_goes(probe: Driver) -> None:
    with running(probe) as device:
        assert device.ioctl(INVERT, bytes(range(256)), output_size=256) == bytes(range(255, -1, -1))
        assert device.write(b"kept in .bss") == 12
        assert device.read(100) == b"kept in .bss"
    assert probe.dbgprint.lines == [
        "probe: entry",
        "probe: create",
        "probe: close",
        "probe: unload",
    ]
    assert probe.last_status is NTSTATUS.STATUS_SUCCESS
    assert not probe.pool.leaked


def test_answers_later_from_timers_and_work_items(probe: Driver) -> None:
    with running(probe) as device:
        device.ioctl(TIMER, number(20))
        probe.dbgprint.expect("probe: timer")
        device.ioctl(WORK)
        probe.dbgprint.expect("probe: work")
    assert not probe.pool.leaked
    assert probe.pool.allocated.total_count == 1  # the work item's


@pytest.mark.parametrize("variant", TAKEN, indirect=True, ids=str)
def test_without_relocations_is_warned_of_and_not_at_home_where_its_place_is_taken(
    probe: Driver,
) -> None:
    """Windows refuses all such drivers. Wine does not: it runs one whose place is taken (0x140000000 is, by
    its own winedevice.exe) elsewhere, with the addresses of its data left as they were. This one then has
    something else for the name of its device."""
    assert not probe.start(check=False).is_success
    assert probe.dbgprint.lines == ["probe: entry"]
    assert probe.preflight is not None
    (finding,) = probe.preflight.warnings
    assert finding.code == "relocations"


class TestPool:
    @pytest.mark.parametrize("routine", ROUTINES)
    def test_a_leak_is_seen_whichever_routine_it_comes_from(
        self, leaking_probe: Driver, routine: str
    ) -> None:
        with running(leaking_probe) as device:
            if not allocate(device, routine, 1000):
                pytest.skip("this Wine has no ExAllocatePool2")
            allocate(device, routine, 10, freed=BY_EX_FREE_POOL)
        (leak,) = leaking_probe.pool.leaked
        assert (leak.size, leak.count) == (1000, 1)
        assert leak.tag == (NO_TAG if routine in WITHOUT_TAG else "tst1")
        assert leak.pool_type == ROUTINES[routine]
        assert "probe.c" in str(leak.caller)
        assert leaking_probe.pool.allocated.total_size == 1010

    @pytest.mark.parametrize("routine", ROUTINES)
    def test_what_is_freed_is_no_leak(self, probe: Driver, routine: str) -> None:
        with running(probe) as device:
            allocate(device, routine, 100, freed=BY_EX_FREE_POOL)
            if routine not in WITHOUT_TAG:
                allocate(device, routine, 100, freed=BY_EX_FREE_POOL_WITH_TAG)
        assert not probe.pool.leaked
        assert not probe.pool.wrong_tags

    def test_a_leak_fails_the_test(
        self, kdriver_target: TargetHandle, images: dict[Variant, str], variant: Variant
    ) -> None:
        with (
            pytest.raises(PoolError, match=r"1 block, 77 bytes leaked:\n.*tag 'tst1'"),
            kdriver_target.driver(images[variant]) as driver,
            running(driver) as device,
        ):
            allocate(device, "ExAllocatePoolWithTag", 77)

    def test_a_tag_that_the_block_does_not_have_fails_the_test(
        self, kdriver_target: TargetHandle, images: dict[Variant, str], variant: Variant
    ) -> None:
        with (
            pytest.raises(PoolError, match="tag 'None' freed with tag 'tst1'"),
            kdriver_target.driver(images[variant]) as driver,
            running(driver) as device,
        ):
            allocate(device, "ExAllocatePool", 10, freed=BY_EX_FREE_POOL_WITH_TAG)

    def test_what_a_lookaside_list_takes_is_not_seen(self, probe: Driver) -> None:
        """The list has its memory from inside of ntoskrnl, where Wine's trace has no eyes."""
        with running(probe) as device:
            device.ioctl(LOOKASIDE, number(1000))
        assert not probe.pool.allocated
