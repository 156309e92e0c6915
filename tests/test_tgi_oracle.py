"""The TGI oracle, against a server that speaks TGI's own protocol, through each client that is installed."""

import asyncio
import importlib.util
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from oracle_server import (
    FAULTS,
    TGI_ERRORS,
    Answer,
    Call,
    OracleServer,
    TGIServer,
    chat_ml,
    error,
    generation,
    messages_in,
    tgi_error,
)
from test_transforms import alpaca
from tokenizers import Tokenizer

from hf_reflect import (
    ReflectInstruction,
    ReflectResponse,
    SelectInstruction,
    SelectResponse,
    background,
    cli,
    recycle,
)
from hf_reflect.errors import OracleError
from hf_reflect.journal import Journal
from hf_reflect.oracles import Oracle, Reply, Request, RowFailedError, Sampling, load_oracle
from hf_reflect.oracles.base import PassingError
from hf_reflect.oracles.journaled import JournaledOracle
from hf_reflect.oracles.pace import Limits
from hf_reflect.oracles.tgi import TGIOracle
from hf_reflect.replies import json_schema


CLIENTS = [name for name in ("huggingface_hub", "text_generation") if importlib.util.find_spec(name)]
SECRET = "hf_marked_secret_0123456789"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ABOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.fixture(params=CLIENTS, autouse=True)
def client(request, monkeypatch) -> str:
    """Every test runs with every client there is; that of TGI has precedence, so it is hidden for the other."""
    if request.param == "huggingface_hub":
        for module in ("text_generation", "text_generation.types"):
            monkeypatch.setitem(sys.modules, module, None)
    return request.param


