"""The page about a result, in a real browser: what it shows, finds and compares, and that no data can act in it."""

import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import Opened, launched, opened
from datasets import Dataset

from hf_reflect import recycle
from hf_reflect.columns import REFLECTIONS, TYPES
from hf_reflect.errors import HfReflectError, OutputError, SourceError
from hf_reflect.plotting import Picture
from hf_reflect.recipe import Recipe
from hf_reflect.report import write_report
from hf_reflect.tables import Table


SCHEMA = pa.schema([(name, TYPES[name]) for name in REFLECTIONS])
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PARTS = ("instruction", "input", "response")


# ---------------------------------------------------------------- folders


def score(value: float | None, status: str = "ok") -> dict:
    losses = (None, None) if value is None else (2.0 + math.log(value), 2.0)
    return {
        "status": status,
        "value": value,
        "conditioned_loss": losses[0],
        "direct_loss": losses[1],
        "conditioned_tokens": 31,
        "direct_tokens": 31,
    }


def reflection(status="ok", response="A better answer.", instruction=None, critique="Too short.", **fields) -> dict:
    rewritten = {"response": response, "instruction": instruction, "input": "" if instruction else None}
    call = {"part": "user", "text": "RAW REPLY", "thinking": "RAW THOUGHT", "finish_reason": "stop", "attempts": 1}
    return {
        "status": status,
        "oracle": "teacher",
        "critique": critique,
        **(rewritten if status == "ok" else {}),
        "calls": [{**call, "prompt_tokens": 100, "completion_tokens": 20}],
        **fields,
    }


def row(row_id: int, first: int | None = None, second: int | None = None, **fields: Any) -> dict:
    """A row of config `reflections`; which rewrite each phase kept."""
    original = {"instruction": f"Ask {row_id}.", "input": "", "response": f"Old {row_id}.", "context": []}
    became = {(True, True): "both", (True, False): "instruction", (False, True): "response"}
    made = {
        "row_id": row_id,
        "original": {**original, **fields.pop("original", {})},
        "instruction_reflections": [reflection(instruction=f"New ask {row_id}.", response=f"With it {row_id}.")],
        "response_reflections": [reflection(response=f"Better {row_id}.")],
        "recycled": became.get((first is not None, second is not None), "original"),
    }
    for phase, kept, won in (("instruction", first, "higher_ifd"), ("response", second, "lower_rifd")):
        made[f"{phase}_decision"] = {
            "kept": "original" if kept is None else "rewrite",
            "candidate": kept,
            "reason": f"not_{won}" if kept is None else won,
        }
    return made | fields


def unreadable(row_id: int, reason: str) -> dict:
    skipped = reflection("skipped", critique=None, reason=reason, calls=[])
    nothing = {"kept": "original", "candidate": None, "reason": "no_rewrite"}
    return row(row_id) | dict(
        original=None,
        instruction_reflections=[skipped],
        response_reflections=[reflection("skipped", critique=None, calls=[])],
        instruction_decision=nothing,
        response_decision=nothing,
    )


def folder(path: Path, keep: str = "all", **splits: list[dict] | pa.Table) -> Path:
    """A folder as a run writes it, as far as the page reads it."""
    (path / "reflections").mkdir(parents=True)
    asked = {"spec": "x", "identity": {"model": "teacher"}, "sampling": {}, "prompts": {"name": "paper"}}
    recipe = Recipe(
        source={"path": "data/alpaca.json"},
        method="selective",
        keep=keep,
        gate_first=False,
        oracles=[asked],
        student={"spec": "y", "identity": {"model": "pupil"}},
        version="0.1.0",
    )
    (path / "recipe.yaml").write_text(recipe.to_yaml())
    for split, rows in splits.items():
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, SCHEMA)
        pq.write_table(table, path / "reflections" / f"{split}-00000-of-00001-0.parquet")
    return path


def written(source: Path, *, tables=(), pictures=(), **options: Any) -> Path:
    return write_report(source, source.with_name(f"{source.name}.html"), tables=tables, pictures=pictures, **options)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


class Reader:
    """What a person sees of a page and does with it."""

    def __init__(self, tab: Opened) -> None:
        from playwright.sync_api import expect

        self.tab, self.page, self.expect = tab, tab.page, expect
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def shows(self, selector: str, text: str | re.Pattern[str]) -> None:
        """Waits until an element has this text."""
        self.expect(self.page.locator(selector)).to_have_text(text)

    def counts(self, left: int, rows: int) -> None:
        self.shows("#count", f"{left:,} of {rows:,} rows")

    def column(self, field: str) -> list[str]:
        """The cells of a column, from the top, of the rows that are near the view."""
        return self.page.locator(f'.tabulator-row [tabulator-field="{field}"]').all_inner_texts()

    def lists(self, *rows: int) -> None:
        """Waits until the table shows exactly these rows in this order."""
        self.expect(self.page.locator('.tabulator-row [tabulator-field="row"]')).to_have_text([str(n) for n in rows])

    def choose(self, **values: str) -> None:
        for name, value in values.items():
            self.page.select_option(f"select[name={name}]", value)

    def between(self, field: str, least: str = "", most: str = "") -> None:
        self.page.fill(f"input[name={field}_min]", least)
        self.page.fill(f"input[name={field}_max]", most)

    def search(self, text: str) -> None:
        self.page.fill("#text", text)

    def opens(self, name: str) -> None:
        """Waits until the row that is shown has this name."""
        self.shows("#detail h3", name)

    def leave(self) -> None:
        self.page.evaluate("document.activeElement.blur()")

    def words(self, part: str, kind: str) -> list[str]:
        """What was deleted from a part of the pair, or inserted."""
        return self.page.locator(f"[data-part={part}] {kind}").all_text_contents()

    def part(self, part: str, without: str) -> str:
        """A part of the pair as it was before (without `ins`) or after (without `del`); empty if it is not shown."""
        return self.page.evaluate(
            """([part, without]) => {
              const shown = document.querySelector(`[data-part=${part}] .text`)?.cloneNode(true);
              shown?.querySelectorAll(without).forEach((element) => element.remove());
              return shown?.textContent ?? '';
            }""",
            [part, without],
        )

    @property
    def text(self) -> str:
        return self.page.locator("#detail").text_content()


