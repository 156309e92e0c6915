"""The dataset card: a template filled with the facts of a run.

Text that comes from data or from a model is escaped where it is inserted.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_reflect.describing import Description
from hf_reflect.errors import CardError
from hf_reflect.output import DataFiles, split_order
from hf_reflect.pairs import RowFormat, TextColumns, recognise
from hf_reflect.plotting import Caption, captions
from hf_reflect.prompts import PHASES
from hf_reflect.recipe import FILE, Recipe
from hf_reflect.summary import Summary, final_pair


TEMPLATE = "dataset_card.md.jinja"
PLAIN_TEMPLATE = "plain_card.md.jinja"

_LONGEST_TEXT = 800
_MOST_REASONS = 12
_EXAMPLES = ("both", "response", "instruction", "rejected")
_CONFIGS = {
    "preference": "`prompt`, `chosen` (the rewrite that the student kept) and `rejected` (the response it displaced)",
    "selected": "the rows with the highest IFD",
}


@dataclass(frozen=True)
class CardData:
    """All that a card says.

    Attributes:
        recipe: What was done.
        summary: What came of it.
        data_files: The file of each config and split.
        title: What the dataset is called.
        location: What `load_dataset` finds it by.
        beside: Configs made on demand that are there already.
        pictures: What the pictures beside the card show.
        extra: What is added to the metadata.
    """

    recipe: Recipe
    summary: Summary
    data_files: DataFiles
    title: str
    location: str
    beside: tuple[str, ...] = ()
    pictures: tuple[Caption, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, folder: str | Path, location: str | None = None) -> "CardData":
        """The card data of a folder that a run wrote, read again from what it holds.

        Raises:
            RecipeError: there is no result of a run.
        """
        path = Path(folder)
        recipe = Recipe.read(path)
        found: DataFiles = {}
        for config, name in (("default", "data"), ("reflections", "reflections")):
            for file in sorted((path / name).glob("*.parquet"), key=lambda file: split_order(file.name.split("-")[0])):
                found.setdefault(config, {})[file.name.split("-")[0]] = f"{name}/{file.name}"
        data = cls(recipe, Summary.of_folder(path), found, path.resolve().name, location or str(folder))
        drawn = [caption for caption in captions(data.description) if (path / caption.path).is_file()]
        return replace(data, pictures=tuple(drawn))

    @property
    def metadata(self) -> dict[str, Any]:
        """The YAML at the top, as the Hub validates it."""
        about = self.recipe.about
        source = str(self.recipe.source.get("path"))
        on_hub = self.recipe.source.get("revision") is not None
        facts = {
            "license": about.get("license", "unknown"),
            "license_name": about.get("license_name"),
            "license_link": about.get("license_link"),
            "language": about.get("language"),
            "tags": ["reflection-tuning", "synthetic", "hf-reflect", "trl"],
            "annotations_creators": ["machine-generated"],
            "source_datasets": [source] if on_hub else None,
            "task_categories": ["text-generation"],
            "size_categories": [size_category(self.summary.kept)],
            "configs": configs_of(self.data_files),
            "hf_reflect": {
                "recipe": self.recipe.hash,
                "version": self.recipe.version,
                "method": self.recipe.method,
                "oracles": self.oracles,
                "student": self.student,
            },
            **self.extra,
        }
        return {key: value for key, value in facts.items() if value is not None}

    @cached_property
    def description(self) -> Description:
        """The statistics of the run."""
        return Description.of(self.summary)

    @property
    def oracles(self) -> list[str]:
        """The models that reflected."""
        return list(dict.fromkeys(str(oracle["identity"].get("model")) for oracle in self.recipe.oracles))

    @property
    def student(self) -> str | None:
        """The model that decided."""
        return str(self.recipe.student["identity"]["model"]) if self.recipe.student else None

    @property
    def prompts(self) -> list[str]:
        """The prompts that the oracles were asked with."""
        prompts = [oracle["prompts"] for oracle in self.recipe.oracles]
        return list(dict.fromkeys(f"{p['name']} version {p['version']}" for p in prompts))

    @property
    def samplings(self) -> list[str]:
        """How the oracles sampled."""
        return list(dict.fromkeys(json.dumps(dict(oracle["sampling"])) for oracle in self.recipe.oracles))

    @property
    def examples(self) -> list[dict[str, Any]]:
        """The first row of each way a row can end, before and after."""
        chosen = [(name, self.summary.examples[name][1]) for name in _EXAMPLES if name in self.summary.examples]
        return [_example(name, row) for name, row in chosen]

    @property
    def columns_for_training(self) -> dict[str, str] | None:
        """What LLaMA-Factory calls the columns; null for conversations, which it takes as ShareGPT."""
        if not isinstance(format := self._format, TextColumns):
            return None
        names = {"prompt": format.instruction, "query": format.input, "response": format.response}
        return {key: name for key, name in names.items() if name}

    @property
    def _format(self) -> RowFormat:
        return recognise(self.summary.columns or ("instruction", "output"))

    @property
    def split(self) -> str:
        """The split that snippets show."""
        splits = list(self.data_files.get("default", {}))
        return "train" if "train" in splits or not splits else splits[0]

    @property
    def trl_takes(self) -> bool:
        """Whether TRL trains on the columns as they are."""
        return self._format.name in ("messages", "prompt-completion")

    @property
    def llama_factory(self) -> str:
        """An entry of LLaMA-Factory's `dataset_info.json`."""
        entry: dict[str, Any] = {"hf_hub_url": self.location}
        if self.split != "train":
            entry["split"] = self.split
        if (columns := self.columns_for_training) is not None:
            entry["columns"] = columns
        else:
            openai = self._format.name == "messages"
            entry |= {"formatting": "sharegpt", "columns": {"messages": "messages" if openai else "conversations"}}
            if openai:
                tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
                entry["tags"] = tags
        return _escaped(json.dumps({_key(self.title): entry}, indent=2, ensure_ascii=False))