@pytest.fixture
def server():
    with TGIServer() as running:
        yield running


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a real tokenizer that has a chat template."""
    return save_tokenizer(tmp_path / "tokenizer", CHAT_TEMPLATE)


def save_tokenizer(folder: Path, template: str | None, kind: str = "qwen") -> Path:
    from tiny import save_tiny_tokenizer

    folder.mkdir()
    save_tiny_tokenizer(folder, kind)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return folder


def request(text: str = "hello", system: str | None = None, **options) -> Request:
    messages = [{"role": "system", "content": system}] if system else []
    return Request((*messages, {"role": "user", "content": text}), **options)


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


def ask_patiently(server: TGIServer, journal: Path, *requests: Request, attempts: int = 3) -> JournaledOracle:
    """The same, as a run asks: through the journal, and again where that may help."""
    oracle = JournaledOracle(TGIOracle(server.url), Journal(journal), Limits(attempts=attempts, patience=20))

    async def all_at_once():
        return await asyncio.gather(*map(oracle.ask, requests or [request()]), return_exceptions=True)

    oracle.replies = background.run(all_at_once())
    return oracle


def parameters(server: TGIServer) -> dict:
    """What the last generation was asked with; what is null was not asked for."""
    return {key: value for key, value in server.generations[-1].body["parameters"].items() if value is not None}


# What is asked, and what comes back.


def test_a_reply_has_the_text_the_finish_reason_and_the_tokens_of_both_sides(server):
    server.rule = lambda call: generation(call, "two words")
    reply = ask_one(load_oracle(f"tgi:{server.url}"), "three words here")
    # <|im_start|> user three words here <|im_end|> <|im_start|> assistant
    assert reply == Reply("two words", finish_reason="stop", prompt_tokens=8, completion_tokens=2)


def test_the_client_of_tgi_is_used_where_it_is_installed(server, client):
    ask_one(TGIOracle(server.url))
    assert server.generations[0].path == ("/" if client == "text_generation" else "/generate")


@pytest.mark.parametrize(("given", "meant"), [("eos_token", "stop"), ("stop_sequence", "stop"), ("length", "length")])
def test_finish_reasons_are_those_of_the_other_oracles(server, given, meant):
    server.rule = lambda call: generation(call, "some words", finish_reason=given)
    assert ask_one(TGIOracle(server.url)).finish_reason == meant


def test_a_reply_that_reaches_its_limit_says_so(server):
    server.rule = lambda call: generation(call, "one two three four")
    reply = ask_one(TGIOracle(server.url), sampling=Sampling(max_tokens=3))
    assert (reply.text, reply.finish_reason, reply.completion_tokens) == ("one two three", "length", 3)


def test_the_prompt_is_no_part_of_the_reply(server):
    assert server.return_full_text  # what the server adds where nobody declines
    server.rule = lambda call: generation(call, "just this")
    assert ask_one(TGIOracle(server.url)).text == "just this"


def test_greedy_decoding_sends_nothing_that_tgi_refuses(server):
    assert ask_one(TGIOracle(server.url)).finish_reason == "stop"
    sent = parameters(server)
    assert not {"temperature", "top_p", "seed", "grammar"} & set(sent)
    assert not sent["do_sample"]


def test_sampling_arrives_as_given(server):
    ask_one(TGIOracle(server.url), sampling=Sampling(max_tokens=7, temperature=0.5, top_p=0.9, seed=3))
    sent = parameters(server)
    assert (sent["max_new_tokens"], sent["do_sample"]) == (7, True)
    assert (sent["temperature"], sent["top_p"], sent["seed"]) == (0.5, 0.9, 3)


def test_a_top_p_of_one_is_not_sent(server):
    assert ask_one(TGIOracle(server.url), sampling=Sampling(temperature=0.5)).finish_reason == "stop"
    assert "top_p" not in parameters(server)


@pytest.mark.parametrize("phase", ["instruction", "response"])
def test_a_schema_arrives_as_a_grammar(server, phase):
    reply = ask_one(TGIOracle(server.url), schema=json_schema(phase))
    assert parameters(server)["grammar"] == {"type": "json", "value": json_schema(phase)}
    assert set(json.loads(reply.text)) == set(json_schema(phase)["properties"])


@pytest.mark.parametrize(
    ("context", "wanted", "sent"),
    [(100, 2048, 94), (100, 94, 94), (100, 93, 93), (7, 2048, 1), (None, 2048, 2048)],
)
def test_no_more_is_asked_for_than_the_context_has_room_for(context, wanted, sent):
    prompt_tokens = 6  # <|im_start|> user hello <|im_end|> <|im_start|> assistant
    with TGIServer(context=context) as server:
        reply = ask_one(TGIOracle(server.url), sampling=Sampling(max_tokens=wanted))
        assert reply.prompt_tokens == prompt_tokens
        assert parameters(server)["max_new_tokens"] == sent


@pytest.mark.parametrize("words", [92, 200])
def test_a_prompt_that_fills_the_context_fails_its_row_with_the_servers_words(words):
    with TGIServer(context=97) as server, pytest.raises(RowFailedError, match=r"must be <= 97. Given: \d+ `inputs`"):
        ask_one(TGIOracle(server.url), "word " * words)


def test_the_limits_of_a_run_hold_for_tgi_too(server, journal):
    server.rule = lambda call: Answer(body=generation(call).body, delay=0.05)
    oracle = JournaledOracle(TGIOracle(server.url, concurrency=3), Journal(journal))

    async def all_at_once():
        return await asyncio.gather(*(oracle.ask(request(str(n))) for n in range(12)))

    assert len(background.run(all_at_once())) == 12
    assert server.most_at_once <= 3


# The chat template.


def test_the_server_applies_its_own_chat_template(server):
    ask_one(TGIOracle(server.url), "hi", system="be brief")
    sent = server.generations[0].body["inputs"]
    assert sent == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_tokenizer_of_the_model_does_it_where_the_server_is_too_old(tokenizer):
    real = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    with TGIServer(model_id=str(tokenizer), sha=None, chat_tokenize=False, tokenizer=real) as server:
        server.rule = lambda call: generation(call, "fine", tokenizer=real)
        reply = ask_one(TGIOracle(server.url), "hi", system="be brief")
        sent = server.generations[0].body["inputs"]
        assert messages_in(sent) == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        assert sent.endswith("<|im_start|>assistant\n")
        assert reply.prompt_tokens == len(server.read_by_model(server.generations[0]))


def test_a_tokenizer_can_be_named(server, tokenizer):
    oracle = TGIOracle(server.url, str(tokenizer))
    assert ask_one(oracle, "hi").finish_reason == "stop"
    assert not [call for call in server.calls if call.path == "/chat_tokenize"]
    assert oracle.name == "org/teacher"  # whose template it is does not change who answers


def test_the_command_line_names_it_with_oracle_model(server, tokenizer):
    oracle = load_oracle(f"tgi:{server.url}", model=str(tokenizer), concurrency=2, timeout=None, pause_after=True)
    assert ask_one(oracle).finish_reason == "stop"
    assert oracle.concurrency == 2


@pytest.mark.parametrize("model_id", ["org/teacher", "/data/model", "/repository"])
def test_a_model_whose_template_can_not_be_had_is_advice(model_id, monkeypatch):
    with TGIServer(model_id=model_id, chat_tokenize=False) as server:
        files = server.url + "/{repo_id}/resolve/{revision}/{filename}"  # a Hub that has none of them
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        for module in ("constants", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", files, raising=False)
        with pytest.raises(OracleError, match="chat template") as raised:
            TGIOracle(server.url)
        check_is_advice(raised.value, server.url, model_id, "--oracle-model", "/v1")


def test_a_model_without_a_template_is_advice(tmp_path):
    folder = save_tokenizer(tmp_path / "base", None)
    with TGIServer(model_id=str(folder), sha=None, chat_tokenize=False) as server:
        with pytest.raises(OracleError, match="no chat template") as raised:
            TGIOracle(server.url)
        check_is_advice(raised.value, server.url, "--oracle-model")


def test_a_base_model_whose_server_has_no_template_is_advice(tmp_path):
    folder = save_tokenizer(tmp_path / "base", None)
    with TGIServer(model_id=str(folder), sha=None) as server:
        refusal = tgi_error(422, "Template error: template not found", "template_error")
        server.routes["POST", "/chat_tokenize"] = lambda call: refusal
        with pytest.raises(OracleError, match="no chat template"):
            TGIOracle(server.url)


def test_a_template_without_a_system_role_gets_it_at_the_head_of_the_first_turn_by_the_server():
    with TGIServer(refused_roles=("system",)) as server:
        oracle = TGIOracle(server.url)
        ask_one(oracle, "with it", system="be brief")
        assert messages_in(server.generations[0].body["inputs"]) == [
            {"role": "user", "content": "be brief\n\nwith it"}
        ]


def test_a_template_without_a_system_role_gets_it_at_the_head_of_the_first_turn_by_the_tokenizer(server, tmp_path):
    oracle = TGIOracle(server.url, str(save_tokenizer(tmp_path / "gemma", ABOUT_SYSTEM + CHAT_TEMPLATE)))
    ask_one(oracle, "with it", system="be brief")
    assert messages_in(server.generations[0].body["inputs"]) == [{"role": "user", "content": "be brief\n\nwith it"}]


def test_a_template_that_refuses_some_messages_fails_their_row():
    with TGIServer() as server:
        oracle = TGIOracle(server.url)
        server.refused_roles = ("system",)
        assert ask_one(oracle, "without it").finish_reason == "stop"
        with pytest.raises(RowFailedError, match="system role not supported"):
            ask_one(oracle, "with it", system="be brief")


def test_the_model_reads_one_bos_and_no_two():
    """TGI's tokenizer prepends one to every text, also to a text in which the template has written it out."""
    with TGIServer(bos="<s>") as server:
        ask_one(TGIOracle(server.url))
        assert server.read_by_model(server.generations[0])[:3] == ["<s>", "<|im_start|>", "user"]


