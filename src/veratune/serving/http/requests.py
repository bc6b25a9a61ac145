"""From checked bodies to requests of the engine."""

import dataclasses
from collections.abc import Sequence

from veratune.serving.engine.grammar import Grammar
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampling import SamplingParams
from veratune.serving.http.dependencies import Context
from veratune.serving.http.errors import ApiError
from veratune.serving.http.schemas.generation import CompletionBody, GenerationBody
from veratune.serving.http.structured import Constraint, compile_constraint
from veratune.serving.keys import Caller
from veratune.serving.targets import Target


def sampling_of(
    body: GenerationBody,
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The sampling parameters of a body. Raises ConfigError.

    Args:
        body: The body.
        max_tokens: Most tokens of a completion.
        logprobs: Alternatives for each token of the completion; None for no log-probabilities.
        prompt_logprobs: The same for the prompt.
    """
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        seed=body.seed,
        stop=body.stops,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=tuple(body.logit_bias.items()),
    )


async def grammar_for(
    context: Context, caller: Caller, constraint: Constraint | None
) -> Grammar | None:
    """Compile a constraint in a thread, one of each tenant at a time. Raises ApiError."""
    if constraint is None:
        return None
    compiler = context.service.require_engine().grammars
    async with context.tenant_lock("grammar", caller.tenant):
        return await context.pools.grammar.run(compile_constraint, compiler, constraint)


async def make_requests(
    context: Context,
    caller: Caller,
    target: Target,
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    grammar: Grammar | None = None,
    continues_text: bool = False,
) -> list[GenerationRequest]:
    """The requests of one call: `n` for each prompt; completion i uses seed + i.

    Args:
        context: The application's context.
        caller: Who calls.
        target: The model.
        body: Has `n` and the seed.
        prompts: Token ids.
        params: How completions are sampled.
        grammar: What completions must follow.
        continues_text: Whether completions continue the text of their prompts.

    Raises:
        ApiError: A prompt does not fit.
    """
    engine = context.service.require_engine()
    check_count(context, len(prompts), body.n)
    seeded = [
        params if body.seed is None else dataclasses.replace(params, seed=body.seed + i)
        for i in range(body.n)
    ]
    requests = [
        GenerationRequest(
            **target.fields,
            tokens=prompt,
            sampling=sampling,
            grammar=grammar,
            continues_text=continues_text,
        )
        for prompt in prompts
        for sampling in seeded
    ]
    for request in requests:
        if request.size > engine.max_model_len:
            raise ApiError(
                400,
                f"{len(request.tokens)} prompt tokens and {request.sampling.max_tokens} of "
                # litellm knows the error by the words about the maximum context length.
                f"max_tokens are over the {engine.max_model_len} that fit; this model's maximum "
                f"context length is {engine.max_model_len} tokens: shorten the prompt or lower "
                "max_tokens",
                code="context_length_exceeded",
                param="prompt" if isinstance(body, CompletionBody) else "messages",
            )
    context.limiter.count_tokens(caller.tenant, sum(request.size for request in requests))
    return requests


def check_count(context: Context, prompts: int, n: int) -> None:
    """Raise ApiError for a call that wants more completions than a tenant may queue."""
    most = context.service.require_engine().config.max_queue_per_tenant
    if prompts * n > most:
        raise ApiError(
            400,
            f"{prompts} prompts and n={n}; one call may want {most} completions at most",
            param="n",
        )
