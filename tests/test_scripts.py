"""The dataset scripts: what their headers say, and that they do locally what they say."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from datasets import load_dataset
from hub_server import Hub
from oracle_server import OracleServer
from tiny import save_tiny_model


FOLDER = Path(__file__).parent.parent / "dataset_scripts"
SCRIPTS = sorted(FOLDER.glob("*.py"))
JOBS_KEYS = {"image", "flavor", "python", "timeout", "name", "namespace", "network_group", "env", "secrets", "labels"}
ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i} and {i}."} for i in range(12)]


def header(script: Path) -> dict:
    """The metadata of a script, as PEP 723 has it."""
    found = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", script.read_text())
    lines = found["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def run(script: str, *words: object, env: dict | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / f"{script}.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env or dict(os.environ), check=False)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_what_it_needs_and_how_it_is_run(script):
    said = header(script)
    assert said["dependencies"] == ["hf-reflect"]
    assert set(said["tool"]["hf-jobs"]) <= JOBS_KEYS
    doc = ast.get_docstring(ast.parse(script.read_text()))
    assert "hf jobs uv run --secrets HF_TOKEN" in doc
    assert f"/raw/main/{script.name}" in doc
    assert f"python {script.name} " in doc


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_holds_no_logic_of_its_own(script):
    statements = ast.parse(script.read_text()).body
    assert [type(statement).__name__ for statement in statements] == ["Expr", "ImportFrom", "If"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_without_two_datasets_it_says_how_it_is_used(script):
    done = run(script.stem, "--limit", "3")
    assert done.returncode == 1
    assert f"usage: {script.name} INPUT OUTPUT" in done.stderr


def test_no_file_makes_datasets_take_the_folder_for_a_loading_script():
    assert not (FOLDER / "dataset_scripts.py").exists()
    assert "uv-script" in (FOLDER / "README.md").read_text().split("---")[1]


def test_they_recycle_push_and_select_again(data, tmp_path):
    student, other = save_tiny_model(tmp_path / "one"), save_tiny_model(tmp_path / "two", "gpt2", seed=3)
    with Hub(tmp_path / "hub") as hub, OracleServer() as server:
        env = {**os.environ, **hub.env(tmp_path / "home", "hf_alice")}
        asked = ["--oracle", server.url, "--student", student]
        for script, name in (("recycle_alpaca", "alice/recycled"), ("recycle_wizardlm", "alice/again")):
            done = run(script, data, name, *asked, env=env)
            assert done.returncode == 0, done.stderr
            assert {"data", "reflections"} <= {path.split("/")[0] for path in hub.repo(name).files("main")}
        calls = len(server.completions)
        done = run("reselect", "alice/recycled", "alice/other", "--student", other, env=env)
        assert done.returncode == 0, done.stderr
        done = run("score_ifd", data, "alice/scored", "--student", student, env=env)
        assert done.returncode == 0, done.stderr
        assert "recipe.yaml" in hub.repo("alice/scored").files("main")
        assert len(server.completions) == calls
        repeated = run("score_ifd", data, "alice/scored", "--student", student, env=env)
        assert "no new commit" in repeated.stdout


def test_an_output_that_is_a_path_stays_here(data, tmp_path):
    out = tmp_path / "scored"
    done = run("score_ifd", data, out, "--student", save_tiny_model(tmp_path / "one"), "--journal", tmp_path / "j")
    assert done.returncode == 0, done.stderr
    assert load_dataset(str(out), split="train").num_rows == len(ROWS)
