"""Selecting again among recorded rewrites: no oracle is asked, and no response goes to a foreign instruction."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from oracle_server import FAULTS, OracleServer, completion
from oracle_server import reflection as reflection_to
from test_transforms import FORMATS, alpaca
from tiny import save_tiny_model
from typer.testing import CliRunner

from hf_reflect import (
    KeepRecycled,
    ReflectInstruction,
    ReflectResponse,
    ScoreIFD,
    ScoreReversedIFD,
    SelectInstruction,
    SelectResponse,
    Student,
    load_student,
    recycle,
)
from hf_reflect.cli import app
from hf_reflect.errors import HfReflectError, OracleError, SourceError
from hf_reflect.guards import Guards
from hf_reflect.oracles import Reply, Request
from hf_reflect.reselecting import reselect


pytestmark = pytest.mark.filterwarnings("ignore::hf_reflect.errors.HfReflectWarning")  # what it says of a tiny student

ROWS = 16


@pytest.fixture(scope="module")
def judge(student) -> Student:
    """Who decided first."""
    return load_student(student)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("other"), "qwen", seed=7)


@pytest.fixture(scope="module")
def other(other_folder) -> Student:
    """Who decides the second time: another model, with another mind."""
    return load_student(str(other_folder))


class Place:
    """Where a test recycles and selects again."""

    def __init__(self, server: OracleServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.journals = 0

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        self.journals += 1  # a journal of its own each time: nothing comes from anywhere but the folder
        return {"journal": self.folder / f"journal-{self.journals}", "progress": False} | options

    def recycle(self, source: Any, name: str = "first", **options: Any) -> Path:
        options = {"oracle": self.server.url} | options
        recycle(source, self.folder / name, **self.options(options))
        return self.folder / name

    def reselect(self, folder: Path, name: str = "second", **options: Any) -> Path:
        calls = len(self.server.calls)
        reselect(folder, self.folder / name, **self.options(options))
        assert len(self.server.calls) == calls, "an oracle was called"
        return self.folder / name


@pytest.fixture
def place(server, tmp_path) -> Iterator[Place]:
    return Place(server, tmp_path)


def read(folder: Path, config: str, split: str = "train") -> list[dict]:
    where = {"default": "data", "reflections": "reflections"}[config]
    return pq.read_table(sorted((folder / where).glob(f"{split}-*.parquet"))).to_pylist()


def assert_same(one: Path, another: Path) -> None:
    for config in ("default", "reflections"):
        assert read(one, config) == read(another, config), config


def texts(row: dict) -> tuple[str, str]:
    """Question and response of a row of any format."""
    if "messages" in row:
        return tuple(turn["content"] for turn in row["messages"][-2:])
    if "conversations" in row:
        return tuple(turn["value"] for turn in row["conversations"][-2:])
    if "prompt" in row:
        return row["prompt"], row["completion"]
    return question(row["instruction"], row.get("input")), row["output"]


def question(instruction: str, material: str | None) -> str:
    return f"{instruction}\n{material}" if material else instruction


def recorded_pairs(row: dict) -> set[tuple[str, str]]:
    """Every pair that the oracle wrote or was shown: a response with the very question it answers."""
    pairs = {(question(row["original"]["instruction"], row["original"]["input"]), row["original"]["response"])}
    (first,), (second,) = row["instruction_reflections"], row["response_reflections"]
    asked_about = question(row["original"]["instruction"], row["original"]["input"])
    if first["status"] == "ok":
        pairs.add((question(first["instruction"], first["input"]), first["response"]))
    if row["instruction_decision"]["kept"] == "rewrite":
        asked_about = question(first["instruction"], first["input"])
    if second["status"] == "ok":
        pairs.add((asked_about, second["response"]))
    return pairs


def source(name: str = "alpaca", count: int = ROWS) -> Dataset:
    rows = [dict(row) for row in alpaca(count)]
    for i, row in enumerate(rows):
        row["input"] = f"material {i}" if i % 3 == 0 else ""
    return Dataset.from_list([{**FORMATS[name](row), "extra": f"e{i}", "more": [i]} for i, row in enumerate(rows)])


# The same student


@pytest.mark.parametrize("style", ["paper", "json", "staged"])
def test_the_same_student_decides_the_same(place, judge, style):
    first = place.recycle(source(), student=judge, prompts=style)
    assert_same(place.reselect(first, student=judge), first)
    assert len({row["recycled"] for row in read(first, "default")}) > 2


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_format_comes_back_with_its_other_columns(place, name):
    first = place.recycle(source(name, 12), student=None, method="reflect")
    assert_same(place.reselect(first, student=None, method="reflect"), first)
    features = [load_dataset(str(place.folder / folder), split="train").features for folder in ("first", "second")]
    assert features[0] == features[1]


def test_method_reflect_without_a_student_comes_out_the_same(place):
    first = place.recycle(source(), student=None, method="reflect")
    assert_same(place.reselect(first, student=None, method="reflect"), first)


def test_splits_come_out_the_same(place):
    splits = DatasetDict({"train": source(count=8), "test": source("alpaca", 12).select(range(8, 12))})
    first = place.recycle(splits, student=None, method="reflect")
    second = place.reselect(first, student=None, method="reflect")
    for config in ("default", "reflections"):
        for split, count in (("train", 8), ("test", 4)):
            assert len(read(second, config, split)) == count
            assert read(second, config, split) == read(first, config, split)


@pytest.mark.parametrize("part", [{"limit": 7}, {"split": "test"}], ids=str)
def test_a_part_of_a_source_is_that_part_again(place, part):
    splits = DatasetDict({"train": source(count=9), "test": source(count=12)})
    first = place.recycle(splits, student=None, method="reflect", **part)
    second = place.reselect(first, student=None, method="reflect")
    split = part.get("split", "train")
    assert read(second, "default", split) == read(first, "default", split)
    assert read(second, "reflections", split) == read(first, "reflections", split)


def test_conversations_with_earlier_turns_come_out_the_same(place):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
    ]
    rows = [{"messages": [*turns, *FORMATS["messages"](row)["messages"]]} for row in alpaca(10)]
    first = place.recycle(Dataset.from_list(rows), student=None, method="reflect")
    second = place.reselect(first, student=None, method="reflect")
    assert_same(second, first)
    assert all(row["messages"][:3] == turns for row in read(second, "default"))


def test_several_oracles_come_out_the_same(place, judge, tmp_path):
    with OracleServer(models=("another",)) as another:
        first = place.recycle(source(), oracle=[place.server.url, another.url], student=judge)
    second = place.reselect(first, student=judge)
    assert_same(second, first)
    assert {row["instruction_decision"]["candidate"] for row in read(second, "reflections")} >= {0, 1}


def test_replies_that_were_no_rewrites_come_out_the_same(place):
    kinds = ["length", "content-filter", "refusal", "empty", "surrogate"]
    place.server.rule = lambda call: FAULTS[kinds[call.number % 7]](call) if call.number % 7 < len(kinds) else None
    first = place.recycle(source(), student=None, method="reflect")
    assert_same(place.reselect(first, student=None, method="reflect"), first)
    assert len({row["instruction_reflections"][0]["status"] for row in read(first, "reflections")}) >= 4


def test_what_a_reasoning_model_thought_comes_out_the_same(place):
    def thoughtful(call):
        return completion(call, f"<think>\nLet me see.\n</think>\n{reflection_to(call.body)}")

    place.server.rule = thoughtful
    first = place.recycle(source(count=6), student=None, method="reflect")
    assert_same(place.reselect(first, student=None, method="reflect"), first)
    (reflection,) = read(first, "reflections")[0]["instruction_reflections"]
    assert reflection["calls"][0]["thinking"] == "Let me see."


def test_rows_that_hold_no_pair_come_out_the_same(place):
    rows = [{"messages": []}, *(FORMATS["messages"](row) for row in alpaca(5)), {"messages": None}]
    first = place.recycle(Dataset.from_list(rows), student=None, method="reflect")
    assert_same(place.reselect(first, student=None, method="reflect"), first)


def test_rows_that_are_alike_come_out_the_same(place):
    first = place.recycle(Dataset.from_list(alpaca(3) * 4), student=None, method="reflect")
    assert_same(place.reselect(first, student=None, method="reflect"), first)
    assert len(place.server.completions) < 12


def test_rows_that_failed_stay_as_they_were(place):
    place.server.rule = lambda call: FAULTS["400"](call) if "(3)" in call.user else None
    first = place.recycle(source(count=6), student=None, method="reflect")
    second = place.reselect(first, student=None, method="reflect")
    assert read(second, "default") == read(first, "default")
    reflections = read(second, "reflections")[3]["instruction_reflections"]
    assert [reflection["status"] for reflection in reflections] == ["skipped"]


def test_the_guards_of_the_run_hold_again(place, judge):
    """A rewrite that was admitted then is admitted now: what is decided again is the student's part."""
    place.server.rule = lambda call: completion(
        call, "[New Instruction]\nSay it.\n[End]\n[New Response]\nSay it.\n[End]"
    )
    first = place.recycle(source(count=6), student=judge, guards=Guards(names=()))
    assert_same(place.reselect(first, student=judge), first)