def test_the_model_reads_one_bos_where_a_tokenizer_applied_the_template(tmp_path):
    folder = save_tokenizer(tmp_path / "llama", CHAT_TEMPLATE, "llama")  # it prepends one, as that of Llama 3
    real = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with TGIServer(model_id=str(folder), sha=None, chat_tokenize=False, tokenizer=real) as server:
        server.rule = lambda call: generation(call, "fine", tokenizer=real)
        ask_one(TGIOracle(server.url))
        assert server.read_by_model(server.generations[0]).count("<|begin_of_text|>") == 1


def test_room_is_left_for_all_that_the_model_reads():
    with TGIServer(bos="<s>", context=100) as server:
        reply = ask_one(TGIOracle(server.url))
        assert parameters(server)["max_new_tokens"] + len(server.read_by_model(server.generations[0])) == 100
        assert reply.finish_reason == "stop"


# What the server is.


def test_the_identity_is_the_endpoint_the_model_and_its_revision_and_no_transport_setting(server, tokenizer):
    plain = TGIOracle(server.url)
    other = TGIOracle(server.url + "/", str(tokenizer), api_key="sk", concurrency=3, timeout=1.0)
    expected = {"kind": "tgi", "url": server.url, "model": "org/teacher", "revision": "0123abc"}
    assert plain.identity == other.identity == expected
    assert plain.name == "org/teacher"
    assert plain.spec == other.spec == f"tgi:{server.url}"
    assert isinstance(plain, Oracle)


def test_a_server_that_is_no_tgi_is_advice(client):
    with OracleServer() as server:
        with pytest.raises(OracleError, match="no TGI answers there") as raised:
            TGIOracle(server.url)
        check_is_advice(raised.value, server.url, "HTTP 404", "Check the URL")


@pytest.mark.parametrize("body", [b"<html>hello</html>", [], {"model": "x"}, "null", {"error": "loading"}], ids=repr)
def test_an_info_of_another_shape_is_advice(server, body):
    server.routes["GET", "/info"] = lambda call: Answer(body=body)
    with pytest.raises(OracleError, match="no TGI answers there") as raised:
        TGIOracle(server.url)
    check_is_advice(raised.value, server.url)


@pytest.mark.parametrize("cut", ["before", "middle"])
def test_a_server_that_drops_what_is_asked_first_is_advice(server, cut):
    server.routes["GET", "/info"] = lambda call: Answer(body={"model_id": "x"}, cut=cut)
    with pytest.raises(OracleError) as raised:
        TGIOracle(server.url)
    check_is_advice(raised.value, server.url)


@pytest.mark.parametrize("fault", ["500", "503", "reset", "reset-middle", "not-json", "truncated-json"])
def test_a_server_that_can_not_apply_its_template_is_advice(server, fault):
    answer = {"not-json": Answer(body="<html>"), "truncated-json": Answer(body='{"templated_text": "x')}
    answer |= {"500": error(500), "503": error(503)}
    answer |= {"reset": Answer(body={}, cut="before"), "reset-middle": Answer(body={"a": "b"}, cut="middle")}
    server.routes["POST", "/chat_tokenize"] = lambda call: answer[fault]
    with pytest.raises(OracleError, match="chat template") as raised:
        TGIOracle(server.url)
    check_is_advice(raised.value, server.url)


