import json

import pytest
from datasets import Dataset, DatasetDict

from hf_reflect.columns import TYPES
from hf_reflect.errors import HfReflectError, SourceError, UnknownFormatError
from hf_reflect.sources import check_columns, load_source


ROWS = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in ("one", "two", "three")]


@pytest.fixture(autouse=True)
def _own_cache_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def dataset():
    return Dataset.from_list(ROWS)


def write_json(path):
    path.write_text(json.dumps(ROWS), "utf-8")


def write_lines(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")


def write_parquet(path):
    dataset().to_parquet(path)


def write_csv(path):
    path.write_text('instruction,input,output\n"Say one.","",one\n"Say two.","",two\n"Say three.","",three\n', "utf-8")


FILES = {
    "rows.json": write_json,
    "rows.jsonl": write_lines,
    "rows.parquet": write_parquet,
    "rows.csv": write_csv,
    "ROWS.JSONL": write_lines,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_file_is_one_split_of_rows(here, name, kind):
    FILES[name](here / name)
    source = load_source(kind(here / name))
    assert list(source.splits) == ["train"]
    assert source.splits["train"]["output"] == ["one", "two", "three"]
    assert source.provenance["path"] == str(here / name)


def test_a_folder_of_files_has_a_split_for_each_name(here):
    write_lines(here / "train.jsonl")
    write_lines(here / "test.jsonl")
    source = load_source(here)
    assert set(source.splits) == {"train", "test"}
    assert not source.single


@pytest.mark.parametrize("saved", ["Dataset", "DatasetDict"])
def test_a_folder_that_datasets_saved_is_read_as_it_was_saved(here, saved):
    rows = dataset() if saved == "Dataset" else DatasetDict(train=dataset(), extra=dataset().select([2]))
    rows.save_to_disk(here / "saved")
    source = load_source(here / "saved")
    assert source.splits["train"].to_list() == ROWS
    assert set(source.splits) == ({"train"} if saved == "Dataset" else {"train", "extra"})
    assert source.single == (saved == "Dataset")


def test_a_dataset_in_memory_is_one_split():
    source = load_source(dataset())
    assert (list(source.splits), source.single) == (["train"], True)
    assert source.splits["train"].to_list() == ROWS


def test_a_dictionary_of_datasets_keeps_its_splits_and_their_order():
    source = load_source(DatasetDict(b=dataset(), a=dataset().select([0])))
    assert [(name, len(rows)) for name, rows in source.splits.items()] == [("b", 3), ("a", 1)]
    assert not source.single


def test_one_split_is_chosen_by_name():
    source = load_source(DatasetDict(b=dataset(), a=dataset().select([0])), split="a")
    assert ([(name, len(rows)) for name, rows in source.splits.items()], source.single) == ([("a", 1)], True)


def test_an_unknown_split_names_those_there_are():
    with pytest.raises(SourceError, match=r"no split 'test'; it has b, a"):
        load_source(DatasetDict(b=dataset(), a=dataset()), split="test")


@pytest.mark.parametrize(("limit", "left"), [(0, (0, 0)), (2, (2, 1)), (3, (3, 1)), (99, (3, 1)), (None, (3, 1))])
def test_a_limit_takes_the_first_rows_of_each_split(limit, left):
    splits = load_source(DatasetDict(b=dataset(), a=dataset().select([0])), limit=limit).splits
    assert (len(splits["b"]), len(splits["a"])) == left
    assert splits["b"].to_list() == ROWS[: left[0]]


def test_the_same_content_elsewhere_has_the_same_provenance_but_for_its_path(here):
    for folder in ("first", "second"):
        (here / folder).mkdir()
        write_lines(here / folder / "rows.jsonl")
    first, second = (load_source(here / folder / "rows.jsonl").provenance for folder in ("first", "second"))
    assert first["path"] != second["path"]
    assert {**first, "path": ""} == {**second, "path": ""}


def test_another_content_has_another_provenance(here):
    write_lines(here / "rows.jsonl")
    before = load_source(here / "rows.jsonl").provenance
    (here / "rows.jsonl").write_text(json.dumps(ROWS[0]), "utf-8")
    after = load_source(here / "rows.jsonl")
    assert len(after.splits["train"]) == 1
    assert after.provenance != before


def test_the_same_rows_in_memory_have_the_same_provenance():
    rows = dataset()
    assert load_source(rows).provenance == load_source(rows).provenance
    assert load_source(rows.select([0])).provenance != load_source(rows).provenance


@pytest.mark.parametrize("name", ["nowhere.jsonl", "sub/nowhere", "sub/sub/nowhere", "./nowhere", "nowhere.parquet"])
def test_a_path_that_is_not_there_is_named(here, monkeypatch, name):
    monkeypatch.chdir(here)
    with pytest.raises(SourceError) as error:
        load_source(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_an_absolute_path_that_is_not_there_is_no_hub_id(here):
    with pytest.raises(SourceError, match="no such file or folder"):
        load_source(here / "nowhere")


def test_a_hub_id_that_can_not_be_reached_is_one_line(here, monkeypatch):
    monkeypatch.chdir(here)
    with pytest.raises(SourceError) as error:
        load_source("someone/some-dataset")
    assert "someone/some-dataset" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind_says_which_are_read(here):
    (here / "rows.xlsx").write_text("x")
    with pytest.raises(SourceError, match=r"\.json, \.jsonl, \.parquet or \.csv"):
        load_source(here / "rows.xlsx")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": '),
        ("rows.json", b'[{"instruction": "a", '),
        ("rows.json", b"<html>\n<body>\nnot found\n</body>\n</html>"),
        ("rows.jsonl", b"\xff\xfe\x00\x01"),
        ("rows.parquet", b"PAR1 but no further"),
        ("rows.parquet", b""),
        ("rows.csv", b""),
    ],
)
def test_a_malformed_file_is_named_in_one_line(here, name, content):
    (here / name).write_bytes(content)
    with pytest.raises(SourceError) as error:
        load_source(here / name)
    assert str(here / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "\n", "[]", "{}", "[1, 2]", "5", '"text"'])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_of_json_without_rows_is_an_error_of_ours(here, name, content):
    (here / name).write_text(content)
    with pytest.raises(HfReflectError):
        load_source(here / name)


def test_an_empty_folder_is_named(here):
    with pytest.raises(SourceError, match="here"):
        load_source(here)


def test_a_stream_is_turned_away_with_advice():
    with pytest.raises(SourceError, match="streaming"):
        load_source(dataset().to_iterable_dataset())


def test_columns_that_fit_no_format_are_named():
    with pytest.raises(UnknownFormatError, match="question, answer"):
        load_source(Dataset.from_dict({"question": ["a"], "answer": ["b"]}))


@pytest.mark.parametrize("column", TYPES)
def test_a_column_with_a_name_of_ours_is_named_with_what_to_do(column):
    with pytest.raises(SourceError, match=rf"\b{column}\b.*remove_columns"):
        load_source(dataset().add_column(column, [None] * 3))


def test_a_recycled_dataset_is_recognised_as_one():
    ours = ["row_id", "recycled", "ifd", "rifd", "ifd_original", "rifd_original"]
    with pytest.raises(SourceError, match="recycled already"):
        check_columns(["instruction", "output", *ours])


def test_one_bad_split_among_good_ones_is_found():
    with pytest.raises(UnknownFormatError):
        load_source(DatasetDict(good=dataset(), bad=Dataset.from_dict({"text": ["a"]})))
