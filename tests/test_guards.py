"""Guards: what a rewrite must not do, and what it may."""

import json
import math
import sys
from itertools import permutations
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from datasets import Dataset
from oracle_server import completion
from test_transforms import alpaca
from typer.testing import CliRunner

from hf_reflect import recycle
from hf_reflect.cli import app
from hf_reflect.embeddings import load_embedder
from hf_reflect.errors import RecipeError
from hf_reflect.guards import DEFAULT_GUARDS, GUARDS, Guards
from hf_reflect.pairs import Pair
from hf_reflect.recipe import Recipe


RIVER = {
    "ar": "ينبع النهر من الجبال ويعبر ثلاث دول قبل أن يصب في البحر بالقرب من مدينة ساحلية قديمة. يعيش سكان ضفافه منذ "
    "قرون على صيد السمك والزراعة، ويقيمون كل ربيع عيدا كبيرا ليشكروه على ما يقدمه لهم.",
    "de": "Der Fluss entspringt in den Bergen, durchquert drei Länder und mündet bei einer alten Hafenstadt ins Meer. "
    "Seit Jahrhunderten leben die Menschen an seinen Ufern vom Fischfang und von der Landwirtschaft.",
    "en": "The river rises in the mountains, crosses three countries and reaches the sea near an old harbour town. "
    "For centuries the people on its banks have lived by fishing and farming.",
    "es": "El río nace en las montañas, atraviesa tres países y desemboca en el mar cerca de una antigua ciudad "
    "portuaria. Desde hace siglos los vecinos de sus orillas viven de la pesca y del campo.",
    "fr": "Le fleuve prend sa source dans les montagnes, traverse trois pays et se jette dans la mer près d'un vieux "
    "port. Depuis des siècles, les habitants de ses rives vivent de la pêche et de l'agriculture.",
    "hi": "यह नदी पहाड़ों से निकलती है, तीन देशों से होकर बहती है और एक पुराने बंदरगाह शहर के पास समुद्र में मिल जाती है। "
    "किनारे पर रहने वाले लोग मछली पकड़ते हैं और खेती करते हैं।",
    "ja": "その川は山々に源を発し、三つの国を流れ、古い港町の近くで海に注いでいます。"
    "沿岸の人々は何世代にもわたって漁業と農業で暮らし、毎年春には川に感謝する大きな祭りを開いています。",
    "ru": "Река берёт начало в горах, пересекает три страны и впадает в море недалеко от старого портового города. "
    "Жители её берегов веками живут рыбной ловлей и земледелием.",
    "zh": "这条河发源于高山之中，流经三个国家，最后在一座古老的港口城市附近流入大海。"
    "沿岸的人们世世代代靠捕鱼和种田为生，每年春天都会举行盛大的节日来感谢这条养育了他们的河流。",
}
"""The same paragraph in languages of several families and scripts."""

FRENCH_QUESTION = "Décris en deux phrases le cours d'un fleuve de ton choix, de sa source jusqu'à la mer."
ENGLISH_QUESTION = "Describe in two sentences the course of a river of your choice, from its source to the sea."
CODE = "Use a loop:\n\n```python\nfor i in range(3):\n    print(i)\n```\n"


def finding(before: Pair, after: Pair, critique: str | None = None, names=DEFAULT_GUARDS, **thresholds) -> str | None:
    """The status that the guards give a rewrite."""
    found = Guards(tuple(names), **thresholds).check(before, after, critique)
    return found and found[0]


def new_response(before: str, after: str, question: str = "Do it.", **options) -> str | None:
    """The same for a rewrite of the response alone."""
    pair = Pair(question, before)
    return finding(pair, pair.replace(response=after), **options)


