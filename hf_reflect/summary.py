"""What a run did, in numbers small enough to keep while rows stream by."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_reflect.oracles.purse import Purse, Spent


@dataclass
class Mean:
    """A running mean that passes over nulls.

    Attributes:
        n: How many values it is the mean of.
    """

    n: int = 0
    total: float = 0.0

    def add(self, value: float | None) -> None:
        """Takes one more value into account."""
        if value is not None:
            self.n, self.total = self.n + 1, self.total + value

    @property
    def value(self) -> float | None:
        """The mean; null where there was nothing."""
        return self.total / self.n if self.n else None


@dataclass
class Summary:
    """Counts and means over the rows of a run.

    Attributes:
        rows: Rows of the source.
        kept: Rows in config `default`.
        recycled: Rows by what became of them.
        statuses: Reflections by phase and status.
        decisions: Decisions by phase and reason.
        means: Means before and after, by quantity. Lengths are in characters.
        ifd_at_least_one: Rows of the source with an IFD of 1 or more.
        purse: What this process paid for, and the prices.
    """

    rows: int = 0
    kept: int = 0
    recycled: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    means: dict[tuple[str, str], Mean] = field(default_factory=dict)
    ifd_at_least_one: int = 0
    purse: Purse = field(default_factory=Purse)

    @property
    def spent(self) -> Spent:
        """What this process paid for."""
        return self.purse.spent

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes rows of config `reflections` into account."""
        for row in rows:
            self.rows += 1
            self.recycled[row["recycled"]] += 1
            for phase in ("instruction", "response"):
                for reflection in row[f"{phase}_reflections"]:
                    self.statuses[phase, reflection["status"]] += 1
                self.decisions[phase, row[f"{phase}_decision"]["reason"]] += 1
            self._compare(row)

    def _compare(self, row: Mapping[str, Any]) -> None:
        original = row["original"]
        if original is None:
            return
        final = final_pair(row)
        for part in ("instruction", "response"):
            self._mean(f"{part} length", "before").add(len(original[part]))
            self._mean(f"{part} length", "after").add(len(final[part]))
        self.ifd_at_least_one += ((original["ifd"] or {}).get("value") or 0) >= 1
        for measure in ("ifd", "rifd"):
            self._mean(measure, "before").add((original[measure] or {}).get("value"))
            self._mean(measure, "after").add((row[f"{measure}_score"] or {}).get("value"))

    def _mean(self, quantity: str, when: str) -> Mean:
        return self.means.setdefault((quantity, when), Mean())


def final_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """The pair that a row of config `reflections` ended with: instruction, input and response."""
    final = {part: row["original"][part] for part in ("instruction", "input", "response")}
    for phase in ("instruction", "response"):
        chosen = row[f"{phase}_decision"]["candidate"]
        if chosen is not None:
            reflection = row[f"{phase}_reflections"][chosen]
            if reflection["instruction"] is not None:
                final |= {"instruction": reflection["instruction"], "input": reflection["input"] or ""}
            final["response"] = reflection["response"]
    return final
