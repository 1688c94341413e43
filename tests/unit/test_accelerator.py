"""The trial that tells whether an accelerator is sound: real QEMU, by emulation."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_kdriver.targets.libvirt import accelerator
from pytest_kdriver.targets.libvirt.accelerator import Accelerator, Trial, run_trial, trial_code
from tests.unit.far_ends import until

ROOT = Path(__file__).parents[2]
EMULATOR = Path(shutil.which("qemu-system-x86_64") or "/usr/bin/qemu-system-x86_64")
SLOW = 60.0

needs_qemu = pytest.mark.skipif(
    not EMULATOR.exists(), reason="needs QEMU (Debian: qemu-system-x86)"
)


def _broken(good: str, bad: str) -> bytes:
    """The trial with other instructions in place of some."""
    code, old, new = trial_code(), bytes.fromhex(good), bytes.fromhex(bad)
    assert code.count(old) == 1
    assert len(old) == len(new)
    return code.replace(old, new)


@needs_qemu
def test_emulation_is_sound() -> None:
    trial = run_trial(EMULATOR, "tcg", timeout=SLOW)
    assert (trial.passed, trial.step) == (True, "x")


@needs_qemu
@pytest.mark.parametrize(
    ("good", "bad", "step"),
    [
        pytest.param("f0480fc70c25", "0f0b0fc70c25", "c", id="cmpxchg16b is no instruction"),
        pytest.param(
            "f0480fc70c2500500000", "90909090909090909090", "c", id="cmpxchg16b does nothing"
        ),
        pytest.param("31f6cc", "31f690", "i", id="int3 does not come"),
        pytest.param("ffc648cf", "ffc60f0b", "i", id="no iretq"),
        pytest.param("480fc70c2500500000", "480fc70c2508500000", "c", id="an operand between"),
        pytest.param(
            "480fae2c2500600000", "0f0bae2c2500600000", "x", id="xrstor is no instruction"
        ),
        pytest.param("480fae2c2500600000", "909090909090909090", "x", id="xrstor does nothing"),
        pytest.param("480fae242500600000", "909090909090909090", "x", id="xsave does nothing"),
        pytest.param("0f01d1", "0f0b90", "x", id="no xsetbv"),
        pytest.param("0d00010000", "0d00000000", "r", id="no long mode"),
    ],
)
def test_a_step_that_fails_is_named(good: str, bad: str, step: str) -> None:
    trial = run_trial(EMULATOR, "tcg", code=_broken(good, bad), timeout=SLOW)
    assert (trial.passed, trial.step) == (False, step)


@needs_qemu
def test_a_processor_that_hangs_is_given_up_on() -> None:
    began = time.monotonic()
    trial = run_trial(EMULATOR, "tcg", code=_broken("31f6cc", "31f6f4"), timeout=1)  # hlt for int3
    assert not trial.passed
    assert 1 <= time.monotonic() - began < 10


def test_an_emulator_that_is_not_there_is_told(tmp_path: Path) -> None:
    trial = run_trial(tmp_path / "qemu", "kvm")
    assert (trial.passed, trial.step) == (False, "")
    assert "No such file" in trial.said


@pytest.mark.parametrize(
    "listing", ["pytest_kdriver/targets/libvirt/trial.S", "tests/vm/tiny_guest.S"]
)
def test_the_bytes_are_what_the_listing_says(listing: str, tmp_path: Path) -> None:
    if shutil.which("as") is None or shutil.which("objcopy") is None:
        pytest.skip("needs an assembler (Debian: binutils)")
    source = ROOT / listing
    made = tmp_path / "made.o"
    subprocess.run(["as", "--64", "-o", made, source], check=True)
    subprocess.run(["objcopy", "-O", "binary", made, tmp_path / "made.bin"], check=True)
    assert (tmp_path / "made.bin").read_bytes() == source.with_suffix(".bin").read_bytes()


def _emulator(folder: Path, *lines: str) -> Path:
    """A program that takes QEMU's place, and ends as these lines say."""
    script = folder / "qemu-system-x86_64"
    script.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_sound_kvm_is_used_and_remembered(tmp_path: Path) -> None:
    emulator = _emulator(tmp_path, f"echo x >> {tmp_path}/runs", "printf rlcix", "exit 85")
    assert accelerator.find_accelerator(emulator) == Accelerator("kvm")
    assert accelerator.find_accelerator(emulator) == Accelerator("kvm")
    assert (tmp_path / "runs").read_text() == "x\n"


