"""Configs made on demand: pairs for preference tuning, and the best rows by IFD."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from oracle_server import completion

from hf_reflect import recycle
from hf_reflect.columns import DECISION, ORIGINAL, REFLECTION, SCORE
from hf_reflect.errors import HfReflectError, HubError
from hf_reflect.extras import write_preference, write_selected


SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        ("original", ORIGINAL),
        ("instruction_reflections", pa.list_(REFLECTION)),
        ("instruction_decision", DECISION),
        ("response_reflections", pa.list_(REFLECTION)),
        ("response_decision", DECISION),
        ("recycled", pa.string()),
        ("ifd_score", SCORE),
        ("rifd_score", SCORE),
    ]
)


def rewrite(response: str, instruction: str | None = None, input: str | None = None) -> dict:
    return {"status": "ok", "response": response, "instruction": instruction, "input": input, "calls": []}


def decided(candidate: int | None) -> dict:
    return {"kept": "original" if candidate is None else "rewrite", "candidate": candidate, "reason": "x"}


def audited(
    row_id: int,
    first: int | None = None,
    second: int | None = None,
    *,
    original: dict | None = None,
    on_instruction: list[dict] | None = None,
    on_response: list[dict] | None = None,
) -> dict:
    """A row of config `reflections`: which rewrite each phase kept."""
    before = {"instruction": f"ask {row_id}", "input": "", "response": f"old {row_id}", "context": []}
    return {
        "row_id": row_id,
        "original": {**before, **(original or {})},
        "instruction_reflections": on_instruction or [rewrite(f"with it {row_id}", f"new ask {row_id}", "")],
        "instruction_decision": decided(first),
        "response_reflections": on_response or [rewrite(f"better {row_id}")],
        "response_decision": decided(second),
        "recycled": {(0, 0): "original", (1, 0): "instruction", (0, 1): "response", (1, 1): "both"}[
            first is not None, second is not None
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "result"
    (made / "reflections").mkdir(parents=True)
    (made / "data").mkdir()
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    made = tmp_path / "extras"
    made.mkdir()
    return made


def write(folder: Path, *rows: dict, split: str = "train") -> None:
    table = pa.Table.from_pylist(list(rows), SCHEMA)
    pq.write_table(table, folder / "reflections" / f"{split}-00000-of-00001-0.parquet")


def preferred(folder: Path, target: Path, split: str = "train") -> list[dict]:
    return pq.read_table(target / write_preference(folder, target)[split]).to_pylist()


def test_of_a_new_response_the_original_is_rejected(folder, target):
    write(folder, audited(7, second=0))
    assert preferred(folder, target) == [
        {"prompt": "ask 7", "chosen": "better 7", "rejected": "old 7", "row_id": 7},
    ]


def test_of_a_row_with_both_the_response_that_came_with_the_new_instruction_is_rejected(folder, target):
    write(folder, audited(7, first=0, second=0))
    assert preferred(folder, target) == [
        {"prompt": "new ask 7", "chosen": "better 7", "rejected": "with it 7", "row_id": 7},
    ]


def test_rows_whose_response_was_not_replaced_make_no_pair(folder, target):
    unread = {**audited(3), "original": None}
    write(folder, audited(0), audited(1, first=0), audited(2, second=0), unread)
    assert [pair["row_id"] for pair in preferred(folder, target)] == [2]


def test_the_rewrites_that_the_student_kept_count_not_the_first(folder, target):
    offered = [rewrite("r0", "i0", ""), rewrite("r1", "i1", "in1")]
    answers = [rewrite("a0"), rewrite("a1"), rewrite("a2")]
    write(folder, audited(0, 1, 2, on_instruction=offered, on_response=answers))
    assert preferred(folder, target) == [{"prompt": "i1\nin1", "chosen": "a2", "rejected": "r1", "row_id": 0}]


@pytest.mark.parametrize(("input", "prompt"), [("text", "ask 0\ntext"), ("", "ask 0"), (None, "ask 0")])
def test_the_prompt_has_the_input_of_its_instruction(folder, target, input, prompt):
    write(folder, audited(0, second=0, original={"input": input}))
    assert preferred(folder, target)[0]["prompt"] == prompt


def test_a_new_instruction_without_input_does_not_get_the_old_input(folder, target):
    write(folder, audited(0, 0, 0, original={"input": "old input"}))
    assert preferred(folder, target)[0]["prompt"] == "new ask 0"


CONTEXT = [
    {"role": "system", "content": "Be brief."},
    {"role": "human", "content": "Hi."},
    {"role": "gpt", "content": "?"},
]


def test_rows_with_earlier_turns_become_lists_of_messages_with_the_roles_that_trl_knows(folder, target):
    write(folder, audited(0, second=0, original={"context": CONTEXT}))
    assert preferred(folder, target) == [
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi."},
                {"role": "assistant", "content": "?"},
                {"role": "user", "content": "ask 0"},
            ],
            "chosen": [{"role": "assistant", "content": "better 0"}],
            "rejected": [{"role": "assistant", "content": "old 0"}],
            "row_id": 0,
        }
    ]


def test_one_row_with_earlier_turns_makes_lists_of_all(folder, target):
    write(folder, audited(0, second=0), audited(1, second=0, original={"context": CONTEXT}))
    first, second = preferred(folder, target)
    assert first["prompt"] == [{"role": "user", "content": "ask 0"}]
    assert len(second["prompt"]) == 4


def test_all_splits_have_the_same_columns_or_the_config_could_not_be_loaded(folder, target):
    write(folder, audited(0, second=0, original={"context": CONTEXT}))
    write(folder, audited(1, second=0), split="test")
    files = write_preference(folder, target)
    assert set(files) == {"train", "test"}
    loaded = load_dataset("parquet", data_files={split: str(target / file) for split, file in files.items()})
    assert loaded["train"].features == loaded["test"].features


def test_a_split_in_which_nothing_was_replaced_has_no_file(folder, target):
    write(folder, audited(0, second=0))
    write(folder, audited(1), split="test")
    assert set(write_preference(folder, target)) == {"train"}


def test_where_nothing_was_replaced_there_is_nothing_to_prefer(folder, target):
    write(folder, audited(0), audited(1, first=0))
    with pytest.raises(HubError, match="replaced no response"):
        write_preference(folder, target)


def test_many_rows_stay_in_order(folder, target):
    write(folder, *(audited(i, second=0 if i % 3 else None) for i in range(1200)))
    assert [pair["row_id"] for pair in preferred(folder, target)] == [i for i in range(1200) if i % 3]


def test_pairs_of_a_run_answer_the_prompt_that_stands_in_its_result(server, tmp_path, target):
    rows = [{"instruction": f"Name a prime ({i}).", "input": "", "output": f"It is {i}."} for i in range(16)]
    out = tmp_path / "out"
    server.rule = completion
    recycle(
        Dataset.from_list(rows), out, oracle=server.url, student=None, method="reflect",
        journal=tmp_path / "journal", progress=False,
    )  # fmt: skip
    pairs = {pair["row_id"]: pair for pair in preferred(out, target)}
    default = load_dataset(str(out), split="train")
    assert {row["row_id"] for row in default if row["recycled"] in ("response", "both")} == set(pairs)
    assert {row["recycled"] for row in default} >= {"response", "both"}
    for row in default:
        if (pair := pairs.get(row["row_id"])) is not None:
            assert (pair["prompt"], pair["chosen"]) == (row["instruction"], row["output"])
            assert pair["rejected"] != pair["chosen"]
            if row["recycled"] == "response":
                assert pair["rejected"] == rows[row["row_id"]]["output"]


# The best rows by IFD


def scored(folder: Path, ifds: list[float | None], split: str = "train") -> None:
    rows = [{"instruction": f"ask {i}", "output": "a", "row_id": i, "ifd": ifd} for i, ifd in enumerate(ifds)]
    schema = pa.schema(
        [("instruction", pa.string()), ("output", pa.string()), ("row_id", pa.int64()), ("ifd", pa.float64())]
    )
    name = f"data/{split}-00000-of-00001-{abs(hash(tuple(ifds)))}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / name)
    files = sorted((folder / "data").glob("*.parquet"))
    listed = "".join(f"  - split: {file.name.split('-')[0]}\n    path: data/{file.name}\n" for file in files)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n", "utf-8")


@pytest.mark.parametrize(
    ("share", "rows"), [(0.1, [3]), (0.3, [0, 3, 6]), (0.25, [3, 6]), (0.5, [0, 2, 3, 6, 8]), (1.0, list(range(10)))]
)
def test_exactly_the_share_with_the_highest_ifd_is_selected_in_the_order_of_the_rows(folder, target, share, rows):
    scored(folder, [0.7, 0.2, 0.6, 0.99, 0.1, 0.3, 0.8, 0.4, 0.5, 0.05])
    (file,) = write_selected(folder, target, share).values()
    table = pq.read_table(target / file)
    assert table["row_id"].to_pylist() == rows  # a quarter of ten is 2.5, and Python rounds a half to the even number
    assert table.column_names == ["instruction", "output", "row_id", "ifd"]


def test_rows_without_a_score_are_never_selected(folder, target):
    scored(folder, [None, 0.2, None, 0.1])
    (file,) = write_selected(folder, target, 1.0).values()
    assert pq.read_table(target / file)["row_id"].to_pylist() == [1, 3]


def test_every_split_gives_its_own_share(folder, target):
    scored(folder, [0.1, 0.2, 0.3, 0.4])
    scored(folder, [0.9, 0.8], split="test")
    files = write_selected(folder, target, 0.5)
    assert {split: pq.read_table(target / file)["row_id"].to_pylist() for split, file in files.items()} == {
        "train": [2, 3],
        "test": [0],
    }


def test_without_any_score_nothing_can_be_selected(folder, target):
    scored(folder, [None, None])
    with pytest.raises(HubError, match="no row has an IFD"):
        write_selected(folder, target, 0.5)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(folder, target, share):
    scored(folder, [0.1, 0.2])
    with pytest.raises(HfReflectError):
        write_selected(folder, target, share)


def test_files_are_named_after_what_is_in_them(folder, target):
    scored(folder, [0.1, 0.2, 0.3, 0.4])
    half, most = write_selected(folder, target, 0.5)["train"], write_selected(folder, target, 0.75)["train"]
    assert half != most
    assert half == write_selected(folder, target, 0.5)["train"]
    assert half.startswith("selected/train-00000-of-00001-")
