"""The card: what it says, that it is valid YAML and Markdown, and that no data can make it say anything else."""

import ast
import json
import math
import re
import shlex
import shutil
import unicodedata
from collections.abc import Iterator
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict
from hub_server import LICENSES, validate_card
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from oracle_server import OracleServer, completion
from test_transforms import FORMATS, alpaca
from typer.testing import CliRunner

from hf_reflect import load_student, recycle
from hf_reflect.cards import CardData, cell, render_card
from hf_reflect.cli import app
from hf_reflect.describing import Description
from hf_reflect.errors import HfReflectError, SourceError
from hf_reflect.pairs import recognise
from hf_reflect.prompts import Prompts
from hf_reflect.recipe import Recipe
from hf_reflect.summary import Summary


HOSTILE = {
    "front matter": "---\nlicense: evil\n---",
    "pipes": "a | b || c",
    "backticks": "`code` ```\nfence",
    "html": "<script>alert(1)</script><!-- x",
    "template": "{{ 7 * 7 }}{% for x in y %}{# z #}",
    "markdown": "[click](http://evil) ![x](y) **bold** _em_ # head ~~no~~ $x$",
    "lines": "one\r\n\n# two\n| three |\u2028four",
    "entity": "&lt;b&gt; &#124;",
    "backslash": "C:\\new\\| \\`",
}

NASTY = {
    **HOSTILE,
    "heading": "\n\n# A heading\n\n## Use\n\nand text\n===\n",
    "fences": "\n```\n~~~\n```sh\nrm -rf /\n```\n\n~~~\n",
    "comment": '<!-- hf_reflect {"keys":{},"sections":{}} -->',
    "end of a comment": "--> ]]> ?>",
    "link": "[x]: http://evil\n[x] <http://evil> ![](http://evil/pixel.png)",
    "bibtex": "} }, note = {evil}, title = {\\input{/etc/passwd}}\n}\n@misc{x, y}",
    "shell": "$(touch /tmp/x); `id` && rm 'a' \"b\" # c\n-rf",
    "math": "$$\\frac{1}{2}$$ \\(x\\)",
    "control": "a\x00b\x07c\x1b[31md\x7fe\x08f\x0cg",
    "direction": "abc\u202egnp.exe",
    "long": "x" * 20_000,
    "long lines": "word " * 5_000,
    "empty": "",
    "blank": " \n\t\n ",
    "list": "- a\n- b\n1. c",
    "quote": "> quoted\n> text",
    "table": "| a | b |\n|---|---|\n| 1 | 2 |",
    "emoji": "é 🌙 漢字 👩\u200d👩\u200d👧",
}

FORMATTING = re.compile(r"[\\`*_{}\[\]<>|~$!]|&(?!#\d+;)|(?<!&)#")
"""What Markdown or HTML could read, other than a character reference."""

TEACHER, STUDENT, SOURCE = "teacher", "student", "data/alpaca.json"


def recipe(
    source=SOURCE,
    oracle=TEACHER,
    student=STUDENT,
    prompts="paper",
    method="selective",
    others=(),
    about=None,
    revision=None,
    guards=None,
    keep="all",
    version="0.1.0",
    content="abc",
):
    return Recipe(
        source={"path": source, "content": content, "revision": revision, "split": None, "limit": None},
        method=method,
        keep=keep,
        gate_first=False,
        oracles=[asked(oracle, prompts), *others],
        student=student and {"spec": "y", "identity": {"model": student}},
        version=version,
        guards=guards or {},
        about=about or {},
    )


@cache
def paper() -> dict:
    return Prompts.load("paper").to_dict()


def asked(model=TEACHER, prompts="paper", version="1", sampling=None):
    """What a recipe says of one oracle."""
    texts = {**paper(), "name": prompts, "version": version}
    return {"spec": "x", "identity": {"model": model}, "sampling": sampling or {}, "prompts": texts}


def score(conditioned: float, direct: float, tokens: int = 10) -> dict:
    """A score of these two perplexities."""
    return {
        "status": "ok",
        "value": conditioned / direct,
        "conditioned_loss": math.log(conditioned),
        "direct_loss": math.log(direct),
        "conditioned_tokens": tokens,
        "direct_tokens": tokens,
    }


def reflection(status="ok", response="A better answer.", instruction=None, critique="Too short.", **fields):
    rewritten = {"response": response, "instruction": instruction, "input": "" if instruction else None}
    return {
        "status": status,
        "reason": None,
        "critique": critique,
        **(rewritten if status == "ok" else dict.fromkeys(rewritten)),
        "calls": [{"prompt_tokens": 100, "completion_tokens": 20, "attempts": 1}],
        **fields,
    }


def row(
    row_id=0, first=False, second=False, *, on_instruction=None, on_response=None, original=None, ifd=None, rifd=None,
    reasons=None,
):  # fmt: skip
    """A row of config `reflections`: whether the student kept the new pair, and then the new response."""
    phases = {
        "instruction": (first, on_instruction or reflection(instruction="A better question?"), "higher_ifd"),
        "response": (second, on_response or reflection(), "lower_rifd"),
    }
    recycled = {(False, False): "original", (True, False): "instruction", (False, True): "response"}
    made = {
        "row_id": row_id,
        "original": {
            "instruction": "12",
            "input": "",
            "response": "1234",
            "ifd": None,
            "rifd": None,
            **(original or {}),
        },
        "recycled": recycled.get((first, second), "both"),
        "ifd_score": ifd,
        "rifd_score": rifd,
    }
    for phase, (kept, reflected, reason) in phases.items():
        made[f"{phase}_reflections"] = [reflected]
        made[f"{phase}_decision"] = {
            "kept": "rewrite" if kept else "original",
            "candidate": 0 if kept else None,
            "reason": (reasons or {}).get(phase) or (reason if kept else f"not_{reason}"),
        }
    return made


