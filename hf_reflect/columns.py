"""The columns that transforms add, with their Arrow types, and how a batch gets them.

Types are always given, never inferred: a batch in which every score is null must not turn its column into one that
holds nothing else.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa


SCORE = pa.struct(
    [
        ("status", pa.string()),
        ("value", pa.float64()),
        ("conditioned_loss", pa.float64()),
        ("direct_loss", pa.float64()),
        ("conditioned_tokens", pa.int64()),
        ("direct_tokens", pa.int64()),
    ]
)
CALL = pa.struct(
    [
        ("part", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("thinking", pa.string()),
        ("attempts", pa.int64()),
    ]
)
REFLECTION = pa.struct(
    [
        ("status", pa.string()),
        ("reason", pa.string()),
        ("oracle", pa.string()),
        ("prompts", pa.string()),
        ("critique", pa.string()),
        ("instruction", pa.string()),
        ("input", pa.string()),
        ("response", pa.string()),
        ("calls", pa.list_(CALL)),
        ("ifd", SCORE),
        ("rifd", SCORE),
    ]
)
DECISION = pa.struct([("kept", pa.string()), ("candidate", pa.int64()), ("reason", pa.string())])
TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
ORIGINAL = pa.struct(
    [
        ("instruction", pa.string()),
        ("input", pa.string()),
        ("response", pa.string()),
        ("context", pa.list_(TURN)),
        ("ifd", SCORE),
        ("rifd", SCORE),
    ]
)

TYPES: dict[str, pa.DataType] = {
    "row_id": pa.int64(),
    "recycled": pa.string(),
    "ifd": pa.float64(),
    "rifd": pa.float64(),
    "ira": pa.float64(),
    "ifd_original": pa.float64(),
    "rifd_original": pa.float64(),
    "ifd_score": SCORE,
    "rifd_score": SCORE,
    "original": ORIGINAL,
    "instruction_reflections": pa.list_(REFLECTION),
    "instruction_decision": DECISION,
    "response_reflections": pa.list_(REFLECTION),
    "response_decision": DECISION,
}
"""Every column this package adds to a dataset."""

DEFAULT = ("row_id", "recycled", "ifd", "rifd", "ifd_original", "rifd_original")
"""What config `default` has besides the source's own columns."""

REFLECTIONS = (
    "row_id",
    "original",
    "instruction_reflections",
    "instruction_decision",
    "response_reflections",
    "response_decision",
    "recycled",
    "ifd_score",
    "rifd_score",
)
"""The columns of config `reflections`."""


def rows_of(batch: Mapping[str, Any], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a batch that `map(batched=True)` or `filter(batched=True)` hands over.

    Args:
        batch: Values by column.
        columns: Columns of the source that are wanted; ours come as well, and no others are read.

    Raises:
        TypeError: it is a single row.
    """
    names = [name for name in batch.keys() if name in TYPES or name in columns]  # noqa: SIM118 (a lazy batch is no dict)
    values = [batch[name] for name in names]
    if any(not isinstance(column, list) for column in values):
        raise TypeError("this transform works on batches of plain Python values: call map(..., batched=True)")
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def updated(batch: Mapping[str, Any], updates: Mapping[str, list[Any]]) -> Any:
    """The batch with some columns set, typed.

    `Dataset.map` gives batches that carry their Arrow table. It accepts a table in return, which keeps every type
    exact and copies nothing that did not change. Elsewhere (an `IterableDataset`, a formatted dataset) a plain
    dictionary is returned.
    """
    table = getattr(batch, "pa_table", None)
    if table is None:
        return dict(updates)
    for name, values in updates.items():
        array = _array(values, TYPES[name] if name in TYPES else _text_type(table.schema.field(name).type))
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, array)
        else:
            table = table.append_column(name, array)
    return table


def not_text(batch: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """Why no row of a batch can hold a pair: a column with a type that no text fits in; null if there is none."""
    table = getattr(batch, "pa_table", None)
    if table is None:
        return None
    for name in columns:
        type = table.schema.field(name).type
        if not (_is_text(type) or pa.types.is_nested(type) or isinstance(type, pa.JsonType)):
            return f"{name} is a column of {type}, not of text"
    return None


def features(names: Iterable[str]) -> Any:
    """The `datasets.Features` of some of our columns, for callers that need to pass `features=`."""
    from datasets import Features

    return Features.from_arrow_schema(pa.schema([(name, TYPES[name]) for name in names]))


def _is_text(type: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(check(type) for check in checks)


def _text_type(type: pa.DataType) -> pa.DataType:
    """The type a column of the source has, or text where it was nothing but nulls."""
    return pa.string() if pa.types.is_null(type) else type


def _array(values: list[Any], type: pa.DataType) -> pa.Array:
    stored = _storage(type)
    if stored == type:
        return pa.array(values, type)
    return pa.array([_encoded(value, type) for value in values], stored).cast(type)


def _storage(type: pa.DataType) -> pa.DataType:
    """A type with text in place of JSON, as which `datasets` reads what has no one type, such as tool calls."""
    if isinstance(type, pa.JsonType):
        return type.storage_type
    if pa.types.is_list(type):
        return pa.list_(_storage(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([(field.name, _storage(field.type)) for field in type])
    return type


def _encoded(value: Any, type: pa.DataType) -> Any:
    """A value of a type as one of its storage."""
    if value is None:
        return None
    if isinstance(type, pa.JsonType):
        return json.dumps(value)
    if pa.types.is_list(type):
        return [_encoded(item, type.value_type) for item in value]
    if pa.types.is_struct(type):
        return {field.name: _encoded(value.get(field.name), field.type) for field in type}
    return value
