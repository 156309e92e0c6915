import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value

from hf_reflect.errors import OutputError
from hf_reflect.output import OutputFolder, write_whole
from hf_reflect.recipe import FILE, Recipe


RECIPE = Recipe(
    source={"path": "a.json", "content": "abc"},
    method="selective",
    keep="all",
    gate_first=False,
    oracles=[{"spec": "x", "identity": {"model": "teacher"}, "sampling": {}, "prompts": {"name": "paper"}}],
    student=None,
    version="0.1.0",
)
OTHER = replace(RECIPE, method="reflect")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "work" / "out"


@pytest.fixture(scope="module")
def dead_pid():
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def rows(*texts):
    return Dataset.from_dict({"output": list(texts)}, features=Features({"output": Value("string")}))


def run(path, *texts, recipe=RECIPE, overwrite=False, card="card"):
    """A whole run: writes some rows and lets the folder appear."""
    folder = OutputFolder(path, recipe, overwrite=overwrite)
    folder.write("default", "train", rows(*texts))
    folder.finish(lambda _: card)


def texts(path):
    return pq.read_table(path / "data").column("output").to_pylist()


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_folder_appears_only_when_all_is_written(out):
    folder = OutputFolder(out, RECIPE)
    assert not out.exists()
    folder.write("default", "train", rows("a"))
    assert not out.exists()
    folder.finish(lambda _: "card")
    assert names(out) == ["README.md", "data", FILE]
    assert names(out.parent) == ["out"]


def test_rows_come_in_the_order_they_were_written_in_and_each_split_has_its_file(out):
    folder = OutputFolder(out, RECIPE)
    for split, text in [("train", "a"), ("test", "x"), ("train", "b")]:
        folder.write("default", split, rows(text))
    folder.write("reflections", "train", rows("r"))
    said = {}
    folder.finish(lambda files: said.update(files) or "card")
    assert sorted(said) == ["default", "reflections"]
    assert sorted(said["default"]) == ["test", "train"]
    assert names(out / "data") == sorted(Path(file).name for file in said["default"].values())
    assert pq.read_table(out / said["default"]["train"]).column("output").to_pylist() == ["a", "b"]
    assert pq.read_table(out / "reflections").column("output").to_pylist() == ["r"]


def test_another_content_has_another_file_name_and_the_same_content_the_same(out):
    for place, text in [("first", "a"), ("same", "a"), ("other", "b")]:
        run(out / place, text)
    first, same, other = (names(out / place / "data") for place in ("first", "same", "other"))
    assert first == same != other


def test_files_hold_their_text_and_the_recipe_its_recipe(out):
    run(out, "a", card="é 🌙\n")
    assert (out / "README.md").read_text("utf-8") == "é 🌙\n"
    assert Recipe.read(out) == RECIPE


def test_rows_of_nulls_alone_do_not_change_the_type_of_those_that_follow(out):
    folder = OutputFolder(out, RECIPE)
    folder.write("default", "train", rows(None))
    folder.write("default", "train", rows("b"))
    folder.finish(lambda _: "card")
    assert texts(out) == [None, "b"]


def test_a_discarded_run_leaves_nothing(out):
    folder = OutputFolder(out, RECIPE)
    folder.write("default", "train", rows("a"))
    folder.discard()
    assert names(out.parent) == []


def test_a_discarded_run_leaves_the_earlier_result(out):
    run(out, "old")
    folder = OutputFolder(out, RECIPE)
    folder.write("default", "train", rows("new"))
    folder.discard()
    assert (texts(out), names(out.parent)) == (["old"], ["out"])


def test_the_same_recipe_again_brings_the_folder_up_to_date(out):
    run(out, "old")
    folder = OutputFolder(out, replace(RECIPE, version="0.2.0"))
    folder.write("default", "train", rows("new"))
    assert texts(out) == ["old"]
    folder.finish(lambda _: "card")
    assert (texts(out), names(out.parent)) == (["new"], ["out"])


def test_the_result_of_another_recipe_is_left_alone(out):
    run(out, "old")
    with pytest.raises(OutputError, match="--overwrite") as error:
        OutputFolder(out, OTHER)
    assert RECIPE.hash in str(error.value)
    assert OTHER.hash in str(error.value)
    assert (texts(out), names(out.parent)) == (["old"], ["out"])


