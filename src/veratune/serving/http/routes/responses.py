"""POST /v1/responses. Responses are not kept, so each call sends the whole conversation."""

from fastapi import APIRouter, Request, Response

from veratune.serving.http.chat_call import ChatSettings, prepare_chat
from veratune.serving.http.choosing import target_of_chat
from veratune.serving.http.dependencies import CallerDep, Context, ContextDep
from veratune.serving.http.errors import ApiError
from veratune.serving.http.generation import Client, GenerationCall, StreamSettings
from veratune.serving.http.requests import make_requests, sampling_of
from veratune.serving.http.responses_builder import ResponsesBuilder
from veratune.serving.http.responses_input import format_of, messages_of, tools_of
from veratune.serving.http.schemas.responses import ResponsesBody
from veratune.serving.keys import Caller

router = APIRouter()
_LOGPROBS = "message.output_text.logprobs"


@router.post("/v1/responses")
async def respond(
    body: ResponsesBody, http: Request, caller: CallerDep, context: ContextDep
) -> Response:
    """Continue a conversation with a message, tool calls, or both."""
    return await run_response(body, http, caller, context)


async def run_response(
    body: ResponsesBody, client: Client, caller: Caller, context: Context
) -> Response:
    """Answer a call for a connection or a batch."""
    engine = context.service.require_engine()
    context.check_extra_fields(body)
    messages = messages_of(body)
    if not messages:
        raise ApiError(400, "input: at least one item is wanted", param="input")
    tools, choice = tools_of(body)
    settings = ChatSettings(
        messages,
        tools,
        choice,
        body.parallel_tool_calls,
        format_of(body),
        body.max_output_tokens,
    )
    target = await target_of_chat(context, caller, body.model, messages)
    prepared = await prepare_chat(context, caller, target, settings)
    logprobs = body.top_logprobs if _LOGPROBS in body.include else None
    params = sampling_of(body, prepared.max_tokens, logprobs)
    requests = await make_requests(
        context, caller, target, body, [prepared.prompt], params, grammar=prepared.grammar
    )
    builder = ResponsesBuilder(engine.tokenizer, target.model, body, prepared.tools)
    options = StreamSettings(body.stream)
    return await GenerationCall(engine, client, context, requests, builder, options).respond()
