"""How fast an oracle is asked, in a time of the tests' own: nothing here waits, and nothing depends on the clock."""

import asyncio
import random
import re
import selectors
from collections.abc import Callable, Coroutine
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from hf_reflect.errors import OracleError
from hf_reflect.journal import Journal
from hf_reflect.oracles import Reply, Request, RowFailedError, pace
from hf_reflect.oracles.base import PassingError
from hf_reflect.oracles.journaled import JournaledOracle
from hf_reflect.oracles.pace import Limits, Meter, Pace
from hf_reflect.oracles.purse import Purse


class _Leap(selectors.DefaultSelector):
    """Where a loop would wait for a time to come, that time comes at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(0)
        if not found and timeout:
            self.now += timeout
        assert self.now < 1e7, "waits for ever"
        return found


class LeapLoop(asyncio.SelectorEventLoop):
    """An event loop in which every sleep takes no time and moves the clock."""

    def __init__(self) -> None:
        self._leap = _Leap()
        super().__init__(self._leap)

    def time(self) -> float:
        return 1000.0 + self._leap.now


@pytest.fixture
def loop(monkeypatch) -> LeapLoop:
    """The loop, whose clock is also the one that the pace and its meters look at."""
    random.seed(0)
    loop = LeapLoop()
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=loop.time))
    monkeypatch.setattr(Meter.__init__, "__defaults__", (loop.time,))
    yield loop
    loop.close()


def failing(**how: Any) -> PassingError:
    return PassingError("HTTP 500", **how)


# Calls at once


def make(most: int = 64, **limits: Any) -> Pace:
    return Pace(most, Limits(**limits), "teacher")


def fail(subject: Pace, loop: LeapLoop, **how: Any) -> None:
    """One call fails that began just now, later than whatever was before."""
    loop._leap.now += 0.001
    subject.failed(failing(**how), loop.time())


@pytest.mark.parametrize(("most", "allowed"), [(1, 1), (16, 16), (17, 16), (500, 16)])
def test_calls_at_once_start_modest(loop, most, allowed):
    assert make(most).allowed == allowed


def test_every_success_allows_one_more_up_to_the_most(loop):
    subject = make(most=20)
    seen = []
    for _ in range(6):
        subject.succeeded(0, 0)
        seen.append(subject.allowed)
    assert seen == [17, 18, 19, 20, 20, 20]


def test_throttling_takes_a_quarter_away_once_for_all_calls_of_a_moment(loop):
    subject = make()
    began = loop.time()
    loop._leap.now += 1
    for _ in range(5):  # all began before the first of them was throttled
        subject.failed(failing(throttled=True), began)
    assert subject.allowed == 16 * 3 / 4
    fail(subject, loop, throttled=True)  # began afterwards
    assert subject.allowed == 16 * 3 / 4 * 3 / 4


def test_after_throttling_calls_grow_by_about_one_for_as_many_successes_as_run_at_once(loop):
    subject = make()
    fail(subject, loop, throttled=True)
    before = subject.allowed
    for _ in range(12):
        subject.succeeded(0, 0)
    assert before == 12
    # 1/12 each at first, less and less as it grows: one more in all, or nearly
    assert 12.9 < subject.allowed < 13


def test_a_failure_that_is_no_throttling_leaves_the_number_of_calls(loop):
    subject = make()
    for _ in range(5):
        fail(subject, loop)
    assert subject.allowed == 16


@pytest.mark.parametrize("most", [1, 3, 40])
def test_calls_at_once_are_never_more_than_the_most_nor_fewer_than_one(loop, most):
    subject, chance = make(most, patience=1e9), random.Random(most)
    for _ in range(3000):
        if chance.random() < 0.1 * chance.randint(0, 10):
            subject.succeeded(0, 0)
        else:
            fail(subject, loop, throttled=chance.random() < 0.5)
        assert 1 <= subject.allowed <= most


# Through the journal, with an oracle whose answers the test decides


class Scripted:
    """An oracle whose every call takes a second of the loop's time, and ends as the test says.

    Attributes:
        calls: When each call came, and what it asked.
        most_at_once: The most calls that were in flight together.
    """

    name, prompts, max_tokens = "teacher", "paper", 100
    identity: ClassVar = {"kind": "scripted", "model": "teacher"}

    def __init__(
        self, rule: Callable[[str, int], Exception | None], concurrency: int = 16, takes: float = 1.0
    ) -> None:
        self.rule, self.concurrency, self.takes = rule, concurrency, takes
        self.calls: list[tuple[float, str]] = []
        self.at_once = self.most_at_once = 0
        self.tokens = 10

    def asked(self, text: str) -> int:
        return sum(asked == text for _, asked in self.calls)

    async def complete(self, request: Request) -> Reply:
        text = request.messages[0]["content"]
        self.calls.append((asyncio.get_running_loop().time(), text))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        ends = self.rule(text, self.asked(text))
        await asyncio.sleep(self.takes)
        self.at_once -= 1
        if ends is not None:
            raise ends
        return Reply(text, "stop", self.tokens, 0)


def request(text: str) -> Request:
    return Request(({"role": "user", "content": text},))


async def ask_all(oracle: JournaledOracle, texts: list[str]) -> list[Any]:
    return await asyncio.gather(*(oracle.ask(request(text)) for text in texts), return_exceptions=True)


def run(loop: LeapLoop, coroutine: Coroutine[Any, Any, Any]) -> Any:
    return loop.run_until_complete(coroutine)


def names(kind: str, count: int) -> list[str]:
    return [f"{kind} {i}" for i in range(count)]


def test_a_slow_start_reaches_the_most_and_stays_there(loop, journal):
    oracle = Scripted(lambda text, attempt: None, concurrency=40)
    replies = run(loop, ask_all(JournaledOracle(oracle, Journal(journal)), names("row", 300)))
    assert all(isinstance(reply, Reply) for reply in replies)
    first = oracle.calls[0][0]
    assert sum(at == first for at, _ in oracle.calls) == 16
    assert oracle.most_at_once == 40


def test_retry_after_of_one_call_pauses_all(loop, journal):
    """Calls in flight end, but none begins while the pause lasts."""

    def rule(text: str, attempt: int) -> Exception | None:
        return failing(retry_after=30.0, throttled=True) if (text, attempt) == ("row 3", 1) else None

    oracle = Scripted(rule)
    replies = run(loop, ask_all(JournaledOracle(oracle, Journal(journal)), names("row", 100)))
    assert all(isinstance(reply, Reply) for reply in replies)
    times = sorted(at - 1000 for at, _ in oracle.calls)
    assert times[16] >= 31.0  # the first sixteen had begun; it was said after a second


def test_a_pause_is_prolonged_by_a_later_one_and_not_cut_short_by_a_shorter(loop, journal):
    def rule(text: str, attempt: int) -> Exception | None:
        waits = {"row 0": 20.0, "row 1": 5.0}
        return failing(retry_after=waits[text], throttled=True) if attempt == 1 and text in waits else None

    oracle = Scripted(rule)
    run(loop, ask_all(JournaledOracle(oracle, Journal(journal)), names("row", 40)))
    assert not [at for at, _ in oracle.calls if 1001.0 < at < 1021.0]


def test_a_wait_longer_than_the_patience_stops_the_run_and_says_so(loop, journal):
    oracle = Scripted(lambda text, attempt: failing(retry_after=3600.0, throttled=True))
    (error,) = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(patience=120)), ["row"]))
    assert isinstance(error, OracleError)
    assert "teacher" in str(error)
    assert "it asks to wait 3600 seconds" in str(error)
    assert "Run the same command again" in str(error)
    assert len(oracle.calls) == 1


def test_a_wait_as_long_as_the_patience_is_waited_for(loop, journal):
    def rule(text: str, attempt: int) -> Exception | None:
        return failing(retry_after=120.0, throttled=True) if attempt == 1 else None

    oracle = Scripted(rule)
    (reply,) = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(patience=120)), ["row"]))
    assert reply.attempts == 2
    (first, _), (second, _) = oracle.calls
    assert second - first >= 120


@pytest.mark.parametrize("wait", [None, 5.0])
@pytest.mark.parametrize("room", [1, 2, 4])
def test_rows_that_were_only_throttled_are_all_answered_in_the_end(loop, journal, room, wait):
    """A server that takes so many calls at once and refuses the others, which is not the fault of any of them."""

    def rule(text: str, attempt: int) -> Exception | None:
        return failing(throttled=True, retry_after=wait) if oracle.at_once > room else None

    oracle = Scripted(rule, concurrency=64)
    replies = run(loop, ask_all(JournaledOracle(oracle, Journal(journal)), names("row", 300)))
    assert [reply for reply in replies if not isinstance(reply, Reply)] == []


# The breaker


def test_nine_failures_in_a_row_leave_the_breaker_closed_and_the_tenth_opens_it(loop):
    subject = make()
    for _ in range(9):
        fail(subject, loop)
    assert not subject.broken
    fail(subject, loop)
    assert subject.broken


def test_a_success_begins_the_count_anew_and_closes_the_breaker(loop):
    subject = make()
    for _ in range(9):
        fail(subject, loop)
    subject.succeeded(0, 0)
    for _ in range(9):
        fail(subject, loop)
    assert not subject.broken
    fail(subject, loop)
    assert subject.broken
    subject.succeeded(0, 0)
    assert not subject.broken


def down_until(moment: float, **how: Any) -> Scripted:
    """A server that fails every call before a moment."""
    oracle = Scripted(lambda text, attempt: failing(**how) if oracle.calls[-1][0] < moment else None)
    return oracle


def in_flight_after(oracle: Scripted, moment: float) -> int:
    """The most calls that were in flight together, of those that began after a moment."""
    times = sorted(at for at, _ in oracle.calls if at > moment)
    return max(sum(at <= other < at + oracle.takes for other in times) for at in times)


@pytest.mark.parametrize("limits", [{}, {"rpm": 600}], ids=["at once", "one by one"])
def test_while_the_breaker_is_open_one_call_at_a_time_probes(loop, journal, limits):
    """Also where calls had their turn already, and only waited for the minute's allowance."""
    oracle = down_until(1060.0)
    asked = JournaledOracle(oracle, Journal(journal), Limits(patience=300, **limits))
    replies = run(loop, ask_all(asked, names("row", 60)))
    assert all(isinstance(reply, Reply) for reply in replies)
    times = [at for at, _ in oracle.calls]
    opened = sorted(times)[9] + oracle.takes
    probes = [at for at in times if opened < at < 1060.0]
    assert probes
    for at in probes:
        assert sum(at <= other < at + oracle.takes for other in probes) == 1
    assert oracle.most_at_once > 1