def test_a_server_that_applies_its_template_in_another_shape_is_advice(server):
    server.routes["POST", "/chat_tokenize"] = lambda call: Answer(body={"text": "x"})
    with pytest.raises(OracleError) as raised:
        TGIOracle(server.url)
    check_is_advice(raised.value, server.url)


def test_a_server_that_is_down_is_advice(server):
    server.stop()
    with pytest.raises(OracleError, match="Is the server running") as raised:
        TGIOracle(server.url)
    check_is_advice(raised.value, server.url)


@pytest.mark.parametrize("url", ["", "localhost:8080", "http://", "http://127.0.0.1:99999", "ftp://host"])
def test_a_url_that_is_none_is_advice(url):
    with pytest.raises(OracleError, match="oracle") as raised:
        load_oracle(f"tgi:{url}")
    check_is_advice(raised.value)


def check_is_advice(raised: Exception, *said: str) -> None:
    assert "\n" not in str(raised)
    assert str(raised).startswith("oracle")
    for words in said:
        assert words in str(raised)


# What fails.


def test_what_tgi_finds_invalid_fails_that_row_only_and_at_once(server, journal):
    server.rule = lambda call: invalid(call) if "bad" in call.body["inputs"] else None
    oracle = ask_patiently(server, journal, request("good"), request("bad"), request("also good"))
    good, bad, also_good = oracle.replies
    assert (good.finish_reason, also_good.finish_reason) == ("stop", "stop")
    assert isinstance(bad, RowFailedError)
    assert "must have less than 4095 tokens" in str(bad)
    assert len(server.generations) == 3


def invalid(call: Call) -> Answer:
    return tgi_error(*TGI_ERRORS["validation"], "validation")


def test_a_request_that_tgi_can_not_read_fails_that_row_only(server):
    plain = {"Content-Type": "text/plain; charset=utf-8"}
    server.rule = lambda call: Answer(422, "Failed to deserialize the JSON body into the target type", plain)
    with pytest.raises(RowFailedError, match="HTTP 422"):
        ask_one(TGIOracle(server.url))


@pytest.mark.parametrize(("kind", "throttled"), [("overloaded", True), ("generation", False)])
def test_errors_of_tgi_that_may_pass_say_whether_it_has_too_much_to_do(server, kind, throttled):
    server.rule = lambda call: tgi_error(*TGI_ERRORS[kind], kind)
    with pytest.raises(PassingError, match=TGI_ERRORS[kind][1].split(":")[0]) as raised:
        ask_one(TGIOracle(server.url))
    assert raised.value.throttled is throttled


@pytest.mark.parametrize("status", [429, 503])
def test_a_proxy_that_has_too_much_to_do_is_heard(server, status):
    server.rule = lambda call: Answer(status, {"error": "too busy"})
    with pytest.raises(PassingError) as raised:
        ask_one(TGIOracle(server.url))
    assert raised.value.throttled


@pytest.mark.parametrize(
    "refusal",
    [tgi_error(429, "Model is overloaded", "overloaded", {"Retry-After": "7"}), error(429, retry_after=7)],
    ids=["tgi", "proxy"],
)
def test_a_wait_that_is_asked_for_is_heard(server, refusal):
    server.rule = lambda call: refusal
    with pytest.raises(PassingError) as raised:
        ask_one(TGIOracle(server.url))
    assert raised.value.retry_after == 7


PASSING: dict[str, Answer] = {
    **{kind: tgi_error(*TGI_ERRORS[kind], kind) for kind in ("overloaded", "generation", "incomplete_generation")},
    "proxy-429": Answer(429, {"error": "too many requests"}),
    "proxy-502": Answer(502, "<html>bad gateway</html>", {"Content-Type": "text/html"}),
    "proxy-503": Answer(503, {"error": "503 Service Unavailable"}),
    "proxy-504": Answer(504, {"message": "took too long"}),
    "proxy-500": Answer(500, ""),
    "not-json": Answer(body="<html>upstream is asleep</html>"),
    "html": Answer(body="<html>upstream is asleep</html>", headers={"Content-Type": "text/html"}),
    "truncated-json": Answer(body='{"generated_text": "abc'),
    "not-utf-8": Answer(body=b'{"generated_text": "\xff"}'),
    "reset": Answer(body={}, cut="before"),
    "reset-middle": Answer(body={"generated_text": "some words"}, cut="middle"),
}


