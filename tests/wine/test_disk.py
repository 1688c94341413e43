"""Disks that are full, or can't be written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

Mounted = Callable[..., pytest.RunResult]


@pytest.fixture
def mounted(project: pytest.Pytester) -> Mounted:
    """Run pytest in the project while ``small`` in it is a file system of its own, of these options."""
    folder = project.path / "small"
    folder.mkdir()

    def command(options: str) -> list[str]:
        mount = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
        return ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)]

    tried = subprocess.run(
        [*command("size=1m"), "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"a file system can't be mounted here: {tried.stderr.strip()}")

    def mounted(options: str, *arguments: str) -> pytest.RunResult:
        pytest_command = [sys.executable, "-m", "pytest", "-W", "error", "-v", *arguments]
        return project.run(*command(options), *pytest_command, timeout=300)

    return mounted


HELLO = """
    import pytest

    @pytest.mark.kdriver("hello")
    def test_hello(kdriver):
        with kdriver.running():
            pass
"""


def no_traceback(result: pytest.RunResult) -> None:
    assert "pytest_kdriver/" not in result.stdout.str()


def test_a_cache_that_cannot_be_written_is_told_with_what_to_do(
    project: pytest.Pytester, mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.makepyfile(HELLO)
    monkeypatch.setenv("KDRIVER_CACHE", str(project.path / "small"))
    result = mounted("size=1m,ro", "--kdriver-vm", "wine")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["TargetError: *Read-only file system*; make it writable, or set KDRIVER_CACHE*"]
    )
    no_traceback(result)


def test_a_cache_without_room_for_a_prefix_is_told_before_one_is_made(
    project: pytest.Pytester, mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.makepyfile(HELLO)
    monkeypatch.setenv("KDRIVER_CACHE", str(project.path / "small"))
    result = mounted("size=20m", "--kdriver-vm", "wine")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["TargetError: *takes up to 1024 MiB, and * MiB are free in *set KDRIVER_CACHE*"]
    )
    no_traceback(result)


def test_a_full_disk_in_the_guest_is_told_and_hinders_no_other_test(
    project: pytest.Pytester, mounted: Mounted
) -> None:
    project.makepyfile(
        HELLO
        + """
    from pathlib import Path
    from pytest_kdriver import AgentError

    def test_put(kdriver_target):
        path = "Z:" + str(Path.cwd() / "small" / "large").replace("/", "\\\\")
        with pytest.raises(AgentError, match="ERROR_DISK_FULL"):
            kdriver_target.put(bytes(3 << 20), path)
        kdriver_target.put(b"fits", path)
        assert kdriver_target.get(path) == b"fits"
"""
    )
    result = mounted("size=1m", "--kdriver-vm", "wine")
    result.assert_outcomes(passed=2)


def test_where_artifacts_do_not_fit_the_report_says_so_and_the_run_goes_on(
    project: pytest.Pytester, mounted: Mounted
) -> None:
    """The kernel log's old events would go to the same folder: they stay in memory, and none is lost."""
    project.makepyfile(
        """
    import pytest
    from pathlib import Path

    @pytest.fixture
    def full_disk():
        with pytest.raises(OSError, match="No space left"):
            Path("small", "full").write_bytes(bytes(2 << 20))

    @pytest.mark.kdriver("chatty", parameters={"Lines": 30_000, "Length": 40})
    def test_chatty(full_disk, kdriver):
        with kdriver.running():
            pass
        assert len(kdriver.dbgprint.lines) == 30_000

    @pytest.mark.kdriver("hello")
    def test_fails(kdriver):
        with kdriver.running():
            assert False
"""
    )
    result = mounted("size=1m", "--kdriver-vm", "wine", "--kdriver-artifacts", "small/kept")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["could not be written: *No space left on device*"])
    no_traceback(result)


def test_a_build_on_a_full_disk_shows_cargo_s_words(
    project: pytest.Pytester, mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.makepyfile(HELLO)
    monkeypatch.setenv("CARGO_TARGET_DIR", str(project.path / "small"))
    result = mounted("size=1m", "--kdriver-vm", "wine")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["BuildError: package 'hello' does not build", "*No space left*"])
    no_traceback(result)