NOTHING = {
    "on_instruction": reflection("unchanged", critique="It is good."),
    "on_response": reflection("unchanged", critique="It is good."),
    "reasons": {"instruction": "no_rewrite", "response": "no_rewrite"},
}


def summed(*rows, columns=("instruction", "input", "output")) -> Summary:
    made = Summary(kept=len(rows), columns=[*columns, "row_id", "recycled"])
    made.add(rows)
    return made


def summary():
    def ifd(value):
        return None if value is None else {"value": value}

    return summed(
        row(0, True, True, original={"ifd": ifd(0.25)}, ifd=ifd(0.5)),
        row(1, True, True, original={"ifd": ifd(0.75)}, ifd=ifd(1.0)),
        row(2, **NOTHING),
    )


def means(made: Summary) -> dict[str, tuple[str, str]]:
    """Means before and after, by quantity."""
    return {quantity: (before, after) for quantity, before, after, _ in Description.of(made).before_and_after()}


def files(*splits):
    return {
        config: {split: f"{folder}/{split}-0.parquet" for split in splits}
        for config, folder in (("default", "data"), ("reflections", "reflections"))
    }


def card(made=None, splits=("train",), title="Recycled", location="someone/recycled", template=None, **names) -> str:
    data = CardData(recipe(**names), made or summary(), files(*splits), title, location)
    return render_card(data, template)


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def block(text: str, language: str, nth: int = 0) -> str:
    """The nth block of code in a language, as a Markdown reader finds it."""
    return [token.content for token in tokens(text) if token.type == "fence" and token.info == language][nth]


def tokens(text: str) -> list:
    body = re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)


def structure(text: str) -> list[str]:
    """What a Markdown reader makes of a card, without its words."""
    found = []
    for token in tokens(text):
        found.append(f"{token.type} {token.tag} {token.info}")
        kinds = (child.type for child in token.children or ())
        found += [kind for kind in kinds if kind not in ("text", "softbreak", "text_special")]
    return found


def tables(text: str) -> list[list[list[str]]]:
    """The cells of all tables, as they are read."""
    found: list[list[list[str]]] = []
    stream: Iterator = iter(tokens(text))
    for token in stream:
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            inline = next(stream)
            found[-1][-1].append("".join(child.content for child in inline.children))
    return found


def table(text: str, *heads: str) -> list[list[str]]:
    """The rows of the table with these heads."""
    (found,) = [rows[1:] for rows in tables(text) if rows[0] == list(heads)]
    return found


def codes(text: str) -> list[str]:
    """The indented blocks of code."""
    return [token.content for token in tokens(text) if token.type == "code_block"]


# Metadata


def test_the_front_matter_lists_both_configs_and_where_the_files_of_each_split_are():
    assert front_matter(card(splits=["train", "test"]))["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train-0.parquet"},
                {"split": "test", "path": "data/test-0.parquet"},
            ],
            "default": True,
        },
        {
            "config_name": "reflections",
            "data_files": [
                {"split": "train", "path": "reflections/train-0.parquet"},
                {"split": "test", "path": "reflections/test-0.parquet"},
            ],
        },
    ]


def resource(name: str) -> Any:
    """A list of allowed values, as `datasets` has it."""
    folder = Path(datasets.__file__).parent / "utils" / "resources"
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("rows", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (9_999, "1K<n<10K"),
        (52_002, "10K<n<100K"),
        (999_999, "100K<n<1M"),
        (1_000_000, "1M<n<10M"),
        (2 * 10**9, "1B<n<10B"),
        (10**12 - 1, "100B<n<1T"),
        (10**13, "n>1T"),
    ],
)
def test_the_size_category_is_one_the_hub_knows(rows, category):
    assert front_matter(card(Summary(rows=rows, kept=rows)))["size_categories"] == [category]
    assert category in resource("size_categories")


ABOUTS = {
    "nothing": {},
    "one of each": {"license": "cc-by-nc-4.0", "language": "en", "pretty_name": "Alpaca"},
    "several": {"license": ["mit", "apache-2.0"], "language": ["en", "de"], "multilinguality": ["multilingual"]},
    "other": {"license": "other", "license_name": "mine", "license_link": "https://example.org"},
}


@pytest.mark.parametrize("student", [STUDENT, None])
@pytest.mark.parametrize("revision", [None, "0123456789abcdef"])
@pytest.mark.parametrize("about", ABOUTS)
def test_the_metadata_is_what_the_hub_allows(about, revision, student):
    text = card(about=ABOUTS[about], revision=revision, source="tatsu-lab/alpaca", student=student)
    assert validate_card(text) == ([], [])
    metadata = front_matter(text)
    licences = metadata["license"] if isinstance(metadata["license"], list) else [metadata["license"]]
    assert set(licences) <= set(LICENSES)
    assert set(metadata["annotations_creators"]) <= set(resource("creators")["annotations"])
    languages = metadata.get("language", [])
    assert set([languages] if isinstance(languages, str) else languages) <= set(resource("languages"))
    assert metadata["task_categories"] == ["text-generation"]
    assert {"reflection-tuning", "synthetic", "hf-reflect"} <= set(metadata["tags"])
    assert all(isinstance(tag, str) for tag in metadata["tags"])
    assert None not in metadata.values()
    assert DatasetCard(text).data.to_dict() == metadata
    for path in ("2310.11716", "2402.10110", "2308.12032"):
        assert path in text  # from which the Hub makes tags


def test_licence_and_languages_are_those_of_the_source():
    metadata = front_matter(card(about=ABOUTS["other"] | {"language": ["de"]}))
    assert [metadata[key] for key in ("license", "license_name", "license_link")] == list(ABOUTS["other"].values())
    assert metadata["language"] == ["de"]


