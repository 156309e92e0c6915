"""Resident memory and speed of `describe` and of `report` over many rows, against reading the same files.

    python benchmarks/describe.py --rows 1000000

The rows are written by hand in the layout of a result, with texts of the size that Alpaca's have and scores drawn at
random, so that no oracle and no student is needed.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from hf_reflect import Prompts, describe, write_report
from hf_reflect.columns import REFLECTIONS, TYPES
from hf_reflect.recipe import Recipe
from hf_reflect.trail import Trail


WORDS = "name list three of the best ways to cook rice and explain why each of them works well at home".split()  # noqa: SIM905
SCHEMA = pa.schema([(name, TYPES[name]) for name in REFLECTIONS])
REPORTED = 50_000
ROW_GROUP = 1000


def main() -> None:
    """Writes the rows, describes them, and prints JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "recycled"
        _write(folder, rows)
        read = _measured(lambda: [None for batch in Trail(folder).batches("train") for _ in batch])
        described = _measured(lambda: describe(folder))
        page = Path(name) / "report.html"
        reported = _measured(lambda: write_report(folder, page, tables=(), pictures=(), rows=REPORTED))
        report = {
            "command": f"python benchmarks/describe.py --rows {rows}",
            "rows": rows,
            "file_mib": round(sum(file.stat().st_size for file in folder.rglob("*.parquet")) / 2**20),
            "read": read,
            "describe": described,
            "describe_times_reading": round(described["seconds"] / read["seconds"], 2),
            "report": {**reported, "rows": min(rows, REPORTED), "mib": round(page.stat().st_size / 2**20)},
        }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _measured(work: Callable[[], Any]) -> dict[str, Any]:
    """How long something takes, and the most memory in each fifth of it."""
    samples: list[tuple[float, int]] = []
    done = threading.Event()

    def watch() -> None:
        process = psutil.Process()
        while not done.wait(0.05):
            samples.append((time.monotonic(), process.memory_info().rss))

    watcher = threading.Thread(target=watch, daemon=True)
    begun = time.monotonic()
    watcher.start()
    work()
    seconds = time.monotonic() - begun
    done.set()
    watcher.join()
    fifths = [[rss for at, rss in samples if fifth <= 5 * (at - begun) / seconds <= fifth + 1] for fifth in range(5)]
    peaks = [round(max(found) / 2**20) if found else None for found in fifths]
    return {"seconds": round(seconds, 1), "resident_mib_by_fifth_of_the_run": peaks}


def _write(folder: Path, rows: int) -> None:
    chance = random.Random(0)
    (folder / "reflections").mkdir(parents=True)
    (folder / "data").mkdir()
    oracle = {"spec": "made up", "name": "made up", "identity": {"model": "made up"}, "sampling": {}}
    oracle["prompts"] = Prompts.load("paper").to_dict()
    recipe = Recipe(
        source={"path": "made up"}, method="selective", keep="all", gate_first=False, oracles=[oracle], student=None,
        version="0",
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
    shards = [pa.Table.from_pylist([_row(i, chance) for i in range(ROW_GROUP)], SCHEMA) for _ in range(20)]
    with pq.ParquetWriter(folder / "reflections" / "train-00000-of-00001-0.parquet", SCHEMA) as writer:
        for start in range(0, rows, ROW_GROUP):
            table = chance.choice(shards).slice(0, rows - start)
            ids = pa.array(range(start, start + len(table)), pa.int64())
            writer.write_table(table.set_column(0, "row_id", ids))
    pq.write_table(pa.table({"row_id": pa.array([], pa.int64())}), folder / "data" / "train-00000-of-00001-0.parquet")


def _row(row_id: int, chance: random.Random) -> dict[str, Any]:
    first, second = chance.random() < 0.6, chance.random() < 0.6
    kinds = {(False, False): "original", (True, False): "instruction", (False, True): "response", (True, True): "both"}
    return {
        "row_id": row_id,
        "original": {
            "instruction": _text(chance, 12), "input": "", "response": _text(chance, 50), "context": [],
            "ifd": _score(chance), "rifd": _score(chance),
        },
        "instruction_reflections": [_reflection(chance, _text(chance, 20))],
        "instruction_decision": _decision(first, "higher_ifd"),
        "response_reflections": [_reflection(chance, None)],
        "response_decision": _decision(second, "lower_rifd"),
        "recycled": kinds[first, second],
        "ifd_score": _score(chance),
        "rifd_score": _score(chance),
    }  # fmt: skip


def _reflection(chance: random.Random, instruction: str | None) -> dict[str, Any]:
    critique, response = _text(chance, 120), _text(chance, 200)
    call = {"text": f"{critique}\n{response}", "attempts": 1, "prompt_tokens": 300, "completion_tokens": 400}
    return {
        "status": "ok", "oracle": "made up", "critique": critique, "instruction": instruction, "input": "",
        "response": response, "calls": [call], "ifd": _score(chance), "rifd": _score(chance),
    }  # fmt: skip


def _decision(kept: bool, reason: str) -> dict[str, Any]:
    if kept:
        return {"kept": "rewrite", "candidate": 0, "reason": reason}
    return {"kept": "original", "candidate": None, "reason": f"not_{reason}"}


def _score(chance: random.Random) -> dict[str, Any]:
    direct, conditioned = chance.lognormvariate(1, 0.3), chance.lognormvariate(0.9, 0.3)
    value = 2.718281828 ** (conditioned - direct)
    tokens = chance.randrange(5, 400)
    return {
        "status": "ok", "value": value, "conditioned_loss": conditioned, "direct_loss": direct,
        "conditioned_tokens": tokens, "direct_tokens": tokens,
    }  # fmt: skip


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))


if __name__ == "__main__":
    main()
