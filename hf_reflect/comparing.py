"""Two runs over the same rows, held against each other: another oracle, another student, other settings."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_reflect.describing import Description, number
from hf_reflect.errors import SourceError
from hf_reflect.measures import QUANTITIES
from hf_reflect.prompts import PHASES
from hf_reflect.recipe import Recipe
from hf_reflect.selection import Keep
from hf_reflect.summary import LEFT_OUT, Summary, final_pair, policy_of, result_of
from hf_reflect.tables import Table
from hf_reflect.trail import Trail


_MOST_CHANGED = 1000
_NONE = "–"


@dataclass(frozen=True)
class Changed:
    """A row that differs between two results.

    Attributes:
        split: Its split.
        row: Its index in the source.
        before: What it is in the result of the first run.
        after: What it is in that of the second.
        decisions: By phase, the reasons in the first and in the second, where they differ.
    """

    split: str
    row: int
    before: str
    after: str
    decisions: Mapping[str, tuple[str, str]]


@dataclass
class Comparison:
    """What two runs did with the same rows.

    Attributes:
        names: Where they are.
        settings: What they were made with, where that differs.
        descriptions: The statistics of each.
        policies: Which rows each keeps.
        matched: Rows that both have, with the same original.
        only: Rows that only the first has, and only the second.
        others: Rows that both have, with another original.
        same: Rows that both results have, with the same text.
        recycled: Rows by what they are in the result of the first and of the second.
        decisions: Rows by phase, reason in the first, and reason in the second.
        changed: The first rows that are something else in the two results, or end with another text.
    """

    names: tuple[str, str]
    settings: dict[str, tuple[str, str]]
    descriptions: tuple[Description, Description]
    policies: tuple[Keep, Keep] = ("all", "all")
    matched: int = 0
    only: list[int] = field(default_factory=lambda: [0, 0])
    others: int = 0
    same: int = 0
    recycled: Counter[tuple[str, str]] = field(default_factory=Counter)
    decisions: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    changed: list[Changed] = field(default_factory=list)

    def add(self, split: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        """Takes a row that both have into account."""
        if _given(one["original"]) != _given(other["original"]):
            self.others += 1
            return
        self.matched += 1
        first, second = (result_of(row, policy) for row, policy in zip((one, other), self.policies, strict=True))
        self.recycled[first, second] += 1
        reasons = {phase: tuple(row[f"{phase}_decision"]["reason"] for row in (one, other)) for phase in PHASES}
        for phase, (a, b) in reasons.items():
            self.decisions[phase, a, b] += 1
        same = one["original"] is None or _text(final_pair(one)) == _text(final_pair(other))
        self.same += same and LEFT_OUT not in (first, second)
        if (not same or first != second) and len(self.changed) < _MOST_CHANGED:
            differing = {phase: (a, b) for phase, (a, b) in reasons.items() if a != b}
            self.changed.append(Changed(split, one["row_id"], first, second, differing))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return {
            "names": list(self.names),
            "settings": {name: list(values) for name, values in self.settings.items()},
            "matched": self.matched,
            "only": list(self.only),
            "others": self.others,
            "same_text": self.same,
            "recycled": [{"first": a, "second": b, "rows": n} for (a, b), n in sorted(self.recycled.items())],
            "decisions": [
                {"phase": phase, "first": a, "second": b, "rows": n}
                for (phase, a, b), n in sorted(self.decisions.items())
            ],
            "changed": [
                {
                    "split": row.split,
                    "row": row.row,
                    "recycled": [row.before, row.after],
                    "decisions": {phase: list(reasons) for phase, reasons in row.decisions.items()},
                }
                for row in self.changed
            ],
            "statistics": [description.to_dict() for description in self.descriptions],
        }

    def _repr_html_(self) -> str:
        return "".join(table.to_html() for table in self.tables())

    def tables(self) -> list[Table]:
        """What a person wants to see of it, the most important first."""
        first, second = self.names
        settings = [[name, *values] for name, values in self.settings.items()]
        made = [
            Table("Settings that differ", ("setting", first, second), settings),
            Table("Rows", ("rows", "count"), self._counted()),
            Table("What the rows are in the result", (first, second, "rows"), _transitions(self.recycled)),
            Table("Decisions", ("phase", first, second, "rows"), _transitions(self.decisions)),
            self._means(),
        ]
        return [table for table in made if table.rows]

    def _counted(self) -> list[list[str]]:
        counts = {
            "in both sources": self.matched,
            "in both results, with the same text": self.same,
            f"only in {self.names[0]}": self.only[0],
            f"only in {self.names[1]}": self.only[1],
            "in both, with another original": self.others,
        }
        return [[name, str(count)] for name, count in counts.items() if count or name == "in both sources"]

    def _means(self) -> Table:
        rows = []
        for quantity in QUANTITIES:
            found = [description.distributions["recycled"].get(quantity) for description in self.descriptions]
            if any(found):
                rows.append([quantity, *(f"{number(quantity, d.mean)} (n={d.n})" if d else _NONE for d in found)])
        note = ""
        if any(name.startswith("student") for name in self.settings):
            note = "Scores and perplexities of different students can't be compared with each other."
        return Table("Means of the result", ("mean", *self.names), rows, note)


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Holds two results against each other, row by row.

    Rows are matched by split and index in the source. They stream by: memory does not grow with their number.

    Args:
        first: A folder that a run wrote.
        second: Another one, over the same rows.

    Raises:
        HfReflectError: one of them is no result of a run, or they have no row in common.
    """
    recipes = [Recipe.read(folder) for folder in (first, second)]
    policies = policy_of(recipes[0]), policy_of(recipes[1])
    one, other = (Description.of(Summary.of_folder(Path(folder))) for folder in (first, second))
    found = Comparison((str(first), str(second)), _settings(*recipes), (one, other), policies)
    trails = Trail(first), Trail(second)
    for split in dict.fromkeys(split for trail in trails for split in trail.splits):
        for left, right in _matched(*(_scan(trail, split) for trail in trails)):
            if left is None or right is None:
                found.only[0 if right is None else 1] += 1
            else:
                found.add(split, left, right)
    if not found.matched:
        raise SourceError(f"{first} and {second} have no row in common: they were made from other sources.")
    return found