def test_probes_come_less_and_less_often_but_at_least_every_half_minute_or_so(loop, journal):
    oracle = down_until(1400.0)
    asked = JournaledOracle(oracle, Journal(journal), Limits(patience=1000))
    run(loop, ask_all(asked, names("row", 30)))
    probes = [at for at, _ in oracle.calls if at < 1400][16:]
    pauses = [later - earlier for earlier, later in pairwise(probes)]
    assert len(probes) < 30
    assert max(pauses[-3:]) > 10
    assert all(pause <= 30 + oracle.takes + 0.2 for pause in pauses)


def test_where_patience_ends_without_a_success_the_run_stops_and_says_why(loop, journal):
    oracle = Scripted(lambda text, attempt: failing(advice="Is the server running?"))
    ends = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(patience=90)), names("row", 30)))
    stopped = [error for error in ends if isinstance(error, OracleError)]
    assert stopped
    said = re.fullmatch(
        r"oracle teacher: HTTP 500; nothing but failures for (\d+) seconds\. Is the server running\?", str(stopped[0])
    )
    assert 90 <= int(said[1]) < 90 + 60 + 2  # a request may just have begun its longest wait
    assert not [error for error in ends if isinstance(error, Reply)]


def test_an_outage_shorter_than_the_patience_costs_no_row(loop, journal):
    oracle = down_until(1100.0, throttled=True)
    replies = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(patience=120)), names("row", 50)))
    assert [type(reply) for reply in replies] == [Reply] * 50


