"""POST /tokenize and /detokenize, as vLLM has them."""

from fastapi import APIRouter

from veratune.serving.http.dependencies import CallerDep, ContextDep
from veratune.serving.http.errors import ApiError
from veratune.serving.http.prompts import with_system
from veratune.serving.http.schemas.tokens import DetokenizeBody, TokenizeBody

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, caller: CallerDep, context: ContextDep) -> dict[str, object]:
    """Token ids of a text or of a conversation."""
    context.check_extra_fields(body)
    service, pool = context.service, context.pools.tokenize
    engine, encoder = service.require_engine(), context.prompt_encoder()
    target = await context.pools.read.run(service.target, caller, body.model)
    if body.messages:
        messages = with_system(body.messages, target.system)
        characters = sum(message.characters for message in messages)
        schemas = sum(len(tool.model_dump_json()) for tool in body.tools)
        encoder.check_size(characters + schemas, "messages")
        tokens = await pool.run(
            encoder.encode_chat,
            messages,
            body.tools,
            body.chat_template_kwargs,
            body.add_generation_prompt,
        )
    elif body.prompt is not None:
        encoder.check_size(len(body.prompt), "prompt")
        tokens = await pool.run(encoder.encode_text, body.prompt, body.add_special_tokens)
    else:
        raise ApiError(400, "prompt: a prompt or messages are wanted", param="prompt")
    found: dict[str, object] = {
        "count": len(tokens),
        "max_model_len": engine.max_model_len,
        "tokens": tokens,
    }
    if body.return_token_strs:
        found["token_strs"] = engine.tokenizer.convert_ids_to_tokens(tokens)
    return found


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeBody, caller: CallerDep, context: ContextDep
) -> dict[str, object]:
    """The text of token ids, special tokens included."""
    context.check_extra_fields(body)
    service, encoder = context.service, context.prompt_encoder()
    engine = service.require_engine()
    await context.pools.read.run(service.request_fields, caller, body.model, engine)
    text = await context.pools.tokenize.run(encoder.decode, body.tokens, False)
    return {"prompt": text}
