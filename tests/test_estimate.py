"""What a run would take, held against what the server counted and against formulas worked out here."""

import math
import re
import statistics
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from oracle_server import FAULTS, Call, OracleServer, reflection
from typer.testing import CliRunner

from hf_reflect import recycle
from hf_reflect.cli import app
from hf_reflect.errors import SourceError
from hf_reflect.estimating import Range, estimate
from hf_reflect.oracles import journaled


def rows(count: int, prefix: str = "row") -> list[dict]:
    """Rows of different lengths, each of which says its number."""
    return [
        {"prompt": f"{prefix} {i:03}: {'tell me more, ' * (i % 7)}please.", "completion": "Yes. " * (1 + i % 5)}
        for i in range(count)
    ]


def row_of(call: Call, prefix: str = "row") -> int:
    """The row that a call is about; a new instruction begins with the old one."""
    return int(re.search(rf"{prefix} (\d\d\d):", call.user)[1])


def counted(server: OracleServer) -> dict[int, tuple[int, int, int]]:
    """Calls, tokens read and tokens written of each row, as the server counts them: in words."""
    found: dict[int, tuple[int, int, int]] = {}
    for call in server.completions:
        read = sum(len(message["content"].split()) for message in call.body["messages"])
        calls, before, written = found.get(row_of(call), (0, 0, 0))
        found[row_of(call)] = (calls + 1, before + read, written + len(reflection(call.body).split()))
    return found


def of_all(sample: list[float], count: int) -> tuple[float, float, float]:
    """Total and 95 % interval: mean ± 1.96 · s/√n · √(1 - n/N), times N."""
    n, mean = len(sample), statistics.fmean(sample)
    error = 1.96 * statistics.stdev(sample) / math.sqrt(n) * math.sqrt(1 - n / count)
    return mean * count, max(0, mean - error) * count, (mean + error) * count


def shown(total: Range) -> tuple[float, float, float]:
    return total.value, total.low, total.high


def ask(server: OracleServer, journal: Path, count: int = 60, **options):
    source = Dataset.from_list(rows(count))
    return estimate(source, oracle=server.url, journal=journal, progress=False, **options)


def test_calls_and_tokens_are_those_the_server_counted_scaled_up(server, journal):
    found = ask(server, journal, sample=12)
    calls, read, written = zip(*counted(server).values(), strict=True)
    assert (found.rows, found.sampled, found.paid) == (60, 12, len(server.completions))
    assert shown(found.calls) == pytest.approx(of_all(calls, 60))
    assert shown(found.prompt_tokens) == pytest.approx(of_all(read, 60))
    assert shown(found.completion_tokens) == pytest.approx(of_all(written, 60))
    assert found.completion_tokens.low < found.completion_tokens.value < found.completion_tokens.high


@pytest.mark.parametrize("style", ["json", "staged"])
def test_other_prompts_take_other_calls(server, journal, style):
    found = ask(server, journal, sample=10, prompts=style)
    calls, read, written = zip(*counted(server).values(), strict=True)
    assert shown(found.calls) == pytest.approx(of_all(calls, 60))
    assert shown(found.prompt_tokens) == pytest.approx(of_all(read, 60))
    assert shown(found.completion_tokens) == pytest.approx(of_all(written, 60))


def test_a_sample_worked_out_by_hand():
    # mean 4, variance 8/3 + ... : deviations -2, 0, 0, 2 -> 8 / 3; standard error √(8/3 / 4) · √(1 - 4/16)
    total = Range.of([2.0, 4.0, 4.0, 6.0], 16)
    error = 1.96 * math.sqrt(8 / 3 / 4 * 12 / 16)
    assert shown(total) == pytest.approx((64, 16 * (4 - error), 16 * (4 + error)))


def test_an_interval_begins_at_nothing_at_the_lowest():
    assert Range.of([0.0, 0.0, 0.0, 30.0], 1000).low == 0


def test_one_row_tells_nothing_of_the_others_and_all_of_itself():
    assert shown(Range.of([5.0], 10)) == (50, 0, math.inf)
    assert shown(Range.of([5.0], 1)) == (5, 5, 5)


@pytest.mark.parametrize("sample", [15, 400])
def test_a_sample_of_all_rows_is_exact(server, journal, sample):
    found = ask(server, journal, 15, sample=sample)
    spent = recycle(
        Dataset.from_list(rows(15)),
        oracle=server.url,
        student=None,
        method="reflect",
        journal=journal.with_name("other"),
        progress=False,
    ).summary.spent
    assert found.sampled == 15
    assert shown(found.calls) == (spent.calls,) * 3
    assert shown(found.prompt_tokens) == pytest.approx((spent.prompt_tokens,) * 3)
    assert shown(found.completion_tokens) == pytest.approx((spent.completion_tokens,) * 3)


def test_prices_give_the_cost_with_an_interval_of_its_own(server, journal):
    found = ask(server, journal, sample=12, price_in=500.0, price_out=3000.0)
    costs = [(read * 500 + written * 3000) / 1e6 for _, read, written in counted(server).values()]
    assert found.prices == (500, 3000)
    assert shown(found.cost) == pytest.approx(of_all(costs, 60))


@pytest.mark.parametrize(("given", "prices"), [({"price_in": 2.0}, (2, 0)), ({"price_out": 3.0}, (0, 3))])
def test_a_price_that_is_not_given_is_nothing(server, journal, given, prices):
    found = ask(server, journal, sample=5, **given)
    tokens = found.prompt_tokens if "price_in" in given else found.completion_tokens
    assert found.prices == prices
    assert found.cost.value == pytest.approx(tokens.value * sum(prices) / 1e6)


