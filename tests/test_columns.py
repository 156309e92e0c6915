import json

import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value, load_dataset

from hf_reflect.columns import DEFAULT, REFLECTIONS, TYPES, features, rows_of, updated


ROWS = 6
FIRST_NUMBER = 4  # with batches of two, the first two batches hold nothing but nulls

SCORE = {
    "status": "ok",
    "value": 0.5,
    "conditioned_loss": 1.0,
    "direct_loss": 2.0,
    "conditioned_tokens": 3,
    "direct_tokens": 3,
}
CALL = {"part": "user", "text": "Hm.", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 2}
CALL |= {"thinking": None, "attempts": 1}
REFLECTION = {
    "status": "ok",
    "reason": None,
    "oracle": "teacher",
    "prompts": "paper/1/0",
    "critique": "Vague.",
    "instruction": "Q",
    "input": "",
    "response": "A",
    "calls": [CALL],
    "ifd": SCORE,
    "rifd": None,
}
ORIGINAL = {
    "instruction": "Q",
    "input": "",
    "response": "A",
    "context": [{"role": "system", "content": "S"}],
    "ifd": SCORE,
    "rifd": None,
}
VALUES = {
    "row_id": 7,
    "recycled": "both",
    "ifd": 0.5,
    "rifd": 0.25,
    "ira": 0.5,
    "ifd_original": 0.5,
    "rifd_original": 0.25,
    "ifd_score": SCORE,
    "rifd_score": SCORE,
    "original": ORIGINAL,
    "instruction_reflections": [REFLECTION],
    "instruction_decision": {"kept": "rewrite", "candidate": 0, "reason": "higher_ifd"},
    "response_reflections": [REFLECTION],
    "response_decision": {"kept": "original", "candidate": None, "reason": "gated"},
}


class NullThenValue:
    """Sets one column: null in the first rows, a value in the later ones."""

    def __init__(self, column, value):
        self.column, self.value = column, value

    def __call__(self, batch):
        ids = batch["id"]
        return updated(batch, {self.column: [self.value if i >= FIRST_NUMBER else None for i in ids]})


def dataset():
    return Dataset.from_dict({"id": list(range(ROWS)), "output": ["text"] * ROWS})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_every_column_is_tried_here():
    assert set(VALUES) == set(TYPES)


@pytest.mark.parametrize("column", TYPES)
def test_a_column_keeps_its_type_where_the_first_batches_hold_only_nulls(column):
    mapped = dataset().map(NullThenValue(column, VALUES[column]), batched=True, batch_size=2)
    assert mapped[column] == [None] * FIRST_NUMBER + [VALUES[column]] * (ROWS - FIRST_NUMBER)
    assert mapped.features[column] == features([column])[column]


@pytest.mark.parametrize("column", TYPES)
def test_a_column_of_nulls_alone_has_the_type_of_one_with_values(column):
    nulls = dataset().map(NullThenValue(column, None), batched=True, batch_size=2)
    values = dataset().map(NullThenValue(column, VALUES[column]), batched=True, batch_size=2)
    assert nulls.features == values.features


def test_a_second_map_writes_over_the_first_one():
    once = dataset().map(NullThenValue("ifd", 0.5), batched=True, batch_size=2)
    twice = once.map(NullThenValue("ifd", 0.75), batched=True, batch_size=2)
    assert twice["ifd"] == [None] * FIRST_NUMBER + [0.75] * (ROWS - FIRST_NUMBER)
    assert twice.column_names == once.column_names


def test_the_sources_columns_keep_their_types_and_order():
    kinds = Features({"id": Value("int32"), "output": Value("large_string")})
    source = dataset().cast(kinds)
    mapped = source.map(NullThenValue("output", "new"), batched=True, batch_size=2)
    assert mapped.features == kinds
    assert mapped["output"] == [None] * FIRST_NUMBER + ["new"] * (ROWS - FIRST_NUMBER)


def test_columns_that_are_not_updated_stay():
    mapped = dataset().map(NullThenValue("recycled", "both"), batched=True, batch_size=2)
    assert (mapped["id"], mapped["output"]) == (list(range(ROWS)), ["text"] * ROWS)


def test_a_dataset_whose_rows_were_chosen_gets_its_values_in_that_order():
    mapped = dataset().select([5, 0, 4]).map(NullThenValue("row_id", 1), batched=True, batch_size=2)
    assert mapped[:] == {"id": [5, 0, 4], "output": ["text"] * 3, "row_id": [1, None, 1]}


def test_several_processes_give_what_one_gives():
    alone = dataset().map(NullThenValue("ifd_score", SCORE), batched=True, batch_size=2)
    together = dataset().map(NullThenValue("ifd_score", SCORE), batched=True, batch_size=2, num_proc=2)
    assert (together[:], together.features) == (alone[:], alone.features)


MIXED = [1, "x", None, {"k": [1]}, [True, None], {"k": "v"}]


@pytest.fixture
def mixed(tmp_path):
    """A dataset whose column `output` holds values of different types, which `datasets` keeps as JSON."""
    file = tmp_path / "mixed.jsonl"
    lines = [json.dumps({"id": i, "output": value}) for i, value in enumerate(MIXED)]
    file.write_text("\n".join(lines), "utf-8")
    return load_dataset("json", data_files=str(file), split="train")


def test_a_column_of_mixed_types_survives_beside_an_updated_one(mixed):
    mapped = mixed.map(NullThenValue("ifd", 0.5), batched=True, batch_size=2)
    assert mapped["output"] == MIXED
    assert mapped.features["output"] == mixed.features["output"]


def test_a_column_of_mixed_types_can_be_updated_itself(mixed):
    mapped = mixed.map(NullThenValue("output", {"new": "é"}), batched=True, batch_size=2)
    assert mapped["output"] == [None] * FIRST_NUMBER + [{"new": "é"}] * (ROWS - FIRST_NUMBER)
    assert mapped.features["output"] == mixed.features["output"]


def test_a_streamed_batch_gets_plain_values():
    batch = {"id": [0, 4], "output": ["a", "b"]}
    assert updated(batch, {"ifd": [None, 0.5]}) == {"ifd": [None, 0.5]}


def test_streamed_rows_are_what_mapped_rows_are():
    streamed = dataset().to_iterable_dataset().map(NullThenValue("ifd_score", SCORE), batched=True, batch_size=2)
    mapped = dataset().map(NullThenValue("ifd_score", SCORE), batched=True, batch_size=2)
    assert list(streamed) == list(mapped)


def test_the_rows_of_a_batch_have_the_columns_wanted_and_ours():
    batch = {"output": ["a", "b"], "blob": [b"0", b"1"], "row_id": [3, 4]}
    assert rows_of(batch, ["output", "input"]) == [{"output": "a", "row_id": 3}, {"output": "b", "row_id": 4}]


def test_a_single_row_in_place_of_a_batch_says_what_to_do():
    with pytest.raises(TypeError, match="batched=True"):
        rows_of({"output": "a"}, ["output"])


def test_the_features_are_those_of_the_types_in_the_order_asked_for():
    assert list(features(DEFAULT)) == list(DEFAULT)
    assert features(["ifd"]) == Features({"ifd": Value("float64")})
    assert features(REFLECTIONS).arrow_schema.field("original").type == TYPES["original"]


def test_both_configs_are_made_of_known_columns():
    assert {*DEFAULT, *REFLECTIONS} <= set(TYPES)
    assert all(isinstance(type, pa.DataType) for type in TYPES.values())
