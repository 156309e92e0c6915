"""An oracle asked through the journal, on real sockets: what is tried again, what is not, what is left behind."""

import asyncio
import re
import threading
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset
from oracle_server import FAULTS, Answer, Call, completion, error
from test_transforms import alpaca, statuses

from hf_reflect import ReflectInstruction, background
from hf_reflect.errors import JournalError, OracleError
from hf_reflect.journal import Journal
from hf_reflect.oracles import Reply, Request, RowFailedError, journaled
from hf_reflect.oracles.chat import ChatOracle
from hf_reflect.oracles.journaled import JournaledOracle
from hf_reflect.oracles.pace import Limits


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """A test has no patience for the waits between two tries; those that the server asks for stay as they are."""
    monkeypatch.setattr(journaled, "_LONGEST_BACKOFF", 0.01)


def request(text: str = "hello") -> Request:
    return Request(({"role": "user", "content": text},))


def make(server, journal, *, attempts: int = 5, patience: float = 120.0, **options: Any) -> JournaledOracle:
    oracle = ChatOracle(server.url, **options)
    return JournaledOracle(oracle, Journal(journal), Limits(attempts=attempts, patience=patience))


def ask(oracle: JournaledOracle, *texts: str) -> list[Reply | BaseException]:
    """The replies, or what was raised, all asked at once on the loop that the transforms use."""

    async def all_at_once():
        return await asyncio.gather(*(oracle.ask(request(text)) for text in texts), return_exceptions=True)

    return background.run(all_at_once())


def ask_one(oracle: JournaledOracle, text: str = "hello") -> Reply:
    (reply,) = ask(oracle, text)
    if isinstance(reply, BaseException):
        raise reply
    return reply


def slowly(call: Call, seconds: float = 0.05) -> Answer:
    return replace(completion(call), delay=seconds)


# Trying again

PASSING: dict[str, Any] = {
    name: FAULTS[name]
    for name in (
        "429",
        "429-wait",
        "500",
        "502",
        "503",
        "reset",
        "reset-middle",
        "not-json",
        "truncated-json",
        "hang",
        "no-choices",
    )
} | {str(status): lambda call, s=status: error(s) for status in (408, 409, 424, 425, 504, 529)}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_may_pass_is_tried_again_and_the_reply_says_how_often(server, journal, name):
    server.rule = lambda call: PASSING[name](call) if call.attempt <= 2 else None
    if name == "429-wait":  # it waits as long as the server asks
        server.rule = lambda call: PASSING[name](call) if call.attempt <= 1 else None
    oracle = make(server, journal, timeout=0.3 if name == "hang" else 60.0)
    tries = 2 if name == "429-wait" else 3
    assert ask_one(oracle).attempts == tries == len(server.completions)
    assert (oracle.spent.calls, oracle.spent.failed_calls) == (1, tries - 1)


def test_a_reply_at_once_took_one_attempt_also_when_it_is_recalled(server, journal):
    assert ask_one(make(server, journal)).attempts == 1
    assert ask_one(make(server, journal)).attempts == 1


def test_the_number_of_attempts_stays_with_the_reply_in_the_journal(server, journal):
    server.rule = lambda call: error(500) if call.attempt == 1 else None
    first = ask_one(make(server, journal))
    assert ask_one(make(server, journal)) == first
    assert first.attempts == 2


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_row_whose_every_try_fails_fails_with_the_last_reason(server, journal, attempts):
    server.rule = FAULTS["500"]
    with pytest.raises(RowFailedError, match=rf"HTTP 500.*attempt {attempts} of {attempts}"):
        ask_one(make(server, journal, attempts=attempts))
    assert len(server.completions) == attempts


@pytest.mark.parametrize("name", ["400", "422", "413"])
def test_what_this_request_alone_gets_wrong_is_not_tried_again(server, journal, name):
    server.rule = lambda call: error(int(name))
    with pytest.raises(RowFailedError):
        ask_one(make(server, journal))
    assert len(server.completions) == 1


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_what_no_request_will_get_past_stops_at_once(server, journal, status):
    server.rule = FAULTS[status]
    with pytest.raises(OracleError, match=f"HTTP {status}"):
        ask_one(make(server, journal))
    assert len(server.completions) == 1