def test_without_prices_there_is_no_cost(server, journal):
    found = ask(server, journal, sample=5)
    assert (found.cost, found.prices) == (None, None)


@pytest.mark.parametrize(("count", "sample"), [(60, 12), (60, 7), (61, 20), (10, 9), (7, 2)])
def test_the_sample_is_spread_evenly_over_the_rows(server, journal, count, sample):
    ask(server, journal, count, sample=sample)
    asked = sorted(counted(server))
    gaps = {later - earlier for earlier, later in pairwise(asked)}
    assert len(asked) == sample
    assert gaps <= {count // sample, -(-count // sample)}
    assert asked[0] < count / sample
    assert count - 1 - asked[-1] < count / sample


def test_every_split_is_sampled_by_its_share(server, journal):
    source = DatasetDict(
        {
            "big": Dataset.from_list(rows(40, "big")),
            "small": Dataset.from_list(rows(20, "small")),
            "tiny": Dataset.from_list(rows(1, "tiny")),
        }
    )
    found = estimate(source, oracle=server.url, sample=12, journal=journal, progress=False)
    asked = {prefix: {c.user for c in server.completions if f"{prefix} 0" in c.user} for prefix in ("big", "small")}
    assert (found.rows, found.sampled) == (61, 12)
    assert (len(asked["big"]), len(asked["small"])) == (16, 8)  # two calls a row


def test_a_limit_and_a_split_are_those_of_the_run(server, journal):
    source = DatasetDict({"train": Dataset.from_list(rows(50)), "test": Dataset.from_list(rows(9, "test"))})
    options = {"oracle": server.url, "sample": 5, "journal": journal, "progress": False}
    found = estimate(source, split="train", limit=20, **options)
    assert (found.rows, found.sampled) == (20, 5)
    assert max(counted(server)) < 20


def test_the_sample_is_paid_for_once(server, journal):
    found = ask(server, journal, 30, sample=10)
    again = ask(server, journal, 30, sample=10)
    assert (found.paid, again.paid) == (20, 0)
    assert (shown(again.calls), shown(again.prompt_tokens)) == (shown(found.calls), shown(found.prompt_tokens))
    assert found.seconds > 0
    assert again.seconds is None
    options = {"student": None, "method": "reflect", "journal": journal, "progress": False}
    recycle(Dataset.from_list(rows(30)), oracle=server.url, **options)
    digests = [call.digest for call in server.completions]
    assert len(digests) == len(set(digests)) == 60


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_time_is_that_of_all_calls_shared_by_those_at_once(server, journal, monkeypatch, concurrency):
    late = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000)  # so that each call took a thousand seconds
    monkeypatch.setattr(journaled, "time", late)
    found = ask(server, journal, 30, sample=10, concurrency=concurrency)
    assert found.calls.value == 60
    assert found.seconds == pytest.approx(60 * 1000 / concurrency, rel=0.01)


def test_failures_of_the_sample_are_told(server, journal):
    server.rule = lambda call: FAULTS["400"](call) if row_of(call) < 30 else None
    found = ask(server, journal, 60, sample=12)
    assert found.failed == 0.5
    calls = [2.0] * 6 + [0.0] * 6
    assert shown(found.calls) == pytest.approx(of_all(calls, 60))


def test_two_oracles_take_the_calls_of_both(server, journal):
    with OracleServer(models=("other",)) as other:
        found = estimate(
            Dataset.from_list(rows(15)), oracle=[server.url, other.url], sample=15, journal=journal, progress=False
        )
        assert found.calls.value == len(server.completions) + len(other.completions) == 60


def test_a_source_without_rows_is_refused(server, journal):
    with pytest.raises(SourceError, match="no rows"):
        estimate(Dataset.from_list(rows(3)).select([]), oracle=server.url, journal=journal, progress=False)


# On the command line


@pytest.fixture
def words(server, tmp_path) -> list[str]:
    source = tmp_path / "rows.jsonl"
    Dataset.from_list(rows(40)).to_json(source)
    return ["estimate", str(source), "--oracle", server.url, "--sample", "8", "--journal", str(tmp_path / "journal")]


def line(output: str, title: str) -> str:
    return re.search(rf"^{title} +(.*)$", output, re.MULTILINE)[1]


def test_the_command_says_what_all_of_it_would_take(server, words):
    done = CliRunner().invoke(app, [*words, "--price-in", "1000", "--price-out", "2000"])
    assert done.exit_code == 0, done.exception
    calls, read, written = zip(*counted(server).values(), strict=True)
    costs = [(r * 1000 + w * 2000) / 1e6 for r, w in zip(read, written, strict=True)]
    for title, sample, digits in (("calls", calls, 0), ("tokens read", read, 0), ("tokens written", written, 0)):
        total, low, high = (f"{number:,.{digits}f}" for number in of_all(sample, 40))
        assert line(done.output, title) == f"{total}  ({low} to {high})"
    total, low, high = (f"{number:,.2f}" for number in of_all(costs, 40))
    assert line(done.output, "cost") == f"{total}  ({low} to {high}) at 1000 / 2000 per million tokens"
    assert line(done.output, "rows").startswith("40, of which 8 were sampled (16 calls paid for now)")
    assert "95 % intervals" in done.output


def test_the_command_says_what_it_can_not_know(words):
    CliRunner().invoke(app, words)
    done = CliRunner().invoke(app, words)
    assert line(done.output, "cost").startswith("unknown: give --price-in")
    assert line(done.output, "time").startswith("unknown")
    assert "(0 calls paid for now)" in done.output


def test_the_command_wants_at_least_two_rows(words):
    assert CliRunner().invoke(app, [*words, "--sample", "1"]).exit_code == 2
