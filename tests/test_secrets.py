"""A key appears in nothing that a run writes or says, however it was given and whatever the server echoes."""

import logging
import os
import subprocess
import sys

import pytest
from oracle_server import Answer, OracleServer, completion, error

from hf_reflect import Limits, ReflectResponse, recycle
from hf_reflect.errors import HfReflectError


KEY = "hf_MarkedSecretThatMustNotAppear"
USER = "marked-user:marked-password"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"instruction": "Say {i}.", "output": "It is {i}."}}\n' for i in range(6)))
    return path


def check_nothing_shows(folder, *said):
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    for text in (*said, *(file.read_bytes().decode("latin-1") for file in files)):
        for secret in (KEY, "marked-password", "bWFya2VkLXVzZXI6bWFya2VkLXBhc3N3b3Jk"):
            assert secret not in text


def echo(call):
    """A server that repeats what it was sent, in its errors."""
    return error(400, f"you sent {dict(call.headers)}")


@pytest.mark.parametrize("how", ["variable", "url"])
@pytest.mark.parametrize("fate", ["well", "row fails", "all fail", "stopped"])
def test_the_command_line_shows_no_key(how, fate, rows, tmp_path, server):
    rules = {
        "row fails": lambda call: echo(call) if call.number % 3 == 0 else completion(call),
        "all fail": lambda call: error(503, str(dict(call.headers))),
        "stopped": lambda call: error(401, str(dict(call.headers))),
    }
    server.rule = rules.get(fate)
    url = server.url.replace("//", f"//{USER}@") if how == "url" else server.url
    command = [
        sys.executable,
        "-c",
        "import logging; logging.basicConfig(level=10)\nfrom hf_reflect.cli import main; main()",
    ]
    command += ["recycle", str(rows), str(tmp_path / "made" / "out"), "--oracle", url, "--student", "none"]
    command += ["--method", "reflect", "--journal", str(tmp_path / "made" / "journal"), "--patience", "0.5"]
    key = {"HF_REFLECT_API_KEY": KEY} if how == "variable" else {}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **key}, check=False)
    assert done.returncode == (0 if fate in ("well", "row fails") else 1), done.stderr
    sent = [call.headers["authorization"] for call in server.completions]
    assert set(sent) == {f"Bearer {KEY}" if how == "variable" else "Basic bWFya2VkLXVzZXI6bWFya2VkLXBhc3N3b3Jk"}
    check_nothing_shows(tmp_path / "made", done.stdout, done.stderr)


@pytest.mark.parametrize("text", [KEY, f"my key is {KEY}"])
def test_what_a_server_says_of_the_key_is_blanked_in_a_row_that_failed(text, rows, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with OracleServer(lambda call: error(422, text)) as server:
        options = {"oracle_options": {"api_key": KEY}, "student": None, "method": "reflect", "progress": False}
        made = tmp_path / "made"
        recycled = recycle(rows, made / "out", oracle=server.url, journal=made / "journal", **options)
    (reason,) = set(recycled.reflections["train"][0]["instruction_reflections"][0]["reason"].splitlines())
    assert "***" in reason
    check_nothing_shows(made, caplog.text)


def test_a_transform_that_is_pickled_or_hashed_takes_no_key_along(rows, tmp_path):
    import dill

    with OracleServer() as server:
        transform = ReflectResponse(server.url, api_key=KEY, journal=tmp_path / "j", limits=Limits(rpm=1000))
        assert KEY.encode() not in dill.dumps(transform)
        assert KEY not in repr(transform.identity) + repr(transform.arguments) + repr(transform.teachers)


def test_an_error_shows_no_key(rows):
    options = {"oracle_options": {"api_key": KEY}, "student": None, "method": "reflect", "progress": False}
    with OracleServer(lambda call: Answer(403, {"error": f"{KEY} has no rights"})) as server:
        with pytest.raises(HfReflectError, match="no rights") as caught:
            recycle(rows, oracle=server.url, **options)
        assert KEY not in str(caught.value)