def test_what_the_source_does_not_say_is_unknown():
    metadata = front_matter(card())
    assert metadata["license"] == "unknown"
    assert not {"license_name", "license_link", "language"} & set(metadata)


def test_a_source_on_the_hub_is_named_as_one_and_a_file_is_not():
    assert front_matter(card(source="tatsu-lab/alpaca", revision="abc"))["source_datasets"] == ["tatsu-lab/alpaca"]
    assert "source_datasets" not in front_matter(card())


def test_a_block_of_our_own_says_how_it_was_made():
    assert front_matter(card(others=[asked("second")]))["hf_reflect"] == {
        "recipe": recipe(others=[asked("second")]).hash,
        "version": "0.1.0",
        "method": "selective",
        "oracles": ["teacher", "second"],
        "student": "student",
    }
    assert front_matter(card(student=None))["hf_reflect"]["student"] is None


def test_metadata_can_be_added():
    data = CardData(recipe(), summary(), files("train"), "T", "x/y", extra={"pretty_name": "Mine", "license": "mit"})
    metadata = front_matter(render_card(data))
    assert (metadata["pretty_name"], metadata["license"]) == ("Mine", "mit")


# The body


def test_the_card_says_what_was_done_with_what():
    made = dict(table(card(guards={"names": ["language", "code"]}), "", ""))
    assert made["source"] == "data/alpaca.json, content abc"
    assert (made["oracle"], made["student"], made["prompts"]) == ("teacher", "student", "paper version 1")
    assert made["method"] == "selective, keep all"
    assert made["guards"] == "language, code"
    assert recipe(guards={"names": ["language", "code"]}).hash in made["recipe"]


def test_the_commit_of_a_source_on_the_hub_is_said():
    text = card(source="tatsu-lab/alpaca", revision="0123456789abcdef", content=None)
    assert dict(table(text, "", ""))["source"] == "tatsu-lab/alpaca, revision 0123456789abcdef"


def test_how_the_oracle_sampled_is_said():
    text = card(others=[asked(sampling={"temperature": 0.7, "seed": 5})])
    assert '"temperature": 0.7, "seed": 5' in dict(table(text, "", ""))["sampling"]


def test_a_card_names_every_oracle_and_every_set_of_prompts_once():
    others = [asked("second", "json", "7"), asked("third"), asked("teacher", "json", "7")]
    made = dict(table(card(others=others), "", ""))
    assert made["oracle"] == "teacher, second, third"
    assert made["prompts"] == "paper version 1, json version 7"


def test_without_a_student_the_card_says_so():
    text = card(student=None, method="reflect")
    assert dict(table(text, "", ""))["student"] == "none"
    assert "every rewrite was kept" in text


def test_the_card_counts_rows_by_what_became_of_them():
    text = card()
    assert "3 rows of the source, 3 rows here." in text
    assert table(text, "row", "count") == [["both", "2"], ["original", "1"]]


def test_rows_that_were_left_out_are_not_counted_as_here():
    made = summary()
    made.kept = 2
    assert "3 rows of the source, 2 rows here." in card(made)


def test_means_are_over_what_was_scored_and_say_of_how_many():
    found = means(summary())
    assert found["ifd"] == ("0.500 (n=2)", "0.750 (n=2)")  # (0.25 + 0.75) / 2 and (0.5 + 1) / 2
    assert "rifd" not in found  # no row has it
    # Both rows gained 0.25, so whichever rows a bootstrap draws, the mean is that.
    change = "+0.250 [+0.250, +0.250] (n=2)"
    assert ["ifd", "0.500 (n=2)", "0.750 (n=2)", change] in table(card(), "mean", "before", "after", "change")


def test_lengths_are_those_of_the_rows_before_and_after():
    found = means(summary())
    # "A better question?" has 18 characters, "A better answer." 16; two rows have them, the third keeps its 2 and 4.
    assert found["instruction length"] == ("2 (n=3)", f"{(18 + 18 + 2) / 3:.0f} (n=3)")
    assert found["response length"] == ("4 (n=3)", f"{(16 + 16 + 4) / 3:.0f} (n=3)")


def test_the_statistics_of_table_6_worked_out_by_hand():
    first = row(
        0, True, True,
        original={"ifd": score(2, 4, tokens=10), "rifd": score(3, 12, tokens=6)},
        ifd=score(6, 8, tokens=20), rifd=score(3, 30, tokens=8),
    )  # fmt: skip
    same = score(8, 8, tokens=30)
    second = row(1, **NOTHING, original={"ifd": same}, ifd=same)
    third = row(2, **NOTHING)
    shown = table(card(summed(first, second, third)), "mean", "before", "after", "change")
    assert {quantity: (before, after) for quantity, before, after, _ in shown if "length" not in quantity} == {
        "ifd": ("0.750 (n=2)", "0.875 (n=2)"),  # (2/4 + 8/8) / 2, (6/8 + 8/8) / 2
        "rifd": ("0.250 (n=1)", "0.100 (n=1)"),  # 3/12, 3/30
        "instruction tokens": ("6 (n=1)", "8 (n=1)"),
        "response tokens": ("20 (n=2)", "25 (n=2)"),  # (10 + 30) / 2, (20 + 30) / 2
        "ppl(instruction)": ("12.00 (n=1)", "30.00 (n=1)"),
        "ppl(response)": ("6.00 (n=2)", "8.00 (n=2)"),  # (4 + 8) / 2, (8 + 8) / 2
        "ppl(response | instruction)": ("5.00 (n=2)", "7.00 (n=2)"),  # (2 + 8) / 2, (6 + 8) / 2
        "ppl(instruction | response)": ("3.00 (n=1)", "3.00 (n=1)"),
    }  # fmt: skip


