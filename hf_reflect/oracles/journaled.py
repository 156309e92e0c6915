"""An oracle asked through the journal, patiently: each distinct request is paid for once."""

import asyncio
import os
import random
import time
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakValueDictionary

from hf_reflect import background
from hf_reflect.errors import OracleError
from hf_reflect.journal import Journal
from hf_reflect.oracles.base import Oracle, PassingError, Reply, Request, RowFailedError, Sampling
from hf_reflect.oracles.pace import Limits, Pace
from hf_reflect.oracles.purse import Purse


_LONGEST_BACKOFF = 60.0
_SETTLING = 0.05
_CANARY = Request(({"role": "user", "content": "Say OK."},), Sampling(max_tokens=1))
"""Asked where many requests in a row have failed in ways of their own."""


class JournaledOracle:
    """Answers from the journal where it can, and records every new reply before handing it on.

    The limits are held here, so they hold across all threads that share this object.

    Args:
        oracle: Who is asked.
        journal: Where replies are kept.
        limits: How hard to try.
        purse: The budget, where it is shared with other oracles.
    """

    def __init__(
        self, oracle: Oracle, journal: Journal, limits: Limits | None = None, purse: Purse | None = None
    ) -> None:
        self.oracle, self.journal = oracle, journal
        self.purse = purse or Purse(limits or Limits())
        self.limits = limits or self.purse.limits
        self.spent = self.purse.spent
        self._pid = 0
        self._pace: Pace
        self._locks: WeakValueDictionary[str, asyncio.Lock]
        self._finding_out = False
        self._asking: set[asyncio.Task[Any]] = set()
        self._stopped = False

    @property
    def pace(self) -> Pace:
        """The pace at which this process asks."""
        self._forget_parent_process()
        return self._pace

    async def ask(self, request: Request) -> Reply:
        """The reply to a request. Runs on the background loop.

        Raises:
            RowFailedError: this request has no answer.
            OracleError: no request will have one.
        """
        self._forget_parent_process()
        if self._stopped:
            raise OracleError(f"oracle {self.oracle.name}: the run was stopped.")
        if task := asyncio.current_task():
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        if getattr(self.oracle, "recorded", False):
            return await self.oracle.complete(request)
        key = request.key(self.oracle.identity)
        # The same request twice in a dataset is one call: whoever comes second finds the first one's reply.
        async with self._locks.setdefault(key, asyncio.Lock()):
            known = self.journal.get("reply", [key])
            if key in known:
                self.spent.recalled += 1
                return Reply(**known[key])
            return await self._try(key, request)

    def stop(self) -> None:
        """Gives up all calls that wait or are in flight, and answers no more. May be called from any thread."""

        def cancel() -> None:
            for task in self._asking:
                task.cancel()

        self._stopped = True
        background.loop().call_soon_threadsafe(cancel)

    async def _try(self, key: str, request: Request) -> Reply:
        """Asks until there is an answer, or no hope of one."""
        calls = failures = 0
        while True:
            calls += 1
            try:
                return await self._call(key, request, calls)
            except PassingError as error:
                self.spent.failed_calls += 1
                # What would have hit any other request is not held against this one: patience ends that.
                failures += not (error.of_server or self._pace.broken)
                if failures >= self.limits.attempts:
                    raise RowFailedError(f"{error} (attempt {failures} of {self.limits.attempts})") from error
                wait = error.retry_after
            if self._pace.broken:
                continue  # the pace says when it is worth another try
            backoff = random.uniform(0.25, 0.5) * 2.0 ** min(calls, 8)
            await asyncio.sleep(min(_LONGEST_BACKOFF, backoff) if wait is None else wait)

    async def _call(self, key: str, request: Request, attempt: int) -> Reply:
        async with self._pace.turn(lambda: self.spent.tokens_per_call, self._afford) as turn:
            self.purse.in_flight += 1
            try:
                reply = replace(await self.oracle.complete(request), attempts=attempt)
            except PassingError as error:
                if turn.failed(error):
                    await self._find_out(error)
                raise
            except RowFailedError:
                turn.answered(0)  # this request has no answer, but the server is well
                raise
            finally:
                self.purse.in_flight -= 1
            self.journal.put("reply", {key: asdict(reply)})
            turn.answered(self.purse.pay(request, reply, time.monotonic() - turn.began))
            return reply

    async def _find_out(self, error: PassingError) -> None:
        """Whether it is the server that fails, or only what it is asked: a question that is none can tell.

        One at a time asks it, and what others were answered meanwhile tells as well.

        Raises:
            OracleError: patience is over.
        """
        if self._finding_out:
            return
        self._finding_out, before = True, self._pace.answers
        try:
            await self._pace.request()
            if self._pace.answers != before:
                return
            await self.oracle.complete(_CANARY)
        except PassingError:
            if self._pace.answers == before:
                self._pace.breaks(error, time.monotonic())
        except RowFailedError:
            self._pace.answered()
        else:
            self._pace.answered()
        finally:
            self._finding_out = False

    async def _afford(self) -> None:
        """Waits until it is clear whether the budget has room for a call.

        Raises:
            RowFailedError: it has none.
        """
        while self.purse.reached and self.purse.in_flight:
            await asyncio.sleep(_SETTLING)  # those in flight may turn out to be cheap
        if self.purse.reached:
            self.spent.not_asked += 1
            raise RowFailedError("not asked: the budget was reached", "skipped")

    def _forget_parent_process(self) -> None:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._finding_out = False
            self._locks = WeakValueDictionary()
            where = getattr(self.oracle, "spec", None) or self.oracle.name
            self._pace = Pace(self.oracle.concurrency, self.limits, where.partition("#")[0])
