import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime

import pytest

from hf_reflect.errors import JournalError
from hf_reflect.journal import Journal, default_path, open_journal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite3"


@pytest.fixture
def journal(path):
    journal = Journal(path)
    yield journal
    journal.close()


def python(code, *arguments):
    """Starts another Python that runs some code."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_was_put_is_got_and_what_was_not_is_absent(journal):
    journal.put("reply", {"a": {"text": "A"}, "b": {"text": "B"}})
    assert journal.get("reply", ["b", "c"]) == {"b": {"text": "B"}}


def test_replies_and_losses_with_the_same_key_are_two_entries(journal):
    journal.put("reply", {"k": "text"})
    journal.put("loss", {"k": 0.5})
    assert (journal.get("reply", ["k"]), journal.get("loss", ["k"])) == ({"k": "text"}, {"k": 0.5})


def test_putting_a_key_again_replaces_its_value(journal):
    journal.put("loss", {"k": 1.0})
    journal.put("loss", {"k": 2.0})
    assert journal.get("loss", ["k"]) == {"k": 2.0}


@pytest.mark.parametrize(
    "value",
    ["", "a\0b", "🌙 é 漢", "\ud83d", '"quoted" \\ \n\t', 0.1, 1e-300, -0.0, None, True, [], {"a": [1, {"b": None}]}],
)
def test_a_value_comes_back_as_it_was(journal, value):
    journal.put("reply", {"k": value})
    assert journal.get("reply", ["k"]) == {"k": value}


@pytest.mark.parametrize("key", ["", "'; DROP TABLE entries; --", "a\0b", "🌙", "%", "K"])
def test_a_key_is_only_a_key(journal, key):
    journal.put("reply", {key: 1, "k": 2})
    assert journal.get("reply", [key, "k"]) == {key: 1, "k": 2}


def test_thousands_of_keys_go_in_and_out_at_once(journal):
    values = {f"key{i}": i for i in range(2503)}
    journal.put("loss", values)
    assert journal.get("loss", [*values, "absent"]) == values


def test_keys_may_be_repeated_or_come_from_an_iterator(journal):
    journal.put("loss", {"a": 1.0})
    assert journal.get("loss", iter(["a", "a"])) == {"a": 1.0}


def test_nothing_put_and_nothing_asked_is_nothing(journal):
    journal.put("loss", {})
    assert journal.get("loss", []) == {}


def test_a_batch_that_can_not_be_written_leaves_nothing_half_written(journal):
    with pytest.raises(TypeError):
        journal.put("reply", {"good": 1, "bad": object()})
    assert journal.get("reply", ["good"]) == {}


def test_entries_outlive_the_object(path):
    first = Journal(path)
    first.put("reply", {"k": "v"})
    first.close()
    second = Journal(path)
    assert second.get("reply", ["k"]) == {"k": "v"}
    second.close()


def test_a_closed_journal_opens_again(journal):
    journal.put("reply", {"k": "v"})
    journal.close()
    journal.close()
    assert journal.get("reply", ["k"]) == {"k": "v"}


def test_what_a_process_had_put_survives_its_kill(path):
    writer = python(
        """
        import sys, time
        from hf_reflect.journal import Journal
        journal = Journal(sys.argv[1])
        for i in range(20):
            journal.put("reply", {f"key{i}": "x" * 10_000})
        print("written", flush=True)
        time.sleep(600)
        """,
        path,
    )
    assert writer.stdout.readline() == "written\n"
    os.kill(writer.pid, signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    journal = Journal(path)
    assert journal.get("reply", [f"key{i}" for i in range(20)]) == {f"key{i}": "x" * 10_000 for i in range(20)}
    journal.put("reply", {"after": 1})
    assert journal.get("reply", ["after"]) == {"after": 1}
    journal.close()


def test_two_processes_write_at_once_and_nothing_is_lost(path):
    code = """
        import sys
        from hf_reflect.journal import Journal
        journal = Journal(sys.argv[1])
        for i in range(150):
            journal.put("loss", {f"{sys.argv[2]}{i}": float(i), "shared": 1.0})
    """
    writers = [python(code, path, name) for name in "ab"]
    assert [writer.communicate()[0] for writer in writers] == ["", ""]
    assert [writer.returncode for writer in writers] == [0, 0]
    journal = Journal(path)
    assert journal.get("loss", [f"{name}{i}" for name in "ab" for i in range(150)]) == {
        f"{name}{i}": float(i) for name in "ab" for i in range(150)
    }
    journal.close()


def test_threads_share_one_journal(journal):
    def write(name):
        for i in range(50):
            journal.put("loss", {f"{name}{i}": float(i)})

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(journal.get("loss", [f"{name}{i}" for name in "abcd" for i in range(50)])) == 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_writes_to_the_journal_of_its_parent(path):
    result = python(
        """
        import os, sys
        from hf_reflect.journal import open_journal
        journal = open_journal(sys.argv[1])
        journal.put("reply", {"parent": 1})
        child = os.fork()
        if child == 0:
            seen = open_journal(sys.argv[1]).get("reply", ["parent"])
            journal.put("reply", {"child": seen})
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        journal.put("reply", {"later": 3})
        print(journal.get("reply", ["parent", "child", "later"]))
        """,
        path,
    )
    assert result.communicate()[0].strip() == str({"child": {"parent": 1}, "later": 3, "parent": 1})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_lock_that_another_thread_held_at_the_fork_does_not_stop_the_child(path):
    result = python(
        """
        import os, signal, sys, threading, warnings
        warnings.simplefilter("ignore")
        from hf_reflect.journal import open_journal
        journal = open_journal(sys.argv[1])
        journal.put("reply", {"k": 1})
        held, forked = threading.Event(), threading.Event()
        def hold():
            with journal._lock:
                held.set()
                forked.wait()
        threading.Thread(target=hold).start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            journal.put("reply", {"child": 1})
            os._exit(0)
        forked.set()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        path,
    )
    assert result.communicate()[0].strip() == "0"