def test_what_may_pass_is_tried_again_through_the_journal(server, journal):
    names = {chat_ml(request(name).messages): name for name in PASSING}
    server.rule = lambda call: PASSING.get(names.get(call.body["inputs"])) if call.attempt == 1 else None
    oracle = ask_patiently(server, journal, *map(request, PASSING))
    outcomes = dict(zip(PASSING, (getattr(r, "finish_reason", r) for r in oracle.replies), strict=True))
    assert outcomes == dict.fromkeys(PASSING, "stop")
    assert [reply.attempts for reply in oracle.replies] == [2] * len(PASSING)
    canaries = [call for call in server.generations if call.body["inputs"] not in names]
    assert len(server.generations) - len(canaries) == 2 * len(PASSING)
    assert len(canaries) <= 1  # so many failures in a row ask for an explanation
    assert oracle.spent.failed_calls == len(PASSING)


def test_a_row_fails_with_the_words_of_the_server_when_the_last_attempt_does(server, journal):
    server.rule = lambda call: tgi_error(*TGI_ERRORS["generation"], "generation")
    (reply,) = ask_patiently(server, journal, attempts=2).replies
    assert isinstance(reply, RowFailedError)
    assert "GenerationError" in str(reply)
    assert "attempt 2 of 2" in str(reply)


LAYOUTS = {
    "empty": lambda status: Answer(status, headers={"Content-Type": ""}),  # TGI with --api-key
    "html": lambda status: Answer(status, "<html>no</html>", {"Content-Type": "text/html"}),
    "error": lambda status: Answer(status, {"error": "no"}),  # Hugging Face's proxies
    "message": lambda status: Answer(status, {"message": "no"}),
    "openai": lambda status: error(status, "no"),
    "text": lambda status: Answer(status, '"no"'),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("status", "advice"), [(401, "HF_REFLECT_API_KEY"), (403, "access"), (404, "Check the URL")])
def test_what_will_not_go_away_stops_the_run_with_advice(server, status, advice, layout):
    server.rule = lambda call: LAYOUTS[layout](status)
    with pytest.raises(OracleError, match=f"HTTP {status}") as raised:
        ask_one(TGIOracle(server.url))
    check_is_advice(raised.value, f"tgi:{server.url}", advice)


def test_a_run_that_will_not_succeed_is_stopped_at_the_first_call(server, journal):
    server.rule = lambda call: LAYOUTS["error"](401)
    (reply,) = ask_patiently(server, journal).replies
    assert isinstance(reply, OracleError)
    assert len(server.generations) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_at_the_first_question_is_advice(server, status):
    server.routes["GET", "/info"] = lambda call: error(status, "who are you?")
    with pytest.raises(OracleError, match=f"HTTP {status}") as raised:
        TGIOracle(server.url)
    check_is_advice(raised.value, server.url)


def test_a_reply_that_does_not_come_in_time_may_pass(server):
    server.rule = FAULTS["hang"]
    with pytest.raises(PassingError, match="no reply in time"):
        ask_one(TGIOracle(server.url, timeout=0.3))


def test_a_template_that_does_not_come_in_time_may_pass(server):
    oracle = TGIOracle(server.url, timeout=0.3)
    server.routes["POST", "/chat_tokenize"] = FAULTS["hang"]

    async def impatiently():
        return await asyncio.wait_for(oracle.complete(request()), 5)

    with pytest.raises(PassingError, match="no reply in time"):
        background.run(impatiently())


def test_a_server_that_is_gone_may_come_back(server):
    oracle = TGIOracle(server.url)
    server.stop()
    with pytest.raises(PassingError, match="no connection") as raised:
        ask_one(oracle)
    assert "Is the server running" in raised.value.advice


@pytest.mark.parametrize("status", [404, 405, 422, 429, 500, 503])
def test_a_template_that_fails_later_is_one_of_the_failures_that_a_call_can_have(server, status):
    oracle = TGIOracle(server.url)
    server.routes["POST", "/chat_tokenize"] = lambda call: tgi_error(status, "not now", "template_error")
    (outcome,) = ask(oracle)
    assert isinstance(outcome, PassingError | RowFailedError | OracleError), repr(outcome)


@pytest.mark.parametrize("body", [{}, [], None, "text", {"templated_text": "x"}, {"tokenize_response": []}], ids=repr)
def test_a_template_of_another_shape_is_one_of_the_failures_that_a_call_can_have(server, body):
    oracle = TGIOracle(server.url)
    server.routes["POST", "/chat_tokenize"] = lambda call: Answer(body=json.dumps(body))
    (outcome,) = ask(oracle)
    assert isinstance(outcome, PassingError | RowFailedError | OracleError), repr(outcome)


DETAILS = {"finish_reason": "eos_token", "generated_tokens": 2, "prefill": [], "tokens": [], "seed": None}
SHAPES = {
    "nothing": {},
    "list": [],
    "list-of-lists": [[]],
    "null": None,
    "text": "a string",
    "number": 7,
    "error": {"error": "no"},
    "no-details": {"generated_text": "x"},
    "null-details": {"generated_text": "x", "details": None},
    "empty-details": {"generated_text": "x", "details": {}},
    "list-of-details": {"generated_text": "x", "details": []},
    "no-text": {"details": DETAILS},
    "null-text": {"generated_text": None, "details": DETAILS},
    "number-as-text": {"generated_text": 7, "details": DETAILS},
    "list-as-text": {"generated_text": ["x"], "details": DETAILS},
    "null-reason": {"generated_text": "x", "details": {**DETAILS, "finish_reason": None}},
    "object-as-reason": {"generated_text": "x", "details": {**DETAILS, "finish_reason": {"a": 1}}},
    "null-tokens": {"generated_text": "x", "details": {**DETAILS, "generated_tokens": None}},
    "text-as-tokens": {"generated_text": "x", "details": {**DETAILS, "generated_tokens": "many"}},
}


