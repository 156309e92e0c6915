"""What asking may cost: where a run stops asking, what it leaves, and how it goes on."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from oracle_server import Answer, Call, completion
from test_transforms import alpaca, statuses
from typer.testing import CliRunner

from hf_reflect import ReflectInstruction, recycle
from hf_reflect.cli import app
from hf_reflect.errors import OracleError
from hf_reflect.oracles import Reply, Request
from hf_reflect.oracles.pace import Limits
from hf_reflect.oracles.purse import Purse


READ, WRITTEN = 60, 40
EACH = READ + WRITTEN
"""Tokens of each call of a server that answers by `priced`."""


def priced(call: Call, read: int = READ, written: int = WRITTEN) -> Answer:
    """The usual answer, for so many tokens."""
    answer = completion(call)
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return replace(answer, body={**answer.body, "usage": usage}, delay=0.01)


def run(server, out: Path | None, rows: int = 20, *, journal: Path, student: Any = None, **limits: Any):
    options = {} if student else {"method": "reflect"}
    source = Dataset.from_list(alpaca(rows))
    spending = Limits(**limits)
    return recycle(
        source, out, oracle=server.url, student=student, journal=journal, limits=spending, progress=False, **options
    )


def read(folder: Path, config: str) -> list[dict]:
    return load_dataset(str(folder), config, split="train").to_list()


def reflections(result) -> list[dict]:
    return [
        reflection
        for row in result.reflections
        for phase in ("instruction", "response")
        for reflection in row[f"{phase}_reflections"]
    ]


# In numbers


def request(*texts: str) -> Request:
    return Request(tuple({"role": "user", "content": text} for text in texts))


def pay(purse: Purse, read: int, written: int = 0) -> None:
    taken = purse.pay(request("hello"), Reply("x", prompt_tokens=read, completion_tokens=written), 1.0)
    assert taken == read + written


def test_the_cost_is_that_of_a_million_tokens_read_and_written():
    purse = Purse(Limits(price_in=0.5, price_out=2.0))
    pay(purse, 3_000_000, 250_000)
    assert purse.cost == 3 * 0.5 + 0.25 * 2.0


@pytest.mark.parametrize(("prices", "expected"), [({"price_in": 4.0}, 2.0), ({"price_out": 4.0}, 1.0), ({}, None)])
def test_a_price_that_is_not_given_is_nothing_and_without_any_there_is_no_cost(prices, expected):
    purse = Purse(Limits(**prices))
    pay(purse, 500_000, 250_000)
    assert purse.cost == expected


LIMITS = pytest.mark.parametrize(
    "limits", [{"max_tokens_total": 800}, {"max_cost": 800.0, "price_in": 1e6}], ids=["tokens", "cost"]
)


@LIMITS
@pytest.mark.parametrize(("in_flight", "reached"), [(0, False), (1, False), (2, True)])
def test_the_budget_is_reached_where_an_average_call_after_those_in_flight_would_exceed_it(limits, in_flight, reached):
    purse = Purse(Limits(**limits))
    for tokens in (100, 300):  # 200 on average; 400 + 2 * 200 fit
        pay(purse, tokens)
    purse.in_flight = in_flight
    assert purse.reached is reached


@LIMITS
@pytest.mark.parametrize(("in_flight", "reached"), [(0, False), (1, True), (9, True)])
def test_before_the_first_reply_one_call_is_enough(limits, in_flight, reached):
    purse = Purse(Limits(**limits))
    purse.in_flight = in_flight
    assert purse.reached is reached
    pay(purse, 1)
    assert not purse.reached


@pytest.mark.parametrize("in_flight", [0, 9])
@pytest.mark.parametrize("limits", [{}, {"price_in": 1.0}])
def test_without_a_limit_there_is_always_room(limits, in_flight):
    purse = Purse(Limits(**limits))
    purse.in_flight = in_flight
    assert not purse.reached
    pay(purse, 10**9)
    assert not purse.reached


@pytest.mark.parametrize("limits", [{"max_tokens_total": 0}, {"max_cost": 0.0, "price_out": 1.0}])
def test_a_budget_of_nothing_is_reached_from_the_start(limits):
    assert Purse(Limits(**limits)).reached


def test_calls_that_cost_nothing_are_never_too_many():
    purse = Purse(Limits(max_cost=0.01, price_in=0.0, price_out=1.0))
    for _ in range(10):
        pay(purse, 10**9)
    assert not purse.reached


@pytest.mark.parametrize(
    ("reply", "read", "written"),
    [
        (Reply("a" * 200), 100, 50),
        (Reply("a" * 200, thinking="b" * 400), 100, 150),
        (Reply("a" * 200, prompt_tokens=7), 7, 50),
        (Reply("a" * 200, completion_tokens=7), 100, 7),
        (Reply("a" * 200, prompt_tokens=0, completion_tokens=0), 0, 0),
        (Reply("a" * 200, prompt_tokens=3, completion_tokens=4, thinking="b" * 400), 3, 4),
    ],
)
def test_what_a_server_does_not_count_is_estimated_at_four_characters_a_token(reply, read, written):
    """Only what it does not count: nothing at all is a count too."""
    purse = Purse()
    taken = purse.pay(request("s" * 100, "u" * 300), reply, 2.5)
    assert purse.spent.prompt_tokens == pytest.approx(read, abs=1)
    assert purse.spent.completion_tokens == pytest.approx(written, abs=1)
    assert taken == purse.spent.tokens == purse.spent.tokens_per_call
    assert (purse.spent.calls, purse.spent.seconds) == (1, 2.5)


def test_the_least_call_of_a_server_that_does_not_count_is_not_free():
    assert Purse().pay(request(""), Reply(""), 0.0) > 0


def test_a_limit_on_the_cost_without_prices_is_refused_before_anything_is_asked(server, tmp_path):
    with pytest.raises(OracleError, match="--price-in and --price-out"):
        run(server, tmp_path / "out", journal=tmp_path / "journal", max_cost=5.0)
    assert not server.completions
    assert not (tmp_path / "out").exists()


# In a run


BUDGETS = {"tokens": {"max_tokens_total": 12 * EACH}, "cost": {"max_cost": 6.0, "price_in": 5000, "price_out": 5000}}
"""Each is enough for twelve calls of `priced`: a hundred tokens at 5000 per million cost a half."""


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("kind", BUDGETS)
def test_no_call_is_made_that_the_budget_does_not_allow_and_none_that_it_does_is_left_out(
    server, journal, kind, concurrency
):
    server.rule = priced
    source = Dataset.from_list(alpaca(20))
    options = {"student": None, "method": "reflect", "journal": journal, "progress": False}
    limits, server_options = Limits(**BUDGETS[kind]), {"concurrency": concurrency}
    result = recycle(source, oracle=server.url, limits=limits, oracle_options=server_options, **options)
    assert len(server.completions) == 12
    assert result.summary.spent.tokens == 12 * EACH
    assert result.summary.spent.not_asked == 2 * 20 - 12


def test_before_the_first_reply_one_call_is_made(server, journal):
    """The others wait for what it took, and are made at once then."""

    def slow_at_first(call: Call) -> Answer:
        first = len(server.completions) == 1
        if not first:
            together.append(server._at_once)
        return replace(priced(call), delay=0.3 if first else 0.05)

    together: list[int] = []
    server.rule = slow_at_first
    came = server.calls
    run(server, None, journal=journal, max_tokens_total=10**6)
    first, *others = [call.at for call in came if call.method == "POST"]
    assert min(others) >= first + 0.3
    assert max(together) > 4


@pytest.mark.parametrize("read", [400, 6000])
def test_long_calls_exceed_the_budget_by_one_at_most(server, journal, read):
    """Also at first, when nobody knows yet how long they are."""
    server.rule = lambda call: priced(call, read, 0)
    result = run(server, None, journal=journal, max_tokens_total=2 * read)
    assert result.summary.spent.tokens <= 3 * read


def test_calls_of_different_lengths_stop_close_to_the_limit(server, journal):
    limit = 3000
    spent = run(server, None, journal=journal, max_tokens_total=limit).summary.spent
    most = max(sum(len(m["content"].split()) for m in c.body["messages"]) for c in server.completions) + 200
    assert limit - 2 * most < spent.tokens <= limit + most


@pytest.mark.parametrize("budget", [{"max_tokens_total": 0}, {"max_cost": 0.0, "price_in": 1.0, "price_out": 1.0}])
def test_with_nothing_to_spend_nothing_is_asked(server, journal, budget):
    result = run(server, None, journal=journal, **budget)
    assert not server.completions
    assert result.summary.spent.not_asked == 2 * 20
    assert [row["recycled"] for row in result.dataset] == ["original"] * 20


@pytest.mark.parametrize(
    "budget", [{"max_tokens_total": 5000}, {"max_cost": 5.0, "price_in": 1000, "price_out": 1000}], ids=str
)
def test_a_budget_is_kept_also_where_the_server_does_not_count_tokens(server, journal, budget):
    def silent(call: Call) -> Answer:
        body = dict(completion(call).body)
        del body["usage"]
        return Answer(body=body, delay=0.01)

    server.rule = silent
    spent = run(server, None, 40, journal=journal, **budget).summary.spent
    characters = [sum(len(m["content"]) for m in call.body["messages"]) for call in server.completions]
    assert sum(characters) / 4 <= spent.prompt_tokens <= sum(characters) / 4 + len(characters)
    assert 4000 < spent.tokens <= 5000 + max(characters) / 4 + 200
    assert spent.not_asked == 80 - len(server.completions)


def test_rows_that_were_not_asked_about_are_skipped_with_a_reason_and_stay_as_they_were(server, tmp_path):
    server.rule = priced
    out = tmp_path / "out"
    result = run(server, out, journal=tmp_path / "journal", **BUDGETS["tokens"])
    asked = [one for one in reflections(result) if one["calls"]]
    skipped = [one for one in reflections(result) if not one["calls"]]
    assert (len(asked), len(skipped)) == (12, 28)
    assert {one["status"] for one in asked} == {"ok", "unchanged"}
    assert {(one["status"], one["reason"]) for one in skipped} == {("skipped", "not asked: the budget was reached")}
    for before, row, after in zip(alpaca(20), result.reflections, read(out, "default"), strict=True):
        if not any(one["calls"] for one in row["instruction_reflections"] + row["response_reflections"]):
            assert {name: after[name] for name in before} == before
            assert after["recycled"] == "original"
    assert {path.name for path in out.iterdir()} == {"README.md", "recipe.yaml", "data", "reflections", "pictures"}


@pytest.mark.parametrize("kind", BUDGETS)
def test_a_larger_budget_goes_on_without_paying_again_and_ends_as_if_there_had_been_none(server, tmp_path, kind):
    server.rule = priced
    out, journal = tmp_path / "out", tmp_path / "journal"
    for factor in (1, 2, 10):
        larger = {key: value * factor if key.startswith("max") else value for key, value in BUDGETS[kind].items()}
        spent = run(server, out, journal=journal, **larger).summary.spent
        assert spent.recalled <= len(server.completions)
    digests = [call.digest for call in server.completions]
    assert len(digests) == len(set(digests)) == 40
    assert spent.not_asked == 0
    run(server, tmp_path / "whole", journal=tmp_path / "fresh")
    for config in ("default", "reflections"):
        assert read(out, config) == read(tmp_path / "whole", config)


@pytest.mark.filterwarnings("ignore::hf_reflect.errors.HfReflectWarning")  # what it says of a tiny student
def test_with_a_student_too_a_run_that_was_cut_short_ends_as_if_it_had_not_been(server, student, tmp_path):
    server.rule = priced
    out = tmp_path / "out"
    for budget in (500, 1500, 10_000):
        run(server, out, 12, journal=tmp_path / "journal", student=student, max_tokens_total=budget)
    run(server, tmp_path / "whole", 12, journal=tmp_path / "fresh", student=student)
    texts = ("row_id", "recycled", "instruction", "input", "output")
    ended, whole = read(out, "default"), read(tmp_path / "whole", "default")
    assert [[row[name] for name in texts] for row in ended] == [[row[name] for name in texts] for row in whole]
    # In bfloat16, which rows were scored together shows in the fourth digit.
    assert [row["ifd"] for row in ended] == pytest.approx([row["ifd"] for row in whole], rel=0.02)


def test_what_the_journal_knows_costs_nothing_of_the_budget(server, tmp_path):
    server.rule = priced
    whole = run(server, None, journal=tmp_path / "journal")
    again = run(server, None, journal=tmp_path / "journal", max_tokens_total=1)
    assert again.reflections.to_list() == whole.reflections.to_list()
    assert (again.summary.spent.calls, again.summary.spent.not_asked) == (0, 0)


def test_a_row_given_up_between_its_calls_keeps_what_was_paid_for(server, journal):
    """A staged reflection takes three calls."""
    server.rule = priced
    source = Dataset.from_list(alpaca(1))
    options = {"student": None, "method": "reflect", "journal": journal, "progress": False, "prompts": "staged"}
    result = recycle(source, oracle=server.url, limits=Limits(max_tokens_total=2 * EACH), **options)
    row = result.reflections[0]
    (first,), (second,) = row["instruction_reflections"], row["response_reflections"]
    assert (first["status"], second["status"]) == ("skipped", "skipped")
    assert [len(first["calls"]), len(second["calls"])] == [2, 0]
    assert result.dataset[0]["output"] == alpaca(1)[0]["output"]


def test_a_map_by_hand_goes_on_with_a_larger_budget_too(server, journal, tmp_path):
    """Rows that were not asked about for lack of money must not come back from the cache of `datasets`."""
    server.rule = priced
    Dataset.from_list(alpaca(20)).to_parquet(tmp_path / "rows.parquet")
    rows = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    for budget, skipped in ((5 * EACH, 15), (100 * EACH, 0)):
        transform = ReflectInstruction(server.url, journal=journal, limits=Limits(max_tokens_total=budget))
        assert statuses(rows.map(transform, batched=True)).count("skipped") == skipped


# On the command line


@pytest.fixture
def words(server, tmp_path) -> list[str]:
    server.rule = priced
    source = tmp_path / "rows.jsonl"
    Dataset.from_list(alpaca(20)).to_json(source)
    journal = str(tmp_path / "journal")
    options = ["--oracle", server.url, "--method", "reflect", "--student", "none", "--journal", journal]
    return ["recycle", str(source), str(tmp_path / "out"), *options, "--concurrency", "1"]


MONEY = ["--price-in", "5000", "--price-out", "5000"]


@pytest.mark.parametrize("budget", [["--max-tokens-total", "1200"], ["--max-cost", "6", *MONEY]])
def test_a_command_that_reached_its_budget_says_how_to_go_on(server, words, tmp_path, budget):
    done = CliRunner().invoke(app, [*words, *budget])
    assert done.exit_code == 0, done.exception
    assert len(server.completions) == 12
    assert "the budget was reached: 28 calls were not made" in done.output
    assert "Run the same command again to go on, with as large a budget once more." in done.output
    assert (tmp_path / "out" / "recipe.yaml").is_file()
    larger = CliRunner().invoke(app, [*words, budget[0], "9999", *budget[2:]])
    assert larger.exit_code == 0, larger.exception
    assert "budget" not in larger.output
    assert len(server.completions) == 40


def test_a_command_says_what_was_spent(words):
    done = CliRunner().invoke(app, [*words, "--price-in", "1000", "--price-out", "2000"])
    assert re.search(r"calls to the oracle +40, and 0 answered from the journal", done.output)
    assert re.search(rf"tokens spent +{40 * READ} read, {40 * WRITTEN} written", done.output)
    cost = 40 * (READ * 1000 + WRITTEN * 2000) / 1e6
    assert re.search(rf"^cost +{cost:.2f}$", done.output, re.MULTILINE)


def test_a_command_with_a_limit_on_the_cost_needs_prices(server, words):
    done = CliRunner().invoke(app, [*words, "--max-cost", "5"])
    assert isinstance(done.exception, OracleError)
    assert "--price-in" in str(done.exception)
    assert not server.completions
