"""What an oracle is: the seam that every backend fits."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from hf_reflect.errors import OracleError


@dataclass(frozen=True)
class Sampling:
    """How the oracle samples a reply. All of it decides the answer, so all of it is part of the journal's key.

    Attributes:
        max_tokens: The longest reply, in tokens.
        temperature: 0 is greedy, as in the papers' code.
        top_p: Nucleus sampling.
        seed: For servers that honour it.
    """

    max_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """One call: chat messages, sampling, and the JSON schema the reply is held to, if any."""

    messages: tuple[Mapping[str, str], ...]
    sampling: Sampling = field(default_factory=Sampling)
    schema: Mapping[str, Any] | None = None

    def key(self, identity: Mapping[str, Any]) -> str:
        """The hash of all that determines the answer, and of nothing else."""
        decides = {
            "oracle": dict(identity),
            "messages": [dict(m) for m in self.messages],
            "sampling": self.sampling.to_dict(),
            "schema": self.schema,
        }
        return hashlib.sha256(canonical(decides).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: The answer, always encodable as UTF-8.
        finish_reason: `stop`, `length`, `content_filter`, or whatever the server says.
        prompt_tokens: Tokens read, as the server counts them; null if it doesn't say.
        completion_tokens: Tokens written, likewise.
        thinking: What a reasoning model thought first, where the server keeps it apart.
        attempts: How many calls it took.
    """

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    thinking: str | None = None
    attempts: int = 1

    def __post_init__(self) -> None:
        # JSON can spell half a surrogate pair, which neither Arrow nor SQLite can hold.
        for name in ("text", "thinking"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, value.encode("utf-8", "replace").decode("utf-8"))


class RowFailedError(Exception):
    """The oracle has no answer to this one request; the message says why. The row stays as it is.

    Args:
        message: Why.
        status: The status of the reflection: `failed`, or `skipped` where nothing was asked.
    """

    def __init__(self, message: str, status: Literal["failed", "skipped"] = "failed") -> None:
        super().__init__(message)
        self.status = status


class PassingError(Exception):
    """A call failed in a way that may pass: the same request is worth another try.

    Args:
        message: What happened, in a few words.
        retry_after: Seconds the server asks to wait.
        throttled: The server has too much to do: fewer calls at once are called for.
        unreachable: The server can't be spoken to.
        slow: There was no reply in time. Fewer calls at once may help, and it may be the request's own fault.
        advice: What a person can do if it lasts.
    """

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        throttled: bool = False,
        unreachable: bool = False,
        slow: bool = False,
        advice: str = "",
    ) -> None:
        super().__init__(message)
        self.retry_after, self.advice = retry_after, advice
        self.throttled, self.unreachable, self.slow = throttled, unreachable, slow

    @property
    def of_server(self) -> bool:
        """Whether it says nothing about the request: any other would have failed as well."""
        return self.throttled or self.unreachable


@runtime_checkable
class Oracle(Protocol):
    """A teacher LLM, wherever it is served.

    Attributes:
        name: What reports call it (a model name).
        identity: What determines its answers besides the request: the model and the endpoint, as JSON-able values.
            No credentials, no transport settings: it is hashed into the journal's keys and written to the recipe.
        concurrency: How many calls may be in flight at once.
        prompts: The prompt style that suits it.
        max_tokens: The longest reply that suits it.
    """

    name: str
    concurrency: int
    prompts: str
    max_tokens: int

    @property
    def identity(self) -> Mapping[str, Any]: ...

    async def complete(self, request: Request) -> Reply:
        """Answers one request, or fails at it once: trying again is not its business.

        Raises:
            PassingError: it failed in a way that may pass.
            RowFailedError: this request has no answer.
            OracleError: no request will have one; the run stops.
        """
        ...


def close_all(oracles: Iterable[Any]) -> None:
    """Ends the use of oracles: all of them, whatever one of them says to that.

    An error that is on its way already is not hidden by one of these, which is then only logged.

    Raises:
        OracleError: what the first of them says, if nothing else is wrong.
    """
    on_its_way = sys.exc_info()[1]
    failed: OracleError | None = None
    for oracle in oracles:
        try:
            if (close := getattr(oracle, "close", None)) is not None:
                close()
        except OracleError as error:
            if on_its_way is not None or failed is not None:
                logging.getLogger(__name__).warning("%s", error)
            failed = failed or error
    if failed is not None and on_its_way is None:
        raise failed


def canonical(value: Any) -> str:
    """The one JSON spelling of a value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
