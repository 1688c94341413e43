"""What a person gets wrong: each is one clear sentence that says what to do, and no traceback of ours."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_kdriver import toolchain
from pytest_kdriver.image.cargo import Cargo
from tests.wine.c_drivers.build import compiler

Run = Callable[..., pytest.RunResult]

LOADS = """
    import pytest

    @pytest.mark.kdriver({name!r})
    def test_it(kdriver):
        with kdriver.running():
            pass
"""


def told(result: pytest.RunResult, *lines: str, **outcomes: int) -> None:
    result.assert_outcomes(**outcomes)
    result.stdout.fnmatch_lines(lines)
    output = result.stdout.str()
    assert "pytest_kdriver/" not in output
    assert "INTERNALERROR" not in output


def empty(_: Path) -> bytes:
    return b""


def text(_: Path) -> bytes:
    return b"not a driver\n" * 100


def truncated(driver: Path) -> bytes:
    return driver.read_bytes()[:4096]


def header_alone(driver: Path) -> bytes:
    return driver.read_bytes()[:100]


def for_32_bits(driver: Path) -> bytes:
    return with_machine(driver, 0x14C)


def for_arm(driver: Path) -> bytes:
    return with_machine(driver, 0xAA64)


def with_machine(driver: Path, machine: int) -> bytes:
    image = bytearray(driver.read_bytes())
    (header,) = struct.unpack_from("<I", image, 0x3C)
    struct.pack_into("<H", image, header + 4, machine)
    return bytes(image)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (empty, "*bad.sys*empty*"),
        (text, "*bad.sys*"),
        (truncated, "*bad.sys*truncated*"),
        (header_alone, "*bad.sys*"),
        (for_32_bits, "*bad.sys*32*"),
        (for_arm, "*bad.sys*ARM64*"),
    ],
    ids=["empty", "text", "truncated", "header-alone", "32-bit", "arm64"],
)
def test_a_file_that_is_no_driver(
    project: pytest.Pytester,
    run: Run,
    cargo: Cargo,
    content: Callable[[Path], bytes],
    message: str,
) -> None:
    (project.path / "bad.sys").write_bytes(content(cargo.build("hello")))
    project.makepyfile(LOADS.format(name="bad.sys"))
    told(run("--kdriver-vm", "wine"), f"E *ImageError: {message}", failed=1)


def test_a_dll_for_programs(project: pytest.Pytester, run: Run) -> None:
    source = project.path / "library.c"
    source.write_text(
        '#include <stdio.h>\n__declspec(dllexport) int f(void) { return puts("f"); }\n'
    )
    command = [compiler(), "-shared", "-o", "library.dll", "library.c"]
    subprocess.run(command, cwd=project.path, check=True)
    project.makepyfile(LOADS.format(name="library.dll"))
    told(
        run("--kdriver-vm", "wine"),
        "E *ImageError: library.dll: its subsystem is *, a driver's is NATIVE: link with *",
        "E *library.dll: it imports *which is for programs*-nostdlib*",
        failed=1,
    )


def test_an_import_that_the_kernel_lacks_is_named(project: pytest.Pytester, run: Run) -> None:
    project.makepyfile(LOADS.format(name="missing"))
    told(
        run("--kdriver-vm", "wine"),
        "E *DriverCrashed: *ntoskrnl.exe!KdriverNoSuchExport, which this kernel does not export*",
        "*- Image -*",
        "warning: missing.sys: it imports KdriverNoSuchExport, which *",
        failed=1,
    )


@pytest.mark.parametrize(
    ("wine", "message"),
    [
        ("/no/such/wine64", "*there is no Wine '/no/such/wine64'*apt-get install wine64 wine*"),
        ("./old-wine", "*6.0.3*too old*8.0*"),
    ],
    ids=["none", "too-old"],
)
def test_a_wine_that_won_t_do(project: pytest.Pytester, run: Run, wine: str, message: str) -> None:
    old = project.path / "old-wine"
    old.write_text("#!/bin/sh\necho wine-6.0.3\n")
    old.chmod(0o755)
    wine = wine.replace("./", f"{project.path}/")
    with project.path.joinpath("kdriver.toml").open("a") as config:
        config.write(f'[targets.other]\nkind = "wine"\nwine = "{wine}"\n')
    project.makepyfile(LOADS.format(name="hello"))
    told(run("--kdriver-vm", "other"), f"TargetError: {message}", errors=1)


def test_a_rust_without_its_target(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("rustup", "cargo", "rustc"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(toolchain, "SYSTEM_PROGRAMS", tmp_path / "none")
    toolchain.find_toolchain.cache_clear()
    project.makepyfile(LOADS.format(name="hello"))
    try:
        result = project.runpytest_inprocess("--kdriver-vm", "wine")
    finally:
        toolchain.find_toolchain.cache_clear()
    told(result, "*rustup target add x86_64-pc-windows-msvc*", errors=1)


def test_paths_with_spaces_and_umlauts(project: pytest.Pytester, run: Run, cargo: Cargo) -> None:
    """A whole project below such a path: its config, its package, a driver beside it, what it keeps."""
    folder = project.path / "Prüfstand für Treiber"
    package = folder / "ein Treiber"
    (package / "src").mkdir(parents=True)
    framework = cargo.manifest.parent / "windows-kernel-rs"
    (package / "Cargo.toml").write_text(
        '[package]\nname = "umlaut"\nversion = "0.1.0"\nedition = "2024"\n'
        '[lib]\ncrate-type = ["cdylib"]\n'
        f'[dependencies]\nwindows-kernel-rs = {{ path = "{framework}" }}\n'
    )
    hello = cargo.manifest.parent / "hello" / "src" / "lib.rs"
    (package / "src" / "lib.rs").write_text(hello.read_text())
    shutil.copy(cargo.build("hello"), folder / "schöner Treiber.sys")
    (folder / "kdriver.toml").write_text('manifest = "ein Treiber"\nartifacts = "übrig"\n')
    (folder / "test_größe.py").write_text(
        "import pytest\n\n"
        '@pytest.mark.parametrize("name", ["umlaut", "schöner Treiber.sys"])\n'
        "def test_it(kdriver_target, name):\n"
        '    with kdriver_target.driver(name, service="s") as driver, driver.running():\n'
        "        pass\n"
        '    assert driver.dbgprint.lines == ["Hello, world!", "Bye bye!"]\n'
        "    assert False\n"
    )
    result = run("--kdriver-vm", "wine", "--rootdir", str(folder), str(folder))
    told(result, "E *assert False", failed=2)
    assert len(list((folder / "übrig").glob("*.txt"))) == 2
