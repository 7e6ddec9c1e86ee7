"""Rewards that an endpoint gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from lightning_rlhf.dotted import imported
from lightning_rlhf.rewards.endpoint import SHOWN, Endpoint, EndpointError
from lightning_rlhf.rewards.functions import plain
from lightning_rlhf.rewards.stored import StoredReward


class HTTPReward(StoredReward):
    """A reward that an endpoint gives: responses are posted as JSON, some at a time, and scores come back.

    By default a request is ``{"prompts": [...], "responses": [...]}``, and beside them the keys of the prompts' rows
    that ``metadata`` names; the answer is ``{"scores": [...]}`` or a list alone, one number per response (None where
    the reward does not apply), or one list per response of a number per token.

    Args:
        url: Of HTTP or HTTPS.
        batch_size: Responses of a request.
        metadata: Keys of the prompts' rows that are sent too.
        write: Makes the body of a request in another way: gets ``prompts``, ``responses`` and, by keyword, what
            ``metadata`` names; returns what can be written as JSON. Or its dotted name.
        read: Makes the list of scores of an answer in another way: gets what was answered. Or its dotted name.
        name: Under which it is logged; the host by default.
        **kwargs: Of :class:`Endpoint`: concurrency, timeout, retries, backoff, max_backoff, headers, token_env.

    Example:
        >>> HTTPReward("http://localhost:8000/score", batch_size=16, timeout=10.0).name
        'localhost'
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 8,
        metadata: Sequence[str] = (),
        write: Callable[..., Any] | str | None = None,
        read: Callable[[Any], Any] | str | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.endpoint = Endpoint(url, **kwargs)
        if batch_size < 1:
            raise ValueError(f"`batch_size={batch_size}` must be at least 1.")
        if isinstance(metadata, str):
            raise TypeError(f"`metadata={metadata!r}` must be a list of keys: write [{metadata!r}].")
        own = {"batch_size": batch_size, "metadata": list(metadata), "write": write, "read": read, "name": name}
        self._given = {"url": url, **own, **kwargs}
        self.batch_size = batch_size
        self.metadata = tuple(metadata)
        self.write = _function("write", write, written)
        self.read = _function("read", read, scores_of)
        self.name = name or str(urlsplit(url).hostname)

    async def __call__(
        self, prompts: Sequence[Any], responses: Sequence[str], **metadata: Any
    ) -> list[float | None] | list[list[float] | None]:
        """Scores responses.

        Args:
            prompts: Strings or chat messages.
            responses: What was written to them.
            **metadata: What else the prompts' rows hold.

        Returns:
            What was answered.

        Raises:
            EndpointError: If the endpoint failed, or answered what does not fit; the responses are named.
            ValueError: If the rows lack a key that is to be sent.
        """
        for key in self.metadata:
            if key not in metadata:
                raise ValueError(f"`metadata` names {key!r}, which is no key of the prompts' rows")
        parts = [slice(start, start + self.batch_size) for start in range(0, len(responses), self.batch_size)]
        bodies = [
            self.write(prompts[part], responses[part], **{key: metadata[key][part] for key in self.metadata})
            for part in parts
        ]

        def describe(number: int) -> str:
            part = range(len(responses))[parts[number]]
            rows = f"response {part[0]}" if len(part) == 1 else f"responses {part[0]} to {part[-1]}, the first of them"
            return f"{rows} {responses[part[0]]!r}"

        answers = await self.endpoint.post(bodies, describe)
        scores: list[Any] = []
        for number, (part, answer) in enumerate(zip(parts, answers, strict=True)):
            found, count = plain(self.read(answer)), len(responses[part])
            if not isinstance(found, list) or len(found) != count:
                raise EndpointError(
                    f"`url={self.endpoint.url!r}` answered {str(answer)[:SHOWN]!r} on {describe(number)}: it must "
                    f"give a list of {count} scores"
                )
            scores += found
        return scores


def written(prompts: Sequence[Any], responses: Sequence[str], **metadata: Any) -> dict[str, Any]:
    """The body of a request.

    Args:
        prompts: Strings or chat messages.
        responses: What was written to them.
        **metadata: What else is sent.

    Returns:
        All of these by their names.
    """
    return {"prompts": list(prompts), "responses": list(responses), **metadata}


def scores_of(answer: Any) -> Any:
    """The scores of an answer.

    Args:
        answer: What an endpoint said.

    Returns:
        What it has under ``"scores"``, or all of it.
    """
    return answer.get("scores") if isinstance(answer, Mapping) else answer


def _function(argument: str, given: Callable[..., Any] | str | None, default: Callable[..., Any]) -> Callable[..., Any]:
    function = default if given is None else imported(given, argument) if isinstance(given, str) else given
    if not callable(function):
        raise TypeError(f"`{argument}={given!r}` must be callable, or the dotted name of a function.")
    return function