def test_a_kvm_that_gives_up_is_left_alone_at_once(tmp_path: Path) -> None:
    emulator = _emulator(
        tmp_path, "printf rlci", "echo 'KVM internal error. Suberror: 1' >&2", "exec sleep 60"
    )
    began = time.monotonic()
    found = accelerator.find_accelerator(emulator)
    assert found == Accelerator(
        "tcg", "KVM is there, but fails at int3 and iretq: no kernel would boot"
    )
    assert time.monotonic() - began < 4


def test_a_kvm_that_is_not_permitted_is_asked_again(tmp_path: Path) -> None:
    emulator = _emulator(
        tmp_path, "echo 'qemu: Could not access KVM kernel module: Permission denied' >&2", "exit 1"
    )
    assert accelerator.find_accelerator(emulator) == Accelerator(
        "tcg", "KVM can't be had: Could not access KVM kernel module: Permission denied"
    )
    emulator = _emulator(tmp_path, "printf rlcix", "exit 85")
    assert accelerator.find_accelerator(emulator) == Accelerator("kvm")


def test_another_emulator_is_tried_anew(tmp_path: Path) -> None:
    emulator = _emulator(tmp_path, "printf rlc", "exit 0")
    assert accelerator.find_accelerator(emulator).kind == "tcg"
    emulator = _emulator(tmp_path, "printf rlcix", "exit 85", "# another")
    assert accelerator.find_accelerator(emulator).kind == "kvm"


def test_a_failure_that_a_trial_missed_is_remembered(tmp_path: Path) -> None:
    emulator = _emulator(tmp_path, "printf rlcix", "exit 85")
    assert accelerator.find_accelerator(emulator).kind == "kvm"
    accelerator.remember_failure(emulator, "it was paused")
    assert accelerator.find_accelerator(emulator) == Accelerator(
        "tcg", "KVM failed a guest on this host: it was paused"
    )
    accelerator.forget(emulator)
    assert accelerator.find_accelerator(emulator).kind == "kvm"


def test_an_interrupt_leaves_no_emulator_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = _emulator(tmp_path, f"echo $$ > {tmp_path}/pid", "exec sleep 600")

    def interrupt(*_: object) -> None:
        until(lambda: _read(tmp_path / "pid"))
        raise KeyboardInterrupt

    monkeypatch.setattr(accelerator, "_read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_trial(emulator, "kvm")
    until(lambda: _is_gone(int(_read(tmp_path / "pid"))))


def test_an_emulator_ends_with_who_tries_it(tmp_path: Path) -> None:
    emulator = _emulator(tmp_path, f"echo $$ > {tmp_path}/pid", "exec sleep 600")
    program = (
        "import sys; from pathlib import Path\n"
        "from pytest_kdriver.targets.libvirt.accelerator import run_trial\n"
        "run_trial(Path(sys.argv[1]), 'kvm', timeout=600)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # where it leaves the firmware
    with subprocess.Popen([sys.executable, "-c", program, emulator], env=environment) as process:
        pid = int(until(lambda: _read(tmp_path / "pid")))
        process.kill()
    until(lambda: _is_gone(pid))


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _is_gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "kvm", "other": 1}', "\0"])
def test_a_broken_record_is_no_record(tmp_path: Path, own_cache: Path, content: str) -> None:
    emulator = _emulator(tmp_path, "printf rlcix", "exit 85")
    accelerator.remember_failure(emulator, "it was paused")
    (record,) = (own_cache / "hosts").iterdir()
    record.write_text(content)
    assert accelerator.find_accelerator(emulator) == Accelerator("kvm")


def test_silence_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    emulator = _emulator(tmp_path, "exit 0")
    assert run_trial(emulator, "kvm") == Trial(
        passed=False, step="", said="it ended without a word"
    )
