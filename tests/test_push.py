"""To the Hub and back: the real commands and functions, in processes of their own, against the loopback Hub.

Run as a script, this file is such a process: it calls the functions of this module that it is told to.
"""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hub_server import DROPPED, TOKENS, Answer, Fault, Hub, Repo, Request, User, front_matter
from oracle_server import OracleServer
from test_hub_server import Client, ClientError, load, push_dict, serve


COMMAND = str(Path(sys.executable).parent / "hf-reflect")
AT_ONCE = {"Retry-After": "0"}
ROWS = 30
SECRET = "hf_MarkedSecretThatMustNotAppear"

EVERY_ENDPOINT = {
    "create": ("/api/repos/create", "POST"),
    "look": ("/api/datasets/", "GET"),
    "read": ("/resolve/", "HEAD"),
    "card": ("/api/validate-yaml", "POST"),
    "ask": ("/preupload/", "POST"),
    "batch": ("/objects/batch", "POST"),
    "upload": ("/storage/", "PUT"),
    "check": ("/objects/verify", "POST"),
    "commit": ("/commit/", "POST"),
    "open": ("/revision/", "GET"),
    "download": ("/storage/", "GET"),
}


class Pusher(Client):
    """A process with hf_reflect in it, which calls functions of this module one after the other."""

    def __init__(self, env: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, __file__], env=env, stdin=pipe, stdout=pipe, text=True)


# What clients do: these run in their processes.


def push(folder: str, repo: str, more: dict[str, Any]) -> dict[str, Any]:
    from hf_reflect.hub import push_recycled

    return asdict(push_recycled(folder, repo, **more))


