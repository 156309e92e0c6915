"""huggingface_hub's async clients, as many as the calls in flight need, and closed when they are no longer needed."""

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from hf_reflect import background


_CALLS_PER_CLIENT = 100
"""A client's pool has this many connections, and it counts waiting for one of them as a timeout."""


class Clients:
    """A pool of clients, of this process alone: its calls run on that process's background loop.

    Args:
        make: Makes an `AsyncInferenceClient`.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._pid = os.getpid()
        self._busy: dict[Any, int] = {}

    @asynccontextmanager
    async def borrow(self) -> AsyncIterator[Any]:
        """A client with a free connection, for the time of one call."""
        if self._pid != os.getpid():
            self._pid, self._busy = os.getpid(), {}
        client = next((client for client, calls in self._busy.items() if calls < _CALLS_PER_CLIENT), None)
        if client is None:
            client = self._make()
            self._busy[client] = 0
            # At the latest when the interpreter ends: a connection left open is reported on stderr.
            weakref.finalize(self, _close, os.getpid(), client)
        self._busy[client] += 1
        try:
            yield client
        finally:
            self._busy[client] -= 1


def _close(pid: int, client: Any) -> None:
    if pid == os.getpid():
        background.finish(_quietly(client))


async def _quietly(client: Any) -> None:
    if (close := getattr(client, "close", None)) is not None:  # that of text-generation keeps nothing open
        # A call that was cancelled may not have seen its end yet; what it holds is closed by itself or by us.
        await asyncio.gather(close(), return_exceptions=True)
