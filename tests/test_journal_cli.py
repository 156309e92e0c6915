"""`hf-reflect journal`, run as a person runs it."""

import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from test_cli import check_is_one_line_of_advice
from test_transforms import alpaca
from typer.testing import CliRunner

from hf_reflect import recycle
from hf_reflect.cli import app
from hf_reflect.errors import HfReflectError
from hf_reflect.journal import Journal, open_journal


COMMAND = str(Path(sys.executable).parent / "hf-reflect")

REPLIES = {
    "a": {"text": "é 🌙 \x1b[31m", "finish_reason": "stop", "prompt_tokens": 1200, "completion_tokens": 34},
    "b": {"text": "", "finish_reason": None, "prompt_tokens": None, "completion_tokens": 66},
}
LOSSES = {"c": [0.5, 7], "d": [1.25, 9], "e": [2.0, 1]}


def cli(*words: object, answer: str | None = None):
    return CliRunner().invoke(app, ["journal", *(str(word) for word in words)], input=answer)


@pytest.fixture
def full(journal) -> Path:
    """A journal with two replies of which one is old, and three losses."""
    book = Journal(journal)
    book.put("reply", {"a": REPLIES["a"]})
    book.put("reply", {"b": REPLIES["b"]})
    book.put("loss", LOSSES)
    book.close()
    with sqlite3.connect(journal) as db:
        for key, moment in (("a", 1_600_000_000.0), ("c", 1_650_000_000.0)):  # 2020-09-13, 2022-04-15
            db.execute("UPDATE entries SET created = ? WHERE key = ?", (moment, key))
    db.close()
    return journal