def poisoned(text: str, attempt: int) -> Exception | None:
    return failing() if text.startswith("poison") else None


@pytest.mark.parametrize("poison", [2, 3, 8])
@pytest.mark.parametrize("where", ["first", "between", "last", "after"])
def test_requests_that_always_fail_cost_their_own_rows_and_nothing_else(loop, journal, poison, where):
    """Two requests with five attempts each are ten failures, which are no reason to give up the server."""
    good, bad = names("row", 60), names("poison", poison)
    mixed = {"first": bad + good, "between": good[:30] + bad + good[30:], "last": good + bad, "after": good}[where]
    oracle = Scripted(poisoned)
    asked = JournaledOracle(oracle, Journal(journal), Limits(attempts=5, patience=120))

    async def all_of_them() -> dict[str, Any]:
        ends = dict(zip(mixed, await ask_all(asked, mixed), strict=True))
        if where == "after":  # as where a shard holds nothing else that is left to do
            ends |= dict(zip(bad, await ask_all(asked, bad), strict=True))
        return ends

    ends = run(loop, all_of_them())
    assert {type(ends[text]) for text in good} == {Reply}
    assert [type(ends[text]) for text in bad] == [RowFailedError] * poison, ends[bad[0]]
    assert all("HTTP 500" in str(ends[text]) for text in bad)
    assert all(oracle.asked(text) >= 5 for text in bad)


