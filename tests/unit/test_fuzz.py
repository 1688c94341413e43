"""``make fuzz`` in small: its inputs are such that the parsers take them, and its count is what it tried."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_show_no_mistake(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds():
        target.check(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_with_structure_show_no_mistake(name: str) -> None:
    target = TARGETS[name]
    given(target.inputs)(target.check)()


@pytest.mark.parametrize("name", TARGETS)
@given(st.binary(max_size=400))
def test_inputs_without_any_show_no_mistake(name: str, data: bytes) -> None:
    TARGETS[name].check(data)


def test_an_engine_tells_how_many_inputs_it_tried(tmp_path: Path) -> None:
    result = tmp_path / "result"
    command = [sys.executable, "-m", "fuzz.engines", "dumps", "mutation", "300", "1", str(result)]
    subprocess.run(command, check=True, timeout=60, cwd=Path(__file__).parents[2])
    told = json.loads(result.read_text())
    assert (told["inputs"], told["finding"]) == (300, None)
