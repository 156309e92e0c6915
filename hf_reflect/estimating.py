"""What recycling a dataset would cost, from a sample of its rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_reflect.errors import SourceError
from hf_reflect.journal import Journal
from hf_reflect.oracles.pace import Limits
from hf_reflect.oracles.purse import cost
from hf_reflect.recycling import recycle
from hf_reflect.sources import Source, load_source
from hf_reflect.teachers import OracleSpec, Teacher, teachers


_SURE = 1.96
"""Standard errors on each side of a mean that hold it in 95 % of samples."""


@dataclass(frozen=True)
class Range:
    """A total over all rows, with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, sample: Sequence[float], rows: int) -> "Range":
        """The total over `rows` rows of which a sample was drawn (normal approximation, finite population)."""
        n, mean = len(sample), sum(sample) / len(sample)
        if n < 2 or n >= rows:
            spread = 0.0 if n >= rows else math.inf
        else:
            variance = sum((value - mean) ** 2 for value in sample) / (n - 1)
            spread = _SURE * math.sqrt(variance / n * (1 - n / rows))
        return cls(mean * rows, max(0.0, mean - spread) * rows, (mean + spread) * rows)


@dataclass(frozen=True)
class Estimate:
    """What a run over all rows would take, before anything that the journal already knows is taken off.

    Attributes:
        rows: Rows of the source.
        sampled: Rows that were asked about.
        paid: Calls that the sample cost now; the others were in the journal.
        calls: Calls to the oracles.
        prompt_tokens: Tokens they read.
        completion_tokens: Tokens they write.
        cost: In the currency of the prices; null without prices.
        prices: Per million tokens read and written; null where unknown.
        seconds: How long it takes at full concurrency; null where all of the sample was in the journal.
        failed: Share of the sample's reflections that failed.
    """

    rows: int
    sampled: int
    paid: int
    calls: Range
    prompt_tokens: Range
    completion_tokens: Range
    cost: Range | None
    prices: tuple[float, float] | None
    seconds: float | None
    failed: float


def estimate(
    dataset: Any,
    *,
    oracle: OracleSpec | Sequence[OracleSpec] = "local",
    sample: int = 20,
    price_in: float | None = None,
    price_out: float | None = None,
    prompts: Any = None,
    sampling: Any = None,
    name: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    limits: Limits | None = None,
    journal: Journal | str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Estimate:
    """Runs both phases on a sample, spread evenly over the rows, and scales up what it took.

    The sample is paid for, and its replies are in the journal: the run itself gets them for nothing, save those to
    responses that the student decides against.

    Args:
        dataset: As for `recycle`.
        oracle: As for `recycle`.
        sample: How many rows to ask about.
        price_in: Price of a million tokens read; by default what the provider publishes.
        price_out: Price of a million tokens written; likewise.
        prompts: As for `recycle`.
        sampling: As for `recycle`.
        name: As for `recycle`.
        split: As for `recycle`.
        limit: As for `recycle`.
        limits: As for `recycle`.
        journal: As for `recycle`.
        progress: As for `recycle`.
        **options: What else `load_oracle` takes.

    Raises:
        HfReflectError: the source or the oracle can't be used.
    """
    from hf_reflect.journal import open_journal

    source = load_source(dataset, name=name, split=split, limit=limit)
    rows = sum(map(len, source.splits.values()))
    if not rows:
        raise SourceError(f"{source.provenance['path']}: there are no rows.")
    book = journal if isinstance(journal, Journal) else open_journal(journal)
    asked = teachers(oracle, prompts=prompts, sampling=sampling, journal=book, limits=limits, **options)
    tried = recycle(_sample(source, sample), oracle=asked, student=None, method="reflect", progress=progress)
    spent = asked[0].oracle.spent
    calls, read, written, statuses = [], [], [], []
    for split_rows in tried.reflections.values():
        for row in split_rows:
            reflections = [*row["instruction_reflections"], *row["response_reflections"]]
            made = [call for reflection in reflections for call in reflection["calls"]]
            statuses += [reflection["status"] for reflection in reflections]
            calls.append(float(len(made)))
            read.append(float(sum(call["prompt_tokens"] or 0 for call in made)))
            written.append(float(sum(call["completion_tokens"] or 0 for call in made)))
    prices = (
        (price_in or 0.0, price_out or 0.0) if price_in is not None or price_out is not None else _published(asked)
    )
    costs = prices and [
        cost(Limits(price_in=prices[0], price_out=prices[1]), *tokens) or 0.0
        for tokens in zip(read, written, strict=True)
    ]
    per_call = spent.seconds / spent.calls if spent.calls else None
    at_once = sum(teacher.oracle.oracle.concurrency for teacher in asked)
    total = Range.of(calls, rows)
    return Estimate(
        rows=rows,
        sampled=len(calls),
        paid=spent.calls,
        calls=total,
        prompt_tokens=Range.of(read, rows),
        completion_tokens=Range.of(written, rows),
        cost=Range.of(costs, rows) if costs else None,
        prices=prices,
        seconds=None if per_call is None else total.value * per_call / at_once,
        failed=statuses.count("failed") / len(statuses),
    )


def _sample(source: Source, count: int) -> Source:
    """Rows spread evenly over all splits, each split by its share."""
    rows = sum(map(len, source.splits.values()))
    chosen, before = {}, 0
    for key, part in source.splits.items():
        first, last = (round(count * at / rows) for at in (before, before + len(part)))
        before += len(part)
        wanted = min(len(part), last - first)
        if wanted:
            chosen[key] = part.select([int((i + 0.5) * len(part) / wanted) for i in range(wanted)])
    return Source(chosen, source.provenance, single=False)


def _published(asked: list[Teacher]) -> tuple[float, float] | None:
    """The price that the provider of the only oracle publishes; null where it doesn't, or there are several."""
    price = getattr(asked[0].oracle.oracle, "price", None)
    found: tuple[float, float] | None = price() if price is not None and len(asked) == 1 else None
    return found
