"""How a pair becomes the text that the student scores."""

from collections.abc import Callable
from dataclasses import dataclass

from hf_reflect.pairs import Pair


@dataclass(frozen=True, slots=True)
class Scored:
    """A target text and the text that conditions it."""

    prefix: str
    target: str


@dataclass(frozen=True)
class Template:
    """A prompt layout for both scores.

    Attributes:
        name: What the recipe calls it.
        forward: The response after its question, for IFD.
        reverse: The question after its response, for r-IFD.
    """

    name: str
    forward: Callable[[Pair], Scored]
    reverse: Callable[[Pair], Scored]


REQUEST = "What instruction was this text written for?"
"""The short request that follows a response in the reversed layout."""


def _forward(pair: Pair) -> Scored:
    # Earlier turns condition the response just as the instruction does.
    earlier = "".join(f"{turn.content}\n" for turn in pair.context)
    return Scored(f"{earlier}{pair.question}\n", pair.response)


def _reverse(pair: Pair) -> Scored:
    return Scored(f"{pair.response}\n{REQUEST}\n", pair.question)


NONE = Template("none", _forward, _reverse)
"""No template: the texts themselves, on lines of their own. What a base model finds least strange."""
