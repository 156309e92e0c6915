"""Does a recycled dataset say of itself what is true? Scores a sample again and compares."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_reflect.columns import DEFAULT, REFLECTIONS
from hf_reflect.errors import HubError
from hf_reflect.journal import Journal
from hf_reflect.loading import info, load_recycled
from hf_reflect.pairs import Pair, UnreadableRowError, recognise
from hf_reflect.recipe import Recipe
from hf_reflect.student import Student, load_student
from hf_reflect.student.templates import TextTemplate
from hf_reflect.summary import final_pair


TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""The largest difference of a score that counts as rounding."""


@dataclass
class Verification:
    """What was checked, and what does not agree.

    Attributes:
        rows: Rows of the recycled dataset.
        sampled: How many of them were scored again.
        scores: How many scores that gave.
        largest: The largest difference between a score and the one that is written.
        findings: What does not agree, in sentences.
    """

    rows: int = 0
    sampled: int = 0
    scores: int = 0
    largest: float = 0.0
    findings: list[str] = field(default_factory=list)


def verify(
    name: str,
    *,
    student: str | Student,
    sample: int = 50,
    revision: str | None = None,
    journal: Journal | str | Path | None = None,
    **options: Any,
) -> Verification:
    """Checks card, recipe and columns of a recycled dataset, and scores a sample of its rows again.

    Args:
        name: As for `load_recycled`.
        student: The student that the recipe names, wherever it lies.
        sample: How many rows to score again, spread evenly over each split.
        revision: As for `load_recycled`.
        journal: Where losses are kept; by default nowhere, so that all is computed afresh.
        **options: As for `load_student`; by default what the recipe says.

    Raises:
        HfReflectError: there is no such dataset, it has no recipe, or the student can't be loaded.
    """
    known = info(name, revision)
    if known.recipe is None:
        raise HubError(f"{name}: has no recipe of hf_reflect, so there is nothing to hold it against.")
    found = Verification()
    found.findings += _check_card(known.metadata, known.recipe)
    at = known.revision or revision
    default, reflections = (load_recycled(name, config, revision=at) for config in ("default", "reflections"))
    judge = _student(student, known.recipe, options, found)
    with tempfile.TemporaryDirectory(prefix="hf_reflect-verify-") as afresh:
        # Not the journal of the run, which would only repeat what it said.
        book = journal if isinstance(journal, Journal) else Journal(journal or Path(afresh) / "journal")
        _check_splits(default, reflections, sample, known.recipe.keep, judge, book, found)
        book.close()
    return found


def _check_splits(
    default: Mapping[str, Any],
    reflections: Mapping[str, Any],
    sample: int,
    policy: str,
    judge: Student | None,
    journal: Journal,
    found: Verification,
) -> None:
    for split, rows in default.items():
        if split not in reflections:
            found.findings.append(f"split {split} has no reflections")
            continue
        found.rows += len(rows)
        audit = reflections[split]
        lacking = [column for column in DEFAULT if column not in rows.column_names]
        lacking += [column for column in REFLECTIONS if column not in audit.column_names]
        if lacking:
            found.findings.append(f"split {split} lacks the columns {', '.join(lacking)}")
            continue
        found.findings += _missing(split, rows, audit, policy)
        _check_rows(split, rows, audit, sample, judge, journal, found)


