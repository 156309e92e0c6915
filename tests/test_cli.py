"""The command line, run as a person runs it: processes, exit codes and what stands on the terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from oracle_server import FAULTS, OracleServer, completion
from test_transforms import alpaca
from typer.testing import CliRunner

from hf_reflect import __version__, recycle
from hf_reflect.cli import app
from hf_reflect.errors import StudentError


COMMAND = str(Path(sys.executable).parent / "hf-reflect")


def run(*words: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [COMMAND, *map(str, words)], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in alpaca(8)))
    return file


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty folder for the output, so that whatever is left behind is seen."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def options(server, tmp_path: Path) -> list[str]:
    """A run without a student, which is a run without torch."""
    journal = str(tmp_path / "journal")
    return ["--oracle", server.url, "--method", "reflect", "--student", "none", "--journal", journal]


def check_is_one_line_of_advice(done: subprocess.CompletedProcess, *said: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr
    for words in said:
        assert words in lines[0]


def test_the_version_is_that_of_the_package():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"hf-reflect {__version__}\n")


@pytest.mark.parametrize("command", [[], ["recycle"], ["show"], ["demo"]])
def test_every_command_explains_itself_without_heavy_imports(command):
    script = (
        "import sys; sys.argv = ['hf-reflect', *sys.argv[1:]]\n"
        "from hf_reflect.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_a_run_says_what_came_of_it_and_where_it_is(source, work, options):
    done = run("recycle", source, work / "out", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"written to {work / 'out'}" in done.stdout
    assert {path.name for path in (work / "out").iterdir()} == {"README.md", "recipe.yaml", "data", "reflections"}
    assert [path.name for path in work.iterdir()] == ["out"]


def test_a_source_that_is_not_there(work, options):
    done = run("recycle", work / "no.jsonl", work / "out", *options)
    check_is_one_line_of_advice(done, "no.jsonl", "no such file")
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    "content",
    ['{"question": "a", "answer": "b"}\n', "", "{not json\n", '{"instruction": "a", "output": "b", "ifd": 1}\n'],
)
def test_a_source_that_can_not_be_recycled(work, tmp_path, options, content):
    file = tmp_path / "odd.jsonl"
    file.write_text(content)
    check_is_one_line_of_advice(run("recycle", file, work / "out", *options))
    assert not list(work.iterdir())


def test_a_split_that_is_not_there(source, work, options):
    done = run("recycle", source, work / "out", *options, "--split", "test")
    check_is_one_line_of_advice(done, "no split 'test'", "train")


@pytest.mark.parametrize("student", ["/no/such/folder", "model.gguf", "a folder"])
def test_a_student_that_is_not_there(source, work, server, tmp_path, student):
    words = ["--oracle", server.url, "--journal", tmp_path / "journal", "--student", student]
    check_is_one_line_of_advice(run("recycle", source, work / "out", *words), "student", student)
    assert not list(work.iterdir())
    assert not server.completions  # nothing is paid before that is known


def test_a_student_that_the_hub_does_not_have(source, work, server, tmp_path):
    hub = server.url.removesuffix("/v1")  # it answers 404 to whatever it doesn't know
    words = ["--oracle", server.url, "--journal", tmp_path / "journal", "--student", "org/model"]
    done = run("recycle", source, work / "out", *words, HF_ENDPOINT=hub)
    check_is_one_line_of_advice(done, "student org/model")
    assert any("org/model" in call.path for call in server.calls)
    assert not list(work.iterdir())
    assert not server.completions


def test_a_student_folder_without_a_model(source, work, server, tmp_path):
    (tmp_path / "empty").mkdir()
    words = ["--oracle", server.url, "--journal", tmp_path / "journal", "--student", tmp_path / "empty"]
    done = CliRunner().invoke(app, ["recycle", str(source), str(work / "out"), *map(str, words)])
    assert isinstance(done.exception, StudentError)
    assert "\n" not in str(done.exception)
    assert not list(work.iterdir())
    assert not server.completions


def test_a_server_that_is_down(source, work, options, server):
    server.stop()
    check_is_one_line_of_advice(run("recycle", source, work / "out", *options), server.url, "Is the server running")
    assert not list(work.iterdir())


def test_a_server_that_goes_down_while_it_is_asked(source, work, options, server):
    server.rule = lambda call: FAULTS["403"](call) if call.number > 3 else None
    check_is_one_line_of_advice(run("recycle", source, work / "out", *options), server.url, "HTTP 403")
    assert not list(work.iterdir())


def test_a_wrong_model_name(source, work, options):
    done = run("recycle", source, work / "out", *options, "--oracle-model", "gpt-none")
    check_is_one_line_of_advice(done, "gpt-none", "teacher")
    assert not list(work.iterdir())


def test_an_oracle_that_is_none(source, work, options):
    check_is_one_line_of_advice(run("recycle", source, work / "out", *options, "--oracle", "ftp://x"), "ftp://x")


@pytest.mark.parametrize("where", ["file/out", "/proc/out"])
def test_a_folder_that_can_not_be_written(source, work, tmp_path, options, where):
    (tmp_path / "file").write_text("a file")
    done = run("recycle", source, tmp_path / where, *options)
    check_is_one_line_of_advice(done, str(tmp_path / where), "can't be written")


def test_a_folder_of_somebody_else_is_left_alone(source, work, options, server):
    (work / "notes.txt").write_text("mine")
    check_is_one_line_of_advice(run("recycle", source, work, *options, "--overwrite"), str(work), "left alone")
    assert [path.name for path in work.iterdir()] == ["notes.txt"]
    assert [path.name for path in work.parent.iterdir() if path.name.startswith(".")] == []
    assert not server.completions


def test_the_result_of_another_recipe_is_kept_unless_told_otherwise(source, work, options):
    assert run("recycle", source, work / "out", *options).returncode == 0
    before = (work / "out" / "recipe.yaml").read_text()
    other = ["--prompts", "staged"]
    check_is_one_line_of_advice(run("recycle", source, work / "out", *options, *other), "--overwrite")
    assert (work / "out" / "recipe.yaml").read_text() == before
    assert run("recycle", source, work / "out", *options, *other, "--overwrite").returncode == 0
    assert (work / "out" / "recipe.yaml").read_text() != before
    assert [path.name for path in work.iterdir()] == ["out"]


@pytest.mark.parametrize("text", ["", "{unclosed: [", "method: selective"])
def test_a_recipe_that_is_none(source, work, tmp_path, options, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    done = run("recycle", source, work / "out", *options, "--config", file)
    check_is_one_line_of_advice(done, str(file))


def test_prompts_that_are_none(source, work, options):
    done = run("recycle", source, work / "out", *options, "--prompts", "fancy")
    check_is_one_line_of_advice(done, "fancy", "paper")


def test_a_journal_that_is_none(source, work, options, tmp_path):
    (tmp_path / "notes").write_text("these are my notes, not a database " * 100)
    done = run("recycle", source, work / "out", *options, "--journal", tmp_path / "notes")
    check_is_one_line_of_advice(done, "journal", "notes")
    assert not list(work.iterdir())


def test_a_key_in_the_environment_is_in_no_output_and_no_file(source, work, options, server, tmp_path):
    key = "sk-0123456789abcdefghijklmnopqrstuvwxyz"
    good = run("recycle", source, work / "out", *options, HF_REFLECT_API_KEY=key, HF_TOKEN="hf_marked")
    server.rule = lambda call: FAULTS["401"](call)
    bad = run("recycle", source, work / "out2", *options, "--temperature", "1", HF_REFLECT_API_KEY=key)
    assert (good.returncode, bad.returncode) == (0, 1)
    assert {call.headers["authorization"] for call in server.calls} == {f"Bearer {key}"}
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (key, "hf_marked"):
        assert secret not in good.stdout + good.stderr + bad.stdout + bad.stderr
        assert secret.encode() not in written


# show

HOSTILE = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \u202eorder \r overwritten \x00"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result whose every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [{"instruction": f"{i} {HOSTILE}", "input": HOSTILE, "output": HOSTILE} for i in range(6)]
    with OracleServer() as server:
        server.rule = lambda call: _hostile_reply(call) if not call.user.count("### Instruction\n0 ") else None
        options = {"student": None, "method": "reflect", "progress": False}
        recycle(Dataset.from_list(rows), folder / "out", oracle=server.url, journal=folder / "journal", **options)
    return folder / "out"


def _hostile_reply(call):
    new = f"new {call.digest} {HOSTILE}"  # another one in each phase
    first_phase = "exactly these two blocks" in call.user
    instruction = f"[New Instruction]\n{new}\n[End]\n" if first_phase else ""
    return completion(call, f"{HOSTILE}\n{instruction}[New Response]\n{new}\n[End]")


def test_show_prints_the_first_row_that_changed(result):
    done = run("show", result)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("row ")
    assert "recycled" in done.stdout


def test_show_prints_the_row_that_is_asked_for(result):
    done = run("show", result, "--row", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("row 4: both")
    assert "4 \ufffd[31mred" in done.stdout


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}])
def test_no_control_character_of_the_data_reaches_the_terminal(result, environment):
    shown = run("show", result, "--row", 3, **environment).stdout
    assert "red" in shown
    for character in "\x07\x00\x9b\u202e\r":
        assert character not in shown
    for ours in ("\x1b[0m", "\x1b[1m", "\x1b[32m", "\x1b[33m"):  # the colours of our own titles
        shown = shown.replace(ours, "")
    assert "\x1b" not in shown


@pytest.mark.parametrize(("words", "said"), [(["--row", 99], "no row 99"), (["--split", "test"], "no split 'test'")])
def test_show_says_what_there_is_not(result, words, said):
    check_is_one_line_of_advice(run("show", result, *words), said)


def test_show_on_a_folder_that_is_no_result(tmp_path):
    check_is_one_line_of_advice(run("show", tmp_path), "no result of a run")
    check_is_one_line_of_advice(run("show", tmp_path / "nothing"), "no result of a run")