Open = Callable[..., Reader]


@pytest.fixture
def open_page(browser) -> Iterator[Open]:
    """Opens pages, and sees to it that none complains or reaches for anything."""
    with ExitStack() as stack:
        readers: list[Reader] = []

        def open(file: Path, hash: str = "", **options: Any) -> Reader:
            readers.append(Reader(stack.enter_context(opened(browser, file, hash, **options))))
            return readers[-1]

        yield open
        for reader in readers:
            assert reader.tab.complaints == []
            assert reader.tab.requests == []


pytestmark = pytest.mark.browser


# ---------------------------------------------------------------- what is shown


FOUND = "a needle in a critique"


def varied() -> list[dict]:
    """Rows of every kind, with scores that are easy to tell apart."""
    multiple = [reflection("truncated", reason="cut off at 9"), reflection(instruction="Q2.", response="R2.")]
    rows = [
        row(0, 0, 0, original={"ifd": score(0.5), "rifd": score(0.9)}, ifd_score=score(0.8), rifd_score=score(0.3)),
        row(1, 0, None, original={"ifd": score(0.6), "rifd": score(0.2)}, ifd_score=score(0.7), rifd_score=score(0.2)),
        row(2, None, 0, original={"ifd": score(0.9), "rifd": score(0.8)}, ifd_score=score(0.4), rifd_score=score(0.5)),
        row(3, original={"instruction": "Zebra", "ifd": score(None, "too_short")}, ifd_score=score(1.5)),
        row(4, 1, None, instruction_reflections=multiple),
        row(5, response_reflections=[reflection("refused", critique=FOUND, reason="it declined")]),
        unreadable(6, "instruction is a number"),
    ]
    rows[5]["response_decision"] = {"kept": "original", "candidate": None, "reason": "no_rewrite"}
    return rows


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    table = Table("Endings <i>", ("what", "rows"), (("both & more", "1"), ("<b>none</b>", "6")), "A note.")
    picture = Picture("flow", "Flow of rows", "Seven rows, one of them rewritten twice.", PIXEL)
    source = folder(tmp_path_factory.mktemp("varied") / "result", train=varied())
    return written(source, tables=[table], pictures=[picture])


def test_it_says_what_was_made_of_what_with_what(open_page, page_file):
    reader = open_page(page_file)
    names, said = (reader.page.locator(f".facts {tag}").all_text_contents() for tag in ("dt", "dd"))
    facts = dict(zip(names, said, strict=True))
    assert facts["Source"] == "data/alpaca.json"
    assert (facts["Method"], facts["Oracle"], facts["Student"]) == ("selective", "teacher", "pupil")
    assert (facts["Rows"], facts["Recipe"]) == ("7", Recipe.read(page_file.with_name("result")).hash)


def test_tables_are_text_and_pictures_have_their_alternative(open_page, page_file):
    reader = open_page(page_file)
    assert reader.page.locator(".tables caption").all_text_contents() == ["Endings <i>"]
    assert reader.page.locator(".tables td").all_text_contents() == ["both & more", "1", "<b>none</b>", "6"]
    image = reader.page.get_by_role("img", name="Seven rows, one of them rewritten twice.")
    assert image.evaluate("(element) => element.naturalWidth") == 1
    assert reader.page.get_by_text("Pictures need").count() == 0


def test_without_pictures_it_says_what_they_need(open_page, tmp_path):
    reader = open_page(written(folder(tmp_path / "result", train=[row(0)])))
    assert reader.page.get_by_text("Pictures need the extra plots.").is_visible()