def test_a_request_may_be_tried_very_often(loop, journal):
    """With --attempts or --patience large enough for days."""
    oracle = Scripted(lambda text, attempt: failing(retry_after=0.0) if text == "poison" else None)
    asked = JournaledOracle(oracle, Journal(journal), Limits(attempts=1100))

    async def all_of_them() -> Any:
        poison = asyncio.ensure_future(asked.ask(request("poison")))
        number = 0
        while not poison.done():
            number += 1
            await asked.ask(request(f"row {number}"))
        return await asyncio.gather(poison, return_exceptions=True)

    (end,) = run(loop, all_of_them())
    assert str(end) == "HTTP 500 (attempt 1100 of 1100)"


# Requests and tokens per minute


def starts(per_minute: float, amounts: list[float], moments: list[float]) -> list[tuple[float, float]]:
    """When each amount may be used, where each is asked for at its moment at the earliest."""
    now = 0.0
    meter = Meter(per_minute, lambda: now)
    used = []
    for amount, moment in zip(amounts, moments, strict=True):
        now = max(now, moment)
        used.append((now + meter.reserve(amount), amount))
    return used


def most_in_a_minute(used: list[tuple[float, float]]) -> float:
    """The most that was used in any 60 seconds."""
    return max(sum(amount for at, amount in used if begin <= at < begin + 60 - 1e-6) for begin, _ in used)


@pytest.mark.parametrize("seed", range(20))
def test_no_minute_has_more_requests_than_allowed(seed):
    chance = random.Random(seed)
    rpm = chance.choice([1, 2, 7, 60, 500])
    moments = sorted(chance.uniform(0, chance.choice([1, 60, 600])) for _ in range(300))
    used = starts(rpm, [1] * 300, moments)
    assert most_in_a_minute(used) <= rpm
    assert [at for at, _ in used] == sorted(at for at, _ in used)


