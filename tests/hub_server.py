"""A loopback Hugging Face Hub, which the unmodified clients `huggingface_hub` and `datasets` push to and load from.

In a test:

    with Hub(tmp_path / "hub") as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.env(tmp_path / "home", "hf_alice"))
        hub.repo("alice/recycled").read("README.md")
        hub.uploads  # the sha256 of every LFS object that was sent

As a process of its own:

    python hub_server.py --port-file PORT --root DIR --log LOG

Users are `alice` (token `hf_alice`, and `hf_reader`, which may not write) and `bob` (`hf_bob`); alice also writes to
the organization `acme`. All state lies below `--root` as JSON and plain files, so it survives a `kill -9` of the
server and can be inspected. LFS objects are kept at a second port, like the real storage: a client that sends its
token there is refused.

What goes wrong on order:

    hub.faults.append(Fault("/commit/", "POST", status=503))              # the next commit is refused
    hub.faults.append(Fault("/commit/", "POST", cut="before", done=True)) # it is made, but the answer is lost
    hub.faults.append(Fault("/storage/", "PUT", cut="middle"))            # a reset in the middle of an upload
    hub.before("/commit/", lambda request: hub.repo("alice/x").commit({"README.md": b"sneaked in"}))

or, with a process, `POST /_fault` with the same fields, `DELETE /_fault`, `GET /_log`, `DELETE /_log`.

Xet is not spoken: clients need `HF_HUB_DISABLE_XET=1`. PyYAML is the only import from outside the standard library.
"""

import argparse
import base64
import codecs
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml


@dataclass(frozen=True)
class User:
    """Whom a token stands for."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.name, *self.organizations)


TOKENS = {
    "hf_alice": User("alice", organizations=("acme",)),
    "hf_reader": User("alice", "read", ("acme",)),
    "hf_bob": User("bob"),
}

LFS_LIMIT = 10 << 20
"""Text above this size in bytes is not kept in git either."""

LFS_SUFFIXES = tuple(".parquet .arrow .safetensors .bin .gz .zst .zip .sqlite3 .gguf .npy .npz .pt".split())  # noqa: SIM905

_LOCK = threading.RLock()  # held while the state on disk is read or changed


# What comes and goes.


@dataclass
class Request:
    """One HTTP request, as it arrived.

    Attributes:
        number: Counted from 1.
        at: When it came, in seconds since the epoch.
        path: Decoded, without the query.
        raw_path: As it was sent.
        headers: By lower-case name.
        part: `hub`, or `storage` for the port where LFS objects are kept.
        body: What the JSON, the NDJSON (a list) or the form (by name, lists) said; raw bytes of anything else.
        length: How many bytes of body came.
        status: What was answered; null as long as nothing has been.
        cut: Where the connection was reset, if it was; `client` if the client went away amid its body.
    """

    number: int
    at: float
    method: str
    path: str
    raw_path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    part: str = "hub"
    body: Any = None
    length: int = 0
    status: int | None = None
    cut: str | None = None

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    @property
    def user(self) -> User | None:
        return TOKENS.get(self.token or "")

    @property
    def operations(self) -> list[str]:
        """What a commit asked for, such as `lfsFile data/train.parquet`."""
        if "/commit/" not in self.path or not isinstance(self.body, list):
            return []
        return [f"{line['key']} {line['value']['path']}" for line in self.body if line["key"] != "header"]

    @property
    def target(self) -> str:
        """The path with its query, decoded: what faults and hooks are looked for in."""
        query = "&".join(f"{name}={value}" for name, values in self.query.items() for value in values)
        return f"{self.path}?{query}" if query else self.path

    def told(self) -> dict[str, Any]:
        """For the log; without the token."""
        return {
            **{name: getattr(self, name) for name in ("number", "at", "part", "method", "path", "query", "length")},
            "user": self.user and self.user.name,
            "authorized": self.token is not None,
            "user_agent": self.headers.get("user-agent"),
            "operations": self.operations,
            "status": self.status,
            "cut": self.cut,
        }


@dataclass(frozen=True)
class Answer:
    """What goes back; a body that is neither bytes nor text becomes JSON. A cut resets the connection instead."""

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: str | None = None

    @property
    def payload(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body, default=str)).encode()


DROPPED = Answer(cut="before")
"""What a hook returns for the request to be dropped: nothing is done, and the connection is reset."""


class Refused(Exception):
    """An error in the Hub's layout; `code` is one of its `X-Error-Code`s."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer = Answer(status, {"error": message, **more}, headers)


@dataclass
class _Trigger:
    """Something that happens when certain requests arrive.

    Attributes:
        path_contains: A part of the decoded path with its query.
        method: Only this one; null for all.
        times: To how many requests it happens; null for all.
        skip: How many it spares first.
    """

    path_contains: str = ""
    method: str | None = None
    times: int | None = field(default=1, kw_only=True)
    skip: int = field(default=0, kw_only=True)

    def strikes(self, request: Request) -> bool:
        """Whether it happens to this request; that counts."""
        if self.times == 0 or self.method not in (None, request.method) or self.path_contains not in request.target:
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class Fault(_Trigger):
    """Something that goes wrong.

    Attributes:
        status: What is answered.
        message: What the answer says under `error`.
        headers: Of the answer, such as `Retry-After` or `X-Error-Code`.
        cut: The connection is reset: `before` anything of the body is read, or in the `middle` of the request's body;
            for a request without a body, in the middle of the answer's.
        done: The request is carried out all the same; then the answer is replaced by `status`, or lost by `cut`.
        delay: Seconds until the request is carried out, or if it is `done`, until the answer; alone, it is only late.
    """

    status: int | None = field(default=None, kw_only=True)
    message: str = field(default="on order", kw_only=True)
    headers: dict[str, str] = field(default_factory=dict, kw_only=True)
    cut: str | None = field(default=None, kw_only=True)
    done: bool = field(default=False, kw_only=True)
    delay: float = field(default=0.0, kw_only=True)

    @property
    def answer(self) -> Answer | None:
        if self.status is None:
            return Answer(cut=self.cut) if self.cut else None
        return Answer(self.status, {"error": self.message}, self.headers, self.cut)


