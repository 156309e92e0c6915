"""Oracles that Hugging Face hosts, against servers that speak as the Hub, its router and its endpoints do."""

import asyncio
import json
import logging
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, load_dataset
from oracle_server import Answer, Call, Endpoint, HubServer, completion, error
from test_transforms import alpaca

from hf_reflect import ReflectInstruction, background, cli, recycle
from hf_reflect.errors import HfReflectError, OracleError
from hf_reflect.estimating import estimate
from hf_reflect.journal import Journal
from hf_reflect.oracles import Oracle, Reply, Request, RowFailedError, Sampling, load_oracle
from hf_reflect.oracles.base import PassingError
from hf_reflect.oracles.hub import EndpointOracle, ProviderOracle
from hf_reflect.oracles.journaled import JournaledOracle
from hf_reflect.oracles.pace import Limits
from hf_reflect.replies import json_schema


SECRET = "hf_marked_secret_0123456789"
MODEL = "org/teacher"
NAME = "me/my-teacher"


@pytest.fixture
def hub(monkeypatch):
    """Hugging Face at a port of this machine; the user is logged in there."""
    with HubServer(token=SECRET) as server:
        constants, providers = "huggingface_hub.constants", import_module("huggingface_hub.inference._providers")
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
        monkeypatch.setattr(f"{constants}.INFERENCE_PROXY_TEMPLATE", server.url + "/{provider}")
        monkeypatch.setattr(f"{constants}.INFERENCE_ENDPOINTS_ENDPOINT", server.url + "/v2")
        if router := getattr(providers, "CONVERSATIONAL_AUTO_ROUTER", None):  # it fixed its address when imported
            monkeypatch.setattr(router, "base_url", server.url)
        providers._common._fetch_inference_provider_mapping.cache_clear()
        monkeypatch.setenv("HF_TOKEN", SECRET)
        server.serve_model(MODEL, together="conversational", cerebras="conversational", nscale="text-generation")
        yield server


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> SimpleNamespace:
    """The time that huggingface_hub waits by: it passes when somebody sleeps."""
    passing = SimpleNamespace(now=time.time(), waited=0.0)

    def sleep(seconds: float) -> None:
        passing.now += seconds
        passing.waited += seconds

    clock = SimpleNamespace(time=lambda: passing.now, sleep=sleep)
    monkeypatch.setattr("huggingface_hub._inference_endpoints.time", clock)
    return passing


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    """Six rows from a file, so with cache files of their own."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in alpaca()))
    return load_dataset("json", data_files=str(file), split="train")


@pytest.fixture
def logged_out(hub, monkeypatch) -> HubServer:
    monkeypatch.delenv("HF_TOKEN")
    return hub


def request(text: str = "hello", **options) -> Request:
    return Request(({"role": "user", "content": text},), **options)


def ask(oracle: Oracle, *requests: Request) -> list[Reply | BaseException]:
    """The replies, or what was raised, all asked at once on the loop that the transforms use."""

    async def all_at_once():
        return await asyncio.gather(*map(oracle.complete, requests or [request()]), return_exceptions=True)

    return background.run(all_at_once())


def ask_one(oracle: Oracle, *args, **options) -> Reply:
    (reply,) = ask(oracle, request(*args, **options))
    if isinstance(reply, BaseException):
        raise reply
    return reply


def check_is_advice(raised: Exception, *said: str) -> None:
    assert isinstance(raised, OracleError), repr(raised)
    assert "\n" not in str(raised)
    assert str(raised).startswith("oracle ")
    for words in said:
        assert words in str(raised)


def check_is_hidden(*texts: str) -> None:
    """Not even a good part of the token is there."""
    assert [line for text in texts for line in text.splitlines() if SECRET[:8] in line] == []


def echo(status: int, padding: int = 0):
    """An error with what a careless server repeats."""
    return lambda call: Answer(status, "x" * padding + call.headers.get("authorization", ""))


PADDINGS = [0, *range(220, 310, 5)]
"""Characters before the token: a message that is cut off may end anywhere within it."""


# Inference Providers.


def test_the_router_chooses_where_no_provider_is_named(hub):
    hub.rule = lambda call: completion(call, "two words")
    oracle = load_oracle(f"hf:{MODEL}")
    reply = ask_one(oracle, "three words here", sampling=Sampling(max_tokens=7, temperature=0.5, seed=3))
    assert reply == Reply("two words", finish_reason="stop", prompt_tokens=3, completion_tokens=2)
    (call,) = hub.completions
    # The older client takes the first provider itself; the newer one leaves it to the router.
    sent = {"/v1/chat/completions": MODEL, "/together/v1/chat/completions": f"together/{MODEL}"}
    assert call.body["model"] == sent[call.path]
    assert (call.body["max_tokens"], call.body["temperature"], call.body["seed"]) == (7, 0.5, 3)
    assert call.headers["authorization"] == f"Bearer {SECRET}"


def test_a_named_provider_is_the_one_that_is_asked(hub):
    ask_one(ProviderOracle(f"{MODEL}@cerebras"))
    (call,) = hub.completions
    assert call.path == "/cerebras/v1/chat/completions"
    assert call.body["model"] == f"cerebras/{MODEL}"


@pytest.mark.parametrize("provider", ["cerebras", "together"])
def test_a_schema_reaches_a_provider_in_the_form_it_reads(hub, provider):
    ask_one(ProviderOracle(f"{MODEL}@{provider}"), schema=json_schema("response"))
    sent = hub.completions[0].body["response_format"]
    assert sent["type"] == "json_schema"
    # Together has it one level higher than OpenAI, which the newer client knows.
    assert (sent.get("schema") or sent["json_schema"]["schema"]) == json_schema("response")


def test_the_identity_is_the_model_and_its_provider_and_no_transport_setting(hub):
    plain, named = ProviderOracle(MODEL), ProviderOracle(f"{MODEL}@together", concurrency=3, timeout=1.0)
    assert plain.identity == {"kind": "hf", "model": MODEL, "provider": "auto"}
    assert named.identity == {"kind": "hf", "model": MODEL, "provider": "together"}
    assert (plain.spec, named.spec) == (f"hf:{MODEL}", f"hf:{MODEL}@together")
    assert plain.name == named.name == MODEL
    assert isinstance(plain, Oracle)


def test_who_is_not_logged_in_is_told_how_to(logged_out):
    with pytest.raises(OracleError, match="not logged in") as raised:
        ProviderOracle(MODEL)
    check_is_advice(raised.value, f"hf:{MODEL}", "hf auth login", "HF_REFLECT_API_KEY")
    assert not logged_out.calls


def test_a_key_serves_in_place_of_a_login(logged_out, monkeypatch):
    monkeypatch.setenv("HF_REFLECT_API_KEY", SECRET)
    logged_out.token = None
    assert ask_one(ProviderOracle(f"{MODEL}@together")).finish_reason == "stop"
    assert logged_out.completions[0].headers["authorization"] == f"Bearer {SECRET}"


def test_the_hub_is_asked_with_the_key_of_who_is_not_logged_in(logged_out):
    ProviderOracle(f"{MODEL}@together", api_key=SECRET)
    assert logged_out.calls[-1].headers["authorization"] == f"Bearer {SECRET}"


def test_a_model_that_the_hub_does_not_have_is_advice(hub):
    with pytest.raises(OracleError, match="HTTP 404") as raised:
        ProviderOracle("org/none")
    check_is_advice(raised.value, "hf:org/none", "Check the model's name")


@pytest.mark.parametrize("name", ["", "@together", "a/b/c", "org/te acher", "-x-/.."])
def test_a_name_that_no_model_can_have_is_advice(hub, name):
    with pytest.raises(OracleError) as raised:
        ProviderOracle(name)
    check_is_advice(raised.value, f"hf:{name}")


def test_a_model_that_nobody_serves_as_a_chat_model_is_advice(hub):
    hub.serve_model("org/embedder", together="feature-extraction")
    hub.serve_model("org/nobody")
    for model in ("org/embedder", "org/nobody"):
        with pytest.raises(OracleError, match="no Inference Provider serves this model") as raised:
            ProviderOracle(model)
        check_is_advice(raised.value, f"hf:{model}")


@pytest.mark.parametrize("provider", ["groq", "nscale", "nonsense"])
def test_a_provider_that_does_not_serve_the_model_is_advice(hub, provider):
    with pytest.raises(OracleError, match=f"{provider} does not serve this model") as raised:
        ProviderOracle(f"{MODEL}@{provider}")
    check_is_advice(raised.value, "together, cerebras")
    assert not hub.completions


def test_a_provider_that_the_installed_client_does_not_know_is_advice(hub):
    hub.serve_model("org/new", tomorrows_cloud="conversational")
    with pytest.raises(OracleError, match="tomorrows-cloud") as raised:
        ask_one(ProviderOracle("org/new@tomorrows-cloud"))
    check_is_advice(raised.value)


def test_a_key_of_a_provider_needs_the_provider_named(hub):
    with pytest.raises(OracleError, match="@") as raised:
        ask_one(ProviderOracle(MODEL, api_key="sk-of-a-provider"))
    check_is_advice(raised.value)


def test_hugging_face_never_sees_the_key_of_a_provider(hub):
    ProviderOracle(f"{MODEL}@together", api_key="sk-of-a-provider").price()
    assert len(hub.calls) >= 2
    assert "sk-of-a-provider" not in str([call.headers for call in hub.calls])


@pytest.mark.parametrize("answer", [{"error": "no"}, [], "text", b"<html>", {"id": MODEL}], ids=repr)
def test_a_hub_that_answers_in_another_shape_is_advice(hub, answer):
    hub.routes["GET", f"/api/models/{MODEL}"] = lambda call: Answer(body=answer)
    with pytest.raises(OracleError) as raised:
        ProviderOracle(MODEL)
    check_is_advice(raised.value, f"hf:{MODEL}")


@pytest.mark.parametrize("answer", [error(500), error(503), Answer(body={}, cut="before")], ids=["500", "503", "cut"])
def test_a_hub_that_fails_is_advice(hub, answer):
    hub.routes["GET", f"/api/models/{MODEL}"] = lambda call: answer
    with pytest.raises(OracleError) as raised:
        ProviderOracle(MODEL)
    check_is_advice(raised.value, f"hf:{MODEL}")


def test_a_hub_that_is_down_is_advice(hub):
    hub.stop()
    with pytest.raises(OracleError, match="no connection") as raised:
        ProviderOracle(MODEL)
    check_is_advice(raised.value, f"hf:{MODEL}")


@pytest.mark.parametrize(
    ("status", "said"), [(401, "HF_REFLECT_API_KEY"), (402, "credits"), (403, "access"), (404, f"hf:{MODEL}")]
)
def test_what_will_not_go_away_stops_the_run_with_advice(hub, status, said):
    hub.rule = lambda call: Answer(status, {"error": "You have exceeded your monthly included credits"})
    with pytest.raises(OracleError, match=f"HTTP {status}") as raised:
        ask_one(ProviderOracle(MODEL))
    check_is_advice(raised.value, f"hf:{MODEL}", said)


@pytest.mark.parametrize(("status", "throttled"), [(429, True), (500, False), (502, False), (503, True), (504, False)])
def test_what_may_pass_may_be_tried_again(hub, status, throttled):
    hub.rule = lambda call: error(status, retry_after=7)
    with pytest.raises(PassingError) as raised:
        ask_one(ProviderOracle(f"{MODEL}@together"))
    assert (raised.value.throttled, raised.value.retry_after) == (throttled, 7)


def test_a_bad_request_fails_its_row_only(hub, journal):
    hub.rule = lambda call: error(400, "context length exceeded") if call.user == "bad" else None
    oracle = JournaledOracle(ProviderOracle(MODEL), Journal(journal))

    async def all_at_once():
        return await asyncio.gather(oracle.ask(request("good")), oracle.ask(request("bad")), return_exceptions=True)

    good, bad = background.run(all_at_once())
    assert good.finish_reason == "stop"
    assert isinstance(bad, RowFailedError)


@pytest.mark.parametrize(
    "answer",
    [Answer(body="<html>"), Answer(body={}, cut="before"), Answer(body={"a": "b"}, cut="middle"), Answer(body=[])],
    ids=["not-json", "reset", "reset-middle", "list"],
)
def test_nothing_but_our_errors_comes_out_of_a_call(hub, answer):
    hub.rule = lambda call: answer
    (outcome,) = ask(ProviderOracle(f"{MODEL}@together"))
    assert isinstance(outcome, PassingError | RowFailedError | OracleError), repr(outcome)


def test_a_reply_that_does_not_come_in_time_may_pass(hub):
    hub.rule = lambda call: Answer(hang=True)
    with pytest.raises(PassingError, match="no reply in time"):
        ask_one(ProviderOracle(f"{MODEL}@together", timeout=0.3))


# What providers ask for it.


def test_the_published_price_is_the_highest_where_the_router_chooses(hub):
    hub.prices[MODEL] = {"together": {"input": 0.2, "output": 1.5}, "cerebras": {"input": 0.6, "output": 1.2}}
    assert ProviderOracle(MODEL).price() == (0.6, 1.5)
    assert ProviderOracle(f"{MODEL}@together").price() == (0.2, 1.5)


def test_there_may_be_no_published_price(hub):
    hub.prices[MODEL] = {"cerebras": {"input": 0.6, "output": 1.2}}
    assert ProviderOracle(f"{MODEL}@together").price() is None
    hub.prices = {}
    assert ProviderOracle(MODEL).price() is None


def listed(**pricing) -> dict:
    return {"data": [{"id": MODEL, "providers": [{"provider": "together", **pricing}]}]}


@pytest.mark.parametrize(
    "body",
    [
        [],
        "text",
        b"<html>",
        {"data": None},
        {"data": [None]},
        {"data": [{"id": MODEL, "providers": None}]},
        listed(pricing="free"),
        listed(pricing={"input": 0.2}),
        listed(pricing={"input": "?", "output": "?"}),
    ],
    ids=repr,
)
def test_a_list_of_another_shape_has_no_price(hub, body):
    hub.routes["GET", "/v1/models"] = lambda call: Answer(body=body)
    assert ProviderOracle(MODEL).price() is None


@pytest.mark.parametrize("answer", [error(401), error(500), Answer(body={}, cut="before")], ids=["401", "500", "cut"])
def test_a_router_that_does_not_say_has_no_price(hub, answer):
    hub.routes["GET", "/v1/models"] = lambda call: answer
    assert ProviderOracle(MODEL).price() is None


def test_an_estimate_goes_by_the_published_price(hub, rows, journal):
    hub.prices[MODEL] = {"together": {"input": 2.0, "output": 8.0}}
    found = estimate(rows, oracle=f"hf:{MODEL}@together", sample=6, journal=journal, progress=False)
    assert found.prices == (2.0, 8.0)
    spent = found.prompt_tokens.value * 2.0 + found.completion_tokens.value * 8.0
    assert found.cost.value == pytest.approx(spent / 1_000_000)


# Secrets of who is logged in.


@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_a_token_that_is_echoed_reaches_no_message_and_no_log(hub, caplog, status):
    caplog.set_level(logging.DEBUG)
    oracle = ProviderOracle(f"{MODEL}@together")
    hub.rule = lambda call: echo(status, int(call.user))(call)
    outcomes = ask(oracle, *(request(str(n)) for n in PADDINGS))
    check_is_hidden(*map(str, outcomes), oracle.spec, str(oracle.identity), caplog.text)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_token_that_the_hub_echoes_reaches_no_message_and_no_log(hub, caplog, status):
    caplog.set_level(logging.DEBUG)
    said = []
    for padding in PADDINGS:
        hub.routes["GET", f"/api/models/{MODEL}"] = echo(status, padding)
        with pytest.raises(OracleError) as raised:
            ProviderOracle(MODEL)
        said.append(str(raised.value))
    check_is_hidden(*said, caplog.text)


@pytest.mark.parametrize("action", ["get", "resume", "pause"])
def test_a_token_that_the_control_plane_echoes_reaches_no_message_and_no_log(hub, caplog, action):
    caplog.set_level(logging.DEBUG)
    said = []
    for padding in PADDINGS:
        plane = hub.add(Endpoint(NAME, "paused"))
        plane.refuses[action] = Answer(403, "x" * padding + f"Bearer {SECRET}")
        with pytest.raises(OracleError) as raised:
            EndpointOracle(NAME, pause_after=True).close()
        said.append(str(raised.value))
    check_is_hidden(*said, caplog.text)


def test_what_succeeds_logs_no_token(hub, caplog):
    caplog.set_level(logging.DEBUG)
    hub.add(Endpoint(NAME, "paused"))
    endpoint = EndpointOracle(NAME, pause_after=True)
    for oracle in (endpoint, ProviderOracle(MODEL), ProviderOracle(f"{MODEL}@together")):
        ask_one(oracle)
        check_is_hidden(oracle.spec, oracle.name, str(oracle.identity))
    endpoint.close()
    assert caplog.records
    check_is_hidden(caplog.text, *(str(vars(record)) for record in caplog.records))


# Runs with Inference Providers.


def test_a_whole_run_with_a_provider(hub, rows, journal):
    dataset, reflections = recycle(
        rows, oracle=f"hf:{MODEL}", student=None, method="reflect", journal=journal, progress=False
    )
    statuses = {one["status"] for (one,) in reflections["instruction_reflections"]}
    assert statuses <= {"ok", "unchanged"}
    assert (dataset.num_rows, len(hub.completions)) == (6, 12)


def test_two_processes_and_a_running_loop(hub, rows, journal, tmp_path):
    async def notebook_cell():
        return rows.map(ReflectInstruction(f"hf:{MODEL}@together", journal=journal), batched=True)

    alone = asyncio.run(notebook_cell())
    transform = ReflectInstruction(f"hf:{MODEL}@together", journal=tmp_path / "other")
    both = rows.map(transform, batched=True, num_proc=2, load_from_cache_file=False)
    assert both.to_list() == alone.to_list()
    assert len(hub.completions) == 12


# Inference Endpoints.


def control(hub: HubServer, action: str) -> list[Call]:
    return [call for call in hub.calls if call.path == f"/v2/endpoint/{NAME}/{action}"]


def test_an_endpoint_that_runs_is_asked_at_its_own_url(hub):
    endpoint = hub.add(Endpoint(NAME))
    hub.rule = lambda call: completion(call, "two words")
    oracle = load_oracle(f"endpoint:{NAME}")
    assert ask_one(oracle, "three words here") == Reply("two words", "stop", 3, 2)
    (call,) = hub.completions
    assert call.path == f"/at/{NAME}/v1/chat/completions"
    assert call.headers["authorization"] == f"Bearer {SECRET}"
    assert call.headers["x-scale-up-timeout"] == "600"  # so that the proxy holds what comes while it starts
    assert endpoint.history == []


def test_the_identity_is_the_name_and_what_it_serves_and_no_url(hub):
    hub.add(Endpoint(NAME, repository="org/other", revision="beef"))
    oracle = EndpointOracle(NAME, concurrency=3, timeout=1.0)
    expected = {
        "kind": "endpoint",
        "endpoint": NAME,
        "model": "teacher",
        "repository": "org/other",
        "revision": "beef",
    }
    assert oracle.identity == expected
    assert oracle.spec == f"endpoint:{NAME}"
    assert isinstance(oracle, Oracle)


@pytest.mark.parametrize("state", ["paused", "scaledToZero"])
def test_an_endpoint_that_sleeps_is_woken_and_it_says_so(hub, caplog, state):
    endpoint = hub.add(Endpoint(NAME, state))
    assert ask_one(EndpointOracle(NAME)).finish_reason == "stop"
    assert endpoint.history == ["initializing", "running"]
    assert len(control(hub, "resume")) == 1
    (said,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    for words in ("my-teacher", state, "waking it"):
        assert words in said.getMessage()


@pytest.mark.parametrize("state", ["initializing", "pending", "updating"])
def test_an_endpoint_that_starts_already_is_waited_for(hub, state):
    endpoint = hub.add(Endpoint(NAME, state, polls=3))
    if state != "initializing":
        endpoint.seen = lambda: endpoint.turn("running")
        endpoint.refuses["resume"] = error(400, "not now")
    assert ask_one(EndpointOracle(NAME)).finish_reason == "stop"
    assert not control(hub, "resume")


def test_an_endpoint_is_waited_for_until_it_is_healthy(hub):
    hub.add(Endpoint(NAME, "paused", health=[503, 502, 503, 200]))
    assert ask_one(EndpointOracle(NAME)).finish_reason == "stop"
    assert len([call for call in hub.calls if call.path.endswith("/health")]) == 4


def test_an_endpoint_that_answers_503_while_it_starts_is_waited_for_in_a_run(hub, journal):
    endpoint = hub.add(Endpoint(NAME))
    oracle = JournaledOracle(EndpointOracle(NAME), Journal(journal), Limits(attempts=4, patience=20))
    endpoint.state, endpoint.polls = "scaledToZero", 2
    reply = background.run(oracle.ask(request()))
    assert (reply.finish_reason, reply.attempts) == ("stop", 3)
    assert endpoint.history == ["initializing", "running"]


@pytest.mark.parametrize("state", ["failed", "updateFailed"])
def test_an_endpoint_that_failed_is_advice(hub, state):
    hub.add(Endpoint(NAME, state))
    with pytest.raises(OracleError, match="failed to") as raised:
        EndpointOracle(NAME)
    check_is_advice(raised.value, f"endpoint:{NAME}", "logs", "endpoints.huggingface.co")


def test_an_endpoint_that_fails_to_start_is_advice(hub):
    hub.add(Endpoint(NAME, "paused", becomes="failed"))
    with pytest.raises(OracleError, match="failed to deploy") as raised:
        EndpointOracle(NAME)
    check_is_advice(raised.value, f"endpoint:{NAME}", "logs")


def test_an_endpoint_that_never_starts_is_given_up(hub, clock):
    hub.add(Endpoint(NAME, "paused", polls=10_000))
    with pytest.raises(OracleError, match="Timeout") as raised:
        EndpointOracle(NAME, wake=60)
    check_is_advice(raised.value, f"endpoint:{NAME}")
    assert 60 <= clock.waited <= 65


def test_an_endpoint_that_is_not_there_is_advice(hub):
    with pytest.raises(OracleError, match="HTTP 404") as raised:
        EndpointOracle(NAME)
    check_is_advice(raised.value, f"endpoint:{NAME}", "Check the name")


@pytest.mark.parametrize("name", ["", "my-teacher", "/my-teacher", "me/"])
def test_a_name_without_both_parts_is_advice(hub, name):
    with pytest.raises(OracleError, match="endpoint:NAMESPACE/NAME") as raised:
        EndpointOracle(name)
    check_is_advice(raised.value)
    assert not hub.calls


def test_an_endpoint_of_who_is_not_logged_in_is_advice(logged_out):
    with pytest.raises(OracleError, match="not logged in") as raised:
        EndpointOracle(NAME)
    check_is_advice(raised.value, f"endpoint:{NAME}", "hf auth login")


@pytest.mark.parametrize("action", ["get", "resume"])
@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_a_control_plane_that_refuses_is_advice(hub, action, status):
    hub.add(Endpoint(NAME, "paused")).refuses[action] = error(status, "no")
    with pytest.raises(OracleError, match=f"HTTP {status}") as raised:
        EndpointOracle(NAME)
    check_is_advice(raised.value, f"endpoint:{NAME}")


@pytest.mark.parametrize("body", [{}, [], None, "text", {"name": "x"}, b"<html>"], ids=repr)
def test_a_control_plane_that_answers_in_another_shape_is_advice(hub, body):
    hub.add(Endpoint(NAME)).refuses["get"] = Answer(body=body if isinstance(body, bytes) else json.dumps(body))
    with pytest.raises(OracleError) as raised:
        EndpointOracle(NAME)
    check_is_advice(raised.value, f"endpoint:{NAME}")


def test_a_control_plane_that_is_down_is_advice(hub):
    hub.stop()
    with pytest.raises(OracleError, match="no connection") as raised:
        EndpointOracle(NAME)
    check_is_advice(raised.value, f"endpoint:{NAME}")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses_stops_the_run_with_advice(hub, status):
    hub.add(Endpoint(NAME))
    hub.rule = lambda call: error(status, "no")
    with pytest.raises(OracleError, match=f"HTTP {status}") as raised:
        ask_one(EndpointOracle(NAME))
    check_is_advice(raised.value, f"endpoint:{NAME}")


# Pausing, which is what saves money.


def recycle_with(rows: Dataset, journal: Path, oracle, **options) -> None:
    """A run over a few rows without a student, after which the endpoint is paused."""
    given = {"student": None, "method": "reflect", "journal": journal, "progress": False, **options}
    recycle(rows, oracle=oracle, oracle_options={"pause_after": True}, **given)


def test_an_endpoint_is_paused_after_a_run_that_succeeds(hub, rows, journal, caplog):
    endpoint = hub.add(Endpoint(NAME, "paused"))
    recycle_with(rows, journal, f"endpoint:{NAME}")
    assert endpoint.history == ["initializing", "running", "paused"]
    assert len(hub.completions) == 12
    assert any("pausing" in record.getMessage() for record in caplog.records)


def test_an_endpoint_is_left_running_unless_asked_for(hub, rows, journal):
    endpoint = hub.add(Endpoint(NAME))
    recycle(rows, oracle=f"endpoint:{NAME}", student=None, method="reflect", journal=journal, progress=False)
    assert endpoint.history == []


def test_an_endpoint_is_paused_after_a_run_that_fails(hub, rows, journal):
    endpoint = hub.add(Endpoint(NAME))
    hub.rule = lambda call: error(403) if call.number > 3 else None
    with pytest.raises(OracleError, match="HTTP 403"):
        recycle_with(rows, journal, f"endpoint:{NAME}")
    assert endpoint.history == ["paused"]


@pytest.mark.parametrize("raised", [ZeroDivisionError, KeyboardInterrupt])
def test_an_endpoint_is_paused_after_an_exception_in_the_run(hub, rows, journal, monkeypatch, raised):
    def broken(*_: object, **__: object) -> None:
        raise raised

    endpoint = hub.add(Endpoint(NAME))
    monkeypatch.setattr("hf_reflect.recycling.KeepRecycled.__call__", broken)
    with pytest.raises(raised):
        recycle_with(rows, journal, f"endpoint:{NAME}")
    assert endpoint.history == ["paused"]


def test_an_endpoint_is_paused_where_the_output_can_not_be_written(hub, rows, journal, tmp_path):
    endpoint = hub.add(Endpoint(NAME))
    (tmp_path / "file").write_text("a file")
    with pytest.raises(HfReflectError, match="can't be written"):
        recycle_with(rows, journal, f"endpoint:{NAME}", output=tmp_path / "file" / "out")
    assert endpoint.history[-1:] == ["paused"]


@pytest.mark.parametrize("another", ["http://127.0.0.1:9/v1", "endpoint:me/none", "nonsense"])
def test_an_endpoint_is_paused_where_another_oracle_can_not_be_used(hub, rows, journal, another):
    endpoint = hub.add(Endpoint(NAME))
    with pytest.raises(OracleError):
        recycle_with(rows, journal, [f"endpoint:{NAME}", another])
    assert endpoint.history == ["paused"]


@pytest.mark.parametrize("model", [None, "gamma"])
def test_an_endpoint_that_was_woken_in_vain_is_paused(hub, model):
    hub.models = ("alpha", "beta")
    endpoint = hub.add(Endpoint(NAME, "paused"))
    with pytest.raises(OracleError, match="alpha, beta"):
        EndpointOracle(NAME, model, pause_after=True)
    assert endpoint.history == ["initializing", "running", "paused"]


@pytest.mark.parametrize(("becomes", "said"), [("failed", "failed to deploy"), ("initializing", "Timeout")])
def test_an_endpoint_that_can_not_be_woken_is_paused(hub, becomes, said):
    endpoint = hub.add(Endpoint(NAME, "paused", becomes=becomes))
    with pytest.raises(OracleError, match=said):
        EndpointOracle(NAME, pause_after=True, wake=60)
    assert endpoint.state == "paused"


def test_a_pause_that_is_refused_is_advice(hub, rows, journal):
    hub.add(Endpoint(NAME)).refuses["pause"] = error(500, "no")
    with pytest.raises(OracleError, match="HTTP 500") as raised:
        recycle_with(rows, journal, f"endpoint:{NAME}")
    check_is_advice(raised.value, f"endpoint:{NAME}")


def test_a_pause_that_is_refused_does_not_hide_why_the_run_failed(hub, rows, journal):
    hub.add(Endpoint(NAME)).refuses["pause"] = error(500, "no")
    hub.rule = lambda call: error(403)
    with pytest.raises(OracleError, match="HTTP 403"):
        recycle_with(rows, journal, f"endpoint:{NAME}")


def test_a_pause_that_is_refused_does_not_hide_why_it_could_not_be_woken(hub):
    hub.add(Endpoint(NAME, "failed")).refuses["pause"] = error(400, "it does not run")
    with pytest.raises(OracleError, match="failed to deploy"):
        EndpointOracle(NAME, pause_after=True)


def test_a_pause_that_is_refused_keeps_no_other_endpoint_running(hub, rows, journal):
    hub.add(Endpoint(NAME)).refuses["pause"] = error(500, "no")
    other = hub.add(Endpoint("me/other"))
    with pytest.raises(OracleError, match="HTTP 500"):
        recycle_with(rows, journal, [f"endpoint:{NAME}", "endpoint:me/other"])
    assert other.history == ["paused"]


# The command line.


@pytest.fixture
def command(hub, rows, tmp_path, monkeypatch):
    """Runs `hf-reflect recycle` in this process, which alone knows this Hugging Face; gives the exit code."""

    def run(*words: object) -> int:
        out, journal = tmp_path / "out", tmp_path / "journal"
        given = ["recycle", tmp_path / "rows.jsonl", out, "--journal", journal, "--method", "reflect"]
        monkeypatch.setattr(sys, "argv", ["hf-reflect", *map(str, [*given, "--student", "none", *words])])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0

    return run


def test_a_run_by_command_line_pauses_the_endpoint(command, hub, capfd):
    endpoint = hub.add(Endpoint(NAME, "paused"))
    assert command("--oracle", f"endpoint:{NAME}", "--pause-after") == 0
    assert endpoint.history == ["initializing", "running", "paused"]
    assert "rows" in capfd.readouterr().out


def test_a_run_by_command_line_that_fails_pauses_it_too(command, hub, capfd):
    endpoint = hub.add(Endpoint(NAME))
    hub.rule = lambda call: error(401)
    assert command("--oracle", f"endpoint:{NAME}", "--pause-after") == 1
    assert endpoint.history == ["paused"]
    assert "HTTP 401" in errors(capfd)[0]


def errors(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]


def forbidden(hub: HubServer) -> None:
    hub.rule = lambda call: error(403)


def out_of_credits(hub: HubServer) -> None:
    hub.rule = lambda call: Answer(402, {"error": "You have exceeded your monthly included credits"})


LASTING = {
    "hf:org/none": None,
    "hf:org/teacher@groq": None,
    "hf:org/teacher@together": forbidden,
    "hf:org/teacher": out_of_credits,
    "hf:": None,
    "endpoint:me/none": None,
    "endpoint:nonsense": None,
    "endpoint:me/failed": lambda hub: hub.add(Endpoint("me/failed", "failed")),
    "endpoint:me/running": lambda hub: (hub.add(Endpoint("me/running")), forbidden(hub)),
}


@pytest.mark.parametrize("spec", LASTING)
def test_an_error_that_lasts_is_one_line_of_advice_and_exit_code_1(command, hub, capfd, spec):
    if prepare := LASTING[spec]:
        prepare(hub)
    assert command("--oracle", spec, "--patience", "2") == 1
    (said,) = errors(capfd)
    assert said.startswith(f"error: oracle {spec}")
    check_is_hidden(said)


@pytest.mark.parametrize("spec", [f"hf:{MODEL}", f"endpoint:{NAME}"])
def test_who_is_not_logged_in_is_told_so_by_the_command_line(command, logged_out, capfd, spec):
    assert command("--oracle", spec) == 1
    assert "hf auth login" in errors(capfd)[0]


def test_another_model_of_a_provider_is_named_in_the_spec(command, capfd):
    assert command("--oracle", f"hf:{MODEL}", "--oracle-model", "org/other") == 1
    assert "hf:MODEL@PROVIDER" in errors(capfd)[0]
