"""POST /v1/chat/completions and /v1/completions."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from fastapi import APIRouter, Request, Response

from veratune.serving.engine.engine import Engine
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampling import SamplingParams
from veratune.serving.http.dependencies import CallerDep, Context, ContextDep
from veratune.serving.http.errors import ApiError
from veratune.serving.http.generation import GenerationCall
from veratune.serving.http.responses import ChatFormat, CompletionFormat
from veratune.serving.http.schemas import ChatBody, CompletionBody, GenerationBody, Tool
from veratune.serving.http.tools import ToolParser, family_of, make_parser
from veratune.serving.keys import Caller

router = APIRouter()
_DEFAULT_TOKENS = 256  # of a chat completion without max_tokens


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, http: Request, caller: CallerDep, context: ContextDep) -> Response:
    """Continue a conversation: one assistant message, or `n` of them."""
    engine, encoder = context.service.require_engine(), context.prompt_encoder()
    context.note_ignored(body)
    tools = _tools(body, engine.tokenizer.chat_template)
    schemas = sum(len(tool.model_dump_json()) for tool in tools)
    encoder.check_size(sum(m.characters for m in body.messages) + schemas, "messages")
    prompt = await context.pools.tokenize.run(encoder.encode_chat, body.messages, tools)
    room = max(1, min(_DEFAULT_TOKENS, engine.max_model_len - len(prompt)))
    params = _sampling(
        body,
        body.max_completion_tokens or body.max_tokens or room,
        body.top_logprobs if body.logprobs else None,
    )
    requests = await _requests(context, caller, body, [prompt], params)
    response_format = ChatFormat(
        engine.tokenizer, body.model, _tool_parser(engine, tools), body.parallel_tool_calls
    )
    return await GenerationCall(engine, http, context, requests, response_format).respond(body)


@router.post("/v1/completions")
async def completion(
    body: CompletionBody, http: Request, caller: CallerDep, context: ContextDep
) -> Response:
    """Continue a text, or each of several: texts, or token ids."""
    engine, encoder = context.service.require_engine(), context.prompt_encoder()
    context.note_ignored(body)
    _check_count(context, len(body.prompts), body.n)
    prompts: list[Sequence[int]] = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            encoder.check_size(len(prompt), "prompt")
            prompts.append(await context.pools.tokenize.run(encoder.encode_text, prompt))
        else:
            prompts.append(prompt)
    params = _sampling(body, body.max_tokens, body.logprobs)
    requests = await _requests(context, caller, body, prompts, params)
    response_format = CompletionFormat(engine.tokenizer, body.model)
    return await GenerationCall(engine, http, context, requests, response_format).respond(body)


def _tools(body: ChatBody, chat_template: str | None) -> list[Tool]:
    """The tools that the model may call. Raises ApiError where it can call none."""
    if not body.tools or body.tool_choice == "none":
        return []
    if family_of(chat_template) is None:
        raise ApiError(
            400,
            "tools: this model's chat template has no tools; leave them out",
            param="tools",
        )
    if body.tool_choice != "auto":
        raise ApiError(
            400,
            "tool_choice: only auto and none are supported here",
            param="tool_choice",
        )
    return body.tools


def _tool_parser(engine: Engine, tools: Sequence[Tool]) -> Callable[[], ToolParser] | None:
    family = family_of(engine.tokenizer.chat_template)
    if not tools or family is None:
        return None
    return functools.partial(make_parser, family, [tool.function.name for tool in tools])


def _sampling(body: GenerationBody, max_tokens: int, logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
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


async def _requests(
    context: Context,
    caller: Caller,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> list[GenerationRequest]:
    """The requests of one call: `n` for each prompt; completion i uses seed + i."""
    engine = context.service.require_engine()
    _check_count(context, len(prompts), body.n)
    fields = await context.pools.read.run(
        context.service.request_fields, caller, body.model, engine
    )
    seeded = [
        params if body.seed is None else dataclasses.replace(params, seed=body.seed + i)
        for i in range(body.n)
    ]
    requests = [
        GenerationRequest(**fields, tokens=prompt, sampling=sampling)
        for prompt in prompts
        for sampling in seeded
    ]
    for request in requests:
        if request.size > engine.max_model_len:
            raise ApiError(
                400,
                f"{len(request.tokens)} prompt tokens and {request.sampling.max_tokens} of "
                f"max_tokens are over the {engine.max_model_len} that this model takes here; "
                "shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
                param="messages" if isinstance(body, ChatBody) else "prompt",
            )
    context.limiter.count_tokens(caller.tenant, sum(request.size for request in requests))
    return requests


def _check_count(context: Context, prompts: int, n: int) -> None:
    most = context.service.require_engine().config.max_queue_per_tenant
    if prompts * n > most:
        raise ApiError(
            400,
            f"{prompts} prompts and n={n}; one call may want {most} completions at most",
            param="n",
        )
