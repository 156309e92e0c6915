"""Reading the audit trail that a run wrote: all rows in order, or a few by where they are."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        position: Its place in the split.
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
        SourceError: there is no result of a run in it, or a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        import pyarrow.parquet as pq

        self.folder = Path(folder)
        self._groups: dict[str, list[tuple[Any, int]]] = {}
        with self._reading():
            for file in sorted((self.folder / "reflections").glob("*.parquet"), key=_order):
                opened = pq.ParquetFile(file)
                groups = [(opened, group) for group in range(opened.metadata.num_row_groups)]
                self._groups.setdefault(file.name.split("-")[0], []).extend(groups)
        if not self._groups:
            raise SourceError(
                f"{folder}: has no files of config reflections: it is no result of a run, or they are gone. Make it "
                "again, which costs nothing."
            )
        self._group = lru_cache(_GROUPS_HELD)(self._read_group)

    @property
    def splits(self) -> list[str]:
        """The splits, `train` first."""
        return list(self._groups)

    def rows(self, split: str) -> int:
        """How many rows a split has."""
        return sum(self._sizes(split))

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
        with self._reading():
            for file, group in self._groups[split]:
                wanted = columns or [column.path for column in file.schema if not column.path.endswith(RAW)]
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=list(wanted)):
                    yield batch.to_pylist()

    def read(self, split: str, position: int) -> dict[str, Any]:
        """One row, whole."""
        starts = [0, *accumulate(self._sizes(split))]
        at = bisect_right(starts, position) - 1
        with self._reading():
            row: dict[str, Any] = self._group(split, at).slice(position - starts[at], 1).to_pylist()[0]
        return row

    def _sizes(self, split: str) -> list[int]:
        return [file.metadata.row_group(group).num_rows for file, group in self._groups[split]]

    def _read_group(self, split: str, at: int) -> Any:
        file, group = self._groups[split][at]
        return file.read_row_group(group)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Says where a file is damaged."""
        import pyarrow as pa

        try:
            yield
        except (OSError, pa.ArrowException) as error:
            why = " ".join(str(error).split())
            raise SourceError(f"{self.folder}: can't be read: {why}. Make it again, which costs nothing.") from error


def record_batches(file: Any, size: int) -> Iterator[Any]:
    """The rows of a `pyarrow.parquet.ParquetFile` in batches, in bounded memory.

    One row group after another: over a whole file `iter_batches` holds on to all that it has read.
    """
    for group in range(file.metadata.num_row_groups):
        yield from file.iter_batches(size, row_groups=[group])


def _order(file: Path) -> tuple[bool, str, str]:
    return *split_order(file.name.split("-")[0]), file.name