class TestLanguage:
    @pytest.mark.parametrize(("one", "other"), [(code, "en") for code in RIVER if code != "en"] + [("en", "fr")])
    def test_a_response_in_another_language_is_found(self, one, other):
        assert new_response(RIVER[one], RIVER[other], names=["language"]) == "language_changed"

    @pytest.mark.parametrize("code", RIVER)
    def test_a_response_that_keeps_to_its_language_passes(self, code):
        better = RIVER[code][len(RIVER[code]) // 3 :] + " " + RIVER[code]
        assert new_response(RIVER[code], better, names=["language"]) is None

    def test_a_french_answer_to_a_french_instruction_passes(self):
        pair = Pair(FRENCH_QUESTION, "Il coule vers la mer.")
        assert finding(pair, pair.replace(response=RIVER["fr"])) is None

    def test_the_finding_names_both_languages(self):
        before = Pair(FRENCH_QUESTION, RIVER["fr"])
        status, reason = Guards(("language",)).check(before, before.replace(response=RIVER["en"]), None)
        assert status == "language_changed"
        assert "response" in reason
        assert reason.index("fr") < reason.index("en")

    def test_an_instruction_in_another_language_is_found(self):
        before, after = Pair(FRENCH_QUESTION, RIVER["fr"]), Pair(ENGLISH_QUESTION, RIVER["en"])
        assert finding(before, after) == "language_changed"
        assert "instruction" in Guards().check(before, after, None)[1]

    def test_a_new_instruction_may_ask_for_another_language(self):
        before = Pair(ENGLISH_QUESTION, RIVER["en"])
        after = Pair(ENGLISH_QUESTION + " Answer in French, in the words of a geographer.", RIVER["fr"])
        assert finding(before, after) is None

    def test_what_a_translation_is_into_is_what_counts(self):
        pair = Pair("Translate the following paragraph into French.", RIVER["fr"], RIVER["en"])
        assert finding(pair, pair.replace(response="En français : " + RIVER["fr"])) is None
        assert finding(pair, pair.replace(response="Here it is. " + RIVER["en"] * 2)) == "language_changed"

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("Oui.", RIVER["en"]),
            ("Paris", "The capital of France is Paris."),
            (RIVER["en"], "C'est un fleuve."),
            ("42", RIVER["fr"]),
            ("", RIVER["fr"]),
            ("12 34 56 " * 40, RIVER["de"]),
        ],
    )
    def test_a_text_too_short_to_tell_is_not_judged(self, before, after):
        assert new_response(before, after, names=["language"]) is None

    def test_code_and_addresses_have_no_language(self):
        english = "if the value is not none and the user has been there before then return the name of the user"
        for unread in (
            f"```python\n{english}\n```",
            f"`{english}`",
            "https://example.org/" + english.replace(" ", "-"),
        ):
            assert new_response(RIVER["fr"], unread, names=["language"]) is None
            assert new_response(RIVER["fr"], f"{RIVER['fr']}\n{unread * 3}", names=["language"]) is None
            assert new_response(RIVER["en"], f"{RIVER['fr']}\n{unread * 3}", names=["language"]) is not None

    def test_a_code_block_that_is_not_closed_is_code_to_its_end(self):
        unclosed = f"{RIVER['de']}\n```\n{RIVER['en'] * 3}"
        assert new_response(RIVER["de"], unclosed, names=["language"]) is None
        assert new_response(RIVER["en"], unclosed, names=["language"]) is not None


class TestCode:
    @pytest.mark.parametrize("code", [CODE, CODE.replace("```", "~~~"), CODE.replace("```", "  ```"), "```\nx = 1"])
    def test_a_response_without_the_code_block_that_was_there_is_found(self, code):
        assert new_response(code, "Use a loop over the numbers.") == "code_lost"

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (CODE, "Better:\n```\nprint(*range(3))\n```"),
            (CODE, "Better:\n\n~~~py\nprint(*range(3))\n~~~"),
            ("Use `range`.", "Use a loop over the numbers."),
            ("Write ``` to open a block, they say.", "Write three backticks, they say."),
            ("Use a loop.", CODE),
        ],
    )
    def test_a_response_that_keeps_its_code_or_had_no_block_passes(self, before, after):
        assert new_response(before, after) is None

    def test_a_new_instruction_may_ask_for_something_without_code(self):
        assert finding(Pair("Print numbers.", CODE), Pair("Explain loops.", "A loop repeats a step.")) is None


