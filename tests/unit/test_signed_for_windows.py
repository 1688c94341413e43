"""What goes to a Windows is signed, and to Wine as it is. The Windows is a fake: not verified on Windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import ImageError
from pytest_kdriver.guest import messages
from pytest_kdriver.image.signing import sign, verify
from pytest_kdriver.remote_config import RemoteConfig
from pytest_kdriver.targets import machine_target
from pytest_kdriver.targets import remote as remote_module
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.remote import RemoteMachine
from tests.pe_builder import build
from tests.unit.test_agent import HELLO
from tests.unit.test_remote import FakeProgram, FakeWay, Windows


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(remote_module, "AGENT", FakeProgram(tmp_path / "kdagent.exe"))
    monkeypatch.setattr(machine_target, "assert_exact_status", lambda target, folder: [])
    path = tmp_path / "hello.sys"
    path.write_bytes(build(imports={"ntoskrnl.exe": ["DbgPrint"]}, pointers=1))
    return path


@contextmanager
def started(windows: Windows) -> Iterator[MachineTarget]:
    remote = RemoteConfig(host="lab", user="tester", timeout=5)
    config = TargetConfig(name="lab", kind="remote", remote=remote)
    target = MachineTarget("lab", RemoteMachine(config, way=FakeWay(windows)))
    try:
        target.start()
        yield target
    finally:
        target.close()


def start(target: MachineTarget, image: Path) -> None:
    Driver(target, image, name="hello", leaks="allow", timeout=5).start()


def installed(windows: Windows) -> str:
    """The beginning of its hash, which is its folder's name."""
    (path,) = windows.files
    return path.split("\\")[2]


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_what_nobody_signed_is_signed_in_a_copy(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    windows = Windows()
    with started(windows) as target:
        start(target, image)
        (copy,) = (tmp_path / "cache" / "runs").glob("*/signed/*/hello.sys")
        assert verify(copy).subject.startswith("CN=pytest-kdriver test signing")
        assert installed(windows) == hash_of(copy) != hash_of(image)
    assert image.read_bytes() == before
    assert not copy.exists()


def test_what_is_signed_goes_as_it_is(image: Path, tmp_path: Path) -> None:
    signed = tmp_path / "signed" / "hello.sys"
    signed.parent.mkdir()
    sign(image, signed)
    windows = Windows()
    with started(windows) as target:
        start(target, signed)
        assert installed(windows) == hash_of(signed)


def test_what_was_changed_since_is_refused(image: Path, tmp_path: Path) -> None:
    sign(image, tmp_path / "changed.sys")
    content = bytearray((tmp_path / "changed.sys").read_bytes())
    content[0x400] ^= 1
    (tmp_path / "changed.sys").write_bytes(content)
    windows = Windows()
    with (
        started(windows) as target,
        pytest.raises(ImageError, match="0xC0000428"),
    ):
        start(target, tmp_path / "changed.sys")
    assert windows.files == {}


def test_for_wine_nothing_is_signed(image: Path, tmp_path: Path) -> None:
    windows = Windows({messages.Hello: replace(HELLO, wine_version="8.0")})
    with started(windows) as target:
        target.install("hello", image, {}, 5)
        assert installed(windows) == hash_of(image)
    assert not (tmp_path / "state").exists()
