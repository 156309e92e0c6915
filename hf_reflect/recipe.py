"""All that decides the result of a run, as YAML."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hf_reflect.errors import RecipeError
from hf_reflect.oracles.base import canonical


FILE = "recipe.yaml"

_REQUIRED = ("source", "method", "keep", "gate_first", "oracles")


class Manifest(Protocol):
    """What an output folder says of its making."""

    @property
    def hash(self) -> str:
        """The same for two runs whose results must be the same."""
        ...

    def to_yaml(self) -> str:
        """The text of `recipe.yaml`."""
        ...


@dataclass(frozen=True)
class TaskRecipe:
    """The recipe of a task without an oracle.

    Attributes:
        task: `score` or `select`.
        settings: All that decides the result.
        version: Of this package.
    """

    task: str
    settings: Mapping[str, Any]
    version: str

    @property
    def hash(self) -> str:
        return _hash({"task": self.task, **self.settings})

    def to_yaml(self) -> str:
        return _dump({"hf_reflect": self.version, "hash": self.hash, "task": self.task, **self.settings})


def read_task(folder: Path) -> TaskRecipe | None:
    """The recipe of a task without an oracle in a folder; null if there is none, or one of another kind."""
    import yaml

    try:
        data = yaml.safe_load((folder / FILE).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(data, Mapping) or "task" not in data:
        return None
    settings = {name: value for name, value in data.items() if name not in ("hf_reflect", "hash", "task")}
    return TaskRecipe(str(data["task"]), settings, str(data.get("hf_reflect")))


def read_hash(folder: Path) -> str | None:
    """The hash in a folder's recipe; null if there is no recipe of ours."""
    import yaml

    try:
        data = yaml.safe_load((folder / FILE).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return str(data["hash"]) if isinstance(data, Mapping) and "hf_reflect" in data and "hash" in data else None


def _hash(decides: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(decides).encode()).hexdigest()[:16]


def _dump(data: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=110))


@dataclass(frozen=True)
class Recipe:
    """What was done to what, with what.

    Attributes:
        source: Path or Hub id, configuration, split, limit, and the content hash or revision it had.
        method: `selective` or `reflect`.
        keep: The policy for rows that were not recycled.
        gate_first: Whether the gate of IFD < 1 comes before the comparison.
        oracles: Of each its spec, its identity, the sampling parameters and the prompts, whole.
        student: Its spec and identity; null if nothing was scored.
        version: Of this package.
        guards: The checks that rewrites had to pass.
        retry_truncated: The room that a reply that was cut off got the second time; null for no second time.
        about: What the source's own card says of it (`license`, `language`, ...). Decides nothing.
    """

    source: Mapping[str, Any]
    method: str
    keep: str
    gate_first: bool
    oracles: Sequence[Mapping[str, Any]]
    student: Mapping[str, Any] | None
    version: str
    guards: Mapping[str, Any] = field(default_factory=dict)
    retry_truncated: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """The same for two runs whose results must be the same. Paths, specs and versions don't count."""
        source = {name: value for name, value in self.source.items() if name != "path"}
        decides = {
            "source": source,
            "method": self.method,
            "keep": self.keep,
            "gate_first": self.gate_first,
            "oracles": [_without_spec(oracle) for oracle in self.oracles],
            "guards": self.guards,
            "retry_truncated": self.retry_truncated,
            "student": self.student and _without_spec(self.student),
        }
        return _hash(decides)

    def to_yaml(self) -> str:
        """The text of `recipe.yaml`."""
        data = {
            "hf_reflect": self.version,
            "hash": self.hash,
            "source": dict(self.source),
            "method": self.method,
            "keep": self.keep,
            "gate_first": self.gate_first,
            "guards": dict(self.guards),
            "retry_truncated": self.retry_truncated,
            "student": None if self.student is None else dict(self.student),
            "about": dict(self.about),
            "oracles": [dict(oracle) for oracle in self.oracles],
        }
        return _dump(data)

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """The recipe in a file, or in a folder that a run wrote.

        Raises:
            RecipeError: there is none, or it lacks something.
        """
        import yaml

        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.exists():
            raise RecipeError(
                f"{path}: there is no result of a run in it."
                if Path(path).is_dir()
                else f"{path}: there is no such folder or file, so there is no result of a run."
            )
        if (task := read_task(file.parent)) is not None and file.name == FILE:
            raise RecipeError(f"{path}: was written by `{task.task}`; this needs the result of a run of `recycle`.")
        try:
            data = yaml.safe_load(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"recipe {file}: can't be read: {' '.join(str(error).split())}") from error
        if not isinstance(data, Mapping):
            raise RecipeError(f"recipe {file}: not a recipe")
        _check(data, str(file))
        rest = {name: data[name] for name in _REQUIRED}
        return cls(
            **rest,
            student=data.get("student"),
            version=str(data.get("hf_reflect")),
            guards=data.get("guards") or {},
            retry_truncated=data.get("retry_truncated"),
            about=data.get("about") or {},
        )


def _check(data: Mapping[str, Any], file: str) -> None:
    """Refuses what is no recipe, saying what is wrong."""
    if missing := [name for name in _REQUIRED if name not in data]:
        raise RecipeError(f"recipe {file}: lacks {', '.join(missing)}")
    for name in ("source", "student", "guards"):
        if not isinstance(data.get(name, {}), Mapping) and not (name == "student" and data["student"] is None):
            raise RecipeError(f"recipe {file}: {name} is not a mapping")
    retry = data.get("retry_truncated")
    if retry is not None and (not isinstance(retry, int) or isinstance(retry, bool) or retry < 1):
        raise RecipeError(f"recipe {file}: retry_truncated is not a number of tokens")
    if not isinstance(data["oracles"], list) or not data["oracles"]:
        raise RecipeError(f"recipe {file}: oracles is not a list")
    for oracle in data["oracles"]:
        parts = (
            [oracle.get(part) for part in ("identity", "sampling", "prompts")] if isinstance(oracle, Mapping) else []
        )
        if not parts or not all(isinstance(part, Mapping) for part in parts):
            raise RecipeError(f"recipe {file}: an oracle lacks its identity, sampling or prompts")


def _without_spec(model: Mapping[str, Any]) -> dict[str, Any]:
    """What determines a model's answers: not where it was found, nor what it is called."""
    return {name: value for name, value in model.items() if name not in ("spec", "name")}
