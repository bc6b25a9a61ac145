"""Chat and completions, whole and streamed, in OpenAI's shapes."""

import abc
import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field

from veratune.serving.engine import Engine, Piece
from veratune.serving.engine import Request as Asked
from veratune.serving.keys import Caller
from veratune.serving.routes.base import ApiError, Body, Served, Who, tell, translated
from veratune.serving.sampling import Choice, Sampling
from veratune.serving.service import Service
from veratune.tasks.language import render

router = APIRouter()


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class StreamOptions(Body):
    include_usage: bool = False


class _Generation(Body):
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


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, http: Request, who: Who, service: Served) -> Response:
    """An answer to a conversation."""
    engine = service.generating()
    talk = [{"role": m.role, "content": _content(m)} for m in body.messages]
    try:
        text = render(talk, engine.tokenizer, answer_next=True)
    except Exception as error:  # a template may refuse an order of roles in any way it likes
        raise ApiError(
            400, f"messages: the model's chat template refuses them: {' '.join(str(error).split())[:200]}"
        ) from error
    prompt = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    most = body.max_completion_tokens or body.max_tokens or max(1, min(256, engine.length - len(prompt)))
    asked = await asyncio.to_thread(_asked, service, who, body, prompt, most, body.top_logprobs if body.logprobs else None)
    return await _reply(engine, http, body, asked, _Chat(engine))


@router.post("/v1/completions")
async def completion(body: CompletionBody, http: Request, who: Who, service: Served) -> Response:
    """What comes behind a text."""
    engine = service.generating()
    prompt = list(engine.tokenizer(body.prompt)["input_ids"]) if isinstance(body.prompt, str) else body.prompt
    size = engine.model.config.get_text_config().vocab_size
    if any(not 0 <= token < size for token in prompt):
        raise ApiError(400, f"prompt: tokens are numbers from 0 to {size - 1}")
    asked = await asyncio.to_thread(_asked, service, who, body, prompt, body.max_tokens, body.logprobs)  # a bucket may be slow
    return await _reply(engine, http, body, asked, _Completion(engine))


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
    return Asked(**service.asked(who, body.model, service.generating()), prompt=prompt, sampling=sampling)


async def _reply(engine: Engine, http: Request, body: _Generation, asked: Asked, form: "_Form") -> Response:
    """Submit, and answer whole or in pieces."""
    loop, timeout = asyncio.get_running_loop(), http.app.state.timeout
    pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
    asked.listen = lambda piece: tell(loop, pieces.put_nowait, piece)
    engine.submit(asked)
    name, created = f"{form.prefix}-{uuid.uuid4().hex}", int(time.time())
    head = {"id": name, "created": created, "model": body.model}

    streaming = False  # a response that streams notices itself that its client has gone

    async def each() -> AsyncIterator[Piece]:
        look = time.monotonic() + 1
        end = look - 1 + timeout
        try:
            while True:
                piece: Piece | BaseException | None = None
                with contextlib.suppress(TimeoutError):
                    piece = await asyncio.wait_for(pieces.get(), 1.0)
                now = time.monotonic()
                if now >= look and not streaming:
                    look = now + 1
                    if await http.is_disconnected():
                        raise asyncio.CancelledError
                if now > end:
                    raise ApiError(504, f"the answer took over {timeout:g} s", "server_error")
                if piece is None:
                    continue
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            if asked.ended is None:
                engine.cancel(asked)

    def usage() -> dict[str, int]:
        said = len(asked.text.tokens) if asked.text else 0
        return {"prompt_tokens": len(asked.prompt), "completion_tokens": said, "total_tokens": len(asked.prompt) + said}

    answer = each()
    try:
        first = await anext(answer)  # what fails before the first token fails as a status, not inside a stream
    except asyncio.CancelledError:
        return Response(status_code=499)
    except Exception as error:
        raise translated(error) from error
    if not body.stream:
        text, choices, finish = first.text, [first.choice], first.finish
        try:
            async for piece in answer:
                text, finish = text + piece.text, piece.finish
                choices.append(piece.choice)
        except asyncio.CancelledError:
            return Response(status_code=499)
        except Exception as error:
            raise translated(error) from error
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
            said = translated(error)
            yield event({"error": {"message": str(said), "type": said.kind, "param": None, "code": said.code}})
        yield "data: [DONE]\n\n"
        await answer.aclose()  # type: ignore[attr-defined]

    streaming = True
    return StreamingResponse(events(), media_type="text/event-stream")


class _Form(abc.ABC):
    """How pieces look in one of the two calls."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, engine: Engine) -> None:
        self.tokenizer = engine.tokenizer

    def opening(self) -> list[dict[str, Any]]:
        return []

    @abc.abstractmethod
    def whole(self, text: str, choices: list[Choice], finish: str | None) -> dict[str, Any]:
        """A whole answer."""

    @abc.abstractmethod
    def piece(self, piece: Piece) -> dict[str, Any]:
        """A part of one."""

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


def _content(message: Message) -> str:
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
