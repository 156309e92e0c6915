"""The loopback Hub as the real clients see it: `huggingface_hub` and `datasets`, in processes of their own.

Run as a script, this file is such a process: it calls the functions of this module that it is told to.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import DROPPED, Answer, Fault, Hub, Request, client_env, tags_of, upload_mode, validate_card


ROWS = {"instruction": [f"Say {i}." for i in range(30)], "output": [str(i) for i in range(30)]}
CARD = """---
license: apache-2.0
language: en
size_categories: n<1K
task_categories: [text-generation]
tags: [hf_reflect, recycled]
---
# A card

After arxiv.org/abs/2310.11716.
"""


class ClientError(Exception):
    """What a client raised: the names of its class and of that one's bases, and the HTTP status it tells of."""

    def __init__(self, kinds: list[str], status: int | None, message: str) -> None:
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds, self.status = kinds, status


class Client:
    """A process with the real clients in it, which calls functions of this module one after the other."""

    def __init__(self, env: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, __file__], env=env, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        print(json.dumps([function.__name__, arguments]), file=self.process.stdin, flush=True)
        said = self.process.stdout.readline()
        if not said:
            raise ClientError(["Died"], self.process.wait(), "the process is gone")
        answer = json.loads(said)
        if "kinds" in answer:
            raise ClientError(**answer)
        return answer["returned"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def serve() -> None:
    """What happens in such a process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    functions = importlib.import_module("test_hub_server")
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"returned": getattr(functions, name)(*arguments)}
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"kinds": kinds, "status": status, "message": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Client]]:
    folder = tmp_path_factory.mktemp("hub")
    with Hub(folder / "root") as hub:
        client = Client(hub.env(folder / "home"))
        yield hub, client
        client.close()


@pytest.fixture
def hub(everything) -> Hub:
    hub, _ = everything
    hub.faults.clear()
    hub.hooks.clear()
    hub.requests.clear()
    return hub


@pytest.fixture
def client(everything) -> Client:
    return everything[1]


def refused(client: Client, function: Callable[..., Any], *arguments: Any) -> ClientError:
    with pytest.raises(ClientError) as caught:
        client(function, *arguments)
    return caught.value


# What clients do: these run in their processes.


def api(token: str | bool | None = None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token)


def call(token: str | bool | None, method: str, arguments: dict[str, Any]) -> Any:
    """Any method of `HfApi`; of what it returns, its attributes."""
    returned = getattr(api(token), method)(**arguments)
    if isinstance(returned, (str, dict, type(None), bool)):
        return returned
    if hasattr(returned, "__dict__"):
        return json.loads(json.dumps(vars(returned), default=vars_or_text))
    return json.loads(json.dumps(list(returned), default=vars_or_text))


def vars_or_text(one: Any) -> Any:
    return vars(one) if hasattr(one, "__dict__") else str(one)


def commit(repo: str, files: dict[str, str], more: dict[str, Any], token: str | None = None) -> dict[str, Any]:
    """One commit; `data/...` is made of so many bytes as the text says, all else is text."""
    from huggingface_hub import CommitOperationAdd

    def content(path: str, text: str) -> bytes:
        return (text.encode() * int(text))[: int(text)] if path.startswith("data/") else text.encode()

    adds = [CommitOperationAdd(path, content(path, text)) for path, text in files.items()]
    made = api(token).create_commit(repo, adds, repo_type="dataset", **{"commit_message": "a commit", **more})
    return {"oid": made.oid, "url": made.commit_url, "pr": made.pr_revision, "pr_url": made.pr_url}


def push(repo: str, rows: dict[str, list[Any]], more: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset

    made = Dataset.from_dict(rows).push_to_hub(repo, **more)
    return {"oid": made.oid, "pr": made.pr_revision}


def push_dict(repo: str, splits: dict[str, dict[str, list[Any]]], more: dict[str, Any]) -> str:
    from datasets import Dataset, DatasetDict

    return DatasetDict({name: Dataset.from_dict(rows) for name, rows in splits.items()}).push_to_hub(repo, **more).oid


def load(repo: str, more: dict[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """All splits; row by row when streaming."""
    from datasets import load_dataset

    loaded = load_dataset(repo, **more)
    return {name: {key: [row[key] for row in split] for key in split.features} for name, split in loaded.items()}


def download(repo: str, path: str, more: dict[str, Any]) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repo, path, repo_type="dataset", **more)


def snapshot(repo: str, more: dict[str, Any]) -> dict[str, int]:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, repo_type="dataset", **more))
    return {str(at.relative_to(folder)): at.stat().st_size for at in folder.rglob("*") if at.is_file()}


# Pushing and loading.


def test_what_is_pushed_is_loaded_again(hub, client):
    client(push, "alice/whole", ROWS, {})
    assert client(load, "alice/whole", {}) == {"train": ROWS}
    assert client(load, "alice/whole", {"streaming": True}) == {"train": ROWS}
    assert [request.status for request in hub.seen("/storage/", "GET") if "range" in request.headers]
    assert not any(request.token for request in hub.requests if request.part == "storage")
    assert [path for path, entry in hub.repo("alice/whole").files().items() if entry["sha256"]] == [
        "data/train-00000-of-00001.parquet"
    ]


def test_a_second_config_and_splits(hub, client):
    first, second = {"a": [1, 2]}, {"train": {"b": ["x"]}, "test": {"b": ["y", "z"]}}
    client(push, "alice/configs", first, {})
    client(push_dict, "alice/configs", second, {"config_name": "second"})
    assert client(load, "alice/configs", {}) == {"train": first}
    assert client(load, "alice/configs", {"name": "second"}) == second
    assert client(load, "alice/configs", {"name": "second", "streaming": True}) == second


def test_each_revision_keeps_its_data(hub, client):
    old, new, other = ({"a": [text]} for text in ("old", "new", "other"))
    sha = client(push, "alice/revisions", old, {})["oid"]
    client(call, None, "create_tag", {"repo_id": "alice/revisions", "tag": "v1", "repo_type": "dataset"})
    client(push, "alice/revisions", new, {})
    client(push, "alice/revisions", other, {"revision": "drafts"})
    asked = client(push, "alice/revisions", other, {"create_pr": True})
    assert asked["pr"] == "refs/pr/1"
    for revision, expected in {sha: old, "v1": old, "main": new, "drafts": other, "refs/pr/1": other}.items():
        assert client(load, "alice/revisions", {"revision": revision}) == {"train": expected}, revision
    refs = client(
        call,
        None,
        "list_repo_refs",
        {"repo_id": "alice/revisions", "repo_type": "dataset", "include_pull_requests": 1},
    )
    names = {kind: [ref["name"] for ref in refs[kind]] for kind in ("branches", "tags", "pull_requests")}
    assert names == {"branches": ["main", "drafts"], "tags": ["v1"], "pull_requests": ["1"]}


def test_a_card_survives_the_push_of_data(hub, client):
    client(call, None, "create_repo", {"repo_id": "alice/carded", "repo_type": "dataset"})
    client(commit, "alice/carded", {"README.md": CARD}, {})
    client(push, "alice/carded", {"a": [1]}, {})
    info = client(call, None, "dataset_info", {"repo_id": "alice/carded"})
    assert {"recycled", "license:apache-2.0", "language:en", "arxiv:2310.11716"} <= set(info["tags"])
    assert info["card_data"]["size_categories"] == "n<1K"
    assert "# A card" in hub.repo("alice/carded").card()
    assert "dataset_info" in info["card_data"]


# Commits.


def test_a_commit_of_big_data_and_card(hub, client):
    hub.create("alice/atomic")
    made = client(commit, "alice/atomic", {"data/train.parquet": "3000000", "README.md": CARD, "a/b/c.txt": "c"}, {})
    asked, sent = hub.seen("/commit/")[0], {"repo_id": "alice/atomic", "repo_type": "dataset"}
    assert sorted(asked.operations) == ["file README.md", "file a/b/c.txt", "lfsFile data/train.parquet"]
    assert len(hub.repo("alice/atomic").read("data/train.parquet")) == 3_000_000
    paths = client(
        call, None, "get_paths_info", {**sent, "paths": ["data/train.parquet", "a", "none"], "expand": True}
    )
    assert [(path["path"], path["last_commit"]["oid"]) for path in paths] == [
        ("data/train.parquet", made["oid"]),
        ("a", made["oid"]),
    ]
    assert paths[0]["lfs"]["sha256"] == hub.uploads[0]
    assert (paths[0]["lfs"]["size"], paths[0]["size"]) == (3_000_000, 3_000_000)
    tree = client(call, None, "list_repo_tree", {**sent})
    assert [one["path"] for one in tree] == [".gitattributes", "README.md", "a", "data"]
    tree = client(call, None, "list_repo_tree", {**sent, "path_in_repo": "a", "recursive": True})
    assert [one["path"] for one in tree] == ["a/b", "a/b/c.txt"]
    history = client(call, None, "list_repo_commits", sent)
    assert [(one["title"], one["authors"]) for one in history] == [
        ("a commit", ["alice"]),
        ("initial commit", ["alice"]),
    ]


def test_a_commit_on_an_old_parent_is_refused(hub, client):
    old = hub.create("alice/raced").sha()
    client(commit, "alice/raced", {"a.txt": "1"}, {"parent_commit": old})
    error = refused(client, commit, "alice/raced", {"a.txt": "2"}, {"parent_commit": old})
    assert (error.kinds[0], error.status) == ("HfHubHTTPError", 412)
    assert "A commit has happened since" in str(error)
    assert hub.repo("alice/raced").read("a.txt") == b"1"


def test_nothing_is_uploaded_twice(hub, client):
    hub.create("alice/thrifty")
    client(commit, "alice/thrifty", {"data/a.parquet": "100000"}, {})
    client(commit, "alice/thrifty", {"data/b.parquet": "100000"}, {})
    assert len(hub.uploads) == 1
    client(push, "alice/thrifty", ROWS, {"config_name": "rows"})
    commits = len(hub.seen("/commit/"))
    client(push, "alice/thrifty", ROWS, {"config_name": "rows"})
    assert len(hub.uploads) == len(set(hub.uploads)) == 2
    assert len(hub.seen("/commit/")) == commits


def test_clients_send_no_commit_without_changes_but_the_hub_would_make_it(hub, client):
    head = client(commit, hub.create("alice/same").id, {"a.txt": "same", "data/a.bin": "3"}, {})["oid"]
    assert client(commit, "alice/same", {"a.txt": "same", "data/a.bin": "3"}, {})["oid"] == head
    assert len(hub.seen("/commit/")) == 1
    made = speak(hub, "/api/datasets/alice/same/commit/main", [{"key": "header", "value": {"summary": "nothing"}}])
    assert hub.repo("alice/same").sha() == made["commitOid"] != head
    assert hub.repo("alice/same").files() == hub.repo("alice/same").files(head)


def speak(hub: Hub, path: str, lines: list[Any]) -> Any:
    """A POST of NDJSON by hand."""
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    headers = {"Authorization": "Bearer hf_alice", "Content-Type": "application/x-ndjson"}
    with urllib.request.urlopen(urllib.request.Request(hub.url + path, body, headers), timeout=10) as answer:
        return json.load(answer)


def test_files_and_folders_are_deleted(hub, client):
    hub.create("alice/pruned").commit({"a.txt": b"a", "b/c.txt": b"c", "b/d.txt": b"d"})
    asked = {"repo_id": "alice/pruned", "repo_type": "dataset"}
    client(call, None, "delete_file", {**asked, "path_in_repo": "a.txt"})
    client(call, None, "delete_folder", {**asked, "path_in_repo": "b"})
    assert list(hub.repo("alice/pruned").files()) == [".gitattributes"]
    assert "EntryNotFoundError" in refused(client, call, None, "delete_file", {**asked, "path_in_repo": "x"}).kinds
    client(call, None, "delete_repo", asked)
    assert "RepositoryNotFoundError" in refused(client, call, None, "dataset_info", {"repo_id": "alice/pruned"}).kinds


@pytest.mark.parametrize(
    ("yaml", "complaint"),
    [
        ("license: apache2", '"license" must be one of'),
        ("license: [mit, nonsense]", '"license[1]" must be one of'),
        ("size_categories: 1K-10K", '"size_categories" must be one of'),
        ("task_categories: [text-generation, chatting]", '"task_categories[1]" must be one of'),
        ("tags: recycled", '"tags" must be an array'),
        ("- a\n- list", "must be a mapping"),
        ("a: b: c", "could not be parsed"),
    ],
)
def test_a_bad_card_is_refused_before_anything_is_uploaded(hub, client, yaml, complaint):
    if not hub.exists("alice/badly"):
        hub.create("alice/badly")
    error = refused(client, commit, "alice/badly", {"README.md": f"---\n{yaml}\n---\n", "data/a.bin": "9"}, {})
    assert error.kinds[0] == "ValueError"
    assert complaint in str(error)
    assert not hub.seen("/preupload/")


def test_a_card_without_metadata_is_only_warned_about():
    assert validate_card("# No YAML") == ([], ["empty or missing yaml metadata in repo card"])
    assert validate_card(CARD) == ([], [])
    assert "tag" in tags_of("---\ntags: tag\n---")


@pytest.mark.parametrize(
    ("path", "sample", "size", "mode"),
    [
        ("data/x.parquet", b"PAR1", 4, "lfs"),
        ("x.jsonl", b"{}", 2, "regular"),
        ("x.jsonl", b"{}", 20 << 20, "lfs"),
        ("x.txt", "é".encode()[:1], 1, "regular"),  # the sample may end amid a character
        ("x.txt", b"\xff\xfe", 2, "lfs"),
        ("x.txt", b"a\0b", 3, "lfs"),
    ],
)
def test_what_belongs_into_lfs(path, sample, size, mode):
    assert upload_mode(path, sample, size) == mode


# Users and rights.


def test_tokens_stand_for_users(hub, client):
    assert client(call, None, "whoami", {})["name"] == "alice"
    assert client(call, "hf_bob", "whoami", {})["name"] == "bob"
    assert client(call, "hf_reader", "whoami", {})["auth"]["accessToken"]["role"] == "read"
    assert [each["name"] for each in client(call, None, "whoami", {})["orgs"]] == ["acme"]
    assert refused(client, call, "hf_nobody", "whoami", {}).status == 401


def test_nobody_else_writes(hub, client):
    hub.create("alice/mine")
    for token, status in (("hf_bob", 403), ("hf_reader", 403), ("hf_nobody", 401)):
        assert refused(client, commit, "alice/mine", {"a.txt": "a"}, {}, token).status == status
        made = {"repo_id": "alice/new", "repo_type": "dataset"}
        assert refused(client, call, token, "create_repo", made).status == status
    assert not hub.exists("alice/new")
    client(push, "acme/ours", {"a": [1]}, {})
    assert hub.exists("acme/ours")
    assert refused(client, push, "bob/theirs", {"a": [1]}, {}).status == 403


def test_who_may_not_write_asks(hub, client):
    hub.create("alice/asked").commit({"a.txt": b"a"})
    asked = client(commit, "alice/asked", {"b.txt": "b", "data/b.bin": "5"}, {"create_pr": True}, "hf_bob")
    assert asked["pr"] == "refs/pr/1"
    client(commit, "alice/asked", {"c.txt": "c"}, {"revision": "refs/pr/1"}, "hf_bob")
    assert list(hub.repo("alice/asked").files()) == [".gitattributes", "a.txt"]
    pull = {"repo_id": "alice/asked", "repo_type": "dataset", "discussion_num": 1}
    assert client(call, None, "get_discussion_details", pull)["status"] == "open"
    assert refused(client, call, "hf_bob", "merge_pull_request", pull).status == 403
    client(call, None, "merge_pull_request", pull)
    assert list(hub.repo("alice/asked").files()) == [".gitattributes", "a.txt", "b.txt", "c.txt", "data/b.bin"]
    assert client(call, None, "get_discussion_details", pull)["status"] == "merged"


def test_what_is_private_is_not_there_for_others(hub, client):
    client(push, "alice/secret", {"a": [1]}, {"private": True})
    asked = {"repo_id": "alice/secret"}
    assert client(call, None, "dataset_info", asked)["private"]
    for token in ("hf_bob", False):
        assert "RepositoryNotFoundError" in refused(client, call, token, "dataset_info", asked).kinds
        assert "RepositoryNotFoundError" in refused(client, download, "alice/secret", "x", {"token": token}).kinds
        assert client(call, token, "list_datasets", {"search": "secret"}) == []
    assert client(call, "hf_reader", "dataset_info", asked)["private"]


def test_errors_say_what_is_missing(hub, client):
    hub.create("alice/partly")
    missing = refused(client, download, "alice/partly", "none.txt", {})
    assert "EntryNotFoundError" in missing.kinds
    assert "RevisionNotFoundError" in refused(client, download, "alice/partly", "a", {"revision": "v9"}).kinds
    assert "RepositoryNotFoundError" in refused(client, download, "alice/none", "a", {}).kinds
    hub.repo("alice/partly").update(gated="auto")
    gated = refused(client, download, "alice/partly", ".gitattributes", {"token": "hf_bob"})
    assert (gated.kinds[0], gated.status) == ("GatedRepoError", 403)
    again = {"repo_id": "alice/partly", "repo_type": "dataset"}
    assert refused(client, call, None, "create_repo", again).status == 409
    assert client(call, None, "create_repo", {**again, "exist_ok": True}).endswith("/datasets/alice/partly")
    branch = {**again, "branch": "b"}
    client(call, None, "create_branch", branch)
    assert refused(client, call, None, "create_branch", branch).status == 409
    client(call, None, "delete_branch", branch)
    assert "RevisionNotFoundError" in refused(client, call, None, "delete_branch", branch).kinds


def test_datasets_are_found_by_author_and_by_tag(hub, client):
    for name in ("bob/found-1", "bob/found-2"):
        hub.create(name).commit({"README.md": CARD.replace("recycled", f"from-{name[-1]}").encode()})

    def found(**asked: Any) -> list[str]:
        return sorted(one["id"] for one in client(call, None, "list_datasets", asked))

    assert found(author="bob") == ["bob/found-1", "bob/found-2"]
    assert found(filter="from-2") == ["bob/found-2"]
    assert found(author="bob", filter=["from-1", "license:apache-2.0"]) == ["bob/found-1"]
    assert found(author="bob", filter=["from-1", "license:mit"]) == []
    assert found(search="FOUND-1") == ["bob/found-1"]
    assert len(found(author="bob", limit=1)) == 1


def test_files_are_downloaded(hub, client):
    hub.create("alice/files").commit({"data/a.bin": bytes(range(256)) * 400, "b c/é.txt": "é".encode()})
    assert Path(client(download, "alice/files", "b c/é.txt", {})).read_text() == "é"
    assert Path(client(download, "alice/files", "data/a.bin", {})).read_bytes() == bytes(range(256)) * 400
    sizes = client(snapshot, "alice/files", {})
    assert (sizes["data/a.bin"], sizes["b c/é.txt"]) == (102_400, 2)
    assert not any(request.token for request in hub.requests if request.part == "storage")


def test_models_have_their_own_places(hub, client):
    made = {"path_or_fileobj": __file__, "path_in_repo": "model.safetensors", "repo_id": "alice/student"}
    client(call, None, "create_repo", {"repo_id": "alice/student"})
    client(call, None, "upload_file", made)
    got = client(call, None, "hf_hub_download", {"repo_id": "alice/student", "filename": "model.safetensors"})
    assert Path(got).read_text() == Path(__file__).read_text()
    assert [one["id"] for one in client(call, None, "list_models", {"author": "alice"})] == ["alice/student"]
    assert not hub.exists("alice/student")


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        ("bytes=0-3", 206, "0123"),
        ("bytes=8-", 206, "89"),
        ("bytes=-3", 206, "789"),
        ("bytes=5-99", 206, "56789"),
        ("bytes=10-12", 416, ""),
        ("", 200, "0123456789"),
    ],
)
def test_ranges(hub, asked, status, expected):
    if not hub.exists("alice/ranges"):
        hub.create("alice/ranges").commit({"digits.txt": b"0123456789"})
    url = f"{hub.url}/datasets/alice/ranges/resolve/main/digits.txt"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": asked}), timeout=10)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        assert (answer.status, answer.read().decode()) == (status, expected)


# What goes wrong on order.


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 413, 429, 500, 502, 503])
def test_a_refused_commit_is_not_tried_again(hub, client, status):
    repo = hub.repo("alice/refused") if hub.exists("alice/refused") else hub.create("alice/refused")
    hub.faults.append(Fault("/commit/", "POST", status=status, message="no luck today"))
    head = repo.sha()
    error = refused(client, commit, "alice/refused", {"a.txt": str(status)}, {})
    assert "HfHubHTTPError" in error.kinds
    assert (error.status, "no luck today" in str(error)) == (status, True)
    assert [request.status for request in hub.seen("/commit/")] == [status]
    assert repo.sha() == head


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("RepoNotFound", "RepositoryNotFoundError"),
        ("RevisionNotFound", "RevisionNotFoundError"),
        ("EntryNotFound", "EntryNotFoundError"),
        ("GatedRepo", "GatedRepoError"),
    ],
)
def test_error_codes_become_exceptions(hub, client, code, kind):
    hub.faults.append(Fault("/api/datasets/", "GET", status=404, headers={"X-Error-Code": code}))
    assert kind in refused(client, call, None, "dataset_info", {"repo_id": "alice/x"}).kinds


def test_clients_try_an_upload_again(hub, client):
    hub.create("alice/retried")
    hub.faults.append(Fault("/storage/", "PUT", status=503))
    client(commit, "alice/retried", {"data/a.bin": "5"}, {})
    assert [request.status for request in hub.seen("/storage/")] == [503, 200]


def test_a_reset_in_the_middle_of_an_upload(hub, client):
    repo = hub.create("alice/reset")
    hub.faults.append(Fault("/storage/", "PUT", cut="middle"))
    client(commit, "alice/reset", {"data/a.bin": "3000000"}, {})
    cut, whole = hub.seen("/storage/", "PUT")
    assert (cut.cut, cut.status, cut.length) == ("middle", None, 1_500_000)
    assert (whole.cut, whole.status, whole.length) == (None, 200, 3_000_000)
    assert len(hub.uploads) == 1
    assert len(repo.read("data/a.bin")) == 3_000_000


def test_a_reset_in_the_middle_of_a_download(hub, client):
    content = os.urandom(100_000)
    hub.create("alice/broken").commit({"data/a.bin": content})
    hub.faults.append(Fault("/storage/", "GET", cut="middle"))
    error = refused(client, download, "alice/broken", "data/a.bin", {})
    assert {"NetworkError", "RequestException"} & set(error.kinds)  # httpx2, requests
    assert Path(client(download, "alice/broken", "data/a.bin", {})).read_bytes() == content
    assert [(request.status, request.cut) for request in hub.seen("/storage/")] == [(None, "middle"), (200, None)]


@pytest.mark.parametrize("done", [False, True])
def test_a_connection_lost_at_the_commit(hub, client, done):
    repo = hub.create(f"alice/lost-{done}")
    hub.faults.append(Fault("/commit/", "POST", cut="before", done=done))
    error = refused(client, commit, repo.id, {"a.txt": "a"}, {})
    assert {"TransportError", "RequestException"} & set(error.kinds)  # httpx2, requests
    assert error.status is None
    assert ("a.txt" in repo.files()) == done
    assert [(request.status, request.cut) for request in hub.seen("/commit/")] == [(None, "before")]


def test_faults_count_what_they_fit(hub, client):
    hub.create("alice/counted")
    hub.faults += [Fault("/commit/", "POST", status=500, skip=1, times=2), Fault("/commit/", "GET", status=418)]

    def committed(text: str) -> int:
        try:
            client(commit, "alice/counted", {"a.txt": text}, {})
        except ClientError as error:
            return error.status
        return 200

    assert [committed(text) for text in "1234"] == [200, 500, 500, 200]
    hub.faults.append(Fault("/commit/", delay=0.3))
    begun = time.monotonic()
    assert committed("5") == 200
    assert time.monotonic() - begun > 0.3


# Hooks.


def test_a_commit_sneaks_in(hub, client):
    client(push, "alice/sneaked", {"a": [1]}, {})
    repo, uploads = hub.repo("alice/sneaked"), len(hub.uploads)
    hub.before("/commit/", lambda request: repo.commit({"NOTES.md": b"sneaked in"}, author="bob"))
    assert refused(client, push, "alice/sneaked", {"a": [2]}, {}).status == 412
    client(push, "alice/sneaked", {"a": [2]}, {})
    assert client(load, "alice/sneaked", {}) == {"train": {"a": [2]}}
    assert repo.read("NOTES.md") == b"sneaked in"
    assert len(hub.uploads) == uploads + 1


def test_a_client_is_killed_between_upload_and_commit(hub, client, tmp_path):
    repo, victim = hub.create("alice/killed"), Client(hub.env(tmp_path))

    def kill(request: Request) -> Answer:
        assert request.operations == ["lfsFile data/a.bin"]
        victim.process.send_signal(signal.SIGKILL)
        return DROPPED

    hub.before("/commit/", kill)
    assert refused(victim, commit, "alice/killed", {"data/a.bin": "2000"}, {}).status == -signal.SIGKILL
    victim.close()
    assert (list(repo.files()), len(hub.uploads)) == ([".gitattributes"], 1)
    client(commit, "alice/killed", {"data/a.bin": "2000"}, {})
    assert (len(repo.read("data/a.bin")), len(hub.uploads)) == (2000, 1)


def test_a_hook_may_come_after_the_deed_and_may_answer(hub, client):
    repo, seen = hub.create("alice/answered"), []
    hub.after("/commit/", lambda request: seen.append("a.txt" in repo.files()))
    client(commit, "alice/answered", {"a.txt": "a"}, {})
    assert seen == [True]
    hub.before("/commit/", lambda request: Answer(409, {"error": "by hand"}))
    assert "by hand" in str(refused(client, commit, "alice/answered", {"a.txt": "b"}, {}))
    assert repo.read("a.txt") == b"a"


# The server as a process of its own.


def spawn(folder: Path, *more: str) -> tuple[subprocess.Popen, str]:
    port, server = folder / "port", Path(__file__).with_name("hub_server.py")
    port.unlink(missing_ok=True)
    options = ["--port-file", port, "--root", folder / "root", "--log", folder / "log", *more]
    process = subprocess.Popen([sys.executable, server, *map(str, options)])
    while not port.exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process, f"http://127.0.0.1:{port.read_text()}"


def told(url: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return json.load(answer)


def test_a_server_that_is_killed_has_lost_nothing(tmp_path):
    process, url = spawn(tmp_path)
    client, repo = Client(client_env(url, tmp_path / "home")), {"repo_id": "alice/lasting", "repo_type": "dataset"}
    try:
        client(call, None, "create_repo", repo)
        told(url, "/_fault", {"path_contains": "/commit/", "status": 503})
        assert refused(client, commit, "alice/lasting", {"data/a.bin": "9"}, {}).status == 503
        client(commit, "alice/lasting", {"data/a.bin": "9"}, {})
        log = told(url, "/_log")
        assert len(log["uploads"]) == 1
        assert [each["status"] for each in log["requests"] if "/commit/" in each["path"]] == [503, 200]
        process.kill()
        process.wait()
        process, again = spawn(tmp_path, "--port", url.rpartition(":")[2])
        assert again == url
        assert "data/a.bin" in client(call, None, "list_repo_files", repo)
    finally:
        client.close()
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["status"] for line in lines if "/commit/" in line["path"]] == [None, 503, None, 200]
    assert "hf_alice" not in (tmp_path / "log").read_text()


if __name__ == "__main__":
    serve()
