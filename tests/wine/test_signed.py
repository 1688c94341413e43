"""A signed driver on Wine, which does not look at signatures: it is the driver that it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.handle import TargetHandle
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.image.finder import ImageFinder
from pytest_kdriver.image.signing import sign, verify
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets.wine import WineTarget


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
    shared.revert()
    return shared


@pytest.mark.parametrize("page_hashes", [False, True])
def test_a_signed_driver_loads_prints_and_unloads(
    target: WineTarget,
    cargo: Cargo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    page_hashes: bool,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    signed = tmp_path / "hello.sys"
    sign(cargo.build("hello"), signed, page_hashes=page_hashes)
    assert verify(signed).page_hashes == page_hashes
    driver = TargetHandle(target, ImageFinder(Path("/"), None)).make_driver(str(signed))
    assert driver.start() == NTSTATUS.STATUS_SUCCESS
    driver.stop()
    assert driver.dbgprint.lines == ["Hello, world!", "Bye bye!"]
    assert driver.preflight is not None
    assert driver.preflight.findings == ()
