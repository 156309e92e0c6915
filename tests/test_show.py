"""Looking at rows: which are shown, in what order, with what colours, and how the terminal is kept safe."""

import os
import pty
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from test_cards import NASTY, NOTHING, reflection, row, score
from test_describe import CONTROL, RISKS, invoke, unreadable, written
from test_extras import SCHEMA
from typer.testing import CliRunner

from hf_reflect.cli import app, output
from hf_reflect.errors import HfReflectError


COMMAND = str(Path(sys.executable).parent / "hf-reflect")
SORTS = ("ifd", "ifd_original", "ifd_gain", "rifd", "rifd_original", "rifd_gain")
OURS = re.compile(r"\x1b\[(?:0|1|31|32|33)m")


def any_score(rng: random.Random) -> dict | None:
    if rng.random() < 0.15:
        return None
    value = None if rng.random() < 0.15 else rng.uniform(0, 3)
    return {**score(1, 1), "value": value}


def audit(rng: random.Random, ids: list[int]) -> list[dict]:
    made = []
    for i in ids:
        one = row(i, rng.random() < 0.5, rng.random() < 0.5)
        one["original"] |= {"ifd": any_score(rng), "rifd": any_score(rng)}
        one["ifd_score"], one["rifd_score"] = any_score(rng), any_score(rng)
        one["original"]["instruction"] = f"ask {i}"
        if rng.random() < 0.2:
            one["response_reflections"].append(reflection("refused"))
        if rng.random() < 0.2:
            one["instruction_reflections"] = [reflection("unchanged")]
        made.append(unreadable(i) if rng.random() < 0.1 else one)
    return made


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    rng = random.Random(7)
    return {"test": audit(rng, list(range(5, 30, 3))), "train": audit(rng, list(range(0, 60, 2)))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, splits) -> Path:
    return written(tmp_path_factory.mktemp("several"), splits, group=4)


@pytest.fixture(scope="module")
def single(tmp_path_factory, splits) -> Path:
    return written(tmp_path_factory.mktemp("single"), {"train": splits["train"]})


def shown(*words: object) -> list[tuple[str, int]]:
    """The rows that the command prints, in order."""
    done = invoke("show", *words)
    assert done.exit_code == 0, (done.output, done.exception)
    found = re.findall(r"^(?:(\w+) )?row (\d+): \w+$", done.stdout, re.MULTILINE)
    return [(split, int(number)) for split, number in found]


def rows_of(splits: dict[str, list[dict]]) -> list[tuple[str, dict]]:
    """All rows in the order of the splits."""
    return [(split, one) for split in ("train", "test") for one in splits[split]]


def named(rows: list[tuple[str, dict]]) -> list[tuple[str, int]]:
    return [(split, one["row_id"]) for split, one in rows]


# Which rows


def test_without_a_number_it_is_the_first_that_changed(folder, splits):
    first = next(one["row_id"] for one in splits["train"] if one["recycled"] != "original")
    assert shown(folder) == [("train", first)]
    first = next(one["row_id"] for one in splits["test"] if one["recycled"] != "original")
    assert shown(folder, "--split", "test") == [("test", first)]


def test_where_nothing_changed_it_is_the_first(tmp_path):
    assert shown(written(tmp_path, {"train": [unreadable(3), row(4)]})) == [("", 3)]


def test_a_row_is_found_by_its_number_in_whichever_split_has_it(folder):
    assert shown(folder, "--row", 58) == [("train", 58)]
    assert shown(folder, "--row", 5) == [("test", 5)]
    assert shown(folder, "--row", 8) == [("train", 8)]  # both have it
    assert shown(folder, "--row", 8, "--split", "test") == [("test", 8)]


def test_of_a_single_split_the_name_is_not_said(single):
    assert shown(single, "--row", 2) == [("", 2)]


