"""An oracle asked through the journal: each distinct request is paid for once."""

import asyncio
import os
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakValueDictionary

from hf_reflect import background
from hf_reflect.errors import OracleError
from hf_reflect.journal import Journal
from hf_reflect.oracles.base import Oracle, Reply, Request


@dataclass
class Spent:
    """What asking has cost so far in this process.

    Attributes:
        calls: Calls answered by the oracle.
        recalled: Calls answered by the journal.
        prompt_tokens: Tokens read by the oracle.
        completion_tokens: Tokens written by it.
    """

    calls: int = 0
    recalled: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class JournaledOracle:
    """Answers from the journal where it can, and records every new reply before handing it on.

    The limit on calls in flight is held here, so it holds across all threads that share this object.

    Args:
        oracle: Who is asked.
        journal: Where replies are kept.
    """

    def __init__(self, oracle: Oracle, journal: Journal) -> None:
        self.oracle, self.journal = oracle, journal
        self.spent = Spent()
        self._pid = 0
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._slots = asyncio.Semaphore(oracle.concurrency)
        self._asking: set[asyncio.Task[Any]] = set()
        self._stopped = False

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
        key = request.key(self.oracle.identity)
        # The same request twice in a dataset is one call: whoever comes second finds the first one's reply.
        async with self._locks.setdefault(key, asyncio.Lock()):
            return await self._answer(key, request)

    def stop(self) -> None:
        """Gives up all calls that wait or are in flight, and answers no more. May be called from any thread."""

        def cancel() -> None:
            for task in self._asking:
                task.cancel()

        self._stopped = True
        background.loop().call_soon_threadsafe(cancel)

    async def _answer(self, key: str, request: Request) -> Reply:
        known = self.journal.get("reply", [key])
        if key in known:
            self.spent.recalled += 1
            return Reply(**known[key])
        async with self._slots:
            reply = await self.oracle.complete(request)
            self.journal.put("reply", {key: asdict(reply)})
        self.spent.calls += 1
        self.spent.prompt_tokens += reply.prompt_tokens or 0
        self.spent.completion_tokens += reply.completion_tokens or 0
        return reply

    def _forget_parent_process(self) -> None:
        if self._pid != os.getpid():
            self._pid, self._locks = os.getpid(), WeakValueDictionary()
            self._slots = asyncio.Semaphore(self.oracle.concurrency)
