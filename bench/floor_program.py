"""The floor of what goes through the agent: a program in the guest that does nothing else, in a loop."""

from __future__ import annotations

import functools
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_kdriver.kernel.sources.wine import DEBUG_CHANNELS
from pytest_kdriver.targets.prefix import Wine
from pytest_kdriver.toolchain import TARGET, find_toolchain

SOURCE = Path(__file__).with_name("floor")
IOCTLS = 100
_ANSWER = struct.Struct("<I")
_FAILED = 0xFFFFFFFF


@functools.cache
def floor_executable() -> Path:
    """``floor.exe``, built by cargo. It needs no crate."""
    toolchain = find_toolchain()
    subprocess.run(
        [
            toolchain.cargo,
            "build",
            "--quiet",
            "--release",
            "--locked",
            f"--manifest-path={SOURCE / 'Cargo.toml'}",
            f"--target-dir={SOURCE / 'target'}",
            f"--target={TARGET}",
            *toolchain.build_arguments,
        ],
        env=toolchain.full_environment(),
        stdin=subprocess.DEVNULL,
        check=True,
    )
    return SOURCE / "target" / TARGET / "release" / "floor.exe"


class FloorProgram:
    """The program as it runs."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def round(self) -> float:
        """One round; the seconds that it took, by the guest's own clock."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b".")
        answer = self._process.stdout.read(_ANSWER.size)
        return to_rounds(answer)[0]


def to_rounds(answers: bytes) -> list[float]:
    """The seconds that each round took, from what the program answered."""
    microseconds = [answer for (answer,) in _ANSWER.iter_unpack(answers)]
    if _FAILED in microseconds or not microseconds:
        raise RuntimeError("a round of the floor program's failed")
    return [answer / 1e6 for answer in microseconds]


@contextmanager
def floor_program(wine: Wine, prefix: Path, *arguments: str) -> Iterator[FloorProgram]:
    """Start the program beside what already runs in ``prefix``, traced as that is.

    Its arguments are ``cycle SERVICE``, or ``ioctl DEVICE``, whose rounds have ``IOCTLS`` calls each.
    """
    process = subprocess.Popen(
        [wine.loader, str(floor_executable()), *arguments],
        bufsize=0,
        env=wine.environment(prefix, DEBUG_CHANNELS),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the drivers' trace goes where that of the prefix goes
        start_new_session=True,
    )
    with process:
        yield FloorProgram(process)
        assert process.stdin is not None
        process.stdin.close()
