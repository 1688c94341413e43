"""What pre-flight says, and what Wine then does: nothing is called an error that would have run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.image.exports import Availability, KernelExports
from pytest_kdriver.image.preflight import Report, preflight
from pytest_kdriver.kernel.crash import find_crash
from pytest_kdriver.kernel.events import DriverInitCalled, MissingExport
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets.wine import WineTarget
from tests.pe_builder import (
    DATA,
    DIRECTORIES,
    OPTIONAL_HEADER,
    PAGE,
    SECTIONS,
    TEXT,
    WRITABLE,
    Section,
    build,
    patched,
)
from tests.wine.c_drivers.build import compiler

TIMEOUT = 30.0
SERVICE = "built"
KERNEL = {"ntoskrnl.exe": ["DbgPrint"]}
STUB = "FsRtlBalanceReads"
DLL = 0x2022
STRIPPED = 0x23

FAILED = NTSTATUS.STATUS_DLL_INIT_FAILED
CRASHED = "crashed"
NEVER_CALLED = "never called"


@pytest.fixture(scope="module")
def shared(cache: Path) -> Iterator[WineTarget]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDRIVER_CACHE", str(cache))
        target = WineTarget(TargetConfig(name="wine", kind="wine"))
        target.start()
        yield target
        target.close()


@pytest.fixture
def target(shared: WineTarget, own_cache: Path) -> WineTarget:
    shared.repair()
    return shared


def kernel_of(target: WineTarget) -> KernelExports:
    return KernelExports(target.prefix / "drive_c" / "windows", "this Wine")


@pytest.fixture
def kernel(target: WineTarget) -> KernelExports:
    return kernel_of(target)


def load(target: WineTarget, path: Path) -> NTSTATUS | str:
    """Load and unload a driver, without anybody looking at it before; what became of it."""
    position = len(target.log)
    target.install(SERVICE, path, {}, TIMEOUT)
    outcome = target.load(SERVICE, TIMEOUT)
    window = target.log.window(SERVICE, position)
    if find_crash(window, SERVICE) is not None:
        target.break_down("the driver crashed")
        return CRASHED
    if outcome.loaded and not list(window.of(DriverInitCalled)):
        target.break_down("the driver can't be unloaded")
        return NEVER_CALLED
    if outcome.loaded:
        target.unload(SERVICE, TIMEOUT)
    target.uninstall(SERVICE, TIMEOUT)
    return outcome.status


def wanting(module: str, name: str) -> bytes:
    return build(imports={**KERNEL, module: [name]})


GAP = patched(build(), SECTIONS + 40 + 12, "<I", 0x8000)


@pytest.mark.parametrize(
    ("image", "codes", "becomes"),
    [
        pytest.param(build(imports=KERNEL, pointers=2), [], 0, id="good"),
        pytest.param(build(imports=KERNEL, characteristics=DLL), [], 0, id="good dll"),
        pytest.param(build(), [], 0, id="no imports"),
        pytest.param(build(subsystem=3), ["warning subsystem"], 0, id="console"),
        pytest.param(
            build(subsystem=3, characteristics=DLL), ["error subsystem"], FAILED, id="console dll"
        ),
        pytest.param(wanting("kernel32.dll", "Sleep"), ["error user-mode"], FAILED, id="kernel32"),
        pytest.param(wanting("ntdll.dll", "NtClose"), ["error user-mode"], FAILED, id="ntdll"),
        pytest.param(
            wanting("kernel32", "Sleep"), ["warning user-mode"], 0, id="kernel32, no ending"
        ),
        *(
            pytest.param(wanting(module, name), ["warning user-mode"], 0, id=module)
            for module, name in (
                ("msvcrt.dll", "free"),
                ("user32.dll", "GetDC"),
                ("advapi32.dll", "RegCloseKey"),
                ("ucrtbase.dll", "free"),
                ("kernelbase.dll", "Sleep"),
                ("api-ms-win-crt-heap-l1-1-0.dll", "free"),
            )
        ),
        pytest.param(
            wanting("msvcrt.dll", "KdriverNone"),
            ["warning user-mode", "warning missing-import"],
            0,
            id="missing in msvcrt, not called",
        ),
        pytest.param(
            wanting("libgcc_s_seh-1.dll", "f"), ["error user-mode"], FAILED, id="a dll of mingw's"
        ),
        pytest.param(wanting("nosuch.sys", "f"), ["error module"], FAILED, id="no module"),
        pytest.param(
            wanting("hal.dll", "KdriverNone"),
            ["warning missing-import"],
            0,
            id="missing, not called",
        ),
        pytest.param(
            build(imports={"ntoskrnl.exe": ["KdriverNone"]}, call=True),
            ["warning missing-import"],
            CRASHED,
            id="missing",
        ),
        pytest.param(
            build(imports={"ntoskrnl.exe": [STUB]}, call=True),
            ["warning stub-import"],
            CRASHED,
            id="stub",
        ),
        pytest.param(build(entry=0), ["error entry"], NEVER_CALLED, id="no entry"),
        pytest.param(build(entry=0x90000), ["error entry"], CRASHED, id="entry outside"),
        pytest.param(build(entry=2 * PAGE), ["error entry"], CRASHED, id="entry in data"),
        pytest.param(build(text=DATA), ["error entry"], CRASHED, id="code not executable"),
        pytest.param(build(text=TEXT | WRITABLE), ["warning writable-code"], 0, id="writable"),
        pytest.param(
            build(characteristics=STRIPPED, base=0x2_7654_0000),
            ["warning relocations"],
            0,
            id="stripped, its base is free",
        ),
        pytest.param(build(alignment=0x200), ["error alignment"], FAILED, id="alignment"),
        pytest.param(build(imports=KERNEL)[:-0x200], ["error truncated"], FAILED, id="truncated"),
        pytest.param(GAP, ["warning sections", "error sections"], FAILED, id="beyond its size"),
        pytest.param(
            patched(GAP, OPTIONAL_HEADER + 56, "<I", 0x9000), ["warning sections"], 0, id="gap"
        ),
        pytest.param(
            patched(build(imports=KERNEL), DIRECTORIES + 8, "<I", 0x900000),
            ["error imports"],
            NTSTATUS.STATUS_UNSUCCESSFUL,
            id="imports outside",
        ),
        pytest.param(
            patched(build(imports=KERNEL), OPTIONAL_HEADER + 64, "<I", 0x1234),
            ["warning checksum"],
            0,
            id="checksum",
        ),
    ],
)
def test_what_is_an_error_does_not_run(
    target: WineTarget, tmp_path: Path, image: bytes, codes: list[str], becomes: NTSTATUS | str
) -> None:
    path = tmp_path / "built.sys"
    path.write_bytes(image)
    report = preflight(path, kernel_of(target), guest="wine")
    assert [f"{found.severity.value} {found.code}" for found in report.findings] == codes
    assert load(target, path) == becomes


def test_without_relocations_where_its_base_is_taken(target: WineTarget, tmp_path: Path) -> None:
    path = tmp_path / "built.sys"
    path.write_bytes(build(characteristics=STRIPPED | DLL, base=0x7FFE0000))  # KUSER_SHARED_DATA
    (found,) = preflight(path, kernel_of(target), guest="wine").findings
    assert (found.severity.value, found.code) == ("warning", "relocations")
    refuses = target.describe().startswith("Wine 8.")  # Wine 10 runs it with wrong addresses
    assert load(target, path) == (FAILED if refuses else 0)


class TestKernel:
    def test_has_what_the_sample_drivers_want(self, kernel: KernelExports, cargo: Cargo) -> None:
        for name in ("hello", "leaks", "panics"):
            assert str(preflight(cargo.build(name), kernel)) == f"{name}.sys: nothing is wrong"

    def test_lacks_what_crashes_the_driver_that_calls_it(
        self, target: WineTarget, kernel: KernelExports, cargo: Cargo
    ) -> None:
        image = cargo.build("missing")
        (finding,) = preflight(image, kernel).findings
        assert "it imports KdriverNoSuchExport, which ntoskrnl.exe of this Wine" in finding.message
        position = len(target.log)
        assert load(target, image) == CRASHED
        (event,) = target.log.window(SERVICE, position).of(MissingExport)
        assert event.name == "KdriverNoSuchExport"

    def test_is_told_from_its_stubs(self, kernel: KernelExports) -> None:
        module = kernel.module("ntoskrnl.exe")
        assert module is not None
        found = {name: module.look_up(name) for name in module.exports.ordinals}
        assert Availability.MISSING not in found.values()
        assert found[STUB] is found["CcCopyRead"] is Availability.STUB
        for name in (
            "DbgPrint",
            "ExAllocatePoolWithTag",
            "IoCreateDevice",
            "memcpy",
            "KeBugCheckEx",
        ):
            assert found[name] is Availability.PRESENT


DRIVER = """
struct driver { char before[0x68]; void *unload; };
__declspec(dllimport) unsigned DbgPrint(const char *format, ...);
static const char *names[] = { "one", "two" };
static void unload(void *driver) { DbgPrint("%s\\n", names[1]); }
int DriverEntry(struct driver *driver, void *path)
{
    driver->unload = unload;
    DbgPrint("%s\\n", names[0]);
    return 0;
}
"""
PROGRAM = """
#include <stdio.h>
int DriverEntry(void *driver, void *path)
{
    if (!driver)
        puts("no driver");
    return 0;
}
"""

Compile = Callable[..., Path]


class TestMingw:
    @pytest.fixture
    def compile_(self, tmp_path: Path) -> Compile:
        gcc = compiler()

        def compile_(source: str, *options: str) -> Path:
            (tmp_path / "c.c").write_text(source)
            image = tmp_path / "c.sys"
            command = [gcc, "-o", str(image), str(tmp_path / "c.c"), *options]
            subprocess.run(command, check=True, capture_output=True)
            return image

        return compile_

    NATIVE = ("-nostdlib", "-Wl,--subsystem,native", "-Wl,--entry,DriverEntry")

    @pytest.mark.parametrize("options", [(), ("-g",), ("-shared",), ("-s", "-O2")])
    def test_makes_good_drivers(
        self, target: WineTarget, kernel: KernelExports, compile_: Compile, options: tuple[str, ...]
    ) -> None:
        image = compile_(DRIVER, *self.NATIVE, *options, "-lntoskrnl")
        assert preflight(image, kernel).findings == ()
        assert [f.code for f in preflight(image, None, guest="windows").findings] == ["unsigned"]
        assert load(target, image) == NTSTATUS.STATUS_SUCCESS

    def test_drags_its_c_runtime_in(
        self, target: WineTarget, kernel: KernelExports, compile_: Compile
    ) -> None:
        report = preflight(image := compile_(PROGRAM, "-shared", "-Wl,--entry,DriverEntry"), kernel)
        assert [finding.code for finding in report.errors] == ["subsystem", "user-mode"]
        assert "it imports KERNEL32.dll, which" in report.errors[1].message
        (warning,) = report.warnings
        assert "it imports msvcrt.dll, which is for programs: Wine loads it" in warning.message
        assert load(target, image) == FAILED

    def test_leaves_relocations_out_where_it_is_told_to(
        self, kernel: KernelExports, compile_: Compile
    ) -> None:
        fixed = ("-Wl,--disable-reloc-section", "-Wl,--disable-dynamicbase")
        image = compile_(DRIVER, *self.NATIVE, *fixed, "-lntoskrnl")
        assert [finding.code for finding in preflight(image, kernel).warnings] == ["relocations"]
        report: Report = preflight(image, None, guest="windows")
        assert [finding.code for finding in report.errors] == ["relocations", "unsigned"]


Command = Callable[..., subprocess.CompletedProcess[str]]


class TestCommand:
    @pytest.fixture
    def check(self, project: pytest.Pytester) -> Command:
        def check(*arguments: str) -> subprocess.CompletedProcess[str]:
            done = subprocess.run(
                [Path(sys.executable).with_name("kdriver"), "check", *arguments],
                cwd=project.path,
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert "Traceback" not in done.stderr
            return done

        return check

    def test_of_a_package_builds_it_and_leaves_nothing(self, check: Command, cache: Path) -> None:
        before = set((cache / "runs").iterdir()) if (cache / "runs").exists() else set()
        done = check("hello")
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.startswith("kdriver: hello.sys for Wine ")
        assert done.stderr.endswith(": 0 errors, 0 warnings\n")
        assert set((cache / "runs").iterdir()) == before

    def test_of_a_file_says_what_is_wrong_with_it_for_which_kernel(
        self, check: Command, project: pytest.Pytester
    ) -> None:
        (project.path / "mine.sys").write_bytes(
            build(
                imports={"ntoskrnl.exe": [STUB, "KdriverNone"]},
                sections=[Section(b".d", b"", DATA)],
            )
        )
        done = check("mine.sys")
        assert done.returncode == 0
        missing, stub = done.stdout.splitlines()
        assert missing.startswith(
            "warning: mine.sys: it imports KdriverNone, which ntoskrnl.exe of Wine "
        )
        assert stub.startswith(f"warning: mine.sys: it imports {STUB}, which ntoskrnl.exe of Wine ")
        done = check("--windows", "mine.sys")
        assert (done.returncode, done.stderr) == (
            1,
            "kdriver: mine.sys for Windows: 1 error, 1 warning\n",
        )
        assert "[checksum]" in done.stdout
        assert "[unsigned]" in done.stdout

    def test_of_what_would_not_load_exits_with_1(
        self, check: Command, project: pytest.Pytester
    ) -> None:
        (project.path / "mine.dll").write_bytes(build(imports={"KERNEL32.dll": ["Sleep"]}))
        for options in ([], ["--windows"], ["--vm", "wine"]):
            done = check(*options, "mine.dll")
            assert done.returncode == 1
            assert done.stdout.startswith("error: mine.dll: it imports KERNEL32.dll, which")
        (project.path / "empty.sys").write_bytes(b"")
        done = check("empty.sys")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.endswith("empty.sys is no Windows image: it is empty\n")

    def test_with_a_wrong_call_exits_with_2(self, check: Command) -> None:
        assert check("--vm", "nope", "hello").returncode == 2
        assert check("--vm", "wine", "--windows", "hello").returncode == 2
        assert check().returncode == 2
