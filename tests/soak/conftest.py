"""What the long tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def tell(
    record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> Callable[[str], None]:
    """Say a test's result: in the report, and at once."""

    def tell(result: str) -> None:
        record_property("result", result)
        with capsys.disabled():
            print(f"\n{result}")

    return tell
