"""The reflection criteria and the prompts built from them.

Prompts are YAML files, the built-in ones like the user's own. Text is inserted, never evaluated: a placeholder such
as `{pair}` is replaced once, every other brace is left as it stands, and what was inserted is not looked at again.

The criteria are those of Reflection-Tuning (arXiv 2310.11716, section 3); the wording is ours.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from hf_reflect.errors import PromptError
from hf_reflect.pairs import Pair


Style = Literal["paper", "json", "staged"]
Phase = Literal["instruction", "response"]
STYLES: tuple[str, ...] = get_args(Style)
PHASES: tuple[str, ...] = get_args(Phase)

_PLACEHOLDER = re.compile(r"\{(pair|question|context|instruction|input|response|critique|new_instruction)\}")
_PARTS = {
    ("paper", "instruction"): ("user",),
    ("paper", "response"): ("user",),
    ("json", "instruction"): ("user",),
    ("json", "response"): ("user",),
    ("staged", "instruction"): ("critique", "instruction", "response"),
    ("staged", "response"): ("critique", "response"),
}


@dataclass(frozen=True)
class Prompts:
    """The texts an oracle is asked with.

    Attributes:
        name: A short name for reports.
        version: Changes whenever a text does.
        style: How the reply is laid out and read.
        texts: For each phase, its parts by name (`system` is optional).
    """

    name: str
    version: str
    style: Style
    texts: Mapping[str, Mapping[str, str]]

    @classmethod
    def load(cls, spec: "str | Path | Prompts") -> "Prompts":
        """The prompts of a built-in style, or of a user's YAML file.

        Raises:
            PromptError: no such style or file, or the file lacks a part that its style needs.
        """
        if isinstance(spec, Prompts):
            return spec
        if spec in STYLES:
            return cls._parse((files(__name__) / f"{spec}.yaml").read_text("utf-8"), str(spec))
        path = Path(spec)
        try:
            return cls._parse(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"prompts: {spec!s} is neither a style ({', '.join(STYLES)}) nor a readable file: {error}"
            ) from error

    @classmethod
    def _parse(cls, text: str, where: str) -> "Prompts":
        import yaml

        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PromptError(f"prompts: {where} is not YAML: {error}") from error
        return cls.from_dict(data, where)

    @classmethod
    def from_dict(cls, data: Any, where: str = "prompts") -> "Prompts":
        """Prompts from what a YAML file or a recipe holds.

        Raises:
            PromptError: a part is missing or not text.
        """
        if not isinstance(data, Mapping):
            raise PromptError(f"prompts: {where} must hold a mapping with style, instruction and response")
        style = data.get("style")
        if style not in STYLES:
            raise PromptError(f"prompts: {where}: style must be one of {', '.join(STYLES)}, not {style!r}")
        texts = {}
        for phase in PHASES:
            parts = data.get(phase)
            if not isinstance(parts, Mapping):
                raise PromptError(f"prompts: {where}: the phase {phase!r} is missing")
            needed = _PARTS[style, phase]
            for part in needed:
                if not isinstance(parts.get(part), str) or not parts[part].strip():
                    raise PromptError(f"prompts: {where}: {phase}.{part} is missing or not text (style {style})")
            texts[phase] = {p: str(parts[p]).strip() for p in ("system", *needed) if parts.get(p)}
        name, version = str(data.get("name") or Path(where).stem), str(data.get("version") or "1")
        return cls(name, version, style, texts)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        texts = {phase: dict(parts) for phase, parts in self.texts.items()}
        return {"name": self.name, "version": self.version, "style": self.style, **texts}

    @property
    def id(self) -> str:
        """What a report quotes and a recipe compares, made of name, version and a hash of the texts."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.name}/{self.version}/{digest}"

    def messages(self, phase: Phase, part: str, pair: Pair, values: Mapping[str, str]) -> tuple[dict[str, str], ...]:
        """The chat messages of one call, with the pair and any earlier results inserted as text."""
        parts = self.texts[phase]
        user = fill(parts[part], {**describe(pair), **values}).strip()
        system = [{"role": "system", "content": parts["system"]}] if "system" in parts else []
        return (*system, {"role": "user", "content": user})


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces the known placeholders of a template in one pass; inserted text is not scanned again."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def describe(pair: Pair) -> dict[str, str]:
    """What the placeholders of a pair stand for."""
    context = "\n".join(f"{turn.role}: {turn.content}" for turn in pair.context)
    blocks = [
        ("Conversation so far", context),
        ("Instruction", pair.instruction),
        ("Input", pair.input),
        ("Response", pair.response),
    ]
    shown = [f"### {title}\n{text}" for title, text in blocks if text or title == "Response"]
    return {
        "pair": "\n\n".join(shown),
        "question": "\n\n".join(shown[:-1]),
        "context": context,
        "instruction": pair.instruction,
        "input": pair.input,
        "response": pair.response,
    }
