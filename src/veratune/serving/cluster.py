"""Cluster: replicas of one server behind one address, by Ray Serve (the extra `cluster`).

Replicas are alike and keep nothing: adapters are in a store that all of them read, and a replica that dies takes with it only the answers
it was making. A request goes where its adapter is in memory already, unless that replica has too much to do.

    client -> Front (who asks, for what) -> one of the Workers (a Service with its HTTP application)
"""

import asyncio
import json
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError

from veratune.serving.engine.loop import run_in_temporary_thread
from veratune.serving.http.app import BodyLimits
from veratune.serving.http.routes.base import ApiError
from veratune.serving.keys import Keys
from veratune.serving.service import Service

log = logging.getLogger(__name__)
_SCOPE = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "client",
    "server",
)
Message = dict[str, Any]


@serve.deployment
class Worker:
    """One replica. make: gives the service, and the application over it."""

    def __init__(self, make: Callable[[], tuple[Service, FastAPI]]) -> None:
        self.service, self.app = run_in_temporary_thread(make)
        for loop in self.service.loops.values():
            loop.start()

    @serve.multiplexed(max_num_models_per_replica=4096)  # type: ignore[untyped-decorator]
    async def hold(self, name: str) -> str:
        """Tell the router that this replica has an adapter; the pool knows what is in memory."""
        return name

    async def answer(self, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """What the application sends for one request, as ASGI messages."""
        name = serve.get_multiplexed_model_id()
        if name:
            await self.hold(name)
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        asked, gone = False, asyncio.Event()

        async def receive() -> Message:
            nonlocal asked
            if asked:
                await gone.wait()
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        running = asyncio.ensure_future(self.app(scope, receive, messages.put))  # type: ignore[arg-type]
        running.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            running.result()
        finally:
            gone.set()
            running.cancel()

    def check_health(self) -> None:
        """Raise where this replica cannot answer: Ray starts another in its place."""
        reason = self.service.ready()
        if reason is not None:
            raise RuntimeError(reason)


@serve.deployment
@serve.ingress()
class Front:
    """Reads whom a request is for and sends it on; what comes back is passed on as it comes."""

    def __init__(self, worker: Any, key_file: str | None, body_limit: int) -> None:
        self.worker, self.keys, self.body_limit = worker, Keys(key_file), body_limit

    def __serve_build_asgi_app__(self) -> Any:
        async def app(
            scope: Any, receive: Any, send: Any
        ) -> None:  # a function: uvicorn takes a method for the older interface
            await self._answer(scope, receive, send)

        return BodyLimits(app, self.body_limit, self.body_limit)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        handle = self.worker.options(stream=True, multiplexed_model_id=self._name(scope, body))
        answers = handle.answer.remote({key: scope[key] for key in _SCOPE if key in scope}, body)
        left = asyncio.ensure_future(_gone(receive))
        left.add_done_callback(lambda done: None if done.cancelled() else answers.cancel())
        begun = False
        try:
            async for message in answers:
                begun = True
                await send(message)
        except BackPressureError:
            busy = ApiError(
                429,
                "too many requests are waiting; try again later",
                "rate_limit_error",
                "rate_limit_exceeded",
            )
            await busy.response()(scope, receive, send)
        except (RayError, asyncio.CancelledError) as error:
            if left.done():
                return  # nobody waits for it
            log.error("a replica failed: %s", error)
            died = ApiError(
                503,
                "the replica that was answering went away; send the request again",
                "server_error",
            )
            if not begun:
                await died.response()(scope, receive, send)
                return
            told = {"error": {"message": str(died), "type": died.kind, "param": None, "code": None}}
            await send(
                {
                    "type": "http.response.body",
                    "body": f"data: {json.dumps(told)}\n\n".encode(),
                    "more_body": False,
                }
            )
        finally:
            left.cancel()

    def _name(self, scope: Any, body: bytes) -> str:
        """Tenant and model of a request, where the body names one: requests for it prefer the replica that had it last."""
        if not body or len(body) > 2**20 or scope["method"] != "POST":
            return ""
        try:
            model = json.loads(body).get("model")
        except (ValueError, AttributeError, RecursionError):
            return ""
        key = (
            dict(scope["headers"])
            .get(b"authorization", b"")
            .decode("latin-1")
            .partition(" ")[2]
            .strip()
        )
        caller = self.keys.caller(key or None)
        return (
            f"{caller.tenant}/{model}"
            if caller is not None and isinstance(model, str) and len(model) < 300
            else ""
        )


async def _gone(receive: Any) -> None:
    """Until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def start(
    make: Callable[[], tuple[Service, FastAPI]], *, replicas: int, host: str, port: int, key_file: str | None = None, rows: int = 32,
    waiting: int = 512, upload_limit: int = 64 * 2**20,
) -> None:  # fmt: skip
    """Start replicas on this machine, or on the Ray cluster that RAY_ADDRESS names, and return when they answer.

    rows, waiting: requests that a replica takes at once and that wait before the replicas; more get status 429.
    """
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": host, "port": port})
    worker = Worker.options(  # type: ignore[attr-defined]
        num_replicas=replicas, max_ongoing_requests=2 * rows, max_queued_requests=waiting, health_check_period_s=2,
        ray_actor_options={"num_cpus": 1},
    ).bind(make)  # fmt: skip
    front = Front.options(  # type: ignore[attr-defined]
        max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0}
    ).bind(worker, key_file, upload_limit)
    serve.run(front, name="veratune", route_prefix="/", logging_config={"log_level": "ERROR"})


def wait() -> None:
    """Until SIGTERM or SIGINT; then replicas let answers end, and all goes down."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    serve.shutdown()
    ray.shutdown()
