"""The chat oracle, against a server that speaks the real protocol on a real socket."""

import asyncio
import json
import logging
from base64 import b64decode

import pytest
from oracle_server import FAULTS, Answer, Call, OracleServer, completion, error

from hf_reflect import background
from hf_reflect.errors import OracleError
from hf_reflect.journal import Journal
from hf_reflect.oracles import Reply, Request, RowFailedError, Sampling, load_oracle
from hf_reflect.oracles.base import PassingError
from hf_reflect.oracles.chat import ChatOracle
from hf_reflect.oracles.journaled import JournaledOracle
from hf_reflect.oracles.pace import Limits
from hf_reflect.replies import json_schema


def request(text: str = "hello", **options) -> Request:
    return Request(({"role": "user", "content": text},), **options)


def ask(oracle: ChatOracle | JournaledOracle, *requests: Request) -> list[Reply | BaseException]:
    """The replies, or what was raised, all asked at once on the loop that the transforms use."""
    answer = oracle.ask if isinstance(oracle, JournaledOracle) else oracle.complete

    async def all_at_once():
        return await asyncio.gather(*map(answer, requests or [request()]), return_exceptions=True)

    return background.run(all_at_once())


def ask_one(oracle: ChatOracle | JournaledOracle, **options) -> Reply:
    (reply,) = ask(oracle, request(**options))
    if isinstance(reply, BaseException):
        raise reply
    return reply


def patient(server: OracleServer, journal, **limits) -> JournaledOracle:
    """The oracle as a run asks it: through a journal, and again where that may help."""
    return JournaledOracle(ChatOracle(server.url), Journal(journal), Limits(**limits))


def test_a_reply_comes_with_its_finish_reason_and_the_tokens_the_server_counted(server):
    server.rule = lambda call: completion(call, "two words", finish_reason="stop")
    reply = ask_one(ChatOracle(server.url), text="three words here")
    assert reply == Reply("two words", finish_reason="stop", prompt_tokens=3, completion_tokens=2)


def test_model_messages_and_sampling_arrive_as_given(server):
    ask_one(ChatOracle(server.url), text="hi", sampling=Sampling(max_tokens=7, temperature=0.5, top_p=0.9, seed=3))
    sent = server.completions[0].body
    assert sent["model"] == "teacher"
    assert sent["messages"] == [{"role": "user", "content": "hi"}]
    assert (sent["max_tokens"], sent["temperature"], sent["top_p"], sent["seed"]) == (7, 0.5, 0.9, 3)
    assert sent.get("response_format") is None
    assert not sent.get("stream")


def test_a_json_schema_arrives_unchanged_in_openais_form(server):
    schema = json_schema("instruction")
    ask_one(ChatOracle(server.url), schema=schema)
    sent = server.completions[0].body["response_format"]
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["schema"] == schema


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_foreign_host_never_sees_the_hugging_face_token(server, monkeypatch, variable):
    monkeypatch.setenv(variable, "hf_marked")
    ask_one(ChatOracle(server.url))
    assert {call.path for call in server.calls} == {"/v1/models", "/v1/chat/completions"}
    assert "hf_marked" not in str([call.headers for call in server.calls])


def test_the_api_key_is_sent_as_bearer_token(server, monkeypatch):
    monkeypatch.setenv("HF_REFLECT_API_KEY", "sk-marked")
    ask_one(ChatOracle(server.url))
    assert {call.headers.get("authorization") for call in server.calls} == {"Bearer sk-marked"}


@pytest.mark.parametrize("padding", [0, 240])
@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_key_that_the_server_echoes_reaches_no_message_and_no_log(server, monkeypatch, caplog, status, padding):
    caplog.set_level(logging.DEBUG)
    key = "sk-0123456789abcdefghijklmnopqrstuvwxyz"
    monkeypatch.setenv("HF_REFLECT_API_KEY", key)
    server.rule = lambda call: error(status, "x" * padding + f"bad key {call.headers['authorization']}")
    with pytest.raises((OracleError, RowFailedError, PassingError)) as raised:
        ask_one(ChatOracle(server.url))
    assert f"HTTP {status}" in str(raised.value)
    assert key[:12] not in str(raised.value)
    assert key[:12] not in caplog.text


def test_a_key_refused_at_the_list_of_models_is_not_repeated_either(server):
    server.routes["GET", "/v1/models"] = lambda call: error(401, f"who is {call.headers['authorization']}?")
    with pytest.raises(OracleError, match="HTTP 401") as raised:
        ChatOracle(server.url, api_key="sk-marked")
    assert "sk-marked" not in str(raised.value)
    assert "HF_REFLECT_API_KEY" in str(raised.value)


