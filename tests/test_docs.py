"""What README, the guide and the help say can be done can be done: commands, options, names and links exist.

That Sphinx builds the guide without a warning is checked by CI.
"""

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token

import hf_reflect
from hf_reflect.cli import app


ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
API = DOCS / "api.md"

COMMAND = "hf-reflect"
SHELL = ("sh", "bash", "console", "")
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|exception|data):: ([\w.]+)", re.MULTILINE)


class Said(NamedTuple):
    """Something that a text says, and where."""

    where: str
    text: str


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))


def where(page: Path, token: Token) -> str:
    return f"{page.relative_to(ROOT)}:{token.map[0] + 1 if token.map else '?'}"


def blocks(page: Path, *languages: str) -> Iterator[Said]:
    """The blocks of code in these languages; one that is indented has none."""
    for token in tokens(page):
        if token.type in ("fence", "code_block") and token.info.strip() in languages:
            yield Said(where(page, token), token.content)


def spans(page: Path) -> Iterator[Said]:
    """The code within lines."""
    for token in tokens(page):
        for child in token.children or ():
            if child.type == "code_inline":
                yield Said(where(page, token), child.content)


def links(page: Path) -> Iterator[Said]:
    for token in tokens(page):
        for child in token.children or ():
            if target := child.attrGet("href") or child.attrGet("src"):
                yield Said(where(page, token), str(target))


def command_lines(text: str) -> Iterator[str]:
    """The lines of a shell script that call our command."""
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(rf"\s*{COMMAND}\s", line):
            yield line.strip()


def words_of(line: str) -> list[str]:
    """The arguments that our command gets."""
    words = shlex.split(line, comments=True)[1:]
    ends = [i for i, word in enumerate(words) if re.fullmatch(r"\d?>+|[|;&]+", word)]
    return words[: ends[0]] if ends else words


MAIN: Any = typer.main.get_command(app)


def found_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words call, and what it is given."""
    command, rest = MAIN, list(words)
    while rest and (subcommands := getattr(command, "commands", None)) and not rest[0].startswith("-"):
        assert rest[0] in subcommands, f"there is no command {rest[0]!r}; there are {', '.join(subcommands)}"
        command = subcommands[rest.pop(0)]
    return command, rest


def all_commands(command: Any = MAIN, name: str = COMMAND) -> Iterator[tuple[str, Any]]:
    yield name, command
    for subname, subcommand in getattr(command, "commands", {}).items():
        yield from all_commands(subcommand, f"{name} {subname}")


def options_of(command: Any) -> set[str]:
    declared = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return declared | {"--help", "-h"}


ALL_OPTIONS = {option for _, command in all_commands() for option in options_of(command)}


def check_runs(line: str) -> None:
    """Command, options, their values and the number of arguments are such as the command takes."""
    command, given = found_command(words_of(line))
    unknown = {word.partition("=")[0] for word in given if word.startswith("--")} - options_of(command)
    assert not unknown, f"{line}: {command.name} has no {', '.join(sorted(unknown))}"
    if {"--help", "-h", "--version"} & set(given):
        return
    try:
        command.make_context(command.name, given)  # parses, and runs nothing
    except Exception as error:
        message = getattr(error, "message", None)
        if message is None:
            raise
        pytest.fail(f"{line}: {message}")


IN_BLOCKS = [Said(at, line) for page in PAGES for at, text in blocks(page, *SHELL) for line in command_lines(text)]
IN_SPANS = [said for page in PAGES for said in spans(page) if said.text.startswith(f"{COMMAND} ")]
IN_HELP = [
    Said(name, line)
    for name, command in all_commands()
    for line in command_lines(inspect.cleandoc(command.help or ""))
]


def ids(said: list[Said]) -> list[str]:
    return [f"{one.where} {one.text}" for one in said]


def test_the_guide_has_pages_and_they_have_commands():
    assert len(PAGES) > 5
    assert {said.where.partition(":")[0] for said in IN_BLOCKS} >= {"README.md", "docs/quickstart.md"}
    assert IN_HELP


@pytest.mark.parametrize("said", IN_BLOCKS + IN_HELP, ids=ids(IN_BLOCKS + IN_HELP))
def test_a_command_line_is_one_that_the_command_takes(said):
    check_runs(said.text)


@pytest.mark.parametrize("said", IN_SPANS, ids=ids(IN_SPANS))
def test_a_command_in_a_sentence_exists(said):
    command, given = found_command([word for word in words_of(said.text) if word != "..."])
    assert {word.strip("[]") for word in given if word.startswith(("--", "[--"))} <= options_of(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_option_in_a_sentence_exists(page):
    written = [said for said in spans(page) if said.text.startswith("--")]
    unknown = [said for said in written if set(re.findall(r"--[\w-]+", said.text)) - ALL_OPTIONS]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_script_that_is_called_is_there(page):
    for at, text in blocks(page, *SHELL):
        for script in re.findall(r"^python ([\w/.-]+\.py)", text, re.MULTILINE):
            assert (ROOT / script).is_file(), f"{at}: {script}"


def test_a_command_line_with_a_mistake_is_found():
    for wrong in (
        "hf-reflect recyle data.jsonl out",
        "hf-reflect recycle data.jsonl out --no-such-option",
        "hf-reflect recycle data.jsonl out --keep everything",
        "hf-reflect recycle data.jsonl",
        "hf-reflect journal inform",
        "hf-reflect select data.jsonl out --count many",
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check_runs(wrong)
    check_runs("hf-reflect journal export replies.jsonl --kind=reply > log  # and so on")


def test_every_public_name_is_in_the_reference():
    written = set(DIRECTIVE.findall(API.read_text("utf-8")))
    assert {f"hf_reflect.{name}" for name in hf_reflect.__all__} <= written


def test_the_reference_names_only_what_exists():
    for path in DIRECTIVE.findall(API.read_text("utf-8")):
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module), name), path


PYTHON = [said for page in PAGES for said in blocks(page, "python", "py")]


@pytest.mark.parametrize("said", PYTHON, ids=[said.where for said in PYTHON])
def test_a_block_of_python_uses_what_there_is(said):
    tree = ast.parse(said.text)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_reflect":
            module = import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"
                known[name.asname or name.name] = getattr(module, name.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_reflect":
            assert node.attr in hf_reflect.__all__, f"hf_reflect has no public {node.attr}"
            known[f"hf_reflect.{node.attr}"] = getattr(hf_reflect, node.attr)
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and (function := known.get(ast.unparse(call.func))) is not None:
            check_call(function, call)


def check_call(function: Any, call: ast.Call) -> None:
    """The arguments are such as the function takes."""
    try:
        signature = inspect.signature(function)
        signature.bind(*call.args, **{keyword.arg: None for keyword in call.keywords if keyword.arg})
    except TypeError as error:
        pytest.fail(f"{ast.unparse(call)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    for at, target in links(page):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc or not parts.path:
            continue
        assert (page.parent / unquote(parts.path)).exists(), f"{at}: {target}"


def test_every_page_is_in_the_table_of_contents():
    index = tokens(DOCS / "index.md")
    listed = [
        line.strip()
        for token in index
        if token.type == "fence" and token.info == "{toctree}"
        for line in token.content.splitlines()
        if line.strip() and not line.startswith(":")
    ]
    assert sorted(listed) == sorted(page.stem for page in PAGES if page.parent == DOCS and page.stem != "index")