def test_a_reply_that_was_cut_off_and_asked_for_again_comes_out_the_same(place):
    place.server.rule = lambda call: FAULTS["length"](call) if call.body["max_tokens"] < 3000 else None
    first = place.recycle(source(count=6), student=None, method="reflect", retry_truncated=3000)
    second = place.reselect(first, student=None, method="reflect")
    assert read(second, "default") == read(first, "default")
    assert_same(second, first)


class OwnOracle:
    """Somebody's own oracle, whose identity knows no model."""

    name, concurrency, prompts, max_tokens = "my own", 2, "paper", 100
    identity: ClassVar = {"kind": "own"}

    async def complete(self, request: Request) -> Reply:
        return Reply(reflection_to({"messages": [dict(message) for message in request.messages]}))


def test_an_own_oracle_keeps_its_name(place):
    first = place.recycle(source(count=6), oracle=OwnOracle(), student=None, method="reflect")
    assert_same(place.reselect(first, student=None, method="reflect"), first)


# Another student


@pytest.mark.parametrize(
    ("name", "style"),
    [("alpaca", "paper"), ("alpaca", "json"), ("alpaca", "staged"), ("messages", "staged"), ("sharegpt", "json")],
)
def test_another_student_chooses_among_pairs_that_belong_together(place, judge, other, name, style):
    first = place.recycle(source(name), student=judge, prompts=style)
    place.server.stop()  # nobody could answer
    second = place.reselect(first, student=other)
    recorded, before, after = read(first, "reflections"), read(first, "default"), read(second, "default")
    for pairs, row in zip(map(recorded_pairs, recorded), after, strict=True):
        assert texts(row) in pairs
    assert [texts(row) for row in after] != [texts(row) for row in before]
    assert [(row["extra"], row["more"]) for row in after] == [(f"e{i}", [i]) for i in range(ROWS)]


