"""The command line, run as a person runs it: processes, exit codes and what stands on the terminal."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from oracle_server import FAULTS, OracleServer, completion, error
from test_transforms import alpaca
from typer.testing import CliRunner, Result

from hf_reflect import __version__, recycle
from hf_reflect.cli import app
from hf_reflect.errors import HfReflectError, StudentError


COMMAND = str(Path(sys.executable).parent / "hf-reflect")


def run(*words: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [COMMAND, *map(str, words)], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def invoke(*words: object) -> Result:
    """The command in this process: quicker, and an error is still an exception."""
    return CliRunner().invoke(app, [str(word) for word in words])


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


COMMANDS = ["recycle", "estimate", "reselect", "score", "select", "show", "journal", "demo"]
NESTED = [["journal", "info"], ["journal", "export"], ["journal", "prune"]]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), *NESTED], ids=" ".join)
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
    assert {path.name for path in (work / "out").iterdir()} == {
        "README.md", "recipe.yaml", "data", "reflections", "pictures",
    }  # fmt: skip
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
    done = invoke("recycle", source, work / "out", *words)
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


def test_a_server_that_does_not_recover_ends_the_run_and_is_gone_on_with_when_it_has(source, work, options, server):
    late = replace(error(503, retry_after=0), delay=0.2)  # so that the answers before it have arrived
    server.rule = lambda call: late if call.number > 3 else None
    hasty = ["--patience", "0", "--attempts", "2"]
    done = run("recycle", source, work / "out", *options, *hasty)
    check_is_one_line_of_advice(done, "HTTP 503", "nothing but failures", "Run the same command again")
    assert not list(work.iterdir())
    answered, server.rule = {call.digest for call in server.completions[:3]}, None
    before = len(server.completions)
    assert run("recycle", source, work / "out", *options, *hasty).returncode == 0
    assert not answered & {call.digest for call in server.completions[before:]}


def test_a_server_that_asks_for_more_patience_than_there_is_ends_the_run_at_once(source, work, options, server):
    server.rule = lambda call: error(429, "come back tomorrow", retry_after=86_400)
    done = run("recycle", source, work / "out", *options, "--patience", "60")
    check_is_one_line_of_advice(done, "HTTP 429", "come back tomorrow", "86400 seconds")
    assert not list(work.iterdir())


def test_calls_that_failed_and_were_made_again_are_counted(source, work, options, server):
    server.rule = lambda call: error(503, retry_after=0) if call.number in (2, 5) else None
    done = run("recycle", source, work / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "calls that failed" in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("calls that failed")]
    assert line.split()[-1] == "2"


def test_a_reply_that_was_cut_off_is_asked_for_again_if_the_command_says_so(source, work, options, server):
    server.rule = lambda call: FAULTS["length"](call) if call.body["max_tokens"] == 50 else None
    words = [*options, "--max-tokens", "50"]
    once = run("recycle", source, work / "once", *words)
    assert {call.body["max_tokens"] for call in server.completions} == {50}
    twice = run("recycle", source, work / "twice", *words, "--retry-truncated", "900")
    assert twice.returncode == 0, twice.stderr
    assert "truncated" in once.stdout
    assert "truncated" not in twice.stdout
    again = run("recycle", source, work / "again", "--config", work / "twice", "--journal", options[-1])
    assert again.returncode == 0, again.stderr
    hashes = [yaml.safe_load((work / name / "recipe.yaml").read_text())["hash"] for name in ("once", "twice", "again")]
    assert hashes[0] != hashes[1] == hashes[2]


def test_a_model_may_stand_behind_the_url(source, work, options, server):
    server.models = ("alpha", "beta")
    url = options[1]
    words = ["--oracle", f"{url}#beta", *options[2:]]
    assert run("recycle", source, work / "out", *words).returncode == 0
    assert {call.body["model"] for call in server.completions} == {"beta"}
    check_is_one_line_of_advice(run("recycle", source, work / "o", "--oracle", f"{url}#gamma", *options[2:]), "gamma")


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


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("guards", "just text"),
        ("guards", {"names": ["fancy"]}),
        ("guards", {"names": "language"}),
        ("guards", {"names": ["length"], "longest": "much"}),
        ("guards", {"names": ["length"], "shortest": 3}),
        ("retry_truncated", "often"),
        ("oracles", []),
        ("oracles", ["local"]),
    ],
)
def test_a_recipe_with_a_part_that_makes_no_sense(source, work, tmp_path, options, part, value):
    file = recipe_of_a_run(source, tmp_path / "made", options, **{part: value})
    done = invoke("recycle", source, work / "out", "--config", file, "--journal", options[-1])
    assert isinstance(done.exception, HfReflectError), done.output
    assert not list(work.iterdir())


def test_a_recipe_whose_oracle_was_an_object_says_to_name_one(source, work, tmp_path, options):
    file = recipe_of_a_run(source, tmp_path / "made", options)
    [oracle] = yaml.safe_load(file.read_text())["oracles"]
    file = recipe_of_a_run(source, tmp_path / "made", options, oracles=[{**oracle, "spec": None}])
    words = ["recycle", source, work / "out", "--config", file, "--journal", options[-1]]
    assert invoke(*words, "--oracle", options[1]).exit_code == 0
    done = invoke(*words, "--overwrite")
    assert isinstance(done.exception, HfReflectError), done.exception
    assert "--oracle" in str(done.exception)


def recipe_of_a_run(source: Path, out: Path, options: list[str], **changes: object) -> Path:
    """A recipe as a run wrote it, but for some changes."""
    done = invoke("recycle", source, out, *options)
    assert done.exit_code == 0, (done.output, done.exception)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    file = out.with_name("changed.yaml")
    file.write_text(yaml.safe_dump({**recipe, **changes}))
    return file


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
    instruction = f"[New Instruction]\nask {new}\n[End]\n" if first_phase else ""
    return completion(call, f"{HOSTILE}\n{instruction}[New Response]\nsay {new}\n[End]")


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