@pytest.mark.parametrize("words", [["--row", 7], ["--row", 999, "--split", "train"]])
def test_a_row_that_is_not_there(folder, words):
    done = invoke("show", folder, *words)
    assert isinstance(done.exception, HfReflectError)
    assert f"no row {words[1]}" in str(done.exception)


def test_a_split_that_is_not_there_says_which_are(folder):
    done = invoke("show", folder, "--split", "dev")
    assert isinstance(done.exception, HfReflectError)
    assert "'dev'" in str(done.exception)
    assert "train, test" in str(done.exception)


def decisions(one: dict) -> set[str]:
    return {one[f"{phase}_decision"]["reason"] for phase in ("instruction", "response")}


def statuses(one: dict) -> set[str]:
    return {each["status"] for phase in ("instruction", "response") for each in one[f"{phase}_reflections"]}


@pytest.mark.parametrize("decision", ["higher_ifd", "not_higher_ifd", "lower_rifd", "not_lower_rifd", "no_rewrite"])
def test_all_rows_of_a_decision_in_either_phase(folder, splits, decision):
    expected = named([(split, one) for split, one in rows_of(splits) if decision in decisions(one)])
    assert expected
    assert shown(folder, "--decision", decision) == expected
    assert shown(folder, "--decision", decision, "--limit", 2) == expected[:2]
    assert shown(folder, "--decision", decision, "--split", "test") == [one for one in expected if one[0] == "test"]


@pytest.mark.parametrize("status", ["ok", "unchanged", "refused", "skipped"])
def test_all_rows_with_a_reflection_of_a_status(folder, splits, status):
    expected = named([(split, one) for split, one in rows_of(splits) if status in statuses(one)])
    assert expected
    assert shown(folder, "--status", status) == expected


def test_all_that_is_asked_for_must_hold(folder, splits):
    expected = [
        (split, one)
        for split, one in rows_of(splits)
        if "lower_rifd" in decisions(one) and "refused" in statuses(one) and one["original"]
    ]
    assert len(expected) > 1
    words = ["--decision", "lower_rifd", "--status", "refused"]
    assert shown(folder, *words) == named(expected)
    one = expected[-1]
    assert (one[0], one[1]["row_id"]) in shown(folder, *words, "--row", one[1]["row_id"])
    assert {number for _, number in shown(folder, *words, "--row", one[1]["row_id"])} == {one[1]["row_id"]}


@pytest.mark.parametrize("words", [["--decision", "nonsense"], ["--status", "nonsense"]])
def test_where_no_row_is_like_that_it_is_said_what_there_is(folder, splits, words):
    done = invoke("show", folder, *words)
    assert isinstance(done.exception, HfReflectError)
    for name in {name for _, one in rows_of(splits) for name in decisions(one) | statuses(one)}:
        assert name in str(done.exception)
    assert "\n" not in str(done.exception)


# In what order


def key(one: dict, sort: str) -> float | None:
    measure = sort.split("_")[0]
    before = one["original"] and one["original"][measure] and one["original"][measure]["value"]
    after = one[f"{measure}_score"] and one[f"{measure}_score"]["value"]
    if sort.endswith("original"):
        return before
    if sort.endswith("gain"):
        return None if before is None or after is None else after - before
    return after


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("sort", SORTS)
def test_rows_in_order_of_a_score_and_those_without_it_last(folder, splits, sort, ascending):
    rows = rows_of(splits)
    scored = [(key(one, sort), split, one["row_id"]) for split, one in rows if key(one, sort) is not None]
    assert 5 < len(scored) < len(rows)
    scored.sort(reverse=not ascending)
    expected = [(split, number) for _, split, number in scored]
    expected += named([(split, one) for split, one in rows if key(one, sort) is None])
    words = ["--sort", sort, *(["--ascending"] if ascending else [])]
    assert shown(folder, *words) == expected
    assert shown(folder, *words, "--limit", 3) == expected[:3]
    assert shown(folder, *words, "--split", "test") == [one for one in expected if one[0] == "test"]


