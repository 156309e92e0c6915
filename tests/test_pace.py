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
from hf_reflect.oracles import Reply, Request, RowFailedError, journaled, pace
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
    for module in (pace, journaled):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=loop.time))
    monkeypatch.setattr(Meter.__init__, "__defaults__", (loop.time,))
    yield loop
    loop.close()


def failing(**how: Any) -> PassingError:
    return PassingError("HTTP 500", **how)


# Calls at once


def make(most: int = 64, **limits: Any) -> Pace:
    return Pace(most, Limits(**limits), "teacher")


def fail(subject: Pace, loop: LeapLoop, **how: Any) -> bool:
    """One call fails that began just now, later than whatever was before."""
    loop._leap.now += 0.001
    return subject.failed(failing(**how), loop.time())


@pytest.mark.parametrize(("most", "allowed"), [(1, 1), (16, 16), (17, 16), (500, 16)])
def test_calls_at_once_start_modest(loop, most, allowed):
    assert make(most).allowed == allowed


def test_every_success_allows_one_more_up_to_the_most(loop):
    subject = make(most=20)
    seen = []
    for _ in range(6):
        subject.answered()
        seen.append(subject.allowed)
    assert seen == [17, 18, 19, 20, 20, 20]


OVERLOADED = pytest.mark.parametrize("how", ["throttled", "slow"])
"""A server that says that it has too much to do, and one that shows it."""


@OVERLOADED
def test_an_overload_takes_a_quarter_away_once_for_all_calls_of_a_moment(loop, how):
    subject = make()
    began = loop.time()
    loop._leap.now += 1
    for _ in range(5):  # all began before the first of them failed
        subject.failed(failing(**{how: True}), began)
    assert subject.allowed == 16 * 3 / 4
    fail(subject, loop, **{how: True})  # began afterwards
    assert subject.allowed == 16 * 3 / 4 * 3 / 4


@OVERLOADED
def test_after_an_overload_calls_grow_by_about_one_for_as_many_successes_as_run_at_once(loop, how):
    subject = make()
    fail(subject, loop, **{how: True})
    before = subject.allowed
    for _ in range(12):
        subject.answered()
    assert before == 12
    # 1/12 each at first, less and less as it grows: one more in all, or nearly
    assert 12.9 < subject.allowed < 13


@pytest.mark.parametrize("how", [{}, {"unreachable": True}, {"retry_after": 1.0}], ids=str)
def test_a_failure_that_is_no_overload_leaves_the_number_of_calls(loop, how):
    subject = make()
    for _ in range(5):
        fail(subject, loop, **how)
    assert subject.allowed == 16
    subject.answered()
    assert subject.allowed == 17


@pytest.mark.parametrize(
    ("how", "of_server"),
    [({}, False), ({"slow": True}, False), ({"throttled": True}, True), ({"unreachable": True}, True)],
    ids=str,
)
def test_a_failure_is_of_the_server_where_any_other_request_would_have_failed_as_well(how, of_server):
    assert failing(**how).of_server is of_server


@pytest.mark.parametrize("most", [1, 3, 40])
def test_calls_at_once_are_never_more_than_the_most_nor_fewer_than_one(loop, most):
    subject, chance = make(most, patience=1e9), random.Random(most)
    for _ in range(3000):
        if chance.random() < 0.1 * chance.randint(0, 10):
            subject.answered()
        else:
            how = chance.choice(["throttled", "slow", "unreachable", "advice"])
            fail(subject, loop, **{how: "" if how == "advice" else True})
        assert 1 <= subject.allowed <= most


# Through the journal, with an oracle whose answers the test decides