@pytest.mark.parametrize("name", ["400", "401", "500", "no-choices"])
def test_a_failure_is_not_remembered(server, journal, name):
    server.rule = lambda call: FAULTS[name](call) if call.attempt == 1 else None
    with pytest.raises((RowFailedError, OracleError)):
        ask_one(make(server, journal, attempts=1))
    assert ask_one(make(server, journal)).finish_reason == "stop"


def test_a_server_that_is_gone_stops_the_run_after_the_patience_with_advice(server, journal):
    oracle = make(server, journal, patience=0.2)
    server.stop()
    ends = ask(oracle, *map(str, range(12)))
    stopped = [end for end in ends if isinstance(end, OracleError)]
    assert stopped
    assert "Is the server running?" in str(stopped[0])
    assert str(stopped[0]).startswith(f"oracle {server.url}: no connection")  # the server, not its model
    assert "\n" not in str(stopped[0])


def test_a_server_that_only_has_errors_stops_the_run_after_the_patience(server, journal):
    """Each might be the fault of its request; that the canary gets one too tells them apart."""
    server.rule = FAULTS["500"]
    ends = ask(make(server, journal, attempts=100, patience=0.3), *map(str, range(12)))
    stopped = [end for end in ends if isinstance(end, OracleError)]
    assert stopped
    assert re.search(
        rf"^oracle {re.escape(server.url)}: HTTP 500.*; nothing but failures for \d+ sec", str(stopped[0])
    )
    assert "Run the same command again" in str(stopped[0])
    assert len(canaries(server)) >= 1


def canaries(server) -> list[Call]:
    return [call for call in server.completions if call.user == "Say OK."]


@pytest.mark.parametrize("name", ["500", "hang", "not-json", "no-choices"])
def test_rows_that_all_fail_by_themselves_fail_and_do_not_stop_the_run(server, journal, name):
    """The canary is answered, so the server is well. It is a call like no other: nobody keeps what it says."""
    server.rule = lambda call: None if call.user == "Say OK." else FAULTS[name](call)
    oracle = make(server, journal, attempts=2, patience=0.2, timeout=0.3 if name == "hang" else 60.0)
    ends = ask(oracle, *map(str, range(20)))
    assert {type(end) for end in ends} == {RowFailedError}
    assert {str(end).endswith("(attempt 2 of 2)") for end in ends} == {True}
    assert canaries(server)
    assert {call.body["max_tokens"] for call in canaries(server)} == {1}
    assert (oracle.spent.calls, oracle.spent.failed_calls) == (0, 40)
    assert list(Journal(journal).entries("reply")) == []
    server.rule = None
    assert ask_one(oracle).finish_reason == "stop"


OF_SERVER = ["429", "502", "503", "reset", "reset-middle"]
"""Any other request would have failed as well."""


@pytest.mark.parametrize("name", OF_SERVER)
def test_what_hits_any_request_is_not_held_against_one(server, journal, name):
    server.rule = lambda call: FAULTS[name](call) if call.attempt <= 6 else None
    reply = ask_one(make(server, journal, attempts=1))
    assert reply.attempts == 7 == len(server.completions)


@pytest.mark.parametrize("name", sorted(PASSING.keys() - {*OF_SERVER, "429-wait", "408", "504", "529"}))
def test_what_may_be_the_requests_own_fault_is_held_against_it(server, journal, name):
    """No reply in time too: some requests never end."""
    server.rule = lambda call: PASSING[name](call) if call.attempt <= 1 else None
    with pytest.raises(RowFailedError, match=r"\(attempt 1 of 1\)$"):
        ask_one(make(server, journal, attempts=1, timeout=0.3 if name == "hang" else 60.0))


def test_where_there_is_no_reply_in_time_fewer_are_asked_at_once(server, journal):
    server.rule = lambda call: FAULTS["hang"](call) if call.attempt == 1 else None
    oracle = make(server, journal, timeout=0.3)
    replies = ask(oracle, *map(str, range(8)))
    assert {type(reply) for reply in replies} == {Reply}
    assert oracle.pace.allowed < 16


# Asking once


def test_the_same_request_from_many_at_once_is_one_call(server, journal):
    server.rule = slowly
    oracle = make(server, journal)
    replies = ask(oracle, *["same"] * 20, *["other"] * 20)
    assert len({reply.text for reply in replies}) == 2
    assert len(server.completions) == 2
    assert (oracle.spent.calls, oracle.spent.recalled) == (2, 38)


