"""A card that is generated again keeps what people changed by hand.

A generated card ends in a comment with a fingerprint of each of its sections and of each key of its metadata. What no
longer has its fingerprint was changed by somebody, and stays; what somebody added stays where it is; what somebody
removed stays away.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any


_HEADING = re.compile(r"#{1,2} ")
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MARK = re.compile(r"^<!-- hf_reflect (\{.*\}) -->[ \t]*(?:\n|\Z)", re.MULTILINE)
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


def sign(card: str) -> str:
    """A generated card with its fingerprints at the end."""
    metadata, body = split(card)
    marks = {
        "keys": {key: _fingerprint(value) for key, value in (metadata or {}).items() if key != "configs"},
        "sections": {title: _fingerprint(text) for title, text in sections(body).items()},
    }
    return f"{card.rstrip()}\n\n<!-- hf_reflect {json.dumps(marks, separators=(',', ':'))} -->\n"


def merge(new: str, existing: str | None, gone: frozenset[str] = frozenset()) -> str:
    """A newly generated card, with what people changed in the existing one.

    Args:
        new: The card as generated and signed.
        existing: The card that is there; null if there is none. One without fingerprints is all by hand: it keeps
            its body, and its metadata where it has any.
        gone: Configs of the existing card that are there no longer.
    """
    if existing is None:
        return new
    existing = existing.removeprefix("\ufeff").replace("\r\n", "\n")
    marks = _marks(existing)
    new_metadata, new_body = split(_unmarked(new))
    old_metadata, old_body = split(_unmarked(existing))
    if old_metadata is None:  # it can't be read, so nobody can have meant it
        metadata = new_metadata or {}
    else:
        metadata = _merge_metadata(new_metadata or {}, old_metadata, marks["keys"], gone)
    body = _merge_body(sections(new_body), sections(old_body), marks["sections"]) if marks["sections"] else old_body
    mark = _last_mark(new)
    return f"---\n{_dump(metadata)}---\n{body.rstrip()}\n\n{mark[0].strip() if mark else ''}".rstrip() + "\n"


def split(card: str) -> tuple[dict[str, Any] | None, str]:
    """Metadata and body of a card; the metadata are null where they can't be read."""
    import yaml

    front = _FRONT.match(card)
    if front is None:
        return {}, card
    body = card[front.end() :]
    try:
        metadata = yaml.safe_load(front[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None, body
    if metadata is None:
        return {}, body
    return (dict(metadata) if isinstance(metadata, Mapping) else None), body


def sections(body: str) -> dict[str, str]:
    """The sections of a body by heading, what precedes the first under an empty one. Headings in code don't count."""
    found: dict[str, str] = {}
    title, fence = "", ""
    for line in body.splitlines(keepends=True):
        marked = _FENCE.match(line.rstrip("\n"))
        if fence:
            closes = marked and marked[1].startswith(fence) and not marked[2].strip()
            fence = "" if closes else fence
        elif marked and not (marked[1][0] == "`" and "`" in marked[2]):
            fence = marked[1]
        elif _HEADING.match(line):
            title = line.strip()
            while title in found:
                title += " "
        found[title] = found.get(title, "") + line
    return found


def _last_mark(card: str) -> re.Match[str] | None:
    return next(reversed(list(_MARK.finditer(card))), None)


def _unmarked(card: str) -> str:
    """A card without fingerprints; what somebody wrote behind them stays."""
    return _MARK.sub("", card)


def _merge_metadata(
    new: Mapping[str, Any], old: Mapping[str, Any], marks: Mapping[str, str], gone: frozenset[str]
) -> dict[str, Any]:
    merged = dict(new)
    for key, value in old.items():
        if key == "configs":  # ours are ours, those of others are theirs
            merged[key] = _merge_configs(new.get(key) or [], value, gone)
        elif key == "dataset_info":
            # It describes the files of configs; of ours it is out of date.
            ours = {str(config["config_name"]) for config in new.get("configs") or ()} | gone
            entries = value if isinstance(value, list) else [value]
            others = [e for e in entries if isinstance(e, Mapping) and e.get("config_name", "default") not in ours]
            if others:
                merged[key] = others
        elif key not in new and key not in marks:
            merged[key] = value  # added
        elif marks.get(key) != _fingerprint(value) and key != "hf_reflect":
            merged[key] = value  # changed, or there before us
    for key in set(marks) - set(old) - {"configs", "hf_reflect"}:
        merged.pop(key, None)  # removed
    return merged


def _merge_configs(new: list[Any], old: Any, gone: frozenset[str]) -> list[Any]:
    """The configs that were generated, and those that others put beside them."""
    names = {config["config_name"] for config in new} | gone
    others = [config for config in old if isinstance(config, Mapping)] if isinstance(old, list) else []
    return [*new, *(config for config in others if str(config.get("config_name")) not in names)]


def _merge_body(new: Mapping[str, str], old: Mapping[str, str], marks: Mapping[str, str]) -> str:
    kept = []
    for title, text in old.items():
        if title not in marks:
            kept.append((title, text))  # added
        elif marks[title] != _fingerprint(text):
            kept.append((title, text))  # changed
        elif title in new:
            kept.append((title, new[title]))
    titles = [title for title, _ in kept]
    for before, title in zip(["", *new], new, strict=False):  # what is new comes after what it follows
        if title not in titles and title not in marks:
            at = titles.index(before) + 1 if before in titles else len(titles)
            titles.insert(at, title)
            kept.insert(at, (title, new[title]))
    return "".join(text if text.endswith("\n") else f"{text}\n" for _, text in kept)


def _marks(card: str) -> dict[str, dict[str, str]]:
    mark = _last_mark(card)
    try:
        found = json.loads(mark[1]) if mark else {}
    except ValueError:
        found = {}
    parts = {name: found.get(name) for name in ("keys", "sections")}
    return {name: part if isinstance(part, dict) else {} for name, part in parts.items()}


def _fingerprint(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _dump(metadata: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True))