def test_a_score_that_could_not_be_computed_counts_for_no_mean():
    null = {"status": "too_short", "value": None, "conditioned_loss": None, "direct_loss": None, "direct_tokens": 1}
    huge = {**score(2, 4), "direct_loss": 1e6}
    made = summed(row(0, **NOTHING, original={"ifd": null}, ifd=huge))
    found = means(made)
    assert found["ifd"] == ("–", "0.500 (n=1)")
    assert "ppl(response)" not in found


def test_decisions_and_statuses_are_counted_by_phase():
    gave_up = reflection("refused", critique=None, reason="the oracle declined")
    text = card(
        summed(
            row(0, True, True),
            row(1, True, False),
            row(2, on_instruction=gave_up, reasons={"instruction": "no_rewrite"}),
            row(3, **NOTHING),
        )
    )
    assert table(text, "phase", "decision", "rows") == [
        ["instruction", "higher_ifd", "2"],
        ["instruction", "no_rewrite", "2"],
        ["response", "lower_rifd", "1"],
        ["response", "no_rewrite", "1"],
        ["response", "not_lower_rifd", "2"],
    ]
    assert table(text, "phase", "reflection", "count") == [
        ["instruction", "ok", "2"],
        ["instruction", "refused", "1"],
        ["instruction", "unchanged", "1"],
        ["response", "ok", "3"],
        ["response", "unchanged", "1"],
    ]
    assert table(text, "phase", "status", "reason", "count") == [
        ["instruction", "refused", "the oracle declined", "1"],
    ]


def test_the_most_frequent_reasons_come_first_and_not_all_of_many():
    def failed(reason):
        return row(
            0, on_instruction=reflection("failed", critique=None, reason=reason), on_response=reflection("unchanged")
        )

    reasons = [f"reason {i:02}" for i in range(40)]
    made = summed(*map(failed, reasons), failed("HTTP 500"), failed("HTTP 500"), failed("reason 03"))
    shown = [(cells[2], cells[3]) for cells in table(card(made), "phase", "status", "reason", "count")]
    assert shown[:3] == [("HTTP 500", "2"), ("reason 03", "2"), ("reason 00", "1")]
    assert len(shown) <= 20


def test_where_everything_gave_a_rewrite_there_are_no_reasons():
    assert "What gave no rewrite" not in card(summed(row(0, True, True)))


def test_calls_and_tokens_of_the_oracle_are_summed():
    calls = [
        {"prompt_tokens": 7, "completion_tokens": 3, "attempts": 3},
        {"prompt_tokens": None, "completion_tokens": None, "attempts": None},
    ]
    text = card(summed(row(0, True, True, on_response=reflection(calls=calls))))
    # 100 and 20 of the reflection on the instruction
    assert dict(table(text, "", ""))["replies"] == "3, 2 calls failed before them; 107 tokens read, 23 written"


def test_a_row_that_could_not_be_read_is_counted():
    skipped = reflection("skipped", critique=None, reason="output is null", calls=None)
    unread = {**row(1, on_instruction=skipped, on_response=skipped), "original": None}
    text = card(summed(row(0, True, True), unread))
    assert ["original", "1"] in table(text, "row", "count")
    assert ["instruction", "skipped", "output is null", "1"] in table(text, "phase", "status", "reason", "count")


# Examples


def test_the_first_row_of_each_ending_is_shown_with_critique_and_scores():
    made = summed(
        row(10, **NOTHING),
        row(11, original={"response": "turned down"}, on_response=reflection(response="no better")),
        row(12, False, True, original={"ifd": score(1, 4), "rifd": score(4, 5)}, ifd=score(3, 4), rifd=score(2, 5)),
        row(13, True, True, on_instruction=reflection(instruction="Whole new?", critique="Vague.")),
        row(14, True, False),
        row(15, True, True), row(16, False, True), row(17), row(18, True, False),
    )  # fmt: skip
    text = card(made)
    heads = re.findall(r"^### Row (\d+): (.*)$", text, re.MULTILINE)
    assert sorted(heads) == [("11", "rejected"), ("12", "response"), ("13", "both"), ("14", "instruction")]
    of = {
        number: text.partition(f"### Row {number}:")[2].partition("###")[0].partition("\n## ")[0]
        for number, _ in heads
    }
    assert codes(of["12"]) == [
        "12\n\n1234\n",
        "12\n\nA better answer.\n",
        "(instruction) Too short.\n(response) Too short.\n",
    ]
    assert "IFD: 0.250 before, 0.750 after." in of["12"]
    assert "r-IFD: 0.800 before, 0.400 after." in of["12"]
    assert "instruction: not&#95;higher&#95;ifd; response: lower&#95;rifd" in of["12"]
    assert codes(of["13"])[1:] == ["Whole new?\n\nA better answer.\n", "(instruction) Vague.\n(response) Too short.\n"]
    assert "IFD: – before, – after." in of["13"]
    assert codes(of["14"])[1] == "A better question?\n\nA better answer.\n"
    assert codes(of["11"])[0] == "12\n\nturned down\n"
    assert "turned down" in of["11"].partition("Before:")[0] or "no better" in codes(of["11"])[1]


def test_an_example_shows_the_input_of_its_instruction():
    text = card(summed(row(0, False, True, original={"instruction": "Sort.", "input": "3, 1"})))
    assert codes(text)[:2] == ["Sort.\n3, 1\n\n1234\n", "Sort.\n3, 1\n\nA better answer.\n"]


def test_a_long_example_is_cut_and_says_so():
    text = card(
        summed(row(0, True, True, original={"response": "r" * 5000}, on_response=reflection(response="n" * 9000)))
    )
    before, after, _ = codes(text)
    assert len(before) < 1500
    assert "5004 characters in all" in before
    assert len(after) < 1500