class Scripted:
    """An oracle whose every call takes a second of the loop's time, and ends as the test says.

    Attributes:
        calls: When each call came, and what it asked; the canary is one of them.
        most_at_once: The most calls that were in flight together.
        tokens: What each call takes; null if the oracle doesn't count.
    """

    name, prompts, max_tokens = "teacher", "paper", 100
    identity: ClassVar = {"kind": "scripted", "model": "teacher"}

    def __init__(
        self, rule: Callable[[str, int], Exception | None], concurrency: int = 16, takes: float = 1.0
    ) -> None:
        self.rule, self.concurrency, self.takes = rule, concurrency, takes
        self.calls: list[tuple[float, str]] = []
        self.at_once = self.most_at_once = 0
        self.tokens: int | None = 10

    def asked(self, text: str) -> int:
        return sum(asked == text for _, asked in self.calls)

    async def complete(self, request: Request) -> Reply:
        text = request.messages[0]["content"]
        self.calls.append((asyncio.get_running_loop().time(), text))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            ends = self.rule(text, self.asked(text))
            await asyncio.sleep(self.takes)
        finally:
            self.at_once -= 1
        if ends is not None:
            raise ends
        return Reply(text, "stop", self.tokens, None if self.tokens is None else 0)


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


def test_a_wait_that_is_not_for_throttling_holds_back_its_own_request_only(loop, journal):
    def rule(text: str, attempt: int) -> Exception | None:
        return failing(retry_after=30.0) if (text, attempt) == ("row 3", 1) else None

    oracle = Scripted(rule)
    replies = run(loop, ask_all(JournaledOracle(oracle, Journal(journal)), names("row", 100)))
    assert all(isinstance(reply, Reply) for reply in replies)
    first, again = (at for at, text in oracle.calls if text == "row 3")
    assert again - first >= 31.0
    assert all(at - 1000 < 15 for at, text in oracle.calls if text != "row 3")


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


OF_SERVER = pytest.mark.parametrize("how", ["throttled", "unreachable"])
OF_REQUEST = pytest.mark.parametrize("how", [{}, {"slow": True}], ids=str)


@OF_SERVER
def test_nine_failures_of_the_server_in_a_row_leave_the_breaker_closed_and_the_tenth_opens_it(loop, how):
    subject = make()
    for _ in range(9):
        assert not fail(subject, loop, **{how: True})
    assert not subject.broken
    assert not fail(subject, loop, **{how: True})  # there is nothing to find out
    assert subject.broken


@OF_REQUEST
def test_failures_that_may_be_the_requests_own_open_nothing_but_the_tenth_in_a_row_asks_for_an_explanation(loop, how):
    subject = make()
    assert [fail(subject, loop, **how) for _ in range(12)] == [False] * 9 + [True] * 3
    assert not subject.broken
    assert subject.failures == 12
    subject.answered()
    assert subject.failures == 0
    assert [fail(subject, loop, **how) for _ in range(10)] == [False] * 9 + [True]
    subject.breaks(failing(**how), 0.0)
    assert subject.broken
    assert not fail(subject, loop, throttled=True)
    assert subject.broken


def test_a_success_begins_the_count_anew_and_closes_the_breaker(loop):
    subject = make()
    for _ in range(9):
        fail(subject, loop, throttled=True)
    subject.answered()
    for _ in range(9):
        fail(subject, loop, throttled=True)
    assert not subject.broken
    fail(subject, loop, throttled=True)
    assert subject.broken
    subject.answered()
    assert not subject.broken


@pytest.mark.parametrize("most", [2, 64])
def test_after_an_outage_calls_at_once_start_modest_again(loop, most):
    subject = make(most)
    for _ in range(100):
        subject.answered()
    assert subject.allowed == most
    for _ in range(10):
        fail(subject, loop, unreachable=True)
    subject.answered()
    assert subject.allowed == min(most, 16 + 1)


def down_until(moment: float, **how: Any) -> Scripted:
    """A server that fails every call before a moment."""
    oracle = Scripted(lambda text, attempt: failing(**how) if oracle.calls[-1][0] < moment else None)
    return oracle


@pytest.mark.parametrize("how", [{}, {"slow": True}, {"throttled": True}, {"unreachable": True}], ids=str)
@pytest.mark.parametrize("limits", [{}, {"rpm": 600}, {"rpm": 30}], ids=str)
def test_while_the_breaker_is_open_one_call_at_a_time_probes(loop, journal, limits, how):
    """Also where calls only waited for the minute's allowance when it opened."""
    oracle = down_until(1150.0, **how)
    asked = JournaledOracle(oracle, Journal(journal), Limits(patience=300, **limits))
    replies = run(loop, ask_all(asked, names("row", 60)))
    assert all(isinstance(reply, Reply) for reply in replies)
    times = [at for at, _ in oracle.calls]
    # The canary takes as long again, where it must be asked; and what was under way by then still ends.
    opened = sorted(times)[9] + 3 * oracle.takes
    probes = [at for at in times if opened < at < 1150.0]
    assert probes
    for at in probes:
        assert sum(at <= other < at + oracle.takes for other in probes) == 1
    assert oracle.most_at_once > 1