class TestCopy:
    PAIR = Pair("Name three moons\nof Jupiter, please.", "Io, Europa, Ganymede.", "It has many.")

    @pytest.mark.parametrize(
        ("response", "what"),
        [
            ("Name three moons\nof Jupiter, please.", "the instruction"),
            ("  Name three   moons of Jupiter,\tplease.\n", "the instruction"),
            ("It names\nonly three.", "the critique"),
            ("It has many.", "the input"),
        ],
    )
    def test_a_response_that_repeats_what_it_was_given_is_found(self, response, what):
        found = Guards().check(self.PAIR, self.PAIR.replace(response=response), "It names only three.")
        assert found == ("copied", f"the new response is {what}, word for word")

    @pytest.mark.parametrize("response", ["Name a moon of Mars.", "Name three moons of Jupiter, please."])
    def test_a_response_that_is_the_new_or_the_original_instruction_is_found(self, response):
        assert finding(self.PAIR, Pair("Name a moon of Mars.", response)) == "copied"

    def test_an_instruction_that_is_the_original_response_is_found(self):
        assert finding(self.PAIR, Pair("Io, Europa,  Ganymede.", "These are moons of Jupiter.")) == "copied"

    @pytest.mark.parametrize(
        "response",
        [
            "Name three moons of Jupiter, please. Io, Europa, Ganymede.",
            "name three moons of jupiter, please.",
            "Io, Europa, Ganymede and Callisto.",
            "It names only three. It has many.",
        ],
    )
    def test_a_response_that_only_quotes_passes(self, response):
        assert finding(self.PAIR, self.PAIR.replace(response=response), "It names only three.") is None

    def test_a_response_that_had_always_been_a_copy_passes(self):
        pair = Pair("Repeat: hello", "hello", "hello")
        assert finding(pair, Pair("Repeat it, please.", "hello", "hello")) is None

    @pytest.mark.parametrize("critique", [None, ""])
    def test_without_a_critique_and_an_input_nothing_is_a_copy_of_them(self, critique):
        assert finding(Pair("Say it.", "It."), Pair("Say it.", "It is said."), critique) is None


class TestLength:
    @pytest.mark.parametrize(
        ("longest", "before", "after", "status"),
        [
            (10.0, 100, 49, "too_short"),
            (10.0, 100, 50, None),
            (10.0, 100, 1000, None),
            (10.0, 100, 1001, "too_long"),
            (3.0, 100, 300, None),
            (3.0, 100, 301, "too_long"),
            (1.5, 3, 2, None),
            (1.5, 3, 1, "too_short"),
        ],
    )
    def test_less_than_half_is_too_short_and_more_than_so_many_times_too_long(self, longest, before, after, status):
        texts = "x" * before, "y" * after
        assert new_response(*texts, names=["length"], longest=longest) == status

    def test_the_finding_says_the_lengths(self):
        pair = Pair("Do it.", "x" * 40)
        _, reason = Guards(("length",), longest=2).check(pair, pair.replace(response="y" * 90), None)
        assert "from 40 to 90" in reason

    def test_where_there_was_no_response_any_length_is_right(self):
        assert new_response("", "y" * 5000, names=["length"]) is None

    def test_unless_asked_for_it_is_not_made(self):
        assert "length" not in DEFAULT_GUARDS
        assert new_response("x" * 100, "y" * 5000, names=DEFAULT_GUARDS) is None


VECTORS = {"Name a moon.": (1.0, 0.0), "Name a planet.": (0.8, 0.6), "Bake a cake.": (0.2, math.sqrt(0.96))}
"""Embeddings of length 1, so the first coordinate is the cosine with the first."""


@pytest.fixture
def embeddings(monkeypatch):
    """A stand-in for sentence-transformers, whose models no test can download; gives the loaded models' names."""
    import numpy as np

    loaded = []

    class SentenceTransformer:
        def __init__(self, name, **_):
            if name == "nowhere":
                raise OSError("nowhere is\nno model")
            loaded.append(name)

        def encode(self, texts, **_):
            return np.array([VECTORS[text] for text in texts])

    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    load_embedder.cache_clear()
    yield loaded
    load_embedder.cache_clear()