def test_an_example_without_a_critique_has_no_empty_block():
    none = reflection(critique=None)
    text = card(summed(row(0, False, True, on_instruction=reflection("failed", critique=None), on_response=none)))
    assert "Critique:" not in text
    assert len(codes(text)) == 2


# Code to copy


def test_the_code_on_the_card_loads_from_where_it_is():
    calls = [node for node in ast.walk(ast.parse(block(card(), "python"))) if isinstance(node, ast.Call)]
    assert [[argument.value for argument in call.args] for call in calls] == [
        ["someone/recycled"],
        ["someone/recycled", "reflections"],
    ]


PLACES = [
    'out"put',
    "C:\\new\\table",
    'ends in \\"',
    '\\"); evil("',
    "line\nbreak",
    "fence\n```\n<b>",
    "{{ x }}",
    "é 🌙",
]


@pytest.mark.parametrize("location", PLACES)
def test_the_code_on_the_card_is_right_for_any_location(location):
    text = card(location=location)
    calls = [node for node in ast.walk(ast.parse(block(text, "python"))) if isinstance(node, ast.Call)]
    assert [call.args[0].value for call in calls] == [location, location]
    assert [call.func.id for call in calls] == ["load_dataset", "load_dataset"]
    (entry,) = json.loads(block(text, "json")).values()
    assert entry["hf_hub_url"] == location


@pytest.mark.parametrize("path", [*PLACES, "$(id)", "a; rm -rf x", "`id`", "it's", "a b", "*", "&& true"])
def test_the_command_makes_the_same_thing_again(path):
    words = shlex.split(block(card(source=path), "sh", -1))
    assert words == ["hf-reflect", "recycle", " ".join(path.split()), "recycled", "--config", "recipe.yaml"]


@pytest.mark.parametrize("path", ["-rf", "--oracle=http://evil"])
def test_a_source_that_looks_like_an_option_is_not_one(path):
    words = shlex.split(block(card(source=path), "sh", -1))
    assert words[2] in ("--", f"./{path}")


COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "wizardlm": {"prompt": "instruction", "response": "output"},
    "prompt-completion": {"prompt": "prompt", "response": "completion"},
    "messages": {"messages": "messages"},
    "sharegpt": {"messages": "conversations"},
}


def entry_of(text: str) -> dict:
    (entry,) = json.loads(block(text, "json")).values()
    return entry


@pytest.mark.parametrize("name", FORMATS)
def test_llama_factory_is_told_the_columns(name):
    (source,) = alpaca(1)
    entry = entry_of(card(summed(row(0, True, True), columns=FORMATS[name](source))))
    assert entry["columns"] == COLUMNS[name]
    assert entry.get("formatting", "alpaca") == ("sharegpt" if name in ("messages", "sharegpt") else "alpaca")
    # What LLaMA-Factory takes for granted is `from`, `value`, `human` and `gpt`.
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    assert {key: entry.get("tags", {}).get(key) for key in tags} == (
        tags if name == "messages" else dict.fromkeys(tags)
    )


def test_a_title_is_a_key_of_json_whatever_it_is():
    for title in NASTY.values():
        (key,) = json.loads(block(card(title=title), "json"))
        assert re.fullmatch(r"\w+", key)


@pytest.mark.parametrize("columns", [("messages", "prompt", "completion"), ("conversations", "instruction", "output")])
def test_the_columns_to_train_on_are_those_that_were_recycled(columns):
    """Of a source with columns of two formats only one is recycled."""
    entry = entry_of(card(summed(row(0, True, True), columns=columns)))
    assert set(entry["columns"].values()) == set(recognise(columns).columns)


def test_the_columns_of_a_prompt_and_a_completion_are_what_trl_takes():
    text = card(summed(row(0, True, True), columns=("prompt", "completion")))
    words = shlex.split(block(text, "sh"))
    assert words[:2] == ["trl", "sft"]
    assert words[words.index("--dataset_name") + 1] == "someone/recycled"


def test_of_alpaca_rows_trl_is_given_what_it_can_read():
    """TRL reads `text`, `messages` and `prompt` with `completion`, not `instruction` and `output`.

    https://huggingface.co/docs/trl/dataset_formats
    """
    text = card(summed(row(0, True, True), columns=("instruction", "input", "output")))
    trl = text.partition("With TRL")[2].partition("With LLaMA-Factory")[0]
    assert "completion" in trl


def test_a_split_with_another_name_is_told_to_trl_and_to_llama_factory():
    """Both take `train` for granted."""
    text = card(summed(row(0, True, True), columns=("prompt", "completion")), splits=["train_sft"])
    words = shlex.split(block(text, "sh"))
    assert words[words.index("--dataset_train_split") + 1] == "train_sft"
    assert entry_of(text)["split"] == "train_sft"


# Limits and citations


def test_the_card_speaks_of_its_limits():
    limits = card().partition("## Limits")[2].partition("\n## ")[0]
    for word in ("longer", "mistakes", "licence", "terms", "teacher"):
        assert word in limits


def entries(text: str) -> dict[str, dict[str, str]]:
    """The entries of a BibTeX file, by key."""
    found = re.findall(r"^@(\w+)\{([\w:-]+),\n(.*?)^\}$", text, re.MULTILINE | re.DOTALL)
    return {key: dict(re.findall(r"^  (\w+) = \{([^{}]*)\},?$", fields, re.MULTILINE)) for _, key, fields in found}