def test_only_its_owner_may_read_it(tmp_path):
    before = os.umask(0)
    try:
        journal = Journal(tmp_path / "new" / "journal.sqlite3")
        journal.put("reply", {"k": "secret"})
        files = list((tmp_path / "new").iterdir())
        assert {file.name for file in files} == {f"journal.sqlite3{part}" for part in ("", "-wal", "-shm")}
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
        journal.close()
    finally:
        os.umask(before)


def test_pruning_leaves_it_to_its_owner_alone(journal):
    before = os.umask(0)
    try:
        journal.put("reply", {"k": "secret" * 10_000, "other": "secret"})
        journal.prune("reply")
        journal.put("reply", {"k": "secret"})
        files = [file for file in journal.path.parent.iterdir() if file.name.startswith(journal.path.name)]
        assert len(files) == 3
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(before)


DAY = 86_400.0


def made(path, ages: dict[str, float]) -> None:
    """Makes entries look as if they had been made so many days ago."""
    with sqlite3.connect(path) as db:
        for key, days in ages.items():
            db.execute("UPDATE entries SET created = ? WHERE key = ?", (time.time() - days * DAY, key))
    db.close()


def keys(journal, kind=None) -> list[str]:
    return [entry["key"] for entry in journal.entries(kind)]


def test_entries_come_with_all_that_is_known_of_them_the_oldest_first(journal):
    began = time.time()
    journal.put("reply", {"b": {"text": "é 🌙"}})
    journal.put("loss", {"a": 0.5})
    journal.put("reply", {"c": None})
    assert keys(journal) == ["b", "a", "c"]
    first, second, _ = journal.entries()
    assert (first["kind"], first["key"], first["value"]) == ("reply", "b", {"text": "é 🌙"})
    assert (second["kind"], second["value"]) == ("loss", 0.5)
    assert began <= first["created"] <= second["created"] <= time.time()
    assert keys(journal, "reply") == ["b", "c"]
    assert keys(journal, "loss") == ["a"]


@pytest.mark.parametrize("count", [0, 999, 1000, 1001, 2503])
def test_every_entry_comes_once_however_many_were_made_in_a_moment(journal, count):
    journal.put("loss", {f"{i:05}": i for i in range(count)})
    assert [entry["value"] for entry in journal.entries("loss")] == list(range(count))
    assert keys(journal, "reply") == []


def test_who_reads_all_entries_keeps_nobody_from_writing(journal, path):
    journal.put("loss", {f"{i:05}": i for i in range(1500)})
    reading, seen = journal.entries(), []
    other = Journal(path)
    for entry in reading:
        if not seen:
            other.put("reply", {"new": 1})
            journal.put("reply", {"newer": 1})
        seen.append(entry["key"])
    other.close()
    assert seen[:1500] == [f"{i:05}" for i in range(1500)]


