"""Reading an oracle's reply: markers, JSON, refusals. Pure functions over text."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_reflect.prompts import Phase


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What a reply proposes. `unchanged` means the oracle found nothing to better."""

    critique: str | None = None
    instruction: str | None = None
    input: str = ""
    response: str | None = None
    unchanged: bool = False


_NAMES = r"New[ ]Instruction|New[ ]Input|New[ ]Response|Unchanged|End"
# A marker stands at the start of a line, perhaps dressed in markdown or numbered: `2. **[New Response]**:`
_MARKER = re.compile(rf"^[ \t>*_#`\-\d.():]*\[[ \t]*({_NAMES})[ \t]*\][*_`:]*[ \t]*", re.IGNORECASE | re.MULTILINE)
_INLINE = re.compile(rf"[*_`]*\[[ \t]*({_NAMES})[ \t]*\][*_`:]*[ \t]*", re.IGNORECASE)
_END_OF_LINE = re.compile(r"\[[ \t]*End[ \t]*\][*_` \t]*$", re.IGNORECASE | re.MULTILINE)

_CANNOT = r"i(?:['’]m| am)? ?(?:can(?:['’]t|not)|(?:am )?(?:unable|not able) to|won['’]t|must decline)"
_REFUSAL = re.compile(
    rf"^\W*(?:(?:i(?:['’]m| am) (?:very |really |so )?)?sorry,?(?: but)? {_CANNOT}"
    r"|i (?:can(?:['’]t|not)|(?:am )?(?:unable|not able) to|must decline to|won['’]t) "
    r"(?:assist|help(?! but)|comply|fulfil+|provide|answer|do that|create|write|rewrite|review)"
    rf"|as an ai(?: language)?(?: model)?,? {_CANNOT})",
    re.IGNORECASE,
)

_ALREADY_GOOD = re.compile(r"\W*already\s+good\W*", re.IGNORECASE)


_THINKING = re.compile(r"\s*(?:<(think|thinking|reasoning)>|\[(THINK)\])", re.IGNORECASE)
_THOUGHT = re.compile(r"(?:</(?:think|thinking|reasoning)>|\[/THINK\])[ \t]*(?:\n\s*|$)", re.IGNORECASE)


def split_thinking(text: str) -> tuple[str | None, str]:
    """What a reasoning model thought first, and its answer; a reply cut off in mid-thought has an empty answer.

    Some chat templates open the thought themselves, so a reply may begin within it and only close it.
    """
    opened = _THINKING.match(text)
    if opened:
        tag = opened[1] or opened[2]
        close = re.search(rf"</{tag}>|\[/{tag}\]", text, re.IGNORECASE)
        if close is None:
            return text[opened.end() :].strip(), ""
        return text[opened.end() : close.start()].strip(), text[close.end() :].lstrip()
    closed = _THOUGHT.search(text)
    if closed is None or re.search(r"<(?:think|thinking|reasoning)>|\[THINK\]", text[: closed.start()], re.IGNORECASE):
        return None, text
    return text[: closed.start()].strip(), text[closed.end() :]


def is_refusal(text: str) -> bool:
    """Whether a text opens by declining to do what it was asked."""
    return _REFUSAL.match(text) is not None


def says_already_good(text: str) -> bool:
    """Whether a staged critique is the agreed phrase for a pair that needs no change."""
    return _ALREADY_GOOD.fullmatch(text) is not None


def parse_markers(text: str, phase: Phase) -> Rewrite | None:
    """Reads the `paper` layout, leniently; null if no complete rewrite is found.

    A missing end marker, markdown around markers and repeated markers are forgiven. Markers inside a line count only
    if no line begins with one, and only where an end marker closes them: prose may well speak of a marker. What is
    never done is to pair an instruction with a response that was not written for it.
    """
    text = text.replace("\r\n", "\n")
    return _assemble(list(_blocks(text, _MARKER)), phase) or _assemble(list(_closed(_blocks(text, _INLINE))), phase)


_Block = tuple[str, str, str | None]
"""A marker's name, the text up to the next marker, and that one's name. The first block is what precedes them all."""


def _blocks(text: str, marker: re.Pattern[str]) -> Iterator[_Block]:
    name, start = "critique", 0
    for mark in marker.finditer(text):
        following = mark[1].lower().replace(" ", "_")
        yield name, text[start : mark.start()], following
        name, start = following, mark.end()
    yield name, text[start:], None


def _closed(blocks: Iterator[_Block]) -> Iterator[_Block]:
    for name, body, following in blocks:
        ends_its_line = body.partition("\n")[0].strip() == ""
        if name == "critique" or following == "end" or (name == "unchanged" and ends_its_line):
            yield name, body, following


def _assemble(blocks: list[_Block], phase: Phase) -> Rewrite | None:
    critique: str | None = None
    instruction: str | None = None
    input, found, names = "", None, {name for name, *_ in blocks}
    if phase == "response" and "new_instruction" in names:
        return None  # whatever it answers, it is not the instruction it was asked about
    for name, body, _ in blocks:
        body = _END_OF_LINE.split(body)[0].strip()
        if name == "critique":
            critique = body or None
        elif name == "new_instruction" and body:
            instruction, input = body, ""
        elif name == "new_input" and instruction:
            input = body
        elif name == "new_response" and body and (instruction or phase == "response"):
            found = Rewrite(critique, instruction, input, body)
            instruction = None  # answered: a further response would have no instruction of its own
    if found is None and "unchanged" in names:
        return Rewrite(critique, unchanged=True)
    return found


def parse_json(text: str, phase: Phase) -> Rewrite | None:
    """Reads the `json` layout; null if the reply holds no object of that shape."""
    data = next((d for d in _objects(text) if d.get("already_good") is True or "new_response" in d), None)
    if data is None:
        return None
    critique = _string(data, "critique")
    if data.get("already_good") is True:
        return Rewrite(critique, unchanged=True)
    instruction, response = _string(data, "new_instruction"), _string(data, "new_response")
    if response is None or (instruction is None) != (phase == "response"):
        return None
    if phase == "response":
        return Rewrite(critique, response=response)
    if not isinstance(data.get("new_input", ""), str | None):
        return None  # material that can't be read must not get lost
    return Rewrite(critique, instruction, _string(data, "new_input") or "", response)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object in a text, whatever stands around it."""
    decoder = json.JSONDecoder(strict=False)
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def _string(data: dict[str, Any], key: str) -> str | None:
    value = data.get(key)
    return value.strip() or None if isinstance(value, str) else None


_LABEL = re.compile(r"^\W*(?:here(?: is|['’]s) (?:a|the) )?(?:new|better|improved|rewritten|revised) "
                    r"(?:version of the )?(?:instruction|response)\W*:\W*?(?:\s|$)", re.IGNORECASE)  # fmt: skip
_QUOTES = {'"': '"', "“": "”", "'": "'", "«": "»"}


def undress(text: str) -> str:
    """A staged reply without the label or the quotation marks that small models wrap it in."""
    text = _LABEL.sub("", text.strip(), count=1).strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1] and text[-1] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def json_schema(phase: Phase) -> dict[str, Any]:
    """The schema of a `json` reply, for the server's structured output."""
    texts = ["critique", "new_response"]
    if phase == "instruction":
        texts[1:1] = ["new_instruction", "new_input"]
    properties: dict[str, Any] = {name: {"type": "string"} for name in texts}
    properties = {"critique": properties.pop("critique"), "already_good": {"type": "boolean"}, **properties}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
