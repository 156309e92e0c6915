"""How fast an oracle is asked: as fast as it keeps up with, and never faster than it allows.

Calls at once start modest and grow while the server keeps up; when it throttles they shrink by a quarter and grow
again one by one (additive increase, multiplicative decrease). Failures in a row open a circuit breaker: one call at a
time then probes the server, until it answers or the patience is over.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import PassingError


_MODEST = 16
_SHRINK = 0.75
_BROKEN = 10
"""So many failures in a row are the server's fault, not the requests'."""
_LONGEST_PROBE = 30.0
_MINUTE = 60.0


@dataclass(frozen=True)
class Limits:
    """What asking may cost and how hard it may try. None of it changes an answer.

    Attributes:
        attempts: Calls per request, where the failure may pass.
        patience: Seconds to go on without a single success before the run stops.
        rpm: Requests per minute.
        tpm: Tokens per minute, read and written.
        max_tokens_total: Tokens to spend in this run, read and written.
        max_cost: What to spend in this run, in the currency of the prices.
        price_in: Price of a million tokens read.
        price_out: Price of a million tokens written.
    """

    attempts: int = 5
    patience: float = 120.0
    rpm: float | None = None
    tpm: float | None = None
    max_tokens_total: int | None = None
    max_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None


class Meter:
    """Lets an amount pass per minute, evenly: what was used early delays what comes next.

    Args:
        per_minute: The amount; null for any.
        clock: Gives seconds.
    """

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds_each = 0.0 if per_minute is None else _MINUTE / per_minute
        self._clock = clock
        self._free_at = 0.0

    def reserve(self, amount: float) -> float:
        """Takes an amount, and gives the seconds to wait before using it."""
        now = self._clock()
        start = max(now, self._free_at)
        self._free_at = start + amount * self._seconds_each
        return start - now

    def settle(self, difference: float) -> None:
        """Takes what was used beyond what was reserved, or gives back what was not."""
        self._free_at += difference * self._seconds_each


class Pace:
    """The turns of all calls to one oracle. Lives on one event loop.

    Args:
        most: The most calls at once.
        limits: Requests and tokens per minute, and patience.
        name: What errors call the oracle.

    Attributes:
        allowed: Calls allowed at once, at this moment.
        in_flight: Calls under way.
    """

    def __init__(self, most: int, limits: Limits, name: str) -> None:
        self.most, self.limits, self.name = most, limits, name
        self.allowed = float(min(most, _MODEST))
        self.in_flight = 0
        self._growing_fast = True
        self._shrunk_at = 0.0
        self._paused_until = 0.0
        self._failures = 0
        self._failing_since = 0.0
        self._probe_after = 0.0
        self._changed = asyncio.Condition()
        self._requests, self._tokens = Meter(limits.rpm), Meter(limits.tpm)

    @property
    def broken(self) -> bool:
        """Whether the breaker is open."""
        return self._failures >= _BROKEN

    @asynccontextmanager
    async def turn(self, tokens: float) -> AsyncIterator["Turn"]:
        """A turn for one call, once the limits admit it.

        Args:
            tokens: How many tokens the call is expected to take.
        """
        async with self._changed:
            await self._changed.wait_for(self._admits)
            self.in_flight += 1
        try:
            await self._wait(tokens)
            yield Turn(self, time.monotonic(), tokens)
        finally:
            self.in_flight -= 1
            async with self._changed:
                self._changed.notify(max(1, int(self.allowed) - self.in_flight))

    def _admits(self) -> bool:
        return self.in_flight < (1 if self.broken else int(self.allowed))

    async def _wait(self, tokens: float) -> None:
        await asyncio.sleep(max(self._requests.reserve(1), self._tokens.reserve(tokens)))
        # A pause may be ordered, or prolonged, while others are waited for.
        while (pause := max(self._paused_until, self._probe_after if self.broken else 0.0) - time.monotonic()) > 0:
            await asyncio.sleep(pause + random.uniform(0, 0.1))

    def succeeded(self, used: float, expected: float) -> None:
        """A call was answered: allows more at once."""
        self._tokens.settle(used - expected)
        if self.broken:
            self.allowed = min(self.allowed, _MODEST)
        self._failures = 0
        self.allowed = min(self.most, self.allowed + (1.0 if self._growing_fast else 1.0 / self.allowed))

    def failed(self, error: PassingError, began: float, expected: float = 0.0) -> None:
        """A call failed: allows fewer at once if the server throttles, and counts towards the breaker.

        Args:
            error: How it failed.
            began: When the call began.
            expected: How many tokens it was expected to take.

        Raises:
            OracleError: patience is over.
        """
        now = time.monotonic()
        self._tokens.settle(-expected)
        self._failing_since = now if self._failures == 0 else self._failing_since
        self._failures += 1
        if error.throttled:
            self._growing_fast = False
            if began > self._shrunk_at:  # calls of one moment tell the same story once
                self.allowed, self._shrunk_at = max(1.0, self.allowed * _SHRINK), now
        if error.retry_after is not None:
            if error.retry_after > self.limits.patience:
                raise self._stop(error, f"it asks to wait {error.retry_after:.0f} seconds")
            if error.throttled:
                self._paused_until = max(self._paused_until, now + error.retry_after)
        if self.broken:
            if now - self._failing_since >= self.limits.patience:
                raise self._stop(error, f"nothing but failures for {now - self._failing_since:.0f} seconds")
            probe = min(_LONGEST_PROBE, 0.5 * 2 ** (self._failures - _BROKEN))
            self._probe_after = min(now + probe, max(now, self._failing_since + self.limits.patience))

    def _stop(self, error: PassingError, why: str) -> OracleError:
        advice = error.advice or "Run the same command again to go on: nothing paid for is lost."
        return OracleError(f"oracle {self.name}: {error}; {why}. {advice}")


@dataclass(frozen=True)
class Turn:
    """One call's turn.

    Attributes:
        began: When it began, on the monotonic clock.
        expected: How many tokens it was expected to take.
    """

    pace: Pace
    began: float
    expected: float

    def succeeded(self, used: float) -> None:
        """The server answered, and took so many tokens for it."""
        self.pace.succeeded(used, self.expected)

    def failed(self, error: PassingError) -> None:
        """The call failed.

        Raises:
            OracleError: patience is over.
        """
        self.pace.failed(error, self.began, self.expected)
