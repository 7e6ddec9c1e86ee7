"""Endpoints of HTTP that are asked many things at a time, and again where they fail."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import aiohttp

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of HTTP that may be another the next time."""

SHOWN = 200
"""So much of an answer is in an error."""


class EndpointError(RuntimeError):
    """An endpoint did not do what it was asked to."""


class Endpoint:
    """Where JSON is posted to: so many requests at a time, again where that may help, and no longer than is said.

    A request is made anew after a connection that failed, a timeout, or a status of :data:`PASSING`. Before the k-th
    new one it waits for a time drawn evenly from 0 to the lesser of ``backoff * 2 ** (k - 1)`` and ``max_backoff``
    seconds (`"full jitter" <https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>`_), or for as
    long as the answer's ``Retry-After`` says, if that is a number of seconds up to ``max_backoff``.

    Args:
        url: Of HTTP or HTTPS.
        concurrency: Requests that are under way at the same time, per process.
        timeout: Seconds that one may take.
        retries: How often one is made anew.
        backoff: Seconds.
        max_backoff: Seconds.
        headers: Of every request.
        token_env: The environment variable that holds a token, sent as ``Authorization: Bearer``. It is in no
            checkpoint.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 0.5,
        max_backoff: float = 30.0,
        headers: Mapping[str, str] | None = None,
        token_env: str | None = None,
    ) -> None:
        if not is_url(url):
            raise ValueError(f"`url={url!r}` must begin with http:// or https://, and name a host.")
        for argument, number, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if number < least:
                raise ValueError(f"`{argument}={number}` must be at least {least}.")
        for argument, seconds in {"timeout": timeout, "backoff": backoff, "max_backoff": max_backoff}.items():
            if not seconds > 0:
                raise ValueError(f"`{argument}={seconds}` must be more than 0, in seconds.")
        self.url = url
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.max_backoff = max_backoff
        self.headers = dict(headers or {})
        self.token_env = token_env

    async def post(self, bodies: Sequence[Any], describe: Callable[[int], str]) -> list[Any]:
        """Posts every body by itself. The first that fails ends the others.

        Args:
            bodies: What can be written as JSON.
            describe: Says of a body's number what it holds, for errors.

        Returns:
            The answers, as JSON, in order.

        Raises:
            EndpointError: If one failed.
        """
        import aiohttp

        sent = [_encoded(body, describe(i)) for i, body in enumerate(bodies)]
        gate = asyncio.Semaphore(self.concurrency)
        timeout = aiohttp.ClientTimeout(total=self.timeout)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers(), trust_env=True) as session:
            tasks = [asyncio.ensure_future(self._one(session, gate, body, describe(i))) for i, body in enumerate(sent)]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", **self.headers}
        if self.token_env is None:
            return headers
        if self.token_env not in os.environ:
            raise EndpointError(f"`token_env={self.token_env!r}` is no environment variable: set it to the token")
        return {**headers, "Authorization": f"Bearer {os.environ[self.token_env]}"}

    async def _one(self, session: aiohttp.ClientSession, gate: asyncio.Semaphore, body: bytes, what: str) -> Any:
        async with gate:
            attempt = 0
            while True:
                answer, trouble, wait = await self._attempt(session, body)
                attempt += 1
                if trouble is None:
                    return answer
                if wait is None or attempt > self.retries:
                    attempts = f"{attempt} attempt{'' if attempt == 1 else 's'}"
                    raise EndpointError(f"`url={self.url!r}` {trouble} on {what}, after {attempts}")
                await asyncio.sleep(wait or random.SystemRandom().uniform(0.0, self.longest_wait(attempt)))

    def longest_wait(self, attempt: int) -> float:
        """How long it may wait after an attempt that failed, in seconds.

        Args:
            attempt: Its number, from 1.

        Returns:
            The end of the range that the wait is drawn from.
        """
        return min(self.max_backoff, self.backoff * 2.0 ** min(attempt - 1, 64))

    async def _attempt(self, session: aiohttp.ClientSession, body: bytes) -> tuple[Any, str | None, float | None]:
        """The answer; or what went wrong, and how long to wait: 0 as long as one likes, None for ever."""
        import aiohttp

        try:
            async with session.post(self.url, data=body, allow_redirects=False) as response:
                text = (await response.read()).decode("utf-8", "replace")
        except TimeoutError:
            return None, f"did not answer within `timeout={self.timeout}` seconds", 0.0
        except aiohttp.ClientError as error:
            return None, f"failed ({type(error).__name__}: {error})", 0.0
        if response.status >= 300:
            trouble = f"answered {response.status} {response.reason} ({text[:SHOWN]!r})"
            return None, trouble, self._told_wait(response) if response.status in PASSING else None
        try:
            return json.loads(text), None, None
        except ValueError:
            return None, f"answered what is no JSON ({text[:SHOWN]!r})", None

    def _told_wait(self, response: aiohttp.ClientResponse) -> float:
        told = response.headers.get("Retry-After", "")
        return min(float(told), self.max_backoff) if told.isdecimal() else 0.0


def _encoded(body: Any, what: str) -> bytes:
    try:
        return json.dumps(body).encode()
    except (TypeError, ValueError) as error:
        raise EndpointError(f"what is to be sent on {what} cannot be written as JSON: {error}") from error


def is_url(value: Any) -> bool:
    """Whether a value names an endpoint.

    Args:
        value: Any.

    Returns:
        The answer.
    """
    return isinstance(value, str) and urlsplit(value).scheme in ("http", "https") and bool(urlsplit(value).hostname)