def test_statistics_count_kinds_times_and_the_tokens_of_replies(journal):
    used = [(10, 5), (None, 7), (100, None), (3, 4)]
    replies = {
        str(i): {"text": "", "prompt_tokens": read, "completion_tokens": written}
        for i, (read, written) in enumerate(used)
    }
    journal.put("reply", replies)
    journal.put("loss", {"x": [0.5, 3], "y": None})
    moments = {"0": 1_600_000_000.0, "1": 1_700_000_000.0, "2": 1_650_000_000.0, "3": 1_650_000_001.0}
    with sqlite3.connect(journal.path) as db:
        db.executemany("UPDATE entries SET created = ? WHERE key = ?", [(at, key) for key, at in moments.items()])
    db.close()
    found = journal.statistics()
    assert set(found) == {"reply", "loss"}
    assert (found["reply"].count, found["loss"].count) == (4, 2)
    assert (found["reply"].prompt_tokens, found["reply"].completion_tokens) == (113, 16)
    assert (found["loss"].prompt_tokens, found["loss"].completion_tokens) == (0, 0)
    assert found["reply"].oldest == datetime(2020, 9, 13, 12, 26, 40, tzinfo=UTC)
    assert found["reply"].newest == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)


def test_of_nothing_there_are_no_statistics(journal):
    assert journal.statistics() == {}


PRUNED = {
    "everything": ({}, []),
    "a kind": ({"kind": "loss"}, ["old reply", "new reply"]),
    "an age": ({"older_than": 30}, ["new reply", "new loss"]),
    "a kind of an age": ({"kind": "reply", "older_than": 30}, ["old loss", "new reply", "new loss"]),
    "nothing so old": ({"older_than": 400}, ["old reply", "old loss", "new reply", "new loss"]),
    "part of a day": ({"older_than": 0.5}, ["new loss"]),
}


@pytest.mark.parametrize("what", PRUNED)
def test_pruning_forgets_what_it_is_told_and_nothing_else(journal, path, what):
    options, left = PRUNED[what]
    ages = {"old reply": 300.0, "old loss": 200.0, "new reply": 1.0, "new loss": 0.25}
    for key in ages:
        journal.put(key.split()[1], {key: key})
    made(path, ages)
    count = journal.prune(**options, dry=True)
    assert keys(journal) == list(ages)  # dry
    assert journal.prune(**options) == count == len(ages) - len(left)
    assert keys(journal) == left


def test_pruning_gives_the_space_back(journal, path):
    journal.put("reply", {str(i): "x" * 10_000 for i in range(200)})
    journal.put("loss", {"k": 1.0})
    assert journal.size > 2_000_000
    journal.prune("reply")
    assert journal.size < 100_000
    assert path.stat().st_size <= journal.size
    assert journal.get("loss", ["k"]) == {"k": 1.0}


def test_others_may_write_while_it_is_pruned(path, journal):
    journal.put("reply", {f"old{i}": "x" * 1000 for i in range(500)})
    writer = python(
        """
        import sys
        from hf_reflect.journal import Journal
        journal = Journal(sys.argv[1])
        for i in range(100):
            journal.put("loss", {f"new{i}": float(i)})
        """,
        path,
    )
    for _ in range(3):
        journal.prune("reply")
    assert writer.communicate()[0] == ""
    assert writer.returncode == 0
    assert len(keys(journal, "loss")) == 100
    assert keys(journal, "reply") == []


def test_the_size_of_a_journal_that_is_not_there_is_nothing(tmp_path):
    assert Journal(tmp_path / "none").size == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_made_before_it_is_used(tmp_path):
    Journal(tmp_path / "new" / "journal.sqlite3").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", [lambda j: j.put("reply", {"k": 1}), lambda j: j.get("reply", ["k"])])
@pytest.mark.parametrize("kind", ["a folder", "below a file", "no database"])
def test_a_path_that_can_not_be_used_is_named_with_advice(tmp_path, kind, action):
    path = tmp_path / "here"
    if kind == "a folder":
        path.mkdir()
    else:
        path.write_text("this is plain text and no database. " * 50)
    path = path / "journal.sqlite3" if kind == "below a file" else path
    with pytest.raises(JournalError, match="--journal") as error:
        action(Journal(path))
    assert str(path) in str(error.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(JournalError, match=r"[Pp]ermission|unable to open"):
            Journal(tmp_path / "journal.sqlite3").put("reply", {"k": 1})
    finally:
        tmp_path.chmod(0o700)


def test_one_process_has_one_journal_for_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_journal("journal.sqlite3") is open_journal(tmp_path / "journal.sqlite3")
    assert open_journal(tmp_path / "other.sqlite3") is not open_journal(tmp_path / "journal.sqlite3")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Journal("~/j.sqlite3").path == tmp_path / "j.sqlite3"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HOME": "/hf"}, "/hf/hf_reflect/journal.sqlite3"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hf_reflect/journal.sqlite3"),
        ({"HOME": "/home/ann"}, "/home/ann/.cache/huggingface/hf_reflect/journal.sqlite3"),
    ],
)
def test_unless_named_it_is_under_hf_home_as_it_is_when_needed(monkeypatch, environment, expected):
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(default_path()) == str(Journal().path) == expected
