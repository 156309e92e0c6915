from dataclasses import replace

import pytest
import yaml

from hf_reflect.errors import RecipeError
from hf_reflect.prompts import Prompts
from hf_reflect.recipe import FILE, Recipe


RECIPE = Recipe(
    source={"path": "data/alpaca.json", "content": "abc", "split": None, "limit": 100},
    method="selective",
    keep="all",
    gate_first=False,
    oracles=[
        {
            "spec": "http://localhost:8000/v1#teacher",
            "identity": {"model": "teacher", "endpoint": "http://localhost:8000/v1"},
            "sampling": {"max_tokens": 2048, "temperature": 0.0, "top_p": 1.0, "seed": None},
            "prompts": Prompts.load("paper").to_dict(),
        }
    ],
    student={"spec": "local", "identity": {"model": "student", "dtype": "float32"}},
    version="0.1.0",
    guards={"names": ["language", "code", "copy"]},
    retry_truncated=4096,
)
[ORACLE] = RECIPE.oracles
SECOND = {**ORACLE, "spec": "local", "identity": {"model": "second", "hash": "1"}}


def changed(part, **values):
    return replace(RECIPE, **{part: {**getattr(RECIPE, part), **values}})


def asked(**values):
    """The recipe with something else about its oracle."""
    return replace(RECIPE, oracles=[{**ORACLE, **values}])


@pytest.mark.parametrize(
    "other",
    [
        changed("source", path="/elsewhere/alpaca.json"),
        asked(spec="local:teacher.gguf"),
        changed("student", spec="student.gguf"),
        replace(RECIPE, version="9.9"),
        replace(RECIPE, source=dict(reversed(RECIPE.source.items()))),
    ],
    ids=["path", "oracle spec", "student spec", "version", "order"],
)
def test_the_hash_does_not_see_what_decides_nothing(other):
    assert other.hash == RECIPE.hash


OTHERS = {
    "content": changed("source", content="abd"),
    "split": changed("source", split="test"),
    "limit": changed("source", limit=101),
    "revision": changed("source", revision="main"),
    "method": replace(RECIPE, method="reflect"),
    "keep": replace(RECIPE, keep="reflected"),
    "gate": replace(RECIPE, gate_first=True),
    "prompts": asked(prompts=Prompts.load("json").to_dict()),
    "one word of the prompts": asked(prompts={**ORACLE["prompts"], "response": {"user": "Better: {pair}"}}),
    "prompt version": asked(prompts={**ORACLE["prompts"], "version": "2"}),
    "oracle": asked(identity={"model": "other", "endpoint": "http://localhost:8000/v1"}),
    "endpoint": asked(identity={"model": "teacher", "endpoint": "http://other/v1"}),
    "sampling": asked(sampling={**ORACLE["sampling"], "seed": 1}),
    "a second oracle": replace(RECIPE, oracles=[ORACLE, SECOND]),
    "the oracles in another order": replace(RECIPE, oracles=[SECOND, ORACLE]),
    "fewer guards": changed("guards", names=["language"]),
    "a threshold of a guard": changed("guards", names=["length"], longest=3.0),
    "more room for what was cut off": replace(RECIPE, retry_truncated=8192),
    "no second time for what was cut off": replace(RECIPE, retry_truncated=None),
    "student": changed("student", identity={"model": "student", "dtype": "bfloat16"}),
    "no student": replace(RECIPE, student=None),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_hash_changes_with_everything_that_decides(what):
    assert OTHERS[what].hash != RECIPE.hash


def test_no_two_of_these_recipes_have_the_same_hash():
    assert len({recipe.hash for recipe in OTHERS.values()}) == len(OTHERS)


@pytest.mark.parametrize("student", [RECIPE.student, None])
def test_a_recipe_comes_back_from_its_file(tmp_path, student):
    recipe = replace(RECIPE, student=student, oracles=[ORACLE, SECOND])
    (tmp_path / FILE).write_text(recipe.to_yaml(), "utf-8")
    assert Recipe.read(tmp_path / FILE) == recipe
    assert Recipe.read(str(tmp_path)) == recipe
    assert Recipe.read(tmp_path).hash == recipe.hash


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "null",
        "1e5",
        "0123",
        "2024-01-01",
        "---\n# no: comment\n",
        " leading and trailing \n\n",
        "🌙 é\u2028\x85\t\x00\x07",
        "'\"`{{ x }}`\"'",
        "!!python/object:os.system",
        "x" * 500 + " " + "y" * 500,
        "",
    ],
)
def test_any_text_comes_back_from_the_file_as_it_was(tmp_path, text):
    recipe = asked(prompts={**ORACLE["prompts"], "name": text})
    (tmp_path / FILE).write_text(recipe.to_yaml(), "utf-8")
    assert Recipe.read(tmp_path).oracles[0]["prompts"]["name"] == text
    assert Recipe.read(tmp_path).hash == recipe.hash


