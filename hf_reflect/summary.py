"""What a run did, in numbers small enough to keep while rows stream by."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hf_reflect.embeddings import Embed
from hf_reflect.measures import Measures
from hf_reflect.oracles.purse import Purse, Spent
from hf_reflect.recipe import Recipe
from hf_reflect.selection import Keep, check, keep
from hf_reflect.trail import Trail


LEFT_OUT = "left out"

_MOST_REASONS = 1000


@dataclass
class Asked:
    """What all the oracles' replies took, whichever run paid for them.

    Attributes:
        calls: Replies.
        retries: Calls that failed before them.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens written.
    """

    calls: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, call: Mapping[str, Any]) -> None:
        """Takes one more reply into account."""
        self.calls += 1
        self.retries += (call.get("attempts") or 1) - 1
        self.prompt_tokens += call["prompt_tokens"] or 0
        self.completion_tokens += call["completion_tokens"] or 0


@dataclass
class Summary:
    """Counts and means over the rows of a run.

    Attributes:
        rows: Rows of the source.
        kept: Rows in config `default`.
        recycled: Rows by what became of them.
        statuses: Reflections by phase and status.
        scores: Scores of originals, rewrites and results, by measure and status.
        decisions: Decisions by phase and reason.
        flows: Rows by what the two phases came to, and what is in the result.
        inflation: How responses grew.
        measures: Lengths, perplexities and scores at every stage.
        reasons: Why reflections gave no rewrite, by phase, status and reason.
        examples: The first row of each way a row can end, with its split, by what became of it.
        asked: What the oracles' replies took.
        columns: The columns of config `default`.
        ifd_at_least_one: Rows of the source with an IFD of 1 or more.
        purse: What this process paid for, and the prices.
        policy: Which rows are kept.
    """

    rows: int = 0
    kept: int = 0
    recycled: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    scores: Counter[tuple[str, str]] = field(default_factory=Counter)
    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    flows: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    inflation: "Inflation" = field(default_factory=lambda: Inflation())
    measures: Measures = field(default_factory=Measures)
    ifd_at_least_one: int = 0
    reasons: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    examples: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    asked: Asked = field(default_factory=Asked)
    columns: list[str] = field(default_factory=list)
    purse: Purse = field(default_factory=Purse)
    policy: Keep = "all"

    @classmethod
    def of_folder(cls, folder: Path, embed: Embed | None = None) -> "Summary":
        """The summary of a result, read again from its audit trail. Nothing counts as paid for.

        Args:
            folder: What a run wrote.
            embed: As for `Measures`.

        Raises:
            RecipeError: there is no result of a run.
        """
        import pyarrow.parquet as pq

        summary = cls(policy=policy_of(Recipe.read(folder)), measures=Measures(embed))
        trail = Trail(folder)
        for split in trail.splits:
            for rows in trail.batches(split):
                summary.add(rows, split)
        for file in sorted((folder / "data").glob("*.parquet")):
            summary.kept += pq.read_metadata(file).num_rows
            summary.columns = pq.read_schema(file).names
        return summary

    @property
    def spent(self) -> Spent:
        """What this process paid for."""
        return self.purse.spent

    def add(self, rows: Iterable[Mapping[str, Any]], split: str = "") -> None:
        """Takes rows of config `reflections` into account."""
        readable: list[tuple[Mapping[str, Any], dict[str, Any] | None]] = []
        for row in rows:
            result = result_of(row, self.policy)
            self._count(row, result)
            if row["original"] is not None:
                final = None if result == LEFT_OUT else final_pair(row)
                self._compare(row, final, split)
                readable.append((row, final))
        self.measures.add(split, readable)  # together: it works on columns

    def _count(self, row: Mapping[str, Any], result: str) -> None:
        self.rows += 1
        self.recycled[row["recycled"]] += 1
        for measure, score in _scores(row):
            self.scores[measure, score["status"]] += 1
        for phase in ("instruction", "response"):
            for reflection in row[f"{phase}_reflections"]:
                self._reflection(phase, reflection)
            self.decisions[phase, row[f"{phase}_decision"]["reason"]] += 1
        outcomes = _outcome(row, "instruction"), _outcome(row, "response")
        self.flows[outcomes[0], outcomes[1], result] += 1

    def _compare(self, row: Mapping[str, Any], final: Mapping[str, Any] | None, split: str) -> None:
        self.ifd_at_least_one += ((row["original"]["ifd"] or {}).get("value") or 0) >= 1
        if final is not None and row["recycled"] != "original":
            self.inflation.add(row["original"]["response"], final["response"])
        # The first of the first split by name, in whatever order splits come.
        known = self.examples.get(_ending(row))
        if known is None or split < known[0]:
            self.examples[_ending(row)] = (split, row)

    def _reflection(self, phase: str, reflection: Mapping[str, Any]) -> None:
        status, reason = reflection["status"], reflection.get("reason")
        self.statuses[phase, status] += 1
        known = (phase, status, reason) in self.reasons
        if reason and status not in ("ok", "unchanged") and (known or len(self.reasons) < _MOST_REASONS):
            self.reasons[phase, status, reason] += 1
        for call in reflection.get("calls") or ():
            self.asked.add(call)


@dataclass
class Inflation:
    """How the responses of recycled rows grew, in characters.

    Attributes:
        rows: Rows of the result in which a rewrite was kept.
        longer: How many of them have a longer response than before.
        twice: How many have one at least twice as long.
        before: Characters of all their responses before.
        after: Characters after.
    """

    rows: int = 0
    longer: int = 0
    twice: int = 0
    before: int = 0
    after: int = 0

    def add(self, before: str, after: str) -> None:
        """Takes one more row into account."""
        self.rows += 1
        self.longer += len(after) > len(before)
        self.twice += len(after) >= 2 * len(before) and len(after) > len(before)
        self.before += len(before)
        self.after += len(after)


def _outcome(row: Mapping[str, Any], phase: str) -> str:
    """What a phase came to: `rewritten`, `turned down` (by the student), `not scored`, or `no rewrite`."""
    decision = row[f"{phase}_decision"]
    if decision["candidate"] is not None:
        return "rewritten"
    return {"no_rewrite": "no rewrite", "not_scored": "not scored"}.get(decision["reason"], "turned down")


def _scores(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All scores of a row that were asked for."""
    reflections = [*row["instruction_reflections"], *row["response_reflections"]]
    for measure in ("ifd", "rifd"):
        scores = [(row["original"] or {}).get(measure), row[f"{measure}_score"]]
        scores += [reflection.get(measure) for reflection in reflections]
        yield from ((measure, score) for score in scores if score and score.get("status"))


