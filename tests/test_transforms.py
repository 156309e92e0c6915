"""The transforms, chained by hand over `datasets` as a user would chain them."""

import asyncio
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import datasets
import pytest
from datasets import Dataset, load_dataset
from oracle_server import FAULTS, completion, error

from hf_reflect import (
    KeepRecycled,
    ReflectInstruction,
    ReflectResponse,
    ScoreIFD,
    ScoreReversedIFD,
    SelectInstruction,
    SelectResponse,
)
from hf_reflect.columns import REFLECTION, TYPES
from hf_reflect.guards import Guards
from hf_reflect.oracles import Reply, Request, Sampling
from hf_reflect.oracles.chat import ChatOracle
from hf_reflect.oracles.pace import Limits


QUESTIONS = ["Name a prime.", "Why is the sky blue?", "Add 2 and 3.", "Say hello.", "Sort 3, 1, 2.", "What is a cat?"]


def alpaca(n: int = 6) -> list[dict]:
    return [
        {"instruction": f"{QUESTIONS[i % 6]} ({i})", "input": "", "output": f"Answer number {i} is short."}
        for i in range(n)
    ]


def as_messages(row: dict, role: str, content: str, user: str, assistant: str) -> list[dict]:
    return [{role: user, content: row["instruction"]}, {role: assistant, content: row["output"]}]