def test_what_nobody_was_asked_is_skipped_with_a_reason(place, judge, other):
    first = place.recycle(source(), student=judge)
    second = place.reselect(first, student=other)
    differing = 0
    for before, after in zip(read(first, "reflections"), read(second, "reflections"), strict=True):
        assert after["instruction_reflections"][0]["calls"] == before["instruction_reflections"][0]["calls"]
        (reflection,) = after["response_reflections"]
        if before["instruction_decision"]["candidate"] == after["instruction_decision"]["candidate"]:
            assert reflection["calls"] == before["response_reflections"][0]["calls"]
        else:
            differing += 1
            assert (reflection["status"], reflection["calls"]) == ("skipped", [])
            assert "nobody asked this" in reflection["reason"]
            assert after["response_decision"]["kept"] == "original"
    assert differing


def test_the_scores_and_decisions_are_those_of_the_new_student(place, judge, other):
    """They are those of a run in which this student decided from the start, as far as its questions were asked."""
    second = place.reselect(place.recycle(source(), student=judge), student=other)
    fresh = place.recycle(source(), "fresh", student=other)
    for one, another in zip(read(second, "reflections"), read(fresh, "reflections"), strict=True):
        assert one["original"]["instruction"] == another["original"]["instruction"]
        assert one["instruction_decision"] == another["instruction_decision"]
        if one["response_reflections"][0]["calls"]:
            assert one["response_decision"] == another["response_decision"]
            assert one["recycled"] == another["recycled"]


@pytest.mark.parametrize("nothing", ["", None])
def test_rows_that_the_new_student_rejects_are_as_they_were_in_the_source(place, judge, nothing):
    """To the letter: an input that was null is null again."""
    rows = [{**row, "input": nothing, "extra": i} for i, row in enumerate(alpaca(ROWS))]
    first = place.recycle(Dataset.from_list(rows), student=None, method="reflect")
    assert {row["recycled"] for row in read(first, "default")} >= {"both"}
    second = place.reselect(first, student=judge)
    rejected = [
        (row, before)
        for row, before in zip(read(second, "default"), rows, strict=True)
        if row["recycled"] == "original"
    ]
    assert len(rejected) > 2
    for row, before in rejected:
        assert {name: row[name] for name in before} == before