def _ending(row: Mapping[str, Any]) -> str:
    """What became of a row; an original that had a rewrite, which the student turned down, is `rejected`."""
    if row["recycled"] != "original":
        return str(row["recycled"])
    reflections = [*row["instruction_reflections"], *row["response_reflections"]]
    return "rejected" if any(reflection["status"] == "ok" for reflection in reflections) else "original"


def policy_of(recipe: Recipe) -> Keep:
    """Which rows a recipe keeps.

    Raises:
        RecipeError: it doesn't say so.
    """
    check("keep", recipe.keep, Keep)
    return cast(Keep, recipe.keep)


def result_of(row: Mapping[str, Any], policy: Keep) -> str:
    """What a row of config `reflections` is in the result: as in column `recycled`, or `left out`."""
    ifd, rifd = ((row[f"{measure}_score"] or {}).get("value") for measure in ("ifd", "rifd"))
    return str(row["recycled"]) if keep(policy, row["recycled"], ifd, rifd) else LEFT_OUT


def final_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """The pair that a row of config `reflections` ended with: instruction, input and response."""
    final = {part: row["original"][part] or "" for part in ("instruction", "input", "response")}
    for phase in ("instruction", "response"):
        chosen = row[f"{phase}_decision"]["candidate"]
        if chosen is not None:
            reflection = row[f"{phase}_reflections"][chosen]
            if reflection["instruction"] is not None:
                final |= {"instruction": reflection["instruction"], "input": reflection["input"] or ""}
            final["response"] = reflection["response"]
    return final