def test_the_table_has_every_row_with_its_scores_and_its_fate(open_page, page_file):
    reader = open_page(page_file, viewport={"width": 3000, "height": 1000})
    reader.counts(7, 7)
    reader.lists(0, 1, 2, 3, 4, 5, 6)
    assert reader.column("recycled")[:4] == ["both new", "new instruction", "new response", "original"]
    assert reader.column("start") == ["Ask 0.", "Ask 1.", "Ask 2.", "Zebra", "Ask 4.", "Ask 5.", "unreadable"]
    assert reader.column("ifd_before")[:4] == ["0.500", "0.600", "0.900", "–"]
    assert reader.column("ifd_after")[:4] == ["0.800", "0.700", "0.400", "1.500"]
    assert reader.column("gain")[:4] == ["+0.300", "+0.100", "−0.500", "–"]
    assert reader.column("rifd_before")[:3] == ["0.900", "0.200", "0.800"]
    assert reader.column("rifd_after")[:3] == ["0.300", "0.200", "0.500"]
    assert reader.column("instruction_status")[4:] == ["truncated, ok", "ok", "skipped"]
    assert reader.column("response_status")[4:] == ["ok", "refused", "skipped"]
    assert reader.column("instruction_decision")[2:5] == ["not_higher_ifd", "not_higher_ifd", "higher_ifd"]
    assert reader.column("response_decision")[4:] == ["not_lower_rifd", "no_rewrite", "no_rewrite"]


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ({"recycled": "both"}, [0]),
        ({"recycled": "original"}, [3, 5, 6]),
        ({"instruction_status": "truncated"}, [4]),
        ({"instruction_status": "ok"}, [0, 1, 2, 3, 4, 5]),
        ({"response_status": "refused"}, [5]),
        ({"instruction_decision": "higher_ifd"}, [0, 1, 4]),
        ({"response_decision": "no_rewrite"}, [5, 6]),
        ({"response_decision": "no_rewrite", "response_status": "skipped"}, [6]),
    ],
)
def test_a_filter_leaves_the_rows_that_are_like_that(open_page, page_file, choice, left):
    reader = open_page(page_file)
    reader.choose(**choice)
    reader.counts(len(left), 7)
    reader.lists(*left)
    reader.page.get_by_role("button", name="Clear all").click()
    reader.counts(7, 7)
    reader.lists(0, 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("field", "least", "most", "left"),
    [
        ("ifd_before", "0.55", "", [1, 2]),
        ("ifd_after", "", "0.75", [1, 2]),
        ("ifd_after", "0.7", "0.8", [0, 1]),
        ("gain", "0", "", [0, 1]),
        ("gain", "", "-0.1", [2]),
        ("rifd_before", "0.85", "1", [0]),
        ("rifd_after", "0.2", "0.2", [1]),
    ],
)
def test_a_range_of_scores_takes_its_ends_and_no_row_without_that_score(
    open_page, page_file, field, least, most, left
):
    reader = open_page(page_file)
    reader.between(field, least, most)
    reader.lists(*left)
    reader.counts(len(left), 7)


def test_it_says_so_when_no_row_is_left(open_page, page_file):
    reader = open_page(page_file)
    reader.between("gain", "5")
    reader.counts(0, 7)
    reader.expect(reader.page.get_by_text("No row is like that")).to_be_visible()
    reader.leave()
    reader.page.keyboard.press("j")


@pytest.mark.parametrize(
    ("field", "order", "first"),
    [
        ("ifd_before", "asc", [0, 1, 2]),
        ("ifd_before", "desc", [2, 1, 0]),
        ("gain", "asc", [2, 1, 0]),
        ("rifd_after", "desc", [2, 0, 1]),
        ("start", "desc", [3, 5, 4]),
        ("row", "desc", [6, 5, 4]),
        ("recycled", "asc", [0, 1, 4]),
    ],
)
def test_rows_sort_by_any_column_and_nulls_come_last(open_page, page_file, field, order, first):
    reader = open_page(page_file)
    reader.page.select_option("#sort", field)
    reader.page.select_option("#order", order)
    rows = reader.page.locator('.tabulator-row [tabulator-field="row"]')
    for place, number in enumerate(first):
        reader.expect(rows.nth(place)).to_have_text(str(number))


def test_a_click_on_a_heading_sorts(open_page, page_file):
    reader = open_page(page_file)
    heading = reader.page.locator('.tabulator-col[tabulator-field="rifd_after"]')
    heading.click()
    reader.expect(heading).to_have_attribute("aria-sort", "ascending")
    assert reader.column("row")[:3] == ["1", "0", "2"]
    assert reader.page.input_value("#sort") == "rifd_after"


# ---------------------------------------------------------------- search


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (FOUND, [5]),
        (FOUND.upper(), [5]),
        ("Zebra", [3]),
        ("R2.", [4]),
        ("Old 2", [2]),
        ("NEW ASK 1", [1]),
        ("\\n", []),
    ],
)
def test_search_finds_texts_before_and_after_and_in_critiques(open_page, page_file, text, left):
    reader = open_page(page_file)
    reader.search(text)
    reader.shows("#found", f"{len(left)} found, all rows searched")
    reader.counts(len(left), 7)
    reader.lists(*left)
    reader.search("")
    reader.counts(7, 7)


def test_search_narrows_down_what_the_filters_leave(open_page, page_file):
    reader = open_page(page_file)
    reader.choose(recycled="both")
    reader.search("Ask 1")
    reader.shows("#found", "1 found, all rows searched")
    reader.counts(0, 7)
    reader.choose(recycled="instruction")
    reader.lists(1)


