"""The Wine that is taken; the processes of a prefix: found, however they live on, and ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets import prefix

WHOLE = "import time; print(flush=True); time.sleep(600)"
WITHOUT_ITS_FIRST_THREAD = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)  # exit(2) of this thread alone
"""


@pytest.mark.parametrize("program", [WHOLE, WITHOUT_ITS_FIRST_THREAD])
def test_a_process_of_the_prefix_is_found_and_ended(tmp_path: Path, program: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "WINEPREFIX": str(tmp_path)},
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            if program is WITHOUT_ITS_FIRST_THREAD:
                status = Path(f"/proc/{process.pid}/status")
                while "State:\tZ" not in status.read_text():
                    pass
            assert prefix.processes(tmp_path) == [process.pid]
            assert prefix.processes(tmp_path / "other") == []
            prefix.end(tmp_path)
            assert prefix.processes(tmp_path) == []
            assert process.wait(30) == -9
        finally:
            process.kill()


def make_wine(folder: Path, told: str, *, name: str = "wine") -> Path:
    """A Wine that can say its version, and no more."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n[ $1 = --version ] && echo '{told}'\n")
    (folder / "wineserver").write_text("#!/bin/sh\n")
    for program in (name, "wineserver"):
        (folder / program).chmod(0o755)
    return folder / name


@pytest.mark.parametrize(
    ("told", "version"),
    [
        ("wine-8.0", "8.0"),
        ("wine-8.0.2", "8.0.2"),
        ("wine-8.0 (Debian 8.0~repack-4)", "8.0 (Debian 8.0~repack-4)"),
        ("wine-9.0-rc2", "9.0-rc2"),
        ("wine-10.0 (Staging)", "10.0 (Staging)"),
        ("wine-11.3-189-g1a2b3c4d", "11.3-189-g1a2b3c4d"),
    ],
)
def test_a_wine_that_is_new_enough_is_taken(tmp_path: Path, told: str, version: str) -> None:
    loader = make_wine(tmp_path, told)
    found = prefix.find_wine(str(loader))
    assert (found.loader, found.version) == (str(loader), version)


@pytest.mark.parametrize(
    ("told", "version"),
    [
        ("wine-6.0.3", "6.0.3"),
        ("wine-7.22", "7.22"),
        ("wine-6.0.3 (Debian 6.0.3~repack-3)", "6.0.3"),
        ("wine-7.0-rc1", "7.0-rc1"),
    ],
)
def test_a_wine_that_is_too_old_is_refused(tmp_path: Path, told: str, version: str) -> None:
    loader = make_wine(tmp_path, told)
    with pytest.raises(TargetError) as refused:
        prefix.find_wine(str(loader))
    assert str(refused.value) == (
        f"Wine {version} ({loader}) is too old: 8.0 or newer is needed; "
        "install one, or name it as wine in the target's config"
    )


def test_what_is_no_wine_is_not_taken_for_one(tmp_path: Path) -> None:
    loader = make_wine(tmp_path, "cat (GNU coreutils) 9.1")
    with pytest.raises(TargetError, match="there is no Wine .* that runs"):
        prefix.find_wine(str(loader))


def test_an_old_wine_does_not_hide_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_wine(tmp_path / "old", "wine-6.0.3", name="wine64")
    new = make_wine(tmp_path / "new", "wine-9.0")
    monkeypatch.setenv("PATH", f"{old.parent}:{new.parent}:{os.environ['PATH']}")
    prefix.find_wine.cache_clear()
    try:
        assert prefix.find_wine().loader in ("/usr/lib/wine/wine64", str(new))
    finally:
        prefix.find_wine.cache_clear()
