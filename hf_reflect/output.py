"""The folder a run writes. It appears whole or not at all."""

import glob
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reflect.embedded import content_hash
from hf_reflect.errors import OutputError
from hf_reflect.recipe import FILE, Manifest, read_hash


if TYPE_CHECKING:
    from datasets import Dataset

FOLDERS = {"default": "data", "reflections": "reflections"}
"""Where each config's files are."""

README = "README.md"
PICTURES = "pictures"
REPORT = "report.html"
"""Where the report is written unless somebody wants it elsewhere."""

_ROW_GROUP = 1000
_OURS = {README, FILE, PICTURES, REPORT, *FOLDERS.values()}

DataFiles = dict[str, dict[str, str]]
"""A file for each config and split."""


class OutputFolder:
    """Collects a run's files beside their destination and moves them there at the end.

    Args:
        path: Where the folder is to appear.
        recipe: What is being done; an existing folder with the same recipe is brought up to date.
        overwrite: Replace a folder with another recipe.

    Raises:
        OutputError: something else is there, or it can't be written.
    """

    def __init__(self, path: str | Path, recipe: Manifest, *, overwrite: bool = False) -> None:
        self.path = Path(path).expanduser().resolve()
        self.recipe = recipe
        self._staging = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        self._writers: dict[tuple[str, str], _Writer] = {}
        try:
            self._clear_leftovers()
            self._check_destination(overwrite)
            self._staging.mkdir(parents=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, config: str, split: str, rows: "Dataset") -> None:
        """Appends rows to a split of a config.

        Raises:
            OutputError: the disk is full, or the like.
        """
        if not len(rows):
            return  # `datasets` opens no file without rows
        table = rows.with_format("arrow")[:]
        try:
            writer = self._writers.get((config, split))
            if writer is None:
                folder = self._staging / FOLDERS[config]
                folder.mkdir(exist_ok=True)
                writer = _Writer(folder / f"{split}.parquet", rows.features.arrow_schema)
                self._writers[config, split] = writer
            writer.write(table)
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self, card: Callable[[DataFiles], str], others: Mapping[str, bytes] | None = None) -> None:
        """Ends the writing, adds the card and the recipe, and lets the folder appear.

        Args:
            card: Gives the text of the card, for the file of each config and split.
            others: The content of other files, by their path in the folder.

        Raises:
            OutputError: it can't be written.
        """
        try:
            data_files = self._end_files()
            (self._staging / README).write_text(card(data_files), "utf-8")
            (self._staging / FILE).write_text(self.recipe.to_yaml(), "utf-8")
            for path, content in (others or {}).items():
                (self._staging / path).parent.mkdir(exist_ok=True)
                (self._staging / path).write_bytes(content)
            for file in self._staging.rglob("*"):
                _sync(file)
            if self.path.exists():
                old = self.path.with_name(f".{self.path.name}.old-{os.getpid()}")
                self.path.rename(old)
                self._staging.rename(self.path)
                self._retire(old)
            else:
                self._staging.rename(self.path)
            _sync(self.path.parent)
        except OSError as error:
            raise self._unwritable(error) from error

    def _end_files(self) -> DataFiles:
        # Names end in a hash of the content: `datasets` caches a local folder by what its card says of the files, not
        # by the files, so the cards of two results must not say the same.
        files: DataFiles = {config: {} for config in FOLDERS}
        for config, split in sorted(self._writers, key=lambda key: (key[0], split_order(key[1]))):
            writer = self._writers[config, split]
            writer.close()
            file = self._staging / FOLDERS[config] / f"{split}.parquet"
            name = f"{split}-00000-of-00001-{content_hash(file)[:16]}.parquet"
            file.rename(file.with_name(name))
            files[config][split] = f"{FOLDERS[config]}/{name}"
        return {config: splits for config, splits in files.items() if splits}

    def discard(self) -> None:
        """Forgets what was collected; an existing folder stays as it is."""
        shutil.rmtree(self._staging, ignore_errors=True)

    def _check_destination(self, overwrite: bool) -> None:
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        there = read_hash(self.path)
        if there is None:
            raise OutputError(f"{self.path}: is not a result of hf-reflect; it is left alone. Choose another folder.")
        if there != self.recipe.hash and not overwrite:
            raise OutputError(
                f"{self.path}: holds the result of another recipe ({there}, this one is {self.recipe.hash}). "
                "Choose another folder, or replace it with --overwrite."
            )

    def _clear_leftovers(self) -> None:
        """Removes what killed runs left behind; puts back a folder that one had moved aside."""
        for left in self.path.parent.glob(f".{glob.escape(self.path.name)}.*-*"):
            kind, _, pid = left.name.removeprefix(f".{self.path.name}.").partition("-")
            if kind not in ("partial", "old") or not pid.isdigit() or _alive(int(pid)):
                continue
            if kind == "old" and not self.path.exists():
                left.rename(self.path)
            elif kind == "old":
                self._retire(left)
            else:
                shutil.rmtree(left)

    def _retire(self, old: Path) -> None:
        """Removes the former folder; what the user put into it (a .git, say) moves to the new one."""
        ours = _OURS - {REPORT} if _data(old) == _data(self.path) else _OURS  # of the same data it says what is true
        for entry in old.iterdir():
            if entry.name not in ours and not (self.path / entry.name).exists():
                entry.rename(self.path / entry.name)
        shutil.rmtree(old)

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: can't be written: {error.strerror or error}. "
            "What was paid for is in the journal: run the same command again to go on."
        )


class _Writer:
    """Writes a Parquet file in row groups of a thousand rows or more, as the Hub wants them.

    Each row group costs every reader memory: a million rows in groups of a shard took 1.5 GB to open.
    """

    def __init__(self, file: Path, schema: Any) -> None:
        import pyarrow.parquet as pq

        self._schema, self._file = schema, pq.ParquetWriter(file, schema)
        self._waiting: list[Any] = []

    def write(self, table: Any) -> None:
        self._waiting.append(table.cast(self._schema))
        if sum(map(len, self._waiting)) >= _ROW_GROUP:
            self._flush()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        import pyarrow as pa

        self._file.write_table(pa.concat_tables(self._waiting))
        self._waiting = []


def _data(folder: Path) -> set[str]:
    """The names of a result's data files, which end in hashes of what is in them."""
    return {file.name for file in folder.rglob("*.parquet")}


def write_whole(file: Path, content: Iterable[bytes]) -> None:
    """Writes a file that is there whole or not at all.

    Args:
        file: Where to; what is there is replaced once the new one is complete.
        content: Its content, piece by piece.

    Raises:
        OutputError: it can't be written.
    """
    refuse_special(file)
    unfinished = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as out:
            out.writelines(content)
        unfinished.replace(file)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{file}: can't be written: {reason}. Choose another file, or make room.") from error
    finally:
        with suppress(OSError):  # it is not there, or can't be; the error above says more
            unfinished.unlink()


def refuse_special(file: Path) -> None:
    """Refuses to replace what is no file, such as a device.

    Raises:
        OutputError: it is none.
    """
    if file.exists() and not file.is_file():
        raise OutputError(f"{file}: is no file that could be replaced. Choose another.")


def split_order(split: str) -> tuple[bool, str]:
    """The order of splits on a card: what is trained on, then the others by name."""
    return split != "train", split


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
