"""What a measurement is held to.

Owns: goals, whether they were met, their table. Must not know: how figures come about. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


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


def missed(goals: Sequence[Goal]) -> str:
    """A sentence about each goal that was missed, one a line; empty where all were met."""
    return "\n".join(f"{goal.name} is {_measured(goal)}; wanted was {goal.wanted}." for goal in goals if not goal.met)


def goal_table(title: str, goals: Sequence[Goal]) -> Table:
    table = Table(f"{title}: goal", "wanted", "measured", "met")
    for goal in goals:
        table.add_row(goal.name, goal.wanted, _measured(goal), "yes" if goal.met else "[bold red]no")
    return table


def _measured(goal: Goal) -> str:
    return "not measured" if goal.value is None else f"{goal.value:.4g}"
