"""Row formats to pairs and back.

A row of an instruction dataset holds one *pair*: an instruction (with an optional input) and its response. Formats
are recognised by their columns. Everything in a row that is not the pair is carried along untouched.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_reflect.errors import UnknownFormatError


class UnreadableRowError(ValueError):
    """This row holds no pair; the message says why. It stays as it is."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One earlier message of a conversation, or its system prompt."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Pair:
    """An instruction with its response, and the turns that came before it.

    Attributes:
        instruction: What is asked.
        response: The answer.
        input: Material the instruction works on; empty where there is none.
        context: Earlier turns, oldest first. They are read, never rewritten.
    """

    instruction: str
    response: str
    input: str = ""
    context: tuple[Turn, ...] = ()

    @property
    def question(self) -> str:
        """The instruction with its input, joined as every format without an input column joins them."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction

    def replace(self, **changes: Any) -> "Pair":
        """A copy with some fields changed."""
        return replace(self, **changes)


class RowFormat(ABC):
    """How one kind of row holds its pair."""

    name: str
    columns: tuple[str, ...]
    """Columns that must be there."""

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Pair:
        """The pair of a row.

        Raises:
            UnreadableRowError: the row holds no pair.
        """

    @abstractmethod
    def write(self, row: Mapping[str, Any], pair: Pair) -> dict[str, Any]:
        """The columns of `row` that hold the pair, with `pair` in them."""

    def nulls(self, row: Mapping[str, Any]) -> dict[str, None]:
        """The parts of the pair that the row has a null for, where an empty text is read: to put it back as it was."""
        return {}

    @property
    @abstractmethod
    def text_columns(self) -> tuple[str, ...]:
        """The columns that `write` may return, whether or not a dataset has them all."""


class TextColumns(RowFormat):
    """One column of text for each part of the pair (Alpaca, WizardLM, prompt–completion)."""

    def __init__(self, name: str, instruction: str, response: str, input: str | None = None) -> None:
        self.name = name
        self.instruction, self.response, self.input = instruction, response, input
        self.columns = tuple(c for c in (instruction, input, response) if c)

    @property
    def text_columns(self) -> tuple[str, ...]:
        return self.columns

    def read(self, row: Mapping[str, Any]) -> Pair:
        return Pair(
            instruction=_text(row, self.instruction),
            response=_text(row, self.response),
            input=_text(row, self.input) if self.input else "",
        )

    def nulls(self, row: Mapping[str, Any]) -> dict[str, None]:
        return {"input": None} if self.input and row.get(self.input) is None else {}

    def write(self, row: Mapping[str, Any], pair: Pair) -> dict[str, Any]:
        if self.input is None:
            return {self.instruction: pair.question, self.response: pair.response}
        return {self.instruction: pair.instruction, self.input: pair.input, self.response: pair.response}


class Conversation(RowFormat):
    """A list of messages in one column (`messages`, ShareGPT). The last exchange is the pair."""

    def __init__(self, name: str, column: str, role: str, content: str, user: set[str], assistant: set[str]) -> None:
        self.name, self.columns = name, (column,)
        self.column, self.role, self.content = column, role, content
        self.user, self.assistant = user, assistant

    @property
    def text_columns(self) -> tuple[str, ...]:
        return self.columns

    def read(self, row: Mapping[str, Any]) -> Pair:
        messages = row[self.column]
        if not isinstance(messages, list):
            raise UnreadableRowError(f"{self.column} is {_kind(messages)}, not a list of messages")
        turns = [self._turn(message, i) for i, message in enumerate(messages)]
        if not turns:
            raise UnreadableRowError(f"{self.column} is empty")
        if messages[-1].get("tool_calls"):
            raise UnreadableRowError("the last reply calls a tool")
        if turns[-1].role not in self.assistant:
            raise UnreadableRowError(f"the conversation ends with a turn of {turns[-1].role!r}, not with a reply")
        if len(turns) < 2 or turns[-2].role not in self.user:
            raise UnreadableRowError("the last reply does not follow a turn of the user")
        return Pair(instruction=turns[-2].content, response=turns[-1].content, context=tuple(turns[:-2]))

    def write(self, row: Mapping[str, Any], pair: Pair) -> dict[str, Any]:
        *earlier, question, answer = row[self.column]
        return {
            self.column: [
                *earlier,
                {**question, self.content: pair.question},
                {**answer, self.content: pair.response},
            ]
        }

    def _turn(self, message: Any, position: int) -> Turn:
        if not isinstance(message, Mapping):
            raise UnreadableRowError(f"{self.column}[{position}] is {_kind(message)}, not a message")
        role = message.get(self.role)
        if not isinstance(role, str):
            raise UnreadableRowError(f"{self.column}[{position}] has no {self.role!r}")
        return Turn(role, _text(message, self.content, f"{self.column}[{position}]."))


FORMATS: tuple[RowFormat, ...] = (
    Conversation("messages", "messages", "role", "content", {"user"}, {"assistant"}),
    Conversation("sharegpt", "conversations", "from", "value", {"human", "user"}, {"gpt", "assistant", "chatgpt"}),
    TextColumns("alpaca", "instruction", "output", "input"),
    TextColumns("wizardlm", "instruction", "output"),
    TextColumns("prompt-completion", "prompt", "completion"),
)


def recognise(columns: Iterable[str]) -> RowFormat:
    """The row format of a dataset with these columns.

    Raises:
        UnknownFormatError: none fits; the message lists the columns found and the formats known.
    """
    found = list(columns)
    for row_format in FORMATS:
        if set(row_format.columns) <= set(found):
            return row_format
    known = "; ".join(f"{f.name}: {', '.join(f.columns)}" for f in FORMATS)
    raise UnknownFormatError(
        f"no known row format has the columns {', '.join(found) or '(none)'}. Known formats: {known}. "
        "Rename the columns of your dataset to one of these."
    )


def _text(row: Mapping[str, Any], key: str, where: str = "") -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UnreadableRowError(f"{where}{key} is {_kind(value)}, not text")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