def test_the_source_and_three_papers_are_cited():
    found = entries(block(card(about={"pretty_name": "Alpaca"}), "bibtex"))
    assert found.pop("source_dataset") == {"title": "Alpaca", "howpublished": "data/alpaca.json"}
    said = [(paper["journal"].removeprefix("arXiv preprint arXiv:"), paper["year"]) for paper in found.values()]
    assert said == [("2310.11716", "2023"), ("2402.10110", "2024"), ("2308.12032", "2023")]
    assert all({"title", "author"} <= set(paper) for paper in found.values())


@pytest.mark.parametrize("kind", NASTY)
def test_a_citation_stays_whole_whatever_the_source_is_called(kind):
    text = block(card(about={"pretty_name": NASTY[kind]}, source=NASTY[kind]), "bibtex")
    assert set(entries(text)["source_dataset"]) == {"title", "howpublished"}
    assert len(entries(text)) == 4
    assert text.count("{") == text.count("}")


# Whatever the data says


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("where", ["source", "oracle", "student", "prompts", "title"])
def test_hostile_text_is_read_as_text_in_its_own_cell(kind, where):
    text = card(**{where: HOSTILE[kind]})
    shown = " ".join(HOSTILE[kind].split())
    if where == "title":
        found = tokens(text)
        (title,) = [
            found[i + 1] for i, token in enumerate(found) if token.type == "heading_open" and token.tag == "h1"
        ]
        assert "".join(child.content for child in title.children) == shown
    else:
        said = {"source": f"{shown}, content abc", "prompts": f"{shown} version 1"}.get(where, shown)
        assert dict(table(text, "", ""))[where] == said


def rows_with(text: str, *places: str) -> Summary:
    """Rows of every ending, with a text in some of the places that a row has."""

    def at(place: str, plain: str) -> str:
        return (text or plain) if place in places else plain

    before = {part: at(part, f"An {part}.") for part in ("instruction", "input", "response")}
    first = reflection(instruction=at("new instruction", "Better?"), critique=at("critique", "Short."))
    second = reflection(response=at("new response", "Better."), critique=at("critique", "Short."))
    failed = reflection(at("status", "failed"), critique=None, reason=at("reason", "HTTP 500"))
    reasons = {"response": at("decision", "lower_rifd")}
    shared = {"original": before, "on_instruction": first, "on_response": second, "reasons": reasons}
    endings = [(True, True), (False, True), (True, False), (False, False)]
    rows = [row(i, *ending, **shared) for i, ending in enumerate(endings)]
    return summed(*rows, row(9, on_instruction=failed, on_response=failed, original=before))


IN_ROWS = (
    "instruction", "input", "response", "new instruction", "new response", "critique", "reason", "status", "decision"
)  # fmt: skip
IN_RECIPE = ("source", "revision", "content", "version", "method", "keep", "oracle", "student", "prompts")
IN_ABOUT = ("pretty_name", "license", "license_name", "license_link", "language")
ELSEWHERE = ("title", "location", "sampling", "guards")
PLACES_OF_DATA = (*IN_ROWS, *IN_RECIPE, *IN_ABOUT, *ELSEWHERE)


def card_with(text: str, *places: str) -> str:
    """A card with a text in some of the places where data goes."""

    def at(place: str, plain: str = "plain") -> str:
        return (text or plain) if place in places else plain

    about = {place: at(place) for place in IN_ABOUT} | {"language": [at("language"), "en"]}
    return card(
        rows_with(text, *places),
        title=at("title"),
        location=at("location"),
        about=about,
        others=[asked(sampling={"stop": at("sampling")})],
        guards={"names": [at("guards"), "copied"]},
        **{place: at(place) for place in IN_RECIPE},
    )


EVERYTHING = "\n".join(NASTY.values())
PLAIN = card_with("plain")
IN_ONE = [(place, EVERYTHING) for place in PLACES_OF_DATA]
IN_ALL = [(kind, text) for kind, text in NASTY.items() if text.strip()]


def check_is_framed(text: str) -> None:
    """That a card has the structure of a plain one, in Markdown and in YAML."""
    assert structure(text) == structure(PLAIN)
    assert list(front_matter(text)) == list(front_matter(PLAIN))
    assert set(DatasetCard(text).data.to_dict()) == set(front_matter(PLAIN))


@pytest.mark.parametrize(("place", "text"), IN_ONE, ids=[place for place, _ in IN_ONE])
def test_whatever_stands_in_one_place_changes_nothing_around_it(place, text):
    check_is_framed(card_with(text, place))


@pytest.mark.parametrize(("kind", "text"), IN_ALL, ids=[kind for kind, _ in IN_ALL])
def test_one_nasty_text_in_all_places_changes_nothing_around_them(kind, text):
    check_is_framed(card_with(text, *PLACES_OF_DATA))


@pytest.mark.parametrize("place", PLACES_OF_DATA)
def test_no_control_character_is_written_into_a_card(place):
    """YAML has them as escapes, and so have JSON and the literals of Python."""
    text = card_with("".join(map(chr, range(0xA0))), place)
    assert {c for c in text if unicodedata.category(c) == "Cc"} == {"\n"}


@pytest.mark.parametrize("text", ["", " \n\t\n "])
@pytest.mark.parametrize("place", PLACES_OF_DATA)
def test_nothing_at_all_still_makes_a_card(place, text):
    data = card_with(text, place)
    assert list(front_matter(data))[-1] == "hf_reflect"
    assert [token.content for token in tokens(data) if token.type == "fence"][-1].startswith("@misc")


@pytest.mark.parametrize("kind", ["template", "front matter", "direction", "emoji", "control"])
def test_metadata_says_exactly_what_the_source_said(kind):
    said = {"license_name": NASTY[kind], "language": [NASTY[kind]]}
    assert said.items() <= front_matter(card(about=said)).items()


