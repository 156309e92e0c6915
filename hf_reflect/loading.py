"""Back from the Hub: a recycled dataset by name, what is known of it, and which there are."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_reflect.errors import HubError, RecipeError
from hf_reflect.hub import hub_api, login_secrets
from hf_reflect.journal import own_folder
from hf_reflect.merging import split as split_card
from hf_reflect.oracles.faults import Fault, read_fault, redact
from hf_reflect.recipe import FILE, Recipe


_AUTHORS = "umd-zhou-lab"
PUBLISHED = {
    "recycled_alpaca_v1": f"{_AUTHORS}/recycled_alpaca_v1",
    "recycled_wiz70_v1": f"{_AUTHORS}/recycled_wiz70_v1",
    "sRecycled_Alpaca": f"{_AUTHORS}/sRecycled_Alpaca",
    "sRecycled_Wiz70": f"{_AUTHORS}/sRecycled_Wiz70",
    "Reflect_Alpaca_All": f"{_AUTHORS}/Reflect_Alpaca_All",
    "Reflect_Wiz70_All": f"{_AUTHORS}/Reflect_Wiz70_All",
    "Reflect_WizV2_All": f"{_AUTHORS}/Reflect_WizV2_All",
}
"""The recycled datasets that the papers' authors published, by short name."""

TAG = "hf-reflect"


def load_recycled(
    name: str,
    config: str | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    **options: Any,
) -> Any:
    """A recycled dataset by name.

    Args:
        name: A Hub id, a folder that a run wrote, or a short name: that of one the papers' authors published, or one
            of your own (`register`).
        config: `default`, `reflections`, or what else it has; by default its default.
        split: Only this split.
        revision: A branch, tag or commit, or `refs/pr/N`.
        streaming: Iterate over it without downloading it first.
        **options: What else `datasets.load_dataset` takes.

    Returns:
        What `datasets.load_dataset` returns.

    Raises:
        HubError: there is no such dataset, config, split or revision.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    location = resolve(name)
    given = {"split": split, "revision": revision, **options}
    given = {key: value for key, value in given.items() if value is not None}
    with _explained(name):
        try:
            return load_dataset(location, config, streaming=streaming, **given)
        except (DatasetsError, ValueError, FileNotFoundError) as error:
            raise HubError(f"{name}: {' '.join(str(error).split())}") from error


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turns the failures that a call to the Hub can have into advice; anything else is a bug, and passes."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        secrets = login_secrets()
        fault = read_fault(error, secrets)
        if fault is None:
            raise
        raise HubError(f"{where}: {redact(fault.message, secrets)}. {advice(fault)}") from error


def advice(fault: Fault) -> str:
    """What a person can do where something can't be had from the Hub."""
    if fault.status in (401, 403):
        return "It is private or gated: log in with `hf auth login`, and ask for access."
    if fault.status == 404:
        return "There is no such dataset or revision, or you may not see it."
    return "Is the Hub reachable? Try again."


def resolve(name: str) -> str:
    """Where a name points: a folder, or a Hub id."""
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    return registered().get(name) or PUBLISHED.get(name) or name


def registry_path() -> Path:
    """Where your own short names are kept: under `HF_HOME`."""
    return own_folder() / "names.json"


def registered() -> dict[str, str]:
    """Your own short names.

    Raises:
        HubError: the file can't be read.
    """
    path = registry_path()
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise HubError(f"{path}: can't be read ({error}). Mend or remove it.") from error
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def register(name: str, location: str | None) -> None:
    """Gives a Hub id or a folder a short name of your own; null forgets the name.

    Raises:
        HubError: the name looks like a Hub id, is not known, or can't be written down.
    """
    names = registered()
    if not name or "/" in name:
        raise HubError(f"{name!r}: a short name is not empty and has no slash.")
    if location is None and names.pop(name, None) is None:
        raise HubError(f"{name}: there is no such name of yours.")
    if location is not None:
        folder = Path(location).expanduser()
        names[name] = str(folder.resolve()) if folder.is_dir() else location
    path = registry_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", "utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise HubError(f"{path}: can't be written: {error.strerror}.") from error


@dataclass(frozen=True)
class Listed:
    """A recycled dataset on the Hub.

    Attributes:
        repo_id: Its name.
        downloads: In the last 30 days.
        likes: How many like it.
        modified: When it last changed, as YYYY-MM-DD.
    """

    repo_id: str
    downloads: int
    likes: int
    modified: str


def list_recycled(author: str | None = None, limit: int = 100) -> Iterator[Listed]:
    """The recycled datasets on the Hub, by their tag, the most downloaded first.

    Raises:
        HubError: the Hub can't be asked.
    """
    with _explained("the Hub"):
        for info in hub_api().list_datasets(filter=TAG, author=author, sort="downloads", limit=limit):
            modified = f"{info.last_modified:%Y-%m-%d}" if info.last_modified else ""
            yield Listed(info.id, info.downloads or 0, info.likes or 0, modified)


@dataclass(frozen=True)
class Info:
    """What is known of a recycled dataset without its data.

    Attributes:
        name: Where it is.
        revision: The commit on the Hub; null for a folder.
        recipe: How it was made; null for one that has no recipe of ours.
        metadata: That of its card.
        body: The text of its card.
    """

    name: str
    revision: str | None
    recipe: Recipe | None
    metadata: Mapping[str, Any]
    body: str


def info(name: str, revision: str | None = None) -> Info:
    """Recipe and card of a recycled dataset, without downloading its data.

    Args:
        name: As for `load_recycled`.
        revision: As for `load_recycled`.

    Raises:
        HubError: there is no such dataset.
    """
    location = resolve(name)
    if (folder := Path(location)).is_dir():
        commit, files = None, {path: folder / path for path in (FILE, "README.md") if (folder / path).is_file()}
        if not files:
            raise HubError(f"{name}: there is no result of a run in this folder.")
    else:
        commit, files = _fetch(location, revision)
    try:
        recipe = Recipe.read(files[FILE]) if FILE in files else None
    except RecipeError:
        recipe = None
    metadata, body = split_card(files["README.md"].read_text("utf-8")) if "README.md" in files else ({}, "")
    return Info(location, commit, recipe, metadata or {}, body)


def _fetch(location: str, revision: str | None) -> tuple[str | None, dict[str, Path]]:
    from huggingface_hub.errors import HFValidationError

    api = hub_api()
    with _explained(location):
        try:
            found = api.dataset_info(location, revision=revision)
        except HFValidationError as error:
            raise HubError(
                f"{location!r}: neither a folder nor a name that is registered nor a Hub id ({error})."
            ) from error
        there = {sibling.rfilename for sibling in found.siblings or ()}
        return found.sha, {
            path: Path(api.hf_hub_download(location, path, repo_type="dataset", revision=found.sha))
            for path in (FILE, "README.md")
            if path in there
        }
