"""How fast an oracle is asked: as fast as it keeps up with, and never faster than it allows.

Calls at once start modest and grow while the server keeps up; when it throttles they shrink by a quarter and grow
again one by one (additive increase, multiplicative decrease). A server that fails whatever it is asked opens a circuit
breaker: one call at a time then probes it, until it answers or the patience is over.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import PassingError


_MODEST = 16
_SHRINK = 0.75
_BROKEN = 10
"""So many failures in a row ask for an explanation."""
_LONGEST_PROBE = 30.0
_MINUTE = 60.0
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Limits:
    """What asking may cost and how hard it may try. None of it changes an answer.

    Attributes:
        attempts: Calls per request, where the failure may pass and is the request's own; being throttled is not.
        patience: Seconds to go on without a single success before the run stops.
        rpm: Requests per minute.
        tpm: Tokens per minute, read and written. A call that takes more than expected delays the next ones.
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


@dataclass
class _Use:
    at: float
    amount: float


class Meter:
    """Lets an amount pass in any minute, and no more.

    Args:
        per_minute: The amount; null for any.
        clock: Gives seconds.
    """

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._used: deque[_Use] = deque()

    def wait(self, amount: float) -> float:
        """Seconds until an amount may pass; one that is larger than a minute's waits for a minute without any."""
        if self._per_minute is None:
            return 0.0
        now = self._clock()
        while self._used and self._used[0].at <= now - _MINUTE:
            self._used.popleft()
        used, room, wait = sum(use.amount for use in self._used), max(0.0, self._per_minute - amount), 0.0
        for use in self._used:
            if used <= room + _ROUNDING:
                break
            used, wait = used - use.amount, use.at + _MINUTE - now
        return wait

    def take(self, amount: float) -> _Use:
        """Uses an amount now. What it turns out to be can be set in what is returned."""
        use = _Use(self._clock(), amount)
        if self._per_minute is not None:
            self._used.append(use)
        return use


