"""To the Hub: a result arrives in one commit, or not at all, and is opened again before success is reported."""

import random
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_reflect import __version__
from hf_reflect.cards import CardData, render_card, render_plain_card
from hf_reflect.errors import HfReflectError, HubError
from hf_reflect.extras import EXTRAS, write_preference, write_selected
from hf_reflect.merging import merge, sign, split
from hf_reflect.oracles.faults import Fault, read_fault, redact
from hf_reflect.output import FOLDERS, README, DataFiles
from hf_reflect.plotting import PATHS
from hf_reflect.recipe import FILE, TaskRecipe, read_task
from hf_reflect.trail import record_batches


if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

_ATTEMPTS = 8
_FORBIDDEN = 403
_LONGEST_REASON = 300
_LONGEST_WAIT = 60.0
_COMPARED_AT_ONCE = 1000


@dataclass(frozen=True)
class Pushed:
    """Where a result is on the Hub.

    Attributes:
        repo_id: The dataset.
        url: Of the revision, or of the pull request.
        commit: Its hash.
        changed: Whether anything had to be pushed.
    """

    repo_id: str
    url: str
    commit: str
    changed: bool


def push_recycled(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    message: str | None = None,
    preference: bool = False,
    selected: float | None = None,
    overwrite: bool = False,
    template: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Pushes the folder that a run wrote: data, card and recipe in one commit on top of the one that was looked at.

    Conflicts with other pushes, throttling and failures of the server are tried again; what was uploaded is not
    uploaded again. The pushed revision is then loaded and compared with the folder, row by row. Pushing the same
    folder again makes no commit. What people changed by hand in the card stays, and so do other configs.

    Args:
        folder: What `recycle` wrote.
        repo_id: `NAMESPACE/NAME`; made if it isn't there.
        private: Whether a new repository is private.
        create_pr: Open a pull request in place of a commit.
        revision: The branch; made if it isn't there.
        message: Of the commit.
        preference: Also push a config `preference`: prompt, chosen (the rewrite that the student kept) and rejected.
        selected: Also push a config `selected`: this share of the rows, those with the highest IFD.
        overwrite: Replace a dataset that has another recipe.
        template: The text of another Jinja template for the card.
        token: By default that of your login.

    Raises:
        HfReflectError: it can't be pushed, or what arrived is not what was sent; the message says what to do.
    """
    path, secrets = Path(folder), login_secrets(token)
    with tempfile.TemporaryDirectory(prefix="hf_reflect-push-") as extra:
        bundle = _bundle(path, Path(extra), repo_id, preference, selected, template)
        target = _Target(hub_api(token), repo_id, create_pr, revision, overwrite, secrets)
        pushed = target.push(bundle, private, message or f"Recycled with hf_reflect {__version__}")
        target.patiently(lambda: _compare(bundle, pushed, token), pushed)
    return pushed


def hub_api(token: str | None = None) -> "HfApi":
    """The Hub's client, which says that it is us who call."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="hf_reflect", library_version=__version__)


@dataclass(frozen=True)
class _Bundle:
    """What is to be pushed.

    Attributes:
        recipe: The hash of the recipe that it was made by.
        files: Where each file lies, by its path in the repository; the card aside.
        data_files: The file of each config and split.
        card: Gives the text of the card, where some configs made on demand are there already.
    """

    recipe: str
    files: dict[str, Path]
    data_files: DataFiles
    card: Callable[[Collection[str]], str]


def _bundle(
    folder: Path, extra: Path, location: str, preference: bool, selected: float | None, template: str | None
) -> _Bundle:
    if not (folder / FILE).is_file():
        raise HubError(f"{folder}: there is no result of a run in it.")
    if (task := read_task(folder)) is not None:
        return _plain_bundle(folder, location, task)
    data = replace(CardData.of_folder(folder, location), title=location.rpartition("/")[2])
    for config in FOLDERS:
        if not data.data_files.get(config):
            raise HubError(f"{folder}: its files of config {config} are gone; make it again, which costs nothing.")
    files = {path: folder / path for splits in data.data_files.values() for path in splits.values()}
    files[FILE] = folder / FILE
    files |= {picture.path: folder / picture.path for picture in data.pictures}
    files |= {file.name: file for file in folder.glob("*.png")}
    made: DataFiles = {}
    if preference:
        made["preference"] = write_preference(folder, extra)
    if selected is not None:
        made["selected"] = write_selected(folder, extra, selected)
    for splits in made.values():
        files |= {path: extra / path for path in splits.values()}
    data.data_files.update(made)

    def card(others: Collection[str]) -> str:
        beside = tuple(name for name in EXTRAS if name in others)
        return _with_edits(sign(render_card(replace(data, beside=beside), template)), folder)

    return _Bundle(data.recipe.hash, files, data.data_files, card)


def _plain_bundle(folder: Path, location: str, task: TaskRecipe) -> _Bundle:
    """What `score` or `select` wrote."""
    import pyarrow.parquet as pq

    paths = {file.name.split("-")[0]: f"data/{file.name}" for file in sorted((folder / "data").glob("*.parquet"))}
    files = {path: folder / path for path in paths.values()}
    rows = sum(pq.read_metadata(file).num_rows for file in files.values())
    title = f"{location.rpartition('/')[2]}: {task.task}"
    card = _with_edits(sign(render_plain_card(title, {"default": paths}, rows, location, task.settings)), folder)
    return _Bundle(task.hash, {**files, FILE: folder / FILE}, {"default": paths}, lambda others: card)


def _with_edits(card: str, folder: Path) -> str:
    """A card with what was changed by hand in that of the folder."""
    file = folder / README
    return merge(card, file.read_text("utf-8") if file.is_file() else None)


class _Target:
    """A dataset repository, as a place to push to."""

    def __init__(
        self,
        api: "HfApi",
        repo_id: str,
        create_pr: bool,
        revision: str | None,
        overwrite: bool,
        secrets: Sequence[str],
    ) -> None:
        self._api, self.repo_id, self._create_pr = api, repo_id, create_pr
        self._revision, self._overwrite, self._secrets = revision, overwrite, secrets
        self._found: str | None = None
        self._asked_before = False
        _check_name(repo_id)

    def push(self, bundle: _Bundle, private: bool, message: str) -> Pushed:
        self.patiently(lambda: self._api.create_repo(
            self.repo_id, repo_type="dataset", private=private or None, exist_ok=True
        ))  # fmt: skip
        if self._revision and not self._create_pr and not self._revision.startswith("refs/"):
            self.patiently(lambda: self._api.create_branch(
                self.repo_id, branch=str(self._revision), repo_type="dataset", exist_ok=True
            ))  # fmt: skip
        return self.patiently(lambda: self._commit(bundle, message))

    def _commit(self, bundle: _Bundle, message: str) -> Pushed:
        """One attempt: looks at what is there, and commits on top of just that."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        info = self._api.dataset_info(self.repo_id, revision=self._revision)
        self._found = self._found or info.sha
        if self._create_pr and (opened := self._opened(message)) is not None:
            return opened  # the answer to an earlier attempt was lost
        there = {sibling.rfilename for sibling in info.siblings or ()}
        existing = self._read(README, info.sha) if README in there else None
        same = self._check_recipe(bundle, there, info.sha)
        # What was made on demand from another result says nothing true of this one.
        kept = same and _listed(existing, set(FOLDERS)) <= set(bundle.files)
        gone = frozenset[str]() if kept else frozenset(EXTRAS)
        card = merge(bundle.card(_names(existing) & set(EXTRAS) - gone), existing, gone)
        patterns = {*_listed(existing, {*FOLDERS, *bundle.data_files, *gone}), *PATHS}
        stale = {path for path in there for pattern in patterns if fnmatch(path, pattern)} - set(bundle.files)
        operations: list[Any] = [CommitOperationDelete(path) for path in sorted(stale)]
        operations += [CommitOperationAdd(path, str(file)) for path, file in sorted(bundle.files.items())]
        operations.append(CommitOperationAdd(README, card.encode()))
        commit = self._api.create_commit(
            self.repo_id,
            operations,
            commit_message=message,
            repo_type="dataset",
            revision=self._revision,
            parent_commit=info.sha,
            create_pr=self._create_pr,
        )
        url = commit.pr_url or f"{self._api.endpoint}/datasets/{self.repo_id}/tree/{commit.oid}"
        return Pushed(self.repo_id, url, commit.oid, commit.oid != self._found)

    def _opened(self, message: str) -> Pushed | None:
        """The pull request that an earlier attempt of this push opened, if one did."""
        if not self._asked_before:
            self._asked_before = True
            return None
        for discussion in self._api.get_repo_discussions(self.repo_id, repo_type="dataset"):
            if discussion.is_pull_request and discussion.status == "open" and discussion.title == message:
                info = self._api.dataset_info(self.repo_id, revision=discussion.git_reference)
                return Pushed(self.repo_id, discussion.url, str(info.sha), True)
        return None

    def _check_recipe(self, bundle: _Bundle, there: set[str], revision: str | None) -> bool:
        """Whether what is there was made by the same recipe; refuses to replace anything else unasked."""
        import yaml

        found = yaml.safe_load(self._read(FILE, revision)) if FILE in there else None
        recipe = found.get("hash") if isinstance(found, dict) else None
        if recipe == bundle.recipe:
            return True
        if there - {".gitattributes", README} and not self._overwrite and not self._create_pr:
            what = f"the result of another recipe ({recipe})" if recipe else "something else"
            raise HubError(
                f"{self.repo_id}: holds {what}. Push to another name, replace it with --overwrite, or open a pull "
                "request with --create-pr."
            )
        return False

    def _read(self, path: str, revision: str | None) -> str:
        file = self._api.hf_hub_download(self.repo_id, path, repo_type="dataset", revision=revision)
        return Path(file).read_text("utf-8")

    def patiently(self, action: Callable[[], T], pushed: Pushed | None = None) -> T:
        """Does something, and does it again while what prevents it may pass.

        Args:
            action: What to do.
            pushed: What was pushed before, if that is done.

        Raises:
            HubError: it can't be done.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                return action()
            except HfReflectError:
                raise
            except Exception as error:
                fault = _read_fault(error, self._secrets)
                if fault is None:
                    raise
                if attempt == _ATTEMPTS or not may_pass(fault):
                    what = f"{self.repo_id}: {fault.message}. "
                    if pushed is None:
                        raise HubError(what + advice(fault)) from error
                    raise HubError(
                        f"{what}Commit {pushed.commit} was made, but it could not be opened again to compare it: run "
                        "the same command again."
                    ) from error
            wait = min(_LONGEST_WAIT, random.uniform(0.25, 0.5) * 2.0**attempt)
            time.sleep(wait if fault.retry_after is None else min(fault.retry_after, _LONGEST_WAIT))


def _read_fault(error: Exception, secrets: Sequence[str]) -> Fault | None:
    """What went wrong with a call to the Hub or to its storage; null for a bug."""
    from datasets.exceptions import DatasetsError

    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, Exception):  # how huggingface_hub reports an upload
        fault = _read_fault(cause, secrets)
        if fault is not None and fault.status == _FORBIDDEN:  # of the storage: an address that is no longer valid
            return replace(fault, passing=True, lasting=False, status=None)
        return fault
    fault = read_fault(error, secrets)
    if fault is None and isinstance(error, DatasetsError | OSError | ValueError):
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Fault(redact(why, secrets)[:_LONGEST_REASON], passing=isinstance(error, OSError))
    return fault if fault is None else replace(fault, message=redact(fault.message, secrets))


