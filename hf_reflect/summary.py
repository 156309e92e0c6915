"""What a run did, in numbers small enough to keep while rows stream by."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
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


_MOST_REASONS = 1000
_BATCH = 500
_LARGEST_LOSS = 700.0  # beyond it the perplexity is infinite


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
        decisions: Decisions by phase and reason.
        means: Means before and after, by quantity. Lengths are in characters where they don't say tokens.
        reasons: Why reflections gave no rewrite, by phase, status and reason.
        examples: The first row of each way a row can end, with its split, by what became of it.
        asked: What the oracles' replies took.
        columns: The columns of config `default`.
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
    reasons: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    examples: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    asked: Asked = field(default_factory=Asked)
    columns: list[str] = field(default_factory=list)
    purse: Purse = field(default_factory=Purse)

    @classmethod
    def of_folder(cls, folder: Path) -> "Summary":
        """The summary of a result, read again from its audit trail. Nothing counts as paid for."""
        import pyarrow.parquet as pq

        summary = cls()
        for file in sorted((folder / "reflections").glob("*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(_BATCH):
                summary.add(batch.to_pylist(), file.name.split("-")[0])
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
        for row in rows:
            self.rows += 1
            self.recycled[row["recycled"]] += 1
            for phase in ("instruction", "response"):
                for reflection in row[f"{phase}_reflections"]:
                    self._reflection(phase, reflection)
                self.decisions[phase, row[f"{phase}_decision"]["reason"]] += 1
            if row["original"] is not None:
                self._compare(row)
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

    def _compare(self, row: Mapping[str, Any]) -> None:
        original = row["original"]
        final = final_pair(row)
        for part in ("instruction", "response"):
            self._mean(f"{part} length", "before").add(len(original[part]))
            self._mean(f"{part} length", "after").add(len(final[part]))
        self.ifd_at_least_one += ((original["ifd"] or {}).get("value") or 0) >= 1
        for measure in ("ifd", "rifd"):
            self._mean(measure, "before").add((original[measure] or {}).get("value"))
            self._mean(measure, "after").add((row[f"{measure}_score"] or {}).get("value"))
        for when, ifd, rifd in (
            ("before", original["ifd"], original["rifd"]),
            ("after", row["ifd_score"], row["rifd_score"]),
        ):
            for quantity, value in _quantities(ifd or {}, rifd or {}):
                self._mean(quantity, when).add(value)

    def _mean(self, quantity: str, when: str) -> Mean:
        return self.means.setdefault((quantity, when), Mean())


def _quantities(ifd: Mapping[str, Any], rifd: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """What table 6 of arXiv 2402.10110 has besides the scores, from the losses behind them."""
    yield "instruction tokens", rifd.get("direct_tokens")
    yield "response tokens", ifd.get("direct_tokens")
    yield "ppl(instruction)", _perplexity(rifd.get("direct_loss"))
    yield "ppl(response)", _perplexity(ifd.get("direct_loss"))
    yield "ppl(response | instruction)", _perplexity(ifd.get("conditioned_loss"))
    yield "ppl(instruction | response)", _perplexity(rifd.get("conditioned_loss"))


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None or loss > _LARGEST_LOSS else math.exp(loss)


def _ending(row: Mapping[str, Any]) -> str:
    """What became of a row; an original that had a rewrite, which the student turned down, is `rejected`."""
    if row["recycled"] != "original":
        return str(row["recycled"])
    reflections = [*row["instruction_reflections"], *row["response_reflections"]]
    return "rejected" if any(reflection["status"] == "ok" for reflection in reflections) else "original"


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
