"""Two runs over the same rows, side by side: against folders made by hand, of which everything is known."""

import json
import random
from pathlib import Path

import pytest
from test_cards import NASTY, asked, recipe, reflection, row, score
from test_describe import CONTROL, NOTHING, RISKS, fewer_draws, invoke, unreadable, written  # noqa: F401

from hf_reflect.comparing import compare
from hf_reflect.errors import HfReflectError


STUDENT = {"spec": "y", "identity": {"model": "s", "template": "none", "boundary": "exact", "dtype": "float32"}}


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    return tmp_path / "a", tmp_path / "b"


def pair_of(places, one: dict[str, list[dict]], other: dict[str, list[dict]], **names):
    """Two results, compared."""
    first, second = places
    return compare(written(first, one), written(second, other, **names))


def own(row_id: int, *decided, **options) -> dict:
    """A row with an original of its own."""
    original = {"instruction": f"ask {row_id}", **options.pop("original", {})}
    return row(row_id, *decided, original=original, **options)


def turned(comparison) -> dict:
    """A comparison as it is from the other side."""
    said = comparison.to_dict()
    return {
        "names": said["names"][::-1],
        "settings": {name: values[::-1] for name, values in said["settings"].items()},
        "matched": said["matched"],
        "only": said["only"][::-1],
        "others": said["others"],
        "same_text": said["same_text"],
        "recycled": {(n["second"], n["first"]): n["rows"] for n in said["recycled"]},
        "decisions": {(n["phase"], n["second"], n["first"]): n["rows"] for n in said["decisions"]},
        "changed": [
            {
                **one,
                "recycled": one["recycled"][::-1],
                "decisions": {phase: reasons[::-1] for phase, reasons in one["decisions"].items()},
            }
            for one in said["changed"]
        ],
        "statistics": said["statistics"][::-1],
    }


def plain(comparison) -> dict:
    said = comparison.to_dict()
    said["recycled"] = {(n["first"], n["second"]): n["rows"] for n in said["recycled"]}
    said["decisions"] = {(n["phase"], n["first"], n["second"]): n["rows"] for n in said["decisions"]}
    return said


