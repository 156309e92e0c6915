"""One event loop in a background thread, so that synchronous callables can wait for many calls at once.

`Dataset.map` accepts async functions, but not inside a running loop (a notebook), and gives every call a loop of its
own, which no HTTP client survives. A loop that we own has neither problem.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any, TypeVar


T = TypeVar("T")

_THREAD = "hf_reflect"
_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the background loop of this process and waits for its result.

    An interrupt in the waiting thread (Ctrl-C) cancels the coroutine.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def finish(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Runs a coroutine that tidies up, for at most a second; called by the loop's own thread, it doesn't wait."""
    mine = loop()
    future = asyncio.run_coroutine_threadsafe(coroutine, mine)
    if threading.current_thread().name != _THREAD:
        with suppress(FutureTimeoutError):
            future.result(1.0)


def loop() -> asyncio.AbstractEventLoop:
    """The loop of this process; a forked process gets its own."""
    with _lock:
        mine = _loops.get(os.getpid())
        if mine is None:
            _loops.clear()
            mine = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=mine.run_forever, name=_THREAD, daemon=True).start()
        return mine


def _new_lock_after_fork() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock_after_fork)
