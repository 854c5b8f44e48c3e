"""Two results of `s1kernels bench`: what got slower by more than the rounds of both differ among themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s1kernels.bench.timing import spread

KEYS = {
    "frames": ("system", "context"),
    "ops": ("op", "case", "contender"),
    "speech": ("system", "characters"),
    "stack": ("table", "dim", "layers", "positions", "mode", "system"),
}
"""Part -> what names a row."""

FLOOR = 0.03  # of the time: what two runs differ by although their own rounds do not


@dataclass(frozen=True)
class Change:
    """A row of both results. `new` is None if it is measured no more, and `reason` then says why."""

    row: str
    old: float
    new: float | None
    noise: float
    reason: str = ""

    @property
    def verdict(self) -> str:
        """ "slower" or "lost", which are regressions; "faster"; or "same"."""
        if self.new is None:
            return "lost"
        change = self.new / self.old - 1
        return "slower" if change > self.noise else "faster" if 1 / (1 + change) - 1 > self.noise else "same"

    @property
    def regression(self) -> bool:
        return self.verdict in ("slower", "lost")


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The rows that `old` has a number for and that `new` has at all.

    Raises:
        ValueError: the results are of different models, dtypes or devices.
    """
    for name, a, b in (
        ("model", old["model"], new["model"]),
        *((key, old["options"][key], new["options"][key]) for key in ("device", "dtype")),
    ):
        if a != b:
            raise ValueError(f"compare: {name} must be the same in both results, got {a} and {b}; measure it again")
    changes = []
    for part, keys in KEYS.items():
        rows = {tuple(row[key] for key in keys): row for row in new.get(part, [])}
        for before in old.get(part, []):
            key = tuple(before[name] for name in keys)
            if "refused" in before or key not in rows:
                continue
            after, title = rows[key], f"{part}: {' '.join(map(str, key))}"
            if "refused" in after:
                changes.append(Change(title, before["seconds"], None, 0.0, after["refused"]))
            else:
                noise = spread(before) + spread(after) + FLOOR
                changes.append(Change(title, before["seconds"], after["seconds"], noise))
    return changes