@pytest.mark.parametrize("place", IN_ROWS[:-2])  # status and decision are words of ours
def test_a_very_long_text_of_a_row_is_cut(place):
    assert len(card_with("long " * 40_000, place)) < 30_000


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_cell_is_one_line_without_anything_that_markdown_or_html_reads(kind):
    text = cell(HOSTILE[kind])
    assert len(text.splitlines()) == 1
    assert not FORMATTING.search(text)


def test_a_cell_is_read_as_the_text_it_was():
    text = "a | b `c` <d> {{ e }} & [f](g) *h* _i_ #j ~k $l !m \\n"
    assert unescape(cell(text)) == text


def test_a_plain_text_stands_in_its_cell_as_it_is():
    assert cell("SmolLM2-135M-Instruct, Q4.1 (é 漢 🌙)") == "SmolLM2-135M-Instruct, Q4.1 (é 漢 🌙)"


@pytest.mark.parametrize("split", ["train", "no", "1e5", "a.b"])
def test_a_split_is_named_in_the_front_matter_as_it_is(split):
    assert front_matter(card(splits=[split]))["configs"][0]["data_files"][0]["split"] == split


def test_a_run_of_no_rows_still_has_a_card():
    text = card(Summary(), title="Nothing", location="x/y")
    assert "0 rows of the source" in text
    assert len(front_matter(text)["configs"]) == 2


# The card of a run, and the same again from its folder


@pytest.fixture(scope="session")
def judge(student):
    return load_student(student)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def run(source, server, judge, out: Path, **options):
    method = {} if judge else {"method": "reflect"}
    journal = out.parent / "journal"
    return recycle(
        source, str(out), oracle=server.url, student=judge, journal=journal, progress=False, **method, **options
    )


def invoke(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def read_card(out: Path) -> str:
    return (out / "README.md").read_text("utf-8")


def source_rows(name: str, n: int = 20) -> Dataset:
    rows = [FORMATS[name](row) for row in alpaca(n)]
    if "messages" in rows[0]:
        rows[3]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    return Dataset.from_list(rows)


def check_regenerates(out: Path) -> None:
    before = read_card(out)
    (out / "README.md").unlink()
    done = invoke("card", out)
    assert done.exit_code == 0, done.output
    assert read_card(out) == before
    assert invoke("card", out).exit_code == 0
    assert read_card(out) == before


@pytest.mark.filterwarnings("ignore:.*have an IFD of 1 or more")  # the student is random
@pytest.mark.parametrize("name", FORMATS)
def test_the_card_made_again_from_the_folder_is_the_card_that_the_run_wrote(server, judge, out, name):
    run(source_rows(name), server, judge, out)
    text = read_card(out)
    assert validate_card(text) == ([], [])
    assert [row[0] for row in table(text, "mean", "before", "after", "change")][2:4] == ["ifd", "rifd"]
    assert entry_of(text)["columns"] == COLUMNS[name]
    check_regenerates(out)


@pytest.mark.filterwarnings("ignore:.*have an IFD of 1 or more")
def test_the_statistics_of_a_run_are_those_of_its_rows(server, judge, out):
    run(source_rows("alpaca"), server, judge, out)
    rows = pq.read_table(next((out / "data").glob("*.parquet"))).to_pylist()
    audit = pq.read_table(next((out / "reflections").glob("*.parquet"))).to_pylist()
    means = table(read_card(out), "mean", "before", "after", "change")
    shown = {quantity: (before, after) for quantity, before, after, _ in means}

    def mean(values, digits):
        values = [value for value in values if value is not None]
        mean = sum(values) / len(values)
        return f"{mean:.{0 if mean >= 1000 else digits}f} (n={len(values)})"

    assert shown["ifd"] == (mean([r["ifd_original"] for r in rows], 3), mean([r["ifd"] for r in rows], 3))
    assert shown["rifd"] == (mean([r["rifd_original"] for r in rows], 3), mean([r["rifd"] for r in rows], 3))
    assert shown["response length"] == (
        mean([len(r["original"]["response"]) for r in audit], 0),
        mean([len(r["output"]) for r in rows], 0),
    )
    after = [math.exp(r["ifd_score"]["conditioned_loss"]) for r in audit if r["ifd_score"]["status"] == "ok"]
    assert shown["ppl(response | instruction)"][1] == mean(after, 2)


def test_a_source_whose_card_is_broken_is_one_line_of_error(server, tmp_path, out):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "rows.jsonl").write_text(json.dumps(alpaca(1)[0]) + "\n", "utf-8")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: [mit\n---\n", "utf-8")
    with pytest.raises(SourceError, match="can't be read"):
        run(str(tmp_path / "source"), server, None, out)


@pytest.mark.parametrize("keep", ["all", "reflected"])
def test_without_a_student_as_well(server, out, keep):
    run(source_rows("alpaca"), server, None, out, keep=keep)
    check_regenerates(out)


def test_with_several_splits_as_well(server, out):
    """They stand in the order of the source, on the card of the run and on the one made again."""
    splits = {"train": source_rows("alpaca"), "test": source_rows("alpaca").select(range(5, 12))}
    run(DatasetDict(splits), server, None, out)
    listed = front_matter(read_card(out))["configs"][0]["data_files"]
    assert [file["split"] for file in listed] == ["train", "test"]
    check_regenerates(out)


def test_where_the_first_rows_are_left_out_as_well(server, out, monkeypatch):
    """Then the file of the audit trail is the first that is written."""
    monkeypatch.setattr("hf_reflect.recycling._SHARD", 2)
    good = ("(0)", "(1)")
    server.rule = lambda call: completion(call, "Good.\n[Unchanged]") if any(x in call.user for x in good) else None
    run(source_rows("alpaca", 12), server, None, out, keep="reflected")
    assert [config["config_name"] for config in front_matter(read_card(out))["configs"]] == ["default", "reflections"]
    check_regenerates(out)


def test_hostile_rows_and_replies_go_through_a_run_as_text(server, out):
    evil = "---\nlicense: evil\n---\n```\n<!-- x --> | {{ 7 * 7 }} \x1b[31m \u202e"
    server.rule = lambda call: completion(
        call, f"{evil}\n[New Instruction]\n{evil} ask\n[End]\n[New Response]\n{evil} say\n[End]"
    )
    rows = [{"instruction": f"{evil} {i}", "input": evil, "output": f"{evil} {i}"} for i in range(3)]
    run(Dataset.from_list(rows), server, None, out)
    text = read_card(out)
    assert validate_card(text) == ([], [])
    assert front_matter(text)["license"] == "unknown"
    assert "html_block" not in {token.type for token in tokens(text.partition("\n<!-- hf_reflect")[0])}
    assert "49" not in text.partition("## Examples")[2].partition("## How")[0]
    check_regenerates(out)


SOURCE_CARDS = {
    "both": ("license: cc-by-nc-4.0\nlanguage: de\npretty_name: Mein", {"license": "cc-by-nc-4.0", "language": "de"}),
    "several": (
        "license: [mit, apache-2.0]\nlanguage:\n- en\n- de",
        {"license": ["mit", "apache-2.0"], "language": ["en", "de"]},
    ),
    "other": (
        "license: other\nlicense_name: mine\nlicense_link: LICENSE",
        {"license": "other", "license_name": "mine", "license_link": "LICENSE", "language": None},
    ),
    "no metadata": (None, {"license": "unknown", "language": None}),
    "Norwegian": ("license: mit\nlanguage:\n- no\n- en", {"license": "mit", "language": ["no", "en"]}),
    "Norwegian alone": ("license: mit\nlanguage: no", {"license": "mit", "language": "no"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCE_CARDS)
def test_licence_and_language_come_from_the_card_of_the_source(server, tmp_path, out, kind):
    head, said = SOURCE_CARDS[kind]
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alpaca(4)), "utf-8")
    (folder / "README.md").write_text("# Rows\n" if head is None else f"---\n{head}\n---\n\n# Rows\n", "utf-8")
    run(str(folder), server, None, out)
    text = read_card(out)
    assert {key: front_matter(text).get(key) for key in said} == said
    assert validate_card(text) == ([], [])
    if "pretty_name" in (head or ""):
        assert entries(block(text, "bibtex"))["source_dataset"]["title"] == "Mein"
    check_regenerates(out)


def test_a_file_has_no_card_to_have_a_licence_from(server, tmp_path, out):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in alpaca(4)), "utf-8")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", "utf-8")
    run(str(file), server, None, out)
    assert front_matter(read_card(out))["license"] == "unknown"


