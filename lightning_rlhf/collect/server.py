"""The web page on which people compare responses."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_rlhf.collect.access import Access
from lightning_rlhf.collect.answers import GRADES, LONGEST_COMMENT, Answer, ConflictError, Given
from lightning_rlhf.collect.progress import answers_of, counts, progress, shown
from lightning_rlhf.collect.store import Store
from lightning_rlhf.collect.turns import turns

HERE = Path(__file__).parent
COOKIE = "annotator"
LONGEST_BODY = 16 * LONGEST_COMMENT
"""Bytes; a character may be written as `\\ud83d\\ude00`."""

HEADERS = {
    # Nothing from anywhere else, and no script but the page's own, whatever a response holds.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Ascii(JSONResponse):
    """JSON whatever a text holds: a lone surrogate cannot be written as UTF-8."""

    def render(self, content: Any) -> bytes:
        """The content as bytes."""
        return json.dumps(content, allow_nan=False).encode("ascii")


@dataclass(frozen=True)
class Page:
    """What the page says.

    Args:
        title: Above everything.
        instructions: What makes a response better, in the words of whoever asks.
        choose: Of three responses or more, whether all are put in order (``"rank"``) or only the ``"best"`` is chosen.
    """

    title: str = "Which response is better?"
    instructions: str | None = None
    choose: Literal["rank", "best"] = "rank"

    def __post_init__(self) -> None:
        if self.choose not in ("rank", "best"):
            raise ValueError(f"`choose={self.choose!r}` must be 'rank' or 'best'.")


class Headers:
    """Puts the same headers on whatever is sent.

    Args:
        app: That sends it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((key.lower().encode(), value.encode()) for key, value in HEADERS.items()),
                ]
            await send(message)

        await self.app(scope, receive, send_with_headers)


class Server:
    """Answers what the page asks.

    Args:
        store: Of tasks and answers.
        access: Says who somebody is.
        page: What it says.
        agreement_seconds: How old the agreement that is shown may be; to compute it all answers are read.
    """

    def __init__(self, store: Store, access: Access, page: Page | None = None, agreement_seconds: float = 10.0) -> None:
        self.store = store
        self.access = access
        self.page = page or Page()
        self.agreement_seconds = agreement_seconds
        self._agreement: tuple[float, dict[str, Any]] = (-math.inf, {})
        self._templates = Jinja2Templates(HERE / "templates")

    def app(self, hosts: list[str] | None = None) -> Starlette:
        """The application.

        Args:
            hosts: By which names it may be called; by default by any. A page elsewhere whose name is made to lead here
                cannot read it then.

        Returns:
            What a web server runs.
        """
        routes = [
            Route("/", self.index),
            Route("/progress", self.overview),
            Mount("/static", StaticFiles(directory=HERE / "static")),
            Route("/api/enter", self.enter, methods=["POST"]),
            Route("/api/leave", self.leave, methods=["POST"]),
            *(
                Route(f"/api/{action.__name__}", self._api(action), methods=["POST"])
                for action in (self.next, self.answer, self.undo)
            ),
        ]
        middleware = [Middleware(Headers)]
        if hosts is not None:
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=hosts))
        return Starlette(routes=routes, middleware=middleware)

    async def index(self, request: Request) -> Response:
        """The page, or the one on which to say who one is."""
        name = self._who(request)
        words = {"page": self.page, "name": name, "access": self.access, "grades": GRADES, "longest": LONGEST_COMMENT}
        return self._templates.TemplateResponse(request, "enter.html" if name is None else "compare.html", words)

    async def overview(self, request: Request) -> Response:
        """How far the work is."""
        name = self._who(request)
        if name is None:
            return RedirectResponse("/", HTTPStatus.SEE_OTHER)
        state = await run_in_threadpool(progress, self.store)
        words = {"page": self.page, "name": name, "state": state, "shown": shown}
        return self._templates.TemplateResponse(request, "progress.html", words)

    async def enter(self, request: Request) -> Response:
        """Says who somebody is, and lets the browser remember it."""
        try:
            fields = await _fields(request)
            name = self.access.admit(str(fields.get("name", "")), str(fields.get("token", "")))
            await run_in_threadpool(self.store.join, name)
        except PermissionError as error:
            await asyncio.sleep(0.5)  # so that guessing takes its time
            return Ascii({"error": str(error)}, HTTPStatus.FORBIDDEN)
        except ValueError as error:
            return Ascii({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        response = Ascii({"name": name})
        secure = request.url.scheme == "https"
        response.set_cookie(
            COOKIE, self.access.cookie(name), 30 * 86400, httponly=True, samesite="strict", secure=secure
        )
        return response

    async def leave(self, request: Request) -> Response:
        """Makes the browser forget."""
        response = Ascii({})
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    def next(self, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        """A task."""
        return self._state(name, self.store.next(name))

    def answer(self, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Keeps an answer, and gives the next task."""
        task, order, ranks = fields.get("task"), fields.get("order"), fields.get("ranks")
        if type(task) is not int or abs(task) >= 2**63 or not isinstance(order, list):
            raise ValueError(f"`task={task!r}` must be a number, and `order={order!r}` a list.")
        answer = Answer(
            fields.get("verdict", ""),
            tuple(ranks) if isinstance(ranks, list) else ranks,
            fields.get("grade"),
            fields.get("comment"),
        )
        self.store.answer(name, task, order, answer)
        return self._state(name, self.store.next(name))

    def undo(self, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Takes back the last answer, whose task is there again."""
        given = self.store.undo(name)
        if given is None:
            raise ConflictError("There is no answer to undo.")
        return self._state(name, given)

    def _state(self, name: str, given: Given | None) -> dict[str, Any]:
        tasks, done, flagged = counts(self.store)
        now = time.monotonic()
        if now - self._agreement[0] >= self.agreement_seconds:
            state = progress(self.store)
            alpha = None if math.isnan(state.alpha) else round(state.alpha, 2)
            self._agreement = (time.monotonic(), {"alpha": alpha, "units": state.units})
        return {
            "task": None if given is None else {**asdict(given), "prompt": turns(given.prompt)},
            "progress": {
                "tasks": tasks,
                "done": done,
                "flagged": flagged,
                "yours": answers_of(self.store, name),
                **self._agreement[1],
            },
        }

    def _api(self, action: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            name = self._who(request)
            if name is None:
                return Ascii({"error": "Say who you are first: load the page anew."}, HTTPStatus.UNAUTHORIZED)
            try:
                return Ascii(await run_in_threadpool(action, name, await _fields(request)))
            except ConflictError as error:
                return Ascii({"error": str(error)}, HTTPStatus.CONFLICT)
            except ValueError as error:
                return Ascii({"error": str(error)}, HTTPStatus.BAD_REQUEST)

        return endpoint

    def _who(self, request: Request) -> str | None:
        return self.access.name(request.cookies.get(COOKIE, ""))


async def _fields(request: Request) -> dict[str, Any]:
    """The JSON object that was sent; no other site's form can send one."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ValueError("What is sent must be JSON.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            raise ValueError(f"What is sent must have at most {LONGEST_BODY} bytes.")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"What is sent is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("What is sent must be a JSON object.")
    return fields
