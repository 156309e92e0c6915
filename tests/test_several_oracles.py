"""Several oracles in one run: their rewrites compete, and they share a journal and a budget."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, load_dataset
from oracle_server import FAULTS, OracleServer, completion
from oracle_server import reflection as reflection_to
from test_transforms import UNPICKLE, alpaca
from typer.testing import CliRunner

from hf_reflect import ReflectInstruction, ReflectResponse, ScoreIFD, SelectInstruction, Student, load_student, recycle
from hf_reflect.cli import app
from hf_reflect.errors import OracleError
from hf_reflect.journal import Journal
from hf_reflect.oracles import journaled
from hf_reflect.oracles.pace import Limits


pytestmark = pytest.mark.filterwarnings("ignore::hf_reflect.errors.HfReflectWarning")  # what it says of a tiny student


@pytest.fixture
def servers() -> Iterator[list[OracleServer]]:
    """Two oracles, which answer the same question differently: the model's name decides."""
    with OracleServer(models=("teacher-a",)) as a, OracleServer(models=("teacher-b",)) as b:
        yield [a, b]


@pytest.fixture(scope="module")
def judge(student) -> Student:
    return load_student(student)


def urls(servers: list[OracleServer]) -> list[str]:
    return [server.url for server in servers]


def run(oracle, out: Path | None, journal: Path, rows: int = 12, *, judge: Student | None = None, **options):
    options = ({} if judge else {"method": "reflect"}) | {"progress": False} | options
    return recycle(Dataset.from_list(alpaca(rows)), out, oracle=oracle, student=judge, journal=journal, **options)


def names(row: dict, phase: str) -> list[str]:
    return [reflection["oracle"] for reflection in row[f"{phase}_reflections"]]


def value(score: dict | None) -> float | None:
    return score and score["value"]


def test_every_oracle_is_asked_about_every_row_in_the_order_they_were_named(servers, journal):
    result = run(urls(servers), None, journal)
    for row in result.reflections:
        assert names(row, "instruction") == names(row, "response") == ["teacher-a", "teacher-b"]
        for phase in ("instruction", "response"):
            for server, reflection in zip(servers, row[f"{phase}_reflections"], strict=True):
                (call,) = reflection["calls"]
                assert call["text"] in {reflection_to(sent.body) for sent in server.completions}
    assert [len(server.completions) for server in servers] == [24, 24]


def test_both_are_asked_about_the_same_pair_in_the_second_phase(servers, journal):
    run(urls(servers), None, journal)
    asked = [[call.user for call in server.completions] for server in servers]
    assert sorted(asked[0]) == sorted(asked[1])


def best(current: float | None, reflections: list[dict], measure: str, sign: int) -> int | None:
    """Which of the usable rewrites has a better score than what is there, and the best; the first of equals."""
    scores = {i: value(r[measure]) for i, r in enumerate(reflections) if r["status"] == "ok" and value(r[measure])}
    better = {i: score for i, score in scores.items() if current is None or sign * score > sign * current}
    return max(better, key=lambda i: (sign * better[i], -i)) if better else None


def test_the_student_keeps_the_best_of_what_was_there_and_all_rewrites(servers, judge, journal):
    result = run(urls(servers), None, journal, rows=40, judge=judge)
    kept = {"instruction": [], "response": []}
    for row, final in zip(result.reflections, result.dataset, strict=True):
        first, second = row["instruction_reflections"], row["response_reflections"]
        winner = best(value(row["original"]["ifd"]), first, "ifd", +1)
        assert row["instruction_decision"]["candidate"] == winner
        before = row["original"] if winner is None else first[winner]
        last = best(value(before["rifd"]), second, "rifd", -1)
        assert row["response_decision"]["candidate"] == last
        assert final["instruction"] == before["instruction"]
        assert final["output"] == (before if last is None else second[last])["response"]
        kept["instruction"].append(winner)
        kept["response"].append(last)
    assert set(kept["instruction"]) == set(kept["response"]) == {None, 0, 1}


