"""The figures as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from bench.figure import Figure, Limited

_HEADER = ("figure", "value", "floor", "ratio", "limit", "")


def render(figures: Sequence[Figure]) -> str:
    """A line for each figure; where a limit is not kept it says so."""
    rows = [_HEADER, *(_row(figure) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(figure: Figure) -> tuple[str, ...]:
    limit = ""
    if figure.limit is not None:
        kind = {Limited.VALUE: "<= {}", Limited.RATIO: "ratio <= {}", Limited.EXCESS: "floor + {}"}
        limit = kind[figure.limited].format(f"{figure.limit:g}")
        if figure.limited is not Limited.RATIO:
            limit += f" {figure.unit}"
    return (
        figure.name,
        _amount(figure.value, figure.unit),
        "" if figure.floor is None else _amount(figure.floor, figure.unit),
        "" if figure.ratio is None else f"{figure.ratio:.2f}",
        limit,
        {None: "", True: "ok", False: "NOT MET"}[figure.ok],
    )


def _amount(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}"