PASSING = ["429", "429-wait", "500", "502", "503", "reset", "reset-middle", "not-json", "truncated-json"]


@pytest.mark.parametrize("fault", [*PASSING, "no-choices"])
def test_what_may_pass_says_so_and_is_not_tried_again_by_the_client_itself(server, fault):
    server.rule = FAULTS[fault]
    with pytest.raises(PassingError):
        ask_one(ChatOracle(server.url))
    assert len(server.completions) == 1


@pytest.mark.parametrize(("status", "throttled"), [(429, True), (500, False), (502, False), (503, True)])
@pytest.mark.parametrize("wait", [None, 7.0, 0.0])
def test_how_long_a_server_asks_to_wait_and_whether_it_is_overloaded_is_told(server, status, throttled, wait):
    server.rule = lambda call: error(status, retry_after=wait)
    with pytest.raises(PassingError) as raised:
        ask_one(ChatOracle(server.url))
    assert (raised.value.retry_after, raised.value.throttled) == (wait, throttled)


def test_what_may_pass_is_tried_again(server, journal):
    server.rule = lambda call: FAULTS[call.user](call) if call.attempt == 1 else None
    replies = ask(patient(server, journal, attempts=2), *map(request, PASSING))
    assert [getattr(reply, "finish_reason", reply) for reply in replies] == ["stop"] * len(PASSING)
    assert sorted(call.user for call in server.completions) == sorted(PASSING * 2)
    first, second = (call.at for call in server.completions if call.user == "429-wait")
    assert second - first >= 1.5  # what its Retry-After asked for; other waits of a first try end before


@pytest.mark.parametrize("tries", [1, 2, 4])
def test_a_reply_says_how_many_calls_it_took_also_when_it_is_recalled(server, journal, tries):
    server.rule = lambda call: error(503, retry_after=0) if call.attempt < tries else None
    for _ in range(2):
        assert ask_one(patient(server, journal, attempts=4)).attempts == tries
    assert len(server.completions) == tries


def test_a_reply_that_was_recorded_before_there_were_thoughts_and_attempts_is_still_one(server, journal):
    known = {"text": "kept", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 1}
    oracle = patient(server, journal)
    Journal(journal).put("reply", {request().key(oracle.oracle.identity): known})
    assert ask_one(oracle) == Reply(**known)
    assert not server.completions


def test_the_row_fails_when_the_last_try_does(server, journal):
    server.rule = lambda call: error(500, retry_after=0)
    with pytest.raises(RowFailedError, match=r"HTTP 500.*attempt 2 of 2"):
        ask_one(patient(server, journal, attempts=2))
    assert len(server.completions) == 2


def test_a_bad_request_fails_its_row_at_once(server, journal):
    server.rule = lambda call: error(400, "context length exceeded")
    with pytest.raises(RowFailedError, match=r"HTTP 400.*context length exceeded"):
        ask_one(patient(server, journal))
    assert len(server.completions) == 1


@pytest.mark.parametrize(("status", "advice"), [(401, "HF_REFLECT_API_KEY"), (403, "access"), (404, "/v1")])
def test_what_will_not_go_away_stops_the_run_with_advice(server, journal, status, advice):
    server.rule = FAULTS[str(status)]
    with pytest.raises(OracleError, match=f"HTTP {status}") as raised:
        ask_one(patient(server, journal))
    assert advice in str(raised.value)
    assert server.url in str(raised.value)
    assert len(server.completions) == 1


def test_a_reply_that_does_not_come_in_time_fails_its_row(server, journal):
    server.rule = FAULTS["hang"]
    hasty = JournaledOracle(ChatOracle(server.url, timeout=0.3), Journal(journal), Limits(attempts=1))
    with pytest.raises(RowFailedError, match="no reply in time"):
        ask_one(hasty)


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        None,
        "a string",
        {"choices": None},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"index": 0}]},
        {"choices": [{"message": {"role": "assistant", "content": [{"type": "text", "text": "x"}]}}]},
        {"error": {"message": "overloaded"}},
        '{"choices": "\udcff"}'.encode("utf-8", "surrogateescape"),
    ],
    ids=repr,
)
def test_a_completion_of_another_shape_fails_its_row_and_nothing_else(server, journal, body):
    server.rule = lambda call: Answer(body=body if isinstance(body, bytes) else json.dumps(body))
    oracle = patient(server, journal, attempts=1)
    with pytest.raises(RowFailedError):
        ask_one(oracle)
    server.rule = None
    assert ask_one(oracle).finish_reason == "stop"  # what failed is in no journal


