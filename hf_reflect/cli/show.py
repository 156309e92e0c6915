"""`hf-reflect show`: look at single rows of a result."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from hf_reflect.cli import output
from hf_reflect.errors import HfReflectError
from hf_reflect.prompts import PHASES
from hf_reflect.recipe import Recipe
from hf_reflect.selection import Keep
from hf_reflect.summary import policy_of
from hf_reflect.trail import Entry, Trail


class Sort(StrEnum):
    """What rows are put in order by, the highest first."""

    ifd = "ifd"
    ifd_original = "ifd_original"
    ifd_gain = "ifd_gain"
    rifd = "rifd"
    rifd_original = "rifd_original"
    rifd_gain = "rifd_gain"


_COLUMNS = [
    "row_id",
    "recycled",
    *(f"{phase}_decision.reason" for phase in PHASES),
    *(f"{phase}_reflections.list.element.status" for phase in PHASES),
    *(f"original.{measure}.value" for measure in ("ifd", "rifd")),
    *(f"{measure}_score.value" for measure in ("ifd", "rifd")),
]


def show(
    out: Annotated[Path, typer.Argument(help="A folder that a run wrote.")],
    row: Annotated[
        int | None, typer.Option(min=0, help="The row's index in the source.  [default: the first that changed]")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only this split.")] = None,
    decision: Annotated[
        str | None, typer.Option(help="All rows with this decision in either phase, such as not_higher_ifd.")
    ] = None,
    status: Annotated[
        str | None, typer.Option(help="All rows with a reflection of this status, such as refused.")
    ] = None,
    sort: Annotated[
        Sort | None, typer.Option(help="All rows, the highest first; a gain is the score after minus that before.")
    ] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="With --sort: the lowest first.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
) -> None:
    """Print pairs before and after, with critique, scores and decision. Several rows go through your pager.

    \b
    hf-reflect show recycled --row 7
    hf-reflect show recycled --decision not_higher_ifd
    hf-reflect show recycled --status refused --limit 5
    hf-reflect show recycled --sort ifd_gain
    """
    policy, trail = policy_of(Recipe.read(out)), Trail(out)
    if split is not None and split not in trail.splits:
        raise HfReflectError(f"{out}: there is no split {split!r}; it has {', '.join(trail.splits)}.")
    splits = [split] if split else trail.splits
    if ascending and sort is None:
        raise HfReflectError("--ascending needs --sort: in what order?")
    if decision is None and status is None and sort is None and limit is None:
        _print(trail, [_one(trail, splits, row)], policy)
        return
    wanted = _Wanted(row, decision, status)
    found = [
        (_key(entry.row, sort), entry) for name in splits for entry in trail.scan(name, _COLUMNS) if wanted(entry)
    ]
    if not found:
        raise HfReflectError(f"{out}: no row is like that. {wanted.known}")
    if sort is not None:  # rows without the score come last, whichever way
        scored = [(key, entry) for key, entry in found if key is not None]
        scored.sort(key=lambda one: one[0], reverse=not ascending)
        found = [*scored, *((key, entry) for key, entry in found if key is None)]
    _print(trail, [entry for _, entry in found[:limit]], policy)


def _one(trail: Trail, splits: list[str], row: int | None) -> Entry:
    """The row that is asked for; without a number the first that changed, or else the first."""
    first: Entry | None = None
    for name in splits:
        for entry in trail.scan(name, ["row_id", "recycled"]):
            if entry.row["row_id"] == row or (row is None and entry.row["recycled"] != "original"):
                return entry
            first = first or entry
    if row is None and first is not None:
        return first
    raise HfReflectError(f"{trail.folder}: there is no row {row} in {', '.join(splits)}.")


@dataclass
class _Wanted:
    """Which rows are asked for; remembers what there is, to be able to say it."""

    row: int | None
    decision: str | None
    status: str | None

    def __post_init__(self) -> None:
        self._decisions: set[str] = set()
        self._statuses: set[str] = set()

    def __call__(self, entry: Entry) -> bool:
        if self.row is not None and entry.row["row_id"] != self.row:
            return False
        decisions = {entry.row[f"{phase}_decision"]["reason"] for phase in PHASES}
        statuses = {reflection["status"] for phase in PHASES for reflection in entry.row[f"{phase}_reflections"]}
        self._decisions |= decisions
        self._statuses |= statuses
        right = self.decision is None or self.decision in decisions
        return right and (self.status is None or self.status in statuses)

    @property
    def known(self) -> str:
        decisions, statuses = (", ".join(sorted(names)) for names in (self._decisions, self._statuses))
        return f"There are decisions {decisions} and statuses {statuses}."


def _key(row: Mapping[str, Any], sort: Sort | None) -> float | None:
    if sort is None:
        return None
    measure, _, which = sort.value.partition("_")
    before = ((row["original"] or {}).get(measure) or {}).get("value")
    after = (row[f"{measure}_score"] or {}).get("value")
    if which == "gain":
        return None if before is None or after is None else after - before
    found: float | None = before if which == "original" else after
    return found


def _print(trail: Trail, entries: list[Entry], policy: Keep) -> None:
    def texts() -> Iterator[str]:
        for i, entry in enumerate(entries):
            name = f"{entry.split} " if len(trail.splits) > 1 else ""
            rule = f"\n{'─' * 80}\n\n" if i else ""
            yield f"{rule}{output.pair(trail.read(entry.split, entry.position), name, policy)}\n"

    if len(entries) > 1 and sys.stdout.isatty():
        click.echo_via_pager(texts())
    else:
        for text in texts():
            typer.echo(text, nl=False)