@pytest.mark.parametrize("listed", [False, True], ids=["alone", "listed"])
@pytest.mark.parametrize("body", SHAPES.values(), ids=SHAPES)
def test_a_generation_of_another_shape_is_a_failure_or_a_reply_that_holds_what_a_reply_holds(server, body, listed):
    server.rule = lambda call: Answer(body=json.dumps([body] if listed else body))
    (outcome,) = ask(TGIOracle(server.url))
    if isinstance(outcome, Reply):
        assert isinstance(outcome.text, str)
        assert isinstance(outcome.finish_reason, str | None)
        assert isinstance(outcome.prompt_tokens, int | None)
        assert isinstance(outcome.completion_tokens, int | None)
    else:
        assert isinstance(outcome, PassingError | RowFailedError | OracleError), repr(outcome)


def test_half_a_surrogate_pair_is_replaced(server):
    server.rule = lambda call: generation(call, "half a pair: \ud83d")
    assert ask_one(TGIOracle(server.url)).text == "half a pair: ?"


def test_an_empty_reply_is_a_reply(server):
    server.rule = lambda call: generation(call, "")
    assert ask_one(TGIOracle(server.url)).text == ""


# Secrets.


def test_the_key_is_sent_with_everything_as_bearer_token(server, monkeypatch):
    monkeypatch.setenv("HF_REFLECT_API_KEY", SECRET)
    server.api_key = SECRET
    assert ask_one(TGIOracle(server.url)).finish_reason == "stop"
    assert {call.headers.get("authorization") for call in server.calls} == {f"Bearer {SECRET}"}


@pytest.mark.parametrize("key", [None, "sk-wrong"])
def test_a_server_with_a_key_refuses_another_with_advice(server, key):
    server.api_key = SECRET
    with pytest.raises(OracleError, match="HTTP 401") as raised:
        ask_one(TGIOracle(server.url, api_key=key))
    check_is_advice(raised.value, "HF_REFLECT_API_KEY")


def test_a_foreign_host_never_sees_the_hugging_face_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    ask_one(TGIOracle(server.url))
    assert len(server.calls) >= 4
    assert SECRET not in str([call.headers for call in server.calls])


def test_user_and_password_of_the_url_are_used_and_never_shown(server):
    oracle = TGIOracle(server.url.replace("http://", "http://user:pass-word@"))
    ask_one(oracle)
    assert {call.headers["authorization"] for call in server.calls} == {"Basic dXNlcjpwYXNzLXdvcmQ="}
    shown = [oracle.spec, oracle.url, str(oracle.identity)]
    for status in (400, 401, 404, 500):
        server.rule = lambda call, status=status: LAYOUTS["error"](status)
        shown += map(str, ask(oracle))
    server.stop()
    shown += map(str, ask(oracle))
    assert "pass-word" not in "\n".join(shown)


ECHOES = {
    **{
        str(status): lambda text, status=status: Answer(status, {"error": text})
        for status in (400, 401, 403, 404, 500)
    },
    **{kind: lambda text, kind=kind: tgi_error(TGI_ERRORS[kind][0], text, kind) for kind in TGI_ERRORS},
    "429-plain": lambda text: Answer(429, text, {"Content-Type": "text/plain"}),
}


PADDINGS = [0, *range(220, 310, 5)]
"""Characters before the key: a message that is cut off may end anywhere within it."""


@pytest.mark.parametrize("echo", ECHOES)
def test_a_key_that_a_server_echoes_reaches_no_message_and_no_log(server, caplog, echo):
    caplog.set_level(logging.DEBUG)
    oracle = TGIOracle(server.url, api_key=SECRET)
    padding = {chat_ml(request(str(n)).messages): n for n in PADDINGS}
    server.rule = lambda call: ECHOES[echo]("x" * padding[call.body["inputs"]] + call.headers["authorization"])
    outcomes = ask(oracle, *(request(str(n)) for n in PADDINGS))
    advice = (getattr(outcome, "advice", "") for outcome in outcomes)
    check_is_hidden(*map(str, outcomes), *advice, oracle.spec, str(oracle.identity), caplog.text)


@pytest.mark.parametrize("route", [("GET", "/info"), ("POST", "/chat_tokenize")])
@pytest.mark.parametrize("status", [401, 500])
def test_a_key_echoed_before_the_first_call_reaches_no_message_either(server, caplog, route, status):
    caplog.set_level(logging.DEBUG)
    said = []
    for padding in PADDINGS:
        server.routes[route] = lambda call, n=padding: Answer(status, "x" * n + call.headers["authorization"])
        with pytest.raises(OracleError) as raised:
            TGIOracle(server.url, api_key=SECRET)
        said.append(str(raised.value))
    check_is_hidden(*said, caplog.text)


