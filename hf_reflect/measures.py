"""What is measured of every row before and after, kept small while rows stream by.

Counts and means are of all rows. Quantiles, correlations and pictures are of a sample once there are more than
`SAMPLE` rows: those whose names have the smallest hashes, in whatever order they come. Intervals are from a bootstrap:
the changes of all rows are summed in 10,000 blocks, into which rows fall by the hash of their names, and blocks are
drawn with replacement. Of fewer rows nearly each is a block of its own, of more each block is a random share of them.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_reflect.embeddings import Embed


if TYPE_CHECKING:
    import numpy as np

STAGES = ("original", "reflected instruction", "reflected response", "recycled")
"""The pair of the source; the oracle's first rewrite of each phase, kept or not; the pair in the result."""

QUANTITIES = (
    "instruction length",
    "response length",
    "ifd",
    "rifd",
    "instruction tokens",
    "response tokens",
    "ppl(instruction)",
    "ppl(response)",
    "ppl(response | instruction)",
    "ppl(instruction | response)",
    "coherence",
)
"""What table 6 of arXiv 2402.10110 has, and lengths in characters. Instructions are with their inputs."""

SAMPLE = 50_000
_BLOCKS = 10_000
_RESAMPLES = 2000
_LARGEST_LOSS = 700.0  # beyond it the perplexity is infinite

Row = Mapping[str, Any]


class Measures:
    """Running sums of every quantity at every stage, of its change, and a sample of rows.

    Memory is bounded: some 50 MB, however many rows there are.

    Args:
        embed: Gives the embeddings for the coherence of instruction and response; without it that is null.
    """

    def __init__(self, embed: Embed | None = None) -> None:
        self._embed = embed
        self._n: Any = 0
        self._total: Any = 0.0
        self._chunks: list[tuple[Any, Any]] = []
        self._waiting = 0
        self._changes: Any = None  # the sum of the changes and their number, by block and quantity
        self.rows = 0

    def add(self, split: str, rows: Sequence[tuple[Row, Mapping[str, Any] | None]]) -> None:
        """Takes rows of a split into account.

        Args:
            split: Their split.
            rows: Readable rows of config `reflections`, each with the pair it ended with; null if it is not kept.
        """
        if not rows:
            return
        import numpy as np
        from pandas.util import hash_array

        stages = [list(_stages(row, final)) for row, final in rows]
        values = np.array([[_quantities(*stage) for stage in row] for row in stages], dtype=np.float64)
        if self._embed is not None:
            values[:, :, QUANTITIES.index("coherence")] = _coherence(self._embed, stages)
        self.rows += len(rows)
        self._n = self._n + (~np.isnan(values)).sum(0)
        self._total = self._total + np.nansum(values, 0)
        names = np.array([row["row_id"] for row, _ in rows], dtype=np.uint64)
        names += np.uint64(zlib.crc32(split.encode()) << 32)
        order = hash_array(names)
        self._change(order, values)
        self._keep(order, values)

    def _change(self, order: "np.ndarray[Any, Any]", values: "np.ndarray[Any, Any]") -> None:
        import numpy as np

        if self._changes is None:
            self._changes = np.zeros((2, _BLOCKS, len(QUANTITIES)))
        change = values[:, STAGES.index("recycled")] - values[:, STAGES.index("original")]
        block = (order % np.uint64(_BLOCKS)).astype(np.int64)
        np.add.at(self._changes[0], block, np.nan_to_num(change))
        np.add.at(self._changes[1], block, ~np.isnan(change))

    def _keep(self, order: "np.ndarray[Any, Any]", values: "np.ndarray[Any, Any]") -> None:
        self._chunks.append((order, values))
        self._waiting += len(order)
        for outdated in ("sample", "intervals"):
            self.__dict__.pop(outdated, None)
        if self._waiting > 2 * SAMPLE:
            self._chunks = [self._smallest()]
            self._waiting = SAMPLE

    def _smallest(self) -> tuple[Any, Any]:
        import numpy as np

        order, values = (np.concatenate(parts) for parts in zip(*self._chunks, strict=True))
        chosen = np.argsort(order, kind="stable")[:SAMPLE]
        return order[chosen], values[chosen]

    @cached_property
    def sample(self) -> "np.ndarray[Any, Any]":
        """Rows, at most `SAMPLE`, by stage, by quantity; null is NaN."""
        import numpy as np

        return self._smallest()[1] if self._chunks else np.empty((0, len(STAGES), len(QUANTITIES)))

    def column(self, stage: str, quantity: str) -> "np.ndarray[Any, Any]":
        """A quantity of the sampled rows at a stage."""
        column: np.ndarray[Any, Any] = self.sample[:, STAGES.index(stage), QUANTITIES.index(quantity)]
        return column

    def mean(self, stage: str, quantity: str) -> tuple[int, float | None]:
        """How many rows have a quantity at a stage, and its mean over them."""
        if not self.rows:
            return 0, None
        at = STAGES.index(stage), QUANTITIES.index(quantity)
        n = int(self._n[at])
        return n, float(self._total[at]) / n if n else None

    def change(self, quantity: str) -> tuple[int, float | None]:
        """How many kept rows have a quantity before and after, and the mean of its change over them."""
        if self._changes is None:
            return 0, None
        total, n = self._changes[:, :, QUANTITIES.index(quantity)].sum(1)
        return int(n), float(total / n) if n else None

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """The 95 % interval of the mean change of each quantity, from a bootstrap of blocks of rows.

        Null where fewer than two rows have the quantity before and after.
        """
        import numpy as np

        found: dict[str, tuple[float, float] | None] = dict.fromkeys(QUANTITIES)
        if self._changes is None:
            return found
        used = self._changes[1].any(1)  # blocks without any change would only be drawn in vain
        totals, counts = self._changes[:, used]
        random = np.random.default_rng(0)
        blocks = int(used.sum())
        means = np.empty((_RESAMPLES, len(QUANTITIES)))
        for i in range(_RESAMPLES):
            weights = np.bincount(random.integers(0, blocks, blocks), minlength=blocks)
            n = weights @ counts
            means[i] = np.divide(weights @ totals, n, out=np.full(len(QUANTITIES), np.nan), where=n > 0)
        for j, quantity in enumerate(QUANTITIES):
            if (counts[:, j] > 0).sum() > 1:
                low, high = np.nanpercentile(means[:, j], (2.5, 97.5))
                found[quantity] = float(low), float(high)
        return found


