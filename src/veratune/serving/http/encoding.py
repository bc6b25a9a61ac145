"""Inputs of the encoder: bounds, token ids, and batches."""

import asyncio
from collections.abc import Mapping, Sequence

from veratune.serving.engine.encoder import Encoder, EncodeRequest, Want
from veratune.serving.http.dependencies import Context
from veratune.serving.http.errors import ApiError
from veratune.serving.http.generation import submit_and_wait
from veratune.serving.keys import Caller

MAX_INPUTS = 2048  # of one call, as OpenAI has it
Encoded = Mapping[str, Sequence[int]]


def check_count(inputs: int) -> None:
    if not 1 <= inputs <= MAX_INPUTS:
        raise ApiError(400, f"input: {inputs} texts; 1 to {MAX_INPUTS} are wanted", param="input")


async def encode(
    context: Context, encoder: Encoder, inputs: Sequence[tuple[str, ...]]
) -> list[Encoded]:
    """Token ids of texts or pairs, by the tokenizer in a thread."""
    longest = max(map(len, encoder.tokenizer.get_vocab()), default=1)
    for texts in inputs:
        if sum(map(len, texts)) > encoder.max_model_len * longest:
            raise ApiError(
                400,
                f"input: {sum(map(len, texts))} characters cannot fit into the "
                f"{encoder.max_model_len} tokens of this model; shorten it",
                code="context_length_exceeded",
                param="input",
            )
    return await context.pools.tokenize.run(lambda: [encoder.encode(*texts) for texts in inputs])


async def encode_and_run(
    context: Context,
    encoder: Encoder,
    caller: Caller,
    model: str,
    encoded: Sequence[Encoded],
    want: Want,
) -> tuple[list[list[float]], list[EncodeRequest]]:
    """The numbers of every input, and the requests. The first request that fails fails the call."""
    fields = await context.pools.read.run(context.service.request_fields, caller, model, encoder)
    requests = [EncodeRequest(**fields, encoded=entry, want=want) for entry in encoded]
    for request in requests:
        encoder.check(request)
    context.limiter.count_tokens(caller.tenant, sum(request.size for request in requests))
    outputs: list[list[float]] = []
    # A long list takes its turns with other tenants' requests, a batch at a time.
    size = encoder.config.max_num_seqs
    for start in range(0, len(requests), size):
        batch = [submit_and_wait(encoder, request) for request in requests[start : start + size]]
        for output in await asyncio.gather(*batch, return_exceptions=True):
            if isinstance(output, BaseException):
                raise output
            outputs.append(output)
    return outputs, requests
