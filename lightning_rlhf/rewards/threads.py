"""Threads of their own for rewards that wait: one for all that work in the background, one for all that are awaited.

Each lasts as long as the process, so that what belongs to a thread or to an event loop (a connection, the client of an
endpoint) can be kept from one call to the next.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def background() -> ThreadPoolExecutor:
    """What runs one thing after the other in the one thread in which rewards work while something else does."""
    return _background(os.getpid())


def begun(awaitable: Awaitable[Any]) -> Future[Any]:
    """Begins to await something, in the one event loop in which all rewards are awaited.

    Args:
        awaitable: What an async function returned.

    Returns:
        What it comes to.
    """

    async def awaited() -> Any:
        return await awaitable

    return asyncio.run_coroutine_threadsafe(awaited(), _loop(os.getpid()))


def finished(coming: Future[Any]) -> Any:
    """Waits for what was begun; ends it where it is not waited for any more.

    Args:
        coming: From :func:`begun`.

    Returns:
        What it came to.
    """
    try:
        return coming.result()
    finally:
        coming.cancel()


@functools.cache
def _background(process: int) -> ThreadPoolExecutor:
    # By process: a fork has none of the threads.
    return ThreadPoolExecutor(1, "reward")


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="awaited rewards", daemon=True).start()
    return loop
