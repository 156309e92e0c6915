"""Reading the audit trail of a folder: in order, and single rows."""

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_cards import reflection, row
from test_describe import unreadable, written

from hf_reflect.errors import SourceError
from hf_reflect.trail import BATCH, Trail


def call(i: int) -> dict:
    return {"part": "x", "text": f"raw {i}", "thinking": f"thought {i}", "prompt_tokens": 1, "completion_tokens": 2}


def rows(n: int, first: int = 0) -> list[dict]:
    """Rows that differ in all that is looked at; ids have gaps."""
    made = [
        row(
            first + 3 * i, i % 2 == 0, i % 3 == 0,
            original={"instruction": f"ask {i}"},
            on_response=reflection(calls=[call(i)]),
            on_instruction=reflection(instruction=f"new {i}", calls=[call(-i), call(i)]),
        )
        for i in range(n)
    ]  # fmt: skip
    return [unreadable(first + 3 * i) if i % 7 == 3 else one for i, one in enumerate(made)]


def whole(folder: Path, split: str) -> list[dict]:
    """All rows of a split, as pyarrow reads them at once."""
    (file,) = (folder / "reflections").glob(f"{split}-*.parquet")
    return pq.read_table(file).to_pylist()


def without_raw(row: dict) -> dict:
    def bare(reflection: dict) -> dict:
        calls = reflection["calls"]
        bared = calls and [{k: v for k, v in call.items() if k not in ("text", "thinking")} for call in calls]
        return {**reflection, "calls": bared}

    phases = ("instruction_reflections", "response_reflections")
    return {**row, **{name: [bare(one) for one in row[name]] for name in phases}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two splits, in row groups of various lengths against the batches that are read."""
    made = tmp_path_factory.mktemp("trail")
    written(made, {"test": rows(23, 100)}, group=5)
    return written(made, {"train": rows(450)}, group=37)


def test_rows_come_in_order_with_where_they_are(folder):
    trail = Trail(folder)
    assert trail.splits == ["train", "test"]
    for split, n in (("train", 450), ("test", 23)):
        entries = list(trail.scan(split))
        assert trail.rows(split) == len(entries) == n
        assert [(entry.split, entry.position) for entry in entries] == [(split, i) for i in range(n)]
        assert [entry.row for entry in entries] == [without_raw(one) for one in whole(folder, split)]


def test_the_first_split_is_what_is_trained_on_and_the_others_go_by_name(tmp_path):
    made = written(tmp_path, {name: rows(1) for name in ("zebra", "dev", "train", "test")})
    assert Trail(made).splits == ["train", "dev", "test", "zebra"]


def test_a_single_row_is_that_of_the_scan_and_has_its_raw_replies(folder):
    trail = Trail(folder)
    places = [(split, i) for split in trail.splits for i in range(trail.rows(split))]
    random.Random(0).shuffle(places)
    scanned = {(entry.split, entry.position): entry.row for split in trail.splits for entry in trail.scan(split)}
    expected = {split: whole(folder, split) for split in trail.splits}
    for split, position in places:
        found = trail.read(split, position)
        assert found == expected[split][position]
        assert without_raw(found) == scanned[split, position]
    texts = [one["text"] for one in trail.read("train", 5)["instruction_reflections"][0]["calls"]]
    assert texts == ["raw -5", "raw 5"]


def test_only_what_is_asked_for_is_read(folder):
    columns = ["row_id", "original.instruction", "response_reflections.list.element.status"]
    for entry, one in zip(Trail(folder).scan("train", columns), whole(folder, "train"), strict=True):
        assert entry.row == {
            "row_id": one["row_id"],
            "original": one["original"] and {"instruction": one["original"]["instruction"]},
            "response_reflections": [{"status": each["status"]} for each in one["response_reflections"]],
        }


def test_batches_are_small_and_are_all_rows(folder):
    batches = list(Trail(folder).batches("train"))
    assert max(map(len, batches)) <= BATCH
    assert [one["row_id"] for batch in batches for one in batch] == [3 * i for i in range(450)]


@pytest.mark.parametrize("make", [None, "", "reflections"])
def test_a_folder_without_a_trail_says_what_is_missing(tmp_path, make):
    folder = tmp_path / "out"
    if make is not None:
        (folder / make).mkdir(parents=True)
    with pytest.raises(SourceError, match="reflections") as caught:
        Trail(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_split_in_several_files_has_the_rows_of_all(tmp_path):
    """No run writes such a folder today; somebody's copy of a dataset on the Hub may be one."""
    made = written(tmp_path, {"train": rows(9)})
    (file,) = (made / "reflections").glob("*.parquet")
    table = pq.read_table(file)
    for i in range(3):
        pq.write_table(table.slice(3 * i, 3), file.with_name(f"train-{i:05}-of-00003.parquet"))
    file.unlink()
    trail = Trail(made)
    assert [entry.row["row_id"] for entry in trail.scan("train")] == [3 * i for i in range(9)]