def test_the_file_says_its_hash_and_the_version_that_made_it():
    data = yaml.safe_load(RECIPE.to_yaml())
    assert (data["hash"], data["hf_reflect"]) == (RECIPE.hash, "0.1.0")


def test_the_prompts_in_a_recipe_are_prompts_again():
    data = yaml.safe_load(RECIPE.to_yaml())
    assert Prompts.from_dict(data["oracles"][0]["prompts"]) == Prompts.load("paper")


def test_a_recipe_need_not_speak_of_guards_and_of_asking_twice(tmp_path):
    data = yaml.safe_load(RECIPE.to_yaml())
    del data["guards"], data["retry_truncated"]
    (tmp_path / FILE).write_text(yaml.safe_dump(data), "utf-8")
    recipe = Recipe.read(tmp_path)
    assert (recipe.guards, recipe.retry_truncated) == ({}, None)
    assert recipe == replace(RECIPE, guards={}, retry_truncated=None)


@pytest.mark.parametrize("lacking", ["source", "method", "keep", "gate_first", "oracles"])
def test_what_a_recipe_lacks_is_named(tmp_path, lacking):
    data = yaml.safe_load(RECIPE.to_yaml())
    del data[lacking]
    (tmp_path / FILE).write_text(yaml.safe_dump(data), "utf-8")
    with pytest.raises(RecipeError, match=f"lacks {lacking}"):
        Recipe.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"- a\n- b\n", b"", b"source: [", b"\xff\xfe\x00", b"!!python/object/apply:os.getcwd []"],
    ids=["list", "nothing", "broken", "binary", "code"],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(RecipeError, match=FILE):
        Recipe.read(tmp_path)


@pytest.mark.parametrize("value", ["just text", 7, ["text"]])
@pytest.mark.parametrize("part", ["source", "oracles", "student", "guards"])
def test_a_part_of_another_shape_is_named(tmp_path, part, value):
    data = {**yaml.safe_load(RECIPE.to_yaml()), part: value}
    (tmp_path / FILE).write_text(yaml.safe_dump(data), "utf-8")
    with pytest.raises(RecipeError, match=part.rstrip("s")):
        Recipe.read(tmp_path)


@pytest.mark.parametrize("part", ["identity", "sampling", "prompts"])
def test_an_oracle_that_lacks_a_part_is_named(tmp_path, part):
    data = yaml.safe_load(RECIPE.to_yaml())
    for oracle in ({name: value for name, value in ORACLE.items() if name != part}, {**ORACLE, part: "text"}):
        (tmp_path / FILE).write_text(yaml.safe_dump({**data, "oracles": [ORACLE, oracle]}), "utf-8")
        with pytest.raises(RecipeError, match=part):
            Recipe.read(tmp_path)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match="nowhere"):
        Recipe.read(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="no result of a run"):
        Recipe.read(tmp_path)