@pytest.mark.parametrize("how", [{}, {"slow": True}, {"throttled": True}, {"unreachable": True}], ids=str)
def test_probes_come_less_and_less_often_but_at_least_every_half_minute_or_so(loop, journal, how):
    oracle = down_until(1400.0, **how)
    asked = JournaledOracle(oracle, Journal(journal), Limits(patience=1000))
    run(loop, ask_all(asked, names("row", 30)))
    probes = [at for at, text in oracle.calls if 1003 < at < 1400 and text != CANARY]
    pauses = [later - earlier for earlier, later in pairwise(probes)]
    assert 10 < len(probes) < 30
    assert min(pauses[-3:]) > 20
    assert all(pause <= 30 + 2 * oracle.takes + 0.2 for pause in pauses)  # a canary may come between


@pytest.mark.parametrize("most", [16, 64])
def test_the_first_probe_comes_soon_however_many_calls_were_in_flight(loop, journal, most):
    """Calls of one moment tell the same story once: sixty that fail together are no sixty probes."""
    oracle = down_until(1000.5, unreachable=True)
    oracle.concurrency = most
    asked = JournaledOracle(oracle, Journal(journal))
    asked.pace.allowed = float(most)  # as after many successes
    run(loop, ask_all(asked, names("row", most)))
    later = [at for at, _ in oracle.calls if at > 1000.5]
    assert min(later) <= 1001 + 2


def test_where_patience_ends_without_a_success_the_run_stops_and_says_why(loop, journal):
    oracle = Scripted(lambda text, attempt: failing(advice="Is the server running?"))
    ends = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(patience=90)), names("row", 30)))
    stopped = [error for error in ends if isinstance(error, OracleError)]
    assert stopped
    said = re.compile(r"oracle teacher: HTTP 500; nothing but failures for (\d+) seconds\. Is the server running\?")
    first = min(int(said.fullmatch(str(error))[1]) for error in stopped)
    assert 90 <= first <= 92  # the last probe is made when it ends
    assert not [error for error in ends if isinstance(error, Reply)]


@OF_SERVER
@pytest.mark.parametrize("rows", [1, 3, 30])
def test_patience_ends_in_time_however_few_requests_there_are(loop, journal, rows, how):
    """One request alone takes minutes for ten tries."""
    oracle = Scripted(lambda text, attempt: failing(**{how: True}))
    ends = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(patience=60)), names("row", rows)))
    assert {type(end) for end in ends} == {OracleError}
    assert oracle.calls[-1][0] - 1001 <= 60 + 60  # the longest wait between two tries may just have begun


def test_patience_does_not_run_while_nothing_is_asked(loop, journal):
    """As where a row fails, then the student scores for ten minutes, and then the server restarts."""

    def rule(text: str, attempt: int) -> Exception | None:
        return poisoned(text, attempt) or (failing(unreachable=True) if 1600 < loop.time() < 1603 else None)

    asked = JournaledOracle(Scripted(rule), Journal(journal), Limits(patience=120))

    async def in_two_phases() -> list[Any]:
        (bad,) = await ask_all(asked, ["poison"])
        assert isinstance(bad, RowFailedError)
        await asyncio.sleep(1600.1 - loop.time())
        return await ask_all(asked, names("row", 30))

    assert [type(end) for end in run(loop, in_two_phases())] == [Reply] * 30


@pytest.mark.parametrize("how", [{}, {"slow": True}, {"throttled": True}, {"unreachable": True}], ids=str)
def test_an_outage_shorter_than_the_patience_costs_no_row(loop, journal, how):
    """Also where each failure might be the request's own: the canary tells."""
    oracle = down_until(1100.0, **how)
    replies = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(patience=120)), names("row", 50)))
    assert [type(reply) for reply in replies] == [Reply] * 50
    assert (oracle.asked(CANARY) > 0) is not failing(**how).of_server


