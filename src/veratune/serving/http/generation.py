"""GenerationCall: one HTTP call to an engine, answered whole or as a stream of server-sent
events.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, TypeVar

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from veratune.serving.engine.engine import Engine
from veratune.serving.engine.protocol import ServingEngine
from veratune.serving.engine.requests import BaseRequest, GenerationRequest, OutputDelta
from veratune.serving.http.builders import ResponseBuilder, dump, usage_of
from veratune.serving.http.dependencies import Context
from veratune.serving.http.errors import ApiError, to_api_error

T = TypeVar("T")
R = TypeVar("R", bound=BaseRequest)
_DISCONNECT_POLL = 1.0  # seconds between two looks at whether the client is still there


class ClientGoneError(Exception):
    """The client closed the connection before its response was whole."""


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """How a response is sent.

    Attributes:
        stream: As server-sent events.
        n: Choices of each prompt.
        include_usage: Whether a stream ends with the usage.
        continuous_usage: Whether every event has the usage so far.
    """

    stream: bool = False
    n: int = 1
    include_usage: bool = False
    continuous_usage: bool = False


class Client(Protocol):
    """Who waits for a response: a connection, or a batch."""

    async def is_disconnected(self) -> bool: ...


class GenerationCall:
    """The requests of one HTTP call. The first one that fails fails the call and cancels the
    rest.
    """

    def __init__(
        self,
        engine: Engine,
        client: Client,
        context: Context,
        requests: Sequence[GenerationRequest],
        builder: ResponseBuilder,
        options: StreamSettings,
    ) -> None:
        """Prepare; `respond` submits the requests.

        Args:
            engine: Runs the requests.
            client: Who waits for the response.
            context: The application's context.
            requests: `n` for each prompt in a row.
            builder: Turns output into JSON.
            options: How the response is sent.
        """
        self.engine, self.client, self.context = engine, client, context
        self.requests, self.builder, self.options = requests, builder, options
        self._outputs: asyncio.Queue[tuple[int, OutputDelta | BaseException]] = asyncio.Queue()
        self._parent = context.tracing.current_span() if context.tracing is not None else None
        self._streaming = False  # a streaming response notices by itself that its client has gone

    async def respond(self) -> Response:
        """Run the requests.

        Returns:
            The whole response, or a stream that begins after the first token, so that an error
            before it becomes a status. Raises ApiError.
        """
        self._submit()
        deltas = self._deltas()
        try:
            first = await anext(deltas)
            if self.options.stream:
                self._streaming = True
                events = self._events(first, deltas)
                return StreamingResponse(events, media_type="text/event-stream")
            outputs: list[list[OutputDelta]] = [[] for _ in self.requests]
            outputs[first[0]].append(first[1])
            async for index, delta in deltas:
                outputs[index].append(delta)
        except ClientGoneError:
            return Response(status_code=499)
        except Exception as error:
            raise to_api_error(error) from error
        whole = self.builder.whole(outputs, usage_of(self.requests, self.options.n))
        return JSONResponse(dump(whole))

    def _submit(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(self.requests):
                request.on_output = _poster(loop, self._outputs, index)
                self.engine.submit(request)
        except BaseException:
            self._cancel()
            raise

    def _cancel(self) -> None:
        for request in self.requests:
            if request.finished_time is None:
                self.engine.cancel(request)

    async def _deltas(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        """(request's index, delta) as they come. Cancels what is left when it ends early."""
        timeout = self.context.config.request_timeout
        now = time.monotonic()
        deadline, poll, unfinished = now + timeout, now + _DISCONNECT_POLL, len(self.requests)
        try:
            while unfinished:
                output: tuple[int, OutputDelta | BaseException] | None = None
                with contextlib.suppress(TimeoutError):
                    output = await asyncio.wait_for(self._outputs.get(), _DISCONNECT_POLL)
                now = time.monotonic()
                if now >= poll and not self._streaming:
                    poll = now + _DISCONNECT_POLL
                    if await self.client.is_disconnected():
                        raise ClientGoneError
                if now > deadline:
                    raise ApiError(504, f"the response took over {timeout:g} s", "server_error")
                if output is None:
                    continue
                index, delta = output
                if isinstance(delta, BaseException):
                    raise delta
                yield index, delta
                unfinished -= delta.finish_reason is not None
        finally:
            self._cancel()
            for request in self.requests:
                self.context.latencies.observe(self._base_name, request)
                if self.context.tracing is not None:
                    self.context.tracing.record(self.builder.model, request, self._parent)

    async def _events(
        self, first: tuple[int, OutputDelta], deltas: AsyncIterator[tuple[int, OutputDelta]]
    ) -> AsyncIterator[str]:
        builder, options = self.builder, self.options
        async with contextlib.aclosing(deltas):  # type: ignore[type-var]
            try:
                for index in range(len(self.requests)):
                    for content in builder.opening(index):
                        yield builder.event(content)
                for content in self._chunks(*first):
                    yield builder.event(content)
                async for index, delta in deltas:
                    for content in self._chunks(index, delta):
                        yield builder.event(content)
                usage = usage_of(self.requests, options.n)
                for content in builder.closing(usage, options.include_usage):
                    yield builder.event(content)
            except Exception as error:
                yield builder.error_event(to_api_error(error))
            yield builder.end_of_stream

    def _chunks(self, index: int, delta: OutputDelta) -> list[BaseModel]:
        usage = None
        if self.options.continuous_usage:
            usage = usage_of(self.requests, self.options.n)
        return self.builder.chunks(index, delta, usage)

    @property
    def _base_name(self) -> str:
        loops = self.context.service.loops
        return next(name for name, loop in loops.items() if loop is self.engine)


async def submit_and_wait(loop: ServingEngine[R], request: R) -> list[float]:
    """Run a request that has one output. Cancels it if the caller stops waiting.

    Args:
        loop: The engine.
        request: The request.

    Returns:
        Its output. Raises what went wrong.
    """
    running = asyncio.get_running_loop()
    result: asyncio.Future[list[float] | BaseException] = running.create_future()

    def put(value: list[float] | BaseException) -> None:
        if not result.done():
            result.set_result(value)

    request.on_output = lambda value: post_threadsafe(running, put, value)
    loop.submit(request)
    try:
        value = await result
    finally:
        if request.finished_time is None:
            loop.cancel(request)
    if isinstance(value, BaseException):
        raise value
    return value


def post_threadsafe(loop: asyncio.AbstractEventLoop, put: Callable[[T], None], value: T) -> None:
    """Pass a value from an engine's thread to the event loop."""
    with contextlib.suppress(RuntimeError):  # the event loop has ended with its server
        loop.call_soon_threadsafe(put, value)


def _poster(
    loop: asyncio.AbstractEventLoop,
    outputs: "asyncio.Queue[tuple[int, OutputDelta | BaseException]]",
    index: int,
) -> Callable[[OutputDelta | BaseException], None]:
    return lambda delta: post_threadsafe(loop, outputs.put_nowait, (index, delta))