def fetch(name: str, config: str | None, more: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by split, through `load_recycled`; a single split under an empty name."""
    from hf_reflect.loading import load_recycled

    loaded = load_recycled(name, config, **more)
    return {key: list(rows) for key, rows in (loaded.items() if hasattr(loaded, "items") else [("", loaded)])}


def fetch_plainly(name: str, config: str | None, more: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    from datasets import load_dataset

    return {split: list(rows) for split, rows in load_dataset(name, config, **more).items()}


def verified(name: str, student: str, more: dict[str, Any]) -> dict[str, Any]:
    from hf_reflect.verifying import verify

    return asdict(verify(name, student=student, **more))


def known(name: str) -> dict[str, Any]:
    from hf_reflect.loading import info

    found = info(name)
    return {"recipe": found.recipe and found.recipe.hash, "revision": found.revision, "body": found.body}


# What tests share.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, student: str) -> Path:
    """Folders that runs wrote: `full`; `partial`, the same recipe short of budget; `other`, another one; `scored`."""
    from test_transforms import alpaca

    from hf_reflect import load_student, recycle
    from hf_reflect.oracles.pace import Limits
    from hf_reflect.scoring import score

    base, judge = tmp_path_factory.mktemp("made"), load_student(student, dtype="float32")
    source = base / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in alpaca(ROWS)))
    fixed = {"student": judge, "progress": False, "journal": base / "journal"}
    with OracleServer() as server:
        small = {"limits": Limits(max_tokens_total=11000), "oracle_options": {"concurrency": 1}}
        recycle(source, base / "partial", oracle=server.url, **fixed, **small)
        recycle(source, base / "full", oracle=server.url, **fixed)
        recycle(source, base / "other", oracle=server.url, keep="reflected", **fixed)
    score(str(source), base / "scored", student=judge, journal=base / "journal")
    return base


@pytest.fixture(scope="module")
def full(made: Path) -> Path:
    return made / "full"


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Pusher, Path]]:
    folder = tmp_path_factory.mktemp("hub")
    with Hub(folder / "root") as hub:
        client = Pusher(hub.env(folder / "home"))
        yield hub, client, folder / "home"
        client.close()


@pytest.fixture
def hub(everything) -> Hub:
    hub, _, _ = everything
    hub.faults.clear()
    hub.hooks.clear()
    hub.requests.clear()
    return hub


@pytest.fixture
def client(everything) -> Pusher:
    return everything[1]


@pytest.fixture
def home(everything) -> Path:
    return everything[2]


def run(hub: Hub, home: Path, *words: object, token: str | None = "hf_alice", code: int = 0) -> Any:
    """The command line in a process of its own."""
    done = start(hub, home, *words, token=token)
    said = done.communicate(timeout=120)
    assert done.returncode == code, said
    return subprocess.CompletedProcess(words, done.returncode, *said)


def start(hub: Hub, home: Path, *words: object, token: str | None = "hf_alice") -> subprocess.Popen:
    pipe = subprocess.PIPE
    command = [COMMAND, *map(str, words)]
    return subprocess.Popen(command, env=hub.env(home, token), stdout=pipe, stderr=pipe, text=True)


UPLOADED = 2 + 4
"""Files of a result that go to the storage: those of the two configs, and pictures."""


def advice_of(done: subprocess.CompletedProcess) -> str:
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr
    return lines[0]


def refused(client: Client, function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ClientError) as caught:
        client(function, *arguments)
    assert "HfReflectError" in caught.value.kinds, caught.value
    return str(caught.value)


def read(folder: Path, config: str = "data") -> list[dict[str, Any]]:
    return pq.read_table(sorted((folder / config).glob("train-*.parquet"))).to_pylist()


def paths_of(folder: Path) -> dict[str, Path]:
    """What of a folder belongs on the Hub, by path."""
    found = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {path: file for path, file in found.items() if path.endswith((".parquet", ".yaml", ".md", ".png"))}


def check_holds(hub: Hub, repo: str, folder: Path, revision: str = "main") -> None:
    """The Hub has just the files of a folder, byte by byte; the card aside, which says another name."""
    there, files = hub.repo(repo), paths_of(folder)
    assert set(there.files(revision)) == {".gitattributes", *files}
    for path, file in files.items():
        if path != "README.md":
            assert there.read(path, revision) == file.read_bytes(), path


def check_untouched(hub: Hub, repo: str) -> None:
    """Nothing was pushed."""
    assert not hub.exists(repo) or list(hub.repo(repo).files()) == [".gitattributes"]
    assert hub.uploads == []


def configs(hub: Hub, repo: str, revision: str = "main") -> dict[str, dict[str, Any]]:
    metadata = yaml.safe_load(front_matter(hub.repo(repo).card(revision)))
    return {config["config_name"]: config for config in metadata["configs"]}


def edit(hub: Hub, repo: str, change: Callable[[str], str]) -> str:
    """Somebody changes the card by hand."""
    return hub.repo(repo).commit({"README.md": change(hub.repo(repo).card()).encode()}, author="bob")


# A push, and what it leaves.


@pytest.fixture(scope="module")
def pushed(everything, full) -> tuple[subprocess.CompletedProcess, list[Request]]:
    """`alice/recycled`, pushed by the command line; and what the Hub was asked."""
    hub, _, home = everything
    hub.requests.clear()
    done = run(hub, home, "push", full, "alice/recycled")
    return done, list(hub.requests)


def test_a_push_is_one_commit_on_top_of_what_was_looked_at(pushed, everything, full):
    hub, done, requests = everything[0], *pushed
    new, old = hub.repo("alice/recycled").history()
    assert new["parents"] == [old["id"]]
    (asked,) = [request for request in requests if "/commit/" in request.path]
    assert asked.body[0]["value"]["parentCommit"] == old["id"]
    data = {f"lfsFile {path}" for path in paths_of(full) if path.endswith((".parquet", ".png"))}
    assert set(asked.operations) == {*data, "file README.md", "file recipe.yaml"}
    assert len(data) == 2 + 4
    check_holds(hub, "alice/recycled", full)
    assert f"commit {new['id']}, loaded again and compared" in done.stdout
    assert done.stderr == ""


def test_it_says_who_calls(pushed):
    _, requests = pushed
    agents = {request.headers["user-agent"] for request in requests if "/commit/" in request.path}
    assert all(re.match(r"hf_reflect/\d", agent) for agent in agents)


@pytest.mark.parametrize("config", ["default", "reflections"])
@pytest.mark.parametrize("streaming", [False, True], ids=["downloaded", "streamed"])
def test_what_was_pushed_is_loaded_by_anybody(pushed, client, full, config, streaming):
    expected = {"train": read(full, {"default": "data"}.get(config, config))}
    assert len(expected["train"]) == ROWS
    assert client(fetch, "alice/recycled", config, {"streaming": streaming}) == expected
    assert client(fetch_plainly, "alice/recycled", config, {"streaming": streaming}) == expected


def test_the_default_config_is_what_one_trains_on(pushed, client, full):
    assert client(fetch, "alice/recycled", None, {}) == {"train": read(full)}
    assert client(fetch, "alice/recycled", None, {"split": "train"}) == {"": read(full)}
    assert client(fetch, "alice/recycled", None, {"split": "train[:3]"}) == {"": read(full)[:3]}


@pytest.mark.parametrize(
    ("name", "config", "more"),
    [
        ("alice/recycled", "nonsense", {}),
        ("alice/recycled", None, {"split": "nonsense"}),
        ("alice/recycled", None, {"revision": "nonsense"}),
        ("alice/nonsense", None, {}),
        ("nonsense", None, {}),
        ("no such/name!", None, {}),
    ],
)
def test_what_is_not_there_is_said(pushed, client, name, config, more):
    assert name in refused(client, fetch, name, config, more)


def test_pushing_again_makes_no_commit_and_uploads_nothing(pushed, hub, home, full):
    head = hub.repo("alice/recycled").sha()
    done = run(hub, home, "push", full, "alice/recycled")
    assert hub.repo("alice/recycled").sha() == head
    assert hub.uploads == []
    assert "nothing changed; there is no new commit" in done.stdout
    assert f"commit {head}" in done.stdout


def test_a_changed_folder_replaces_its_stale_files_and_old_revisions_stay(hub, client, made):
    old = client(push, str(made / "partial"), "alice/changed", {})["commit"]
    check_holds(hub, "alice/changed", made / "partial")
    new = client(push, str(made / "full"), "alice/changed", {})
    assert new["changed"]
    assert set(paths_of(made / "partial")) != set(paths_of(made / "full"))
    check_holds(hub, "alice/changed", made / "full")
    assert len(hub.repo("alice/changed").history()) == 3
    assert client(fetch, "alice/changed", None, {}) == {"train": read(made / "full")}
    assert client(fetch, "alice/changed", None, {"revision": old}) == {"train": read(made / "partial")}


def test_the_card_says_the_name_that_it_is_loaded_by(pushed, everything):
    card = everything[0].repo("alice/recycled").card()
    assert 'load_dataset("alice/recycled", split="train")' in card
    assert str(everything[2]) not in card


def test_what_was_changed_in_the_card_of_the_folder_arrives(hub, home, full, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(full, folder)
    card = (folder / "README.md").read_text()
    card = card.replace("license: unknown", "license: mit").replace("## Limits\n", "## Notes\n\nMine.\n\n## Limits\n")
    (folder / "README.md").write_text(card)
    run(hub, home, "push", folder, "alice/noted")
    there = hub.repo("alice/noted").card()
    assert "license: mit" in there
    assert "## Notes\n\nMine.\n\n## Limits" in there
    assert "# noted\n" in there  # what was not changed speaks of the dataset on the Hub
    run(hub, home, "push", folder, "alice/noted")
    assert len(hub.repo("alice/noted").history()) == 2


@pytest.mark.parametrize(("repo", "token"), [("no namespace", "hf_alice"), ("alice/x", "hf_wrong"), ("alice/x", None)])
def test_a_place_that_can_not_be_pushed_to_is_refused_before_anything_is_paid_for(hub, home, tmp_path, repo, token):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "Say it.", "output": "It."}) + "\n")
    with OracleServer() as server:
        words = ["--oracle", server.url, "--student", "none", "--method", "reflect", "--push-to-hub", repo]
        done = run(hub, home, "recycle", rows, tmp_path / "out", *words, token=token, code=1)
        assert repo in advice_of(done)
        assert server.completions == []
    assert not (tmp_path / "out").exists()


def test_what_score_wrote_is_pushed_too(hub, client, made):
    client(push, str(made / "scored"), "alice/scored", {})
    check_holds(hub, "alice/scored", made / "scored")
    assert client(fetch, "alice/scored", None, {}) == {"train": read(made / "scored")}
    assert not client(push, str(made / "scored"), "alice/scored", {})["changed"]


# Faults.


GROUPS = [
    ("create", "look", "read"),
    ("card", "ask", "batch"),
    ("upload", "check", "commit"),
    ("open",),
    ("download",),
]


@pytest.mark.parametrize("endpoints", GROUPS, ids="-".join)
@pytest.mark.parametrize("status", [429, 503])
def test_what_may_pass_is_tried_again_and_nothing_is_uploaded_twice(hub, client, full, status, endpoints):
    name = f"alice/tried-{status}-{endpoints[0]}"
    for endpoint in endpoints:
        hub.faults.append(Fault(*EVERY_ENDPOINT[endpoint], status=status, headers=AT_ONCE))
    if "read" in endpoints:
        hub.create(name).commit({"README.md": b"# By hand\n"})
    client(push, str(full), name, {})
    assert [fault for fault in hub.faults if fault.times] == []
    assert max(Counter(hub.uploads).values()) == 1
    check_holds(hub, name, full)
    assert len(hub.repo(name).history()) == (3 if "read" in endpoints else 2)


@pytest.mark.parametrize("status", [412, 500, 502, 504])
def test_a_commit_that_did_not_work_is_tried_again(hub, client, full, status):
    hub.faults.append(Fault("/commit/", "POST", status=status, headers=AT_ONCE, times=3))
    client(push, str(full), f"alice/tried-commit-{status}", {})
    assert [request.status for request in hub.seen("/commit/")] == [status] * 3 + [200]
    check_holds(hub, f"alice/tried-commit-{status}", full)
    assert len(hub.uploads) == UPLOADED


def test_an_upload_whose_signed_address_is_no_longer_valid_is_tried_again(hub, client, full):
    hub.faults.append(Fault("/storage/", "PUT", status=403))
    client(push, str(full), "alice/expired", {})
    check_holds(hub, "alice/expired", full)
    assert len(hub.uploads) == len(set(hub.uploads)) == UPLOADED


def test_a_storage_that_refuses_everything_is_given_up_with_advice(hub, home, full):
    hub.faults.append(Fault("/storage/", "PUT", status=400, times=None))
    assert "alice/refusing" in advice_of(run(hub, home, "push", full, "alice/refusing", code=1))
    assert list(hub.repo("alice/refusing").files()) == [".gitattributes"]


@pytest.mark.parametrize("endpoint", ["look", "ask", "batch", "commit"])
def test_a_conflict_is_tried_again(hub, client, full, endpoint):
    hub.faults.append(Fault(*EVERY_ENDPOINT[endpoint], status=409, headers=AT_ONCE))
    client(push, str(full), f"alice/conflict-{endpoint}", {})
    check_holds(hub, f"alice/conflict-{endpoint}", full)
    assert len(hub.uploads) == UPLOADED


@pytest.mark.parametrize("endpoint", EVERY_ENDPOINT)
def test_a_connection_that_is_reset_is_made_again(hub, client, full, endpoint):
    hub.faults.append(Fault(*EVERY_ENDPOINT[endpoint], cut="before"))
    hub.create(f"alice/reset-{endpoint}").commit({"README.md": b"# By hand\n"})
    client(push, str(full), f"alice/reset-{endpoint}", {})
    assert [fault for fault in hub.faults if fault.times] == []
    assert max(Counter(hub.uploads).values()) == 1
    check_holds(hub, f"alice/reset-{endpoint}", full)


def test_a_reset_in_the_middle_of_an_upload_is_made_good(hub, client, full):
    hub.faults.append(Fault("/storage/", "PUT", cut="middle"))
    client(push, str(full), "alice/interrupted", {})
    assert [request.cut for request in hub.seen("/storage/", "PUT")].count("middle") == 1
    assert len(hub.uploads) == len(set(hub.uploads)) == UPLOADED
    check_holds(hub, "alice/interrupted", full)


def test_a_reset_in_the_middle_of_what_is_downloaded_to_compare_is_made_good(hub, client, full):
    hub.faults.append(Fault("/storage/", "GET", cut="middle"))
    client(push, str(full), "alice/interrupted-back", {})
    check_holds(hub, "alice/interrupted-back", full)


def test_it_waits_as_long_as_the_hub_asks(hub, client, full):
    hub.faults.append(Fault("/commit/", "POST", status=429, headers={"Retry-After": "2"}))
    client(push, str(full), "alice/throttled", {})
    first, second = hub.seen("/commit/", "POST")
    assert 2 <= second.at - first.at < 5
    check_holds(hub, "alice/throttled", full)


def test_it_waits_a_little_where_the_hub_asks_nothing(hub, client, full):
    hub.faults.append(Fault("/commit/", "POST", status=503))
    client(push, str(full), "alice/down", {})
    first, second = hub.seen("/commit/", "POST")
    assert 0.2 < second.at - first.at < 5


@pytest.mark.parametrize("how", [{"cut": "before"}, {"status": 500, "headers": AT_ONCE}], ids=["lost", "500"])
def test_an_answer_that_is_lost_after_the_commit_makes_no_second_commit(hub, client, full, how):
    name = f"alice/lost-{next(iter(how))}"
    hub.faults.append(Fault("/commit/", "POST", done=True, **how))
    made = client(push, str(full), name, {})
    check_holds(hub, name, full)
    assert len(hub.repo(name).history()) == 2
    assert made["commit"] == hub.repo(name).sha()
    assert made["changed"]
    assert len(hub.uploads) == UPLOADED


def test_an_answer_that_is_lost_after_the_pull_request_was_opened_opens_no_second_one(hub, client, full):
    hub.faults.append(Fault("/commit/", "POST", done=True, status=504, headers=AT_ONCE))
    client(push, str(full), "alice/lost-pull", {"create_pr": True})
    assert len(hub.repo("alice/lost-pull").state["pulls"]) == 1


@pytest.mark.parametrize("path", ["/api/repos/create", "/branch/"])
def test_a_repository_or_branch_whose_making_was_not_confirmed_is_used(hub, client, full, path):
    name = f"alice/unconfirmed-{path.strip('/').rpartition('/')[2]}"
    hub.faults.append(Fault(path, "POST", done=True, cut="before"))
    client(push, str(full), name, {"revision": "draft"})
    check_holds(hub, name, full, "draft")


def test_a_hub_that_stays_down_is_given_up_with_advice(hub, client, full):
    hub.faults.append(Fault("/commit/", "POST", status=503, headers=AT_ONCE, times=None))
    said = refused(client, push, str(full), "alice/dead", {})
    assert "503" in said
    assert "run the same command again" in said
    assert list(hub.repo("alice/dead").files()) == [".gitattributes"]
    hub.faults.clear()
    client(push, str(full), "alice/dead", {})
    check_holds(hub, "alice/dead", full)
    assert len(hub.uploads) == UPLOADED


def test_a_hub_that_does_not_let_itself_be_read_again_is_one_line_of_advice(hub, home, full):
    hub.faults.append(Fault("/storage/", "GET", status=403, times=None))
    assert "alice/unread" in advice_of(run(hub, home, "push", full, "alice/unread", code=1))


def test_a_push_that_is_killed_between_upload_and_commit_is_done_by_the_next(hub, home, full):
    victims: list[subprocess.Popen] = []

    def kill(request: Request) -> Answer:
        victims[0].send_signal(signal.SIGKILL)
        return DROPPED

    hub.before("/commit/", kill)
    victims.append(start(hub, home, "push", full, "alice/killed", "--preference"))
    victims[0].communicate(timeout=60)
    assert victims[0].returncode == -signal.SIGKILL
    assert list(hub.repo("alice/killed").files()) == [".gitattributes"]
    assert len(hub.uploads) == UPLOADED + 1
    run(hub, home, "push", full, "alice/killed", "--preference")
    assert len(hub.uploads) == len(set(hub.uploads)) == UPLOADED + 1
    assert set(configs(hub, "alice/killed")) == {"default", "reflections", "preference"}
    assert len(hub.repo("alice/killed").history()) == 2


# Others, at the same time.


def test_two_pushes_at_once_with_different_extras_both_end_up_in_it(hub, home, client, full):
    both = threading.Barrier(2, timeout=60)
    hub.before("/commit/", lambda request: both.wait() * 0, times=2)
    extras = (["--preference"], ["--selected", "20%"])
    racing = [start(hub, home, "push", full, "alice/raced", *extra) for extra in extras]
    said = [one.communicate(timeout=100) for one in racing]
    assert [one.returncode for one in racing] == [0, 0], said
    assert sorted(request.status for request in hub.seen("/commit/")) == [200, 200, 412]
    found = configs(hub, "alice/raced")
    assert set(found) == {"default", "reflections", "preference", "selected"}
    listed = {file["path"] for config in found.values() for file in config["data_files"]}
    there = {path for path in hub.repo("alice/raced").files() if path.endswith(".parquet")}
    assert listed == there
    assert len(set(hub.uploads)) == UPLOADED + 2
    best = sorted(read(full), key=lambda row: -row["ifd"])[: ROWS // 5]
    selected = client(fetch, "alice/raced", "selected", {})["train"]
    assert [row["row_id"] for row in selected] == sorted(row["row_id"] for row in best)
    body = hub.repo("alice/raced").card()
    assert "`chosen`" in body
    assert "the rows with the highest IFD" in body


def test_the_pairs_to_prefer_one_of_answer_the_same_prompt(hub, client, full):
    client(push, str(full), "alice/preferring", {"preference": True})
    pairs = client(fetch, "alice/preferring", "preference", {})["train"]
    default = {row["row_id"]: row for row in read(full)}
    replaced = [row_id for row_id, row in default.items() if row["recycled"] in ("response", "both")]
    assert [pair["row_id"] for pair in pairs] == replaced
    assert 0 < len(replaced) < ROWS
    for pair in pairs:
        row = default[pair["row_id"]]
        assert (pair["prompt"], pair["chosen"]) == (row["instruction"], row["output"])
        assert pair["rejected"] != pair["chosen"]


def test_a_commit_by_somebody_else_in_between_is_not_lost(hub, client, full):
    repo = hub.create("alice/between")
    notes = {"NOTES.md": b"by bob", "README.md": b"---\nlicense: mit\n---\n# Bob's words\n"}
    hub.before("/commit/", lambda request: repo.commit(notes, author="bob") and None)
    client(push, str(full), "alice/between", {"overwrite": True})
    assert [request.status for request in hub.seen("/commit/")] == [412, 200]
    assert repo.read("NOTES.md") == b"by bob"
    assert "# Bob's words" in repo.card()
    assert yaml.safe_load(front_matter(repo.card()))["license"] == "mit"
    assert len(repo.history()) == 3
    assert client(fetch, "alice/between", None, {}) == {"train": read(full)}


def test_data_of_somebody_else_that_came_in_between_is_not_replaced_unasked(hub, client, full):
    repo = hub.create("alice/taken-between")
    hub.before("/commit/", lambda request: repo.commit({"data/theirs.csv": b"a\n1\n"}, author="bob") and None)
    assert "--overwrite" in refused(client, push, str(full), "alice/taken-between", {})
    assert set(repo.files()) == {".gitattributes", "data/theirs.csv"}


# Where to.


def test_a_pull_request_leaves_the_branch_alone(hub, home, client, full):
    repo = hub.create("bob/reviewed")
    repo.commit({"README.md": b"# Bob's\n"}, author="bob")
    head = repo.sha()
    done = run(hub, home, "push", full, "bob/reviewed", "--create-pr")
    assert f"{hub.url}/datasets/bob/reviewed/discussions/1" in done.stdout
    assert repo.sha() == head
    (pull,) = repo.state["pulls"]
    assert (pull["author"], pull["base"]) == ("alice", head)
    check_holds(hub, "bob/reviewed", full, "refs/pr/1")
    assert client(fetch, "bob/reviewed", None, {"revision": "refs/pr/1"}) == {"train": read(full)}


def test_a_pull_request_is_brought_up_to_date_by_its_revision(hub, client, made):
    client(push, str(made / "partial"), "alice/updated", {"create_pr": True})
    hub.before("/branch/", lambda request: Answer(400, {"error": "Invalid branch name"}))
    client(push, str(made / "full"), "alice/updated", {"revision": "refs/pr/1"})
    check_holds(hub, "alice/updated", made / "full", "refs/pr/1")
    assert set(hub.repo("alice/updated").refs) == {"refs/heads/main", "refs/pr/1"}


def test_a_branch_is_made_and_pushed_to(hub, home, client, full):
    run(hub, home, "push", full, "alice/branched", "--revision", "draft", "--message", "First try")
    assert list(hub.repo("alice/branched").files()) == [".gitattributes"]
    check_holds(hub, "alice/branched", full, "draft")
    assert hub.repo("alice/branched").head("draft")["title"] == "First try"
    assert client(fetch, "alice/branched", "reflections", {"revision": "draft"}) == {
        "train": read(full, "reflections")
    }
    assert not client(push, str(full), "alice/branched", {"revision": "draft"})["changed"]


def test_a_new_repository_is_private_if_that_is_asked_for_and_public_otherwise(hub, client, full):
    client(push, str(full), "alice/secret", {"private": True})
    client(push, str(full), "acme/public", {})
    assert hub.repo("alice/secret").state["private"]
    assert not hub.repo("acme/public").state["private"]
    client(push, str(full), "alice/secret", {})
    assert hub.repo("alice/secret").state["private"]


# What people changed.


def by_hand(card: str) -> str:
    """A card in which somebody changed a value, added one and removed one, and did the same to the sections."""
    metadata = yaml.safe_load(front_matter(card))
    body = card.partition("---\n")[2].partition("---\n")[2]
    metadata |= {"license": "cc-by-4.0", "pretty_name": "Ours"}
    del metadata["task_categories"]
    metadata["configs"].append({"config_name": "theirs", "data_files": [{"split": "train", "path": "theirs.parquet"}]})
    body = body.replace("## Use\n", "## Use\n\nMind the licence.\n")
    body = re.sub(r"## Examples\n.*?(?=\n## )", "", body, flags=re.DOTALL)
    body = body.replace("## What changed\n", "## Funding\n\nNone.\n\n## What changed\n")
    return f"---\n{yaml.safe_dump(metadata)}---\n{body}"


def test_what_people_changed_in_the_card_survives(hub, client, made):
    client(push, str(made / "partial"), "alice/edited", {})
    before = hub.repo("alice/edited").card()
    assert "\n## Examples\n" in before
    theirs = io.BytesIO()
    pq.write_table(pa.table({"a": [1], "b": [2]}), theirs)
    hub.repo("alice/edited").commit({"theirs.parquet": theirs.getvalue()})
    edit(hub, "alice/edited", by_hand)
    client(push, str(made / "full"), "alice/edited", {})
    card = hub.repo("alice/edited").card()
    metadata = yaml.safe_load(front_matter(card))
    assert (metadata["license"], metadata["pretty_name"]) == ("cc-by-4.0", "Ours")
    assert "task_categories" not in metadata
    assert "## Use\n\nMind the licence.\n" in card
    assert "## Funding\n\nNone.\n" in card
    assert "\n## Examples\n" not in card
    counts = Counter(row["recycled"] for row in read(made / "full"))
    assert all(f"| {name} | {count} |" in card for name, count in counts.items())
    assert set(configs(hub, "alice/edited")) == {"default", "reflections", "theirs"}
    assert client(fetch, "alice/edited", "theirs", {}) == {"train": [{"a": 1, "b": 2}]}
    assert client(fetch, "alice/edited", None, {}) == {"train": read(made / "full")}
    assert not client(push, str(made / "full"), "alice/edited", {})["changed"]


def test_a_config_that_datasets_pushed_beside_ours_survives(hub, client, made):
    client(push, str(made / "partial"), "alice/beside", {})
    theirs = {"train": {"a": ["x", "y"]}}
    client(push_dict, "alice/beside", theirs, {"config_name": "theirs"})
    client(push, str(made / "full"), "alice/beside", {})
    assert client(load, "alice/beside", {"name": "theirs"}) == theirs
    assert client(fetch, "alice/beside", None, {}) == {"train": read(made / "full")}
    stale = set(paths_of(made / "partial")) - set(paths_of(made / "full"))
    assert not stale & set(hub.repo("alice/beside").files())


def test_a_dataset_that_datasets_pushed_is_replaced_only_when_asked(hub, client, full):
    client(push_dict, "alice/plain", {"train": {"a": ["x", "y"]}}, {})
    assert "something else" in refused(client, push, str(full), "alice/plain", {})
    assert client(load, "alice/plain", {}) == {"train": {"a": ["x", "y"]}}
    client(push, str(full), "alice/plain", {"overwrite": True})
    assert client(fetch, "alice/plain", None, {}) == {"train": read(full)}


def test_another_recipe_is_refused_with_advice_and_replaced_when_asked(hub, home, client, made):
    client(push, str(made / "full"), "alice/replaced", {"preference": True, "selected": 0.5})
    head, uploads = hub.repo("alice/replaced").sha(), len(hub.uploads)
    said = advice_of(run(hub, home, "push", made / "other", "alice/replaced", code=1))
    assert yaml.safe_load((made / "full" / "recipe.yaml").read_text())["hash"] in said
    assert "--overwrite" in said
    assert "--create-pr" in said
    assert (hub.repo("alice/replaced").sha(), len(hub.uploads)) == (head, uploads)
    run(hub, home, "push", made / "other", "alice/replaced", "--overwrite")
    check_holds(hub, "alice/replaced", made / "other")
    assert set(configs(hub, "alice/replaced")) == {"default", "reflections"}
    assert "`chosen`" not in hub.repo("alice/replaced").card()


def test_extras_stay_when_the_same_result_is_pushed_without_asking_for_them(hub, client, full):
    client(push, str(full), "alice/extras", {"preference": True})
    head = hub.repo("alice/extras").sha()
    again = client(push, str(full), "alice/extras", {})
    assert (again["changed"], hub.repo("alice/extras").sha()) == (False, head)
    client(push, str(full), "alice/extras", {"selected": 0.1})
    assert set(configs(hub, "alice/extras")) == {"default", "reflections", "preference", "selected"}
    client(push, str(full), "alice/extras", {"selected": 0.5})
    assert len([path for path in hub.repo("alice/extras").files() if path.startswith("selected/")]) == 1
    assert len(client(fetch, "alice/extras", "selected", {})["train"]) == ROWS // 2


def test_extras_of_a_result_that_has_grown_since_do_not_stay_as_they_were(hub, client, made):
    client(push, str(made / "partial"), "alice/grown", {"preference": True})
    client(push, str(made / "full"), "alice/grown", {})
    if "preference" in configs(hub, "alice/grown"):
        default = {row["row_id"]: row for row in read(made / "full")}
        pairs = client(fetch, "alice/grown", "preference", {})["train"]
        replaced = [row_id for row_id, row in default.items() if row["recycled"] in ("response", "both")]
        assert [pair["row_id"] for pair in pairs] == replaced


# What can't be pushed.


@pytest.mark.parametrize(
    ("token", "repo", "word"),
    [
        (None, "alice/nobody", "hf auth login"),
        ("hf_reader", "alice/nobody", "write access"),
        ("hf_alice", "bob/nobody", "a namespace of your own"),
        ("hf_alice", "alice/no--body", "no name of a dataset"),
    ],
)
def test_who_may_not_push_gets_one_line_of_advice(hub, home, full, token, repo, word):
    said = advice_of(run(hub, home, "push", full, repo, token=token, code=1))
    assert word in said
    assert repo in said
    assert not any(there.id.endswith("body") for there in hub.repos())
    assert hub.uploads == []


@pytest.mark.parametrize("repo", ["nobody", "a/b/c", "alice/no body", "alice/", "", "alice/.x"])
def test_what_is_no_name_of_a_dataset_is_refused_before_the_hub_is_asked(hub, client, full, repo):
    assert repr(repo) in refused(client, push, str(full), repo, {})
    assert not hub.requests


@pytest.mark.parametrize(
    ("token", "word"), [("hf_reader", "write access"), ("hf_bob", "write access"), ("hf_nonsense", "hf auth login")]
)
def test_who_may_not_write_to_what_is_there_is_told(hub, client, full, token, word):
    name = f"alice/guarded-{token[3:]}"
    hub.create(name)
    said = refused(client, push, str(full), name, {"token": token})
    assert word in said
    assert name in said
    check_untouched(hub, name)


@pytest.mark.parametrize("content", [None, {}, {"recipe.yaml": "hello"}, {"recipe.yaml": "a: b: c"}])
def test_a_folder_that_is_no_result_is_refused(hub, client, tmp_path, content):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for path, text in content.items():
            (folder / path).write_text(text)
    assert str(folder) in refused(client, push, str(folder), "alice/nothing", {})
    assert not hub.requests


@pytest.mark.parametrize("lost", ["data", "reflections"])
def test_a_result_that_lost_its_data_is_refused(hub, client, full, tmp_path, lost):
    shutil.copytree(full, tmp_path / "lossy")
    shutil.rmtree(tmp_path / "lossy" / lost)
    assert str(tmp_path / "lossy") in refused(client, push, str(tmp_path / "lossy"), f"alice/lost-{lost}", {})
    check_untouched(hub, f"alice/lost-{lost}")


def test_what_is_no_share_gets_one_line_of_advice(hub, home, client, full):
    assert "--selected many" in advice_of(run(hub, home, "push", full, "alice/s", "--selected", "many", code=1))
    for share in (0.0, -0.5, 2.0):
        assert str(share) in refused(client, push, str(full), "alice/s", {"selected": share})
    assert not hub.requests


def test_a_hub_that_echoes_the_token_does_not_get_it_shown(hub, home, full):
    hub.before("/api/repos/create", lambda request: Answer(403, {"error": f"you sent {dict(request.headers)}"}))
    done = run(hub, home, "push", full, "alice/echo", token=SECRET, code=1)
    assert SECRET not in done.stdout + done.stderr


# What arrived.


def swapped(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> bytes:
    """Config `default` of a folder with other rows, as a file."""
    (file,) = (folder / "data").glob("*.parquet")
    table = pq.read_table(file)
    rows = table.to_pylist()
    changed = change(rows)
    made = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows if changed is None else changed, table.schema), made)
    return made.getvalue()


def replace_data(repo: Repo, content: bytes) -> None:
    """Has the latest commit hold other data, as if that had been pushed."""
    head = repo.head()
    (path,) = (path for path in head["files"] if path.startswith("data/"))
    head["files"][path] = repo.store(path, content)
    (repo.folder / "commits" / f"{head['id']}.json").write_text(json.dumps(head))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[7].update(output="something else"),
        lambda rows: rows[7].update(ifd=0.125),
        lambda rows: rows[7].update(ifd=None),
        lambda rows: rows[:-1],
        lambda rows: [*rows, rows[0]],
        lambda rows: rows[::-1],
    ],
    ids=["a text", "a score", "null", "fewer rows", "more rows", "another order"],
)
def test_data_that_arrived_wrong_is_noticed(hub, client, full, request, change):
    name = f"alice/wrong-{request.node.callspec.id.replace(' ', '-')}"
    content = swapped(full, change)
    hub.after("/commit/", lambda request: replace_data(hub.repo(name), content))
    said = refused(client, push, str(full), name, {})
    assert name in said
    assert "what is there is not what was sent: config default" in said


def test_data_that_can_not_be_opened_again_is_one_line_of_advice(hub, home, full):
    hub.after("/commit/", lambda request: replace_data(hub.repo("alice/garbage"), b"garbage" * 1000))
    assert "alice/garbage" in advice_of(run(hub, home, "push", full, "alice/garbage", code=1))


# Looking.


def test_info_downloads_no_data(pushed, hub, home, full):
    done = run(hub, home, "info", "alice/recycled")
    recipe = yaml.safe_load((full / "recipe.yaml").read_text())
    assert recipe["hash"] in done.stdout
    assert hub.repo("alice/recycled").sha() in done.stdout
    for word in ("selective", "teacher", "## What changed", "## Decisions"):
        assert word in done.stdout
    assert hub.seen("/storage/") == []
    assert {request.path.rpartition("/")[2] for request in hub.seen("/resolve/")} <= {"README.md", "recipe.yaml"}


def test_info_of_a_folder_asks_nobody(hub, home, full):
    done = run(hub, home, "info", full)
    assert yaml.safe_load((full / "recipe.yaml").read_text())["hash"] in done.stdout
    assert hub.requests == []


@pytest.mark.parametrize("name", ["alice/nonsense", "nonsense", "no such/name!", "a/b/c"])
def test_info_of_what_is_not_there_is_one_line_of_advice(hub, home, name):
    assert name in advice_of(run(hub, home, "info", name, code=1))


def test_list_says_which_there_are(pushed, hub, home, client, full):
    client(push, str(full), "acme/listed", {})
    hub.create("acme/unrelated").commit({"README.md": b"---\ntags: [other]\n---\n"})
    done = run(hub, home, "list", "--author", "acme")
    assert "acme/listed" in done.stdout
    assert "acme/unrelated" not in done.stdout
    assert "alice/" not in done.stdout
    everybody = run(hub, home, "list").stdout
    assert "alice/recycled" in everybody
    assert "umd-zhou-lab/sRecycled_Alpaca" in everybody


def test_short_names(pushed, hub, home, client, full):
    published = b'{"instruction": "Say 1.", "output": "1"}\n'
    hub.create("umd-zhou-lab/recycled_alpaca_v1").commit({"data.jsonl": published})
    assert client(fetch, "recycled_alpaca_v1", None, {}) == {"train": [{"instruction": "Say 1.", "output": "1"}]}
    run(hub, home, "register", "mine", "alice/recycled")
    run(hub, home, "register", "here", full)
    for name in ("mine", "here", str(full)):
        assert client(fetch, name, None, {}) == {"train": read(full)}
    assert "mine  alice/recycled" in run(hub, home, "list").stdout
    assert client(known, "mine")["revision"] == hub.repo("alice/recycled").sha()
    run(hub, home, "register", "mine")
    assert "mine" in refused(client, fetch, "mine", None, {})
    assert "no such name" in advice_of(run(hub, home, "register", "mine", code=1))
    assert "slash" in advice_of(run(hub, home, "register", "a/b", "alice/recycled", code=1))


# A person's walk, with a token that must appear nowhere.


@pytest.fixture
def marked() -> Iterator[str]:
    TOKENS[SECRET] = User("alice")
    yield SECRET
    del TOKENS[SECRET]


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another student."""
    from tiny import save_tiny_model

    return str(save_tiny_model(tmp_path_factory.mktemp("another"), seed=1))


def test_from_rows_to_the_hub_and_on_from_there(hub, client, made, student, another, server, marked, tmp_path):
    home, out = tmp_path / "home", tmp_path / "out"
    said = []

    def step(*words: object) -> str:
        done = run(hub, home, *words, token=marked)
        said.append(done.stdout + done.stderr)
        return done.stdout

    recycling = [
        "--oracle",
        server.url,
        "--student",
        student,
        "--dtype",
        "float32",
        "--push-to-hub",
        "alice/walk",
        "--private",
    ]
    assert hub.url in step("recycle", made / "rows.jsonl", out / "first", *recycling)
    check_holds(hub, "alice/walk", out / "first")
    assert hub.repo("alice/walk").state["private"]
    rows = read(out / "first")
    assert client(fetch, "alice/walk", None, {}) == client(fetch_plainly, "alice/walk", None, {}) == {"train": rows}
    asked = len(server.calls)
    assert "everything agrees" in step("verify", "alice/walk", "--student", student)
    step("reselect", "alice/walk", out / "second", "--student", another, "--push-to-hub", "alice/walk-on")
    assert len(server.calls) == asked
    again = client(fetch, "alice/walk-on", "reflections", {})["train"]
    assert [row["original"]["instruction"] for row in again] == [
        row["original"]["instruction"] for row in read(out / "first", "reflections")
    ]
    assert {request.token for request in hub.seen("/commit/")} == {marked}
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 10
    for text in (*said, *(file.read_bytes().decode("latin-1") for file in files)):
        assert marked not in text


# Does it say what is true?


def tampered(hub: Hub, name: str, full: Path, changes: dict[str, bytes]) -> None:
    files = {path: file.read_bytes() for path, file in paths_of(full).items()}
    assert set(changes) <= set(files)
    hub.create(name).commit({**files, **changes})


def data_path(folder: Path) -> str:
    (file,) = (folder / "data").glob("*.parquet")
    return f"data/{file.name}"


def test_verify_agrees_with_what_is_true(pushed, client, student, tmp_path):
    found = client(verified, "alice/recycled", student, {"journal": str(tmp_path / "j")})
    assert (found["rows"], found["sampled"], found["findings"]) == (ROWS, ROWS, [])
    assert found["scores"] > ROWS
    assert found["largest"] < 0.1


def test_verify_finds_a_changed_score(hub, home, full, student):
    true = read(full)[4]["ifd"]
    changed = swapped(full, lambda rows: rows[4].update(ifd=true + 1))
    tampered(hub, "alice/tampered-score", full, {data_path(full): changed})
    done = run(hub, home, "verify", "alice/tampered-score", "--student", student, code=1)
    assert [line.strip() for line in done.stdout.splitlines()[2:]] == [
        f"split train, row 4: ifd is {true + 1}, the reflections say {true}",
        f"split train, row 4: ifd is {true + 1:.4f}, scored again it is {true:.4f}",
    ]
    assert "2 things do not agree" in advice_of(done)


@pytest.mark.parametrize("column", ["rifd", "ifd_original", "rifd_original"])
def test_verify_finds_every_score_that_was_changed(hub, client, full, student, column):
    row = next(row for row in read(full) if row[column] is not None)
    changed = swapped(full, lambda rows: rows[row["row_id"]].update({column: row[column] + 1}))
    tampered(hub, f"alice/tampered-{column.replace('_', '-')}", full, {data_path(full): changed})
    found = client(verified, f"alice/tampered-{column.replace('_', '-')}", student, {})["findings"]
    assert found
    assert all(f"row {row['row_id']}: {column} is" in finding for finding in found)


@pytest.mark.parametrize("column", ["instruction", "output"])
def test_verify_finds_a_changed_text(hub, client, full, student, column):
    changed = swapped(full, lambda rows: rows[4].update({column: "What an atom is, and how it moves."}))
    tampered(hub, f"alice/tampered-{column}", full, {data_path(full): changed})
    found = client(verified, f"alice/tampered-{column}", student, {})["findings"]
    assert "split train, row 4: its text is not what the decisions lead to" in found
    assert all(finding.startswith("split train, row 4: ") for finding in found)


def test_verify_finds_a_row_that_was_left_out(hub, client, full, student):
    tampered(hub, "alice/tampered-rows", full, {data_path(full): swapped(full, lambda rows: rows[:-1])})
    assert len(client(verified, "alice/tampered-rows", student, {})["findings"]) == 1


def test_verify_finds_a_wrong_recipe_in_the_card(hub, client, full, student):
    true = yaml.safe_load((full / "recipe.yaml").read_text())["hash"]
    card = (full / "README.md").read_text().replace(f"recipe: {true}", "recipe: '0123456789abcdef'")
    tampered(hub, "alice/tampered-card", full, {"README.md": card.encode()})
    found = client(verified, "alice/tampered-card", student, {})
    assert found["findings"] == [f"the card speaks of recipe 0123456789abcdef, recipe.yaml is {true}"]


def test_verify_finds_a_changed_recipe(hub, client, full, student):
    true = (full / "recipe.yaml").read_text()
    changed = true.replace("method: selective", "method: reflect")
    assert changed != true
    tampered(hub, "alice/tampered-recipe", full, {"recipe.yaml": changed.encode()})
    (finding,) = client(verified, "alice/tampered-recipe", student, {})["findings"]
    assert f"the card speaks of recipe {yaml.safe_load(true)['hash']}, recipe.yaml is " in finding


def test_verify_finds_another_student(pushed, client, another):
    found = client(verified, "alice/recycled", another, {})
    assert found["findings"][0].startswith("the recipe's student has ")
    assert any("scored again it is" in finding for finding in found["findings"])


def test_verify_of_what_is_no_recycled_dataset_is_one_line_of_advice(hub, home, student):
    hub.create("alice/bare").commit({"data.csv": b"a\n1\n"})
    assert "no recipe" in advice_of(run(hub, home, "verify", "alice/bare", "--student", student, code=1))


if __name__ == "__main__":
    sys.modules["test_hub_server"] = sys.modules["__main__"]  # where `serve` looks for functions
    serve()
