"""The embedded oracle: a real small model, in this process and behind llama.cpp's own HTTP server."""

import json

import pytest
from datasets import Dataset

from hf_reflect import ReflectInstruction, ReflectResponse, Sampling, background, load_oracle
from hf_reflect.embedded import embedded_model
from hf_reflect.errors import OracleError
from hf_reflect.oracles import Request, RowFailedError
from hf_reflect.replies import json_schema


pytestmark = pytest.mark.model

QUESTION = ({"role": "user", "content": "Name the capital of France in one short sentence."},)
ROWS = [{"instruction": "Name a fruit.", "output": "Car."}, {"instruction": "What is rain?", "output": "Wet."}]


@pytest.fixture(scope="module")
def oracle():
    return load_oracle("local", concurrency=2)


def ask(oracle, messages=QUESTION, schema=None, **sampling):
    return background.run(oracle.complete(Request(messages, Sampling(**{"max_tokens": 40, **sampling}), schema)))


def test_it_answers_and_counts_its_tokens(oracle):
    reply = ask(oracle)
    assert "Paris" in reply.text
    assert reply.finish_reason == "stop"
    assert reply.prompt_tokens > 9  # the words of the question
    assert 0 < reply.completion_tokens <= 40


def test_the_same_request_has_the_same_reply_whatever_was_asked_in_between(oracle):
    first = ask(oracle)
    ask(oracle, ({"role": "user", "content": "Write a line about rain."},))
    assert ask(oracle) == first


def test_a_reply_that_is_cut_off_says_so(oracle):
    assert ask(oracle, max_tokens=2).finish_reason == "length"


def test_a_schema_is_obeyed(oracle):
    reply = ask(oracle, schema=json_schema("response"), max_tokens=300)
    assert set(json.loads(reply.text)) == {"critique", "already_good", "new_response"}


def test_a_row_that_does_not_fit_fails_alone(oracle):
    with pytest.raises(RowFailedError, match="context"):
        ask(oracle, ({"role": "user", "content": "word " * 9000},))
    assert ask(oracle).text


def test_the_transforms_rewrite_with_it(oracle, tmp_path):
    rows = Dataset.from_list(ROWS)
    for transform, column in (
        (ReflectInstruction, "instruction_reflections"),
        (ReflectResponse, "response_reflections"),
    ):
        rows = rows.map(transform(oracle, sampling=Sampling(max_tokens=160), journal=tmp_path / "j"), batched=True)
        for (reflection,) in rows[column]:
            assert reflection["status"] in ("ok", "unchanged", "truncated", "copied")
            assert reflection["calls"][0]["text"]
    assert any(
        reflection["status"] == "ok"
        for column in ("instruction", "response")
        for (reflection,) in rows[f"{column}_reflections"]
    )


def test_the_chat_oracle_speaks_to_llama_cpp_over_http():
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity, params.ui = str(embedded_model()), 2048, -1, False
    server = xllamacpp.Server(params)
    over_http = load_oracle(f"{server.listening_address}/v1")
    assert "Paris" in ask(over_http).text
    reply = ask(over_http, schema=json_schema("response"), max_tokens=300)
    assert "new_response" in json.loads(reply.text)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(OracleError, match="no file"):
        load_oracle(f"local:{tmp_path / 'none.gguf'}")
    (tmp_path / "odd.gguf").write_text("this is no model")
    with pytest.raises(OracleError, match=r"llama\.cpp"):
        ask(load_oracle(f"local:{tmp_path / 'odd.gguf'}"))
