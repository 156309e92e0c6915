"""Configs made of a result on demand: pairs for preference tuning, and the best rows by IFD."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from hf_reflect.columns import TURN
from hf_reflect.embedded import content_hash
from hf_reflect.errors import HubError
from hf_reflect.ranking import TopFraction
from hf_reflect.trail import Trail


EXTRAS = ("preference", "selected")

_TURNS = pa.list_(TURN)
_PREFERENCE = {
    False: pa.schema(
        [("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string()), ("row_id", pa.int64())]
    ),
    True: pa.schema([("prompt", _TURNS), ("chosen", _TURNS), ("rejected", _TURNS), ("row_id", pa.int64())]),
}
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def write_preference(folder: Path, target: Path) -> dict[str, str]:
    """Writes config `preference` of a result, in TRL's format: `prompt`, `chosen`, `rejected`.

    A row for each response that the student replaced. Both answer the same prompt: `rejected` is the original, or,
    where the instruction was rewritten before, the response that came with the new instruction. With earlier turns
    they are lists of messages, else text.

    Args:
        folder: What a run wrote.
        target: Where to write.

    Returns:
        The path of each split's file below `target`.

    Raises:
        HubError: no response was replaced.
    """
    trail, found = Trail(folder), {}
    for split in trail.splits:
        pairs = [_preference(row) for rows in trail.batches(split) for row in rows if _replaced(row)]
        if pairs:
            found[split] = pairs
    if not found:
        raise HubError(f"{folder}: the student replaced no response, so there is no pair to prefer one of.")
    as_turns = any(len(pair["prompt"]) > 1 for pairs in found.values() for pair in pairs)
    return {
        split: _write(
            pa.Table.from_pylist([pair if as_turns else _flat(pair) for pair in pairs], _PREFERENCE[as_turns]),
            target,
            "preference",
            split,
        )
        for split, pairs in found.items()
    }


def write_selected(folder: Path, target: Path, share: float) -> dict[str, str]:
    """Writes config `selected` of a result: the share of each split's rows with the highest IFD.

    Args:
        folder: What a run wrote.
        target: Where to write.
        share: Above 0, at most 1.

    Returns:
        The path of each split's file below `target`.
    """
    from datasets import load_dataset

    made = {}
    for split, rows in load_dataset(str(folder), "default").items():
        chosen = TopFraction("ifd", share).choose(rows)
        if chosen.indices:
            made[split] = _write(rows.select(chosen.indices).with_format("arrow")[:], target, "selected", split)
    if not made:
        raise HubError(f"{folder}: no row has an IFD, so none can be selected by it.")
    return made


def _replaced(row: Mapping[str, Any]) -> bool:
    return row["original"] is not None and row["response_decision"]["candidate"] is not None


def _preference(row: Mapping[str, Any]) -> dict[str, Any]:
    before, new = dict(row["original"]), row["response_reflections"][row["response_decision"]["candidate"]]
    if (kept := row["instruction_decision"]["candidate"]) is not None:
        before |= {name: row["instruction_reflections"][kept][name] for name in ("instruction", "input", "response")}
    question = "\n".join(filter(None, (before["instruction"], before["input"])))
    return {
        "prompt": [*_turns(before["context"]), {"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": new["response"]}],
        "rejected": [{"role": "assistant", "content": before["response"]}],
        "row_id": row["row_id"],
    }


def _turns(context: list[Mapping[str, str]] | None) -> Iterator[dict[str, str]]:
    for turn in context or ():
        yield {"role": _ROLES.get(turn["role"], turn["role"]), "content": turn["content"]}


def _flat(pair: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value[0]["content"] if isinstance(value, list) else value for key, value in pair.items()}


def _write(table: pa.Table, target: Path, config: str, split: str) -> str:
    import pyarrow.parquet as pq

    (target / config).mkdir(exist_ok=True)
    file = target / config / f"{split}.parquet"
    pq.write_table(table, file)
    name = f"{split}-00000-of-00001-{content_hash(file)[:16]}.parquet"
    file.rename(file.with_name(name))
    return f"{config}/{name}"