def render_card(data: CardData, template: str | None = None) -> str:
    """The text of README.md.

    Args:
        data: All that it says.
        template: The text of another Jinja template; it gets `card` and `summary`.

    Raises:
        CardError: that template is broken.
    """
    summary = data.summary
    facts = {
        "metadata": _yaml(data.metadata),
        "card": data,
        "recipe": data.recipe,
        "summary": summary,
        "recycled": sorted(summary.recycled.items()),
        "statuses": sorted(summary.statuses.items()),
        "decisions": sorted(summary.decisions.items()),
        "reasons": sorted(summary.reasons.items(), key=lambda item: (-item[1], item[0]))[:_MOST_REASONS],
        "means": data.description.before_and_after(),
        "configs": [(name, what) for name, what in _CONFIGS.items() if name in {*data.data_files, *data.beside}],
        "split": data.split,
        "file": FILE,
    }
    if template is None:
        return _render(_template(TEMPLATE), **facts)
    from jinja2 import TemplateError

    try:
        return _render(template, **facts)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise CardError(f"card template: {type(error).__name__}: {' '.join(str(error).split())}") from error


def render_plain_card(title: str, data_files: DataFiles, rows: int, location: str, settings: Mapping[str, Any]) -> str:
    """The README.md of a folder that was made without an oracle.

    Args:
        title: What it is.
        data_files: The file of each config and split.
        rows: How many rows it has.
        location: What `load_dataset` finds it by.
        settings: All that decided the result.
    """
    metadata = {
        "tags": ["hf-reflect"],
        "task_categories": ["text-generation"],
        "size_categories": [size_category(rows)],
        "configs": configs_of(data_files),
    }
    return _render(
        _template(PLAIN_TEMPLATE),
        metadata=_yaml(metadata),
        title=title,
        location=location,
        settings=_yaml(settings),
    )


def _template(name: str) -> str:
    return (files("hf_reflect.card_templates") / name).read_text("utf-8")


def _render(template: str, **facts: Any) -> str:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters |= {"cell": cell, "literal": literal, "indented": indented, "bibtex": bibtex, "word": word}
    return environment.from_string(template).render(**facts)


def _yaml(data: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)).strip()


def literal(text: str) -> str:
    """A text as a Python string literal on one line."""
    return _escaped(json.dumps(text, ensure_ascii=False))


def _escaped(written: str) -> str:
    """JSON in which what can't be seen is spelt out."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in written)


def word(text: str) -> str:
    """A text as one word of a shell's command line, which is no option."""
    import shlex

    flat = _plain(text)
    return shlex.quote(f"./{flat}" if flat.startswith("-") else flat)


def bibtex(text: str) -> str:
    """A text that can stand in a BibTeX field inside a code block."""
    return " ".join(re.sub(r"[{}\\`]+", " ", _plain(text)).split())


def indented(text: str) -> str:
    """A text as a Markdown code block, which nothing in it can close."""
    shown = "".join(c if c == "\n" or c.isprintable() else " " for c in text)
    return "\n".join(f"    {line}" for line in shown.split("\n"))


def cell(text: Any) -> str:
    """A text that can stand in a Markdown table or heading and changes nothing around it."""
    flat = _clipped(_plain(text))
    return re.sub(r"([\\`*_{}\[\]<>|#&~$!])", lambda match: f"&#{ord(match[1])};", flat)


def _plain(text: Any) -> str:
    """A text on one line, without anything that steers a terminal or a page."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def configs_of(data_files: DataFiles) -> list[dict[str, Any]]:
    """The `configs` of a card's metadata, from which `load_dataset` finds the files."""
    configs: list[dict[str, Any]] = []
    for name, splits in data_files.items():
        found = [{"split": split, "path": path} for split, path in splits.items()]
        configs.append({"config_name": name, "data_files": found, **({"default": True} if name == "default" else {})})
    return configs


def size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    sizes = [10**power for power in range(3, 13)]
    if rows < sizes[0]:
        return "n<1K"
    for low, high, size in zip(bounds, bounds[1:], sizes[1:], strict=False):
        if rows < size:
            return f"{low}<n<{high}"
    return "n>1T"


def _example(ending: str, row: Mapping[str, Any]) -> dict[str, Any]:
    before, after = row["original"], final_pair(row)
    critiques = [
        f"({phase}) {reflection['critique']}"
        for phase in PHASES
        for reflection in row[f"{phase}_reflections"]
        if reflection.get("critique")
    ]
    proposed = [r["response"] for phase in PHASES for r in row[f"{phase}_reflections"] if r["status"] == "ok"]
    return {
        "ending": ending,
        "row": row["row_id"],
        "before": _text(before),
        "after": _text(after) if ending != "rejected" else _clipped(str(proposed[-1])),
        "critique": _clipped("\n".join(critiques)),
        "decisions": [f"{phase}: {row[f'{phase}_decision']['reason']}" for phase in PHASES],
        "scores": [
            (name, _value(before[key]), _value(row[f"{key}_score"]))
            for name, key in (("IFD", "ifd"), ("r-IFD", "rifd"))
        ],
    }


def _text(pair: Mapping[str, Any]) -> str:
    question = "\n".join(filter(None, (pair["instruction"], pair["input"])))
    return _clipped(f"{question}\n\n{pair['response']}")


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text)} characters in all)"


def _value(score: Mapping[str, Any] | None) -> str:
    return "–" if score is None or score["value"] is None else f"{score['value']:.3f}"


def _key(title: str) -> str:
    return re.sub(r"\W+", "_", title).strip("_") or "recycled"