def contents(path: Path) -> dict[str, object]:
    with sqlite3.connect(path) as db:
        found = {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM entries")}
    db.close()
    return found


def test_info_says_where_it_is_how_large_and_what_it_holds(full):
    done = cli("info", "--journal", full)
    assert done.exit_code == 0, done.exception
    first, *lines = done.output.splitlines()
    assert first.startswith(f"{full}: ")
    assert re.search(r": 0\.\d MiB$", first)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert [" ".join(line.split()) for line in lines] == [
        f"reply 2 entries, 2020-09-13 to {today}",
        "1200 tokens read, 100 written",
        f"loss 3 entries, 2022-04-15 to {today}",
    ]


def test_info_on_an_empty_journal_says_its_size_alone(journal):
    Journal(journal).put("reply", {})
    done = cli("info", "--journal", journal)
    assert done.exit_code == 0
    assert len(done.output.splitlines()) == 1


def test_a_journal_is_looked_for_where_runs_keep_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    expected = tmp_path / "hf_reflect" / "journal.sqlite3"
    with_none = cli("info")
    assert str(expected) in str(with_none.exception)
    Journal(expected).put("loss", LOSSES)
    assert f"{expected}: " in cli("info").output


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_export_writes_every_entry_and_from_that_a_journal_can_be_made_again(full, tmp_path):
    file = tmp_path / "out.jsonl"
    done = cli("export", file, "--journal", full)
    assert done.exit_code == 0, done.exception
    entries = lines_of(file.read_text("utf-8"))
    assert {entry["key"]: entry["value"] for entry in entries} == {**REPLIES, **LOSSES}
    assert {entry["key"]: entry["kind"] for entry in entries} == {
        **dict.fromkeys("ab", "reply"),
        **dict.fromkeys("cde", "loss"),
    }
    assert [(entry["key"], entry["created"]) for entry in entries[:2]] == [
        ("a", 1_600_000_000.0),
        ("c", 1_650_000_000.0),
    ]
    again = Journal(tmp_path / "again.sqlite3")
    for entry in entries:
        again.put(entry["kind"], {entry["key"]: entry["value"]})
    assert contents(again.path) == contents(full)


def test_export_without_a_file_writes_to_standard_output(full, tmp_path):
    done = subprocess.run([COMMAND, "journal", "export", "--journal", full], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    cli("export", tmp_path / "file", "--journal", full)
    assert done.stdout == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize(("kind", "keys"), [("reply", ["a", "b"]), ("loss", ["c", "d", "e"])])
def test_export_of_a_kind_has_that_kind_alone(full, kind, keys):
    assert [entry["key"] for entry in lines_of(cli("export", "--kind", kind, "--journal", full).output)] == keys


def test_export_never_writes_over_a_file(full, tmp_path):
    file = tmp_path / "thesis.txt"
    file.write_text("years of work")
    done = cli("export", file, "--journal", full)
    assert isinstance(done.exception, HfReflectError)
    assert str(file) in str(done.exception)
    assert file.read_text() == "years of work"


def test_export_to_a_reader_that_has_had_enough_ends_quietly(journal):
    Journal(journal).put("reply", {str(i): "x" * 1000 for i in range(3000)})
    process = subprocess.Popen(
        [COMMAND, "journal", "export", "--journal", journal], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(60)


def test_what_was_exported_is_not_paid_for_again(server, journal, tmp_path):
    options = {"oracle": server.url, "student": None, "method": "reflect", "progress": False}
    rows = Dataset.from_list(alpaca(4))
    first = recycle(rows, journal=journal, **options)
    asked = len(server.completions)
    entries = lines_of(cli("export", "--journal", journal).output)
    assert len(entries) == asked == first.summary.spent.calls
    for entry in entries:
        open_journal(tmp_path / "moved").put(entry["kind"], {entry["key"]: entry["value"]})
    again = recycle(rows, journal=tmp_path / "moved", **options)
    assert len(server.completions) == asked
    assert again.reflections.to_list() == first.reflections.to_list()


PRUNED = {
    "everything": ([], ""),
    "a kind": (["--kind", "loss"], "ab"),
    "an age": (["--older-than", "365"], "bde"),
    "a kind of an age": (["--kind", "reply", "--older-than", "365"], "bcde"),
    "nothing": (["--older-than", "36500"], "abcde"),
}


@pytest.mark.parametrize("what", PRUNED)
def test_prune_forgets_what_it_is_told_when_it_need_not_ask(full, what):
    words, left = PRUNED[what]
    done = cli("prune", *words, "--yes", "--journal", full)
    assert done.exit_code == 0, done.exception
    assert f"forgot {5 - len(left)} entries" in done.output
    assert sorted(contents(full)) == list(left)


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_prune_asks_first_and_forgets_nothing_unless_told_yes(full, answer):
    done = cli("prune", "--kind", "loss", "--journal", full, answer=answer)
    assert f"forget 3 entries of {full}?" in done.output
    assert done.exit_code == 1
    assert sorted(contents(full)) == list("abcde")


def test_prune_forgets_when_told_yes(full):
    done = cli("prune", "--kind", "loss", "--journal", full, answer="y\n")
    assert done.exit_code == 0
    assert "forgot 3 entries" in done.output
    assert sorted(contents(full)) == ["a", "b"]


def test_prune_does_not_ask_about_nothing(full):
    done = cli("prune", "--older-than", 36500, "--journal", full)
    assert done.exit_code == 0
    assert "forgot 0 entries" in done.output


def test_an_age_below_nothing_is_refused(full):
    assert cli("prune", "--older-than", "-1", "--yes", "--journal", full).exit_code != 0
    assert sorted(contents(full)) == list("abcde")


def test_what_was_forgotten_is_paid_for_again_and_nothing_else(server, journal):
    options = {"oracle": server.url, "student": None, "method": "reflect", "progress": False, "journal": journal}
    rows = Dataset.from_list(alpaca(4))
    recycle(rows, **options)
    asked = len(server.completions)
    for kind, expected in (("loss", 0), ("reply", asked)):
        cli("prune", "--kind", kind, "--yes", "--journal", journal)
        assert recycle(rows, **options).summary.spent.calls == expected


@pytest.mark.parametrize("command", ["info", "export", "prune"])
def test_a_journal_that_is_not_there_is_one_line_and_is_not_made(tmp_path, command):
    words = [COMMAND, "journal", command, "--journal", str(tmp_path / "none")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    check_is_one_line_of_advice(done, str(tmp_path / "none"), "none yet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["info", "export", "prune"])
def test_a_file_that_is_no_journal_is_one_line_and_stays_as_it_was(tmp_path, command):
    notes = tmp_path / "notes"
    notes.write_text("these are my notes, not a database " * 100)
    before = notes.read_bytes()
    words = [COMMAND, "journal", command, "--journal", str(notes)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, input="y\n")
    check_is_one_line_of_advice(done, "journal", str(notes))
    assert notes.read_bytes() == before
    assert list(tmp_path.iterdir()) == [notes]


def test_a_kind_that_there_is_not_is_refused(full):
    assert cli("prune", "--kind", "secrets", "--yes", "--journal", full).exit_code == 2
    assert sorted(contents(full)) == list("abcde")


def test_a_run_leaves_a_journal_that_only_its_owner_may_read(server, tmp_path):
    rows, journal = tmp_path / "rows.jsonl", tmp_path / "new" / "journal"
    rows.write_text("".join(json.dumps(row) + "\n" for row in alpaca(3)))
    words = ["recycle", rows, tmp_path / "out", "--oracle", server.url, "--method", "reflect", "--student", "none"]
    modes = []

    def look(call):
        modes.extend((file.name, stat.S_IMODE(file.stat().st_mode)) for file in journal.parent.iterdir())

    server.rule = look  # while it runs, so that what SQLite keeps beside the file is there
    before = os.umask(0)
    try:
        done = subprocess.run(
            [COMMAND, *map(str, words), "--journal", str(journal)], capture_output=True, text=True, timeout=60
        )
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    assert {name for name, _ in modes} == {"journal", "journal-wal", "journal-shm"}
    assert {mode for _, mode in modes} == {0o600}
    assert stat.S_IMODE(journal.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