def test_an_order_that_is_none_is_refused(folder):
    done = invoke("show", folder, "--sort", "beauty")
    assert done.exit_code == 2
    assert "ifd_gain" in done.output


# What of a row


def pair(made: dict, split: str = "") -> str:
    """A row as it is printed, with colours, with all columns that a file has."""
    return output.pair(pa.Table.from_pylist([made], SCHEMA).to_pylist()[0], split)


def test_a_row_is_shown_before_and_after_with_what_was_said_and_decided():
    one = row(
        7, True, True,
        original={
            "instruction": "Say it.", "input": "now", "response": "It.", "ifd": score(1, 4), "rifd": score(1, 2),
        },
        on_instruction=reflection(
            instruction="Say it well.", response="It, well.", critique="Dull.", oracle="teacher", ifd=score(1, 2),
            rifd=score(3, 4),
        ),
        on_response=reflection(response="It, very well.", critique="Short.", oracle="other", rifd=score(1, 4)),
    )  # fmt: skip
    blocks = [
        "row 7: both",
        "instruction\nSay it.",
        "instruction, recycled\nSay it well.",
        "input\nnow",
        "input, recycled\n",
        "response\nIt.",
        "response, recycled\nIt, very well.",
        "reflection on the instruction by teacher: ok\nDull.",
        "IFD: before 0.250, rewrite 0.500\nkept: rewrite, higher_ifd",
        "reflection on the response by other: ok\nShort.",
        "r-IFD: before 0.750, rewrite 0.250\nkept: rewrite, lower_rifd",
    ]
    assert plain(pair(one)) == "\n\n".join(blocks)


def test_what_did_not_change_is_shown_once_and_an_empty_input_not_at_all():
    text = plain(pair(row(1, original={"instruction": "Say it.", "response": "It."}, **NOTHING)))
    assert text.count("Say it.") == 1
    assert "recycled" not in text
    assert "input" not in text
    assert "IFD" not in text


def test_a_row_that_could_not_be_read_says_why():
    assert plain(pair(unreadable(4), "train ")) == (
        "train row 4: original\n\nno pair could be read: no text in 'output'"
    )


def test_a_long_text_is_cut_and_its_length_said():
    text = plain(pair(row(0, original={"response": "x" * 5000}, **NOTHING)))
    assert "(5000 characters in all)" in text
    assert "x" * 2001 not in text


def test_rows_that_could_not_be_read_are_shown_among_the_others(tmp_path):
    rows = [row(0), unreadable(1), row(2, ifd=score(1, 2))]
    done = invoke("show", written(tmp_path, {"train": rows}), "--sort", "ifd")
    assert re.findall(r"^row (\d)", done.stdout, re.MULTILINE) == ["2", "0", "1"]
    assert done.stdout.count("─" * 80) == 2
    assert "no pair could be read" in done.stdout


# Colours


def plain(text: str) -> str:
    return OURS.sub("", text)


def painted(block: str) -> tuple[str, str]:
    """What of a text is coloured, and what is not."""
    coloured = "".join(re.findall(r"\x1b\[3[12]m(.*?)\x1b\[0m", block, re.DOTALL))
    return coloured, plain(re.sub(r"\x1b\[3[12]m.*?\x1b\[0m", "", block, flags=re.DOTALL))


def texts(before: str, after: str) -> tuple[str, str]:
    """The blocks of a response before and after, with their colours."""
    one = row(0, False, True, original={"response": before}, on_response=reflection(response=after))
    found = [block for block in pair(one).split("\n\n") if plain(block).startswith("response")]
    return tuple(block.split("\n", 1)[1] for block in found)


