"""IFD without an oracle: score, select, and what a whole run costs the student."""

import json
import math
import warnings
from importlib.resources import files

import pytest
import torch
from datasets import Dataset, load_dataset
from tiny import save_tiny_model
from typer.testing import CliRunner

from hf_reflect import Journal, ScoreIFD, TopFraction, load_student, recycle, score, select
from hf_reflect.cli import app
from hf_reflect.errors import HfReflectWarning, RecipeError, StudentError
from hf_reflect.pairs import Pair
from hf_reflect.student.batching import batches
from hf_reflect.student.encoding import Encoder, Tokens
from hf_reflect.student.head import Head
from hf_reflect.student.templates import Scored


ROWS = [
    {"instruction": "What is the capital of France?", "input": "", "output": "The capital of France is Paris."},
    {"instruction": "Name a prime number.", "input": "between 10 and 20", "output": "13"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {
        "instruction": "Give three tips.",
        "input": "",
        "output": "Eat a balanced diet, sleep enough and move every day.",
    },
    {"instruction": "Give a tip.", "input": "", "output": "Sleep."},
]


@pytest.fixture(scope="module")
def scored(student, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "scored-rows"
    found = score(
        Dataset.from_list(ROWS), out, student=student, journal=out.parent / "j", dtype="float32", progress=False
    )
    return found, out


def test_score_adds_columns_and_keeps_the_rest(scored):
    _, out = scored
    rows = load_dataset(str(out), split="train")
    assert rows.select_columns(["instruction", "input", "output"]).to_list() == ROWS
    assert set(rows.column_names) == {
        "instruction",
        "input",
        "output",
        "ifd",
        "ifd_score",
        "rifd",
        "rifd_score",
        "ira",
    }


def test_ifd_and_ira_follow_from_the_losses_that_are_written(scored):
    _, out = scored
    for row in load_dataset(str(out), split="train"):
        if row["ifd"] is None:
            assert row["ira"] is None
            continue
        losses = row["ifd_score"]
        assert row["ifd"] == pytest.approx(math.exp(losses["conditioned_loss"] - losses["direct_loss"]))
        assert row["ira"] == pytest.approx(-math.log(row["ifd"]))


def test_a_row_without_a_response_has_no_score_and_says_why(scored):
    found, out = scored
    row = load_dataset(str(out), split="train")[2]
    assert (row["ifd"], row["ifd_score"]["status"]) == (None, "empty")
    assert found.statuses["ifd", "empty"] == 1
    assert found.statuses["ifd", "ok"] == 4


def test_the_loss_ratio_is_the_quotient_of_the_same_losses(scored, student, tmp_path):
    _, out = scored
    ppl = load_dataset(str(out), split="train")
    options = {"student": student, "journal": out.parent / "j", "dtype": "float32", "progress": False}
    score(Dataset.from_list(ROWS), tmp_path / "by-loss", measure="loss", **options)
    for row, other in zip(ppl, load_dataset(str(tmp_path / "by-loss"), split="train"), strict=True):
        if row["ifd"] is not None:
            losses = row["ifd_score"]
            assert other["ifd"] == pytest.approx(losses["conditioned_loss"] / losses["direct_loss"])


def test_select_writes_exactly_so_many_rows_and_counts_the_unscored(scored, tmp_path):
    _, out = scored
    chosen = select(str(out), tmp_path / "best", TopFraction("ifd", count=2))["train"]
    rows = load_dataset(str(tmp_path / "best"), split="train")
    every = [value for value in load_dataset(str(out), split="train")["ifd"] if value is not None]
    assert sorted(rows["ifd"]) == sorted(every)[-2:]
    assert (chosen.rows, chosen.not_scored) == (5, 1)


def test_selecting_by_a_score_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="hf-reflect score"):
        select(Dataset.from_list(ROWS), tmp_path / "none", TopFraction("ifd", count=2))
    assert not (tmp_path / "none").exists()


def test_the_commands_score_and_select(student, tmp_path):
    Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
    arguments = [
        str(tmp_path / "rows.jsonl"),
        str(tmp_path / "s"),
        "--student",
        student,
        "--journal",
        str(tmp_path / "j"),
    ]
    done = CliRunner().invoke(app, ["score", *arguments, "--template", "alpaca", "--boundary", "reference"])
    assert done.exit_code == 0, done.output
    assert "ifd empty  1" in done.output
    done = CliRunner().invoke(
        app, ["select", str(tmp_path / "s"), str(tmp_path / "t"), "--by", "length", "--top", "40%"]
    )
    assert done.exit_code == 0, done.output
    assert "2 of 5 rows" in done.output
    assert load_dataset(str(tmp_path / "t"), split="train")["output"][:] == [ROWS[0]["output"], ROWS[3]["output"]]


def test_a_student_to_whom_most_responses_are_made_harder_is_warned_about(student, tmp_path):
    rows = Dataset.from_list(ROWS)
    values = rows.map(ScoreIFD(student, journal=tmp_path / "j", dtype="float32"), batched=True)["ifd"]
    hard = [row for row, value in zip(ROWS, values, strict=True) if value is not None and value >= 1]
    easy = [row for row, value in zip(ROWS, values, strict=True) if value is not None and value < 1]
    assert hard
    assert easy
    options = {"student": student, "journal": tmp_path / "j", "dtype": "float32", "progress": False}
    with pytest.warns(UserWarning, match="template"):
        score(Dataset.from_list(hard), tmp_path / "hard-rows", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HfReflectWarning)
        score(Dataset.from_list(easy), tmp_path / "easy-rows", **options)


def test_a_run_is_warned_of_such_a_student_as_well(server, student, tmp_path):
    rows = Dataset.from_list(ROWS)
    values = rows.map(ScoreIFD(student, journal=tmp_path / "j", dtype="float32"), batched=True)["ifd"]
    hard = [row for row, value in zip(ROWS, values, strict=True) if value is not None and value >= 1]
    rows = tmp_path / "hard.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in hard))
    arguments = [str(rows), str(tmp_path / "out"), "--oracle", server.url, "--student", student, "--dtype", "float32"]
    done = CliRunner().invoke(app, ["recycle", *arguments, "--journal", str(tmp_path / "j2")])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert f"{len(hard)} of {len(hard)} rows" in line
    assert "template" in line


def test_a_row_in_which_all_was_rewritten_costs_nine_sequences(server, student, tmp_path, monkeypatch):
    ran = []
    losses = Head.mean_losses
    monkeypatch.setattr(Head, "mean_losses", lambda head, batch: ran.extend(batch) or losses(head, batch))
    rows = Dataset.from_list([{"instruction": f"Say {i}.", "output": f"It is {i} and {i}."} for i in range(12)])
    result = recycle(rows, oracle=server.url, student=student, journal=tmp_path / "j", progress=False)
    both = sum(row["recycled"] == "both" for row in result.reflections)
    assert both
    assert len(ran) == len(set(ran)) <= 9 * len(rows)


def test_a_batch_never_exceeds_its_budget_unless_it_is_a_single_sequence():
    sequences = [Tokens(tuple(range(length)), 1) for length in (3, 50, 7, 8, 2, 9, 30, 3)]
    made = list(batches(sequences, 20))
    assert sorted(len(t.ids) for batch in made for t in batch) == sorted(len(t.ids) for t in sequences)
    for batch in made:
        longest = max(len(tokens.ids) for tokens in batch)
        assert len(batch) == 1 or longest * len(batch) <= 20


def test_running_out_of_memory_halves_the_batches_and_goes_on(student, tmp_path, monkeypatch):
    pairs = [Pair(f"Say {i}.", f"It is {i} and nothing but {i}. " * 3) for i in range(20)]
    expected = load_student(student, dtype="float32").ifd(pairs, Journal(tmp_path / "calm"))
    losses, sizes = Head.mean_losses, []

    def small(head, batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        sizes.append(len(batch))
        return losses(head, batch)

    monkeypatch.setattr(Head, "mean_losses", small)
    student_ = load_student(str(save_tiny_model(tmp_path / "same")), dtype="float32")
    scores = student_.ifd(pairs, Journal(tmp_path / "full"))
    assert max(sizes) <= 3
    assert [score.value for score in scores] == pytest.approx([score.value for score in expected], abs=1e-5)


def test_a_sequence_that_fits_in_no_memory_is_an_error_with_advice(student, tmp_path, monkeypatch):
    def full(head, batch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Head, "mean_losses", full)
    judge = load_student(str(save_tiny_model(tmp_path / "m")), dtype="float32")
    with pytest.raises(StudentError, match="--max-length"):
        judge.ifd([Pair("a", "b c d")], Journal(tmp_path / "j"))


@pytest.mark.model
def test_bfloat16_scores_of_a_real_model_lie_near_those_of_float32(tmp_path):
    with (files("hf_reflect") / "data" / "sample.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = [Pair(row["instruction"], row["output"], row["input"]) for row in rows]
    exact, rounded = (
        [score.value for score in load_student("local", dtype=dtype).ifd(pairs, Journal(tmp_path / dtype))]
        for dtype in ("float32", "bfloat16")
    )
    assert rounded == pytest.approx(exact, abs=0.05)
    assert rounded != exact


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen", "sentencepiece"])
def test_the_reference_boundary_does_what_the_published_scripts_do(kind, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / kind, kind))
    bos = tokenizer.bos_token_id if kind in ("llama", "sentencepiece") else None
    text = Scored("ASSISTANT:", "The capital of France is Paris.")
    (passes,) = Encoder(tokenizer, bos, 512, "reference").encode([text])
    # With special tokens, as `tokenizer.encode` gives them there.
    whole, start = tokenizer(text.prefix + text.target)["input_ids"], len(tokenizer(text.prefix)["input_ids"])
    assert passes.conditioned == Tokens(tuple(whole), start)
    assert passes.direct == Tokens(tuple(tokenizer(text.target)["input_ids"]), 1)


def test_the_reference_boundary_cuts_both_passes_as_the_published_scripts_do(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "llama", "llama"))
    text = Scored("Say it.\n", "one two three four five six seven eight nine ten")
    start = len(tokenizer(text.prefix)["input_ids"])
    (passes,) = Encoder(tokenizer, tokenizer.bos_token_id, start + 4, "reference").encode([text])
    assert passes.status == "truncated"
    assert (passes.conditioned.scored, passes.direct.scored) == (4, 4)
