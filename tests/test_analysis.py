"""Selecting from published losses: every decision worked out by hand."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from typer.testing import CliRunner

from hf_reflect import select_from_analysis
from hf_reflect.analysis import SPLITS
from hf_reflect.cli import app
from hf_reflect.errors import HfReflectError, SourceError


def losses(ifd: float, rifd: float) -> dict:
    """Four losses with these scores: of instruction and response alone, then each given the other.

    The losses alone are 1 and 2, whatever the scores: IFD = exp(given - 2), r-IFD = exp(given - 1).
    """
    given = [1.0 + math.log(rifd), 2.0 + math.log(ifd)]
    loss = [1.0, 2.0, *given]
    return {"loss": loss, "ppl": [math.exp(one) for one in loss]}


NULL = {"loss": [1.0, 2.0, None, None], "ppl": [math.e, math.e**2, None, None]}

# Of each row: (IFD, r-IFD) of the original pair, with the new instruction, with the new response, with both.
# If Q's IFD is above the original's: QA if its r-IFD is below Q's, else Q. Else: A if its r-IFD is below the
# original's, else the original. Then IFD and r-IFD of what was chosen must be below 1, and the response reflected.
ROWS = {
    "QA: both win": ([(0.5, 0.5), (0.6, 0.4), (0.5, 0.1), (0.7, 0.3)], "both", (0.7, 0.3), True),
    "QA against Q, not against the original": (
        [(0.5, 0.1), (0.6, 0.4), (0.5, 0.9), (0.7, 0.3)],
        "both",
        (0.7, 0.3),
        True,
    ),
    "Q: the new response is worse": (
        [(0.5, 0.5), (0.6, 0.4), (0.5, 0.1), (0.7, 0.45)],
        "instruction",
        (0.6, 0.4),
        False,
    ),
    "A: only the response wins": ([(0.5, 0.5), (0.4, 0.1), (0.3, 0.2), (0.9, 0.01)], "response", (0.3, 0.2), True),
    "ori: nothing wins": ([(0.5, 0.5), (0.4, 0.1), (0.9, 0.6), (0.9, 0.1)], "original", (0.5, 0.5), False),
    "a tie of IFD keeps the instruction": (
        [(0.5, 0.5), (0.5, 0.1), (0.3, 0.2), (0.9, 0.01)],
        "response",
        (0.3, 0.2),
        True,
    ),
    "a tie of r-IFD keeps the response": (
        [(0.5, 0.5), (0.4, 0.1), (0.3, 0.5), (0.9, 0.01)],
        "original",
        (0.5, 0.5),
        False,
    ),
    "a tie of r-IFD after the instruction": (
        [(0.5, 0.5), (0.6, 0.4), (0.3, 0.1), (0.9, 0.4)],
        "instruction",
        (0.6, 0.4),
        False,
    ),
    "QA with an IFD of one or more": ([(0.5, 0.5), (0.6, 0.4), (0.5, 0.1), (1.2, 0.3)], "both", (1.2, 0.3), False),
    "QA with an r-IFD of one or more": ([(0.5, 0.5), (0.6, 1.4), (0.5, 0.1), (0.7, 1.3)], "both", (0.7, 1.3), False),
    "A with an IFD of exactly one": ([(0.5, 0.5), (0.4, 0.1), (1.0, 0.2), (0.9, 0.01)], "response", (1.0, 0.2), False),
    "A with an r-IFD of exactly one": (
        [(0.5, 1.5), (0.4, 0.1), (0.3, 1.0), (0.9, 0.01)],
        "response",
        (0.3, 1.0),
        False,
    ),
    "Q above one displaces all the same": ([(0.5, 0.5), (1.6, 0.4), (0.3, 0.1), (0.9, 0.3)], "both", (0.9, 0.3), True),
}

# A null never wins, and loses to any number.
NULLS = {
    "no score of Q": ([(0.5, 0.5), None, (0.3, 0.2), (0.9, 0.1)], "response", (0.3, 0.2), True),
    "no score of Q nor of A": ([(0.5, 0.5), None, None, (0.9, 0.1)], "original", (0.5, 0.5), False),
    "no score of QA": ([(0.5, 0.5), (0.6, 0.4), (0.3, 0.2), None], "instruction", (0.6, 0.4), False),
    "no score of the original": ([None, (0.6, 0.4), (0.3, 0.2), (0.9, 0.1)], "both", (0.9, 0.1), True),
    "only A has a score": ([None, None, (0.3, 0.2), None], "response", (0.3, 0.2), True),
    "no score at all": ([None, None, None, None], "original", (None, None), False),
}


def analysis(rows: list[list]) -> DatasetDict:
    """The splits, from the scores of each row in their order."""
    columns = [[NULL if one is None else losses(*one) for one in split] for split in zip(*rows, strict=True)]
    return DatasetDict({name: Dataset.from_dict({"data": data}) for name, data in zip(SPLITS, columns, strict=True)})


def test_the_losses_by_hand_have_the_scores_that_they_are_called_by():
    instruction, response, instruction_given, response_given = losses(0.25, 0.75)["loss"]
    assert math.exp(response_given) / math.exp(response) == pytest.approx(0.25)
    assert math.exp(instruction_given) / math.exp(instruction) == pytest.approx(0.75)


@pytest.mark.parametrize("name", {**ROWS, **NULLS})
def test_every_branch(name):
    scores, recycled, (ifd, rifd), kept = {**ROWS, **NULLS}[name]
    found = select_from_analysis(analysis([scores]), policy="all")
    assert found.recycled == {recycled: 1}
    (row,) = found.dataset
    assert (row["row_id"], row["recycled"]) == (0, recycled)
    assert row["ifd"] == (None if ifd is None else pytest.approx(ifd))
    assert row["rifd"] == (None if rifd is None else pytest.approx(rifd))
    if kept:
        assert select_from_analysis(analysis([scores])).dataset.to_list() == [row]
    else:
        with pytest.raises(SourceError, match="no row is kept"):
            select_from_analysis(analysis([scores]))


def test_the_rows_of_an_analysis_one_by_one_and_counted():
    cases = list({**ROWS, **NULLS}.values())
    found = select_from_analysis(analysis([scores for scores, *_ in cases]))
    assert found.rows == len(cases)
    assert list(found.dataset["row_id"]) == [i for i, case in enumerate(cases) if case[3]]
    assert found.kept == len(found.dataset) == sum(case[3] for case in cases)
    assert found.not_scored == len(NULLS)
    for what in ("original", "instruction", "response", "both"):
        assert found.recycled[what] == sum(case[1] == what for case in cases)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("all", lambda case: True),
        ("reflected", lambda case: case[1] in ("response", "both")),
        ("below-one", lambda case: case[3]),
    ],
)
def test_the_policies(policy, kept):
    cases = list({**ROWS, **NULLS}.values())
    found = select_from_analysis(analysis([scores for scores, *_ in cases]), policy=policy)
    assert list(found.dataset["row_id"]) == [i for i, case in enumerate(cases) if kept(case)]


def test_a_policy_that_there_is_not_is_refused():
    with pytest.raises(HfReflectError, match="below-one"):
        select_from_analysis(analysis([ROWS["QA: both win"][0]]), policy="best")


def test_the_first_published_row_has_the_scores_of_the_paper_s_code():
    """Perplexities of row 0 of the analysis of Alpaca by Llama 2 7B, as its viewer shows them."""
    loss = [math.log(ppl) for ppl in (33.1582, 4.79594, 14.0309, 3.66547)]
    data = {"loss": loss}
    rows = DatasetDict({split: Dataset.from_list([{"data": data}]) for split in SPLITS})
    (row,) = select_from_analysis(rows, policy="all").dataset
    assert row["ifd"] == pytest.approx(0.76429, abs=1e-5)
    assert row["rifd"] == pytest.approx(0.42315, abs=1e-5)


@pytest.mark.parametrize(
    "broken",
    [None, {"loss": None}, {"loss": []}, {"loss": [1.0, 2.0]}, {"loss": [1.0, 2.0, None, 1.0]}],
    ids=str,
)
def test_losses_that_are_missing_are_a_score_that_is_null(broken):
    scores = [(0.5, 0.5), (0.4, 0.1), (0.3, 0.2), (0.9, 0.1)]
    splits = analysis([scores, scores])
    features = Features({"data": {"loss": [Value("float64")]}})
    for split in SPLITS:
        first, second = splits[split]["data"]
        rows = [{"loss": first["loss"]}, broken if split == "reflect_response" else {"loss": second["loss"]}]
        splits[split] = Dataset.from_dict({"data": rows}, features)
    found = select_from_analysis(splits, policy="all")
    assert list(found.dataset["recycled"]) == ["response", "original"]
    assert found.not_scored == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e6])
def test_losses_that_give_no_number_never_win(loss):
    splits = analysis([[(0.5, 0.5), (0.4, 0.1), (0.3, 0.2), (0.9, 0.1)]])
    splits["reflect_response"] = Dataset.from_dict({"data": [{"loss": [1.0, 2.0, loss, loss]}]})
    found = select_from_analysis(splits, policy="all")
    assert list(found.dataset["recycled"]) == ["original"]


def test_scores_keep_their_type_where_there_are_none():
    found = select_from_analysis(analysis([[None] * 4]), policy="all")
    assert found.dataset.features["ifd"] == Value("float64")
    assert found.dataset.features["rifd"] == Value("float64")
    assert found.dataset.features["row_id"] == Value("int64")


# What is no analysis


def test_splits_that_are_missing_are_named():
    splits = analysis([ROWS["QA: both win"][0]])
    del splits["reflect_both"], splits["origin"]
    with pytest.raises(SourceError, match="lacks the splits origin, reflect_both"):
        select_from_analysis(splits)


def test_splits_of_different_lengths_are_refused():
    splits = analysis([ROWS["QA: both win"][0]] * 3)
    splits["reflect_both"] = splits["reflect_both"].select(range(2))
    with pytest.raises(SourceError, match="different numbers of rows"):
        select_from_analysis(splits)


@pytest.mark.parametrize("rows", [[{"text": "a"}], [{"data": "text"}], [{"data": [1.0, 2.0]}]], ids=str)
def test_splits_without_losses_are_refused(rows):
    with pytest.raises(SourceError):
        select_from_analysis(DatasetDict({split: Dataset.from_list(rows) for split in SPLITS}))


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "analysis"
    made.mkdir()
    for split, rows in analysis([scores for scores, *_ in ROWS.values()]).items():
        (made / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    listed = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in SPLITS)
    (made / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n", "utf-8")
    return made


def invoke(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_writes_the_rows_that_are_kept(folder, tmp_path):
    out = tmp_path / "selected"
    done = invoke("select", "--from-analysis", folder, out)
    assert done.exit_code == 0, done.output
    kept = [i for i, case in enumerate(ROWS.values()) if case[3]]
    assert f"{len(kept)} of {len(ROWS)} rows are kept; of 0 some loss is missing" in done.output
    for what in ("original", "instruction", "response", "both"):
        assert f"  {what}  {sum(case[1] == what for case in ROWS.values())}\n" in done.output
    rows = load_dataset(str(out), split="train")
    assert rows.column_names == ["row_id", "recycled", "ifd", "rifd"]
    assert list(rows["row_id"]) == kept
    (file,) = (out / "data").glob("train-*.parquet")
    assert pq.read_table(file)["row_id"].to_pylist() == kept
    assert "# selected: selected from published losses" in (out / "README.md").read_text("utf-8")
    recipe = yaml.safe_load((out / "recipe.yaml").read_text("utf-8"))
    assert (recipe["task"], recipe["analysis"], recipe["keep"]) == ("select-from-analysis", str(folder), "below-one")


def test_the_command_again_gives_the_same_folder(folder, tmp_path):
    out = tmp_path / "selected"
    assert invoke("select", "--from-analysis", folder, out).exit_code == 0
    before = {file.name: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert invoke("select", "--from-analysis", folder, out).exit_code == 0
    assert {file.name: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_another_folder_s_result_is_not_replaced_unasked(folder, tmp_path):
    out = tmp_path / "selected"
    select_from_analysis(folder, out, policy="reflected")
    assert isinstance(invoke("select", "--from-analysis", folder, out).exception, HfReflectError)
    assert invoke("select", "--from-analysis", folder, out, "--overwrite").exit_code == 0


@pytest.mark.parametrize("source", ["nowhere/at-all", "/no/such/folder", "no such name"])
def test_an_analysis_that_is_nowhere_is_an_error_that_says_so(tmp_path, monkeypatch, source):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = invoke("select", "--from-analysis", source, tmp_path / "out")
    assert isinstance(done.exception, HfReflectError)
    assert source in str(done.exception)
    assert "pushed" not in str(done.exception)  # nothing was going to be
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_analysis_leaves_nothing_behind(tmp_path):
    made = tmp_path / "rows"
    made.mkdir()
    (made / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\n', "utf-8")
    done = invoke("select", "--from-analysis", made, tmp_path / "out")
    assert isinstance(done.exception, SourceError)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows"]


PUBLISHED = """
import sys
from hf_reflect import select_from_analysis
print(select_from_analysis("MingLiiii/Alpaca_Analysis_llama2_7b").kept)
"""


@pytest.mark.network
def test_the_published_losses_of_alpaca_give_the_rows_that_the_authors_trained_on(tmp_path):
    """37,114 rows: arXiv 2402.10110, table 1. In a process of its own: this one has no Hub."""
    try:
        socket.create_connection(("huggingface.co", 443), timeout=5).close()
    except OSError as error:
        pytest.skip(f"the Hub can't be reached: {error}")
    without = ("HF_ENDPOINT", "NO_PROXY", "HF_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in without}
    done = subprocess.run(
        [sys.executable, "-c", PUBLISHED],
        capture_output=True,
        text=True,
        timeout=600,
        env={**environment, "HF_HOME": str(tmp_path)},
    )
    assert done.stdout.strip().endswith("37114"), done.stderr[-2000:]