def test_method_reflect_takes_the_first_that_is_usable(servers, journal):
    servers[0].rule = lambda call: completion(call, "[Unchanged]") if "(1" in call.user else None
    servers[1].rule = lambda call: completion(call, "[Unchanged]") if "(15)" in call.user else None
    result = run(urls(servers), None, journal, rows=20)
    for row in result.reflections:
        for phase in ("instruction", "response"):
            usable = [i for i, r in enumerate(row[f"{phase}_reflections"]) if r["status"] == "ok"]
            assert row[f"{phase}_decision"]["candidate"] == (usable[0] if usable else None)
    assert {row["instruction_decision"]["candidate"] for row in result.reflections} == {None, 0, 1}


def test_the_recipe_lists_them_with_what_each_was_asked_with(servers, tmp_path):
    run(urls(servers), tmp_path / "out", tmp_path / "journal")
    oracles = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["oracles"]
    assert [oracle["spec"] for oracle in oracles] == [f"{server.url}#{server.models[0]}" for server in servers]
    assert [oracle["identity"]["model"] for oracle in oracles] == ["teacher-a", "teacher-b"]
    assert all(oracle["prompts"]["name"] == "paper" for oracle in oracles)
    assert all(oracle["sampling"]["max_tokens"] == 2048 for oracle in oracles)


def test_the_order_is_part_of_the_recipe(servers, tmp_path):
    hashes = {
        run(oracle, None, tmp_path / "journal").recipe.hash
        for oracle in (urls(servers), urls(servers)[::-1], urls(servers)[:1], urls(servers)[0])
    }
    assert len(hashes) == 3  # a list of one is that one
    assert [len(server.completions) for server in servers] == [len({c.digest for c in s.completions}) for s in servers]


def test_one_more_oracle_on_a_journal_asks_only_that_one_again_in_the_first_phase(servers, tmp_path):
    run(servers[0].url, None, tmp_path / "journal")
    before = len(servers[0].completions)
    run(urls(servers), None, tmp_path / "journal")
    assert len(servers[0].completions) <= before + 12  # whose responses are those of another pair now
    assert len(servers[1].completions) == 24


def test_two_models_of_one_server_are_two_oracles(journal):
    with OracleServer(models=("alpha", "beta")) as server:
        result = run([f"{server.url}#alpha", f"{server.url}#beta"], None, journal)
        assert names(result.reflections[0], "instruction") == ["alpha", "beta"]
        assert {call.body["model"] for call in server.completions} == {"alpha", "beta"}


def test_they_share_one_budget(servers, journal):
    def priced(call):
        answer = completion(call)
        return replace(answer, body={**answer.body, "usage": {"prompt_tokens": 60, "completion_tokens": 40}})

    for server in servers:
        server.rule = priced
    result = run(urls(servers), None, journal, limits=Limits(max_tokens_total=1500))
    assert sum(len(server.completions) for server in servers) == 15
    assert result.summary.spent.tokens == 1500
    assert result.summary.spent.not_asked == 2 * 2 * 12 - 15


def test_one_that_is_not_there_stops_the_run_before_the_other_is_asked(servers, tmp_path):
    servers[1].stop()
    with pytest.raises(OracleError, match="Is the server running") as raised:
        run(urls(servers), tmp_path / "out", tmp_path / "journal")
    assert servers[1].url in str(raised.value)
    assert not servers[0].completions
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["401", "reset"])
def test_one_that_dies_on_the_way_stops_the_run_by_its_name_and_what_was_paid_for_is_kept(
    servers, tmp_path, monkeypatch, fault
):
    monkeypatch.setattr(journaled, "_LONGEST_BACKOFF", 0.01)
    servers[1].rule = lambda call: FAULTS[fault](call) if call.number > 6 else None
    with pytest.raises(OracleError) as raised:
        run(urls(servers), tmp_path / "out", tmp_path / "journal", limits=Limits(patience=0.2))
    assert servers[1].url in str(raised.value) or "teacher-b" in str(raised.value)
    assert not (tmp_path / "out").exists()
    servers[1].rule = None
    paid = {entry["value"]["text"] for entry in Journal(tmp_path / "journal").entries("reply")}
    before = len(servers[0].completions)
    run(urls(servers), tmp_path / "out", tmp_path / "journal")
    again = {reflection_to(call.body) for call in servers[0].completions[before:]}
    assert len({call.digest for call in servers[0].completions}) == 24
    assert not paid & again


