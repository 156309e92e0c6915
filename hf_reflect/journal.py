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
_MOST_PARAMETERS = 500  # SQLite's oldest limit is 999


def default_path() -> Path:
    """Where the journal is unless `--journal` says otherwise: under `HF_HOME`, read when it is needed."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return Path(home) / "hf_reflect" / "journal.sqlite3"


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