def test_selecting_again_from_what_was_selected_again(place, judge, other):
    first = place.recycle(source(), student=judge)
    second = place.reselect(first, "second", student=other)
    assert_same(place.reselect(second, "third", student=other), second)
    fourth = place.reselect(second, "fourth", student=judge)
    for recorded, before, row in zip(
        read(first, "reflections"), read(first, "default"), read(fourth, "default"), strict=True
    ):
        assert texts(row) in recorded_pairs(recorded)
        if row["recycled"] in ("both", "response"):
            assert texts(row) == texts(before)


# Rows that were left out


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    source(count=16).to_json(path)
    return path


def test_rows_that_were_left_out_are_taken_from_where_the_recipe_says(place, judge, file):
    first = place.recycle(file, student=judge, keep="reflected")
    assert len(read(first, "default")) < 16
    second = place.reselect(first, student=judge)
    assert_same(second, place.recycle(file, "whole", student=judge))
    assert_same(place.reselect(first, "third", student=judge, keep="reflected"), first)


def test_rows_that_were_left_out_are_taken_from_the_data_that_is_given(place, judge, file):
    first = place.recycle(file, student=judge, keep="reflected", limit=12)
    moved = shutil.move(file, file.with_name("moved.jsonl"))
    second = place.reselect(first, student=judge, data=moved)
    assert_same(second, place.recycle(moved, "whole", student=judge, limit=12))


@pytest.mark.parametrize("where", ["a file that is gone", "in memory"])
def test_rows_that_were_left_out_and_can_not_be_had_are_a_line_of_advice(place, judge, file, where):
    first = place.recycle(file if "file" in where else source(count=16), student=judge, keep="reflected")
    file.unlink()
    with pytest.raises(SourceError, match="--data") as raised:
        place.reselect(first, student=judge)
    assert str(first) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (place.folder / "second").exists()


def test_data_that_is_not_what_was_recycled_is_left_as_it_is(place, judge):
    first = place.recycle(source(count=6), student=judge)
    others = [{"instruction": f"What else ({i})?", "input": "", "output": "x"} for i in range(4)]
    second = place.reselect(first, student=judge, data=Dataset.from_list(others))
    assert {row["recycled"] for row in read(second, "default")} == {"original"}
    assert {row["instruction_reflections"][0]["status"] for row in read(second, "reflections")} == {"skipped"}


# `replay:` as an oracle


def test_a_replay_is_an_oracle_of_a_run(place, judge):
    first = place.recycle(source(), student=judge)
    place.server.stop()
    again = place.recycle(source(), "again", oracle=f"replay:{first}", student=judge)
    assert_same(again, first)
    result = recycle(source(), oracle=f"replay:{first}", student=judge, **place.options({}))
    assert (result.summary.spent.calls, result.summary.spent.tokens) == (0, 0)


def test_a_replay_competes_with_an_oracle_that_is_asked(place, judge):
    first = place.recycle(source(count=8), student=judge)
    with OracleServer(models=("another",)) as another:
        both = place.recycle(source(count=8), "both", oracle=[f"replay:{first}", another.url], student=judge)
    for row, recorded in zip(read(both, "reflections"), read(first, "reflections"), strict=True):
        replayed, asked = row["instruction_reflections"]
        assert replayed["response"] == recorded["instruction_reflections"][0]["response"]
        assert (replayed["oracle"], asked["oracle"]) == ("teacher", "another")


def test_a_replay_asks_with_the_prompts_that_were_asked_with_whatever_is_said(place):
    first = place.recycle(source(count=6), student=None, method="reflect", prompts="json")
    again = place.recycle(
        source(count=6), "again", oracle=f"replay:{first}", student=None, method="reflect", prompts="paper"
    )
    assert_same(again, first)