def check_is_hidden(*texts: str) -> None:
    """Not even a good part of the key is there."""
    assert [line for text in texts for line in text.splitlines() if SECRET[:8] in line] == []


def test_a_call_that_succeeds_logs_no_key(server, caplog):
    caplog.set_level(logging.DEBUG)
    ask_one(TGIOracle(server.url, api_key=SECRET))
    assert caplog.records  # the level is low enough to see something
    check_is_hidden(caplog.text, *(str(vars(record)) for record in caplog.records))


def test_a_pickle_holds_no_key(server, journal):
    transform = ReflectInstruction(f"tgi:{server.url}", journal=journal, api_key=SECRET)
    assert b"hf_marked" not in pickle.dumps(transform)


# Runs.


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    """Six rows from a file, so with cache files of their own."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in alpaca()))
    return load_dataset("json", data_files=str(file), split="train")


def statuses(ds: Dataset, phase: str = "instruction") -> set[str]:
    return {reflection["status"] for (reflection,) in ds[f"{phase}_reflections"]}


@pytest.mark.parametrize("style", ["paper", "json", "staged"])
def test_a_whole_run(rows, server, student, journal, style):
    dataset, reflections = recycle(
        rows, oracle=f"tgi:{server.url}", student=student, prompts=style, journal=journal, progress=False
    )
    assert (dataset.num_rows, reflections.num_rows) == (6, 6)
    assert statuses(reflections) | statuses(reflections, "response") <= {"ok", "unchanged"}
    assert {one["oracle"] for (one,) in reflections["instruction_reflections"]} == {"org/teacher"}
    grammars = [
        parameters["grammar"]
        for parameters in (c.body["parameters"] for c in server.generations)
        if parameters.get("grammar")
    ]
    assert len(grammars) == (len(server.generations) if style == "json" else 0)


def test_a_run_again_asks_nothing(rows, server, journal):
    for _ in range(2):
        recycled = recycle(
            rows, oracle=f"tgi:{server.url}", student=None, method="reflect", journal=journal, progress=False
        )
    assert recycled.summary.spent.calls == 0
    assert len(server.generations) == 12


def test_a_run_counts_what_the_server_counts(rows, server, journal):
    recycled = recycle(
        rows, oracle=f"tgi:{server.url}", student=None, method="reflect", journal=journal, progress=False
    )
    read = sum(len(server.read_by_model(call)) for call in server.generations)
    assert recycled.summary.spent.prompt_tokens == read


@pytest.mark.parametrize("as_object", [False, True])
def test_two_processes_give_the_same_rows_in_order(rows, server, journal, tmp_path, as_object):
    alone = rows.map(ReflectInstruction(f"tgi:{server.url}", journal=journal), batched=True)
    oracle = TGIOracle(server.url) if as_object else f"tgi:{server.url}"
    transform = ReflectInstruction(oracle, journal=tmp_path / "other")
    both = rows.map(transform, batched=True, num_proc=2, load_from_cache_file=False)
    assert both.to_list() == alone.to_list()
    assert statuses(both) <= {"ok", "unchanged"}


def test_two_processes_use_the_template_of_the_tokenizer(rows, server, journal, tokenizer):
    transform = ReflectInstruction(f"tgi:{server.url}", journal=journal, model=str(tokenizer))
    both = rows.map(transform, batched=True, num_proc=2)
    assert statuses(both) <= {"ok", "unchanged"}
    assert not [call for call in server.calls if call.path == "/chat_tokenize"]


def test_a_stream_gives_the_same_rows(rows, server, journal):
    ds, stream = rows, rows.to_iterable_dataset()
    oracle = f"tgi:{server.url}"
    for transform in (
        ReflectInstruction(oracle, journal=journal),
        SelectInstruction("reflect"),
        ReflectResponse(oracle, journal=journal),
        SelectResponse("reflect"),
    ):
        ds, stream = ds.map(transform, batched=True), stream.map(transform, batched=True)
    assert json.dumps(list(stream), sort_keys=True) == json.dumps(ds.to_list(), sort_keys=True)


def test_it_works_inside_a_running_event_loop(rows, server, journal):
    async def notebook_cell():
        return rows.map(ReflectInstruction(f"tgi:{server.url}", journal=journal), batched=True)

    assert statuses(asyncio.run(notebook_cell())) <= {"ok", "unchanged"}
    assert len(server.generations) == 6


def test_rows_that_tgi_finds_invalid_stay_as_they_were(rows, server, journal):
    server.rule = lambda call: invalid(call) if "Say hello" in call.body["inputs"] else None
    dataset, reflections = recycle(
        rows, oracle=f"tgi:{server.url}", student=None, method="reflect", journal=journal, progress=False
    )
    failed = [row["row_id"] for row in reflections if row["instruction_reflections"][0]["status"] == "failed"]
    assert failed == [3]
    assert dataset[3]["instruction"] == "Say hello. (3)"
    assert dataset[3]["recycled"] == "original"


def test_a_template_without_a_system_role_is_no_traceback(rows, journal):
    with TGIServer(refused_roles=("system",)) as server:
        try:
            _, reflections = recycle(
                rows, oracle=f"tgi:{server.url}", student=None, method="reflect", journal=journal, progress=False
            )
        except OracleError as raised:
            check_is_advice(raised, "system role")
        else:
            assert reflections.num_rows == 6


# The command line.


LASTING = {
    "down": lambda server: server.stop(),
    "no TGI": lambda server: server.routes.pop(("GET", "/info")),
    "no template": lambda server: (
        server.routes.pop(("POST", "/chat_tokenize")),
        setattr(server, "model_id", "/data/model"),
    ),
    "key refused": lambda server: setattr(server, "api_key", SECRET),
    "key refused by a proxy": lambda server: setattr(server, "rule", lambda call: LAYOUTS["error"](401)),
    "forbidden": lambda server: setattr(server, "rule", lambda call: LAYOUTS["error"](403)),
    "not found": lambda server: setattr(server, "rule", lambda call: LAYOUTS["error"](404)),
}


@pytest.fixture
def command(rows, tmp_path, monkeypatch):
    """Runs `hf-reflect recycle` in this process, where a client can be hidden; gives the exit code."""

    def run(*words: object) -> int:
        out, journal = tmp_path / "out", tmp_path / "journal"
        given = ["recycle", tmp_path / "rows.jsonl", out, "--journal", journal, "--method", "reflect"]
        monkeypatch.setattr(sys, "argv", ["hf-reflect", *map(str, [*given, "--student", "none", *words])])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0

    return run


@pytest.mark.parametrize("what", LASTING)
def test_an_error_that_lasts_is_one_line_of_advice_and_exit_code_1(command, server, capfd, what):
    LASTING[what](server)
    assert command("--oracle", f"tgi:{server.url}", "--patience", "2") == 1
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: oracle")
    assert server.url in said[0]


def test_a_run_by_command_line_succeeds_quietly(command, server, capfd):
    assert command("--oracle", f"tgi:{server.url}", "--prompts", "json") == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "rows" in said.out


def test_a_process_of_its_own_uses_the_installed_client_and_leaves_nothing_on_stderr(server, rows, tmp_path, client):
    if client != CLIENTS[-1]:
        pytest.skip("another process can't be made to use this client")
    words = ["recycle", tmp_path / "rows.jsonl", tmp_path / "out", "--oracle", f"tgi:{server.url}"]
    words += ["--method", "reflect", "--student", "none", "--journal", tmp_path / "journal"]
    executable = Path(sys.executable).parent / "hf-reflect"
    done = subprocess.run([executable, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert {call.path for call in server.generations} == {"/" if client == "text_generation" else "/generate"}
    assert SECRET not in done.stdout


# The server, held against the clients that are not ours.


def test_the_server_speaks_the_protocol_that_its_clients_read(server):
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import GenerationError, IncompleteGenerationError, OverloadedError, ValidationError

    plain = InferenceClient(server.url, token="unused")
    server.rule = lambda call: generation(call, "one two three")
    assert plain.text_generation("hi", return_full_text=False) == "one two three"
    assert plain.text_generation("hi ", return_full_text=True) == "hi one two three"
    assert plain.text_generation("hi ") == "hi one two three"  # so does `/` of a model for text generation
    last = list(plain.text_generation("hi", stream=True, details=True))[-1]
    assert (last.generated_text, last.details.finish_reason) == ("one two three", "eos_token")
    stopped = plain.text_generation("hi", details=True, return_full_text=False, stop=["two"])
    assert (stopped.generated_text, stopped.details.finish_reason) == ("one two", "stop_sequence")
    errors = [ValidationError, OverloadedError, GenerationError, IncompleteGenerationError]
    for (kind, said), kind_of_error in zip(TGI_ERRORS.items(), errors, strict=True):
        server.rule = lambda call, kind=kind, said=said: tgi_error(*said, kind)
        with pytest.raises(kind_of_error):
            plain.text_generation("hi")


def test_the_server_refuses_what_tgi_refuses(server):
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import ValidationError

    plain = InferenceClient(server.url, token="unused")
    for refused in ({"temperature": 0.0}, {"top_p": 1.0}, {"max_new_tokens": 0}, {"max_new_tokens": 5000}):
        with pytest.raises(ValidationError, match="Input validation error"):
            plain.text_generation("hi", **refused)
    with pytest.raises(ValidationError, match="'properties'"):
        plain.text_generation("hi", grammar={"type": "json", "value": {"type": "object"}})
    with pytest.raises(ValidationError, match="cannot be empty"):
        plain.text_generation("")
