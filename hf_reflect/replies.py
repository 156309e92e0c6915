"""Reading an oracle's reply: markers, JSON, refusals. Pure functions over text."""

import json
import re
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


# A marker stands at the start of a line, perhaps dressed in markdown or numbered: `2. **[New Response]**:`
_DRESS = r"[ \t>*_#`\-\d.():]*"
_NAMES = r"New[ ]Instruction|New[ ]Input|New[ ]Response|Unchanged|End"
_MARKER = re.compile(rf"^{_DRESS}\[[ \t]*({_NAMES})[ \t]*\][*_`: \t]*", re.IGNORECASE | re.MULTILINE)
# [End] also closes a block on its last line of text.
_ANYWHERE = re.compile(rf"[*_`]*\[[ \t]*({_NAMES})[ \t]*\][*_`: \t]*", re.IGNORECASE)

_REFUSAL = re.compile(
    r"^\W*(?:i(?:['’]m| am) (?:very |really |so )?sorry\b.{0,40}?\b(?:can(?:['’]t|not| not)|unable|not able)"
    r"|sorry,? (?:but )?i (?:can(?:['’]t|not)|am (?:unable|not able))"
    r"|i (?:can(?:['’]t|not)|am (?:unable|not able) to|must decline to|won['’]t) "
    r"(?:assist|help|comply|fulfil+|provide|answer|do that|create|write|rewrite|review)"
    r"|as an ai (?:language )?model,? i (?:can(?:['’]t|not)|am (?:unable|not able)))",
    re.IGNORECASE | re.DOTALL,
)

_ALREADY_GOOD = re.compile(r"^\W*already\s+good\b", re.IGNORECASE)


def is_refusal(text: str) -> bool:
    """Whether a text opens by declining to do what it was asked."""
    return _REFUSAL.match(text) is not None


def says_already_good(text: str) -> bool:
    """Whether a staged critique is the agreed phrase for a pair that needs no change."""
    return _ALREADY_GOOD.match(text) is not None


def parse_markers(text: str, phase: Phase) -> Rewrite | None:
    """Reads the `paper` layout, leniently; null if no complete rewrite is found.

    A missing end marker, markdown around markers and repeated markers are forgiven. What is never done is to pair a
    new instruction with a response that was not written for it: a new instruction counts only when a new response
    follows it.
    """
    return _read_blocks(text, phase, _MARKER) or _read_blocks(text, phase, _ANYWHERE)


def _read_blocks(text: str, phase: Phase, marker: re.Pattern[str]) -> Rewrite | None:
    marks = list(marker.finditer(text))
    if not marks:
        return None
    critique = text[: marks[0].start()].strip() or None
    found: Rewrite | None = None
    instruction: str | None = None
    input, closed, unchanged = "", False, False
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        name = mark[1].lower().replace(" ", "_")
        body = text[mark.end() : following.start() if following else len(text)]
        body = _before_inline_end(body).strip()
        if name == "unchanged":
            unchanged = True
        elif name == "new_instruction" and body:
            instruction, input, closed = body, "", False
        elif name == "new_input" and instruction:
            input = body
        elif name == "new_response" and body:
            if phase == "response":
                found = Rewrite(critique, response=body)
            elif instruction and not closed:
                found = Rewrite(critique, instruction, input, body)
                closed = True
    if found is None and unchanged:
        return Rewrite(critique, unchanged=True)
    return found


def _before_inline_end(body: str) -> str:
    end = re.search(r"\[[ \t]*End[ \t]*\][*_` \t]*$", body, re.IGNORECASE | re.MULTILINE)
    return body[: end.start()] if end else body


def parse_json(text: str, phase: Phase) -> Rewrite | None:
    """Reads the `json` layout; null if the reply holds no object of that shape."""
    data = _first_object(text)
    if data is None:
        return None
    critique = _string(data, "critique")
    if data.get("already_good") is True:
        return Rewrite(critique, unchanged=True)
    response = _string(data, "new_response")
    if response is None:
        return None
    if phase == "response":
        return Rewrite(critique, response=response)
    instruction = _string(data, "new_instruction")
    if instruction is None:
        return None
    return Rewrite(critique, instruction, _string(data, "new_input") or "", response)


def _first_object(text: str) -> dict[str, Any] | None:
    decoder = json.JSONDecoder(strict=False)
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


def _string(data: dict[str, Any], key: str) -> str | None:
    value = data.get(key)
    return value.strip() or None if isinstance(value, str) else None


_LABEL = re.compile(r"^\W*(?:here(?: is|['’]s) (?:a|the) )?(?:new|better|improved|rewritten|revised) "
                    r"(?:version of the )?(?:instruction|response)\W*:\W*?\s", re.IGNORECASE)  # fmt: skip
_QUOTES = {'"': '"', "“": "”", "'": "'", "«": "»"}


def undress(text: str) -> str:
    """A staged reply without the label or the quotation marks that small models wrap it in."""
    text = _LABEL.sub("", text.strip(), count=1).strip()
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1] and text[-1] not in text[1:-1]:
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