@pytest.mark.parametrize("processes", [None, 2])
def test_a_replay_reflects_in_maps_by_hand(place, judge, journal, processes):
    first = place.recycle(source(count=12), student=judge)
    place.server.stop()
    spec, ds = f"replay:{first}", source(count=12)
    ds = ds.map(ReflectInstruction(spec, journal=journal), batched=True, num_proc=processes)
    ds = ds.map(ScoreIFD(judge, journal=journal), batched=True)
    ds = ds.map(SelectInstruction(), batched=True)
    ds = ds.map(ReflectResponse(spec, journal=journal), batched=True, num_proc=processes)
    ds = ds.map(ScoreReversedIFD(judge, journal=journal), batched=True)
    ds = ds.map(SelectResponse(), batched=True)
    assert [texts(row) for row in ds] == [texts(row) for row in read(first, "default")]
    assert ds["recycled"] == [row["recycled"] for row in read(first, "default")]
    assert len(ds.filter(KeepRecycled("reflected"), batched=True)) < 12


def test_a_folder_below_the_home_folder_is_found(place, tmp_path, monkeypatch):
    """No shell expands the tilde in `replay:~/recycled`."""
    first = place.recycle(source(count=4), student=None, method="reflect")
    monkeypatch.setenv("HOME", str(tmp_path))
    again = place.recycle(source(count=4), "again", oracle="replay:~/first", student=None, method="reflect")
    assert_same(again, first)


@pytest.mark.parametrize("kind", ["empty", "source", "scored", "not there", "half", "no dataset"])
def test_what_is_no_recycled_dataset_is_one_line(place, kind):
    where = place.folder / "folder"
    if kind != "not there":
        where.mkdir()
    if kind == "source":
        source(count=3).to_json(where / "rows.jsonl")
    elif kind == "scored":
        (where / "recipe.yaml").write_text("hf_reflect: '1'\nhash: abc\ntask: score\nsource: {}\n")
    elif kind == "half":
        first = place.recycle(source(count=3), student=None, method="reflect")
        shutil.rmtree(first / "reflections")
        where = first
    elif kind == "no dataset":
        first = place.recycle(source(count=3), student=None, method="reflect")
        shutil.copy(first / "recipe.yaml", where)
    for attempt in (
        lambda: reselect(where, student=None, method="reflect", progress=False),
        lambda: ReflectInstruction(f"replay:{where}"),
        lambda: recycle(source(count=1), oracle=f"replay:{where}", student=None, method="reflect", progress=False),
    ):
        with pytest.raises(OracleError, match="replay:") as raised:
            attempt()
        assert str(where) in str(raised.value)
        assert "\n" not in str(raised.value)


# On the command line


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_selects_again_and_says_what_came_of_it(place, judge, other_folder, file):
    first = place.recycle(file, student=judge)
    place.server.stop()
    out = place.folder / "second"
    done = command("reselect", first, out, "--student", other_folder, "--journal", place.folder / "journal")
    assert done.exit_code == 0, done.exception
    assert "calls to the oracle" in done.output
    assert f"written to {out}" in done.output
    assert_same(out, place.reselect(first, "third", student=str(other_folder)))
    assert str(other_folder) in (out / "recipe.yaml").read_text()


def test_the_command_takes_policies_templates_and_data(place, judge, student, file):
    first = place.recycle(file, student=judge, keep="reflected")
    moved = shutil.move(file, file.with_name("moved.jsonl"))
    words = ["--keep", "reflected", "--template", "alpaca", "--gate-first", "--journal", place.folder / "journal"]
    failed = command("reselect", first, place.folder / "second", "--student", student, *words)
    assert isinstance(failed.exception, HfReflectError)
    assert "--data" in str(failed.exception)
    done = command("reselect", first, place.folder / "second", "--student", student, *words, "--data", moved)
    assert done.exit_code == 0, done.exception
    options = {"keep": "reflected", "gate_first": True, "student_options": {"template": "alpaca"}}
    oracle = f"replay:{first}"
    assert_same(place.folder / "second", place.recycle(moved, "third", oracle=oracle, student=student, **options))


def test_the_command_without_a_student(place):
    first = place.recycle(source(count=4), student=None, method="reflect")
    words = ["--student", "none", "--method", "reflect", "--journal", place.folder / "journal"]
    done = command("reselect", first, place.folder / "second", *words)
    assert done.exit_code == 0, done.exception
    assert_same(place.folder / "second", first)


def test_the_command_on_a_folder_that_is_none_is_one_line(tmp_path):
    done = command("reselect", tmp_path, tmp_path / "out", "--student", "none", "--method", "reflect")
    assert isinstance(done.exception, OracleError)
    assert str(tmp_path) in str(done.exception)
    assert not (tmp_path / "out").exists()