@OF_SERVER
def test_an_outage_costs_a_request_that_is_alone_no_attempt_either(loop, journal, how):
    oracle = down_until(1060.0, **{how: True})
    (reply,) = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(attempts=1)), ["row"]))
    assert reply.text == "row"
    assert reply.attempts == len(oracle.calls) > 3


CANARY = "Say OK."


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
    assert all(str(ends[text]) == "HTTP 500 (attempt 5 of 5)" for text in bad)
    assert [oracle.asked(text) for text in bad] == [5] * poison
    assert not asked.pace.broken


@pytest.mark.parametrize("how", [{"slow": True}, {"retry_after": 0.5}], ids=str)
@pytest.mark.parametrize("poison", [1, 40])
def test_where_all_that_is_asked_is_poison_a_question_that_is_none_tells_so(loop, journal, poison, how):
    oracle = Scripted(lambda text, attempt: None if text == CANARY else failing(**how))
    asked = JournaledOracle(oracle, Journal(journal), Limits(attempts=12, patience=60))
    ends = run(loop, ask_all(asked, names("poison", poison)))
    assert [str(end) for end in ends] == ["HTTP 500 (attempt 12 of 12)"] * poison
    assert oracle.asked(CANARY) > 0
    assert asked.spent.calls == 0
    assert asked.spent.failed_calls == 12 * poison
    assert list(Journal(journal).entries("reply")) == []


def test_a_canary_that_is_refused_is_as_good_as_one_that_is_answered(loop, journal):
    """The server answers: it just doesn't like that question."""

    def rule(text: str, attempt: int) -> Exception:
        return RowFailedError("HTTP 400") if text == CANARY else failing()

    asked = JournaledOracle(Scripted(rule), Journal(journal), Limits(patience=60))
    ends = run(loop, ask_all(asked, names("poison", 20)))
    assert {type(end) for end in ends} == {RowFailedError}


def test_a_canary_that_no_server_will_answer_stops_the_run(loop, journal):
    def rule(text: str, attempt: int) -> Exception:
        return OracleError("oracle teacher: HTTP 402") if text == CANARY else failing()

    ends = run(loop, ask_all(JournaledOracle(Scripted(rule), Journal(journal)), names("poison", 20)))
    assert "oracle teacher: HTTP 402" in {str(end) for end in ends if isinstance(end, OracleError)}


def test_one_canary_is_enough_for_the_failures_of_a_moment(loop, journal):
    oracle = Scripted(poisoned)
    run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(attempts=1)), names("poison", 16)))
    assert oracle.asked(CANARY) == 1


def test_a_canary_that_fails_after_others_were_answered_proves_nothing(loop, journal):
    """It may take as long as a call that times out: patience is for a server that answers nobody."""

    class Slow(Scripted):
        async def complete(self, request: Request) -> Reply:
            text = request.messages[0]["content"]
            if text == CANARY and not self.asked(CANARY):
                await asyncio.sleep(300)
            return await super().complete(request)

    oracle = Slow(lambda text, attempt: failing(slow=True) if text == CANARY else poisoned(text, attempt))
    asked = JournaledOracle(oracle, Journal(journal), Limits(patience=120, attempts=2))

    async def all_of_them() -> list[Any]:
        bad = asyncio.ensure_future(ask_all(asked, names("poison", 10)))
        await asyncio.sleep(30)
        replies = await ask_all(asked, names("row", 100))
        return [*replies, *await bad]

    ends = run(loop, all_of_them())
    assert [type(end) for end in ends] == [Reply] * 100 + [RowFailedError] * 10


def test_requests_that_always_fail_cost_their_own_rows_also_after_an_outage(loop, journal):
    """Nothing else is left to ask, so nothing else can tell that the server is back."""

    def rule(text: str, attempt: int) -> Exception | None:
        return failing(unreachable=True) if loop.time() < 1030 else poisoned(text, attempt)

    asked = JournaledOracle(Scripted(rule), Journal(journal), Limits(patience=120))
    ends = run(loop, ask_all(asked, names("poison", 12)))
    assert {type(end) for end in ends} == {RowFailedError}, ends[0]