def login_secrets(token: str | None = None) -> tuple[str, ...]:
    """What must be shown nowhere of what the Hub is sent."""
    from huggingface_hub import get_token

    return tuple(secret for secret in (token, get_token()) if secret)


def check_target(repo_id: str, token: str | None = None) -> None:
    """Refuses a place to push to that can't be one, before anything is done for it.

    Raises:
        HubError: the name is none, or nobody is logged in.
    """
    _check_name(repo_id)
    secrets = login_secrets(token)
    try:
        hub_api(token).whoami()
    except Exception as error:
        fault = _read_fault(error, secrets)
        if fault is None:
            raise
        raise HubError(f"{repo_id}: {fault.message}. {advice(fault)}") from error


def may_pass(fault: Fault) -> bool:
    """Whether a call to the Hub is worth another try: 412 is somebody else's commit, which was in between."""
    return fault.passing or fault.status == 412


def advice(fault: Fault) -> str:
    """What a person can do about a failed call to the Hub."""
    if fault.status == 401:
        return "You are not logged in, or your token is wrong: run `hf auth login`."
    if fault.status == 403:
        return "Your token may not write there: take one with write access, or a namespace of your own."
    if fault.status == 404:
        return "There is no such dataset or revision, or you may not see it."
    if fault.status == 400:
        return "The Hub refuses what was sent; nothing was pushed."
    return "Nothing was pushed; run the same command again: what was uploaded is not uploaded again."