_Row = Mapping[str, Any]


def _scan(trail: Trail, split: str) -> Iterator[_Row]:
    if split in trail.splits:
        for entry in trail.scan(split):
            yield entry.row


def _matched(left: Iterator[_Row], right: Iterator[_Row]) -> Iterator[tuple[_Row | None, _Row | None]]:
    """Rows of both in the order of their ids, side by side where both have them."""
    one, other = next(left, None), next(right, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one["row_id"] < other["row_id"]):
            yield one, None
            one = next(left, None)
        elif one is None or other["row_id"] < one["row_id"]:
            yield None, other
            other = next(right, None)
        else:
            yield one, other
            one, other = next(left, None), next(right, None)


def _text(pair: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    return None if pair is None else tuple(pair[part] or "" for part in ("instruction", "input", "response"))


def _given(original: Mapping[str, Any] | None) -> Any:
    """What was recycled: the pair, and the turns before it."""
    return None if original is None else (_text(original), original.get("context") or [])


def _transitions(counts: Mapping[Any, int]) -> list[list[str]]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [[*names, str(count)] for names, count in ranked]


def _settings(one: Recipe, other: Recipe) -> dict[str, tuple[str, str]]:
    """What differs between two recipes, in words."""
    said = [dict(_said(recipe)) for recipe in (one, other)]
    names = dict.fromkeys(name for settings in said for name in settings)
    values = {name: (said[0].get(name, "none"), said[1].get(name, "none")) for name in names}
    return {name: both for name, both in values.items() if both[0] != both[1]}


def _said(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "source", ", ".join(f"{key} {value}" for key, value in recipe.source.items() if value is not None)
    yield "method", recipe.method
    yield "keep", recipe.keep
    yield "gate first", str(recipe.gate_first)
    yield "retry truncated", str(recipe.retry_truncated)
    yield "guards", str(dict(recipe.guards))
    for i, oracle in enumerate(recipe.oracles):
        name = f"oracle {i + 1}" if i else "oracle"
        for key, value in oracle["identity"].items():
            yield f"{name} {key}" if key != "model" else name, str(value)
        prompts = oracle["prompts"]
        yield f"{name} prompts", f"{prompts['name']} {prompts['version']} ({_digest(prompts)})"
        yield f"{name} sampling", str(dict(oracle["sampling"]))
    for key, value in (recipe.student or {}).get("identity", {}).items():
        yield f"student {key}" if key != "model" else "student", str(value)


def _digest(texts: Any) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:8]