def test_where_the_first_of_the_same_requests_fails_the_next_one_asks(server, journal):
    server.rule = lambda call: error(400) if call.attempt == 1 else None
    first, *others = ask(make(server, journal), *["same"] * 5)
    assert isinstance(first, RowFailedError)
    assert {type(other) for other in others} == {Reply}
    assert len(server.completions) == 2


def test_a_reply_is_in_the_journal_before_it_is_handed_on(server, journal):
    oracle = make(server, journal)

    async def ask_and_look() -> bool:
        reply = await oracle.ask(request())
        entries = list(Journal(journal).entries("reply"))
        return [entry["value"]["text"] for entry in entries] == [reply.text]

    assert background.run(ask_and_look())


def test_a_reply_that_can_not_be_recorded_is_not_handed_on(server, tmp_path):
    with pytest.raises(JournalError):
        ask_one(make(server, tmp_path))  # a folder is no journal


# At once


@pytest.mark.parametrize("concurrency", [1, 3, 16, 24])
def test_calls_at_once_reach_the_concurrency_and_never_exceed_it(server, journal, concurrency):
    server.rule = slowly
    replies = ask(make(server, journal, concurrency=concurrency), *map(str, range(5 * concurrency)))
    assert {type(reply) for reply in replies} == {Reply}
    assert server.most_at_once <= concurrency
    assert server.most_at_once >= concurrency * 3 // 4


def test_the_limit_holds_over_all_threads_that_share_an_oracle(server, journal):
    server.rule = slowly
    oracle = make(server, journal, concurrency=4)
    threads = [threading.Thread(target=ask, args=(oracle, *(f"{n}.{i}" for i in range(8)))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.completions) == 32
    assert server.most_at_once <= 4


def test_more_calls_at_once_than_a_client_has_connections_are_no_timeouts(server, journal):
    """huggingface_hub's pool holds a hundred, and takes waiting for one of them for a timeout of the server."""
    server.rule = lambda call: slowly(call, 0.3)
    oracle = make(server, journal, concurrency=150, timeout=20.0)
    oracle.pace.allowed = 150.0  # as after many successes
    replies = ask(oracle, *map(str, range(300)))
    assert {type(reply) for reply in replies} == {Reply}
    assert oracle.spent.failed_calls == 0
    assert 100 < server.most_at_once <= 150


def test_a_throttling_server_is_asked_with_fewer_calls_at_once(server, journal):
    """Of sixteen calls it refuses those beyond four: in the end all have been answered."""
    server.rule = lambda call: error(429, retry_after=0.05) if server._at_once > 4 else slowly(call)
    oracle = make(server, journal, attempts=20)
    replies = ask(oracle, *map(str, range(60)))
    assert {type(reply) for reply in replies} == {Reply}
    assert oracle.pace.allowed < 16


# Stopping, and other processes


def test_a_stopped_oracle_gives_up_what_is_in_flight_and_answers_no_more(server, journal):
    server.rule = FAULTS["hang"]
    oracle = make(server, journal)
    ends: list[Any] = []

    def wait_for_it() -> None:
        try:
            ends.extend(ask(oracle, "one", "two"))
        except BaseException as end:
            ends.append(end)

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    while len(server.completions) < 2:
        threading.Event().wait(0.01)
    oracle.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert [type(end) for end in ends] == [asyncio.CancelledError] * 2
    with pytest.raises(OracleError, match="the run was stopped"):
        ask_one(oracle)


def test_forked_processes_ask_on_with_connections_of_their_own(server, journal, tmp_path):
    """The parent has asked before, so it has an event loop, connections and a journal that no child may use."""
    server.rule = slowly
    oracle = make(server, journal, concurrency=2)
    ask(oracle, "before")
    rows = Dataset.from_list(alpaca(8))
    both = rows.map(ReflectInstruction(oracle), batched=True, batch_size=4, num_proc=2)
    assert set(statuses(both)) <= {"ok", "unchanged"}
    assert len(server.completions) == 1 + 8
    assert server.most_at_once <= 2 * 2
    alone = rows.map(ReflectInstruction(make(server, journal)), batched=True, keep_in_memory=True)
    assert alone.to_list() == both.to_list()
    assert len(server.completions) == 1 + 8  # both processes wrote to the same journal
    assert ask_one(oracle, "after").finish_reason == "stop"
