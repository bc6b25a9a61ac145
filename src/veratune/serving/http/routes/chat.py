"""POST /v1/chat/completions and /v1/completions."""

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from veratune.serving.http.chat_builder import ChatBuilder
from veratune.serving.http.chat_call import ChatSettings, prepare_chat
from veratune.serving.http.choosing import target_of_chat, target_of_prompts
from veratune.serving.http.completion_builder import CompletionBuilder
from veratune.serving.http.dependencies import CallerDep, Context, ContextDep
from veratune.serving.http.generation import Client, GenerationCall, StreamSettings
from veratune.serving.http.requests import check_count, grammar_for, make_requests, sampling_of
from veratune.serving.http.schemas.generation import ChatBody, CompletionBody, GenerationBody
from veratune.serving.http.structured import constraint_of
from veratune.serving.keys import Caller

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, http: Request, caller: CallerDep, context: ContextDep) -> Response:
    """Continue a conversation: one assistant message, or `n` of them."""
    return await run_chat(body, http, caller, context)


async def run_chat(body: ChatBody, client: Client, caller: Caller, context: Context) -> Response:
    """Answer a chat completion for a connection or a batch."""
    engine = context.service.require_engine()
    context.check_extra_fields(body)
    settings = ChatSettings(
        body.messages,
        body.tools,
        body.tool_choice,
        body.parallel_tool_calls,
        constraint_of(body),
        body.max_completion_tokens or body.max_tokens,
        body.chat_template_kwargs,
    )
    target = await target_of_chat(context, caller, body.model, body.messages)
    prepared = await prepare_chat(context, caller, target, settings)
    params = sampling_of(body, prepared.max_tokens, body.top_logprobs if body.logprobs else None)
    requests = await make_requests(
        context, caller, target, body, [prepared.prompt], params, grammar=prepared.grammar
    )
    builder = ChatBuilder(engine.tokenizer, target.model, prepared.tools)
    return await GenerationCall(engine, client, context, requests, builder, _how(body)).respond()


@router.post("/v1/completions")
async def completion(
    body: CompletionBody, http: Request, caller: CallerDep, context: ContextDep
) -> Response:
    """Continue a text, or each of several: texts, or token ids."""
    return await run_completion(body, http, caller, context)


async def run_completion(
    body: CompletionBody, client: Client, caller: Caller, context: Context
) -> Response:
    """Answer a completion for a connection or a batch."""
    engine, encoder = context.service.require_engine(), context.prompt_encoder()
    context.check_extra_fields(body)
    check_count(context, len(body.prompts), body.n)
    target = await target_of_prompts(context, caller, body.model, body.prompts)
    prompts: list[Sequence[int]] = []
    echoes: list[str] = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            encoder.check_size(len(prompt), "prompt")
            prompts.append(await context.pools.tokenize.run(encoder.encode_text, prompt))
            text = prompt
        else:
            prompts.append(prompt)
            text = await context.pools.tokenize.run(encoder.decode, prompt) if body.echo else ""
        echoes += [text] * body.n
    grammar = await grammar_for(context, caller, constraint_of(body))
    params = sampling_of(body, body.max_tokens, body.logprobs, body.logprobs if body.echo else None)
    requests = await make_requests(
        context, caller, target, body, prompts, params, grammar=grammar, continues_text=True
    )
    builder = CompletionBuilder(
        engine.tokenizer, target.model, requests, echoes if body.echo else None
    )
    return await GenerationCall(engine, client, context, requests, builder, _how(body)).respond()


def _how(body: GenerationBody) -> StreamSettings:
    return StreamSettings(body.stream, body.n, body.include_usage, body.continuous_usage)
