import pytest
import yaml

from hf_reflect.errors import PromptError
from hf_reflect.pairs import Pair, Turn
from hf_reflect.prompts import PHASES, STYLES, Prompts, describe, fill


MINE = {
    "name": "mine",
    "version": "3",
    "style": "paper",
    "instruction": {"system": "You review.", "user": "Better this: {pair}"},
    "response": {"user": "Answer better: {pair}"},
}


def changed(phase, part, text):
    return {**MINE, phase: {**MINE[phase], part: text}}


@pytest.mark.parametrize("style", STYLES)
def test_every_built_in_style_loads_by_its_name(style):
    prompts = Prompts.load(style)
    assert (prompts.style, prompts.name) == (style, style)
    assert set(prompts.texts) == set(PHASES)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("phase", PHASES)
def test_every_built_in_prompt_shows_the_pair_and_leaves_no_placeholder(style, phase):
    prompts = Prompts.load(style)
    pair = Pair("the question?", "the answer.", input="the material")
    values = {"critique": "too short", "new_instruction": "the question?"}
    for part in prompts.texts[phase]:
        if part != "system":
            user = prompts.messages(phase, part, pair, values)[-1]["content"]
            assert "the question?" in user
            assert "{" not in user


@pytest.mark.parametrize("style", STYLES)
def test_the_built_in_criteria_are_those_of_the_paper(style):
    prompts = Prompts.load(style)
    said = {phase: " ".join(" ".join(prompts.texts[phase].values()).lower().split()) for phase in PHASES}
    for criterion in ("complexity", "level of detail", "knowledge required", "ambiguity", "logical reasoning"):
        assert criterion.split()[0] in said["instruction"]
    for criterion in ("helpfulness", "relevance", "accuracy", "level of details"):
        assert criterion in said["response"]


def test_prompts_are_read_from_a_users_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(MINE), "utf-8")
    prompts = Prompts.load(file)
    assert prompts == Prompts.load(str(file))
    assert prompts.messages("instruction", "user", Pair("Q", "A"), {}) == (
        {"role": "system", "content": "You review."},
        {"role": "user", "content": "Better this: ### Instruction\nQ\n\n### Response\nA"},
    )


def test_a_file_without_a_name_is_called_after_itself(tmp_path):
    file = tmp_path / "strict.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in MINE.items() if key != "name"}), "utf-8")
    assert Prompts.load(file).name == "strict"


def test_prompts_without_a_system_text_send_none():
    messages = Prompts.from_dict(MINE).messages("response", "user", Pair("Q", "A"), {})
    assert [message["role"] for message in messages] == ["user"]


def test_prompts_that_are_loaded_already_stay_themselves():
    prompts = Prompts.from_dict(MINE)
    assert Prompts.load(prompts) is prompts


def test_a_dictionary_of_prompts_makes_the_same_prompts_again():
    prompts = Prompts.load("staged")
    assert Prompts.from_dict(prompts.to_dict()) == prompts


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("just text", "must hold a mapping"),
        (None, "must hold a mapping"),
        ({**MINE, "style": "haiku"}, "style must be one of paper, json, staged, not 'haiku'"),
        ({key: value for key, value in MINE.items() if key != "style"}, "style must be one of"),
        ({**MINE, "style": ["paper"]}, "style must be one of"),
        ({key: value for key, value in MINE.items() if key != "response"}, "'response' is missing"),
        ({**MINE, "response": "text"}, "'response' is missing"),
        ({**MINE, "response": {"system": "S"}}, "response.user is missing"),
        (changed("response", "user", "  "), "response.user is missing"),
        (changed("instruction", "user", 5), "instruction.user is missing or not text"),
        ({**MINE, "style": "staged"}, "instruction.critique is missing"),
    ],
)
def test_a_missing_part_is_named(data, complaint):
    with pytest.raises(PromptError, match=complaint):
        Prompts.from_dict(data, "mine.yaml")


def test_a_file_that_is_not_yaml_is_named(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("style: [paper", "utf-8")
    with pytest.raises(PromptError, match=r"broken\.yaml is not YAML"):
        Prompts.load(file)


def test_a_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "photo.yaml"
    file.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(PromptError, match=r"photo\.yaml"):
        Prompts.load(file)


def test_a_spec_that_is_neither_style_nor_file_says_which_styles_there_are(tmp_path):
    with pytest.raises(PromptError, match="paper, json, staged"):
        Prompts.load(str(tmp_path / "nowhere.yaml"))


def test_the_id_has_name_and_version():
    assert Prompts.from_dict(MINE).id.startswith("mine/3/")


@pytest.mark.parametrize(
    "other",
    [
        changed("instruction", "user", "Better that: {pair}"),
        changed("instruction", "system", "You check."),
        changed("response", "user", "Answer better, {pair}"),
        {**MINE, "style": "json"},
    ],
)
def test_the_id_changes_with_every_text(other):
    assert Prompts.from_dict(other).id != Prompts.from_dict(MINE).id


def test_the_id_does_not_depend_on_the_order_of_the_file():
    assert Prompts.from_dict(dict(reversed(MINE.items()))).id == Prompts.from_dict(MINE).id


def test_inserted_text_is_not_looked_at_again():
    values = {"pair": "{response} and {pair}", "response": "{critique}", "critique": "never"}
    assert fill("{pair} | {response}", values) == "{response} and {pair} | {critique}"


@pytest.mark.parametrize("text", ["{}", "{0}", "{unknown}", "{{pair}", "{ pair }", "%s", "${pair", "{pair.x}", "\\1"])
def test_braces_that_are_no_placeholder_stay(text):
    expected = "{P" if text == "{{pair}" else text
    assert fill(text, {"pair": "P"}) == expected


def test_a_placeholder_without_a_value_stays():
    assert fill("{critique}", {}) == "{critique}"


def test_a_backslash_in_a_value_is_just_a_backslash():
    assert fill("{pair}", {"pair": r"\1 \g<0> \n"}) == r"\1 \g<0> \n"


def test_the_pair_is_described_part_by_part_and_the_question_without_its_response():
    pair = Pair("Sort.", "1, 3", input="3, 1", context=(Turn("user", "Hello"), Turn("assistant", "Hi")))
    assert describe(pair)["pair"] == (
        "### Conversation so far\nuser: Hello\nassistant: Hi\n\n"
        "### Instruction\nSort.\n\n### Input\n3, 1\n\n### Response\n1, 3"
    )
    assert describe(pair)["question"] == (
        "### Conversation so far\nuser: Hello\nassistant: Hi\n\n### Instruction\nSort.\n\n### Input\n3, 1"
    )


def test_an_empty_response_is_shown_as_empty():
    assert describe(Pair("Sort.", ""))["pair"] == "### Instruction\nSort.\n\n### Response\n"
