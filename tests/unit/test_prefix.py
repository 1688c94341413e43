"""The processes of a prefix: found, however they live on, and ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