def test_a_bare_completion_without_usage_and_finish_reason_is_a_reply(server):
    server.rule = lambda call: Answer(body={"choices": [{"message": {"role": "assistant", "content": "yes"}}]})
    assert ask_one(ChatOracle(server.url)) == Reply("yes")


@pytest.mark.parametrize(
    ("fault", "reply"),
    [
        ("length", ("It should be", "length")),
        ("content-filter", ("", "content_filter")),
        ("empty", ("", "stop")),
        ("refusal", ("I'm sorry, but I can't help with that.", "stop")),
        ("surrogate", ("half a pair: ?", "stop")),
    ],
)
def test_replies_that_are_no_answer_are_replies(server, fault, reply):
    server.rule = FAULTS[fault]
    given = ask_one(ChatOracle(server.url))
    assert (given.text, given.finish_reason) == reply


def test_a_refusal_in_its_own_field_is_a_filtered_reply(server):
    message = {"role": "assistant", "content": None, "refusal": "I won't."}
    server.rule = lambda call: completion(call, "", message=message)
    reply = ask_one(ChatOracle(server.url))
    assert (reply.text, reply.finish_reason) == ("I won't.", "content_filter")


def test_what_a_reasoning_model_thought_is_kept_apart_whatever_the_server_calls_it(server):
    for field in ("reasoning_content", "reasoning"):
        message = {"role": "assistant", "content": "Paris.", field: "France? Paris, I think."}
        server.rule = lambda call, message=message: completion(call, message=message)
        reply = ask_one(ChatOracle(server.url), text=field)
        assert (reply.text, reply.thinking) == ("Paris.", "France? Paris, I think.")


@pytest.mark.parametrize("nothing", [None, "", ["a list"], {"effort": "low"}])
def test_a_thought_that_is_no_text_is_none(server, nothing):
    message = {"role": "assistant", "content": "Paris.", "reasoning": nothing, "reasoning_content": nothing}
    server.rule = lambda call: completion(call, message=message)
    reply = ask_one(ChatOracle(server.url))
    assert (reply.text, reply.thinking) == ("Paris.", None)


def test_a_thought_comes_back_from_the_journal_and_fits_its_encoding(server, journal):
    message = {"role": "assistant", "content": "Paris.", "reasoning_content": "half a pair: \ud83d"}
    server.rule = lambda call: completion(call, message=message)
    first, again = (ask_one(patient(server, journal)) for _ in range(2))
    assert first == again
    assert first.thinking == "half a pair: ?"
    assert len(server.completions) == 1


def test_a_model_that_only_thought_has_said_nothing(server):
    message = {"role": "assistant", "content": None, "reasoning_content": "Let me see, France has"}
    server.rule = lambda call: completion(call, "", message=message, finish_reason="length")
    reply = ask_one(ChatOracle(server.url))
    assert (reply.text, reply.thinking, reply.finish_reason) == ("", "Let me see, France has", "length")


def test_json_with_another_content_type_is_a_reply(server):
    server.rule = FAULTS["wrong-type"]
    assert ask_one(ChatOracle(server.url)).finish_reason == "stop"


def test_a_server_that_is_down_is_one_line_of_advice(journal):
    with OracleServer() as server:
        oracle = patient(server, journal, attempts=1, patience=0.0)
    with pytest.raises(OracleError) as raised:
        ChatOracle(server.url)
    # The first failures may be those of their requests; so many in a row are the server's.
    several = ask(oracle, *(request(str(n)) for n in range(16)))
    stopped = [reply for reply in several if isinstance(reply, OracleError)]
    assert stopped
    assert {type(reply) for reply in several} <= {OracleError, RowFailedError}
    for said in (raised.value, *stopped):
        assert "Is the server running" in str(said)
        assert server.url in str(said)
        assert "\n" not in str(said)


@pytest.mark.parametrize("cut", ["before", "middle"])
def test_a_server_that_drops_the_list_of_models_is_one_line_of_advice(server, cut):
    server.routes["GET", "/v1/models"] = lambda call: Answer(body={"data": [{"id": "a"}]}, cut=cut)
    with pytest.raises(OracleError, match=r"oracle http://127\.0\.0\.1"):
        ChatOracle(server.url)


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:99999/v1", "http://127.0.0.1:port/v1", "http://[::1/v1"])
def test_a_url_that_is_none_is_an_oracle_error(url):
    with pytest.raises(OracleError, match="oracle"):
        ChatOracle(url)


