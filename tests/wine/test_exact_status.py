"""A status that no kernel has, returned by a DriverEntry, as it comes back from a real Wine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.windows import exact_status
from pytest_kdriver.targets.windows.exact_status import (
    RETURNED,
    SERVICE,
    assert_exact_status,
    load_proof,
)
from pytest_kdriver.targets.windows.in_force import NotInForce
from pytest_kdriver.targets.wine import WineTarget
from tests.pe_builder import build

IMAGE = Path(exact_status.__file__).with_name("exact_status.bin")
SUCCEEDS = bytes.fromhex("31c0 c3")


@pytest.fixture
def target(own_cache: Path) -> Iterator[WineTarget]:
    try:
        target = WineTarget(TargetConfig(name="wine", kind="wine"))
    except TargetError as error:
        pytest.skip(str(error))
    try:
        target.start()
        yield target
    finally:
        target.close()


def test_the_image_is_what_its_docstring_says() -> None:
    """``mov eax, 0xC0DE1234; ret``; an absolute address, so that there are relocations."""
    assert IMAGE.read_bytes() == build(code=bytes.fromhex("b8 3412dec0 c3"), pointers=1)


def test_it_comes_back_as_it_was(target: WineTarget, tmp_path: Path) -> None:
    for _ in range(2):  # its image is there by then
        outcome = load_proof(target, tmp_path)
        assert (outcome.status, outcome.loaded) == (RETURNED, False)
        assert target.agent.query_service(SERVICE) is None
    assert assert_exact_status(target, tmp_path) == []
    assert target.preflight(tmp_path / f"{SERVICE}.sys").errors == ()


def test_another_one_is_refused(
    target: WineTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is swapped: a Wine that harms a status can't be had."""
    other = tmp_path / "other"
    other.write_bytes(build(code=SUCCEEDS, pointers=1))
    monkeypatch.setattr(exact_status, "IMAGE", other)
    with pytest.raises(NotInForce, match="0xC0DE1234.* came back as STATUS_SUCCESS"):
        assert_exact_status(target, tmp_path)
