"""Cluster: replicas of one server behind one address, by Ray Serve (the extra `cluster`).

Replicas are alike and keep nothing: adapters are in a store that all of them read, and a replica
that dies loses only the responses it was making. A request goes to the replica that has its adapter
in memory, unless that one is busy.

    client -> Front (who calls, for which model) -> one of the Workers (a Service with its app)
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
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veratune.serving.engine.threads import run_in_temporary_thread
from veratune.serving.http.errors import ApiError
from veratune.serving.http.middleware import BodyLimits
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


@serve.deployment
class Worker:
    """One replica."""

    def __init__(self, make: Callable[[], tuple[Service, FastAPI]]) -> None:
        """Build the service and the application over it, and start its engines."""
        self.service, self.app = run_in_temporary_thread(make)
        for loop in self.service.loops.values():
            loop.start()

    @serve.multiplexed(max_num_models_per_replica=4096)  # type: ignore[untyped-decorator]
    async def note_adapter(self, name: str) -> str:
        """Tell Ray's router that this replica has used an adapter."""
        return name

    async def respond(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """Run the application for one request. Yields the ASGI messages that it sends."""
        name = serve.get_multiplexed_model_id()
        if name:
            await self.note_adapter(name)
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        received, gone = False, asyncio.Event()

        async def receive() -> Message:
            nonlocal received
            if received:
                await gone.wait()
                return {"type": "http.disconnect"}
            received = True
            return {"type": "http.request", "body": body, "more_body": False}

        running = asyncio.ensure_future(self.app(scope, receive, messages.put))
        running.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            running.result()
        finally:
            gone.set()
            running.cancel()

    def check_health(self) -> None:
        """Raise if this replica cannot answer: Ray then replaces it."""
        problem = self.service.problem()
        if problem is not None:
            raise RuntimeError(problem)


@serve.deployment
@serve.ingress()
class Front:
    """Reads which model a request is for, sends it to a Worker, and passes the response on."""

    def __init__(self, worker: DeploymentHandle, key_file: str | None, body_limit: int) -> None:
        """Keep the handle of the Workers."""
        self.worker, self.keys, self.body_limit = worker, Keys(key_file), body_limit

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The ASGI application. A function: uvicorn takes a method for ASGI 2."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._respond(scope, receive, send)

        return BodyLimits(app, self.body_limit, self.body_limit)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        handle = self.worker.options(stream=True, multiplexed_model_id=self._model_id(scope, body))
        responses: Any = handle.respond.remote({k: scope[k] for k in _SCOPE if k in scope}, body)
        left = asyncio.ensure_future(_wait_for_disconnect(receive))
        left.add_done_callback(lambda done: None if done.cancelled() else responses.cancel())
        started = False
        try:
            async for message in responses:
                started = True
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
            if not left.done():  # otherwise nobody waits for the response
                log.error("a replica failed: %s", error)
                await _send_failure(started, scope, receive, send)
        finally:
            left.cancel()

    def _model_id(self, scope: Scope, body: bytes) -> str:
        """TENANT/MODEL of a request that names a model: its replica is preferred; else ""."""
        if not body or len(body) > 2**20 or scope["method"] != "POST":
            return ""
        try:
            model = json.loads(body).get("model")
        except (ValueError, AttributeError, RecursionError):
            return ""
        key = Headers(scope=scope).get("authorization", "").partition(" ")[2].strip()
        caller = self.keys.caller(key or None)
        if caller is None or not isinstance(model, str) or len(model) >= 300:
            return ""
        return f"{caller.tenant}/{model}"


async def _send_failure(started: bool, scope: Scope, receive: Receive, send: Send) -> None:
    """Tell a client that its replica died: as a status, or as the last event of its stream."""
    died = ApiError(
        503, "the replica that was answering went away; send the request again", "server_error"
    )
    if not started:
        await died.response()(scope, receive, send)
        return
    event = f"data: {json.dumps(died.body())}\n\n".encode()
    await send({"type": "http.response.body", "body": event, "more_body": False})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def start(
    make: Callable[[], tuple[Service, FastAPI]],
    *,
    replicas: int,
    host: str,
    port: int,
    key_file: str | None = None,
    max_num_seqs: int = 32,
    max_queue: int = 512,
    upload_limit: int = 64 * 2**20,
) -> None:
    """Start replicas on this machine, or on the Ray cluster that RAY_ADDRESS names.

    Args:
        make: Builds a service and the application over it, in a replica's process.
        replicas: How many.
        host: The address to listen on.
        port: The port to listen on.
        key_file: The file of API keys.
        max_num_seqs: Sequences that a replica decodes at once.
        max_queue: Requests that wait for all replicas; more get status 429.
        upload_limit: Bytes of a body.
    """
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": host, "port": port})
    worker = Worker.options(  # type: ignore[attr-defined]
        num_replicas=replicas,
        max_ongoing_requests=2 * max_num_seqs,
        max_queued_requests=max_queue,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": 1},
    ).bind(make)
    front = Front.options(  # type: ignore[attr-defined]
        max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0}
    ).bind(worker, key_file, upload_limit)
    serve.run(front, name="veratune", route_prefix="/", logging_config={"log_level": "ERROR"})


def wait() -> None:
    """Wait for SIGTERM or SIGINT; then let responses end and stop all replicas."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    serve.shutdown()
    ray.shutdown()
