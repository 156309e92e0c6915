"""What asking costs, and when to stop asking."""

from dataclasses import dataclass, field

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import Reply, Request
from hf_reflect.oracles.pace import Limits


_MILLION = 1_000_000
_LETTERS = 4
"""Of a token, in most languages and tokenizers."""


@dataclass
class Spent:
    """What asking has cost so far in this process.

    Attributes:
        calls: Calls answered by the oracle.
        failed_calls: Calls that failed.
        recalled: Calls answered by the journal.
        prompt_tokens: Tokens read by the oracle; estimated where it doesn't say.
        completion_tokens: Tokens written by it, likewise.
        seconds: How long the answered calls took, added up.
        not_asked: Requests that were not asked because the budget was reached.
    """

    calls: int = 0
    failed_calls: int = 0
    recalled: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    not_asked: int = 0

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def tokens_per_call(self) -> float:
        """What a call took so far, on average; a guess before the first."""
        return self.tokens / self.calls if self.calls else 1000.0


@dataclass
class Purse:
    """The budget that all oracles of a run share.

    Attributes:
        limits: What may be spent, and the prices.
        spent: What was spent.

    Raises:
        OracleError: there is a limit on the cost and no price.
    """

    limits: Limits = field(default_factory=Limits)
    spent: Spent = field(default_factory=Spent)
    in_flight: int = 0

    def __post_init__(self) -> None:
        if self.limits.max_cost is not None and self.limits.price_in is None and self.limits.price_out is None:
            raise OracleError(
                "a limit on the cost needs the prices: set --price-in and --price-out, per million tokens."
            )

    @property
    def budget(self) -> list[float] | None:
        """What limits the spending; null if nothing does."""
        limits = self.limits
        found = [limits.max_tokens_total, limits.max_cost, limits.price_in, limits.price_out]
        return [value or 0.0 for value in found] if found[:2] != [None, None] else None

    @property
    def cost(self) -> float | None:
        """What was spent, in the currency of the prices; null without prices."""
        return cost(self.limits, self.spent.prompt_tokens, self.spent.completion_tokens)

    @property
    def reached(self) -> bool:
        """Whether another call, after those in flight, would exceed the budget. All count as average ones.

        Before the first reply nothing is known of what a call takes: then one is enough.
        """
        limits, calls = self.limits, self.spent.calls
        if limits.max_tokens_total is None and limits.max_cost is None:
            return False
        if not calls and self.in_flight:
            return True
        ahead = (self.in_flight + 1) / calls if calls else 0.0
        tokens, paid = self.spent.tokens, self.cost or 0.0
        return _exceeds(tokens, ahead, limits.max_tokens_total) or _exceeds(paid, ahead, limits.max_cost)

    def describe(self) -> str:
        """The live totals, in a few words."""
        paid = "" if self.cost is None else f", cost {self.cost:.2f}"
        return f"{self.spent.calls} calls, {self.spent.tokens:,} tokens{paid}"

    def pay(self, request: Request, reply: Reply, seconds: float) -> int:
        """Takes an answered call into account, and gives the tokens it took.

        What a server does not count is estimated from the texts: a budget must hold there as well.
        """
        asked = "".join(str(message.get("content", "")) for message in request.messages)
        read = len(asked) // _LETTERS + 1 if reply.prompt_tokens is None else reply.prompt_tokens
        said = reply.text + (reply.thinking or "")
        written = len(said) // _LETTERS + 1 if reply.completion_tokens is None else reply.completion_tokens
        self.spent.calls += 1
        self.spent.prompt_tokens += read
        self.spent.completion_tokens += written
        self.spent.seconds += seconds
        return read + written


def _exceeds(spent: float, calls_ahead: float, limit: float | None) -> bool:
    return limit is not None and (spent >= limit or spent * (1 + calls_ahead) > limit)


def cost(limits: Limits, prompt_tokens: float, completion_tokens: float) -> float | None:
    """What tokens cost; null without prices."""
    if limits.price_in is None and limits.price_out is None:
        return None
    return (prompt_tokens * (limits.price_in or 0.0) + completion_tokens * (limits.price_out or 0.0)) / _MILLION