class Pace:
    """The turns of all calls to one oracle. Lives on one event loop.

    Args:
        most: The most calls at once.
        limits: Requests and tokens per minute, and patience.
        name: What errors call the oracle.

    Attributes:
        allowed: Calls allowed at once, at this moment.
        in_flight: Calls under way.
        broken: Whether the breaker is open.
        failures: How many calls failed since the last success.
        answers: How many were answered in all.
    """

    def __init__(self, most: int, limits: Limits, name: str) -> None:
        self.most, self.limits, self.name = most, limits, name
        self.allowed = float(min(most, _MODEST))
        self.in_flight = 0
        self.broken = False
        self.failures = self.answers = 0
        self._growing_fast = True
        self._shrunk_at = 0.0
        self._paused_until = 0.0
        self._failing_since = 0.0
        self._failed_at = self._broken_at = 0.0
        self._probes = 0
        self._probe_after = 0.0
        self._gate = asyncio.Lock()
        self._freed = asyncio.Event()
        self._requests, self._tokens = Meter(limits.rpm), Meter(limits.tpm)

    @asynccontextmanager
    async def turn(
        self, tokens: Callable[[], float], ready: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator["Turn"]:
        """A turn for one call, once all limits admit it.

        Args:
            tokens: Gives how many tokens the call is expected to take, as far as is known when it begins.
            ready: Called whenever the call may be about to begin; what it raises gives up the turn.
        """
        async with self._gate:  # calls begin one after another, so what admits one still holds when it begins
            await self._admit(tokens, ready)
            self._requests.take(1)
            use = self._tokens.take(tokens())
            self.in_flight += 1
        try:
            yield Turn(self, time.monotonic(), use)
        finally:
            self.in_flight -= 1
            self._freed.set()

    async def _admit(self, tokens: Callable[[], float], ready: Callable[[], Awaitable[None]] | None) -> None:
        while True:
            if ready is not None:
                await ready()
            if self.in_flight >= (1 if self.broken else int(self.allowed)):
                self._freed.clear()
                await self._freed.wait()
                continue
            open_at = max(self._paused_until, self._probe_after if self.broken else 0.0)
            wait = max(open_at - time.monotonic(), self._requests.wait(1), self._tokens.wait(tokens()))
            if wait <= 0:
                return
            await asyncio.sleep(wait + random.uniform(0, 0.02))

    def answered(self) -> None:
        """The server answered: allows more at once."""
        if self.broken:
            self.broken, self.allowed = False, min(self.allowed, _MODEST)
        self.failures = 0
        self.answers += 1
        self.allowed = min(self.most, self.allowed + (1.0 if self._growing_fast else 1.0 / self.allowed))

    def failed(self, error: PassingError, began: float) -> bool:
        """A call failed: allows fewer at once if the server throttles.

        Args:
            error: How it failed.
            began: When the call began.

        Returns:
            Whether so many calls in a row have failed that it must be found out whether the server does: then call
            `answered` or `breaks`.

        Raises:
            OracleError: patience is over.
        """
        now = time.monotonic()
        if self.failures == 0 or began - self._failed_at > max(self.limits.patience, _MINUTE):
            self.failures, self._failing_since = 0, now  # patience does not run while nothing is asked
        self._failed_at = now
        self.failures += 1
        if error.throttled or error.slow:
            self._growing_fast = False
            if began > self._shrunk_at:  # calls of one moment tell the same story once
                self.allowed, self._shrunk_at = max(1.0, self.allowed * _SHRINK), now
        if error.retry_after is not None:
            if error.retry_after > self.limits.patience:
                raise self._stop(error, f"it asks to wait {error.retry_after:.0f} seconds")
            if error.throttled:
                self._paused_until = max(self._paused_until, now + error.retry_after)
        if error.of_server:
            self._check_patience(error)
        if self.broken or (self.failures >= _BROKEN and error.of_server):
            self.breaks(error, began)
        return self.failures >= _BROKEN and not error.of_server

    async def request(self) -> None:
        """Takes a request out of turn, once those per minute admit it."""
        while (wait := self._requests.wait(1)) > 0:
            await asyncio.sleep(wait)
        self._requests.take(1)

    def breaks(self, error: PassingError, began: float) -> None:
        """Opens the breaker, or keeps it open.

        Args:
            error: How the call failed.
            began: When it began: only those that began after the breaker opened are probes.

        Raises:
            OracleError: patience is over.
        """
        now = time.monotonic()
        if not self.broken:
            self.broken, self._broken_at, self._probes = True, now, 0
        elif began >= self._broken_at:
            self._probes += 1
        self._check_patience(error)
        probe = min(_LONGEST_PROBE, 0.5 * 2.0 ** min(self._probes, 10))
        self._probe_after = min(now + probe, max(now, self._failing_since + self.limits.patience))

    def _check_patience(self, error: PassingError) -> None:
        failing = time.monotonic() - self._failing_since
        if failing >= self.limits.patience:
            raise self._stop(error, f"nothing but failures for {failing:.0f} seconds")

    def _stop(self, error: PassingError, why: str) -> OracleError:
        advice = error.advice or "Run the same command again to go on: nothing paid for is lost."
        return OracleError(f"oracle {self.name}: {error}; {why}. {advice}")


@dataclass(frozen=True)
class Turn:
    """One call's turn.

    Attributes:
        began: When it began, on the monotonic clock.
    """

    pace: Pace
    began: float
    _use: _Use

    def answered(self, tokens: float) -> None:
        """The server answered, and took so many tokens for it."""
        self._use.amount = tokens
        self.pace.answered()

    def failed(self, error: PassingError) -> bool:
        """The call failed; see `Pace.failed`.

        Raises:
            OracleError: patience is over.
        """
        self._use.amount = 0.0
        return self.pace.failed(error, self.began)
