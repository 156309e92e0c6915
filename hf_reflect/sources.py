"""Where instruction data comes from: a Hub id, a local folder or file, or datasets already in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reflect.columns import DEFAULT, TYPES
from hf_reflect.embedded import content_hash
from hf_reflect.errors import SourceError
from hf_reflect.pairs import RowFormat, recognise


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Source:
    """The splits to recycle, and where they came from.

    Attributes:
        splits: Datasets by split name.
        provenance: What the recipe says of the source: where it is, and which version or content it had.
        single: Whether it is one dataset rather than a dictionary of splits.
        about: What its card says of it: licence, languages, name.
    """

    splits: Mapping[str, "Dataset"]
    provenance: Mapping[str, Any]
    single: bool
    about: Mapping[str, Any] = field(default_factory=dict)


def load_source(
    source: "str | Path | Dataset | DatasetDict | Source",
    *,
    name: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    scored: bool = False,
) -> Source:
    """Reads a source and checks that its rows can be recycled.

    Args:
        source: A Hub id, a folder, a `.json`, `.jsonl`, `.parquet` or `.csv` file, a `Dataset`, a `DatasetDict`, or a
            source already.
        name: The configuration, where a Hub dataset or a folder has several.
        split: Only this split; by default all of them.
        limit: Only the first so many rows of each split.
        scored: Whether it may have columns of ours already.

    Raises:
        SourceError: it can't be read, has no such split, or has columns of ours.
        UnknownFormatError: its columns fit no row format.
    """
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(source, IterableDataset | IterableDatasetDict):
        raise SourceError("a streaming dataset has no end to write: map the transforms over it yourself, or load it.")
    loaded: Any
    if isinstance(source, Source):
        loaded, provenance, about = DatasetDict(source.splits), dict(source.provenance), source.about
    elif isinstance(source, str | Path):
        loaded, provenance = _load(source, name)
        about = _about(str(source))
    else:
        loaded, provenance, about = source, {"path": "in memory", "fingerprint": _fingerprint(source)}, {}
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {_split_name(loaded): loaded}
    if split is not None:
        if split not in splits:
            raise SourceError(f"{source}: there is no split {split!r}; it has {', '.join(splits)}.")
        splits = {split: splits[split]}
    if limit is not None:
        splits = {key: rows.select(range(min(limit, len(rows)))) for key, rows in splits.items()}
    for rows in splits.values():
        if not scored:
            check_columns(rows.column_names)
    return Source(splits, provenance, split is not None or isinstance(loaded, Dataset), about)


def check_columns(columns: list[str]) -> RowFormat:
    """The row format of a source.

    Raises:
        SourceError: it has columns with the names of ours.
        UnknownFormatError: it has none of the formats.
    """
    row_format = recognise(columns)
    taken = [column for column in columns if column in TYPES]
    if taken:
        recycled = " It looks recycled already." if set(DEFAULT) <= set(taken) else ""
        raise SourceError(
            f"the source has columns that recycling writes: {', '.join(taken)}.{recycled} Remove or rename them "
            f"first: dataset.remove_columns({taken})"
        )
    return row_format


def _load(source: str | Path, name: str | None) -> tuple[Any, dict[str, Any]]:
    import yaml
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    path = Path(source).expanduser()
    try:
        if path.is_file():
            if not path.stat().st_size:
                raise SourceError(f"{source}: the file is empty.")
            builder = _BUILDERS.get(path.suffix.lower())
            if builder is None:
                raise SourceError(f"{source}: not a .json, .jsonl, .parquet or .csv file.")
            loaded = load_dataset(builder, data_files={"train": str(path)})
            return loaded, {"path": str(source), "content": content_hash(path)}
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
            saved = any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json"))
            loaded = load_from_disk(str(path)) if saved else load_dataset(str(path), name)
            return loaded, {"path": str(source), "name": name, "content": content_hash(*files)}
        if not _may_be_hub_id(str(source)):
            raise SourceError(f"{source}: there is no such file or folder.")
        loaded = load_dataset(str(source), name)
        return loaded, {"path": str(source), "name": name, "revision": _revision(loaded)}
    except (
        DatasetsError,
        HfHubHTTPError,
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
        StopIteration,
        yaml.YAMLError,
    ) as error:
        raise SourceError(f"{source}: can't be read: {_first_line(error)}") from error


_ABOUT = ("license", "license_name", "license_link", "language", "pretty_name", "multilinguality")


def _about(source: str) -> dict[str, Any]:
    """What the card of a folder or of a dataset on the Hub says; nothing where there is no card to be had."""
    import yaml
    from huggingface_hub import DatasetCard
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    path = Path(source).expanduser()
    card = path / "README.md" if path.is_dir() else None
    if path.is_file() or (card is not None and not card.is_file()):
        return {}
    try:
        said = DatasetCard.load(card or source, ignore_metadata_errors=True).data.to_dict()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, yaml.YAMLError):
        return {}
    languages = said.get("language")
    if languages is False:  # YAML takes Norwegian for a negation
        said["language"] = "no"
    elif isinstance(languages, list):
        said["language"] = ["no" if language is False else language for language in languages]
    return {key: said[key] for key in _ABOUT if said.get(key)}


def _may_be_hub_id(source: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return Path(source).suffix.lower() not in _BUILDERS and not source.startswith((".", "/", "~"))


def _revision(loaded: Any) -> str | None:
    for rows in loaded.values():
        for url in rows.info.download_checksums or {}:
            if "@" in url:
                return str(url.split("@", 1)[1].split("/", 1)[0])
    return None


def _split_name(dataset: "Dataset") -> str:
    name = str(dataset.split)  # may be a slice such as train[:10]
    return name if dataset.split is not None and name.replace(".", "_").isidentifier() else "train"


def _fingerprint(dataset: Any) -> Any:
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return dataset._fingerprint
    return {split: rows._fingerprint for split, rows in dataset.items()}


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if error.__cause__ is not None and "occurred while generating" in str(error) else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