def test_rows_that_the_result_leaves_out_say_so(open_page, tmp_path):
    source = folder(tmp_path / "result", keep="reflected", train=[row(0, 0, 0), row(1, 0), row(2)])
    reader = open_page(written(source), "#train/2")
    reader.shows("#detail .badge:not(.status)", "left out")
    reader.choose(recycled="left out")
    reader.lists(1, 2)


# ---------------------------------------------------------------- the chosen row


EDITED = row(
    8,
    0,
    0,
    original={"instruction": "Name the big cat.", "input": "Be brief.", "response": "It is a cat.\nA cat purrs."},
    instruction_reflections=[
        reflection(
            instruction="Name the small grey cat.",
            input="Be brief.",
            response="It is a tom.",
            critique="Which one?",
            ifd=score(0.75),
            rifd=score(0.25),
        ),
        reflection("unparsed", reason="no markers", critique=None, oracle="second"),
        reflection(instruction="Name a dog.", input="", response="Rex", oracle="third", ifd=score(None, "too_short")),
    ],
    response_reflections=[reflection(response="It is a cat.\nA cat sleeps.", critique="Why?", rifd=score(0.125))],
    ifd_score=score(0.875),
    rifd_score=score(0.064),
)


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> Path:
    turns = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi"}]
    scripts = [
        row(place, None, 0, original={"response": before}, response_reflections=[reflection(response=after)])
        for place, (before, after) in enumerate(
            [("我喜欢吃苹果", "我喜欢吃香蕉"), ("Это старый дом", "Это новый дом"), ("one two three", "four five six")]
        )
    ]
    scripts.append(row(3, original={"context": turns}))
    return written(folder(tmp_path_factory.mktemp("edited") / "result", train=[EDITED, *scripts]))


def test_the_words_that_changed_are_marked_and_no_others(open_page, edited):
    reader = open_page(edited, "#train/8")
    reader.opens("train / 8")
    assert reader.words("instruction", "del") == ["big"]
    assert reader.words("instruction", "ins") == ["small grey"]
    assert reader.words("input", "del") == reader.words("input", "ins") == []
    assert (reader.words("response", "del"), reader.words("response", "ins")) == (["purrs"], ["sleeps"])
    assert reader.part("response", "ins") == "It is a cat.\nA cat purrs."
    assert reader.part("response", "del") == "It is a cat.\nA cat sleeps."


@pytest.mark.parametrize(
    ("place", "removed", "added"),
    [(0, ["苹果"], ["香蕉"]), (1, ["старый"], ["новый"]), (2, ["one two three"], ["four five six"])],
)
def test_words_are_words_in_scripts_without_spaces_and_in_other_alphabets(open_page, edited, place, removed, added):
    reader = open_page(edited, f"#train/{place}")
    reader.opens(f"train / {place}")
    assert (reader.words("response", "del"), reader.words("response", "ins")) == (removed, added)


def test_the_original_can_be_compared_with_every_candidate(open_page, edited):
    reader = open_page(edited, "#train/8")
    reader.opens("train / 8")
    options = reader.page.locator("#candidate option")
    assert options.all_text_contents() == [
        "what the row ended with",
        "Instruction rewrite 1 (teacher): ok, kept",
        "Instruction rewrite 2 (second): unparsed",
        "Instruction rewrite 3 (third): ok",
        "Response rewrite 1 (teacher): ok, kept",
    ]
    assert options.nth(2).is_disabled()
    reader.page.select_option("#candidate", index=3)
    assert [reader.part(part, "del") for part in PARTS] == ["Name a dog.", "", "Rex"]
    assert [reader.part(part, "ins") for part in PARTS] == [EDITED["original"][part] for part in PARTS]
    reader.page.select_option("#candidate", index=1)
    assert reader.part("response", "del") == "It is a tom."
    reader.page.select_option("#candidate", index=4)
    assert reader.part("instruction", "del") == "Name the small grey cat."
    assert reader.part("response", "del") == "It is a cat.\nA cat sleeps."


def test_both_texts_can_be_read_side_by_side(open_page, edited):
    reader = open_page(edited, "#train/8")
    reader.page.get_by_label("side by side").check()
    sides = reader.page.locator("[data-part=response] .sides .text").all_text_contents()
    assert sides == ["It is a cat.\nA cat purrs.", "It is a cat.\nA cat sleeps."]
    assert reader.words("response", "del") == []


def test_every_score_is_listed_with_its_losses_tokens_and_status(open_page, edited):
    reader = open_page(edited, "#train/8")
    lines = [line.split("\t") for line in reader.page.locator("#scores tbody tr").all_inner_texts()]
    assert [line[-6:] for line in lines] == [
        ["IFD", "0.750", f"{2 + math.log(0.75):.3f}", "2.000", "31 / 31", "ok"],
        ["r-IFD", "0.250", f"{2 + math.log(0.25):.3f}", "2.000", "31 / 31", "ok"],
        ["IFD", "–", "–", "–", "31 / 31", "too_short"],
        ["r-IFD", f"{0.125:.3f}", f"{2 + math.log(0.125):.3f}", "2.000", "31 / 31", "ok"],
        ["IFD", "0.875", f"{2 + math.log(0.875):.3f}", "2.000", "31 / 31", "ok"],
        ["r-IFD", f"{0.064:.3f}", f"{2 + math.log(0.064):.3f}", "2.000", "31 / 31", "ok"],
    ]


