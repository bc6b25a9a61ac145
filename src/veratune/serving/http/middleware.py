"""ASGI middleware: access log, Origin check, authentication, and bounds on bodies."""

import asyncio
import logging
import re
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veratune.serving.http.errors import ApiError
from veratune.serving.http.limiter import TenantLimiter
from veratune.serving.keys import Keys

access = logging.getLogger("veratune.access")
_UPLOADS = re.compile(r"/v1/(adapters/[^/]*|files.*)")
_PUBLIC = ("/", "/health", "/ready", "/metrics", "/openapi.json")


class AccessLog:
    """Log a line for each request: who, what, status and duration; never a prompt or a
    completion.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not access.isEnabledFor(logging.INFO):
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        finally:
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(1000 * (time.perf_counter() - start), 1),
                "tenant": scope.get("state", {}).get("tenant"),
            }
            access.info("request", extra={"fields": fields})


class OriginCheck:
    """Refuse calls that web pages of other sites make to a server without keys.

    A browser sends no key by itself, so a server with keys needs no such check. Without keys, any
    page that a user of this machine opens could post to the server.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self.app, self.origins = app, {origin.rstrip("/").lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._allowed(scope["method"], Headers(scope=scope)):
            error = ApiError(
                403,
                "the request comes from a web page of another site; allow it with --cors-origins",
                code="origin_not_allowed",
            )
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _allowed(self, method: str, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None:
            # A page cannot read the response of a GET without Origin; a link may lead here.
            safe = method in ("GET", "HEAD", "OPTIONS")
            return safe or headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        if origin.rstrip("/").lower() in self.origins:
            return True
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower()


class Authentication:
    """Find out who calls before the body is read. Every path but the public ones wants a key."""

    def __init__(self, app: ASGIApp, keys: Keys, limiter: TenantLimiter) -> None:
        self.app, self.keys, self.limiter = app, keys, limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _PUBLIC:
            await self.app(scope, receive, send)
            return
        try:
            self._authenticate(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _authenticate(self, scope: Scope) -> None:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        caller = self.keys.caller(key.strip() if kind.lower() == "bearer" else None)
        if caller is None:
            self.limiter.count_bad_key((scope.get("client") or ("",))[0])
            raise ApiError(
                401,
                "no API key, or an unknown one; send it as Authorization: Bearer KEY",
                "authentication_error",
                "invalid_api_key",
            )
        state = scope.setdefault("state", {})
        state["caller"], state["tenant"] = caller, caller.tenant
        self.limiter.count_request(caller.tenant)


class BodyLimits:
    """Refuse bodies that are too large (413) or come too slowly (408)."""

    def __init__(self, app: ASGIApp, upload: int, body: int, timeout: float = 120.0) -> None:
        """Set the bounds.

        Args:
            app: The application.
            upload: Bytes of adapter and training files.
            body: Bytes of other bodies.
            timeout: Seconds for the whole body.
        """
        self.app, self.upload, self.body, self.timeout = app, upload, body, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["method"] in ("PUT", "POST") and _UPLOADS.fullmatch(scope["path"])
        limit = self.upload if upload else self.body
        too_large = ApiError(413, f"the body is over {limit} bytes", code="body_too_large")
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            await too_large.response()(scope, receive, send)
            return
        guard = _BodyGuard(receive, send, limit, self.timeout, too_large)
        try:
            await self.app(scope, guard.receive, guard.send)
        except ApiError:
            if guard.error is None:
                raise
        if guard.error is not None and not guard.started:
            await guard.error.response()(scope, receive, send)


class _BodyGuard:
    """Counts a body and its time. Once it is refused, the application's own response is dropped."""

    def __init__(
        self, receive: Receive, send: Send, limit: int, timeout: float, too_large: ApiError
    ) -> None:
        self._receive, self._send, self._limit, self._too_large = receive, send, limit, too_large
        self._deadline = time.monotonic() + timeout
        self._seen, self._complete = 0, False
        self.error: ApiError | None = None
        self.started = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            left = self._deadline - time.monotonic()
            message = await asyncio.wait_for(self._receive(), max(0.001, left))
        except TimeoutError:
            self.error = ApiError(408, "the body came too slowly", code="body_timeout")
            raise self.error from None
        self._seen += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._seen > self._limit:
            self.error = self._too_large
            raise self.error
        return message

    async def send(self, message: Message) -> None:
        if self.error is not None and not self.started:
            return
        self.started = True
        await self._send(message)
