import pytest

from hf_reflect.errors import UnknownFormatError
from hf_reflect.pairs import FORMATS, Pair, Turn, UnreadableRowError, recognise


ROWS = {
    "alpaca": {"instruction": "Sort.", "input": "3, 1", "output": "1, 3"},
    "wizardlm": {"instruction": "Sort 3, 1.", "output": "1, 3"},
    "prompt-completion": {"prompt": "Sort 3, 1.", "completion": "1, 3"},
    "messages": {"messages": [{"role": "user", "content": "Sort."}, {"role": "assistant", "content": "1, 3"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Sort."}, {"from": "gpt", "value": "1, 3"}]},
}

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello", "name": "Ann"},
    {"role": "assistant", "content": "Hi", "weight": 0},
    {"role": "user", "content": "Sort 3, 1.", "name": "Ann"},
    {"role": "assistant", "content": "1, 3", "weight": 1},
]


def test_the_examples_here_cover_every_format():
    assert {row_format.name for row_format in FORMATS} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_recognised_by_its_columns_wherever_they_stand(name):
    assert recognise(["id", *reversed(ROWS[name]), "source"]).name == name


@pytest.mark.parametrize("name", ROWS)
def test_writing_back_the_pair_that_was_read_changes_nothing(name):
    row, row_format = ROWS[name], recognise(ROWS[name])
    assert row_format.write(row, row_format.read(row)) == row


@pytest.mark.parametrize("name", ROWS)
def test_the_response_is_read_and_a_new_one_written(name):
    row, row_format = ROWS[name], recognise(ROWS[name])
    pair = row_format.read(row)
    assert pair.response == "1, 3"
    changed = {**row, **row_format.write(row, pair.replace(response="one, three"))}
    assert row_format.read(changed) == pair.replace(response="one, three")


@pytest.mark.parametrize("name", ROWS)
def test_only_the_columns_of_the_pair_are_written(name):
    row, row_format = {**ROWS[name], "id": 7}, recognise(ROWS[name])
    assert set(row_format.write(row, row_format.read(row))) <= set(row_format.text_columns) <= set(ROWS[name])


def test_alpaca_keeps_instruction_and_input_apart():
    pair = recognise(ROWS["alpaca"]).read(ROWS["alpaca"])
    assert (pair.instruction, pair.input) == ("Sort.", "3, 1")


@pytest.mark.parametrize("name", ["wizardlm", "prompt-completion", "messages", "sharegpt"])
def test_a_format_without_a_column_for_it_gets_the_input_below_the_instruction(name):
    row, row_format = ROWS[name], recognise(ROWS[name])
    changed = {**row, **row_format.write(row, Pair("Sort.", "1, 3", input="3, 1"))}
    assert row_format.read(changed).instruction == "Sort.\n3, 1"


def test_a_pair_without_input_asks_its_instruction_alone():
    assert Pair("Sort.", "1, 3").question == "Sort."


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_a_null_text_reads_as_no_text(column):
    pair = recognise(ROWS["alpaca"]).read({**ROWS["alpaca"], column: None})
    assert "" in (pair.instruction, pair.input, pair.response)


def test_system_prompt_and_earlier_turns_are_context():
    pair = recognise(["messages"]).read({"messages": CHAT})
    assert pair == Pair(
        "Sort 3, 1.",
        "1, 3",
        context=(Turn("system", "Be brief."), Turn("user", "Hello"), Turn("assistant", "Hi")),
    )


def test_context_and_the_other_keys_of_messages_survive_a_rewrite():
    row_format, row = recognise(["messages"]), {"messages": CHAT}
    pair = row_format.read(row).replace(instruction="Sort 9, 8.", response="8, 9")
    assert row_format.write(row, pair)["messages"] == [
        *CHAT[:3],
        {"role": "user", "content": "Sort 9, 8.", "name": "Ann"},
        {"role": "assistant", "content": "8, 9", "weight": 1},
    ]


def test_writing_leaves_the_row_it_was_given_alone():
    row_format = recognise(["messages"])
    row = {"messages": [dict(message) for message in CHAT]}
    row_format.write(row, Pair("new", "newer"))
    assert row == {"messages": CHAT}


def test_null_keys_that_arrow_puts_into_messages_survive():
    row_format = recognise(["messages"])
    row = {
        "messages": [
            {"role": "user", "content": "Q", "tools": None},
            {"role": "assistant", "content": "A", "tools": "t"},
        ]
    }
    assert row_format.write(row, row_format.read(row)) == row


@pytest.mark.parametrize(("user", "assistant"), [("human", "gpt"), ("user", "assistant"), ("human", "chatgpt")])
def test_sharegpt_rows_name_their_speakers_in_several_ways(user, assistant):
    row = {"conversations": [{"from": user, "value": "Q"}, {"from": assistant, "value": "A"}]}
    assert recognise(row).read(row) == Pair("Q", "A")


USER, REPLY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"instruction": 5, "output": "b"}, "instruction is int, not text"),
        ({"instruction": "a", "output": ["b"]}, "output is list, not text"),
        ({"prompt": [USER], "completion": [REPLY]}, "prompt is list, not text"),
        ({"messages": None}, "messages is null, not a list"),
        ({"messages": {"role": ["user"], "content": ["Q"]}}, "messages is dict, not a list"),
        ({"messages": "Q: A"}, "messages is str, not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [None]}, r"messages\[0\] is null"),
        ({"messages": [USER, "A"]}, r"messages\[1\] is str"),
        ({"messages": [USER, {"content": "A"}]}, r"messages\[1\] has no 'role'"),
        ({"messages": [USER, {"role": None, "content": "A"}]}, r"messages\[1\] has no 'role'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, REPLY]}, r"messages\[0\]\.content is list"),
        ({"messages": [USER, REPLY, USER]}, "ends with a turn of 'user'"),
        ({"messages": [REPLY]}, "does not follow a turn of the user"),
        ({"messages": [USER, REPLY, REPLY]}, "does not follow a turn of the user"),
        ({"messages": [{"role": "system", "content": "S"}, REPLY]}, "does not follow a turn of the user"),
        ({"conversations": [{"role": "user", "content": "Q"}]}, r"conversations\[0\] has no 'from'"),
    ],
)
def test_a_row_that_holds_no_pair_says_why(row, why):
    with pytest.raises(UnreadableRowError, match=why):
        recognise(row).read(row)


def test_an_unknown_format_names_the_columns_found_and_every_format_known():
    with pytest.raises(UnknownFormatError) as error:
        recognise(["question", "answer"])
    message = str(error.value)
    assert "question, answer" in message
    for row_format in FORMATS:
        assert row_format.name in message
        assert ", ".join(row_format.columns) in message


def test_no_columns_at_all_are_an_unknown_format():
    with pytest.raises(UnknownFormatError, match=r"\(none\)"):
        recognise([])
