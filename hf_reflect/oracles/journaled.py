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
from hf_reflect.oracles.base import Oracle, PassingError, Reply, Request, RowFailedError
from hf_reflect.oracles.pace import Limits, Pace
from hf_reflect.oracles.purse import Purse


_LONGEST_BACKOFF = 60.0
_SETTLING = 0.05


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
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._call(key, request, attempt)
            except PassingError as error:
                self.spent.failed_calls += 1
                # While nothing at all succeeds it is the server that fails, not this request.
                if attempt >= self.limits.attempts and not self._pace.broken:
                    raise RowFailedError(f"{error} (attempt {attempt} of {self.limits.attempts})") from error
                wait = error.retry_after
            backoff = min(_LONGEST_BACKOFF, random.uniform(0.25, 0.5) * 2.0**attempt)
            await asyncio.sleep(backoff if wait is None else wait)

    async def _call(self, key: str, request: Request, attempt: int) -> Reply:
        async with self._pace.turn(self.spent.tokens_per_call) as turn:
            while self.purse.reached and self.purse.in_flight:
                await asyncio.sleep(_SETTLING)  # those in flight may turn out to be cheap
            if self.purse.reached:
                self.spent.not_asked += 1
                raise RowFailedError("not asked: the budget was reached", "skipped")
            self.purse.in_flight += 1
            try:
                reply = replace(await self.oracle.complete(request), attempts=attempt)
            except PassingError as error:
                turn.failed(error)
                raise
            except RowFailedError:
                turn.succeeded(0)  # this request has no answer, but the server is well
                raise
            finally:
                self.purse.in_flight -= 1
            self.journal.put("reply", {key: asdict(reply)})
            self.purse.pay(reply, time.monotonic() - turn.began)
            turn.succeeded((reply.prompt_tokens or 0) + (reply.completion_tokens or 0))
            return reply

    def _forget_parent_process(self) -> None:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
            self._pace = Pace(self.oracle.concurrency, self.limits, self.oracle.name)