def test_a_row_that_failed_says_how_many_tries_were_held_against_it(loop, journal):
    """Being throttled before was not."""
    oracle = Scripted(lambda text, attempt: failing(throttled=True) if attempt <= 4 else failing())
    (end,) = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(attempts=3)), ["row"]))
    assert len(oracle.calls) == 4 + 3
    assert str(end) == "HTTP 500 (attempt 3 of 3)"


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
    """When each amount passes, where each is asked for at its moment at the earliest, and one after another."""
    now = 0.0
    meter = Meter(per_minute, lambda: now)
    used = []
    for amount, moment in zip(amounts, moments, strict=True):
        now = max(now, moment)
        tries = 0
        while (wait := meter.wait(amount)) > 0:
            now += wait
            tries += 1
            assert tries <= 2, "what it said was too short"  # rounding may take a second one
        meter.take(amount)
        used.append((now, amount))
    return used


def most_in_a_minute(used: list[tuple[float, float]]) -> float:
    """The most that was used in any 60 seconds."""
    return max(sum(amount for at, amount in used if begin <= at < begin + 60 - 1e-6) for begin, _ in used)


def needless_waits(per_minute: float, used: list[tuple[float, float]], moments: list[float]) -> list[float]:
    """When amounts passed that could have passed a hundredth of a second earlier."""
    found = []
    for (before, (at, amount)), moment in zip(pairwise([(0.0, 0.0), *used]), moments, strict=True):
        earlier = at - 0.01
        room = per_minute - sum(other for when, other in used if earlier - 60 < when <= before[0] and when < at)
        if earlier > max(moment, before[0]) and min(amount, per_minute) <= room - 1e-6:
            found.append(at)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_no_minute_has_more_requests_than_allowed_and_none_waits_longer_than_that_takes(seed):
    chance = random.Random(seed)
    rpm = chance.choice([1, 2, 7, 60, 500])
    moments = sorted(chance.uniform(0, chance.choice([1, 60, 600])) for _ in range(300))
    used = starts(rpm, [1] * 300, moments)
    assert most_in_a_minute(used) <= rpm
    assert needless_waits(rpm, used, moments) == []


