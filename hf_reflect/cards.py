"""The dataset card: a template filled with the facts of a run.

Text that comes from data or from a model is escaped where it is inserted.
"""

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from hf_reflect.output import DataFiles
from hf_reflect.recipe import Recipe
from hf_reflect.summary import Summary


TEMPLATE = "dataset_card.md.jinja"
PLAIN_TEMPLATE = "plain_card.md.jinja"


def render_card(recipe: Recipe, summary: Summary, data_files: DataFiles, title: str, location: str) -> str:
    """The text of README.md.

    Args:
        recipe: What was done.
        summary: What came of it.
        data_files: The file of each config and split.
        title: What the dataset is called.
        location: What `load_dataset` finds it by.
    """
    prompts = [oracle["prompts"] for oracle in recipe.oracles]
    return _render(
        TEMPLATE,
        metadata=_yaml(_metadata(data_files, summary.rows)),
        title=title,
        location=location,
        source=recipe.source["path"],
        method=recipe.method,
        keep=recipe.keep,
        oracle=", ".join(dict.fromkeys(str(oracle["identity"].get("model")) for oracle in recipe.oracles)),
        student=recipe.student and recipe.student["identity"]["model"],
        prompts=", ".join(dict.fromkeys(f"{p['name']} version {p['version']}" for p in prompts)),
        recipe_hash=recipe.hash,
        rows=summary.rows,
        kept=summary.kept,
        recycled=sorted(summary.recycled.items()),
        means=[(quantity, *pair) for quantity, pair in means_table(summary)],
    )


def render_plain_card(title: str, data_files: DataFiles, rows: int, location: str, settings: Mapping[str, Any]) -> str:
    """The README.md of a folder that was made without an oracle.

    Args:
        title: What it is.
        data_files: The file of each config and split.
        rows: How many rows it has.
        location: What `load_dataset` finds it by.
        settings: All that decided the result.
    """
    return _render(
        PLAIN_TEMPLATE,
        metadata=_yaml(_metadata(data_files, rows)),
        title=title,
        location=location,
        settings=_yaml(settings),
    )


def _render(template: str, **facts: Any) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters |= {"cell": cell, "literal": literal, "indented": indented}
    text = (files("hf_reflect.card_templates") / template).read_text("utf-8")
    return environment.from_string(text).render(**facts)


def _yaml(data: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)).strip()


def literal(text: str) -> str:
    """A text as a Python string literal on one line."""
    return json.dumps(text, ensure_ascii=False)


def indented(text: str) -> str:
    """A text as a Markdown code block, which nothing in it can close."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def cell(text: Any) -> str:
    """A text that can stand in a Markdown table or heading and changes nothing around it."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#&~$!])", lambda match: f"&#{ord(match[1])};", flat)


def means_table(summary: Summary) -> list[tuple[str, tuple[str, str]]]:
    """Means before and after, by quantity, as text."""
    quantities = list(dict.fromkeys(quantity for quantity, _ in summary.means))
    return [(q, (_shown(summary, q, "before"), _shown(summary, q, "after"))) for q in quantities]


def _shown(summary: Summary, quantity: str, when: str) -> str:
    mean = summary.means.get((quantity, when))
    if mean is None or mean.value is None:
        return "–"
    digits = 3 if "ifd" in quantity else 0
    return f"{mean.value:.{digits}f} (n={mean.n})"


def _metadata(data_files: DataFiles, rows: int) -> dict[str, Any]:
    configs = [
        {
            "config_name": config,
            "data_files": [{"split": split, "path": path} for split, path in splits.items()],
        }
        for config, splits in data_files.items()
    ]
    return {
        "tags": ["reflection-tuning", "synthetic", "hf-reflect"] if "reflections" in data_files else ["hf-reflect"],
        "task_categories": ["text-generation"],
        "size_categories": [_size_category(rows)],
        "configs": [
            {**config, "default": True} if config["config_name"] == "default" else config for config in configs
        ],
    }


def _size_category(rows: int) -> str:
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    sizes = [10**power for power in range(3, 13)]
    if rows < sizes[0]:
        return "n<1K"
    for low, high, size in zip(bounds, bounds[1:], sizes[1:], strict=False):
        if rows < size:
            return f"{low}<n<{high}"
    return "n>1T"