def _names(card: str | None) -> set[str]:
    """The configs that an existing card lists."""
    configs = (split(card or "")[0] or {}).get("configs")
    listed = configs if isinstance(configs, list) else ()
    return {str(config.get("config_name")) for config in listed if isinstance(config, dict)}


def _listed(card: str | None, names: set[str]) -> set[str]:
    """The data files that an existing card lists for some configs."""
    found: set[str] = set()
    for config in (split(card or "")[0] or {}).get("configs") or ():
        if isinstance(config, dict) and str(config.get("config_name")) in names:
            files = config.get("data_files")
            found |= {file["path"] for file in files if isinstance(file, dict)} if isinstance(files, list) else set()
    return found


def _check_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a dataset: {error}") from error
    if "/" not in repo_id:
        raise HubError(f"{repo_id!r}: write it with its namespace, as NAMESPACE/NAME.")


def _compare(bundle: _Bundle, pushed: Pushed, token: str | None) -> None:
    """Opens what was pushed as anybody would, and compares it with what was sent.

    Raises:
        HubError: they differ.
    """
    import pyarrow.parquet as pq
    from datasets import load_dataset

    for config, splits in bundle.data_files.items():
        there = load_dataset(pushed.repo_id, config, revision=pushed.commit, token=token)
        for name, path in splits.items():
            sent, arrived = pq.ParquetFile(bundle.files[path]), there[name]
            if sent.metadata.num_rows != len(arrived) or sent.schema_arrow.names != arrived.column_names:
                raise _differs(pushed, config, name, f"{len(arrived)} rows of {', '.join(arrived.column_names)}")
            table, start = arrived.with_format("arrow"), 0
            for batch in record_batches(sent, _COMPARED_AT_ONCE):
                rows = table[start : start + len(batch)]
                if not rows.equals(type(rows).from_batches([batch]).cast(rows.schema)):
                    raise _differs(pushed, config, name, f"other values among rows {start} to {start + len(batch)}")
                start += len(batch)


def _differs(pushed: Pushed, config: str, split: str, how: str) -> HubError:
    return HubError(
        f"{pushed.repo_id}: commit {pushed.commit} was made, but what is there is not what was sent: config {config}, "
        f"split {split} has {how}. Push again."
    )
