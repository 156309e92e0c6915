"""Write the page, row by row, into one file.

Rows are in it as compressed pieces, which the page opens on demand. They are base64, so that nothing in them can end
the element they are in, and no text of theirs is ever part of the page's source.
"""

import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_reflect.cards import CardData
from hf_reflect.output import write_whole
from hf_reflect.plotting import Picture
from hf_reflect.prompts import PHASES
from hf_reflect.recipe import Recipe
from hf_reflect.selection import Keep
from hf_reflect.summary import Summary, final_pair, policy_of, result_of
from hf_reflect.tables import Table
from hf_reflect.trail import Entry, Trail


ROWS = 50_000
"""The most rows a page has."""

_PIECE = 100
_START = 100
_DIGITS = 6
_SCRIPTS = ("vendor/tabulator.min.js", "vendor/diff.min.js", "page.js")
_STYLES = ("vendor/tabulator_simple.min.css", "page.css")
_LICENCES = {"Tabulator": "vendor/tabulator.LICENSE", "jsdiff": "vendor/diff.LICENSE"}


def write_report(
    folder: str | Path, file: str | Path, *, tables: Sequence[Table], pictures: Sequence[Picture], rows: int = ROWS
) -> Path:
    """Writes one HTML file about a folder that a run wrote.

    Args:
        folder: The result.
        file: Where to write; what is there is replaced once the new one is complete.
        tables: What is shown above the rows.
        pictures: Likewise; without any the page says what they need.
        rows: The most rows it has; of more, an evenly spread sample.

    Raises:
        RecipeError: there is no recipe of a run.
        SourceError: there are no rows of a run, or they are damaged.
        OutputError: the file can't be written.
    """
    source, target = Path(folder), Path(file).expanduser().resolve()
    recipe = Recipe.read(source)
    trail = Trail(source)
    total = sum(map(trail.rows, trail.splits))
    page = _template().generate(
        card=CardData(recipe, Summary(), {}, source.resolve().name, str(folder)),
        recipe=recipe,
        tables=[table.to_html() for table in tables],
        pictures=[(picture, base64.b64encode(picture.png).decode()) for picture in pictures],
        rows=min(rows, total),
        total=total,
        body=_Body(_sample(trail, rows), policy_of(recipe)),
        scripts=(scripts := [_resource(name) for name in _SCRIPTS]),
        styles=[_resource(name) for name in _STYLES],
        licences={name: _resource(path) for name, path in _LICENCES.items()},
        policy=_policy(scripts),
    )
    write_whole(target, (piece.encode("utf-8", "replace") for piece in page))
    return target


class _Body:
    """The rows, as the page has them: pieces with everything, and an index with what its table and filters need.

    Args:
        entries: The rows with their splits.
        policy: Which of them are in the result.
    """

    def __init__(self, entries: Iterable[Entry], policy: Keep) -> None:
        self._entries, self._policy = entries, policy
        self._columns: dict[str, list[Any]] = {}

    def pieces(self) -> Iterator[str]:
        """Some rows at a time; the index is whole once these are through."""
        piece: list[dict[str, Any]] = []
        for entry in self._entries:
            row = {**entry.row, "recycled": result_of(entry.row, self._policy)}
            for name, value in _indexed(entry.split, row).items():
                self._columns.setdefault(name, []).append(value)
            piece.append({**row, "final": None if row["original"] is None else final_pair(row)})
            if len(piece) == _PIECE:
                yield _packed(piece)
                piece = []
        if piece:
            yield _packed(piece)

    def index(self) -> str:
        return _packed({"size": _PIECE, "columns": self._columns})


def _indexed(split: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the table and the filters need of a row."""
    original = row["original"] or {}
    ifd_before, ifd_after = _value(original.get("ifd")), _value(row["ifd_score"])
    entry = {
        "split": split,
        "row": row["row_id"],
        "recycled": row["recycled"],
        "start": None if row["original"] is None else _start(original["instruction"] or ""),
        "ifd_before": ifd_before,
        "ifd_after": ifd_after,
        "gain": None if ifd_before is None or ifd_after is None else round(ifd_after - ifd_before, _DIGITS),
        "rifd_before": _value(original.get("rifd")),
        "rifd_after": _value(row["rifd_score"]),
    }
    for phase in PHASES:
        entry[f"{phase}_status"] = ", ".join(r["status"] or "–" for r in row[f"{phase}_reflections"] or ())
        entry[f"{phase}_decision"] = (row[f"{phase}_decision"] or {}).get("reason")
    return entry


def _value(score: Mapping[str, Any] | None) -> float | None:
    value = (score or {}).get("value")
    return None if value is None or not math.isfinite(value) else round(value, _DIGITS)


def _start(text: str) -> str:
    return " ".join(text[: 4 * _START].split())[:_START]


def _packed(data: Any) -> str:
    try:
        written = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:  # JSON has no infinity
        written = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(written.encode(), 6, mtime=0)).decode()


def _finite(data: Any) -> Any:
    """The data with what is no number as text."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def _sample(trail: Trail, wanted: int) -> Iterator[Entry]:
    """An evenly spread sample of the rows of all splits, in order."""
    total = sum(map(trail.rows, trail.splits))
    k = min(wanted, total)
    positions = (int((i + 0.5) * total / k) for i in range(k))
    position, place = next(positions, None), 0
    for split in trail.splits:
        for entry in trail.scan(split):
            if place == position:
                yield entry
                position = next(positions, None)
            place += 1


def _resource(name: str) -> str:
    """A file of this package, without the name of its source map, which is not there."""
    text = (files("hf_reflect.report") / name).read_text("utf-8")
    return re.sub(r"^/[/*]# sourceMappingURL=.*", "", text, flags=re.MULTILINE)


def _policy(scripts: Iterable[str]) -> str:
    """What the page may do: run these scripts, show pictures that are in it, and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files("hf_reflect.report") / "page.html.jinja").read_text("utf-8"))
