import ast
import re

import pytest
import yaml

from hf_reflect.cards import cell, means_table, render_card
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

FORMATTING = re.compile(r"[\\`*_{}\[\]<>|~$!]|&(?!#\d+;)|(?<!&)#")
"""What Markdown or HTML could read, other than a character reference."""


def recipe(
    source="data/alpaca.json", oracle="teacher", student="student", prompts="paper", method="selective", others=()
):
    return Recipe(
        source={"path": source, "content": "abc", "split": None, "limit": None},
        method=method,
        keep="all",
        gate_first=False,
        oracles=[asked(oracle, prompts), *others],
        student=student and {"spec": "y", "identity": {"model": student}},
        version="0.1.0",
    )


def asked(model="teacher", prompts="paper", version="1"):
    """What a recipe says of one oracle."""
    texts = {**Prompts.load("paper").to_dict(), "name": prompts, "version": version}
    return {"spec": "x", "identity": {"model": model}, "sampling": {}, "prompts": texts}


def row(recycled, before, after):
    def score(value):
        return None if value is None else {"value": value}

    kept = {"kept": "original", "candidate": None, "reason": "no_rewrite"}
    return {
        "original": {"instruction": "12", "input": "", "response": "1234", "ifd": score(before), "rifd": None},
        "instruction_reflections": [],
        "instruction_decision": kept,
        "response_reflections": [],
        "response_decision": kept,
        "recycled": recycled,
        "ifd_score": score(after),
        "rifd_score": None,
    }


def summary():
    made = Summary(kept=3)
    made.add([row("both", 0.25, 0.5), row("both", 0.75, 1.0), row("original", None, None)])
    return made


def files(*splits):
    return {
        config: {split: f"{folder}/{split}-0.parquet" for split in splits}
        for config, folder in (("default", "data"), ("reflections", "reflections"))
    }


def render(splits=("train",), title="Recycled", location="someone/recycled", **names):
    return render_card(recipe(**names), summary(), files(*splits), title, location)


def front_matter(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def python_of(card):
    return re.search(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)[1]


def test_the_front_matter_lists_both_configs_and_where_the_files_of_each_split_are():
    assert front_matter(render(splits=["train", "test"]))["configs"] == [
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


@pytest.mark.parametrize(
    ("rows", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (52_002, "10K<n<100K"),
        (999_999, "100K<n<1M"),
        (1_000_000, "1M<n<10M"),
        (2 * 10**9, "1B<n<10B"),
        (10**13, "n>1T"),
    ],
)
def test_the_size_category_is_one_the_hub_knows(rows, category):
    card = render_card(recipe(), Summary(rows=rows, kept=rows), files("train"), "Recycled", "x/y")
    assert front_matter(card)["size_categories"] == [category]


def test_the_card_says_what_was_done_with_what():
    card = render()
    for line in ("| source | data/alpaca.json |", "| oracle | teacher |", "| student | student |"):
        assert line in card
    assert "| prompts | paper version 1 |" in card
    assert recipe().hash in card


def test_a_card_names_every_oracle_and_every_set_of_prompts_once():
    others = [asked("second", "json", "7"), asked("third"), asked("teacher", "json", "7")]
    card = render(others=others)
    assert "| oracle | teacher, second, third |" in card
    assert "| prompts | paper version 1, json version 7 |" in card


def test_without_a_student_the_card_says_so():
    card = render(student=None, method="reflect")
    assert "| student | none |" in card
    assert "every rewrite was kept" in card


def test_the_card_counts_rows_by_what_became_of_them():
    card = render()
    assert "3 rows of the source, 3 rows here." in card
    assert "| both | 2 |\n| original | 1 |\n" in card


def test_means_are_over_what_was_scored_and_say_of_how_many():
    table = dict(means_table(summary()))
    assert table["ifd"] == ("0.500 (n=2)", "0.750 (n=2)")  # (0.25 + 0.75) / 2 and (0.5 + 1) / 2
    assert table["rifd"] == ("–", "–")
    assert table["response length"] == ("4 (n=3)", "4 (n=3)")
    assert "| ifd | 0.500 (n=2) | 0.750 (n=2) |" in render()


def test_the_code_on_the_card_loads_from_where_it_is():
    calls = [node for node in ast.walk(ast.parse(python_of(render()))) if isinstance(node, ast.Call)]
    assert [[argument.value for argument in call.args] for call in calls] == [
        ["someone/recycled"],
        ["someone/recycled", "reflections"],
    ]


@pytest.mark.parametrize(
    "location",
    ['out"put', "C:\\new\\table", 'ends in \\"', '\\"); evil("', "line\nbreak", "fence\n```\n<b>", "{{ x }}", "é 🌙"],
)
def test_the_code_on_the_card_is_right_for_any_location(location):
    card = render(location=location)
    calls = [node for node in ast.walk(ast.parse(python_of(card))) if isinstance(node, ast.Call)]
    assert [call.args[0].value for call in calls] == [location, location]
    assert [call.func.id for call in calls] == ["load_dataset", "load_dataset"]


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("where", ["source", "oracle", "student", "prompts", "title"])
def test_hostile_text_changes_nothing_but_its_own_cell(kind, where):
    plain, hostile = render(**{where: "PLAIN"}), render(**{where: HOSTILE[kind]})
    differing = [
        (before, after)
        for before, after in zip(plain.split("\n"), hostile.split("\n"), strict=True)
        if before != after and "`recipe.yaml`" not in before  # the line with the hash
    ]
    [(before, after)] = differing
    opening, closing = before.split("PLAIN")
    assert after.startswith(opening)
    assert after.endswith(closing)
    assert not FORMATTING.search(after.removeprefix(opening).removesuffix(closing))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_cell_is_one_line_without_anything_that_markdown_or_html_reads(kind):
    text = cell(HOSTILE[kind])
    assert len(text.splitlines()) == 1
    assert not FORMATTING.search(text)


def test_a_cell_is_read_as_the_text_it_was():
    from html import unescape

    text = "a | b `c` <d> {{ e }} & [f](g) *h* _i_ #j ~k $l !m \\n"
    assert unescape(cell(text)) == text


def test_a_plain_text_stands_in_its_cell_as_it_is():
    assert cell("SmolLM2-135M-Instruct, Q4.1 (é 漢 🌙)") == "SmolLM2-135M-Instruct, Q4.1 (é 漢 🌙)"


@pytest.mark.parametrize("split", ["train", "no", "1e5", "a.b"])
def test_a_split_is_named_in_the_front_matter_as_it_is(split):
    assert front_matter(render(splits=[split]))["configs"][0]["data_files"][0]["split"] == split


def test_a_run_of_no_rows_still_has_a_card():
    card = render_card(recipe(), Summary(), files("train"), "Nothing", "x/y")
    assert "0 rows of the source" in card
    assert len(front_matter(card)["configs"]) == 2