@pytest.fixture
def no_embeddings(monkeypatch):
    """As if the extra were not installed."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    load_embedder.cache_clear()


class TestSimilarity:
    @pytest.mark.parametrize(
        ("new", "least", "status"),
        [
            ("Name a planet.", 0.79, None),
            ("Name a planet.", 0.81, "unrelated"),
            ("Bake a cake.", 0.19, None),
            ("Bake a cake.", 0.21, "unrelated"),
            ("Name a moon.", 1.1, None),  # the response phase: nothing to compare
        ],
    )
    def test_an_instruction_below_the_least_cosine_is_unrelated(self, embeddings, new, least, status):
        before, after = Pair("Name a moon.", "Io."), Pair(new, "Io, Europa.")
        assert finding(before, after, names=["similarity"], similarity=least) == status

    def test_the_finding_says_the_cosine(self, embeddings):
        found = Guards(("similarity",)).check(Pair("Name a moon.", "Io."), Pair("Bake a cake.", "Mix."), None)
        assert found == ("unrelated", "the new instruction is unlike the original (cosine 0.20)")

    def test_the_model_is_the_one_that_is_named_and_is_loaded_once(self, embeddings):
        for _ in range(2):
            Guards(("similarity",), embeddings="folder/of/mine")
        assert embeddings == ["folder/of/mine"]

    def test_a_model_that_can_not_be_loaded_is_one_line(self, embeddings):
        with pytest.raises(RecipeError, match="nowhere") as raised:
            Guards(("similarity",), embeddings="nowhere")
        assert "\n" not in str(raised.value)

    def test_without_the_extra_one_line_names_it(self, no_embeddings):
        with pytest.raises(RecipeError, match=r"coherence.*pip install") as raised:
            Guards(("language", "similarity"))
        assert "\n" not in str(raised.value)

    def test_unless_asked_for_the_extra_is_not_needed(self, no_embeddings):
        assert Guards(("length", "copy", "code", "language")).names == GUARDS[:4]


class TestChoosing:
    @pytest.mark.parametrize("names", [("fancy",), ("language", "Code"), ("",)])
    def test_a_guard_that_is_not_known_is_refused_with_those_that_are(self, names):
        with pytest.raises(RecipeError, match=", ".join(GUARDS)):
            Guards(names)

    def test_unless_told_otherwise_language_code_and_copy_are_guarded(self):
        assert Guards().names == DEFAULT_GUARDS == ("language", "code", "copy")

    def test_without_guards_anything_goes(self):
        before = Pair(FRENCH_QUESTION, RIVER["fr"] + "\n" + CODE)
        after = Pair(ENGLISH_QUESTION, ENGLISH_QUESTION)
        assert Guards().check(before, after, None) is not None
        assert Guards(()).check(before, after, None) is None

    def test_the_order_in_which_they_are_named_changes_nothing(self):
        before = Pair("Do it.", RIVER["fr"] + "\n" + CODE)
        after = before.replace(response=RIVER["en"] * 20)
        found = {Guards(names, longest=2.0).check(before, after, None) for names in permutations(GUARDS[:4])}
        assert [status for status, _ in found] == ["language_changed"]
        assert len({Guards(names) for names in permutations(GUARDS[:4])}) == 1

    @pytest.mark.parametrize(
        ("chosen", "settings"),
        [
            (Guards(), {"names": ["language", "code", "copy"]}),
            (Guards(()), {"names": []}),
            (Guards(longest=3.0), {"names": ["language", "code", "copy"]}),
            (Guards(("length", "code"), longest=3.0), {"names": ["code", "length"], "longest": 3.0}),
        ],
    )
    def test_as_data_they_are_what_decides_a_finding_and_nothing_else(self, chosen, settings):
        assert json.loads(json.dumps(chosen.to_dict())) == settings
        assert Guards.from_dict(settings).to_dict() == settings

    def test_a_threshold_of_similarity_is_part_of_the_data(self, embeddings):
        chosen = Guards(("similarity",), similarity=0.5, embeddings="mine")
        assert chosen.to_dict() == {"names": ["similarity"], "similarity": 0.5, "embeddings": "mine"}
        assert Guards.from_dict(chosen.to_dict()) == chosen


# In a run


def copies_the_instruction(call):
    """The server answers every question with the question."""
    return completion(call, "It is short.\n[New Instruction]\nName a cat.\n[End]\n[New Response]\nName a cat.\n[End]")


def test_a_rewrite_that_a_guard_stops_leaves_its_row_as_it_was_with_status_reason_and_critique(server, tmp_path):
    server.rule = copies_the_instruction
    options = {"student": None, "method": "reflect", "journal": tmp_path / "journal", "progress": False}
    result = recycle(Dataset.from_list(alpaca(3)), oracle=server.url, **options)
    assert result.summary.statuses["instruction", "copied"] == 3
    for before, after, row in zip(alpaca(3), result.dataset, result.reflections, strict=True):
        assert {name: after[name] for name in before} == before
        assert (after["recycled"], row["instruction_decision"]["reason"]) == ("original", "no_rewrite")
        (reflection,) = row["instruction_reflections"]
        assert (reflection["status"], reflection["critique"]) == ("copied", "It is short.")
        assert "word for word" in reflection["reason"]
        assert [reflection[part] for part in ("instruction", "input", "response")] == [None] * 3
        assert reflection["calls"][0]["text"].endswith("Name a cat.\n[End]")


def test_other_guards_make_another_result_of_the_same_replies(server, tmp_path):
    server.rule = copies_the_instruction
    options = {"student": None, "method": "reflect", "journal": tmp_path / "journal", "progress": False}
    source = Dataset.from_list(alpaca(3))
    guarded = recycle(source, oracle=server.url, **options)
    asked = {call.digest for call in server.completions}
    free = recycle(source, oracle=server.url, guards=Guards(()), **options)
    assert [row["instruction"] for row in free.dataset] == ["Name a cat."] * 3
    assert guarded.recipe.hash != free.recipe.hash
    first_phase = [call for call in server.completions if "exactly these two blocks" in call.user]
    assert len(first_phase) == 3  # what was said of the instructions was not paid for twice
    assert {call.digest for call in first_phase} <= asked


def cli(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def command(server, tmp_path) -> list[object]:
    """A run without a student."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in alpaca(3)))
    options = ["--oracle", server.url, "--method", "reflect", "--student", "none", "--journal", tmp_path / "journal"]
    return ["recycle", source, tmp_path / "out", *options]


