"""Whether KVM works on this host: found out by running what kernels run.

There are hosts where /dev/kvm opens, libvirt's capabilities offer KVM and the firmware runs, and yet no
kernel boots. So a firmware of our own (``trial.S``) does what kernels do and firmware does not, within a
deadline.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import pwd
import re
import selectors
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets.libvirt.connection import Owner

Kind = Literal["kvm", "tcg"]

PROCESSOR: Final = {"kvm": "host,arch-capabilities=off", "tcg": "max,smap=off"}
"""The processor that a trial has; a domain's is the same, see ``domain_xml``."""

_TIMEOUT: Final = 5.0
_ROM_SIZE: Final = 0x10000
_RIGHT: Final = 0x2A << 1 | 1  # what the exit device makes of the trial's 0x2a
_STEPS: Final = {
    "r": "does not get from reset to long mode",
    "l": "does not get from reset to long mode",
    "c": "fails at cmpxchg16b",
    "i": "fails at int3 and iretq",
    "x": "fails at xsave and xrstor",
}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What guests run by; ``reason`` says why KVM can't be used, where it can't."""

    kind: Kind
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """How a trial ended: ``step`` is the last letter it wrote, ``said`` the emulator's last line."""

    passed: bool
    step: str
    said: str


def find_accelerator(emulator: Path, owner: Owner | None = None) -> Accelerator:
    """KVM if it works, for those whom guests run as; else TCG. Remembered for this host."""
    record = _record(emulator, owner)
    with suppress(OSError, ValueError, TypeError, KeyError):
        return Accelerator(**json.loads(record.read_text(encoding="utf-8")))
    trial = run_trial(emulator, "kvm", owner)
    if trial.passed:
        found = Accelerator("kvm")
    elif trial.step:
        found = Accelerator("tcg", f"KVM is there, but {_STEPS[trial.step]}: no kernel would boot")
    else:  # not remembered: a module that is not loaded, or a permission, can be mended
        return Accelerator("tcg", f"KVM can't be had: {trial.said}")
    _remember(record, found)
    return found


def remember_failure(emulator: Path, reason: str, owner: Owner | None = None) -> Accelerator:
    """Note that KVM failed a guest although it passed its trial; what is to be used from now on."""
    found = Accelerator("tcg", f"KVM failed a guest on this host: {reason}")
    _remember(_record(emulator, owner), found)
    return found


def forget(emulator: Path, owner: Owner | None = None) -> None:
    """Forget what was found on this host; the next ``find_accelerator`` tries again."""
    _record(emulator, owner).unlink(missing_ok=True)


def run_trial(
    emulator: Path,
    accelerator: Kind,
    owner: Owner | None = None,
    *,
    code: bytes | None = None,
    timeout: float = _TIMEOUT,
) -> Trial:
    """Run the trial, or other code for a firmware's last KiB, until it ends, fails or takes too long."""
    code = trial_code() if code is None else code
    with tempfile.TemporaryDirectory(prefix="kdriver-trial-") as folder:
        Path(folder).chmod(0o755)
        rom = Path(folder, "rom.bin")
        rom.write_bytes(code.rjust(_ROM_SIZE, b"\0"))
        rom.chmod(0o644)
        command = [str(emulator), "-accel", accelerator, "-cpu", PROCESSOR[accelerator]]
        command += ["-machine", "q35", "-m", "16", "-bios", str(rom), "-display", "none"]
        command += ["-nodefaults", "-no-user-config", "-no-reboot", "-debugcon", "stdio"]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        return _watch(command, owner, timeout)


def trial_code() -> bytes:
    """``trial.S``, assembled."""
    return Path(__file__).with_name("trial.bin").read_bytes()


def _watch(command: list[str], owner: Owner | None, timeout: float) -> Trial:
    identity: dict[str, Any] = {}
    if owner is not None and owner.uid != os.geteuid():
        identity = {"user": owner.uid, "group": owner.gid, "extra_groups": _groups(owner)}
    try:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            **identity,
        )
    except OSError as e:
        return Trial(passed=False, step="", said=str(e))
    with process:
        try:
            steps, said = _read(process, time.monotonic() + timeout)
            hung = process.poll() is None  # a KVM that gave up leaves QEMU paused for ever
        finally:
            process.kill()
    last = steps.decode(errors="replace")[-1:]
    silence = f"no answer within {timeout:g} s" if hung else "it ended without a word"
    lines = said.decode(errors="replace").strip().splitlines() or [silence]
    return Trial(
        passed=process.returncode == _RIGHT,
        step=last if last in _STEPS else "",
        said=re.sub(r"^\S*qemu\S*: ", "", lines[-1]),
    )


def _read(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bytes]:
    """The steps, and what QEMU said, until it ended, gave up, or the deadline passed."""
    assert process.stdout is not None
    assert process.stderr is not None
    said = {process.stdout: b"", process.stderr: b""}
    with selectors.DefaultSelector() as selector:
        for file in said:
            selector.register(file, selectors.EVENT_READ)
        while selector.get_map() and b"KVM internal error" not in said[process.stderr]:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                said[key.fileobj] += data  # type: ignore[index]  # they are the files registered above
                if not data:
                    selector.unregister(key.fileobj)
        if not selector.get_map():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    return said[process.stdout], said[process.stderr]


def _groups(owner: Owner) -> list[int]:
    try:
        return os.getgrouplist(pwd.getpwuid(owner.uid).pw_name, owner.gid)
    except KeyError:
        return []


def _record(emulator: Path, owner: Owner | None) -> Path:
    """Where it is written what was found; another name where the host, its kernel or its QEMU is another."""
    try:
        status = emulator.stat()
        emulator_key = [str(emulator), status.st_size, status.st_mtime_ns]
    except OSError:
        emulator_key = [str(emulator)]
    uid = os.geteuid() if owner is None else owner.uid
    key = [_machine_id(), platform.release(), _processor(), *emulator_key, uid]
    digest = hashlib.sha256(json.dumps(key).encode() + trial_code()).hexdigest()[:16]
    return cache_directory() / "hosts" / f"accelerator-{digest}.json"


def _remember(record: Path, found: Accelerator) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    new = record.with_name(f".{record.name}-{os.getpid()}")
    new.write_text(json.dumps(asdict(found)), encoding="utf-8")
    new.rename(record)


def _machine_id() -> str:
    with suppress(OSError):
        return Path("/etc/machine-id").read_text(encoding="ascii").strip()
    return platform.node()


def _processor() -> str:
    with suppress(OSError):
        information = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if model := re.search(r"^model name\s*:\s*(.*)$", information, re.MULTILINE):
            return model[1]
    return platform.machine()
