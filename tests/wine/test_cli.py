"""The command ``kdriver``, as a person types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_kdriver import toolchain
from pytest_kdriver.cli import main
from pytest_kdriver.image.cargo import Cargo

KDRIVER = str(Path(sys.executable).with_name("kdriver"))

Kdriver = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def kdriver(project: pytest.Pytester) -> Kdriver:
    """Call the command in a project whose drivers are the samples."""

    def kdriver(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [KDRIVER, *arguments],
            cwd=cwd or project.path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert "Traceback" not in done.stderr
        return done

    return kdriver


@contextmanager
def begun(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [KDRIVER, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


class TestRun:
    def test_of_a_package_shows_its_prints_and_status_and_exits_with_0(
        self, kdriver: Kdriver, left_behind: Callable[[], list[str]]
    ) -> None:
        done = kdriver("run", "hello")
        assert done.returncode == 0
        assert done.stdout == "Hello, world!\nBye bye!\n"
        assert done.stderr.splitlines() == [
            "kdriver: DriverEntry returned STATUS_SUCCESS (0x00000000)",
            "kdriver: hello started, stopped and left nothing behind",
        ]
        assert left_behind() == []

    def test_of_a_file_of_another_service_name(
        self, kdriver: Kdriver, project: pytest.Pytester, cargo: Cargo
    ) -> None:
        (project.path / "my driver.sys").write_bytes(cargo.build("hello").read_bytes())
        done = kdriver("run", "my driver.sys", "--service", "mine")
        assert (done.returncode, done.stdout) == (0, "Hello, world!\nBye bye!\n")
        assert "kdriver: mine started" in done.stderr
        (project.path / "folder").mkdir()
        done = kdriver("run", "../my driver.sys", cwd=project.path / "folder")
        assert done.returncode == 0

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (
                ["refuses", "-p", "Status=0xC00000A1"],
                r"FAILED: STATUS_WORKING_SET_QUOTA \(0xC00000A1\)",
            ),
            (
                ["leaks", "-p", "Blocks=2", "--parameter", "Bytes=8"],
                r"DriverEntry returned STATUS_SUCCESS.*\n.*FAILED: .*2 blocks, 16 bytes leaked:",
            ),
            (["panics", "-p", "How=bug-check"], r"FAILED: panics on wine: bug check 0xE2E2"),
            (["stubborn"], r"FAILED: stubborn on wine: it has no DriverUnload"),
            (
                ["stubborn", "-p", "How=slow-init", "--timeout", "0.5"],
                r"FAILED: stubborn on wine: DriverEntry did not return within 0.5 s",
            ),
        ],
    )
    def test_of_a_driver_that_fails_says_how_and_exits_with_1(
        self, kdriver: Kdriver, arguments: list[str], told: str
    ) -> None:
        done = kdriver("run", *arguments)
        assert done.returncode == 1
        assert re.search(told, done.stderr), done.stderr

    @pytest.mark.parametrize(
        ("arguments", "code", "told"),
        [
            (["absent"], 1, r"kdriver: no package 'absent' in \S+; there are: .*hello"),
            (["./absent.sys"], 1, r"kdriver: there is no \S+/absent\.sys"),
            (["hello", "--vm", "vine"], 2, r"kdriver: no target 'vine' \(did you mean 'wine'\?\)"),
            (["hello", "-p", "Status"], 2, r"--parameter 'Status': write NAME=VALUE"),
            (["hello", "-p", f"A={1 << 64}"], 2, r"fits neither into REG_DWORD nor into REG_QWORD"),
            (["hello", "--service", "a/b"], 2, r"'a/b' can't be a service's name"),
            (["hello", "--timeout", "0"], 2, r"--timeout"),
            (["hello", "--for", "-1"], 2, r"--for"),
            ([], 2, r"usage: kdriver run"),
        ],
    )
    def test_of_what_can_t_be_is_a_sentence(
        self, kdriver: Kdriver, arguments: list[str], code: int, told: str
    ) -> None:
        done = kdriver("run", *arguments)
        assert done.returncode == code
        assert re.search(told, done.stderr), done.stderr

    def test_shows_prints_at_once_and_unloads_at_ctrl_c(
        self, project: pytest.Pytester, left_behind: Callable[[], list[str]]
    ) -> None:
        with begun("run", "hello", "--for", "60", cwd=project.path) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "Hello, world!\n"  # while it is loaded
            assert process.stderr is not None
            assert "DriverEntry returned STATUS_SUCCESS" in process.stderr.readline()
            os.killpg(process.pid, signal.SIGINT)
            output, errors = process.communicate(timeout=30)
        assert output == "Bye bye!\n"
        assert "interrupted: unloading" in errors
        assert "Traceback" not in errors
        assert process.returncode == 0
        assert left_behind() == []

    def test_is_interrupted_while_driver_entry_hangs(
        self, project: pytest.Pytester, left_behind: Callable[[], list[str]]
    ) -> None:
        arguments = ("run", "stubborn", "-p", "How=slow-init")
        with begun(*arguments, cwd=project.path) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "slow\n"
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert left_behind() == []

    def test_of_a_target_that_sees_nothing_says_what_it_can_t_see(
        self, kdriver: Kdriver, project: pytest.Pytester
    ) -> None:
        config = project.path / "kdriver.toml"
        config.write_text(
            config.read_text() + '[targets.deaf]\nkind = "wine"\nwithout = ["kernel-log"]\n'
        )
        done = kdriver("run", "hello", "--vm", "deaf")
        assert done.returncode == 1
        assert "no capability 'kernel-log'" in done.stderr


class TestBuild:
    def test_prints_where_the_images_are(self, kdriver: Kdriver) -> None:
        done = kdriver("build", "hello", "leaks")
        assert done.returncode == 0
        images = [Path(line) for line in done.stdout.splitlines()]
        assert [image.name for image in images] == ["hello.sys", "leaks.sys"]
        assert all(image.read_bytes()[:2] == b"MZ" for image in images)

    def test_that_fails_shows_cargo_s_output_and_exits_with_1(
        self, kdriver: Kdriver, project: pytest.Pytester
    ) -> None:
        package = project.path / "broken"
        (package / "src").mkdir(parents=True)
        (package / "Cargo.toml").write_text(
            '[package]\nname = "broken"\nversion = "0.1.0"\nedition = "2021"\n[workspace]\n'
        )
        (package / "src" / "lib.rs").write_text("#![no_std]\nthis is no Rust\n")
        (project.path / "kdriver.toml").write_text('manifest = "broken"\n')
        done = kdriver("build", "broken")
        assert done.returncode == 1
        assert done.stderr.startswith("kdriver: package 'broken' does not build\n")
        assert "src/lib.rs:2:" in done.stderr

    def test_without_a_workspace_says_what_to_set(
        self, kdriver: Kdriver, project: pytest.Pytester
    ) -> None:
        (project.path / "kdriver.toml").write_text("")
        done = kdriver("build", "hello")
        assert done.returncode in {1, 2}
        assert "set manifest in kdriver.toml or [tool.kdriver]" in done.stderr


class TestGc:
    def test_says_that_there_was_nothing(self, kdriver: Kdriver) -> None:
        done = kdriver("gc")
        assert (done.returncode, done.stdout) == (0, "nothing was left behind\n")

    def test_leaves_a_run_alone_that_lives_and_removes_one_that_died(
        self, kdriver: Kdriver, project: pytest.Pytester, left_behind: Callable[[], list[str]]
    ) -> None:
        with begun("run", "hello", "--for", "60", cwd=project.path) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "Hello, world!\n"
            assert kdriver("gc").stdout == "nothing was left behind\n"
            assert process.poll() is None
            process.kill()
        (folder,) = {line for line in left_behind() if not line.startswith("process ")}
        assert kdriver("gc").stdout == f"removed {folder}\n"
        assert left_behind() == []


def test_without_a_command_says_which_there_are(kdriver: Kdriver) -> None:
    done = kdriver()
    assert done.returncode == 2
    assert "{run,build,gc}" in done.stderr or "COMMAND" in done.stderr
    assert all(command in kdriver("--help").stdout for command in ("run", "build", "gc"))


class TestDoctor:
    def test_finds_all_that_there_is_and_exits_with_0(
        self, kdriver: Kdriver, left_behind: Callable[[], list[str]]
    ) -> None:
        done = kdriver("doctor")
        assert done.returncode == 0, done.stdout
        assert re.search(r"^ok +target wine: Wine .*, started in [0-9.]+ s$", done.stdout, re.M)
        assert "hello" in done.stdout
        assert done.stdout.endswith("nothing is missing\n")
        assert left_behind() == []

    def test_names_what_is_missing_and_the_command_that_mends_it(
        self, kdriver: Kdriver, project: pytest.Pytester
    ) -> None:
        project.path.joinpath("kdriver.toml").write_text(
            'vm = "other"\n[targets.other]\nkind = "wine"\nwine = "/no/such/wine64"\n'
        )
        done = kdriver("doctor")
        assert done.returncode == 1
        assert (
            "missing  target other: there is no Wine '/no/such/wine64' that runs; "
            "on Debian or Ubuntu: apt-get install wine64 wine" in done.stdout
        )
        assert done.stdout.endswith("target other: missing, see above\n")

    def test_of_a_rust_without_its_target_says_how_to_add_it(
        self,
        project: pytest.Pytester,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for name in ("rustup", "cargo", "rustc"):
            program = tmp_path / name
            program.write_text("#!/bin/sh\nexit 1\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(toolchain, "SYSTEM_PROGRAMS", tmp_path / "none")
        monkeypatch.chdir(project.path)
        toolchain.find_toolchain.cache_clear()
        try:
            assert main(["doctor", "--json"]) == 1
        finally:
            toolchain.find_toolchain.cache_clear()
        found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
        assert found["Rust"]["state"] == "missing"
        assert found["Rust"]["remedy"] == "rustup target add x86_64-pc-windows-msvc"
        assert "drivers" not in found

    def test_of_a_bad_config_says_where_it_is_wrong(
        self, kdriver: Kdriver, project: pytest.Pytester
    ) -> None:
        project.path.joinpath("kdriver.toml").write_text('vmm = "wine"\n')
        done = kdriver("doctor")
        assert done.returncode == 1
        assert "unknown key 'vmm' (did you mean 'vm'?)" in done.stdout

    @pytest.mark.parametrize("cache", ["/proc/no-cache", "/etc/hostname"])
    def test_of_a_cache_that_cannot_be_made(
        self, kdriver: Kdriver, monkeypatch: pytest.MonkeyPatch, cache: str
    ) -> None:
        monkeypatch.setenv("KDRIVER_CACHE", cache)
        done = kdriver("doctor")
        assert done.returncode == 1
        assert "missing  cache: " in done.stdout
        assert "set KDRIVER_CACHE" in done.stdout
        findings = json.loads(kdriver("doctor", "--json").stdout)
        assert findings[-1]["name"] in ("Rust", "drivers")

    def test_for_programs_is_json(self, kdriver: Kdriver) -> None:
        findings = json.loads(kdriver("doctor", "--json").stdout)
        assert {finding["state"] for finding in findings} == {"ok"}
        assert [finding["name"] for finding in findings][-2:] == ["leftovers", "target wine"]

    def test_tells_of_a_killed_run(self, kdriver: Kdriver, own_cache: Path) -> None:
        folder = own_cache / "runs" / "1-dead"
        folder.mkdir(parents=True)
        (folder / "lock").touch()
        findings = json.loads(kdriver("doctor", "--json").stdout)
        found = {finding["name"]: finding for finding in findings}
        assert found["leftovers"]["state"] == "note"
        assert found["leftovers"]["detail"] == "of 1 killed runs"
        assert not folder.exists()  # the trial of the target removed it, as any run does