def test_the_result_of_another_recipe_is_replaced_if_asked(out):
    run(out, "old", card="old card")
    run(out, "new", recipe=OTHER, overwrite=True)
    assert (texts(out), Recipe.read(out), names(out.parent)) == (["new"], OTHER, ["out"])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "content", [{"thesis.tex": "years of work"}, {FILE: "eggs: 3"}, {FILE: "- flour"}, {"data/x": ""}]
)
def test_a_folder_of_somebody_elses_is_refused_whatever_is_asked(out, content, overwrite):
    for name, text in content.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    with pytest.raises(OutputError, match="left alone"):
        OutputFolder(out, RECIPE, overwrite=overwrite)
    assert all((out / name).read_text() == text for name, text in content.items())
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_recipe_for_something_else_makes_no_folder_ours(out, overwrite):
    out.mkdir(parents=True)
    parts = ("source", "method", "keep", "gate_first", "oracles")
    (out / FILE).write_text("".join(f"{part}: soup\n" for part in parts))
    with pytest.raises(OutputError, match="left alone"):
        OutputFolder(out, RECIPE, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_its_place_is_refused(out, overwrite):
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(OutputError, match="left alone"):
        OutputFolder(out, RECIPE, overwrite=overwrite)
    assert out.read_text() == "mine"


def test_an_empty_folder_in_its_place_is_used(out):
    out.mkdir(parents=True)
    run(out, "a")
    assert (texts(out), names(out.parent)) == (["a"], ["out"])


@pytest.mark.parametrize("kind", ["partial", "old"])
@pytest.mark.parametrize("name", ["out", "out.v1", "run[1]", "what?", "out-2"])
def test_what_a_dead_process_left_is_removed(tmp_path, dead_pid, kind, name):
    out = tmp_path / name
    run(out, "result")
    left = tmp_path / f".{name}.{kind}-{dead_pid}"
    (left / "data").mkdir(parents=True)
    (left / "data" / "x.parquet").write_text("half")
    run(out, "again")
    assert (texts(out), names(tmp_path)) == (["again"], [name])


@pytest.mark.parametrize("name", ["out", "out.v1", "run[1]"])
def test_a_result_that_a_dead_process_had_moved_aside_is_put_back(tmp_path, dead_pid, name):
    out = tmp_path / name
    run(out, "result")
    out.rename(tmp_path / f".{name}.old-{dead_pid}")
    OutputFolder(out, RECIPE).discard()
    assert (texts(out), names(tmp_path)) == (["result"], [name])


def test_what_was_put_back_is_guarded_like_any_result(out, dead_pid):
    run(out, "result")
    out.rename(out.with_name(f".out.old-{dead_pid}"))
    with pytest.raises(OutputError, match="--overwrite"):
        OutputFolder(out, OTHER)
    assert texts(out) == ["result"]


def test_what_a_living_process_is_writing_is_left_alone(out):
    other = out.with_name(f".out.partial-{os.getppid()}")
    other.mkdir(parents=True)
    run(out, "a")
    assert names(out.parent) == [other.name, "out"]


@pytest.mark.parametrize(
    "name", [".out.partial-", ".out.partial-x", ".out.backup-1", ".out.b.partial-1", ".outer.old-1"]
)
def test_what_only_looks_like_a_leftover_is_left_alone(out, name):
    (out.parent / name).mkdir(parents=True)
    run(out, "a")
    assert names(out.parent) == sorted([name, "out"])


def test_a_link_to_an_earlier_result_is_no_obstacle(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    run(disk / "out", "old")
    link = tmp_path / "here" / "out"
    link.parent.mkdir()
    link.symlink_to(disk / "out", target_is_directory=True)
    run(link, "new")
    assert (texts(link), names(link.parent)) == (["new"], ["out"])
    run(link, "newer")
    assert (texts(link), names(link.parent)) == (["newer"], ["out"])


def test_a_place_that_can_not_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="journal"):
        OutputFolder(tmp_path / "file" / "out", RECIPE)


def test_a_relative_path_is_meant_from_where_the_run_began(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = OutputFolder("out", RECIPE)
    folder.write("default", "train", rows("a"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder.finish(lambda _: "card")
    assert texts(tmp_path / "out") == ["a"]


def test_a_report_stays_as_long_as_it_says_what_is_true(out):
    run(out, "a")
    (out / "report.html").write_text("about a", "utf-8")
    run(out, "a", card="written again")
    assert (out / "report.html").read_text("utf-8") == "about a"
    run(out, "b")
    assert names(out) == ["README.md", "data", FILE]


def test_pictures_of_a_former_result_do_not_stay(out):
    folder = OutputFolder(out, RECIPE)
    folder.write("default", "train", rows("a"))
    folder.finish(lambda _: "card", {"pictures/flow.png": b"old"})
    assert (out / "pictures" / "flow.png").read_bytes() == b"old"
    run(out, "b")
    assert names(out) == ["README.md", "data", FILE]


def test_what_is_no_file_is_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="no file"):
        write_whole(pipe, [b"x"])
    assert pipe.is_fifo()


def test_row_groups_have_a_thousand_rows(out):
    folder = OutputFolder(out, RECIPE)
    for _ in range(12):
        folder.write("default", "train", rows(*["x"] * 200))
    folder.finish(lambda _: "card")
    (file,) = (out / "data").iterdir()
    metadata = pq.read_metadata(file)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1000, 1000, 400]