def test_a_wrong_model_name_lists_what_is_served():
    with OracleServer(models=("alpha", "beta")) as server:
        with pytest.raises(OracleError, match=r"no model 'gamma'.*alpha, beta"):
            ChatOracle(server.url, "gamma")
        with pytest.raises(OracleError, match=r"--oracle-model.*alpha, beta"):
            ChatOracle(server.url)
        assert ChatOracle(server.url, "beta").name == "beta"
    assert not server.completions


def test_a_single_served_model_is_taken(server):
    assert ChatOracle(server.url).name == "teacher"


def test_its_spec_is_url_and_model_and_makes_it_again():
    with OracleServer(models=("alpha", "org/beta:fast#2")) as server:
        for model in server.models:
            made = ChatOracle(server.url, model)
            assert made.spec == f"{server.url}#{model}"
            again = load_oracle(made.spec, concurrency=3)
            assert (again.identity, again.spec) == (made.identity, made.spec)
        assert load_oracle(server.url, model="alpha").spec == load_oracle(f"{server.url}#alpha").spec
        with pytest.raises(OracleError, match=r"no model 'gamma'.*alpha"):
            load_oracle(f"{server.url}#gamma")


def test_a_server_without_a_list_of_models_needs_a_name(server):
    del server.routes["GET", "/v1/models"]
    with pytest.raises(OracleError, match="--oracle-model"):
        ChatOracle(server.url)
    assert ask_one(ChatOracle(server.url, "any")).finish_reason == "stop"


def test_a_password_in_the_url_is_used_and_never_shown(server, journal):
    url = server.url.replace("http://", "http://user:pass-word@")
    oracle = ChatOracle(url)
    ask_one(oracle)
    assert {_basic(call.headers["authorization"]) for call in server.calls} == {"user:pass-word"}
    shown = [str(oracle.identity), oracle.spec, oracle.url]
    for status in ("400", "401", "500"):
        server.rule = FAULTS[status]
        shown += map(str, ask(oracle))
    server.stop()
    shown += map(str, ask(oracle))
    hopeless = JournaledOracle(oracle, Journal(journal), Limits(attempts=1, patience=0.0))
    shown += map(str, ask(hopeless, *(request(str(n)) for n in range(16))))
    with pytest.raises(OracleError) as raised:
        ChatOracle(url)
    shown.append(str(raised.value))
    told = ("127.0.0.1", "HTTP 400", "HTTP 401", "HTTP 500", "no connection")
    assert all(any(words in text for words in told) for text in shown)
    assert "pass-word" not in "\n".join(shown)


def _basic(header: str) -> str:
    return b64decode(header.removeprefix("Basic ")).decode()


def test_the_identity_is_endpoint_and_model_and_no_transport_setting(server):
    plain = ChatOracle(server.url)
    other = ChatOracle(server.url + "/", api_key="sk", concurrency=3, timeout=1.0)
    assert plain.identity == other.identity == {"kind": "chat", "url": server.url, "model": "teacher"}


def test_no_more_calls_are_in_flight_than_the_oracle_allows(server, journal):
    def slowly(call: Call) -> Answer:
        return Answer(body=completion(call).body, delay=0.05)

    server.rule = slowly
    oracle = JournaledOracle(ChatOracle(server.url, concurrency=3), Journal(journal))

    async def all_at_once():
        return await asyncio.gather(*(oracle.ask(request(str(n))) for n in range(12)))

    assert len(background.run(all_at_once())) == 12
    assert server.most_at_once == 3


def test_a_reply_in_the_journal_is_not_asked_for_again(server, journal):
    for _ in range(2):
        oracle = JournaledOracle(ChatOracle(server.url), Journal(journal))
        background.run(oracle.ask(request()))
    assert len(server.completions) == 1
    assert (oracle.spent.calls, oracle.spent.recalled) == (0, 1)


def test_sixty_four_calls_at_once_are_all_answered(server):
    server.rule = lambda call: Answer(body=completion(call, call.user).body, delay=0.05)
    texts = [f"call {n}" for n in range(64)]
    replies = ask(ChatOracle(server.url, concurrency=64), *map(request, texts))
    assert [reply.text for reply in replies] == texts
    assert server.most_at_once > 32
