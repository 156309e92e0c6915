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
    prompts=Prompts.load("paper").to_dict(),
    oracle={
        "spec": "http://localhost:8000/v1",
        "identity": {"model": "teacher", "endpoint": "http://localhost:8000/v1"},
        "sampling": {"max_tokens": 2048, "temperature": 0.0, "top_p": 1.0, "seed": None},
    },
    student={"spec": "local", "identity": {"model": "student", "dtype": "float32"}},
    version="0.1.0",
)


def changed(part, **values):
    return replace(RECIPE, **{part: {**getattr(RECIPE, part), **values}})


@pytest.mark.parametrize(
    "other",
    [
        changed("source", path="/elsewhere/alpaca.json"),
        changed("oracle", spec="local:teacher.gguf"),
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
    "prompts": replace(RECIPE, prompts=Prompts.load("json").to_dict()),
    "one word of the prompts": changed("prompts", response={"user": "Better: {pair}"}),
    "prompt version": changed("prompts", version="2"),
    "oracle": changed("oracle", identity={"model": "other", "endpoint": "http://localhost:8000/v1"}),
    "endpoint": changed("oracle", identity={"model": "teacher", "endpoint": "http://other/v1"}),
    "sampling": changed("oracle", sampling={**RECIPE.oracle["sampling"], "seed": 1}),
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
    recipe = replace(RECIPE, student=student)
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
    recipe = changed("prompts", name=text)
    (tmp_path / FILE).write_text(recipe.to_yaml(), "utf-8")
    assert Recipe.read(tmp_path).prompts["name"] == text
    assert Recipe.read(tmp_path).hash == recipe.hash


def test_the_file_says_its_hash_and_the_version_that_made_it():
    data = yaml.safe_load(RECIPE.to_yaml())
    assert (data["hash"], data["hf_reflect"]) == (RECIPE.hash, "0.1.0")


def test_the_prompts_in_a_recipe_are_prompts_again():
    data = yaml.safe_load(RECIPE.to_yaml())
    assert Prompts.from_dict(data["prompts"]) == Prompts.load("paper")


@pytest.mark.parametrize("lacking", ["source", "method", "keep", "gate_first", "prompts", "oracle"])
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


@pytest.mark.parametrize("part", ["source", "oracle", "prompts", "student"])
def test_a_part_of_another_shape_is_named(tmp_path, part):
    data = {**yaml.safe_load(RECIPE.to_yaml()), part: "just text"}
    (tmp_path / FILE).write_text(yaml.safe_dump(data), "utf-8")
    with pytest.raises(RecipeError, match=part):
        Recipe.read(tmp_path)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match="nowhere"):
        Recipe.read(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match=FILE):
        Recipe.read(tmp_path)