@pytest.mark.parametrize(
    ("before", "after", "gone", "new"),
    [
        ("The sky is blue.", "The sky is very blue.", "", "very "),
        ("The sky is blue.", "The sea is blue.", "sky", "sea"),
        ("one two three", "one three", "two ", ""),
        ("all", "other", "all", "other"),
        ("", "new", "", "new"),
    ],
)
def test_just_the_words_that_differ_are_coloured(before, after, gone, new):
    old, recycled = texts(before, after)
    assert "\x1b[32m" not in old
    assert "\x1b[31m" not in recycled
    # Of two blanks around a word that is gone either may be coloured.
    assert painted(old)[0].strip() == gone.strip()
    assert painted(recycled)[0].strip() == new.strip()


@pytest.mark.parametrize("seed", range(20))
def test_without_the_coloured_words_both_texts_are_the_same(seed):
    rng = random.Random(seed)
    before = " ".join(rng.choices("abcdefg", k=rng.randint(1, 30)))
    words = [word for word in before.split() if rng.random() < 0.8]
    for _ in range(rng.randint(1, 5)):
        words.insert(rng.randint(0, len(words)), rng.choice("vwxyz"))
    after = " ".join(words)
    old, new = texts(before, after)
    assert (plain(old), plain(new)) == (before, after)
    assert painted(old)[1] == painted(new)[1]
    assert set("vwxyz") & set(after) <= set(painted(new)[0])
    assert not set("vwxyz") & set(painted(new)[1])


def test_what_goes_into_a_pipe_has_no_colours(folder):
    assert "\x1b" in pair(row(0, True))
    for words in ([], ["--sort", "ifd"]):
        assert "\x1b" not in invoke("show", folder, *words).stdout


# Text of others


@pytest.mark.parametrize("kind", RISKS)
def test_text_of_others_never_steers_the_terminal(tmp_path, kind):
    evil = NASTY[kind] + "\x1b]0;title\x07\x9b2J\u202e"
    said = {"reason": evil, "critique": evil, "oracle": evil}
    one = row(
        0, True, True,
        original={"instruction": evil, "input": evil, "response": evil},
        on_instruction={**reflection("ok", evil + "1", evil + "2", **said), "status": evil},
        on_response=reflection("ok", evil + "3", **said),
        reasons={"instruction": evil, "response": evil},
    )  # fmt: skip
    one["instruction_decision"]["kept"] = one["recycled"] = evil
    other = {**unreadable(1), "instruction_reflections": [reflection("skipped", reason=evil)]}
    folder = written(tmp_path, {"train": [one, other]})
    for words in (["--row", 0], ["--sort", "ifd"], ["--status", evil], ["--decision", evil]):
        done = CliRunner().invoke(app, ["show", str(folder), *map(str, words)], color=True)
        assert done.exit_code == 0, (done.output, done.exception)
        assert OURS.search(done.stdout)
        assert not CONTROL.search(plain(done.stdout))


def test_a_row_that_could_not_be_read_may_say_nothing():
    """No run leaves the reason out; the schema of the file allows it."""
    one = {**unreadable(0), "instruction_reflections": [reflection("skipped")]}
    assert "no pair could be read" in pair(one)


