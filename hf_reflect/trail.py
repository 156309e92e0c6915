"""Reading the audit trail that a run wrote: all rows in order, or a few by where they are."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from hf_reflect.errors import SourceError
from hf_reflect.output import split_order


Row = Mapping[str, Any]

BATCH = 200
"""As many rows as a run has in a shard."""

RAW = (".calls.list.element.text", ".calls.list.element.thinking")
"""Raw replies: the larger part of the file, which few need."""

_GROUPS_HELD = 8


@dataclass(frozen=True)
class Entry:
    """A row and where it is.

    Attributes:
        split: Its split.
        position: Its place in the split's file.
        row: The columns that were asked for.
    """

    split: str
    position: int
    row: Row


class Trail:
    """Config `reflections` of a folder.

    Args:
        folder: What a run wrote.

    Raises:
        SourceError: there is no result of a run in it.
    """

    def __init__(self, folder: str | Path) -> None:
        import pyarrow.parquet as pq

        self.folder = Path(folder)
        files = {file.name.split("-")[0]: file for file in (self.folder / "reflections").glob("*.parquet")}
        if not files:
            raise SourceError(
                f"{folder}: has no files of config reflections: it is no result of a run, or they are gone. Make it "
                "again, which costs nothing."
            )
        self._files = {split: pq.ParquetFile(files[split]) for split in sorted(files, key=split_order)}
        self._group = lru_cache(_GROUPS_HELD)(self._read_group)

    @property
    def splits(self) -> list[str]:
        """The splits, `train` first."""
        return list(self._files)

    def rows(self, split: str) -> int:
        """How many rows a split has."""
        return int(self._files[split].metadata.num_rows)

    def scan(self, split: str, columns: Sequence[str] | None = None) -> Iterator[Entry]:
        """All rows of a split in order.

        Args:
            split: One of `splits`.
            columns: Paths of columns and fields, such as `original.ifd.value`; all but raw replies if not given.
        """
        position = 0
        for rows in self.batches(split, columns):
            for row in rows:
                yield Entry(split, position, row)
                position += 1

    def batches(self, split: str, columns: Sequence[str] | None = None) -> Iterator[list[dict[str, Any]]]:
        """Likewise, some hundred rows at once."""
        file = self._files[split]
        wanted = columns or [column.path for column in file.schema if not column.path.endswith(RAW)]
        for batch in record_batches(file, BATCH, wanted):
            yield batch.to_pylist()

    def read(self, split: str, position: int) -> dict[str, Any]:
        """One row, whole."""
        metadata = self._files[split].metadata
        starts = [0, *accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))]
        group = bisect_right(starts, position) - 1
        row: dict[str, Any] = self._group(split, group).slice(position - starts[group], 1).to_pylist()[0]
        return row

    def _read_group(self, split: str, group: int) -> Any:
        return self._files[split].read_row_group(group)


def record_batches(file: Any, size: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """The rows of a Parquet file in batches, in bounded memory.

    One row group after another: over a whole file `iter_batches` holds on to all that it has read.

    Args:
        file: A `pyarrow.parquet.ParquetFile`.
        size: Most rows of a batch.
        columns: Paths of columns and fields; all if not given.
    """
    for group in range(file.metadata.num_row_groups):
        yield from file.iter_batches(size, row_groups=[group], columns=columns and list(columns))