@dataclass
class Hook(_Trigger):
    """A callback for certain requests, `before` they are carried out or after that (but before the answer is sent).

    An answer that it returns is sent in place of the usual one; if it came before, nothing is carried out.
    """

    call: Callable[[Request], Answer | Any] = field(default=lambda request: None, kw_only=True)
    after: bool = field(default=False, kw_only=True)


# Repositories.


@dataclass(frozen=True)
class Repo:
    """A repository: `repo.json` with its references, and below it `commits` and `objects`.

    Attributes:
        kind: `datasets` or `models`.
        id: With its namespace.
    """

    folder: Path
    kind: str
    id: str

    @classmethod
    def create(cls, folder: Path, kind: str, id: str, *, author: str, private: bool = False) -> "Repo":
        repo = cls(folder, kind, id)
        for part in ("commits", "objects"):
            (folder / part).mkdir(parents=True)
        repo._save({"private": private, "gated": False, "created": _now(), "refs": {}, "pulls": []})
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.commit({".gitattributes": attributes.encode()}, title="initial commit", author=author)
        return repo

    @property
    def state(self) -> dict[str, Any]:
        """What `repo.json` says: private, gated, created, refs, pulls."""
        with _LOCK:
            return json.loads((self.folder / "repo.json").read_text())

    @property
    def refs(self) -> dict[str, str]:
        """The commit of each `refs/heads/...`, `refs/tags/...` and `refs/pr/...`."""
        return self.state["refs"]

    def update(self, **changes: Any) -> None:
        with _LOCK:
            self._save({**self.state, **changes})

    def sha(self, revision: str = "main") -> str:
        """The commit that a branch, a tag, a reference, or the beginning of a commit's name stands for."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in (refs := self.refs):
                return refs[name]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = list((self.folder / "commits").glob(f"{revision}*.json"))
            if len(found) == 1:
                return found[0].stem
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def head(self, revision: str = "main") -> dict[str, Any]:
        """A commit: id, parents, title, message, author, date, and by path its files' oid, size and sha256 (LFS)."""
        return json.loads((self.folder / "commits" / f"{self.sha(revision)}.json").read_text())

    def history(self, revision: str = "main") -> list[dict[str, Any]]:
        """Commits, the latest first."""
        found = [self.head(revision)]
        while found[-1]["parents"]:
            found.append(self.head(found[-1]["parents"][0]))
        return found

    def files(self, revision: str = "main") -> dict[str, dict[str, Any]]:
        """By path: oid, size, and sha256 of what is in LFS."""
        return self.head(revision)["files"]

    def read(self, path: str, revision: str = "main") -> bytes:
        """The content of a file."""
        return self.object_of(self.files(revision)[path]).read_bytes()

    def object_of(self, entry: Mapping[str, Any]) -> Path:
        return self.object_at(entry["sha256"] or entry["oid"])

    def object_at(self, oid: str) -> Path:
        return self.folder / "objects" / oid

    def store(self, path: str, content: bytes) -> dict[str, Any]:
        """Keeps a file's content as a client would have uploaded it; returns its entry."""
        sha256 = (
            hashlib.sha256(content).hexdigest() if upload_mode(path, content[:512], len(content)) == "lfs" else None
        )
        entry = _entry(len(content), sha256=sha256, content=content)
        self.object_of(entry).write_bytes(content)
        return entry

    def commit(
        self,
        changes: Mapping[str, bytes | None],
        *,
        title: str = "a commit",
        message: str = "",
        author: str = "alice",
        revision: str = "main",
    ) -> str:
        """Writes (or, with null, deletes) files in one commit, whose name is returned."""
        with _LOCK:
            files = self.files(revision) if self.refs else {}
            written = {path: self.store(path, content) for path, content in changes.items() if content is not None}
            files = {path: entry for path, entry in {**files, **written}.items() if changes.get(path, b"") is not None}
            name = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            parent = self.refs.get(name)
            return self.add_commit(files, name, parent, title=title, message=message, author=author)

    def add_commit(
        self, files: Mapping[str, Any], name: str, parent: str | None, *, title: str, message: str, author: str
    ) -> str:
        """Has a reference point to a new commit of these files."""
        with _LOCK:
            parents = [parent] if parent else []
            body = {"parents": parents, "title": title, "message": message, "author": author, "date": _now()}
            body["files"] = dict(sorted(files.items()))
            sha = hashlib.sha1(json.dumps([self.id, name, body]).encode()).hexdigest()
            _write_json(self.folder / "commits" / f"{sha}.json", {"id": sha, **body})
            self.update(refs={**self.refs, name: sha})
            return sha

    def card(self, revision: str = "main") -> str:
        """The text of README.md; empty without one."""
        return self.read("README.md", revision).decode() if "README.md" in self.files(revision) else ""

    def _save(self, state: Mapping[str, Any]) -> None:
        _write_json(self.folder / "repo.json", state)


def upload_mode(path: str, sample: bytes, size: int) -> str:
    """Where a file belongs: `lfs` if it is binary or big, `regular` (into git) if it is text."""
    if path.endswith(LFS_SUFFIXES) or size > LFS_LIMIT or b"\0" in sample:
        return "lfs"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # whose last character may have been cut off
    except UnicodeDecodeError:
        return "lfs"
    return "regular"


def _entry(size: int, *, sha256: str | None = None, content: bytes = b"") -> dict[str, Any]:
    blob = _pointer(sha256, size) if sha256 else content
    oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()  # as git does
    return {"oid": oid, "size": size, "sha256": sha256}


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _write_json(path: Path, what: Any) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(what, indent=1))
    os.replace(unfinished, path)


# Cards.

LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
""".split()  # noqa: SIM905

TASKS = """
    text-classification token-classification table-question-answering question-answering zero-shot-classification
    translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech
    text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
    voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
    image-to-text image-to-image image-to-video unconditional-image-generation video-classification
    reinforcement-learning robotics tabular-classification tabular-regression tabular-to-text table-to-text
    multiple-choice text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text
    visual-question-answering document-question-answering zero-shot-image-classification graph-ml mask-generation
    zero-shot-object-detection text-to-3d image-to-3d image-feature-extraction video-text-to-text keypoint-detection
    visual-document-retrieval any-to-any other
""".split()  # noqa: SIM905

_CREATORS = ["found", "crowdsourced", "expert-generated", "machine-generated", "other"]

ALLOWED = {
    "license": LICENSES,
    "task_categories": TASKS,
    "size_categories": (
        "n<1K 1K<n<10K 10K<n<100K 100K<n<1M 1M<n<10M 10M<n<100M 100M<n<1B 1B<n<10B 10B<n<100B 100B<n<1T n>1T".split()  # noqa: SIM905
    ),
    "annotations_creators": [*_CREATORS, "no-annotation"],
    "language_creators": _CREATORS,
    "multilinguality": ["monolingual", "multilingual", "translation", "other"],
}
"""What stands in a dataset's card under these keys, one or a list."""

_TAGGED = (*ALLOWED, "task_ids", "language", "source_datasets")


def front_matter(card: str) -> str | None:
    """The YAML of a card, or null."""
    found = re.match(r"\s*---[\r\n]+(.*?)[\r\n]*^---\s*$", card, re.DOTALL | re.MULTILINE)
    return found[1] if found else None


def validate_card(card: str, kind: str = "dataset") -> tuple[list[str], list[str]]:
    """The errors and warnings that `/api/validate-yaml` finds in a card."""
    text = front_matter(card)
    if text is None or not text.strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"YAML could not be parsed: {' '.join(str(error).split())}"], []
    if not isinstance(data, dict):
        return ["YAML metadata must be a mapping"], []
    return _invalid_values(data, ALLOWED if kind == "dataset" else {"license": LICENSES}), []


def _invalid_values(data: Mapping[str, Any], allowed: Mapping[str, list[str]]) -> list[str]:
    errors = [f'"{key}" must be an array' for key in ("tags", "configs") if not isinstance(data.get(key, []), list)]
    for key, values in allowed.items():
        one = key == "license"
        for i, value in enumerate(_listed(data.get(key))):
            if value not in values:
                place = f"{key}[{i}]" if isinstance(data[key], list) else key
                errors.append(f'"{place}" must be one of [{", ".join(values)}{", array" if one else ""}]')
    for i, value in enumerate(_listed(data.get("language"))):
        if not isinstance(value, str):
            errors.append(f'"language[{i}]" must be a string')
    return errors


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def card_data(card: str) -> dict[str, Any]:
    """What a card's YAML says."""
    try:
        data = yaml.safe_load(front_matter(card) or "")
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def tags_of(card: str) -> list[str]:
    """The tags that a repository is found by."""
    data = card_data(card)
    tags = [f"{key}:{value}" for key in _TAGGED for value in _listed(data.get(key))]
    tags += [str(tag) for tag in _listed(data.get("tags"))]
    tags += [f"arxiv:{paper}" for paper in re.findall(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})", card)]
    return list(dict.fromkeys([*tags, "region:us"]))


# The server.

_REVISION = r"(?P<revision>refs(?:/|%2F)(?:pr|convert|heads)(?:/|%2F)[^/]+|[^/]+)"
_API = r"/api/(?P<kind>datasets|models)/(?P<id>[^/]+/[^/]+)"
_WEB = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"

_ROUTES: list[tuple[str, re.Pattern[str], str]] = []


def _route(method: str, pattern: str) -> Callable[[Any], Any]:
    def add(handler: Any) -> Any:
        _ROUTES.append((method, re.compile(pattern), handler.__name__))
        return handler

    return add