def test_rows_are_matched_by_their_ids_and_every_change_is_counted(places):
    first = [own(0), own(1, True), own(2, True, True), own(3, False, True), own(5), own(6, **NOTHING), unreadable(9)]
    second = [own(0), own(1), own(2, False, True), own(4), own(5, True, True), own(6), unreadable(9), own(10)]
    found = pair_of(places, {"train": first}, {"train": second})
    assert (found.matched, found.only, found.others) == (6, [1, 2], 0)
    # Row 2 ends with the same response, of another instruction; 0, 6 and 9 end as they were.
    assert found.same == 3
    assert found.recycled == {
        ("original", "original"): 3,
        ("instruction", "original"): 1,
        ("both", "response"): 1,
        ("original", "both"): 1,
    }
    assert found.decisions == {
        ("instruction", "not_higher_ifd", "not_higher_ifd"): 1,
        ("instruction", "higher_ifd", "not_higher_ifd"): 2,
        ("instruction", "not_higher_ifd", "higher_ifd"): 1,
        ("instruction", "no_rewrite", "not_higher_ifd"): 1,
        ("instruction", "no_rewrite", "no_rewrite"): 1,
        ("response", "not_lower_rifd", "not_lower_rifd"): 2,
        ("response", "lower_rifd", "lower_rifd"): 1,
        ("response", "not_lower_rifd", "lower_rifd"): 1,
        ("response", "no_rewrite", "not_lower_rifd"): 1,
        ("response", "no_rewrite", "no_rewrite"): 1,
    }
    assert [(one.split, one.row, one.before, one.after, dict(one.decisions)) for one in found.changed] == [
        ("train", 1, "instruction", "original", {"instruction": ("higher_ifd", "not_higher_ifd")}),
        ("train", 2, "both", "response", {"instruction": ("higher_ifd", "not_higher_ifd")}),
        ("train", 5, "original", "both", {
            "instruction": ("not_higher_ifd", "higher_ifd"), "response": ("not_lower_rifd", "lower_rifd"),
        }),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_missing_rows_merge_as_sets_do_and_either_side_may_be_first(tmp_path, seed):
    rng = random.Random(seed)
    sides = []
    for name in ("a", "b"):
        splits = {}
        for split in rng.sample(["train", "test", "dev"], 2):
            ids = sorted(rng.sample(range(40), rng.randint(1, 40)))
            splits[split] = [own(i, rng.random() < 0.5, rng.random() < 0.5) for i in ids]
        sides.append(
            (written(tmp_path / name, splits), {(s, r["row_id"]): r for s, rows in splits.items() for r in rows})
        )
    (first, one), (second, other) = sides
    common = [key for key in one if key in other]
    if not common:
        with pytest.raises(HfReflectError):
            compare(first, second)
        return
    found = compare(first, second)
    assert found.matched == len(common)
    assert found.only == [len(one) - len(common), len(other) - len(common)]
    same = [key for key in common if one[key]["recycled"] == other[key]["recycled"]]
    # Both phases propose the same response: with a new instruction, a text is the same whether the second kept it too.
    alike = {"original": 0, "response": 1, "instruction": 2, "both": 2}
    assert found.same == sum(alike[one[key]["recycled"]] == alike[other[key]["recycled"]] for key in common)
    assert sorted((row.split, row.row) for row in found.changed) == sorted(set(common) - set(same))
    back = compare(second, first)
    mirrored = turned(back)
    mine = plain(found)
    for changed in (mirrored["changed"], mine["changed"]):
        changed.sort(key=lambda row: (row["split"], row["row"]))
    assert mirrored == mine


def test_a_split_that_only_one_has_is_only_there(places):
    one = {"train": [own(0), own(1)], "test": [own(0), own(1), own(2)]}
    found = pair_of(places, one, {"train": [own(0), own(1)]})
    assert (found.matched, found.only) == (2, [3, 0])


def test_a_row_with_another_original_is_another_row(places):
    first = [own(0, True), own(1), own(2), unreadable(3)]
    second = [own(0, True), own(1, original={"input": "more"}), own(2, original={"response": "x"}), own(3)]
    found = pair_of(places, {"train": first}, {"train": second})
    assert (found.matched, found.others, found.same) == (1, 3, 1)
    assert found.changed == []


def test_no_input_and_an_empty_one_are_the_same(places):
    found = pair_of(places, {"train": [own(0, original={"input": None})]}, {"train": [own(0)]})
    assert (found.matched, found.others, found.same) == (1, 0, 1)


def test_other_texts_of_the_same_decision_are_not_the_same_text(places):
    other = own(0, False, True, on_response=reflection(response="Another one."))
    found = pair_of(places, {"train": [own(0, False, True)]}, {"train": [other]})
    assert (found.matched, found.same) == (1, 0)
    assert [(one.row, one.before, one.after, one.decisions) for one in found.changed] == [
        (0, "response", "response", {})
    ]


def test_a_result_is_the_same_as_itself(places):
    folder = written(places[0], {"train": [own(0), own(1, True, True), unreadable(2)]})
    found = compare(folder, folder)
    assert (found.matched, found.same, found.only, found.others) == (3, 3, [0, 0], 0)
    assert (found.settings, found.changed) == ({}, [])


@pytest.mark.parametrize(
    "other",
    [
        {"train": [own(7)]},
        {"test": [own(0)]},
    ],
    ids=["other rows", "another split"],
)
def test_results_without_a_row_in_common_are_refused(places, other):
    first, second = written(places[0], {"train": [own(0)]}), written(places[1], other)
    with pytest.raises(HfReflectError, match="no row in common") as caught:
        compare(first, second)
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)


# Settings


def settings(places, made) -> dict[str, tuple[str, str]]:
    rows = {"train": [own(0)]}
    base = recipe()
    first = written(places[0], rows, made=base)
    return compare(first, written(places[1], rows, made=made)).settings


def test_what_was_made_with_other_settings_says_which(places):
    other = recipe(oracle="mentor", student="pupil", keep="reflected", method="reflect", prompts="json", content="def")
    found = settings(places, other)
    assert set(found) == {"source", "method", "keep", "oracle", "oracle prompts", "student"}
    assert found["oracle"] == ("teacher", "mentor")
    assert found["student"] == ("student", "pupil")
    assert found["keep"] == ("all", "reflected")
    assert tuple(said[:7] for said in found["oracle prompts"]) == ("paper 1", "json 1 ")
    assert "content abc" in found["source"][0]
    assert "content def" in found["source"][1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"student": None}, "student"),
        ({"others": [asked("second")]}, "oracle 2"),
        ({"guards": {"names": ["copy"]}}, "guards"),
    ],
)
def test_each_setting_is_told_by_its_name(places, change, name):
    assert name in settings(places, recipe(**change))


def test_what_decides_nothing_is_no_setting(places):
    assert settings(places, recipe(version="9.9", about={"license": "mit"})) == {}


def test_room_for_a_second_time_is_a_setting(places):
    from dataclasses import replace

    assert settings(places, replace(recipe(), retry_truncated=900))


