"""Chat and completions, whole and streamed, in OpenAI's shapes."""

import abc
import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field

from veratune.serving.engine.engine import Engine, GenerationRequest, OutputDelta
from veratune.serving.engine.sampling import SampledToken, SamplingParams
from veratune.serving.http.routes.base import (
    ApiError,
    Body,
    CallerDep,
    ServiceDep,
    post_threadsafe,
    to_api_error,
)
from veratune.serving.keys import Caller
from veratune.serving.service import Service
from veratune.tasks.text.language import render

router = APIRouter()


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class StreamOptions(Body):
    include_usage: bool = False


class TextFormat(Body):
    type: Literal["text"]


class _Generation(Body):
    """What both kinds of generation take. What the engine does not do may be sent at its value for nothing."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31)  # -1: all of them, as other servers have it
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=128)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (
            ()
            if self.stop is None
            else (self.stop,)
            if isinstance(self.stop, str)
            else tuple(self.stop)
        )


class ChatBody(_Generation):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True


class CompletionBody(_Generation):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] = 1


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, http: Request, caller: CallerDep, service: ServiceDep) -> Response:
    """An answer to a conversation, or `n` of them."""
    engine = service.generating()
    # A developer's message is what a system's was before; templates know that one.
    talk = [
        {"role": "system" if m.role == "developer" else m.role, "content": _content(m)}
        for m in body.messages
    ]
    try:
        text = render(talk, engine.tokenizer, add_generation_prompt=True)
    except Exception as error:  # a template may refuse an order of roles in any way it likes
        raise ApiError(
            400,
            f"messages: the model's chat template refuses them: {' '.join(str(error).split())[:200]}",
        ) from error
    prompt = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    most = (
        body.max_completion_tokens
        or body.max_tokens
        or max(1, min(256, engine.max_model_len - len(prompt)))
    )
    asked = await asyncio.to_thread(
        _asked, service, caller, body, [prompt], most, body.top_logprobs if body.logprobs else None
    )
    return await _reply(engine, http, body, asked, _Chat(engine))


@router.post("/v1/completions")
async def completion(
    body: CompletionBody, http: Request, caller: CallerDep, service: ServiceDep
) -> Response:
    """What comes behind a text, or behind each of several: texts, or tokens."""
    engine = service.generating()
    several = isinstance(body.prompt, list) and body.prompt and not isinstance(body.prompt[0], int)
    given: Any = body.prompt if several else [body.prompt]
    prompts = [
        list(engine.tokenizer(one)["input_ids"]) if isinstance(one, str) else one for one in given
    ]
    asked = await asyncio.to_thread(
        _asked, service, caller, body, prompts, body.max_tokens, body.logprobs
    )  # a bucket may be slow
    return await _reply(engine, http, body, asked, _Completion(engine))


def _asked(
    service: Service,
    caller: Caller,
    body: _Generation,
    prompts: list[list[int]],
    most: int,
    logprobs: int | None,
) -> list[GenerationRequest]:
    """The requests of one call: `n` for each prompt, with seeds one behind the other."""
    engine = service.generating()
    if len(prompts) * body.n > engine.config.max_queue_per_tenant:
        raise ApiError(
            400,
            f"{len(prompts)} prompts and n={body.n}; {engine.config.max_queue_per_tenant} answers to one call at most",
        )
    model = service.asked(caller, body.model, engine)
    sampling = SamplingParams(
        max_tokens=most,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        seed=body.seed,
        stop=body.stops,
        logprobs=logprobs,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=tuple(body.logit_bias.items()),
    )
    own = [
        sampling if body.seed is None else dataclasses.replace(sampling, seed=body.seed + i)
        for i in range(body.n)
    ]
    return [
        GenerationRequest(**model, tokens=prompt, sampling=one) for prompt in prompts for one in own
    ]


async def _reply(
    engine: Engine, http: Request, body: _Generation, asked: list[GenerationRequest], form: "_Form"
) -> Response:
    """Submit, and answer whole or in pieces. The first request that fails fails the call."""
    loop, timeout = asyncio.get_running_loop(), http.app.state.timeout
    pieces: asyncio.Queue[tuple[int, OutputDelta | BaseException]] = asyncio.Queue()

    def cancel() -> None:
        for one in asked:
            if one.finished_time is None:
                engine.cancel(one)

    try:
        for index, one in enumerate(asked):
            one.on_output = lambda piece, index=index: post_threadsafe(
                loop, pieces.put_nowait, (index, piece)
            )  # type: ignore[misc]
            engine.submit(one)
    except BaseException:
        cancel()
        raise
    name, created = f"{form.prefix}-{uuid.uuid4().hex}", int(time.time())
    head = {"id": name, "created": created, "model": body.model}

    streaming = False  # a response that streams notices itself that its client has gone

    async def each() -> AsyncIterator[tuple[int, OutputDelta]]:
        look = time.monotonic() + 1
        end, open_ = look - 1 + timeout, len(asked)
        try:
            while open_:
                got: tuple[int, OutputDelta | BaseException] | None = None
                with contextlib.suppress(TimeoutError):
                    got = await asyncio.wait_for(pieces.get(), 1.0)
                now = time.monotonic()
                if now >= look and not streaming:
                    look = now + 1
                    if await http.is_disconnected():
                        raise asyncio.CancelledError
                if now > end:
                    raise ApiError(504, f"the answer took over {timeout:g} s", "server_error")
                if got is None:
                    continue
                index, piece = got
                if isinstance(piece, BaseException):
                    raise piece
                yield index, piece
                open_ -= piece.finish_reason is not None
        finally:
            cancel()

    def usage() -> dict[str, Any]:
        prompts = asked[:: body.n]
        read, said = (
            sum(len(one.tokens) for one in prompts),
            sum(len(one.output_token_ids) for one in asked),
        )
        known = {"cached_tokens": sum(one.cached_tokens for one in prompts)}
        return {
            "prompt_tokens": read,
            "completion_tokens": said,
            "total_tokens": read + said,
            "prompt_tokens_details": known,
        }

    answer = each()
    try:
        first = await anext(
            answer
        )  # what fails before the first token fails as a status, not inside a stream
    except asyncio.CancelledError:
        return Response(status_code=499)
    except Exception as error:
        raise to_api_error(error) from error
    if not body.stream:
        found: list[list[OutputDelta]] = [[] for _ in asked]
        found[first[0]].append(first[1])
        try:
            async for index, piece in answer:
                found[index].append(piece)
        except asyncio.CancelledError:
            return Response(status_code=499)
        except Exception as error:
            raise to_api_error(error) from error
        return JSONResponse(
            {
                **head,
                "object": form.object,
                "choices": list(map(form.whole, itertools.count(), found)),
                "usage": usage(),
            }
        )

    async def events() -> AsyncIterator[str]:
        def event(content: dict[str, Any]) -> str:
            return f"data: {json.dumps(content)}\n\n"

        def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
            return event({**head, "object": form.chunk_object, "choices": choices, **more})

        try:
            for opening in map(form.opening, range(len(asked))):
                if opening is not None:
                    yield chunk([opening])
            yield chunk([form.piece(*first)])
            async for index, piece in answer:
                yield chunk([form.piece(index, piece)])
            if body.stream_options is not None and body.stream_options.include_usage:
                yield chunk([], usage=usage())
        except asyncio.CancelledError:
            raise
        except Exception as error:
            said = to_api_error(error)
            yield event(
                {
                    "error": {
                        "message": str(said),
                        "type": said.kind,
                        "param": None,
                        "code": said.code,
                    }
                }
            )
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

    def opening(self, index: int) -> dict[str, Any] | None:
        """What stands before the first part of a streamed answer."""
        return None

    @abc.abstractmethod
    def whole(self, index: int, pieces: Sequence[OutputDelta]) -> dict[str, Any]:
        """A whole answer."""

    @abc.abstractmethod
    def piece(self, index: int, piece: OutputDelta) -> dict[str, Any]:
        """A part of one."""

    def token(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


class _Chat(_Form):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "finish_reason": None,
        }

    def whole(self, index: int, pieces: Sequence[OutputDelta]) -> dict[str, Any]:
        told = _told(pieces)
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        logs = {"content": [self._log(choice) for choice in told]} if told else None
        return {
            "index": index,
            "message": message,
            "finish_reason": pieces[-1].finish_reason,
            "logprobs": logs,
        }

    def piece(self, index: int, piece: OutputDelta) -> dict[str, Any]:
        out: dict[str, Any] = {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "finish_reason": piece.finish_reason,
        }
        if told := _told([piece]):
            out["logprobs"] = {"content": [self._log(choice) for choice in told]}
        return out

    def _log(self, choice: SampledToken) -> dict[str, Any]:
        def one(token: int, value: float | None) -> dict[str, Any]:
            text = self.token(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return one(choice.token_id, choice.logprob) | {
            "top_logprobs": [one(*entry) for entry in choice.top_logprobs]
        }


class _Completion(_Form):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def whole(self, index: int, pieces: Sequence[OutputDelta]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        return {
            "index": index,
            "text": text,
            "finish_reason": pieces[-1].finish_reason,
            "logprobs": self._logs(_told(pieces)),
        }

    def piece(self, index: int, piece: OutputDelta) -> dict[str, Any]:
        return self.whole(index, [piece])

    def _logs(self, told: Sequence[SampledToken]) -> dict[str, Any] | None:
        if not told:
            return None
        return {
            "tokens": [self.token(c.token_id) for c in told], "token_logprobs": [c.logprob for c in told],
            "top_logprobs": [{self.token(token): value for token, value in c.top_logprobs} for c in told], "text_offset": [],
        }  # fmt: skip


def _told(pieces: Sequence[OutputDelta]) -> list[SampledToken]:
    """The tokens whose log probabilities were asked for."""
    return [
        piece.token
        for piece in pieces
        if piece.token is not None and piece.token.logprob is not None
    ]


def _content(message: Message) -> str:
    return (
        message.content
        if isinstance(message.content, str)
        else "".join(part.text for part in message.content)
    )