def client_env(url: str, home: Path, token: str | None = "hf_alice") -> dict[str, str]:
    """The environment of a client process: the Hub at a URL, a user (null for nobody), caches of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "*", **dict.fromkeys(switches, "1")}
    return {**kept, **settings, **({"HF_TOKEN": token} if token else {})}


class Hub:
    """The server. It runs in threads of its own, on free ports of 127.0.0.1.

    Attributes:
        root: Where all state lies.
        requests: Everything received so far, the request that is being answered included.
        faults: What goes wrong from now on; the first that fits a request happens to it.
        hooks: What is called from now on; see also `before` and `after`.
    """

    def __init__(self, root: Path, *, port: int = 0, log: Path | None = None) -> None:
        self.root, self.log = Path(root), log
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.hooks: list[Hook] = []
        self.numbers = itertools.count(1)
        self.root.mkdir(parents=True, exist_ok=True)
        self._parts = [_Server(self, "hub", port), _Server(self, "storage")]

    @property
    def port(self) -> int:
        return self._parts[0].server_address[1]

    @property
    def url(self) -> str:
        """The endpoint that a client is given."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_url(self) -> str:
        """Where LFS objects are kept."""
        return f"http://127.0.0.1:{self._parts[1].server_address[1]}/storage"

    def __enter__(self) -> "Hub":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> "Hub":
        for part in self._parts:
            threading.Thread(target=part.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Closes the ports and every connection."""
        for part in self._parts:
            part.shutdown()
            part.close_all()
            part.server_close()

    # For tests.

    def env(self, home: Path, token: str | None = "hf_alice") -> dict[str, str]:
        """The environment of a client process: this Hub, that user, and caches of its own below `home`."""
        return client_env(self.url, home, token)

    def repo(self, id: str, kind: str = "datasets") -> Repo:
        """A repository, to be looked at or changed behind the clients' backs."""
        if (folder := self.root / kind / id).joinpath("repo.json").exists():
            return Repo(folder, kind, id)
        raise KeyError(f"there is no {kind}/{id}")

    def exists(self, id: str, kind: str = "datasets") -> bool:
        return (self.root / kind / id / "repo.json").exists()

    def create(self, id: str, kind: str = "datasets", *, private: bool = False) -> Repo:
        with _LOCK:
            return Repo.create(self.root / kind / id, kind, id, author=id.split("/")[0], private=private)

    def repos(self, kind: str = "datasets") -> list[Repo]:
        return [self.repo("/".join(at.parts[-3:-1]), kind) for at in sorted((self.root / kind).glob("*/*/repo.json"))]

    @property
    def uploads(self) -> list[str]:
        """The sha256 of every LFS object that was sent and kept, in order; one sent twice is there twice."""
        sent = (each for each in self.requests if each.part == "storage" and each.method == "PUT")
        return [each.path.rsplit("/", 1)[1] for each in sent if each.status == 200]

    def seen(self, path_contains: str, method: str | None = None) -> list[Request]:
        """The requests that came, by a part of their path and their method."""
        fits = _Trigger(path_contains, method, times=None).strikes
        return [request for request in list(self.requests) if fits(request)]

    def before(
        self, path_contains: str, call: Callable[[Request], Any], method: str | None = None, **when: Any
    ) -> Hook:
        """Has a callback before such requests are carried out; it returns `DROPPED` for that not to happen."""
        self.hooks.append(Hook(path_contains, method, call=call, **when))
        return self.hooks[-1]

    def after(
        self, path_contains: str, call: Callable[[Request], Any], method: str | None = None, **when: Any
    ) -> Hook:
        """Has a callback when such requests have been carried out, but not been answered yet."""
        return self.before(path_contains, call, method, after=True, **when)

    # How a request goes.

    def fault(self, request: Request) -> Fault:
        """What goes wrong with a request; an empty fault if nothing does."""
        with _LOCK:
            return next((fault for fault in self.faults if fault.strikes(request)), Fault())

    def hooked(self, request: Request) -> list[Hook]:
        """The callbacks of a request."""
        with _LOCK:
            return [hook for hook in self.hooks if hook.strikes(request)]

    def record(self, request: Request) -> None:
        """Logs a request, once as it comes and once as it has been answered."""
        with _LOCK:
            if request.status is None and request.cut is None:
                self.requests.append(request)
            if self.log is not None:
                with self.log.open("a") as log:
                    log.write(json.dumps(request.told()) + "\n")

    def answer(self, request: Request) -> Answer:
        """Carries a request out."""
        try:
            return self._handle(request)
        except Refused as error:
            return error.answer

    def control(self, request: Request) -> Answer | None:
        """What `/_fault` and `/_log` do."""
        match request.method, request.path:
            case "POST", "/_fault":
                self.faults.append(Fault(**request.body))
            case "DELETE", "/_fault":
                self.faults.clear()
            case "DELETE", "/_log":
                self.requests.clear()
            case "GET", "/_log":
                return Answer(body={"requests": [each.told() for each in self.requests], "uploads": self.uploads})
            case _:
                return None
        return Answer(body={"faults": [asdict(fault) for fault in self.faults]})

    def _handle(self, request: Request) -> Answer:
        if request.token is not None and request.user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        method = "GET" if request.method == "HEAD" else request.method
        for expected, pattern, name in _ROUTES:
            if expected == method and (found := pattern.fullmatch(request.raw_path)):
                given = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                with _LOCK:
                    return getattr(self, name)(request, **given)
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    # Rights.

    def _visible(self, request: Request, kind: str, id: str) -> Repo:
        if self.exists(id, kind):
            repo = self.repo(id, kind)
            if not repo.state["private"] or self._owns(request, id):
                return repo
        raise self._missing(request)

    def _missing(self, request: Request) -> Refused:
        if request.user is None:
            return Refused(401, "Invalid username or password.", "RepoNotFound")
        return Refused(404, "Repository not found", "RepoNotFound")

    def _readable(self, request: Request, kind: str, id: str) -> Repo:
        repo = self._visible(request, kind, id)
        if repo.state["gated"] and not self._owns(request, id):
            why = f"Access to {kind[:-1]} {id} is restricted."
            raise Refused(403 if request.user else 401, why, "GatedRepo")
        return repo

    def _writable(self, request: Request, kind: str, id: str, *, pull_request: bool = False) -> Repo:
        repo = self._visible(request, kind, id)
        self._writer(request)
        if not pull_request and not self._owns(request, id):
            raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def _writer(self, request: Request) -> User:
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        if request.user.role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return request.user

    @staticmethod
    def _owns(request: Request, id: str) -> bool:
        return request.user is not None and id.split("/")[0] in request.user.namespaces

    # Users and repositories.

    @_route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Answer:
        user = request.user
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return Answer(
            body={
                "type": "user",
                "id": hashlib.md5(user.name.encode()).hexdigest()[:24],
                "name": user.name,
                "fullname": user.name.title(),
                "email": f"{user.name}@example.org",
                "emailVerified": True,
                "isPro": False,
                "canPay": False,
                "orgs": [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.organizations],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}},
            }
        )

    @_route("POST", "/api/repos/create")
    def _create(self, request: Request) -> Answer:
        kind, id = self._named(request)
        user = self._writer(request)
        if id.split("/")[0] not in user.namespaces:
            raise Refused(
                403,
                f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{id.split("/")[0]}"',
            )
        if not re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", id) or "--" in id or ".." in id or id.endswith(".git"):
            raise Refused(400, f"Invalid repo name: {id}")
        url = self._web(kind, id)
        if self.exists(id, kind):
            raise Refused(409, f"You already created this {kind[:-1]} repo: {id}", url=url)
        private = request.body.get("private") or request.body.get("visibility") == "private"
        Repo.create(self.root / kind / id, kind, id, author=user.name, private=bool(private))
        return Answer(body={"url": url, "name": id, "id": hashlib.md5(id.encode()).hexdigest()[:24]})

    @_route("DELETE", "/api/repos/delete")
    def _delete(self, request: Request) -> Answer:
        repo = self._writable(request, *self._named(request))
        shutil.rmtree(repo.folder)
        return Answer(body="OK", headers={"Content-Type": "text/plain"})

    @_route("PUT", f"{_API}/settings")
    def _settings(self, request: Request, kind: str, id: str) -> Answer:
        given = dict(request.body)
        if "visibility" in given:
            given["private"] = given.pop("visibility") == "private"
        self._writable(request, kind, id).update(**{key: given[key] for key in ("private", "gated") if key in given})
        return Answer(body=request.body)

    @_route("GET", "/api/(?P<kind>datasets|models)")
    def _list(self, request: Request, kind: str) -> Answer:
        def fits(repo: Repo, tags: list[str]) -> bool:
            asked = request.query
            return (
                (not repo.state["private"] or self._owns(request, repo.id))
                and all(repo.id.split("/")[0] == author for author in asked.get("author", []))
                and all(part.lower() in repo.id.lower() for part in asked.get("search", []))
                and all(tag in tags for tag in asked.get("filter", []))
            )

        found = [repo for repo in self.repos(kind) if fits(repo, tags_of(repo.card()))]
        described = [self._described(repo, "main", request.query) for repo in found]
        order = request.query.get("sort", ["createdAt"])[0]
        described.sort(key=lambda told: str(told.get(order, "")), reverse=True)
        limit = int(request.query.get("limit", ["1000"])[0])
        full = "true" in [value.lower() for value in request.query.get("full", [])]
        hidden = () if full or "expand" in request.query else ("siblings", "cardData")
        return Answer(body=[{k: v for k, v in told.items() if k not in hidden} for told in described[:limit]])

    @_route("GET", _API)
    @_route("GET", f"{_API}/revision/{_REVISION}")
    def _info(self, request: Request, kind: str, id: str, revision: str = "main") -> Answer:
        return Answer(body=self._described(self._visible(request, kind, id), revision, request.query))

    @_route("GET", r"/api/(?P<kind>datasets|models)/(?P<id>[^/]+)")
    def _nameless(self, request: Request, kind: str, id: str) -> Answer:
        """Repositories without a namespace are the oldest ones; there are none here."""
        raise self._missing(request)

    def _described(self, repo: Repo, revision: str, query: Mapping[str, list[str]]) -> dict[str, Any]:
        state, head, card = repo.state, repo.head(revision), repo.card(revision)
        blobs = "true" in [value.lower() for value in query.get("blobs", [])]
        files = head["files"].items()
        told = {
            "_id": hashlib.md5(repo.id.encode()).hexdigest()[:24],
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": head["id"],
            "lastModified": head["date"],
            "createdAt": state["created"],
            "private": state["private"],
            "gated": state["gated"],
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags_of(card),
            "cardData": card_data(card),
            "siblings": [{"rfilename": path, **(_blob(entry) if blobs else {})} for path, entry in files],
            "usedStorage": sum(entry["size"] for _, entry in files),
        }
        if repo.kind == "models":
            told["modelId"] = repo.id
        asked = [value for name in ("expand", "expand[]") for value in query.get(name, [])]
        return {key: value for key, value in told.items() if not asked or key in ("_id", "id", *asked)}

    @staticmethod
    def _named(request: Request) -> tuple[str, str]:
        """Kind and id of the repository that a body names."""
        body = request.body
        namespace = body.get("organization") or (request.user.name if request.user else "?")
        name = body["name"]
        return f"{body.get('type') or 'model'}s", name if "/" in name else f"{namespace}/{name}"

    def _web(self, kind: str, id: str) -> str:
        return f"{self.url}/{id}" if kind == "models" else f"{self.url}/{kind}/{id}"

    # Revisions.

    @_route("GET", f"{_API}/refs")
    def _refs(self, request: Request, kind: str, id: str) -> Answer:
        refs = self._visible(request, kind, id).refs

        def under(prefix: str) -> list[dict[str, str]]:
            found = ((ref, sha) for ref, sha in refs.items() if ref.startswith(prefix))
            return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha} for ref, sha in found]

        told = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": under("refs/convert/")}
        if "include_prs" in request.query:
            told["pullRequests"] = under("refs/pr/")
        return Answer(body=told)

    @_route("GET", f"{_API}/commits/{_REVISION}")
    def _commits(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        kept = ("id", "title", "message", "date")
        history = self._visible(request, kind, id).history(revision)
        return Answer(
            body=[{**{key: one[key] for key in kept}, "authors": [{"user": one["author"]}]} for one in history]
        )

    @_route("POST", f"{_API}/branch/(?P<name>[^/]+)")
    def _branch(self, request: Request, kind: str, id: str, name: str) -> Answer:
        repo = self._writable(request, kind, id)
        return self._point(repo, f"refs/heads/{name}", (request.body or {}).get("startingPoint") or "main")

    @_route("POST", f"{_API}/tag/{_REVISION}")
    def _tag(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        return self._point(self._writable(request, kind, id), f"refs/tags/{request.body['tag']}", revision)

    def _point(self, repo: Repo, ref: str, revision: str) -> Answer:
        sha = repo.sha(revision)
        if ref in repo.refs:
            raise Refused(409, f"Reference already exists: {ref}")
        repo.update(refs={**repo.refs, ref: sha})
        return Answer(body={"success": True})

    @_route("DELETE", f"{_API}/(?P<what>branch|tag)/(?P<name>[^/]+)")
    def _unpoint(self, request: Request, kind: str, id: str, what: str, name: str) -> Answer:
        repo, ref = self._writable(request, kind, id), f"refs/{'heads' if what == 'branch' else 'tags'}/{name}"
        if ref == "refs/heads/main":
            raise Refused(403, "Forbidden: cannot delete branch main")
        if ref not in repo.refs:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        repo.update(refs={other: sha for other, sha in repo.refs.items() if other != ref})
        return Answer(body={"success": True})

    # Pull requests.

    @_route("GET", f"{_API}/discussions")
    def _discussions(self, request: Request, kind: str, id: str) -> Answer:
        found = [self._discussion(repo, pull) for repo in [self._visible(request, kind, id)] for pull in _pulls(repo)]
        return Answer(body={"discussions": found, "count": len(found), "start": 0})

    @_route("GET", f"{_API}/discussions/(?P<number>[0-9]+)")
    def _details(self, request: Request, kind: str, id: str, number: str) -> Answer:
        repo = self._visible(request, kind, id)
        return Answer(body=self._discussion(repo, _pull(repo, number)))

    @_route("POST", f"{_API}/discussions/(?P<number>[0-9]+)/merge")
    def _merge(self, request: Request, kind: str, id: str, number: str) -> Answer:
        """Merges by taking over what the pull request changed; a conflict is not looked for."""
        repo = self._writable(request, kind, id)
        pull = _pull(repo, number)
        old, new = repo.files(pull["base"]), repo.files(f"refs/pr/{number}")
        changed = {path: new.get(path) for path in {*old, *new} if old.get(path) != new.get(path)}
        merged = {path: entry for path, entry in {**repo.files(), **changed}.items() if entry is not None}
        assert request.user is not None
        repo.add_commit(
            merged, "refs/heads/main", repo.sha(), title=pull["title"], message="", author=request.user.name
        )
        repo.update(pulls=[{**p, "status": "merged"} if p["num"] == int(number) else p for p in _pulls(repo)])
        return Answer(body={"success": True})

    @staticmethod
    def _discussion(repo: Repo, pull: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **{key: pull[key] for key in ("num", "title", "status", "createdAt")},
            "author": {"name": pull["author"]},
            "isPullRequest": True,
            "repo": {"name": repo.id, "type": repo.kind[:-1]},
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "events": [],
        }

    # Files.

    @_route("GET", f"{_API}/tree/{_REVISION}(?:/(?P<path>.*))?")
    def _tree(self, request: Request, kind: str, id: str, revision: str, path: str = "") -> Answer:
        repo = self._readable(request, kind, id)
        below, files = f"{path.strip('/')}/" if path.strip("/") else "", repo.files(revision)
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = [name for name in files if name.startswith(below)]
        if below and not inside:
            raise Refused(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        parts = [name.removeprefix(below).split("/") for name in inside]
        deepest = max(map(len, parts), default=0) if recursive else 2
        folders = {below + "/".join(each[:depth]) for each in parts for depth in range(1, min(len(each), deepest))}
        names = {*folders, *(below + "/".join(each) for each in parts if recursive or len(each) == 1)}
        return Answer(body=[self._path_info(repo, revision, name, request.query) for name in sorted(names)])

    @_route("POST", f"{_API}/paths-info/{_REVISION}")
    def _paths_info(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        repo = self._readable(request, kind, id)
        files, asked = repo.files(revision), [name.strip("/") for name in _listed(request.body.get("paths"))]
        there = [name for name in asked if name in files or any(path.startswith(f"{name}/") for path in files)]
        how = {"expand": [str(each) for each in _listed(request.body.get("expand"))]}
        return Answer(body=[self._path_info(repo, revision, name, how) for name in there])

    @staticmethod
    def _path_info(repo: Repo, revision: str, path: str, query: Mapping[str, list[str]]) -> dict[str, Any]:
        files = repo.files(revision)

        def content(files: Mapping[str, Any]) -> list[Any]:
            return [(name, one["oid"]) for name, one in files.items() if name == path or name.startswith(f"{path}/")]

        told = {"path": path, "type": "directory", "size": 0}
        told["oid"] = hashlib.sha1(repr(content(files)).encode()).hexdigest()
        if path in files:
            told |= {"type": "file", **_blob(files[path])}
            told["oid"] = told.pop("blobId")
            if "lfs" in told:
                told["lfs"]["oid"] = told["lfs"]["sha256"]
        if query.get("expand", ["false"])[0].lower() in ("true", "1"):
            history = repo.history(revision)
            older = (commit["files"] for commit in history[1:])
            unchanged = zip(history, older, strict=False)
            last = next((new for new, old in unchanged if content(new["files"]) != content(old)), history[-1])
            told["lastCommit"] = {key: last[key] for key in ("id", "title", "date")}
        return told

    @_route("GET", f"{_WEB}/(?P<how>resolve|raw)/{_REVISION}/(?P<path>.+)")
    def _resolve(self, request: Request, how: str, revision: str, path: str, id: str, kind: str = "models") -> Answer:
        repo = self._readable(request, kind, id)
        head = repo.head(revision)
        entry, common = head["files"].get(path), {"X-Repo-Commit": head["id"], "Accept-Ranges": "bytes"}
        if entry is None:
            missing = Refused(404, "Entry not found", "EntryNotFound").answer
            return Answer(404, missing.body, {**missing.headers, **common})
        if entry["sha256"] is None:
            return _content(request, repo.object_of(entry), {**common, "ETag": f'"{entry["oid"]}"'})
        if how == "raw":
            return Answer(
                body=_pointer(entry["sha256"], entry["size"]), headers={**common, "Content-Type": "text/plain"}
            )
        linked = {"X-Linked-Size": str(entry["size"]), "X-Linked-ETag": f'"{entry["sha256"]}"'}
        where = f"{self.storage_url}/{kind}/{quote(id)}/{entry['sha256']}?filename={quote(path)}"
        return Answer(302, f"Found. Redirecting to {where}", {**common, **linked, "Location": where})

    # Uploads.

    @_route("POST", f"{_API}/preupload/{_REVISION}")
    def _preupload(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        asks = "create_pr" in request.query or revision.startswith("refs/pr/")
        repo = self._writable(request, kind, id, pull_request=asks)
        head = repo.head(revision)

        def mode(file: Mapping[str, Any]) -> dict[str, Any]:
            sample = base64.b64decode(file.get("sample") or "")
            there = head["files"].get(file["path"])
            told = {"path": file["path"], "uploadMode": upload_mode(file["path"], sample, file["size"])}
            return {**told, "shouldIgnore": False, **({"oid": there["sha256"] or there["oid"]} if there else {})}

        return Answer(body={"files": [mode(file) for file in request.body["files"]], "commitOid": head["id"]})

    @_route("POST", rf"{_WEB}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, id: str, kind: str = "models") -> Answer:
        repo = self._writable(request, kind, id, pull_request="ref" not in request.body)  # so do clients for those

        def told(oid: str, size: int) -> dict[str, Any]:
            if repo.object_at(oid).exists():
                return {"oid": oid, "size": size}
            verify = f"{self._web(kind, id)}.git/info/lfs/objects/verify"
            upload = f"{self.storage_url}/{kind}/{quote(id)}/{oid}"
            return {"oid": oid, "size": size, "actions": {"upload": {"href": upload}, "verify": {"href": verify}}}

        objects = [told(each["oid"], each["size"]) for each in request.body["objects"]]
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        return Answer(body={"transfer": "basic", "objects": objects}, headers=headers)

    @_route("POST", rf"{_WEB}\.git/info/lfs/objects/verify")
    def _lfs_verify(self, request: Request, id: str, kind: str = "models") -> Answer:
        stored = self._visible(request, kind, id).object_at(request.body["oid"])
        if not stored.exists() or stored.stat().st_size != request.body["size"]:
            raise Refused(404, "LFS object was not uploaded")
        return Answer(body={})

    @_route("POST", f"{_API}/commit/{_REVISION}")
    def _commit(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        asks = "1" in request.query.get("create_pr", [])
        repo = self._writable(request, kind, id, pull_request=asks or revision.startswith("refs/pr/"))
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        header = next(line["value"] for line in request.body if line["key"] == "header")
        if ref not in repo.refs:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if not header.get("summary"):
            raise Refused(400, '"summary" is not allowed to be empty')
        head, parent = repo.refs[ref], header.get("parentCommit")
        if asks and parent:
            head = repo.sha(parent)
        elif parent and not head.startswith(parent):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = functools.reduce(functools.partial(_applied, repo), request.body, repo.files(head))
        self._refuse_bad_card(repo, request, files)
        target = f"refs/pr/{len(_pulls(repo)) + 1}" if asks else ref
        author = self._writer(request).name
        sha = repo.add_commit(
            files, target, head, title=header["summary"], message=header.get("description", ""), author=author
        )
        web = self._web(kind, id)
        told = {"success": True, "commitOid": sha, "commitUrl": f"{web}/commit/{sha}", "hookOutput": ""}
        if asks:
            number = len(_pulls(repo)) + 1
            pull = {"num": number, "title": header["summary"], "author": author, "status": "open", "base": head}
            repo.update(pulls=[*_pulls(repo), {**pull, "createdAt": _now()}])
            told["pullRequestUrl"] = f"{web}/discussions/{number}"
        return Answer(body=told)

    @staticmethod
    def _refuse_bad_card(repo: Repo, request: Request, files: Mapping[str, Any]) -> None:
        if "file README.md" in request.operations:
            errors, _ = validate_card(repo.object_of(files["README.md"]).read_text(), repo.kind[:-1])
            if errors:
                raise Refused(400, f"Invalid metadata in README.md: {errors[0]}")

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Answer:
        errors, warnings = validate_card(request.body["content"], request.body.get("repoType", "model"))
        told = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return Answer(400 if errors else 200, told)

    # Storage.

    @_route("PUT", r"/storage/(?P<kind>datasets|models)/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})")
    def _put(self, request: Request, kind: str, id: str, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refused(400, "The content does not have this sha256.")
        stored = self._stored(kind, id, oid)
        unfinished = stored.with_suffix(".part")
        unfinished.write_bytes(request.body)
        os.replace(unfinished, stored)
        return Answer(headers={"ETag": f'"{oid}"'})

    @_route("GET", r"/storage/(?P<kind>datasets|models)/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})")
    def _get(self, request: Request, kind: str, id: str, oid: str) -> Answer:
        return _content(request, self._stored(kind, id, oid), {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _stored(self, kind: str, id: str, oid: str) -> Path:
        if not self.exists(id, kind):
            raise Refused(404, "NoSuchBucket")
        return self.repo(id, kind).object_at(oid)


def _pulls(repo: Repo) -> list[dict[str, Any]]:
    return repo.state["pulls"]


def _pull(repo: Repo, number: str) -> dict[str, Any]:
    for pull in _pulls(repo):
        if pull["num"] == int(number):
            return pull
    raise Refused(404, "Discussion not found")


def _blob(entry: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"blobId": entry["oid"], "size": entry["size"]}
    if entry["sha256"]:
        pointer = len(_pointer(entry["sha256"], entry["size"]))
        told["lfs"] = {"sha256": entry["sha256"], "size": entry["size"], "pointerSize": pointer}
    return told


def _applied(repo: Repo, files: Mapping[str, Any], line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The files after one operation of a commit."""
    key, value = line["key"], line["value"]
    if key == "header":
        return files
    path = value["path"]
    if key == "file":
        content = (
            base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
        )
        entry = _entry(len(content), content=content)
        repo.object_of(entry).write_bytes(content)
        return {**files, path: entry}
    if key == "lfsFile":
        stored = repo.object_at(value["oid"])
        if not stored.exists():
            why = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
            raise Refused(400, f"{why} Offending file: {path}")
        return {**files, path: _entry(stored.stat().st_size, sha256=value["oid"])}
    gone = [
        name for name in files if (name.startswith(f"{path.rstrip('/')}/") if key == "deletedFolder" else name == path)
    ]
    if not gone:
        raise Refused(
            404, f"A {'folder' if key == 'deletedFolder' else 'file'} with this name doesn't exist", "EntryNotFound"
        )
    return {name: entry for name, entry in files.items() if name not in gone}


def _content(request: Request, stored: Path, headers: Mapping[str, str]) -> Answer:
    """A file, or the range of it that was asked for."""
    if not stored.exists():
        raise Refused(404, "Entry not found", "EntryNotFound")
    content, asked = stored.read_bytes(), re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    headers = {"Content-Type": "application/octet-stream", **headers}
    if asked is None or asked.groups() == ("", ""):
        return Answer(200, content, headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= stop:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


# The sockets.


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: Hub, part: str, port: int = 0) -> None:
        self.hub, self.part, self.open = hub, part, set[socket.socket]()
        super().__init__(("127.0.0.1", port), _Connection)

    def close_all(self) -> None:
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone, or was sent away, is not worth a word; all else is a bug."""
        if not isinstance(sys.exception(), (ConnectionError, _Reset)):
            super().handle_error(request, client_address)


class _Reset(Exception):
    """The connection has been reset."""


class _Connection(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing on stderr."""

    def do_GET(self) -> None:
        hub, request = self.server.hub, self._head()
        if request.path.startswith("/_") and self.server.part == "hub":
            request.body = self._parsed(self._body())
            self._send(request, hub.control(request) or Refused(404, "no such control").answer)
            return
        hub.record(request)
        fault = hub.fault(request)
        self._cut_short(request, fault)
        try:
            body = self._body()
        except ConnectionError:
            self._close(request, None, "client")
            raise
        request.length, request.body = len(body), self._parsed(body)
        self._send(request, self._answered(request, fault))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _head(self) -> Request:
        raw_path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        number, part = next(self.server.hub.numbers), self.server.part
        return Request(number, time.time(), self.command, unquote(raw_path), raw_path, parse_qs(query), headers, part)

    def _cut_short(self, request: Request, fault: Fault) -> None:
        if fault.done or fault.cut is None:
            return
        chunked = "transfer-encoding" in request.headers
        length = int(request.headers.get("content-length", 2 if chunked else 0))
        if fault.cut == "before":
            self._reset(request, fault.cut)
        elif length:
            request.length = len(self.rfile.read(length // 2))
            self._reset(request, fault.cut)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionResetError  # the client has died
            return body
        chunks = []
        while size := self._line():
            chunks.append(self.rfile.read(int(size.split(b";")[0], 16)))
            self._line()
            if not chunks[-1]:
                break
        return b"".join(chunks)

    def _line(self) -> bytes:
        if not (line := self.rfile.readline()):
            raise ConnectionResetError  # the client has died
        return line.strip()

    def _parsed(self, body: bytes) -> Any:
        kind = self.headers.get("Content-Type", "")
        if "ndjson" in kind:
            return [json.loads(line) for line in body.splitlines() if line.strip()]
        if "json" in kind:
            return json.loads(body) if body else None
        return parse_qs(body.decode()) if "urlencoded" in kind else body

    def _answered(self, request: Request, fault: Fault) -> Answer:
        hub = self.server.hub
        hooks = hub.hooked(request)
        replaced = [hook.call(request) for hook in hooks if not hook.after]
        if not fault.done:
            time.sleep(fault.delay)
            replaced.append(fault.answer if fault.cut != "middle" else None)
        answer = next((each for each in replaced if isinstance(each, Answer)), None)
        if answer is not None:
            return answer
        answer = self._carried_out(request)
        said = [hook.call(request) for hook in hooks if hook.after]
        time.sleep(fault.delay if fault.done else 0)
        answer = next((each for each in said if isinstance(each, Answer)), answer)
        if fault.cut == "middle":  # of the answer, since there was no body, or all of it was wanted
            return Answer(answer.status, answer.body, answer.headers, "middle")
        return fault.answer or answer if fault.done else answer

    def _carried_out(self, request: Request) -> Answer:
        if self.server.part == "storage" and request.token is not None:
            return Answer(400, "Only one auth mechanism allowed: the URL is signed already.")
        if (self.server.part == "storage") != request.path.startswith("/storage/"):
            return Refused(404, "Sorry, we can't find the page you are looking for.").answer
        return self.server.hub.answer(request)

    def _send(self, request: Request, answer: Answer) -> None:
        if answer.cut == "before":
            self._reset(request, answer.cut)
        payload = answer.payload
        headers = {"Content-Type": "application/json", "Content-Length": str(len(payload)), **answer.headers}
        head = f"HTTP/1.1 {answer.status} Status\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
        sent = head.encode("latin-1", "replace") + (b"" if request.method == "HEAD" else payload)
        if answer.cut == "middle":
            self.wfile.write(sent[: len(sent) - len(payload) // 2])
            self._reset(request, answer.cut)
        self._close(request, answer.status)
        self.wfile.write(sent)

    def _close(self, request: Request, status: int | None, cut: str | None = None) -> None:
        """Logs that the request has been dealt with. That comes first: who has an answer may look at the log."""
        request.status, request.cut = status, cut
        if not request.path.startswith("/_"):
            self.server.hub.record(request)

    def _reset(self, request: Request, where: str) -> None:
        """Makes the kernel send RST in place of FIN."""
        self._close(request, None, where)
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        raise _Reset


def main() -> None:
    """Serves in this process until it is killed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port-file", type=Path, required=True, help="where the port is written once it is open")
    parser.add_argument("--root", type=Path, required=True, help="the folder of all state")
    parser.add_argument("--log", type=Path, help="where requests are recorded: as they come, and when answered")
    parser.add_argument("--port", type=int, default=0, help="a fixed port, to come back to after a restart")
    options = parser.parse_args()
    with Hub(options.root, port=options.port, log=options.log) as hub:
        unfinished = options.port_file.with_suffix(".part")
        unfinished.write_text(str(hub.port))
        os.replace(unfinished, options.port_file)
        threading.Event().wait()


if __name__ == "__main__":
    main()