def test_every_reflection_is_shown_with_status_reason_critique_and_decision(open_page, edited):
    reader = open_page(edited, "#train/8")
    cards = reader.page.locator(".reflection")
    assert cards.locator("h5").all_text_contents() == [
        "Instruction rewrite 1 (teacher)",
        "Instruction rewrite 2 (second)",
        "Instruction rewrite 3 (third)",
        "Response rewrite 1 (teacher)",
    ]
    assert cards.locator(".status").all_text_contents() == ["ok", "unparsed", "ok", "ok"]
    assert cards.locator("blockquote").all_text_contents() == ["Which one?", "Too short.", "Why?"]
    assert cards.locator(".reason").all_text_contents() == ["no markers"]
    assert reader.page.locator(".phase .decision").all_text_contents() == [
        "Decision: rewrite 1 kept (higher_ifd)",
        "Decision: rewrite 1 kept (lower_rifd)",
    ]


def test_earlier_turns_are_shown(open_page, edited):
    reader = open_page(edited, "#train/3")
    reader.opens("train / 3")
    reader.page.get_by_text("Earlier turns (2)").click()
    assert reader.page.locator(".earlier .text").all_text_contents() == ["Hello there", "Hi"]


def test_a_row_that_could_not_be_read_says_why(open_page, page_file):
    reader = open_page(page_file, "#train/6")
    reader.opens("train / 6")
    assert reader.page.locator("#detail .text").first.text_content() == "instruction is a number"
    assert reader.page.locator("#candidate").count() == 0


# ---------------------------------------------------------------- keys and addresses


def test_j_and_k_go_through_what_is_left_in_its_order(open_page, page_file):
    reader = open_page(page_file)
    reader.opens("train / 0")
    reader.choose(instruction_decision="higher_ifd")
    reader.page.select_option("#sort", "row")
    reader.page.select_option("#order", "desc")
    reader.lists(4, 1, 0)
    reader.leave()
    for key, name in (("k", 1), ("k", 4), ("k", 4), ("j", 1), ("j", 0), ("j", 0)):
        reader.page.keyboard.press(key)
        reader.opens(f"train / {name}")
    assert reader.page.locator(".tabulator-row.chosen").count() == 1
    assert reader.page.locator(".tabulator-row.chosen a").inner_text() == "0"


def test_j_starts_at_the_top_when_the_chosen_row_is_filtered_out(open_page, page_file):
    reader = open_page(page_file, "#train/0")
    reader.choose(recycled="original")
    reader.lists(3, 5, 6)
    reader.opens("train / 0")
    reader.leave()
    reader.page.keyboard.press("j")
    reader.opens("train / 3")


def test_the_slash_goes_to_the_search_and_escape_leaves_it(open_page, page_file):
    reader = open_page(page_file)
    focused = "document.activeElement.id"
    reader.page.keyboard.press("/")
    assert reader.page.evaluate(focused) == "text"
    reader.page.keyboard.type("jk?/")
    assert reader.page.input_value("#text") == "jk?/"
    reader.opens("train / 0")
    reader.page.keyboard.press("Escape")
    assert reader.page.evaluate(focused) != "text"


def test_a_question_mark_shows_the_keys(open_page, page_file):
    reader = open_page(page_file)
    dialog = reader.page.get_by_role("dialog")
    reader.page.keyboard.press("?")
    assert dialog.is_visible()
    assert dialog.locator("kbd").all_text_contents() == ["j", "k", "/", "Esc", "?"]
    reader.page.keyboard.press("j")
    reader.opens("train / 0")
    reader.page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_the_address_opens_a_row_and_follows_the_choice(open_page, page_file):
    reader = open_page(page_file, "#train/4")
    reader.opens("train / 4")
    steps = reader.page.evaluate("history.length")
    reader.page.locator(".tabulator-row").nth(2).click()
    reader.opens("train / 2")
    assert reader.page.evaluate("location.hash") == "#train/2"
    reader.page.get_by_role("link", name="5", exact=True).click()
    reader.opens("train / 5")
    assert reader.page.evaluate("location.hash") == "#train/5"
    assert reader.page.evaluate("history.length") == steps
    reader.page.evaluate("location.hash = '#train/1'")
    reader.opens("train / 1")


@pytest.mark.parametrize("hash", ["#train/99", "#other/1", "#%E0%A4/1"])
def test_an_address_without_a_row_says_so(open_page, page_file, hash):
    reader = open_page(page_file, hash)
    reader.expect(reader.page.locator("#detail")).to_contain_text("There is no row")


def test_splits_have_their_own_rows_with_the_same_numbers(open_page, tmp_path):
    source = folder(tmp_path / "result", alpha=[row(1, original={"response": "of alpha"})], train=[row(1), row(2)])
    file = written(source)
    reader = open_page(file, "#alpha/1")
    reader.opens("alpha / 1")
    reader.lists(1, 2, 1)
    assert reader.part("response", "ins") == "of alpha"
    assert reader.column("split") == ["train", "train", "alpha"]
    reader.choose(split="alpha")
    reader.counts(1, 3)
    reader.page.evaluate("location.hash = '#train/1'")
    reader.opens("train / 1")
    assert reader.part("response", "ins") == "Old 1."


