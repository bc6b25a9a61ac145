"""Which model a call is for, where the client may leave the choice to the server ("auto")."""

from collections.abc import Sequence

from veratune.serving.http.dependencies import Context
from veratune.serving.http.errors import ApiError
from veratune.serving.http.schemas.chat import Message
from veratune.serving.keys import Caller
from veratune.serving.names import is_auto
from veratune.serving.routing.examples import user_texts
from veratune.serving.targets import Target


async def target_of_chat(
    context: Context, caller: Caller, model: str, messages: Sequence[Message]
) -> Target:
    """Resolve the model of a conversation; "auto" is chosen by the user's messages.

    Args:
        context: The application's context.
        caller: Who calls.
        model: The name that the client sent.
        messages: The conversation.

    Raises:
        ApiError: "auto" for a conversation without a text of the user.
        Exception: As `Service.target` and `Service.choose`.
    """
    if is_auto(model):
        texts = user_texts([{"role": m.role, "content": m.text} for m in messages])
        if not texts:
            raise ApiError(
                400,
                f"model: {model!r} is chosen by the user's messages, and there is none with text",
                param="model",
            )
        model = await _choose(context, caller, model, [texts])
    return await context.pools.read.run(context.service.target, caller, model)


async def target_of_prompts(
    context: Context, caller: Caller, model: str, prompts: Sequence[str | Sequence[int]]
) -> Target:
    """Resolve the model of prompts; "auto" is chosen by all of them, and must be the same.

    Args:
        context: The application's context.
        caller: Who calls.
        model: The name that the client sent.
        prompts: Texts or token ids.

    Raises:
        Exception: As `Service.target` and `Service.choose`.
    """
    if is_auto(model):
        decode = context.prompt_encoder().decode
        texts = [
            p if isinstance(p, str) else await context.pools.tokenize.run(decode, p)
            for p in prompts
        ]
        model = await _choose(context, caller, model, [[text] for text in texts])
    return await context.pools.read.run(context.service.target, caller, model)


async def _choose(
    context: Context, caller: Caller, model: str, inputs: Sequence[Sequence[str]]
) -> str:
    return await context.pools.route.run(context.service.choose, caller, model, inputs)