FORMATS = {
    "alpaca": lambda row: row,
    "wizardlm": lambda row: {"instruction": row["instruction"], "output": row["output"]},
    "prompt-completion": lambda row: {"prompt": row["instruction"], "completion": row["output"]},
    "messages": lambda row: {"messages": as_messages(row, "role", "content", "user", "assistant")},
    "sharegpt": lambda row: {"conversations": as_messages(row, "from", "value", "human", "gpt")},
}


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    """Six rows from a file, so with cache files of their own."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in alpaca()))
    return load_dataset("json", data_files=str(file), split="train")


def statuses(ds: Dataset, phase: str = "instruction") -> list[str]:
    return [reflection["status"] for (reflection,) in ds[f"{phase}_reflections"]]


def expected(text: str) -> str:
    """The status that a reply of the server stands for."""
    return "unchanged" if "[Unchanged]" in text else "ok"


def test_reflecting_adds_a_column_and_changes_nothing_else(rows, server, journal):
    result = rows.map(ReflectInstruction(server.url, journal=journal), batched=True)
    assert result.column_names == [*rows.column_names, "instruction_reflections"]
    assert result.select_columns(rows.column_names).to_list() == rows.to_list()
    assert result.features.arrow_schema.field("instruction_reflections").type == TYPES["instruction_reflections"]
    for row, (reflection,) in zip(rows, result["instruction_reflections"], strict=True):
        (call,) = reflection["calls"]
        (sent,) = [c for c in server.completions if row["instruction"] in c.user]
        assert f"Review {sent.digest}" in call["text"]
        assert reflection["status"] == expected(call["text"])


def test_a_spec_and_an_object_say_the_same(rows, server, journal, tmp_path):
    by_spec = rows.map(ReflectInstruction(server.url, journal=journal), batched=True)
    oracle = ChatOracle(server.url)
    by_object = rows.map(ReflectInstruction(oracle, journal=tmp_path / "other"), batched=True, keep_in_memory=True)
    assert by_spec.to_list() == by_object.to_list()


def test_the_same_map_again_comes_from_the_cache_of_datasets(rows, server, journal, tmp_path):
    first = rows.map(ReflectInstruction(server.url, journal=journal), batched=True)
    asked = len(server.completions)
    second = rows.map(ReflectInstruction(server.url, journal=tmp_path / "fresh"), batched=True)
    assert (asked, len(server.completions)) == (6, 6)
    assert second._fingerprint == first._fingerprint
    assert second.cache_files == first.cache_files


@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": 2},
        {"timeout": 9.0},
        {"api_key": "sk"},
        {"limits": Limits(attempts=9, patience=1.0, rpm=1e6)},
        {"prompts": "paper"},
        {"sampling": Sampling()},
        {"sampling": {"temperature": 0.0}},
        {"guards": Guards()},
        {"guards": Guards(("copy", "code", "language"), longest=3.0)},
        {"model": "teacher"},
    ],
    ids=str,
)
def test_what_decides_nothing_is_no_part_of_what_datasets_hashes(rows, server, journal, tmp_path, changes):
    first = rows.map(ReflectInstruction(server.url, journal=journal), batched=True)
    second = rows.map(ReflectInstruction(server.url, journal=tmp_path / "fresh", **changes), batched=True)
    assert second._fingerprint == first._fingerprint
    assert len(server.completions) == 6


def test_an_oracle_as_object_is_hashed_like_its_spec(rows, server, journal):
    by_spec = rows.map(ReflectInstruction(server.url, journal=journal), batched=True)
    by_object = rows.map(ReflectInstruction(ChatOracle(server.url), journal=journal), batched=True)
    in_a_list = rows.map(ReflectInstruction([f"{server.url}#teacher"], journal=journal), batched=True)
    assert by_object._fingerprint == by_spec._fingerprint == in_a_list._fingerprint


def test_what_decides_is_part_of_what_datasets_hashes(rows, server, journal):
    others = [
        {},
        {"sampling": Sampling(temperature=0.5)},
        {"sampling": {"max_tokens": 9}},
        {"prompts": "json"},
        {"guards": Guards(())},
        {"guards": Guards(("language", "length"))},
        {"guards": Guards(("language", "length"), longest=3.0)},
        {"retry_truncated": 4096},
        {"oracle": [server.url, server.url]},
    ]
    prints = {
        rows.map(ReflectInstruction(**{"oracle": server.url, "journal": journal, **o}), batched=True)._fingerprint
        for o in others
    }
    assert len(prints) == len(others)


def test_of_the_sampling_what_is_not_given_suits_the_oracle(rows, server, journal):
    rows.map(ReflectInstruction(server.url, journal=journal, sampling={"temperature": 0.5, "seed": 3}), batched=True)
    sent = {tuple(c.body[k] for k in ("max_tokens", "temperature", "top_p", "seed")) for c in server.completions}
    assert sent == {(ChatOracle.max_tokens, 0.5, 1.0, 3)}


def test_an_oracle_that_was_asked_again_and_thought_first_leaves_both_in_its_calls(rows, server, journal):
    def rule(call):
        if call.attempt == 1:
            return error(503, retry_after=0)
        if call.body["max_tokens"] == 100:
            return completion(call, "<think>Let me see, this is", finish_reason="length")
        message = {"role": "assistant", "content": "Fine.\n[Unchanged]", "reasoning_content": f"Hm, {call.digest}."}
        return completion(call, message=message)

    server.rule = rule
    transform = ReflectInstruction(server.url, journal=journal, sampling={"max_tokens": 100}, retry_truncated=700)
    ds = rows.select([0]).map(transform, batched=True)
    ((reflection,),) = ds["instruction_reflections"]
    assert reflection["status"] == "unchanged"
    cut, whole = reflection["calls"]
    assert (cut["text"], cut["thinking"], cut["finish_reason"]) == ("", "Let me see, this is", "length")
    assert (whole["text"], whole["finish_reason"]) == ("Fine.\n[Unchanged]", "stop")
    assert whole["thinking"] == f"Hm, {server.completions[-1].digest}."
    assert [cut["attempts"], whole["attempts"]] == [2, 2]
    assert [call.body["max_tokens"] for call in server.completions] == [100, 100, 700, 700]


@pytest.mark.parametrize("as_object", [False, True])
def test_two_processes_give_the_same_rows_in_order(rows, server, journal, tmp_path, as_object):
    alone = rows.map(ReflectInstruction(server.url, journal=journal), batched=True)
    oracle = ChatOracle(server.url) if as_object else server.url
    transform = ReflectInstruction(oracle, journal=tmp_path / "other")
    both = rows.map(transform, batched=True, num_proc=2, load_from_cache_file=False)
    assert both.to_list() == alone.to_list()
    assert both.features == alone.features


def test_two_processes_score_as_one_does(rows, student, journal, tmp_path):
    alone = rows.map(ScoreIFD(student, journal=journal), batched=True)
    both = rows.map(ScoreIFD(student, journal=tmp_path / "o"), batched=True, num_proc=2, load_from_cache_file=False)
    assert both["ifd"] == pytest.approx(alone["ifd"], rel=1e-4)


def test_a_key_given_to_a_spec_reaches_the_other_processes(rows, server, journal):
    server.rule = lambda call: None if call.headers.get("authorization") == "Bearer sk-marked" else error(401)
    transform = ReflectInstruction(server.url, journal=journal, api_key="sk-marked")
    assert set(statuses(rows.map(transform, batched=True, num_proc=2))) <= {"ok", "unchanged"}


def chain(oracle, student, journal) -> list:
    """As in the docstring of `hf_reflect.transforms`."""
    return [
        ReflectInstruction(oracle, journal=journal),
        ScoreIFD(student, journal=journal),
        SelectInstruction(),
        ReflectResponse(oracle, journal=journal),
        ScoreReversedIFD(student, journal=journal),
        SelectResponse(),
        ScoreIFD(student, journal=journal),
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_the_whole_chain_by_hand_on_every_row_format(server, student, journal, tmp_path, name):
    file = tmp_path / "rows.parquet"
    source = Dataset.from_list([{**FORMATS[name](row), "extra": i} for i, row in enumerate(alpaca(12))])
    source.to_parquet(file)
    ds = source = load_dataset("parquet", data_files=str(file), split="train")
    for transform in chain(server.url, student, journal):
        ds = ds.map(transform, batched=True, batch_size=5)
    assert ds.features == {**source.features, **{k: v for k, v in ds.features.items() if k in TYPES}}
    assert ds["extra"] == list(range(12))
    for column, type in ((c, t) for c, t in TYPES.items() if c in ds.column_names):
        assert ds.features.arrow_schema.field(column).type == type, column
    for before, after in zip(source, ds, strict=True):
        touched = [c for c in source.column_names if before[c] != after[c]]
        assert bool(touched) == (after["recycled"] != "original")
        assert after["original"]["instruction"] == FORMATS["alpaca"](alpaca(12)[after["extra"]])["instruction"]
    assert len(set(ds["recycled"])) > 1

    kept = ds.filter(KeepRecycled("reflected"), batched=True)
    assert kept["extra"] == [row["extra"] for row in ds if row["recycled"] in ("response", "both")]
    assert ds.filter(KeepRecycled("reflected"))["extra"] == kept["extra"]


def plain(rows: list[dict]) -> list[dict]:
    """A stream may hand out tuples where a dataset has lists."""
    return json.loads(json.dumps(rows))


def test_a_stream_gives_the_same_rows(rows, server, student, journal):
    ds, stream = rows, rows.to_iterable_dataset()
    for transform in chain(server.url, student, journal):
        ds = ds.map(transform, batched=True)
        stream = stream.map(transform, batched=True)
    assert plain(list(stream)) == plain(ds.to_list())
    kept = stream.filter(KeepRecycled("reflected"), batched=True)
    assert plain(list(kept)) == plain(ds.filter(KeepRecycled("reflected"), batched=True).to_list())


def test_a_file_can_be_streamed_through_the_chain(server, student, journal, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in alpaca()))
    stream = load_dataset("json", data_files=str(file), split="train", streaming=True)
    for transform in chain(server.url, student, journal):
        stream = stream.map(transform, batched=True, batch_size=4)
    assert [row["original"]["instruction"] for row in stream] == [row["instruction"] for row in alpaca()]


def test_maps_work_inside_a_running_event_loop(rows, server, journal):
    async def notebook_cell():
        first = rows.map(ReflectInstruction(server.url, journal=journal), batched=True)
        return first.map(ReflectResponse(server.url, journal=journal), batched=True)

    ds = asyncio.run(notebook_cell())
    assert set(statuses(ds) + statuses(ds, "response")) <= {"ok", "unchanged"}
    assert len(server.completions) == 12


@pytest.mark.parametrize("kind", [ReflectInstruction, ScoreIFD, SelectInstruction])
def test_a_map_that_is_not_batched_says_what_to_write(rows, server, student, journal, kind):
    argument = {ReflectInstruction: server.url, ScoreIFD: student, SelectInstruction: "reflect"}[kind]
    transform = kind(argument) if kind is SelectInstruction else kind(argument, journal=journal)
    with pytest.raises(TypeError, match="batched=True"):
        rows.add_column("instruction_reflections", [[]] * 6, feature=_feature()).map(transform)
    assert not server.completions


def _feature():
    import pyarrow as pa

    return datasets.Features.from_arrow_schema(pa.schema([("x", pa.list_(REFLECTION))]))["x"]


def test_ten_thousand_failed_rows_do_not_take_the_types_from_the_rows_after_them(server, journal):
    """Nothing but nulls in a first batch is where inferred types go wrong."""
    unreadable = [{"messages": []}] * 10_000
    good = [{"messages": as_messages(row, "role", "content", "user", "assistant")} for row in alpaca(5)]
    ds = Dataset.from_list(good + unreadable).select([*range(5, 10_005), *range(5)])
    ds = ds.map(ReflectInstruction(server.url, journal=journal), batched=True, batch_size=1000)
    ds = ds.map(SelectInstruction("reflect"), batched=True, batch_size=1000)
    found = statuses(ds)
    assert found[:10_000] == ["skipped"] * 10_000
    assert set(found[10_000:]) <= {"ok", "unchanged"}
    assert "ok" in found[10_000:]
    for column in ("instruction_reflections", "instruction_decision", "original", "ifd", "ifd_score"):
        assert ds.features.arrow_schema.field(column).type == TYPES[column]


def test_rows_that_fail_do_not_take_the_types_of_a_stream_either(server, journal):
    server.rule = lambda call: error(400) if "bad" in call.user else completion(call)
    rows = [{"instruction": f"bad {i}", "input": "", "output": "x"} for i in range(4)] + alpaca(4)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    stream = stream.map(ReflectInstruction(server.url, journal=journal), batched=True, batch_size=2)
    stream = stream.map(SelectInstruction("reflect"), batched=True, batch_size=2)
    found = list(stream)
    assert [row["instruction_reflections"][0]["status"] for row in found[:4]] == ["failed"] * 4
    assert [row["instruction_reflections"][0]["status"] for row in found[4:]].count("ok") > 0
    assert [row["instruction"] for row in found[:4]] == ["bad 0", "bad 1", "bad 2", "bad 3"]


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("400", "failed"),
        ("no-choices", "failed"),
        ("length", "truncated"),
        ("content-filter", "refused"),
        ("refusal", "refused"),
        ("empty", "empty"),
        ("surrogate", "unparsed"),
    ],
)
def test_what_goes_wrong_with_a_row_is_its_status(rows, server, journal, fault, status):
    server.rule = FAULTS[fault]
    ds = rows.map(ReflectInstruction(server.url, journal=journal, limits=Limits(attempts=1)), batched=True)
    assert statuses(ds) == [status] * 6
    assert all(reflection["reason"] for (reflection,) in ds["instruction_reflections"])


def test_selecting_before_reflecting_says_what_is_missing(rows, student, journal):
    with pytest.raises(ValueError, match="map ReflectInstruction first"):
        rows.map(SelectInstruction("reflect"), batched=True)


def run_in_spawned_process(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)


UNPICKLE = "import pickle, sys; t = pickle.load(open(sys.argv[1], 'rb')); print(t.identity)"


def test_a_transform_made_from_a_spec_can_be_pickled_to_a_process_that_is_not_forked(server, journal, tmp_path):
    guards = Guards(("length", "copy"), longest=3.0)
    transforms = (
        ReflectInstruction(server.url, journal=journal),
        ReflectInstruction(server.url, journal=journal, sampling={"seed": 3}, guards=guards, retry_truncated=4096),
        SelectResponse(gate_first=True),
    )
    for i, transform in enumerate(transforms):
        file = tmp_path / f"{i}.pickle"
        file.write_bytes(pickle.dumps(transform))
        done = run_in_spawned_process(UNPICKLE, str(file))
        assert done.stdout.strip() == str(transform.identity), done.stderr


class OwnOracle:
    """Somebody's own oracle, which no spec names."""

    name, concurrency, prompts, max_tokens = "own", 2, "paper", 100
    identity: ClassVar = {"kind": "own"}

    async def complete(self, request: Request) -> Reply:
        return Reply("[Unchanged]")


def test_an_own_oracle_reflects_and_is_inherited_by_forked_processes(rows, journal):
    ds = rows.map(ReflectInstruction(OwnOracle(), journal=journal), batched=True, num_proc=2)
    assert statuses(ds) == ["unchanged"] * 6


def test_a_transform_made_from_an_own_oracle_says_why_it_can_not(journal, tmp_path):
    file = tmp_path / "transform.pickle"
    file.write_bytes(pickle.dumps(ReflectInstruction(OwnOracle(), journal=journal)))
    done = run_in_spawned_process(UNPICKLE, str(file))
    assert done.returncode == 1
    assert "TypeError: ReflectInstruction was made from an object" in done.stderr
    assert "spec" in done.stderr


def test_a_pickle_holds_no_key(server, journal):
    assert b"sk-marked" not in pickle.dumps(ReflectInstruction(server.url, journal=journal, api_key="sk-marked"))
