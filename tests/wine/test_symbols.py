"""Leaks, wrong frees and crashes by function, file and line, of real drivers on a real Wine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pytest_kdriver import Driver, DriverCrashed, PoolError, TargetHandle
from pytest_kdriver.image.cargo import Cargo
from tests.wine.c_drivers.build import compiler

DRIVERS = Path(__file__).parents[2] / "drivers"
LEAKS = DRIVERS / "leaks" / "src" / "lib.rs"
PANICS = DRIVERS / "panics" / "src" / "lib.rs"

C_DRIVER = """\
#include <ddk/wdm.h>

static inline __attribute__((always_inline)) void *allocate(SIZE_T bytes)
{
    return ExAllocatePoolWithTag(NonPagedPool, bytes, 0x6b61656c);
}

static __attribute__((noinline)) void first(void)
{
    DbgPrint("%p\\n", allocate(100));
}

static __attribute__((noinline)) void second(void)
{
    DbgPrint("%p\\n", allocate(50));
}

static void NTAPI unload(DRIVER_OBJECT *driver)
{
    *(volatile int *)0x10 = driver != 0;
}

NTSTATUS NTAPI DriverEntry(DRIVER_OBJECT *driver, UNICODE_STRING *path)
{
    if (path->Length)
        driver->DriverUnload = unload;
    first();
    second();
    return STATUS_SUCCESS;
}
"""


def lines_with(text: str, source: str) -> list[int]:
    return [number for number, line in enumerate(source.splitlines(), 1) if text in line]


@pytest.mark.kdriver("leaks", parameters={"Blocks": 3, "Names": 2}, leaks="allow")
def test_two_leaks_are_two_lines_of_the_driver_s_source(kdriver: Driver) -> None:
    with kdriver.running():
        pass
    vec, string = lines_with(".try_reserve_exact(self.bytes)?", LEAKS.read_text())
    assert [(leak.count, str(leak.caller)) for leak in kdriver.pool.leaked] == [
        (3, f"drivers/leaks/src/lib.rs:{vec} in leaks::Plan::allocate_buffers"),
        (2, f"drivers/leaks/src/lib.rs:{string} in leaks::Plan::allocate_names"),
    ]
    assert kdriver.dbgprint.lines == [], "stack records are no prints"


@pytest.mark.parametrize("fault", ["double-free", "wrong-tag"])
def test_a_wrong_free_names_who_freed_and_who_had_allocated(
    kdriver_target: TargetHandle, fault: str
) -> None:
    with (
        pytest.raises(PoolError) as failure,
        kdriver_target.driver("leaks", parameters={"Blocks": 0, "Fault": fault}) as driver,
        driver.running(),
    ):
        pass
    place = r"drivers/leaks/src/lib\.rs:(\d+) in leaks::\S+"
    match = re.search(f"from {place}; it was allocated from {place}", str(failure.value))
    assert match is not None, str(failure.value)
    source = LEAKS.read_text().splitlines()
    assert "ExFreePoolWithTag(" in source[int(match[1]) - 1]
    assert "ExAllocatePoolWithTag(" in source[int(match[2]) - 1]


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("page-fault", 'asm!("mov byte ptr'),
        ("bug-check", "KeBugCheckEx(0xE2E2"),
        ("int3", 'asm!("int3")'),
    ],
    ids=["page-fault", "bug-check", "int3"],
)
def test_a_crash_names_its_line(kdriver_target: TargetHandle, how: str, line: str) -> None:
    (number,) = lines_with(line, PANICS.read_text())
    place = f"at drivers/panics/src/lib.rs:{number} in panics::How::bring_down"
    with kdriver_target.driver("panics", parameters={"How": how}) as driver:
        with pytest.raises(DriverCrashed) as crash:
            driver.start()
        assert str(crash.value).splitlines()[0].endswith(place)


def test_a_panic_names_its_own_line(kdriver_target: TargetHandle) -> None:
    (number,) = lines_with('panic!("', PANICS.read_text())
    with kdriver_target.driver("panics", parameters={"Where": "cleanup"}) as driver:
        driver.start()
        with pytest.raises(
            DriverCrashed, match=rf", panicked at panics.src.lib\.rs:{number}:\d+\n"
        ):
            driver.stop()


def test_a_c_driver_s_leaks_and_faults_have_lines_too(
    kdriver_target: TargetHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("leaky.c").write_text(C_DRIVER)
    command = [compiler(), "-g", "-O2", "-I/usr/share/mingw-w64/include/ddk", "-o", "leaky.sys"]
    linker = ["-Wl,--subsystem,native", "-Wl,--entry,DriverEntry", "-lntoskrnl"]
    subprocess.run([*command, "leaky.c", "-shared", "-nostdlib", *linker], check=True)
    (allocating,) = lines_with("return ExAllocate", C_DRIVER)
    with kdriver_target.driver(str(tmp_path / "leaky.sys"), leaks="allow") as driver:
        driver.start()
        assert [line.partition("from ")[2] for line in str(driver.pool.in_use).splitlines()] == [
            f"leaky.c:{allocating} in allocate, called from leaky.c:{line} in {function}"
            for line, function in (
                (*lines_with("allocate(100)", C_DRIVER), "first"),
                (*lines_with("allocate(50)", C_DRIVER), "second"),
            )
        ]
        (faulting,) = lines_with("volatile", C_DRIVER)
        with pytest.raises(DriverCrashed, match=f"at leaky.c:{faulting} in unload"):
            driver.stop()


@pytest.mark.parametrize(
    ("pdb", "reason"),
    [
        ("leaks", None),
        ("hello", r"\S+leaks.pdb is of another build than leaks.sys"),
        (None, r"leaks.sys has no debug information, and there is no \S+leaks.pdb"),
    ],
    ids=["its own", "of another build", "none"],
)
def test_symbols_that_are_not_the_driver_s_are_not_used_and_that_is_told(
    kdriver_target: TargetHandle, cargo: Cargo, tmp_path: Path, pdb: str | None, reason: str | None
) -> None:
    image = Path(shutil.copy(cargo.build("leaks"), tmp_path))
    if pdb is not None:
        shutil.copy(cargo.build(pdb).with_suffix(".pdb"), image.with_suffix(".pdb"))
    with (
        pytest.raises(PoolError) as failure,
        kdriver_target.driver(str(image)) as driver,
        driver.running(),
    ):
        pass
    told = str(failure.value)
    if reason is None:
        assert "in leaks::Plan::allocate_buffers" in told
        assert "no file and line" not in told
    else:
        assert re.search(r"from leaks\+0x[0-9A-F]+\nno file and line: " + reason, told)