# ---------------------------------------------------------------- hostile data


HOSTILE = {
    "script": "<script>window.pwned=1</script>",
    "end of a script": "</script><script>window.pwned=1</script><!--",
    "image": "<img src=x onerror=\"window.pwned=1\"><svg onload='window.pwned=1'>",
    "template": "{{7*7}}{% for x in y %}${7*7}",
    "attribute": "\"' onmouseover=window.pwned=1 x='",
    "direction": "safe \u202egnp.exe\u202c \u2067rtl\u2069 مرحبا שלום",
    "emoji": "👩\u200d👩\u200d👧 🏳️\u200d🌈 é",
    "entities": "&lt;b&gt; &amp; &#0;",
    "prototype": "__proto__",
    "lines": "one\r\ntwo\u2028three\tfour  five",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_row_says_is_shown_as_text(open_page, tmp_path, name):
    text = HOSTILE[name]
    cursed = reflection(instruction=text, input=text, response=f"{text}!", critique=text, reason=text, oracle=text)
    hostile = row(
        0,
        0,
        original={part: text for part in PARTS} | {"context": [{"role": text, "content": text}]},
        instruction_reflections=[cursed, {**cursed, "status": text}],
        instruction_decision={"kept": "rewrite", "candidate": 0, "reason": text},
        recycled=text,
        ifd_score={**score(0.5), "status": text},
    )
    reader = open_page(written(folder(tmp_path / "result", train=[hostile])))
    reader.opens("train / 0")
    for part in PARTS:
        assert reader.part(part, "ins") == text
    assert reader.part("response", "del") == f"{text}!"
    assert reader.page.locator(".reflection blockquote").first.text_content() == text
    assert reader.page.locator(".reflection h5").first.text_content() == f"Instruction rewrite 1 ({text})"
    assert reader.column("start")[0].split() == text.split()
    for tag in ("script", "img", "svg", "b"):
        assert reader.page.locator(f"#browser {tag}, #detail {tag}").count() == 0
    reader.choose(recycled=text)
    reader.page.hover(".tabulator-row")
    reader.counts(1, 1)
    assert reader.page.evaluate("window.pwned") is None


def test_control_characters_are_made_visible(open_page, tmp_path):
    hostile = row(0, original={"response": "a\x00b\x1b[31mc\rd\x7fe\tf\r\ng"})
    reader = open_page(written(folder(tmp_path / "result", train=[hostile])))
    reader.opens("train / 0")
    assert reader.part("response", "ins") == "a␀b␛[31mc␍d␡e\tf\r\ng"


def test_direction_of_one_text_does_not_reach_the_next(open_page, tmp_path):
    source = folder(tmp_path / "result", train=[row(0, None, 0, original={"response": "\u202eold"})])
    reader = open_page(written(source))
    reader.opens("train / 0")
    for selector in ("[data-part=response] .text", "[data-part=response] del", "[data-part=response] ins"):
        style = reader.page.locator(selector).first.evaluate("(element) => getComputedStyle(element).unicodeBidi")
        assert style.startswith("isolate")
    assert reader.page.locator("[data-part=response] .text").get_attribute("dir") == "auto"


def test_names_of_folders_and_splits_are_text(open_page, tmp_path):
    split = "a<b>&\"'%#?"
    reader = open_page(written(folder(tmp_path / "<b>bold<img src=x>", train=[row(1)], **{split: [row(1)]})))
    assert reader.page.title() == reader.page.locator("h1").text_content() == "<b>bold<img src=x>"
    reader.page.locator(".tabulator-row").nth(1).click()
    reader.opens(f"{split} / 1")
    hash = reader.page.evaluate("location.hash")
    reader.page.evaluate("location.hash = '#train/1'")
    reader.opens("train / 1")
    reader.page.evaluate("(hash) => { location.hash = hash; }", hash)
    reader.opens(f"{split} / 1")


def test_very_long_texts_are_compared_or_shown_whole(open_page, tmp_path):
    before = " ".join(f"a{i}" for i in range(9_000))[:50_000]
    after = " ".join(f"b{i}" for i in range(9_000))[:50_000]
    similar = row(
        1, None, 0, original={"response": f"{before} end"}, response_reflections=[reflection(response=f"{before} fin")]
    )
    different = row(
        2, None, 0, original={"response": before}, response_reflections=[reflection(response=after)]
    )  # fmt: skip
    reader = open_page(written(folder(tmp_path / "result", train=[similar, different])), "#train/1")
    reader.opens("train / 1")
    assert (reader.words("response", "del"), reader.words("response", "ins")) == (["end"], ["fin"])
    reader.page.keyboard.press("j")
    reader.opens("train / 2")
    assert reader.page.locator("[data-part=response] .sides .text").all_text_contents() == [before, after]
    assert "too different to mark words" in reader.text


def test_fields_that_are_null_are_no_trouble(open_page, tmp_path):
    bare = {name: None for name in REFLECTIONS}
    nothing = {"kept": "original", "candidate": None, "reason": None}
    empty = bare | {
        "row_id": 3,
        "original": {"instruction": None, "input": None, "response": None},
        "instruction_reflections": [{"status": None}],
        "instruction_decision": nothing,
        "response_decision": nothing,
        "recycled": "original",
    }
    infinite = row(4, original={"ifd": {**score(0.5), "value": math.inf, "conditioned_loss": math.inf}})
    reader = open_page(written(folder(tmp_path / "result", train=[empty, infinite])), "#train/3")
    reader.opens("train / 3")
    assert "Nothing was scored" in reader.text
    reader.page.keyboard.press("j")
    reader.opens("train / 4")
    assert reader.page.locator("#scores tbody tr").first.inner_text().split("\t")[-5] == "inf"


# ---------------------------------------------------------------- many rows


MANY, LATE = 50_000, 49_321


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    size = 1000
    chunk = pa.Table.from_pylist(
        [row(k, 0 if k % 10 == 0 else None, original={"ifd": score((k + 1) / size)}) for k in range(size)], SCHEMA
    )
    chunks = [
        chunk.set_column(0, "row_id", pa.array(range(start, start + size), pa.int64()))
        for start in range(0, MANY, size)
    ]
    late = row(LATE, original={"ifd": score(3.0)}, response_reflections=[reflection(critique=FOUND)])
    place, last = LATE % size, chunks[LATE // size]
    middle = pa.Table.from_pylist([late], SCHEMA)
    chunks[LATE // size] = pa.concat_tables([last.slice(0, place), middle, last.slice(place + 1)])
    return written(folder(tmp_path_factory.mktemp("many") / "result", train=pa.concat_tables(chunks)))


def test_fifty_thousand_rows_open_filter_sort_and_can_be_walked(open_page, many):
    reader = open_page(many)
    reader.counts(MANY, MANY)
    reader.page.keyboard.press("j")
    reader.opens("train / 1")
    reader.choose(recycled="instruction")
    reader.counts(MANY // 10, MANY)
    reader.leave()
    reader.page.keyboard.press("j")
    reader.opens("train / 0")
    reader.page.keyboard.press("j")
    reader.opens("train / 10")
    reader.choose(recycled="")
    reader.page.select_option("#sort", "ifd_before")
    reader.page.select_option("#order", "desc")
    reader.expect(reader.page.locator('.tabulator-row [tabulator-field="row"]').first).to_have_text(str(LATE))
    reader.page.evaluate(f"location.hash = '#train/{LATE - 1}'")
    reader.opens(f"train / {LATE - 1}")
    reader.expect(reader.page.locator(".tabulator-row.chosen")).to_be_in_viewport()


def test_search_finds_a_critique_in_the_last_of_many_pieces(open_page, many):
    reader = open_page(many)
    reader.search(FOUND)
    reader.shows("#found", "1 found, all rows searched")
    reader.lists(LATE)
    reader.leave()
    reader.page.keyboard.press("j")
    reader.opens(f"train / {LATE}")


def test_a_new_search_ends_the_one_before(open_page, many):
    reader = open_page(many)
    reader.search("Old 7.")  # one row in every thousand
    reader.expect(reader.page.locator("#found")).to_contain_text("searched")
    reader.search(FOUND)
    reader.shows("#found", "1 found, all rows searched")
    reader.counts(1, MANY)


def test_of_more_rows_it_has_an_evenly_spread_sample_and_says_so(open_page, tmp_path):
    source = folder(tmp_path / "result", train=[row(i) for i in range(7)], other=[row(i) for i in range(3)])
    reader = open_page(written(source, rows=4))
    reader.counts(4, 4)
    reader.lists(1, 3, 6, 1)  # places 1, 3, 6 and 8 of ten
    assert reader.page.get_by_text("An evenly spread sample: 4 of 10 rows.").is_visible()


# ---------------------------------------------------------------- what a run writes


def test_it_shows_what_a_real_run_wrote(open_page, server, student, tmp_path):
    asked = [
        {
            "instruction": f"Describe thing number {i}.",
            "input": "" if i % 2 else "In prose.",
            "output": f"Thing {i} is.",
        }
        for i in range(6)
    ]
    out = tmp_path / "recycled"
    recycle(
        Dataset.from_list(asked), out, oracle=server.url, student=student, journal=tmp_path / "journal", progress=False
    )
    (default,) = (out / "data").glob("*.parquet")
    ended = {made["row_id"]: made for made in pq.read_table(default).to_pylist()}
    reader = open_page(written(out))
    reader.counts(6, 6)
    for i, source in enumerate(asked):
        reader.page.evaluate(f"location.hash = '#train/{i}'")
        reader.opens(f"train / {i}")
        assert [reader.part(part, "ins") for part in PARTS] == [source[k] for k in ("instruction", "input", "output")]
        assert [reader.part(part, "del") for part in PARTS] == [
            ended[i][k] for k in ("instruction", "input", "output")
        ]
        known = [ended[i][name] for name in ("ifd_original", "ifd", "rifd_original", "rifd")]
        cells = [reader.column(name)[i] for name in ("ifd_before", "ifd_after", "rifd_before", "rifd_after")]
        assert cells == ["–" if value is None else f"{value:.3f}" for value in known]


# ---------------------------------------------------------------- looks


COLOURS = """(selectors) => selectors.flatMap((selector) => [...document.querySelectorAll(selector)].slice(0, 3)
  .filter((element) => element.checkVisibility()).map((element) => {
    let ground = element;
    while (ground.parentElement && getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') {
      ground = ground.parentElement;
    }
    return [selector, getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
  }))"""
TEXTS = (
    "h1", ".facts dt", ".facts dd", ".tables th", ".tables td", ".muted", "#count", "button", "legend",
    "#fields label",
    ".tabulator-col-title", ".tabulator-cell span", ".tabulator-cell a", ".tabulator-row.chosen .tabulator-cell a",
    ".badge", ".badge.both", ".badge.instruction", ".up", ".down", "#detail h3", "#detail h4", ".text", ".text ins",
    ".text del", "#scores td", "#scores th", ".decision", ".note", "blockquote .text", "#keys dd",
)  # fmt: skip


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(open_page, page_file, scheme):
    reader = open_page(page_file, "#train/0", color_scheme=scheme)
    reader.opens("train / 0")
    reader.page.keyboard.press("?")
    seen = reader.page.evaluate(COLOURS, list(TEXTS))
    assert {selector for selector, _, _ in seen} >= set(TEXTS) - {".note"}
    for selector, ink, ground in seen:
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (selector, ink, ground)
    back = luminance(reader.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert back > 0.5 if scheme == "light" else back < 0.1


@pytest.mark.parametrize("width", [360, 700, 1200, 1600])
def test_nothing_is_wider_than_the_window(open_page, page_file, width):
    reader = open_page(page_file, "#train/0", viewport={"width": width, "height": 800})
    reader.opens("train / 0")
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= width


def test_changes_can_be_told_apart_without_colour(open_page, page_file):
    reader = open_page(page_file, "#train/0")
    reader.opens("train / 0")
    line = "(element) => getComputedStyle(element).textDecorationLine"
    assert reader.page.locator("#detail ins").first.evaluate(line) == "underline"
    assert reader.page.locator("#detail del").first.evaluate(line) == "line-through"


def test_every_control_has_a_name(open_page, page_file):
    reader = open_page(page_file, "#train/0")
    reader.opens("train / 0")
    nameless = reader.page.evaluate(
        """[...document.querySelectorAll('input, select, button')].filter((element) =>
          !element.labels?.length && !element.ariaLabel && !element.textContent.trim()).map((e) => e.outerHTML)"""
    )
    assert nameless == []


# ---------------------------------------------------------------- the file


def pieces(file: Path) -> list[str]:
    return re.findall(
        r'<script type="application/octet-stream" id="[^"]+">(.*?)</script>', file.read_text("utf-8"), re.S
    )


def test_rows_are_in_it_as_base64_without_raw_replies(page_file):
    assert len(pieces(page_file)) == 2
    for piece in pieces(page_file):
        assert re.fullmatch(r"[A-Za-z0-9+/]+=*", piece)
        json.loads(unpacked := gzip.decompress(base64.b64decode(piece)))
        assert b"RAW" not in unpacked
    assert FOUND not in page_file.read_text("utf-8")


def test_the_same_result_makes_the_same_file(tmp_path):
    source = folder(tmp_path / "result", train=varied())
    first = written(source).read_bytes()
    assert written(source).read_bytes() == first


def test_libraries_are_the_published_ones_and_come_with_their_licences(page_file):
    vendor = files("hf_reflect.report") / "vendor"
    listed = dict(re.findall(r"^\| (\S+) \|.*\| ([0-9a-f]{64}) \|$", (vendor / "README.md").read_text("utf-8"), re.M))
    assert set(listed) == {entry.name for entry in vendor.iterdir()} - {"README.md"}
    for name, digest in listed.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest
    page = page_file.read_text("utf-8")
    for holder in ("Copyright (c) 2015-2026 Oli Folkerd", "Copyright (c) 2009-2015, Kevin Decker"):
        assert holder in page


def test_what_can_not_be_written_is_said_and_leaves_nothing(tmp_path):
    source = folder(tmp_path / "result", train=[row(0)])
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "page.html", tmp_path / "folder"):
        with pytest.raises(OutputError, match=re.escape(str(target))):
            write_report(source, target, tables=[], pictures=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "result"]


def test_a_damaged_result_is_said_and_the_former_page_stays(tmp_path):
    source = folder(tmp_path / "result", train=[row(i) for i in range(300)])
    before = written(source).read_bytes()
    (file,) = (source / "reflections").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + b"\xff" * 2000 + whole[2004:])
    with pytest.raises(SourceError, match="can't be read"):
        written(source)
    file.write_bytes(b"no parquet")
    with pytest.raises(SourceError, match="can't be read"):
        written(source)
    assert source.with_name("result.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result", "result.html"]


def test_a_folder_that_is_no_result_is_refused(tmp_path):
    with pytest.raises(HfReflectError, match="no result of a run"):
        written(tmp_path)
    assert not list(tmp_path.glob("*.html"))