def test_edits_survive_the_card_made_again(result):
    out = result
    text = read_card(out).replace("license: unknown", "license: mit").replace("## Limits\n", "## Limits\n\n- Mine.\n")
    (out / "README.md").write_text(text, "utf-8")
    assert invoke("card", out, "--location", "me/mine").exit_code == 0
    again = read_card(out)
    assert front_matter(again)["license"] == "mit"
    assert "- Mine." in again
    assert 'load_dataset("me/mine"' in again


def test_a_folder_that_is_no_result_has_no_card(tmp_path):
    assert isinstance(invoke("card", tmp_path).exception, HfReflectError)
    assert not list(tmp_path.iterdir())


# Another template


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    with OracleServer() as server:
        run(source_rows("alpaca", 6), server, None, out)
    return out


@pytest.fixture
def result(made, out) -> Path:
    """A folder that a run wrote."""
    return Path(shutil.copytree(made, out))


def test_another_template_gets_the_facts_and_the_filters(result, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "---\n{{ metadata }}\n---\n# {{ card.title | cell }}\n"
        "{{ summary.rows }} rows by {{ card.oracles | join(', ') }}.\n",
        "utf-8",
    )
    done = invoke("card", result, "--card-template", file)
    assert done.exit_code == 0, done.output
    text = read_card(result)
    assert "# out\n6 rows by teacher.\n" in text
    assert "## Limits" not in text
    assert validate_card(text) == ([], [])


def test_a_template_that_is_given_in_python():
    assert card(template="{{ card.student }} {{ summary.kept }}\n") == "student 3\n"


BROKEN = {
    "syntax": "{% if %}",
    "unclosed": "{{ card.title",
    "undefined": "{{ nothing_of_the_sort }}",
    "no attribute": "{{ card.nothing.more }}",
    "no filter": "{{ card.title | shout }}",
    "arithmetic": "{{ 1 / 0 }}",
    "wrong type": "{{ card.title + 1 }}",
    "private": "{{ ''.__class__.__mro__ }}",
    "include": "{% include '/etc/passwd' %}",
    "memory": "{% for i in range(10 ** 9) %}x{% endfor %}",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_template_is_an_error_in_one_line_that_names_it(result, tmp_path, kind):
    before = read_card(result)
    file = tmp_path / "mine.jinja"
    file.write_text(BROKEN[kind], "utf-8")
    done = invoke("card", result, "--card-template", file)
    assert isinstance(done.exception, HfReflectError), repr(done.exception)
    assert "template" in str(done.exception) or "mine.jinja" in str(done.exception)
    assert read_card(result) == before


@pytest.mark.parametrize("write", [None, b"\xff\xfe\x00"])
def test_a_template_that_cannot_be_read_is_an_error_that_names_it(result, tmp_path, write):
    file = tmp_path / "mine.jinja"
    if write is not None:
        file.write_bytes(write)
    done = invoke("card", result, "--card-template", file)
    assert isinstance(done.exception, HfReflectError)
    assert "mine.jinja" in str(done.exception)
