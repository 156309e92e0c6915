"""Selection by a score, without an oracle: Cherry and Superfiltering, and the baselines to hold them against.

IFD selection (2308.12032) keeps the pairs with the highest IFD; a pair with an IFD of 1 or more is misaligned, and
`below_one` leaves it out. `length` and `random` are cheap and often hard to beat: always compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_reflect.errors import RecipeError
from hf_reflect.pairs import UnreadableRowError, recognise


if TYPE_CHECKING:
    from datasets import Dataset

By = Literal["ifd", "rifd", "ira", "length", "random"]
HIGHEST_FIRST = {"ifd": True, "rifd": False, "ira": True, "length": True, "random": False}


@dataclass(frozen=True)
class Selected:
    """What a selection took.

    Attributes:
        indices: Rows, in their own order.
        rows: How many there were.
        not_scored: How many of them have no score, and so could not be selected.
        left_out: How many were left out by `below_one`.
    """

    indices: list[int]
    rows: int
    not_scored: int
    left_out: int


@dataclass(frozen=True)
class TopFraction:
    """The best rows by a score: `selected = TopFraction("ifd", fraction=0.1)(dataset)`.

    Attributes:
        by: `ifd` and `ira` (highest first), `rifd` (lowest first), `length` (of the response in characters, longest
            first), or `random`.
        fraction: Of all rows, those without a score included; rounded to the nearest row.
        count: So many rows, instead of a fraction.
        below_one: Only rows whose IFD (for `rifd`: whose r-IFD) is below 1.
        per: A column; the same share of the rows of each of its values is taken.
        seed: For `random`.
    """

    by: By
    fraction: float | None = None
    count: int | None = None
    below_one: bool = False
    per: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in HIGHEST_FIRST:
            raise RecipeError(f"select by one of {', '.join(HIGHEST_FIRST)}, not {self.by!r}.")
        if (self.fraction is None) == (self.count is None):
            raise RecipeError("say either what fraction of the rows to take or how many.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise RecipeError(f"a fraction is more than 0 and at most 1, not {self.fraction}.")
        if self.count is not None and self.count < 1:
            raise RecipeError(f"take at least 1 row, not {self.count}.")

    def __call__(self, dataset: "Dataset") -> "Dataset":
        """The selected rows of a dataset, in their own order.

        Raises:
            RecipeError: a column that is needed is missing.
        """
        return dataset.select(self.choose(dataset).indices)

    def choose(self, dataset: "Dataset") -> Selected:
        """Which rows are selected, and what became of the others.

        Raises:
            RecipeError: a column that is needed is missing.
        """
        scores = self._scores(dataset)
        gate = self._column(dataset, "rifd" if self.by == "rifd" else "ifd") if self.below_one else None
        scored = [i for i, score in enumerate(scores) if score is not None]
        allowed = [i for i in scored if gate is None or (gate[i] is not None and gate[i] < 1)]
        wanted = round(self.fraction * len(dataset)) if self.fraction is not None else self.count or 0
        taken: list[int] = []
        groups = self._column(dataset, self.per) if self.per else [None] * len(dataset)
        for group, quota in _quotas(groups, wanted).items():
            members = [i for i in allowed if groups[i] == group]
            # A stable sort: of equal scores, the earlier row is taken.
            members.sort(key=lambda i: scores[i], reverse=HIGHEST_FIRST[self.by])
            taken += members[:quota]
        return Selected(sorted(taken), len(dataset), len(dataset) - len(scored), len(scored) - len(allowed))

    def _scores(self, dataset: "Dataset") -> list[Any]:
        if self.by == "random":
            import numpy as np

            return list(np.random.default_rng(self.seed).permutation(len(dataset)))
        if self.by == "length":
            return _lengths(dataset)
        return self._column(dataset, self.by)

    def _column(self, dataset: "Dataset", name: str) -> list[Any]:
        if name not in dataset.column_names:
            hint = " Score the dataset first: hf-reflect score." if name in HIGHEST_FIRST else ""
            raise RecipeError(f"there is no column {name!r}; there are {', '.join(dataset.column_names)}.{hint}")
        return list(dataset[name])


def _quotas(groups: Sequence[Any], wanted: int) -> dict[Any, int]:
    """How many rows to take of each group: shares of `wanted` by size, the largest remainders rounded up."""
    sizes: dict[Any, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    total = max(1, len(groups))
    quotas = {group: wanted * size // total for group, size in sizes.items()}
    remainders = sorted(sizes, key=lambda group: wanted * sizes[group] % total, reverse=True)
    for group in remainders[: min(wanted, len(groups)) - sum(quotas.values())]:
        quotas[group] += 1
    return quotas


def _lengths(dataset: "Dataset") -> list[int | None]:
    row_format = recognise(dataset.column_names)
    lengths: list[int | None] = []
    for row in dataset.select_columns(list(row_format.columns)):
        try:
            lengths.append(len(row_format.read(row).response))
        except UnreadableRowError:
            lengths.append(None)
    return lengths