def test_the_longest_text_of_a_student_is_a_setting(places):
    from dataclasses import replace

    def judged(length):
        identity = {**STUDENT["identity"], "max_length": length}
        return replace(recipe(), student={"spec": "y", "identity": identity})

    rows = {"train": [own(0)]}
    first = written(places[0], rows, made=judged(512))
    assert compare(first, written(places[1], rows, made=judged(2048))).settings


def test_of_two_students_it_is_said_that_their_scores_differ(places):
    rows = {"train": [own(0, ifd=score(1, 2))]}
    first = written(places[0], rows)
    second = written(places[1], rows, student="pupil")
    (means,) = [table for table in compare(first, second).tables() if table.title == "Means of the result"]
    assert "different students" in means.note
    (means,) = [table for table in compare(first, first).tables() if table.title == "Means of the result"]
    assert means.note == ""


# The command


def test_the_command_shows_both_side_by_side(places):
    first = written(places[0], {"train": [own(0, True, ifd=score(1, 2)), own(1, ifd=score(1, 2)), own(2)]})
    second = written(places[1], {"train": [own(0, ifd=score(1, 4)), own(1, ifd=score(2, 4))]}, oracle="mentor")
    done = invoke("diff", first, second)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["oracle", "teacher", "mentor"] in lines
    assert ["in", "both", "sources", "2"] in lines
    assert ["instruction", "original", "1"] in lines
    assert ["instruction", "higher_ifd", "not_higher_ifd", "1"] in lines
    assert ["ifd", "0.500", "(n=2)", "0.375", "(n=2)"] in lines
    assert " ".join(lines[-1]) == "train 0 instruction -> original (instruction: higher_ifd -> not_higher_ifd)"
    assert "train 0" not in invoke("diff", first, second, "--rows", 0).stdout


def test_the_command_gives_json(places):
    first = written(places[0], {"train": [own(0, True), own(1)]})
    second = written(places[1], {"train": [own(0), own(3)]})
    said = json.loads(invoke("diff", first, second, "--json").stdout, parse_constant=pytest.fail)
    assert said["names"] == [str(first), str(second)]
    assert (said["matched"], said["only"], said["others"], said["same_text"]) == (1, [1, 1], 0, 0)
    assert said["recycled"] == [{"first": "instruction", "second": "original", "rows": 1}]
    assert said["changed"] == [
        {
            "split": "train",
            "row": 0,
            "recycled": ["instruction", "original"],
            "decisions": {"instruction": ["higher_ifd", "not_higher_ifd"]},
        }
    ]
    assert [one["rows"] for one in said["statistics"]] == [2, 2]


@pytest.mark.parametrize("kind", RISKS)
def test_text_of_others_reaches_no_terminal_as_control(places, kind):
    evil = NASTY[kind] + "\x1b[31m\x07\u202e"
    first = written(places[0], {"train": [own(0, reasons={"instruction": evil})]})
    second = written(places[1], {"train": [own(0, reasons={"response": evil})]}, oracle=evil, student=evil)
    done = invoke("diff", first, second)
    assert done.exit_code == 0, done.output
    assert not CONTROL.search(done.stdout)
    said = json.loads(invoke("diff", first, second, "--json").stdout)
    assert said["settings"]["oracle"] == ["teacher", evil]


def test_a_folder_that_is_no_result_is_named(places):
    first = written(places[0], {"train": [own(0)]})
    for words in ([first, places[1]], [places[1], first]):
        done = invoke("diff", *words)
        assert isinstance(done.exception, HfReflectError)
        assert str(places[1]) in str(done.exception)


def test_rows_that_a_result_leaves_out_are_said_to_be(places):
    kept, turned_down = own(0, False, True), own(1)
    first = written(places[0], {"train": [kept, turned_down]})
    second = written(places[1], {"train": [kept, turned_down]}, keep="reflected")
    found = compare(first, second)
    assert found.recycled == {("response", "response"): 1, ("original", "left out"): 1}
    assert (found.matched, found.same) == (2, 1)
    assert [(one.row, one.before, one.after) for one in found.changed] == [(1, "original", "left out")]
    assert found.settings == {"keep": ("all", "reflected")}


def test_the_same_outcome_for_another_reason_is_no_difference(places):
    first = {"train": [own(0, True)]}
    second = {"train": [own(0, True, reasons={"instruction": "accepted"})]}
    found = pair_of(places, first, second)
    assert (found.same, found.changed) == (1, [])
    assert found.decisions["instruction", "higher_ifd", "accepted"] == 1
