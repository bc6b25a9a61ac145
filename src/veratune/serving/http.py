"""HTTP: the OpenAI-compatible API, and the adapters' own, over a Service."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal

import prometheus_client
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from veratune.errors import (
    AdapterFileError,
    BankFullError,
    BusyError,
    StoreError,
    UnknownAdapterError,
    UnsupportedError,
    VeratuneError,
)
from veratune.serving.engine import Piece
from veratune.serving.engine import Request as Asked
from veratune.serving.keys import Caller, Keys
from veratune.serving.sampling import Choice, Sampling
from veratune.serving.service import Service, tokens_of
from veratune.serving.store import Version
from veratune.tasks.language import render

log = logging.getLogger(__name__)
MiB = 2**20


class ApiError(Exception):
    """An error in OpenAI's shape. status: of HTTP; kind: its type; code: a word for programs."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code

    def response(self) -> JSONResponse:
        body = {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code}}
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        return JSONResponse(body, self.status, headers)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class StreamOptions(_Body):
    include_usage: bool = False


class _Generation(_Body):
    """What both kinds of generation take. What the engine does not do may be sent at its value for nothing."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatBody(_Generation):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class CompletionBody(_Generation):
    prompt: str | list[int]
    max_tokens: int = Field(16, ge=1, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] = 1


class LoadBody(_Body):
    lora_name: str
    lora_path: str = ""
    lora_int_id: int | None = None


class RollBackBody(_Body):
    version: int = Field(ge=1, lt=2**31)


def build(
    service: Service, keys: Keys, *, upload_limit: int = 64 * MiB, body_limit: int = 4 * MiB, timeout: float = 600.0
) -> FastAPI:
    """The application. upload_limit: bytes of an adapter's file; body_limit: of any other body; timeout: seconds of one answer."""
    app = FastAPI(title="veratune", openapi_url="/openapi.json", docs_url=None, redoc_url=None)
    app.add_middleware(_Limits, upload=upload_limit, body=body_limit)
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Metrics(service))

    def caller(request: Request) -> Caller:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        found = keys.caller(key.strip() if kind.lower() == "bearer" else None)
        if found is None:
            raise ApiError(
                401,
                "no key, or one that is not known; send it as Authorization: Bearer KEY",
                "authentication_error",
                "invalid_api_key",
            )
        return found

    Who = Annotated[Caller, Depends(caller)]

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(VeratuneError)
    async def own_error(request: Request, error: VeratuneError) -> Response:
        return _translated(error).response()

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] or first["loc"])
        said = "it is not known here" if first["type"] == "extra_forbidden" else first["msg"]
        return ApiError(400, f"{where}: {said}").response()

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return ApiError(500, "something went wrong here; the log says what", "server_error").response()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    def ready() -> dict[str, str]:
        reason = service.ready()
        if reason is not None:
            raise ApiError(503, reason, "server_error")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models(who: Who, after: str = "", limit: int = 100) -> dict[str, Any]:
        limit = min(max(limit, 1), 1000)
        found = service.names(who, after, limit)
        data = [_model(name, entry.version.created) for name, entry in found]
        base = [] if after else [_model(service.name, 0)]
        last = found[-1][0] if found else None
        return {"object": "list", "data": base + data, "has_more": len(found) == limit, "last_id": last}

    @app.get("/v1/models/{model:path}")
    def model(model: str, who: Who) -> dict[str, Any]:
        place = service.find(who, model)
        return _model(model, 0 if place is None else place.version.created)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request, who: Who) -> Response:
        talk = [{"role": m.role, "content": _content(m)} for m in body.messages]
        try:
            text = render(talk, service.engine.tokenizer, answer_next=True)
        except Exception as error:  # a template may refuse an order of roles in any way it likes
            raise ApiError(
                400, f"messages: the model's chat template refuses them: {' '.join(str(error).split())[:200]}"
            ) from error
        prompt = service.engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        most = body.max_completion_tokens or body.max_tokens or max(1, min(256, service.engine.length - len(prompt)))
        asked = _asked(service, who, body, prompt, most, body.top_logprobs if body.logprobs else None)
        return await _reply(service, http, body, asked, _Chat(service), timeout)

    @app.post("/v1/completions")
    async def completion(body: CompletionBody, http: Request, who: Who) -> Response:
        prompt = tokens_of(service.engine, body.prompt) if isinstance(body.prompt, str) else body.prompt
        size = service.engine.model.config.get_text_config().vocab_size
        if any(not 0 <= token < size for token in prompt):
            raise ApiError(400, f"prompt: tokens are numbers from 0 to {size - 1}")
        asked = _asked(service, who, body, prompt, body.max_tokens, body.logprobs)
        return await _reply(service, http, body, asked, _Completion(service), timeout)

    @app.put("/v1/adapters/{name}", status_code=201)
    async def put(name: str, request: Request, who: Who, tenant: str | None = None) -> dict[str, Any]:
        data = await request.body()
        owner = _owner(who, tenant)
        version = await asyncio.to_thread(service.put, owner, name, data)
        return _adapter(name, owner, version)

    @app.get("/v1/adapters")
    def adapters(who: Who, after: str = "", limit: int = 100, tenant: str | None = None) -> dict[str, Any]:
        owner, limit = _owner(who, tenant), min(max(limit, 1), 1000)
        found = service.store.names(owner, after, limit)
        return {"object": "list", "data": [_adapter(e.name, owner, e.version) for e in found], "has_more": len(found) == limit}

    @app.get("/v1/adapters/{name}")
    def get(name: str, who: Who, tenant: str | None = None, version: int | None = None) -> Response:
        owner = _owner(who, tenant)
        number = service.store.newest(owner, name).number if version is None else version
        data = service.store.get(owner, name, number)
        headers = {"X-Adapter-Version": str(number), "Content-Disposition": f'attachment; filename="{name}.safetensors"'}
        return Response(data, media_type="application/octet-stream", headers=headers)

    @app.delete("/v1/adapters/{name}")
    def delete(name: str, who: Who, tenant: str | None = None) -> dict[str, Any]:
        service.delete(_owner(who, tenant), name)
        return {"id": name, "object": "adapter", "deleted": True}

    @app.get("/v1/adapters/{name}/versions")
    def versions(name: str, who: Who, tenant: str | None = None) -> dict[str, Any]:
        owner = _owner(who, tenant)
        return {"object": "list", "data": [_adapter(name, owner, version) for version in service.store.versions(owner, name)]}

    @app.post("/v1/adapters/{name}/rollback")
    def roll_back(name: str, body: RollBackBody, who: Who, tenant: str | None = None) -> dict[str, Any]:
        owner = _owner(who, tenant)
        return _adapter(name, owner, service.store.roll_back(owner, name, body.version))

    @app.post("/v1/load_lora_adapter")
    def load(body: LoadBody, who: Who) -> PlainTextResponse:
        """For tools that know this call: adapters are loaded when they are asked for, so only whether it is there is told. Paths are never read."""
        if body.lora_path and body.lora_path != body.lora_name:
            raise ApiError(
                400, f"lora_path: files of the server are not read; send the bytes by PUT /v1/adapters/{body.lora_name}"
            )
        service.find(who, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    def unload(body: LoadBody, who: Who) -> PlainTextResponse:
        place = service.find(who, body.lora_name)
        if place is not None:
            service.engine.bank.drop((place.tenant, place.name, place.version.number))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return app


def _asked(service: Service, who: Caller, body: _Generation, prompt: list[int], most: int, logprobs: int | None) -> Asked:
    sampling = Sampling(
        max_tokens=most,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=body.stops,
        logprobs=logprobs,
    )
    return service.request(who, body.model, prompt, sampling)


async def _reply(service: Service, http: Request, body: _Generation, asked: Asked, form: "_Form", timeout: float) -> Response:
    """Submit, and answer whole or in pieces."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
    asked.listen = lambda piece: _told(loop, pieces, piece)
    service.engine.submit(asked)
    name, created = f"{form.prefix}-{uuid.uuid4().hex}", int(time.time())
    head = {"id": name, "created": created, "model": body.model}

    async def each() -> AsyncIterator[Piece]:
        end = time.monotonic() + timeout
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(pieces.get(), 1.0)
                except TimeoutError:
                    if await http.is_disconnected():
                        raise asyncio.CancelledError from None
                    if time.monotonic() > end:
                        raise ApiError(504, f"the answer took over {timeout:g} s", "server_error") from None
                    continue
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            if asked.ended is None:
                service.engine.cancel(asked)

    def usage() -> dict[str, int]:
        said = len(asked.text.tokens) if asked.text else 0
        return {"prompt_tokens": len(asked.prompt), "completion_tokens": said, "total_tokens": len(asked.prompt) + said}

    answer = each()
    try:
        first = await anext(answer)  # what fails before the first token fails as a status, not inside a stream
    except asyncio.CancelledError:
        return Response(status_code=499)
    except Exception as error:
        raise _translated(error) from error
    if not body.stream:
        text, choices, finish = first.text, [first.choice], first.finish
        try:
            async for piece in answer:
                text, finish = text + piece.text, piece.finish
                choices.append(piece.choice)
        except asyncio.CancelledError:
            return Response(status_code=499)
        except Exception as error:
            raise _translated(error) from error
        whole = form.whole(text, [c for c in choices if c is not None], finish)
        return JSONResponse({**head, "object": form.object, "choices": [whole], "usage": usage()})

    async def events() -> AsyncIterator[str]:
        def event(content: dict[str, Any]) -> str:
            return f"data: {json.dumps(content)}\n\n"

        def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
            return event({**head, "object": form.chunk_object, "choices": choices, **more})

        try:
            for opening in form.opening():
                yield chunk([opening])
            yield chunk([form.piece(first)])
            async for piece in answer:
                yield chunk([form.piece(piece)])
            if body.stream_options is not None and body.stream_options.include_usage:
                yield chunk([], usage=usage())
        except asyncio.CancelledError:
            raise
        except Exception as error:
            said = _translated(error)
            yield event({"error": {"message": str(said), "type": said.kind, "param": None, "code": said.code}})
        yield "data: [DONE]\n\n"
        await answer.aclose()  # type: ignore[attr-defined]

    return StreamingResponse(events(), media_type="text/event-stream")


class _Form:
    """How pieces look in one of the two calls."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, service: Service) -> None:
        self.tokenizer = service.engine.tokenizer

    def opening(self) -> list[dict[str, Any]]:
        return []

    def whole(self, text: str, choices: list[Choice], finish: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def piece(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def token(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


class _Chat(_Form):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]

    def whole(self, text: str, choices: list[Choice], finish: str | None) -> dict[str, Any]:
        logs = {"content": [self._log(c) for c in choices]} if any(c.logprob is not None for c in choices) else None
        return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, "logprobs": logs}

    def piece(self, piece: Piece) -> dict[str, Any]:
        out: dict[str, Any] = {
            "index": 0,
            "delta": {"content": piece.text} if piece.text else {},
            "finish_reason": piece.finish,
        }
        if piece.choice is not None and piece.choice.logprob is not None:
            out["logprobs"] = {"content": [self._log(piece.choice)]}
        return out

    def _log(self, choice: Choice) -> dict[str, Any]:
        def one(token: int, value: float | None) -> dict[str, Any]:
            text = self.token(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return one(choice.token, choice.logprob) | {"top_logprobs": [one(*entry) for entry in choice.top]}


class _Completion(_Form):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def whole(self, text: str, choices: list[Choice], finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": finish, "logprobs": self._logs(choices)}

    def piece(self, piece: Piece) -> dict[str, Any]:
        logs = self._logs([piece.choice] if piece.choice is not None else [])
        return {"index": 0, "text": piece.text, "finish_reason": piece.finish, "logprobs": logs}

    def _logs(self, choices: list[Choice]) -> dict[str, Any] | None:
        told = [c for c in choices if c.logprob is not None]
        if not told:
            return None
        return {
            "tokens": [self.token(c.token) for c in told], "token_logprobs": [c.logprob for c in told],
            "top_logprobs": [{self.token(token): value for token, value in c.top} for c in told], "text_offset": [],
        }  # fmt: skip


class _Limits:
    """Refuses bodies that are too large, by their length where it is said and by counting where it is not."""

    def __init__(self, app: Callable[..., Awaitable[None]], upload: int, body: int) -> None:
        self.app, self.upload, self.body = app, upload, body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["method"] == "PUT" and scope["path"].startswith("/v1/adapters/")
        limit, seen = self.upload if upload else self.body, 0
        said = dict(scope["headers"]).get(b"content-length", b"")
        refused = ApiError(413, f"the body is over {limit} bytes", code="body_too_large").response()
        if said.isdigit() and int(said) > limit:
            await refused(scope, receive, send)
            return

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise ApiError(413, f"the body is over {limit} bytes", code="body_too_large")
            return message

        try:
            await self.app(scope, counted, send)
        except ApiError:
            await refused(scope, receive, send)


class _Metrics:
    """What Prometheus reads: asked for at every scrape, kept nowhere else."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Any:
        engine, bank = self.service.engine, self.service.engine.bank
        gauges: dict[str, tuple[float, str]] = {
            "adapters_loaded": (len(bank), "adapters in memory"), "adapters_capacity": (bank.slots, "slots of each kind of adapter"),
            "adapter_bytes": (bank.bytes, "bytes of the adapters in memory"), "requests_running": (engine.scheduler.running, "requests that run"),
            "requests_waiting": (engine.scheduler.waiting, "requests that wait"),
        }  # fmt: skip
        for name, (value, about) in gauges.items():
            yield GaugeMetricFamily(f"veratune_{name}", about, value=value)
        counters: dict[str, tuple[float, str]] = {
            "adapter_hits": (bank.counts.hits, "requests whose adapter was in memory"), "adapter_loads": (bank.counts.loads, "adapters loaded"),
            "adapter_evictions": (bank.counts.evictions, "adapters that made room"), "adapter_load_seconds": (bank.counts.load_seconds, "spent in loading"),
            "steps": (engine.counts.steps, "steps of the engine"), "step_seconds": (engine.counts.seconds, "spent in steps"),
            "prompt_tokens": (engine.counts.prompt_tokens, "tokens read"), "answer_tokens": (engine.counts.answer_tokens, "tokens made"),
        }  # fmt: skip
        for name, (value, about) in counters.items():
            yield CounterMetricFamily(f"veratune_{name}", about, value=value)
        ended = CounterMetricFamily("veratune_requests", "requests that ended", labels=["how"])
        for how, count in sorted(engine.counts.ended.items()):
            ended.add_metric([how], count)
        yield ended


def _translated(error: BaseException) -> ApiError:
    """An error as a client sees it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownAdapterError):
        return ApiError(404, str(error), code="model_not_found")
    if isinstance(error, BusyError | BankFullError):
        return ApiError(429, str(error), "rate_limit_error", "rate_limit_exceeded")
    if isinstance(error, StoreError) and "cannot be used" not in str(error) and "has no bytes" not in str(error):
        log.error("store: %s", error)
        return ApiError(503, "the store of adapters cannot be reached", "server_error")
    if isinstance(error, UnsupportedError) and "going down" in str(error):
        return ApiError(503, str(error), "server_error")
    if isinstance(error, AdapterFileError):
        return ApiError(400, f"the adapter was refused: {error}", code="invalid_adapter")
    if isinstance(error, VeratuneError):
        return ApiError(400, str(error))
    log.error("unforeseen", exc_info=error)
    return ApiError(500, "something went wrong here; the log says what", "server_error")


def _told(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Any], piece: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended with its server
        loop.call_soon_threadsafe(pieces.put_nowait, piece)


def _content(message: Message) -> str:
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)


def _owner(who: Caller, tenant: str | None) -> str:
    if tenant is None or tenant in who.tenants:
        return tenant or who.tenant
    raise UnknownAdapterError("no such adapter, or this key may not use it")


def _model(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "veratune"}


def _adapter(name: str, tenant: str, version: Version) -> dict[str, Any]:
    return {
        "id": name, "object": "adapter", "tenant": tenant, "version": version.number, "bytes": version.size, "created": int(version.created),
        "deleted": version.size == 0,
    }  # fmt: skip


def check_address(host: str, keys: Keys) -> None:
    """Raise UnsupportedError for an address that others reach, without keys."""
    if keys.path is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise UnsupportedError(
            f"without keys the server listens on 127.0.0.1 alone, not on {host}: make some with veratune key --key_file FILE --tenants NAME, and give --key_file FILE"
        )
