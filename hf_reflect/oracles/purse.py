"""What asking costs, and when to stop asking."""

from dataclasses import dataclass, field

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import Reply
from hf_reflect.oracles.pace import Limits


_MILLION = 1_000_000


@dataclass
class Spent:
    """What asking has cost so far in this process.

    Attributes:
        calls: Calls answered by the oracle.
        failed_calls: Calls that failed.
        recalled: Calls answered by the journal.
        prompt_tokens: Tokens read by the oracle.
        completion_tokens: Tokens written by it.
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
    def cost(self) -> float | None:
        """What was spent, in the currency of the prices; null without prices."""
        return cost(self.limits, self.spent.prompt_tokens, self.spent.completion_tokens)

    @property
    def reached(self) -> bool:
        """Whether an average call more, after those in flight, would exceed the budget."""
        ahead = self.in_flight + 1 if self.spent.calls else self.in_flight
        calls, limits = max(1, self.spent.calls), self.limits
        tokens = self.spent.tokens + ahead * self.spent.tokens_per_call
        if limits.max_tokens_total is not None and tokens > limits.max_tokens_total:
            return True
        paid = self.cost
        return limits.max_cost is not None and paid is not None and paid + ahead * paid / calls > limits.max_cost

    def describe(self) -> str:
        """The live totals, in a few words."""
        paid = "" if self.cost is None else f", cost {self.cost:.2f}"
        return f"{self.spent.calls} calls, {self.spent.tokens:,} tokens{paid}"

    def pay(self, reply: Reply, seconds: float) -> None:
        """Takes an answered call into account."""
        self.spent.calls += 1
        self.spent.prompt_tokens += reply.prompt_tokens or 0
        self.spent.completion_tokens += reply.completion_tokens or 0
        self.spent.seconds += seconds


def cost(limits: Limits, prompt_tokens: float, completion_tokens: float) -> float | None:
    """What tokens cost; null without prices."""
    if limits.price_in is None and limits.price_out is None:
        return None
    return (prompt_tokens * (limits.price_in or 0.0) + completion_tokens * (limits.price_out or 0.0)) / _MILLION