def recipe_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "recipe.yaml").read_text())


@pytest.mark.parametrize(
    ("words", "recorded"),
    [
        ([], {"names": ["language", "code", "copy"]}),
        (["--guards", "none"], {"names": []}),
        (["--guards", "language,length", "--longest", 3], {"names": ["language", "length"], "longest": 3.0}),
        (["--guards", "copy, code"], {"names": ["code", "copy"]}),
        (["--longest", 4], {"names": ["language", "code", "copy", "length"], "longest": 4.0}),
        (["--guards", "code", "--longest", 2.5], {"names": ["code", "length"], "longest": 2.5}),
    ],
)
def test_the_guards_of_a_command_are_in_its_recipe_which_makes_the_same_again(command, tmp_path, words, recorded):
    done = cli(*command, *words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert recipe_of(tmp_path / "out")["guards"] == recorded
    assert Recipe.read(tmp_path / "out").guards == recorded
    _, source, out, *_ = command
    done = cli("recycle", source, tmp_path / "again", "--config", out, "--journal", tmp_path / "journal")
    assert done.exit_code == 0, (done.output, done.exception)
    assert recipe_of(tmp_path / "again")["hash"] == recipe_of(tmp_path / "out")["hash"]
    assert recipe_of(tmp_path / "again")["guards"] == recorded


def test_guards_stop_in_a_command_what_they_stop_in_python(command, server, tmp_path):
    server.rule = copies_the_instruction
    guarded, free = cli(*command), cli(*command, "--guards", "none", "--overwrite")
    assert "reflections copied" in guarded.output
    assert "reflections copied" not in free.output


@pytest.mark.parametrize("words", [["--guards", "fancy"], ["--guards", "language,fancy"]])
def test_a_guard_that_a_command_does_not_know_is_refused_before_anything_is_asked(command, server, tmp_path, words):
    done = cli(*command, *words)
    assert isinstance(done.exception, RecipeError)
    assert "fancy" in str(done.exception)
    assert not (tmp_path / "out").exists()
    assert not server.calls


@pytest.mark.parametrize("words", [["--guards", "similarity"], ["--similarity", 0.5]])
def test_similarity_without_its_extra_is_refused_before_anything_is_asked(command, server, no_embeddings, words):
    done = cli(*command, *words)
    assert isinstance(done.exception, RecipeError)
    assert "coherence" in str(done.exception)
    assert not server.calls