_Stage = tuple[Mapping[str, Any] | None, Row, Row]


def _stages(row: Row, final: Mapping[str, Any] | None) -> Iterator[_Stage]:
    """The pair, the IFD and the r-IFD of a row at each stage."""
    original = row["original"]
    yield original, original["ifd"] or {}, original["rifd"] or {}
    instruction = _first_rewrite(row["instruction_reflections"])
    yield instruction, (instruction or {}).get("ifd") or {}, {}  # its r-IFD is known only where it was kept
    response = _first_rewrite(row["response_reflections"])
    pair = None if response is None else {**_asked_about(row), "response": response["response"]}
    yield pair, (response or {}).get("ifd") or {}, (response or {}).get("rifd") or {}
    yield final, row["ifd_score"] or {} if final else {}, row["rifd_score"] or {} if final else {}


def _first_rewrite(reflections: Sequence[Row]) -> Row | None:
    """What method `reflect` would have taken."""
    return next((reflection for reflection in reflections if reflection["status"] == "ok"), None)


def _asked_about(row: Row) -> Mapping[str, Any]:
    """The pair that the second phase started from."""
    kept: int | None = row["instruction_decision"]["candidate"]
    pair: Mapping[str, Any] = row["original"] if kept is None else row["instruction_reflections"][kept]
    return {"instruction": pair["instruction"], "input": pair["input"]}


def _quantities(pair: Mapping[str, Any] | None, ifd: Row, rifd: Row) -> list[float]:
    lengths = (math.nan, math.nan) if pair is None else (len(_question(pair)), len(pair["response"]))
    # Of what was cut off, the number of tokens and the perplexity are not those of the text.
    whole_ifd, whole_rifd = (score if score.get("status") == "ok" else {} for score in (ifd, rifd))
    return [
        *lengths,
        _number(ifd.get("value")),
        _number(rifd.get("value")),
        _number(whole_rifd.get("direct_tokens")),
        _number(whole_ifd.get("direct_tokens")),
        _perplexity(whole_rifd.get("direct_loss")),
        _perplexity(whole_ifd.get("direct_loss")),
        _perplexity(whole_ifd.get("conditioned_loss")),
        _perplexity(whole_rifd.get("conditioned_loss")),
        math.nan,
    ]


def _question(pair: Mapping[str, Any]) -> str:
    return "\n".join(filter(None, (pair["instruction"], pair["input"])))


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else value


def _perplexity(loss: float | None) -> float:
    return math.nan if loss is None or loss > _LARGEST_LOSS else math.exp(loss)


def _coherence(embed: Embed, stages: list[list[_Stage]]) -> Any:
    """The cosine of the embeddings of instruction and response (arXiv 2402.10110, table 6), by row and stage."""
    import numpy as np

    pairs = [
        None if pair is None or not pair["response"] or not _question(pair) else (_question(pair), pair["response"])
        for row in stages
        for pair, _, _ in row
    ]
    texts = list(dict.fromkeys(text for pair in pairs if pair is not None for text in pair))
    vectors = dict(zip(texts, embed(texts), strict=True)) if texts else {}
    cosines = [math.nan if pair is None else float(vectors[pair[0]] @ vectors[pair[1]]) for pair in pairs]
    return np.array(cosines).reshape(len(stages), len(STAGES))
