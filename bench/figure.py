"""A figure: what was measured, the floor beside it, and the limit that it has to keep."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Limited(Enum):
    """What a limit is a limit of."""

    VALUE = "value"
    RATIO = "ratio"  # value / floor
    EXCESS = "excess"  # value - floor


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table. ``floor`` is in ``unit`` too; ``note`` says what it is the floor of."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    limit: float | None = None
    limited: Limited = Limited.VALUE
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times the floor the value is."""
        return self.value / self.floor if self.floor else None

    @property
    def ok(self) -> bool | None:
        """Whether the limit is kept; None where there is none."""
        if self.limit is None:
            return None
        measured = {
            Limited.VALUE: self.value,
            Limited.RATIO: self.ratio,
            Limited.EXCESS: self.value - (self.floor or 0),
        }[self.limited]
        return measured is not None and measured <= self.limit

    def as_json(self) -> dict[str, object]:
        """What is written to ``results.json``."""
        told: dict[str, object] = {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "floor": self.floor,
            "ratio": self.ratio,
        }
        if self.limit is not None:
            told |= {"limit": self.limit, "limit_of": self.limited.value, "ok": self.ok}
        return told | {"note": self.note}


def median(values: Sequence[float]) -> float:
    """The middle one; a single slow run of a busy machine does not move it."""
    return statistics.median(values)
