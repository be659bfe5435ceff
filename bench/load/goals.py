"""What a measurement is held to.

Owns: goals, and whether they were met. Must not know: how figures come about. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure and the most, or the least, that it may be. A figure of None was not measured: the goal is missed."""

    name: str
    value: float | None
    most: float | None = None
    least: float | None = None

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)

    @property
    def wanted(self) -> str:
        """In words for people."""
        if self.least is None:
            return f"at most {self.most:g}"
        return f"at least {self.least:g}" if self.most is None else f"{self.least:g} to {self.most:g}"


def ratio(value: float | None, base: float | None) -> float | None:
    """None where either was not measured."""
    return None if value is None or not base else round(value / base, 4)