def test_an_oracle_that_fails_a_row_leaves_it_to_the_other(servers, journal):
    servers[0].rule = FAULTS["400"]
    result = run(urls(servers), None, journal)
    for row in result.reflections:
        failed, other = row["instruction_reflections"]
        assert (failed["status"], failed["oracle"]) == ("failed", "teacher-a")
        assert row["instruction_decision"]["candidate"] == (1 if other["status"] == "ok" else None)


def test_none_at_all_is_refused(tmp_path):
    with pytest.raises(OracleError, match="none is named"):
        run([], None, tmp_path / "journal")


def test_the_command_line_takes_several(servers, tmp_path):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    Dataset.from_list(alpaca(5)).to_json(source)
    words = ["--method", "reflect", "--student", "none", "--journal", str(tmp_path / "journal")]
    named = [word for server in servers for word in ("--oracle", server.url)]
    done = CliRunner().invoke(app, ["recycle", str(source), str(out), *named, *words])
    assert done.exit_code == 0, done.exception
    rows = load_dataset(str(out), "reflections", split="train")
    assert [names(row, "instruction") for row in rows] == [["teacher-a", "teacher-b"]] * 5
    again = ["--config", str(out / "recipe.yaml"), "--journal", str(tmp_path / "journal")]
    done = CliRunner().invoke(app, ["recycle", str(source), str(tmp_path / "again"), *again])
    assert done.exit_code == 0, done.exception
    assert load_dataset(str(tmp_path / "again"), "reflections", split="train").to_list() == rows.to_list()


# By hand


def test_maps_by_hand_give_what_a_run_gives(servers, judge, journal):
    whole = run(urls(servers), None, journal, judge=judge)
    ds = Dataset.from_list(alpaca(12)).map(ReflectInstruction(urls(servers), journal=journal), batched=True)
    ds = ds.map(ScoreIFD(judge, journal=journal), batched=True)
    ds = ds.map(SelectInstruction(), batched=True)
    ds = ds.map(ReflectResponse(urls(servers), journal=journal), batched=True)
    assert [row["candidate"] for row in ds["instruction_decision"]] == [
        row["candidate"] for row in whole.reflections["instruction_decision"]
    ]
    texts = [[reflection["response"] for reflection in row] for row in ds["response_reflections"]]
    assert texts == [[r["response"] for r in row] for row in whole.reflections["response_reflections"]]


def test_two_processes_give_the_same_rows_as_one(servers, journal, tmp_path):
    rows = Dataset.from_list(alpaca(8))
    alone = rows.map(ReflectInstruction(urls(servers), journal=journal), batched=True)
    transform = ReflectInstruction(urls(servers), journal=tmp_path / "other")
    both = rows.map(transform, batched=True, num_proc=2, load_from_cache_file=False)
    assert both.to_list() == alone.to_list()
    assert both.features == alone.features


@pytest.mark.parametrize("twice", [False, True], ids=["two oracles", "the same twice"])
def test_a_process_that_is_not_forked_makes_the_same_oracles_again(servers, journal, tmp_path, twice):
    named = [servers[0].url] * 2 if twice else urls(servers)
    transform = ReflectInstruction(named, journal=journal, prompts="json")
    file = tmp_path / "transform.pickle"
    file.write_bytes(pickle.dumps(transform))
    done = subprocess.run([sys.executable, "-c", UNPICKLE, str(file)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(transform.identity), done.stderr
