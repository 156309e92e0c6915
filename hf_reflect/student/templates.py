"""How a pair becomes the text that the student scores.

A template is text: the prompt that precedes a response, and for r-IFD the query that precedes a question. Text is
inserted, never evaluated. A base model finds the plain layout (`none`) least strange; an unfamiliar template makes
responses look harder than they are (2308.12032's authors, in the issues of their repository).
"""

import hashlib
import os.path
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from hf_reflect.errors import StudentError
from hf_reflect.pairs import Pair, Turn


REQUEST = "What instruction was this text written for?"
"""The short request that follows a response in the reversed layout."""

_PLACEHOLDER = re.compile(r"\{(instruction|input|output)\}")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Scored:
    """A target text and the text that conditions it."""

    prefix: str
    target: str


class Template(Protocol):
    """A layout for both scores.

    Attributes:
        name: What the recipe calls it; two templates with the same name are the same.
    """

    @property
    def name(self) -> str: ...

    def forward(self, pair: Pair) -> Scored:
        """The response after its question, for IFD."""
        ...

    def reverse(self, pair: Pair) -> Scored:
        """The question (instruction with its input) after its response, for r-IFD."""
        ...


@dataclass(frozen=True)
class TextTemplate:
    """A template of three texts with the placeholders `{instruction}`, `{input}` and `{output}`.

    Attributes:
        name: What the recipe calls it.
        prompt: Precedes a response.
        prompt_input: Likewise, where the pair has an input.
        reverse_prompt: Precedes a question; the response is its `{output}`.
    """

    name: str
    prompt: str
    prompt_input: str
    reverse_prompt: str

    def to_dict(self) -> dict[str, str]:
        """The arguments that make this template again."""
        return asdict(self)

    def forward(self, pair: Pair) -> Scored:
        # Earlier turns condition the response just as the instruction does.
        earlier = "".join(f"{turn.content}\n" for turn in pair.context)
        return Scored(earlier + _fill(self.prompt_input if pair.input else self.prompt, pair), pair.response)

    def reverse(self, pair: Pair) -> Scored:
        return Scored(_fill(self.reverse_prompt, pair), pair.question)


_ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_ALPACA_INPUT = ", paired with an input that provides further context"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

BUILT_IN = {
    template.name: template
    for template in (
        TextTemplate("none", "{instruction}\n", "{instruction}\n{input}\n", f"{{output}}\n{REQUEST}\n"),
        TextTemplate(
            "alpaca",
            _ALPACA.format("") + "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
            _ALPACA.format(_ALPACA_INPUT)
            + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
            _ALPACA.format("") + f"\n\n### Instruction:\n{{output}}\n{REQUEST}\n\n### Response:\n",
        ),
        TextTemplate(
            "vicuna",
            _VICUNA + " USER: {instruction} ASSISTANT: ",
            _VICUNA + " USER: {instruction}\n{input} ASSISTANT: ",
            _VICUNA + f" USER: {{output}}\n{REQUEST} ASSISTANT: ",
        ),
    )
}


class ChatTemplate:
    """The student's own chat template.

    Most templates don't mark what the model writes, so where an answer begins is found by rendering two different
    answers: what both renderings share comes before it.

    Args:
        tokenizer: The student's tokenizer.
        bos: Whether the scorer puts a BOS in front itself.

    Raises:
        StudentError: the tokenizer has no chat template.
    """

    name = "chat"

    def __init__(self, tokenizer: Any, bos: bool) -> None:
        if not tokenizer.chat_template:
            raise StudentError("template chat: the student's tokenizer has no chat template; use none, or a file.")
        self.tokenizer = tokenizer
        self._front = tokenizer.bos_token if bos else None

    def forward(self, pair: Pair) -> Scored:
        return Scored(self._prefix((*pair.context, Turn("user", pair.question))), pair.response)

    def reverse(self, pair: Pair) -> Scored:
        return Scored(self._prefix((Turn("user", f"{pair.response}\n{REQUEST}"),)), pair.question)

    def _prefix(self, turns: tuple[Turn, ...]) -> str:
        messages = [{"role": _ROLES.get(turn.role, turn.role), "content": turn.content} for turn in turns]
        renderings = [
            self.tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
            for answer in ("A", "B")
        ]
        prefix = str(os.path.commonprefix(renderings))  # noqa: RUF071 (character by character is what is wanted)
        return prefix.removeprefix(self._front) if self._front else prefix


def load_template(spec: str | Path) -> TextTemplate:
    """A built-in template of texts, or a user's YAML file with the keys `prompt`, `prompt_input` and `reverse`.

    Raises:
        StudentError: no such template or file, or a key is missing.
    """
    if spec in BUILT_IN:
        return BUILT_IN[str(spec)]
    import yaml

    try:
        data = yaml.safe_load(Path(spec).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        known = ", ".join([*BUILT_IN, "chat"])
        raise StudentError(f"template {spec}: neither one of {known} nor a readable YAML file: {error}") from error
    keys = ("prompt", "prompt_input", "reverse")
    missing = [key for key in keys if not isinstance(data, Mapping) or not isinstance(data.get(key), str)]
    if missing:
        raise StudentError(f"template {spec}: {', '.join(missing)} missing or not text.")
    texts = [data[key] for key in keys]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]
    return TextTemplate(f"{Path(spec).stem}/{digest}", *texts)


def _fill(text: str, pair: Pair) -> str:
    values = {"instruction": pair.instruction, "input": pair.input, "output": pair.response}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)
