"""The durable record of everything paid for: oracle replies and student scores.

One SQLite file in WAL mode, shared by every run of a user (and by concurrent processes). A reply is written before
anything tries to read it, so a killed run, a better parser or another output folder never asks for it again.

Durability: an entry survives the death of the process the moment `put` returns. Only a loss of power may take the
last few (SQLite's `synchronous=NORMAL`); the file itself stays sound.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from hf_reflect.errors import JournalError


Kind = Literal["reply", "loss"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key TEXT NOT NULL,
    kind TEXT NOT NULL,
    value TEXT NOT NULL,
    created REAL NOT NULL,
    PRIMARY KEY (kind, key)
) WITHOUT ROWID
"""
_PATIENCE = 60.0  # seconds to wait for other processes
_DAY = 86_400.0
_MOST_PARAMETERS = 500  # SQLite's oldest limit is 999


def own_folder() -> Path:
    """Where this package keeps what is the user's: under `HF_HOME`, read when it is needed."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return Path(home) / "hf_reflect"


def default_path() -> Path:
    """Where the journal is unless `--journal` says otherwise."""
    return own_folder() / "journal.sqlite3"


@dataclass(frozen=True)
class Statistics:
    """What a journal holds of one kind.

    Attributes:
        count: How many entries.
        oldest: When the first was made.
        newest: When the last was made.
        prompt_tokens: Tokens that the oracles read for them.
        completion_tokens: Tokens that they wrote.
    """

    count: int
    oldest: datetime
    newest: datetime
    prompt_tokens: int
    completion_tokens: int


class Journal:
    """A key–value store of JSON values that outlives the process.

    Safe to use from any thread; a forked process opens a connection of its own.

    Args:
        path: The file; made, with its folder, when first used. Readable by its owner only.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path).expanduser() if path else default_path()
        self._lock = threading.RLock()
        self._open: tuple[int, sqlite3.Connection] | None = None

    def get(self, kind: Kind, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that are there."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Any] = {}
        with self._connection() as db:
            for start in range(0, len(wanted), _MOST_PARAMETERS):
                part = wanted[start : start + _MOST_PARAMETERS]
                marks = ",".join("?" * len(part))
                rows = db.execute(f"SELECT key, value FROM entries WHERE kind = ? AND key IN ({marks})", (kind, *part))
                found.update((key, json.loads(value)) for key, value in rows)
        return found

    def put(self, kind: Kind, values: Mapping[str, Any]) -> None:
        """Records values; when this returns they are safe from the death of the process."""
        now = time.time()
        rows = [(key, kind, json.dumps(value), now) for key, value in values.items()]
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")  # waits for other writers; a lock taken later would not
            try:
                db.executemany("INSERT OR REPLACE INTO entries (key, kind, value, created) VALUES (?, ?, ?, ?)", rows)
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise

    @property
    def size(self) -> int:
        """Bytes on disk, what waits to be merged included."""
        beside = [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal")]
        return sum(file.stat().st_size for file in beside if file.exists())

    def statistics(self) -> dict[str, "Statistics"]:
        """What there is of each kind."""
        tokens = [f"total(json_extract(value, '$.{name}'))" for name in ("prompt_tokens", "completion_tokens")]
        with self._connection() as db:
            kinds = [kind for (kind,) in db.execute("SELECT DISTINCT kind FROM entries ORDER BY kind DESC")]
            found = {}
            for kind in kinds:
                counted = ", ".join(tokens) if kind == "reply" else "0, 0"
                query = f"SELECT count(*), min(created), max(created), {counted} FROM entries WHERE kind = ?"
                count, oldest, newest, read, written = db.execute(query, (kind,)).fetchone()
                first, last = (datetime.fromtimestamp(at, UTC) for at in (oldest, newest))
                found[kind] = Statistics(count, first, last, int(read), int(written))
        return found

    def entries(self, kind: Kind | None = None) -> Iterator[dict[str, Any]]:
        """Every entry, the oldest first: `kind`, `key`, `value`, and `created` in seconds since 1970."""
        where, values = _where(kind, None)
        last: tuple[float, str] = (-1.0, "")
        while True:
            with self._connection() as db:  # in pages: a reader must not hold up those who write
                rows = db.execute(
                    f"SELECT kind, key, value, created FROM entries WHERE {where} AND (created, key) > (?, ?) "
                    "ORDER BY created, key LIMIT 1000",
                    (*values, *last),
                ).fetchall()
            for row_kind, key, value, created in rows:
                yield {"kind": row_kind, "key": key, "value": json.loads(value), "created": created}
            if not rows:
                return
            last = (rows[-1][3], rows[-1][1])

    def prune(self, kind: Kind | None = None, older_than: float | None = None, *, dry: bool = False) -> int:
        """Forgets entries and gives their space back.

        Args:
            kind: Only these.
            older_than: Only those made more than so many days ago.
            dry: Only count them.

        Returns:
            How many entries that is.
        """
        where, values = _where(kind, older_than)
        with self._connection() as db:
            if dry:
                return int(db.execute(f"SELECT count(*) FROM entries WHERE {where}", values).fetchone()[0])
            count = db.execute(f"DELETE FROM entries WHERE {where}", values).rowcount
            db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return count

    def close(self) -> None:
        """Closes the connection; the journal can be used again."""
        with self._lock:
            if self._open and self._open[0] == os.getpid():
                self._open[1].close()
            self._open = None

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                if self._open is None or self._open[0] != os.getpid():
                    self._open = (os.getpid(), self._connect())
                yield self._open[1]
            except (sqlite3.Error, OSError) as error:
                raise JournalError(
                    f"journal: {self.path}: {error}. Free some space or name another file with --journal; "
                    "what was recorded before is safe."
                ) from error

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        deadline = time.monotonic() + _PATIENCE
        while True:
            # Several processes that open a new file at once collide, and for that SQLite does not wait by itself.
            db = sqlite3.connect(self.path, timeout=_PATIENCE, check_same_thread=False, isolation_level=None)
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=NORMAL")
                db.execute(_SCHEMA)
            except sqlite3.OperationalError as error:
                db.close()
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return db


def _where(kind: Kind | None, older_than: float | None) -> tuple[str, tuple[Any, ...]]:
    conditions: list[tuple[str, Any]] = []
    if kind is not None:
        conditions.append(("kind = ?", kind))
    if older_than is not None:
        conditions.append(("created < ?", time.time() - older_than * _DAY))
    return " AND ".join(["1", *(text for text, _ in conditions)]), tuple(value for _, value in conditions)


def _new_lock_after_fork() -> None:
    for journal in list(_JOURNALS.values()):
        journal._lock = threading.RLock()


_JOURNALS: dict[Path, Journal] = {}
if hasattr(os, "register_at_fork"):
    # A lock held by another thread at the moment of the fork would stay held in the child for ever.
    os.register_at_fork(after_in_child=_new_lock_after_fork)


def open_journal(path: str | Path | None = None) -> Journal:
    """The journal at a path, one object per path and process."""
    key = (Path(path).expanduser() if path else default_path()).absolute()
    return _JOURNALS.setdefault(key, Journal(key))