def _check_card(metadata: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    ours = metadata.get("hf_reflect")
    said = ours.get("recipe") if isinstance(ours, Mapping) else None
    if said != recipe.hash:
        yield f"the card speaks of recipe {said}, recipe.yaml is {recipe.hash}"
    listed = {config.get("config_name") for config in metadata.get("configs") or () if isinstance(config, Mapping)}
    for config in ("default", "reflections"):
        if config not in listed:
            yield f"the card lists no config {config}"


def _student(spec: str | Student, recipe: Recipe, options: Mapping[str, Any], found: Verification) -> Student | None:
    if recipe.student is None:
        found.findings.append("the recipe names no student, so there are no scores to verify")
        return None
    recorded = recipe.student["identity"]
    settings = {name: recorded[name] for name in ("boundary", "measure", "dtype", "max_length", "template")}
    if "template" in recipe.student:
        settings["template"] = TextTemplate(**recipe.student["template"])
    judge = load_student(spec, **{**settings, **options})
    for key, value in recorded.items():
        if judge.identity.get(key) != value and key != "model":
            found.findings.append(f"the recipe's student has {key} {value!r}, this one {judge.identity.get(key)!r}")
    return judge


def _check_rows(
    split: str, rows: Any, audit: Any, sample: int, judge: Student | None, journal: Journal, found: Verification
) -> None:
    row_format = recognise(rows.column_names)
    count = min(sample, len(rows))
    where = {row_id: i for i, row_id in enumerate(audit["row_id"])}
    checked: list[_Checked] = []
    for i in (int((i + 0.5) * len(rows) / count) for i in range(count)):
        row = rows[i]
        name = f"split {split}, row {row['row_id']}"
        if row["row_id"] not in where:
            found.findings.append(f"{name}: has no reflections")
            continue
        reflection = audit[where[row["row_id"]]]
        found.findings += [f"{name}: {what}" for what in _disagreements(row, reflection)]
        if reflection["original"] is None:
            continue
        try:
            pair = row_format.read(row)
        except UnreadableRowError as error:
            found.findings.append(f"{name}: holds no pair: {error}")
            continue
        found.findings += [f"{name}: {what}" for what in _other_text(pair, reflection)]
        checked.append(_Checked(name, pair, row, reflection))
    found.sampled += count
    if judge is not None and checked:
        _check_scores(checked, judge, journal, found)


@dataclass(frozen=True)
class _Checked:
    name: str
    pair: Pair
    row: Mapping[str, Any]
    reflection: Mapping[str, Any]


def _check_scores(checked: list[_Checked], judge: Student, journal: Journal, found: Verification) -> None:
    tolerance = TOLERANCE.get(str(judge.identity["dtype"]), max(TOLERANCE.values()))
    pairs = [one.pair for one in checked]
    for measure, scores in (("ifd", judge.ifd(pairs, journal)), ("rifd", judge.reversed_ifd(pairs, journal))):
        for one, score in zip(checked, scores, strict=True):
            then, now = one.row[measure], score.value
            if one.reflection[f"{measure}_score"] is None:
                continue  # it was not scored, by design
            found.scores += 1
            if now is not None and then is not None:
                found.largest = max(found.largest, abs(now - then))
            differs = now is not then if None in (now, then) else abs(now - then) > tolerance * max(1.0, abs(then))
            if differs:
                found.findings.append(f"{one.name}: {measure} is {_shown(then)}, scored again it is {_shown(now)}")


def _shown(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"


def _other_text(pair: Pair, reflection: Mapping[str, Any]) -> Iterator[str]:
    ended = final_pair(reflection)
    expected = Pair(ended["instruction"], ended["response"], ended["input"])
    if (pair.question, pair.response) != (expected.question, expected.response):
        yield "its text is not what the decisions lead to"


def _missing(split: str, rows: Any, audit: Any, policy: str) -> Iterator[str]:
    """What the number of rows tells."""
    there, known = list(rows["row_id"]), set(audit["row_id"])
    if len(set(there)) != len(there):
        yield f"split {split} has {len(there) - len(set(there))} rows twice"
    if policy == "all" and len(left_out := known - set(there)):
        yield f"split {split} lacks {len(left_out)} of {len(known)} rows, row {min(left_out)} first"


def _disagreements(row: Mapping[str, Any], reflection: Mapping[str, Any]) -> Iterator[str]:
    if row["recycled"] != reflection["recycled"]:
        yield f"is marked {row['recycled']}, the reflections say {reflection['recycled']}"
    for measure in ("ifd", "rifd"):
        before = ((reflection["original"] or {}).get(measure) or {}).get("value")
        if row[f"{measure}_original"] != before:
            yield f"{measure}_original is {row[f'{measure}_original']}, the reflections say {before}"
        score = reflection[f"{measure}_score"]
        if row[measure] != (score and score["value"]):
            yield f"{measure} is {row[measure]}, the reflections say {score and score['value']}"
