"""What a rewrite must not do: checks that look at the texts alone, before the student has a say."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from hf_reflect.embeddings import MODEL, load_embedder
from hf_reflect.errors import RecipeError
from hf_reflect.pairs import Pair


Guard = Literal["language", "code", "copy", "length", "similarity"]
GUARDS: tuple[str, ...] = get_args(Guard)
DEFAULT_GUARDS: tuple[Guard, ...] = ("language", "code", "copy")

Status = Literal["language_changed", "code_lost", "copied", "too_short", "too_long", "unrelated"]
Finding = tuple[Status, str]

_FENCE = re.compile(r"^[ \t]*(```|~~~)", re.MULTILINE)
_NO_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`]*`|https?://\S+", re.DOTALL)
_ENOUGH_LETTERS = 60
_IMPOSSIBLE = 0.01


@dataclass(frozen=True)
class Guards:
    """Which checks are made, and their thresholds.

    Attributes:
        names: Of `language` (the rewrite is in another language), `code` (it lost the code block), `copy` (it
            answers with the question, or with the critique), which are made by default; `length` (the response is
            shorter than half the original, or much longer) and `similarity` (the instruction asks for something
            unrelated; needs the extra `coherence`).
        longest: How many times as long as the original a response may be, in characters.
        similarity: The least cosine of the sentence embeddings of the original and the new instruction.
        embeddings: The sentence-transformers model, as a Hub id or a folder.

    Raises:
        RecipeError: there is no such guard.
    """

    names: tuple[Guard, ...] = DEFAULT_GUARDS
    longest: float = 10.0
    similarity: float = 0.3
    embeddings: str = MODEL

    def __post_init__(self) -> None:
        if unknown := set(self.names) - set(GUARDS):
            raise RecipeError(f"guards: there is no {', '.join(sorted(unknown))}; known are {', '.join(GUARDS)}.")
        object.__setattr__(self, "names", tuple(name for name in GUARDS if name in self.names))
        if "similarity" in self.names:
            load_embedder(self.embeddings)  # a missing extra is said at once

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Guards":
        """Guards from what a recipe holds.

        Raises:
            RecipeError: it is no description of guards.
        """
        names = data.get("names", DEFAULT_GUARDS)
        sound = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        kinds = {"longest": int | float, "similarity": int | float, "embeddings": str}
        sound = sound and all(isinstance(data[key], kind) for key, kind in kinds.items() if key in data)
        if not sound or set(data) - {"names", *kinds}:
            raise RecipeError(f"guards: can't be read: {dict(data)}")
        return cls(**{**data, "names": tuple(names)})

    def to_dict(self) -> dict[str, Any]:
        """All that decides a finding, as JSON-able values."""
        settings: dict[str, Any] = {"names": list(self.names)}
        if "length" in self.names:
            settings["longest"] = self.longest
        if "similarity" in self.names:
            settings |= {"similarity": self.similarity, "embeddings": self.embeddings}
        return settings

    def check(self, before: Pair, after: Pair, critique: str | None) -> Finding | None:
        """What is wrong with a rewrite; null if nothing is.

        Args:
            before: The pair that was reflected on.
            after: The pair that was proposed; the instruction is the same in the response phase.
            critique: What the oracle wrote before the rewrite.
        """
        for name in self.names:
            if finding := _CHECKS[name](self, before, after, critique or ""):
                return finding
        return None


def _language(guards: Guards, before: Pair, after: Pair, critique: str) -> Finding | None:
    for part in ("question", "response"):
        if part == "response" and after.question != before.question:
            continue  # another instruction may well ask for another language
        old, new = languages(getattr(before, part)), languages(getattr(after, part))
        if old and new and _other(old, new) and _other(new, old):
            what = "instruction" if part == "question" else "response"
            return "language_changed", f"the {what} was in {_first(old)} and is now in {_first(new)}"
    return None


def _code(guards: Guards, before: Pair, after: Pair, critique: str) -> Finding | None:
    if after.question != before.question:
        return None  # another instruction may well ask for something else
    if _FENCE.search(before.response) and not _FENCE.search(after.response):
        return "code_lost", "the response had a code block and has none now"
    return None


def _copy(guards: Guards, before: Pair, after: Pair, critique: str) -> Finding | None:
    response = _flat(after.response)
    sources = {"the instruction": after.instruction, "the original instruction": before.instruction}
    sources |= {"the critique": critique, "the input": after.input}
    for what, text in sources.items():
        if response == _flat(text) != _flat(before.response):
            return "copied", f"the new response is {what}, word for word"
    if after.instruction != before.instruction and _flat(after.instruction) == _flat(before.response):
        return "copied", "the new instruction is the original response, word for word"
    return None


def _length(guards: Guards, before: Pair, after: Pair, critique: str) -> Finding | None:
    old, new = len(before.response), len(after.response)
    if old and new < old / 2:
        return "too_short", f"the response shrank from {old} to {new} characters"
    if old and new > old * guards.longest:
        return "too_long", f"the response grew from {old} to {new} characters"
    return None


def _similarity(guards: Guards, before: Pair, after: Pair, critique: str) -> Finding | None:
    if after.question == before.question:
        return None
    old, new = load_embedder(guards.embeddings)([before.question, after.question])
    cosine = float(old @ new)
    if cosine < guards.similarity:
        return "unrelated", f"the new instruction is unlike the original (cosine {cosine:.2f})"
    return None


_CHECKS: dict[str, Callable[[Guards, Pair, Pair, str], Finding | None]] = {
    "language": _language,
    "code": _code,
    "copy": _copy,
    "length": _length,
    "similarity": _similarity,
}


def languages(text: str) -> dict[str, float] | None:
    """The probability of each language (ISO 639-1) of a text, code aside; null where it is too short to tell."""
    prose = _NO_PROSE.sub(" ", text)
    if sum(character.isalpha() for character in prose) < _ENOUGH_LETTERS:
        return None
    return {str(name): float(probability) for name, probability in _identifier().rank(prose)}


def _other(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether a text is certainly not in the likeliest language of another."""
    return one[_first(other)] < _IMPOSSIBLE


def _first(found: Mapping[str, float]) -> str:
    return max(found, key=lambda name: found[name])


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _flat(text: str) -> str:
    return " ".join(text.split())
