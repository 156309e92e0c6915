"""Selecting again: another student decides among the rewrites of a recycled dataset, and no oracle is asked."""

from pathlib import Path
from typing import Any

from hf_reflect.columns import DEFAULT, rows_of, updated
from hf_reflect.errors import SourceError
from hf_reflect.guards import Guards
from hf_reflect.pairs import recognise
from hf_reflect.recycling import Recycled, recycle
from hf_reflect.replay import Recording, original_pair
from hf_reflect.sources import Source, load_source
from hf_reflect.student import Student
from hf_reflect.teachers import REPLAY


def reselect(
    dataset: str | Path,
    output: str | Path | None = None,
    *,
    student: str | Student | None = "local",
    data: Any = None,
    **options: Any,
) -> Recycled:
    """Recycles a recycled dataset once more, with the replies that it holds and another student.

    A response is only ever taken with the instruction it was written for: where this student prefers another pair in
    the first phase than the one before it did, nothing was asked about that pair's response, and it stays.

    Args:
        dataset: The folder that a run wrote, or its Hub id.
        output: The folder to write; without one the result is only returned.
        student: Who decides this time.
        data: The dataset that was recycled. By default it is restored from the recycled one, or, where rows were left
            out of that, loaded from where the recipe says it came from.
        **options: What else `recycle` takes, such as `method`, `keep`, `student_options` and `journal`. Guards are
            those of the recipe unless others are given.

    Raises:
        HfReflectError: as for `recycle`; or the data can't be had.
    """
    recording = Recording(str(dataset))
    made_from = recording.recipe.source
    same = {
        "guards": Guards.from_dict(recording.recipe.guards),
        "retry_truncated": recording.recipe.retry_truncated,
    }
    return recycle(
        _restored(recording) if data is None else data,
        output,
        oracle=f"{REPLAY}{dataset}",
        student=student,
        name=made_from.get("name"),
        split=made_from.get("split"),
        limit=made_from.get("limit"),
        **{**same, **options},
    )


def _restored(recording: Recording) -> Source:
    """What a run was made from."""
    where = {key: value for key, value in recording.recipe.source.items() if key not in ("split", "limit")}
    if all(len(recording.default.get(key, ())) == len(rows) for key, rows in recording.reflections.items()):
        splits = {key: _before(rows, recording.reflections[key]) for key, rows in recording.default.items()}
        return Source(splits, where, single=False, about=recording.recipe.about)
    try:
        return load_source(where["path"], name=where.get("name"))
    except SourceError as error:
        raise SourceError(
            f"{recording.location} lacks rows of what it was made from, and that can't be loaded ({error}). Name it "
            "with --data."
        ) from error


def _before(rows: Any, reflections: Any) -> Any:
    """The rows as they were before they were recycled."""
    row_format = recognise(rows.column_names)

    def restore(batch: Any, indices: list[int]) -> Any:
        originals = reflections.select_columns(["original"])[indices]["original"]
        columns = {name: list(batch[name]) for name in row_format.text_columns if name in rows.column_names}
        for i, row in enumerate(rows_of(batch, row_format.columns)):
            if row["recycled"] == "original":
                continue
            for name, value in row_format.write(row, original_pair({"original": originals[i]})).items():
                was_null = name == "input" and originals[i]["input"] is None
                columns[name][i] = None if was_null else value
        return updated(batch, columns)

    restored = rows.map(restore, batched=True, with_indices=True, keep_in_memory=True, load_from_cache_file=False)
    return restored.remove_columns(list(DEFAULT))