def test_an_error_that_names_what_there_is_never_steers_the_terminal(tmp_path):
    evil = "\x1b]0;title\x07\x1b[31m\u202e"
    folder = written(tmp_path, {"train": [row(0, reasons={"instruction": evil})]})
    words = [COMMAND, "show", str(folder), "--decision", "nonsense"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "title" in done.stderr
    assert not CONTROL.search(done.stderr)


# On a terminal


def on_a_terminal(tmp_path: Path, *words: object) -> str:
    """What a command shows a person; their pager says that it was there."""
    pager = tmp_path / "pager"
    pager.write_text("#!/bin/sh\necho PAGED\nexec cat\n")
    pager.chmod(0o755)
    ours, theirs = pty.openpty()
    read: list[bytes] = []

    def reader() -> None:
        try:
            while data := os.read(ours, 65536):
                read.append(data)
        except OSError:  # the other side is closed
            return

    environment = {**os.environ, "PAGER": str(pager), "TERM": "xterm"}
    process = subprocess.Popen(
        [COMMAND, *map(str, words)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    thread = threading.Thread(target=reader)
    thread.start()
    assert process.wait(60) == 0
    thread.join(10)
    os.close(ours)
    return b"".join(read).decode().replace("\r\n", "\n")


def test_several_rows_go_through_the_pager(tmp_path, folder, splits):
    text = on_a_terminal(tmp_path, "show", folder, "--sort", "ifd_original")
    assert text.startswith("PAGED\n")
    assert len(re.findall(r"row \d+: ", text)) == len(rows_of(splits))


def test_a_single_row_does_not_and_is_coloured(tmp_path, folder):
    text = on_a_terminal(tmp_path, "show", folder)
    assert "PAGED" not in text
    assert "\x1b[32m" in text
    assert len(re.findall(r"row \d+: ", text)) == 1


def test_a_row_that_the_result_leaves_out_says_so(tmp_path):
    folder = written(tmp_path, {"train": [row(0), row(1, False, True)]}, keep="reflected")
    assert invoke("show", folder, "--row", 0).stdout.startswith("row 0: original, left out\n")
    assert invoke("show", folder, "--row", 1).stdout.startswith("row 1: response\n")


def test_the_last_line_says_the_scores_in_the_end_and_how_they_changed(tmp_path):
    truncated = {**score(1, 2), "value": None, "status": "truncated"}
    one = row(0, True, True, original={"ifd": score(1, 4), "rifd": truncated}, ifd=score(3, 4), rifd=score(1, 2))
    shown = invoke("show", written(tmp_path, {"train": [one]})).stdout.splitlines()
    assert shown[-1] == "in the end: IFD 0.750 (+0.500), r-IFD 0.500"


def test_a_score_that_there_is_none_of_says_why(tmp_path):
    truncated = {**score(1, 2), "value": None, "status": "truncated"}
    one = row(0, on_response=reflection(rifd=truncated), original={"rifd": score(1, 4)}, ifd=score(3, 4))
    assert "r-IFD: before 0.250, rewrite – (truncated)" in invoke("show", written(tmp_path, {"train": [one]})).stdout


def test_earlier_turns_are_shown(tmp_path):
    context = [{"role": "user", "content": "Name a moon."}, {"role": "assistant", "content": "Io."}]
    shown = invoke("show", written(tmp_path, {"train": [row(0, original={"context": context})]})).stdout
    assert "earlier turn of user\nName a moon.\n\nearlier turn of assistant\nIo.\n\ninstruction\n" in shown


def test_an_order_needs_something_to_go_by(folder):
    assert "--sort" in str(invoke("show", folder, "--ascending").exception)


def test_a_limit_alone_shows_the_first_rows(folder, splits):
    shown = re.findall(r"^(?:test|train) row (\d+):", invoke("show", folder, "--limit", 3).stdout, re.MULTILINE)
    assert shown == [str(one["row_id"]) for one in splits["train"][:3]]


@pytest.mark.parametrize("command", ["show", "stats", "report", "card"])
def test_a_folder_of_another_command_is_told_apart(tmp_path, command):
    from hf_reflect.recipe import TaskRecipe

    (tmp_path / "recipe.yaml").write_text(TaskRecipe("score", {"source": {}}, "0").to_yaml(), "utf-8")
    assert "was written by `score`" in str(invoke(command, tmp_path).exception)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("words", [["stats", "--json"], ["stats"], ["show", "--limit", "3"]])
def test_where_the_output_does_not_fit_one_line_says_so(tmp_path, words):
    folder = written(tmp_path, {"train": [row(i, True, True) for i in range(3)]})
    command, *options = words
    with open("/dev/full", "w") as full:
        done = subprocess.run([COMMAND, command, folder, *options], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the output can't be written: no space left on device.\n"
