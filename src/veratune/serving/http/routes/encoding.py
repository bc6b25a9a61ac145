"""Embeddings in the OpenAI API's shape, and classes in vLLM's, from an encoder."""

import base64

import numpy as np
import torch
from fastapi import APIRouter
from openai.types import CreateEmbeddingResponse, Embedding
from openai.types.create_embedding_response import Usage

from veratune.serving.http.dependencies import CallerDep, ContextDep
from veratune.serving.http.encoding import Encoded, check_count, encode, encode_and_run
from veratune.serving.http.errors import ApiError
from veratune.serving.http.schemas.encoding import ClassifyBody, EmbeddingBody

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(
    body: EmbeddingBody, caller: CallerDep, context: ContextDep
) -> dict[str, object]:
    """A vector of length 1 for each input, computed with the model's own adapter."""
    encoder = context.service.require_encoder()
    context.check_extra_fields(body)
    width, vocabulary = encoder.model.config.hidden_size, encoder.model.config.vocab_size
    if body.dimensions is not None and body.dimensions != width:
        raise ApiError(
            400,
            f"dimensions: this model's embeddings have {width}, and are not cut",
            param="dimensions",
        )
    encoded: list[Encoded] = []
    check_count(len(body.inputs))
    for entry in body.inputs:
        if isinstance(entry, str):
            encoded += await encode(context, encoder, [(entry,)])
        elif any(not 0 <= token < vocabulary for token in entry):
            raise ApiError(400, f"input: tokens are numbers from 0 to {vocabulary - 1}")
        else:
            encoded.append({"input_ids": entry, "attention_mask": [1] * len(entry)})
    vectors, requests = await encode_and_run(
        context, encoder, caller, body.model, encoded, "embedding"
    )
    tokens = sum(request.size for request in requests)
    data = [
        Embedding.model_construct(
            index=i, object="embedding", embedding=_shown(vector, body.encoding_format)
        )
        for i, vector in enumerate(vectors)
    ]
    response = CreateEmbeddingResponse.model_construct(
        object="list",
        model=body.model,
        data=data,
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )
    return response.model_dump(exclude_unset=True, warnings=False)


@router.post("/v1/classify")
async def classify(body: ClassifyBody, caller: CallerDep, context: ContextDep) -> dict[str, object]:
    """The likeliest class of each text, or pair of texts, with all probabilities.

    An adapter that was trained on numbers gives its number instead.
    """
    encoder = context.service.require_encoder()
    context.check_extra_fields(body)
    texts, pairs = body.texts, body.pairs
    check_count(len(texts))
    if body.pair is not None and len(pairs) != len(texts):
        raise ApiError(
            400,
            f"pair: {len(pairs)} texts for {len(texts)} of input; as many are wanted",
            param="pair",
        )
    inputs = [(text, *pairs[i : i + 1]) for i, text in enumerate(texts)]
    encoded = await encode(context, encoder, inputs)
    logits, requests = await encode_and_run(context, encoder, caller, body.model, encoded, "logits")
    lease = requests[0].lease
    labels = [str(label) for label in lease.task.get("labels", [])] if lease is not None else []
    tokens = sum(request.size for request in requests)
    return {
        "object": "list",
        "model": body.model,
        "data": [_classification(i, row, labels) for i, row in enumerate(logits)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _classification(index: int, logits: list[float], labels: list[str]) -> dict[str, object]:
    if len(logits) == 1:
        return {"index": index, "value": logits[0]}
    probabilities = torch.tensor(logits).softmax(-1)
    best = int(probabilities.argmax())
    return {
        "index": index,
        "label": labels[best] if best < len(labels) else str(best),
        "probs": probabilities.tolist(),
        "num_classes": len(logits),
        "labels": labels,
    }


def _shown(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
