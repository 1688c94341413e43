"""Inputs from a hostile guest, by the million: ``python -m fuzz``, or ``make fuzz``."""