@pytest.mark.parametrize("largest", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_minute_has_more_tokens_than_allowed_and_none_waits_longer_than_that_takes(seed, largest):
    """However large a single call is, as long as a minute allows it at all."""
    chance = random.Random(seed)
    tpm = chance.choice([1000, 6000, 90_000])
    moments = sorted(chance.uniform(0, chance.choice([1, 60, 600])) for _ in range(200))
    amounts = [chance.uniform(1, tpm * largest) for _ in range(200)]
    used = starts(tpm, amounts, moments)
    assert most_in_a_minute(used) <= tpm + 1e-6
    assert needless_waits(tpm, used, moments) == []


@pytest.mark.parametrize("amount", [1000.0, 5000.0])
def test_an_amount_as_large_as_a_minute_or_larger_waits_for_a_minute_without_any(amount):
    """Whatever the others add up to: averages are no round numbers."""

    def wait_after_seven(seed: int) -> float:
        chance, now = random.Random(seed), 0.0
        meter = Meter(1000, lambda: now)
        for _ in range(7):
            now += chance.uniform(0, 5)
            meter.take(chance.uniform(0.1, 140))
        return meter.wait(amount)

    assert [wait_after_seven(seed) for seed in range(20)] == pytest.approx([60] * 20)


def test_requests_within_the_allowance_are_not_held_back():
    assert [at for at, _ in starts(6, [1] * 8, [0.0, 0, 0, 30, 30, 30, 30, 200])] == [0, 0, 0, 30, 30, 30, 60, 200]
    assert [at for at, _ in starts(60, [30, 30, 1, 60], [0.0, 20, 20, 20])] == [0, 20, 60, 120]


def test_without_a_limit_nothing_waits():
    meter = Meter(None, lambda: 0.0)
    for _ in range(3):
        assert meter.wait(10.0**9) == 0
        meter.take(10.0**9).amount = 10.0**12


@pytest.mark.parametrize(("used", "then", "wait"), [(100, 500, 0), (100, 501, 60), (600, 1, 60), (0, 600, 0)])
def test_what_a_call_really_used_is_settled_afterwards(used, then, wait):
    meter = Meter(600, lambda: 0.0)
    meter.take(100).amount = used
    assert meter.wait(then) == wait


def test_to_look_is_not_to_take():
    meter = Meter(1, lambda: 0.0)
    assert [meter.wait(1) for _ in range(3)] == [0, 0, 0]
    meter.take(1)
    assert [meter.wait(1) for _ in range(3)] == [60, 60, 60]


@pytest.mark.parametrize(
    ("ends", "moments"),
    [
        ([500.0, 200.0, 100.0], [0, 0, 60]),  # of 600 a hundred each are expected
        ([0.0] * 9, [0] * 9),
        ([failing()] * 9, [0] * 9),  # what failed is taken for nothing
        ([1000.0, 1000.0, 1000.0], [0, 60, 120]),
    ],
    ids=["mixed", "nothing", "failed", "too much"],
)
def test_the_pace_settles_what_a_call_used(loop, ends, moments):
    subject = make(tpm=600)

    async def call(end: Any) -> float:
        async with subject.turn(lambda: 100) as turn:
            turn.failed(end) if isinstance(end, PassingError) else turn.answered(end)
            return turn.began - 1000

    assert [run(loop, call(end)) for end in ends] == pytest.approx(moments, abs=0.1)


def test_who_gives_up_waiting_for_its_turn_lets_the_others_go_on(loop):
    subject = make(rpm=1)
    began = []

    async def call() -> None:
        async with subject.turn(lambda: 1) as turn:
            began.append(turn.began - 1000)

    async def all_of_them() -> None:
        tasks = [asyncio.ensure_future(call()) for _ in range(4)]
        await asyncio.sleep(10)
        for task in tasks[1:3]:  # the next one, and one behind it
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(loop, all_of_them())
    assert began == pytest.approx([0, 60], abs=0.1)
    assert subject.in_flight == 0


def began(oracle: Scripted) -> list[tuple[float, float]]:
    return [(at, 1) for at, _ in oracle.calls]


def test_no_minute_has_more_calls_than_the_server_allows(loop, journal):
    oracle = Scripted(poisoned)
    asked = JournaledOracle(oracle, Journal(journal), Limits(rpm=30, attempts=3))
    run(loop, ask_all(asked, [*names("row", 80), *names("poison", 2)]))
    assert len(oracle.calls) == 80 + 2 * 3
    assert most_in_a_minute(began(oracle)) <= 30


def test_canaries_count_as_calls_too(loop, journal):
    """A server that holds to its limit would refuse them, and pass for broken."""
    oracle = Scripted(poisoned)
    run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(rpm=30)), names("poison", 20)))
    assert oracle.asked(CANARY) > 0
    assert most_in_a_minute(began(oracle)) <= 30


def test_no_minute_has_more_calls_than_allowed_where_some_wait_for_the_budget(loop, journal):
    """Calls that wait until it is clear what those in flight cost must not all begin together."""

    def rule(text: str, attempt: int) -> Exception | None:
        oracle.tokens = 10 if loop.time() < 1300 else 1
        return None

    oracle = Scripted(rule, takes=300.0)
    limits = Limits(rpm=5, max_tokens_total=100)
    run(loop, ask_all(JournaledOracle(oracle, Journal(journal), limits), names("row", 60)))
    assert len(oracle.calls) == 60
    assert most_in_a_minute(began(oracle)) <= 5


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


@pytest.mark.parametrize("each", [10, 5000])
def test_calls_that_wait_already_are_expected_to_take_what_it_is_known_that_calls_take(loop, journal, each):
    """They all came when nothing was known yet, as the rows of a batch do."""
    oracle = Scripted(lambda text, attempt: None)
    oracle.tokens = each
    run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(tpm=10_000)), names("row", 30)))
    known = [(at, each) for at, _ in oracle.calls if at > 1001.1]  # those before were a guess
    assert most_in_a_minute(known) <= 10_000
    # Ten begin on a guess of a thousand. Of the others, two fit in a minute, or all.
    assert oracle.calls[-1][0] - 1000 <= (90 if each == 10 else 16 * 60)