@pytest.mark.parametrize("largest", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_minute_has_more_tokens_than_allowed(seed, largest):
    """However large a single call is, as long as a minute allows it at all."""
    chance = random.Random(seed)
    tpm = chance.choice([1000, 6000, 90_000])
    moments = sorted(chance.uniform(0, chance.choice([1, 60, 600])) for _ in range(200))
    amounts = [chance.uniform(1, tpm * largest) for _ in range(200)]
    assert most_in_a_minute(starts(tpm, amounts, moments)) <= tpm


def test_requests_within_the_allowance_are_spread_over_the_minute_and_not_held_back():
    assert [at for at, _ in starts(6, [1] * 4, [0.0, 0, 0, 100])] == [0, 10, 20, 100]
    assert [at for at, _ in starts(60, [30, 30, 1], [0.0, 0, 0])] == [0, 30, 60]


def test_without_a_limit_nothing_waits():
    meter = Meter(None, lambda: 0.0)
    assert [meter.reserve(10.0**9) for _ in range(3)] == [0, 0, 0]
    meter.settle(10.0**9)
    assert meter.reserve(1) == 0


@pytest.mark.parametrize(("used", "wait"), [(100, 10), (600, 60), (10, 1)])
def test_what_a_call_really_used_is_settled_afterwards(used, wait):
    meter = Meter(600, lambda: 0.0)
    assert meter.reserve(100) == 0
    meter.settle(used - 100)
    assert meter.reserve(1) == pytest.approx(wait)


def test_the_pace_settles_what_a_call_used(loop):
    subject = make(tpm=600)

    async def call(used: float) -> float:
        async with subject.turn(100) as turn:
            turn.succeeded(used)
            return turn.began - 1000

    # 300 of 600 take half a minute; then 100 are expected each time, and given back each time
    assert [run(loop, call(used)) for used in (300, 0, 0)] == pytest.approx([0, 30, 30])


def began(oracle: Scripted) -> list[tuple[float, float]]:
    return [(at, 1) for at, _ in oracle.calls]


def test_no_minute_has_more_calls_than_the_server_allows(loop, journal):
    oracle = Scripted(poisoned)
    asked = JournaledOracle(oracle, Journal(journal), Limits(rpm=30, attempts=3))
    run(loop, ask_all(asked, [*names("row", 80), *names("poison", 2)]))
    assert len(oracle.calls) == 80 + 2 * 3
    assert most_in_a_minute(began(oracle)) <= 30


def test_no_minute_has_more_calls_than_allowed_after_a_pause_either(loop, journal):
    def rule(text: str, attempt: int) -> Exception | None:
        return failing(retry_after=60.0, throttled=True) if (text, attempt) == ("row 0", 1) else None

    oracle = Scripted(rule, concurrency=64)
    asked = JournaledOracle(oracle, Journal(journal), Limits(rpm=30))
    replies = run(loop, ask_all(asked, names("row", 100)))
    assert all(isinstance(reply, Reply) for reply in replies)
    assert most_in_a_minute(began(oracle)) <= 30


def test_no_minute_has_more_tokens_than_allowed_once_it_is_known_what_a_call_takes(loop, journal):
    oracle = Scripted(lambda text, attempt: None)
    oracle.tokens = 100
    asked = JournaledOracle(oracle, Journal(journal), Limits(tpm=2000))
    run(loop, ask_all(asked, names("row", 100)))
    assert most_in_a_minute([(at, 100) for at, _ in oracle.calls]) <= 2000


def test_what_the_budget_leaves_out_waits_for_no_minute(loop, journal):
    """Only a call takes up an allowance: a thousand rows that are not asked must not take a thousand minutes."""
    oracle = Scripted(lambda text, attempt: None)
    limits = Limits(rpm=1, max_tokens_total=20)
    ends = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), limits, Purse(limits)), names("row", 1000)))
    assert sum(isinstance(end, Reply) for end in ends) == len(oracle.calls) == 2
    assert loop.time() - 1000 <= 30 * 60