def test_the_tokens_of_an_oracle_that_does_not_count_are_estimated(loop, journal):
    oracle = Scripted(lambda text, attempt: None)
    oracle.tokens = None
    asked = JournaledOracle(oracle, Journal(journal), Limits(tpm=2000))
    rows = [f"{number:400}" for number in range(60)]  # a hundred tokens, twice
    run(loop, ask_all(asked, rows))
    assert asked.spent.tokens == pytest.approx(60 * 200, rel=0.02)
    assert most_in_a_minute([(at, 200) for at, _ in oracle.calls]) <= 2000


# The budget


BUDGET = pytest.mark.parametrize(
    "budget", [{"max_tokens_total": 1000}, {"max_cost": 1000.0, "price_in": 1e6}], ids=["tokens", "cost"]
)


@BUDGET
def test_before_the_first_reply_one_call_is_made_and_then_all(loop, journal, budget):
    """The first fails in several ways before there is an answer: nothing is known from those."""

    def rule(text: str, attempt: int) -> Exception | None:
        kinds = [failing(), failing(throttled=True), RowFailedError("HTTP 400"), failing(unreachable=True)]
        return kinds[len(oracle.calls) - 1] if len(oracle.calls) <= 4 else None

    oracle = Scripted(rule)
    limits = Limits(**budget)
    ends = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), limits), names("row", 40)))
    times = sorted(at for at, _ in oracle.calls)
    assert all(later - earlier >= oracle.takes for earlier, later in pairwise(times[:6]))
    assert oracle.most_at_once > 5
    assert [type(end) for end in ends].count(Reply) == 39


def test_without_a_budget_nothing_waits_for_the_first_reply(loop, journal):
    oracle = Scripted(lambda text, attempt: None)
    run(loop, ask_all(JournaledOracle(oracle, Journal(journal), Limits(price_in=1.0)), names("row", 16)))
    assert {at for at, _ in oracle.calls} == {1000.0}


@pytest.mark.parametrize("budget", [{"max_tokens_total": 0}, {"max_cost": 0.0, "price_in": 1.0}], ids=str)
def test_a_budget_of_nothing_makes_no_call_and_takes_no_time(loop, journal, budget):
    oracle = Scripted(lambda text, attempt: None)
    asked = JournaledOracle(oracle, Journal(journal), Limits(rpm=1, **budget))
    ends = run(loop, ask_all(asked, names("row", 50)))
    assert {(type(end), end.status) for end in ends} == {(RowFailedError, "skipped")}
    assert (oracle.calls, asked.spent.not_asked) == ([], 50)
    assert loop.time() == 1000


def test_what_the_budget_leaves_out_waits_for_no_minute(loop, journal):
    """Only a call takes up an allowance: a thousand rows that are not asked must not take a thousand minutes."""
    oracle = Scripted(lambda text, attempt: None)
    limits = Limits(rpm=1, max_tokens_total=20)
    ends = run(loop, ask_all(JournaledOracle(oracle, Journal(journal), limits, Purse(limits)), names("row", 1000)))
    assert sum(isinstance(end, Reply) for end in ends) == len(oracle.calls) == 2
    assert loop.time() - 1000 <= 3 * 60


@pytest.mark.parametrize("tokens", [1, 7, 10, 100])
def test_several_oracles_with_one_purse_keep_one_budget(loop, journal, tokens):
    """Each has a pace of its own."""
    purse = Purse(Limits(max_tokens_total=500))
    oracles = [Scripted(lambda text, attempt: None) for _ in range(3)]
    for number, oracle in enumerate(oracles):
        oracle.identity, oracle.tokens = {"model": number}, tokens  # type: ignore[misc]
    asked = [JournaledOracle(oracle, Journal(journal), purse=purse) for oracle in oracles]

    async def all_of_them() -> None:
        await asyncio.gather(*(ask_all(one, names("row", 60)) for one in asked))

    run(loop, all_of_them())
    assert purse.spent.tokens == min(500 - 500 % tokens, 180 * tokens)
    assert purse.in_flight == 0
    assert purse.spent.seconds == pytest.approx(purse.spent.calls)
